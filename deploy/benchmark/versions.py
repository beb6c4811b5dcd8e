"""Compares the speed of this environment with that of others, such as Paddle 2.6.2 with 3.1.1: the same code, models
and sentences, run by their interpreters in turn. PP-MiniLM with random weights, which do not affect the speed.

    python versions.py --other_python ../../../paddle3/.venv/bin/python

Each measurement is a process of its own: measure.py for inference, this script with --train_steps for fine-tuning.
Writes versions.json to --output_dir.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
import numpy as np
import perf
import perf_models
from common import ROOT, UserError, batching, cli, files, modeling, objectives, records, tokenization
from tqdm import tqdm

TRAINING = "fine-tuning, FP32"
# Title, model of perf_models.py, precision. The plain FP32 graph comes first.
ROWS = (
    ("PP-MiniLM, FP32", "finetuned", "fp32"),
    ("PP-MiniLM, BF16", "finetuned", "bf16"),
    ("PP-MiniLM, INT8", "quantized", "int8"),
    ("PP-MiniLM pruned to 0.75, INT8", "both", "int8"),
)
UNTIMED_STEPS = 3


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    help = "interpreters of the other environments: .venv/bin/python of other checkouts"
    parser.add_argument("--other_python", nargs="+", default=[], help=help)
    parser.add_argument("--rounds", type=int, default=5, positive=True, help="rounds, each on other sentences")
    parser.add_argument("--sentences", type=int, default=1000, positive=True, help="sentences per round")
    help = "measure this: seconds per training step of this environment, and print them as JSON"
    parser.add_argument("--train_steps", type=int, positive=True, help=help)
    parser.add_argument("--vocab_file", type=cli.PathArgument, help="vocabulary (default: a generated one)")
    help = "directory with TNEWS; default: $CLUE_DATA_DIR, else downloaded, else generated"
    parser.add_argument("--data_dir", type=cli.PathArgument, help=help)
    help = "directory for results and generated models"
    parser.add_argument("--output_dir", type=cli.PathArgument, default=perf.OUTPUT, help=help)
    return parser.parse_args(argv)


def time_training(steps, examples, vocab_file):
    """Median seconds of a step of fine-tuning PP-MiniLM on 32 sentences, as in run_clue.py without its data loader."""
    from common.compat import paddle

    cli.set_seed(0)
    tokenizer = tokenization.load_tokenizer(None, True, vocab_file)
    architecture = os.path.join(ROOT, "configs", "ppminilm-6l-768h.json")
    config = modeling.random_config("ppminilm", architecture, len(tokenizer.vocab), 15)
    model = modeling.model_class("ppminilm")(config)
    optimizer = paddle.optimizer.AdamW(learning_rate=5e-5, parameters=model.parameters(), weight_decay=0.01)
    features, objective = batching.convert(examples, tokenizer, 128), objectives.Classification()
    seconds = []
    for step in range(UNTIMED_STEPS + steps):
        started = time.perf_counter()
        chosen = [(32 * step + number) % len(features) for number in range(32)]
        batch = batching.collate([features[number] for number in chosen], range(32), tokenizer.pad_id)
        logits = model(paddle.to_tensor(batch.input_ids), paddle.to_tensor(batch.token_type_ids))
        labels = paddle.to_tensor([examples[number].label for number in chosen])
        objective.loss(logits, labels).backward()
        optimizer.step()
        optimizer.clear_grad()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[UNTIMED_STEPS:]))


def name_of(python):
    """Such as "Paddle 3.1.1, Python 3.13". Raises: UserError if it does not run or has no Paddle."""
    program = "import platform, sys; sys.path.insert(0, sys.argv[1]); import common; "
    program += "print('.'.join(map(str, common.PADDLE)), platform.python_version())"
    try:
        asked = subprocess.run([python, "-c", program, ROOT], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--other_python {python}: {error.strerror}") from error
    if asked.returncode or asked.stdout.startswith("0 "):
        raise UserError(f"--other_python {python}: has no Paddle; setup_env.sh makes such an environment")
    return "Paddle {}, Python {}".format(*asked.stdout.split())


def ask(command, what):
    """The JSON object that a measurement prints as its last line."""
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode:
        raise UserError(f"measuring {what} failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(python, spec, settings):
    """Seconds per 1000 sentences of one measurement, by the interpreter ``python``; of training if spec is None."""
    if spec is None:
        steps = ask([python, os.path.abspath(__file__), "--train_steps", "12", *settings], TRAINING)["seconds_per_step"]
        return steps * 1000 / 32
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(spec, file)
        file.flush()
        result = ask([python, os.path.join(HERE, "measure.py"), file.name], spec["prefix"])
    return perf.seconds_of(result, True) * 1000 / result["sentences"]


def run_rounds(specs, environments, args, sentences, settings):
    """{(row, environment): [seconds per 1000 sentences of each round]}. Shows a progress bar."""
    seconds = {(row, name): [] for row in specs for name in environments}
    with tqdm(total=args.rounds * len(seconds), file=sys.stderr) as bar:
        for number, row in itertools.product(range(args.rounds), specs):
            part = {"start": number * sentences, "stop": (number + 1) * sentences}
            spec = specs[row] and {**specs[row], **part}
            for name in list(environments)[:: -1 if number % 2 else 1]:  # alternates, so that a drift favours none
                bar.set_description(f"round {number + 1}, {row}, {name}")
                seconds[row, name].append(measure(environments[name], spec, settings))
                bar.update()
    return seconds


def report(seconds, first):
    """Prints the table. Returns: its rows; ``speed`` is the median of the rounds beside the environment ``first``."""
    rows = []
    columns = "what | environment | sentences/s | speed beside the first | range of the rounds"
    print(f"{columns}\n--- | --- | --- | --- | ---")
    for row, name in seconds:
        rate = 1000 / float(np.mean(seconds[row, name]))
        ratios = np.array(seconds[row, first]) / np.array(seconds[row, name])
        speed, low, high = (round(float(figure), 3) for figure in (np.median(ratios), ratios.min(), ratios.max()))
        print(f"{row} | {name} | {rate:.1f} | {speed:.2f} | {low:.2f}-{high:.2f}")
        named = {"row": row, "environment": name, "sentences_per_second": round(rate, 1)}
        rows.append({**named, "speed": speed, "range": [low, high]})
    return rows


def main(argv=None):
    args = parse_args(argv)
    timing = perf.parse_args(["--random", "--rounds", str(args.rounds), "--sentences", str(args.sentences)])
    for name in ("vocab_file", "data_dir", "output_dir"):
        setattr(timing, name, getattr(args, name))
    data_dir, dev, notes = perf.find_sentences(timing)
    if args.train_steps:
        print(json.dumps({"seconds_per_step": time_training(args.train_steps, dev.examples, args.vocab_file)}))
        return
    environments = {name_of(python): python for python in (sys.executable, *args.other_python)}
    if len(environments) < 1 + max(1, len(args.other_python)):
        raise UserError("--other_python: name an environment with another Paddle or another Python")
    os.makedirs(args.output_dir, exist_ok=True)
    models = {}
    perf_models.complete(timing, models, dict.fromkeys(model for _, model, _ in ROWS), dev.examples)
    vocab_file = args.vocab_file or os.path.join(os.path.dirname(models["finetuned"]), "vocab.txt")
    settings = ["--vocab_file", vocab_file, "--data_dir", data_dir] if data_dir else ["--vocab_file", vocab_file]
    specs = {TRAINING: None}
    for title, model, precision in ROWS:
        specs[title] = perf.specification(timing, models[model], precision, "cpu", data_dir)
        specs[title].update(fast_tokenizer=[True], latency=0)
    seconds = run_rounds(specs, environments, args, timing.sentences, settings)
    rows = report(seconds, next(iter(environments)))
    machine = records.describe_machine()
    sentences = f"{args.rounds} rounds of {timing.sentences} sentences"
    notes.append(f"random weights; {sentences}; {machine['cpu']}, {machine['cores']} cores")
    print("\n".join(["", *(f"- {note}" for note in notes)]))
    result = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine, "notes": notes, "rows": rows}
    files.write_json(os.path.join(args.output_dir, "versions.json"), result)


if __name__ == "__main__":
    cli.run(main)
