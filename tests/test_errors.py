"""A user's mistake: one clear line, exit status 2, nothing written."""

import os

import pytest
from conftest import load_script

from common import UserError, cli

SCRIPTS = {
    "finetune": ("finetuning", "run_clue"),
    "export": ("finetuning", "export_model"),
    "prune": ("pruning", "prune"),
    "export_pruned": ("pruning", "export_model"),
    "quantize": ("quantization", "quant_post"),
    "infer": ("deploy/python", "infer"),
}
INIT = "--init_config {w}/tiny.json --vocab_file {w}/vocab.txt --output_dir out"
MISTAKES = [
    ("finetune", f"--task_name nosuch {INIT}", "nosuch: not one of AFQMC"),
    ("finetune", f"--task_name topics --data_dir /nonexistent {INIT}", "no dev.json for topics"),
    ("finetune", "--task_name topics --data_dir {w}/data --output_dir out", "--model_name_or_path is needed"),
    (
        "finetune",
        "--task_name topics --data_dir {w}/data --model_name_or_path /no/model --output_dir out",
        "not a built-in ppminilm model (ppminilm-6l-768h",
    ),
    (
        "finetune",
        "--task_name topics --data_dir {w}/data --output_dir out --init_config {w}/tiny.json",
        "--init_config needs --vocab_file",
    ),
    (
        "finetune",
        f"--task_name topics --data_dir {{w}}/data --model_name_or_path {{t}} {INIT}",
        "--init_config: the first has weights; give one of them",
    ),
    (
        "finetune",
        "--task_name topics --data_dir {w}/data --output_dir out --init_config /no --vocab_file {w}/vocab.txt",
        "--init_config /no: no such file",
    ),
    (
        "finetune",
        "--task_name topics --data_dir {w}/data --output_dir out --init_config {w}/vocab.txt --vocab_file {w}/vocab.txt",
        "not JSON",
    ),
    (
        "finetune",
        "--task_name topics --data_dir {w}/data --output_dir out --init_config {w}/tiny.json --vocab_file /no",
        "/no: no such vocabulary",
    ),
    (
        "finetune",
        f"--task_name topics --data_dir {{w}}/data --max_seq_length 1000 {INIT}",
        "--max_seq_length 1000: must be from 4 to 128",
    ),
    (
        "finetune",
        f"--task_name topics --data_dir {{w}}/data --learning_rate 0 {INIT}",
        "--learning_rate 0.0: must be above 0",
    ),
    (
        "finetune",
        f"--task_name topics --data_dir {{w}}/data --max_train_samples 0 {INIT}",
        "--max_train_samples 0: must be above 0",
    ),
    (
        "finetune",
        f"--task_name topics --data_dir {{w}}/data --device gpu {INIT}",
        "--device gpu: this Paddle sees no GPU",
    ),
    ("finetune", "--task_name topics", "--output_dir is required"),
    ("finetune", "--task_name topics --do_eval --model_name_or_path /no/model", "no such directory"),
    ("finetune", "--task_name afqmc --do_eval --model_name_or_path {t}", "is a model of topics"),
    ("finetune", "--task_name topics --use_faster_tokenizer maybe", "is not one of true, false"),
    ("export", "--task_name topics --model_path /no/model", "no such directory"),
    ("export", "--task_name topics --model_path {w}", "no stage.json there"),
    ("export", "--task_name topics --model_path {t} --model_type bert", "is of type ppminilm"),
    (
        "prune",
        "--task_name topics --model_name_or_path {t} --output_dir out --data_dir {w}/data --width_mult_list 0.7",
        "these do: 0.25, 0.5, 0.75, 1",
    ),
    ("prune", "--task_name tnews --model_name_or_path {t} --output_dir out", "is a model of topics"),
    (
        "export_pruned",
        "--task_name topics --model_name_or_path {t} --sub_model_output_dir out --static_sub_model out/float",
        "written by stage finetune, a model of stage prune is needed",
    ),
    ("quantize", "--task_name topics --input_dir /no/model", "no such directory"),
    ("infer", "--model_path {t}/inference --max_seq_length 200", "--max_seq_length 200: must be from 4 to 128"),
    ("export", "--task_name topics --model_path {t} --max_seq_length 3", "--max_seq_length 3: must be from 4 to 128"),
    (
        "finetune",
        "--task_name topics --data_dir {w}/data --model_type bert --model_name_or_path {t} --output_dir out",
        "holds a model of type ppminilm",
    ),
    (
        "quantize",
        "--task_name topics --input_dir {t} --calib_samples 0 --output_dir out",
        "--calib_samples 0: must be above 0",
    ),
    ("infer", "--model_path /no/model", "--model_path /no/model: no /no/model.pdmodel"),
    ("infer", "--model_path {w}", "a directory with 0 graphs"),
    ("infer", "--model_path {t}/inference --int8", "not a quantized model"),
    ("infer", "--model_path {t}/inference --task_name tnews", "is a model of topics"),
    ("infer", "--model_path {t}/inference --int8 --precision bf16", "contradict each other"),
    ("infer", "--model_path {t}/inference --batch_size 0", "--batch_size 0: must be above 0"),
    ("infer", "--model_path {t}/inference --input_file /no/file", "/no/file: No such file"),
]


@pytest.mark.parametrize("script, arguments, message", MISTAKES)
def test_one_line_and_status_2(workspace, tuned, tmp_path, monkeypatch, capsys, script, arguments, message):
    monkeypatch.chdir(tmp_path)
    argv = arguments.format(w=workspace, t=tuned).split()
    main = load_script(*SCRIPTS[script]).main
    before = sorted(os.listdir(tuned))
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main(argv))
    errors = [line for line in capsys.readouterr().err.splitlines() if "full speed" not in line]
    assert stopped.value.code == 2 and len(errors) == 1 and message in errors[0], errors
    assert os.listdir(tmp_path) == [] and sorted(os.listdir(tuned)) == before


def test_every_script_explains_its_arguments(capsys):
    for script in SCRIPTS.values():
        with pytest.raises(SystemExit) as stopped:
            load_script(*script).parse_args(["--help"])
        assert stopped.value.code == 0 and "python " in capsys.readouterr().out


def test_no_network_is_said(monkeypatch, tmp_path):
    """PaddleNLP's own download, cut off at its URL."""
    import paddlenlp.datasets.clue as clue

    import data

    monkeypatch.setattr(clue, "DATA_HOME", str(tmp_path))
    monkeypatch.setitem(clue.Clue.BUILDER_CONFIGS["afqmc"], "url", "http://127.0.0.1:1/afqmc_public.zip")
    with pytest.raises(UserError, match="AFQMC could not be downloaded .*--data_dir DIR or CLUE_DATA_DIR=DIR"):
        data.read_split(data.get_task("afqmc"), "dev")
