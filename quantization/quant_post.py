"""Quantizes an exported model to INT8 after training: mse, avg, abs_max and hist, each calibrated with 4 and 8 samples.

Reads a directory with a static graph (pruning/export.sh's sub_static, or a fine-tuned model after export_model.py);
writes <output_dir>/<algorithm><samples>/int8.{pdmodel,pdiparams}, each directory with tokenizer and stage.json. Every
variant is scored on dev by the INT8 engine that will serve it, and compared with FP32; one whose predictions agree
with FP32's on less than --min_agreement of dev is not written. Variants that are there already are not made again.

    python quant_post.py --task_name TNEWS --input_dir ../pruning/pruned_models/TNEWS/0.75/sub_static
"""

import itertools
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import compat  # before Paddle

import numpy as np
import paddle

import data
import embeddings
import engine
import exporting
import modeling
import tokenization
import records
import utils

ALGORITHMS = ("mse", "avg", "abs_max", "hist")
SAMPLES = (4, 8)  # one calibration batch of that size, as published


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    main = parser.add_argument_group("what to quantize")
    main.add_argument("--task_name", required=True, help="the task of the model")
    main.add_argument("--input_dir", required=True, help="directory with the exported FP32 graph")
    main.add_argument(
        "--output_dir",
        help="default: from the input's stage.json: <task>_quant_models (pruned to 0.75), "
        "<task>_finetuned_quant_models, <task>_<width>_quant_models",
    )
    other = parser.add_argument_group("other")
    other.add_argument(
        "--algorithms",
        nargs="+",
        choices=ALGORITHMS,
        default=list(ALGORITHMS),
        help="of the activations' scales; weights are always per channel",
    )
    other.add_argument(
        "--calib_samples", nargs="+", type=int, default=list(SAMPLES), help="size of the calibration batch"
    )
    other.add_argument(
        "--calib_split",
        choices=("train", "dev"),
        default="train",
        help="what calibrates; dev is the published recipe, and shows the selection set to the calibration",
    )
    other.add_argument(
        "--min_agreement",
        type=float,
        default=0.9,
        help="share of dev predictions that must equal FP32's; a variant below it is reported and not written",
    )
    other.add_argument(
        "--accuracy_tolerance",
        type=float,
        default=0.005,
        help="largest difference allowed between the FP32 graph's accuracy and the one that training recorded in "
        "stage.json, where both are on the same dev data; two records are always allowed",
    )
    other.add_argument(
        "--int8_embeddings",
        nargs="?",
        const=True,
        type=utils.boolean,
        help="store the word embeddings in INT8 as well, with a scale a row: about half the file "
        "(default: on for a CPU; TensorRT takes no such table)",
    )
    other.add_argument("--seed", type=int, default=42, help="chooses the calibration samples")
    other.add_argument("--device", help="gpu or cpu (default: gpu if Paddle has one)")
    other.add_argument("--overwrite", action="store_true", help="replace variants made with other arguments")
    names = parser.add_argument_group("file names")
    names.add_argument("--input_model_filename", help="default: the one that stage.json names")
    names.add_argument("--input_param_filename", help="default: the one that stage.json names")
    names.add_argument("--save_model_filename", default="int8.pdmodel", help="file name of the quantized graph")
    names.add_argument("--save_params_filename", default="int8.pdiparams", help="file name of its parameters")
    names.add_argument("--model_name_or_path", help="accepted; the tokenizer lies beside the model")
    inputs = parser.add_argument_group("data")
    utils.add_data_arguments(inputs)
    utils.add_tokenizer_arguments(inputs)
    return parser.parse_args(argv)


def default_output_dir(record):
    task, width = record["task"].lower(), record["model"]["width_mult"]
    if record["stage"] == "finetune":
        return f"{task}_finetuned_quant_models"
    return f"{task}_quant_models" if width == 0.75 else f"{task}_{width:g}_quant_models"


class CalibrationBatch(paddle.io.IterableDataset):
    """One batch of the calibration samples, as PaddleSlim's DataLoader wants it."""

    def __init__(self, features, pad_id):
        self.batch = data.collate(features, range(len(features)), pad_id)

    def __iter__(self):
        yield self.batch.input_ids, self.batch.token_type_ids


