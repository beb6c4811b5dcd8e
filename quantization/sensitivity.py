"""Which products lose accuracy in INT8 (--analyze), and the few that have to stay in floating point (--max_drop).

Both ask the same question again and again: how good is a variant with these of its products in floating point? The
variant is calibrated once. Its graph is rewritten for each question (products.py) and scored in the engine that will
serve it, so an answer takes as long as a scoring. Answers are kept in a file: after a kill, the same command goes on.
"""

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import time

import calibration
import numpy as np
import products
from common import checkpoints, engine, files, plots
from tqdm import tqdm

ROUNDS = 5  # of a comparison of speeds; each graph runs once in each


def add_arguments(parser):
    group = parser.add_argument_group("accuracy under control")
    help = "score each product, layer and kind of product of the best variant, alone in INT8 and alone in floating "
    help += "point: table, JSON and picture in <output_dir>_sensitivity"
    group.add_flag("--analyze", help, without_effect=True)
    help = "number of records for that, and for the order in which --max_drop takes products; chosen by --seed among "
    help += "those of --select_on"
    group.add_argument("--analyze_records", type=int, default=1000, help=help, positive=True, without_effect=True)
    help = "write the best variant once more, with a few products in floating point, so that its accuracy (or other "
    help += "metric) is within this of FP32's, such as 0.002, and its agreement at least --min_agreement; to "
    help += "<output_dir>/<variant>_max_drop_<limit>"
    group.add_argument("--max_drop", type=share, help=help, without_effect=True)
    help = "which records choose the best variant and the products of --max_drop; with train, dev only checks "
    help += "--min_agreement, but the model has learnt the records that choose"
    group.add_argument("--select_on", choices=("dev", "train"), default="dev", help=help, without_effect=True)


