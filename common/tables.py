"""The tables of summarize.py for one fine-tuned model, a grid, CLUE, and stages of your own: Markdown, rows."""

import os
from typing import NamedTuple, Optional

from common import significance
from common.objectives import shown
from common.records import STAGES, constant_answer, descendants, graph_files, parameter_hashes, score


class Published(NamedTuple):
    accuracies: tuple  # CLUE dev accuracy in %, in the order of TASKS
    average: float
    params: float  # millions
    flops: Optional[float]  # 10^9 multiply-adds at 128 tokens
    speedup: float  # over BERT-base, with the fast tokenizer

    def accuracy(self, task):
        return self.accuracies[TASKS.index(task)]


# The columns of the published table. Source: README of PaddleNLP's PP-MiniLM example (T4, batch 32 x 128 tokens,
# INT8 for the quantized models).
TASKS = ("AFQMC", "TNEWS", "IFLYTEK", "CMNLI", "OCNLI", "CLUEWSC2020", "CSL")
PRUNED_QUANTIZED = "pruned to 0.75 + quantized"
PUBLISHED = {
    "fine-tuned": Published((74.14, 57.43, 61.75, 81.01, 76.17, 86.18, 79.17), 73.69, 59.7, 5.44, 2.15),
    "pruned to 0.75": Published((73.91, 57.44, 61.64, 81.10, 75.59, 85.86, 78.53), 73.44, 49.1, 4.08, 2.74),
    "quantized": Published((74.19, 57.13, 61.10, 81.20, 76.10, 85.20, 78.03), 73.28, 59.8, None, 7.34),
    PRUNED_QUANTIZED: Published((74.00, 57.37, 61.33, 81.09, 75.56, 85.85, 78.57), 73.40, 49.2, None, 8.88),
}


# The grid and the CLUE table


def model_directory(record):
    """The absolute path of MODEL for a model in MODEL/models/TASK/LR_BATCH; elsewhere the model's own directory."""
    parts = os.path.abspath(record["path"]).split(os.sep)
    return os.sep.join(parts[:-3] if parts[-3] == "models" else parts)


def remarks(record):
    """Reasons why a figure is not comparable with others, as a list: random weights, partial data."""
    data = record["data"]
    reasons = list(record["notes"]) + [f"partial {n} data: {d['partial']}" for n, d in data.items() if d.get("partial")]
    return list(dict.fromkeys(reasons))


def best_cells(roots):
    """{(task, selecting metric): the fine-tuned record with the best dev result}; of equal ones the first by path."""
    best = {}
    for record in roots:
        key = record["task"], metric_of(record)
        if rank(record) > rank(best.get(key)):
            best[key] = record
    return best


def rank(record):
    """Sort key of a record among those of its task and metric: complete dev set, then its size, then the figure."""
    if record is None:
        return (-1,)
    dev = record["data"].get("dev") or {}
    return not dev.get("partial"), dev.get("examples", 0), score(record)


def metric_of(record):
    """The metric that selects, which is the figure of a record in every table; "" if a stage of your own names none."""
    objective = record.get("objective")
    return str(objective.get("metric", "")) if isinstance(objective, dict) else ""


def figure_of(record):
    """The figure of that metric, or None."""
    figure = record["metrics"].get(metric_of(record))
    return figure if isinstance(figure, (int, float)) else None


def kind_of(record):
    """The row of the CLUE table that a record belongs to, or None."""
    width = record["model"]["width_mult"]
    pruned = f"pruned to {width:g}" if width != 1 else ""
    if record["stage"] == "finetune":
        return "fine-tuned"
    if record["stage"] == "quantize":
        return f"{pruned} + quantized" if pruned else "quantized"
    if record["stage"] == "prune_export" and (record.get("export") or {}).get("bytes"):
        return pruned or None
    return None


