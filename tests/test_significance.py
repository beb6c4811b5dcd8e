"""Which figures differ by more than chance: against sums by hand and scikit-learn; and what the tables mark."""

import csv
import io
import json
import math

import numpy as np
import pytest
from common import objectives, predictions, significance
from conftest import load_script
from sklearn.metrics import f1_score

from test_tables import output, write


def test_mcnemar_against_its_sum():
    random = np.random.default_rng(0)
    for share in (0.5, 0.7, 0.95):
        one, other = random.random((2, 200)) < [[0.7], [share]]
        counts = sorted([int((one & ~other).sum()), int((other & ~one).sum())])
        tail = sum(math.comb(sum(counts), k) for k in range(counts[0] + 1)) / 2 ** sum(counts)
        assert significance.mcnemar(one, other) == pytest.approx(min(1, 2 * tail))
    assert significance.mcnemar(one, one) == 1


@pytest.mark.parametrize("metric", significance.OF_RESAMPLES)
def test_bootstrap_against_scikit_learn(metric, monkeypatch):
    """The same resamples, one after the other, scored by scikit-learn; and the verdict on what is known to differ."""
    random, names = np.random.default_rng(1), np.arange(3)
    truth = random.integers(0, 3, 80)
    one = np.where(random.random(80) < 0.8, truth, 2)
    other = np.where(random.random(80) < 0.65, truth, 0)
    as_bools = [answers[:, None] == names for answers in (one, other, truth)]
    monkeypatch.setattr(significance, "RESAMPLES", 60)
    again, differences = np.random.default_rng(0), []
    for index in (row for _ in range(10) for row in again.integers(0, 80, (6, 80))):
        every = {"labels": names, "average": metric.split("_")[0], "zero_division": 0}
        differences.append(f1_score(truth[index], one[index], **every) - f1_score(truth[index], other[index], **every))
    rarer = min(sum(d <= 0 for d in differences), sum(d >= 0 for d in differences))
    assert 0 < rarer < 30 and significance.p_value(metric, *as_bools) == pytest.approx(2 * (rarer + 1) / 61)
    assert significance.bootstrap(metric, as_bools[2], as_bools[1], as_bools[2]) == pytest.approx(2 / 61)  # never 0
    assert significance.bootstrap(metric, as_bools[0], as_bools[0], as_bools[2]) == 1


def test_a_test_finds_nothing_as_often_as_it_says():
    """Two models that are equally good: at most 5 % of the trials have p below 0.05, and a bootstrap not far more."""
    random, low = np.random.default_rng(2), {"accuracy": 0, "macro_F1": 0}
    for _ in range(200):
        truth = random.random((150, 1)) < [[0.3]]
        truth = np.concatenate([truth, ~truth], axis=1)
        one, other = (np.where(random.random((150, 1)) < 0.8, truth, ~truth) for _ in range(2))
        for metric in low:
            low[metric] += significance.p_value(metric, one, other, truth) <= significance.LEVEL
    assert low["accuracy"] <= 14 and 1 <= low["macro_F1"] <= 20, low


def test_what_is_near_the_best():
    objective, random = objectives.Classification(), np.random.default_rng(3)
    targets = random.integers(0, 4, 300)
    best = np.eye(4)[targets]
    one_off, bad = best.copy(), np.roll(best, 1, axis=1)
    one_off[0] = bad[0]
    decided = {name: objective.decide(logits) for name, logits in (("a", best), ("b", one_off), ("c", bad))}
    marks, explained = significance.near("a", decided, objective, targets)
    assert marks == {"b": "≈"} and "McNemar's exact test finds, p > 0.05" in explained
    marks, explained = significance.near("a", decided, objective.selecting_by("macro_f1"), targets)
    assert marks == {"b": "≈"} and "a paired bootstrap of 1000 resamples finds" in explained
    own = objectives.Objective()
    assert significance.near("a", {"a": own.decide(best), "b": None}, own, targets)[0] == {}
    assert own.right(best, targets) is None and objective.right(one_off, targets).sum() == 299
    several = np.float32([[1, 0], [1, 1]])
    assert objectives.MultiLabel().right(np.float32([[3, -3], [3, -3]]), several).tolist() == [True, False]


DEV = np.array([0, 1] * 5)


def family(root, metric="accuracy"):
    """A fine-tuned model that is right on all ten dev records, pruned (9 right), and INT8 of both: 8 and 2 right."""
    objective = {"name": "classification", "metric": metric}
    more = {"objective": objective, "metrics": {"macro_F1": 0.5, "bytes": 9, "agreement": 0.9}}
    graph = {"weights": {"float.pdiparams": "g"}, "bytes": 9}
    write(root / "m/models/TNEWS/1e-4_32", "finetune", "TNEWS", 1.0, "t", **more, export=graph)
    write(root / "p/best", "prune", "TNEWS", 0.9, "p", "t", 0.75, **more)
    export = {"weights": {"float.pdiparams": "s"}, "bytes": 9}
    write(root / "p/static", "prune_export", "TNEWS", 0.9, "x", "p", 0.75, **more, export=export)
    variant = {"variant": {"algorithm": "mse", "calib_samples": 4}}
    write(root / "q/good", "quantize", "TNEWS", 0.8, "a", "x", 0.75, **more, **variant)
    write(root / "q/bad", "quantize", "TNEWS", 0.2, "b", "t", **more, **variant)
    right = {"m/models/TNEWS/1e-4_32": 10, "p/best": 9, "q/good": 8, "q/bad": 2}
    for place, count in right.items():
        answers = np.where(np.arange(10) < count, DEV, 1 - DEV)
        predictions.write(str(root / place), np.eye(2)[answers], DEV)


