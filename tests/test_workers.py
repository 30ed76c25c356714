"""Processes that work for another one: none is left behind, however that one ends, and none is
stopped by a signal that was meant for it (machinery/training/workers.py)."""
import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from conftest import ROOT
from data import collate
from eval import evaluate
from machinery.errors import one_line_errors
from machinery.scoring.benchmarks import open_dataset
from machinery.training import run as training_run
from machinery.training.loading import BatchStream
from machinery.training.workers import collate_tuples, cores_per_process, start_data_worker

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc here")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
PATIENCE = 300                                      # seconds until a test gives up


class Command:
    """A command in a session of its own; its processes are known by a variable of the environment.
    """

    def __init__(self, *command, **settings):
        self.token = f"TOKEN={uuid.uuid4()}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT),
                       "TOKEN": self.token.partition("=")[2]}
        self.process = subprocess.Popen(list(map(str, command)), env=environment, text=True,
                                        start_new_session=True, **settings)

    def running(self):
        """{process id: command line} of the command and all that it started."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and self.token.encode() in (folder
                                                                     / "environ").read_bytes():
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(folder.name)] = line
            except OSError:                         # it has just ended
                pass
        return found

    def signal_all(self, number):
        for process in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def wait_until(self, is_true):
        """Wait until is_true(running processes), while the command runs."""
        give_up = time.time() + PATIENCE
        while not is_true(self.running()):
            assert self.process.poll() is None and time.time() < give_up, self.running()
            time.sleep(0.05)

    def wait_for_end(self):
        """Exit status of the command, once all that it started has ended too."""
        status = self.process.wait(PATIENCE)
        give_up = time.time() + PATIENCE
        while self.running():
            assert time.time() < give_up, self.running()
            time.sleep(0.05)
        return status


@pytest.fixture
def command():
    """command(*arguments) -> `Command`; what a failed test leaves is killed."""
    started = []

    def start(*arguments, **settings):
        started.append(Command(*arguments, **settings))
        return started[-1]
    yield start
    for one in started:
        one.signal_all(signal.SIGKILL)
        one.process.wait()


# --------------------------------------------------------------------------------------------------
# Data workers

# A run with two data workers, which wait to hand over an item that is larger than a pipe
DATA_WORKERS = """
import signal, sys, time
from torch.utils.data import DataLoader
from machinery.training.workers import start_data_worker

class Items:
    def __len__(self):
        return 10 ** 9
    def __getitem__(self, i):
        return bytes(10 ** 6)

def run(how, signals):
    loader = iter(DataLoader(Items(), batch_size=None, num_workers=2,
                             worker_init_fn=start_data_worker))
    for _ in range(4):                              # both workers have started
        next(loader)
    print("ready", flush=True)
    if how == "traceback":
        raise RuntimeError
    while how == "signal" and not signals or how == "kill":
        next(loader)
    for _ in range(20):
        next(loader)
    print("saved", flush=True)

signals = []
for number in (signal.SIGTERM, signal.SIGINT):      # as train.py notes them
    signal.signal(number, lambda number, frame: signals.append(number))
run(sys.argv[1], signals)
"""


@pytest.mark.parametrize("how, number, status", [
    ("end", None, 0), ("traceback", None, 1), ("signal", signal.SIGTERM, 0),
    ("signal", signal.SIGINT, 0), ("kill", signal.SIGKILL, -signal.SIGKILL)])
def test_data_workers_end_with_their_run(command, how, number, status):
    """No data worker is left, though it waits to hand over an item, by a run that ends, fails or is
    killed. A launcher's signal to all processes stops none before the run has saved."""
    run = command(sys.executable, "-c", DATA_WORKERS, how, stdout=subprocess.PIPE,
                  stderr=subprocess.PIPE)
    assert run.process.stdout.readline() == "ready\n", run.process.communicate()[1]
    if number == signal.SIGKILL:
        run.process.kill()
    elif number:
        os.killpg(run.process.pid, number)
    assert run.wait_for_end() == status
    if status == 0:
        assert run.process.communicate() == ("saved\n", "")


# --------------------------------------------------------------------------------------------------
# Data workers that cannot hand over, or hang

