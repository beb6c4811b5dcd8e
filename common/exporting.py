"""Exporting a classification model as the static graph that quantization and deployment take, and checking it."""

import contextlib
import os
import pickle
import time

import numpy as np

from common import PADDLE, UserError, batching, engine, cli, files, modeling, records
from common.compat import paddle


GRAPH_SUFFIXES = (".pdiparams", ".pdiparams.info", ".pdmodel")


def add_export_arguments(parser, group):
    """Args: group: of the other arguments."""
    help = "checked against stage.json if given"
    group.add_argument("--model_type", choices=sorted(modeling.MODEL_TYPES), help=help)
    help = "largest difference of a logit allowed between the model and its graph"
    group.add_argument("--parity_tolerance", type=float, default=1e-4, help=help, without_effect=True)
    help = "compute the last layer for the [CLS] position alone, which is all that the classifier reads: the same "
    help += "logits in less time (default: on for a CPU, off for a GPU, where TensorRT fuses whole layers)"
    group.add_flag("--cls_only", help, default=None)
    cli.add_device_argument(group)
    cli.add_input_arguments(parser)


def choose_device(args):
    """Selects --device, and decides --cls_only if it was not given."""
    device = cli.set_device(args.device)
    if args.cls_only is None:
        args.cls_only = device == "cpu"


class FirstPositionLayer(paddle.nn.Layer):
    """The last encoder layer, computed for position 0 alone, which is all that the pooler reads.

    With one query per head, keys and values need no projection of every token either: q (K x + b) = (K^T q) x + q b,
    where the last term is the same for all tokens and does not change the softmax; and sum(a (V x + b)) =
    V sum(a x) + b, as the attention weights a sum to 1. So the layer costs matrix products per sequence, not per token.

    Args: layer: paddle.nn.TransformerEncoderLayer that normalizes after each residual sum, as BERT does; not changed.
    """

    def __init__(self, layer):
        super().__init__()
        attention = layer.self_attn
        self.heads, self.dim = attention.num_heads, attention.head_dim
        self.q_proj, self.out_proj = attention.q_proj, attention.out_proj
        self.linear1, self.linear2, self.activation = layer.linear1, layer.linear2, layer.activation
        self.norm1, self.norm2 = layer.norm1, layer.norm2
        key = attention.k_proj.weight.reshape([-1, self.heads, self.dim])
        value = attention.v_proj.weight.reshape([-1, self.heads, self.dim])
        self.key = self.constant(key.transpose([1, 2, 0]) * self.dim**-0.5)  # [heads, head_dim, hidden]
        self.value = self.constant(value.transpose([1, 0, 2]))  # [heads, hidden, head_dim]
        self.value_bias = attention.v_proj.bias

    def constant(self, array):
        return self.create_parameter(array.shape, default_initializer=paddle.nn.initializer.Assign(array))

    def forward(self, src, src_mask, cache=None, output_attentions=False):
        """[batch, 1, hidden] of src [batch, tokens, hidden] and an additive mask [batch, 1, 1, tokens]."""
        first = src[:, :1]
        query = self.q_proj(first).reshape([-1, self.heads, self.dim]).transpose([1, 0, 2])
        # bmm, not matmul: quantization takes every matmul, and products per sequence gain nothing from INT8.
        query = paddle.bmm(query, self.key).transpose([1, 0, 2])  # [batch_size, heads, hidden]
        scores = paddle.bmm(query, src.transpose([0, 2, 1])) + src_mask.squeeze(1)
        context = paddle.bmm(paddle.nn.functional.softmax(scores), src).transpose([1, 0, 2])
        context = paddle.bmm(context, self.value).transpose([1, 0, 2]).reshape([-1, 1, self.heads * self.dim])
        hidden = self.norm1(first + self.out_proj(context + self.value_bias))
        return self.norm2(hidden + self.linear2(self.activation(self.linear1(hidden))))


@contextlib.contextmanager
def first_position_only(model):
    """Within this block the model's last layer computes position 0 alone. The logits stay the same."""
    layers = modeling.encoder_of(model).encoder.layers
    last = layers[-1]
    layers[-1] = FirstPositionLayer(last)
    layers[-1].eval()
    try:
        yield
    finally:
        layers[-1] = last


def export_static(model, prefix, cls_only=False):
    """Writes the inference graph ``prefix``.{pdmodel,pdiparams,pdiparams.info}: input_ids, token_type_ids -> logits.

    Args: cls_only: of the last layer, compute only the [CLS] position, which is what the classifier reads.
    """
    model.eval()
    tokens = [paddle.static.InputSpec([None, None], "int64", name) for name in ("input_ids", "token_type_ids")]
    with first_position_only(model) if cls_only else contextlib.nullcontext():
        paddle.jit.save(paddle.jit.to_static(model, input_spec=tokens, full_graph=True), prefix)
    remove_call_stacks(f"{prefix}.pdmodel")
    # Paddle writes this table of the parameters' names in the order of their addresses: another file in every process.
    with open(f"{prefix}.pdiparams.info", "rb") as file:
        names = pickle.load(file)
    with open(f"{prefix}.pdiparams.info", "wb") as file:
        pickle.dump(dict(sorted(names.items())), file, protocol=2)


