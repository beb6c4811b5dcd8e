"""What the trainings share: their arguments, AdamW, the order of the data, the loop that selects on dev, the log.

The order of an epoch is a function of seed and epoch, and dropout is seeded anew from seed and step. So a killed run
resumes exactly as if it had not been killed, with no state of a random generator to save.
"""

import math
import sys

import numpy as np
from tqdm import tqdm

from common import UserError, batching, cli, objectives, predictions, processes
from common.compat import paddle


def add_training_arguments(parser, of_task=True, **defaults):
    """Adds the group of optimization arguments.

    Args: of_task: whether the script trains on records with labels, with fit, which can add up the gradients of several
        batches. defaults: those of this script that differ from fine-tuning's.
    """
    group = parser.add_argument_group("training")
    group.add_argument(
        "--learning_rate",
        type=float,
        default=5e-5,
        help="peak of AdamW's schedule; 3e-5 to 1e-4 for pre-trained weights, about 1e-3 for a small model from "
        "random weights; lower it if the loss rises or becomes NaN",
        positive=True,
    )
    help = "sequences at a time and device; lower it, and raise --gradient_accumulation_steps, if memory runs out"
    group.add_argument("--batch_size", type=int, default=32, help=help, positive=True)
    if of_task:
        help = "batches of --batch_size in a step, whose gradients are added up: two of 16 are the training of one of "
        help += "32, but for the random draws of dropout"
        group.add_argument("--gradient_accumulation_steps", type=int, default=1, help=help, positive=True)
        help = "balanced: a rare class weighs as much in the loss as a frequent one (classification only); finds more "
        help += "of the rare records, and takes more of the others for them"
        group.add_argument("--class_weight", choices=("balanced",), help=help)
    help = "passes over the train data; raise it for small data sets (CLUEWSC2020: 50)"
    group.add_argument("--num_train_epochs", type=int, default=3, help=help, positive=True)
    help = "if above 0: this many steps instead of epochs"
    group.add_argument("--max_steps", type=int, default=-1, help=help)
    help = "AdamW's decay of all weights but biases and layer norms"
    group.add_argument("--weight_decay", type=float, default=0.01, help=help)
    help = "steps of linear warm-up; 0 takes --warmup_proportion"
    group.add_argument("--warmup_steps", type=int, default=0, help=help)
    help = "warm-up as a share of all steps; raise it if training diverges at the start"
    group.add_argument("--warmup_proportion", type=float, default=0.1, help=help)
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon")
    help = "clips the global norm of the gradients; 0 does not clip"
    group.add_argument("--max_grad_norm", type=float, default=1.0, help=help)
    help = "put records of similar length into a batch: less padding, up to twice as fast, a little less random"
    group.add_flag("--group_by_length", help)
    help = "steps between loss lines"
    group.add_argument("--logging_steps", type=int, default=100, help=help, positive=True, without_effect=True)
    help = "steps between two evaluations, each with a checkpoint; raise it if evaluating takes longer than training"
    group.add_argument("--save_steps", type=int, default=100, help=help, positive=True)
    group.add_argument("--seed", type=int, default=42, help="seeds weights, order of the data, dropout")
    cli.add_device_argument(group)
    help = "also write scalars for VisualDL there"
    group.add_argument("--visualdl_dir", type=cli.PathArgument, help=help, without_effect=True)
    cli.add_overwrite_argument(group)
    group.set_defaults(**defaults)
    return group


def start(args):
    """Begins a training: device, processes that paddle.distributed.launch started, seed. Sets args.device."""
    args.device = cli.set_device(args.device)
    processes.start()
    cli.set_seed(args.seed)


def total_steps(args, examples):
    """Steps of the whole training: --max_steps, or epochs x batches (the last batch of an epoch may be smaller)."""
    return args.max_steps if args.max_steps > 0 else args.num_train_epochs * steps_per_epoch(args, examples)


def steps_per_epoch(args, examples):
    return math.ceil(examples / joint_size(args))


def joint_size(args):
    """Records of a step: --batch_size x --gradient_accumulation_steps x processes."""
    return args.batch_size * args.gradient_accumulation_steps * processes.world_size()


def convert(args, run, splits, tokenizer, task):
    """Texts to token ids, once for all epochs: {name of the split: list of batching.Feature}.

    Prints three samples and the plan of the training: what is wrong with them is wrong in everything that follows.

    Args: run: runs.ResumableRun. splits: {name: data.Split} with ``train``. task: data.Task.
    """
    processes.check_same(lambda: {"vocabulary": tokenizer.fingerprint()})
    features = {}
    for name, split in splits.items():
        features[name] = batching.convert(split.examples, tokenizer, args.max_seq_length)
    if run.is_first:
        batching.show_samples(splits["train"].examples, features["train"], tokenizer, task)
        show_plan(args, len(features["train"]))
    return features


