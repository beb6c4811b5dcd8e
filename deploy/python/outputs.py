"""Where answers go: to standard output, or to a file that appears when it is complete and survives power cuts.

What infer.py --output FILE leaves
    FILE.unfinished   answers so far, renamed to FILE at the end
    FILE.run.json     what makes the answers (model, options, input), and how far they go; it stays
"""

import contextlib
import glob
import os
import sys
import time
from typing import NamedTuple

from common import UserError, files, provenance, sources

CHECKPOINT_SECONDS = 1  # how much work a kill costs, at most, and a window


class Done(NamedTuple):
    """How far the answers go."""

    position: sources.Position  # in the input
    answers: int = 0  # to lines that could not be classified, too
    errors: int = 0  # how many of the answers are these
    bytes: int = 0  # of the output


class Printed:
    """Standard output; ``done`` tells how far it goes. Args: begin: Position of the first record."""

    finished = False

    def __init__(self, begin):
        self.done = Done(begin)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, content, window):
        """Args: content: the bytes that answer a sources.Window."""
        self._put(content)
        _, answers, errors, size = self.done
        errors += sum(row.error is not None for row in window.rows)
        self.done = Done(window.end, answers + len(window.rows), errors, size + len(content))

    def _put(self, content):
        print(content.decode("utf-8"), end="", flush=True)

    def finish(self):
        pass


class Written(Printed):
    """A file. ``finished``: an earlier run of the same command has written it.

    Args: run: what makes the answers, a flat dict. header: bytes in front of them. resumable: whether the input can be
        read again from somewhere. overwrite: whether answers of another run may be replaced.
    Raises: UserError if another process writes there, or if what is there is another run's.
    """

    def __init__(self, path, run, header, begin, resumable, overwrite):
        super().__init__(begin)
        self.path, self.unfinished, self.record_path = path, f"{path}.unfinished", f"{path}.run.json"
        self.directory = os.path.dirname(os.path.abspath(path))
        self.run, self.file, self.seconds_before = run, None, 0
        self.started = self.saved = time.monotonic()
        self.lock = files.Lock(path)
        try:
            for left in glob.glob(f"{glob.escape(self.record_path)}.writing-*"):  # by a run that was killed
                os.remove(left)
            record = files.read_json_object(self.record_path) if os.path.exists(self.record_path) else {}
            if not (resumable and record.get("run") == run and self._resume(record)):
                self._check_replaceable(record.get("run"), resumable, overwrite)
                self._begin(header)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # of a full disk, which was reported already
            if self.file:
                self.file.close()
        self.lock.release()

    def _resume(self, record):
        """Goes on behind the last checkpoint of the same run, or finds it finished. Returns: whether either is so."""
        position, *counts = record["done"]
        done = Done(sources.Position(*position), *counts)
        path = self.unfinished if os.path.isfile(self.unfinished) else self.path
        size = os.path.getsize(path) if os.path.isfile(path) else -1
        if record["finished"] and size == done.bytes:
            if path == self.unfinished:  # killed before it was renamed
                self._rename()
            self.finished = True
            print(f"{self.path}: finished already, {done.answers} answers; nothing to do", file=sys.stderr)
        elif path == self.unfinished and size >= done.bytes and not record["finished"]:
            self.file = open(path, "r+b")  # noqa: SIM115  closed by __exit__
            self.file.truncate(done.bytes)  # behind the checkpoint there may be half a line
            self.file.seek(done.bytes)
            print(f"{self.path}: going on behind answer {done.answers}", file=sys.stderr)
        else:
            return False
        self.done, self.seconds_before = done, record["seconds"]
        return True

    def _check_replaceable(self, run, resumable, overwrite):
        # Answers to standard input that were not finished cannot be continued, so nobody misses them.
        other_unfinished = run and run["input"] and run != self.run and os.path.exists(self.unfinished)
        if overwrite or not (os.path.exists(self.path) or other_unfinished):
            return
        why = "nothing says how they were made"
        if run:
            why = provenance.difference(run, self.run) or "which were changed"
        if not resumable:
            why = "standard input cannot be compared with theirs"
        raise UserError(f"--output {self.path}: holds answers already ({why}); name another file, or add --overwrite")

    def _begin(self, header):
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.record_path)
        files.sync(self.directory)  # before there are other answers for which the old record could be taken
        self.file = open(self.unfinished, "wb")  # noqa: SIM115
        self.file.write(header)
        self.done = self.done._replace(bytes=len(header))
        self._save()

    def _save(self, finished=False):
        """Makes a checkpoint: first the answers are on the disk, then the record that tells how far they go."""
        self.file.flush()
        os.fsync(self.file.fileno())
        seconds = round(self.seconds_before + time.monotonic() - self.started, 3)
        files.write_json(
            self.record_path, {"run": self.run, "finished": finished, "done": self.done, "seconds": seconds}
        )
        self.saved = time.monotonic()

    def write(self, content, window):
        super().write(content, window)
        if time.monotonic() - self.saved >= CHECKPOINT_SECONDS:
            self._save()

    def _put(self, content):
        self.file.write(content)

    def finish(self):
        self._save(finished=True)
        self._rename()

    def _rename(self):
        os.replace(self.unfinished, self.path)
        files.sync(self.directory)