def export_checked(model, prefix, expected, features, inputs, pad_id, args):
    """Writes the graph of a model and compares it with the logits that it has to give, in the engine that will run it.

    Args: expected: logits [n, classes] of the features. inputs: what the features are. args: of add_export_arguments.
    Returns: the field ``export`` of stage.json. Raises: UserError past --parity_tolerance.
    """
    export_static(model, prefix, args.cls_only)
    found = engine.Engine(prefix).predict(features, pad_id=pad_id)
    parity = check_parity(expected, found, inputs, args.parity_tolerance)
    directory, name = os.path.split(prefix)
    hashes = files.hash_files(directory, [name + suffix for suffix in GRAPH_SUFFIXES])
    size = os.path.getsize(f"{prefix}.pdiparams")
    return {"weights": hashes, "parity": parity, "cls_only": args.cls_only, "bytes": size}


@contextlib.contextmanager
def locked_model(directory):
    """Within this block no run replaces the model in a directory. Raises: UserError if there is none, or one does."""
    if not os.path.isdir(directory):
        raise UserError(f"--model_path {directory}: no such directory; a model of stage finetune is needed")
    with files.Lock(directory):
        yield


def export_into(directory, classifier, examples, args, name="inference"):
    """Puts the graph of a model beside its weights, and what it is into its stage.json.

    After a kill or a power cut on the way the directory holds the old graph, the new one, or a half that is refused.

    Args: directory: of the model, locked. classifier: checkpoints.Classifier that was loaded from there. examples: of
        its task, or none; see parity_inputs. args: of add_export_arguments. name: of the graph's files.
    """
    started = time.time()
    model, tokenizer, record = classifier.model, classifier.tokenizer, classifier.record
    features, inputs = parity_inputs(examples, tokenizer, args.max_seq_length)
    expected = modeling.predict(model, features, tokenizer.pad_id)
    with files.empty_directory(os.path.join(directory, ".export")) as scratch:
        # The graph is checked in the engine that will run it.
        prefix = os.path.join(scratch, name)
        export = export_checked(model, prefix, expected, features, inputs, tokenizer.pad_id, args)
        record["export"] = {**export, "seconds": round(time.time() - started, 1)}
        records.write_record(scratch, record)
        files.sync_tree(scratch)
        # The record comes last. Until then the old one refuses what is half new. After a power cut the
        # new one may be there without a part of the graph, and refuses it, too.
        for file in (*export["weights"], records.RECORD):
            os.replace(os.path.join(scratch, file), os.path.join(directory, file))
        files.sync(directory)
    print(
        f"{record['task']}: exported to {os.path.join(directory, name)}.pdmodel, logits within "
        f"{export['parity']['largest_difference']:.1e} of the dynamic model on {inputs}"
    )


@contextlib.contextmanager
def loaded_graph(prefix):
    """The static graph ``prefix`` in a scope of its own: yields (program, inputs, outputs, executor, scope)."""
    scope = paddle.static.Scope()
    paddle.enable_static()
    try:
        with paddle.static.scope_guard(scope):
            executor = paddle.static.Executor(paddle.CPUPlace())
            yield (*paddle.static.load_inference_model(prefix, executor), executor, scope)
    finally:
        paddle.disable_static()


def tensor_of(variable):
    """The description of a tensor in a graph's variable. Paddle 3 has given the field of its type another name."""
    return variable.type.lod_tensor if PADDLE < (3,) else variable.type.dense_tensor


def read_program(path):
    """The ProgramDesc message of a .pdmodel file."""
    from paddle.base.proto import framework_pb2

    with open(path, "rb") as file:
        return framework_pb2.ProgramDesc.FromString(file.read())


def remove_call_stacks(path):
    """Removes from a .pdmodel file where in the source each operator was made: these are paths of this machine."""
    program = read_program(path)
    for block in program.blocks:
        for operator in block.ops:
            kept = [attribute for attribute in operator.attrs if attribute.name != "op_callstack"]
            del operator.attrs[:]
            operator.attrs.extend(kept)
    with open(path, "wb") as file:
        file.write(program.SerializeToString())


def parity_inputs(examples, tokenizer, max_seq_length):
    """Inputs on which a model is compared before and after a hand-off: (list of Feature, what they are).

    Args: examples: records of the task, of which 32 are taken; if there are none, 32 sequences of random tokens.
    """
    if examples:
        chosen = examples[:32]
        return batching.convert(chosen, tokenizer, max_seq_length), f"{len(chosen)} dev records"
    random = np.random.default_rng(0)
    lengths = random.integers(4, max_seq_length + 1, 32)
    rows = [random.integers(0, len(tokenizer.vocab), n).tolist() for n in lengths]
    features = []
    for row in rows:
        # Padding within a sequence would be masked in one graph and not in another, so [SEP] takes its place.
        ids = [tokenizer.sep_id if i == tokenizer.pad_id else i for i in row[1:]]
        features.append(batching.Feature([tokenizer.cls_id, *ids], [0] * len(row), None))
    return features, "32 sequences of random tokens"


def check_parity(expected, found, inputs, tolerance):
    """Compares the logits of a model before and after a hand-off. Returns: the comparison, for the record.

    Args: expected, found: [n, classes]. inputs: what they were computed on. Raises: UserError past the tolerance.
    """
    largest = float(np.abs(expected - found).max())
    if not largest <= tolerance:
        raise UserError(
            f"the new model's logits differ from the original's by {largest:.2e} on {inputs}; at most "
            f"{tolerance:.0e} is allowed (--parity_tolerance)"
        )
    return {"inputs": inputs, "largest_difference": largest, "tolerance": tolerance}
