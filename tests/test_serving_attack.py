"""What one client can send to harm the others: beside each attack a correct request is answered right and in time."""

import concurrent.futures
import contextlib
import gzip
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import FAULTS, Service, settings_of

pytest.importorskip("paddle_serving_server", reason="needs Paddle Serving: bash setup_env.sh --serving")
import grpc
import protocol
import supervisor

GOOD = {"text": "一丁七万丈三"}
SETTINGS = settings_of(timeout_ms=3000, request_ms=3000, max_connections=100, worker_num=32)


@pytest.fixture(scope="module")
def attacked(pruned, tmp_path_factory):
    with Service(tmp_path_factory.mktemp("attacked"), pruned / "0.75/sub_static", settings=SETTINGS) as service:
        yield service


def memory(service):
    """Resident memory of the worker, in MB."""
    with open(f"/proc/{service.worker()}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+) kB", file.read()).group(1)) / 1000


def ask(service):
    """(seconds, logits) of a correct request by HTTP and one by RPC, each over a connection of its own."""
    started = time.monotonic()
    status, answer = service.post(GOOD)
    assert status == 200, answer
    response = service.call(protocol.messages().Request(key=["text"], value=[GOOD["text"]]), timeout=10)
    assert response.err_no == 0, response
    by_rpc = json.loads(dict(zip(response.key, response.value))["logits"])
    assert np.allclose(by_rpc, answer["logits"], atol=1e-4)
    return time.monotonic() - started, answer["logits"]


@contextlib.contextmanager
def unharmed(service, allowed=0.5):
    """Within the block an attack goes on: correct requests are answered right within twice the usual time and 0.5 s;
    afterwards memory is within 200 MB of before, and the worker is the same.

    Args: allowed: those seconds.
    """
    usual = statistics.median(ask(service)[0] for _ in range(7))
    _, expected = ask(service)
    before, worker, over = memory(service), service.worker(), threading.Event()
    outcomes = []

    def keep_asking():
        while not over.is_set() or len(outcomes) < 5:
            try:
                outcomes.append(ask(service))
            except Exception as error:
                outcomes.append((float("inf"), repr(error)))
            time.sleep(0.02)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()
    errors = [found for _, found in outcomes if isinstance(found, str)]
    assert not errors, errors[:3]
    assert all(np.allclose(logits, expected, atol=1e-4) for _, logits in outcomes)
    slowest = max(seconds for seconds, _ in outcomes)
    print(
        f"\n{len(outcomes)} answers, usual {usual:.3f} s, slowest {slowest:.3f} s, {memory(service) - before:+.0f} MB"
    )
    assert slowest <= 2 * usual + allowed, (slowest, usual, len(outcomes))
    assert memory(service) - before < 200 and service.worker() == worker


def connect(port):
    return socket.create_connection(("127.0.0.1", port), 10)


def send(port, data, seconds=5.0):
    """What is answered to raw bytes, until the connection is closed or the time is over."""
    answer = b""
    with connect(port) as connection, contextlib.suppress(ConnectionError, socket.timeout):
        connection.settimeout(seconds)
        connection.sendall(data)
        while part := connection.recv(65536):
            answer += part
    return answer


