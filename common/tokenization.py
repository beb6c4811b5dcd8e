"""BERT tokenization for Chinese: PaddleNLP's tokenizer as the reference, and a fast tokenizer with the same ids.

load_tokenizer(directory).encode(["股市收盘上涨"])
-> [([101, 5500, 2356, 3119, 4669, 677, 3885, 102], [0, 0, 0, 0, 0, 0, 0, 0])]     # [CLS] 股 市 收 盘 上 涨 [SEP]
"""

import hashlib
import json
import os
import re
import tempfile
import unicodedata

from common import UserError, files

SPECIAL_TOKENS = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")


def decomposed(text):
    """unicodedata.normalize("NFD", text), in time that does not grow with the square of a run of combining marks.

    Python's takes 26 s for 130,000 marks in one word (CPython issue 149079). Decomposing a character does not depend on
    its neighbours; afterwards each run of marks is sorted by combining class, stable (Unicode Standard, D109).
    """
    characters, marks = [], []
    for char in "".join(unicodedata.normalize("NFD", char) for char in text):
        if unicodedata.combining(char):
            marks.append(char)
            continue
        characters += [*sorted(marks, key=unicodedata.combining), char]
        marks = []
    return "".join([*characters, *sorted(marks, key=unicodedata.combining)])


class _BasicTokens(dict):
    """A table for str.translate that applies BERT's basic tokenizer to each character.

    It drops control characters, replaces white space by a space, lower-cases, strips accents, and puts spaces around
    CJK characters, punctuation and symbols. The rules are those of PaddleNLP 2.8.1, which also splits at symbols; those
    of Hugging Face do so only at the symbols of ASCII.

    Args: split_symbols: whether text is split at all symbols.
    """

    cjk = re.compile(
        "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
    )
    special = re.compile(f"({'|'.join(map(re.escape, SPECIAL_TOKENS))})")
    # PaddleNLP treats these as symbols, too.
    extra_symbols = "\u00ad\u00b2\u00ba\u3007\u00b5\u00d8\u014b\u01b1"

    def __init__(self, lower_case, split_symbols=True):
        super().__init__()
        self.lower_case = lower_case
        self.isolated_categories = "PS" if split_symbols else "P"
        self.isolated_symbols = self.extra_symbols if split_symbols else ""
        self.contextual = set()  # characters that NFD may reorder with their neighbours

    def isolated(self, char):
        ascii_punctuation = char.isascii() and char.isprintable() and not char.isalnum() and char != " "
        return (
            ascii_punctuation
            or unicodedata.category(char)[0] in self.isolated_categories
            or (char in self.isolated_symbols)
        )

    def cleaned(self, char):
        if (unicodedata.category(char)[0] == "C" and char not in "\t\n\r") or char == "\ufffd":
            return ""
        return " " if char.isspace() else char

    def __missing__(self, code_point):
        char = chr(code_point)
        result = self.cleaned(char)
        if result == char and char != " ":
            result = self.normalize(char)
            if any(unicodedata.combining(c) for c in result):
                self.contextual.add(char)
            result = self.split(result)
            if self.cjk.match(char):
                result = f" {result} "
        self[code_point] = result
        return result

    def normalize(self, text):
        if not self.lower_case:
            return text
        lower = "".join(c.lower() for c in text)  # per character: str.lower of a word can give a final sigma
        return "".join(c for c in decomposed(lower) if unicodedata.category(c) != "Mn")

    def split(self, text):
        return "".join(f" {c} " if self.isolated(c) else c for c in text)

    def words(self, text):
        """The text without control characters, cut at white space and around CJK characters."""
        return "".join(f" {c} " if self.cjk.match(c) else c for c in map(self.cleaned, text)).split()

    def classes(self):
        """The rules as classes of characters, each a regular expression: dropped, white space, marks, isolated."""
        dropped, spaces, marks, isolated = [], [], [], []
        for code_point in (*range(0xD800), *range(0xE000, 0x110000)):  # all but surrogates
            char = chr(code_point)
            cleaned = self.cleaned(char)
            if cleaned != char:
                (spaces if cleaned else dropped).append(code_point)
            elif unicodedata.category(char) == "Mn":
                marks.append(code_point)
            elif self.isolated(char) or self.cjk.match(char):
                isolated.append(code_point)
        return tuple(character_class(points) for points in (dropped, spaces, marks, isolated))

    def apply(self, text):
        if "[" in text and self.special.search(text):  # special tokens keep their meaning inside a text
            return " ".join(part if i % 2 else self.apply(part) for i, part in enumerate(self.special.split(text)))
        result = text.translate(self)
        if self.contextual.isdisjoint(text):
            return result
        return " ".join(self.split(self.normalize(word)) for word in self.words(text))


