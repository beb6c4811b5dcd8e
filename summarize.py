"""Prints the result tables from the records of the stages.

Reads only the stage.json files under the given directories (default: those of the stages, your own included). A pruned
or quantized model is assigned to its fine-tuned model by the hash of the weights, so that different runs do not mix.
Prints per model directory: the CLUE table, measured and published; the best cell of each task; the whole grid; for each
fine-tuned model that was compressed, all variants made from it; what stages of your own made; every note once.
`--format short` prints one screen instead: per task, the best model of every stage.

    python summarize.py --task_name TNEWS
    python summarize.py --format short
    python summarize.py --format csv > tables.csv
    python summarize.py --task_name TNEWS --json results/tnews.json --plot tnews.png
    python summarize.py --task_name TNEWS --report tnews_report     # where the best models err, and where they differ
"""

import collections
import csv
import json
import os
import sys
from typing import NamedTuple

import data
from common import ROOT, UserError, cli, files, overview, plots, reports, significance, tables
from common.records import STAGES, children_among, descendants, find_records, score

DEFAULT_DIRECTORIES = ("general_distill", "finetuning", "pruning", "quantization")
NO_STAGES = ("common", "configs", "demo", "deploy", "requirements", "results", "tests")
BEST = "best.json"
FORMATS = ("markdown", "short", "csv", "json")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("directories", nargs="*", help="directories to search for stage.json files")
    parser.add_argument("--task_name", type=cli.task_name, help="show only this task, without the CLUE table")
    parser.add_argument("--format", choices=FORMATS, default="markdown", help="short: one screen")
    parser.add_argument("--json", help="also write the records to this file, sorted as in the tables")
    help = "perf.json of infer_perf.sh, or FILE of infer.py --perf_json; adds speed-ups, sentences/s; may be repeated"
    parser.add_argument("--perf", metavar="FILE", action="append", default=[], help=help)
    parser.add_argument("--plot", help="plot accuracy against size (and speed, with --perf) to this file")
    reports.add_arguments(parser)
    help = "where the texts of the report are (default: $CLUE_DATA_DIR, else it goes without texts)"
    parser.add_argument("--data_dir", help=help)
    parser.add_argument("--cells", help="print a best.json, one tab-separated line per task, for launchers")
    args = parser.parse_args(argv)
    if args.data_dir and not args.report:
        parser.error("--data_dir goes with --report, which shows texts")
    return args


def write_best(model):
    """Writes MODEL/best.json: path and hyper-parameters of the best finished cell of each task."""
    if not os.path.isdir(os.path.join(model, "models")):
        return
    roots = [r for r in find_records([os.path.join(model, "models")]) if r["stage"] == "finetune"]
    roots = [r for r in roots if "learning_rate" in r["arguments"]]  # not what finetuning/adopt.py took in
    cells, counts = {}, collections.Counter((record["task"], tables.metric_of(record)) for record in roots)
    for (task, metric), record in sorted(tables.best_cells(roots).items(), key=lambda item: counts[item[0]]):
        cells[task] = {  # of several metrics, the one of most cells
            "path": os.path.relpath(record["path"], model),
            metric: score(record),
            "selected_on": "dev",
            "remarks": tables.remarks(record),
            "cells": counts[task, metric],
            **{name: record["arguments"][name] for name in tables.HYPER_PARAMETERS},
        }
    if cells:
        files.write_whole(os.path.join(model, BEST), json.dumps(dict(sorted(cells.items())), indent=1) + "\n")


