"""Cures for defects of the pinned libraries. Import this before Paddle: ``import compat`` comes first in every script.

Each cure states its reason; tests/test_compat.py shows, in fresh processes, what happens without it.
"""

import contextlib
import io
import os
import sys
import tempfile
import warnings

# paddle 2.6.2: libpaddle exports its own zlib symbols, and a zlib that is loaded after it binds to them and crashes
# while inflating. A zlib that is loaded first is safe. Do not let an import sorter move this line below paddle.
import zlib  # noqa: F401  isort: skip

# Importing paddle sets OMP_NUM_THREADS=1, which leaves all other cores idle in training. Processes that
# paddle.distributed.launch starts on one machine share its cores.
_cores = len(os.sched_getaffinity(0))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores // int(os.environ.get("PADDLE_LOCAL_SIZE", "1")))))


def _mkl_cpu_type(cpuinfo):
    """MKL_DEBUG_CPU_TYPE for the processor that the text of /proc/cpuinfo describes, or None.

    The MKL of these wheels (2019.5) knows no processor but Intel's and gives an AMD one its slowest code: 60 GFLOPS
    where its AVX2 code, which the variable asks for, gives 170 (FP32, 2400 x 768 x 3072, two cores of an EPYC Zen 4).
    """
    return "5" if "AuthenticAMD" in cpuinfo and {"avx2", "fma"} <= set(cpuinfo.split()) else None


with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as _file:
    if _type := _mkl_cpu_type(_file.read()):
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", _type)

# Paddle's C++ logs every executor and graph pass; what the user should read would drown.
os.environ.setdefault("GLOG_minloglevel", "2")
# jieba (of PaddleNLP) and distutils (of Paddle) warn at every import, which buries what the user should read.
warnings.filterwarnings("ignore", message=".*pkg_resources is deprecated.*")
warnings.filterwarnings("ignore", message=".*Setuptools is replacing distutils.*")
warnings.filterwarnings("ignore", message=".*No ccache found.*")

# Paddle's own advice about OMP_NUM_THREADS assumes OpenBLAS; these wheels carry MKL.
try:
    with contextlib.redirect_stderr(io.StringIO()):
        import paddle  # noqa: E402
except ModuleNotFoundError as error:
    if error.name != "paddle":
        raise
    print(f"{sys.executable} has no Paddle: run `sh setup_env.sh`, then `. .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)


# Paddle prints a C++ stack trace for every SIGTERM; an end that somebody asked for needs none.
paddle.disable_signal_handler()


def _paddleslim():
    """Imports PaddleSlim and puts back what the import of its ``nlp_utils`` replaces: the attention of every model in
    the process, by one that lost the 1/sqrt(head_dim) scale and takes its mask in another form. Nothing fails then;
    models are silently wrong. PaddleNLP replaces the same methods, rightly, so it has to come first.
    """
    import paddlenlp.transformers  # noqa: F401

    classes = (paddle.nn.MultiHeadAttention, paddle.nn.TransformerEncoder, paddle.nn.TransformerEncoderLayer)
    methods = {
        (cls, name): getattr(cls, name) for cls in classes for name in ("forward", "_prepare_qkv") if hasattr(cls, name)
    }
    from paddleslim.nas.ofa.utils import nlp_utils

    for (cls, name), method in methods.items():
        if getattr(cls, name).__module__ == nlp_utils.__name__:
            setattr(cls, name, method)
    return nlp_utils


def paddleslim_ofa():
    """PaddleSlim's OFA classes, with its defects on Paddle 2.6.2 cured.

    Returns: a namespace with ``OFA``, ``Convert``, ``supernet``, ``reorder_head`` and ``reorder_neuron``.
    """
    from types import SimpleNamespace

    nlp_utils = _paddleslim()
    from paddleslim.nas.ofa import OFA
    from paddleslim.nas.ofa.convert_super import Convert, supernet
    from paddleslim.nas.ofa.layers import SuperLayerNorm

    # SuperLayerNorm unpacks three values where Paddle 2.6.2 returns one. Width pruning leaves the hidden size alone,
    # so the ordinary layer normalization is all that is needed.
    SuperLayerNorm.forward = paddle.nn.LayerNorm.forward
    return SimpleNamespace(
        OFA=OFA,
        Convert=Convert,
        supernet=supernet,
        reorder_head=nlp_utils.reorder_head,
        reorder_neuron=nlp_utils.reorder_neuron,
    )


def quant_post_static(*args, **kwargs):
    """``paddleslim.quant.quant_post_static`` with ``algo='avg'`` cured: it indexes the shape of 0-D activations."""
    import numpy as np

    _paddleslim()
    from paddle.static.quantization import PostTrainingQuantization
    from paddle.static.quantization import post_training_quantization as ptq
    from paddleslim.quant import quant_post_static as library_call

    load, sample_avg = ptq.utils.load_variable_data, PostTrainingQuantization._sample_avg

    def sample_avg_at_least_1d(self):
        ptq.utils.load_variable_data = lambda scope, name: np.atleast_1d(load(scope, name))
        try:
            sample_avg(self)
        finally:
            ptq.utils.load_variable_data = load

    PostTrainingQuantization._sample_avg = sample_avg_at_least_1d
    try:
        return library_call(*args, **kwargs)
    finally:
        PostTrainingQuantization._sample_avg = sample_avg


def paddle_serving():
    """Paddle Serving's pipeline: a namespace with Op, RequestOp, ResponseOp and DAGExecutor.

    Importing it opens log files in $SERVING_LOG_PATH/PipelineServingLogs. It takes the name ``Client`` from
    paddle_serving_client, which has no wheel for Python 3.10 and later, and never uses it for a model in the process.
    """
    from importlib.util import find_spec
    from types import ModuleType, SimpleNamespace

    if "paddle_serving_client" not in sys.modules and find_spec("paddle_serving_client") is None:
        sys.modules["paddle_serving_client"] = ModuleType("paddle_serving_client")
        sys.modules["paddle_serving_client"].Client = type("Client", (), {})
    from paddle_serving_server.pipeline import operator
    from paddle_serving_server.pipeline.dag import DAGExecutor

    return SimpleNamespace(
        Op=operator.Op,
        RequestOp=operator.RequestOp,
        ResponseOp=operator.ResponseOp,
        DAGExecutor=DAGExecutor,
    )


@contextlib.contextmanager
def away_from_directory(name):
    """While this is entered, ``from_pretrained(name)`` finds the built-in model of that name.

    PaddleNLP looks for a directory ``name`` in the working directory before it looks at its built-in names, and the
    documented commands create exactly such a directory (finetuning/ppminilm-6l-768h) to save models in.
    """
    if not os.path.isdir(name):
        yield
        return
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        try:
            yield
        finally:
            os.chdir(here)
