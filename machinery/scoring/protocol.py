"""Which model, and by which protocol: what segment.py and eval.py share at their start."""
import os

import torch

from machinery.networks.backbones import parse_options, warn_if_random
from machinery.networks.checkpoint import (embed_classes, file_sha256, load_model, model_file,
                                  newest_model)
from machinery.names import read_templates
from machinery.contract import PRETRAINED, find_method
from machinery.parallel import pick_device
from machinery.toy import is_scene

PROTOCOL = {"templates": "imagenet80", "short_side": 448, "window": 448, "stride": 224}
SLIDING = ("short_side", "window", "stride")        # what `segment_image` needs of a protocol ...
REFINING = ("scales", "refine_steps")               # ... and what it may get


def add_model_flags(parser):
    pretrained = "".join(f", or {name}, which needs no training here" for name in PRETRAINED)
    add = parser.add_argument_group("model and protocol").add_argument
    add("--checkpoint",
        help=f"model file or folder{pretrained} (default: the newest under runs/)")
    add("--templates", help="prompt templates: imagenet80, simple7, plain or a file (default: the "
                            "checkpoint's; imagenet80 unless trained on the toy world)")
    add("--short-side", type=int, help="pixels of the resized photo's short side (default: the "
                                       "checkpoint's, 448 for photos)")
    add("--window", type=int, help="pixels of the sliding window (default: likewise, 448)")
    add("--stride", type=int, help="pixels from one window to the next (default: likewise, 224)")
    add("--scales", type=float, nargs="+", metavar="S",
        help="average the scores over several sizes of the photo, such as 1 1.5 times the short "
             "side (default: 1)")
    add("--refine-steps", type=int, metavar="N",
        help="steps of pixel-adaptive refinement, which moves borders to those of the photo's "
             "colours; 10 is usual (default: 0)")
    add("--class-embedding", choices=["caption", "concept"],
        help="SimZSS: embed a class by its prompt's end token or by its name's tokens (default: "
             "the checkpoint's)")
    add("--protocol", action="append", default=[], metavar="KEY=VALUE",
        help="another setting of the method at test time (on its page in docs/); may be repeated")
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
    device = pick_device(args.device)
    name, _, which = str(args.checkpoint).partition(":")
    if name in PRETRAINED:
        model = find_method(PRETRAINED[name]).pretrained(which).to(device).eval()
        model.trained_with = getattr(model, "trained_with", {})
    else:
        path = model_file(args.checkpoint or newest_model())
        model = load_model(path, device, args.backbone_weights, args.backbone, args.image_token)
        model.checkpoint_file = {"checkpoint": str(path), "checkpoint_sha256": file_sha256(path)}
    warn_if_random(model.config())
    protocol = {**PROTOCOL, **model.PROTOCOL, **model.trained_with.get("protocol", {})}
    given = {key: getattr(args, key) for key in (*SLIDING, "templates", "class_embedding")
             if getattr(args, key) is not None}
    for key, value in {**given, **parse_options(args.protocol, "--protocol")}.items():
        if key not in protocol:
            raise ValueError(f"--{key.replace('_', '-')}: {model.name} has no such setting; it has "
                             f"{', '.join(protocol)}")
        protocol[key] = value
    protocol.update({key: getattr(args, key) for key in REFINING if getattr(args, key)})
    for key in SLIDING:
        if type(protocol[key]) is not int:
            raise ValueError(f"{key} is {protocol[key]!r}; expected a number of pixels")
    return model, protocol


def windows(protocol):
    """The settings of `segment_image` in a protocol."""
    return {key: protocol[key] for key in (*SLIDING, *REFINING) if key in protocol}


def embed(model, classes, protocol, background=None):
    """Class embeddings (C, S, D) by the protocol, which the model is prepared for.

    background: where to insert the all-zero row that stands for the background, if the protocol
    leaves that to the method ("own:T"). Raises ValueError for a method without such a rule.
    """
    own_rule = protocol.get("background", "").startswith("own:")
    if own_rule and not getattr(model, "HAS_BACKGROUND_RULE", False):
        raise ValueError(f"--background {protocol['background']}: {model.name} has no background "
                         "rule of its own; choose threshold:T or prompt:\"word, word\"")
    if hasattr(model, "prepare"):
        model.prepare(protocol)
    options = {key: protocol[key] for key in getattr(model, "PROTOCOL", {}) if key not in PROTOCOL}
    templates = read_templates(protocol["templates"])
    embeddings = embed_classes(model, classes, templates, options)
    if own_rule:
        row = torch.zeros_like(embeddings[:1])
        embeddings = torch.cat([embeddings[:background], row, embeddings[background:]])
    return embeddings


def refuse_toy_model(model, files):
    """Raise ValueError if a model of the toy world is to segment anything but toy scenes."""
    if getattr(model, "trained_with", {}).get("train_data") == "toy":
        there = [file for file in files if os.path.isfile(file)]
        photo = next((file for file in there if not is_scene(file)), None)
        if photo is not None:
            source = getattr(model, "checkpoint_file", {"checkpoint": "this model"})
            raise ValueError(f"{source['checkpoint']} was trained on the drawn scenes of the toy "
                             f"world and means nothing on {photo}; train on captioned photos, or "
                             "name another model with --checkpoint")
