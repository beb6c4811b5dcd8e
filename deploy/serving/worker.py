"""The worker process, started by web_service.py: runs the model in Paddle Serving's pipeline behind gRPC and HTTP.

fronts.py (RPC, HTTP) -> Service -> TextRequestOp -> PPMiniLMOp (tokenizes, runs waiting requests as a batch) -> answer
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import fronts
import numpy as np
import protocol
from common import batching, checkpoints, cli, compat, engine
from protocol import BAD_INPUT, OK, TIMEOUT, UNAVAILABLE, UNKNOWN, ServiceError

pipeline = compat.paddle_serving()
log = logging.getLogger("ppminilm")

# Batch sizes that are run. oneDNN prepares its operators for every new shape: this takes many times as long as a run
# and copies the weights. So only these batch sizes are used, and each of them is run once before the ports open.
ROWS = {"cpu": (8, 4, 2, 1), "gpu": (32, 16, 8, 4, 2, 1)}
# Fixed cost of a run, expressed in tokens. Measured with 6 layers in INT8: 5 to 6 ms per run and 0.13 ms per token.
RUN_COST = 48


def padded_lengths(longest):
    """Sequence lengths to which texts are padded, ascending: few enough to prepare them all, with little padding."""
    steps = [*range(16, 64, 16), *range(64, 256, 32), *range(256, longest, 64)]
    return [length for length in steps if length < longest] + [longest]


class Model:
    """The exported model, with the interface of Paddle Serving's local service handler."""

    def __init__(self, path, device, precision, threads, use_trt=False):
        graph = checkpoints.open_graph(path, "--model")
        self.record, self.tokenizer = graph.record, graph.tokenizer()
        self.precision = precision or engine.default_precision(graph.prefix)
        self.objective, self.labels = graph.objective, self.record["labels"]
        self.pairs = bool(self.record["data"]["dev"].get("pairs"))
        self.longest = self.record["arguments"]["max_seq_length"]
        self.rows, self.lengths = ROWS[device.partition(":")[0]], padded_lengths(self.longest)
        ids = [self.tokenizer.cls_id] + [self.tokenizer.sep_id] * (self.longest - 1)
        shapes = [batching.Feature(ids[:n], [0] * n, None) for n in self.lengths for _ in range(self.rows[0])]
        # TensorRT collects its shape ranges from the largest batches and one single row.
        options = device, self.precision, threads, use_trt, self.rows[0], self.tokenizer.pad_id
        self.engine = engine.open_engine(graph.prefix, [*shapes, shapes[-1]], *options)
        self.last_run = time.monotonic()

    def prepare(self):
        """Runs one batch of every shape, so that oneDNN prepares its operators."""
        for length in self.lengths:
            for rows in self.rows:
                ids = np.full((rows, length), self.tokenizer.sep_id)
                self.run_once(ids, np.zeros_like(ids))

    def run_once(self, input_ids, token_type_ids):
        """Logits of one batch. Args: int64 arrays [rows, length] of a prepared shape."""
        logits = self.engine.run(batching.Batch(input_ids, token_type_ids, None, None))
        self.last_run = time.monotonic()
        return logits

    def prepare_server(self):
        return None

    def get_port_list(self):
        return []

    get_fetch_list = get_client_config = get_port_list

    def get_client(self, concurrency_idx):
        return self

    def tokenize(self, query):
        """(input_ids, token_type_ids, truncated) of a Query: two int64 arrays [texts, longest] and a list of bool.

        Raises: ServiceError for a text without tokens, such as an empty one.
        """
        encoded = self.tokenizer.encode(query.texts, query.pairs, self.longest + 1)
        truncated = [len(ids) > self.longest for ids, _ in encoded]
        for i in np.flatnonzero(truncated):
            encoded[i] = self.tokenizer.encode(
                [query.texts[i]], [query.pairs[i]] if query.pairs else None, self.longest
            )[0]
        for number, (_, types) in enumerate(encoded, 1):
            if types.count(0) < 3 or (self.pairs and types.count(1) < 2):  # only [CLS] and [SEP]
                raise ServiceError(BAD_INPUT, f"text {number} is empty")
        features = [batching.Feature(ids, types, None) for ids, types in encoded]
        return *self.arrays(features), truncated

    def arrays(self, features):
        batch = batching.collate(features, range(len(features)), self.tokenizer.pad_id, self.longest)
        return batch.input_ids, batch.token_type_ids

    def run(self, input_ids, token_type_ids):
        """Logits, float32 [texts, classes], of padded int64 arrays [texts, longest], split into the cheapest runs."""
        tokens = input_ids.shape[1] - (input_ids[:, ::-1] != self.tokenizer.pad_id).argmax(1)
        order = np.argsort(tokens, kind="stable")
        lengths = [self.lengths[i] for i in np.searchsorted(self.lengths, tokens[order])]
        # cheapest[n]: (lowest cost of the n shortest texts, batch size of the run with the longest of them).
        cheapest = [(0, 0)]
        for n, length in enumerate(lengths, 1):
            cheapest.append(
                min((cheapest[n - rows][0] + RUN_COST + rows * length, rows) for rows in self.rows if rows <= n)
            )
        logits, n = np.empty((len(input_ids), len(self.labels)), "float32"), len(lengths)
        while n:
            rows, length = cheapest[n][1], lengths[n - 1]
            chosen = order[n - rows : n]
            ids, types = (np.ascontiguousarray(side[chosen, :length]) for side in (input_ids, token_type_ids))
            logits[chosen] = self.run_once(ids, types)
            n -= rows
        return logits


