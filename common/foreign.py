"""Models that were trained elsewhere: directories of Hugging Face, and of PaddleNLP, of today and of 2021.

Read without running anything from them: JSON, and tensors. What they hold comes out under PaddleNLP's names; the other
way, a model of this repository becomes a directory of Hugging Face.

    bert.encoder.layer.0.attention.self.query.weight [out, in]  <->  encoder.layers.0.self_attn.q_proj.weight [in, out]
"""

import glob
import os
import re

import numpy as np

from common import UserError, files
from common.tensors import read_safetensors

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = "pytorch_model*.bin"

# --model_type: the beginning of the names of PaddleNLP's classes.
MODEL_TYPES = {"ppminilm": "PPMiniLM", "bert": "Bert", "ernie": "Ernie", "roberta": "Roberta"}
# model_type of Hugging Face's config.json -> --model_type. The Chinese RoBERTa-wwm models say bert, and are BERT.
FAMILIES = {"bert": "bert", "ernie": "ernie"}
# Hugging Face's defaults (BertConfig, ErnieConfig), for fields that a config.json leaves out.
DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
ERNIE_DEFAULTS = {"use_task_id": False, "task_type_vocab_size": 3}
# What would change the network if it were set, and to which value it must be.
ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "tanh", "silu", "swish")
MUST_BE = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}

# Names inside a layer: Hugging Face's -> PaddleNLP's.
IN_LAYER = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}
AROUND_LAYERS = {"embeddings.LayerNorm": "embeddings.layer_norm"}
AROUND_LAYERS.update((name, name) for name in ("pooler.dense", "classifier"))
AROUND_LAYERS.update((f"embeddings.{kind}_embeddings",) * 2 for kind in ("word", "position", "token_type", "task_type"))


def is_hugging_face(directory):
    """Whether a directory holds a model of Hugging Face. Raises: UserError if it does, but only as a pickle."""
    if any(os.path.isfile(os.path.join(directory, name)) for name in (SAFETENSORS, INDEX)):
        return True
    pickles = sorted(glob.glob(os.path.join(glob.escape(directory), PICKLES)))
    if pickles and not os.path.isfile(os.path.join(directory, "model_state.pdparams")):
        convert = "from transformers import AutoModelForSequenceClassification as M; "
        convert += f"M.from_pretrained({directory!r}).save_pretrained({directory!r})"
        raise UserError(
            f"{pickles[0]}: a pickle, which may run any code when it is read; convert it where you trust it: "
            f'python -c "{convert}"'
        )
    return False


# Weights


def paddle_name(name):
    """PaddleNLP's name of a tensor of Hugging Face, without the model's prefix; None if it is not needed here.

    Raises: KeyError for a tensor that no encoder of these families has.
    """
    name = re.sub(r"^(bert|ernie)\.", "", name)
    # Buffers of older versions, and the heads of pre-training.
    if name in ("embeddings.position_ids", "embeddings.token_type_ids") or name.startswith("cls."):
        return None
    module, _, kind = name.rpartition(".")
    kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)  # TensorFlow's names of LayerNorm
    in_layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", module)
    if in_layer:
        return f"encoder.layers.{in_layer[1]}.{IN_LAYER[in_layer[2]]}.{kind}"
    return f"{AROUND_LAYERS[module]}.{kind}"


def hugging_face_name(name, family):
    """Hugging Face's name of a tensor. Args: name: PaddleNLP's, without prefix. family: bert or ernie."""
    module, _, kind = name.rpartition(".")
    in_layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", module)
    if in_layer:
        theirs = {ours: theirs for theirs, ours in IN_LAYER.items()}[in_layer[2]]
        return f"{family}.encoder.layer.{in_layer[1]}.{theirs}.{kind}"
    theirs = {ours: theirs for theirs, ours in AROUND_LAYERS.items()}[module]
    return f"{theirs}.{kind}" if module == "classifier" else f"{family}.{theirs}.{kind}"


