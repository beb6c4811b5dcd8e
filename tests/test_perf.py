"""The fast path gives the plain one's answers, and the benchmark measures what it says."""

import json
import re
import sys
import threading

import numpy as np
import pytest
from conftest import load_script, sh

import data
import summarize
from common import UserError, batching, checkpoints, engine, exporting, modeling, tokenization

measure = load_script("deploy/benchmark", "measure")
perf = load_script("deploy/benchmark", "perf")
perf_models = perf.perf_models
peers = load_script("deploy/benchmark", "peers")
versions = load_script("deploy/benchmark", "versions")


@pytest.fixture(scope="module")
def dev(workspace):
    return data.read_split(data.get_task("topics", str(workspace / "data")), "dev", str(workspace / "data")).examples


@pytest.mark.parametrize("model_type", sorted(modeling.MODEL_TYPES))
def test_last_layer_for_cls_alone(workspace, tmp_path, model_type):
    """The same logits from the dynamic model and from both graphs; of the last layer only [CLS] goes through the FFN."""
    tokenizer = tokenization.load_tokenizer(None, True, str(workspace / "vocab.txt"))
    config = modeling.random_config(model_type, str(workspace / "tiny.json"), len(tokenizer.vocab), 4)
    model = modeling.model_class(model_type)(config)
    model.eval()
    rng = np.random.default_rng(0)
    ids = [[tokenizer.cls_id, *rng.integers(5, 90, n).tolist()] for n in (3, 9, 30)]
    features = [batching.Feature(row, [0] * len(row), None) for row in ids]
    expected = modeling.predict(model, features, tokenizer.pad_id)  # together, so that two of them are padded
    last = modeling.encoder_of(model).encoder.layers[-1]
    with exporting.first_position_only(model):
        dynamic = modeling.predict(model, features, tokenizer.pad_id)
        batch = batching.collate(features, range(3), tokenizer.pad_id)
        hidden = modeling.encoder_of(model)(*map(modeling.paddle.to_tensor, batch[:2]))[0]
        assert hidden.shape[1] == 1
    assert np.abs(dynamic - expected).max() < 1e-5
    assert modeling.encoder_of(model).encoder.layers[-1] is last
    assert np.array_equal(modeling.predict(model, features, tokenizer.pad_id), expected)
    for cls_only in (False, True):
        exporting.export_static(model, str(tmp_path / "graph"), cls_only)
        found = engine.Engine(str(tmp_path / "graph")).predict(features, 3, tokenizer.pad_id)
        assert np.abs(found - expected).max() < 1e-5
        operators = [op.type for op in exporting.read_program(str(tmp_path / "graph.pdmodel")).blocks[0].ops]
        assert operators.count("bmm") == (4 if cls_only else 0)


def test_export_computes_cls_alone_on_a_cpu(tuned, pruned):
    for directory in (tuned, pruned / "0.75/sub_static"):
        assert json.loads((directory / "stage.json").read_text())["export"]["cls_only"] is True


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_fast_path_answers_as_a_plain_loop(pruned, quantized, dev, precision):
    """Sorted in windows, few lengths, two streams, tokenized ahead: same answers in the input's order."""
    directory = quantized / "mse8" if precision == "int8" else pruned / "0.75/sub_static"
    tokenizer = tokenization.load_tokenizer(str(directory))
    examples = dev * 8
    assert len(examples) > engine.WINDOW * 16  # more than a window
    expected = measure.plain(
        engine.Engine(checkpoints.find_prefix(str(directory)), "cpu", precision), examples, tokenizer, 64, 16
    )
    runner = engine.Engine(checkpoints.find_prefix(str(directory)), "cpu", precision, streams=2)
    found = runner.classify(examples, tokenizer, 64, 16)
    flipped = found.argmax(-1) != expected.argmax(-1)
    if precision == "fp32":
        assert np.abs(found - expected).max() < 1e-4 and not flipped.any()
    best = np.sort(expected, -1)
    assert (best[flipped, -1] - best[flipped, -2] < 0.05).all() and flipped.mean() < 0.01


class Recorder:
    """A runner whose logits are the first token of each row; it notes the shapes that it saw, and who ran it."""

    def __init__(self):
        self.shapes, self.threads = [], set()

    def run(self, batch):
        self.shapes.append(batch.input_ids.shape)
        self.threads.add(threading.get_ident())
        return batch.input_ids[:, 1:2].astype("float32")


def features_of(lengths):
    return [batching.Feature([1, number] + [2] * (n - 2), [0] * n, None) for number, n in enumerate(lengths)]


def test_streams_prepare_every_shape_and_keep_the_order():
    recorders = [Recorder(), Recorder(), Recorder()]
    streams = engine.Streams(recorders)
    features = features_of(np.random.default_rng(0).integers(3, 40, 500))
    batches = list(batching.batches(features, 8, 0, batching.by_length(features), 39))
    streams.prepare(batches)
    for recorder in recorders:
        assert set(recorder.shapes) == {batch.input_ids.shape for batch in batches}
        recorder.shapes.clear()
    found = streams.predict(features, 8)
    assert found[:, 0].tolist() == list(range(500))
    assert sum(len(recorder.shapes) for recorder in recorders) == len(batches)
    assert all(len(recorder.threads) == 1 for recorder in recorders)


