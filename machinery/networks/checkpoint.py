"""Checkpoints: one safetensors file without pickle, from which alone a model is built anew.

Its header holds the method's name and settings, the protocol, the names of the bank and the
settings of the run, as JSON.
"""
import re
from pathlib import Path

import numpy as np
import torch

from machinery.contract import PRETRAINED, find_method
from machinery.files import file_sha256, fill, read_tensors, save_tensors, tensors_sha256
from machinery.names import read_templates
from machinery.networks import release
from machinery.networks.backbones import at_most
from machinery.settings import (abbreviate, as_mapping, check_value, merge, nested, read,
                                read_recipe)
from machinery.tokenizer import VOCABULARY

FORMAT = "simzss-3"
FROZEN_PARAMETERS = 10 ** 8                         # parameters beside those in the file, at most
FROZEN_TENSORS = 10 ** 4                            # the same of tensors: headers may ask for more


def model_file(path):
    """A checkpoint's path; a folder stands for the model.safetensors in it."""
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


def newest_model():
    """The checkpoint under runs/ that was written last. Raises FileNotFoundError."""
    models = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not models:
        raise FileNotFoundError("no trained model under runs/; run train.py first, or name one "
                                "with --checkpoint")
    return models[-1]


# --------------------------------------------------------------------------------------------------
# Writing

def header_of(method, training, with_training_only=False):
    """What a checkpoint or a state says of its method, as JSON. training: of its run.
    with_training_only: see `frozen_sha256`."""
    return {"format": FORMAT, "method": method.name, "settings": as_mapping(method.settings),
            "protocol": as_mapping(method.protocol), "bank": method.bank,
            "frozen_sha256": frozen_sha256(method, with_training_only), "training": training,
            "seen_tokens": bits_of(method.seen_tokens)}


def bits_of(seen):
    """A bool tensor as hexadecimal text, a bit for each number; None stays None."""
    return None if seen is None else np.packbits(seen.cpu().numpy()).tobytes().hex()


def read_seen_tokens(header, path):
    """(V,) bool of a header, see `Method.seen_tokens`; None where it is not known, as in older
    files. Raises ValueError."""
    bits = check_value(header.get("seen_tokens"), str | None, {}, f"{path}: seen_tokens")
    if bits is None:
        return None
    if not re.fullmatch(f"[0-9a-f]{{{VOCABULARY // 4}}}", bits):
        raise ValueError(f"{path}: seen_tokens is {abbreviate(bits)}; expected {VOCABULARY:,} bits "
                         "in hexadecimal digits")
    packed = np.frombuffer(bytes.fromhex(bits), np.uint8)
    return torch.from_numpy(np.unpackbits(packed).astype(bool))


def frozen_sha256(method, with_training_only=False):
    """Hash of the tensors that a checkpoint does not hold because they are made anew.

    with_training_only: also of those that only training has, for a state.
    """
    left_out = () if with_training_only else method.TRAINING_ONLY
    return tensors_sha256({name: value for name, value in method.state_dict().items()
                           if name.startswith(method.FROZEN) and not name.startswith(left_out)})


def save_model(path, model, config):
    """Write what a model needs to segment, and config, the settings of its run (JSON values)."""
    path = model_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, model.checkpoint(), header_of(model, config))


# --------------------------------------------------------------------------------------------------
# Reading

def read_header(header, path):
    """The parts of a header, which anybody may have written, checked: (method class, settings,
    protocol, bank). Raises ValueError."""
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of format {FORMAT!r}, found "
                         f"{abbreviate(header.get('format'))}; one of an earlier version has to be "
                         "trained again")
    if not isinstance(header.get("training"), dict):
        raise ValueError(f"{path}: training is no table of settings")
    training = {"run": {}, **header["training"]}
    run = check_value(training.pop("run"), dict, {}, f"{path}: training: run")
    check_value(training, dict, {}, f"{path}: training")
    check_value(run.get("image_size", 224), int, {"least": 1, "most": 4096},
                f"{path}: training: image_size")
    bank = check_value(header.get("bank"), tuple[str, ...], {}, f"{path}: bank")
    method_class = find_method(check_value(header.get("method"), str, {}, f"{path}: method"))
    settings = read(method_class.Settings, header.get("settings"), f"{path}: settings")
    protocol = read(method_class.Protocol, header.get("protocol"), f"{path}: protocol")
    return method_class, settings, protocol, bank


