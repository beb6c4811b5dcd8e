"""The chain on generated data: every launcher through sh, and what the stages must have in common."""

import json
import os
import shutil
import subprocess

import numpy as np
import paddle
import pytest
from conftest import ROOT, load_script, record, sh

import data
import dynabert
import summarize
from common import UserError, batching, checkpoints, engine, modeling, tokenization


def topics_features(workspace, split="dev"):
    task = data.get_task("topics", str(workspace / "data"))
    tokenizer = tokenization.load_tokenizer(None, True, str(workspace / "vocab.txt"))
    return batching.convert(data.read_split(task, split, str(workspace / "data")).examples, tokenizer, 64)


def test_fine_tuned_model_learns(tuned):
    assert record(tuned)["metrics"]["accuracy"] > 0.9
    assert record(tuned)["data"]["dev"]["majority_class"] < 0.35
    assert record(tuned)["notes"] == ["random weights, no pre-training"]
    evaluations = [json.loads(line) for line in (tuned / "evaluations.jsonl").read_text().splitlines()]
    assert record(tuned)["metrics"]["accuracy"] == max(e["accuracy"] for e in evaluations)


def test_do_eval_alone_scores_a_directory(workspace, tuned, capsys):
    load_script("finetuning", "run_clue").main(
        [
            "--task_name",
            "TOPICS",
            "--model_name_or_path",
            str(tuned),
            "--do_eval",
            "--data_dir",
            str(workspace / "data"),
        ]
    )
    assert json.loads(capsys.readouterr().out)["accuracy"] == record(tuned)["metrics"]["accuracy"]


def test_names_and_last_lines_of_the_original(workspace, tuned, capsys):
    args = load_script("finetuning", "run_clue").parse_args(["--task_name", "WSC", "--do_eval", "--glue_dir", "d"])
    assert (args.task_name, args.data_dir) == ("CLUEWSC2020", "d")
    lines = '. "$1/common/launcher.sh"; task_name wsc; task_name Ifly; task_name mine'
    asked = subprocess.run(["sh", "-c", lines, f"{ROOT}/run_all.sh", ROOT], capture_output=True, text=True)
    assert asked.stdout.split() == ["CLUEWSC2020", "IFLYTEK", "mine"], asked.stderr
    of_data = ["--data_dir", str(workspace / "data")]
    load_script("finetuning", "export_model").main(["--task_name", "topics", "--model_path", str(tuned), *of_data])
    capsys.readouterr()
    load_script("deploy/python", "infer").main(["--model_path", str(tuned), *of_data])
    *_, scores, last = capsys.readouterr().out.splitlines()
    assert last == f"acc: {json.loads(scores)['accuracy']:.6g}"


def test_export_equals_dynamic_model(workspace, tuned):
    features = topics_features(workspace)
    model, tokenizer, *_ = checkpoints.load_classifier(str(tuned))
    dynamic = modeling.predict(model, features, tokenizer.pad_id)
    static = engine.Engine(str(tuned / "inference")).predict(features, pad_id=tokenizer.pad_id)
    assert np.abs(dynamic - static).max() < 1e-4
    assert record(tuned)["export"]["parity"]["largest_difference"] < 1e-4


def test_predictions_do_not_depend_on_order_or_padding(workspace, tuned):
    features = topics_features(workspace)[:20]
    predictor = engine.Engine(str(tuned / "inference"))
    together = predictor.predict(features, batch_size=20)
    alone = np.concatenate([predictor.predict([f]) for f in features])
    assert np.abs(together - alone).max() < 1e-4


def test_pruned_widths_are_exported_and_accurate(tuned, pruned):
    for width in ("0.75", "0.5"):
        pruned_record = record(pruned / width / "sub_static")
        assert pruned_record["metrics"]["accuracy"] > record(tuned)["metrics"]["accuracy"] - 0.05
        assert pruned_record["export"]["parity"]["largest_difference"] < 1e-4
        assert pruned_record["params"] < record(tuned)["params"]
        assert (pruned / width / "sub_static/float.pdiparams.info").exists()
        assert (pruned / width / f"sub/model_width_{float(width):.5f}" / "model_config.json").exists()


