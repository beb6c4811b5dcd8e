"""The worker process, started by web_service.py: one event loop with both fronts, and the model's threads.

fronts.py (RPC, HTTP) -> Service -> scheduler.py -> PPMiniLMOp (tokenizes, runs a batch, makes the answer) -> fronts.py
"""

import asyncio
import collections
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import time
import traceback
import unicodedata

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import access
import fronts
import numpy as np
import protocol
import settings
import supervisor
from common import UserError, batching, checkpoints, cli, compat, engine, records, texts
from metrics import Metrics
from protocol import BAD_INPUT, OK, TIMEOUT, UNAVAILABLE, UNKNOWN, Answer, ServiceError
from scheduler import Job, Scheduler

pipeline = compat.paddle_serving()
log = logging.getLogger("ppminilm")

# Batch sizes that are run. oneDNN prepares its operators for every new shape: this takes many times as long as a run
# and copies the weights. So only these batch sizes are used, and each of them is run once before the ports open.
ROWS = {"cpu": (16, 4, 1), "gpu": (32, 16, 8, 4, 2, 1)}
# Sequence lengths to which texts are padded. Under load a CPU computes batches of the largest size: they have more
# lengths, where most texts are. 16 texts of 26 tokens take 72 ms at length 28 and 82 ms at 32 (6 layers, INT8, Zen 4).
LENGTHS = (16, 32, 64, 128, 256, 384)
FINE_LENGTHS = (16, 24, 28, 32, 48, 64, 96, 128, 192, 256, 384)
# Health requests at once, beside worker_num.
HEALTH_PLACES = 4
# Requests above this size are parsed one at a time, and other things are done between them: 256 KB of JSON take 10 ms.
LARGE_BYTES = 16_384
TOO_LATE = "the service is too busy: the request waited longer than its time limit"
# Fixed cost of a run, expressed in tokens. Measured with 6 layers in INT8: 5 to 6 ms per run and 0.13 ms per token.
RUN_COST = 48


def padded_lengths(device, longest):
    """{batch size: sequence lengths, ascending}: the shapes that are run, the largest batch size first.

    So few that the engine keeps what it prepared for each (64 shapes, common/engine.py).
    """
    rows = ROWS[device.partition(":")[0]]
    finest = rows[0] if device == "cpu" else None

    def up_to_longest(lengths):
        return [length for length in lengths if length < longest] + [longest]

    return {size: up_to_longest(FINE_LENGTHS if size == finest else LENGTHS) for size in rows}


def is_space(char):
    """Whether the tokenizer takes a character for white space; other control characters it deletes."""
    return char in "\t\n\r" or unicodedata.category(char) == "Zs"


def is_cjk(text):
    return all("\u4e00" <= char <= "\u9fff" for char in text)


