"""Bulk classification: infer.py --input_file of any length, in and out in several forms, whole, in parts, again."""

import csv
import gzip
import io
import json
import os
import random
import subprocess
import sys

import pytest
from conftest import FAULTS, ROOT, load_script, refused, warm_python

import bulk
import data
import infer
from common import UserError, files, sources

bulk_load = load_script("deploy/benchmark", "bulk_load")
WINDOW = 64  # lines of a window at --batch_size 1


@pytest.fixture(scope="module")
def sentences(workspace):
    return [row["sentence"] for _, row in files.read_json_lines(workspace / "data/topics/dev.json")]


@pytest.fixture(scope="module")
def titles(sentences, tmp_path_factory):
    """300 lines of text: four windows and a part of one."""
    path = tmp_path_factory.mktemp("titles") / "titles.txt"
    path.write_text("".join(f"{text}\n" for text in sentences), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def classify(tuned):
    """Runs infer.py on a file, in this process."""

    def run(path, *options, model=tuned):
        options = ["--device", "cpu", "--batch_size", "1", "--threads", "1", *options]
        infer.main(list(map(str, ["--model_path", model, "--input_file", path, *options])))

    return run


@pytest.fixture(scope="module")
def whole(titles, classify, tmp_path_factory):
    """The answers to titles, as a file."""
    path = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    classify(titles, "--output", path)
    return path


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_answers_in_order_on_both_ways_out(sentences, titles, whole, classify, tuned, capsys):
    """As --text answers them, whatever the window; nothing is left of a run but its record."""
    capsys.readouterr()
    infer.main(["--model_path", str(tuned), "--device", "cpu", "--text", *sentences])
    expected = rows_of(capsys.readouterr().out)
    classify(titles)
    said = capsys.readouterr()
    assert said.out == whole.read_text(encoding="utf-8") and "300 answers, 0 of them errors; 300 in" in said.err
    for answer, other in zip(rows_of(said.out), expected, strict=True):
        assert answer.keys() == other.keys() and answer["probabilities"] == pytest.approx(
            other["probabilities"], abs=2e-6
        )
        assert (answer["text"], answer["label"]) == (other["text"], other["label"])
    assert sorted(path.name for path in whole.parent.iterdir()) == ["answers.jsonl", "answers.jsonl.run.json"]


def test_each_line_has_its_answer(sentences, classify, tmp_path, capsys):
    """JSON lines: other fields come back, and what cannot be classified has an error in its place."""
    good = [json.dumps({"id": i, "text": text, "label": "gold", "more": [1]}) for i, text in enumerate(sentences[:70])]
    bad = [
        (b'{"text": "\xff"}', "not UTF-8 (invalid start byte at byte 10 of the line)"),
        (b"", "the line is empty"),
        (b"[1]", "a JSON object is needed, not list"),
        (b'{"text": "\xe4\xb8\x80"', "not a JSON object"),
        (b'{"text": "a", "text": "b"}', "'text' stands twice"),
        (b'{"id": 7}', "no sentence"),
        (b'{"id": 7, "text": " "}', "a text is empty"),
        (b'{"id": 7, "text": 5}', "a text is not a string"),
        (b'{"id": 7, "text": "a", "text_pair": "b"}', "topics takes single texts"),
        (b'{"text": "a\0"}', "holds NUL bytes"),
        (b"[" * 100_000, "nested too deeply"),
    ]
    lines = [line.encode() for line in good]
    for place, (line, _) in enumerate(bad):
        lines.insert(6 * place, line)
    lines.append(b'{"id": 70, "text": "\\ud800\\u4e00", "error": "mine"}')
    source = tmp_path / "rows.jsonl"
    source.write_bytes(files.BOM + b"\r\n".join(lines))
    classify(source, "--output", tmp_path / "answers.jsonl")
    assert f"{source}:1: not UTF-8" in capsys.readouterr().err
    answers = rows_of((tmp_path / "answers.jsonl").read_bytes().decode("utf-8"))
    assert len(answers) == len(lines)
    for place, (_, error) in enumerate(bad):
        answer = answers.pop(5 * place)
        assert error in answer["error"] and "label" not in answer and answer.get("id", 7) == 7
    assert [answer["id"] for answer in answers] == list(range(71))
    assert [answer["text"] for answer in answers] == [*sentences[:70], "\ud800一"]
    assert "error" not in answers[-1]
    assert all(answer["label"] != "gold" and answer["more"] == [1] for answer in answers[:-1])


def test_tables_and_pairs(pair_model, classify, tmp_path, capsys):
    """A table, its answers as one, and these as input again; pairs with a tab, and in JSON."""
    pairs = [("查账单", "账单在哪"), ('他说"好",\n走了', "他\t走了"), ("一", "丁")] * 30
    table = io.StringIO()
    csv.writer(table).writerows([("id", "sentence1", "sentence2"), *((i, a, b) for i, (a, b) in enumerate(pairs))])
    (tmp_path / "pairs.csv").write_text(table.getvalue() + "\n1,2\n", encoding="utf-8", newline="")
    classify(tmp_path / "pairs.csv", "--output", tmp_path / "answers.tsv", model=pair_model)
    with open(tmp_path / "answers.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, dialect="excel-tab"))
    assert [(row["text"], row["text_pair"], row["id"]) for row in rows[:90]] == [
        (a, b, str(i)) for i, (a, b) in enumerate(pairs)
    ]
    assert list(rows[0]) == ["id", "text", "label", "probability", "text_pair", "error"]
    assert [row["error"] for row in rows[89:]] == ["", "the line is empty", "2 fields, the header has 3"]
    (tmp_path / "pairs.txt").write_text("".join(f"{a}\t{b}\n" for a, b in pairs if "\t" not in b), encoding="utf-8")
    (tmp_path / "pairs.json").write_text("".join(f"{json.dumps({'text': a, 'text_pair': b})}\n" for a, b in pairs))
    for name in ("answers.tsv", "pairs.json", "pairs.txt"):
        capsys.readouterr()
        classify(tmp_path / name, "--fields", "label", model=pair_model)
        answers = [row for row in rows_of(capsys.readouterr().out) if "error" not in row]
        kept = [row for row in rows[:90] if name != "pairs.txt" or "\t" not in row["text_pair"]]
        assert answers == [{"label": row["label"]} for row in kept if "\n" not in row["text"] or name != "pairs.txt"]


def test_gzip_in_and_out(titles, whole, classify, tmp_path):
    packed = tmp_path / "titles.txt.gz"
    half = len(titles.read_bytes()) // 2
    packed.write_bytes(gzip.compress(titles.read_bytes()[:half]) + gzip.compress(titles.read_bytes()[half:]))
    classify(packed, "--output", tmp_path / "answers.json.gz")
    assert gzip.decompress((tmp_path / "answers.json.gz").read_bytes()) == whole.read_bytes()
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(UserError, match="damaged gzip data behind line"):
        classify(packed, "--output", tmp_path / "others.jsonl")
    assert not (tmp_path / "others.jsonl").exists()


def test_standard_input_and_a_closed_pipe(titles, whole, classify, tuned, tmp_path, monkeypatch, capsys):
    for path in (titles, tmp_path / "titles.gz"):
        if path != titles:
            path.write_bytes(gzip.compress(titles.read_bytes()))
        with open(path) as file:
            monkeypatch.setattr(sys, "stdin", file)
            capsys.readouterr()
            classify("-")
            assert capsys.readouterr().out == whole.read_text(encoding="utf-8")
    script = os.path.join(ROOT, "deploy/python/infer.py")
    command = f'cat "$0" | "$1" {script} --batch_size 1 --model_path "$2" --input_file - | head -n 1; echo "${{PIPESTATUS[@]}}"'
    done = subprocess.run(["bash", "-c", command, titles, warm_python(), tuned], capture_output=True, text=True)
    line, status = done.stdout.splitlines()
    assert line == whole.read_text(encoding="utf-8").splitlines()[0] and status.split()[1:] == ["141", "0"]
    assert "Traceback" not in done.stderr and "error" not in done.stderr.replace("0 of them errors", "")


@pytest.mark.parametrize("ending, count", [("jsonl", 3), ("tsv.gz", 7)])
def test_parts_joined_are_the_whole(ending, count, titles, classify, tmp_path):
    """Three parts, and more parts than windows; some of the file compressed."""
    source = titles
    if ending == "tsv.gz":
        source = tmp_path / "titles.gz"
        source.write_bytes(gzip.compress(titles.read_bytes()))
    classify(source, "--output", tmp_path / f"whole.{ending}")
    joined = b""
    for number in range(1, count + 1):
        path = tmp_path / f"part{number}.{ending}"
        classify(source, "--output", path, "--part", f"{number}/{count}")
        joined += path.read_bytes()
    assert joined == (tmp_path / f"whole.{ending}").read_bytes()


def test_an_output_is_of_one_run(titles, whole, classify, tmp_path, capsys):
    """The same command finds it finished; others are refused, also while it is being written; --overwrite replaces."""
    output, before = tmp_path / "answers.jsonl", whole.read_bytes()
    classify(titles, "--output", output)
    changed = output.stat().st_mtime_ns
    classify(titles, "--output", output, "--threads", "2")
    assert "finished already, 300 answers" in capsys.readouterr().err and output.stat().st_mtime_ns == changed

    def refuse(message, *options, source=titles):
        with pytest.raises(UserError, match=message):
            classify(source, "--output", output, *options)
        assert output.read_bytes() == before

    refuse("fields None -> label", "--fields", "label")
    other = tmp_path / "other.txt"
    other.write_text("一\n", encoding="utf-8")
    refuse("input 20397 bytes .* -> 4 bytes", source=other)
    with files.Lock(str(output)):
        refuse("another run is writing there", "--overwrite")
    classify(other, "--output", output, "--fields", "label", "--overwrite")
    before = output.read_bytes()
    assert rows_of(before.decode()) == [{"label": rows_of(before.decode())[0]["label"]}]
    output.write_bytes(before + b"x")
    before += b"x"
    refuse("which were changed", "--fields", "label", source=other)
    os.remove(f"{output}.run.json")
    refuse("nothing says how they were made", "--fields", "label", source=other)


def test_strict_ends_before_anything_is_written(titles, classify, tmp_path, capsys, monkeypatch):
    source, out = tmp_path / "titles.txt", tmp_path / "out.jsonl"
    source.write_bytes(titles.read_bytes() + "股市".encode("gbk") + b"\n")
    words = ["titles.txt:301: not UTF-8", "iconv -f GB18030"]
    refused(capsys, out, words, classify, source, "--output", out, "--strict")
    with open(source) as file:
        monkeypatch.setattr(sys, "stdin", file)
        with pytest.raises(UserError, match="-:301: not UTF-8"):
            classify("-", "--strict")
    assert len(capsys.readouterr().out.splitlines()) == 4 * WINDOW
    source.write_bytes("股市".encode("utf-16"))
    refused(capsys, out, ["holds NUL bytes", "iconv -f UTF-16"], classify, source, "--output", out)


@pytest.mark.parametrize("options, message", [
    ("--fields label,nothing", "--fields nothing: the answers have no such field, but text, label, probability"),
    ("--part 0/3", "'0/3' is not a part such as 3/8"),
    ("--part 4/3", "'4/3' is not a part"),
    ("--output {tmp}/answers.csv", "answers.csv: must end with .json, .jsonl, .tsv, or with .gz"),
    ("--output {tmp}/none/answers.tsv", "no such directory"),
    ("--output /dev/fd/1.json/x.tsv", "no such directory"),
    ("--input_file - --part 1/2", "standard input cannot be divided"),
    ("--input_format csv", "header ['"),
    ("--text 一 --strict", "--strict goes with --input_file"),
    ("--model_path a b --output {tmp}/x.tsv", "take one --model_path"),
    ("--model_path a b --input_file -", "take one --model_path"),
])  # fmt: skip
def test_wrong_options(options, message, titles, classify, tmp_path, capsys):
    out = tmp_path / "out"
    refused(capsys, out, [message], classify, titles, *options.format(tmp=tmp_path).split())
    assert not list(tmp_path.iterdir())


def test_progress_tells_rate_and_time_left(titles, classify, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bulk, "PROGRESS_SECONDS", (0, 0))
    classify(titles, "--output", tmp_path / "answers.jsonl", "--part", "2/2")
    lines = [line for line in capsys.readouterr().err.splitlines() if " left" in line]
    assert len(lines) == 3 and "per second" in lines[0] and "100.0 % of the input, 0:00:00 left" in lines[-1]


def windows_of(source, size, **options):
    return [([row.example and row.example.text for row in w.rows], w.end) for w in source.windows(size, **options)]


def test_reading_goes_on_at_any_window(tmp_path, monkeypatch):
    """Of each form, plain and compressed, with lines that are too long: the same windows as from the beginning."""
    monkeypatch.setattr(sources, "LONGEST_LINE", 200)
    monkeypatch.setattr(sources, "WINDOW_BYTES", 1000)
    rng = random.Random(1)
    texts = ["长" * rng.choice((1, 5, 30, 90)) for _ in range(100)]
    table = io.StringIO()
    csv.writer(table).writerows([("text", "id"), *((text.replace("长长", "长\n"), 7) for text in texts)])
    contents = {
        "a.txt": "\n".join(texts),
        "a.json": "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts),
    }
    for name, content in {**contents, "a.csv": table.getvalue()}.items():
        for ending, pack in (("", bytes), (".gz", gzip.compress)):
            path = tmp_path / (name + ending)
            path.write_bytes(pack(content.encode()))

            def opened(path=str(path)):
                return sources.Source(path, "topics", data.own_texts_of)

            with opened() as source:
                expected = windows_of(source, 10)
            found = [text for rows, _ in expected for text in rows]
            assert [text or None for text in found] == [
                (t.replace("长长", "长\n") if name == "a.csv" else t)
                if len((json.dumps({"text": t}, ensure_ascii=False) if name == "a.json" else t).encode()) < 200
                or name == "a.csv"
                else None
                for t in texts
            ]
            assert name == "a.csv" or len(expected) > 10  # some end early, as their lines are long
            for done, (_, end) in enumerate(expected, 1):
                with opened() as source:
                    source.seek(end)
                    assert windows_of(source, 10) == expected[done:]
            for count in (1, 4):
                parts = []
                for number in range(1, count + 1):
                    with opened() as source:
                        begin, end = source.part(number, count, 10)
                        source.seek(begin)
                        parts += windows_of(source, 10, end=end)
                assert parts == expected


def test_texts_of_ones_own():
    """The task's own records first, then text and text_pair; CLUEWSC2020 with its spans marked already."""
    assert data.own_texts_of("TNEWS", {"sentence": "a", "text": "b"}) == ("a", None)
    assert data.own_texts_of("AFQMC", {"text": "a", "text_pair": "b"}) == ("a", "b")
    assert data.own_texts_of("CLUEWSC2020", {"text": "_a_[b]"}) == ("_a_[b]", None)
    target = {"span1_index": 1, "span1_text": "a", "span2_index": 1, "span2_text": "b"}
    with pytest.raises(ValueError, match="is not at index 1"):
        data.own_texts_of("CLUEWSC2020", {"text": "ab", "target": target})
    with pytest.raises(TypeError, match="not a string"):
        data.own_texts_of("TNEWS", {"text": ["a"]})


@pytest.mark.skipif(FAULTS != "long", reason="two minutes: FAULTS=long")
def test_memory_does_not_grow_with_the_file(sentences, tuned, tmp_path):
    """Ten times the lines, at most 5 % more; peak of the process, from the kernel."""
    peaks, rng = [], random.Random(0)
    for count in (20_000, 200_000):
        path = tmp_path / f"{count}.txt"
        path.write_text("".join(f"{rng.choice(sentences)}\n" for _ in range(count)), encoding="utf-8")
        script = os.path.join(ROOT, "deploy/python/infer.py")
        command = [sys.executable, script, "--model_path", tuned, "--input_file", path, "--output", f"{path}.jsonl"]
        process = subprocess.Popen(list(map(str, command)))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        assert status == 0
        peaks.append(usage.ru_maxrss)
    assert peaks[1] < 1.05 * peaks[0], peaks


def test_load_test_makes_titles_and_refuses_pairs(sentences, pair_model, tmp_path, capsys):
    texts = list(bulk_load.rotated_texts(["股市 收盘", "\t决赛\n"], 200, 0))
    assert len(texts) == 200 and len(set(texts)) > 5 and all(text == " ".join(text.split()) for text in texts)
    assert texts == list(bulk_load.rotated_texts(["股市 收盘", "\t决赛\n"], 200, 0))
    run = {"memory": [[1.0, 500.0], [2.0, 510.0]]}
    bulk_load.draw(str(tmp_path / "bulk.png"), {"10 texts": run, "a tenth of them": run})
    assert (tmp_path / "bulk.png").read_bytes().startswith(b"\x89PNG")
    options = ["--model", str(pair_model), "--work_dir", str(tmp_path / "out")]
    refused(capsys, tmp_path / "out", ["takes sentence pairs"], bulk_load.main, options)


@pytest.mark.skipif(FAULTS != "long", reason="a minute of processes: FAULTS=long")
def test_load_test(tuned, workspace, tmp_path):
    options = "--texts 3000 --speed_texts 1000 --rounds 1 --kills 2 --parts 2".split()
    options += ["--model", str(tuned), "--data_dir", str(workspace / "data"), "--work_dir", str(tmp_path / "work")]
    bulk_load.main([*options, "--output_dir", str(tmp_path)])
    figures = json.loads((tmp_path / "bulk.json").read_text())
    assert figures["kills"] == 2 and figures["memory_ratio"] < 1.2 and (tmp_path / "bulk.png").is_file()
