"""Several processes that train one model: ``python -m paddle.distributed.launch``, on GPUs, or on CPUs through gloo.

Every function also works in a single process, where it does nothing or returns its input. The first process alone reads
and writes the output directory, so machines need no common disk. Each process has a watchdog (watchdog.py) that ends it
when another one is lost, for which Paddle itself would wait.
"""

import collections
import contextlib
import os

from common import UserError, cli, watchdog
from common.compat import paddle


def start():
    """Joins the processes that paddle.distributed.launch started, if it did."""
    if watchdog.is_one_of_several():
        with cli.quiet(), _together():
            paddle.distributed.init_parallel_env()
        if is_first():
            per_host = collections.Counter(hosts())
            shown = ", ".join(f"{count} on {host}" for host, count in per_host.items())
            print(f"{world_size()} processes: {shown}")


@contextlib.contextmanager
def _together():
    """Around what all processes do together, which fails in all of them if one is lost."""
    try:
        yield
    except Exception:
        # A connection broke. The watchdog is about to say whose it was, and to end this process.
        watchdog.wait_for_verdict()
        raise


def rank():
    return paddle.distributed.get_rank()


def world_size():
    return paddle.distributed.get_world_size()


def is_first():
    """Whether this is the process that logs, evaluates, reads and writes the output."""
    return rank() == 0


def hosts():
    """The addresses of the machines of all processes, by rank."""
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "127.0.0.1:0")
    return [endpoint.rpartition(":")[0] for endpoint in endpoints.split(",")]


def name_of(rank):
    """How messages name a process."""
    return f"rank {rank} (on {hosts()[rank]})"


def wait_for_all():
    if world_size() > 1:
        with _together():
            paddle.distributed.barrier()


def gather(value):
    """The values of all processes, in the order of their ranks. Args: value: what pickle can hold, small."""
    if world_size() == 1:
        return [value]
    values = []
    with _together():
        paddle.distributed.all_gather_object(values, value)
    return values


def broadcast(value):
    """The value of the first process. Args: value: what pickle can hold, small; ignored in the others."""
    if world_size() == 1:
        return value
    values = [value if is_first() else None]
    with _together():
        paddle.distributed.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_arrays(arrays):
    """The arrays of the first process as tensors. Args: arrays: {name: array}; ignored in the others."""
    shapes = broadcast({name: (array.shape, str(array.dtype)) for name, array in (arrays or {}).items()})
    tensors = {}
    for name, (shape, dtype) in shapes.items():
        tensors[name] = paddle.to_tensor(arrays[name]) if is_first() else paddle.zeros(shape, dtype)
        if world_size() > 1:
            with _together():
                paddle.distributed.broadcast(tensors[name], src=0)
    return tensors


def broadcast_parameters(model):
    """Gives the model of each process the weights of the first one."""
    if world_size() > 1:
        model.set_state_dict(broadcast_arrays({name: value.numpy() for name, value in model.state_dict().items()}))


def on_first(function):
    """What a function gives in the first process, the only one that calls it. Raises: its UserError, in all."""
    value, refused = None, None
    if is_first():
        try:
            value = function()
        except UserError as error:
            refused = str(error)
    value, refused = broadcast((value, refused))
    if refused is not None:
        raise UserError(refused)
    return value


def check_same(made_from):
    """Raises: UserError, in all processes, if one of them has something else.

    Args: made_from: function that gives {what it is: value}; a single process does not call it.
    """
    if world_size() == 1:
        return
    first, *others = gather(made_from())
    for other, theirs in enumerate(others, 1):
        names = [name for name in sorted({*first, *theirs}) if first.get(name) != theirs.get(name)]
        if names:
            found = "; ".join(f"{name}: {theirs.get(name)} instead of {first.get(name)}" for name in names)
            advice = "all need the same arguments, files and code"
            raise UserError(f"{name_of(other)} differs from rank 0: {found}; {advice}")


def sum_over_processes(*numbers):
    """The sum of each number over all processes, as a list of float."""
    if world_size() == 1:
        return list(numbers)
    total = paddle.to_tensor(numbers, dtype="float64")
    with _together():
        paddle.distributed.all_reduce(total)
    return total.tolist()


@paddle.no_grad()
def sum_gradients(parameters, factor=1.0):
    """Replaces each gradient by its sum over all processes, times ``factor``. A missing gradient counts as zero."""
    several = world_size() > 1
    with _together():
        for parameter in parameters:
            if parameter.stop_gradient:
                continue
            if parameter.grad is None:
                if not several:
                    continue
                parameter.grad = paddle.zeros_like(parameter)
            if several:
                paddle.distributed.all_reduce(parameter.grad)
            if factor != 1.0:
                parameter.grad.scale_(factor)
