"""ONNX: the logits of Paddle in FP32, its answers in INT8, and a program that gives them without Paddle."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import ROOT, TINY, load_script, record, sh, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from tokenizers import Tokenizer

import data
from common import UserError, batching, cli, engine, exporting, modeling, predictions, records, tokenization

export_onnx = load_script("deploy/onnx", "export_onnx")
infer_onnx = load_script("deploy/onnx", "infer_onnx")
onnx_graph = export_onnx.onnx_graph


SCRIPT = os.path.join(ROOT, "deploy/onnx/infer_onnx.py")


def run_infer(*arguments, python=sys.executable, script=SCRIPT, **options):
    return subprocess.run([python, script, *map(str, arguments)], capture_output=True, text=True, **options)


def export(source, output, workspace, *more):
    export_onnx.main(
        ["--model_path", str(source), "--output_dir", str(output), "--data_dir", str(workspace / "data"), *more]
    )
    return records.read_record(str(output))


@pytest.fixture(scope="module")
def int8(workspace, pruned, quantized, tmp_path_factory):
    """An INT8 model as ONNX."""
    output = tmp_path_factory.mktemp("onnx") / "int8"
    export(quantized / "mse8", output, workspace, "--fp32_path", str(pruned / "0.75/sub_static"))
    return output


@pytest.fixture(scope="module")
def fp32(workspace, pruned, tmp_path_factory):
    output = tmp_path_factory.mktemp("onnx") / "fp32"
    export(pruned / "0.75/sub_static", output, workspace)
    return output


@pytest.fixture(scope="module")
def dev(workspace, tuned):
    task = data.get_task("topics", str(workspace / "data"))
    examples = data.read_split(task, "dev", str(workspace / "data")).examples
    return batching.convert(examples, tokenization.load_tokenizer(str(tuned)), 64)


def logits_of(directory, features):
    return export_onnx.onnx_logits(str(directory), features, 0)


@pytest.mark.parametrize("cls_only", [True, False], ids=["cls_only", "whole"])
@pytest.mark.parametrize("family", sorted(modeling.MODEL_TYPES))
def test_logits_of_every_family(family, cls_only, tmp_path, workspace):
    """FP32, random weights: every operator that the four families use, on batches with padding."""
    cli.set_seed(1)
    tokenizer = tokenization.load_tokenizer(None, True, str(workspace / "vocab.txt"))
    config = modeling.random_config(family, dict(TINY), len(tokenizer.vocab), 3)
    model = modeling.build(modeling.model_class(family), config)
    model.eval()
    prefix = str(tmp_path / "float")
    exporting.export_static(model, prefix, cls_only)
    features, _ = exporting.parity_inputs([], tokenizer, 40)
    onnx.save(onnx_graph.convert(prefix), str(tmp_path / "model.onnx"))
    expected = modeling.predict(model, features, tokenizer.pad_id)
    assert np.abs(logits_of(tmp_path, features) - expected).max() < 1e-4 * max(1, np.abs(expected).max())


def test_int8_is_what_numpy_computes(int8, dev):
    """ONNX's reference implementation, in NumPy, on some texts of different lengths, against ONNX Runtime."""
    features = dev[:4]
    model = onnx.load(str(int8 / "model.onnx"))
    model.opset_import[0].version = 19  # the reference lacks DequantizeLinear of 17, which is the same
    reference = ReferenceEvaluator(model)
    batch = batching.collate(features, range(4))
    (expected,) = reference.run(None, {"input_ids": batch.input_ids, "token_type_ids": batch.token_type_ids})
    # A value in the middle between two steps may be rounded to either, as the engines add in another order.
    assert np.abs(logits_of(int8, features) - expected).max() < 0.1 * np.abs(expected).max()
    assert np.median(np.abs(logits_of(int8, features) - expected)) < 1e-3


