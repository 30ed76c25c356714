"""Which model, and by which protocol: what segment.py and eval.py share at their start."""
import contextlib
import dataclasses
import hashlib
import json
import os
from argparse import SUPPRESS
from pathlib import Path

import safetensors
import torch

from machinery.contract import PRETRAINED, Method, Protocol, find_method
from machinery.files import file_sha256, remove_partial, save_tensors
from machinery.names import read_templates
from machinery.networks.backbones import warn_if_random
from machinery.networks.checkpoint import load_model, model_file, newest_model
from machinery.parallel import pick_device
from machinery.settings import add_flags, add_set_flag, as_mapping, given, merge, read
from machinery.toy import is_scene

EMBEDDINGS = 2                                      # raise it when `embed_classes` changes values


def add_model_flags(parser):
    pretrained = "".join(f", or {name}, which needs no training here" for name in PRETRAINED)
    model = parser.add_argument_group("model").add_argument
    model("--checkpoint",
          help=f"model file or folder{pretrained} (default: the newest under runs/)")
    model("--backbone", help="timm name of the backbone in an authors' checkpoint, if its tensors "
                             "do not tell")
    model("--image-token", choices=["class", "mean"],
          help="what stands for the whole image in an authors' checkpoint (default: class; mean "
               "for a ViT-L)")
    model("--backbone-weights", help="local file with the backbone's weights, if not where "
                                     "training had it")
    model("--batch", type=positive, default=8, help="windows at a time (default: %(default)s)")
    model("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
          help="where to compute (default: %(default)s)")
    heading = "protocol (what the model was trained with replaces these defaults)"
    group = parser.add_argument_group(heading)
    add_flags(group, Protocol, "protocol")
    group.add_argument(
        "--class-embedding", dest="protocol.class_embedding", default=SUPPRESS,
        choices=["caption", "concept"],
        help="SimZSS: embed a class by its prompt's end token or by its name's tokens")
    add_set_flag(parser, "protocol.keep_classes=3")


def positive(text):
    """A flag's value as a whole number of at least 1, or argparse's error."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


# --------------------------------------------------------------------------------------------------
# Model and protocol

def open_model(args):
    """The model of the command line. `model.protocol` is the method's default, replaced by what
    the model's training used, replaced by the flags."""
    flags = given(args)
    if set(flags) - {"protocol"}:
        raise ValueError(f"--set {min(set(flags) - {'protocol'})}...: expected protocol.NAME=VALUE")
    torch.manual_seed(0)                            # a method may draw random numbers
    device = pick_device(args.device)
    name, _, which = str(args.checkpoint).partition(":")
    if name in PRETRAINED:
        method, setting = PRETRAINED[name]
        method_class = find_method(method)
        values = {setting: which} if which else {}
        settings = read(method_class.Settings, values, f"--checkpoint {args.checkpoint}")
        model = method_class(settings).to(device).eval()
    else:
        path = model_file(args.checkpoint or newest_model())
        model = load_model(path, device, args.backbone_weights, args.backbone, args.image_token)
        model.checkpoint_file = {"checkpoint": str(path), "checkpoint_sha256": file_sha256(path)}
    warn_if_random(model.settings)
    values = merge(as_mapping(model.protocol), flags.get("protocol", {}))
    model.protocol = read(model.Protocol, values, f"the protocol of {model.name}")
    if model.protocol.propagate and not has_unit_tokens(model):
        model.unit_tokens(None)                     # says so
    return model


def has_unit_tokens(model):
    """Whether its scores can be propagated."""
    return type(model).unit_tokens is not Method.unit_tokens


def training_run(model):
    """The run's settings of a model that was trained here, by name; {} for any other model."""
    return model.trained_with.get("run", {})


def refuse_toy_model(model, files):
    """Raise ValueError if a model of the toy world is to segment anything but toy scenes."""
    if training_run(model).get("train_data") == "toy":
        for file in files:
            if os.path.isfile(file) and not is_scene(file):
                source = model.checkpoint_file.get("checkpoint", "this model")
                raise ValueError(f"{source} was trained on the drawn scenes of the toy world and "
                                 f"means nothing on {file}; train on captioned photos, or name "
                                 "another model with --checkpoint")


# --------------------------------------------------------------------------------------------------
# Class embeddings, kept beside their checkpoint

def embed(model, classes):
    """Class embeddings (C, S, D) by `model.protocol`, kept in a file beside the model's checkpoint,
    whose name is made of all that they depend on. A model without checkpoint embeds anew."""
    templates = read_templates(model.protocol.templates)
    if not model.checkpoint_file:
        return model.embed_classes(classes, templates)
    common = {field.name for field in dataclasses.fields(Protocol)}
    own = {name: value for name, value in as_mapping(model.protocol).items() if name not in common}
    key = [EMBEDDINGS, model.checkpoint_file["checkpoint_sha256"], classes, templates, own,
           model.device.type]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(model.checkpoint_file["checkpoint"]).parent / "embeddings" / f"{name}.safetensors"
    with contextlib.suppress(OSError, safetensors.SafetensorError, KeyError):   # missing, or broken
        return safetensors.torch.load_file(path, str(model.device))["embeddings"]
    embeddings = model.embed_classes(classes, templates)
    with contextlib.suppress(OSError):              # a folder where nothing may be written
        path.parent.mkdir(exist_ok=True)
        remove_partial(path.parent)
        save_tensors(path, {"embeddings": embeddings})
    return embeddings
