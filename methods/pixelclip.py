"""PixelCLIP: CLIP's image encoder learns to segment from photos alone, without words or labels.

Paper: "Towards Open-Vocabulary Semantic Segmentation Without Semantic Labels", NeurIPS 2024,
arXiv 2409.19846. "section n" below is a section of docs/pixelclip.md.

    python segment.py photo.jpg --classes "cat, sofa" --checkpoint clip     # before any training
    python train.py --method pixelclip --train-data FOLDER                  # of photos, no captions

The letters are those of model.py, C being pseudo-classes in training, M masks of an image; and

    R   masks of the global batch that are kept         K   clusters of the mask generator
    J   free tokens of a prompt                         G   side of the grid of masks
"""
import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from concepts import tokenize
from machinery.networks import backbones
from machinery.networks.checkpoint import load_model, model_file, read_checkpoint
from methods.parts.dense_clip import DenseToy, create_clip
from methods.parts.clustering import kmeans
from machinery.errors import check_bounds, check_positive
from machinery.images import to_pixels
from machinery.networks.layers import Normalise
from machinery.contract import Method, best_synonym, moving_average, prompt_ensemble
from machinery.parallel import gather_rows, global_rows, sum_over_processes
from methods.parts.views import (masks_at, random_rectangle, random_square, strong_colours,
                             weak_colours)
from model import TextEncoder

DEFAULT_CLIP = "ViT-B-16-quickgelu/openai"
TEST_CELLS = 64                                     # a side, of the enlarged features at test time
LEAST_CELLS = 2                                     # of a mask that is kept
SINKHORN_ROUNDS = 3
KMEANS_STEPS = 100
KMEANS_TOLERANCE = 1e-4                             # squared shift of an image's centres, summed


# --------------------------------------------------------------------------------------------------
# The formulas

def pooling_weights(masks, h, w):
    """Weights that pool h x w cells as if these were enlarged to the masks' grid (section 5).

    masks: (B, M, G, G) bool. Enlarging bilinearly and averaging over a mask are both linear, so
    that a mask's mean is a weighted sum of the cells. Returns (B, M, h, w); each mask's weights sum
    to 1, those of an empty mask to 0.
    """
    G = masks.shape[-1]
    rows, columns = (F.interpolate(torch.eye(n, device=masks.device)[None], G, mode="linear")[0]
                     for n in (h, w))                                       # (h, G), (w, G)
    count = masks.sum(dim=(-2, -1))[..., None, None]                        # (B, M, 1, 1)
    return rows @ masks.float() @ columns.T / count.clamp(min=1)            # (B, M, h, w)


@torch.no_grad()
def sinkhorn(scores, rounds=SINKHORN_ROUNDS):
    """Share masks out to pseudo-classes so that all classes get about equally many (section 6).

    scores: (R, C), of this process's masks; R may be 0. In each round the shares of a class are
    divided by their sum over the masks of all processes, then those of a mask by their sum over
    classes. In logarithms nothing underflows. Returns (R, C), rows sum to 1.
    """
    log_share = scores.log_softmax(dim=1)
    for _ in range(rounds):
        own = log_share.logsumexp(dim=0, keepdim=True)                              # (1, C)
        log_share = log_share - gather_rows(own).logsumexp(dim=0)
        log_share = log_share.log_softmax(dim=1)
    return log_share.exp()


def union_of_masks(masks, ids, classes):
    """Y: where an image shows each pseudo-class, the union of that class's masks (section 7).

    masks: (B, M, G, G) bool. ids: (B, M), the masks' pseudo-classes, -1 = none. classes: C. Returns
    (B, C, G, G) bool; a pixel may belong to several.
    """
    member = F.one_hot(ids + 1, classes + 1)[..., 1:].float()                       # (B, M, C)
    covered = member.transpose(1, 2) @ masks.flatten(2).float()                     # (B, C, G * G)
    return (covered > 0).unflatten(-1, masks.shape[-2:])


