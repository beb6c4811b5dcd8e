"""The lock files name packages and nothing else; setup_env.sh finds an interpreter, repairs, and does nothing twice."""

import glob
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import common

LOCKS = sorted(glob.glob(os.path.join(ROOT, "requirements", "*.txt")))
BASE = os.path.join(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")


CPU = "cpu" if sys.version_info < (3, 13) else "paddle3"  # what setup_env.sh makes for this Python


@pytest.mark.parametrize("lock", LOCKS, ids=os.path.basename)
def test_locks_pin_and_hash_and_name_no_machine(lock):
    text = open(lock, encoding="utf-8").read()
    assert not re.search(r"index|find.links|trusted|file:|https?:|\s@\s|(^|[\s=])/|\\\\", text, re.M)
    requirements = re.findall(r"^(\S.*?)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.M)
    assert requirements and "".join(f"{r}{h}\n" for r, h in requirements) == text
    for requirement, _ in requirements:
        assert re.fullmatch(
            r"[a-z0-9._-]+==[^\s;*]+( ; python_full_version [<>=]+ '[0-9.*]+'( and python_full_version < '[0-9.]+')?)?",
            requirement,
        ), requirement


@pytest.mark.parametrize("python", ["3.9.0", "3.10.0", "3.11.0", "3.12.0", "3.13.0"])
@pytest.mark.parametrize("paddle", [2, 3])
def test_all_locks_agree_on_versions(paddle, python):
    """Those of one Paddle, for each Python. onnx.txt is made beside those of Paddle 3, but goes without Paddle."""
    from packaging.markers import Marker

    versions = {}
    for lock in LOCKS:
        if os.path.basename(lock).startswith(("paddle3", "onnx")) != (paddle == 3):
            continue
        if os.path.basename(lock) == "peers.txt" and python in ("3.9.0", "3.10.0"):  # it is for newer ones
            continue
        text = open(lock, encoding="utf-8").read()
        for name, version, marker in re.findall(r"^([a-z0-9._-]+)==([^\s;]+)(?: ; (.*?))?(?: \\)?$", text, re.M):
            if not marker or Marker(marker).evaluate({"python_full_version": python}):
                assert versions.setdefault(name, version) == version, (lock, name)
    assert len(versions) > 100


def test_installed_packages_are_the_locked_ones():
    from importlib.metadata import version

    if not os.path.exists(os.path.join(sys.prefix, "installed")):
        pytest.skip("these tests do not run in an environment that setup_env.sh made")
    lock = "cpu" if common.PADDLE < (3,) else "paddle3"
    for name, locked in re.findall(
        r"^([a-z0-9._-]+)==([^\s;]+) \\", open(os.path.join(ROOT, f"requirements/{lock}.txt")).read(), re.M
    ):
        if not name.startswith("paddlepaddle"):
            # seqeval's sdist, built with no git at hand, calls itself 0.0.0
            assert version(name) == locked or name == "seqeval"


@pytest.fixture
def checkout(tmp_path):
    """setup_env.sh with lock files that name nothing, so that an environment is made in seconds."""
    root = tmp_path / "checkout"
    (root / "requirements").mkdir(parents=True)
    shutil.copy(os.path.join(ROOT, "setup_env.sh"), root)
    shutil.copy(os.path.join(ROOT, "requirements/gpu_libraries.py"), root / "requirements")
    for lock in LOCKS:
        (root / "requirements" / os.path.basename(lock)).write_text("")
    shutil.copy(os.path.join(ROOT, "requirements/paddle_serving_client.py"), root / "requirements")
    return root


def setup(checkout, *args, path=None):
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    return subprocess.run(
        ["/bin/sh", str(checkout / "setup_env.sh"), *map(str, args)], capture_output=True, text=True, env=environment
    )


def interpreter(directory, name, script):
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)
    return directory


def test_makes_repairs_and_rests(checkout):
    made = setup(checkout, "--python", sys.executable)
    assert made.returncode == 0, made.stderr
    home = re.search(r"^home = (.*)$", (checkout / ".venv/pyvenv.cfg").read_text(), re.M).group(1)
    assert os.path.realpath(home) == os.path.realpath(os.path.dirname(BASE))  # the base, not the tests' own .venv
    assert "up to date" in setup(checkout).stdout
    (checkout / ".venv/mark").write_text("")
    assert "up to date" in setup(checkout).stdout and (checkout / ".venv/mark").exists()

    (checkout / ".venv/installed").unlink()  # as if killed half-way
    assert "making .venv" in setup(checkout, "--python", BASE).stdout and not (checkout / ".venv/mark").exists()
    (checkout / f"requirements/{CPU}.txt").write_text("# another lock\n")
    assert "making .venv" in setup(checkout, "--python", BASE).stdout
    (checkout / ".venv/mark").write_text("")
    added = setup(checkout, "--serving").stdout  # to what is there, so that what runs from it goes on
    assert "adding Paddle Serving" in added and "making" not in added and (checkout / ".venv/mark").exists()
    assert f"up to date ({CPU}, serving)" in setup(checkout).stdout
    (checkout / ".venv/installed").unlink()
    assert f"making .venv ({CPU}, serving)" in setup(checkout, "--serving", "--python", BASE).stdout
    if CPU == "cpu":
        assert "making .venv (gpu, serving)" in setup(checkout, "--gpu", "--python", BASE).stdout


PRETEND = f"exec {BASE} -c 'import sys; sys.version_info = (3, 13, 0); exec(sys.argv[2])' \"$@\""


@pytest.mark.skipif(CPU != "cpu", reason="pretends to be 3.13")
def test_python_3_13_has_paddle_3_and_the_others_on_request(checkout, tmp_path):
    """The interpreter says that it is 3.13 where setup_env.sh asks; the one behind it is that of the tests."""
    bin = interpreter(tmp_path / "bin", "python3.13", f'case "$2" in *platform*) {PRETEND} ;; esac; exec {BASE} "$@"')
    path = f"{bin}:{os.path.dirname(BASE)}:/usr/bin:/bin"
    assert "making .venv (paddle3)" in setup(checkout, "--python", bin / "python3.13").stdout
    assert "up to date (paddle3)" in setup(checkout).stdout
    assert "up to date (paddle3)" in setup(checkout, "--cpu", "--python", bin / "python3.13").stdout
    assert "adding Paddle Serving" in setup(checkout, "--serving").stdout
    refused = setup(checkout, "--paddle", "2", "--python", bin / "python3.13")
    assert refused.returncode == 2 and "no wheel for Python 3.13; use --paddle 3" in refused.stderr
    assert "making .venv (cpu, serving)" in setup(checkout, "--paddle", "2", path=path).stdout  # of the other Python
    assert "up to date (cpu, serving)" in setup(checkout, "--paddle", "2", path=path).stdout
    assert "making .venv (paddle3, serving)" in setup(checkout, "--paddle", "3", "--python", BASE).stdout
    assert "up to date (paddle3, serving)" in setup(checkout, "--cpu").stdout  # which does not say which Paddle
    assert "up to date (paddle3, serving)" in setup(checkout, "--paddle", "3", "--python", BASE).stdout


def test_an_environment_that_is_made_anew_keeps_its_python(checkout, tmp_path):
    """Though there is a newer one by now."""
    bin = interpreter(tmp_path / "bin", "python3.12", "echo usable 12 /nonexistent/newer")
    path = f"{bin}:/usr/bin:/bin"
    assert setup(checkout, "--python", BASE, path=path).returncode == 0
    (checkout / f"requirements/{CPU}.txt").write_text("# another lock\n")
    again = setup(checkout, path=path)
    assert "making .venv" in again.stdout and again.returncode == 0, again.stderr
    assert (checkout / ".venv/installed").read_text().split()[-1] == os.path.realpath(BASE)


def test_failing_shim_is_skipped_and_the_newest_wins(checkout, tmp_path):
    bin = tmp_path / "bin"
    shim = "python3.12" if os.path.basename(BASE) != "python3.12" else "python3.11"
    interpreter(bin, shim, "echo 'shim: no such version' >&2; exit 127")
    interpreter(bin, "python3.10", "echo usable 1 /nonexistent/old")  # an older one, which must not win
    interpreter(bin, os.path.basename(BASE), f'exec {BASE} "$@"')
    done = setup(checkout, path=f"{bin}:/usr/bin:/bin")
    assert done.returncode == 0 and (checkout / ".venv/installed").exists(), done.stderr


@pytest.mark.parametrize(
    "arguments, script, message",
    [
        (["--python", "/nonexistent/python"], None, "there is no such interpreter"),
        (["--nonsense"], None, "unknown argument '--nonsense'"),
        (["--python"], None, "--python needs the path"),
        (["--paddle"], None, "--paddle (nothing): must be 2 or 3"),
        (["--paddle", "4"], None, "--paddle 4: must be 2 or 3"),
        (["--paddle", "3", "--gpu"], None, "PyPI has no Paddle 3 for GPUs"),
        (["--python", "BIN/python3"], "exit 1", "does not run"),
        (
            ["--python", "BIN/python3"],
            f"exec {BASE} -c 'import sys; sys.version_info = (3, 8, 0); exec(sys.argv[2])' \"$@\"",
            "is Python 3.8; 3.9 to 3.13",
        ),
        (
            ["--python", "BIN/python3"],
            f'exec {BASE} -c \'import sys; sys.modules["ensurepip"] = None; exec(sys.argv[2])\' "$@"',
            "has no venv module; on Debian and Ubuntu: apt-get install python3",
        ),
    ],
)
def test_mistakes_get_one_line_and_status_2(checkout, tmp_path, arguments, script, message):
    if script:
        interpreter(tmp_path / "bin", "python3", script)
    done = setup(checkout, *(a.replace("BIN", str(tmp_path / "bin")) for a in arguments))
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (checkout / ".venv").exists()


def test_no_interpreter_at_all(checkout, tmp_path):
    for tool in ("dirname", "cat", "sha256sum", "cut", "head", "sed", "ls"):
        interpreter(tmp_path / "bin", tool, f'exec {shutil.which(tool)} "$@"')
    interpreter(tmp_path / "bin", "python3", "exit 1")
    done = setup(checkout, path=str(tmp_path / "bin"))
    assert (
        done.returncode == 2
        and "apt-get install python3 python3-venv" in done.stderr
        and "python3: does not run" in done.stderr
    )
