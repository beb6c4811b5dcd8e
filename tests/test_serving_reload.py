"""Another model takes the place of the one in service without a pause; a bad one is refused and the old one goes on."""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import signal
import threading
import time

import pytest
from conftest import Service

pytest.importorskip("paddle_serving_server", reason="needs Paddle Serving: bash setup_env.sh --serving")
import data
import grpc
import numpy as np
import protocol
import serving_load
from common import batching, engine, tokenization
from test_serving_life import until
from test_serving_watch import counters


RELOADS = 5  # odd, so that the last one changes the model; test_soak.py has more of them


@pytest.fixture(scope="module")
def examples(workspace):
    data_dir = str(workspace / "data")
    return data.read_split(data.get_task("topics", data_dir), "dev", data_dir).examples[:200]


@pytest.fixture(scope="module")
def logits(models, examples):
    """{precision: logits of the examples}, computed offline."""
    found = {}
    for precision in ("fp32", "int8"):
        directory, name = models[precision]
        tokenizer = tokenization.load_tokenizer(str(directory))
        features = batching.convert(examples, tokenizer, 64)
        runner = engine.Engine(str(directory / name), "cpu", precision)
        found[precision] = runner.predict(features, pad_id=tokenizer.pad_id)
    return found


def point(link, directory):
    """The link leads to another directory, from one moment to the next."""
    new = link.with_name("new")
    new.symlink_to(directory)
    new.replace(link)


def said(service, words, times=1):
    until(lambda: service.stderr.read_text().count(words) >= times, 60)


class Load:
    """Clients by HTTP and RPC that ask one text after another; ``answers``: (number of a text, its logits, when)."""

    def __init__(self, service, examples):
        self.service, self.examples = service, examples
        self.answers, self.failed, self.stop = [], [], threading.Event()
        self.threads = [threading.Thread(target=self.ask, args=(n, n % 3 == 2), daemon=True) for n in range(6)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.end()

    def end(self):
        self.stop.set()
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads)

    def ask(self, seed, over_rpc):
        rng = np.random.default_rng(seed)
        with contextlib.ExitStack() as stack:
            if over_rpc:
                channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{self.service.rpc}"))
                pb = protocol.messages()
                call = channel.unary_unary(
                    protocol.METHOD, lambda one: one.SerializeToString(), response_deserializer=pb.Response.FromString
                )
            else:
                connection = http.client.HTTPConnection("127.0.0.1", self.service.http, timeout=60)
                stack.callback(connection.close)
            while not self.stop.is_set():
                number = int(rng.integers(len(self.examples)))
                # Some are so large that they are read one at a time, each of them the same text several times.
                copies = 120 if seed == 0 and rng.random() < 0.2 else 1
                texts = [self.examples[number].text] * copies
                started = time.monotonic()
                try:
                    if over_rpc:
                        response = call(pb.Request(key=["texts"], value=[json.dumps(texts)]), timeout=60)
                        row = json.loads(dict(zip(response.key, response.value))["logits"])[-1]
                    else:
                        body = json.dumps({"texts": texts})
                        connection.request("POST", "/ppminilm/prediction", body)
                        row = json.loads(connection.getresponse().read())["logits"][-1]
                except Exception as error:
                    self.failed.append((over_rpc, repr(error)))
                    continue
                self.answers.append((number, row, started))


def wrong(answers, references, tolerance=0.01):
    """The answers that are those of none of the references."""
    return [
        (number, row)
        for number, row, _ in answers
        if min(np.abs(np.subtract(row, logits[number])).max() for logits in references) > tolerance
    ]


def test_replaced_under_load(models, examples, logits, tmp_path):
    """By a changed link and by SIGHUP: no answer is wrong, none is lost; then only the last model answers."""
    link = tmp_path / "current"
    link.symlink_to(models["fp32"][0])
    assert serving_load.confusable(logits["int8"], 0.01) < 0.05
    apart = np.abs(logits["fp32"] - logits["int8"]).max(axis=1)
    assert np.median(apart) > 0.01, "the models cannot be told apart"
    with Service(tmp_path, link) as service, Load(service, examples) as load:
        for number in range(1, 1 + RELOADS):
            time.sleep(0.5)
            if number % 2:
                point(link, models["int8" if number % 4 == 1 else "fp32"][0])
            else:  # the same model once more
                os.kill(service.process.pid, signal.SIGHUP)
            said(service, "web_service.py: reloaded, ", number)
        switched = time.monotonic()
        time.sleep(1)
        load.end()
        after = [answer for answer in load.answers if answer[2] > switched]
        counted = counters(service)
        lines = service.stderr.read_text().splitlines()
    assert not load.failed, load.failed[:5]
    assert len(load.answers) > 200 and not wrong(load.answers, logits.values())
    assert len(after) > 20 and not wrong(after, [logits["int8"]])
    assert counted[("ppminilm_reloads_total", (("outcome", "reloaded"),))] == RELOADS
    assert lines[0].startswith("web_service.py: reloaded, ") and lines[0].endswith(" (int8)") and len(lines) == RELOADS


