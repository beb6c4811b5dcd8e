"""Fine-tunes an encoder on a CLUE task (or one of your own), and keeps the checkpoint that is best on dev.

Reads a model (built-in name, directory, or --init_config) and the task's train and dev data; writes the best model,
its tokenizer, evaluations.jsonl and stage.json to --output_dir, whole, when training ends. Until then the state is in
<output_dir>.unfinished, and the same command goes on from there.

    python run_clue.py --task_name TNEWS --model_name_or_path ppminilm-6l-768h --learning_rate 5e-5 --batch_size 32 \\
        --num_train_epochs 3 --output_dir ppminilm-6l-768h/models/TNEWS/5e-5_32
    python run_clue.py --task_name TNEWS --model_name_or_path ppminilm-6l-768h/models/TNEWS/5e-5_32 --do_eval
    python -m paddle.distributed.launch --nproc_per_node 2 run_clue.py ...       # batch_size is per process
"""

import json
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import compat  # noqa: F401  before Paddle

import paddle
from tqdm import tqdm

import data
import modeling
import records
import texts
import training
import utils


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    main = parser.add_argument_group("task and model")
    main.add_argument(
        "--task_name", required=True, help="a CLUE task in any case, or a name for the data in --data_dir"
    )
    modeling.add_model_arguments(main)
    main.add_argument("--output_dir", help="where the best model goes; required for training")
    main.add_argument(
        "--do_train",
        nargs="?",
        const=True,
        type=utils.boolean,
        help="train and evaluate (what happens if neither this nor --do_eval is given)",
    )
    main.add_argument("--do_eval", nargs="?", const=True, type=utils.boolean, help="given alone: only score the model")
    main.add_argument(
        "--do_predict",
        nargs="?",
        const=True,
        type=utils.boolean,
        help="write the best model's predictions for test.json, as CLUE takes them, into its directory as "
        "<task>_predict.json; given alone: only that",
    )
    training.add_training_arguments(parser.add_argument_group("training"))
    inputs = parser.add_argument_group("data")
    utils.add_data_arguments(inputs)
    utils.add_tokenizer_arguments(inputs)
    args = parser.parse_args(argv)
    args.do_train = bool(args.do_train) or not (args.do_eval or args.do_predict)
    if args.do_train and not args.output_dir:
        parser.error("--output_dir is required for training")
    return args


def evaluate_only(args):
    """--do_eval alone: prints one JSON line with the dev accuracy of a fine-tuned directory."""
    model, tokenizer, record = modeling.load_finished(args.model_name_or_path or "", args.use_faster_tokenizer)
    records.check_task(record, args.task_name, args.model_name_or_path)
    task = data.Task(record["task"], tuple(record["labels"]))
    dev = data.read_split(task, "dev", args.data_dir, args.max_eval_samples)
    features = data.convert(dev.examples, tokenizer, records.sequence_length(args, record))
    metrics = modeling.score(model, features, tokenizer.pad_id)
    print(json.dumps({"task": record["task"], **metrics, **dev.describe()}, ensure_ascii=False))


def predict_test(args, directory):
    """--do_predict: writes the predictions of a fine-tuned directory for test.json beside the model."""
    model, tokenizer, record = modeling.load_finished(directory, args.use_faster_tokenizer)
    records.check_task(record, args.task_name, directory)
    task = data.Task(record["task"], tuple(record["labels"]))
    test = data.read_split(task, "test", args.data_dir)
    features = data.convert(test.examples, tokenizer, records.sequence_length(args, record))
    path = texts.write_submission(task, test, modeling.predict(model, features, tokenizer.pad_id), directory)
    print(f"{len(features)} test records -> {path}")


def train(args, model, train_features, dev_features, unfinished, pad_id):
    """Trains and keeps the best checkpoint. Returns: the final state; its ``best`` names directory and metrics."""
    steps = training.total_steps(args, len(train_features))
    optimizer, schedule = training.make_optimizer(model, args, steps)
    state = training.load_training_state(unfinished, model, optimizer, schedule)
    if state and training.rank_and_world()[0] == 0:
        print(f"going on after step {state['step']} of {steps}")
    state = state or {"step": 0, "best": None, "evaluations": [], "seconds": 0.0}
    rank, _ = training.rank_and_world()
    scalars = utils.scalar_writer(args.visualdl_dir if rank == 0 else None)

    model.train()
    started, running = time.time() - state["seconds"], []
    batches = training.training_batches(train_features, args, state["step"], steps, pad_id)
    progress = tqdm(
        batches, total=steps, initial=state["step"], desc=args.task_name, mininterval=1, disable=True if rank else None
    )
    for step, batch, share in progress:
        loss = paddle.zeros([])
        if batch:
            logits = model(paddle.to_tensor(batch.input_ids), paddle.to_tensor(batch.token_type_ids))
            loss = paddle.nn.functional.cross_entropy(logits, paddle.to_tensor(batch.labels)) * share
            loss.backward()
        training.sum_gradients(model.parameters())
        optimizer.step()
        schedule.step()
        optimizer.clear_grad()
        running += training.sum_over_processes(float(loss))
        training.check_loss(running[-1], step)
        if rank > 0:  # the first process logs, evaluates and writes
            continue

        if step % args.logging_steps == 0:
            progress.write(f"step {step}/{steps} loss {sum(running) / len(running):.4f} lr {schedule.get_lr():.2e}")
            scalars({"train/loss": sum(running) / len(running), "train/learning_rate": schedule.get_lr()}, step)
            running.clear()
        if step % args.save_steps == 0 or step == steps:
            metrics = {"step": step, **modeling.score(model, dev_features, pad_id)}
            state["evaluations"].append(metrics)
            if state["best"] is None or metrics["accuracy"] > state["best"]["accuracy"]:
                state["best"] = {**metrics, "directory": f"best-{step}"}
                with utils.whole_directory(os.path.join(unfinished.directory, f"best-{step}")) as directory:
                    model.save_pretrained(directory)
            progress.write(
                f"step {step}/{steps} dev accuracy {metrics['accuracy']:.4f} loss {metrics['loss']:.4f} "
                f"(best {state['best']['accuracy']:.4f} at step {state['best']['step']})"
            )
            scalars({"dev/accuracy": metrics["accuracy"], "dev/loss": metrics["loss"]}, step)
            state["seconds"] = time.time() - started
            training.save_training_state(unfinished, step, model, optimizer, {state["best"]["directory"]}, state)
    return state


