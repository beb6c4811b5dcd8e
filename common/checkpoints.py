"""Loading models. There is one door for each kind of directory:

    load_pretrained     what training starts from: a built-in name, a model directory, or --init_config
    load_classifier     the model that fine-tuning or pruning wrote
    open_graph          an exported or a quantized graph
    load_sub_model      the narrow model that pruning/export_model.py cut out (pruning/dynabert.py)

Weights are read by read_tensors, which takes nothing but tensors, and compared with the hashes in stage.json.
"""

import os
import tempfile
from typing import Any, NamedTuple, Optional

from common import UserError, cli, compat, files, foreign, modeling
from common import objectives, processes, records, tokenization
from common.tensors import read_tensors

WEIGHTS = "model_state.pdparams"


def add_model_arguments(group):
    help = "family of the encoder"
    group.add_argument("--model_type", default="ppminilm", choices=sorted(modeling.MODEL_TYPES), help=help)
    group.add_argument(
        "--model_name_or_path",
        type=cli.NameOrPathArgument,
        help="built-in name, or directory that an earlier stage wrote; required unless --init_config is given",
    )
    group.add_argument(
        "--init_config",
        type=cli.PathArgument,
        help="JSON file with an architecture (configs/ has some): start from random weights, where none can be "
        "downloaded; stage.json notes it",
    )
    group.add_argument("--vocab_file", type=cli.PathArgument, help="vocabulary for --init_config, one token per line")


# What training starts from


class Pretrained(NamedTuple):
    model: Any  # of PaddleNLP
    tokenizer: Any
    parent: Optional[dict]  # the directory that it was loaded from, as in stage.json; None if there is none
    notes: list  # what is random or partial
    fields: dict  # for stage.json: model, params, flops


def load_pretrained(
    name,
    num_labels,
    model_type="ppminilm",
    init_config=None,
    vocab_file=None,
    use_faster_tokenizer=True,
    kind="ForSequenceClassification",
    option="--model_name_or_path",
    tokenizer=None,
    max_seq_length=None,
):
    """The model and the tokenizer that training starts from.

    Args:
        name: a built-in name or a directory; may be None if ``init_config`` is given.
        init_config: path of a JSON architecture, or what would be in it: random weights instead of ``name``.
        vocab_file, tokenizer: the vocabulary for ``init_config``, one of the two.
        kind: suffix of PaddleNLP's class.
        option: the option by which the user gave ``name``, for messages.
        max_seq_length: if given, the model must have that many positions.
    Returns: Pretrained. Raises: UserError if nothing can be loaded.
    """
    cls = modeling.model_class(model_type, kind)
    parent, notes = None, []
    if init_config:
        # Launchers pass a name for the results in any case, so a name that holds no weights is not a mistake.
        if name and has_weights(name):
            raise UserError(f"{option} {name} and --init_config: the first has weights; give one of them")
        if vocab_file:
            tokenizer = tokenization.load_tokenizer(None, use_faster_tokenizer, vocab_file)
        if tokenizer is None:
            raise UserError("--init_config needs --vocab_file, the vocabulary that the new embeddings are for")
        model = modeling.build(cls, modeling.random_config(model_type, init_config, len(tokenizer.vocab), num_labels))
        source, notes = "random weights", ["random weights, no pre-training"]
    elif not name:
        raise UserError(f"{option} is needed: a built-in name or a model directory (or --init_config)")
    elif is_model_directory(name):
        if os.path.isfile(os.path.join(name, records.RECORD)):
            record = records.read_record(name)
            check_hashes(name, record)
            notes, parent = list(record["notes"]), parent_of_start(name)
        check_model_type(name, model_type)
        model, new_parameters = read_model(cls, name, num_labels, new_head=True)
        if any("pooler" in parameter for parameter in new_parameters):
            notes.append(f"random weights of the pooler, which {WEIGHTS} lacks")
        source = files.relative(name)
        tokenizer = tokenization.load_tokenizer(name, use_faster_tokenizer)
    elif foreign.is_hugging_face(name):
        found = read_hugging_face(name, use_faster_tokenizer, kind, model_type, num_labels)
        model, tokenizer, new_parameters = found.model, found.tokenizer, found.new_parameters
        if any("pooler" in parameter for parameter in new_parameters):
            notes.append("random weights of the pooler, which the directory of Hugging Face lacks")
        source, parent = files.relative(name), parent_of_start(name)
    elif source := builtin_name(cls, name):
        model, tokenizer = load_builtin(cls, source, num_labels, model_type, use_faster_tokenizer)
    else:
        builtin = [n for n in cls.pretrained_init_configuration if "uncased" not in n][:8]
        raise UserError(
            f"{option} {name}: no directory with {WEIGHTS} or {foreign.SAFETENSORS} (at {os.path.abspath(name)}), "
            f"and not a built-in {model_type} model ({', '.join(builtin)}, ...)"
        )
    check_vocabulary(name or source, tokenizer, model)
    if max_seq_length is not None:
        records.check_sequence_length(max_seq_length, model.config.max_position_embeddings)
    described = {"model_type": model_type, "architecture": modeling.architecture_of(model), "width_mult": 1.0}
    params, flops = modeling.count(model)
    if processes.is_first():
        shape = f"{model.config.num_hidden_layers} layers x {model.config.hidden_size}, {params / 1e6:.2f} M parameters"
        print(f"starting from {source}: {model_type}, {shape}{''.join(f'; {note}' for note in notes)}")
    fields = {"model": {**described, "initialized_from": source}, "params": params, "flops": flops}
    return Pretrained(model, tokenizer, parent, notes, fields)


