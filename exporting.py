"""Exporting a classification model as the static graph that quantization and deployment take, and comparing the two."""

import contextlib
import pickle

import compat  # noqa: F401  before Paddle

import numpy as np
import paddle

import data
import modeling
import utils
from utils import UserError


def add_export_arguments(group):
    group.add_argument("--model_type", choices=sorted(modeling.MODEL_TYPES), help="checked against stage.json if given")
    group.add_argument("--parity_tolerance", type=float, default=1e-4, help="largest difference of a logit allowed")
    group.add_argument(
        "--cls_only",
        nargs="?",
        const=True,
        type=utils.boolean,
        help="compute the last layer for the [CLS] position alone, which is all that the classifier reads: the same "
        "logits in less time (default: on for a CPU, off for a GPU, where TensorRT fuses whole layers)",
    )
    group.add_argument("--device", help="gpu or cpu (default: gpu if Paddle has one)")
    utils.add_data_arguments(group)
    utils.add_tokenizer_arguments(group)


def set_device(args):
    """Selects --device, and what --cls_only is where it was not given."""
    device = utils.set_device(args.device)
    args.cls_only = device == "cpu" if args.cls_only is None else args.cls_only


class FirstPositionLayer(paddle.nn.Layer):
    """The last encoder layer, computed for position 0 alone, which is all that the pooler reads.

    With one query a head, keys and values need no projection of every token either: q (K x + b) = (K^T q) x + q b,
    where the last term is the same for all tokens and leaves the softmax as it is; and sum(a (V x + b)) =
    V sum(a x) + b, as the weights a sum to 1. So the layer costs matrix products per sequence instead of per token.

    Args: layer: paddle.nn.TransformerEncoderLayer, normalizing after each residual sum, as BERT does; not changed.
    """

    def __init__(self, layer):
        super().__init__()
        attention = layer.self_attn
        self.heads, self.dim = attention.num_heads, attention.head_dim
        self.q_proj, self.out_proj = attention.q_proj, attention.out_proj
        self.linear1, self.linear2, self.activation = layer.linear1, layer.linear2, layer.activation
        self.norm1, self.norm2 = layer.norm1, layer.norm2
        key, value = (
            projection.weight.reshape([-1, self.heads, self.dim]) for projection in (attention.k_proj, attention.v_proj)
        )
        self.key = self.constant(key.transpose([1, 2, 0]) * self.dim**-0.5)  # [heads, head_dim, hidden]
        self.value = self.constant(value.transpose([1, 0, 2]))  # [heads, hidden, head_dim]
        self.value_bias = attention.v_proj.bias

    def constant(self, array):
        return self.create_parameter(array.shape, default_initializer=paddle.nn.initializer.Assign(array))

    def forward(self, src, src_mask, cache=None, output_attentions=False):
        """[batch_size, 1, hidden] of src [batch_size, seq_len, hidden] and an additive mask."""
        first = src[:, :1]
        query = self.q_proj(first).reshape([-1, self.heads, self.dim]).transpose([1, 0, 2])
        # bmm, because quantization takes every matmul, and what takes no tokens gains nothing from it.
        query = paddle.bmm(query, self.key).transpose([1, 0, 2])  # [batch_size, heads, hidden]
        scores = paddle.bmm(query, src.transpose([0, 2, 1])) + src_mask.squeeze(1)
        context = paddle.bmm(paddle.nn.functional.softmax(scores), src).transpose([1, 0, 2])
        context = paddle.bmm(context, self.value).transpose([1, 0, 2]).reshape([-1, 1, self.heads * self.dim])
        hidden = self.norm1(first + self.out_proj(context + self.value_bias))
        return self.norm2(hidden + self.linear2(self.activation(self.linear1(hidden))))


@contextlib.contextmanager
def first_position_only(model):
    """While this is entered, the model's last layer computes position 0 alone. The logits stay the same."""
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

    Args: cls_only: compute of the last layer only what the classifier reads, the position of [CLS].
    """
    model.eval()
    tokens = [paddle.static.InputSpec([None, None], "int64", name) for name in ("input_ids", "token_type_ids")]
    with first_position_only(model) if cls_only else contextlib.nullcontext():
        paddle.jit.save(paddle.jit.to_static(model, input_spec=tokens, full_graph=True), prefix)
    forget_call_stacks(f"{prefix}.pdmodel")
    # Paddle writes this table of the parameters' names in the order of their addresses: another file in every process.
    with open(f"{prefix}.pdiparams.info", "rb") as file:
        names = pickle.load(file)
    with open(f"{prefix}.pdiparams.info", "wb") as file:
        pickle.dump(dict(sorted(names.items())), file, protocol=2)


def read_program(path):
    """The ProgramDesc message of a .pdmodel."""
    from paddle.base.proto import framework_pb2

    with open(path, "rb") as file:
        return framework_pb2.ProgramDesc.FromString(file.read())


def forget_call_stacks(path):
    """Removes from a .pdmodel where each operator was made in the source: these are paths of this machine."""
    program = read_program(path)
    for block in program.blocks:
        for operator in block.ops:
            kept = [attribute for attribute in operator.attrs if attribute.name != "op_callstack"]
            del operator.attrs[:]
            operator.attrs.extend(kept)
    with open(path, "wb") as file:
        file.write(program.SerializeToString())


def parity_features(args, record, tokenizer, max_seq_length):
    """Inputs to compare a model before and after a hand-off: (features, what they are).

    32 dev records if they lie on this machine, else 32 sequences of random tokens: an export starts no download.
    """
    try:
        local = data.is_local(record["task"], "dev", args.data_dir)
    except UserError:
        if args.data_dir:
            raise
        local = False
    if local:
        task = data.Task(record["task"], tuple(record["labels"]))
        dev = data.read_split(task, "dev", args.data_dir, min(args.max_eval_samples or 32, 32))
        return data.convert(dev.examples, tokenizer, max_seq_length), f"{len(dev.examples)} dev records"
    random = np.random.default_rng(0)
    lengths = random.integers(4, max_seq_length + 1, 32)
    ids = [random.integers(0, len(tokenizer.vocab), n).tolist() for n in lengths]
    ids = [[tokenizer.cls_id] + [i if i != tokenizer.pad_id else tokenizer.sep_id for i in row[1:]] for row in ids]
    return [data.Feature(row, [0] * len(row), None) for row in ids], "32 sequences of random tokens"


def parity(expected, found, inputs, tolerance):
    """Compares two arrays of logits for the stage record. Raises: UserError past ``tolerance`` (largest difference)."""
    difference = float(np.abs(expected - found).max())
    if not difference <= tolerance:
        raise UserError(
            f"the new model's logits differ from the original's by {difference:.2e} on {inputs}; at most "
            f"{tolerance:.0e} is allowed (--parity_tolerance)"
        )
    return {"inputs": inputs, "largest_difference": difference, "tolerance": tolerance}
