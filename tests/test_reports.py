"""--report: figures against counting by hand, planted flips, what the page shows and hides, refusals, all three callers."""

import dataclasses
import html
import json
import math
import re
import shutil

import numpy as np
import pytest
from conftest import load_script, refused, write_rows

import summarize
from common import batching, engine, objectives, predictions, records, reports
from test_significance import family
from test_tables import write

LABELS = ["108", "109", "110"]
NAMES = ["教育", "科技", "<b>军事</b>"]


def record_of(objective=None, labels=LABELS, names=NAMES, stage="finetune"):
    """What a report reads of a record."""
    described = (objective or objectives.Classification()).describe()
    return {
        "task": "TOPICS", "stage": stage, "labels": labels, "objective": described, "params": 10, "flops": 20,
        "model": {"width_mult": 1.0, "label_names": names}, "arguments": {"max_seq_length": 64}, "weights": {"w": "0a"},
        "notes": ["random weights"], "data": {"dev": {"md5": "5e", "examples": 3, "partial": "3 of 9 records"}},
        "metrics": {described["metric"]: 0.5, "bytes": 10**6}, "variant": {"algorithm": "mse", "calib_samples": 4},
    }  # fmt: skip


def examples_of(targets, text="文本 {}", pair=None):
    return [batching.Example(text.format(i), pair, target, i + 1) for i, target in enumerate(targets)]


def written(directory, models, examples, **options):
    """(report.json, report.html) of models: (record, logits)."""
    rows = [
        (f"place/{i}", record, "fp32", 48, np.array(logits, "float32")) for i, (record, logits) in enumerate(models)
    ]
    dev = {"file": "x/dev.json", "md5": "5e", "majority_class": 0.5, "partial": None}
    reports.write(str(directory), rows, dev, examples, options.pop("count", 20), **options)
    assert sorted(path.name for path in directory.iterdir()) == ["report.html", "report.json"]
    return json.loads((directory / "report.json").read_text()), (directory / "report.html").read_text()


