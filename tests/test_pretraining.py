"""demo/pretrain_mlm.py: what it masks, that it learns, that a kill changes nothing, and that a student can be taught."""

import functools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import FAULTS, FILLER, ROOT, load_script, record

from common import UserError, tensors
from common.tokenization import FastTokenizer

SCRIPT = os.path.join(ROOT, "demo/pretrain_mlm.py")


def test_masking():
    """The shares of BERT, on a million tokens; special tokens stay; what was there is told."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER]
    tokenizer = FastTokenizer(vocab)
    ids = np.random.default_rng(0).integers(5, len(vocab), (1000, 1000))
    ids[:, 0], ids[:, 900], ids[:, 901:] = 2, 3, 0
    mask_tokens = load_script("demo", "pretrain_mlm").mask_tokens
    masked, positions, expected = mask_tokens(ids, tokenizer, 0.15, np.random.default_rng(1))
    assert np.array_equal(ids.reshape(-1)[positions], expected) and not np.isin(expected, [0, 2, 3]).any()
    assert len(positions) / (1000 * 899) == pytest.approx(0.15, abs=0.002)
    untouched = np.ones(ids.size, bool)
    untouched[positions] = False
    assert np.array_equal(masked.reshape(-1)[untouched], ids.reshape(-1)[untouched])
    found = masked.reshape(-1)[positions]
    assert (found == 4).mean() == pytest.approx(0.8 + 0.1 / len(vocab), abs=0.005)
    assert (found == expected).mean() == pytest.approx(0.1 + 0.1 / len(vocab), abs=0.005)
    again = mask_tokens(ids, tokenizer, 0.15, np.random.default_rng(1))
    assert np.array_equal(masked, again[0])
    one = mask_tokens(np.array([[2, 7, 8, 3]]), tokenizer, 1e-9, np.random.default_rng(1))
    assert len(one[1]) == 1 and one[1][0] in (1, 2)  # never none: the mean over nothing would be no number


@pytest.fixture(scope="module")
def text(workspace):
    """Sentences in which each character tells the next, so that a masked one can be known from its neighbours."""
    (workspace / "text").mkdir()
    rng = np.random.default_rng(2)
    for shard in range(2):
        starts = rng.integers(0, len(FILLER), (400, 2))
        lines = ["".join(FILLER[(s + i) % len(FILLER)] for i in range(8 + s % 9)) for s, _ in starts]
        (workspace / "text" / f"{shard}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return workspace


def start(text, output, *more):
    arguments = ["--init_config", text / "tiny.json", "--vocab_file", text / "vocab.txt", "--input_dir", text / "text",
                 "--output_dir", text / output, "--batch_size", 32, "--max_steps", 600, "--learning_rate", "3e-3",
                 "--save_steps", 50, "--logging_steps", 120, "--group_by_length", *more]  # fmt: skip
    return subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


@pytest.fixture(scope="module")
def teacher(text):
    done = start(text, "teacher")
    output = done.communicate()[0]
    assert done.returncode == 0, output
    return text / "teacher"


def test_the_teacher_learns(teacher):
    written = record(teacher)
    assert written["stage"] == "pretrain"
    assert written["history"][0][2] < 0.05 and written["metrics"]["accuracy"] > 0.3, written["history"]  # chance: 0.005


@pytest.mark.skipif(FAULTS is None, reason="20 seconds: bash tests/faults.sh")
def test_a_kill_changes_nothing(text, teacher):
    killed = start(text, "killed_teacher")
    while not (text / "killed_teacher.unfinished/state-150").is_dir():
        assert killed.poll() is None
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again = start(text, "killed_teacher")
    output = again.communicate()[0]
    assert again.returncode == 0 and "going on after step" in output, output
    results = [record(directory) for directory in (teacher, text / "killed_teacher")]
    assert results[0]["weights"] == results[1]["weights"] and results[0]["history"] == results[1]["history"]
    assert "nothing to do" in start(text, "killed_teacher").communicate()[0]


def test_a_student_is_taught_by_it(text, teacher):
    """By name of its directory; and the encoder that teaches is the one that was pre-trained."""
    import paddle

    script = load_script("general_distill", "general_distill")
    arguments = ["--teacher_model_name_or_path", teacher, "--init_config", text / "tiny.json", "--vocab_file", text / "vocab.txt",
                 "--input_dir", text / "text", "--output_dir", text / "student", "--teacher_layer_index", 1, "--student_layer_index",
                 1, "--num_relation_heads", 8, "--max_steps", 20, "--batch_size", 16, "--logging_steps", 10,
                 "--max_seq_length", 24]  # fmt: skip
    taught, _ = script.load_pair(script.parse_args([str(a) for a in arguments]))
    saved = paddle.load(str(teacher / "model_state.pdparams"))
    assert np.array_equal(
        taught.model.encoder.layers[1].linear1.weight, saved["roberta.encoder.layers.1.linear1.weight"]
    )
    script.main([str(a) for a in arguments])
    losses = record(text / "student/model_20")["losses"]
    assert losses[-1][1] < losses[0][1]


def test_the_curves_compare_twins(text, teacher, tmp_path, capsys):
    """The gain against NumPy's, the picture, and that runs which differ in more than their start are refused."""
    run_clue, curves = load_script("finetuning", "run_clue"), load_script("general_distill", "curves")
    common = ["--task_name", "topics", "--data_dir", text / "data", "--max_steps", 10, "--save_steps", 5, "--batch_size", 16,
              "--learning_rate", "2e-3"]  # fmt: skip
    random = ["--init_config", text / "tiny.json", "--vocab_file", text / "vocab.txt"]
    student = ["--model_name_or_path", text / "student/model_20"]
    for name, start_from, seed in (("d1", student, 1), ("d2", student, 2), ("r1", random, 1), ("r2", random, 2)):
        more = ["--seed", seed, "--output_dir", tmp_path / name]
        run_clue.main([str(a) for a in (*common, *start_from, *more)])
    run_clue.main([str(a) for a in (*common, *random, "--output_dir", tmp_path / "other", "--weight_decay", 0.1)])

    def compare(distilled, random):
        return curves.main([str(a) for a in (
            "--teacher", teacher, "--student", text / "student/model_20", "--distilled", *(tmp_path / d for d in distilled),
            "--random", *(tmp_path / r for r in random), "--output", tmp_path / "c.png", "--json", tmp_path / "c.json",
        )])  # fmt: skip

    found = compare(["d1", "d2"], ["r1", "r2"])
    accuracy = {name: record(tmp_path / name)["metrics"]["accuracy"] for name in ("d1", "d2", "r1", "r2")}
    assert found["gain"] == pytest.approx((accuracy["d1"] + accuracy["d2"] - accuracy["r1"] - accuracy["r2"]) / 2)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in found["distilled"][0]["evaluations"]] == [5, 10]
    for distilled, random, message in ((["d1"], ["other"], "differ in more"), (["r1"], ["r2"], "not fine-tuned from that"),
                                       (["d1"], ["d2"], "not from random weights")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            compare(distilled, random)


def test_without_mask_token_it_refuses(text, tmp_path):
    (tmp_path / "vocab.txt").write_text((text / "vocab.txt").read_text().replace("[MASK]", "[X]"), encoding="utf-8")
    done = start(text, "none", "--vocab_file", tmp_path / "vocab.txt")
    assert "no [MASK]" in done.communicate()[0] and done.returncode == 2


def test_word_vectors_are_those_of_the_counts(text):
    """Neighbours by hand on two sentences; the factors against NumPy's; and neighbours in the text get like vectors."""
    import word_vectors

    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER]
    tokenizer = FastTokenizer(vocab)
    a, b, c = (vocab.index(char) for char in FILLER[:3])
    count = functools.partial(word_vectors.count_neighbours, tokenizer=tokenizer, max_seq_length=64)
    occurrences, pairs = count([FILLER[0] + FILLER[1] + FILLER[2], FILLER[0]], size=len(vocab))
    assert occurrences[[a, b, c]].tolist() == [2, 1, 1] and occurrences.sum() == 4
    assert [pairs[a, b], pairs[b, c], pairs[a, c], pairs[c, a], pairs[a, a]] == [1, 1, 0.5, 0.5, 0]

    lines = [line for shard in "01" for line in (text / f"text/{shard}.txt").read_text(encoding="utf-8").split()]
    occurrences, pairs = count(lines, size=len(vocab))
    assert count(lines, size=len(vocab) + 3)[0].tolist() == [*occurrences, 0, 0, 0]  # a model with a larger vocabulary
    dense = pairs.toarray()[5:, 5:]
    contexts = dense.sum(0) ** 0.75 / (dense.sum(0) ** 0.75).sum()
    with np.errstate(divide="ignore"):
        information = np.maximum(np.log(dense / dense.sum(1, keepdims=True) / contexts), 0)
    vectors, values, _ = np.linalg.svd(information)
    expected = vectors[:, :16] * values[:16] ** 0.5
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = word_vectors.factorize(pairs, 16)
    assert np.abs(found[:5]).max() < 1e-3
    assert np.abs(found[5:] @ found[5:].T - expected @ expected.T).mean() < 0.02
    similar = found @ found.T
    assert similar[a, b] > 0.8 and abs(similar[a, vocab.index(FILLER[100])]) < 0.3


