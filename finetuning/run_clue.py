"""Fine-tunes an encoder on a CLUE task, or on one of your own, and keeps the checkpoint that is best on dev.

Reads a model (built-in name, directory, or --init_config) and the task's train and dev data. Writes the best model, its
tokenizer, evaluations.jsonl and stage.json to --output_dir, complete or not at all, when training ends. Until then the
state of the last evaluation is in <output_dir>.unfinished: rerun the same command to resume from there.

As a template, copy this directory, common/ and data.py. Yours to write are parse_args, objective and evaluate. Leave as
they are: ResumableRun (refuses, resumes, writes), and training_batches, update and progress.loss, which all processes
have to call; `run.is_first` stands around evaluation and writing alone.

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
from common import checkpoints, cli, modeling, training
from common.compat import paddle
from common.runs import ResumableRun


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    main = parser.add_argument_group("task and model")
    cli.add_task_argument(main)
    checkpoints.add_model_arguments(main)
    cli.add_output_argument(main, "where the best model goes; required for training")
    # add_flag: --do_train, --do_train True and --do_train False all work. without_effect: does not change the result,
    # so that a rerun that differs in nothing else finds the result already there.
    help = "train and evaluate (what happens if neither this nor --do_eval is given)"
    main.add_flag("--do_train", help, default=None)
    main.add_flag("--do_eval", "given alone: only score the model", default=None, without_effect=True)
    help = "write the best model's predictions for test.json, as CLUE takes them, into its directory as "
    help += "<task>_predict.json; given alone: only that"
    main.add_flag("--do_predict", help, default=None, without_effect=True)
    training.add_training_arguments(parser)
    cli.add_input_arguments(parser)
    args = parser.parse_args(argv)
    args.do_train = bool(args.do_train) or not (args.do_eval or args.do_predict)
    if args.do_train and not args.output_dir:
        parser.error("--output_dir is required for training")
    return args


def fine_tune(args):
    """Trains, and writes --output_dir."""
    # Not the parser's default, because for --do_eval "not given" means the length of the fine-tuned model.
    args.max_seq_length = args.max_seq_length or 128
    # The task. The order of its labels decides what each logit of the classifier means.
    task = data.get_task(args.task_name, args.data_dir)
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
    fields.update(task=task.name, labels=list(task.labels))
    with ResumableRun("finetune", args, [args.output_dir], **fields) as run:
        if not run.finished:
            # Every process tokenizes; the first one also prints three samples and the plan.
            features = training.convert(args, run, splits, start.tokenizer, task.labels)
            if run.is_first:
                training.note_unknown_tokens(run, features["train"], start.tokenizer)
            state = train(args, run, start.model, features, start.tokenizer.pad_id)
            if run.is_first:  # of several processes, the only one that writes
                save_best(args, run, state, start.tokenizer)
        # Here all processes wait for each other, and the working directory goes, as the output is written.
    if args.do_predict and run.is_first:
        scoring.predict_test(args, args.output_dir)


def objective(model, batch):
    """The mean loss over a batch, float32 []: the place for another loss on the same labels.

    Another kind of target (a score, several labels per text) also concerns data.read_split, which reads the labels, the
    number of outputs in fine_tune, batching.scores, and what evaluate and save_best call accuracy. The code is not part
    of what makes a run: after a change here name another --output_dir, or the old result counts as finished.
    """
    logits = model(*modeling.tensors(batch))  # float32 [batch_size, labels]
    return paddle.nn.functional.cross_entropy(logits, paddle.to_tensor(batch.labels))


def train(args, run, model, features, pad_id):
    """Trains on features["train"] and keeps the checkpoint that is best on features["dev"].

    Returns: the final state; its ``best`` names the checkpoint and its metrics.
    """
    # TNEWS: 53,360 records / 32 = 1,668 steps an epoch, x 3 epochs = 5,004 steps.
    progress = training.Progress(args, len(features["train"]))
    # AdamW. The learning rate rises over the first tenth of the steps, then falls to 0. Without the slow start, the
    # large gradients of the new classifier would damage the pre-trained weights.
    optimizer, schedule = training.make_optimizer(model, args, progress.steps)
    # After a kill: weights, AdamW's moments, step, evaluations and best of the last evaluation, so at most --save_steps
    # steps are repeated. Otherwise step 0 and the values given here. No random state is kept: the order of the data and
    # dropout follow from seed and step, so a run that resumes with as many processes equals an uninterrupted one.
    state = run.restore(model, optimizer, schedule, best=None, evaluations=[])

    # Dropout is on while training, and off in modeling.score.
    model.train()
    batches = training.training_batches(features["train"], args, state["step"], progress.steps, pad_id)
    for step, batch, share in progress.bar(batches, state["step"], args.task_name):
        # All processes together take --batch_size x processes records a step, each of them its part. share is the size
        # of the part over that of the whole: 1 in a single process, 1/2 in each of two. Means weighted by share add up
        # to the mean over all records, also where the last batch of an epoch cannot be divided evenly.
        loss = 0.0
        if batch is not None:  # without a record left, a process still takes part in the sum below
            loss = objective(model, batch) * share
            loss.backward()
        # Sums the gradients over the processes, which wait for each other here; clips them (--max_grad_norm); takes one
        # step of AdamW and one of the schedule; clears the gradients.
        training.update(model, optimizer, schedule)
        # Sums the parts of the loss over the processes; the first one prints their mean every --logging_steps steps.
        progress.loss(step, loss, schedule)

        # The published search evaluated every 100 steps: 51 times for TNEWS. The best checkpoint often lies within an
        # epoch. As dev chooses it, its dev accuracy is a little optimistic. The other processes wait meanwhile.
        if run.is_first and (step % args.save_steps == 0 or step == progress.steps):
            evaluate(run, model, features["dev"], pad_id, step, state, progress)
            # One rename makes it valid, so a kill meanwhile leaves the state before it. Older states are deleted, and
            # checkpoints but for those named here. The schedule is not saved: it follows from the step.
            run.save_state(step, model, optimizer, state, checkpoints=[state["best"]["directory"]])
    return state


def evaluate(run, model, dev_features, pad_id, step, state, progress):
    """Scores the model on dev, and keeps it as a checkpoint if it is the best so far."""
    metrics = {"step": step, **modeling.score(model, dev_features, pad_id)}
    state["evaluations"].append(metrics)
    # Accuracy selects, not the loss: the loss rises again, from overconfidence, while accuracy still improves. Of equal
    # accuracies the earlier checkpoint stays.
    if state["best"] is None or metrics["accuracy"] > state["best"]["accuracy"]:
        state["best"] = {**metrics, "directory": f"best-{step}"}
        with run.checkpoint(state["best"]["directory"]) as directory:
            model.save_pretrained(directory)
    progress.write(
        f"step {step}/{progress.steps} dev accuracy {metrics['accuracy']:.4f} loss {metrics['loss']:.4f} "
        f"(best {state['best']['accuracy']:.4f} at step {state['best']['step']})"
    )
    progress.scalars(step, {"dev/accuracy": metrics["accuracy"], "dev/loss": metrics["loss"]})


def save_best(args, run, state, tokenizer):
    """Writes --output_dir: model, tokenizer, evaluations.jsonl, stage.json."""
    best, majority_share = state["best"], run.fields["data"]["dev"]["majority_class"]
    # A model that always answers the most frequent class reaches this accuracy without having learnt anything.
    if best["accuracy"] <= majority_share:
        run.notes.append("fine-tuning: dev accuracy not above the majority class")
        print("note: not above the majority class, so nothing was learnt; try more epochs or another learning rate")
    metrics = {name: best[name] for name in ("accuracy", "loss", "step")}
    metrics.update(selected_on="dev", max_seq_length=args.max_seq_length, evaluated_every=args.save_steps)
    checkpoint, evaluations = best["directory"], state["evaluations"]
    with run.output(args.output_dir, checkpoint=checkpoint, evaluations=evaluations, metrics=metrics) as directory:
        # The run has put checkpoint and evaluations.jsonl there, and adds stage.json. The tokenizer travels with the
        # model, so that no later stage has to be told which one it was.
        tokenizer.save(directory)
    print(
        f"{run.fields['task']}: dev accuracy {best['accuracy']:.4f} at step {best['step']} "
        f"(majority class {majority_share:.4f}) -> {args.output_dir}"
    )


def main(argv=None):
    args = parse_args(argv)
    training.start(args)
    if args.do_train:
        fine_tune(args)
        return
    # Both can be asked for. "" is no directory either, and gets the same message as one that is not there.
    if args.do_eval:
        scoring.evaluate(args, args.model_name_or_path or "")
    if args.do_predict:
        scoring.predict_test(args, args.model_name_or_path or "")


if __name__ == "__main__":
    cli.run(main)
