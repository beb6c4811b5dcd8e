"""Prints what the stages recorded: for each fine-tuned model its pruned and quantized descendants in one table.

Reads the stage.json files under the given directories (default: finetuning, pruning, quantization) and nothing else. A
descendant is recognized by the hash of the weights that it was made from, so results of different runs do not mix.

    python summarize.py --task_name TNEWS
    python summarize.py --task_name TNEWS --json results/tnews.json
"""

import json
import os
import sys

import utils
from records import RECORD, exported, read_record, relative

DEFAULT_DIRECTORIES = ("finetuning", "pruning", "quantization")


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    parser.add_argument("directories", nargs="*", help="where to look for stage.json files")
    parser.add_argument("--task_name", help="only this task")
    parser.add_argument("--json", help="also write the records to this file, sorted as in the tables")
    return parser.parse_args(argv)


def find_records(directories):
    """Every stage record under the directories, with its place as ``directory``."""
    records = []
    for root in directories:
        if not os.path.isdir(root):
            raise utils.UserError(f"{root}: no such directory")
        for directory, subdirectories, files in sorted(os.walk(root)):
            subdirectories[:] = [d for d in subdirectories if not d.endswith(".unfinished") and not d.startswith(".")]
            if RECORD in files:
                records.append({**read_record(directory), "directory": relative(directory)})
    return records


def weights_in(hashes):
    """The hashes that tell models apart: parameters, not graphs, which are alike for models of one architecture."""
    return {digest for name, digest in hashes.items() if name.endswith((".pdparams", ".pdiparams"))}


def parent_among(record, found):
    """The record that this one was made from: recognized by hash, and by place where several have the same weights."""
    if not record["parent"]:
        return None
    made_from = weights_in(record["parent"]["weights"])
    candidates = [
        other
        for other in found
        if made_from & weights_in({**other["weights"], **exported(other)})
        and other["task"] in (record["task"], "general")
    ]
    candidates.sort(key=lambda other: other["directory"] != record["parent"]["path"])
    return candidates[0] if candidates else None


def descendants(root, records):
    """The records made from ``root``, directly or not, children behind their parents."""
    found = []
    for record in records:
        if parent_among(record, records) is root:
            found += [record, *descendants(record, records)]
    return found


def row_of(record):
    """(what, accuracy, agreement, params, FLOPs, MB) of a record as table cells, or None if it has no row."""
    stage, metrics, width = record["stage"], record["metrics"], record["model"]["width_mult"]
    size, agreement = (record.get("export") or {}).get("bytes"), ""
    if stage == "finetune":
        what = "fine-tuned, FP32"
    elif stage == "prune_export" and size:
        what = f"pruned to {width:g}, FP32"
    elif stage == "quantize":
        origin = "fine-tuned" if width == 1 else f"pruned to {width:g}"
        what = f"{origin}, INT8 {record['variant']['algorithm']}{record['variant']['calib_samples']}"
        size, agreement = metrics["bytes"], f"{metrics['agreement'] * 100:.2f}"
    else:
        return None
    return [
        what,
        f"{metrics['accuracy'] * 100:.2f}",
        agreement,
        f"{record['params'] / 1e6:.2f} M",
        f"{record['flops'] / 1e9:.2f} G",
        f"{size / 1e6:.1f}" if size else "",
    ]


def table(root, family):
    """The Markdown table of a fine-tuned model and its descendants, with what is random or partial below it."""
    rows = [(record, row_of(record)) for record in [root, *family]]
    rows = [(record, row) for record, row in rows if row]
    quantized = [record for record, _ in rows if record["stage"] == "quantize"]
    best = max(quantized, key=lambda record: record["metrics"]["accuracy"], default=None)
    lines = [
        f"**{root['task']}**, {root['directory']}",
        "",
        "| model | dev accuracy, % | agreement with FP32, % | params | FLOPs | file, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record, row in rows:
        row[0] += " (best INT8)" if record is best else ""
        lines.append(f"| {' | '.join(row)} |")
    dev = root["data"]["dev"]
    machine = root["machine"]
    lines += [
        "",
        f"{dev['examples']} dev records, majority class {dev['majority_class'] * 100:.1f} %. "
        f"Measured on {machine['cpu']} ({', '.join(machine['flags'])}), {machine['cores']} cores.",
    ]
    notes = list(dict.fromkeys(note for record, _ in rows for note in record["notes"]))
    return lines + [f"Note: {note}." for note in notes]


def main(argv=None):
    args = parse_args(argv)
    directories = args.directories or [
        d for d in (os.path.join(utils.ROOT, d) for d in DEFAULT_DIRECTORIES) if os.path.isdir(d)
    ]
    records = find_records(directories)
    roots = [
        r
        for r in records
        if r["stage"] == "finetune" and (not args.task_name or r["task"].lower() == args.task_name.lower())
    ]
    if not roots:
        print(
            f"summarize.py: no finished fine-tuned model{' of ' + args.task_name if args.task_name else ''} under "
            f"{', '.join(map(relative, directories))}",
            file=sys.stderr,
        )
        sys.exit(1)
    kept = []
    for number, root in enumerate(roots):
        family = descendants(root, records)
        kept += [root, *family]
        print("\n".join(([""] if number else []) + table(root, family)))
    if args.json:
        utils.write_whole(args.json, json.dumps(kept, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    utils.run(main)