def character_class(code_points):
    """A regular expression of the ``tokenizers`` library for one of these characters. Args: code_points: ascending."""
    ranges = []
    for point in code_points:
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return "[" + "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in ranges) + "]"


class _Tokenizer:
    """Base class of both tokenizers.

    Args: vocab: list of tokens; the index of a token is its id. split_symbols: False for models of Hugging Face.
    """

    def __init__(self, vocab, lower_case=True, split_symbols=True):
        self.vocab, self.lower_case, self.split_symbols = vocab, lower_case, split_symbols
        ids = {token: i for i, token in enumerate(vocab)}
        missing = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if t not in ids]
        if missing:
            raise UserError(f"the vocabulary lacks {', '.join(missing)}: it is not that of a Chinese BERT")
        self.pad_id, self.cls_id, self.sep_id = ids["[PAD]"], ids["[CLS]"], ids["[SEP]"]
        self.unk_id = ids["[UNK]"]

    def fingerprint(self):
        """md5 of the vocabulary and the settings: what decides which ids a text gets."""
        return hashlib.md5(repr([self.vocab, self.lower_case, self.split_symbols]).encode()).hexdigest()

    def save(self, directory):
        """Writes ``vocab.txt`` and ``tokenizer_config.json``, which PaddleNLP's tokenizers load as well."""
        settings = {"do_lower_case": self.lower_case, **({} if self.split_symbols else {"split_symbols": False})}
        with open(os.path.join(directory, "tokenizer_config.json"), "w", encoding="utf-8") as file:
            json.dump(settings, file)
        # Last, and whole: no directory is read without it, so none that was left by kill -9 lacks the file above.
        files.write_whole(os.path.join(directory, "vocab.txt"), "".join(f"{token}\n" for token in self.vocab))


