"""Which model, and by which protocol: what segment.py and eval.py share at their start."""
import os
import sys

import torch

from machinery.checkpoint import (embed_classes, file_sha256, load_model, model_file,
                                  newest_model)
from machinery.classes import read_templates
from machinery.parallel import pick_device
from machinery.toy import is_scene

PROTOCOL = {"templates": "imagenet80", "short_side": 448, "window": 448, "stride": 224}
SLIDING = ("short_side", "window", "stride")        # what `segment_image` needs of a protocol


def add_model_flags(parser):
    add = parser.add_argument_group("model and protocol").add_argument
    add("--checkpoint", help="model file or folder (default: the newest under runs/)")
    add("--templates", help="prompt templates: imagenet80, simple7, plain or a file (default: the "
                            "checkpoint's; imagenet80 unless trained on the toy world)")
    add("--short-side", type=int, help="pixels of the resized photo's short side (default: the "
                                       "checkpoint's, 448 for photos)")
    add("--window", type=int, help="pixels of the sliding window (default: likewise, 448)")
    add("--stride", type=int, help="pixels from one window to the next (default: likewise, 224)")
    add("--class-embedding", choices=["caption", "concept"],
        help="SimZSS: embed a class by its prompt's end token or by its name's tokens (default: "
             "the checkpoint's)")
    add("--backbone", help="timm name of the backbone in an authors' checkpoint, if its tensors "
                           "do not tell")
    add("--image-token", choices=["class", "mean"],
        help="of an authors' checkpoint: what stands for the whole image (default: class; mean "
             "for a ViT-L)")
    add("--backbone-weights", help="local file with the backbone's weights, if not where training "
                                   "had it")
    add("--batch", type=int, default=8, help="windows at a time (default: %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")


def open_model(args):
    """(model, protocol) of the command line. The protocol: the defaults, replaced by what the
    method, the checkpoint and the flags say, in this order."""
    torch.manual_seed(args.seed)
    path = model_file(args.checkpoint or newest_model())
    model = load_model(path, pick_device(args.device), args.backbone_weights, args.backbone,
                       args.image_token)
    model.checkpoint_file = {"checkpoint": str(path), "checkpoint_sha256": file_sha256(path)}
    if model.config().get("backbone", {}).get("weights") == "random":
        print("warning: this model's backbone has random weights; its masks mean nothing",
              file=sys.stderr)
    protocol = {**PROTOCOL, **model.PROTOCOL, **model.trained_with.get("protocol", {})}
    for key in (*SLIDING, "templates", "class_embedding"):
        given = getattr(args, key)
        if given is not None and key not in protocol:
            raise ValueError(f"--{key.replace('_', '-')}: {model.name} has no such setting")
        if given is not None:
            protocol[key] = given
    return model, protocol


def embed(model, classes, protocol):
    """Class embeddings (C, S, D) by the protocol."""
    options = {key: protocol[key] for key in getattr(model, "PROTOCOL", {}) if key not in PROTOCOL}
    return embed_classes(model, classes, read_templates(protocol["templates"]), options)


def refuse_toy_model(model, files):
    """Raise ValueError if a model of the toy world is to segment anything but toy scenes."""
    if getattr(model, "trained_with", {}).get("train_data") == "toy":
        there = [file for file in files if os.path.isfile(file)]
        photo = next((file for file in there if not is_scene(file)), None)
        if photo is not None:
            raise ValueError(f"{model.checkpoint_file['checkpoint']} was trained on the drawn "
                             f"scenes of the toy world and means nothing on {photo}; train on "
                             "captioned photos, or name another model with --checkpoint")
