"""Who may use the service: bearer tokens and TLS, on both ports."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time

import pytest
from conftest import ROOT, Service

pytest.importorskip("paddle_serving_server", reason="needs Paddle Serving: bash setup_env.sh --serving")
import access
import grpc
import protocol
import rpc_client
import settings
import web_service
from common import UserError
from test_serving_input import BAD
from test_serving_life import until

TOKEN, OTHER = "correct-horse-battery-staple", "another-token-of-the-same-service"
CLIENT = os.path.join(ROOT, "deploy/serving/rpc_client.py")


def certificate(directory, name, host="localhost"):
    """{tls_certificate, tls_key}: a certificate for a host that is its own CA, and its key, made by openssl."""
    files = {"tls_certificate": directory / f"{name}.pem", "tls_key": directory / f"{name}.key"}
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={host}"]
    command += ["-addext", f"subjectAltName=DNS:{host}", "-keyout", files["tls_key"], "-out", files["tls_certificate"]]
    subprocess.run(command, check=True, capture_output=True)
    return {key: str(path) for key, path in files.items()}


@pytest.fixture(scope="module")
def secured(pruned, tmp_path_factory):
    """A service with tokens and TLS; ``certificate``: its certificate, ``token_file``: of a client."""
    directory = tmp_path_factory.mktemp("secured")
    (directory / "tokens").write_text(f"# of the clients\n\n{OTHER}\n{TOKEN}\n")
    (directory / "mine").write_text(f"{TOKEN}\n")
    tls = certificate(directory, "first")
    limits = {"max_body_bytes": 20_000, "max_texts": 50, "request_ms": 3000, "max_connections": 100}
    config = {**limits, "tokens_file": "tokens", "tls_certificate": "first.pem", "tls_key": "first.key"}
    service = Service(directory, pruned / "0.75/sub_static", settings=config)
    try:
        context = rpc_client.Tls(tls["tls_certificate"])
        assert rpc_client.wait_ready("localhost", service.http, 60, context, TOKEN), service.stderr.read_text()
        service.certificate, service.token_file = tls["tls_certificate"], directory / "mine"
        yield service
    finally:
        service.__exit__()


def ask(service, method="POST", path="/ppminilm/prediction", body=None, authorization=f"Bearer {TOKEN}"):
    """(HTTP status, headers, body) of a request by TLS."""
    context = access.client_context(service.certificate)
    with contextlib.closing(http.client.HTTPSConnection("localhost", service.http, timeout=60, context=context)) as one:
        headers = {"Authorization": authorization} if authorization is not None else {}
        one.request(method, path, body, headers)
        reply = one.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()


def call(service, message, metadata):
    """The Response over RPC by TLS."""
    with open(service.certificate, "rb") as file:
        credentials = grpc.ssl_channel_credentials(file.read())
    with grpc.secure_channel(f"localhost:{service.rpc}", credentials) as channel:
        pb = protocol.messages()
        method = channel.unary_unary(protocol.METHOD, pb.Request.SerializeToString, pb.Response.FromString)
        return method(message, timeout=60, metadata=metadata)


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}",
     f"Bearer {TOKEN.upper()}", f"Bearer {OTHER} {TOKEN}", "Bearer # of the clients", "Bearer \xff\xfe"],
)  # fmt: skip
def test_without_a_token_nothing_is_told(secured, header):
    """Whatever is wrong, and whatever is asked for, the reply is the same; over RPC, too."""
    replies = [
        ask(secured, *request, authorization=header)
        for request in (
            ("POST", "/ppminilm/prediction", '{"text": "一"}'.encode()),
            ("POST", "/ppminilm/prediction", b"no JSON"),
            ("GET", "/ppminilm/health"),
            ("GET", "/metrics"),
            ("GET", "/openapi.json"),
            ("GET", "/no/such/path"),
        )
    ]
    for status, headers, body in replies:
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert json.loads(body) == {"err_no": 4010, "err_msg": "unauthorized"}
    metadata = [("authorization", header)] if header and header.isascii() else []
    with pytest.raises(grpc.RpcError) as error:
        call(secured, protocol.messages().Request(key=["text"], value=["一"]), metadata)
    assert (error.value.code(), error.value.details()) == (grpc.StatusCode.UNAUTHENTICATED, "unauthorized")


def test_with_a_token(secured):
    assert ask(secured, "GET", "/ppminilm/live", authorization=None)[0] == 200
    for token in (TOKEN, OTHER):
        for path in ("/ppminilm/health", "/metrics", "/openapi.json"):
            assert ask(secured, "GET", path, authorization=f"bearer  {token}")[0] == 200
        response = call(
            secured, protocol.messages().Request(key=["text"], value=["一"]), [("authorization", f"Bearer {token}")]
        )
        assert response.err_no == 0 and response.value
    written = [secured.stdout, secured.stderr, *secured.logs.iterdir()]
    assert not any(token in path.read_text(errors="replace") for path in written for token in (TOKEN, OTHER))


def test_bad_input_with_tokens_and_tls(secured):
    """As without them. A body that is too large is refused by its announced size: its rest meets a closed connection."""
    with contextlib.closing(access.client_context(secured.certificate).wrap_socket(
        socket.create_connection(("localhost", secured.http)), server_hostname="localhost"
    )) as connection:  # fmt: skip
        head = f"POST /ppminilm/prediction HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        connection.sendall(f"{head}Content-Length: 60000\r\n\r\n".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    for what, body, status, err_no, words in BAD:
        if status == 413:
            continue
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        got, _, answer = ask(secured, body=sent)
        answer = json.loads(answer)
        assert (got, answer["err_no"]) == (status, err_no) and words in answer["err_msg"], what
    assert ask(secured, body='{"text": "一"}'.encode())[0] == 200


@pytest.mark.parametrize("front", ["rpc", "http"])
def test_the_client(secured, front, tmp_path):
    """By its options; without them it says which one is missing."""
    (tmp_path / "unknown").write_text("x" * 32)
    port = (
        [f"--address=localhost:{secured.http}", "--http"] if front == "http" else [f"--address=localhost:{secured.rpc}"]
    )

    def run(*options):
        command = [sys.executable, CLIENT, "--text", "一丁七", "--retries", "0", *port, *map(str, options)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    ca, token = ["--ca", secured.certificate], ["--token_file", secured.token_file]
    good = run(*ca, *token)
    assert good.returncode == 0 and json.loads(good.stdout)["label"], good.stderr
    for options in (ca, [*ca, "--token_file", tmp_path / "unknown"]):
        bad = run(*options)
        assert bad.returncode == 1 and "the service wants a token that it knows: --token_file FILE" in bad.stderr
    for options in (token, ["--tls", *token]):  # in the clear, and without trust
        bad = run(*options)
        assert bad.returncode == 1 and not bad.stdout and len(bad.stderr.splitlines()) == 1, bad.stderr
    assert "its certificate is not trusted" in bad.stderr and "--ca FILE names its CA" in bad.stderr
    wrong = run(*token, "--ca", secured.token_file)
    assert wrong.returncode == 2 and "not a certificate in PEM" in wrong.stderr


def test_readiness_with_tokens_and_tls(secured, tmp_path):
    """The settings are enough: the certificate is that of the service itself, whatever name it has."""
    command = [sys.executable, os.path.join(ROOT, "deploy/serving/web_service.py"), "--wait-ready", "20"]
    command += ["--config", secured.directory / "config.yml", "--log_dir", secured.directory]
    for ports in (["--http_port", secured.http], []):
        if not ports:  # no HTTP: the RPC port is asked
            config = json.loads((secured.directory / "config.yml").read_text())
            paths = {
                name: str(secured.directory / config[name]) for name in ("tokens_file", "tls_certificate", "tls_key")
            }
            (tmp_path / "rpc.yml").write_text(json.dumps({**config, **paths, "rpc_port": secured.rpc}))
            command[command.index("--config") + 1] = tmp_path / "rpc.yml"
        done = subprocess.run([*map(str, [*command, *ports])], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def sockets_of(process):
    """The number of sockets that a process has open."""
    count = 0
    for name in os.listdir(f"/proc/{process}/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/{process}/fd/{name}").startswith("socket:")
    return count


def test_who_does_not_finish_the_handshake_keeps_nobody_out(secured):
    """Neither in the clear nor half-way; such connections are closed when their time is over, and those of HTTP that are
    too many sooner: they count."""
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("localhost", port)))
            for port, count in ((secured.http, 400), (secured.rpc, 150))
            for _ in range(count)
        ]
        for connection in silent[::2]:
            connection.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
        started = time.monotonic()
        assert ask(secured, body='{"text": "一"}'.encode())[0] == 200
        message = protocol.messages().Request(key=["text"], value=["一"])
        assert call(secured, message, [("authorization", f"Bearer {TOKEN}")]).err_no == 0
        assert time.monotonic() - started < 2.5  # sooner than their time is over
        # max_connections of HTTP, and what a worker has open anyway.
        until(lambda: sockets_of(secured.worker()) < 150 + 100 + 40, started + 2.5 - time.monotonic())
        for connection in silent:
            connection.settimeout(30)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(65536):
                    pass
    with socket.create_connection(("localhost", secured.http)) as plain:
        plain.sendall(b"GET /ppminilm/live HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP" not in plain.recv(65536)


def presented(port):
    """The certificate of a port in PEM."""
    return ssl.get_server_certificate(("localhost", port))


def test_another_certificate_and_other_tokens_by_sighup(pruned, tmp_path):
    """Both ports present the new one to new connections; the token that left the file no longer counts, also if the model
    is refused. Bad files change nothing, also for a worker that is started anew. TLS itself needs a restart."""
    model, link = pruned / "0.75/sub_static", tmp_path / "model"
    link.symlink_to(model)
    (tmp_path / "tokens").write_text(f"{OTHER}\n{TOKEN}\n")
    tls = certificate(tmp_path, "first")
    config = {"tokens_file": "tokens", "tls_certificate": "first.pem", "tls_key": "first.key"}
    service = Service(tmp_path, link, settings=config)
    service.certificate = tls["tls_certificate"]

    def ready():
        return rpc_client.wait_ready("localhost", service.http, 60, rpc_client.Tls(service.certificate), TOKEN)

    def hang_up(words):
        count = service.stderr.read_text().count(words)
        os.kill(service.process.pid, signal.SIGHUP)
        until(lambda: service.stderr.read_text().count(words) > count, 60)

    try:
        assert ready(), service.stderr.read_text()
        before = [presented(port) for port in (service.http, service.rpc)]
        certificate(tmp_path, "second")
        for name in ("pem", "key"):
            os.replace(tmp_path / f"second.{name}", tmp_path / f"first.{name}")
        (tmp_path / "tokens").write_text(f"{TOKEN}\nthe-newest-token-of-all\n")
        hang_up("web_service.py: reloaded, ")
        after = [presented(port) for port in (service.http, service.rpc)]
        assert before[0] == before[1] != after[0] == after[1]
        service.certificate = str(tmp_path / "now.pem")
        (tmp_path / "now.pem").write_text(after[0])
        for token, status in (("the-newest-token-of-all", 200), (TOKEN, 200), (OTHER, 401)):
            assert ask(service, "GET", "/metrics", authorization=f"Bearer {token}")[0] == status

        link.unlink()
        link.symlink_to(tmp_path / "nowhere")
        (tmp_path / "tokens").write_text(f"{TOKEN}\n")
        hang_up("not reloaded")  # the model; the token is gone all the same
        assert ask(service, "GET", "/metrics", authorization="Bearer the-newest-token-of-all")[0] == 401

        (tmp_path / "tokens").write_text("brief-token\n")
        hang_up("line 1: a token has at least 16 characters")
        (tmp_path / "first.pem").write_text("no certificate")
        (tmp_path / "tokens").write_text(f"{TOKEN}\n")
        hang_up("not a certificate chain and its unencrypted key")
        assert ask(service, "GET", "/metrics")[0] == 200
        os.kill(service.worker(), signal.SIGKILL)
        until(lambda: "starting it anew" in service.stderr.read_text())
        assert ready() and [presented(port) for port in (service.http, service.rpc)] == after

        link.unlink()
        link.symlink_to(model)
        (tmp_path / "config.yml").write_text(json.dumps({"tokens_file": "tokens"}))
        hang_up("note: a restart is needed for tls_certificate, tls_key")
        hang_up("web_service.py: reloaded, ")
        assert ask(service, "GET", "/metrics")[0] == 200  # by TLS
        os.remove(tmp_path / "config.yml")
        hang_up("config.yml: No such file or directory")
        assert ask(service, "GET", "/metrics")[0] == 200
    finally:
        service.__exit__()
    assert service.process.returncode == 0


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "has no token"),
        ("# only a comment\n", "has no token"),
        ("brief-token\n", "line 1: a token has at least 16 characters"),
        (f"{TOKEN}\nwith a blank in between\n", "line 2: a token has letters, digits and signs of ASCII only"),
        ("密码密码密码密码密码密码密码密码\n", "line 1: a token has letters"),
        (b"\xff" * 20, "not text"),
        (None, "No such file or directory"),
    ],
)
def test_wrong_token_files(tmp_path, content, words):
    path = tmp_path / "tokens"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(words)) as error:
        access.read(settings.read_config(web_service.parse_args(["--tokens_file", str(path)])))
    assert "blank in between" not in str(error.value) and "brief-token" not in str(error.value)


def test_wrong_certificates(tmp_path):
    first, second = certificate(tmp_path, "first"), certificate(tmp_path, "second")
    (tmp_path / "nothing").write_text("nothing")
    encrypted = tmp_path / "encrypted.key"
    command = ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", first["tls_key"], "-out", encrypted]
    subprocess.run(command, check=True, capture_output=True)
    for chosen, words in (
        ({"tls_certificate": first["tls_certificate"]}, "give both, or neither"),
        ({**first, "tls_key": second["tls_key"]}, "not a certificate chain and its unencrypted key"),
        ({**first, "tls_key": str(encrypted)}, "not a certificate chain and its unencrypted key"),
        ({**first, "tls_certificate": str(tmp_path / "nothing")}, "not a certificate chain and its unencrypted key"),
        ({**first, "tls_key": str(tmp_path / "none")}, "No such file or directory"),
    ):
        options = [word for name, path in chosen.items() for word in (f"--{name}", path)]
        with pytest.raises(UserError, match=words) as error:
            access.read(settings.read_config(web_service.parse_args(options)))
        assert "\n" not in str(error.value)


def test_every_token_is_compared(tmp_path, monkeypatch):
    """The first one that fits does not end the comparison, whose time would tell which it was."""
    (tmp_path / "tokens").write_text(f"{TOKEN}\n{OTHER}\nthe-third-token-of-all\n")
    settings_of_it = settings.read_config(web_service.parse_args(["--tokens_file", str(tmp_path / "tokens")]))
    tokens, compared = access.Tokens(access.read(settings_of_it)["tokens"]), []
    compare = access.hmac.compare_digest
    monkeypatch.setattr(access.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    for header, allowed in ((f"Bearer {TOKEN}", True), (f"Bearer {OTHER}", True), ("Bearer x", False), (None, False)):
        compared.clear()
        assert tokens.allow(header) == allowed
        assert len(compared) == 3 and {len(side) for pair in compared for side in pair} == {32}
