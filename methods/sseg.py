"""S-Seg: masks learned from a frozen network's clusters, names learned from captions.

Paper: Zihang Lai, "Exploring Simple Open-Vocabulary Semantic Segmentation", CVPR 2025, arXiv
2401.12217. Its author published no code. docs/sseg.md has every formula, and says what
is known and what is our choice; "section n" below is a section there. This file is in its order.
The layers of the network are MaskFormer's, in methods/parts/maskformer.py.

    python train.py --method sseg --train-data toy

Letters beside those of model.py:

    Q   queries, masks of an image            P   cells of the mask grid, (H / 4) (W / 4)
    K   clusters of the teacher's tokens      L   layers of the transformer decoder
    d   width of both decoders
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import nn

from concepts import tokenize
from data import random_resized_crop
from machinery.networks import backbones
from methods.parts.clustering import assign, kmeans
from machinery.errors import check_bounds
from machinery.images import to_pixels
from machinery.networks.layers import Normalise
from methods.parts.maskformer import (STRIDE, PixelDecoder, SwinMaps, ToyMaps, TransformerDecoder,
                                  mlp)
from machinery.contract import Method, best_synonym, prompt_ensemble
from machinery.parallel import sum_over_processes
from model import MAX_LOGIT_SCALE, TextEncoder, VisionBackbone, global_loss

KMEANS_STEPS = 10                                   # of Lloyd's algorithm
FLIPPED = 0.5                                       # share of the training crops
FOCAL_WEIGHT = 20.0                                 # in the loss and in the matching (section 5.1)
DICE_WEIGHT = 1.0
MERGES = ("soft", "fine", "hard")                   # see `merge_masks`


# --------------------------------------------------------------------------------------------------
# Pseudo-masks (section 4.1)

def pseudo_masks(tokens, grid, clusters):
    """Each image's patch tokens in K clusters, from centres that lie far apart.

    tokens: (B, N, D), unit-norm. grid: (h, w), N = h * w. Returns labels (B, h, w) int64 in
    0..K-1; a label that occurs nowhere is no mask.
    """
    return kmeans(tokens, clusters, KMEANS_STEPS).unflatten(1, grid)


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
    # Without a number there is no assignment. Any will do: the loss is not finite, either, and
    # train.py skips the step.
    costs = costs.nan_to_num().cpu().numpy()
    pairs = []
    for image, there in enumerate(present.cpu().numpy()):
        targets = there.nonzero()[0]
        queries = assign(costs[image][:, targets].T)
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
    """MaskFormer without its class head: an image -> Q masks, and a feature of each.

    student: timm name of a Swin Transformer, or "toy". feature: where a mask's feature comes from,
    "query", the decoder's output, as published, or "pool", the mean of the cells under the mask,
    which is not the paper's. Others: see --help. options: of the Swin Transformer.
    """

    def __init__(self, student, image_size, queries, width, layers, heads, ffn, dropout, drop_path,
                 feature="query", **options):
        super().__init__()
        self.feature = feature
        self.config = {"student": student, "image_size": image_size, "queries": queries,
                       "width": width, "layers": layers, "heads": heads, "ffn": ffn,
                       "dropout": dropout, "drop_path": drop_path, "feature": feature, **options}
        if student == "toy":
            self.backbone = ToyMaps()
        else:
            self.backbone = SwinMaps(student, image_size, drop_path, **options)
        channels = self.backbone.channels
        self.pixel_decoder = PixelDecoder(channels, width)
        self.decoder = TransformerDecoder(channels[-1], queries, width, layers, heads, ffn,
                                          dropout)
        self.mask_head = mlp(width, width, width, width)
        self.feature_head = nn.Linear(width, width)                         # for the class head

    def forward(self, images):
        """images: normalised (B, 3, H, W), H and W multiples of 32. Returns the mask logits of all
        layers (L, B, Q, H / 4, W / 4) and the mask features (B, Q, d)."""
        maps = self.backbone(images)
        cells = self.pixel_decoder(maps)                                    # (B, d, H/4, W/4)
        outputs = self.decoder(maps[-1])                                    # (L, B, Q, d)
        masks = torch.einsum("lbqd,bdhw->lbqhw", self.mask_head(outputs), cells)
        described = outputs[-1]                                             # (B, Q, d)
        if self.feature == "pool":
            share = masks[-1].detach().sigmoid().flatten(2)                 # (B, Q, P)
            total = share.sum(dim=-1, keepdim=True)
            described = share @ cells.flatten(2).mT / (total + 1e-6)        # (B, Q, d)
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
    share = F.logsigmoid(masks).softmax(dim=1)      # sigmoid / sum of sigmoids, never 0 / 0
    return torch.einsum("bcq,bqhw->bchw", classes, share)


# --------------------------------------------------------------------------------------------------
# The whole

class SSeg(Method):
    """L = L_mask + L_contrastive (section 5.3).

    teacher: frozen `VisionBackbone`; None = a model that only segments. teacher_config: its config.
    network: `MaskNetwork`. text: `TextEncoder` without projection. Others: see --help.
    """

    name = "sseg"
    RECIPE = {
        "backbone": "vit_small_patch8_224.dino",    # the teacher                          paper
        "student": "swin_small_patch4_window7_224",         #                              paper
        "text_width": 256,          #                                                      paper
        "image_size": 224,          # 448 is the faithful one, and four times the work     ours
        "batch": 4096,              #                                                      paper
        "epochs": 30,               #                                                      paper
        "epoch_pairs": 25_914_635,  # CC3M + CC12M + RedCaps                               paper
        "base_rate": 3.125e-5,      # 5e-4 at 4,096                                        paper
        "warmup": 2 / 30,           # two passes                                           ours
        "final_rate": 0.02,         # 1e-5                                                 ours
        "weight_decay": 0.05,       # on matrices; none on vectors and embeddings          ours
        "beta2": 0.999,             #                                                      ours
        "eps": 1e-8,                #                                                      ours
        "clip": 5.0,                #                                                      ours
    }
    TOY = {"backbone": "toy", "student": "toy", "queries": 16, "decoder_width": 32,
           "decoder_layers": 3, "decoder_heads": 4, "decoder_ffn": 128, "dropout": 0.0,
           "joint_width": 64, "text_width": 128, "text_layers": 1, "least_crop": 0.9,
           "batch": 32, "epochs": 10, "base_rate": 0.012, "templates": "plain",
           "output": "runs/sseg-toy"}
    PROTOCOL = {"templates": "photo", "merge": "soft"}
    NEEDS_CONCEPTS = False
    CONFIG = ("backbone", "network", "text", "settings")
    FROZEN = ("teacher.",)

    def __init__(self, teacher, teacher_config, network, text, joint_width=256, clusters=8,
                 deep_supervision="mean", contrastive_weight=1.0):
        super().__init__()
        self.teacher = teacher
        self.teacher_config = teacher_config
        self.network = network
        self.text = text
        self.joint_width = joint_width
        self.image_projector = mlp(network.config["width"], joint_width, joint_width)
        self.text_projector = mlp(text.config["width"], joint_width, joint_width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))       # as a logarithm
        self.clusters = clusters
        self.deep_supervision = deep_supervision
        self.contrastive_weight = contrastive_weight
        # One tensor of pixels feeds both networks
        self.normalise = Normalise(teacher_config["mean"], teacher_config["std"])
        self.merge = "soft"

    @staticmethod
    def add_flags(parser):
        backbones.add_flags(parser, None)
        backbones.add_text_flags(parser)
        add = parser.add_argument_group("S-Seg; --backbone is the frozen teacher").add_argument
        add("--student",
            help="network that is trained: timm name of a Swin Transformer, or toy (default: "
                 "%(default)s)")
        add("--drop-path", type=float, default=0.2,
            help="stochastic depth of its last block, less in those before (default: %(default)s)")
        add("--queries", type=int, default=64, help="masks of an image (default: %(default)s)")
        add("--decoder-width", type=int, default=256,
            help="d, a multiple of 32 (default: %(default)s)")
        add("--decoder-layers", type=int, default=6, help="(default: %(default)s)")
        add("--decoder-heads", type=int, default=8, help="(default: %(default)s)")
        add("--decoder-ffn", type=int, default=2048, help="(default: %(default)s)")
        add("--dropout", type=float, default=0.1,
            help="in the transformer decoder (default: %(default)s)")
        add("--feature", choices=["query", "pool"], default="query",
            help="what describes a mask: its query (paper) or the mean of the cells under it, "
                 "which is not the paper's (default: %(default)s)")
        add("--joint-width", type=int, default=256,
            help="D, of image and text embeddings and of what is before them (default: "
                 "%(default)s)")
        add("--clusters", type=int, default=8,
            help="K, the teacher's pseudo-masks of an image; no more than --queries, because each "
                 "gets its own (default: %(default)s)")
        add("--deep-supervision", choices=["mean", "sum", "last"], default="mean",
            help="mask loss of all decoder layers, averaged or summed, or of the last one "
                 "(default: %(default)s)")
        add("--contrastive-weight", type=float, default=1.0,
            help="of the sum of both directions; 0.5 is CLIP's mean (default: %(default)s)")
        add("--least-crop", type=float, default=0.4,
            help="share of an image's area that a training crop has at least (default: "
                 "%(default)s)")
        add("--merge", choices=MERGES, default="soft",
            help="at test time, from masks to a map: soft, a sum over masks on their grid; fine, a "
                 "sum on pixels; hard, the largest mask (default: %(default)s)")

    @staticmethod
    def check_flags(args):
        backbones.check_flags(args, image_token=False)
        check_bounds(args, {"decoder_width": (32, math.inf), "decoder_layers": (1, math.inf),
                            "decoder_heads": (1, math.inf), "decoder_ffn": (1, math.inf),
                            "joint_width": (1, math.inf), "clusters": (1, args.queries),
                            "dropout": (0, 0.9), "drop_path": (0, 0.9), "least_crop": (0.01, 1),
                            "contrastive_weight": (0, math.inf)})
        if args.image_size % STRIDE:
            raise ValueError(f"--image-size {args.image_size}: expected a multiple of {STRIDE}")
        if args.decoder_width % 32 or args.decoder_width % args.decoder_heads:
            raise ValueError(f"--decoder-width {args.decoder_width}: expected a multiple of 32 and "
                             f"of the {args.decoder_heads} heads")

    @classmethod
    def build(cls, args, bank):
        teacher = VisionBackbone(**backbones.from_flags(args))
        if any(args.image_size % side for side in teacher.patch_size):
            raise ValueError(f"--image-size {args.image_size}: expected a multiple of the "
                             f"teacher's patches of {teacher.patch_size} pixels")
        network = MaskNetwork(args.student, args.image_size, args.queries, args.decoder_width,
                              args.decoder_layers, args.decoder_heads, args.decoder_ffn,
                              args.dropout, args.drop_path, args.feature)
        text = TextEncoder(None, args.text_width, args.text_heads, args.text_layers)
        return cls(teacher, teacher.config, network, text, args.joint_width, args.clusters,
                   args.deep_supervision, args.contrastive_weight)

    @classmethod
    def rebuild(cls, config):
        """Without the teacher, which only training needs."""
        return cls(None, config["backbone"], MaskNetwork(**config["network"]),
                   TextEncoder(**config["text"]), **config["settings"])

    def config(self):
        return {"backbone": self.teacher_config, "network": self.network.config,
                "text": self.text.config,
                "settings": {"joint_width": self.joint_width, "clusters": self.clusters,
                             "deep_supervision": self.deep_supervision,
                             "contrastive_weight": self.contrastive_weight}}

    # Training

    @staticmethod
    def sample(pair, size, rng, least_crop):
        """pixels uint8 (3, size, size), tokens (77,)."""
        image = random_resized_crop(pair.image(), size, rng, scale=(least_crop, 1.0))
        if rng.random() < FLIPPED:
            image = ImageOps.mirror(image)
        return {"pixels": to_pixels(image), "tokens": tokenize(pair.caption)}

    @classmethod
    def sampler(cls, args):
        return partial(cls.sample, size=args.image_size, least_crop=args.least_crop)

    def features(self, batch):
        """The batch with labels (B, h, w), the pseudo-masks of the very crops that the student
        sees."""
        with self.autocast():
            _, tokens, grid = self.teacher(self.normalise(batch["pixels"]))         # (B, N, .)
        return {**batch, "labels": pseudo_masks(tokens, grid, self.clusters)}

    def groups(self):
        """As `Method.groups`, but tables of embeddings have no weight decay, either."""
        tables = ("token_embedding.weight", "positional_embedding", "decoder.code",
                  "relative_position_bias_table")
        decayed = []
        others = []
        for name, p in self.trained().items():
            (others if p.ndim < 2 or name.endswith(tables) else decayed).append(p)
        return [{"params": decayed, "decay": 1.0, "rate": 1.0},
                {"params": others, "decay": 0.0, "rate": 1.0}]

    def embed_image(self, features):
        """Mask features (B, Q, d) -> embedding (B, D): their mean, projected, unit-norm."""
        return F.normalize(self.image_projector(features.mean(dim=1)).float(), dim=-1)

    def embed_text(self, tokens):
        """tokens (P, 77) -> embeddings (P, D), unit-norm, from the state at the end token."""
        states, end = self.text.states(tokens)                              # (P, T, text width)
        last = states[torch.arange(len(states), device=states.device), end]
        return F.normalize(self.text_projector(last).float(), dim=-1)

    def losses(self, batch):
        with self.autocast():
            masks, features = self.network(self.normalise(batch["pixels"]))
            image = self.embed_image(features)                                      # (B, D)
            text = self.embed_text(batch["tokens"])                                 # (B, D)
        with torch.autocast(image.device.type, enabled=False):
            supervised = masks[-1:] if self.deep_supervision == "last" else masks
            mask = sum(mask_loss(layer.float(), batch["labels"], self.clusters)
                       for layer in supervised)
            if self.deep_supervision == "mean":
                mask = mask / len(supervised)
            scale = self.logit_scale.exp()
            contrastive = 2 * global_loss(image, text, scale)       # the sum of both directions
        return {"loss": mask + self.contrastive_weight * contrastive, "mask": mask,
                "contrastive": contrastive, "logit_scale": scale}

    @torch.no_grad()
    def after_step(self, step, steps):
        self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    # Inference (section 7)

    @torch.no_grad()
    def masks(self, pixels):
        """Pixels uint8 (B, 3, H, W) -> mask logits (B, Q, H' / 4, W' / 4), features (B, Q, d), and
        the size (H', W') that the masks cover."""
        x = self.normalise(pixels)
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % STRIDE, 0, -H % STRIDE))
        masks, features = self.network(x)
        return masks[-1], features, tuple(x.shape[-2:])

    def prepare(self, protocol):
        if protocol["merge"] not in MERGES:
            raise ValueError(f"merge {protocol['merge']!r}: expected one of {', '.join(MERGES)}")
        self.merge = protocol["merge"]

    def embed_classes(self, classes, templates=("{}",), **options):
        def embed(prompts):
            tokens = torch.stack([tokenize("".join(prompt)) for prompt in prompts])
            return self.embed_text(tokens.to(self.device))
        return prompt_ensemble(classes, templates, embed)

    @torch.no_grad()
    def patch_scores(self, pixels, class_embeddings):
        """Each mask's probabilities of the classes, spread over the cells that it covers: (B, C,
        H' / 4, W' / 4), or (B, C, H', W') for the merge "fine"; see `Method`."""
        masks, features, covered = self.masks(pixels)
        if self.merge == "fine":
            masks = F.interpolate(masks, covered, mode="bilinear", align_corners=False)
        # One projector for the mean of all features in training, and for each feature here
        words = F.normalize(self.image_projector(features), dim=-1)                 # (B, Q, D)
        cosines = best_synonym(words, class_embeddings)                             # (B, C, Q)
        classes = (self.logit_scale.exp() * cosines).softmax(dim=1)
        return merge_masks(masks, classes, self.merge), covered

    @torch.no_grad()
    def image_scores(self, pixels, class_embeddings):
        """Cosine similarities (B, C) of whole images and classes."""
        _, features = self.network(self.normalise(pixels))
        return best_synonym(self.embed_image(features)[:, None], class_embeddings)[..., 0]
