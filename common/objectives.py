"""What a task asks of a model: its labels, loss, metrics and answers. No other module says how these are computed.

    Classification   one label per text: softmax, cross-entropy, accuracy
    MultiLabel       any number of labels per text: a sigmoid and a threshold, binary cross-entropy, macro F1
    your own         a subclass in a Python file that $OBJECTIVES names; CONTRIBUTING.md has one

stage.json holds ``describe()`` of a model's objective. ``of_record`` makes the objective again, and refuses one that is
not known: logits mean nothing without it.

Below, logits are float [n, outputs]. Targets are what ``read_label`` makes of the records: float or int [n, ...].
"""

import dataclasses
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

    def constant_answer(self, targets):
        """{"constant_answer": the selecting metric of the best answer that ignores the text}; to be surpassed."""
        return {"constant_answer": 0.0}

    # Training

    def loss(self, logits, targets):
        """The mean over a batch, float32 []."""
        raise NotImplementedError

    def soft_loss(self, logits, teacher_logits):
        """The mean loss of a student that learns a teacher's logits, float32 []."""
        from common.compat import paddle

        return paddle.nn.functional.mse_loss(logits, teacher_logits)

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

    # Answers

    def answer(self, logits, labels):
        """What a user gets for one text, as JSON: a dict. Args: logits: [outputs]."""
        raise NotImplementedError

    def prediction(self, logits, labels):
        """What a file of predictions says about one text, beside its id: a dict."""
        return self.answer(logits, labels)

    def columns(self, logits, labels):
        """The answers to several texts, as the service gives them: {name: a list with one item per text}."""
        rows = [self.answer(row, labels) for row in logits]
        return {name: [row[name] for row in rows] for name in rows[0]}


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """One of the labels: the one with the largest logit. Targets: int [n], numbers of classes."""

    name = "classification"
    metric = "accuracy"
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

    def constant_answer(self, targets):
        counts = np.bincount(targets, minlength=1)
        return {"majority_class": round(float(counts.max()) / max(len(targets), 1), 6)}

    def loss(self, logits, targets):
        from common.compat import paddle

        return paddle.nn.functional.cross_entropy(logits, targets)

    def soft_loss(self, logits, teacher_logits):
        """Cross-entropy with the teacher's probabilities (arXiv 1503.02531, at temperature 1)."""
        from common.compat import paddle

        probabilities = paddle.nn.functional.softmax(teacher_logits)
        return -(probabilities * paddle.nn.functional.log_softmax(logits)).sum(-1).mean()

    def metrics(self, logits, targets):
        """Accuracy, and the mean cross-entropy in nats."""
        logits = np.asarray(logits, "float64")
        shifted = logits - logits.max(-1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        log_likelihood = log_probabilities[np.arange(len(targets)), targets]
        accuracy = float((logits.argmax(-1) == targets).mean())
        return {"accuracy": round(accuracy, 6), "loss": round(float(-log_likelihood.mean()), 6)}

    def agreement(self, logits, reference):
        return float((logits.argmax(-1) == reference.argmax(-1)).mean())

    def answer(self, logits, labels):
        best, probabilities = int(logits.argmax()), softmax(logits)
        return {
            "label": labels[best],
            "probability": round(float(probabilities[best]), 6),
            "probabilities": {label: round(float(p), 6) for label, p in zip(labels, probabilities)},
        }

    def prediction(self, logits, labels):
        return {"label": labels[logits.argmax()]}

    def columns(self, logits, labels):
        chosen = [labels[i] for i in logits.argmax(-1)]
        return {"labels": chosen, "probabilities": [[round(p, 6) for p in row] for row in softmax(logits).tolist()]}


@dataclasses.dataclass(frozen=True)
class MultiLabel(Objective):
    """Every label whose probability, the sigmoid of its logit, is at least the threshold; a text may have none.

    Targets: float [n, labels], 1 for the labels of a text. One threshold for all labels: that of 0.01, 0.02, ... 0.99
    with the best macro F1 on dev, where rare labels rarely reach a probability of 0.5.
    """

    name = "multi_label"
    metric = "macro_F1"

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

    def constant_answer(self, targets):
        """Of the answers that ignore the text, to give every label has the best macro F1."""
        every_label = np.full(np.shape(targets), np.inf)
        return {"constant_answer": self.metrics(every_label, targets)[self.metric]}

    def loss(self, logits, targets):
        """Binary cross-entropy, the mean over the texts and their labels."""
        from common.compat import paddle

        return paddle.nn.functional.binary_cross_entropy_with_logits(logits, targets)

    def soft_loss(self, logits, teacher_logits):
        """As loss, with the teacher's probabilities for targets."""
        from common.compat import paddle

        return self.loss(logits, paddle.nn.functional.sigmoid(teacher_logits))

    def fitted(self, logits, targets):
        probabilities, targets = sigmoid(logits), np.asarray(targets) > 0.5
        thresholds = [k / 100 for k in range(1, 100)]
        scores = [f1_of_labels(probabilities >= threshold, targets).mean() for threshold in thresholds]
        best = [threshold for threshold, score in zip(thresholds, scores) if score == max(scores)]
        return dataclasses.replace(self, threshold=min(best, key=lambda threshold: abs(threshold - 0.5)))

    def decide(self, logits):
        """bool [n, labels]: which labels a text gets."""
        return sigmoid(logits) >= self.threshold

    def metrics(self, logits, targets):
        """F1: macro, the mean over the labels, and micro, of all decisions together; the share of texts with exactly
        the right labels; the loss in nats."""
        logits, targets = np.asarray(logits, "float64"), np.asarray(targets) > 0.5
        decided = self.decide(logits)
        f1, micro = f1_of_labels(decided, targets), f1_of_labels(decided.reshape(-1), targets.reshape(-1))
        # -log sigmoid(z) for a label that is there, -log(1 - sigmoid(z)) = -log sigmoid(-z) for one that is not
        loss = np.logaddexp(0, np.where(targets, -logits, logits))
        figures = {"macro_F1": f1.mean(), "micro_F1": micro, "exact_match": (decided == targets).all(-1).mean()}
        figures["loss"] = loss.mean()
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


def f1_of_labels(decided, targets):
    """F1 = 2 TP / (2 TP + FP + FN) of each label, float [labels]; 0 for a label that is neither there nor given.

    Args: decided, targets: bool [n, labels].
    """
    hits, errors = (decided & targets).sum(0), (decided ^ targets).sum(0)
    return 2 * hits / np.maximum(2 * hits + errors, 1)


def softmax(logits):
    """Probabilities float64 [..., classes] of logits [..., classes]."""
    logits = np.asarray(logits, "float64")
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def sigmoid(logits):
    """Probabilities float64 [...] of logits [...], each on its own."""
    return np.exp(-np.logaddexp(0, -np.asarray(logits, "float64")))


# By name


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
    except (TypeError, ValueError) as error:
        raise UserError(f"objective {description['name']!r}: its settings do not fit here ({error})") from error
    if objective.describe() != description:
        raise UserError(f"objective {description['name']!r}: {description} was made by another version of it")
    return objective


def of_record(record):
    """The objective of a model. Args: record: its stage.json. Raises: as of_description."""
    return of_description(record.get("objective"))


def of_records_like(row):
    """The objective for data of your own, by the form of a record. Args: row: dict."""
    return MultiLabel() if isinstance(row.get("labels"), list) and "label" not in row else Classification()


def shown(metric):
    """The name of a metric as messages and tables have it: macro_F1 is "macro F1"."""
    return metric.replace("_", " ")
