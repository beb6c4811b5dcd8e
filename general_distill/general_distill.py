"""General (task-agnostic) distillation: a small student learns a large teacher's self-attention relations.

Reads a teacher (built-in name or directory), a student to start from (or --init_config), and a directory of text files
with one sentence per line. Writes <output_dir>/model_<step>/ every --save_steps steps and at the end, each a model
directory that finetuning/run_clue.sh takes. The state is in <output_dir>.unfinished: rerun the same command to resume.

    python general_distill.py --teacher_model_type roberta --teacher_model_name_or_path roberta-wwm-ext-large \\
        --student_model_name_or_path ppminilm-6l-768h --input_dir corpus --output_dir pretrain \\
        --teacher_layer_index 19 --student_layer_index 5 --num_relation_heads 64 --beta 1.0 --max_steps 400000
    python -m paddle.distributed.launch --nproc_per_node 2 general_distill.py ...    # batch_size is per process
"""

import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import relations
from common import UserError, checkpoints, cli, modeling, processes, training
from common.compat import paddle
from common.runs import ResumableRun
from corpus import Corpus, make_batch


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    models = parser.add_argument_group("models")
    families = sorted(modeling.MODEL_TYPES)
    models.add_argument("--model_type", default="ppminilm", choices=families, help="family of the student")
    help = "built-in name or directory; required unless --init_config or --num_layers"
    models.add_argument("--student_model_name_or_path", type=cli.NameOrPathArgument, help=help)
    help = "JSON file with the student's architecture: start from random weights"
    models.add_argument("--init_config", type=cli.PathArgument, help=help)
    help = "for --init_config; must be, and by default is, the teacher's"
    models.add_argument("--vocab_file", type=cli.PathArgument, help=help)
    models.add_argument("--teacher_model_type", default="roberta", choices=families, help="family of the teacher")
    help = "built-in name or directory; a better teacher gives a better student"
    models.add_argument("--teacher_model_name_or_path", type=cli.NameOrPathArgument, required=True, help=help)
    relations.add_relation_arguments(parser.add_argument_group("loss"))
    optimization = training.add_training_arguments(
        parser, of_task=False, learning_rate=6e-4, batch_size=128, warmup_proportion=0.01, save_steps=20000
    )
    help = "micro-batches of --batch_size per step and process; the published 1,024 sequences were 128 in each of 8 "
    help += (
        "processes, which 8 micro-batches of 128 in one process equal. Sample relations stay within a micro-batch, so "
    )
    help += "128 x 8 is another loss than 64 x 16"
    optimization.add_argument("--gradient_accumulation_steps", type=int, default=1, help=help, positive=True)
    optimization.add_flag("--use_amp", "compute in FP16 where possible, on a GPU")
    help = "initial loss scaling of --use_amp"
    optimization.add_argument("--scale_loss", type=float, default=2**15, help=help)
    inputs = parser.add_argument_group("data")
    help = "directory of text files, one sentence per line"
    inputs.add_argument("--input_dir", type=cli.PathArgument, required=True, help=help, without_effect=True)
    help = "each process reads only its share of the files: for a corpus that lies on the disks of several machines, a "
    help += "part on each"
    inputs.add_flag("--shard_corpus", help)
    cli.add_output_argument(inputs, "where model_<step> directories go", required=True)
    cli.add_tokenizer_arguments(inputs)
    args = parser.parse_args(argv)
    args.max_seq_length = args.max_seq_length or 128
    return args


