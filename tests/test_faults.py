"""Every stage killed with SIGKILL, started twice at once, on a full disk and on a read-only one.

Once each; FAULTS=long (LONG=1 bash tests/faults.sh) tries more.
"""

import contextlib
import hashlib
import json
import multiprocessing.forkserver
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from typing import NamedTuple

import pytest
from conftest import FAULTS, ROOT
from google.protobuf.message import DecodeError
from kill_at import FORKS, Run
from test_distillation import distillation  # noqa: F401
from test_training import finetune_command, prune_command

import dynabert
from common import UserError, checkpoints, exporting, records

SEED = int(os.environ.get("FAULTS_SEED", time.time_ns() % 1_000_000))  # of the moments; printed, to try them again
KILLS = {None: 1, "short": 1, "long": 20}[FAULTS]
FULL_DISKS = {None: 1, "short": 1, "long": 5}[FAULTS]
QUANTIZED = "int8.pdmodel"


def script(path, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split("\n"))]
    return [os.path.join(ROOT, path), *words]


class Inputs(NamedTuple):
    """What the stages read: fixtures."""

    workspace: object
    distillation: tuple
    tuned: object
    pruned: object
    quantized: object


def distil(inputs, out):
    return [
        *script("general_distill/general_distill.py", output_dir=out / "out"),
        *map(str, inputs.distillation[1]), *"--max_steps 12 --save_steps 4 --gradient_accumulation_steps 2".split(),
    ]  # fmt: skip


def fine_tune(inputs, out):
    return finetune_command(inputs.workspace, out / "out", *"--max_steps 20 --save_steps 4".split())


def export(inputs, out):
    if not (out / "model").exists():
        shutil.copytree(inputs.tuned, out / "model", ignore=shutil.ignore_patterns("inference.*"))
        record = records.read_record(str(out / "model"))
        del record["export"]
        records.write_record(str(out / "model"), record)
    options = {"task_name": "topics", "model_path": out / "model", "data_dir": inputs.workspace / "data"}
    return script("finetuning/export_model.py", **options)


def prune(inputs, out):
    return [*prune_command(inputs.workspace, inputs.tuned, out / "out"), *"--max_steps 12 --save_steps 4".split()]


def export_pruned(inputs, out):
    return script(
        "pruning/export_model.py", task_name="topics", model_name_or_path=inputs.pruned / "0.75/best_model",
        sub_model_output_dir=out / "sub", static_sub_model=out / "sub_static/float",
        data_dir=inputs.workspace / "data",
    )  # fmt: skip


def quantize(inputs, out):
    return script(
        "quantization/quant_post.py", task_name="topics", input_dir=inputs.pruned / "0.75/sub_static",
        output_dir=out / "out", data_dir=inputs.workspace / "data", algorithms="abs_max\nhist", calib_samples=4,
    )  # fmt: skip


def serve(inputs, out):
    return script(
        "deploy/serving/export_to_serving.py", dirname=inputs.quantized / "mse4", server_path=out / "server",
        client_path=out / "client",
    )  # fmt: skip


class Stage(NamedTuple):
    command: object  # (Inputs, directory) -> the words of a command that writes there
    result: str  # the directory of its last result
    changed: str  # arguments that give another result in the same place


STAGES = {
    "general distillation": Stage(distil, "out/model_12", "--overwrite --seed 9"),
    "fine-tuning": Stage(fine_tune, "out", "--overwrite --seed 9"),
    "export": Stage(export, "model", "--cls_only False"),
    "pruning": Stage(prune, "out/0.75/best_model", "--overwrite --seed 9"),
    "export of a width": Stage(export_pruned, "sub_static", "--cls_only False"),
    "quantization": Stage(quantize, "out/abs_max4", "--overwrite --seed 9"),
    "export to serving": Stage(serve, "server", "--feed_alias_names a,b"),
}
LOGS = tempfile.mkdtemp(prefix="faults")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For the server that forks the runs: sums in one order, so that results are the same bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        os.makedirs(LOGS, exist_ok=True)  # test_power_loss.py has this fixture, too
        multiprocessing.forkserver.ensure_running()
        yield
    shutil.rmtree(LOGS, ignore_errors=True)


