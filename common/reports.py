"""--report DIR: how good models are on dev, where they err and where they differ, as a page for people.

    DIR/report.html   one file without links to others, to open in a browser, print or send (common/report.html)
    DIR/report.json   the same figures, and every record on which models differ

The first model is the reference; the others are compared with it record by record. scikit-learn computes precision,
recall, F1 and the confusion matrix. Called by deploy/python/infer.py, finetuning/run_clue.py and summarize.py.
"""

import argparse
import dataclasses
import os
import statistics
import sys
from typing import NamedTuple

import numpy as np

from common import UserError, batching, cli, files, objectives, predictions, records, significance, tables

HTML, JSON, TEMPLATE = "report.html", "report.json", "report.html"
WHOLE_MATRIX = 30  # classes; of more, the matrix shows those with the most errors, and tables scroll
SHOWN_CLASSES = 20  # in such a matrix
BINS = 10  # of margins, from 0 to 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
KINDS = ("correct_to_wrong", "wrong_to_correct", "both_wrong_different")  # of different predictions


def add_arguments(group):
    help = "write DIR/report.html, a page with figures per class, confusion matrix, errors with their texts, and what "
    help += "differs between several models; and the figures as DIR/report.json"
    group.add_argument("--report", metavar="DIR", type=report_directory, help=help, without_effect=True)
    help = "rows per list of the report: the most confident errors, the predictions that differ, the pairs of classes "
    help += "that are confused most often"
    options = {"positive": True, "without_effect": True}
    group.add_argument("--report_errors", type=int, metavar="N", default=20, help=help, **options)


def report_directory(path):
    """argparse type: a directory, or one that can be made."""
    existing = os.path.abspath(path)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not path or not os.path.isdir(existing):
        raise argparse.ArgumentTypeError(f"{path or 'an empty name'} is no directory; name a directory, or a new one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{path}: no right to write in {existing}")
    return cli.PathArgument(path)


class Scored(NamedTuple):
    """A model with its answers."""

    path: str
    record: dict  # its stage.json
    precision: str  # that the logits were computed in
    max_seq_length: int  # that the texts were cut at, tokens
    logits: np.ndarray  # float32 [records, outputs]
    machine: dict  # of records.describe_machine, on which they were computed


class Answers(NamedTuple):
    """What the logits of a model say about each record."""

    truth: np.ndarray  # bool [n, labels]: which labels it has
    decided: np.ndarray  # bool [n, labels]: which labels are predicted
    correct: np.ndarray  # bool [n]: that these are the same
    probabilities: np.ndarray  # float [n, labels]
    confidence: np.ndarray  # float [n], see answers_of
    margin: np.ndarray  # float [n], see answers_of


def answers_of(objective, logits, targets):
    """Answers; None for an objective that has no classes.

    One label: the confidence is the largest probability, the margin its distance to the second largest. Several: the
    confidence of a wrong answer is the largest probability with which a single label was wrongly predicted or left out,
    the margin the smallest distance of a label's probability from the threshold.
    """
    decided, probabilities = objective.decide(logits), objective.probabilities(logits)
    if decided is None or probabilities is None:
        return None
    truth = objective.truth(targets, decided.shape[1])
    if isinstance(objective, objectives.Classification):
        second, confidence = np.sort(probabilities, axis=-1)[:, -2:].T
        margin = confidence - second
    else:
        certainty = np.where(decided, probabilities, 1 - probabilities)
        confidence = np.where(decided != truth, certainty, 0).max(-1)
        margin = np.abs(probabilities - getattr(objective, "threshold", 0.5)).min(-1)
    return Answers(truth, decided, objective.right(logits, targets), probabilities, confidence, margin)


def wilson_interval(hits, count, level=0.95):
    """(lowest, highest) share of which ``hits`` in ``count`` is a likely sample.

    E. B. Wilson, Journal of the American Statistical Association 22 (1927), pages 209-212. It also holds for few
    records and for shares near 0 or 1 (Brown, Cai, DasGupta, Statistical Science 16 (2001), pages 101-133).
    """
    z, share = statistics.NormalDist().inv_cdf((1 + level) / 2), hits / count
    center = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return (center - half) / (1 + z * z / count), (center + half) / (1 + z * z / count)


# The figures


