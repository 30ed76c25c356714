"""SimZSS, the method: a frozen vision backbone, a text encoder that learns to speak its language, two losses.

Paper: "A Simple Framework for Open-Vocabulary Zero-Shot Segmentation", ICLR 2025, arXiv 2406.16085.
The method comes first: its formulas as pure functions, the two sides, the whole. What a program needs beside it comes
after: sums over processes, where backbones come from, saving and loading. `train.py` runs it.

One legend of letters for every shape in this project:

    B   images (= captions) in the batch          T   text tokens of a caption
    N   patch tokens of an image, N = h * w       M   concepts found in a caption, padded with id -1
    D   width of the shared space (= the vision   C   concepts in the bank, or classes at test time
        backbone's width)

The losses are those of the global batch. Where a process group exists, sums and gathers run over all processes and
carry gradient, so every process returns the same loss; the mean of the processes' gradients is the exact gradient.
"""
import hashlib
import json
import math
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from machinery.backbones import _create_denoiser, _create_trunk
from machinery.checkpoint import _fill
from machinery.parallel import distributed, gather_rows, sum_over_processes
from machinery.release import RELEASE_NAMES, _backbone_name, _read_release

DEFAULT_BACKBONE = "vit_base_patch14_reg4_dinov2.lvd142m"
CONTEXT_LENGTH = 77                                 # CLIP's context, start and end token included
TEXT_TOWERS = {384: (384, 6), 1024: (768, 12)}      # D -> (width, heads) of CLIP's towers for ViT-S and ViT-L ...
DEFAULT_TEXT_TOWER = (512, 8)                       # ... and for ViT-B, also used for any other D
MAX_LOGIT_SCALE = 100.0                             # CLIP's bound on the learned 1 / temperature
FORMAT = "simzss-1"
STORED = ("random", "imported")                     # backbone weights that can be had from the checkpoint only


# ---------------------------------------------------------------------------------------------------------------------
# The method, in pure functions of tensors

