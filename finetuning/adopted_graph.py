"""A static graph that was exported elsewhere: what adopt.py checks in it, reads from it, and writes."""

import os
import shutil

from common import UserError, checkpoints, engine, exporting, files, tokenization

INPUTS = ("input_ids", "token_type_ids")
NAME = "inference"  # of the graph's files where they are written


def is_graph(path):
    """Whether a path is a static graph, or a directory with one. Raises: UserError for one of Paddle 3's new format."""
    if os.path.isdir(path):
        names = os.listdir(path)
        if not any(name.endswith(".pdmodel") for name in names) and f"{NAME}.json" in names:
            raise UserError(
                f"{path}: a graph in Paddle 3's format (.json); FLAGS_enable_pir_api=0 makes its export a .pdmodel"
            )
        return any(name.endswith(".pdmodel") for name in names)
    return os.path.isfile(path) if path.endswith(".pdmodel") else os.path.isfile(f"{path}.pdmodel")


class FoundGraph:
    """A classifier as a static graph. What adopt.py asks of it is said at adopt.Found."""

    kind, names, flops = "static graph", None, None

    def __init__(self, args):
        self.prefix = checkpoints.find_prefix(args.model_path)
        directory = os.path.dirname(os.path.abspath(self.prefix))
        if engine.is_quantized(self.prefix):
            raise UserError(f"{self.prefix}: quantized already; take in the FP32 graph and quantize it here")
        self.read_program()
        vocab_file = args.vocab_file or os.path.join(directory, "vocab.txt")
        if not os.path.isfile(vocab_file):
            raise UserError(f"{vocab_file}: no such vocabulary; --vocab_file names the one that the graph is for")
        if args.vocab_file:
            self.tokenizer = tokenization.load_tokenizer(None, args.use_faster_tokenizer, args.vocab_file)
        else:
            self.tokenizer = tokenization.load_tokenizer(directory, args.use_faster_tokenizer)
        if len(self.tokenizer.vocab) > self.fields["architecture"]["vocab_size"]:
            size = self.fields["architecture"]["vocab_size"]
            raise UserError(f"{vocab_file}: {len(self.tokenizer.vocab)} tokens, but the graph has embeddings of {size}")
        try:
            self.engine = engine.Engine(self.prefix, args.device)
        except Exception as error:  # Paddle's own, of many kinds, for a file that is cut off
            raise UserError(f"{self.prefix}: Paddle cannot load it ({str(error).strip().splitlines()[-1]})") from error
        sources = [os.path.basename(self.prefix) + suffix for suffix in (".pdmodel", ".pdiparams")]
        hashes = files.hash_files(directory, sources)
        self.parent = {"path": files.relative(directory), "weights": hashes}
        self.weights = [f"{NAME}.pdmodel", f"{NAME}.pdiparams"]
        written = dict(zip(self.weights, hashes.values()))
        size = os.path.getsize(f"{self.prefix}.pdiparams")
        self.export = {"weights": written, "cls_only": False, "bytes": size, "parity": None}

    def read_program(self):
        """Sets fields, outputs and params from the operators. Raises: UserError if it is no graph of a classifier."""
        try:
            (block, *_) = exporting.read_program(f"{self.prefix}.pdmodel").blocks
        except Exception as error:  # DecodeError, or no block
            raise UserError(f"{self.prefix}.pdmodel: not a graph of Paddle, or damaged ({error})") from error
        kinds = {operator.type for operator in block.ops}
        if "faster_tokenizer" in kinds:
            raise UserError(
                f"{self.prefix}: takes strings (FasterTokenizer inside), which runs neither with oneDNN nor in INT8; "
                "export the model without --use_faster_tokenizer, so that it takes input_ids"
            )
        shapes = {}
        for variable in block.vars:
            shapes[variable.name] = list(exporting.tensor_of(variable).tensor.dims)
        feeds = sorted(arguments_of(op, "outputs", "Out")[0] for op in block.ops if op.type == "feed")
        fetches = [arguments_of(op, "inputs", "X")[0] for op in block.ops if op.type == "fetch"]
        if feeds != list(INPUTS) or len(fetches) != 1 or len(shapes[fetches[0]]) != 2:
            outputs = [shapes[name] for name in fetches]
            raise UserError(
                f"{self.prefix}: inputs {', '.join(feeds)} and outputs of shape {outputs}; {' and '.join(INPUTS)} and "
                "one output [texts, classes] are needed"
            )
        self.outputs = shapes[fetches[0]][1]
        parameters = {v.name: shapes[v.name] for v in block.vars if v.persistable and v.name not in ("feed", "fetch")}
        self.params = sum(product(shape) for shape in parameters.values())
        self.fields = {"model_type": "graph", "architecture": architecture_of(self.prefix, block, parameters)}

    def predict(self, features):
        return self.engine.predict(features, pad_id=self.tokenizer.pad_id)

    def write(self, directory):
        for suffix in (".pdmodel", ".pdiparams"):
            shutil.copyfile(self.prefix + suffix, os.path.join(directory, NAME + suffix))


def product(shape):
    size = 1
    for side in shape:
        size *= side
    return size


def arguments_of(operator, side, name):
    """The variables of an operator. Args: side: inputs or outputs. name: of the parameter."""
    return [argument for one in getattr(operator, side) if one.parameter == name for argument in one.arguments]


def architecture_of(prefix, block, parameters):
    """The sizes that later stages ask for, as far as the operators show them. Args: parameters: {name: shape}.

    Raises: UserError if there are no embeddings of words and positions.
    """
    positions, words = None, None
    for operator in block.ops:
        if operator.type != "lookup_table_v2":
            continue
        (ids,), (table,) = arguments_of(operator, "inputs", "Ids"), arguments_of(operator, "inputs", "W")
        if ids == INPUTS[0]:
            words = parameters.get(table)
        elif ids != INPUTS[1] and positions is None:  # position numbers are computed in the graph; ERNIE's task follows
            positions = parameters.get(table)
    if not words or not positions:
        raise UserError(f"{prefix}: has no embeddings of words and positions, so it is no encoder like BERT")
    hidden = words[1]
    widest = max((shape[1] for shape in parameters.values() if len(shape) == 2 and shape[0] == hidden), default=hidden)
    # [texts, tokens, heads, head_dim] is what attention reshapes to.
    heads = 1
    for operator in block.ops:
        for attribute in operator.attrs:
            if operator.type == "reshape2" and attribute.name == "shape" and len(attribute.ints) == 4:
                heads = max(heads, attribute.ints[2])
    return {
        "vocab_size": words[0],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": widest,
        "max_position_embeddings": positions[0],
    }
