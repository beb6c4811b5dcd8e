"""How many labels a pre-trained or distilled model saves: fine-tunes several starts on parts of a task's train data.

Reads models to start from, and architectures to start at random (the twins). For each start and each number of labels,
finetuning/run_clue.py tries the same learning rates and numbers of steps with the first seed; the best on the whole of
dev is repeated with the other seeds. Each seed draws other records. Writes the fine-tuned models to --output_dir, the
figures to --json, where other tasks keep theirs, and a plot of all tasks. Rerun the same command to resume.

    python few_labels.py --task_name TNEWS --starts teacher=teacher distilled=pretrain/model_7500 \\
        random=../configs/student-2l-128h.json --vocab_file vocab.txt --plan 100=300 1000=300,900 all=3300 \\
        --learning_rates 5e-4 1e-3 2e-3 --seeds 1 2 3 --output_dir few --json few_labels.json --plot few_labels.png
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, "../finetuning"), os.path.join(HERE, "..")]

import numpy as np

import data
import learning_curves
import run_clue
from common import ROOT, UserError, checkpoints, cli, files, modeling, provenance, records, runs

RUN_CLUE = os.path.join(ROOT, "finetuning", "run_clue.py")
ALL = "all"
EVALUATIONS = 4  # of each training; the best one counts
SOURCE = "source.json"  # in a part of the train data: what it was drawn from
# In these a random twin may differ from the model that it is compared with.
NOT_SHAPE = ("initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob")


def start_argument(text):
    """argparse type: NAME=PATH -> (name, path)."""
    name, equals, path = text.partition("=")
    if not (name and equals and path and name.replace("_", "").isalnum()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH, with a name of letters, digits and _")
    return name, path


def plan_argument(text):
    """argparse type: SIZE=STEPS,STEPS,... -> (size, list of steps); a size is "all" or a number."""
    size, _, steps = text.partition("=")
    numbers = [*steps.split(","), *([] if size == ALL else [size])]
    if not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not LABELS=STEPS or LABELS=STEPS,STEPS; LABELS may be all")
    return size if size == ALL else int(size), sorted({int(number) for number in steps.split(",")})


def learning_rate_argument(text):
    """argparse type: a number above 0, as it was written, for it names directories."""
    try:
        valid = float(text) > 0
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return text


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    main = parser.add_argument_group("task and models")
    cli.add_task_argument(main)
    help = "NAME=MODEL of each start: a directory (of a stage, Hugging Face or PaddleNLP), a built-in name, or a JSON "
    help += "architecture for random weights"
    main.add_argument("--starts", type=start_argument, nargs="+", required=True, help=help)
    help = "names of starts, a model and its random twins: how many labels does the first need for a twin's accuracy?"
    main.add_argument("--compare", nargs="+", default=["distilled", "random"], metavar="NAME", help=help)
    main.add_argument("--vocab_file", help="vocabulary of the random starts")
    help = "family of a start, by its name: NAME=TYPE (default: ppminilm)"
    main.add_argument("--model_types", type=start_argument, nargs="+", default=[], help=help)
    search = parser.add_argument_group("search")
    help = "LABELS=STEPS,STEPS for each number of labels: the numbers of steps to try"
    search.add_argument("--plan", type=plan_argument, nargs="+", required=True, help=help)
    of_rates = {"type": learning_rate_argument, "nargs": "+", "default": ["5e-4", "1e-3", "2e-3"]}
    search.add_argument("--learning_rates", **of_rates, help="learning rates to try")
    help = "seeds of weights, order, dropout and choice of records; all of the records take the first one only"
    search.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help=help)
    search.add_argument("--batch_size", type=int, default=32, positive=True, help="records per step")
    search.add_argument("--max_seq_length", type=int, default=128, positive=True, help="tokens per sequence")
    cli.add_device_argument(search)
    places = parser.add_argument_group("places")
    cli.add_data_arguments(places)
    cli.add_output_argument(places, "directory for parts of the train data and fine-tuned models", required=True)
    places.add_argument("--json", required=True, help="JSON file of the figures; those of other tasks stay in it")
    places.add_argument("--plot", required=True, help="PNG file of the plot")
    args = parser.parse_args(argv)
    for option in ("starts", "plan", "model_types"):
        pairs = getattr(args, option)
        setattr(args, option, dict(pairs))
        if len(getattr(args, option)) < len(pairs):
            raise UserError(f"--{option}: a name or number is given twice")
    for name in {*args.compare, *args.model_types} - set(args.starts):
        raise UserError(f"--compare or --model_types: {name}: no such start; there are {', '.join(args.starts)}")
    for model_type in set(args.model_types.values()) - set(modeling.MODEL_TYPES):
        raise UserError(f"--model_types {model_type}: must be one of {', '.join(modeling.MODEL_TYPES)}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds: must be different numbers, 0 or above")
    return args


def prepare(args, task):
    """Draws all parts of the train data, and checks what would otherwise fail after hours. Raises: UserError."""
    for name, path in args.starts.items():
        model_type = args.model_types.get(name, "ppminilm")
        if os.path.isfile(path):
            if not args.vocab_file:
                raise UserError(f"--starts {name}={path}: random weights need --vocab_file")
        elif not checkpoints.has_weights(path) and not checkpoints.builtin_name(modeling.model_class(model_type), path):
            raise UserError(f"--starts {name}={path}: no file, no directory with weights, no built-in {model_type}")
    for option in ("json", "plot"):
        directory = os.path.dirname(os.path.abspath(getattr(args, option)))
        if not os.path.isdir(directory):
            raise UserError(f"--{option}: {directory}: no such directory")
    read_tasks(args)
    make_parts(args, task)


def read_tasks(args):
    """What is in --json; nothing if it is not there. Raises: UserError if that is something else."""
    tasks = files.read_json_object(args.json) if os.path.exists(args.json) else {}
    if not all(isinstance(found, dict) and "rows" in found for found in tasks.values()):
        raise UserError(f"--json {args.json}: holds something else; name another file")
    return tasks


# Data


def part_of(args, task, size, seed):
    """Path of the directory that make_parts writes, or --data_dir for all records."""
    return args.data_dir if size == ALL else os.path.join(args.output_dir, "data", f"{task.name.lower()}-{size}-{seed}")


def make_parts(args, task):
    """For each size and seed of --plan and --seeds, writes a directory with the task's dev.json and so many train
    records: a random draw, not one by class, as someone would label the first records of a shuffled heap. Of one seed,
    a larger part contains the smaller ones.

    Raises: UserError if there are not so many records, or if a part that is there is of other data.
    """
    source = {name: data.md5_of(data.split_path(task.name, name, args.data_dir)) for name in ("train", "dev")}
    source["max_train_samples"] = args.max_train_samples
    missing = []
    for size, seed in itertools.product(args.plan, args.seeds):
        directory = part_of(args, task, size, seed)
        if size == ALL:
            continue
        if not os.path.isdir(directory):
            missing.append((size, seed, directory))
            continue
        path = os.path.join(directory, SOURCE)
        if not os.path.isfile(path) or files.read_json_object(path) != source:
            raise UserError(f"{directory}: drawn from other data; remove it, or name another --output_dir")
    if not missing:
        return
    train = data.read_split(task, "train", args.data_dir, args.max_train_samples)
    for size, _, _ in missing:
        if size > len(train.examples) or (size == len(train.examples) and ALL in args.plan):
            raise UserError(f"--plan {size}: {task.name} has {len(train.examples)} train records, which is {ALL}")
    rows = list(files.read_rows(train.path))
    os.makedirs(os.path.join(args.output_dir, "data"), exist_ok=True)
    marker = os.path.join(os.path.dirname(os.path.dirname(train.path)), data.GENERATED)
    if os.path.isfile(marker):  # parts of generated records are marked as such, too
        shutil.copy(marker, os.path.join(args.output_dir, "data"))
    for size, seed, directory in missing:
        order = np.random.default_rng(seed).permutation(len(train.examples))
        chosen = {train.examples[number].line for number in order[:size]}
        with files.whole_directory(directory) as scratch:
            part = [row for number, row in rows if number in chosen]
            files.write_json_lines(os.path.join(scratch, "train.json"), part)
            shutil.copy(data.split_path(task.name, "dev", args.data_dir), scratch)
            files.write_json(os.path.join(scratch, SOURCE), source)
            # A class that the draw has missed is still one of the task.
            files.write_json(os.path.join(scratch, "labels.json"), list(task.labels))


# Runs


def fine_tune(args, task, start, size, seed, learning_rate, steps):
    """The stage.json of a start, fine-tuned on so many records; from an earlier run if it is there.

    Raises: UserError if what is there was made in another way, or if run_clue.py fails.
    """
    part = part_of(args, task, size, seed)
    output = os.path.join(args.output_dir, task.name, start, f"{size}-{seed}", f"{learning_rate}_{steps}")
    path = args.starts[start]
    options = {
        "task_name": args.task_name, "output_dir": output, "data_dir": part, "device": args.device, "seed": seed,
        "learning_rate": learning_rate, "max_steps": steps, "save_steps": -(-steps // EVALUATIONS),
        "batch_size": args.batch_size, "max_seq_length": args.max_seq_length, "model_type": args.model_types.get(start),
        "max_train_samples": args.max_train_samples if size == ALL else None, "max_eval_samples": args.max_eval_samples,
    }  # fmt: skip
    if os.path.isfile(path):
        options.update(init_config=path, vocab_file=args.vocab_file)
    else:
        options["model_name_or_path"] = path
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    arguments = ["--group_by_length", *words]
    if not os.path.exists(os.path.join(output, records.RECORD)):
        run_script(arguments, output)
    record = records.read_record(output, "a fine-tuned model")
    other = [] if is_from(record, path) else ["another start"]
    md5 = {split: {"md5": data.md5_of(data.split_path(task.name, split, part))} for split in ("train", "dev")}
    asked = run_clue.parse_args(arguments)
    asked.device = record["arguments"]["device"]  # a study may go on with another one
    run = runs.Run("finetune", asked, record["parent"], md5)  # as run_clue.py sees it
    other += filter(None, [provenance.difference(run.identity_of(record), run.identity)])
    if other:
        raise UserError(f"{output}: made with {', '.join(other)}; remove it, or name another --output_dir")
    return record


def run_script(arguments, output):
    """Starts run_clue.py, whose output goes to <output>.log, and waits. Raises: UserError if it fails."""
    command = [sys.executable, RUN_CLUE, *arguments]
    os.makedirs(os.path.dirname(output), exist_ok=True)
    with open(f"{output}.log", "a") as log:
        before = log.tell()
        # With the study dies the training, which would otherwise keep its lock.
        streams = {"stdout": log, "stderr": subprocess.STDOUT, "preexec_fn": cli.die_with_parent}
        status = subprocess.run(command, **streams).returncode
    if status:
        with open(f"{output}.log") as log:
            log.seek(before)
            said = [f" ({line.strip()})" for line in log if ": error: " in line]
        raise UserError(f"run_clue.py failed with status {status}{''.join(said[-1:])}; its output is in {output}.log")


def is_from(record, path):
    """Whether a fine-tuned model was made from this start."""
    model, source = record["model"], record["model"]["initialized_from"]
    if os.path.isfile(path):  # an architecture, part of one, or a whole config.json, with more fields than count
        asked, made = files.read_json_object(path), model["architecture"]
        compared = [name for name in made if asked.get(name) is not None and name != "vocab_size"]
        return source == "random weights" and all(asked[name] == made[name] for name in compared)
    parent = checkpoints.parent_of_start(path) if os.path.isdir(path) else None
    if parent:
        return (record["parent"] or {}).get("weights") == parent["weights"]
    # Of a directory without stage.json, and of a built-in model, the name is all there is to compare.
    names = (files.relative(path),) if os.path.isdir(path) else (path, f"hfl/{path}")
    return record["parent"] is None and source in names


def study(args, task, start, size):
    """Searches with the first seed, then repeats the best setting with the others.

    Returns: {labels, learning_rate, steps, accuracies: one per seed, searched: {setting: accuracy}}
    """
    steps_to_try = args.plan[size]
    tried = {}
    for learning_rate, steps in itertools.product(args.learning_rates, steps_to_try):
        tried[learning_rate, steps] = fine_tune(args, task, start, size, args.seeds[0], learning_rate, steps)
    best = max(tried, key=lambda setting: records.score(tried[setting]))
    found = [tried[best]]
    for seed in args.seeds[1:] if size != ALL else []:
        found.append(fine_tune(args, task, start, size, seed, *best))
    accuracies = [round(records.score(record), 6) for record in found]
    labels = found[0]["data"]["train"]["examples"]
    print(
        f"{args.task_name} {start}, {labels} labels: {100 * np.mean(accuracies):.2f} "
        f"({', '.join(f'{100 * accuracy:.2f}' for accuracy in accuracies)}), learning rate {best[0]}, {best[1]} steps",
        flush=True,
    )
    searched = {f"{rate}, {steps} steps": round(records.score(record), 6) for (rate, steps), record in tried.items()}
    return {
        "labels": labels, "learning_rate": float(best[0]), "steps": best[1], "accuracies": accuracies,
        "best_steps": [record["metrics"]["step"] for record in found], "searched": searched,
        "seconds": round(sum(record["seconds"] for record in [*tried.values(), *found[1:]]), 1), "record": found[0],
    }  # fmt: skip


def check_twins(rows, compare):
    """Raises: UserError unless the compared starts have the same architecture, but for initializer and dropout."""
    shapes = []
    for start in compare:
        model = rows[start][0]["record"]["model"]
        shape = {"model_type": model["model_type"], **model["architecture"]}
        shapes.append({name: value for name, value in shape.items() if name not in NOT_SHAPE})
        if shapes[-1] != shapes[0]:
            raise UserError(f"--compare: {start} has not the architecture of {compare[0]}")


def main(argv=None):
    args = parse_args(argv)
    task = data.get_task(args.task_name, args.data_dir)
    if task.objective.metric != "accuracy":
        raise UserError(f"--task_name {args.task_name}: its metric is {task.objective.metric}; accuracy is needed")
    prepare(args, task)
    # Few labels first, so that the figures of most interest are there early, and all starts of a size together.
    rows = {start: [] for start in args.starts}
    for size in sorted(args.plan, key=lambda size: np.inf if size == ALL else size):
        for start in args.starts:
            rows[start].append(study(args, task, start, size))
        check_twins(rows, args.compare)
    _, majority = records.constant_answer(next(iter(rows.values()))[0]["record"]["data"]["dev"])
    print("\n".join(learning_curves.tables_of(rows, args.compare)))
    found = {"majority_class": majority, "compare": args.compare, "rows": rows}
    found["compared"] = learning_curves.compared(rows, args.compare)
    with files.Lock(args.json, wait=True):  # of two studies that end at the same time, neither overwrites the other
        tasks = {**read_tasks(args), task.name: found}
        files.write_json(args.json, tasks)
        learning_curves.draw(args.plot, tasks)
    return found


if __name__ == "__main__":
    cli.run(main)
