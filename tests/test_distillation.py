"""Relation distillation against NumPy: each term, mixtures, padding; and that what is captured is Q, K and V."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from conftest import FILLER, ROOT, load_script, record

import relations
from common import UserError, checkpoints, modeling, runs
from corpus import Corpus


def numpy_loss(teacher_qkv, student_qkv, lengths, heads, alpha, beta):
    """The formula, row by row, on the unpadded tokens alone: no mask, so nothing of how padding is masked."""
    softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()  # noqa: E731
    rows = heads * sum(lengths)
    total = 0.0
    for teacher, student in zip(teacher_qkv, student_qkv):
        sums = {"token": 0.0, "head": 0.0, "sample": 0.0}
        split = [[[np.split(x[b, i].astype("float64"), heads) for i in range(n)] for b, n in enumerate(lengths)]
                 for x in (teacher, student)]  # fmt: skip
        for b, n in enumerate(lengths):
            for i in range(n):
                for a in range(heads):
                    others = {"token": [(b, j, a) for j in range(n)], "head": [(b, i, c) for c in range(heads)],
                              "sample": [(c, i, a) for c, m in enumerate(lengths) if i < m]}  # fmt: skip
                    for term, places in others.items():
                        p, q = (
                            softmax(
                                np.array([x[b][i][a] @ x[k][j][c] for k, j, c in places]) / np.sqrt(len(x[b][i][a]))
                            )
                            for x in split
                        )
                        sums[term] += (p * np.log(p / q)).sum()
        total += (1 - alpha - beta) * sums["token"] + alpha * sums["head"] + beta * sums["sample"]
    return total / rows


@pytest.mark.parametrize("alpha, beta", [(0, 0), (1, 0), (0, 1), (0.3, 0.5)])
@pytest.mark.parametrize("heads", [1, 4, 12])
def test_loss_against_numpy(alpha, beta, heads):
    rng, lengths = np.random.default_rng(heads), [5, 2, 7, 1]
    teacher, student = (rng.normal(size=(3, 4, 7, hidden)).astype("float32") for hidden in (48, 24))
    mask = np.array([[float(i < n) for i in range(7)] for n in lengths], "float32")
    total, rows = relations.relation_loss(
        [paddle.to_tensor(x) for x in teacher],
        [paddle.to_tensor(x) for x in student],
        paddle.to_tensor(mask),
        heads,
        alpha,
        beta,
    )
    assert rows == heads * sum(lengths)
    assert float(total) / rows == pytest.approx(numpy_loss(teacher, student, lengths, heads, alpha, beta), abs=1e-5)


def usual_loss(teacher_qkv, student_qkv, mask, heads, alpha, beta):
    """The loss in one piece, with Paddle's own gradient."""
    total = 0.0
    for term, weight in (("token", 1 - alpha - beta), ("head", alpha), ("sample", beta)):
        rows, columns = relations.masks(mask, term)
        for pair in zip(teacher_qkv, student_qkv):
            teacher, student = (relations.log_relation(relations.by_rows(x, heads, term), columns) for x in pair)
            total = total + weight * ((teacher.exp() * (teacher - student)).sum(-1) * rows).sum()
    return total


@pytest.mark.parametrize("alpha, beta", [(0, 0), (1, 0), (0, 1), (0.3, 0.5)])
@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_loss_and_gradient_in_parts_are_those_in_one_piece(alpha, beta, rows_at_once):
    """In parts of one, of three (which divides neither 5 samples nor 7 tokens) and in one: to 1e-6."""
    rng, heads = np.random.default_rng(0), 4
    mask = paddle.to_tensor([[float(i < n) for i in range(7)] for n in (5, 2, 7, 1, 6)])
    teacher = [paddle.to_tensor(rng.normal(size=(5, 7, 48)).astype("float32")) for _ in range(3)]
    student = [paddle.to_tensor(rng.normal(size=(5, 7, 24)).astype("float32"), stop_gradient=False) for _ in range(3)]
    expected = usual_loss(teacher, student, mask, heads, alpha, beta)
    (expected * 0.5).backward()
    gradients = [x.grad.numpy() for x in student]
    for x in student:
        x.clear_grad()
    most_mb = rows_at_once * heads * 7 * 7 * 4 / 2**20
    found, _ = relations.relation_loss(teacher, student, mask, heads, alpha, beta, most_mb)
    (found * 0.5).backward()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for x, gradient in zip(student, gradients):
        assert np.abs(x.grad.numpy() - gradient).max() <= 1e-6 * np.abs(gradient).max()


