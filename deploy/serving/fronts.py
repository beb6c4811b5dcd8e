"""The fronts of the service, gRPC and HTTP, in one event loop: both parse a request, ask Service.answer, and reply.

Paddle Serving's own fronts are not used: they bind every interface, unpickle tensors sent by clients, set no limits,
and return HTTP 200 even for errors. Its operators and messages are used (worker.py, protocol.py).
"""

import asyncio

import grpc
import grpc.aio
from aiohttp import web, web_protocol

import access
import openapi
import protocol
from openapi import HEALTH, METHODS, METRICS, OPENAPI, PREDICTION
from protocol import BAD_INPUT, NO_SERVICE, NOT_IMPLEMENTED, OK, UNAUTHORIZED, UNKNOWN, Answer, ServiceError

YOUNG = 0.2  # seconds in which the event loop has read what a new connection sent, also when it is busy
MOST_PIPELINED = 32  # requests of one connection that wait for the reply to the one before
UNAUTHORIZED_ANSWER = Answer(UNAUTHORIZED, "unauthorized", {})  # the same words whatever is wrong: no hint


class RpcFront:
    """A gRPC server for Paddle Serving's pipeline service. Args: allowed: what access.read returns."""

    def __init__(self, server, config, allowed):
        self.server, self.fresh = server, None
        address = protocol.authority(config["host"], config["rpc_port"])
        if allowed["certificate"]:
            first = access.rpc_certificate(allowed)
            server.add_secure_port(address, grpc.dynamic_ssl_server_credentials(first, self.fetch_certificate))
        else:
            server.add_insecure_port(address)

    def fetch_certificate(self):
        """Called at the beginning of a connection, in a thread of gRPC. Returns: another certificate, or None."""
        fresh, self.fresh = self.fresh, None
        return fresh

    def take_certificate(self, allowed):
        """New connections get the certificate."""
        self.fresh = access.rpc_certificate(allowed)

    async def stop(self, grace):
        await self.server.stop(grace)


async def start_rpc(service, config, allowed):
    """Returns: an RpcFront that answers."""

    async def inference(request, context):
        if not service.tokens.allow(dict(context.invocation_metadata()).get("authorization")):
            service.metrics.refused("rpc", UNAUTHORIZED)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, UNAUTHORIZED_ANSWER.err_msg)

        def read():
            protocol.check_fields(request, 2 * limit_of_keys(config) + 8)
            message = protocol.messages().Request()
            try:
                message.ParseFromString(request)
            except Exception as error:  # DecodeError, or UnicodeDecodeError for a string that is not UTF-8
                raise ServiceError(
                    BAD_INPUT, "not a request of Paddle Serving, or its strings are not UTF-8"
                ) from error
            return protocol.fields_of_message(message), message.logid

        address = context.peer().rpartition(":")[0]  # ipv4:127.0.0.1:port
        return protocol.message_of(await service.answer("rpc", read, address, len(request)))

    # No deserializer here: inference() parses the message, so that it can reply to a malformed one.
    handler = grpc.unary_unary_rpc_method_handler(
        inference, response_serializer=protocol.messages().Response.SerializeToString
    )
    name, method = protocol.METHOD.strip("/").split("/")
    server = grpc.aio.server(
        handlers=[grpc.method_handlers_generic_handler(name, {method: handler})],
        options=[
            ("grpc.max_receive_message_length", config["max_body_bytes"]),
            ("grpc.so_reuseport", 0),
            # No compressed messages: kilobytes would unpack to hundreds of megabytes before their size is checked.
            ("grpc.compression_enabled_algorithms_bitset", 1),
            # More than there are places, so that one connection gets err_no 3001, and not silence.
            ("grpc.max_concurrent_streams", 2 * config["worker_num"]),
            ("grpc.max_metadata_size", config["max_header_bytes"]),
            # PINGs are answered, without a limit: gRPC's costs gigabytes in seconds, a GOAWAY for each one too many.
            ("grpc.http2.max_ping_strikes", 0),
            # Idle connections are closed, and those that hold streams without a message when they are old.
            ("grpc.max_connection_idle_ms", 60_000),
            ("grpc.max_connection_age_ms", 600_000),
            ("grpc.max_connection_age_grace_ms", config["timeout_ms"] + 1000),
            ("grpc.server_handshake_timeout_ms", config["request_ms"]),
        ],
    )
    front = RpcFront(server, config, allowed)
    await server.start()
    return front


