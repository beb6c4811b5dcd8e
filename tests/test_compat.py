"""Every cure for a library defect: what happens without it, in a fresh process, and that it is gone with it."""

import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import paddle
import pytest
from conftest import ROOT

import common
from common import modeling


def python(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, **kwargs)


def pythons(*codes, **kwargs):
    """Programs that run at the same time, as each takes seconds to import Paddle."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda code: python(code, **kwargs), codes))


INFLATE = "import zlib; assert zlib.decompress(zlib.compress(b'x' * 100000)) == b'x' * 100000; print('inflated')"


@pytest.mark.skipif(
    not getattr(zlib, "__file__", None), reason="zlib is built into this Python; only a shared one crashes"
)
@pytest.mark.skipif(common.PADDLE >= (3,), reason="a defect of Paddle 2.6.2, gone in 3.1.1 (next test)")
def test_zlib_survives_paddle():
    plain, cured = pythons(f"import paddle; {INFLATE}", f"import common, paddle; {INFLATE}")
    assert plain.returncode < 0, "the defect is gone: remove the cure"
    assert cured.stdout.strip() == "inflated"


@pytest.mark.skipif(common.PADDLE < (3,), reason="of Paddle 3.1.1, which has lost two defects of 2.6.2")
def test_cures_that_paddle_3_does_not_need(tuned, tmp_path):
    assert python(f"import paddle; {INFLATE}").stdout.strip() == "inflated"
    quantize = f"""
import sys; sys.path[:0] = [{ROOT!r}, {ROOT!r} + "/quantization"]
from common import batching, compat
from paddleslim.quant import quant_post_static
compat.quant_post_static = quant_post_static
import calibration
features = [batching.Feature([2, 5, 6, 3], [0] * 4, 0)] * 4
calibration.quantize({str(tuned / "inference")!r}, features, 0, "avg", {str(tmp_path)!r}, False)
"""
    done = python(quantize)
    assert done.returncode == 0 and (tmp_path / "int8.pdmodel").exists(), done.stderr


@pytest.mark.skipif(common.PADDLE < (3,), reason="of Paddle 3.1.1")
def test_paddle_3_exports_graphs_that_paddle_2_reads(tmp_path):
    """Without the flag it writes a .json graph, for which there is no oneDNN INT8."""
    code = (
        "{}; import os, paddle; model = paddle.nn.Linear(2, 2); "
        "paddle.jit.save(model, {!r}, input_spec=[paddle.static.InputSpec([None, 2])]); print(sorted(os.listdir({!r})))"
    )
    for start, graph in (("import zlib", "g.json"), ("import common", "g.pdmodel")):
        directory = tmp_path / graph
        directory.mkdir()
        unset = {name: value for name, value in os.environ.items() if name != "FLAGS_enable_pir_api"}
        done = python(code.format(start, str(directory / "g"), str(directory)), env=unset)
        assert graph in done.stdout, done.stdout + done.stderr


def test_all_cores_are_used_for_training():
    code = "import os; os.environ.pop('OMP_NUM_THREADS', None); import {}; print(os.environ['OMP_NUM_THREADS'])"
    plain, cured = pythons(code.format("paddle"), code.format("common, paddle"))
    assert plain.stdout.strip() == "1"
    assert cured.stdout.strip() == str(common.CORES)


def test_paddleslim_leaves_attention_as_it_was():
    code = (
        "{} import paddle; a = paddle.nn.MultiHeadAttention(8, 2); x = paddle.ones([1, 3, 8]); y = a(x, x, x); "
        "{}; print('equal' if (a(x, x, x) - y).abs().max() == 0 else 'changed')"
    )
    broken, cured = pythons(
        code.format("import zlib;", "from paddleslim.nas.ofa.utils import nlp_utils"),
        code.format("from common import compat;", "compat.paddleslim_ofa()"),
    )
    assert broken.stdout.strip() != "equal", "the defect is gone: remove the cure"
    assert cured.stdout.strip() == "equal"


def test_super_layer_norm_works():
    code = (
        "from common import compat; import paddle; from paddleslim.nas.ofa.layers import SuperLayerNorm; {}; "
        "print(SuperLayerNorm(8)(paddle.ones([2, 8])).shape)"
    )
    broken, cured = pythons(code.format("pass"), code.format("compat.paddleslim_ofa()"))
    assert "ValueError" in broken.stderr, "the defect is gone: remove the cure"
    assert cured.stdout.strip() == "[2, 8]"


@pytest.mark.skipif(common.PADDLE >= (3,), reason="a defect of Paddle 2.6.2, gone in 3.1.1")
def test_avg_quantization_takes_0d_activations(tuned, tmp_path):
    """Without the cure the library's own call ends with an IndexError on the graph that we export."""
    quantize = f"""
import os, sys; sys.path[:0] = [{ROOT!r}, {ROOT!r} + "/quantization"]
from common import batching, compat
import calibration
if {{cured}} is False:
    from paddleslim.quant import quant_post_static
    compat.quant_post_static = quant_post_static
features = [batching.Feature([2, 5, 6, 3], [0] * 4, 0)] * 4
calibration.quantize({str(tuned / "inference")!r}, features, 0, "avg", os.path.join({str(tmp_path)!r}, "{{cured}}"), False)
"""
    plain, cured = pythons(quantize.replace("{cured}", "False"), quantize.replace("{cured}", "True"))
    assert "IndexError" in plain.stderr, "the defect is gone: remove the cure"
    assert cured.returncode == 0 and (tmp_path / "True/int8.pdmodel").exists(), cured.stderr


