"""Gives paddlepaddle-gpu 2.6.2 the libraries that it needs and does not name: CUDA 11.8, cuDNN 8.6, TensorRT 8.5.3.

    .venv/bin/python requirements/gpu_libraries.py LOCK STORE LIBS

Downloads each package of the lock file LOCK, unpacks its libraries into STORE/<name>-<version>/, and links them into
LIBS (site-packages/paddle/libs). What is in STORE already is not downloaded again, so a run after a kill goes on.
setup_env.sh --gpu calls it.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

# lib<name>.so, with or without numbers behind it; not the extension modules of Python in the same wheels.
LIBRARY = re.compile(r"(lib[^/]+?\.so)(\.[0-9.]+)?")

# The libraries inside do not depend on Python, but TensorRT 8.5.3.1 has wheels to CPython 3.10 only: they are
# downloaded as for that one, whatever runs this script.
WHEELS = ("--python-version", "3.10", "--implementation", "cp", "--abi", "cp310", "--abi", "none")
PLATFORMS = ("manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")


def read_lock(path):
    """{"name-version": its lines} of a lock file with hashes."""
    with open(path, encoding="utf-8") as file:
        found = re.findall(r"^(([a-z0-9._-]+)==(\S+)(?: \\\n    --hash=\S+)+)$", file.read(), re.M)
    return {f"{name}-{version}": lines for lines, name, version in found}


def download(lines, directory):
    """Downloads the wheel of one requirement, if its hash is one of those in the lock. Returns: its path."""
    requirement = os.path.join(directory, "lock.txt")
    with open(requirement, "w", encoding="utf-8") as file:
        file.write(f"{lines}\n")
    # No cache: unpacked, the wheels take 4 GB already.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--require-hashes", "--only-binary=:all:", *WHEELS]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, "--dest", directory, "--requirement", requirement], check=True)
    (wheel,) = glob.glob(os.path.join(directory, "*.whl"))
    return wheel


def unpack(wheel, directory):
    """Writes the libraries in a wheel into a directory, all side by side."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = os.path.basename(member.filename)
            if LIBRARY.fullmatch(name):
                with archive.open(member) as source, open(os.path.join(directory, name), "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    if not os.listdir(directory):
        sys.exit(f"gpu_libraries.py: error: {os.path.basename(wheel)} holds no library")


def fetch(lock, store):
    """Makes a directory of libraries in ``store`` for each package of the lock, and removes those of another lock."""
    os.makedirs(store, exist_ok=True)
    packages = read_lock(lock)
    for left in set(os.listdir(store)) - set(packages):  # other versions, and what a kill left behind
        shutil.rmtree(os.path.join(store, left))
    for number, (package, lines) in enumerate(packages.items(), 1):
        target = os.path.join(store, package)
        if os.path.isdir(target):
            continue
        print(f"setup_env.sh: GPU libraries {number}/{len(packages)}: {package}", flush=True)
        scratch = tempfile.mkdtemp(prefix=".new-", dir=store)
        try:
            unpacked = os.path.join(scratch, "unpacked")
            os.mkdir(unpacked)
            unpack(download(lines, scratch), unpacked)
            os.sync()  # a power cut may keep the new name and lose the files
            os.rename(unpacked, target)  # whole or not at all
        finally:
            shutil.rmtree(scratch)


def link(store, libs):
    """Links every library in ``store`` into ``libs`` under its own and its unversioned name. Returns: their number.

    Paddle opens the unversioned names, libnvinfer.so; the libraries open each other under the versioned ones,
    libcudnn.so.8. libs is on Paddle's search path, so LD_LIBRARY_PATH need not be set.
    """
    libraries = sorted(glob.glob(os.path.join(os.path.abspath(store), "*", "*")))
    for path in libraries:
        name = os.path.basename(path)
        for alias in {name, LIBRARY.fullmatch(name).group(1)}:
            place = os.path.join(libs, alias)
            if os.path.islink(place) and os.readlink(place) != path:
                os.remove(place)
            if not os.path.lexists(place):  # else it is right already, or a library of Paddle's own wheel
                os.symlink(path, place)
    return len(libraries)


def main(lock, store, libs):
    try:
        fetch(lock, store)
    except subprocess.CalledProcessError:  # pip has said why
        sys.exit("gpu_libraries.py: error: a download failed; rerun the same command, what is there is kept")
    print(f"setup_env.sh: {link(store, libs)} GPU libraries linked into {os.path.relpath(libs)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
