"""Fine-tunes one model with every batch size and learning rate of a grid, on one CLUE task or on all seven.

Each cell of the grid is one run of run_clue.py. It writes MODEL/models/TASK/LR_BATCH/, and LR_BATCH.log beside it.
Several cells run at once: one per GPU, or --workers on a CPU. Rerun the same command to resume: finished cells are
skipped, unfinished ones resume. Failed cells do not stop the others; they are listed at the end, with exit status 1.
MODEL/best.json names the best finished cell of each task, for prune.sh, export_all.sh, quant_all.sh and run_all.sh.

    sh run_one_search.sh ppminilm-6l-768h TNEWS                 # these two launchers run this script
    DRY_RUN=1 sh run_all_search.sh ppminilm-6l-768h             # prints the plan of the 63 cells, and its time
    python grid_search.py --model ppminilm-6l-768h --tasks TNEWS --learning_rates 1e-4 3e-4 -- --max_train_samples 5000
"""

import itertools
import math
import os
import subprocess
import sys
import time
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..")]
import data
import run_clue
import summarize
from common import CORES, UserError, checkpoints, cli, objectives, provenance, records, runs, texts
from common.compat import paddle
from tqdm import tqdm

# The grid of the original PP-MiniLM example in PaddleNLP (run_all_search.sh there): 3 x 3 cells per task, evaluated
# every 100 steps. The epochs and maximum length of each task are in data.TASKS.
BATCH_SIZES = [16, 32, 64]
LEARNING_RATES = ["3e-5", "5e-5", "1e-4"]
RUN_CLUE = os.path.join(HERE, "run_clue.py")


class Cell(NamedTuple):
    task: str
    learning_rate: str  # as typed: it is part of the path
    batch_size: int
    epochs: int
    max_seq_length: int
    directory: str
    more: tuple  # arguments passed on to run_clue.py

    def name(self):
        return f"{self.task} {self.learning_rate}_{self.batch_size}"

    def log(self):
        return f"{self.directory}.log"


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, help="built-in name or model directory; gets the results")
    tasks = [task.name for task in data.TASKS.values()]
    parser.add_argument(
        "--tasks", nargs="+", type=cli.task_name, default=tasks, help="CLUE tasks, or names of your own data"
    )
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=BATCH_SIZES, help="batch sizes of the grid")
    parser.add_argument("--learning_rates", nargs="+", default=LEARNING_RATES, help="learning rates of the grid")
    help = "epochs, for all tasks (default: the published number of each task)"
    parser.add_argument("--num_train_epochs", type=int, positive=True, help=help)
    help = "maximum tokens per example, for all tasks (default: the published length of each task)"
    parser.add_argument("--max_seq_length", type=int, positive=True, help=help)
    parser.add_argument("--gpus", help="GPU ids, such as 0,1 (default: all visible GPUs)")
    cli.add_device_argument(parser)
    parser.add_argument(
        "--workers",
        type=int,
        help="number of concurrent cells on a CPU, which share its cores (default: one per 4 cores); raise it for a "
        "small model, up to the number of cores; lower it if memory runs out",
        positive=True,
    )
    parser.add_argument("--dry_run", action="store_true", help="only print the plan, with estimated times if known")
    parser.add_argument("more", nargs="*", metavar="...", help="after --: arguments passed on to run_clue.py")
    args = parser.parse_args(argv)
    for rate in args.learning_rates:
        try:
            float(rate)
        except ValueError:
            parser.error(f"--learning_rates: {rate!r} is not a number")
    if min(args.batch_sizes) < 1:
        parser.error(f"--batch_sizes: {min(args.batch_sizes)} must be above 0")
    names = "task_name model_name_or_path output_dir learning_rate batch_size num_train_epochs max_seq_length device"
    fixed = {f"--{name}" for name in names.split()}
    for word in args.more:
        if word.split("=")[0] in fixed:
            parser.error(f"{word}: the search sets it for each cell")
    args.tasks = [data.TASKS[task.lower()].name if task.lower() in data.TASKS else task for task in args.tasks]
    return args


def plan(args):
    """The cells of the grid, task by task; within a task, larger batch sizes first, because they finish sooner."""
    cells = []
    for task in dict.fromkeys(args.tasks):
        settings = data.TASKS.get(task.lower(), data.Task(task))
        epochs = args.num_train_epochs or settings.epochs
        length = args.max_seq_length or settings.max_seq_length
        for batch_size in sorted(set(args.batch_sizes), reverse=True):
            for rate in dict.fromkeys(args.learning_rates):
                directory = os.path.join(args.model, "models", task, f"{rate}_{batch_size}")
                cells.append(Cell(task, rate, batch_size, epochs, length, directory, tuple(args.more)))
    return cells


