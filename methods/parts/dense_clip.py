"""CLIP's image encoders with an embedding at every position, of any ViT or ConvNeXt of open_clip.

A CLIP is trained to embed whole images. Its last layers, applied to each position by itself, give
an embedding of every patch in the space of its text encoder, without any training
(docs/pixelclip.md, section 3).
"""
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from machinery.errors import quiet_hub
from machinery.networks.backbones import LARGEST, at_most
from machinery.networks.release import STORED
from machinery.settings import abbreviate
from machinery.tokenizer import CONTEXT_LENGTH, VOCABULARY
from model import patch_tokens

ARTEFACTS = 0.125                                   # standard deviation, in the toy's patch tokens
SIGMA = 5.0                                         # patches, of `neighbour_path`


# --------------------------------------------------------------------------------------------------
# Dense encoders: normalised images (B, 3, H, W), H and W multiples of `stride`, to (B, h, w, D),
# not normalised; last_block, "value" or "neighbours", is of a ViT only. `pooled` is CLIP's own
# embedding (B, D) of images of `image_size`. What each has: TRAINED, words in the names of the
# parameters that PixelCLIP trains; SHARPNESS, its factor on cosines; cells, the side of the grid in
# training.

def position_table(table, old, new):
    """A ViT's positions, resized bicubically; the class token's row stays as it is.

    table: (1 + H * W, width) for the grid old = (H, W). Returns (1 + h * w, width), new = (h, w).
    """
    grid = table[1:].T.unflatten(-1, old)[None]                             # (1, width, H, W)
    grid = F.interpolate(grid, new, mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid[0].flatten(1).T])


