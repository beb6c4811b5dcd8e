"""common/objectives.py against scikit-learn, NumPy and brute force; what is refused; the form of labels and answers."""

import json
import os
import subprocess
import sys

import data
import numpy as np
import pytest
from common import UserError, batching, modeling, objectives, records
from common.compat import paddle
from conftest import ROOT, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

LABELS = ("a", "b", "c")
ONE, SEVERAL = objectives.Classification(), objectives.MultiLabel(0.3)


def random_logits(seed, rows=40, labels=5, scale=2.0):
    random = np.random.default_rng(seed)
    logits = random.normal(0, scale, (rows, labels)).astype("float32")
    several = (random.random((rows, labels)) < 0.3).astype("float32")
    return logits, random.integers(0, labels, rows), several


@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.3, 0.5, 0.9]))
@settings(max_examples=25, deadline=None)
def test_multi_label_metrics_are_those_of_scikit_learn(seed, threshold):
    logits, _, targets = random_logits(seed)
    targets[:, 0] = 0  # a label that is nowhere
    found = objectives.MultiLabel(threshold).metrics(logits, targets)
    probabilities = 1 / (1 + np.exp(-logits.astype("float64")))
    decided = probabilities >= threshold
    f1 = {average: sklearn_metrics.f1_score(targets, decided, average=average, zero_division=0)
          for average in ("macro", "micro")}  # fmt: skip
    assert found["macro_F1"] == pytest.approx(f1["macro"], abs=1e-6)
    assert found["micro_F1"] == pytest.approx(f1["micro"], abs=1e-6)
    assert found["exact_match"] == pytest.approx(sklearn_metrics.accuracy_score(targets, decided), abs=1e-6)
    losses = [sklearn_metrics.log_loss(t, p, labels=[0, 1]) for t, p in zip(targets.T, probabilities.T)]
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-6)


def test_classification_metrics_are_those_of_scikit_learn():
    logits, targets, _ = random_logits(1)
    found, probabilities = ONE.metrics(logits, targets), objectives.softmax(logits)
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(targets, logits.argmax(-1)), abs=1e-6)
    assert found["loss"] == pytest.approx(sklearn_metrics.log_loss(targets, probabilities), abs=1e-6)


@pytest.mark.parametrize("objective", [ONE, SEVERAL], ids=lambda one: one.name)
def test_training_losses(objective):
    """The loss is that of the metrics; the soft loss is at its least, the entropy, where the student has learnt all."""
    logits, one, several = random_logits(2)
    targets = one if objective is ONE else several
    loss = float(objective.loss(paddle.to_tensor(logits), paddle.to_tensor(targets)))
    assert loss == pytest.approx(objective.metrics(logits, targets)["loss"], abs=1e-5)
    teacher = random_logits(3)[0]
    found = float(objective.soft_loss(paddle.to_tensor(logits), paddle.to_tensor(teacher)))
    if objective is ONE:
        expected = -(objectives.softmax(teacher) * np.log(objectives.softmax(logits))).sum(-1).mean()
    else:
        p, q = objectives.sigmoid(teacher), objectives.sigmoid(logits)
        expected = -(p * np.log(q) + (1 - p) * np.log(1 - q)).mean()
    assert found == pytest.approx(expected, rel=1e-5)
    student = paddle.to_tensor(teacher, stop_gradient=False)
    objective.soft_loss(student, paddle.to_tensor(teacher)).backward()
    assert np.abs(student.grad.numpy()).max() < 1e-6


