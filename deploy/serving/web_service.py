"""Text classification service over HTTP (port 18083) and RPC (port 8091), built on Paddle Serving's pipeline.

Reads config_nlp.yml and the model that export_to_serving.py prepared. Writes log files. Runs in the foreground until
SIGINT or SIGTERM. The model runs in a worker process with its own process group; a worker that dies is restarted.

    python web_service.py &
    python web_service.py --wait-ready 60
    curl -d '{"text": "今年的高考作文题"}' http://127.0.0.1:18083/ppminilm/prediction
    python rpc_client.py --text 今年的高考作文题
    kill $!
"""

import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Literal, Optional

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
import protocol
import pydantic
from common import UserError, cli


def number(default, least, most):
    return pydantic.Field(default, ge=least, le=most)


def without_effect(default):
    """A setting of Paddle Serving that is taken, and goes no further: see WITHOUT_EFFECT."""
    return pydantic.Field(default, exclude=True)


class Section(pydantic.BaseModel):
    """Base class of the settings: rejects unknown names and values of the wrong type."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class LocalServiceConf(Section):
    # Paddle Serving calls this setting model_config, but pydantic reserves that name; hence the alias.
    model_directory: str = pydantic.Field("serving_server", alias="model_config")
    device_type: int = number(0, 0, 2)
    devices: str = ""
    thread_num: int = number(0, 0, 1024)
    precision: Literal["", "fp32", "bf16", "fp16", "int8"] = ""
    client_type: Literal["local_predictor"] = without_effect("local_predictor")
    fetch_list: list[str] = without_effect([])


class Operator(Section):
    concurrency: int = number(1, 1, 1)
    batch_size: int = number(32, 1, 1024)
    local_service_conf: LocalServiceConf = LocalServiceConf()


class Operators(Section):
    ppminilm: Operator = Operator()


class Tracer(Section):
    interval_s: int = -1


class Dag(Section):
    is_thread_op: bool = True
    tracer: Tracer = without_effect(Tracer())


class Settings(Section):
    """The settings of config_nlp.yml, with their defaults, smallest and largest values."""

    host: str = "127.0.0.1"
    rpc_port: int = number(8091, 1024, 65535)
    http_port: Optional[int] = number(18083, 1024, 65535)
    build_dag_each_worker: bool = without_effect(False)
    worker_num: int = number(128, 1, 512)
    timeout_ms: int = number(10_000, 1, 600_000)
    max_body_bytes: int = number(1 << 18, 1024, 1 << 26)
    max_header_bytes: int = number(8192, 1024, 1 << 20)
    request_ms: int = number(10_000, 100, 600_000)
    max_connections: int = number(512, 8, 100_000)
    max_connections_per_address: int = number(512, 8, 100_000)
    max_texts: int = number(128, 1, 10_000)
    max_text_chars: int = number(32_768, 1, 1 << 26)
    max_texts_waiting: int = number(4096, 1, 1_000_000)
    grace_ms: int = number(5000, 0, 600_000)
    log_dir: str = "."
    dag: Dag = Dag()
    op: Operators = Operators()


# Settings of Paddle Serving that its other services have: {dotted name: why it has no effect in this one}.
WITHOUT_EFFECT = {
    "build_dag_each_worker": "one process answers all requests",
    "dag.is_thread_op": "the streams of one engine compute in threads",
    "dag.tracer": "the time of each request is in the log",
    "op.ppminilm.local_service_conf.client_type": "the model always runs in this service",
    "op.ppminilm.local_service_conf.fetch_list": "an answer always has the logits",
}


# {command-line option: dotted name of the setting that it overrides}
LOCAL_SERVICE = "op.ppminilm.local_service_conf"
OPTIONS = {name: name for name in ("host", "http_port", "rpc_port", "log_dir")}
NAMES = {"model": "model_config", "threads": "thread_num", "precision": "precision", "device_type": "device_type"}
OPTIONS.update((option, f"{LOCAL_SERVICE}.{name}") for option, name in NAMES.items())


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
    help = "do not start a service; wait up to SECONDS (default: 60) until the running service at this host and "
    help += "http_port answers; exit status 0 if it does, else 1"
    names = ("--wait-ready", "--wait_ready")
    parser.add_argument(*names, nargs="?", const=60.0, type=float, metavar="SECONDS", help=help)
    return parser.parse_args(argv)


def check_settings(settings, source):
    """Validates settings and fills in the defaults. Returns: nested dicts with Paddle Serving's names.

    Args: source: origin of the settings, for messages. Raises: UserError that names the first invalid setting.
    """
    try:
        return Settings.model_validate(settings).model_dump(by_alias=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if not source.startswith("--config"):  # an option, which is the name that the user knows
            raise UserError(f"{source}: {first['input']!r}: {first['msg']}") from error
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: no setting is called {name}; config_nlp.yml lists all settings") from error
        raise UserError(f"{source}: {name}: {first['input']!r}: {first['msg']}") from error


def fill_in_ports(given):
    """As Paddle Serving documents it: RPC at http_port + 1 if that alone is set, no HTTP if rpc_port alone is set."""
    for name in ("http_port", "rpc_port"):
        if given.get(name, 0) is None:  # `http_port:` with nothing behind it
            del given[name]
    http_port = given.get("http_port")
    if "rpc_port" in given:
        given.setdefault("http_port", None)
    elif isinstance(http_port, int) and http_port >= 1024:  # others are refused by their own name
        given["rpc_port"] = http_port + 1


def is_given(settings, name):
    """Whether nested settings have a value under a dotted name."""
    first, _, rest = name.partition(".")
    if not isinstance(settings, dict) or first not in settings:
        return False
    return is_given(settings[first], rest) if rest else settings[first] not in (None, [])


def note_without_effect(given, path):
    """Says in one line which settings are taken without effect, and why. is_thread_op: true is what is done anyway."""
    named = [f"{name.rpartition('.')[2]} ({why})" for name, why in WITHOUT_EFFECT.items() if is_given(given, name)]
    if is_given(given, "dag.is_thread_op") and given["dag"]["is_thread_op"]:
        named = [each for each in named if not each.startswith("is_thread_op")]
    if named:
        print(f"note: {path}: without effect: {', '.join(named)}", file=sys.stderr)


def read_config(args):
    """The settings of the config file, overridden by the command line, as nested dicts; paths are absolute.

    Raises: UserError that names the invalid setting.
    """
    import yaml

    source = f"--config {args.config}"
    try:
        with open(args.config, encoding="utf-8") as file:
            given = yaml.safe_load(file) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(given, dict):
        raise UserError(f"{source}: must be settings, one `name: value` per line")
    fill_in_ports(given)
    config = check_settings(given, source)
    if args.wait_ready is None:
        note_without_effect(given, args.config)
    # Paths in the file are relative to it, those on the command line to the working directory.
    base = os.path.dirname(os.path.abspath(args.config))
    for option, name in OPTIONS.items():
        *sections, last = name.split(".")
        section = config
        for each in sections:
            section = section[each]
        override = getattr(args, option)
        is_path = option in ("model", "log_dir")
        if override is not None:
            section[last] = os.path.abspath(override) if is_path else override
            check_settings(config, f"--{option}")
        elif is_path:
            section[last] = os.path.normpath(os.path.join(base, section[last]))
    return config


def check_ports(config):
    """Raises: UserError if a port is in use, or if the address does not belong to this machine."""
    for name in ("http_port", "rpc_port"):
        if config[name] is None:
            continue
        try:
            family, kind, _, _, address = socket.getaddrinfo(config["host"], config[name], type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise UserError(f"{name} {config[name]} on {config['host']}: {error.strerror}") from error
    if config["http_port"] == config["rpc_port"]:
        raise UserError(f"http_port and rpc_port are both {config['http_port']}")


def allow_connections(config):
    """Raises the limit of open files, of which each connection is one, as far as it may be. Raises: UserError if even
    that is too low for the settings."""
    needed = 5 * config["max_connections"] + 256  # HTTP for a moment four times, as many by RPC, and what else is open
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < needed:
        raise UserError(
            f"max_connections {config['max_connections']}: needs {needed} open files, and this user may have {most} "
            "(ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(needed, 4096) if most == resource.RLIM_INFINITY else most, most))


def open_log(path, mode):
    """A log file for writing. Raises: OSError for a link, behind which another file might be overwritten."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | mode, 0o600), "wb")


