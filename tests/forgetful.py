"""A file system that forgets what was not synced: what a disk may hold after a power cut, for tests/test_power_loss.py.

    disk = Disk()                                     # in memory
    with mounted(path, disk):                         # needs root and /dev/fuse, nothing else
        ...                                           # a program writes below path
    for moment in range(len(disk.log) + 1):
        disk.after_cut(moment, random.Random(1)).write_to(directory)

The file system takes down every change and every fsync. From that, after_cut makes a state in which the disk could be
if the power had failed between two of them. It promises no more than POSIX does:

- fsync of a file makes its content durable, but not its name; fsync of a directory makes durable which names are in it, but
  not what is in these files, nor the name of the directory itself (man 2 fsync, under DESCRIPTION: a file's entry needs an
  fsync of its directory). close makes nothing durable (man 2 close, under NOTES).
- What was not synced may be there, too: the kernel writes back when it likes to. Of a file, all later writes may be there,
  none, some, or its new size with zeros in their place. With delayed allocation (ext4, XFS, Btrfs) a rename may be durable
  before the renamed file has any block. ext4's mount option auto_da_alloc cures that for one file that replaces another
  (Linux kernel, Documentation/admin-guide/ext4.rst), but for no file in a directory that is renamed.
- A change of names is atomic: after a rename a file has the old name, or the new one. It does not depend on what is in a
  directory that is renamed or removed. Changes that were not synced are durable up to one of them (a journal, as in ext4,
  XFS and Btrfs), or any subset of them (POSIX, which has no order).
"""

import contextlib
import copy
import ctypes
import errno
import os
import stat
import struct
import subprocess
import time

from kill_at import FORKS

# The kernel's protocol: include/uapi/linux/fuse.h, version 7.31. Numbers of requests, and what stands before the names.
LOOKUP, FORGET, GETATTR, SETATTR, MKDIR, UNLINK, RMDIR, RENAME = 1, 2, 3, 4, 9, 10, 11, 12
OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT = 14, 15, 16, 17, 18, 20, 25, 26
OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, CREATE, INTERRUPT, BATCH_FORGET, RENAME2 = 27, 28, 29, 30, 35, 36, 42, 45
REQUEST = struct.Struct("=IIQQ16x")  # length, request, its number, node
ATTRIBUTES = struct.Struct("=6Q10I")
BIG_WRITES, MAX_PAGES = 1 << 5, 1 << 22
SET_MODE, SET_SIZE = 1 << 0, 1 << 3
LARGEST = 1 << 20  # bytes that are written at a time
FOREVER = 1 << 30  # seconds for which the kernel may keep what it was told: nobody else changes anything
ROOT = 1  # the number of the root directory


class Node:
    """A file (``content``: bytearray) or a directory (``entries``: {name: number of a node})."""

    def __init__(self, mode):
        self.mode, self.time = mode, int(time.time())
        self.content, self.entries = bytearray(), {}

    def is_directory(self):
        return stat.S_ISDIR(self.mode)