class TextRequestOp(pipeline.RequestOp):
    """Passes on the Query that the front has parsed. Paddle Serving's RequestOp would unpickle tensors of clients."""

    def unpack_request_package(self, query):
        return {"query": query}, query.logid, None, ""


class PPMiniLMOp(pipeline.Op):
    """Tokenizes, runs the model on the waiting requests, and returns logits, and what the objective makes of them."""

    def __init__(self, request_op, model):
        super().__init__(
            name=protocol.SERVICE, input_ops=[request_op], client_type="local_predictor", local_service_handler=model
        )
        self.model = model

    def init_client(self, client_config, server_endpoints):
        """Prepares all shapes in the thread that runs the model: oneDNN caches prepared operators per thread."""
        self.model.prepare()
        return self.model

    def _auto_batching_generator(self, input_channel, op_name, batch_size, timeout, op_info_prefix):
        """Yields lists of waiting requests with at most batch_size texts in total, or one larger request.

        A single request is passed on at once; no timer runs while the service is idle. Large requests are not
        merged, so that each is answered as soon as possible.
        """
        held = None
        while True:
            batch = [held or input_channel.front(op_name)]
            held, texts_in = None, self.count(batch[0])
            while input_channel.size():
                held = input_channel.front(op_name)
                texts_in += self.count(held)
                if texts_in > batch_size:
                    break
                batch.append(held)
                held = None
            yield batch

    @staticmethod
    def count(waiting):
        """The number of texts of a request in the channel."""
        (request,) = waiting.values()
        return len(request.dictdata["query"].texts)

    def preprocess(self, input_dicts, data_id=0, log_id=0):
        (request,) = input_dicts.values()
        if time.monotonic() > request["query"].expires:
            return None, False, TIMEOUT, "the service is too busy: the request waited longer than its time limit"
        try:
            input_ids, token_type_ids, request["truncated"] = self.model.tokenize(request["query"])
        except ServiceError as error:
            return None, False, error.err_no, str(error)
        return {"input_ids": input_ids, "token_type_ids": token_type_ids}, False, None, ""

    def process(self, feed_batch, typical_logid=0):
        return {"logits": self.model.run(**feed_batch[0])}, OK, ""

    def postprocess(self, input_data, fetch_data, data_id=0, log_id=0):
        (request,) = input_data.values()
        logits = fetch_data["logits"]
        answer = {
            **self.model.objective.columns(logits, self.model.labels),
            # Nine significant digits identify every float32 value.
            "logits": [[float(f"{value:.9g}") for value in row] for row in logits],
            "classes": self.model.labels,
            "truncated": request["truncated"],
            "objective": self.model.objective.describe(),
        }
        return {key: json.dumps(value, ensure_ascii=False) for key, value in answer.items()}, None, ""