def load_pair(args):
    """(teacher, student), each a checkpoints.Pretrained. Raises: UserError if they do not fit each other."""
    shared = {"use_faster_tokenizer": args.use_faster_tokenizer, "max_seq_length": args.max_seq_length, "kind": "Model"}
    option = "--teacher_model_name_or_path"
    teacher = checkpoints.load_pretrained(
        args.teacher_model_name_or_path, 2, model_type=args.teacher_model_type, option=option, **shared
    )
    # A student from random weights takes the teacher's vocabulary: relations compare the tokens of the same sequence.
    architecture = args.init_config
    if args.num_layers and not (architecture or args.student_model_name_or_path):
        architecture = {"num_hidden_layers": args.num_layers}  # the rest is that of ppminilm-6l-768h
    shared.update(init_config=architecture, vocab_file=args.vocab_file, tokenizer=teacher.tokenizer)
    option = "--student_model_name_or_path"
    student = checkpoints.load_pretrained(
        args.student_model_name_or_path, 2, model_type=args.model_type, option=option, **shared
    )
    if student.tokenizer.vocab != teacher.tokenizer.vocab:
        raise UserError(
            f"--student_model_name_or_path: its vocabulary ({len(student.tokenizer.vocab)} tokens) is not the "
            f"teacher's ({len(teacher.tokenizer.vocab)} tokens); relations compare the same tokens"
        )
    relations.check_layers(args, student.model.config, teacher.model.config)
    return teacher, student


def train(args, run, corpus, teacher, student):
    """Trains the student, and writes <output_dir>/model_<step> every --save_steps steps and at the end."""
    model, tokenizer = student.model, student.tokenizer
    world, accumulation = processes.world_size(), args.gradient_accumulation_steps
    progress = training.Progress(args, 0)
    # run.sh: 400,000 steps of 1,024 sentences = 410 million sentences. The learning rate rises for 1 % of them, 4,000
    # steps, and falls linearly to 0 over the rest.
    optimizer, schedule = training.make_optimizer(model, args, progress.steps)
    # FP16 gradients are multiplied by a scale, so that small ones do not become 0; without --use_amp this does nothing.
    scaler = paddle.amp.GradScaler(enable=args.use_amp, init_loss_scaling=args.scale_loss)
    state = run.restore(model, optimizer, schedule, losses=[], interval=[])

    # The teacher's layer 20 of 24 (index 19) teaches better than its last one, which is specialized in the teacher's
    # own training task (MiniLMv2). Both models run only up to the projections of these layers.
    teacher_layer = relations.CapturedQKV(teacher.model, args.teacher_layer_index)
    student_layer = relations.CapturedQKV(model, args.student_layer_index)
    teacher.model.eval()
    model.train()
    # Any division of the same micro-batches among processes is the same training. Another --batch_size is not: a sample
    # relates to the others of its micro-batch only (--beta).
    micro_batches = corpus.batches_of_process(args.batch_size, state["step"] * accumulation, args.group_by_length)
    # The loss is a sum over rows (heads x tokens x sentences), divided by their number. That number is known only when
    # all micro-batches of the step have been seen, so the sum is first divided by an estimate, which keeps it near 1
    # (FP16 would overflow), and the gradients are corrected at the end.
    expected_rows = float(args.num_relation_heads * args.batch_size * args.max_seq_length)
    # Killed after its last step, or its result was removed: nothing is left but to write it.
    if run.is_first and state["step"] == progress.steps:
        save_model(args, run, state["step"], student, state["losses"])
    started, tokens, interval = time.time(), 0, state["interval"]
    for step in progress.bar(range(state["step"] + 1, progress.steps + 1), state["step"], "distil"):
        # Dropout of the student is a function of seed and step, so a resumed run repeats it exactly.
        training.seed_step(args.seed, step)
        loss_sum, rows_sum = 0.0, 0.0
        for _ in range(accumulation):
            _, texts = next(micro_batches)
            # Tokenized here, not beforehand: the corpus may be larger than memory.
            batch, count = make_batch(texts, tokenizer, args.max_seq_length)
            inputs = modeling.tensors(batch)
            mask = (inputs[0] != tokenizer.pad_id).astype("float32")
            with paddle.amp.auto_cast(enable=args.use_amp):
                with paddle.no_grad():
                    teacher_qkv = teacher_layer.run(*inputs)
                student_qkv = student_layer.run(*inputs)
            # The softmax of the relations needs FP32. Teacher and student may have different widths and heads: both are
            # regrouped into the same number of relation heads (64 for a large teacher).
            qkv = [[x.astype("float32") for x in captured] for captured in (teacher_qkv, student_qkv)]
            loss, rows = relations.relation_loss(
                *qkv, mask, args.num_relation_heads, args.alpha, args.beta, args.relation_mb
            )
            scaler.scale(loss / expected_rows).backward()
            loss_sum, rows_sum = loss_sum + float(loss), rows_sum + rows
            tokens += count
        # Sums over all micro-batches of all processes, then one division: the mean over all rows of the step.
        loss_sum, rows_sum = processes.sum_over_processes(loss_sum, rows_sum)
        processes.sum_gradients(model.parameters(), factor=expected_rows / rows_sum)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.clear_grad()
        interval.append(loss_sum / rows_sum)
        if not args.use_amp:  # with it, the scaler leaves such a step out and goes on
            training.check_loss(interval[-1], step)

        is_saved = step % args.save_steps == 0 or step == progress.steps
        if step % args.logging_steps == 0 or is_saved:
            mean, interval = sum(interval) / len(interval), []
            state["losses"].append([step, round(mean, 8)])
            pace = round(tokens * world / (time.time() - started))
            progress.write(f"step {step}/{progress.steps} loss {mean:.6f} lr {schedule.get_lr():.2e} {pace} tokens/s")
            progress.scalars(step, {"train/loss": mean, "train/tokens_per_second": pace})
        if run.is_first and is_saved:
            save_model(args, run, step, student, state["losses"])
            run.save_state(step, model, optimizer, {**state, "interval": interval})


