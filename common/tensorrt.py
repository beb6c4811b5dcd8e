"""TensorRT inside Paddle Inference: its configuration, and the shapes for which it builds its engines."""

import argparse
import re

import numpy as np

from common import UserError, batching

# What the user may say of the shapes: "32x128" is a batch of 32 sequences of 128 tokens.
SHAPE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")


def shape_file(prefix):
    """Where the shape ranges of a graph lie: beside it."""
    return f"{prefix}.shape_ranges.pbtxt"


def configure(config, precision, shape_file):
    """TensorRT with dynamic shapes.

    Args:
        config: paddle.inference.Config with a GPU.
        precision: fp32, fp16 or int8 (a quantized graph, whose scales are used: nothing is calibrated).
        shape_file: path of the ranges that engine.collect_shapes recorded. The names of the tensors in it change with
            every export, so it is never written by hand.
    """
    from common.compat import paddle

    precisions = {
        "fp32": paddle.inference.PrecisionType.Float32,
        "fp16": paddle.inference.PrecisionType.Half,
        "int8": paddle.inference.PrecisionType.Int8,
    }
    config.enable_tensorrt_engine(
        workspace_size=1 << 30,
        max_batch_size=32,
        min_subgraph_size=5,
        precision_mode=precisions[precision],
        use_static=False,
        use_calib_mode=False,
    )
    config.enable_tuned_tensorrt_dynamic_shape(shape_file, True)


def shape(text):
    """``type=shape``: "32x128" to (32, 128)."""
    found = SHAPE.fullmatch(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape, such as 32x128 (sequences x tokens)")
    return tuple(map(int, found.groups()))


def add_shape_arguments(group):
    help = "with --collect_shape, instead of dev: the %s shape that will be asked for, sequences x tokens, such as %s"
    group.add_argument("--min_shape", type=shape, metavar="NxL", help=help % ("smallest", "1x4"))
    group.add_argument("--opt_shape", type=shape, metavar="NxL", help=help % ("most frequent", "32x24"))
    group.add_argument("--max_shape", type=shape, metavar="NxL", help=help % ("largest", "32x128"))


def shapes_of(args):
    """(smallest, most frequent, largest) of the arguments, each (sequences, tokens); None if none was given.

    Raises: UserError if one is missing, if they are not in order, or without --collect_shape.
    """
    shapes = args.min_shape, args.opt_shape, args.max_shape
    if shapes == (None, None, None):
        return None
    if None in shapes or not args.collect_shape:
        raise UserError("--min_shape, --opt_shape and --max_shape go together, and with --collect_shape")
    for axis, name in enumerate(("sequences", "tokens")):
        smallest, best, largest = (shape[axis] for shape in shapes)
        if not smallest <= best <= largest:
            raise UserError(
                f"--min_shape, --opt_shape, --max_shape: {smallest}, {best}, {largest} {name}: must not become smaller"
            )
    return shapes


def example_batches(shapes):
    """Yields a Batch of each shape, the most frequent one twice: Paddle takes what it sees most often for the best."""
    smallest, best, largest = shapes
    for sequences, tokens in (smallest, largest, best, best):
        ids = np.ones((sequences, tokens), "int64")  # any token will do
        yield batching.Batch(ids, np.zeros_like(ids), None, None)
