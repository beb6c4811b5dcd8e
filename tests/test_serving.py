"""The service's answers: the same as infer.py's, in every precision, under load; and none to what is not a request."""

import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, Service, at_once, load_script

import protocol
import rpc_client
import serving_load
from metrics import Metrics
from common import batching, engine, files, objectives, tokenization

pytest.importorskip("paddle_serving_server", reason="needs Paddle Serving: bash setup_env.sh --serving")


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8"])
def served(request, models, tmp_path_factory):
    """(Service, precision) of every precision; oneDNN writes each operation into the worker's output."""
    directory, _ = models[request.param]
    options = ["--precision", "bf16"] if request.param == "bf16" else []
    tmp = tmp_path_factory.mktemp(request.param)
    with Service(tmp, directory, *options, env={"ONEDNN_VERBOSE": "1"}) as service:
        yield service, request.param


def offline(directory, name, precision, examples, length=64):
    """infer.py's logits: its engine, its batches, its order."""
    tokenizer = tokenization.load_tokenizer(str(directory))
    features = batching.convert(examples, tokenizer, length)
    return engine.Engine(str(directory / name), "cpu", precision).predict(features, pad_id=tokenizer.pad_id)


def dev_texts(workspace, count):
    rows = [row for _, row in files.read_json_lines(str(workspace / "data/topics/dev.json"))][:count]
    return [batching.Example(row["sentence"], None, None, n) for n, row in enumerate(rows, 1)]


# The settings in the config_nlp.yml of the original example.
ORIGINAL = {
    "worker_num": 20,
    "build_dag_each_worker": False,
    "dag": {"is_thread_op": False, "tracer": {"interval_s": 10}},
    "http_port": 18082,
    "rpc_port": 8090,
    "op": {
        "ppminilm": {
            "concurrency": 1,
            "local_service_conf": {
                "client_type": "local_predictor",
                "device_type": 1,
                "devices": "2",
                "fetch_list": ["logits"],
                "model_config": "serving_server",
            },
        }
    },
}
# Its client, with the class of Paddle Serving: texts under the keys 0, 1, ..., logits read from the first value.
CLIENT = """
import json, sys
from paddle_serving_server.pipeline import PipelineClient
client = PipelineClient()
client.connect([sys.argv[1]])
answer = client.predict(feed_dict={str(n): text for n, text in enumerate(sys.argv[2:])})
print(json.dumps([answer.err_no, answer.key[0], eval(answer.value[0])]))
profiled = client.predict(feed_dict={"texts": json.dumps(sys.argv[2:])}, profile=True)
print(json.dumps([profiled.err_no, dict(zip(profiled.key, profiled.value))["logits"]]))
"""


def test_the_originals_settings_and_client(models, workspace, tmp_path):
    """Both work as they are. Eleven texts: sorted as words, "10" would stand before "2"."""
    directory, _ = models["int8"]
    texts = [example.text for example in dev_texts(workspace, 11)]
    with Service(tmp_path, directory, settings=ORIGINAL) as service:
        command = [sys.executable, "-c", CLIENT, f"127.0.0.1:{service.rpc}", *texts]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        numbered, profiled = map(json.loads, re.findall(r"^\[.*\]$", done.stdout, re.M))
        _, plain = service.post({"texts": texts})
        _, by_http = service.post({str(n): text for n, text in enumerate(texts)})
        status, too_many = service.post({str(n): "一" for n in range(129)})
        _, missing = service.post({"0": "一", "2": "一"})
        alone = [sys.executable, os.path.join(ROOT, "deploy/serving/rpc_client.py")]
        printed = subprocess.run([*alone, "--address", f"127.0.0.1:{service.rpc}"], capture_output=True, text=True)
    assert numbered[:2] == [0, "logits"] and by_http["labels"] == plain["labels"]
    assert np.abs(np.array(numbered[2]) - np.array(plain["logits"])).max() <= 0.01
    assert profiled[0] == 0 and json.loads(profiled[1]) == plain["logits"]
    assert status == 400 and "129 texts in texts; at most 128" in too_many["err_msg"]
    assert "the keys must be text or texts" in missing["err_msg"]
    assert [json.loads(line)["text"] for line in printed.stdout.splitlines()] == rpc_client.SENTENCES, printed.stderr
    notes = [line for line in service.stderr.read_text().splitlines() if line.startswith("note: ")]
    ours = "build_dag_each_worker", "is_thread_op", "tracer", "client_type", "fetch_list"
    assert all(f" {name} (" in notes[0] for name in ours) and notes[1].startswith("note: device_type 1"), notes


