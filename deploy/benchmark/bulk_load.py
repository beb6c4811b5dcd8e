"""Load test of bulk classification (infer.py --input_file): memory over time, kills, parts, speed against --perf.

Makes a file of texts from the train records of the model's task, each rotated at a random character, and classifies it
as a whole, a tenth of it, with kills, and in parts. All outputs must be the same bytes. Then infer.py --perf and bulk
classification alternate on the same texts. Writes bulk.json and bulk.png; DIR holds the texts and answers meanwhile.

    python bulk_load.py --model ../../quantization/tnews_quant_models/mse4 --work_dir DIR
"""

import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
INFER = os.path.join(ROOT, "deploy", "python", "infer.py")
sys.path.insert(0, ROOT)
import data
import numpy as np
from common import UserError, checkpoints, cli, engine, files, plots, records


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, help="directory of an exported or quantized model")
    parser.add_argument(
        "--work_dir", required=True, help="directory for texts and answers, some GB for a million texts"
    )
    parser.add_argument("--data_dir", help="directory with the task's train.json")
    parser.add_argument("--texts", type=int, default=1_000_000, positive=True, help="texts in the file")
    parser.add_argument("--kills", type=int, default=5, help="kills of one run, at random moments")
    parser.add_argument("--parts", type=int, default=3, positive=True, help="parts of the file, one after the other")
    parser.add_argument("--speed_texts", type=int, default=100_000, positive=True, help="texts to compare --perf on")
    parser.add_argument("--rounds", type=int, default=3, positive=True, help="alternating rounds of that comparison")
    parser.add_argument("--seed", type=int, default=0, help="random seed of texts and kills")
    parser.add_argument("--output_dir", default=".", help="directory for bulk.json and bulk.png")
    return parser.parse_args(argv)


def rotated_texts(sentences, count, seed):
    """Yields ``count`` texts of one line: sentences, chosen and rotated at random, so that hardly two are the same."""
    rng = random.Random(seed)
    for _ in range(count):
        sentence = rng.choice(sentences)
        cut = rng.randrange(len(sentence))
        yield " ".join((sentence[cut:] + sentence[:cut]).split())


class Bulk:
    """infer.py --input_file as processes. Args: options: of infer.py, for the model."""

    def __init__(self, directory, options):
        self.directory, self.options = directory, options

    def path(self, name):
        return os.path.join(self.directory, name)

    def start(self, source, output, *options):
        command = [sys.executable, INFER, *self.options, "--input_file", self.path(source), *options]
        return subprocess.Popen([*command, "--output", self.path(output)], stderr=subprocess.DEVNULL)

    def run(self, source, output, *options):
        """Returns: {answers, seconds (without loading), memory: [[second, MB], ...], once a second, peak_mb}."""
        process, started, memory = self.start(source, output, *options), time.monotonic(), []
        peak = 0
        while process.poll() is None:
            try:
                with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
                    fields = dict(line.split(":", 1) for line in file)
                now, peak = (int(fields[name].split()[0]) / 1000 for name in ("VmRSS", "VmHWM"))
                memory.append([round(time.monotonic() - started, 1), round(now, 1)])
            except (KeyError, OSError):  # it is ending
                pass
            time.sleep(1)
        if process.returncode:
            raise UserError(f"infer.py ended with {process.returncode}; run it to see why: {' '.join(process.args)}")
        record = files.read_json_object(self.path(f"{output}.run.json"))
        figures = {"answers": record["done"][1], "seconds": record["seconds"]}
        return {**figures, "memory": memory, "peak_mb": round(peak, 1)}

    def kill(self, source, output, seconds):
        """Starts a run and kills it after so many seconds of work, that is, behind its first checkpoint."""
        process, record = self.start(source, output), self.path(f"{output}.run.json")
        before = os.path.getmtime(record) if os.path.exists(record) else None
        while process.poll() is None and (not os.path.exists(record) or os.path.getmtime(record) == before):
            time.sleep(0.1)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL

    def check_same(self, one, other):
        if not filecmp.cmp(self.path(one), self.path(other), shallow=False):
            raise UserError(f"{self.path(one)} and {self.path(other)} differ")


