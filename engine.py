"""Paddle Inference for the exported graphs: on CPU with oneDNN (FP32, BF16, INT8), on GPU with or without TensorRT.

Exports are checked with it, quantized models are scored with it, deploy/python serves with it: so what is measured is
what will run. The GPU branches are written against Paddle's documentation and are not exercised by CI.
"""

import collections
import concurrent.futures
import os
import threading

import compat  # noqa: F401  before Paddle

import data
import records
import utils
from utils import UserError

# The operators that oneDNN computes in INT8. Its default list also takes the attention products, whose output range a
# padded calibration batch stretches to the mask's -1e4: fast, and ten points wrong (tests/test_quantization.py).
INT8_OPERATORS = {"fc", "elementwise_add"}

# Batches whose texts are sorted by length together: of TNEWS, 3 % padding are left, and 58 % if none are sorted.
WINDOW = 64


def is_quantized(prefix):
    """Whether the graph ``prefix``.pdmodel holds quantization operators."""
    with open(f"{prefix}.pdmodel", "rb") as file:
        graph = file.read()
    return b"quantize_linear" in graph or b"fake_quantize" in graph


def default_precision(prefix):
    """What a CPU computes a graph in unless told otherwise: int8 if it is quantized, else fp32."""
    return "int8" if is_quantized(prefix) else "fp32"


def find_prefix(path, option="--model_path"):
    """The file prefix that a user means by a prefix, a .pdmodel file, or a directory with one graph in it.

    Raises: UserError if there is no graph with its parameters.
    """
    prefix = path[: -len(".pdmodel")] if path.endswith(".pdmodel") else path
    if os.path.isdir(path):
        graphs = [name for name in sorted(os.listdir(path)) if name.endswith(".pdmodel")]
        if len(graphs) != 1:
            raise UserError(f"{option} {path}: a directory with {len(graphs)} graphs (*.pdmodel), one is needed")
        prefix = os.path.join(path, graphs[0][: -len(".pdmodel")])
    for suffix in (".pdmodel", ".pdiparams"):
        if not os.path.isfile(prefix + suffix):
            raise UserError(f"{option} {path}: no {prefix}{suffix}")
    return prefix


def check_precision(prefix, device, precision):
    """Raises: UserError for a precision that the device or the file cannot give."""
    quantized = is_quantized(prefix)
    if quantized and precision != "int8":
        raise UserError(
            f"{prefix}: a quantized model, which runs in int8 (in {precision} the engine would simulate it in "
            "floating point, several times slower than FP32)"
        )
    if precision == "int8" and not quantized:
        raise UserError(
            f"{prefix}: not a quantized model, so int8 cannot be had; quantize it first (quantization/quant_post.py)"
        )
    if precision == "bf16" and device != "cpu":
        raise UserError("--precision bf16 is for --device cpu; on a GPU use fp16")
    if precision == "fp16" and device == "cpu":
        raise UserError("--precision fp16 is for a GPU; on a CPU use bf16")


def preflight(precision):
    """What this CPU has for ``precision`` and what to expect without it: one line, or None if all is said."""
    flags = records.describe_machine()["flags"]
    if precision == "int8":
        if "amx_int8" in flags or "avx512_vnni" in flags or "avx_vnni" in flags:
            return f"INT8: this CPU has {'AMX' if 'amx_int8' in flags else 'VNNI'}, full speed"
        return (
            "INT8: this CPU has no VNNI: little or no gain over FP32, and sums may saturate and give wrong answers; "
            "compare the accuracy with FP32 before you trust it"
        )
    if precision == "bf16":
        if "amx_bf16" in flags or "avx512_bf16" in flags:
            return f"BF16: this CPU has {'AMX' if 'amx_bf16' in flags else 'AVX512-BF16'}, full speed"
        if "avx512f" in flags:
            return "BF16: this CPU has AVX512 but no BF16 instructions: oneDNN emulates them, slower than FP32"
        return "BF16: this CPU has no AVX512: the engine stays with FP32"
    return None