def share(text):
    """argparse type: a number from 0 to below 1."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of 1, such as 0.002 for 0.2 points")
    return float(text)


class Subject:
    """A quantized variant whose products are asked about.

    Args: fp32: checkpoints.Graph that was quantized. quantized: file prefix of the variant. algorithm, count: what made
        it. directory: where answers are kept.
    """

    def __init__(self, args, fp32, quantized, algorithm, count, directory):
        self.args, self.fp32, self.quantized, self.directory = args, fp32.prefix, quantized, directory
        self.name, self.variant = f"{algorithm}{count}", {"algorithm": algorithm, "calib_samples": count}
        self.objective = fp32.objective
        # Of a graph that was adopted, the number of layers is not known.
        layers = fp32.record["model"]["architecture"].get("num_hidden_layers")
        self.products = products.products_of(quantized, layers)
        self.originals = products.original_weights(fp32.prefix, self.products)

    def write(self, floating, directory):
        """Writes the variant, with the products of these numbers in floating point. Returns: its file prefix."""
        prefix = os.path.join(directory, os.path.splitext(self.args.save_model_filename)[0])
        chosen = [self.products[number].weight for number in floating]
        products.return_to_float(self.quantized, prefix, {name: self.originals[name] for name in chosen})
        return prefix

    def names(self, floating):
        return [self.products[number].name for number in floating]

    @contextlib.contextmanager
    def written(self, floating):
        """As write, for the time of a block: yields the prefix."""
        with files.empty_directory(os.path.join(self.directory, ".graph")) as scratch:
            yield self.write(floating, scratch)

    def costs(self, features):
        """Multiply-adds per text of each product, as a list. Args: features: whose mean length counts."""
        tokens = statistics.mean(len(feature.input_ids) for feature in features)
        return [product.multiply_adds(tokens) for product in self.products]

    def speed_left(self, floating, reference):
        """Speeds with the products of these numbers in floating point, as ratios; the graphs take turns.

        Args: reference: calibration.Reference; its texts are timed, sorted by length and already tokenized.
        Returns: {"of_int8": the variant's is 1, "of_fp32": FP32's is 1, "rounds": ROUNDS}, medians over the rounds;
            None for a simulation, whose speed says nothing.
        """
        precision = calibration.precision_of(self.args)
        if precision == engine.SIMULATED:
            return None
        with self.written(floating) as prefix:
            kinds = ((prefix, precision), (self.quantized, precision), (self.fp32, "fp32"))
            engines = [
                engine.open_engine(path, reference.features, self.args.device, kind, streams=None)
                for path, kind in kinds
            ]
            seconds = np.zeros((ROUNDS + 1, len(engines)))
            for row in seconds:
                for place, each in enumerate(engines):
                    started = time.perf_counter()
                    each.predict(reference.features, pad_id=reference.pad_id)
                    row[place] = time.perf_counter() - started
        # Not the first round: in it oneDNN prepares every shape.
        of_int8, of_fp32 = np.median(seconds[1:, 1:] / seconds[1:, :1], 0)
        return {"of_int8": round(float(of_int8), 4), "of_fp32": round(float(of_fp32), 4), "rounds": ROUNDS}


@contextlib.contextmanager
def subject(args, fp32, best, is_kept, calibrate):
    """The best variant as a Subject. One that agreed too rarely to be kept is made again for the time of the block.

    Args: fp32: checkpoints.Graph. best: (algorithm, count). is_kept: whether it lies in the output directory.
        calibrate: function (algorithm, count, directory) that writes a variant and gives its file prefix.
    """
    if not args.analyze and args.max_drop is None:
        yield None
        return
    algorithm, count = best
    directory = os.path.join(f"{os.path.normpath(args.output_dir)}_sensitivity", f"{algorithm}{count}")
    os.makedirs(directory, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if is_kept:
            prefix = checkpoints.open_graph(os.path.join(args.output_dir, f"{algorithm}{count}")).prefix
        else:
            scratch = stack.enter_context(files.empty_directory(os.path.join(directory, ".variant")))
            prefix = calibrate(algorithm, count, scratch)
        yield Subject(args, fp32, prefix, algorithm, count, directory)


def hash_of(reference):
    """sha256 of what a calibration.Reference is made of, so that kept answers are of the same records and lengths."""
    digest = hashlib.sha256(np.ascontiguousarray(reference.logits).tobytes())
    for feature in reference.features:
        digest.update(json.dumps([feature.input_ids, feature.token_type_ids]).encode())
    return digest.hexdigest()


class Scores:
    """How good a variant is with some of its products in floating point.

    Args: reference: calibration.Reference, the records. name: of the JSON file that keeps the answers.
    """

    def __init__(self, subject, reference, name):
        self.subject, self.reference = subject, reference
        self.path = os.path.join(subject.directory, f"{name}.json")
        about = {
            "variant": subject.name,
            "int8": files.file_hash(f"{subject.quantized}.pdiparams"),
            "fp32": files.file_hash(f"{subject.fp32}.pdiparams"),
            "select_on": subject.args.select_on,
            "records": len(reference.features),
            "features": hash_of(reference),
            "device": subject.args.device,
            "precision": calibration.precision_of(subject.args),
            "code": files.file_hash(products.__file__),
            "metric": subject.objective.metric,
            "fp32_score": reference.score(subject.objective, reference.logits),
            "products": [product._asdict() for product in subject.products],
        }
        self.about, self.answers = json.loads(json.dumps(about)), {}  # as it is read again: lists for tuples
        if os.path.isfile(self.path):
            kept = files.read_json_object(self.path)
            if {key: kept.get(key) for key in self.about} == self.about:
                self.answers = {tuple(answer["floating"]): answer for answer in kept.get("answers", ())}

    def of(self, floating):
        """{metric, loss, agreement, logit_error, ...} with the products of these numbers in floating point.

        ``logit_error`` is the root mean square of the logits' differences from FP32's. The errors of products add up in
        its square, and it sees what is too small to change an answer.
        """
        floating = tuple(sorted(floating))
        if floating not in self.answers:
            with self.subject.written(floating) as prefix:
                logits = self.reference.predict(self.subject.args, prefix)
            score = self.reference.score(self.subject.objective, logits)
            self.answers[floating] = {"floating": list(floating), **score}
            files.write_json(self.path, {**self.about, "answers": list(self.answers.values())})
        return self.answers[floating]


def analyze(scores):
    """Asks for each group of products how much is lost when it alone is in INT8, and gained when it alone is not.

    Returns: [{"name", "products", "share", "alone_int8", "alone_float"}]; the last two are {figure: its change}.
    """
    found, everything = scores.subject.products, range(len(scores.subject.products))
    groups = products.groups_of(found)
    graphs = 2 * len(groups) + 2
    print(f"analyzing {scores.subject.name}: {graphs} graphs, {len(scores.answers)} of them scored before", flush=True)
    costs = scores.subject.costs(scores.reference.features)
    none, all_ = scores.of(()), scores.of(everything)
    rows = []
    for name, numbers in tqdm(groups.items(), "analyzing", mininterval=1, disable=None):
        others = set(everything) - set(numbers)
        rows.append(
            {
                "name": name,
                "products": numbers,
                "share": sum(costs[number] for number in numbers) / sum(costs),
                "alone_int8": change(all_, scores.of(others), scores.subject.objective.metric),
                "alone_float": change(none, scores.of(numbers), scores.subject.objective.metric),
            }
        )
    return rows


def change(before, after, metric):
    """What a step from one answer of Scores to another changes; positive is better, but for the squared error."""
    changed = {name: after[name] - before[name] for name in (metric, "agreement")}
    if "loss" in before:
        changed["log_likelihood"] = before["loss"] - after["loss"]
    changed["squared_error"] = after["logit_error"] ** 2 - before["logit_error"] ** 2
    return changed


def table(rows, scores):
    """The Markdown lines of an analysis. Args: rows: of analyze."""
    metric, none = scores.subject.objective.metric, scores.of(())
    all_ = scores.of(range(len(scores.subject.products)))
    shown = scores.subject.objective.shown
    lines = [
        f"**{scores.subject.name}: what INT8 loses, product by product** ({scores.about['records']} records of "
        f"{scores.about['select_on']})",
        "",
        f"| in INT8 | {shown}, % | agreement with FP32, % | logit error |",
        "| --- | --- | --- | --- |",
    ]
    few = "word embeddings alone" if scores.subject.args.int8_embeddings else "no product"
    for name, score in (("nothing (FP32)", None), (few, all_), ("everything", none)):
        score = score or {metric: scores.about["fp32_score"][metric], "agreement": 1.0, "logit_error": 0.0}
        figures = f"{score[metric] * 100:.2f} | {score['agreement'] * 100:.2f} | {score['logit_error']:.4f}"
        lines.append(f"| {name} | {figures} |")
    head = "agreement, points", f"{shown}, points", "log-likelihood, nats", "share of the squared error, %"
    alone = " | ".join([*(f"INT8 alone: {name}" for name in head), *(f"float alone: {name}" for name in head)])
    lines += ["", f"| products | multiply-adds, % | {alone} |", "| --- " * 10 + "|"]
    whole = none["logit_error"] ** 2 - all_["logit_error"] ** 2
    for row in rows:
        cells = [row["name"], f"{row['share'] * 100:.1f}"]
        for side in ("alone_int8", "alone_float"):
            found = row[side]
            cells += [f"{found[name] * 100:+.2f}" for name in ("agreement", metric)]
            cells.append(f"{found['log_likelihood']:+.5f}" if "log_likelihood" in found else "")
            cells.append(f"{found['squared_error'] / whole * 100:+.1f}" if whole > 0 else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(path, rows, scores):
    """A map of the products, layers by parts: how much of the squared logit error each one makes in INT8.

    Left it alone is in INT8, right it alone is not. Figures are points of agreement with FP32, lost and won back.
    """
    pyplot = plots.import_pyplot()
    found = [row for row in rows if len(row["products"]) == 1]
    place = {row["name"]: scores.subject.products[row["products"][0]] for row in found}
    parts = list(dict.fromkeys(product.part for product in place.values()))
    layers = list(dict.fromkeys(product.layer for product in place.values()))
    figure, axes = pyplot.subplots(
        1, 2, figsize=(2 * max(6, len(layers) + 2.5), 0.45 * len(parts) + 2), sharey=True, layout="constrained"
    )
    titles = (
        "one product in INT8, the others in floating point: what it loses",
        "one product in floating point, the others in INT8: what it wins back",
    )
    for axis, side, sign, title in zip(axes, ("alone_int8", "alone_float"), (1, -1), titles):
        error = np.full((len(parts), len(layers)), np.nan)
        for row in found:
            product = place[row["name"]]
            position = parts.index(product.part), layers.index(product.layer)
            error[position] = max(0.0, sign * row[side]["squared_error"])
            text = f"{row[side]['agreement'] * 100:+.1f}"
            axis.text(position[1], position[0], text, ha="center", va="center", fontsize=9)
        # Square roots, so that what is small beside the worst product can still be told apart.
        picture = axis.imshow(np.sqrt(error), cmap="OrRd", vmin=0, aspect="auto", alpha=0.8)
        figure.colorbar(picture, ax=axis, label="logit error (RMS)")
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(layers)), ["after them" if n is None else f"layer {n}" for n in layers])
    axes[0].set_yticks(range(len(parts)), parts)
    about = f"{scores.subject.name}, {scores.about['records']} records of {scores.about['select_on']}"
    figure.suptitle(f"{about}; color: logit error, figures: points of agreement with FP32", fontsize=11)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def sample_of(subject, selection, count=None):
    """Scores on ``count`` (default: --analyze_records) records of a calibration.Reference, chosen by --seed."""
    count = min(count or subject.args.analyze_records, len(selection.features))
    chosen = np.sort(np.random.default_rng(subject.args.seed).permutation(len(selection.features))[:count])
    features = [selection.features[number] for number in chosen]
    return Scores(subject, selection._replace(features=features, logits=selection.logits[chosen]), f"answers_{count}")


def report(subject, selection):
    """--analyze: prints the table; writes it, the figures and the picture to the subject's directory."""
    scores = sample_of(subject, selection)
    rows = analyze(scores)
    lines = table(rows, scores)
    print("\n".join(["", *lines, ""]))
    files.write_whole(os.path.join(subject.directory, "sensitivity.md"), "\n".join(lines) + "\n")
    files.write_json(os.path.join(subject.directory, "sensitivity.json"), {**scores.about, "rows": rows})
    draw(os.path.join(subject.directory, "sensitivity.png"), rows, scores)
    products_alone = [row for row in rows if len(row["products"]) == 1]
    worst = sorted(products_alone, key=lambda row: row["alone_float"]["squared_error"])[:3]
    print(f"most is lost in {', '.join(row['name'] for row in worst)}; table and picture -> {subject.directory}")


