"""S-Seg: masks learned from a frozen network's clusters, names learned from captions.

Paper: Zihang Lai, "Exploring Simple Open-Vocabulary Semantic Segmentation", CVPR 2025, arXiv
2401.12217. Its author published no code. docs/sseg.md has every formula, and says what is known and
what is our choice; "section n" below is a section there. The layers are MaskFormer's, in
methods/parts/maskformer.py.

    python train.py --recipe sseg-toy               # drawn scenes; recipes/sseg.toml is the paper's

Letters beside those of model.py:

    Q   queries, masks of an image            P   cells of the mask grid, (H / 4) (W / 4)
    K   clusters of the teacher's tokens      L   layers of the transformer decoder
    d   width of both decoders
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

from machinery.contract import Method, Protocol
from machinery.networks import backbones
from machinery.networks.layers import IMAGENET_MEAN, IMAGENET_STD, Normalise
from machinery.parallel import sum_over_processes
from machinery.settings import setting
from machinery.tokenizer import tokenize
from methods.parts.clustering import kmeans
from methods.parts.maskformer import (STRIDE, PixelDecoder, SwinMaps, ToyMaps, TransformerDecoder,
                                      mlp)
from model import (MAX_LOGIT_SCALE, BackboneSettings, TextEncoder, TextSettings, VisionBackbone,
                   best_synonym, global_loss, prompt_ensemble)

FLIPPED = 0.5                                       # of the training crops
FOCAL_WEIGHT = 20.0                                 # in the loss and in the matching (section 5.1)
DICE_WEIGHT = 1.0


# --------------------------------------------------------------------------------------------------
# Settings

@dataclass
class SSegSettings:
    """The teacher, the network that is trained, and the losses."""
    backbone: BackboneSettings = setting(BackboneSettings, "the frozen teacher")
    text: TextSettings = setting(TextSettings, "the trained text encoder")
    student: str = setting(
        "swin_small_patch4_window7_224",
        "network that is trained: timm name of a Swin Transformer, or toy")
    drop_path: float = setting(
        0.2, "stochastic depth of the student's last block, less in those before", least=0,
        most=0.9)
    queries: int = setting(64, "Q, masks of an image", least=1)
    decoder_width: int = setting(
        256, "d, a multiple of 32 and of the heads", least=32)
    decoder_layers: int = setting(6, "L, layers of the transformer decoder", least=1)
    decoder_heads: int = setting(8, "attention heads of the transformer decoder", least=1)
    decoder_ffn: int = setting(
        2048, "width of the transformer decoder's feed-forward layers", least=1)
    dropout: float = setting(0.1, "dropout in the transformer decoder", least=0, most=0.9)
    feature: str = setting(
        "query", "what describes a mask: its query (paper) or the mean of the cells under it, "
        "which is not the paper's", choices=("query", "pool"))
    joint_width: int = setting(
        256, "D, of image and text embeddings and of the layer before them", least=1)
    clusters: int = setting(
        8, "K, the teacher's pseudo-masks of an image; at most as many as queries, because each "
        "gets its own", least=1)
    deep_supervision: str = setting(
        "mean", "mask loss of all decoder layers, averaged or summed, or of the last one",
        choices=("mean", "sum", "last"))
    least_crop: float = setting(
        0.4, "least area of a training crop, as a fraction of the image's", least=0.01, most=1)

    def check(self):
        if self.student != "toy" and not self.student.startswith("swin_"):
            raise ValueError(f"student is {self.student!r}; expected toy or a Swin Transformer of "
                             "timm, whose names begin with swin_")
        if self.decoder_width % 32 or self.decoder_width % self.decoder_heads:
            raise ValueError(f"decoder_width is {self.decoder_width}; expected a multiple of 32 "
                             f"and of the {self.decoder_heads} heads")
        if self.clusters > self.queries:
            raise ValueError(f"clusters is {self.clusters}; expected at most the {self.queries} "
                             "queries")
        if self.backbone.image_token != "class":
            raise ValueError("image_token is not used: S-Seg takes the teacher's patch tokens only")


@dataclass
class SSegProtocol(Protocol):
    merge: str = setting(
        "soft", "from masks to a map: soft, a sum over masks on their grid; fine, a sum on pixels; "
        "hard, the largest mask", choices=("soft", "fine", "hard"))


# --------------------------------------------------------------------------------------------------
# The mask loss (section 5.1)

def focal_loss(logits, targets):
    """Binary cross-entropy of each cell, weighted down where it is small already, averaged.

    logits: (..., P). targets: (..., P), 0 or 1. Returns (...).
    """
    p = logits.sigmoid()
    wrong = torch.where(targets > 0, 1 - p, p)
    alpha = torch.where(targets > 0, 0.25, 0.75)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (alpha * wrong ** 2 * entropy).mean(dim=-1)


def dice_loss(logits, targets):
    """1 - overlap of mask and target, in 0..1; sizes and return value as of `focal_loss`."""
    p = logits.sigmoid()
    overlap = (2 * (p * targets).sum(dim=-1) + 1) / (p.sum(dim=-1) + targets.sum(dim=-1) + 1)
    return 1 - overlap


@torch.no_grad()
def matching_costs(logits, targets):
    """20 focal + dice of every mask with every target, by matrix products.

    logits: (B, Q, P) float32. targets: (B, K, P) float32, 0 or 1. Returns (B, Q, K).
    """
    p = logits.sigmoid()
    inside = 0.25 * (1 - p) ** 2 * F.softplus(-logits)                              # (B, Q, P)
    outside = 0.75 * p ** 2 * F.softplus(logits)                                    # (B, Q, P)
    targets = targets.mT                                                            # (B, P, K)
    focal = (inside @ targets + outside @ (1 - targets)) / logits.shape[-1]         # (B, Q, K)
    sizes = p.sum(dim=-1)[..., None] + targets.sum(dim=1)[:, None]                  # (B, Q, K)
    dice = 1 - (2 * p @ targets + 1) / (sizes + 1)
    return FOCAL_WEIGHT * focal + DICE_WEIGHT * dice


def match(costs, present):
    """The one-to-one map of an image's targets to masks with the least total cost.

    costs: (B, Q, K). present: (B, K) bool, which targets there are. Returns (image, query, target)
    of each pair, three int64 tensors (pairs,).
    """
    # Where costs are not finite any assignment will do: train.py skips the step, whose loss is not
    # finite, either.
    costs = costs.nan_to_num().cpu().numpy()
    pairs = []
    for image, there in enumerate(present.cpu().numpy()):
        targets = there.nonzero()[0]
        _, queries = linear_sum_assignment(costs[image][:, targets].T)
        pairs += [(image, query, target) for query, target in zip(queries, targets)]
    return torch.tensor(pairs, device=present.device).unbind(dim=1)


def mask_loss(logits, labels, clusters):
    """20 focal + dice, averaged over the matched pairs of the global batch; others have no loss.

    logits: (B, Q, h, w) float32. labels: (B, h', w') int64, clusters of the same images. clusters:
    K. Returns a scalar.
    """
    labels = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest")
    targets = F.one_hot(labels.flatten(1).long(), clusters).mT.float()              # (B, K, P)
    logits = logits.flatten(2)                                                      # (B, Q, P)
    image, query, target = match(matching_costs(logits, targets), targets.any(dim=-1))
    masks = logits[image, query]                                                    # (pairs, P)
    wanted = targets[image, target]
    losses = FOCAL_WEIGHT * focal_loss(masks, wanted) + DICE_WEIGHT * dice_loss(masks, wanted)
    pairs = losses.new_tensor(len(losses))
    return sum_over_processes(losses.sum()) / sum_over_processes(pairs)


# --------------------------------------------------------------------------------------------------
# MaskFormer without its class head (sections 4.2 to 4.5)

class MaskNetwork(nn.Module):
    """An image -> Q masks, and a feature of each. settings: `SSegSettings`."""

    def __init__(self, settings):
        super().__init__()
        width = settings.decoder_width
        is_toy = settings.student == "toy"
        self.backbone = ToyMaps() if is_toy else SwinMaps(settings.student, settings.drop_path)
        channels = self.backbone.channels
        self.pixel_decoder = PixelDecoder(channels, width)
        self.decoder = TransformerDecoder(channels[-1], settings.queries, width,
                                          settings.decoder_layers, settings.decoder_heads,
                                          settings.decoder_ffn, settings.dropout)
        self.mask_head = mlp(width, width, width, width)
        self.feature_head = nn.Linear(width, width)                         # for the class head
        self.pools = settings.feature == "pool"

    def forward(self, images):
        """images: normalised (B, 3, H, W), H and W multiples of 32. Returns the mask logits of all
        layers (B, L, Q, H / 4, W / 4) and the mask features (B, Q, d)."""
        maps = self.backbone(images)
        cells = self.pixel_decoder(maps)                                    # (B, d, H/4, W/4)
        outputs = self.decoder(maps[-1])                                    # (L, B, Q, d)
        masks = torch.einsum("lbqd,bdhw->blqhw", self.mask_head(outputs), cells)
        described = outputs[-1]                                             # (B, Q, d)
        if self.pools:                              # the mean of the cells under each mask
            inside = masks[:, -1].detach().sigmoid().flatten(2)             # (B, Q, P)
            total = inside.sum(dim=-1, keepdim=True)
            described = inside @ cells.flatten(2).mT / (total + 1e-6)       # (B, Q, d)
        return masks, self.feature_head(described)


# --------------------------------------------------------------------------------------------------
# From named masks to a map (section 7)

def merge_masks(masks, classes, merge="soft"):
    """Scores of the classes in each cell (B, C, h, w), which sum to 1.

    masks: logits (B, Q, h, w). classes: probabilities (B, C, Q). merge: "hard", each cell takes the
    classes of its largest mask; else the mean over all masks, weighted by how much of the cell each
    has.
    """
    if merge == "hard":
        largest = masks.flatten(2).argmax(dim=1)                                    # (B, P)
        index = largest[:, None].expand(-1, classes.shape[1], -1)                   # (B, C, P)
        return classes.gather(2, index).unflatten(-1, masks.shape[-2:])
    weights = F.logsigmoid(masks).softmax(dim=1)    # sigmoid / sum of sigmoids, never 0 / 0
    return torch.einsum("bcq,bqhw->bchw", classes, weights)


# --------------------------------------------------------------------------------------------------
# The whole

class SSeg(Method):
    """L = L_mask + L_contrastive (section 5.3). The teacher is there for training only."""

    name = "sseg"
    Settings = SSegSettings
    Protocol = SSegProtocol
    NEEDS_CONCEPTS = False
    ROWS_INDEPENDENT = True
    FROZEN = ("teacher.",)
    TRAINING_ONLY = ("teacher.",)

    def __init__(self, settings, bank=(), training=False):
        super().__init__(settings, bank)
        if training:
            self.teacher = VisionBackbone(**backbones.arguments(settings.backbone, training))
        self.network = MaskNetwork(settings)
        self.text = TextEncoder(None, **vars(settings.text))
        width = settings.joint_width
        self.image_projector = mlp(settings.decoder_width, width, width)
        self.text_projector = mlp(self.text.width, width, width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))       # as a logarithm
        self.normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD)

    # Training

    @staticmethod
    def sample(pair, rng, settings):
        """pixels uint8 (3, size, size), tokens (77,)."""
        pixels = pair.crop(rng, scale=(settings.least_crop, 1.0), flip=FLIPPED)
        return {"pixels": pixels, "tokens": pair.tokens()}

    def features(self, batch):
        """The batch with labels (B, h, w) in 0..K-1, the pseudo-masks of the very crops that the
        student sees (section 4.1). A label that occurs nowhere is no mask."""
        pixels = batch["pixels"]
        patch = self.teacher.patch_size
        if any(pixels.shape[-1] % side for side in (STRIDE, *patch)):
            raise ValueError(f"--image-size {pixels.shape[-1]}: expected a multiple of {STRIDE} "
                             f"and of the teacher's patches of {patch[0]} x {patch[1]} pixels")
        with self.autocast():
            _, tokens, grid = self.teacher(self.teacher.normalise(pixels))          # (B, N, .)
        return {**batch, "labels": kmeans(tokens, self.settings.clusters).unflatten(1, grid)}

    def encode(self, batch):
        """Mask logits of all layers (B, L, Q, H / 4, W / 4), embeddings image and text (B, D)."""
        with self.autocast():
            masks, mask_features = self.network(self.normalise(batch["pixels"]))
            return {"masks": masks, "image": self.embed_image(mask_features),
                    "text": self.embed_text(batch["tokens"])}

    def embed_image(self, mask_features):
        """Mask features (B, Q, d) -> embedding (B, D): their mean, projected, unit-norm."""
        return F.normalize(self.image_projector(mask_features.mean(dim=1)).float(), dim=-1)

    def embed_text(self, tokens):
        """tokens (P, 77) -> embeddings (P, D), unit-norm, from the state at the end token."""
        states, end = self.text.states(tokens)                              # (P, T, text width)
        last = states[torch.arange(len(states), device=states.device), end]
        return F.normalize(self.text_projector(last).float(), dim=-1)

    def losses(self, encoded, batch):
        layers = encoded["masks"].float().unbind(dim=1)                     # L of (B, Q, h, w)
        if self.settings.deep_supervision == "last":
            layers = layers[-1:]
        mask = sum(mask_loss(layer, batch["labels"], self.settings.clusters) for layer in layers)
        if self.settings.deep_supervision == "mean":
            mask = mask / len(layers)
        scale = self.logit_scale.exp()
        # global_loss is the mean of both directions, this the sum (section 5.2)
        contrastive = 2 * global_loss(encoded["image"], encoded["text"], scale)
        return {"loss": mask + contrastive, "mask": mask, "contrastive": contrastive,
                "logit_scale": scale}

    @torch.no_grad()
    def after_step(self, step, steps):
        self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def parameter_groups(self):
        """As `Method.parameter_groups`, but tables of embeddings have no weight decay, either."""
        tables = ("token_embedding.weight", "positional_embedding", "decoder.code",
                  "relative_position_bias_table")
        groups = {True: [], False: []}
        for name, p in self.trained().items():
            groups[p.ndim >= 2 and not name.endswith(tables)].append(p)
        return [{"params": params, "decay": float(decays), "rate": 1.0}
                for decays, params in groups.items()]

    # Inference (section 7)

    @torch.no_grad()
    def masks(self, pixels):
        """Pixels uint8 (B, 3, H, W) -> mask logits (B, Q, H' / 4, W' / 4), features (B, Q, d), and
        the size (H', W') that the masks cover."""
        x = self.normalise(pixels)
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % STRIDE, 0, -H % STRIDE))
        masks, mask_features = self.network(x)
        return masks[:, -1], mask_features, tuple(x.shape[-2:])

    def embed_classes(self, classes, templates=("{}",)):
        def embed(prompts):
            tokens = torch.stack([tokenize("".join(prompt)) for prompt in prompts])
            return self.embed_text(tokens.to(self.device))
        return prompt_ensemble(classes, templates, embed)

    @torch.no_grad()
    def patch_scores(self, pixels, class_embeddings):
        """Each mask's probabilities of the classes, spread over the cells that it covers: (B, C,
        H' / 4, W' / 4), or (B, C, H', W') for the merge "fine"; see `Method`."""
        masks, mask_features, covered = self.masks(pixels)
        if self.protocol.merge == "fine":
            masks = F.interpolate(masks, covered, mode="bilinear", align_corners=False)
        # One projector for the mean of all features in training, and for each feature here
        words = F.normalize(self.image_projector(mask_features), dim=-1)            # (B, Q, D)
        cosines = best_synonym(words, class_embeddings)                             # (B, C, Q)
        classes = (self.logit_scale.exp() * cosines).softmax(dim=1)
        return merge_masks(masks, classes, self.protocol.merge), covered

    @torch.no_grad()
    def image_scores(self, pixels, class_embeddings):
        """Cosine similarities (B, C) of whole images and classes."""
        _, mask_features, _ = self.masks(pixels)
        image = self.embed_image(mask_features)                                     # (B, D)
        return best_synonym(image[:, None], class_embeddings)[..., 0]