class Model:
    """The exported model with its engine and tokenizer.

    Args: threads: CPU threads in all, 0 for all cores. They are divided among streams, which compute batches side by
        side: faster than one batch on all threads, which wait for each other after every operator.
    """

    def __init__(self, path, device, precision, threads, use_trt=False):
        graph = checkpoints.open_graph(path, "--model")
        self.record, self.tokenizer = graph.record, graph.tokenizer()
        (self.weights,) = records.parameter_hashes(records.graph_files(self.record))
        self.precision = precision or engine.default_precision(graph.prefix)
        self.objective, self.labels = graph.objective, self.record["labels"]
        self.label_names = self.record["model"].get("label_names")
        self.pairs = bool(self.record["data"]["dev"].get("pairs"))
        self.longest = self.record["arguments"]["max_seq_length"]
        self.lengths = padded_lengths(device, self.longest)
        self.rows = list(self.lengths)
        self.streams = engine.default_streams(device, threads or None)
        # TensorRT collects its shape ranges from the largest batches and one single row.
        shapes = [self.shape(1, length) for length in self.lengths[self.rows[0]] for _ in range(self.rows[0])]
        features = [
            batching.Feature(batch.input_ids[0].tolist(), [0] * batch.input_ids.shape[1], None) for batch in shapes
        ]
        options = device, self.precision, threads or None, use_trt, self.rows[0], self.tokenizer.pad_id, self.streams
        self.engine = engine.open_engine(graph.prefix, [*features, features[-1]], *options)
        # A request that comes alone is answered soonest on all threads.
        self.alone, self.most_alone = self.engine, 1
        if self.streams > 1:
            self.alone = engine.open_engine(graph.prefix, features, *options[:-1], streams=1)

    def shape(self, rows, length):
        """A Batch of that shape without a text in it."""
        ids = np.full((rows, length), self.tokenizer.sep_id)
        ids[:, 0] = self.tokenizer.cls_id
        return batching.Batch(ids, np.zeros_like(ids), None, None)

    def prepare(self):
        """Runs one batch of every shape in every stream, so that oneDNN prepares its operators."""
        self.engine.prepare(self.shape(rows, length) for rows in self.rows for length in self.lengths[rows])
        if self.alone is not self.engine:
            few = [rows for rows in self.rows if rows <= self.most_alone]
            self.alone.prepare(self.shape(rows, length) for rows in few for length in self.lengths[rows])

    def tokenize(self, texts, pairs, number=1):
        """(list of Feature, list of bool: whether a text was cut) of texts, and their pairs, or None.

        Args: number: of the first text in its request. Raises: ServiceError for a text without tokens, as an empty one.
        """
        texts, pairs = [self.beginning(text) for text in texts], pairs and [self.beginning(text) for text in pairs]
        features, truncated = [], []
        for ids, types in self.tokenizer.encode(texts, pairs, self.longest + 1):
            if types.count(0) < 3 or (self.pairs and types.count(1) < 2):  # only [CLS] and [SEP]
                raise ServiceError(BAD_INPUT, f"text {number + len(features)} is empty")
            truncated.append(len(ids) > self.longest)
            features.append(batching.Feature(ids, types, None))
        for i in np.flatnonzero(truncated):
            pair = [pairs[i]] if pairs else None
            ((ids, types),) = self.tokenizer.encode([texts[i]], pair, self.longest)
            features[i] = batching.Feature(ids, types, None)
        return features, truncated

    def beginning(self, text):
        """As much of a long text as decides its first ``longest`` tokens; what follows them would be cut off anyway.

        It ends at white space or between two CJK characters, so that its tokens are the first ones of the whole text.
        A piece with too few tokens, such as one of blanks or of words that are not in the vocabulary, is doubled.
        """
        size = 4 * self.longest
        while size < len(text):
            end = next(
                (i for i in range(size, len(text)) if is_space(text[i]) or is_cjk(text[i - 1 : i + 1])), len(text)
            )
            ((ids, _),) = self.tokenizer.encode([text[:end]], None, self.longest + 3)
            if len(ids) == self.longest + 3:
                return text[:end]
            size = 2 * end
        return text

    def cheapest_runs(self, lengths, rows):
        """[(start, stop, padded length)]: how texts of these lengths, ascending, are best divided into shapes."""
        padded = {size: [self.lengths[size][i] for i in np.searchsorted(self.lengths[size], lengths)] for size in rows}
        # cheapest[n]: (lowest cost of the n shortest texts, batch size of the run with the longest of them).
        cheapest = [(0, 0)]
        for n in range(1, len(lengths) + 1):
            costs = {size: RUN_COST + size * padded[size][n - 1] for size in rows if size <= n}
            cheapest.append(min((cheapest[n - size][0] + cost, size) for size, cost in costs.items()))
        runs, n = [], len(lengths)
        while n:
            size = cheapest[n][1]
            runs.append((n - size, n, padded[size][n - 1]))
            n -= size
        return runs

    def batch(self, features, length):
        return batching.collate(features, range(len(features)), self.tokenizer.pad_id, length)


class PPMiniLMOp(pipeline.Op):
    """Paddle Serving's operator: what is done with a request before, in, and after the model. See scheduler.py."""

    def __init__(self, model):
        super().__init__(name=protocol.SERVICE, input_ops=[])
        self.model = model

    def preprocess(self, input_dicts, data_id=0, log_id=0):
        """Tokenizes some texts of a request: {texts, pairs, number of the first one} -> {features, truncated}."""
        (request,) = input_dicts.values()
        features, truncated = self.model.tokenize(**request)
        return {"features": features, "truncated": truncated}, False, None, ""

    def process(self, feed_batch, typical_logid=0):
        """Runs the model, in a thread of it: {features, length, engine} -> {logits: float32 [texts, outputs]}."""
        (feed,) = feed_batch
        batch = self.model.batch(feed["features"], feed["length"])
        return {"logits": feed["engine"].run(batch)}, OK, ""

    def postprocess(self, input_data, fetch_data, data_id=0, log_id=0):
        """The answer to a request: {truncated}, {logits} -> {key: a value for JSON}."""
        (request,) = input_data.values()
        logits = fetch_data["logits"]
        chosen, names = self.model.objective.columns(logits, self.model.labels), self.model.label_names
        answer = {
            **chosen,
            **texts.named(chosen, self.model.labels, names),
            # Nine significant digits identify every float32 value.
            "logits": [[float(f"{value:.9g}") for value in row] for row in logits.tolist()],
            "classes": self.model.labels,
            **({"class_names": names} if names else {}),
            "truncated": request["truncated"],
            "objective": self.model.objective.describe(),
        }
        return answer, None, ""