def read_best(path):
    """Yields (task, learning rate, batch size, epochs, max_seq_length, model directory) of a best.json."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; finetuning/run_one_search.sh writes MODEL/{BEST}")
    try:
        with open(path, encoding="utf-8") as file:
            cells = json.load(file)
        for task, cell in cells.items():
            directory = os.path.join(os.path.dirname(path), cell["path"])
            yield (task, *(f"{cell[name]:g}" for name in tables.HYPER_PARAMETERS), directory)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a {BEST} of finetuning/run_one_search.sh") from error
    if not cells:
        raise UserError(f"{path}: names no task")


class Perf(NamedTuple):
    """What the files of --perf tell together."""

    speedups: dict  # {row of the CLUE table: speed-up against BERT-base}
    speeds: dict  # {row of the CLUE table, or hash of a parameter file: sentences per second}
    machines: list  # names of those that the files were measured on


def read_perf(paths):
    """What the files tell: a benchmark's JSON, {"rows": [{"row": "quantized", "speedup": 2.7}, ...]}, and that of
    infer.py --perf_json, {"rows": [{"weights": SHA256, "precision": "int8", "sentences_per_second": 480}, ...]}."""
    found = Perf({}, {}, [])
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            for row in content["rows"]:
                name = row["row"] if "row" in row else row["weights"]
                if "row" in row:
                    found.speedups[name] = float(row["speedup"])
                # In other precisions a model has no row in the tables.
                if row.get("precision") in ("fp32", "int8"):
                    found.speeds[name] = float(row["sentences_per_second"])
            if "machine" in content:
                machine = f"{content['machine']['cpu']}, {content['machine']['cores']} cores"
                device = content.get("device", "cpu")
                machine += "" if device == "cpu" else f", {device}"
                found.machines.extend([machine] if machine not in found.machines else [])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--perf {path}: not a benchmark's JSON ({error!r})") from error
    return found


def report_pages(args, roots, records):
    """--report: {directory: Page}, of each task the best fine-tuned model, and the best one of each kind that was made
    from it. Nothing is written yet. A task whose models have kept no answers is left out, with a note.

    Raises: UserError if no task is left.
    """
    if not roots:
        raise UserError(
            "--report: is about fine-tuned models and what was made from them; here are stages of your own only"
        )
    best, children, pages = tables.best_cells(roots), children_among(records), {}
    for (task, metric), root in best.items():
        kinds = {}
        for record in (root, *descendants(root, children)):
            kind = tables.kind_of(record)
            if kind and tables.rank(record) > tables.rank(kinds.get(kind)):
                kinds[kind] = record
        kept = reports.kept(list(kinds.values()), records)
        if not kept.models:
            print(f"note: no report of {task}: none of its models has readable answers on dev", file=sys.stderr)
            continue
        several_metrics = sum(other == task for other, _ in best) > 1
        name = f"{task}_{metric}" if several_metrics else task
        directory = args.report if len(best) == 1 else os.path.join(args.report, name)
        dev, examples = root["data"]["dev"], dev_examples(args, root)
        pages[directory] = reports.page_of(kept.models, dev, examples, args.report_errors, kept.targets, kept.missing)
    if not pages:
        raise UserError("--report: no model here has kept its answers on dev; see the notes above")
    return pages


def dev_examples(args, record):
    """The dev records that a model was scored on; None, with a note, if they are not at hand.

    Raises: UserError if --data_dir names other ones.
    """
    reason = "--data_dir DIR brings them"
    if args.data_dir or os.environ.get("CLUE_DATA_DIR"):  # with neither, read_split would start a download
        try:
            limit = record["arguments"].get("max_eval_samples")
            dev = data.read_split(data.task_of(record), "dev", args.data_dir, limit)
            found, scored = dev.describe(), record["data"]["dev"]
            if any(found[key] != scored[key] for key in ("md5", "examples")):
                raise UserError(f"{dev.path}: not the records that {record['directory']} was scored on")
            return dev.examples
        except UserError as error:
            if args.data_dir:
                raise
            reason = error
    print(f"note: the report of {record['task']} has no texts: {reason}", file=sys.stderr)
    return None


def default_directories():
    """The directories of the stages in the repository: first this project's, then those of your own."""
    own = [
        name for name in sorted(os.listdir(ROOT)) if name[0] != "." and name not in (*DEFAULT_DIRECTORIES, *NO_STAGES)
    ]
    return [path for name in (*DEFAULT_DIRECTORIES, *own) if os.path.isdir(path := os.path.join(ROOT, name))]


