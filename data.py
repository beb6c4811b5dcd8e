"""The seven CLUE classification tasks, and tasks of the user's own: reading, features, batches, accuracy.

A task's files are ``train.json``, ``dev.json`` and, if there is one, ``test.json`` with one JSON object a line. They
are looked for in ``--data_dir`` or ``$CLUE_DATA_DIR`` (as ``<task>_public/`` or ``<task>/``; a ``--data_dir`` may be
the task's directory itself); with neither given, PaddleNLP downloads the CLUE task to ``~/.paddlenlp/datasets/Clue/``.
"""

import hashlib
import json
import os
import random
from dataclasses import dataclass, field
from typing import List, NamedTuple, Optional

import numpy as np

from records import relative
from utils import UserError


@dataclass(frozen=True)
class Task:
    name: str  # as printed and in paths: upper case for CLUE
    labels: Optional[tuple] = None  # in PaddleNLP's order, which decides what each logit means
    train_size: Optional[int] = (
        None  # of the official train file; a smaller one is called partial (CLUE paper, table 1)
    )
    train_files: tuple = ("train.json",)  # the first one found counts


# Labels and file names: paddlenlp.datasets.clue; a test compares the labels.
TASKS = {
    task.name.lower(): task
    for task in (
        Task("AFQMC", ("0", "1"), 34334),
        Task("TNEWS", tuple("100 101 102 103 104 106 107 108 109 110 112 113 114 115 116".split()), 53360),
        Task("IFLYTEK", tuple(str(i) for i in range(119)), 12133),
        Task("OCNLI", ("entailment", "contradiction", "neutral"), 50437, ("train.50k.json", "train.json")),
        Task("CMNLI", ("contradiction", "entailment", "neutral"), 391783),
        Task("CLUEWSC2020", ("true", "false"), 1244),
        Task("CSL", ("0", "1"), 20000),
    )
}


# A file of this name beside the tasks' directories: the records are invented (demo/generate_data.py).
GENERATED = "GENERATED"


class Example(NamedTuple):
    text: str
    text_pair: Optional[str]
    label: Optional[int]
    line: int  # in its file, from 1


class Feature(NamedTuple):
    input_ids: List[int]
    token_type_ids: List[int]
    label: Optional[int]


class Batch(NamedTuple):
    input_ids: np.ndarray  # int64 [batch_size, length of its longest sequence]
    token_type_ids: np.ndarray  # int64, same shape
    labels: Optional[np.ndarray]  # int64 [batch_size]
    index: np.ndarray  # int64 [batch_size], where each row stands in the features


@dataclass
class Split:
    name: str
    path: str
    md5: str
    examples: list = field(repr=False)
    partial: Optional[str] = None

    def describe(self):
        """What stage.json says about these data: the file by its last two names at most, never where it lies."""
        counts = np.bincount([e.label for e in self.examples if e.label is not None], minlength=1)
        return {
            "file": relative(self.path),
            "md5": self.md5,
            "examples": len(self.examples),
            "pairs": self.examples[0].text_pair is not None,
            "majority_class": round(float(counts.max()) / max(len(self.examples), 1), 6),
            "partial": self.partial,
        }


def find_data_dir(task_name, data_dir=None):
    """The directory with the task's files, or None if it is left to PaddleNLP's download.

    Raises: UserError if a directory was named and has no ``dev.json`` for this task.
    """
    root = data_dir or os.environ.get("CLUE_DATA_DIR")
    name = task_name.lower()
    if not root:
        if name in TASKS:
            return None
        raise UserError(
            f"{task_name}: not one of {', '.join(t.name for t in TASKS.values())}; for a task of your own name its "
            "directory with --data_dir, or the directory that holds it with CLUE_DATA_DIR"
        )
    candidates = [os.path.join(root, sub) for sub in (f"{name}_public", name, task_name)]
    if data_dir:
        candidates.append(root)
    for directory in candidates:
        if os.path.isfile(os.path.join(directory, "dev.json")):
            return directory
    given = f"--data_dir {data_dir}" if data_dir else f"CLUE_DATA_DIR={root}"
    raise UserError(f"{given}: no dev.json for {task_name}; looked in {', '.join(dict.fromkeys(candidates))}")


def split_path(task_name, split, data_dir=None):
    """The file of a split, downloaded by PaddleNLP (which checks its md5) if no directory is named."""
    directory = find_data_dir(task_name, data_dir)
    task = TASKS.get(task_name.lower(), Task(task_name))
    if directory is None:
        from paddlenlp.datasets import load_dataset

        try:
            load_dataset("clue", task_name.lower(), splits=split)
        except Exception as error:  # requests, tarfile and PaddleNLP's own RuntimeError all end up here
            raise UserError(
                f"{task.name} could not be downloaded ({type(error).__name__}); with no network, name a directory with "
                "the CLUE files: --data_dir DIR or CLUE_DATA_DIR=DIR"
            ) from error
        return downloaded_path(task_name, split)
    names = task.train_files if split == "train" else (f"{split}.json",)
    for name in names:
        if os.path.isfile(os.path.join(directory, name)):
            return os.path.join(directory, name)
    raise UserError(f"{directory}: no {' or '.join(names)} there")