def test_threshold_is_the_best_one_on_dev():
    """Rare labels that a careful model gives a probability of 0.2: at 0.5 nothing is found."""
    random = np.random.default_rng(0)
    targets = (random.random((400, 6)) < 0.1).astype("float32")
    probabilities = np.where(
        targets > 0, random.uniform(0.1, 0.4, targets.shape), random.uniform(0, 0.2, targets.shape)
    )
    logits = np.log(probabilities / (1 - probabilities)).astype("float32")
    fitted = objectives.MultiLabel().fitted(logits, targets)
    scores = {}
    for k in range(1, 100):
        decided = objectives.sigmoid(logits) >= k / 100
        scores[k / 100] = sklearn_metrics.f1_score(targets, decided, average="macro", zero_division=0)
    found = objectives.MultiLabel().on_dev(logits, targets)
    assert found["macro_F1"] == pytest.approx(max(scores.values()), abs=1e-6) and 0.1 < fitted.threshold < 0.25
    assert objectives.MultiLabel().metrics(logits, targets)["macro_F1"] == 0
    assert objectives.MultiLabel().with_settings(found) == fitted
    assert objectives.of_description(fitted.describe()) == fitted
    assert objectives.MultiLabel().fitted(np.full_like(logits, 9), targets).threshold == 0.5  # all the same


def test_extreme_logits_have_probabilities():
    assert objectives.sigmoid([-1e4, 0, 1e4]).tolist() == [0, 0.5, 1]
    assert objectives.softmax([[1e4, 0]]).tolist() == [[1, 0]]


def test_answers():
    logits = np.float32([[2, -1, 0.5], [-3, -3, -3]])
    assert ONE.answer(logits[0], LABELS)["label"] == "a" and ONE.prediction(logits[0], LABELS) == {"label": "a"}
    several = SEVERAL.answer(logits[0], LABELS)
    assert several["labels"] == ["a", "c"] and several["threshold"] == 0.3
    assert several["probabilities"] == {"a": 0.880797, "b": 0.268941, "c": 0.622459}
    # A text without any label has none, where a softmax would give one of three a probability.
    assert SEVERAL.answer(logits[1], LABELS)["labels"] == [] and SEVERAL.columns(logits, LABELS)["labels"][1] == []
    assert SEVERAL.agreement(logits, -logits) == 0 and SEVERAL.agreement(logits, logits + 0.1) == 1
    for objective in (ONE, SEVERAL):
        columns, rows = objective.columns(logits, LABELS), [objective.answer(row, LABELS) for row in logits]
        for i, row in enumerate(rows):
            assert columns["labels"][i] == row.get("labels", row.get("label"))
            assert columns["probabilities"][i] == list(row["probabilities"].values())
    assert ONE.constant_answer(np.array([0, 1, 1, 2])) == {"majority_class": 0.5}
    # Every label everywhere: F1 = 2 p / (p + 1) of a label that a share p of the texts has.
    targets = np.float32([[1, 0, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]])
    assert SEVERAL.constant_answer(targets)["constant_answer"] == pytest.approx((1 + 0.4 + 0.4) / 3, abs=1e-6)


@pytest.mark.parametrize(
    "objective, row, expected",
    [
        (ONE, {"label": "b"}, 1),
        (ONE, {"label": "-"}, None),
        (ONE, {"labels": ["b"]}, "no label; for records with labels, a list, there is --objective multi_label"),
        (ONE, {"label": "d"}, "label 'd' is not one of the task's: a, b, c"),
        (SEVERAL, {"labels": []}, (0.0, 0.0, 0.0)),
        (SEVERAL, {"labels": ["c", "a"]}, (1.0, 0.0, 1.0)),
        (SEVERAL, {"labels": ["d"]}, "label 'd' is not one of the task's: a, b, c"),
        (SEVERAL, {"labels": ["a", "a"]}, "label 'a' stands twice"),
        (SEVERAL, {"labels": "a"}, 'no "labels", a list'),
        (SEVERAL, {"label": "a"}, 'no "labels", a list'),
    ],
)
def test_labels_are_read(objective, row, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            objective.read_label(row, LABELS)
    else:
        assert objective.read_label(row, LABELS) == expected


def write_several(directory, rows=({"labels": ["b", "a"]}, {"labels": []}, {"labels": ["c"]})):
    directory.mkdir(exist_ok=True)
    for split in ("train", "dev"):
        write_rows(directory / f"{split}.json", [{"sentence": "甲乙", **row} for row in rows])


def test_a_task_is_what_its_records_look_like(tmp_path):
    write_several(tmp_path / "several")
    task = data.get_task("mine", tmp_path / "several")
    assert task.objective.name == "multi_label" and task.labels == ("a", "b", "c")
    split = data.read_split(task, "train", tmp_path / "several")
    assert split.describe()["constant_answer"] == pytest.approx(0.5)
    features = [batching.Feature([2, 5, 3], [0, 0, 0], example.label) for example in split.examples]
    batch = batching.collate(features, [2, 1, 0])
    assert batch.labels.dtype == "float32" and batch.labels.tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 0]]
    with pytest.raises(UserError, match="dev.json:1: no label; for records with labels"):
        data.read_split(data.get_task("tnews"), "dev", tmp_path / "several")
    with pytest.raises(UserError, match="no label"):
        data.read_split(data.Task("mine", ("a", "b")), "dev", tmp_path / "several")
    write_several(tmp_path / "broken", [{"labels": ["a"]}, {"label": "a"}])
    with pytest.raises(UserError, match='train.json:2: no "labels", a list'):
        data.read_split(data.get_task("mine", tmp_path / "broken"), "train", tmp_path / "broken")
    with pytest.raises(UserError, match="objective 'ranking' is not known here"):
        data.get_task("mine", tmp_path / "several", "ranking")