class Streams:
    """Runs batches on several runners side by side, each with a thread of its own, as oneDNN keeps what it prepared
    for the thread that ran it.

    Args: runners: objects with ``run(batch)``, which gives the logits of a data.Batch, float32 [batch_size, classes].
    """

    def __init__(self, runners):
        self.streams, self.runners = len(runners), runners
        self.of_thread = of_thread = threading.local()
        waiting = list(runners)
        self.pool = concurrent.futures.ThreadPoolExecutor(
            len(runners), initializer=lambda: setattr(of_thread, "runner", waiting.pop())
        )

    def run(self, batch):
        """Logits of a data.Batch, float32 [batch_size, classes], computed in the calling thread."""
        return getattr(self.of_thread, "runner", self.runners[0]).run(batch)

    def run_all(self, batches):
        """Yields (batch, logits) for each data.Batch, in order; up to a window of them is prepared ahead."""
        ahead = collections.deque()
        try:
            for batch in batches:
                ahead.append((batch, self.pool.submit(self.run, batch)))
                while ahead and (ahead[0][1].done() or len(ahead) > WINDOW):
                    done, future = ahead.popleft()
                    yield done, future.result()
            while ahead:
                done, future = ahead.popleft()
                yield done, future.result()
        finally:  # after an error, or when the caller stops: nobody waits for these
            for _, future in ahead:
                future.cancel()

    def prepare(self, batches):
        """Runs each batch once in every stream, so that its shape is known to all of them."""
        together = threading.Barrier(self.streams)

        def once(batch):
            together.wait()  # so that no stream takes two
            self.run(batch)

        try:
            for batch in batches:
                for future in [self.pool.submit(once, batch) for _ in range(self.streams)]:
                    future.result()
        finally:
            together.abort()  # an interrupt may have left a stream waiting for the others

    def predict(self, features, batch_size=32, pad_id=0):
        """Logits of features, float32 [n, classes], in their order; computed in order of length to save padding."""
        longest = max(len(feature.input_ids) for feature in features)
        batches = data.batches(features, batch_size, pad_id, longest_first(features), longest)
        return data.gather(self.run_all(batches), len(features))

    def classify(self, examples, tokenizer, max_seq_length, batch_size=32):
        """As predict, for data.Example: tokenizes window by window, while the one before is computed."""
        return data.gather(self.run_all(window_batches(examples, tokenizer, max_seq_length, batch_size)), len(examples))


