"""What is no request gets an error and no prediction, runs nothing, and leaves no word in the logs; the service goes on."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("paddle_serving_server", reason="needs Paddle Serving: bash setup_env.sh --serving")
import protocol

# What is no request: (what it is, the HTTP body, status, err_no, words of the answer); the README shows this table.
BAD = [
    ("wrong key", {"sentence": "一"}, 400, 5000, "the keys must be text or texts"),
    ("no key", {}, 400, 5000, "the keys must be text or texts"),
    ("a key too many", {"text": "一", "label": "1"}, 400, 5000, "the keys must be text or texts"),
    ("a pair for a model of single texts", {"text": "一", "text_pair": "丁"}, 400, 5000, "takes single texts"),
    ("empty text", {"text": ""}, 400, 5000, "text 1 is empty"),
    ("blank text", {"text": " \t\u3000\n"}, 400, 5000, "text 1 is empty"),
    ("control characters alone", {"text": "\x00\x07"}, 400, 5000, "text 1 is empty"),
    ("one blank text among others", {"texts": ["一", " "]}, 400, 5000, "text 2 is empty"),
    ("null", {"text": None}, 400, 5000, "text must be a string, not null"),
    ("number", {"text": 5}, 400, 5000, "text must be a string, not a number"),
    ("object", {"text": {"a": "一"}}, 400, 5000, "text must be a string, not an object"),
    ("a list where one text belongs", {"text": ["一"]}, 400, 5000, "text must be a string, not a list"),
    ("a text where a list belongs", {"texts": "一"}, 400, 5000, "texts must be a list of texts"),
    ("nested list", {"texts": ["一", ["丁"]]}, 400, 5000, "text 2 of texts must be a string, not a list"),
    ("empty list", {"texts": []}, 400, 5000, "with at least one in it"),
    ("too many texts", {"texts": ["一"] * 51}, 400, 5000, "51 texts in texts; at most 50"),
    ("half of a surrogate pair", b'{"text": "\\ud800"}', 400, 5000, "is not Unicode"),
    ("invalid UTF-8", b'{"text": "\xff"}', 400, 5000, "the body is not UTF-8"),
    ("not JSON", b'{"text": ', 400, 5000, "the body is not JSON"),
    ("JSON nested too deep", b"[" * 10000, 400, 5000, "the body is not JSON"),
    ("not an object", ["一"], 400, 5000, "the body must be a JSON object"),
    ("empty body", b"", 400, 5000, "the body is not JSON"),
    ("key without value", {"key": ["text"], "value": []}, 400, 5000, "each key needs one value"),
    ("key twice", {"key": ["text", "text"], "value": ["一", "丁"]}, 400, 5000, "each key needs one value"),
    ("a value that is no string", {"key": ["text"], "value": [["一"]]}, 400, 5000, "must be lists of strings"),
    ("a list that is not JSON", {"key": ["texts"], "value": ["['一']"]}, 400, 5000, "value of texts is not JSON"),
    ("text beside key and value", {"text": "一", "key": ["text"], "value": ["丁"]}, 400, 5000, "beside key and value"),
    ("tensors", {"key": ["text"], "value": ["一"], "tensors": [{}]}, 400, 5000, "and no tensors"),
    ("logid that is no number", {"text": "一", "logid": "1"}, 400, 5000, "logid must be"),
    ("unknown service name", {"text": "一", "name": "other"}, 404, 3002, "there is no service of that name"),
    ("body over the limit", {"text": "一" * 20000}, 413, 5000, "larger than 20000 bytes"),
]


@pytest.fixture(scope="module")
def answers_to_bad(service):
    return [service.post(body) for _, body, *_ in BAD]


@pytest.mark.parametrize("number", range(len(BAD)), ids=[what for what, *_ in BAD])
def test_bad_input_gets_no_prediction(service, answers_to_bad, number):
    _, _, status, err_no, words = BAD[number]
    got_status, answer = answers_to_bad[number]
    assert (got_status, answer["err_no"]) == (status, err_no) and words in answer["err_msg"], answer
    assert set(answer) <= {"err_no", "err_msg", "key", "value", "tensors"} and not answer.get("value")


def test_the_readme_shows_these_answers(answers_to_bad):
    """deploy/serving/README.md has the table as it is produced here, with the limits that this service has.

    Its Chinese table differs only in the words for what is sent.
    """
    english, answered = ["| Request | HTTP | err_no | err_msg |", "| --- | --- | --- | --- |"], []
    for (what, body, *_), (status, answer) in zip(BAD, answers_to_bad):
        shown = repr(body)[2:-1] if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False)
        shown = shown if len(shown) <= 60 else f"{shown[:30]} …"
        row = f"`{shown}` | {status} | {answer['err_no']} | {answer['err_msg']} |".replace("\t", "\\t")
        english.append(f"| {what}: {row}")
        answered.append(row)
    readme = open(os.path.join(ROOT, "deploy/serving/README.md"), encoding="utf-8").read()
    assert "\n".join(english) in readme, "\n".join(english)
    _, _, chinese = readme.partition("| 请求 | HTTP | err_no | err_msg |\n| --- | --- | --- | --- |\n")
    rows = chinese.partition("\n\n")[0].split("\n")
    assert [row.partition("：")[2] for row in rows] == answered


def test_paths_and_methods(service):
    for path, method, status, err_no in (
        ("/other/prediction", "POST", 404, 3002),
        ("/", "GET", 404, 3002),
        ("/ppminilm/prediction", "GET", 405, 3000),
        ("/ppminilm/health", "POST", 405, 3000),
    ):
        got, answer = service.post(None, path, method=method)
        assert (got, answer["err_no"]) == (status, err_no)
    got, answer = service.post(None, "/ppminilm/health", method="GET")
    assert got == 200 and answer["precision"] == "int8" and answer["max_seq_length"] == 64


def test_bad_messages_over_rpc(service):
    """Paddle Serving's clients read err_no, so it is there and not in gRPC's status; and the service goes on."""
    import grpc

    pb = protocol.messages()
    for message, err_no, words in (
        (pb.Request(), 5000, "the keys must be"),
        (pb.Request(key=["text"], value=[""]), 5000, "text 1 is empty"),
        (pb.Request(key=["text"], value=["array(['一'], dtype='<U1')"], name="other"), 3002, "no service of that name"),
        (pb.Request(key=["texts"], value=["array(['一'], dtype='<U1')"]), 5000, "not JSON"),
        (pb.Request(key=["texts"], value=["[null]"]), 5000, "not null"),
        (pb.Request(key=["text", "texts"], value=["一", "[]"]), 5000, "the keys must be"),
        (b"\x0a\x04text\x12\x01\xff", 5000, "not UTF-8"),  # key text, value one byte that is not UTF-8
        (b"\xff\xff\xff", 5000, "not a request of Paddle Serving"),
        (pb.Request(tensors=[pb.Tensor(name="text", elem_type=12, str_data=["一"])]), 5000, "tensors are not taken"),
    ):
        response = service.call(message)
        assert response.err_no == err_no and words in response.err_msg and not response.value, response
    with pytest.raises(grpc.RpcError) as error:
        service.call(pb.Request(key=["text"], value=["一" * 20000]))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert service.call(pb.Request(key=["text"], value=["一"])).err_no == 0


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickled_tensor_runs_nothing(service, tmp_path):
    pb, mark = protocol.messages(), str(tmp_path / "it_ran")
    stream = io.BytesIO()
    np.save(stream, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    message = pb.Request(tensors=[pb.Tensor(name="text", elem_type=13, byte_data=stream.getvalue())])
    # Paddle Serving's own way of reading the request, in a process of its own, shows that the payload is live.
    code = (
        "import sys; from common import compat; op = compat.paddle_serving().RequestOp(); import protocol\n"
        "op.unpack_request_package(protocol.messages().Request.FromString(sys.stdin.buffer.read()))"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/deploy/serving", "SERVING_LOG_PATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], input=message.SerializeToString(), env=env, cwd=tmp_path)
    assert os.path.exists(mark), "the payload is dead: this test shows nothing"
    os.remove(mark)
    response = service.call(message)
    assert response.err_no == 5000 and "tensors are not taken" in response.err_msg and not os.path.exists(mark)


def test_no_words_of_a_request_in_the_logs(service, answers_to_bad):
    """Neither of one that was answered nor of one that was refused; what is logged is its number, size and time."""
    marker = "丂丄丅丆"
    for body in ({"text": marker}, {"texts": [marker, None]}, {"text": marker, "x": marker}, {marker: marker}):
        service.post(body)
    service.post({"text": "一", "name": marker, "logid": 987654})
    service.post({"text": "一", "logid": 987654})
    written = [service.stdout, service.stderr, *service.logs.iterdir()]
    said = "".join(path.read_text(errors="replace") for path in written)
    assert "logid 987654: 1 texts" in said and "err_no 5000" in said
    assert marker not in said and marker.encode("unicode_escape").decode() not in said
