"""Where vision backbones and their weights come from: timm, local files, the toy world."""
import hashlib
import json
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from machinery.networks.checkpoint import fill
from machinery.errors import check_positive, quiet_hub
from machinery.networks.release import STORED, read_denoiser, read_tensors
from machinery.toy import ToyTrunk

# Options of timm that shape a network. Others could name files, or addresses, to load.
SHAPE_OPTIONS = {
    "img_size", "patch_size", "embed_dim", "depth", "depths", "dims", "num_heads", "mlp_ratio",
    "init_values", "reg_tokens", "class_token", "pos_embed", "no_embed_class", "global_pool",
    "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "window_size", "pad_type",
    "output_stride", "layers", "channels", "base_width", "stem_width", "depth_token_only",
    "drop_path_rate", "qkv_bias", "num_prefix_tokens"}


# --------------------------------------------------------------------------------------------------
# Flags

def add_flags(parser, default):
    """The flags of a vision backbone. default: its timm name."""
    add = parser.add_argument_group("vision backbone").add_argument
    add("--backbone", default=default,
        help="timm name of a ViT or CNN, or toy (default: %(default)s)")
    add("--backbone-weights",
        help="local weights file, loaded strictly, or 'random' (default: timm's download)")
    add("--backbone-option", action="append", default=[], metavar="KEY=VALUE",
        help="an option of timm that shapes the network; may be repeated")
    add("--image-token", choices=["class", "mean"], default="class",
        help="what stands for the whole image: the class token, or the mean of the patch tokens "
             "as in the release's ViT-L (default: %(default)s)")
    add("--denoiser", metavar="FILE",
        help="denoising block for the patch tokens, keys as in the authors' checkpoints")
    add("--pixel-mean", type=float, nargs=3,
        help="pixel statistics in 0..1 (default: the backbone's own)")
    add("--pixel-std", type=float, nargs=3, help="see --pixel-mean")


def add_text_flags(parser, layers=12):
    """The flags of a text tower."""
    add = parser.add_argument_group("text encoder").add_argument
    add("--text-width", type=int, help="its width (default: CLIP's for the backbone)")
    add("--text-heads", type=int,
        help="its attention heads (default: CLIP's for the backbone, or width / 64)")
    add("--text-layers", type=int, default=layers, help="its layers (default: %(default)s)")


def check_flags(args, image_token=True):
    """Raise ValueError for settings of a backbone or text tower that cannot be. image_token:
    whether the method has a token of the whole image."""
    if args.image_token != "class" and not image_token:
        raise ValueError(f"--image-token: {args.method} uses the backbone's patch tokens only")
    check_positive(args, "text_width", "text_heads", "text_layers")
    if args.pixel_std and not all(0 < value < math.inf for value in args.pixel_std):
        raise ValueError(f"--pixel-std {args.pixel_std}: expected positive numbers")


def from_flags(args):
    """Keyword arguments of `VisionBackbone` from train.py's flags."""
    random = args.backbone_weights == "random"
    if random and args.backbone == "toy":
        raise ValueError("the toy backbone is hand-made and takes no --backbone-weights")
    return {"name": args.backbone, "pretrained": not random,
            "weights": None if random else args.backbone_weights, "mean": args.pixel_mean,
            "std": args.pixel_std, "denoiser": args.denoiser, "image_token": args.image_token,
            **parse_options(args.backbone_option, "--backbone-option", SHAPE_OPTIONS)}


def parse_options(options, flag, known=None):
    """["key=value", ...] -> dict; values are JSON, or plain words.

    flag: named in errors. known: the keys that there are. Raises ValueError.
    """
    parsed = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or known and key not in known:
            keys = f", the key one without a flag here: {', '.join(sorted(known))}" if known else ""
            raise ValueError(f"{flag} {option}: expected key=value{keys}")
        try:
            parsed[key] = json.loads(value)         # numbers, true, false ...
        except json.JSONDecodeError:
            parsed[key] = value                     # ... and plain words
    return parsed


def from_config(config):
    """Keyword arguments of `VisionBackbone` from a checkpoint. Weights that the checkpoint itself
    holds are left random."""
    source = config["weights"]
    is_file = source not in ("pretrained", *STORED)
    return {"name": config["name"], "pretrained": source == "pretrained",
            "weights": source if is_file else None, "mean": config["mean"], "std": config["std"],
            "denoiser": bool(config.get("denoiser")),
            "image_token": config.get("image_token", "class"), **config["options"]}


# --------------------------------------------------------------------------------------------------
# timm models

def source(name, pretrained, weights):
    """Where weights come from: "pretrained", "random" or the path of a local file.

    name: the toy backbone is ready as it is.
    """
    if weights:
        return str(Path(weights).resolve())         # found again from any folder
    return "pretrained" if pretrained or name == "toy" else "random"


