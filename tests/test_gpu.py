"""The libraries of Paddle's GPU wheel, and the check of a GPU before anything is loaded. No test here needs a GPU.

GPU_WHEEL=DIR also installs Paddle's GPU wheel and its libraries into a copy of the checkout in DIR (3.2 GB to download,
8 GB), and checks what it can without a GPU; what is in DIR already is used again.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import check_gpu
import infer
import numpy as np
import paddle
import pytest
from conftest import ROOT

from common import UserError, engine, gpu, tensorrt


@pytest.fixture
def gpu_libraries():
    path = os.path.join(ROOT, "requirements/gpu_libraries.py")
    spec = importlib.util.spec_from_file_location("gpu_libraries", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WHEELS = {
    "tensorrt-8.5.3.1": ["tensorrt/libnvinfer.so.8", "tensorrt/tensorrt.so", "tensorrt/__init__.py"],
    "nvidia-cudnn-cu11-8.6.0.163": ["nvidia/cudnn/lib/libcudnn.so.8", "nvidia/cudnn/include/cudnn.h"],
}


@pytest.fixture
def place(tmp_path, gpu_libraries, monkeypatch):
    """A lock of two packages, and a download() that makes their wheels; ``place.downloads`` lists its calls."""
    text = ""
    for package in WHEELS:
        name, version = package.rsplit("-", 1)
        text += f"{name}=={version} \\\n    --hash=sha256:{'0' * 64}\n"
    (tmp_path / "lock.txt").write_text(text)
    (tmp_path / "libs").mkdir()
    downloads = []

    def download(lines, directory):
        package = "-".join(lines.split(" ")[0].split("=="))
        downloads.append(package)
        with zipfile.ZipFile(os.path.join(directory, "a.whl"), "w") as wheel:
            for member in WHEELS[package]:
                wheel.writestr(member, package)
        return os.path.join(directory, "a.whl")

    monkeypatch.setattr(gpu_libraries, "download", download)
    return tmp_path, downloads


def run(gpu_libraries, root):
    gpu_libraries.main(str(root / "lock.txt"), str(root / "store"), str(root / "libs"))
    return {path.name: path.read_text() for path in (root / "libs").iterdir()}


def test_libraries_are_linked_under_both_names_and_nothing_is_done_twice(gpu_libraries, place):
    root, downloads = place
    tensorrt, cudnn = WHEELS
    wanted = dict.fromkeys(("libnvinfer.so", "libnvinfer.so.8"), tensorrt)
    wanted.update(dict.fromkeys(("libcudnn.so", "libcudnn.so.8"), cudnn))
    assert run(gpu_libraries, root) == wanted and downloads == list(WHEELS)
    assert run(gpu_libraries, root) == wanted and len(downloads) == 2
    (root / "libs/libcudnn.so").unlink()  # as when .venv was made anew
    assert run(gpu_libraries, root) == wanted and len(downloads) == 2


def test_a_kill_on_the_way_keeps_what_is_complete(gpu_libraries, place, monkeypatch):
    root, downloads = place
    (root / "store/.new-killed").mkdir(parents=True)  # what kill -9 leaves behind
    (root / "store/tensorrt-8.4").mkdir()  # of an older lock
    complete = gpu_libraries.download

    def fails(lines, directory):
        if "cudnn" in lines:
            raise subprocess.CalledProcessError(1, "pip")
        return complete(lines, directory)

    monkeypatch.setattr(gpu_libraries, "download", fails)
    with pytest.raises(SystemExit, match="rerun the same command"):
        run(gpu_libraries, root)
    assert os.listdir(root / "store") == ["tensorrt-8.5.3.1"] and not os.listdir(root / "libs")
    monkeypatch.setattr(gpu_libraries, "download", complete)
    assert len(run(gpu_libraries, root)) == 4 and downloads == list(WHEELS)


def test_a_library_of_paddle_itself_stays(gpu_libraries, place):
    root, _ = place
    (root / "libs/libcudnn.so").write_text("Paddle's")
    assert run(gpu_libraries, root)["libcudnn.so"] == "Paddle's"


def test_the_lock_is_read_whole(gpu_libraries):
    packages = gpu_libraries.read_lock(os.path.join(ROOT, "requirements/gpu-libraries.txt"))
    assert len(packages) == 10 and {"tensorrt-8.5.3.1", "nvidia-cudnn-cu11-8.6.0.163"} <= set(packages)


@pytest.mark.parametrize(
    "capability, runs", [((6, 0), False), ((6, 1), True), ((7, 5), True), ((8, 9), True), ((9, 0), False)]
)
def test_which_gpus_this_paddle_has_kernels_for(capability, runs):
    if runs:
        gpu.check_capability("GPU 0 (X)", capability)
        return
    with pytest.raises(UserError, match="has kernels for 6.1 to 8.9 only; use --device cpu"):
        gpu.check_capability("GPU 0 (X)", capability)


def test_what_is_said_about_a_gpu(monkeypatch, tmp_path):
    """With stand-ins for Paddle's questions to the driver: no GPU is here."""
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  525.60.13  Wed Nov 30 06:39:21 UTC 2022\n")
    assert gpu.driver_version(str(file)) == (525, 60, 13) and gpu.driver_version(str(tmp_path / "none")) is None
    monkeypatch.setattr(paddle.device.cuda, "get_device_name", lambda number: "Tesla T4")
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda number: (7, 5))
    monkeypatch.setattr(gpu, "driver_version", lambda: (525, 60, 13))
    monkeypatch.setattr(gpu, "tensorrt_version", lambda: (0, 0, 0))
    assert gpu.describe(1) == [
        "GPU 1: Tesla T4, compute capability 7.5",
        "driver: 525.60.13 (CUDA 11.8 needs 450.80.2)",
        "TensorRT: not found; `bash setup_env.sh --gpu` installs it",
    ]
    with pytest.raises(UserError, match="needs TensorRT, and Paddle finds none.*--device cpu --for gpu"):
        gpu.check_tensorrt()


