"""States: what an interrupted run goes on from."""
import json
import sys
from pathlib import Path

import numpy as np
import torch

from machinery.networks.checkpoint import (fill, read_tensors, save_tensors, upgrade,
                                  upgrade_settings)
from machinery.contract import find_method
from machinery.parallel import sum_over_processes
from machinery.training.shards import BAD

# Settings that may differ when a run is resumed: they change no loss, or are compared otherwise
# (the bank and the backbone by their contents).
MAY_DIFFER = {"images", "bank", "exclude_classes", "denoiser", "output", "resume", "init",
              "backbone_weights", "cache_features", "micro_batch", "workers", "max_bad",
              "save_minutes", "timeout_minutes", "precision", "device", "protocol", "epochs",
              "epoch_pairs", "eval_data", "eval_without", "eval_names", "templates",
              "class_embedding", "merge", "short_side", "window", "stride"}

# Parts of a method's config, in words, that a resumed run must have unchanged
COMPARED = {"bank": "bank", "backbone": "backbone", "classes": "list of classes"}


# --------------------------------------------------------------------------------------------------
# States: all that the rest of a run depends on. Which pairs are in a batch, their crops and the
# random numbers of a step depend on the seed and the step alone; of shards the positions are kept.

def states(folder):
    """The state files in a folder, the newest first."""
    return sorted(folder.glob("state-*.safetensors"), reverse=True)


def save_state(folder, method, optimizer, scaler, positions, config, skipped, counts):
    """Write a state, whole or not at all; the one before it is kept, older ones are deleted.

    positions: of `Shards` in all processes, (world, workers, K), or None. config: settings of the
    run, "step" among them. skipped: steps so far. counts: bad pairs so far by reason.
    """
    tensors = {} if positions is None else {"shards": positions}
    tensors.update(method.state())
    for name, p in method.trained().items():
        tensors.update({f"optimizer.{key}.{name}": value
                        for key, value in optimizer.state[p].items()})
    header = {"method": method.name, "config": method.config(), "training": config,
              "skipped": skipped, "counts": counts, "scaler": scaler.state_dict()}
    path = folder / f"state-{config['step']:08d}.safetensors"
    try:
        save_tensors(path, tensors, header)
    except OSError as error:
        raise OSError(f"{error}; what was saved before is whole, make room and go on with "
                      "--resume auto") from None
    older = [other for other in states(folder) if other < path]
    for other in {*states(folder)} - {path, *older[:1]}:    # newer ones are broken, or given up
        other.unlink()


class State:
    """What `save_state` wrote. path: its file. Raises FileNotFoundError or ValueError."""

    def __init__(self, path):
        self.path = path
        header, self.tensors = read_tensors(path)
        header = upgrade(header)
        self.method = header["method"]
        self.config = header["config"]
        self.training = header["training"]
        self.step = self.training["step"]
        self.skipped = header.get("skipped", 0)
        self.counts = header.get("counts", [0] * len(BAD))
        self.scaler = header.get("scaler")
        numbers = [self.step, self.training["steps"], self.skipped, *self.counts]
        if not all(type(number) is int and number >= 0 for number in numbers) \
                or len(self.counts) != len(BAD):
            raise ValueError("step, steps, skipped or counts are no counts")
        missing = set(find_method(self.method).CONFIG) - set(self.config)
        if missing:
            raise ValueError(f"its settings lack {', '.join(sorted(missing))}")
        if self.scaler is None and self.step != self.training["steps"]:
            raise ValueError("it is a checkpoint of an unfinished run, not a state")

    def check(self, config, method):
        """Raise ValueError if the run that wrote the state was another one than this.

        config: settings of this run.
        """
        then = upgrade_settings(self.training)      # with what older runs did not have
        now = json.loads(json.dumps(config))        # tuples become lists, as in the file
        prompted = {"templates"} if now.get("prompt_weight") else set()
        differ = [f"{'lambda' if name == 'local_weight' else name} was {then.get(name)}, is "
                  f"{now[name]}" for name in now
                  if name not in MAY_DIFFER - prompted and then.get(name) != now[name]]
        model_now = json.loads(json.dumps(method.config()))
        differ += [f"the {words} differs" for part, words in COMPARED.items()
                   if contents(self.config.get(part)) != contents(model_now.get(part))]
        if differ:
            raise ValueError(f"{self.path} is of a run with other settings: {'; '.join(differ)}. "
                             "Go on with the same ones, or begin anew in another folder, see "
                             "--output")

    def restore(self, method, optimizer, scaler):
        """Put everything back in place."""
        complaint = f"{self.path} does not hold the tensors of this run"
        of_optimizer = {name: value for name, value in self.tensors.items()
                        if name.startswith("optimizer.")}
        tensors = {name: value for name, value in self.tensors.items()
                   if name != "shards" and name not in of_optimizer}
        is_finished = self.step == self.training["steps"]           # a checkpoint, no state
        expected = method.checkpoint() if is_finished else method.state()
        fill(expected, tensors, complaint)
        expected = {}                               # a parameter without a gradient has no state
        for name, p in method.trained().items():
            if f"optimizer.step.{name}" in of_optimizer:
                optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                                      "exp_avg": torch.zeros_like(p),
                                      "exp_avg_sq": torch.zeros_like(p)}
                expected.update({f"optimizer.{kind}.{name}": value
                                 for kind, value in optimizer.state[p].items()})
        fill(expected, of_optimizer, complaint)
        if self.scaler:
            scaler.load_state_dict(self.scaler)

    @property
    def positions(self):
        return self.tensors.get("shards")


def contents(part):
    """A part of a method's config without what tells only where it lies."""
    if not isinstance(part, dict):
        return part
    return {key: value for key, value in {"image_token": "class", **part}.items()
            if key != "weights"}


def find_state(resume, output):
    """The `State` to go on from, or None if there is nothing yet.

    resume: a file, or "auto": the newest in output that can be read, or a finished model. Raises
    FileNotFoundError, ValueError.
    """
    finished = output / "model.safetensors"
    paths = [Path(resume)] if resume != "auto" else [*states(output), finished]
    broken = []
    for path in paths:
        try:
            state = State(path)
            if path != finished or state.step == state.training["steps"]:
                return state
        except FileNotFoundError:
            if resume != "auto":
                raise FileNotFoundError(f"--resume: no file {resume}; expected a state file, or "
                                        "auto") from None
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            broken.append(path.name)
            print(f"warning: {path} cannot be read and is left out ({type(error).__name__}: "
                  f"{error})", file=sys.stderr)
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
