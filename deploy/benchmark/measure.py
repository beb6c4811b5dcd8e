"""Measures one exported model in this process: load, end-to-end passes over dev, latency, memory. perf.py starts it.

python measure.py SPECIFICATION.json        # prints one JSON object; perf.py writes the specification
"""

import json
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import data
import numpy as np
from common import batching, cli, engine, files, records, tokenization

LEAST_SECONDS = 0.4  # of a run of infer.py --perf


def file_order(examples, tokenizer, max_seq_length, batch_size):
    """Yields the batches of a plain loop: examples in file order, each batch padded to its longest example."""
    for start in range(0, len(examples), batch_size):
        features = batching.convert(examples[start : start + batch_size], tokenizer, max_seq_length)
        batch = batching.collate(features, range(len(features)), tokenizer.pad_id)
        yield batch._replace(index=batch.index + start)


def plain(runner, examples, tokenizer, max_seq_length, batch_size):
    """Logits of examples, computed by a plain loop: tokenize a batch, run it, take the next."""
    batches = file_order(examples, tokenizer, max_seq_length, batch_size)
    return batching.gather(((batch, runner.run(batch)) for batch in batches), len(examples))


def warm_up(runner, tokenizer, examples, max_seq_length, batch_size, steps, batches=engine.window_batches):
    """Runs one batch of every shape of a pass, and at least ``steps`` batches. Returns: the number of shapes."""
    upcoming = list(batches(examples, tokenizer, max_seq_length, batch_size))
    shapes = {batch.input_ids.shape: batch for batch in upcoming}
    more = (upcoming * steps)[: max(0, steps - len(shapes))]
    if batches is file_order:
        for batch in [*shapes.values(), *more]:
            runner.run(batch)
    else:
        runner.prepare(shapes.values())
        for _ in runner.run_all(more):
            pass
    return len(shapes)


def latency(runner, tokenizer, examples, max_seq_length):
    """[p50, p99] latency in milliseconds of single texts, including tokenization. Every length is warmed up first."""
    rows = [batching.convert([example], tokenizer, max_seq_length) for example in examples]
    longest = max(len(row[0].input_ids) for row in rows)

    def alone(row):
        return batching.collate(row, [0], tokenizer.pad_id, batching.round_up(len(row[0].input_ids), longest))

    for batch in {alone(row).input_ids.shape: alone(row) for row in rows}.values():
        runner.run(batch)
    milliseconds = []
    for example in examples:
        started = time.perf_counter()
        runner.run(alone(batching.convert([example], tokenizer, max_seq_length)))
        milliseconds.append(1000 * (time.perf_counter() - started))
    return [round(float(p), 3) for p in np.percentile(milliseconds, (50, 99))]


def time_models(args, models, examples):
    """For infer.py --perf: times one model after the other; writes their figures to --perf_json, if that is given.

    Args: models: infer.Model of one task.
    """
    rows = [time_runs(args, model, examples) for model in models]
    if args.perf_json:
        files.write_json(args.perf_json, {"machine": records.describe_machine(), "device": args.device, "rows": rows})


