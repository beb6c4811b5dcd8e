"""Protocol between clients and the service: requests, responses and error numbers, over RPC and HTTP.

A request contains its texts under one of these sets of keys:

    text                one text                      texts                    a list of them
    text, text_pair     one sentence pair             texts, text_pairs        two lists of the same length
    0, 1, 2, ...        one text each, as the client of the original example sends them; its answer begins with logits

Over RPC, a request is Paddle Serving's pipeline message. Its values are strings, so lists are encoded as JSON. Over
HTTP, a request is that message as JSON, {"key": ["text"], "value": ["..."]}, or the plain object {"text": "..."}.
"""

import contextlib
import importlib.util
import json
import os
import sys
from typing import NamedTuple, Optional

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from common import UserError

SERVICE = "ppminilm"
METHOD = "/baidu.paddle_serving.pipeline_serving.PipelineService/inference"

# Paddle Serving's error numbers (CustomExceptionCode of paddle_serving_server 0.9.0), and their HTTP status codes.
OK, NOT_IMPLEMENTED, UNAVAILABLE, NO_SERVICE, BAD_INPUT, TIMEOUT, UNKNOWN = 0, 3000, 3001, 3002, 5000, 6000, 10000
HTTP_STATUS = {OK: 200, NOT_IMPLEMENTED: 405, UNAVAILABLE: 503, NO_SERVICE: 404, BAD_INPUT: 400, TIMEOUT: 504}
UNAUTHORIZED = 4010  # our own: Paddle Serving lets everyone in
HTTP_STATUS[UNAUTHORIZED] = 401
JSON_TYPES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}


class ServiceError(Exception):
    """Raised to reject a request. Args: err_no: one of the numbers above."""

    def __init__(self, err_no, message):
        super().__init__(message)
        self.err_no = err_no


class Query(NamedTuple):
    texts: list[str]
    pairs: Optional[list[str]]
    logid: int
    numbered: bool = False  # whether its keys are 0, 1, 2, ...


class Answer(NamedTuple):
    err_no: int
    err_msg: str
    values: dict  # {key: what JSON can hold}; empty after an error


