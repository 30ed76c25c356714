"""Files that are written whole or not at all, and checkpoints: one safetensors file, no pickle.

The header of a checkpoint holds the method's name, its `config`, and the settings of the run as
JSON, so that the model is built anew from the file alone.
"""
import contextlib
import hashlib
import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from machinery.networks import release
from machinery.contract import find_method

FORMAT = "simzss-2"
EMBEDDINGS = 1                                      # raise it when `embed_classes` changes values
RENAMED = {"weight": "local_weight", "piece": "loader_batch"}       # settings of format 1
# Settings that older runs did not have, with what they did
SINCE = {"method": "simzss", "final_rate": 0.0, "clip": 0.0, "image_token": "class",
         "prompt_weight": 0.0}
UMASK = os.umask(0o022)                             # it can only be read by setting it
os.umask(UMASK)


# --------------------------------------------------------------------------------------------------
# Writing

@contextlib.contextmanager
def whole_file(path):
    """Yield a path to write to; the file takes its place at `path` once the block has succeeded.

    A crash leaves the old file or the new one, never half of one.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_text(path, text):
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_tensors(path, tensors, header=None):
    """Tensors by name and a header (JSON) to a safetensors file. Raises OSError."""
    # Each tensor needs memory of its own, which tied ones do not have.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    metadata = {"simzss": json.dumps(header)} if header else None
    try:
        with whole_file(path) as partial:
            safetensors.torch.save_file(tensors, partial, metadata)
            os.chmod(partial, 0o666 & ~UMASK)       # safetensors gives it to its owner alone
    except (safetensors.SafetensorError, OSError) as error:         # a full disk, for one
        raise OSError(f"{path} could not be written ({error})") from None


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
    """Copy tensors into those of the same names: all of them and no others.

    Raises ValueError with complaint and the names that differ.
    """
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshapen = [f"{key} {list(found[key].shape)} instead of {list(value.shape)}"
                 for key, value in expected.items()
                 if key in found and found[key].shape != value.shape]
    wrong = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    wrong = [f"{len(keys)} {how}: {', '.join(keys[:20])}" + ", ..." * (len(keys) > 20)
             for how, keys in wrong.items() if keys]
    if wrong:
        raise ValueError(f"{complaint}: {'; '.join(wrong)}")
    for key, value in expected.items():
        value.copy_(found[key])


# --------------------------------------------------------------------------------------------------
# Checkpoints

def model_file(path):
    """A checkpoint's path; a folder stands for the model.safetensors in it."""
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


def save_model(path, model, config):
    """Write what a model needs to segment, and config, the settings of its run (JSON values)."""
    header = {"format": FORMAT, "method": model.name, "config": model.config(), "training": config}
    path = model_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, model.checkpoint(), header)


def load_model(path, device="cpu", backbone_weights=None, backbone=None, image_token=None):
    """Build a saved model from its file, or the folder that holds it, ready for inference.

    The settings of its run are then in `model.trained_with`. backbone_weights: local file with the
    frozen backbone's weights, if not where training found it. For the authors' checkpoints (PyTorch
    files) only: backbone, timm's name of it, if its tensors do not tell; image_token, see
    `VisionBackbone`. Opens no file but these, the weights file that the checkpoint names for its
    frozen network, and what timm downloads for a registered name. Raises FileNotFoundError for a
    missing file; ValueError for a file that is no checkpoint, is cut short, or whose backbone is
    another one.
    """
    path = model_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train.py writes one, or name one with "
                                "--checkpoint")
    with open(path, "rb") as file:
        is_pytorch = file.read(4) == b"PK\x03\x04"  # PyTorch writes zip archives
    if is_pytorch:
        if backbone_weights:
            raise ValueError(f"{path} holds its backbone's weights; leave --backbone-weights out")
        config, tensors, name_there = release.read_checkpoint(path, backbone, image_token)
        header = {"method": "simzss", "config": config, "training": {"imported": str(path)}}
        complaint = f"{path} is no checkpoint of the authors with this backbone"
    else:
        if backbone or image_token:
            raise ValueError(f"{path} names its backbone itself; backbone={backbone!r}, "
                             f"image_token={image_token!r} are for the authors' checkpoints")
        header, tensors = read_checkpoint(path)
        name_there = str                            # our own names: as they are
        complaint = f"{path} does not hold the tensors of its own settings"

    config = header["config"]
    try:
        if backbone_weights and not config.get("backbone"):
            raise ValueError(f"{path} has no frozen backbone; leave --backbone-weights out")
        if backbone_weights and config["backbone"]["weights"] in release.STORED:
            raise ValueError(f"{path} holds its backbone's weights; leave --backbone-weights out")
        if backbone_weights:
            config["backbone"]["weights"] = str(Path(backbone_weights).resolve())
        model = find_method(header["method"]).rebuild(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has incomplete settings ({error!r})") from None
    expected = {name_there(name): value for name, value in model.checkpoint().items()}
    fill(expected, tensors, complaint)
    model.check_frozen(config, path)
    model.trained_with = header["training"]
    return model.to(device).eval()


def read_checkpoint(path):
    """(header, tensors) of a checkpoint, its header in today's form. Raises ValueError."""
    try:
        header, tensors = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{path} is no SimZSS checkpoint, or is cut short ({error})") from None
    header = upgrade(header)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is no SimZSS checkpoint of format {FORMAT!r}, found "
                         f"{header.get('format')!r}")
    if not isinstance(header.get("config"), dict) or not isinstance(header.get("training"), dict):
        raise ValueError(f"{path} is no SimZSS checkpoint: its header lacks config or training")
    return header, tensors


def upgrade(header):
    """A header of format 1, which knew SimZSS only, in today's form."""
    if header.get("format") != "simzss-1" and not ("bank" in header and "backbone" in header):
        return header
    header = dict(header)
    config = {key: header.pop(key) for key in ("backbone", "text", "bank") if key in header}
    config["switches"] = rename(header.pop("method", {}))
    training = upgrade_settings(header.get("training", {}))
    return {**header, "format": FORMAT, "method": "simzss", "config": config, "training": training}


def upgrade_settings(training):
    """Settings of a run of any format, in today's form."""
    return {**SINCE, **rename(training)}


def rename(settings):
    return {RENAMED.get(key, key): value for key, value in settings.items()}


def newest_model():
    """The checkpoint under runs/ that was written last. Raises FileNotFoundError."""
    models = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not models:
        raise FileNotFoundError("no trained model under runs/; run train.py first, or name one "
                                "with --checkpoint")
    return models[-1]


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2 ** 24):
            digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Class embeddings, kept beside their checkpoint

def embed_classes(model, classes, templates, options):
    """`model.embed_classes`, kept under a name made of all that it depends on.

    A model without `checkpoint_file` (path and sha256) is embedded anew each time.
    """
    checkpoint = getattr(model, "checkpoint_file", None)
    if checkpoint is None:
        return model.embed_classes(classes, templates, **options)
    device = next(model.parameters()).device
    key = [EMBEDDINGS, checkpoint["checkpoint_sha256"], classes, templates, options, device.type]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(checkpoint["checkpoint"]).parent / "embeddings" / f"{name}.safetensors"
    with contextlib.suppress(OSError, safetensors.SafetensorError, KeyError):   # missing, or broken
        return safetensors.torch.load_file(path, str(device))["embeddings"]
    embeddings = model.embed_classes(classes, templates, **options)
    with contextlib.suppress(OSError):              # a folder where nothing may be written
        path.parent.mkdir(exist_ok=True)
        save_tensors(path, {"embeddings": embeddings})
    return embeddings