class Report:
    """What report.json holds. Args: as of write; models: list of Scored; targets: [n, ...]."""

    def __init__(self, models, dev, targets, examples, count, missing):
        record = models[0].record
        self.labels, self.targets, self.examples, self.count = record["labels"], targets, examples, count
        self.objectives = [objectives.of_record(model.record) for model in models]
        self.one_label = isinstance(self.objectives[0], objectives.Classification)
        self.answers = [answers_of(*row, targets) for row in zip(self.objectives, [model.logits for model in models])]
        names = record["model"].get("label_names") or self.labels
        described = [self.model(*row) for row in zip(models, names_of(models), self.objectives, self.answers)]
        self.content = {
            "task": record["task"],
            "objective": self.objectives[0].name,
            "classes": [{"label": label, "name": name} for label, name in zip(self.labels, names)],
            "dev": {**dev, "examples": len(targets)},
            "texts": examples is not None,
            "missing": list(missing),
            "models": described,
            "comparisons": [self.comparison(models, number) for number in range(1, len(models))],
        }

    def model(self, scored, name, objective, answers):
        """What is said about one model."""
        record, export = scored.record, scored.record.get("export") or {}
        described = {
            "name": name,
            "directory": files.relative(scored.path),
            "stage": record["stage"],
            "precision": scored.precision,
            "max_seq_length": scored.max_seq_length,
            "params": record["params"],
            "bytes": tables.size_of(record),
            "weights": export.get("weights") or record["weights"],
            "machine": scored.machine,
            "notes": tables.remarks(record),
            "metric": objective.metric,
            "settings": dataclasses.asdict(objective),
            "metrics": objective.metrics(scored.logits, self.targets),
        }
        return {**described, **self.class_figures(answers)} if answers else described

    def class_figures(self, answers):
        """Figures per class and what they are made of, as scikit-learn defines them; the most confident errors."""
        from sklearn.metrics import precision_recall_fscore_support

        # The columns; a single one is not taken for a column by scikit-learn, but for a target, of which 1 is meant.
        columns = range(len(self.labels)) if len(self.labels) > 1 else [1]
        options = {"labels": columns, "zero_division": 0}
        found = precision_recall_fscore_support(answers.truth, answers.decided, average=None, **options)
        classes = [
            {"label": label, "precision": rounded(p), "recall": rounded(r), "f1": rounded(f), "support": int(s)}
            for label, p, r, f, s in zip(self.labels, *found)
        ]
        for row, times in zip(classes, answers.decided.sum(0)):
            row["predicted"] = int(times)
        averages = {}
        for average in ("macro", "weighted"):  # over all labels, as common/objectives.py has it
            figures = precision_recall_fscore_support(answers.truth, answers.decided, average=average, **options)
            averages[average] = dict(zip(("precision", "recall", "f1"), map(rounded, figures[:3])))
        wrong, correct = np.flatnonzero(~answers.correct), int(answers.correct.sum())
        wrong = wrong[np.argsort(-answers.confidence[wrong], kind="stable")]
        return {
            "correct": correct,
            "interval": [rounded(bound) for bound in wilson_interval(correct, len(answers.correct))],
            "averages": averages,
            "classes": classes,
            **(self.confusion(answers) if self.one_label else {}),
            "error_count": len(wrong),
            "errors": [self.error(answers, i) for i in wrong[: self.count]],
        }

    def confusion(self, answers):
        """The confusion matrix (true classes down, predicted classes across), and which classes are taken for which."""
        matrix = answers.truth.T.astype(int) @ answers.decided
        errors = matrix - np.diag(np.diag(matrix))
        order = np.argsort(-errors, axis=None, kind="stable")[: self.count]
        pairs = [
            {
                "true": self.labels[true],
                "predicted": self.labels[predicted],
                "count": int(errors[true, predicted]),
                "share": rounded(errors[true, predicted] / matrix[true].sum()),
            }
            for true, predicted in zip(*np.unravel_index(order, errors.shape))
            if errors[true, predicted]
        ]
        # The classes of the picture: all of them, or those with the most errors, in their order.
        shown = np.arange(len(matrix))
        if len(matrix) > WHOLE_MATRIX:
            worst = np.argsort(-(errors.sum(0) + errors.sum(1)), kind="stable")
            shown = np.sort(worst[:SHOWN_CLASSES])
        chosen = [self.labels[i] for i in shown]
        return {"confusion": matrix.tolist(), "confusion_shown": chosen, "confused_pairs": pairs}

    def shown_label(self, row):
        """The label of a record, or the list of its labels. Args: row: bool [labels]."""
        found = [label for label, there in zip(self.labels, row) if there]
        return found[0] if self.one_label else found

    def place(self, i):
        """Which record it is: its line in the dev file and its texts, where these are known; else its number."""
        if self.examples is None:
            return {"record": i + 1}
        text, text_pair, _, line = self.examples[i]
        return {"line": line, "text": text, **({} if text_pair is None else {"text_pair": text_pair})}

    def error(self, answers, i):
        """A record whose answer is wrong."""
        row = {"true": self.shown_label(answers.truth[i]), "predicted": self.shown_label(answers.decided[i])}
        row["probability"] = rounded(answers.confidence[i])
        if self.one_label:
            row["probability_of_true"] = rounded(answers.probabilities[i][answers.truth[i]][0])
        return {**self.place(int(i)), **row}

    def comparison(self, models, number):
        """The model of that number against the first, record by record."""
        all_names, first, other = names_of(models), self.answers[0], self.answers[number]
        names = {"reference": all_names[0], "model": all_names[number]}
        if not first:
            figure = self.objectives[0].agreement(models[number].logits, models[0].logits)
            return {**names, "agreement": rounded(figure)}
        differs = (first.decided != other.decided).any(-1)
        kinds = {
            "both_correct": first.correct & other.correct,
            "correct_to_wrong": first.correct & ~other.correct,
            "wrong_to_correct": ~first.correct & other.correct,
            "both_wrong_same": ~first.correct & ~differs,
            "both_wrong_different": ~first.correct & ~other.correct & differs,
        }
        flips = [self.flip(kind, first, other, i) for kind in KINDS for i in by_margin(kinds[kind], first.margin)]
        bins = np.minimum((first.margin * BINS).astype(int), BINS - 1)
        in_bins = [(k / BINS, (k + 1) / BINS, bins == k) for k in range(BINS)]
        margins = {
            "bins": [
                {"from": low, "to": high, "records": int(inside.sum()), "different": int((differs & inside).sum())}
                for low, high, inside in in_bins
            ],
            "quantiles": list(QUANTILES),
            "reference": quantiles_of(first.margin),
            "model": quantiles_of(other.margin),
            "different": quantiles_of(first.margin[differs]),
        }
        counts = {kind: int(chosen.sum()) for kind, chosen in kinds.items()}
        found = {**names, "agreement": rounded(1 - differs.mean()), "counts": counts}
        return {**found, "tests": self.tests(first, other), "margins": margins, "flips": flips}

    def tests(self, first, other):
        """The p-values of the difference in the share of correct answers, and in the metric that selects."""
        rows = []
        for metric in dict.fromkeys(("accuracy" if self.one_label else "exact_match", self.objectives[0].metric)):
            p = significance.p_value(metric, first.decided, other.decided, first.truth)
            if p is not None:
                rows.append({"metric": metric, "test": significance.test_of(metric), "p": float(f"{p:.4g}")})
        return rows

    def flip(self, kind, first, other, i):
        """A record that the two answer differently."""
        row = {"kind": kind, **self.place(int(i)), "true": self.shown_label(first.truth[i])}
        for name, answers in (("reference", first), ("model", other)):
            row[name] = {"predicted": self.shown_label(answers.decided[i]), "margin": rounded(answers.margin[i])}
        return row