def main(argv=None):
    args = parse_args(argv)
    if args.cells:
        for cell in read_best(args.cells):
            print("\t".join(cell))
        return
    directories = args.directories or default_directories()
    records = find_records(directories)
    wanted = (args.task_name or "").lower()
    roots = [r for r in records if r["stage"] == "finetune" and wanted in ("", r["task"].lower())]
    own_stages = [r for r in records if r["stage"] not in STAGES and wanted in ("", r["task"].lower())]
    if not roots and not own_stages:
        print(
            f"summarize.py: no finished fine-tuned model{' of ' + args.task_name if args.task_name else ''} under "
            f"{', '.join(map(files.relative, directories))}; name the directory it is in",
            file=sys.stderr,
        )
        sys.exit(1)
    if args.plot and not os.path.isdir(os.path.dirname(os.path.abspath(args.plot))):
        raise UserError(f"--plot {args.plot}: no such directory")
    perf = read_perf(args.perf)
    if perf.speedups and len({tables.model_directory(root) for root in roots}) > 1:
        raise UserError("--perf: the benchmark is of one model, but there are several here; name the directory of one")
    # The pages are made first and written last: of a mistake there is one line, and nothing is half written.
    pages = report_pages(args, roots, records) if args.report else {}
    models, blocks, flat_rows, kept, footnotes = {}, [], [], [], tables.Footnotes()
    for root in roots:
        models.setdefault(tables.model_directory(root), []).append(root)
    children = children_among(records)
    families = [
        (files.relative(model), tables.clue_rows(of_model, children, perf.speedups, perf.speeds))
        for model, of_model in models.items()
    ]
    unlisted = own_stages
    p_values = significance.p_values([r for r in records if wanted in ("", r["task"].lower())], records)
    for (model, rows), of_model in zip(families, models.values()):
        of_clue = [row for row in rows if row["metric"] == "accuracy"]
        if args.task_name or not any(row["present"] for row in of_clue):
            of_clue = []
        if of_clue:
            blocks.append(tables.clue_table(model, of_clue, footnotes))
        blocks.append(tables.grid_tables(of_model, footnotes))
        flat_rows += tables.long_rows(model, of_clue, of_model)
        best = tables.best_cells(of_model).values()
        for root in of_model:
            family = descendants(root, children)
            kept += [{k: v for k, v in record.items() if k != "path"} for record in (root, *family)]
            unlisted = [record for record in unlisted if record not in family]
            if family or root in best:
                blocks.append(tables.family_table(root, family, footnotes, p_values))
                flat_rows += tables.family_rows(model, root, family, p_values)
    if unlisted:  # stages of your own that are in no table above
        blocks.append(tables.table_of_own_stages(unlisted, footnotes))
        flat_rows += tables.own_rows(unlisted)
    if footnotes:
        blocks.append(["**Notes**", "", *footnotes.lines()])
    if args.format == "markdown":
        print("\n\n".join("\n".join(block) for block in blocks))
    elif args.format == "short":
        print("\n".join(overview.short_tables(families, own_stages, perf.machines, p_values)))
    elif args.format == "json":
        print(json.dumps(flat_rows, ensure_ascii=False, indent=1))
    else:
        others = [name for name in tables.COLUMNS_IF_KNOWN if any(name in row for row in flat_rows)]
        writer = csv.DictWriter(sys.stdout, tables.COLUMNS + others, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat_rows)
    if args.json:
        files.write_whole(args.json, json.dumps(kept, ensure_ascii=False, indent=1) + "\n")
    if args.plot:
        plots.draw(args.plot, families, children)
    for directory, page in pages.items():
        reports.save(directory, page)


if __name__ == "__main__":
    cli.run(main)
