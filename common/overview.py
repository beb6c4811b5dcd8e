"""The short format of summarize.py: one screen that tells what every stage cost and gained."""

import textwrap

from common import significance
from common.objectives import shown
from common.records import constant_answer
from common.tables import Footnotes, metric_of, remarks, row_of

WIDTH = 100  # columns of a screen


def short_tables(families, own_stages, timed_on, p_values):
    """Per task one small table, one line per stage: what is best on dev of each. Below, every note once.

    Args: families: [(model, rows of tables.clue_rows)]. own_stages: records of stages that this project does not have.
        timed_on: names of the machines that the speeds in the rows were measured on. p_values: of significance.
    Returns: lines of Markdown, aligned to be read on a screen.
    """
    found = {}  # title and metric of a table: [(record, sentences per second or None)]
    for model, rows in families:
        for row in rows:
            for task, record in row["cells"].items():
                title = task if len(families) == 1 else f"{task}, {model}"
                found.setdefault((title, row["metric"]), []).append((record, row["speeds"].get(task)))
    for record in own_stages:
        title = f"{record['task']}, stages of your own"
        found.setdefault((title, metric_of(record)), []).append((record, None))
    # A note is marked as far up as it is true: of every row, not at all; of every row of a table, in its head.
    of_all = shared_notes([record for rows in found.values() for record, _ in rows])
    footnotes, lines, compared = Footnotes(), [], {}
    for (title, metric), rows in found.items():
        of_table = [note for note in shared_notes([record for record, _ in rows]) if note not in of_all]
        cells = [head(title, footnotes.marks(of_table), rows[0][0])]
        for record, speed in rows:
            what, figure, _, params, _, size = row_of(record)
            marks = footnotes.marks([note for note in brief_notes(record) if note not in (*of_all, *of_table)])
            p = p_values.get(record["path"])
            compared[metric] = compared.get(metric, 0) + (p is not None)
            figure = figure and f"{significance.mark(p)}{figure} %"
            figures = [figure, params, size and f"{size} MB", speed and f"{speed:,.0f}"]
            cells.append([f"{what} {marks}".rstrip(), *figures])
        lines += [*aligned(cells), ""]
    notes = []
    if any(speed for rows in found.values() for _, speed in rows):
        notes.append(f"sentences/s: {', '.join(['dev end to end', 'tokenizing included', *timed_on])}.")
    notes += [significance.legend(metric, count) for metric, count in compared.items() if count]
    notes += [f"Notes on all rows: {'; '.join(of_all)}."] if of_all else []
    notes = [line for note in notes + footnotes.lines() for line in textwrap.wrap(note, WIDTH, break_on_hyphens=False)]
    return lines + notes if notes else lines[:-1]


def head(title, marks, record):
    """The head of a task's table. Args: record: of one of its models."""
    title, dev = f"{title} {marks}".rstrip(), record["data"].get("dev") or {}
    if "examples" in dev:
        constant, reached = constant_answer(dev)
        title += f": {dev['examples']} dev, {constant} {reached * 100:.1f} %"
    return [title, shown(metric_of(record)), "params", "file", "sentences/s"]


def brief_notes(record):
    """Its remarks, without those of a later stage ("pruning: partial ...") that repeat one of a stage before."""
    notes = remarks(record)
    return [note for note in notes if note.partition(": ")[2] not in notes]


def shared_notes(found):
    """The notes that all the records have."""
    if not found:
        return []
    return [note for note in brief_notes(found[0]) if all(note in brief_notes(record) for record in found)]


def aligned(rows):
    """Markdown lines of a table whose columns are as wide as their widest cell, numbers on the right; "-": no value."""
    rows = [[cell or "-" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    bars = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in (rows[0], bars, *rows[1:]):
        padded = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"| {' | '.join(padded)} |")
    return lines
