"""--analyze and --max_drop: which products lose accuracy in INT8, and that the worst stays in floating point."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import load_script, record

import calibration
import products
import sensitivity
from common import UserError, checkpoints, engine, exporting, files, modeling, records, tables

PLANTED = "classifier"


@pytest.fixture(scope="module")
def planted(workspace, tuned, tmp_path_factory):
    """The fine-tuned model with an outlier in each column of one weight: the same answers in FP32, wrong ones in INT8.

    One output of the pooler is made constant, its weights in the classifier large, and the biases take back what that
    adds. Beside the outlier nothing is left of the other weights of a column when they are rounded to 8 bits.
    """
    directory = tmp_path_factory.mktemp("planted") / "model"
    shutil.copytree(tuned, directory)
    model = checkpoints.load_classifier(str(tuned)).model
    pooler, classifier = modeling.encoder_of(model).pooler.dense, model.classifier
    unit, outlier = np.abs(classifier.weight.numpy()).sum(1).argmin(), 100.0  # the output that is missed least
    for parameter, place, values in (
        (pooler.weight, np.s_[:, unit], 0.0),
        (pooler.bias, unit, 3.0),
        (classifier.weight, unit, outlier),
        (classifier.bias, np.s_[:], classifier.bias.numpy() - outlier * np.tanh(3.0)),
    ):
        array = parameter.numpy()
        array[place] = values
        parameter.set_value(array)
    model.save_pretrained(str(directory))
    changed = record(directory)
    changed["weights"] = files.hash_files(directory, changed["weights"])
    del changed["export"]
    records.write_record(str(directory), changed)
    export = load_script("finetuning", "export_model").main
    export(["--task_name", "topics", "--model_path", str(directory), "--data_dir", str(workspace / "data")])
    return directory


@pytest.fixture
def few_products(monkeypatch):
    """Only the last layer, pooler and classifier are asked about, which saves time."""
    found = products.products_of
    monkeypatch.setattr(products, "products_of", lambda prefix, layers: found(prefix, layers)[-6:])


def quantize(workspace, source, output, *more):
    arguments = [
        "--task_name",
        "topics",
        "--input_dir",
        source,
        "--output_dir",
        output,
        "--data_dir",
        workspace / "data",
    ]
    arguments += ["--algorithms", "abs_max", "--calib_samples", "8", *more]
    load_script("quantization", "quant_post").main([str(argument) for argument in arguments])


def test_products_are_called_what_they_are(workspace, tuned, tmp_path):
    """By the model itself, for a graph with a whole last layer and one that computes it for [CLS] alone."""
    classifier = checkpoints.load_classifier(str(tuned))
    model, layers = classifier.model, modeling.encoder_of(classifier.model).encoder.layers
    features = exporting.parity_inputs(None, classifier.tokenizer, 64)[0][:4]
    places = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"}
    places.update(
        {"attention output": "self_attn.out_proj", "FFN in": "linear1", "FFN out": "linear2", "pooler": "pooler.dense"}
    )
    owner = {name: parameter.name for name, parameter in model.named_parameters()}
    for cls_only, count in ((False, 6 * len(layers) + 2), (True, 6 * len(layers))):
        exporting.export_static(model, str(tmp_path / "float"), cls_only)
        calibration.quantize(str(tmp_path / "float"), features, 0, "abs_max", str(tmp_path), True)
        found = products.products_of(str(tmp_path / "int8"), len(layers))
        assert len(found) == count
        for product in found:
            place = places.get(product.part, product.part)
            place = place if product.layer is None else f"encoder.layers.{product.layer}.{place}"
            (name,) = [name for name in owner if name.endswith(f"{place}.weight") and "embeddings" not in name]
            assert owner[name] == product.weight and tuple(model.state_dict()[name].shape) == product.shape
            assert product.per_token == (not cls_only or product.layer == 0) if product.layer is not None else True
    # Of an encoder with another number of layers nothing is known but the order.
    assert products.products_of(str(tmp_path / "int8"), 7)[1].name == "product 1"


def test_all_products_in_float_are_the_fp32_model(tuned, tmp_path):
    """oneDNN computes in INT8 whatever it has scales for; none of what was returned is left there."""
    classifier = checkpoints.load_classifier(str(tuned))
    features, _ = exporting.parity_inputs(None, classifier.tokenizer, 64)
    prefix, int8 = str(tuned / "inference"), str(tmp_path / "int8")
    calibration.quantize(prefix, features[:8], 0, "abs_max", str(tmp_path), int8_embeddings=False)
    found = products.products_of(int8, 2)
    fp32 = engine.Engine(prefix).predict(features)
    errors = []
    for chosen in ([], found[:1], found[:6], found):
        products.return_to_float(int8, str(tmp_path / "mixed/int8"), products.original_weights(prefix, chosen))
        errors.append(
            np.abs(engine.Engine(str(tmp_path / "mixed/int8"), precision="int8").predict(features) - fp32).max()
        )
    assert errors[0] > 1e-3 and errors[3] < 1e-5, errors
    assert errors[3] < errors[2] < errors[0], errors
    graph = (tmp_path / "mixed/int8.pdmodel").read_bytes()
    assert b"op_callstack" not in graph and b".py" not in graph


def test_a_planted_outlier_is_found_and_left_in_float(workspace, planted, few_products, tmp_path, capsys, monkeypatch):
    limits = ["--max_drop", "0.002", "--min_agreement", "0.98", "--analyze_records", "100"]
    quantize(workspace, planted, tmp_path / "q", "--analyze", *limits)
    out = capsys.readouterr().out
    assert f"most is lost in {PLANTED}, " in out
    place = tmp_path / "q_sensitivity/abs_max8"
    rows = {row["name"]: row for row in json.loads((place / "sensitivity.json").read_text())["rows"]}
    alone = {name: row for name, row in rows.items() if len(row["products"]) == 1}
    for side, worst in (("alone_int8", max), ("alone_float", min)):
        assert worst(alone, key=lambda name: alone[name][side]["squared_error"]) == PLANTED
    assert rows[PLANTED]["alone_int8"]["agreement"] < -0.3 < -0.05 < rows["layer 1"]["alone_int8"]["agreement"]
    assert (place / "sensitivity.png").stat().st_size > 10000 and PLANTED in (place / "sensitivity.md").read_text()
    # The whole variant agrees too rarely, and is not written. With that one product in floating point it is as FP32.
    assert not (tmp_path / "q/abs_max8").exists()
    written = record(tmp_path / "q/abs_max8_max_drop_0.002")
    assert written["variant"]["floating"] == [PLANTED] and written["variant"]["chosen_by"]["select_on"] == "dev"
    metrics = written["metrics"]
    assert metrics["fp32_accuracy"] - metrics["accuracy"] <= 0.002 and metrics["agreement"] >= 0.98
    # Whatever runs the graph finds the choice in it.
    arguments = ["--model_path", str(tmp_path / "q/abs_max8_max_drop_0.002"), "--data_dir", str(workspace / "data")]
    load_script("deploy/python", "infer").main([*arguments, "--int8"])
    assert f'"accuracy": {metrics["accuracy"]}' in capsys.readouterr().out
    load_script("deploy/onnx", "export_onnx").main([*arguments, "--output_dir", str(tmp_path / "onnx")])
    assert record(tmp_path / "onnx")["metrics"]["agreement"] >= 0.98
    assert tables.row_of(written)[0].endswith("INT8 abs_max8, 1 product in floating point")
    # A rerun finds the choice, and asks nothing again; after a kill before it was written, the answers are still there.
    asked = []
    monkeypatch.setattr(
        sensitivity.Subject, "write", lambda *a, _write=sensitivity.Subject.write: asked.append(a) or _write(*a)
    )
    quantize(workspace, planted, tmp_path / "q", *limits)
    assert asked == [] and f"in floating point {PLANTED}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "q/abs_max8_max_drop_0.002")
    quantize(workspace, planted, tmp_path / "q", *limits)
    assert len(asked) == 2  # to time it, and to write it
    with pytest.raises(
        UserError,
        match="was chosen by other limits \\(min_agreement 0.98 -> 0.97, analyze_records 100 -> 1000\\); --overwrite chooses anew",
    ):
        quantize(workspace, planted, tmp_path / "q", *limits[:2], "--min_agreement", "0.97")
    # PaddleSlim writes the operators of a variant that is made again in another order (tests/README.md).
    again = record(tmp_path / "q/abs_max8_max_drop_0.002")["weights"]
    assert again["int8.pdiparams"] == written["weights"]["int8.pdiparams"]


def test_limits_that_hold_anyway_or_never(workspace, tuned, few_products, tmp_path, capsys, monkeypatch):
    """Status 1 says that there is no model within the limits; a smaller drop and a better agreement are both needed."""
    few = ["--max_eval_samples", "60", "--analyze_records", "20"]
    quantize(workspace, tuned, tmp_path / "q", "--max_drop", "0.1", "--select_on", "train", *few)
    out = capsys.readouterr().out
    assert "on 60 records of train" in out and "both hold as it is" in out
    # A model that answers one record in three differently, whatever is in floating point.
    predict = calibration.Reference.predict
    signs = np.where(np.arange(60) % 3 == 0, -1, 1)[:, None]
    monkeypatch.setattr(calibration.Reference, "predict", lambda *a: predict(*a) * signs[: len(a[0].features)])
    quantize(workspace, tuned, tmp_path / "q", "--max_drop", "0.4", "--min_agreement", "0.6", *few)
    assert "both hold as it is" in capsys.readouterr().out
    for limits in (["--max_drop", "0.3", "--min_agreement", "0.6"], ["--max_drop", "0.4", "--min_agreement", "0.7"]):
        with pytest.raises(SystemExit) as stopped:
            quantize(workspace, tuned, tmp_path / "q", *limits, *few)
        assert stopped.value.code == 1 and "cannot be held by leaving products" in capsys.readouterr().out
    assert os.listdir(tmp_path / "q") == ["abs_max8"]
    # Nothing that agrees well enough: that is what --analyze is for, and the stage has failed nevertheless.
    with pytest.raises(SystemExit) as stopped:
        quantize(workspace, tuned, tmp_path / "none", "--min_agreement", "0.9", "--analyze", *few)
    assert stopped.value.code == 1 and not (tmp_path / "none").exists()
    assert (tmp_path / "none_sensitivity/abs_max8/sensitivity.md").exists()


def test_mistakes_with_limits_are_refused(workspace, tuned, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        quantize(workspace, tuned, tmp_path / "q", "--max_drop", "20")
    assert stopped.value.code == 2 and "is no share of 1" in capsys.readouterr().err
    for arguments, message in (
        (["--select_on", "train", "--calib_split", "dev"], "does not go with --calib_split dev"),
        (["--select_on", "train", "--max_train_samples", "8"], "none is left to choose"),
    ):
        with pytest.raises(UserError, match=message):
            quantize(workspace, tuned, tmp_path / "q", "--max_drop", "0.1", *arguments)
    assert not (tmp_path / "q").exists()
