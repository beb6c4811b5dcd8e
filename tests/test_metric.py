"""--metric and --class_weight: against scikit-learn, NumPy and brute force; what they choose; who inherits it; old results."""

import itertools
import json
import shutil

import numpy as np
import pytest
from common import UserError, modeling, objectives, predictions, records
from common.provenance import VALUES_BEFORE, identity
from common.compat import paddle
from conftest import load_script, record, refused, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_sample_weight

from test_objectives import ONE, SEVERAL, random_logits


@given(st.integers(0, 10**6), st.integers(2, 6))
@settings(max_examples=25, deadline=None)
def test_f1_of_classes_is_that_of_scikit_learn(seed, classes):
    logits, targets, _ = random_logits(seed, rows=9, labels=classes)  # so few that classes are missing
    found = ONE.metrics(logits, targets)
    for name in ("macro", "weighted"):
        every = {"labels": range(classes), "average": name, "zero_division": 0}
        assert found[f"{name}_F1"] == pytest.approx(f1_score(targets, logits.argmax(-1), **every), abs=1e-6)


@pytest.mark.parametrize("objective", [ONE, objectives.MultiLabel()], ids=lambda one: one.name)
def test_no_constant_answer_is_better(objective):
    """Against every class, and every set of labels, given to all texts."""
    for seed, name in itertools.product(range(5), objective.selectable):
        chosen, (_, one, several) = objective.selecting_by(name), random_logits(seed, labels=4)
        several *= random_logits(seed + 9, labels=4)[2][:, :1]  # many texts without a label: those are most frequent
        targets = np.minimum(one, 2) if objective is ONE else several  # the last class has no record
        answers = np.eye(4) if objective is ONE else np.array(list(itertools.product((-9, 9), repeat=4)))
        figures = [chosen.metrics(np.tile(answer, (40, 1)), targets)[name] for answer in answers]
        (found,) = chosen.constant_answer(targets, 4).values()
        assert found == pytest.approx(max(figures), abs=1e-6), name


def test_another_metric_is_kept():
    for objective in (ONE, SEVERAL):
        for name in objective.selectable:
            chosen = objective.selecting_by(name.upper())
            assert chosen.metric == name and objectives.of_description(chosen.describe()) == chosen
            assert (chosen == objective) == (name == objective.metric) and chosen.selecting_by(name) is chosen
    micro, (logits, _, targets) = SEVERAL.selecting_by("micro_f1"), random_logits(6)
    fitted = micro.fitted(logits, targets)
    scores = [f1_score(targets, objectives.sigmoid(logits) >= k / 100, average="micro") for k in range(1, 100)]
    assert fitted.metric == "micro_F1" and fitted.metrics(logits, targets)["micro_F1"] == round(max(scores), 6)
    assert micro.with_settings(micro.on_dev(logits, targets)) == fitted != SEVERAL.fitted(logits, targets)
    with pytest.raises(
        UserError, match="--metric f1: multi_label is selected by one of macro_F1, micro_F1, exact_match"
    ):
        SEVERAL.selecting_by("f1")

    class Own(objectives.Objective):
        metric = "spearman"

    assert Own().selecting_by("Spearman").metric == "spearman"
    with pytest.raises(UserError, match="is selected by one of spearman"):
        Own().selecting_by("accuracy")


def test_weighted_losses_against_numpy():
    logits, targets, _ = random_logits(3)
    targets = np.minimum(targets, 2) * (np.arange(len(targets)) % 4 == 0)  # skewed, and two of five classes are missing
    weights = ONE.balanced_weights(targets)
    assert np.allclose(weights, compute_sample_weight("balanced", targets)) and weights.mean() == pytest.approx(1)
    tensor, teacher = paddle.to_tensor(weights.astype("float32")), random_logits(4)[0]
    p = np.exp(logits.astype("float64")) / np.exp(logits.astype("float64")).sum(1, keepdims=True)
    q = np.exp(teacher.astype("float64")) / np.exp(teacher.astype("float64")).sum(1, keepdims=True)
    each, soft = -np.log(p[np.arange(40), targets]), -(q * np.log(p)).sum(1)
    as_tensors = [paddle.to_tensor(array) for array in (logits, targets, teacher)]
    found = ONE.loss(as_tensors[0], as_tensors[1], weights=tensor), ONE.soft_loss(as_tensors[0], as_tensors[2], tensor)
    assert float(found[0]) == pytest.approx((weights * each).sum() / 40, abs=1e-5)
    assert float(found[1]) == pytest.approx((weights * soft).sum() / 40, abs=1e-5)
    assert abs(float(found[0]) - each.mean()) > 0.01
    plain = paddle.nn.functional.cross_entropy(as_tensors[0], as_tensors[1])
    assert float(ONE.loss(as_tensors[0], as_tensors[1])) == float(plain)  # bit for bit as before