def is_transposed(name, array):
    """Whether the other library keeps a tensor transposed: the weights of linear layers. Args: name: PaddleNLP's."""
    return array.ndim == 2 and "embeddings." not in name


def weight_files(directory):
    """The names of the files with weights in a directory of Hugging Face."""
    index = os.path.join(directory, INDEX)
    if os.path.isfile(os.path.join(directory, SAFETENSORS)) or not os.path.isfile(index):
        return [SAFETENSORS]
    places = files.read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: no weight_map in it")
    names = sorted(set(map(str, places.values())))
    for name in names:
        if os.path.basename(name) != name or not os.path.isfile(os.path.join(directory, name)):
            raise UserError(f"{index}: names {name}, which is not in {directory}")
    return names


def hashes(directory):
    """{file name: sha256} of the weights in a directory of Hugging Face."""
    return files.hash_files(directory, weight_files(directory))


def read_weights(directory):
    """{PaddleNLP's name without prefix: float32 array} of a directory of Hugging Face.

    Raises: UserError if a file is damaged, or a tensor is of another kind of network.
    """
    weights = {}
    for file in weight_files(directory):
        for name, array in read_safetensors(os.path.join(directory, file)).items():
            try:
                ours = paddle_name(name)
            except KeyError:
                path = os.path.join(directory, file)
                raise UserError(f"{path}: {name} is no tensor of BERT or ERNIE; such a network is not known") from None
            if ours:
                weights[ours] = np.ascontiguousarray(array.T) if is_transposed(ours, array) else array
    return weights


# Configuration


def read_config(directory):
    """(--model_type, {field of PaddleNLP's configuration: value}, names of the classes or None) of a directory.

    Raises: UserError for another architecture, or a field that changes the network in a way that is not known here.
    """
    path = os.path.join(directory, "config.json")
    if not os.path.isfile(path):
        raise UserError(f"{path}: not there; it says what network the weights beside it are of")
    config = files.read_json_object(path)
    return (*fields_of(config, path), names_of_classes(config))


def family_of(config):
    """--model_type of a configuration of Hugging Face or PaddleNLP, of today or of 2021; None if it does not say it."""
    names = [*(config.get("architectures") or []), str(config.get("init_class") or "")]
    for arguments in config.get("init_args") or []:
        names += [str(arguments.get("init_class") or "")] if isinstance(arguments, dict) else []
    for family, prefix in MODEL_TYPES.items():
        if any(re.match(f"{prefix}[A-Z]", str(name)) for name in names):
            return family
    return FAMILIES.get(config.get("model_type"))


def defaults_of(config):
    """What a configuration of Hugging Face means where it says nothing; {} for one of another library."""
    of_ernie = ERNIE_DEFAULTS if config.get("model_type") == "ernie" else {}
    return {**DEFAULTS, **of_ernie} if config.get("model_type") in FAMILIES else {}


def check_network(config, path):
    """Raises: UserError if a field changes the network in a way that is not known. Args: path: for messages."""
    for name, value in MUST_BE.items():
        if config.get(name, value) not in (value, None):
            raise UserError(f"{path}: {name} is {config[name]!r}; only {value!r} is known")
    if config.get("hidden_act", "gelu") not in ACTIVATIONS:
        raise UserError(f"{path}: hidden_act is {config['hidden_act']!r}; {', '.join(ACTIVATIONS)} are known")


