"""INT8 in the engine that serves: the operators that keep the accuracy, the gate, and what is refused."""

import os
import shutil

import numpy as np
import paddle
import pytest
from conftest import load_script, record

import calibration
import data
from common import UserError, batching, checkpoints, engine, exporting, modeling, records, tokenization


@pytest.fixture(scope="module")
def dev(workspace, tuned):
    tokenizer = tokenization.load_tokenizer(str(tuned))
    task = data.get_task("topics", str(workspace / "data"))
    return batching.convert(data.read_split(task, "dev", str(workspace / "data")).examples, tokenizer, 64)


def test_default_operators_of_onednn_ruin_the_accuracy(workspace, tuned, tmp_path, dev):
    """The reason for INT8_OPERATORS: the same file, with oneDNN's own list and with ours, where all layers are whole."""
    labels = [f.label for f in dev]

    def accuracy_of(logits):
        return (logits.argmax(-1) == labels).mean()

    exporting.export_static(checkpoints.load_classifier(str(tuned))[0], str(tmp_path / "float"), cls_only=False)
    task = data.get_task("topics", str(workspace / "data"))
    train = data.read_split(task, "train", str(workspace / "data")).examples[:8]
    samples = batching.convert(train, tokenization.load_tokenizer(str(tuned)), 64)
    calibration.quantize(str(tmp_path / "float"), samples, 0, "abs_max", str(tmp_path), int8_embeddings=False)
    fp32 = accuracy_of(engine.Engine(str(tmp_path / "float")).predict(dev))
    prefix = str(tmp_path / "int8")
    ours = accuracy_of(engine.Engine(prefix, precision="int8").predict(dev))
    default = accuracy_of(engine.Engine(prefix, precision="int8", int8_operators=set()).predict(dev))
    assert ours > fp32 - 0.02
    assert default < fp32 - 0.03, "the defect is gone: measure whether the restriction is still needed"


def test_square_weights_are_read_right(workspace, tuned, tmp_path, dev):
    """The reason for scale_square_weights_by_rows: with scales per column the engine computes with other weights."""
    task = data.get_task("topics", str(workspace / "data"))
    train = data.read_split(task, "train", str(workspace / "data")).examples[:8]
    samples = batching.convert(train, tokenization.load_tokenizer(str(tuned)), 64)
    prefix, errors = str(tuned / "inference"), {}
    fp32 = engine.Engine(prefix).predict(dev)
    for name, for_gpu in (("rows", False), ("columns", True)):
        place = tmp_path / name
        calibration.quantize(prefix, samples, 0, "abs_max", str(place), int8_embeddings=False, for_gpu=for_gpu)
        for precision in ("int8", engine.SIMULATED):
            found = engine.Engine(str(place / "int8"), precision=precision).predict(dev)
            errors[name, precision] = np.sqrt(((found - fp32) ** 2).mean())
    # The graph means the same either way, which the simulation shows; the engine finds that only with scales per row.
    assert errors["rows", engine.SIMULATED] < 1.5 * errors["columns", engine.SIMULATED]
    assert errors["columns", "int8"] > 2 * errors["rows", "int8"], "the defect is gone: leave the scales per column"


def test_int8_engine_is_really_int8(pruned, quantized, dev):
    """INT8 differs from FP32 by more than rounding of float, and by little; BF16 lies between."""
    fp32 = engine.Engine(str(pruned / "0.75/sub_static/float")).predict(dev)
    bf16 = engine.Engine(str(pruned / "0.75/sub_static/float"), precision="bf16").predict(dev)
    int8 = engine.Engine(str(quantized / "mse8/int8"), precision="int8").predict(dev)
    assert np.abs(int8 - fp32).max() > 1e-3
    assert (int8.argmax(1) == fp32.argmax(1)).mean() > 0.97
    simulated = paddle.inference.Config(
        *(str(quantized / f"mse8/int8{suffix}") for suffix in (".pdmodel", ".pdiparams"))
    )
    simulated.disable_glog_info()
    simulator = paddle.inference.create_predictor(simulated)
    batch = batching.collate(dev, range(8))
    for name, array in zip(simulator.get_input_names(), (batch.input_ids, batch.token_type_ids)):
        simulator.get_input_handle(name).copy_from_cpu(array)
    simulator.run()
    found = simulator.get_output_handle(simulator.get_output_names()[0]).copy_to_cpu()
    assert np.abs(found - int8[:8]).max() > 1e-5  # the same file without INT8 gives other numbers
    if "avx512f" in records.describe_machine()["flags"]:
        assert np.abs(bf16 - fp32).max() > 1e-4
    assert (bf16.argmax(1) == fp32.argmax(1)).mean() > 0.97


def quantize(workspace, source, output, *more):
    load_script("quantization", "quant_post").main(
        [
            "--task_name",
            "topics",
            "--input_dir",
            str(source),
            "--output_dir",
            str(output),
            "--data_dir",
            str(workspace / "data"),
            "--algorithms",
            "abs_max",
            "--calib_samples",
            "4",
            *more,
        ]
    )


