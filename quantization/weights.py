"""What calibration leaves undone in the weights: word embeddings in INT8, square matrices that the engine reads right.

Calibrated quantization leaves the embeddings in FP32: two thirds of a quantized file, 65 of 99 MB for 21128 x 768.
"""

import contextlib
import os

import numpy as np

from common import exporting
from common.compat import paddle


def quantize_rows(weight):
    """(rows int8 [n, d], scales float32 [n, 1]) with rows * scales nearest to weight, float32 [n, d].

    Symmetric, like the weights of the matrix products: scale = max |row| / 127 (arXiv 2004.09602, section 3).
    """
    scales = np.abs(weight).max(1, keepdims=True) / 127
    scales[scales == 0] = 1
    return np.round(weight / scales).astype("int8"), scales.astype("float32")


class Parameters:
    """The parameters of a graph that is being rewritten, by name."""

    def __init__(self, scope):
        self.scope = scope

    def __getitem__(self, name):
        return np.array(self.scope.find_var(name).get_tensor())

    def __setitem__(self, name, array):
        self.scope.var(name).get_tensor().set(array, paddle.CPUPlace())


@contextlib.contextmanager
def rewriting(prefix, target=None):
    """The block of the graph ``prefix`` and its Parameters, to be changed; they are written to ``target``, if given."""
    with exporting.loaded_graph(prefix) as (program, _, _, executor, scope):
        yield program.global_block(), Parameters(scope)
        if target is None:
            return
        # Not save_inference_model: it appends a scale operator, whose output may get a name that is already used.
        directory, name = os.path.split(target)
        is_parameter = paddle.static.io.is_persistable
        paddle.static.io.save_vars(executor, directory, program, predicate=is_parameter, filename=f"{name}.pdiparams")
        with open(f"{target}.pdmodel", "wb") as file:
            file.write(program.desc.serialize_to_string())


def store_in_int8(prefix, target):
    """Writes the graph ``prefix`` to the file prefix ``target`` with the table of word embeddings in INT8."""
    with rewriting(prefix, target) as (block, parameters):
        position, lookup = next(
            (i, op)
            for i, op in enumerate(block.ops)
            if op.type == "lookup_table_v2" and op.input("Ids") == ["input_ids"]
        )
        (name,), (ids,), (output,) = lookup.input("W"), lookup.input("Ids"), lookup.output("Out")
        shape = block.var(output).shape

        def constant(suffix, array):
            parameters[name + suffix] = array
            return block.create_var(name=name + suffix, shape=array.shape, dtype=str(array.dtype), persistable=True)

        def variable(suffix, dtype):
            return block.create_var(name=output + suffix, shape=shape, dtype=dtype)

        rows, scales = quantize_rows(parameters[name])
        rows, scales = constant(".rows", rows), constant(".row_scales", scales)
        picked, cast = variable(".row", "int8"), variable(".row_cast", "float32")
        scale = variable(".row_scale", "float32")
        types = {"in_dtype": int(rows.dtype), "out_dtype": int(scales.dtype)}
        block._remove_op(position)
        # embedding = float(rows[id]) * scales[id]
        operators = (
            ("lookup_table_v2", {"W": rows, "Ids": ids}, picked.name, {"padding_idx": -1}),
            ("cast", {"X": picked}, cast.name, types),
            ("lookup_table_v2", {"W": scales, "Ids": ids}, scale.name, {"padding_idx": -1}),
            ("elementwise_mul", {"X": cast, "Y": scale}, output, {"axis": -1}),
        )
        for i, (kind, inputs, outputs, attributes) in enumerate(operators):
            inputs = {key: [getattr(value, "name", value)] for key, value in inputs.items()}
            block._insert_op(position + i, type=kind, inputs=inputs, outputs={"Out": [outputs]}, attrs=attributes)
        block._remove_var(name)


def scale_square_weights_by_rows(fp32_prefix, prefix):
    """Rewrites the quantized graph ``prefix``: square weights get one scale per row instead of one per column.

    oneDNN's pass of Paddle (2.6.2 and 3.1.1) tells the axis of the scales by their number. For a square matrix both
    fit, and it takes the rows: of a graph with scales per column the engine computed with weights that were 20 % off.
    With scales per row, and the attribute that says so, every reader of the graph finds the same weights.

    Args: fp32_prefix: of the graph that was quantized, with the same names of parameters.
    """
    with rewriting(fp32_prefix) as (_, parameters):
        original = parameters
    with rewriting(prefix, prefix) as (block, parameters):
        for operator in block.ops:
            if operator.type != "dequantize_linear":
                continue
            (weight,), (scale,) = operator.input("X"), operator.input("Scale")
            shape = block.var(weight).shape
            if not block.var(weight).persistable or shape[0] != shape[1]:
                continue
            rows, steps = quantize_rows(original[weight])
            parameters[weight] = rows
            parameters[scale] = steps.reshape(-1) * 127  # Paddle's scales are ranges
            operator._set_attr("quant_axis", 0)
