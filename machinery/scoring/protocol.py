"""Which model, and by which protocol: what segment.py and eval.py share at their start."""
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from argparse import SUPPRESS
from pathlib import Path

import safetensors
import torch

from machinery.contract import PRETRAINED, Method, Protocol
from machinery.files import remove_partial, save_tensors
from machinery.names import read_templates
from machinery.networks.backbones import warn_if_random
from machinery.networks.checkpoint import load_model, newest_model
from machinery.parallel import pick_device, rank
from machinery.settings import add_flags, add_set_flag, as_mapping, given
from machinery.tokenizer import tokenizer
from machinery.toy import is_scene

# Of segment.py, not of benchmarks: docs/benchmarks.md, "At test time", has what they give
PHOTO_PROTOCOL = {"blend": "triangle", "propagate": 0.9}
EMBEDDINGS = 2                                      # raise it when `embed_classes` changes values


def add_model_flags(parser, protocol=None):
    """Add the flags of a model and its `Protocol`. protocol: values that --help shows in place of
    its defaults, by name."""
    pretrained = "".join(f", or {name}, which needs no training here" for name in PRETRAINED)
    model = parser.add_argument_group("model").add_argument
    model("--checkpoint",
          help=f"model file or folder{pretrained} (default: the newest under runs/)")
    model("--backbone", help="timm name of the backbone in a published checkpoint, or open_clip's "
                             "of PixelCLIP's CLIP, if its tensors do not tell")
    model("--image-token", choices=["class", "mean"],
          help="what stands for the whole image in a published checkpoint of SimZSS (default: "
               "class; mean for a ViT-L)")
    model("--backbone-weights", help="local file with the backbone's weights, if not where "
                                     "training had it")
    model("--batch", type=positive, default=8, help="windows at a time (default: %(default)s)")
    model("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
          help="where to compute (default: %(default)s)")
    model("--precision", choices=["fp32", "tf32", "bf16"], default="fp32",
          help="of the networks' arithmetic: tf32 and bf16 are faster on a GPU, and change the "
               "scores a little (default: %(default)s)")
    own = f", but for {' and '.join(f'--{name}' for name in protocol)}" if protocol else ""
    heading = f"protocol (what the model was trained with replaces these defaults{own})"
    group = parser.add_argument_group(heading)
    add_flags(group, Protocol, "protocol", protocol)
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
    model = prepare_model(args.checkpoint, args.device, flags.get("protocol"),
                          args.backbone_weights, args.backbone, args.image_token)
    set_precision(model, args.precision)
    return model


def prepare_model(checkpoint=None, device="auto", protocol=None, backbone_weights=None,
                  backbone=None, image_token=None):
    """A model of `load_model` as segment.py and eval.py use it; it is named on stderr.

    checkpoint: None = the newest under runs/. device: as --device. Others: of `load_model`.
    """
    torch.manual_seed(0)                            # a method may draw random numbers
    device = pick_device(device)
    model = load_model(checkpoint or newest_model(), device, backbone_weights, backbone,
                       image_token, protocol=protocol)
    if rank() == 0:
        print(f"model: {model.checkpoint_file.get('checkpoint', checkpoint)}, "
              f"{describe_training(model)}", file=sys.stderr)
    warn_if_random(model.settings)
    if model.protocol.propagate and not has_unit_tokens(model):
        model.unit_tokens(None)                     # says so
    return model


def set_precision(model, precision):
    """Set the precision of the networks that see images: "fp32"; "tf32", in which a GPU reads only
    19 bits of each float32 factor, here in all products of the process; or "bf16", in which
    `best_synonym` stays in float32."""
    model.precision = precision
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if precision == "bf16":
        for name in ("patch_scores", "unit_tokens", "image_scores"):
            in_bf16 = torch.autocast(model.device.type, torch.bfloat16)(getattr(model, name))
            setattr(model, name, in_bf16)


def describe_training(model):
    """The method of a model, and on what and how far it was trained, in words."""
    words = [model.name]
    data = training_run(model).get("train_data")
    if data:
        words.append(f"trained on {data}")
    step, steps = (model.trained_with.get(name) for name in ("step", "steps"))
    if step != steps:
        words.append(f"UNFINISHED: step {step} of {steps}")
    return ", ".join(words)


def has_unit_tokens(model):
    """Whether its scores can be propagated."""
    return type(model).unit_tokens is not Method.unit_tokens


def use_for_photos(model, said):
    """Put PHOTO_PROTOCOL into the model's protocol, propagation only where the method can. said:
    the settings that the user gave, by name, which stay."""
    for name, value in PHOTO_PROTOCOL.items():
        if name not in said and (name != "propagate" or has_unit_tokens(model)):
            setattr(model.protocol, name, value)


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


def refuse_photo_model(model):
    """Raise ValueError if a model that was trained on photographs is to be scored on toy scenes."""
    data = training_run(model).get("train_data", "toy")
    backbone = getattr(model.settings, "backbone", None)
    if data != "toy" and getattr(backbone, "name", "toy") != "toy":
        raise ValueError(f"{model.checkpoint_file.get('checkpoint')} was trained on {data} and "
                         "means nothing on the drawn scenes of the toy world; name a model of "
                         "these with --checkpoint, such as runs/toy")


def unseen_words(model, classes):
    """Words of class names none of whose tokens was in training, as far as the model knows."""
    if model.seen_tokens is None:
        return []
    words = dict.fromkeys(word for names in classes for name in names for word in name.split())
    return [word for word in words if not model.seen_tokens[tokenizer().encode(word)].any()]


# --------------------------------------------------------------------------------------------------
# Class embeddings, kept beside their checkpoint

def embed(model, classes):
    """Class embeddings (C, S, D) by `model.protocol`, kept in a file beside the model's checkpoint,
    whose name is made of all that they depend on. A model without checkpoint embeds anew."""
    unseen = unseen_words(model, classes)
    if unseen and rank() == 0:
        more = f" and {len(unseen) - 12} more" if len(unseen) > 12 else ""
        print(f"warning: no caption of this model's training had the words {', '.join(unseen[:12])}"
              f"{more}; where the mask says so it means nothing", file=sys.stderr)
    templates = read_templates(model.protocol.templates)
    if not model.checkpoint_file:
        return model.embed_classes(classes, templates)
    common = {field.name for field in dataclasses.fields(Protocol)}
    own = {name: value for name, value in as_mapping(model.protocol).items() if name not in common}
    key = [EMBEDDINGS, model.checkpoint_file["checkpoint_sha256"], as_mapping(model.settings),
           classes, templates, own, model.device.type, model.precision]
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
