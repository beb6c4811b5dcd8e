"""Damaged input is refused by name, and never used: models, stage records, tokenizers, pickles."""

import contextlib
import copy
import json
import os
import pickle
import shutil

import numpy as np
import paddle
import pytest
from conftest import load_script, refused

import data
from common import UserError, batching, checkpoints, modeling, records, tokenization
from common.provenance import identity


def cut(path, keep=0.7):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def exchange_tokens(path):
    """Another tokenizer: as many tokens, two of them exchanged."""
    tokens = path.read_text(encoding="utf-8").splitlines()
    tokens[10], tokens[11] = tokens[11], tokens[10]
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")


def change_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


DAMAGE = {
    "cut off": cut,
    "one bit wrong": flip,
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}
# (what a stage reads, its files, the stage that reads it)
MODELS = {
    "fine-tuned, to start from": (
        ["model_state.pdparams", "config.json", "vocab.txt", "tokenizer_config.json"],
        "fine_tune",
    ),
    "fine-tuned": (["model_state.pdparams", "config.json", "vocab.txt", "tokenizer_config.json"], "prune"),
    "exported": (["inference.pdiparams", "inference.pdmodel", "vocab.txt"], "quantize"),
    "pruned": (["model_state.pdparams", "config.json", "vocab.txt"], "export_pruned"),
    "width": (["float.pdiparams", "float.pdmodel", "vocab.txt", "tokenizer_config.json"], "quantize"),
    "quantized": (["int8.pdiparams", "int8.pdmodel", "vocab.txt"], "infer"),
}


@pytest.fixture
def copies(tuned, pruned, quantized, tmp_path):
    """A function (kind) that copies a model of that kind."""
    places = {
        "fine-tuned": tuned, "fine-tuned, to start from": tuned, "exported": tuned, "pruned": pruned / "0.75/best_model",
        "width": pruned / "0.75/sub_static", "quantized": quantized / "mse4",
    }  # fmt: skip

    def copy_of(kind):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        shutil.copytree(places[kind], tmp_path / "m")
        return tmp_path / "m"

    return copy_of


def read(stage, directory, workspace, *more_words):
    """Runs the stage that reads ``directory``; it is to be refused, so nothing of it is ever computed."""
    out = directory.parent / "out"
    more = {
        "fine_tune": f"finetuning/run_clue --model_name_or_path {directory} --output_dir {out}",
        "prune": f"pruning/prune --model_name_or_path {directory} --output_dir {out} --width_mult_list 0.75",
        "export": f"finetuning/export_model --model_path {directory}",
        "export_pruned": f"pruning/export_model --model_name_or_path {directory} --sub_model_output_dir {out}/sub "
        f"--static_sub_model {out}/static/float",
        "quantize": f"quantization/quant_post --input_dir {directory} --output_dir {out}",
        "infer": f"deploy/python/infer --model_path {directory} --precision int8",
    }[stage]
    script, *words = more.split()
    options = ["--task_name", "topics", "--data_dir", str(workspace / "data")]
    load_script(*os.path.split(script)).main([*words, *options, *more_words])


@pytest.mark.parametrize("kind", MODELS)
def test_damaged_models(kind, copies, workspace, capsys, fault):
    files, stage = MODELS[kind]
    for name in files:
        for cause in DAMAGE.values():
            directory = copies(kind)
            cause(directory / name)
            refused(capsys, directory.parent / "out", [name], read, stage, directory, workspace)
    fault(f"{kind} model: a file cut off, one bit wrong, missing, empty", ", ".join(f"`{name}`" for name in files),
          len(files) * len(DAMAGE), "refused by the name of the file, status 2, nothing written")  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_the_tokenizer_of_another_model(kind, copies, workspace, capsys, fault):
    directory = copies(kind)
    exchange_tokens(directory / "vocab.txt")
    stage = MODELS[kind][1]
    refused(capsys, directory.parent / "out", ["vocab.txt", "not of this"], read, stage, directory, workspace)
    fault("the tokenizer of another model", "two tokens of `vocab.txt` exchanged", 1, "refused by the name of the file")


