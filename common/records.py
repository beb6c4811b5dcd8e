"""stage.json: what a stage did, from what, with what result. Its schema, reading, writing, and lineage.

Every output directory carries one. The next stage and summarize.py read it, never a log.
"""

import contextlib
import json
import os
import platform
from typing import Any, Optional

import pydantic

from common import CORES, UserError, files, objectives

RECORD = "stage.json"
VERSION = 3
# What a later stage reads besides the weights. Their hashes are the record's ``files``.
BESIDE_WEIGHTS = ("config.json", "vocab.txt", "tokenizer_config.json")

Hashes = dict[str, str]  # file name: sha256


class _Fields(pydantic.BaseModel):
    """Fields of these names and exactly these types; more fields are allowed."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True, protected_namespaces=())


class _Arguments(_Fields):
    max_seq_length: int  # beside all other arguments; paths are relative to the repository


class _Model(_Fields):
    model_type: str
    architecture: dict[str, Any]
    width_mult: float
    initialized_from: str


class _Split(_Fields):
    md5: str  # beside file, examples, pairs, majority_class or constant_answer, partial


class _Parent(_Fields):
    path: str
    weights: Hashes


class _Export(_Fields):
    weights: Hashes = {}  # beside parity, cls_only, bytes


class StageRecord(_Fields):
    """What every stage.json holds; it is checked when it is written and when it is read."""

    schema_version: int = pydantic.Field(alias="schema")
    stage: str  # one of STAGES below, or of your own
    task: str
    labels: list[str]  # in the order of the logits
    arguments: _Arguments
    model: _Model
    data: dict[str, _Split]
    parent: Optional[_Parent]  # the directory that this one was made from
    weights: Hashes
    files: Hashes  # of BESIDE_WEIGHTS
    metrics: dict[str, Any]
    params: Optional[int]
    flops: Optional[int]  # multiply-adds of the encoder's linear layers at 128 tokens
    notes: list[str]  # what was random or partial
    seconds: float
    machine: dict[str, Any]  # cpu, flags, cores
    versions: dict[str, Any]
    export: Optional[_Export] = None  # the static graph in the same directory


class _TaskArchitecture(_Fields):
    max_position_embeddings: int
    num_attention_heads: int
    intermediate_size: int
    hidden_size: int


class _TaskModel(_Model):
    architecture: _TaskArchitecture


class _DevSplit(_Split):
    examples: int
    majority_class: float = 0.0  # of classification
    constant_answer: float = 0.0  # of other objectives


class _TaskData(_Fields):
    dev: _DevSplit
    __pydantic_extra__: dict[str, _Split]  # the other splits


class _Objective(_Fields):
    name: str  # beside settings, such as threshold
    metric: str  # the one of metrics that selects checkpoints and variants


class TaskRecord(StageRecord):
    """What the records of a model for a task hold besides: the later stages of the task rely on it."""

    model: _TaskModel
    data: _TaskData
    objective: _Objective
    metrics: dict[str, Any]  # ``objective.metric`` is one of them


TASK_STAGES = ("finetune", "prune", "prune_export", "quantize", "onnx")
STAGES = ("pretrain", "distill", *TASK_STAGES)
ADVICE = "repeat the stage that wrote it, with --overwrite if it has that"


def check_record(record, path):
    """Returns: record. Raises: UserError naming the first field that is missing or of the wrong type."""
    if isinstance(record, dict) and record.get("schema", VERSION) != VERSION:
        reason = f"written by another version of this project (schema {record['schema']}, not {VERSION})"
        raise UserError(f"{path}: {reason}; {ADVICE}")
    is_of_task = isinstance(record, dict) and record.get("stage") in TASK_STAGES
    wrong = wrong_field(TaskRecord if is_of_task else StageRecord, record)
    if not wrong and is_of_task:
        metric = record["objective"]["metric"]
        figure = record["metrics"].get(metric)
        if not isinstance(figure, (int, float)) or isinstance(figure, bool):
            wrong = f"metrics.{metric}"
        elif not {"majority_class", "constant_answer"} & set(record["data"]["dev"]):
            wrong = "data.dev.constant_answer"
    if wrong:
        raise UserError(f"{path}: not a stage record: field {wrong!r} is missing or of the wrong type; {ADVICE}")
    return record


def wrong_field(schema, record, but=()):
    """The first field of a record that is missing or of the wrong type, or None. Args: but: fields that may be so."""
    try:
        schema.model_validate(record)
    except pydantic.ValidationError as error:
        for found in error.errors():
            if not found["loc"] or found["loc"][0] not in but:
                return ".".join(map(str, found["loc"])) or "(all of it)"
    return None


# What a run knows only when it has trained.
LATER = ("model", "params", "flops", "weights", "files", "metrics")


def check_beginning(record):
    """Checks, before any training, the record that the training is going to write. Raises: UserError as check_record.

    Args: record: without the fields in LATER, or with some of them.
    """
    schema = TaskRecord if record["stage"] in TASK_STAGES else StageRecord
    wrong = wrong_field(schema, record, but=[name for name in LATER if name not in record])
    if wrong:
        raise UserError(f"{RECORD} of stage {record['stage']}: field {wrong!r} is missing or of the wrong type")
    try:
        json.dumps(record)
    except TypeError as error:
        raise UserError(f"{RECORD} of stage {record['stage']}: not JSON ({error})") from error


# Writing


def describe_machine():
    """CPU model, the instruction sets that matter here, cores."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = file.read().split("\n\n")[0].splitlines()  # of the first core
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    flags = [flag for flag in wanted if flag in fields.get("flags", "").split()]
    cpu = fields.get("model name") or platform.processor() or platform.machine()
    return {"cpu": cpu, "flags": flags, "cores": CORES}


