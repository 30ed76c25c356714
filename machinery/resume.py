"""Interruptions: states, signals, the log, steps that are not finite."""
import json
import math
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch.distributed as dist

from machinery.shards import bad_line


@contextmanager
def note_signals():
    """Write SIGTERM and SIGINT into the list that is yielded, to be looked at between steps; a second one 3 s later ends
    the process at once (launchers send the first one twice)."""
    signals, first = [], []

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



def leave(step, signals, rank, patient):
    """End an interrupted run, with the status of a process that a signal ended, once the first process has saved."""
    if patient:
        dist.barrier(patient)
    if rank == 0:
        print(f"interrupted and saved after step {step}; go on with --resume auto", file=sys.stderr)
    sys.exit(128 + (signals or [signal.SIGTERM])[0])



def states(folder):
    """The state files in a folder, the newest first."""
    return sorted(folder.glob("state-*.safetensors"), reverse=True)



def save_state(folder, model, optimizer, shards, config, **counters):
    """Write all that the rest of the run depends on, atomically; the state before it is kept, older ones are deleted.

    Order and crops of single images depend on the seed and the step only; of shards, the places of all readers are kept.
    """
    tensors = {} if shards is None else {"shards": shards}
    for name, p in model.trained().items():
        tensors[name] = p.detach()
        tensors.update({f"optimizer.{key}.{name}": value for key, value in optimizer.state[p].items()})
    settings = {"training": config, "backbone": model.backbone.config, "bank": model.bank, **counters}
    path = folder / f"state-{config['step']:08d}.safetensors"
    unfinished = path.with_suffix(".partial")
    try:
        safetensors.torch.save_file(tensors, unfinished, metadata={"simzss": json.dumps(settings)})
        unfinished.replace(path)
    except (safetensors.SafetensorError, OSError) as error:         # a full disk, for one
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error}); what was saved before is whole, make room and go on with "
                      "--resume auto") from None
    older = [other for other in states(folder) if other < path]
    for other in {*states(folder)} - {path, *older[:1]}:            # newer ones are broken, or of a future given up
        other.unlink()



def read_state(resume, output):
    """Tensors and settings of the file to go on from, or None if the run has not come so far as to write one.

    resume: a file, or auto: the newest one in output that can be read, or a finished model.
    """
    finished = output / "model.safetensors"
    paths = [Path(resume)] if resume != "auto" else [*states(output), finished]
    broken = []
    for path in paths:
        try:
            with safetensors.safe_open(path, "pt") as file:
                settings = json.loads((file.metadata() or {})["simzss"])
                training = settings["training"]
                if path != finished or training["step"] == training["steps"]:
                    return {"path": path, **settings}, {key: file.get_tensor(key) for key in file.keys()}
        except FileNotFoundError:
            if resume != "auto":
                raise FileNotFoundError(f"--resume: no file {resume}; expected a state file, or auto") from None
        except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            broken.append(path.name)
            print(f"warning: {path} cannot be read and is left out ({type(error).__name__}: {error})", file=sys.stderr)
    if broken:
        raise ValueError(f"nothing to go on from: {', '.join(broken)} cannot be read; name a state file with --resume, or "
                         "delete these to begin anew")
    return None



def open_log(path, step):
    """Open the log to be appended to, without what it says of this step and later ones."""
    lines = path.read_text().splitlines() if path.exists() and step else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
    unfinished = path.with_suffix(".partial")
    unfinished.write_text("".join(f"{line}\n" for line in kept))
    unfinished.replace(path)
    return open(path, "a", buffering=1)



def report(values, log, bar):
    """Write a step's line of JSON, which knows no infinity: what is not finite becomes null; and show it in the bar."""
    log.write(json.dumps({key: value if math.isfinite(value) else None for key, value in values.items()}) + "\n")
    shown = {"loss": ".3f", "global": ".3f", "local": ".3f", "lr": ".1e", "pairs_per_second": ".0f", "skipped": "d"}
    bar.set_postfix({key: format(values[key], form) for key, form in shown.items() if key != "skipped" or values[key]})
    bar.update()



def give_up(failures, output, rank):
    path = output / f"nonfinite-{rank}.json"        # each process writes down its own samples
    path.write_text(json.dumps(failures, indent=1))
    last = failures[-1]
    raise ValueError(f"the loss is {last['loss']} and the gradients' norm {last['grad_norm']} at step {last['step']}, not "
                     f"finite for {len(failures)} steps in a row; their samples are in {path}. Lower --base-rate, or use "
                     "--precision fp32")



def check_bad(counts, pairs, limit):
    bad = sum(counts)
    if bad > max(limit * (pairs + bad), 10):
        raise ValueError(f"{bad} of the first {pairs + bad} pairs could not be read ({bad_line(counts)}); at most {limit:.0%} "
                         "may be bad, see --max-bad")



MAX_BAD = 0.01                                      # share of missing or unreadable images that is bad luck, not a mistake
