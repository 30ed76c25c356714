"""SimZSS: a frozen vision backbone, a text encoder that is trained from scratch, two losses.

Paper: "A Simple Framework for Open-Vocabulary Zero-Shot Segmentation", ICLR 2025, arXiv 2406.16085.
docs/method.md explains every formula; "section n" below is a section of that page. The formulas
come first, as functions of tensors, then both towers, then the whole.

Letters of shapes:

    B   images (= captions) of this process       T   text tokens of the longest caption
    N   patch tokens of an image, N = h * w       M   concepts found in a caption, padded with -1
    D   width of the shared space                 C   concepts in the bank, or classes at test time
    P   prompts                                   S   names (synonyms) of a class

D is the width of the vision backbone: the text encoder projects into its space.

"paper" and "release" in comments say where a choice comes from: the text, or the authors' code.
"global" loss: of whole images; "local" loss: of regions. Both are of the global batch, that of all
processes: sums and gathers run over all processes and carry gradient (machinery/parallel.py).
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from machinery.contract import Method, Protocol
from machinery.files import tensors_sha256
from machinery.networks import backbones
from machinery.networks.layers import Normalise
from machinery.parallel import gather_rows, rank, sum_over_processes
from machinery.settings import as_mapping, setting
from machinery.tokenizer import CONTEXT_LENGTH, tokenize

TEXT_TOWERS = {384: (384, 6), 1024: (768, 12)}      # D -> (width, heads) of CLIP's tower
DEFAULT_TEXT_TOWER = (512, 8)                       # for ViT-B's D, 768, and any other
MAX_LOGIT_SCALE = 100.0                             # CLIP's bound on the learned 1 / temperature
LONGER = 1.2                                        # longest / shortest caption of a group, and
GROUP = 4096                                        # captions of a group, at most: encoded together


# --------------------------------------------------------------------------------------------------
# The formulas

def concept_embeddings(tokens, spans):
    """g(c): text embedding of each concept occurrence, the sum of its token embeddings (section 6).

    tokens: (B, T, D) unit-norm token embeddings, not ids. spans: (B, M, 2) int, token positions
    [start, end), the start token at 0; padding, (-1, -1), gives zeros. Returns (B, M, D), not
    normalised: an occurrence of more tokens weighs more in w_c.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)                  # (T,)
    inside = (position >= spans[..., :1]) & (position < spans[..., 1:])             # (B, M, T)
    return inside.to(tokens.dtype) @ tokens                                         # (B, M, D)


def only_present(ids, bank_size):
    """Bank ids (B, M) -> places (B, M) among the concepts that occur in the global batch, -1 stays;
    and how many places there are, at least 1. Of a large bank nearly all are absent, and sums over
    it would take longer than all else in the losses."""
    counts = sum_over_processes(torch.bincount(ids[ids >= 0], minlength=bank_size))     # (C,)
    place = (counts > 0).cumsum(0) - 1                                                  # (C,)
    return torch.where(ids >= 0, place[ids], -1), max(1, int(place[-1]) + 1)


def class_weights(concepts, ids, bank_size):
    """w_c = normalize(sum of the occurrences of concept c), one weight per concept (section 6).

    The weights are the classifier of the local loss. They are no parameters: a batch has its own.
    concepts: (B, M, D). ids: (B, M) int bank ids, -1 = padding. Returns weights (C, D), unit-norm
    rows, zero for absent concepts; and how often each concept occurs, counts (C,), float.
    """
    found = ids >= 0
    sums = concepts.new_zeros(bank_size, concepts.shape[-1])                        # (C, D)
    sums = sums.index_add(0, ids[found], concepts[found])
    counts = torch.bincount(ids[found], minlength=bank_size).to(concepts.dtype)     # (C,)
    return F.normalize(sum_over_processes(sums), dim=-1), sum_over_processes(counts)


def similarity_pool(queries, patches, temperature):
    """u: visual concept of each query, patches averaged by their similarity to it (section 7).

    queries: (B, M, D). patches: (B, N, D), unit-norm. temperature: tau_pool. Returns (B, M, D),
    unit-norm.
    """
    attention = (queries @ patches.transpose(1, 2) / temperature).softmax(dim=-1)   # (B, M, N)
    return F.normalize(attention @ patches, dim=-1)                                 # (B, M, D)


