"""The service's life: it starts whole or not at all, ends without a trace, survives its worker, keeps its limits."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, Service, at_once, settings_of

pytest.importorskip("paddle_serving_server", reason="needs Paddle Serving: bash setup_env.sh --serving")
import protocol
import rpc_client
import serving_load
import settings as service_settings
import web_service
from common import UserError, objectives
from serving_load import free_port

SCRIPT = os.path.join(ROOT, "deploy/serving/web_service.py")


@pytest.fixture(scope="module")
def model(pruned):
    return pruned / "0.75/sub_static"


def run(*options, **kwargs):
    """web_service.py with options, to its end."""
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True, timeout=120, **kwargs
    )


def processes(marker):
    """Ids of the processes whose environment or command line holds ``marker``."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for name in ("cmdline", "environ"):
                with open(f"/proc/{pid}/{name}", "rb") as file:
                    if marker.encode() in file.read() and int(pid) != os.getpid():
                        found.append(int(pid))
    return sorted(set(found))


def can_bind(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def listening(ports):
    """{(address in hexadecimal, port)} of the listening sockets among ``ports``, from /proc/net/tcp and tcp6."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{name}").readlines()[1:]:
            address, port = line.split()[1].split(":")
            if line.split()[3] == "0A" and int(port, 16) in ports:
                found.add((address, int(port, 16)))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_clean(model, tmp_path, number):
    """What is being answered is answered; status 0; no process and no port is left; logs are where they should be."""
    marker = str(tmp_path)
    with Service(tmp_path, model, cwd=tmp_path) as service:
        loopback = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, as gRPC writes it too
        assert {address for address, _ in listening({service.http, service.rpc})} <= loopback
        assert len(listening({service.http, service.rpc})) == 2 and len(processes(marker)) == 2
        answers, started = [], threading.Barrier(9)

        def ask():
            started.wait()
            answers.append(service.post({"texts": ["一丁七万丈三上下" * 8] * 128}))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        started.wait()
        until(lambda: len(re.findall("128 texts", (service.logs / "pipeline.log").read_text())) >= 1)
        service.process.send_signal(number)
        assert service.process.wait(30) == 0
        for thread in threads:
            thread.join()
    assert len(answers) == 8 and {status for status, _ in answers} <= {200, 503}
    assert any(status == 200 for status, _ in answers)
    assert not processes(marker)
    can_bind(service.http), can_bind(service.rpc)
    assert service.stderr.read_text() == "" and "ready" in service.stdout.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["PipelineServingLogs", "config.yml", "stderr", "stdout"]


def test_survives_its_worker_and_takes_it_along(model, tmp_path):
    marker = str(tmp_path)
    with Service(tmp_path, model) as service:
        first = service.worker()
        os.kill(first, signal.SIGKILL)
        until(lambda: "starting it anew" in service.stderr.read_text())
        service.__enter__()
        assert service.worker() != first and service.post({"text": "一丁七"})[0] == 200
        assert service.stdout.read_text().count("ready") == 2
        service.process.kill()  # no time to tell the worker
        until(lambda: not processes(marker))
        until(lambda: not listening({service.http, service.rpc}))


def test_a_failed_load_is_one_line_and_kills_nobody(model, tmp_path):
    """The launcher, here a shell in the same process group, goes on."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "float.pdiparams"
    weights.write_bytes(weights.read_bytes()[:-100])
    ports = ["--http_port", str(free_port()), "--rpc_port", str(free_port()), "--log_dir", str(tmp_path)]
    for name, words in ((broken, "float.pdiparams"), (tmp_path / "none", f"--model {tmp_path}/none: no ")):
        command = [sys.executable, SCRIPT, "--model", str(name), *ports]
        done = subprocess.run(
            ["sh", "-c", '"$@"; echo "status $?"', "sh", *command], capture_output=True, text=True, timeout=120
        )
        assert done.stdout.strip() == "status 2", done
        assert len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr


def test_a_worker_that_dies_while_loading_is_one_line(model, tmp_path):
    """As when memory runs out, or as Paddle Serving ends its process group when an operator fails."""
    service = Service(tmp_path, model)
    until(lambda: len(processes(str(tmp_path))) == 2)
    os.kill(service.worker(), signal.SIGKILL)
    assert service.process.wait(30) == 1
    (line,) = service.stderr.read_text().splitlines()
    assert "status -9 before it was ready; see " in line and line.endswith("giving up")
    assert not processes(str(tmp_path)) and service.stdout.read_text() == ""


def test_what_kills_its_process_group_kills_no_more(model, tmp_path):
    """Paddle Serving ends the whole process group when an operator fails; here that is the worker alone."""
    with Service(tmp_path, model) as service:
        worker = service.worker()
        assert os.getpgid(worker) == worker != os.getpgid(service.process.pid) == os.getpgid(0)
        os.killpg(worker, signal.SIGKILL)
        until(lambda: "starting it anew" in service.stderr.read_text())


@pytest.mark.parametrize(
    "settings, words",
    [
        ("http_prot: 1", "no setting is called http_prot"),
        ("http_port: many", "http_port: 'many': Input should be a valid integer"),
        ("http_port: 80", "http_port: 80: Input should be greater than or equal to 1024"),
        (
            "op: {ppminilm: {local_service_conf: {client_type: brpc}}}",
            "client_type: 'brpc': Input should be 'local_pred",
        ),
        ("dag: {is_thread_op: 1}", "dag.is_thread_op: 1: Input should be a valid boolean"),
        ("op: {ppminilm: {concurrency: 2}}", "concurrency: 2: Input should be less than or equal to 1"),
        ("op: {ppminilm: {concurrency: true}}", "concurrency: True: Input should be a valid integer"),
        ("op: {other: {concurrency: 1}}", "no setting is called op.other"),
        ("op: {ppminilm: {local_service_conf: {precision: int4}}}", "precision: 'int4': Input should be ''"),
        ("- a\n- b", "must be settings"),
        ("a: [", "not YAML"),
        ("http_port: 8091\nrpc_port: 8091", "http_port and rpc_port are both 8091"),
    ],
)
def test_wrong_settings(tmp_path, settings, words):
    """In this process, as it ends before anything is started."""
    config = tmp_path / "config.yml"
    config.write_text(settings)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        service_settings.check_ports(service_settings.read_config(web_service.parse_args(["--config", str(config)])))
    assert "\n" not in str(error.value)


def test_a_full_disk_behind_its_output_does_not_end_the_service(model, tmp_path):
    with Service(tmp_path, model, shell='exec "$0" "$@" > /dev/full 2> /dev/full') as service:
        os.kill(service.worker(), signal.SIGKILL)
        until(lambda: service.process.poll() is not None or rpc_client.wait_ready("127.0.0.1", service.http, 5))
        assert service.process.poll() is None


@pytest.mark.parametrize(
    "settings, http_port, rpc_port",
    [("", 18083, 8091), ("http_port: 9000\nrpc_port:", 9000, 9001), ("rpc_port: 9000", None, 9000)],
)
def test_ports_as_paddle_serving_documents_them(tmp_path, settings, http_port, rpc_port):
    config = tmp_path / "config.yml"
    config.write_text(settings)
    read = service_settings.read_config(web_service.parse_args(["--config", str(config)]))
    assert (read["http_port"], read["rpc_port"]) == (http_port, rpc_port)


def test_a_service_without_http(model, tmp_path):
    config, port = tmp_path / "config.yml", free_port()
    config.write_text(
        f"rpc_port: {port}\nlog_dir: {tmp_path}\nop: {{ppminilm: {{local_service_conf: {{model_config: {model}}}}}}}"
    )
    script = [sys.executable, os.path.join(ROOT, "deploy/serving/web_service.py"), "--config", str(config)]
    running = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    try:
        assert subprocess.run([*script, "--wait-ready", "60"]).returncode == 0
        assert running.stdout.readline() == f"web_service.py: ready, RPC on port {port}\n"
        client = [sys.executable, os.path.join(ROOT, "deploy/serving/rpc_client.py"), "--address", f"127.0.0.1:{port}"]
        done = subprocess.run([*client, "--text", "一"], capture_output=True, text=True)
        assert json.loads(done.stdout)["text"] == "一", done.stderr
    finally:
        running.terminate()
        assert running.wait(30) == 0
    waiting = subprocess.run([*script, "--wait-ready", "0.5"], capture_output=True, text=True)
    assert waiting.returncode == 1 and f"RPC on 127.0.0.1:{port}: not ready after 0.5 s" in waiting.stderr


def test_wrong_overrides_go_by_the_name_of_their_option():
    with pytest.raises(UserError, match=r"^--threads: -1: Input should be greater than or equal to 0"):
        service_settings.read_config(web_service.parse_args(["--threads", "-1"]))


def test_the_settings_in_the_file_are_the_defaults(tmp_path):
    """Those that a file leaves out are as config_nlp.yml has them, paths relative to the file."""
    empty = tmp_path / "empty.yml"
    empty.write_text("")
    left_out = service_settings.read_config(web_service.parse_args(["--config", str(empty)]))
    shown = service_settings.read_config(web_service.parse_args([]))
    base = os.path.join(ROOT, "deploy/serving")
    assert json.loads(json.dumps(left_out).replace(str(tmp_path), base)) == shown
    assert shown["op"]["ppminilm"]["local_service_conf"]["model_config"] == os.path.join(base, "serving_server")
    text = open(os.path.join(ROOT, "deploy/serving/config_nlp.yml"), encoding="utf-8").read()

    def names(settings):
        for name, value in settings.items():
            yield name
            if isinstance(value, dict):
                yield from names(value)

    assert all(re.search(rf"^ *{name}:", text, re.M) for name in names(shown))


def test_used_port_and_no_such_address(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("--http_port", taken.getsockname()[1], "--log_dir", tmp_path)
        assert done.returncode == 2 and "Address already in use" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run("--host", "192.0.2.1", "--log_dir", tmp_path)
    assert done.returncode == 2 and "192.0.2.1" in done.stderr
    # Nothing is left but what tells a client that waits that this service has ended: a file for each of the two ports.
    (logs,) = tmp_path.iterdir()
    assert all(path.stat().st_size == 0 and path.name.startswith("service_") for path in logs.iterdir())
    done = run("--config", tmp_path / "none.yml")
    assert done.returncode == 2 and "No such file" in done.stderr


def test_wait_ready_says_no(tmp_path):
    started = time.monotonic()
    done = run("--http_port", free_port(), "--wait-ready", "1")
    assert done.returncode == 1 and "not ready after 1 s" in done.stderr and time.monotonic() - started < 30


def test_is_ready_only_with_the_model(model, tmp_path):
    """No port is open before a request can be answered: whoever gets a connection gets a prediction."""
    service = Service(tmp_path, model)
    try:

        def connects():
            assert service.process.poll() is None, service.stderr.read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", service.http), 1):
                return True

        until(connects, 60)
        status, answer = service.post({"text": "一丁七"})
        assert status == 200 and answer["labels"]
    finally:
        service.__exit__()


def test_limits(model, tmp_path):
    """Too much at once gets 503, at once; too late 504; over RPC the same err_no; then it answers as before."""
    settings = settings_of(batch_size=1, worker_num=12, timeout_ms=300)
    with Service(tmp_path, model, settings=settings) as service:
        texts = ["一丁七万丈三上下" * 8] * 128
        outcomes = at_once(40, lambda: service.post({"texts": texts}))
        assert {status for (status, _), _ in outcomes} == {200, 503, 504}
        for (status, answer), _ in outcomes:
            assert answer["err_no"] == {200: 0, 503: 3001, 504: 6000}[status] and ("labels" in answer) == (
                status == 200
            )
        refused = [seconds for (status, _), seconds in outcomes if status == 503]
        assert max(refused) < max(seconds for (status, _), seconds in outcomes if status == 504)
        message = protocol.messages().Request(key=["texts"], value=[json.dumps(texts)])
        outcomes = at_once(40, lambda: service.call(message).err_no)
        assert {err_no for err_no, _ in outcomes} == {0, 3001, 6000}
        assert service.post({"text": "一丁七"})[0] == 200
        # A client that sends half a request, or nothing, is put off and keeps nobody from being served.
        idle = [socket.create_connection(("127.0.0.1", service.http)) for _ in range(5)]
        idle[0].sendall(b"POST /ppminilm/prediction HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert service.post({"text": "一丁七"})[0] == 200
        for connection in idle:
            connection.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
            connection.close()


def test_the_readmes_commands_run(quantized, tmp_path):
    """The block of the README, word by word, in a copy of the checkout that has the model where the README says."""
    files = subprocess.run(["git", "ls-files", "*.py", "*.yml"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in files.stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), tmp_path / name)
    shutil.copytree(quantized / "mse4", tmp_path / "quantization/tnews_quant_models/mse4")
    readmes = [
        open(os.path.join(ROOT, name)).read() for name in ("deploy/serving/README.md", "README.md", "README_en.md")
    ]
    block, again = re.findall(r"```sh\n(cd deploy/serving\n.*?)```", readmes[0], re.S)  # in Chinese, in English
    assert block == again and all(block in readme for readme in readmes)
    env = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", f"{block}wait $!"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if '"text"' in line or "}" in line]
    assert '"labels"' in done.stdout and done.stdout.count('"label": ') == 2, lines
    assert not processes(str(tmp_path))


def test_load_test_counts(model, tmp_path):
    """The benchmark runs as its help says, and its checks can fail."""
    output = tmp_path / "load.json"
    done = subprocess.run(
        [
            sys.executable,
            os.path.join(ROOT, "deploy/benchmark/serving_load.py"),
            "--model",
            str(model),
            "--requests",
            "60",
            "--clients",
            "8",
            "--rounds",
            "1",
            "--output",
            str(output),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| 60 of 60 |") == 2 and "batched / one by one" in done.stdout
    rounds = json.loads(output.read_text())["rounds"]
    assert rounds["batched"][0]["right"] == 60 and rounds["batched"][0]["per_second"] > 0
    right = {"err_no": 0, "logits": [[1.0, 2.0]], "labels": ["b"]}
    answers = [right, {**right, "labels": ["a"]}, {**right, "logits": [[1.0, 2.2]]}, {"err_no": 5000}, None]
    assert serving_load.count_right(answers, [[[1, 2]]] * 5, objectives.Classification(), ["a", "b"], 0.1) == 1
