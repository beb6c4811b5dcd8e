"""What quant_post.py needs beside the stage itself: its options, PaddleSlim's calibration, the comparison with FP32."""

import os
from typing import Any, NamedTuple

import numpy as np
import weights
from common import (
    UserError,
    batching,
    checkpoints,
    cli,
    compat,
    engine,
    exporting,
    files,
    gpu,
    objectives,
    predictions,
    records,
)
from common.compat import paddle


def add_quantization_arguments(parser, algorithms, samples):
    """Adds the groups "other" and "file names"."""
    group = parser.add_argument_group("other")
    help = "how to choose the activation scales; weights always have one scale per channel"
    group.add_argument(
        "--algorithms", nargs="+", choices=algorithms, default=list(algorithms), help=help, without_effect=True
    )
    help = "sizes of the calibration batch, one variant for each; raise it if INT8 agrees with FP32 too rarely"
    group.add_argument("--calib_samples", nargs="+", type=int, default=list(samples), help=help, without_effect=True)
    help = "what calibrates; dev is the published recipe, and shows the selection set to the calibration"
    group.add_argument("--calib_split", choices=("train", "dev"), default="train", help=help)
    help = "share of dev records on which INT8 must answer as FP32 does; a variant below it is reported and not written"
    group.add_argument("--min_agreement", type=float, default=0.9, help=help, without_effect=True)
    help = "largest difference allowed between the FP32 graph's accuracy (or other metric) and the one that training "
    help += "recorded in stage.json, if both are on the same dev data; a difference of two records is always allowed"
    group.add_argument("--accuracy_tolerance", type=float, default=0.005, help=help, without_effect=True)
    help = "also store word embeddings in INT8, one scale per row: half the file (default: on a CPU, not for TensorRT)"
    group.add_flag("--int8_embeddings", help, default=None)
    group.add_argument("--seed", type=int, default=42, help="chooses the calibration samples")
    help = (
        "gpu: quantize here, without a GPU, for a machine with TensorRT: FP32 embeddings, a graph with its whole last "
    )
    help += "layer; scored by a simulation on this CPU, which stage.json says"
    group.add_argument("--for", dest="made_for", choices=("gpu",), help=help)
    cli.add_device_argument(group)
    cli.add_overwrite_argument(group)
    add_file_name_arguments(parser.add_argument_group("file names"))


def add_file_name_arguments(group):
    group.add_argument("--input_model_filename", help="default: the one that stage.json names")
    group.add_argument("--input_param_filename", help="default: the one that stage.json names")
    group.add_argument("--save_model_filename", default="int8.pdmodel", help="file name of the quantized graph")
    group.add_argument("--save_params_filename", default="int8.pdiparams", help="file name of its parameters")
    help = "accepted; the tokenizer lies beside the model"
    group.add_argument("--model_name_or_path", type=cli.NameOrPathArgument, help=help)


def check_input(args, graph):
    """Decides --int8_embeddings if it was not given.

    Raises: UserError for file names that are not those of the graph, or that do not belong together; for a graph or an
    option that does not fit the machine that the result is for.
    """
    if args.device != "cpu":
        gpu.check_tensorrt()
    for_gpu = args.made_for == "gpu" or args.device != "cpu"
    if args.int8_embeddings is None:
        args.int8_embeddings = not for_gpu  # TensorRT takes no INT8 table of embeddings
    if args.select_on == "train" and args.calib_split == "dev":
        raise UserError("--select_on train: leaves dev unseen, so it does not go with --calib_split dev")
    if args.made_for == "gpu" and args.int8_embeddings:
        raise UserError("--int8_embeddings: TensorRT takes no INT8 embeddings; leave it out with --for gpu")
    if args.made_for == "gpu" and graph.record["export"].get("cls_only"):
        raise UserError(
            f"{args.input_dir}: a graph for CPUs, whose last layer is computed for [CLS] alone; export it again with "
            "--cls_only False (into another directory, if the CPU's is still wanted)"
        )
    for given, suffix in ((args.input_model_filename, ".pdmodel"), (args.input_param_filename, ".pdiparams")):
        if given not in (None, graph.name + suffix):
            raise UserError(f"{given}: {args.input_dir} holds {graph.name}{suffix}")
    if os.path.splitext(args.save_model_filename)[0] != os.path.splitext(args.save_params_filename)[0]:
        raise UserError("--save_model_filename and --save_params_filename: must be alike but for their endings")