def arguments_of(cell, args):
    options = {"task_name": cell.task, "model_name_or_path": args.model, "output_dir": cell.directory}
    options.update(learning_rate=cell.learning_rate, batch_size=cell.batch_size, num_train_epochs=cell.epochs)
    options.update(max_seq_length=cell.max_seq_length, **({"device": args.device} if args.device else {}))
    return ["--do_train", *(f"--{name}={value}" for name, value in options.items()), *cell.more]


def asked_of(cell, args):
    """The arguments of a cell, as parsed by run_clue.py."""
    return run_clue.parse_args(arguments_of(cell, args))


class CellRuns:
    """The run of each cell as run_clue.py will see it (runs.Run), without starting it. Files are hashed once."""

    def __init__(self, args):
        self.hashes = {}
        self.parent = checkpoints.parent_of_start(args.model)

    def of(self, task, asked):
        """runs.Run of a cell of the task with the arguments ``asked``."""
        if task not in self.hashes:
            paths = {split: local_path(task, split, asked.data_dir) for split in ("train", "dev")}
            self.hashes[task] = {split: {"md5": data.md5_of(path)} for split, path in paths.items() if path}
        parent = None if asked.init_config else self.parent
        return runs.Run("finetune", asked, parent, self.hashes[task])


def local_path(task, split, data_dir):
    """The file of a split if it is on this machine, else None: printing a plan must not download data."""
    try:
        return data.split_path(task, split, data_dir) if data.is_local(task, split, data_dir) else None
    except UserError:
        return None


def state_of(cell, asked, record, cell_runs):
    """finished, begun or new. A cell finished with other settings counts as new: run_clue.py reports the difference.

    Args: record: record of the finished cell, or None.
    """
    if record is None:
        return "begun" if os.path.isdir(f"{cell.directory}.unfinished") else "new"
    # The device is ignored: a finished cell stays finished if the search continues on another device.
    same = cell_runs.of(cell.task, asked).has_made(record, ignoring=["device"])
    predicted = not asked.do_predict or os.path.isfile(texts.submission_path(cell.task, cell.directory))
    return "finished" if same and predicted and not asked.overwrite else "new"


def finished_record(cell):
    """The record of a finished cell. None if it is missing or unreadable; run_clue.py reports the reason."""
    try:
        return records.read_record(cell.directory)
    except UserError:
        return None


def read_cells(cells, args):
    """({cell: its record or None}, {cell: its state})."""
    cell_runs, recorded = CellRuns(args), {cell: finished_record(cell) for cell in cells}
    return recorded, {cell: state_of(cell, asked_of(cell, args), recorded[cell], cell_runs) for cell in cells}


def estimate(cell, max_steps, found):
    """Seconds that a cell will take, or None if no cell of its task is recorded.

    The estimate is the seconds per record in the recorded cells of the task (of the same batch size, if there are any)
    times the number of records that the cell will train on. A begun cell counts in full.

    Args: max_steps: --max_steps of the cell. found: {cell: its record or None}.
    """
    paces, epoch = {}, 0
    for other, record in found.items():
        if record and other.task == cell.task:
            made_with, epoch = record["arguments"], record["data"]["train"]["examples"]
            seen = max(made_with["max_steps"] * made_with["batch_size"], 0) or made_with["num_train_epochs"] * epoch
            paces.setdefault(other.batch_size, []).append(record["seconds"] / seen)
    if not paces:
        return None
    chosen = paces.get(cell.batch_size) or list(itertools.chain(*paces.values()))
    examples = max(max_steps * cell.batch_size, 0) or cell.epochs * epoch
    return examples * sum(chosen) / len(chosen)


def show_plan(cells, args, slots):
    """Prints the plan, cell by cell, with time estimates."""
    recorded, states = read_cells(cells, args)
    max_steps = asked_of(cells[0], args).max_steps
    seconds = {cell: estimate(cell, max_steps, recorded) for cell in cells}
    print("| cell | epochs | max_seq_length | state | estimate, s |\n| --- | --- | --- | --- | --- |")
    for cell, guess in seconds.items():
        if states[cell] == "finished":
            shown = ""
        else:
            shown = "unknown" if guess is None else f"{guess:.0f}"
        print(f"| {cell.name()} | {cell.epochs} | {cell.max_seq_length} | {states[cell]} | {shown} |")
    left = [guess for cell, guess in seconds.items() if states[cell] != "finished"]
    known = [guess for guess in left if guess is not None]
    summary = f"{len(cells)} cells, {len(left)} to do, {len(slots)} at once"
    if known:
        minutes = sum(known) / len(slots) / 60
        summary += f"; about {minutes:.0f} minutes for the {len(known)} whose task has a record"
    print(summary)


