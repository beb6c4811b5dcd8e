"""DynaBERT width pruning with PaddleSlim's OFA: valid widths, importance of heads and neurons, supernet, sub-models.

A width w keeps round(w x heads) attention heads and the same share of FFN neurons in every layer; the hidden size is
unchanged. Heads and neurons are first reordered by importance, so that a narrower model is a prefix of each matrix
(DynaBERT, arXiv 2004.04037). PaddleSlim's OFA (arXiv 1908.09791) trains several prefixes in one set of weights.
"""

import os

import numpy as np

from common import UserError, batching, checkpoints, compat, exporting
from common import files, modeling, processes, records, tokenization
from common.compat import paddle

SUB_CONFIG = "model_config.json"
LAMBDA_HIDDEN = 0.1  # weight of the hidden states' loss, as DynaBERT's lambda


def add_pruning_arguments(group):
    help = "weight of the logits' loss (hidden states: 0.1); raise it if the pruned model disagrees with its teacher"
    group.add_argument("--lambda_logit", type=float, default=1.0, help=help)
    help = "split that ranks heads and neurons; dev is the published recipe, but models are also selected on dev"
    group.add_argument("--importance_split", choices=("train", "dev"), default="train", help=help)
    help = "number of records used to rank heads and neurons; lower it to start sooner"
    group.add_argument("--importance_samples", type=int, default=2048, help=help, positive=True)
    group.add_flag("--do_train", "accepted; pruning always trains", default=None, without_effect=True)
    group.add_flag("--do_eval", "accepted; pruning always evaluates", default=None, without_effect=True)
    help = "largest allowed difference of a logit between the fine-tuned model and its supernet"
    group.add_argument("--parity_tolerance", type=float, default=1e-3, help=help, without_effect=True)


def check_widths(widths, record):
    """Raises: UserError if a width is not valid for the model that the record describes."""
    architecture = record["model"]["architecture"]
    for width in widths:
        check_width(width, architecture["num_attention_heads"], architecture["intermediate_size"])


def check_width(width, heads, neurons):
    """The number of heads that a width keeps. Raises: UserError with the valid widths, if this one is not valid."""
    allowed = [k for k in range(1, heads + 1) if neurons * k % heads == 0]
    kept = round(width * heads)
    if kept not in allowed or abs(width * heads - kept) > 1e-3:
        widths = ", ".join(f"{k / heads:.5g}" for k in allowed)
        raise UserError(
            f"--width_mult {width:g}: does not leave whole heads of {heads} and whole neurons of {neurons}; "
            f"these do: {widths}"
        )
    return kept


def layers_of(model):
    """The nn.TransformerEncoderLayer of each layer."""
    return list(modeling.encoder_of(model).encoder.layers)


def importance(model, batches, objective):
    """Importance of heads and FFN neurons for the objective's loss L on the labels, summed over batches.

    The importance of a head is |dL/dg| with a gate g = 1 on its output (Michel et al., arXiv 1905.10650, as DynaBERT
    uses it). That of a neuron is |sum of w dL/dw over its incoming weights and bias| + |sum of w dL/dw over its
    outgoing weights|. The model is in eval mode, and gradients are cleared between batches.

    Args: batches: iterable of batching.Batch with labels.
    Returns: (float64 [layers, heads], float64 [layers, neurons]).
    """
    model.eval()
    model.clear_gradients()
    layers = layers_of(model)
    gates = [paddle.ones([layer.self_attn.num_heads]) for layer in layers]
    for gate in gates:
        gate.stop_gradient = False

    def gated(gate):
        def hook(_, inputs):  # the outputs of the heads, side by side: [batch_size, tokens, heads x head_dim]
            heads = inputs[0].reshape([0, 0, len(gate), -1])
            return (heads * gate.unsqueeze(-1)).reshape([0, 0, -1])

        return hook

    hooks = [layer.self_attn.out_proj.register_forward_pre_hook(gated(gate)) for layer, gate in zip(layers, gates)]
    head_importance = np.zeros([len(layers), layers[0].self_attn.num_heads])
    neuron_importance = np.zeros([len(layers), layers[0].linear1.weight.shape[1]])
    for batch in batches:
        logits = model(*modeling.tensors(batch))
        objective.loss(logits, paddle.to_tensor(batch.labels)).backward()
        for i, (layer, gate) in enumerate(zip(layers, gates)):
            head_importance[i] += np.abs(gate.grad.numpy())
            w1, b1, w2 = (
                (p.numpy() * p.grad.numpy()) for p in (layer.linear1.weight, layer.linear1.bias, layer.linear2.weight)
            )
            neuron_importance[i] += np.abs(w1.sum(0) + b1) + np.abs(w2.sum(1))
            gate.clear_gradient()
        model.clear_gradients()
    for hook in hooks:
        hook.remove()
    return head_importance, neuron_importance


