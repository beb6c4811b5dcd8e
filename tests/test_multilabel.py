"""Several labels per text, or none, through every stage, the service included; and who does not know an objective refuses."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import FILLER, ROOT, TOPICS, Service, load_script, record, refused, sh, write_rows
from sklearn.metrics import accuracy_score, f1_score

import rpc_client
import summarize
from common import UserError, batching, checkpoints, engine, files, objectives

LABELS = sorted(TOPICS)


def text_with(rng, labels):
    """Filler with three different characters of each label's topic in it, and now and then one of another topic."""
    chars = [rng.choice(FILLER) for _ in range(rng.randint(8, 25))]
    for label in LABELS:
        for char in rng.sample(TOPICS[label], 3 if label in labels else int(rng.random() < 0.1)):
            chars.insert(rng.randint(0, len(chars)), char)
    return "".join(chars)


@pytest.fixture(scope="module")
def place(workspace, tmp_path_factory):
    """A directory with the data of ``several``; the launchers write there."""
    root, rng = tmp_path_factory.mktemp("several"), random.Random(5)
    (root / "data/several").mkdir(parents=True)
    for split, count in (("train", 2400), ("dev", 300), ("test", 50)):
        rows = []
        for number in range(count):
            frequencies = (0.5, 0.4, 0.3, 0.15) if rng.random() < 0.7 else (0, 0, 0, 0)
            labels = [label for label, often in zip(LABELS, frequencies) if rng.random() < often]
            row = {"sentence": text_with(rng, labels), "labels": labels}
            rows.append(row if split != "test" else {"id": 100 + number, "sentence": row["sentence"]})
        write_rows(root / "data/several" / f"{split}.json", rows)
    for name in ("vocab.txt", "tiny.json"):
        shutil.copy(workspace / name, root)
    return root


@pytest.fixture(scope="module")
def tuned(place):
    init = ["--init_config", "tiny.json", "--vocab_file", "vocab.txt", "--data_dir", "data", "--group_by_length"]
    sh(
        "finetuning/run_clue.sh",
        "several",
        "3e-3",
        32,
        6,
        64,
        0,
        "tiny",
        *init,
        "--do_predict",
        "--do_train",
        cwd=place,
    )
    directory = place / "tiny/models/several/3e-3_32"
    arguments = ["--task_name", "several", "--model_path", str(directory), "--data_dir", str(place / "data")]
    load_script("finetuning", "export_model").main(arguments)
    return directory


@pytest.fixture(scope="module")
def pruned(place, tuned):
    sh("pruning/prune.sh", "several", "1e-3", 32, 3, 64, 0, tuned, "0.75 0.5", "--data_dir", "data", cwd=place)
    sh("pruning/export.sh", "pruned_models", "several", "--data_dir", "data", cwd=place)
    return place / "pruned_models/several"


@pytest.fixture(scope="module")
def quantized(place, pruned):
    sh("quantization/quant.sh", "several", pruned / "0.75/sub_static", "--data_dir", "data", cwd=place)
    return place / "several_quant_models"


def dev_of(place):
    """(texts, bool [n, labels]) of dev, read by hand."""
    rows = [row for _, row in files.read_json_lines(str(place / "data/several/dev.json"))]
    return [row["sentence"] for row in rows], np.array([[label in row["labels"] for label in LABELS] for row in rows])


def logits_of(directory, texts, precision="fp32"):
    graph = checkpoints.open_graph(str(directory))
    examples = [batching.Example(text, None, None, number) for number, text in enumerate(texts, 1)]
    features = batching.convert(examples, graph.tokenizer(), 64)
    return engine.Engine(graph.prefix, "cpu", precision).predict(features, pad_id=0)