class Service:
    """Answers the requests of both fronts: enforces the limits, calls the pipeline and writes the log."""

    def __init__(self, model, config):
        self.model, self.config, self.closing = model, config, False
        self.timeout = config["timeout_ms"] / 1000
        self.running, self.lock = {}, threading.Lock()  # {running request: its arrival time}
        op = PPMiniLMOp(TextRequestOp(), model)
        op.init_from_dict({"timeout": -1, "auto_batching_timeout": -1, **config["op"][protocol.SERVICE]})
        graph = {"retry": 1, "use_profile": False, "channel_size": 0, "channel_recv_frist_arrive": False}
        graph.update(config["dag"], tracer={"interval_s": -1})
        server = {"worker_num": config["worker_num"], "build_dag_each_worker": False, "dag": graph}
        self.pipeline = pipeline.DAGExecutor(pipeline.ResponseOp(input_ops=[op]), server, -1)
        self.pipeline.start()
        ready = "text_pair" if model.pairs else "text"
        self.health_fields = dict.fromkeys(("text", ready), model.labels[0])
        query = protocol.read_query(self.health_fields, 0, float("inf"), model.pairs, 1)
        response = self.pipeline.call(query)
        if response.err_no:
            raise RuntimeError(f"the model gave no answer: {response.err_msg}; see {config['log_dir']}")

    def answer(self, front, read):
        """Returns: the Response. Args: front: its name in the log. read: function that returns (fields, logid)."""
        start, logid, count = time.monotonic(), 0, 0
        response = protocol.messages().Response()
        key = object()
        try:
            with self.lock:
                if self.closing or len(self.running) >= self.config["worker_num"]:
                    why = "is stopping" if self.closing else "has too many requests waiting"
                    raise ServiceError(UNAVAILABLE, f"the service {why}; try again")
                self.running[key] = start
            fields, logid = read()
            query = protocol.read_query(fields, logid, start + self.timeout, self.model.pairs, self.config["max_texts"])
            count = len(query.texts)
            response = self.pipeline.call(query)
        except ServiceError as error:
            response.err_no, response.err_msg = error.err_no, str(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]  # not the message: it may quote the request
            log.error("logid %d: %s, %s:%d", logid, type(error).__name__, place.filename, place.lineno)
            response.err_no = UNKNOWN
        finally:
            self.running.pop(key, None)
        if response.err_no == UNKNOWN:  # Paddle Serving's message would reveal methods and data
            response.err_msg = "the service failed to answer this request"
        milliseconds = 1000 * (time.monotonic() - start)
        log.info("%s logid %d: %d texts, %.1f ms, err_no %d", front, logid, count, milliseconds, response.err_no)
        return response


def set_up_logs():
    """Limits the size of Paddle Serving's log files, which it opens on import, and omits lines about queue entries."""
    logging.getLogger("paddle_serving_server").setLevel(logging.WARNING)
    logging.getLogger("waitress").setLevel(logging.ERROR)  # it warns whenever a request waits for a thread
    for handler in logging.getLogger().handlers:
        handler.maxBytes, handler.backupCount = 10_000_000, 4


def watch(service):
    """Ends the process when web_service.py is gone, or when requests wait but the model has not run for too long:
    it hangs, and they would never be answered."""
    while True:
        time.sleep(0.5)
        if os.getppid() != service.config["supervisor"]:
            os._exit(1)
        now = time.monotonic()
        oldest = min(list(service.running.values()), default=now)
        silent = now - max(oldest, service.model.last_run)
        if silent > service.timeout + 30:
            log.critical("requests are waiting, but the model has not run for %.0f s: ending this process", silent)
            os._exit(1)


def serve(config, ready):
    """Loads the model, opens the ports, calls ready(), and answers until SIGTERM or SIGINT."""
    set_up_logs()
    op = config["op"][protocol.SERVICE]["local_service_conf"]
    device = cli.set_device("cpu" if op["device_type"] == 0 else f"gpu:{op['devices'] or 0}")
    model = Model(op["model_config"], device, op["precision"], op["thread_num"], use_trt=op["device_type"] == 2)
    service = Service(model, config)
    rpc, http = fronts.rpc_server(service, config), fronts.http_server(service, config)

    def stop(*_):
        def drain():
            service.closing = True
            until = time.monotonic() + config["grace_ms"] / 1000
            rpc_done = rpc.stop(config["grace_ms"] / 1000)
            while time.monotonic() < until and (not rpc_done.is_set() or fronts.unanswered(http)):
                time.sleep(0.01)
            os._exit(0)

        threading.Thread(target=drain).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    threading.Thread(target=watch, args=(service,), daemon=True).start()
    rpc.start()
    ready()
    http.run()