def check_finite(logits):
    """Raises: UserError if a model that is tried answers with infinities or NaN."""
    if not np.isfinite(logits).all():
        raise UserError("the model answers with numbers that are not finite")


class Served:
    """A model in service, with its operator and its queue."""

    def __init__(self, model, batch_size, metrics):
        self.model, self.op = model, PPMiniLMOp(model)
        self.scheduler = Scheduler(self.op, batch_size, metrics)
        ready = "text_pair" if model.pairs else "text"
        self.health_fields = dict.fromkeys(("text", ready), model.labels[0])

    async def check(self):
        """Lets the model answer a request. Raises: ServiceError, or what its engine raises."""
        query = protocol.Query([self.model.labels[0]], [self.model.labels[0]] if self.model.pairs else None, 0)
        check_finite(await self.scheduler.run(Job(query, "", time.monotonic(), self.scheduler)))

    async def close(self):
        """Waits for what is being computed, then ends the threads."""
        await self.scheduler.close()
        for one in {self.model.engine, self.model.alone}:
            one.pool.shutdown()


class Service:
    """Answers the requests of both fronts: enforces the limits, asks the scheduler and writes the log."""

    def __init__(self, model, config, tokens, metrics):
        self.config, self.tokens, self.metrics, self.closing = config, tokens, metrics, False
        self.timeout = config["timeout_ms"] / 1000
        self.running = set()  # jobs
        self.checking = 0  # health requests that are being answered
        self.reading, self.read_seconds = asyncio.Lock(), 0.0  # for large requests, and what the last one took
        self.served = self.serve(model)
        metrics.watch(self)
        metrics.serve_model(model)

    def serve(self, model):
        """A model with a queue of its own, which no request goes to before replace()."""
        return Served(model, self.config["op"][protocol.SERVICE]["batch_size"], self.metrics)

    def replace(self, served):
        """From now on requests go to another model; those that the one before has are answered by it.

        Returns: the one before, for closing.
        """
        before, self.served = self.served, served
        self.metrics.serve_model(served.model)
        return before

    async def answer(self, front, read, address, size=0):
        """Returns: the Answer. Args: front: its name in the log. read: function that returns (fields, logid).
        address: of the client, whose requests take turns with those of others. size: of what read() parses, in bytes.
        """
        start, logid, count, values, err_no, err_msg = time.monotonic(), 0, 0, {}, OK, ""
        try:
            async with self.turn_to_read(size):
                if time.monotonic() - start > self.timeout:
                    raise ServiceError(TIMEOUT, TOO_LATE)
                served = self.served  # the same one to the end of this request
                fields, logid = read()
                query = protocol.read_query(fields, logid, served.model.pairs, self.config)
            count = len(query.texts)
            values = await self.compute(served, query, address, front == "health")
            if query.numbered:  # the original example's client takes the first value for the logits
                values = {"logits": values.pop("logits"), **values}
        except ServiceError as error:
            err_no, err_msg = error.err_no, str(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]  # not the message: it may quote the request
            log.error("logid %d: %s, %s:%d", logid, type(error).__name__, place.filename, place.lineno)
            err_no, err_msg = UNKNOWN, "the service failed to answer this request"
        seconds = time.monotonic() - start
        log.info("%s logid %d: %d texts, %.1f ms, err_no %d", front, logid, count, 1000 * seconds, err_no)
        self.metrics.replied(front, err_no, seconds)
        return Answer(err_no, err_msg, values)

    @contextlib.asynccontextmanager
    async def turn_to_read(self, size):
        """Within this context a request of that size may be parsed: a small one at once, the large ones one at a time,
        each after a pause as long as the one before took, in which the event loop does what else there is to do."""
        if size <= LARGE_BYTES:
            yield
            return
        async with self.reading:
            await asyncio.sleep(self.read_seconds)
            start = time.monotonic()
            try:
                yield
            finally:
                self.read_seconds = time.monotonic() - start

    async def compute(self, served, query, address, is_health):
        job = Job(query, address, time.monotonic(), served.scheduler)
        if self.closing:
            raise ServiceError(UNAVAILABLE, "the service is stopping; try again")
        if is_health and self.checking >= HEALTH_PLACES:
            raise ServiceError(UNAVAILABLE, "the service has too many health requests waiting; try again")
        if not is_health:  # which has places of its own
            self.admit(job)
        self.checking += is_health
        expiry = asyncio.get_running_loop().call_later(self.timeout, self.expire, job)
        try:
            logits = await job.scheduler.run(job)
        finally:
            expiry.cancel()
            self.checking -= is_health
            self.running.discard(job)
        answer, _, _ = served.op.postprocess({"request": {"truncated": job.truncated}}, {"logits": logits})
        return answer

    def expire(self, job):
        """Ends the waiting of a job. One that has begun is answered: what was computed of it is not thrown away."""
        if not job.begun:
            job.scheduler.fail([job], ServiceError(TIMEOUT, TOO_LATE))

    def admit(self, job):
        """Takes a job in. If there are too many, one that has not begun makes room: of the address with most of them
        the largest, of equal ones the latest. Raises: ServiceError if it is this one.
        """
        busy = ServiceError(UNAVAILABLE, "the service has too many requests waiting; try again")
        self.running.add(job)
        while len(self.running) > self.config["worker_num"] or self.texts() > self.config["max_texts_waiting"]:
            not_begun = [one for one in self.running if not one.begun]
            counts = collections.Counter(one.address for one in not_begun)
            largest = max(not_begun, key=lambda one: (counts[one.address], one.seconds, one.order))
            self.running.discard(largest)
            if largest is job:
                raise busy
            largest.scheduler.fail([largest], busy)

    def texts(self):
        return sum(len(job.query.texts) for job in self.running)

    def texts_waiting(self):
        """Texts that no stream has taken yet."""
        whole = [(job, len(job.features) == len(job.query.texts)) for job in self.running]
        return sum(len(job.left) if tokenized else len(job.query.texts) for job, tokenized in whole)


