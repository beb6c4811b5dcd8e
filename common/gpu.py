"""What is found out about a GPU before anything is loaded: whether this Paddle can run on it, and what is missing.

The figures are those of paddlepaddle-gpu 2.6.2: read from its files, and not tried on a GPU.
"""

import os
import re
import sys

from common import UserError

# Its kernels are for compute capability 6.1, 7.0, 7.5, 8.0 and 8.6; a GPU also runs those of a lower minor number.
OLDEST, NEWEST = (6, 1), (8, 9)
# CUDA 11.8 runs with every driver of CUDA 11 (NVIDIA's minor version compatibility).
OLDEST_DRIVER = (450, 80, 2)
DRIVER_FILE = "/proc/driver/nvidia/version"


def driver_version(path=DRIVER_FILE):
    """The version of NVIDIA's driver, such as (525, 60, 13), or None if none is loaded."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        found = re.search(r"\b(\d+)\.(\d+)(?:\.(\d+))?\b", file.read())
    return tuple(int(number or 0) for number in found.groups()) if found else None


def tensorrt_version():
    """The version of the TensorRT that Paddle finds, such as (8, 5, 3); (0, 0, 0) if it finds none."""
    from common.compat import paddle

    return tuple(paddle.inference.get_trt_runtime_version())


def why_none(driver):
    """Why a Paddle for CUDA sees no GPU, and the way out. Args: driver: of driver_version()."""
    if driver is None:
        return "no NVIDIA driver is loaded (in a container: start it with --gpus all); use --device cpu"
    if driver < OLDEST_DRIVER:
        return (
            f"driver {dotted(driver)} is too old for CUDA 11.8, which needs {dotted(OLDEST_DRIVER)}; use --device cpu"
        )
    return "the driver is there, but shows no GPU; look at CUDA_VISIBLE_DEVICES, or use --device cpu"


def check_capability(name, capability):
    """Raises: UserError for a GPU that this Paddle has no kernels for."""
    if not OLDEST <= capability <= NEWEST:
        raise UserError(
            f"{name} has compute capability {dotted(capability)}, and paddlepaddle-gpu 2.6.2 has kernels for "
            f"{dotted(OLDEST)} to {dotted(NEWEST)} only; use --device cpu, or a Paddle from its own package index that "
            "is built for this GPU"
        )


def describe(number):
    """Lines about GPU ``number``, its driver and TensorRT. Raises: UserError if Paddle cannot run there."""
    from common.compat import paddle

    name = paddle.device.cuda.get_device_name(number)
    capability = tuple(paddle.device.cuda.get_device_capability(number))
    check_capability(f"GPU {number} ({name})", capability)
    driver, tensorrt = driver_version(), tensorrt_version()
    lines = [f"GPU {number}: {name}, compute capability {dotted(capability)}"]
    lines.append(f"driver: {dotted(driver) if driver else 'unknown'} (CUDA 11.8 needs {dotted(OLDEST_DRIVER)})")
    found = dotted(tensorrt) if any(tensorrt) else "not found; `bash setup_env.sh --gpu` installs it"
    return [*lines, f"TensorRT: {found}"]


def check_tensorrt():
    """Raises: UserError if Paddle finds no TensorRT, without which INT8 cannot be computed on a GPU."""
    if not any(tensorrt_version()):
        raise UserError(
            "INT8 on a GPU needs TensorRT, and Paddle finds none: `bash setup_env.sh --gpu` installs it; or quantize "
            "on the CPU: --device cpu --for gpu"
        )


def dotted(version):
    return ".".join(map(str, version))


def show(number):
    """Prints describe(number) on standard error."""
    for line in describe(number):
        print(line, file=sys.stderr)
