"""Gates at the hand-offs: each fails where what comes out is not what went in, and passes where its bound is moved."""

import shutil

import paddle
from conftest import refused
from test_damage import change_json, copies, read  # noqa: F401

import dynabert
from common import exporting, modeling, records


def spoil(model):
    """Makes one bias of the last layer another, as a defect in a conversion might."""
    bias = modeling.encoder_of(model).encoder.layers[-1].linear2.bias
    bias.set_value(bias + paddle.linspace(-1, 1, len(bias)))


def test_gates(copies, pruned, tuned, workspace, tmp_path, capsys, monkeypatch, fault):  # noqa: F811
    out = tmp_path / "out"
    export_static, reorder, slice_state = exporting.export_static, dynabert.reorder, dynabert.slice_state
    little = ["--max_train_samples", "64", "--max_eval_samples", "64", "--max_steps", "1"]

    def other_graph(model, prefix, cls_only=False):
        spoil(model)
        export_static(model, prefix, cls_only)

    def other_width(weights, *rest):
        return {name: array + ("linear1.bias" in name) for name, array in slice_state(weights, *rest).items()}

    directory = copies("fine-tuned")
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    monkeypatch.setattr(exporting, "export_static", other_graph)
    refused(capsys, out, ["--parity_tolerance", "logits differ"], read, "export", directory, workspace)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    read("export", directory, workspace, "--parity_tolerance", "1e9")
    assert records.read_record(str(directory))["export"]["parity"]["largest_difference"] > 1e-2
    monkeypatch.setattr(exporting, "export_static", export_static)

    directory = copies("pruned")
    monkeypatch.setattr(dynabert, "slice_state", other_width)
    refused(capsys, out, ["--parity_tolerance", "logits differ"], read, "export_pruned", directory, workspace)
    read("export_pruned", directory, workspace, "--parity_tolerance", "1e9")
    monkeypatch.setattr(dynabert, "slice_state", slice_state)
    shutil.rmtree(out)

    directory = copies("fine-tuned")
    monkeypatch.setattr(dynabert, "reorder", lambda model, *rest: (reorder(model, *rest), spoil(model)))
    refused(
        capsys, out, ["--parity_tolerance", "logits differ", "reordered"], read, "prune", directory, workspace, *little
    )
    read("prune", directory, workspace, "--parity_tolerance", "1e9", *little)
    monkeypatch.setattr(dynabert, "reorder", reorder)
    shutil.rmtree(out)

    directory = copies("width")
    change_json(directory / "stage.json", lambda record: record["metrics"].update(accuracy=0.3))
    refused(capsys, out, ["training recorded 0.3000", "--accuracy_tolerance"], read, "quantize", directory, workspace)
    few = ["--algorithms", "abs_max", "--calib_samples", "4"]
    read("quantize", directory, workspace, "--accuracy_tolerance", "1", *few)
    fault("silent wrongness: what a hand-off gives is not what it got", "a wrong bias in the graph, in a width, in the "
          "reordered supernet; another accuracy than training recorded", 4,
          "the stage fails, names the bound and the option that moves it, and passes with that option")  # fmt: skip
