"""PixelCLIP: CLIP's image encoder learns to segment from photos alone, without words or labels.

Paper: "Towards Open-Vocabulary Semantic Segmentation Without Semantic Labels", NeurIPS 2024,
arXiv 2409.19846. "section n" below is a section of docs/pixelclip.md.

    python segment.py photo.jpg --classes "cat, sofa" --checkpoint clip     # before any training
    python train.py --recipe pixelclip --train-data FOLDER                  # of photos, no captions

The letters are those of model.py, C being pseudo-classes in training, M masks of an image; and

    R   masks of the global batch that are kept         K   clusters of the mask generator
    J   free tokens of a prompt                         G   side of the grid of masks
"""
import copy
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from torchvision.tv_tensors import Mask

from machinery.contract import Method, Protocol, moving_average
from machinery.images import refuse_other_shape, to_pixels
from machinery.networks import backbones
from machinery.networks.checkpoint import load_model, model_file
from machinery.networks.layers import Normalise
from machinery.networks.release import STORED
from machinery.parallel import gather_rows, rank, sum_over_processes
from machinery.settings import setting
from machinery.tokenizer import tokenize
from methods.parts.clustering import kmeans
from methods.parts.dense_clip import DenseToy, DenseViT, create_clip
from methods.parts.views import (mask_at, random_rectangle, random_square, strong_colours,
                                 weak_colours)
from model import TextEncoder, best_synonym, create_trunk, patch_tokens, prompt_ensemble

TEST_CELLS = 64                                     # a side, of the enlarged features at test time
LEAST_CELLS = 2                                     # of a mask that is kept
SINKHORN_ROUNDS = 3
KMEANS_STEPS = 100
KMEANS_TOLERANCE = 1e-4                             # squared shift of an image's centres, summed


# --------------------------------------------------------------------------------------------------
# Settings

@dataclass
class PixelCLIPSettings:
    """The CLIP, where masks come from, and what is learned."""
    clip_model: str = setting(
        "ViT-B-16-quickgelu/openai", "open_clip's names of a CLIP, a ViT or ConvNeXt, and of its "
        "weights; MODEL/FILE, MODEL/random, or a SimZSS checkpoint of the toy world")
    network_size: int | None = setting(
        None, "pixels a side of the network's input, to which squares are resized; none = 20 cells "
        "a side, 320 for a ViT-B/16 and 640 for a ConvNeXt", least=1, most=8192)
    masks: str = setting(
        "kmeans", "K-means over patch tokens, or files: SA-1B's JSON beside each image",
        choices=("kmeans", "files"))
    mask_backbone: str = setting(
        "vit_small_patch16_224.dino", "timm name of the backbone whose tokens are clustered, or "
        "toy")
    mask_weights: str = setting(
        "pretrained", "weights of the mask backbone: pretrained = timm's download, random, or a "
        "local file")
    clusters: int = setting(16, "K, masks of an image by K-means", least=1)
    mask_grid: int = setting(256, "G, side of masks and targets, in cells", least=1)
    resize: int = setting(
        1024, "pixels of the photo's short side before the square of --image-size is cut out",
        least=1)
    colours: float = setting(
        1.0, "strength of all random changes of colour; 0 = none", least=0, most=2)
    pseudo_classes: int = setting(
        64, "C; choose far fewer than there are masks in a batch, which is clusters x batch",
        least=1)
    free_tokens: int = setting(4, "J, learned tokens of a pseudo-class's name", least=1)
    prompt: str = setting(
        "A photo of a {} in the scene", "what stands around the learned tokens, which replace {}")
    prompt_words: tuple[str, ...] = setting(
        (), "words as whose first tokens the learned tokens begin, for a CLIP that knows few; none "
        "= any entry of the vocabulary", flag=False)
    decoder_channels: tuple[int, ...] = setting(
        (64, 32), "channels of the decoder after its first doubling, a multiple of 4, and after "
        "its second, a multiple of 2 (the groups of GroupNorm)", least=1)
    ema: float = setting(
        0.999, "how much of the teacher a step keeps; the student replaces the rest", least=0,
        most=1)
    visual_rate: float = setting(
        0.01, "learning rate of the image encoder / that of the decoder", least=0)
    prompt_rate: float = setting(
        10.0, "learning rate of the prompts / that of the decoder", least=0)

    def check(self):
        name, _, weights = self.clip_model.partition("/")
        if model_file(self.clip_model).is_file():   # found again from any folder
            self.clip_model = str(Path(self.clip_model).resolve())
        elif Path(weights).is_file():
            self.clip_model = f"{name}/{Path(weights).resolve()}"
        if self.prompt.count("{}") != 1:
            raise ValueError(f"prompt is {self.prompt!r}; expected one {{}} in it")
        channels = self.decoder_channels
        if len(channels) != 2 or channels[0] % 4 or channels[1] % 2:
            raise ValueError(f"decoder_channels is {list(channels)}; expected a multiple of 4 and "
                             "one of 2")