def start(command, *arguments):
    return Run(command, os.path.join(LOGS, str(time.monotonic_ns())), *arguments)


def run(command, status=0):
    done = start(command).finish()
    assert done.returncode == status, done.stdout + done.stderr
    return done


def one_line(done):
    """The line of error of a process that ended with status 2; there is none but warnings and progress beside it."""
    errors = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert len(errors) == 1 and "Traceback" not in done.stderr and "C++" not in done.stderr, done.stderr
    return errors[0]


def kill(command, directory, number, delay=0.0, second=None):
    """Starts a command and kills it at its number-th change of a file, or ``delay`` seconds after it.

    Args: second: a command to run while the first one is stopped there, which is to be refused.
    Returns: whether it was killed; otherwise it has ended well.
    """
    at_once = not delay and second is None
    ours, theirs = FORKS.Pipe(duplex=False)
    process = start(command, directory, number, None if at_once else theirs, second is not None)
    theirs.close()
    reached = False
    with contextlib.suppress(EOFError):  # it has killed itself, or ended before that change
        reached = ours.recv()
    if reached:
        time.sleep(delay)
        if second:
            os.kill(process.pid, signal.SIGSTOP)  # it stops itself, and perhaps has not come to that yet
            before = snapshot(directory)
            assert "another run is writing there" in one_line(run(second, 2))
            assert snapshot(directory) == before
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    done = process.finish()
    assert done.returncode in (0, -signal.SIGKILL), done.stdout + done.stderr
    return done.returncode != 0


def comparable(path):
    """The content of a file; of stage.json without what tells one run from another: times, places and arguments.

    A quantized graph is compared without the order of its operators: PaddleSlim puts in its own in the order of their
    addresses.
    """
    if path.name == QUANTIZED:
        with contextlib.suppress(DecodeError):  # half a file, which a process is writing: its bytes are compared
            (block,) = exporting.read_program(path).blocks
            return [sorted(part.SerializeToString() for part in parts) for parts in (block.ops, block.vars)]
    if path.name != records.RECORD:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    record = json.loads(path.read_bytes())
    for name in ("seconds", "arguments"):
        del record[name]
    export, parent = record.get("export") or {}, record["parent"] or {}
    export.pop("seconds", None), parent.pop("path", None)
    for hashes in (record["weights"], export.get("weights", {}), parent.get("weights", {})):
        hashes.pop(QUANTIZED, None)
    return record


def snapshot(directory):
    """{path below it: content} of every file, hidden ones too."""
    return {str(p.relative_to(directory)): comparable(p) for p in sorted(directory.rglob("*")) if p.is_file()}


def accepted(directory):
    """Yields the names of the files of which a later stage would say that they are a whole result."""
    model, tokenizer = [checkpoints.WEIGHTS, "config.json"], ["vocab.txt", "tokenizer_config.json"]
    with contextlib.suppress(UserError, FileNotFoundError):
        checkpoints.load_pretrained(directory, 2, kind="Model")
        yield model + tokenizer
    for stage in ("finetune", "prune"):
        with contextlib.suppress(UserError):
            checkpoints.load_classifier(directory, stage=stage)
            yield model + tokenizer
    with contextlib.suppress(UserError):
        dynabert.load_sub_model(directory)
        yield [checkpoints.WEIGHTS, dynabert.SUB_CONFIG, *tokenizer]
    with contextlib.suppress(UserError):
        graph = checkpoints.open_graph(directory)
        yield [f"{graph.name}.pdmodel", f"{graph.name}.pdiparams", *tokenizer]


def check_complete(directory, whole):
    """What a later stage accepts below ``directory`` is what the undisturbed run wrote. Returns: how many directories."""
    count = 0
    for path in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
        # A hidden directory is what is being written, or what is being replaced, in the place of another.
        place = [re.sub(r"^\.(.+)\.(writing|old)$", r"\1", part) for part in path.relative_to(directory).parts]
        for names in accepted(str(path)):
            for name in names:
                assert comparable(path / name) == comparable(whole.joinpath(*place, name)), path / name
            count += 1
    return count


