"""Compares the pruned INT8 model with ONNX Runtime and OpenVINO: same sentences, order, batches and tokenizer.

Quantizes the same exported graph with ONNX Runtime (dynamic) and with OpenVINO (NNCF, calibrated), and times all three
like perf.py. The other engines run two graphs each: ours, which computes the last layer for [CLS] only, and the usual
full export. They also run our own INT8 model, as deploy/onnx/export_onnx.py writes it: the same weights and scales.
Needs packages that the pipeline itself does not need:

    .venv/bin/python -m pip install --require-hashes -r requirements/peers.txt
    python peers.py
"""

import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, "..", ".."), os.path.join(HERE, "..", "onnx")]
import infer_onnx
import onnx
import onnx_graph
import perf
import perf_models
from common import UserError, batching, checkpoints, cli, engine, files, records, tokenization

CALIBRATION = 300  # NNCF's own default

# (title, engine, file, precision of what is not INT8): quantized by the makers of the engines
THEIRS = (
    ("ONNX Runtime, dynamic INT8", "onnxruntime", "onnx", "f32"),
    ("OpenVINO, NNCF INT8", "openvino", "xml", "f32"),
    ("OpenVINO, NNCF INT8, BF16 for the rest", "openvino", "xml", "bf16"),
)
# The same of our own INT8 model.
OURS = (
    ("ONNX Runtime, our INT8", "onnxruntime", "f32"),
    ("OpenVINO, our INT8", "openvino", "f32"),
    ("OpenVINO, our INT8, BF16 for the rest", "openvino", "bf16"),
)


def open_streams(kind, path, precision, threads, streams):
    """An engine.Streams of another engine. Args: precision: bf16 for what OpenVINO does not compute in INT8."""
    opened = infer_onnx.ENGINES[kind](path, engine.thread_count(threads), streams, bf16=precision == "bf16")
    return engine.Streams([engine.FunctionRunner(stream) for stream in opened])


def convert(prefix, directory, features):
    """Quantizes the FP32 graph ``prefix`` to model.int8.onnx and model.int8.xml, unless they are up to date."""
    sources = {suffix: files.file_hash(prefix + suffix) for suffix in (".pdiparams", ".pdmodel")}
    sources.update(package_versions())
    perf_models.build_once(directory, sources, lambda new: convert_all(prefix, os.path.join(new, "model"), features))


def convert_ours(prefix, directory):
    """Writes the INT8 graph ``prefix`` as model.onnx, unless it is up to date."""
    sources = {suffix: files.file_hash(prefix + suffix) for suffix in (".pdiparams", ".pdmodel")}
    sources["code"] = files.file_hash(onnx_graph.__file__)
    perf_models.build_once(
        directory, sources, lambda new: onnx.save(onnx_graph.convert(prefix), os.path.join(new, "model.onnx"))
    )


def package_versions():
    return {name: __import__(name).__version__ for name in ("onnxruntime", "openvino", "nncf")}