class Supervisor:
    """Keeps one worker process running, in its own session. Paddle Serving kills its whole process group when it
    fails; this process and its parent survive that."""

    def __init__(self, config):
        self.config, self.worker, self.stopping = config, None, False

    def start(self):
        """Starts the worker. Returns: a pipe from which a byte comes when it is ready, then twice a second."""
        log_dir = os.path.join(self.config["log_dir"], "PipelineServingLogs")
        os.makedirs(log_dir, exist_ok=True)
        for path in (log_dir, *(os.path.join(log_dir, name) for name in os.listdir(log_dir))):
            if os.path.islink(path):  # behind which another file might be overwritten
                raise UserError(f"{path}: a link; the logs are written to files of their own")
        beats, worker_end = os.pipe()
        mode = os.O_TRUNC if self.worker is None else os.O_APPEND  # kept across restarts: it may show why one ended
        with open_log(os.path.join(log_dir, "worker.out"), mode) as out:
            self.worker = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__)],
                stdin=subprocess.PIPE,
                stdout=out,
                pass_fds=[worker_end],
                start_new_session=True,
                preexec_fn=cli.die_with_parent,
                text=True,
                env={**os.environ, WORKER: str(worker_end), "SERVING_LOG_PATH": self.config["log_dir"]},
            )
        os.close(worker_end)
        if self.stopping:  # the signal arrived before the worker was started
            self.stop()
        with contextlib.suppress(BrokenPipeError), self.worker.stdin as stdin:
            json.dump(self.config, stdin)
        return beats

    def beats(self, pipe, seconds=None):
        """Whether the worker gives a sign of life within so many seconds; False if it has ended."""
        readable, _, _ = select.select([pipe], [], [], None if self.stopping else seconds)
        return bool(readable and os.read(pipe, 4096))

    def lives(self, pipe):
        """Whether the worker gives a sign of life in time, which is longer while its event loop is computing."""
        for _ in range(BUSY_SILENCE // SILENCE):
            before = self.computed()
            if self.beats(pipe, SILENCE):
                return True
            if self.worker.poll() is not None or self.computed() - before < SILENCE / 10:
                break
        return False

    def computed(self):
        """Seconds of a processor that the worker's event loop, its main thread, has had; 0 if that is unknown."""
        with (
            contextlib.suppress(OSError, ValueError),
            open(f"/proc/{self.worker.pid}/task/{self.worker.pid}/stat") as file,
        ):
            return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
        return 0

    def stop(self, *_):
        """Asks the worker to finish the running requests and exit; kills it when the grace period is over."""
        self.stopping = True
        if self.worker is not None:
            signal.signal(signal.SIGALRM, lambda *_: self.end())
            if not signal.getitimer(signal.ITIMER_REAL)[0]:  # a second signal does not put it off
                signal.setitimer(signal.ITIMER_REAL, self.config["grace_ms"] / 1000 + 5)
            with contextlib.suppress(ProcessLookupError):
                self.worker.terminate()

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.worker.pid, signal.SIGKILL)

    def run(self):
        """Runs the worker and restarts it when it dies. Returns: the exit status."""
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        config, been_ready, quick_ends, failures = self.config, False, 0, 0
        while True:
            pipe = self.start()
            ready = self.beats(pipe)  # loading takes as long as it takes
            since = time.monotonic()
            if ready:
                where = f"http://{protocol.authority(config['host'], config['http_port'])}/ppminilm/prediction and "
                where = where if config["http_port"] else ""
                print(f"web_service.py: ready, {where}RPC on port {config['rpc_port']}", flush=True)
            while ready and self.lives(pipe):
                pass
            os.close(pipe)
            if ready and self.worker.poll() is None and not self.stopping:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.worker.wait(0.2)  # it closed the pipe by ending
            if ready and self.worker.poll() is None and not self.stopping:
                print(
                    f"web_service.py: no sign of life from the worker for {SILENCE} s or more",
                    file=sys.stderr,
                    flush=True,
                )
                self.end()
            status = self.worker.wait()
            self.end()  # kills the other processes of its group
            if self.stopping:
                return 0
            if status == 2 and not been_ready:
                return 2  # the worker has printed the reason
            message = f"web_service.py: the worker ended with status {status}{'' if ready else ' before it was ready'}"
            message += f"; see {os.path.join(config['log_dir'], 'PipelineServingLogs')}"
            quick_ends = quick_ends + 1 if not ready or time.monotonic() - since < 30 else 0
            been_ready = been_ready or ready
            failures = 0 if ready else failures + 1  # while it loads, no client can reach it
            if not been_ready or failures == 3:
                print(f"{message}; giving up", file=sys.stderr, flush=True)
                return 1
            print(f"{message}; starting it anew", file=sys.stderr, flush=True)
            # Not given up, so that no client can end the service; but what cannot live is not started all the time.
            until = time.monotonic() + min(LONGEST_PAUSE, 2 ** (quick_ends - 1) - 1 if quick_ends else 0)
            while time.monotonic() < until and not self.stopping:
                time.sleep(0.05)
            if self.stopping:
                return 0


