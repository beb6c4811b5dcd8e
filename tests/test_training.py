"""Fine-tuning and pruning as long work: order of the data, optimizer, kill -9 and resume, refusals."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import paddle
import pytest
from conftest import ROOT, load_script, record

import data
from common import (
    UserError,
    batching,
    checkpoints,
    cli,
    files,
    modeling,
    provenance,
    records,
    runs,
    tokenization,
    training,
)


def arguments(**changed):
    from argparse import Namespace

    return Namespace(
        **{
            **{
                "batch_size": 4,
                "gradient_accumulation_steps": 1,
                "seed": 3,
                "group_by_length": False,
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                "weight_decay": 0.1,
                "warmup_proportion": 0.1,
                "adam_epsilon": 1e-8,
                "max_grad_norm": 1.0,
            },
            **changed,
        }
    )


@pytest.mark.parametrize("group_by_length", [False, True])
def test_an_epoch_sees_each_record_once(group_by_length):
    features = [batching.Feature([2] * (1 + i % 7), [0] * (1 + i % 7), i) for i in range(1003)]
    args = arguments(group_by_length=group_by_length)
    seen = [batch.labels.tolist() for _, [(batch, _)] in training.training_batches(features, args, 0, 2 * 251)]
    for epoch in (seen[:251], seen[251:]):
        assert sorted(sum(epoch, [])) == list(range(1003))
    assert seen[:251] != seen[251:]
    again = [batch.labels.tolist() for _, [(batch, _)] in training.training_batches(features, args, 100, 2 * 251)]
    assert again == seen[100:]
    padding = sum(b.input_ids.size for _, [(b, _)] in training.training_batches(features, args, 0, 251)) / sum(
        len(f.input_ids) for f in features
    )
    assert padding < 1.02 if group_by_length else padding > 1.2


@pytest.mark.parametrize(
    "examples, changed, numbers",
    [
        (
            53360,
            {},
            [
                "53,360 train records / 32 = 1,668 steps an epoch",
                "3 epochs = 5,004 steps",
                "warm-up 500 steps,",
                "51 in all",
            ],
        ),
        (
            33,
            {"num_train_epochs": 1},
            ["33 train records / 32 = 2 steps", "1 epochs = 2 steps", "warm-up 0 steps,", "1 in all"],
        ),
        (1000, {"max_steps": 250, "warmup_steps": 7}, ["--max_steps = 250 steps", "warm-up 7 steps,", "3 in all"]),
    ],
)
def test_the_plan_is_the_arithmetic_of_the_training(capsys, examples, changed, numbers):
    defaults = {"batch_size": 32, "num_train_epochs": 3, "max_steps": -1, "save_steps": 100}
    args = arguments(**{**defaults, **changed})
    training.show_plan(args, examples)
    plan = capsys.readouterr().out
    assert all(number in plan for number in numbers), plan
    features = [batching.Feature([2], [0], 0)] * examples
    steps = training.total_steps(args, examples)
    counted = sum(1 for _ in training.training_batches(features, args, 0, steps))
    assert f"= {counted:,} steps;" in plan


def test_samples_are_shown_whatever_their_text(workspace, capsys, monkeypatch):
    """Text, tokens, ids and label; half a surrogate pair, control characters and emoji end no training."""
    import io

    tokenizer = tokenization.load_tokenizer(None, True, str(workspace / "vocab.txt"))
    texts = ["足球\ud83d", "一\n\x1b[31m丁", "七😀"]
    examples = [batching.Example(text, None, 1, number) for number, text in enumerate(texts, 1)]
    features = batching.convert(examples, tokenizer, 16)
    task = data.Task("mine", ("体育", "财经"))
    batching.show_samples(examples, features, tokenizer, task)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[0] == "sample 1: 足球\\ud83d"
    assert lines[1] == "  tokens: [CLS] 足 球 [SEP]" and lines[2].endswith("label: 财经 (class 1)")
    assert lines[2].startswith(f"  ids: {' '.join(map(str, features[0].input_ids))};")
    for encoding in ("ascii", "gbk"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", stream)
        batching.show_samples(examples, features, tokenizer, task)
        monkeypatch.undo()
        stream.flush()
        assert stream.buffer.getvalue().count(b"\n") == 9


def test_weight_decay_spares_biases_and_norms(tuned):
    model, *_ = checkpoints.load_classifier(str(tuned))
    optimizer, _ = training.make_optimizer(model, arguments(learning_rate=1.0, warmup_proportion=0.0), 10)
    before = {name: p.numpy().copy() for name, p in model.named_parameters()}
    loss = sum((p * 0).sum() for p in model.parameters())  # zero gradients: all that moves is decay
    loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1.0 if name.endswith("bias") or "norm" in name else 0.9
        assert np.allclose(p.numpy(), before[name] * factor, atol=1e-7), name


def test_score_against_numpy(tuned, workspace):
    model, tokenizer, rec, _ = checkpoints.load_classifier(str(tuned))
    task = data.Task(rec["task"], tuple(rec["labels"]))
    features = batching.convert(data.read_split(task, "dev", str(workspace / "data"), 50).examples, tokenizer, 64)
    logits = np.concatenate([model(paddle.to_tensor([f.input_ids])).numpy() for f in features]).astype("float64")
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([f.label for f in features])
    found = task.objective.metrics(modeling.predict(model, features), labels)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean(), abs=1e-6)
    assert found["loss"] == pytest.approx(-np.log(probabilities[np.arange(50), labels]).mean(), abs=1e-4)


def finetune_command(workspace, output, *more):
    return [
        os.path.join(ROOT, "finetuning/run_clue.py"),
        "--task_name",
        "topics",
        "--init_config",
        str(workspace / "tiny.json"),
        "--vocab_file",
        str(workspace / "vocab.txt"),
        "--data_dir",
        str(workspace / "data"),
        "--output_dir",
        str(output),
        "--max_steps",
        "100",
        "--save_steps",
        "20",
        "--batch_size",
        "32",
        "--learning_rate",
        "2e-3",
        "--max_seq_length",
        "48",
        *more,
    ]


def prune_command(workspace, tuned, output):
    return [
        os.path.join(ROOT, "pruning/prune.py"),
        "--task_name",
        "topics",
        "--model_name_or_path",
        str(tuned),
        "--data_dir",
        str(workspace / "data"),
        "--output_dir",
        str(output),
        "--max_steps",
        "40",
        "--save_steps",
        "5",
        "--batch_size",
        "16",
        "--learning_rate",
        "1e-3",
        "--width_mult_list",
        "0.75",
        "0.25",
    ]


def finish(command):
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout


def test_other_arguments_are_refused(workspace, tuned, tmp_path, capsys):
    run_clue = load_script("finetuning", "run_clue")
    target = tmp_path / "m"
    shutil.copytree(tuned, target)
    command = finetune_command(workspace, target)[1:]
    with pytest.raises(UserError, match="holds the result of something else"):
        run_clue.main(command)
    unfinished = tmp_path / "n.unfinished"
    (unfinished / "state-5").mkdir(parents=True)
    (unfinished / "identity.json").write_text(json.dumps({"learning_rate": 5.0}))
    with pytest.raises(UserError, match="unfinished run of something else.*learning_rate 5.0 -> 0.002"):
        run_clue.main(finetune_command(workspace, tmp_path / "n")[1:])
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not this project's"):
        run_clue.main(finetune_command(workspace, tmp_path / "o")[1:])
    assert (tmp_path / "o" / "notes.txt").read_text() == "mine"


def run_of(output_dir, overwrite=False, **arguments):
    """A run of a stage of one's own with these arguments, not entered."""
    args = cli.Arguments(output_dir=cli.PathArgument(output_dir), overwrite=overwrite, max_seq_length=8, **arguments)
    args.without_effect = {"output_dir", "overwrite"}
    return runs.ResumableRun("mine", args, [str(output_dir)], task="general", labels=[])