def test_answers_are_infers(served, models, workspace):
    """One text, a list, by HTTP in both forms and by RPC: labels, probabilities, logits of infer.py, in order."""
    service, precision = served
    examples = dev_texts(workspace, 40)
    logits = offline(*models[precision], precision, examples)
    labels = json.loads((models[precision][0] / "stage.json").read_text())["labels"]
    sentences = [example.text for example in examples]
    as_json = json.dumps(sentences, ensure_ascii=False)
    status, plain = service.post({"texts": sentences})
    assert status == 200 and plain["err_no"] == 0 and plain["classes"] == labels
    _, form = service.post({"key": ["texts"], "value": [as_json], "logid": 7})
    pb = protocol.messages()
    rpc = service.call(pb.Request(key=["texts"], value=[as_json], name="ppminilm"))
    for keys, values in ((form["key"], form["value"]), (rpc.key, rpc.value)):
        assert {**dict(zip(keys, map(json.loads, values))), "err_no": 0, "err_msg": ""} == plain
    tolerance = serving_load.TOLERANCE[precision]
    assert np.abs(np.array(plain["logits"]) - logits).max() <= tolerance
    assert np.allclose(plain["probabilities"], objectives.softmax(plain["logits"]), atol=1e-6)
    assert plain["labels"] == [labels[i] for i in np.argmax(plain["logits"], -1)]
    assert plain["truncated"] == [False] * 40
    for i in range(5):
        _, one = service.post({"text": sentences[i]})
        assert np.abs(one["logits"][0] - logits[i]).max() <= tolerance and len(one["labels"]) == 1
    assert len(set(plain["labels"])) == 4  # a model that always says the same would pass all of the above


def test_precision_is_in_force(served):
    """oneDNN's own report of the worker: which kind of numbers its matrix products took."""
    service, precision = served
    if precision == "bf16" and "full speed" not in engine.preflight("bf16"):
        pytest.skip("this CPU has no BF16")
    service.post({"text": "一丁"})
    report = (service.logs / "worker.out").read_text(errors="replace")
    products = re.findall(r"exec,cpu,(?:inner_product|matmul),[^,]*,[^,]*,(src[_:]\w+)", report)
    assert len(products) > 20
    wanted = {"fp32": r"src.f32", "bf16": r"src.bf16", "int8": r"src.[us]8"}[precision]
    others = {"fp32": r"src.(bf16|[us]8)", "bf16": r"src.[us]8", "int8": r"src.bf16"}[precision]
    assert any(re.match(wanted, kind) for kind in products) and not any(re.match(others, kind) for kind in products)
    if precision == "fp32":
        return
    linear = re.findall(r"exec,cpu,inner_product,[^,]*,[^,]*,(src[_:]\w+)", report)
    assert linear and sum(bool(re.match(wanted, kind)) for kind in linear) >= 0.9 * len(linear)


def test_large_requests_are_not_computed_all_together(service, models, workspace):
    """Eight requests of 50 texts at once: each is answered in turn, so that the first does not wait for the last."""
    examples = dev_texts(workspace, 50)
    logits = offline(*models["int8"], "int8", examples)
    for (_, answer), _ in at_once(8, lambda: service.post({"texts": [example.text for example in examples]})):
        assert np.abs(np.array(answer["logits"]) - logits).max() <= serving_load.TOLERANCE["int8"]
    sizes = re.findall(r"http logid \d+: 50 texts, ([\d.]+) ms", (service.logs / "pipeline.log").read_text())[-8:]
    assert float(min(sizes, key=float)) < 0.7 * float(max(sizes, key=float)), sizes


