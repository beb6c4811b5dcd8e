"""Whether two models differ on dev by more than chance: p-values from their answers to the same records.

A difference of a few records says little: drawn anew, as many would have gone the other way. What counts are the
records that only one of two models gets right, which predictions.py keeps beside the weights.
"""

import contextlib
import sys

import numpy as np

from common import UserError, objectives, predictions
from common.records import parent_among

LEVEL = 0.05  # above it a difference is taken for noise
MARK = "≈"
RESAMPLES = 1000
OF_RESAMPLES = ("macro_F1", "weighted_F1", "micro_F1")  # no means over records
OF_RECORDS = ("accuracy", "exact_match")  # the share of records that are right
WITHOUT_PARENT = ("pretrain", "distill", "finetune")  # stages whose models are compared with none


def mcnemar(one, other):
    """The two-sided p-value of McNemar's exact test.

    If both models are equally good, each record that only one of them gets right is either's with probability 1/2. So
    their number for one model is binomial (McNemar, Psychometrika 12 (1947), p. 153; the exact form: Fagerland et al.,
    BMC Medical Research Methodology 13 (2013), 91).

    Args: one, other: bool [n], whether a model gets a record right.
    """
    from scipy.stats import binomtest  # here, as it takes longer to import than most commands that need none

    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    return float(binomtest(only_one, only_one + only_other).pvalue) if only_one + only_other else 1.0


def bootstrap(metric, one, other, truth, seed=0):
    """The two-sided p-value of a paired bootstrap, for metrics that are no means over records.

    Records are drawn with replacement, as many as there are, the same for both models. In k of the RESAMPLES the
    difference is zero or has the rarer sign; p is twice (k + 1) / (RESAMPLES + 1), at most 1 (Efron and Tibshirani, An
    Introduction to the Bootstrap (1993), chapter 16; paired in this way: Koehn, EMNLP 2004, p. 388). Without the added
    ones p could be 0, which no finite number of resamples shows (Davison and Hinkley, Bootstrap Methods and their
    Application (1997), section 4.2; North et al., American Journal of Human Genetics 71 (2002), p. 439).

    Args: metric: one of OF_RESAMPLES. one, other, truth: bool [n, labels], what each model gives and what is right.
    """
    random, count = np.random.default_rng(seed), len(truth)
    columns = [one & truth, one, other & truth, other, truth]
    table = np.concatenate(columns, axis=1).astype("float32")  # [n, 5 labels]; sums below 2^24 are exact
    differences = []
    for size in np.diff(np.linspace(0, RESAMPLES, 11).astype(int)):  # in ten parts: 10,000 records take 8 MB
        drawn = random.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.reshape(-1), minlength=size * count).reshape(size, count)  # each record is drawn
        hits, given, hits_other, given_other, there = np.split(times.astype("float32") @ table, 5, axis=1)
        figure = objectives.f1_averages(hits, given, there)[metric]
        differences.append(figure - objectives.f1_averages(hits_other, given_other, there)[metric])
    differences = np.concatenate(differences)
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (rarer + 1) / (RESAMPLES + 1)))


def p_value(metric, one, other, truth):
    """The p-value of a difference in a metric; None for one that is not known here. Args: as of bootstrap."""
    if metric in OF_RESAMPLES:
        return bootstrap(metric, one, other, truth)
    if metric in OF_RECORDS:
        return mcnemar((one == truth).all(-1), (other == truth).all(-1))
    return None


def test_of(metric):
    """The test that p_value makes, in words."""
    return f"a paired bootstrap of {RESAMPLES} resamples" if metric in OF_RESAMPLES else "McNemar's exact test"


def near(best, decided, objective, targets):
    """({name of a model: the mark}, of those that do not differ from the best one; the line that explains it).

    Args: best: its name. decided: {name: Objective.decide of its logits}. targets: of the same records.
    """
    explained = f"{MARK}: no difference from the best one that {test_of(objective.metric)} finds, p > {LEVEL:g}"
    if decided[best] is None:
        return {}, explained
    truth = objective.truth(targets, decided[best].shape[1])
    others = {name: answers for name, answers in decided.items() if name != best}
    found = {name: p_value(objective.metric, answers, decided[best], truth) for name, answers in others.items()}
    return {name: mark(p) for name, p in found.items() if mark(p)}, explained


# Of records


def answering(record, found):
    """The record in whose directory the answers of a model are: those of an export are of what was exported."""
    return parent_among(record, found) if record["stage"] == "prune_export" else record


def reference_of(record, found):
    """The record of the model that one is compared with: what it was made from; of ONNX in INT8, the FP32 model."""
    parent = parent_among(record, found)
    while parent and parent["stage"] == "quantize":
        parent = parent_among(parent, found)
    return parent and answering(parent, found)


def p_values(wanted, found):
    """{path of a record: p-value of its difference from the model that it was made from; INT8's from FP32}.

    Left out is what has no answers, or answers to other dev data, or no such model in ``found``. Damaged
    answers are one line on stderr.

    Args: wanted: records. found: all records, as records.find_records gives them.
    """
    known, damaged = {}, {}
    for record in wanted:
        model = answering(record, found) if record["stage"] not in WITHOUT_PARENT else None
        if model and model["path"] not in known:
            reference = reference_of(model, found)
            known[model["path"]] = p_value_of(model, reference, damaged) if reference else None
        if model and known[model["path"]] is not None:
            known[record["path"]] = known[model["path"]]
    for error in damaged.values():
        print(f"warning: {error}; until then, no comparison with it, and no {MARK}", file=sys.stderr)
    return {path: p for path, p in known.items() if p is not None}


def p_value_of(record, reference, damaged):
    """The p-value of the difference between two records; None if they cannot be compared.

    Args: damaged: {path of a record: the error}, of answers that cannot be read; new ones are added.
    """
    answers = []
    for model in (record, reference):
        try:
            answers.append(predictions.read(model))
        except UserError as error:
            damaged[model["path"]] = error
            answers.append(None)
    mine, theirs = answers
    if mine is None or theirs is None or dev_data(record) != dev_data(reference):
        return None
    with contextlib.suppress(UserError):  # an objective of the user's own that $OBJECTIVES does not name now
        objective, before = objectives.of_record(record), objectives.of_record(reference)
        one, other = objective.decide(mine.logits), before.decide(theirs.logits)
        same = objective.metric == before.metric and np.array_equal(mine.targets, theirs.targets)
        if one is not None and same:
            return p_value(objective.metric, one, other, objective.truth(mine.targets, one.shape[1]))
    return None


def dev_data(record):
    """What makes two records of the same dev data."""
    return record["task"], record["labels"], record["data"]["dev"]["md5"], record["data"]["dev"]["examples"]


def mark(p):
    """The mark of a figure with that p-value; "" if it differs, or p is None."""
    return MARK if p is not None and p > LEVEL else ""


def legend(metric, compared):
    """The line that explains the mark. Args: compared: number of figures that have a p-value."""
    return (
        f"{MARK}: no difference from the model it was made from (INT8: from FP32) that {test_of(metric)} finds, "
        f"p > {LEVEL:g}; {compared} {'model' if compared == 1 else 'models'} compared."
    )
