"""Generates the demo data: TNEWS, AFQMC and CLUEWSC2020 in CLUE's format, MULTILABEL, whose texts have several labels
or none, an unlabelled corpus, and a vocabulary.

Everything is generated from words.json and a seed; the same seed gives the same bytes. The tasks can be learnt, but not
from single words: a headline also mentions other topics, question pairs share words regardless of the label, and the
referent of a pronoun depends on verb and reason together. A text of MULTILABEL has the topics that it reports on, from
none to three, and not those that it only mentions. Results on this data say nothing about CLUE.

    python generate_data.py --output_dir data
"""

import json
import os
import random
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, ".."), HERE]
import data
import make_vocab
from common import cli, files

with open(os.path.join(HERE, "words.json"), encoding="utf-8") as file:
    WORDS = json.load(file)
# TNEWS: {label: its name in CLUE, things and events of the topic}, and templates of headlines.
TOPICS, FRAMES = WORDS["tnews"]["topics"], WORDS["tnews"]["frames"]
# AFQMC: two questions mean the same if thing and wish are the same, regardless of the wording.
THINGS, WISHES, ASKING = (WORDS["afqmc"][name] for name in ("things", "wishes", "asking"))
# CLUEWSC2020: in "A verb B, because he reason" the reason tells who "he" is. Each case is a verb with B, the reasons
# that refer to B, and those that refer to A.
NAMES, CASES = WORDS["cluewsc2020"]["names"], WORDS["cluewsc2020"]["cases"]
# MULTILABEL: clauses that report on a topic, and clauses that mention one which the text is not about.
REPORTS, ASIDES = WORDS["multilabel"]["reports"], WORDS["multilabel"]["asides"]


def headline(rng, label):
    """A headline of a topic. Most templates also mention things of another topic, some even more than of its own, and
    half of the events belong to the other topic. Only the positions in the sentence reveal the topic."""
    topic = TOPICS[label]
    a, b = rng.sample(topic["things"], 2)
    other = TOPICS[rng.choice([name for name in TOPICS if name != label])]
    (o, p), events = rng.sample(other["things"], 2), rng.choice([topic["events"], other["events"]])
    words = {"a": a, "b": b, "o": o, "p": p}
    frame, words["e"] = rng.choice(FRAMES), rng.choice(events)
    words.update(place=rng.choice(WORDS["places"]), when=rng.choice(WORDS["times"]), who=rng.choice(WORDS["people"]))
    return frame.format(num=rng.choice("三五八"), **words)


def question(rng, thing, wish):
    return rng.choice(ASKING).format(w=rng.choice(WISHES[wish]).format(t=thing))


def tnews(rng, number):
    label = rng.choice(list(TOPICS))
    return {"label": label, "label_desc": TOPICS[label]["name"], "sentence": headline(rng, label), "keywords": ""}


def afqmc(rng, number):
    """Half of the pairs mean the same. Two thirds of the others share thing or wish, so shared words reveal little."""
    thing, wish = rng.choice(THINGS), rng.choice(list(WISHES))
    label, other_thing, other_wish = rng.choice(["0", "1"]), thing, wish
    if label == "0":
        differs = rng.choice(["thing", "wish", "both"])
        if differs != "wish":
            other_thing = rng.choice([t for t in THINGS if t != thing])
        if differs != "thing":
            other_wish = rng.choice([w for w in WISHES if w != wish])
    first, second = question(rng, thing, wish), question(rng, other_thing, other_wish)
    return {"sentence1": first, "sentence2": second, "label": label}


def cluewsc2020(rng, number):
    a, b = rng.sample(NAMES, 2)
    verb, *reasons = rng.choice(CASES)
    meant = rng.randint(0, 1)  # 0: a, 1: b
    when = rng.choice(WORDS["times"])
    text = f"{when}，{a}{verb.format(b=b)}，因为他{rng.choice(reasons[1 - meant])}。"
    name = rng.choice([a, b])
    return {
        "target": {**span(text, "span1", name), **span(text, "span2", "他")},
        "idx": number,
        "label": "true" if name == (a, b)[meant] else "false",
        "text": text,
    }


