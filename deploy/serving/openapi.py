"""The description of every HTTP route, in OpenAPI 3.1: GET /openapi.json. tests/test_serving_watch.py validates it, and
validates the replies of the service with it."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import protocol

PREDICTION, HEALTH, LIVE = (f"/{protocol.SERVICE}/{name}" for name in ("prediction", "health", "live"))
METRICS, OPENAPI = "/metrics", "/openapi.json"
METHODS = {PREDICTION: "POST", HEALTH: "GET", LIVE: "GET", METRICS: "GET", OPENAPI: "GET"}
WITHOUT_TOKEN = (LIVE,)


def _object(properties, required=None, others=False):
    required = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": others}


def _list(items, **bounds):
    return {"type": "array", "items": items, **bounds}


def _reply(description, schema):
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _ref(name):
    return {"$ref": f"#/components/schemas/{name}"}


def _request(pairs, config):
    """The schema of a request to a model of single texts, or of pairs."""
    text = {"type": "string", "minLength": 1, "maxLength": config["max_text_chars"]}
    texts = _list(text, minItems=1, maxItems=config["max_texts"])
    header = {
        "logid": {"type": "integer", "format": "int64"},
        "name": {"type": "string", "enum": ["", protocol.SERVICE]},
    }
    names = ("text", "text_pair") if pairs else ("text",)
    one, several = dict.fromkeys(names, text), {f"{name}s": texts for name in names}
    strings = _list({"type": "string"})
    message = {"key": strings, "value": strings, "tensors": _list({}, maxItems=0)}
    forms = [
        {"title": "one text", **_object({**one, **header}, list(one))},
        {"title": "several texts", **_object({**several, **header}, list(several))},
        {"title": "the form of Paddle Serving's message", **_object({**message, **header}, ["key", "value"])},
    ]
    if not pairs:
        numbered = {"type": "object", "properties": {"0": text, **header}, "required": ["0"], "title": "numbered texts"}
        forms.append({**numbered, "patternProperties": {"^[0-9]+$": text}, "additionalProperties": False})
    return {"oneOf": forms}


def _schemas(model, config):
    numbers = _list({"type": "number"})
    pairs = {"key": _list({"type": "string"}), "value": _list({"type": "string"}), "tensors": _list({}, maxItems=0)}
    state = {"err_no": {"type": "integer"}, "err_msg": {"type": "string"}, **pairs}
    done = {"err_no": {"type": "integer", "const": protocol.OK}, "err_msg": {"type": "string"}}
    label = {"type": "string"}
    answer = {
        **done,
        # One label, or those of a multi-label model; a model without classes has a number.
        "labels": _list({"oneOf": [label, _list(label), {"type": "number"}]}),
        "probabilities": _list(numbers),
        "label_names": _list({"oneOf": [label, _list(label)]}),
        "logits": _list(numbers),
        "classes": _list(label),
        "class_names": _list(label),
        "truncated": _list({"type": "boolean"}),
        "objective": _object({"name": label}, others=True),
    }
    health = {
        **done,
        "task": label,
        "classes": _list(label),
        "pairs": {"type": "boolean"},
        "precision": label,
        "max_seq_length": {"type": "integer"},
    }
    return {
        "Request": _request(model.pairs, config),
        # An objective of one's own may answer with other columns.
        "Answer": _object(answer, [*done, "logits", "classes", "truncated", "objective"], others=True),
        "Message": _object({**done, **pairs}),
        "Health": _object(health),
        "State": _object(state, ["err_no", "err_msg"]),
    }


def document(model, config, with_tokens):
    """The OpenAPI document of the service, as an object for JSON. Args: model: the worker.Model in service."""
    refusals = {
        "400": "the request is not one that the service takes",
        "404": "no such route, or no service of that name",
        "405": "another method",
        "413": "the body is too large",
        "415": "a compressed body",
        "431": "the head is too large",
        "500": "the service failed",
        "503": "too many requests; try again",
        "504": "waited too long",
    }
    token = {"401": _reply("no token, or one that is not known", _ref("State"))} if with_tokens else {}
    failed = {status: _reply(words, _ref("State")) for status, words in refusals.items()}
    predicted = {"200": _reply("the answer", {"oneOf": [_ref("Answer"), _ref("Message")]}), **failed, **token}
    healthy = _reply("the model has answered a request", _ref("Health"))
    text = {"text/plain": {"schema": {"type": "string"}}}
    counters = {"description": "counters in Prometheus' text format", "content": text}
    operations = {
        PREDICTION: {
            "summary": "Classifies texts.",
            "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("Request")}}},
            "responses": predicted,
        },
        HEALTH: {
            "summary": "Readiness: makes a real prediction.",
            "responses": {"200": healthy, **{status: failed[status] for status in ("500", "503", "504")}, **token},
        },
        LIVE: {
            "summary": "Liveness: the process answers; does not use the model.",
            "responses": {"200": _reply("it lives", _ref("State"))},
        },
        METRICS: {"summary": "Counters for Prometheus.", "responses": {"200": counters, **token}},
        OPENAPI: {
            "summary": "This description.",
            "responses": {"200": _reply("an OpenAPI document", {"type": "object"}), **token},
        },
    }
    secured = {"security": [{"token": []}]} if with_tokens else {}
    for path, operation in operations.items():
        operation.update(operationId=path.strip("/").replace("/", "_").replace(".", "_"))
        operation.update(secured if path not in WITHOUT_TOKEN else {})
    components = {"schemas": _schemas(model, config)}
    if with_tokens:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "PP-MiniLM text classification", "version": model.record["task"]},
        "paths": {path: {METHODS[path].lower(): operation} for path, operation in operations.items()},
        "components": components,
    }
