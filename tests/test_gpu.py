"""The libraries of Paddle's GPU wheel, and the check of a GPU before anything is loaded. No test here needs a GPU."""

import importlib.util
import os
import subprocess
import zipfile

import paddle
import pytest
from conftest import ROOT

from common import UserError, gpu


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