def create_trunk(name, source, options, flag="--backbone-weights"):
    """A timm model without its head that takes images of any size where it can.

    source: of `source`. Opens nothing else: name and options may come from a checkpoint. flag: its
    name in errors. Raises ValueError, FileNotFoundError.
    """
    if name == "toy":
        if source != "pretrained" or options:
            raise ValueError("the toy backbone is hand-made; it takes no weights "
                             f"({source}) and no options {options}")
        return ToyTrunk()
    if not set(options) <= SHAPE_OPTIONS:
        raise ValueError(f"backbone option {min(set(options) - SHAPE_OPTIONS)!r}: expected one "
                         "that shapes the network and has no flag of its own: "
                         f"{', '.join(sorted(SHAPE_OPTIONS))}")
    import timm                                     # slow, and the toy world does not need it
    if not timm.is_model(name):
        raise ValueError(f"unknown backbone {name!r}; expected 'toy' or a name from "
                         "timm.list_models()")
    options = {"num_classes": 0, "pretrained": source == "pretrained", **options}
    try:
        with quiet_hub():
            try:                                    # transformers: position table for any grid ...
                trunk = timm.create_model(name, **{"dynamic_img_size": True, **options})
            except TypeError:                       # ... CNNs do not know the argument
                trunk = timm.create_model(name, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"the pretrained weights of {name} could not be downloaded ({type(error).__name__}). "
            f"Connect to the network once, or pass {flag} FILE with a local copy (or {flag} "
            "random for a trial that cannot give useful masks).") from None
    except (RuntimeError, TypeError, AssertionError, ArithmeticError) as error:
        raise ValueError(f"unknown backbone {name!r} with options {options}: {error}") from None
    if source not in ("pretrained", "random"):
        load_trunk(trunk, source, flag)
    return trunk


def load_trunk(trunk, path, flag):
    """Load a local weights file strictly; only the classifier, which is not used, may be left."""
    state = read_tensors(path, flag)
    # timm's own function that reads the key names of the original releases
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(state, trunk) if convert else state
    except Exception as error:                      # whatever another kind of file makes it raise
        raise ValueError(f"{path} is no readable weights file of the backbone: {error}") from None
    heads = trunk.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    prefixes = tuple(f"{head}." for head in heads)
    state = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    counters = {key: value for key, value in trunk.state_dict().items()
                if key.endswith("num_batches_tracked")}             # which older files lack
    fill(trunk.state_dict(), {**counters, **state}, f"{path} does not fit the backbone")


def patch_size(trunk):
    """(height, width) in pixels of a transformer's patches, or of the cells of a CNN's map."""
    if hasattr(trunk, "num_prefix_tokens"):
        size = getattr(trunk, "patch_size", None) or trunk.patch_embed.patch_size
    else:
        size = trunk.feature_info[-1]["reduction"]
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def prefix_tokens(trunk):
    """Number of tokens before the patches, class token and registers; 0 for a CNN."""
    return getattr(trunk, "num_prefix_tokens", 0)


def tokens(trunk, images, name):
    """Tokens of a `create_trunk` for images (B, 3, H, W), zero-padded right and bottom to patches.

    name: the trunk's, for errors. Returns prefix tokens, class token and registers (B, prefix, D),
    none of a CNN; patch tokens (B, N, D); the grid (h, w) of the patches. Raises ValueError for
    images of a size that the trunk does not take, and patches that lie on no regular grid.
    """
    ph, pw = patch_size(trunk)
    H, W = images.shape[-2:]
    images = F.pad(images, (0, -W % pw, 0, -H % ph))
    grid = (images.shape[-2] // ph, images.shape[-1] // pw)
    try:
        features = trunk.forward_features(images)
    except AssertionError as error:                 # a transformer with a fixed position table
        raise ValueError(f"the backbone {name} takes no images of {H} x {W}: {error}") from None
    if features.ndim == 4:                                                  # CNN: (B, D, h, w) ...
        if features.shape[1] != trunk.num_features:                         # ... or (B, h, w, D)
            features = features.permute(0, 3, 1, 2)
        features = features.flatten(2).transpose(1, 2)                              # (B, N, D)
    first = prefix_tokens(trunk)
    patches = features[:, first:]
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"the backbone {name} gives {patches.shape[1]} patches for {H} x {W} "
                         f"pixels, expected {grid[0]} x {grid[1]}; its patches do not lie on a "
                         "regular grid")
    return features[:, :first], patches, grid


def sha256(tensors):
    """One hash of names and values, to recognise a backbone."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.removeprefix("trunk.").encode())
        values = tensors[key].cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(values.numpy())
    return digest.hexdigest()


def check(backbone, saved, path):
    """Raise ValueError if a `VisionBackbone` is not the one of a checkpoint. saved: its config."""
    found = sha256(backbone.state_dict())
    # Only an authors' checkpoint knows no hash
    expected = saved.get("sha256", found if saved["weights"] == "imported" else None)
    if found != expected:
        raise ValueError(f"the backbone's weights ({saved['weights']}) are not those that {path} "
                         "was trained with; pass --backbone-weights FILE with the right ones")
    backbone.config["sha256"] = found
    if saved["weights"] in STORED:
        backbone.config["weights"] = saved["weights"]


def warn_if_random(config):
    """Print one line if the backbone of a method's config has random weights."""
    if (config.get("backbone") or {}).get("weights") == "random":
        print("warning: the backbone has random weights; its masks mean nothing",
              file=sys.stderr)


def stored_tensors(backbone):
    """Tensors of a `VisionBackbone`, or None, that a checkpoint has to hold, by their names there.

    A random or imported backbone cannot be downloaded again, and no denoiser can.
    """
    if backbone is None:
        return {}
    whole = backbone.config["weights"] in STORED
    return {f"backbone.{name}": value for name, value in backbone.state_dict().items()
            if whole or name.startswith("denoiser.")}


# --------------------------------------------------------------------------------------------------
# The denoiser

class Denoiser(nn.Module):
    """Frozen block of "Denoising Vision Transformers", which the release puts on patch tokens.

    It removes what depends on a patch's position only (docs/method.md, section 3): one transformer
    block over patch tokens + a table of 37 x 37 positions. Names are those of the authors'
    checkpoints. width: D.
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
