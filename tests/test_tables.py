"""The tables against figures computed apart, from records made by hand; and predictions in CLUE's form."""

import csv
import io
import json
import re

import numpy as np
import pytest
from conftest import load_script, write_rows

import summarize
from common import records, tables


ARCHITECTURE = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128,
                "max_position_embeddings": 128}  # fmt: skip


class Args:
    learning_rate, batch_size, num_train_epochs, max_seq_length = 1e-4, 32, 3, 128


def write(directory, stage, task, accuracy, weights, parent=None, width=1.0, rate=1e-4, **more):
    args, partial = Args(), "9 of 90" if task == "CSL" else None
    args.learning_rate = rate
    directory.mkdir(parents=True)
    fields = records.make_record(
        stage, args, 0, task=task, labels=["0", "1"],
        data={"train": {"md5": "0", "partial": partial, "examples": 9},
              "dev": {"file": "dev.json", "md5": "1", "partial": None, "examples": 10, "majority_class": 0.6, "pairs": False}},
        model={"model_type": "ppminilm", "architecture": ARCHITECTURE, "width_mult": width,
               "initialized_from": "random weights"},
        objective=more.pop("objective", {"name": "classification", "metric": "accuracy"}), params=int(1e6 * width), flops=int(2e9 * width), weights={"model_state.pdparams": weights}, notes=["random weights"],
        metrics={"accuracy": accuracy, "step": 5, **more.pop("metrics", {})},
        parent=parent and {"path": "x", "weights": {"model_state.pdparams": parent}}, **more,
    )  # fmt: skip
    fields["arguments"] = {name: getattr(args, name) for name in tables.HYPER_PARAMETERS}
    records.write_record(str(directory), fields)


def write_clue(root, tasks):
    """A grid of two cells a task, the better pruned and quantized; the accuracies tell task and row."""
    for number, task in enumerate(tasks):
        base = 0.5 + number / 100
        for cell, (rate, less) in {"1e-4_32": (1e-4, 0), "3e-5_32": (3e-5, 0.05)}.items():
            write(root / f"m/models/{task}/{cell}", "finetune", task, base - less, f"{task}{cell}", rate=rate)
        tuned = f"{task}1e-4_32"
        write(root / f"pruned/{task}", "prune_export", task, base - 0.01, f"{task}p", tuned, 0.75,
              export={"weights": {"float.pdiparams": f"{task}static"}, "bytes": 3_000_000})  # fmt: skip
        for variant, less in (("mse4", 0.03), ("hist4", 0.02)):
            write(root / f"quant/{task}/{variant}", "quantize", task, base - less, f"{task}{variant}", f"{task}p", 0.75,
                  metrics={"bytes": 1_000_000, "agreement": 0.9},
                  variant={"algorithm": variant[:-1], "calib_samples": 4})  # fmt: skip


@pytest.fixture
def clue(tmp_path):
    write_clue(tmp_path, tables.TASKS)
    return tmp_path


def output(capsys, *argv):
    summarize.main([str(a) for a in argv])
    return capsys.readouterr().out


def test_the_clue_table(clue, capsys):
    """Best of the grid, best variant, average of seven, published and difference; partial data marked in every place."""
    text = output(capsys, clue)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    tuned = [0.5 + i / 100 for i in range(7)]
    for row, less in (("fine-tuned", 0), ("pruned to 0.75", 0.01), ("pruned to 0.75 + quantized", 0.02)):
        found = re.findall(r"\d+\.\d\d(?: \([\d,*]+\))?", rows[f"{row}, measured"].split(" | ", 1)[1])
        wanted = [f"{(v - less) * 100:.2f}" for v in tuned]
        wanted.append(f"{sum(v - less for v in tuned) / 7 * 100:.2f}")
        assert [f.split()[0] for f in found[:8]] == wanted
        marks = [f.split()[1] for f in found[:8]]
        assert marks[0] == "(1)" and marks[6] == "(1,2)" and marks[7] == "(*)"  # CSL, and the average
    assert "(1) random weights." in text and "(2) partial train data: 9 of 90." in text
    assert "(*) an average of figures with the remarks that they carry." in text
    assert rows["pruned to 0.75 + quantized, measured"].count("1.0 |") == 1  # the file in MB
    blocks = text.split("\n")
    place = next(i for i, line in enumerate(blocks) if line.startswith("| pruned to 0.75 + quantized, measured"))
    assert blocks[place + 1].split(" | ")[:3] == ["| published", "74.00", "57.37"]
    assert blocks[place + 2].split(" | ")[1] == f"{48 - 74.00:+.2f}"
    assert blocks[place + 2].split(" | ")[8] == f"{(sum(tuned) / 7 - 0.02) * 100 - 73.40:+.2f}"
    assert "| AFQMC | 50.00 | 0.0001 | 32 | 3 | 128 | 5 | 2 | 60.00 | (1) |" in text
    assert "| learning rate | 32 |" in text and "| 3e-05 | 45.00 (1) |" in text
    assert "| pruned to 0.75, INT8 hist4 (best INT8) | 48.00 | 90.00 | 0.75 M | 1.50 G | 1.0 | (1) |" in text
    # Every note stands once, below all tables.
    assert text.count("random weights.") == text.count("partial train data") == 1
    assert text.endswith("**Notes**\n\n(1) random weights.\n(2) partial train data: 9 of 90.\n")


