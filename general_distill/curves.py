"""Plots the results of general distillation: losses of teacher and student, accuracy of the student after fine-tuning.

Reads the stage.json files of a pre-trained teacher, a distilled student, and of models fine-tuned from the student and
from random weights with the same settings (several seeds of each). Writes a plot, and its figures as JSON.

    python curves.py --teacher teacher --student pretrain/model_6000 --distilled d1 d2 d3 --random r1 r2 r3 \\
        --output curves.png --json ../results/distillation.json
"""

import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import numpy as np

from common import UserError, cli, files, plots, records


# Arguments of run_clue.py that must be equal in all compared runs: all that affect training, except the seed.
SHARED_ARGUMENTS = (
    "model_type learning_rate batch_size num_train_epochs max_steps weight_decay warmup_steps warmup_proportion "
    "adam_epsilon max_grad_norm group_by_length save_steps max_seq_length max_train_samples max_eval_samples "
    "use_faster_tokenizer"
).split()


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--teacher", required=True, help="directory that demo/pretrain_mlm.py wrote")
    parser.add_argument("--student", required=True, help="directory that general_distill.py wrote")
    help = "models fine-tuned from the student, one per seed"
    parser.add_argument("--distilled", nargs="+", required=True, help=help)
    parser.add_argument("--random", nargs="+", required=True, help="models trained from random weights, one per seed")
    parser.add_argument("--output", required=True, help="PNG file of the plot")
    parser.add_argument("--json", required=True, help="JSON file of the figures")
    return parser.parse_args(argv)


def read_runs(directories):
    """[{seed, accuracy, evaluations: [[step, accuracy], ...]}] of fine-tuned models."""
    runs = []
    for directory in directories:
        record = records.read_record(directory, "a fine-tuned model")
        with open(os.path.join(directory, "evaluations.jsonl"), encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        evaluations = [[row["step"], row["accuracy"]] for row in rows]
        figures = {"seed": record["arguments"]["seed"], "accuracy": record["metrics"]["accuracy"]}
        runs.append({**figures, "evaluations": evaluations, "record": record})
    return runs


def check_twins(distilled, random, student):
    """Raises: UserError unless the runs differ only in seed and start, and ``distilled`` start from that student."""
    settings = set()
    for run in distilled + random:
        arguments = {name: run["record"]["arguments"][name] for name in SHARED_ARGUMENTS}
        data = {name: split["md5"] for name, split in run["record"]["data"].items()}
        settings.add(json.dumps([arguments, data, run["record"]["model"]["architecture"]], sort_keys=True))
    if len(settings) > 1:
        raise UserError("--distilled, --random: the runs differ in more than seed and start")
    if any((run["record"]["parent"] or {}).get("weights") != student["weights"] for run in distilled):
        raise UserError("--distilled: not fine-tuned from that --student")
    if any(run["record"]["parent"] for run in random):
        raise UserError("--random: not from random weights")


def main(argv=None):
    args = parse_args(argv)
    teacher = records.read_record(args.teacher, "a pre-trained teacher")
    student = records.read_record(args.student, "a distilled student")
    runs = {"distilled": read_runs(args.distilled), "random": read_runs(args.random)}
    check_twins(runs["distilled"], runs["random"], student)
    means = {name: float(np.mean([run["accuracy"] for run in group])) for name, group in runs.items()}
    figures = {
        "teacher": {"record": teacher, "step, loss, accuracy": teacher["history"]},
        "student": {"record": student, "step, loss": student["losses"]},
        **runs,
        "mean accuracy": means,
        "gain": means["distilled"] - means["random"],
    }
    files.write_json(args.json, figures)
    draw(args.output, teacher, student, runs)
    task = runs["random"][0]["record"]["task"]
    print(
        f"{task}: distilled {means['distilled'] * 100:.2f}, random {means['random'] * 100:.2f}, gain "
        f"{figures['gain'] * 100:+.2f} points (means of {len(args.distilled)} and {len(args.random)} seeds)"
    )
    return figures


def draw(path, teacher, student, runs):
    pyplot = plots.import_pyplot()
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8))
    steps, losses, accuracies = zip(*teacher["history"])
    left.plot(steps, losses, label="loss, nats")
    twin = left.twinx()
    twin.plot(steps, accuracies, color="C1", label="accuracy (right)")
    left.set(title="teacher: masked tokens", xlabel="step")
    left.legend(loc="upper center")
    twin.legend(loc="center right")
    middle.plot(*zip(*student["losses"]))
    middle.set(title="student: relation loss", xlabel="step", ylabel="KL per row, Q + K + V, nats")
    for color, (name, group) in zip(("C2", "C3"), runs.items()):
        for number, run in enumerate(group):
            xs, ys = zip(*run["evaluations"])
            label = f"{name} start, {len(group)} seeds" if number == 0 else None
            right.plot(xs, [y * 100 for y in ys], color=color, alpha=0.8, marker=".", label=label)
    right.set(title=f"{runs['random'][0]['record']['task']} dev accuracy, %", xlabel="fine-tuning step")
    right.legend(loc="lower right")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.tight_layout(w_pad=2.5)
    figure.savefig(path, dpi=100, format="png")


if __name__ == "__main__":
    cli.run(main)