def products_to_return(subject, selection):
    """The products that have to be in floating point for --max_drop and --min_agreement to hold.

    Products are taken in the order of their gain per cost: what each takes off the squared logit error when it alone is
    in floating point, per multiply-add. When enough are taken, each of them is tried in INT8 once more. That is greedy:
    another choice may do with fewer.

    Args: selection: calibration.Reference on which the limit has to hold.
    Returns: numbers of products, none if the limit holds without; None if it cannot be held. Either is printed.
    """
    args, whole = subject.args, sample_of(subject, selection, len(selection.features))
    # Of few records the sample is all of them: one and the same Scores, which asks nothing twice.
    sample = whole if args.analyze_records >= len(selection.features) else sample_of(subject, selection)
    metric, shown, fp32 = subject.objective.metric, subject.objective.shown, whole.about["fp32_score"]
    everything = range(len(subject.products))

    def holds(floating, step):
        found = whole.of(floating)
        change_of_metric = found[metric] - fp32[metric]
        # 0.002 is no binary fraction; the metrics have six digits.
        within = {
            shown: -change_of_metric <= args.max_drop + 1e-9,
            "agreement": found["agreement"] >= args.min_agreement,
        }
        too_low = " and ".join(name for name, holds in within.items() if not holds)
        print(
            f"{len(floating)} of {len(everything)} products in floating point ({step}): {shown} {found[metric]:.4f} "
            f"({change_of_metric:+.4f}), agreement {found['agreement']:.4f}{f'; {too_low} too low' if too_low else ''}",
            flush=True,
        )
        return not too_low

    limits = f"--max_drop {args.max_drop:g} and --min_agreement {args.min_agreement:g}"
    print(f"\n{subject.name}, {limits} on {len(selection.features)} records of {args.select_on}:")
    if holds((), "as it is"):
        print("both hold as it is, with every product in INT8")
        return []
    costs, gains = subject.costs(selection.features), []
    for number in tqdm(everything, "gain of each product", mininterval=1, disable=None):
        gains.append(-change(sample.of(()), sample.of((number,)), metric)["squared_error"])
    order = sorted(everything, key=lambda number: gains[number] / costs[number], reverse=True)
    for count in range(1, len(order)):  # with all of them it would be no INT8 model
        if holds(order[:count], f"+ {subject.products[order[count - 1]].name}"):
            break
    else:
        holds(everything, "all")
        hint = "; --int8_embeddings False may help" if args.int8_embeddings else ""
        print(f"{limits} cannot be held by leaving products in floating point: deploy FP32 or BF16{hint}")
        return None
    taken = order[:count]
    for number in reversed(order[: count - 1]):
        fewer = [other for other in taken if other != number]
        if holds(fewer, f"without {subject.products[number].name}"):
            taken = fewer
    return sorted(taken)
