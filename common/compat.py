"""Paddle and its libraries with the defects of the pinned versions cured: ``from common.compat import paddle``.

Each cure states its reason. tests/test_compat.py shows, in fresh processes, what happens without it. What has to be
set before Paddle is imported stands in common/__init__.py.
"""

import contextlib
import io
import os
import sys
import tempfile
from types import SimpleNamespace

from common import PADDLE

# Paddle's advice about OMP_NUM_THREADS on standard error assumes OpenBLAS; these wheels carry MKL.
try:
    with contextlib.redirect_stderr(io.StringIO()):
        import paddle
except ModuleNotFoundError as error:
    if error.name != "paddle":
        raise
    print(f"{sys.executable} has no Paddle: run `bash setup_env.sh`, then `. .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

# Paddle prints a C++ stack trace for every SIGTERM, also for one that was meant.
paddle.disable_signal_handler()


def _import_paddleslim():
    """Imports PaddleSlim's ``nlp_utils`` and undoes what the import does to Paddle. Returns: the module.

    The import replaces the attention of every model in the process by one that lost the 1/sqrt(head_dim) scale and
    takes its mask in another form: nothing fails, the models are silently wrong. PaddleNLP replaces the same methods,
    correctly, so it is imported first and its versions are the ones put back.
    """
    import paddlenlp.transformers  # noqa: F401

    classes = (paddle.nn.MultiHeadAttention, paddle.nn.TransformerEncoder, paddle.nn.TransformerEncoderLayer)
    names = ("forward", "_prepare_qkv")
    correct = {(cls, name): getattr(cls, name) for cls in classes for name in names if hasattr(cls, name)}
    from paddleslim.nas.ofa.utils import nlp_utils

    for (cls, name), method in correct.items():
        if getattr(cls, name).__module__ == nlp_utils.__name__:
            setattr(cls, name, method)
    return nlp_utils


def paddleslim_ofa():
    """PaddleSlim's classes for once-for-all training, usable with Paddle 2.6.2 and 3.1.1.

    Returns: a namespace with ``OFA``, ``Convert``, ``supernet``, ``reorder_head`` and ``reorder_neuron``.
    """
    nlp_utils = _import_paddleslim()
    from paddleslim.nas.ofa import OFA
    from paddleslim.nas.ofa.convert_super import Convert, supernet
    from paddleslim.nas.ofa.layers import SuperLayerNorm

    # SuperLayerNorm unpacks three values where Paddle (2.6.2, 3.1.1) returns one. Width pruning does not change the
    # hidden size, so the ordinary layer normalization does what is needed.
    SuperLayerNorm.forward = paddle.nn.LayerNorm.forward
    return SimpleNamespace(
        OFA=OFA,
        Convert=Convert,
        supernet=supernet,
        reorder_head=nlp_utils.reorder_head,
        reorder_neuron=nlp_utils.reorder_neuron,
    )


def quant_post_static(*args, **kwargs):
    """``paddleslim.quant.quant_post_static``; ``algo='avg'`` of Paddle 2.6.2 fails on 0-D activations, as it indexes
    their shape."""
    _import_paddleslim()
    from paddleslim.quant import quant_post_static as library_call

    if PADDLE >= (3,):
        return library_call(*args, **kwargs)
    import numpy as np
    from paddle.static.quantization import PostTrainingQuantization
    from paddle.static.quantization import post_training_quantization as ptq

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

    Importing the server opens log files in $SERVING_LOG_PATH/PipelineServingLogs. It imports paddle_serving_client, for
    which setup_env.sh has installed a stand-in (requirements/paddle_serving_client.py) where it has no wheel.
    """
    from paddle_serving_server.pipeline import operator
    from paddle_serving_server.pipeline.dag import DAGExecutor

    return SimpleNamespace(
        Op=operator.Op, RequestOp=operator.RequestOp, ResponseOp=operator.ResponseOp, DAGExecutor=DAGExecutor
    )


@contextlib.contextmanager
def away_from_directory(name):
    """Within this block, ``from_pretrained(name)`` finds the built-in model of that name.

    PaddleNLP looks for a directory ``name`` in the working directory before it looks at its built-in names, and the
    documented commands create exactly such a directory (finetuning/ppminilm-6l-768h) to save models in.
    """
    if not os.path.isdir(name):
        yield
        return
    working_directory = os.getcwd()
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        try:
            yield
        finally:
            os.chdir(working_directory)
