"""Fine-tunes an encoder on a CLUE task, or on one of your own, and keeps the checkpoint that is best on dev.

Reads a model (built-in name, directory, or --init_config) and the task's train and dev data. Writes the best model, its
tokenizer, evaluations.jsonl and stage.json to --output_dir, complete or not at all, when training ends. Until then the
state of the last evaluation is in <output_dir>.unfinished: rerun the same command to resume from there.

As a template, copy this directory, common/ and data.py. Yours to write are parse_args and the functions in train; leave
ResumableRun (refuses, resumes, writes) and training.fit as they are. `run.is_first` stands around writing alone.

    python run_clue.py --task_name TNEWS --model_name_or_path ppminilm-6l-768h --learning_rate 5e-5 --batch_size 32 \\
        --num_train_epochs 3 --output_dir ppminilm-6l-768h/models/TNEWS/5e-5_32
    python run_clue.py --task_name TNEWS --model_name_or_path ppminilm-6l-768h/models/TNEWS/5e-5_32 --do_eval
    python -m paddle.distributed.launch --nproc_per_node 2 run_clue.py ...       # batch_size is per process
"""

import os
import sys

# data.py and common/ are in the root of the repository, scoring.py is beside this script. Paddle comes from compat,
# which cures defects of the pinned version.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import data
import scoring
from common import checkpoints, cli, modeling, objectives, records, reports, training
from common.compat import paddle
from common.runs import ResumableRun


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    main = parser.add_argument_group("task and model")
    cli.add_task_argument(main)
    help = "what is asked of a text: classification (one label), multi_label (any number of them), or one of your own, "
    help += "whose file $OBJECTIVES names (default: what the records look like)"
    main.add_argument("--objective", help=help)
    objectives.add_metric_argument(main)
    checkpoints.add_model_arguments(main)
    cli.add_output_argument(main, "where the best model goes; required for training")
    # add_flag: --do_train, --do_train True and --do_train False all work. without_effect: does not change the result,
    # so that a rerun that differs in nothing else finds the result already there.
    help = "train and evaluate (what happens if neither this nor --do_eval is given)"
    main.add_flag("--do_train", help, default=None)
    main.add_flag("--do_eval", "given alone: only score the model", default=None, without_effect=True)
    reports.add_arguments(main)
    help = "write the best model's predictions for test.json, as CLUE takes them, into its directory as "
    help += "<task>_predict.json; given alone: only that"
    main.add_flag("--do_predict", help, default=None, without_effect=True)
    training.add_training_arguments(parser)
    cli.add_input_arguments(parser)
    args = parser.parse_args(argv)
    args.do_train = bool(args.do_train) or not (args.do_eval or args.do_predict)
    if args.do_train and not args.output_dir:
        parser.error("--output_dir is required for training")
    if args.report and (args.do_train or not args.do_eval):
        parser.error("--report goes with --do_eval alone, which scores a model that is fine-tuned already")
    return args


def fine_tune(args):
    """Trains, and writes --output_dir."""
    # Not the parser's default, because for --do_eval "not given" means the length of the fine-tuned model.
    args.max_seq_length = args.max_seq_length or 128
    # The task. The order of its labels decides what each logit means. Its objective says how a label is read, and what
    # loss, metrics and answers are made of the logits: common/objectives.py.
    task = data.choose_task(args)
    if args.do_predict:
        # Raises a UserError if test.json is missing: better now than after hours of training.
        data.split_path(task.name, "test", args.data_dir)
    # dev chooses the checkpoint. test.json only gets predictions, as CLUE keeps its labels to itself.
    splits = data.read_train_and_dev(task, args)
    # For stage.json, with the md5 of each file: changed data makes it a different run.
    described = {name: split.describe() for name, split in splits.items()}

    # The model: an encoder, and a classifier [hidden_size, labels]. The classifier is random, unless the directory
    # holds one of that shape; with --init_config everything is. All processes have the same seed, hence the same
    # weights.
    start = checkpoints.load_pretrained_for(args, len(task.labels))

    # The run. It knows whether this result is there already, refuses a directory that holds another one, and keeps the
    # state from which the same command resumes. For stage.json it gets what the result is made from: parent (directory
    # and hashes of the weights that training starts from), data, notes (what is random or partial), which every later
    # stage inherits, and model, params and flops.
    fields = {"parent": start.parent, "data": described, "notes": start.notes, **start.fields}
    fields.update(task=task.name, labels=list(task.labels), objective=task.objective.describe())
    names = data.label_names(task, splits["train"])
    if names:  # what people call the labels, for the answers of infer.py and the service
        fields["model"]["label_names"] = names
    with ResumableRun("finetune", args, [args.output_dir], **fields) as run:
        if not run.finished:
            # Every process tokenizes; the first one also prints three samples and the plan.
            features = training.convert(args, run, splits, start.tokenizer, task)
            if run.is_first:
                training.note_unknown_tokens(run, features["train"], start.tokenizer)
            state = train(args, run, task.objective, start.model, features, start.tokenizer.pad_id)
            if run.is_first:  # of several processes, the only one that writes
                save_best(args, run, task.objective, state, start.tokenizer)
        # Here all processes wait for each other, and the working directory goes, as the output is written.
    if args.do_predict and run.is_first:
        scoring.predict_test(args, args.output_dir)