class Disk:
    """The nodes by their numbers, and the log of what happened to them since ``start``.

    The log has ("write", node, offset, bytes), ("truncate", node, size), ("link", directory, name, node),
    ("unlink", directory, name, node), ("rename", directory, name, node, new directory, new name), ("sync", node) and
    ("look", name), which is that someone asked for a name that is not there.
    """

    def __init__(self):
        self.nodes = {ROOT: Node(stat.S_IFDIR | 0o755)}
        self.start()

    def start(self):
        """All that is there now counts as durable."""
        self.durable, self.log = copy.deepcopy(self.nodes), []

    def add(self, directory, name, mode):
        number = len(self.nodes) + 1
        self.nodes[number] = Node(mode)
        self.nodes[directory].entries[name] = number
        return number

    def read_from(self, path, number=ROOT):
        """Puts what is in a directory on the disk."""
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            child = self.add(number, entry.name, entry.stat().st_mode)
            if entry.is_dir():
                self.read_from(entry.path, child)
            else:
                with open(entry.path, "rb") as file:
                    self.nodes[child].content[:] = file.read()

    def write_to(self, path, number=ROOT):
        """Writes the disk into a directory of another file system, which must not be there."""
        os.mkdir(path)
        for name, child in self.nodes[number].entries.items():
            target, node = os.path.join(path, name), self.nodes[child]
            if node.is_directory():
                self.write_to(target, child)
            else:
                with open(target, "wb") as file:
                    file.write(node.content)
                os.chmod(target, stat.S_IMODE(node.mode))

    def after_cut(self, moment, rng):
        """The Disk after a power cut between the changes ``moment`` - 1 and ``moment`` of the log.

        Args: rng: random.Random, which decides about what is not promised.
        """
        happened = list(enumerate(self.log[:moment]))
        synced = {change[1]: i for i, change in happened if change[0] == "sync"}  # the last time
        names = [(i, change) for i, change in happened if change[0] in ("link", "unlink", "rename")]

        def is_durable(i, change):
            return any(synced.get(directory, -1) > i for directory in (change[1], *change[4:5]))

        durable = [i for i, change in names if is_durable(i, change)]
        if rng.random() < 0.5:  # a journal: everything before a durable change is durable, and perhaps some after it
            left = [i for i, _ in names if i > max(durable, default=-1)]
            kept = {i for i, _ in names} - set(left[rng.randint(0, len(left)) :])
        else:
            share = rng.choice((0, 0.5, 1))
            kept = {i for i, _ in names if rng.random() < share} | set(durable)
        new = Disk()
        new.nodes = {number: Node(node.mode) for number, node in self.nodes.items()}
        new.nodes.update(copy.deepcopy(self.durable))
        for i, change in names:
            if i in kept:
                new.change(*change)
        kinds = rng.choice((("all",), ("none",), ("zeros",), ("some",), ("all", "none", "zeros", "some")))
        fates = {number: rng.choice(kinds) for number in self.nodes}
        for i, (kind, number, *what) in happened:
            if kind not in ("write", "truncate"):
                continue
            fate = "all" if synced.get(number, -1) > i else fates[number]
            if fate == "zeros" and kind == "write":
                what[1] = bytes(len(what[1]))
            if fate in ("all", "zeros") or (fate == "some" and rng.random() < 0.5):
                new.change(kind, number, *what)
        return new

    def change(self, kind, number, *what):
        """Makes a change of the log, as far as it can be made in this state. Args: number: of the first node in it."""
        node = self.nodes[number]
        if kind == "write":
            offset, data = what
            node.content.extend(bytes(max(0, offset - len(node.content))))
            node.content[offset : offset + len(data)] = data
        elif kind == "truncate":
            (size,) = what
            del node.content[size:]
            node.content.extend(bytes(size - len(node.content)))
        elif kind == "link":
            name, child = what
            node.entries[name] = child
        else:
            name, child, *to = what
            if node.entries.get(name) == child:
                del node.entries[name]
            if to:
                self.nodes[to[0]].entries[to[1]] = child