def common(name, default):
    """A field of the common protocol with another default."""
    [field] = [field for field in dataclasses.fields(Protocol) if field.name == name]
    return dataclasses.field(default=default, metadata=field.metadata)


@dataclass
class PixelCLIPProtocol(Protocol):
    """The authors': one window of 2048 pixels, which holds any resized photo, so that the whole
    photo is seen at once. A ViT that was not trained here is used as NACLIP does, see
    `windows_of_naclip`."""
    templates: str = common("templates", "pixelclip")
    short_side: int = common("short_side", 640)
    window: int = common("window", 2048)
    stride: int = common("stride", 2048)
    input: str = setting(
        "squash", "what the network sees of a window: it is squashed to the network's input, or "
        "native, kept as it is", choices=("squash", "native"))
    last_block: str = setting(
        "value", "of a ViT: value, as in training, or neighbours, NACLIP's",
        choices=("value", "neighbours"), flag=False)


def windows_of_naclip(image_size):
    """NACLIP's protocol for a CLIP that was trained on squares of image_size pixels: 224 gives a
    short side of 336, windows of 224, steps of 112."""
    return PixelCLIPProtocol(short_side=3 * image_size // 2, window=image_size,
                             stride=image_size // 2, input="native", last_block="neighbours")


# --------------------------------------------------------------------------------------------------
# The formulas

def pooling_weights(masks, h, w):
    """Weights that pool h x w cells as if these were enlarged to the masks' grid (section 5).

    masks: (B, M, G, G) bool. Enlarging and averaging are both linear, so a mask's mean is a
    weighted sum of the cells. Returns (B, M, h, w); each mask's weights sum to 1, those of an empty
    mask to 0.
    """
    G = masks.shape[-1]
    rows, columns = (F.interpolate(torch.eye(n, device=masks.device)[None], G, mode="linear")[0]
                     for n in (h, w))                                       # (h, G), (w, G)
    count = masks.sum(dim=(-2, -1))[..., None, None]                        # (B, M, 1, 1)
    return rows @ masks.float() @ columns.T / count.clamp(min=1)            # (B, M, h, w)


@torch.no_grad()
def sinkhorn(scores, rounds=SINKHORN_ROUNDS):
    """Share masks out to pseudo-classes so that all classes get about equally many (section 6).

    scores: (R, C), of this process's masks; R may be 0. A round divides the shares of a class by
    their sum over the masks of all processes, then those of a mask by their sum over classes. In
    logarithms nothing underflows. Returns (R, C), rows sum to 1.
    """
    log_share = scores.log_softmax(dim=1)
    for _ in range(rounds):
        own = log_share.logsumexp(dim=0, keepdim=True)                              # (1, C)
        log_share = log_share - gather_rows(own).logsumexp(dim=0)
        log_share = log_share.log_softmax(dim=1)
    return log_share.exp()


def union_of_masks(masks, ids, classes):
    """Y: where an image shows each pseudo-class, the union of that class's masks (section 7).

    masks: (B, M, G, G) bool. ids: (B, M), -1 = none. classes: C. Returns (B, C, G, G) bool; a pixel
    may belong to several.
    """
    member = F.one_hot(ids + 1, classes + 1)[..., 1:].float()                       # (B, M, C)
    covered = member.transpose(1, 2) @ masks.flatten(2).float()                     # (B, C, G * G)
    return (covered > 0).unflatten(-1, masks.shape[-2:])


def pixel_loss(logits, targets):
    """Sum of the binary cross-entropies of all pseudo-classes at all pixels that a mask covers, to
    be divided by their number and C (section 7). logits: (B, C, G, G). targets: Y."""
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


class Prompts(nn.Module):
    """Pseudo-classes: a prompt in which J learned token embeddings stand for the name (section 4).

    settings: `PixelCLIPSettings`. text: `TextEncoder`, whose vocabulary has their initial values.
    """

    def __init__(self, settings, text):
        super().__init__()
        count = settings.free_tokens
        tokens, free = prompt_tokens(settings.prompt, count)
        if len(free) < count or tokens[-1] != 0:
            raise ValueError(f"--prompt with --free-tokens {count} is longer than the context of "
                             f"{len(tokens)} tokens")
        tokens = tokens[:text.ends(tokens) + 1]
        self.register_buffer("tokens", tokens, persistent=False)            # (T,)
        self.register_buffer("free", free, persistent=False)                # (J,)
        table = text.tower.token_embedding.weight                           # (vocabulary, width)
        known = torch.arange(len(table) - 10)
        if settings.prompt_words:
            known = torch.stack([tokenize(word)[1] for word in settings.prompt_words])
        words = known[torch.randint(len(known), (settings.pseudo_classes, count))]
        self.words = nn.Parameter(table[words].clone())                     # (C, J, width)

    def forward(self, text):
        """Unit-norm text embeddings (C, D)."""
        C = len(self.words)
        embedded = text.tower.token_embedding(self.tokens).expand(C, -1, -1)        # (C, T, width)
        embedded = embedded.index_copy(1, self.free, self.words)
        return text(self.tokens.expand(C, -1), embedded)[0]


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
    """K-means over the patch tokens of a frozen backbone, image by image (section 2). settings:
    `PixelCLIPSettings`."""

    def __init__(self, settings):
        super().__init__()
        self.trunk = create_trunk(settings.mask_backbone, settings.mask_weights,
                                  flag="--mask-weights")
        self.patch_size = backbones.patch_size(self.trunk)
        self.normalise = Normalise(self.trunk.pretrained_cfg["mean"],
                                   self.trunk.pretrained_cfg["std"])
        self.clusters = settings.clusters
        self.grid = settings.mask_grid
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)                 # no batch statistics

    @torch.no_grad()
    def forward(self, pixels, seeds):
        """pixels: uint8 (B, 3, H, W), whole patches. seeds: (B,) int64, of the first centres.
        Returns (B, K, G, G) bool; an image's masks cover it without overlap. Raises ValueError."""
        ph, pw = self.patch_size
        if pixels.shape[-2] % ph or pixels.shape[-1] % pw:
            raise ValueError(f"--image-size is {pixels.shape[-1]}; expected a multiple of the mask "
                             f"backbone's patches of {ph} x {pw} pixels")
        _, tokens, (h, w) = patch_tokens(self.trunk, self.normalise(pixels))        # (B, N, D)
        if self.clusters > h * w:
            raise ValueError(f"--clusters is {self.clusters}; an image has only {h * w} patches")
        first = [torch.randperm(h * w, generator=torch.Generator().manual_seed(seed))
                 for seed in seeds.tolist()]
        first = torch.stack(first)[:, :self.clusters].to(tokens.device)             # (B, K)
        labels = kmeans(tokens, self.clusters, KMEANS_STEPS, first, KMEANS_TOLERANCE)
        masks = F.one_hot(labels, self.clusters).mT.unflatten(2, (h, w))            # (B, K, h, w)
        return F.interpolate(masks.float(), self.grid, mode="nearest") > 0