def post_of(body, *headers):
    lines = ["POST /ppminilm/prediction HTTP/1.1", "Host: x", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.mark.parametrize(
    "head",
    [
        b"GET a://" + b"1" * 10_000 + b" X\r\n\r\n",
        b"GET /ppminilm/health HTTP/1.1\r\nHost: x\r\nA: " + b" " * 40_000 + b"\x01\r\n\r\n",
        b"GET /ppminilm/health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"A%d: b\r\n" % i for i in range(20_000)) + b"\r\n",
        b"GET /ppminilm/health HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 250_000,
    ],
    ids=["start line", "blanks", "many headers", "long header"],
)
def test_heads(attacked, head):
    with unharmed(attacked):
        for _ in range(20):
            answer = send(attacked.http, head, 0.3)
            assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer[:100]


def test_marks_whose_order_takes_long(attacked):
    text = "\u0301" * 16_000 + "\u0316" * 16_000 + " a\u302e"
    body = json.dumps({"texts": [text] * 4}, ensure_ascii=False).encode()
    assert len(body) < 262_144
    with unharmed(attacked):
        for _ in range(3):
            send(attacked.http, post_of(body, "Connection: close"))


def test_a_small_message_that_unpacks_to_a_large_one(attacked):
    """gRPC would unpack it before it looks at the size."""
    message = protocol.messages().Request(key=["text"], value=["a" * 60_000_000]).SerializeToString()
    with unharmed(attacked), grpc.insecure_channel(f"127.0.0.1:{attacked.rpc}") as channel:
        call = channel.unary_unary(protocol.METHOD)
        for _ in range(4):
            with pytest.raises(grpc.RpcError) as error:
                call(message, compression=grpc.Compression.Gzip, timeout=20)
            assert error.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_streams_without_a_message(attacked):
    released = threading.Event()

    def never():
        released.wait(30)
        yield from ()

    channels = [grpc.insecure_channel(f"127.0.0.1:{attacked.rpc}", [("number", i)]) for i in range(5)]
    try:
        calls = [channel.stream_unary(protocol.METHOD).future(never()) for channel in channels for _ in range(40)]
        time.sleep(0.5)
        with unharmed(attacked):
            time.sleep(2)
        assert not all(call.done() for call in calls)
    finally:
        released.set()
        for channel in channels:
            channel.close()


def test_connections_that_send_a_byte_now_and_then(attacked):
    """More of them than there may be, for longer than a request may take."""
    held = [connect(attacked.http) for _ in range(150)]
    try:
        with unharmed(attacked):
            for byte in b"POST /ppm":
                for connection in held:
                    with contextlib.suppress(OSError):
                        connection.sendall(bytes([byte]))
                time.sleep(0.7)
        for connection in held:
            connection.settimeout(0.5)
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""  # closed, though a byte came before each second was over
    finally:
        for connection in held:
            connection.close()


def test_idle_connections_to_the_rpc_port(pruned, tmp_path):
    """With few file descriptors allowed at first: the service raises the limit."""
    command = 'ulimit -S -n 256; exec "$0" "$@"'
    with Service(tmp_path, pruned / "0.75/sub_static", settings=SETTINGS, shell=command) as service:
        held = [connect(service.rpc) for _ in range(400)]
        try:
            with unharmed(service):
                time.sleep(1)
        finally:
            for connection in held:
                connection.close()


def test_long_words_from_many_clients(attacked):
    """128 texts of 2 KB in words of 100 letters: what is dearest to tokenize, from as many clients as there are places."""
    rng = random.Random(0)
    word = lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=100))  # noqa: E731
    text = " ".join(word() for _ in range(19))
    body = json.dumps({"texts": [text] * 128}).encode()
    with concurrent.futures.ThreadPoolExecutor(40) as pool, unharmed(attacked):
        answers = list(pool.map(lambda _: send(attacked.http, post_of(body, "Connection: close"), 10), range(80)))
    statuses = {answer.split(b" ")[1] for answer in answers if answer}
    assert statuses <= {b"200", b"503", b"504"} and b"200" in statuses, statuses


def test_bodies_that_do_not_come(attacked):
    """Whole heads, and nothing after them: twice as many as there may be connections."""
    head = post_of(b"x" * 100)[:-100]
    held = [connect(attacked.http) for _ in range(250)]
    try:
        with unharmed(attacked):
            for connection in held:
                with contextlib.suppress(OSError):
                    connection.sendall(head)
            time.sleep(4)
    finally:
        for connection in held:
            connection.close()


def test_compressed_bodies(attacked):
    """A few kilobytes that would unpack to 100 MB are not unpacked, and refused in the service's form."""
    body = gzip.compress(b'{"text": "' + b"a" * 100_000_000)
    with unharmed(attacked):
        for _ in range(5):
            answer = send(attacked.http, post_of(body, "Content-Encoding: gzip", "Connection: close"))
            assert answer.split(b" ")[1] == b"415" and b"compressed bodies are not taken" in answer
    answer = send(attacked.http, post_of(b"\x1f\x8brubbish", "Content-Encoding: gzip"))
    assert answer.split(b" ")[1] == b"415"


def test_what_comes_while_a_request_is_answered(attacked):
    """More requests, and the bytes of another protocol: no more is kept of them than a head may have."""
    health = b"GET /ppminilm/health HTTP/1.1\r\nHost: x\r\n"
    with unharmed(attacked):
        for data in (
            (health + b"\r\n") * 5000,
            health + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n" + b"x" * 5_000_000,
            post_of(json.dumps({"texts": ["一丁七万丈三上下" * 8] * 128}).encode()) * 50,
        ):
            send(attacked.http, data, 1.0)