def concept_embeddings(tokens, spans):
    """Text embedding of each concept occurrence: the sum of its token embeddings (method, section 6).

    tokens: (B, T, D) unit-norm token embeddings. spans: (B, M, 2) int, token positions [start, end) with the
    start-of-text token at 0; an empty span gives zeros. Returns (B, M, D), not normalised.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)                      # (T,)
    inside = (position >= spans[..., :1]) & (position < spans[..., 1:])                 # (B, M, T)
    return inside.to(tokens.dtype) @ tokens                                             # (B, M, D)


def class_weights(concepts, ids, bank_size, over="batch"):
    """One weight per concept of the bank: w_c = normalize(sum of c's occurrences) (paper: h_i = sum_j 1{q_j = i} g(c_j)).

    concepts: (B, M, D). ids: (B, M) int bank ids, -1 = padding. over: "batch", sums run over the global batch, with
    gradient, or "process", over the process's own share of it (the authors' release); counts are always global.
    Returns (weights (C, D) with unit-norm rows, zero rows for absent concepts; counts (C,) occurrences, float).
    """
    found = ids >= 0
    sums = concepts.new_zeros(bank_size, concepts.shape[-1]).index_add(0, ids[found], concepts[found])      # (C, D)
    counts = torch.bincount(ids[found], minlength=bank_size).to(concepts.dtype)                             # (C,)
    return F.normalize(sum_over_processes(sums) if over == "batch" else sums, dim=-1), sum_over_processes(counts)


def similarity_pool(queries, patches, temperature):
    """Visual concept of each query: patches averaged by their similarity to it (method, section 7).

    queries: (B, M, D). patches: (B, N, D), unit-norm. temperature: tau_pool. Returns (B, M, D), unit-norm.
    """
    attention = (queries @ patches.transpose(1, 2) / temperature).softmax(dim=-1)      # (B, M, N)
    return F.normalize(attention @ patches, dim=-1)                                     # (B, M, D)


def global_loss(image, text, logit_scale):
    """L_g, the CLIP loss: each image must find its caption among all captions, and the reverse (method, section 8).

    image, text: (B, D), unit-norm, row i of one belongs to row i of the other. logit_scale: 1 / temperature.
    Every process scores its own rows against the columns of all. Returns the global batch's mean, a scalar.
    """
    all_image, all_text = gather_rows(image), gather_rows(text)                         # (global B, D)
    rank = dist.get_rank() if distributed() else 0
    target = torch.arange(len(image), device=image.device) + rank * len(image)         # own rows' place in all rows
    loss = F.cross_entropy(logit_scale * image @ all_text.T, target, reduction="sum") \
        + F.cross_entropy(logit_scale * text @ all_image.T, target, reduction="sum")
    return sum_over_processes(loss) / (2 * len(all_image))


def concept_loss(visual, ids, weights, counts, temperature, target="concept"):
    """L_l: each visual concept must be classified as its concept, among the concepts present (method, section 8).

    visual: (B, M, D) unit-norm visual concepts. ids: (B, M) bank ids, -1 = padding. weights: (C, D) and
    counts: (C,) of `class_weights`. temperature: tau_local. target: "concept", the occurrence's own id (paper), or
    "argmax", the prediction itself (the authors' release). Returns the mean over the global batch's occurrences,
    a scalar; 0 with zero gradient when there is none.
    """
    if target not in ("concept", "argmax"):
        raise ValueError(f"local target must be 'concept' or 'argmax', found {target!r}")
    present = counts > 0                                                                # (C,)
    found = ids >= 0                                                                    # (B, M)
    logits = visual[found] @ weights[present].T / temperature                           # (occurrences, present)
    column = present.cumsum(0) - 1                                                      # bank id -> column of logits
    truth = column[ids[found]] if target == "concept" or not len(logits) else logits.argmax(dim=-1)
    loss = F.cross_entropy(logits, truth, reduction="sum") if len(logits) else visual.sum() * 0 + weights.sum() * 0
    return sum_over_processes(loss) / counts.sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# Vision side (frozen)

class VisionBackbone(nn.Module):
    """The frozen vision side: any timm vision transformer or CNN by name, or "toy" (method, section 3).

    name: timm model name. pretrained: download timm's weights; False alone means random ones. weights: local file
    instead. mean, std: pixel statistics, 3 floats each; None = the backbone's own. denoiser: file of a `Denoiser` for
    the patch tokens, or True for one that is yet to be filled. options: passed on to timm.
    Raises ValueError for an unknown name or a file that does not fit, FileNotFoundError for a missing download.
    """

    def __init__(self, name=DEFAULT_BACKBONE, pretrained=True, weights=None, mean=None, std=None, denoiser=None,
                 **options):
        super().__init__()
        source = str(weights) if weights else "pretrained" if pretrained or name == "toy" else "random"
        self.trunk = _create_trunk(name, source, options)
        self.width = self.trunk.num_features                                            # D
        self.prefix_tokens = getattr(self.trunk, "num_prefix_tokens", 0)
        self.has_class_token = name == "toy" or getattr(self.trunk, "cls_token", None) is not None
        if hasattr(self.trunk, "num_prefix_tokens"):
            patch = getattr(self.trunk, "patch_size", None) or self.trunk.patch_embed.patch_size
        else:
            patch = (self.trunk.feature_info[-1]["reduction"],) * 2
        self.patch_size = tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)
        statistics = self.trunk.pretrained_cfg
        mean, std = mean or statistics["mean"], std or statistics["std"]
        self.denoiser = _create_denoiser(self.width, denoiser) if denoiser else None
        self.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        if weights:                                 # to be found again from any folder
            source = str(Path(weights).resolve())
        self.config = {"name": name, "weights": source, "options": options, "mean": list(mean), "std": list(std),
                       "denoiser": bool(denoiser), "sha256": self.sha256()}

    def sha256(self):
        """One hash of all names and values, trunk and denoiser, to know a backbone again."""
        digest, state = hashlib.sha256(), self.state_dict()
        for key in sorted(state):
            digest.update(key.removeprefix("trunk.").encode())
            digest.update(state[key].cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def train(self, mode=True):
        return super().train(False)                 # frozen: no dropout, no batch statistics, ever

    def normalise(self, pixels):
        """uint8 (..., 3, H, W) -> float32, with the statistics kept in the checkpoint."""
        return (pixels.float() / 255 - self.mean) / self.std

    @torch.no_grad()
    def forward(self, images):
        """images: normalised (B, 3, H, W), any H and W: padded with zeros at the right and the bottom to whole patches.

        Returns class token (B, D), patch tokens (B, N, D), both float32 and unit-norm, and their grid (h, w). The
        last row and column of patches may reach beyond the image; who enlarges the grid cuts that away.
        """
        (ph, pw), (H, W) = self.patch_size, images.shape[-2:]
        images = F.pad(images, (0, -W % pw, 0, -H % ph))
        try:
            features = self.trunk.forward_features(images)
        except AssertionError as error:             # a transformer with a position table of one size
            raise ValueError(f"the backbone {self.config['name']} takes no images of {H} x {W}: {error}") from None
        if features.ndim == 4:                                                          # CNN: (B, D, h, w) ...
            if features.shape[1] != self.width:                                         # ... or (B, h, w, D)
                features = features.permute(0, 3, 1, 2)
            patches = features.flatten(2).transpose(1, 2)                               # (B, N, D)
        else:                                                                           # (B, prefix + N, D)
            patches = features[:, self.prefix_tokens:]                                  # class and registers dropped
        class_token = features[:, 0] if self.has_class_token else patches.mean(dim=1)   # (B, D)
        grid = (images.shape[-2] // ph, images.shape[-1] // pw)
        if patches.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"the backbone {self.config['name']} gives {patches.shape[1]} patches for {H} x {W} pixels, "
                             f"expected {grid[0]} x {grid[1]}; its patches are no regular grid")
        if self.denoiser:
            patches = self.denoiser(patches, grid)                                      # the class token stays as it is
        return F.normalize(class_token.float(), dim=-1), F.normalize(patches.float(), dim=-1), grid


# ---------------------------------------------------------------------------------------------------------------------
# Text side (trained from scratch)

class TextEncoder(nn.Module):
    """CLIP's causal text transformer, from random initialisation (method, section 4).

    output_dim: D. width, heads: CLIP's for that D if None. Its parameters are open_clip's, under `tower.`.
    """

    def __init__(self, output_dim, width=None, heads=None, layers=12):
        super().__init__()
        from open_clip.transformer import TextTransformer
        default_width, default_heads = TEXT_TOWERS.get(output_dim, DEFAULT_TEXT_TOWER)
        width = width or default_width
        heads = heads or (default_heads if width == default_width else max(1, width // 64))
        if width % heads:
            raise ValueError(f"the text encoder's width {width} must be a multiple of its {heads} heads")
        self.config = {"output_dim": output_dim, "width": width, "heads": heads, "layers": layers}
        self.tower = TextTransformer(CONTEXT_LENGTH, width=width, heads=heads, layers=layers, output_dim=output_dim)

    def forward(self, tokens, embedded=None):
        """tokens: (B, T) int64, zeros after the end token, which has the highest id of all. embedded: (B, T, width) of the
        tower's token embedding, None = looked up here.

        Cut to the longest caption first: attention is causal, so no state depends on the padding behind it.
        Returns caption (B, D), the state at the end token, and token embeddings (B, T of the longest, D), both
        float32 and unit-norm. Rows behind a caption's end hold padding and mean nothing.
        """
        end = tokens.argmax(dim=-1)                                                     # (B,)
        tokens = tokens[:, : int(end.max()) + 1]                                        # (B, T)
        T, tower = tokens.shape[1], self.tower
        embedded = tower.token_embedding(tokens) if embedded is None else embedded[:, :T]
        x = embedded + tower.positional_embedding[:T]                                   # (B, T, width)
        x = tower.transformer(x, attn_mask=tower.attn_mask[:T, :T])
        x = tower.ln_final(x) @ tower.text_projection                                   # (B, T, D)
        x = F.normalize(x.float(), dim=-1)
        return x[torch.arange(len(x), device=x.device), end], x


def by_length(tokens, group):
    """Row numbers of tokens (B, T), shortest caption first, in tensors of up to group: alike lengths need no padding."""
    return tokens.argmax(dim=-1).argsort(stable=True).split(group)


# ---------------------------------------------------------------------------------------------------------------------
# The whole

class SimZSS(nn.Module):
    """Both sides and both losses: L = L_g + lambda * L_l, lambda = 0 is LiT (method, section 8).

    bank: names of the C concepts. weight: lambda. pool_temperature: tau_pool. local_temperature: tau_local.
    local_target: see `concept_loss`. pool_query: what patches are pooled by, "class", the concept's class weight
    (the authors' release), or "caption", the occurrence's own embedding, normalised (paper). weights_over: see
    `class_weights`.
    """

    def __init__(self, backbone, text, bank=(), weight=0.05, pool_temperature=0.1, local_temperature=0.07,
                 local_target="concept", pool_query="class", weights_over="batch"):
        if pool_query not in ("class", "caption"):
            raise ValueError(f"pool query must be 'class' or 'caption', found {pool_query!r}")
        if weights_over not in ("batch", "process"):
            raise ValueError(f"class weights are over 'batch' or 'process', found {weights_over!r}")
        super().__init__()
        self.backbone, self.text, self.bank = backbone, text, list(bank)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))               # as a logarithm, like CLIP's
        self.weight, self.local_target = weight, local_target
        self.pool_query, self.weights_over = pool_query, weights_over
        self.pool_temperature, self.local_temperature = pool_temperature, local_temperature
        self.method = {"weight": weight, "pool_temperature": pool_temperature, "local_temperature": local_temperature,
                       "local_target": local_target, "pool_query": pool_query, "weights_over": weights_over}

    def trained(self):
        """Names and parameters of what is trained: the text encoder and the logit scale."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("backbone.")}

    def forward(self, images, tokens, ids, spans):
        """images: normalised (B, 3, H, W). tokens: (B, T). ids: (B, M). spans: (B, M, 2). Returns `losses`' dict."""
        class_token, patches, _ = self.backbone(images)                                 # (B, D), (B, N, D)
        caption, concepts = self.encode_text(tokens, spans)                             # (B, D), (B, M, D)
        return self.losses(class_token, patches, caption, concepts, ids)

    def encode_text(self, tokens, spans, group=None, embedded=None):
        """tokens: (B, T). spans: (B, M, 2). group: captions encoded at a time, see `by_length`; None = all. embedded: see
        `TextEncoder`.

        Returns captions (B, D) and concept occurrences (B, M, D), both float32, the same whatever the group.
        """
        if group and group < len(tokens):
            groups = by_length(tokens, group)
            embedded = self.text.tower.token_embedding(tokens)      # once: its gradient is as large as the vocabulary
            parts = zip(*[self.encode_text(tokens[rows], spans[rows], None, embedded[rows]) for rows in groups])
            back = torch.cat(groups).argsort()
            return tuple(torch.cat(part)[back] for part in parts)
        caption, token_embeddings = self.text(tokens, embedded)                         # (B, D), (B, T, D)
        with torch.autocast(caption.device.type, enabled=False):
            return caption, concept_embeddings(token_embeddings, spans)

    def losses(self, class_token, patches, caption, concepts, ids):
        """float32 embeddings -> dict of scalars: loss = global + lambda * local, and the number of occurrences.

        class_token, caption: (B, D). patches: (B, N, D). concepts: (B, M, D) of `encode_text`. ids: (B, M).
        """
        with torch.autocast(caption.device.type, enabled=False):
            scale = self.logit_scale.exp()                             # train.py keeps it at or below 100
            loss_global = global_loss(class_token, caption, scale)
            weights, counts = class_weights(concepts, ids, len(self.bank), self.weights_over)     # (C, D), (C,)
            queries = weights[ids.clamp(min=0)] if self.pool_query == "class" else F.normalize(concepts, dim=-1)
            visual = similarity_pool(queries, patches, self.pool_temperature)           # (B, M, D)
            loss_local = concept_loss(visual, ids, weights, counts, self.local_temperature, self.local_target)
        return {"loss": loss_global + self.weight * loss_local, "global": loss_global, "local": loss_local,
                "logit_scale": scale, "concepts": counts.sum(), "present": (counts > 0).sum()}

    # Inference: all that segment.py and eval.py ask of a model

    @torch.no_grad()
    def embed_classes(self, classes, templates=("{}",), pooling="caption", batch=256):
        """Class names -> embeddings.

        classes: C names, or C lists of names (synonyms). templates: prompts with one {} each. pooling: "caption", the
        state at the prompt's end token, or "concept", the sum of the name's own token embeddings, as class weights are
        made in training. Each prompt's embedding is normalised, averaged over the templates, normalised again.
        Returns (C, S, D), S the most names of any class; classes with fewer repeat their first name, which changes no
        maximum.
        """
        from open_clip import tokenize
        classes = [[names] if isinstance(names, str) else list(names) for names in classes]
        names = [name for synonyms in classes for name in synonyms]
        filled = [(template.partition("{}")[0], name, template.replace("{}", name))
                  for name in names for template in templates]
        embeddings = []
        for i in range(0, len(filled), batch):
            before, until, prompts = (tokenize(texts, CONTEXT_LENGTH).to(self.logit_scale.device) for texts in zip(
                *[(prefix, prefix + name, prompt) for prefix, name, prompt in filled[i:i + batch]]))
            caption, tokens = self.text(prompts)                                        # (P, D), (P, T, D)
            if pooling == "concept":                # the end token's place tells how many tokens come before it
                spans = torch.stack([before.argmax(dim=-1), until.argmax(dim=-1)], dim=-1)              # (P, 2)
                caption = F.normalize(concept_embeddings(tokens, spans[:, None])[:, 0], dim=-1)
            embeddings.append(caption)
        mean = F.normalize(torch.cat(embeddings).view(len(names), len(templates), -1).mean(dim=1), dim=-1)
        parts = mean.split([len(synonyms) for synonyms in classes])
        most = max(map(len, parts))
        return torch.stack([torch.cat([part, part[:1].expand(most - len(part), -1)]) for part in parts])

    @torch.no_grad()
    def patch_scores(self, pixels, class_embeddings):
        """pixels: uint8 (B, 3, H, W). class_embeddings: (C, D), or (C, S, D) of which the best counts.

        Returns cosine similarities (B, C, h, w) and the pixel size (H', W') that the grid covers, H' >= H, W' >= W.
        """
        _, patches, (h, w) = self.backbone(self.backbone.normalise(pixels))             # (B, N, D)
        embeddings = class_embeddings if class_embeddings.ndim == 3 else class_embeddings[:, None]
        scores = torch.einsum("bnd,csd->bcsn", patches, embeddings).amax(dim=2)         # (B, C, N)
        return scores.unflatten(-1, (h, w)), (h * self.backbone.patch_size[0], w * self.backbone.patch_size[1])

    @torch.no_grad()
    def image_scores(self, pixels, class_embeddings):
        """As `patch_scores` for whole images, by the class token: cosine similarities (B, C)."""
        class_token = self.backbone(self.backbone.normalise(pixels))[0]                 # (B, D)
        embeddings = class_embeddings if class_embeddings.ndim == 3 else class_embeddings[:, None]
        return torch.einsum("bd,csd->bcs", class_token, embeddings).amax(dim=2)         # (B, C)


# ---------------------------------------------------------------------------------------------------------------------
# Sums over processes, with gradient: the way back of a sum is a sum. So every process gets the gradient of all processes'
# losses added up. Without a process group they are the identity.


# ---------------------------------------------------------------------------------------------------------------------
# Where backbones come from


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading: one safetensors file, its settings as JSON in the header, no pickle

def save_model(path, model, config):
    """Write what was trained, the frozen backbone's name and hash, and config (anything JSON) to one file, atomically.

    A random or imported backbone and any denoiser are written too, for there is no other way to have them again.
    """
    tensors = {name: value.detach().cpu().contiguous().clone()                          # tied ones may not share memory
               for name, value in _checkpointed(model, model.backbone.config["weights"]).items()}
    settings = {"format": FORMAT, "backbone": model.backbone.config, "text": model.text.config,
                "method": model.method, "bank": model.bank, "training": config}
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        safetensors.torch.save_file(tensors, partial, metadata={"simzss": json.dumps(settings)})
    except safetensors.SafetensorError as error:    # a full disk, for one
        raise OSError(f"{path} could not be written: {error}") from None
    os.replace(partial, path)                       # a crash leaves the old file or the new one, never half of one


def _checkpointed(model, weights):
    """Names and tensors of what a checkpoint holds. weights: where the backbone's come from, see its config."""
    whole = "backbone." if weights in STORED else "backbone.denoiser."
    return {**model.trained(), **{key: value for key, value in model.state_dict().items() if key.startswith(whole)}}


def load_model(path, device="cpu", backbone_weights=None, backbone=None):
    """Rebuild a saved model from its file (or the folder that holds `model.safetensors`), ready for inference.

    The authors' checkpoints (PyTorch files) are read, too. backbone_weights: local file to take the backbone from, if
    not where training found it. backbone: timm name of the backbone in an authors' checkpoint, if its tensors do not
    tell. Raises FileNotFoundError for a missing file, ValueError for a file that is no checkpoint, is cut short, or
    whose backbone is another one.
    """
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train.py writes one, or name one with --checkpoint")
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":           # PyTorch writes zip archives
            if backbone_weights:
                raise ValueError(f"{path} holds its backbone's weights; leave --backbone-weights out")
            return _import_release(path, backbone).to(device).eval()
    if backbone:
        raise ValueError(f"{path} names its backbone itself; backbone={backbone!r} is for the authors' checkpoints")
    try:
        with safetensors.safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["simzss"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no SimZSS checkpoint, or is cut short ({type(error).__name__}: {error})") from None
    if settings.get("format") != FORMAT:
        raise ValueError(f"{path} is no SimZSS checkpoint of format {FORMAT!r}, found {settings.get('format')!r}")

    saved = settings["backbone"]
    source = backbone_weights or saved["weights"]
    vision = VisionBackbone(saved["name"], pretrained=source == "pretrained", mean=saved["mean"], std=saved["std"],
                            weights=None if source in ("pretrained", *STORED) else source,
                            denoiser=saved.get("denoiser"), **saved["options"])
    model = SimZSS(vision, TextEncoder(**settings["text"]), settings["bank"], **settings["method"])
    _fill(_checkpointed(model, saved["weights"]), tensors, f"{path} does not hold the tensors of its own settings")
    vision.config["sha256"] = vision.sha256()
    if saved["weights"] in STORED:
        vision.config["weights"] = saved["weights"]
    if vision.config["sha256"] != saved["sha256"]:
        raise ValueError(f"the backbone's weights ({source}) are not those that {path} was trained with; pass "
                         "--backbone-weights FILE with the right ones")
    model.config = settings
    return model.to(device).eval()


# ---------------------------------------------------------------------------------------------------------------------
# The authors' checkpoints (method, section 11)


def _import_release(path, backbone=None):
    """The model in an authors' checkpoint, backbone and denoiser included; its settings are the release's.

    Every tensor is used but those of RELEASE_BUFFERS. The file does not name the concepts: the bank is empty.
    """
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    state = _read_release(path, "--checkpoint")
    name = backbone or _backbone_name(state, path)
    table, patch = (state.get(f"visual.vit.model.{key}") for key in ("pos_embed", "patch_embed.proj.weight"))
    size = {}                                       # of the images that the position table (1, N, D) was made for
    if table is not None and table.ndim == 3 and patch is not None:
        size = {"img_size": math.isqrt(table.shape[1]) * patch.shape[-1]}
    vision = VisionBackbone(name, pretrained=False, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD, **size,
                            denoiser=any(key.startswith(("visual.pos_embed", "visual.denoiser.")) for key in state))
    positions = state.get("text.positional_embedding", torch.empty(0))                  # (77, width)
    layers = len({key.split(".")[3] for key in state if key.startswith("text.transformer.resblocks.")})
    text = TextEncoder(vision.width, positions.shape[-1] or None, layers=layers or 1)
    model = SimZSS(vision, text, local_target="argmax", weights_over="process")
    expected = {}
    for key, value in model.state_dict().items():
        for ours, theirs in RELEASE_NAMES.items():
            key = key.replace(ours, theirs)
        expected[key] = value
    _fill(expected, state, f"{path} is no checkpoint of the authors with the backbone {name}")
    vision.config.update(weights="imported", sha256=vision.sha256())
    model.config = {"format": FORMAT, "backbone": vision.config, "text": text.config, "method": model.method,
                    "bank": model.bank, "training": {"imported": str(path)}}
    return model


