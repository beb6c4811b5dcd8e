"""Prunes the width of a fine-tuned encoder (DynaBERT) while distilling the fine-tuned model into what remains.

Reads a directory that finetuning/run_clue.py wrote and the task's data; ranks heads and FFN neurons by importance,
trains every width of --width_mult_list in one supernet, and keeps each width's best checkpoint: writes
<output_dir>/<width>/best_model/. Until the end the state is in <output_dir>.unfinished, and the same command goes on.

    python prune.py --task_name CLUEWSC2020 --output_dir pruned_models/CLUEWSC2020 --width_mult_list 0.75 \\
        --model_name_or_path ../finetuning/ppminilm-6l-768h/models/CLUEWSC2020/1e-4_32 \\
        --learning_rate 1e-4 --batch_size 32 --num_train_epochs 50
"""

import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import compat  # noqa: F401  before Paddle

import numpy as np
import paddle
from tqdm import tqdm

import data
import exporting
import modeling
import supernet as dynabert
import records
import training
import utils


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    main = parser.add_argument_group("task and model")
    main.add_argument("--task_name", required=True, help="the task that the model was fine-tuned on")
    main.add_argument("--model_name_or_path", required=True, help="directory that run_clue.py wrote: start and teacher")
    main.add_argument("--model_type", choices=sorted(modeling.MODEL_TYPES), help="checked against stage.json if given")
    main.add_argument("--output_dir", required=True, help="the widths' directories go there")
    main.add_argument(
        "--width_mult_list",
        nargs="+",
        type=float,
        default=[0.75],
        help="shares of heads and neurons to keep; several widths are trained at once",
    )
    pruning = parser.add_argument_group("pruning")
    pruning.add_argument(
        "--lambda_logit", type=float, default=1.0, help="weight of the soft cross-entropy beside the hidden states' 0.1"
    )
    pruning.add_argument(
        "--importance_split",
        choices=("train", "dev"),
        default="train",
        help="what ranks heads and neurons; dev is the published recipe, and shows the selection set to the ranking",
    )
    pruning.add_argument("--importance_samples", type=int, default=2048, help="records that rank heads and neurons")
    for name in ("--do_train", "--do_eval"):
        pruning.add_argument(name, nargs="?", const=True, type=utils.boolean, help="accepted; pruning always does both")
    pruning.add_argument(
        "--parity_tolerance",
        type=float,
        default=1e-3,
        help="largest difference of a logit allowed between the fine-tuned model and the supernet made from it",
    )
    training.add_training_arguments(parser.add_argument_group("training"))
    inputs = parser.add_argument_group("data")
    utils.add_data_arguments(inputs)
    utils.add_tokenizer_arguments(inputs)
    return parser.parse_args(argv)


def evaluate(supernet, widths, features, pad_id):
    """{width: {accuracy, loss}} of the supernet's sub-models."""
    scores = {}
    for width in widths:
        dynabert.set_width(supernet, width)
        scores[f"{width:g}"] = modeling.score(supernet, features, pad_id)
    return scores