def test_chunks_of_one_byte(attacked):
    """250,000 of them are a body of 250 KB in 1.5 MB: too much to parse for all of it to be read, and refused as such."""
    head = b"POST /ppminilm/prediction HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with unharmed(attacked):
        for _ in range(3):
            send(attacked.http, head + b"1\r\na\r\n" * 250_000)
    with connect(attacked.http) as connection:  # slowly enough for the reply to be read
        connection.settimeout(5)
        connection.sendall(head)
        time.sleep(0.2)
        with contextlib.suppress(ConnectionError):
            for _ in range(60):
                connection.sendall(b"1\r\na\r\n" * 1000)
                time.sleep(0.005)
        reply = connection.recv(65536)
    assert reply.split(b" ")[1] == b"413" and b"chunk sizes" in reply
    few = b"%x\r\n%b\r\n0\r\n\r\n"
    body = json.dumps(GOOD).encode()
    assert send(attacked.http, head + few % (len(body), body)).split(b" ")[1] == b"200"


def whole_at_once(port, bodies):
    """Connections whose bodies become whole at the same moment, in the time of their last bytes."""
    held = [connect(port) for _ in bodies]
    for connection, body in zip(held, bodies):
        connection.sendall(post_of(body)[:-1])
    time.sleep(0.5)
    for connection, body in zip(held, bodies):
        connection.sendall(body[-1:])
    return held


def test_large_bodies_that_become_whole_at_one_moment(pruned, tmp_path):
    """Lists in a list, and keys, take long to parse; parsed all together they would silence the worker for seconds."""
    lists = b'{"text": [' + b"[]," * 87_000 + b"[]]}"
    keys = b'{"key": [' + b'"",' * 65_000 + b'""], "value": []}'
    settings = {**SETTINGS, "max_connections": 512, "max_connections_per_address": 512}
    with Service(tmp_path, pruned / "0.75/sub_static", settings=settings) as service:
        with unharmed(service, allowed=1.5):  # the same cores also send these 75 MB
            for bodies in ([lists] * 300, [keys] * 200):
                held = whole_at_once(service.http, bodies)
                for connection in held:
                    connection.settimeout(20)
                statuses = {connection.recv(4096).split(b" ")[1] for connection in held}
                assert statuses <= {b"400", b"504"}, statuses
                for connection in held:
                    connection.close()
        assert service.stderr.read_text() == ""


def test_keys_beyond_all_use(attacked):
    for count, words in ((137, "at most 136 items"), (129, "129 texts in texts; at most 128")):
        keys = [str(number) for number in range(count)]
        status, answer = attacked.post({"key": keys, "value": ["一"] * count})
        assert (status, answer["err_no"]) == (400, 5000) and words in answer["err_msg"], answer


def test_messages_of_many_fields(attacked):
    """131,000 empty ones in 262 KB: the parser would take a second for each message, and nothing else would be done."""
    messages = (
        b"\x0a\x00" * 131_000,  # keys
        b"\x7a\x00" * 131_000,  # unknown
        b"\x1a\xf0\xfe\x0f" + b"\x22\x00" * 131_000,  # in a tensor
        b"\x7b" + b"\x0a\x00" * 130_000 + b"\x7c",  # in a group
        b"\x7b" * 100_000,
        b"\x80" * 262_000,
    )
    answers = []
    with unharmed(attacked, allowed=1.0), concurrent.futures.ThreadPoolExecutor(6) as pool:
        for response in pool.map(lambda number: attacked.call(messages[number % 6]), range(60)):
            answers.append((response.err_no, response.err_msg))
    assert {err_no for err_no, _ in answers} == {5000}
    assert "at most 280 fields" in answers[0][1] and "tensors are not taken" in answers[2][1], answers[:6]


def test_a_worker_that_ends_soon_is_started_again_and_again(monkeypatch, tmp_path, capsys):
    """No client can make the supervisor give up by ending a worker that was ready; the pauses grow."""
    started = []

    class Ending(supervisor.Supervisor):
        def start(self):
            started.append(time.monotonic())
            self.stopping = len(started) == 7
            mine, its = os.pipe()
            command = [sys.executable, "-S", "-c", f"import os; os.write({its}, b'!')"]
            self.worker = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[its], start_new_session=True)
            os.close(its)
            return mine

    monkeypatch.setattr(supervisor, "LONGEST_PAUSE", 1)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    config = {"host": "127.0.0.1", "http_port": 1, "rpc_port": 2, "tls_certificate": "", "log_dir": str(tmp_path)}
    assert Ending(config).run() == 0
    pauses = [after - before for before, after in zip(started, started[1:])]
    assert len(started) == 7 and min(pauses[1:]) > 0.9 > pauses[0], pauses
    assert "giving up" not in capsys.readouterr().err