def test_a_small_dev_set_does_not_win(tmp_path, capsys):
    """A lucky run on few records is not the best of a grid that was scored on all of them."""
    write(tmp_path / "m/models/CSL/1e-4_32", "finetune", "CSL", 0.6, "a")
    write(tmp_path / "m/models/CSL/3e-4_32", "finetune", "CSL", 0.9, "b", rate=3e-4)
    lucky = tmp_path / "m/models/CSL/3e-4_32/stage.json"
    record = json.loads(lucky.read_text())
    record["data"]["dev"].update(partial="5 of 10", examples=5)
    lucky.write_text(json.dumps(record))
    summarize.write_best(str(tmp_path / "m"))
    assert json.loads((tmp_path / "m/best.json").read_text())["CSL"]["path"] == "models/CSL/1e-4_32"
    text = output(capsys, tmp_path)
    assert "| CSL | 60.00 | 0.0001 |" in text and "| 0.0003 | 90.00 (1,2,3) |" in text
    assert "(3) partial dev data: 5 of 10." in text


def test_no_average_over_fewer_tasks(tmp_path, capsys):
    write_clue(tmp_path, tables.TASKS[:6])
    text = output(capsys, tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("| fine-tuned, measured"))
    assert "| missing | 6 of 7 tasks |" in line
    published = text.split("\n")[text.split("\n").index(line) + 2]
    assert published.startswith("| difference") and published.split(" | ")[7:9] == ["", ""]
    assert "average" not in [row["task"] for row in json.loads(output(capsys, tmp_path, "--format", "json")) if row.get("accuracy") and row["row"] == "fine-tuned"]  # fmt: skip


def test_csv_and_json_hold_the_same(clue, capsys):
    from_json = json.loads(output(capsys, clue, "--format", "json"))
    from_csv = list(csv.DictReader(io.StringIO(output(capsys, clue, "--format", "csv"))))
    assert len(from_json) == len(from_csv) == 3 * 8 + 14 + 7 * 4
    assert [row["agreement"] for row in from_json if row["table"] == "models"].count(0.9) == 14
    for one, other in zip(from_json, from_csv):
        assert {name: "" if value is None else str(value) for name, value in one.items()}.items() <= other.items()
    best = next(row for row in from_json if row["table"] == "clue" and row["task"] == "CSL")
    average = next(row for row in from_json if row["row"] == "fine-tuned" and row["task"] == "average")
    assert average["difference"] == pytest.approx(53 - 73.69) and "partial train data" in average["remarks"]
    assert best["accuracy"] == 56.0 and best["published"] == 79.17 and best["difference"] == pytest.approx(-23.17)
    assert "partial train data: 9 of 90" in best["remarks"]


