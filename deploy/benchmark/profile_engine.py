"""Profiles one CPU batch: the operators of the optimized graph with their precision, and oneDNN's times.

python profile_engine.py --model_path ../../quantization/tnews_quant_models/mse4 --precision int8
"""

import collections
import os
import re
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import numpy as np
from common import UserError, batching, checkpoints, cli, engine, exporting

# Operators that compute; the others only move, cast or reshape data.
COMPUTING = set(
    "fc matmul matmul_v2 fused_matmul bmm softmax layer_norm elementwise_add elementwise_mul "
    "fused_elementwise_add lookup_table_v2 gelu relu tanh".split()
)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--model_path", required=True, help="file prefix or directory of an exported graph")
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), help="default: int8 if quantized, else fp32")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences per batch", positive=True)
    parser.add_argument("--length", type=int, default=24, help="tokens per sequence; 23 on TNEWS", positive=True)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)", positive=True)
    parser.add_argument("--batches", type=int, default=30, help="timed batches; their mean is reported", positive=True)
    parser.add_argument("--timed", action="store_true", help="only run the batches; used by the child process")
    return parser.parse_args(argv)


def operators(path):
    """{(operator, precision): count} of a graph that the engine has optimized."""
    counts = collections.Counter()
    for op in exporting.read_program(path).blocks[0].ops:
        if op.type in COMPUTING:
            attributes = {attribute.name: attribute for attribute in op.attrs}
            kind = attributes["mkldnn_data_type"].s if "mkldnn_data_type" in attributes else ""
            counts[op.type.replace("fused_", ""), {"int8": "INT8", "bfloat16": "BF16"}.get(kind, "FP32")] += 1
    return counts


def primitives(log):
    """{(primitive, types, shape): [count, milliseconds]} of oneDNN's verbose log, as versions 3.0 to 3.6 write it."""
    totals = {}
    for line in log.splitlines():
        # onednn_verbose,exec,cpu,... of Paddle 2.6.2; onednn_verbose,v1,primitive,exec,cpu,... of 3.1.1
        start, executed, rest = line.partition(",exec,")
        if not start.startswith("onednn_verbose") or not executed:
            continue
        fields = rest.split(",")  # cpu, primitive, implementation, direction, memory, ..., shape, milliseconds
        types = {}
        for memory in fields[4].split():  # such as src_s8:a:blocked:ab::f0, or src:s8:a:blocked:ab::f0
            role, data_type = re.match("([a-z]+)[_:]([a-z0-9]+)", memory).groups()
            types.setdefault(role, data_type)
        row = totals.setdefault((fields[1], f"{types.get('src')} -> {types.get('dst')}", fields[-2]), [0, 0.0])
        row[0] += 1
        row[1] += float(fields[-1])
    return totals


def run_batches(args, runner):
    """Runs three warm-up batches, prints a marker line, times the batches and prints their mean in milliseconds."""
    ids = np.random.default_rng(0).integers(1, 20, (args.batch_size, args.length))
    batch = batching.Batch(ids, np.zeros_like(ids), None, None)
    for _ in range(3):
        runner.run(batch)
    print("measuring", flush=True)
    milliseconds = []
    for _ in range(args.batches):
        started = time.perf_counter()
        runner.run(batch)
        milliseconds.append(1000 * (time.perf_counter() - started))
    print(f"mean {np.mean(milliseconds)}", flush=True)


def main(argv=None):
    args = parse_args(argv)
    prefix = checkpoints.find_prefix(args.model_path)
    precision = args.precision or engine.default_precision(prefix)
    if args.timed:
        run_batches(args, engine.Engine(prefix, "cpu", precision, args.threads))
        return
    with tempfile.TemporaryDirectory() as directory:
        engine.Engine(prefix, "cpu", precision, args.threads, optimized_dir=directory)
        counts = operators(os.path.join(directory, "_optimized.pdmodel"))
    print(f"Operators of the optimized graph, {precision}:\n\noperator | INT8 | BF16 | FP32\n--- | --- | --- | ---")
    for name in sorted({name for name, _ in counts}):
        print(" | ".join([name, *(str(counts[name, kind] or "") for kind in ("INT8", "BF16", "FP32"))]))
    command = [sys.executable, os.path.abspath(__file__), "--model_path", prefix, "--precision", precision, "--timed"]
    for name in ("batch_size", "length", "threads", "batches"):
        if getattr(args, name):
            command.append(f"--{name}={getattr(args, name)}")
    done = subprocess.run(command, env={**os.environ, "ONEDNN_VERBOSE": "1"}, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [done.returncode])[-1]
        raise UserError(f"{prefix}: the timed run failed: {why}")
    log, _, tail = done.stdout.partition("measuring\n")[2].rpartition("mean ")
    totals, whole = primitives(log), float(tail)
    print(
        f"\nA batch of {args.batch_size} x {args.length} tokens, {whole:.1f} ms on average with oneDNN's log on:\n\n"
        "primitive | types | shape | per batch | ms | share\n--- | --- | --- | --- | --- | ---"
    )
    rest = whole
    for (kind, types, shape), (count, milliseconds) in sorted(totals.items(), key=lambda row: -row[1][1]):
        milliseconds /= args.batches
        rest -= milliseconds
        if milliseconds >= 0.003 * whole:
            count = round(count / args.batches)
            print(f"{kind} | {types} | {shape} | {count} | {milliseconds:.2f} | {milliseconds / whole:.1%}")
    print(f"outside oneDNN | | | | {rest:.2f} | {rest / whole:.1%}")


if __name__ == "__main__":
    cli.run(main)
