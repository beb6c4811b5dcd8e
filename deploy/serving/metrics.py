"""What the service counts, for Prometheus: GET /metrics. Never a word of a request, nor an address.

All counts begin anew with the worker process, which Prometheus expects of a process that was restarted;
ppminilm_worker_restarts_total does not.
"""

import platform

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram

from common import PADDLE
from protocol import BAD_INPUT, NO_SERVICE, NOT_IMPLEMENTED, OK, TIMEOUT, UNAUTHORIZED, UNAVAILABLE, UNKNOWN

prometheus_client.disable_created_metrics()  # the time of each counter's start, which tells nothing here

OUTCOMES = {
    OK: "ok",
    NOT_IMPLEMENTED: "not_implemented",
    UNAVAILABLE: "unavailable",
    NO_SERVICE: "no_service",
    UNAUTHORIZED: "unauthorized",
    BAD_INPUT: "bad_input",
    TIMEOUT: "timeout",
    UNKNOWN: "failed",
}
# Seconds: from a single text on a fast machine to timeout_ms, which is 10 s unless it is set.
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32)  # the batch sizes that are run, worker.ROWS


class Metrics:
    """The counters of one worker process."""

    def __init__(self, restarts=0):
        self.registry = registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
        self.requests = Counter(
            "ppminilm_requests", "Requests that were replied to.", ("front", "outcome"), registry=registry
        )
        self.seconds = Histogram(
            "ppminilm_request_seconds",
            "Time from a request's arrival to its reply.",
            ("front",),
            buckets=SECONDS,
            registry=registry,
        )
        self.texts = Counter("ppminilm_texts", "Texts that were classified.", registry=registry)
        self.tokens = Counter("ppminilm_tokens", "Tokens of these texts, without padding.", registry=registry)
        self.batches = Histogram(
            "ppminilm_batch_texts", "Texts in a batch that was run.", buckets=BATCHES, registry=registry
        )
        self.running = Gauge("ppminilm_requests_running", "Requests that wait or are computed.", registry=registry)
        self.waiting = Gauge("ppminilm_texts_waiting", "Texts that no stream has taken yet.", registry=registry)
        self.reloads = Counter("ppminilm_reloads", "Reloads by SIGHUP or link.", ("outcome",), registry=registry)
        self.restarts = Counter(
            "ppminilm_worker_restarts", "Worker processes that were started after one had died.", registry=registry
        )
        self.restarts.inc(restarts)
        names = ("task", "objective", "precision", "weights", "max_seq_length")
        self.model = Gauge("ppminilm_model_info", "The model in service; always 1.", names, registry=registry)
        names = ("paddle", "python")
        build = Gauge("ppminilm_build_info", "What the service runs on; always 1.", names, registry=registry)
        build.labels(".".join(map(str, PADDLE)), platform.python_version()).set(1)
        for outcome in ("reloaded", "refused"):  # a rate needs the zero before the first one
            self.reloads.labels(outcome)

    def watch(self, service):
        """Reads the queues from a worker.Service whenever they are asked for."""
        self.running.set_function(lambda: len(service.running) + service.checking)
        self.waiting.set_function(lambda: service.texts_waiting())

    def serve_model(self, model):
        """A worker.Model goes into service. Its weights are told by the first digits of their SHA-256."""
        self.model.clear()
        objective = model.objective.describe()["name"]
        self.model.labels(model.record["task"], objective, model.precision, model.weights[:16], model.longest).set(1)

    def replied(self, front, err_no, seconds):
        self.requests.labels(front, OUTCOMES[err_no]).inc()
        self.seconds.labels(front).observe(seconds)

    def refused(self, front, err_no):
        """A request that was refused before it was read, which has no time of its own."""
        self.requests.labels(front, OUTCOMES.get(err_no, "failed")).inc()

    def computed(self, features):
        """A batch was run. Args: features: of its texts."""
        self.batches.observe(len(features))
        self.texts.inc(len(features))
        self.tokens.inc(sum(len(feature.input_ids) for feature in features))

    def text(self):
        """(body, content type) in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry), prometheus_client.CONTENT_TYPE_LATEST