@pytest.fixture
def model(models, monkeypatch, tmp_path):
    """worker.Model of the INT8 variant; ``shapes`` has those of what its engines run."""
    monkeypatch.setenv("SERVING_LOG_PATH", str(tmp_path))
    import worker

    model = worker.Model(str(models["int8"][0]), "cpu", None, None)
    model.shapes = {"streams": [], "alone": []}
    for name, one in (("streams", model.engine), ("alone", model.alone)):
        shapes, run = model.shapes[name], one.run
        monkeypatch.setattr(one, "run", lambda batch, s=shapes, run=run: s.append(batch.input_ids.shape) or run(batch))
    return model


def run_jobs(model, requests, batch_size=32):
    """{number: (logits, place among those that ended)} of requests (texts, address) that a scheduler gets together."""
    import asyncio

    import worker
    from scheduler import Job, Scheduler

    ended = []

    async def run():
        scheduler = Scheduler(worker.PPMiniLMOp(model), batch_size, Metrics())

        async def one(number, texts, address):
            logits = await scheduler.run(Job(protocol.Query(texts, None, 0), address, time.monotonic(), scheduler))
            ended.append((number, logits))

        await asyncio.gather(*(one(number, *request) for number, request in enumerate(requests)))
        assert not scheduler.running and not scheduler.waiting and not scheduler.untokenized

    asyncio.run(run())
    return {number: (logits, place) for place, (number, logits) in enumerate(ended)}


def test_every_shape_is_prepared(model):
    """What the engine runs before the ports open, and all that it runs afterwards: the same shapes."""
    import worker

    model.prepare()
    prepared = {name: set(shapes) for name, shapes in model.shapes.items()}
    few = {(rows, length) for rows in (1, 4) for length in (16, 32, 64)}
    assert prepared["streams"] == few | {(16, length) for length in (16, 24, 28, 32, 48, 64)}
    of_one = {(1, length) for length in (16, 32, 64)}
    assert prepared["alone"] == (prepared["streams"] if model.alone is model.engine else of_one)  # one core: one engine
    for shapes in model.shapes.values():
        shapes.clear()
    for count in (1, 2, 3, 5, 7, 8, 13, 40):
        texts = [example.text for example in serving_load.random_texts(model.tokenizer.vocab, False, count, count)]
        run_jobs(model, [(texts, "a")])
    assert len(set(model.shapes["streams"])) > 5 and model.shapes["alone"]
    assert all(set(shapes) <= prepared[name] for name, shapes in model.shapes.items())
    # What oneDNN prepared is kept: the engine's cache has 64 places (common/engine.py).
    longest = worker.padded_lengths("cpu", 512)
    assert sum(map(len, longest.values())) <= 64 and all(lengths[-1] == 512 for lengths in longest.values())
    # 21 texts, 20 short and a long one: nothing short is padded to the long one's length.
    runs = model.cheapest_runs([10] * 20 + [60], [16, 4, 1])
    assert sorted((stop - start, length) for start, stop, length in runs) == [(1, 64), (4, 16), (16, 16)]
    assert runs[0] == (20, 21, 64)


def test_every_text_gets_its_own_logits(model, models, workspace):
    """Requests of one and of several texts together, larger and smaller than a batch: infer.py's logits, in order."""
    examples = dev_texts(workspace, 120)
    logits = offline(*models["int8"], "int8", examples)
    sentences, parts = [example.text for example in examples], (1, 1, 7, 30, 2, 50, 1, 28)
    starts = np.cumsum((0, *parts))
    found = run_jobs(model, [(sentences[a:b], str(a)) for a, b in zip(starts, starts[1:])])
    for number, (a, b) in enumerate(zip(starts, starts[1:])):
        assert np.abs(found[number][0] - logits[a:b]).max() <= serving_load.TOLERANCE["int8"]


def test_small_requests_overtake_and_addresses_take_turns(model):
    text = "一丁七万丈三上下" * 7
    found = run_jobs(model, [([text] * 100, "a"), ([text] * 100, "a"), (["一丁"], "a")])
    assert found[2][1] == 0, "the small one is the first"
    found = run_jobs(model, [*[([text] * 20, "a")] * 8, ([text] * 20, "b")])
    assert found[8][1] <= 2, "the only one of its address does not wait for all of the other"


