"""The process that holds the model: Paddle Serving's pipeline behind gRPC and HTTP. web_service.py starts it.

    front (RPC, HTTP): reads and checks -> TextRequestOp -> PPMiniLMOp: tokenizes, computes what waits together -> front

Paddle Serving's own fronts are not used: they bind every interface, unpickle tensors of the caller, set no limits,
and answer HTTP 200 whatever happened. Its operators, queues and messages are.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from concurrent import futures

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import compat  # noqa: F401  before Paddle

import flask
import grpc
import numpy as np
import waitress.channel
import waitress.server
import waitress.task

import data
import engine
import protocol
import texts
import tokenization
import utils
from protocol import BAD_INPUT, NO_SERVICE, NOT_IMPLEMENTED, OK, TIMEOUT, UNAVAILABLE, UNKNOWN, ServiceError

pipeline = compat.paddle_serving()
log = logging.getLogger("ppminilm")

# Rows of a batch. A oneDNN operator is prepared anew for every shape, which takes many times as long as running it
# and keeps a copy of the weights, so only these are run, each once before the ports open.
ROWS = {"cpu": (8, 4, 2, 1), "gpu": (32, 16, 8, 4, 2, 1)}
# What a run costs beyond its rows x length tokens, in tokens: 6 layers in INT8 took 5 to 6 ms and 0.13 ms a token.
RUN_COST = 48
# For requests beyond worker_num: they are refused, and that must not wait for a thread.
SPARE_THREADS = 8


def padded_lengths(longest):
    """The sequence lengths that are run, ascending: few enough to be prepared, close enough to waste little."""
    steps = [*range(16, 64, 16), *range(64, 256, 32), *range(256, longest, 64)]
    return [length for length in steps if length < longest] + [longest]


class Model:
    """The exported model, in the place where Paddle Serving's operator expects a local service handler."""

    def __init__(self, path, device, precision, threads, use_trt=False):
        prefix = engine.find_prefix(path, "--model")
        self.record = engine.open_exported(prefix)
        self.precision = precision or engine.default_precision(prefix)
        self.labels, self.pairs = self.record["labels"], bool(self.record["data"]["dev"].get("pairs"))
        self.longest = self.record["arguments"]["max_seq_length"]
        self.tokenizer = tokenization.load_tokenizer(os.path.dirname(os.path.abspath(prefix)))
        self.rows, self.lengths = ROWS[device.partition(":")[0]], padded_lengths(self.longest)
        ids = [self.tokenizer.cls_id] + [self.tokenizer.sep_id] * (self.longest - 1)
        shapes = [data.Feature(ids[:n], [0] * n, None) for n in self.lengths for _ in range(self.rows[0])]
        self.engine = engine.open_engine(  # which learns TensorRT's ranges from batches of most rows, and one of one
            prefix, [*shapes, shapes[-1]], device, self.precision, threads, use_trt, self.rows[0], self.tokenizer.pad_id
        )
        self.last_run = time.monotonic()

    def prepare(self):
        """Runs every shape once."""
        for length in self.lengths:
            for rows in self.rows:
                ids = np.full((rows, length), self.tokenizer.sep_id)
                self.run_once(ids, np.zeros_like(ids))

    def run_once(self, input_ids, token_type_ids):
        """Logits of one batch of a prepared shape, int64 [rows, length]."""
        logits = self.engine.run(data.Batch(input_ids, token_type_ids, None, None))
        self.last_run = time.monotonic()
        return logits

    def prepare_server(self):
        return None

    def get_port_list(self):
        return []

    get_fetch_list = get_client_config = get_port_list

    def get_client(self, concurrency_idx):
        return self

    def encode(self, query):
        """(input_ids, token_type_ids, truncated) of a Query: int64 [texts, longest] twice, and a list of bool.

        Raises: ServiceError for a text of which no token is left, such as an empty one.
        """
        encoded = self.tokenizer.encode(query.texts, query.pairs, self.longest + 1)
        truncated = [len(ids) > self.longest for ids, _ in encoded]
        for i in np.flatnonzero(truncated):
            encoded[i] = self.tokenizer.encode(
                [query.texts[i]], [query.pairs[i]] if query.pairs else None, self.longest
            )[0]
        for number, (_, types) in enumerate(encoded, 1):
            if types.count(0) < 3 or (self.pairs and types.count(1) < 2):  # no more than [CLS], [SEP]
                raise ServiceError(BAD_INPUT, f"text {number} is empty")
        features = [data.Feature(ids, types, None) for ids, types in encoded]
        return *self.arrays(features), truncated

    def arrays(self, features):
        batch = data.collate(features, range(len(features)), self.tokenizer.pad_id, self.longest)
        return batch.input_ids, batch.token_type_ids

    def run(self, input_ids, token_type_ids):
        """Logits, float32 [texts, classes], of padded int64 [texts, longest] arrays, in runs that cost the least."""
        tokens = input_ids.shape[1] - (input_ids[:, ::-1] != self.tokenizer.pad_id).argmax(1)
        order = np.argsort(tokens, kind="stable")
        lengths = [self.lengths[i] for i in np.searchsorted(self.lengths, tokens[order])]
        # cheapest[n]: (cost of the n shortest texts, rows of the last run among them); its last row is the longest.
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
    """Hands on what the front has read. Paddle Serving's own unpickles what a caller sends as a tensor."""

    def unpack_request_package(self, query):
        return {"query": query}, query.logid, None, ""


