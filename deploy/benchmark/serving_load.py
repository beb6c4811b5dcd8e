"""Load on the service: many clients at once, every answer checked, batching against one request after the other.

Reads a model directory; starts two services of it, one with batches (config_nlp.yml) and one with batch_size 1, and
sends both the same requests, in rounds that alternate. Prints a table; with --output writes its figures as JSON.

    python serving_load.py --model ../../quantization/tnews_quant_models/mse4 --input_file texts.txt

Without --input_file the texts are random words of the vocabulary, of 4 to 120 characters.
"""

import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
SERVING = os.path.join(ROOT, "deploy", "serving")
sys.path[:0] = [ROOT, SERVING]
import data
import numpy as np
import protocol
from common import UserError, batching, checkpoints, cli, engine, files, records, texts

# How far a logit may be from infer.py's: both pad, but to other lengths and in batches of other sizes, so sums may
# round differently; BF16 keeps 8 bits, and in INT8 a last bit may move an activation to the next of 255 steps.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "int8": 1e-2}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, help="directory of an exported or quantized model")
    parser.add_argument("--precision", choices=sorted(TOLERANCE), help="default: int8 if quantized, else fp32")
    parser.add_argument("--input_file", help="texts to send, as rpc_client.py takes them")
    help = "per service and round, one text each"
    parser.add_argument("--requests", type=int, default=2000, positive=True, help=help)
    help = "each sends its next request when it has the answer"
    parser.add_argument("--clients", type=int, default=50, positive=True, help=help)
    parser.add_argument("--rounds", type=int, default=3, positive=True)
    parser.add_argument("--seed", type=int, default=0, help="of the random texts")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args(argv)
    args.text = args.text_pair = None
    return args


def random_texts(vocab, pairs, count, seed):
    rng = random.Random(seed)
    words = [token for token in vocab if len(token) == 1 and token.isalpha()]

    def text():
        return "".join(rng.choices(words, k=rng.randint(4, 120)))

    return [batching.Example(text(), text() if pairs else None, None, n) for n in range(1, count + 1)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def service(args, batch_size):
    """Runs web_service.py with that batch_size; gives its HTTP port."""
    with tempfile.TemporaryDirectory() as directory:
        config, port = os.path.join(directory, "config.yml"), free_port()
        with open(config, "w", encoding="utf-8") as file:
            json.dump({"op": {protocol.SERVICE: {"batch_size": batch_size}}, "timeout_ms": 120_000}, file)
        options = ["--model", args.model, "--http_port", port, "--rpc_port", free_port(), "--log_dir", directory]
        options += ["--config", config, *(["--precision", args.precision] if args.precision else [])]
        command = [sys.executable, os.path.join(SERVING, "web_service.py"), *map(str, options)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            if "ready" not in process.stdout.readline():
                raise UserError(f"--model {args.model}: the service did not start")
            yield port
        finally:
            process.terminate()
            process.wait()


def send_all(port, examples, clients):
    """Sends every example, ``clients`` at a time. Returns: (answers, seconds of each, seconds of all)."""
    answers, seconds, waiting = [None] * len(examples), [0.0] * len(examples), iter(range(len(examples)))
    lock = threading.Lock()

    def client():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while True:
            with lock:
                number = next(waiting, None)
            if number is None:
                break
            example = examples[number]
            fields = {"text": example.text}
            if example.text_pair is not None:
                fields["text_pair"] = example.text_pair
            started = time.perf_counter()
            connection.request("POST", f"/{protocol.SERVICE}/prediction", json.dumps(fields))
            answers[number] = json.loads(connection.getresponse().read())
            seconds[number] = time.perf_counter() - started
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, seconds, time.perf_counter() - started


def confusable(logits, tolerance):
    """The share of texts whose logits are also, to ``tolerance``, those of the text before: what a check of answers
    would not notice. Logits: float32 [texts, classes]."""
    return float((np.abs(logits - np.roll(logits, 1, 0)).max(-1) <= tolerance).mean())


def count_right(answers, logits, labels, tolerance):
    """How many answers have the logits that were computed offline, to ``tolerance``, and the label of their own."""
    right = 0
    for answer, expected in zip(answers, logits):
        if answer and answer["err_no"] == 0:
            (row,) = answer["logits"]
            close = np.abs(np.subtract(row, expected)).max() <= tolerance
            right += bool(close and answer["labels"] == [labels[int(np.argmax(row))]])
    return right


def main(argv=None):
    args = parse_args(argv)
    graph = checkpoints.open_graph(args.model, "--model")
    prefix, record, tokenizer = graph.prefix, graph.record, graph.tokenizer()
    args.model = graph.directory
    precision = args.precision or engine.default_precision(prefix)
    pairs = record["data"]["dev"].get("pairs")
    if args.input_file:
        examples = texts.read_texts(args, record["task"], pairs, data.texts_of)
        examples = [examples[i % len(examples)] for i in range(args.requests)]
    else:
        examples = random_texts(tokenizer.vocab, pairs, args.requests, args.seed)
    features = batching.convert(examples, tokenizer, record["arguments"]["max_seq_length"])
    # infer.py's engine, batch size and order: the numbers that every answer is compared with.
    logits = engine.Engine(prefix, "cpu", precision).predict(features, pad_id=tokenizer.pad_id)

    alike = confusable(logits, TOLERANCE[precision])
    if alike > 0.05:
        raise UserError(f"--model {args.model}: gives {alike:.0%} of the texts the same logits; it checks nothing")

    figures = {"batched": [], "one by one": []}
    with service(args, 32) as batched, service(args, 1) as single:
        ports = {"batched": batched, "one by one": single}
        for number in range(args.rounds):
            for name in sorted(ports, reverse=number % 2 == 1):
                answers, seconds, total = send_all(ports[name], examples, args.clients)
                right = count_right(answers, logits, record["labels"], TOLERANCE[precision])
                p50, p99 = np.percentile(seconds, [50, 99]) * 1000
                figures[name].append({"right": right, "per_second": len(examples) / total, "p50": p50, "p99": p99})
                print(
                    f"round {number + 1}, {name}: {right} of {len(examples)} right, {len(examples) / total:.1f} "
                    f"requests/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms",
                    file=sys.stderr,
                )
    machine = records.describe_machine()
    lengths = [len(feature.input_ids) for feature in features]
    print(
        f"{args.requests} requests from {args.clients} clients, {args.rounds} rounds, {precision}, "
        f"{min(lengths)} to {max(lengths)} tokens (mean {np.mean(lengths):.1f}), "
        f"{machine['cores']} cores of {machine['cpu']}\n"
    )
    print("| service | right answers | requests/s | p50 ms | p99 ms |\n| --- | --- | --- | --- | --- |")
    for name, rows in figures.items():
        right, all_of = sum(row["right"] for row in rows), args.requests * args.rounds
        middle = {key: np.median([row[key] for row in rows]) for key in ("per_second", "p50", "p99")}
        print(
            f"| {name} | {right} of {all_of} | {middle['per_second']:.1f} | {middle['p50']:.0f} | {middle['p99']:.0f} |"
        )
    ratios = [a["per_second"] / b["per_second"] for a, b in zip(figures["batched"], figures["one by one"])]
    print(f"\nbatched / one by one, by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    if args.output:
        said = {"machine": machine, "requests": args.requests, "clients": args.clients, "rounds": figures}
        files.write_whole(args.output, json.dumps(said, indent=1) + "\n")
    wrong = sum(args.requests - row["right"] for rows in figures.values() for row in rows)
    if wrong:
        print(f"serving_load.py: {wrong} answers were wrong or missing", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
