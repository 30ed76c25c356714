"""What surrounds the steps of a training run: signals, the log, skipped steps, saving, ending."""
import json
import math
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from machinery.files import write_text
from machinery.networks.checkpoint import save_model
from machinery.parallel import gather_rows, peak_memory, sum_over_processes
from machinery.training.resume import save_state, state_files
from machinery.training.shards import BAD, bad_line

MAX_SKIPPED = 5                                     # steps in a row that are not finite


@contextmanager
def note_signals():
    """Collect SIGTERM and SIGINT in the list that is yielded, to be looked at between steps."""
    signals = []

    def note(number, frame):
        signals.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """log.jsonl of a run, a line a step, and the numbers beside its progress bar.

    Lines of steps from `step` on, which an interrupted run wrote after its last state, are removed.
    """

    def __init__(self, path, step, bar):
        lines = path.read_text().splitlines() if path.exists() else []
        write_text(path, "".join(f"{line}\n" for line in lines[:step]))
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


class Run:
    """A training run as seen from its loop; a context manager around the loop.

    settings: `train.RunSettings`.
    training: what a checkpoint keeps of the run; "step", where it begins, "steps", "pass_pairs".
    method, optimizer, scaler, stream, processes: of the run.
    `skipped`, how many steps were, may be set before the loop.
    """

    def __init__(self, settings, training, method, optimizer, scaler, stream, processes):
        self.settings = settings
        self.training = training
        self.method = method
        self.optimizer = optimizer
        self.scaler = scaler
        self.stream = stream
        self.processes = processes
        self.output = Path(settings.output)
        self.steps = range(training["step"], training["steps"])
        self.skipped = 0
        self.failures = 0                           # steps in a row that were not finite
        self.left_out = [0] * len(BAD)              # pairs by reason, over all processes

    def __enter__(self):
        is_first = self.processes.rank == 0
        self.bar = tqdm(total=self.steps.stop, initial=self.steps.start, desc="training",
                        unit=" steps", disable=None if is_first else True)
        self.log = None
        if is_first:
            self.output.mkdir(parents=True, exist_ok=True)
            self.log = Log(self.output / "log.jsonl", self.steps.start, self.bar)
        self.signal_notes = note_signals()
        self.signals = self.signal_notes.__enter__()
        self.started = time.time()
        self.saved = self.started
        self.step_began = self.started
        return self

    def __exit__(self, *error):
        self.bar.close()
        if self.log:
            self.log.file.close()
        self.signal_notes.__exit__(*error)

    def end_step(self, step, values, rate, is_finite, is_overflow):
        """Log a step; save, stop or end the run where that is due.

        values: losses and grad_norm, floats.
        rate: learning rate.
        is_finite: whether loss and gradients are.
        is_overflow: float16 could not hold the gradient; the scaler lowers its scale.
        """
        self.skipped += not is_finite
        self.failures = 0 if is_finite or is_overflow else self.failures + 1
        if self.failures == MAX_SKIPPED:
            raise ValueError(self.why_not_finite(step, values))
        # What all processes have to know of each other, in one message
        is_first = self.processes.rank == 0
        due = is_first and time.time() - self.saved >= 60 * self.settings.save_minutes
        message = torch.tensor([len(self.signals), due, *self.stream.left_out],
                               device=self.processes.device)
        stop, save, *self.left_out = sum_over_processes(message).tolist()
        self.refuse_too_many_bad((step + 1) * self.settings.batch)
        if self.log:
            self.write_log(step, values, rate)
        self.bar.update()
        if step + 1 < self.steps.stop and (save or stop):
            self.save(step + 1)
            if stop:
                self.end_interrupted(step + 1)
        self.step_began = time.time()

    def why_not_finite(self, step, values):
        """An error for a run whose loss or gradients are not finite."""
        names = [self.stream.pairs.name(key) for key in self.stream.keys[:3]]
        return (f"the loss is {values['loss']} and the gradients' norm {values['grad_norm']} at "
                f"step {step}, not finite for {MAX_SKIPPED} steps in a row; the last batch begins "
                f"with {'; '.join(names)}. Lower --base-rate, or use --precision fp32")

    def refuse_too_many_bad(self, pairs):
        """Raise ValueError if too many pairs could not be read. pairs: good ones so far."""
        bad = sum(self.left_out)
        if bad > max(self.settings.max_bad * (pairs + bad), 10):
            raise ValueError(f"{bad} of the first {pairs + bad} pairs could not be read "
                             f"({bad_line(self.left_out)}); at most {self.settings.max_bad:.0%} "
                             "may be bad, see the setting run.max_bad")

    def write_log(self, step, values, rate):
        batch = self.settings.batch
        seconds = time.time() - self.step_began
        self.log.write({"step": step, **values, "lr": rate,
                        "pairs_per_second": round(batch / seconds, 1),
                        "waited": round(self.stream.waited / seconds, 3),
                        "bad_images": sum(self.left_out), "skipped": self.skipped})
        done = (step + 1) * batch                   # pairs
        pass_pairs = self.training["pass_pairs"]
        if self.stream.positions is not None and done % pass_pairs < batch:
            self.bar.write(f"pass {done // pass_pairs}, left out so far: "
                           f"{bad_line(self.left_out)}")

    def save(self, step):
        """Write a state to go on from, and a checkpoint."""
        training = {**self.training, "step": step}
        positions = None
        if self.stream.positions is not None:
            gathered = gather_rows(self.stream.positions.to(self.processes.device))
            positions = gathered.view(self.processes.world, *self.stream.positions.shape)
        is_finite = all(p.isfinite().all() for p in self.method.trained().values())
        if not is_finite:
            raise ValueError(f"a parameter is not finite after step {step}; the states before it "
                             "are whole. Lower --base-rate, or use --precision fp32")
        if self.processes.rank == 0:
            extra = {"skipped": self.skipped, "left_out": self.left_out,
                     "scaler": self.scaler.state_dict()}
            save_state(self.output, self.method, self.optimizer, training, extra, positions)
            save_model(self.output / "model.safetensors", self.method, training)
        self.saved = time.time()

    def end_interrupted(self, step):
        """End once the first process has saved, with the status of a signal."""
        self.processes.wait()
        if self.processes.rank == 0:
            print(f"interrupted and saved after step {step}; go on with --resume auto",
                  file=sys.stderr)
        sys.exit(128 + (self.signals or [signal.SIGTERM])[0])

    def write_model(self):
        """Write the trained model. Nothing is left to go on with: the states are deleted, and what
        a killed process left half-written. Returns what the run cost: seconds, trained_parameters,
        peak_gib of this process."""
        cost = {"seconds": round(time.time() - self.started, 1),
                "trained_parameters": count_trained(self.method),
                "peak_gib": round(peak_memory(self.processes.device_type), 2)}
        if self.processes.rank > 0:
            return cost
        path = self.output / "model.safetensors"
        save_model(path, self.method, {**self.training, "step": self.steps.stop})
        for left in (*state_files(self.output), *self.output.glob("*.partial")):
            left.unlink()
        line = f"trained in {cost['seconds']:.0f} s, {path}"
        if sum(self.left_out):
            line += f"; left out: {bad_line(self.left_out)}"
        if self.skipped:
            line += f"; {self.skipped} steps were skipped, their loss or gradients not finite"
        print(line)
        return cost


def count_trained(method):
    """Number of trained parameters."""
    return sum(p.numel() for p in method.trained().values())


def print_run(run, amount):
    """One line on what is trained. amount: on how much, in words."""
    if run.processes.rank > 0:
        return
    line = (f"{amount}, {run.steps.stop} steps of {run.settings.batch}, "
            f"{count_trained(run.method) / 1e6:.1f} M trained parameters, "
            f"{run.processes.world} x {run.processes.device}, {run.training['arithmetic']}")
    if run.steps.start:
        line += f", resumed at step {run.steps.start}"
    print(line)