def global_loss(image, text, logit_scale):
    """L_g: the CLIP loss. Each image must find its caption among all, and the reverse (section 8).

    image, text: (B, D), unit-norm, row i of one belongs to row i of the other. logit_scale:
    1 / temperature. Returns the mean over the global batch, a scalar.
    """
    all_image = gather_rows(image)                                                  # (global B, D)
    all_text = gather_rows(text)
    target = torch.arange(len(image), device=image.device) + rank() * len(image)    # (B,)
    image_to_text = F.cross_entropy(logit_scale * image @ all_text.T, target, reduction="sum")
    text_to_image = F.cross_entropy(logit_scale * text @ all_image.T, target, reduction="sum")
    return sum_over_processes(image_to_text + text_to_image) / (2 * len(all_image))


def concept_loss(visual, ids, weights, counts, temperature, target="concept"):
    """L_l: classify each visual concept among the concepts of this batch (section 8).

    visual: (B, M, D), unit-norm. ids: (B, M) bank ids, -1 = padding. weights (C, D), counts (C,):
    of `class_weights`. temperature: tau_local. target: "concept", the occurrence's own id (paper),
    or "argmax", the prediction itself (release). Returns the mean over all occurrences of the
    global batch, a scalar; 0 with zero gradient if there is none.
    """
    if target not in ("concept", "argmax"):
        raise ValueError(f"local target must be 'concept' or 'argmax', found {target!r}")
    present = counts > 0                                                            # (C,)
    found = ids >= 0                                                                # (B, M)
    logits = visual[found] @ weights[present].T / temperature       # (occurrences, present)
    column = present.cumsum(0) - 1                                  # bank id -> column of logits
    truth = column[ids[found]]
    if target == "argmax" and len(logits):
        truth = logits.argmax(dim=-1)
    # Without occurrences the loss is 0 but stays connected to the inputs: in backward the other
    # processes wait for this one to take part in the all-reduce.
    loss = F.cross_entropy(logits, truth, reduction="sum")
    return sum_over_processes(loss) / counts.sum().clamp(min=1)


def best_synonym(features, class_embeddings):
    """Inference: similarity of features to the best name of each class (section 10).

    features: (B, N, D), or any number of dimensions in place of N, which stay. class_embeddings:
    (C, D), or (C, S, D) with S names of each class. Returns (B, C, N), also under autocast
    float32: bfloat16 knows no difference below 0.002 in a cosine of 0.3.
    """
    if class_embeddings.ndim == 2:
        class_embeddings = class_embeddings[:, None]                                # (C, 1, D)
    with torch.autocast(features.device.type, enabled=False):
        products = torch.einsum("b...d,csd->bcs...", features.to(class_embeddings.dtype),
                                class_embeddings)
    return products.amax(dim=2)


@torch.no_grad()
def prompt_ensemble(classes, templates, embed, normalise_each=True, batch=256):
    """Embeddings of class names (C, S, D): the mean over all prompts of a name, unit-norm.

    classes: C names, or C lists of names (synonyms).
    templates: prompts with one {} each.
    embed: function from a list of P (text before, name, text after) to (P, D).
    normalise_each: whether prompts are normalised before the mean.
    batch: prompts at a time.
    A class with fewer than S names repeats its first, which changes no maximum.
    """
    if isinstance(classes, str):
        raise ValueError(f"expected a list of class names, found the text {classes!r}")
    classes = [[names] if isinstance(names, str) else list(names) for names in classes]
    names = [name for synonyms in classes for name in synonyms]
    around = [template.split("{}", 1) for template in templates]
    prompts = [(before, name, after) for name in names for before, after in around]
    order = sorted(range(len(prompts)), key=lambda i: len("".join(prompts[i])))
    by_length = [prompts[i] for i in order]         # of like length together: less padding
    embedded = torch.cat([embed(by_length[i:i + batch]) for i in range(0, len(prompts), batch)])
    embedded = embedded[torch.tensor(order).argsort()]
    if normalise_each:
        embedded = F.normalize(embedded, dim=-1)
    mean = embedded.view(len(names), len(templates), -1).mean(dim=1)                # (names, D)
    by_class = F.normalize(mean, dim=-1).split([len(synonyms) for synonyms in classes])
    S = max(map(len, by_class))
    return torch.stack([torch.cat([own, own[:1].expand(S - len(own), -1)]) for own in by_class])