def set_up_logs():
    """Limits the size of Paddle Serving's log files, which it opens on import; a full disk ends logs, not answers."""
    logging.raiseExceptions = False
    logging.getLogger("paddle_serving_server").setLevel(logging.WARNING)
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # it logs what clients send wrong
    for handler in logging.getLogger().handlers:
        handler.maxBytes, handler.backupCount = 10_000_000, 4


def device_of(settings):
    """(device, whether TensorRT runs on it) of local_service_conf; a Paddle without CUDA takes the CPU, and says so."""
    kind, gpu = settings["device_type"], settings["devices"] or "0"
    if kind and not compat.paddle.is_compiled_with_cuda():
        print(f"note: device_type {kind}: this Paddle is one for CPUs, so the CPU is used", file=sys.stderr)
        kind = 0
    return cli.set_device(f"gpu:{gpu}" if kind else "cpu"), kind == 2


def load(config):
    """The Model of the settings, warm. Raises: UserError, or what Paddle raises."""
    model = Model(*model_options(config))
    model.prepare()
    return model


def model_options(config):
    """The arguments of Model."""
    op = settings.local_service(config)
    device, use_trt = device_of(op)
    return op["model_config"], device, op["precision"], op["thread_num"], use_trt


def try_out():
    """Runs as a process of its own: loads the model of the settings that standard input brings, lets it compute, and
    prints what kind of requests it takes."""
    cli.die_with_parent()
    config = json.load(sys.stdin)
    settings.local_service(config)["thread_num"] = 1
    model = Model(*model_options(config))
    for rows in (model.rows[0], model.rows[-1]):
        check_finite(model.engine.run(model.shape(rows, model.lengths[rows][0])))
    print(KINDS[model.pairs])


KINDS = {False: "single texts", True: "sentence pairs"}
TRIAL_SECONDS = 300  # for try_out, after which the model is refused


async def try_in_another_process(config, kind):
    """Raises: UserError if the model of the settings cannot be used, or takes requests of another kind. Some bad graphs
    make Paddle end its process, so it is not this one that tries."""
    command, pipe = [sys.executable, os.path.abspath(__file__)], asyncio.subprocess.PIPE
    # No preexec_fn: Python between fork and exec, in a process with gRPC's and the engine's threads, may crash.
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        out, err = await asyncio.wait_for(child.communicate(json.dumps(config).encode()), TRIAL_SECONDS)
    except asyncio.TimeoutError as error:
        child.kill()
        raise UserError(f"not loaded within {TRIAL_SECONDS} s") from error
    if child.returncode < 0:
        raise UserError(f"loading it ended the process that tried, by signal {-child.returncode}")
    if child.returncode:
        line = (err.decode(errors="replace").strip().splitlines() or ["no reason was given"])[-1]
        raise UserError(line.rpartition("worker.py: error: ")[2])
    takes = out.decode().strip().splitlines()[-1]
    if takes != kind:
        raise UserError(f"it takes {takes}, the model in service {kind}; start a service of its own for it")


