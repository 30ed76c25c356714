"""Several processes that compute one batch: sums and gathers with gradient, devices, precision, data workers."""
import os
import signal
import threading
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad



def distributed():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1



def sum_over_processes(x):
    return _SumOverProcesses.apply(x) if distributed() else x



def gather_rows(x):
    """(rows, D) of every process, in rank order -> (world * rows, D). Every process must hold as many rows."""
    if not distributed():
        return x
    rows = x.new_zeros(dist.get_world_size(), *x.shape)             # a sum in which everyone has a place of his own
    rows[dist.get_rank()] = x
    return sum_over_processes(rows).flatten(0, 1)



def average_gradients(parameters):
    """Mean over processes, in one message: the exact gradient of the global batch's loss (see model.py)."""
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(part.view_as(p))



def pick_precision(name, device):
    """dtype of the towers' arithmetic: bfloat16, or float16 on older GPUs; float32 where there is no hardware for it."""
    if name == "auto":
        name = "fp32" if device != "cuda" else "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]



def place(args, world):
    """Kind of device, and the one of this process."""
    kind = pick_device(args.device)
    kind = "cpu" if kind == "mps" and world > 1 else kind           # gloo does not know Apple's GPU
    return kind, f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind



def join_processes(args, world):
    """Join the other processes. Returns a second group for waits without end, while one process annotates or scores.

    In training itself nobody should keep the others waiting: there the job ends after --timeout-minutes.
    """
    if world == 1:
        return None
    kind, device = place(args, world)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=args.timeout_minutes))
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))



@contextmanager
def first_process_first(rank, patient):
    """Let the first process go through the block alone, the others after it."""
    if patient and rank > 0:
        dist.barrier(patient)
    yield
    if patient and rank == 0:
        dist.barrier(patient)



def pick_device(name):
    """"auto" -> the best device there is. Raises ValueError for one that is not."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, there in found.items() if there)
    if not found[name]:
        raise ValueError(f"--device {name}: there is no such device here; use auto or cpu")
    return name



def share_of(total):
    """Indices of this process: every world-th, none twice, none made up to fill."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return range(rank, total, world)



def first_process():
    return not dist.is_initialized() or dist.get_rank() == 0



def sum_counts(counts):
    """int64 counts added up over processes."""
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts



def ignore_signals(worker):
    """For the DataLoader's workers: when to stop is decided by the process that started them; only its SIGTERM counts."""
    def wait():                                     # a signal that was ignored altogether would keep it from exiting
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):              # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait, daemon=True).start()
