"""Where backbones come from."""
import logging
import sys
from functools import partial

import torch
from torch import nn

from machinery.checkpoint import _fill
from machinery.release import _read_release, _read_tensors
from machinery.toy import ToyTrunk


def _create_trunk(name, weights, options):
    """A timm model without head that takes any image size, with weights "pretrained", "random" or of a local file."""
    if name == "toy":
        if weights != "pretrained" or options:
            raise ValueError(f"the toy backbone is made by hand; it takes no weights ({weights}) and no options {options}")
        return ToyTrunk()
    import timm                                     # slow to import, and not needed for the toy world
    options = {"num_classes": 0, "pretrained": weights == "pretrained", **options}
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    try:
        hub_log.setLevel(logging.ERROR)             # our one line says it, not a dozen retries
        try:                                        # transformers resample their position table to any grid ...
            trunk = timm.create_model(name, dynamic_img_size=True, **options)
        except TypeError:                           # ... CNNs do not know the argument
            trunk = timm.create_model(name, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"the pretrained weights of {name} could not be downloaded ({type(error).__name__}). Connect to the network "
            "once, or pass --backbone-weights FILE with a local copy (or --backbone-weights random for a trial that "
            "cannot give useful masks).") from None
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown backbone {name!r} with options {options}: {error} Expected 'toy' or a name from "
                         "timm.list_models().") from None
    finally:
        hub_log.setLevel(level)
    if weights not in ("pretrained", "random"):
        _load_trunk(trunk, weights)
    return trunk



def _load_trunk(trunk, path):
    """Load a local weights file strictly; only a classifier that we do not use may be left over."""
    state = _read_tensors(path, "--backbone-weights")
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(state, trunk) if convert else state     # timm's own reading of the original releases' keys
    except Exception as error:                      # whatever a file of something else makes it raise
        raise ValueError(f"{path} is no readable weights file of the backbone: {error}") from None
    heads = trunk.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    state = {key: value for key, value in state.items() if not any(key.startswith(f"{head}.") for head in heads)}
    counters = {key: value for key, value in trunk.state_dict().items() if key.endswith("num_batches_tracked")}
    _fill(trunk.state_dict(), {**counters, **state}, f"{path} does not fit the backbone")   # which may lack counters



class Denoiser(nn.Module):
    """The frozen block of "Denoising Vision Transformers" that rids patch tokens of what depends on their place only
    (method, section 3): one transformer block over patch tokens + a table of 37 x 37 positions.

    Named as in the authors' checkpoint. width: D.
    """

    def __init__(self, width):
        super().__init__()
        from timm.models.vision_transformer import Block
        self.pos_embed = nn.Parameter(torch.zeros(1, 37 * 37, width))
        self.denoiser = Block(width, max(1, width // 64), qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))

    def forward(self, patches, grid):
        """patches: (B, N, D), N = h * w, not normalised. Returns (B, N, D). The table is resampled bicubically."""
        from timm.layers import resample_abs_pos_embed
        return self.denoiser(patches + resample_abs_pos_embed(self.pos_embed, list(grid), num_prefix_tokens=0))



def _create_denoiser(width, source):
    """A denoiser from a file of `visual.pos_embed` and `visual.denoiser.*`, nothing else; True = yet to be filled."""
    denoiser = Denoiser(width)
    if source is not True:
        expected = {f"visual.{key}": value for key, value in denoiser.state_dict().items()}
        _fill(expected, _read_release(source, "--denoiser"), f"{source} is no denoiser for this backbone")
    return denoiser
