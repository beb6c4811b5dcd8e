"""What the stage scripts share besides data and models: errors, arguments, device, whole outputs, resuming."""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import tempfile

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
    except BrokenPipeError:  # as in `... | head`: whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno is None:  # not the file system's, so not the user's to mend
            raise
        full = "; make room, and the same command goes on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"{script}: error: {error.filename or 'the output'}: {error.strerror}{full}", file=sys.stderr)
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

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=self.Formatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the arguments)\n")


def add_data_arguments(group):
    group.add_argument(
        "--data_dir",
        help="directory with the task's train.json and dev.json; default: "
        "$CLUE_DATA_DIR, else PaddleNLP downloads the CLUE task",
    )
    for split in ("train", "eval"):
        group.add_argument(
            f"--max_{split}_samples",
            type=int,
            help=f"use only that many {split} records, for a quick run (recorded as partial)",
        )


def add_tokenizer_arguments(group):
    group.add_argument(
        "--use_faster_tokenizer",
        nargs="?",
        const=True,
        default=True,
        type=boolean,
        help="tokenize in Rust (same ids, about seven times faster); False takes PaddleNLP's",
    )
    group.add_argument(
        "--max_seq_length",
        type=int,
        default=None,
        help="tokens per sequence, longer ones are cut; default: what the model was fine-tuned with, else 128",
    )


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


class Lock:
    """Held by one process at a time, while it writes ``target``; the kernel takes it back when the process ends.

    Args: path: of the file that is locked (default: hidden beside the target). wait: for another process to release it.
    Raises: UserError where another process holds it.
    """

    def __init__(self, target, path=None, wait=False):
        (beside,) = leftovers_of(target, "lock")
        parent = os.path.dirname(beside)
        if os.path.isdir(target) and not os.access(parent, os.W_OK):
            beside = os.path.join(target, ".lock")
        self.path, self.made = path or beside, []
        while not os.path.isdir(parent):
            self.made.append(parent)
            parent = os.path.dirname(parent)
        while True:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self.file = open(self.path, "w")
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                self.file.close()
                if isinstance(error, BlockingIOError):
                    raise UserError(f"{target}: another run is writing there") from None
                raise UserError(f"{target}: its file system has no locks ({error.strerror}); write elsewhere") from None
            if self.is_mine():
                return
            self.file.close()  # whoever held it has removed the file by now

    def is_mine(self):
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        return False

    def release(self):
        if self.file.closed:
            return
        with contextlib.suppress(OSError):  # on a disk that is read-only by now: the error that counts is another
            if self.is_mine():
                os.remove(self.path)
        self.file.close()
        for directory in self.made:
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                continue
            except OSError:  # not empty: something was written
                break

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


@contextlib.contextmanager
def empty_directory(path):
    """The directory ``path``, without what an earlier run may have left in it; it is gone when the block ends."""
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def leftovers_of(target, *states):
    """What kill -9 may leave beside a directory: hidden, so that no launcher's glob takes it for a result."""
    parent, name = os.path.split(os.path.realpath(target))
    return [os.path.join(parent, f".{name}.{state}") for state in states]


@contextlib.contextmanager
def whole_directory(target, wait=False):
    """A temporary directory beside ``target`` that takes its place when the block ends without an error.

    ``target`` must not exist, or is replaced: so it is there whole or not at all, also after kill -9.
    Args: wait: until another process has left such a block for the same target. Raises: UserError if not, and one is.
    """
    target = os.path.realpath(target)  # of a link, what it points to is replaced
    temporary, old = leftovers_of(target, "writing", "old")
    with Lock(target, wait=wait):
        if os.path.isdir(old) and not os.path.exists(target):  # killed between the two renames below
            os.rename(old, target)
        shutil.rmtree(old, ignore_errors=True)
        with empty_directory(temporary):
            yield temporary
            if os.path.isdir(target):
                os.rename(target, old)
            try:
                os.rename(temporary, target)
            except BaseException:
                if os.path.isdir(old) and not os.path.exists(target):
                    os.rename(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(target):
    """Removes what a run left beside ``target`` that was killed after it was whole."""
    lock, *left = leftovers_of(target, "lock", "writing", "old")
    if any(map(os.path.exists, (lock, *left))):
        with Lock(target, wait=True):
            for path in left:
                shutil.rmtree(path, ignore_errors=True)


def write_whole(path, text):
    """Writes a text file beside its place and renames it there."""
    temporary = f"{path}.writing-{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


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