class PPMiniLMOp(pipeline.Op):
    """Tokenizes, runs the model on the requests that wait, and tells labels, probabilities and logits."""

    def __init__(self, request_op, model):
        super().__init__(
            name=protocol.SERVICE,
            input_ops=[request_op],
            client_type="local_predictor",
            local_service_handler=model,
        )
        self.model = model

    def init_client(self, client_config, server_endpoints):
        """Prepares the shapes, here because oneDNN keeps what it prepared for the thread that ran it."""
        self.model.prepare()
        return self.model

    def _auto_batching_generator(self, input_channel, op_name, batch_size, timeout, op_info_prefix):
        """Yields what waits, at most batch_size texts or one request: a lone one at once, without a timer that ticks
        while idle, and many large ones not all together, so that each is answered as soon as it can be."""
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
            input_ids, token_type_ids, request["truncated"] = self.model.encode(request["query"])
        except ServiceError as error:
            return None, False, error.err_no, str(error)
        return {"input_ids": input_ids, "token_type_ids": token_type_ids}, False, None, ""

    def process(self, feed_batch, typical_logid=0):
        return {"logits": self.model.run(**feed_batch[0])}, OK, ""

    def postprocess(self, input_data, fetch_data, data_id=0, log_id=0):
        (request,) = input_data.values()
        logits = fetch_data["logits"]
        answer = {
            "labels": [self.model.labels[i] for i in logits.argmax(-1)],
            "probabilities": [[round(p, 6) for p in row] for row in texts.probabilities(logits).tolist()],
            # Nine digits tell every float32 from its neighbours.
            "logits": [[float(f"{value:.9g}") for value in row] for row in logits],
            "classes": self.model.labels,
            "truncated": request["truncated"],
        }
        return {key: json.dumps(value, ensure_ascii=False) for key, value in answer.items()}, None, ""


class Service:
    """What both fronts call: limits, the pipeline, the log."""

    def __init__(self, model, config):
        self.model, self.config, self.closing = model, config, False
        self.timeout = config["timeout_ms"] / 1000
        self.running, self.lock = {}, threading.Lock()  # when each request that is being answered came
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
        """The Response to a request. Args: front: its name in the log. read: a function that gives (fields, logid)."""
        came, logid, count = time.monotonic(), 0, 0
        response = protocol.messages().Response()
        key = object()
        try:
            with self.lock:
                if self.closing or len(self.running) >= self.config["worker_num"]:
                    why = "is stopping" if self.closing else "has too many requests waiting"
                    raise ServiceError(UNAVAILABLE, f"the service {why}; try again")
                self.running[key] = came
            fields, logid = read()
            query = protocol.read_query(fields, logid, came + self.timeout, self.model.pairs, self.config["max_texts"])
            count = len(query.texts)
            response = self.pipeline.call(query)
            if response.err_no == UNKNOWN:  # its own words name methods and data
                response.err_msg = "the service failed to answer this request"
        except ServiceError as error:
            response.err_no, response.err_msg = error.err_no, str(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]  # and not its message, which may quote the request
            log.error("logid %d: %s, %s:%d", logid, type(error).__name__, place.filename, place.lineno)
            response.err_no, response.err_msg = UNKNOWN, "the service failed to answer this request"
        finally:
            self.running.pop(key, None)
        milliseconds = 1000 * (time.monotonic() - came)
        log.info("%s logid %d: %d texts, %.1f ms, err_no %d", front, logid, count, milliseconds, response.err_no)
        return response


def rpc_server(service, config):
    """The gRPC server of Paddle Serving's pipeline service, not started."""

    def inference(request, context):
        def read():
            message = protocol.messages().Request()
            try:
                message.ParseFromString(request)
            except Exception as error:  # DecodeError, or UnicodeDecodeError for a string that is not UTF-8
                raise ServiceError(
                    BAD_INPUT, "not a request of Paddle Serving, or its strings are not UTF-8"
                ) from error
            return protocol.fields_of_message(message), message.logid

        return service.answer("rpc", read)

    # The message is parsed above, where a damaged one can be answered.
    handler = grpc.unary_unary_rpc_method_handler(
        inference, response_serializer=protocol.messages().Response.SerializeToString
    )
    name, method = protocol.METHOD.strip("/").split("/")
    server = grpc.server(
        futures.ThreadPoolExecutor(config["worker_num"] + SPARE_THREADS),
        handlers=[grpc.method_handlers_generic_handler(name, {method: handler})],
        options=[("grpc.max_receive_message_length", config["max_body_bytes"]), ("grpc.so_reuseport", 0)],
    )
    host = f"[{config['host']}]" if ":" in config["host"] else config["host"]
    server.add_insecure_port(f"{host}:{config['rpc_port']}")
    return server