def test_figures_are_those_of_counting(tmp_path):
    random = np.random.default_rng(0)
    targets = random.integers(0, 3, 200)
    logits = random.normal(0, 1, (200, 3)) + 1.2 * np.eye(3)[targets]
    found = written(tmp_path, [(record_of(), logits)], examples_of(targets.tolist()))[0]["models"][0]
    given = [max(range(3), key=lambda k, row=row: row[k]) for row in np.array(logits, "float32")]
    pairs = list(zip(targets.tolist(), given))
    assert found["confusion"] == [[pairs.count((i, j)) for j in range(3)] for i in range(3)]
    f1s, supports = [], []
    for k, row in enumerate(found["classes"]):
        hits, times, there = pairs.count((k, k)), given.count(k), sum(target == k for target in targets)
        f1s.append(2 * hits / (times + there))
        supports.append(there)
        expected = {
            "precision": hits / times,
            "recall": hits / there,
            "f1": f1s[-1],
            "support": there,
            "predicted": times,
        }
        assert {key: row[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert found["averages"]["macro"]["f1"] == pytest.approx(sum(f1s) / 3, abs=1e-6)
    weighted = sum(f1 * n for f1, n in zip(f1s, supports)) / 200
    assert found["averages"]["weighted"]["f1"] == pytest.approx(weighted, abs=1e-6)
    right = sum(a == b for a, b in pairs)
    assert found["correct"] == right and found["error_count"] == 200 - right
    assert found["metrics"]["accuracy"] == pytest.approx(right / 200, abs=1e-6)
    exponentials = [[math.exp(z) for z in row] for row in logits]
    probabilities = [[e / sum(row) for e in row] for row in exponentials]
    losses = [-math.log(row[target]) for row, target in zip(probabilities, targets)]
    assert found["metrics"]["loss"] == pytest.approx(sum(losses) / 200, abs=1e-5)
    wrong = sorted((max(probabilities[i]), i + 1) for i, (a, b) in enumerate(pairs) if a != b)[::-1][:20]
    assert [(row["probability"], row["line"]) for row in found["errors"]] == [(pytest.approx(p, abs=1e-5), line) for p, line in wrong]  # fmt: skip
    for row in found["errors"]:
        i = row["line"] - 1
        assert (row["true"], row["predicted"]) == (LABELS[targets[i]], LABELS[given[i]])
        assert row["probability_of_true"] == pytest.approx(probabilities[i][targets[i]], abs=1e-5)


@pytest.mark.parametrize("hits, count", [(0, 10), (1, 10), (4812, 10000), (20, 20)])
def test_the_interval_ends_where_the_score_test_does(hits, count):
    """Wilson's definition: the shares p from which hits / count is 1.96 standard deviations of p away."""
    for p in reports.wilson_interval(hits, count):
        assert abs(hits / count - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / count), abs=1e-6)


def test_planted_flips_are_found(tmp_path):
    """Records 1 to 5: nothing changes; right to wrong, surely; right to wrong, hardly; wrong to right; otherwise wrong."""
    first = [[5, 0, 0], [2, 0, 0], [1, 0.9, 0], [0, 1, 0], [0, 1, 0.5]]
    other = [[4, 0, 0], [0, 0, 3], [0.9, 1, 0], [1, 0, 0], [0, 0.5, 1]]
    int8 = record_of(stage="quantize")
    content, page = written(tmp_path, [(record_of(), first), (int8, other)], examples_of([0] * 5))
    pair = content["comparisons"][0]
    assert (pair["reference"], pair["model"]) == ("fine-tuned, FP32", "fine-tuned, INT8 mse4")
    assert pair["agreement"] == 0.2
    assert pair["counts"] == {
        "both_correct": 1, "correct_to_wrong": 2, "wrong_to_correct": 1, "both_wrong_same": 0, "both_wrong_different": 1,
    }  # fmt: skip
    kinds = [
        (row["kind"], row["line"], row["reference"]["predicted"], row["model"]["predicted"]) for row in pair["flips"]
    ]
    assert kinds == [
        ("correct_to_wrong", 2, "108", "110"),  # the larger margin first
        ("correct_to_wrong", 3, "108", "109"),
        ("wrong_to_correct", 4, "109", "108"),
        ("both_wrong_different", 5, "109", "110"),
    ]
    e = math.exp
    assert pair["flips"][0]["reference"]["margin"] == pytest.approx((e(2) - 1) / (e(2) + 2), abs=1e-6)
    assert pair["flips"][0]["model"]["margin"] == pytest.approx((e(3) - 1) / (e(3) + 2), abs=1e-6)
    bins = pair["margins"]["bins"]
    assert sum(row["records"] for row in bins) == 5 and sum(row["different"] for row in bins) == 4
    assert bins[0] == {"from": 0, "to": 0.1, "records": 1, "different": 1}  # record 3: 0.04
    assert pair["tests"] == [{"metric": "accuracy", "test": "McNemar's exact test", "p": 1.0}]  # 2 against 1
    assert "Difference in accuracy: p = 1.000 (McNemar&#39;s exact test)." in page
    for text in ("Only fine-tuned, FP32 is correct: 2 records", "Both are wrong, with different answers: 1 records"):
        assert text in page
    assert not written(tmp_path, [(record_of(), first)] * 2, examples_of([0] * 5))[0]["comparisons"][0]["flips"]


def test_a_page_is_one_safe_file_with_the_names_of_the_labels(tmp_path):
    text = "<script>alert({})</script>"
    logits = [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    content, page = written(tmp_path, [(record_of(), logits)], examples_of([1, 2, 2], text, "第二句 & <i>"))
    assert "<script" not in page and "<i>" not in page and "<b>军事" not in page
    assert html.escape(text.format(0)) in page and "第二句 &amp; &lt;i&gt;" in page
    assert content["models"][0]["errors"][0]["text"] == text.format(0)
    assert "教育" in page and "科技" in page and "&lt;b&gt;军事&lt;/b&gt;" in page
    picture = re.search(r"<svg class=\"matrix\".*?</svg>", page, re.S).group()
    assert (
        "教育</text>" in re.sub("<title>.*?</title>", "", picture)
        and "true: 科技, predicted: 教育: 1 (100.00 %" in picture
    )
    assert page.startswith("<!DOCTYPE html>") and not re.search(r"(?:src|href)=\"(?!#)|url\(|@import", page)
    assert "Baseline that ignores the text: majority class, accuracy 50.00 %." in page
    assert content["models"][0]["max_seq_length"] == 48  # used, not that of fine-tuning
    for words in ("note:</span> random weights", "3 of 9 records", "md5 5e", "place/0", "at most 48 tokens"):
        assert words in page


def test_of_many_classes_the_worst_are_drawn(tmp_path):
    """40 classes: class k is given for class 0 in k records of 50; the matrix keeps its sums."""
    targets = np.repeat(np.arange(40), 50)
    given = [0 if i % 50 < k else k for i, k in enumerate(targets)]
    labels = [str(k) for k in range(40)]
    record = record_of(labels=labels, names=None)
    content, page = written(tmp_path, [(record, np.eye(40)[given])], examples_of(targets.tolist()), count=3)
    model = content["models"][0]
    assert model["confusion_shown"] == ["0", *labels[21:]]  # in all rows 0 is given; then those with the most errors
    assert [(row["true"], row["count"]) for row in model["confused_pairs"][:3]] == [("39", 39), ("38", 38), ("37", 37)]
    assert model["confused_pairs"][0]["share"] == 0.78
    picture = reports.picture_of(model)
    assert picture["labels"][-1] is None and "20 other classes" in page
    assert sum(cell["count"] for row in picture["rows"] for cell in row) == 2000
    assert picture["rows"][-1][0]["count"] == sum(range(1, 21))
    assert len(model["errors"]) == 3 and "3 of 780 errors" in page


def test_several_labels(tmp_path):
    """Each model decides by its own threshold; a text is right if all its labels are."""
    several, other = objectives.MultiLabel(0.5), objectives.MultiLabel(0.8)
    targets = [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 0.0)]
    logits = [[2, -2, 1], [-2, -2, 1.2], [3, -1, -1]]  # 1: right; 2: the third label too much; 3: the second missing
    models = [(record_of(several), logits), (record_of(other, stage="quantize"), logits)]
    content, page = written(tmp_path, models, examples_of(targets))
    first, second = content["models"]
    assert [row["correct"] for row in content["models"]] == [1, 1] and "confusion" not in first
    assert [first["classes"][k]["f1"] for k in range(3)] == pytest.approx([1, 0, 2 / 3], abs=1e-6)
    assert [(row["support"], row["predicted"]) for row in first["classes"]] == [(2, 2), (1, 0), (1, 2)]
    assert first["metrics"]["exact_match"] == pytest.approx(1 / 3, abs=1e-6)
    assert (first["settings"], second["settings"]) == ({"threshold": 0.5}, {"threshold": 0.8})
    sigmoid = [1 / (1 + math.exp(-z)) for z in (1.2, 1.0)]  # given wrongly with 0.77; left out with 1 - 0.27 = 0.73
    assert [(row["line"], row["true"], row["predicted"]) for row in first["errors"]] == [(2, [], ["110"]), (3, ["108", "109"], ["108"])]  # fmt: skip
    assert [row["probability"] for row in first["errors"]] == pytest.approx(sigmoid, abs=1e-6)
    flips = content["comparisons"][0]["flips"]
    assert [(row["kind"], row["line"]) for row in flips] == [("correct_to_wrong", 1), ("wrong_to_correct", 2)]
    assert flips[0]["reference"]["margin"] == pytest.approx(sigmoid[1] - 0.5, abs=1e-6)
    assert flips[0]["model"] == {"predicted": ["108"], "margin": pytest.approx(0.8 - sigmoid[1], abs=1e-6)}
    assert (
        "exact match <b>33.33 %</b>" in page
        and "none of the labels" in page
        and "matrix" not in page.split("</style>")[1]
    )
    one = record_of(several, ["x"], None)
    content, _ = written(tmp_path, [(one, [[1], [1], [-1]])], examples_of([(1.0,), (0.0,), (0.0,)]))
    row = content["models"][0]["classes"]
    assert row == [{"label": "x", "precision": 0.5, "recall": 1, "f1": 0.666667, "support": 1, "predicted": 2}]
    assert content["models"][0]["averages"]["macro"]["f1"] == 0.666667


@dataclasses.dataclass(frozen=True)
class Distance(objectives.Objective):
    name = "distance_for_reports"
    metric = "closeness"

    def metrics(self, logits, targets):
        return {"closeness": round(float(1 - np.abs(logits - targets).mean()), 6)}

    def agreement(self, logits, reference):
        return float(1 - np.abs(logits - reference).mean())


def test_an_objective_without_classes_has_its_metrics_only(tmp_path):
    record = record_of(Distance(), ["score"], None)
    content, page = written(tmp_path, [(record, [[0.5]]), (record, [[0.75]])], examples_of([(0.25,)]))
    assert content["models"][1]["metrics"] == {"closeness": 0.5} and "classes" not in content["models"][0]
    assert content["comparisons"][0]["agreement"] == 0.75
    assert "closeness <b>75.00 %</b>" in page and "place/1" in page and "Figures per" not in page


@pytest.fixture
def taken(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("")
    return str(tmp_path / "out/file")


@pytest.mark.parametrize("below", ["", "/under"])
def test_a_directory_that_cannot_be_is_refused(taken, below, capsys):
    """By all three, before anything is read."""
    for directory, script, words in (
        ("deploy/python", "infer", ["--model_path", "nowhere"]),
        ("finetuning", "run_clue", ["--task_name", "topics", "--model_name_or_path", "nowhere", "--do_eval"]),
        (".", "summarize", ["nowhere"]),
    ):
        main = load_script(directory, script).main
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--report", taken + below])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and "is no directory" in said


def test_what_does_not_go_with_a_report_is_refused(tmp_path, tuned, workspace, capsys):
    infer, run_clue = load_script("deploy/python", "infer"), load_script("finetuning", "run_clue")
    report, model = ["--report", str(tmp_path / "out")], ["--model_path", str(tuned)]
    for other in (["--text", "体育"], ["--perf"], ["--predict_test", str(tmp_path)], ["--collect_shape"]):
        refused(capsys, tmp_path / "out", ["--report: scores dev"], infer.main, [*model, *report, *other])
    refused(capsys, tmp_path / "out", ["--report_errors 0"], infer.main, [*model, *report, "--report_errors", "0"])
    shutil.copytree(tuned, tmp_path / "turned")
    record = json.loads((tuned / "stage.json").read_text(encoding="utf-8"))
    (tmp_path / "turned/stage.json").write_text(json.dumps({**record, "labels": record["labels"][::-1]}))
    turned = [*model, str(tmp_path / "turned"), *report, "--task_name", "topics", "--data_dir", str(workspace / "data")]
    refused(capsys, tmp_path / "out", ["other labels"], infer.main, turned)
    topics = ["--task_name", "topics", "--model_name_or_path", str(tuned), "--output_dir", str(tmp_path / "x")]
    for other in ([], ["--do_predict"], ["--do_eval", "--do_train"]):
        refused(capsys, tmp_path / "out", ["--report goes with --do_eval"], run_clue.main, [*topics, *report, *other])
    where = [str(workspace / "tiny"), "--data_dir", str(workspace / "data")]
    refused(capsys, tmp_path / "out", ["--data_dir goes with --report"], summarize.main, where)
    (tmp_path / "topics").mkdir()
    (tmp_path / "topics/dev.json").write_text('{"sentence": "足球", "label": "体育"}\n', encoding="utf-8")
    other = [str(workspace / "tiny"), *report, "--data_dir", str(tmp_path)]
    refused(capsys, tmp_path / "out", ["not the records that"], summarize.main, other)


def read(directory):
    return json.loads((directory / "report.json").read_text())


def test_one_command_of_each_tool(tmp_path, tuned, models, workspace, capsys):
    """FP32 and INT8 in one report; the same figures by run_clue.py --do_eval, and without texts by summarize.py."""
    rows = [json.loads(line) for line in (workspace / "data/topics/dev.json").read_text(encoding="utf-8").splitlines()]
    topics = sorted({row["label"] for row in rows})
    planted = [4, 99, 298]  # lines with wrong labels, as the model has learnt to make no errors
    for line in planted:
        row = rows[line - 1]
        row["label"] = next(topic for topic in topics if topic != row["label"])
    (tmp_path / "topics").mkdir()
    write_rows(tmp_path / "topics/dev.json", rows)
    of_data = ["--task_name", "topics", "--data_dir", str(tmp_path)]
    given = [*of_data, "--model_path", str(tuned), str(models["int8"][0]), "--report", str(tmp_path / "new/a")]
    load_script("deploy/python", "infer").main(given)
    content, said = read(tmp_path / "new/a"), capsys.readouterr()
    assert "| TNEWS" not in said.out and f"report -> {tmp_path}/new/a/report.html\n" in said.err
    assert [model["precision"] for model in content["models"]] == ["fp32", "int8"]
    fp32 = content["models"][0]
    assert fp32["error_count"] < 20 and {*planted} <= {row["line"] for row in fp32["errors"]}
    for row in fp32["errors"]:
        assert (row["text"], row["true"]) == (rows[row["line"] - 1]["sentence"], rows[row["line"] - 1]["label"])
    arguments = ["--model_name_or_path", str(tuned), "--do_eval", "--report", str(tmp_path / "b")]
    load_script("finetuning", "run_clue").main([*of_data, *arguments])
    own = read(tmp_path / "b")
    assert own["models"][0]["confusion"] == fp32["confusion"] and own["dev"] == content["dev"]
    assert own["models"][0]["max_seq_length"] == fp32["max_seq_length"] > 8
    assert [row["line"] for row in own["models"][0]["errors"]] == [row["line"] for row in fp32["errors"]]
    load_script("finetuning", "run_clue").main([*of_data, *arguments, "--max_seq_length", "8"])
    shorter = ["--max_seq_length", "8", "--report", str(tmp_path / "new/a")]
    load_script("deploy/python", "infer").main([*of_data, "--model_path", str(tuned), *shorter])
    for place in ("b", "new/a"):
        assert read(tmp_path / place)["models"][0]["max_seq_length"] == 8
    capsys.readouterr()

    summarize.main([str(workspace), "--task_name", "topics", "--report", str(tmp_path / "c")])
    assert "the report of topics has no texts: --data_dir DIR" in capsys.readouterr().err
    kept = read(tmp_path / "c")
    names = [model["name"] for model in kept["models"]]
    assert names[0] == "fine-tuned, FP32" and {"pruned to 0.5, FP32", "pruned to 0.75, FP32"} < {*names}
    assert any(name.startswith("pruned to 0.75, INT8 ") for name in names) and not kept["texts"]
    for model in kept["models"]:  # each stage's own figure, from its own logits
        assert model["correct"] == round(model["metrics"]["accuracy"] * kept["dev"]["examples"])
    summarize.main(
        [
            str(workspace),
            "--task_name",
            "topics",
            "--report",
            str(tmp_path / "d"),
            "--data_dir",
            str(workspace / "data"),
        ]
    )
    assert read(tmp_path / "d")["texts"] and read(tmp_path / "d")["models"] == kept["models"]


def test_a_model_without_answers_is_named_with_the_command(tmp_path, tuned, capsys):
    record = {**records.read_record(str(tuned)), "path": str(tmp_path), "directory": "models/topics"}
    assert not reports.kept([record], [record]).models
    line = f"models/topics: no {predictions.FILE}, so not in this report; deploy/python/infer.py --model_path models/topics"
    assert line in capsys.readouterr().err
    other = {**record, "path": str(tuned), "directory": "others/topics"}
    models, targets, missing = reports.kept([record, other], [record, other])
    assert len(models) == 1 and line in capsys.readouterr().err
    page = reports.page_of(models, record["data"]["dev"], None, 5, targets, missing)
    assert line in page.html and len(page.content["models"]) == 1
    # For a GPU, INT8 was simulated.
    for variant, precision in (({}, "int8"), ({"scored_in": engine.SIMULATED}, engine.SIMULATED)):
        int8 = {**other, "stage": "quantize", "variant": {"algorithm": "mse", "calib_samples": 4, **variant}}
        assert reports.kept([int8], [int8]).models[0].precision == precision


def test_reports_of_several_tasks_are_all_or_nothing(tmp_path, capsys):
    """summarize.py --report: a task without answers is left out with a note; what is refused has written nothing."""
    family(tmp_path / "kept")
    write(tmp_path / "kept/m/models/AFQMC/1", "finetune", "AFQMC", 0.7, "f")
    write(tmp_path / "none/AFQMC", "finetune", "AFQMC", 0.7, "f")
    write(tmp_path / "own/x", "consistent", "TNEWS", 0.7, "o")
    out = tmp_path / "out"
    call, report = [str(tmp_path / "kept"), "--report", str(out)], ["--report", str(out)]
    (tmp_path / "perf.json").write_text("{}")
    refused(capsys, out, ["not a benchmark's JSON"], summarize.main, [*call, "--perf", str(tmp_path / "perf.json")])
    (tmp_path / "perf.json").write_text('{"rows": [{"row": "quantized", "speedup": 2.0}]}')
    two_models = [str(tmp_path / "none"), *call, "--perf", str(tmp_path / "perf.json")]
    refused(capsys, out, ["the benchmark is of one model"], summarize.main, two_models)
    refused(capsys, out, ["no model here has kept"], summarize.main, [str(tmp_path / "none"), *report])
    refused(capsys, out, ["stages of your own only"], summarize.main, [str(tmp_path / "own"), *report])
    (tmp_path / "kept/q/bad" / predictions.FILE).write_bytes(b"broken")
    summarize.main(call)
    said = capsys.readouterr()
    assert "note: no report of AFQMC" in said.err and "| fine-tuned, FP32 |" in said.out
    assert sorted(path.name for path in out.iterdir()) == ["TNEWS"]
    content = read(out / "TNEWS")
    assert content["models"][0]["name"] == "fine-tuned, FP32" and len(content["models"]) == 3
    assert len(content["missing"]) == 1 and "q/bad: dev_logits.npz is damaged" in content["missing"][0]
    assert str(tmp_path) not in (out / "TNEWS/report.html").read_text()
