"""Paddle Inference for the exported graphs: on CPU with oneDNN (FP32, BF16, INT8), on GPU with or without TensorRT.

Exports are checked with it, quantized models are scored with it, deploy/ serves with it: so what is measured is what
will run. The GPU branches are written against Paddle's documentation and are not exercised by CI.
"""

import collections
import concurrent.futures
import os
import sys
import threading

from common import CORES, UserError, batching, cli, records, tensorrt

# The operators that oneDNN computes in INT8: products with weights. Its default list also takes the attention products,
# whose output range a padded calibration batch stretches to the mask's -1e4: fast, and ten points wrong
# (tests/test_quantization.py). Sums in INT8 cost more conversions than they save: 4 % slower at full size, and a model
# that was trained agrees with FP32 on 98.5 instead of 98.7 % (results/README.md).
INT8_OPERATORS = {"fc"}

# Number of batches whose texts are sorted by length together. On TNEWS dev 5 % of the computed tokens are padding then,
# and 59 % without sorting (results/README.md).
WINDOW = 64


def add_cpu_arguments(group):
    group.add_argument("--threads", type=int, help="CPU threads in all (default: one per core)", positive=True)
    help = "batches that a CPU computes side by side, each on its share of the threads; each needs memory of its "
    help += "own, so lower it if memory runs out (default: the largest number up to 4 that divides the threads)"
    group.add_argument("--streams", type=int, help=help, positive=True)


def is_quantized(prefix):
    """Whether the graph ``prefix``.pdmodel holds quantization operators."""
    with open(f"{prefix}.pdmodel", "rb") as file:
        graph = file.read()
    return b"quantize_linear" in graph or b"fake_quantize" in graph


def default_precision(prefix):
    """The precision of a graph on a CPU if none is asked for: int8 if it is quantized, else fp32."""
    return "int8" if is_quantized(prefix) else "fp32"


# Precision of a quantized graph that Paddle computes in floating point, rounding to INT8 where an engine would compute
# in it: what a GPU with TensorRT is expected to answer, found out without one.
SIMULATED = "simulated int8"


def check_precision(prefix, device, precision):
    """The precision to run a graph in: the given one, or default_precision for None.

    Raises: UserError for a precision that the device or the file cannot give.
    """
    precision, quantized = precision or default_precision(prefix), is_quantized(prefix)
    if precision == SIMULATED and (not quantized or device != "cpu"):
        raise UserError(f"{prefix}: only a quantized model is simulated, on a CPU")
    if quantized and precision not in ("int8", SIMULATED):
        raise UserError(
            f"{prefix}: a quantized model, which runs in int8: add --int8 (in {precision} the engine would simulate it "
            "in floating point, several times slower than FP32)"
        )
    if precision == "int8" and not quantized:
        raise UserError(
            f"{prefix}: not a quantized model, so int8 cannot be had; quantize it first (quantization/quant_post.py)"
        )
    if precision == "bf16" and device != "cpu":
        raise UserError("--precision bf16 is for --device cpu; on a GPU use fp16")
    if precision == "fp16" and device == "cpu":
        raise UserError("--precision fp16 is for a GPU; on a CPU use bf16")
    return precision