def test_a_worker_that_computes_is_not_frozen(monkeypatch):
    """Silent for longer than SILENCE, its main thread busy: it gets more time; one that sleeps does not."""
    monkeypatch.setattr(supervisor, "SILENCE", 1)
    monkeypatch.setattr(supervisor, "BUSY_SILENCE", 3)
    watching = supervisor.Supervisor({})
    for doing, longest, lives in (
        ("sum(range(10**12))", 4.5, False),
        ("time.sleep(9)", 2, False),
        ("sum(range(7 * 10**7))", 4.5, True),
    ):
        mine, its = os.pipe()
        code = f"import os, time; {doing}; os.write({its}, b'!')"
        watching.worker = subprocess.Popen([sys.executable, "-S", "-c", code], pass_fds=[its])
        os.close(its)
        started = time.monotonic()
        assert watching.lives(mine) == lives and time.monotonic() - started < longest
        watching.worker.kill()
        watching.worker.wait()
        os.close(mine)


def test_a_chunk_that_is_none(attacked):
    """It comes after a good one, in a body that is being read already."""
    head = b"POST /ppminilm/prediction HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(attacked.http) as connection:
        connection.settimeout(2)
        connection.sendall(head + b'5\r\n{"tex\r\n')
        time.sleep(0.2)
        connection.sendall(b"not a length\r\n")
        answer = connection.recv(65536)
    assert answer.split(b" ")[1] == b"400" and b'"err_no": 5000' in answer, answer