def clue_rows(roots, children, speedups, speeds):
    """The CLUE table of one model directory: [{row, metric, cells: {task: record}, present: [record], average, ...}].

    Each cell holds the record that is best on dev. Models that another metric than accuracy selected have rows of their
    own, behind, which are not those of the published table.

    Args: children: result of records.children_among. speedups: {row: speed-up}. speeds: {row, or hash of a parameter
        file: sentences per second}; those of a row are TNEWS's, as the benchmark is.
    """
    cells = {}
    for root in roots:
        for record in [root, *descendants(root, children)]:
            kind = kind_of(record)
            if not kind:
                continue
            row = cells.setdefault((metric_of(record), kind), {})
            if rank(record) > rank(row.get(record["task"])):
                row[record["task"]] = record
    order = sorted(cells, key=lambda key: ("quantized" in key[1], "pruned" in key[1], key[1]))
    order.sort(key=lambda key: (key[0] != "accuracy", key[0], key[1] == PRUNED_QUANTIZED))
    rows = []
    for metric, kind in order:
        row = cells[metric, kind]
        example = row.get("TNEWS") or next(iter(row.values()))
        present = [row[task] for task in TASKS if task in row]
        average = sum(map(score, present)) / len(TASKS) if len(present) == len(TASKS) else None
        sizes = {"params": example["params"], "flops": example["flops"], "bytes": size_of(example)}
        timed = {"TNEWS": speeds[kind]} if kind in speeds else {}
        for task, record in row.items():
            timed.update((task, speeds[key]) for key in parameter_hashes(graph_files(record)) if key in speeds)
        figures = {"average": average, "speedup": speedups.get(kind), "speeds": timed}
        rows.append({"row": kind, "metric": metric, "cells": row, "present": present, **sizes, **figures})
    return rows


def size_of(record):
    """Size of the deployed parameter file in bytes, or None."""
    return record["metrics"].get("bytes") or (record.get("export") or {}).get("bytes")


def percent(value, sign=""):
    return "" if value is None else f"{value * 100:{sign}.2f}"


def clue_table(model, rows, footnotes):
    """The CLUE table as Markdown lines: measured rows, each followed by published figures and difference, if any."""
    lines = [f"**CLUE dev accuracy, %: {model}**", ""]
    lines += [f"| model | {' | '.join(TASKS)} | average | params | FLOPs | file, MB | speed-up |", "| --- " * 13 + "|"]
    for row in rows:
        marked = [footnotes.marked(row["cells"].get(task)) for task in TASKS]
        average = f"{len(row['present'])} of 7 tasks"
        if row["average"] is not None:
            average = percent(row["average"]) + (" (*)" if any(map(remarks, row["present"])) else "")
        size = f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else ""
        speed = f"{row['speedup']:.2f}x" if row["speedup"] else ""
        flops = f"{row['flops'] / 1e9:.2f} G"
        cells = [f"{row['row']}, measured", *marked, average, f"{row['params'] / 1e6:.2f} M", flops, size, speed]
        lines.append(f"| {' | '.join(cells)} |")
        if row["row"] in PUBLISHED:
            lines += beside_published(row)
    example = "TNEWS" if "TNEWS" in rows[0]["cells"] else next(iter(rows[0]["cells"]))
    lines += ["", f"Parameters, FLOPs and file of a row are those of {example}; other tasks' heads differ in size."]
    lines += ["Published: PaddleNLP's PP-MiniLM example (T4, PaddlePaddle 2.2.2; 6 layers x 768, pre-trained)."]
    first = next(iter(rows[0]["cells"].values()))
    shape = first["model"]["architecture"]
    origin = first["model"]["initialized_from"]
    lines.append(
        f"Measured: {shape['num_hidden_layers']} layers x {shape['hidden_size']}, {origin}; "
        f"on {first['machine']['cpu']}, {first['machine']['cores']} cores; best on dev of each row, INT8 in its engine."
    )
    marked = any(row["average"] is not None and any(map(remarks, row["present"])) for row in rows)
    return lines + (["(*) an average of figures with the remarks that they carry."] if marked else [])


class Footnotes(dict):
    """{remark: its number}, numbered in the order of their appearance. All tables share them, so each stands once."""

    def marks(self, notes):
        """The numbers of notes as they stand in a cell: "(1,2)"; "" if there are none."""
        numbers = sorted(self.setdefault(note, len(self) + 1) for note in notes)
        return f"({','.join(map(str, numbers))})" if numbers else ""

    def marked(self, record):
        """The cell of a record: its accuracy with the numbers of its remarks."""
        return "missing" if record is None else f"{percent(score(record))} {self.marks(remarks(record))}".rstrip()

    def lines(self):
        return [f"({number}) {note}." for note, number in self.items()]


def beside_published(row):
    """The two lines below a measured row: the published figures, and measured minus published."""
    published = PUBLISHED[row["row"]]
    differences = []
    for task in TASKS:
        record = row["cells"].get(task)
        differences.append(percent(score(record) - published.accuracy(task) / 100, "+") if record else "")
    average = row["average"]
    differences.append("" if average is None else percent(average - published.average / 100, "+"))
    flops = f"{published.flops:.2f} G" if published.flops else ""
    figures = " | ".join(f"{value:.2f}" for value in (*published.accuracies, published.average))
    return [
        f"| published | {figures} | {published.params:.1f} M | {flops} | | {published.speedup:.2f}x |",
        f"| difference | {' | '.join(differences)} | | | | |",
    ]