def test_the_beginning_of_a_long_text_decides(model):
    """Cut before it is tokenized, it has the tokens of the whole; also with blanks, unknown words, marks, pairs."""
    rng = random.Random(0)
    pieces = ["一丁七", "hello ", " ", "\u0301", "é", "[SEP]", "x" * 150, "，", "三", "\n", "\x1c", "cc\x85c", "c\x0bc"]
    assert len(model.beginning("一丁七" * 5000)) == 4 * model.longest
    for number in range(60):
        text = "".join(rng.choices(pieces, [9, 1, 1, 1, 1, 1, 0.2, 1, 5, 1, 1, 1, 1], k=rng.choice([50, 400, 1500])))
        whole = model.tokenizer.encode([text], None, model.longest)
        features, truncated = model.tokenize([text], None)
        assert [(one.input_ids, one.token_type_ids) for one in features] == whole
        assert truncated == [len(model.tokenizer.encode([text], None, 9999)[0][0]) > model.longest]
        model.pairs = number % 2 == 1
        if model.pairs:
            whole = model.tokenizer.encode([text], [text[::-1]], model.longest)
            features, _ = model.tokenize([text], [text[::-1]])
            assert [(one.input_ids, one.token_type_ids) for one in features] == whole
            model.pairs = False


def test_right_answers_under_load(service, models, workspace):
    """600 requests of mixed lengths from 50 clients: every answer is the one to its own question."""
    tokenizer = tokenization.load_tokenizer(str(models["int8"][0]))
    examples = serving_load.random_texts(tokenizer.vocab, False, 560, 3) + dev_texts(workspace, 40)
    logits = offline(*models["int8"], "int8", examples)
    labels = json.loads((models["int8"][0] / "stage.json").read_text())["labels"]
    answers = serving_load.send_all(service.http, [[example] for example in examples], 50).answers
    logits = logits[:, None]
    assert (
        serving_load.count_right(answers, logits, objectives.Classification(), labels, serving_load.TOLERANCE["int8"])
        == 600
    )
    mixed_up = answers[1:] + answers[:1]
    assert (
        serving_load.count_right(mixed_up, logits, objectives.Classification(), labels, serving_load.TOLERANCE["int8"])
        < 30
    )
    assert serving_load.confusable(logits[:, 0], serving_load.TOLERANCE["int8"]) < 0.05
    assert serving_load.confusable(np.ones((9, 4)), 1e-4) == 1


def test_long_texts_are_cut_as_in_training_and_that_is_said(service, models):
    long, short = "一丁" * 100, "一丁七"
    _, answer = service.post({"texts": [short, long, long[:62], long[:63]]})
    assert answer["truncated"] == [False, True, False, True]
    assert answer["logits"][1] == answer["logits"][2] == answer["logits"][3]
    examples = [batching.Example(long, None, None, 1)]
    assert np.abs(answer["logits"][1] - offline(*models["int8"], "int8", examples)[0]).max() < 0.1