def load_pretrained_for(args, num_labels, kind="ForSequenceClassification"):
    """As load_pretrained, for arguments of add_model_arguments and cli.add_tokenizer_arguments."""
    names = ("model_type", "init_config", "vocab_file", "use_faster_tokenizer", "max_seq_length")
    options = {name: getattr(args, name) for name in names}
    return load_pretrained(args.model_name_or_path, num_labels, kind=kind, **options)


def builtin_name(cls, name):
    """PaddleNLP's name for a built-in model, or None. HFL's RoBERTa models are published without the prefix hfl/."""
    return next((n for n in (name, f"hfl/{name}") if n in cls.pretrained_init_configuration), None)


def load_builtin(cls, name, num_labels, model_type, use_faster_tokenizer):
    """Downloads a built-in model, or takes it from PaddleNLP's cache: (model, tokenizer over its vocabulary)."""
    try:
        with compat.away_from_directory(name):
            model = cls.from_pretrained(name, num_labels=num_labels)
            theirs = modeling.model_class(model_type, "Tokenizer").from_pretrained(name)
    except Exception as error:  # without a network PaddleNLP raises half a dozen kinds
        raise UserError(
            f"{name} could not be downloaded ({type(error).__name__}); without a network, name a model "
            "directory, or start from random weights with --init_config and --vocab_file (README, Data)"
        ) from error
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_resources(directory)
        vocab_file = os.path.join(directory, "vocab.txt")
        lower_case = getattr(theirs, "do_lower_case", True)  # False for cased vocabularies
        return model, tokenization.load_tokenizer(None, use_faster_tokenizer, vocab_file, lower_case)


def is_model_directory(path):
    return os.path.isfile(os.path.join(path, WEIGHTS))


def parent_of_start(directory):
    """The field ``parent`` of what is trained from a directory; None if it has neither record nor foreign weights."""
    if os.path.isfile(os.path.join(directory, records.RECORD)):
        return records.parent_of(directory, records.read_record(directory)) if is_model_directory(directory) else None
    if not is_model_directory(directory) and foreign.is_hugging_face(directory):
        return {"path": files.relative(directory), "weights": foreign.hashes(directory)}
    return None


def has_weights(path):
    """Whether a path is a directory with weights, of this repository, of PaddleNLP or of Hugging Face."""
    return is_model_directory(path) or foreign.is_hugging_face(path)


