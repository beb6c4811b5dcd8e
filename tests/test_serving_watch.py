"""The service is watched: counters for Prometheus, the description of its routes, liveness beside readiness."""

import json
import threading
import types

import numpy as np
import pytest
import requests
from conftest import at_once

pytest.importorskip("paddle_serving_server", reason="needs Paddle Serving: bash setup_env.sh --serving")
import jsonschema
import openapi
import protocol
from common import objectives, tokenization
from openapi_spec_validator import validate
from prometheus_client.parser import text_string_to_metric_families
from test_serving_input import BAD


def counters(service):
    """{(name, labels as a sorted tuple): value} of what /metrics says."""
    reply = requests.get(f"http://127.0.0.1:{service.http}/metrics", timeout=60)
    assert reply.status_code == 200 and reply.headers["Content-Type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def test_requests_texts_and_tokens_are_counted(service, models):
    texts, marker = ["一丁七", "丁一"], "丂丄丅丆丂丄"
    tokenizer = tokenization.load_tokenizer(str(models["int8"][0]))
    of_health = json.loads((models["int8"][0] / "stage.json").read_text())["labels"][0]
    sent = [*texts, "一", "丁", marker, of_health]
    tokens = sum(len(ids) for ids, _ in tokenizer.encode(sent, None, 64))
    before = counters(service)
    assert service.post({"texts": texts})[0] == 200
    assert service.call(protocol.messages().Request(key=["texts"], value=['["一", "丁"]'])).err_no == 0
    assert service.post({"text": marker})[0] == 200
    assert service.post({"text": ""})[0] == 400
    assert service.post({"text": "一" * 20000})[0] == 413
    assert service.post({marker: marker}, f"/{marker}")[0] == 404
    assert service.post(None, method="GET")[0] == 405
    assert service.post(None, "/ppminilm/health", method="GET")[0] == 200
    after = counters(service)

    def rise(name, **labels):
        key = name, tuple(sorted(labels.items()))
        return after.get(key, 0) - before.get(key, 0)

    for front, outcome, count in (
        ("http", "ok", 2),
        ("rpc", "ok", 1),
        ("health", "ok", 1),
        ("http", "bad_input", 2),
        ("http", "no_service", 1),
        ("http", "not_implemented", 1),
    ):
        assert rise("ppminilm_requests_total", front=front, outcome=outcome) == count, (front, outcome)
    assert rise("ppminilm_texts_total") == 6 and rise("ppminilm_tokens_total") == tokens
    assert rise("ppminilm_batch_texts_sum") == 6 and 4 <= rise("ppminilm_batch_texts_count") <= 6
    # A request that was refused before it was read has no time of its own: the bad one that was read has.
    assert rise("ppminilm_request_seconds_count", front="http") == 3
    assert 0 < rise("ppminilm_request_seconds_sum", front="http") < 60
    assert after[("ppminilm_requests_running", ())] == 0 == after[("ppminilm_texts_waiting", ())]
    (model,) = (dict(labels) for name, labels in after if name == "ppminilm_model_info")
    record = json.loads((models["int8"][0] / "stage.json").read_text())
    assert record["weights"]["int8.pdiparams"].startswith(model.pop("weights"))
    assert model == {"task": "topics", "objective": "classification", "precision": "int8", "max_seq_length": "64"}
    assert ("process_resident_memory_bytes", ()) in after and ("ppminilm_worker_restarts_total", ()) in after
    said = requests.get(f"http://127.0.0.1:{service.http}/metrics", timeout=60).text
    assert not any(words in said for words in (marker, "127.0.0.1", *texts))


def test_what_waits_is_counted(service):
    """While one request after the other waits for the model."""
    texts, seen = ["一丁七万丈三上下" * 8] * 50, []
    stop = threading.Event()

    def watch():
        while not stop.is_set():
            found = counters(service)
            seen.append((found[("ppminilm_requests_running", ())], found[("ppminilm_texts_waiting", ())]))

    watching = threading.Thread(target=watch)
    watching.start()
    outcomes = at_once(20, lambda: service.post({"texts": texts})[0])
    stop.set()
    watching.join()
    assert {status for status, _ in outcomes} == {200}
    running, waiting = (max(column) for column in zip(*seen))
    assert 1 < running <= 20 and 50 < waiting <= 1000


def test_it_lives(service):
    """Without the model: no request is counted."""
    before = counters(service)
    assert service.post(None, "/ppminilm/live", method="GET") == (200, {"err_no": 0, "err_msg": ""})
    after = counters(service)
    assert {key: value for key, value in after.items() if key[0] == "ppminilm_requests_total"} == {
        key: value for key, value in before.items() if key[0] == "ppminilm_requests_total"
    }


def check(document, name, value):
    """Raises: jsonschema.ValidationError unless the value has the form of that name."""
    jsonschema.Draft202012Validator({**document, "$ref": f"#/components/schemas/{name}"}).validate(value)


def test_the_description_is_that_of_the_service(service):
    """It is valid; every reply has the form that it says; what is refused as no request has no form that it takes."""
    status, document = service.post(None, "/openapi.json", method="GET")
    assert status == 200
    validate(document)
    assert {path: [*methods] for path, methods in document["paths"].items()} == {
        path: [method.lower()] for path, method in openapi.METHODS.items()
    }
    prediction = document["paths"]["/ppminilm/prediction"]["post"]["responses"]
    for body, form in (
        ({"text": "一"}, "Answer"),
        ({"texts": ["一", "丁七"], "logid": 5}, "Answer"),
        ({"0": "一", "1": "丁"}, "Answer"),
        ({"key": ["text"], "value": ["一"]}, "Message"),
    ):
        status, answer = service.post(body)
        assert status == 200, answer
        check(document, "Request", body)
        check(document, form, answer)
    # A schema cannot say these: what a tokenizer takes for blank, what a string holds, keys that fit their values.
    beyond = ("blank text", "control characters alone", "one blank text among others", "half of a surrogate pair")
    beyond += ("key without value", "key twice", "a list that is not JSON", "body over the limit")
    for what, body, *_ in BAD:
        status, answer = service.post(body)
        assert str(status) in prediction
        check(document, "State", answer)
        if not isinstance(body, bytes) and what not in beyond:
            with pytest.raises(jsonschema.ValidationError):
                check(document, "Request", body)
    check(document, "Health", service.post(None, "/ppminilm/health", method="GET")[1])
    check(document, "State", service.post(None, "/ppminilm/live", method="GET")[1])


@pytest.mark.parametrize("pairs", [False, True])
def test_the_description_of_other_models(pairs):
    """Of pairs, of several labels per text, and with tokens."""
    model = types.SimpleNamespace(pairs=pairs, record={"task": "other"})
    document = openapi.document(model, {"max_texts": 3, "max_text_chars": 9}, with_tokens=True)
    validate(document)
    assert all(("security" in routes[method.lower()]) == (path != openapi.LIVE)
               for path, method in openapi.METHODS.items() for routes in [document["paths"][path]])  # fmt: skip
    good = {"text": "一", "text_pair": "丁"} if pairs else {"text": "一"}
    check(document, "Request", good)
    for bad in ({"text": "一", "text_pair": "丁"} if not pairs else {"text": "一"}, dict.fromkeys(good, "一" * 10)):
        with pytest.raises(jsonschema.ValidationError):
            check(document, "Request", bad)
    multilabel = objectives.MultiLabel()
    logits, labels = [[2.0, -3.0], [-4.0, -5.0]], ["甲", "乙"]
    answer = {"err_no": 0, "err_msg": "", "classes": labels, "truncated": [False, False], "logits": logits}
    answer.update(multilabel.columns(np.float32(logits), labels), objective=multilabel.describe())
    check(document, "Answer", json.loads(json.dumps(answer)))
