"""What a task asks of a model: its labels, loss, metrics and answers. No other module says how these are computed.

    Classification   one label per text: softmax, cross-entropy, accuracy (or F1: --metric)
    MultiLabel       any number of labels per text: a sigmoid and a threshold, binary cross-entropy, macro F1
    your own         a subclass in a Python file that $OBJECTIVES names; CONTRIBUTING.md has one

stage.json holds ``describe()`` of a model's objective. ``of_record`` makes the objective again, and refuses one that is
not known: logits mean nothing without it.

Below, logits are float [n, outputs]. Targets are what ``read_label`` makes of the records: float or int [n, ...].
"""

import dataclasses
import functools
import importlib.util
import os
import sys

import numpy as np

from common import UserError

VARIABLE = "OBJECTIVES"
KNOWN = {}  # {name: class}
OWN_FILES = {}  # {path: module}, of the files in $OBJECTIVES


@dataclasses.dataclass(frozen=True)
class Objective:
    """Settings of a model, such as a threshold, are fields of the dataclass, with a default.

    Losses take and give Paddle's tensors, everything else is NumPy and Python.
    """

    name = None  # in stage.json and for --objective
    metric = None  # the one of ``metrics`` that selects checkpoints and variants; larger is better
    selectable = ()  # those of ``metrics`` that --metric may choose in its place
    fewest_labels = 1

    def __init_subclass__(cls):
        name = cls.__dict__.get("name")
        if name and KNOWN.get(name, cls).__module__ != cls.__module__:
            raise UserError(f"objective {name!r}: there are two of that name")
        if name:
            KNOWN[name] = cls

    def describe(self):
        """The field ``objective`` of stage.json: name, selecting metric, settings."""
        return {"name": self.name, "metric": self.metric, **dataclasses.asdict(self)}

    def selecting_by(self, metric):
        """The objective with another selecting metric. Args: metric: its name, in any case.

        Raises: UserError if it is none of ``selectable``.
        """
        known = {name.lower(): name for name in self.selectable or (self.metric,)}
        if metric.lower() not in known:
            raise UserError(f"--metric {metric}: {self.name} is selected by one of {', '.join(known.values())}")
        if known[metric.lower()] == self.metric:
            return self
        return selecting(type(self), known[metric.lower()])(**dataclasses.asdict(self))

    @property
    def shown(self):
        """The selecting metric as messages and tables have it."""
        return shown(self.metric)

    # Labels

    def labels_in(self, row):
        """The label names that a train record shows: all together, one for each output of the model, are its labels."""
        return ["score"]

    def read_label(self, row, labels):
        """The target of a record; None leaves the record out. Raises: ValueError that says what is needed instead.

        Args: row: dict. labels: names of the outputs, in the order of the logits.
        """
        raise NotImplementedError

    def show_label(self, target, labels):
        """The target as text, for the samples that a training prints."""
        return str(target)

    def constant_answer(self, targets, outputs=None):
        """{"constant_answer": the selecting metric of the best answer that ignores the text}; to be surpassed.

        Args: outputs: their number (default: as many as the targets show).
        """
        return {"constant_answer": 0.0}

    # Training

    def loss(self, logits, targets):
        """The mean over a batch, float32 []."""
        raise NotImplementedError

    def soft_loss(self, logits, teacher_logits):
        """The mean loss of a student that learns a teacher's logits, float32 []."""
        from common.compat import paddle

        return paddle.nn.functional.mse_loss(logits, teacher_logits)

    def balanced_weights(self, targets):
        """The weights of ``--class_weight balanced`` for records with these targets: float [n], with mean 1.

        An objective that has them takes ``weights`` [batch] in loss and soft_loss. Raises: UserError if it has none.
        """
        raise UserError(f"--class_weight balanced: is for classification, not for {self.name}")

    # Scoring

    def fitted(self, logits, targets):
        """The objective with the settings that are best on these, which are of dev."""
        return self

    def metrics(self, logits, targets):
        """{name: figure}: the selecting metric, which must be a finite number, and others, such as the loss."""
        raise NotImplementedError

    def on_dev(self, logits, targets):
        """The metrics with the settings that are best on these; the settings are among them."""
        best = self.fitted(logits, targets)
        return {**best.metrics(logits, targets), **dataclasses.asdict(best)}

    def with_settings(self, metrics):
        """The objective with the settings that are among the metrics of ``on_dev``."""
        return dataclasses.replace(self, **{field.name: metrics[field.name] for field in dataclasses.fields(self)})

    def compared(self, logits, targets):
        """The metrics that tell models apart: without the loss."""
        return {name: figure for name, figure in self.metrics(logits, targets).items() if name != "loss"}

    def agreement(self, logits, reference):
        """How far two models give the same answers, from 0 to 1: the share of texts on which they are the same."""
        raise NotImplementedError

    def decide(self, logits):
        """bool [n, outputs]: which labels a text gets; None if the answers are of another kind."""

    def right(self, logits, targets):
        """bool [n]: whether a text gets exactly its labels; None if the answers are of another kind."""
        decided = self.decide(logits)
        return None if decided is None else (decided == self.truth(targets, decided.shape[1])).all(-1)

    def truth(self, targets, outputs):
        """bool [n, outputs]: which labels a text should get."""
        return np.asarray(targets) > 0.5

    def probabilities(self, logits):
        """float64 [n, outputs] of the labels; None if the answers are of another kind."""

    # Answers

    def answer(self, logits, labels):
        """What a user gets for one text, as JSON: a dict. Args: logits: [outputs]."""
        raise NotImplementedError

    def answers(self, logits, labels):
        """``answer`` to each of several texts: a list. Args: logits: [n, outputs]."""
        return [self.answer(row, labels) for row in logits]

    def prediction(self, logits, labels):
        """What a file of predictions says about one text, beside its id: a dict."""
        return self.answer(logits, labels)

    def columns(self, logits, labels):
        """The answers to several texts, as the service gives them: {name: a list with one item per text}."""
        rows = [self.answer(row, labels) for row in logits]
        return {name: [row[name] for row in rows] for name in rows[0]}


