"""stage.json: what a stage did, from what, with what result; its schema, and the checks of whoever reads it."""

import contextlib
import hashlib
import json
import os
import platform
import time

from utils import ROOT, UserError, write_whole

RECORD = "stage.json"

# What a stage.json holds, field by field: type. Checked when it is written and when it is read.
SCHEMA = {
    "schema": int,  # 1
    "stage": str,  # pretrain, distill, finetune, prune, prune_export, quantize, infer
    "task": str,
    "labels": list,  # str, in the order of the logits
    "arguments": dict,  # every argument; paths relative to the repository
    "model": dict,  # model_type, architecture (the config's fields), width_mult, initialized_from
    "data": dict,  # split name: file, md5, examples, majority_class, partial
    "parent": (dict, type(None)),  # path, and sha256 of its weights
    "weights": dict,  # file name: sha256
    "metrics": dict,
    "params": (int, type(None)),
    "flops": (int, type(None)),  # multiply-adds of the encoder's linear layers at 128 tokens
    "notes": list,  # str: what was random or partial
    "seconds": (int, float),
    "machine": dict,  # cpu, flags, cores
    "versions": dict,
}


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
        "schema": 1,
        "stage": stage,
        "arguments": describe_arguments(args),
        "seconds": round(time.time() - started, 1),
        "machine": describe_machine(),
        "versions": describe_versions(),
        **fields,
    }


def check_record(record, path):
    for name, kind in SCHEMA.items():
        if not isinstance(record, dict) or not isinstance(record.get(name, ...), kind):
            raise UserError(f"{path}: not a stage record: field {name!r} is missing or of the wrong type")
    if record["schema"] != 1:
        raise UserError(f"{path}: written by another version of this project (schema {record['schema']}, not 1)")
    return record


def write_record(directory, record):
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
            return check_record(json.load(file), path)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def check_task(record, task_name, where, model_type=None):
    """Raises: UserError if the record is of another task, or of another model type than one that was given."""
    if record["task"].lower() != task_name.lower():
        raise UserError(f"--task_name {task_name}: {where} is a model of {record['task']}")
    if model_type not in (None, record["model"]["model_type"]):
        raise UserError(f"--model_type {model_type}: {where} is of type {record['model']['model_type']}")


def check_weights(directory, weights):
    """Compares files with the hashes of the record that names them. Raises: UserError at the first difference."""
    for name, digest in weights.items():
        path = os.path.join(directory, name)
        if not os.path.isfile(path) or file_hash(path) != digest:
            raise UserError(f"{path}: missing, damaged or not of this record; repeat the stage that wrote it")


# What does not change a result, (of quantization) is a choice among results, or is known better by the md5 of the data.
NO_IDENTITY = {"overwrite", "do_eval", "do_predict", "visualdl_dir", "logging_steps", "algorithms", "calib_samples",
               "data_dir", "input_dir", "output_dir", "task_name"}  # fmt: skip


def identity(arguments, parent=None, data=None):
    """What makes a result: the arguments, the weights it was made from, and the md5 of each data file.

    Args: parent: as in a record; data: {name: {"md5": ...}}, as in a record.
    """
    made = {name: value for name, value in arguments.items() if name not in NO_IDENTITY}
    made["weights made from"] = min(parent["weights"].values())[:12] if parent else None
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
    return True


def check_replaceable(directory, stage, inside=()):
    """Raises: UserError unless ``directory`` is absent, empty or a result of ``stage``, without ``inside`` in it."""
    for path in (os.getcwd(), *inside):
        if os.path.commonpath([os.path.abspath(directory), os.path.abspath(path)]) == os.path.abspath(directory):
            raise UserError(f"{directory}: cannot be the output, {path} lies in it")
    if os.path.exists(directory) and os.listdir(directory):
        if not os.path.isfile(os.path.join(directory, RECORD)) or read_record(directory)["stage"] != stage:
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