def pixel_loss(logits, targets):
    """Binary cross-entropy of all pseudo-classes at all pixels that a mask covers (section 7).

    logits: (B, C, G, G). targets: Y. Returns the sum, to be divided by the number of these pixels
    and by C.
    """
    covered = targets.any(dim=1, keepdim=True)                                      # (B, 1, G, G)
    loss = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
    return (loss * covered).sum()


def prompt_tokens(prompt, count):
    """Tokens (77,) of a prompt with count placeholders for its {}, and their positions (count,)."""
    placeholder = tokenize("{}")[1]                 # one token of its own
    tokens = tokenize(prompt.replace("{}", " ".join(["{}"] * count)))
    return tokens, (tokens == placeholder).nonzero()[:, 0]


# --------------------------------------------------------------------------------------------------
# The parts

class ClipText(TextEncoder):
    """CLIP's own text tower, of open_clip, read as ours is."""

    def __init__(self, tower):
        nn.Module.__init__(self)
        self.tower = tower


class Decoder(nn.Sequential):
    """Refines the similarities of one pseudo-class: (n, 1, h, w) -> (n, 1, 4 h, 4 w) (section 4).

    first, second: channels after the first and the second doubling.
    """

    def __init__(self, first, second):
        def refine(channels, groups):
            return [nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                    nn.GroupNorm(groups, channels), nn.ReLU()]

        super().__init__(
            nn.Conv2d(1, first, 3, padding=1), nn.ConvTranspose2d(first, first, 2, 2),
            *refine(first, 4), *refine(first, 4), nn.ConvTranspose2d(first, second, 2, 2),
            *refine(second, 2), *refine(second, 2), nn.Conv2d(second, 1, 3, padding=1))