@pytest.mark.parametrize(
    "driver, words",
    [(None, "no NVIDIA driver"), ((440, 33, 1), "440.33.1 is too old"), ((525, 60, 13), "shows no GPU")],
)
def test_why_no_gpu_is_seen(driver, words):
    assert words in gpu.why_none(driver)


def ranges(path):
    """{tensor: (smallest, most frequent, largest shape)} of a file of shape ranges."""
    found = {}
    for part in path.read_text().split("shape_range_info {")[1:]:
        numbers = [tuple(map(int, re.findall(rf"  {kind}_shape: (\d+)", part))) for kind in ("min", "opt", "max")]
        found[re.search(r'name: "(.+)"', part).group(1)] = tuple(numbers)
    return found


SHAPES = (1, 6), (16, 24), (32, 48)  # other numbers than the 4 heads and 64 values of the model


@pytest.fixture
def graph(tuned, tmp_path):
    """The file prefix of an exported model that may have a file of shape ranges beside it."""
    for path in tuned.glob("inference.*"):
        shutil.copy(path, tmp_path)
    return str(tmp_path / "inference")


def test_shapes_of_ones_own_are_recorded_for_every_tensor(graph, tmp_path):
    """Collected on the CPU, where Paddle does it alike: also tensors inside the graph get the three shapes."""
    engine.collect_shapes(graph, "cpu", None, shapes=SHAPES)
    found = ranges(tmp_path / "inference.shape_ranges.pbtxt")
    assert found["input_ids"] == found["token_type_ids"] == SHAPES
    inner = [shapes for shapes in found.values() if len(shapes[0]) == 3 and shapes[0][1] == 6]
    assert len(inner) > 5 and all([shape[:2] for shape in shapes] == list(SHAPES) for shapes in inner)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--min_shape", "1x4"], "go together, and with --collect_shape"),
        (["--collect_shape", "--min_shape", "1x4", "--opt_shape", "8x24"], "go together"),
        (["--min_shape", "1x4", "--opt_shape", "8x24", "--max_shape", "8x64"], "with --collect_shape"),
        (["--collect_shape", "--min_shape", "1x4", "--opt_shape", "9x24", "--max_shape", "8x64"], "1, 9, 8 sequences"),
        (["--collect_shape", "--min_shape", "1x4", "--opt_shape", "8x2", "--max_shape", "8x64"], "4, 2, 64 tokens"),
        (["--collect_shape", "--min_shape", "0x4"], "'0x4' is no shape, such as 32x128"),
    ],
)
def test_shapes_that_make_no_sense(arguments, words, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        infer.parse_args(["--model_path", "m", *arguments])
    assert words in str(error.value) + capsys.readouterr().err


def test_check_gpu_without_a_gpu_is_one_line(tmp_path):
    done = subprocess.run(
        ["bash", os.path.join(ROOT, "deploy/python/check_gpu.sh"), "--output_dir", str(tmp_path / "o")],
        env={**os.environ, "PYTHON": sys.executable, "DEVICE": "", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr
    assert "sees no GPU" in done.stderr and not (tmp_path / "o").exists()


class Engines:
    """Stands for a Checker: logits that are given, of the CPU and of the GPU."""

    device = "gpu"

    def __init__(self, cpu, gpu, accuracy):
        self.answers = {"cpu": (np.array(cpu), 0.9), "gpu": (np.array(gpu), accuracy)}

    def need(self, path):
        pass

    def logits(self, graph, device, precision):
        return self.answers[device]


def test_what_passes_for_the_same_logits():
    cpu = [[2.0, 1.0]] * 1000
    figures = check_gpu.check_precision(Engines(cpu, [[2.1, 1.0]] * 1000, 0.895), "graph", "fp16")
    assert figures["same prediction"] == 1 and figures["largest difference of a logit"] == 0.1
    other = [[2.0, 1.0]] * 980 + [[1.0, 2.0]] * 20
    check_gpu.check_precision(Engines(cpu, other, 0.9), "graph", "int8")
    for gpu_logits, accuracy, precision in ((other, 0.9, "fp16"), (cpu, 0.88, "fp32")):
        with pytest.raises(check_gpu.Failed, match="same prediction"):
            check_gpu.check_precision(Engines(cpu, gpu_logits, accuracy), "graph", precision)


def test_losses_that_differ_too_much():
    assert check_gpu.compare_losses(1.0, 0.99, "amp") == {"loss": 0.99, "expected loss": 1.0}
    for loss in (0.9, float("nan")):
        with pytest.raises(check_gpu.Failed, match="expected loss"):
            check_gpu.compare_losses(1.0, loss, "amp")


def test_a_step_that_fails_says_where(tmp_path):
    checker = check_gpu.Checker(check_gpu.parse_args(["--output_dir", str(tmp_path)]), "cpu")
    with pytest.raises(check_gpu.Failed, match="status 3, name.log: the reason"):
        checker.run("name", ["sh", "-c", "echo first; echo the reason; exit 3"])
    with pytest.raises(check_gpu.Skipped, match="the demo has not written a/b"):
        checker.need("a/b")


def test_a_check_that_breaks_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def breaks(checker):
        raise ValueError("broken")

    checks = check_gpu.Check("one", breaks), check_gpu.Check("other", lambda checker: {"figure": 1})
    monkeypatch.setattr(check_gpu, "CHECKS", checks)
    with pytest.raises(SystemExit) as end:
        check_gpu.main(["--device", "cpu", "--output_dir", str(tmp_path)])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert end.value.code == 1 and report["rehearsal"] is True
    assert [check["result"] for check in report["checks"]] == ["failed", "passed"]
    assert "| one | failed | ValueError: broken |" in capsys.readouterr().out


# Runs with the GPU wheel: what it finds, and the calls to paddle.inference.Config that the engine's options lead to.
ASK = """
import json, sys
sys.path.insert(0, sys.argv[2])
from common.compat import paddle
from common import engine, gpu, tensorrt
found = {"TensorRT": gpu.tensorrt_version(), "cuDNN": paddle.version.cudnn(), "cuDNN loaded": paddle.get_cudnn_version()}
for precision in ("fp32", "fp16", "int8"):
    config = engine.configuration(sys.argv[1], "gpu:1")
    tensorrt.configure(config, precision, tensorrt.shape_file(sys.argv[1]))
    found[precision] = config.summary()
config = engine.configuration(sys.argv[1], "gpu")
config.collect_shape_range_info(tensorrt.shape_file(sys.argv[1]))
found["collecting"] = config.summary()
print(json.dumps(found))
"""


@pytest.mark.skipif("GPU_WHEEL" not in os.environ, reason="3.2 GB to download: GPU_WHEEL=DIR asks for it")
def test_the_gpu_wheel_finds_its_libraries_and_takes_the_configuration(graph, tmp_path):
    root = os.path.abspath(os.environ["GPU_WHEEL"])
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), os.path.join(root, name))
    subprocess.run(["sh", os.path.join(root, "setup_env.sh"), "--gpu"], check=True)
    engine.collect_shapes(graph, "cpu", None, shapes=SHAPES)
    python = os.path.join(root, ".venv/bin/python")
    done = subprocess.run([python, "-c", ASK, graph, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["TensorRT"] == [8, 5, 3] and found["cuDNN loaded"] == 8600, found
    for precision in ("fp32", "fp16", "int8"):
        settings = dict(re.findall(r"\| (\w+) +\| (.*?) +\|", found[precision]))
        wanted = {
            "use_gpu": "true",
            "gpu_device_id": "1",
            "use_tensorrt": "true",
            "trt_runtime_version": "8.5.3",
            "tensorrt_precision_mode": precision,
            "tensorrt_use_calib_mode": "false",
            "tensorrt_tuned_dynamic_shape": tensorrt.shape_file(graph),
        }
        assert {name: settings[name] for name in wanted} == wanted, found[precision]
    settings = dict(re.findall(r"\| (\w+) +\| (.*?) +\|", found["collecting"]))
    assert settings["collect_shape_range_info"] == tensorrt.shape_file(graph) and settings["gpu_device_id"] == "0"
    print({name: found[name] for name in ("TensorRT", "cuDNN", "cuDNN loaded")})
