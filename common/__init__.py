"""What the stages share. Importing it prepares the process for Paddle; it does not import Paddle itself.

Paddle reads most of these settings once, while it is imported, so every script imports from here first:

    from common import cli, runs, ...
    from common.compat import paddle          # Paddle itself, with the defects of this version cured

A stage is copied as its directory + common/ + data.py. Nothing in here imports data.py or a stage.
"""

import contextlib
import importlib.metadata
import os
import re
import warnings

from common import watchdog


def _paddle_version():
    """The version of the Paddle that is installed, such as (2, 6, 2); (0,) if there is none. Does not import it."""
    for name in ("paddlepaddle", "paddlepaddle-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(name))[:3]))
    return (0,)


# Cures of defects ask for it: each is for the versions in the lock files that have the defect (requirements/README.md).
PADDLE = _paddle_version()

# libpaddle 2.6.2 exports its own zlib symbols. A zlib that is loaded after it binds to them and crashes while
# inflating; a zlib that is loaded first does not. tests/test_compat.py shows the crash.
if PADDLE < (3,):
    import zlib  # noqa: F401

# Paddle 3's new intermediate representation has no oneDNN INT8, and exports .json graphs that Paddle 2 cannot read.
# This flag keeps the one of before. Paddle 2.6.2 has it off by itself.
if PADDLE >= (3,):
    os.environ.setdefault("FLAGS_enable_pir_api", "0")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class UserError(Exception):
    """A mistake of the user. cli.run prints its message as one line and ends the script with exit status 2."""


# Before Paddle is imported, which may take a minute from a slow disk: the processes of a training wait for each other.
watchdog.start()

# Importing Paddle sets OMP_NUM_THREADS=1, which would train on one core. Processes that paddle.distributed.launch
# starts on one machine (PADDLE_LOCAL_SIZE of them) share its cores.
CORES = len(os.sched_getaffinity(0))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // int(os.environ.get("PADDLE_LOCAL_SIZE", "1")))))


def mkl_cpu_type(cpuinfo):
    """The MKL_DEBUG_CPU_TYPE that helps a processor, or None.

    The MKL in Paddle's wheels (2019.5) recognizes Intel processors only and gives an AMD processor its slowest code:
    60 GFLOPS where its AVX2 code, type 5, reaches 170 (FP32, 2400 x 768 x 3072, two cores of an EPYC Zen 4).

    Args: cpuinfo: the text of /proc/cpuinfo.
    """
    is_amd = "AuthenticAMD" in cpuinfo
    has_avx2 = {"avx2", "fma"} <= set(cpuinfo.split())
    return "5" if is_amd and has_avx2 else None


with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as _file:
    if _type := mkl_cpu_type(_file.read()):
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", _type)

# Paddle's C++ code logs every executor and every graph pass, which would drown the messages meant for the user.
os.environ.setdefault("GLOG_minloglevel", "2")
# jieba (a dependency of PaddleNLP) and distutils (used by Paddle) warn at every import.
for _message in (".*pkg_resources is deprecated.*", ".*Setuptools is replacing distutils.*", ".*No ccache found.*"):
    warnings.filterwarnings("ignore", message=_message)