def is_local(task_name, split, data_dir=None):
    """Whether a split lies on this machine, so that reading it starts no download. Raises: as find_data_dir."""
    return find_data_dir(task_name, data_dir) is not None or os.path.isfile(downloaded_path(task_name, split))


def downloaded_path(task_name, split):
    """Where PaddleNLP keeps a split of a CLUE task, whether it is there or not."""
    from paddlenlp.datasets.clue import Clue
    from paddlenlp.utils.env import DATA_HOME

    return os.path.join(DATA_HOME, "Clue", Clue.BUILDER_CONFIGS[task_name.lower()]["splits"][split][0])


def get_task(task_name, data_dir=None):
    """The Task of that name. For a task that is not CLUE's the labels come from ``labels.json`` (a JSON list, or one
    object with ``label`` a line, as CLUE has it), else they are the sorted labels of ``train.json``."""
    if task_name.lower() in TASKS:
        return TASKS[task_name.lower()]
    labels_file = os.path.join(find_data_dir(task_name, data_dir), "labels.json")
    if os.path.isfile(labels_file):
        try:
            with open(labels_file, encoding="utf-8") as file:
                text = file.read().strip()
            rows = (
                json.loads(text) if text.startswith("[") else [json.loads(line)["label"] for line in text.split("\n")]
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{labels_file}: neither a JSON list of labels nor one {{"label": ...}} a line') from error
        labels = tuple(str(label) for label in rows)
    else:
        path = split_path(task_name, "train", data_dir)
        found = {}
        for number, row in read_rows(path):
            label = row.get("label", "-")
            if str(label) != str(label).strip() or found.setdefault(str(label), type(label)) is not type(label):
                raise UserError(f"{path}:{number}: label {label!r} has blanks around it, or is of two types")
        labels = tuple(sorted(set(found) - {"-"}))
        if not labels:
            raise UserError(f"{path}: no usable record")
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise UserError(f"{task_name}: at least two labels are needed, each once; found {list(labels)[:10]}")
    return Task(task_name, labels)


def read_rows(path):
    """Yields (line number, JSON object) of a file with one object a line; UserError names file and line."""
    with open(path, "rb") as file:  # in bytes: str lines would also end at U+2028, which texts contain
        for number, line in enumerate(file, 1):
            if line.endswith(b"\r\n"):
                raise UserError(f"{path}:{number}: the line ends in CRLF, not LF; sed -i 's/\\r$//' mends the file")
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from error
            except ValueError as error:
                raise UserError(f"{path}:{number}: not a JSON object ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: a JSON object is needed, not {type(row).__name__}")
            yield number, row


def mark_spans(text, target):
    """CLUEWSC2020: ``_`` around the noun phrase (span 1) and ``[`` ``]`` around the pronoun (span 2).

    Raises: ValueError if a span's text is not where its index says.
    """
    inserts = []
    for key, (opening, closing) in {"span1": "__", "span2": "[]"}.items():
        start, span = target[f"{key}_index"], target[f"{key}_text"]
        end = start + len(span)
        if start < 0 or not span or text[start:end] != span:
            raise ValueError(
                f"{key}_text {span!r} is not at index {start}, where the text has {text[max(start, 0) : end]!r}"
            )
        # The second number orders marks at one place: what closes there comes before what opens.
        inserts += [(start, 1, opening), (end, 0, closing)]
    for position, _, mark in sorted(inserts, reverse=True):  # from the right, so that indices stay true
        text = text[:position] + mark + text[position:]
    return text


def texts_of(task_name, row):
    """(text, text_pair or None) of a record. Raises: KeyError, TypeError, ValueError for a record of another form."""
    name = task_name.lower()
    if name == "cluewsc2020":
        pair = mark_spans(row["text"], row["target"]), None
    elif name == "csl":
        if not isinstance(row["keyword"], list):
            raise TypeError("keyword is not a list")
        pair = " ".join(row["keyword"]), row["abst"]
    elif "sentence" in row:
        pair = row["sentence"], None
    else:
        pair = row["sentence1"], row["sentence2"]
    if not isinstance(pair[0], str) or not isinstance(pair[1], (str, type(None))):
        raise TypeError("a text is not a string")
    return pair


def read_split(task, split, data_dir=None, max_samples=None):
    """Reads a split of ``task``; records labelled ``-`` (no agreement among annotators) are dropped.

    Returns: Split. Raises: UserError naming file and line of a record that is not as it should be.
    """
    limit = f"--max_{'train' if split == 'train' else 'eval'}_samples"
    if max_samples is not None and max_samples <= 0:
        raise UserError(f"{limit} {max_samples}: must be above 0")
    path = split_path(task.name, split, data_dir)
    label_ids = {label: i for i, label in enumerate(task.labels)}
    examples = []
    for number, row in read_rows(path):
        label = str(row.get("label", "-"))
        if split != "test" and "label" not in row:
            raise UserError(f"{path}:{number}: no label")
        if split != "test" and label == "-":
            continue
        if split != "test" and label not in label_ids:
            raise UserError(f"{path}:{number}: label {label!r} is not one of {task.name}'s: {', '.join(task.labels)}")
        try:
            text, text_pair = texts_of(task.name, row)
        except KeyError as error:
            raise UserError(f"{path}:{number}: no field {error}; a record of {task.name} needs it") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}:{number}: {error}") from error
        examples.append(Example(text, text_pair, label_ids.get(label), number))
    if not examples:
        raise UserError(f"{path}: no usable record")
    if len({e.text_pair is None for e in examples}) > 1:
        raise UserError(f"{path}: some records are sentences, others sentence pairs")
    partial = None
    if os.path.isfile(os.path.join(os.path.dirname(os.path.dirname(path)), GENERATED)):
        partial = f"{len(examples)} generated {split} records, nothing of CLUE"
    elif split == "train" and task.train_size and len(examples) < task.train_size:
        partial = f"{len(examples)} of {task.train_size} official train records"
    if max_samples and max_samples < len(examples):
        partial = f"{max_samples} of {len(examples)} {split} records ({limit})"
        examples = random.Random(0).sample(examples, max_samples)  # a fixed choice, whatever --seed is
    return Split(split, path, md5_of(path), examples, partial)


