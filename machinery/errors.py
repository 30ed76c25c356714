"""How a script ends when something is wrong: one line, and a status that is not zero."""
import contextlib
import logging
import sys

MOST = 2000                                         # characters of a message: names come from files


@contextlib.contextmanager
def one_line_errors(full_memory):
    """Turn the user's mistakes, full disks and dead processes into one line and exit status 1,
    Ctrl-C into a word and 130.

    full_memory: what to do if the GPU's memory is full.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
    except RuntimeError as error:
        sys.exit(f"error: {runtime_line(error, full_memory)}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def quiet_hub():
    """One line of ours in place of the retries that the Hugging Face Hub would print."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def one_line(error):
    """The message of an error; of one in a data worker, which has a traceback, the last line."""
    message = str(error).strip()
    if "Original Traceback" in message:
        message = message.splitlines()[-1].partition(": ")[2]
    message = " ".join(message.split())
    message = "".join(letter if letter.isprintable() else "?" for letter in message[:MOST])
    return message if len(message) < MOST else f"{message}..."


def runtime_line(error, full_memory):
    """Words for a RuntimeError that is no mistake in this code; any other is raised again."""
    import torch                                    # slow to import, and not every script needs it
    import torch.distributed as dist
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full; {full_memory} ({first})"
    if "shared memory" in str(error) or "</torch_" in str(error):       # its files' names
        return ("data workers hand over their batches in shared memory, /dev/shm, which is full; a "
                "container has little of it. Load without them, --workers 0, or start Docker with "
                f"more, --shm-size 16g ({str(error).strip().splitlines()[-1]})")
    lost = isinstance(error, dist.DistError) or "gloo" in str(error)
    if lost or first.startswith("DataLoader"):
        hints = getattr(error, "__notes__", [])     # of train.py: a state to go on from
        return "; ".join(["another process died or answers no more", *hints]) + f" ({first})"
    raise error
