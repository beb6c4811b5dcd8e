"""Models that were trained elsewhere: tests/fixtures/ holds tiny ones of the real transformers, with their logits."""

import json
import os
import random
import shutil
import struct

import numpy as np
import paddle
import pytest
from conftest import ROOT, Service, load_script, record, refused, sh, write_rows
from safetensors.numpy import load_file, save_file

import general_distill
import run_clue
from common import UserError, batching, checkpoints, exporting, files, modeling, predictions, tensors, tokenization

FIXTURES = os.path.join(ROOT, "tests", "fixtures", "hugging_face")
LABELS = ["财经", "体育", "科技", "教育"]
adopt = load_script("finetuning", "adopt")
infer = load_script("deploy/python", "infer")
to_hugging_face = load_script("finetuning", "to_hugging_face")


def expected(name):
    with open(os.path.join(FIXTURES, name, "expected.json"), encoding="utf-8") as file:
        return json.load(file)


def hugging_face(name="bert", faster=True):
    return checkpoints.read_hugging_face(os.path.join(FIXTURES, name), faster, "ForSequenceClassification")


def data_for(directory, name, labels):
    """A task whose labels are what the model answers, and two records for each label that it never gives."""
    rows = [
        {"sentence": text, "label": labels[int(np.argmax(row))]}
        for text, row in zip(expected(name)["texts"], expected(name)["logits"])
    ]
    for split in ("train", "dev"):
        write_rows(directory / f"{split}.json", rows)
    (directory / "labels.json").write_text(json.dumps(sorted(labels)), encoding="utf-8")
    return str(directory)


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    return data_for(tmp_path_factory.mktemp("topics"), "bert", LABELS)


def arguments(source, out, topics, *more):
    given = ["--task_name", "topics", "--model_path", source, "--output_dir", out, "--data_dir", topics]
    return [*map(str, given), "--max_seq_length", "32", *map(str, more)]


@pytest.fixture(scope="module")
def adopted(tmp_path_factory, topics):
    """The BERT of Hugging Face, taken in."""
    out = tmp_path_factory.mktemp("adopted") / "bert"
    adopt.main(arguments(os.path.join(FIXTURES, "bert"), out, topics))
    return out


@pytest.mark.parametrize("name", ["bert", "ernie", "bert_odd"])
def test_logits_are_those_of_transformers(name):
    """Token ids the same; logits of twenty texts and five pairs within 1e-5. bert_odd has the approximated GELU,
    another epsilon, case, shards, and no vocab.txt; the ERNIE has task-type embeddings and an epsilon of 1e-5."""
    found, theirs = hugging_face(name), expected(name)
    encoded = found.tokenizer.encode(theirs["texts"], None, theirs["max_length"])
    assert [ids for ids, _ in encoded] == theirs["input_ids"]
    pairs = found.tokenizer.encode(*zip(*theirs["pairs"]), theirs["max_length"])
    assert [ids for ids, _ in pairs] == theirs["pair_input_ids"]
    assert [types for _, types in pairs] == theirs["pair_token_type_ids"]
    for rows, logits in ((encoded, theirs["logits"]), (pairs, theirs["pair_logits"])):
        features = [batching.Feature(ids, types, None) for ids, types in rows]
        ours = modeling.predict(found.model, features, found.tokenizer.pad_id)
        assert np.abs(ours - np.array(logits)).max() <= 1e-5 and np.abs(logits).max() > 0.5