def http_app(service, config):
    """The Flask application: POST /ppminilm/prediction, GET /ppminilm/health."""
    app = flask.Flask("ppminilm")

    def reply(response, in_message_form=False, status=None):
        status = status or protocol.HTTP_STATUS.get(response.err_no, 500)
        return flask.Response(protocol.body_of(response, in_message_form), status, mimetype="application/json")

    @app.post(f"/{protocol.SERVICE}/prediction")
    def prediction():
        in_message_form = False

        def read():
            nonlocal in_message_form
            fields, logid, in_message_form = protocol.fields_of_body(flask.request.get_data(cache=False))
            return fields, logid

        return reply(service.answer("http", read), in_message_form)

    @app.get(f"/{protocol.SERVICE}/health")
    def health():
        response = service.answer("health", lambda: (service.health_fields, 0))
        if response.err_no == OK:
            said = {
                "task": service.model.record["task"],
                "classes": service.model.labels,
                "pairs": service.model.pairs,
                "precision": service.model.precision,
                "max_seq_length": service.model.longest,
            }
            del response.key[:], response.value[:]
            response.key.extend(said)
            response.value.extend(json.dumps(value, ensure_ascii=False) for value in said.values())
        return reply(response)

    @app.errorhandler(Exception)
    def error(problem):
        status = getattr(problem, "code", None) or 500
        said = {
            404: (NO_SERVICE, f"no such path; there are /{protocol.SERVICE}/prediction and /{protocol.SERVICE}/health"),
            405: (NOT_IMPLEMENTED, "POST to prediction, GET health"),
        }
        err_no, message = said.get(status, (UNKNOWN if status >= 500 else BAD_INPUT, f"HTTP status {status}"))
        return reply(protocol.messages().Response(err_no=err_no, err_msg=message), status=status)

    return app


class JsonErrorTask(waitress.task.ErrorTask):
    """waitress's answer to what never reaches the application, such as too large a body, in the service's form."""

    def execute(self):
        error, limit = self.request.error, self.channel.adj.max_request_body_size - 1
        self.status = f"{error.code} {error.reason}"
        message = f"the body is larger than {limit} bytes" if error.code == 413 else f"{error.reason}: {error.body}"
        answer = protocol.messages().Response(err_no=BAD_INPUT, err_msg=message)
        body = protocol.body_of(answer, False)
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


def http_server(service, config):
    waitress.channel.HTTPChannel.error_task_class = JsonErrorTask
    seconds = int(service.timeout) + 1
    return waitress.server.create_server(
        http_app(service, config),
        host=config["host"],
        port=config["http_port"],
        threads=config["worker_num"] + SPARE_THREADS,
        connection_limit=1000,
        asyncore_use_poll=True,  # select() knows no more than 1024 files
        max_request_body_size=config["max_body_bytes"] + 1,  # it refuses this size itself
        channel_timeout=seconds,  # of a client that sends nothing
        cleanup_interval=seconds,
        ident=None,
    )


def unanswered(http):
    """Whether waitress has a request that is not answered, or an answer that is not sent."""
    return any(channel.requests or channel.total_outbufs_len for channel in list(http.active_channels.values()))


def set_up_logs():
    """Paddle Serving's log files, which it opens when it is imported, kept small and without a line per queue entry."""
    logging.getLogger("paddle_serving_server").setLevel(logging.WARNING)
    logging.getLogger("waitress").setLevel(logging.ERROR)  # it warns whenever a request waits for a thread
    for handler in logging.getLogger().handlers:
        handler.maxBytes, handler.backupCount = 10_000_000, 4


def watch(service):
    """Ends the process when web_service.py is gone, or when requests wait and the model has not run for long: they
    would wait for ever."""
    while True:
        time.sleep(0.5)
        if os.getppid() != service.config["supervisor"]:
            os._exit(1)
        now = time.monotonic()
        oldest = min(list(service.running.values()), default=now)
        silent = now - max(oldest, service.model.last_run)
        if silent > service.timeout + 30:
            log.critical("requests wait and nothing has happened for %.0f s: ending this process", silent)
            os._exit(1)


def serve(config, ready):
    """Loads the model, opens the ports, calls ready(), and answers until SIGTERM or SIGINT."""
    set_up_logs()
    op = config["op"][protocol.SERVICE]["local_service_conf"]
    device = utils.set_device("cpu" if op["device_type"] == 0 else f"gpu:{op['devices'] or 0}")
    model = Model(op["model_config"], device, op["precision"], op["thread_num"], use_trt=op["device_type"] == 2)
    service = Service(model, config)
    rpc, http = rpc_server(service, config), http_server(service, config)

    def stop(*_):
        def drain():
            service.closing = True
            until = time.monotonic() + config["grace_ms"] / 1000
            rpc_done = rpc.stop(config["grace_ms"] / 1000)
            while time.monotonic() < until and (not rpc_done.is_set() or unanswered(http)):
                time.sleep(0.01)
            os._exit(0)

        threading.Thread(target=drain).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    threading.Thread(target=watch, args=(service,), daemon=True).start()
    rpc.start()
    ready()
    http.run()
