"""Quantizes an exported model to INT8 after training: mse, avg, abs_max and hist, each calibrated with 4 and 8 samples.

Reads a directory with a static graph: pruning/export.sh's sub_static, or a fine-tuned model after export_model.py.
Writes <output_dir>/<algorithm><samples>/int8.{pdmodel,pdiparams}, each directory with tokenizer and stage.json. Every
variant is scored on dev by the INT8 engine that will serve it and compared with FP32. A variant whose predictions agree
with FP32's on less than --min_agreement of dev is not written. Variants that are there already are not made again.
--analyze tells which products lose accuracy, --max_drop leaves the fewest in floating point that keep a limit.

    python quant_post.py --task_name TNEWS --input_dir ../pruning/pruned_models/TNEWS/0.75/sub_static
    python quant_post.py --task_name TNEWS --input_dir ../pruning/pruned_models/TNEWS/0.75/sub_static --max_drop 0.002
"""

import dataclasses
import itertools
import os
import sys
from functools import partial

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import calibration
import data
import numpy as np
import sensitivity
from common import UserError, batching, checkpoints, cli, files, records
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
    sensitivity.add_arguments(parser)
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
    # One order for all variants: the 4 samples of mse4 are the first 4 of mse8, and the same for every algorithm. So
    # variants differ in what their names say, and in nothing else.
    order = np.random.default_rng(args.seed).permutation(len(samples.examples))

    def features_of(numbers):
        return batching.convert([samples.examples[i] for i in numbers], tokenizer, args.max_seq_length)

    def calibrate(algorithm, count, directory):
        # Weights get one scale per channel, from their largest value. Activations get one scale per tensor, which the
        # algorithm chooses from what the calibration batch shows.
        chosen = features_of(order[:count])
        return calibration.quantize_for(args, graph, chosen, tokenizer.pad_id, algorithm, directory)

    # Two runs into one directory would each make every variant.
    with files.Lock(args.output_dir):
        # FP32 in the same engine is what INT8 has to agree with. On the dev data of the training its accuracy has to be
        # the recorded one, or the graph is not the model that was trained.
        features = batching.convert(dev.examples, tokenizer, args.max_seq_length)
        reference = calibration.reference(args, graph, features, tokenizer.pad_id)
        calibration.check_fp32(args, run, graph, reference)
        # dev chooses among the variants, as published, or as many train records, none of which calibrates.
        selection = reference
        if args.select_on == "train":
            others = features_of(order[max(args.calib_samples) :][: len(features)])
            if not others:
                raise UserError("--select_on train: all train records calibrate, none is left to choose")
            selection = calibration.reference(args, graph, others, tokenizer.pad_id)
        best, succeeded = make_variants(args, run, graph, tokenizer, calibrate, reference, selection)
        # Where the whole variant loses too much, single products of it can stay in floating point.
        with sensitivity.subject(args, graph, best, succeeded, calibrate) as subject:
            if args.analyze:
                sensitivity.report(subject, selection)
            if args.max_drop is not None:
                succeeded = hold_limit(args, run, graph, tokenizer, subject, reference, selection, succeeded)
    if not succeeded:
        sys.exit(1)


def make_variants(args, run, graph, tokenizer, calibrate, dev, selection):
    """Makes the variants that are not there, and prints a row for each.

    Args: calibrate: function (algorithm, count, directory) that writes one. dev, selection: calibration.Reference.
    Returns: (algorithm, count) of the variant that is best on the selection; whether it was good enough to be kept.
    """
    # To change if INT8 loses too much: --max_drop 0.002, more samples (--calib_samples 32), --int8_embeddings False.
    objective = graph.objective
    print(f"| variant | INT8 {objective.shown} | agreement with FP32 | file, MB |\n| --- | --- | --- | --- |")
    scores, left_out = {}, []
    for algorithm, count in itertools.product(args.algorithms, args.calib_samples):
        name = f"{algorithm}{count}"
        target = os.path.join(args.output_dir, name)
        if run.has_finished(target):
            metrics = records.read_record(target)["metrics"]
        else:
            variant, write = {"algorithm": algorithm, "calib_samples": count}, partial(calibrate, algorithm, count)
            metrics = make_variant(args, run, graph, tokenizer, variant, write, target, dev)
        size = f"{metrics['bytes'] / 1e6:.1f}"
        if metrics["agreement"] < args.min_agreement:
            left_out.append(name)
            size = "left out; the one that was there stays" if os.path.isdir(target) else "not written"
        print(f"| {name} | {metrics[objective.metric]:.4f} | {metrics['agreement']:.4f} | {size} |", flush=True)
        scores[algorithm, count] = metrics
    kept = {variant: metrics for variant, metrics in scores.items() if metrics["agreement"] >= args.min_agreement}
    if not kept:
        print(
            f"quant_post.py: no variant agrees with FP32 on {args.min_agreement:g} of dev (--min_agreement); nothing "
            f"was written{'' if args.max_drop is None else ' so far, single products may help'}",
            file=sys.stderr,
        )
    elif left_out:
        print(f"below --min_agreement {args.min_agreement:g} and left out: {', '.join(left_out)}")
    if kept and selection is not dev:
        kept = calibration.scores_on(args, objective, kept, selection)
    # The eight lie close together, and the best of them on dev is a little optimistic, like every choice made on dev.
    # If none was kept, the best one on dev is what --analyze and --max_drop look into.
    chosen_from = kept or scores
    best = max(sorted(chosen_from), key=lambda variant: chosen_from[variant][objective.metric])
    if kept:
        name = "{}{}".format(*best)
        print(
            f"{run.fields['task']}: best {name}, INT8 {objective.shown} {scores[best][objective.metric]:.4f} (FP32 "
            f"{scores[best][f'fp32_{objective.metric}']:.4f}) -> {os.path.join(args.output_dir, name)}"
        )
    return best, bool(kept)


