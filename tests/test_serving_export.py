"""deploy/serving/export_to_serving.py: what it writes runs, and is what paddle_serving_client's own converter writes."""

import importlib.metadata
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, load_script

from common import UserError, batching, checkpoints, engine, records

pytest.importorskip("paddle_serving_app", reason="needs Paddle Serving: bash setup_env.sh --serving")


@pytest.fixture(scope="module")
def exports(tuned, pruned, quantized):
    """{kind: (directory, file name without its ending, precision)} of a fine-tuned, a pruned and an INT8 export."""
    return {
        "fine-tuned": (tuned, "inference", "fp32"),
        "pruned": (pruned / "0.75/sub_static", "float", "fp32"),
        "int8": (quantized / "mse4", "int8", "int8"),
    }


def export(directory, name, target, *more):
    load_script("deploy/serving", "export_to_serving").main([
        "--dirname", str(directory), "--model_filename", f"{name}.pdmodel", "--params_filename", f"{name}.pdiparams",
        "--server_path", str(target / "server"), "--client_path", str(target / "client"), *more,
    ])  # fmt: skip


@pytest.mark.parametrize("kind", ["fine-tuned", "pruned", "int8"])
def test_the_server_directory_runs(exports, tmp_path, kind):
    """The same logits, to the last bit, with tokenizer and labels beside; twice into the same place."""
    directory, name, precision = exports[kind]
    for _ in range(2):
        export(directory, name, tmp_path)
    server = tmp_path / "server"
    record = checkpoints.open_graph(str(server / name)).record
    assert record["labels"] == records.read_record(str(directory))["labels"] and (server / "vocab.txt").is_file()
    features = [batching.Feature([2, *range(5, 5 + n), 3], [0] * (n + 2), None) for n in (3, 9, 20)]
    logits = [
        engine.open_engine(str(d / name), features, "cpu", precision).predict(features) for d in (directory, server)
    ]
    assert np.array_equal(*logits) and logits[0].shape == (3, 4)
    text = (server / "serving_server_conf.prototxt").read_text()
    assert text == (tmp_path / "client/serving_client_conf.prototxt").read_text()
    assert text.count("feed_var {") == 2 and text.count("fetch_var {") == 1 and "shape: 4" in text


# paddle_serving_client 0.9.0 wants paddle.fluid, which Paddle 2.5 dropped; the same functions live elsewhere now.
CONVERTER = """
import sys, types, zlib
import paddle
from paddle import base

def module(name, *sources, **more):
    made = types.ModuleType(name)
    made.__path__ = []
    for source in sources:
        vars(made).update({k: v for k, v in vars(source).items() if not k.startswith("__")})
    vars(made).update(more)
    sys.modules[name] = made
    return made

def load_inference_model(dirname, executor, model_filename, params_filename):
    return paddle.static.load_inference_model(f"{dirname}/{model_filename[:-len('.pdmodel')]}", executor)

import paddle.base.compiler, paddle.base.executor, paddle.base.framework, paddle.base.log_helper, paddle.static.io
io = module("paddle.fluid.io", paddle.static.io, load_inference_model=load_inference_model)
for name in ("framework", "executor", "compiler", "log_helper"):
    module(f"paddle.fluid.{name}", getattr(base, name))
core = module("paddle.fluid.core", base.core, CipherUtils=None, CipherFactory=None, Cipher=None)
module("paddle.fluid", base, io=io, core=core)
from paddle_serving_client.io import inference_model_to_serving
directory, name, server, client, feeds, fetches = sys.argv[1:]
inference_model_to_serving(directory, server, client, model_filename=f"{name}.pdmodel", params_filename=f"{name}.pdiparams",
                           feed_alias_names=feeds or None, fetch_alias_names=fetches or None)
"""


@pytest.mark.parametrize("aliases", [[], ["ids,types", "scores"]])
@pytest.mark.parametrize("kind", ["fine-tuned", "pruned", "int8"])
def test_as_the_original_converter(exports, tmp_path, kind, aliases):
    """Byte by byte: the four descriptions and the parameters. (It writes the graph anew, so that differs in order.)"""
    try:  # by the package, because the module's name may stand for a stand-in here
        importlib.metadata.version("paddle-serving-client")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("paddle_serving_client has wheels for Python 3.9 only")
    directory, name, _ = exports[kind]
    feeds, fetches = aliases or ["", ""]
    more = ["--feed_alias_names", feeds, "--fetch_alias_names", fetches] if aliases else []
    export(directory, name, tmp_path / "ours", *more)
    theirs = [str(tmp_path / "theirs/server"), str(tmp_path / "theirs/client")]
    subprocess.run(
        [sys.executable, "-c", CONVERTER, str(directory), name, *theirs, feeds, fetches], check=True, cwd=ROOT
    )
    for side in ("server", "client"):
        for ending in ("prototxt", "stream.prototxt"):
            file = f"{side}/serving_{side}_conf.{ending}"
            assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file
    parameters = f"server/{name}.pdiparams"
    assert (tmp_path / "ours" / parameters).read_bytes() == (tmp_path / "theirs" / parameters).read_bytes()


@pytest.mark.parametrize("more, message", [
    (["--feed_alias_names", "one"], "--feed_alias_names one: 1 names for 2 .input_ids, token_type_ids."),
    (["--params_filename", "other"], "--params_filename other: those of inference.pdmodel are inference.pdiparams"),
    (["--dirname", "/nonexistent"], "no /nonexistent/inference.pdmodel"),
    (["--server_path", "."], "exists and holds something else"),
    (["--server_path", "server/in/it", "--client_path", "server"], "nor one lie in the other"),
])  # fmt: skip
def test_mistakes(exports, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("")
    directory, name, _ = exports["fine-tuned"]
    with pytest.raises(UserError, match=message):
        export(directory, name, tmp_path, *more)
    assert os.listdir(tmp_path) == ["mine"]


def test_show_proto_writes_nothing(exports, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    directory, name, _ = exports["fine-tuned"]
    export(directory, name, tmp_path, "--show_proto")
    assert capsys.readouterr().out.count("alias_name") == 3 and os.listdir(tmp_path) == []
