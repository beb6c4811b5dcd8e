"""The grid search: every cell once, killed and resumed, failures apart; and what its best.json is good for."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import FAULTS, ROOT, load_script, record, sh, write_rows

from common import UserError
from common.records import find_records

GRID = {"BATCH_SIZES": "32 64", "LEARNING_RATES": "2e-3", "EPOCHS": "1", "MAX_SEQ_LENGTH": "48", "WORKERS": "2"}
MODEL = ["--init_config", "tiny.json", "--vocab_file", "vocab.txt", "--data_dir", "data"]
SMALL = [*MODEL, "--max_train_samples", "320", "--max_eval_samples", "64"]


def children_of(process):
    """Process ids of run_clue.py below a search, from /proc: ps cuts long command lines."""
    parents, commands = {}, {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as stat, open(f"/proc/{pid}/cmdline") as command:
                parents[int(pid)] = int(stat.read().rsplit(")", 1)[1].split()[1])
                commands[int(pid)] = command.read()
        except OSError:  # gone meanwhile
            continue
    return [pid for pid, parent in parents.items() if parent == process.pid and "run_clue.py" in commands[pid]]


def runs(pid):
    """Whether a process is there and not merely waiting to be reaped."""
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return bool(file.read())
    except OSError:  # gone, before or while it was read
        return False


@pytest.fixture(scope="module")
def searched(workspace):
    """A finished grid of two cells."""
    done = sh("finetuning/run_one_search.sh", "grid", "topics", *SMALL, cwd=workspace, **GRID)
    return workspace / "grid", done.stdout


def test_every_cell_runs_once_and_the_best_is_named(searched, workspace):
    model, output = searched
    cells = {name: record(model / "models/topics" / name) for name in ("2e-3_32", "2e-3_64")}
    assert [c["arguments"]["batch_size"] for c in cells.values()] == [32, 64]
    assert "2 cells done" in output and "(best of topics so far" in output
    best = json.loads((model / "best.json").read_text())["topics"]
    assert best["accuracy"] == max(c["metrics"]["accuracy"] for c in cells.values())
    assert record(model / best["path"])["metrics"]["accuracy"] == best["accuracy"]
    before = {name: os.stat(model / "models/topics" / name / "stage.json").st_mtime_ns for name in cells}
    again = sh("finetuning/run_one_search.sh", "grid", "topics", *SMALL, cwd=workspace, **GRID).stdout
    assert again.count("already finished") == 2 and "starts" not in again and "made before" not in again
    assert before == {name: os.stat(model / "models/topics" / name / "stage.json").st_mtime_ns for name in cells}
    # Made by other code, as its record says.
    path = model / "models/topics/2e-3_64/stage.json"
    text = path.read_text(encoding="utf-8")
    digest = json.loads(text)["code"]["finetuning/run_clue.py"]
    path.write_text(text.replace(digest, "0" * 64), encoding="utf-8")
    again = sh("finetuning/run_one_search.sh", "grid", "topics", *SMALL, cwd=workspace, **GRID).stdout
    path.write_text(text, encoding="utf-8")
    told = [line for line in again.splitlines() if "(made before finetuning/run_clue.py changed)" in line]
    assert len(told) == 1 and told[0].startswith("topics 2e-3_64: already finished"), again


def test_other_data_or_weights_are_not_finished(searched, workspace, tmp_path):
    """The same arguments, but another dev file: what is recorded does not count for it."""
    settings = {**GRID, "DRY_RUN": "1"}
    plan = sh("finetuning/run_one_search.sh", "grid", "topics", *SMALL, cwd=workspace, **settings).stdout
    assert plan.count("| finished |") == 2
    shutil.copytree(workspace / "data/topics", tmp_path / "topics")
    with open(tmp_path / "topics/dev.json", "a", encoding="utf-8") as file:
        file.write("\n")
    other = [str(tmp_path) if word == "data" else word for word in SMALL]
    plan = sh("finetuning/run_one_search.sh", "grid", "topics", *other, cwd=workspace, **settings).stdout
    assert plan.count("| new |") == 2
    plan = sh(
        "finetuning/run_one_search.sh", "grid", "topics", *SMALL, "--do_predict", cwd=workspace, **settings
    ).stdout
    assert plan.count("| new |") == 2  # the predictions are not there


def test_what_is_being_written_is_no_result(searched, workspace, tmp_path):
    model, _ = searched
    shutil.copytree(model, tmp_path / "m")
    cell = tmp_path / "m/models/topics/2e-3_32"
    for name in (".1e-4_32.writing", "1e-4_32.unfinished"):
        shutil.copytree(cell, cell.parent / name)
    assert sorted(r["directory"][-7:] for r in find_records([str(tmp_path)])) == ["2e-3_32", "2e-3_64"]


def test_dry_run_estimates_from_what_is_recorded(searched, workspace):
    model, _ = searched
    plan = sh("finetuning/run_one_search.sh", "grid", "topics", *SMALL, cwd=workspace,
              **{**GRID, "EPOCHS": "3", "DRY_RUN": "1", "LEARNING_RATES": "2e-3 4e-3"}).stdout  # fmt: skip
    recorded = record(model / "models/topics/2e-3_32")["seconds"]
    guesses = [float(g) for g in re.findall(r"\| topics 4e-3_32 \| 3 \| 48 \| new \| (\d+) \|", plan)]
    assert len(guesses) == 1 and abs(guesses[0] - 3 * recorded) <= 1
    assert "4 cells, 4 to do, 2 at once; about" in plan
    assert not (model / "models/topics/4e-3_32").exists()


def test_the_plan_of_all_seven_tasks_is_the_published_grid(workspace):
    plan = sh("finetuning/run_all_search.sh", "nothing", *MODEL[:4], cwd=workspace, DRY_RUN="1").stdout
    assert "63 cells, 63 to do" in plan and not (workspace / "nothing").exists()
    for task, epochs, length in (("TNEWS", 3, 128), ("CLUEWSC2020", 50, 128), ("CSL", 8, 256), ("OCNLI", 6, 128)):
        rows = re.findall(rf"\| {task} (\S+)_(\d+) \| {epochs} \| {length} \| new", plan)
        assert {(rate, int(size)) for rate, size in rows} == {
            (rate, size) for rate in ("3e-5", "5e-5", "1e-4") for size in (16, 32, 64)
        }


@pytest.mark.skipif(FAULTS is None, reason="20 seconds: bash tests/faults.sh")
def test_a_killed_search_leaves_nothing_running_and_goes_on(workspace):
    """Killed while a cell trains: the cell dies with it, resumes with the next search, and ends as undisturbed."""
    settings = {**os.environ, "PYTHON": sys.executable, **GRID, "BATCH_SIZES": "32", "EPOCHS": "3"}
    settings["OMP_NUM_THREADS"] = "1"
    more = [*MODEL, "--save_steps", "20", "--max_eval_samples", "64"]

    def search(name):
        command = ["--model", name, "--tasks", "topics", "--batch_sizes", "32", "--learning_rates", "2e-3", "--workers", "2",
                   "--num_train_epochs", "3", "--max_seq_length", "48", "--", *more]  # fmt: skip
        return subprocess.Popen([sys.executable, os.path.join(ROOT, "finetuning/grid_search.py"), *command], cwd=workspace,
                                env=settings, stdout=subprocess.PIPE, text=True)  # fmt: skip

    killed = search("killed")
    unfinished = workspace / "killed/models/topics/2e-3_32.unfinished"
    while not (unfinished / "state-20").is_dir():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    cells = children_of(killed)
    assert cells
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    deadline = time.time() + 10
    while any(map(runs, cells)):
        assert time.time() < deadline, "the cell outlived its search"
        time.sleep(0.05)
    again, whole = search("killed"), search("whole")
    output = again.communicate()[0]
    assert again.returncode == 0 and "topics 2e-3_32: resumes" in output, output
    assert whole.wait() == 0
    results = [record(workspace / name / "models/topics/2e-3_32") for name in ("killed", "whole")]
    assert results[0]["weights"] == results[1]["weights"] and results[0]["metrics"] == results[1]["metrics"]


def test_a_failed_cell_does_not_stop_the_others(workspace):
    done = sh("finetuning/run_one_search.sh", "failing", "topics", *SMALL, cwd=workspace, check=False,
              **{**GRID, "BATCH_SIZES": "64", "LEARNING_RATES": "1e30 2e-3"})  # fmt: skip
    assert done.returncode == 1
    assert "failed: topics 1e30_64: status 2" in done.stderr and "the loss of step" in done.stderr
    assert record(workspace / "failing/models/topics/2e-3_64") and "FAILED" in done.stdout
    assert not (workspace / "failing/models/topics/1e30_64").exists()


@pytest.mark.parametrize("task, more, message", [
    ("topics", ["--no_such_argument"], "unrecognized arguments: --no_such_argument"),
    ("topics", ["--init_config", "missing.json", "--vocab_file", "vocab.txt"], "missing.json: no such file"),
    ("topics", ["--learning_rate", "1e-3"], "--learning_rate: the search sets it for each cell"),
    ("topics", ["--save_steps", "0"], "--save_steps 0: must be above 0"),
])  # fmt: skip
def test_what_would_fail_in_every_cell_fails_before_the_first(workspace, monkeypatch, capsys, task, more, message):
    monkeypatch.chdir(workspace)
    script = load_script("finetuning", "grid_search")
    with pytest.raises(UserError, match=r"--learning_rate -1.0: must be above 0"):  # of the second cell alone
        script.main(["--model", "early", "--tasks", task, "--device", "cpu", "--learning_rates", "2e-3", "-1"])
    with pytest.raises((SystemExit, UserError)) as failure:
        script.main(["--model", "early", "--tasks", task, "--device", "cpu", "--", "--data_dir", "data", *more])
    assert message in str(failure.value) + capsys.readouterr().err
    assert not (workspace / "early").exists()


def test_best_json_in_place_of_typed_values(searched, workspace):
    """Pruning, export and quantization of every task that it names, with that cell's settings."""
    model, _ = searched
    best = json.loads((model / "best.json").read_text())["topics"]
    sample = ["--data_dir", workspace / "data", "--max_train_samples", "320", "--max_eval_samples", "64"]
    here = workspace / "from_best"
    here.mkdir()
    sh("pruning/prune.sh", "../grid/best.json", "0.75", *sample, cwd=here)
    pruned = record(here / "pruned_models/topics/0.75/best_model")
    assert pruned["arguments"]["batch_size"] == best["batch_size"] and pruned["arguments"]["learning_rate"] == 2e-3
    assert pruned["parent"]["weights"] == record(model / best["path"])["weights"]
    sh("pruning/export_all.sh", "../grid/best.json", *sample[:2], cwd=here)
    assert (model / best["path"] / "inference.pdmodel").is_file()
    few = ["--algorithms", "abs_max", "--calib_samples", "4"]
    sh("quantization/quant_all.sh", "../grid/best.json", *sample, *few, cwd=here)
    exported = record(model / best["path"])["export"]["weights"]
    assert set(record(here / "topics_finetuned_quant_models/abs_max4")["parent"]["weights"]) <= set(exported)
    shutil.copytree(workspace / "data/topics", here / "data/topics")
    rows = [json.loads(line) for line in open(here / "data/topics/dev.json", encoding="utf-8")]
    write_rows(here / "data/topics/test.json", [{"id": i, "sentence": row["sentence"]} for i, row in enumerate(rows)])
    sh("finetuning/predict_all.sh", "../grid/best.json", "--data_dir", "data", cwd=here)
    predictions = [json.loads(line) for line in open(model / best["path"] / "topics_predict.json", encoding="utf-8")]
    assert [p["id"] for p in predictions] == list(range(len(rows)))
    (workspace / "empty.json").write_text("{}")
    for launcher in ("finetuning/predict_all.sh", "run_all.sh"):
        empty = sh(launcher, "../empty.json", cwd=here, check=False)
        assert empty.returncode == 2 and empty.stderr.count("\n") == 1 and "names no task" in empty.stderr
    bad = sh("pruning/prune.sh", "../tiny.json", "0.75", cwd=here, check=False)
    assert bad.returncode == 2 and "not a best.json" in bad.stderr
