"""Processes that work for another one, and end with it."""
import ctypes
import multiprocessing
import os
import signal
import sys
import threading

from torch.utils.data import default_collate, get_worker_info

PR_SET_PDEATHSIG = 1                                # of Linux: the signal when the parent has ended


def cores_per_process():
    """CPU cores for each of torchrun's processes on this machine, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def end_with_parent():
    """Let Linux kill this process when the one that started it ends, however that ends.

    A parent that was itself killed cannot stop its workers. torch's data workers look for their
    parent, but not while they wait to hand over an image.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()       # None in a process of torchrun
    if parent and not parent.is_alive():            # it ended before the line above
        os._exit(1)


def end_with_torchrun():
    """`end_with_parent`, if torchrun is the parent; a run without torchrun may go on when its shell
    is closed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def start_data_worker(worker):
    """worker_init_fn of a DataLoader: only the process that started the workers stops them.

    Launchers send signals to all processes, but a run that is told to stop still finishes its step.
    So SIGINT is ignored, and SIGTERM counts only if it comes from the parent. (To ignore it too
    would not do: a parent that ends with a traceback waits for workers until SIGTERM ends them.)
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):              # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_when_parent_says, daemon=True).start()


def shared(tensors):
    """Tensors; in a data worker moved to shared memory, from which the parent reads them.

    torch would do that in the queue's own thread. If /dev/shm is full there, the batch is lost, and
    the parent waits for it for ever; here it is an error of the worker, which the parent gets.
    """
    return [tensor.share_memory_() if get_worker_info() else tensor for tensor in tensors]


def collate_tuples(items):
    """collate_fn of a DataLoader of tuples of tensors and numbers."""
    return shared(default_collate(items))


def end_when_parent_says():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
