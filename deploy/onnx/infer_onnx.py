"""Classifies texts with a model that export_onnx.py wrote: accuracy on dev, predictions for your own texts.

Needs no Paddle and nothing else of this repository: copy this one file beside model.onnx, onto any machine for which
there is ONNX Runtime or OpenVINO, and install onnxruntime or openvino, tokenizers and numpy (requirements/onnx.txt).

    python infer_onnx.py --model_path DIR --text "今年的高考作文题"
    python infer_onnx.py --model_path DIR --input_file texts.txt --engine openvino
    python infer_onnx.py --model_path DIR --dev_file tnews_public/dev.json

DIR (default: where this file lies) holds model.onnx, tokenizer.json and labels.json.
"""

import argparse
import concurrent.futures
import hashlib
import itertools
import json
import os
import queue
import sys
import time

try:
    import numpy as np
except ImportError as error:
    sys.exit(f"infer_onnx.py: error: {error}; requirements/onnx.txt lists what is needed")

HERE = os.path.dirname(os.path.abspath(__file__))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
# Number of batches whose texts are sorted by length together, so that a batch holds texts of like length and little
# padding is computed: 5 % of the tokens of TNEWS dev, 59 % in the order of the file.
WINDOW = 64


class UserError(Exception):
    """A mistake of the user: one line, and exit status 2."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default=HERE, help="directory with model.onnx, tokenizer.json, labels.json")
    what = parser.add_argument_group("what to classify: one of these")
    what.add_argument("--text", nargs="+", help="these texts")
    what.add_argument("--text_pair", nargs="+", help="the second text of each, for sentence-pair tasks")
    help = "one text per line (a tab before the second text of a pair), or .json or .jsonl with one record of the task "
    help += "per line; - is standard input"
    what.add_argument("--input_file", help=help)
    help = "score a file of records with labels, such as dev.json"
    what.add_argument("--dev_file", help=help)
    help = "also write the logits of --dev_file, float32 [records, labels] in the order of the file"
    what.add_argument("--save_logits", metavar="FILE.npy", help=help)
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=sorted(ENGINES), default="onnxruntime")
    group.add_argument("--bf16", action="store_true", help="OpenVINO: BF16 for what is not INT8")
    group.add_argument("--threads", type=int, default=CORES, help="CPU threads in all (default: one per core)")
    help = "batches that are computed side by side, each on its share of the threads (default: the largest number up "
    help += "to 4 that divides the threads)"
    group.add_argument("--streams", type=int, help=help)
    group.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args(argv)
    if sum(bool(given) for given in (args.text, args.input_file, args.dev_file)) != 1:
        parser.error("give one of --text, --input_file, --dev_file")
    if args.text_pair and not args.text:
        parser.error("--text_pair goes with --text")
    if args.input_file and args.input_file.lower().endswith((".csv", ".tsv")):
        parser.error("--input_file: tables are read by infer.py; here one text per line, or .json or .jsonl")
    if args.save_logits and not (args.dev_file and args.save_logits.endswith(".npy")):
        parser.error("--save_logits FILE.npy goes with --dev_file")
    if args.save_logits and not os.path.isdir(os.path.dirname(os.path.abspath(args.save_logits))):
        parser.error(f"--save_logits {args.save_logits}: no such directory")  # before anything is computed
    if args.bf16 and args.engine != "openvino":
        parser.error("--bf16 goes with --engine openvino")
    for name in ("threads", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be above 0")
    if args.streams is None:
        args.streams = max(n for n in (1, 2, 3, 4) if args.threads % n == 0)
    if not 1 <= args.streams <= args.threads:
        parser.error(f"--streams {args.streams}: from 1 to {args.threads}, one for each thread")
    return args


# The two engines. Each gives one function per stream: (input_ids, token_type_ids), int64 [batch, tokens] -> logits,
# float32 [batch, labels].


def onnxruntime_streams(path, threads, streams, bf16=False):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Streams of one thread each wait for nobody; threads that share a batch wait for each other after every operator.
    options.intra_op_num_threads = max(1, threads // streams)

    def stream():
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda ids, types: session.run(None, {"input_ids": ids, "token_type_ids": types})[0]

    return [stream() for _ in range(streams)]


def openvino_streams(path, threads, streams, bf16=False):
    import threading

    import openvino

    settings = {"NUM_STREAMS": str(streams), "INFERENCE_NUM_THREADS": str(threads)}
    # Of what is not INT8. Without it OpenVINO takes BF16 by itself where the CPU has it, and the logits move a little.
    settings["INFERENCE_PRECISION_HINT"] = "bf16" if bf16 else "f32"
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    starting = threading.Lock()  # concurrent calls of start_async deadlock (2026.4)

    def stream():
        request = compiled.create_infer_request()

        def run(ids, types):
            with starting:
                request.start_async({"input_ids": ids, "token_type_ids": types})
            request.wait()
            return request.get_output_tensor().data.copy()

        return run

    return [stream() for _ in range(streams)]


ENGINES = {"onnxruntime": onnxruntime_streams, "openvino": openvino_streams}


class Model:
    """A directory that export_onnx.py wrote, opened by an engine.

    Args: directory: with model.onnx, tokenizer.json, labels.json. engine: name in ENGINES. The others as the options.
    Raises: UserError if a file is missing or damaged.
    """

    def __init__(self, directory, engine="onnxruntime", threads=CORES, streams=1, batch_size=32, bf16=False):
        from tokenizers import Tokenizer

        path = {name: os.path.join(directory, name) for name in ("model.onnx", "tokenizer.json", "labels.json")}
        if not os.path.isdir(directory):
            raise UserError(f"--model_path {directory}: no such directory; the one with model.onnx is needed")
        for name, file in path.items():
            if not os.path.isfile(file):
                raise UserError(f"--model_path {directory}: no {name} there; deploy/onnx/export_onnx.py writes it")
        check_hashes(directory, path)
        self.description = loaded(path["labels.json"], read_json)
        self.objective = self.description["objective"]
        if self.objective["name"] not in ("classification", "multi_label"):
            raise UserError(f"{directory}: objective {self.objective['name']} is of your own; add it to answer()")
        self.labels, self.max_seq_length = self.description["labels"], self.description["max_seq_length"]
        self.tokenizer = loaded(path["tokenizer.json"], Tokenizer.from_file)
        self.pad_id = self.tokenizer.token_to_id("[PAD]")
        self.batch_size, self.streams = batch_size, queue.SimpleQueue()
        for stream in loaded(path["model.onnx"], lambda file: ENGINES[engine](file, threads, streams, bf16)):
            self.streams.put(stream)
        self.pool = concurrent.futures.ThreadPoolExecutor(streams)

    def submit(self, rows):
        """Starts the computation of a window of rows. Returns: list of (places among the rows, future of logits)."""
        encoded = encode(self.tokenizer, rows, self.max_seq_length)
        order = sorted(range(len(rows)), key=lambda i: len(encoded[i][0]), reverse=True)
        started = []
        for start in range(0, len(rows), self.batch_size):
            places = order[start : start + self.batch_size]
            shape = len(places), len(encoded[places[0]][0])  # the first is the longest
            ids, types = np.full(shape, self.pad_id, "int64"), np.zeros(shape, "int64")
            for i, place in enumerate(places):
                row_ids, row_types = encoded[place]
                ids[i, : len(row_ids)], types[i, : len(row_types)] = row_ids, row_types
            started.append((places, self.pool.submit(self.run, ids, types)))
        return started

    def run(self, ids, types):
        stream = self.streams.get()
        try:
            return stream(ids, types)
        finally:
            self.streams.put(stream)

    def logits(self, rows):
        """Yields (row, logits [labels]) in the order of the rows, window by window, so that memory stays constant.

        One window is tokenized while the one before is computed. Args: rows: iterable of (text, pair or None).
        """
        rows, waiting = iter(rows), None
        while True:
            try:
                window = list(itertools.islice(rows, WINDOW * self.batch_size))
            except UserError:  # a bad line: what came before its window is answered
                if waiting:
                    yield from collected(*waiting)
                raise
            started = self.submit(window) if window else []
            if waiting:
                yield from collected(*waiting)
            if not window:
                return
            waiting = window, started

    def answer(self, row, logits):
        """The JSON object that answers a text: the same as that of infer.py."""
        text, pair = row
        names = dict(zip(self.labels, self.description["label_names"] or ()))
        answer = {"text": text}
        if self.objective["name"] == "classification":
            probabilities = softmax(logits)
            label = self.labels[int(np.argmax(logits))]
            answer["label"], answer["probability"] = label, round(float(max(probabilities)), 6)
            named = {"label_name": names[label]} if names else {}
        else:
            probabilities = sigmoid(logits)
            chosen = [label for label, p in zip(self.labels, probabilities) if p >= self.objective["threshold"]]
            answer["labels"] = chosen
            named = {"label_names": [names[label] for label in chosen]} if names else {}
        answer["probabilities"] = {label: round(float(p), 6) for label, p in zip(self.labels, probabilities)}
        if self.objective["name"] == "multi_label":
            answer["threshold"] = self.objective["threshold"]
        return {**answer, **named, **({} if pair is None else {"text_pair": pair})}


def encode(tokenizer, rows, max_seq_length):
    """[CLS] text [SEP], or [CLS] text [SEP] pair [SEP], the longer text cut first: list of (ids, token types).

    Args: tokenizer: of tokenizer.json. rows: list of (text, pair or None), all of one kind.
    """
    # A pair is cut below, exactly as in training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    cls_id, sep_id, room = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"), max_seq_length - 2
    texts = [text for row in rows for text in row if text is not None]
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    if rows[0][1] is None:
        return [([cls_id, *first[:room], sep_id], [0] * (len(first[:room]) + 2)) for first in ids]
    encoded, room = [], room - 1
    for first, second in zip(ids[::2], ids[1::2]):
        kept, kept_pair = len(first), len(second)
        while kept + kept_pair > room:
            if kept > kept_pair:
                kept -= 1
            else:
                kept_pair -= 1
        types = [0] * (kept + 2) + [1] * (kept_pair + 1)
        encoded.append(([cls_id, *first[:kept], sep_id, *second[:kept_pair], sep_id], types))
    return encoded


def softmax(logits):
    exponentials = np.exp(logits.astype("float64") - logits.max())
    return exponentials / exponentials.sum()


def sigmoid(logits):
    return np.exp(-np.logaddexp(0, -logits.astype("float64")))


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def loaded(path, load):
    """load(path). Raises: UserError if the file is damaged: each library has exceptions of its own for that."""
    try:
        return load(path)
    except ImportError:  # not of the file
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); export the model again") from error


def check_hashes(directory, path):
    """Raises: UserError if a file is not the one in stage.json, where stage.json was copied, too."""
    record = os.path.join(directory, "stage.json")
    if not os.path.isfile(record):
        return
    expected = loaded(record, read_json).get("weights", {})
    for name, file_path in path.items():
        with open(file_path, "rb") as file:
            if hashlib.sha256(file.read()).hexdigest() != expected.get(name):
                raise UserError(f"{file_path}: damaged, or not of this stage.json; export the model again")


def collected(rows, started):
    """(row, logits) of each row, in order. Args: started: of Model.submit."""
    found = [None] * len(rows)
    for places, future in started:
        for place, logits in zip(places, future.result()):
            found[place] = logits
    return zip(rows, found)


# Reading texts and records


def texts_of(task, record):
    """(text, pair or None) of a record of the task. Raises: ValueError, KeyError for a record of another form."""
    if task == "CSL":
        return " ".join(record["keyword"]), record["abst"]
    if "sentence" in record:
        return record["sentence"], None
    if "sentence1" in record:
        return record["sentence1"], record["sentence2"]
    if task == "CLUEWSC2020":
        raise ValueError("texts with two marked spans, which infer.py reads; give them marked, one per line")
    raise ValueError("no sentence, and no sentence1 and sentence2")


def read_lines(path):
    """Yields (number, line) of a file or of standard input. Raises: UserError if it cannot be read."""
    try:
        with sys.stdin if path == "-" else open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def read_records(path, task):
    """Yields (place, record, (text, pair or None)). Raises: UserError naming file and line of what is not a record."""
    for number, line in read_lines(path):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("one JSON object per line is needed")
            yield f"{path}:{number}", record, texts_of(task, record)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON; one object per line is needed") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a record of {task}: {error}") from error


def read_texts(args, task):
    """Yields (place, (text, pair or None)) of --text or --input_file."""
    if args.text:
        if args.text_pair and len(args.text_pair) != len(args.text):
            raise UserError(f"--text_pair: {len(args.text_pair)} texts for {len(args.text)} of --text")
        for number, row in enumerate(zip(args.text, args.text_pair or [None] * len(args.text)), 1):
            yield f"text {number}", row
    elif args.input_file.endswith((".json", ".jsonl")):
        for place, _, row in read_records(args.input_file, task):
            yield place, row
    else:
        for number, line in read_lines(args.input_file):
            text, tab, pair = line.partition("\t")
            yield f"{args.input_file}:{number}", (text, pair if tab else None)


def checked(rows, description):
    """Yields the (text, pair) of (place, (text, pair)).

    Raises: UserError for what is no text, an empty text, or a pair where none is wanted.
    """
    pairs = description["pairs"]
    for place, (text, pair) in rows:
        for part in (text,) if pair is None else (text, pair):
            if not isinstance(part, str):
                raise UserError(f"{place}: a text is not a string")
            if not part.strip():
                raise UserError(f"{place}: a text is empty")
        pairs = pair is not None if pairs is None else pairs
        if pairs != (pair is not None):
            wanted = "sentence pairs (--text A --text_pair B; in a file, a tab between)" if pairs else "single texts"
            raise UserError(f"{place}: {description['task']} takes {wanted}")
        yield text, pair


# What the options ask for


def target_of(model, place, record):
    """The set of labels that are right for a record; None if its annotators did not agree, which CLUE marks by "-".

    Raises: UserError if there is no label, or one that the model does not have.
    """
    several = model.objective["name"] == "multi_label"
    given = record.get("labels" if several else "label")
    if given == "-":
        return None
    if given is None or isinstance(given, list) != several:
        raise UserError(f"{place}: no {'labels, a list' if several else 'label'}")
    target = {str(label) for label in (given if several else [given])}
    unknown = target - set(model.labels)
    if unknown:
        raise UserError(f"{place}: label {min(unknown)!r} is not one of the model's")
    return target


def score(model, args):
    """--dev_file: the share of right answers, as one JSON line; for several labels per text, of exactly right ones."""
    rows, targets = [], []
    for place, record, row in read_records(args.dev_file, model.description["task"]):
        target = target_of(model, place, record)
        if target is not None:
            rows.append((place, row))
            targets.append(target)
    if not rows:
        raise UserError(f"{args.dev_file}: no record with a label")
    found = list(model.logits(checked(rows, model.description)))
    answers = [model.answer(row, logits) for row, logits in found]
    right = sum(set(answer.get("labels", [answer.get("label")])) == target for answer, target in zip(answers, targets))
    if args.save_logits:
        np.save(args.save_logits, np.array([logits for _, logits in found], "float32"))
    figure = "exact_match" if model.objective["name"] == "multi_label" else "accuracy"
    result = {"task": model.description["task"], "engine": args.engine, figure: round(right / len(rows), 6)}
    print(json.dumps({**result, "examples": len(rows)}, ensure_ascii=False))
    return len(rows)


def classify(model, args):
    """--text, --input_file: one JSON line per text, as they come."""
    count = 0
    texts = checked(read_texts(args, model.description["task"]), model.description)
    for row, logits in model.logits(texts):
        print(json.dumps(model.answer(row, logits), ensure_ascii=False))
        count += 1
    if not count:
        raise UserError(f"--input_file {args.input_file}: no text in it")
    return count


def run(args):
    model = Model(args.model_path, args.engine, args.threads, args.streams, args.batch_size, args.bf16)
    started = time.perf_counter()
    count = score(model, args) if args.dev_file else classify(model, args)
    seconds = time.perf_counter() - started
    print(f"{count} texts in {seconds:.1f} s, {count / seconds:.0f} a second", file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    for stream, encoding in ((sys.stdout, "utf-8"), (sys.stdin, "utf-8-sig")):
        if hasattr(stream, "reconfigure"):  # Windows would take the code page of the console
            stream.reconfigure(encoding=encoding)
    try:
        run(args)
    except UserError as error:
        print(f"infer_onnx.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        way_out = "requirements/onnx.txt lists what is needed; --engine chooses ONNX Runtime or OpenVINO"
        print(f"infer_onnx.py: error: {error}; {way_out}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `... | head`: the reader has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