def limit_of_keys(config):
    """Keys of one request in Paddle Serving's form, which may number its texts: one for each, and some to spare."""
    return config["max_texts"] + 8


class Handshake(asyncio.Protocol):
    """A connection before its TLS handshake is over. It counts like any other, and can be closed like any other."""

    busy = whole = False

    def __init__(self, front, make):
        self.front, self.make, self.early = front, make, b""

    def connection_made(self, transport):
        self.raw, self.since = transport, asyncio.get_running_loop().time()
        self.address = (transport.get_extra_info("peername") or ("",))[0]
        self.front.opened(self)
        self.task = asyncio.get_running_loop().create_task(self.shake_hands())

    async def shake_hands(self):
        """Puts a Connection in the place of this one."""
        try:
            tls = await asyncio.get_running_loop().start_tls(
                self.raw, self, self.front.tls, server_side=True, ssl_handshake_timeout=self.front.seconds
            )
        except (OSError, asyncio.TimeoutError):  # ssl.SSLError among them: what came is no handshake
            self.abort()
            return
        finally:
            self.front.connections.discard(self)
        connection = self.make()
        tls.set_protocol(connection)
        connection.connection_made(tls)
        if self.early:
            connection.data_received(self.early)

    def data_received(self, data):
        """What came with the end of the handshake."""
        self.early += data

    def connection_lost(self, error):
        self.front.connections.discard(self)

    def abort(self):
        self.raw.abort()


class Connection(web_protocol.RequestHandler):
    """One HTTP connection: a request has to be whole in time and its head small; every reply is JSON of the service."""

    def __init__(self, front, **options):
        super().__init__(front.server, **options)
        self.front, self.deadline, self.address = front, None, ""
        self.head, self.busy, self.whole, self.surplus = b"", False, False, 0
        self.received, self.too_large = 0, False  # bytes of the request, chunk sizes and all; whether they are too many
        self.since = self._loop.time()

    def connection_made(self, transport):
        super().connection_made(transport)
        self.raw = transport  # aiohttp forgets it when it closes, though there may be something left to send
        self.address = (transport.get_extra_info("peername") or ("",))[0]
        self.await_request()
        self.front.opened(self)

    def connection_lost(self, error):
        super().connection_lost(error)
        self.front.connections.discard(self)
        if self.deadline:
            self.deadline.cancel()

    def await_request(self):
        """From now on there is time for one whole request, its reply included if the client is slow to read it."""
        if self.deadline:
            self.deadline.cancel()
        self.head, self.surplus, self.since = b"", 0, self._loop.time()
        self.received, self.too_large = 0, False
        self.deadline = self._loop.call_later(self.front.seconds, self.abort)

    def abort(self):
        self.raw.abort()

    def data_received(self, data):
        if self.whole:  # the client does not wait for its reply: there is no need to keep much of what it sends
            self.surplus += len(data)
            if self.surplus > self.front.max_head:
                self.abort()
                return
        elif self.head is not None and not self.busy:
            self.head = (self.head + data[: self.front.max_head + 1]).lstrip(b"\r\n")
            if b"\r\n\r\n" in self.head[: self.front.max_head + 4]:
                self.head = None  # all there; the body has a limit of its own
            elif len(self.head) > self.front.max_head:
                answer = Answer(BAD_INPUT, f"the head is larger than {self.front.max_head} bytes", {})
                self.front.service.metrics.refused("http", BAD_INPUT)
                self.raw.write(raw_reply(431, "Request Header Fields Too Large", answer))
                self.close_after_reply()
                return
        self.received += len(data)
        if self.busy and not self.whole and self.received > self.front.max_received:
            # Chunks of one byte take six on the way, and their parsing 40 times as long as those bytes in one piece.
            self.too_large = True
            self._current_request.content.set_exception(web.RequestPayloadError("too large"))
            return
        super().data_received(data)
        if len(self._messages) > MOST_PIPELINED:
            self.abort()
        elif self._messages and self._current_request and isinstance(self._messages[-1][0], web_protocol._ErrInfo):
            # What came is not the rest of the body that is being read: aiohttp would wait for it all the same.
            self._current_request.content.set_exception(web.RequestPayloadError("malformed"))

    def close_after_reply(self):
        self.raw.close()
        self.force_close()

    def handle_error(self, request, status=500, exc=None, message=None):
        """The reply to what aiohttp itself refuses."""
        err_no = BAD_INPUT if status < 500 else UNKNOWN
        self.front.service.metrics.refused("http", err_no)
        reply = json_reply(Answer(err_no, f"HTTP status {status}: no HTTP request that this service takes", {}), status)
        reply.force_close()
        return reply


