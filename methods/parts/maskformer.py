"""The parts of MaskFormer, a network that turns an image into masks.

Cheng, Schwing, Kirillov, "Per-Pixel Classification is Not All You Need for Semantic Segmentation",
2021. Letters: Q queries, each a mask; L layers; d width of both decoders; m cells of the coarsest
map.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from model import create_trunk

STRIDE = 32                                         # of the coarsest map


# --------------------------------------------------------------------------------------------------
# Backbone

class SwinMaps(nn.Module):
    """A Swin Transformer from random initial values: images -> maps at strides 4, 8, 16, 32.

    name: timm's. drop_path: the last block's rate of stochastic depth.
    """

    def __init__(self, name, drop_path):
        super().__init__()
        options = {"strict_img_size": False, "drop_path_rate": drop_path}
        self.trunk = create_trunk(name, "random", options, "--student")
        # Windows are shifted on maps of any size, as in MaskFormer's Swin; timm would lay them out
        # for one size of images.
        self.trunk.set_input_size(always_partition=True)
        self.trunk.norm = nn.Identity()             # for classification only
        self.channels = [info["num_chs"] for info in self.trunk.feature_info]
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)

    def forward(self, images):
        """(B, 3, H, W) -> four maps (B, c, H / s, W / s)."""
        maps = self.trunk.forward_intermediates(images, intermediates_only=True)
        return [norm(map_.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                for norm, map_ in zip(self.norms, maps)]


class ToyMaps(nn.Module):
    """Five convolutions of stride 2, for the toy world: maps at strides 4, 8, 16, 32."""
    channels = [64, 64, 64, 64]

    def __init__(self):
        super().__init__()
        widths = [3, 32, *self.channels]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False),
                          nn.GroupNorm(8, wide), nn.ReLU())
            for narrow, wide in zip(widths, widths[1:]))

    def forward(self, images):
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[2:]


# --------------------------------------------------------------------------------------------------
# Pixel decoder

def conv_norm(inside, outside, size):
    return nn.Sequential(nn.Conv2d(inside, outside, size, padding=size // 2, bias=False),
                         nn.GroupNorm(32, outside))


class PixelDecoder(nn.Module):
    """From coarse to fine: each map is added to what came from above it. channels: of the maps."""

    def __init__(self, channels, width):
        super().__init__()
        *fine, coarse = channels
        self.first = conv_norm(coarse, width, 3)
        self.lateral = nn.ModuleList(conv_norm(c, width, 1) for c in fine)
        self.smooth = nn.ModuleList(conv_norm(width, width, 3) for _ in fine)
        self.last = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, maps):
        """Four maps, fine to coarse -> an embedding of each cell (B, d, H / 4, W / 4)."""
        *fine, coarse = maps
        y = self.first(coarse).relu()                                       # (B, d, H/32, W/32)
        for map_, lateral, smooth in list(zip(fine, self.lateral, self.smooth))[::-1]:
            y = lateral(map_) + F.interpolate(y, map_.shape[-2:], mode="nearest")
            y = smooth(y).relu()
        return self.last(y)


# --------------------------------------------------------------------------------------------------
# Transformer decoder

def sine_code(height, width, channels):
    """Fixed code of each cell's place, (height * width, channels): rows in the first half of the
    channels, columns in the second."""
    half = channels // 2
    i = torch.arange(half)
    wavelength = 10000 ** (2 * (i // 2) / half)

    def code(length):
        t = 2 * math.pi * torch.arange(1, length + 1) / length
        angle = t[:, None] / wavelength                                             # (length, half)
        return torch.where(i % 2 == 0, angle.sin(), angle.cos())

    rows = code(height)[:, None].expand(-1, width, -1)
    columns = code(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, two linear layers; normalised after each (post-norm)."""

    def __init__(self, width, heads, ffn, dropout):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.ReLU(), nn.Dropout(dropout),
                                 nn.Linear(ffn, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, o, code, keys, memory):
        """o: (B, Q, d). code: (Q, d), of the queries. keys, memory: (B, m, d)."""
        attended, _ = self.self_attention(o + code, o + code, o, need_weights=False)
        o = self.norms[0](o + self.dropout(attended))
        attended, _ = self.cross_attention(o + code, keys, memory, need_weights=False)
        o = self.norms[1](o + self.dropout(attended))
        return self.norms[2](o + self.dropout(self.ffn(o)))


class TransformerDecoder(nn.Module):
    """Q learned queries look at the coarsest map. Returns what each layer makes of them."""

    def __init__(self, channels, queries, width, layers, heads, ffn, dropout):
        super().__init__()
        self.memory = nn.Conv2d(channels, width, 1)
        self.code = nn.Parameter(torch.randn(queries, width))
        self.layers = nn.ModuleList(DecoderLayer(width, heads, ffn, dropout)
                                    for _ in range(layers))
        self.norm = nn.LayerNorm(width)             # one for all layers
        for p in self.layers.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, coarse):
        """(B, c, H / 32, W / 32) -> (L, B, Q, d)."""
        memory = self.memory(coarse)                                        # (B, d, H/32, W/32)
        place = sine_code(*memory.shape[-2:], memory.shape[1]).to(memory)           # (m, d)
        memory = memory.flatten(2).mT                                               # (B, m, d)
        o = memory.new_zeros(len(memory), *self.code.shape)                         # (B, Q, d)
        outputs = []
        for layer in self.layers:
            o = layer(o, self.code, memory + place, memory)
            outputs.append(self.norm(o))
        return torch.stack(outputs)


def mlp(*widths):
    """Linear layers with ReLU between them."""
    layers = []
    for inside, outside in zip(widths, widths[1:]):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