def test_speedups_and_the_plot(clue, capsys):
    (clue / "perf.json").write_text(json.dumps({"rows": [{"row": "pruned to 0.75", "speedup": 2.5}]}))
    text = output(capsys, clue, "--perf", clue / "perf.json", "--plot", clue / "plot.png")
    assert next(line for line in text.splitlines() if line.startswith("| pruned to 0.75, measured")).endswith(
        "| 2.50x |"
    )
    with_speed = (clue / "plot.png").read_bytes()
    assert with_speed.startswith(b"\x89PNG")
    output(capsys, clue, "--plot", clue / "plot.png")
    width = [int.from_bytes(image[16:20], "big") for image in (with_speed, (clue / "plot.png").read_bytes())]
    assert width[0] - width[1] == 6 * 120  # speed has a panel of its own
    timed = [{"weights": "CSLhist4", "precision": "int8", "sentences_per_second": 9.0}]
    (clue / "timed.json").write_text(json.dumps({"rows": timed}))
    output(capsys, clue, "--perf", clue / "timed.json", "--plot", clue / "plot.png")
    assert (clue / "plot.png").read_bytes()[16:20] == with_speed[16:20]
    with pytest.raises(summarize.UserError, match="--plot .*its ending must be that of a picture"):
        output(capsys, clue, "--plot", clue / "plot.xyz")
    with pytest.raises(summarize.UserError, match="not a benchmark's JSON"):
        output(capsys, clue, "--perf", clue / "m/models/CSL/1e-4_32/stage.json")


def notes_of_a_demo(root, task):
    """Gives the records the notes that the demo's have: of the student, the teacher, the data, and of each stage."""
    sizes = {"train": f"{len(task)}00 generated train records", "dev": f"{len(task)}0 generated dev records"}
    partial = [f"partial {split} data: {size}, nothing of CLUE" for split, size in sizes.items()]
    notes = ["student: random weights", "teacher: random weights", "teacher: pre-trained for 9 steps only", *partial]
    for path in root.rglob("stage.json"):
        record = json.loads(path.read_text())
        if record["task"] != task:
            continue
        later = {"finetune": [], "prune_export": ["pruning"], "quantize": ["pruning", "quantizing"]}[record["stage"]]
        record["notes"] = notes + [f"{stage}: {note}" for stage in later for note in partial]
        if task == "AFQMC":
            record["notes"].append("fine-tuning: dev accuracy not above the majority class")
        path.write_text(json.dumps(record))
    return notes


def test_the_short_format_is_one_screen(tmp_path, capsys):
    """What is best on dev of every stage; a note stands once, in the place that says of which rows it is true."""
    tasks = ("AFQMC", "TNEWS", "CLUEWSC2020")
    write_clue(tmp_path, tasks)
    notes = [note for task in tasks for note in notes_of_a_demo(tmp_path, task)]
    special = tmp_path / "quant/TNEWS/hist4/stage.json"
    record = json.loads(special.read_text())
    record["notes"].append("INT8 for a GPU")
    special.write_text(json.dumps(record))
    of_machine = {"machine": {"cpu": "a CPU", "cores": 2}}
    (tmp_path / "fp32.json").write_text(json.dumps({**of_machine, "rows": [
        {"weights": "TNEWSstatic", "precision": "fp32", "sentences_per_second": 1234.5},
        {"weights": "TNEWSstatic", "precision": "bf16", "sentences_per_second": 7777.7}]}))  # fmt: skip
    (tmp_path / "int8.json").write_text(json.dumps({**of_machine, "rows": [
        {"weights": "TNEWSmse4", "precision": "int8", "sentences_per_second": 8888.8},
        {"weights": "TNEWShist4", "precision": "int8", "sentences_per_second": 2345.6}]}))  # fmt: skip
    perf = ["--perf", tmp_path / "fp32.json", "--perf", tmp_path / "int8.json"]
    text = output(capsys, tmp_path, "--format", "short", *perf)
    lines = text.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100, text
    place = next(i for i, line in enumerate(lines) if line.startswith("| TNEWS"))
    numbers = {note: number for number, note in re.findall(r"^\((\d)\) (.*)\.$", text, re.M)}
    of_data = [numbers[f"partial {split} data: 5{zeros} generated {split} records, nothing of CLUE"]
               for split, zeros in (("train", "00"), ("dev", "0"))]  # fmt: skip
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[place : place + 6]]
    assert table[0] == [f"TNEWS ({','.join(of_data)}): 10 dev, majority class 60.0 %", "accuracy", "params", "file",
                        "sentences/s"]  # fmt: skip
    assert table[2:5] == [
        ["fine-tuned, FP32", "51.00 %", "1.00 M", "-", "-"],
        ["pruned to 0.75, FP32", "50.00 %", "0.75 M", "3.0 MB", "1,234"],
        [f"pruned to 0.75, INT8 hist4 ({numbers['INT8 for a GPU']})", "49.00 %", "0.75 M", "1.0 MB", "2,346"],
    ]
    assert "tokenizing included, a CPU, 2 cores." in text
    whole = text.replace("\n", " ")
    assert all(whole.count(note) == 1 for note in notes), text
    assert "Notes on all rows: student: random weights; teacher: random weights; teacher: pre-trained for" in whole
    assert "pruning: " not in text and "fine-tuning: dev accuracy not above the majority class" in numbers
    # With one task everything is true of all rows, and nothing needs a mark; without --perf no speed is known.
    text = output(capsys, tmp_path, "--format", "short", "--task_name", "CLUEWSC2020")
    assert text.startswith("| CLUEWSC2020: 10 dev") and not re.search(r"\(\d", text) and "sentences/s:" not in text


