"""SimZSS's checkpoints by its authors -> settings and tensors (docs/method.md, section 11)."""
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import torch

# Backbone weights that exist nowhere but in a checkpoint, so checkpoints store them.
STORED = ("random", "imported")
# Prefixes of the names of tensors: ours -> the authors'.
NAMES = {"backbone.trunk.": "visual.vit.model.", "backbone.denoiser.": "visual.",
         "text.tower.": "text."}
# Buffers of their training program that a model does not need.
UNUSED = ("classification_weights_ema", "beta_ema", "logit_scale_local")


def read_weights(path, flag):
    """Tensors by name of a PyTorch or safetensors file, without "state_dict" and "module.".

    No pickled object is loaded but NumPy's scalars, which the authors' program leaves in its
    optimizer's state. flag: named in the error for a missing file.
    """
    from timm.models import load_state_dict
    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag}: no file {path}")
    scalar = np._core.multiarray.scalar
    dtypes = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    harmless = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]
    try:
        with torch.serialization.safe_globals(harmless):
            return load_state_dict(str(path), weights_only=True)
    except Exception as error:                      # whatever a broken file makes the readers raise
        reason = " ".join(str(error).split())
        if isinstance(error.__cause__ or error, pickle.UnpicklingError):
            reason = ("if it holds Python objects, and you trust it, save its tensors alone: "
                      "torch.save(torch.load(old, weights_only=False)['state_dict'], new)")
        raise ValueError(f"{path} is no readable weights file (safetensors or PyTorch): "
                         f"{reason}") from None


def only_tensors(state, path, table="visual.pos_embed"):
    """A file's content without the unused buffers, and with the denoiser's position table, (37, 37,
    D) with or without a leading 1, as (1, 1369, D). Raises ValueError for anything but tensors."""
    others = [key for key, value in state.items() if not torch.is_tensor(value)]
    if others:
        raise ValueError(f"{path}: expected tensors only, found {', '.join(map(str, others[:5]))}")
    state = {key: value for key, value in state.items() if key not in UNUSED}
    if table in state and state[table].shape[:-1] in ((37, 37), (1, 37, 37)):
        state[table] = state[table].reshape(1, 37 * 37, -1)
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


def read_checkpoint(path, backbone=None, image_token=None):
    """(settings of SimZSS as a mapping, tensors by the authors' names) of an authors' checkpoint.

    backbone: timm's name, if the tensors do not tell. image_token: see `BackboneSettings`.
    """
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    state = only_tensors(read_weights(path, "--checkpoint"), path)
    name = backbone or backbone_name(state, path)
    if image_token is None:
        image_token = "class"
        if name.startswith("vit_large"):
            image_token = "mean"
            print(f"warning: {path} has a ViT-L; as in the authors' code the mean of its patch "
                  "tokens stands for the image, not the class token. --image-token says otherwise; "
                  "segmentation does not depend on it", file=sys.stderr)

    has_denoiser = any(key.startswith("visual.denoiser.") for key in state)
    if not has_denoiser:                            # their module creates the table in any case
        state.pop("visual.pos_embed", None)

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
    return {"backbone": vision, "text": text, "local_target": "argmax"}, state


def their_name(name):
    """The authors' name of one of our tensors."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


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
