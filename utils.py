"""What the stage scripts share besides data and models: errors, arguments, whole outputs, stage records, resuming."""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.abspath(__file__))


class UserError(Exception):
    """A mistake of the user: ends the script with this one line and exit status 2."""


def run(main):
    """Runs a script's ``main`` so that a user's mistake is one clear line and exit status 2, not a stack trace."""
    script = os.path.basename(sys.argv[0])
    try:
        main()
    except UserError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno is None:  # not the file system's, so not the user's to mend
            raise
        print(f"{script}: error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


# Arguments


def boolean(text):
    """argparse type for flags that take an optional value: ``--use_faster_tokenizer``, ``... False``."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(text).lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of true, false")
    return values[str(text).lower()]


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, and one-line errors."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=type(
            "Formatter", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {}
        ))

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the arguments)\n")


def add_data_arguments(group, splits=("train", "eval")):
    group.add_argument("--data_dir", help="directory with the task's train.json and dev.json; default: "
                       "$CLUE_DATA_DIR, else PaddleNLP downloads the CLUE task")
    for split in splits:
        group.add_argument(f"--max_{split}_samples", type=int, help=f"use only that many {split} records, for a quick "
                           "run (recorded as partial)")


def add_tokenizer_arguments(group):
    group.add_argument("--use_faster_tokenizer", nargs="?", const=True, default=True, type=boolean,
                       help="tokenize in Rust (same ids, about seven times faster); False takes PaddleNLP's")
    group.add_argument("--max_seq_length", type=int, default=None, help="tokens per sequence, longer ones are cut; "
                       "default: what the model was fine-tuned with, else 128")


def check_positive(args, *names):
    for name in names:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value}: must be above 0")


def set_device(device=None):
    """Selects gpu or cpu (default: gpu if this Paddle has one) and returns the name."""
    import paddle

    available = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if device is None:
        device = "gpu" if available else "cpu"
    if device.startswith("gpu") and not available:
        raise UserError(f"--device {device}: this Paddle sees no GPU; use --device cpu")
    if device.split(":")[0] not in ("cpu", "gpu"):
        raise UserError(f"--device {device}: must be gpu or cpu")
    paddle.set_device(device)
    return device


def set_seed(seed):
    """Seeds Python, NumPy and Paddle."""
    import random

    import numpy as np
    import paddle

    random.seed(seed)
    np.random.seed(seed % 2**32)
    paddle.seed(seed)


@contextlib.contextmanager
def quiet():
    """Hides what libraries print, C++ included (a quantized graph alone gives 40 lines), unless an error escapes."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
            shown = b""
        except BaseException as error:
            log.seek(0)
            shown = b"" if isinstance(error, UserError) else log.read()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(kept, 1):
                os.dup2(copy, number)
                os.close(copy)
            os.write(2, shown)


# Whole outputs


@contextlib.contextmanager
def whole_directory(target):
    """A temporary directory beside ``target`` that takes its place when the block ends without an error.

    ``target`` must not exist, or is replaced: so it is there whole or not at all, also after kill -9.
    """
    target = os.path.abspath(target)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = f"{target}.writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        yield temporary
        if os.path.isdir(target):
            old = f"{target}.old-{os.getpid()}"
            os.rename(target, old)
            os.rename(temporary, target)
            shutil.rmtree(old)
        else:
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_whole(path, text):
    """Writes a text file beside its place and renames it there."""
    temporary = f"{path}.writing-{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_hash(path):
    """sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


# Stage records

RECORD = "stage.json"

# Field: type. What a stage.json holds; checked when it is written and when it is read.
SCHEMA = {
    "schema": int,  # 1
    "stage": str,  # finetune, prune, prune_export, quantize, infer
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
    """A path as records may name it: relative to the repository, or the last two names of one that lies outside."""
    path = os.path.abspath(path)
    if path == ROOT or path.startswith(ROOT + os.sep):
        return os.path.relpath(path, ROOT)
    return os.path.join("...", *path.split(os.sep)[-2:])


def describe_arguments(args):
    """The arguments for a record: file system paths made relative, nothing of the machine."""
    described = {}
    for name, value in sorted(vars(args).items()):
        if isinstance(value, str) and (os.sep in value or os.path.exists(value)):
            value = relative(value)
        described[name] = value
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


def check_task(record, task_name, where):
    """Raises: UserError if the record is of another task."""
    if record["task"].lower() != task_name.lower():
        raise UserError(f"--task_name {task_name}: {where} is a model of {record['task']}")


def check_weights(directory, weights):
    """Compares files with the hashes of the record that names them. Raises: UserError at the first difference."""
    for name, digest in weights.items():
        path = os.path.join(directory, name)
        if not os.path.isfile(path) or file_hash(path) != digest:
            raise UserError(f"{path}: missing, damaged or not of this record; repeat the stage that wrote it")


def finished(directory, args, force=False):
    """True if ``directory`` holds the finished output of just this command, so that there is nothing to do.

    Raises: UserError if it holds something else, unless ``force`` allows to replace it.
    """
    if not os.path.exists(directory) or not os.listdir(directory) or force:
        return False
    if not os.path.isfile(os.path.join(directory, RECORD)):
        raise UserError(f"{directory}: exists and is not this project's; name another output directory or remove it")
    before, now = read_record(directory)["arguments"], describe_arguments(args)
    changed = different_arguments(before, now)
    if changed:
        raise UserError(f"{directory}: holds the result of other arguments ({changed}); "
                        "--overwrite replaces it, or name another output directory")
    return True


def different_arguments(before, now):
    """The arguments in which two runs differ, as text, or ''."""
    names = sorted((set(before) | set(now)) - {"overwrite", "visualdl_dir", "logging_steps"})
    return ", ".join(f"{n} {before.get(n)} -> {now.get(n)}" for n in names if before.get(n) != now.get(n))


class Unfinished:
    """The working directory ``<output>.unfinished`` of a run: what kill -9 leaves, and the same command goes on from.

    ``state-<step>/`` holds the newest state, written whole; older ones go when it is there.
    """

    def __init__(self, output_dir, args):
        self.directory = os.path.abspath(output_dir) + ".unfinished"
        os.makedirs(self.directory, exist_ok=True)
        self.lock = open(os.path.join(self.directory, "lock"), "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.directory}: another run is writing there") from None
        path, now = os.path.join(self.directory, "arguments.json"), describe_arguments(args)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                changed = different_arguments(json.load(file), now)
            if changed and not getattr(args, "overwrite", False):
                raise UserError(f"{self.directory}: an unfinished run with other arguments ({changed}); repeat its "
                                "command, remove the directory, or pass --overwrite")
            if changed:
                self.remove_states([])
        write_whole(path, json.dumps(now, ensure_ascii=False))

    def states(self):
        names = [name for name in os.listdir(self.directory) if re.fullmatch(r"state-\d+", name)]
        return sorted(names, key=lambda name: int(name.split("-")[1]))

    def newest_state(self):
        """The directory of the newest whole state, or None."""
        names = self.states()
        return os.path.join(self.directory, names[-1]) if names else None

    def remove_states(self, keep):
        """Removes every entry but the lock, the arguments, and ``keep``."""
        for name in set(os.listdir(self.directory)) - {"lock", "arguments.json", *keep}:
            path = os.path.join(self.directory, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)

    def remove(self):
        shutil.rmtree(self.directory)
        self.lock.close()


def hash_files(directory, names):
    return {name: file_hash(os.path.join(directory, name)) for name in names}


def copy_files(source, target):
    for name in os.listdir(source):
        shutil.copy2(os.path.join(source, name), target)


def write_json_lines(path, rows):
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def scalar_writer(directory):
    """A function (scalars, step) that writes them for VisualDL, or does nothing if ``directory`` is None."""
    if directory is None:
        return lambda scalars, step: None
    from visualdl import LogWriter

    writer = LogWriter(directory)
    return lambda scalars, step: [writer.add_scalar(tag, value, step) for tag, value in scalars.items()]