def reorder(model, head_importance, neuron_importance):
    """Puts the most important heads and neurons of every layer first; the model computes the same as before."""
    ofa = compat.paddleslim_ofa()
    for layer, heads, neurons in zip(layers_of(model), head_importance, neuron_importance):
        ofa.reorder_head(layer.self_attn, paddle.to_tensor(np.argsort(-heads, kind="stable")))
        order = paddle.to_tensor(np.argsort(-neurons, kind="stable"))
        ofa.reorder_neuron(layer.linear1, order, dim=1)
        ofa.reorder_neuron(layer.linear2, order, dim=0)


def rank_and_reorder(model, features, teacher, args):
    """Ranks heads and neurons on --importance_samples of the features, and puts the important ones first.

    Args: teacher: checkpoints.Classifier that the model is another copy of.
    """
    chosen = np.random.default_rng(args.seed).permutation(len(features))[: args.importance_samples]
    chosen = [features[i] for i in chosen]
    if processes.is_first():
        print(f"ranking heads and neurons on {len(chosen)} {args.importance_split} records")
    # Batches of a fixed size: the ranking must not depend on --batch_size or on the number of processes.
    batches = batching.batches(chosen, 32, teacher.tokenizer.pad_id, batching.by_length(chosen))
    reorder(model, *importance(model, batches, teacher.objective))


def make_supernet(model, widths):
    """PaddleSlim's OFA supernet of a reordered model, at width 1.0. The model itself cannot be used afterwards."""
    ofa = compat.paddleslim_ofa()
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    # Only the encoder's layers have a width. Converting the pooler would hide pooler.dense.weight from PaddleNLP.
    ofa.Convert(ofa.supernet(expand_ratio=sorted({*widths, 1.0}))).convert(modeling.encoder_of(model).encoder)
    load_plain_state(model, weights)  # the conversion created layers with random weights
    supernet = ofa.OFA(model, elastic_order=["width"])
    set_width(supernet, 1.0)
    return supernet


def check_reordered(teacher, supernet, features, tolerance):
    """Raises: UserError if the supernet at full width gives other logits than the fine-tuned model.

    Args: teacher: checkpoints.Classifier. tolerance: largest allowed difference of a logit.
    """
    pad_id = teacher.tokenizer.pad_id
    expected, actual = (modeling.predict(model, features, pad_id) for model in (teacher.model, supernet))
    exporting.check_parity(expected, actual, f"{len(features)} dev records, reordered", tolerance)


def plain_state(model):
    """The supernet's parameters under the names of the ordinary model: PaddleSlim wraps each layer as ``.fn``."""
    return {name.replace(".fn.", "."): value for name, value in model.state_dict().items()}


def load_plain_state(model, weights):
    for name, value in plain_state(model).items():
        value.set_value(weights[name])


def save_supernet(supernet, config, directory):
    """Writes the weights of a supernet as those of an ordinary model of full width. Args: config: PaddleNLP config."""
    config.save_pretrained(directory)
    paddle.save(plain_state(supernet.model), os.path.join(directory, checkpoints.WEIGHTS))


