"""Bulk classification for infer.py: a file of any length, or standard input, in constant memory.

The input is read in windows of 64 batches (common/sources.py). While one window is computed, the next is read and
tokenized, and the answers of the one before are written, in the order of the input. A window always holds the same
records, so a run that goes on after a kill, and the parts of several processes, give the bytes of one run.
"""

import argparse
import contextlib
import csv
import datetime
import gc
import gzip
import hashlib
import io
import itertools
import json
import os
import sys
import time

import data
import numpy as np
import outputs
from common import UserError, batching, engine, files, records, sources, texts

PROGRESS_SECONDS = 1, 30  # between two lines of progress: on a terminal, and in a log
ENDINGS = (".json", ".jsonl", ".tsv")  # of --output, also with .gz


def part(text):
    """argparse type: 3/8 -> (3, 8)."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 3/8, the third of eight")
    return int(number), int(count)


def add_arguments(parser):
    """What to classify, and how much of it; check_arguments checks it."""
    group = parser.add_argument_group("your own texts, instead of dev")
    texts.add_text_arguments(group)
    help = "what --input_file is (default: as its ending says, before .gz; text for other endings and standard input)"
    group.add_argument("--input_format", choices=("text", "json", "csv", "tsv"), help=help)
    help = "write the answers to FILE, .jsonl or .tsv, compressed if .gz follows; the same command resumes after a kill"
    group.add_argument("--output", metavar="FILE", help=help)
    help = "what to write of an answer, such as label,probability (default: all; .tsv: all but lists and objects)"
    group.add_argument("--fields", type=lambda names: names.split(","), help=help)
    help = "classify one of several parts of the file, such as 3/8; the outputs of all, joined, are that of the whole"
    group.add_argument("--part", type=part, help=help)
    group.add_flag("--strict", "end at a line that cannot be classified, instead of answering it with an error")
    group.add_argument("--overwrite", action="store_true", help="replace an --output of another run")


def check_arguments(args, parser):
    if not args.input_file or args.text:
        given = [name for name in ("input_format", "output", "fields", "part", "strict") if getattr(args, name)]
        if given:
            parser.error(f"--{given[0]} goes with --input_file, without --text")
    if args.output:
        if not sources.without_gz(args.output).endswith(ENDINGS):
            parser.error(f"--output {args.output}: must end with {', '.join(ENDINGS)}, or with .gz after one of these")
        if not os.path.isdir(os.path.dirname(os.path.abspath(args.output))):
            parser.error(f"--output {args.output}: no such directory")
        if os.path.exists(args.output) and not os.path.isfile(args.output):
            parser.error(f"--output {args.output}: not a file")
    if len(args.model_path) > 1 and args.input_file and (args.output or args.input_file == "-"):
        parser.error("--output and standard input take one --model_path")
    if args.input_file == "-" and args.part:
        parser.error("--part: standard input cannot be divided; give a file")


def classify_arguments(args, model):
    """--text, --text_pair: prints one line of JSON per text."""
    task, pairs = model.task, model.record["data"]["dev"].get("pairs")
    examples = texts.read_texts(args, task.name, pairs, data.texts_of)
    for example, logits in zip(examples, model.logits(model.convert(examples))):
        answer = texts.answer(example, task.objective, logits, task.labels, task.label_names)
        print(json.dumps(answer, ensure_ascii=False))


def classify_file(args, model):
    """--input_file: writes the answer to each record. Raises: UserError; with --strict also for the first bad line."""
    with contextlib.ExitStack() as stack:
        source = sources.Source(args.input_file, model.task.name, data.own_texts_of, args.input_format)
        stack.enter_context(source)
        source.pairs = model.record["data"]["dev"].get("pairs")
        size = engine.WINDOW * args.batch_size
        first = next(source.windows(size), None)
        if first is None:
            raise UserError(f"--input_file {args.input_file}: no text in it")
        answers = Answers(args, model, source.pairs, first)
        begin, end = ends_of(args, source, size)
        if args.strict and source.seekable:  # all is read before anything is computed or written
            source.seek(begin)
            for window in source.windows(size, end):
                check_strictly(args, window)
        output = outputs.Printed(begin)
        if args.output:
            run = identity(args, model, source)
            output = outputs.Written(args.output, run, answers.header(), begin, source.seekable, args.overwrite)
        stack.enter_context(output)
        if output.finished:
            return
        windows = source.windows(size, end)
        if source.seekable:
            source.seek(output.done.position)
        else:
            windows = itertools.chain([first], windows)
        progress = Progress(args, source, output.done, begin, end)

        def pieces():
            for window in windows:
                examples = window.examples()
                # In place of lines that cannot be classified, another one is: batches of other sizes would be shapes
                # that the engine has to prepare, and to remember.
                spare = size - len(examples) if len(window.rows) == size else 0
                yield examples + examples[:1] * spare, window

        # TensorRT learns its shapes from the first texts; a CPU needs none.
        on_cpu = args.device == "cpu"
        runner = model.open_engine([] if on_cpu else model.convert(first.examples()))
        options = model.tokenizer, model.max_seq_length, args.batch_size
        if on_cpu and len(first.rows) == size:
            runner.reserve(*options)
        gc.freeze()  # what the libraries made stays; looking for garbage in it again and again takes 2 % of the time
        for window, logits in runner.classify_windows(pieces(), *options):
            if args.strict:
                check_strictly(args, window)
            output.write(answers.of(window, logits), window)
            progress.show(output.done, window)
        output.finish()
        progress.finish(output.done)


def ends_of(args, source, size):
    """(begin, end) of what is to be read: Position, and Position or None. Leaves a file at its beginning."""
    if not source.seekable:
        if args.part:
            raise UserError(f"--part: {args.input_file} is no file, so it cannot be divided")
        return source.beginning, None
    source.seek(source.beginning)
    return source.part(*args.part, size) if args.part else (source.beginning, None)


def check_strictly(args, window):
    for row in window.rows:
        if row.error:
            raise UserError(described(args.input_file, row))


def described(path, row):
    """What is wrong with a Row, and where."""
    advice = files.encoding_advice(row.error, path) if row.error.startswith(files.BAD_ENCODING) else ""
    return f"{path}:{row.line}: {row.error}{advice}"


def identity(args, model, source):
    """What makes the answers, as a flat dict for the record of the run. Threads and streams do not change them."""
    record, made_of = model.record, [model.task.labels, model.task.label_names, model.record["objective"]]
    hashes = {**records.graph_files(record), **record.get("files", {})}
    return {
        "model": " ".join(f"{name} {digest[:12]}" for name, digest in sorted(hashes.items())),
        "labels": hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12],
        "device": args.device.partition(":")[0],
        "precision": model.precision,
        "use_trt": engine.needs_trt(args.device, model.precision, args.use_trt),
        "max_seq_length": model.max_seq_length,
        "batch_size": args.batch_size,
        "part": args.part and "/".join(map(str, args.part)),
        "fields": args.fields and ",".join(args.fields),
        "output": args.output and args.output[len(os.path.splitext(sources.without_gz(args.output))[0]) :],
        "input_format": source.form,
        "input": fingerprint(args.input_file) if source.seekable else None,
    }


def fingerprint(path):
    """Size and hash of a file's ends: enough to tell that it was exchanged, and read at once."""
    with open(path, "rb") as file:
        begin, size = file.read(1 << 20), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 20)))
        return f"{size} bytes {hashlib.sha256(begin + file.read()).hexdigest()[:12]}"


