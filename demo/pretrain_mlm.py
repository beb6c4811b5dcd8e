"""Pre-trains a small teacher from random weights by masked language modelling, where none can be downloaded.

Reads an architecture and a directory of text files with one sentence a line; writes the model, its tokenizer and
stage.json to --output_dir, whole, when it is done. The state to go on from is in <output_dir>.unfinished: the same
command resumes after a kill. A real teacher sees a thousand times more text: this one shows how the stages fit.

    python pretrain_mlm.py --init_config 4l-256h.json --vocab_file vocab.txt --input_dir corpus --output_dir teacher \\
        --max_steps 2000 --batch_size 64 --learning_rate 1e-3 --group_by_length
"""

import os
import sys
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path[:0] = [ROOT, os.path.join(ROOT, "general_distill")]
import compat  # noqa: F401  before Paddle

import numpy as np
import paddle
from tqdm import tqdm

import modeling
import records
import training
import utils
from corpus import Corpus, encode


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    main = parser.add_argument_group("model and text")
    modeling.add_model_arguments(main)
    main.add_argument("--input_dir", required=True, help="directory of text files, one sentence a line")
    main.add_argument("--output_dir", required=True, help="where the pre-trained model goes")
    main.add_argument(
        "--mlm_probability", type=float, default=0.15, help="share of the tokens that are to be predicted"
    )
    utils.add_tokenizer_arguments(main)
    optimization = parser.add_argument_group("training")
    training.add_training_arguments(optimization)
    parser.set_defaults(model_type="roberta", learning_rate=1e-3, batch_size=64, num_train_epochs=1, save_steps=500)
    return parser.parse_args(argv)


def mask_tokens(input_ids, tokenizer, probability, random):
    """BERT's masking (arXiv 1810.04805): of the chosen tokens 80 % become [MASK], 10 % any token, 10 % stay.

    Args: input_ids: int64 [batch, tokens].
    Returns: (masked input_ids; positions in the flattened batch, int64 [n]; the tokens that were there, int64 [n]).
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
    anything = positions[kind >= 0.9]
    masked[anything] = random.integers(0, len(tokenizer.vocab), len(anything))
    return masked.reshape(input_ids.shape), positions, expected


def train(args, corpus, model, tokenizer, unfinished):
    """Trains the model in place. Returns: the final state; its ``history`` has [step, loss in nats, accuracy] rows."""
    optimizer, schedule = training.make_optimizer(model, args, args.max_steps)
    state = training.load_training_state(unfinished, model, optimizer, schedule)
    if state:
        print(f"going on after step {state['step']} of {args.max_steps}")
    state = state or {"step": 0, "history": [], "seconds": 0.0, "sums": [0.0, 0, 0]}
    scalars = utils.scalar_writer(args.visualdl_dir)
    model.train()
    started, first, tokens, sums = time.time() - state["seconds"], time.time(), 0, np.array(state["sums"])
    stream = corpus.batches(args.batch_size, state["step"], args.group_by_length)
    steps = range(state["step"] + 1, args.max_steps + 1)
    progress = tqdm(steps, total=args.max_steps, initial=state["step"], desc="mlm", mininterval=1, disable=None)
    for step in progress:
        training.seed_step(args.seed, step)
        _, texts = next(stream)
        batch, count = encode(texts, tokenizer, args.max_seq_length)
        random = np.random.default_rng([args.seed, step])
        input_ids, positions, expected = mask_tokens(batch.input_ids, tokenizer, args.mlm_probability, random)
        inputs = paddle.to_tensor(input_ids), paddle.to_tensor(batch.token_type_ids)
        hidden = modeling.encoder_of(model)(*inputs)[0]
        # Scores over the whole vocabulary for the chosen tokens alone: a sixth of the work for all of them.
        chosen = paddle.gather(hidden.reshape([-1, hidden.shape[-1]]), paddle.to_tensor(positions))
        scores = model.lm_head(chosen)
        loss = paddle.nn.functional.cross_entropy(scores, paddle.to_tensor(expected))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.clear_grad()
        right = int((scores.argmax(-1).numpy() == expected).sum())
        training.check_loss(float(loss), step)
        sums += [float(loss) * len(expected), right, len(expected)]
        tokens += count
        if step % args.logging_steps == 0 or step == args.max_steps:
            loss, accuracy, sums = sums[0] / sums[2], sums[1] / sums[2], np.zeros(3)
            pace = tokens / (time.time() - first)
            state["history"].append([step, round(float(loss), 4), round(float(accuracy), 4)])
            progress.write(
                f"step {step}/{args.max_steps} loss {loss:.3f} accuracy {accuracy:.3f} "
                f"lr {schedule.get_lr():.2e} {pace:.0f} tokens/s"
            )
            scalars({"train/loss": loss, "train/accuracy": accuracy, "train/tokens_per_second": pace}, step)
        if step % args.save_steps == 0 or step == args.max_steps:
            state["seconds"], state["sums"] = time.time() - started, sums.tolist()
            training.save_training_state(unfinished, step, model, optimizer, set(), state)
    return state


def main(argv=None):
    args = parse_args(argv)
    training.check_training_arguments(args)
    if args.model_type != "roberta":
        raise utils.UserError(f"--model_type {args.model_type}: only roberta can be pre-trained here")
    if not 0 < args.mlm_probability < 1:
        raise utils.UserError(f"--mlm_probability {args.mlm_probability}: must be between 0 and 1")
    args.device = utils.set_device(args.device)
    args.max_seq_length = args.max_seq_length or 128
    utils.set_seed(args.seed)
    corpus = Corpus(args.input_dir, args.seed)
    if args.max_steps <= 0:
        args.max_steps = args.num_train_epochs * corpus.batches_per_epoch(args.batch_size)
    model, tokenizer, provenance = modeling.load(args, 2, "ForMaskedLM")
    modeling.check_sequence_length(args.max_seq_length, model)
    if "[MASK]" not in tokenizer.vocab:
        raise utils.UserError("the vocabulary has no [MASK], which masked language modelling needs")
    described = {"corpus": corpus.describe()}
    now = records.identity(records.describe_arguments(args), provenance["parent"], described)
    with training.Unfinished(args.output_dir) as unfinished:
        if records.finished(args.output_dir, now, args.overwrite):
            unfinished.forget(now)
            print(f"{args.output_dir}: already finished with these arguments, nothing to do")
            return
        unfinished.begin(now, args.overwrite)
        state = train(args, corpus, model, tokenizer, unfinished)
        params, flops = modeling.count(model)
        step, loss, accuracy = state["history"][-1]
        provenance["notes"].append(
            f"pre-trained on {os.path.basename(os.path.abspath(args.input_dir))} for {step} steps only"
        )
        with utils.whole_directory(args.output_dir, wait=True) as directory:
            model.save_pretrained(directory)
            tokenizer.save(directory)
            records.write_record(
                directory,
                records.make_record(
                    "pretrain", args, time.time() - state["seconds"], task="general", labels=[], data=described,
                    params=params, flops=flops, weights=records.hash_files(directory, [modeling.WEIGHTS]),
                    metrics={"step": step, "loss": loss, "accuracy": accuracy}, history=state["history"], **provenance,
                ),
            )  # fmt: skip
        unfinished.remove()
        print(f"masked tokens: loss {loss:.3f}, accuracy {accuracy:.3f} after step {step} -> {args.output_dir}")


if __name__ == "__main__":
    utils.run(main)