def multilabel(rng, number):
    """Two to four clauses, each of another topic. Some topics are ten times as frequent as others."""
    topics = list(TOPICS)
    weights = [10 ** (-place / (len(topics) - 1)) for place in range(len(topics))]
    chosen = list(dict.fromkeys(rng.choices(topics, weights, k=rng.choice([2, 3, 4]))))
    reported = chosen[: rng.choice([0, 1, 1, 2, 2, 3])]
    clauses = []
    for label in chosen:
        topic = TOPICS[label]
        a, b = rng.sample(topic["things"], 2)
        words = {"a": a, "b": b, "e": rng.choice(topic["events"]), "place": rng.choice(WORDS["places"])}
        words.update(when=rng.choice(WORDS["times"]), who=rng.choice(WORDS["people"]))
        clauses.append(rng.choice(REPORTS if label in reported else ASIDES).format(**words))
    rng.shuffle(clauses)
    names = [TOPICS[label]["name"].replace("news_", "") for label in topics if label in reported]
    return {"sentence": "，".join(clauses), "labels": names}


def span(text, name, words):
    return {f"{name}_text": words, f"{name}_index": text.index(words)}


def without_label(row, number):
    return {"id": number, **{key: row[key] for key in row if not key.startswith("label") and key != "idx"}}


def corpus(rng, count):
    """Yields unlabelled sentences of all three tasks."""
    for _ in range(count):
        kind = rng.random()
        if kind < 0.6:
            yield headline(rng, rng.choice(list(TOPICS)))
        elif kind < 0.85:
            # The same question in two wordings: predicting masked characters then teaches to compare.
            meaning = rng.choice(THINGS), rng.choice(list(WISHES))
            yield f"{question(rng, *meaning)}，{question(rng, *meaning)}"
        else:
            yield cluewsc2020(rng, 0)["text"]


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="directory for <task>_public/, corpus/, vocab.txt")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the generated records")
    parser.add_argument("--corpus_lines", type=int, default=24000, help="sentences of the corpus", positive=True)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with files.whole_directory(args.output_dir) as directory:
        texts = list(corpus(random.Random(f"{args.seed} corpus"), args.corpus_lines))
        os.mkdir(os.path.join(directory, "corpus"))
        files.write_whole(os.path.join(directory, "corpus", "part-00.txt"), "".join(f"{text}\n" for text in texts))
        tasks = ((tnews, (3000, 600, 200)), (afqmc, (3000, 400, 200)), (cluewsc2020, (1500, 304, 100)))
        for make, sizes in (*tasks, (multilabel, (3000, 600, 200))):
            folder = os.path.join(directory, f"{make.__name__}_public")
            os.mkdir(folder)
            seen = set()  # no text occurs in two splits
            for split, size in zip(("train", "dev", "test"), sizes):
                rng = random.Random(f"{args.seed} {make.__name__} {split}")
                rows, before = [], set(seen)
                while len(rows) < size:
                    row = make(rng, len(rows))
                    content = json.dumps(without_label(row, None), ensure_ascii=False)
                    if content not in before:
                        rows.append(row)
                        seen.add(content)
                texts += [text for row in rows for text in data.texts_of(make.__name__, row) if text]
                if split == "test":
                    rows = [without_label(row, number) for number, row in enumerate(rows)]
                files.write_json_lines(os.path.join(folder, f"{split}.json"), rows)
        tokens = make_vocab.write(os.path.join(directory, "vocab.txt"), texts)
        files.write_whole(os.path.join(directory, data.GENERATED), "Made by demo/generate_data.py; nothing of CLUE.\n")
    shown = "TNEWS, AFQMC, CLUEWSC2020, MULTILABEL"
    print(f"{args.output_dir}: {shown}, {args.corpus_lines} lines of corpus, {tokens} tokens")


if __name__ == "__main__":
    cli.run(main)
