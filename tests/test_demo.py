"""The demo: from generated data through every stage to an answer, killed once on the way; and its data."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import FAULTS, ROOT, load_script, warm_python

import data
from common import UserError, records

TASKS = {"tnews": 15, "afqmc": 2, "cluewsc2020": 2}


def generate(directory, *more):
    load_script("demo", "generate_data").main(["--output_dir", str(directory), "--corpus_lines", "500", *more])
    return directory


def test_generated_data_are_clues(tmp_path, monkeypatch):
    """The same seed gives the same bytes; every task reads as CLUE's does; dev has all labels and nothing of train."""
    first, again = generate(tmp_path / "a"), generate(tmp_path / "b")
    other = generate(tmp_path / "c", "--seed", "1")
    files = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert len(files) == 15 and all((first / f).read_bytes() == (again / f).read_bytes() for f in files)
    assert all((first / f).read_bytes() != (other / f).read_bytes() for f in files if "/" in f)
    monkeypatch.setenv("CLUE_DATA_DIR", str(first))
    characters = set((first / "vocab.txt").read_text().split("\n"))
    for name, classes in TASKS.items():
        task = data.get_task(name)
        splits = {split: data.read_split(task, split).examples for split in ("train", "dev", "test")}
        texts = {split: {example[:2] for example in examples} for split, examples in splits.items()}
        assert {example.label for example in splits["dev"]} == set(range(classes))
        assert {example.label for example in splits["test"]} == {None}
        assert not texts["dev"] & texts["train"] and not texts["test"] & (texts["dev"] | texts["train"])
        assert {c for text, pair in texts["dev"] for c in text + (pair or "")} <= characters | {" "}
        counts = [sum(e.label == label for e in splits["train"]) for label in range(classes)]
        assert max(counts) < 2 * min(counts)


def test_a_mentioned_topic_is_not_a_label(tmp_path, monkeypatch):
    """Topics by their words are found at once; which of them are labels, only the clauses around them tell."""
    directory = generate(tmp_path / "a")
    monkeypatch.setenv("CLUE_DATA_DIR", str(directory))
    task = data.get_task("MULTILABEL")
    assert task.objective.name == "multi_label" and len(task.labels) == 15
    topics = load_script("demo", "generate_data").TOPICS.values()
    mentioned, labelled = 0, 0
    for line in open(directory / "multilabel_public/train.json", encoding="utf-8"):
        row = json.loads(line)
        found = {t["name"][5:] for t in topics if any(thing in row["sentence"] for thing in t["things"])}
        assert set(row["labels"]) <= found
        mentioned, labelled = mentioned + len(found), labelled + len(row["labels"])
    assert 1.8 < mentioned / labelled < 3
    sizes = [int(sum(example.label)) for example in data.read_split(task, "train").examples]
    assert min(sizes.count(n) for n in (0, 1, 2, 3)) > 100 and max(sizes) == 3
    counts = [sum(e.label[i] for e in data.read_split(task, "train").examples) for i in range(15)]
    assert max(counts) > 5 * min(counts) > 100


def test_common_words_do_not_give_the_label_away(tmp_path):
    """The best that a rule can do which counts the characters of both questions that they share."""
    rows = [json.loads(line) for line in open(generate(tmp_path / "a") / "afqmc_public/train.json", encoding="utf-8")]
    shared = []
    for row in rows:
        one, other = set(row["sentence1"]), set(row["sentence2"])
        shared.append((len(one & other) / len(one | other), row["label"] == "1"))
    best = max(
        sum((share >= bound) == same for share, same in shared) / len(shared)
        for bound in {share for share, _ in shared}
    )
    assert 0.5 < best < 0.75


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout, so that the user's own demo/output stays."""
    root = tmp_path_factory.mktemp("checkout")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), root / name)
    return root


def check_last_screen(printed, output, quantized):
    """What stands after the last heading: every stage with its speed, every note once, the answer, where to go on."""
    screen = printed.split("  done: ")[1]
    lines = screen.splitlines()[1:]
    assert len(lines) <= 45 and max(map(len, lines)) <= 100, screen
    assert len(re.findall(r"^\| (?:fine-tuned|pruned to 0.75), (?:FP32|INT8 \w+) .* \| +[\d,]+ \|$", screen, re.M)) == 3
    whole = " ".join(lines)
    for note in quantized["notes"]:
        if not note.startswith(("pruning: ", "quantizing: ")):  # these say the same of later stages
            assert whole.count(note) == 1, note
    answer = json.loads((output / "answer.json").read_text())
    assert answer["text"] in screen and set(answer.get("labels", [answer.get("label")])) <= set(quantized["labels"])
    from_onnx = json.loads((output / "onnx_answer.json").read_text())
    assert answer.keys() ^ from_onnx.keys() <= {"text", "truncated"}  # of a service
    assert from_onnx["probabilities"] == pytest.approx(answer["probabilities"], abs=0.1)  # two roundings to INT8
    assert len(re.findall(r"^-> (?:no label|.*, probability [01]\.\d\d)$", screen, re.M)) == 2
    for words in ("tables.md", "clue.png", "sh run_all.sh NAME", "--data_dir DIR"):
        assert words in screen


