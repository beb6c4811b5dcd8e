"""The documents show the same commands and figures in both languages, and each command is one that the scripts accept."""

import hashlib
import json
import os
import re
import shlex
import string
import subprocess

import pytest
from conftest import ROOT, load_script


def blocks(name):
    return re.findall(r"^```sh\n(.*?)^```", open(os.path.join(ROOT, name), encoding="utf-8").read(), re.M | re.S)


def commands(name):
    """(directory, words) of every command in the sh blocks; a block begins at the root of the repository."""
    found = []
    for block in blocks(name):
        directory, variables = ".", {"CLUE_DATA_DIR": "clue"}
        for line in block.splitlines():
            words = shlex.split(
                string.Template(line.replace("$!", "PID").replace("$(", "$$(")).substitute(variables), comments=True
            )
            while len(words) > 1 and re.match(r"[A-Z_]+=", words[0]):  # settings of a launcher
                words = words[1:]
            if words[0] in ("mkdir", "cp", "sed", "curl", "kill"):
                continue
            words = words[:-1] if words[-1] == "&" else words
            if words[0] == "cd":
                directory = os.path.join(directory, words[1])
            elif re.match(r"\w+=", words[-1]):
                variables.update([words[-1].split("=", 1)])
            else:
                found.append((directory, words))
    return found


# Documents with a Chinese block and an English one, each below a heading of the first level.
IN_BOTH_LANGUAGES = [
    f"{directory}/README.md"
    for directory in (
        "results",
        "general_distill",
        "finetuning",
        "deploy/python",
        "deploy/onnx",
        "deploy/serving",
        "tests",
    )
]
TYPED = "deploy/serving/OPERATION.md"  # test_serving_run.py runs its blocks as they stand there
IN_BOTH_LANGUAGES += [TYPED, "general_distill/MACHINES.md", "general_distill/FEW_LABELS.md"]
DOCUMENTS = ["README.md", "README_en.md", *IN_BOTH_LANGUAGES]


def test_every_block_is_run_or_says_why_not():
    """Each script in a block is run by the demo or by a test, by that path; a block that cannot be is tagged so."""
    ran = "tests/run.sh " + open(os.path.join(ROOT, "demo/run.sh"), encoding="utf-8").read()  # this is run by that
    for name in os.listdir(os.path.join(ROOT, "tests")):
        if name.endswith((".py", ".sh")) and name != "test_documents.py":
            ran += open(os.path.join(ROOT, "tests", name), encoding="utf-8").read()
    ran += "".join(
        f"{directory}/{script}.py\n" for directory, script in re.findall(r'load_script\("(.+?)", "(.+?)"\)', ran)
    )
    not_run = []
    for document in DOCUMENTS:
        text = open(os.path.join(ROOT, document), encoding="utf-8").read()
        for tag, kind, block in re.findall(r"(<!-- not run here: .+? -->\n)?^```(\w+)\n(.*?)^```", text, re.M | re.S):
            if tag:
                not_run.append((document, tag))
                continue
            assert kind == "sh", f"{document}: a block of {kind} is neither run nor tagged"
            directory = "."
            for line in block.splitlines():
                directory = os.path.join(directory, line.split()[1]) if line.startswith("cd ") else directory
                for script in re.findall(r"(?:sh|bash|python) (?:-\w \S+ )?([\w./]+\.(?:sh|py))", line):
                    path = os.path.normpath(os.path.join(directory, script))
                    assert path in ran, f"{document}: {path} is neither run nor tagged"
    assert len(not_run) == 20, not_run  # a new one is a decision


def test_both_readmes_show_the_same():
    assert commands("README.md") == commands("README_en.md") and len(commands("README.md")) > 10
    for name in ("README.md", "README_en.md"):
        text = open(os.path.join(ROOT, name), encoding="utf-8").read()
        assert not re.search(r"\b(TODO|GRIDTABLE|RESULTS)\b", text)
    figures = [
        sorted(re.findall(r"\d+\.\d+", open(os.path.join(ROOT, name), encoding="utf-8").read()))
        for name in ("README.md", "README_en.md")
    ]
    assert figures[0] == figures[1]
    results = open(os.path.join(ROOT, "results/README.md"), encoding="utf-8").read()
    named, there = re.findall(r"`([\w.]+\.jsonl?)`", results), os.listdir(os.path.join(ROOT, "results"))
    assert set(named) == {name for name in there if name.endswith((".json", ".jsonl"))}


CLUE = os.environ.get("CLUE_DATA_DIR")  # read here: a fixture hides it from the tests


def two_classes(place, clue):
    """[train, dev]: the files that the commands of finetuning/README.md make of TNEWS below ``clue``."""
    block = next(block for block in blocks("finetuning/README.md") if "sed " in block)
    lines = [line for line in block.splitlines() if line.startswith(("mkdir ", "cp ", "sed "))]
    environment = {**os.environ, "CLUE_DATA_DIR": str(clue)}
    subprocess.run(["sh", "-e", "-c", "\n".join(lines)], cwd=place, env=environment, check=True)
    return [(place / "military" / name).read_text(encoding="utf-8") for name in ("train.json", "dev.json")]


