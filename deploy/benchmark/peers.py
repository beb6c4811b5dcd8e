"""The pruned network in INT8 against ONNX Runtime and OpenVINO: same sentences, order, batches and tokenizer.

Makes, from the same exported graph, ONNX Runtime's dynamically quantized model and OpenVINO's (NNCF, calibrated), then
times all as perf.py does. Each peer gets our graph, whose last layer is computed for [CLS] alone, and the graph as it
is usually exported. Needs packages of its own, which the pipeline does not:

    .venv/bin/python -m pip install --require-hashes -r requirements/peers.txt
    python peers.py
"""

import os
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import perf
import perf_models
from common import UserError, batching, checkpoints, cli, engine, files, records, tokenization

CALIBRATION = 300  # NNCF's own default


class _Session:
    """A compiled model of a peer behind the interface of a runner."""

    def __init__(self, infer):
        self.infer = infer

    def run(self, batch):
        return self.infer({"input_ids": batch.input_ids, "token_type_ids": batch.token_type_ids})


class OnnxRuntime(engine.Streams):
    def __init__(self, path, precision, threads, streams):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = max(1, engine.thread_count(threads) // streams)
        sessions = [
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for _ in range(streams)
        ]
        super().__init__([_Session(lambda feed, own=session: own.run(None, feed)[0]) for session in sessions])


class OpenVINO(engine.Streams):
    def __init__(self, path, precision, threads, streams):
        import openvino

        settings = {
            "NUM_STREAMS": str(streams),
            "INFERENCE_NUM_THREADS": str(engine.thread_count(threads)),
            "INFERENCE_PRECISION_HINT": precision,  # of what is not in INT8
        }
        compiled = openvino.Core().compile_model(path, "CPU", settings)
        requests = [compiled.create_infer_request() for _ in range(streams)]
        starting = threading.Lock()  # two threads that hand over inputs at once deadlock (2026.4)

        def infer(feed, request):
            with starting:
                request.start_async(feed)
            request.wait()
            return request.get_output_tensor().data.copy()

        super().__init__([_Session(lambda feed, own=request: infer(feed, own)) for request in requests])


ENGINES = {"onnxruntime": OnnxRuntime, "openvino": OpenVINO}


def convert(prefix, directory, features):
    """Writes model.int8.onnx and model.int8.xml from the FP32 graph ``prefix``, unless made from it before."""
    made = {suffix: files.file_hash(prefix + suffix) for suffix in (".pdiparams", ".pdmodel")}
    made.update(package_versions())
    perf_models.build_once(directory, made, lambda new: convert_all(prefix, os.path.join(new, "model"), features))


def package_versions():
    return {name: __import__(name).__version__ for name in ("onnxruntime", "openvino", "nncf")}


def convert_all(prefix, target, features):
    import nncf
    import onnx
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
    # Weights per head, of the [CLS]-only layer, have no scales per channel there.
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
    parser.add_argument("--pruned", help="FP32 export of the pruned model (default: all three with random weights)")
    parser.add_argument("--both", help="the same, quantized")
    parser.add_argument("--full_graph", help="the FP32 export of the same model made with --cls_only False")
    parser.add_argument("--rounds", type=int, default=5, help="each on its own part of TNEWS dev", positive=True)
    help = "per round; 2000 x 5 rounds are all of TNEWS dev"
    parser.add_argument("--sentences", type=int, default=2000, positive=True, help=help)
    parser.add_argument("--vocab_file", help="of a random model; default: a generated one")
    parser.add_argument("--data_dir", help="with TNEWS; default: $CLUE_DATA_DIR, else downloaded, else generated")
    parser.add_argument("--output_dir", default=perf.OUTPUT, help="results, and models made here")
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
        raise UserError("--pruned, --both and --full_graph are of one model: name all three, or none")
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
        for number in (1, streams):
            for kind, suffix, title, precision in (
                ("onnxruntime", "onnx", "ONNX Runtime, dynamic INT8", "int8"),
                ("openvino", "xml", "OpenVINO, NNCF INT8", "f32"),
                ("openvino", "xml", "OpenVINO, NNCF INT8, BF16 for the rest", "bf16"),
            ):
                name = f"{title}, {shape}, {number} streams"
                specs[name] = specification(kind, os.path.join(directory, f"model.int8.{suffix}"), number, precision)
    rounds = perf.run_rounds(specs, timing.rounds, timing.sentences)
    rows = []
    print("engine | sentences/s | ours is faster by | median, range of the rounds\n--- | --- | --- | ---")
    for name in specs:
        found = perf.summary(name, rounds, name, baseline_fast=True)
        ours = perf.summary("PP-MiniLM + pruning + quantization", rounds, name, baseline_fast=True)
        rate, (low, high) = found["sentences_per_second"], ours["range"]
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
