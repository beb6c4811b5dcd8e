"""The service's two fronts: gRPC and HTTP. Both read a request, hand it to Service.answer, and send what that returns.

Paddle Serving's own fronts are not used: they bind every interface, unpickle tensors of the caller, set no limits,
and answer HTTP 200 whatever happened. Its operators, queues and messages are (worker.py, protocol.py).
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

# For requests beyond worker_num: they are refused, and that must not wait for a thread.
SPARE_THREADS = 8


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
