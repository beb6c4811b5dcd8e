"""General (task-agnostic) distillation: a small student learns a large teacher's self-attention relations.

Reads a teacher (built-in name or directory), a student to start from (or --init_config), and a directory of text files
with one sentence a line; writes <output_dir>/model_<step>/ every --save_steps steps and at the end, each a model
directory that finetuning/run_clue.sh takes. The state to go on from is in <output_dir>.unfinished: the same command
resumes after a kill.

    python general_distill.py --teacher_model_type roberta --teacher_model_name_or_path roberta-wwm-ext-large \\
        --student_model_name_or_path ppminilm-6l-768h --input_dir corpus --output_dir pretrain \\
        --teacher_layer_index 19 --student_layer_index 5 --num_relation_heads 64 --beta 1.0 --max_steps 400000
    python -m paddle.distributed.launch --nproc_per_node 2 general_distill.py ...    # batch_size is per process
"""

import argparse
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import compat  # noqa: F401  before Paddle

import paddle
from tqdm import tqdm

import modeling
import records
import relations
import training
import utils
from corpus import Corpus, encode


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    models = parser.add_argument_group("models")
    models.add_argument("--model_type", default="ppminilm", choices=sorted(modeling.MODEL_TYPES), help="of the student")
    models.add_argument(
        "--student_model_name_or_path", help="built-in name or directory; required unless --init_config"
    )
    models.add_argument("--init_config", help="JSON file with the student's architecture: start from random weights")
    models.add_argument("--vocab_file", help="for --init_config; must be, and by default is, the teacher's")
    models.add_argument(
        "--teacher_model_type", default="roberta", choices=sorted(modeling.MODEL_TYPES), help="family of the teacher"
    )
    models.add_argument("--teacher_model_name_or_path", required=True, help="built-in name or directory")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--num_layers", type=int, help="layers of the student; checked against it if given")
    loss.add_argument("--teacher_layer_index", type=int, default=19, help="from 0; 19 of a large teacher's 24 layers")
    loss.add_argument("--student_layer_index", type=int, default=5, help="from 0; the last layer as a rule")
    loss.add_argument(
        "--num_relation_heads", type=int, default=64, help="64 for a large, 48 for a base teacher; divides both widths"
    )
    loss.add_argument("--alpha", type=float, default=0.0, help="weight of head-head relations")
    loss.add_argument("--beta", type=float, default=0.0, help="weight of sample-sample relations; 1.0 was published")
    optimization = parser.add_argument_group("training")
    training.add_training_arguments(optimization)
    optimization.set_defaults(learning_rate=6e-4, batch_size=512, warmup_proportion=0.01, save_steps=20000, seed=42)
    optimization.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="micro-batches of --batch_size per step and "
        "process; 16 with --batch_size 32 is the published 512 (sample relations stay within a micro-batch)",
    )  # fmt: skip
    optimization.add_argument(
        "--use_amp", nargs="?", const=True, default=False, type=utils.boolean, help="FP16 on a GPU"
    )
    optimization.add_argument("--scale_loss", type=float, default=2**15, help="initial loss scaling of --use_amp")
    inputs = parser.add_argument_group("data")
    inputs.add_argument("--input_dir", required=True, help="directory of text files, one sentence a line")
    inputs.add_argument("--output_dir", required=True, help="where model_<step> directories go")
    utils.add_tokenizer_arguments(inputs)
    return parser.parse_args(argv)


