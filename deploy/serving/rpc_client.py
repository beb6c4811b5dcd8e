"""Client of the service: sends texts over RPC, or HTTP with --http, and prints one JSON line per text.

    python rpc_client.py                                        # two sentences of its own
    python rpc_client.py --text 今年的高考作文题 股市收盘上涨
    python rpc_client.py --http --address 127.0.0.1:18083 --input_file texts.txt
    echo 今年的高考作文题 | python rpc_client.py --input_file -

Exit status: 0 if all texts were answered, 1 if the service failed or was unreachable, 2 for invalid arguments.
"""

import json
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import data
import numpy as np
import protocol
from common import cli, objectives, texts

# What is sent where no text is given: a headline about education and one about the stock exchange.
SENTENCES = ["今年的高考作文题你会写吗", "沪深股市收盘双双上涨"]
PORTS = {"rpc": 8091, "http": 18083}


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


def rpc(host, port):
    """Returns: function (fields, seconds) that sends a request over RPC, returns {key: value} and raises Refused."""
    import grpc

    pb = protocol.messages()
    channel = grpc.insecure_channel(f"{host}:{port}", [("grpc.max_reconnect_backoff_ms", 500)])
    call = channel.unary_unary(
        protocol.METHOD, request_serializer=pb.Request.SerializeToString, response_deserializer=pb.Response.FromString
    )

    def ask(fields, seconds):
        values = [value if isinstance(value, str) else json.dumps(value) for value in fields.values()]
        try:
            response = call(pb.Request(name=protocol.SERVICE, key=list(fields), value=values), timeout=seconds)
        except grpc.RpcError as error:
            raise Refused(
                f"{error.code().name.lower()}: {error.details()}", error.code() == grpc.StatusCode.UNAVAILABLE
            ) from error
        if response.err_no:
            raise Refused(f"err_no {response.err_no}: {response.err_msg}", response.err_no == protocol.UNAVAILABLE)
        return {key: json.loads(value) for key, value in zip(response.key, response.value)}

    return ask


def http_session():
    import requests

    session = requests.Session()
    session.trust_env = False  # ignore the proxy settings of the environment
    return session


def http(host, port):
    """Like rpc(), over HTTP."""
    import requests

    session = http_session()

    def ask(fields, seconds):
        try:
            reply = session.post(f"http://{host}:{port}/{protocol.SERVICE}/prediction", json=fields, timeout=seconds)
        except requests.Timeout as error:
            raise Refused(f"no answer in {seconds:.1f} s") from error
        except requests.RequestException as error:
            raise Refused(f"{host}:{port} cannot be reached", again=True) from error
        try:
            answer = reply.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or "err_no" not in answer:
            raise Refused(f"HTTP {reply.status_code}, and not an answer of this service")
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


def wait_ready(host, port, seconds, rpc_port=None):
    """Whether the service answers a health request, which runs the model like any other, within ``seconds``.

    A service without HTTP (port None) is asked by RPC whether it takes connections: it does when the model is warm.
    """
    import requests

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    if port is None:
        return wait_connected(host, rpc_port, seconds)
    url = f"http://{protocol.authority(host, port)}/{protocol.SERVICE}/health"
    until, session = time.monotonic() + seconds, http_session()
    while True:
        left = max(0.1, until - time.monotonic())
        try:
            if session.get(url, timeout=left).status_code == 200:
                return True
        except requests.RequestException:
            pass
        if time.monotonic() > until:
            print(
                f"{url}: not ready after {seconds:g} s; is it running? see its output and PipelineServingLogs/",
                file=sys.stderr,
            )
            return False
        time.sleep(min(0.2, max(0.0, until - time.monotonic())))


def wait_connected(host, port, seconds):
    """Whether an RPC connection comes about within ``seconds``."""
    import grpc

    address = protocol.authority(host, port)
    with grpc.insecure_channel(address, [("grpc.max_reconnect_backoff_ms", 500)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(seconds)
        except grpc.FutureTimeoutError:
            print(f"{address}: no RPC connection after {seconds:g} s; is it running?", file=sys.stderr)
            return False
    return True


def main(argv=None):
    args = parse_args(argv)
    examples = texts.read_texts(args, args.task_name, None, data.texts_of)
    with protocol.needs_paddle_serving():
        ask = (http if args.http else rpc)(args.host, args.port)
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
