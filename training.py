"""What fine-tuning and pruning share: their arguments, AdamW, the order of the data, states to go on from."""

import contextlib
import json
import math
import os
import re
import shutil
import zipfile

import compat  # noqa: F401  before Paddle

import numpy as np
import paddle

import data
import records
import utils


def add_training_arguments(group):
    """The optimization arguments that fine-tuning and pruning share."""
    group.add_argument(
        "--learning_rate",
        type=float,
        default=5e-5,
        help="peak of AdamW's schedule; 3e-5 to 1e-4 for "
        "pre-trained weights, about 1e-3 for a small model from random weights",
    )
    group.add_argument("--batch_size", type=int, default=32, help="sequences per step and device")
    group.add_argument("--num_train_epochs", type=int, default=3, help="passes over the train data")
    group.add_argument("--max_steps", type=int, default=-1, help="if above 0: that many steps instead of epochs")
    group.add_argument("--weight_decay", type=float, default=0.01, help="not on biases and layer norms")
    group.add_argument("--warmup_steps", type=int, default=0, help="steps of linear warm-up; if 0, --warmup_proportion")
    group.add_argument("--warmup_proportion", type=float, default=0.1, help="warm-up as a share of all steps")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="clipping of the global gradient norm; 0: none")
    group.add_argument(
        "--group_by_length",
        nargs="?",
        const=True,
        default=False,
        type=utils.boolean,
        help="put records of similar length into a batch: less padding, up to twice as fast, a little less random",
    )
    group.add_argument("--logging_steps", type=int, default=100, help="steps between two lines of loss")
    group.add_argument(
        "--save_steps", type=int, default=100, help="steps between two evaluations, each with a checkpoint"
    )
    group.add_argument("--seed", type=int, default=42, help="seeds weights, order of the data, dropout")
    group.add_argument("--device", help="gpu or cpu (default: gpu if Paddle has one)")
    group.add_argument("--visualdl_dir", help="write scalars for VisualDL there")
    group.add_argument("--overwrite", action="store_true", help="replace the output of a run with other arguments")


def check_training_arguments(args):
    utils.check_positive(args, "batch_size", "num_train_epochs", "save_steps", "logging_steps", "learning_rate")


def total_steps(args, examples):
    """Steps of the whole training: --max_steps, or epochs x batches (the last batch of an epoch may be smaller)."""
    joint = args.batch_size * rank_and_world()[1]
    return args.max_steps if args.max_steps > 0 else args.num_train_epochs * math.ceil(examples / joint)


def make_optimizer(model, args, steps):
    """(AdamW with decay on matrices only, its linear warm-up and decay schedule)."""
    from paddlenlp.transformers import LinearDecayWithWarmup

    schedule = LinearDecayWithWarmup(args.learning_rate, steps, args.warmup_steps or args.warmup_proportion)
    decayed = {p.name for name, p in model.named_parameters() if "bias" not in name and "norm" not in name}
    optimizer = paddle.optimizer.AdamW(
        learning_rate=schedule,
        epsilon=args.adam_epsilon,
        weight_decay=args.weight_decay,
        apply_decay_param_fun=decayed.__contains__,
        parameters=model.parameters(),
        grad_clip=paddle.nn.ClipGradByGlobalNorm(args.max_grad_norm) if args.max_grad_norm > 0 else None,
    )
    return optimizer, schedule


