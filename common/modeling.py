"""Encoders with a classification head: families, architectures, sizes, predictions. checkpoints.py loads them."""

import hashlib
import math
import os
import sys

from common import UserError, batching, files, foreign, processes
from common.compat import paddle

MODEL_TYPES = foreign.MODEL_TYPES

# What an --init_config file may set. The defaults are ppminilm-6l-768h's values.
ARCHITECTURE = {
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "vocab_size": None,  # default: the size of the vocabulary
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
# ERNIE alone has these. They are recorded only where a configuration sets them.
ERNIE_ARCHITECTURE = ("use_task_id", "task_id", "task_type_vocab_size", "pool_act")


def model_class(model_type, kind="ForSequenceClassification"):
    """PaddleNLP's class for a model type. Args: kind: its suffix, such as ``Model`` or ``Tokenizer``."""
    from paddlenlp import transformers
    from paddlenlp.utils.log import logger

    logger.set_level("ERROR")  # below that it names every file that it reads and warns that a new head is new
    return getattr(transformers, MODEL_TYPES[model_type] + kind)


# Activations that Paddle has under another name or only with an argument: the approximations of GELU by tanh.
TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def _tanh_gelu(x):
    return paddle.nn.functional.gelu(x, approximate=True)


def build(cls, config):
    """A model of PaddleNLP's class ``cls`` with random weights, as its configuration says.

    PaddleNLP has no approximated GELU, and its ERNIE always normalizes with an epsilon of 1e-12.
    Raises: UserError for an activation that Paddle does not have.
    """
    activation = config.hidden_act
    if activation not in TANH_GELU and not callable(getattr(paddle.nn.functional, str(activation), None)):
        raise UserError(
            f"hidden_act {activation!r}: no activation of Paddle; relu, gelu and {', '.join(TANH_GELU)} are"
        )
    if activation in TANH_GELU:
        config.hidden_act = "gelu"
    model = cls(config)
    config.hidden_act = activation
    if activation in TANH_GELU:
        for layer in encoder_of(model).encoder.layers:
            layer.activation = _tanh_gelu
    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.LayerNorm) and getattr(config, "layer_norm_eps", None) is not None:
            layer._epsilon = config.layer_norm_eps
    return model


def encoder_of(model):
    """The encoder (embeddings, layers, pooler) inside a model with a head, or the model itself."""
    return getattr(model, model.base_model_prefix, model)


def architecture_of(model):
    names = (*ARCHITECTURE, *ERNIE_ARCHITECTURE)
    return {name: getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None}


def random_config(model_type, init_config, vocab_size, num_labels):
    """PaddleNLP's configuration for a JSON architecture. Raises: UserError if no model can be built.

    Args: init_config: path of the file, or what would be in it.
    """
    option = f"--init_config {init_config}"
    if isinstance(init_config, dict):
        given = init_config
    elif os.path.isfile(init_config):
        given = files.read_json(init_config, option)
    else:
        raise UserError(f"{option}: no such file")
    if not isinstance(given, dict):
        raise UserError(f"{option}: must be a JSON object")
    known = {*ARCHITECTURE, *ERNIE_ARCHITECTURE}
    unknown = sorted(set(given) - known)
    if unknown and {"model_type", "architectures"} & set(given):
        # A whole config.json, of Hugging Face or PaddleNLP. Its vocabulary may be larger than the one in use.
        family = foreign.family_of(given)
        if family not in (None, model_type):
            raise UserError(f"{option}: of a model of type {family}; --model_type {family} takes it")
        foreign.check_network(given, option)
        given = {**foreign.defaults_of(given), **given}
        given = {name: value for name, value in given.items() if name in known and value is not None}
        given["vocab_size"] = max(given.get("vocab_size", vocab_size), vocab_size)
        if processes.is_first():
            print(f"note: {option}: these fields build nothing and are left out: {', '.join(unknown)}", file=sys.stderr)
    elif unknown:
        raise UserError(f"{option}: unknown {', '.join(unknown)}; it may set {', '.join(ARCHITECTURE)}")
    else:
        size = given.get("vocab_size") or vocab_size
        if size != vocab_size:
            raise UserError(f"{option}: vocab_size {size}, but --vocab_file has {vocab_size} tokens")
    fields = {**ARCHITECTURE, **given}
    fields["vocab_size"] = fields["vocab_size"] or vocab_size
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if hidden % heads:
        raise UserError(f"{option}: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    return model_class(model_type).config_class(**fields, num_labels=num_labels)


def count(model):
    """(params, flops): all parameters; multiply-adds of the encoder's linear layers at 128 tokens.

    FLOPs as in the published table: layers x 128 x (4 x hidden x attention width + 2 x hidden x FFN width).
    """
    params = sum(math.prod(p.shape) for p in model.parameters())
    matrices = [p for p in encoder_of(model).encoder.parameters() if len(p.shape) == 2]
    return params, 128 * sum(math.prod(p.shape) for p in matrices)


def tensors(batch):
    """(input_ids, token_type_ids) of a Batch as Paddle's int64 tensors [batch_size, tokens]."""
    return paddle.to_tensor(batch.input_ids), paddle.to_tensor(batch.token_type_ids)


def fingerprint(model):
    """md5 of all parameters."""
    digest = hashlib.md5()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@paddle.no_grad()
def predict(model, features, pad_id=0, batch_size=128):
    """Logits of a model in eval mode: float32 [n, outputs] in the order of the features. Keeps the model's mode."""
    training = model.training
    model.eval()
    sorted_batches = batching.batches(features, batch_size, pad_id, batching.by_length(features))
    logits = batching.gather(((batch, model(*tensors(batch)).numpy()) for batch in sorted_batches), len(features))
    if training:
        model.train()
    return logits