def save_model(args, run, step, student, losses):
    """Writes model_<step>, a directory that every later stage takes as a model."""
    # There is no dev set: the loss shows that training makes progress, and only fine-tuning shows what the student is
    # worth. So several steps are kept, to be compared on a task.
    directory = os.path.join(args.output_dir, f"model_{step}")
    with run.output(directory, metrics={"step": step, "loss": losses[-1][1]}, losses=losses) as target:
        student.model.save_pretrained(target)
        student.tokenizer.save(target)
    print(f"saved {directory}")


def main(argv=None):
    args = parse_args(argv)
    training.start(args)
    if args.use_amp and args.device == "cpu":
        raise UserError("--use_amp: FP16 is for a GPU; on a CPU leave it out")
    corpus = Corpus(args.input_dir, args.seed, args.shard_corpus)
    # One step takes as many micro-batches as all processes accumulate.
    per_step = args.gradient_accumulation_steps * processes.world_size()
    if args.max_steps <= 0:
        micro_batches = corpus.batches_per_epoch(args.batch_size) * args.num_train_epochs
        args.max_steps = max(1, micro_batches // per_step)
    teacher, student = load_pair(args)
    notes = [f"student: {note}" for note in student.notes] + [f"teacher: {note}" for note in teacher.notes]
    teacher_fields = {"model": teacher.fields["model"], "parent": teacher.parent, "notes": teacher.notes}
    fields = {"task": "general", "labels": [], "teacher": teacher_fields, "notes": notes, **student.fields}
    final = os.path.join(args.output_dir, f"model_{args.max_steps}")
    with ResumableRun("distill", args, [final], student.parent, {"corpus": corpus.describe()}, **fields) as run:
        if run.finished:
            return
        # What the student learns from is not among the weights that it starts from, which a run compares itself.
        processes.check_same(
            lambda: {"vocabulary": teacher.tokenizer.fingerprint(), "teacher": modeling.fingerprint(teacher.model)}
        )
        if run.is_first:
            corpus.show_samples(teacher.tokenizer, args.max_seq_length)
            print(
                f"plan: {args.max_steps:,} steps of {args.batch_size} sentences x {per_step} micro-batches = "
                f"{args.max_steps * args.batch_size * per_step:,} sentences; layer {args.teacher_layer_index} of the "
                f"teacher to layer {args.student_layer_index} of the student, {args.num_relation_heads} relation heads"
            )
        train(args, run, corpus, teacher, student)


if __name__ == "__main__":
    cli.run(main)
