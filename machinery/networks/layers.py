"""Layers: pixel statistics, transformer blocks with the parameter names of timm's vision
transformers, and BatchNorm over the global batch."""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from machinery.parallel import GlobalDropPath, sum_over_processes, world_size


class Normalise(nn.Module):
    """Pixels uint8 (..., 3, H, W) -> float32. mean, std: of the three colours, in 0..1."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pixels):
        return (pixels.float() / 255 - self.mean) / self.std


def mlp(width, hidden, output):
    return nn.Sequential(OrderedDict(fc1=nn.Linear(width, hidden), gelu=nn.GELU(),
                                     fc2=nn.Linear(hidden, output)))


class Attention(nn.Module):
    """Multi-head attention of tokens x (B, T, w) to a context (B, N, w), by default x itself."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"the width {width} must be a multiple of the {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, context=None, mask=None):
        """mask: (B, N) bool, which tokens of the context are seen; None = all."""
        context = x if context is None else context
        w = x.shape[-1]
        q = F.linear(x, self.qkv.weight[:w], self.qkv.bias[:w])
        k, v = F.linear(context, self.qkv.weight[w:], self.qkv.bias[w:]).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        mask = mask if mask is None else mask[:, None, None]                        # (B, 1, 1, N)
        seen = F.scaled_dot_product_attention(q, k, v, mask)            # (B, heads, T, w / heads)
        return self.proj(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A layer with a LayerNorm before each part. drop_path: probability of leaving a part out."""

    def __init__(self, width, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width, 4 * width, width)
        self.drop_path = GlobalDropPath(drop_path)

    def forward(self, x, mask=None):
        """x: (B, T, w). mask: see `Attention`."""
        x = x + self.drop_path(self.attn(self.norm1(x), mask=mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CrossBlock(nn.Module):
    """A layer whose tokens look at a context. No LayerNorm on what comes in, one at the end."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = mlp(width, 4 * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x, context):
        """x: (B, T, w). context: (B, N, w)."""
        x = x + self.attn(x, context)
        return self.norm2(x + self.mlp(self.norm1(x)))


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm of x (..., width) over all its other dimensions and all processes.

    In one process it is torch's `BatchNorm1d` of the flattened rows, and its buffers have the same
    names. Every process must hold as many rows. float32 inside, whatever the precision of x.
    """

    def forward(self, x, counts=True):
        """counts: whether x changes the running statistics, in training."""
        x = x.float()
        if not self.training:
            return super().forward(x.flatten(0, -2)).view_as(x)
        rows = x.flatten(0, -2)                                                     # (n, width)
        count = len(rows) * world_size()
        mean = sum_over_processes(rows.sum(dim=0)) / count                          # (width,)
        variance = sum_over_processes((rows - mean).square().sum(dim=0)) / count
        if counts:                                  # the running variance is the unbiased one
            unbiased = variance * count / max(1, count - 1)
            # A step that is not finite is skipped; it must not stay in the statistics, either
            good = mean.isfinite().all() & variance.isfinite().all()
            for kept, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                kept.copy_(torch.where(good, kept.lerp(new.detach(), self.momentum), kept))
            self.num_batches_tracked += 1
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
