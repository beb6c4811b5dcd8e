"""Stores the word embeddings of an exported graph in INT8, with one scale per row.

Calibrated quantization leaves them in FP32: two thirds of a quantized file, 65 of 99 MB for 21128 x 768 embeddings.
"""

import os

import numpy as np

from common.compat import paddle


def quantize_rows(weight):
    """(rows int8 [n, d], scales float32 [n, 1]) with rows * scales nearest to weight, float32 [n, d].

    Symmetric, like the weights of the matrix products: scale = max |row| / 127 (arXiv 2004.09602, section 3).
    """
    scales = np.abs(weight).max(1, keepdims=True) / 127
    scales[scales == 0] = 1
    return np.round(weight / scales).astype("int8"), scales.astype("float32")


def store_in_int8(prefix, target):
    """Writes the graph ``prefix`` to the file prefix ``target`` with the table of word embeddings in INT8."""
    place, scope = paddle.CPUPlace(), paddle.static.Scope()
    paddle.enable_static()
    try:
        with paddle.static.scope_guard(scope):
            executor = paddle.static.Executor(place)
            program, _, _ = paddle.static.load_inference_model(prefix, executor)
            block = program.global_block()
            position, lookup = next(
                (i, op)
                for i, op in enumerate(block.ops)
                if op.type == "lookup_table_v2" and op.input("Ids") == ["input_ids"]
            )
            (name,), (ids,), (output,) = lookup.input("W"), lookup.input("Ids"), lookup.output("Out")
            shape = block.var(output).shape

            def constant(suffix, array):
                scope.var(name + suffix).get_tensor().set(array, place)
                return block.create_var(name=name + suffix, shape=array.shape, dtype=str(array.dtype), persistable=True)

            def variable(suffix, dtype):
                return block.create_var(name=output + suffix, shape=shape, dtype=dtype)

            rows, scales = quantize_rows(np.array(scope.find_var(name).get_tensor()))
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
            # Not save_inference_model: it appends a scale operator, whose output may get a name that is already used.
            directory, name = os.path.split(target)
            is_parameter = paddle.static.io.is_persistable
            paddle.static.io.save_vars(
                executor, directory, program, predicate=is_parameter, filename=f"{name}.pdiparams"
            )
            with open(f"{target}.pdmodel", "wb") as file:
                file.write(program.desc.serialize_to_string())
    finally:
        paddle.disable_static()
