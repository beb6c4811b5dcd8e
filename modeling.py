"""Encoders with a classification head: building, loading, counting, scoring."""

import json
import math
import os
import re
import tempfile

import compat  # before Paddle

import numpy as np
import paddle

import data
import records
import tensors
import tokenization
from utils import UserError

MODEL_TYPES = {"ppminilm": "PPMiniLM", "bert": "Bert", "ernie": "Ernie", "roberta": "Roberta"}
WEIGHTS = "model_state.pdparams"

# What an --init_config file may set. Where it is silent, these hold: ppminilm-6l-768h's own values.
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
    "vocab_size": None,  # the vocabulary's
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
# Of ERNIE, and only named where a configuration has them.
MORE_ARCHITECTURE = ("use_task_id", "task_id", "task_type_vocab_size", "pool_act")


def model_class(model_type, kind="ForSequenceClassification"):
    """PaddleNLP's class for a model type; ``kind`` is its suffix: ``Model``, ``Tokenizer``."""
    import paddlenlp.transformers as transformers
    from paddlenlp.utils.log import logger

    logger.set_level("ERROR")  # it names every file that it reads, and warns that a new head is new
    return getattr(transformers, MODEL_TYPES[model_type] + kind)


def encoder_of(model):
    """The encoder (embeddings, encoder, pooler) inside a model with a head, or the model itself."""
    return getattr(model, model.base_model_prefix, model)


def architecture_of(model):
    names = (*ARCHITECTURE, *MORE_ARCHITECTURE)
    return {name: getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None}


def add_model_arguments(group):
    group.add_argument("--model_type", default="ppminilm", choices=sorted(MODEL_TYPES), help="family of the encoder")
    group.add_argument(
        "--model_name_or_path",
        help="built-in name, or directory that an earlier stage wrote; required unless --init_config is given",
    )
    group.add_argument(
        "--init_config",
        help="JSON file with an architecture: start from random weights, where none "
        "can be downloaded (recorded in stage.json)",
    )
    group.add_argument("--vocab_file", help="vocabulary for --init_config, one token a line")


def is_model_directory(path):
    return os.path.isfile(os.path.join(path, WEIGHTS))


def random_config(model_type, init_config, vocab_size, num_labels):
    """The configuration that a JSON architecture describes. Raises: UserError for what cannot be built."""
    if not os.path.isfile(init_config):
        raise UserError(f"--init_config {init_config}: no such file")
    try:
        with open(init_config, encoding="utf-8") as file:
            given = json.load(file)
    except ValueError as error:
        raise UserError(f"--init_config {init_config}: not JSON ({error})") from error
    unknown = (
        sorted(set(given) - {*ARCHITECTURE, *MORE_ARCHITECTURE}) if isinstance(given, dict) else ["(not an object)"]
    )
    if unknown:
        raise UserError(
            f"--init_config {init_config}: unknown {', '.join(unknown)}; it may set {', '.join(ARCHITECTURE)}"
        )
    fields = {**ARCHITECTURE, **given}
    fields["vocab_size"] = fields["vocab_size"] or vocab_size
    if fields["vocab_size"] != vocab_size:
        raise UserError(
            f"--init_config {init_config}: vocab_size {fields['vocab_size']}, but --vocab_file has {vocab_size}"
        )
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise UserError(
            f"--init_config {init_config}: hidden_size {fields['hidden_size']} is not divisible by "
            f"num_attention_heads {fields['num_attention_heads']}"
        )
    return model_class(model_type).config_class(**fields, num_labels=num_labels)