def test_gate_on_agreement(workspace, pruned, tmp_path, monkeypatch, capsys):
    """A variant whose predictions are not FP32's is reported, not written, and fails the stage."""
    monkeypatch.setattr(
        engine.Engine,
        "predict",
        lambda self, features, *a, _original=engine.Engine.predict, **k: (
            _original(self, features, *a, **k) * (-1 if "int8" in self.prefix else 1)
        ),
    )
    with pytest.raises(SystemExit) as stopped:
        quantize(workspace, pruned / "0.75/sub_static", tmp_path / "q")
    assert stopped.value.code == 1 and not (tmp_path / "q").exists()
    assert "no variant agrees with FP32 on 0.9 of dev" in capsys.readouterr().err
    quantize(workspace, pruned / "0.75/sub_static", tmp_path / "q", "--min_agreement", "0")
    assert record(tmp_path / "q/abs_max4")["metrics"]["agreement"] < 0.1


def test_calibration_split_is_recorded(workspace, pruned, tmp_path, capsys):
    quantize(workspace, pruned / "0.75/sub_static", tmp_path / "q", "--calib_split", "dev", "--max_eval_samples", "50")
    found = record(tmp_path / "q/abs_max4")
    assert found["arguments"]["calib_split"] == "dev" and "train" not in found["data"]
    quantize(workspace, pruned / "0.75/sub_static", tmp_path / "q", "--calib_split", "dev", "--max_eval_samples", "50")
    with pytest.raises(UserError, match="calib_split dev -> train"):
        quantize(workspace, pruned / "0.75/sub_static", tmp_path / "q", "--max_eval_samples", "50")


def test_inputs_that_are_no_export_are_refused(workspace, tuned, pruned, quantized, tmp_path):
    with pytest.raises(UserError, match="not exported"):
        quantize(workspace, pruned / "0.75/best_model", tmp_path / "q")
    with pytest.raises(UserError, match="quantized already"):
        quantize(workspace, quantized / "mse4", tmp_path / "q")
    shutil.copytree(pruned / "0.75/sub_static", tmp_path / "damaged")
    with open(tmp_path / "damaged/float.pdiparams", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="float.pdiparams: missing, damaged"):
        quantize(workspace, tmp_path / "damaged", tmp_path / "q")
    with pytest.raises(UserError, match="AFQMC: .*is a model of topics"):
        load_script("quantization", "quant_post").main(
            ["--task_name", "AFQMC", "--input_dir", str(pruned / "0.75/sub_static")]
        )
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    "stage, width, expected",
    [
        ("finetune", 1.0, "tnews_finetuned_quant_models"),
        ("prune_export", 0.75, "tnews_quant_models"),
        ("prune_export", 0.5, "tnews_0.5_quant_models"),
    ],
)
def test_output_directory_follows_the_input(stage, width, expected):
    found = load_script("quantization", "quant_post").default_output_dir(
        {"task": "TNEWS", "stage": stage, "model": {"width_mult": width}}
    )
    assert found == expected


def test_precisions_are_checked(tuned, quantized):
    int8, fp32 = str(quantized / "mse4/int8"), str(tuned / "inference")
    for prefix, device, precision, message in (
        (int8, "cpu", "fp32", "a quantized model, which runs in int8"),
        (int8, "cpu", "bf16", "which runs in int8"),
        (fp32, "cpu", "int8", "not a quantized model"),
        (fp32, "cpu", "fp16", "is for a GPU"),
        (fp32, "gpu", "bf16", "on a GPU use fp16"),
    ):
        with pytest.raises(UserError, match=message):
            engine.check_precision(prefix, device, precision)


@pytest.mark.parametrize(
    "flags, precision, expected",
    [
        (["avx512_vnni"], "int8", "VNNI, full speed"),
        (["avx2"], "int8", "no VNNI"),
        (["amx_int8"], "int8", "AMX"),
        (["avx512f", "avx512_bf16"], "bf16", "full speed"),
        (["avx512f"], "bf16", "emulates"),
        (["avx2"], "bf16", "stays with FP32"),
    ],
)
def test_preflight_says_what_this_cpu_has(monkeypatch, flags, precision, expected):
    monkeypatch.setattr(records, "describe_machine", lambda: {"flags": flags})
    assert expected in engine.preflight(precision)


def test_infer_on_own_texts(workspace, quantized, tmp_path, capsys):
    import json

    infer = load_script("deploy/python", "infer")
    (tmp_path / "texts.txt").write_text("丐一足丁球七\n股三万银\n", encoding="utf-8")
    infer.main(["--model_path", str(quantized / "mse4/int8"), "--int8", "--input_file", str(tmp_path / "texts.txt")])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["label"] for a in answers] == ["体育", "财经"]
    for answer in answers:
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert (
            answer["probability"] == max(answer["probabilities"].values()) == answer["probabilities"][answer["label"]]
        )
    for arguments, message in (
        (["--text", " "], "text 1 is empty"),
        (["--text", "甲", "--text_pair", "乙"], "takes single texts"),
        (["--input_file", os.devnull], "no text in it"),
    ):
        with pytest.raises(UserError, match=message):
            infer.main(["--model_path", str(quantized / "mse4/int8"), "--int8", *arguments])


