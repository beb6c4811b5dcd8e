"""stage.json: what a stage did, from what, with what result; its schema, and the checks of whoever reads it."""

import contextlib
import hashlib
import json
import os
import platform
import time

from utils import ROOT, UserError, clear_leftovers, write_whole

RECORD = "stage.json"

NUMBER = (int, float)
HASHES = {...: str}  # file name: sha256
# What a stage.json holds, checked when it is written and when it is read: field: type, [type of the items of a list],
# or an object's fields, where ... stands for all of them.
SCHEMA = {
    "schema": int,  # VERSION
    "stage": str,  # pretrain, distill, finetune, prune, prune_export, quantize
    "task": str,
    "labels": [str],  # in the order of the logits
    "arguments": {"max_seq_length": int},  # and every other argument; paths relative to the repository
    "model": {"model_type": str, "architecture": dict, "width_mult": NUMBER, "initialized_from": str},
    "data": {...: {"md5": str}},  # of each split also file, examples, pairs, majority_class, partial
    "parent": (dict, type(None)),  # path, and sha256 of its weights
    "weights": HASHES,
    "files": HASHES,  # of what else a later stage reads: BESIDE
    "metrics": dict,
    "params": (int, type(None)),
    "flops": (int, type(None)),  # multiply-adds of the encoder's linear layers at 128 tokens
    "notes": [str],  # what was random or partial
    "seconds": NUMBER,
    "machine": dict,  # cpu, flags, cores
    "versions": dict,
}
VERSION = 2
# Beyond that, of a model for a task: what its later stages count on.
TASK_SCHEMA = {
    "model": {"architecture": dict.fromkeys(
        ("max_position_embeddings", "num_attention_heads", "intermediate_size", "hidden_size"), int)},
    "data": {"dev": {"examples": int, "majority_class": NUMBER}},
    "metrics": {"accuracy": NUMBER},
}  # fmt: skip
ADVICE = "repeat the stage that wrote it, with --overwrite if it has that"
BESIDE = ("config.json", "vocab.txt", "tokenizer_config.json")


def relative(path):
    """A path as records may name it: relative to the repository; of one that lies outside, the last two names, or the
    last one where the other would be a user's."""
    path = os.path.abspath(path)
    if path == ROOT or path.startswith(ROOT + os.sep):
        return os.path.relpath(path, ROOT)
    parent = os.path.dirname(path)
    private = parent == os.path.expanduser("~") or os.path.dirname(parent) == "/home"
    return os.path.join("...", *path.split(os.sep)[-1 if private else -2 :])


PATHS = {"data_dir", "input_dir", "output_dir", "model_path", "init_config", "vocab_file", "sub_model_output_dir",
         "static_sub_model", "visualdl_dir",
         "bert", "finetuned", "pruned", "quantized", "both"}  # fmt: skip


def describe_arguments(args):
    """The arguments for a record: paths made relative (a model's name stays as it is), nothing of the machine."""
    described = dict(sorted(vars(args).items()))
    for name, value in described.items():
        if isinstance(value, str) and (name in PATHS or name.endswith("_name_or_path") and os.sep in value):
            described[name] = relative(value)
    return described


def describe_machine():
    """CPU model, the instruction sets that matter here, cores, and the GPU if one is used."""
    flags, model = [], platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                model = value
            elif key == "flags":
                wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
                flags = [flag for flag in wanted if flag in value.split()]
                break
    return {"cpu": model, "flags": flags, "cores": len(os.sched_getaffinity(0))}


def describe_versions():
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "paddleslim", "tokenizers", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def make_record(stage, args, started, **fields):
    """A stage record; ``started`` is the time.time() at which the work began, earlier runs' seconds included."""
    return {
        "schema": VERSION,
        "stage": stage,
        "arguments": describe_arguments(args),
        "seconds": round(time.time() - started, 1),
        "machine": describe_machine(),
        "versions": describe_versions(),
        **fields,
    }


