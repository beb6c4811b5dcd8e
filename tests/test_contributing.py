"""CONTRIBUTING.md, followed word by word in a copy of the repository: a stage of one's own, a task of another kind."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
from conftest import FILLER, ROOT, TOPICS, warm_python, write_rows

with open(os.path.join(ROOT, "CONTRIBUTING.md"), encoding="utf-8") as _file:
    TEXT = _file.read()


def blocks(section):
    """[(kind, text)] of the blocks of code below a heading."""
    part = TEXT.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```", part, re.M | re.S)


@pytest.fixture
def repository(tmp_path):
    """What a user has: the files that are kept in the repository, and nothing else."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        os.makedirs(os.path.dirname(tmp_path / "repository" / name), exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), tmp_path / "repository" / name)
    return tmp_path / "repository"


@pytest.fixture
def model(tmp_path, tuned):
    """A model directory to start from."""
    shutil.copytree(tuned, tmp_path / "model")
    return tmp_path / "model"


def follow(script, cwd, **environment):
    """Runs a block as the reader does, in the shell."""
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    environment = {**os.environ, "PATH": path, "PYTHON": warm_python(), **{k: str(v) for k, v in environment.items()}}
    environment.pop("OBJECTIVES", None)
    done = subprocess.run(["bash", "-e", "-c", script], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def record_of(directory):
    return json.loads((directory / "stage.json").read_text(encoding="utf-8"))


def test_a_stage_of_your_own(repository, model, workspace):
    (_, copy), (_, loss), (_, commands) = blocks("A stage of your own")
    follow(copy, repository)
    script = repository / "consistent" / "run_clue.py"
    text = script.read_text(encoding="utf-8")
    changed = re.sub(r"(def losses_of\(batch\):\n +\"\"\".*?\"\"\"\n).*?(?=\n    def )", rf"\1{loss}", text, flags=re.S)
    assert len(changed.splitlines()) - len(text.splitlines()) == 2
    script.write_text(changed, encoding="utf-8")
    # Of a result, the record says by which code it was made; the shared modules are those of the repository.
    follow(commands, repository, MODEL=model, DATA=workspace / "data")
    record = record_of(repository / "consistent/models/TOPICS")
    assert record["stage"] == "finetune" and record["export"] and "consistent/run_clue.py" in record["code"]
    # What git would keep of it is the stage, not what it made.
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    listed = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=repository, capture_output=True, text=True)
    assert "consistent/run_clue.py" in listed.stdout and "stage.json" not in listed.stdout
    # Finished, then changed: named, and not made again.
    script.write_text(changed + "# a change\n", encoding="utf-8")
    # The export says nothing of it, and was run above.
    training = "".join(line for line in commands.splitlines(keepends=True) if "export_model.py" not in line)
    assert "run_clue.py" in training
    said = follow(training, repository, MODEL=model, DATA=workspace / "data")
    assert "already finished" in said and "made before consistent/run_clue.py changed; --overwrite" in said


def stars(rng, count):
    """Records whose score grows with the characters of a topic in them."""
    rows = []
    for _ in range(count):
        number = rng.randint(0, 8)
        text = [rng.choice(TOPICS["体育"]) for _ in range(number)] + [rng.choice(FILLER) for _ in range(12)]
        rng.shuffle(text)
        rows.append({"sentence": "".join(text), "score": number / 4 + rng.uniform(0, 0.2)})
    return rows


def test_a_task_of_another_kind(repository, model, tmp_path):
    (kind, objective), (_, commands) = blocks("A task of another kind")
    assert kind == "python" and len([line for line in objective.splitlines() if line.strip()]) <= 40
    mine = tmp_path / "mine"
    (mine / "data").mkdir(parents=True)
    (mine / "regression.py").write_text(objective, encoding="utf-8")
    rng = random.Random(3)
    for split, count in (("train", 1600), ("dev", 200)):
        write_rows(mine / "data" / f"{split}.json", stars(rng, count))
    places = {"MODEL": model, "DATA": mine / "data", "REPOSITORY": repository}
    said = follow(commands, mine, **places)
    answer = json.loads([line for line in said.splitlines() if line.startswith("{")][-1])
    assert set(answer) == {"text", "score"} and isinstance(answer["score"], float), answer
    scores = {}
    for name, directory in (
        ("fine-tuned", model / "models/STARS/1e-3_32"),
        ("pruned", repository / "pruning/pruned_models/STARS/0.75/sub_static"),
        ("INT8", repository / "quantization/stars_quant_models/mse4"),
    ):
        record = record_of(directory)
        assert record["objective"] == {"name": "regression", "metric": "spearman"}
        scores[name] = record["metrics"]["spearman"]
    assert min(scores.values()) > 0.8, scores  # of random scores it would be about 0
    assert "dev spearman, %" in said and "STARS_" not in said
    # No file of the repository was changed; and without the file, a model is refused and not misread.
    changed = subprocess.run(["diff", "-rq", ROOT, repository], capture_output=True, text=True).stdout
    assert not [line for line in changed.splitlines() if line.startswith("Files ")], changed
    infer = [sys.executable, repository / "deploy/python/infer.py", "--int8", "--text", "今年"]
    infer += ["--model_path", repository / "quantization/stars_quant_models/mse4"]
    done = subprocess.run(list(map(str, infer)), capture_output=True, text=True)
    assert done.returncode == 2 and "objective 'regression' is not known here" in done.stderr, done.stderr