def test_records_of_another_form_have_a_parser(tmp_path):
    write_rows(tmp_path / "dev.json", [{"title": "甲", "label": "a"}, {"title": "乙", "label": "b"}])
    task = data.Task("mine", ("a", "b"))
    split = data.read_split(task, "dev", tmp_path, texts_of=lambda task_name, row: (row["title"], None))
    assert [example[:3] for example in split.examples] == [("甲", None, 0), ("乙", None, 1)]
    with pytest.raises(UserError, match="dev.json:1: no sentence, and no sentence1 and sentence2"):
        data.read_split(task, "dev", tmp_path)


@pytest.mark.parametrize(
    "description, why",
    [
        ({"name": "ranking", "metric": "mrr"}, "objective 'ranking' is not known here"),
        ({"name": "multi_label", "metric": "accuracy", "threshold": 0.5}, "made by another version"),
        ({"name": "multi_label", "metric": "macro_F1"}, "made by another version"),
        ({"name": "multi_label", "metric": "macro_F1", "threshold": 1.5}, "threshold 1.5: must be between 0 and 1"),
        ({"name": "multi_label", "metric": "macro_F1", "threshold": "0.5"}, "must be between 0 and 1"),
        ({"name": "classification", "metric": "accuracy", "threshold": 0.5}, "settings do not fit"),
        (None, "no objective is named"),
        ({}, "no objective is named"),
        ("classification", "no objective is named"),
    ],
)
def test_what_is_not_known_is_refused(description, why):
    with pytest.raises(UserError, match=why):
        objectives.of_description(description)