def epoch_order(features, batch_size, seed, epoch, by_length):
    """The order of an epoch, a function of seed and epoch: int [len(features)]."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(features))
    if by_length:
        order = group_by_length(order, [len(f.input_ids) for f in features], batch_size, random)
    return order


def group_by_length(order, lengths, batch_size, random):
    """A shuffled order, int [n], changed so that its batches hold records of similar length and are shuffled anew.

    It is sorted within windows of 100 batches, which are far shorter than an epoch. A last smaller batch stays last.
    """
    lengths = np.asarray(lengths)
    windows = np.array_split(order, max(1, len(order) // (100 * batch_size)))
    order = np.concatenate([window[np.argsort(lengths[window], kind="stable")] for window in windows])
    whole = len(order) // batch_size * batch_size
    shuffled = random.permutation(order[:whole].reshape(-1, batch_size)).reshape(-1)
    return np.concatenate([shuffled, order[whole:]])


def seed_step(seed, step):
    """Seeds what a step draws, dropout above all, apart for each process: so no state of a generator need be kept."""
    rank, world = rank_and_world()
    paddle.seed((seed * 1_000_003 + step) * world + rank)


def training_batches(features, args, first_step, steps, pad_id=0):
    """Yields (step, Batch, share) for the steps after ``first_step``. An epoch sees each record once.

    Of several processes each gets its part of the joint batch, which is --batch_size times their number; share is the
    part's size over the joint batch's, by which its mean loss is to be multiplied. An empty part has no Batch.
    The order is a function of seed and epoch, and dropout is seeded anew from seed and step: so a run that was killed
    goes on exactly as if it had not been, with no state of a random generator to save.
    """
    rank, world = rank_and_world()
    joint_size = args.batch_size * world
    per_epoch = math.ceil(len(features) / joint_size)
    order = None
    for step in range(first_step + 1, steps + 1):
        epoch, position = divmod(step - 1, per_epoch)
        if order is None or position == 0:
            order = epoch_order(features, joint_size, args.seed, epoch, args.group_by_length)
        seed_step(args.seed, step)
        joint = order[position * joint_size : (position + 1) * joint_size]
        part = joint[rank * args.batch_size : (rank + 1) * args.batch_size]
        length = max(len(features[i].input_ids) for i in joint)  # of the joint batch: pruning's loss counts padding
        yield step, data.collate(features, part, pad_id, length) if len(part) else None, len(part) / len(joint)


# Several processes (python -m paddle.distributed.launch), on GPUs or on CPUs through gloo


def start_processes():
    """Joins the processes that paddle.distributed.launch started, if it did. Returns: (rank, number of processes)."""
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1:
        with utils.quiet():
            paddle.distributed.init_parallel_env()
    return rank_and_world()


def rank_and_world():
    return paddle.distributed.get_rank(), paddle.distributed.get_world_size()


def sum_over_processes(*numbers):
    """The sums of numbers over all processes, as a list of float."""
    if rank_and_world()[1] == 1:
        return list(numbers)
    total = paddle.to_tensor(numbers, dtype="float64")
    paddle.distributed.all_reduce(total)
    return total.tolist()


@paddle.no_grad()
def sum_gradients(parameters, factor=1.0):
    """Makes each gradient its sum over all processes, times ``factor``. A process without one counts as zero."""
    several = rank_and_world()[1] > 1
    for parameter in parameters:
        if parameter.stop_gradient:
            continue
        if parameter.grad is None:
            if not several:
                continue
            parameter.grad = paddle.zeros_like(parameter)
        if several:
            paddle.distributed.all_reduce(parameter.grad)
        if factor != 1.0:
            parameter.grad.scale_(factor)


def check_loss(loss, step):
    """Raises: UserError for a loss that is not a number any more, from which no training comes back."""
    if not math.isfinite(loss):
        raise utils.UserError(
            f"the loss of step {step} is {loss}; try a lower --learning_rate or --max_grad_norm, with --overwrite"
        )


def wait_for_all():
    if rank_and_world()[1] > 1:
        paddle.distributed.barrier()


class Unfinished:
    """The working directory ``<output>.unfinished`` of a run: what kill -9 leaves, and the same command goes on from.

    ``state-<step>/`` holds the newest state, written whole; older ones go when it is there. To be used in a with block:
    as long as it lasts, no other run can begin there. If it ends with no state saved, the directory goes.
    """

    def __init__(self, output_dir, shared=False):
        """shared: another process of this run (rank 0) holds the lock and writes. Raises: UserError, see utils.Lock."""
        self.directory = os.path.abspath(output_dir) + ".unfinished"
        self.gone = os.path.join(os.path.dirname(self.directory), f".{os.path.basename(self.directory)}")
        self.identity = os.path.join(self.directory, "identity.json")
        self.lock = None if shared else utils.Lock(self.directory, os.path.join(self.directory, "lock"))
        wait_for_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.lock or self.lock.file.closed:  # removed: what has that name by now is another run's
            return
        if self.newest_state() is None:
            self.remove()
        self.lock.release()

    def begin(self, now, force=False):
        """Makes sure that what lies here is of the run with the identity ``now`` (records.identity), or, by ``force``,
        that it goes. Raises: UserError if it is of another."""
        if self.lock:
            before = self.read_identity()
            changed = records.difference(before, now) if before is not None else ""
            if changed and not force and self.newest_state() is not None:
                raise utils.UserError(
                    f"{self.directory}: an unfinished run of something else ({changed}); repeat its "
                    "command, remove the directory, or pass --overwrite"
                )
            if before != now:  # whatever lies here is not this run's
                self.remove_states([])
            utils.write_whole(self.identity, json.dumps(now, ensure_ascii=False))
        wait_for_all()  # before the others look for a state

    def read_identity(self):
        if not os.path.isfile(self.identity):
            return None
        try:
            with open(self.identity, encoding="utf-8") as file:
                return dict(json.load(file))
        except (ValueError, TypeError) as error:
            raise utils.UserError(f"{self.identity}: damaged ({error}); remove {self.directory}") from error

    def forget(self, now):
        """Of a run that is finished: removes what it left if it was killed before it could."""
        with contextlib.suppress(utils.UserError):  # a damaged identity is not this run's
            if self.lock and self.read_identity() == now:
                self.remove()

    def newest_state(self):
        """The directory of the newest whole state, or None."""
        names = [name for name in os.listdir(self.directory) if re.fullmatch(r"state-\d+", name)]
        newest = max(names, key=lambda name: int(name.split("-")[1]), default=None)
        return newest and os.path.join(self.directory, newest)

    def remove_states(self, keep):
        """Removes every entry but the lock, the identity, and ``keep``."""
        for name in set(os.listdir(self.directory)) - {"lock", "identity.json", *keep}:
            path = os.path.join(self.directory, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)

    def remove(self):
        shutil.rmtree(self.gone, ignore_errors=True)
        os.rename(self.directory, self.gone)  # at once, so that no half of it is ever taken for a state
        shutil.rmtree(self.gone)
        self.lock.release()


ADAM_STATE = ("moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0")


def save_training_state(unfinished, step, model, optimizer, best, state):
    """Writes ``state-<step>`` whole: parameters, optimizer and ``state`` (JSON); then removes what it supersedes.

    best: the names of entries of the working directory that the state refers to.
    """
    own = optimizer.state_dict()
    with utils.whole_directory(os.path.join(unfinished.directory, f"state-{step}")) as directory:
        np.savez(os.path.join(directory, "model.npz"), **{k: v.numpy() for k, v in model.state_dict().items()})
        # Paddle keys the optimizer's state by names that depend on how many layers the process made before; ours are
        # the parameters' places in the model.
        np.savez(
            os.path.join(directory, "optimizer.npz"),
            **{
                f"{place}/{kind}": own[f"{parameter.name}_{kind}"].numpy()
                for place, parameter in model.named_parameters()
                for kind in ADAM_STATE
                if f"{parameter.name}_{kind}" in own
            },
        )
        utils.write_whole(os.path.join(directory, "state.json"), json.dumps({**state, "step": step}))
    unfinished.remove_states({f"state-{step}", *best})


def load_training_state(unfinished, model, optimizer, schedule):
    """Restores the newest state into model, optimizer and schedule. Returns: its ``state`` or None."""
    directory = unfinished.newest_state()
    if directory is None:
        return None
    names, loaded = {place: parameter.name for place, parameter in model.named_parameters()}, {}
    try:
        with open(os.path.join(directory, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
        with np.load(os.path.join(directory, "model.npz")) as arrays:
            parameters = {key: paddle.to_tensor(arrays[key]) for key in arrays.files}
        with np.load(os.path.join(directory, "optimizer.npz")) as arrays:
            for key in arrays.files:
                place, kind = key.rsplit("/", 1)
                loaded[f"{names[place]}_{kind}"] = paddle.to_tensor(arrays[key])
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise utils.UserError(
            f"{directory}: damaged ({error}); remove {unfinished.directory}, and training begins anew"
        ) from error
    model.set_state_dict(parameters)
    schedule.step(state["step"])
    optimizer.set_state_dict({**loaded, "LR_Scheduler": schedule.state_dict()})
    return state