def test_the_two_classes_of_the_rare_class_experiment(tmp_path):
    sentences = ["军事", '他说"好"', 'a\\ {"label": "110"}, "keywords": "x', ""]
    rows = [
        {"label": label, "label_desc": "news", "sentence": sentence, **more}
        for sentence in sentences
        for label in ("110", "101", "116")
        for more in ({}, {"keywords": '110,"label": "110"}'})
    ]
    (tmp_path / "tnews_public").mkdir()
    for name in ("train.json", "dev.json"):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / "tnews_public" / name).write_text(lines, encoding="utf-8")
    expected = [
        {"sentence": row["sentence"], "label": "military" if row["label"] == "110" else "other"} for row in rows
    ]
    for text in two_classes(tmp_path, tmp_path):
        assert [json.loads(line) for line in text.splitlines()] == expected


@pytest.mark.skipif(not CLUE, reason="CLUE_DATA_DIR is not set")
def test_the_rare_class_experiment_is_of_these_data(tmp_path):
    found = [hashlib.md5(text.encode("utf-8")).hexdigest() for text in two_classes(tmp_path, CLUE)]
    with open(os.path.join(ROOT, "results/rare_class.json"), encoding="utf-8") as file:
        for run in json.load(file):
            assert [run["data"][split]["md5"] for split in ("train", "dev")] == found


@pytest.mark.parametrize("name", IN_BOTH_LANGUAGES)
def test_both_languages_say_the_same(name):
    """Commands, figures and the number of headings and of rows; and no Chinese in the English block but in code."""
    text = (
        open(os.path.join(ROOT, name), encoding="utf-8").read().partition("<!-- table -->")[0]
    )  # written by faults.sh
    chinese, english = re.split(r"^# ", text, flags=re.M)[1:]
    for pattern in (r"^```sh\n.*?^```", r"^<!-- not run here: .+? -->$"):
        assert re.findall(pattern, chinese, re.M | re.S) == re.findall(pattern, english, re.M | re.S)
    assert sorted(re.findall(r"\d+\.\d+", chinese)) == sorted(re.findall(r"\d+\.\d+", english))
    for pattern in (r"^## ", r"^\|", r"^- ", r"^!\["):
        assert len(re.findall(pattern, chinese, re.M)) == len(re.findall(pattern, english, re.M))
    assert not re.search("[\u3000-\u9fff]", re.sub(r"^```.*?^```|`[^`\n]*`", "", english, flags=re.M | re.S))
    assert all(re.search("[\u4e00-\u9fff]", line) for line in re.findall(r"^(?:#+|-) .+", chinese, re.M)), name


def anchors(name):
    """The anchors that GitHub gives the headings of a document: lower case, blanks to hyphens, other marks dropped."""
    text = open(os.path.join(ROOT, name), encoding="utf-8").read()
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*DOCUMENTS, "CONTRIBUTING.md"])
def test_links_lead_somewhere_and_a_readme_has_at_most_300_lines(name):
    text = open(os.path.join(ROOT, name), encoding="utf-8").read()
    assert text.count("\n") <= 300
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text)
    assert links
    for path, anchor in links:
        target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
        assert os.path.exists(os.path.join(ROOT, target)), f"{name}: {path}"
        assert not anchor or anchor in anchors(target), f"{name}: {path}#{anchor}"


@pytest.mark.parametrize(
    "directory, words",
    {
        str(command): command for document in DOCUMENTS[1:] if document != TYPED for command in commands(document)
    }.values(),
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else value,
)
def test_commands_are_accepted(directory, words):
    """Python commands by the script's own parser; launchers exist, are sound under dash, and take that many arguments."""
    place = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    script, words = os.path.normpath(os.path.join(ROOT, directory, words[place])), [words[0], *words[place:]]
    if words[0] == "python":
        name = os.path.basename(script)[:-3]
        assert load_script(os.path.relpath(os.path.dirname(script), ROOT), name).parse_args(words[2:])
        return
    assert words[0] in ("sh", "bash") and subprocess.run([words[0], "-n", script]).returncode == 0
    wanted = [int(n) for n in re.findall(r"^ *usage (\d+)", open(script, encoding="utf-8").read(), re.M)]
    from_best = len(words) > 2 and words[2].endswith(".json")  # one way of calling; the other counts more
    assert len(words) - 2 >= (0 if from_best else max(wanted, default=0))


@pytest.mark.parametrize(
    "launcher, count",
    [
        ("finetuning/run_clue.sh", 7),
        ("pruning/prune.sh", 8),
        ("pruning/export.sh", 2),
        ("quantization/quant.sh", 2),
        ("run_all.sh", 7),
        ("finetuning/run_one_search.sh", 2),
        ("finetuning/run_all_search.sh", 1),
    ],
)
def test_launchers_show_their_usage(launcher, count, tmp_path):
    done = subprocess.run(
        ["sh", os.path.join(ROOT, launcher), *["x"] * (count - 1)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith(f"usage: sh {os.path.basename(launcher)} ")


def test_launchers_are_plain_sh():
    scripts = subprocess.run(
        ["git", "ls-files", "*.sh"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(scripts) >= 10
    for script in scripts:
        if not open(os.path.join(ROOT, script)).readline().startswith("#!/usr/bin/env bash"):
            assert subprocess.run(["dash", "-n", os.path.join(ROOT, script)]).returncode == 0, script
