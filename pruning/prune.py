"""Prunes the width of a fine-tuned encoder (DynaBERT) while distilling the fine-tuned model into what remains.

Reads a directory that finetuning/run_clue.py wrote, and the task's data. Ranks heads and FFN neurons by importance,
trains every width of --width_mult_list in one supernet, and keeps each width's best checkpoint: writes
<output_dir>/<width>/best_model/, which still holds the full-size weights, the important heads and neurons first;
export.sh cuts the width out of them. Until then the state of the last evaluation is in <output_dir>.unfinished: rerun
the same command to resume from there.

    python prune.py --task_name CLUEWSC2020 --output_dir pruned_models/CLUEWSC2020 --width_mult_list 0.75 \\
        --model_name_or_path ../finetuning/ppminilm-6l-768h/models/CLUEWSC2020/1e-4_32 \\
        --learning_rate 1e-4 --batch_size 32 --num_train_epochs 50
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import data
import dynabert
from common import checkpoints, cli, modeling, records, training
from common.compat import paddle
from common.runs import ResumableRun


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    main = parser.add_argument_group("task and model")
    help = "directory that run_clue.py wrote: where pruning starts, and the teacher"
    checkpoints.add_classifier_arguments(main, help)
    cli.add_output_argument(main, "the directories of the widths go there", required=True)
    help = "shares of heads and neurons to keep; k widths are trained at once and take about k times as long"
    main.add_argument("--width_mult_list", nargs="+", type=float, default=[0.75], help=help)
    dynabert.add_pruning_arguments(parser.add_argument_group("pruning"))
    training.add_training_arguments(parser)
    cli.add_input_arguments(parser)
    args = parser.parse_args(argv)
    # Sorted, so that "0.5 0.75" and "0.75 0.5" are the same run.
    args.width_mult_list = sorted(set(args.width_mult_list), reverse=True)
    return args


def prune(args):
    """Ranks, trains all widths, and writes the directory of each."""
    # The fine-tuned model is both the teacher, which stays as it is, and the start, which the supernet will use up: it
    # is loaded twice, both in eval mode. --task_name is checked here, and --max_seq_length gets the model's own as
    # default.
    # teacher.record is its stage.json, teacher.parent what the result will say about where it comes from.
    teacher = checkpoints.load_classifier_for(args, args.model_name_or_path, model_type=args.model_type)
    student = checkpoints.load_classifier(args.model_name_or_path).model
    # 12 heads allow the widths k/12, which all leave whole neurons of 3072: 0.75 keeps 9 heads of 64 columns and 2304
    # neurons in each layer. 0.7 would be 8.4 heads and is refused.
    dynabert.check_widths(args.width_mult_list, teacher.record)
    # Labels and objective are those of the fine-tuned model; a multi-label threshold each width chooses anew.
    task = data.task_of(teacher.record)
    splits = data.read_train_and_dev(task, args)
    described = {name: split.describe() for name, split in splits.items()}

    # The same run as in run_clue.py, with one output per width and one working directory for all. What the fine-tuned
    # model notes (random weights, partial data) is true of the pruned one as well.
    # noted_by stands before the notes on this stage's own partial data.
    fields = {"parent": teacher.parent, "data": described, "notes": teacher.record["notes"], "noted_by": "pruning: "}
    fields.update((name, teacher.record[name]) for name in ("task", "labels", "objective"))
    # Widths as text from here on: they are keys of the state, which is kept as JSON.
    targets = {
        f"{width:g}": os.path.join(args.output_dir, f"{width:g}", "best_model") for width in args.width_mult_list
    }
    with ResumableRun("prune", args, list(targets.values()), **fields) as run:
        if not run.finished:
            features = training.convert(args, run, splits, teacher.tokenizer, task)
            supernet = rank_and_make_supernet(args, run, teacher, student, features)
            state = train(args, run, teacher, supernet, features)
            if run.is_first:
                for width, directory in targets.items():
                    save_width(args, run, teacher, width, directory, state)


def rank_and_make_supernet(args, run, teacher, student, features):
    """The student as a supernet: every layer can compute with its first heads and neurons alone."""
    # After a kill, the weights that are going to be restored are in order already. A run that was killed before its
    # first saved state ranks again, with the same result.
    if run.resumes:
        return dynabert.make_supernet(student, args.width_mult_list)
    # A width keeps the FIRST heads and neurons, so the important ones are moved to the front. The published recipe
    # ranks them on dev, which also selects the checkpoint; ranking on train keeps dev unseen. The importance of a head
    # is |dL/dg| of a gate g = 1 on its output; that of a neuron comes from w dL/dw over its weights: both estimate how
    # much the loss L would change without it. Every process ranks the same --importance_samples records, in the same
    # batches, and so gets the same order.
    dynabert.rank_and_reorder(student, features[args.importance_split], teacher, args)
    # PaddleSlim's OFA: set_width switches it to a width; supernet.model is the network that holds the weights.
    supernet = dynabert.make_supernet(student, args.width_mult_list)
    # Moving a neuron moves its column in one matrix and its row in the next, so at full width nothing must change. A
    # wrong permutation would change every logit, so 32 records are enough to see it.
    dynabert.check_reordered(teacher, supernet, features["dev"][:32], args.parity_tolerance)
    return supernet


def train(args, run, teacher, supernet, features):
    """Trains all widths and keeps the best checkpoint of each. Returns: the final state.

    The loop is training.fit, as in run_clue.py, usually with the same learning rate and as many epochs.
    """
    objective, pad_id = teacher.objective, teacher.tokenizer.pad_id
    # Each runs its model, and also returns what the embeddings and every layer put out. The teacher stays in eval mode:
    # its targets have no noise.
    student_recorder, teacher_recorder = dynabert.HiddenStates(supernet), dynabert.HiddenStates(teacher.model)
    # --class_weight: the teacher's answers about records of a rare class weigh more. Hidden states are not weighted.
    weights_of = training.weights_of_batches(args, objective, features["train"])

    def losses_of(batch):
        """The loss of each width. They share their weights, a narrow one is a part of a wide one, so their gradients
        are added up before the optimizer takes one step."""
        inputs = modeling.tensors(batch)
        with paddle.no_grad():
            # Once per batch, for all widths.
            teacher_logits, teacher_hidden = teacher_recorder.run(inputs)
        for width in args.width_mult_list:
            dynabert.set_width(supernet, width)
            logits, hidden = student_recorder.run(inputs)
            # DynaBERT's loss compares with the teacher, not with the labels: 0.1 x the sum of the MSE of the hidden
            # states of embeddings and layers, padding included, + lambda_logit x the loss against the teacher's
            # answers. The hidden size is not pruned, so no projection is needed between the two. To learn from the
            # labels as well, add objective.loss(logits, paddle.to_tensor(batch.labels)).
            soft_loss = objective.soft_loss(logits, teacher_logits, **weights_of(batch))
            yield dynabert.LAMBDA_HIDDEN * dynabert.hidden_loss(hidden, teacher_hidden) + args.lambda_logit * soft_loss

    def evaluate():
        """{width as text: logits of dev}."""
        answers = {}
        for width in args.width_mult_list:
            dynabert.set_width(supernet, width)
            answers[f"{width:g}"] = modeling.predict(supernet, features["dev"], pad_id)
        return answers

    def write(directory):
        """The whole supernet under ordinary names, so that an ordinary model loads it; export.sh cuts the width out."""
        dynabert.save_supernet(supernet, teacher.model.config, directory)

    # What cutting alone costs is measured before the first step: the difference to the fine-tuned model is what
    # distillation has to win back.
    options = {"objective": objective, "write": write, "evaluate_first": True}
    return training.fit(args, run, supernet.model, features, pad_id, losses_of, evaluate, **options)


def save_width(args, run, teacher, width, directory, state):
    """Writes the result of one width. Args: width: as text, such as "0.75"."""
    record, objective, best = teacher.record, teacher.objective, state["best"][width]
    metrics = {name: figure for name, figure in best.items() if name != "directory"}
    metrics.update(selected_on="dev", max_seq_length=args.max_seq_length)
    metrics[f"{objective.metric}_before_training"] = state["evaluations"][0][width][objective.metric]
    metrics[f"{objective.metric}_of_parent"] = records.score(record)
    model = {**record["model"], "width_mult": float(width), "initialized_from": teacher.parent["path"]}
    # The weights in the directory are those of the whole supernet, from which this width is cut out. params and flops
    # are those of the narrow model: at width 0.75 of 6 layers x 768, 49.1 M of 59.7 M parameters and 4.08 G of 5.44 G
    # multiply-adds.
    params, flops = dynabert.count_width(record, float(width))
    holds = f"weights of full width; metrics, params and flops are those of width {width}, which export.sh cuts out"
    fields = {"metrics": metrics, "model": model, "params": params, "flops": flops, "holds": holds}
    fields["objective"] = objective.with_settings(best).describe()
    checkpoint, evaluations = best["directory"], state["evaluations"]
    with run.output(directory, checkpoint=checkpoint, evaluations=evaluations, **fields) as target:
        teacher.tokenizer.save(target)
    print(
        f"{record['task']}: width {width} dev {objective.shown} {best[objective.metric]:.4f} at "
        f"step {best['step']} (fine-tuned {records.score(record):.4f}) -> {directory}, weights of full width"
    )


def main(argv=None):
    args = parse_args(argv)
    training.start(args)
    prune(args)


if __name__ == "__main__":
    cli.run(main)
