"""Builds a vocabulary from the characters of your own train data, for models that start from random weights.

Reads the train split of a task; writes vocab.txt: the special tokens, every character, and the continuations of letters
and digits that WordPiece needs. For random weights (--init_config) only: a pre-trained model has its own.

    python make_vocab.py --task_name NAME --data_dir DIR --output vocab.txt
"""

import os
import string
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import data
from common import cli, files


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--task_name", type=cli.task_name, required=True, help="CLUE task, or the name of your own task"
    )
    help = "objective of the records, if it is one of your own (default: what they look like)"
    parser.add_argument("--objective", help=help)
    cli.add_data_arguments(parser)
    parser.add_argument("--output", required=True, help="path of the vocab.txt to write")
    return parser.parse_args(argv)


def vocabulary(texts):
    """List of tokens for the texts: special tokens, characters by code point, then continuations such as ##a."""
    characters = {c for text in texts for c in text.lower() if not c.isspace()}
    characters |= set(string.ascii_lowercase + string.digits)
    continued = (f"##{c}" for c in sorted(characters) if c.isascii() and c.isalnum())
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(characters), *continued]


def write(path, texts):
    """Writes vocab.txt. Returns: the number of tokens."""
    tokens = vocabulary(texts)
    files.write_whole(path, "".join(f"{token}\n" for token in tokens))
    return len(tokens)


def main(argv=None):
    args = parse_args(argv)
    task = data.get_task(args.task_name, args.data_dir, args.objective)
    train = data.read_split(task, "train", args.data_dir, args.max_train_samples)
    count = write(args.output, [text for example in train.examples for text in example[:2] if text])
    print(f"{args.output}: {count} tokens")


if __name__ == "__main__":
    cli.run(main)
