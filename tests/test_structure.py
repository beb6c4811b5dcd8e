"""What makes a stage a template: what it imports, how much it explains, and that it can be copied on its own."""

import ast
import io
import os
import shutil
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT, load_script
from test_distillation import distillation  # noqa: F401

from common import cli

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


def top_level_modules(path):
    """The modules that a file imports outside of functions, in the order of the lines."""
    found = []
    for node in ast.parse(read(path)).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module)
    return [module.split(".")[0] for module in found]


def test_common_comes_before_paddle():
    """Paddle reads what common/__init__.py sets while it is imported."""
    for path in project_modules().values():
        modules = top_level_modules(path)
        assert "paddle" not in modules, f"{path}: from common.compat import paddle"
        assert not {"paddlenlp", "paddleslim"} & set(modules), f"{path}: imports these where they are needed"
        late = {module.split(".")[0] for _, module, _ in imports(path)} & {"paddle", "paddlenlp", "paddleslim"}
        assert not late or {"common", "data"} & set(modules), path


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


@pytest.fixture(scope="module")
def copied(tmp_path_factory, workspace, distillation, tuned):  # noqa: F811
    """{directory of a stage: (the process of its copy somewhere else, where that is)}; all run at the same time."""
    of_task = ["--task_name", "topics", "--data_dir", workspace / "data", "--max_eval_samples", "20"]
    init = ["--init_config", workspace / "tiny.json", "--vocab_file", workspace / "vocab.txt"]
    arguments = {
        "finetuning": [*of_task, *init, "--max_steps", "2"],
        "pruning": [*of_task, "--model_name_or_path", tuned, "--max_steps", "1", "--importance_samples", "9"],
        "quantization": [*of_task, "--input_dir", tuned, "--algorithms", "abs_max", "--min_agreement", "0"],
        "general_distill": [*distillation[1], "--max_steps", "2"],
        "deploy/python": [*of_task, "--model_path", tuned],
    }
    running = {}
    for directory, stage in STAGES.items():
        place = tmp_path_factory.mktemp("copy")
        for name in ("common", directory):
            ignored = shutil.ignore_patterns("*models*", "*.json")
            shutil.copytree(os.path.join(ROOT, name), place / name, ignore=ignored)
        shutil.copy(os.path.join(ROOT, "data.py"), place)
        command = [sys.executable, place / directory / f"{stage}.py", *arguments[directory]]
        command += [] if directory == "deploy/python" else ["--output_dir", place / "out"]
        said = subprocess.PIPE
        process = subprocess.Popen(list(map(str, command)), cwd=place, stdout=said, stderr=subprocess.STDOUT, text=True)
        running[directory] = process, place
    yield running
    for process, _ in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("directory", STAGES)
def test_a_stage_is_copied_with_common_and_data(copied, directory):
    """Its directory, common/ and data.py, somewhere else, are a stage that runs."""
    process, place = copied[directory]
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert directory == "deploy/python" or list(place.glob("out/**/stage.json"))


# What each parser declares: arguments that do not change the result, and those that records write as paths.
OF_DATA = {"task_name", "data_dir", "output_dir"}
OF_TRAINING = {"logging_steps", "visualdl_dir", "overwrite"}
DECLARED = {
    ("finetuning", "run_clue"): (
        OF_DATA | OF_TRAINING | {"do_eval", "do_predict", "report", "report_errors"},
        {"model_name_or_path", "init_config", "vocab_file", "output_dir", "data_dir", "visualdl_dir"},
        "--task_name t",
    ),
    ("pruning", "prune"): (
        OF_DATA | OF_TRAINING | {"do_train", "do_eval", "parity_tolerance"},
        {"model_name_or_path", "output_dir", "data_dir", "visualdl_dir"},
        "--task_name t",
    ),
    ("quantization", "quant_post"): (
        OF_DATA
        | {"input_dir", "algorithms", "calib_samples", "min_agreement", "accuracy_tolerance", "overwrite"}
        | {"analyze", "analyze_records", "max_drop", "select_on"},
        {"input_dir", "output_dir", "data_dir", "model_name_or_path"},
        "--task_name t",
    ),
    ("general_distill", "general_distill"): (
        OF_TRAINING | {"input_dir", "output_dir", "relation_mb"},
        {"student_model_name_or_path", "teacher_model_name_or_path", "init_config", "vocab_file", "input_dir"}
        | {"output_dir", "visualdl_dir"},
        "",
    ),
    ("finetuning", "export_model"): (
        {"task_name", "parity_tolerance", "data_dir"}, {"model_path", "data_dir"}, "--task_name t",
    ),
    ("pruning", "export_model"): (
        {"task_name", "parity_tolerance", "data_dir"},
        {"model_name_or_path", "sub_model_output_dir", "static_sub_model", "data_dir"},
        "--task_name t",
    ),
}  # fmt: skip


@pytest.mark.parametrize("script", DECLARED, ids="/".join)
def test_arguments_declare_what_they_are(script):
    """A run is the same run if it differs in these alone; records name no directory of a user."""
    without_effect, paths, words = DECLARED[script]
    names = [name for name in sorted(paths) if name != "init_config"]
    words = [*words.split(), *(word for name in names for word in (f"--{name}", "/data/someone/deep/place"))]
    if "init_config" in paths:
        words += ["--init_config", "/data/someone/deep/place"]
    args = load_script(*script).parse_args(words)
    assert args.without_effect == without_effect
    described = cli.describe(args)
    assert {name for name, value in described.items() if value == ".../deep/place"} == paths
    assert "someone" not in str(described)