class MaskGenerator(nn.Module):
    """K-means over the patch tokens of a frozen backbone, image by image (section 2).

    name: timm's. weights: local file, "random", or None for timm's download. clusters: K. grid: G.
    """

    def __init__(self, name, weights, clusters, grid):
        super().__init__()
        self.trunk = backbones.create_trunk(name, weights or "pretrained", {},
                                            "--mask-weights")
        self.name = name
        self.patch_size = backbones.patch_size(self.trunk)
        self.normalise = Normalise(self.trunk.pretrained_cfg["mean"],
                                   self.trunk.pretrained_cfg["std"])
        self.clusters = clusters
        self.grid = grid
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)                 # no batch statistics

    @torch.no_grad()
    def forward(self, pixels, seeds):
        """pixels: uint8 (B, 3, H, W), whole patches. seeds: (B,) int64, of the first centres.
        Returns (B, K, G, G) bool; an image's masks cover it without overlap."""
        images = self.normalise(pixels)
        _, tokens, (h, w) = backbones.tokens(self.trunk, images, self.name)         # (B, N, D)
        first = [torch.randperm(h * w, generator=torch.Generator().manual_seed(int(seed)))
                 for seed in seeds]
        first = torch.stack(first)[:, :self.clusters].to(tokens.device)             # (B, K)
        labels = kmeans(tokens, self.clusters, KMEANS_STEPS, first, KMEANS_TOLERANCE)
        cells = torch.arange(self.grid, device=labels.device)
        labels = labels.unflatten(1, (h, w))[:, cells * h // self.grid]
        labels = labels[..., cells * w // self.grid]                                # (B, G, G)
        return labels[:, None] == torch.arange(self.clusters, device=labels.device).view(-1, 1, 1)


# --------------------------------------------------------------------------------------------------
# Which CLIP

def split_name(which):
    """"MODEL/WEIGHTS", or a checkpoint of SimZSS on the toy world -> (name, weights)."""
    path = model_file(which)
    if path.suffix == ".safetensors" and path.is_file():
        return "toy", str(path.resolve())
    name, _, weights = which.partition("/")
    return name, str(Path(weights).resolve()) if Path(weights).is_file() else weights


def load_clip(name, weights):
    """(dense image encoder, text encoder) of a CLIP, frozen but for what the method trains.

    name, weights: of `create_clip`; or "toy" and a checkpoint of SimZSS on the toy world.
    """
    if name == "toy":
        model = load_model(weights)
        if model.name != "simzss" or model.backbone.config["name"] != "toy":
            raise ValueError(f"{weights} is no SimZSS of the toy world; expected that, or a CLIP "
                             f"of open_clip as MODEL/WEIGHTS, such as {DEFAULT_CLIP}")
        encoder = DenseToy(model.backbone.trunk)
        text = model.text
        statistics = model.backbone.config
    else:
        encoder, tower, statistics = create_clip(name, weights)
        text = ClipText(tower)
    text.requires_grad_(False)
    for parameter_name, parameter in encoder.named_parameters():
        parameter.requires_grad_(any(word in parameter_name for word in encoder.TRAINED))
    encoder.normalise = Normalise(statistics["mean"], statistics["std"])
    tensors = {**encoder.state_dict(), **text.state_dict(prefix="text.")}
    # The toy's block begins anew each time, so it is not what a checkpoint's CLIP is known by.
    tensors = {key: value for key, value in tensors.items() if not key.startswith("block.")}
    encoder.config = {"name": name, "weights": weights, "sha256": backbones.sha256(tensors)}
    return encoder, text


# --------------------------------------------------------------------------------------------------
# The whole

class PixelCLIP(Method):
    """A dense CLIP; `begin_training` adds teacher, decoder, prompts and mask generator.

    encoder, text: of `load_clip`. size: pixels a side of the network's input; None = as published.
    """

    name = "pixelclip"
    RECIPE = {"image_size": 640, "batch": 48, "steps": 10_000, "base_rate": 2e-4 * 256 / 48,
              "warmup": 0.0, "final_rate": 0.5, "weight_decay": 1e-4, "beta2": 0.999, "eps": 1e-8,
              "clip": 0.01, "precision": "fp32"}
    TOY = {"clip_model": "runs/toy-clip", "mask_backbone": "toy", "clusters": 8, "mask_grid": 32,
           "resize": 128, "colours": 0.2, "pseudo_classes": 16, "free_tokens": 2, "prompt": "a {}",
           "decoder_channels": [8, 4], "ema": 0.99, "batch": 8, "steps": 200,
           "base_rate": 2e-3 * 256 / 8, "visual_rate": 0.05, "prompt_rate": 1.0,
           "templates": "plain", "output": "runs/toy-pixelclip"}
    PROTOCOL = {"templates": "pixelclip", "short_side": 640, "window": 2048, "stride": 2048,
                "input": "squash"}
    NEEDS_CAPTIONS = False
    NEEDS_CONCEPTS = False
    HAS_CHUNKS = True
    CONFIG = ("backbone", "size")
    TRAINING_ONLY = ("teacher.", "decoder.", "prompts")

    def __init__(self, encoder, text, size=None):
        super().__init__()
        self.backbone = encoder                     # the student
        self.text = text
        self.size = size or encoder.cells * encoder.stride
        if self.size % encoder.stride:
            raise ValueError(f"--network-size is {size}; expected a multiple of this CLIP's "
                             f"{encoder.stride} pixels a cell")
        self.input = self.PROTOCOL["input"]

    def begin_training(self, args):
        """Add what only training needs. args: the flags below. Returns self."""
        self.settings = args
        self.teacher = copy.deepcopy(self.backbone).requires_grad_(False)
        self.decoder = Decoder(*args.decoder_channels)
        tokens, free = prompt_tokens(args.prompt, args.free_tokens)
        if len(free) < args.free_tokens or tokens[-1] != 0:
            raise ValueError(f"--prompt with --free-tokens {args.free_tokens} is longer than the "
                             f"context of {len(tokens)} tokens")
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("free", free, persistent=False)
        table = self.text.tower.token_embedding.weight                      # (vocabulary, width)
        words = torch.randint(len(table) - 10, (args.pseudo_classes, args.free_tokens))
        self.prompts = nn.Parameter(table[words].clone())                   # (C, J, width)
        if args.masks == "kmeans":
            self.mask_generator = MaskGenerator(args.mask_backbone, args.mask_weights,
                                                args.clusters, args.mask_grid)
            patch = max(self.mask_generator.patch_size)
            if args.image_size % patch:
                raise ValueError(f"--image-size is {args.image_size}; expected a multiple of the "
                                 f"mask backbone's patches of {patch} pixels")
            if args.clusters > (args.image_size // patch) ** 2:
                raise ValueError(f"--clusters is {args.clusters}; there are only "
                                 f"{(args.image_size // patch) ** 2} patches in a square")
        return self

    # Data

    @classmethod
    def sampler(cls, args):
        grid = args.mask_grid if args.masks == "files" else None
        return partial(cls.sample, size=args.image_size, short_side=args.resize,
                       colours=args.colours, grid=grid)

    @staticmethod
    def sample(pair, size, rng, short_side=1024, colours=1.0, grid=None):
        """Two views of the same square, uint8 (3, size, size): weak, and strong, which has a black
        rectangle. And grid is None: a seed for `MaskGenerator`; else masks (M, grid, grid) int8 of
        the image's file, without that rectangle."""
        image = pair.image()
        left, top, side = random_square(*image.size, size, short_side, rng)
        box = (left, top, min(left + side, image.width), min(top + side, image.height))
        flip = rng.random() < 0.5
        weak = image.resize((size, size), Image.BILINEAR, box=box)
        weak = weak_colours(weak, rng, colours)
        if flip:
            weak = weak.transpose(Image.FLIP_LEFT_RIGHT)
        strong = to_pixels(strong_colours(weak, rng, colours))
        rows, columns = random_rectangle(size, rng)
        strong[:, rows, columns] = 0
        views = {"weak": to_pixels(weak), "strong": strong}
        if grid is None:
            return {**views, "seed": torch.tensor(rng.integers(2 ** 62))}
        if pair.path is None:
            raise ValueError("--masks files needs image files, with a JSON of masks beside each")
        seen = np.arange(grid) * size // grid       # the views' pixels that the grid takes
        x = (seen + 0.5) * side / size
        masks = masks_at(pair.masks(), (left + (side - x if flip else x)) / image.width,
                         (top + (seen + 0.5) * side / size) / image.height)
        hidden = np.isin(seen, np.r_[rows])[:, None] & np.isin(seen, np.r_[columns])
        masks = masks & ~hidden
        return {**views, "masks": torch.from_numpy(masks[masks.any(axis=(1, 2))].astype(np.int8))}

    # Training

    def features(self, batch):
        """masks (B, M, G, G), where they are not read from files."""
        if "masks" in batch:
            return batch
        batch = dict(batch)
        return {**batch, "masks": self.mask_generator(batch["weak"], batch.pop("seed"))}

    def groups(self):
        """Three learning rates; weight decay on all but the layers that normalise."""
        norms = [module for module in self.modules()
                 if isinstance(module, (nn.LayerNorm, nn.GroupNorm))]
        undecayed = {id(p) for module in norms for p in module.parameters()}
        rates = {"decoder": 1.0, "backbone": self.settings.visual_rate,
                 "prompts": self.settings.prompt_rate}
        found = {}
        for name, p in self.trained().items():
            key = (rates[name.partition(".")[0]], 0.0 if id(p) in undecayed else 1.0)
            found.setdefault(key, []).append(p)
        return [{"params": params, "rate": rate, "decay": decay}
                for (rate, decay), params in found.items()]

    @staticmethod
    def learning_rate(step, steps, peak, warmup, final):
        """Cosine from peak to final x peak, from the first step on. step counts from 0."""
        return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps)))

    def network_input(self, pixels, size=None):
        """uint8 (B, 3, H, W) -> normalised float32, resized to size (a number or a pair)."""
        images = self.backbone.normalise(pixels)
        size = size or self.size
        return F.interpolate(images, size, mode="bilinear", align_corners=False)

    def pseudo_classes(self):
        """Unit-norm text embeddings (C, D) of the prompts (section 4)."""
        C = len(self.prompts)
        embedded = self.text.tower.token_embedding(self.tokens).expand(C, -1, -1)   # (C, 77, width)
        embedded = embedded.index_copy(1, self.free, self.prompts)
        return self.text(self.tokens.expand(C, -1), embedded)[0]

    @torch.no_grad()
    def assign_masks(self, weak, masks, classes, chunk):
        """Pseudo-class of each mask, (B, M), -1 for one that is dropped (sections 5 and 6).

        weak: uint8 (B, 3, H, W). masks: (B, M, G, G) bool. classes: (C, D). chunk: images at a
        time.
        """
        pooled = []
        for pixels, own in zip(weak.split(chunk), masks.split(chunk)):
            with self.autocast():
                features = self.teacher(self.network_input(pixels)).float()         # (b, h, w, D)
            weights = pooling_weights(own, *features.shape[1:3])                    # (b, M, h, w)
            pooled.append(torch.einsum("bmhw,bhwd->bmd", weights, features))
        pooled = F.normalize(torch.cat(pooled), dim=-1)                             # (B, M, D)
        kept = masks.sum(dim=(-2, -1)) >= LEAST_CELLS                               # (B, M)
        share = sinkhorn(self.backbone.SHARPNESS * pooled[kept] @ classes.T)        # (R, C)
        ids = torch.full(kept.shape, -1, device=kept.device)
        ids[kept] = share.argmax(dim=1)
        return ids

    def logits(self, strong, classes, draws=None):
        """The student's answer (b, C, G, G): maps of cosines through the decoder (section 7).

        strong: uint8 (b, 3, H, W). classes: (C, D). draws: of stochastic depth, (b, drops).
        """
        with self.autocast():
            features = self.backbone(self.network_input(strong), draws)             # (b, h, w, D)
            features = F.normalize(features.float(), dim=-1)
            maps = torch.einsum("bhwd,cd->bchw", features, classes)                 # (b, C, h, w)
            refined = self.decoder(maps.flatten(0, 1)[:, None])
        G = self.settings.mask_grid
        refined = refined.float()[:, 0].unflatten(0, maps.shape[:2])                # (b, C, 4h, 4w)
        return F.interpolate(refined, (G, G), mode="bilinear", align_corners=False)

    def backward(self, batch, scale, chunk=None):
        """The pseudo-classes are embedded once; images then come in chunks, each with a backward of
        its own, whose gradients for the pseudo-classes are added up."""
        B = len(batch["weak"])
        chunk = min(chunk or B, B)
        masks = batch["masks"] > 0                                                  # -1 is padding
        with self.autocast():
            classes = self.pseudo_classes()                                         # (C, D)
        ids = self.assign_masks(batch["weak"], masks, classes, chunk)               # (B, M)
        C = len(classes)
        counts = sum_over_processes(torch.bincount(ids[ids >= 0], minlength=C))     # (C,)
        covered = (masks & (ids >= 0)[..., None, None]).any(dim=1)                  # (B, G, G)
        terms = C * sum_over_processes(covered.sum()).clamp(min=1)
        draws = global_rows(lambda rows: torch.rand(rows, self.backbone.drops), B).to(ids.device)
        received = classes.detach().requires_grad_()
        loss = 0
        for rows in torch.arange(B).split(chunk):
            logits = self.logits(batch["strong"][rows], received, draws[rows])      # (b, C, G, G)
            part = pixel_loss(logits, union_of_masks(masks[rows], ids[rows], C))
            part = sum_over_processes(part) / terms
            scale(part).backward()
            loss = loss + part.detach()
        classes.backward(received.grad)
        return {"loss": loss, "masks": counts.sum(), "used": (counts > 0).sum()}

    def after_step(self, step, steps):
        moving_average(self.teacher, self.backbone, 1 - self.settings.ema)

    # Inference

    def prepare(self, protocol):
        torch.backends.cuda.matmul.allow_tf32 = False       # training alone uses it
        if protocol["input"] not in ("squash", "native"):
            raise ValueError(f"input {protocol['input']!r}: expected squash or native")
        self.input = protocol["input"]

    def embed_classes(self, classes, templates=("{}",), batch=256, **options):
        """See `Method.embed_classes`. A prompt's embedding is the state at its end token."""
        def embed(prompts):
            texts = [before + name + after for before, name, after in prompts]
            tokens = torch.stack([tokenize(text) for text in texts])                # (P, 77)
            return self.text(tokens.to(self.device))[0]

        return prompt_ensemble(classes, templates, embed, batch)

    @torch.no_grad()
    def patch_scores(self, pixels, class_embeddings):
        """Cosines (B, C, 64, 64) of the enlarged features and classes (section 9); see `Method`."""
        size = pixels.shape[-2:]
        if self.input == "native":
            images = self.network_input(pixels, size)
            images = F.pad(images, (0, -size[1] % self.backbone.stride,
                                    0, -size[0] % self.backbone.stride))
            size = images.shape[-2:]
        else:
            images = self.network_input(pixels)
        features = self.backbone(images).permute(0, 3, 1, 2)                        # (B, D, h, w)
        cells = [max(TEST_CELLS, side) for side in features.shape[-2:]]
        # Enlarged before they are normalised: the other way round gives other directions.
        features = F.interpolate(features, cells, mode="bilinear", align_corners=False)
        features = F.normalize(features, dim=1)
        scores = best_synonym(features.flatten(2).transpose(1, 2), class_embeddings)
        return scores.unflatten(-1, cells), size

    @torch.no_grad()
    def image_scores(self, pixels, class_embeddings):
        """Cosines (B, C) of CLIP's own embedding of the whole image and classes."""
        images = self.network_input(pixels, self.backbone.image_size)
        pooled = F.normalize(self.backbone.pooled(images), dim=-1)                  # (B, D)
        return best_synonym(pooled[:, None], class_embeddings)[..., 0]

    # Flags and files

    @staticmethod
    def add_flags(parser):
        add = parser.add_argument_group("PixelCLIP").add_argument
        add("--clip-model", default=DEFAULT_CLIP, metavar="MODEL/WEIGHTS",
            help="open_clip's names of a CLIP, a ViT or ConvNeXt, and of its weights; MODEL/FILE, "
                 "MODEL/random, or a SimZSS checkpoint of the toy world (default: %(default)s)")
        add("--network-size", type=int,
            help="pixels a side of the network's input (default: 20 cells, 320 for a ViT-B/16 and "
                 "640 for a ConvNeXt)")
        add("--masks", choices=["kmeans", "files"], default="kmeans",
            help="K-means over patch tokens, or SA-1B's JSON beside each image (default: "
                 "%(default)s)")
        add("--mask-backbone", default="vit_small_patch16_224.dino",
            help="timm name of the backbone whose tokens are clustered (default: %(default)s)")
        add("--mask-weights", metavar="FILE",
            help="its local weights file, or random (default: timm's download)")
        add("--clusters", type=int, default=16, help="masks by K-means (default: %(default)s)")
        add("--mask-grid", type=int, default=256, help="its side in cells (default: %(default)s)")
        add("--resize", type=int, default=1024,
            help="short side of the photo from which the square of --image-size is cut (default: "
                 "%(default)s)")
        add("--colours", type=float, default=1.0,
            help="strength of all changes of colour; 0 = none (default: %(default)s)")
        add("--pseudo-classes", type=int, default=64,
            help="their number; choose far fewer than there are masks in a batch (default: "
                 "%(default)s)")
        add("--free-tokens", type=int, default=4,
            help="learned tokens of a pseudo-class's name (default: %(default)s)")
        add("--prompt", default="A photo of a {} in the scene",
            help="what stands around them (default: %(default)s)")
        add("--decoder-channels", type=int, nargs=2, default=[64, 32],
            help="after its first and second doubling (default: 64 32)")
        add("--ema", type=float, default=0.999,
            help="share of the teacher that a step keeps (default: %(default)s)")
        add("--visual-rate", type=float, default=0.01,
            help="image encoder's learning rate / decoder's (default: %(default)s)")
        add("--prompt-rate", type=float, default=10.0,
            help="prompts' learning rate / decoder's (default: %(default)s)")
        add("--input", choices=["squash", "native"], default="squash",
            help="at test time a window is squashed to the network's input, or kept as it is "
                 "(default: %(default)s)")

    @staticmethod
    def check_flags(args):
        check_positive(args, "network_size", "clusters", "mask_grid", "resize", "pseudo_classes",
                       "free_tokens")
        check_positive(args, "visual_rate", "prompt_rate", "colours", or_zero=True)
        check_bounds(args, {"ema": (0, 1)})
        first_channels, second_channels = args.decoder_channels
        if first_channels < 1 or second_channels < 1 or first_channels % 4 or second_channels % 2:
            raise ValueError(f"--decoder-channels {args.decoder_channels}: expected multiples of 4 "
                             "and of 2, the groups of their GroupNorm")
        first = PixelCLIP.TOY["clip_model"]
        if args.clip_model == first and not Path(first).exists():
            raise FileNotFoundError(f"no {first}, the CLIP of the toy world; train it first: "
                                    f"python train.py --train-data toy --lambda 0 --output {first}")
        if args.prompt.count("{}") != 1:
            raise ValueError(f"--prompt is {args.prompt!r}; expected one {{}} in it")
        if args.warmup:
            raise ValueError(f"--warmup is {args.warmup}; PixelCLIP's schedule has none")

    @classmethod
    def build(cls, args, bank):
        torch.backends.cuda.matmul.allow_tf32 = True        # the authors' float32 products
        encoder, text = load_clip(*split_name(args.clip_model))
        return cls(encoder, text, args.network_size).begin_training(args)

    @classmethod
    def pretrained(cls, which):
        name, weights = split_name(which or DEFAULT_CLIP)
        model = cls(*load_clip(name, weights))
        if name == "toy":
            model.trained_with = read_checkpoint(weights)[0]["training"]
        return model

    def config(self):
        return {"backbone": self.backbone.config, "size": self.size}

    @classmethod
    def rebuild(cls, config):
        backbone = config["backbone"]
        return cls(*load_clip(backbone["name"], backbone["weights"]), config["size"])

    def state(self):
        """What is trained and the teacher's copy of it, and all of a CLIP with random weights."""
        trained = self.trained()
        is_random = self.backbone.config["weights"] == "random"
        return {name: value for name, value in self.state_dict().items()
                if name.replace("teacher.", "backbone.") in trained
                or is_random and name.startswith(("backbone.", "text.", "teacher."))}

    def check_frozen(self, config, path):
        found = self.backbone.config
        if found["weights"] == "random":            # all of it came from the checkpoint
            self.backbone.config = config["backbone"]
        elif found["sha256"] != config["backbone"]["sha256"]:
            raise ValueError(f"the weights of {found['name']} ({found['weights']}) are not those "
                             f"that {path} was trained from; pass --backbone-weights FILE with the "
                             "right ones")
