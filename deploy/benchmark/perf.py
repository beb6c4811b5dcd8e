"""Measures the speed table: BERT-base, PP-MiniLM, pruned, quantized, pruned and quantized, end to end on TNEWS dev.

Each measurement runs in its own process (measure.py), which loads, prepares and runs one model. A round runs all models
on the same sentences; the next round uses other sentences. The baseline is BERT-base in FP32 in a plain loop: batches
in file order, Python tokenizer. Missing models are built with random weights, which does not affect the speed.
Writes perf.json (for summarize.py --perf) and perf.png to --output_dir.

    bash ../python/infer_perf.sh               # about half an hour; SHORT=1 takes about two minutes
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple, Optional

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
import data
import numpy as np
import perf_models
from common import ROOT, UserError, cli, engine, files, objectives, plots, records
from tqdm import tqdm

OUTPUT = os.path.join(ROOT, "deploy", "python", "perf")  # beside infer_perf.sh
# Minimum seconds per measurement: shorter passes are repeated up to this total, and their mean is reported.
LEAST_SECONDS = 4


class Row(NamedTuple):
    title: str
    model: str
    precision: str
    name: str  # in perf.json; equal to the name in summarize.py's CLUE table, if the row is there
    published: str = ""  # speed-up on a T4 with TensorRT: with the fast tokenizer (without it)
    plain: bool = False
    streams: Optional[int] = None


CPU_ROWS = (  # the first one is the baseline
    Row("BERT-base, plain loop", "bert", "fp32", "BERT-base", "1.00x", plain=True),
    Row("BERT-base, sorted by length", "bert", "fp32", "BERT-base, sorted by length", streams=1),
    Row("PP-MiniLM", "finetuned", "fp32", "fine-tuned", "2.15x (1.90x)"),
    Row("PP-MiniLM, BF16", "finetuned", "bf16", "fine-tuned, BF16"),
    Row("PP-MiniLM + pruning", "pruned", "fp32", "pruned to 0.75", "2.74x (2.48x)"),
    Row("PP-MiniLM + pruning, BF16", "pruned", "bf16", "pruned to 0.75, BF16"),
    Row("PP-MiniLM + quantization", "quantized", "int8", "quantized", "7.34x (4.63x)"),
    Row("PP-MiniLM + pruning + quantization", "both", "int8", "pruned to 0.75 + quantized", "8.88x (5.36x)"),
)
GPU_ROWS = tuple(
    row._replace(precision=row.precision.replace("bf16", "fp16"), title=row.title.replace("BF16", "FP16"))
    for row in CPU_ROWS
)
# The optimizations of the last row, added one by one. Each row is timed with the fast and the Python tokenizer.
EFFECT_ROWS = (
    Row("plain loop, usual export", "both_full", "int8", "plain loop", plain=True),
    Row("+ sorted by length in windows", "both_full", "int8", "sorted", streams=1),
    Row("+ last layer for [CLS] alone", "both", "int8", "[CLS] alone", streams=1),
    Row("+ streams", "both", "int8", "streams"),
)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    models = parser.add_argument_group("models: file prefix or directory of an export; default: found, else random")
    for name, help in {
        "bert": "BERT-base, fine-tuned and exported with --cls_only False",
        "finetuned": "fine-tuned; default: the best TNEWS cell of finetuning/ppminilm-6l-768h",
        "pruned": "pruned; default: pruning/pruned_models/TNEWS/0.75/sub_static",
        "quantized": "quantized; default: the best of quantization/tnews_finetuned_quant_models",
        "both": "pruned and quantized; default: the best of quantization/tnews_quant_models",
        "vocab_file": "vocabulary of random models; default: that of the models found, else a generated one",
    }.items():
        models.add_argument(f"--{name}", type=cli.PathArgument, help=help)
    models.add_argument("--random", action="store_true", help="use random weights for all models not given here")
    timing = parser.add_argument_group("timing")
    help = "quick run: one round of 640 sentences, without BF16 and the sorted BERT-base"
    timing.add_argument("--short", action="store_true", help=help)
    timing.add_argument("--rounds", type=int, positive=True, help="rounds, each on its own part of dev (default: 5)")
    help = "sentences per round (default: 1000; 2000 x 5 rounds cover all of TNEWS dev)"
    timing.add_argument("--sentences", type=int, positive=True, help=help)
    timing.add_argument("--perf_warmup_steps", type=int, default=20, help="minimum number of untimed batches")
    timing.add_argument("--batch_size", type=int, default=32, positive=True, help="sentences per batch")
    timing.add_argument("--max_seq_length", type=int, default=128, positive=True, help="maximum tokens per text")
    engine.add_cpu_arguments(timing)
    help = "measure the optimizations from a plain loop to the last row one by one"
    timing.add_argument("--effects", action="store_true", help=help)
    timing.add_argument("--check", action="store_true", help="also compare predictions with those of a plain loop")
    other = parser.add_argument_group("other")
    cli.add_device_argument(other)
    help = "directory with TNEWS; default: $CLUE_DATA_DIR, else downloaded, else generated"
    other.add_argument("--data_dir", type=cli.PathArgument, help=help)
    help = "directory for results and generated models"
    other.add_argument("--output_dir", type=cli.PathArgument, default=OUTPUT, help=help)
    args = parser.parse_args(argv)
    engine.check_streams(args.streams, args.threads)
    if args.effects and any(getattr(args, name) for name in perf_models.MODELS):
        parser.error("--effects compares graphs of one model, which it builds itself; give no model")
    args.rounds = args.rounds or (1 if args.short else 5)
    args.sentences = args.sentences or (640 if args.short else 1000)
    return args


def run_round(specs, number, sentences, bar):
    """{name: output of measure.py} of one round. The order alternates, so that a drift favours no row."""
    results = {}
    for name in list(specs)[:: -1 if number % 2 else 1]:
        spec = {**specs[name], "start": number * sentences, "stop": (number + 1) * sentences}
        spec["latency"] = spec["latency"] if number == 0 else 0
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            json.dump(spec, file)
            file.flush()
            bar.set_description(f"round {number + 1}, {name}")
            done = subprocess.run([sys.executable, os.path.join(HERE, "measure.py"), file.name], stdout=subprocess.PIPE)
        if done.returncode:
            why = f"status {done.returncode} (-9: killed, usually because memory ran out)"
            raise UserError(f"measuring {name} failed with {why}")
        results[name] = json.loads(done.stdout.splitlines()[-1])
        bar.update()
    return results


def run_rounds(specs, rounds, sentences):
    """List of the results of run_round for all rounds. Shows a progress bar."""
    with tqdm(total=rounds * len(specs), file=sys.stderr) as bar:
        return [run_round(specs, number, sentences, bar) for number in range(rounds)]


def specification(args, prefix, precision, device, data_dir, plain=False, streams=None, **others):
    """The specification of one measurement, which measure.py reads as JSON."""
    streams = 1 if plain else streams or args.streams or engine.default_streams(device, args.threads)
    common = {name: getattr(args, name) for name in ("threads", "batch_size", "check", "max_seq_length")}
    common.update(task="TNEWS", labels=data.get_task("TNEWS").labels, data_dir=data_dir, fast_tokenizer=[True, False])
    common.update(engine="paddle", warmup_steps=args.perf_warmup_steps, least_seconds=LEAST_SECONDS)
    common["latency"] = 8 if args.short else 200
    row = {"prefix": prefix, "tokenizer": os.path.dirname(prefix), "precision": precision, "device": device}
    return {**common, **row, "streams": streams, "plain": plain, **others}


def find_sentences(args):
    """(data_dir, Split of TNEWS dev, [note]); lowers args.sentences if dev is too small. Raises: UserError."""
    data_dir, dev, note = perf_models.find_sentences(args)
    notes = [note] if note else []
    if len(dev.examples) < args.rounds * args.sentences:
        args.sentences = len(dev.examples) // args.rounds
        notes.append(f"only {len(dev.examples)} dev records")
    if not args.sentences:
        raise UserError(f"--rounds {args.rounds}: TNEWS dev has {len(dev.examples)} records, but each round needs one")
    return data_dir, dev, notes


def seconds_of(result, fast):
    return next(one["seconds"] for one in result["passes"] if one["fast_tokenizer"] is fast)


def summary(name, rounds, baseline, fast=True, baseline_fast=False):
    """Speed-up of a row over ``baseline`` (mean, median and range over the rounds), and its throughput."""
    own = np.array([seconds_of(r[name], fast) for r in rounds])
    other = np.array([seconds_of(r[baseline], baseline_fast) for r in rounds])
    ratios = other / own
    total = own.sum()
    return {
        "speedup": round(float(other.mean() / own.mean()), 3),
        "median": round(float(np.median(ratios)), 3),
        "range": [round(float(ratios.min()), 3), round(float(ratios.max()), 3)],
        "sentences_per_second": round(sum(r[name]["sentences"] for r in rounds) / total, 1),
        "tokens_per_second": round(sum(r[name]["tokens"] for r in rounds) / total, 1),
    }


def agreement(name, rounds):
    """Accuracy of a row, and with --check how its predictions differ from those of a plain loop."""
    logits = np.concatenate([r[name]["logits"] for r in rounds])
    labels = np.concatenate([r[name]["labels"] for r in rounds])
    tnews = objectives.Classification()
    result = {"accuracy": tnews.metrics(logits, labels)["accuracy"]}
    if "plain_logits" in rounds[0][name]:
        plain = np.concatenate([r[name]["plain_logits"] for r in rounds])
        flipped = logits.argmax(-1) != plain.argmax(-1)
        best = np.sort(plain, -1)
        margins = (best[:, -1] - best[:, -2])[flipped]
        result.update(flips=int(flipped.sum()), largest_margin=round(float(margins.max(initial=0)), 6))
        result["plain_accuracy"] = tnews.metrics(plain, labels)["accuracy"]
    return result


def report(rows, rounds):
    """The rows of perf.json."""
    described = []
    for row in rows:
        first, every = rounds[0][row.name], [r[row.name] for r in rounds]
        slow = summary(row.name, rounds, rows[0].name, fast=False)
        both = len(first["passes"]) == 2
        fast = summary(row.name, rounds, rows[0].name) if both else slow
        shown = {"row": row.name, "title": row.title, "precision": row.precision, "published": row.published, **fast}
        shown.update(fast_tokenizer=both, python_tokenizer=slow, latency_ms=first["latency"], shapes=first["shapes"])
        shown["peak_memory"] = max(r["peak_memory"] for r in every)
        for name in ("load_seconds", "prepare_seconds"):
            shown[name] = round(float(np.median([r[name] for r in every])), 2)
        described.append({**shown, **agreement(row.name, rounds)})
    return described


def table(found, trained):
    """Lines of the table, with the columns of the published one; Markdown without leading bars."""
    columns = "model | speed-up, fast tokenizer (Python's) | median, range | published | sentences/s | tokens/s | "
    columns += "p50, p99 at batch 1, ms | peak memory, MB | load + prepare, s | accuracy"
    lines = [columns, " | ".join(["---"] * 10)]
    for row in found:
        slow = row["python_tokenizer"]
        accuracy = f"{100 * row['accuracy']:.2f}" if trained[row["row"]] else "random weights"
        if "flips" in row:
            accuracy += f", {row['flips']} flips (margin {row['largest_margin']:.4f})"
        fast = f"{row['speedup']:.2f}x " if row["fast_tokenizer"] else ""
        low, high = row["range"]
        cells = [row["title"], f"{fast}({slow['speedup']:.2f}x)", f"{row['median']:.2f}, {low:.2f}-{high:.2f}"]
        cells += [row["published"], f"{row['sentences_per_second']:.0f}", f"{row['tokens_per_second']:.0f}"]
        cells += ["{:.1f}, {:.1f}".format(*row["latency_ms"]), f"{row['peak_memory'] / 1e6:.0f}"]
        cells += [f"{row['load_seconds']:.1f} + {row['prepare_seconds']:.1f}", accuracy]
        lines.append(" | ".join(cells))
    return lines


def draw(path, found, baseline, machine):
    """Draws the speed-ups as a bar chart."""
    pyplot = plots.import_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(found) + 1.4))
    titles = [row["title"] for row in found][::-1]
    for shift, label, values in (
        (0.2, "fast tokenizer", [row["speedup"] if row["fast_tokenizer"] else np.nan for row in found][::-1]),
        (-0.2, "Python's tokenizer", [row["python_tokenizer"]["speedup"] for row in found][::-1]),
    ):
        bars = axes.barh(np.arange(len(titles)) + shift, values, height=0.38, label=label)
        labels = ["" if np.isnan(value) else f"{value:.2f}x" for value in values]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_yticks(np.arange(len(titles)), titles)
    axes.set_xlabel(f"speed-up over {baseline}; {machine['cpu']}, {machine['cores']} cores")
    axes.margins(x=0.12)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv=None):
    args = parse_args(argv)
    device = cli.set_device(args.device)
    rows = CPU_ROWS if device == "cpu" else GPU_ROWS
    if args.effects:
        rows = EFFECT_ROWS
    # Without AVX512, the engine would fall back to FP32.
    no_bf16 = device == "cpu" and "avx512f" not in records.describe_machine()["flags"]
    rows = [row for row in rows if not (args.short or no_bf16) or "16" not in row.precision]
    rows = [row for row in rows if not args.short or row.plain or row.model != "bert"]
    models = {} if args.effects else perf_models.find_models(args)
    for row in rows:
        if row.model in models:
            perf_models.check_model(row.model, models[row.model], row.precision, device, args.max_seq_length)
    os.makedirs(args.output_dir, exist_ok=True)
    data_dir, dev, notes = find_sentences(args)
    precisions = dict.fromkeys(row.precision for row in rows) if device == "cpu" else {}
    notes += [line for line in map(engine.preflight, precisions) if line]
    missing = perf_models.complete(args, models, dict.fromkeys(row.model for row in rows), dev.examples, device)
    if missing:
        notes.append(f"random weights: {', '.join(missing)} (speed does not depend on them, accuracy means nothing)")
    specs = {
        row.name: specification(args, models[row.model], row.precision, device, data_dir, row.plain, row.streams)
        for row in rows
    }
    if args.short:
        specs[rows[0].name]["fast_tokenizer"] = [False]  # the baseline uses the Python tokenizer only
    started, name = time.time(), "effects" if args.effects else "perf"
    rounds = run_rounds(specs, args.rounds, args.sentences)
    machine, measured = records.describe_machine(), report(rows, rounds)
    lines = table(measured, {row.name: row.model not in missing for row in rows})
    sentences = f"{args.rounds} rounds of {args.sentences} TNEWS dev sentences"
    settings = f"batch {args.batch_size}, maximum length {args.max_seq_length}"
    notes.append(f"{sentences}, {settings}, on {device}: {machine['cpu']}, {machine['cores']} cores")
    print("\n".join([*lines, "", *(f"- {note}" for note in notes)]))
    result = {"date": time.strftime("%Y-%m-%d", time.gmtime(started)), "machine": machine, "notes": notes}
    result.update(
        versions=records.describe_versions(), arguments=cli.describe(args), data=dev.describe(), rows=measured
    )
    files.write_json(os.path.join(args.output_dir, f"{name}.json"), result)
    draw(os.path.join(args.output_dir, f"{name}.png"), measured, rows[0].title, machine)
    return measured


if __name__ == "__main__":
    cli.run(main)
