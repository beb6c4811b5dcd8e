"""general_distill/few_labels.py: what it draws and compares, that it resumes, and what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, load_script, record, refused, warm_python

from common import files, records
from common.records import score
from data import md5_of

few_labels = load_script("general_distill", "few_labels")
learning_curves = few_labels.learning_curves


def test_labels_needed_are_read_between_the_points():
    """By the logarithm: half of the way from 100 to 10,000 is 1,000."""
    curve = [(100, 0.2), (10_000, 0.4), (20_000, 0.3)]
    for accuracy, number in ((0.3, 1000), (0.25, 10**2.5), (0.4, 10_000), (0.1, 100), (0.2, 100)):
        assert learning_curves.labels_needed(curve, accuracy) == pytest.approx(number)
    assert learning_curves.labels_needed(curve, 0.1) == 100  # not a little more: it is shown as "≤ 100"
    assert learning_curves.labels_needed(curve, 0.41) is None
    assert learning_curves.labels_needed([(50, 0.5)], 0.5) == pytest.approx(50)


@pytest.fixture(scope="module")
def place(workspace, tuned, tmp_path_factory):
    return tmp_path_factory.mktemp("few")


def arguments(workspace, place, start, *more):
    return [str(word) for word in (
        "--task_name", "topics", "--data_dir", workspace / "data", "--starts", f"distilled={start}",
        f"random={workspace / 'tiny.json'}", "--vocab_file", workspace / "vocab.txt", "--plan", "20=4", "60=4,8",
        "--learning_rates", "1e-3", "2e-3", "--seeds", 1, 2, "--max_eval_samples", 60, "--output_dir", place / "out",
        "--json", place / "few.json", "--plot", place / "few.png", *more,
    )]  # fmt: skip


def in_this_process(command, **_):
    """Instead of subprocess.run: runs run_clue.py without the seconds that a process needs to start."""
    load_script("finetuning", "run_clue").main(command[2:])
    return subprocess.CompletedProcess(command, 0)


@pytest.fixture(scope="module")
def found(workspace, tuned, place):
    """A model that knows the task already, against its random twin."""
    (place / "few.json").write_text(json.dumps({}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", in_this_process)  # a test below starts one
        return few_labels.main(arguments(workspace, place, tuned))


def test_all_starts_have_the_same_search(found, place, tuned):
    distilled, random = found["rows"]["distilled"], found["rows"]["random"]
    assert [row["labels"] for row in distilled] == [row["labels"] for row in random] == [20, 60]
    for few, more in (distilled, random):
        assert set(few["searched"]) == {"1e-3, 4 steps", "2e-3, 4 steps"}
        assert set(more["searched"]) == {f"{rate}, {steps} steps" for rate in ("1e-3", "2e-3") for steps in (4, 8)}
        for row in (few, more):
            assert row["accuracies"][0] == max(row["searched"].values()) and len(row["accuracies"]) == 2
    output = place / "out/topics/distilled/60-2"
    (setting,) = [name for name in os.listdir(output) if not name.endswith(".log")]  # the best one alone
    best = record(output / setting)
    assert best["metrics"]["accuracy"] == pytest.approx(distilled[1]["accuracies"][1], abs=1e-6)
    assert best["parent"]["weights"] == record(tuned)["weights"] and best["arguments"]["seed"] == 2
    assert (place / "few.png").read_bytes().startswith(b"\x89PNG")
    row = found["compared"]["random"][1]
    assert row["gain"] == pytest.approx(np.mean(distilled[1]["accuracies"]) - np.mean(random[1]["accuracies"]))
    assert row["gain"] > 0.3 and row["needed"] == pytest.approx(20)  # fewer than the twin's 60: it knew the task


def test_parts_are_random_draws_within_each_other(found, place):
    def sentences(name, split="train"):
        lines = (place / f"out/data/topics-{name}/{split}.json").read_text(encoding="utf-8").splitlines()
        return {json.loads(line)["sentence"] for line in lines}

    assert len(sentences("20-1")) == 20 and sentences("20-1") < sentences("60-1")
    assert len(sentences("60-1") & sentences("60-2")) < 20
    assert sentences("20-1", "dev") == sentences("60-2", "dev") and len(sentences("20-1", "dev")) == 300


def test_a_second_run_trains_nothing(found, workspace, place, tuned, monkeypatch, capsys):
    """And keeps the figures of other tasks; only what is missing is made."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("trained again"))
    tasks = json.loads((place / "few.json").read_text(encoding="utf-8"))
    (place / "few.json").write_text(json.dumps({**tasks, "other": tasks["topics"]}), encoding="utf-8")
    assert few_labels.main(arguments(workspace, place, tuned)) == found
    assert list(json.loads((place / "few.json").read_text(encoding="utf-8"))) == ["topics", "other"]
    assert "labels that distilled needs |" in capsys.readouterr().out