def test_run_sh_without_arguments(tmp_path):
    """Takes dataset/, and says what belongs there; a number of processes that no published step divides into is named."""
    run = ["sh", os.path.join(ROOT, "general_distill/run.sh")]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("run.sh: error: dataset: no such directory; put text files")
    (tmp_path / "dataset").mkdir()
    env = {**os.environ, "NPROC": "3"}
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "NPROC=3: must be 1, 2, 4 or 8" in done.stderr
    # The published run, but for the interpreter: what general_distill.py would get.
    shown = tmp_path / "python"
    shown.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 1\necho "$@"\n')
    shown.chmod(0o755)
    env = {**os.environ, "PYTHON": str(shown)}
    done = subprocess.run([*run, "--seed", "1"], cwd=tmp_path, capture_output=True, text=True, env=env)
    words = done.stdout.split()
    given = dict(zip(words, words[1:]))
    assert given["--batch_size"] == "128" and given["--gradient_accumulation_steps"] == "8" and given["--seed"] == "1"
    done = subprocess.run([*run, "--batch_size", "32"], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert "--gradient_accumulation_steps 1 " in done.stdout
    assert given["--input_dir"] == "dataset" and given["--init_config"].endswith("configs/ppminilm-6l-768h.json")
    assert "--student_model_name_or_path" not in given and "--use_amp" not in words, words


def test_num_layers_builds_a_student(monkeypatch):
    general_distill = load_script("general_distill", "general_distill")
    args = general_distill.parse_args(
        ["--teacher_model_name_or_path", "t", "--input_dir", "x", "--output_dir", "y", "--num_layers", "3"]
    )
    asked = []

    def load(*_, **options):
        asked.append(options)
        return SimpleNamespace(tokenizer=SimpleNamespace(vocab={}), model=SimpleNamespace(config=None))

    monkeypatch.setattr(general_distill.checkpoints, "load_pretrained", load)
    monkeypatch.setattr(general_distill.relations, "check_layers", lambda *_: None)
    general_distill.load_pair(args)
    assert asked[1]["init_config"] == {"num_hidden_layers": 3}
    config = modeling.random_config("ppminilm", asked[1]["init_config"], 100, 2)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (3, 768, 100)


def test_equal_relations_cost_nothing_and_padding_does_not_matter():
    rng = np.random.default_rng(0)
    x = [paddle.to_tensor(rng.normal(size=(2, 5, 12)).astype("float32")) for _ in range(3)]
    mask = paddle.to_tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert float(relations.relation_loss(x, x, mask, 3, 0.2, 0.2)[0]) == pytest.approx(0, abs=1e-6)
    y = [t + 1.0 for t in x]
    changed = [paddle.where(mask.unsqueeze(-1).astype(bool), t, t * 9 + 3) for t in y]
    for alpha, beta in ((0, 0), (1, 0), (0, 1)):
        expected, found = (float(relations.relation_loss(x, s, mask, 3, alpha, beta)[0]) for s in (y, changed))
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("model_type", ["ppminilm", "roberta", "bert", "ernie"])
def test_captured_q_k_v_are_the_projections(model_type):
    """By hand from the weights: the input of the layer times the matrix plus the bias."""
    cls = modeling.model_class(model_type, "Model")
    model = cls(cls.config_class(vocab_size=50, hidden_size=12, num_hidden_layers=3, num_attention_heads=3,
                                 intermediate_size=16, max_position_embeddings=32, pad_token_id=0))  # fmt: skip
    model.eval()
    captured, seen = relations.CapturedQKV(model, 1), []
    model.encoder.layers[0].register_forward_post_hook(lambda *call: seen.append(call[-1]))
    beyond = []
    for layer in (model.encoder.layers[1].self_attn.out_proj, model.encoder.layers[2], model.pooler):
        layer.register_forward_post_hook(lambda *call: beyond.append(call))
    found = captured.run(paddle.to_tensor([[2, 7, 9, 3], [2, 5, 3, 0]]))
    assert not beyond, "what bears on no loss was computed"
    layer_input = (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).numpy().astype("float64")
    attention = model.encoder.layers[1].self_attn
    for value, projection in zip(found, (attention.q_proj, attention.k_proj, attention.v_proj)):
        expected = layer_input @ projection.weight.numpy().astype("float64") + projection.bias.numpy()
        assert np.abs(value.numpy() - expected).max() < 1e-5
    (found[0].sum() + found[2].sum()).backward()  # gradients reach what lies below, as from a whole run
    assert np.abs(model.embeddings.word_embeddings.weight.grad.numpy()).max() > 0


@pytest.fixture(scope="module")
def distillation(workspace, tmp_path_factory):
    """A corpus of three shards, and a random teacher of another width than the student, as arguments of the script."""
    root = tmp_path_factory.mktemp("distillation")
    rng = np.random.default_rng(3)
    (root / "corpus").mkdir()
    for shard in range(3):
        lines = ["".join(rng.choice(FILLER, rng.integers(3, 30))) for _ in range(40 + shard)]
        (root / "corpus" / f"{shard}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    paddle.seed(5)
    cls = modeling.model_class("roberta", "Model")
    vocab = (workspace / "vocab.txt").read_text(encoding="utf-8").split()
    teacher = cls(cls.config_class(vocab_size=len(vocab), hidden_size=96, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0,
                                   intermediate_size=64, max_position_embeddings=64, initializer_range=0.5))  # fmt: skip
    (root / "teacher").mkdir()
    teacher.save_pretrained(str(root / "teacher"))
    (root / "teacher" / "vocab.txt").write_bytes((workspace / "vocab.txt").read_bytes())
    (root / "student.json").write_text(json.dumps({
        "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))  # fmt: skip
    return root, [
        "--teacher_model_name_or_path", root / "teacher", "--init_config", root / "student.json", "--vocab_file", workspace / "vocab.txt",
        "--input_dir", root / "corpus", "--teacher_layer_index", "1", "--student_layer_index", "1", "--num_relation_heads", "8",
        "--alpha", "0.3", "--beta", "0.3", "--batch_size", "4", "--max_seq_length", "24", "--max_steps", "30", "--save_steps", "10",
        "--logging_steps", "4", "--learning_rate", "5e-3",
    ]  # fmt: skip


SCRIPT = os.path.join(ROOT, "general_distill", "general_distill.py")


def start(arguments, *launch, **env):
    return subprocess.Popen([sys.executable, *launch, SCRIPT, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env})  # fmt: skip


def weights(directory):
    return {name: value.numpy() for name, value in paddle.load(str(directory / "model_state.pdparams")).items()}


@pytest.fixture(scope="module")
def distilled(distillation):
    root, arguments = distillation
    done = start([*arguments, "--output_dir", root / "whole", "--gradient_accumulation_steps", "2"])
    assert done.wait() == 0, done.stdout.read().decode()
    return root / "whole"


def test_the_student_learns_the_relations(distilled):
    losses = record(distilled / "model_30")["losses"]
    assert losses[-1][1] < 0.8 * losses[0][1]
    assert sorted(os.listdir(distilled)) == ["model_10", "model_20", "model_30"]


def test_a_save_before_the_first_logging_step_and_a_model_written_again(distillation, tmp_path, capsys):
    """Each saved model has a loss; a finished run whose model was removed writes it again from its last state."""
    _, arguments = distillation
    script = load_script("general_distill", "general_distill")
    words = [*map(str, arguments), "--output_dir", str(tmp_path / "o"), "--max_steps", "3", "--save_steps", "1"]
    words += ["--logging_steps", "100", "--max_seq_length", "16"]
    kept = []

    def keep(run, *_):
        kept.append(shutil.copytree(run.work, tmp_path / "kept"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.ResumableRun, "_remove", keep)  # as if killed before it could clear away
        script.main(words)
    assert [len(record(tmp_path / f"o/model_{step}")["losses"]) for step in (1, 2, 3)] == [1, 2, 3]
    before = weights(tmp_path / "o/model_3")
    shutil.rmtree(tmp_path / "o")
    script.main(words)
    assert all(np.array_equal(before[name], array) for name, array in weights(tmp_path / "o/model_3").items())
    assert record(tmp_path / "o/model_3")["metrics"]["loss"] and not (tmp_path / "o.unfinished").exists()


def test_a_later_stage_takes_the_student(distilled, workspace):
    start = checkpoints.load_pretrained(str(distilled / "model_30"), 4)
    found = start.model.ppminilm.encoder.layers[1].linear1.weight.numpy()
    assert np.array_equal(found, weights(distilled / "model_30")["encoder.layers.1.linear1.weight"])
    assert "student: random weights, no pre-training" in start.notes


def test_an_epoch_sees_each_line_once(distillation):
    root, _ = distillation
    corpus = Corpus(str(root / "corpus"), 1)
    lines = sorted(
        line for n in range(3) for line in (root / f"corpus/{n}.txt").read_text(encoding="utf-8").split("\n\n")
    )
    epochs = [list(corpus.sentences(epoch)) for epoch in (0, 1)]
    assert [sorted(e) for e in epochs] == [lines, lines] and epochs[0] != epochs[1]
    stream = corpus.batches(7)
    first = [next(stream) for _ in range(40)]
    assert [next(corpus.batches(7, skip=n)) for n in (0, 1, 17, 18, 39)] == [first[n] for n in (0, 1, 17, 18, 39)]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Peak of a process that goes through an epoch: 150,000 lines, and ten times as many."""
    lines = "".join("".join(FILLER[(i * 7 + j) % len(FILLER)] for j in range(5 + i % 60)) + "\n" for i in range(15_000))
    for name, shards in (("small", 1), ("large", 10)):
        (tmp_path / name).mkdir()
        for shard in range(shards):
            (tmp_path / name / f"{shard}.txt").write_text(lines * 10, encoding="utf-8")
    code = (
        f"import sys; sys.path[:0] = [{ROOT!r}, {ROOT + '/general_distill'!r}]; import resource; from corpus import Corpus\n"
        "corpus = Corpus(sys.argv[1], 1); stream = corpus.batches(64, 0, True)\n"
        "for _ in range(corpus.batches_per_epoch(64)): epoch, texts = next(stream)\n"
        "print(epoch, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for name in ("small", "large"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True, check=True
        )
        epoch, peak = map(int, done.stdout.split())
        assert epoch == 0
        peaks.append(peak)
    assert peaks[1] < 1.05 * peaks[0], peaks  # the text alone is 140 MB, half of what such a process takes


def test_batches_of_similar_length_hold_each_line_once(tmp_path, monkeypatch):
    """Also across blocks, of which there are several here, and with the same place to go on from."""
    monkeypatch.setattr("corpus.BLOCK", 1000)
    rng = np.random.default_rng(4)
    lines = [f"{i}：" + "".join(rng.choice(FILLER, rng.integers(1, 60))) for i in range(2600)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = Corpus(str(tmp_path), 1)
    assert corpus.batches_per_epoch(7) == 372

    def epoch(grouped):
        stream = corpus.batches(7, 0, grouped)
        return [texts for _, texts in (next(stream) for _ in range(372))]

    def padding(batches):
        return 1 - sum(len(t) for b in batches for t in b) / sum(len(b) * max(map(len, b)) for b in batches)

    grouped = epoch(True)
    assert sorted(t for batch in grouped for t in batch) == sorted(lines)
    assert padding(grouped) < 0.05 < 0.3 < padding(epoch(False))
    assert next(corpus.batches(7, 200, True))[1] == grouped[200]
    lengths = [max(map(len, batch)) for batch in grouped]
    assert lengths[:50] != sorted(lengths[:50]) and len(set(lengths[:50])) > 10  # short and long ones mixed


@pytest.mark.parametrize("changed, message", [
    (["--num_relation_heads", "48"], "--num_relation_heads 48: does not divide the student's 64"),
    (["--teacher_layer_index", "3"], "the teacher has layers 0 to 2"),
    (["--num_layers", "6"], "the student has 2"),
    (["--use_amp"], "--use_amp: FP16 is for a GPU"),
    (["--teacher_model_name_or_path", "/no"], "--teacher_model_name_or_path /no: no directory"),
    (["--input_dir", "/nonexistent"], "--input_dir /nonexistent: no such directory"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(distillation, tmp_path, changed, message):
    _, arguments = distillation
    with pytest.raises(UserError, match=message):
        load_script("general_distill", "general_distill").main(
            [*map(str, arguments), "--output_dir", str(tmp_path / "o"), *changed]
        )
    assert not (tmp_path / "o.unfinished").exists()


@pytest.mark.parametrize(
    "student, layers, hidden, heads", [("6l-768h", 6, 768, 12), ("4l-256h", 4, 256, 16), ("2l-128h", 2, 128, 2)]
)
def test_published_students_take_the_teachers_vocabulary(distillation, student, layers, hidden, heads):
    _root, arguments = distillation
    script = load_script("general_distill", "general_distill")
    at = arguments.index("--vocab_file")
    args = [
        *arguments[:at],
        *arguments[at + 2 :],
        "--init_config",
        f"{ROOT}/configs/ppminilm-{student}.json",
        "--student_layer_index",
        layers - 1,
        "--output_dir",
        "o",
    ]
    teacher, student = script.load_pair(script.parse_args(list(map(str, args))))
    config = student.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, hidden, heads)
    assert config.intermediate_size == 4 * hidden and config.hidden_act == "relu"
    assert len(student.tokenizer.vocab) == config.vocab_size == teacher.model.config.vocab_size


def test_layers_that_would_stay_random_are_refused(distillation):
    _root, arguments = distillation
    script = load_script("general_distill", "general_distill")
    at = arguments.index("--vocab_file")
    args = [*arguments[:at], *arguments[at + 2 :], "--init_config", f"{ROOT}/configs/ppminilm-4l-256h.json"]
    with pytest.raises(UserError, match="--student_layer_index 1: layers above it, up to 3, .*_index 3"):
        script.load_pair(script.parse_args([*map(str, args), "--output_dir", "o"]))


def test_another_vocabulary_is_refused(distillation, tmp_path):
    root, arguments = distillation
    (tmp_path / "vocab.txt").write_text(
        (root / "teacher/vocab.txt").read_text(encoding="utf-8") + "more\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match="vocabulary .* is not the teacher's"):
        load_script("general_distill", "general_distill").main(
            [*map(str, arguments), "--output_dir", str(tmp_path / "o"), "--vocab_file", str(tmp_path / "vocab.txt")])  # fmt: skip
