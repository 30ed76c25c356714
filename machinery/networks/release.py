"""Published checkpoints of SimZSS (docs/method.md, section 11), OVSegmentor and PixelCLIP (their
pages) -> settings and tensors. What the authors call each tensor stands here, as data."""
import math
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# Weights of frozen networks that exist nowhere but in a checkpoint, so checkpoints store them.
STORED = ("random", "imported")


# --------------------------------------------------------------------------------------------------
# Names of tensors: beginning of ours -> of the authors'. The first that fits counts.

SIMZSS = {"backbone.trunk.": "visual.vit.model.", "backbone.denoiser.": "visual.",
          "text.tower.": "text."}

_CROSS = {"attn.out_proj.": "attn.proj.", "norm1.": "norm2.", "norm2.": "norm_post."}
_PROJECTOR = {"fc1.": "linear_hidden.0.", "norm.": "linear_hidden.1.", "fc2.": "linear_out."}
_BINDING = "img_encoder.layers.0.downsample."
_DECODER = "multimodal_groupingblock.blocks.0."
OVSEGMENTOR = {
    "image.patch_embed.": "img_encoder.patch_embed.proj.",
    "image.group_tokens": "img_encoder.layers.0.group_token",
    "image.binding.norm_tokens.": f"{_BINDING}norm_tokens.",
    "image.binding.norm_patches.": f"{_BINDING}norm_x.",
    "image.binding.mix.": f"{_BINDING}mlp_inter.",
    "image.binding.norm_groups.": f"{_BINDING}norm_post_tokens.",
    **{f"image.binding.cross.{ours}": f"{_BINDING}pre_assign_attn.{theirs}"
       for ours, theirs in _CROSS.items()},
    "image.binding.cross.": f"{_BINDING}pre_assign_attn.",
    "image.binding.query.": f"{_BINDING}assign.q_proj.",
    "image.binding.key.": f"{_BINDING}assign.k_proj.",
    "image.binding.value.": f"{_BINDING}assign.v_proj.",
    "image.binding.proj.": f"{_BINDING}assign.proj.",
    "image.binding.norm.": f"{_BINDING}norm_new_x.",
    "image.binding.mlp.": f"{_BINDING}mlp_channels.",
    "image.": "img_encoder.",
    **{f"project_{part}.{ours}": f"{their_part}_projector.{theirs}"
       for part, their_part in (("image", "img"), ("text", "text"), ("question", "bridge"))
       for ours, theirs in _PROJECTOR.items()},
    "text.bert.": "text_encoder.transformer.",
    "decoder.norm_text.": f"{_DECODER}norm_tokens.",
    "decoder.norm_groups.": f"{_DECODER}norm_x.",
    **{f"decoder.cross.{ours}": f"{_DECODER}pre_assign_attn.{theirs}"
       for ours, theirs in _CROSS.items()},
    "decoder.cross.": f"{_DECODER}pre_assign_attn.",
    "decoder.block.": f"{_DECODER}post_attn.",
    "decoder.norm.": f"{_DECODER}norm_new_x.",
    "decoder.narrow_image.": "multimodal_groupingblock.align_proj_img.",
    "decoder.narrow_text.": "multimodal_groupingblock.align_proj_text.",
    "theta": "logit_scale"}

_CLIP = "sem_seg_head.predictor.clip_model."
PIXELCLIP = {"backbone.visual.": f"{_CLIP}visual.", "text.tower.": _CLIP}


def their_name(name, names):
    """The authors' name of one of our tensors."""
    for ours, theirs in names.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


# Our tensors by the authors' names and in their shapes: views, so that filling these fills ours

def renamed(names, tensors):
    return {their_name(name, names): value for name, value in tensors.items()}


def ovsegmentor_tensors(tensors):
    """Theirs have queries, keys and values of the cross-attentions apart, the blocks in two halves,
    and convolutions of one step for the projectors' linear maps."""
    layers = len({name.split(".")[2] for name in tensors if name.startswith("image.blocks.")})
    cut = layers // 2
    blocks = {f"image.blocks.{i}.": f"img_encoder.layers.{i // cut}.blocks.{i % cut}."
              for i in range(2 * cut)}
    found = {}
    for name, value in tensors.items():
        theirs = their_name(name, {**blocks, **OVSEGMENTOR})
        start, joined, kind = theirs.partition("in_proj_")
        if joined:                                  # weight (3 w, w) or bias (3 w,)
            found |= {f"{start}{part}_proj.{kind}": third
                      for part, third in zip("qkv", value.chunk(3))}
        elif name == "image.pos_embed":             # (1, N, d)
            found[theirs] = value[0]
        elif theirs.endswith(("linear_hidden.0.weight", "linear_out.weight")):
            found[theirs] = value[..., None]
        else:
            found[theirs] = value
    return found


# --------------------------------------------------------------------------------------------------
# Files