# --------------------------------------------------------------------------------------------------
# Vision backbone, frozen

@dataclass
class BackboneSettings:
    """A vision backbone; see `VisionBackbone`."""
    name: str = setting(
        "vit_base_patch14_reg4_dinov2.lvd142m", "timm name of a ViT or CNN, or toy",
        flag="backbone")
    weights: str = setting(
        "pretrained", "pretrained = timm's download, random, or a local weights file",
        flag="backbone-weights", changes_result=False)              # compared by their hash
    options: dict = setting(
        dict, "options of timm that shape the network, by name", flag=False)
    mean: tuple[float, ...] | None = setting(
        None, "mean of the pixels' three colours, in 0..1; none = the backbone's own", least=0,
        most=1, flag=False)
    std: tuple[float, ...] | None = setting(
        None, "standard deviation, see mean", least=0.001, most=1000, flag=False)
    denoiser: str | None = setting(
        None, "file of a denoising block for the patch tokens (docs/method.md, section 3)",
        flag=False, changes_result=False)
    image_token: str = setting(
        "class", "what stands for the whole image: the class token, or the patch tokens' mean",
        choices=("class", "mean"), flag="image-token")              # mean: the release's ViT-L

    def check(self):
        for name in ("mean", "std"):
            colours = getattr(self, name)
            if colours is not None and len(colours) != 3:
                raise ValueError(f"{name} has {len(colours)} numbers; expected 3")
        if self.weights not in ("pretrained", *backbones.STORED):
            self.weights = str(Path(self.weights).resolve())        # found again from any folder
        if self.name == "toy" and (self.weights != "pretrained" or self.options):
            raise ValueError(f"the toy backbone is hand-made; it takes no weights ({self.weights}) "
                             f"and no options {self.options}")


def create_trunk(name, weights="pretrained", options=None, flag="--backbone-weights"):
    """A timm network without its head, for images of any size where it can; or the toy backbone.

    Arguments: of `BackboneSettings`; machinery/networks/backbones.py says what is refused. flag:
    named in errors.
    """
    if name == "toy":
        return backbones.ToyTrunk()
    backbones.refuse_unknown(name, options or {})
    import timm                                     # slow, and the toy world does not need it
    options = {**backbones.any_size(name), **(options or {})}
    # Weights in a checkpoint count among its own
    bound = nullcontext() if weights in backbones.STORED else backbones.at_most(*backbones.LARGEST)
    with backbones.one_line_refusals(name, flag, weights == "pretrained"), bound:
        trunk = timm.create_model(name, pretrained=weights == "pretrained", num_classes=0,
                                  **options)
    if weights not in ("pretrained", *backbones.STORED):
        backbones.load_trunk(trunk, weights, flag)
    return trunk


def patch_tokens(trunk, images):
    """Tokens of a network made by `create_trunk`, after its last norm (section 3).

    images: normalised (B, 3, H, W), any size; padded here, right and bottom, to whole patches.
    Returns prefix tokens, class token and registers, (B, P, D), P = 0 of a CNN; patch tokens
    (B, N, D); and their grid (h, w), N = h * w.
    """
    ph, pw = backbones.patch_size(trunk)
    H, W = images.shape[-2:]
    images = F.pad(images, (0, -W % pw, 0, -H % ph))
    h = images.shape[-2] // ph
    w = images.shape[-1] // pw
    try:
        tokens = backbones.flat_map(trunk, trunk.forward_features(images))          # (B, P + N, D)
    except AssertionError as error:                 # its position table has a fixed size
        raise ValueError(f"the backbone takes no images of {H} x {W}: {error}") from None
    prefix, patches = tokens.tensor_split([getattr(trunk, "num_prefix_tokens", 0)], dim=1)
    if patches.shape[1] != h * w:
        raise ValueError(f"the backbone gives {patches.shape[1]} patches for {H} x {W} pixels, "
                         f"expected {h} x {w}; its patches do not lie on a regular grid")
    return prefix, patches, (h, w)