def give_back_memory():
    """What a model has left behind: objects that refer to each other, and pages that the allocator keeps."""
    gc.collect()
    cli.LIBC.malloc_trim(0)


class Reloader:
    """Does what the supervisor tells while the service goes on: another model, other tokens, another certificate."""

    def __init__(self, service, running):
        self.service, self.running = service, running
        self.retiring = {}  # {Served that answers its last requests: the task that closes it}

    def take_access(self, allowed):
        """New requests need these tokens, and new connections get this certificate."""
        self.service.tokens = access.Tokens(allowed["tokens"])
        for front in self.running:
            front.take_certificate(allowed)

    async def take_model(self, config):
        """Whether the model of the settings was taken. It is loaded and tried before the one in service is touched."""
        service, path = self.service, settings.local_service(config)["model_config"]
        try:
            await try_in_another_process(config, KINDS[service.served.model.pairs])
            model = await asyncio.get_running_loop().run_in_executor(None, load, config)
            fresh = service.serve(model)
            try:
                await asyncio.wait_for(fresh.check(), service.timeout + 30)
            except BaseException:
                self.retire(fresh)
                raise
        except Exception as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            why = why if path in why else f"{path}: {why}"
            print(f"web_service.py: not reloaded, the service goes on as it was: {why}", file=sys.stderr)
            service.metrics.reloads.labels("refused").inc()
            return False
        self.retire(service.replace(fresh))
        print(f"web_service.py: reloaded, {path} ({model.precision})", file=sys.stderr)
        service.metrics.reloads.labels("reloaded").inc()
        return True

    def retire(self, served):
        """Lets go of a model's memory when its last request is answered."""

        async def close():
            await served.close()
            await asyncio.sleep(1)  # in which the last answers are made
            del self.retiring[served]
            asyncio.get_running_loop().call_soon(give_back_memory)

        self.retiring[served] = asyncio.get_running_loop().create_task(close())

    def is_stuck(self, seconds):
        """Whether an engine hangs. One that was closed has no batch any more."""
        if self.service.served.scheduler.is_stuck(seconds):
            return True
        return any(served.scheduler.hangs(seconds) for served in self.retiring)

    async def follow(self, orders, sign):
        """Does what every line of JSON says, one after the other, and gives a sign of what became of the model."""
        reader = asyncio.StreamReader(limit=1 << 24)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), orders)
        while line := await reader.readline():
            order = json.loads(line)
            if "refused" in order:  # by the supervisor, which has said why
                self.service.metrics.reloads.labels("refused").inc()
                continue
            self.take_access(order["allowed"])
            sign(supervisor.TAKEN if await self.take_model(order["config"]) else supervisor.REFUSED)


async def serve(start, sign, orders):
    """Loads the model, opens the ports, gives a first sign of life, and answers until SIGTERM or SIGINT.

    Args: start: {config, allowed, restarts}. sign: function that is called twice a second: the supervisor ends a worker
    that is silent. orders: binary file; lines of JSON with other settings come from it.
    """
    set_up_logs()
    config, allowed, metrics = start["config"], start["allowed"], Metrics(start["restarts"])
    service, stopping = Service(load(config), config, access.Tokens(allowed["tokens"]), metrics), asyncio.Event()
    await service.served.check()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    running = [await fronts.start_rpc(service, config, allowed)]
    if config["http_port"]:
        running.append(await fronts.start_http(service, config, allowed))
    reloader = Reloader(service, running)
    following = loop.create_task(reloader.follow(orders, sign))
    sign()
    while not stopping.is_set():
        if not reloader.is_stuck(service.timeout + 30) and not following.done():
            sign()
        try:
            await asyncio.wait_for(stopping.wait(), 0.5)
        except asyncio.TimeoutError:
            continue
    service.closing = True
    grace = config["grace_ms"] / 1000
    await asyncio.gather(*(front.stop(grace) for front in running))


if __name__ == "__main__":
    cli.run(try_out)