def test_a_bad_model_is_refused(models, examples, logits, pair_model, tmp_path):
    """One line each; the old one goes on, also in a worker that is started anew."""
    good, link = models["int8"][0], tmp_path / "current"
    link.symlink_to(good)
    damaged, empty, other = tmp_path / "damaged", tmp_path / "empty", tmp_path / "other"
    shutil.copytree(good, damaged)
    weights = bytearray((damaged / "int8.pdiparams").read_bytes())
    weights[len(weights) // 2] ^= 1
    (damaged / "int8.pdiparams").write_bytes(weights)
    empty.mkdir()
    # A graph that Paddle cannot read, though it is the one that its record names.
    shutil.copytree(good, other)
    no_graph = b"quantize_linear is no graph"
    (other / "int8.pdmodel").write_bytes(no_graph)
    record = json.loads((other / "stage.json").read_text())
    record["weights"]["int8.pdmodel"] = hashlib.sha256(no_graph).hexdigest()
    (other / "stage.json").write_text(json.dumps(record))
    with Service(tmp_path, link) as service, Load(service, examples) as load:
        worker = service.worker()
        refused = 0
        for bad, words in (
            (damaged, "int8.pdiparams"),
            (empty, "a directory with 0 graphs"),
            (pair_model, "takes sentence pairs"),
            (other, "ended the process that tried, by signal"),
        ):
            point(link, bad)
            refused += 1
            said(service, "not reloaded, the service goes on as it was: ", refused)
            assert words in service.stderr.read_text().splitlines()[-1]
        time.sleep(1)  # it is not tried again and again
        os.kill(service.process.pid, signal.SIGHUP)  # but by hand it is
        said(service, "not reloaded", refused + 1)
        link.unlink()
        link.symlink_to(tmp_path / "nowhere")
        said(service, "not reloaded", refused + 2)
        assert service.worker() == worker
        load.end()
        counted = counters(service)
        os.kill(worker, signal.SIGKILL)
        until(lambda: "starting it anew" in service.stderr.read_text())
        service.__enter__()
        assert service.post({"text": examples[0].text})[0] == 200
        assert counters(service)[("ppminilm_worker_restarts_total", ())] == 1
        (tmp_path / "config.yml").write_text("max_texts: none\n")
        os.kill(service.process.pid, signal.SIGHUP)  # refused by the supervisor, and counted by the worker
        said(service, "not reloaded, the service goes on as it was: --config ")
        until(lambda: counters(service)[("ppminilm_reloads_total", (("outcome", "refused"),))] == 1)
        lines = service.stderr.read_text().splitlines()
    assert not load.failed, load.failed[:5]
    assert load.answers and not wrong(load.answers, [logits["int8"]])
    assert counted[("ppminilm_reloads_total", (("outcome", "refused"),))] == refused + 2
    assert len([line for line in lines if "not reloaded" in line]) == refused + 3


def test_other_settings_need_a_restart(models, tmp_path):
    with Service(tmp_path, models["int8"][0]) as service:
        (tmp_path / "config.yml").write_text(json.dumps({"max_texts": 7, "grace_ms": 4000}))
        os.kill(service.process.pid, signal.SIGHUP)
        said(service, "web_service.py: reloaded, ")
        lines = service.stderr.read_text().splitlines()
        assert lines[0] == "web_service.py: note: a restart is needed for max_texts, grace_ms"
        (tmp_path / "config.yml").write_text("max_texts: none\n")
        os.kill(service.process.pid, signal.SIGHUP)
        said(service, "not reloaded, the service goes on as it was: --config ")
        assert service.post({"texts": ["一"] * 8})[0] == 200
