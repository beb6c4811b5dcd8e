"""The fronts of the service, gRPC and HTTP: both parse a request, pass it to Service.answer, and send the response.

Paddle Serving's own fronts are not used: they bind every interface, unpickle tensors sent by clients, set no limits,
and return HTTP 200 even for errors. Its operators, queues and messages are used (worker.py, protocol.py).
"""

import json
from concurrent import futures

import flask
import grpc
import waitress.channel
import waitress.server
import waitress.task

import protocol
from protocol import BAD_INPUT, NO_SERVICE, NOT_IMPLEMENTED, OK, UNKNOWN, ServiceError

# Extra threads, so that requests beyond worker_num are rejected at once instead of waiting for a thread.
SPARE_THREADS = 8


def rpc_server(service, config):
    """Returns: a gRPC server for Paddle Serving's pipeline service; the caller starts it."""

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

    # No deserializer here: inference() parses the message, so that it can reply to a malformed one.
    handler = grpc.unary_unary_rpc_method_handler(
        inference, response_serializer=protocol.messages().Response.SerializeToString
    )
    name, method = protocol.METHOD.strip("/").split("/")
    server = grpc.server(
        futures.ThreadPoolExecutor(config["worker_num"] + SPARE_THREADS),
        handlers=[grpc.method_handlers_generic_handler(name, {method: handler})],
        options=[("grpc.max_receive_message_length", config["max_body_bytes"]), ("grpc.so_reuseport", 0)],
    )
    server.add_insecure_port(protocol.authority(config["host"], config["rpc_port"]))
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
            description = {
                "task": service.model.record["task"],
                "classes": service.model.labels,
                "pairs": service.model.pairs,
                "precision": service.model.precision,
                "max_seq_length": service.model.longest,
            }
            del response.key[:], response.value[:]
            response.key.extend(description)
            response.value.extend(json.dumps(value, ensure_ascii=False) for value in description.values())
        return reply(response)

    @app.errorhandler(Exception)
    def error(problem):
        status = getattr(problem, "code", None) or 500
        by_status = {
            404: (NO_SERVICE, f"no such path; there are /{protocol.SERVICE}/prediction and /{protocol.SERVICE}/health"),
            405: (NOT_IMPLEMENTED, "POST to prediction, GET health"),
        }
        err_no, message = by_status.get(status, (UNKNOWN if status >= 500 else BAD_INPUT, f"HTTP status {status}"))
        return reply(protocol.messages().Response(err_no=err_no, err_msg=message), status=status)

    return app


class JsonErrorTask(waitress.task.ErrorTask):
    """Error reply in the service's JSON form to requests that waitress itself rejects, such as too large a body."""

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
        asyncore_use_poll=True,  # select() is limited to 1024 file descriptors
        max_request_body_size=config["max_body_bytes"] + 1,  # waitress also rejects a body of exactly this size
        channel_timeout=seconds,  # closes connections whose client sends nothing
        cleanup_interval=seconds,
        ident=None,
    )


def unanswered(http):
    """Whether waitress has unanswered requests or unsent responses."""
    return any(channel.requests or channel.total_outbufs_len for channel in list(http.active_channels.values()))