class FastTokenizer(_Tokenizer):
    """BERT tokenization with Hugging Face ``tokenizers`` (Rust) doing the WordPiece part; same ids as PaddleNLP's."""

    def __init__(self, vocab, lower_case=True, split_symbols=True):
        from tokenizers import Tokenizer, models, pre_tokenizers

        super().__init__(vocab, lower_case, split_symbols)
        model = models.WordPiece(
            {token: i for i, token in enumerate(vocab)}, unk_token="[UNK]", max_input_chars_per_word=100
        )
        self.wordpiece = Tokenizer(model)
        self.wordpiece.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.basic = _BasicTokens(lower_case, split_symbols)

    def standalone(self, max_seq_length):
        """The whole tokenization as a ``tokenizers.Tokenizer``, which is saved as one tokenizer.json for programs that
        have nothing of this repository. It gives the same ids (tests/test_onnx.py), except that where both texts of a
        pair are cut it may cut one token differently.
        """
        from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

        dropped, spaces, marks, isolated = map(Regex, self.basic.classes())
        standalone = Tokenizer(self.wordpiece.model)
        steps = [normalizers.Replace(dropped, ""), normalizers.Replace(spaces, " ")]
        if self.lower_case:
            steps += [normalizers.Lowercase(), normalizers.NFD(), normalizers.Replace(marks, "")]
        standalone.normalizer = normalizers.Sequence(steps)
        standalone.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(isolated, "isolated")]
        )
        special = [("[CLS]", self.cls_id), ("[SEP]", self.sep_id)]
        standalone.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special
        )
        standalone.decoder = decoders.WordPiece()
        standalone.add_special_tokens([token for token in SPECIAL_TOKENS if token in self.vocab])
        standalone.enable_truncation(max_seq_length)
        standalone.enable_padding(pad_id=self.pad_id)
        return standalone

    def encode(self, texts, pairs=None, max_seq_length=128):
        """[CLS] text [SEP], or [CLS] text [SEP] pair [SEP], truncated to ``max_seq_length``, the longer text first.

        Args: texts: list of str. pairs: list of str of the same length, or None.
        Returns: list of (input_ids, token_type_ids), both lists of int.
        """
        words = [self.basic.apply(text) for text in (*texts, *(pairs or ()))]
        ids = [e.ids for e in self.wordpiece.encode_batch_fast(words, add_special_tokens=False)]
        encoded = []
        for i in range(len(texts)):
            first, second = ids[i], ids[len(texts) + i] if pairs else None
            if second is None:
                first = [self.cls_id, *first[: max_seq_length - 2], self.sep_id]
                encoded.append((first, [0] * len(first)))
                continue
            kept, kept_pair = len(first), len(second)
            while kept + kept_pair > max_seq_length - 3:
                if kept > kept_pair:
                    kept -= 1
                else:
                    kept_pair -= 1
            first = [self.cls_id, *first[:kept], self.sep_id]
            second = [*second[:kept_pair], self.sep_id]
            encoded.append((first + second, [0] * len(first) + [1] * len(second)))
        return encoded


class ReferenceTokenizer(_Tokenizer):
    """PaddleNLP's PPMiniLMTokenizer behind the same interface: pure Python, the reference for the ids."""

    def __init__(self, vocab, lower_case=True, split_symbols=True):
        from paddlenlp.transformers import PPMiniLMTokenizer

        super().__init__(vocab, lower_case, split_symbols)
        if not split_symbols:
            raise UserError(
                "PaddleNLP's tokenizer splits at all symbols, this model's does not: leave out "
                "--use_faster_tokenizer False"
            )
        with tempfile.TemporaryDirectory() as directory:
            self.save(directory)
            self.tokenizer = PPMiniLMTokenizer.from_pretrained(directory)

    def encode(self, texts, pairs=None, max_seq_length=128):
        """Like FastTokenizer.encode."""
        encoded = []
        for text, pair in zip(texts, pairs or [None] * len(texts)):
            row = self.tokenizer(text, text_pair=pair, max_length=max_seq_length, truncation="longest_first")
            encoded.append((row["input_ids"], row["token_type_ids"]))
        return encoded


def tokenizer_class(use_faster_tokenizer=True):
    return FastTokenizer if use_faster_tokenizer else ReferenceTokenizer


def load_tokenizer(directory, use_faster_tokenizer=True, vocab_file=None, lower_case=True):
    """The tokenizer of a model directory, or of ``vocab_file`` and ``lower_case``.

    Raises: UserError if the vocabulary is missing or is not that of a Chinese BERT.
    """
    split_symbols = True
    if vocab_file is None:
        vocab_file = os.path.join(directory, "vocab.txt")
        config = os.path.join(directory, "tokenizer_config.json")
        if os.path.isfile(config):
            settings = files.read_json_object(config)
            lower_case, split_symbols = settings.get("do_lower_case", True), settings.get("split_symbols", True)
    if not os.path.isfile(vocab_file):
        raise UserError(f"{vocab_file}: no such vocabulary; every stage writes its tokenizer files beside the model")
    try:
        with open(vocab_file, encoding="utf-8") as file:
            vocab = [line.rstrip("\n") for line in file]
        return tokenizer_class(use_faster_tokenizer)(vocab, lower_case, split_symbols)
    except (UnicodeDecodeError, UserError) as error:
        raise UserError(f"{vocab_file}: {error}") from error
