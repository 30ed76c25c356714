"""SimZSS: a frozen vision backbone, a text encoder that is trained from scratch, two losses.

Paper: "A Simple Framework for Open-Vocabulary Zero-Shot Segmentation", ICLR 2025, arXiv 2406.16085.
docs/method.md explains every formula; "section n" below is a section of that page. This file is in
the order of the paper: its formulas as functions of tensors, both towers, the whole.

Letters of shapes:

    B   images (= captions) in the batch          T   text tokens of the longest caption
    N   patch tokens of an image, N = h * w       M   concepts found in a caption, padded with -1
    D   width of the shared space                 C   concepts in the bank, or classes at test time
    P   prompts                                   S   names (synonyms) of a class

D is the width of the vision backbone. The backbone has no trained projection: the text encoder
projects into its space.

"paper" and "release" in comments say where a choice comes from: the text, or the authors' code.
"global" loss: of whole images; "local" loss: of regions. The global batch is that of all processes.
The losses are those of the global batch: sums and gathers run over all processes and carry gradient
(machinery/parallel.py).
"""
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from concepts import tokenize, tokenizer
from data import random_resized_crop
from machinery.networks import backbones
from machinery.training.buckets import backward_in_buckets
from machinery.training.captions import CONTEXT_LENGTH
from machinery.names import read_templates
from machinery.errors import check_positive
from machinery.images import to_pixels
from machinery.networks.layers import Normalise
from machinery.contract import Method, best_synonym, prompt_ensemble
from machinery.parallel import gather_rows, rank, sum_over_processes

DEFAULT_BACKBONE = "vit_base_patch14_reg4_dinov2.lvd142m"
TEXT_TOWERS = {384: (384, 6), 1024: (768, 12)}      # D -> (width, heads) of CLIP's tower
DEFAULT_TEXT_TOWER = (512, 8)                       # for ViT-B's D, 768, and any other
MAX_LOGIT_SCALE = 100.0                             # CLIP's bound on the learned 1 / temperature


# --------------------------------------------------------------------------------------------------
# The formulas