@functools.lru_cache(None)
def selecting(kind, metric):
    """A subclass of an objective with another selecting metric: dataclasses.replace keeps the class, and so that."""
    return type(kind.__name__, (kind,), {"metric": metric, "__doc__": kind.__doc__})


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """One of the labels: the one with the largest logit. Targets: int [n], numbers of classes."""

    name = "classification"
    metric = "accuracy"
    selectable = ("accuracy", "macro_F1", "weighted_F1")
    fewest_labels = 2

    def labels_in(self, row):
        return [row["label"]] if row.get("label", "-") != "-" else []

    def read_label(self, row, labels):
        if "label" not in row:
            hint = "; for records with labels, a list, there is --objective multi_label" if "labels" in row else ""
            raise ValueError(f"no label{hint}")
        label = str(row["label"])
        if label == "-":  # the annotators of CLUE did not agree
            return None
        if label not in labels:
            raise ValueError(f"label {label!r} is not one of the task's: {', '.join(labels)}")
        return labels.index(label)

    def show_label(self, target, labels):
        return f"{labels[target]} (class {target})"

    def constant_answer(self, targets, outputs=None):
        """Of the answers that ignore the text, to give the most frequent class is best, whatever the metric."""
        counts = np.bincount(targets, minlength=outputs or 1)
        if self.metric not in ("macro_F1", "weighted_F1"):
            return {"majority_class": round(float(counts.max()) / max(len(targets), 1), 6)}
        decided = np.where(np.arange(len(counts)) == counts.argmax(), len(targets), 0)
        figures = f1_averages(np.minimum(decided, counts), decided, counts)
        return {"constant_answer": round(float(figures[self.metric]), 6)}

    def loss(self, logits, targets, weights=None):
        from common.compat import paddle

        if weights is None:
            return paddle.nn.functional.cross_entropy(logits, targets)
        losses = paddle.nn.functional.cross_entropy(logits, targets, reduction="none")
        return (weights * losses.reshape([-1])).mean()

    def soft_loss(self, logits, teacher_logits, weights=None):
        """Cross-entropy with the teacher's probabilities (arXiv 1503.02531, at temperature 1)."""
        from common.compat import paddle

        probabilities = paddle.nn.functional.softmax(teacher_logits)
        losses = -(probabilities * paddle.nn.functional.log_softmax(logits)).sum(-1)
        return (losses if weights is None else weights * losses).mean()

    def balanced_weights(self, targets):
        """n / (classes x records of the record's class), as scikit-learn's ``class_weight="balanced"`` defines it:
        compute_class_weight in sklearn/utils/class_weight.py, after King and Zeng, Logistic Regression in Rare Events
        Data (2001). All classes together then weigh the same; classes without a record do not count."""
        counts = np.bincount(targets)
        return len(targets) / (np.count_nonzero(counts) * counts[targets])

    def decide(self, logits):
        logits = np.asarray(logits)
        return logits.argmax(-1)[:, None] == np.arange(logits.shape[1])

    def truth(self, targets, outputs):
        return np.asarray(targets)[:, None] == np.arange(outputs)

    def probabilities(self, logits):
        return softmax(logits)

    def metrics(self, logits, targets):
        """Accuracy; F1: macro, the mean over all labels, and weighted by their records; mean cross-entropy in nats."""
        logits = np.asarray(logits, "float64")
        shifted = logits - logits.max(-1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        log_likelihood = log_probabilities[np.arange(len(targets)), targets]
        decided, truth = self.decide(logits), self.truth(targets, logits.shape[1])
        f1 = f1_averages(*counts_of_labels(decided, truth))
        figures = {"accuracy": (logits.argmax(-1) == targets).mean()}
        figures.update({name: f1[name] for name in ("macro_F1", "weighted_F1")}, loss=-log_likelihood.mean())
        return {name: round(float(figure), 6) for name, figure in figures.items()}

    def agreement(self, logits, reference):
        return float((logits.argmax(-1) == reference.argmax(-1)).mean())

    def answer(self, logits, labels):
        return self.answers(logits[None], labels)[0]

    def answers(self, logits, labels):
        """All at once: for a million texts, row by row would take an eighth of the time of a small model."""
        found = []
        for best, probabilities in zip(logits.argmax(-1).tolist(), softmax(logits).round(6).tolist()):
            fields = {"label": labels[best], "probability": probabilities[best]}
            found.append({**fields, "probabilities": dict(zip(labels, probabilities))})
        return found

    def prediction(self, logits, labels):
        return {"label": labels[logits.argmax()]}

    def columns(self, logits, labels):
        chosen = [labels[i] for i in logits.argmax(-1)]
        return {"labels": chosen, "probabilities": [[round(p, 6) for p in row] for row in softmax(logits).tolist()]}


@dataclasses.dataclass(frozen=True)
class MultiLabel(Objective):
    """Every label whose probability, the sigmoid of its logit, is at least the threshold; a text may have none.

    Targets: float [n, labels], 1 for the labels of a text. One threshold for all labels: that of 0.01, 0.02, ... 0.99
    with the best macro F1 (or what else selects) on dev, where rare labels rarely reach a probability of 0.5.
    """

    name = "multi_label"
    metric = "macro_F1"
    selectable = ("macro_F1", "micro_F1", "exact_match")

    threshold: float = 0.5

    def __post_init__(self):
        if not isinstance(self.threshold, float) or not 0 < self.threshold < 1:
            raise ValueError(f"threshold {self.threshold!r}: must be between 0 and 1")

    def labels_in(self, row):
        return row["labels"] if isinstance(row.get("labels"), list) else []

    def read_label(self, row, labels):
        given = row.get("labels")
        if not isinstance(given, list):
            raise ValueError('no "labels", a list of label names, which may be empty')
        names = [str(label) for label in given]
        for name in names:
            if name not in labels:
                raise ValueError(f"label {name!r} is not one of the task's: {', '.join(labels)}")
            if names.count(name) > 1:
                raise ValueError(f"label {name!r} stands twice")
        return tuple(float(label in names) for label in labels)

    def show_label(self, target, labels):
        return ", ".join(label for label, value in zip(labels, target) if value) or "none of the labels"

    def constant_answer(self, targets, outputs=None):
        """Of the answers that ignore the text, to give every label has the best macro F1; the k most frequent labels,
        for some k, have the best micro F1; and the most frequent set of labels is exactly right most often."""
        truth = self.truth(targets, outputs)
        if self.metric == "exact_match":
            best = np.unique(truth, axis=0, return_counts=True)[1].max() / len(truth)
        elif self.metric == "micro_F1":
            counts = np.sort(truth.sum(0))[::-1]
            given = np.tril(np.ones((len(counts), len(counts)), int))  # [k - 1, label]: whether k labels include it
            best = f1_averages(given * counts, given * len(truth), counts)["micro_F1"].max()
        else:
            best = self.metrics(np.full(np.shape(targets), np.inf), targets)[self.metric]
        return {"constant_answer": round(float(best), 6)}

    def loss(self, logits, targets):
        """Binary cross-entropy, the mean over the texts and their labels."""
        from common.compat import paddle

        return paddle.nn.functional.binary_cross_entropy_with_logits(logits, targets)

    def soft_loss(self, logits, teacher_logits):
        """As loss, with the teacher's probabilities for targets."""
        from common.compat import paddle

        return self.loss(logits, paddle.nn.functional.sigmoid(teacher_logits))

    def balanced_weights(self, targets):
        why = "here the labels of a text do not exclude each other, and the threshold is chosen on dev, for --metric"
        raise UserError(f"--class_weight balanced: is for classification; {why}")

    def fitted(self, logits, targets):
        probabilities, truth = sigmoid(logits), self.truth(targets, None)
        thresholds = [k / 100 for k in range(1, 100)]
        figures = [self.figures(probabilities >= threshold, truth) for threshold in thresholds]
        scores = [figure.get(self.metric, figure["macro_F1"]) for figure in figures]
        best = [threshold for threshold, score in zip(thresholds, scores) if score == max(scores)]
        return dataclasses.replace(self, threshold=min(best, key=lambda threshold: abs(threshold - 0.5)))

    def decide(self, logits):
        return sigmoid(logits) >= self.threshold

    def probabilities(self, logits):
        return sigmoid(logits)

    def figures(self, decided, truth):
        """{metric: figure} of bool [n, labels]: the labels that texts get, and those that they should get."""
        f1 = f1_averages(*counts_of_labels(decided, truth))
        exact = (decided == truth).all(-1).mean()
        return {"macro_F1": f1["macro_F1"], "micro_F1": f1["micro_F1"], "exact_match": exact}

    def metrics(self, logits, targets):
        """F1: macro, the mean over the labels, and micro, of all decisions together; the share of texts with exactly
        the right labels; the loss in nats."""
        logits, truth = np.asarray(logits, "float64"), self.truth(targets, None)
        # -log sigmoid(z) for a label that is there, -log(1 - sigmoid(z)) = -log sigmoid(-z) for one that is not
        loss = np.logaddexp(0, np.where(truth, -logits, logits))
        figures = {**self.figures(self.decide(logits), truth), "loss": loss.mean()}
        return {name: round(float(figure), 6) for name, figure in figures.items()}

    def agreement(self, logits, reference):
        return float((self.decide(logits) == self.decide(reference)).all(-1).mean())

    def answer(self, logits, labels):
        probabilities = {label: round(float(p), 6) for label, p in zip(labels, sigmoid(logits))}
        return {**self.prediction(logits, labels), "probabilities": probabilities, "threshold": self.threshold}

    def prediction(self, logits, labels):
        return {"labels": [label for label, given in zip(labels, self.decide(logits)) if given]}

    def columns(self, logits, labels):
        chosen = [self.prediction(row, labels)["labels"] for row in logits]
        return {"labels": chosen, "probabilities": [[round(p, 6) for p in row] for row in sigmoid(logits).tolist()]}


def counts_of_labels(decided, truth):
    """(TP, TP + FP, TP + FN), int [labels] each: how often a label is given rightly, is given, and is there.

    Args: decided, truth: bool [n, labels].
    """
    return (decided & truth).sum(0), decided.sum(0), truth.sum(0)


def f1_of_labels(hits, given, there):
    """F1 = 2 TP / (2 TP + FP + FN) of counts [..., labels]; 0 for a label that is neither there nor given."""
    return 2 * hits / np.maximum(given + there, 1)


def f1_averages(hits, given, there):
    """{name: float [...]} of counts [..., labels]: the mean over the labels, the mean weighted by how often each is
    there, and F1 of all decisions together. As ``average`` of scikit-learn's f1_score, with ``labels`` all of them."""
    f1 = f1_of_labels(hits, given, there)
    return {
        "macro_F1": f1.mean(-1),
        "weighted_F1": (f1 * there).sum(-1) / np.maximum(there.sum(-1), 1),
        "micro_F1": f1_of_labels(hits.sum(-1), given.sum(-1), there.sum(-1)),
    }


def softmax(logits):
    """Probabilities float64 [..., classes] of logits [..., classes]."""
    logits = np.asarray(logits, "float64")
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def sigmoid(logits):
    """Probabilities float64 [...] of logits [...], each on its own."""
    return np.exp(-np.logaddexp(0, -np.asarray(logits, "float64")))


# By name


def add_metric_argument(group):
    help = "what chooses the best checkpoint, cell of the grid and INT8 variant: accuracy, macro_F1 or weighted_F1; "
    help += "multi_label: macro_F1, micro_F1 or exact_match, which also choose the threshold (default: the first one); "
    help += "later stages take it from here"
    group.add_argument("--metric", type=str.lower, help=help)


def read_own_files():
    """Runs the files that $OBJECTIVES names, which adds their objectives to KNOWN. Raises: UserError if one fails."""
    for path in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        if path in OWN_FILES:
            continue
        if not os.path.isabs(path) or not path.endswith(".py"):
            why = "must be the absolute path of a Python file; launchers change the directory"
            raise UserError(f"{VARIABLE}={path}: {why}")
        if not os.path.isfile(path):
            raise UserError(f"{VARIABLE}={path}: no such file")
        name = f"own_objectives_{len(OWN_FILES)}"
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except UserError:
            raise
        except Exception as error:  # of the user's code
            raise UserError(f"{VARIABLE}={path}: {type(error).__name__}: {error}") from error
        OWN_FILES[path] = module


def named(name):
    """The objective of that name, with default settings. Raises: UserError if there is none."""
    if name not in KNOWN:
        read_own_files()
    if name not in KNOWN:
        raise UserError(
            f"objective {name!r} is not known here, only {', '.join(KNOWN)}; ${VARIABLE} names the files of your own"
        )
    return KNOWN[name]()


def of_description(description):
    """The objective of a ``describe()``. Raises: UserError if it is not known, or its settings are not its own."""
    if not isinstance(description, dict) or not isinstance(description.get("name"), str):
        raise UserError("no objective is named, so the logits of this model mean nothing; its stage has to record one")
    settings = {key: value for key, value in description.items() if key not in ("name", "metric")}
    objective = named(description["name"])
    try:
        objective = dataclasses.replace(objective, **settings)
        if description.get("metric") in objective.selectable:
            objective = objective.selecting_by(description["metric"])
    except (TypeError, ValueError) as error:
        raise UserError(f"objective {description['name']!r}: its settings do not fit here ({error})") from error
    if objective.describe() != description:
        raise UserError(f"objective {description['name']!r}: {description} was made by another version of it")
    return objective


def chosen_metric(description):
    """The selecting metric of a ``describe()`` as --metric has it; None if it is the objective's own, or not known."""
    if not isinstance(description, dict) or description.get("name") not in KNOWN:
        return None
    metric = description.get("metric")
    return metric.lower() if isinstance(metric, str) and metric != KNOWN[description["name"]].metric else None


def of_record(record):
    """The objective of a model. Args: record: its stage.json. Raises: as of_description."""
    return of_description(record.get("objective"))


def of_records_like(row):
    """The objective for data of your own, by the form of a record. Args: row: dict."""
    return MultiLabel() if isinstance(row.get("labels"), list) and "label" not in row else Classification()


def shown(metric):
    """The name of a metric as messages and tables have it: macro_F1 is "macro F1"."""
    return metric.replace("_", " ")