def test_a_warm_start_learns_sooner_and_resumes(text, tmp_path, monkeypatch, capsys):
    """The loss of few steps against a cold start's; the same bits after an interruption, with the counting done once."""
    script = load_script("demo", "pretrain_mlm")

    def train(name, *more):
        arguments = ["--init_config", text / "tiny.json", "--vocab_file", text / "vocab.txt", "--input_dir", text / "text",
                     "--output_dir", tmp_path / name, "--batch_size", 32, "--max_steps", 120, "--learning_rate", "3e-3",
                     "--save_steps", 10, "--logging_steps", 40, *more]  # fmt: skip
        script.main([str(a) for a in arguments])
        return record(tmp_path / name)

    cold, warm = train("cold"), train("warm", "--warm_start")
    assert warm["metrics"]["loss"] < cold["metrics"]["loss"] - 0.5
    check, counted = script.training.check_loss, capsys.readouterr().out.count("warm start: word vectors of 200 tokens")

    def stop_at_25(loss, step):
        check(loss, step)
        if step == 25:
            raise KeyboardInterrupt

    monkeypatch.setattr(script.training, "check_loss", stop_at_25)
    with pytest.raises(KeyboardInterrupt):
        train("stopped", "--warm_start")
    monkeypatch.setattr(script.training, "check_loss", check)
    again = train("stopped", "--warm_start")
    # Not the files: they hold Paddle's names of the parameters, which within a process count up.
    both = [tensors.read_tensors(str(tmp_path / name / "model_state.pdparams")) for name in ("warm", "stopped")]
    assert again["history"] == warm["history"] and both[0].keys() == both[1].keys()
    assert all(np.array_equal(both[0][name], both[1][name]) for name in both[0])
    assert counted == 1 and capsys.readouterr().out.count("warm start: word vectors of 200 tokens") == 1
    with pytest.raises(UserError, match="tokens are frequent"):
        few = tmp_path / "few"
        few.mkdir()
        (few / "0.txt").write_text(FILLER[0] * 30 + "\n", encoding="utf-8")
        train("none", "--warm_start", "--input_dir", few)
    with pytest.raises(UserError, match="would replace trained embeddings"):
        script.parse_args(["--model_name_or_path", "a", "--input_dir", "b", "--output_dir", "c", "--warm_start"])