@pytest.fixture(scope="module")
def inputs(workspace, distillation, tuned, pruned, quantized):  # noqa: F811
    return Inputs(workspace, distillation, tuned, pruned, quantized)


@pytest.fixture(scope="module", params=STAGES)
def undisturbed(request, inputs, tmp_path_factory):
    """(name, Stage, directory of an undisturbed run, its changes of files, its seconds since the first)."""
    if request.param == "export to serving":
        pytest.importorskip("paddle_serving_app", reason="needs Paddle Serving: bash setup_env.sh --serving")
    stage, directory = STAGES[request.param], tmp_path_factory.mktemp("whole")
    done = start(stage.command(inputs, directory), directory).finish()
    assert done.returncode == 0, done.stdout + done.stderr
    changes, seconds = done.stdout.splitlines()[-1].split()
    return request.param, stage, directory, int(changes), float(seconds)


def test_killed(undisturbed, inputs, tmp_path, fault):
    """Kill -9 at a random change of a file, shortly after one, or at any time; then the same command again."""
    name, stage, whole, changes, seconds = undisturbed
    rng, killed, kills, second_runs = random.Random(f"{name} {SEED}"), tmp_path / "killed", 0, 0
    print(f"FAULTS_SEED={SEED}")
    expected = snapshot(whole)
    assert check_complete(whole, whole)
    while kills < KILLS:
        shutil.rmtree(killed, ignore_errors=True)
        killed.mkdir()
        command = stage.command(inputs, killed)
        for turn in range(min(5, KILLS - kills)):
            kind = rng.random()
            # For a second run it is to be in the midst of its work; other kills may fall on the first or the last change.
            middle = rng.randint(changes // 4, changes * 3 // 4)
            number = middle if turn == 0 else 1 if kind > 0.8 else rng.randint(1, changes)
            delay = 0.0 if kind < 0.5 or turn == 0 else rng.uniform(0, 0.03 if number > 1 else seconds)
            if not kill(command, killed, number, delay, second=command if turn == 0 else None):
                break
            kills, second_runs = kills + 1, second_runs + (turn == 0)
            check_complete(killed, whole)
        else:
            begun = any((killed / "out.unfinished").glob("state-*"))  # a training: it is not to begin anew
            said = run(command).stdout
            assert not begun or re.search("going on after step|already finished", said), said
        assert snapshot(killed) == expected
    fault(f"{name}: kill -9", "at a random change of a file, up to 30 ms after one, or at any time; same command again",
          kills, "ended as if undisturbed, bit for bit; no incomplete directory was accepted in between")  # fmt: skip
    fault(f"{name}: a second run", "the same command while the first one is writing", second_runs,
          "refused with one line and status 2, nothing changed")  # fmt: skip


def test_killed_at_the_end(undisturbed, inputs, tmp_path):
    """At one of the last changes, when the result is there and something is left to be cleared away."""
    name, stage, whole, changes, _ = undisturbed
    command = stage.command(inputs, tmp_path)
    number = changes - random.Random(f"{name} {SEED}").randrange(max(2, changes // 10))
    print(f"FAULTS_SEED={SEED}")
    assert kill(command, tmp_path, number)
    check_complete(tmp_path, whole)
    run(command)
    assert snapshot(tmp_path) == snapshot(whole)


@pytest.mark.skipif(FAULTS is None, reason="a second undisturbed run of each stage: bash tests/faults.sh")
def test_the_same_twice(undisturbed, inputs, tmp_path, fault):
    name, stage, whole, *_ = undisturbed
    run(stage.command(inputs, tmp_path))
    assert snapshot(tmp_path) == snapshot(whole)
    fault(f"{name}: the same command twice", "same seed, another directory", 1, "same metrics and files, bit for bit")


@contextlib.contextmanager
def small_disk(path):
    """A file system of 64 MB at ``path``, to be filled and to be made read-only."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_full_and_read_only_disk(undisturbed, inputs, tmp_path, fault):
    """Where a good result lies already, and another command is to replace it."""
    name, stage, whole, *_ = undisturbed
    rng = random.Random(f"{name} {SEED}")
    print(f"FAULTS_SEED={SEED}")
    with small_disk(tmp_path / "disk") as disk:
        shutil.copytree(whole, disk, dirs_exist_ok=True)
        command = [*stage.command(inputs, disk), *stage.changed.split()]
        before = snapshot(disk / stage.result)
        largest = max(path.stat().st_size for path in (disk / stage.result).iterdir())
        for _ in range(FULL_DISKS):
            left = int(rng.uniform(0, 0.9) * largest)  # a new result beside the old one needs more
            state = os.statvfs(disk)
            with open(disk / "ballast", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, state.f_bavail * state.f_frsize - left))
            assert "No space left" in one_line(run(command, 2))
            assert snapshot(disk / stage.result) == before
            (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert "Read-only" in one_line(run(command, 2))
        assert snapshot(disk / stage.result) == before
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        run(command)
        assert snapshot(disk / stage.result) != before
    fault(f"{name}: disk full", "a file system with random room left, less than the new result needs", FULL_DISKS,
          "one line, status 2; the result that was there is intact; with room again the same command succeeds")  # fmt: skip
    fault(f"{name}: output read-only", "file system mounted read-only", 1, "one line, status 2; the result is intact")


def bulk_command(workspace, tuned, out):
    """Bulk classification with a checkpoint after each of its windows, of which 300 lines make five."""
    lines = [json.loads(line)["sentence"] for line in open(workspace / "data/topics/dev.json", encoding="utf-8")]
    (out.parent / "titles.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    driver = out.parent / "driver.py"
    directory = os.path.join(ROOT, "deploy/python")
    driver.write_text(
        f"import sys\nsys.path.insert(0, {directory!r})\nimport infer, outputs\nfrom common import cli\n"
        "outputs.CHECKPOINT_SECONDS = 0\ncli.run(infer.main)\n"
    )
    options = ["--model_path", tuned, "--input_file", out.parent / "titles.txt", "--batch_size", "1"]
    return [driver, *options, "--output", out / "answers.tsv.gz"]


def test_bulk_killed(workspace, tuned, tmp_path, fault):
    """As test_killed; the output is there when it is complete."""
    directory, kills, rng = tmp_path / "killed", 0, random.Random(f"bulk {SEED}")
    print(f"FAULTS_SEED={SEED}")
    (tmp_path / "whole").mkdir()
    done = start(bulk_command(workspace, tuned, tmp_path / "whole"), tmp_path / "whole").finish()
    assert done.returncode == 0, done.stdout + done.stderr
    changes, seconds = done.stdout.splitlines()[-1].split()
    changes, output = int(changes), directory / "answers.tsv.gz"
    expected = (tmp_path / "whole/answers.tsv.gz").read_bytes()
    while kills < max(KILLS, 3):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        command, turns = bulk_command(workspace, tuned, directory), min(4, max(KILLS, 3) - kills)
        for turn in range(turns):
            # For a second run it is to be in the midst of its work, as in test_killed.
            number = rng.randint(1, changes) if turn else rng.randint(changes // 4, changes * 3 // 4)
            delay = rng.choice((0.0, rng.uniform(0, 0.03), rng.uniform(0, float(seconds))))
            if not kill(command, directory, number, delay, second=command if turn == 0 else None):
                break
            kills += 1
            assert not output.exists() or output.read_bytes() == expected
        run(command)
        assert output.read_bytes() == expected
        assert sorted(os.listdir(directory)) == ["answers.tsv.gz", "answers.tsv.gz.run.json"]
    fault("bulk classification: kill -9", "at a random change of a file, up to 30 ms after one, or at any time; same "
          "command again", kills, "output as if undisturbed, bit for bit; in between it was not there")  # fmt: skip
