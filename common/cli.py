"""The command line of every script: errors, arguments that several scripts have, device, seed."""

import argparse
import contextlib
import ctypes
import errno
import io
import os
import random
import signal
import sys
import tempfile

from common import UserError, files, gpu, watchdog

LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec a child must not load anything


def run(main):
    """Runs a script's ``main``: a mistake of the user becomes one clear line and exit status 2, not a stack trace."""
    try:
        main()
    except UserError as error:
        _fail(error, 2)
    except BrokenPipeError:  # `... | head`: the reader has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        watchdog.tell("the reader of its output has ended")
        sys.exit(141)
    except OSError as error:
        if error.errno is None:  # not from the file system, so the user cannot mend it
            raise
        advice = "; make room, then rerun the same command" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        _fail(f"{error.filename or 'the output'}: {error.strerror}{advice}", 2)
    except KeyboardInterrupt:
        _fail("interrupted; rerun the same command to resume from the last checkpoint", 130, kind="")
    watchdog.tell(None)


def _fail(message, status, kind="error: "):
    print(f"{os.path.basename(sys.argv[0])}: {kind}{message}", file=sys.stderr)
    watchdog.tell(str(message))
    sys.exit(status)


# Parsing


class Arguments(argparse.Namespace):
    """Parsed arguments. ``without_effect``: the names of those that were declared not to change the result."""

    __slots__ = ("without_effect",)  # a slot, so that vars() gives the arguments and nothing else


class _Declarations:
    """add_argument with two more options, and add_flag, for the parser and its groups."""

    def add_argument(self, *names, positive=False, without_effect=False, **options):
        """As argparse's. Args: positive: it must be above 0, if given. without_effect: it does not change the result.

        A run that differs from a finished one only in arguments without effect finds its result already there.
        """
        action = super().add_argument(*names, **options)
        action.positive, action.without_effect = positive, without_effect
        return action

    def add_flag(self, name, help, default=False, **options):
        """A flag that takes an optional value: ``--int8``, ``--int8 True``, ``--int8 False``.

        Args: default: None lets the script decide.
        """
        return self.add_argument(name, nargs="?", const=True, default=default, type=boolean, help=help, **options)


class _Group(_Declarations, argparse._ArgumentGroup):
    pass


class Parser(_Declarations, argparse.ArgumentParser):
    """argparse with defaults in the help and one-line errors."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=self.Formatter)

    def add_argument_group(self, *args, **options):
        group = _Group(self, *args, **options)
        self._action_groups.append(group)
        return group

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the arguments)\n")

    def parse_args(self, argv=None):
        args = super().parse_args(argv, Arguments())
        args.without_effect = {action.dest for action in self._actions if action.without_effect}
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if action.positive and value is not None and value <= 0:
                raise UserError(f"--{action.dest} {value}: must be above 0")
        return args


class PathArgument(str):
    """``type=PathArgument``: records write this argument relative to the repository (files.relative)."""

    def described(self):
        return files.relative(self)


class NameOrPathArgument(PathArgument):
    """``type=NameOrPathArgument``: the name of a built-in model, which records keep as it is, or a path."""

    def described(self):
        return files.relative(self) if os.sep in self else str(self)


def boolean(text):
    """argparse type: true or false."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(text).lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of true, false")
    return values[str(text).lower()]


def describe(args):
    """The arguments as records keep them: sorted, paths relative to the repository.

    An absolute path is shortened also where its argument does not say that it is one.
    """
    return {name: _described(value) for name, value in sorted(vars(args).items())}


def _described(value):
    if isinstance(value, PathArgument):
        return value.described()
    if isinstance(value, str) and os.path.isabs(value):
        return files.relative(value)
    return [_described(item) for item in value] if isinstance(value, list) else value


# Arguments that several scripts have


# What the scripts of the original example also call two of the tasks.
TASK_ALIASES = {"wsc": "CLUEWSC2020", "ifly": "IFLYTEK"}


def task_name(text):
    """argparse type: the name of a task, CLUE's where the original's scripts have a shorter one."""
    return TASK_ALIASES.get(text.lower(), text)


