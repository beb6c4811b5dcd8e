"""Quantizes an exported model to INT8 after training: mse, avg, abs_max and hist, each calibrated with 4 and 8 samples.

Reads a directory with a static graph: pruning/export.sh's sub_static, or a fine-tuned model after export_model.py.
Writes <output_dir>/<algorithm><samples>/int8.{pdmodel,pdiparams}, each directory with tokenizer and stage.json. Every
variant is scored on dev by the INT8 engine that will serve it and compared with FP32. A variant whose predictions agree
with FP32's on less than --min_agreement of dev is not written. Variants that are there already are not made again.

    python quant_post.py --task_name TNEWS --input_dir ../pruning/pruned_models/TNEWS/0.75/sub_static
"""

import dataclasses
import itertools
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import calibration
import data
import numpy as np
from common import UserError, batching, checkpoints, cli, engine, files, records
from common.runs import Run

ALGORITHMS = ("mse", "avg", "abs_max", "hist")
SAMPLES = (4, 8)  # one calibration batch of that size, as published


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    main = parser.add_argument_group("what to quantize")
    cli.add_task_argument(main)
    help = "directory with the exported FP32 graph"
    main.add_argument("--input_dir", type=cli.PathArgument, required=True, help=help, without_effect=True)
    help = "default: from the input's stage.json: <task>_quant_models (pruned to 0.75), <task>_finetuned_quant_models, "
    help += "<task>_<width>_quant_models"
    cli.add_output_argument(main, help)
    calibration.add_quantization_arguments(parser, ALGORITHMS, SAMPLES)
    cli.add_input_arguments(parser)
    args = parser.parse_args(argv)
    if min(args.calib_samples) < 1:
        raise UserError(f"--calib_samples {min(args.calib_samples)}: must be above 0")
    return args


def default_output_dir(record):
    task, width = record["task"].lower(), record["model"]["width_mult"]
    if record["stage"] == "finetune":
        return f"{task}_finetuned_quant_models"
    return f"{task}_quant_models" if width == 0.75 else f"{task}_{width:g}_quant_models"


def quantize_all(args):
    """Makes and scores the variants that are not there yet, and prints the table of all."""
    # The exported FP32 graph, and the record of the model in it: task, labels and length need not be typed again.
    record = records.read_record(args.input_dir, "an exported model")
    records.check_task(record, args.task_name, args.input_dir)
    if record["stage"] == "quantize":
        raise UserError(f"{args.input_dir}: quantized already; name the directory of the exported FP32 graph")
    graph = checkpoints.open_graph(args.input_dir, "--input_dir")
    calibration.check_input(args, graph)
    tokenizer = graph.tokenizer(args.use_faster_tokenizer)
    records.show_inherited(args.input_dir, record, args)
    args.max_seq_length = records.sequence_length(args, record)
    args.output_dir = args.output_dir or cli.PathArgument(default_output_dir(record))

    # Calibration takes train records, so that dev, on which the best variant is chosen, stays unseen.
    # It takes so few that it does not matter whether the train file is the complete official one: no train_size.
    task = dataclasses.replace(data.task_of(record), train_size=None)
    samples = data.read_split(task, args.calib_split, args.data_dir, args.max_train_samples)
    dev = data.read_split(task, "dev", args.data_dir, args.max_eval_samples)
    if max(args.calib_samples) > len(samples.examples):
        raise UserError(
            f"--calib_samples {max(args.calib_samples)}: only {len(samples.examples)} {args.calib_split} records"
        )
    described = {args.calib_split: samples.describe(), "dev": dev.describe()}
    # The objective with its settings, too: an INT8 model decides by the threshold of the FP32 model.
    fields = {name: record[name] for name in ("task", "labels", "objective", "params", "flops", "model", "notes")}
    parent = records.parent_of(args.input_dir, record, records.graph_files(record))
    run = Run("quantize", args, parent, described, noted_by="quantizing: ", **fields)
    # Two runs into one directory would each make every variant.
    with files.Lock(args.output_dir):
        # FP32 in the same engine is what INT8 has to agree with. On the dev data of the training its accuracy has to be
        # the recorded one, or the graph is not the model that was trained.
        features = batching.convert(dev.examples, tokenizer, args.max_seq_length)
        fp32_logits = engine.open_engine(graph.prefix, features, args.device).predict(features, pad_id=tokenizer.pad_id)
        fp32 = graph.objective.metrics(fp32_logits, batching.targets(features))[graph.objective.metric]
        calibration.check_score(fp32, record, described["dev"], args)
        if args.made_for:
            run.notes.append("INT8 for a GPU, scored by a simulation on a CPU")
            print(f"note: {run.notes[-1]}; not run on a GPU")
        else:
            print(engine.preflight("int8"))
        constant, reached = records.constant_answer(described["dev"])
        print(
            f"{record['task']}: FP32 {graph.objective.shown} {fp32:.4f} on {len(features)} dev "
            f"records ({constant} {reached:.4f})"
        )
        make_variants(args, run, graph, tokenizer, samples, features, fp32_logits)


