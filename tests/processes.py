"""Several processes that run a function as torchrun would start it."""
import os
import random
import shutil
import signal
import socket
import sys
import time

import pytest
import torch
from torch import multiprocessing

import train
from conftest import without_times
from machinery.networks.checkpoint import load_model
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

    def wait(self, seconds=300):
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


def stopped(start, folder, number, ranks):
    """Processes that a signal has ended at a random moment of their training; a run that was
    quicker than the signal is begun again.

    start: function that starts `Processes` which train into folder.
    number: the signal, sent to the processes of these ranks.
    """
    log = folder / "log.jsonl"
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        processes = start()
        lines = random.randint(1, 6)                # of the log, one a step
        while all(process.is_alive() for process in processes.processes):
            if log.exists() and log.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.001)
        time.sleep(random.random() / 50)            # somewhere in a step
        for rank in ranks:
            if processes.processes[rank].is_alive():
                os.kill(processes.processes[rank].pid, number)
        if 0 not in processes.wait():
            return processes
    raise AssertionError("the runs were too short to be stopped")


def ended_after(step, method, command):
    """train.py that gets SIGTERM after a step; in a process of its own."""
    after_step = method.after_step

    def end(model, now, steps):
        after_step(model, now, steps)
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
    method.after_step = end
    train.main(command)


def check_resumed(whole, folder, method, step, flags):
    """A run into folder that is ended after a step and resumed has the log and the weights of an
    uninterrupted one, into whole, bit by bit."""
    command = [*map(str, flags), "--output", str(folder)]
    first = Processes(folder.parent, 1, ended_after, step, method, command)
    assert first.wait() == [128 + signal.SIGTERM], first.output()
    train.main([*command, "--resume", "auto"])
    assert same_runs(folder, whole)


def same_runs(folder, reference):
    """Whether two runs are equal, in each step and in all that their checkpoints hold."""
    logs = [without_times(of) for of in (folder, reference)]
    kept = [load_model(of).checkpoint() for of in (folder, reference)]
    return logs[0] == logs[1] and kept[0].keys() == kept[1].keys() and all(
        torch.equal(kept[0][name], value) for name, value in kept[1].items())


# --------------------------------------------------------------------------------------------------
# A step in two processes

def losses_and_gradients(method, batch, rank=0, world=1):
    size = len(next(iter(batch.values())))
    rows = slice(rank * size // world, (rank + 1) * size // world)
    torch.manual_seed(3)                            # as train.py does before each step
    batch = method.features({name: value[rows] for name, value in batch.items()})
    losses = method.losses(method.encode(batch), batch)
    losses["loss"].backward()
    average_gradients(list(method.trained().values()))
    return ({name: value.item() for name, value in losses.items()},
            {name: p.grad for name, p in method.trained().items()})


def save_step(method, batch, folder):
    processes = join_processes("cpu", timeout_minutes=1)
    found = losses_and_gradients(method, batch, processes.rank, processes.world)
    torch.save(found, folder / f"{processes.rank}")
    processes.end_together()


def check_two_processes(folder, method, batch, rounding=1e-7):
    """Two processes with half a batch each have the losses of one with all of it, and its gradients
    of all parameters. rounding: norm of the error where a gradient is zero."""
    both = Processes(folder, 2, save_step, method, batch, folder)
    expected, whole = losses_and_gradients(method, batch)
    assert both.wait() == [0, 0], both.output()
    for rank in range(2):
        losses, split = torch.load(folder / f"{rank}")
        assert losses == pytest.approx(expected, rel=1e-5)
        for name, gradient in whole.items():
            assert (split[name] - gradient).norm() <= 1e-4 * gradient.norm() + rounding, name