def marked(text):
    """{row: figure, with its mark} of the table of a family."""
    cells = [
        [cell.strip() for cell in line.split("|")[1:3]]
        for line in text.splitlines()
        if ", FP32 |" in line or "INT8 mse" in line
    ]
    return dict(cells)


def test_tables_mark_what_is_within_the_noise(tmp_path, capsys):
    family(tmp_path)
    text = output(capsys, tmp_path)
    assert marked(text) == {
        "fine-tuned, FP32": "100.00",
        "pruned to 0.75, FP32": "90.00 ≈",
        "pruned to 0.75, INT8 mse4 (best INT8)": "80.00 ≈",
        "fine-tuned, INT8 mse4": "20.00",
    }
    assert text.count("McNemar's exact test finds, p > 0.05; 3 models compared.") == 1
    short = output(capsys, tmp_path, "--format", "short")
    assert "≈90.00 %" in short and "≈80.00 %" in short and " 20.00 %" in short and "≈: no difference" in short
    rows = list(csv.DictReader(io.StringIO(output(capsys, tmp_path, "--format", "csv"))))
    found = {row["row"]: row["p_value"] for row in rows if row["table"] == "models"}
    assert float(found["fine-tuned, INT8 mse4"]) == pytest.approx(2 / 2**8) and found["fine-tuned, FP32"] == ""
    # A model that scored other dev data, or as many of its records, is compared with none.
    for name in ("md5", "examples"):
        path = tmp_path / "q/good/stage.json"
        record = json.loads(path.read_text())
        record["data"]["dev"][name] = "2" if name == "md5" else 9
        if name == "examples":
            predictions.write(str(tmp_path / "q/good"), np.eye(2)[DEV[:9]], DEV[:9])
        path.write_text(json.dumps(record))
        text = output(capsys, tmp_path)
        assert marked(text)["pruned to 0.75, INT8 mse4 (best INT8)"] == "80.00" and "2 models compared" in text
    # Damaged answers take the marks of what is compared with them, and nothing else: here both FP32 models' INT8.
    before = marked(text)
    (tmp_path / "m/models/TNEWS/1e-4_32" / predictions.FILE).write_bytes(b"broken")
    load_script("", "summarize").main([str(tmp_path)])
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("warning: ") and "≈" in said.err
    assert "1e-4_32/dev_logits.npz: damaged" in said.err and "repeat the stage" in said.err
    assert marked(said.out) == {row: figure.rstrip(" ≈") for row, figure in before.items()}
    assert "models compared" not in said.out


def test_another_metric_has_its_own_tables_and_test(tmp_path, capsys):
    """A CLUE task selected by macro F1 stands beside no published figure, but in all other tables."""
    family(tmp_path, "macro_F1")
    text = output(capsys, tmp_path)
    assert "CLUE dev accuracy" not in text and "dev macro F1, %" in text
    assert marked(text)["pruned to 0.75, FP32"].endswith("≈") and not marked(text)["fine-tuned, INT8 mse4"].endswith(
        "≈"
    )
    assert "a paired bootstrap of 1000 resamples finds" in text
    assert "macro F1 " in (short := output(capsys, tmp_path, "--format", "short")) and "≈50.00 %" in short
    # Of a task with cells of two metrics, best.json names the best one of the metric that most of them have.
    for number, metric in enumerate(("accuracy", "accuracy", "macro_F1")):
        objective = {"name": "classification", "metric": metric}
        more = {"objective": objective, "metrics": {"macro_F1": 0.9 + number / 100}, "rate": number + 1.0}
        write(tmp_path / f"m/models/AFQMC/{number}", "finetune", "AFQMC", 0.5 + number / 100, f"c{number}", **more)
    load_script("", "summarize").write_best(str(tmp_path / "m"))
    best = json.loads((tmp_path / "m/best.json").read_text())
    assert (
        best["AFQMC"]["path"] == "models/AFQMC/1" and best["AFQMC"]["cells"] == 2 and best["TNEWS"]["macro_F1"] == 0.5
    )


def test_infer_marks_what_is_near_the_best(quantized, workspace, capsys):
    paths = [str(quantized / name) for name in ("mse4", "mse8")]
    load_script("deploy/python", "infer").main(
        ["--int8", "--model_path", *paths, "--data_dir", str(workspace / "data")]
    )
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.rstrip(" |").split()[-1] for line in lines[2:4]) == ["(best)", "≈"]
    assert lines[4].startswith("≈: no difference from the best one that McNemar's exact test finds")