def by_hand(place, directory, precision="fp32"):
    """{metric: figure} of a graph on dev, from its logits and the threshold in its record, by scikit-learn."""
    texts, targets = dev_of(place)
    decided = 1 / (1 + np.exp(-logits_of(directory, texts, precision))) >= record(directory)["objective"]["threshold"]
    return {
        "macro_F1": f1_score(targets, decided, average="macro", zero_division=0),
        "micro_F1": f1_score(targets, decided, average="micro", zero_division=0),
        "exact_match": accuracy_score(targets, decided),
    }, decided


def test_fine_tuned(place, tuned):
    found = record(tuned)
    assert found["objective"]["name"] == "multi_label" and found["objective"]["metric"] == "macro_F1"
    assert found["objective"]["threshold"] == found["metrics"]["threshold"] and found["labels"] == LABELS
    expected, decided = by_hand(place, tuned)
    for name, figure in expected.items():
        assert found["metrics"][name] == pytest.approx(figure, abs=1e-6), name
    assert expected["macro_F1"] > 0.8 > found["data"]["dev"]["constant_answer"] > 0.3, expected
    assert {0, 1, 2} <= set(decided.sum(-1))  # texts without a label, with one, with several
    # What --do_eval says of the directory is what was recorded.
    run = [sys.executable, os.path.join(ROOT, "finetuning/run_clue.py"), "--do_eval", "--task_name", "several"]
    run += ["--model_name_or_path", tuned, "--data_dir", place / "data"]
    said = json.loads(subprocess.run(list(map(str, run)), capture_output=True, text=True, check=True).stdout)
    assert {name: said[name] for name in found["metrics"] if name in said} == {
        name: figure for name, figure in found["metrics"].items() if name in said
    }
    # Predictions for test.json: the labels of each text, by its id.
    rows = [row for _, row in files.read_json_lines(str(tuned / "several_predict.json"))]
    assert [row["id"] for row in rows] == list(range(100, 150)) and {len(row["labels"]) for row in rows} > {0, 1}


def test_pruned(place, tuned, pruned):
    for width in ("0.75", "0.5"):
        best, static = record(pruned / width / "best_model"), record(pruned / width / "sub_static")
        assert best["objective"] == static["objective"] and static["metrics"] == best["metrics"]
        expected, _ = by_hand(place, pruned / width / "sub_static")
        for name, figure in expected.items():
            assert static["metrics"][name] == pytest.approx(figure, abs=1e-6), name
        assert best["metrics"]["macro_F1_of_parent"] == record(tuned)["metrics"]["macro_F1"]
        assert best["metrics"]["macro_F1"] > best["metrics"]["macro_F1_of_parent"] - 0.05
        assert best["holds"].startswith("weights of full width")


def test_quantized_in_eight_ways(place, pruned, quantized):
    fp32 = record(pruned / "0.75/sub_static")
    expected_fp32, decided_fp32 = by_hand(place, pruned / "0.75/sub_static")
    variants = sorted(quantized.iterdir())
    assert len(variants) == 8
    for directory in variants:
        found = record(directory)
        assert found["objective"] == fp32["objective"]  # the same threshold
        expected, decided = by_hand(place, directory, "int8")
        for name, figure in expected.items():
            assert found["metrics"][name] == pytest.approx(figure, abs=1e-6), name
            assert found["metrics"][f"fp32_{name}"] == pytest.approx(expected_fp32[name], abs=1e-6), name
        agreeing = (decided == decided_fp32).all(-1).mean()
        assert found["metrics"]["agreement"] == pytest.approx(agreeing, abs=1e-6) and agreeing >= 0.9