def test_pairs(pair_model, tmp_path):
    pairs = [("一丁七", "万丈"), ("三上", "下不与丐"), ("丑" * 80, "专且世" * 30)]
    examples = [batching.Example(a, b, None, 1) for a, b in pairs]
    logits = offline(pair_model, "inference", "fp32", examples)
    with Service(tmp_path, pair_model) as service:
        _, answer = service.post({"texts": [a for a, _ in pairs], "text_pairs": [b for _, b in pairs]})
        assert np.abs(np.array(answer["logits"]) - logits).max() < 1e-4 and answer["truncated"] == [False, False, True]
        _, one = service.post({"text": "一丁七", "text_pair": "万丈"})
        assert np.abs(one["logits"][0] - logits[0]).max() < 1e-4
        for wrong, said in (
            ({"text": "一"}, "sentence pairs"),
            ({"text": "一", "text_pair": " "}, "is empty"),
            ({"text": "一", "text_pairs": ["丁"]}, "the keys must be"),
            ({"texts": ["一", "丁"], "text_pairs": ["七"]}, "as many"),
        ):
            status, answer = service.post(wrong)
            assert status == 400 and said in answer["err_msg"] and "labels" not in answer
        done = subprocess.run(
            [sys.executable, "deploy/serving/rpc_client.py", "--address", f"127.0.0.1:{service.rpc}", "--text", *(a for a, _ in pairs), "--text_pair", *(b for _, b in pairs)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [(row["text"], row["text_pair"]) for row in rows] == pairs and done.returncode == 0


def test_paddle_servings_own_client(service):
    """PipelineClient of paddle_serving_server, as users of Paddle Serving have it."""
    code = (
        "from common import compat; compat.paddle_serving()\n"
        "from paddle_serving_server.pipeline import PipelineClient\n"
        f"client = PipelineClient(); client.connect(['127.0.0.1:{service.rpc}'])\n"
        "answer = client.predict(feed_dict={'text': '一丁七', 'clientip': '127.0.0.1'})\n"
        "print('ANSWER', answer.err_no, dict(zip(answer.key, answer.value))['labels'])"
    )
    env = {**os.environ, "SERVING_LOG_PATH": str(service.directory / "client")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    _, answer = service.post({"text": "一丁七"})
    assert f"ANSWER 0 {json.dumps(answer['labels'], ensure_ascii=False)}" in done.stdout, done.stderr


def client(*arguments, stdin=None):
    command = [sys.executable, os.path.join(ROOT, "deploy/serving/rpc_client.py"), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True)


def test_client_gives_infers_lines(served, models, workspace, tmp_path, capsys):
    """From arguments, a file and standard input, over RPC and HTTP, in several requests: the lines of infer.py."""
    service, precision = served
    if precision != "fp32":
        pytest.skip("once is enough")
    directory, name = models["fp32"]
    sentences = [example.text for example in dev_texts(workspace, 12)]
    load_script("deploy/python", "infer").main(["--model_path", str(directory / name), "--text", *sentences])
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    records = tmp_path / "texts.json"
    records.write_text("".join(json.dumps({"sentence": s}) + "\n" for s in sentences))
    rpc, http = ["--address", f"127.0.0.1:{service.rpc}"], ["--http", "--address", f"127.0.0.1:{service.http}"]
    for options, stdin in (
        ([*rpc, "--text", *sentences], None),
        ([*http, "--input_file", file, "--batch_size", 5], None),
        ([*rpc, "--input_file", records], None),
        ([*http, "--input_file", "-"], file.read_text()),
    ):
        done = client(*options, stdin=stdin)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [(r["text"], r["label"], r["truncated"]) for r in rows] == [
            (e["text"], e["label"], False) for e in expected
        ]
        for row, other in zip(rows, expected):
            assert row["probabilities"].keys() == other["probabilities"].keys()
            assert all(abs(row["probabilities"][k] - v) < 1e-4 for k, v in other["probabilities"].items())


def test_clients_exit_status(service, tmp_path):
    address = ["--address", f"127.0.0.1:{service.rpc}"]
    for options, status, words in (
        ([*address, "--text", "一", "--input_file", "-"], 2, "give either --text or --input_file"),
        ([*address, "--text", " "], 2, "text 1 is empty"),
        ([*address, "--input_file", tmp_path / "none.txt"], 2, "No such file"),
        (["--address", "nowhere", "--text", "一"], 2, "must be host:port"),
        ([*address, "--text", "一", "--text_pair", "丁"], 1, "err_no 5000: this model takes single texts"),
        ([*address, "--http", "--text", "一", "--retries", 0], 1, ""),  # HTTP spoken to the RPC port
        (["--address", "127.0.0.1:9", "--text", "一", "--retries", 1], 1, "unavailable"),
        (["--http", "--address", "127.0.0.1:9", "--text", "一", "--retries", 1], 1, "cannot be reached"),
        ([*address, "--text", "一" * 500, "--deadline", "0.0001"], 1, "deadline"),
    ):
        done = client(*options)
        assert (done.returncode == status and words in done.stderr.lower()) or words in done.stderr, done
        assert len(done.stderr.splitlines()) == 1 and not done.stdout, done
    mixed = tmp_path / "mixed.txt"
    mixed.write_text("一丁\n七万\t三上\n")
    done = client(*address, "--input_file", mixed)
    assert done.returncode == 2 and "some texts are single, others sentence pairs" in done.stderr


def test_client_knows_what_is_no_answer():
    """Another server at that address: one line, no stack trace."""
    for body in (b'{"detail": "x"}', b"[1]", b"<html>"):

        class Other(http.server.BaseHTTPRequestHandler):
            def do_POST(self, body=body):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
            threading.Thread(target=other.serve_forever, daemon=True).start()
            done = client("--http", "--address", f"127.0.0.1:{other.server_port}", "--text", "一")
            other.shutdown()
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "not an answer of this service" in done.stderr
    done = client("--http", "--address", "..:80", "--text", "一", "--retries", 0)
    assert done.returncode == 1 and done.stderr.count("\n") == 1


def test_client_asks_again_while_that_helps():
    def failing(times, again):
        def ask(fields, seconds):
            calls.append(seconds)
            if len(calls) <= times:
                raise rpc_client.Refused("busy", again)
            return "answer"

        return ask

    calls = []
    assert rpc_client.ask_again(failing(2, True), {}, 10, 3) == "answer" and len(calls) == 3
    assert calls[0] > calls[1] > calls[2]  # the deadline is that of all attempts together
    for times, again, deadline, expected in ((9, True, 10, 3), (1, False, 10, 1), (9, True, 0.25, 2)):
        calls = []
        with pytest.raises(rpc_client.Refused):
            rpc_client.ask_again(failing(times, again), {}, deadline, 2)
        assert len(calls) == expected


def test_an_engine_that_hangs_is_seen(model):
    """The event loop goes on then, so a sign of life from it alone would not do."""
    import asyncio

    import worker
    from scheduler import Job, Scheduler

    release = threading.Event()
    model.alone = type("Hanging", (), {"pool": model.engine.pool, "run": lambda self, batch: release.wait(20)})()

    async def run():
        scheduler = Scheduler(worker.PPMiniLMOp(model), 8, Metrics())
        job = Job(protocol.Query(["一丁"], None, 0), "a", time.monotonic(), scheduler)
        waiting = asyncio.ensure_future(scheduler.run(job))
        await asyncio.sleep(0.3)
        assert scheduler.is_stuck(0.2) and not scheduler.is_stuck(5)
        release.set()
        with pytest.raises(TypeError):  # what hung gives no logits
            await waiting

    asyncio.run(run())


def test_a_large_request_that_is_given_up_while_it_is_tokenized(model, monkeypatch):
    """And turns out to be wrong then: the next one is tokenized and answered all the same."""
    import asyncio

    import worker
    from scheduler import Job, Scheduler

    tokenizing, release = threading.Event(), threading.Event()
    tokenize = model.tokenize

    def slowly(texts, pairs, number=1):
        tokenizing.set()
        release.wait(20)
        return tokenize(texts, pairs, number)

    monkeypatch.setattr(model, "tokenize", slowly)

    async def run():
        scheduler, large = Scheduler(worker.PPMiniLMOp(model), 32, Metrics()), ["一丁七万丈三上下" * 20] * 9
        given_up = asyncio.ensure_future(
            scheduler.run(Job(protocol.Query([" ", *large], None, 0), "a", 0.0, scheduler))
        )
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, tokenizing.wait)
        given_up.cancel()
        await asyncio.sleep(0)
        release.set()
        logits = await asyncio.wait_for(scheduler.run(Job(protocol.Query(large, None, 0), "a", 0.0, scheduler)), 20)
        assert len(logits) == 9 and given_up.cancelled() and not scheduler.done_for

    asyncio.run(run())


def test_what_a_caller_gave_up_is_not_computed(model):
    """Of 128 texts no more than the streams have taken already, the batch that waits for them, and one or two more."""
    import asyncio

    import worker
    from scheduler import AHEAD, Job, Scheduler

    async def run():
        scheduler = Scheduler(worker.PPMiniLMOp(model), 32, Metrics())
        asked = asyncio.ensure_future(
            scheduler.run(Job(protocol.Query(["一丁七"] * 128, None, 0), "a", 0.0, scheduler))
        )
        await asyncio.sleep(0)
        asked.cancel()
        while scheduler.running:
            await asyncio.sleep(0.01)
        assert not scheduler.waiting and not scheduler.done_for

    asyncio.run(run())
    rows = sum(rows for rows, _ in (*model.shapes["streams"], *model.shapes["alone"]))
    assert 0 < rows <= (model.streams + AHEAD + 2) * model.rows[0] < 128
