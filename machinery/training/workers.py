"""Processes that work for another one and end when it does."""
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial


def cores_per_process():
    """CPU cores for each of torchrun's processes on this machine, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def end_with_parent():
    """End this process within seconds of the one that started it, even if that one was killed."""
    parent = multiprocessing.parent_process()       # None in a process of torchrun
    parent_id = os.getppid()

    def watch():
        if parent:
            parent.join()
        else:
            while os.getppid() == parent_id:
                time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with_torchrun():
    """`end_with_parent`, if torchrun is the parent; a run without torchrun may go on
    when its shell is closed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def start_data_worker(worker):
    """worker_init_fn of a DataLoader: the process that started the workers decides when they stop.

    Launchers send signals to all processes, but a run that is told to stop still finishes its step.
    So SIGINT is ignored, and SIGTERM counts only if it comes from the parent.
    """
    def wait_for_signal_of_parent():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):              # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait_for_signal_of_parent, daemon=True).start()
    end_with_parent()                               # last: its thread inherits the blocked signal


@contextlib.contextmanager
def process_pool(processes, make, *arguments):
    """Yield map(function, items), which runs in new processes: each makes its own tool =
    make(*arguments) once, and results are function(tool, item), in order.

    Functions are sent by name. Raises ChildProcessError if a process dies.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")   # a process per core, not also a thread per core
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start, (make, *arguments))
    try:
        with pool:
            yield lambda function, items: pool.map(partial(_call, function), items)
    except BrokenProcessPool:
        raise ChildProcessError("a parser process died, perhaps for want of memory; run the "
                                "command again, with fewer --processes. Finished shards are "
                                "kept") from None


def _start(make, *arguments):
    global _tool
    end_with_parent()
    _tool = make(*arguments)


def _call(function, item):
    return function(_tool, item)
