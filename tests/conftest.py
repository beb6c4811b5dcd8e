"""Fixtures: a small vocabulary, small CLUE-like data that a tiny model can learn, and the chain of stages run on them."""

import atexit
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [
    ROOT,
    *(
        os.path.join(ROOT, d)
        for d in (
            "finetuning",
            "pruning",
            "quantization",
            "deploy/python",
            "deploy/serving",
            "deploy/benchmark",
            "deploy/onnx",
            "general_distill",
            "demo",
        )
    ),
]

import pytest
from common import cli, records

FAULTS = os.environ.get("FAULTS")  # None, or how hard tests/faults.sh tries: short, long

FILLER = [chr(0x4E00 + i) for i in range(200)]
TOPICS = {"体育": "足篮球赛", "财经": "股银钱债", "娱乐": "影歌星剧", "科技": "芯网码云"}
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
}


def load_script(directory, name):
    """The module of a stage script; two stages have an export_model.py, so they go by their paths."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        f"{directory}_{name}".replace("/", "_"), os.path.join(ROOT, directory, f"{name}.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.lru_cache(None)
def warm_python():
    """Path of a Python for launchers that has Paddle imported already (tests/warm.py)."""
    directory = tempfile.mkdtemp()
    path, warm = os.path.join(directory, "socket"), os.path.join(ROOT, "tests", "warm.py")
    server = subprocess.Popen([sys.executable, warm, "--serve", path], preexec_fn=cli.die_with_parent)
    atexit.register(shutil.rmtree, directory)
    atexit.register(server.kill)
    python = os.path.join(directory, "python")
    with open(python, "w") as file:
        file.write(f'#!/bin/sh\nexec "{sys.executable}" "{warm}" "{path}" "$@"\n')
    os.chmod(python, 0o755)
    while not os.path.exists(path):
        assert server.poll() is None, "warm.py did not start"
        time.sleep(0.05)
    return python


def sh(script, *args, cwd, check=True, **env):
    """Runs a launcher with plain ``sh``; returns the finished process, its output as text."""
    done = subprocess.run(
        ["sh", os.path.join(ROOT, script), *map(str, args)],
        cwd=cwd,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHON": warm_python(), **env},
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def sentence(rng, topic):
    """Filler of 3 to 40 characters with two different characters of the topic somewhere in it."""
    chars = [rng.choice(FILLER) for _ in range(rng.randint(3, 40))]
    for char in rng.sample(TOPICS[topic], 2):
        chars.insert(rng.randint(0, len(chars)), char)
    return "".join(chars)


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


TABLE = {}  # fault: [how it is caused, times tried, outcome]


@pytest.fixture
def fault(request):
    """fault(what, how it is caused, times tried, outcome): a row for the table of tests/faults.sh, if the test passes."""
    said = []
    yield lambda *row: said.append(row)
    for what, how, times, outcome in [] if request.node.failed else said:
        TABLE.setdefault(what, [how, 0, outcome])[1] += times


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    item.failed = getattr(item, "failed", False) or report.failed
    if report.failed or report.skipped:
        TABLE[item.name] = ["", 0, "FAILED" if report.failed else "skipped"]


def pytest_sessionfinish(session):
    """Of tests/faults.sh: prints the table, and puts it into tests/README.md with LONG=1 if all was tried and passed."""
    if not FAULTS or not TABLE:
        return
    rows = "".join(f"| {what} | {how} | {times} | {outcome} |\n" for what, (how, times, outcome) in TABLE.items())
    table = f"| fault | how it is caused | times | outcome |\n| --- | --- | --- | --- |\n{rows}"
    print(f"\n\n{table}")
    if FAULTS == "long" and not session.testsfailed and not session.config.option.keyword:
        path = os.path.join(ROOT, "tests/README.md")
        with open(path, encoding="utf-8") as file:
            before, rest = file.read().split("<!-- table -->\n")
        after = rest[rest.index("<!-- end of the table -->") :]
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"{before}<!-- table -->\n{table}{after}")


def refused(capsys, out, words, function, *arguments):
    """Checks that a call is a user's mistake: one line with these words, status 2, and nothing written."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(functools.partial(function, *arguments))
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if ": error: " in line]
    assert stopped.value.code == 2 and len(errors) == 1 and "Traceback" not in said, said
    assert all(word in errors[0] for word in words), errors
    assert not out.exists() and not list(out.parent.glob(".out*")), list(out.parent.iterdir())