def test_two_runs_into_one_directory(tmp_path):
    out = tmp_path / "there" / "out"
    with run_of(out, a=1), pytest.raises(UserError, match="another run is writing there"), run_of(out, a=1):
        pass
    assert os.listdir(tmp_path) == []  # no state was saved


def test_a_lock_is_given_back_to_nobody_else(tmp_path):
    """Whoever releases a lock late does not take away the one that another run has got by then."""
    late = files.Lock(str(tmp_path / "out"))
    os.remove(late.path)  # as when the directory that it lies in is moved away and made again
    with files.Lock(str(tmp_path / "out")):
        late.release()
        with pytest.raises(UserError, match="another run is writing there"):
            files.Lock(str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_a_state_of_another_run_is_never_taken(tmp_path):
    for before in (run_of(tmp_path / "out", a=1).identity, None):  # None: killed before the identity was written
        (tmp_path / "out.unfinished/state-7").mkdir(parents=True)
        if before:
            (tmp_path / "out.unfinished/identity.json").write_text(json.dumps(before))
            with pytest.raises(UserError, match="something else .a 1 -> 2.; repeat its command"):
                run_of(tmp_path / "out", a=2).__enter__()
            assert (tmp_path / "out.unfinished/state-7").is_dir()
        with run_of(tmp_path / "out", overwrite=before is not None, a=2) as run:
            assert not run.finished and run.newest_state() is None
        assert os.listdir(tmp_path) == []
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished/identity.json").write_text("[1")
    with pytest.raises(UserError, match="identity.json: damaged"):
        run_of(tmp_path / "out", a=2).__enter__()


def test_a_finished_run_forgets_its_own_state_only(tuned, tmp_path):
    """Killed after its result was in place, it leaves a working directory: the next run removes it, if it is its own."""
    found = record(tuned)
    args = cli.Arguments(**{**found["arguments"], "output_dir": cli.PathArgument(tmp_path / "m"), "overwrite": False})
    args.without_effect = {"output_dir", "overwrite", "data_dir", "task_name"}
    fields = {name: found[name] for name in ("task", "labels", "objective")}
    run = runs.ResumableRun("finetune", args, [str(tmp_path / "m")], found["parent"], found["data"], **fields)
    for identity, left in ((run.identity, []), ({"a": 1}, ["identity.json", "lock", "state-7"])):
        shutil.copytree(tuned, tmp_path / "m", dirs_exist_ok=True)
        (tmp_path / "m.unfinished/state-7").mkdir(parents=True)
        (tmp_path / "m.unfinished/identity.json").write_text(json.dumps(identity))
        with run:
            assert run.finished and (tmp_path / "m.unfinished").exists() == bool(left)
            assert not left or sorted(os.listdir(tmp_path / "m.unfinished")) == left


def test_a_damaged_state_is_named(tmp_path):
    with run_of(tmp_path / "out", a=1) as run:
        model = paddle.nn.Linear(2, 2)
        optimizer = paddle.optimizer.AdamW(parameters=model.parameters())
        run.save_state(3, model, optimizer, {})
        state = tmp_path / "out.unfinished/state-3/model.npz"
        state.write_bytes(state.read_bytes()[:-30])
        with pytest.raises(UserError, match="state-3: damaged .*; remove .*out.unfinished, and training begins anew"):
            run.restore(model, optimizer, None)


def test_finished_asks_for_data_and_parent_too(tuned, tmp_path):
    """The same command after the data or the weights that it starts from have changed is another run."""
    found = record(tuned)
    parent = {"path": "p", "weights": {"m.pdiparams": "0123", "m.pdmodel": "0000"}}
    # The graph of one architecture is the same for all its models.
    other_parent = {"path": "p", "weights": {"m.pdiparams": "0124", "m.pdmodel": "0000"}}
    assert provenance.difference(*(provenance.identity({}, p, {}, set()) for p in (parent, other_parent)))

    def run(parent=None, data=found["data"], overwrite=False, **changed):
        args = cli.Arguments(**{**found["arguments"], **changed, "overwrite": overwrite})
        args.without_effect = {"overwrite", "logging_steps"}
        return runs.Run("finetune", args, parent, data)

    assert run().has_finished(str(tuned)) and run().has_made(found)
    assert run(logging_steps=7).has_finished(str(tuned))  # declared not to change the result
    for other in ({"parent": parent}, {"data": {**found["data"], "train": {"md5": "0"}}}, {"seed": 1}):
        with pytest.raises(UserError, match="holds the result of something else"):
            run(**other).has_finished(str(tuned))
        assert not run(**other, overwrite=True).has_finished(str(tuned)) and not run(**other).has_made(found)
    assert run(seed=1).has_made(found, ignoring=["seed"])
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="not this project's"):  # --overwrite is no licence to remove a user's files
        run(overwrite=True).has_finished(str(tmp_path))


def test_an_output_that_others_lie_in_is_refused(tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for directory in (".", "..", str(tuned.parent)):
        with pytest.raises(UserError, match="cannot be the output|holds something else"):
            runs.check_replaceable(directory, "prune_export", [str(tuned)])
    with pytest.raises(UserError, match="holds something else"):
        runs.check_replaceable(str(tuned), "prune_export")
    runs.check_replaceable("new", "prune_export", [str(tuned)])


def test_paths_in_records_name_no_user(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere/alice")
    assert files.relative("/somewhere/alice/clue") == ".../clue" == files.relative(os.path.join("/home", "bob", "clue"))
    assert files.relative("/data/sets/clue") == ".../sets/clue"
    assert files.relative(os.path.join(ROOT, "demo", "x")) == "demo/x"


def test_a_finished_result_survives_a_kill_between_two_renames(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "a").write_text("")
    with pytest.raises(RuntimeError), files.whole_directory(str(tmp_path / "out")):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["a"]


def test_whole_directory_is_all_or_nothing(tmp_path):
    target = tmp_path / "out"
    with files.whole_directory(str(target)) as directory:
        open(os.path.join(directory, "a"), "w").close()
        assert not target.exists()
    with pytest.raises(RuntimeError), files.whole_directory(str(target)) as directory:
        open(os.path.join(directory, "b"), "w").close()
        raise RuntimeError
    assert os.listdir(target) == ["a"] and os.listdir(tmp_path) == ["out"]


def test_records_are_checked_and_name_no_machine(tuned, tmp_path, workspace):
    text = (tuned / "stage.json").read_text()
    assert str(workspace) not in text and os.path.expanduser("~") not in text and os.uname().nodename not in text
    broken = json.loads(text)
    del broken["labels"]
    (tmp_path / "stage.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match="field 'labels' is missing"):
        records.read_record(str(tmp_path))
    (tmp_path / "stage.json").write_text(text[:50])
    with pytest.raises(UserError, match="not JSON"):
        records.read_record(str(tmp_path))
    with pytest.raises(UserError, match="no such directory"):
        records.read_record(str(tmp_path / "none"))


def test_damaged_weights_are_refused(tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "m")
    with open(tmp_path / "m/model_state.pdparams", "r+b") as file:
        file.seek(5000)
        file.write(b"\0\1\2\3")
    with pytest.raises(UserError, match="missing, damaged"):
        checkpoints.load_classifier(str(tmp_path / "m"))


@pytest.fixture(scope="module")
def without_dropout(workspace, tuned, tmp_path_factory):
    """tiny.json and the fine-tuned model with dropout 0, and 57 train records: the last joint batch has one part only."""
    root = tmp_path_factory.mktemp("without_dropout")
    config = {
        **json.loads((workspace / "tiny.json").read_text()),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    (root / "tiny.json").write_text(json.dumps(config))
    shutil.copytree(tuned, root / "tuned")
    changed = json.loads((root / "tuned/config.json").read_text())
    (root / "tuned/config.json").write_text(
        json.dumps({**changed, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    changed = record(root / "tuned")
    del changed["files"]  # hashed anew
    records.write_record(str(root / "tuned"), changed)
    return root


@pytest.mark.parametrize("stage", ["finetune", "prune"])
def test_accumulated_batches_equal_one_batch(workspace, without_dropout, tmp_path, capsys, stage):
    """Batches of 24 against three of 8 each: of the last 9 records, one batch has 8 and one a single record."""
    common = ["--task_name", "topics", "--data_dir", workspace / "data", "--num_train_epochs", "2", "--save_steps", "4",
              "--max_train_samples", "57", "--max_eval_samples", "60", "--learning_rate", "5e-4", "--adam_epsilon", "1e-6",
              "--max_seq_length", "48", "--logging_steps", "1"]  # fmt: skip
    if stage == "finetune":
        script = load_script("finetuning", "run_clue")
        common += ["--init_config", without_dropout / "tiny.json", "--vocab_file", workspace / "vocab.txt"]
    else:
        script = load_script("pruning", "prune")
        common += ["--model_name_or_path", without_dropout / "tuned", "--width_mult_list", "0.5", "0.25"]
        common += ["--importance_samples", "20"]
    losses, plans = [], []
    for name, batch in (("one", ["24"]), ("three", ["8", "--gradient_accumulation_steps", "3"])):
        script.main([*map(str, common), "--output_dir", str(tmp_path / name), "--batch_size", *batch])
        printed = capsys.readouterr()
        losses.append([float(loss) for loss in re.findall(r"step \d+/6 loss (\S+)", printed.out + printed.err)])
        plans += re.findall("plan: .*", printed.out)
        assert stage == "prune" or re.search(r"^best_acc: 0\.\d+$", printed.out, re.M)
    assert "/ (8 x 3 accumulated) = 3 steps an epoch" in plans[1] and "/ 24 = 3 steps an epoch" in plans[0]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], abs=2e-4)
    best = "0.25/best_model" if stage == "prune" else ""
    a, b = (paddle.load(str(tmp_path / name / best / "model_state.pdparams")) for name in ("one", "three"))
    assert max(np.abs(a[k].numpy() - b[k].numpy()).max() for k in a) < 1e-5


def test_a_record_is_checked_before_the_training(tuned, tmp_path):
    """What a stage of one's own forgets is said at once, not after hours."""
    found = record(tuned)

    def begin(**changed):
        args = cli.Arguments(
            **{**found["arguments"], "output_dir": cli.PathArgument(tmp_path / "m"), "overwrite": False}
        )
        args.without_effect = {"overwrite"}
        fields = {name: found[name] for name in ("task", "labels", "objective", "data")}
        runs.ResumableRun("finetune", args, [str(tmp_path / "m")], **{**fields, **changed})

    begin()
    for changed, why in (
        ({"objective": {"name": "classification"}}, "field 'objective.metric' is missing"),
        ({"labels": ("a", "b")}, "field 'labels'"),
        ({"data": {}}, "field 'data.dev' is missing"),
        ({"params": "many"}, "field 'params'"),
        ({"mine": {1, 2}}, "not JSON"),
    ):
        with pytest.raises(UserError, match=why):
            begin(**changed)


def test_who_goes_on_with_other_code_is_told(tmp_path, capsys, monkeypatch):
    """By name, when the run is resumed, in the record of its result, and when the result is found finished."""
    code = {"finetuning/run_clue.py": "1", "common/training.py": "1", "only/then.py": "1"}
    monkeypatch.setattr(provenance, "code_of", lambda shared: dict(code))
    model = paddle.nn.Linear(2, 2)
    schedule = paddle.optimizer.lr.LambdaDecay(1.0, lambda step: 1.0)
    optimizer = paddle.optimizer.AdamW(schedule, parameters=model.parameters())
    fields = {"model": {"model_type": "x", "architecture": {}, "width_mult": 1.0, "initialized_from": "y"}}
    fields.update(params=None, flops=None, metrics={})
    with run_of(tmp_path / "out", a=1) as run:
        run.save_state(3, model, optimizer, {})
    assert "warning" not in capsys.readouterr().err
    code.update({"finetuning/run_clue.py": "2", "new.py": "1"})
    for step, expected in ((3, True), (4, False)):  # the second time the code is that of the state
        with run_of(tmp_path / "out", a=1) as run:
            assert run.restore(model, optimizer, schedule)["step"] == step
            said = capsys.readouterr().err
            warned = (
                "warning: finetuning/run_clue.py changed after step 3 of the training; to begin anew, remove" in said
            )
            assert warned == expected, said
            run.save_state(4, model, optimizer, {})
    with run_of(tmp_path / "out", a=1) as run:
        run.restore(model, optimizer, schedule)
        with run.output(str(tmp_path / "out"), weights=(), **fields):
            pass
    found = record(tmp_path / "out")
    assert found["notes"] == ["finetuning/run_clue.py changed after step 3 of the training"] and found["code"] == code
    capsys.readouterr()
    code["common/training.py"] = "2"
    with run_of(tmp_path / "out", a=1) as run:
        assert run.finished
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "made before common/training.py changed; --overwrite makes it anew" in said


def test_the_code_of_a_run_is_its_script_and_what_trains():
    script = os.path.join(ROOT, "finetuning", "run_clue.py")
    code = f"import json, sys, types; sys.path[:0] = [{ROOT!r}, {os.path.dirname(script)!r}]\nimport scoring\n"
    code += f"sys.modules['__main__'].__file__ = {script!r}\nfrom common import provenance, runs; print(json.dumps(provenance.code_of(runs.Run.shared_code)))"
    found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    wanted = ["common/batching.py", "common/objectives.py", "common/tokenization.py", "data.py"]
    assert sorted(found) == sorted([*wanted, "finetuning/run_clue.py", "finetuning/scoring.py"])
    assert all(digest == files.file_hash(os.path.join(ROOT, name)) for name, digest in found.items())


def test_an_absolute_path_is_shortened_in_records_whatever_its_argument_is():
    args = cli.Arguments(thresholds_file="/data/someone/deep/place", several=["/data/someone/a/b", "c"], text="a/b")
    described = cli.describe(args)
    assert described == {"several": [".../a/b", "c"], "text": "a/b", "thresholds_file": ".../deep/place"}


def test_an_unfinished_run_of_the_version_before_is_refused_and_kept(workspace, tmp_path):
    """Its state has another form; --objective, which that version did not have, was not given to either."""
    out = tmp_path / "m"
    command = finetune_command(workspace, out)
    run_clue = load_script("finetuning", "run_clue")
    args = run_clue.parse_args(command[1:])
    split = {name: data.md5_of(workspace / f"data/topics/{name}.json") for name in ("train", "dev")}
    before = provenance.identity(
        cli.describe(args), None, {n: {"md5": md5} for n, md5 in split.items()}, args.without_effect
    )
    del before["objective"]
    before["device"] = "cpu"  # as the training finds out
    state = tmp_path / "m.unfinished/state-20"
    state.mkdir(parents=True)
    (tmp_path / "m.unfinished/identity.json").write_text(json.dumps(before))
    best = {"accuracy": 0.5, "loss": 1.0, "step": 20, "directory": "best-20"}
    (state / "state.json").write_text(json.dumps({"step": 20, "seconds": 1.0, "best": best, "evaluations": []}))
    np.savez(state / "model.npz")
    np.savez(state / "optimizer.npz")
    with pytest.raises(UserError, match="m.unfinished: of an earlier version of this project; remove it"):
        run_clue.main(command[1:])
    assert state.is_dir()


@pytest.mark.parametrize("found", [float("nan"), None, "0.5"])
def test_a_metric_that_is_no_number_ends_the_training(found):
    with pytest.raises(UserError, match="spearman on dev is .* at step 5: an objective must give a finite number"):
        training.keep_best(None, {"evaluations": [], "best": {}}, 5, {"": {"spearman": found}}, "spearman", None, None)
