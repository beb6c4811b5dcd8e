"""dev_logits.npz: what a model answered on dev, beside its weights, so that models can be compared record by record.

Accuracies alone do not say whether two models differ: that takes the records on which one is right and the other not.
"""

import os
import zipfile
from typing import NamedTuple

import numpy as np

from common import UserError, files

FILE = "dev_logits.npz"


class Predictions(NamedTuple):
    logits: np.ndarray  # float32 [records, outputs], in the order of the dev file
    targets: np.ndarray  # [records, ...], as batching.targets gives them


def write(directory, logits, targets):
    """Args: logits: [records, outputs], in the order of the dev file. targets: of the same records."""
    path = os.path.join(directory, FILE)
    files.write_arrays(path, logits=np.asarray(logits, "float32"), targets=np.asarray(targets))


def read(record):
    """The Predictions that lie beside a record; None if there are none.

    Args: record: of a model, with its ``path``, as records.find_records gives it.
    Raises: UserError if they are not those of the record: of another number of records or outputs.
    """
    path = os.path.join(record["path"], FILE)
    if not os.path.isfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = Predictions(arrays["logits"], arrays["targets"])
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}); repeat the stage that wrote it, with --overwrite") from error
    expected = (record["data"]["dev"]["examples"], len(record["labels"]))
    whole = found.logits.shape == expected and len(found.targets) == expected[0]
    if not whole or not np.isfinite(found.logits).all():
        raise UserError(f"{path}: not the answers of this model on its dev data; repeat the stage, with --overwrite")
    return found
