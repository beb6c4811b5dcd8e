"""Reading and converting the seven tasks and one's own; batches; errors that name file and line."""

import csv
import json

import pytest
from conftest import load_script, write_rows
from hypothesis import given
from hypothesis import strategies as st

import data
from common import UserError, batching, checkpoints, tokenization, training

PLAIN = st.text(st.characters(blacklist_categories=("Cs",)), max_size=40)


@pytest.fixture(scope="module")
def tokenizer(workspace):
    return tokenization.load_tokenizer(None, True, str(workspace / "vocab.txt"))


def test_labels_are_paddlenlps():
    from paddlenlp.datasets.clue import Clue

    assert {name: list(task.labels) for name, task in data.TASKS.items()} == {
        name: config["labels"] for name, config in Clue.BUILDER_CONFIGS.items()
    }
    assert data.TASKS["ocnli"].train_files[0] == Clue.BUILDER_CONFIGS["ocnli"]["splits"]["train"][0].split("/")[-1]


@pytest.mark.parametrize("layout", ["tnews_public", "tnews", "."])
def test_layouts_and_minus_labels(tmp_path, layout):
    directory = tmp_path / layout
    directory.mkdir(exist_ok=True)
    rows = [{"sentence": "甲", "label": "101"}, {"sentence": "乙", "label": "-"}, {"sentence": "丙", "label": "100"}]
    write_rows(directory / "dev.json", rows)
    split = data.read_split(data.get_task("TNews"), "dev", str(tmp_path))
    assert split.examples == [batching.Example("甲", None, 1, 1), batching.Example("丙", None, 0, 3)]
    assert split.describe()["majority_class"] == 0.5


def test_official_train_file_comes_first(tmp_path):
    for name, label in (("train.json", "neutral"), ("train.50k.json", "entailment"), ("dev.json", "neutral")):
        write_rows(tmp_path / name, [{"sentence1": "甲", "sentence2": "乙", "label": label}])
    split = data.read_split(data.get_task("ocnli"), "train", str(tmp_path))
    assert split.examples[0].label == 0 and split.describe()["file"].endswith("/train.50k.json")
    assert split.partial == "1 of 50437 official train records"


def test_download_goes_through_paddlenlp(tmp_path, monkeypatch):
    """With no directory named, PaddleNLP's load_dataset fetches and checks the file, and our reader reads it."""
    import hashlib

    import paddlenlp.datasets.clue as clue
    import paddlenlp.utils.env as env

    archive = tmp_path / "Clue" / "afqmc_public"
    archive.mkdir(parents=True)
    write_rows(archive / "dev.json", [{"sentence1": "甲", "sentence2": "乙", "label": "1"}])
    md5 = hashlib.md5((archive / "dev.json").read_bytes()).hexdigest()
    monkeypatch.setitem(clue.Clue.BUILDER_CONFIGS["afqmc"]["splits"], "dev", ["afqmc_public/dev.json", md5])
    monkeypatch.setattr(clue, "DATA_HOME", str(tmp_path))
    monkeypatch.setattr(env, "DATA_HOME", str(tmp_path))
    assert data.read_split(data.get_task("afqmc"), "dev").examples == [batching.Example("甲", "乙", 1, 1)]


def test_own_task_takes_labels_from_file_or_train(tmp_path):
    write_rows(tmp_path / "train.json", [{"sentence": "甲", "label": x} for x in (3, 1, 1)])
    write_rows(tmp_path / "dev.json", [{"sentence": "甲", "label": 1}])
    assert data.get_task("mine", str(tmp_path)).labels == ("1", "3")
    for label in ("1 ", "1"):  # a class of its own by mistake
        write_rows(tmp_path / "train.json", [{"sentence": "甲", "label": x} for x in (3, 1, label)])
        with pytest.raises(UserError, match=rf"train.json:3: label '{label}' has blanks around it, or is of two types"):
            data.get_task("mine", str(tmp_path))
    (tmp_path / "labels.json").write_text('{"label": "3"}\n{"label": "1"}\n')
    assert data.get_task("mine", str(tmp_path)).labels == ("3", "1")
    (tmp_path / "labels.json").write_text('["1", "3", "2"]')
    assert data.read_split(data.get_task("mine", str(tmp_path)), "dev", str(tmp_path)).examples[0].label == 0


def test_csl_keywords_come_first():
    assert data.texts_of("CSL", {"keyword": ["甲", "乙丙"], "abst": "丁"}) == ("甲 乙丙", "丁")


