"""Two nodes (two launches on 127.0.0.1) against one process; kills of processes, launchers and nodes; refusals.

Fine-tuning is killed once; with FAULTS=long, each of the three trainings is killed 20 times.
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
import psutil
import pytest
from conftest import FAULTS, ROOT, load_script, record
from nodes import Nodes, free_port
from test_distillation import SCRIPT as DISTIL
from test_distillation import distillation  # noqa: F401
from test_faults import SEED, snapshot
from test_training import finetune_command, finish, without_dropout  # noqa: F401

import corpus as corpora
from common import UserError, processes, watchdog

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
        outputs = [["--output_dir", killed], ["--output_dir", tmp_path / "second"]]  # no common disk
        victim, node = rng.choice(["rank", "launcher", "node"]), rng.randrange(2)
        with Nodes(command, tmp_path / f"logs{turn}", outputs) as nodes:
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
        with Nodes(command, tmp_path / f"logs{turn}again", outputs) as nodes:
            nodes.finish()
            assert nodes.statuses() == [0, 0], where + nodes.all_logs()
            assert not begun or re.search("going on after step|already finished", nodes.log(0)), nodes.log(0)
        assert snapshot(killed) == snapshot(whole), where
        assert not list(tmp_path.glob("*second*")), where  # the first one alone writes
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


def test_other_files_are_refused(distillation, workspace, tmp_path):  # noqa: F811
    """A teacher with other weights and another vocabulary, in a directory of the same name: nothing is written."""
    root, arguments = distillation
    second = tmp_path / root.name  # what is recorded of a path are its last two parts
    for name in ("teacher", "corpus"):
        shutil.copytree(root / name, second / name)
    words = (workspace / "vocab.txt").read_text(encoding="utf-8").split()
    words[-2:] = reversed(words[-2:])
    (second / "teacher/vocab.txt").write_text("\n".join(words), encoding="utf-8")
    changed = paddle.load(str(second / "teacher/model_state.pdparams"))
    next(iter(changed.values()))[0] += 1
    paddle.save(changed, str(second / "teacher/model_state.pdparams"))
    both = [DISTIL, *arguments, "--output_dir", tmp_path / "out"]
    # The directories of the first node are found from where it runs, those of the second one from elsewhere.
    relative = ["--teacher_model_name_or_path", "teacher", "--vocab_file", "teacher/vocab.txt", "--input_dir", "corpus"]
    with Nodes([*both, *relative], tmp_path / "a", places=(root, second)) as nodes:
        line = refused(nodes)
        assert "rank 1 (on " in line and " differs from rank 0: " in line
        assert "teacher: " in line and "vocabulary: " in line
    assert not (tmp_path / "out").exists() and not any((tmp_path / "out.unfinished").glob("*"))


def test_what_differs_between_processes_is_named(distillation, workspace, tmp_path, monkeypatch):  # noqa: F811
    """What a run compares of a second process: its corpus, its arguments, its code."""
    _root, arguments = distillation
    gathered = []
    monkeypatch.setattr(processes, "check_same", lambda made_from: gathered.append(made_from()))
    script = load_script("general_distill", "general_distill")
    script.main([*map(str, arguments), "--max_steps", "1", "--output_dir", str(tmp_path / "out")])
    first = next(value for value in gathered if "md5 of corpus" in value)
    monkeypatch.undo()
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "first:1,second:2")
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    for name in ("md5 of corpus", "learning_rate", "common/watchdog.py", "data.py", "Paddle"):
        monkeypatch.setattr(processes, "gather", lambda value, name=name: [value, {**value, name: "other"}])
        found = f"rank 1 \\(on second\\) differs from rank 0: {name}: other instead of {first[name]};"
        with pytest.raises(UserError, match=found):
            processes.check_same(lambda: first)


def test_a_mistake_on_one_node_ends_both(workspace, tmp_path):
    """As it is said there, and without the advice to run the same command again."""
    command = finetune_command(workspace, tmp_path / "out")
    with Nodes(command, tmp_path / "logs", [(), ["--data_dir", tmp_path / "none"]]) as nodes:
        nodes.finish(ENDS_WITHIN)
        lines = [[line for line in nodes.log(node).splitlines() if ": error: " in line] for node in range(2)]
        assert [len(found) for found in lines] == [1, 1] and 0 not in nodes.statuses(), nodes.all_logs()
        why = lines[1][0].partition(": error: ")[2]
        assert (
            lines[0][0].startswith("run_clue.py: error: rank 1 (on ") and f"): {why}; all processes end" in lines[0][0]
        )
        assert "same command" not in lines[0][0]


def test_files_are_assigned():
    """Each file to one of the processes that have it, by bytes; the same name with other content is another file."""
    files = {
        name: {"file": name, "sha256": f"hash of {name}", "bytes": size}
        for name, size in zip("abcde", (50, 30, 20, 9, 9))
    }
    everywhere = list(files.values())
    names = lambda shares: ["".join(described["file"] for described in share) for share in shares]  # noqa: E731
    assert names(corpora.assign_files([everywhere] * 2)) == ["ad", "bce"]
    assert names(corpora.assign_files([everywhere] * 6)) == ["a", "b", "c", "d", "e", ""]
    # Two machines with a disk of their own and two processes each: d is on both.
    first, second = [files["a"], files["d"]], [files["b"], files["c"], files["d"], files["e"]]
    assert names(corpora.assign_files([first, first, second, second])) == ["a", "d", "b", "ce"]
    # What only one machine has is not crowded out by what it shares.
    assert names(corpora.assign_files([[files["a"], files["e"]], [files["a"]]])) == ["e", "a"]
    other = {**files["a"], "sha256": "another"}
    assert names(corpora.assign_files([[files["a"]], [other]])) == ["a", "a"]


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
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "first:1,first:2,second:3,second:4")
    with pytest.raises(UserError, match=r"rank 3 \(on second\) gets no file: 3 files for 4 processes; split the text"):
        corpora.Corpus(str(root / "corpus"), 1, is_sharded=True)


class Beside:
    """A process that sleeps, with its watchdog. Args: limits: of watchdog.py, lower than they are."""

    def __init__(self, rank, port, process=None, launcher=None, **limits):
        self.process = subprocess.Popen(["sleep", "100"])
        settings = "".join(f"watchdog.{name} = {value}; " for name, value in limits.items())
        numbers = f"{rank}, {process or self.process.pid}, {launcher or os.getpid()}"
        start = f"watchdog.Watchdog({numbers}, 'train.py', ['127.0.0.1:{port}'] * 2).run()"
        code = (
            f"import sys; sys.path.append({os.path.dirname(watchdog.__file__)!r}); import watchdog; {settings}{start}"
        )
        self.watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def is_connected(self):
        connections = psutil.Process(self.watchdog.pid).net_connections()
        return any(connection.status == psutil.CONN_ESTABLISHED for connection in connections)

    def end(self, message=None):
        """As cli.run tells it; None: as kill -9 does."""
        self.process.kill()
        if message is not None:
            self.watchdog.stdin.write(f"{message}\n")
        self.watchdog.stdin.close()

    def said(self):
        """What it printed, once it has ended."""
        said = self.watchdog.stderr.read()
        self.watchdog.wait(10)
        return said

    def is_killed(self):
        return self.process.wait(10) == -signal.SIGKILL


@pytest.fixture
def pair():
    """Starts two processes with watchdogs that know each other."""
    started = []

    def start(**limits):
        port = free_port()
        started.extend(Beside(rank, port, **limits) for rank in range(2))
        until = time.monotonic() + 20
        while not all(beside.is_connected() for beside in started):
            assert time.monotonic() < until
            time.sleep(0.05)
        return started

    yield start
    for beside in started:
        beside.process.kill()
        beside.watchdog.kill()


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("message, why", [(None, "has ended before the others"), ("no such file", "no such file")])
def test_a_process_that_ends_early_ends_the_other(pair, lost, message, why):
    both = pair(HEARTBEAT_INTERVAL=0.2)
    both[lost].end(message)
    line = f"train.py: error: rank {lost} (on 127.0.0.1): {why}; all processes end"
    said = both[1 - lost].said()
    assert said.startswith(line) and both[1 - lost].is_killed()
    # To run the same command again does not mend a mistake.
    assert ("run the same command" in said) == (message is None)
    assert both[lost].said().startswith(line) != (message is not None)  # which it has printed itself


def test_a_silent_process_ends_the_other(pair):
    first, second = pair(HEARTBEAT_INTERVAL=0.2, HEARTBEAT_TIMEOUT=1)
    second.watchdog.send_signal(signal.SIGSTOP)  # as a machine without power: its connections stay open
    assert "rank 1 (on 127.0.0.1): has not answered for 1 s" in first.said() and first.is_killed()


def test_a_process_that_does_not_come_ends_the_other():
    for rank, why in (
        (0, "rank 1 (on 127.0.0.1): has not come within 1 s"),
        (1, "rank 0 (on 127.0.0.1): does not answer"),
    ):
        alone = Beside(rank, free_port(), HEARTBEAT_INTERVAL=0.2, JOIN_TIMEOUT=1)
        assert why in alone.said() and alone.is_killed()


def test_processes_that_are_done_end_nothing(pair):
    first, second = pair(HEARTBEAT_INTERVAL=0.2)
    second.end("done")
    assert second.said() == ""
    time.sleep(0.5)
    assert first.watchdog.poll() is None and first.process.poll() is None
    first.end("done")
    assert first.said() == ""


def test_a_loss_that_all_have_noticed_is_said_once(pair):
    """A process that fails in the same way, such as with a loss of NaN, prints its own line and no other."""
    first, second = pair(HEARTBEAT_INTERVAL=1)
    second.end("the loss is nan")
    first.end("the loss is nan")
    assert first.said() == second.said() == ""


def test_a_port_that_another_program_has_taken_is_left_to_it(pair):
    """Both try the next ones. What the other program sends, and a watchdog of another training, end nothing."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        both = [Beside(rank, port, HEARTBEAT_INTERVAL=0.2) for rank in range(2)]
        try:
            connection, _ = taken.accept()  # of the second one, which gets no welcome
            connection.sendall(b"hello\n")
            until = time.monotonic() + 20
            while not both[0].is_connected():
                assert time.monotonic() < until
                time.sleep(0.05)
            with socket.create_connection(("127.0.0.1", port + 1)) as stranger:
                stranger.sendall(b"rank 1 of another training\nlost 1 nothing\n")
                time.sleep(0.5)
            assert [beside.watchdog.poll() for beside in both] == [None, None]
            both[1].end()
            assert "rank 1 (on 127.0.0.1): has ended before the others" in both[0].said()
        finally:
            for beside in both:
                beside.process.kill()
                beside.watchdog.kill()


