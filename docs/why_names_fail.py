"""The experiment of why-names-fail.md: regions are perfect, and still get the wrong names.

    python docs/why_names_fail.py                       # a minute and a half of one core

Regions are the true masks of toy scenes, each with the mean of its frozen patch tokens. All that
learns is a small head, a text encoder and, in most rows, one attention block between the regions.
The caption loss sees the mean of an image's regions only, as that of S-Seg and OVSegmentor does;
in the last two rows SimZSS's local loss matches words and regions one by one, too.

Letters: B images, R regions of an image at most, C classes, D width of the patch tokens.
"""
import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from eval import scores
from machinery.names import plural
from machinery.networks.layers import block
from machinery.tokenizer import tokenize
from machinery.toy import TOY_CLASSES, toy_scene
from methods.parts.maskformer import mlp
from model import TextEncoder, VisionBackbone, concept_loss, global_loss, similarity_pool

R = 6                                               # a toy scene has up to 2 grounds and 3 things
WIDTH = 64                                          # of head, attention block and text encoder
RATE = 1e-3                                         # peak learning rate
BATCH = 64
NEW = 200                                           # scenes whose regions are named at the end
ROWS = [                                            # title, mixing, whether one by one
    ("none", "none", False),
    ("one attention block", "random", False),
    ("the same, starts as the identity", "identity", False),
    ("the same, and learns at a tenth of the rate", "gentle", False),
    ("none; words also matched one by one", "none", True),
    ("one attention block; words also matched one by one", "random", True)]


# --------------------------------------------------------------------------------------------------
# Perfect regions

@dataclass
class Regions:
    """vectors: (S, R, D), of S scenes. sizes: (S, R), in patches. classes: (S, R) int64, -1 =
    there is none. tokens: (S, 77), of the captions. named: (S, C) bool, classes that they name."""
    vectors: torch.Tensor
    sizes: torch.Tensor
    classes: torch.Tensor
    tokens: torch.Tensor
    named: torch.Tensor

    def __getitem__(self, rows):
        return Regions(*(part[rows] for part in vars(self).values()))

    @property
    def there(self):
        return self.classes >= 0                                                    # (S, R)


@torch.no_grad()
def draw_regions(count, seed):
    """All classes that have a pixel in so many toy scenes, with the mean patch token under each."""
    backbone = VisionBackbone("toy")
    C = len(TOY_CLASSES)
    scenes = []
    for i in range(count):
        image, mask, caption = toy_scene(np.random.default_rng((seed, i)))
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        tokens = backbone(backbone.normalise(pixels))[1][0]                         # (N, D)
        shares = F.one_hot(torch.from_numpy(mask).long(), C).permute(2, 0, 1).float()
        shares = F.avg_pool2d(shares, backbone.patch_size).flatten(1)               # (C, N)
        sizes = shares.sum(dim=1)                                                   # (C,)
        classes = sizes.nonzero()[:, 0]
        vectors = shares[classes] @ tokens / sizes[classes, None]
        words = caption.replace(",", "").split()
        named = [name in words or plural(name) in words for [name] in TOY_CLASSES]
        empty = R - len(classes)
        scenes.append((F.pad(vectors, (0, 0, 0, empty)), F.pad(sizes[classes], (0, empty)),
                       F.pad(classes, (0, empty), value=-1), tokenize(caption),
                       torch.tensor(named)))
    return Regions(*map(torch.stack, zip(*scenes)))


# --------------------------------------------------------------------------------------------------
# What learns

