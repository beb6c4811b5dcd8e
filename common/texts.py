"""The user's own texts: read from arguments, a file or standard input; answered by one JSON line each."""

import os
import sys

from common import UserError, batching, files


def add_text_arguments(group):
    group.add_argument("--text", nargs="+", help="classify these texts")
    group.add_argument("--text_pair", nargs="+", help="the second text of each, for sentence-pair tasks")
    group.add_argument(
        "--input_file",
        help="classify a file: one text per line (a tab before the second text of a pair), or .json with one record "
        "of the task per line, or a .csv or .tsv with a header; - is standard input",
    )


def read_texts(args, task_name, pairs, texts_of):
    """The texts that the options of add_text_arguments name.

    Args: pairs: whether the model takes sentence pairs; None if that is not known. texts_of: data.texts_of.
    Returns: list of batching.Example. Raises: UserError for an empty text, or a pair where none is wanted.
    """
    if args.text:
        if args.text_pair and len(args.text_pair) != len(args.text):
            raise UserError(f"--text_pair: {len(args.text_pair)} texts for {len(args.text)} of --text")
        rows = list(zip(args.text, args.text_pair or [None] * len(args.text)))
    elif args.input_file.endswith((".json", ".jsonl", *files.TABLES)):
        rows = list(_read_records(args.input_file, task_name, texts_of))
    else:
        rows = list(_read_lines(args.input_file))
    for number, (text, pair) in enumerate(rows, 1):
        if not text.strip() or (pair is not None and not pair.strip()):
            raise UserError(f"text {number} is empty")
        if pairs is not None and pairs != (pair is not None):
            wanted = "sentence pairs (--text A --text_pair B; in a file, a tab between)" if pairs else "single texts"
            raise UserError(f"text {number}: {task_name} takes {wanted}")
    if len({pair is None for _, pair in rows}) > 1:
        raise UserError("some texts are single, others sentence pairs")
    if not rows:
        raise UserError(f"--input_file {args.input_file}: no text in it")
    return [batching.Example(text, pair, None, number) for number, (text, pair) in enumerate(rows, 1)]


def _read_records(path, task_name, texts_of):
    for number, row in files.read_rows(path):
        try:
            yield texts_of(task_name, row)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}:{number}: not a record of {task_name}: {error}") from error


def _read_lines(path):
    try:
        lines = (
            (line.rstrip("\r\n") for line in sys.stdin) if path == "-" else (t for _, t in files.read_text_lines(path))
        )
        for line in lines:
            text, tab, pair = line.partition("\t")
            yield text, pair if tab else None
    except UnicodeDecodeError as error:
        raise UserError(f"--input_file {path}: not UTF-8 ({error.reason})") from error


def named(answer, labels, names):
    """What to add to an answer, or to the service's answers to several texts: what the classes are called.

    Args: answer: with ``label`` or ``labels``. names: of the labels, or None if nobody said them. Returns: a dict.
    """
    if not names:
        return {}

    def of(label):
        return [of(one) for one in label] if isinstance(label, list) else names[labels.index(label)]

    return {key.replace("label", "label_name"): of(answer[key]) for key in ("label", "labels") if key in answer}


def with_texts(example, found, labels, names=None):
    """The JSON object that answers a text. Args: found: what the objective answers. names: of the labels."""
    fields = {"text": example.text, **found, **named(found, labels, names)}
    if example.text_pair is not None:
        fields["text_pair"] = example.text_pair
    return fields


def answer(example, objective, logits, labels, names=None):
    """As with_texts. Args: objective: of the model. logits: [outputs], of ``labels``."""
    return with_texts(example, objective.answer(logits, labels), labels, names)


def submission_path(task_name, directory):
    return os.path.join(directory, f"{task_name.lower()}_predict.json")


def write_submission(task, ids, logits, directory):
    """Writes the predictions for a test file as CLUE takes them: one {"id", "label"} per line, in the file's order.

    Args: task: data.Task, whose objective may put something else beside the id. ids: of the records.
        logits: [records, outputs]. Returns: path of the file.
    """
    rows = [{"id": i, **task.objective.prediction(row, task.labels)} for i, row in zip(ids, logits)]
    path = submission_path(task.name, directory)
    files.write_json_lines(path, rows)
    return path