# What run_clue.py writes, with predictions on dev that are made up: an evaluation after each of three steps.

DEV = ["b"] * 2 + ["a"] * 18
GUESSES = {  # of step 1: the most accurate one; of step 2: the one with the best macro F1
    1: "a" * 20,
    2: "bb" + "bbb" + "a" * 15,
    3: "b" * 20,
}


def logits_of(guess):
    return np.float32([[1, 0] if answer == "a" else [0, 1] for answer in guess]) * 3


@pytest.fixture
def skewed(workspace, tmp_path, monkeypatch):
    """skewed(*more): runs run_clue.py; returns its directory."""
    (tmp_path / "data").mkdir()
    for split, labels in (("train", ["b"] * 3 + ["a"] * 21), ("dev", DEV)):
        write_rows(tmp_path / "data" / f"{split}.json", [{"sentence": "足篮", "label": label} for label in labels])
    run_clue = load_script("finetuning", "run_clue")

    def run(*more, guesses=GUESSES, name="out"):
        made_up = iter(guesses.values())
        monkeypatch.setattr(modeling, "predict", lambda model, features, pad_id: logits_of(next(made_up)))
        command = ["--task_name", "skewed", "--data_dir", tmp_path / "data", "--init_config", workspace / "tiny.json"]
        command += [
            "--vocab_file",
            workspace / "vocab.txt",
            "--max_steps",
            "3",
            "--save_steps",
            "1",
            "--batch_size",
            "8",
        ]
        run_clue.main(list(map(str, [*command, "--output_dir", tmp_path / name, *more])))
        return tmp_path / name

    return run


@pytest.mark.parametrize("more, step, constant", [
    ((), 1, {"majority_class": 0.9}),
    (("--metric", "Macro_f1"), 2, {"constant_answer": round((2 * 18 / 38) / 2, 6)}),
])  # fmt: skip
def test_the_metric_chooses_the_checkpoint(skewed, capsys, more, step, constant):
    """Also after a kill between the evaluations; beside the weights lie the answers of the checkpoint that was chosen."""
    with pytest.raises(StopIteration):  # no more predictions: it ends in the third evaluation
        skewed(*more, guesses={k: v for k, v in GUESSES.items() if k < 3})
    capsys.readouterr()
    out = skewed(*more, guesses={3: GUESSES[3]})
    assert "going on after step 2 of 3" in (printed := capsys.readouterr().out)
    assert ("best_acc: " in printed) == (step == 1)
    found, answers = record(out), predictions.read({**record(out), "path": str(out)})
    assert found["metrics"]["step"] == step and constant.items() <= found["data"]["dev"].items()
    assert answers.logits.tolist() == logits_of(GUESSES[step]).tolist()
    assert answers.targets.tolist() == [found["labels"].index(label) for label in DEV]
    rows = [json.loads(line) for line in open(out / "evaluations.jsonl")]
    scores = [f1_score(list(DEV), list(guess), average="macro") for guess in GUESSES.values()]
    assert [row["macro_F1"] for row in rows] == pytest.approx(scores, abs=1e-6)
    # Nothing learnt: not above the constant answer, in the metric that was chosen.
    assert any("not above the" in note for note in found["notes"]) == (step == 1)


def test_older_results_stay_valid(skewed, tmp_path, capsys):
    out = skewed()
    before = json.loads((out / "stage.json").read_text())
    for name in ("metric", "class_weight"):
        assert before["arguments"].pop(name) is None
    (out / "stage.json").write_text(json.dumps(before))
    skewed("--metric", "ACCURACY", guesses={})  # would fail if anything were evaluated again
    assert "already finished with these arguments" in capsys.readouterr().out
    for more in (["--metric", "macro_f1"], ["--class_weight", "balanced"]):
        with pytest.raises(UserError, match=f"{more[0][2:]} None -> {more[1]}"):
            skewed(*more)
    known = "--metric f1: classification is selected by one of accuracy, macro_F1, weighted_F1"
    refused(capsys, tmp_path / "other", [known], lambda: skewed("--metric", "f1", name="other"))


