"""Power cuts: whatever was not synced may be lost; results and states are whole all the same.

A run writes on a file system that takes down every change (tests/forgetful.py). From what it took down, states are made
in which a disk may be after a cut, and the same command goes on from there. Needs root and /dev/fuse.
FAULTS=long (LONG=1 bash tests/faults.sh) cuts every stage 20 times; otherwise fine-tuning is cut once.
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from conftest import FAULTS
from forgetful import CannotMount, Disk, mounted
from kill_at import FORKS
from test_distillation import distillation  # noqa: F401
from test_faults import SEED, STAGES, Inputs, Stage, bulk_command, check_complete, one_thread, run, snapshot  # noqa: F401
from test_training import run_of

import outputs
from common import UserError, files, records, sources

CUTS = {None: 1, "short": 1, "long": 20}[FAULTS]  # of a stage, each with a run
STATES = {None: 100, "short": 100, "long": 2000}[FAULTS]  # of a disk after a cut, looked at without a stage
HOW = "at a random change of a file; of what was not synced, all, nothing or any part is lost; same command again"


@pytest.fixture
def on_disk(tmp_path):
    """on_disk(disk, function, *arguments): calls function(directory, *arguments), where the directory is the Disk."""

    def call(disk, function, *arguments):
        path = tmp_path / "disk"
        try:
            with mounted(path, disk):
                return function(path, *arguments)
        except CannotMount as error:
            return pytest.skip(f"a file system that forgets needs root and /dev/fuse ({error})")

    return call


def in_process(function, *arguments):
    process = FORKS.Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def killed_at(number, function, *arguments):
    """Calls a function in a process that is killed at its number-th change of a name."""
    pid = os.fork()
    if not pid:
        changes = iter(range(1, number))

        def watch(event, _):
            if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") and next(changes, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        function(*arguments)
        os._exit(0)
    os.waitpid(pid, 0)


def say_done(path, version):
    """Puts it into the log of the disk that a version is complete."""
    os.path.exists(os.path.join(path, f"done-{version}"))


def states(disk, place, count=STATES):
    """Yields (the last version that was said to be done, directory) for states of a disk after a cut at random moments."""
    rng = random.Random(SEED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # takes the most time, and the power of that directory is not cut
        for _ in range(count):
            moment = rng.randint(0, len(disk.log))
            done = [name for kind, name, *_ in disk.log[:moment] if kind == "look" and name.startswith("done-")]
            disk.after_cut(moment, rng).write_to(place)
            yield int(done[-1][5:]) if done else 0, str(place)
            shutil.rmtree(place)


# Directories


def write_version(target, version):
    with files.whole_directory(target) as directory:
        for name in ("weights", "more/weights"):
            path = os.path.join(directory, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                for _ in range(3):
                    file.write(b"%d " % version * 3000)
                    file.flush()
        files.write_json(os.path.join(directory, "stage.json"), {"version": version})


def version_of(target):
    """The version that lies there, 0 if there is none. Raises: an error if it is not whole."""
    if not os.path.exists(target):
        return 0
    version = files.read_json(os.path.join(target, "stage.json"))["version"]
    for name in ("weights", "more/weights"):
        with open(os.path.join(target, name), "rb") as file:
            assert file.read() == b"%d " % version * 9000, name
    return version


def write_versions(path, syncs):
    """Writes a directory again and again; between two versions, one that is killed at each of its changes."""
    if not syncs:
        files.sync = lambda path: None
    target, version = os.path.join(path, "new", "out"), 0
    for number, clear in itertools.product(range(12), (False, True)):
        if number:
            version += 1
            killed_at(number, write_version, target, version)
        if clear:  # as the next run does if it finds its result there
            files.clear_leftovers(target)
        version += 1
        write_version(target, version)
        files.write_json(os.path.join(path, "best.json"), version)
        say_done(path, version)


def look_at_versions(disk, place):
    """How directories are after cuts: {whole, half, lost}, as far as it is found."""
    found = set()
    for done, state in states(disk, place):
        target = os.path.join(state, "new", "out")
        try:
            version_of(target)  # what a reader finds at once, if anything
            files.put_back(target)
            best = os.path.join(state, "best.json")
            is_there = version_of(target) >= done and (not done or files.read_json(best) >= done)
            found.add("whole" if is_there else "lost")
            write_version(target, 1000)
            assert version_of(target) == 1000 and os.listdir(os.path.join(state, "new")) == ["out"]
        except (AssertionError, OSError, UserError):
            found.add("half")
    return found


def test_whole_directory(on_disk, tmp_path, fault):
    """Written anew and killed on the way, again and again. A version that was complete is not lost."""
    disk = Disk()
    print(f"FAULTS_SEED={SEED}")
    on_disk(disk, lambda path: in_process(write_versions, str(path), True))
    assert look_at_versions(disk, tmp_path / "state") == {"whole"}
    fault("power cut: a directory that is replaced", HOW.split("; same")[0], STATES,
          "old or new, whole; once the writer has ended, the new one")  # fmt: skip


def test_without_sync(on_disk, tmp_path):
    """The file system finds what it is there to find: rename without sync leaves half a directory, or none."""
    disk = Disk()
    print(f"FAULTS_SEED={SEED}")
    on_disk(disk, lambda path: in_process(write_versions, str(path), False))
    assert look_at_versions(disk, tmp_path / "state") == {"whole", "half", "lost"}


def test_no_sync_of_directories(tmp_path, monkeypatch):
    """A file system that cannot sync directories says EINVAL; any other error is one."""
    (tmp_path / "file").write_text("a")
    for path, number, fails in ((tmp_path, 22, False), (tmp_path, 5, True), (tmp_path / "file", 22, True)):

        def fsync(_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)
        if fails:
            with pytest.raises(OSError):
                files.sync(path)
        else:
            files.sync(path)


def test_stopped_between_the_renames(tmp_path):
    """A reader says where the last result is; the next run of a stage puts it back."""
    out = tmp_path / "out"
    write_version(out, 1)
    out.rename(tmp_path / ".out.old")
    with pytest.raises(UserError, match=r"out: no such directory; .*stopped while it replaced it: .*/\.out\.old"):
        records.read_record(str(out))
    with pytest.raises(UserError, match="stage.json"):  # found, and not what a stage wrote
        run_of(out, a=1).has_finished(str(out))
    assert version_of(out) == 1 and os.listdir(tmp_path) == ["out"]


# States of a training


def train(out, a):
    """A training that saves three states, each with a checkpoint, and has no result yet."""
    with run_of(out, overwrite=True, a=a) as run:
        model = paddle.nn.Linear(2, 2)
        optimizer = paddle.optimizer.AdamW(parameters=model.parameters())
        for step in (1, 2, 3):
            with run.checkpoint(f"checkpoint-{step}") as directory:
                files.write_json(os.path.join(directory, "a.json"), a)
            run.save_state(step, model, optimizer, {"a": a, "checkpoint": f"checkpoint-{step}"}, [f"checkpoint-{step}"])


def train_again(path):
    """Two trainings of different arguments take each other's place, and are killed."""
    for number in range(3, 60, 1 if FAULTS == "long" else 9):
        for a in (1, 2):
            killed_at(number, train, os.path.join(path, "out"), a)
    train(os.path.join(path, "out"), 1)
    say_done(path, 1)


