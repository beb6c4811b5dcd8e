"""Takes in a classifier that was trained elsewhere, so that every later stage takes it: export, prune, quantize, serve.

Reads a directory of Hugging Face (config.json, model.safetensors), of PaddleNLP (config.json, or model_config.json of
2021, with model_state.pdparams), or a static graph (.pdmodel, .pdiparams). Checks every tensor, scores dev, and writes
--output_dir as run_clue.py would have. The directory that was read stays as it is, and nothing in it is run.

    python adopt.py --task_name TNEWS --model_path chinese-roberta-tnews --output_dir adopted/TNEWS
    python export_model.py --task_name TNEWS --model_path adopted/TNEWS
"""

import dataclasses
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import adopted_graph
import data
import numpy as np
from common import UserError, batching, checkpoints, cli, files, foreign, modeling, objectives, predictions, records
from common.runs import Run


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    main = parser.add_argument_group("what to take in")
    cli.add_task_argument(main)
    help = "directory of Hugging Face or PaddleNLP, or a static graph: its directory or file prefix"
    main.add_argument("--model_path", type=cli.PathArgument, required=True, help=help)
    cli.add_output_argument(main, "where it goes, as a fine-tuned model", required=True)
    help = "JSON list of the labels in the order of the logits (default: what the checkpoint says, else CLUE's order)"
    main.add_argument("--labels", type=cli.PathArgument, help=help)
    main.add_argument("--objective", help="as of run_clue.py (default: what the records of the task look like)")
    objectives.add_metric_argument(main)
    help = "vocabulary of a static graph, one token per line (default: vocab.txt beside it)"
    main.add_argument("--vocab_file", type=cli.PathArgument, help=help)
    cli.add_overwrite_argument(main)
    cli.add_device_argument(main)
    cli.add_input_arguments(parser)
    return parser.parse_args(argv)


def adopt(args):
    """Reads, checks, scores and writes."""
    source = args.model_path
    if os.path.isfile(os.path.join(source, records.RECORD)):
        raise UserError(f"--model_path {source}: has a {records.RECORD}, so every stage takes it as it is")
    # What the task asks, and the records on which the model is scored.
    task = data.choose_task(args)
    found = read(args)
    # What the records call their labels may be what the checkpoint calls its classes.
    names = data.label_names(task, data.read_split(task, "dev", args.data_dir))
    task = dataclasses.replace(task, label_names=names)
    # A wrong order of the labels gives a model that is wrong in every answer, so it is asked for where nothing says it.
    labels, order, names = order_of_labels(args, task, found.names)
    if found.outputs != len(labels):
        raise UserError(f"{source}: {found.outputs} outputs, but {task.name} has {len(labels)} labels: {order}")
    task = dataclasses.replace(task, labels=labels)
    dev = data.read_split(task, "dev", args.data_dir, args.max_eval_samples)
    args.max_seq_length = args.max_seq_length or min(128, found.fields["architecture"]["max_position_embeddings"])
    records.check_sequence_length(args.max_seq_length, found.fields["architecture"]["max_position_embeddings"])
    print(
        f"{source}: {found.kind}, {found.fields['model_type']}, {found.params / 1e6:.2f} M parameters; labels: {order}"
    )

    # Another order, configuration or vocabulary makes it another result, also in a file of the same name.
    args.labels, args.source_files = list(labels), hashes_beside_weights(args)
    notes = [f"trained elsewhere: {found.kind}", f"labels: {order}"]
    model = {**found.fields, "width_mult": 1.0, "initialized_from": files.relative(source)}
    if names and names != list(labels):
        model["label_names"] = names
    fields = {"task": task.name, "labels": list(labels), "model": model, "params": found.params, "flops": found.flops}
    run = Run("finetune", args, found.parent, {"dev": dev.describe()}, notes, **fields)
    if run.has_finished(args.output_dir):
        print(f"{args.output_dir}: already finished with these arguments, nothing to do")
        return
    features = batching.convert(dev.examples, found.tokenizer, args.max_seq_length)
    logits = found.predict(features)
    metrics = task.objective.on_dev(logits, batching.targets(features))
    constant, reached = records.constant_answer(run.fields["data"]["dev"])
    if metrics[task.objective.metric] <= reached:
        run.notes.append(f"dev {task.objective.shown} not above the {constant}")
        print(f"warning: dev {task.objective.shown} not above the {constant}{other_order(task, features, logits)}")
    written = {"metrics": {**metrics, "max_seq_length": args.max_seq_length}, "export": found.export}
    written["objective"] = task.objective.with_settings(metrics).describe()
    with run.output(args.output_dir, found.weights, **written) as directory:
        found.write(directory)
        predictions.write(directory, logits, batching.targets(features))
        found.tokenizer.save(directory)
    print(
        f"{task.name}: dev {task.objective.shown} {metrics[task.objective.metric]:.4f} ({constant} {reached:.4f}) -> "
        f"{args.output_dir}"
    )


