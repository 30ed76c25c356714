"""The authors' checkpoints (method, section 11)."""
import pickle
from pathlib import Path

import torch


def _read_tensors(path, flag):
    """Tensors by name of a PyTorch or safetensors file, without "state_dict" around them and "module." before each."""
    from timm.models import load_state_dict
    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag}: no file {path}")
    try:
        return load_state_dict(str(path), weights_only=True)
    except Exception as error:                      # whatever a broken file makes the readers raise
        reason = " ".join(str(error).split())
        if isinstance(error.__cause__ or error, pickle.UnpicklingError):
            reason = ("if it holds Python objects, which could run anything when loaded, and you trust it, save its "
                      "tensors alone: torch.save(torch.load(old, weights_only=False)['state_dict'], new)")
        raise ValueError(f"{path} is no readable weights file (safetensors or PyTorch): {reason}") from None



RELEASE_NAMES = {"backbone.trunk.": "visual.vit.model.", "backbone.denoiser.": "visual.", "text.tower.": "text."}

RELEASE_BUFFERS = ("classification_weights_ema", "beta_ema", "logit_scale_local")       # carry no knowledge: not read



def _read_release(path, flag):
    """Tensors of a file in the authors' format; the denoiser's table, if (37, 37, D), becomes (1, 37 * 37, D)."""
    state = _read_tensors(path, flag)
    others = [key for key, value in state.items() if not torch.is_tensor(value)]
    if others:
        raise ValueError(f"{path}: expected tensors only, found {', '.join(others[:5])}")
    table = state.get("visual.pos_embed")
    if table is not None and table.shape[:-1] in ((37, 37), (1, 37, 37)):
        state["visual.pos_embed"] = table.reshape(1, 37 * 37, -1)
    return {key: value for key, value in state.items() if key not in RELEASE_BUFFERS}



def _backbone_name(state, path):
    """timm's name of the ViT in an authors' checkpoint: DINOv2, which has LayerScale and maybe registers, or DINO."""
    import timm
    vit = {key.removeprefix("visual.vit.model."): value.shape for key, value in state.items()}
    patch = tuple(vit.get("patch_embed.proj.weight", ()))                               # (D, 3, ph, pw)
    size = {384: "small", 768: "base", 1024: "large"}.get(patch[0]) if len(patch) == 4 else None
    registers = f"reg{vit['reg_token'][1]}_" if len(vit.get("reg_token", ())) == 3 else ""
    kind = f"{registers}dinov2.lvd142m" if "blocks.0.ls1.gamma" in vit else "224.dino"
    name = f"vit_{size}_patch{patch[-1] if patch else None}_{kind}"
    if not timm.list_models(name, pretrained=True):
        raise ValueError(f"{path}: expected an authors' checkpoint with a DINO or DINOv2 backbone, ViT-S, B or L, but "
                         f"visual.vit.model.patch_embed.proj.weight has shape {list(patch)}; name any other backbone "
                         "as timm does, with --backbone or load_model(path, backbone=NAME)")
    return name
