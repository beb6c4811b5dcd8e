"""Fine-tunes an encoder on a CLUE task, or on one of your own, and keeps the checkpoint that is best on dev.

Reads a model (built-in name, directory, or --init_config) and the task's train and dev data. Writes the best model, its
tokenizer, evaluations.jsonl and stage.json to --output_dir, whole, when training ends. Until then the state is in
<output_dir>.unfinished: rerun the same command to resume.

    python run_clue.py --task_name TNEWS --model_name_or_path ppminilm-6l-768h --learning_rate 5e-5 --batch_size 32 \\
        --num_train_epochs 3 --output_dir ppminilm-6l-768h/models/TNEWS/5e-5_32
    python run_clue.py --task_name TNEWS --model_name_or_path ppminilm-6l-768h/models/TNEWS/5e-5_32 --do_eval
    python -m paddle.distributed.launch --nproc_per_node 2 run_clue.py ...       # batch_size is per process
"""

import os
import sys

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
    """Trains, and writes --output_dir. Returns: the best dev accuracy; None if this process did not write it."""
    # The task. The order of its labels decides what each logit of the classifier means.
    args.max_seq_length = args.max_seq_length or 128
    task = data.get_task(args.task_name, args.data_dir)
    if args.do_predict:
        data.split_path(task.name, "test", args.data_dir)  # if it is missing, say so before the training, not after
    # dev chooses the checkpoint; test.json, whose labels CLUE keeps to itself, is only ever predicted.
    splits = data.read_train_and_dev(task, args)
    # For stage.json, with the md5 of each file: with other data it is another run.
    described = {name: split.describe() for name, split in splits.items()}

    # The model: a pre-trained encoder, and a classifier [hidden_size, labels] whose weights are random so far.
    start = checkpoints.load_pretrained_for(args, len(task.labels))

    # The run. It knows whether this result is there already, refuses a directory that holds another one, and keeps the
    # state from which the same command resumes.
    fields = {"task": task.name, "labels": list(task.labels), **start.fields}
    accuracy = None
    with ResumableRun("finetune", args, [args.output_dir], start.parent, described, start.notes, **fields) as run:
        if not run.finished:
            features = training.convert(args, run, splits, start.tokenizer, task.labels)
            state = train(args, run, start.model, features, start.tokenizer.pad_id)
            if run.is_first:
                accuracy = save_best(args, run, state, start.tokenizer)
    if args.do_predict and run.is_first:
        scoring.predict_test(args, args.output_dir)
    return accuracy


def train(args, run, model, features, pad_id):
    """Trains on features["train"] and keeps the checkpoint that is best on features["dev"].

    Returns: the final state; its ``best`` names the checkpoint and its metrics.
    """
    # TNEWS: 53,360 records / 32 = 1,668 steps an epoch, x 3 epochs = 5,004 steps.
    progress = training.Progress(args, len(features["train"]))
    # AdamW. The learning rate rises over the first tenth of the steps, because the new classifier's gradients are large
    # at first and would damage the pre-trained weights, and then falls to 0.
    optimizer, schedule = training.make_optimizer(model, args, progress.steps)
    # After a kill: weights, AdamW's moments and the step of the last evaluation. A new run starts with these values.
    state = run.restore(model, optimizer, schedule, best=None, evaluations=[])

    # Dropout is on while training, and off in modeling.score.
    model.train()
    batches = training.training_batches(features["train"], args, state["step"], progress.steps, pad_id)
    for step, batch, share in progress.bar(batches, state["step"], args.task_name):
        # In a single process share is 1. Several processes divide each batch among them; weighted by its share, the
        # sum of their gradients is that of the whole batch. A process that gets no record adds nothing.
        loss = paddle.zeros([])
        if batch:
            logits = model(*training.tensors(batch))  # float32 [batch_size, labels]
            # For another objective (several labels per text, a score) change this line, and the metrics in evaluate.
            loss = paddle.nn.functional.cross_entropy(logits, paddle.to_tensor(batch.labels)) * share
            loss.backward()
        # Clips the gradients (--max_grad_norm), takes one step of AdamW and one of the schedule, clears the gradients.
        training.update(model, optimizer, schedule)
        progress.loss(step, loss, schedule)

        # The published search evaluated every 100 steps: 51 times for TNEWS. The best checkpoint often lies within an
        # epoch. As dev chooses it, its dev accuracy is a little optimistic.
        if run.is_first and (step % args.save_steps == 0 or step == progress.steps):
            evaluate(run, model, features["dev"], pad_id, step, state, progress)
            run.save_state(step, model, optimizer, state, [state["best"]["directory"]])
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
    """Writes --output_dir: model, tokenizer, evaluations.jsonl, stage.json. Returns: the best dev accuracy."""
    best, majority_class = state["best"], run.fields["data"]["dev"]["majority_class"]
    # A model that always answers the most frequent class reaches this accuracy without having learnt anything.
    if best["accuracy"] <= majority_class:
        run.notes.append("fine-tuning: dev accuracy not above the majority class")
        print("note: not above the majority class, so nothing was learnt; try more epochs or another learning rate")
    metrics = {name: best[name] for name in ("accuracy", "loss", "step")}
    metrics.update(selected_on="dev", max_seq_length=args.max_seq_length, evaluated_every=args.save_steps)
    checkpoint, evaluations = best["directory"], state["evaluations"]
    with run.output(args.output_dir, checkpoint=checkpoint, evaluations=evaluations, metrics=metrics) as directory:
        # The tokenizer travels with the model, so that no later stage has to be told which one it was.
        tokenizer.save(directory)
    print(
        f"{run.fields['task']}: dev accuracy {best['accuracy']:.4f} at step {best['step']} "
        f"(majority class {majority_class:.4f}) -> {args.output_dir}"
    )
    return best["accuracy"]


def main(argv=None):
    args = parse_args(argv)
    training.start(args)
    if args.do_train:
        return fine_tune(args)
    if args.do_eval:
        scoring.evaluate(args, args.model_name_or_path or "")
    if args.do_predict:
        scoring.predict_test(args, args.model_name_or_path or "")
    return None


if __name__ == "__main__":
    cli.run(main)