@pytest.mark.parametrize(
    "first, second, marked",
    [
        ((0, "小明"), (3, "他"), "_小明_说[他]饿"),
        ((3, "他"), (0, "小明"), "[小明]说_他_饿"),
        ((0, "小明"), (2, "说"), "_小明_[说]他饿"),
        ((2, "说他饿"), (3, "他"), "小明_说[他]饿_"),
    ],
)
def test_spans_are_marked_from_the_right(first, second, marked):
    target = {"span1_index": first[0], "span1_text": first[1], "span2_index": second[0], "span2_text": second[1]}
    assert data.mark_spans("小明说他饿", target) == marked


@given(st.text(min_size=2, max_size=60), st.data())
def test_marked_spans_hold_their_text(text, draw):
    """For any two spans: without the marks the text is the old one, and each pair of marks holds its span."""
    clean = "".join(c for c in text if c not in "_[]")
    if len(clean) < 2:
        return
    spans = []
    for _ in range(2):
        start = draw.draw(st.integers(0, len(clean) - 1))
        spans.append((start, clean[start : draw.draw(st.integers(start + 1, len(clean)))]))
    target = {f"span{i}_{k}": v for i, span in enumerate(spans, 1) for k, v in zip(("index", "text"), span)}
    marked = data.mark_spans(clean, target)
    assert marked.translate({ord(c): None for c in "_[]"}) == clean
    bracket = marked[marked.index("[") + 1 : marked.index("]")].replace("_", "")
    underline = marked.split("_")[1].translate({ord(c): None for c in "[]"})
    assert (underline, bracket) == (spans[0][1], spans[1][1])


BROKEN = {
    "not JSON": (b'{"sentence": "a", "label": "100"', "not a JSON object"),
    "not an object": (b'["a"]', "a JSON object is needed"),
    "not UTF-8": (json.dumps({"sentence": "甲", "label": "100"}, ensure_ascii=False).encode("gbk"), "not UTF-8"),
    "byte order mark in the middle": (b"\xef\xbb\xbf" + b'{"sentence": "a", "label": "100"}', "not a JSON object"),
    "GBK": ('{"sentence": "甲"}'.encode("gbk"), r"iconv -f GB18030 -t UTF-8 .*dev\.json > NEW"),
    "NUL bytes": (b"{\x00}", "NUL bytes; if the file is UTF-16, iconv"),
    "key twice": (b'{"sentence": "a", "label": "100", "sentence": "b"}', "the key 'sentence' stands twice"),
    "empty text": (b'{"sentence": "  ", "label": "100"}', "a text is empty"),
    "wrong label": (b'{"sentence": "a", "label": "105"}', "label '105'"),
    "no label": (b'{"sentence": "a"}', "no label"),
    "no text": (b'{"sentenc": "a", "label": "100"}', "no sentence, and no sentence1 and sentence2"),
    "text is a number": (b'{"sentence": 7, "label": "100"}', "not a string"),
}


@pytest.mark.parametrize("line, message", BROKEN.values(), ids=BROKEN)
def test_broken_records_are_named_by_file_and_line(tmp_path, line, message):
    (tmp_path / "dev.json").write_bytes(b'{"sentence": "\xe2\x80\xa8a", "label": "100"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"dev\.json:3: .*{message}"):
        data.read_split(data.get_task("tnews"), "dev", str(tmp_path))


ROWS = [
    {"sentence": '他说"好", 走了', "label": "甲"},
    {"sentence": "a\tb", "label": "乙"},
    {"sentence": "两\n行", "label": "甲"},
    {"sentence": "股市收盘", "label": "乙"},
]


def write_table(path, rows, dialect, header=("text", "label"), encoding="utf-8"):
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, dialect)
        writer.writerow(header)
        writer.writerows([list(row.values()) for row in rows])


def test_what_windows_editors_make_is_read(tmp_path):
    """A byte order mark and CRLF: the same records, and a note of it in what stage.json says about the split."""
    for split in ("train", "dev"):
        write_rows(tmp_path / f"{split}.json", ROWS)
    task = data.get_task("own", str(tmp_path))
    plain = data.read_split(task, "dev", str(tmp_path))
    assert "form" not in plain.describe()
    for start, end, form in ((b"\xef\xbb\xbf", b"\n", "a byte order mark"), (b"", b"\r\n", "CRLF line ends"),
                             (b"\xef\xbb\xbf", b"\r\n", "a byte order mark, CRLF line ends")):  # fmt: skip
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
        (tmp_path / "dev.json").write_bytes(start + end.join(lines) + end)
        (tmp_path / "labels.json").write_bytes(start + b'["\xe4\xb9\x99", "\xe7\x94\xb2"]' + end)
        found = data.read_split(data.get_task("own", str(tmp_path)), "dev", str(tmp_path))
        assert found.examples == plain.examples and found.describe()["form"] == form