def note_unknown_tokens(run, features, tokenizer):
    """Warns, and adds a note to the run, if more than 5 % of the tokens are unknown to the vocabulary."""
    unknown = unknown_share(features, tokenizer.unk_id)
    if unknown > 0.05:
        run.notes.append(f"{unknown:.0%} of train's tokens are unknown to the vocabulary")
        print(f"warning: {run.notes[-1]}: does it fit?", file=sys.stderr)


def unknown_share(features, unk_id):
    """The share of unknown tokens in a list of Feature; it is high if the vocabulary does not fit the data."""
    unknown = sum(feature.input_ids.count(unk_id) for feature in features)
    return unknown / max(1, sum(len(feature.input_ids) for feature in features))


def weights_of_batches(args, objective, features):
    """A function that gives, for a Batch, what loss and soft_loss take besides: {"weights": float32 [batch_size]} with
    --class_weight, else nothing.

    The weights have a mean of 1 over ``features``, and the loss is divided by the number of records, not by the sum of
    their weights. So it is the mean over any way to divide a joint batch, and the learning rate keeps its meaning.

    Args: features: list of batching.Feature to train on. Raises: UserError if the objective has no such weights.
    """
    if not args.class_weight:
        return lambda batch: {}
    weights = objective.balanced_weights(batching.targets(features)).astype("float32")
    if processes.is_first():
        print(f"class weights, {args.class_weight}: from {weights.min():.4g} to {weights.max():.4g}")
    return lambda batch: {"weights": paddle.to_tensor(weights[batch.index])}


def show_plan(args, examples):
    """Prints the steps and evaluations of a training on so many examples, with the arithmetic."""
    steps, per_epoch, world = total_steps(args, examples), steps_per_epoch(args, examples), processes.world_size()
    accumulated, size = args.gradient_accumulation_steps, f"{args.batch_size}"
    size += f" x {accumulated} accumulated" * (accumulated > 1) + f" x {world} processes" * (world > 1)
    size = f"({size})" if " " in size else size
    epochs = "--max_steps" if args.max_steps > 0 else f"x {args.num_train_epochs} epochs"
    warmup = args.warmup_steps or int(args.warmup_proportion * steps)
    print(
        f"plan: {examples:,} train records / {size} = {per_epoch:,} steps an epoch, {epochs} = {steps:,} steps; "
        f"warm-up {warmup:,} steps, to learning rate {args.learning_rate:g}; an evaluation every {args.save_steps} "
        f"steps, {math.ceil(steps / args.save_steps):,} in all"
    )


def make_optimizer(model, args, steps):
    """(AdamW that decays matrices only, its schedule of linear warm-up and linear decay)."""
    from paddlenlp.transformers import LinearDecayWithWarmup

    schedule = LinearDecayWithWarmup(args.learning_rate, steps, args.warmup_steps or args.warmup_proportion)
    decayed = {p.name for name, p in model.named_parameters() if "bias" not in name and "norm" not in name}
    decay = {"weight_decay": args.weight_decay, "apply_decay_param_fun": decayed.__contains__}
    clip = paddle.nn.ClipGradByGlobalNorm(args.max_grad_norm) if args.max_grad_norm > 0 else None
    options = {"parameters": model.parameters(), "epsilon": args.adam_epsilon, "grad_clip": clip}
    optimizer = paddle.optimizer.AdamW(learning_rate=schedule, **options, **decay)
    return optimizer, schedule


# Order of the data