def value_path(block, x):
    """A transformer block without queries and keys: no position sees any other.

    block: of open_clip. x: (B, 1 + N, width), class token first. The residual is the *class token*
    at every position, not the position's own token. Returns (B, 1 + N, width).
    """
    width = x.shape[-1]
    value = F.linear(block.ln_1(x), block.attn.in_proj_weight[-width:],
                     block.attn.in_proj_bias[-width:])
    x = x[:, :1] + block.ls_1(block.attn.out_proj(value))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def neighbour_path(block, x, grid):
    """A transformer block in which a patch looks at those near it whose keys are like its own.

    Source: "Pay Attention to Your Neighbours" (NACLIP), WACV 2025. Attention is of keys with keys.
    exp(-d^2 / 2 SIGMA^2), d being the distance of two patches, is added to its logits, but not to
    those of the class token. No residual, no MLP. Arguments: of `value_path`; grid: (h, w), N =
    h * w. Returns (B, 1 + N, width).
    """
    width = x.shape[-1]
    both = F.linear(block.ln_1(x), block.attn.in_proj_weight[width:],
                    block.attn.in_proj_bias[width:])                        # (B, 1 + N, 2 * width)
    key, value = both.unflatten(-1, (2, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    places = torch.cartesian_prod(*(torch.arange(side, dtype=x.dtype, device=x.device)
                                    for side in grid))                      # (N, 2)
    offset = places[:, None] - places
    near = torch.exp(-(offset ** 2).sum(dim=-1) / (2 * SIGMA ** 2))         # (N, N)
    x = F.scaled_dot_product_attention(key, key, value, attn_mask=F.pad(near, (1, 0, 1, 0)))
    return block.ls_1(block.attn.out_proj(x.transpose(1, 2).flatten(2)))


class DenseViT(nn.Module):
    """visual: a ViT of open_clip. Its last block takes `value_path` or `neighbour_path`."""
    TRAINED = ("attn", "position")
    SHARPNESS = 100.0
    cells = 20

    def __init__(self, visual):
        super().__init__()
        self.visual = visual
        self.stride = visual.patch_size[0]
        self.image_size = visual.image_size

    def tokens(self, images):
        """What enters the last block: (B, 1 + N, width), class token first."""
        visual = self.visual
        patches = visual.conv1(images)                                      # (B, width, h, w)
        positions = position_table(visual.positional_embedding, visual.grid_size,
                                   patches.shape[-2:])                      # (1 + N, width)
        first = visual.class_embedding.expand(len(images), 1, -1)
        x = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)   # (B, 1 + N, width)
        x = visual.ln_pre(x + positions)
        for block in visual.transformer.resblocks[:-1]:
            x = block(x)
        return x

    def forward(self, images, last_block="value"):
        grid = [side // self.stride for side in images.shape[-2:]]
        block = self.visual.transformer.resblocks[-1]
        x = self.tokens(images)                                             # (B, 1 + N, width)
        x = value_path(block, x) if last_block == "value" else neighbour_path(block, x, grid)
        x = self.visual.ln_post(x[:, 1:]) @ self.visual.proj                # (B, N, D)
        return x.unflatten(1, grid)

    def pooled(self, images):
        return self.visual(images)


class DenseConvNeXt(nn.Module):
    """visual: a ConvNeXt of open_clip. Its last norm and projection are applied at every position;
    nothing is averaged. timm's stochastic depth is at work in training mode."""
    TRAINED = ("",)
    SHARPNESS = 1.0
    cells = 20

    def __init__(self, visual):
        super().__init__()
        self.visual = visual
        self.stride = visual.trunk.feature_info[-1]["reduction"]
        self.image_size = visual.image_size

    def forward(self, images, last_block=None):
        x = self.visual.trunk.forward_features(images)                      # (B, width, h, w)
        return self.visual.head(self.visual.trunk.head.norm(x).permute(0, 2, 3, 1))

    def pooled(self, images):
        return self.visual(images)


class DenseToy(nn.Module):
    """The toy world's: hand-made patch tokens with artefacts, then a residual block that begins as
    the identity.

    The artefacts are a fixed random vector at each position, 1.2 times as long as a token; they
    fade in the mean over a region. So this CLIP knows what a region shows and says it of single
    patches badly, as large CLIPs do beside DINO. trunk: ToyTrunk.
    """
    TRAINED = ("block.",)
    SHARPNESS = 100.0
    cells = 16
    image_size = (128, 128)

    def __init__(self, trunk):
        super().__init__()
        from open_clip.transformer import ResidualAttentionBlock
        self.trunk = trunk
        self.stride = trunk.patch_size[0]
        noise = torch.randn(1, trunk.num_features, self.cells, self.cells,
                            generator=torch.Generator().manual_seed(0))
        self.register_buffer("artefacts", ARTEFACTS * noise, persistent=False)      # (1, D, h, w)
        self.block = ResidualAttentionBlock(trunk.num_features, 4)
        for layer in (self.block.attn.out_proj, self.block.mlp.c_proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, images, last_block=None):
        _, patches, grid = patch_tokens(self.trunk, images)                 # (B, N, D)
        artefacts = F.interpolate(self.artefacts, grid, mode="nearest").flatten(2).mT
        return self.block(patches + artefacts).unflatten(1, grid)

    def pooled(self, images):
        return patch_tokens(self.trunk, images)[0][:, 0]


def dense_encoder(name, visual):
    """`DenseViT` or `DenseConvNeXt` of open_clip's image encoder. Raises ValueError."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
    from timm.models.convnext import ConvNeXt
    if isinstance(visual, VisionTransformer):
        is_plain = isinstance(visual.transformer.resblocks[-1], ResidualAttentionBlock)
        if is_plain and visual.attn_pool is None and visual.pool_type == "tok":
            return DenseViT(visual)
    elif isinstance(getattr(visual, "trunk", None), ConvNeXt):
        return DenseConvNeXt(visual)
    raise ValueError(f"{name} has no dense features here; expected a CLIP whose image encoder is a "
                     "ViT with a class token, or a ConvNeXt")


# --------------------------------------------------------------------------------------------------
# Where they come from

def create_clip(name, weights):
    """(dense image encoder, open_clip's text tower, {"mean", "std"} of pixels) of a CLIP.

    name: open_clip's. weights: its tag, which is downloaded once; a local file; "random"; or
    "imported", to be filled from a checkpoint. Raises ValueError, or FileNotFoundError for missing
    weights.
    """
    import open_clip                                # slow, and most of the project does not need it
    # Other names, such as hf-hub:..., would load files
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        raise ValueError(f"unknown CLIP {abbreviate(f'{name}/{weights}')}; expected MODEL/WEIGHTS "
                         "with a model of open_clip.list_models(), such as "
                         "ViT-B-16-quickgelu/openai; or a CLIP of the toy world, which this "
                         "trains: python train.py --recipe toy --lambda 0 "
                         "--class-embedding caption --output runs/toy-clip")
    text = config["text_cfg"]
    if (text.get("context_length"), text.get("vocab_size")) != (CONTEXT_LENGTH, VOCABULARY):
        raise ValueError(f"{name}: expected CLIP's own text tower, with {VOCABULARY:,} tokens and "
                         f"a context of {CONTEXT_LENGTH}")
    known = open_clip.get_pretrained_cfg(name, weights)
    is_file = Path(weights).is_file()
    if not (known or is_file or weights in STORED):
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise FileNotFoundError(f"{name} has no weights {weights!r}; expected {name}/WEIGHTS with "
                                f"{', '.join(tags)}, or a local file")
    path = download(name, weights, known) if known and not is_file else weights
    # Weights that OpenAI trained need its approximation of GELU, whatever the model's name says.
    activation = known.get("quick_gelu", config.get("quick_gelu", False))
    bound = nullcontext() if weights in STORED else at_most(*LARGEST)         # in the file
    with bound:
        clip = open_clip.CustomTextCLIP(config["embed_dim"], config["vision_cfg"], text, activation)
    encoder = dense_encoder(name, clip.visual)
    if weights not in STORED:
        try:
            open_clip.load_checkpoint(clip, path)
        except Exception as error:                  # whatever a file of another kind makes it raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} does not hold the weights of {name}: {reason}") from None
        if not all(p.isfinite().all() for p in clip.parameters()):
            raise ValueError(f"{path} holds weights that are not finite")
    statistics = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    return encoder, clip.text, {**statistics, **known}


def download(name, weights, known):
    """Path of open_clip's weights, downloaded unless they are there. Raises FileNotFoundError."""
    import open_clip
    try:
        with quiet_hub():
            return open_clip.download_pretrained(known)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"the weights {name}/{weights} could not be downloaded ({type(error).__name__}). "
            f"Connect to the network once, or name a local copy: --checkpoint clip:{name}/FILE, in "
            f"training --clip-model {name}/FILE") from None