def preflight(precision):
    """One line about what to expect of a precision on this CPU, or None (FP32, FP16)."""
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
    """Runs batches side by side on several runners. Each runner has its own thread, because oneDNN keeps what it
    prepared per thread.

    Args: runners: objects with ``run(batch)``: Batch -> logits, float32 [batch_size, classes].
    """

    def __init__(self, runners):
        self.streams, self.runners = len(runners), runners
        self.of_thread = of_thread = threading.local()
        waiting = list(runners)
        self.pool = concurrent.futures.ThreadPoolExecutor(
            len(runners), initializer=lambda: setattr(of_thread, "runner", waiting.pop())
        )

    def run(self, batch):
        """Logits of a Batch: float32 [batch_size, classes], computed in the calling thread."""
        return getattr(self.of_thread, "runner", self.runners[0]).run(batch)

    def run_all(self, batches):
        """Yields (batch, logits) for each Batch, in order; up to WINDOW batches are prepared ahead."""
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
        finally:  # after an error, or if the caller stops early: nobody waits for these
            for _, future in ahead:
                future.cancel()

    def prepare(self, batches):
        """Runs each batch once in every stream, so that all streams have prepared its shape."""
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

    def reserve(self, tokenizer, max_seq_length, batch_size=32):
        """Runs the largest batch once in every stream. What comes later then fits into the memory that this has taken;
        where shorter batches come first, each length takes memory of its own (28 lengths, 4 layers x 256 in INT8, two
        streams: 2.3 GB instead of 0.6).
        """
        longest = batching.Feature([tokenizer.cls_id] * max_seq_length, [0] * max_seq_length, None)
        self.prepare([batching.collate([longest], [0] * batch_size, tokenizer.pad_id)])

    def predict(self, features, batch_size=32, pad_id=0):
        """Logits of a list of Feature: float32 [n, classes] in their order. They are computed sorted by length."""
        longest = max(len(feature.input_ids) for feature in features)
        batches = batching.batches(features, batch_size, pad_id, longest_first(features), longest)
        return batching.gather(self.run_all(batches), len(features))

    def classify(self, examples, tokenizer, max_seq_length, batch_size=32):
        """As predict, for a list of Example: one window of texts is tokenized while the one before is computed."""
        batches = window_batches(examples, tokenizer, max_seq_length, batch_size)
        return batching.gather(self.run_all(batches), len(examples))

    def classify_windows(self, windows, tokenizer, max_seq_length, batch_size=32):
        """Yields (what, logits) of each (list of Example, what) in ``windows``, in order; None of no examples.

        While one window is computed, the next is taken from ``windows`` and tokenized: two are held at a time.
        """
        ahead = collections.deque()

        def finished():
            what, count, computed = ahead[0]
            logits = batching.gather(((batch, future.result()) for batch, future in computed), count)
            ahead.popleft()
            return what, logits

        try:
            for examples, what in windows:
                batches = window_batches(examples, tokenizer, max_seq_length, batch_size)
                ahead.append((what, len(examples), [(batch, self.pool.submit(self.run, batch)) for batch in batches]))
                if len(ahead) > 1:
                    yield finished()
            while ahead:
                yield finished()
        finally:  # as in run_all
            for _, _, computed in ahead:
                for _, future in computed:
                    future.cancel()


class FunctionRunner:
    """A runner for Streams from a function of another engine: (input_ids, token_type_ids) -> logits, as arrays."""

    def __init__(self, function):
        self.function = function

    def run(self, batch):
        return self.function(batch.input_ids, batch.token_type_ids)


class Engine(Streams):
    """Paddle Inference for one exported graph.

    Args:
        prefix: path without ``.pdmodel``.
        device: ``cpu``, ``gpu`` or ``gpu:N``.
        precision: ``fp32``, ``bf16`` (CPU), ``fp16`` (GPU, TensorRT), ``int8`` (quantized graphs only).
        threads: number of CPU threads in all (default: one per core).
        use_trt: TensorRT, on a GPU; it needs the shape ranges in ``shape_file``.
        shape_file, collect: path of the shape ranges, and whether they are to be collected there from what is run.
        int8_operators: the operators that oneDNN computes in INT8; an empty set leaves the choice to oneDNN.
        streams: number of batches that are computed side by side, each on its share of the threads.
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
        from common.compat import paddle

        check_precision(prefix, device, precision)
        self.prefix = prefix
        threads_per_stream = max(1, thread_count(threads) // streams)
        config = configuration(prefix, device, precision, threads_per_stream, int8_operators)
        if optimized_dir:
            config.enable_save_optim_model(True)
            config.set_optim_cache_dir(optimized_dir)
        if collect:
            config.collect_shape_range_info(shape_file)
        elif use_trt:
            tensorrt.configure(config, precision, shape_file)
        with cli.quiet():
            first = paddle.inference.create_predictor(config)
            # A clone shares the parameters.
            predictors = [first, *(first.clone() for _ in range(streams - 1))]
        super().__init__([Handles(predictor) for predictor in predictors])


def configuration(prefix, device="cpu", precision="fp32", threads=1, int8_operators=INT8_OPERATORS):
    """A paddle.inference.Config for the graph, without TensorRT. Args: as Engine's; threads: of one stream."""
    from common.compat import paddle

    config = paddle.inference.Config(f"{prefix}.pdmodel", f"{prefix}.pdiparams")
    config.disable_glog_info()
    config.enable_memory_optim()
    if device == "cpu":
        configure_cpu(config, precision, threads, int8_operators)
    else:
        config.enable_use_gpu(256, int(device.partition(":")[2] or 0))  # MB that it takes at once; GPU N of gpu:N
    return config