@pytest.mark.parametrize("width", ["0.75", "0.5"])
def test_sub_model_loads_again_and_equals_the_supernet(workspace, pruned, width):
    features = topics_features(workspace)
    sub_model, _tokenizer, _ = dynabert.load_sub_model(str(pruned / width / f"sub/model_width_{float(width):.5f}"))
    best, *_ = checkpoints.load_classifier(str(pruned / width / "best_model"), stage="prune")
    supernet = dynabert.make_supernet(best, [float(width)])
    dynabert.set_width(supernet, float(width))
    expected = modeling.predict(supernet, features)
    assert np.abs(expected - modeling.predict(sub_model, features)).max() < 1e-5
    static = engine.Engine(str(pruned / width / "sub_static/float")).predict(features)
    assert np.abs(expected - static).max() < 1e-4
    accuracy = (static.argmax(-1) == [f.label for f in features]).mean()
    assert accuracy == pytest.approx(record(pruned / width / "best_model")["metrics"]["accuracy"], abs=1e-6)

    sub_model.train()  # and it can be trained further
    batch = batching.collate(features, range(8))
    before = float(
        paddle.nn.functional.cross_entropy(sub_model(paddle.to_tensor(batch.input_ids)), paddle.to_tensor(batch.labels))
    )
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=sub_model.parameters())
    for _ in range(5):
        loss = paddle.nn.functional.cross_entropy(
            sub_model(paddle.to_tensor(batch.input_ids)), paddle.to_tensor(batch.labels)
        )
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
    assert float(loss) < before


def test_quantized_variants_hold_the_accuracy(workspace, pruned, quantized):
    names = {f"{a}{n}" for a in ("mse", "avg", "abs_max", "hist") for n in (4, 8)}
    assert set(os.listdir(quantized)) == names
    fp32 = record(pruned / "0.75/sub_static")
    for name in names:
        found = record(quantized / name)
        assert found["metrics"]["agreement"] > 0.97
        assert found["metrics"]["accuracy"] > fp32["metrics"]["accuracy"] - 0.02
        assert found["variant"]["calib_samples"] == int(name[-1]) and found["variant"]["calib_split"] == "train"
        assert name in (workspace / "quant.log").read_text()


def test_quantized_weights_are_stored_as_int8(pruned, quantized):
    sub_model, _, _ = dynabert.load_sub_model(str(pruned / "0.75/sub/model_width_0.75000"))
    matrices = sum(p.size for name, p in sub_model.named_parameters() if p.ndim == 2 and "embeddings" not in name)
    saved = record(pruned / "0.75/sub_static")["export"]["bytes"] - record(quantized / "mse4")["metrics"]["bytes"]
    assert saved > 2.5 * matrices  # three of four bytes of every matrix go; scales come


def test_infer_all_prints_one_table(workspace, quantized):
    out = sh("deploy/python/infer_all.sh", "--data_dir", "data", cwd=workspace, QUANT_DIR=str(workspace)).stdout
    rows = [line for line in out.splitlines() if "topics_quant_models/" in line]
    assert len(rows) == 8 and sum("(best)" in row for row in rows) == 1
    for row in rows:
        name, accuracy = row.split("|")[1].strip(), float(row.split("|")[2].split()[0])
        assert accuracy == pytest.approx(record(workspace / name)["metrics"]["accuracy"], abs=1e-4)


def test_quant_all_and_export_all_find_everything(workspace, pruned, quantized):
    out = sh("pruning/export_all.sh", "pruned_models", "--data_dir", "data", cwd=workspace).stdout
    assert "width 0.5 exported" in out and "width 0.75 exported" in out and "32 dev records" in out
    out = sh(
        "quantization/quant_all.sh",
        "--data_dir",
        "data",
        "--algorithms",
        "abs_max",
        "--calib_samples",
        "4",
        "--overwrite",
        cwd=workspace,
        MODEL_DIR="pruned_models",
    ).stdout
    assert "topics_0.5_quant_models/abs_max4" in out and "topics_quant_models/abs_max4" in out