@pytest.fixture(autouse=True)
def no_data_of_the_user(monkeypatch):
    """Tests use what they generate, unless they ask for CLUE_DATA_DIR by its fixture."""
    monkeypatch.delenv("CLUE_DATA_DIR", raising=False)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A directory with ``vocab.txt``, ``tiny.json``, ``data/`` (own task ``topics``) and ``data/cluewsc2020_public`` etc."""
    root = tmp_path_factory.mktemp("workspace")
    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *FILLER,
        *sorted(set("".join(TOPICS.values()))),
        *"_[]是否，。0123456789",
    ]
    (root / "vocab.txt").write_text("".join(f"{token}\n" for token in dict.fromkeys(vocab)), encoding="utf-8")
    (root / "tiny.json").write_text(json.dumps(TINY))
    rng = random.Random(1)
    topics, data = list(TOPICS), root / "data"
    (data / "topics").mkdir(parents=True)
    for split, count in (("train", 2000), ("dev", 300)):
        chosen = [rng.choice(topics) for _ in range(count)]
        write_rows(data / "topics" / f"{split}.json", [{"sentence": sentence(rng, t), "label": t} for t in chosen])
    (data / "topics" / "labels.json").write_text(json.dumps(topics, ensure_ascii=False), encoding="utf-8")

    def pair(label):
        topic = rng.choice(topics)
        other = topic if label == "1" else rng.choice([t for t in topics if t != topic])
        return {"sentence1": sentence(rng, topic), "sentence2": sentence(rng, other), "label": label}

    def pronoun(label):
        noun, filler = "".join(rng.sample(FILLER, 2)), "".join(rng.choice(FILLER) for _ in range(9))
        text = f"{noun}，{filler}他{filler[:3]}"
        return {
            "target": {"span1_index": 0, "span1_text": noun, "span2_index": text.index("他"), "span2_text": "他"},
            "text": text,
            "label": label,
        }

    for task, make, labels in (("afqmc", pair, "01"), ("cluewsc2020", pronoun, ("true", "false"))):
        (data / f"{task}_public").mkdir()
        for split, count in (("train", 60), ("dev", 30)):
            write_rows(data / f"{task}_public" / f"{split}.json", [make(rng.choice(labels)) for _ in range(count)])
    return root


@pytest.fixture(scope="session")
def tuned(workspace):
    """A tiny model that has learnt ``topics``, fine-tuned and exported by the launcher and the script."""
    sh(
        "finetuning/run_clue.sh",
        "topics",
        "2e-3",
        32,
        6,
        64,
        0,
        "tiny",
        "--init_config",
        "tiny.json",
        "--vocab_file",
        "vocab.txt",
        "--data_dir",
        "data",
        "--group_by_length",
        cwd=workspace,
    )
    directory = workspace / "tiny/models/topics/2e-3_32"
    load_script("finetuning", "export_model").main(
        ["--task_name", "topics", "--model_path", str(directory), "--data_dir", str(workspace / "data")]
    )
    return directory


@pytest.fixture(scope="session")
def pruned(workspace, tuned):
    """The directory of ``topics`` under pruned_models, with widths 0.75 and 0.5 exported."""
    sh(
        "pruning/prune.sh",
        "topics",
        "1e-3",
        32,
        2,
        64,
        0,
        tuned,
        "0.75 0.5",
        "--data_dir",
        "data",
        "--group_by_length",
        cwd=workspace,
    )
    sh("pruning/export.sh", "pruned_models", "topics", "--data_dir", "data", cwd=workspace)
    return workspace / "pruned_models/topics"


@pytest.fixture(scope="session")
def quantized(workspace, pruned):
    """The directory with the eight quantized variants of width 0.75."""
    done = sh("quantization/quant.sh", "topics", pruned / "0.75/sub_static", "--data_dir", "data", cwd=workspace)
    (workspace / "quant.log").write_text(done.stdout)
    return workspace / "topics_quant_models"


def record(directory):
    return records.read_record(str(directory))


class Service:
    """web_service.py as a process: ``http``, ``rpc`` are its ports, ``logs`` its directory of logs."""

    def __init__(self, directory, model, *options, settings=None, env=None, cwd=None, shell=None):
        from serving_load import free_port

        self.http, self.rpc, self.directory = free_port(), free_port(), directory
        self.logs = directory / "PipelineServingLogs"
        config = directory / "config.yml"
        config.write_text(json.dumps(settings or {}))
        script = os.path.join(ROOT, "deploy/serving/web_service.py")
        command = [sys.executable, script, "--config", config, "--model", model, "--log_dir", directory]
        command += ["--http_port", self.http, "--rpc_port", self.rpc, *options]
        if shell:  # a line that ends with: exec "$0" "$@"
            command = ["bash", "-c", shell, *command]
        self.stdout, self.stderr = directory / "stdout", directory / "stderr"
        with open(self.stdout, "wb") as out, open(self.stderr, "wb") as err:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=out, stderr=err, cwd=cwd, env={**os.environ, **(env or {})}
            )

    def __enter__(self):
        import rpc_client

        for _ in range(60):
            if rpc_client.wait_ready("127.0.0.1", self.http, 2):
                return self
            if self.process.poll() is not None:
                break
        self.__exit__()
        raise AssertionError(self.stderr.read_text())

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(30)

    def post(self, body, path="/ppminilm/prediction", **kwargs):
        """(HTTP status, answer) to a body: bytes, or an object to send as JSON."""
        import requests

        kwargs.setdefault("method", "POST")
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        reply = requests.request(url=f"http://127.0.0.1:{self.http}{path}", data=data, timeout=60, **kwargs)
        return reply.status_code, reply.json()

    def call(self, message, timeout=60):
        """The Response to a Request, or to bytes, over RPC."""
        import grpc

        import protocol

        with grpc.insecure_channel(f"127.0.0.1:{self.rpc}") as channel:
            data = message if isinstance(message, bytes) else message.SerializeToString()
            deserializer = protocol.messages().Response.FromString
            return channel.unary_unary(protocol.METHOD, response_deserializer=deserializer)(data, timeout=timeout)

    def worker(self):
        """The process id of the one that holds the model."""
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        return int(open(path).read().split()[0])


def at_once(count, ask):
    """What ``count`` calls of ask(), started together, return, each with its seconds."""
    outcomes, together = [], threading.Barrier(count)

    def call():
        together.wait()
        started = time.monotonic()
        result = ask()
        outcomes.append((result, time.monotonic() - started))

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def settings_of(batch_size=32, **others):
    return {"op": {"ppminilm": {"batch_size": batch_size}}, **others}


@pytest.fixture(scope="session")
def pair_model(workspace):
    """A tiny, hardly trained AFQMC model, exported."""
    sh(
        "finetuning/run_clue.sh", "afqmc", "1e-3", 32, 1, 64, 0, "pairs", "--init_config", "tiny.json", "--vocab_file",
        "vocab.txt", "--data_dir", "data", "--max_steps", 2, cwd=workspace,
    )  # fmt: skip
    directory = workspace / "pairs/models/AFQMC/1e-3_32"
    load_script("finetuning", "export_model").main(
        ["--task_name", "afqmc", "--model_path", str(directory), "--data_dir", str(workspace / "data")]
    )
    return directory


@pytest.fixture(scope="session")
def models(pruned, quantized):
    """{precision: (directory, file prefix)} of ``topics``."""
    single = pruned / "0.75/sub_static"
    return {"fp32": (single, "float"), "bf16": (single, "float"), "int8": (quantized / "mse4", "int8")}


@pytest.fixture(scope="session")
def service(models, tmp_path_factory):
    """One INT8 service with small limits."""
    settings = settings_of(max_body_bytes=20_000, max_texts=50)
    with Service(tmp_path_factory.mktemp("service"), models["int8"][0], settings=settings) as service:
        yield service
