"""The fast tokenizer gives PaddleNLP's ids: hard cases, any text, every code point, and the CLUE files if they are here."""

import os
import random
import sys
import time
import unicodedata


import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from common import UserError, tokenization

LETTERS = [chr(c) for c in range(0x21, 0x7F)]
VOCAB = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *LETTERS,
    *(f"##{c}" for c in LETTERS),
    "高",
    "考",
    "σ",
    "ς",
    "##σ",
    "##ς",
    "ａ",
    "##ａ",
    "！",
    "，",
    "㐀",
    "\U00020000",
    "é",
    "e",
    "unable",
    "##able",
    "un",
    "℃",
    "×",
    "│",
    "｜",
    "ß",
    "ss",
    "😀",
]

HARD = [
    "",
    " ",
    "\t\n\r",
    "a\x00b\x07c",
    "高\u200b考",
    "\ufeff高考",
    "a\u2028b\u2029c\u0085d",
    "ａｂｃ！，｜",
    "高考×20℃│表格│",
    "😀高👨‍👩‍👧考🇨🇳",
    "ΑΣ ΣΑΣ ὈΔΥΣΣΕΎΣ Σ",
    "İstanbul ıI ẞß",
    "é e\u0301 É ñ Å ﬁ",
    "e\u0302\u0323 a\u0323\u0302",
    "한국어 ガギグ か\u3099",
    "unable UNABLE Unable,un-able",
    "x" * 100,
    "x" * 101,
    "a" * 5000,
    "高" * 700,
    "[SEP] [CLS]高[MASK]考 [sep] [ UNK ] [PAD]",
    "[SEP][SEP]",
    "a[UNK]b",
    "x[SEP]e\u0302\u0323y",
    "_小明_说[他]",
    "高[UNK]考 [PAD]x x[PAD]",
    "\u302e\u302f a\u302f\u302e",
    "\U0001d165\U0001d16d",
    "º²µØŋƱ〇\u00ad",
    "ﷺ ㎏ Ⅷ ½",
    "\ud7ff\ue000\uffff",
    "٣٤ १२",
    "高\u00a0考\u3000题",
]


@pytest.fixture(scope="module")
def both():
    return tokenization.FastTokenizer(VOCAB), tokenization.ReferenceTokenizer(VOCAB)


def same(both, texts, pairs=None, length=128):
    fast, reference = (tokenizer.encode(texts, pairs, length) for tokenizer in both)
    different = [
        (texts[i], fast[i][0], reference[i][0])
        for i in range(len(texts))
        if (list(fast[i][0]), list(fast[i][1])) != tuple(map(list, reference[i]))
    ]
    assert not different, different[:3]


def test_hard_cases(both):
    same(both, HARD)
    same(both, HARD, HARD[::-1])
    same(both, HARD, HARD[1:] + HARD[:1], 16)


@settings(max_examples=300)
@given(st.lists(st.text(st.characters(blacklist_categories=("Cs",))), min_size=1, max_size=5), st.integers(8, 64))
def test_any_text(both, texts, length):
    same(both, texts, None, length)
    same(both, texts, texts[::-1], length)


@given(st.text(st.sampled_from(list("aΣσ高 ,\u0301\u0323\u302e[]SEP×｜\u3000\t"))))
def test_dense_mixtures(both, text):
    same(both, [text])


def test_every_code_point(both):
    points = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000 and (c < 0x32000 or c >= 0xE0000)]
    texts = ["".join(f"a{c}B" for c in points[i : i + 60]) for i in range(0, len(points), 60)]
    same(both, texts, None, 400)


def test_lower_case_off():
    pair = tokenization.FastTokenizer(VOCAB, False), tokenization.ReferenceTokenizer(VOCAB, False)
    same(pair, HARD)


def test_vocabulary_without_special_tokens():
    with pytest.raises(UserError, match=r"lacks \[CLS\], \[SEP\]"):
        tokenization.FastTokenizer(["[PAD]", "[UNK]", "a"])


def test_saved_tokenizer_loads_in_paddlenlp(both, tmp_path):
    from paddlenlp.transformers import PPMiniLMTokenizer

    both[0].save(str(tmp_path))
    loaded = tokenization.load_tokenizer(str(tmp_path))
    assert loaded.vocab == VOCAB
    assert (
        PPMiniLMTokenizer.from_pretrained(str(tmp_path))("高考able")["input_ids"] == loaded.encode(["高考able"])[0][0]
    )


def test_a_tokenizer_that_was_saved_in_part_is_refused(both, tmp_path, monkeypatch):
    """Killed while saving: vocab.txt, without which no directory is read, comes last and whole."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        both[0].save(str(tmp_path))
    assert (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8") == '{"do_lower_case": true}'
    with pytest.raises(UserError, match="no such vocabulary"):
        tokenization.load_tokenizer(str(tmp_path))


CLUE = os.environ.get("CLUE_DATA_DIR")  # read here: a fixture hides it from the tests


@pytest.mark.skipif(not CLUE or not os.environ.get("VOCAB_FILE"), reason="CLUE_DATA_DIR and VOCAB_FILE are not set")
@pytest.mark.parametrize("task", data.TASKS)
def test_clue_files(task):
    both = (tokenization.load_tokenizer(None, fast, os.environ["VOCAB_FILE"]) for fast in (True, False))
    both = tuple(both)
    for split, limit in (("train", 8000), ("dev", None)):
        examples = data.read_split(data.get_task(task), split, CLUE, limit).examples
        pairs = None if examples[0].text_pair is None else [e.text_pair for e in examples]
        same(both, [e.text for e in examples], pairs)


def test_decomposition_is_nfd_and_takes_little_time():
    """Of every character, of random runs of marks; and of 130,000 marks, for which Python's own takes 26 s."""
    points = [chr(point) for point in range(0x110000)]
    assert all(tokenization.decomposed(c) == unicodedata.normalize("NFD", c) for c in points)
    rng = random.Random(0)
    pool = [c for c in points if unicodedata.combining(c)] + list("aéñ각가한\u1e69\u0344")
    for _ in range(30_000):
        text = "".join(rng.choices(pool, k=rng.randint(1, 12)))
        assert tokenization.decomposed(text) == unicodedata.normalize("NFD", text), ascii(text)
    tokenizer = tokenization._BasicTokens(lower_case=True)
    started = time.monotonic()
    tokenizer.apply("a" + "\u0301" * 65_000 + "\u0316" * 65_000 + " a\u302e")
    assert time.monotonic() - started < 5