@pytest.mark.parametrize(
    "source, why",
    [
        (None, "mine.py: no such file"),
        ("class Mine(:", "SyntaxError"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("x = 1", "objective 'mine' is not known here"),
    ],
)
def test_a_file_of_your_own_that_does_not_work(tmp_path, monkeypatch, source, why):
    path = tmp_path / "mine.py"
    if source is not None:
        path.write_text(source)
    monkeypatch.setenv("OBJECTIVES", str(path))
    with pytest.raises(UserError, match=why):
        objectives.named("mine")
    assert objectives.named("classification") == ONE


def test_every_weight_of_a_model_learns_the_loss_of_its_objective(workspace):
    """The gradient of a classifier's bias under BCE: mean of (sigmoid - target), by hand."""
    config = modeling.random_config("bert", str(workspace / "tiny.json"), 100, 3)
    model = modeling.model_class("bert")(config)
    model.eval()
    features = [
        batching.Feature([2, 7, 9, 3], [0] * 4, (1.0, 0.0, 1.0)),
        batching.Feature([2, 8, 3], [0] * 3, (0.0,) * 3),
    ]
    batch = batching.collate(features, [0, 1])
    logits = model(*modeling.tensors(batch))
    SEVERAL.loss(logits, paddle.to_tensor(batch.labels)).backward()
    expected = (objectives.sigmoid(logits.numpy()) - batch.labels).sum(0) / batch.labels.size
    np.testing.assert_allclose(model.classifier.bias.grad.numpy(), expected, atol=1e-6)


def test_no_other_module_says_how_a_label_is_chosen():
    """Loss, metric and answer of a task are written out in objectives.py alone."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    allowed = {
        "common/objectives.py",
        "common/exporting.py",  # attention
        "general_distill/relations.py",  # relations of heads
        "demo/pretrain_mlm.py",  # masked tokens
        "deploy/onnx/onnx_graph.py",  # names of operators
        "deploy/onnx/infer_onnx.py",  # one file that has nothing of this repository; its answers are compared
        "deploy/benchmark/perf.py",  # a benchmark on TNEWS
        "deploy/benchmark/profile_engine.py",  # names of operators
    }
    for path in listed.stdout.split():
        if path.startswith("tests/") or path in allowed:
            continue
        with open(os.path.join(ROOT, path), encoding="utf-8") as file:
            text = file.read()
        for word in ("softmax(", "sigmoid(", "cross_entropy", ".argmax(-1)", '["accuracy"]'):
            known = path == "general_distill/curves.py" and word == '["accuracy"]'  # its plot is of accuracies
            assert word not in text or known, f"{path}: {word}"


def test_records_name_the_metric_that_selects():
    record = {"metrics": {"macro_F1": 0.5}, "objective": {"metric": "macro_F1"}}
    assert records.score(record) == 0.5 and objectives.shown("macro_F1") == "macro F1"
    assert records.constant_answer({"majority_class": 0.2}) == ("majority class", 0.2)
    assert records.constant_answer({"constant_answer": 0.3}) == ("constant answer", 0.3)


def test_the_client_needs_no_paddle_for_its_answers():
    code = f"import sys; sys.path[:0] = [{ROOT!r}]; from common import objectives, texts; import json, numpy as np\n"
    code += "print(json.dumps(objectives.MultiLabel().answer(np.zeros(2), 'ab'))); assert 'paddle' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(done.stdout)["labels"] == ["a", "b"], done.stderr


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(source): a file of one's own that $OBJECTIVES names; what it adds is forgotten afterwards."""
    monkeypatch.setattr(objectives, "KNOWN", dict(objectives.KNOWN))
    monkeypatch.setattr(objectives, "OWN_FILES", {})

    def write(source):
        (tmp_path / "own.py").write_text(source)
        monkeypatch.setenv("OBJECTIVES", str(tmp_path / "own.py"))

    return write


def test_an_objective_of_ones_own_may_build_on_another(own):
    """With a setting more, from a file that postpones its annotations; what it builds on stays what it was."""
    own(
        "from __future__ import annotations\nimport dataclasses\nfrom common.objectives import MultiLabel\n"
        "class Base(MultiLabel):\n    pass\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine(Base):\n    name = 'mine'\n    metric = 'micro_F1'\n"
        "    weight: float = 2.0\n"
    )
    mine = objectives.named("mine")
    assert mine.describe() == {"name": "mine", "metric": "micro_F1", "threshold": 0.5, "weight": 2.0}
    logits, _, targets = random_logits(4)
    found = mine.on_dev(logits, targets)
    assert objectives.of_description(mine.with_settings(found).describe()).threshold == found["threshold"] != 0.5
    assert type(objectives.named("multi_label")) is objectives.MultiLabel


def test_two_objectives_of_one_name(own):
    own("from common.objectives import Classification\nclass Mine(Classification):\n    name = 'classification'\n")
    with pytest.raises(UserError, match="objective 'classification': there are two of that name"):
        objectives.named("mine")
    assert type(objectives.named("classification")) is objectives.Classification