class Skipped:
    """In place of the classes of another program, such as its settings: makes a plain dictionary.
    So nothing of that program runs."""

    def __new__(cls, *args):
        return OrderedDict()


def read_weights(path, flag):
    """Tensors by name of a PyTorch or safetensors file, without "state_dict", "model", "module.".

    No pickled object is made but tensors, plain containers and NumPy's scalars; see `Skipped`.
    flag: named in the error for a missing file.
    """
    from timm.models import load_state_dict
    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag}: no file {path}")
    scalar = np._core.multiarray.scalar
    dtypes = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    harmless = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]
    try:
        with torch.serialization.safe_globals(harmless):
            others = []
            if zipfile.is_zipfile(path):            # as PyTorch writes since 1.6
                others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            with torch.serialization.safe_globals([(Skipped, name) for name in others]):
                return load_state_dict(str(path), weights_only=True)
    except Exception as error:                      # whatever a broken file makes the readers raise
        reason = " ".join(str(error).split())
        if isinstance(error.__cause__ or error, pickle.UnpicklingError):
            reason = ("it holds Python objects; if you trust it, save its tensors alone: "
                      "torch.save(torch.load(old, weights_only=False)[NAME], new), NAME being "
                      "'state_dict' or 'model'")
        raise ValueError(f"{path} is no readable weights file (safetensors or PyTorch): "
                         f"{reason}") from None


def only_tensors(state, path, table="visual.pos_embed"):
    """A file's content, with the denoiser's position table, (37, 37, D) with or without a leading
    1, as (1, 1369, D). Raises ValueError for anything but tensors."""
    others = [key for key, value in state.items() if not torch.is_tensor(value)]
    if others:
        raise ValueError(f"{path}: expected tensors only, found {', '.join(map(str, others[:5]))}")
    if table in state and state[table].shape[:-1] in ((37, 37), (1, 37, 37)):
        state = {**state, table: state[table].reshape(1, 37 * 37, -1)}
    return state


def read_denoiser(path):
    """Tensors of a denoiser and the prefix of their names: "visual.", or none if the file holds
    {"denoiser": {"pos_embed": ..., "denoiser.*": ...}}, as the one that the authors name."""
    state = read_weights(path, "--denoiser")
    prefix = "visual."
    if isinstance(state.get("denoiser"), dict):
        state = state["denoiser"]
        prefix = ""
    return only_tensors(state, path, f"{prefix}pos_embed"), prefix


def read_checkpoint(path):
    """(name of the method, tensors by the authors' names) of a published checkpoint."""
    state = only_tensors(read_weights(path, "--checkpoint"), path)
    for name, release in RELEASES.items():
        if any(key.startswith(release.sign) for key in state):
            return name, state
    signs = ", ".join(f"{release.sign}* for {name}" for name, release in RELEASES.items())
    parts = Counter(key.partition(".")[0] for key in state).most_common(5)
    found = "".join(f", {count} of {part}" for part, count in parts)
    first = "; the first are " * bool(state) + ", ".join(list(state)[:3])
    raise ValueError(f"{path} is no published checkpoint that is known here: expected tensors "
                     f"{signs}; found {len(state)} tensors{found}{first}")


# --------------------------------------------------------------------------------------------------
# Settings, from the shapes of the tensors. backbone, image_token: of `load_model`

