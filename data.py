"""The seven CLUE tasks, and tasks of your own: where their files lie, their labels, how a record becomes an Example.

A task's files are ``train.json``, ``dev.json`` and, if there is one, ``test.json``, with one JSON object per line, or
tables: ``train.csv`` or ``train.tsv`` with a header, ``text,label`` or ``sentence1,sentence2,label``. They are looked
for in ``--data_dir`` or ``$CLUE_DATA_DIR`` (as ``<task>_public/`` or ``<task>/``; a ``--data_dir`` may be the task's
directory itself). With neither given, PaddleNLP downloads the CLUE task to ``~/.paddlenlp/datasets/Clue/``.

A task of your own whose records have ``sentence``, or ``sentence1`` and ``sentence2``, and ``label``, or ``labels`` for
several labels per text, needs no line of code: name its directory with --data_dir. For records of another form, add a
Task below and a branch to texts_of. What is asked of a text (its objective) is in common/objectives.py.

    {"label": "104", "sentence": "股市收盘上涨"}   ->   Example("股市收盘上涨", None, 4, line 1): class 4 of TNEWS's 15
"""

import hashlib
import json
import os
import random
import sys
from dataclasses import dataclass, field, replace
from typing import Optional

import numpy as np

from common import UserError, batching, objectives
from common.batching import Example
from common.files import TABLES, read_rows, read_text_lines, relative, windows_form


# Fields in which records say what their label is called: of TNEWS, of IFLYTEK.
NAMES_IN_RECORDS = ("label_desc", "label_des")


@dataclass(frozen=True)
class Task:
    name: str  # as printed and in paths: upper case for CLUE
    labels: Optional[tuple] = None  # in PaddleNLP's order, which decides what each logit means
    # Number of records in the official train file; a smaller file is called partial (CLUE paper, table 1).
    train_size: Optional[int] = None
    # Epochs and maximum length of the original PP-MiniLM example's searches (run_all_search.sh in PaddleNLP).
    epochs: int = 3
    max_seq_length: int = 128
    train_files: tuple = ("train.json",)  # the first one found counts
    objective: objectives.Objective = field(default_factory=objectives.Classification)
    label_names: Optional[tuple] = None  # as people call them, in the order of ``labels``, if the data say it


OCNLI_TRAIN = ("train.50k.json", "train.json")  # the original download, and the name that other tasks have

# The one table of tasks, in the order of the original's search; launcher.sh finds the names here. Labels and file
# names are those of paddlenlp.datasets.clue; a test compares the labels.
TASKS = {
    task.name.lower(): task
    for task in (
        Task("AFQMC", ("0", "1"), 34334),
        Task("TNEWS", tuple("100 101 102 103 104 106 107 108 109 110 112 113 114 115 116".split()), 53360),
        Task("IFLYTEK", tuple(str(i) for i in range(119)), 12133, epochs=6),
        Task("OCNLI", ("entailment", "contradiction", "neutral"), 50437, epochs=6, train_files=OCNLI_TRAIN),
        Task("CMNLI", ("contradiction", "entailment", "neutral"), 391783),
        Task("CLUEWSC2020", ("true", "false"), 1244, epochs=50),
        Task("CSL", ("0", "1"), 20000, epochs=8, max_seq_length=256),
    )
}


# A file of this name beside the tasks' directories marks generated records (demo/generate_data.py writes it).
GENERATED = "GENERATED"