def test_infer_and_tables(place, tuned, pruned, quantized, capsys, tmp_path):
    infer, texts = load_script("deploy/python", "infer"), dev_of(place)[0][:20]
    infer.main(["--model_path", str(quantized / "mse4"), "--int8", "--text", *texts])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    _, decided = by_hand(place, quantized / "mse4", "int8")
    assert [answer["labels"] for answer in answers] == [[n for n, d in zip(LABELS, row) if d] for row in decided[:20]]
    assert all(set(answer["probabilities"]) == set(LABELS) and "label" not in answer for answer in answers)
    infer.main(["--model_path", str(quantized / "mse4"), "--int8", "--data_dir", str(place / "data")])
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["macro_F1"] == record(quantized / "mse4")["metrics"]["macro_F1"] and "accuracy" not in scores
    infer.main(["--model_path", *map(str, sorted(quantized.iterdir())), "--int8", "--data_dir", str(place / "data")])
    assert "| macro F1 |" in capsys.readouterr().out
    summarize.main([str(place / "tiny"), str(pruned), str(quantized), "--plot", str(tmp_path / "plot.png")])
    tables = capsys.readouterr().out
    assert "dev macro F1, %" in tables and "accuracy" not in tables and "constant answer" in tables
    assert f"{100 * record(tuned)['metrics']['macro_F1']:.2f}" in tables and (tmp_path / "plot.png").exists()
    summarize.main([str(place / "tiny"), "--format", "csv"])
    row = next(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert row["metric"] == "macro_F1" and row["accuracy"] == "" and float(row["value"]) > 80


def test_onnx_answers_as_infer_py(place, pruned, tmp_path, capsys):
    """FP32: the same labels and probabilities, several or none per text; dev by the share of exactly right ones."""
    graph, texts = pruned / "0.75/sub_static", dev_of(place)[0][:40]
    options = ["--output_dir", str(tmp_path / "onnx"), "--data_dir", str(place / "data")]
    load_script("deploy/onnx", "export_onnx").main(["--model_path", str(graph), *options])
    capsys.readouterr()
    answers, infer_onnx = [], load_script("deploy/onnx", "infer_onnx")
    for script, directory in ((load_script("deploy/python", "infer"), graph), (infer_onnx, tmp_path / "onnx")):
        script.main(["--model_path", str(directory), "--text", *texts])
        answers.append([json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")])
    for one, other in zip(*answers):
        assert one.pop("probabilities") == pytest.approx(other.pop("probabilities"), abs=2e-6) and one == other
    assert len(answers[1]) == 40 and {len(answer["labels"]) for answer in answers[1]} > {1}
    infer_onnx.main(["--model_path", str(tmp_path / "onnx"), "--dev_file", str(place / "data/several/dev.json")])
    result, (figures, _) = json.loads(capsys.readouterr().out), by_hand(place, graph)
    assert result["exact_match"] == pytest.approx(figures["exact_match"], abs=1e-6)


def test_the_search_selects_by_macro_f1(tuned, tmp_path):
    """Not by the loss, nor by micro F1 or exact match, in which the other cell is better."""
    shutil.copytree(tuned, tmp_path / "tiny/models/several/3e-3_32")
    other = tmp_path / "tiny/models/several/1e-3_32"
    shutil.copytree(tuned, other)
    found = json.loads((other / "stage.json").read_text(encoding="utf-8"))
    found["metrics"].update(macro_F1=0.5, micro_F1=0.99, exact_match=0.99, loss=0.01, accuracy=0.99)
    (other / "stage.json").write_text(json.dumps(found), encoding="utf-8")
    summarize.write_best(str(tmp_path / "tiny"))
    best = json.loads((tmp_path / "tiny/best.json").read_text())["several"]
    assert best["macro_F1"] == record(tuned)["metrics"]["macro_F1"] and best["path"].endswith("3e-3_32")


def test_service(place, quantized, tmp_path):
    pytest.importorskip("paddle_serving_server", reason="needs Paddle Serving: bash setup_env.sh --serving")
    texts = dev_of(place)[0][:40]
    _, decided = by_hand(place, quantized / "mse4", "int8")
    expected = [[name for name, given in zip(LABELS, row) if given] for row in decided[:40]]
    assert [] in expected
    with Service(tmp_path, quantized / "mse4") as service:
        status, answer = service.post({"texts": texts})
        assert status == 200 and answer["labels"] == expected and answer["classes"] == LABELS
        assert answer["objective"] == record(quantized / "mse4")["objective"]
        probabilities = 1 / (1 + np.exp(-np.array(answer["logits"])))
        np.testing.assert_allclose(answer["probabilities"], probabilities, atol=1e-6)
        for options in (
            ["--address", f"127.0.0.1:{service.rpc}"],
            ["--http", "--address", f"127.0.0.1:{service.http}"],
        ):
            command = [sys.executable, os.path.join(ROOT, "deploy/serving/rpc_client.py"), *options, "--text", *texts]
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
            assert [json.loads(line)["labels"] for line in lines] == expected


def test_a_client_refuses_what_it_does_not_know(monkeypatch, capsys):
    """A service of another version answers with logits whose meaning is not known here."""
    answer = {
        "logits": [[0.5]],
        "classes": ["x"],
        "truncated": [False],
        "objective": {"name": "ranking", "metric": "m"},
    }
    monkeypatch.setattr(rpc_client, "rpc", lambda address, tls, token: lambda fields, seconds: answer)
    with pytest.raises(UserError, match="objective 'ranking' is not known here"):
        rpc_client.main(["--text", "甲"])
    assert capsys.readouterr().out == ""


def another_objective(source, target):
    """A copy of a stage's result whose record names an objective that nobody here knows."""
    shutil.copytree(source, target)
    for path in target.rglob("stage.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        found["objective"] = {"name": "ranking", "metric": found["objective"]["metric"]}
        path.write_text(json.dumps(found), encoding="utf-8")
    return str(target)


def test_every_consumer_refuses_an_objective_that_it_does_not_know(place, tuned, pruned, tmp_path, capsys):
    out, data_dir = tmp_path / "out", ["--task_name", "several", "--data_dir", str(place / "data")]
    model = another_objective(tuned, tmp_path / "model")
    graph = another_objective(pruned / "0.75/sub_static", tmp_path / "graph")
    best = another_objective(pruned / "0.75/best_model", tmp_path / "best")
    for directory, script, options in (
        ("finetuning", "run_clue", ["--do_eval", "--model_name_or_path", model]),
        ("finetuning", "export_model", ["--model_path", model]),
        ("pruning", "prune", ["--model_name_or_path", model, "--output_dir", str(out)]),
        ("pruning", "export_model",
         ["--model_name_or_path", best, "--sub_model_output_dir", str(out), "--static_sub_model", str(out / "s/float")]),
        ("quantization", "quant_post", ["--input_dir", graph, "--output_dir", str(out)]),
        ("deploy/python", "infer", ["--model_path", graph, "--text", "甲"]),
    ):  # fmt: skip
        refused(
            capsys, out, ["'ranking' is not known here"], load_script(directory, script).main, [*data_dir, *options]
        )
    pytest.importorskip("paddle_serving_server", reason="needs Paddle Serving: bash setup_env.sh --serving")
    with pytest.raises(AssertionError, match="'ranking' is not known here"), Service(tmp_path, graph):
        pass
    # The tables need only the figure that selects, and show it.
    summarize.main([model])
    assert "dev macro F1, %" in capsys.readouterr().out


def test_one_table_is_of_one_objective(place, tuned, tmp_path, capsys, workspace):
    other = tmp_path / "other"
    shutil.copytree(tuned, other)
    found = json.loads((other / "stage.json").read_text(encoding="utf-8"))
    found["objective"] = objectives.Classification().describe()
    found["metrics"]["accuracy"] = 0.5
    (other / "stage.json").write_text(json.dumps(found), encoding="utf-8")
    infer = load_script("deploy/python", "infer")
    options = ["--model_path", str(tuned), str(other), "--data_dir", str(place / "data")]
    refused(capsys, tmp_path / "out", ["a table is of one task"], infer.main, options)