def misfit(value, schema, place=""):
    """The place in ``value`` that is not as ``schema`` has it, such as ``data.dev.md5``, or None if all of it is."""
    if isinstance(schema, list) and isinstance(value, list):
        parts = [(str(number), item, schema[0]) for number, item in enumerate(value)]
    elif isinstance(schema, dict) and isinstance(value, dict):
        schema = dict.fromkeys(value, schema[...]) if ... in schema else schema
        parts = [(name, value.get(name, ...), kind) for name, kind in schema.items()]
    elif (
        isinstance(schema, (list, dict))
        or not isinstance(value, schema)
        or isinstance(value, bool)
        and schema is not bool
    ):
        return place or "(all of it)"
    else:
        return None
    return next(filter(None, (misfit(item, kind, f"{place}.{name}".lstrip(".")) for name, item, kind in parts)), None)


def check_record(record, path):
    if isinstance(record, dict) and record.get("schema", VERSION) != VERSION:
        raise UserError(
            f"{path}: written by another version of this project (schema {record['schema']}, not {VERSION}); repeat "
            "the stage that wrote it"
        )
    schemas = [SCHEMA]
    export, parent = (record.get(name) if isinstance(record, dict) else None for name in ("export", "parent"))
    if parent is not None:
        schemas.append({"parent": {"path": str, "weights": HASHES}})
    if isinstance(record, dict) and record.get("stage") in ("finetune", "prune", "prune_export", "quantize"):
        schemas.append(TASK_SCHEMA)
    if export is not None:
        schemas.append({"export": {"weights": HASHES} if isinstance(export, dict) and "weights" in export else dict})
    for schema in schemas:
        wrong = misfit(record, schema)
        if wrong:
            raise UserError(f"{path}: not a stage record: field {wrong!r} is missing or of the wrong type; {ADVICE}")
    return record