def test_a_failing_runner_fails_the_caller():
    recorder = Recorder()
    recorder.run = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.Streams([recorder]).predict(features_of([5, 6, 7]), 2)


def test_few_lengths():
    """As few shapes as promised, and none above the longest sequence, which a position table may end at."""
    lengths = {batching.round_up(n, 128) for n in range(1, 129)}
    assert len(lengths) == 28 and max(lengths) == 128 and all(batching.round_up(n, 128) >= n for n in range(1, 129))
    assert batching.round_up(49, 50) == 50
    features = features_of([5, 49, 50])
    assert [b.input_ids.shape for b in batching.batches(features, 1, 0, None, 50)] == [(1, 6), (1, 50), (1, 50)]


def test_sorting_saves_padding(workspace, tuned, dev):
    """Padded tokens of the file's order, and of windows in order of length."""
    tokenizer = tokenization.load_tokenizer(str(tuned))
    sizes = [
        sum(batch.input_ids.size for batch in batches(dev, tokenizer, 64, 8))
        for batches in (measure.file_order, engine.window_batches)
    ]
    assert sizes[1] < 0.9 * sizes[0], sizes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """perf.py on generated sentences and tiny random models, with three of its rows."""
    output = tmp_path_factory.mktemp("perf")
    with pytest.MonkeyPatch.context() as patch:
        tiny = {name: (kind, "small-2l-128h.json") for name, (kind, _) in perf_models.RANDOM.items()}
        patch.setattr(perf_models, "RANDOM", tiny)
        patch.setattr(perf, "LEAST_SECONDS", 0.1)
        patch.setattr(perf, "CPU_ROWS", [perf.CPU_ROWS[i] for i in (0, 5, 7)])
        patch.setattr(data, "find_data_dir", no_download(data.find_data_dir))
        rows = perf.main(
            [
                "--rounds",
                "2",
                "--sentences",
                "64",
                "--random",
                "--check",
                "--device",
                "cpu",
                "--output_dir",
                str(output),
            ]
        )
    return output, rows


def no_download(find):
    def refuse(task_name, data_dir=None):
        if data_dir is None:
            raise UserError("no network")
        return find(task_name, data_dir)

    return refuse


def test_perf_measures_every_row(results):
    output, rows = results
    assert (output / "models/bert/float.pdiparams").stat().st_size < 5_000_000  # the tiny ones were made
    found = json.loads((output / "perf.json").read_text())
    assert [row["row"] for row in found["rows"]] == ["BERT-base", "pruned to 0.75, BF16", "pruned to 0.75 + quantized"]
    for row in found["rows"]:
        assert row["range"][0] <= row["median"] <= row["range"][1]
        assert row["sentences_per_second"] * 10 < row["tokens_per_second"] < row["sentences_per_second"] * 40
        assert 0 < row["latency_ms"][0] <= row["latency_ms"][1] and row["peak_memory"] > 1e8
        assert row["load_seconds"] > 0 and row["shapes"] >= 2
        assert row["flips"] == 0 or row["largest_margin"] < 0.05
    assert found["rows"][0]["python_tokenizer"]["speedup"] == 1
    assert any("random weights: bert, pruned, both" in note for note in found["notes"])
    assert any("generated" in note for note in found["notes"])
    assert found["rows"] == json.loads(json.dumps(rows)) and (output / "perf.png").stat().st_size > 10_000
    assert summarize.read_perf([output / "perf.json"]).speedups["pruned to 0.75 + quantized"] == rows[2]["speedup"]


def test_perf_prints_the_published_form(results):
    _, rows = results
    lines = perf.table(rows, dict.fromkeys((row["row"] for row in rows), False))
    (line,) = [line for line in lines if line.startswith("PP-MiniLM + pruning + quantization")]
    assert f"| {rows[2]['speedup']:.2f}x ({rows[2]['python_tokenizer']['speedup']:.2f}x) |" in line
    assert "8.88x (5.36x)" in line and "random weights" in line


def test_summary_against_numpy():
    def result(slow, fast):
        passes = [{"fast_tokenizer": True, "seconds": fast}, {"fast_tokenizer": False, "seconds": slow}]
        return {"passes": passes, "sentences": 10, "tokens": 200}

    rounds = [{"a": result(8.0, 6.0), "b": result(4.0, 1.0)}, {"a": result(4.0, 3.0), "b": result(4.0, 2.0)}]
    found = perf.summary("b", rounds, "a")
    assert found["speedup"] == 4 and found["median"] == 5 and found["range"] == [2, 8]  # 12 / 3, of 8 / 1 and 4 / 2
    assert found["sentences_per_second"] == round(20 / 3, 1) and found["tokens_per_second"] == round(400 / 3, 1)
    assert perf.summary("b", rounds, "a", fast=False)["speedup"] == 1.5