def epoch_order(features, batch_size, seed, epoch, group):
    """The order of an epoch: int [len(features)]. Args: group: whether batches hold records of similar length."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(features))
    if group:
        order = group_by_length(order, [len(feature.input_ids) for feature in features], batch_size, random)
    return order


def group_by_length(order, lengths, batch_size, random):
    """A shuffled order, changed so that each batch holds records of similar length, and the batches shuffled again.

    Records are sorted within windows of 100 batches, which are far shorter than an epoch, so that epochs differ. A
    smaller last batch stays last.

    Args: order: int [n]. lengths: of all records. random: numpy.random.Generator. Returns: int [n].
    """
    lengths = np.asarray(lengths)
    windows = np.array_split(order, max(1, len(order) // (100 * batch_size)))
    order = np.concatenate([window[np.argsort(lengths[window], kind="stable")] for window in windows])
    whole = len(order) // batch_size * batch_size
    shuffled = random.permutation(order[:whole].reshape(-1, batch_size)).reshape(-1)
    return np.concatenate([shuffled, order[whole:]])


def seed_step(seed, step):
    """Seeds what a step draws, above all dropout, differently in each process."""
    paddle.seed((seed * 1_000_003 + step) * processes.world_size() + processes.rank())


def training_batches(features, args, first_step, steps, pad_id=0):
    """Yields (step, [(Batch, share)]) for the steps after ``first_step``. An epoch takes each record once.

    The joint batch of a step has --batch_size x --gradient_accumulation_steps x processes records. Each process takes
    its part of it, in batches of --batch_size: one, without accumulation. ``share`` is the size of a batch over that of
    the joint batch: its mean loss is multiplied by it, so that all gradients add up to those of the joint batch. A
    process for which no record is left gets an empty list.
    """
    size, of_process = joint_size(args), args.batch_size * args.gradient_accumulation_steps
    per_epoch = math.ceil(len(features) / size)
    order = None
    for step in range(first_step + 1, steps + 1):
        epoch, position = divmod(step - 1, per_epoch)
        if order is None or position == 0:
            order = epoch_order(features, size, args.seed, epoch, args.group_by_length)
        seed_step(args.seed, step)
        joint = order[position * size : (position + 1) * size]
        mine = joint[processes.rank() * of_process :][:of_process]
        # The same length in all batches and processes, because pruning's loss includes padding.
        length = max(len(features[i].input_ids) for i in joint)
        parts = [mine[start : start + args.batch_size] for start in range(0, len(mine), args.batch_size)]
        yield step, [(batching.collate(features, part, pad_id, length), len(part) / len(joint)) for part in parts]


# The loop


def fit(args, run, model, features, pad_id, losses_of, evaluate, objective, write, evaluate_first=False):
    """Trains a model and keeps the checkpoint that is best on dev, across kills of the process.

    Args:
        args: of add_training_arguments. run: runs.ResumableRun. features: lists of batching.Feature: of "train", "dev".
        losses_of: function that yields the losses of a Batch, float32 [] each. The gradients of all are added up. Each
            is propagated back before the next one is asked for, so that memory holds one graph at a time.
        evaluate: function without arguments that gives {width: logits of features["dev"]}, for each of the widths that
            share these weights. A single model has the width "".
        objective: makes metrics of the logits. The one that selects is larger for a better model; of equal ones the
            earlier checkpoint stays.
        write: function that writes the model's files into a directory.
        evaluate_first: whether to evaluate before the first step, too.
    Returns: the final state; its ``best`` has {width: metrics, step and ``directory`` of the best checkpoint}, its
        ``evaluations`` are a list of {"step": step, width: metrics, ...}.
    """
    # TNEWS: 53,360 records / 32 = 1,668 steps an epoch, x 3 epochs = 5,004 steps.
    progress = Progress(args, len(features["train"]))
    answers, targets = {}, batching.targets(features["dev"])

    def score():
        """{width: metrics on dev}. Settings, such as a multi-label threshold, are those that are best on dev."""
        answers.update(evaluate())
        return {width: objective.on_dev(logits, targets) for width, logits in answers.items()}

    def write_with_answers(directory, width):
        # The answers lie in the checkpoint, so that they are its own whatever kill comes between.
        write(directory)
        predictions.write(directory, answers[width], targets)

    # The learning rate rises over the first tenth of the steps, then falls to 0. Without the slow start, the large
    # gradients of a new classifier would damage the pre-trained weights.
    optimizer, schedule = make_optimizer(model, args, progress.steps)
    # After a kill: weights, AdamW's moments, step, evaluations and best of the last evaluation, so at most --save_steps
    # steps are repeated. No random state is kept: the order of the data and dropout follow from seed and step, so a run
    # that resumes with as many processes equals an uninterrupted one.
    state = run.restore(model, optimizer, schedule, best={}, evaluations=[])
    if "directory" in state["best"]:
        raise UserError(f"{run.work}: of an earlier version of this project; remove it, and training begins anew")
    if evaluate_first and not state["evaluations"] and run.is_first:
        scores = score()
        print("before training: " + ", ".join(figures(width, scores[width]) for width in scores))
        state["evaluations"].append({"step": 0, **scores})

    # Dropout is on while training, and off in modeling.predict.
    model.train()
    batches = training_batches(features["train"], args, state["step"], progress.steps, pad_id)
    for step, parts in progress.bar(batches, state["step"], args.task_name):
        # A single batch, unless gradients are accumulated. Without a record left, a process still takes part in the
        # sums below.
        mean_loss = 0.0
        for batch, share in parts:
            losses = []
            for loss in losses_of(batch):
                # share: the part of this batch in the records of the step, 1 for a single one, 1/2 for each of two.
                # Means weighted by it add up to the mean over all records, also where a last batch is divided unevenly.
                loss = loss * share
                loss.backward()
                losses.append(float(loss))
            mean_loss += sum(losses) / len(losses)
        # Sums the gradients over the processes, which wait for each other here; clips them (--max_grad_norm); takes one
        # step of AdamW and one of the schedule; clears the gradients.
        update(model, optimizer, schedule)
        progress.loss(step, mean_loss, schedule)

        # The published search evaluated every 100 steps: 51 times for TNEWS. The best checkpoint often lies within an
        # epoch. As dev chooses it, its dev score is a little optimistic. The other processes wait meanwhile.
        if run.is_first and (step % args.save_steps == 0 or step == progress.steps):
            keep_best(run, state, step, score(), objective.metric, write_with_answers, progress)
            # One rename makes it valid, so a kill meanwhile leaves the state before it. Older states are deleted, and
            # checkpoints but for those named here. The schedule is not saved: it follows from the step.
            run.save_state(step, model, optimizer, state, [best["directory"] for best in state["best"].values()])
    return state


def keep_best(run, state, step, scores, metric, write, progress):
    """Notes an evaluation in the state, and writes a checkpoint for each width that is better than before.

    One step is rarely the best for all widths, so each has a checkpoint of its own.

    Args: scores: {width: metrics}. metric: the one that selects. write: function of a directory and a width.
    """
    state["evaluations"].append({"step": step, **scores})
    shown = []
    for width, metrics in scores.items():
        found = metrics.get(metric)
        if not isinstance(found, (int, float)) or not math.isfinite(found):
            raise UserError(f"{metric} on dev is {found!r} at step {step}: an objective must give a finite number")
        best = state["best"].get(width)
        if best is None or metrics[metric] > best[metric]:
            best = {**metrics, "step": step, "directory": f"best-{width}-{step}"}
            state["best"][width] = best
            with run.checkpoint(best["directory"]) as directory:
                write(directory, width)
        shown.append(f"{figures(width, metrics)} (best {best[metric]:.4f} at step {best['step']})")
        progress.scalars(step, {f"dev/{key}{'_' if width else ''}{width}": figure for key, figure in metrics.items()})
    progress.write(f"step {step}/{progress.steps} dev {', '.join(shown)}")


def figures(width, metrics):
    """The metrics of a model as a text: "accuracy 0.5743 loss 1.3021", after its width if there are several."""
    numbers = {metric: figure for metric, figure in metrics.items() if isinstance(figure, (int, float))}
    shown = " ".join(f"{objectives.shown(metric)} {figure:.4f}" for metric, figure in numbers.items())
    return f"width {width} {shown}" if width else shown


# The update and the log


def update(model, optimizer, schedule):
    """One step of the optimizer with the gradients of all processes, which are cleared afterwards."""
    processes.sum_gradients(model.parameters())
    optimizer.step()
    schedule.step()
    optimizer.clear_grad()


def check_loss(loss, step):
    """Raises: UserError if the loss became NaN or infinite, from which no training recovers."""
    if not math.isfinite(loss):
        raise UserError(f"the loss of step {step} is {loss}; lower --learning_rate or --max_grad_norm with --overwrite")


class Progress:
    """Progress bar, loss lines and VisualDL scalars of a training; silent in all processes but the first.

    Args: examples: number of train records. The steps of the whole training are the attribute ``steps``.
    """

    def __init__(self, args, examples):
        self.args, self.steps = args, total_steps(args, examples)
        self.losses, self.progress_bar, self.writer = [], None, None
        if args.visualdl_dir and processes.is_first():
            from visualdl import LogWriter

            self.writer = LogWriter(args.visualdl_dir)

    def bar(self, iterable, first_step, description):
        """Yields what the iterable does; shows a bar on a terminal. Args: first_step: number of steps done before."""
        disable = None if processes.is_first() else True  # None: only where there is no terminal
        if first_step and processes.is_first():
            print(f"going on after step {first_step} of {self.steps}")
        self.progress_bar = tqdm(
            iterable, total=self.steps, initial=first_step, desc=description, mininterval=1, disable=disable
        )
        return self.progress_bar

    def loss(self, step, loss, schedule):
        """Takes this process's part of a step's loss; prints the mean every --logging_steps steps.

        Raises: UserError if the loss became NaN or infinite.
        """
        self.losses += processes.sum_over_processes(float(loss))
        check_loss(self.losses[-1], step)
        if step % self.args.logging_steps == 0:
            mean, learning_rate = sum(self.losses) / len(self.losses), schedule.get_lr()
            self.write(f"step {step}/{self.steps} loss {mean:.4f} lr {learning_rate:.2e}")
            self.scalars(step, {"train/loss": mean, "train/learning_rate": learning_rate})
            self.losses.clear()

    def write(self, line):
        if processes.is_first():
            self.progress_bar.write(line)

    def scalars(self, step, values):
        """Writes {tag: value} for VisualDL, if the user asked for it."""
        if self.writer:
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)
