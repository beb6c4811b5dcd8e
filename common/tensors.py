"""Files of tensors: model_state.pdparams of Paddle, model.safetensors of Hugging Face. Nothing in them is ever run."""

import codecs
import pickle

import numpy as np

from common import UserError

# .pdparams files. They are pickles, which may execute any code when they are loaded; here only tensors are taken.

# All that paddle.save needs for a state dictionary: arrays, each alone or in a tuple with its name.
ALLOWED_CLASSES = {
    ("builtins", "tuple"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),  # NumPy 2's name
}


def _latin1_bytes(text, encoding):
    """What pickles of protocol 2 call for the bytes of an array."""
    return codecs.latin_1_encode(text)[0]


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):
            return _latin1_bytes
        if (module, name) not in ALLOWED_CLASSES:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no part of a tensor")
        return super().find_class(module, name)


def read_tensors(path):
    """{name: array of numbers} of a state dictionary that paddle.save wrote.

    Raises: UserError if the file is damaged, or holds anything but tensors, or numbers that are not finite.
    """
    try:
        with open(path, "rb") as file:
            content = _TensorUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # damaged bytes make pickle and NumPy raise almost anything
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


# safetensors files


def read_safetensors(path):
    """{name: array of floating-point numbers} of a file; tensors of whole numbers are left out.

    Raises: UserError if the file is damaged, or holds numbers that are not finite.
    """
    import safetensors

    try:
        with open(path, "rb") as file:
            entries = safetensors.deserialize(file.read())
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a file of tensors, or damaged ({error})") from error
    arrays = {}
    for name, entry in entries:
        kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
        if entry["dtype"] not in kinds:
            continue
        array = np.frombuffer(entry["data"], kinds[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":  # the upper half of an FP32 number
            array = (array.astype("<u4") << 16).view("<f4")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name!r} holds numbers that are not finite")
        arrays[name] = array.astype("float32")
    return arrays