def test_agreement_counts_flips_and_their_margins():
    logits = [[1.0, 0.0], [0.4, 0.5], [0.0, 1.0]]
    plain = [[1.0, 0.0], [0.52, 0.5], [0.0, 1.0]]
    found = perf.agreement("x", [{"x": {"logits": logits, "plain_logits": plain, "labels": [0, 0, 0]}}])
    assert found["flips"] == 1 and found["largest_margin"] == pytest.approx(0.02, abs=1e-6)
    assert found["accuracy"] == round(1 / 3, 6) and found["plain_accuracy"] == round(2 / 3, 6)


def test_random_models_are_built_once(results, monkeypatch):
    output, _ = results
    monkeypatch.setattr(perf_models.modeling, "random_config", None)  # would be called
    dev = data.read_split(data.get_task("tnews"), "dev", str(output / "data")).examples
    perf_models.build_random(str(output / "models"), str(output / "vocab.txt"), dev[:4])


def test_infer_perf_names_wrong_arguments(tuned, tmp_path):
    for wrong, said in (
        (["--both", tmp_path], "--both"),
        (["--rounds", "0"], "--rounds 0: must be above 0"),
        (["--streams", "99"], "--streams 99: at most"),
        (["--both", tuned / "inference"], "task"),
        (["--effects", "--both", tmp_path], "--effects"),
    ):
        done = sh("deploy/python/infer_perf.sh", *wrong, "--output_dir", tmp_path / "perf", check=False, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr.strip().splitlines()[-1], done.stderr
        assert not (tmp_path / "perf").exists()


def test_models_that_the_table_cannot_have(results, tuned, tmp_path, monkeypatch):
    """Wrong precision, an unusual graph for the baseline, other labels, too long: refused before anything is timed."""
    record = json.loads((tuned / "stage.json").read_text())
    labels = list(data.get_task("tnews").labels)
    for changes, name, precision, length, said in (
        ({}, "finetuned", "int8", 64, "not a quantized model"),
        ({}, "bert", "fp32", 64, "--cls_only False"),
        ({}, "finetuned", "fp32", 4096, "max_seq_length"),
        ({"labels": labels[::-1]}, "finetuned", "fp32", 64, "in their order"),
    ):
        fake = {**record, "task": "TNEWS", "labels": labels, **changes}
        graph = checkpoints.Graph(str(tuned / "inference"), fake)
        monkeypatch.setattr(checkpoints, "open_graph", lambda path, option, graph=graph: graph)
        with pytest.raises(UserError, match=said):
            perf_models.check_model(name, str(tuned / "inference"), precision, "cpu", length)


def test_peers_say_what_they_need(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(UserError, match="requirements/peers.txt"):
        peers.main(["--output_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_profile_says_what_runs_in_int8(quantized, tuned, capsys):
    profile = load_script("deploy/benchmark", "profile_engine")
    profile.main(["--model_path", str(quantized / "mse8"), "--length", "16", "--batches", "3"])
    out = capsys.readouterr().out
    assert "\nfc | 12 |  |" in out  # two layers of six, without the last one's keys and values, pooler and classifier
    assert "\nbmm |  |  | 4" in out and "\nmatmul |  |  | 2" in out  # attention stays in FP32
    products = [line for line in out.splitlines() if line.startswith("inner_product | ")]
    assert products and all(line.split(" | ")[1].startswith(("s8", "u8")) for line in products)
    assert "outside oneDNN" in out
    profile.main(["--model_path", str(tuned / "inference"), "--length", "16", "--batches", "1"])
    assert "\nfc |  |  | 12" in capsys.readouterr().out


def test_versions_compares_environments_that_differ(tmp_path, monkeypatch):
    """Each is named by its Paddle and Python; one that is the same, has no Paddle or does not run is refused before anything
    is measured."""
    monkeypatch.setattr(versions.perf, "find_sentences", lambda timing: (None, None, []))
    (tmp_path / "bare").mkdir()
    bare = tmp_path / "bare/python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    for other, words in (
        ([], "name an environment with another Paddle or another Python"),
        ([sys.executable], "name an environment with another Paddle or another Python"),
        ([tmp_path / "none"], "none: No such file or directory"),
        ([bare], "has no Paddle; setup_env.sh makes such an environment"),
    ):
        options = ["--other_python", *map(str, other)] if other else []
        with pytest.raises(UserError, match=re.escape(words)):
            versions.main([*options, "--output_dir", str(tmp_path / "out")])
    assert versions.name_of(sys.executable).startswith("Paddle ") and not (tmp_path / "out").exists()


def test_versions_reports_ratios_beside_the_first(capsys):
    seconds = {("a", "one"): [1.0, 2.0, 3.0], ("a", "two"): [2.0, 1.0, 6.0]}
    rows = versions.report(seconds, "one")
    assert [row["speed"] for row in rows] == [1.0, 0.5] and rows[1]["range"] == [0.5, 2.0]
    assert rows[0]["sentences_per_second"] == 500.0 and "a | two | 333.3 | 0.50 | 0.50-2.00" in capsys.readouterr().out
