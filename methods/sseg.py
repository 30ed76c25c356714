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
from machinery.networks.layers import IMAGENET_MEAN, IMAGENET_STD, GlobalBatchNorm, Normalise
from machinery.parallel import sum_over_processes
from machinery.settings import setting
from machinery.tokenizer import tokenize
from methods.parts.clustering import kmeans
from methods.parts.maskformer import (STRIDE, PixelDecoder, SwinMaps, ToyMaps, TransformerDecoder,
                                      mlp)
from model import (MAX_LOGIT_SCALE, BackboneSettings, TextEncoder, TextSettings, VisionBackbone,
                   best_synonym, global_loss, prompt_ensemble)

FLIPPED = 0.5                                       # of the training crops
FOCAL_WEIGHT = 20.0                                 # in the loss and in the matching (section 1)
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
        "query", "what describes a mask: its query (paper); or, which is not the paper's, the mean "
        "of what is under it: pool, of the mask grid's cells; local, of a local map",
        choices=("query", "pool", "local"))
    local_map: str = setting(
        "teacher", "map of the feature local: the frozen teacher's patch tokens, or the map of "
        "stride 8 of the student", choices=("teacher", "student"), flag=False)
    batch_norm: bool = setting(
        False, "BatchNorm in both projectors, which is not the paper's", flag=False)
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
# The mask loss (section 1)

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
# MaskFormer without its class head (sections 1 and 2)

def means_under(masks, map_):
    """Mean of a map under each mask, without gradient through the masks.

    masks: logits (B, Q, h, w). map_: (B, c, h', w') of the same image. Returns (B, Q, c).
    """
    inside = masks.detach().sigmoid().flatten(2)                            # (B, Q, P)
    map_ = F.interpolate(map_.float(), masks.shape[-2:], mode="nearest").flatten(2)
    return inside @ map_.mT / (inside.sum(dim=-1, keepdim=True) + 1e-6)     # (B, Q, c)


class MaskNetwork(nn.Module):
    """An image -> Q masks, and a feature of each.

    settings: `SSegSettings`. teacher_width: channels of the teacher's tokens.
    """

    def __init__(self, settings, teacher_width=None):
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
        described = teacher_width or (channels[1] if settings.feature == "local" else width)
        self.feature_head = nn.Linear(described, width)             # in place of the class head
        self.feature = settings.feature

    def forward(self, images, teacher_map=None):
        """images: normalised (B, 3, H, W), H and W multiples of 32. teacher_map: the teacher's
        tokens (B, c, h, w), if they are the local map. Returns the mask logits of all layers
        (B, L, Q, H / 4, W / 4) and the mask features (B, Q, d)."""
        maps = self.backbone(images)
        cells = self.pixel_decoder(maps)                                    # (B, d, H/4, W/4)
        outputs = self.decoder(maps[-1])                                    # (L, B, Q, d)
        masks = torch.einsum("lbqd,bdhw->blqhw", self.mask_head(outputs), cells)
        if self.feature == "query":
            described = outputs[-1]                                         # (B, Q, d)
        elif self.feature == "pool":
            described = means_under(masks[:, -1], cells)                    # (B, Q, d)
        else:
            local_map = maps[1] if teacher_map is None else teacher_map
            described = means_under(masks[:, -1], local_map)                # (B, Q, c)
        return masks, self.feature_head(described)


# --------------------------------------------------------------------------------------------------
# To the joint space (section 1)

def projector(width, output, batch_norm):
    """Two linear layers with ReLU, and perhaps BatchNorm, between them."""
    layers = mlp(width, output, output)
    if batch_norm:
        layers.insert(1, GlobalBatchNorm(output))
    return layers


def project(projector, x):
    """(..., width) -> (..., D), unit-norm."""
    return F.normalize(projector(x.float()), dim=-1)


