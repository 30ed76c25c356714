"""Files that are written whole or not at all, and tensors in safetensors files without pickle."""
import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

import safetensors
import safetensors.torch
import torch


@contextlib.contextmanager
def whole_file(path):
    """Yield a path to write to; the file takes its place at `path` once the block has succeeded.

    A crash leaves the old file or the new one, never half of one. Raises OSError, which names the
    file, if the disk is full, for one.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise OSError(f"{path} could not be written ({error})") from None
        raise


def remove_partial(folder, seconds=3600):
    """Delete what killed processes left half-written in a folder: what is older than that."""
    for path in Path(folder).glob("*.partial"):
        with contextlib.suppress(OSError):          # another process was quicker
            if time.time() - path.stat().st_mtime >= seconds:
                path.unlink()


def write_text(path, text):
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_png(path, picture, **options):
    """A PIL image as PNG, whole or not at all."""
    with whole_file(path) as partial:
        picture.save(partial, "PNG", **options)


def save_tensors(path, tensors, header=None):
    """Write tensors by name and a header (JSON) to a safetensors file.

    As bytes: safetensors itself would write through a file of a name that nobody knows after a
    kill.
    """
    # Each tensor needs memory of its own, which tied ones do not have.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    metadata = {"simzss": json.dumps(header)} if header else None
    with whole_file(path) as partial:
        partial.write_bytes(safetensors.torch.save(tensors, metadata))


def read_tensors(path):
    """(header, tensors by name) of a file of `save_tensors`.

    Raises FileNotFoundError; ValueError for a file that is cut short or has no header.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["simzss"])
            if not isinstance(header, dict):
                raise TypeError(f"its header is {type(header).__name__}, expected a JSON object")
            return header, {key: file.get_tensor(key) for key in file.keys()}
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


@torch.no_grad()
def fill(expected, found, complaint):
    """Copy tensors into those of the same names: all of them and no others, finite ones only.

    Raises ValueError with complaint and the names that differ, or whose values are not finite.
    """
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshapen = [f"{key} {list(found[key].shape)} instead of {list(value.shape)}"
                 for key, value in expected.items()
                 if key in found and found[key].shape != value.shape]
    refuse({"missing": missing, "unexpected": unexpected, "misshapen": misshapen}, complaint)
    for key, value in expected.items():
        value.copy_(found[key])
    infinite = [key for key, value in expected.items() if not value.isfinite().all()]
    refuse({"not finite": infinite}, complaint)


def refuse(wrong, complaint):
    """Raise ValueError with complaint if names of tensors are wrong. wrong: {how: names}."""
    wrong = [f"{len(keys)} {how}: {', '.join(keys[:10])}" + ", ..." * (len(keys) > 10)
             for how, keys in wrong.items() if keys]
    if wrong:
        raise ValueError(f"{complaint}: {'; '.join(wrong)}")


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors):
    """One hash of names and values of tensors."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        values = tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(values.numpy())
    return digest.hexdigest()