def add_task_argument(group):
    # It does not make a result: model and data say which task it is, and it may be typed in any case.
    help = "a CLUE task in any case (wsc: CLUEWSC2020, ifly: IFLYTEK), or a name for the data in --data_dir"
    group.add_argument("--task_name", type=task_name, required=True, help=help, without_effect=True)


def add_output_argument(group, help, required=False):
    group.add_argument("--output_dir", type=PathArgument, required=required, help=help, without_effect=True)


def add_overwrite_argument(group):
    help = "replace the result of a run with other arguments"
    group.add_argument("--overwrite", action="store_true", help=help, without_effect=True)


def add_device_argument(group):
    group.add_argument("--device", help="gpu or cpu (default: gpu if Paddle has one)")


def add_data_arguments(group):
    """--data_dir and the sample limits."""
    help = "directory with train.json and dev.json; default: $CLUE_DATA_DIR, else PaddleNLP downloads the CLUE task"
    # A record knows the data by its md5, wherever it lies.
    group.add_argument("--data_dir", "--glue_dir", type=PathArgument, help=help, without_effect=True)
    for split in ("train", "eval"):
        help = f"use only this many {split} records, for a quick trial; the result is marked as partial"
        group.add_argument(f"--max_{split}_samples", type=int, help=help, positive=True)


def add_tokenizer_arguments(group):
    """--use_faster_tokenizer and --max_seq_length."""
    help = "tokenize in Rust: the ids of PaddleNLP's Python tokenizer (which False takes), about seven times faster"
    group.add_flag("--use_faster_tokenizer", help, default=True)
    help = "tokens per sequence, longer ones are cut; lower it to save time and memory if your texts are short "
    help += "(default: the length that the model was fine-tuned with, else 128)"
    group.add_argument("--max_seq_length", type=int, help=help)


def add_input_arguments(parser):
    """The group of arguments that say what a stage reads and how it is tokenized."""
    group = parser.add_argument_group("data")
    add_data_arguments(group)
    add_tokenizer_arguments(group)
    return group


# The process


def set_device(device=None):
    """Selects the device in Paddle. Returns: its name.

    Args: device: gpu, gpu:N or cpu (default: gpu if this Paddle has one). Raises: UserError if it is not there.
    """
    from common.compat import paddle

    count = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    available = count > 0
    if device is None:
        device = "gpu" if available else "cpu"
    if device.startswith("gpu") and not available:
        why = "it is one for CPUs; use --device cpu, or install another by `bash setup_env.sh --gpu`"
        why = gpu.why_none(gpu.driver_version()) if paddle.is_compiled_with_cuda() else why
        raise UserError(f"--device {device}: this Paddle sees no GPU: {why}")
    if device.split(":")[0] not in ("cpu", "gpu"):
        raise UserError(f"--device {device}: must be gpu or cpu")
    if device.startswith("gpu"):
        number = device.partition(":")[2] or "0"
        if not number.isdigit() or int(number) >= count:
            raise UserError(f"--device {device}: there are GPUs 0 to {count - 1}")
        gpu.show(int(number))
    paddle.set_device(device)
    return device


def die_with_parent():
    """Runs in a child process: makes the kernel kill it when its parent dies, even if it is stopped."""
    LIBC.prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


class Unfailing(io.FileIO):
    """A file that takes what is written to it also when its disk is full or its reader gone, and loses it then."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def keep_printing():
    """For a process that is not to end because nobody hears it: from now on printing does not fail."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file, such as a socket, would take its place
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = io.BufferedWriter(Unfailing(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(stream, "utf-8", "backslashreplace", line_buffering=True))


def set_seed(seed):
    """Seeds Python, NumPy and Paddle."""
    import numpy as np

    from common.compat import paddle

    random.seed(seed)
    np.random.seed(seed % 2**32)
    paddle.seed(seed)


@contextlib.contextmanager
def quiet():
    """Hides what libraries print, their C++ code included, unless the block ends with an error."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        shown = b""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, UserError):
                log.seek(0)
                shown = log.read()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(kept, 1):
                os.dup2(copy, number)
                os.close(copy)
            with contextlib.suppress(OSError):  # it must not hide the error of the block
                os.write(2, shown)