@contextlib.contextmanager
def needs_paddle_serving():
    """Within this context, a missing package raises a UserError with the install command."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{error}; `bash setup_env.sh --serving` installs Paddle Serving") from error


def authority(host, port):
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def messages():
    """The module of Paddle Serving's pipeline messages, Request and Response.

    Loaded by its path: importing it by name would import the whole server, with Paddle, and create a log directory.
    """
    name = "paddle_serving_server.pipeline.proto.pipeline_service_pb2"
    if name not in sys.modules:
        package = importlib.util.find_spec("paddle_serving_server")
        if package is None:
            raise ModuleNotFoundError("No module named 'paddle_serving_server'", name="paddle_serving_server")
        path = os.path.join(package.submodule_search_locations[0], "pipeline", "proto", "pipeline_service_pb2.py")
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _varint(data, i):
    """(the number that begins at data[i], where it ends). Raises: IndexError if the data end before it does."""
    number = shift = 0
    while True:
        byte = data[i]
        number, shift, i = number | (byte & 127) << shift, shift + 7, i + 1
        if byte < 128 or shift > 63:
            return number, i


def check_fields(data, most):
    """Refuses a serialized Request that has too many fields, or tensors, before protobuf takes it apart.

    In Python protobuf takes 0.4 to 0.8 s for a message of 131,000 empty fields. What is damaged is left to its message.

    Args: data: bytes. most: fields. Raises: ServiceError.
    """
    tensors, i, fields = messages().Request.DESCRIPTOR.fields_by_name["tensors"].number, 0, 0
    with contextlib.suppress(IndexError):
        while i < len(data):
            fields += 1
            if fields > most:
                raise ServiceError(BAD_INPUT, f"a request has at most {most} fields")
            tag, i = _varint(data, i)
            if tag >> 3 == tensors:
                raise ServiceError(BAD_INPUT, "tensors are not taken; send texts as key and value")
            kind = tag & 7
            if kind == 0:
                _, i = _varint(data, i)
            elif kind == 2:
                size, i = _varint(data, i)
                i += size
            elif kind in (1, 5):
                i += 8 if kind == 1 else 4
            else:  # a group, which is no part of a Request and may hold any number of fields
                raise ServiceError(BAD_INPUT, "not a request of Paddle Serving")


def parse_json(text, what):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ServiceError(BAD_INPUT, f"{what} is not JSON") from error


def check_name(name):
    """Raises: ServiceError if the request names another service; an empty name is allowed."""
    if name not in ("", SERVICE):
        raise ServiceError(NO_SERVICE, f"there is no service of that name; this one is {SERVICE}")


def fields_of_message(message):
    """{key: value} of a Request. Raises: ServiceError for a wrong service name, tensors, or keys without values."""
    check_name(message.name)
    if message.tensors:
        raise ServiceError(BAD_INPUT, "tensors are not taken; send texts as key and value")
    if len(message.key) != len(message.value) or len(set(message.key)) != len(message.key):
        raise ServiceError(BAD_INPUT, "each key needs one value, and each value a key of its own")
    fields = dict(zip(message.key, message.value))
    fields.pop("pipeline.profile", None)  # PipelineClient asks for times with it; they are in the log
    for key in {"texts", "text_pairs"} & set(fields):
        fields[key] = parse_json(fields[key], f"the value of {key}")
    return fields


def fields_of_body(body, most_keys):
    """({key: value}, logid, whether it has the form of the RPC message) of an HTTP body. Raises: ServiceError."""
    try:
        request = parse_json(body.decode("utf-8"), "the body")
    except UnicodeDecodeError as error:
        raise ServiceError(BAD_INPUT, f"the body is not UTF-8 ({error.reason} at byte {error.start})") from error
    if not isinstance(request, dict):
        raise ServiceError(BAD_INPUT, "the body must be a JSON object")
    logid, name = request.pop("logid", 0), request.pop("name", "")
    if not isinstance(logid, int) or isinstance(logid, bool) or abs(logid) >= 2**63:
        raise ServiceError(BAD_INPUT, "logid must be a whole number of 64 bits")
    if "key" not in request and "value" not in request:
        check_name(name)
        return request, logid, False
    if request.pop("tensors", []) or set(request) != {"key", "value"}:
        raise ServiceError(BAD_INPUT, "beside key and value there may be logid and name, and no tensors")
    keys, values = request["key"], request["value"]
    if not all(isinstance(side, list) and all(isinstance(item, str) for item in side) for side in (keys, values)):
        raise ServiceError(BAD_INPUT, "key and value must be lists of strings")
    if max(len(keys), len(values)) > most_keys:  # protobuf takes microseconds for each
        raise ServiceError(BAD_INPUT, f"key and value may have at most {most_keys} items")
    message = messages().Request(logid=logid)
    try:
        message.key.extend(keys)
        message.value.extend(values)
        message.name = name
    except (TypeError, ValueError) as error:  # includes UnicodeEncodeError
        raise ServiceError(BAD_INPUT, "name, key and value must be Unicode strings") from error
    return fields_of_message(message), logid, True


def read_query(fields, logid, pairs, limits):
    """Validates a request. Returns: its Query.

    Args: fields: {key: value}. pairs: whether the model takes sentence pairs. limits: with max_texts, max_text_chars.
    Raises: ServiceError that identifies an invalid text by its number and does not quote it.
    """
    numbered = [str(number) for number in range(min(len(fields), limits["max_texts"] + 1))]
    if fields and not pairs and set(numbered) <= set(fields):
        texts = [fields[key] for key in sorted(fields, key=lambda key: (len(key), key))]
        return Query(check_texts("texts", texts, limits), None, logid, numbered=True)
    forms = [("text", "text_pair"), ("texts", "text_pairs")] if pairs else [("text",), ("texts",)]
    keys = next((form for form in forms if set(form) == set(fields)), None)
    if keys is None:
        takes = "sentence pairs" if pairs else "single texts"
        either = " or ".join(" and ".join(form) for form in forms)
        raise ServiceError(BAD_INPUT, f"this model takes {takes}: the keys must be {either}, and no others")
    sides = [check_texts(key, fields[key] if key.endswith("s") else [fields[key]], limits) for key in keys]
    if len({len(side) for side in sides}) > 1:
        raise ServiceError(BAD_INPUT, f"{len(sides[0])} texts and {len(sides[1])} text_pairs: there must be as many")
    return Query(sides[0], sides[1] if pairs else None, logid)


def check_texts(key, texts, limits):
    """Returns: texts. Raises: ServiceError unless it is a list of 1 to max_texts Unicode strings, none too long."""
    if not isinstance(texts, list) or not texts:
        raise ServiceError(BAD_INPUT, f"{key} must be a list of texts with at least one in it")
    if len(texts) > limits["max_texts"]:
        most = f"at most {limits['max_texts']} are taken in one request"
        raise ServiceError(BAD_INPUT, f"{len(texts)} texts in {key}; {most}")
    for number, text in enumerate(texts, 1):
        which = f"text {number} of {key}" if key.endswith("s") else key
        if not isinstance(text, str):
            kind = JSON_TYPES.get(type(text), "an object")
            raise ServiceError(BAD_INPUT, f"{which} must be a string, not {kind}")
        if len(text) > limits["max_text_chars"]:
            most = f"at most {limits['max_text_chars']} are taken"
            raise ServiceError(BAD_INPUT, f"{which} has {len(text)} characters; {most}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair
            raise ServiceError(BAD_INPUT, f"{which} is not Unicode ({error.reason})") from error
    return texts


def message_of(answer):
    """The Response of an Answer: its values are strings of JSON."""
    response = messages().Response(err_no=answer.err_no, err_msg=answer.err_msg)
    response.key.extend(answer.values)
    response.value.extend(json.dumps(value, ensure_ascii=False) for value in answer.values.values())
    return response


def body_of(answer, in_message_form=False):
    """JSON body, bytes, of the HTTP response for an Answer: in the form of the RPC message, or as a plain object."""
    body = {"err_no": answer.err_no, "err_msg": answer.err_msg}
    if in_message_form:
        values = [json.dumps(value, ensure_ascii=False) for value in answer.values.values()]
        body.update(key=list(answer.values), value=values, tensors=[])
    else:
        body.update(answer.values)
    return json.dumps(body, ensure_ascii=False).encode("utf-8")
