"""Several processes that run a function as torchrun would start it."""
import os
import socket
import sys
import time

import pytest
import torch
from torch import multiprocessing

from machinery.parallel import average_gradients, join_processes


class Processes:
    """world processes that call function(*arguments), with the variables that torchrun sets.

    Their output goes to files in folder.
    """

    def __init__(self, folder, world, function, *arguments):
        folder.mkdir(exist_ok=True)
        self.logs = [folder / f"output{rank}.txt" for rank in range(world)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        variables = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        context = multiprocessing.get_context("fork")       # nothing has to be imported again
        self.processes = [context.Process(target=self.run,
                                          args=(rank, variables, function, arguments))
                          for rank in range(world)]
        for process in self.processes:
            process.start()

    def run(self, rank, variables, function, arguments):
        sys.stdout = sys.stderr = open(self.logs[rank], "w", buffering=1)
        os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
        function(*arguments)

    def output(self):
        return "".join(log.read_text() for log in self.logs)

    def wait(self, seconds=90):
        """Exit statuses once all are done; a negative one is the signal that ended the process."""
        end = time.time() + seconds
        # join() would wait for the data workers of a killed process.
        while time.time() < end and any(process.is_alive() for process in self.processes):
            time.sleep(0.02)
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in statuses, f"still running: {statuses} {self.output()}"
        return statuses


# --------------------------------------------------------------------------------------------------
# A step in two processes

def losses_and_gradients(method, batch, rank=0, world=1):
    size = len(next(iter(batch.values())))
    rows = slice(rank * size // world, (rank + 1) * size // world)
    torch.manual_seed(3)                            # as train.py does before each step
    losses = method.backward({name: value[rows] for name, value in batch.items()}, lambda x: x)
    average_gradients(list(method.trained().values()))
    return ({name: value.item() for name, value in losses.items()},
            {name: p.grad for name, p in method.trained().items()})


def save_step(method, batch, folder):
    processes = join_processes("cpu", timeout_minutes=1)
    found = losses_and_gradients(method, batch, processes.rank, processes.world)
    torch.save(found, folder / f"{processes.rank}")
    processes.leave()


def check_two_processes(folder, method, batch):
    """Two processes with half a batch each have the losses of one with all of it, and its gradients
    of all parameters."""
    both = Processes(folder, 2, save_step, method, batch, folder)
    expected, whole = losses_and_gradients(method, batch)
    assert both.wait() == [0, 0], both.output()
    for rank in range(2):
        losses, split = torch.load(folder / f"{rank}")
        assert losses == pytest.approx(expected, rel=1e-5)
        for name, gradient in whole.items():
            assert (split[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