def hashes_beside_weights(args):
    """{file name: sha256} of what else the model was made of."""
    directory = args.model_path if os.path.isdir(args.model_path) else os.path.dirname(os.path.abspath(args.model_path))
    names = (*records.BESIDE_WEIGHTS, "model_config.json", "tokenizer.json")
    found = files.hash_files(directory, [name for name in names if os.path.isfile(os.path.join(directory, name))])
    if args.vocab_file:
        found["--vocab_file"] = files.file_hash(args.vocab_file)
    return found


class Found:
    """A classifier with weights, from a directory of Hugging Face or PaddleNLP.

    What adopt() asks of it: kind, names (of the classes, or None), outputs, fields (model_type, architecture), params,
    flops, parent, weights (names of the files that write() writes), export (of the record, None if there is no graph).
    """

    export, weights = None, (checkpoints.WEIGHTS,)

    def __init__(self, args):
        source = args.model_path
        if checkpoints.is_model_directory(source):
            self.kind = "PaddleNLP"
            found = checkpoints.read_paddlenlp(source, args.use_faster_tokenizer)
            hashes = files.hash_files(source, self.weights)
        else:
            self.kind = "Hugging Face"
            found = checkpoints.read_hugging_face(source, args.use_faster_tokenizer, "ForSequenceClassification")
            hashes = foreign.hashes(source)
        self.model, self.tokenizer, self.names = found.model, found.tokenizer, found.names
        self.outputs = self.model.config.num_labels
        self.fields = {"model_type": found.model_type, "architecture": modeling.architecture_of(self.model)}
        self.params, self.flops = modeling.count(self.model)
        self.parent = {"path": files.relative(source), "weights": hashes}

    def predict(self, features):
        return modeling.predict(self.model, features, self.tokenizer.pad_id)

    def write(self, directory):
        self.model.save_pretrained(directory)


def read(args):
    """What --model_path is. Raises: UserError if it is nothing that is known, or damaged."""
    source = args.model_path
    if os.path.isdir(source) and checkpoints.has_weights(source):
        return Found(args)
    if adopted_graph.is_graph(source):
        return adopted_graph.FoundGraph(args)
    known = f"{checkpoints.WEIGHTS}, {foreign.SAFETENSORS} or one graph (*.pdmodel and *.pdiparams)"
    raise UserError(f"--model_path {source}: {known} is needed there")


def order_of_labels(args, task, names):
    """(labels in the order of the logits, how that is known, how they are called or None).

    Args: names: of the classes in the order of the logits, as the checkpoint has them, or None.
    Raises: UserError if the order is not known, or the labels are not those of the task.
    """
    known = dict(zip(task.label_names or (), task.labels))  # {how it is called: label}
    if args.labels:
        labels = files.read_json(args.labels)
        if not isinstance(labels, list) or sorted(map(str, labels)) != sorted(task.labels):
            raise UserError(f"--labels {args.labels}: must be a JSON list of {task.name}'s labels, {list(task.labels)}")
        names = names if names and len(names) == len(labels) else None
        return tuple(map(str, labels)), "as --labels says", names
    if names and sorted(names) == sorted(task.labels):
        called = {label: name for name, label in known.items()}
        return tuple(names), "as the checkpoint says", [called[label] for label in names] if called else None
    if names and sorted(names) == sorted(known):
        return tuple(known[name] for name in names), "as the checkpoint says", names
    if names:
        raise UserError(
            f"{args.model_path}: its classes are {names}, {task.name}'s labels are {list(task.labels)}; --labels "
            "labels.json says, as a JSON list, which label each logit stands for"
        )
    if task.name.lower() in data.TASKS:
        return task.labels, "not said by the checkpoint, CLUE's order", task.label_names and list(task.label_names)
    raise UserError(
        f"{args.model_path}: does not say the order of its labels; --labels labels.json, a JSON list such as "
        f"{json.dumps(list(task.labels), ensure_ascii=False)}, says it"
    )


def other_order(task, features, logits):
    """Advice, if another order of the labels would be right more often; "" if not, or for other tasks."""
    if task.objective.name != objectives.Classification.name:
        return ""
    targets, answers = batching.targets(features), logits.argmax(1)
    together = np.zeros((len(task.labels), len(task.labels)), int)  # [logit, label]: how often they come together
    np.add.at(together, (answers, targets), 1)
    best = together.argmax(1)
    if len(set(best.tolist())) < len(best) or together.max(1).sum() <= 1.5 * together.trace():
        return ""
    return f"; the order {[task.labels[i] for i in best]} would be right on {together.max(1).sum() / len(targets):.4f}"


def main(argv=None):
    args = parse_args(argv)
    args.device = cli.set_device(args.device)
    adopt(args)


if __name__ == "__main__":
    cli.run(main)