def make_variants(args, run, graph, tokenizer, samples, features, fp32_logits):
    """Makes the variants that are not there, and prints a row for each. Ends with status 1 if none is good enough.

    Args: samples: data.Split to calibrate on. features: of dev. fp32_logits: of dev, [n, classes].
    """
    # One order for all variants: the 4 samples of mse4 are the first 4 of mse8, and the same for every algorithm. So
    # variants differ in what their names say, and in nothing else.
    # To change if INT8 loses too much: more samples (--calib_samples 32), another --seed, --int8_embeddings False.
    order = np.random.default_rng(args.seed).permutation(len(samples.examples))
    metric = graph.objective.metric
    print(f"| variant | INT8 {graph.objective.shown} | agreement with FP32 | file, MB |\n| --- | --- | --- | --- |")
    kept, left_out = {}, []
    for algorithm, count in itertools.product(args.algorithms, args.calib_samples):
        name = f"{algorithm}{count}"
        target = os.path.join(args.output_dir, name)
        if run.has_finished(target):
            metrics = records.read_record(target)["metrics"]
        else:
            chosen = [samples.examples[i] for i in order[:count]]
            chosen = batching.convert(chosen, tokenizer, args.max_seq_length)
            metrics = make_variant(args, run, graph, tokenizer, algorithm, chosen, target, features, fp32_logits)
        if metrics["agreement"] >= args.min_agreement:
            kept[name] = metrics
            size = f"{metrics['bytes'] / 1e6:.1f}"
        else:
            left_out.append(name)
            size = "left out, one made before is still there" if os.path.isdir(target) else "not written"
        print(f"| {name} | {metrics[metric]:.4f} | {metrics['agreement']:.4f} | {size} |", flush=True)
    if not kept:
        print(
            f"quant_post.py: no variant agrees with FP32 on {args.min_agreement:g} of dev (--min_agreement); nothing "
            "was written",
            file=sys.stderr,
        )
        sys.exit(1)
    if left_out:
        print(f"below --min_agreement {args.min_agreement:g} and left out: {', '.join(left_out)}")
    # The eight lie close together, and the best of them on dev is a little optimistic, like every choice made on dev.
    best = max(sorted(kept), key=lambda name: kept[name][metric])
    print(
        f"{run.fields['task']}: best {best}, INT8 {graph.objective.shown} {kept[best][metric]:.4f} (FP32 "
        f"{kept[best][f'fp32_{metric}']:.4f}) -> {os.path.join(args.output_dir, best)}"
    )


class BelowAgreement(Exception):
    """A variant agrees with FP32 too rarely: it is scored, but not written."""


def make_variant(args, run, graph, tokenizer, algorithm, chosen, target, features, fp32_logits):
    """Quantizes the graph into ``target`` and scores the result on dev in the INT8 engine. Returns: its metrics.

    Args: chosen: features to calibrate on, in one batch. features, fp32_logits: of dev.
    """
    variant = {
        "algorithm": algorithm,
        "calib_samples": len(chosen),
        "calib_split": args.calib_split,
        "device": args.made_for or args.device,
        "scored_in": calibration.precision_of(args),
        # The products with weights alone: see engine.INT8_OPERATORS.
        "int8_operators": sorted(engine.INT8_OPERATORS),
        "int8_embeddings": args.int8_embeddings,
    }
    weights = [args.save_model_filename, args.save_params_filename]
    metrics = {}
    try:
        with run.output(target, weights, metrics=metrics, variant=variant) as directory:
            # Weights get one scale per channel, from their largest value. Activations get one scale per tensor, which
            # the algorithm chooses from what the calibration batch shows.
            options = args.int8_embeddings, *weights, variant["device"] != "cpu"
            calibration.quantize(graph.prefix, chosen, tokenizer.pad_id, algorithm, directory, *options)
            # Scored by the engine that will serve it. A simulation of INT8 in floating point scores higher than what
            # the user gets: ten points, when oneDNN chose the operators itself. So --for gpu, which has nothing else,
            # is marked in stage.json.
            prefix = os.path.join(directory, os.path.splitext(args.save_model_filename)[0])
            int8 = engine.open_engine(prefix, features, args.device, calibration.precision_of(args))
            logits = int8.predict(features, pad_id=tokenizer.pad_id)
            metrics.update(calibration.compare(graph.objective, logits, fp32_logits, features))
            metrics["bytes"] = os.path.getsize(f"{prefix}.pdiparams")
            # Agreement sees damage that accuracy hides: as many answers may become right as become wrong.
            if not metrics["agreement"] >= args.min_agreement:
                raise BelowAgreement
            tokenizer.save(directory)
    except BelowAgreement:
        pass
    return metrics


def main(argv=None):
    args = parse_args(argv)
    args.device = cli.set_device(args.device)
    quantize_all(args)


if __name__ == "__main__":
    cli.run(main)