def test_fine_tuned_export_quantizes_into_its_own_directory(workspace, tuned):
    sh("quantization/quant.sh", "topics", tuned, "--data_dir", "data", "--algorithms", "hist", cwd=workspace)
    assert record(workspace / "topics_finetuned_quant_models/hist4")["model"]["width_mult"] == 1.0


@pytest.mark.parametrize("task", ["AFQMC", "cluewsc2020"])
def test_run_all_takes_a_task_through_every_stage(workspace, task, tmp_path):
    """In a copy of the repository's scripts, because run_all.sh writes where the contract says."""
    import shutil

    for name in ("common", "finetuning", "pruning", "quantization", "deploy"):
        shutil.copytree(
            os.path.join(ROOT, name),
            tmp_path / name,
            ignore=shutil.ignore_patterns("*models*", "small*", "__pycache__"),
        )
    for name in os.listdir(ROOT):
        if name.endswith((".py", ".sh")):
            shutil.copy(os.path.join(ROOT, name), tmp_path)
    # One task finds its data by the environment, the other by an argument that starts from here and is for every stage.
    found = {"CLUE_DATA_DIR": str(workspace / "data")} if task == "AFQMC" else {}
    named = [] if found else ["--data_dir", os.path.relpath(workspace / "data", tmp_path), "--overwrite"]
    out = sh(
        tmp_path / "run_all.sh", task, "1e-3", 16, 1, 48, 0, "tiny", "--init_config", workspace / "tiny.json", *named,
        "--vocab_file", workspace / "vocab.txt", cwd=tmp_path, **found,
        DATA_ARGS="--max_train_samples 40 --max_eval_samples 20", ONNX="1" if task == "AFQMC" else "",
    ).stdout  # fmt: skip
    assert "logits within" in out and "20 dev records" in out and "random tokens" not in out
    assert f"**{task.upper()}**" in out
    summary = out[out.index("== summary") :]
    for what in (
        "fine-tuned, FP32",
        "pruned to 0.75, FP32",
        "INT8 mse4",
        "INT8 hist8",
        "(best INT8)",
        "majority class",
    ):
        assert what in summary
    assert "partial train data: 40 of 60 train records" in summary
    assert ("pruned to 0.75, ONNX INT8 mse4" in summary) == (task == "AFQMC")


@pytest.mark.parametrize("model_type", ["bert", "ernie", "roberta"])
def test_other_families_go_through_the_chain(workspace, tmp_path, model_type):
    """Two steps each: what counts is that every stage takes what the one before wrote, with PaddleNLP's tokenizer too."""
    common = ["--task_name", "afqmc", "--data_dir", str(workspace / "data")]
    quick = ["--max_steps", "2", "--batch_size", "8", "--max_eval_samples", "10", "--max_seq_length", "40"]
    load_script("finetuning", "run_clue").main(
        [*common, *quick, "--model_type", model_type, "--init_config", str(workspace / "tiny.json"), "--vocab_file",
         str(workspace / "vocab.txt"), "--output_dir", str(tmp_path / "tuned"), "--use_faster_tokenizer", "False"]
    )  # fmt: skip
    load_script("finetuning", "export_model").main(
        [*common, "--model_path", str(tmp_path / "tuned"), "--model_type", model_type]
    )
    load_script("pruning", "prune").main(
        [*common, *quick, "--model_name_or_path", str(tmp_path / "tuned"), "--output_dir", str(tmp_path / "pruned"),
         "--width_mult_list", "0.5", "--importance_samples", "8"]
    )  # fmt: skip
    load_script("pruning", "export_model").main(
        [*common, "--model_name_or_path", str(tmp_path / "pruned/0.5/best_model"), "--sub_model_output_dir",
         str(tmp_path / "sub"), "--static_sub_model", str(tmp_path / "static/float")]
    )  # fmt: skip
    assert record(tmp_path / "static")["model"]["model_type"] == model_type
    accuracy = load_script("deploy/python", "infer").main(
        [*common, "--model_path", str(tmp_path / "static/float"), "--max_eval_samples", "10"]
    )
    assert next(iter(accuracy.values())) == pytest.approx(record(tmp_path / "static")["metrics"]["accuracy"], abs=0.11)


