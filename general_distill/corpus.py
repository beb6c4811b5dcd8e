"""A corpus of text files with one sentence per line, streamed in a shuffled order with constant memory."""

import hashlib
import itertools
import os

import numpy as np

from common import UserError, batching, files, processes
from common.training import group_by_length as sort_into_batches

BLOCK = 50_000  # lines that are held in memory and shuffled together


def make_batch(texts, tokenizer, max_seq_length):
    """(batching.Batch of the texts, without labels; number of its tokens without padding)"""
    features = [batching.Feature(*encoded, None) for encoded in tokenizer.encode(texts, None, max_seq_length)]
    batch = batching.collate(features, range(len(features)), tokenizer.pad_id)
    return batch, sum(len(feature.input_ids) for feature in features)


def assign_files(listings):
    """Assigns files to processes, about evenly in bytes: first those that the fewest have, of these the largest first,
    each to the one with the least so far. What has the same name and content is the same file, and goes to one of them.

    Args: listings: for each process, descriptions ``{"file", "sha256", "bytes"}`` of the files that it can read.
    Returns: for each process, the descriptions of the files that it is to read, in the order of their names.
    """
    holders = {}
    for rank, listing in enumerate(listings):
        for described in listing:
            holders.setdefault((-described["bytes"], described["file"], described["sha256"]), []).append(rank)
    shares, loads = [[] for _ in listings], [0] * len(listings)
    for (size, name, digest), ranks in sorted(holders.items(), key=lambda item: (len(item[1]), item[0])):
        rank = min(ranks, key=lambda rank: (loads[rank], rank))
        shares[rank].append({"file": name, "sha256": digest, "bytes": -size})
        loads[rank] -= size
    return [sorted(share, key=lambda described: (described["file"], described["sha256"])) for share in shares]


class Corpus:
    """The sentences in all files of a directory.

    An epoch contains every non-blank line once. Seed and epoch determine the order of the files, and the order of the
    lines within each block of 50,000.

    Args: is_sharded: whether each process reads only some of the files, those that ``assign_files`` gives it. Its
        epochs are then its own: they contain its lines once. The directories of the machines may hold different files.
    """

    def __init__(self, directory, seed, is_sharded=False):
        if not os.path.isdir(directory):
            raise UserError(f"--input_dir {directory}: no such directory; it holds text files, one sentence per line")
        names = sorted(n for n in os.listdir(directory) if os.path.isfile(os.path.join(directory, n)) and n[0] != ".")
        self.shards = [os.path.join(directory, name) for name in names]
        self.seed, self.is_sharded = seed, is_sharded
        self.described = [{"file": os.path.basename(path), "sha256": files.file_hash(path)} for path in self.shards]
        if is_sharded:
            self._take_share(directory)
        if next(self.lines(0), None) is None:
            raise UserError(f"--input_dir {directory}: no line of text in its {len(self.shards)} files")

    def _take_share(self, directory):
        """Leaves the files of this process; the description becomes that of all processes."""
        listing = [{**row, "bytes": os.path.getsize(path)} for row, path in zip(self.described, self.shards)]
        shares = assign_files(processes.gather(listing))
        if [] in shares:
            found = f"{processes.name_of(shares.index([]))} gets no file: "
            found += f"{sum(map(len, shares))} files for {len(shares)} processes"
            raise UserError(f"--shard_corpus: {found}; split the text into more files")
        self.shards = [os.path.join(directory, row["file"]) for row in shares[processes.rank()]]
        self.described = [
            {"file": row["file"], "sha256": row["sha256"], "rank": rank}
            for rank, share in enumerate(shares)
            for row in share
        ]

    def lines(self, epoch):
        """Yields the lines in the epoch's order of shards. Raises: UserError for a line that is not UTF-8."""
        for shard in np.random.default_rng([self.seed, epoch]).permutation(len(self.shards)):
            with open(self.shards[shard], "rb") as file:  # bytes, so that a decoding error can name its line
                for number, line in enumerate(file, 1):
                    try:
                        text = line.decode("utf-8").strip()
                    except UnicodeDecodeError as error:
                        raise UserError(f"{self.shards[shard]}:{number}: not UTF-8 ({error.reason})") from error
                    if text:
                        yield text

    def sentences(self, epoch, batch_size=1, group_by_length=False):
        """Yields the shuffled sentences of an epoch. ``group_by_length``: batches have sentences of similar length."""
        random = np.random.default_rng([self.seed, epoch, 1])
        lines = self.lines(epoch)
        # A block consists of whole batches, so that no batch spans two blocks.
        while block := list(itertools.islice(lines, max(BLOCK // batch_size, 1) * batch_size)):
            order = random.permutation(len(block))
            if group_by_length:
                order = sort_into_batches(order, [len(text) for text in block], batch_size, random)
            yield from (block[i] for i in order)

    def show_samples(self, tokenizer, max_seq_length):
        """Prints three sentences as teacher and student see them."""
        sentences = enumerate(itertools.islice(self.lines(0), 3), 1)
        examples = [batching.Example(text, None, None, number) for number, text in sentences]
        batching.show_samples(examples, batching.convert(examples, tokenizer, max_seq_length), tokenizer)

    def batches_per_epoch(self, batch_size):
        """Of all processes together."""
        batches = -(-sum(1 for _ in self.lines(0)) // batch_size)
        return round(processes.sum_over_processes(batches)[0]) if self.is_sharded else batches

    def batches_of_process(self, batch_size, skip=0, group_by_length=False):
        """As ``batches``, those of this process: of its own files, or every world-th one of all.

        Without --shard_corpus, batches are numbered over all processes. So any division of them among processes is the
        same training. Args: skip: batches of this process.
        """
        if self.is_sharded:
            return self.batches(batch_size, skip, group_by_length)
        world = processes.world_size()
        joint = self.batches(batch_size, skip * world, group_by_length)
        return itertools.islice(joint, processes.rank(), None, world)

    def batches(self, batch_size, skip=0, group_by_length=False):
        """Yields (epoch, list of batch_size sentences) endlessly, after skipping the first ``skip`` batches.

        The last batch of an epoch may be smaller. Skipped batches are read and shuffled, but not tokenized: about a
        million lines per second.
        """
        epoch = 0
        while True:
            batch = []
            for text in self.sentences(epoch, batch_size, group_by_length):
                batch.append(text)
                if len(batch) == batch_size:
                    if skip:
                        skip -= 1
                    else:
                        yield epoch, batch
                    batch = []
            if batch and skip:
                skip -= 1
            elif batch:
                yield epoch, batch
            epoch += 1

    def describe(self):
        """The description for stage.json: name and sha256 of each file (and who reads it), one md5 over all of them."""
        return {"md5": hashlib.md5(str(self.described).encode()).hexdigest(), "shards": self.described}