class BelowAgreement(Exception):
    """A variant agrees with FP32 too rarely: it is scored, but not written."""


def make_variant(args, run, graph, tokenizer, variant, write, target, dev):
    """Writes a variant into ``target``, scored on dev in the INT8 engine, with what it is. Returns: its metrics.

    Args: variant: for stage.json, what makes it. write: function (directory) that puts the quantized graph
        there, and gives its file prefix. dev: calibration.Reference.
    """
    variant.update(calibration.describe(args))
    weights = [args.save_model_filename, args.save_params_filename]
    metrics = {}
    try:
        with run.output(target, weights, metrics=metrics, variant=variant) as directory:
            prefix = write(directory)
            # Scored by the engine that will serve it. A simulation of INT8 in floating point scores higher than what
            # the user gets: ten points, when oneDNN chose the operators itself. So --for gpu, which has nothing else,
            # is marked in stage.json.
            metrics.update(dev.compare(graph.objective, dev.predict(args, prefix), directory))
            metrics["bytes"] = os.path.getsize(f"{prefix}.pdiparams")
            # Agreement sees damage that accuracy hides: as many answers may become right as become wrong.
            if not metrics["agreement"] >= args.min_agreement:
                raise BelowAgreement
            tokenizer.save(directory)
    except BelowAgreement:
        pass
    return metrics


def hold_limit(args, run, graph, tokenizer, subject, dev, selection, is_kept):
    """--max_drop: writes the best variant once more, with a few products in floating point.

    Args: subject: sensitivity.Subject, the best variant. dev, selection: calibration.Reference. is_kept: whether the
        variant as it is was good enough. Returns: whether there is a model now that holds the limit.
    """
    target = os.path.join(args.output_dir, f"{subject.name}_max_drop_{args.max_drop:g}")
    # What decides the choice beside the run: it is recorded, and a rerun with the same finds the choice there.
    chosen_by = {name: getattr(args, name) for name in ("max_drop", "min_agreement", "select_on", "analyze_records")}
    if run.has_finished(target):
        before = records.read_record(target)["variant"]["chosen_by"]
        changed = [f"{name} {before[name]} -> {now}" for name, now in chosen_by.items() if before[name] != now]
        if changed:
            raise UserError(f"{target}: was chosen by other limits ({', '.join(changed)}); --overwrite chooses anew")
    else:
        floating = sensitivity.products_to_return(subject, selection)
        if not floating and os.path.isdir(target):
            print(f"{target}: one made before is still there")
        if not floating:
            return floating is not None and is_kept
        # The choice is in the graph itself, so whatever runs it needs no option: infer.py, the service, ONNX.
        variant = {**subject.variant, "floating": subject.names(floating), "chosen_by": chosen_by}
        variant["speed"] = subject.speed_left(floating, selection)
        metrics = make_variant(args, run, graph, tokenizer, variant, partial(subject.write, floating), target, dev)
        if metrics["agreement"] < args.min_agreement:
            why = f"agrees with FP32 on {metrics['agreement']:.4f} of dev only"
            print(f"{os.path.basename(target)}: {why} (--min_agreement), not written")
            return False
    # From the record, so that a rerun, which finds the result there, says the same.
    record = records.read_record(target)
    metrics, variant, shown = record["metrics"], record["variant"], graph.objective.shown
    score, fp32 = (metrics[name] for name in (graph.objective.metric, f"fp32_{graph.objective.metric}"))
    speed = ""
    if variant["speed"]:
        speed = (
            f"; speed {variant['speed']['of_int8']:.2f} of {subject.name}, {variant['speed']['of_fp32']:.2f} of FP32"
        )
    print(f"{os.path.basename(target)}: in floating point {', '.join(variant['floating'])}")
    print(
        f"{record['task']}: INT8 {shown} {score:.4f} (FP32 {fp32:.4f}); chosen on {args.select_on}; "
        f"{metrics['bytes'] / 1e6:.1f} MB{speed} -> {target}"
    )
    return True


def main(argv=None):
    args = parse_args(argv)
    args.device = cli.set_device(args.device)
    quantize_all(args)


if __name__ == "__main__":
    cli.run(main)