class Engine(Streams):
    """Paddle Inference for one exported graph.

    Args:
        prefix: path without ``.pdmodel``.
        device: ``cpu``, ``gpu`` or ``gpu:N``.
        precision: ``fp32``, ``bf16`` (CPU), ``fp16`` (GPU, TensorRT), ``int8`` (quantized graphs only).
        threads: of the CPU, in all; default: all cores.
        streams: batches that are computed side by side, each on its share of the threads.
        use_trt: TensorRT, on a GPU; ``shape_file`` then holds the ranges that ``collect`` recorded.
        collect: record the shape ranges of what is run to ``shape_file`` instead of optimizing.
        int8_operators: what oneDNN computes in INT8; an empty set leaves it to oneDNN (see INT8_OPERATORS).
        optimized_dir: directory for ``_optimized.pdmodel``, the graph as the engine runs it.
    """

    def __init__(
        self,
        prefix,
        device="cpu",
        precision="fp32",
        threads=None,
        use_trt=False,
        shape_file=None,
        collect=False,
        int8_operators=INT8_OPERATORS,
        streams=1,
        optimized_dir=None,
    ):
        from paddle import inference

        self.prefix = prefix = find_prefix(prefix)
        check_precision(prefix, device, precision)
        config = inference.Config(f"{prefix}.pdmodel", f"{prefix}.pdiparams")
        config.disable_glog_info()
        config.enable_memory_optim()
        if optimized_dir:
            config.enable_save_optim_model(True)
            config.set_optim_cache_dir(optimized_dir)
        if device == "cpu":
            config.disable_gpu()
            config.enable_mkldnn()
            # oneDNN prepares its operators, and a copy of their weights, for every shape: keep those that come again.
            config.set_mkldnn_cache_capacity(64)
            config.set_cpu_math_library_num_threads(max(1, thread_count(threads) // streams))
            if precision == "bf16":
                config.enable_mkldnn_bfloat16()
            elif precision == "int8":
                config.enable_mkldnn_int8(int8_operators) if int8_operators else config.enable_mkldnn_int8()
        else:
            config.enable_use_gpu(256, int(device.partition(":")[2] or 0))
            if collect:
                config.collect_shape_range_info(shape_file)
            elif use_trt:
                kinds = {
                    "fp32": inference.PrecisionType.Float32,
                    "fp16": inference.PrecisionType.Half,
                    "int8": inference.PrecisionType.Int8,
                }
                config.enable_tensorrt_engine(
                    workspace_size=1 << 30,
                    max_batch_size=32,
                    min_subgraph_size=5,
                    precision_mode=kinds[precision],
                    use_static=False,
                    use_calib_mode=False,
                )
                # The graph's tensor names change with every export, so ranges are collected and never written down.
                config.enable_tuned_tensorrt_dynamic_shape(shape_file, True)
        with utils.quiet():
            first = inference.create_predictor(config)
            # A clone shares the parameters.
            predictors = [first, *(first.clone() for _ in range(streams - 1))]
        super().__init__([Handles(predictor) for predictor in predictors])


class Handles:
    """A predictor and its inputs and output."""

    def __init__(self, predictor):
        self.predictor = predictor
        self.inputs = [predictor.get_input_handle(name) for name in predictor.get_input_names()]
        self.output = predictor.get_output_handle(predictor.get_output_names()[0])

    def run(self, batch):
        for handle, array in zip(self.inputs, (batch.input_ids, batch.token_type_ids)):
            handle.copy_from_cpu(array)
        self.predictor.run()
        return self.output.copy_to_cpu()


def longest_first(features):
    """An order by length that leaves the shortest batches for the end, when a stream may wait for the other."""
    return data.by_length(features)[::-1]


def window_batches(examples, tokenizer, max_seq_length, batch_size):
    """Yields the data.Batch of examples, tokenized and sorted by length window by window; ``index`` counts examples."""
    for start in range(0, len(examples), WINDOW * batch_size):
        features = data.convert(examples[start : start + WINDOW * batch_size], tokenizer, max_seq_length)
        order = longest_first(features)
        for batch in data.batches(features, batch_size, tokenizer.pad_id, order, max_seq_length):
            yield batch._replace(index=batch.index + start)


def thread_count(threads=None):
    """``threads``, or the cores that this process may use."""
    return threads or len(os.sched_getaffinity(0))


def default_streams(device, threads=None):
    """One for each thread of a CPU, up to four that share them evenly; each needs a copy of what oneDNN prepared."""
    return max(n for n in (1, 2, 3, 4) if thread_count(threads) % n == 0) if device == "cpu" else 1


def check_streams(streams, threads=None):
    """Raises: UserError for more streams than threads."""
    if streams and streams > thread_count(threads):
        raise UserError(f"--streams {streams}: at most {thread_count(threads)}, one for each thread")


def needs_trt(device, precision, use_trt):
    """Whether TensorRT is used: on a GPU if asked for, and for what only it computes there."""
    return device != "cpu" and (use_trt or precision in ("int8", "fp16"))


def open_engine(
    prefix, features, device="cpu", precision="fp32", threads=None, use_trt=False, batch_size=32, pad_id=0, streams=1
):
    """An Engine; for TensorRT the shape ranges of ``features`` are collected first, unless they were before."""
    shape_file, use_trt = f"{prefix}.shape_ranges.pbtxt", needs_trt(device, precision, use_trt)
    if use_trt and not os.path.isfile(shape_file):
        collect_shapes(prefix, features, shape_file, batch_size, pad_id)
    return Engine(prefix, device, precision, threads, use_trt, shape_file, streams=streams)


def collect_shapes(prefix, features, shape_file, batch_size=32, pad_id=0):
    """Records minimum, maximum and most frequent shapes for TensorRT by running ``features`` once on the GPU."""
    precision = default_precision(prefix)
    collector = Engine(prefix, "gpu", precision, shape_file=shape_file, collect=True)
    for batch in data.batches(features, batch_size, pad_id, data.by_length(features)):
        collector.run(batch)
    del collector  # the file is written when the predictor goes


def static_prefix(directory, record):
    """The file prefix of the FP32 graph that a fine-tuned export or a pruned export holds; its files are checked."""
    files = records.exported(record)
    names = [name[: -len(".pdmodel")] for name in files if name.endswith(".pdmodel")]
    if not names:
        raise UserError(f"{directory}: not exported; run export_model.py (fine-tuned) or export.sh (pruned) first")
    records.check_files(directory, record, files)
    return os.path.join(directory, names[0])


def open_exported(prefix):
    """What lies beside an exported or quantized graph: its stage record. Raises: UserError if it is incomplete."""
    directory, name = os.path.split(os.path.abspath(prefix))
    record = records.read_record(directory, "an export or a quantized model")
    weights = record["weights"] if record["stage"] == "quantize" else records.exported(record)
    if f"{name}.pdiparams" not in weights:
        raise UserError(
            f"{prefix}: {os.path.join(directory, records.RECORD)} does not name these files; export them again"
        )
    records.check_files(directory, record, weights)
    return record
