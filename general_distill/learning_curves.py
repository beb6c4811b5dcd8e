"""Learning curves, here accuracy against the number of labels: tables, plot, and what one start gains over another.

A row is a result of few_labels.study: ``labels``, and ``accuracies``, one per seed, from 0 to 1.
"""

import numpy as np

from common import plots


def labels_needed(curve, accuracy):
    """The number of labels with which a curve reaches an accuracy, between its points by the logarithm of the number.

    Args: curve: [(labels, accuracy)] in rising order of labels.
    Returns: a number; the first point's if that is as accurate already; None if no point is.
    """
    few, low = curve[0]
    if accuracy <= low:
        return float(few)
    for many, high in curve[1:]:
        if accuracy <= high:
            return few * (many / few) ** ((accuracy - low) / (high - low))
        few, low = many, high
    return None


def curve_of(rows):
    """[(labels, mean accuracy)] of one start."""
    return sorted((row["labels"], float(np.mean(row["accuracies"]))) for row in rows)


def compared(rows, compare):
    """What the first of ``compare`` gains over each of the others.

    Args: rows: {start: results of study}.
    Returns: {twin: [{labels, accuracy of the twin, gain, needed: labels with which the first is as accurate, or None}]}
    """
    curve = curve_of(rows[compare[0]])
    accuracy_with = dict(curve)
    found = {}
    for twin in compare[1:]:
        both = [(labels, accuracy) for labels, accuracy in curve_of(rows[twin]) if labels in accuracy_with]
        found[twin] = [
            {
                "labels": labels,
                "accuracy": accuracy,
                "gain": accuracy_with[labels] - accuracy,
                "needed": labels_needed(curve, accuracy),
            }
            for labels, accuracy in both
        ]
    return found


def tables_of(rows, compare):
    """Lines of a Markdown table of all accuracies, in per cent, and of one for each twin. Args: as for compared."""
    lines = accuracy_table(rows)
    labels = [row["labels"] for row in rows[compare[0]]]
    for twin, found in compared(rows, compare).items():
        lines += ["", *gain_table(compare[0], twin, found, min(labels), max(labels))]
    return lines


def accuracy_table(rows):
    """A line for each number of labels, a column for each start: mean (lowest-highest of the seeds)."""
    cells = {}
    for start, found in rows.items():
        for row in found:
            accuracies = [100 * accuracy for accuracy in row["accuracies"]]
            cell = f"{np.mean(accuracies):.2f}"
            if len(accuracies) > 1:
                cell += f" ({min(accuracies):.2f}-{max(accuracies):.2f})"
            cells.setdefault(row["labels"], {})[start] = cell
    body = [[labels, *(cells[labels].get(start, "") for start in rows)] for labels in sorted(cells)]
    return markdown(["labels", *rows], body)


def gain_table(first, twin, found, fewest, most):
    """What a start gains over a twin. Args: found: of compared. fewest, most: labels that the first was given."""
    body = []
    for row in found:
        if row["needed"] is None:
            needed = f"> {most}"
        elif row["needed"] == fewest:
            needed = f"≤ {fewest}"
        else:
            needed = f"{row['needed']:.0f}"
        body.append([row["labels"], f"{100 * row['accuracy']:.2f}", f"{100 * row['gain']:+.2f}", needed])
    return markdown(["labels", twin, f"gain of {first}", f"labels that {first} needs"], body)


def markdown(header, body):
    """Lines of a Markdown table."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in (header, ["---"] * len(header), *body)]


def draw(path, tasks):
    """Plots accuracy against the number of labels: means, and the range of the seeds. Args: tasks: of the JSON file."""
    pyplot = plots.import_pyplot()
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4.2), squeeze=False, layout="constrained")
    starts = dict.fromkeys(start for found in tasks.values() for start in found["rows"])
    colors = {start: f"C{number}" for number, start in enumerate(starts)}  # the same for all tasks
    for axis, (task, found) in zip(axes[0], tasks.items()):
        for start, rows in found["rows"].items():
            rows = sorted(rows, key=lambda row: row["labels"])
            labels = [row["labels"] for row in rows]
            accuracies = [100 * np.array(row["accuracies"]) for row in rows]
            axis.plot(labels, [a.mean() for a in accuracies], color=colors[start], marker="o", label=start)
            lowest, highest = [a.min() for a in accuracies], [a.max() for a in accuracies]
            axis.fill_between(labels, lowest, highest, color=colors[start], alpha=0.2)
        majority = 100 * found["majority_class"]
        axis.axhline(majority, color="gray", linestyle="--", label="majority class")
        axis.set(title=f"{task} dev accuracy, %", xlabel="labelled train records", xscale="log")
        numbers = sorted({row["labels"] for rows in found["rows"].values() for row in rows})
        axis.set_xticks(numbers, [f"{number:,}" for number in numbers])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=100, format="png")
