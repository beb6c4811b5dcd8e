"""Runs exported and quantized models with Paddle Inference: accuracy on dev, predictions for your own texts, timing.

Reads a graph (its file prefix; tokenizer and stage.json lie beside it) and the task's dev data, or your texts.

    python infer.py --task_name tnews --model_path ../../quantization/tnews_quant_models/mse4/int8 --int8
    python infer.py --model_path ../../pruning/pruned_models/TNEWS/0.75/sub_static/float --precision bf16
    python infer.py --model_path ../../quantization/tnews_quant_models/* --int8       # one table
    python infer.py --model_path ../../quantization/tnews_quant_models/mse4/int8 --int8 --text "今年的高考作文题"
"""

import functools
import json
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import compat  # noqa: F401  before Paddle

import numpy as np

import data
import engine
import measure
import tokenization
import records
import texts
import utils


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    main = parser.add_argument_group("what to run")
    main.add_argument(
        "--model_path",
        nargs="+",
        required=True,
        help="file prefix of a graph, without .pdmodel, or the directory with it; several of one task give a table",
    )
    main.add_argument("--task_name", help="default, and checked: the task in the model's stage.json")
    texts.add_text_arguments(parser.add_argument_group("your own texts, instead of dev"))
    main.add_argument(
        "--predict_test",
        metavar="DIR",
        help="write the predictions for the task's test.json, as CLUE takes them, to DIR/<task>_predict.json",
    )
    engine_group = parser.add_argument_group("engine")
    engine_group.add_argument("--device", help="gpu or cpu (default: gpu if Paddle has one)")
    engine_group.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16", "int8"),
        help="bf16 on a CPU, fp16 on a GPU with --use_trt, int8 for quantized models (default: fp32)",
    )
    engine_group.add_argument(
        "--int8", nargs="?", const=True, default=False, type=utils.boolean, help="--precision int8"
    )
    engine_group.add_argument(
        "--use_trt",
        nargs="?",
        const=True,
        default=False,
        type=utils.boolean,
        help="TensorRT on a GPU; on a CPU oneDNN is used anyway",
    )
    engine_group.add_argument(
        "--collect_shape",
        nargs="?",
        const=True,
        default=False,
        type=utils.boolean,
        help="collect TensorRT's shape ranges anew and stop",
    )
    engine_group.add_argument("--threads", type=int, help="of the CPU, in all (default: all cores)")
    engine_group.add_argument(
        "--streams",
        type=int,
        help="batches that a CPU computes side by side, each on its share of the threads; each needs memory of its own "
        "(default: one for each thread, at most 4)",
    )
    engine_group.add_argument("--batch_size", type=int, default=32, help="sequences per batch")
    timing = parser.add_argument_group("timing")
    timing.add_argument(
        "--perf",
        nargs="?",
        const=True,
        default=False,
        type=utils.boolean,
        help="time dev end to end, tokenizing included, in five runs",
    )
    timing.add_argument("--perf_warmup_steps", type=int, default=20, help="batches, at least, before the clock starts")
    inputs = parser.add_argument_group("data")
    utils.add_data_arguments(inputs)
    utils.add_tokenizer_arguments(inputs)
    for name in ("--model_type", "--model_name_or_path"):
        inputs.add_argument(name, help="accepted; both are known from stage.json")
    args = parser.parse_args(argv)
    if args.int8 and args.precision not in (None, "int8"):
        parser.error(f"--int8 and --precision {args.precision} contradict each other")
    if args.predict_test and len(args.model_path) > 1:
        parser.error("--predict_test takes one --model_path")
    args.precision = "int8" if args.int8 else args.precision or "fp32"
    utils.check_positive(args, "threads", "streams", "batch_size", "max_eval_samples")
    engine.check_streams(args.streams, args.threads)
    return args


def open_engine(args, prefix, device, tokenizer, features, streams=None):
    streams = streams or args.streams or engine.default_streams(device, args.threads)
    return engine.open_engine(
        prefix, features, device, args.precision, args.threads, args.use_trt, args.batch_size, tokenizer.pad_id, streams
    )


def classify(args, prefix, device, tokenizer, record, length):
    """Prints one JSON line per text of the user: label and probabilities."""
    examples = texts.read_texts(args, record["task"], record["data"]["dev"].get("pairs"))
    features = data.convert(examples, tokenizer, length)
    predictor = open_engine(args, prefix, device, tokenizer, features)
    logits = predictor.predict(features, args.batch_size, tokenizer.pad_id)
    for example, row in zip(examples, texts.probabilities(logits)):
        print(json.dumps(texts.answer(example, record["labels"], row), ensure_ascii=False))