@dataclass
class Split:
    name: str  # train, dev, test
    path: str
    md5: str  # of the file
    examples: list = field(repr=False)
    objective: objectives.Objective = field(default_factory=objectives.Classification)
    partial: Optional[str] = None  # why it is not the whole official split
    outputs: Optional[int] = None  # number of the task's labels

    def targets(self):
        """Of the records, int64 or float32 [n, ...]."""
        return batching.targets(self.examples)

    def record_ids(self):
        """The ``id`` of each record in the file, by default its place, from 0: for CLUE's submission files."""
        return [row.get("id", place) for place, (_, row) in enumerate(read_rows(self.path))]

    def describe(self):
        """What stage.json says about the split: its file by name (files.relative), its md5, its size."""
        targets = np.array([example.label for example in self.examples if example.label is not None])
        form = windows_form(self.path)
        return {
            "file": relative(self.path),
            "md5": self.md5,
            "examples": len(self.examples),
            "pairs": self.examples[0].text_pair is not None,
            **(self.objective.constant_answer(targets, self.outputs) if len(targets) else {}),
            "partial": self.partial,
            **({"form": form} if form else {}),
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
        if any(os.path.isfile(os.path.join(directory, f"dev{ending}")) for ending in (".json", *TABLES)):
            return directory
    given = f"--data_dir {data_dir}" if data_dir else f"CLUE_DATA_DIR={root}"
    raise UserError(f"{given}: no dev.json for {task_name}; looked in {', '.join(dict.fromkeys(candidates))}")


def split_path(task_name, split, data_dir=None):
    """The file of a split, downloaded by PaddleNLP (which checks its md5) if no directory is named."""
    directory = find_data_dir(task_name, data_dir)
    task = TASKS.get(task_name.lower(), Task(task_name))
    if directory is None:
        from common import compat  # noqa: F401  before PaddleNLP, which imports Paddle
        from paddlenlp.datasets import load_dataset

        try:
            load_dataset("clue", task_name.lower(), splits=split)
        except Exception as error:  # of requests, of tarfile, or PaddleNLP's RuntimeError
            raise UserError(
                f"{task.name} could not be downloaded ({type(error).__name__}); with no network, name a directory with "
                "the CLUE files: --data_dir DIR or CLUE_DATA_DIR=DIR"
            ) from error
        return downloaded_path(task_name, split)
    names = task.train_files if split == "train" else (f"{split}.json",)
    names = (*names, *(split + ending for ending in TABLES))
    found = [name for name in names if os.path.isfile(os.path.join(directory, name))]
    if any(name.endswith(tuple(TABLES)) for name in found[1:]):
        raise UserError(f"{directory}: {' and '.join(found)}; only one file may hold the {split} records")
    if found:
        return os.path.join(directory, found[0])
    raise UserError(f"{directory}: no {' or '.join(names)} there")


def is_local(task_name, split, data_dir=None):
    """Whether a split lies on this machine, so that reading it starts no download. Raises: as find_data_dir."""
    return find_data_dir(task_name, data_dir) is not None or os.path.isfile(downloaded_path(task_name, split))


def downloaded_path(task_name, split):
    """Where PaddleNLP keeps a split of a CLUE task, whether it is there or not."""
    from common import compat  # noqa: F401  before PaddleNLP, which imports Paddle
    from paddlenlp.datasets.clue import Clue
    from paddlenlp.utils.env import DATA_HOME

    return os.path.join(DATA_HOME, "Clue", Clue.BUILDER_CONFIGS[task_name.lower()]["splits"][split][0])


def get_task(task_name, data_dir=None, objective=None):
    """The Task of that name. For a task that is not in TASKS the labels come from ``labels.json`` (a JSON list, or one
    object with ``label`` per line, as CLUE has it); without that file they are the sorted labels of ``train.json``.

    Args: objective: name of one (default: CLUE's classification; for a task of your own, what its records look like).
    """
    if task_name.lower() in TASKS and objective in (None, objectives.Classification.name):
        return TASKS[task_name.lower()]
    if objective:
        objective = objectives.named(objective)
    else:
        _, first_record = next(read_rows(split_path(task_name, "dev", data_dir)), (0, {}))
        objective = objectives.of_records_like(first_record)
    directory = find_data_dir(task_name, data_dir)
    labels, names = read_labels_file(directory) if directory else (None, None)
    if labels is None:
        path = split_path(task_name, "train", data_dir)
        types = {}
        for number, row in read_rows(path):
            for label in objective.labels_in(row):
                if str(label) != str(label).strip() or types.setdefault(str(label), type(label)) is not type(label):
                    raise UserError(f"{path}:{number}: label {label!r} has blanks around it, or is of two types")
        labels = tuple(sorted(types))
        if not labels:
            raise UserError(f"{path}: no usable record for {objective.name} (--objective chooses what is asked)")
    if len(labels) < objective.fewest_labels or len(set(labels)) < len(labels):
        wanted = "at least two labels are" if objective.fewest_labels == 2 else "at least one label is"
        raise UserError(f"{task_name}: {wanted} needed, each once; found {list(labels)[:10]}")
    known = TASKS.get(task_name.lower(), Task(task_name))
    return replace(known, labels=labels, label_names=names, objective=objective)


def choose_task(args):
    """The Task that --task_name, --objective and --metric choose, as get_task.

    args.metric becomes what is recorded: None for the objective's own, which it was before there was a choice.
    """
    task = get_task(args.task_name, args.data_dir, args.objective)
    objective = task.objective.selecting_by(args.metric) if args.metric else task.objective
    args.metric = None if objective == task.objective else args.metric
    return replace(task, objective=objective)


def read_labels_file(directory):
    """(labels, their names or None) of ``labels.json`` (a JSON list, or one object with ``label`` and, as TNEWS has it,
    ``label_desc`` per line) or ``labels.txt`` (one label per line); (None, None) if there is neither.

    Raises: UserError if a file has another form, or if there are both.
    """
    paths = [os.path.join(directory, name) for name in ("labels.json", "labels.txt")]
    path, *others = [path for path in paths if os.path.isfile(path)] or [None]
    if others:
        raise UserError(f"{directory}: labels.json and labels.txt; only one file may hold the labels")
    if path is None:
        return None, None
    lines = [line.strip() for _, line in read_text_lines(path) if line.strip()]
    if path.endswith(".txt"):
        return tuple(lines), None
    try:
        rows = json.loads("\n".join(lines)) if lines[:1] and lines[0].startswith("[") else list(map(json.loads, lines))
        labels = tuple(str(row["label"] if isinstance(row, dict) else row) for row in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: neither a JSON list of labels nor one {{"label": ...}} per line') from error
    names = [
        next((str(row[key]) for key in NAMES_IN_RECORDS if key in row), None) for row in rows if isinstance(row, dict)
    ]
    return labels, tuple(names) if names and all(names) else None


def label_names(task, split):
    """The names of a task's labels in their order, as a list: those of labels.json, or what the records of a split call
    them (``label_desc`` in TNEWS, ``label_des`` in IFLYTEK); None if they do not say it of every label, or if two
    records differ. Args: split: Split of train.
    """
    if task.label_names:
        return list(task.label_names)
    found = {}
    for _, row in read_rows(split.path):
        name = next((row[key] for key in NAMES_IN_RECORDS if isinstance(row.get(key), str)), None)
        label = row.get("label")
        if name is None or not isinstance(label, (str, int)) or found.setdefault(str(label), name) != name:
            return None
    return [found[label] for label in task.labels] if set(found) == set(task.labels) else None


def task_of(record):
    """The Task of a model: objective and labels are those of its stage.json, in the order of its logits."""
    known = TASKS.get(record["task"].lower(), Task(record["task"]))
    objective, labels = objectives.of_record(record), tuple(record["labels"])
    names = record["model"].get("label_names")
    return replace(known, name=record["task"], labels=labels, objective=objective, label_names=names)


def mark_spans(text, target):
    """CLUEWSC2020: marks what the question is about: 小明感谢了小刚，因为他... -> _小明_感谢了小刚，因为[他]...

    ``_`` goes around the noun phrase (span 1) and ``[`` ``]`` around the pronoun (span 2).

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
        # The second number orders marks at one place: a closing mark comes before an opening one.
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
    elif "sentence1" in row:
        pair = row["sentence1"], row["sentence2"]
    else:
        keys = ", ".join(map(repr, row))[:60]
        raise ValueError(f"no sentence, and no sentence1 and sentence2, but {keys or 'nothing'}; see data.texts_of")
    return checked_texts(*pair)


def checked_texts(text, text_pair):
    """(text, text_pair). Raises: TypeError or ValueError for what is no text, and for an empty one."""
    if not isinstance(text, str) or not isinstance(text_pair, (str, type(None))):
        raise TypeError("a text is not a string")
    if not text.strip() or (text_pair is not None and not text_pair.strip()):
        raise ValueError("a text is empty")
    return text, text_pair


def own_texts_of(task_name, row):
    """As texts_of, for texts to classify: besides the task's records also ``text`` and, of a pair, ``text_pair``."""
    try:
        return texts_of(task_name, row)
    except (KeyError, TypeError, ValueError):
        # A record of CLUEWSC2020 has a text, too; without its target, the spans are marked in the text already.
        if "text" not in row or (task_name.lower() == "cluewsc2020" and "target" in row):
            raise
    return checked_texts(row["text"], row.get("text_pair"))


def read_split(task, split, data_dir=None, max_samples=None, texts_of=texts_of):
    """Reads a split of a task. Records whose label the objective leaves out (``-`` in CLUE) are dropped.

    Args: max_samples: use only that many records, always the same ones. texts_of: function as texts_of above, for
        records of another form.
    Returns: Split. Raises: UserError naming file and line of a record that does not fit the task.
    """
    limit = f"--max_{'train' if split == 'train' else 'eval'}_samples"
    path = split_path(task.name, split, data_dir)
    examples = []
    for number, row in read_rows(path):
        try:
            # CLUE keeps the labels of test to itself.
            target = None if split == "test" else task.objective.read_label(row, task.labels)
            if target is None and split != "test":
                continue
            text, text_pair = texts_of(task.name, row)
        except KeyError as error:
            raise UserError(f"{path}:{number}: no field {error}; a record of {task.name} needs it") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}:{number}: {error}") from error
        examples.append(Example(text, text_pair, target, number))
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
    return Split(split, path, md5_of(path), examples, task.objective, partial, task.labels and len(task.labels))


def md5_of(path):
    with open(path, "rb") as file:
        return hashlib.md5(file.read()).hexdigest()


def read_train_and_dev(task, args, texts_of=texts_of):
    """{"train": Split, "dev": Split} as --data_dir and the sample limits say. Args: texts_of: as of read_split."""
    return {
        "train": read_split(task, "train", args.data_dir, args.max_train_samples, texts_of),
        "dev": read_split(task, "dev", args.data_dir, args.max_eval_samples, texts_of),
    }


def read_dev_if_local(task, args):
    """32 dev examples, or none: an export compares a few logits, for which it starts no download.

    Any tokens will do, so records of another form are named in a note, and random tokens used.

    Raises: UserError if --data_dir was given and holds no dev.json.
    """
    try:
        local = is_local(task.name, "dev", args.data_dir)
    except UserError:
        if args.data_dir:
            raise
        local = False
    if not local:
        return []
    try:
        return read_split(task, "dev", args.data_dir, min(args.max_eval_samples or 32, 32)).examples
    except UserError as error:
        print(f"note: {error}; random tokens are compared instead", file=sys.stderr)
        return []