def write_record(directory, record):
    """Writes stage.json; of a new record also the hashes of the files BESIDE the weights."""
    present = [name for name in BESIDE if os.path.isfile(os.path.join(directory, name))]
    record.setdefault("files", hash_files(directory, present))
    check_record(record, os.path.join(directory, RECORD))
    write_whole(os.path.join(directory, RECORD), json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def read_record(directory, what="a stage's output"):
    """The checked stage.json of a directory. Raises: UserError if it is no complete output of a stage."""
    path = os.path.join(directory, RECORD)
    if not os.path.isdir(directory):
        raise UserError(f"{directory}: no such directory; {what} is needed")
    if not os.path.isfile(path):
        raise UserError(f"{directory}: no {RECORD} there, so it is not {what}")
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        if isinstance(record, dict) and record.get("schema") == 1:  # had no hashes of these files
            record.update(schema=VERSION, files={})
        return check_record(record, path)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {ADVICE}") from error


def check_task(record, task_name, where, model_type=None):
    """Raises: UserError if the record is of another task, or of another model type than one that was given."""
    if record["task"].lower() != task_name.lower():
        raise UserError(f"--task_name {task_name}: {where} is a model of {record['task']}")
    if model_type not in (None, record["model"]["model_type"]):
        raise UserError(f"--model_type {model_type}: {where} is of type {record['model']['model_type']}")


def check_files(directory, record, weights=None):
    """Compares the files with the hashes of their record: ``weights`` (default: the record's) and what lies BESIDE.

    Raises: UserError at the first difference.
    """
    for name, digest in {**(record["weights"] if weights is None else weights), **record["files"]}.items():
        path = os.path.join(directory, name)
        if not os.path.isfile(path) or file_hash(path) != digest:
            raise UserError(f"{path}: missing, damaged or not of this {RECORD}; {ADVICE}")


# What does not change a result, (of quantization) is a choice among results, or is known better by the md5 of the data.
NO_IDENTITY = {"overwrite", "do_eval", "do_predict", "visualdl_dir", "logging_steps", "algorithms", "calib_samples",
               "parity_tolerance", "accuracy_tolerance", "min_agreement",
               "data_dir", "input_dir", "output_dir", "task_name"}  # fmt: skip


def identity(arguments, parent=None, data=None):
    """What makes a result: the arguments, the weights it was made from, and the md5 of each data file.

    Args: parent: as in a record; data: {name: {"md5": ...}}, as in a record.
    """
    made = {name: value for name, value in arguments.items() if name not in NO_IDENTITY}
    made["weights made from"] = " ".join(sorted(h[:12] for h in weights_in(parent["weights"]))) if parent else None
    made.update({f"md5 of {name}": described["md5"] for name, described in (data or {}).items()})
    return made


def difference(before, now):
    """In what two identities differ, as text, or ''."""
    names = sorted(set(before) | set(now))
    return ", ".join(f"{n} {before.get(n)} -> {now.get(n)}" for n in names if before.get(n) != now.get(n))


def finished(directory, now, force=False):
    """True if ``directory`` holds the finished result of the identity ``now``, so that there is nothing to do.

    Raises: UserError if it holds something else. ``force`` allows to replace another result of this project, and
    nothing but that.
    """
    if not os.path.exists(directory) or not os.listdir(directory):
        return False
    if not os.path.isfile(os.path.join(directory, RECORD)):
        raise UserError(f"{directory}: exists and is not this project's; name another output directory or remove it")
    if force:
        return False
    record = read_record(directory)
    changed = difference(identity(record["arguments"], record["parent"], record["data"]), now)
    if changed:
        raise UserError(
            f"{directory}: holds the result of something else ({changed}); "
            "--overwrite replaces it, or name another output directory"
        )
    check_files(directory, record)
    clear_leftovers(directory)
    return True


def check_replaceable(directory, stage, inside=()):
    """Raises: UserError unless ``directory`` is absent, empty or a result of ``stage``, without ``inside`` in it."""
    for path in (os.getcwd(), *inside):
        if os.path.commonpath([os.path.abspath(directory), os.path.abspath(path)]) == os.path.abspath(directory):
            raise UserError(f"{directory}: cannot be the output, {path} lies in it")
    if os.path.exists(directory) and os.listdir(directory):
        found = None
        with contextlib.suppress(OSError, ValueError, AttributeError):  # one that this version cannot read will do
            with open(os.path.join(directory, RECORD), encoding="utf-8") as file:
                found = json.load(file).get("stage")
        if found != stage:
            raise UserError(f"{directory}: exists and holds something else; name another directory or remove it")


def sequence_length(args, record):
    """--max_seq_length, by default the record's. Raises: UserError for one that the model has no positions for."""
    length = args.max_seq_length or record["arguments"]["max_seq_length"]
    check_sequence_length(length, record["model"]["architecture"]["max_position_embeddings"])
    return length


def check_sequence_length(length, limit):
    if not 4 <= length <= limit:
        raise UserError(f"--max_seq_length {length}: must be from 4 to {limit}, the model's number of positions")


def exported(record):
    """{file name: sha256} of the static graph that a record's directory holds, empty if it was not exported."""
    return (record.get("export") or {}).get("weights", {})


def file_hash(path):
    """sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def hash_files(directory, names):
    return {name: file_hash(os.path.join(directory, name)) for name in names}


# Records of several stages


def find_records(directories):
    """Every stage record under the directories, with its place: ``path`` as found, ``directory`` for other records."""
    found = []
    for root in directories:
        if not os.path.isdir(root):
            raise UserError(f"{root}: no such directory")
        for directory, subdirectories, files in os.walk(root):
            # Changed in place, while the walk goes on: what is unfinished or being written is not entered.
            subdirectories[:] = sorted(d for d in subdirectories if d[0] != "." and not d.endswith(".unfinished"))
            if RECORD in files:
                found.append({**read_record(directory), "directory": relative(directory), "path": directory})
    return found


def weights_in(hashes):
    """The hashes that tell models apart: parameters, not graphs, which are alike for models of one architecture."""
    return {digest for name, digest in hashes.items() if name.endswith((".pdparams", ".pdiparams"))}


def parent_among(record, found):
    """The record that this one was made from: recognized by hash, and by place where several have the same weights."""
    if not record["parent"]:
        return None
    made_from = weights_in(record["parent"]["weights"])
    candidates = [
        other
        for other in found
        if made_from & weights_in({**other["weights"], **exported(other)})
        and other["task"] in (record["task"], "general")
    ]
    candidates.sort(key=lambda other: other["directory"] != record["parent"]["path"])
    return candidates[0] if candidates else None


def children_among(found):
    """{path of a record: the records made directly from it, in the order of ``found``; no further fine-tuning}."""
    children = {}
    for record in found:
        parent = parent_among(record, found) if record["stage"] != "finetune" else None
        if parent:
            children.setdefault(parent["path"], []).append(record)
    return children


def descendants(root, children):
    """The records made from ``root``, directly or not, children behind their parents. children: of children_among."""
    found = []
    for record in children.get(root["path"], []):
        found += [record, *descendants(record, children)]
    return found