class Server:
    """Answers the kernel's requests for a Disk that is mounted."""

    def __init__(self, disk):
        self.disk = disk

    def serve(self, device):
        """Until the file system is unmounted. Args: device: /dev/fuse, open, which was mounted."""
        while True:
            try:
                message = os.read(device, LARGEST + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                raise
            _, request, unique, number = REQUEST.unpack_from(message)
            if request in (FORGET, BATCH_FORGET, INTERRUPT):  # these want no answer
                continue
            try:
                answer, status = self.answer(request, number, message[40:]), 0
            except OSError as error:
                answer, status = b"", -error.errno
            os.write(device, struct.pack("=IiQ", 16 + len(answer), status, unique) + answer)

    def answer(self, request, number, body):
        """The answer to a request. Raises: OSError with the number of the error that the caller is to get."""
        disk = self.disk
        node = disk.nodes.get(number)
        if request == INIT:
            offer = struct.unpack_from("=I", body, 12)[0] & (BIG_WRITES | MAX_PAGES)
            return struct.pack("=4I2H2I2H", 7, 31, 1 << 20, offer, 16, 12, LARGEST, 1, LARGEST >> 12, 0) + bytes(32)
        if request == LOOKUP:
            name = self.names(body)[0]
            if name not in node.entries:
                disk.log.append(("look", name))
                raise OSError(errno.ENOENT, "")
            return self.entry(node.entries[name])
        if request in (GETATTR, SETATTR):
            valid, size = struct.unpack_from("=I12xQ", body) if request == SETATTR else (0, 0)
            if valid & SET_MODE:
                node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(struct.unpack_from("=I", body, 68)[0])
            if valid & SET_SIZE:
                self.log("truncate", number, size)
            return struct.pack("=QII", FOREVER, 0, 0) + self.attributes(number)
        if request in (MKDIR, CREATE):
            (mode,) = struct.unpack_from("=4xI" if request == CREATE else "=I", body)
            (name,) = self.names(body[16 if request == CREATE else 8 :])
            kind = stat.S_IFDIR if request == MKDIR else stat.S_IFREG
            child = disk.add(number, name, kind | (stat.S_IMODE(mode)))
            disk.log.append(("link", number, name, child))
            return self.entry(child) + (bytes(16) if request == CREATE else b"")
        if request in (UNLINK, RMDIR):
            (name,) = self.names(body)
            child = node.entries[name]
            if request == RMDIR and disk.nodes[child].entries:
                raise OSError(errno.ENOTEMPTY, "")
            self.log("unlink", number, name, child)
            return b""
        if request in (RENAME, RENAME2):
            if request == RENAME2 and struct.unpack_from("=8xI", body)[0]:  # flags
                raise OSError(errno.EINVAL, "")
            (target,) = struct.unpack_from("=Q", body)
            name, new_name = self.names(body[16 if request == RENAME2 else 8 :])
            there = disk.nodes.get(disk.nodes[target].entries.get(new_name))
            if there and there.entries:
                raise OSError(errno.ENOTEMPTY, "")
            self.log("rename", number, name, node.entries[name], target, new_name)
            return b""
        if request in (OPEN, OPENDIR):
            return bytes(16)
        if request == READ:
            offset, size = struct.unpack_from("=8xQI", body)
            return bytes(node.content[offset : offset + size])
        if request == WRITE:
            offset, size = struct.unpack_from("=8xQI", body)
            self.log("write", number, offset, body[40 : 40 + size])
            return struct.pack("=II", size, 0)
        if request == READDIR:
            return self.listing(node, *struct.unpack_from("=8xQI", body))
        if request in (FSYNC, FSYNCDIR):
            disk.log.append(("sync", number))
            return b""
        if request == STATFS:
            return struct.pack("=5Q4I24x", 1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 4096, 255, 4096, 0)
        if request in (FLUSH, RELEASE, RELEASEDIR):
            return b""
        raise OSError(errno.ENOSYS, "")  # links, extended attributes and so on: the kernel goes on without them

    def log(self, *change):
        self.disk.log.append(change)
        self.disk.change(*change)

    def names(self, body):
        return [os.fsdecode(name) for name in body.split(b"\0")[:-1]]

    def attributes(self, number):
        node = self.disk.nodes[number]
        size, now = len(node.content), node.time
        numbers = (number, size, (size + 511) // 512, now, now, now, 0, 0, 0, node.mode, 1, 0, 0, 0, 4096, 0)
        return ATTRIBUTES.pack(*numbers)

    def entry(self, number):
        return struct.pack("=4Q2I", number, 0, FOREVER, FOREVER, 0, 0) + self.attributes(number)

    def listing(self, node, offset, size):
        found = b""
        # By the numbers of the nodes: no name is left out or given twice if others are removed in between.
        for child, name in sorted((child, os.fsencode(name)) for name, child in node.entries.items()):
            if child <= offset:
                continue
            one = struct.pack("=QQII", child, child, len(name), self.disk.nodes[child].mode >> 12) + name
            one += bytes(-len(one) % 8)
            if len(found) + len(one) > size:
                break
            found += one
        return found


def serve(disk, path, pipe):
    """In a process of its own: mounts the disk at a path, and sends it back once it is unmounted."""
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"forgetful", os.fsencode(path), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    Server(disk).serve(device)
    pipe.send(disk)


class CannotMount(Exception):
    """Not root, or no FUSE in this kernel."""


@contextlib.contextmanager
def mounted(path, disk):
    """Mounts a Disk at a directory, which is made. After the block, the disk is as it was left, with its log.

    Raises: CannotMount.
    """
    os.makedirs(path)
    disk.start()
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=serve, args=(disk, str(path), theirs), daemon=True)
    process.start()
    theirs.close()
    problem = ours.recv()
    if problem:
        raise CannotMount(problem)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)
        disk.__dict__.update(ours.recv().__dict__)
        process.join()
        os.rmdir(path)