def main(argv=None):
    args = parse_args(argv)
    training.check_training_arguments(args)
    args.device = utils.set_device(args.device)
    if not args.do_train:
        if args.do_eval:
            evaluate_only(args)
        return predict_test(args, args.model_name_or_path or "") if args.do_predict else None
    rank, _ = training.start_processes()
    args.max_seq_length = args.max_seq_length or 128
    utils.set_seed(args.seed)
    task = data.get_task(args.task_name, args.data_dir)
    if args.do_predict:
        data.split_path(task.name, "test", args.data_dir)  # a missing one is said before the training, not after
    read = data.read_train_and_dev(task, args)
    splits = {name: split.describe() for name, split in read.items()}
    model, tokenizer, provenance = modeling.load(args, len(task.labels))
    modeling.check_sequence_length(args.max_seq_length, model)
    now = records.identity(records.describe_arguments(args), provenance["parent"], splits)
    with training.Unfinished(args.output_dir, shared=rank > 0) as unfinished:
        if records.finished(args.output_dir, now, args.overwrite):
            unfinished.forget(now)
            print(f"{args.output_dir}: already finished with these arguments, nothing to do")
            best = None
        else:
            unfinished.begin(now, args.overwrite)
            best = train_and_save(args, task, read, model, tokenizer, provenance, unfinished)
    if args.do_predict and rank == 0:
        predict_test(args, args.output_dir)
    return best


def unknown_share(features, unk_id):
    """The share of unknown tokens in features: a vocabulary that does not fit the data has many."""
    return sum(f.input_ids.count(unk_id) for f in features) / max(1, sum(len(f.input_ids) for f in features))


def train_and_save(args, task, read, model, tokenizer, provenance, unfinished):
    """Trains, and writes --output_dir whole. Returns: the best dev accuracy, None in all processes but the first."""
    rank, _ = training.rank_and_world()
    splits = {name: split.describe() for name, split in read.items()}
    features = {name: data.convert(split.examples, tokenizer, args.max_seq_length) for name, split in read.items()}
    unknown = unknown_share(features["train"], tokenizer.unk_id)
    unfit = [f"{unknown:.0%} of train's tokens are unknown to the vocabulary"] if unknown > 0.05 else []
    if unfit and rank == 0:
        print(f"warning: {unfit[0]}: does it fit?", file=sys.stderr)
    state = train(args, model, features["train"], features["dev"], unfinished, tokenizer.pad_id)
    training.wait_for_all()
    if rank > 0:
        return None

    params, flops = modeling.count(model)
    provenance["notes"] += [
        f"partial {name} data: {split['partial']}" for name, split in splits.items() if split["partial"]
    ]
    provenance["notes"] += unfit
    best = state["best"]
    if best["accuracy"] <= splits["dev"]["majority_class"]:
        provenance["notes"].append("fine-tuning: dev accuracy not above the majority class")
        print("note: not above the majority class, so nothing was learnt; try more epochs or another learning rate")
    with utils.whole_directory(args.output_dir, wait=True) as directory:
        utils.copy_files(os.path.join(unfinished.directory, best["directory"]), directory)
        tokenizer.save(directory)
        utils.write_json_lines(os.path.join(directory, "evaluations.jsonl"), state["evaluations"])
        records.write_record(
            directory,
            records.make_record(
                "finetune",
                args,
                time.time() - state["seconds"],
                task=task.name,
                labels=list(task.labels),
                data=splits,
                params=params,
                flops=flops,
                weights=records.hash_files(directory, [modeling.WEIGHTS]),
                metrics={
                    "accuracy": best["accuracy"],
                    "loss": best["loss"],
                    "step": best["step"],
                    "selected_on": "dev",
                    "max_seq_length": args.max_seq_length,
                    "evaluated_every": args.save_steps,
                },
                **provenance,
            ),
        )
    unfinished.remove()
    print(
        f"{task.name}: dev accuracy {best['accuracy']:.4f} at step {best['step']} "
        f"(majority class {splits['dev']['majority_class']:.4f}) -> {args.output_dir}"
    )
    return best["accuracy"]


if __name__ == "__main__":
    utils.run(main)