def test_the_short_format_shows_stages_of_ones_own(tmp_path, capsys):
    write(tmp_path / "m/models/TNEWS/1e-4_32", "finetune", "TNEWS", 0.5, "w")
    write(tmp_path / "mine", "low_rank", "TNEWS", 0.25, "x", parent="w")
    text = output(capsys, tmp_path, "--format", "short")
    assert re.search(r"\| TNEWS, stages of your own: .*\n.*\n\| low_rank, .*mine +\|  25.00 % \| 1.00 M \|", text)
    assert output(capsys, tmp_path / "mine", "--format", "short").count("low_rank") == 1


def test_the_plot_links_and_labels(clue, monkeypatch):
    """An arrow from each model to what was made from it; labels in the picture that cover neither another nor a point."""
    from matplotlib import figure

    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, content, **_: drawn.append(self))
    exported = clue / "m/models/TNEWS/1e-4_32/stage.json"
    record = json.loads(exported.read_text())
    exported.write_text(json.dumps({**record, "export": {"bytes": 4_000_000}}))
    summarize.main([str(clue), "--plot", str(clue / "plot.png")])
    (axis,) = drawn[0].axes
    texts = [text for text in axis.texts if text.get_text()]
    labels = [text.get_text() for text in texts]
    # A model that was not exported has no file, so it is not in the picture, and what was made from it has the name.
    assert {f"{task}, pruned to 0.75" for task in tables.TASKS if task != "TNEWS"} | {"TNEWS, fine-tuned"} <= set(
        labels
    )
    assert labels.count("pruned to 0.75") == 1 and labels.count("INT8 hist4") >= 4
    found = sorted((*text.xyann, *text.xy) for text in axis.texts if not text.get_text())
    expected = [(3.0, 49 + i, 1.0, 48 + i) for i in range(7)] + [(4.0, 51, 3.0, 50)]
    assert np.array(found) == pytest.approx(np.array(expected))
    boxes = [text.get_window_extent() for text in texts]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_best_json(clue, capsys):
    summarize.write_best(str(clue / "m"))
    lines = output(capsys, "--cells", clue / "m/best.json").splitlines()
    assert [line.split("\t")[0] for line in lines] == sorted(tables.TASKS)
    task, *settings, directory = lines[0].split("\t")
    assert settings == ["0.0001", "32", "3", "128"] and directory == str(clue / f"m/models/{task}/1e-4_32")