def test_weights_of_another_model(copies, pruned, tuned, quantized, workspace, capsys, fault):
    """Files that are good in themselves, of another width, another variant or another task."""
    directory = copies("width")
    for name in ("float.pdiparams", "float.pdmodel"):
        shutil.copy(pruned / "0.5/sub_static" / name, directory)
    refused(capsys, directory.parent / "out", ["float.pdiparams"], read, "quantize", directory, workspace)
    directory = copies("quantized")
    shutil.copy(quantized / "hist8/int8.pdiparams", directory)
    refused(capsys, directory.parent / "out", ["int8.pdiparams"], read, "infer", directory, workspace)
    directory = copies("fine-tuned")
    change_json(directory / "stage.json", lambda record: record.update(task="TNEWS"))
    refused(capsys, directory.parent / "out", ["is a model of TNEWS"], read, "prune", directory, workspace)
    fault("weights of another width, variant or task", "files exchanged between good models", 3, "refused by name")


def test_without_a_record_shapes_are_compared(pruned, tuned, workspace, tmp_path, capsys, fault):
    """A model directory from elsewhere has no hashes; then every parameter has to be there, in its shape."""
    out, arrays = tmp_path / "out", checkpoints.read_tensors(str(tuned / "model_state.pdparams"))
    narrow = checkpoints.read_tensors(str(pruned / "0.5/sub/model_width_0.50000/model_state.pdparams"))
    layer = "ppminilm.encoder.layers.1.linear1.weight"
    for weights, words in (
        ({name: value for name, value in arrays.items() if name != layer}, [layer, "is not there"]),
        (narrow, ["has shape", "another architecture, width"]),
        ({**arrays, layer: np.full_like(arrays[layer], np.nan)}, [layer, "not finite"]),
    ):
        directory = tmp_path / "m"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tuned, directory, ignore=shutil.ignore_patterns("stage.json", "inference.*", "*.pdparams"))
        paddle.save({k: paddle.to_tensor(v) for k, v in weights.items()}, str(directory / "model_state.pdparams"))
        refused(capsys, out, ["model_state.pdparams", *words], read, "fine_tune", directory, workspace)
    fault("weights of no record: a tensor missing, of another width, not finite", "saved anew", 3,
          "refused by the name of the tensor (`from_pretrained` starts it at random)")  # fmt: skip


def places(value, path=()):
    """Every place in a JSON value: paths of keys and indices."""
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


NEEDED = ("task", "labels", "model.model_type", "model.width_mult", "model.architecture.max_position_embeddings", "weights",
          "files", "arguments.max_seq_length", "data.dev.md5", "data.dev.examples", "metrics.accuracy",
          "parent.weights")  # fmt: skip


def read_all(directory):
    """What the stages read of a record, before they compute anything."""
    record = records.read_record(str(directory))
    records.check_task(record, "topics", "m", "ppminilm")
    records.sequence_length(type("Arguments", (), {"max_seq_length": None}), record)
    identity(record["arguments"], record["parent"], record["data"], set())
    checkpoints.open_graph(str(directory))


def test_wrong_records(copies, fault):
    """Every field of stage.json, gone or replaced: what a stage needs is refused by name, and nothing ends in a trace."""
    tried = by_name = 0
    for kind in ("fine-tuned", "width", "quantized"):
        directory = copies(kind)
        path = directory / "stage.json"
        whole = json.loads(path.read_text(encoding="utf-8"))
        for place in [place for place in places(whole) if place[0] not in ("machine", "versions", "notes")]:
            for wrong in (..., None, True, "x", -7, [], {}):
                record = copy.deepcopy(whole)
                holder = record
                for key in place[:-1]:
                    holder = holder[key]
                right, name = holder.pop(place[-1]), ".".join(map(str, place))
                if wrong is not ...:
                    holder.insert(place[-1], wrong) if isinstance(holder, list) else holder.update({place[-1]: wrong})
                path.write_text(json.dumps(record), encoding="utf-8")
                tried += 1
                needed = any(name == field or name.startswith(f"{field}.") for field in NEEDED)
                one_less = wrong is ... and place[:-1][-1:] in (("weights",), ("files",), ("labels",))
                number = isinstance(right, float) and type(wrong) is int
                try:
                    read_all(directory)
                    said = ""
                except UserError as error:
                    said = str(error)
                if needed and type(wrong) is not type(right) and not one_less and not number:
                    assert f"stage.json: not a stage record: field '{name}' is" in said, (name, wrong, said)
                    by_name += 1
        for text in ("", "{", "[]", "null", "\ufeff{}", '{"schema": 1}', '{"schema": 7}'):
            path.write_text(text, encoding="utf-8")
            with pytest.raises(UserError, match="stage.json: (not JSON|not a stage record|written by another)"):
                records.read_record(str(directory))
    fault("wrong `stage.json`", "each of its fields gone, null, true, a text, a negative number, a list, an object", tried,
          f"refused by the name of the field where a stage needs it ({by_name}); no stack trace for the others")  # fmt: skip