class Foreign(NamedTuple):
    """A model of a directory that was written elsewhere."""

    model: Any
    tokenizer: Any
    names: Optional[list]  # of the classes, in the order of the logits, if the directory says them
    model_type: str
    new_parameters: list  # names of those that started at random


def read_hugging_face(directory, use_faster_tokenizer, kind, model_type=None, num_labels=None):
    """The model of a directory of Hugging Face.

    Args: kind: as load_pretrained's. model_type: the family that it has to be of. num_labels: of a new head; None if
        the directory has to have a head.
    Returns: Foreign. Raises: UserError if it is of another family, damaged, or has no head.
    """
    family, fields, names = foreign.read_config(directory)
    if model_type not in (None, family):
        raise other_family(model_type, directory, family)
    weights = foreign.read_weights(directory)
    outputs = num_labels or outputs_of(weights, directory)
    cls = modeling.model_class(family, kind)
    model = modeling.build(cls, cls.config_class(**fields, num_labels=outputs))
    new_parameters = give_parameters(model, weights, directory, new_head=num_labels is not None)
    vocab, lower_case = foreign.read_tokenizer(directory)
    try:
        tokenizer = tokenization.tokenizer_class(use_faster_tokenizer)(vocab, lower_case, split_symbols=False)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error
    check_vocabulary(directory, tokenizer, model)
    return Foreign(model, tokenizer, names, family, new_parameters)


def read_paddlenlp(directory, use_faster_tokenizer):
    """The classifier of a directory that PaddleNLP wrote, with config.json or, in 2021, model_config.json: Foreign.

    Raises: UserError if the family is not known, the directory is damaged, or has no head.
    """
    config = next((n for n in ("config.json", "model_config.json") if os.path.isfile(os.path.join(directory, n))), None)
    if config is None:
        raise UserError(f"{directory}: no config.json and no model_config.json beside {WEIGHTS}")
    config = files.read_json_object(os.path.join(directory, config))
    family = foreign.family_of(config)
    if family is None:
        known = ", ".join(foreign.MODEL_TYPES.values())
        raise UserError(f"{directory}: its configuration names no class of these families: {known}")
    check_model_type(directory, family)
    path = os.path.join(directory, WEIGHTS)
    outputs = outputs_of(read_tensors(path), directory)
    model, _ = read_model(modeling.model_class(family), directory, outputs)
    tokenizer = tokenization.load_tokenizer(directory, use_faster_tokenizer)
    check_vocabulary(directory, tokenizer, model)
    return Foreign(model, tokenizer, foreign.names_of_classes(config), family, [])


def outputs_of(weights, directory):
    """The number of classes of a classifier. Raises: UserError if there is no head."""
    if "classifier.weight" not in weights:
        raise UserError(
            f"{directory}: has no classification head; fine-tune it (run_clue.py --model_name_or_path {directory})"
        )
    return weights["classifier.weight"].shape[1]


def check_vocabulary(directory, tokenizer, model):
    """Raises: UserError if a tokenizer does not fit a model."""
    if len(tokenizer.vocab) > model.config.vocab_size:
        raise UserError(
            f"{directory}: the vocabulary has {len(tokenizer.vocab)} tokens, the model {model.config.vocab_size}"
        )
    if tokenizer.pad_id != model.config.pad_token_id:
        raise UserError(
            f"{directory}: [PAD] is token {tokenizer.pad_id}, the configuration says {model.config.pad_token_id}"
        )


def check_model_type(directory, model_type):
    """Raises: UserError if a model directory is of another family, or of a pruned width."""
    path = os.path.join(directory, "config.json")
    if not os.path.isfile(path):
        path = os.path.join(directory, "model_config.json")  # a pruned model's
    if not os.path.isfile(path):
        return
    config = files.read_json_object(path)
    if "width_mult" in config:
        raise UserError(
            f"{directory}: a pruned model; dynabert.load_sub_model loads it, these scripts start from whole ones"
        )
    if foreign.family_of(config) not in (None, model_type):
        raise other_family(model_type, directory, foreign.family_of(config))