def grid_tables(roots, footnotes):
    """The best cell of each task with its hyper-parameters, and the whole grid, as Markdown. One after the other for
    each metric that selects."""
    by_metric = {}
    for record in roots:
        by_metric.setdefault(metric_of(record), []).append(record)
    lines = []
    for metric, chosen in by_metric.items():
        lines += [""] if lines else []
        lines += grid_tables_of(chosen, shown(metric), footnotes)
    return lines


def grid_tables_of(roots, metric, footnotes):
    """As grid_tables, for records with one metric. Args: metric: as it is shown."""
    best, lines = best_cells(roots), []
    constant, _ = constant_answer(roots[0]["data"]["dev"])
    names = ["task", f"dev {metric}, %", "learning rate", "batch size", "epochs", "max_seq_length", "best step"]
    names += ["cells", f"{constant}, %", "remarks"]
    lines += ["**Best of the grid**", "", f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for (task, _), record in best.items():
        settings = [record["arguments"].get(name) for name in HYPER_PARAMETERS]  # adopt.py knows but the length
        settings = ["" if value is None else f"{value:g}" for value in settings]
        cells = sum(other["task"] == task for other in roots)
        row = [task, percent(score(record)), *settings, str(record["metrics"].get("step", "")), str(cells)]
        row += [percent(constant_answer(record["data"]["dev"])[1]), footnotes.marks(remarks(record))]
        lines.append(f"| {' | '.join(row)} |")
    for task, _ in best:
        cells = {}
        trained = (r for r in roots if r["task"] == task and "learning_rate" in r["arguments"])
        for record in sorted(trained, key=rank):  # of equal settings the best stays
            cells[record["arguments"]["learning_rate"], record["arguments"]["batch_size"]] = record
        if len(cells) > 1:
            rates, sizes = (sorted({key[i] for key in cells}) for i in (0, 1))
            lines += ["", f"**{task}: dev {metric}, %, by learning rate and batch size**", ""]
            lines += [f"| learning rate | {' | '.join(map(str, sizes))} |", "| --- " * (len(sizes) + 1) + "|"]
            for rate in rates:
                lines.append(f"| {rate:g} | {' | '.join(footnotes.marked(cells.get((rate, n))) for n in sizes)} |")
    return lines


def long_rows(model, rows, roots):
    """One flat dict per figure of the tables, for CSV and JSON."""
    flat_rows = []
    for row in rows:
        published = PUBLISHED.get(row["row"])
        for task in TASKS:
            record = row["cells"].get(task)
            number = published.accuracy(task) if published else None
            flat_rows.append({"table": "clue", "model": model, "row": row["row"], "task": task, **flat(record, number)})
        notes = [note for record in row["present"] for note in remarks(record)]
        if row["average"] is None:
            notes = [f"{len(row['present'])} of 7 tasks", *notes]
        place = {"table": "clue", "model": model, "row": row["row"], "task": "average"}
        average = None if row["average"] is None else round(row["average"] * 100, 4)
        difference = round(average - published.average, 4) if published and average is not None else None
        figures = {"accuracy": average, "published": published and published.average, "difference": difference}
        remarks_of_row = "; ".join(dict.fromkeys(notes))
        flat_rows.append({**place, **figures, "speedup": row["speedup"], "remarks": remarks_of_row})
    best = best_cells(roots).values()
    for record in roots:
        place = {"table": "grid", "model": model, "row": "best" if record in best else "", "task": record["task"]}
        settings = {name: record["arguments"].get(name) for name in HYPER_PARAMETERS}
        flat_rows.append({**place, **flat(record, None), **settings})
    return flat_rows


def family_rows(model, root, family, p_values):
    """One flat dict per variant of a fine-tuned model. Args: p_values: of significance.p_values."""
    flat_rows = []
    for record in (root, *family):
        row = row_of(record)
        if row:
            place = {"table": "models", "model": model, "row": row[0], "task": record["task"]}
            p = {"p_value": p_values[record["path"]]} if record["path"] in p_values else {}
            flat_rows.append({**place, **flat(record, None), "agreement": record["metrics"].get("agreement"), **p})
    return flat_rows


HYPER_PARAMETERS = ("learning_rate", "batch_size", "num_train_epochs", "max_seq_length")
COLUMNS = (
    "table model row task accuracy published difference majority_class params flops bytes speedup agreement".split()
)
COLUMNS += [*HYPER_PARAMETERS, "remarks"]
COLUMNS_IF_KNOWN = ("metric", "value", "p_value")


def flat(record, published):
    if record is None:
        return {"accuracy": None, "published": published, "remarks": "missing"}
    figure = figure_of(record)
    measured = None if figure is None else round(figure * 100, 4)
    value = {"accuracy": measured}
    if metric_of(record) != "accuracy":  # which needs no column that says so
        value = {"metric": metric_of(record), "value": measured}
    difference = None if published is None else round(measured - published, 4)
    dev = record["data"].get("dev") or {}
    majority = round(dev["majority_class"] * 100, 4) if "majority_class" in dev else None
    figures = {**value, "published": published, "difference": difference, "majority_class": majority}
    sizes = {"params": record["params"], "flops": record["flops"], "bytes": size_of(record)}
    return {**figures, **sizes, "remarks": "; ".join(remarks(record))}


# One fine-tuned model and its descendants


def row_of(record):
    """[what, score, agreement, params, FLOPs, MB] of a record as table cells, or None if it has no row."""
    stage, metrics, width = record["stage"], record["metrics"], record["model"]["width_mult"]
    size = size_of(record)
    origin = "fine-tuned" if width == 1 else f"pruned to {width:g}"
    if stage == "finetune":
        what = "fine-tuned, FP32"
    elif stage == "prune_export" and size:
        what = f"pruned to {width:g}, FP32"
    elif stage == "onnx":
        kind = f"INT8 {os.path.basename(record['parent']['path'])}" if record["onnx"]["activations"] else "FP32"
        what = f"{origin}, ONNX {kind}"
    elif stage == "quantize":
        variant = record["variant"]
        what = f"{origin}, INT8 {variant['algorithm']}{variant['calib_samples']}"
        if variant.get("floating"):  # quant_post.py --max_drop
            count = len(variant["floating"])
            what += f", {count} {'product' if count == 1 else 'products'} in floating point"
    elif stage not in STAGES:
        what = f"{stage}, {record['directory']}"
    else:
        return None
    params, flops = record["params"], record["flops"]
    sizes = [f"{params / 1e6:.2f} M" if params else "", f"{flops / 1e9:.2f} G" if flops else ""]
    sizes.append(f"{size / 1e6:.1f}" if size else "")
    return [what, percent(figure_of(record)), percent(metrics.get("agreement")), *sizes]


def own_rows(found):
    """One flat dict per record of a stage that this project does not have."""
    place = {"table": "own", "model": ""}
    return [{**place, "row": row_of(record)[0], "task": record["task"], **flat(record, None)} for record in found]


def table_of_own_stages(found, footnotes):
    """The Markdown lines of a table of the records of stages that this project does not have."""
    lines = ["**Stages of your own**", "", "| stage, directory | task | metric | dev, % | params | notes |"]
    lines.append("| --- " * 6 + "|")
    for record in found:
        params = record["params"]
        cells = [f"{record['stage']}, {record['directory']}", record["task"], shown(metric_of(record))]
        cells += [percent(figure_of(record)), f"{params / 1e6:.2f} M" if params else ""]
        cells.append(footnotes.marks(remarks(record)))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def family_table(root, family, footnotes, p_values):
    """The Markdown lines of a table of a fine-tuned model and its descendants. Args: p_values: of significance."""
    rows = [(record, row_of(record)) for record in [root, *family]]
    rows = [(record, row) for record, row in rows if row]
    quantized = [record for record, _ in rows if record["stage"] == "quantize"]
    best = max(quantized, key=score, default=None)
    lines = [f"**{root['task']}**, {root['directory']}", ""]
    names = ["model", f"dev {shown(metric_of(root))}, %", "agreement with FP32, %"]
    names += ["params", "FLOPs", "file, MB", "notes"]
    lines += [f"| {' | '.join(names)} |", "| --- " * 7 + "|"]
    for record, row in rows:
        row[0] += " (best INT8)" if record is best else ""
        row[1] = f"{row[1]} {significance.mark(p_values.get(record['path']))}".rstrip()
        lines.append(f"| {' | '.join(row)} | {footnotes.marks(remarks(record))} |")
    dev, (constant, reached) = root["data"]["dev"], constant_answer(root["data"]["dev"])
    machine, compared = root["machine"], sum(record["path"] in p_values for record, _ in rows)
    return [
        *lines,
        "",
        *([significance.legend(metric_of(root), compared)] if compared else []),
        f"{dev['examples']} dev records, {constant} {reached * 100:.1f} %. "
        f"Measured on {machine['cpu']} ({', '.join(machine['flags'])}), {machine['cores']} cores.",
    ]