def test_a_process_that_hangs_at_its_end_is_killed(pair):
    first, second = pair(HEARTBEAT_INTERVAL=0.2, EXIT_TIMEOUT=1)
    first.watchdog.stdin.write("done\n")  # and goes on sleeping
    first.watchdog.stdin.close()
    assert first.is_killed() and first.said() == "" and second.process.poll() is None


def test_the_end_of_the_launcher_ends_all():
    launcher = subprocess.Popen([sys.executable, "-c", "import subprocess; print(subprocess.Popen(['sleep', '99'], stdout=-3).pid)"],
                                stdout=subprocess.PIPE, text=True)  # fmt: skip
    orphan = int(launcher.communicate()[0])
    lonely = Beside(0, free_port(), process=orphan, launcher=launcher.pid, HEARTBEAT_INTERVAL=0.2)
    assert "rank 0 (on 127.0.0.1): has ended, because its launcher has" in lonely.said()
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(FAULTS != "long", reason="a minute: bash tests/faults.sh")
def test_what_two_processes_send(tmp_path):
    """deploy/benchmark/scaling.py counts it: each sends the gradient, 4 bytes x parameters, once per step."""
    config = os.path.join(ROOT, "configs/student-2l-128h.json")
    few = ["--rounds", "1", "--steps", "3", "--configs", config, "--teacher_layers", "2", "--output_dir", str(tmp_path)]
    load_script("deploy/benchmark", "scaling").main(few)
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [row["processes"] for row in rows] == [1, 2] * 2
    parameters = 3.173e6  # of that student, with the benchmark's vocabulary of 20,997 tokens
    for row in rows:
        assert row["megabytes_per_step"] == pytest.approx(
            2 * 4 * parameters / 1e6 * (row["processes"] - 1), rel=0.02, abs=0.1
        )
