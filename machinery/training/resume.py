"""State files: what an interrupted run goes on from.

They hold all that the rest of a run depends on. Which pairs are in a batch, their crops and the
random numbers of a step depend on the seed and the step alone; of tars the positions are kept.
"""
import sys
from pathlib import Path

import numpy as np
import torch

from machinery.files import fill, read_tensors, save_tensors
from machinery.networks.checkpoint import frozen_sha256, header_of, read_header, read_seen_tokens
from machinery.parallel import sum_over_processes
from machinery.settings import abbreviate, as_mapping, check_value, differences
from machinery.training.shards import BAD


def state_files(folder):
    """The state files in a folder, the newest first."""
    return sorted(folder.glob("state-*.safetensors"), reverse=True)


def save_state(folder, method, optimizer, training, extra, positions=None):
    """Write a state, whole or not at all; the one before it is kept, older ones are deleted.

    training: settings of the run, "step" among them.
    extra: what else the header holds, JSON values by name.
    positions: of the readers of tars in all processes, (world, readers).
    """
    tensors = {**method.state(), **tensors_of(optimizer, method)}
    if positions is not None:
        tensors["positions"] = positions
    header = {**header_of(method, training, with_training_only=True), **extra}
    path = folder / f"state-{training['step']:08d}.safetensors"
    try:
        save_tensors(path, tensors, header)
    except OSError as error:
        raise OSError(f"{error}; what was saved before is whole, make room and go on with "
                      "--resume auto") from None
    older = [other for other in state_files(folder) if other < path]
    for other in {*state_files(folder)} - {path, *older[:1]}:   # newer ones: broken, or given up
        other.unlink()


def tensors_of(optimizer, method):
    """AdamW's tensors by name; a parameter without a gradient so far has none."""
    return {f"optimizer.{kind}.{name}": value for name, p in method.trained().items()
            for kind, value in optimizer.state[p].items()}


class State:
    """What `save_state` wrote, or the checkpoint of a finished run.

    path: its file. Raises FileNotFoundError; ValueError for a file that is neither.
    """

    def __init__(self, path):
        self.path = path
        self.header, self.tensors = read_tensors(path)
        read_header(self.header, path)              # checked here, compared in `check`
        self.training = self.header["training"]
        number = {"least": 0, "most": 2 ** 50}
        self.step = check_value(self.training.get("step"), int, number, "step")
        steps = check_value(self.training.get("steps"), int, number, "steps")
        self.skipped = check_value(self.header.get("skipped", 0), int, number, "skipped")
        left_out = self.header.get("left_out", [0] * len(BAD))
        self.left_out = list(check_value(left_out, tuple[int, ...], number, "left_out"))
        self.is_finished = self.step == steps
        if self.step > steps or len(self.left_out) != len(BAD):
            raise ValueError(f"it is at step {self.step} of {steps}, with {len(self.left_out)} "
                             "reasons to leave pairs out")
        scaler = self.header.get("scaler") or {}
        check_value(scaler, dict, {}, "scaler")
        check_value(list(scaler.values()), tuple[float, ...], number, "scaler")
        if scaler and scaler.keys() != torch.amp.GradScaler("cpu").state_dict().keys():
            raise ValueError(f"scaler has {abbreviate(list(scaler))}")
        positions = self.positions
        if positions is not None and (positions.dtype != torch.int64 or positions.ndim != 2
                                      or not len(positions.flatten()) or positions.min() < 0
                                      or positions.max() > 2 ** 50):
            raise ValueError("its positions in tars are no table of whole numbers")
        if "scaler" not in self.header and not self.is_finished:
            raise ValueError("it is the checkpoint of an unfinished run, no state")

    def check(self, method, training, run_settings):
        """Raise ValueError if the run that wrote the state was another one than this.

        training: of this run. run_settings: `train.RunSettings`.
        """
        then = self.training.get("run")
        differ = differences(run_settings, then if isinstance(then, dict) else {}, training["run"])
        differ += differences(method.Settings, self.header["settings"],
                              as_mapping(method.settings))
        differ += [f"{name} was {self.training.get(name)}, is {value}"
                   for name, value in training.items()
                   if name not in ("run", "step") and self.training.get(name) != value]
        frozen = frozen_sha256(method, with_training_only=not self.is_finished)
        if self.header["bank"] != method.bank:
            differ.append("the bank differs")
        if self.header["frozen_sha256"] != frozen:
            differ.append("the frozen weights differ")
        if differ:
            raise ValueError(f"{self.path} is of a run with other settings: {'; '.join(differ)}. "
                             "Go on with the same ones, or begin anew in another --output")

    def restore(self, method, optimizer, scaler):
        """Put everything back in place."""
        method.seen_tokens = read_seen_tokens(self.header, self.path)
        for name, p in method.trained().items():
            if f"optimizer.step.{name}" in self.tensors:
                optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                                      "exp_avg": torch.zeros_like(p),
                                      "exp_avg_sq": torch.zeros_like(p)}
        expected = method.checkpoint() if self.is_finished else method.state()
        found = {name: value for name, value in self.tensors.items() if name != "positions"}
        fill({**expected, **tensors_of(optimizer, method)}, found,
             f"{self.path} does not hold the tensors of this run")
        if self.header.get("scaler"):
            scaler.load_state_dict(self.header["scaler"])

    @property
    def positions(self):
        """Of the readers of tars, or None."""
        return self.tensors.get("positions")


def find_state(resume, output):
    """The `State` to go on from, or None if there is nothing yet.

    resume: a file, or "auto": the newest in output that can be read, or a finished model. Raises
    FileNotFoundError, ValueError.
    """
    finished = output / "model.safetensors"
    paths = [Path(resume)] if resume != "auto" else [*state_files(output), finished]
    broken = []
    for path in paths:
        try:
            state = State(path)
            if path != finished or state.is_finished:
                return state
        except FileNotFoundError:
            if resume != "auto":
                raise FileNotFoundError(f"--resume: no file {resume}; expected a state file, or "
                                        "auto") from None
        except (OSError, ValueError, TypeError) as error:
            broken.append(path.name)
            print(f"warning: {path} cannot be read and is left out ({error})", file=sys.stderr)
    if broken:
        raise ValueError(f"nothing to go on from: {', '.join(broken)} cannot be read; name a state "
                         "file with --resume, or delete these to begin anew")
    return None


def seed_step(seed, step):
    """Seed torch's generators by the run's seed and the step, alike in all processes.

    So a resumed run draws the random numbers of an uninterrupted one without keeping any
    generator's state.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def agree_on(start, processes):
    """Raise ValueError unless all processes go on from the same step."""
    total = sum_over_processes(torch.tensor(start, device=processes.device))
    if total != start * processes.world:
        raise ValueError("the processes found different states; --output must be a folder that all "
                         "of them share")