class Answers:
    """Makes the bytes that answer a Window. Raises: UserError for --fields that there are not.

    Args: pairs: whether the texts are sentence pairs. first: Window with the first records of the input.
    """

    def __init__(self, args, model, pairs, first):
        self.task, self.fields, self.part = model.task, args.fields, args.part
        self.json = json.JSONEncoder(ensure_ascii=False).encode
        self.as_table = bool(args.output) and sources.without_gz(args.output).endswith(".tsv")
        self.compressed = bool(args.output) and args.output.endswith(".gz")
        # Which fields the objective answers is seen from an answer; which ones are passed through, from a record.
        example = batching.Example("", "" if pairs else None, None, 0)
        logits = np.zeros((1, len(self.task.labels)), "float32")
        passed = next((row.fields for row in first.rows if row.example), {})
        shown = self._answers([sources.Row(0, example, passed)], logits)[0]
        for name in self.fields or ():
            if name not in shown and name != "error":
                raise UserError(f"--fields {name}: the answers have no such field, but {', '.join(shown)}, error")
        if self.as_table:
            simple = [name for name, value in shown.items() if not isinstance(value, (dict, list))]
            self.fields = [name for name in self.fields or simple if name != "error"]
        if self.fields:  # a line that cannot be classified is always told
            self.fields = list(dict.fromkeys([*self.fields, "error"]))

    def header(self):
        """The bytes in front of all answers, which are those of the first part."""
        if not self.as_table or (self.part and self.part[0] > 1):
            return b""
        return self._bytes([dict(zip(self.fields, self.fields))])

    def of(self, window, logits):
        """The bytes that answer a Window. Args: logits: [examples, outputs]; None if nothing in it is classified."""
        return self._bytes(self._answers(window.rows, logits))

    def _answers(self, rows, logits):
        task, answers = self.task, []
        found = iter(() if logits is None else task.objective.answers(logits, task.labels))
        for row in rows:
            if row.example:
                answer = texts.with_texts(row.example, next(found), task.labels, task.label_names)
                answers.append({**row.fields, **answer} if row.fields else answer)
            else:
                answers.append({**row.fields, "error": row.error})
        return answers

    def _bytes(self, answers):
        if self.as_table:
            table = io.StringIO()
            rows = csv.writer(table, "excel-tab", lineterminator="\n")
            rows.writerows([self._cell(answer.get(name)) for name in self.fields] for answer in answers)
            content = table.getvalue()
        else:
            content = "".join(map(self._line, answers))
        # A lone surrogate, which an escape in JSON can bring in, is written as that escape again.
        content = content.encode("utf-8", "backslashreplace")
        # One gzip member per window: members can be joined and cut off. Without the time, the same bytes every time.
        return gzip.compress(content, 6, mtime=0) if self.compressed and content else content

    def _line(self, answer):
        if self.fields:
            answer = {name: answer[name] for name in self.fields if name in answer}
        try:
            return f"{self.json(answer)}\n"
        except RecursionError:
            return self.json({"error": sources.TOO_DEEP}) + "\n"

    def _cell(self, value):
        return self.json(value) if isinstance(value, (dict, list, bool)) else value


