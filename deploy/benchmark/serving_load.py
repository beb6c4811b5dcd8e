"""Load test of the service with many concurrent clients: batching against one request at a time. Checks all answers.

Reads a model directory. Starts two services with this model, one with batch_size 32 and one with batch_size 1, and
sends both the same requests in alternating rounds. Prints a table; --output also writes its figures as JSON.

    python serving_load.py --model ../../quantization/tnews_quant_models/mse4 --input_file texts.txt

Without --input_file, the texts consist of 4 to 120 random characters of the vocabulary.
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

# Largest allowed difference from infer.py's logits. Padding and batch sizes differ, so sums may round differently.
# BF16 keeps only 8 bits. In INT8, a rounding difference may move an activation by one of 255 steps.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "int8": 1e-2}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, help="directory of an exported or quantized model")
    parser.add_argument("--precision", choices=sorted(TOLERANCE), help="default: int8 if quantized, else fp32")
    parser.add_argument("--input_file", help="texts to send, in the format of rpc_client.py")
    help = "requests per service and round, one text each"
    parser.add_argument("--requests", type=int, default=2000, positive=True, help=help)
    help = "concurrent clients; each sends its next request after the answer to the previous one"
    parser.add_argument("--clients", type=int, default=50, positive=True, help=help)
    parser.add_argument("--rounds", type=int, default=3, positive=True, help="alternating rounds")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the texts")
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
    """Runs web_service.py with this batch_size within a context. Yields: its HTTP port."""
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
    """Sends all examples from ``clients`` threads. Returns: (answers, seconds per request, total seconds)."""
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
    """Share of texts whose logits equal those of the previous text within ``tolerance``: there, a check would not
    notice swapped answers. Args: logits: float32 [texts, classes]."""
    return float((np.abs(logits - np.roll(logits, 1, 0)).max(-1) <= tolerance).mean())


def count_right(answers, logits, objective, labels, tolerance):
    """Number of answers whose logits match the offline ones within ``tolerance`` and whose label fits their logits."""
    right = 0
    for answer, expected in zip(answers, logits):
        if answer and answer["err_no"] == 0:
            (row,) = answer["logits"]
            close = np.abs(np.subtract(row, expected)).max() <= tolerance
            expected = objective.columns(np.float32([row]), labels)
            right += bool(close and answer.get("labels") == expected.get("labels"))
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
    # The reference for all answers, computed with infer.py's engine, batch size and order.
    logits = engine.Engine(prefix, "cpu", precision).predict(features, pad_id=tokenizer.pad_id)

    alike = confusable(logits, TOLERANCE[precision])
    if alike > 0.05:
        raise UserError(f"--model {args.model}: {alike:.0%} of the texts get equal logits: nothing can be checked")

    figures = {"batched": [], "one by one": []}
    with service(args, 32) as batched, service(args, 1) as single:
        ports = {"batched": batched, "one by one": single}
        for number in range(args.rounds):
            for name in sorted(ports, reverse=number % 2 == 1):
                answers, seconds, total = send_all(ports[name], examples, args.clients)
                right = count_right(answers, logits, graph.objective, record["labels"], TOLERANCE[precision])
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
        report = {"machine": machine, "requests": args.requests, "clients": args.clients, "rounds": figures}
        files.write_whole(args.output, json.dumps(report, indent=1) + "\n")
    wrong = sum(args.requests - row["right"] for rows in figures.values() for row in rows)
    if wrong:
        print(f"serving_load.py: {wrong} answers were wrong or missing", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