def test_a_new_task_starts_with_a_new_head(workspace, tuned, tmp_path):
    """A model that was fine-tuned on four labels goes on, as an encoder, with a task of two."""
    load_script("finetuning", "run_clue").main(
        ["--task_name", "afqmc", "--data_dir", str(workspace / "data"), "--model_name_or_path", str(tuned), "--output_dir",
         str(tmp_path / "m"), "--max_steps", "1", "--batch_size", "4", "--learning_rate", "1e-9", "--max_seq_length", "40"]
    )  # fmt: skip
    model, _, found, _ = checkpoints.load_classifier(str(tmp_path / "m"))
    before, _, parent, _ = checkpoints.load_classifier(str(tuned))
    learnt = found["metrics"]["accuracy"] > found["data"]["dev"]["majority_class"]
    assert learnt != ("fine-tuning: dev accuracy not above the majority class" in found["notes"])
    assert model.classifier.weight.shape == [64, 2] and found["parent"]["weights"] == parent["weights"]
    embeddings = [m.ppminilm.embeddings.word_embeddings.weight.numpy() for m in (model, before)]
    assert np.abs(embeddings[0] - embeddings[1]).max() < 1e-6


def test_perf_times_five_runs(workspace, quantized, tmp_path, capsys):
    infer, written = load_script("deploy/python", "infer"), tmp_path / "perf.json"
    infer.main(
        ["--model_path", str(quantized / "mse4"), "--int8", "--perf", "--perf_warmup_steps", "1", "--data_dir", str(workspace / "data"),
         "--perf_json", str(written)]
    )  # fmt: skip
    out = capsys.readouterr().out
    # The JSON has the printed mean, and the hash that the record has of the parameter file.
    (row,) = json.loads(written.read_text())["rows"]
    assert f" {row['sentences_per_second']:.1f} sentences/s (median" in out and len(row["seconds"]) == 5
    weights = record(quantized / "mse4")["weights"]["int8.pdiparams"]
    assert summarize.read_perf([written]).speeds == {weights: row["sentences_per_second"]}
    with pytest.raises(SystemExit):
        infer.parse_args(["--model_path", "x", "--perf_json", "y"])
    assert "--perf_json goes with --perf" in capsys.readouterr().err
    assert out.count("sentences/s") == 6 and "mean of 5 runs" in out


def test_an_export_needs_no_records_of_a_known_form(workspace, tuned, tmp_path, capsys):
    """A stage of one's own may read records as it likes; an export compares logits, on any tokens."""
    shutil.copytree(tuned, tmp_path / "m")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dev.json").write_text('{"title": "a", "kind": 3}\n')
    export = load_script("finetuning", "export_model")
    arguments = ["--task_name", "topics", "--model_path", str(tmp_path / "m"), "--data_dir"]
    export.main([*arguments, str(tmp_path / "data")])
    said = capsys.readouterr()
    assert "dev.json:1: no label; random tokens are compared instead" in said.err
    assert "on 32 sequences of random tokens" in said.out
    with pytest.raises(UserError, match="no dev.json for topics"):
        export.main([*arguments, str(tmp_path / "nothing")])


def test_a_directory_may_be_called_like_a_built_in_model(tuned, tmp_path, monkeypatch):
    """The name is in the contract: `finetuning/ppminilm-6l-768h/` may hold any model of the family."""
    shutil.copytree(tuned, tmp_path / "ppminilm-6l-768h")
    monkeypatch.chdir(tmp_path)
    model = checkpoints.load_pretrained("ppminilm-6l-768h", 4).model
    assert model.ppminilm.config.hidden_size == 64
