"""Which vision backbones are taken, which files are opened, and what is refused in one line.

model.py makes the networks (`create_trunk`) and reads their tokens (`patch_tokens`).
"""
import contextlib
import copy
import sys
from functools import partial

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from machinery.errors import quiet_hub
from machinery.files import fill
from machinery.networks.release import STORED, read_denoiser, read_weights
from machinery.settings import abbreviate
from machinery.toy import ToyTrunk

# Options of timm that shape a network. Others could name files, or addresses, to load.
SHAPE_OPTIONS = {
    "img_size", "patch_size", "embed_dim", "depth", "depths", "dims", "num_heads", "mlp_ratio",
    "init_values", "reg_tokens", "class_token", "pos_embed", "no_embed_class", "global_pool",
    "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "window_size", "pad_type",
    "output_stride", "layers", "channels", "base_width", "stem_width", "depth_token_only",
    "drop_path_rate", "qkv_bias", "num_prefix_tokens"}
LARGEST_OPTION = 2 ** 14                            # number among these
# What the largest network of timm or open_clip stays below: parameters, tensors of them.
LARGEST = (5 * 10 ** 9, 10_000)


# --------------------------------------------------------------------------------------------------
# Sizes

bounds = []                                         # those of `at_most` at work, innermost last


@contextlib.contextmanager
def at_most(parameters, tensors, what="it has"):
    """Raise ValueError as soon as networks that are made inside have more parameters, or more
    tensors of them: a file's header may ask for any size. Networks with a bound of their own inside
    do not count. what: names it in the error."""
    left = [parameters, tensors]

    def count(module, name, parameter):
        if bounds[-1] is left:
            left[0] -= parameter.numel()
            left[1] -= 1
            if min(left) < 0:
                raise ValueError(f"{what} more than {parameters:,} parameters in {tensors:,} "
                                 "tensors")

    bounds.append(left)
    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
        bounds.pop()


# --------------------------------------------------------------------------------------------------
# Names, options, files

def arguments(settings, training):
    """Keyword arguments of `model.VisionBackbone` from `model.BackboneSettings`. Without training a
    denoiser comes out of a checkpoint, and its file is not opened."""
    if training and settings.weights == "imported":
        raise ValueError("backbone weights 'imported' are those of an authors' checkpoint, and "
                         "cannot be trained on; expected pretrained, random or a file")
    denoiser = settings.denoiser if training else bool(settings.denoiser)
    return {**vars(settings), "denoiser": denoiser}


def refuse_unknown(name, options):
    """Raise ValueError for names and options, perhaps of a stranger's checkpoint, that could make
    timm load other files."""
    unknown = sorted(set(options) - SHAPE_OPTIONS)
    if unknown:
        raise ValueError(f"backbone option {abbreviate(unknown[0])}: expected one that shapes the "
                         f"network and has no flag of its own: {', '.join(sorted(SHAPE_OPTIONS))}")
    for option, value in options.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and abs(number) > LARGEST_OPTION:
                raise ValueError(f"backbone option {option} is {number}; expected at most "
                                 f"{LARGEST_OPTION}")
    import timm                                     # slow, and the toy world does not need it
    if not timm.is_model(name):
        raise ValueError(f"unknown backbone {abbreviate(name)}; expected 'toy' or a name from "
                         "timm.list_models()")


def any_size(name):
    """Options of timm that make a network take images of any size, where it has one."""
    import timm
    entry = timm.model_entrypoint(name)
    transformers = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva")
    takes = entry.__module__.rpartition(".")[2] in transformers
    return {"dynamic_img_size": True} if takes else {}


@contextlib.contextmanager
def one_line_refusals(name, flag, downloads=True):
    """What goes wrong while timm makes a network, as FileNotFoundError or ValueError. downloads:
    whether it may download weights."""
    try:
        with quiet_hub(downloads):
            yield
    except OSError as error:
        raise FileNotFoundError(
            f"the pretrained weights of {name} could not be downloaded ({type(error).__name__}); "
            f"connect to the network, or pass {flag} FILE with a local copy (or {flag} random, "
            "which gives no useful masks)") from None
    except Exception as error:                      # whatever odd options make timm raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"backbone {name!r} cannot be made so: {reason}") from None