def test_graphs_name_no_source_files(tuned, pruned, quantized):
    """Paddle writes into every operator where in the source it was made; what is left runs the same."""
    for path in (
        tuned / "inference.pdmodel",
        pruned / "0.75/sub_static/float.pdmodel",
        quantized / "mse4/int8.pdmodel",
    ):
        graph = path.read_bytes()
        assert b"op_callstack" not in graph and b"site-packages" not in graph and b".py" not in graph


@pytest.mark.parametrize("device, precision, asked, expected", [
    ("cpu", "int8", True, False), ("gpu", "int8", False, True), ("gpu", "fp16", False, True), ("gpu:1", "fp32", False, False),
    ("gpu", "fp32", True, True),
])  # fmt: skip
def test_tensorrt_is_used_where_only_it_can(device, precision, asked, expected):
    assert engine.needs_trt(device, precision, asked) == expected


def test_rows_in_int8_against_numpy():
    """Each row within half a step of its own scale, whatever the others are; a row of zeros stays one."""
    weight = np.random.default_rng(0).normal(size=(50, 8)).astype("float32") * np.logspace(-3, 2, 50)[:, None]
    weight[7] = 0
    rows, scales = load_script("quantization", "weights").quantize_rows(weight)
    assert rows.dtype == np.int8 and scales.shape == (50, 1) and np.isfinite(scales).all()
    assert (np.abs(rows * scales - weight) <= np.abs(weight).max(1, keepdims=True) / 127 * 0.5001).all()
    assert (np.abs(rows).max(1)[np.arange(50) != 7] == 127).all()


def test_embeddings_in_int8(workspace, tuned, tmp_path, dev):
    """The graph differs from the whole one only by the rounding of the table; the file loses three of its four bytes."""
    weights = load_script("quantization", "weights")
    weights.store_in_int8(str(tuned / "inference"), str(tmp_path / "rows"))
    before, after = (
        engine.Engine(str(tuned / "inference")).predict(dev),
        engine.Engine(str(tmp_path / "rows")).predict(dev),
    )
    assert 1e-5 < np.abs(after - before).max() < 0.1 and (after.argmax(1) == before.argmax(1)).mean() > 0.98
    model, *_ = checkpoints.load_classifier(str(tuned))
    table = modeling.encoder_of(model).embeddings.word_embeddings.weight
    with paddle.no_grad():
        rows, scales = weights.quantize_rows(table.numpy())
        table.set_value(rows * scales)
    assert np.abs(modeling.predict(model, dev, 0) - after).max() < 1e-4
    sizes = [os.path.getsize(f"{prefix}.pdiparams") for prefix in (tuned / "inference", tmp_path / "rows")]
    assert sizes[0] - sizes[1] == pytest.approx(table.size * 3 - 4 * table.shape[0], rel=0.05)


def test_embeddings_may_stay_in_fp32(workspace, pruned, tmp_path, capsys):
    for kind in ("True", "False"):
        quantize(workspace, pruned / "0.75/sub_static", tmp_path / kind, "--int8_embeddings", kind)
    sizes = [record(tmp_path / kind / "abs_max4")["metrics"]["bytes"] for kind in ("True", "False")]
    assert sizes[0] < sizes[1] and record(tmp_path / "True/abs_max4")["variant"]["int8_embeddings"] is True


def test_quantizing_for_a_gpu_on_a_machine_without_one(workspace, tuned, tmp_path):
    """A graph with its whole last layer, FP32 embeddings, scored by the simulation, and all of that in the record."""
    whole, of_data = tmp_path / "whole", ["--data_dir", str(workspace / "data")]
    shutil.copytree(tuned, whole)
    export = load_script("finetuning", "export_model").main
    common = ["--algorithms", "mse", "--calib_samples", "8"]
    export(["--task_name", "topics", "--model_path", str(whole), *of_data])  # for CPUs, as there is no GPU
    with pytest.raises(UserError, match="--cls_only False"):
        quantize(workspace, whole, tmp_path / "refused", "--for", "gpu", *common)
    export(["--task_name", "topics", "--model_path", str(whole), "--cls_only", "False", *of_data])
    with pytest.raises(UserError, match="leave it out with --for gpu"):
        quantize(workspace, whole, tmp_path / "refused", "--for", "gpu", "--int8_embeddings", *common)
    quantize(workspace, whole, tmp_path / "int8", "--for", "gpu", *common)
    written = record(tmp_path / "int8/mse8")
    assert "INT8 for a GPU, scored by a simulation on a CPU" in written["notes"]
    variant = written["variant"]
    assert (variant["device"], variant["scored_in"], variant["int8_embeddings"]) == ("gpu", "simulated int8", False)
    assert written["metrics"]["agreement"] > 0.95 and not (tmp_path / "refused").exists()