class Namer(nn.Module):
    """Regions and texts -> a shared space. mixing: none, random, identity or gentle."""

    def __init__(self, mixing, width):
        super().__init__()
        self.enter = nn.Linear(width, WIDTH)
        self.mix = None
        if mixing != "none":
            self.mix = block(WIDTH, 4)              # attention between regions, then an MLP
        if mixing in ("identity", "gentle"):        # what it adds is zero at first
            for layer in (self.mix.attn.proj, self.mix.mlp.fc2):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.head = mlp(WIDTH, WIDTH, WIDTH)
        self.text = TextEncoder(None, width=WIDTH, heads=2, layers=1)
        self.text_head = mlp(WIDTH, WIDTH, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def describe(self, regions):
        """A vector of each region, (B, R, WIDTH), zero where there is none."""
        x = self.enter(regions.vectors)
        if self.mix:
            x = self.mix(x, attn_mask=regions.there[:, None, None])
        return x * regions.there[..., None]

    def embed_texts(self, tokens):
        states, end = self.text.states(tokens)
        return F.normalize(self.text_head(states[torch.arange(len(states)), end]), dim=-1)

    def caption_loss(self, regions):
        """The mean of an image's regions must find its caption: all that captions ask for."""
        mean = self.describe(regions).sum(dim=1) / regions.there.sum(dim=1, keepdim=True)
        image = F.normalize(self.head(mean), dim=-1)                                # (B, WIDTH)
        return global_loss(image, self.embed_texts(regions.tokens), self.logit_scale.exp())

    def embed_names(self):
        """(C, WIDTH), unit-norm."""
        return self.embed_texts(torch.stack([tokenize(name) for [name] in TOY_CLASSES]))

    def words(self, regions):
        """Regions in the shared space: (B, R, WIDTH), unit-norm, zero where there is none."""
        words = F.normalize(self.head(self.describe(regions)), dim=-1)
        return words * regions.there[..., None]

    def one_by_one_loss(self, regions):
        """SimZSS's local loss: each named class pools the regions that resemble it, and what was
        pooled must be classified as that class."""
        names = self.embed_names()
        pooled = similarity_pool(names.expand(len(regions.tokens), -1, -1), self.words(regions),
                                 0.1)                                       # (B, C, WIDTH)
        ids = torch.where(regions.named, torch.arange(len(names)), -1)      # (B, C)
        return concept_loss(pooled, ids, names, regions.named.sum(dim=0).float(), 0.07)

    @torch.no_grad()
    def name_regions(self, regions):
        """The class whose name fits each region best: (B, R)."""
        return (self.words(regions) @ self.embed_names().T).argmax(dim=-1)


def learn(regions, mixing, one_by_one, steps, seed):
    """Train a `Namer`. Returns it and its mean caption loss over the last tenth of the steps."""
    torch.manual_seed(seed)
    namer = Namer(mixing, regions.vectors.shape[-1])
    block_rate = 0.1 * RATE if mixing == "gentle" else RATE
    groups = [{"params": parameter, "lr": block_rate if name.startswith("mix.") else RATE}
              for name, parameter in namer.named_parameters()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        1, (step + 1) / (0.05 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2)
    losses = []
    for _ in range(steps):
        batch = regions[torch.randperm(len(regions.tokens))[:BATCH]]
        loss = caption_loss = namer.caption_loss(batch)
        if one_by_one:
            loss = loss + namer.one_by_one_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(caption_loss.item())
    return namer, float(np.mean(losses[-steps // 10:]))


def measure(namer, regions):
    """mIoU of the named regions; parts of the regions that have their own class, and the class of
    any region of their image."""
    named = namer.name_regions(regions)
    there = regions.there
    C = len(TOY_CLASSES)
    matrix = torch.zeros(C, C)                      # patches by true class and predicted class
    matrix.index_put_((regions.classes[there], named[there]), regions.sizes[there],
                      accumulate=True)
    own = (named == regions.classes)[there].float().mean().item()
    any_in_image = (named[..., None] == regions.classes[:, None]).any(dim=-1)       # (B, R)
    return scores(matrix)["mIoU"], own, any_in_image[there].float().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=2000, help="to learn from")
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    known = draw_regions(args.scenes, seed=0)
    new = draw_regions(NEW, seed=1)
    print("| mixing of regions | caption loss | mIoU | regions named by their own class | by any "
          "class of their image |\n|---|---|---|---|---|")
    for title, mixing, one_by_one in ROWS:
        namer, loss = learn(known, mixing, one_by_one, args.steps, args.seed)
        miou, own, any_in_image = measure(namer, new)
        print(f"| {title} | {loss:.2f} | {miou:.1%} | {own:.0%} | {any_in_image:.0%} |", flush=True)


if __name__ == "__main__":
    main()
