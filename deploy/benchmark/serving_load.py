"""Load test of the service with many concurrent clients: batching against one request at a time. Checks all answers.

Reads a model directory. Starts two services with this model, one with batch_size 32 and one with batch_size 1, and
sends both the same requests in alternating rounds. Prints a table; --output also writes its figures as JSON.

    python serving_load.py --model ../../quantization/tnews_quant_models/mse4 --input_file texts.txt

Without --input_file, the texts consist of 4 to 120 random characters of the vocabulary.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

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
    parser.add_argument("--requests", type=int, default=2000, positive=True, help="requests per service and round")
    parser.add_argument("--texts", type=int, default=1, positive=True, help="texts of each request")
    help = "concurrent clients; each sends its next request after the answer to the previous one"
    parser.add_argument("--clients", type=int, default=50, positive=True, help=help)
    parser.add_argument("--rounds", type=int, default=3, positive=True, help="alternating rounds")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the texts")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args(argv)
    args.text = args.text_pair = None
    args.count = args.requests * args.texts
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


class Load(NamedTuple):
    answers: list  # the JSON object that answers each request
    seconds: list  # from sending a request to having its answer
    total: float  # seconds for all requests
    share: float  # of one core, that the clients themselves took


def send_all(port, requests, clients):
    """Sends all requests over ``clients`` connections, each of which sends its next one after the answer to the last.

    The bodies are made before and the answers read afterwards, so that the clients take little from the service beside
    them. Args: requests: lists of batching.Example. Returns: Load.
    """
    bodies = [body_of(examples) for examples in requests]
    raw, seconds, numbers = [None] * len(bodies), [0.0] * len(bodies), iter(range(len(bodies)))

    async def client():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            started = time.perf_counter()
            writer.write(bodies[number])
            head = await reader.readuntil(b"\r\n\r\n")
            raw[number] = await reader.readexactly(int(re.search(rb"(?i)content-length: *(\d+)", head).group(1)))
            seconds[number] = time.perf_counter() - started
        writer.close()

    async def all_clients():
        await asyncio.gather(*(client() for _ in range(clients)))

    started, used = time.perf_counter(), time.process_time()
    asyncio.run(all_clients())
    total, used = time.perf_counter() - started, time.process_time() - used
    return Load([json.loads(body) for body in raw], seconds, total, used / total)


def body_of(examples):
    """An HTTP request with these texts."""
    fields = {"texts": [example.text for example in examples]}
    if examples[0].text_pair is not None:
        fields["text_pairs"] = [example.text_pair for example in examples]
    body = json.dumps(fields).encode()
    head = f"POST /{protocol.SERVICE}/prediction HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def confusable(logits, tolerance):
    """Share of texts whose logits equal those of the previous text within ``tolerance``: there, a check would not
    notice swapped answers. Args: logits: float32 [texts, classes]."""
    return float((np.abs(logits - np.roll(logits, 1, 0)).max(-1) <= tolerance).mean())


def count_right(answers, logits, objective, labels, tolerance):
    """Number of answers whose logits match the offline ones within ``tolerance`` and whose labels fit their logits.

    Args: logits: of the texts of each request, [requests, texts, outputs].
    """
    right = 0
    for answer, expected in zip(answers, logits):
        if answer and answer["err_no"] == 0:
            found = np.float32(answer["logits"])
            close = found.shape == np.shape(expected) and np.abs(found - expected).max() <= tolerance
            columns = objective.columns(found, labels)
            right += bool(close and answer.get("labels") == columns.get("labels"))
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
        examples = [examples[i % len(examples)] for i in range(args.count)]
    else:
        examples = random_texts(tokenizer.vocab, pairs, args.count, args.seed)
    features = batching.convert(examples, tokenizer, record["arguments"]["max_seq_length"])
    # The reference for all answers, computed with infer.py's engine, batch size and order.
    logits = engine.Engine(prefix, "cpu", precision).predict(features, pad_id=tokenizer.pad_id)

    alike = confusable(logits, TOLERANCE[precision])
    if alike > 0.05:
        raise UserError(f"--model {args.model}: {alike:.0%} of the texts get equal logits: nothing can be checked")

    requests = [examples[i : i + args.texts] for i in range(0, args.count, args.texts)]
    expected = logits.reshape(args.requests, args.texts, -1)
    figures = {"batched": [], "one by one": []}
    with service(args, 32) as batched, service(args, 1) as single:
        ports = {"batched": batched, "one by one": single}
        for number in range(args.rounds):
            for name in sorted(ports, reverse=number % 2 == 1):
                load = send_all(ports[name], requests, args.clients)
                right = count_right(load.answers, expected, graph.objective, record["labels"], TOLERANCE[precision])
                p50, p99 = np.percentile(load.seconds, [50, 99]) * 1000
                row = {"right": right, "per_second": args.requests / load.total, "p50": p50, "p99": p99}
                figures[name].append({**row, "client": load.share})
                print(
                    f"round {number + 1}, {name}: {right} of {args.requests} right, "
                    f"{row['per_second']:.1f} requests/s, "
                    f"p50 {p50:.0f} ms, p99 {p99:.0f} ms; the clients took {load.share:.0%} of a core",
                    file=sys.stderr,
                )
    machine = records.describe_machine()
    lengths = [len(feature.input_ids) for feature in features]
    print(
        f"{args.requests} requests of {args.texts} texts from {args.clients} clients, {args.rounds} rounds, {precision}"
        f", {min(lengths)} to {max(lengths)} tokens (mean {np.mean(lengths):.1f}), "
        f"{machine['cores']} cores of {machine['cpu']}\n"
    )
    print("| service | right answers | requests/s | p50 ms | p99 ms | clients, share of a core |")
    print("| --- " * 6 + "|")
    for name, rows in figures.items():
        right, all_of = sum(row["right"] for row in rows), args.requests * args.rounds
        middle = {key: np.median([row[key] for row in rows]) for key in ("per_second", "p50", "p99", "client")}
        cells = [
            name,
            f"{right} of {all_of}",
            f"{middle['per_second']:.1f}",
            f"{middle['p50']:.0f}",
            f"{middle['p99']:.0f}",
        ]
        print(f"| {' | '.join(cells)} | {middle['client']:.0%} |")
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
