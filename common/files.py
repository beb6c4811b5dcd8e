"""Files and directories that appear whole or not at all, also after a power cut; locks, hashes, JSON lines."""

import codecs
import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil

from common import ROOT, UserError

BOM = codecs.BOM_UTF8  # the byte order mark with which Windows editors begin a file
BAD_ENCODING = NUL_BYTES, NOT_UTF_8 = "holds NUL bytes", "not UTF-8"  # how messages about the encoding begin


def relative(path):
    """The name of a path in records: relative to the repository; outside of it, its last two components (only the
    last one if the other could be a user name)."""
    path = os.path.abspath(path)
    if path == ROOT or path.startswith(ROOT + os.sep):
        return os.path.relpath(path, ROOT)
    parent = os.path.dirname(path)
    in_home = parent == os.path.expanduser("~") or os.path.dirname(parent) == "/home"
    kept = 1 if in_home else 2
    return os.path.join("...", *path.split(os.sep)[-kept:])


def sync(path):
    """Waits until a file's content is on the disk; of a directory, which names are in it, and of which files.

    A power cut may undo everything else, in any order: a renamed file may be there under its new name, and be empty.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not sync directories, and say so by EINVAL. Nothing better can be done there.
        if error.errno != errno.EINVAL or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory):
    """Waits until all that is in a directory is on the disk; not the name of the directory itself."""
    for path, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(os.path.join(path, name))
        sync(path)


class Lock:
    """Held by one process at a time while it writes ``target``. The kernel releases it when the process ends.

    Args: path: the file to lock (default: hidden beside the target). wait: until another process releases the lock.
    Raises: UserError if another process holds the lock and ``wait`` is False.
    """

    def __init__(self, target, path=None, wait=False):
        (beside,) = leftovers_of(target, "lock")
        parent = os.path.dirname(beside)
        if os.path.isdir(target) and not os.access(parent, os.W_OK):
            beside = os.path.join(target, ".lock")
        self.path, self.made_directories = path or beside, []
        parent = os.path.dirname(self.path)
        while not os.path.isdir(parent):
            self.made_directories.append(parent)
            parent = os.path.dirname(parent)
        while True:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            for directory in self.made_directories:  # a result is not to be lost with a directory above it
                sync(os.path.dirname(directory))
            self.file = open(self.path, "w")  # noqa: SIM115  kept open: the lock lasts as long as the file is open
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                self.file.close()
                if isinstance(error, BlockingIOError):
                    raise UserError(f"{target}: another run is writing there") from None
                raise UserError(f"{target}: its file system has no locks ({error.strerror}); write elsewhere") from None
            if self.is_current():
                return
            self.file.close()  # the process that held the lock has removed the file by now: make a new one

    def is_current(self):
        """Whether the locked file is still the one at its path."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        return False

    def release(self):
        if self.file.closed:
            return
        with contextlib.suppress(OSError):  # the disk may be read-only by now; the first error is the one to report
            if self.is_current():
                os.remove(self.path)
        self.file.close()
        for directory in self.made_directories:
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                continue
            except OSError:  # not empty: the output is in it
                break

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


@contextlib.contextmanager
def empty_directory(path):
    """Makes the directory ``path``, removing an earlier one, and removes it again when the block ends."""
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def leftovers_of(target, *states):
    """The paths that kill -9 may leave beside a directory: hidden, so that no launcher's glob matches them."""
    parent, name = os.path.split(os.path.realpath(target))
    return [os.path.join(parent, f".{name}.{state}") for state in states]


@contextlib.contextmanager
def whole_directory(target, wait=False):
    """A temporary directory beside ``target`` that takes its place when the block ends without an error.

    An existing ``target`` is replaced. So it is there whole or not at all, also after kill -9 or a power cut. After one
    between the two renames, ``target`` is missing for readers until put_back or the next whole_directory; what it held
    lies whole in ``.NAME.old``.

    Args: wait: until another process that writes the same target has finished. Raises: UserError if not, and one is.
    """
    target = os.path.realpath(target)  # if it is a link, the directory that it points to is replaced
    temporary, old = leftovers_of(target, "writing", "old")
    with Lock(target, wait=wait):
        if os.path.isdir(old):
            _settle(target)
        with empty_directory(temporary):
            yield temporary
            sync_tree(temporary)  # before it gets the name that says that it is whole
            if os.path.isdir(target):
                os.rename(target, old)
            try:
                os.rename(temporary, target)
            finally:
                _settle(target)  # also puts back what was there, if that failed