# --------------------------------------------------------------------------------------------------
# Which CLIP

def load_clip(which):
    """A CLIP, frozen but for what PixelCLIP trains.

    which: "MODEL/WEIGHTS", see `create_clip`; or a checkpoint of SimZSS on the toy world. Returns
    the dense image encoder, the text encoder, and the toy world's SimZSS or None.
    """
    path = model_file(which)
    if path.is_file() and path.suffix == ".safetensors":
        model = load_model(path, method="simzss")
        if model.settings.backbone.name != "toy":
            raise ValueError(f"{path} is no SimZSS of the toy world; expected that, or a CLIP of "
                             "open_clip as MODEL/WEIGHTS, such as ViT-B-16-quickgelu/openai")
        encoder = DenseToy(model.backbone.trunk)
        encoder.normalise = model.backbone.normalise
        text = model.text
    else:
        encoder, tower, statistics = create_clip(*which.partition("/")[::2])
        encoder.normalise = Normalise(statistics["mean"], statistics["std"])
        text = ClipText(tower)
        model = None
    text.requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(any(word in name for word in encoder.TRAINED))
    return encoder, text, model


# --------------------------------------------------------------------------------------------------
# The whole

class PixelCLIP(Method):
    """A dense CLIP; to train it, with teacher, decoder, prompts and mask generator."""

    name = "pixelclip"
    Settings = PixelCLIPSettings
    Protocol = PixelCLIPProtocol
    NEEDS_CONCEPTS = False
    ROWS_INDEPENDENT = True
    TRAINING_ONLY = ("teacher.", "decoder.", "prompts.", "mask_generator.")
    WEIGHTS = "clip_model"

    def __init__(self, settings, bank=(), training=False):
        super().__init__(settings, bank)
        weights = settings.clip_model.rpartition("/")[2]
        if training and weights == "imported":
            raise ValueError(f"clip_model {settings.clip_model} is the CLIP of a published "
                             "PixelCLIP, and cannot be trained on; expected MODEL/WEIGHTS")
        self.backbone, self.text, toy = load_clip(settings.clip_model)     # backbone: the student
        if toy:                                     # until training, it is used as its CLIP was
            for field in dataclasses.fields(Protocol):
                setattr(self.protocol, field.name, getattr(toy.protocol, field.name))
            self.trained_with = toy.trained_with
        elif isinstance(self.backbone, DenseViT):
            self.protocol = windows_of_naclip(self.backbone.image_size[0])
        self.size = settings.network_size or self.backbone.cells * self.backbone.stride
        if self.size % self.backbone.stride:
            raise ValueError(f"--network-size is {self.size}; expected a multiple of this CLIP's "
                             f"{self.backbone.stride} pixels a cell")
        if training:
            torch.backends.cuda.matmul.allow_tf32 = True    # the authors' float32 products
            self.teacher = copy.deepcopy(self.backbone).requires_grad_(False)
            self.decoder = Decoder(*settings.decoder_channels)
            self.prompts = Prompts(settings, self.text)
            if settings.masks == "kmeans":
                self.mask_generator = MaskGenerator(settings)
            self.train()
        if weights in STORED:                       # they exist nowhere else
            self.FROZEN = ()
            if weights == "random" and rank() == 0:
                print("warning: CLIP has random weights; its masks mean nothing", file=sys.stderr)
        else:                                       # all but what is trained and its average
            trained = self.trained()
            self.FROZEN = tuple(name for name in self.state_dict()
                                if name.replace("teacher.", "backbone.") not in trained)

    def train(self, mode=True):
        super().train(mode)
        if "teacher" in self._modules:
            self.teacher.eval()                     # no stochastic depth
        return self

    # Training

    @staticmethod
    def sample(pair, rng, settings):
        """Two views of the same square, uint8 (3, size, size): weak, and strong, which has a black
        rectangle. With masks by K-means a seed for `MaskGenerator`; with masks of the image's file
        these, (M, G, G) int8, without the rectangle."""
        image = pair.image()
        size = pair.size
        left, top, side = random_square(*image.size, size, settings.resize, rng)
        box = (left, top, min(left + side, image.width), min(top + side, image.height))
        weak = image.resize((size, size), Image.BILINEAR, box=box)
        masks = None
        if settings.masks == "files":
            if pair.path is None:
                raise ValueError("--masks files needs image files, with a JSON of masks beside "
                                 "each")
            G = settings.mask_grid
            middle = (np.arange(G) + 0.5) / G                               # of the cells, 0 to 1
            masks = []
            for mask in pair.masks():               # one at a time: a photo may have hundreds
                refuse_other_shape(f"a mask of {pair.path}", mask, image)
                masks.append(mask_at(mask, (left + middle * side) / image.width,
                                     (top + middle * side) / image.height))
            masks = Mask(np.array(masks, bool).reshape(-1, G, G))           # (M, G, G)
        weak, masks = v2.RandomHorizontalFlip()(weak, masks)        # both or none
        weak = weak_colours(settings.colours)(weak)
        strong = to_pixels(strong_colours(settings.colours)(weak))
        rows, columns = random_rectangle(size, rng)
        strong[:, rows, columns] = 0
        views = {"weak": to_pixels(weak), "strong": strong}
        if masks is None:
            return {**views, "seed": torch.tensor(rng.integers(2 ** 62))}
        hidden = torch.zeros(1, 1, size, size)
        hidden[..., rows, columns] = 1
        masks = masks & (F.interpolate(hidden, G, mode="nearest-exact")[0] == 0)
        return {**views, "masks": masks[masks.any(dim=(1, 2))].to(torch.int8)}

    @torch.no_grad()
    def features(self, batch):
        """In place of the weak view: masks (B, M, G, G), where they come from K-means, and the
        teacher's embedding of each mask (B, M, D), unit-norm (section 5)."""
        others = {name: value for name, value in batch.items() if name not in ("weak", "seed")}
        weak = batch["weak"]
        masks = batch["masks"] if "masks" in batch else self.mask_generator(weak, batch["seed"])
        masks = masks > 0                                                   # -1 is padding
        with self.autocast():
            cells = self.teacher(self.network_input(weak)).float()          # (B, h, w, D)
        weights = pooling_weights(masks, *cells.shape[1:3])                 # (B, M, h, w)
        pooled = torch.einsum("bmhw,bhwd->bmd", weights, cells)
        return {**others, "masks": masks.to(torch.int8), "pooled": F.normalize(pooled, dim=-1)}

    def encode(self, batch):
        """logits (B, C, G, G): maps of cosines with the pseudo-classes, through the decoder
        (section 7). The prompts are embedded here, and so in each micro-batch again."""
        with self.autocast():
            cells = self.backbone(self.network_input(batch["strong"]))              # (B, h, w, D)
            cells = F.normalize(cells.float(), dim=-1)
            classes = self.prompts(self.text)                                       # (C, D)
            maps = torch.einsum("bhwd,cd->bchw", cells, classes)                    # (B, C, h, w)
            refined = self.decoder(maps.flatten(0, 1)[:, None])             # (B * C, 1, 4 h, 4 w)
        refined = refined.float()[:, 0].unflatten(0, maps.shape[:2])                # (B, C, ., .)
        G = self.settings.mask_grid
        return {"logits": F.interpolate(refined, (G, G), mode="bilinear", align_corners=False)}

    def losses(self, encoded, batch):
        """The cross-entropy at all pixels that any mask covers, in the global batch (section 7).
        masks, used: how many masks were assigned, to how many pseudo-classes."""
        masks = batch["masks"] > 0                                          # -1 is padding
        ids = self.assign_masks(batch["pooled"], masks)                             # (B, M)
        C = self.settings.pseudo_classes
        targets = union_of_masks(masks, ids, C)                                     # (B, C, G, G)
        pixels = sum_over_processes(targets.any(dim=1).sum()).clamp(min=1)
        loss = sum_over_processes(pixel_loss(encoded["logits"], targets)) / (C * pixels)
        counts = sum_over_processes(torch.bincount(ids[ids >= 0], minlength=C))     # (C,)
        return {"loss": loss, "masks": counts.sum(), "used": (counts > 0).sum()}

    @torch.no_grad()
    def assign_masks(self, pooled, masks):
        """Pseudo-class of each mask, (B, M), -1 for one that is dropped (section 6).

        pooled: (B, M, D), unit-norm. masks: (B, M, G, G) bool.
        """
        kept = masks.sum(dim=(-2, -1)) >= LEAST_CELLS                               # (B, M)
        with self.autocast():
            classes = self.prompts(self.text)                                       # (C, D)
        share = sinkhorn(self.backbone.SHARPNESS * pooled[kept] @ classes.T)        # (R, C)
        ids = torch.full(kept.shape, -1, device=kept.device)
        ids[kept] = share.argmax(dim=1)
        return ids

    def after_step(self, step, steps):
        moving_average(self.teacher, self.backbone, 1 - self.settings.ema)

    def factors(self, name, parameter):
        """Three learning rates; weight decay on all but the layers that normalise."""
        layer = self.get_submodule(name.rpartition(".")[0])
        rates = {"decoder": 1.0, "backbone": self.settings.visual_rate,
                 "prompts": self.settings.prompt_rate}
        normalises = isinstance(layer, (nn.LayerNorm, nn.GroupNorm))
        return float(not normalises), rates[name.partition(".")[0]]

    # Networks

    def network_input(self, pixels, size=None):
        """uint8 (B, 3, H, W) -> normalised float32, resized to size (a number or a pair)."""
        images = self.backbone.normalise(pixels)
        return F.interpolate(images, size or self.size, mode="bilinear", align_corners=False)

    # Inference

    def embed_classes(self, classes, templates=("{}",)):
        """A prompt's embedding is the state at its end token."""
        def embed(prompts):
            tokens = torch.stack([tokenize("".join(prompt)) for prompt in prompts])     # (P, 77)
            return self.text(tokens.to(self.device))[0]

        return prompt_ensemble(classes, templates, embed)

    @torch.no_grad()
    def unit_tokens(self, pixels):
        """The features (B, h, w, D), enlarged to 64 x 64 if the window was squashed (section 9);
        see `Method`."""
        size = pixels.shape[-2:]
        if self.protocol.input == "native":
            stride = self.backbone.stride
            images = F.pad(self.backbone.normalise(pixels),
                           (0, -size[1] % stride, 0, -size[0] % stride))
            features = self.backbone(images, self.protocol.last_block)              # (B, h, w, D)
            return F.normalize(features, dim=-1), images.shape[-2:]
        features = self.backbone(self.network_input(pixels), self.protocol.last_block)
        # Enlarged before they are normalised: the other way round gives other directions.
        cells = [max(TEST_CELLS, side) for side in features.shape[1:3]]
        features = F.interpolate(features.permute(0, 3, 1, 2), cells, mode="bilinear",
                                 align_corners=False)                               # (B, D, 64, 64)
        return F.normalize(features, dim=1).permute(0, 2, 3, 1), size

    @torch.no_grad()
    def patch_scores(self, pixels, class_embeddings):
        """Cosines (B, C, h, w) of features and classes; see `Method`."""
        tokens, covered = self.unit_tokens(pixels)
        return best_synonym(tokens, class_embeddings), covered

    @torch.no_grad()
    def image_scores(self, pixels, class_embeddings):
        """Cosines (B, C) of CLIP's own embedding of the whole image and classes."""
        images = self.network_input(pixels, self.backbone.image_size)
        pooled = F.normalize(self.backbone.pooled(images), dim=-1)                  # (B, D)
        return best_synonym(pooled[:, None], class_embeddings)[..., 0]