def simzss_settings(state, path, backbone, image_token):
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    name = backbone or backbone_name(state, path)
    if image_token is None:
        image_token = "class"
        if name.startswith("vit_large"):
            image_token = "mean"
            print(f"warning: {path} has a ViT-L; as in the authors' code the mean of its patch "
                  "tokens stands for the image, not the class token. --image-token says otherwise; "
                  "segmentation does not depend on it", file=sys.stderr)
    has_denoiser = any(key.startswith("visual.denoiser.") for key in state)
    options = {}
    shapes = shapes_of_vit(state)
    table = shapes.get("pos_embed", ())
    patch = shapes.get("patch_embed.proj.weight", ())
    if len(table) == 3 and len(patch) == 4:         # the table (1, N, D) tells the image size
        options["img_size"] = math.isqrt(table[1]) * patch[-1]
    positions = state.get("text.positional_embedding")                              # (77, width)
    width = positions.shape[-1] if positions is not None and positions.ndim else None
    layers = {key.split(".")[3] for key in state if key.startswith("text.transformer.resblocks.")}
    text = {"width": width, "layers": len(layers) or 1}
    vision = {"name": name, "weights": "imported", "options": options,
              "denoiser": "imported" if has_denoiser else None,
              "mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "image_token": image_token}
    return {"backbone": vision, "text": text, "local_target": "argmax"}


def shapes_of_vit(state):
    return {key.removeprefix("visual.vit.model."): value.shape for key, value in state.items()}


def backbone_name(state, path):
    """timm's name of the ViT in an authors' checkpoint: DINOv2, which has LayerScale, or DINO."""
    import timm
    vit = shapes_of_vit(state)
    patch = tuple(vit.get("patch_embed.proj.weight", ()))                           # (D, 3, ph, pw)
    size = None
    if len(patch) == 4:
        size = {384: "small", 768: "base", 1024: "large"}.get(patch[0])
    registers = f"reg{vit['reg_token'][1]}_" if len(vit.get("reg_token", ())) == 3 else ""
    kind = f"{registers}dinov2.lvd142m" if "blocks.0.ls1.gamma" in vit else "224.dino"
    name = f"vit_{size}_patch{patch[-1] if patch else None}_{kind}"
    if not timm.list_models(name, pretrained=True):
        raise ValueError(f"{path}: expected an authors' checkpoint with a DINO or DINOv2 backbone, "
                         "ViT-S, B or L, but visual.vit.model.patch_embed.proj.weight has shape "
                         f"{list(patch)}; name any other backbone as timm does, with --backbone or "
                         "load_model(path, backbone=NAME)")
    return name


def ovsegmentor_settings(state, path, backbone, image_token):
    if backbone or image_token:
        raise ValueError(f"{path} is OVSegmentor's own network; leave --backbone and --image-token "
                         "out")

    def size(name, axis):
        shape = state[name].shape if name in state else ()
        if len(shape) <= axis:
            raise ValueError(f"{path} is no checkpoint of OVSegmentor: {name} has shape "
                             f"{list(shape)}; expected {axis + 1} dimensions or more")
        return shape[axis]

    blocks = {tuple(key.split(".")[2:5:2]) for key in state
              if key.startswith("img_encoder.layers.") and ".blocks." in key}
    image = {"width": size("img_encoder.patch_embed.proj.weight", 0),               # (d, 3, p, p)
             "patch": size("img_encoder.patch_embed.proj.weight", 3), "layers": len(blocks),
             "grid": math.isqrt(size("img_encoder.pos_embed", 0)),                  # (N, d)
             "group_tokens": size("img_encoder.layers.0.group_token", 1),           # (1, K0, d)
             "groups": size(f"{_BINDING}mlp_inter.fc2.weight", 0)}                  # (K, d / 2)
    if image["width"] != 768:
        print(f"warning: {path} is not OVSegmentor's ViT-B; its number of attention heads cannot "
              "be seen, and 8 are taken", file=sys.stderr)
    stage_2 = any(key.startswith("img_encoder_momentum.") for key in state)
    return {"stage": 2 if stage_2 else 1, "init": "imported" if stage_2 else None, "image": image,
            "hidden": size("img_projector.linear_hidden.0.weight", 0),
            "embedding": size("img_projector.linear_out.weight", 0)}


def pixelclip_settings(state, path, backbone, image_token):
    if image_token:
        raise ValueError(f"{path} is PixelCLIP's; leave --image-token out")
    name = backbone or "convnext_base_w_320"
    patch = state.get(f"{_CLIP}visual.conv1.weight")                        # (width, 3, p, p)
    if not backbone and patch is not None and patch.ndim == 4:
        name = f"ViT-{'L' if len(patch) == 1024 else 'B'}-{patch.shape[-1]}-quickgelu"
    return {"clip_model": f"{name}/imported"}


class Release(NamedTuple):
    """Published checkpoints of a method."""
    sign: str                   # how the names of some of their tensors begin, and of no others'
    recipe: str                 # whose protocol they are used with
    settings: Callable          # (tensors, path, backbone, image_token) -> settings, a mapping
    tensors: Callable           # our tensors -> the same by the authors' names
    unused: tuple               # patterns of names that segmenting does not need


RELEASES = {
    "simzss": Release(
        "visual.vit.model.", "simzss", simzss_settings, partial(renamed, SIMZSS), (
            "classification_weights_ema", "beta_ema", "logit_scale_local",
            "visual.pos_embed")),                   # their module makes it without a denoiser, too
    "ovsegmentor": Release(
        "img_encoder.", "ovsegmentor-2", ovsegmentor_settings, ovsegmentor_tensors, (
            "img_encoder_momentum.*", "logit_scale_mask", f"{_DECODER}assign.*",
            "text_encoder.transformer.pooler.*",
            "text_encoder.transformer.embeddings.position_ids")),
    "pixelclip": Release(
        _CLIP, "pixelclip", pixelclip_settings, partial(renamed, PIXELCLIP), (
            "*logit_scale", "teacher_encoder.*", "*prompt_tokens", "*head.conv[012].*",
            "*head.up[12].*", "*head.proj.*")),
}


def needed(state, expected, release):
    """A file's tensors without those that segmenting does not need."""
    return {name: value for name, value in state.items() if name in expected
            or not any(fnmatchcase(name, pattern) for pattern in release.unused)}