def predict_test(args, prefix, device, tokenizer, record, length):
    """--predict_test: writes CLUE's submission file for the task of a model."""
    task = data.Task(record["task"], tuple(record["labels"]))
    test = data.read_split(task, "test", args.data_dir)
    features = data.convert(test.examples, tokenizer, length)
    predictor = open_engine(args, prefix, device, tokenizer, features)
    logits = predictor.predict(features, args.batch_size, tokenizer.pad_id)
    os.makedirs(args.predict_test, exist_ok=True)
    print(f"{len(features)} test records -> {texts.write_submission(task, test, logits, args.predict_test)}")


def time_runs(args, predictor, tokenizer, examples, length, single, runs=5):
    """Prints the time of dev end to end, tokenizing included, in every run and on average, and of single texts.

    Args: single: a function that gives the engine for these, with all threads in one stream.
    """
    measure.warm_up(predictor, tokenizer, examples, length, args.batch_size, args.perf_warmup_steps)
    seconds = []
    for number in range(1, runs + 1):
        started = time.perf_counter()
        predictor.classify(examples, tokenizer, length, args.batch_size)
        seconds.append(time.perf_counter() - started)
        print(f"run {number}: {seconds[-1]:.3f} s, {len(examples) / seconds[-1]:.1f} sentences/s", flush=True)
    middle, spread = np.median(seconds), max(seconds) - min(seconds)
    print(
        f"mean of {runs} runs: {np.mean(seconds):.3f} s, {len(examples) / np.mean(seconds):.1f} sentences/s (median "
        f"{middle:.3f} s, slowest less fastest {spread:.3f} s), batch size {args.batch_size}, maximum length {length}"
    )
    memory = measure.peak_memory() / 1e6
    p50, p99 = measure.latency(single(), tokenizer, examples[:200], length)
    print(f"one at a time: p50 {p50:.2f} ms, p99 {p99:.2f} ms; peak memory before that {memory:.0f} MB")


def main(argv=None):
    args = parse_args(argv)
    device = utils.set_device(args.device)
    if args.use_trt and device == "cpu":
        print("--use_trt: no GPU here, oneDNN is used instead", file=sys.stderr)
    exported = {prefix: engine.open_exported(prefix) for prefix in map(engine.find_prefix, args.model_path)}
    for prefix in exported:
        engine.check_precision(prefix, device, args.precision)
    if engine.preflight(args.precision) and device == "cpu":
        print(engine.preflight(args.precision), file=sys.stderr)

    rows, examples = {}, None
    for prefix, record in exported.items():
        if args.task_name:
            records.check_task(record, args.task_name, prefix)
        tokenizer = tokenization.load_tokenizer(os.path.dirname(os.path.abspath(prefix)), args.use_faster_tokenizer)
        length = records.sequence_length(args, record)
        if args.text or args.input_file:
            classify(args, prefix, device, tokenizer, record, length)
            continue
        if args.predict_test:
            predict_test(args, prefix, device, tokenizer, record, length)
            continue
        if examples is None:
            task = data.Task(record["task"], tuple(record["labels"]))
            dev = data.read_split(task, "dev", args.data_dir, args.max_eval_samples)
            examples = dev.examples
        elif record["task"] != task.name:
            raise utils.UserError(
                f"--model_path {prefix}: a model of {record['task']}; a table is of one task, {task.name}"
            )
        features = data.convert(examples, tokenizer, length)
        if args.collect_shape:
            if device == "cpu":
                raise utils.UserError("--collect_shape: shapes are collected for TensorRT, on a GPU")
            engine.collect_shapes(prefix, features, f"{prefix}.shape_ranges.pbtxt", args.batch_size, tokenizer.pad_id)
            continue
        predictor = open_engine(args, prefix, device, tokenizer, features)
        if args.perf:
            one_stream = functools.partial(open_engine, args, prefix, device, tokenizer, features, 1)
            time_runs(args, predictor, tokenizer, examples, length, one_stream)
            continue
        logits = predictor.predict(features, args.batch_size, tokenizer.pad_id)
        rows[prefix] = round(data.accuracy(logits, [f.label for f in features]), 6)
        if len(args.model_path) == 1:
            print(
                json.dumps(
                    {
                        "task": task.name,
                        "model": records.relative(prefix),
                        "precision": args.precision,
                        "accuracy": rows[prefix],
                        **dev.describe(),
                    },
                    ensure_ascii=False,
                )
            )
    if len(rows) > 1:
        best = max(rows, key=rows.get)
        print(f"| {task.name}, {args.precision}, {len(examples)} dev records | accuracy |\n| --- | --- |")
        for prefix, accuracy in rows.items():
            name = "/".join(os.path.abspath(prefix).split(os.sep)[-3:-1])
            print(f"| {name} | {accuracy:.4f}{' (best)' if prefix == best else ''} |")
    return rows


if __name__ == "__main__":
    utils.run(main)