def test_demo_from_end_to_end(checkout, tmp_path):
    """With fewer steps of pre-training: killed in the grid, resumed; everything that it says is there is there."""
    pytest.importorskip("paddle_serving_server", reason="needs Paddle Serving: bash setup_env.sh --serving")
    log = tmp_path / "log"
    env = {**os.environ, "PYTHON": warm_python(), "DEMO_STEPS": "60"}
    command = ["bash", str(checkout / "demo/run.sh"), "--task", "tnews"]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
        while "TNEWS 5e-4_32: finished" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    output = checkout / "demo/output"
    trained = {path: path.stat().st_mtime_ns for path in output.rglob("stage.json")}
    assert len(trained) >= 2 and not (output / "answer.json").exists()
    done = subprocess.run([*command, "--resume"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert all(path.stat().st_mtime_ns == when for path, when in trained.items() if "teacher" in str(path))
    assert len(list(output.glob("tnews_quant_models/*/int8.pdmodel"))) == 8
    int8 = records.read_record(str(output / "tnews_quant_models/mse4"))
    assert int8["metrics"]["accuracy"] > 0.3, int8["metrics"]  # of 15 classes
    answer = json.loads((output / "answer.json").read_text())
    assert answer["label"] in data.TASKS["tnews"].labels
    tables = (output / "tables.md").read_text()
    assert "pruned to 0.75, INT8 mse4" in tables and "random weights" in tables
    assert tables.count(" student: random weights") == 1
    check_last_screen(done.stdout, output, int8)
    assert (output / "clue.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("data", "teacher", "pruned_models", "serving_server", "onnx_model"):
        assert f"{name}/" in done.stdout and (output / name).is_dir()
    if FAULTS == "long":  # another two minutes; the parts of it have tests of their own (test_multilabel.py)
        check_several_labels(command, env, output)
    subprocess.run(["bash", str(checkout / "demo/clean.sh")], check=True)
    assert not output.exists()


def check_several_labels(command, env, output):
    """Several labels per text, from the same student, to an answer of the service."""
    done = subprocess.run([*command[:-1], "multilabel", "--resume"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    int8 = records.read_record(str(output / "multilabel_quant_models/mse4"))
    assert int8["metrics"]["macro_F1"] > 2 * int8["data"]["dev"]["constant_answer"], int8["metrics"]
    assert len({path.read_bytes() for path in output.glob("multilabel_quant_models/*/int8.pdiparams")}) == 8
    answer = json.loads((output / "answer.json").read_text())
    assert set(answer["labels"]) <= set(int8["labels"]) and len(answer["probabilities"]) == 15, answer
    check_last_screen(done.stdout, output, int8)
    tables = (output / "tables.md").read_text()
    assert "dev macro F1, %" in tables and "dev accuracy, %" in tables  # each metric has tables of its own


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--task", "IFLYTEK"], "--task IFLYTEK: must be TNEWS, AFQMC, CLUEWSC2020 or MULTILABEL"),
        (["--task"], "--task (nothing): must be"),
        (["--fast"], "unknown argument '--fast'"),
        (["--resume"], "there is no"),
    ],
)
def test_wrong_arguments(checkout, arguments, words):
    shutil.rmtree(checkout / "demo/output", ignore_errors=True)
    done = subprocess.run(["bash", str(checkout / "demo/run.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (checkout / "demo/output").exists()


def test_the_picture_is_drawn_from_the_script(tmp_path):
    """Both pictures are what the script draws: the same size, hardly a different pixel."""
    import matplotlib.image
    import numpy as np

    pytest.importorskip("pylopdf_fonts_zh_cn", reason="needs the font of the pictures: requirements/draw.txt")
    script = load_script("demo", "draw_pipeline")
    script.main(["--output_dir", str(tmp_path)])
    assert sorted(os.listdir(tmp_path)) == sorted(script.PICTURES)
    for name in script.PICTURES:
        kept, drawn = (matplotlib.image.imread(os.path.join(place, name)) for place in (ROOT, tmp_path))
        assert kept.shape == drawn.shape and kept.shape[1] == 1900 and np.abs(kept - drawn).mean() < 0.01, name


def test_the_picture_needs_its_font(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pylopdf_fonts_zh_cn", None)  # importing it fails
    with pytest.raises(UserError, match="-r requirements/draw.txt"):
        load_script("demo", "draw_pipeline").main(["--output_dir", str(tmp_path)])
    assert not os.listdir(tmp_path)