def describe_versions():
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "paddleslim", "tokenizers", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def make_record(stage, arguments, seconds, **fields):
    """A record without ``files``, which write_record adds. Args: arguments: as cli.describe gives them."""
    record = {"schema": VERSION, "stage": stage, "arguments": arguments, "seconds": round(seconds, 1)}
    return {**record, "machine": describe_machine(), "versions": describe_versions(), **fields}


def write_record(directory, record):
    """Writes stage.json; a new record gets the hashes of the files beside the weights."""
    present = [name for name in BESIDE_WEIGHTS if os.path.isfile(os.path.join(directory, name))]
    record.setdefault("files", files.hash_files(directory, present))
    check_record(record, os.path.join(directory, RECORD))
    files.write_json(os.path.join(directory, RECORD), record)


# Reading


def read_record(directory, what="a stage's output"):
    """The checked stage.json of a directory.

    Args: what: for messages, what the user should have named.
    Raises: UserError if the directory is not the complete output of a stage.
    """
    path = os.path.join(directory, RECORD)
    if not os.path.isdir(directory):
        (old,) = files.leftovers_of(directory, "old")
        where = f"; a run was stopped while it replaced it: rerun that, or rename {old}" if os.path.isdir(old) else ""
        raise UserError(f"{directory}: no such directory; {what} is needed{where}")
    if not os.path.isfile(path):
        raise UserError(
            f"{directory}: no {RECORD} there, so it is not {what}; a model trained elsewhere comes in by "
            "finetuning/adopt.py --task_name TASK --model_path DIR --output_dir OUT"
        )
    record = files.read_json(path, advice=f"; {ADVICE}")
    if isinstance(record, dict):
        if record.get("schema") == 1:  # had no hashes of these files
            record.update(schema=2, files={})
        if record.get("schema") == 2:  # knew one objective only
            record.update(schema=VERSION)
            if record.get("labels"):
                record.update(objective=objectives.Classification().describe())
    return check_record(record, path)


def score(record):
    """The figure that selects: the metric that the record's objective names."""
    return record["metrics"][record["objective"]["metric"]]


def constant_answer(split):
    """(what, figure): of the best answer that ignores the text. Args: split: described in a record."""
    if "majority_class" in split:
        return "majority class", split["majority_class"]
    return "constant answer", split.get("constant_answer", 0.0)


def check_files(directory, record, weights=None):
    """Compares files with the hashes of their record. Raises: UserError at the first one that differs or is missing.

    Args: weights: {file name: sha256} to compare besides the record's ``files`` (default: the record's weights).
    """
    for name, digest in {**(record["weights"] if weights is None else weights), **record["files"]}.items():
        path = os.path.join(directory, name)
        if not os.path.isfile(path) or files.file_hash(path) != digest:
            raise UserError(f"{path}: missing, damaged or not of this {RECORD}; {ADVICE}")