def convert_all(prefix, target, features):
    import nncf
    import onnxruntime
    import openvino
    import paddle2onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    paddle2onnx.export(f"{prefix}.pdmodel", f"{prefix}.pdiparams", f"{target}.onnx", 13, False, False)
    # ONNX Runtime's quantizer finds the weights only after the basic optimizations.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = f"{target}.basic.onnx"
    onnxruntime.InferenceSession(f"{target}.onnx", options)
    graph = onnx.load(f"{target}.basic.onnx").graph
    # It cannot quantize the per-head weights of the [CLS]-only layer per channel.
    per_head = {constant.name for constant in graph.initializer if len(constant.dims) == 3}
    excluded = [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] in per_head]
    options = {"per_channel": True, "op_types_to_quantize": ["MatMul"], "weight_type": QuantType.QInt8}
    quantize_dynamic(f"{target}.basic.onnx", f"{target}.int8.onnx", nodes_to_exclude=excluded, **options)
    batches = [batching.collate([feature], [0]) for feature in features]
    samples = nncf.Dataset([{"input_ids": b.input_ids, "token_type_ids": b.token_type_ids} for b in batches])
    model = openvino.Core().read_model(f"{target}.onnx")
    model = nncf.quantize(model, samples, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(features))
    openvino.save_model(model, f"{target}.int8.xml", compress_to_fp16=False)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--pruned", help="FP32 export of the pruned model (default: random weights)")
    parser.add_argument("--both", help="INT8 export of the same model (default: random weights)")
    parser.add_argument("--full_graph", help="FP32 export of the same model with --cls_only False")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each on other sentences", positive=True)
    help = "sentences per round; 2000 x 5 rounds cover all of TNEWS dev"
    parser.add_argument("--sentences", type=int, default=2000, positive=True, help=help)
    parser.add_argument("--vocab_file", help="vocabulary of random models (default: a generated one)")
    parser.add_argument("--data_dir", help="directory with TNEWS (default: $CLUE_DATA_DIR, download or generate)")
    parser.add_argument("--output_dir", default=perf.OUTPUT, help="directory for results and generated models")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        import nncf  # noqa: F401
        import onnxruntime  # noqa: F401
        import openvino  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}; requirements/peers.txt lists what this comparison needs") from error
    given = {name: getattr(args, name) for name in ("pruned", "both", "full_graph")}
    if any(given.values()) and not all(given.values()):
        raise UserError("--pruned, --both and --full_graph must be of one model: give all three or none")
    options = ["--output_dir", args.output_dir, "--rounds", str(args.rounds), "--sentences", str(args.sentences)]
    for name in ("vocab_file", "data_dir"):
        options += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    timing = perf.parse_args(options)
    os.makedirs(args.output_dir, exist_ok=True)
    data_dir, dev, notes = perf.find_sentences(timing)
    models = {name: checkpoints.open_graph(path, f"--{name}").prefix for name, path in given.items() if path}
    models.update({"pruned_full": models.pop("full_graph")} if models else {})
    for name in perf_models.complete(timing, models, ("pruned", "both", "pruned_full"), dev.examples):
        notes.append(f"random weights: {name}")
    prefixes = {"cls": models["pruned"], "full": models["pruned_full"]}
    tokenizer = tokenization.load_tokenizer(os.path.dirname(models["pruned"]))
    calibration = batching.convert(dev.examples[-CALIBRATION:], tokenizer, timing.max_seq_length)

    shared = {"tokenizer": os.path.dirname(models["pruned"]), "fast_tokenizer": [True], "latency": 0}

    def specification(kind, path, streams, precision):
        return perf.specification(timing, path, precision, "cpu", data_dir, engine=kind, streams=streams, **shared)

    streams = engine.default_streams("cpu")
    specs = {"PP-MiniLM + pruning + quantization": specification("paddle", models["both"], streams, "int8")}
    for graph, prefix in prefixes.items():
        directory = os.path.join(timing.output_dir, "peers", graph)
        convert(prefix, directory, calibration)
        shape = {"cls": "same graph", "full": "usual export"}[graph]
        for title, kind, suffix, precision in THEIRS:
            path = os.path.join(directory, f"model.int8.{suffix}")
            specs[f"{title}, {shape}"] = specification(kind, path, streams, precision)
    ours = os.path.join(timing.output_dir, "peers", "ours")
    convert_ours(models["both"], ours)
    for title, kind, precision in OURS:
        specs[title] = specification(kind, os.path.join(ours, "model.onnx"), streams, precision)
    rounds = perf.run_rounds(specs, timing.rounds, timing.sentences)
    rows = []
    print("engine | sentences/s | ours is faster by | median, range of the rounds\n--- | --- | --- | ---")
    for name in specs:
        own = perf.summary(name, rounds, name, baseline_fast=True)
        ours = perf.summary("PP-MiniLM + pruning + quantization", rounds, name, baseline_fast=True)
        rate, (low, high) = own["sentences_per_second"], ours["range"]
        faster = {key: ours[key] for key in ("speedup", "median", "range")}
        rows.append({"row": name, "sentences_per_second": rate, **faster})
        print(f"{name} | {rate:.0f} | {ours['speedup']:.2f}x | {ours['median']:.2f}, {low:.2f}-{high:.2f}")
    machine = records.describe_machine()
    sentences = f"{timing.rounds} rounds of {timing.sentences} TNEWS dev sentences, batch {timing.batch_size}"
    notes.append(f"{sentences}; {machine['cpu']}, {machine['cores']} cores")
    print("\n".join(["", *(f"- {note}" for note in notes)]))
    versions = {**records.describe_versions(), **package_versions()}
    result = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine, "notes": notes, "rows": rows}
    files.write_json(
        os.path.join(timing.output_dir, "peers.json"), {**result, "data": dev.describe(), "versions": versions}
    )


if __name__ == "__main__":
    cli.run(main)