# --------------------------------------------------------------------------------------------------
# From named masks to a map (section 1)

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
    """L = L_mask + L_contrastive (section 1). The teacher is there for training only, unless the
    feature local takes its tokens (section 6)."""

    name = "sseg"
    Settings = SSegSettings
    Protocol = SSegProtocol
    NEEDS_CONCEPTS = False
    ROWS_INDEPENDENT = True
    FROZEN = ("teacher.",)
    TRAINING_ONLY = ("teacher.",)

    def __init__(self, settings, bank=(), training=False):
        super().__init__(settings, bank)
        self.keeps_teacher = settings.feature == "local" and settings.local_map == "teacher"
        if training or self.keeps_teacher:
            self.teacher = VisionBackbone(**backbones.arguments(settings.backbone, training))
        if self.keeps_teacher:
            self.TRAINING_ONLY = ()
            if settings.backbone.weights in backbones.STORED:
                self.FROZEN = ()    # random weights exist nowhere else: a checkpoint holds them
        self.network = MaskNetwork(settings, self.teacher.width if self.keeps_teacher else None)
        self.text = TextEncoder(None, **vars(settings.text))
        width = settings.joint_width
        self.image_projector = projector(settings.decoder_width, width, settings.batch_norm)
        self.text_projector = projector(self.text.width, width, settings.batch_norm)
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
        student sees (section 1). A label that occurs nowhere is no mask."""
        pixels = batch["pixels"]
        patch = self.teacher.patch_size
        if any(pixels.shape[-1] % side for side in (STRIDE, *patch)):
            raise ValueError(f"--image-size {pixels.shape[-1]}: expected a multiple of {STRIDE} "
                             f"and of the teacher's patches of {patch[0]} x {patch[1]} pixels")
        with self.autocast():
            _, tokens, grid = self.teacher(self.teacher.normalise(pixels))          # (B, N, .)
        batch = {**batch, "labels": kmeans(tokens, self.settings.clusters).unflatten(1, grid)}
        if self.keeps_teacher:
            batch["teacher_map"] = tokens.mT.unflatten(2, grid)                     # (B, c, h, w)
        return batch

    def encode(self, batch):
        """Mask logits of all layers (B, L, Q, H / 4, W / 4), image (B, d), the mean of the mask
        features, and text (B, text width), what the captions come to."""
        with self.autocast():
            masks, mask_features = self.network(self.normalise(batch["pixels"]),
                                                batch.get("teacher_map"))
            return {"masks": masks, "image": mask_features.mean(dim=1),
                    "text": self.read_texts(batch["tokens"])}

    def read_texts(self, tokens):
        """tokens (B, 77) of B texts -> states at the end token (B, text width)."""
        states, end = self.text.states(tokens)                              # (B, T, text width)
        return states[torch.arange(len(states), device=states.device), end]

    def losses(self, encoded, batch):
        layers = encoded["masks"].float().unbind(dim=1)                     # L of (B, Q, h, w)
        if self.settings.deep_supervision == "last":
            layers = layers[-1:]
        mask = sum(mask_loss(layer, batch["labels"], self.settings.clusters) for layer in layers)
        if self.settings.deep_supervision == "mean":
            mask = mask / len(layers)
        scale = self.logit_scale.exp()
        image = project(self.image_projector, encoded["image"])                     # (B, D)
        text = project(self.text_projector, encoded["text"])
        # global_loss is the mean of both directions, this the sum (section 1)
        contrastive = 2 * global_loss(image, text, scale)
        return {"loss": mask + contrastive, "mask": mask, "contrastive": contrastive,
                "logit_scale": scale}

    @torch.no_grad()
    def after_step(self, step, steps):
        self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def factors(self, name, parameter):
        """As of `Method`, but tables of embeddings have no weight decay, either."""
        tables = ("token_embedding.weight", "positional_embedding", "decoder.code",
                  "relative_position_bias_table")
        return float(parameter.ndim >= 2 and not name.endswith(tables)), 1.0

    # Inference (section 1)

    @torch.no_grad()
    def masks(self, pixels):
        """Pixels uint8 (B, 3, H, W) -> mask logits (B, Q, H' / 4, W' / 4), features (B, Q, d), and
        the size (H', W') that the masks cover."""
        H, W = pixels.shape[-2:]
        patch = self.teacher.patch_size if self.keeps_teacher else ()
        stride = math.lcm(STRIDE, *patch)           # else the teacher would pad once more
        border = (0, -W % stride, 0, -H % stride)
        x = F.pad(self.normalise(pixels), border)
        teacher_map = None
        if self.keeps_teacher:
            _, tokens, grid = self.teacher(F.pad(self.teacher.normalise(pixels), border))
            teacher_map = tokens.mT.unflatten(2, grid)                              # (B, c, h, w)
        masks, mask_features = self.network(x, teacher_map)
        return masks[:, -1], mask_features, tuple(x.shape[-2:])

    def embed_classes(self, classes, templates=("{}",)):
        def embed(prompts):
            tokens = torch.stack([tokenize("".join(prompt)) for prompt in prompts])
            return project(self.text_projector, self.read_texts(tokens.to(self.device)))
        return prompt_ensemble(classes, templates, embed)

    @torch.no_grad()
    def patch_scores(self, pixels, class_embeddings):
        """Each mask's probabilities of the classes, spread over the cells that it covers: (B, C,
        H' / 4, W' / 4), or (B, C, H', W') for the merge "fine"; see `Method`."""
        masks, mask_features, covered = self.masks(pixels)
        if self.protocol.merge == "fine":
            masks = F.interpolate(masks, covered, mode="bilinear", align_corners=False)
        # One projector for the mean of all features in training, and for each feature here
        words = project(self.image_projector, mask_features)                        # (B, Q, D)
        cosines = best_synonym(words, class_embeddings)                             # (B, C, Q)
        classes = (self.logit_scale.exp() * cosines).softmax(dim=1)
        return merge_masks(masks, classes, self.protocol.merge), covered

    @torch.no_grad()
    def image_scores(self, pixels, class_embeddings):
        """Cosine similarities (B, C) of whole images and classes."""
        _, mask_features, _ = self.masks(pixels)
        image = project(self.image_projector, mask_features.mean(dim=1))            # (B, D)
        return best_synonym(image[:, None], class_embeddings)[..., 0]
