"""What one environment wrote, the other one reads: Paddle 2.6.2 and 3.1.1, each writing for both.

OTHER_PYTHON=PATH asks for it: the interpreter of an environment with the other Paddle (setup_env.sh --paddle in a
second checkout). CROSSED=FILE also writes the matrix as Markdown.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, sh

import common

OTHER = os.environ.get("OTHER_PYTHON")
pytestmark = pytest.mark.skipif(not OTHER, reason="needs a second environment: OTHER_PYTHON=PATH")
# Engines of two versions round at other places; logits are about 5 here, and 0.103 was seen in INT8.
LARGEST_DIFFERENCE = {"fp32": 1e-4, "bf16": 0.2, "int8": 0.2}


def write_all(python, workspace, directory):
    """Fine-tunes, prunes and quantizes ``topics`` in ``directory``. Returns: {what: model directory}."""
    directory.mkdir()
    for name in ("vocab.txt", "tiny.json"):
        shutil.copy(workspace / name, directory)
    data = ["--data_dir", workspace / "data"]
    tuned, options = directory / "tiny/models/topics/2e-3_32", {"cwd": directory, "PYTHON": python}
    start = ["--init_config", "tiny.json", "--vocab_file", "vocab.txt", "--group_by_length"]
    sh("finetuning/run_clue.sh", "topics", "2e-3", 32, 6, 64, 0, "tiny", *start, *data, **options)
    export = [python, os.path.join(ROOT, "finetuning/export_model.py"), "--task_name", "topics", "--model_path", tuned]
    subprocess.run([*map(str, [*export, *data])], check=True, capture_output=True)
    sh("pruning/prune.sh", "topics", "1e-3", 32, 2, 64, 0, tuned, "0.75", "--group_by_length", *data, **options)
    sh("pruning/export.sh", "pruned_models", "topics", *data, **options)
    narrow = directory / "pruned_models/topics/0.75/sub_static"
    sh("quantization/quant.sh", "topics", narrow, *data, **options)
    return {"weights": tuned, "fp32": narrow, "bf16": narrow, "int8": directory / "topics_quant_models/mse4"}


def read(python, what, model, workspace, directory):
    """What an environment makes of a model: {"accuracy": ...}, with "logits" of a graph on dev."""
    task = ["--task_name", "topics", "--data_dir", workspace / "data"]
    if what == "weights":
        command = ["finetuning/run_clue.py", "--do_eval", "--model_name_or_path", model]
    else:
        command = ["deploy/python/infer.py", "--precision", what, "--model_path", model]
        command += ["--save_logits", directory / "logits.npy"]
    words = [python, os.path.join(ROOT, command[0]), *command[1:], *task]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found if what == "weights" else {**found, "logits": np.load(directory / "logits.npy")}


def test_models_cross_over(workspace, tmp_path):
    asked = [OTHER, "-c", f"import sys; sys.path.insert(0, {ROOT!r}); import common; print(*common.PADDLE, sep='.')"]
    other = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    this = ".".join(map(str, common.PADDLE))
    assert this.split(".")[0] != other.split(".")[0], f"both environments have Paddle {this}"
    pythons = {this: sys.executable, other: OTHER}
    lines = [
        "| written by | what | read by Paddle " + " | read by Paddle ".join(pythons) + " |",
        "| --- |" + " --- |" * 3,
    ]
    for writer, python in pythons.items():
        for what, model in write_all(python, workspace, tmp_path / writer).items():
            found = {reader: read(of, what, model, workspace, tmp_path) for reader, of in pythons.items()}
            figures = [f"{one['accuracy']:.4f}" for one in found.values()]
            assert found[this]["accuracy"] == found[other]["accuracy"] > 0.9, (writer, what, figures)
            if what != "weights":
                difference = np.abs(found[this]["logits"] - found[other]["logits"]).max()
                assert difference <= LARGEST_DIFFERENCE[what], (writer, what, difference)
                same = found[this]["logits"].argmax(-1) == found[other]["logits"].argmax(-1)
                assert same.all(), (writer, what)
                figures[1] += f", logits within {difference:.1e}"
            lines.append(f"| {writer} | {what} | {' | '.join(figures)} |")
    print("\n".join(lines))
    if "CROSSED" in os.environ:
        with open(os.environ["CROSSED"], "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
