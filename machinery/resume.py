"""Interruptions: states to go on from, signals, the log, and steps that are not finite."""
import json
import math
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from machinery.checkpoint import fill, read_tensors, save_tensors, upgrade, write_text
from machinery.shards import BAD, bad_line

MAX_SKIPPED = 5                                     # steps in a row that are not finite
MAX_BAD = 0.01                                      # share of unreadable images that is bad luck
# Settings that may differ when a run is resumed: they change no loss, or are compared otherwise
# (the bank and the backbone by their contents).
MAY_DIFFER = {"images", "bank", "exclude_classes", "denoiser", "output", "resume", "init",
              "backbone_weights", "cache_features", "micro_batch", "workers", "max_bad",
              "save_minutes", "timeout_minutes", "precision", "device", "protocol", "epochs",
              "epoch_pairs", "eval_data", "eval_without", "eval_names", "templates",
              "class_embedding", "short_side", "window", "stride"}


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
                or len(self.counts) != len(BAD) or not isinstance(self.config, dict):
            raise ValueError("step, steps, counts or config is missing or of another type")

    def check(self, config, method):
        """Raise ValueError if the run that wrote the state was another one than this.

        config: settings of this run.
        """
        then = self.training
        now = json.loads(json.dumps(config))        # tuples become lists, as in the file
        differ = [f"{'lambda' if name == 'local_weight' else name} was {then[name]}, is "
                  f"{now[name]}" for name in now
                  if name not in MAY_DIFFER and name in then and then[name] != now[name]]
        model_now = json.loads(json.dumps(method.config()))
        differ += [f"the {part} differs" for part in ("bank", "backbone")
                   if contents(self.config.get(part)) != contents(model_now.get(part))]
        if differ:
            raise ValueError(f"{self.path} is of a run with other settings: {'; '.join(differ)}. "
                             "Go on with the same ones, or begin anew in another folder, see "
                             "--output")

    def restore(self, method, optimizer, scaler):
        """Put everything back in place."""
        tensors = {name: value for name, value in self.tensors.items()
                   if name != "shards" and not name.startswith("optimizer.")}
        is_finished = self.step == self.training["steps"]           # a checkpoint, no state
        expected = method.checkpoint() if is_finished else method.state()
        fill(expected, tensors, f"{self.path} does not hold the tensors of this run")
        for key, value in self.tensors.items():
            if key.startswith("optimizer."):
                _, kind, name = key.split(".", 2)
                p = method.get_parameter(name)
                optimizer.state[p][kind] = value.to(p.device)
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


# --------------------------------------------------------------------------------------------------
# Signals

@contextmanager
def note_signals():
    """Collect SIGTERM and SIGINT in the list that is yielded, to be looked at between steps.

    A second signal ends the process at once, if it comes 3 s later: launchers send the first twice.
    """
    signals = []
    first = []

    def note(number, frame):
        first.append(time.time())
        if time.time() - first[0] > 3:
            raise KeyboardInterrupt
        signals.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(step, signals, processes):
    """End an interrupted run once the first process has saved, with the status of a signal."""
    processes.wait()
    if processes.rank == 0:
        print(f"interrupted and saved after step {step}; go on with --resume auto",
              file=sys.stderr)
    sys.exit(128 + (signals or [signal.SIGTERM])[0])


# --------------------------------------------------------------------------------------------------
# The log

class Log:
    """log.jsonl of a run and the numbers beside its progress bar.

    Lines of steps from `step` on, which an interrupted run wrote after its last state, are removed.
    """

    def __init__(self, path, step, bar):
        lines = path.read_text().splitlines() if path.exists() and step else []
        kept = [line for line in lines if line_step(line) < step]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self.file = open(path, "a", buffering=1)
        self.bar = bar

    def write(self, values):
        """A line for a step. JSON has no infinity: what is not finite becomes null."""
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self.file.write(json.dumps(finite) + "\n")
        shown = {key: f"{values[key]:.3f}" for key in list(values)[1:4]}     # loss and its parts
        shown["lr"] = f"{values['lr']:.1e}"
        shown["pairs_per_second"] = f"{values['pairs_per_second']:.0f}"
        if values["skipped"]:
            shown["skipped"] = values["skipped"]
        self.bar.set_postfix(shown)


def line_step(line):
    """Step of a line of the log; infinity for a line that is cut or broken."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


# --------------------------------------------------------------------------------------------------
# What may go wrong in a step

class FiniteWatch:
    """Counts steps whose loss or gradients are not finite, and ends the run after a few in a row.

    output: folder for a report. rank: of this process; each reports its own samples.
    """

    def __init__(self, output, rank, skipped=0):
        self.path = output / f"nonfinite-{rank}.json"
        self.skipped = skipped
        self.failures = []                          # steps in a row

    def note(self, values, step, finite, is_harmless, samples):
        """is_harmless: the step was skipped only to lower float16's loss scale. samples: () ->
        names of the step's pairs. Raises ValueError after MAX_SKIPPED failures in a row."""
        self.skipped += not finite
        if finite or is_harmless:
            self.failures = []
            return
        self.failures.append({**values, "step": step, "samples": samples()})
        if len(self.failures) == MAX_SKIPPED:
            write_text(self.path, json.dumps(self.failures, indent=1))
            raise ValueError(f"the loss is {values['loss']} and the gradients' norm "
                             f"{values['grad_norm']} at step {step}, not finite for "
                             f"{MAX_SKIPPED} steps in a row; their samples are in {self.path}. "
                             "Lower --base-rate, or use --precision fp32")


def check_bad(counts, pairs, limit):
    """Raise ValueError if too many pairs could not be read. counts: by reason. pairs: good ones."""
    bad = sum(counts)
    if bad > max(limit * (pairs + bad), 10):
        raise ValueError(f"{bad} of the first {pairs + bad} pairs could not be read "
                         f"({bad_line(counts)}); at most {limit:.0%} may be bad, see --max-bad")


def seed_step(seed, step):
    """Seed torch's generators by the run's seed and the step, alike in all processes.

    So a resumed run draws the random numbers of an uninterrupted one without keeping any
    generator's state.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