@pytest.mark.parametrize(
    "request_bytes, status",
    [
        (b"POST /ppminilm/prediction HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (b"GET //ppminilm//health HTTP/1.1\r\nHost: evil\r\n\r\n", b"404"),
        (b"POST /ppminilm/prediction HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n", b"413"),
        (b"POST /ppminilm/prediction HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
    ],
    ids=["two lengths", "doubled slashes", "expects too much", "length of 5,000 digits", "TLS"],
)  # fmt: skip
def test_http_that_could_be_read_in_two_ways(attacked, request_bytes, status):
    """Refused in the service's form, once, and the connection is closed: nothing after it is taken for a request."""
    answer = send(attacked.http, request_bytes + b"GET /ppminilm/health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.split(b" ")[1] == status and answer.count(b"HTTP/1.") == 1, answer
    _, body = answer.split(b"\r\n\r\n", 1)
    assert json.loads(body)["err_no"] in (3002, 5000) and b"evil" not in answer and b"100 Continue" not in answer


def test_a_frozen_worker_is_replaced(pruned, tmp_path):
    with Service(tmp_path, pruned / "0.75/sub_static", settings=SETTINGS) as service:
        worker = service.worker()
        os.kill(worker, signal.SIGSTOP)
        started = time.monotonic()
        while "no sign of life" not in service.stderr.read_text():
            assert time.monotonic() - started < 5
            time.sleep(0.05)
        service.__enter__()
        assert service.worker() != worker and service.post(GOOD)[0] == 200
        # Frozen, and nobody to notice: it does not keep the ports.
        os.kill(service.worker(), signal.SIGSTOP)
        service.process.kill()
        service.process.wait()
        time.sleep(0.5)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", service.http))


@pytest.mark.parametrize(
    "redirection",
    [">/dev/full 2>/dev/full", "> >(exit) 2> >(exit); sleep 0.2", ">&- 2>&-"],
    ids=["full", "pipes", "closed"],
)
def test_nobody_to_hear_what_it_says(pruned, tmp_path, redirection):
    """It starts, answers, starts its worker anew, and ends with status 0."""
    command = f'exec {redirection}; exec "$0" "$@"'
    settings = {**SETTINGS, "build_dag_each_worker": True}  # of which it says that it has no effect
    with Service(tmp_path, pruned / "0.75/sub_static", settings=settings, shell=command) as service:
        worker = service.worker()
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.5)
        service.__enter__()
        assert service.worker() != worker and service.post(GOOD)[0] == 200
        service.process.terminate()
        assert service.process.wait(20) == 0


def test_a_log_that_is_a_link_is_not_followed(pruned, tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "PipelineServingLogs").mkdir()
    (tmp_path / "PipelineServingLogs/worker.out").symlink_to(tmp_path / "mine")
    service = Service(tmp_path, pruned / "0.75/sub_static")
    assert service.process.wait(60) == 2
    assert (tmp_path / "mine").read_text() == "precious"
    (line,) = service.stderr.read_text().splitlines()
    assert "worker.out" in line


def heads_at_random(service, rng):
    for _ in range(20):
        send(service.http, b"GET /" + bytes(rng.choices(b" a1:\r\n\x00\xff", k=rng.randint(1, 20_000))), 0.2)


def slow_connections(service, rng):
    held = [connect(service.http) for _ in range(120)]
    for connection in held:
        with contextlib.suppress(OSError):
            connection.sendall(b"POST /ppm")
    time.sleep(2)
    for connection in held:
        connection.close()


def large_requests_given_up(service, rng):
    body = json.dumps({"texts": ["一丁七万丈三上下" * 8] * 128}).encode()
    for _ in range(10):
        with connect(service.http) as connection:
            connection.sendall(post_of(body))
            time.sleep(rng.random() / 20)


def replies_that_nobody_reads(service, rng):
    body = json.dumps({"texts": ["一丁七"] * 128}).encode()
    held = [connect(service.http) for _ in range(10)]
    for connection in held:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        with contextlib.suppress(OSError):
            connection.sendall(post_of(body) * 20)
    time.sleep(1)
    for connection in held:
        connection.close()


def broken_rpc(service, rng):
    for _ in range(10):
        with connect(service.rpc) as connection, contextlib.suppress(OSError):
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(rng.choices(range(256), k=3000)))
    with grpc.insecure_channel(f"127.0.0.1:{service.rpc}") as channel, contextlib.suppress(grpc.RpcError):
        calls = [channel.unary_unary(protocol.METHOD).future(bytes(rng.choices(range(256), k=99))) for _ in range(50)]
        for call in calls[::2]:
            call.cancel()


def marks(service, rng):
    body = json.dumps({"text": "\u0301" * 16_000 + "\u0316" * 16_000 + " a"}, ensure_ascii=False).encode()
    send(service.http, post_of(body, "Connection: close"))


def nested_json(service, rng):
    for body in (
        b"[" * 200_000,
        b'{"a":' * 50_000,
        b'{"text": ' + b"9" * 200_000 + b"}",
        b'{"texts": [' + b"[]," * 60_000,
    ):
        send(service.http, post_of(body, "Connection: close"))


ATTACKS = (
    heads_at_random, slow_connections, large_requests_given_up, replies_that_nobody_reads, broken_rpc, marks, nested_json
)  # fmt: skip


def test_a_mixture(attacked):
    """All together, for ten minutes in tests/faults.sh's long mode: no answer is wrong, none fails."""
    seconds = {"long": 600, "short": 30}.get(FAULTS, 10)
    until, counts = time.monotonic() + seconds, dict.fromkeys(ATTACKS, 0)

    def attack(number):
        rng = random.Random(number)
        while time.monotonic() < until:
            chosen = rng.choice(ATTACKS)
            with contextlib.suppress(OSError):
                chosen(attacked, rng)
            counts[chosen] += 1

    # Attackers and the one who asks share the interpreter of this process: more time for it than beside one attack.
    with concurrent.futures.ThreadPoolExecutor(2) as pool, unharmed(attacked, allowed=3.0):
        list(pool.map(attack, range(2)))
    print({function.__name__: count for function, count in counts.items()})
    assert sum(counts.values()) >= 4


def test_http2_pings(attacked):
    """As many as fit into one connection: each was answered by a GOAWAY that waited in memory for a reader."""

    def frame(kind, flags, payload):
        return len(payload).to_bytes(3, "big") + bytes([kind, flags, 0, 0, 0, 0]) + payload

    pings = frame(6, 0, b"12345678") * 4000
    with connect(attacked.rpc) as connection, unharmed(attacked):
        connection.settimeout(1)
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, b"") + frame(4, 1, b""))
        until = time.monotonic() + 5
        with contextlib.suppress(OSError):
            while time.monotonic() < until:
                connection.sendall(pings)
        time.sleep(1)


def test_rpc_messages_of_many_fields(attacked):
    """60 RPC messages of 131,000 empty fields, which protobuf would take half a second each to take apart; and one whose
    fields are nested in a tensor."""
    many = bytes([1 << 3 | 2, 0]) * 131_000
    with unharmed(attacked):
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(attacked.call, [many] * 60))
        tensors = protocol.messages().Request.DESCRIPTOR.fields_by_name["tensors"].number
        nested = attacked.call(bytes([tensors << 3 | 2, 0xF8, 0xFF, 0x0F]) + bytes([2 << 3 | 2, 0]) * 131_068)
    assert {answer.err_no for answer in answers} == {protocol.BAD_INPUT}
    assert "at most 280 fields" in answers[0].err_msg and "tensors are not taken" in nested.err_msg
