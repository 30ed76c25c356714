"""OVSegmentor's networks: an image encoder that groups patches, projectors, the entity decoder.

"Section n" is a section of docs/ovsegmentor.md. Letters: those of methods/ovsegmentor.py. The
blocks are timm's, so that DINO's weights fit.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from machinery.networks.layers import CrossBlock, GlobalBatchNorm, block, mlp
from machinery.parallel import global_mean, global_rows
from machinery.settings import setting

MIXING = ("blocks.", "binding.cross.")              # of an `ImageEncoder`: where vectors are mixed


# --------------------------------------------------------------------------------------------------
# Patches to groups (section 3)

def patch_logits(queries, keys):
    """L: how well each group fits each patch. (B, K, d), (B, N, d) -> (B, K, N), float32."""
    with torch.autocast(queries.device.type, enabled=False):
        return queries.float() @ keys.float().transpose(1, 2) / math.sqrt(queries.shape[-1])


def assign_patches(logits, noise=0.0):
    """A: each patch to one group, one-hot over K, with the gradient of the softmax.

    logits, noise: (B, K, N); in training the noise is Gumbel's. Returns (B, K, N).
    """
    soft = (logits + noise).softmax(dim=1)                                          # (B, K, N)
    hard = F.one_hot(soft.argmax(dim=1), soft.shape[1]).transpose(1, 2)
    return hard - soft.detach() + soft


def group_sums(member, values):
    """Sum of each group's patches / (their number + 1), not / their number.

    member: (B, K, N), one-hot over K. values: (B, N, d). Returns (B, K, d).
    """
    weights = member / (1 + member.sum(dim=-1, keepdim=True))
    return weights.to(values.dtype) @ values


def enlarge(logits, grid, size):
    """Maps (B, K, N) of a grid (h, w), bilinearly to size x size pixels: (B, K, P)."""
    maps = F.interpolate(logits.unflatten(-1, grid), (size, size), mode="bilinear",
                         align_corners=True)
    return maps.flatten(2)


@torch.no_grad()
def groups_in_use(queries, keys):
    """How many groups of an image own a patch, on average; to be logged."""
    owner = patch_logits(queries, keys).argmax(dim=1)                               # (B, N)
    owns = F.one_hot(owner, queries.shape[1]).any(dim=1)                            # (B, K)
    return global_mean(owns.sum(dim=1).float())


# --------------------------------------------------------------------------------------------------
# Image encoder (section 3)

class Binding(nn.Module):
    """K0 group tokens become K groups, each patch belongs to one of them."""

    def __init__(self, width, heads, group_tokens, groups):
        super().__init__()
        self.norm_tokens = nn.LayerNorm(width)
        self.norm_patches = nn.LayerNorm(width)
        self.mix = mlp(group_tokens, width // 2, groups)                # along the token axis
        self.norm_groups = nn.LayerNorm(width)
        self.cross = CrossBlock(width, heads)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = mlp(width, 4 * width, width)

    def forward(self, tokens, patches):
        """tokens: (B, K0, d). patches: (B, N, d). Returns groups Z and queries (B, K, d), keys
        (B, N, d)."""
        patches = self.norm_patches(patches)
        groups = self.mix(self.norm_tokens(tokens).transpose(1, 2)).transpose(1, 2)
        groups = self.cross(self.norm_groups(groups), patches)                      # P, (B, K, d)
        queries = self.query(groups)
        keys = self.key(patches)
        logits = patch_logits(queries, keys)                                        # (B, K, N)
        noise = 0.0
        if self.training:
            drawn = global_rows(lambda rows: logits.new_empty(rows, *logits.shape[1:])
                                .exponential_(), len(logits))
            noise = -drawn.log()                                                    # Gumbel
        member = assign_patches(logits, noise)                                      # A, (B, K, N)
        groups = groups + self.proj(group_sums(member, self.value(patches)))
        return groups + self.mlp(self.norm(groups)), queries, keys


@dataclass
class ImageSettings:
    """An image encoder; see `ImageEncoder`."""
    width: int = setting(768, "d, of the image encoder", least=1)
    heads: int = setting(
        8, "attention heads of image encoder and entity decoder; DINO was trained with 12", least=1)
    layers: int = setting(12, "layers of the image encoder, both halves", least=2)
    patch: int = setting(16, "pixels a side of a patch of the convolution", least=1, flag=False)
    grid: int = setting(
        14, "patches a side of the position table: of an image of --image-size", least=1,
        flag=False)
    group_tokens: int = setting(64, "K0, group tokens that go in", least=1)
    groups: int = setting(8, "K, groups that come out", least=1)
    drop_path: float = setting(
        0.1, "stochastic depth: probability of the last block; it grows linearly from 0 in the "
        "first", least=0, most=0.9)
    init_std: float = setting(
        0.02, "standard deviation of new weights; small widths need more, such as width ** -0.5",
        above=0, flag=False)

    def check(self):
        if self.width % self.heads:
            raise ValueError(f"the width {self.width} is no multiple of the {self.heads} heads")


class ImageEncoder(nn.Module):
    """A vision transformer cut in two: its lower half sees patches and group tokens, its upper half
    the groups only.

    settings: `ImageSettings`. channels: of the maps that come in, 3 for pixels. patch: kernel and
    stride of the patch convolution, in cells of the maps.
    """

    def __init__(self, settings, channels=3, patch=16):
        super().__init__()
        width = settings.width
        layers = settings.layers
        self.grid = settings.grid
        self.patch_embed = nn.Conv2d(channels, width, patch, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid ** 2, width))
        self.group_tokens = nn.Parameter(torch.zeros(1, settings.group_tokens, width))
        rates = [settings.drop_path * i / (layers - 1) for i in range(layers)]
        self.blocks = nn.ModuleList(block(width, settings.heads, rate) for rate in rates)
        self.binding = Binding(width, settings.heads, settings.group_tokens, settings.groups)
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=settings.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def start_as_identity(self):
        """Let what mixes patches and groups pass them on as they are, until training changes it."""
        for name, parameter in self.named_parameters():
            if name.startswith(MIXING) and name.endswith(("proj.weight", "fc2.weight")):
                nn.init.zeros_(parameter)           # the last map of an attention or MLP

    def positions(self, h, w):
        """The position table (1, N, d) for a grid of h x w patches, resized bicubically."""
        if (h, w) == (self.grid, self.grid):
            return self.pos_embed
        table = self.pos_embed.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        return F.interpolate(table, (h, w), mode="bicubic").flatten(2).transpose(1, 2)

    def forward(self, maps):
        """maps: (B, channels, H, W). Returns groups F and queries (B, K, d), keys (B, N, d) and the
        grid (h, w)."""
        x = self.patch_embed(maps)                                                  # (B, d, h, w)
        h, w = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2) + self.positions(h, w)                     # (B, N, d)
        x = torch.cat([x, self.group_tokens.expand(len(x), -1, -1)], dim=1)         # (B, N + K0, d)
        cut = len(self.blocks) // 2
        for layer in self.blocks[:cut]:
            x = layer(x)
        groups, queries, keys = self.binding(x[:, h * w:], x[:, :h * w])
        for layer in self.blocks[cut:]:
            groups = layer(groups)
        return self.norm(groups), queries, keys, (h, w)

    @torch.no_grad()
    def fill(self, trunk):
        """Take the initial values of a vision transformer of timm, without its class token."""
        try:
            self.patch_embed.load_state_dict(trunk.patch_embed.proj.state_dict())
            self.pos_embed.copy_(trunk.pos_embed[:, -trunk.patch_embed.num_patches:])
            self.blocks.load_state_dict(trunk.blocks.state_dict())
            self.norm.load_state_dict(trunk.norm.state_dict())
        except (AttributeError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{type(trunk).__name__} does not fit width, layers, patch and grid of the image "
                f"encoder ({reason}); with patches = \"frozen\" any backbone does") from None


# --------------------------------------------------------------------------------------------------
# Projectors and entity decoder (sections 4 and 5)

class Projector(nn.Module):
    """To the joint space: two linear maps with BatchNorm and ReLU between them."""

    def __init__(self, width, hidden, output):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.norm = GlobalBatchNorm(hidden)
        self.fc2 = nn.Linear(hidden, output)

    def forward(self, x, update=True):
        """x: (..., width) -> (..., output). update: see `GlobalBatchNorm`."""
        return self.fc2(F.relu(self.norm(self.fc1(x), update)))

    @torch.no_grad()
    def update_statistics(self, x):
        """Let x change the running statistics of BatchNorm, and nothing else."""
        self.norm(self.fc1(x))


class EntityDecoder(nn.Module):
    """The question looks at the groups; one layer (section 5)."""

    def __init__(self, image_width, text_width, heads):
        super().__init__()
        width = min(image_width, text_width)
        if width % heads:
            raise ValueError(f"the entity decoder is as wide as the narrower of image encoder and "
                             f"text encoder, {width}, which is no multiple of the {heads} heads")
        self.narrow_image = nn.Linear(image_width, width) if image_width > width else nn.Identity()
        self.narrow_text = nn.Linear(text_width, width) if text_width > width else nn.Identity()
        self.norm_groups = nn.LayerNorm(width)
        self.norm_text = nn.LayerNorm(width)
        self.cross = CrossBlock(width, heads)
        self.block = block(width, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, groups, question, mask=None):
        """groups: (B, K, d). question: its hidden states (B, T, d_t). mask: (B, T) bool, its tokens
        without padding; None = padding takes part. Returns (B, T, min(d, d_t))."""
        groups = self.norm_groups(self.narrow_image(groups))
        u = self.cross(self.norm_text(self.narrow_text(question)), groups)
        mask = mask if mask is None else mask[:, None, None]                        # (B, 1, 1, T)
        return self.norm(self.block(u, mask) + u)
