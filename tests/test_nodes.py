"""Two nodes (two launches on 127.0.0.1) against one process; kills of processes, launchers and nodes; refusals.

Once; FAULTS=long kills 20 times in each of the three trainings.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import paddle
import pytest
from conftest import FAULTS, ROOT, load_script, record
from nodes import Nodes, free_port
from test_distillation import SCRIPT as DISTIL
from test_distillation import distillation  # noqa: F401
from test_faults import SEED, snapshot
from test_training import finish, without_dropout  # noqa: F401

import corpus as corpora
from common import UserError, processes, watch

KILLS = {None: 1, "short": 1, "long": 20}[FAULTS]
ENDS_WITHIN = 60  # seconds


def weights(directory):
    return {name: value.numpy() for name, value in paddle.load(str(directory / "model_state.pdparams")).items()}


@pytest.fixture(scope="module")
def commands(workspace, without_dropout, distillation):  # noqa: F811
    """{stage: (command for one process, what makes it one of two processes, result below --output_dir)}"""
    # 57 records in joint batches of 24: the last one, of 9, has a part for the first process only.
    common = ["--task_name", "topics", "--data_dir", workspace / "data", "--num_train_epochs", "2", "--save_steps", "2",
              "--max_train_samples", "57", "--max_eval_samples", "60", "--learning_rate", "5e-4", "--adam_epsilon", "1e-6",
              "--max_seq_length", "48", "--logging_steps", "1", "--batch_size", "24"]  # fmt: skip
    tune = [os.path.join(ROOT, "finetuning/run_clue.py"), "--init_config", without_dropout / "tiny.json",
            "--vocab_file", workspace / "vocab.txt"]  # fmt: skip
    prune = [os.path.join(ROOT, "pruning/prune.py"), "--model_name_or_path", without_dropout / "tuned",
             "--width_mult_list", "0.5", "--importance_samples", "20"]  # fmt: skip
    # A step small enough that Adam does not magnify the last bit of gradients that are nearly zero.
    distil = [DISTIL, *distillation[1], "--learning_rate", "5e-4", "--adam_epsilon", "1e-6", "--max_steps", "12",
              "--save_steps", "3", "--logging_steps", "1"]  # fmt: skip
    return {
        "fine-tuning": ([*tune, *common], ["--batch_size", "12"], ""),
        "pruning": ([*prune, *common], ["--batch_size", "12"], "0.5/best_model"),
        "distillation": (
            [*distil, "--gradient_accumulation_steps", "2"],
            ["--gradient_accumulation_steps", "1"],
            "model_12",
        ),
    }


@pytest.fixture(scope="module", params=["fine-tuning", "pruning", "distillation"])
def on_two_nodes(request, commands, tmp_path_factory):
    """(stage, command of two nodes, directory of their undisturbed result, logs)"""
    one, changed, _ = commands[request.param]
    directory, command = tmp_path_factory.mktemp("two"), [*one, *changed]
    with Nodes([*command, "--output_dir", directory / "out"], directory / "logs") as nodes:
        nodes.finish()
        assert nodes.statuses() == [0, 0], nodes.all_logs()
        return request.param, command, directory / "out", [nodes.log(node) for node in range(2)]


def test_two_nodes_equal_one_process_on_the_joint_batch(on_two_nodes, commands, tmp_path):
    stage, _, two, (first, second) = on_two_nodes
    one_process, _, result = commands[stage]
    finish([*map(str, one_process), "--output_dir", str(tmp_path / "one")])
    one, two = tmp_path / "one" / result, two / result
    a, b = weights(one), weights(two)
    assert max(np.abs(a[name] - b[name]).max() for name in a) < 1e-5
    assert record(one)["metrics"]["loss"] == pytest.approx(record(two)["metrics"]["loss"], abs=1e-5)
    losses = [re.findall(r"^step (\d+)/\d+ loss (\S+)", text, re.M) for text in (first, second)]
    assert len(losses[0]) >= 6 and not losses[1]
    # Only the first one speaks.
    words = ("taken over", "starting from", "ranking", "before training", "plan:", "step ", "loss", "->")
    assert [word for word in words if word in first] and not [word for word in words if word in second], second


def test_killed(on_two_nodes, tmp_path, fault):
    """A process, a launcher or a node, of the first or the second; then the same command on both again."""
    stage, command, whole, _ = on_two_nodes
    if stage != "fine-tuning" and not FAULTS:
        pytest.skip("half a minute for each stage: bash tests/faults.sh")
    rng, slowest = random.Random(f"nodes {stage} {SEED}"), 0.0
    print(f"FAULTS_SEED={SEED}")
    for turn in range(KILLS):
        killed = tmp_path / f"killed{turn}"
        victim, node = rng.choice(["rank", "launcher", "node"]), rng.randrange(2)
        with Nodes([*command, "--output_dir", killed], tmp_path / f"logs{turn}") as nodes:
            # While the processes start and find each other (only where there is time), or after some step.
            nodes.wait_for_processes()
            if FAULTS == "long" and rng.random() < 0.3:
                time.sleep(rng.uniform(0, 8))
            else:
                nodes.wait_for_line(f"step {rng.randrange(1, 6)}/")
                time.sleep(rng.uniform(0, 0.2))
            nodes.kill(victim, node)
            seconds = nodes.finish(ENDS_WITHIN + 30)
            where = f"{victim} {node}, turn {turn}, {seconds:.0f} s\n{nodes.all_logs()}"
            assert seconds < ENDS_WITHIN, where
            survivor = nodes.log(1 - node)
            lines = [line for line in survivor.splitlines() if ": error: " in line]
            assert "Traceback" not in survivor, where
            if nodes.statuses()[1 - node] != 0:  # it was not at its end already
                assert len(lines) == 1 and f"rank {node} (on " in lines[0], where
        slowest = max(slowest, seconds)
        begun = any((tmp_path / f"killed{turn}.unfinished").glob("state-*"))
        with Nodes([*command, "--output_dir", killed], tmp_path / f"logs{turn}again") as nodes:
            nodes.finish()
            assert nodes.statuses() == [0, 0], where + nodes.all_logs()
            assert not begun or re.search("going on after step|already finished", nodes.log(0)), nodes.log(0)
        assert snapshot(killed) == snapshot(whole), where
        shutil.rmtree(killed)
    fault(f"{stage} on two nodes: kill -9", "of a process, a launcher or a whole node, at any time; same command again",
          KILLS, f"all processes ended within {slowest:.0f} s, with one line naming the rank; then as if undisturbed, bit for bit")  # fmt: skip


def refused(nodes):
    """The line with which both nodes refuse."""
    nodes.finish()
    lines = [[line for line in nodes.log(node).splitlines() if ": error: " in line] for node in range(2)]
    assert lines[0] == lines[1] and len(lines[0]) == 1 and "Traceback" not in nodes.log(0) + nodes.log(1), (
        nodes.all_logs()
    )
    assert 0 not in nodes.statuses()
    return lines[0][0]


def test_another_vocabulary_or_corpus_is_refused(distillation, workspace, tmp_path):  # noqa: F811
    """Both at once, and in the names of files: nothing is written by anyone."""
    root, arguments = distillation
    shutil.copytree(root / "teacher", tmp_path / "teacher")
    words = (workspace / "vocab.txt").read_text(encoding="utf-8").split()
    words[-2:] = reversed(words[-2:])
    (tmp_path / "teacher/vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    shutil.copytree(root / "corpus", tmp_path / "corpus")
    with open(tmp_path / "corpus/1.txt", "a", encoding="utf-8") as file:
        file.write("\n多一行")
    of_second = ["--teacher_model_name_or_path", tmp_path / "teacher", "--vocab_file", tmp_path / "vocab.txt"]
    both = [DISTIL, *arguments, "--output_dir", tmp_path / "out"]
    with Nodes(both, tmp_path / "a", [(), [*of_second, "--input_dir", tmp_path / "corpus"]]) as nodes:
        line = refused(nodes)
    assert "rank 1 (on " in line and "differs from rank 0: md5 of corpus: " in line and "vocab_file: " in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()


def test_files_are_dealt():
    """Each file to one of the processes that have it, by bytes; the same name with other content is another file."""
    files = {
        name: {"file": name, "sha256": f"hash of {name}", "bytes": size}
        for name, size in zip("abcde", (50, 30, 20, 9, 9))
    }
    everywhere = list(files.values())
    names = lambda shares: ["".join(described["file"] for described in share) for share in shares]  # noqa: E731
    assert names(corpora.deal([everywhere] * 2)) == ["ad", "bce"]
    assert names(corpora.deal([everywhere] * 6)) == ["a", "b", "c", "d", "e", ""]
    # Two machines with a disk of their own and two processes each: d is on both.
    first, second = [files["a"], files["d"]], [files["b"], files["c"], files["d"], files["e"]]
    assert names(corpora.deal([first, first, second, second])) == ["a", "d", "b", "ce"]
    other = {**files["a"], "sha256": "another"}
    assert names(corpora.deal([[files["a"]], [other]])) == ["a", "a"]


def test_each_node_reads_only_its_files(distillation, tmp_path):  # noqa: F811
    """Directories with different files, against one process that takes micro-batches of the two in turn."""
    root, arguments = distillation
    directories = [tmp_path / "first", tmp_path / "second"]
    for directory, names in zip(directories, (["0.txt"], ["1.txt", "2.txt"])):
        directory.mkdir()
        for name in names:
            shutil.copy(root / "corpus" / name, directory)
    command = [*arguments, "--learning_rate", "5e-4", "--adam_epsilon", "1e-6", "--max_steps", "-1", "--num_train_epochs", "1",
               "--save_steps", "30"]  # fmt: skip
    of_node = [["--input_dir", directory] for directory in directories]
    with Nodes(
        [DISTIL, *command, "--shard_corpus", "--output_dir", tmp_path / "two"], tmp_path / "logs", of_node
    ) as nodes:
        nodes.finish()
        assert nodes.statuses() == [0, 0], nodes.all_logs()
    # 40 lines of the first, 41 + 42 of the second, in micro-batches of 4: (10 + 21) / 2 steps.
    described = record(tmp_path / "two/model_15")["data"]["corpus"]["shards"]
    assert [(row["file"], row["rank"]) for row in described] == [("0.txt", 0), ("1.txt", 1), ("2.txt", 1)]

    def in_turn(self, batch_size, skip=0, group_by_length=False):
        streams = [
            corpora.Corpus(str(directory), self.seed).batches(batch_size, skip // 2) for directory in directories
        ]
        while True:
            yield from map(next, streams)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora.Corpus, "batches_of_process", in_turn)
        one = [*command, "--max_steps", "15", "--gradient_accumulation_steps", "2", "--output_dir", tmp_path / "one"]
        load_script("general_distill", "general_distill").main(list(map(str, one)))
    a, b = weights(tmp_path / "one/model_15"), weights(tmp_path / "two/model_15")
    assert max(np.abs(a[name] - b[name]).max() for name in a) < 1e-5


def test_a_process_without_a_file_is_refused(distillation, monkeypatch):  # noqa: F811
    root, _ = distillation
    monkeypatch.setattr(processes, "gather", lambda listing: [listing] * 4)
    with pytest.raises(UserError, match="rank 3 gets no file: 3 files for 4 processes; split the text"):
        corpora.Corpus(str(root / "corpus"), 1, is_dealt=True)


class Beside:
    """A process that sleeps, with its companion. Args: limits: of watch.py, lower than they are."""

    def __init__(self, rank, port, **limits):
        self.process = subprocess.Popen(["sleep", "100"])
        settings = "".join(f"watch.{name} = {value}; " for name, value in limits.items())
        start = f"watch.Watch({rank}, {self.process.pid}, {os.getpid()}, 'train.py', ['127.0.0.1:{port}'] * 2).run()"
        code = f"import sys; sys.path.append({os.path.dirname(watch.__file__)!r}); import watch; {settings}{start}"
        self.companion = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self, message=None):
        """As cli.run tells it; None: as kill -9 does."""
        self.process.kill()
        if message is not None:
            self.companion.stdin.write(f"{message}\n")
        self.companion.stdin.close()

    def said(self):
        """What it printed, once it has ended."""
        said = self.companion.stderr.read()
        self.companion.wait(10)
        return said

    def is_killed(self):
        return self.process.wait(10) == -signal.SIGKILL


@pytest.fixture
def pair():
    """Starts two processes with companions that know each other."""
    started = []

    def start(**limits):
        port = free_port()
        started.extend(Beside(rank, port, **limits) for rank in range(2))
        time.sleep(0.7)
        return started

    yield start
    for beside in started:
        beside.process.kill()
        beside.companion.kill()


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("message, why", [(None, "has ended before the others"), ("no such file", "no such file")])
def test_a_process_that_ends_early_ends_the_other(pair, lost, message, why):
    both = pair(BEAT=0.2)
    both[lost].end(message)
    line = f"train.py: error: rank {lost} (on 127.0.0.1): {why}; all processes end. Run the same command on every machine again"
    assert both[1 - lost].said().startswith(line) and both[1 - lost].is_killed()
    assert both[lost].said().startswith(line) != (message is not None)  # which it has printed itself


def test_a_silent_process_ends_the_other(pair):
    first, second = pair(BEAT=0.2, SILENCE=1)
    second.companion.send_signal(signal.SIGSTOP)  # as a machine without power: its connections stay open
    assert "rank 1 (on 127.0.0.1): has not answered for 1 s" in first.said() and first.is_killed()


def test_a_process_that_does_not_come_ends_the_other():
    for rank, why in (
        (0, "rank 1 (on 127.0.0.1): has not come within 1 s"),
        (1, "rank 0 (on 127.0.0.1): does not answer"),
    ):
        alone = Beside(rank, free_port(), BEAT=0.2, JOIN=1)
        assert why in alone.said() and alone.is_killed()


def test_processes_that_are_done_end_nothing(pair):
    first, second = pair(BEAT=0.2)
    second.end("done")
    assert second.said() == ""
    time.sleep(0.5)
    assert first.companion.poll() is None and first.process.poll() is None
    first.end("done")
    assert first.said() == ""


def test_a_loss_that_all_have_noticed_is_said_once(pair):
    """A process that fails in the same way, such as with a loss of NaN, prints its own line and no other."""
    first, second = pair(BEAT=1)
    second.end("the loss is nan")
    first.end("the loss is nan")
    assert first.said() == second.said() == ""


def test_a_port_in_use_is_named(pair):
    with socket.create_server(("", 0)) as taken:
        alone = Beside(0, taken.getsockname()[1])
        assert f"cannot listen at port {taken.getsockname()[1]} (Address already in use)" in alone.said()
        assert alone.is_killed()


@pytest.mark.skipif(FAULTS != "long", reason="a minute: bash tests/faults.sh")
def test_what_two_processes_send(tmp_path):
    """deploy/benchmark/scaling.py counts it: each sends the gradient, 4 bytes x parameters, once per step."""
    config = os.path.join(ROOT, "configs/student-2l-128h.json")
    few = ["--rounds", "1", "--steps", "3", "--configs", config, "--teacher_layers", "2", "--output_dir", str(tmp_path)]
    load_script("deploy/benchmark", "scaling").main(few)
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [row["processes"] for row in rows] == [1, 2] * 2
    parameters = 3.173e6  # of that student with the benchmark's vocabulary
    for row in rows:
        assert row["megabytes_per_step"] == pytest.approx(
            2 * 4 * parameters / 1e6 * (row["processes"] - 1), rel=0.02, abs=0.1
        )