def test_weights_are_refused_where_labels_do_not_exclude_each_other(workspace, tmp_path, capsys):
    for split in ("train", "dev"):
        write_rows(tmp_path / f"{split}.json", [{"sentence": "足", "labels": ["a"]}, {"sentence": "篮", "labels": []}])
    command = ["--task_name", "several", "--data_dir", tmp_path, "--init_config", workspace / "tiny.json", "--vocab_file",
               workspace / "vocab.txt", "--output_dir", tmp_path / "out", "--class_weight", "balanced"]  # fmt: skip
    main = load_script("finetuning", "run_clue").main
    refused(capsys, tmp_path / "out", ["--class_weight balanced: is for class"], main, list(map(str, command)))
    assert not (tmp_path / "out.unfinished").exists()


def test_later_stages_inherit_the_metric(skewed, workspace, tmp_path, monkeypatch, capsys):
    """Pruning and quantizing say nothing of it, and choose by it."""
    out = skewed("--metric", "macro_f1", "--class_weight", "balanced")
    assert "class weights, balanced: from 0.5714 to 4" in capsys.readouterr().out  # 24 / (2 x 21), 24 / (2 x 3)
    monkeypatch.undo()
    common = ["--task_name", "skewed", "--data_dir", str(tmp_path / "data")]
    command = ["--model_name_or_path", str(out), "--output_dir", str(tmp_path / "pruned"), "--width_mult_list", "0.5"]
    command += ["--max_steps", "2", "--save_steps", "1", "--class_weight", "balanced", "--importance_samples", "8"]
    load_script("pruning", "prune").main([*common, *command])
    assert "class weights, balanced: from 0.5714 to 4" in (printed := capsys.readouterr().out)
    assert "skewed: width 0.5 dev macro F1" in printed
    pruned = record(tmp_path / "pruned/0.5/best_model")
    assert pruned["objective"] == {"name": "classification", "metric": "macro_F1"}
    assert {"macro_F1_before_training", "macro_F1_of_parent"} <= set(pruned["metrics"])
    answers = predictions.read({**pruned, "path": str(tmp_path / "pruned/0.5/best_model")})
    assert objectives.of_record(pruned).metrics(*answers)["macro_F1"] == pruned["metrics"]["macro_F1"]
    changed = {**record(out), "metrics": {**record(out)["metrics"], "max_seq_length": 9}}  # the scores are made up
    (out / "stage.json").write_text(json.dumps(changed))
    load_script("finetuning", "export_model").main([*common, "--model_path", str(out)])
    quantize = [*common, "--input_dir", str(out), "--output_dir", str(tmp_path / "int8"), "--algorithms", "abs_max"]
    load_script("quantization", "quant_post").main([*quantize, "--min_agreement", "0"])
    assert "best abs_max" in (printed := capsys.readouterr().out) and "INT8 macro F1" in printed
    assert record(tmp_path / "int8/abs_max4")["objective"]["metric"] == "macro_F1"


def test_answers_lie_beside_every_model_that_was_scored(tuned, pruned, quantized, tmp_path):
    """They are what the recorded figures were made of. A directory without them is as good as before."""
    places = [tuned, pruned / "0.75/best_model", pruned / "0.5/best_model", quantized / "mse4", quantized / "hist8"]
    for place in places:
        found = record(place)
        figures = objectives.of_record(found).metrics(*predictions.read({**found, "path": str(place)}))
        compared = {name: figure for name, figure in figures.items() if name in found["metrics"]}
        assert compared.items() <= found["metrics"].items() and "accuracy" in compared, place
        assert predictions.FILE not in {**found["weights"], **found["files"]}
    for answers in (b"broken", None):
        shutil.copy(tuned / "stage.json", tmp_path)
        path = tmp_path / predictions.FILE
        if answers:
            path.write_bytes(answers)
        else:
            predictions.write(str(tmp_path), np.zeros((9, 4)), np.zeros(9))
        with pytest.raises(UserError, match="dev_logits.npz: (damaged|not the answers of this model)"):
            predictions.read({**record(tuned), "path": str(tmp_path)})
        path.unlink()
    assert predictions.read({**record(tuned), "path": str(tmp_path)}) is None
    records.check_files(str(tuned), record(tuned))


def test_a_default_is_no_part_of_a_runs_identity():
    # A stage without the argument has the metric of its parent, which may have the same weights with another metric.
    of_parent = [identity({}, None, {}, (), ONE.selecting_by(name).describe()) for name in ONE.selectable]
    assert [found.get("metric") for found in of_parent] == [None, "macro_f1", "weighted_f1"]
    assert identity({}, None, {}, (), SEVERAL.describe()) == identity({}, None, {}, ()) == of_parent[0]
    for name, before in VALUES_BEFORE.items():
        assert identity({name: before, "seed": 1}, None, {}, ()) == identity({"seed": 1}, None, {}, ())
        assert name in identity({name: "other"}, None, {}, ())
