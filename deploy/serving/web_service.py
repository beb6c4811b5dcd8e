"""Text classification service over HTTP (port 18083) and RPC (port 8091), built on Paddle Serving's pipeline.

Reads config_nlp.yml and the model that export_to_serving.py prepared. Writes log files. Runs in the foreground until
SIGINT or SIGTERM; SIGHUP reloads the model. The model runs in a worker process with its own process group; a worker
that dies is restarted.

    python web_service.py &
    python web_service.py --wait-ready 60
    curl -d '{"text": "今年的高考作文题"}' http://127.0.0.1:18083/ppminilm/prediction
    python rpc_client.py --text 今年的高考作文题
    kill $!
"""

import contextlib
import functools
import json
import os
import signal
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
import access
import protocol
import settings
import supervisor
from common import cli


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--config", default=os.path.join(HERE, "config_nlp.yml"), help="YAML file with the settings")
    over = parser.add_argument_group("overrides of the config file")
    help = "model directory: --server_path of export_to_serving.py, or any exported or quantized model"
    over.add_argument("--model", help=help)
    over.add_argument("--precision", help="numeric precision: fp32, bf16, fp16 or int8")
    over.add_argument("--device_type", type=int, help="0: CPU, 1: GPU, 2: GPU with TensorRT")
    over.add_argument("--threads", type=int, help="CPU threads in total; 0: all cores")
    over.add_argument("--host", help="address to bind; 0.0.0.0 accepts connections from other machines")
    over.add_argument("--http_port", type=int, help="port for HTTP")
    over.add_argument("--rpc_port", type=int, help="port for RPC")
    over.add_argument("--log_dir", help="directory in which PipelineServingLogs/ is created")
    over.add_argument("--tokens_file", help="file with bearer tokens, one per line; without it, anyone may ask")
    over.add_argument("--tls_certificate", help="certificate chain in PEM, for TLS on both ports")
    over.add_argument("--tls_key", help="its private key in PEM, not encrypted")
    help = "do not start a service; wait up to SECONDS (default: 60) until the running service at this host and "
    help += "http_port answers; exit status 0 if it does, else 1, at once if that service has ended"
    names = ("--wait-ready", "--wait_ready")
    parser.add_argument(*names, nargs="?", const=60.0, type=float, metavar="SECONDS", help=help)
    return parser.parse_args(argv)


def work():
    """Runs as the worker process. Standard input brings the settings as a line of JSON, and others later."""
    import asyncio

    import worker

    pipe = int(os.environ[supervisor.WORKER])
    os.set_blocking(pipe, False)

    def sign(byte=supervisor.ALIVE):
        with contextlib.suppress(BlockingIOError):  # full: the supervisor has not read for hours
            os.write(pipe, byte)  # BrokenPipeError if it is gone: the worker ends, too

    # Unbuffered, so that what comes after the first line is left to the event loop.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as orders:
        asyncio.run(worker.serve(json.loads(orders.readline()), sign, orders))


def wait_ready(config, seconds):
    """Whether the service with these settings, on this machine, gets ready within ``seconds``."""
    import rpc_client

    certificate, host = config["tls_certificate"], config["host"]
    tls = rpc_client.Tls(certificate, on_this_machine=True) if certificate else None
    ended = supervisor.Watch(config).ended
    if config["http_port"] is None:
        return rpc_client.wait_connected(host, config["rpc_port"], seconds, tls, ended)
    token = access.read_tokens(config["tokens_file"])[0] if config["tokens_file"] else ""
    return rpc_client.wait_ready(host, config["http_port"], seconds, tls, token, ended)


def main(argv=None):
    cli.keep_printing()
    if supervisor.WORKER in os.environ:
        return work()
    args = parse_args(argv)
    if args.wait_ready is None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    config = settings.read_config(args)
    allowed = access.read(config)
    if args.wait_ready is not None:
        sys.exit(0 if wait_ready(config, args.wait_ready) else 1)
    with supervisor.being_alive(config):
        settings.check_ports(config)
        settings.allow_connections(config)
        with protocol.needs_paddle_serving():
            protocol.messages()
        reread = functools.partial(settings.read_config, args, notes=False)
        sys.exit(supervisor.Supervisor(config, allowed, reread).run())


if __name__ == "__main__":
    cli.run(main)