def test_states(on_disk, tmp_path, fault):
    """Whatever state is found, it is whole, has its checkpoint, and is that of the run that finds it."""
    disk, found = Disk(), {1: 0, 2: 0}
    print(f"FAULTS_SEED={SEED}")
    on_disk(disk, lambda path: in_process(train_again, str(path)))
    for done, state in states(disk, tmp_path / "state"):
        for a in (1, 2):
            with contextlib.suppress(UserError), run_of(os.path.join(state, "out"), a=a) as run:
                newest = run.newest_state()
                assert newest or not done
                if newest:
                    check_states(Path(run.work))
                    saved = files.read_json(os.path.join(newest, "state.json"))
                    assert saved["a"] == a == files.read_json(run.path(f"{saved['checkpoint']}/a.json"))
                    found[a] += 1
    assert all(found.values())
    fault("power cut: states of a training that takes the place of another", HOW.split("; same")[0], STATES,
          "a state is whole, has its checkpoint, and goes on only in its own training")  # fmt: skip


# Answers to a file of texts


def answer(titles, output, model):
    """As infer.py --output does, with a checkpoint after each window, and answers that need no model."""
    outputs.CHECKPOINT_SECONDS = 0
    with sources.Source(titles, "topics", lambda task, row: (row["text"], None)) as source:
        run = {"model": model, "input": titles}
        with outputs.Written(output, run, b"of %s\n" % model.encode(), source.beginning, True, True) as written:
            if not written.finished:
                source.seek(written.done.position)
                for window in source.windows(4):
                    written.write(b"".join(b"%s %d\n" % (model.encode(), row.line) for row in window.rows), window)
                written.finish()