@pytest.mark.parametrize("ending, dialect", [(".csv", "excel"), (".tsv", "excel-tab")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tables_hold_the_records_of_json_lines(tmp_path, ending, dialect, encoding):
    """Commas, tabs, quotes and a line end within a text included; the csv module writes CRLF."""
    (tmp_path / "json").mkdir()
    (tmp_path / "table").mkdir()
    for split in ("train", "dev"):
        write_rows(tmp_path / "json" / f"{split}.json", ROWS)
        write_table(tmp_path / "table" / f"{split}{ending}", ROWS, dialect, encoding=encoding)
    read = {}
    for place in ("json", "table"):
        task = data.get_task("own", str(tmp_path / place))
        read[place] = task.labels, data.read_split(task, "train", str(tmp_path / place)).examples
    texts = {place: [(e.text, e.label) for e in examples] for place, (_, examples) in read.items()}
    assert read["json"][0] == read["table"][0] and texts["json"] == texts["table"] and len(texts["json"]) == 4
    assert [e.line for e in read["table"][1]] == [2, 3, 4, 6], "where a record of two lines begins"


def test_tables_of_pairs_and_without_labels(tmp_path):
    pairs = [{"sentence1": "甲", "sentence2": "乙", "label": "1"}, {"sentence1": "丙", "sentence2": "丁", "label": "0"}]
    for split in ("train", "dev"):
        write_table(tmp_path / f"{split}.csv", pairs, "excel", ("sentence1", "sentence2", "label"))
    write_table(tmp_path / "test.csv", [{"id": "7", "sentence1": "甲", "sentence2": "乙"}], "excel",
                ("id", "sentence1", "sentence2"))  # fmt: skip
    (tmp_path / "labels.txt").write_text("1\n0\n")
    task = data.get_task("own", str(tmp_path))
    assert task.labels == ("1", "0")
    assert [e[:3] for e in data.read_split(task, "dev", str(tmp_path)).examples] == [("甲", "乙", 0), ("丙", "丁", 1)]
    assert data.read_split(task, "test", str(tmp_path)).record_ids() == ["7"]
    (tmp_path / "labels.json").write_text('["1", "0"]')
    with pytest.raises(UserError, match=r"labels\.json and labels\.txt"):
        data.get_task("own", str(tmp_path))
    write_rows(tmp_path / "train.json", pairs)
    with pytest.raises(UserError, match=r"train\.json and train\.csv; only one"):
        data.split_path("own", "train", str(tmp_path))


@pytest.mark.parametrize(
    "content, message",
    [
        ("text,label\na,1\nb\n", r"dev\.csv:3: 1 fields, the header has 2: text, label"),
        ("a,1\nb,0\n", r"dev\.csv:1: header \['a', '1'\]; text,label or"),
        ("text,sentence\na,b\n", r"dev\.csv:1: header"),
        ('text,label\n"a,1\n', r"dev\.csv:2: not a table"),
        ("text,label\n\n,1\n", r"dev\.csv:3: a text is empty"),
        ("", r"dev\.csv:1: header"),
    ],
)
def test_tables_that_are_refused(tmp_path, content, message):
    (tmp_path / "dev.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        data.read_split(data.Task("own", ("1", "0")), "dev", str(tmp_path))


def test_names_of_labels(tmp_path):
    """From labels.json or the records, as CLUE's TNEWS and IFLYTEK have them; none if two records disagree."""
    rows = [
        {"sentence": "a", "label": "100", "label_desc": "故事"},
        {"sentence": "b", "label": "101", "label_desc": "文化"},
    ]
    for split in ("train", "dev"):
        write_rows(tmp_path / f"{split}.json", rows)
    task = data.get_task("own", str(tmp_path))
    assert data.label_names(task, data.read_split(task, "train", str(tmp_path))) == ["故事", "文化"]
    write_rows(tmp_path / "train.json", [*rows, {"sentence": "c", "label": "101", "label_desc": "体育"}])
    assert data.label_names(task, data.read_split(task, "train", str(tmp_path))) is None
    write_rows(
        tmp_path / "labels.json", [{"label": "101", "label_desc": "文化"}, {"label": "100", "label_desc": "故事"}]
    )
    task = data.get_task("own", str(tmp_path))
    assert task.labels == ("101", "100") and task.label_names == ("文化", "故事")


def test_span_that_is_not_where_its_index_says(tmp_path):
    target = {"span1_index": 1, "span1_text": "小明", "span2_index": 3, "span2_text": "他"}
    write_rows(tmp_path / "dev.json", [{"text": "小明说他饿", "target": target, "label": "true"}])
    with pytest.raises(UserError, match=r"dev\.json:1: span1_text '小明' is not at index 1, where the text has '明说'"):
        data.read_split(data.get_task("cluewsc2020"), "dev", str(tmp_path))


@pytest.mark.parametrize(
    "name, directory, message",
    [("nosuch", None, "nosuch: not one of AFQMC"), ("tnews", "/nonexistent", "no dev.json for TNEWS")],
)
def test_unknown_task_and_directory(name, directory, message):
    with pytest.raises(UserError, match=message):
        data.read_split(data.get_task(name, directory), "dev", directory)


def test_sample_limit_is_fixed_and_recorded(workspace):
    task = data.get_task("topics", str(workspace / "data"))
    first, again = (data.read_split(task, "dev", str(workspace / "data"), 7) for _ in range(2))
    assert first.examples == again.examples and len(first.examples) == 7
    assert first.partial == "7 of 300 dev records (--max_eval_samples)"


@given(st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=4), st.integers(5, 40))
def test_pairs_are_cut_longest_first(tokenizer, pairs, length):
    """Against a computation of its own: whichever text is longer loses its last token, the second at a tie."""
    whole = tokenizer.encode([a for a, _ in pairs], [b for _, b in pairs], 10_000)
    cut = tokenizer.encode([a for a, _ in pairs], [b for _, b in pairs], length)
    for (ids, types), (cut_ids, cut_types) in zip(whole, cut):
        first, second = ids[1 : types.index(1) - 1], ids[types.index(1) : -1]
        while len(first) + len(second) > length - 3:
            (first if len(first) > len(second) else second).pop()
        assert cut_ids == [2, *first, 3, *second, 3]
        assert cut_types == [0] * (len(first) + 2) + [1] * (len(second) + 1)


def test_padding_is_per_batch():
    features = [batching.Feature([2] * n, [1] * n, n % 2) for n in (5, 2, 9, 1)]
    found = list(batching.batches(features, 2, pad_id=7, order=[1, 3, 0, 2]))
    assert [batch.input_ids.shape for batch in found] == [(2, 2), (2, 9)]
    assert found[0].input_ids.tolist() == [[2, 2], [2, 7]] and found[0].token_type_ids.tolist() == [[1, 1], [1, 0]]
    assert found[1].labels.tolist() == [1, 1] and found[1].index.tolist() == [0, 2]
    assert batching.by_length(features).tolist() == [3, 1, 0, 2]


def test_a_vocabulary_of_ones_own_texts(workspace, tmp_path):
    """It knows every character of train, in lower case, words of letters in pieces; another one is found unfit."""
    vocab = str(tmp_path / "vocab.txt")
    arguments = ["--task_name", "topics", "--data_dir", str(workspace / "data")]
    load_script("demo", "make_vocab").main([*arguments, "--output", vocab])
    task = data.get_task("topics", str(workspace / "data"))
    examples = data.read_split(task, "train", str(workspace / "data")).examples
    own = tokenization.load_tokenizer(None, True, vocab)
    assert training.unknown_share(batching.convert(examples, own, 64), own.unk_id) == 0
    (ids, _), (mixed, _) = own.encode(["iPhone 16", "IPHONE 16"])
    assert own.unk_id not in ids and ids == mixed
    (tmp_path / "other.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n一\n")
    other = tokenization.load_tokenizer(None, True, str(tmp_path / "other.txt"))
    features = batching.convert(examples, other, 64)
    counted = sum(token == other.unk_id for f in features for token in f.input_ids) / sum(
        len(f.input_ids) for f in features
    )
    assert training.unknown_share(features, other.unk_id) == counted > 0.5


def test_hfls_models_go_without_their_prefix():
    """The names that launchers and READMEs give are PaddleNLP's, or become so."""
    from common import modeling

    names = {"roberta": ["roberta-wwm-ext-large"], "ppminilm": ["ppminilm-6l-768h"], "bert": ["bert-base-chinese"]}
    for model_type, asked in names.items():
        cls = modeling.model_class(model_type)
        assert all(checkpoints.builtin_name(cls, name) in cls.pretrained_init_configuration for name in asked)
    assert checkpoints.builtin_name(modeling.model_class("roberta"), "no-such") is None
