"""CLUE files that are not as they should be, and the conversion of every text that is: all seven tasks, by property."""

import pytest
from conftest import load_script, refused, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from common import batching, cli, tokenization


def broken(line):
    """A file with a good line, and this one as its third."""
    return b'{"sentence": "a", "label": "100"}\n\n' + line + b"\n"


LINES = {
    "broken line": b'{"sentence": "a", "label": "100"',
    "two records in a line": b'{"sentence": "a", "label": "100"} {"sentence": "a", "label": "100"}',
    "wrong label": b'{"sentence": "a", "label": "105"}',
    "wrong encoding": '{"sentence": "甲乙", "label": "100"}'.encode("gb18030"),
    "byte order mark in the middle": b"\xef\xbb\xbf" + b'{"sentence": "a", "label": "100"}',
    "empty text": b'{"sentence": " ", "label": "100"}',
    "key that stands twice": b'{"sentence": "a", "label": "100", "label": "101"}',
    "text missing": b'{"label": "100"}',
    "text that is null": b'{"sentence": null, "label": "100"}',
    "record that is a list": b'["a", "100"]',
    "NUL bytes": b"\x00\x00\x00\x00",
    "a pair among sentences": b'{"sentence1": "a", "sentence2": "b", "label": "100"}',
}


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("what", LINES)
def test_broken_lines_stop_the_training(what, split, workspace, tmp_path, capsys, fault):
    (tmp_path / "data").mkdir()
    for name in ("train", "dev"):
        content = broken(LINES[what] if name == split else b'{"sentence": "b", "label": "101"}')
        (tmp_path / "data" / f"{name}.json").write_bytes(content)
    arguments = ["--task_name", "TNEWS", "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"),
                 "--init_config", str(workspace / "tiny.json"), "--vocab_file", str(workspace / "vocab.txt")]  # fmt: skip
    place = f"{split}.json" if what == "a pair among sentences" else f"{split}.json:3"
    refused(capsys, tmp_path / "out", [place], load_script("finetuning", "run_clue").main, arguments)
    fault(f"CLUE file: {what}", "the third line of train.json, and of dev.json", 1, "refused by file and line")


TEXT = (st.text(max_size=40) | st.text("甲乙丙丁，。_[] \u2028\u0301áÀ１ａ", max_size=80)).filter(str.strip)


@st.composite
def winograd(draw):
    """A text with two spans anywhere in it, which may overlap or be equal."""
    text = draw(st.text(min_size=1, max_size=60))
    target = {}
    for number in (1, 2):
        start = draw(st.integers(0, len(text) - 1))
        end = draw(st.integers(start + 1, len(text)))
        target.update({f"span{number}_index": start, f"span{number}_text": text[start:end]})
    return {"text": text, "target": target}


SENTENCE, PAIR = (
    st.fixed_dictionaries({"sentence": TEXT}),
    st.fixed_dictionaries({"sentence1": TEXT, "sentence2": TEXT}),
)
RECORDS = {
    "AFQMC": PAIR, "OCNLI": PAIR, "CMNLI": PAIR, "TNEWS": SENTENCE, "IFLYTEK": SENTENCE, "CLUEWSC2020": winograd(),
    "CSL": st.fixed_dictionaries({"keyword": st.lists(TEXT, min_size=1, max_size=5), "abst": TEXT}),
}  # fmt: skip


def texts_by_hand(task, row):
    """What the model is to read of a record, worked out anew: the marks of a Winograd text one character at a time."""
    if task == "CSL":
        return " ".join(row["keyword"]), row["abst"]
    if task != "CLUEWSC2020":
        return row.get("sentence", row.get("sentence1")), row.get("sentence2")
    spans = [(row["target"][f"span{n}_index"], len(row["target"][f"span{n}_text"])) for n in (1, 2)]
    marked = ""
    for place in range(len(row["text"]) + 1):
        closing = [mark for (start, length), mark in zip(spans, "_]") if start + length == place]
        opening = [mark for (start, length), mark in zip(spans, "_[") if start == place]
        marked += "".join(closing + opening) + row["text"][place : place + 1]
    return marked, None


@pytest.mark.parametrize("task", RECORDS)
def test_any_text_any_span_any_length(task, tmp_path_factory, fault):
    """Written as CLUE has it and read back: PaddleNLP's ids, cut longest first to the length, the label's number."""
    directory, count = tmp_path_factory.mktemp(task), 0
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"甲乙丙丁，。_[]abc", "##a", "##b", "1", "0"]
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab), encoding="utf-8")
    fast, reference = (tokenization.load_tokenizer(str(directory), f) for f in (True, False))
    labels = data.TASKS[task.lower()].labels

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(RECORDS[task], st.sampled_from(labels)), min_size=1, max_size=4), st.integers(4, 64))
    def check(drawn, length):
        nonlocal count
        count += len(drawn)
        rows = [{**row, "label": label} for row, label in drawn]
        write_rows(directory / "dev.json", rows)
        examples = data.read_split(data.TASKS[task.lower()], "dev", str(directory)).examples
        assert [labels[e.label] for e in examples] == [row["label"] for row in rows]
        for row, example in zip(rows, examples):
            text, pair = texts_by_hand(task, row)
            if task == "CLUEWSC2020":  # marks at one place may stand in either order
                assert sorted(example.text) == sorted(text)
            else:
                assert (example.text, example.text_pair) == (text, pair)
        features = batching.convert(examples, fast, length)
        for feature, example in zip(features, examples):
            ids, types = feature.input_ids, feature.token_type_ids
            single = [
                reference.encode([t], None, 10_000)[0][0][1:-1]
                for t in (example.text, example.text_pair)
                if t is not None
            ]
            kept = [len(part) for part in single]
            while sum(kept) > length - 1 - len(kept):  # longest first, one token at a time
                kept[-1 if len(kept) == 2 and kept[1] >= kept[0] else 0] -= 1
            expected = [fast.cls_id] + [i for part, k in zip(single, kept) for i in (*part[:k], fast.sep_id)]
            assert ids == expected and len(ids) <= length and len(types) == len(ids)
            assert types == [0] * (kept[0] + 2) + [1] * (len(ids) - kept[0] - 2)

    check()
    fault(f"{task}: any text, any span, any length", "records that hypothesis draws, written and read back", count,
          "PaddleNLP's ids, cut longest first, the right label")  # fmt: skip


def test_a_loss_that_is_no_number_ends_the_training(workspace, tmp_path, capsys, fault):
    arguments = ["--task_name", "topics", "--data_dir", str(workspace / "data"), "--output_dir", str(tmp_path / "out"),
                 "--init_config", str(workspace / "tiny.json"), "--vocab_file", str(workspace / "vocab.txt"),
                 "--learning_rate", "1e30", "--max_grad_norm", "0", "--max_steps", "10"]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: load_script("finetuning", "run_clue").main(arguments))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "the loss of step" in said and "--learning_rate" in said
    assert not (tmp_path / "out").exists()
    fault(
        "training that diverges",
        "a learning rate of 1e30",
        1,
        "stopped with one line at the first loss that is no number",
    )