@pytest.fixture
def little_shared_memory():
    """No file may grow beyond 16 kB: nor may shared memory, as in a container."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 14, most))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.parametrize("collate_fn, item", [
    (collate, {"pixels": torch.zeros(2 ** 15)}), (collate_tuples, (torch.zeros(2 ** 15), 1))])
def test_full_shared_memory_is_one_line(little_shared_memory, collate_fn, item):
    """A batch that does not fit into shared memory ends the run with one line, which names the ways
    out; nobody waits for it."""
    loader = DataLoader([item] * 2, 2, num_workers=1, collate_fn=collate_fn, timeout=PATIENCE,
                        worker_init_fn=start_data_worker)
    with pytest.raises(SystemExit) as stopped, one_line_errors("-"):
        list(loader)
    message, = stopped.value.code.splitlines()
    assert all(word in message for word in ("/dev/shm", "--workers 0", "--shm-size")), message


def test_scoring_needs_no_shared_memory(folder, model, little_shared_memory):
    """Scoring with a data worker and hardly any shared memory counts what it counts without."""
    dataset = open_dataset(folder, ["background"])
    alone, with_worker = (evaluate(model, dataset, model.protocol, workers=workers)[0]
                          for workers in (0, 1))
    assert with_worker["aAcc"] == alone["aAcc"]


def test_a_signal_ends_a_run_without_data(tmp_path, monkeypatch):
    """SIGTERM ends a run whose data worker hangs, though no step ends any more."""
    monkeypatch.setattr(training_run, "LOOK_AGAIN", 0.1)
    monkeypatch.setattr(training_run, "GIVE_UP", 0.2)
    loader = DataLoader(range(2), collate_fn=lambda items: time.sleep(PATIENCE), num_workers=1,
                        worker_init_fn=start_data_worker, timeout=PATIENCE)
    stream = BatchStream(SimpleNamespace(positions=None, cache=None), loader, 1, "cpu")
    begun = training_run.Run(SimpleNamespace(output=tmp_path), {"step": 0, "steps": 2},
                             SimpleNamespace(trained=dict), None, None, stream,
                             SimpleNamespace(rank=1))
    with pytest.raises(TimeoutError, match="no data came"), begun:
        os.kill(os.getpid(), signal.SIGTERM)
        next(stream.loader_batches())


# --------------------------------------------------------------------------------------------------
# Processes of torchrun

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_training_ends_with_torchrun(command, tmp_path, number):
    """SIGKILL of torchrun leaves neither a process of train.py nor a data worker. With SIGTERM to
    all of them the run saves a state, and nothing is left."""
    log = tmp_path / "log.jsonl"
    run = command(*TORCHRUN, ROOT / "train.py", "--recipe", "toy", "--set", "run.epoch_pairs=40",
                  "--batch", "8", "--epochs", "1000000", "--image-size", "64", "--text-width", "32",
                  "--workers", "1", "--eval-data", "none", "--output", tmp_path,
                  stdout=subprocess.DEVNULL)
    run.wait_until(lambda found: log.exists() and log.read_text())      # a step is done
    if number == signal.SIGKILL:
        run.process.kill()
    else:
        run.signal_all(number)
    assert run.wait_for_end() != 0
    assert len(list(tmp_path.glob("state-*.safetensors"))) == (number == signal.SIGTERM)


def test_scoring_ends_with_torchrun(command, folder, checkpoint, tmp_path):
    """SIGKILL of torchrun leaves neither a process of eval.py nor a data worker."""
    for part in ("images", "masks"):
        for i in range(2000):                       # more than are scored in a moment
            os.link(folder / part / "photo0.png", folder / part / f"more{i}.png")
    run = command(*TORCHRUN, ROOT / "eval.py", "--dataset", folder, "--without", "background",
                  "--checkpoint", checkpoint, "--device", "cpu", "--workers", "2", "--output",
                  tmp_path, stdout=subprocess.DEVNULL)
    run.wait_until(lambda found: sum("eval.py" in line for line in found.values()) >= 7)
    run.process.kill()
    assert run.wait_for_end() == -signal.SIGKILL


# --------------------------------------------------------------------------------------------------
# Parser processes

def annotation(command, folder):
    """concepts.py with two parser processes, and the number of one of them."""
    path = folder / "captions.tsv"
    path.write_text("".join(f"{i}.png\ta dog on the grass, number {i}\n" for i in range(300_000)))
    run = command(sys.executable, ROOT / "concepts.py", path, "--parser", "match", "--processes",
                  "2", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def parsers(found):
        return [process for process, line in found.items()
                if "concepts.py" in line and process != run.process.pid]
    run.wait_until(lambda found: len(parsers(found)) == 2)
    return run, parsers(run.running())[0]


def test_parser_processes_end_with_their_command(command, tmp_path):
    """`concepts.py FILE --processes 2` that is killed leaves no parser process."""
    run, _ = annotation(command, tmp_path)
    run.process.kill()
    assert run.wait_for_end() == -signal.SIGKILL


def test_a_killed_parser_process_ends_the_command(command, tmp_path):
    """When a parser process is killed, the command ends with one line; it does not wait for it."""
    run, victim = annotation(command, tmp_path)
    os.kill(victim, signal.SIGKILL)
    _, errors = run.process.communicate(timeout=PATIENCE)
    assert run.wait_for_end() == 1 and "Traceback" not in errors
    assert "error: a parser process died" in errors.splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# How many

def test_cores_are_shared_by_the_processes_of_torchrun(monkeypatch):
    """Each of torchrun's processes on a machine counts its part of the cores, one at least."""
    cores = len(os.sched_getaffinity(0))
    for processes, expected in [(1, cores), (cores, 1), (4 * cores, 1)]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert cores_per_process() == expected
