"""What surrounds the steps of a training run: signals, the log, skipped steps, saving, ending."""
import contextlib
import json
import math
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import torch

from machinery.files import remove_partial, write_text
from machinery.networks.checkpoint import save_model
from machinery.parallel import gather_rows, peak_memory, progress, sum_over_processes
from machinery.training.resume import save_state, state_files
from machinery.training.shards import BAD, bad_line

MAX_SKIPPED = 5                                     # steps in a row that are not finite
LOOK_AGAIN = 5                                      # seconds, after a signal
GIVE_UP = 15                                        # seconds without data, after a signal


@contextlib.contextmanager
def only_run(output, processes):
    """Keep other runs from the output folder, and clear it of what a killed one left half-written.

    The lock is a file there; the system takes it from a process that ends, however that ends.
    Raises ValueError if another run has it.
    """
    if processes.rank > 0 or sys.platform == "win32":
        yield
        return
    import fcntl
    path = Path(output) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another run writes to {output}; wait for its end, or name another "
                             "folder with --output") from None
        except OSError:                             # a disk without locks
            pass
        remove_partial(output, 0)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class Run:
    """A training run as seen from its loop; a context manager around the loop.

    settings: `train.RunSettings`.
    training: what a checkpoint keeps of the run; "step", where it begins, "steps", "pass_pairs".
    method, optimizer, scaler, stream, processes: of the run.
    `skipped`, how many steps were, may be set before the loop.

    Files: log.jsonl, a line a step, states and model.safetensors. SIGTERM and SIGINT are noted, and
    obeyed at the end of a step, or when its data does not come.
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
        self.path = self.output / "model.safetensors"
        self.steps = range(training["step"], training["steps"])
        self.trained_parameters = sum(p.numel() for p in method.trained().values())
        self.skipped = 0
        self.failures = 0                           # steps in a row that were not finite
        self.left_out = [0] * len(BAD)              # pairs by reason, over all processes

    def __enter__(self):
        is_first = self.processes.rank == 0
        self.bar = progress(is_shown=is_first, total=self.steps.stop, initial=self.steps.start,
                            desc="training", unit=" steps")
        self.log = self.open_log() if is_first else None
        self.signals = []
        self.handlers = {number: signal.signal(number, self.note)
                         for number in (signal.SIGTERM, signal.SIGINT)}
        if hasattr(signal, "SIGALRM"):              # not on Windows
            self.handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.give_up)
        self.started = time.time()
        self.saved = self.started
        self.step_began = self.started
        return self

    def __exit__(self, kind, error, traceback):
        self.set_timer(0)
        if isinstance(error, TimeoutError):
            for worker in multiprocessing.active_children():    # Python would wait for its end
                with contextlib.suppress(RuntimeError):         # torch's, for a dead worker
                    worker.kill()
                    worker.join(1)
        if error and state_files(self.output):
            error.add_note("go on with --resume auto")      # see machinery/errors.py
        self.bar.close()
        if self.log:
            self.log.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        """Handler of a signal that tells the run to stop."""
        self.signals.append(number)
        self.set_timer(LOOK_AGAIN)

    def set_timer(self, seconds):
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds)

    def give_up(self, number, frame):
        """Handler of the timer after such a signal: a step whose data workers hang has no end."""
        since = self.stream.waiting_since
        if since and time.time() - since > GIVE_UP:
            raise TimeoutError(f"interrupted, and no data came for {GIVE_UP} s: the step in work "
                               "is lost")

    def open_log(self):
        """log.jsonl without lines that an interrupted run wrote after its last state."""
        path = self.output / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        write_text(path, "".join(f"{line}\n" for line in lines[:self.steps.start]))
        return open(path, "a", buffering=1)

    def print_start(self):
        """One line on what is trained."""
        if self.processes.rank > 0:
            return
        pairs = self.training["pairs"]              # not known of tars
        amount = f"{pairs:,} pairs" if pairs else f"{len(self.stream.pairs.paths):,} tars"
        line = (f"{amount}, {self.steps.stop} steps of {self.settings.batch}, "
                f"{self.trained_parameters / 1e6:.1f} M trained parameters, "
                f"{self.processes.world} x {self.processes.device}, {self.training['arithmetic']}")
        micro_batch = self.settings.micro_batch     # the user's, or chosen by free memory
        if micro_batch and micro_batch < self.stream.local_batch:
            line += f", micro-batch {micro_batch}"
        print(line + f", resumed at step {self.steps.start}" * (self.steps.start > 0))

    def end_step(self, step, values, rate, is_finite, is_overflow):
        """Log a step; save, stop or end the run where that is due.

        values: losses and grad_norm, floats.
        rate: learning rate.
        is_finite: whether loss and gradients are.
        is_overflow: float16 could not hold the gradient; the scaler lowers its scale.
        """
        self.note_seen_tokens()
        self.skipped += not is_finite
        self.failures = 0 if is_finite or is_overflow else self.failures + 1
        if self.failures == MAX_SKIPPED:
            names = [self.stream.pairs.name(key) for key in self.stream.keys[:3]]
            raise ValueError(f"the loss is {values['loss']} and the gradients' norm "
                             f"{values['grad_norm']} at step {step}, not finite for {MAX_SKIPPED} "
                             f"steps in a row; the last batch begins with {'; '.join(names)}. "
                             "Lower --base-rate, or use --precision fp32")
        # What all processes have to know of each other, in one message
        is_due = (self.processes.rank == 0
                  and time.time() - self.saved >= 60 * self.settings.save_minutes)
        message = torch.tensor([len(self.signals), is_due, *self.stream.left_out],
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

    def note_seen_tokens(self):
        """Note the tokens of this step's batch: their rows of the table have a gradient, the same
        in all processes. Eight numbers of a row tell; those that are not finite do not count."""
        table = self.method.trained().get(self.method.TOKEN_TABLE)
        before = self.method.seen_tokens
        is_unknown = before is None and self.steps.start > 0        # an older state does not tell
        if table is not None and table.grad is not None and not is_unknown:
            seen = (table.grad[:, :8].abs() > 0).any(dim=1)                         # (V,)
            self.method.seen_tokens = seen if before is None else seen | before.to(seen.device)

    def refuse_too_many_bad(self, pairs):
        """Raise ValueError if too many pairs could not be used. pairs: good ones so far."""
        bad = sum(self.left_out)
        if bad > max(self.settings.max_bad * (pairs + bad), 10):
            raise ValueError(f"{bad} of the first {pairs + bad} pairs could not be used "
                             f"({bad_line(self.left_out)}); at most {self.settings.max_bad:.0%} "
                             "may be bad, see the setting run.max_bad")

    def write_log(self, step, values, rate):
        batch = self.settings.batch
        seconds = time.time() - self.step_began
        line = {"step": step, **values, "lr": rate, "pairs_per_second": round(batch / seconds, 1),
                "waited": round(self.stream.waited / seconds, 3),
                "bad_images": sum(self.left_out), "skipped": self.skipped}
        # JSON has no infinity
        finite = {key: value if math.isfinite(value) else None for key, value in line.items()}
        try:
            self.log.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise OSError(f"{self.log.name} could not be written ({error})") from None
        shown = [*list(values)[:3], "lr", "pairs_per_second", "skipped"]     # loss and its parts
        self.bar.set_postfix({key: f"{line[key]:.3g}" for key in shown}, refresh=False)
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
        if not all(p.isfinite().all() for p in self.method.trained().values()):
            raise ValueError(f"a parameter is not finite after step {step}; the states before it "
                             "are whole. Lower --base-rate, or use --precision fp32")
        if self.processes.rank == 0:
            extra = {"skipped": self.skipped, "left_out": self.left_out,
                     "scaler": self.scaler.state_dict()}
            save_state(self.output, self.method, self.optimizer, training, extra, positions)
            save_model(self.path, self.method, training)
        self.saved = time.time()

    def end_interrupted(self, step):
        """End once the first process has saved, with the status of a signal."""
        self.processes.wait()
        if self.processes.rank == 0:
            print(f"interrupted and saved after step {step}; go on with --resume auto",
                  file=sys.stderr)
        sys.exit(128 + (self.signals or [signal.SIGTERM])[0])

    def write_model(self):
        """Write the trained model, and delete the states. Returns what the run cost: seconds,
        trained_parameters, peak_gib of this process."""
        cost = {"seconds": round(time.time() - self.started, 1),
                "trained_parameters": self.trained_parameters,
                "peak_gib": round(peak_memory(self.processes.device_type), 2)}
        if self.processes.rank > 0:
            return cost
        save_model(self.path, self.method, {**self.training, "step": self.steps.stop})
        for left in state_files(self.output):
            left.unlink()
        line = f"trained in {cost['seconds']:.0f} s, {self.path}"
        if sum(self.left_out):
            line += f"; left out: {bad_line(self.left_out)}"
        if self.skipped:
            line += f"; {self.skipped} steps were skipped, their loss or gradients not finite"
        print(line)
        return cost
