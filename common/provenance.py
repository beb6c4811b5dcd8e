"""What a result was made from, and in what two results differ: arguments, weights, data, code."""

import os
import sys

from common import files, objectives, records

# Results from before these arguments were there stay valid: they are those of these values.
VALUES_BEFORE = {
    "gradient_accumulation_steps": 1, "metric": None, "class_weight": None, "shard_corpus": False,
    "number of processes": 1, "warm_start": False,
}  # fmt: skip


def identity(arguments, parent, data, without_effect, objective=None):
    """What makes a result, as a flat dict: arguments, the weights it was made from, the md5 of each data file.

    Args: arguments, parent, data, objective: as in a record. without_effect: names of arguments that do not count.
    """
    made_from = {name: value for name, value in arguments.items() if name not in without_effect}
    made_from.setdefault("metric", objectives.chosen_metric(objective))  # of a stage that takes it from its parent
    for name, before in VALUES_BEFORE.items():
        if made_from.get(name, "") == before:
            del made_from[name]
    made_from["weights made from"] = None
    if parent:
        hashes = sorted(digest[:12] for digest in records.parameter_hashes(parent["weights"]))
        made_from["weights made from"] = " ".join(hashes)
    for name, split in (data or {}).items():
        made_from[f"md5 of {name}"] = split["md5"]
    return made_from


def difference(before, now):
    """In what two identities differ, as text; "" if they are equal."""
    names = sorted(set(before) | set(now))
    values = [(name, *(made_from.get(name, VALUES_BEFORE.get(name)) for made_from in (before, now))) for name in names]
    return ", ".join(f"{name} {was} -> {is_now}" for name, was, is_now in values if was != is_now)


def code_of(shared):
    """{file: sha256} of the code that decides what a run gives: the script that was started, the modules beside it that
    it imported, the shared ones, and the objectives of the user's own.

    It is no part of a run's identity: a comment may change, or a later evaluation be mended, and the run be the same.
    But who goes on with other code is told so, and the record of a result says it.

    Args: shared: paths from common/.
    """
    common = os.path.dirname(os.path.abspath(__file__))
    paths = {*(os.path.normpath(os.path.join(common, path)) for path in shared), *objectives.OWN_FILES}
    started = getattr(sys.modules["__main__"], "__file__", None)
    stage = os.path.dirname(os.path.abspath(started)) if started else ""
    if os.path.dirname(stage) == os.path.dirname(common):  # not a test runner
        loaded = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
        paths |= {os.path.abspath(path) for path in loaded if path and os.path.dirname(os.path.abspath(path)) == stage}
    return {files.relative(path): files.file_hash(path) for path in sorted(paths)}


def changed_code(before, now):
    """The files that are in both and differ, as a text; "" if there is none. Args: as code_of gives them."""
    return ", ".join(name for name in before if now.get(name, before[name]) != before[name])
