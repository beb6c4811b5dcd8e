"""Writes an exported or quantized model as ONNX, for runtimes without Paddle: ONNX Runtime, OpenVINO, TensorRT.

Reads the directory of a graph: fine-tuned or pruned (FP32), quantized (INT8), or taken in by adopt.py. Writes
<output_dir>/ with model.onnx, tokenizer.json, vocab.txt, labels.json and stage.json; infer_onnx.py runs it. Before
anything is written, ONNX Runtime has to give Paddle's logits (FP32), or the answers of the FP32 model on dev (INT8).

    python export_onnx.py --model_path ../../quantization/tnews_quant_models/mse4
    python infer_onnx.py --model_path onnx_models/tnews_quant_models/mse4 --text "今年的高考作文题"
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import data
import infer_onnx
import onnx
import onnx_graph
import tokenizers
from common import ROOT, UserError, batching, checkpoints, cli, engine, exporting, files, predictions, records
from common.runs import Run

FILES = ("model.onnx", "tokenizer.json", "labels.json")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    main = parser.add_argument_group("what to write as ONNX")
    help = "directory of a graph, or its file prefix without .pdmodel"
    main.add_argument("--model_path", type=cli.PathArgument, required=True, help=help)
    cli.add_output_argument(main, "default: onnx_models/<directory of the models>/<name of the model>")
    group = parser.add_argument_group("other")
    help = "how products take what they multiply weights with: uint8 is for the instructions of x86, int8 for TensorRT "
    help += "(default: uint8, or int8 for a model of quant_post.py --for gpu); both round to the same grid"
    group.add_argument("--activations", choices=("uint8", "int8"), help=help)
    help = "FP32 graph that an INT8 model has to agree with (default: the one that it was quantized from, if it is "
    help += "still there; else Paddle's own INT8)"
    group.add_argument("--fp32_path", type=cli.PathArgument, help=help)
    help = "share of dev records on which INT8 must answer as FP32 does"
    group.add_argument("--min_agreement", type=float, default=0.9, help=help, without_effect=True)
    help = "FP32: largest difference of a logit allowed between ONNX Runtime and Paddle"
    group.add_argument("--parity_tolerance", type=float, default=1e-4, help=help, without_effect=True)
    cli.add_overwrite_argument(group)
    cli.add_input_arguments(parser)
    return parser.parse_args(argv)


def default_output_dir(graph):
    """onnx_models/tnews_quant_models/mse4; of graphs in FP32: onnx_models/TNEWS_finetuned, onnx_models/TNEWS_0.75."""
    record = graph.record
    if record["stage"] == "quantize":
        return os.path.join("onnx_models", *graph.directory.split(os.sep)[-2:])
    stage = "finetuned" if record["stage"] == "finetune" else f"{record['model']['width_mult']:g}"
    return os.path.join("onnx_models", f"{record['task']}_{stage}")


def fp32_graph(args, record):
    """The FP32 graph that a quantized model was made from, or None if it is not in its place any more.

    Raises: UserError if --fp32_path is another one.
    """
    parent = record["parent"] or {"path": "", "weights": None}  # one that was adopted in INT8 has none
    path = args.fp32_path or os.path.join(ROOT, parent["path"])
    try:
        found = checkpoints.open_graph(path, "--fp32_path")
        if records.graph_files(found.record) != parent["weights"]:  # by hash: places change their models
            raise UserError(f"--fp32_path {path}: not the graph that {args.model_path} was quantized from")
        return found
    except UserError:
        if args.fp32_path:
            raise
        return None


def onnx_logits(directory, features, pad_id):
    """What infer_onnx.py computes with the model in a directory: float32 [n, outputs] of a list of Feature."""
    streams = engine.default_streams("cpu")
    path = os.path.join(directory, "model.onnx")
    runners = map(engine.FunctionRunner, infer_onnx.onnxruntime_streams(path, engine.thread_count(), streams))
    return engine.Streams(list(runners)).predict(features, pad_id=pad_id)


def check_tokens(directory, max_seq_length, examples, features):
    """Raises: UserError unless infer_onnx.py with the written tokenizer.json makes the ids of ours."""
    written = tokenizers.Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    rows = [(example.text, example.text_pair) for example in examples]
    found = infer_onnx.encode(written, rows, max_seq_length)
    for (ids, types), feature, example in zip(found, features, examples):
        if (ids, types) != (feature.input_ids, feature.token_type_ids):
            raise UserError(f"tokenizer.json cuts {example.text!r} into other tokens than the model was trained with")


def compare_fp32(args, graph, directory, features, inputs, pad_id):
    """The comparison of a model in FP32 with Paddle's: the same arithmetic in another order, so the same logits.

    Args: features: of some dev records, or random ones. inputs: what they are. Returns: the field ``metrics``.
    """
    expected = engine.open_engine(graph.prefix, features).predict(features, pad_id=pad_id)
    found = onnx_logits(directory, features, pad_id)
    parity = exporting.check_parity(expected, found, inputs, args.parity_tolerance)
    close = f"logits within {parity['largest_difference']:.1e} of Paddle's on {inputs}"
    return {graph.objective.metric: records.score(graph.record), "parity": parity, "shown": close}


def compare_int8(args, graph, directory, features, inputs, pad_id):
    """The comparison of an INT8 model with FP32, as quant_post.py makes it: by the answers on dev.

    Not by the logits of Paddle's INT8: each engine rounds the weights in its own way, so they are two roundings of one
    model. Ends with status 1 if the answers are FP32's too rarely. Args and returns: as compare_fp32.
    """
    objective, targets = graph.objective, batching.targets(features)
    found = onnx_logits(directory, features, pad_id)
    int8 = engine.open_engine(graph.prefix, features, "cpu", "int8").predict(features, pad_id=pad_id)
    original, reference, name = fp32_graph(args, graph.record), int8, "Paddle's INT8 (the FP32 graph is not there)"
    predictions.write(directory, found, targets)
    metrics = objective.compared(found, targets)
    for metric, figure in objective.compared(int8, targets).items():
        metrics[f"paddle_{metric}"] = figure
    if original:
        reference, name = engine.open_engine(original.prefix, features).predict(features, pad_id=pad_id), "FP32"
        for metric, figure in objective.compared(reference, targets).items():
            metrics[f"fp32_{metric}"] = figure
    metrics["agreement"] = round(objective.agreement(found, reference), 6)
    metrics["agreement_with_paddle"] = round(objective.agreement(found, int8), 6)
    metrics["compared_with"] = name
    both = f"{metrics[objective.metric]:.4f} (Paddle's INT8 {metrics[f'paddle_{objective.metric}']:.4f})"
    close = f"{objective.shown} {both}, agrees with {name} on {metrics['agreement']:.4f} of {inputs}"
    if not metrics["agreement"] >= args.min_agreement:
        print(
            f"export_onnx.py: {close}, below --min_agreement {args.min_agreement:g}; nothing was written",
            file=sys.stderr,
        )
        sys.exit(1)
    return {**metrics, "shown": close}


def write_model(graph, tokenizer, task, directory, args):
    """Writes all that infer_onnx.py needs into a directory. Returns: {type of node: how many}."""
    model = onnx_graph.convert(graph.prefix, unsigned_activations=args.activations == "uint8")
    onnx.save(model, os.path.join(directory, "model.onnx"))
    tokenizer.save(directory)
    tokenizer.standalone(args.max_seq_length).save(os.path.join(directory, "tokenizer.json"))
    description = {
        "task": task.name,
        "labels": list(task.labels),
        "label_names": task.label_names and list(task.label_names),
        "objective": graph.record["objective"],
        "max_seq_length": args.max_seq_length,
        "pairs": graph.record["data"]["dev"].get("pairs"),
    }
    files.write_json(os.path.join(directory, "labels.json"), description)
    return onnx_graph.counts(model)


def export(args):
    # Graph, parameters and tokenizer are compared with the hashes in stage.json.
    graph = checkpoints.open_graph(args.model_path)
    record, tokenizer, task = graph.record, graph.tokenizer(), data.task_of(graph.record)
    quantized = engine.is_quantized(graph.prefix)
    for name in ("activations", "fp32_path"):
        if getattr(args, name) and not quantized:
            raise UserError(f"--{name}: for INT8 models; {args.model_path} is in FP32")
    if quantized and args.activations is None:
        for_gpu = record.get("variant", {}).get("device", "cpu") != "cpu"
        args.activations = "int8" if for_gpu else "uint8"
    args.max_seq_length = records.sequence_length(args, record)
    args.output_dir = args.output_dir or cli.PathArgument(default_output_dir(graph))
    # INT8 is compared by its answers, which takes all of dev. For FP32 a few inputs will do, and random tokens, too.
    if quantized:
        dev = data.read_split(task, "dev", args.data_dir, args.max_eval_samples)
        examples, described = dev.examples, dev.describe()
    else:
        examples, described = data.read_dev_if_local(task, args), record["data"]["dev"]
    parent = records.parent_of(graph.directory, record, records.graph_files(record))
    names = ("task", "labels", "objective", "params", "flops", "model", "notes")
    fields = {name: record[name] for name in names}
    run = Run("onnx", args, parent, {"dev": described}, noted_by="ONNX: ", **fields)
    if run.has_finished(args.output_dir):
        print(f"{args.output_dir}: there already; --overwrite makes it anew and checks it again")
        return
    if quantized:
        features = batching.convert(examples, tokenizer, args.max_seq_length)
        inputs = f"{len(examples)} dev records"
    else:
        features, inputs = exporting.parity_inputs(examples, tokenizer, args.max_seq_length)
        examples = examples[: len(features)]
    metrics, details = {}, {"opset": onnx_graph.OPSET, "activations": args.activations}
    with run.output(args.output_dir, FILES, metrics=metrics, onnx=details) as directory:
        details["nodes"] = write_model(graph, tokenizer, task, directory, args)
        if examples:
            check_tokens(directory, args.max_seq_length, examples, features)
        compare = compare_int8 if quantized else compare_fp32
        metrics.update(compare(args, graph, directory, features, inputs, tokenizer.pad_id))
        metrics["bytes"] = os.path.getsize(os.path.join(directory, "model.onnx"))
        close = metrics.pop("shown")
    size = f"{metrics['bytes'] / 1e6:.1f} MB (Paddle: {os.path.getsize(f'{graph.prefix}.pdiparams') / 1e6:.1f})"
    print(f"{task.name}: {args.output_dir}/model.onnx, opset {onnx_graph.OPSET}, {size}; {close}")


def main(argv=None):
    export(parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