def train(args, teacher, supernet, train_features, dev_features, unfinished, pad_id):
    """Trains all widths and keeps the best checkpoint of each. Returns: the final state."""
    steps = training.total_steps(args, len(train_features))
    optimizer, schedule = training.make_optimizer(supernet.model, args, steps)
    state = training.load_training_state(unfinished, supernet.model, optimizer, schedule)
    rank, _ = training.rank_and_world()
    if state and rank == 0:
        print(f"going on after step {state['step']} of {steps}")
    state = state or {"step": 0, "best": {}, "evaluations": [], "seconds": 0.0}
    if not state["evaluations"] and rank == 0:
        start = evaluate(supernet, args.width_mult_list, dev_features, pad_id)
        print("before training: " + ", ".join(f"width {w} accuracy {s['accuracy']:.4f}" for w, s in start.items()))
        state["evaluations"].append({"step": 0, **start})
    scalars = utils.scalar_writer(args.visualdl_dir if rank == 0 else None)
    student_states, teacher_states = dynabert.HiddenStates(supernet), dynabert.HiddenStates(teacher)

    started, running = time.time() - state["seconds"], []
    batches = training.training_batches(train_features, args, state["step"], steps, pad_id)
    progress = tqdm(
        batches, total=steps, initial=state["step"], desc=args.task_name, mininterval=1, disable=True if rank else None
    )
    for step, batch, share in progress:
        supernet.train()
        loss_of_step = 0.0
        if batch:
            inputs = paddle.to_tensor(batch.input_ids), paddle.to_tensor(batch.token_type_ids)
            with paddle.no_grad():  # once per batch, for all widths
                teacher_logits, taught = teacher_states.run(inputs)
            for width in args.width_mult_list:
                dynabert.set_width(supernet, width)
                logits, learnt = student_states.run(inputs)
                loss = share * dynabert.distillation_loss(learnt, taught, logits, teacher_logits, args.lambda_logit)
                loss.backward()
                loss_of_step += float(loss) / len(args.width_mult_list)
        training.sum_gradients(supernet.model.parameters())
        optimizer.step()
        schedule.step()
        optimizer.clear_grad()
        running += training.sum_over_processes(loss_of_step)
        training.check_loss(running[-1], step)
        if rank > 0:  # the first process logs, evaluates and writes
            continue

        if step % args.logging_steps == 0:
            progress.write(f"step {step}/{steps} loss {np.mean(running):.4f} lr {schedule.get_lr():.2e}")
            scalars({"train/loss": np.mean(running), "train/learning_rate": schedule.get_lr()}, step)
            running.clear()
        if step % args.save_steps == 0 or step == steps:
            scores = evaluate(supernet, args.width_mult_list, dev_features, pad_id)
            state["evaluations"].append({"step": step, **scores})
            for width, metrics in scores.items():
                if metrics["accuracy"] > state["best"].get(width, {"accuracy": -1})["accuracy"]:
                    state["best"][width] = {**metrics, "step": step, "directory": f"best-{width}-{step}"}
                    with utils.whole_directory(os.path.join(unfinished.directory, f"best-{width}-{step}")) as directory:
                        teacher.config.save_pretrained(directory)
                        paddle.save(dynabert.plain_state(supernet.model), os.path.join(directory, modeling.WEIGHTS))
            progress.write(
                f"step {step}/{steps} dev "
                + ", ".join(
                    f"width {w} accuracy {s['accuracy']:.4f} (best {state['best'][w]['accuracy']:.4f})"
                    for w, s in scores.items()
                )
            )
            scalars({f"dev/accuracy_{w}": s["accuracy"] for w, s in scores.items()}, step)
            state["seconds"] = time.time() - started
            training.save_training_state(
                unfinished,
                step,
                supernet.model,
                optimizer,
                {best["directory"] for best in state["best"].values()},
                state,
            )
    return state


def main(argv=None):
    args = parse_args(argv)
    training.check_training_arguments(args)
    utils.check_positive(args, "importance_samples")
    args.device = utils.set_device(args.device)
    rank, _ = training.start_processes()
    teacher, tokenizer, record = modeling.load_finished(args.model_name_or_path, args.use_faster_tokenizer)
    records.check_task(record, args.task_name, args.model_name_or_path, args.model_type)
    args.max_seq_length = records.sequence_length(args, record)
    architecture, labels = record["model"]["architecture"], record["labels"]
    args.width_mult_list = sorted(set(args.width_mult_list), reverse=True)
    for width in args.width_mult_list:
        dynabert.check_width(width, architecture["num_attention_heads"], architecture["intermediate_size"])
    targets = {f"{w:g}": os.path.join(args.output_dir, f"{w:g}", "best_model") for w in args.width_mult_list}
    utils.set_seed(args.seed)
    task = data.Task(record["task"], tuple(labels), data.get_task(args.task_name, args.data_dir).train_size)
    read = data.read_train_and_dev(task, args)
    splits = {name: split.describe() for name, split in read.items()}
    parent = modeling.parent_of(args.model_name_or_path, record)
    now = records.identity(records.describe_arguments(args), parent, splits)
    with training.Unfinished(args.output_dir, shared=rank > 0) as unfinished:
        if all([records.finished(target, now, args.overwrite) for target in targets.values()]):
            unfinished.forget(now)
            print(f"{', '.join(targets.values())}: already finished with these arguments, nothing to do")
            return
        unfinished.begin(now, args.overwrite)
        prune(args, teacher, tokenizer, record, read, targets, unfinished)