def answer_again(path, titles):
    """Answers of one model, killed, then of another one, killed, and then finished; and so on."""
    output = os.path.join(path, "answers.txt")
    for number in range(2, 20, 2):
        for model in ("a", str(number)):
            killed_at(number, answer, titles, output, model)
        answer(titles, output, str(number))
        say_done(path, number)


def test_answers(on_disk, tmp_path, fault):
    titles = tmp_path / "titles.txt"
    titles.write_text("".join(f"{i}\n" for i in range(30)))
    disk = Disk()
    print(f"FAULTS_SEED={SEED}")
    on_disk(disk, lambda path: in_process(answer_again, str(path), str(titles)))

    def answers(model):
        return f"of {model}\n" + "".join(f"{model} {i}\n" for i in range(1, 31))

    for place, (done, state) in enumerate(states(disk, tmp_path / "state")):
        output = Path(state, "answers.txt")
        if output.exists() or done:
            assert output.read_text() in [answers(number) for number in range(done, 20)]
        model = ("a", str(done or 2), str(done + 2))[place % 3]
        answer(str(titles), str(output), model)
        assert output.read_text() == answers(model)
        assert sorted(os.listdir(state)) == ["answers.txt", "answers.txt.run.json"]
    fault(
        "power cut: answers to a file",
        HOW,
        STATES,
        "output as if undisturbed, bit for bit; in between it was not there",
    )


# Stages


def bulk(inputs, out):
    return bulk_command(inputs.workspace, inputs.tuned, out)


EVERYTHING = {**STAGES, "bulk classification": Stage(bulk, "", "")}


def check_states(directory):
    """Whatever looks like a state of a training is whole. Returns: whether there is one."""
    found = [path for path in directory.rglob("state-*") if path.name[6:].isdigit() and path.parent.name[0] != "."]
    for path in found:
        json.loads((path / "state.json").read_bytes())
        for name in ("model.npz", "optimizer.npz"):
            with np.load(path / name) as arrays:
                assert all(arrays[key].size for key in arrays.files)
    return bool(found)


def result(directory):
    """As snapshot, without the record of infer.py --output, which has times."""
    return {path: content for path, content in snapshot(directory).items() if not path.endswith(".run.json")}


@pytest.mark.parametrize("name", EVERYTHING if FAULTS == "long" else ["fine-tuning"])
def test_stage(name, workspace, request, on_disk, tmp_path, fault):
    needed = ("distillation", "tuned", "pruned", "quantized") if FAULTS == "long" else ()
    inputs = Inputs(workspace, *map(request.getfixturevalue, needed), *[None] * (4 - len(needed)))
    if name == "export to serving":
        pytest.importorskip("paddle_serving_app", reason="needs Paddle Serving: bash setup_env.sh --serving")
    stage, rng, whole, state = EVERYTHING[name], random.Random(f"{name} {SEED}"), tmp_path / "whole", tmp_path / "state"
    print(f"FAULTS_SEED={SEED}")

    def go_on(path):
        begun = check_states(path)
        said = run(stage.command(inputs, path)).stdout
        assert not begun or re.search("going on after step|already finished", said), said

    undisturbed, prepared = Disk(), tmp_path / "prepared"
    prepared.mkdir()
    stage.command(inputs, prepared)  # copies there what the stage works on, if anything
    undisturbed.read_from(prepared)
    on_disk(undisturbed, go_on)
    disk = undisturbed
    undisturbed.write_to(whole)
    expected = result(whole)
    for _ in range(CUTS):
        # The undisturbed run is cut, or the one that went on after the last cut.
        disk = rng.choice((undisturbed, disk))
        disk = disk.after_cut(rng.randint(0, len(disk.log)), rng)
        disk.write_to(state)
        check_complete(state, whole)
        shutil.rmtree(state)
        on_disk(disk, go_on)
        disk.write_to(state)
        assert result(state) == expected
        shutil.rmtree(state)
    for _, _ in states(undisturbed, state, STATES // 10):
        check_states(state)
    fault(f"{name}: power cut", HOW, CUTS, "ended as if undisturbed, bit for bit; no incomplete directory or state was "
          "accepted in between")  # fmt: skip