def train(args, run, objective, model, features, pad_id):
    """Trains on features["train"] and keeps the checkpoint that is best on features["dev"]. Returns: the final state.

    The loop is training.fit: AdamW, the order of the data, several processes, evaluation every --save_steps steps,
    resuming after a kill. It asks for the three functions below.
    """

    # What --class_weight says of the records of a batch; without it, the loss is the plain mean.
    weights_of = training.weights_of_batches(args, objective, features["train"])

    def losses_of(batch):
        """The loss of a batch: the place for another one. Of several that are yielded, the gradients are added up."""
        logits = model(*modeling.tensors(batch))  # float32 [batch_size, labels]
        yield objective.loss(logits, paddle.to_tensor(batch.labels), **weights_of(batch))

    def evaluate():
        """{"": logits of dev}: this is a single model; prune.py has one for each width."""
        return {"": modeling.predict(model, features["dev"], pad_id)}

    # The objective makes metrics of the logits. Accuracy, or what --metric names, selects, not the loss: the loss rises
    # again, from overconfidence, while accuracy still improves.
    write = model.save_pretrained
    return training.fit(args, run, model, features, pad_id, losses_of, evaluate, objective, write)


def save_best(args, run, objective, state, tokenizer):
    """Writes --output_dir: model, tokenizer, evaluations.jsonl, stage.json."""
    best = state["best"][""]
    metrics = {name: figure for name, figure in best.items() if name != "directory"}
    metrics.update(selected_on="dev", max_seq_length=args.max_seq_length, evaluated_every=args.save_steps)
    # A model that always gives the most frequent class reaches its share without having learnt anything.
    constant, reached = records.constant_answer(run.fields["data"]["dev"])
    if best[objective.metric] <= reached:
        run.notes.append(f"fine-tuning: dev {objective.shown} not above the {constant}")
        print(f"note: not above the {constant}, so nothing was learnt; try more epochs or another learning rate")
    evaluations = [{"step": row["step"], **row[""]} for row in state["evaluations"]]
    written = {"metrics": metrics, "objective": objective.with_settings(best).describe()}
    with run.output(args.output_dir, checkpoint=best["directory"], evaluations=evaluations, **written) as directory:
        # The run has put checkpoint and evaluations.jsonl there, and adds stage.json. The tokenizer travels with the
        # model, so that no later stage has to be told which one it was.
        tokenizer.save(directory)
    print(
        f"{run.fields['task']}: dev {objective.shown} {best[objective.metric]:.4f} at step "
        f"{best['step']} ({constant} {reached:.4f}) -> {args.output_dir}"
    )
    if objective.metric == "accuracy":  # the line that scripts written for the original example look for
        print(f"best_acc: {best[objective.metric]:.6g}")


def main(argv=None):
    args = parse_args(argv)
    training.start(args)
    if args.do_train:
        fine_tune(args)
        return
    scoring.check_alone()
    # Both can be asked for. "" is no directory either, and gets the same message as one that is not there.
    if args.do_eval:
        scoring.evaluate(args, args.model_name_or_path or "")
    if args.do_predict:
        scoring.predict_test(args, args.model_name_or_path or "")


if __name__ == "__main__":
    cli.run(main)