def prune(args, teacher, tokenizer, record, read, targets, unfinished):
    """Ranks, trains all widths, and writes the directory of each whole. targets: {width as text: directory}."""
    rank, _ = training.rank_and_world()
    architecture, labels = record["model"]["architecture"], record["labels"]
    splits = {name: split.describe() for name, split in read.items()}
    parent = modeling.parent_of(args.model_name_or_path, record)
    features = {name: data.convert(split.examples, tokenizer, args.max_seq_length) for name, split in read.items()}

    student = modeling.load_finished(args.model_name_or_path)[0]
    if unfinished.newest_state() is None:  # otherwise the state that is loaded is in order already
        chosen = features[args.importance_split]
        chosen = [
            chosen[i] for i in np.random.default_rng(args.seed).permutation(len(chosen))[: args.importance_samples]
        ]
        print(f"ranking heads and neurons on {len(chosen)} {args.importance_split} records")
        # Gradients are summed by absolute value over batches, so their size is fixed: the ranking must not depend on
        # --batch_size or on the number of processes.
        batches = data.batches(chosen, 32, tokenizer.pad_id, data.by_length(chosen))
        dynabert.reorder(student, *dynabert.importance(student, batches))
    supernet = dynabert.make_supernet(student, args.width_mult_list)
    if unfinished.newest_state() is None:
        first = features["dev"][:32]
        before, after = (modeling.predict(model, first, tokenizer.pad_id) for model in (teacher, supernet))
        exporting.parity(before, after, f"{len(first)} dev records, reordered", args.parity_tolerance)
    state = train(args, teacher, supernet, features["train"], features["dev"], unfinished, tokenizer.pad_id)
    training.wait_for_all()
    if rank > 0:
        return

    notes = record["notes"] + [f"pruning: partial {n} data: {d['partial']}" for n, d in splits.items() if d["partial"]]
    for width, best in state["best"].items():
        sub_model = dynabert.build_sub_model(record["model"]["model_type"], architecture, float(width), len(labels))
        params, flops = modeling.count(sub_model)
        with utils.whole_directory(targets[width], wait=True) as directory:
            utils.copy_files(os.path.join(unfinished.directory, best["directory"]), directory)
            tokenizer.save(directory)
            utils.write_json_lines(os.path.join(directory, "evaluations.jsonl"), state["evaluations"])
            records.write_record(
                directory,
                records.make_record(
                    "prune",
                    args,
                    time.time() - state["seconds"],
                    task=record["task"],
                    labels=labels,
                    data=splits,
                    params=params,
                    flops=flops,
                    model={
                        **record["model"],
                        "width_mult": float(width),
                        "initialized_from": records.relative(args.model_name_or_path),
                    },
                    parent=parent,
                    notes=list(dict.fromkeys(notes)),
                    weights=records.hash_files(directory, [modeling.WEIGHTS]),
                    metrics={
                        "accuracy": best["accuracy"],
                        "loss": best["loss"],
                        "step": best["step"],
                        "selected_on": "dev",
                        "max_seq_length": args.max_seq_length,
                        "accuracy_before_training": state["evaluations"][0][width]["accuracy"],
                        "accuracy_of_parent": record["metrics"]["accuracy"],
                    },
                ),
            )
        print(
            f"{record['task']}: width {width} dev accuracy {best['accuracy']:.4f} at step {best['step']} "
            f"(fine-tuned {record['metrics']['accuracy']:.4f}) -> {targets[width]}"
        )
    unfinished.remove()


if __name__ == "__main__":
    utils.run(main)
