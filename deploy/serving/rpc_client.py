"""Client of the service: sends texts over RPC, or HTTP with --http, and prints one JSON line per text.

    python rpc_client.py                                        # two sentences of its own
    python rpc_client.py --text 今年的高考作文题 股市收盘上涨
    python rpc_client.py --http --address 127.0.0.1:18083 --input_file texts.txt
    echo 今年的高考作文题 | python rpc_client.py --input_file -

Exit status: 0 if all texts were answered, 1 if the service failed or was unreachable, 2 for invalid arguments.
"""

import contextlib
import http.client
import json
import os
import socket
import ssl
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import access
import data
import numpy as np
import openapi
import protocol
from common import cli, objectives, texts

# What is sent where no text is given: a headline about education and one about the stock exchange.
SENTENCES = ["今年的高考作文题你会写吗", "沪深股市收盘双双上涨"]
PORTS = {"rpc": 8091, "http": 18083}
UNAUTHORIZED = "the service wants a token that it knows: --token_file FILE"
UNTRUSTED = "its certificate is not trusted, or has another name than --address: --ca FILE names its CA"


class Refused(Exception):
    """Raised for an error response, or if there is no response. ``again``: whether a retry can succeed."""

    def __init__(self, message, again=False):
        super().__init__(message)
        self.again = again


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    texts.add_text_arguments(parser.add_argument_group("texts"))
    group = parser.add_argument_group("service")
    group.add_argument("--http", action="store_true", help="use HTTP instead of RPC")
    group.add_argument("--address", help="host:port (default: 127.0.0.1:8091, with --http 127.0.0.1:18083)")
    group.add_argument("--batch_size", type=int, default=32, help="texts per request", positive=True)
    group.add_argument("--deadline", type=float, default=10.0, help="seconds per request, with retries", positive=True)
    group.add_argument("--retries", type=int, default=3, help="retries if the service is unreachable or overloaded")
    group.add_argument("--token_file", help="file with the bearer token of the service")
    group.add_argument("--tls", action="store_true", help="connect by TLS, and trust the CAs of the system")
    help = "connect by TLS, and trust this CA, or this certificate of the service itself (PEM file)"
    group.add_argument("--ca", help=help)
    help = "first wait up to SECONDS until the service is ready"
    group.add_argument("--wait-ready", "--wait_ready", type=float, default=0.0, metavar="SECONDS", help=help)
    group.add_argument(
        "--task_name", type=cli.task_name, default="", help="CLUE task of the records, if --input_file is a .json file"
    )
    args = parser.parse_args(argv)
    if args.text and args.input_file:
        parser.error("give either --text or --input_file")
    if args.text_pair and not args.text:
        parser.error("--text_pair goes with --text")
    if not args.text and not args.input_file:
        args.text = SENTENCES
    if args.retries < 0:
        parser.error(f"--retries {args.retries}: must be 0 or more")
    host, _, port = (args.address or f"127.0.0.1:{PORTS['http' if args.http else 'rpc']}").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        parser.error(f"--address {args.address}: must be host:port")
    args.host, args.port = host, int(port)
    return args