def find_slots(args):
    """One slot per concurrent cell: the id of a GPU, or None for a share of the CPU cores."""
    device = cli.set_device(args.device)
    if device.startswith("gpu"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(paddle.device.cuda.device_count())))
        paddle.set_device("cpu")  # the search itself needs no GPU
        return (args.gpus or visible).split(",")
    return [None] * (args.workers or max(1, CORES // 4))


def start(cell, args, slot, slots):
    """Starts run_clue.py for a cell and appends its output to the cell's log."""
    os.makedirs(os.path.dirname(cell.directory), exist_ok=True)
    environment = dict(os.environ)
    if slot is None:
        environment["OMP_NUM_THREADS"] = str(max(1, CORES // slots))
    else:
        environment["CUDA_VISIBLE_DEVICES"] = slot
    with open(cell.log(), "a", encoding="utf-8") as log:
        command = [sys.executable, "-u", RUN_CLUE, *arguments_of(cell, args)]
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        # With the search dies the cell, which would otherwise keep its lock.
        return subprocess.Popen(command, **streams, env=environment, preexec_fn=cli.die_with_parent)


def last_line(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1] if lines else "(no output)"


def prepare(cells, args):
    """Checks once for errors that would fail every cell, and downloads shared files once.

    Returns: {cell: reason} for the cells of tasks without data. Raises: UserError for a model that cannot be loaded.
    """
    asked = asked_of(cells[0], args)
    asked.max_seq_length = None  # it differs by task: a model that is too short for one fails in the cells of that one
    checkpoints.load_pretrained_for(asked, 2)
    failed = {}
    for task in dict.fromkeys(cell.task for cell in cells):
        try:
            for split in ("train", "dev"):
                data.split_path(task, split, asked.data_dir)
        except UserError as error:
            failed.update({cell: str(error) for cell in cells if cell.task == task})
    return failed


def search(cells, args, slots):
    """Runs the cells that are not finished. Returns: {cell: reason} for the failed cells."""
    recorded, states = read_cells(cells, args)
    code = provenance.code_of(runs.ResumableRun.shared_code)
    queue = [cell for cell in cells if states[cell] != "finished"]
    failed = prepare(queue, args) if queue else {}
    queue = [cell for cell in queue if cell not in failed]
    best, running, free, done = {}, {}, list(slots), 0
    progress = tqdm(total=len(cells), desc="cells", disable=None)

    def count(cell, record, how):
        nonlocal done
        done += 1
        score, metric = records.score(record), objectives.shown(record["objective"]["metric"])
        best[cell.task] = max(best.get(cell.task, (-math.inf, "")), (score, cell.name()), key=lambda pair: pair[0])
        progress.update()
        progress.write(
            f"{cell.name()}: {how}, dev {metric} {score:.4f} (best of {cell.task} so far {best[cell.task][0]:.4f}: "
            f"{best[cell.task][1]}); {done} done, {len(running)} running, {len(queue)} to go"
        )

    for cell in cells:
        if states[cell] == "finished":
            changed = provenance.changed_code(recorded[cell].get("code") or {}, code)
            count(cell, recorded[cell], "already finished" + (f" (made before {changed} changed)" if changed else ""))
    summarize.write_best(args.model)
    try:
        while queue or running:
            while queue and free:
                cell, slot = queue.pop(0), free.pop(0)
                running[cell] = start(cell, args, slot, len(slots)), slot
                progress.write(f"{cell.name()}: {'resumes' if states[cell] == 'begun' else 'starts'}, see {cell.log()}")
            time.sleep(0.2)
            for cell in [cell for cell, (process, _) in running.items() if process.poll() is not None]:
                process, slot = running.pop(cell)
                free.append(slot)
                record = finished_record(cell) if process.returncode == 0 else None
                if record:
                    count(cell, record, "finished")
                    summarize.write_best(args.model)
                else:
                    failed[cell] = f"status {process.returncode}, {last_line(cell.log())}; see {cell.log()}"
                    progress.write(f"{cell.name()}: FAILED, {failed[cell]}")
            progress.set_postfix_str(f"{len(running)} running, {len(queue)} to go, {len(failed)} failed")
    finally:
        for process, _ in running.values():
            process.kill()
        progress.close()
    return failed


def main(argv=None):
    args = parse_args(argv)
    slots = find_slots(args)
    cells = plan(args)
    asked_of(cells[0], args)  # exits with run_clue.py's message if an argument is invalid
    if args.dry_run:
        show_plan(cells, args, slots)
        return
    failed = search(cells, args, slots)
    reasons = {}
    for cell, why in failed.items():
        reasons.setdefault(why, []).append(cell)
    for why, same in reasons.items():  # a reason that several cells share is printed once
        several = f" and {len(same) - 1} more cells" if len(same) > 1 else ""
        print(f"grid_search.py: failed: {same[0].name()}{several}: {why}", file=sys.stderr)
    if failed:
        sys.exit(1)
    print(f"{len(cells)} cells done; best of each task: {os.path.join(args.model, summarize.BEST)}")


if __name__ == "__main__":
    cli.run(main)