# What fine-tuning and pruning wrote


def add_classifier_arguments(group, help):
    """--task_name, --model_name_or_path and --model_type of a stage that starts from a fine-tuned or pruned model."""
    cli.add_task_argument(group)
    group.add_argument("--model_name_or_path", type=cli.NameOrPathArgument, required=True, help=help)
    help = "checked against stage.json if given"
    group.add_argument("--model_type", choices=sorted(modeling.MODEL_TYPES), help=help)


class Classifier(NamedTuple):
    model: Any  # in eval mode
    tokenizer: Any
    record: dict  # its stage.json
    parent: dict  # the field ``parent`` of what is made from it

    @property
    def objective(self):
        return objectives.of_record(self.record)


def load_classifier(directory, use_faster_tokenizer=True, stage="finetune"):
    """The classification model that a stage wrote.

    Args: stage: finetune or prune.
    Returns: Classifier. Raises: UserError if the directory is not a complete result of that stage.
    """
    record = records.read_record(directory, f"a model of stage {stage}")
    if record["stage"] != stage:
        raise UserError(f"{directory}: written by stage {record['stage']}, a model of stage {stage} is needed")
    check_hashes(directory, record)
    objectives.of_record(record)  # refuses one that is not known here
    model, _ = read_model(modeling.model_class(record["model"]["model_type"]), directory, len(record["labels"]))
    model.eval()
    tokenizer = tokenization.load_tokenizer(directory, use_faster_tokenizer)
    return Classifier(model, tokenizer, record, records.parent_of(directory, record))


def load_classifier_for(args, directory, stage="finetune", model_type=None):
    """As load_classifier, for the arguments of a stage: they are checked, and --max_seq_length gets its default.

    Raises: UserError if the model is of another task than --task_name, or of another type, or too short.
    """
    classifier = load_classifier(directory, args.use_faster_tokenizer, stage)
    records.check_task(classifier.record, args.task_name, directory, model_type)
    if processes.is_first():
        records.show_inherited(directory, classifier.record, args)
    args.max_seq_length = records.sequence_length(args, classifier.record)
    return classifier


def check_hashes(directory, record):
    """Raises: UserError unless the record names the weights and all files are as it says."""
    if record["model"]["model_type"] == "graph":
        raise UserError(
            f"{directory}: a static graph that adopt.py took in: it is quantized, run and served, but not pruned or "
            "trained; for that take in the directory with the weights that it was exported from"
        )
    if WEIGHTS not in record["weights"]:
        raise UserError(f"{os.path.join(directory, records.RECORD)}: does not name {WEIGHTS}; it is not of this model")
    records.check_files(directory, record)


def other_family(model_type, directory, family):
    """The UserError for a directory with a model of another family than --model_type says."""
    return UserError(
        f"--model_type {model_type}: {directory} holds a model of type {family}; give --model_type {family}"
    )


def read_model(cls, directory, num_labels, new_head=False):
    """A model of PaddleNLP's class ``cls`` with the configuration and the weights of a directory.

    ``cls.from_pretrained`` would execute code in a malicious file, and would silently start parameters at random that
    the file lacks or has in another shape.

    Args: new_head: whether the parameters behind the encoder, and a missing pooler, may start at random.
    Returns: (model, names of the parameters that did). Raises: UserError if any other parameter does not fit.
    """
    try:
        # PaddleNLP takes "ppminilm-6l-768h" for its own model, also where a directory is called so: an absolute path.
        config = cls.config_class.from_pretrained(os.path.abspath(directory), num_labels=num_labels)
        model = modeling.build(cls, config)
    except Exception as error:  # PaddleNLP checks nothing, so a wrong field may raise anything
        raise UserError(f"{directory}: its config.json makes no model ({type(error).__name__}: {error})") from error
    path = os.path.join(directory, WEIGHTS)
    return model, give_parameters(model, read_tensors(path), path, new_head)