def test_all_records_from_a_model_of_hugging_face(found, workspace, place, monkeypatch):
    """All records: from --data_dir itself, and with the first seed only. The start's weights are those of the file."""
    bert = os.path.join(ROOT, "tests/fixtures/hugging_face/bert")
    of_bert = ["--starts", f"bert={bert}", "--model_types", "bert=bert", "--compare", "bert"]
    of_bert += ["--plan", "all=1", "--learning_rates", "1e-3", "--max_seq_length", 48, "--json", place / "bert.json"]
    monkeypatch.setattr(subprocess, "run", in_this_process)
    asked = arguments(workspace, place, bert, *of_bert)
    (row,) = few_labels.main(asked)["rows"]["bert"]
    assert row["labels"] == 2000 and len(row["accuracies"]) == 1
    assert row["record"]["data"]["train"]["md5"] == md5_of(workspace / "data/topics/train.json")
    assert row["record"]["parent"]["weights"] == files.hash_files(bert, ["model.safetensors"])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("trained again"))
    assert few_labels.main(asked)["rows"]["bert"] == [row]


def test_the_page_shows_the_results():
    """Each row of both tables of each task, in both languages."""
    with open(os.path.join(ROOT, "results/few_labels.json"), encoding="utf-8") as file:
        tasks = json.load(file)
    with open(os.path.join(ROOT, "general_distill/FEW_LABELS.md"), encoding="utf-8") as file:
        page = file.read().splitlines()
    with open(os.path.join(ROOT, "general_distill/README.md"), encoding="utf-8") as file:
        digest = [line for line in file.read().splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(digest) == 2 * len(tasks["TNEWS"]["compared"]["random"]) and set(digest) <= set(page)
    generated = set()
    for found in tasks.values():
        generated.update(learning_curves.tables_of(found["rows"], found["compare"]))
        assert found["compared"] == learning_curves.compared(found["rows"], found["compare"])
        for line in learning_curves.tables_of(found["rows"], found["compare"]):
            assert not re.match(r"\| \d+ \|", line) or page.count(line) == 2, line
    assert {line for line in page if re.match(r"\| \d+ \|", line)} <= generated  # nothing of earlier measurements


def test_the_page_shows_the_chain():
    """Accuracies, agreements and sizes of the chain's table, from the records of its stages."""
    with open(os.path.join(ROOT, "results/few_labels_chain.json"), encoding="utf-8") as file:
        chain = json.load(file)
    with open(os.path.join(ROOT, "general_distill/FEW_LABELS.md"), encoding="utf-8") as file:
        lines = file.read().splitlines()
    page = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines if line.startswith("|")]

    def size(number):
        return f"{number / 1e6:.1f}"

    def span(metric, variants):
        values = [100 * variant["metrics"][metric] for variant in variants]
        return f"{min(values):.2f}-{max(values):.2f}"

    for stage, width in (("finetune", 1.0), ("prune_export", 0.75)):
        (model,) = [one for one in chain if one["stage"] == stage and "bytes" in one["export"]]  # the deployed one
        variants = [one for one in chain if one["stage"] == "quantize" and one["model"]["width_mult"] == width]
        assert len(variants) == 8 and {one["metrics"]["fp32_accuracy"] for one in variants} == {score(model)}
        (quantized_size,) = {one["metrics"]["bytes"] for one in variants}
        wanted = [f"{100 * score(model):.2f}", "", size(model["export"]["bytes"])]
        assert page.count(wanted) == 2, wanted
        wanted = [span("accuracy", variants), span("agreement", variants), size(quantized_size)]
        assert page.count(wanted) == 2, wanted


