"""Texts of the user's own: read from arguments, a file or standard input, and answered by one JSON line each. And the
answers for a test split, as CLUE takes them."""

import os
import sys

import numpy as np

import data
import utils
from utils import UserError


def add_text_arguments(group):
    group.add_argument("--text", nargs="+", help="classify these texts")
    group.add_argument("--text_pair", nargs="+", help="the second text of each, for sentence-pair tasks")
    group.add_argument(
        "--input_file",
        help="classify a file: one text a line (a tab before the second text of a pair), "
        "or .json with one record of the task a line; - is standard input",
    )


def read_texts(args, task_name, pairs):
    """The texts that add_text_arguments' options name, as data.Example.

    Args: pairs: whether the model takes sentence pairs; None if that is not known.
    Raises: UserError for an empty text, or a pair where none is wanted.
    """
    if args.text:
        rows = list(zip(args.text, args.text_pair or [None] * len(args.text)))
        if args.text_pair and len(args.text_pair) != len(args.text):
            raise UserError(f"--text_pair: {len(args.text_pair)} texts for {len(args.text)} of --text")
    elif args.input_file.endswith((".json", ".jsonl")):
        rows = []
        for number, row in data.read_rows(args.input_file):
            try:
                rows.append(data.texts_of(task_name, row))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{args.input_file}:{number}: not a record of {task_name}: {error}") from error
    else:
        try:
            file = sys.stdin if args.input_file == "-" else open(args.input_file, encoding="utf-8")
            with file:
                rows = [tuple((line.rstrip("\r\n").split("\t", 1) + [None])[:2]) for line in file]
        except UnicodeDecodeError as error:
            raise UserError(f"--input_file {args.input_file}: not UTF-8 ({error.reason})") from error
    for number, row in enumerate(rows, 1):
        if not row[0].strip() or (row[1] is not None and not row[1].strip()):
            raise UserError(f"text {number} is empty")
        if pairs is not None and pairs != (row[1] is not None):
            wanted = "sentence pairs (--text A --text_pair B; in a file, a tab between)" if pairs else "single texts"
            raise UserError(f"text {number}: {task_name} takes {wanted}")
    if len({row[1] is None for row in rows}) > 1:
        raise UserError("some texts are single, others sentence pairs")
    if not rows:
        raise UserError(f"--input_file {args.input_file}: no text in it")
    return [data.Example(text, pair, None, number) for number, (text, pair) in enumerate(rows, 1)]


def probabilities(logits):
    """Softmax over the classes: float64 [n, classes] of logits [n, classes]."""
    logits = np.asarray(logits, "float64")
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def answer(example, labels, row):
    """What a JSON line says about a text, given the probabilities ``row`` of its classes, which ``labels`` names."""
    best = int(np.argmax(row))
    said = {
        "text": example.text,
        "label": labels[best],
        "probability": round(float(row[best]), 6),
        "probabilities": {label: round(float(p), 6) for label, p in zip(labels, row)},
    }
    return said if example.text_pair is None else {**said, "text_pair": example.text_pair}


def submission_path(task_name, directory):
    return os.path.join(directory, f"{task_name.lower()}_predict.json")


def write_submission(task, test, logits, directory):
    """Writes the predictions for a test split as CLUE takes them: one {"id", "label"} a line, in the file's order.

    Args: test: Split of every test record. logits: [records, classes]. Returns: its path in ``directory``.
    """
    ids = [row.get("id", number) for number, (_, row) in enumerate(data.read_rows(test.path))]
    labels = [task.labels[i] for i in np.asarray(logits).argmax(-1)]
    path = submission_path(task.name, directory)
    utils.write_json_lines(path, [{"id": i, "label": label} for i, label in zip(ids, labels)])
    return path
