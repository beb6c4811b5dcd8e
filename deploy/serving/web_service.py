"""The service: classifies texts over HTTP (port 18083) and RPC (port 8091), with Paddle Serving's pipeline.

Reads config_nlp.yml and the model that export_to_serving.py prepared; writes log files. It runs in the foreground until
SIGINT or SIGTERM, keeps the model in a process group of its own, and starts that anew should it die.

    python web_service.py &
    python web_service.py --wait-ready 60
    curl -d '{"text": "今年的高考作文题"}' http://127.0.0.1:18083/ppminilm/prediction
    python rpc_client.py --text 今年的高考作文题
    kill $!
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
import protocol
from common import UserError, cli

# Every setting of config_nlp.yml by its path: default, then the smallest and largest number or the allowed values.
SETTINGS = {
    "host": ("127.0.0.1",),
    "rpc_port": (8091, 1024, 65535),
    "http_port": (18083, 1024, 65535),
    "worker_num": (128, 1, 512),
    "timeout_ms": (10_000, 1, 600_000),
    "max_body_bytes": (1 << 18, 1024, 1 << 26),
    "max_texts": (128, 1, 10_000),
    "grace_ms": (5000, 0, 600_000),
    "log_dir": (".",),
    "dag.is_thread_op": (True, {True}),
    "op.ppminilm.concurrency": (1, 1, 1),
    "op.ppminilm.batch_size": (32, 1, 1024),
    "op.ppminilm.local_service_conf.model_config": ("serving_server",),
    "op.ppminilm.local_service_conf.device_type": (0, 0, 2),
    "op.ppminilm.local_service_conf.devices": ("",),
    "op.ppminilm.local_service_conf.thread_num": (0, 0, 1024),
    "op.ppminilm.local_service_conf.precision": ("", {"", "fp32", "bf16", "fp16", "int8"}),
}
# The command line's names for some of them.
OPTIONS = {
    "model": "op.ppminilm.local_service_conf.model_config",
    "precision": "op.ppminilm.local_service_conf.precision",
    "threads": "op.ppminilm.local_service_conf.thread_num",
    "host": "host",
    "http_port": "http_port",
    "rpc_port": "rpc_port",
    "log_dir": "log_dir",
}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--config", default=os.path.join(HERE, "config_nlp.yml"), help="settings")
    over = parser.add_argument_group("overrides of the config file")
    over.add_argument(
        "--model", help="directory of the model: export_to_serving.py's, or any exported or quantized one"
    )
    over.add_argument("--precision", help="fp32, bf16, fp16 or int8")
    over.add_argument("--threads", type=int, help="of the CPU")
    over.add_argument("--host", help="address to bind; 0.0.0.0 lets everybody in")
    over.add_argument("--http_port", type=int)
    over.add_argument("--rpc_port", type=int)
    over.add_argument("--log_dir", help="where PipelineServingLogs/ is made")
    parser.add_argument(
        "--wait-ready",
        "--wait_ready",
        nargs="?",
        const=60.0,
        type=float,
        metavar="SECONDS",
        help="start nothing; wait until the service of these settings answers, at most that long (60 without a "
        "number), with exit status 0 if it does, else 1",
    )
    return parser.parse_args(argv)


def flatten(tree, path=()):
    """{"a.b": value} of nested dicts."""
    if not isinstance(tree, dict):
        return {".".join(path): tree}
    return {key: value for name, sub in tree.items() for key, value in flatten(sub, (*path, str(name))).items()}


def check(name, value, shown):
    """Raises: UserError unless SETTINGS allow the value; ``shown`` is what the user knows it by."""
    default, *allowed = SETTINGS[name]
    if type(value) is not type(default):
        kind = {bool: "true or false", int: "a whole number", str: "a text"}[type(default)]
        raise UserError(f"{shown}: {value!r} must be {kind}")
    if allowed and isinstance(allowed[0], set) and value not in allowed[0]:
        raise UserError(f"{shown}: {value!r} must be {' or '.join(repr(v) for v in sorted(allowed[0]))}")
    if allowed and not isinstance(allowed[0], set) and not allowed[0] <= value <= allowed[1]:
        raise UserError(f"{shown}: {value} must be from {allowed[0]} to {allowed[1]}")


def read_config(args):
    """The settings as nested dicts, checked, paths made absolute. Raises: UserError naming the setting."""
    import yaml

    try:
        with open(args.config, encoding="utf-8") as file:
            given = yaml.safe_load(file) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {args.config}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(given, dict):
        raise UserError(f"--config {args.config}: must be settings, one `name: value` a line")
    flat = {name: default for name, (default, *_) in SETTINGS.items()}
    for name, value in flatten(given).items():
        if name not in SETTINGS:
            raise UserError(f"--config {args.config}: no setting is called {name}; there are {', '.join(SETTINGS)}")
        check(name, value, f"--config {args.config}: {name}")
        flat[name] = value
    for name in (OPTIONS["model"], "log_dir"):
        flat[name] = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(args.config)), flat[name]))
    for option, name in OPTIONS.items():
        value = getattr(args, option)
        if value is not None:
            check(name, value, f"--{option}")
            flat[name] = os.path.abspath(value) if option in ("model", "log_dir") else value
    config = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return config


def check_ports(config):
    """Raises: UserError for a port that is in use, or an address that is not this machine's."""
    for name in ("http_port", "rpc_port"):
        try:
            family, kind, _, _, address = socket.getaddrinfo(config["host"], config[name], type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise UserError(f"{name} {config[name]} on {config['host']}: {error.strerror}") from error
    if config["http_port"] == config["rpc_port"]:
        raise UserError(f"http_port and rpc_port are both {config['http_port']}")


class Supervisor:
    """Keeps one worker running, in a session of its own: what fails in there can kill its process group, as Paddle
    Serving does, and not this process or its parent."""

    def __init__(self, config):
        self.config, self.worker, self.stopping = config, None, False

    def start(self):
        """Starts the worker. Returns: whether it got ready; False if it ended before."""
        log_dir = os.path.join(self.config["log_dir"], "PipelineServingLogs")
        os.makedirs(log_dir, exist_ok=True)
        ready, tell = os.pipe()
        mode = "wb" if self.worker is None else "ab"  # kept across restarts: it may say why the last one ended
        with open(os.path.join(log_dir, "worker.out"), mode) as out:
            self.worker = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__)],
                stdin=subprocess.PIPE,
                stdout=out,
                pass_fds=[tell],
                start_new_session=True,
                text=True,
                env={**os.environ, WORKER: str(tell), "SERVING_LOG_PATH": self.config["log_dir"]},
            )
        os.close(tell)
        if self.stopping:  # the signal came before there was a worker to pass it on to
            self.stop()
        with contextlib.suppress(BrokenPipeError), self.worker.stdin as stdin:
            json.dump({**self.config, "supervisor": os.getpid()}, stdin)
        with open(ready, "rb") as pipe:
            return pipe.read(1) == b"!"

    def stop(self, *_):
        """Lets the worker finish what it is answering; after the time it has for that, ends it."""
        self.stopping = True
        if self.worker is not None:
            signal.signal(signal.SIGALRM, lambda *_: self.end())
            signal.setitimer(signal.ITIMER_REAL, self.config["grace_ms"] / 1000 + 5)
            with contextlib.suppress(ProcessLookupError):
                self.worker.terminate()

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.worker.pid, signal.SIGKILL)

    def run(self):
        """Returns: the exit status."""
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        config, been_ready, quick_ends = self.config, False, 0
        while True:
            ready = self.start()
            since = time.monotonic()
            if ready:
                where = f"http://{protocol.authority(config['host'], config['http_port'])}/ppminilm/prediction"
                print(f"web_service.py: ready, {where} and RPC on port {config['rpc_port']}", flush=True)
            status = self.worker.wait()
            self.end()  # whatever else is in its group
            if self.stopping:
                return 0
            if status == 2 and not been_ready:
                return 2  # it has said why
            said = f"web_service.py: the worker ended with status {status}{'' if ready else ' before it was ready'}"
            said += f"; see {os.path.join(config['log_dir'], 'PipelineServingLogs')}"
            quick_ends = quick_ends + 1 if not ready or time.monotonic() - since < 30 else 0
            been_ready = been_ready or ready
            if not been_ready or quick_ends == 3:
                print(f"{said}; giving up", file=sys.stderr)
                return 1
            print(f"{said}; starting it anew", file=sys.stderr, flush=True)


WORKER = "PPMINILM_WORKER"  # in the environment: this process is the worker, and tells on that file that it is ready


def work():
    """Is the worker: settings come as JSON on standard input."""
    import worker

    def ready():
        with contextlib.suppress(BrokenPipeError), open(int(os.environ[WORKER]), "wb", 0) as tell:
            tell.write(b"!")

    worker.serve(json.load(sys.stdin), ready)


def main(argv=None):
    if WORKER in os.environ:
        return work()
    args = parse_args(argv)
    config = read_config(args)
    if args.wait_ready is not None:
        import rpc_client

        sys.exit(0 if rpc_client.wait_ready(config["host"], config["http_port"], args.wait_ready) else 1)
    check_ports(config)
    with protocol.needs_paddle_serving():
        protocol.messages()
    sys.exit(Supervisor(config).run())


if __name__ == "__main__":
    cli.run(main)
