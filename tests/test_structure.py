"""What makes a stage a template: what it imports, how much it explains, and that it can be copied on its own."""

import ast
import io
import os
import shutil
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

COMMON = sorted(name[:-3] for name in os.listdir(os.path.join(ROOT, "common")) if name.endswith(".py"))
STAGES = {
    "finetuning": "run_clue",
    "pruning": "prune",
    "quantization": "quant_post",
    "general_distill": "general_distill",
    "deploy/python": "infer",
}


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def imports(path):
    """(line, module, name or None) of every import statement, also within functions, in the order of the lines."""
    found = []
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, node.module, alias.name) for alias in node.names]
    return sorted(found, key=lambda row: row[0])


def project_modules():
    """{module: path} of everything but common/ that a script could import by its bare name."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [path for path in listed.stdout.split() if not path.startswith(("tests/", "common/"))]
    return {os.path.basename(path)[:-3]: path for path in paths}


def common_imports(name):
    """The modules of common/ that a module of common/ imports."""
    found = set()
    for _, module, part in imports(f"common/{name}.py"):
        if module == "common" and part in COMMON:
            found.add(part)
        elif module.startswith("common."):
            found.add(module.split(".")[1])
    return found


def test_common_needs_neither_data_nor_a_stage():
    others = project_modules()
    for name in COMMON:
        used = {module.split(".")[0] for _, module, _ in imports(f"common/{name}.py")} & set(others)
        assert not used, f"common/{name}.py imports {used}"


def test_common_has_no_circle_of_imports():
    left = {name: common_imports(name) for name in COMMON}
    while left:
        free = [name for name, needs in left.items() if not needs & set(left)]
        assert free, f"these import each other: {left}"
        for name in free:
            del left[name]


def test_the_root_holds_what_a_user_edits_and_runs():
    assert sorted(n for n in os.listdir(ROOT) if n.endswith(".py")) == ["data.py", "summarize.py"]


def test_common_comes_before_paddle():
    """Paddle reads what common/__init__.py sets while it is imported."""
    for path in project_modules().values():
        lines = imports(path)
        paddle = [line for line, module, _ in lines if module.split(".")[0] in ("paddle", "paddlenlp", "paddleslim")]
        common = [line for line, module, _ in lines if module.split(".")[0] == "common"]
        assert not paddle or min(common) < min(paddle), path
        assert not any(module == "paddle" for _, module, _ in lines), f"{path}: from common.compat import paddle"


def test_light_tools_stay_light():
    """Tables, and what a client does, in a process that never imports Paddle."""
    code = "import sys; sys.path[:0] = [{!r}, {!r}]; import {}; assert 'paddle' not in sys.modules"
    for directory, module in (("", "summarize"), ("deploy/serving", "rpc_client"), ("demo", "make_vocab")):
        command = code.format(ROOT, os.path.join(ROOT, directory), module)
        done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("directory", STAGES)
def test_a_stage_script_reads_as_a_template(directory):
    """Short, at least 8 % of its lines comments, and at most 30 names of the project's other modules."""
    path = f"{directory}/{STAGES[directory]}.py"
    text, others = read(path), set(project_modules()) | set(COMMON)
    lines = [line for line in text.splitlines() if line.strip()]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT and "noqa" not in token.string}
    assert len(text.splitlines()) <= 350 and len(comments) >= 0.08 * len(lines), len(comments) / len(lines)
    modules, names = set(), set()
    for _, module, part in imports(path):
        if part in others:
            modules.add(part)
        elif part is None and module in others:
            modules.add(module)
        elif part and module.split(".")[-1] in others:
            names.add(part)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            names.add(f"{node.value.id}.{node.attr}")
    assert len(names) <= 30, sorted(names)


@pytest.mark.parametrize("directory", STAGES)
def test_a_stage_is_copied_with_common_and_data(tmp_path, directory):
    """Its directory, common/ and data.py, somewhere else, are a stage that runs."""
    for name in ("common", directory):
        shutil.copytree(os.path.join(ROOT, name), tmp_path / name, ignore=shutil.ignore_patterns("*models*", "*.json"))
    shutil.copy(os.path.join(ROOT, "data.py"), tmp_path)
    script = tmp_path / directory / f"{STAGES[directory]}.py"
    done = subprocess.run([sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