def quantize(
    prefix,
    features,
    pad_id,
    algorithm,
    directory,
    int8_embeddings,
    model_filename="int8.pdmodel",
    params_filename="int8.pdiparams",
):
    """Writes the quantized graph of ``prefix`` into ``directory``, calibrated on all ``features`` in one batch."""
    with utils.empty_directory(os.path.join(directory, ".float")) as scratch:
        if int8_embeddings:
            embeddings.store_in_int8(prefix, os.path.join(scratch, "float"))
            prefix = os.path.join(scratch, "float")
        paddle.enable_static()
        try:
            program = paddle.static.Program()
            scope, names = paddle.static.scope_guard(paddle.static.Scope()), paddle.utils.unique_name.guard()
            # Names as in a process of its own, whatever was quantized before in this one.
            with utils.quiet(), names, scope, paddle.static.program_guard(program):
                feeds = [paddle.static.data(name, [None, None], "int64") for name in ("input_ids", "token_type_ids")]
                loader = paddle.io.DataLoader(
                    CalibrationBatch(features, pad_id),
                    feed_list=feeds,
                    places=paddle.CPUPlace(),
                    return_list=False,
                    batch_size=None,
                )
                compat.quant_post_static(
                    executor=paddle.static.Executor(paddle.CPUPlace()),
                    model_dir=os.path.dirname(prefix),
                    model_filename=f"{os.path.basename(prefix)}.pdmodel",
                    params_filename=f"{os.path.basename(prefix)}.pdiparams",
                    quantize_model_path=directory,
                    save_model_filename=model_filename,
                    save_params_filename=params_filename,
                    data_loader=loader,
                    batch_size=len(features),
                    batch_nums=1,
                    algo=algorithm,
                    hist_percent=0.9999,
                    quantizable_op_type=["matmul", "matmul_v2"],
                    weight_quantize_type="channel_wise_abs_max",
                    onnx_format=True,  # weights are stored as int8
                )
        finally:
            paddle.disable_static()


class BelowAgreement(Exception):
    """A variant whose predictions agree with FP32's too seldom; ``metrics`` are its own."""

    def __init__(self, metrics):
        self.metrics = metrics


def make_variant(args, prefix, calibration, algorithm, directory, features, reference, tokenizer):
    """Quantizes ``prefix`` into ``directory`` and scores the result on dev in the INT8 engine.

    Args: calibration, features: of the calibration batch and of dev. reference: FP32 logits of dev, [n, classes].
    Returns: metrics. Raises: BelowAgreement.
    """
    names = args.save_model_filename, args.save_params_filename
    quantize(prefix, calibration, tokenizer.pad_id, algorithm, directory, args.int8_embeddings, *names)
    exporting.forget_call_stacks(os.path.join(directory, args.save_model_filename))
    quantized = os.path.join(directory, os.path.splitext(args.save_model_filename)[0])
    logits = engine.open_engine(quantized, features, args.device, "int8").predict(features, pad_id=tokenizer.pad_id)
    labels = [f.label for f in features]
    metrics = {
        "accuracy": round(data.accuracy(logits, labels), 6),
        "fp32_accuracy": round(data.accuracy(reference, labels), 6),
        "agreement": round(float((logits.argmax(-1) == reference.argmax(-1)).mean()), 6),
        "bytes": os.path.getsize(f"{quantized}.pdiparams"),
    }
    if metrics["agreement"] < args.min_agreement:
        raise BelowAgreement(metrics)
    tokenizer.save(directory)
    return metrics


def check_accuracy(found, record, dev, args):
    """Compares the FP32 graph's accuracy with what training recorded, where both are of the same data and length.

    So the graph is the model that was trained, whatever stages and files lay between. Raises: UserError.
    """
    before, recorded = record["data"]["dev"], record["metrics"]["accuracy"]
    length = record["metrics"].get("max_seq_length")  # of the first version's records it is not known
    if (dev["md5"], dev["examples"], args.max_seq_length) != (before["md5"], before["examples"], length):
        return
    if not abs(found - recorded) <= max(args.accuracy_tolerance, 2.01 / dev["examples"]):
        raise utils.UserError(
            f"{args.input_dir}: accuracy {found:.4f} on the same dev data on which training recorded {recorded:.4f}; "
            f"at most {args.accuracy_tolerance:g} apart is allowed (--accuracy_tolerance)"
        )


