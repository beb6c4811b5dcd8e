"""From texts to arrays: examples are tokenized to features, features are padded to batches, logits put in their order.

Example("股市收盘上涨", None, 4, 1)                     one record of a task, its label as its objective reads it
Feature([101, 5500, 2356, ... 102], [0, 0, ...], 4)     convert: token ids, [CLS] first, [SEP] last
Batch(int64 [32, 24], int64 [32, 24], int64 [32], ...)  batches: 32 features, padded to the longest
float32 [n, outputs]                                    gather: logits in the order of the features
"""

import sys
from typing import Any, NamedTuple, Optional

import numpy as np


class Example(NamedTuple):
    text: str
    text_pair: Optional[str]  # None for tasks of single texts
    label: Any  # the target that objectives.read_label made of it; None if it is not known
    line: int  # line number in its file, from 1


class Feature(NamedTuple):
    input_ids: list  # of int
    token_type_ids: list  # 0 for the first text, 1 for the second
    label: Any


class Batch(NamedTuple):
    input_ids: np.ndarray  # int64 [batch_size, tokens]
    token_type_ids: np.ndarray  # int64 [batch_size, tokens]
    labels: Optional[np.ndarray]  # targets, int64 [batch_size] or float32 [batch_size, ...]
    index: Optional[np.ndarray]  # int64 [batch_size]: the place of each row among the features


def convert(examples, tokenizer, max_seq_length):
    """Examples to a list of Feature, all at once: tokenizing in the training loop would repeat it every epoch.

    A pair becomes one sequence: ("账单", "怎么还款") -> [CLS] 账 单 [SEP] 怎 么 还 款 [SEP], with token types
    0 0 0 0 1 1 1 1 1.
    """
    pairs = None
    if examples and examples[0].text_pair is not None:
        pairs = [example.text_pair for example in examples]
    encoded = tokenizer.encode([example.text for example in examples], pairs, max_seq_length)
    return [Feature(ids, types, example.label) for (ids, types), example in zip(encoded, examples)]


def show_samples(examples, features, tokenizer, task=None, count=3):
    """Prints the first converted examples: text, tokens, ids, label. What is wrong here is wrong in the whole run."""
    for number, (example, feature) in enumerate(list(zip(examples, features))[:count], 1):
        texts = [text for text in example[:2] if text is not None]
        label = "none" if example.label is None else task.objective.show_label(example.label, task.labels)
        print(printable(f"sample {number}: {' / '.join(texts)}"))
        print(printable(f"  tokens: {' '.join(tokenizer.vocab[i] for i in feature.input_ids)}"))
        print(printable(f"  ids: {' '.join(map(str, feature.input_ids))}; label: {label}"))


def printable(text):
    """The text with escapes for control characters, and for what standard output cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def by_length(features):
    """An order that puts sequences of similar length together, so that little padding is computed. Returns: int [n]."""
    return np.argsort([len(feature.input_ids) for feature in features], kind="stable")


def collate(features, index, pad_id=0, length=None):
    """The Batch of ``features[i] for i in index``, padded to its longest sequence, or to ``length`` tokens."""
    rows = [features[i] for i in index]
    shape = len(rows), length or max(len(row.input_ids) for row in rows)
    input_ids = np.full(shape, pad_id, dtype="int64")
    token_type_ids = np.zeros(shape, dtype="int64")
    for i, row in enumerate(rows):
        input_ids[i, : len(row.input_ids)] = row.input_ids
        token_type_ids[i, : len(row.token_type_ids)] = row.token_type_ids
    labels = None if rows[0].label is None else targets(rows)
    return Batch(input_ids, token_type_ids, labels, np.asarray(index))


def round_up(length, longest):
    """The next multiple of 2 (above 32: of 4, above 64: of 16) that is not above ``longest``.

    oneDNN prepares its operators anew for every shape and copies their weights: few lengths save time and memory.
    """
    if length <= 32:
        step = 2
    elif length <= 64:
        step = 4
    else:
        step = 16
    return min(-(-length // step) * step, longest)


def batches(features, batch_size, pad_id=0, order=None, longest=None):
    """Yields one Batch after the other; the last one may be smaller.

    Args: order: int [n]. longest: if given, batches are padded to ``round_up(length, longest)`` tokens.
    """
    order = np.arange(len(features)) if order is None else order
    lengths = [len(feature.input_ids) for feature in features]
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        length = max(lengths[i] for i in index)
        yield collate(features, index, pad_id, round_up(length, longest) if longest else length)


def gather(computed, count):
    """float32 [count, outputs] of the (Batch, logits) pairs in ``computed``: each row in the place of its feature."""
    logits = None
    for batch, rows in computed:
        if logits is None:
            logits = np.empty((count, rows.shape[1]), "float32")
        logits[batch.index] = rows
    return logits


def targets(features):
    """The targets of features as one array: int64 or float32 [n, ...]. See common/objectives.py."""
    array = np.array([feature.label for feature in features])
    return array.astype("float32" if array.dtype.kind == "f" else "int64")