def configure_cpu(config, precision, threads, int8_operators):
    """oneDNN with so many threads. Args: config: paddle.inference.Config; the others as Engine's."""
    config.disable_gpu()
    if precision == SIMULATED:
        config.switch_ir_optim(False)  # the graph as it was written: nothing is fused, nothing computed in INT8
        config.set_cpu_math_library_num_threads(threads)
        return
    config.enable_mkldnn()
    # oneDNN prepares its operators, and a copy of their weights, for every shape: keep those that come again.
    config.set_mkldnn_cache_capacity(64)
    config.set_cpu_math_library_num_threads(threads)
    if precision == "bf16":
        config.enable_mkldnn_bfloat16()
    elif precision == "int8" and int8_operators:
        config.enable_mkldnn_int8(int8_operators)
    elif precision == "int8":
        config.enable_mkldnn_int8()


class Handles:
    """One predictor of Paddle Inference with the handles of its inputs and its output."""

    def __init__(self, predictor):
        self.predictor = predictor
        # input_ids, token_type_ids: sorted, as a graph that was exported elsewhere may have them in another order.
        self.inputs = [predictor.get_input_handle(name) for name in sorted(predictor.get_input_names())]
        self.output = predictor.get_output_handle(predictor.get_output_names()[0])

    def run(self, batch):
        for handle, array in zip(self.inputs, (batch.input_ids, batch.token_type_ids)):
            handle.copy_from_cpu(array)
        self.predictor.run()
        return self.output.copy_to_cpu()


def longest_first(features):
    """int [n]: an order by length with the shortest last, because at the end the streams wait for each other."""
    return batching.by_length(features)[::-1]


def window_batches(examples, tokenizer, max_seq_length, batch_size):
    """Yields the batches of a list of Example, tokenized and sorted by length window by window.

    The ``index`` of a Batch is the place of each row among the examples.
    """
    for start in range(0, len(examples), WINDOW * batch_size):
        features = batching.convert(examples[start : start + WINDOW * batch_size], tokenizer, max_seq_length)
        order = longest_first(features)
        for batch in batching.batches(features, batch_size, tokenizer.pad_id, order, max_seq_length):
            yield batch._replace(index=batch.index + start)


def thread_count(threads=None):
    """``threads``, or the number of cores that this process may use."""
    return threads or CORES


def default_streams(device, threads=None):
    """The largest number of streams up to four that share the CPU's threads evenly; 1 on a GPU.

    Not more than four, because each stream needs memory for its own copy of what oneDNN prepared.
    """
    if device != "cpu":
        return 1
    return max(n for n in (1, 2, 3, 4) if thread_count(threads) % n == 0)


def check_streams(streams, threads=None):
    """Raises: UserError for more streams than threads."""
    if streams and streams > thread_count(threads):
        raise UserError(f"--streams {streams}: at most {thread_count(threads)}, one for each thread")


def needs_trt(device, precision, use_trt):
    """Whether TensorRT is used: on a GPU, if asked for, and for INT8 and FP16, which only TensorRT computes there."""
    return device != "cpu" and (use_trt or precision in ("int8", "fp16"))


def open_engine(
    prefix, features, device="cpu", precision="fp32", threads=None, use_trt=False, batch_size=32, pad_id=0, streams=1
):
    """An Engine. For TensorRT the shape ranges of ``features`` are collected first, unless they lie beside the graph.

    Args: as Engine's; features, batch_size, pad_id: what the shapes are collected from. streams: None: default_streams.
    """
    streams = streams or default_streams(device, threads)
    shape_file, use_trt = tensorrt.shape_file(prefix), needs_trt(device, precision, use_trt)
    if use_trt and not os.path.isfile(shape_file):
        collect_shapes(prefix, device, features, batch_size, pad_id)
    return Engine(prefix, device, precision, threads, use_trt, shape_file, streams=streams)


def collect_shapes(prefix, device, features, batch_size=32, pad_id=0, shapes=None):
    """Records for TensorRT the smallest, largest and most frequent shape of every tensor, beside the graph.

    Runs the features once. Args: shapes: instead of them, what tensorrt.shapes_of returns.
    """
    if shapes:
        batches = tensorrt.example_batches(shapes)
    else:
        batches = batching.batches(features, batch_size, pad_id, batching.by_length(features))
    path = tensorrt.shape_file(prefix)
    collector = Engine(prefix, device, default_precision(prefix), shape_file=path, collect=True)
    for batch in batches:
        collector.run(batch)
    del collector  # the file is written when the predictor goes
    print(f"shape ranges -> {path}", file=sys.stderr)