def rounded(figure):
    return round(float(figure), 6)


def quantiles_of(margins):
    return [rounded(q) for q in np.quantile(margins, QUANTILES)] if len(margins) else None


def by_margin(chosen, margin):
    """The numbers of the chosen records, the largest margins first: there a flip is a surprise."""
    numbers = np.flatnonzero(chosen)
    return numbers[np.argsort(-margin[numbers], kind="stable")]


def names_of(models):
    """What the page calls the models; of two with one name, their directories are added."""
    names = []
    for model in models:
        row = tables.row_of(model.record)
        name = row[0] if row else f"{model.record['stage']}, FP32"
        names.append(name.replace("FP32", model.precision.upper()))
    return [
        name if names.count(name) == 1 else f"{name} ({files.relative(model.path)})"
        for name, model in zip(names, models)
    ]


# The page


def picture_of(model):
    """The confusion matrix as the page draws it: {"labels", "rows": [[{"count", "share"}]]}; share: of the row's class.

    Classes that are not shown are one row and one column, with None for their label.
    """
    labels = [row["label"] for row in model["classes"]]
    matrix, shown = np.array(model["confusion"]), [labels.index(label) for label in model["confusion_shown"]]
    groups = [[i] for i in shown]
    if len(shown) < len(labels):
        groups.append(sorted(set(range(len(labels))) - set(shown)))
    counts = [[int(matrix[np.ix_(rows, columns)].sum()) for columns in groups] for rows in groups]
    names = [labels[group[0]] if len(group) == 1 and group[0] in shown else None for group in groups]
    rows = [[{"count": n, "share": n / max(sum(row), 1)} for n in row] for row in counts]
    return {"labels": names, "rows": rows}


