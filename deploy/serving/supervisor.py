"""Keeps the worker process running: starts it, watches it, restarts it, and tells it to take another model."""

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
import access
import protocol
import settings
from common import UserError, cli

SILENCE = 3  # seconds without a sign of life, which comes twice a second, after which a worker is ended
BUSY_SILENCE = 15  # the same for one whose event loop is busy, and not frozen
LONGEST_PAUSE = 10  # seconds before a worker that ends soon again and again is started anew
WORKER = "PPMINILM_WORKER"  # environment variable, set for the worker only: the file descriptor for its signs of life
# The signs, one byte each: it lives; it has taken the model that it was told to, or refused it.
ALIVE, TAKEN, REFUSED = b"!", b"t", b"r"


def say(line):
    print(f"web_service.py: {line}", file=sys.stderr, flush=True)


def open_log(path, mode):
    """A log file for writing. Raises: OSError for a link, behind which another file might be overwritten."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | mode, 0o600), "wb")


def log_directory(config):
    """Path of the directory of logs, which is made if needed. Raises: UserError if it holds links."""
    log_dir = os.path.join(config["log_dir"], "PipelineServingLogs")
    os.makedirs(log_dir, exist_ok=True)
    for path in (log_dir, *(os.path.join(log_dir, name) for name in os.listdir(log_dir))):
        if os.path.islink(path):  # behind which another file might be overwritten
            raise UserError(f"{path}: a link; the logs are written to files of their own")
    return log_dir


def lock_file(config):
    """Path of the file that is locked for as long as a service with these settings lives, however it ends."""
    port = config["http_port"] or config["rpc_port"]
    return os.path.join(config["log_dir"], "PipelineServingLogs", f"service_{port}.lock")


@contextlib.contextmanager
def being_alive(config):
    """Within this context the lock file is locked, unless another service of that port and directory holds it."""
    log_directory(config)
    with open_log(lock_file(config), 0) as file:
        for _ in range(20):  # a client that waits for readiness may look at it just now
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.utime(file.fileno())
                break
            time.sleep(0.05)
        yield


class Watch:
    """Tells a client that waits on the same machine when there is nothing left to wait for."""

    STARTED_TOGETHER = 5  # seconds: `web_service.py & web_service.py --wait-ready`
    GRACE = 5  # seconds in which a service that is started anew takes its lock

    def __init__(self, config):
        self.path, self.began, self.seen = lock_file(config), time.time(), False

    def ended(self):
        """Whether the service has ended that was seen alive, or that was started when the waiting began."""
        try:
            with open(self.path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                started = os.fstat(file.fileno()).st_mtime
        except BlockingIOError:
            self.seen = True
            return False
        except OSError:  # none was started here so far
            return False
        recent = started > self.began - self.STARTED_TOGETHER and time.time() > self.began + self.GRACE
        return self.seen or recent


class Supervisor:
    """Keeps one worker process running, in its own session. Paddle Serving kills its whole process group when it
    fails; this process and its parent survive that.

    Args: config: the settings. allowed: what access.read makes of them. reread: function that reads them anew.
    """

    def __init__(self, config, allowed=None, reread=None):
        self.config, self.allowed, self.reread = config, allowed, reread
        self.worker, self.stopping, self.starts = None, False, 0
        self.asked = False  # whether SIGHUP asked for a reload
        self.pending, self.refused = None, None  # the settings that the worker was told; the directory that it refused
        self.missing = None  # where the link led when it was looked at last
        if reread:
            self.resolve(config)

    def resolve(self, config):
        """Replaces a link to the model by what it leads to: a worker that is started anew takes what was in service."""
        model = settings.local_service(config)
        self.link = model["model_config"]
        model["model_config"] = os.path.realpath(self.link)

    def start(self):
        """Starts the worker. Returns: a pipe from which a byte comes when it is ready, then twice a second."""
        log_dir = log_directory(self.config)
        own = {"SERVING_LOG_PATH": self.config["log_dir"], "GRPC_VERBOSITY": "NONE"}  # gRPC logs what clients do wrong
        beats, worker_end = os.pipe()
        mode = os.O_TRUNC if self.worker is None else os.O_APPEND  # kept across restarts: it may show why one ended
        with open_log(os.path.join(log_dir, "worker.out"), mode) as out:
            self.worker = subprocess.Popen(
                [sys.executable, os.path.join(HERE, "web_service.py")],
                stdin=subprocess.PIPE,
                stdout=out,
                pass_fds=[worker_end],
                start_new_session=True,
                preexec_fn=cli.die_with_parent,
                text=True,
                env={**os.environ, **own, WORKER: str(worker_end)},
            )
        os.close(worker_end)
        if self.stopping:  # the signal arrived before the worker was started
            self.stop()
        self.tell({"config": self.config, "allowed": self.allowed, "restarts": self.starts})
        self.starts += 1
        return beats

    def tell(self, message):
        """Writes a line of JSON to the worker's standard input."""
        with contextlib.suppress(BrokenPipeError):
            self.worker.stdin.write(json.dumps(message) + "\n")
            self.worker.stdin.flush()

    def hang_up(self, *_):
        """SIGHUP: reload the model, the tokens and the certificate."""
        self.asked = True

    def reload(self):
        """Tells the worker to take another model if SIGHUP asked for it, or if the link to it leads elsewhere."""
        if self.pending or not self.reread:
            return
        target = os.path.realpath(self.link)
        is_new = target not in (settings.local_service(self.config)["model_config"], self.refused)
        # A link that is being replaced leads nowhere for a moment: what is not there has to be missing twice.
        is_new, self.missing = is_new and (os.path.isdir(target) or self.missing == target), target
        if not self.asked and not is_new:
            return
        self.asked, self.refused = False, None
        try:
            fresh = self.reread()
            allowed = access.read(fresh)
        except Exception as error:  # whatever it is, the service goes on
            self.refused = target
            say(f"not reloaded, the service goes on as it was: {error}")
            self.tell({"refused": True})
            return
        self.resolve(fresh)
        self.pending, others = settings.reloaded(self.config, fresh)
        if bool(allowed["certificate"]) != bool(self.allowed["certificate"]):
            others += ["tls_certificate", "tls_key"]
            allowed.update({name: self.allowed[name] for name in ("certificate", "key")})
            self.pending.update({name: self.config[name] for name in ("tls_certificate", "tls_key")})
        if others:
            say(f"note: a restart is needed for {', '.join(others)}")
        self.allowed = allowed  # valid from now on, whatever becomes of the model
        self.tell({"config": self.pending, "allowed": allowed})

    def reloaded(self, taken):
        """The worker has done as it was told, or refused."""
        if taken:
            self.config = self.pending
        else:
            self.refused = settings.local_service(self.pending)["model_config"]
        self.pending = None

    def beats(self, pipe, seconds=None):
        """Whether the worker gives a sign of life within so many seconds; False if it has ended."""
        readable, _, _ = select.select([pipe], [], [], None if self.stopping else seconds)
        signs = os.read(pipe, 4096) if readable else b""
        if self.pending and (TAKEN in signs or REFUSED in signs):
            self.reloaded(TAKEN in signs)
        return bool(signs)

    def lives(self, pipe):
        """Whether the worker gives a sign of life in time, which is longer while its event loop is computing, and while
        it loads a model: Paddle does not let the event loop run meanwhile."""
        for _ in range(BUSY_SILENCE // SILENCE):
            before = self.computed()
            if self.beats(pipe, SILENCE):
                return True
            if self.worker.poll() is not None:
                break
            if not self.pending and self.computed() - before < SILENCE / 10:
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

    def where(self):
        """The addresses of the service, for the line that says that it is ready."""
        config = self.config
        scheme = "https" if config["tls_certificate"] else "http"
        http = f"{scheme}://{protocol.authority(config['host'], config['http_port'])}/ppminilm/prediction and "
        return f"{http if config['http_port'] else ''}RPC on port {config['rpc_port']}"

    def watch(self, pipe):
        """Returns when the worker, which was ready, has ended, or gives no sign of life and was ended therefore."""
        while self.lives(pipe):
            if not self.stopping:
                self.reload()
        if self.worker.poll() is None and not self.stopping:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.worker.wait(0.2)  # it closed the pipe by ending
        if self.worker.poll() is None and not self.stopping:
            say(f"no sign of life from the worker for {SILENCE} s or more")
            self.end()
        if self.pending:
            say("not reloaded: the worker ended while it loaded; the next one takes the model from before")
            self.reloaded(False)

    def run(self):
        """Runs the worker and restarts it when it dies. Returns: the exit status."""
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        signal.signal(signal.SIGHUP, self.hang_up)
        been_ready, quick_ends, failures = False, 0, 0
        while True:
            pipe = self.start()
            ready = self.beats(pipe)  # loading takes as long as it takes
            since = time.monotonic()
            if ready:
                print(f"web_service.py: ready, {self.where()}", flush=True)
                self.watch(pipe)
            os.close(pipe)
            status = self.worker.wait()
            self.end()  # kills the other processes of its group
            with contextlib.suppress(BrokenPipeError):
                self.worker.stdin.close()
            if self.stopping:
                return 0
            if status == 2 and not been_ready:
                return 2  # the worker has printed the reason
            message = f"the worker ended with status {status}{'' if ready else ' before it was ready'}"
            message += f"; see {os.path.join(self.config['log_dir'], 'PipelineServingLogs')}"
            quick_ends = quick_ends + 1 if not ready or time.monotonic() - since < 30 else 0
            been_ready = been_ready or ready
            failures = 0 if ready else failures + 1  # while it loads, no client can reach it
            if not been_ready or failures == 3:
                say(f"{message}; giving up")
                return 1
            say(f"{message}; starting it anew")
            # Not given up, so that no client can end the service; but what cannot live is not started all the time.
            until = time.monotonic() + min(LONGEST_PAUSE, 2 ** (quick_ends - 1) - 1 if quick_ends else 0)
            while time.monotonic() < until and not self.stopping:
                time.sleep(0.05)
            if self.stopping:
                return 0
