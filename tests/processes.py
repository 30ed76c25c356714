"""Several processes that run a function as torchrun would start it."""
import os
import socket
import sys
import time

from torch import multiprocessing


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
