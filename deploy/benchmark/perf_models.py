"""Models and sentences for perf.py and peers.py: the outputs of the stages if they exist, else generated."""

import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "..", "..")
sys.path[:0] = [ROOT, *(os.path.join(ROOT, name) for name in ("demo", "pruning", "quantization"))]
import calibration
import data
import dynabert
import generate_data
import make_vocab
import summarize
from common import UserError, batching, checkpoints, cli, engine, exporting, files, modeling, records, tokenization

MODELS = ("bert", "finetuned", "pruned", "quantized", "both")
RANDOM = {"bert": ("bert", "bert-base.json"), "finetuned": ("ppminilm", "ppminilm-6l-768h.json")}  # type, architecture


def find_sentences(args):
    """(data_dir, Split, note or None) of TNEWS dev; generated if it can neither be found nor downloaded."""
    task = data.get_task("TNEWS")
    try:
        return args.data_dir, data.read_split(task, "dev", args.data_dir), None
    except UserError:
        if args.data_dir or os.environ.get("CLUE_DATA_DIR"):
            raise
    directory = os.path.join(args.output_dir, "data")
    if not os.path.isdir(directory):
        generate_data.main(["--output_dir", directory])
    return directory, data.read_split(task, "dev", directory), "generated sentences, shorter than CLUE's"


def best_of(directory):
    """Path of the quantized variant in ``directory`` that is best on dev, or None."""
    variants = records.find_records([directory]) if os.path.isdir(directory) else []
    return max(variants, key=records.score)["path"] if variants else None


def find_models(args):
    """{model: file prefix} of the models given or found in the stages' output directories. Raises: UserError."""
    named = {name: getattr(args, name) for name in MODELS}
    if not args.random:
        best = os.path.join(ROOT, "finetuning", "ppminilm-6l-768h", "best.json")
        if os.path.isfile(best):
            cell = {task: directory for task, *_, directory in summarize.read_best(best)}.get("TNEWS", "")
            exported = os.path.isfile(os.path.join(cell, "inference.pdmodel"))
            named["finetuned"] = named["finetuned"] or (cell if exported else None)
        pruned = os.path.join(ROOT, "pruning", "pruned_models", "TNEWS", "0.75", "sub_static")
        named["pruned"] = named["pruned"] or (pruned if os.path.isdir(pruned) else None)
        for name, kind in (("quantized", "tnews_finetuned_quant_models"), ("both", "tnews_quant_models")):
            named[name] = named[name] or best_of(os.path.join(ROOT, "quantization", kind))
    return {name: checkpoints.open_graph(path, f"--{name}").prefix for name, path in named.items() if path}


def check_model(name, prefix, precision, device, max_seq_length):
    """Raises: UserError if the model does not fit its row of the table."""
    record = checkpoints.open_graph(prefix, f"--{name}").record
    records.check_task(record, "TNEWS", prefix)
    engine.check_precision(prefix, device, precision)
    records.check_sequence_length(max_seq_length, record["model"]["architecture"]["max_position_embeddings"])
    if tuple(record["labels"]) != data.get_task("TNEWS").labels:
        raise UserError(f"--{name} {prefix}: its labels are not CLUE's TNEWS labels in their order")
    if name == "bert" and record["export"].get("cls_only"):
        raise UserError(f"--bert {prefix}: the baseline is the usual graph; export it with --cls_only False")


def build_once(directory, inputs, build):
    """Calls build(scratch) and moves the scratch directory to ``directory``, unless that is up to date.

    Args: inputs: of the build, as a JSON object. A directory built from other inputs is rebuilt.
    """
    marker = os.path.join(directory, "made.json")
    if os.path.isfile(marker):
        with open(marker, encoding="utf-8") as file:
            if json.load(file) == inputs:
                return
    with files.whole_directory(directory) as scratch:
        build(scratch)
        files.write_whole(os.path.join(scratch, "made.json"), json.dumps(inputs))


def build_random(directory, vocab_file, samples, device="cpu"):
    """Writes graphs with random weights to ``directory``/<model>/, unless they exist for this vocabulary."""
    tokenizer = tokenization.load_tokenizer(None, True, vocab_file)
    on_cpu = device == "cpu"  # TensorRT needs full layers and floating-point embeddings
    sources = {"vocabulary": files.file_hash(vocab_file), "on_cpu": on_cpu, **records.describe_versions()}
    sources["code"] = files.file_hash(calibration.weights.__file__)

    def build(scratch):
        print("building BERT-base and PP-MiniLM with random weights", file=sys.stderr)
        cli.set_seed(0)
        prefix = {name: os.path.join(scratch, name, "float") for name in ("bert", "finetuned", "pruned", "pruned_full")}
        for name in (*prefix, "quantized", "both", "both_full"):
            os.makedirs(os.path.join(scratch, name))
            tokenizer.save(os.path.join(scratch, name))
        for name, (kind, config) in RANDOM.items():
            config = modeling.random_config(kind, os.path.join(ROOT, "configs", config), len(tokenizer.vocab), 15)
            model = modeling.model_class(kind)(config)
            exporting.export_static(model, prefix[name], on_cpu and name != "bert")
        architecture = modeling.architecture_of(model)
        weights = {name: value.numpy() for name, value in model.state_dict().items()}
        whole = {"model": {"model_type": "ppminilm", "architecture": architecture}, "labels": range(15)}
        model = dynabert.build_sub_model(whole, 0.75)
        model.set_state_dict(dynabert.slice_state(weights, 0.75, architecture["num_attention_heads"]))
        exporting.export_static(model, prefix["pruned"], on_cpu)
        exporting.export_static(model, prefix["pruned_full"])
        features = batching.convert(samples, tokenizer, 128)
        for name, source in (("quantized", "finetuned"), ("both", "pruned"), ("both_full", "pruned_full")):
            target = os.path.join(scratch, name)
            options = {"int8_embeddings": on_cpu, "for_gpu": not on_cpu}
            calibration.quantize(prefix[source], features, tokenizer.pad_id, "abs_max", target, **options)

    build_once(directory, sources, build)


def complete(args, models, needed, sentences, device="cpu"):
    """Adds models with random weights for ``needed`` names missing in ``models``. Returns: these names."""
    missing = [name for name in needed if name not in models]
    if missing:
        vocab_file = args.vocab_file
        if not vocab_file and models:
            vocab_file = os.path.join(os.path.dirname(next(iter(models.values()))), "vocab.txt")
        if not vocab_file:
            vocab_file = os.path.join(args.output_dir, "vocab.txt")
            make_vocab.write(vocab_file, [example.text for example in sentences])
        directory = os.path.join(args.output_dir, "models")
        build_random(directory, vocab_file, sentences[:4], device)
        models.update({name: checkpoints.find_prefix(os.path.join(directory, name)) for name in missing})
    return missing