def raw_reply(status, reason, answer):
    body = protocol.body_of(answer)
    lines = [f"HTTP/1.1 {status} {reason}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("ascii") + body


def json_reply(answer, status=None, in_message_form=False):
    status = status or protocol.HTTP_STATUS.get(answer.err_no, 500)
    return web.Response(body=protocol.body_of(answer, in_message_form), status=status, content_type="application/json")


class HttpFront:
    """The HTTP routes, which openapi.py describes."""

    def __init__(self, service, config, allowed):
        self.service, self.config = service, config
        self.seconds, self.max_head = config["request_ms"] / 1000, config["max_header_bytes"]
        self.max_received = config["max_body_bytes"] + 2 * self.max_head
        self.connections, self.trimming, self.listener = set(), False, None
        self.tls = access.server_context(allowed)
        self.server = web.Server(self.handle, handler_cancellation=True)

    def opened(self, connection):
        """Counts a new connection. If there are too many, those that have been without a whole request for the longest
        time are closed: slow clients cannot keep others out. Not at once, as a request may be just arriving."""
        self.connections.add(connection)
        if len(self.connections) > 4 * self.config["max_connections"]:
            self.close_oldest(self.connections, 4 * self.config["max_connections"], youngest=0.0)
        else:
            self.trim_soon()

    def trim_soon(self):
        if not self.trimming:
            self.trimming = True
            asyncio.get_running_loop().call_later(YOUNG, self.trim)

    def trim(self):
        self.trimming, of_address = False, {}
        for connection in self.connections:
            of_address.setdefault(connection.address, []).append(connection)
        for connections in of_address.values():
            self.close_oldest(connections, self.config["max_connections_per_address"])
        self.close_oldest(self.connections, self.config["max_connections"])
        if len(self.connections) > self.config["max_connections"]:  # some were too young
            self.trim_soon()

    def close_oldest(self, connections, most, youngest=YOUNG):
        """Closes as many of the connections as are more than ``most``, but none that is younger than that: it may have
        sent a request that the event loop has not come to yet."""
        before = asyncio.get_running_loop().time() - youngest
        idle = sorted((c for c in connections if not c.whole and c.since <= before), key=lambda one: one.since)
        for connection in idle[: max(0, len(connections) - most)]:
            self.connections.discard(connection)
            connection.abort()

    async def start(self):
        loop = asyncio.get_running_loop()
        options = {"loop": loop, "access_log": None, "keepalive_timeout": 3600.0, "lingering_time": 0}
        options["auto_decompress"] = False  # what a few kilobytes unpack to would be known too late
        limits = {"max_line_size": 1024, "max_field_size": self.max_head}

        def connection():
            return Connection(self, **options, **limits)

        self.listener = await loop.create_server(
            lambda: Handshake(self, connection) if self.tls else connection(),
            self.config["host"],
            self.config["http_port"],
            backlog=1024,
        )

    def take_certificate(self, allowed):
        """New connections get the certificate."""
        self.tls = access.server_context(allowed)

    async def stop(self, grace):
        """Takes no more connections; waits for the replies that are being made, at most for ``grace`` seconds."""
        self.listener.close()
        until = asyncio.get_running_loop().time() + grace
        while asyncio.get_running_loop().time() < until:
            if not any(one.busy or one.raw.get_write_buffer_size() for one in self.connections):
                break
            await asyncio.sleep(0.01)
        await self.server.shutdown(0.1)

    async def handle(self, request):
        connection = request.protocol
        connection.busy = True
        try:
            return await self.reply_to(request, connection)
        finally:
            connection.busy = connection.whole = False
            connection.await_request()

    async def reply_to(self, request, connection):
        """The reply to a request whose head is there."""
        path = request.raw_path.partition("?")[0]  # as it was sent, not decoded
        if path not in openapi.WITHOUT_TOKEN and not self.service.tokens.allow(request.headers.get("Authorization")):
            reply = self.refusal(401, UNAUTHORIZED_ANSWER.err_no, UNAUTHORIZED_ANSWER.err_msg)
            reply.headers["WWW-Authenticate"] = "Bearer"
            return reply
        if path not in METHODS:
            return self.refusal(404, NO_SERVICE, f"no such path; there are {', '.join(METHODS)}")
        if request.method != METHODS[path]:
            return self.refusal(405, NOT_IMPLEMENTED, "POST to prediction, GET the others")
        if path != PREDICTION:
            connection.whole = True
            connection.deadline.cancel()
            return await self.get(path)
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            return self.refusal(415, BAD_INPUT, "compressed bodies are not taken")
        limit = self.config["max_body_bytes"]
        if (request.content_length or 0) > limit:
            return self.refusal(413, BAD_INPUT, f"the body is larger than {limit} bytes")
        if request.headers.get("Expect", "").lower() == "100-continue":
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = bytearray()
        try:
            async for part in request.content.iter_any():
                body += part
                if len(body) > limit:
                    return self.refusal(413, BAD_INPUT, f"the body is larger than {limit} bytes")
        except web.RequestPayloadError:
            if connection.too_large:
                return self.refusal(413, BAD_INPUT, f"the body and its chunk sizes are larger than {limit} bytes")
            return self.refusal(400, BAD_INPUT, "the body is malformed")
        in_message_form = False

        def read():
            nonlocal in_message_form
            fields, logid, in_message_form = protocol.fields_of_body(bytes(body), limit_of_keys(self.config))
            return fields, logid

        connection.whole = True
        connection.deadline.cancel()  # all is there; for the answer there is timeout_ms
        answer = await self.service.answer("http", read, connection.address, len(body))
        return json_reply(answer, in_message_form=in_message_form)

    async def get(self, path):
        """The reply to a request without a body."""
        service = self.service
        if path == HEALTH:
            return await self.health()
        if path == METRICS:
            body, content_type = service.metrics.text()
            return web.Response(body=body, headers={"Content-Type": content_type})
        if path == OPENAPI:
            with_tokens = bool(service.tokens.hashes)
            return web.json_response(openapi.document(service.served.model, service.config, with_tokens))
        return json_reply(Answer(OK, "", {}))  # it lives

    async def health(self):
        served = self.service.served
        answer = await self.service.answer("health", lambda: (served.health_fields, 0), "")
        if answer.err_no == OK:
            description = {
                "task": served.model.record["task"],
                "classes": served.model.labels,
                "pairs": served.model.pairs,
                "precision": served.model.precision,
                "max_seq_length": served.model.longest,
            }
            answer = answer._replace(values=description)
        return json_reply(answer)

    def refusal(self, status, err_no, message):
        """A reply to what is not read to its end; the connection is closed after it."""
        self.service.metrics.refused("http", err_no)
        reply = json_reply(Answer(err_no, message, {}), status)
        reply.force_close()
        return reply


async def start_http(service, config, allowed):
    front = HttpFront(service, config, allowed)
    await front.start()
    return front