def main(argv=None):
    args = parse_args(argv)
    args.device = utils.set_device(args.device)
    args.int8_embeddings = args.device == "cpu" if args.int8_embeddings is None else args.int8_embeddings
    if min(args.calib_samples) < 1:
        raise utils.UserError(f"--calib_samples {min(args.calib_samples)}: must be above 0")
    record = records.read_record(args.input_dir, "an exported model")
    records.check_task(record, args.task_name, args.input_dir)
    prefix = engine.static_prefix(args.input_dir, record)
    for given, found in ((args.input_model_filename, ".pdmodel"), (args.input_param_filename, ".pdiparams")):
        if given not in (None, os.path.basename(prefix) + found):
            raise utils.UserError(f"{given}: {args.input_dir} holds {os.path.basename(prefix)}{found}")
    args.output_dir = args.output_dir or default_output_dir(record)
    args.max_seq_length = records.sequence_length(args, record)
    if os.path.splitext(args.save_model_filename)[0] != os.path.splitext(args.save_params_filename)[0]:
        raise utils.UserError("--save_model_filename and --save_params_filename: must be alike but for their endings")

    tokenizer = tokenization.load_tokenizer(args.input_dir, args.use_faster_tokenizer)
    task = data.Task(record["task"], tuple(record["labels"]))
    calibration = data.read_split(task, args.calib_split, args.data_dir, args.max_train_samples)
    dev = data.read_split(task, "dev", args.data_dir, args.max_eval_samples)
    if max(args.calib_samples) > len(calibration.examples):
        raise utils.UserError(
            f"--calib_samples {max(args.calib_samples)}: only {len(calibration.examples)} {args.calib_split} records"
        )
    splits = {args.calib_split: calibration.describe(), "dev": dev.describe()}
    notes = record["notes"] + [
        f"quantizing: partial {n} data: {d['partial']}" for n, d in splits.items() if d["partial"]
    ]
    parent = modeling.parent_of(args.input_dir, {"weights": record["export"]["weights"]})
    common = {key: record[key] for key in ("task", "labels", "params", "flops", "model")}
    common.update(data=splits, parent=parent, notes=list(dict.fromkeys(notes)))
    now = records.identity(records.describe_arguments(args), parent, splits)
    with utils.Lock(args.output_dir):
        make_variants(args, prefix, record, tokenizer, calibration, dev, common, now)


def make_variants(args, prefix, record, tokenizer, calibration, dev, common, now):
    """Scores FP32, makes and scores the variants that are not there, and prints the table.

    Args: calibration, dev: data.Split. common: what all their records say. now: their identity.
    """
    features = data.convert(dev.examples, tokenizer, args.max_seq_length)
    order = np.random.default_rng(args.seed).permutation(len(calibration.examples))
    reference = engine.open_engine(prefix, features, args.device).predict(features, pad_id=tokenizer.pad_id)
    fp32_accuracy, described = data.accuracy(reference, [f.label for f in features]), dev.describe()
    check_accuracy(fp32_accuracy, record, described, args)
    print(engine.preflight("int8"))
    print(
        f"{record['task']}: FP32 accuracy {fp32_accuracy:.4f} on {len(features)} dev records "
        f"(majority class {described['majority_class']:.4f})"
    )
    print("| variant | INT8 accuracy | agreement with FP32 | file, MB |\n| --- | --- | --- | --- |")
    rows, left_out = {}, []
    for algorithm, samples in itertools.product(args.algorithms, args.calib_samples):
        name, started = f"{algorithm}{samples}", time.time()
        target = os.path.join(args.output_dir, name)
        metrics = None
        if not records.finished(target, now, args.overwrite):
            chosen = [calibration.examples[i] for i in order[:samples]]
            chosen = data.convert(chosen, tokenizer, args.max_seq_length)
            variant = {"algorithm": algorithm, "calib_samples": samples, "calib_split": args.calib_split,
                       "device": args.device, "int8_operators": sorted(engine.INT8_OPERATORS),
                       "int8_embeddings": args.int8_embeddings}  # fmt: skip
            try:
                with utils.whole_directory(target) as directory:
                    metrics = make_variant(args, prefix, chosen, algorithm, directory, features, reference, tokenizer)
                    hashes = records.hash_files(directory, [args.save_model_filename, args.save_params_filename])
                    fields = {"metrics": metrics, "weights": hashes, "variant": variant, **common}
                    records.write_record(directory, records.make_record("quantize", args, started, **fields))
            except BelowAgreement as below:
                metrics = below.metrics
        metrics = metrics or records.read_record(target)["metrics"]
        size = f"{metrics['bytes'] / 1e6:.1f}"
        if metrics["agreement"] < args.min_agreement:
            left_out.append(name)
            size = "left out, one made before is still there" if os.path.isdir(target) else "not written"
        else:
            rows[name] = metrics
        print(f"| {name} | {metrics['accuracy']:.4f} | {metrics['agreement']:.4f} | {size} |", flush=True)
    if not rows:
        print(
            f"quant_post.py: no variant agrees with FP32 on {args.min_agreement:g} of dev (--min_agreement); nothing "
            "was written",
            file=sys.stderr,
        )
        sys.exit(1)
    best = max(sorted(rows), key=lambda name: rows[name]["accuracy"])
    if left_out:
        print(f"below --min_agreement {args.min_agreement:g} and left out: {', '.join(left_out)}")
    print(
        f"{record['task']}: best {best}, INT8 accuracy {rows[best]['accuracy']:.4f} (FP32 {fp32_accuracy:.4f}) -> "
        f"{os.path.join(args.output_dir, best)}"
    )


if __name__ == "__main__":
    utils.run(main)
