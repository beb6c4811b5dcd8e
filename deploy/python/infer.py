"""Runs exported and quantized models with Paddle Inference: accuracy on dev, predictions for your own texts, timing.

Reads a graph (its file prefix; tokenizer and stage.json lie beside it) and the task's dev data, or your texts.

    python infer.py --task_name tnews --model_path ../../quantization/tnews_quant_models/mse4/int8 --int8
    python infer.py --model_path ../../pruning/pruned_models/TNEWS/0.75/sub_static/float --precision bf16
    python infer.py --model_path ../../quantization/tnews_quant_models/* --int8       # one table
    python infer.py --model_path ../../pruning/pruned_models/TNEWS/0.75/sub_static \\
        ../../quantization/tnews_quant_models/mse4 --report ../../tnews_report        # a page about both
    python infer.py --model_path ../../quantization/tnews_quant_models/mse4/int8 --int8 --text "今年的高考作文题"
"""

import json
import os
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path.insert(0, ROOT)
import bulk
import data
from common import UserError, batching, checkpoints, cli, engine, files, records, reports, significance, tensorrt, texts


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    main = parser.add_argument_group("what to run")
    help = "file prefix of a graph, without .pdmodel, or the directory with it; several of one task give a table"
    main.add_argument("--model_path", nargs="+", required=True, help=help)
    main.add_argument(
        "--task_name", type=cli.task_name, help="default, and checked: the task in the model's stage.json"
    )
    help = "write the predictions for the task's test.json, as CLUE takes them, to DIR/<task>_predict.json"
    main.add_argument("--predict_test", metavar="DIR", help=help)
    help = "write the logits of dev, float32 [records, labels] in the order of the file, to compare engines"
    main.add_argument("--save_logits", metavar="FILE.npy", help=help)
    reports.add_arguments(main)
    bulk.add_arguments(parser)
    group = parser.add_argument_group("engine")
    cli.add_device_argument(group)
    help = "bf16 on a CPU, fp16 on a GPU with --use_trt, int8 for quantized models (default: fp32)"
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16", "int8"), help=help)
    group.add_flag("--int8", "--precision int8")
    group.add_flag("--use_trt", "TensorRT on a GPU; on a CPU oneDNN is used anyway")
    group.add_flag("--collect_shape", "collect TensorRT's shape ranges again, and stop")
    tensorrt.add_shape_arguments(group)
    engine.add_cpu_arguments(group)
    help = "sequences per batch; lower it if memory runs out"
    group.add_argument("--batch_size", type=int, default=32, help=help, positive=True)
    timing = parser.add_argument_group("timing")
    timing.add_flag("--perf", "time dev end to end, tokenizing included, in five runs")
    timing.add_argument("--perf_json", metavar="FILE", help="also write the figures to FILE, for summarize.py --perf")
    help = "batches, at least, before the clock starts"
    timing.add_argument("--perf_warmup_steps", type=int, default=20, help=help)
    inputs = cli.add_input_arguments(parser)
    for name in ("--model_type", "--model_name_or_path"):
        inputs.add_argument(name, help="accepted; both are known from stage.json")
    args = parser.parse_args(argv)
    if args.int8 and args.precision not in (None, "int8"):
        parser.error(f"--int8 and --precision {args.precision} contradict each other")
    if args.predict_test and len(args.model_path) > 1:
        parser.error("--predict_test takes one --model_path")
    if args.save_logits and len(args.model_path) > 1:
        parser.error("--save_logits takes one --model_path")
    if args.save_logits and not args.save_logits.endswith(".npy"):
        parser.error(f"--save_logits {args.save_logits}: must end with .npy")
    others = args.text or args.input_file or args.predict_test or args.perf or args.collect_shape
    for name in ("save_logits", "report"):
        if getattr(args, name) and others:
            parser.error(f"--{name}: scores dev, so it goes without --text, --input_file, --predict_test, --perf")
    for name in ("save_logits", "perf_json"):  # before anything is computed
        path = getattr(args, name)
        if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            parser.error(f"--{name} {path}: no such directory")
    bulk.check_arguments(args, parser)
    if args.perf_json and not args.perf:
        parser.error("--perf_json goes with --perf")
    # A report compares FP32 with INT8, so each of its models runs in its own precision, unless one is named.
    args.precision = "int8" if args.int8 else args.precision or (None if args.report else "fp32")
    args.shapes = tensorrt.shapes_of(args)
    if args.shapes:
        args.max_seq_length = args.shapes[-1][1]  # which is compared with the positions that the model has
    engine.check_streams(args.streams, args.threads)
    return args