def test_int8_model_answers_as_fp32(int8, quantized, pruned, dev):
    """The figures of the record are those of an independent count, and the file is no larger than Paddle's."""
    metrics, labels = records.read_record(str(int8))["metrics"], [feature.label for feature in dev]
    found = logits_of(int8, dev).argmax(-1)
    original = engine.Engine(str(pruned / "0.75/sub_static/float")).predict(dev).argmax(-1)
    assert metrics["accuracy"] == pytest.approx((found == labels).mean(), abs=1e-6)
    assert metrics["agreement"] == pytest.approx((found == original).mean(), abs=1e-6) and metrics["agreement"] > 0.97
    assert metrics["compared_with"] == "FP32" and metrics["agreement_with_paddle"] > 0.97
    answers = predictions.read({**record(int8), "path": str(int8)})
    assert answers.logits.argmax(-1).tolist() == found.tolist() and answers.targets.tolist() == labels
    # A tiny model's file is half names; the bound of a real one is 1.05 (results/README.md).
    assert metrics["bytes"] < 1.3 * os.path.getsize(quantized / "mse8/int8.pdiparams")


def test_int8_only_where_our_engine_computes_in_int8(int8, quantized, tmp_path):
    """Products with weights are INT8 nodes once ONNX Runtime has optimized the graph; those of activations are FP32."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(int8 / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    # 2 layers: 6 products, and the 4 of the last one, for [CLS] alone. ONNX Runtime computes pooler and classifier, one
    # row per text, in FP32 with their rounded weights.
    assert kinds.count("MatMulIntegerToFloat") == 10 and kinds.count("Gemm") + kinds.count("FusedGemm") == 2
    assert (
        records.read_record(str(int8))["onnx"]["nodes"]["MatMul"] == 12 + 2 * 2 + 4 - 2
    )  # two of each activation pair
    graph = onnx.load(str(int8 / "model.onnx")).graph
    types = {constant.name: constant.data_type for constant in graph.initializer}
    table = next(n for n in graph.node if n.op_type == "Gather" and "input_ids" in n.input and types[n.input[0]] == 3)
    assert types[table.input[0]] == onnx.TensorProto.INT8  # the word embeddings


def test_both_kinds_of_activations_are_one_grid(int8, workspace, quantized, tmp_path, dev):
    details = export(quantized / "mse8", tmp_path / "signed", workspace, "--activations", "int8")["onnx"]
    assert details["activations"] == "int8" and details["opset"] == onnx_graph.OPSET
    graph = onnx.load(str(tmp_path / "signed/model.onnx")).graph
    zero_points = {c.name: onnx.numpy_helper.to_array(c) for c in graph.initializer if c.name.startswith("zero_")}
    assert list(zero_points) == ["zero_int8"] and zero_points["zero_int8"] == 0  # as TensorRT wants it
    assert np.abs(logits_of(int8, dev) - logits_of(tmp_path / "signed", dev)).max() < 1e-3


def answers_of(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def paddle_answers(capsys, *arguments):
    capsys.readouterr()
    load_script("deploy/python", "infer").main(list(map(str, arguments)))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def check_answers(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        assert one.keys() == other.keys()
        assert one.pop("probabilities") == pytest.approx(other.pop("probabilities"), abs=2e-6)
        assert one.pop("probability", 0) == pytest.approx(other.pop("probability", 0), abs=2e-6)
        assert one == other


@pytest.mark.parametrize("engine_name", ["onnxruntime", "openvino"])
def test_answers_are_those_of_infer_py(engine_name, fp32, pruned, workspace, tmp_path, capsys):
    """FP32: the same JSON in the same order for 3000 texts of all lengths, which are more than a window."""
    if engine_name == "openvino":
        pytest.importorskip("openvino", reason="needs requirements/peers.txt")
    source = workspace / "data/topics/dev.json"
    texts = [json.loads(line)["sentence"] for line in open(source, encoding="utf-8")]
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"{text}\n" for text in (texts * 3000)[:3000]), encoding="utf-8")
    expected = paddle_answers(
        capsys, "--model_path", pruned / "0.75/sub_static", "--input_file", file, "--device", "cpu"
    )
    labels = [answer["label"] for answer in expected]
    options = ("--engine", engine_name, "--streams", 2, "--threads", 2)
    check_answers(answers_of(run_infer("--model_path", fp32, "--input_file", file, *options)), expected)
    piped = run_infer("--model_path", fp32, "--input_file", "-", input="".join(f"{text}\n" for text in texts[:20]))
    assert [answer["label"] for answer in answers_of(piped)] == labels[:20]


def test_answers_for_pairs(pair_model, tmp_path, workspace, capsys):
    """Sentence pairs, some so long that both texts are cut."""
    export(pair_model, tmp_path / "pairs", workspace)
    pairs = [("怎么查账单", "账单在哪里看"), ("长" * 300, "短"), ("短", "长" * 300), ("长" * 301, "很" * 300)]
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    arguments = ("--text", *first, "--text_pair", *second)
    expected = paddle_answers(capsys, "--model_path", pair_model, *arguments, "--device", "cpu")
    check_answers(answers_of(run_infer("--model_path", tmp_path / "pairs", *arguments)), expected)


def test_dev_is_scored(int8, workspace, tmp_path, dev):
    source = workspace / "data/topics/dev.json"
    (result,) = answers_of(
        run_infer("--model_path", int8, "--dev_file", source, "--save_logits", tmp_path / "logits.npy")
    )
    assert result["accuracy"] == records.read_record(str(int8))["metrics"]["accuracy"] and result["examples"] == len(
        dev
    )
    assert np.abs(np.load(tmp_path / "logits.npy") - logits_of(int8, dev)).max() < 1e-5


# tokenizer.json


@pytest.fixture(scope="module")
def both_tokenizers(int8):
    written = Tokenizer.from_file(str(int8 / "tokenizer.json"))
    return tokenization.load_tokenizer(str(int8)), lambda rows: infer_onnx.encode(written, rows, 64)


@pytest.mark.parametrize("lower_case", [True, False], ids=["uncased", "cased"])
def test_every_character_is_cut_alike(workspace, lower_case):
    """Every character of the planes that hold any, each within a word; of the first plane also below two accents."""
    with open(workspace / "vocab.txt", encoding="utf-8") as file:
        vocab = [line.rstrip("\n") for line in file]
    # Letters and pieces that the small vocabulary lacks, so that a character which is dropped shows.
    vocab += [piece for letter in "abcdeABCDE" for piece in (letter, f"##{letter}")]
    ours = tokenization.FastTokenizer(list(dict.fromkeys(vocab)), lower_case)
    theirs = ours.standalone(128)
    theirs.no_truncation()
    theirs.no_padding()
    characters = [chr(i) for i in (*range(0xD800), *range(0xE000, 0x33480), *range(0xE0000, 0xE0200))]
    for form, count in (("Ab{0}cd", len(characters)), ("b{0}\u0301\u0323中{0}e", 0x10000)):
        texts = [form.format(char) for char in characters[:count]]
        expected = [ids[1:-1] for ids, _ in ours.encode(texts, None, 10**6)]
        found = [encoding.ids for encoding in theirs.encode_batch_fast(texts, add_special_tokens=False)]
        different = [char for char, one, other in zip(characters, found, expected) if one != other]
        assert not different, [hex(ord(char)) for char in different[:20]]


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(st.text(max_size=150), st.text(max_size=150)), min_size=1, max_size=4))
def test_any_texts_are_cut_alike(both_tokenizers, rows):
    ours, encode = both_tokenizers
    for pairs in (None, [second for _, second in rows]):
        texts = [first for first, _ in rows]
        expected = ours.encode(texts, pairs, 64)
        assert encode([(t, p) for t, p in zip(texts, pairs or [None] * len(texts))]) == expected


def test_special_tokens_keep_their_meaning(both_tokenizers):
    ours, encode = both_tokenizers
    for text in ("你[SEP]好", "[MASK]", "[mask]", "[UNK] [PAD]x"):
        assert encode([(text, None)]) == ours.encode([text], None, 64)


# What is refused


def test_a_wrong_graph_is_not_written(workspace, pruned, quantized, tmp_path, monkeypatch, capsys):
    """A wrong operator in FP32, wrong scales in INT8."""
    monkeypatch.setattr(onnx_graph._Graph, "_tanh", onnx_graph._Graph.same)
    with pytest.raises(UserError, match="logits differ from the original's by .* on 32 dev records"):
        export(pruned / "0.75/sub_static", tmp_path / "a", workspace)
    monkeypatch.undo()
    monkeypatch.setattr(onnx_graph, "RANGE", 8)
    with pytest.raises(SystemExit) as ended:
        export(quantized / "mse8", tmp_path / "b", workspace)
    assert ended.value.code == 1 and "below --min_agreement 0.9; nothing was written" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_an_unknown_operator_is_named(pruned, tmp_path, monkeypatch):
    monkeypatch.delattr(onnx_graph._Graph, "_softmax")
    with pytest.raises(UserError, match="operator softmax: "):
        onnx_graph.convert(str(pruned / "0.75/sub_static/float"))


def test_without_its_fp32_graph_paddles_int8_is_the_measure(workspace, tuned, quantized, tmp_path):
    source = tmp_path / "moved"
    shutil.copytree(quantized / "mse8", source)
    found = record(source)
    found["parent"]["path"] = "nowhere"
    (source / "stage.json").write_text(json.dumps(found))
    metrics = export(source, tmp_path / "out", workspace)["metrics"]
    assert metrics["compared_with"].startswith("Paddle's INT8") and "fp32_accuracy" not in metrics
    with pytest.raises(UserError, match="not the graph that .* was quantized from"):
        export(source, tmp_path / "out", workspace, "--fp32_path", str(tuned), "--overwrite")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--text", " "], "text 1: a text is empty"),
        (["--text", "a", "--text_pair", "b"], "text 1: topics takes single texts"),
        (["--input_file", "missing.txt"], "missing.txt: No such file or directory"),
        (["--text_pair", "a", "--input_file", "-"], "--text_pair goes with --text"),
        (["--input_file", "-"], "--input_file -: no text in it"),
        (["--input_file", "texts.csv"], "--input_file: tables are read by infer.py"),
        (["--input_file", "{tmp}/number.json"], "number.json:2: a text is not a string"),
        (["--input_file", "{tmp}/mixed.json"], "mixed.json:2: topics takes single texts"),
        (["--dev_file", "{tmp}/number.json"], "number.json:1: no label"),
        (["--dev_file", "{tmp}/unknown.json"], "unknown.json:1: label '未知' is not one of the model's"),
        (["--dev_file", "{tmp}/unknown.json", "--save_logits", "nowhere/x.npy"], "nowhere/x.npy: no such directory"),
        (["--dev_file", "{dir}/labels.json"], "labels.json:1: not JSON; one object per line is needed"),
        (["--dev_file", "{tmp}/list.json"], "list.json:1: not a record of topics: one JSON object per line is needed"),
        (["--model_path", "{dir}/model.onnx", "--text", "a"], "model.onnx: no such directory; the one with model.onnx"),
        (["--input_file", "TEXTS.CSV"], "--input_file: tables are read by infer.py"),
        (["--model_path", "{dir}/..", "--text", "a"], "no model.onnx there"),
        (["--text", "a", "--streams", "9", "--threads", "2"], "--streams 9: from 1 to 2"),
        ([], "give one of --text, --input_file, --dev_file"),
    ],
)
def test_mistakes_of_the_user(int8, tmp_path, arguments, words):
    write_rows(tmp_path / "number.json", [{"sentence": "好"}, {"sentence": 5}])
    write_rows(tmp_path / "mixed.json", [{"sentence": "好"}, {"sentence1": "好", "sentence2": "好"}])
    write_rows(tmp_path / "list.json", [["好"]])
    write_rows(tmp_path / "unknown.json", [{"sentence": "好", "label": "未知"}])
    arguments = [argument.format(dir=int8, tmp=tmp_path) for argument in arguments]
    done = run_infer("--model_path", int8, *arguments, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and not done.stdout
    assert "Traceback" not in done.stderr


def test_a_damaged_model_is_refused(int8, tmp_path):
    shutil.copytree(int8, tmp_path / "copy")
    with open(tmp_path / "copy/model.onnx", "r+b") as file:
        file.seek(1000)
        file.write(b"\x00\xff")
    done = run_infer("--model_path", tmp_path / "copy", "--text", "a")
    assert done.returncode == 2 and "model.onnx: damaged" in done.stderr
    (tmp_path / "copy/stage.json").unlink()  # nobody has to copy it
    for name in ("model.onnx", "tokenizer.json", "labels.json"):
        with open(tmp_path / "copy" / name, "r+b") as file:
            file.truncate(500)
        done = run_infer("--model_path", tmp_path / "copy", "--text", "a")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be read" in done.stderr, done.stderr


def test_a_bad_line_ends_it_after_the_answers_before_its_window(int8, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("足球\n" * 150 + "\n", encoding="utf-8")
    done = run_infer("--model_path", int8, "--input_file", file, "--batch_size", 1)  # windows of 64 texts
    assert done.returncode == 2 and done.stderr == f"infer_onnx.py: error: {file}:151: a text is empty\n"
    assert done.stdout.count("\n") == 128


def test_options_for_int8_are_refused_for_fp32(pruned, workspace, tmp_path):
    with pytest.raises(UserError, match="--activations: for INT8 models"):
        export(pruned / "0.75/sub_static", tmp_path / "out", workspace, "--activations", "int8")


# The whole


def test_all_quantized_models_at_once(workspace, quantized, tmp_path):
    """The launcher: every variant, in a directory for each; the second time there is nothing to do."""
    shutil.copytree(quantized / "mse8", tmp_path / "topics_quant_models/mse8")
    shutil.copytree(quantized / "avg4", tmp_path / "topics_quant_models/avg4")
    arguments = ("--data_dir", workspace / "data")
    done = sh("deploy/onnx/export_all.sh", *arguments, cwd=tmp_path, QUANT_DIR=str(tmp_path))
    assert done.stdout.count("model.onnx, opset 17") == 2
    for name in ("mse8", "avg4"):
        assert records.read_record(str(tmp_path / "onnx_models/topics_quant_models" / name))["stage"] == "onnx"
    again = sh("deploy/onnx/export_all.sh", *arguments, cwd=tmp_path, QUANT_DIR=str(tmp_path))
    assert again.stdout.count("there already") == 2
    failed = sh("deploy/onnx/export_all.sh", cwd=tmp_path, check=False, QUANT_DIR=str(tmp_path / "onnx_models"))
    assert failed.returncode == 1 and "an ONNX model, which deploy/onnx/infer_onnx.py runs" in failed.stderr
    none = sh("deploy/onnx/export_all.sh", cwd=tmp_path, check=False, QUANT_DIR=str(tmp_path / "nowhere"))
    assert none.returncode == 2 and "no *_quant_models under" in none.stderr


def test_a_machine_without_paddle(int8, tmp_path):
    """infer_onnx.py copied beside the model, in an environment with requirements/onnx.txt and nothing else."""
    place = tmp_path / "machine"
    shutil.copytree(int8, place)
    shutil.copy(os.path.join(ROOT, "deploy/onnx/infer_onnx.py"), place)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv/bin/python")
    lock = os.path.join(ROOT, "requirements/onnx.txt")
    subprocess.run([python, "-m", "pip", "install", "-q", "--require-hashes", "-r", lock], check=True)
    assert subprocess.run([python, "-c", "import paddle"], capture_output=True).returncode
    texts, environment = ("--text", "足球比赛", "银行股票"), {"PATH": os.environ["PATH"]}
    expected = answers_of(run_infer("--model_path", int8, *texts))
    for name in ("onnxruntime", "openvino"):
        options = {"python": python, "script": "infer_onnx.py", "cwd": place, "env": environment}
        found = answers_of(run_infer(*texts, "--engine", name, **options))
        assert [one["label"] for one in found] == [one["label"] for one in expected]
        for one, other in zip(found, expected):
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=0.05)