class VisionBackbone(nn.Module):
    """A timm vision transformer or CNN, or "toy"; it never learns (section 3).

    Arguments: of `BackboneSettings`; weights="imported" and denoiser=True are to be filled by a
    checkpoint.
    """

    def __init__(self, name, weights="pretrained", options=None, mean=None, std=None,
                 denoiser=None, image_token="class"):
        super().__init__()
        self.trunk = create_trunk(name, weights, options)
        self.width = self.trunk.num_features                                        # D
        self.patch_size = backbones.patch_size(self.trunk)
        has_token = name == "toy" or getattr(self.trunk, "cls_token", None) is not None
        self.uses_class_token = has_token and image_token == "class"
        self.denoiser = backbones.create_denoiser(self.width, denoiser) if denoiser else None
        statistics = self.trunk.pretrained_cfg
        self.normalise = Normalise(mean or statistics["mean"], std or statistics["std"])
        self.copies = {}                            # of the trunk, see `backbones.cast_once`
        self.eval().requires_grad_(False)           # frozen

    def train(self, mode=True):
        return super().train(False)                 # no dropout, no batch statistics, ever

    @torch.no_grad()
    def forward(self, images):
        """images: normalised (B, 3, H, W), any size. Returns class token (B, D) and patch tokens
        (B, N, D), float32 and unit-norm, and their grid (h, w), which may reach beyond the image.
        """
        trunk = backbones.cast_once(self.trunk, self.copies, images.device.type)
        prefix, patches, grid = patch_tokens(trunk, images)
        class_token = prefix[:, 0] if self.uses_class_token else patches.mean(dim=1)        # (B, D)
        if self.denoiser:
            patches = self.denoiser(patches, grid)
        return F.normalize(class_token.float(), dim=-1), F.normalize(patches.float(), dim=-1), grid


# --------------------------------------------------------------------------------------------------
# Text tower, trained from scratch

@dataclass
class TextSettings:
    """A text tower; see `TextEncoder`."""
    width: int | None = setting(
        None, "width of the text encoder; none = CLIP's for the backbone", least=1,
        flag="text-width")
    heads: int | None = setting(
        None, "its attention heads; none = CLIP's for the backbone, or width / 64", least=1,
        flag=False)
    layers: int = setting(
        12, "layers of the text encoder; few for few captions", least=1, flag="text-layers")


def groups_of_like_length(lengths):
    """[(size, longest length)] of groups of captions, by their lengths in rising order.

    Padding costs time, and so do many small groups on a GPU: lengths in a group are alike, up to
    the ratio LONGER.
    """
    groups = []
    shortest = 0                                    # of the last group
    for length in lengths:
        if length > LONGER * shortest or groups[-1][0] == GROUP:
            shortest = length
            groups.append((0, length))
        groups[-1] = (groups[-1][0] + 1, length)
    return groups