def load_pair(args):
    """(student, teacher, tokenizer, provenance), checked to fit each other. Raises: UserError if they do not."""
    common = {"use_faster_tokenizer": args.use_faster_tokenizer}
    teacher, teacher_tokenizer, teacher_provenance = modeling.load(
        argparse.Namespace(
            model_type=args.teacher_model_type, model_name_or_path=args.teacher_model_name_or_path, init_config=None,
            vocab_file=None, **common,
        ), 2, "Model", "--teacher_model_name_or_path",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        teacher_tokenizer.save(directory)
        student, tokenizer, provenance = modeling.load(
            argparse.Namespace(
                model_type=args.model_type, model_name_or_path=args.student_model_name_or_path,
                init_config=args.init_config, vocab_file=args.vocab_file or os.path.join(directory, "vocab.txt"),
                **common,
            ), 2, "Model", "--student_model_name_or_path",
        )  # fmt: skip
    if args.init_config and not args.vocab_file:
        tokenizer = teacher_tokenizer
    if tokenizer.vocab != teacher_tokenizer.vocab:
        raise utils.UserError(
            f"--student_model_name_or_path: its vocabulary ({len(tokenizer.vocab)} tokens) is not the teacher's "
            f"({len(teacher_tokenizer.vocab)} tokens); relations compare the same tokens"
        )
    for name, model, layer in (
        ("student", student, args.student_layer_index), ("teacher", teacher, args.teacher_layer_index),
    ):  # fmt: skip
        layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
        if not 0 <= layer < layers:
            raise utils.UserError(f"--{name}_layer_index {layer}: the {name} has layers 0 to {layers - 1}")
        if args.num_relation_heads < 1 or hidden % args.num_relation_heads:
            raise utils.UserError(
                f"--num_relation_heads {args.num_relation_heads}: does not divide the {name}'s {hidden}"
            )
    if args.num_layers not in (None, student.config.num_hidden_layers):
        raise utils.UserError(f"--num_layers {args.num_layers}: the student has {student.config.num_hidden_layers}")
    modeling.check_sequence_length(args.max_seq_length, student)
    modeling.check_sequence_length(args.max_seq_length, teacher)
    provenance["teacher"] = teacher_provenance
    provenance["notes"] = [f"student: {n}" for n in provenance["notes"]] + [
        f"teacher: {n}" for n in teacher_provenance["notes"]
    ]
    return student, teacher, tokenizer, provenance


def save_model(args, step, student, tokenizer, provenance, params, flops, described, state):
    target = os.path.join(args.output_dir, f"model_{step}")
    with utils.whole_directory(target, wait=True) as directory:
        student.save_pretrained(directory)
        tokenizer.save(directory)
        records.write_record(
            directory,
            records.make_record(
                "distill", args, time.time() - state["seconds"], task="general", labels=[], data=described,
                params=params, flops=flops,
                weights=records.hash_files(directory, [modeling.WEIGHTS]),
                metrics={"step": step, "loss": state["losses"][-1][1]},
                losses=state["losses"], **provenance,
            ),
        )  # fmt: skip
    return target


def train(args, corpus, student, teacher, tokenizer, unfinished, save):
    """Trains the student; ``save(step, state)`` is called every --save_steps steps and at the end."""
    rank, world = training.rank_and_world()
    steps, accumulation = args.max_steps, args.gradient_accumulation_steps
    optimizer, schedule = training.make_optimizer(student, args, steps)
    scaler = paddle.amp.GradScaler(enable=args.use_amp, init_loss_scaling=args.scale_loss)
    state = training.load_training_state(unfinished, student, optimizer, schedule)
    if state and rank == 0:
        print(f"going on after step {state['step']} of {steps}")
    state = state or {"step": 0, "losses": [], "seconds": 0.0, "interval": []}
    scalars = utils.scalar_writer(args.visualdl_dir if rank == 0 else None)

    taught = relations.CapturedQKV(teacher, args.teacher_layer_index)
    learnt = relations.CapturedQKV(student, args.student_layer_index)
    teacher.eval()
    student.train()
    # Micro-batches are numbered over all processes, so that any split of them among processes is the same training.
    micro_batches = corpus.batches(args.batch_size, state["step"] * accumulation * world, args.group_by_length)
    # Keeps the summed loss near 1 (FP16 would overflow); the true number of rows divides the gradients at the end.
    expected_rows = float(args.num_relation_heads * args.batch_size * args.max_seq_length)
    started, first, tokens, interval = time.time() - state["seconds"], time.time(), 0, state["interval"]
    progress = tqdm(
        range(state["step"] + 1, steps + 1), total=steps, initial=state["step"], desc="distil", mininterval=1,
        disable=None if rank == 0 else True,
    )  # fmt: skip
    for step in progress:
        training.seed_step(args.seed, step)
        loss_sum, rows_sum = 0.0, 0.0
        for number in range(accumulation * world):
            _, texts = next(micro_batches)
            if number % world != rank:
                continue
            batch, count = encode(texts, tokenizer, args.max_seq_length)
            inputs = paddle.to_tensor(batch.input_ids), paddle.to_tensor(batch.token_type_ids)
            mask = (inputs[0] != tokenizer.pad_id).astype("float32")
            with paddle.amp.auto_cast(enable=args.use_amp):
                with paddle.no_grad():
                    teacher_qkv = taught.run(*inputs)
                student_qkv = learnt.run(*inputs)
            qkv = [[x.astype("float32") for x in captured] for captured in (teacher_qkv, student_qkv)]
            loss, rows = relations.relation_loss(*qkv, mask, args.num_relation_heads, args.alpha, args.beta)
            scaler.scale(loss / expected_rows).backward()
            loss_sum, rows_sum = loss_sum + float(loss), rows_sum + rows
            tokens += count
        loss_sum, rows_sum = training.sum_over_processes(loss_sum, rows_sum)
        training.sum_gradients(student.parameters(), factor=expected_rows / rows_sum)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.clear_grad()
        interval.append(loss_sum / rows_sum)
        if not args.use_amp:  # whose scaler leaves such a step out, and goes on
            training.check_loss(interval[-1], step)

        if step % args.logging_steps == 0 or step == steps:
            mean, interval = sum(interval) / len(interval), []
            state["losses"].append([step, round(mean, 8)])
            pace = tokens * world / (time.time() - first)
            if rank == 0:
                progress.write(f"step {step}/{steps} loss {mean:.6f} lr {schedule.get_lr():.2e} {pace:.0f} tokens/s")
            scalars({"train/loss": mean, "train/tokens_per_second": pace}, step)
        if rank == 0 and (step % args.save_steps == 0 or step == steps):
            state["seconds"], state["interval"] = time.time() - started, interval
            save(step, state)
            training.save_training_state(unfinished, step, student, optimizer, set(), state)


def main(argv=None):
    args = parse_args(argv)
    training.check_training_arguments(args)
    utils.check_positive(args, "gradient_accumulation_steps")
    args.max_seq_length = args.max_seq_length or 128
    args.device = utils.set_device(args.device)
    if args.use_amp and args.device == "cpu":
        raise utils.UserError("--use_amp: FP16 is for a GPU; on a CPU leave it out")
    rank, world = training.start_processes()
    corpus = Corpus(args.input_dir, args.seed)
    if args.max_steps <= 0:
        micro_batches = corpus.batches_per_epoch(args.batch_size) * args.num_train_epochs
        args.max_steps = max(1, micro_batches // (args.gradient_accumulation_steps * world))
    utils.set_seed(args.seed)
    student, teacher, tokenizer, provenance = load_pair(args)
    params, flops = modeling.count(student)
    described = {"corpus": corpus.describe()}
    now = records.identity(records.describe_arguments(args), provenance["parent"], described)
    final = os.path.join(args.output_dir, f"model_{args.max_steps}")
    with training.Unfinished(args.output_dir, shared=rank > 0) as unfinished:
        if records.finished(final, now, args.overwrite):
            unfinished.forget(now)
            print(f"{final}: already finished with these arguments, nothing to do")
            return
        unfinished.begin(now, args.overwrite)

        def save(step, state):
            print(f"saved {save_model(args, step, student, tokenizer, provenance, params, flops, described, state)}")

        train(args, corpus, student, teacher, tokenizer, unfinished, save)
        training.wait_for_all()
        if rank == 0:
            unfinished.remove()


if __name__ == "__main__":
    utils.run(main)