class Progress:
    """Lines on standard error: answers, rate, time left; and the first line that could not be classified.

    Args: done: outputs.Done, from where this process goes on. begin, end: of what is to be read, as ends_of gives them.
    """

    def __init__(self, args, source, done, begin, end):
        self.source, self.before, self.begin, self.end, self.path = source, done, begin, end, args.input_file
        self.started = self.shown = time.monotonic()
        self.on_terminal, self.noted = sys.stderr.isatty(), False
        # Answers on the same terminal show the progress by themselves.
        self.silent = self.on_terminal and not args.output and sys.stdout.isatty()
        self.fraction_before = self._fraction(done)

    def _fraction(self, done):
        if not self.end:
            return self.source.fraction()
        return (done.position.offset - self.begin.offset) / max(1, self.end.offset - self.begin.offset)

    def show(self, done, window):
        if done.errors and not self.noted:
            self.noted = True
            row = next((row for row in window.rows if row.error), None)
            if row:
                self._print(f"{described(self.path, row)}; lines like this one are answered with an error")
        now = time.monotonic()
        if self.silent or now - self.shown < PROGRESS_SECONDS[not self.on_terminal]:
            return
        self.shown, seconds, fraction = now, now - self.started, self._fraction(done)
        line = f"{done.answers} answers, {(done.answers - self.before.answers) / seconds:.0f} per second"
        if fraction and fraction > self.fraction_before:
            left = seconds * (1 - fraction) / (fraction - self.fraction_before)
            line += f", {100 * fraction:.1f} % of the input, {datetime.timedelta(seconds=round(left))} left"
        self._print(line, end="\r" if self.on_terminal else "\n")

    def finish(self, done):
        seconds, answers = time.monotonic() - self.started, done.answers - self.before.answers
        line = f"{done.answers} answers, {done.errors} of them errors; "
        self._print(f"{line}{answers} in {seconds:.1f} s, {answers / seconds:.0f} per second")

    def _print(self, line, end="\n"):
        clear = "\x1b[K" if self.on_terminal else ""
        print(f"{line}{clear}", end=end, file=sys.stderr, flush=True)