def set_width(supernet, width):
    """Makes the supernet compute with the first ``width`` of all heads and neurons."""
    layers = layers_of(supernet.model)
    full_heads = layers[0].self_attn.embed_dim // layers[0].self_attn.head_dim
    kept = check_width(width, full_heads, layers[0].linear1.fn.weight.shape[1])
    config = {name: {} for name in supernet.ofa_layers}
    # Widths are given as numbers of columns ("channel"), because PaddleSlim truncates ratio x columns to an integer.
    prefix = next(name for name in config if name.endswith("layers.0.linear1")).replace("0.linear1", "")
    for i, layer in enumerate(layers):
        layer.self_attn.num_heads = kept
        for place in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            config[f"{prefix}{i}.{place}"] = {"channel": kept * layer.self_attn.head_dim}
        config[f"{prefix}{i}.linear1"] = {"channel": layer.linear1.fn.weight.shape[1] * kept // full_heads}
    supernet.set_net_config(config)


def slice_state(weights, width, heads):
    """The parameters of the sub-model of that width: the leading rows and columns of each matrix.

    Args: weights: {name: array} of the full, reordered model.
    """
    part = {}
    for name, value in weights.items():
        owner, kind = name.rsplit(".", 1)
        place, kept = owner.rsplit(".", 1)[-1], lambda n: n * round(width * heads) // heads
        if ".encoder.layers." in f".{name}":
            if place in ("q_proj", "k_proj", "v_proj", "linear1"):  # [in, out] and [out]
                value = value[..., : kept(value.shape[-1])]
            elif place in ("out_proj", "linear2") and kind == "weight":
                value = value[: kept(value.shape[0])]
        part[name] = value
    return part


def build_sub_model(record, width):
    """An ordinary dynamic model with the narrow layers of that width and random weights.

    Args: record: record of the full model, or another dict with its ``model`` and ``labels``.
    """
    architecture = record["model"]["architecture"]
    cls = modeling.model_class(record["model"]["model_type"])
    model = modeling.build(cls, cls.config_class(**architecture, num_labels=len(record["labels"])))
    heads, neurons, hidden = (architecture[k] for k in ("num_attention_heads", "intermediate_size", "hidden_size"))
    kept = check_width(width, heads, neurons)
    inner, ffn = hidden // heads * kept, neurons * kept // heads
    for layer in layers_of(model):
        attention = layer.self_attn
        attention.num_heads = kept
        attention.q_proj, attention.k_proj, attention.v_proj = (paddle.nn.Linear(hidden, inner) for _ in range(3))
        attention.out_proj = paddle.nn.Linear(inner, hidden)
        layer.linear1, layer.linear2 = paddle.nn.Linear(hidden, ffn), paddle.nn.Linear(ffn, hidden)
    return model


def count_width(record, width):
    """(params, flops) of the sub-model of that width. Args: record: record of the full model."""
    return modeling.count(build_sub_model(record, width))


def save_sub_model(directory, weights, record, width):
    """Writes ``model_state.pdparams`` and ``model_config.json`` of a sub-model."""
    tensors = {name: paddle.to_tensor(value) for name, value in weights.items()}
    paddle.save(tensors, os.path.join(directory, checkpoints.WEIGHTS))
    config = {name: record["model"][name] for name in ("model_type", "architecture")}
    config.update(width_mult=width, num_labels=len(record["labels"]))
    files.write_json(os.path.join(directory, SUB_CONFIG), config)


def load_sub_model(directory):
    """Loads a pruned model for further training or inference: (model in eval mode, tokenizer, stage record).

    ``from_pretrained`` would build layers of full width. Args: directory: ``.../sub/model_width_0.75000``.
    Raises: UserError if the directory is not a pruned model, or its weights are damaged.
    """
    record = records.read_record(directory, "a pruned model (pruning/export.sh)")
    if SUB_CONFIG not in record["weights"]:
        raise UserError(f"{directory}: no {SUB_CONFIG} there, so it is not a pruned model of pruning/export.sh")
    records.check_files(directory, record)
    model = build_sub_model(record, record["model"]["width_mult"])
    path = os.path.join(directory, checkpoints.WEIGHTS)
    checkpoints.give_parameters(model, checkpoints.read_tensors(path), path)
    model.eval()
    return model, tokenization.load_tokenizer(directory), record


class HiddenStates:
    """Runs a classification model or a supernet. Also returns the outputs of the embeddings and of every layer."""

    def __init__(self, model):
        self.model, self.states, self.wanted = model, [], False
        encoder = modeling.encoder_of(getattr(model, "model", model))
        for layer in (encoder.embeddings, *encoder.encoder.layers):
            layer.register_forward_post_hook(self.keep)

    def keep(self, layer, inputs, output):
        if self.wanted:  # evaluation runs the same model, and must not collect the states of all of dev
            self.states.append(output)

    def run(self, inputs):
        """(logits [batch_size, labels], list of hidden states, float [batch_size, tokens, hidden] each)."""
        self.states, self.wanted = [], True
        logits = self.model(*inputs)
        self.wanted = False
        return logits, self.states


def hidden_loss(student_states, teacher_states):
    """The sum of the mean squared errors of hidden states, over embeddings and layers, float32 []."""
    return sum(paddle.nn.functional.mse_loss(s, t) for s, t in zip(student_states, teacher_states))