def load_trunk(trunk, path, flag):
    """Load a local weights file strictly; only the classifier, which is not used, may be left."""
    state = read_weights(path, flag)
    # timm's own function that reads the key names of the original releases
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(state, trunk) if convert else state
    except Exception as error:                      # whatever another kind of file makes it raise
        raise ValueError(f"{path} is no readable weights file of the backbone: {error}") from None
    heads = trunk.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    unused = tuple(f"{head}." for head in heads)
    expected = trunk.state_dict()
    counters = {key: value for key, value in expected.items()
                if key.endswith("num_batches_tracked")}             # which older files lack
    found = {key: value for key, value in state.items() if not key.startswith(unused)}
    fill(expected, {**counters, **found}, f"{path} does not fit the backbone")


def patch_size(trunk):
    """(height, width) in pixels of a transformer's patches, or of the cells of a CNN's map."""
    if hasattr(trunk, "num_prefix_tokens"):
        size = getattr(trunk, "patch_size", None) or trunk.patch_embed.patch_size
    else:
        size = trunk.feature_info[-1]["reduction"]
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def cast_once(trunk, copies, device_type):
    """A frozen network or, under autocast, its copy whose weights of matrix products are in
    autocast's type. Autocast itself would cast them in each pass, a third of all kernels of a ViT;
    the output is the same, bit for bit. copies: a dict that keeps the copy."""
    if not torch.is_autocast_enabled(device_type):
        return trunk
    dtype = torch.get_autocast_dtype(device_type)
    place = dtype, next(trunk.parameters(), torch.empty(0)).device
    if place not in copies:
        copies[place] = copy.deepcopy(trunk)
        for module in copies[place].modules():
            if type(module) in (nn.Linear, nn.Conv2d):      # others may compute with their weights
                module.to(dtype)
    return copies[place]


def flat_map(trunk, features):
    """timm's features as tokens (B, P + N, D): those of a transformer as they are, the map of a
    CNN, (B, D, h, w) or (B, h, w, D), cell by cell."""
    if features.ndim == 3:
        return features
    if features.shape[1] != trunk.num_features:
        features = features.permute(0, 3, 1, 2)
    return features.flatten(2).transpose(1, 2)


def warn_if_random(settings):
    """Print one line if the backbone of a method's settings has random weights."""
    backbone = getattr(settings, "backbone", None)
    if backbone and backbone.weights == "random":
        print("warning: the backbone has random weights; its masks mean nothing",
              file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# The denoiser

class Denoiser(nn.Module):
    """Frozen block of "Denoising Vision Transformers", which the release puts on patch tokens.

    It removes what depends on a patch's position only (docs/method.md, section 3): one transformer
    block over patch tokens + a table of 37 x 37 positions. Its names are the authors'. width: D.
    """

    def __init__(self, width):
        super().__init__()
        from timm.models.vision_transformer import Block
        self.pos_embed = nn.Parameter(torch.zeros(1, 37 * 37, width))
        self.denoiser = Block(width, max(1, width // 64), qkv_bias=True,
                              norm_layer=partial(nn.LayerNorm, eps=1e-6))

    def forward(self, patches, grid):
        """patches: (B, N, D), not normalised, N = h * w. Returns (B, N, D)."""
        from timm.layers import resample_abs_pos_embed
        table = resample_abs_pos_embed(self.pos_embed, list(grid), num_prefix_tokens=0)  # bicubic
        return self.denoiser(patches + table)


def create_denoiser(width, source):
    """A denoiser from a file in the authors' format; True = one that is still to be filled."""
    denoiser = Denoiser(width)
    if source is not True:
        state, prefix = read_denoiser(source)
        expected = {prefix + key: value for key, value in denoiser.state_dict().items()}
        fill(expected, state, f"{source} is no denoiser for this backbone")
    return denoiser