def load_model(path, device="cpu", backbone_weights=None, backbone=None, image_token=None,
               method=None, protocol=None):
    """Build a saved model from its file, or the folder that holds it, ready for inference.

    path: our checkpoint, or a published one of SimZSS, OVSegmentor or PixelCLIP (a PyTorch file);
        or "clip" and the like, see `PRETRAINED`.
    backbone_weights: local file with the frozen backbone's weights, if not where training found it.
    backbone: of a published one, timm's name of its backbone, or open_clip's of its CLIP, if its
        tensors do not tell.
    image_token: of a published one of SimZSS, see `BackboneSettings`.
    method: name of the only method whose checkpoint will do.
    protocol: settings at test time, by name, in place of those of its training.

    `model.protocol` is the one in use, `model.trained_with` the settings of its run,
    `model.checkpoint_file` path and hash of its file. Opens no file but these, the weights file
    that the checkpoint names for its frozen network, and what timm downloads for a registered name.
    Raises FileNotFoundError or ValueError.
    """
    if str(path).partition(":")[0] in PRETRAINED:
        if backbone_weights or backbone or image_token:
            raise ValueError(f"--checkpoint {path} takes no --backbone-weights, --backbone or "
                             "--image-token; name a local file as clip:MODEL/FILE")
        return load_pretrained(str(path), protocol).to(device).eval()
    path = model_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train.py writes one, or name one with "
                                "--checkpoint")
    with open(path, "rb") as file:
        is_pytorch = file.read(4) == b"PK\x03\x04"  # PyTorch writes zip archives
    if is_pytorch:
        model = load_imported(path, backbone, image_token, backbone_weights, protocol)
    else:
        if backbone or image_token:
            raise ValueError(f"{path} names its backbone itself; backbone={backbone!r}, "
                             f"image_token={image_token!r} are for the authors' checkpoints")
        model = load_own(path, backbone_weights, method, protocol)
    model.checkpoint_file = {"checkpoint": str(path), "checkpoint_sha256": file_sha256(path)}
    return model.to(device).eval()


def changed_protocol(method_class, protocol, changes):
    """A method's protocol with changes by name, checked before a model is built."""
    values = merge(as_mapping(protocol), changes or {})
    changed = read(method_class.Protocol, values, f"the protocol of {method_class.name}")
    if changes:
        read_templates(changed.templates)           # raises what embedding would raise
    return changed


def load_pretrained(name, protocol):
    """A model that needs no training here. name: of PRETRAINED, or NAME:which."""
    kind, _, which = name.partition(":")
    if which.endswith("/imported"):
        raise ValueError(f"--checkpoint {name}: 'imported' is no name of weights")
    method, setting = PRETRAINED[kind]
    method_class = find_method(method)
    settings = read(method_class.Settings, {setting: which} if which else {},
                    f"--checkpoint {name}")
    changed_protocol(method_class, method_class.Protocol(), protocol)       # refused at once
    model = method_class(settings)                  # with a protocol of its own
    model.protocol = changed_protocol(method_class, model.protocol, protocol)
    return model


def load_own(path, backbone_weights, method=None, changes=None):
    """A model of `save_model`. method, changes: see `load_model`, there protocol."""
    try:
        header, tensors = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{path} is no SimZSS checkpoint, or is cut short ({error})") from None
    if backbone_weights:
        method_class, settings, _, _ = read_header(header, path)
        backbone = getattr(settings, "backbone", None)
        if backbone and backbone.weights in release.STORED:
            raise ValueError(f"{path} holds its backbone's weights; leave --backbone-weights out")
        header = merge(header, nested(f"settings.{method_class.WEIGHTS}", str(backbone_weights)))
    method_class, settings, protocol, bank = read_header(header, path)
    if method and method_class.name != method:      # not made: it may name other files, or itself
        raise ValueError(f"{path} is a checkpoint of {method_class.name}, expected one of {method}")
    protocol = changed_protocol(method_class, protocol, changes)
    size = sum(tensor.numel() for tensor in tensors.values())
    try:
        # Twice: a network may set a parameter again. What is frozen is not in the file
        with at_most(max(2 * size, FROZEN_PARAMETERS), max(2 * len(tensors), FROZEN_TENSORS),
                     f"{path} does not hold the tensors of its own settings, which are"):
            model = method_class(settings, bank)
    except (ValueError, OSError):
        raise
    except Exception as error:                      # whatever sizes that cannot be make torch raise
        raise ValueError(f"{path}: no network can be made by its settings: {error}") from None
    fill(model.checkpoint(), tensors, f"{path} does not hold the tensors of its own settings")
    if frozen_sha256(model) != header.get("frozen_sha256"):
        raise ValueError(f"the frozen weights that were found are not those that {path} was "
                         "trained with; pass --backbone-weights FILE with the right ones (of "
                         "PixelCLIP MODEL/FILE)")
    model.protocol = protocol
    model.trained_with = header["training"]
    model.seen_tokens = read_seen_tokens(header, path)
    return model


def load_imported(path, backbone, image_token, backbone_weights, protocol=None):
    """The model of a published checkpoint, with the protocol of its method's recipe. It does not
    name its concepts: the bank is empty."""
    if backbone_weights:
        raise ValueError(f"{path} holds its backbone's weights; leave --backbone-weights out")
    name, tensors = release.read_checkpoint(path)
    published = release.RELEASES[name]
    method_class = find_method(name)
    own = read_recipe(published.recipe).get("protocol", {})
    own = read(method_class.Protocol, own, published.recipe)
    protocol = changed_protocol(method_class, own, protocol)
    mapping = published.settings(tensors, path, backbone, image_token)
    model = method_class(read(method_class.Settings, mapping, path))
    model.protocol = protocol
    expected = published.tensors(model.checkpoint())
    fill(expected, release.needed(tensors, expected, published),
         f"{path} is no checkpoint of {name}'s authors with these sizes")
    model.trained_with = {"imported": str(path)}
    return model