class TextEncoder(nn.Module):
    """CLIP's causal text transformer from random initial weights (section 4).

    output_dim: D; None = no projection, D is the width. Others: of `TextSettings`. Its parameters
    have open_clip's names, under `tower.`.
    """

    def __init__(self, output_dim, width=None, heads=None, layers=12):
        super().__init__()
        from open_clip.transformer import TextTransformer
        default_width, default_heads = TEXT_TOWERS.get(output_dim, DEFAULT_TEXT_TOWER)
        self.width = width = width or default_width
        heads = heads or (default_heads if width == default_width else max(1, width // 64))
        if width % heads:
            raise ValueError(f"the text encoder's width {width} must be a multiple of its {heads} "
                             "heads")
        self.tower = TextTransformer(CONTEXT_LENGTH, width=width, heads=heads, layers=layers,
                                     output_dim=output_dim)

    @staticmethod
    def ends(tokens):
        """Position of each caption's end token (B,): it has the highest id; zeros follow."""
        return tokens.argmax(dim=-1)

    def states(self, tokens, embedded=None):
        """Hidden states after the final LayerNorm (B, T, width), and end positions (B,).

        tokens: (B, 77) int64. embedded: (B, T, width), embeddings of the first T tokens, if known.
        Captions are cut to the longest, T: attention is causal, so no state depends on padding.
        """
        end = self.ends(tokens)                                                     # (B,)
        if embedded is None:
            longest = max(end.tolist(), default=0) + 1              # waits for the device
            embedded = self.tower.token_embedding(tokens[:, :longest])
        T = embedded.shape[1]
        x = embedded + self.tower.positional_embedding[:T]                          # (B, T, width)
        x = self.tower.transformer(x, attn_mask=self.tower.attn_mask[:T, :T])
        return self.tower.ln_final(x), end

    def forward(self, tokens, embedded=None):
        """Caption embedding (B, D), the state at the end token, and token embeddings (B, T, D).

        Arguments: of `states`. Both float32 and unit-norm.
        """
        x, end = self.states(tokens, embedded)                                      # (B, T, width)
        x = F.normalize((x @ self.tower.text_projection).float(), dim=-1)           # (B, T, D)
        return x[torch.arange(len(x), device=x.device), end], x


# --------------------------------------------------------------------------------------------------
# The whole

@dataclass
class SimZSSSettings:
    """SimZSS: its networks and its losses."""
    backbone: BackboneSettings = setting(BackboneSettings, "the frozen vision backbone")
    text: TextSettings = setting(TextSettings, "the trained text encoder")
    local_weight: float = setting(
        0.05, "weight of the local loss; 0 is LiT", least=0, flag="lambda")
    pool_temperature: float = setting(0.1, "tau_pool of the similarity pooling", above=0)
    local_temperature: float = setting(0.07, "tau_local of the local loss", above=0)
    local_target: str = setting(
        "concept", "target of the local loss: the concept (paper) or the prediction (release)",
        choices=("concept", "argmax"))
    pool_query: str = setting(
        "class", "what pools the patches: the class weight (release) or the occurrence's own "
        "embedding (paper)", choices=("class", "caption"))


@dataclass
class SimZSSProtocol(Protocol):
    class_embedding: str = setting(
        "caption", "embed a class by its prompt's end token, or by its name's own tokens, as the "
        "local loss does", choices=("caption", "concept"))


class SimZSS(Method):
    """L = L_g + lambda * L_l; with lambda = 0 only the global loss is left, LiT (section 8).

    bank: names of the C concepts.
    """

    name = "simzss"
    Settings = SimZSSSettings
    Protocol = SimZSSProtocol
    ROWS_INDEPENDENT = True
    ROW_BYTES = (0.8e6, 3.1e6)                      # of ViT-B/14 and captions of 14 tokens
    FROZEN = ("backbone.trunk.",)                   # not in states and checkpoints

    def __init__(self, settings, bank=(), training=False):
        super().__init__(settings, bank)
        self.backbone = VisionBackbone(**backbones.arguments(settings.backbone, training))
        self.text = TextEncoder(self.backbone.width, **vars(settings.text))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))   # its logarithm, as CLIP
        if settings.backbone.weights in backbones.STORED:
            self.FROZEN = ()        # random weights exist nowhere else: a checkpoint holds them

    # Training

    @staticmethod
    def sample(pair, rng, settings):
        """Returns tokens (77,), concepts (M, 3) of (bank id, start, end), and pixels uint8
        (3, size, size) or the cached features."""
        seen = pair.features or {"pixels": pair.crop(rng)}
        return {**seen, "tokens": pair.tokens(), "concepts": pair.concepts}

    def features(self, batch):
        """Returns the batch with class_token (B, D) and patch_tokens (B, N, D), not pixels."""
        others = {name: value for name, value in batch.items() if name != "pixels"}
        if "pixels" in batch:
            with self.autocast():                   # mixed precision, set by train.py
                tokens = self.backbone(self.backbone.normalise(batch["pixels"]))
        else:                                       # from a cache, in float16
            tokens = batch["class_token"].float(), batch["patch_tokens"].float()
        return {**others, "class_token": tokens[0], "patch_tokens": tokens[1]}

    def feature_key(self):
        weights = tensors_sha256(self.backbone.state_dict())
        return {**as_mapping(self.settings.backbone), "weights": weights}

    def order(self, batch):
        """By the captions' lengths, so that micro-batches have few groups of like length."""
        return self.text.ends(batch["tokens"]).argsort(stable=True)                 # (B,)

    def encode(self, batch):
        """Returns caption (B, D) and concepts, the occurrences' embeddings (B, M, D). Captions of
        like length are computed together: that saves padding."""
        order = self.order(batch)                                                   # (B,)
        tokens = batch["tokens"][order]                                             # (B, 77)
        spans = batch["concepts"][order, :, 1:]                                     # (B, M, 2)
        lengths = (self.text.ends(tokens) + 1).tolist()                     # waits for the device
        sizes, longest = zip(*groups_of_like_length(lengths))
        with self.autocast():
            # Looked up once: the gradient of the embedding table is as large as the vocabulary
            embedded = self.text.tower.token_embedding(tokens[:, :longest[-1]])     # (B, T, width)
            groups = zip(tokens.split(sizes), spans.split(sizes), embedded.split(sizes), longest)
            captions, concepts = zip(*[self.encode_texts(tokens, spans, embedded[:, :T])
                                       for tokens, spans, embedded, T in groups])
        back = order.argsort()
        return {"caption": torch.cat(captions)[back], "concepts": torch.cat(concepts)[back]}

    def encode_texts(self, tokens, spans, embedded=None):
        """tokens: (B, 77). spans: (B, M, 2). Returns captions (B, D) and occurrences (B, M, D)."""
        caption, token_embeddings = self.text(tokens, embedded)             # (B, D), (B, T, D)
        with torch.autocast(caption.device.type, enabled=False):
            return caption, concept_embeddings(token_embeddings, spans)

    def losses(self, encoded, batch):
        """Returns loss = global + lambda * local, in float32, and what is logged beside them."""
        concepts = encoded["concepts"]                                              # (B, M, D)
        ids, C = only_present(batch["concepts"][..., 0], len(self.bank))            # (B, M)
        logit_scale = self.logit_scale.exp()
        loss_global = global_loss(batch["class_token"], encoded["caption"], logit_scale)
        weights, counts = class_weights(concepts, ids, C)                   # (C, D), (C,)
        queries = weights[ids.clamp(min=0)]                 # (B, M, D); padding is left out later
        if self.settings.pool_query == "caption":
            queries = F.normalize(concepts, dim=-1)
        loss_local = self.local_loss(queries, ids, batch["patch_tokens"], weights, counts)
        return {"loss": loss_global + self.settings.local_weight * loss_local,
                "global": loss_global, "local": loss_local, "logit_scale": logit_scale,
                "concepts": counts.sum(), "present": (counts > 0).sum()}

    def local_loss(self, queries, ids, patches, weights, counts):
        """L_l of queries (B, M, D): pool the patches (B, N, D), classify what was pooled.

        ids: (B, M), rows of weights (C, D) and counts (C,).
        """
        settings = self.settings
        visual = similarity_pool(queries, patches, settings.pool_temperature)
        return concept_loss(visual, ids, weights, counts, settings.local_temperature,
                            settings.local_target)

    @torch.no_grad()
    def after_step(self, step, steps):
        self.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))

    # Inference

    def embed_classes(self, classes, templates=("{}",)):
        """See `Method.embed_classes`."""
        class_embedding = self.protocol.class_embedding
        if class_embedding == "concept" and self.settings.local_weight == 0:
            raise ValueError("with lambda = 0 no concept embeddings are trained; embed classes by "
                             "their prompt's end token: --class-embedding caption")

        def embed(prompts):
            texts = ["".join(prompt) for prompt in prompts]
            tokens = torch.stack(list(map(tokenize, texts))).to(self.device)        # (P, 77)
            caption, states = self.text(tokens)                             # (P, D), (P, T, D)
            if class_embedding == "caption":
                return caption
            # Alone, `before` has its end token exactly where the name begins in the whole prompt
            spans = [[self.text.ends(tokenize(text)) for text in (before, before + name)]
                     for before, name, _ in prompts]
            spans = torch.tensor(spans, device=self.device)[:, None]                # (P, 1, 2)
            return concept_embeddings(states, spans)[:, 0]                          # (P, D)

        return prompt_ensemble(classes, templates, embed)

    @torch.no_grad()
    def unit_tokens(self, pixels):
        """See `Method.unit_tokens`."""
        _, patches, (h, w) = self.backbone(self.backbone.normalise(pixels))         # (B, N, D)
        ph, pw = self.backbone.patch_size
        return patches.unflatten(1, (h, w)), (h * ph, w * pw)

    @torch.no_grad()
    def patch_scores(self, pixels, class_embeddings):
        """See `Method.patch_scores`; the scores are cosine similarities."""
        tokens, covered = self.unit_tokens(pixels)                                  # (B, h, w, D)
        return best_synonym(tokens, class_embeddings), covered

    @torch.no_grad()
    def image_scores(self, pixels, class_embeddings):
        """Cosine similarities (B, C) of class tokens and classes."""
        class_token = self.backbone(self.backbone.normalise(pixels))[0]             # (B, D)
        return best_synonym(class_token[:, None], class_embeddings)[..., 0]