def md5_of(path):
    with open(path, "rb") as file:
        return hashlib.md5(file.read()).hexdigest()


def read_train_and_dev(task, args):
    """{"train": Split, "dev": Split} as --data_dir and the sample limits say."""
    return {
        "train": read_split(task, "train", args.data_dir, args.max_train_samples),
        "dev": read_split(task, "dev", args.data_dir, args.max_eval_samples),
    }


def convert(examples, tokenizer, max_seq_length):
    """Examples to a list of Feature, all at once: tokenizing in the training loop would repeat it every epoch."""
    pairs = [e.text_pair for e in examples] if examples and examples[0].text_pair is not None else None
    encoded = tokenizer.encode([e.text for e in examples], pairs, max_seq_length)
    return [Feature(ids, types, example.label) for (ids, types), example in zip(encoded, examples)]


def by_length(features):
    """An order that puts sequences of similar length together, so that evaluation computes little padding."""
    return np.argsort([len(f.input_ids) for f in features], kind="stable")


def collate(features, index, pad_id=0, length=None):
    """The Batch of ``features[i] for i in index``, padded to its longest sequence, or to ``length``."""
    rows = [features[i] for i in index]
    shape = len(rows), length or max(len(row.input_ids) for row in rows)
    input_ids = np.full(shape, pad_id, dtype="int64")
    token_type_ids = np.zeros(shape, dtype="int64")
    for i, row in enumerate(rows):
        input_ids[i, : len(row.input_ids)] = row.input_ids
        token_type_ids[i, : len(row.token_type_ids)] = row.token_type_ids
    labels = None if rows[0].label is None else np.array([row.label for row in rows], dtype="int64")
    return Batch(input_ids, token_type_ids, labels, np.asarray(index))


def round_up(length, longest):
    """The next multiple of 2, above 32 of 4, above 64 of 16, but not above ``longest``: oneDNN prepares its operators
    anew, and copies their weights, for every shape."""
    step = 2 if length <= 32 else 4 if length <= 64 else 16
    return min(-(-length // step) * step, longest)


def batches(features, batch_size, pad_id=0, order=None, longest=None):
    """Yields Batch by Batch in ``order`` (default: as they come); the last one may be smaller.

    Args: longest: pad each to a length that round_up(.., longest) gives, and not just to its longest sequence.
    """
    order = np.arange(len(features)) if order is None else order
    lengths = [len(feature.input_ids) for feature in features]
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        length = max(lengths[i] for i in index)
        yield collate(features, index, pad_id, round_up(length, longest) if longest else length)


def gather(computed, count):
    """float32 [count, classes] of the (Batch, logits) pairs that ``computed`` yields, each row where its index says."""
    logits = None
    for batch, rows in computed:
        logits = np.empty((count, rows.shape[1]), "float32") if logits is None else logits
        logits[batch.index] = rows
    return logits


def accuracy(logits, labels):
    """Share of rows whose largest logit is the label's. logits: [n, classes], labels: [n]."""
    return float((np.asarray(logits).argmax(-1) == np.asarray(labels)).mean())