def _settle(target):
    """Makes the names beside ``target`` durable, then removes what is not needed. The caller has locked ``target``.

    If ``target`` is missing, what it held is put back. The two renames have to be on the disk before the old files are
    removed: a power cut may undo renames, but a file that was removed is gone.
    """
    temporary, old = leftovers_of(target, "writing", "old")
    if os.path.isdir(old) and not os.path.exists(target):  # stopped between the two renames of whole_directory
        os.rename(old, target)
    sync(os.path.dirname(old))
    if os.path.isdir(old):
        remove_directory(old, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(path, temporary=None):
    """Removes a directory: under its name it is there whole or not at all, also after kill -9 or a power cut.

    Args: temporary: its name while it is removed file by file (default: that which whole_directory writes under).
    """
    temporary = temporary or leftovers_of(path, "writing")[0]
    shutil.rmtree(temporary, ignore_errors=True)
    os.rename(path, temporary)
    sync(os.path.dirname(temporary))
    shutil.rmtree(temporary, ignore_errors=True)


def put_back(target):
    """Renames a directory back to ``target`` if a run was stopped in the moment in which it was replacing it."""
    (old,) = leftovers_of(target, "old")
    if os.path.isdir(old) and not os.path.exists(target):
        with Lock(target, wait=True):
            _settle(target)


def clear_leftovers(target):
    """Removes what a run left beside ``target`` if it was killed after ``target`` was complete."""
    if any(map(os.path.exists, leftovers_of(target, "lock", "writing", "old"))):
        with Lock(target, wait=True):
            _settle(target)


def write_whole(path, content):
    """Writes a file under a temporary name beside its path, then renames it. When this returns, it is on the disk.

    Args: content: a text, or bytes.
    """
    temporary = f"{path}.writing-{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(os.path.dirname(os.path.abspath(path)))
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_array(path, array):
    """Writes a .npy file whole."""
    import numpy as np

    content = io.BytesIO()
    np.save(content, array)
    write_whole(path, content.getvalue())


def write_arrays(path, **arrays):
    """Writes an .npz file whole: the same bytes for the same arrays."""
    import numpy as np

    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, content.getvalue())


def write_json(path, content):
    write_whole(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def write_json_lines(path, rows):
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path, name=None, advice=""):
    """The content of a JSON file. Args: name: of the file in messages. Raises: UserError if it is not JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise UserError(f"{name or path}: not JSON ({error}){advice}") from error


def read_json_object(path):
    """The content of a JSON file, a dict. Raises: UserError if it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a JSON object ({error})") from error


def decode_line(line, encoding="utf-8"):
    """The text of a line of bytes, without the line end. Raises: ValueError if it is not UTF-8, or holds NUL bytes."""
    if b"\0" in line:
        raise ValueError(NUL_BYTES)
    try:
        return line.decode(encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{NOT_UTF_8} ({error.reason} at byte {error.start} of the line)") from error


def encoding_advice(error, path):
    """What mends a file with a line that decode_line refuses, to append to the message that it gave."""
    if error == NUL_BYTES:
        return f"; if the file is UTF-16, iconv -f UTF-16 -t UTF-8 {path} > NEW mends it"
    return f"; if it is GBK, iconv -f GB18030 -t UTF-8 {path} > NEW mends it"


def read_text_lines(path):
    """Yields (line number, text of the line without its end) of a UTF-8 file; a byte order mark and CRLF are read as
    what they are, habits of Windows editors. Raises: UserError naming file, line and the way out for another encoding.
    """
    with open(path, "rb") as file:  # in bytes: text mode would also end lines at a lone CR
        for number, line in enumerate(file, 1):
            try:
                yield number, decode_line(line, "utf-8-sig" if number == 1 else "utf-8")
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}{encoding_advice(str(error), path)}") from error


def windows_form(path):
    """What a Windows editor has left in a text file, for a record; None if nothing."""
    with open(path, "rb") as file:
        first = file.readline()
    found = [(first.startswith(BOM), "a byte order mark"), (first.endswith(b"\r\n"), "CRLF line ends")]
    return ", ".join(what for is_there, what in found if is_there) or None


def _without_repeated_keys(pairs):
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return row


def parse_object(line):
    """The JSON object in a line. Raises: ValueError if the line holds none."""
    try:
        row = json.loads(line, object_pairs_hook=_without_repeated_keys)
    except ValueError as error:
        raise ValueError(f"not a JSON object ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, not {type(row).__name__}")
    return row


def read_json_lines(path):
    """Yields (line number, JSON object) of a file with one object per line. Raises: UserError naming file and line."""
    for number, line in read_text_lines(path):
        if not line.strip():
            continue
        try:
            yield number, parse_object(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from error


# Columns of tables, by the header: what they are in a JSON line.
COLUMNS = {"text": "sentence", "sentence": "sentence", "sentence1": "sentence1", "sentence2": "sentence2"}
COLUMNS.update(label="label", id="id")
TABLES = {".csv": "excel", ".tsv": "excel-tab"}  # dialects of the csv module: quotes are honoured in both


def read_rows(path):
    """Yields (line number, record) of a file of records: JSON lines, or a table (.csv, .tsv) whose header names its
    columns: text or sentence, or sentence1 and sentence2; label; id. Raises: UserError naming file and line.
    """
    dialect = TABLES.get(os.path.splitext(path)[1])
    if not dialect:
        yield from read_json_lines(path)
        return
    lines = read_text_lines(path)
    # The csv module counts the lines that it was given, so a record in quotes may go over several.
    reader = csv.reader((f"{line}\n" for _, line in lines), dialect, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        names = [COLUMNS.get(name) for name in header]
        if None in names or len(set(names)) < len(names) or not {"sentence", "sentence1"} & set(names):
            raise UserError(
                f"{path}:1: header {header}; text,label or sentence1,sentence2,label is needed (id may follow)"
            )
        before = reader.line_num
        for fields in reader:
            number, before = before + 1, reader.line_num
            if not fields:
                continue
            if len(fields) != len(names):
                raise UserError(
                    f"{path}:{number}: {len(fields)} fields, the header has {len(names)}: {', '.join(header)}"
                )
            yield number, dict(zip(names, fields))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not a table ({error})") from error


def copy_files(source, target):
    for name in os.listdir(source):
        shutil.copy2(os.path.join(source, name), target)


def file_hash(path):
    """sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def hash_files(directory, names):
    """{file name: sha256}"""
    return {name: file_hash(os.path.join(directory, name)) for name in names}
