"""Several processes that train one model: ``python -m paddle.distributed.launch``, on GPUs, or on CPUs through gloo.

Every function also works in a single process, where it does nothing or returns its input.
"""

import os

from common import cli
from common.compat import paddle


def start():
    """Joins the processes that paddle.distributed.launch started, if it did."""
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1:
        with cli.quiet():
            paddle.distributed.init_parallel_env()


def rank():
    return paddle.distributed.get_rank()


def world_size():
    return paddle.distributed.get_world_size()


def is_first():
    """Whether this is the process that logs, evaluates and writes."""
    return rank() == 0


def wait_for_all():
    if world_size() > 1:
        paddle.distributed.barrier()


def sum_over_processes(*numbers):
    """The sum of each number over all processes, as a list of float."""
    if world_size() == 1:
        return list(numbers)
    total = paddle.to_tensor(numbers, dtype="float64")
    paddle.distributed.all_reduce(total)
    return total.tolist()


@paddle.no_grad()
def sum_gradients(parameters, factor=1.0):
    """Replaces each gradient by its sum over all processes, times ``factor``. A missing gradient counts as zero."""
    several = world_size() > 1
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