def load(args, num_labels, kind="ForSequenceClassification", option="--model_name_or_path"):
    """The model and the tokenizer that ``--model_name_or_path`` or ``--init_config`` names.

    Args: option: the name by which the user knows ``--model_name_or_path``, for messages.
    Returns: (model, tokenizer, provenance); provenance has ``model``, ``parent`` and ``notes`` for the stage record.
    """
    fast = args.use_faster_tokenizer
    cls = model_class(args.model_type, kind)
    name, parent, notes = args.model_name_or_path, None, []
    if args.init_config:
        if name and is_model_directory(name):  # launchers pass a name for the results in any case
            raise UserError(f"{option} {name} and --init_config: the first has weights; give one of them")
        if not args.vocab_file:
            raise UserError("--init_config needs --vocab_file, the vocabulary that the new embeddings are for")
        tokenizer = tokenization.load_tokenizer(None, fast, args.vocab_file)
        config = random_config(args.model_type, args.init_config, len(tokenizer.vocab), num_labels)
        model, source, notes = cls(config), "random weights", ["random weights, no pre-training"]
    elif not name:
        raise UserError(f"{option} is needed: a built-in name or a model directory (or --init_config)")
    elif is_model_directory(name):
        if os.path.isfile(os.path.join(name, records.RECORD)):
            record = records.read_record(name)
            check_hashes(name, record)
            notes, parent = list(record["notes"]), parent_of(name, record)
        check_model_type(name, args.model_type)
        model, new = from_directory(cls, name, num_labels, new_head=True)
        notes += [f"random weights of the pooler, which {WEIGHTS} lacks"] * any("pooler" in each for each in new)
        source = records.relative(name)
        tokenizer = tokenization.load_tokenizer(name, fast)
    elif published := builtin_name(cls, name):
        name = published
        try:
            with compat.away_from_directory(name):
                model = cls.from_pretrained(name, num_labels=num_labels)
                tokenizer = builtin_tokenizer(args.model_type, name, fast)
        except Exception as error:  # PaddleNLP raises half a dozen kinds when there is no network
            raise UserError(
                f"{name} could not be downloaded ({type(error).__name__}); without a network, name a model "
                "directory, or start from random weights with --init_config and --vocab_file (README, Data)"
            ) from error
        source = name
    else:
        builtin = [n for n in cls.pretrained_init_configuration if "uncased" not in n][:8]
        raise UserError(
            f"{option} {name}: no directory with {WEIGHTS}, and not a built-in "
            f"{args.model_type} model ({', '.join(builtin)}, ...)"
        )
    if len(tokenizer.vocab) > model.config.vocab_size:
        raise UserError(
            f"{name}: the vocabulary has {len(tokenizer.vocab)} tokens, the model {model.config.vocab_size}"
        )
    provenance = {
        "model": {
            "model_type": args.model_type,
            "architecture": architecture_of(model),
            "width_mult": 1.0,
            "initialized_from": source,
        },
        "parent": parent,
        "notes": notes,
    }
    return model, tokenizer, provenance


