"""Several processes compute one global batch: devices, sums and gathers with gradient, waiting.

Without a process group every sum and gather here is the identity, so that the losses are plain
functions of tensors.
"""
import contextlib
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from machinery.training.workers import end_with_torchrun

MINUTE = 60                                         # seconds

# --------------------------------------------------------------------------------------------------
# Sums and gathers

def rank():
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(x):
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


class _SumOverProcesses(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad)


def sum_over_processes(x):
    """Sum of a tensor over all processes, with gradient: the sum of their gradients.

    Every process computes the same loss from the sum. So each one's gradient comes out as the true
    gradient times the number of processes, and their mean (`average_gradients`) is the true one.
    """
    return _SumOverProcesses.apply(x) if world_size() > 1 else x


def global_mean(values):
    """Mean of values (B,) over the global batch; every process has as many."""
    return sum_over_processes(values.sum()) / (len(values) * world_size())


def gather_rows(x):
    """(rows, ...) of every process, equally many -> (world * rows, ...) in rank order, with
    gradient. Each process fills its own slot of a zero tensor, and the sum joins them."""
    if world_size() == 1:
        return x
    slots = x.new_zeros(world_size(), *x.shape)
    slots[rank()] = x
    return sum_over_processes(slots).flatten(0, 1)


def global_rows(draw, rows):
    """This process's rows of a random tensor for the global batch, which all processes draw alike.

    draw: function of a number of rows.
    """
    drawn = draw(rows * world_size())
    return drawn[rank() * rows:(rank() + 1) * rows].clone()     # a view would keep all rows alive


def average_gradients(parameters):
    """Mean of the gradients over processes, in one message; 0 where the loss did not reach."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world_size() > 1:
        sums = all_reduce(torch.cat([p.grad.flatten() for p in parameters]))
        for p, total in zip(parameters, sums.split([p.numel() for p in parameters])):
            p.grad.copy_(total.view_as(p) / world_size())


def sum_counts(counts):
    """An integer CPU tensor, summed over processes in place."""
    if world_size() > 1:
        there = counts.cuda() if dist.get_backend() == "nccl" else counts   # NCCL knows GPUs only
        dist.all_reduce(there)
        counts.copy_(there)
    return counts


def own_indices(total):
    """Indices of this process: every world-th, none twice, none added to fill up."""
    return range(rank(), total, world_size())


# --------------------------------------------------------------------------------------------------
# Progress

class Lines:
    """A file for tqdm that is no terminal: each state of the bar becomes a line."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        pass


def progress(items=None, is_shown=None, **options):
    """tqdm's bar, of the first process. Where stderr is no terminal (nohup, SLURM, a pipe), a line
    a minute in its place. is_shown: None = in the first process. Others: of tqdm."""
    is_shown = rank() == 0 if is_shown is None else is_shown
    if sys.stderr.isatty():
        return tqdm(items, disable=not is_shown, **options)
    form = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} gone, {remaining} to go{postfix}"
    return tqdm(items, disable=not is_shown, file=Lines(), bar_format=form, mininterval=MINUTE,
                maxinterval=MINUTE, delay=MINUTE, miniters=1, leave=False, **options)


# --------------------------------------------------------------------------------------------------
# Processes and devices

@dataclass
class Processes:
    """This process among all, and its device. waiting_group: for waits without a time limit."""
    rank: int
    world: int
    device_type: str                                # "cpu", "cuda" or "mps"
    device: str                                     # with the GPU's number: "cuda:3"
    waiting_group: dist.ProcessGroup | None = None

    def wait(self):
        """Wait for all processes, however long it takes."""
        if self.waiting_group:
            dist.barrier(self.waiting_group)

    @contextlib.contextmanager
    def first_process_first(self):
        """The first process runs the block alone, the others after it."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def end_together(self):
        """Nobody ends while another still works. After an error, do not wait for the others."""
        if self.waiting_group:
            self.wait()
            dist.destroy_process_group()


def join_processes(device, timeout_minutes):
    """Join the processes that torchrun started; alone if it did not. Returns `Processes`.

    timeout_minutes: how long a step waits for another process before the run ends.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    device_type = pick_device(device)
    if world == 1:
        return Processes(0, 1, device_type, device_type)
    end_with_torchrun()
    if device_type == "mps":                        # gloo does not know Apple's GPU
        device_type = "cpu"
    name = device_type
    if device_type == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(name)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    waiting_group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return Processes(dist.get_rank(), world, device_type, name, waiting_group)


def pick_device(name):
    """"auto" -> the best device there is. Raises ValueError for a device that is not there."""
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                "cpu": True}
    if name == "auto":
        name = next(device for device in is_there if is_there[device])
    if not is_there[name]:
        raise ValueError(f"--device {name}: this machine has none; use auto or cpu")
    return name


def peak_memory(device_type):
    """The most memory that this process has held so far, in GiB: the GPU's if it has one, else
    main memory; 0 on Windows."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if sys.platform == "win32":
        return 0.0
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def pick_precision(name, device_type):
    """dtype of the networks' arithmetic: bfloat16, or float16 on older GPUs; float32 on a CPU."""
    if name == "auto" and device_type == "cuda":
        name = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    elif name == "auto":
        name = "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
