"""A file of texts, or standard input, read window by window: memory does not grow with its length.

    source = Source("titles.jsonl.gz", "TNEWS", data.own_texts_of)
    for window in source.windows(2048):          # lists of Row: an Example to classify, or what is wrong with the line
        ...
    source.seek(window.end)                      # later, in another process: go on behind that window

The same input always gives the same windows, wherever reading began.
"""

import csv
import gzip
import os
import sys
import zlib
from typing import NamedTuple, Optional

from common import UserError, batching, files

FORMS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "tsv"}  # by the ending; anything else is text
DIALECTS = {ending[1:]: dialect for ending, dialect in files.TABLES.items()}
# Not passed through: an answer has the texts as text and text_pair, and an error is one of its own.
TEXT_FIELDS = {"text", "text_pair", "sentence", "sentence1", "sentence2", "error"}

# Bounds of what is held at a time. Models read at most 512 tokens, which are some kilobytes.
LONGEST_LINE = 1 << 20  # bytes
WINDOW_BYTES = 16 << 20  # a window of long lines ends early

TOO_DEEP = "JSON that is nested too deeply"


def without_gz(path):
    return path[:-3] if path.lower().endswith(".gz") else path


class Position(NamedTuple):
    """A place between two records: what is before it, without compression."""

    offset: int = 0  # bytes
    line: int = 0  # lines


class Row(NamedTuple):
    line: int  # where the record begins, from 1
    example: Optional[batching.Example]  # None if the record cannot be classified
    fields: dict  # beside the texts; of a record that cannot be classified, all that could be read
    error: Optional[str] = None


class Window(NamedTuple):
    rows: list  # of Row
    end: Position

    def examples(self):
        return [row.example for row in self.rows if row.example]