class CalibrationBatch(paddle.io.IterableDataset):
    """All calibration samples in one batch, as PaddleSlim's DataLoader wants it."""

    def __init__(self, features, pad_id):
        self.batch = batching.collate(features, range(len(features)), pad_id)

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
    for_gpu=False,
):
    """Writes the quantized graph of ``prefix`` into ``directory``. Returns: its file prefix.

    Args: features: what calibrates, in one batch. algorithm: how the activation scales are chosen. int8_embeddings:
        whether the word embeddings are stored in INT8, too. for_gpu: leave all scales of weights per column, as
        TensorRT wants them.
    """
    with files.empty_directory(os.path.join(directory, ".float")) as scratch:
        if int8_embeddings:
            weights.store_in_int8(prefix, os.path.join(scratch, "float"))
            prefix = os.path.join(scratch, "float")
        source, graph = os.path.split(prefix)
        paddle.enable_static()
        try:
            # Names as in a new process, whatever was quantized before in this one.
            names, program = paddle.utils.unique_name.guard(), paddle.static.program_guard(paddle.static.Program())
            with cli.quiet(), names, paddle.static.scope_guard(paddle.static.Scope()), program:
                feeds = [paddle.static.data(name, [None, None], "int64") for name in ("input_ids", "token_type_ids")]
                # PaddleSlim 2.6.0 takes nothing else here than a loader over an iterable data set with a feed list.
                batches, place = CalibrationBatch(features, pad_id), paddle.CPUPlace()
                loader = paddle.io.DataLoader(batches, feeds, place, return_list=False, batch_size=None)
                compat.quant_post_static(
                    executor=paddle.static.Executor(place),
                    model_dir=source,
                    model_filename=f"{graph}.pdmodel",
                    params_filename=f"{graph}.pdiparams",
                    quantize_model_path=directory,
                    save_model_filename=model_filename,
                    save_params_filename=params_filename,
                    data_loader=loader,
                    batch_size=len(features),
                    batch_nums=1,
                    algo=algorithm,
                    hist_percent=0.9999,  # of hist: the scale covers this share of the activations
                    quantizable_op_type=["matmul", "matmul_v2"],
                    weight_quantize_type="channel_wise_abs_max",
                    onnx_format=True,  # weights are stored as int8, half the file
                )
        finally:
            paddle.disable_static()
        written = os.path.join(directory, os.path.splitext(model_filename)[0])
        if not for_gpu:
            weights.scale_square_weights_by_rows(prefix, written)
    exporting.remove_call_stacks(os.path.join(directory, model_filename))
    return written


def quantize_for(args, graph, features, pad_id, algorithm, directory):
    """As quantize, for the arguments of quant_post.py. Args: graph: checkpoints.Graph of FP32."""
    names = args.save_model_filename, args.save_params_filename
    for_gpu = (args.made_for or args.device) != "cpu"
    return quantize(graph.prefix, features, pad_id, algorithm, directory, args.int8_embeddings, *names, for_gpu)


def describe(args):
    """What stage.json says of every variant beside the algorithm and the number of samples."""
    return {
        "calib_split": args.calib_split,
        "device": args.made_for or args.device,
        "scored_in": precision_of(args),
        # The products with weights alone: see engine.INT8_OPERATORS.
        "int8_operators": sorted(engine.INT8_OPERATORS),
        "int8_embeddings": args.int8_embeddings,
    }


def precision_of(args):
    """The precision in which a variant is scored: that of the engine which will serve it, or its simulation."""
    return engine.SIMULATED if args.made_for == "gpu" and args.device == "cpu" else "int8"


