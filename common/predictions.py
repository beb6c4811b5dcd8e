"""dev_logits.npy: what a model answered on dev, beside its weights, so that models can be compared record by record.

Accuracies alone do not say whether two models differ: that takes the records on which one is right and the other not.
"""

import os

import numpy as np

from common import UserError, files

FILE = "dev_logits.npy"


def write(directory, logits):
    """Args: logits: float32 [records, outputs], in the order of the dev file."""
    files.write_array(os.path.join(directory, FILE), np.asarray(logits, "float32"))


def read(record):
    """The logits float32 [records, outputs] that lie beside a record; None if there are none.

    Args: record: of a model, with its ``path``, as records.find_records gives it.
    Raises: UserError if they are not those of the record: of another number of records or outputs.
    """
    path = os.path.join(record["path"], FILE)
    if not os.path.isfile(path):
        return None
    try:
        logits = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); repeat the stage that wrote it, with --overwrite") from error
    expected = (record["data"]["dev"]["examples"], len(record["labels"]))
    if logits.shape != expected or not np.isfinite(logits).all():
        raise UserError(f"{path}: not the answers of this model on its dev data; repeat the stage, with --overwrite")
    return logits