def concept_embeddings(tokens, spans):
    """g(c): text embedding of each concept occurrence, the sum of its token embeddings (section 6).

    tokens: (B, T, D) unit-norm token embeddings, not ids. spans: (B, M, 2) int, token positions
    [start, end) with the start-of-text token at 0. Padding, (-1, -1), is an empty span and gives
    zeros. Returns (B, M, D), not normalised: an occurrence of more tokens weighs more in w_c.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)                  # (T,)
    inside = (position >= spans[..., :1]) & (position < spans[..., 1:])             # (B, M, T)
    return inside.to(tokens.dtype) @ tokens                                         # (B, M, D)


def class_weights(concepts, ids, bank_size, over="batch"):
    """w_c = normalize(sum of the occurrences of concept c), one weight per concept (section 6).

    The weights are the classifier of the local loss. They are no parameters: a batch has its own.
    concepts: (B, M, D). ids: (B, M) int bank ids, -1 = padding. over: "batch" sums over the global
    batch, "process" over each process's pairs (the authors' release); counts are always global.
    Returns weights (C, D), unit-norm rows, zero for absent concepts; counts (C,), float.
    """
    found = ids >= 0
    sums = concepts.new_zeros(bank_size, concepts.shape[-1])                        # (C, D)
    sums = sums.index_add(0, ids[found], concepts[found])
    counts = torch.bincount(ids[found], minlength=bank_size).to(concepts.dtype)     # (C,)
    if over == "batch":
        sums = sum_over_processes(sums)
    return F.normalize(sums, dim=-1), sum_over_processes(counts)


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
    1 / temperature. Each process scores its own rows against the rows of all processes. Returns the
    mean over the global batch, a scalar.
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
    # Without occurrences it is 0, but connected to the inputs: another process may have some, and
    # in backward it waits for this one to take part in the all-reduce.
    loss = F.cross_entropy(logits, truth, reduction="sum")
    return sum_over_processes(loss) / counts.sum().clamp(min=1)


# --------------------------------------------------------------------------------------------------
# Vision backbone, frozen

class VisionBackbone(nn.Module):
    """Any timm vision transformer or CNN by name, or "toy"; it never learns (section 3).

    name: timm model name. pretrained: download timm's weights; False without weights: random.
    weights: local weights file instead. mean, std: pixel statistics, 3 floats each; None = the
    backbone's own. denoiser: file of a `Denoiser` for the patch tokens; True = one that is still to
    be filled. image_token: what stands for the whole image, "class", the class token if there is
    one, or "mean", the mean of the patch tokens, as in the release's ViT-L. options: of timm.
    Raises ValueError for an unknown name or a file that does not fit, FileNotFoundError for a
    missing download.
    """

    def __init__(self, name=DEFAULT_BACKBONE, pretrained=True, weights=None, mean=None, std=None,
                 denoiser=None, image_token="class", **options):
        super().__init__()
        if image_token not in ("class", "mean"):
            raise ValueError(f"image token must be 'class' or 'mean', found {image_token!r}")
        source = backbones.source(name, pretrained, weights)
        self.trunk = backbones.create_trunk(name, source, options)
        self.width = self.trunk.num_features                                        # D
        self.patch_size = backbones.patch_size(self.trunk)
        self.prefix_tokens = backbones.prefix_tokens(self.trunk)    # class token and registers
        has_token = name == "toy" or getattr(self.trunk, "cls_token", None) is not None
        self.uses_class_token = has_token and image_token == "class"
        self.denoiser = backbones.create_denoiser(self.width, denoiser) if denoiser else None
        self.eval().requires_grad_(False)           # frozen
        mean = mean or self.trunk.pretrained_cfg["mean"]
        std = std or self.trunk.pretrained_cfg["std"]
        self.normalise = Normalise(mean, std)
        self.config = {"name": name, "weights": source, "options": options, "mean": list(mean),
                       "std": list(std), "denoiser": bool(denoiser), "image_token": image_token,
                       "sha256": backbones.sha256(self.state_dict())}

    def train(self, mode=True):
        return super().train(False)                 # no dropout, no batch statistics, ever

    @torch.no_grad()
    def forward(self, images):
        """images: normalised (B, 3, H, W), any size; padded here, right and bottom, to patches.

        Returns class token (B, D) and patch tokens (B, N, D), float32 and unit-norm, and the grid
        (h, w). The last patches may reach beyond the image; segment.py cuts that away.
        """
        prefix, patches, grid = backbones.tokens(self.trunk, images, self.config["name"])
        class_token = prefix[:, 0] if self.uses_class_token else patches.mean(dim=1)        # (B, D)
        if self.denoiser:
            patches = self.denoiser(patches, grid)
        return F.normalize(class_token.float(), dim=-1), F.normalize(patches.float(), dim=-1), grid


# --------------------------------------------------------------------------------------------------
# Text tower, trained from scratch

class TextEncoder(nn.Module):
    """CLIP's causal text transformer from random initial weights (section 4).

    output_dim: D. width, heads: CLIP's for that D if None. Its parameters have open_clip's names,
    under `tower.`.
    """

    def __init__(self, output_dim, width=None, heads=None, layers=12):
        super().__init__()
        from open_clip.transformer import TextTransformer
        default_width, default_heads = TEXT_TOWERS.get(output_dim, DEFAULT_TEXT_TOWER)
        width = width or default_width
        heads = heads or (default_heads if width == default_width else max(1, width // 64))
        if width % heads:
            raise ValueError(f"the text encoder's width {width} must be a multiple of its {heads} "
                             "heads")
        self.config = {"output_dim": output_dim, "width": width, "heads": heads, "layers": layers}
        self.tower = TextTransformer(CONTEXT_LENGTH, width=width, heads=heads, layers=layers,
                                     output_dim=output_dim)

    def states(self, tokens, embedded=None):
        """Hidden states after the final LayerNorm (B, T, width), and end positions (B,).

        tokens: (B, 77) int64, zeros after the end token, which has the highest id. embedded:
        (B, 77, width), the tokens' embeddings, if they are known already. Captions are cut to the
        longest, T: attention is causal, so no state depends on what follows, such as padding.
        """
        end = tokens.argmax(dim=-1)                                                 # (B,)
        T = int(end.max()) + 1
        if embedded is None:
            embedded = self.tower.token_embedding(tokens[:, :T])
        x = embedded[:, :T] + self.tower.positional_embedding[:T]                   # (B, T, width)
        x = self.tower.transformer(x, attn_mask=self.tower.attn_mask[:T, :T])
        return self.tower.ln_final(x), end

    def forward(self, tokens, embedded=None):
        """Caption embedding (B, D), the state at the end token, and token embeddings (B, T, D).

        Arguments: of `states`. Both float32 and unit-norm. Rows behind a caption's end are padding.
        """
        x, end = self.states(tokens, embedded)                                      # (B, T, width)
        x = F.normalize((x @ self.tower.text_projection).float(), dim=-1)           # (B, T, D)
        return x[torch.arange(len(x), device=x.device), end], x


# --------------------------------------------------------------------------------------------------
# The whole

class SimZSS(Method):
    """L = L_g + lambda * L_l; with lambda = 0 only the global loss is left, LiT (section 8).

    bank: names of the C concepts. local_weight: lambda. pool_temperature: tau_pool.
    local_temperature: tau_local. local_target: see `concept_loss`. pool_query: what pools the
    patches, "class", the concept's class weight (release), or "caption", the embedding of the
    concept's occurrence in this caption, normalised (paper). weights_over: see `class_weights`.
    prompt_weight: weight of a second local loss, for the end tokens of prompts (section 8).
    prompts: its templates, see `read_templates`.
    """

    # What the scripts ask for; machinery/contract.py explains each
    name = "simzss"
    PROTOCOL = {"class_embedding": "caption"}       # see `embed_classes`
    TOY = {"backbone": "toy", "text_width": 256, "text_layers": 1, "batch": 64, "epochs": 16,
           "base_rate": 0.012, "class_embedding": "concept", "output": "runs/toy"}
    HAS_CHUNKS = True                               # see `backward`
    CONFIG = ("backbone", "bank")
    FROZEN = ("backbone.",)                         # not in states and checkpoints

    def __init__(self, backbone, text, bank=(), local_weight=0.05, pool_temperature=0.1,
                 local_temperature=0.07, local_target="concept", pool_query="class",
                 weights_over="batch", prompt_weight=0.0, prompts="imagenet80"):
        if pool_query not in ("class", "caption"):
            raise ValueError(f"pool query must be 'class' or 'caption', found {pool_query!r}")
        if weights_over not in ("batch", "process"):
            raise ValueError(f"class weights are over 'batch' or 'process', found {weights_over!r}")
        super().__init__()
        self.backbone = backbone
        self.text = text
        self.bank = list(bank)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))   # its logarithm, as CLIP
        self.local_weight = local_weight
        self.pool_temperature = pool_temperature
        self.local_temperature = local_temperature
        self.local_target = local_target
        self.pool_query = pool_query
        self.weights_over = weights_over
        self.prompt_weight = prompt_weight
        self.prompts = prompts

    # Training

    @staticmethod
    def sample(pair, size, rng):
        """tokens (77,), concepts (M, 3) of (bank id, start, end), and pixels uint8 (3, size, size)
        or the cached features."""
        seen = pair.features
        if seen is None:
            seen = {"pixels": to_pixels(random_resized_crop(pair.image(), size, rng))}
        return {**seen, "tokens": tokenize(pair.caption), "concepts": pair.concepts}

    def features(self, batch):
        """class_token (B, D) and patch_tokens (B, N, D) in place of pixels. train.py calls this on
        each part of a batch that was loaded."""
        if "pixels" not in batch:                   # they come from a cache, in float16
            return {name: value.float() if value.is_floating_point() else value
                    for name, value in batch.items()}
        batch = dict(batch)
        with self.autocast():                       # mixed precision, set by train.py
            class_token, patch_tokens, _ = self.backbone(
                self.backbone.normalise(batch.pop("pixels")))
        return {**batch, "class_token": class_token, "patch_tokens": patch_tokens}

    def feature_key(self):
        return {name: value for name, value in self.backbone.config.items() if name != "weights"}

    def encode_text(self, tokens, spans, embedded=None):
        """tokens: (B, 77). spans: (B, M, 2). Returns captions (B, D) and occurrences (B, M, D)."""
        caption, token_embeddings = self.text(tokens, embedded)             # (B, D), (B, T, D)
        with torch.autocast(caption.device.type, enabled=False):
            return caption, concept_embeddings(token_embeddings, spans)

    def add_prompts(self, tokens, spans, ids):
        """Append a prompt for each concept of these pairs, if `prompt_weight` asks for them.

        A concept's template is drawn for the whole bank, alike in all processes. Returns tokens
        (B + P, 77), spans (B + P, M, 2), padding for prompts, and the prompts' bank ids (P,).
        """
        if not self.prompt_weight:
            return tokens, spans, ids.new_empty(0)
        present = ids[ids >= 0].unique()                                            # (P,)
        templates = read_templates(self.prompts)
        drawn = torch.randint(len(templates), (len(self.bank),)).tolist()
        texts = [templates[drawn[id]].replace("{}", self.bank[id]) for id in present.tolist()]
        prompts = tokenizer()(texts).to(tokens.device)                              # (P, 77)
        padding = spans.new_full((len(present), *spans.shape[1:]), -1)
        return torch.cat([tokens, prompts]), torch.cat([spans, padding]), present

    def local_loss(self, queries, patches, ids, weights, counts):
        """L_l of queries (B, M, D): pool the patches, classify what was pooled."""
        visual = similarity_pool(queries, patches, self.pool_temperature)           # (B, M, D)
        return concept_loss(visual, ids, weights, counts, self.local_temperature,
                            self.local_target)

    def combine(self, class_token, patches, texts, concepts, ids, prompt_ids=()):
        """All losses, in float32: loss = global + lambda * local, and what is logged beside them.

        class_token: (B, D). patches: (B, N, D). texts: (B + P, D), captions, then prompts.
        concepts: (B + P, M, D). ids: (B, M). prompt_ids: (P,).
        """
        caption, prompts = texts.split([len(ids), len(prompt_ids)])         # (B, D), (P, D)
        concepts = concepts[:len(ids)]                                              # (B, M, D)
        index = ids.clamp(min=0)        # padding reads concept 0; `concept_loss` leaves it out
        with torch.autocast(caption.device.type, enabled=False):
            logit_scale = self.logit_scale.exp()
            loss_global = global_loss(class_token, caption, logit_scale)
            weights, counts = class_weights(concepts, ids, len(self.bank), self.weights_over)
            queries = weights[index]                                                # (B, M, D)
            if self.pool_query == "caption":
                queries = F.normalize(concepts, dim=-1)
            loss_local = self.local_loss(queries, patches, ids, weights, counts)
            losses = {"loss": loss_global + self.local_weight * loss_local, "global": loss_global,
                      "local": loss_local, "logit_scale": logit_scale, "concepts": counts.sum(),
                      "present": (counts > 0).sum()}
            if self.prompt_weight:                      # w_c is the end token of a prompt of c
                weights, _ = class_weights(prompts[:, None], prompt_ids[:, None], len(self.bank),
                                           self.weights_over)
                losses["prompt"] = self.local_loss(weights[index], patches, ids, weights, counts)
                losses["loss"] = losses["loss"] + self.prompt_weight * losses["prompt"]
        return losses

    def backward(self, batch, scale, chunk=None):
        """Losses of a batch that has its features, and their gradients; see `Method.backward`."""
        ids = batch["concepts"][..., 0]                                             # (B, M)
        spans = batch["concepts"][..., 1:]                                          # (B, M, 2)
        if chunk is not None and chunk >= len(ids):         # prompts do not count as pairs
            chunk = None
        tokens, spans, prompt_ids = self.add_prompts(batch["tokens"], spans, ids)

        def losses_of(texts, concepts):
            return self.combine(batch["class_token"].float(), batch["patch_tokens"].float(), texts,
                                concepts, ids, prompt_ids)

        return backward_in_buckets(self.encode_text, self.text.tower.token_embedding, tokens,
                                   spans, losses_of, scale, self.autocast, chunk)

    def forward(self, images, tokens, ids, spans):
        """All of the above in a row, to read and to test; train.py calls `features` and `backward`.

        images: normalised (B, 3, H, W). tokens: (B, 77). ids: (B, M). spans: (B, M, 2). Returns the
        dict of `combine`.
        """
        class_token, patches, _ = self.backbone(images)                     # (B, D), (B, N, D)
        tokens, spans, prompt_ids = self.add_prompts(tokens, spans, ids)
        texts, concepts = self.encode_text(tokens, spans)       # (B + P, D), (B + P, M, D)
        return self.combine(class_token, patches, texts, concepts, ids, prompt_ids)

    def depends_on_processes(self):
        return self.weights_over == "process"

    @torch.no_grad()
    def after_step(self, step, steps):
        self.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))

    # Inference

    def embed_classes(self, classes, templates=("{}",), class_embedding="caption", batch=256):
        """See `Method.embed_classes`. class_embedding: "caption", the state at the prompt's end
        token, or "concept", the sum of the name's own token embeddings, as in the local loss."""
        if class_embedding not in ("caption", "concept"):
            raise ValueError(f"class embedding must be 'caption' or 'concept', found "
                             f"{class_embedding!r}")

        def embed(prompts):
            texts = ["".join(prompt) for prompt in prompts]
            tokens = tokenizer()(texts).to(self.device)                             # (P, 77)
            caption, states = self.text(tokens)                             # (P, D), (P, T, D)
            if class_embedding == "caption":
                return caption
            # The end token's position is the number of tokens before it, and so the position of
            # what would follow: the name begins where `before` ends.
            spans = [[tokenize(before).argmax(), tokenize(before + name).argmax()]
                     for before, name, _ in prompts]
            spans = torch.tensor(spans, device=self.device)[:, None]                # (P, 1, 2)
            return concept_embeddings(states, spans)[:, 0]                          # (P, D)

        return prompt_ensemble(classes, templates, embed, batch)

    @torch.no_grad()
    def patch_scores(self, pixels, class_embeddings):
        """pixels: uint8 (B, 3, H, W). class_embeddings: (C, D) or (C, S, D). Returns cosine
        similarities (B, C, h, w), and the size in pixels that the grid (h, w) covers."""
        _, patches, (h, w) = self.backbone(self.backbone.normalise(pixels))         # (B, N, D)
        scores = best_synonym(patches, class_embeddings)                            # (B, C, N)
        ph, pw = self.backbone.patch_size
        return scores.unflatten(-1, (h, w)), (h * ph, w * pw)

    @torch.no_grad()
    def image_scores(self, pixels, class_embeddings):
        """Cosine similarities (B, C) of class tokens and classes."""
        class_token = self.backbone(self.backbone.normalise(pixels))[0]             # (B, D)
        return best_synonym(class_token[:, None], class_embeddings)[..., 0]

    # Flags and files

    @staticmethod
    def add_flags(parser):
        backbones.add_flags(parser, DEFAULT_BACKBONE)
        backbones.add_text_flags(parser)
        add = parser.add_argument_group("SimZSS").add_argument
        add("--lambda", dest="local_weight", type=float, default=0.05,
            help="weight of the local loss; 0 is LiT (default: %(default)s)")
        add("--pool-temperature", type=float, default=0.1,
            help="tau_pool of the similarity pooling (default: %(default)s)")
        add("--local-temperature", type=float, default=0.07,
            help="tau_local of the local loss (default: %(default)s)")
        add("--local-target", choices=["concept", "argmax"], default="concept",
            help="target of the local loss: the concept (paper) or the prediction (release) "
                 "(default: %(default)s)")
        add("--pool-query", choices=["class", "caption"], default="class",
            help="what pools the patches: the batch's class weight (release) or the caption's own "
                 "concept embedding (paper) (default: %(default)s)")
        add("--weights-over", choices=["batch", "process"], default="batch",
            help="sum class weights over the global batch, or over each process's share of it "
                 "(release) (default: %(default)s)")
        add("--prompt-weight", type=float, default=0.0,
            help="weight of a second local loss, whose class weights are the end tokens of prompts "
                 "(--templates): for --class-embedding caption (default: %(default)s)")
        add("--class-embedding", choices=["caption", "concept"], default="caption",
            help="at test time, embed a class by its prompt's end token, or by its name's tokens "
                 "as in the local loss (default: %(default)s)")

    @staticmethod
    def check_flags(args):
        backbones.check_flags(args)
        check_positive(args, "pool_temperature", "local_temperature")
        check_positive(args, "prompt_weight", or_zero=True)
        if not args.local_weight >= 0:
            raise ValueError(f"--lambda is {args.local_weight}; expected 0 or a positive number")
        if args.local_weight == 0 and args.class_embedding == "concept":
            if int(os.environ.get("RANK", 0)) == 0:
                print("lambda = 0 trains no concept embeddings: at test time classes are embedded "
                      "by their prompt's end token (--class-embedding caption)")
            args.class_embedding = "caption"

    @classmethod
    def build(cls, args, bank):
        backbone = VisionBackbone(**backbones.from_flags(args))
        text = TextEncoder(backbone.width, args.text_width, args.text_heads, args.text_layers)
        return cls(backbone, text, bank.names, args.local_weight, args.pool_temperature,
                   args.local_temperature, args.local_target, args.pool_query, args.weights_over,
                   args.prompt_weight, args.templates)

    @classmethod
    def rebuild(cls, config):
        backbone = VisionBackbone(**backbones.from_config(config["backbone"]))
        return cls(backbone, TextEncoder(**config["text"]), config["bank"], **config["switches"])

    def switches(self):
        """Keyword arguments of the constructor that are settings of the losses."""
        names = ("local_weight", "pool_temperature", "local_temperature", "local_target",
                 "pool_query", "weights_over", "prompt_weight", "prompts")
        return {name: getattr(self, name) for name in names}

    def config(self):
        return {"backbone": self.backbone.config, "text": self.text.config, "bank": self.bank,
                "switches": self.switches()}

    def checkpoint(self):
        return {**super().checkpoint(), **backbones.stored_tensors(self.backbone)}

    def check_frozen(self, config, path):
        backbones.check(self.backbone, config["backbone"], path)