class Model:
    """A graph with all that is needed to run it: its record, its tokenizer, its maximum length.

    Nothing but the file prefix is asked of the user: task, labels and length are those of the stage.json beside it.
    """

    def __init__(self, args, path):
        # Graph, parameters and tokenizer are compared with the hashes in stage.json: a mixed-up file is refused here.
        self.args, self.graph = args, checkpoints.open_graph(path)
        self.record = self.graph.record
        # A quantized graph runs in INT8 only: in another precision the engine would simulate it, slower than FP32.
        self.precision = engine.check_precision(self.graph.prefix, args.device, args.precision)
        if args.task_name:
            records.check_task(self.record, args.task_name, self.graph.prefix)
        self.tokenizer = self.graph.tokenizer(args.use_faster_tokenizer)
        # The length of fine-tuning, unless the user asks for another: positions beyond it were not fine-tuned, and
        # fewer cut off the end of the texts.
        self.max_seq_length = records.sequence_length(args, self.record)
        self.task = data.task_of(self.record)

    def convert(self, examples):
        return batching.convert(examples, self.tokenizer, self.max_seq_length)

    def open_engine(self, features, streams=None):
        """The engine for the user's options. Args: features: from which TensorRT learns its shapes."""
        args = self.args
        # On a CPU, two streams of one thread each are faster than one stream of two threads, as threads that share a
        # batch wait for each other after every operator: 1.94 against 1.74 times a plain loop (results/README.md). None
        # lets the engine choose.
        streams = streams or args.streams
        options = args.device, self.precision, args.threads, args.use_trt, args.batch_size
        return engine.open_engine(self.graph.prefix, features, *options, self.tokenizer.pad_id, streams)

    def logits(self, features):
        """float32 [n, labels], in the order of the features."""
        # They are computed in order of length, so that batches hold little padding: 5 % of the tokens of TNEWS dev,
        # where the order of the file makes it 59 %.
        return self.open_engine(features).predict(features, self.args.batch_size, self.tokenizer.pad_id)


def classify_texts(args, models):
    """--text, --input_file: one JSON line per text, with label or labels, and probabilities."""
    for model in models:
        # The model gives logits. What they mean, its objective knows: a label with the probabilities of all (softmax),
        # or each label above a threshold (sigmoid). A file may be longer than memory: windows of it are read, computed
        # and answered in turn, each sorted by length as above.
        (bulk.classify_arguments if args.text else bulk.classify_file)(args, model)


def write_test_predictions(args, model):
    """--predict_test: writes the file that CLUE takes as a submission."""
    # CLUE wants one {"id", "label"} per line in the order of test.json, and the label's name, not its number.
    test = data.read_split(model.task, "test", args.data_dir)
    logits = model.logits(model.convert(test.examples))
    os.makedirs(args.predict_test, exist_ok=True)
    path = texts.write_submission(model.task, test.record_ids(), logits, args.predict_test)
    print(f"{len(test.examples)} test records -> {path}")


def collect_shapes(args, models):
    """--collect_shape: TensorRT plans for the smallest, largest and most frequent shapes; dev shows which these are."""
    if args.device == "cpu":
        raise UserError("--collect_shape: shapes are collected for TensorRT, on a GPU")
    dev = None if args.shapes else read_dev(args, models)
    for model in models:
        features = dev and model.convert(dev.examples)
        pad_id = model.tokenizer.pad_id
        engine.collect_shapes(model.graph.prefix, args.device, features, args.batch_size, pad_id, args.shapes)