def test_records_of_the_first_version_are_read(copies):
    """They had no hashes of the files beside the weights."""
    directory = copies("quantized")
    change_json(directory / "stage.json", lambda record: (record.update(schema=1), record.pop("files")))
    assert records.read_record(str(directory))["files"] == {}
    read_all(directory)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_that_is_more_than_tensors_runs_nothing(tuned, workspace, tmp_path, capsys, fault):
    directory, mark = tmp_path / "m", str(tmp_path / "it_ran")
    shutil.copytree(tuned, directory, ignore=shutil.ignore_patterns("stage.json", "inference.*"))
    weights = directory / "model_state.pdparams"
    state = dict(checkpoints.read_tensors(str(weights)).items())
    weights.write_bytes(pickle.dumps({**state, "more": Payload(mark)}, protocol=4))
    with contextlib.suppress(NotImplementedError):  # an open file is no tensor; but it is open by then
        paddle.load(str(weights))
    assert os.path.exists(mark), "the payload is dead: this test shows nothing"
    os.remove(mark)
    with pytest.raises(UserError, match="model_state.pdparams: .*io.open.*it was not loaded"):
        checkpoints.read_tensors(str(weights))
    for stage in ("fine_tune", "prune"):
        shutil.copy(tuned / "stage.json", directory) if stage == "prune" else None
        refused(capsys, tmp_path / "out", ["model_state.pdparams"], read, stage, directory, workspace)
    assert not os.path.exists(mark)
    for content, words in (
        (pickle.dumps(state["classifier.bias"]), "holds ndarray"),
        (pickle.dumps({1: state["classifier.bias"]}), "1 is float32"),
        (pickle.dumps({"a": np.array(["text"])}), "'a' is <U4"),
        (pickle.dumps({"a": [1.0]}), "'a' is list"),
        (b"no pickle", "not a file of tensors"),
    ):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=words):
            checkpoints.read_tensors(str(weights))
    fault("a `.pdparams` that holds code, or anything but tensors", "a pickle that makes a file when it is loaded, others", 8,
          "refused; nothing ran (`paddle.load` runs it)")  # fmt: skip


def test_our_reader_reads_what_paddle_saves(tuned, tmp_path):
    path = str(tuned / "model_state.pdparams")
    expected = {name: value.numpy() for name, value in paddle.load(path).items()}
    for protocol in (None, 2, 3, 4):
        if protocol:
            path = str(tmp_path / "other.pdparams")
            state = {name: paddle.to_tensor(value) for name, value in expected.items()}
            paddle.save({**state, "position_ids": paddle.arange(3)}, path, protocol=protocol)
        found = checkpoints.read_tensors(path)
        assert expected.keys() == found.keys() - {"position_ids"}
        assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_weights_in_bf16_are_refused(tuned, workspace, tmp_path, capsys):
    """Paddle keeps them as uint16, which would be taken for numbers."""
    directory = tmp_path / "m"
    shutil.copytree(tuned, directory, ignore=shutil.ignore_patterns("stage.json", "inference.*", "*.pdparams"))
    state = paddle.load(str(tuned / "model_state.pdparams"))
    weights = {name: value.astype("bfloat16") for name, value in state.items()}
    paddle.save(weights, str(directory / "model_state.pdparams"))
    refused(capsys, tmp_path / "out", ["is uint16; weights in FP32 or FP16"], read, "fine_tune", directory, workspace)


def test_a_model_is_the_one_that_paddlenlp_loads(tuned, workspace):
    """read_model against PaddleNLP's from_pretrained: the same logits."""
    tokenizer = tokenization.load_tokenizer(str(tuned))
    features = batching.convert(data.read_split(data.get_task("topics", str(workspace / "data")), "dev",
                                            str(workspace / "data"), 20).examples, tokenizer, 64)  # fmt: skip
    ours, _ = checkpoints.read_model(modeling.model_class("ppminilm"), str(tuned), 4)
    theirs = modeling.model_class("ppminilm").from_pretrained(str(tuned), num_labels=4)
    assert np.array_equal(modeling.predict(ours, features), modeling.predict(theirs, features))
