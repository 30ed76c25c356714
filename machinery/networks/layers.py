"""Layers that several networks share."""
from collections import OrderedDict

import torch
from torch import nn

from machinery.parallel import sum_over_processes, world_size

IMAGENET_MEAN = (0.485, 0.456, 0.406)               # of the three colours, in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)


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


def block(width, heads, drop_path=0.0):
    """A layer of timm's vision transformers, with torch's LayerNorm (eps 1e-5; timm's is 1e-6).

    drop_path: probability, in training, that a row leaves out the attention, or the MLP.
    """
    from timm.models.vision_transformer import Block        # slow to import
    return Block(width, heads, qkv_bias=True, drop_path=drop_path, norm_layer=nn.LayerNorm)


class CrossBlock(nn.Module):
    """A layer whose tokens look at a context. No LayerNorm on what comes in, one at the end."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = mlp(width, 4 * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x, context):
        """x: (B, T, w). context: (B, N, w). Returns (B, T, w)."""
        x = x + self.attn(x, context, context, need_weights=False)[0]
        return self.norm2(x + self.mlp(self.norm1(x)))


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm of x (..., width) over all its other dimensions and all processes.

    In one process it is torch's `BatchNorm1d`. (torch's SyncBatchNorm needs GPUs.) Every process
    must hold as many rows. float32 inside, whatever the precision of x.
    """

    def forward(self, x, update=True):
        """update: whether x changes the running statistics, in training."""
        x = x.float()
        if not self.training:
            return super().forward(x.flatten(0, -2)).view_as(x)
        rows = x.flatten(0, -2)                                                     # (n, width)
        count = len(rows) * world_size()
        mean = sum_over_processes(rows.sum(dim=0)) / count                          # (width,)
        variance = sum_over_processes((rows - mean).square().sum(dim=0)) / count
        if update:                                  # the running variance is the unbiased one
            unbiased = variance * count / max(1, count - 1)
            # A step that is not finite is skipped; it must not stay in the statistics, either
            good = mean.isfinite().all() & variance.isfinite().all()
            for kept, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                kept.copy_(torch.where(good, kept.lerp(new.detach(), self.momentum), kept))
            self.num_batches_tracked += 1
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