def test_test_predictions(tuned, workspace, tmp_path, capsys):
    """Of dev without its labels: as accurate as dev was, in the file's order, with its ids; the same by infer.py."""
    rows = [json.loads(line) for line in open(workspace / "data/topics/dev.json", encoding="utf-8")]
    labels = [row.pop("label") for row in rows]
    (tmp_path / "topics").mkdir()
    write_rows(tmp_path / "topics/dev.json", [{**row, "label": label} for row, label in zip(rows, labels)])
    write_rows(tmp_path / "topics/test.json", [{"id": 1000 - i, **row} for i, row in enumerate(rows)])
    (tmp_path / "topics/labels.json").write_bytes((workspace / "data/topics/labels.json").read_bytes())
    run_clue = load_script("finetuning", "run_clue")
    common = ["--task_name", "topics", "--data_dir", str(tmp_path)]
    run_clue.main([*common, "--model_name_or_path", str(tuned), "--do_predict"])
    written = tuned / "topics_predict.json"
    predictions = [json.loads(line) for line in open(written, encoding="utf-8")]
    written.unlink()
    assert [p["id"] for p in predictions] == list(range(1000, 1000 - len(rows), -1))
    right = sum(p["label"] == label for p, label in zip(predictions, labels)) / len(labels)
    assert right == pytest.approx(records.read_record(str(tuned))["metrics"]["accuracy"], abs=1e-6)
    infer = load_script("deploy/python", "infer")
    infer.main([*common, "--model_path", str(tuned / "inference"), "--predict_test", str(tmp_path / "out")])
    assert [json.loads(line) for line in open(tmp_path / "out/topics_predict.json", encoding="utf-8")] == predictions


def test_stages_of_ones_own_are_listed(tmp_path, capsys):
    """Made from a fine-tuned model they stand in its table, others in one of their own; alone they are enough."""
    write(tmp_path / "m/models/TNEWS/1e-4_32", "finetune", "TNEWS", 0.5, "w")
    write(tmp_path / "mine", "low_rank", "TNEWS", 0.25, "x", parent="w")
    write(tmp_path / "unnamed", "layers", "TNEWS", 0.375, "z", parent="w", objective=None)
    write(tmp_path / "other", "two_towers", "pairs", 0.125, "y")
    text = output(capsys, tmp_path)
    family, own = text.split("**Stages of your own**")
    assert re.search(r"\| low_rank, .*mine \| 25.00 \|", family) and "low_rank" not in own
    assert re.search(r"\| layers, .*unnamed \|  \|", family)
    rows = list(csv.DictReader(io.StringIO(output(capsys, tmp_path, "--format", "csv"))))
    assert [(row["row"].split(",")[0], row["accuracy"]) for row in rows if row["table"] == "own"] == [
        ("two_towers", "12.5")
    ]
    assert re.search(r"\| two_towers, .*other \| pairs \| accuracy \| 12.50 \| 1.00 M \| \(1\) \|", own)
    assert "(1) random weights." in own
    text = output(capsys, tmp_path / "other")
    assert text.startswith("**Stages of your own**") and "two_towers" in text
    # One that says nothing of a metric is shown, too.
    record = json.loads((tmp_path / "other/stage.json").read_text())
    del record["objective"]
    (tmp_path / "other/stage.json").write_text(json.dumps(record))
    assert re.search(r"\| two_towers, .*other \| pairs \|  \|  \| 1.00 M", output(capsys, tmp_path / "other"))


def test_each_metric_has_tables_of_its_own(tmp_path, capsys):
    several = {"name": "multi_label", "metric": "macro_F1", "threshold": 0.25}
    write(tmp_path / "m/models/TNEWS/1e-4_32", "finetune", "TNEWS", 0.5, "w")
    write(
        tmp_path / "m/models/news/1e-4_32", "finetune", "news", 0.9, "v", metrics={"macro_F1": 0.75}, objective=several
    )
    text = output(capsys, tmp_path)
    clue, one, other = re.split(r"\*\*Best of the grid\*\*", text)
    assert "news" not in clue and "dev accuracy, %" in one + other and "dev macro F1, %" in one + other
    assert "75.00" in text and "90.00" not in text
    rows = list(csv.DictReader(io.StringIO(output(capsys, tmp_path, "--format", "csv"))))
    found = {row["task"]: (row["accuracy"], row["metric"], row["value"]) for row in rows if row["table"] == "grid"}
    assert found == {"TNEWS": ("50.0", "", ""), "news": ("", "macro_F1", "75.0")}
    # CLUE's published figures are accuracies: a model of one of its tasks for something else does not stand beside them.
    write(
        tmp_path / "m/models/AFQMC/1e-4_32", "finetune", "AFQMC", 0.9, "u", metrics={"macro_F1": 0.7}, objective=several
    )
    assert "| AFQMC |" not in output(capsys, tmp_path).split("**Best of the grid**")[0].split("measured")[1]