def time_models(args, models):
    """--perf: prints seconds and sentences per second of dev end to end, and the latency of single texts."""
    # The clock belongs to the benchmark, which nothing else here needs.
    benchmark = os.path.join(ROOT, "deploy", "benchmark")
    if not os.path.isdir(benchmark):
        raise UserError("--perf: needs deploy/benchmark/ beside deploy/python/")
    sys.path.append(benchmark)
    import measure

    measure.time_models(args, models, read_dev(args, models).examples)


def score_dev(args, models):
    """Without other options: the accuracy on dev, as one JSON line, or as a table of several models.

    Returns: {file prefix: accuracy}; of other objectives than classification, the metric that selects.
    """
    # dev has also chosen the checkpoint and the best quantized variant, so this figure is a little optimistic.
    dev = read_dev(args, models)
    metric, targets, scores, decided, answered = models[0].task.objective.metric, dev.targets(), {}, {}, []
    for model in models:
        features, objective = model.convert(dev.examples), model.task.objective
        logits = model.logits(features)
        if args.save_logits:
            files.write_array(args.save_logits, logits)
        answered.append((model.graph.prefix, model.record, model.precision, model.max_seq_length, logits))
        found = objective.compared(logits, targets)
        scores[model.graph.prefix], decided[model.graph.prefix] = found[metric], objective.decide(logits)
    if len(models) == 1:
        result = {"task": models[0].task.name, "model": models[0].graph.recorded_as}
        print(json.dumps({**result, "precision": models[0].precision, **found, **dev.describe()}, ensure_ascii=False))
        if metric == "accuracy":  # the line that scripts written for the original example look for
            print(f"acc: {found[metric]:.6g}")
    else:
        best, shown = max(scores, key=scores.get), models[0].task.objective.shown
        # A difference of a few records is noise: the records that only one of two models gets right tell.
        marks, explained = significance.near(best, decided, models[0].task.objective, targets)
        precision = ", ".join(dict.fromkeys(model.precision for model in models))
        print(f"| {models[0].task.name}, {precision}, {len(dev.examples)} dev records | {shown} |\n| --- | --- |")
        for prefix, score in scores.items():
            # The last two directories: tnews_quant_models/mse4.
            name = "/".join(os.path.abspath(prefix).split(os.sep)[-3:-1])
            print(f"| {name} | {score:.4f} {'(best)' if prefix == best else marks.get(prefix, '')}".rstrip() + " |")
        if marks:
            print(explained)
    if args.report:  # the first model is the one that the others are compared with
        reports.write(args.report, answered, dev.describe(), dev.examples, args.report_errors)
    return scores


def read_dev(args, models):
    """The dev data of the task that all the models are of. Raises: UserError if their tasks or labels differ."""
    task = models[0].task
    for model in models:
        if (model.task.name, model.task.objective.name) != (task.name, task.objective.name):
            raise UserError(
                f"--model_path {model.graph.prefix}: a model of {model.task.name} ({model.task.objective.name}); a "
                f"table is of one task, {task.name} ({task.objective.name})"
            )
        if model.task.labels != task.labels:  # the same number would mean another label
            raise UserError(f"--model_path {model.graph.prefix}: other labels than those of {models[0].graph.prefix}")
    return data.read_split(task, "dev", args.data_dir, args.max_eval_samples)


def main(argv=None):
    args = parse_args(argv)
    args.device = cli.set_device(args.device)
    if args.use_trt and args.device == "cpu":
        print("--use_trt: no GPU here, oneDNN is used instead", file=sys.stderr)
    models = [Model(args, path) for path in args.model_path]
    # What to expect of the precision on this CPU, before any time is spent: INT8 without VNNI is slow and may saturate.
    for precision in dict.fromkeys(model.precision for model in models if args.device == "cpu"):
        expectation = engine.preflight(precision)
        if expectation:
            print(expectation, file=sys.stderr)
    if args.text or args.input_file:
        return classify_texts(args, models)
    if args.predict_test:
        return write_test_predictions(args, models[0])
    if args.collect_shape:
        return collect_shapes(args, models)
    if args.perf:
        return time_models(args, models)
    return score_dev(args, models)


if __name__ == "__main__":
    cli.run(main)