def fields_of(config, path):
    """(--model_type, fields of PaddleNLP's configuration) for a config.json. Args: path: of it, for messages."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{path}: model_type {kind!r}; only {known} are known (RoBERTa-wwm and MacBERT say bert)")
    check_network(config, path)
    defaults = defaults_of(config)
    fields = {name: config.get(name, default) for name, default in defaults.items()}
    for name, default in defaults.items():
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(fields[name], kinds) or (isinstance(fields[name], bool) and not isinstance(default, bool)):
            raise UserError(f"{path}: {name} is {fields[name]!r}, not {type(default).__name__}")
    if config.get("classifier_dropout") is not None:
        fields["classifier_dropout"] = config["classifier_dropout"]
    return FAMILIES[kind], fields


def names_of_classes(config):
    """The names of the classes in the order of the logits, or None if a configuration does not say them."""
    names = config.get("id2label")
    try:
        names = [str(names[key]) for key in sorted(names, key=int)]
    except (TypeError, ValueError, AttributeError):
        return None
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


# The tokenizer


def read_tokenizer(directory):
    """(vocabulary as a list of tokens, whether it lower-cases) of a directory of Hugging Face.

    Raises: UserError if it is no WordPiece tokenizer of BERT's kind.
    """
    config_path, vocab_path, whole_path = (
        os.path.join(directory, name) for name in ("tokenizer_config.json", "vocab.txt", "tokenizer.json")
    )
    config = files.read_json_object(config_path) if os.path.isfile(config_path) else {}
    whole = files.read_json_object(whole_path) if os.path.isfile(whole_path) else {}
    normalizer = whole.get("normalizer") or {}
    lower_case = config.get("do_lower_case", normalizer.get("lowercase", True))
    strip_accents = config.get("strip_accents", normalizer.get("strip_accents"))
    if strip_accents not in (None, lower_case):
        raise UserError(f"{config_path}: strip_accents is {strip_accents}, do_lower_case {lower_case}: not known here")
    if not config.get("tokenize_chinese_chars", normalizer.get("handle_chinese_chars", True)):
        raise UserError(f"{config_path}: tokenize_chinese_chars is false, which is not known here")
    if os.path.isfile(vocab_path):
        try:
            with open(vocab_path, encoding="utf-8") as file:
                return [line.rstrip("\r\n") for line in file], lower_case
        except UnicodeDecodeError as error:
            raise UserError(f"{vocab_path}: {error}") from error
    if not whole:
        raise UserError(f"{directory}: no vocab.txt and no tokenizer.json there")
    model = whole.get("model") or {}
    if model.get("type") != "WordPiece" or not isinstance(model.get("vocab"), dict):
        raise UserError(f"{whole_path}: its model is {model.get('type')!r}; WordPiece, BERT's, is needed")
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    if [model["vocab"][token] for token in vocab] != list(range(len(vocab))):
        raise UserError(f"{whole_path}: the ids of its vocabulary are not 0 to {len(vocab) - 1}")
    return vocab, lower_case


# The other way


def write(directory, model_type, weights, config, tokenizer, names=None):
    """Writes a model into a directory as Hugging Face's transformers loads it.

    PP-MiniLM, and RoBERTa as PaddleNLP's Chinese models have it, are BERT networks and become bert.

    Args: weights: {PaddleNLP's name, without prefix: array}. config: {field: value} of the architecture.
        names: of the classes in the order of the logits; None for an encoder without a head.
    """
    from safetensors.numpy import save_file

    family = "ernie" if model_type == "ernie" else "bert"
    theirs = {}
    for name, array in weights.items():
        array = np.ascontiguousarray(array.T) if is_transposed(name, array) else array
        theirs[hugging_face_name(name, family)] = array
    if names is None:  # as transformers saves an encoder alone
        theirs = {name.partition(".")[2]: array for name, array in theirs.items()}
    save_file(theirs, os.path.join(directory, SAFETENSORS), metadata={"format": "pt"})
    kept = {**DEFAULTS, **(ERNIE_DEFAULTS if family == "ernie" else {})}
    described = {name: config[name] for name in kept if name in config}
    kind = "ForSequenceClassification" if names is not None else "Model"
    described.update(model_type=family, architectures=[family.capitalize() + kind], torch_dtype="float32")
    if names is not None:
        described["id2label"] = {str(i): name for i, name in enumerate(names)}
        described["label2id"] = {name: i for i, name in enumerate(names)}
    files.write_json(os.path.join(directory, "config.json"), described)
    tokenizer.save(directory)
    settings = {"do_lower_case": tokenizer.lower_case, "tokenizer_class": "BertTokenizer"}
    settings.update(model_max_length=config["max_position_embeddings"])
    files.write_json(os.path.join(directory, "tokenizer_config.json"), settings)