@pytest.mark.parametrize("lower_case", [True, False])
def test_tokens_of_any_text_are_hugging_faces(lower_case):
    """Against the library's own normalizer and pre-tokenizer, on random characters; PaddleNLP's rules differ there."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"股市a1×｜°+.，é", "##a", "##1", "##×"]
    theirs = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    theirs.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    theirs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rng = random.Random(0)
    texts = ["".join(rng.choices("股市a1×｜°+.，éA É\t￥™", k=12)) for _ in range(2000)]
    ours = tokenization.FastTokenizer(vocab, lower_case, split_symbols=False)
    paddlenlp = tokenization.FastTokenizer(vocab, lower_case)
    wanted = [encoding.ids for encoding in theirs.encode_batch(texts)]
    assert [ids[1:-1] for ids, _ in ours.encode(texts)] == wanted
    assert [ids[1:-1] for ids, _ in paddlenlp.encode(texts)] != wanted


def test_adopted_model(adopted, topics, capsys):
    """As run_clue.py would have written it: all answers right, so the labels are in the right order."""
    found = record(adopted)
    assert found["stage"] == "finetune" and found["labels"] == LABELS and found["metrics"]["accuracy"] == 1.0
    source = os.path.join(FIXTURES, "bert")
    assert found["parent"]["weights"] == files.hash_files(source, ["model.safetensors"])
    assert "trained elsewhere: Hugging Face" in found["notes"]
    before = {name: os.stat(os.path.join(source, name)).st_mtime_ns for name in os.listdir(source)}
    adopt.main(arguments(source, adopted, topics))
    assert "already finished" in capsys.readouterr().out
    assert before == {name: os.stat(os.path.join(source, name)).st_mtime_ns for name in os.listdir(source)}
    answers = predictions.read({**found, "path": str(adopted)})
    assert (answers.logits.argmax(1) == answers.targets).all() and len(set(answers.targets)) == len(LABELS)
    classifier = checkpoints.load_classifier(str(adopted))
    assert not classifier.tokenizer.split_symbols
    for ours, theirs in zip(classifier.model.parameters(), hugging_face().model.parameters()):
        assert (ours.numpy() == theirs.numpy()).all()


@pytest.mark.parametrize("name, labels", [("bert", LABELS), ("ernie", ["甲", "乙", "丙"]), ("bert_odd", None)])
def test_out_again_bit_for_bit(name, labels, tmp_path):
    """Taken in and written as a directory of Hugging Face: the same tensors under the same names, the same network."""
    labels = labels or [f"{i}" for i in range(len(expected(name)["logits"][0]))]
    (tmp_path / "data").mkdir()
    topics = data_for(tmp_path / "data", name, labels)
    (tmp_path / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    adopt.main(arguments(os.path.join(FIXTURES, name), tmp_path / "in", topics, "--labels", tmp_path / "labels.json"))
    to_hugging_face.main(["--model_path", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")])
    before = {}
    for file in os.listdir(os.path.join(FIXTURES, name)):
        if file.endswith(".safetensors"):
            before.update(load_file(os.path.join(FIXTURES, name, file)))
    after = load_file(tmp_path / "out/model.safetensors")
    assert set(before) - {"bert.embeddings.position_ids", "ernie.embeddings.position_ids"} == set(after)
    assert all((before[key] == after[key]).all() for key in after)
    again = checkpoints.read_hugging_face(str(tmp_path / "out"), True, "ForSequenceClassification")
    theirs = expected(name)
    features = [batching.Feature(ids, [0] * len(ids), None) for ids in theirs["input_ids"]]
    assert np.abs(modeling.predict(again.model, features) - np.array(theirs["logits"])).max() <= 1e-5
    assert again.names == labels
    with pytest.raises(UserError, match="exists"):
        to_hugging_face.write(
            to_hugging_face.parse_args(["--model_path", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")])
        )


def paddlenlp_directory(place, of_2021):
    """The same BERT as PaddleNLP writes it today, or wrote it in 2021."""
    found = hugging_face()
    found.model.save_pretrained(str(place))
    found.tokenizer.save(str(place))
    if of_2021:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").unlink()
        inner = {name: config[name] for name in modeling.architecture_of(found.model)}
        old = {"init_args": [{**inner, "init_class": "BertModel"}], "num_classes": 4}
        old["init_class"] = "BertForSequenceClassification"
        (place / "model_config.json").write_text(json.dumps(old))
    return place


@pytest.mark.parametrize("kind", ["Hugging Face", "PaddleNLP", "PaddleNLP 2021", "static graph"])
def test_every_kind_goes_through_every_stage(kind, adopted, topics, tmp_path, capsys):
    """adopt -> export -> prune -> quantize -> infer.py --text -> service, by the launchers."""
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(LABELS), encoding="utf-8")
    source, env = tmp_path / "source", {"DEVICE": "cpu", "CLUE_DATA_DIR": os.path.dirname(topics)}
    shutil.copytree(topics, tmp_path / "data/topics")
    env["CLUE_DATA_DIR"] = str(tmp_path / "data")
    source.mkdir()
    if kind == "Hugging Face":
        source = os.path.join(FIXTURES, "bert")
    elif kind.startswith("PaddleNLP"):
        paddlenlp_directory(source, kind.endswith("2021"))
    else:  # exported elsewhere: here from the adopted model, without its record and with the inputs the other way round
        model, tokenizer = checkpoints.load_classifier(str(adopted))[:2]
        spec = [paddle.static.InputSpec([None, None], "int64", n) for n in ("input_ids", "token_type_ids")]
        paddle.jit.save(paddle.jit.to_static(model, input_spec=spec, full_graph=True), str(source / "model"))
        tokenizer.save(str(source))
    out = tmp_path / "adopted"
    adopt.main(arguments(source, out, topics, "--labels", labels))
    assert (
        record(out)["metrics"]["accuracy"] == 1.0
        and f"trained elsewhere: {kind.split(' 2')[0]}" in record(out)["notes"]
    )
    options = {"cwd": tmp_path, **env}
    if kind == "static graph":
        with pytest.raises(UserError, match="static graph"):
            checkpoints.load_classifier(str(out))
        to_quantize = out
    else:
        export = load_script("finetuning", "export_model")
        export.main(["--task_name", "topics", "--model_path", str(out), "--data_dir", topics])
        sh("pruning/prune.sh", "topics", "1e-4", 10, 1, 32, 0, out, "0.5", "--save_steps", 2, **options)
        sh("pruning/export.sh", "pruned_models", "topics", **options)
        to_quantize = tmp_path / "pruned_models/topics/0.5/sub_static"
    quantize = ["--algorithms", "abs_max", "--calib_samples", 8, "--min_agreement", 0.0, "--output_dir", "int8"]
    sh("quantization/quant.sh", "topics", to_quantize, *quantize, **options)
    texts = expected("bert")["texts"][:6]
    capsys.readouterr()
    infer.main(["--model_path", str(tmp_path / "int8/abs_max8"), "--int8", "--text", *texts])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    offline = [json.loads(line)["label"] for line in lines]
    export_onnx, of_data = load_script("deploy/onnx", "export_onnx"), ["--data_dir", topics, "--output_dir"]
    of_int8 = ["--model_path", str(tmp_path / "int8/abs_max8"), "--fp32_path", str(to_quantize), "--min_agreement", "0"]
    export_onnx.main([*of_int8, *of_data, str(tmp_path / "onnx8")])
    assert record(tmp_path / "onnx8")["metrics"]["compared_with"] == "FP32"
    export_onnx.main(["--model_path", str(to_quantize), *of_data, str(tmp_path / "onnx")])
    capsys.readouterr()
    infer.main(["--model_path", str(to_quantize), "--text", *texts])
    load_script("deploy/onnx", "infer_onnx").main(["--model_path", str(tmp_path / "onnx"), "--text", *texts])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [answer["label"] for answer in answers[:6]] == [answer["label"] for answer in answers[6:]]
    assert len(answers) == 12
    with Service(tmp_path, tmp_path / "int8/abs_max8") as service:
        status, answer = service.post({"texts": texts})
    assert status == 200 and answer["labels"] == offline and answer["classes"] == LABELS and len(offline) == 6


def test_teacher_student_and_start_of_fine_tuning(tmp_path, topics):
    """general_distill.py with a teacher and a student of Hugging Face, and run_clue.py from the same directory."""
    bert = os.path.join(FIXTURES, "bert")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/part.txt").write_text("\n".join(expected("bert")["texts"] * 4), encoding="utf-8")
    given = ["--teacher_model_name_or_path", bert, "--teacher_model_type", "bert", "--model_type", "bert"]
    given += ["--student_model_name_or_path", bert, "--input_dir", str(tmp_path / "corpus"), "--max_steps", "2"]
    given += ["--output_dir", str(tmp_path / "distilled"), "--max_seq_length", "32", "--batch_size", "8"]
    given += ["--num_relation_heads", "2", "--teacher_layer_index", "1", "--student_layer_index", "1"]
    general_distill.main(given)
    (written,) = (tmp_path / "distilled").glob("model_*")
    to_hugging_face.main(["--model_path", str(written), "--output_dir", str(tmp_path / "encoder")])
    assert "embeddings.word_embeddings.weight" in load_file(tmp_path / "encoder/model.safetensors")
    for start in (bert, str(tmp_path / "encoder")):
        out = tmp_path / f"tuned-{os.path.basename(start)}"
        given = ["--task_name", "topics", "--data_dir", topics, "--model_name_or_path", start, "--model_type", "bert"]
        given += ["--output_dir", str(out), "--max_steps", "1", "--max_seq_length", "32", "--batch_size", "8"]
        run_clue.main(given)
        assert list(record(out)["parent"]["weights"]) == ["model.safetensors"]


def test_config_of_others_as_architecture(tmp_path, topics, capsys):
    """--init_config with a config.json of Hugging Face as it is: what builds nothing is named once."""
    bert = os.path.join(FIXTURES, "bert")
    out = tmp_path / "out"
    given = ["--task_name", "topics", "--data_dir", topics, "--init_config", os.path.join(bert, "config.json")]
    given += ["--vocab_file", os.path.join(bert, "vocab.txt"), "--output_dir", str(out), "--max_steps", "1"]
    refused(capsys, out, ["--model_type bert takes it"], run_clue.main, given)
    run_clue.main([*given, "--model_type", "bert", "--max_seq_length", "32", "--batch_size", "8"])
    notes = [line for line in capsys.readouterr().err.splitlines() if "build nothing" in line]
    assert len(notes) == 1 and "model_type" in notes[0] and "hidden_size" not in notes[0]
    assert record(out)["model"]["architecture"]["hidden_act"] == "gelu"


def test_names_of_classes_in_answers(tmp_path, topics, capsys):
    """The data's labels are numbers, the checkpoint's classes are what the records call them: both are in an answer,
    of the adopted model and of one that run_clue.py trained."""
    numbers = dict(zip(LABELS, ["7", "3", "5", "1"]))
    rows = [row for _, row in files.read_rows(os.path.join(topics, "dev.json"))]
    rows = [{**row, "label": numbers[row["label"]], "label_desc": row["label"]} for row in rows]
    extra = [{"sentence": "卷", "label": number, "label_desc": name} for name, number in numbers.items()]
    (tmp_path / "numbers").mkdir()
    for split in ("train", "dev"):
        write_rows(tmp_path / "numbers" / f"{split}.json", [*rows, *extra])
    given = ["--data_dir", str(tmp_path / "numbers"), "--task_name", "numbers"]
    bert = os.path.join(FIXTURES, "bert")
    adopt.main([*given, "--model_path", bert, "--output_dir", str(tmp_path / "in"), "--max_seq_length", "32"])
    assert record(tmp_path / "in")["labels"] == list(numbers.values())
    random_start = ["--init_config", os.path.join(bert, "config.json"), "--vocab_file", os.path.join(bert, "vocab.txt")]
    more = ["--model_type", "bert", "--max_steps", "1", "--max_seq_length", "32"]
    run_clue.main([*given, *random_start, *more, "--output_dir", str(tmp_path / "tuned")])
    for place in ("in", "tuned"):
        export = load_script("finetuning", "export_model")
        export.main(["--task_name", "numbers", "--model_path", str(tmp_path / place), *given[:2]])
        capsys.readouterr()
        infer.main(["--model_path", str(tmp_path / place), "--text", "股市", "决赛"])
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        assert len(answers) == 2 and all(numbers[answer["label_name"]] == answer["label"] for answer in answers)
    with Service(tmp_path, tmp_path / "in") as service:
        _, answer = service.post({"texts": ["股市", "决赛"]})
        assert [numbers[name] for name in answer["label_names"]] == answer["labels"]
        assert answer["class_names"] == LABELS and answer["classes"] == list(numbers.values())


def copied(tmp_path, name="bert"):
    return shutil.copytree(os.path.join(FIXTURES, name), tmp_path / "source")


def change_config(source, **fields):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **fields}))


def change_tensors(source, change):
    arrays = load_file(source / "model.safetensors")
    change(arrays)
    save_file(arrays, source / "model.safetensors")


Q = "bert.encoder.layer.0.attention.self.query.weight"


def cut(source):
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def flip_in_header(source):
    weights = source / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[40] ^= 0x80
    weights.write_bytes(content)


def not_finite(source):
    change_tensors(source, lambda arrays: arrays[Q].__setitem__((0, 0), np.nan))


DAMAGE = {
    "cut off": (cut, ["damaged"]),
    "bit flipped": (flip_in_header, ["damaged"]),
    "not finite": (not_finite, [Q, "not finite"]),
    "wrong shape": (
        lambda source: change_tensors(source, lambda a: a.update({Q: a[Q][:, :-1].copy()})),
        ["self_attn.q_proj.weight has shape"],
    ),
    "missing tensor": (
        lambda source: change_tensors(source, lambda a: a.pop(Q)),
        ["self_attn.q_proj.weight is not there"],
    ),
    "no head": (
        lambda source: change_tensors(source, lambda a: (a.pop("classifier.weight"), a.pop("classifier.bias"))),
        ["no classification head", "run_clue.py"],
    ),
    "relative positions": (lambda source: change_config(source, position_embedding_type="relative_key"), ["absolute"]),
    "another architecture": (lambda source: change_config(source, model_type="roformer"), ["roformer"]),
    "unknown tensor": (
        lambda source: change_tensors(source, lambda a: a.update({"bert.encoder.layer.0.adapter.weight": a[Q]})),
        ["adapter"],
    ),
    "unknown activation": (lambda source: change_config(source, hidden_act="quick_gelu"), ["quick_gelu"]),
    "a field of another type": (lambda source: change_config(source, hidden_size="32"), ["hidden_size"]),
    "no config": (lambda source: (source / "config.json").unlink(), ["config.json"]),
    "pickle": (
        lambda source: (source / "model.safetensors").rename(source / "pytorch_model.bin"),
        ["pickle", "save_pretrained"],
    ),
    "other classes": (
        lambda source: change_config(source, id2label={"0": "a", "1": "b", "2": "c", "3": "d"}),
        ["--labels"],
    ),
    "no classes": (
        lambda source: change_config(source, id2label={str(i): f"LABEL_{i}" for i in range(4)}),
        ["does not say the order", "--labels"],
    ),
    "no tokenizer": (
        lambda source: [(source / name).unlink() for name in ("vocab.txt", "tokenizer.json")],
        ["no vocab.txt and no tokenizer.json"],
    ),
    "nothing": (lambda source: (source / "model.safetensors").unlink(), ["model.safetensors"]),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_line(what, tmp_path, topics, capsys):
    source = copied(tmp_path)
    change, words = DAMAGE[what]
    change(source)
    refused(capsys, tmp_path / "out", words, adopt.main, arguments(source, tmp_path / "out", topics))


def test_half_precision_is_read(tmp_path):
    """FP16 and BF16, which NumPy does not have: the numbers that they stand for, exactly."""
    numbers = np.array([[1.5, -2.0, 0.0078125], [3.140625, -0.0, 65280.0]], "float32")
    upper_halves = (numbers.view("uint32") >> 16).astype("uint16")
    entries = {
        "bf16": ("BF16", [2, 3], upper_halves.tobytes()),
        "fp16": ("F16", [2, 3], numbers.astype("float16").tobytes()),
        "whole numbers": ("I64", [1], bytes(8)),
    }
    # The format: the length of a JSON header as 8 bytes, the header, the data.
    header, data = {}, b""
    for name, (dtype, shape, content) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    header = json.dumps(header).encode()
    path = str(tmp_path / "model.safetensors")
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + data)
    found = tensors.read_safetensors(path)
    assert set(found) == {"bf16", "fp16"}
    assert all(array.dtype == "float32" and (array == numbers).all() for array in found.values())


def test_shards_that_are_missing_or_elsewhere(tmp_path, topics, capsys):
    source = copied(tmp_path, "bert_odd")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    for name in ("../model.safetensors", "model-00009.safetensors"):
        index["weight_map"][first] = name
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(capsys, tmp_path / "out", [name], adopt.main, arguments(source, tmp_path / "out", topics))


def test_wrong_order_of_labels_is_seen(tmp_path, topics, capsys):
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(LABELS[::-1]), encoding="utf-8")
    adopt.main(arguments(os.path.join(FIXTURES, "bert"), tmp_path / "out", topics, "--labels", labels))
    assert "warning: dev accuracy not above the majority class" in capsys.readouterr().out
    given = arguments(os.path.join(FIXTURES, "bert"), tmp_path / "out", topics, "--labels", labels)
    labels.write_text(json.dumps(LABELS), encoding="utf-8")
    with pytest.raises(UserError, match="holds the result of something else"):  # not "already finished"
        adopt.main(given)
    adopt.main([*given, "--overwrite"])
    assert record(tmp_path / "out")["metrics"]["accuracy"] == 1.0
    labels.write_text("[1, 2]")
    given = arguments(os.path.join(FIXTURES, "bert"), tmp_path / "other/out", topics, "--labels", labels)
    refused(capsys, tmp_path / "other/out", ["JSON list of topics's labels"], adopt.main, given)


def test_graphs_that_are_refused(tmp_path, topics, capsys):
    """Another input, strings, no vocabulary, cut off, Paddle 3's format."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "inference.json").write_text("{}")
    refused(capsys, out, ["Paddle 3"], adopt.main, arguments(source, out, topics))
    spec = [paddle.static.InputSpec([None, 8], "float32", "x")]
    paddle.jit.save(
        paddle.jit.to_static(paddle.nn.Linear(8, 4), input_spec=spec, full_graph=True), str(source / "model")
    )
    refused(capsys, out, ["input_ids and token_type_ids"], adopt.main, arguments(source, out, topics))
    graph = source / "model.pdmodel"
    program = exporting.read_program(str(graph))
    program.blocks[0].ops[1].type = "faster_tokenizer"
    graph.write_bytes(program.SerializeToString())
    refused(capsys, out, ["takes strings", "input_ids"], adopt.main, arguments(source, out, topics))
    graph.write_bytes(graph.read_bytes()[:50])
    refused(capsys, out, ["damaged"], adopt.main, arguments(source, out, topics))


def test_messages_name_the_command(tmp_path, capsys):
    """Where a stage.json is missing, the way in is named."""
    export = load_script("finetuning", "export_model")
    source = copied(tmp_path)
    given = ["--task_name", "topics", "--model_path", str(source)]
    refused(capsys, tmp_path / "out", ["finetuning/adopt.py"], export.main, given)