class Source:
    """Texts in lines (a tab before the second one of a pair), JSON lines or a table; gzip is known by its content.

    Args: path: - is standard input. task_name, texts_of: as data.texts_of, which finds the texts of a record.
        form: text, json, csv or tsv (default: what the ending of the path says).
    Raises: UserError for a table without a usable header, for UTF-16, and, later, for damaged gzip data.
    """

    pairs = None  # whether sentence pairs are wanted; None: the first text decides

    def __init__(self, path, task_name, texts_of, form=None):
        self.path, self.task_name, self.texts_of = path, task_name, texts_of
        self.form = form or FORMS.get(os.path.splitext(without_gz(path))[1].lower(), "text")
        self.raw = open(sys.stdin.fileno() if path == "-" else path, "rb", closefd=path != "-")  # noqa: SIM115
        self.seekable = path != "-" and self.raw.seekable()
        self.compressed = self.raw.peek(2)[:2] == b"\x1f\x8b"
        self.file = gzip.GzipFile(fileobj=self.raw) if self.compressed else self.raw
        self.position, self.too_long, self.columns = Position(), False, None
        if self._guarded(lambda: self.file.peek(2))[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: {files.NUL_BYTES}{files.encoding_advice(files.NUL_BYTES, path)}")
        if self.form in DIALECTS:
            _, header = next(self._records(), (1, []))
            self.columns = [name.strip() for name in header] if isinstance(header, list) else []
            unique = len(set(self.columns)) == len(self.columns)
            if not unique or not {"text", "sentence", "sentence1"} & set(self.columns):
                raise UserError(
                    f"{path}:1: header {self.columns}; text, or sentence, or sentence1 and sentence2 must be among the "
                    "columns, and each name once"
                )
        self.beginning = self.position  # of the records

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.raw.close()

    def seek(self, position):
        self._guarded(lambda: self.file.seek(position.offset))  # gzip data is read up to there
        self.position, self.too_long = position, False

    def fraction(self):
        """How much of the file has been read, from 0 to 1; None if its size is not known."""
        size = os.fstat(self.raw.fileno()).st_size if self.seekable else 0
        return (self.raw.tell() if self.compressed else self.position.offset) / size if size else None

    def windows(self, size, end=None, parse=None):
        """Yields each Window of ``size`` records up to the Position ``end``. Args: parse: makes a row of a record."""
        records, parse = self._records(), parse or self._row
        while end is None or self.position.offset < end.offset:
            rows, begin = [], self.position.offset
            for line, record in records:
                rows.append(parse(line, record))
                if len(rows) == size or self.position.offset - begin >= WINDOW_BYTES:
                    break
            if not rows:
                return
            yield Window(rows, self.position)

    def part(self, number, count, size):
        """(begin, end) of part ``number`` of ``count``, each a Position between two windows. Reads the file twice."""
        begin = self.position
        windows = sum(1 for _ in self.windows(size, parse=lambda *_: None))
        first, last = windows * (number - 1) // count, windows * number // count
        self.seek(begin)
        ends = [begin, begin]  # of the windows before the part, and of those in it, too
        for place, window in enumerate(self.windows(size, parse=lambda *_: None), 1):
            if place > last:
                break
            ends = [window.end if place <= first else ends[0], window.end]
        return ends

    def _guarded(self, read):
        try:
            return read()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{self.path}: damaged gzip data behind line {self.position.line} ({error})") from error

    def _read_line(self):
        """The next line as bytes, empty at the end; of a line that is too long, its beginning."""
        line = self._guarded(lambda: self.file.readline(LONGEST_LINE))
        length, rest = len(line), line
        while len(rest) == LONGEST_LINE and not rest.endswith(b"\n"):
            rest = self._guarded(lambda: self.file.readline(LONGEST_LINE))
            length += len(rest)
        self.too_long = self.too_long or length > LONGEST_LINE
        self.position = Position(self.position.offset + length, self.position.line + bool(line))
        if self.position.line == 1 and line.startswith(files.BOM):
            line = line[len(files.BOM) :]
        return line

    def _records(self):
        """Yields (line number, record): a line of bytes; of a table, its fields, or the csv.Error that they gave."""
        if self.form not in DIALECTS:
            while line := self._read_line():
                yield self.position.line, line
                self.too_long = False
            return
        # A field in quotes may go over several lines; the csv module reads no line beyond the record. Bytes that are
        # not UTF-8 become surrogates, which _fields finds.
        lines = (line.decode("utf-8", "surrogateescape") for line in iter(self._read_line, b""))
        reader = csv.reader((line.rstrip("\r\n") + "\n" for line in lines), DIALECTS[self.form], strict=True)
        while True:
            number, self.too_long = self.position.line + 1, False
            try:
                yield number, next(reader)
            except csv.Error as error:
                yield number, error
            except StopIteration:
                return

    def _fields(self, record):
        """The record as a dict. Raises: ValueError if it cannot be read."""
        if self.too_long:
            raise ValueError(f"longer than {LONGEST_LINE} bytes")
        if isinstance(record, csv.Error):
            raise ValueError(f"not a row of a table ({record})") from record
        if self.columns:
            files.decode_line("".join(record).encode("utf-8", "surrogateescape"))
            if not any(record):
                raise ValueError("the line is empty")
            if len(record) != len(self.columns):
                raise ValueError(f"{len(record)} fields, the header has {len(self.columns)}")
            return dict(zip(self.columns, record))
        line = files.decode_line(record)
        if not line.strip():
            raise ValueError("the line is empty")
        if self.form == "json":
            return files.parse_object(line)
        text, tab, pair = line.partition("\t")
        return {"text": text, **({"text_pair": pair} if tab else {})}

    def _row(self, number, record):
        fields = {}
        try:
            fields = self._fields(record)
            if self.form == "text":
                text, pair = fields["text"], fields.get("text_pair")
                if not text.strip() or (pair is not None and not pair.strip()):
                    raise ValueError("a text is empty")
            else:
                text, pair = self.texts_of(self.task_name, fields)
            if self.pairs is None:
                self.pairs = pair is not None
            if self.pairs != (pair is not None):
                raise ValueError(f"{self.task_name} takes {'sentence pairs' if self.pairs else 'single texts'}")
        except KeyError as error:
            return Row(number, None, fields, f"no field {error}")
        except RecursionError:
            return Row(number, None, fields, TOO_DEEP)
        except (TypeError, ValueError) as error:
            return Row(number, None, fields, str(error))
        others = {name: value for name, value in fields.items() if name not in TEXT_FIELDS}
        return Row(number, batching.Example(text, pair, None, number), others)