def check_model_type(directory, model_type):
    """Raises: UserError if a model directory is of another family, or of a pruned width."""
    path, pruned = (os.path.join(directory, name) for name in ("config.json", "model_config.json"))
    path = path if os.path.isfile(path) else pruned
    if not os.path.isfile(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            config = dict(json.load(file))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a JSON object ({error})") from error
    if "width_mult" in config:
        raise UserError(
            f"{directory}: a pruned model; supernet.load_sub_model loads it, these scripts start from whole ones"
        )
    architectures = config.get("architectures") or []
    families = [f for f, prefix in MODEL_TYPES.items() if any(re.match(f"{prefix}[A-Z]", a) for a in architectures)]
    if families and model_type not in families:
        raise UserError(f"--model_type {model_type}: {directory} holds a model of type {families[0]}")


def check_hashes(directory, record):
    """Raises: UserError unless the record names the weights and all files are as it says."""
    if WEIGHTS not in record["weights"]:
        raise UserError(f"{os.path.join(directory, records.RECORD)}: does not name {WEIGHTS}; it is not of this model")
    records.check_files(directory, record)


def parent_of(directory, record):
    return {"path": records.relative(directory), "weights": record["weights"]}


def builtin_name(cls, name):
    """PaddleNLP's name for a built-in model, or None. The RoBERTa models of HFL are published without their prefix."""
    return next((n for n in (name, f"hfl/{name}") if n in cls.pretrained_init_configuration), None)


def builtin_tokenizer(model_type, name, fast):
    """Our tokenizer over the vocabulary that PaddleNLP keeps for a built-in model."""
    tokenizer = model_class(model_type, "Tokenizer").from_pretrained(name)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_resources(directory)
        lower_case = getattr(tokenizer, "do_lower_case", True)  # cased vocabularies say False
        return tokenization.load_tokenizer(directory, fast, os.path.join(directory, "vocab.txt"), lower_case)


def from_directory(cls, directory, num_labels, new_head=False):
    """A model of PaddleNLP's class ``cls`` with the configuration and the weights of a directory.

    ``cls.from_pretrained`` would run what a damaged pickle holds, and start parameters that the file lacks, or has in
    another shape, at random without a word. Args: new_head: what lies behind the encoder may start so, its pooler too.
    Returns: (model, names of the parameters that did). Raises: UserError for any other that is not there as it should.
    """
    try:
        model = cls(cls.config_class.from_pretrained(directory, num_labels=num_labels))
    except Exception as error:  # PaddleNLP checks nothing, so anything may come of a wrong field
        raise UserError(f"{directory}: its config.json makes no model ({type(error).__name__}: {error})") from error
    return model, set_parameters(model, os.path.join(directory, WEIGHTS), new_head)


def set_parameters(model, path, new_head=False):
    """Gives a model its parameters from a file, all of them. Args, returns and raises: as from_directory."""
    arrays, prefix, new = tensors.read(path), f"{model.base_model_prefix}.", []

    def in_encoder(name):  # a model without a head has no prefix in its names
        return name[len(prefix) :] if name.startswith(prefix) else name

    arrays = {in_encoder(name): array for name, array in arrays.items()}
    for name, parameter in model.named_parameters():
        array = arrays.get(in_encoder(name))
        if array is not None and array.dtype.kind != "f":  # Paddle keeps BF16 as uint16
            raise UserError(f"{path}: {name} is {array.dtype}; weights in FP32 or FP16 are needed")
        if array is not None and list(array.shape) == parameter.shape:
            parameter.set_value(array.astype("float32"))
            continue
        head = encoder_of(model) is not model and not name.startswith(prefix)
        if new_head and (head or array is None and in_encoder(name).startswith("pooler.")):
            new.append(name)
            continue
        found = "is not there" if array is None else f"has shape {list(array.shape)}, not {parameter.shape}"
        raise UserError(f"{path}: {name} {found}: weights of another architecture, width or number of labels")
    return new


def load_finished(directory, use_faster_tokenizer=True, stage="finetune"):
    """A classification model that ``stage`` (finetune or prune) wrote, in eval mode: (model, tokenizer, record)."""
    record = records.read_record(directory, f"a model of stage {stage}")
    if record["stage"] != stage:
        raise UserError(f"{directory}: written by stage {record['stage']}, a model of stage {stage} is needed")
    check_hashes(directory, record)
    model, _ = from_directory(model_class(record["model"]["model_type"]), directory, len(record["labels"]))
    model.eval()
    return model, tokenization.load_tokenizer(directory, use_faster_tokenizer), record


def count(model):
    """(params, flops): all parameters, and the multiply-adds of the encoder's linear layers at 128 tokens.

    FLOPs follow the published table: layers x 128 x (4 x hidden x attention width + 2 x hidden x FFN width).
    """
    params = sum(math.prod(p.shape) for p in model.parameters())
    linear = (math.prod(p.shape) for name, p in encoder_of(model).encoder.named_parameters() if len(p.shape) == 2)
    return params, 128 * sum(linear)


def check_sequence_length(max_seq_length, model):
    records.check_sequence_length(max_seq_length, model.config.max_position_embeddings)


@paddle.no_grad()
def predict(model, features, pad_id=0, batch_size=128):
    """Logits of ``model`` in eval mode, float32 [n, classes] in the features' order. Leaves the mode as it was."""
    training = model.training
    model.eval()

    def run(batch):
        return model(paddle.to_tensor(batch.input_ids), paddle.to_tensor(batch.token_type_ids)).numpy()

    in_order_of_length = data.batches(features, batch_size, pad_id, data.by_length(features))
    logits = data.gather(((batch, run(batch)) for batch in in_order_of_length), len(features))
    if training:
        model.train()
    return logits


def score(model, features, pad_id=0):
    """{accuracy, loss} on features with labels; the loss is the mean cross-entropy in nats."""
    logits = predict(model, features, pad_id).astype("float64")
    labels = np.array([f.label for f in features])
    shifted = logits - logits.max(-1, keepdims=True)
    log_likelihood = (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))[np.arange(len(labels)), labels]
    return {"accuracy": round(data.accuracy(logits, labels), 6), "loss": round(float(-log_likelihood.mean()), 6)}
