"""Writes an exported or quantized graph of Paddle as an ONNX model, operator by operator.

A quantized graph gets QuantizeLinear and DequantizeLinear before the matrix products with weights, with Paddle's own
scales and int8 weights. So a runtime computes in INT8 what our engine computes in INT8:

    x -> QuantizeLinear -> DequantizeLinear -> MatMul -> Add      weights int8 [in, out], one scale per column
                               int8 weights -> DequantizeLinear ---^

Everything else stays in floating point: the products of two activations (their range is stretched by the mask of a
padded batch) and the sums. Word embeddings in INT8 stay INT8 in the file: rows are gathered, then scaled.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from common import UserError, exporting
from common.compat import paddle

# The first opset with LayerNormalization as one node; ONNX Runtime 1.13, OpenVINO 2023.0 and TensorRT 8.6 read it.
OPSET = 17
IR_VERSION = 8  # of ONNX 1.12, which brought opset 17; older runtimes refuse a newer one
RANGE = 127  # Paddle's scales are the largest value of a range; the step of the grid is 1/127 of it


def convert(prefix, unsigned_activations=True):
    """The ONNX model of the graph ``prefix``: input_ids, token_type_ids, int64 [batch, tokens] -> logits.

    Args: unsigned_activations: uint8 with zero point 128, the same grid as int8 with zero point 0. The instructions of
        x86 multiply unsigned by signed bytes; TensorRT takes zero point 0 only.
    Raises: UserError for an operator that is not known here.
    """
    with exporting.loaded_graph(prefix) as (program, inputs, outputs, _, scope):
        graph = _Graph(program.global_block(), scope, unsigned_activations)
        for operator in program.global_block().ops:
            graph.add(operator)
        return graph.model(sorted(inputs), outputs[0].name)


def counts(model):
    """{type of node: how many}, of an ONNX model."""
    types = [node.op_type for node in model.graph.node]
    return {kind: types.count(kind) for kind in sorted(set(types))}


class _Graph:
    """The nodes and constants of an ONNX graph under construction."""

    def __init__(self, block, scope, unsigned_activations):
        self.block, self.scope = block, scope
        self.zero_point = np.array(128, "uint8") if unsigned_activations else np.array(0, "int8")
        self.nodes, self.constants = [], {}
        self.called = {}  # variable of Paddle: tensor of ONNX, where the operator that made it has no node
        self.activations = {}  # output of a DequantizeLinear: (what was quantized, range)
        self.weights = {}  # output of a DequantizeLinear: (name of the int8 weight, ranges, their axis)

    def model(self, inputs, output):
        """The whole as a ModelProto, checked by ONNX."""
        shape = ["batch", "tokens"]
        feeds = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in inputs]
        self.nodes.append(helper.make_node("Identity", [self.name(output)], ["logits"]))
        width = self.block.var(output).shape[-1]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", width])
        constants = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "encoder", feeds, [logits], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="pp-minilm")
        model.ir_version = IR_VERSION
        onnx.checker.check_model(model, full_check=True)
        return model

    # What the operators below are made of

    def add(self, operator):
        write = getattr(self, f"_{operator.type}", None)
        if write is None:
            raise UserError(
                f"operator {operator.type}: not known to deploy/onnx/onnx_graph.py, so there is no ONNX of it"
            )
        write(operator)

    def name(self, variable):
        """The tensor of ONNX that holds a variable of Paddle. Parameters become constants when they are first used."""
        if variable in self.called:
            return self.called[variable]
        found = self.block.vars.get(variable)
        if found is not None and found.persistable and variable not in self.constants:
            self.constants[variable] = self.array(variable)
        return variable

    def array(self, variable):
        return np.array(self.scope.find_var(variable).get_tensor())

    def constant(self, name, array):
        self.constants[name] = np.asarray(array)
        return name

    def node(self, kind, inputs, output, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def integers(self, output, *values):
        """A constant of int64 for the node that makes ``output``: axes, shapes."""
        return self.constant(f"{output}.{'_'.join(map(str, values))}", np.array(values, "int64"))

    def one_to_one(self, kind, operator, inputs=("X",), **attributes):
        tensors = [self.name(operator.input(slot)[0]) for slot in inputs]
        self.node(kind, tensors, operator.output("Out")[0], **attributes)

    def same(self, operator):
        """The operator changes nothing at inference."""
        self.called[operator.output("Out")[0]] = self.name(operator.input("X")[0])

    def dtype_of(self, variable):
        """The NumPy dtype of a variable of Paddle."""
        return np.dtype(paddle.base.data_feeder.convert_dtype(self.block.var(variable).dtype))

    # Inputs and outputs

    def _feed(self, operator):
        pass

    def _fetch(self, operator):
        pass

    # Operators with one node of the same meaning

    def _bmm(self, operator):
        self.one_to_one("MatMul", operator, ("X", "Y"))

    def _equal(self, operator):
        self.one_to_one("Equal", operator, ("X", "Y"))

    def _relu(self, operator):
        self.one_to_one("Relu", operator)

    def _tanh(self, operator):
        self.one_to_one("Tanh", operator)

    def _softmax(self, operator):
        self.one_to_one("Softmax", operator, axis=operator.attr("axis"))

    def _transpose2(self, operator):
        self.one_to_one("Transpose", operator, perm=operator.attr("axis"))

    def _cast(self, operator):
        dtype = self.dtype_of(operator.output("Out")[0])
        self.one_to_one("Cast", operator, to=helper.np_dtype_to_tensor_dtype(dtype))

    def _shape(self, operator):
        self.one_to_one("Shape", operator, ("Input",))

    def _elementwise_add(self, operator):
        self.elementwise("Add", operator)

    def _elementwise_sub(self, operator):
        self.elementwise("Sub", operator)

    def _elementwise_mul(self, operator):
        self.elementwise("Mul", operator)

    def elementwise(self, kind, operator):
        if operator.attr("axis") != -1:
            raise UserError(f"{operator.type} along axis {operator.attr('axis')}: not known here, only -1")
        self.one_to_one(kind, operator, ("X", "Y"))

    def _layer_norm(self, operator):
        (x,), epsilon = operator.input("X"), operator.attr("epsilon")
        if operator.attr("begin_norm_axis") != len(self.block.var(x).shape) - 1:
            raise UserError("layer_norm over more than the last axis: not known here")
        tensors = [self.name(operator.input(slot)[0]) for slot in ("X", "Scale", "Bias")]
        self.node("LayerNormalization", tensors, operator.output("Y")[0], axis=-1, epsilon=epsilon)

    # Operators whose arguments stand elsewhere in ONNX

    def _not_equal(self, operator):
        (output,) = operator.output("Out")
        tensors = [self.name(operator.input(slot)[0]) for slot in ("X", "Y")]
        self.node("Not", [self.node("Equal", tensors, f"{output}.equal")], output)

    def _reshape2(self, operator):
        """0 in a shape means the input's size, in Paddle as in ONNX."""
        (output,) = operator.output("Out")
        shape = self.integers(output, *operator.attr("shape"))
        self.node("Reshape", [self.name(operator.input("X")[0]), shape], output)

    def _squeeze2(self, operator):
        self.with_axes("Squeeze", operator)

    def _unsqueeze2(self, operator):
        self.with_axes("Unsqueeze", operator)

    def with_axes(self, kind, operator):
        (output,) = operator.output("Out")
        self.node(kind, [self.name(operator.input("X")[0]), self.integers(output, *operator.attr("axes"))], output)

    def _slice(self, operator):
        (output,) = operator.output("Out")
        bounds = [self.integers(f"{output}.{name}", *operator.attr(name)) for name in ("starts", "ends", "axes")]
        dropped = operator.attr("decrease_axis")
        sliced = self.node(
            "Slice", [self.name(operator.input("Input")[0]), *bounds], f"{output}.slice" if dropped else output
        )
        if dropped:
            self.node("Squeeze", [sliced, self.integers(output, *dropped)], output)

    def _cumsum(self, operator):
        if operator.attr("flatten") or operator.attr("exclusive") or operator.attr("reverse"):
            raise UserError("cumsum that is flattened, exclusive or reversed: not known here")
        (output,) = operator.output("Out")
        axis = self.constant(f"{output}.axis", np.array(operator.attr("axis"), "int64"))
        self.node("CumSum", [self.name(operator.input("X")[0]), axis], output)

    def _fill_constant(self, operator):
        (output,) = operator.output("Out")
        dtype = self.dtype_of(output)
        value = operator.attr("str_value") or operator.attr("value")
        sizes = operator.input("ShapeTensorList") if "ShapeTensorList" in operator.input_names else []
        if not sizes:
            self.constant(output, np.full(operator.attr("shape"), float(value)).astype(dtype))
            return
        parts = []
        for i, size in enumerate(sizes):
            part = self.node("Cast", [self.name(size)], f"{output}.int64_{i}", to=TensorProto.INT64)
            parts.append(self.node("Reshape", [part, self.integers(f"{output}.size_{i}", 1)], f"{output}.size_{i}"))
        shape = self.node("Concat", parts, f"{output}.shape", axis=0)
        self.filled(shape, output, float(value), dtype)

    def _fill_any_like(self, operator):
        (output,) = operator.output("Out")
        dtype = self.dtype_of(output)
        shape = self.node("Shape", [self.name(operator.input("X")[0])], f"{output}.shape")
        self.filled(shape, output, operator.attr("value"), dtype)

    def filled(self, shape, output, value, dtype):
        value = numpy_helper.from_array(np.array([value]).astype(dtype))
        self.node("ConstantOfShape", [shape], output, value=value)

    def _scale(self, operator):
        """y = scale * x + bias, or scale * (x + bias)."""
        scale, bias = operator.attr("scale"), operator.attr("bias")
        if (scale, bias) == (1, 0):
            self.same(operator)
            return
        (x,), (output,) = operator.input("X"), operator.output("Out")
        dtype = self.dtype_of(output)
        scale, bias = np.array(scale, "float32").astype(dtype), np.array(bias, "float32").astype(dtype)
        if not operator.attr("bias_after_scale"):
            bias = scale * bias
        scaled = f"{output}.scaled" if bias else output
        self.node("Mul", [self.name(x), self.constant(f"{output}.scale", scale)], scaled)
        if bias:
            self.node("Add", [scaled, self.constant(f"{output}.bias", bias)], output)

    def _dropout(self, operator):
        if operator.attr("dropout_implementation") != "upscale_in_train":
            raise UserError("dropout that scales at inference: not known here")
        self.same(operator)

    def _assign(self, operator):
        self.same(operator)

    def _lookup_table_v2(self, operator):
        (table,), (ids,), (output,) = operator.input("W"), operator.input("Ids"), operator.output("Out")
        padding = operator.attr("padding_idx")
        if padding != -1:  # Paddle answers zeros for this row
            array = self.array(table)
            array[padding] = 0
            rows = self.constant(f"{table}.padded", array)
        else:
            rows = self.name(table)
        self.node("Gather", [rows, self.name(ids)], output)

    def _gelu(self, operator):
        """x (1 + erf(x / sqrt 2)) / 2, or with tanh (arXiv 1606.08415): opset 17 has no node for it. Runtimes know the
        first form and fuse it."""
        (x,), (output,) = operator.input("X"), operator.output("Out")
        x = self.name(x)

        def number(name, value):
            return self.constant(f"gelu.{name}", np.array(value, "float32"))

        def part(kind, inputs, name):
            return self.node(kind, inputs, f"{output}.{name}")

        if operator.attr("approximate"):
            cubed = part("Mul", [part("Mul", [x, x], "squared"), x], "cubed")
            inner = part("Add", [x, part("Mul", [cubed, number("cubic", 0.044715)], "small")], "inner")
            bent = part("Tanh", [part("Mul", [inner, number("root_2_pi", (2 / np.pi) ** 0.5)], "scaled")], "bent")
        else:
            bent = part("Erf", [part("Div", [x, number("root_2", 2**0.5)], "scaled")], "bent")
        both = part("Mul", [x, part("Add", [bent, number("one", 1)], "one_more")], "both")
        self.node("Mul", [both, number("half", 0.5)], output)

    # Matrix products and quantization

    def _quantize_linear(self, operator):
        """Paddle's pair x -> q -> x' around an activation; it is written where a product with weights takes x'."""
        (x,), (scale,), (output,) = operator.input("X"), operator.input("Scale"), operator.output("Y")
        self.activations[output] = (x, float(self.array(scale).reshape(-1)[0]))

    def _dequantize_linear(self, operator):
        (x,), (scale,), (output,) = operator.input("X"), operator.input("Scale"), operator.output("Y")
        if x in self.activations:
            self.activations[output] = self.activations[x]
            self.called[output] = self.name(self.activations[x][0])
        else:
            self.weights[output] = (x, self.array(scale).reshape(-1), operator.attr("quant_axis"))

    def _matmul_v2(self, operator):
        (x,), (y,), (output,) = operator.input("X"), operator.input("Y"), operator.output("Out")
        if y in self.weights:
            if operator.attr("trans_x") or operator.attr("trans_y") or x not in self.activations:
                raise UserError(
                    f"{output}: a product with quantized weights, but transposed or with an activation in FP32"
                )
            self.node("MatMul", [self.quantized(x), self.dequantized(y)], output)
            return
        sides = [
            self.transposed(name, f"{output}.{side}") if operator.attr(f"trans_{side}") else self.name(name)
            for side, name in (("x", x), ("y", y))
        ]
        self.node("MatMul", sides, output)

    def transposed(self, variable, output):
        order = list(range(len(self.block.var(variable).shape)))
        order[-2:] = reversed(order[-2:])
        return self.node("Transpose", [self.name(variable)], output, perm=order)

    def quantized(self, variable):
        """The tensor that holds an activation after rounding. Products of one activation share it."""
        source, largest = self.activations[variable]
        quantized, output = f"{variable}.quantized", f"{variable}.rounded"
        step, zero_point = f"{variable}.step", f"zero_{self.zero_point.dtype}"
        if step not in self.constants:
            self.constant(zero_point, self.zero_point)
            self.constant(step, np.array(largest / RANGE, "float32"))
            self.node("QuantizeLinear", [self.name(source), step, zero_point], quantized)
            self.node("DequantizeLinear", [quantized, step, zero_point], output)
        return output

    def dequantized(self, variable):
        """The tensor that holds a weight in floating point, made from int8 [rows, columns] and a scale per column.

        The square weights of a graph for CPUs have a scale per row (quantization/weights.py). Runtimes compute in
        INT8 with scales per column only, so these weights are rounded once more.
        """
        weight, largest, axis = self.weights[variable]
        if axis == 0:
            rounded = self.array(weight) * (largest / RANGE)[:, None]
            largest = np.abs(rounded).max(0)
            largest[largest == 0] = 1
            self.constant(weight, np.round(rounded / largest * RANGE).astype("int8"))
        step = self.constant(f"{weight}.step", (largest / RANGE).astype("float32"))
        zero_points = self.constant(f"{weight}.zero", np.zeros(len(largest), "int8"))
        return self.node("DequantizeLinear", [self.name(weight), step, zero_points], f"{weight}.float", axis=1)
