"""The matrix products of a quantized graph: what each is in the encoder, and how it returns to floating point."""

import os
from typing import NamedTuple, Optional

import weights
from common import exporting

# The products of one encoder layer in the order in which PaddleNLP's models compute them.
OF_LAYER = ("query", "key", "value", "attention output", "FFN in", "FFN out")
# Of a last layer that is computed for [CLS] alone, which has no products for keys and values (common/exporting.py).
OF_LAST_LAYER = ("query", "attention output", "FFN in", "FFN out")
AFTER_LAYERS = ("pooler", "classifier")


class Product(NamedTuple):
    """A product of activations [tokens, in] and a weight [in, out]."""

    part: str  # of a layer, such as "FFN in"
    layer: Optional[int]  # None after the layers
    weight: str  # name of its parameter
    shape: tuple  # [in, out] of the weight
    per_token: bool  # whether it is computed for every token, not for [CLS] alone

    @property
    def name(self):
        return self.part if self.layer is None else f"layer {self.layer} {self.part}"

    @property
    def kind(self):
        """As the part, but query, key and value are one kind: they take the same activations."""
        return "query/key/value" if self.part in OF_LAYER[:3] else self.part

    def multiply_adds(self, tokens):
        """Args: tokens: the mean length of a sequence. Returns: multiply-adds per sequence."""
        return self.shape[0] * self.shape[1] * (tokens if self.per_token else 1)


def quantized_products(block):
    """[(matmul_v2, dequantize_linear of its weight)] in the order of the graph."""
    makers = {output: operator for operator in block.ops for output in operator.output_arg_names}
    found = []
    for operator in block.ops:
        if operator.type == "matmul_v2":
            maker = makers.get(operator.input("Y")[0])
            if maker is not None and maker.type == "dequantize_linear" and block.var(maker.input("X")[0]).persistable:
                found.append((operator, maker))
    return found


def products_of(prefix, layers):
    """The quantized products of the graph ``prefix``, in its order: a list of Product.

    Args: layers: number of the encoder's layers, or None. If the products are not those of such an encoder, they are
        numbered.
    """
    with exporting.loaded_graph(prefix) as (program, *_):
        block = program.global_block()
        found = [maker.input("X")[0] for _, maker in quantized_products(block)]
        shapes = [tuple(block.var(name).shape) for name in found]
    places = [(f"product {number}", None, True) for number in range(len(found))]
    for per_token, last in ((True, OF_LAYER), (False, OF_LAST_LAYER)) if layers else ():
        known = [(part, layer, True) for layer in range(layers - 1) for part in OF_LAYER]
        known += [(part, layers - 1, per_token) for part in last]
        known += [(part, None, False) for part in AFTER_LAYERS]
        if len(known) == len(found):
            places = known
    return [
        Product(part, layer, weight, shape, per_token)
        for (part, layer, per_token), weight, shape in zip(places, found, shapes)
    ]


def groups_of(products):
    """{name: [numbers of products]}: each product, each layer, each kind."""
    groups = {product.name: [number] for number, product in enumerate(products)}
    for number, product in enumerate(products):
        if product.layer is not None:
            groups.setdefault(f"layer {product.layer}", []).append(number)
    for number, product in enumerate(products):
        if product.layer is not None:
            groups.setdefault(f"every {product.kind}", []).append(number)
    return groups


def original_weights(prefix, products):
    """{name: float32 [in, out]}: the weights of the FP32 graph ``prefix`` that was quantized."""
    with weights.rewriting(prefix) as (_, parameters):
        return {product.weight: parameters[product.weight] for product in products}


def return_to_float(prefix, target, originals):
    """Writes the quantized graph ``prefix`` to ``target`` with some of its products in floating point.

    Args: originals: {name of a weight: float32 [in, out]}, the FP32 weights of these products.
    """
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with weights.rewriting(prefix, target) as (block, parameters):
        makers = {output: operator for operator in block.ops for output in operator.output_arg_names}
        for product, of_weight in quantized_products(block):
            (weight,), (scale,) = of_weight.input("X"), of_weight.input("Scale")
            if weight not in originals:
                continue
            (rounded,), (dequantized,) = product.input("X"), product.input("Y")
            # The activation as it was before quantize_linear and dequantize_linear, two operators further up.
            quantized = makers[rounded].input("X")[0]
            (activation,) = makers[quantized].input("X")
            product._rename_input(rounded, copied(block, product, activation))
            product._rename_input(dequantized, weight)
            product._remove_attr("quantization_type")
            block._remove_op(block.ops.index(of_weight))
            for name in (weight, scale):
                block._remove_var(name)
            parameters[weight] = originals[weight]
            block.create_var(name=weight, shape=originals[weight].shape, dtype="float32", persistable=True)
        remove_unread(block)
    exporting.remove_call_stacks(f"{target}.pdmodel")


def copied(block, operator, variable):
    """The name of a copy of a variable, made just before an operator that is to read it.

    oneDNN's pass computes every product in INT8 whose activation has a known scale, and knows scales by the variable: a
    residual sum or another product that reads it is enough. Of the copy no scale is known.
    """
    copy, original = f"{operator.output('Out')[0]}.input", block.var(variable)
    block.create_var(name=copy, shape=original.shape, dtype=original.dtype)
    place = block.ops.index(operator)
    block._insert_op(place, type="assign", inputs={"X": [variable]}, outputs={"Out": [copy]})
    return copy


def remove_unread(block):
    """Removes the quantization of activations that no operator reads any more."""
    read = {name for operator in block.ops for name in operator.input_arg_names}
    for position, operator in reversed(list(enumerate(block.ops))):  # a pair's second operator comes first
        if operator.type in ("quantize_linear", "dequantize_linear") and operator.output("Y")[0] not in read:
            block._remove_op(position)
            read = {name for left in block.ops for name in left.input_arg_names}