def give_parameters(model, weights, path, new_head=False):
    """Gives a model all its parameters. Args: weights: {name: array}. path: of their file, for messages.

    Further args, returns and raises: as read_model.
    """
    prefix, new_parameters = f"{model.base_model_prefix}.", []

    def in_encoder(name):  # a model without a head has no prefix in its names
        return name[len(prefix) :] if name.startswith(prefix) else name

    arrays = {in_encoder(name): array for name, array in weights.items()}
    for name, parameter in model.named_parameters():
        array = arrays.get(in_encoder(name))
        if array is not None and array.dtype.kind != "f":  # Paddle keeps BF16 as uint16
            raise UserError(f"{path}: {name} is {array.dtype}; weights in FP32 or FP16 are needed")
        if array is not None and list(array.shape) == parameter.shape:
            parameter.set_value(array.astype("float32"))
            continue
        in_head = modeling.encoder_of(model) is not model and not name.startswith(prefix)
        missing_pooler = array is None and in_encoder(name).startswith("pooler.")
        if new_head and (in_head or missing_pooler):
            new_parameters.append(name)
            continue
        problem = "is not there" if array is None else f"has shape {list(array.shape)}, not {parameter.shape}"
        raise UserError(f"{path}: {name} {problem}: weights of another architecture, width or number of labels")
    return new_parameters


# Exported and quantized graphs


class Graph(NamedTuple):
    prefix: str  # path of the graph without .pdmodel and .pdiparams
    record: dict  # the stage.json beside it

    @property
    def objective(self):
        return objectives.of_record(self.record)

    @property
    def directory(self):
        return os.path.dirname(os.path.abspath(self.prefix))

    @property
    def name(self):
        return os.path.basename(self.prefix)

    @property
    def recorded_as(self):
        """The prefix as records and results have it."""
        return files.relative(self.prefix)

    def tokenizer(self, use_faster_tokenizer=True):
        return tokenization.load_tokenizer(self.directory, use_faster_tokenizer)


def open_graph(path, option="--model_path"):
    """A graph with the record beside it; all its files are checked.

    Args: path: file prefix, .pdmodel file, or directory. option: the option by which the user gave it, for messages.
    Returns: Graph. Raises: UserError if there is no graph, or if its files are not those of its record.
    """
    if os.path.isfile(os.path.join(path, records.RECORD)):
        record = records.read_record(path)
        names = [name[: -len(".pdmodel")] for name in records.graph_files(record) if name.endswith(".pdmodel")]
        if record["stage"] == "onnx":
            raise UserError(f"{path}: an ONNX model, which deploy/onnx/infer_onnx.py runs; a graph of Paddle is needed")
        if not names:
            raise UserError(f"{path}: not exported; run export_model.py (fine-tuned) or export.sh (pruned) first")
        prefix = os.path.join(path, names[0])
    else:
        prefix = find_prefix(path, option)
        record = records.read_record(os.path.dirname(os.path.abspath(prefix)), "an export or a quantized model")
    graph = Graph(prefix, record)
    if f"{graph.name}.pdiparams" not in records.graph_files(record):
        place = os.path.join(graph.directory, records.RECORD)
        raise UserError(f"{prefix}: {place} does not name these files; export them again")
    records.check_files(graph.directory, record, records.graph_files(record))
    objectives.of_record(record)  # refuses one that is not known here
    return graph


def find_prefix(path, option="--model_path"):
    """The file prefix of a graph, with or without a record. Args and raises: as open_graph."""
    prefix = path[: -len(".pdmodel")] if path.endswith(".pdmodel") else path
    if os.path.isdir(path):
        graphs = [name for name in sorted(os.listdir(path)) if name.endswith(".pdmodel")]
        if len(graphs) != 1:
            raise UserError(f"{option} {path}: a directory with {len(graphs)} graphs (*.pdmodel), one is needed")
        prefix = os.path.join(path, graphs[0][: -len(".pdmodel")])
    for suffix in (".pdmodel", ".pdiparams"):
        if not os.path.isfile(prefix + suffix):
            raise UserError(f"{option} {path}: no {prefix}{suffix}")
    return prefix
