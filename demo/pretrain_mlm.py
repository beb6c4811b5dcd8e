"""Pre-trains a small teacher from random weights by masked language modelling, if none can be downloaded.

Reads an architecture and a directory of text files with one sentence per line. Writes the model, its tokenizer and
stage.json to --output_dir at the end. Training states go to <output_dir>.unfinished; rerun the same command to resume.
Real teachers see a thousand times more text; this one only shows how the stages work together.

    python pretrain_mlm.py --init_config ../configs/teacher-2l-192h.json --vocab_file vocab.txt --input_dir corpus \\
        --output_dir teacher --max_steps 2000 --batch_size 64 --learning_rate 1e-3 --group_by_length --warm_start
"""

import os
import sys
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path[:0] = [ROOT, os.path.join(ROOT, "general_distill")]
from common import UserError, checkpoints, cli, modeling, processes, training
from common.compat import paddle
from common.runs import ResumableRun
from corpus import Corpus, make_batch
from word_vectors import warm_start

import numpy as np


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    main = parser.add_argument_group("model and text")
    checkpoints.add_model_arguments(main)
    main.set_defaults(model_type="roberta")
    help = "directory of text files, one sentence per line"
    main.add_argument("--input_dir", type=cli.PathArgument, required=True, help=help, without_effect=True)
    cli.add_output_argument(main, "directory for the pre-trained model", required=True)
    help = "fraction of the tokens to mask and predict"
    main.add_argument("--mlm_probability", type=float, default=0.15, help=help)
    help = "start the embeddings from word vectors, counted in the corpus: the model learns to use context earlier "
    help += "(general_distill/README.md). Then 1e-3 is a good --learning_rate, and 4e-3 is too much"
    main.add_flag("--warm_start", help)
    cli.add_tokenizer_arguments(main)
    training.add_training_arguments(
        parser, of_task=False, learning_rate=1e-3, batch_size=64, num_train_epochs=1, save_steps=500
    )
    args = parser.parse_args(argv)
    if args.model_type != "roberta":
        raise UserError(f"--model_type {args.model_type}: only roberta can be pre-trained here")
    if not 0 < args.mlm_probability < 1:
        raise UserError(f"--mlm_probability {args.mlm_probability}: must be between 0 and 1")
    if args.warm_start and not args.init_config:
        raise UserError("--warm_start would replace trained embeddings; it goes with --init_config")
    args.max_seq_length = args.max_seq_length or 128
    return args


def mask_tokens(input_ids, tokenizer, probability, random):
    """BERT's masking (arXiv 1810.04805): 80 % of the chosen tokens become [MASK], 10 % a random token, 10 % stay.

    Args: input_ids: int64 [batch, tokens].
    Returns: (masked input_ids; positions in the flattened batch, int64 [n]; their original tokens, int64 [n]).
        At least one token is chosen.
    """
    special = np.isin(input_ids, [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id])
    drawn = np.where(special, 2.0, random.random(input_ids.shape)).reshape(-1)
    positions = np.flatnonzero(drawn < probability)
    if not len(positions):
        positions = np.array([drawn.argmin()])
    masked = input_ids.reshape(-1).copy()
    expected = masked[positions].copy()
    kind = random.random(len(positions))
    masked[positions[kind < 0.8]] = tokenizer.vocab.index("[MASK]")
    randomized = positions[kind >= 0.9]
    masked[randomized] = random.integers(0, len(tokenizer.vocab), len(randomized))
    return masked.reshape(input_ids.shape), positions, expected


def train(args, run, corpus, model, tokenizer):
    """Trains the model in place. Returns: the final state; its ``history`` has [step, loss in nats, accuracy] rows."""
    progress = training.Progress(args, 0)
    optimizer, schedule = training.make_optimizer(model, args, args.max_steps)
    if args.warm_start and not run.resumes:
        warm_start(model, corpus.lines(0), tokenizer, args.max_seq_length)
    state = run.restore(model, optimizer, schedule, history=[], sums=[0.0, 0, 0])
    model.train()
    started, tokens, sums = time.time(), 0, np.array(state["sums"])
    stream = corpus.batches(args.batch_size, state["step"], args.group_by_length)
    for step in progress.bar(range(state["step"] + 1, args.max_steps + 1), state["step"], "mlm"):
        training.seed_step(args.seed, step)
        _, texts = next(stream)
        batch, count = make_batch(texts, tokenizer, args.max_seq_length)
        random = np.random.default_rng([args.seed, step])
        input_ids, positions, expected = mask_tokens(batch.input_ids, tokenizer, args.mlm_probability, random)
        hidden = modeling.encoder_of(model)(*modeling.tensors(batch._replace(input_ids=input_ids)))[0]
        # Vocabulary scores are computed for the chosen tokens only: a sixth of the work that all tokens would take.
        chosen = paddle.gather(hidden.reshape([-1, hidden.shape[-1]]), paddle.to_tensor(positions))
        scores = model.lm_head(chosen)
        loss = paddle.nn.functional.cross_entropy(scores, paddle.to_tensor(expected))
        loss.backward()
        training.update(model, optimizer, schedule)
        right = int((scores.argmax(-1).numpy() == expected).sum())
        training.check_loss(float(loss), step)
        sums += [float(loss) * len(expected), right, len(expected)]
        tokens += count
        if step % args.logging_steps == 0 or step == args.max_steps:
            loss, accuracy, sums = sums[0] / sums[2], sums[1] / sums[2], np.zeros(3)
            pace = tokens / (time.time() - started)
            state["history"].append([step, round(float(loss), 4), round(float(accuracy), 4)])
            progress.write(
                f"step {step}/{args.max_steps} loss {loss:.3f} accuracy {accuracy:.3f} "
                f"lr {schedule.get_lr():.2e} {pace:.0f} tokens/s"
            )
            scalars = {"train/loss": loss, "train/accuracy": accuracy, "train/tokens_per_second": pace}
            progress.scalars(step, scalars)
        if step % args.save_steps == 0 or step == args.max_steps:
            run.save_state(step, model, optimizer, {**state, "sums": sums.tolist()})
    return state


def main(argv=None):
    args = parse_args(argv)
    training.start(args)
    if processes.world_size() > 1:
        raise UserError("pretrain_mlm.py trains in one process")
    corpus = Corpus(args.input_dir, args.seed)
    if args.max_steps <= 0:
        args.max_steps = args.num_train_epochs * corpus.batches_per_epoch(args.batch_size)
    start = checkpoints.load_pretrained_for(args, 2, "ForMaskedLM")
    if "[MASK]" not in start.tokenizer.vocab:
        raise UserError("the vocabulary has no [MASK], which masked language modelling needs")
    fields = {"task": "general", "labels": [], "notes": start.notes, **start.fields}
    described = {"corpus": corpus.describe()}
    with ResumableRun("pretrain", args, [args.output_dir], start.parent, described, **fields) as run:
        if run.finished:
            return
        state = train(args, run, corpus, start.model, start.tokenizer)
        step, loss, accuracy = state["history"][-1]
        name = os.path.basename(os.path.abspath(args.input_dir))
        run.notes.append(f"pre-trained on {name} for {step} steps only")
        metrics = {"step": step, "loss": loss, "accuracy": accuracy}
        with run.output(args.output_dir, metrics=metrics, history=state["history"]) as directory:
            start.model.save_pretrained(directory)
            start.tokenizer.save(directory)
        print(f"masked tokens: loss {loss:.3f}, accuracy {accuracy:.3f} after step {step} -> {args.output_dir}")


if __name__ == "__main__":
    cli.run(main)
