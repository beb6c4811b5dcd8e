"""One run of a stage: it never mixes results, resumes after a kill, and writes each output whole with its stage.json.

    with ResumableRun("finetune", args, [args.output_dir], parent, data, task=...) as run:
        if run.finished:
            return
        state = run.restore(model, optimizer, schedule, best=None)
        ...                                                      # train from state["step"] on, and now and then
        run.save_state(step, model, optimizer, state)
        with run.output(args.output_dir, metrics=...) as directory:
            model.save_pretrained(directory)                     # appears as args.output_dir, with stage.json

Run is the same for short work, which has no state to save.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import time
import zipfile

import numpy as np

from common import UserError, cli, files, processes, provenance, records
from common.checkpoints import WEIGHTS
from common.compat import paddle


def check_replaceable(directory, stage, inside=()):
    """Raises: UserError unless a directory is absent, empty or a result of that stage.

    Args: inside: paths that must not lie in the directory, as replacing it would remove them.
    """
    for path in (os.getcwd(), *inside):
        if os.path.commonpath([os.path.abspath(directory), os.path.abspath(path)]) == os.path.abspath(directory):
            raise UserError(f"{directory}: cannot be the output, {path} lies in it")
    if os.path.exists(directory) and os.listdir(directory):
        written_by = None
        path = os.path.join(directory, records.RECORD)
        # Not read_record: a record of another version will do.
        with contextlib.suppress(OSError, ValueError, AttributeError), open(path, encoding="utf-8") as file:
            written_by = json.load(file).get("stage")
        if written_by != stage:
            raise UserError(f"{directory}: exists and holds something else; name another directory or remove it")


class Run:
    """One run of a stage.

    Args:
        stage: its name in stage.json.
        args: cli.Arguments. They are recorded; ``--overwrite``, where a script has it, replaces other results.
        parent: {path, weights} of the directory that the run starts from (records.parent_of), or None.
        data: {name of a split: its description with ``md5``}.
        notes: of what the run starts from: what was random or partial. The run adds which of its own data are partial;
            ``run.notes`` can be extended until the output is written.
        noted_by: what stands before the notes of this run, such as "pruning: ".
        fields: what the records of all outputs say besides: task, labels, model, params, flops.
    """

    waits_for_readers = False  # whether output() waits for a process that holds the lock of its directory
    shared_code = ("../data.py", "batching.py", "objectives.py", "tokenization.py")

    def __init__(self, stage, args, parent=None, data=None, notes=(), noted_by="", **fields):
        self.stage, self.arguments = stage, cli.describe(args)
        self.without_effect, self.overwrite = args.without_effect, getattr(args, "overwrite", False)
        self.fields = {"parent": parent, "data": data or {}, **fields}
        partial = {name: split["partial"] for name, split in self.fields["data"].items() if split.get("partial")}
        self.notes = [*notes, *(f"{noted_by}partial {name} data: {why}" for name, why in partial.items())]
        if processes.world_size() > 1:  # each takes --batch_size records, so another number is another training
            self.fields["processes"] = processes.world_size()
        self.identity = self.identity_of({"arguments": self.arguments, **self.fields})
        self.fields["code"] = provenance.code_of(self.shared_code)

    def identity_of(self, record):
        arguments = {**record["arguments"], "number of processes": record.get("processes", 1)}
        parent, data, objective = record["parent"], record["data"], record.get("objective")
        return provenance.identity(arguments, parent, data, self.without_effect, objective)

    def has_made(self, record, ignoring=()):
        """Whether a record is that of exactly this run. Args: ignoring: names of arguments that may differ."""
        before = self.identity_of(record)
        return all(before.get(name) == value for name, value in self.identity.items() if name not in ignoring)

    def has_finished(self, directory):
        """Whether a directory holds the result of exactly this run, so that there is nothing to do.

        Raises: UserError if it holds something else. ``--overwrite`` allows to replace another result of this project,
        and nothing but that.
        """
        files.put_back(directory)
        if not os.path.exists(directory) or not os.listdir(directory):
            return False
        if not os.path.isfile(os.path.join(directory, records.RECORD)):
            raise UserError(
                f"{directory}: exists and is not this project's; name another output directory or remove it"
            )
        if self.overwrite:
            return False
        record = records.read_record(directory)
        changed = provenance.difference(self.identity_of(record), self.identity)
        if changed:
            raise UserError(
                f"{directory}: holds the result of something else ({changed}); "
                "--overwrite replaces it, or name another output directory"
            )
        records.check_files(directory, record)
        changed = provenance.changed_code(record.get("code") or {}, self.fields["code"])
        if changed:
            print(f"warning: {directory}: made before {changed} changed; --overwrite makes it anew", file=sys.stderr)
        files.clear_leftovers(directory)
        return True

    @contextlib.contextmanager
    def output(self, directory, weights=(WEIGHTS,), **fields):
        """A temporary directory that becomes ``directory``, with a stage.json, when the block ends without an error.

        Args:
            weights: names of the files whose hashes tell this model from others.
            fields: what this record says besides the run's. They are read when the block ends, so that a dict such as
                ``metrics`` can be filled in within the block.
        """
        started = time.time()
        with files.whole_directory(directory, wait=self.waits_for_readers) as scratch:
            yield scratch
            hashes = files.hash_files(scratch, weights)
            notes = list(dict.fromkeys(self.notes))  # each once: a note of this run may be one of its parent's, too
            fields = {**self.fields, "notes": notes, "weights": hashes, **fields}
            record = records.make_record(self.stage, self.arguments, self.seconds(started), **fields)
            records.write_record(scratch, record)

    def seconds(self, started):
        """The seconds that a record reports, given the time when the writing of its output began."""
        return time.time() - started


STATE = re.compile(r"state-\d+")  # the name of a state in the working directory
ADAM_STATE = ("moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0")


class ResumableRun(Run):
    """A context manager: a run that saves its state in ``<output_dir>.unfinished``, so that it can be resumed.

    While it lasts, no other run can write there. If it ends early, the state stays; if it has written all its outputs,
    or has saved no state, the working directory is removed.

    Args: outputs: the directories whose results the run is to make. The others are Run's.
    """

    waits_for_readers = True
    shared_code = (*Run.shared_code, "modeling.py", "training.py")

    def __init__(self, stage, args, outputs, *others, **fields):
        super().__init__(stage, args, *others, **fields)
        # Now, and not after hours of training.
        so_far = {**self.fields, "notes": self.notes}
        records.check_beginning(records.make_record(stage, self.arguments, 0.0, **so_far))
        self.is_first = processes.is_first()  # of several processes, the one that logs, evaluates and writes
        self.outputs, self.written = outputs, set()
        self.work = os.path.abspath(args.output_dir) + ".unfinished"
        self.identity_file = os.path.join(self.work, "identity.json")
        self.finished, self.resumes, self.lock = False, False, None  # of several processes, the first one has the lock
        self.code_notes = []  # which code changed while the run was unfinished
        self.seconds_before, self.started = 0.0, time.time()

    def __enter__(self):
        try:
            processes.check_same(self._of_this_process)
            self.finished, self.resumes = processes.on_first(self._look)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            processes.wait_for_all()  # no process ends while another one is still writing
            if self.lock and not self.finished and self.written >= set(self.outputs):
                self._remove()
        self._leave()

    def _leave(self):
        if not self.lock or self.lock.file.closed:  # closed: removed, and what has its name by now is another run's
            return
        if self.newest_state() is None:
            self._remove()
        self.lock.release()

    def _of_this_process(self):
        """What must be the same in all processes: {what it is: value}."""
        # Also the code that does not change the results of one process: it decides who waits for whom.
        common = [name for name in os.listdir(os.path.dirname(os.path.abspath(__file__))) if name.endswith(".py")]
        code = {name: digest[:12] for name, digest in provenance.code_of([*self.shared_code, *common]).items()}
        versions = {"Paddle": paddle.__version__, "Python": "{}.{}".format(*sys.version_info)}
        return {**self.identity, **code, **versions, "model": self.fields.get("model")}

    def _look(self):
        """(whether all outputs are finished, whether there is a state to go on from)"""
        self.lock = files.Lock(self.work, os.path.join(self.work, "lock"))
        # All outputs are looked at, also after one that is missing: each look clears leftovers or refuses.
        have_finished = [self.has_finished(directory) for directory in self.outputs]
        if all(have_finished):
            self._forget()
            print(f"{', '.join(self.outputs)}: already finished with these arguments, nothing to do")
            return True, False
        self._begin()
        return False, self.newest_state() is not None

    def _begin(self):
        """Makes sure that what lies in the working directory is of this very run. Raises: UserError if it is not."""
        before = self._read_identity()
        changed = provenance.difference(before, self.identity) if before is not None else ""
        if changed and not self.overwrite and self.newest_state() is not None:
            raise UserError(
                f"{self.work}: an unfinished run of something else ({changed}); repeat its "
                "command, remove the directory, or pass --overwrite"
            )
        if before is None or changed:
            self._remove_all_but([])
        files.write_whole(self.identity_file, json.dumps(self.identity, ensure_ascii=False))

    def _read_identity(self):
        if not os.path.isfile(self.identity_file):
            return None
        try:
            with open(self.identity_file, encoding="utf-8") as file:
                return dict(json.load(file))
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.identity_file}: damaged ({error}); remove {self.work}") from error

    def _forget(self):
        """Removes the working directory of a finished run that was killed before it could do so itself."""
        with contextlib.suppress(UserError):  # a damaged identity is not this run's
            if self._read_identity() == self.identity:
                self._remove()

    def _remove_all_but(self, kept):
        names = set(os.listdir(self.work)) - {"lock", "identity.json", *kept}
        # States first, at once and durably: no power cut leaves half a state, or one without its checkpoints.
        for name in sorted(names, key=lambda name: not STATE.fullmatch(name)):
            path = os.path.join(self.work, name)
            if STATE.fullmatch(name):
                files.remove_directory(path)
            elif os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.remove(path)

    def _remove(self):
        files.remove_directory(self.work)
        self.lock.release()

    @contextlib.contextmanager
    def output(self, directory, weights=(WEIGHTS,), checkpoint=None, evaluations=None, **fields):
        """As Run.output.

        Args: checkpoint: name of the checkpoint whose files are copied there. evaluations: rows of evaluations.jsonl.
        """
        with super().output(directory, weights, **fields) as scratch:
            if checkpoint:
                files.copy_files(self.path(checkpoint), scratch)
            if evaluations:
                files.write_json_lines(os.path.join(scratch, "evaluations.jsonl"), evaluations)
            yield scratch
        self.written.add(directory)

    def seconds(self, started):
        return self.seconds_before + time.time() - self.started

    def path(self, name):
        return os.path.join(self.work, name)

    def newest_state(self):
        """The directory of the newest complete state, or None."""
        names = [name for name in os.listdir(self.work) if STATE.fullmatch(name)]
        newest = max(names, key=lambda name: int(name.split("-")[1]), default=None)
        return newest and self.path(newest)

    def checkpoint(self, name):
        """A context manager as files.whole_directory, for a directory of that name in the working directory."""
        return files.whole_directory(self.path(name))

    def save_state(self, step, model, optimizer, state, checkpoints=()):
        """Writes all that training needs to go on after ``step``, then removes the states and checkpoints before it.

        Args: state: what JSON can hold. checkpoints: names of the checkpoints that the state refers to.
        """
        optimizer_state = optimizer.state_dict()
        with self.checkpoint(f"state-{step}") as directory:
            np.savez(os.path.join(directory, "model.npz"), **{k: v.numpy() for k, v in model.state_dict().items()})
            # Paddle names the optimizer's entries by a counter of all layers that the process ever made. The place of
            # the parameter in the model stays the same from process to process.
            arrays = {}
            for place, parameter in model.named_parameters():
                for kind in ADAM_STATE:
                    if f"{parameter.name}_{kind}" in optimizer_state:
                        arrays[f"{place}/{kind}"] = optimizer_state[f"{parameter.name}_{kind}"].numpy()
            np.savez(os.path.join(directory, "optimizer.npz"), **arrays)
            code = {"code": self.fields["code"], "code_notes": self.code_notes}
            whole_state = {**state, "step": step, "seconds": self.seconds(None), **code}
            files.write_whole(os.path.join(directory, "state.json"), json.dumps(whole_state))
        self._remove_all_but({f"state-{step}", *checkpoints})

    def restore(self, model, optimizer, schedule, **initial):
        """Loads the newest state into model, optimizer and schedule. Several processes get that of the first one.

        Returns: its ``state``, with ``step``; ``initial`` with step 0 if there is none.
        Raises: UserError if the state is damaged.
        """
        self.started = time.time()  # loading models and data does not count as training
        places = {place: parameter.name for place, parameter in model.named_parameters()}
        arrays = {}  # of the first process

        def read():
            directory = self.newest_state()
            if directory is None:
                return {"step": 0, **initial}
            try:
                with open(os.path.join(directory, "state.json"), encoding="utf-8") as file:
                    state = json.load(file)
                for name in ("model", "optimizer"):
                    with np.load(os.path.join(directory, f"{name}.npz")) as stored:
                        arrays[name] = {key: stored[key] for key in stored.files}
                unknown = {key.rsplit("/", 1)[0] for key in arrays["optimizer"]} - set(places)
                if unknown:
                    raise ValueError(f"it holds {min(unknown)}, which this model lacks")
            except (ValueError, KeyError, EOFError, FileNotFoundError, zipfile.BadZipFile) as error:
                advice = f"remove {self.work}, and training begins anew"
                raise UserError(f"{directory}: damaged ({error}); {advice}") from error
            return state

        state = processes.on_first(read)
        if not state["step"]:
            # Machines of different kinds may draw other random numbers from the same seed.
            processes.broadcast_parameters(model)
            return state
        model.set_state_dict(processes.broadcast_arrays(arrays.get("model")))
        entries = {}
        for key, tensor in processes.broadcast_arrays(arrays.get("optimizer")).items():
            place, kind = key.rsplit("/", 1)
            entries[f"{places[place]}_{kind}"] = tensor
        schedule.step(state["step"])
        optimizer.set_state_dict({**entries, "LR_Scheduler": schedule.state_dict()})
        self.seconds_before = state["seconds"]
        self.code_notes = list(state.get("code_notes", []))
        changed = provenance.changed_code(state.get("code", {}), self.fields["code"])
        if changed:
            self.code_notes.append(f"{changed} changed after step {state['step']} of the training")
            if self.is_first:
                print(f"warning: {self.code_notes[-1]}; to begin anew, remove {self.work}", file=sys.stderr)
        self.notes += self.code_notes
        return state
