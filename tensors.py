"""Reads .pdparams files. They are pickles, which may run any code when they are loaded; here only tensors are taken."""

import codecs
import pickle

import numpy as np

from utils import UserError

# All that paddle.save needs for a state dictionary: arrays, each alone or in a tuple with its name.
ALLOWED = {
    ("builtins", "tuple"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),  # NumPy 2's name
}


def encode(text, encoding):
    """What pickles of protocol 2 call for an array's bytes."""
    return codecs.latin_1_encode(text)[0]


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):
            return encode
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no part of a tensor")
        return super().find_class(module, name)


def read(path):
    """{name: array of numbers} of a state dictionary that paddle.save wrote.

    Raises: UserError if the file is damaged, or holds anything but tensors, or numbers that are not finite.
    """
    try:
        with open(path, "rb") as file:
            content = Unpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # of damaged bytes pickle and NumPy may raise almost anything
        raise UserError(f"{path}: not a file of tensors, or damaged ({error}); it was not loaded") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not tensors with their names")
    arrays = {}
    for name, value in content.items():
        if name == "StructuredToParameterName@@":  # Paddle's own table of names
            continue
        array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
        if not isinstance(name, str) or not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise UserError(f"{path}: {name!r} is {kind}, not a tensor of numbers")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path}: {name!r} holds numbers that are not finite")
        arrays[name] = array
    return arrays
