"""How a script ends when something is wrong: one line, and a status that is not zero."""
import argparse
import contextlib
import logging
import sys
import urllib.error
import urllib.request

MOST = 2000                                         # characters of a message: names come from files


class CommandLine(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line, without the usage before it."""

    def error(self, message):
        if message.startswith("unrecognized arguments: ") and "--classes" in sys.argv:
            message += '; names of several words, or several names, need quotes: "cat, sofa"'
        self.exit(2, f"error: {message} (--help lists all flags)\n")


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
def quiet_hub(downloads=True):
    """One line of ours in place of the retries that the Hugging Face Hub would print. A hub that
    does not answer is not tried again and again for a minute: its cache is all there is.

    downloads: whether something may be downloaded in the block.
    """
    from huggingface_hub import constants           # slow to import
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    is_offline = constants.HF_HUB_OFFLINE
    if downloads and not is_offline:
        constants.HF_HUB_OFFLINE = not answers(constants.ENDPOINT)
    try:
        yield
    finally:
        log.setLevel(level)
        constants.HF_HUB_OFFLINE = is_offline


def answers(address, seconds=5):
    """Whether anything answers at a web address."""
    try:
        urllib.request.urlopen(address, timeout=seconds).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)            # an answer, too
    return True


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