SILENCE = 3  # seconds without a sign of life, which comes twice a second, after which a worker is ended
BUSY_SILENCE = 15  # the same for one whose event loop is busy, and not frozen
LONGEST_PAUSE = 10  # seconds before a worker that ends soon again and again is started anew
WORKER = "PPMINILM_WORKER"  # environment variable, set for the worker only: the file descriptor for its ready signal


def work():
    """Runs as the worker process. Reads the settings as JSON from standard input."""
    import asyncio

    import worker

    pipe = int(os.environ[WORKER])
    os.set_blocking(pipe, False)

    def beat():
        with contextlib.suppress(BlockingIOError):  # full: web_service.py has not read for hours
            os.write(pipe, b"!")  # BrokenPipeError if it is gone: the worker ends, too

    asyncio.run(worker.serve(json.load(sys.stdin), beat, beat))


def main(argv=None):
    cli.keep_printing()
    if WORKER in os.environ:
        return work()
    args = parse_args(argv)
    config = read_config(args)
    if args.wait_ready is not None:
        import rpc_client

        address = config["host"], config["http_port"]
        sys.exit(0 if rpc_client.wait_ready(*address, args.wait_ready, config["rpc_port"]) else 1)
    check_ports(config)
    allow_connections(config)
    with protocol.needs_paddle_serving():
        protocol.messages()
    sys.exit(Supervisor(config).run())


if __name__ == "__main__":
    cli.run(main)