def compare_with_perf(bulk, sentences, label, args):
    """[{bulk, perf}] in texts per second, of each round: the same texts, without loading the model."""
    directory = bulk.path("speed")
    os.makedirs(directory, exist_ok=True)
    texts = list(rotated_texts(sentences, args.speed_texts, args.seed + 1))
    files.write_whole(bulk.path("speed.txt"), "".join(f"{text}\n" for text in texts))
    files.write_json_lines(os.path.join(directory, "dev.json"), [{"sentence": t, "label": label} for t in texts])
    rounds = []
    for number in range(args.rounds):
        rates = {}
        for kind in ("bulk", "perf") if number % 2 == 0 else ("perf", "bulk"):
            if kind == "bulk":
                figures = bulk.run("speed.txt", "speed.jsonl", "--overwrite")
                os.remove(bulk.path("speed.jsonl.run.json")), os.remove(bulk.path("speed.jsonl"))
                rates["bulk"] = round(figures["answers"] / figures["seconds"], 1)
            else:
                path = bulk.path("perf.json")
                command = [sys.executable, INFER, *bulk.options, "--perf", "--perf_json", path, "--data_dir", directory]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                rates["perf"] = files.read_json_object(path)["rows"][0]["sentences_per_second"]
        rounds.append(rates)
        print(f"round {number + 1}: {rates['bulk']} texts per second, --perf {rates['perf']}", flush=True)
    return rounds


def draw(path, runs):
    """Memory over time. Args: runs: {name: what Bulk.run returns}."""
    pyplot = plots.import_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for name, run in runs.items():
        axes.plot(*zip(*run["memory"]), label=name)
    axes.set(xlabel="seconds", ylabel="resident memory, MB", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(argv=None):
    args = parse_args(argv)
    graph = checkpoints.open_graph(args.model, "--model")
    task = data.task_of(graph.record)
    if graph.record["data"]["dev"].get("pairs"):
        raise UserError(f"--model {args.model}: takes sentence pairs; this test makes single texts")
    sentences = [example.text for example in data.read_split(task, "train", args.data_dir).examples]
    options = ["--model_path", args.model, "--precision", engine.default_precision(graph.prefix)]
    os.makedirs(args.work_dir, exist_ok=True)
    bulk, rng = Bulk(args.work_dir, options), random.Random(args.seed)
    for name, count in (("whole", args.texts), ("tenth", max(1, args.texts // 10))):
        with open(bulk.path(f"{name}.txt"), "w", encoding="utf-8") as file:
            file.writelines(f"{text}\n" for text in rotated_texts(sentences, count, args.seed))
    for name in os.listdir(args.work_dir):  # of an earlier test
        if ".jsonl" in name:
            os.remove(bulk.path(name))
    runs = {f"{args.texts:,} texts": bulk.run("whole.txt", "whole.jsonl")}
    runs["a tenth of them"] = bulk.run("tenth.txt", "tenth.jsonl")
    whole, tenth = runs.values()
    print(f"peak memory: {whole['peak_mb']} MB, of a tenth {tenth['peak_mb']} MB", flush=True)
    # Kills are spread over the run, each after its share of it at random.
    share, kills = whole["seconds"] / (args.kills + 1), 0
    for _ in range(args.kills):
        kills += bulk.kill("whole.txt", "killed.jsonl", rng.uniform(0, share))
    bulk.run("whole.txt", "killed.jsonl")
    bulk.check_same("whole.jsonl", "killed.jsonl")
    print(f"killed {kills} times: same bytes", flush=True)
    with open(bulk.path("joined.jsonl"), "wb") as joined:
        for number in range(1, args.parts + 1):
            bulk.run("whole.txt", f"part{number}.jsonl", "--part", f"{number}/{args.parts}")
            with open(bulk.path(f"part{number}.jsonl"), "rb") as part:
                shutil.copyfileobj(part, joined)
    bulk.check_same("whole.jsonl", "joined.jsonl")
    print(f"{args.parts} parts, joined: same bytes", flush=True)
    rounds = compare_with_perf(bulk, sentences, task.labels[0], args)
    ratios = [row["bulk"] / row["perf"] for row in rounds]
    figures = {
        "machine": records.describe_machine(),
        "model": files.relative(graph.prefix),
        "runs": runs,
        "memory_ratio": round(whole["peak_mb"] / tenth["peak_mb"], 4),
        "kills": kills,
        "parts": args.parts,
        "rounds": rounds,
        "speed_ratio": {
            "median": round(float(np.median(ratios)), 4),
            "range": [round(f(ratios), 4) for f in (min, max)],
        },
    }
    draw(os.path.join(args.output_dir, "bulk.png"), runs)
    files.write_json(os.path.join(args.output_dir, "bulk.json"), figures)
    print(json.dumps({name: figures[name] for name in ("memory_ratio", "kills", "parts", "speed_ratio")}))


if __name__ == "__main__":
    cli.run(main)