class Reference(NamedTuple):
    """Records on which graphs are compared with FP32."""

    features: list  # of batching.Feature
    logits: Any  # of FP32, float32 [n, outputs]
    pad_id: int

    def predict(self, args, prefix):
        """Logits of a quantized graph, float32 [n, outputs], from the engine that will serve it."""
        int8 = engine.open_engine(prefix, self.features, args.device, precision_of(args))
        return int8.predict(self.features, pad_id=self.pad_id)

    @property
    def targets(self):
        return batching.targets(self.features)

    def compare(self, objective, logits, directory=None):
        """{accuracy, fp32_accuracy, agreement}, or the objective's metrics, of logits [n, outputs] and FP32's.

        Args: directory: gets the logits, as what the model in it answers on dev (predictions.FILE).
        """
        if directory:
            predictions.write(directory, logits, self.targets)
        compared = objective.compared(logits, self.targets)
        for name, figure in objective.compared(self.logits, self.targets).items():
            compared[f"fp32_{name}"] = figure
        return {**compared, "agreement": round(objective.agreement(logits, self.logits), 6)}

    def score(self, objective, logits):
        """The objective's metrics with the loss, agreement with FP32, root mean square of the logits' differences."""
        error = float(np.sqrt(np.square(logits - self.logits, dtype="float64").mean()))
        agreement = round(objective.agreement(logits, self.logits), 6)
        return {**objective.metrics(logits, self.targets), "agreement": agreement, "logit_error": error}


def reference(args, graph, features, pad_id):
    """The FP32 graph's answers to features: a Reference."""
    return Reference(
        features, engine.open_engine(graph.prefix, features, args.device).predict(features, pad_id=pad_id), pad_id
    )


def scores_on(args, objective, variants, selection):
    """{variant: metrics} of variants that lie in the output directory, on a Reference; printed as a table, too."""
    scores = {}
    print(f"\n| variant | INT8 {objective.shown} on {args.select_on} | agreement with FP32 |\n| --- | --- | --- |")
    for algorithm, count in variants:
        prefix = checkpoints.open_graph(os.path.join(args.output_dir, f"{algorithm}{count}")).prefix
        found = scores[algorithm, count] = selection.compare(objective, selection.predict(args, prefix))
        print(f"| {algorithm}{count} | {found[objective.metric]:.4f} | {found['agreement']:.4f} |", flush=True)
    return scores


def check_fp32(args, run, graph, dev):
    """Compares FP32's metric with that of training, and prints it; what to expect of INT8 here, too.

    Args: graph: checkpoints.Graph. dev: Reference. Raises: UserError past --accuracy_tolerance.
    """
    objective, described = graph.objective, run.fields["data"]["dev"]
    fp32 = objective.metrics(dev.logits, dev.targets)[objective.metric]
    check_score(fp32, graph.record, described, args)
    if args.made_for:
        run.notes.append("INT8 for a GPU, scored by a simulation on a CPU")
        print(f"note: {run.notes[-1]}; not run on a GPU")
    else:
        print(engine.preflight("int8"))
    constant, reached = records.constant_answer(described)
    print(
        f"{graph.record['task']}: FP32 {objective.shown} {fp32:.4f} on {len(dev.features)} dev records ({constant} "
        f"{reached:.4f})"
    )


def check_score(found, record, dev, args):
    """Compares the FP32 graph's accuracy (selecting metric) with that of training, if data and length are the same.

    So the graph is the model that was trained, whatever stages and files lie between.

    Args: record: of the graph. dev: description of the dev split. Raises: UserError past --accuracy_tolerance.
    """
    before, recorded, metric = record["data"]["dev"], records.score(record), record["objective"]["metric"]
    length = record["metrics"].get("max_seq_length")  # unknown in records of the first version
    if (dev["md5"], dev["examples"], args.max_seq_length) != (before["md5"], before["examples"], length):
        return
    if not abs(found - recorded) <= max(args.accuracy_tolerance, 2.01 / dev["examples"]):
        raise UserError(
            f"{args.input_dir}: {objectives.shown(metric)} {found:.4f} on the same dev data on which training recorded "
            f"{recorded:.4f}; at most {args.accuracy_tolerance:g} apart is allowed (--accuracy_tolerance)"
        )