def time_runs(args, model, examples, runs=5):
    """Prints the end-to-end time of all examples, per run and on average, and of single texts. A run repeats its pass
    over examples that are few: one of some milliseconds would measure the clock and what else the machine does.

    Returns: the same figures. ``weights``, the hash of the parameter file, tells summarize.py which model they are of.
    """
    features, length = model.convert(examples), model.max_seq_length
    runner = model.open_engine(features)
    warm_up(runner, model.tokenizer, examples, length, args.batch_size, args.perf_warmup_steps)
    seconds = []
    for number in range(1, runs + 1):
        passes, started = 0, time.perf_counter()
        while passes == 0 or time.perf_counter() - started < LEAST_SECONDS:
            runner.classify(examples, model.tokenizer, length, args.batch_size)
            passes += 1
        seconds.append((time.perf_counter() - started) / passes)
        print(f"run {number}: {seconds[-1]:.3f} s, {len(examples) / seconds[-1]:.1f} sentences/s", flush=True)
    middle, spread = np.median(seconds), max(seconds) - min(seconds)
    print(
        f"mean of {runs} runs: {np.mean(seconds):.3f} s, {len(examples) / np.mean(seconds):.1f} sentences/s (median "
        f"{middle:.3f} s, slowest minus fastest {spread:.3f} s), batch size {args.batch_size}, maximum length {length}"
    )
    memory = peak_memory() / 1e6
    # Single texts are fastest in one stream that uses all threads.
    p50, p99 = latency(model.open_engine(features, streams=1), model.tokenizer, examples[:200], length)
    print(f"one at a time: p50 {p50:.2f} ms, p99 {p99:.2f} ms; peak memory before that {memory:.0f} MB")
    (weights,) = records.parameter_hashes(records.graph_files(model.record))
    settings = {"precision": args.precision, "batch_size": args.batch_size, "max_seq_length": length}
    return {
        "weights": weights,
        "model": files.relative(model.graph.prefix),
        **settings,
        "sentences": len(examples),
        "seconds": [round(run, 4) for run in seconds],
        "sentences_per_second": round(len(examples) / float(np.mean(seconds)), 1),
        "latency_ms": [p50, p99],
    }


def peak_memory():
    """Peak memory of this process in bytes. getrusage would include the memory of the process that started it."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def open_runner(spec, features, pad_id):
    """Opens the engine of the specification: Paddle Inference, or another one that peers.py provides."""
    if spec["engine"] == "paddle":
        options = spec["device"], spec["precision"], spec["threads"], spec["device"] != "cpu", spec["batch_size"]
        return engine.open_engine(spec["prefix"], features, *options, pad_id, spec["streams"])
    import peers

    return peers.open_streams(spec["engine"], spec["prefix"], spec["precision"], spec["threads"], spec["streams"])


def main(argv=None):
    (path,) = sys.argv[1:] if argv is None else argv
    with open(path, encoding="utf-8") as file:
        spec = json.load(file)
    task = data.Task(spec["task"], tuple(spec["labels"]))
    examples = data.read_split(task, "dev", spec["data_dir"]).examples
    examples = examples[spec["start"] : spec["stop"]]
    size, length = spec["batch_size"], spec["max_seq_length"]
    tokenizers = {fast: tokenization.load_tokenizer(spec["tokenizer"], fast) for fast in spec["fast_tokenizer"]}
    tokenizer = tokenizers[spec["fast_tokenizer"][0]]
    features = batching.convert(examples, tokenizer, length)
    started = time.perf_counter()
    runner = open_runner(spec, features, tokenizer.pad_id)
    result = {"load_seconds": time.perf_counter() - started, "passes": []}
    result.update(sentences=len(examples), tokens=sum(len(feature.input_ids) for feature in features))
    started = time.perf_counter()
    batches = file_order if spec["plain"] else engine.window_batches
    result["shapes"] = warm_up(runner, tokenizer, examples, length, size, spec["warmup_steps"], batches)
    result["prepare_seconds"] = time.perf_counter() - started
    for fast, tokenizer in tokenizers.items():
        seconds = []
        while sum(seconds) < spec["least_seconds"]:
            started = time.perf_counter()
            if spec["plain"]:
                logits = plain(runner, examples, tokenizer, length, size)
            else:
                logits = runner.classify(examples, tokenizer, length, size)
            seconds.append(time.perf_counter() - started)
        result["passes"].append({"fast_tokenizer": fast, "seconds": float(np.mean(seconds)), "runs": len(seconds)})
    result["peak_memory"] = peak_memory()
    if spec["latency"]:  # single texts use all threads
        single = runner if spec["streams"] == 1 else open_runner({**spec, "streams": 1}, features, tokenizer.pad_id)
        result["latency"] = latency(single, tokenizers[spec["fast_tokenizer"][0]], examples[: spec["latency"]], length)
    if spec["check"]:  # a plain loop for comparison, after all measurements
        result["plain_logits"] = plain(runner, examples, tokenizer, length, size).tolist()
    result["logits"], result["labels"] = logits.tolist(), [example.label for example in examples]
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