def check_task(record, task_name, directory, model_type=None):
    """Raises: UserError if the record is of another task, or of another model type than the given one."""
    if record["task"].lower() != task_name.lower():
        raise UserError(f"--task_name {task_name}: {directory} is a model of {record['task']}")
    if model_type not in (None, record["model"]["model_type"]):
        raise UserError(f"--model_type {model_type}: {directory} is of type {record['model']['model_type']}")


def sequence_length(args, record):
    """--max_seq_length, by default the record's. Raises: UserError if the model has too few positions for it."""
    length = args.max_seq_length or record["arguments"]["max_seq_length"]
    check_sequence_length(length, record["model"]["architecture"]["max_position_embeddings"])
    return length


def check_sequence_length(length, positions):
    if not 4 <= length <= positions:
        raise UserError(f"--max_seq_length {length}: must be from 4 to {positions}, the model's number of positions")


def show_inherited(directory, record, args):
    """Prints what a stage takes over from the stage before, and what its own arguments override."""
    architecture, own_length = record["model"]["architecture"], record["arguments"]["max_seq_length"]
    shape = f"{record['model']['model_type']}, {architecture.get('num_hidden_layers', '?')} layers x "
    shape += f"{architecture['hidden_size']}, width {record['model']['width_mult']:g}"
    length = f"max_seq_length {own_length}"
    if args.max_seq_length not in (None, own_length):
        length += f" (overridden by --max_seq_length {args.max_seq_length})"
    found = f"dev {objectives.shown(record['objective']['metric'])} {score(record):.4f}"
    task = f"task {record['task']}, {len(record['labels'])} labels"
    if record["objective"]["name"] != objectives.Classification.name:
        task += f", {record['objective']['name']}"
    print(f"taken over from {directory}: {task}, {length}, {shape}, {found}")


# Which record was made from which


def graph_files(record):
    """{file name: sha256} of the static graph in a record's directory; empty if it was not exported."""
    if record["stage"] == "quantize":
        return record["weights"]
    return (record.get("export") or {}).get("weights", {})


def parent_of(directory, record, weights=None):
    """The ``parent`` of what is made from a directory. Args: weights: those it is made from (default: all)."""
    return {"path": files.relative(directory), "weights": record["weights"] if weights is None else weights}


def parameter_hashes(hashes):
    """The hashes that tell models apart: parameters. Graphs are alike for all models of one architecture."""
    return {digest for name, digest in hashes.items() if name.endswith((".pdparams", ".pdiparams", ".safetensors"))}


def find_records(directories):
    """Every stage record below the directories, each with its ``path`` and ``directory``, its name in other records."""
    records = []
    for root in directories:
        if not os.path.isdir(root):
            raise UserError(f"{root}: no such directory")
        for directory, subdirectories, names in os.walk(root):
            # Changed in place, so that the walk does not enter what is unfinished or being written.
            subdirectories[:] = sorted(d for d in subdirectories if d[0] != "." and not d.endswith(".unfinished"))
            if RECORD in names:
                records.append({**read_record(directory), "directory": files.relative(directory), "path": directory})
    return records


def parent_among(record, found):
    """The record that this one was made from: by hash, and by place where several have the same weights."""
    if not record["parent"]:
        return None
    made_from = parameter_hashes(record["parent"]["weights"])
    candidates = []
    for other in found:
        same_weights = made_from & parameter_hashes({**other["weights"], **graph_files(other)})
        if same_weights and other["task"] in (record["task"], "general"):
            candidates.append(other)
    candidates.sort(key=lambda other: other["directory"] != record["parent"]["path"])
    return candidates[0] if candidates else None


def children_among(found):
    """{path of a record: the records made directly from it}, further fine-tuning left out."""
    children = {}
    for record in found:
        parent = parent_among(record, found) if record["stage"] != "finetune" else None
        if parent:
            children.setdefault(parent["path"], []).append(record)
    return children


def descendants(root, children):
    """The records made from ``root``, directly or not, each after its parent. Args: children: of children_among."""
    records = []
    for record in children.get(root["path"], []):
        records += [record, *descendants(record, children)]
    return records