def rpc(address, tls, token):
    """Returns: function (fields, seconds) that sends a request over RPC, returns {key: value} and raises Refused.

    Args: address: (host, port). tls: Tls, or None. token: the bearer token, or "".
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would print lines of its own beside those of this client
    import grpc

    pb = protocol.messages()
    where, options = protocol.authority(*address), [("grpc.max_reconnect_backoff_ms", 500)]
    if tls:
        channel = grpc.secure_channel(where, grpc.ssl_channel_credentials(tls.roots()), options)
    else:
        channel = grpc.insecure_channel(where, options)
    call = channel.unary_unary(
        protocol.METHOD, request_serializer=pb.Request.SerializeToString, response_deserializer=pb.Response.FromString
    )
    metadata = [("authorization", f"Bearer {token}")] if token else None

    def ask(fields, seconds):
        values = [value if isinstance(value, str) else json.dumps(value) for value in fields.values()]
        request = pb.Request(name=protocol.SERVICE, key=list(fields), value=values)
        try:
            response = call(request, timeout=seconds, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise Refused(UNAUTHORIZED) from error
            if "CERTIFICATE_VERIFY_FAILED" in error.details():
                raise Refused(UNTRUSTED) from error
            raise Refused(
                f"{error.code().name.lower()}: {error.details()}", error.code() == grpc.StatusCode.UNAVAILABLE
            ) from error
        if response.err_no:
            raise Refused(f"err_no {response.err_no}: {response.err_msg}", response.err_no == protocol.UNAVAILABLE)
        return {key: json.loads(value) for key, value in zip(response.key, response.value)}

    return ask


def http_connection(address, seconds, tls):
    """A connection that is opened by its first request; proxy settings of the environment are ignored."""
    if tls:
        return http.client.HTTPSConnection(*address, timeout=seconds, context=tls.context)
    return http.client.HTTPConnection(*address, timeout=seconds)


def over_http(address, tls, token):
    """Like rpc(), over HTTP."""
    connection = None
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}

    def post(fields, seconds):
        nonlocal connection
        connection = connection or http_connection(address, seconds, tls)
        connection.timeout = seconds
        if connection.sock:
            connection.sock.settimeout(seconds)
        try:
            connection.request("POST", openapi.PREDICTION, json.dumps(fields), headers)
            reply = connection.getresponse()
            return reply.status, reply.read()
        except BaseException:
            connection.close()
            connection = None
            raise

    def ask(fields, seconds):
        try:
            status, body = post(fields, seconds)
        except socket.timeout as error:
            raise Refused(f"no answer in {seconds:.1f} s") from error
        except ssl.SSLCertVerificationError as error:
            raise Refused(UNTRUSTED) from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # UnicodeError: no name of a machine
            raise Refused(f"{protocol.authority(*address)} cannot be reached", again=True) from error
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or "err_no" not in answer:
            raise Refused(f"HTTP {status}, and not an answer of this service")
        if answer["err_no"] == protocol.UNAUTHORIZED:
            raise Refused(UNAUTHORIZED)
        if answer["err_no"]:
            raise Refused(f"err_no {answer['err_no']}: {answer['err_msg']}", answer["err_no"] == protocol.UNAVAILABLE)
        return answer

    return ask


def ask_again(ask, fields, deadline, retries):
    """Calls ask(fields, seconds left). Retries if that can succeed, after pauses of 0.1, 0.2, 0.4, ... up to 1 s."""
    until, pause = time.monotonic() + deadline, 0.1
    while True:
        try:
            return ask(fields, max(0.001, until - time.monotonic()))
        except Refused as refusal:
            if not refusal.again or retries == 0 or time.monotonic() + pause > until:
                raise
            time.sleep(pause)
            retries, pause = retries - 1, min(1.0, 2 * pause)


def wait_ready(host, port, seconds, tls=None, token="", ended=lambda: False):
    """Whether the service answers a health request, which runs the model like any other, within ``seconds``.

    Args: tls, token: as rpc's. ended: function that tells whether there is nothing left to wait for.
    """
    address, headers = (local(host), port), {"Authorization": f"Bearer {token}"} if token else {}

    def is_healthy(left):
        with contextlib.closing(http_connection(address, left, tls)) as connection:
            connection.request("GET", openapi.HEALTH, headers=headers)
            return connection.getresponse().status == 200

    url = f"{'https' if tls else 'http'}://{protocol.authority(*address)}{openapi.HEALTH}"
    return wait(is_healthy, url, seconds, ended)


def wait_connected(host, port, seconds, tls=None, ended=lambda: False):
    """Whether the RPC port takes connections within ``seconds``: it is opened when the model is warm."""
    address = local(host), port

    def connects(left):
        with socket.create_connection(address, left) as connection:
            if tls:
                tls.context.wrap_socket(connection).close()
            return True

    return wait(connects, f"RPC on {protocol.authority(*address)}", seconds, ended)


def local(host):
    """The address at which a service can be reached on its own machine that binds all addresses."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def wait(is_ready, where, seconds, ended):
    """Whether is_ready(seconds left) becomes true; it may raise what a connection raises."""
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if is_ready(max(0.1, until - time.monotonic())):
                return True
        why = None
        if ended():
            why = "the service has ended"
        elif time.monotonic() > until:
            why = f"not ready after {seconds:g} s; is it running?"
        if why:
            print(f"{where}: {why}; see its output and PipelineServingLogs/", file=sys.stderr)
            return False
        time.sleep(min(0.2, max(0.0, until - time.monotonic())))


class Tls:
    """How a client knows the server. Args: as access.client_context; ca: also "" for the CAs of the system."""

    def __init__(self, ca, on_this_machine=False):
        self.ca, self.context = ca, access.client_context(ca or None, on_this_machine)

    def roots(self):
        """The certificates for gRPC, in PEM; None for those that it brings itself."""
        if not self.ca:
            return None
        with open(self.ca, "rb") as file:
            return file.read()


def main(argv=None):
    args = parse_args(argv)
    examples = texts.read_texts(args, args.task_name, None, data.texts_of)
    with protocol.needs_paddle_serving():
        tls = Tls(args.ca) if args.tls or args.ca else None
        token = access.read_tokens(args.token_file)[0] if args.token_file else ""
        ask = (over_http if args.http else rpc)((args.host, args.port), tls, token)
    for start in range(0, len(examples), args.batch_size):
        chosen = examples[start : start + args.batch_size]
        fields = {"texts": [example.text for example in chosen]}
        if chosen[0].text_pair is not None:
            fields["text_pairs"] = [example.text_pair for example in chosen]
        try:
            wait = args.wait_ready if start == 0 else 0
            answer = ask_again(ask, fields, args.deadline + wait, sys.maxsize if wait else args.retries)
        except Refused as refusal:
            where = f"{args.host}:{args.port}, texts {start + 1} to {start + len(chosen)}"
            print(f"rpc_client.py: {where}: {refusal}", file=sys.stderr)
            sys.exit(1)
        # Of logits only the model's objective knows what they mean: one that is not known here is refused.
        objective = objectives.of_description(answer.get("objective", objectives.Classification().describe()))
        for example, row, truncated in zip(chosen, np.float32(answer["logits"]), answer["truncated"]):
            result = texts.answer(example, objective, row, answer["classes"], answer.get("class_names"))
            print(json.dumps({**result, "truncated": truncated}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    cli.run(main)