def test_built_in_name_loads_beside_a_directory_of_that_name(tmp_path):
    """From a cache that is filled by hand the way PaddleNLP lays it out; no network is used."""
    cache, work = tmp_path / "home/models/ppminilm-6l-768h", tmp_path / "finetuning"
    cache.mkdir(parents=True)
    (work / "ppminilm-6l-768h/models").mkdir(parents=True)
    cls = modeling.model_class("ppminilm", "Model")
    model = cls(cls.config_class(**cls.pretrained_init_configuration["ppminilm-6l-768h"]))
    paddle.save(model.state_dict(), str(cache / "model_state.pdparams"))
    (cache / "vocab.txt").write_text("".join(f"{t}\n" for t in "[PAD] [UNK] [CLS] [SEP] [MASK] 一 二 三 四 五".split()))
    environment = {**os.environ, "PPNLP_HOME": str(tmp_path / "home")}
    load = f"""
import os, sys; sys.path.insert(0, {ROOT!r}); os.chdir({str(work)!r})
from common import checkpoints, modeling
name = "ppminilm-6l-768h"
"""
    plain, done = pythons(
        load + "modeling.model_class('ppminilm').from_pretrained(name)",
        load
        + """
start = checkpoints.load_pretrained(name, 3)
print(float(start.model.ppminilm.embeddings.word_embeddings.weight.sum()), start.tokenizer.encode(["二五"])[0][0], start.notes, os.getcwd())
""",
        env=environment,
    )
    assert plain.returncode != 0, "the defect is gone: remove the cure"
    expected = [str(float(model.embeddings.word_embeddings.weight.sum())), "[2, 6, 9, 3]", "[]", str(work)]
    start, printed = done.stdout.splitlines()
    assert start.startswith("starting from ppminilm-6l-768h: ppminilm, 6 layers x 768, "), done.stdout
    assert printed == " ".join(expected), done.stderr


def test_mkl_uses_avx2_on_amd():
    """Seen by the bits of a product: its slow code has no fused multiply-add, so it rounds otherwise."""
    amd, intel = "vendor_id : AuthenticAMD\nflags : fpu fma avx2\n", "vendor_id : GenuineIntel\nflags : fpu fma avx2\n"
    assert common.mkl_cpu_type(amd) == "5" and common.mkl_cpu_type(intel) is None
    assert common.mkl_cpu_type(amd.replace("avx2", "avx")) is None
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        if common.mkl_cpu_type(file.read()) is None:
            pytest.skip("no AMD processor with AVX2")
    code = (
        "import os; {}; import paddle; paddle.seed(1); x = paddle.randn([64, 300]); "
        "print(paddle.matmul(x, x, transpose_y=True).numpy().tobytes().hex())"
    )
    unset = {name: value for name, value in os.environ.items() if name != "MKL_DEBUG_CPU_TYPE"}
    plain, cured = pythons(code.format("import zlib"), code.format("import common"), env=unset)
    asked = python(code.format("import zlib"), env={**unset, "MKL_DEBUG_CPU_TYPE": "5"})
    assert plain.stdout != asked.stdout, "the defect is gone: remove the cure"
    assert cured.stdout == asked.stdout and len(cured.stdout) > 1000


@pytest.mark.skipif(sys.version_info < (3, 10), reason="paddle_serving_client has a wheel for this Python")
def test_paddle_servings_server_without_its_client(tmp_path):
    """Its import of a name from paddle_serving_client, which has no wheel here."""
    pytest.importorskip("paddle_serving_server", reason="needs Paddle Serving: bash setup_env.sh --serving")
    env = {**os.environ, "SERVING_LOG_PATH": str(tmp_path)}
    imported = "from paddle_serving_server.pipeline import PipelineClient; print(PipelineClient.__name__)"
    absent = f"import sys; sys.modules['paddle_serving_client'] = None; {imported}"
    without, there = python(absent, env=env), python(imported, env=env)  # not at once: both make the directory of logs
    assert "import of paddle_serving_client halted" in without.stderr, "the defect is gone: remove the stand-in"
    # setup_env.sh has put requirements/paddle_serving_client.py into the environment.
    assert there.stdout.strip() == "PipelineClient"