def test_a_whole_config_is_a_start(found, place, workspace, tmp_path):
    """With fields that are no part of an architecture, or empty, or of another vocabulary."""
    whole = tmp_path / "config.json"
    made = record(place / "out/topics/random/20-1/1e-3_4")
    whole.write_text(json.dumps({**TINY, "architectures": ["Model"], "num_labels": None, "vocab_size": 5}))
    assert few_labels.is_from(made, str(whole)) and few_labels.is_from(made, str(workspace / "tiny.json"))
    whole.write_text(json.dumps({**TINY, "hidden_size": 32}))
    assert not few_labels.is_from(made, str(whole))
    # Nor is a random start one from a built-in model, or from a directory that nothing is recorded of.
    made["model"]["initialized_from"] = "ppminilm-6l-768h"
    assert few_labels.is_from(made, "ppminilm-6l-768h") and not few_labels.is_from(made, str(workspace / "tiny.json"))
    assert not few_labels.is_from(made, str(tmp_path)) and not few_labels.is_from(made, "ernie-1.0")


def test_what_does_not_fit_is_refused(found, workspace, place, tuned, tmp_path, capsys, monkeypatch):
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps({**TINY, "intermediate_size": 256}))
    untrained = tmp_path / "untrained"
    shutil.copytree(tuned, untrained)
    (untrained / records.RECORD).unlink()
    for start, more, words in (
        (tuned, ["--batch_size", 16], ["made with batch_size 32", "remove it"]),
        (tuned, ["--plan", "3000=4"], ["--plan 3000", "2000 train records"]),
        (tuned, ["--plan", "20"], ["LABELS=STEPS"]),
        (tuned, ["--plan", "20=4", "20=8"], ["--plan", "twice"]),
        (tuned, ["--plan", "2000=4", "all=4"], ["--plan 2000", "which is all"]),
        (tuned, ["--seeds", 1, 1], ["--seeds", "different"]),
        (tuned, ["--model_types", "random=brt"], ["--model_types brt", "ppminilm"]),
        (tuned, ["--json", place / "out/topics/distilled/20-1/1e-3_4/stage.json"], ["holds something else"]),
        (tuned, ["--plot", tmp_path / "absent/few.png"], ["--plot", "no such directory"]),
        (tuned, ["--learning_rates", "5e-4,1e-3"], ["'5e-4,1e-3'", "not a number above 0"]),
        (tuned, ["--max_eval_samples", 50], ["made with max_eval_samples 60"]),
        (tuned, ["--max_train_samples", 500], ["drawn from other data"]),
        (tuned, ["--compare", "distilled", "twin"], ["twin", "distilled, random"]),
        (tmp_path / "absent", [], ["distilled=", "no file, no directory with weights", "built-in"]),
        (untrained, [], ["made with another start"]),
        (tuned, ["--starts", f"distilled={tuned}", f"random={wide}"], ["made with another start"]),
    ):
        refused(capsys, tmp_path / "none", words, few_labels.main, arguments(workspace, place, start, *more))
    monkeypatch.setattr(sys, "executable", warm_python())
    words = ["random has not the architecture of distilled"]
    more = ["--plan", "20=1", "--learning_rates", "1e-3", "--seeds", 1, "--output_dir", tmp_path / "few"]
    refused(capsys, tmp_path / "none", words, few_labels.main, arguments(workspace, place, wide, *more))
    more += ["--max_seq_length", 9999, "--output_dir", tmp_path / "other"]
    words = ["status 2", "--max_seq_length 9999", ".log"]
    refused(capsys, tmp_path / "none", words, few_labels.main, arguments(workspace, place, wide, *more))