def width_of(text):
    """The width of a text in units of its font size: a Chinese character is a square, a Latin letter about half."""
    return sum(1 if ord(character) > 0x2E7F else 0.58 for character in text)


def clipped(text, width):
    """The text, or its beginning that is not wider than ``width`` with an ellipsis."""
    if width_of(text) <= width:
        return text
    kept = text
    while kept and width_of(kept) > width - 1:
        kept = kept[:-1]
    return f"{kept}…"


def render(content, count):
    """The page as text. All texts are escaped by Jinja. Args: content: of report.json."""
    import jinja2

    directory = os.path.dirname(os.path.abspath(__file__))
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(directory), **options)
    environment.filters.update(shown=objectives.shown, clipped=clipped, width=width_of, percent=percent)
    constant, reached = records.constant_answer(content["dev"])  # which a model has to surpass
    options = {"kinds": KINDS, "whole_matrix": WHOLE_MATRIX, "constant": constant, "reached": reached}
    return environment.get_template(TEMPLATE).render(content, count=count, picture_of=picture_of, **options).lstrip()


def percent(share):
    return f"{share * 100:.2f}"


# Writing


class Page(NamedTuple):
    content: dict  # of report.json
    html: str


def page_of(models, dev, examples, count, targets=None, missing=()):
    """The Page of some models, which ``save`` writes.

    Args: models: (path, record, precision, max_seq_length, logits) of each, computed by this process, or Scored; all of
        one task, the reference first. dev: as data.Split describes itself. examples: list of batching.Example of its
        records; None if the texts are not at hand. count: rows per list of the page. targets: [n, ...] (default: those
        of the examples). missing: lines about models that are left out.
    """
    models = [row if isinstance(row, Scored) else Scored(*row, records.describe_machine()) for row in models]
    targets = batching.targets(examples) if targets is None else targets
    content = Report(models, dev, targets, examples, count, missing).content
    return Page(content, render(content, count))


def save(directory, page):
    """Writes report.json and report.html, each whole, and says so."""
    os.makedirs(directory, exist_ok=True)
    files.write_json(os.path.join(directory, JSON), page.content)
    files.write_whole(os.path.join(directory, HTML), page.html)
    print(f"report -> {os.path.join(directory, HTML)}", file=sys.stderr)


def write(directory, models, dev, examples, count):
    """Writes the report on some models. Args: as of page_of."""
    save(directory, page_of(models, dev, examples, count))


class Kept(NamedTuple):
    """What the stages of some models have kept of their answers on dev (common/predictions.py)."""

    models: list  # of Scored
    targets: np.ndarray  # [n, ...]; None without models
    missing: list  # lines about the models that are left out


def kept(family, found):
    """Kept of those models that can be compared; a line on stderr about each of the others.

    Args: family: records of one task, the reference first. found: all records, as records.find_records gives them.
    """
    models, targets, missing = [], None, []
    for record in family:
        source = significance.answering(record, found)  # of an export, what was exported
        try:
            answers = predictions.read(source) if source else None
        except UserError:  # its message has a path, which is not for the page
            why = f"{predictions.FILE} is damaged or another model's, so not in this report"
            missing.append(f"{record['directory']}: {why}; repeat the stage that wrote it, with --overwrite")
            continue
        if answers is None:
            missing.append(f"{record['directory']}: no {predictions.FILE}, so not in this report; {scoring_of(record)}")
        elif significance.dev_data(record) != significance.dev_data(family[0]):
            missing.append(f"{record['directory']}: scored on other dev data, so not in this report")
        else:
            precision = (record.get("variant") or {}).get("scored_in") or "int8"  # of records that do not say it
            precision = precision if record["stage"] == "quantize" else "fp32"
            length, targets = source["arguments"]["max_seq_length"], answers.targets
            models.append(Scored(record["path"], record, precision, length, answers.logits, source["machine"]))
    for line in missing:
        print(f"note: {line}", file=sys.stderr)
    return Kept(models, targets, missing)


def scoring_of(record):
    """The command that scores a model whose answers were not kept, with a report of its own."""
    if records.graph_files(record):
        return f"deploy/python/infer.py --model_path {record['directory']} --report DIR scores it"
    words = f"--task_name {record['task']} --model_name_or_path {record['directory']} --do_eval --report DIR"
    return f"finetuning/run_clue.py {words} scores it"
