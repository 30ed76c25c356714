"""What surrounds the steps of a training run: signals, the log, skipped steps, saving, ending."""
import json
import math
import signal
import sys
import time
from contextlib import contextmanager

import torch
from tqdm import tqdm

from machinery.networks.checkpoint import save_model, write_text
from machinery.parallel import gather_rows, peak_memory, sum_over_processes
from machinery.training.resume import save_state, states
from machinery.training.shards import Shards, bad_line

MAX_SKIPPED = 5                                     # steps in a row that are not finite
MAX_BAD = 0.01                                      # share of unreadable images that is bad luck


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
        return int(json.loads(line)["step"])
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

    def note(self, values, step, is_finite, is_overflow, samples):
        """is_overflow: float16 could not hold the gradient, and its scale was lowered. samples: ()
        -> names of the step's pairs. Raises ValueError after MAX_SKIPPED failures in a row."""
        self.skipped += not is_finite
        if is_finite or is_overflow:
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


# --------------------------------------------------------------------------------------------------
# The whole

class Run:
    """A training run as seen from its loop; a context manager around the loop.

    args: train.py's flags. method, optimizer, scaler, stream, processes: of the run. config: what a
    checkpoint keeps of it, "steps" among them. name_of: function from a pair's key to words. start:
    first step. skipped: steps skipped so far.
    """

    def __init__(self, args, method, optimizer, scaler, stream, processes, config, name_of,
                 output, start=0, skipped=0):
        self.args = args
        self.method = method
        self.optimizer = optimizer
        self.scaler = scaler
        self.stream = stream
        self.processes = processes
        self.config = config
        self.name_of = name_of
        self.output = output
        self.steps = range(start, config["steps"])
        self.watch = FiniteWatch(output, processes.rank, skipped)
        self.counts = stream.counts().tolist()      # of bad pairs, over all processes

    def __enter__(self):
        is_first = self.processes.rank == 0
        self.bar = tqdm(total=self.config["steps"], initial=self.steps.start, desc="training",
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

        values: losses and grad_norm, floats. is_finite, is_overflow: see `FiniteWatch.note`.
        """
        self.watch.note(values, step, is_finite, is_overflow,
                        lambda: [self.name_of(key) for key in self.stream.keys])
        # What all processes have to know of each other, in one message
        is_first = self.processes.rank == 0
        due = is_first and time.time() - self.saved >= 60 * self.args.save_minutes
        flags = torch.tensor([len(self.signals), due, *self.stream.counts()],
                             device=self.processes.device)
        stop, save, *self.counts = sum_over_processes(flags).tolist()
        check_bad(self.counts, (step + 1) * self.args.batch, self.args.max_bad)
        if self.log:
            self.write_log(step, values, rate)
        self.bar.update()
        if step + 1 < self.config["steps"] and (save or stop):
            self.save(step + 1)
            if stop:
                self.leave(step + 1)
        self.step_began = time.time()

    def write_log(self, step, values, rate):
        batch = self.args.batch
        seconds = time.time() - self.step_began
        self.log.write({"step": step, **values, "lr": rate,
                        "pairs_per_second": round(batch / seconds, 1),
                        "waited": round(self.stream.waited / seconds, 3),
                        "bad_images": sum(self.counts), "skipped": self.watch.skipped})
        done = (step + 1) * batch                   # pairs
        pass_pairs = self.config["pass_pairs"]
        if self.stream.states is not None and done % pass_pairs < batch:
            self.bar.write(f"pass {done // pass_pairs}, left out so far: {bad_line(self.counts)}")

    def save(self, step):
        """Write a state to go on from, and a checkpoint."""
        config = {**self.config, "step": step}
        positions = None
        if self.stream.states is not None:
            gathered = gather_rows(self.stream.states.to(self.processes.device))
            positions = gathered.view(self.processes.world, *self.stream.states.shape)
        parameters = self.method.trained().values()
        if self.processes.rank == 0 and all(p.isfinite().all() for p in parameters):
            save_state(self.output, self.method, self.optimizer, self.scaler, positions, config,
                       self.watch.skipped, self.counts)
            save_model(self.output / "model.safetensors", self.method, config)
        self.saved = time.time()

    def leave(self, step):
        """End an interrupted run once the first process has saved, with the status of a signal."""
        self.processes.wait()
        if self.processes.rank == 0:
            print(f"interrupted and saved after step {step}; go on with --resume auto",
                  file=sys.stderr)
        sys.exit(128 + (self.signals or [signal.SIGTERM])[0])

    def finish(self):
        """Write the trained model. Nothing is left to go on with: the states are deleted, and what
        a killed process left half-written. Returns what the run cost: seconds, trained_parameters,
        peak_gib of this process."""
        cost = {"seconds": round(time.time() - self.started, 1),
                "trained_parameters": count_trained(self.method),
                "peak_gib": round(peak_memory(self.processes.device_type), 2)}
        if self.processes.rank > 0:
            return cost
        path = self.output / "model.safetensors"
        save_model(path, self.method, {**self.config, "step": self.config["steps"]})
        for left in (*states(self.output), *self.output.glob("*.partial")):
            left.unlink()
        line = f"trained in {cost['seconds']:.0f} s, {path}"
        if sum(self.counts):
            line += f"; left out: {bad_line(self.counts)}"
        if self.watch.skipped:
            line += f"; {self.watch.skipped} steps were skipped, their loss or gradients not finite"
        print(line)
        return cost


def count_trained(method):
    """Number of trained parameters."""
    return sum(p.numel() for p in method.trained().values())


def print_run(run, pairs):
    """One line on what is trained, and on how much."""
    if run.processes.rank > 0:
        return
    if isinstance(pairs, Shards):
        amount = f"{len(pairs.paths):,} shards"
    else:
        amount = f"{run.config['pairs']:,} pairs"
    line = (f"{amount}, {run.steps.stop} steps of {run.args.batch}, "
            f"{count_trained(run.method) / 1e6:.1f} M trained parameters, "
            f"{run.processes.world} x {run.processes.device}, {run.config['arithmetic']}")
    if run.steps.start:
        line += f", resumed at step {run.steps.start}"
    print(line)
