"""OVSegmentor: groups of patches that learn from captions, entity completion, mask consistency.

Paper: "Learning Open-vocabulary Semantic Segmentation Models From Natural Language Supervision",
CVPR 2023, arXiv 2301.09121. "Section n" below is a section of docs/ovsegmentor.md.

    python train.py --method ovsegmentor --train-data toy
    python train.py --method ovsegmentor --train-data toy --stage 2 --init runs/ovsegmentor-toy

The letters of model.py, and:

    d    width of the image encoder            K0   group tokens that go in, 64
    d_t  width of the text encoder             K    groups that come out, 8
    P    pixels of an enlarged mask

Losses and batch statistics are those of the global batch.
"""
import argparse
import copy
import math
from functools import lru_cache, partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from concepts import ConceptBank, tokenizer
from data import random_resized_crop
from machinery.networks import backbones
from methods.parts import sentences
from methods.parts.augment import IMAGENET_MEAN, IMAGENET_STD, augment, check_recipe
from machinery.networks.checkpoint import load_model, model_file, read_checkpoint
from machinery.names import CLASSES, plural, read_templates
from methods.parts.clustering import assign
from machinery.errors import check_bounds, check_positive
from methods.parts.grouping import (EntityDecoder, ImageEncoder, Projector, enlarge, groups_in_use,
                                initial_trunk, patch_logits)
from machinery.networks.layers import Normalise
from machinery.contract import Method, best_synonym, moving_average, prompt_ensemble
from machinery.parallel import global_mean
from model import MAX_LOGIT_SCALE, VisionBackbone, global_loss

MASK = "[MASK]"                                     # BERT's mask token
RARE_WORD = "jekyll"                                # stands for it in CLIP's vocabulary: one token
MASK_LOSS_SCALE = 16                                # 128 pairs per process / 8 groups (section 6)
DETACHED = 0.5                                      # share of groups without gradient of L_mask
TEACHER_SHARE = 0.01                                # of the way to the student, in a step
WARMUP_START = 0.025                                # first learning rate / peak


# --------------------------------------------------------------------------------------------------
# Data: entities, masked captions, answers (section 2)

def entity_forms(bank):
    """{word: entity} of a `ConceptBank`: its names and synonyms, and their plurals."""
    forms = {plural(name): bank.names[id] for name, id in bank.ids.items()}
    return forms | {name: bank.names[id] for name, id in bank.ids.items()}


def mask_entities(caption, forms):
    """The question: the caption with [MASK] for each entity word. Returns it and the entities."""
    words = []
    entities = []
    for word in caption.split(" "):
        entity = forms.get(word.replace(".", "").lower())
        words.append(MASK if entity else word)
        if entity and entity not in entities:
            entities.append(entity)
    return " ".join(words).replace("'", ""), entities


def answer_sentence(entities, template):
    """"a blurry photo of the cat and chair": a template up to its {}, and the entities."""
    return template.partition("{}")[0] + " and ".join(entities)


@lru_cache(maxsize=2 ** 14)                         # prompts and answers return often
def tokenize(text, encoder, context):
    """Text -> (context,) int64, cut or padded. encoder: "scratch", or a pretrained BERT's name."""
    if encoder == "scratch":
        return tokenizer()(text.replace(MASK, RARE_WORD), context_length=context)[0]
    return sentences.tokenize(text, encoder, context)


def random_view(image, rng, size, least_area, recipe, erase):
    """A random crop of a PIL image, changed by `augment`: uint8 (3, size, size)."""
    crop = random_resized_crop(image, size, rng, (least_area, 1.0), resample=Image.BILINEAR)
    return augment(crop, rng, recipe, erase)


# --------------------------------------------------------------------------------------------------
# Formulas of the losses and of inference; how patches get their groups is in methods/parts/grouping.py

def match_groups(student, teacher):
    """For each of a student's groups the teacher's, one to one, with the least total distance of
    unit-norm masks (section 6). (B, K, P) both. Returns (B, K) int64."""
    a = F.normalize(student.detach(), dim=-1)
    b = F.normalize(teacher, dim=-1)
    cost = (2 - 2 * a @ b.transpose(1, 2)).clamp(min=0).sqrt().nan_to_num()         # (B, K, K)
    found = [torch.from_numpy(assign(one)) for one in cost.cpu().numpy()]
    return torch.stack(found).to(student.device)


def mask_distance(student, teacher, prediction="minmax"):
    """D: 1 - Dice of a student's and a teacher's masks, one ratio over all groups (section 6).

    student, teacher: logits (B, K, P) on the same pixels, the teacher's without gradient.
    prediction: "minmax" (release) or "sigmoid" (paper). Returns (B,).
    """
    match = match_groups(student, teacher)[..., None].expand_as(teacher)
    chance = teacher.gather(1, match).sigmoid()                                     # (B, K, P)
    target = (chance >= 0.6 * chance.amax(dim=-1, keepdim=True)).float()
    if prediction == "sigmoid":
        mask = student.sigmoid()
    else:
        low = student.amin(dim=-1, keepdim=True)
        span = student.amax(dim=-1, keepdim=True) - low
        mask = (student - low) / span.clamp(min=1e-6)           # a constant map has no gradient
    overlap = (mask * target).sum(dim=(1, 2))                                       # (B,)
    return 1 - (2 * overlap + 1) / (mask.sum(dim=(1, 2)) + target.sum(dim=(1, 2)) + 1)


def contrastive_loss(a, b, scale):
    """The symmetric contrastive loss of rows that belong together, (B, D) both (section 6)."""
    return global_loss(F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1), scale)


def group_scores(group_logits, image_logits, keep):
    """Aff: score of each class for each group (section 8).

    group_logits: (B, K, C). image_logits: (B, C). keep: classes per image that can score at all,
    those that fit the whole image best. Returns (B, K, C), in 0..1.
    """
    best = image_logits.topk(min(keep, image_logits.shape[-1]), dim=-1).indices
    left_out = torch.ones_like(image_logits, dtype=torch.bool).scatter(1, best, False)
    among_kept = group_logits.masked_fill(left_out[:, None], -torch.inf).softmax(dim=-1)
    return group_logits.softmax(dim=-1) * among_kept


# --------------------------------------------------------------------------------------------------
# The whole

class OVSegmentor(Method):
    """L_contrast + L_entity, and in stage 2 + 0.1 L_mask (section 6).

    image: ImageEncoder. text: of methods/parts/sentences.py. backbone: frozen network whose patch
    tokens the image encoder takes in place of pixels, or None. embedding: D. hidden: width inside
    the projectors. bank: names of the entities. switches: dict of SWITCHES, see `add_flags`.
    """

    name = "ovsegmentor"
    CONFIG = ("image", "text", "sizes", "bank", "switches")
    RECIPE = {
        "bank": str(CLASSES / "entities-ovsegmentor.txt"),  #                          release
        "parser": "match",          # entities are words of a list                     ours
        "batch": 2048,              #                                                  release
        "epochs": 30,               #                                                  release
        "epoch_pairs": 4_000_000,   # CC4M                                             paper
        "base_rate": 4e-5,          # 3.2e-4 at 2,048                                  release
        "warmup": 1 / 15,           # two passes                                       release
        "final_rate": 0.25,         # 8e-5                                             release
        "weight_decay": 0.05,       # on all but vectors, see `groups`                 release
        "beta2": 0.999,             #                                                  release
        "eps": 1e-8,                #                                                  release
        "clip": 5.0,                #                                                  release
    }
    STAGE2 = {                      # all of it is the release's
        "batch": 1024,
        "epochs": 10,
        "base_rate": 6.25e-7,       # 2.5e-6 at 1,024
        "warmup": 0.0,
        "final_rate": 0.1,          # 2.5e-7
        "least_area": 0.4,
        "rand_augment": "none",
        "erase": 0.0,
        "output": "runs/ovsegmentor-2",
    }
    TOY = {"bank": None, "backbone": "toy", "patches": "frozen", "width": 64, "heads": 4,
           "layers": 2, "group_tokens": 16, "init_std": 0.125, "drop_path": 0.0, "embedding": 64,
           "hidden": 256, "text": "scratch", "text_width": 64, "text_layers": 1, "context": 24,
           "mask_size": 32, "least_area": 0.4, "rand_augment": "none", "erase": 0.0, "batch": 32,
           "epochs": 4, "base_rate": 8e-3, "output": "runs/ovsegmentor-toy"}
    TOY2 = {"epochs": 1.6, "base_rate": 8e-4, "output": "runs/ovsegmentor-toy-2"}
    PROTOCOL = {"templates": "photo", "keep_classes": 5}
    SWITCHES = ("entity_weight", "mask_weight", "mask_size", "mask_prediction", "bn_double_pass",
                "mask_padding")
    NUMBERS = {         # flags with a number: default, most, meaning; the least is 1, of floats 0
        "patch": (16, math.inf, "pixels a side of a patch of the convolution"),
        "width": (768, math.inf, "d, of the image encoder"),
        "heads": (8, math.inf, "of image encoder and entity decoder; DINO was trained with 12"),
        "layers": (12, math.inf, "of the image encoder, both halves"),
        "drop_path": (0.1, 0.9, "of the image encoder's last block, rising from 0"),
        "init_std": (0.02, math.inf, "of the image encoder's new weights; small widths need more"),
        "group_tokens": (64, math.inf, "K0"),
        "groups": (8, math.inf, "K"),
        "embedding": (256, math.inf, "D"),
        "hidden": (4096, math.inf, "width inside the projectors"),
        "entity_weight": (1.0, math.inf, "of L_entity; 0 leaves it out"),
        "mask_weight": (0.1, math.inf, "of L_mask in stage 2; 0 leaves it out"),
        "least_area": (0.08, 1, "least share of the image in a random crop"),
        "erase": (0.25, 1, "probability of erasing a rectangle of the image"),
        "keep_classes": (5, math.inf, "at test time, best classes of a window that can score"),
    }
    FROZEN = ("backbone.",)
    TRAINING_ONLY = ("teacher.",)
    HAS_BACKGROUND_RULE = True

    def __init__(self, image, text, backbone, embedding, hidden, bank, switches):
        super().__init__()
        d = image.config["width"]
        d_t = text.config["width"]
        self.backbone = backbone
        self.image = image
        self.text = text
        self.decoder = EntityDecoder(d, d_t, image.config["heads"])
        self.project_image = Projector(d, hidden, embedding)
        self.project_text = Projector(d_t, hidden, embedding)
        self.project_question = Projector(min(d, d_t), hidden, embedding)
        self.theta = nn.Parameter(torch.tensor(math.log(1 / 0.07)))     # logarithm of the scale
        self.teacher = None                         # in stage 2
        self.sizes = {"embedding": embedding, "hidden": hidden}
        self.bank = list(bank)
        self.switches = SimpleNamespace(**switches)
        self.background_threshold = None            # of --background own:T
        self.keep_classes = self.PROTOCOL["keep_classes"]
        self.normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD)

    # Building

    @classmethod
    def add_flags(cls, parser):
        backbones.add_flags(parser, "vit_base_patch16_224.dino")
        sentences.add_flags(parser)
        add = parser.add_argument_group("OVSegmentor").add_argument
        add("--stage", type=int, choices=[1, 2], default=1,
            help="2 adds mask consistency to a model of stage 1 (default: %(default)s)")
        add("--init", metavar="FILE", help="checkpoint of stage 1, which stage 2 starts from")
        add("--patches", choices=["convolution", "frozen"], default="convolution",
            help="what the image encoder takes: pixels through a trained patch convolution, with "
                 "the backbone's weights as initial values, or the frozen backbone's patch tokens "
                 "(default: %(default)s)")
        add("--rand-augment", default="rand-m9-mstd0.5-inc1",
            help="timm's recipe of RandAugment, or none (default: %(default)s)")
        add("--mask-size", type=int,
            help="pixels a side of the masks of L_mask (default: --image-size)")
        add("--mask-prediction", choices=["minmax", "sigmoid"], default="minmax",
            help="a student's logits become masks by their range (release) or by a sigmoid (paper) "
                 "(default: %(default)s)")
        add("--bn-double-pass", action=argparse.BooleanOptionalAction, default=True,
            help="let token and group features that no loss uses count in BatchNorm's running "
                 "statistics, as in the release (default: %(default)s)")
        add("--mask-padding", action=argparse.BooleanOptionalAction, default=False,
            help="hide the question's padding from the entity decoder (default: %(default)s)")
        for name, (default, _, meaning) in cls.NUMBERS.items():
            add(f"--{name.replace('_', '-')}", type=type(default), default=default,
                help=f"{meaning} (default: %(default)s)")

    @classmethod
    def further_defaults(cls, args):
        if args.stage == 1:
            return {}
        return {**cls.STAGE2, **cls.TOY, **cls.TOY2} if args.train_data == "toy" else cls.STAGE2

    @classmethod
    def check_flags(cls, args):
        backbones.check_flags(args, image_token=False)
        check_bounds(args, {name: (int(type(default) is int), most)
                            for name, (default, most, _) in cls.NUMBERS.items()})
        check_positive(args, "mask_size", "init_std")
        check_recipe(args.rand_augment, args.image_size)
        if (args.stage == 2) != bool(args.init):
            raise ValueError(f"--stage {args.stage} with --init {args.init}: stage 2, and no "
                             "other, starts from a checkpoint of stage 1; name it with --init")
        if args.bank == "none":
            raise ValueError("--bank none: entities are looked up in the words of a caption; name "
                             "a file of them")
        if args.patches == "convolution" and (args.pixel_mean or args.pixel_std or args.denoiser
                                              or args.backbone_option):
            raise ValueError("--pixel-mean, --pixel-std, --denoiser and --backbone-option are for "
                             "--patches frozen")
        if args.stage == 2:
            header, _ = read_checkpoint(model_file(args.init))
            if header["method"] != cls.name:
                raise ValueError(f"--init {args.init} is a checkpoint of {header['method']}, "
                                 f"expected one of {cls.name}")
            args.text = header["config"]["text"]["kind"]
            args.context = header["config"]["text"]["context"]
        sentences.check_flags(args)
        args.mask_size = args.mask_size or args.image_size

    @classmethod
    def build(cls, args, bank):
        switches = {name: getattr(args, name) for name in cls.SWITCHES}
        if args.stage == 2:
            weights = None if args.backbone_weights == "random" else args.backbone_weights
            model = load_model(args.init, backbone_weights=weights)
            return model.begin_stage_2(switches, bank.names)
        text = sentences.from_flags(args)
        backbone = None
        trunk = None
        channels = 3
        patch = args.patch
        grid = math.ceil(args.image_size / patch)
        if args.patches == "frozen":
            backbone = VisionBackbone(**backbones.from_flags(args))
            channels = backbone.width
            patch = 1
            grid = math.ceil(args.image_size / backbone.patch_size[0])
        elif args.backbone_weights != "random":
            trunk = initial_trunk(args.backbone, args.backbone_weights)
            grid = math.isqrt(trunk.pos_embed.shape[1])         # a class token adds less than a row
        image = ImageEncoder(args.width, args.heads, args.layers, channels, patch, grid,
                             args.group_tokens, args.groups, args.drop_path, args.init_std)
        if trunk:
            image.fill(trunk)
        # A BERT comes in evaluation mode; its dropout is on in both stages
        return cls(image, text, backbone, args.embedding, args.hidden, bank.names, switches).train()

    def begin_stage_2(self, switches, bank):
        """Add the teacher; the text encoder no longer learns, though its dropout stays on."""
        self.switches = SimpleNamespace(**switches)
        self.bank = list(bank)
        self.text.requires_grad_(False)
        self.teacher = copy.deepcopy(self.image).requires_grad_(False)
        return self.train()

    @classmethod
    def rebuild(cls, config):
        text = sentences.from_config(config["text"])
        backbone = config.get("backbone")
        if backbone:
            backbone = VisionBackbone(**backbones.from_config(backbone))
        return cls(ImageEncoder(**config["image"]), text, backbone, **config["sizes"],
                   bank=config["bank"], switches=config["switches"])

    def config(self):
        return {"image": self.image.config, "text": self.text.config, "sizes": self.sizes,
                "bank": self.bank, "switches": vars(self.switches),
                "backbone": self.backbone and self.backbone.config}

    def checkpoint(self):
        return {**super().checkpoint(), **backbones.stored_tensors(self.backbone)}

    def check_frozen(self, config, path):
        if self.backbone:
            backbones.check(self.backbone, config["backbone"], path)

    def groups(self):
        """Weight decay on all but vectors: also on theta, the positions and the group tokens."""
        parameters = list(self.trained().values())
        return [{"params": [p for p in parameters if p.ndim != 1], "decay": 1.0, "rate": 1.0},
                {"params": [p for p in parameters if p.ndim == 1], "decay": 0.0, "rate": 1.0}]

    # Data

    @classmethod
    def sampler(cls, args):
        bank = ConceptBank.by_name(args.bank, args.exclude_classes)
        return partial(cls.sample, size=args.image_size, forms=entity_forms(bank),
                       names=bank.names if args.stage == 2 else None,
                       templates=read_templates("imagenet80"),
                       tokens=partial(tokenize, encoder=args.text, context=args.context),
                       see=partial(random_view, size=args.image_size, least_area=args.least_area,
                                   recipe=args.rand_augment, erase=args.erase))

    @staticmethod
    def sample(pair, size, rng, forms, names, templates, tokens, see):
        """pixels uint8 (3, size, size); caption, question and answer (T,) int64; in stage 2, when
        names of entities are given, also partner (3, size, size) and prompt (T,)."""
        question, entities = mask_entities(pair.caption, forms)
        answer = answer_sentence(entities, templates[rng.integers(len(templates))])
        sample = {"pixels": see(pair.image(), rng=rng), "caption": tokens(pair.caption),
                  "question": tokens(question), "answer": tokens(answer)}
        if names is None:
            return sample
        drawn = pair.partner(rng)
        if drawn is None:                           # no entity: another view of the image itself
            return {**sample, "partner": see(pair.image(), rng=rng), "prompt": sample["caption"]}
        partner, entity = drawn
        return {**sample, "partner": see(partner.image(), rng=rng),
                "prompt": tokens(f"A photo of {names[entity]}")}

    def maps(self, pixels):
        """uint8 (B, 3, H, W) -> what the image encoder takes (B, channels, H', W'): normalised
        pixels, zero-padded to whole patches, or the frozen backbone's patch tokens."""
        if self.backbone:
            _, patches, grid = self.backbone(self.backbone.normalise(pixels))       # (B, N, D)
            patches = patches * patches.shape[-1] ** 0.5            # unit-norm -> values near 1
            return patches.transpose(1, 2).unflatten(2, grid)
        patch = self.image.config["patch"]
        H, W = pixels.shape[-2:]
        return F.pad(self.normalise(pixels), (0, -W % patch, 0, -H % patch))

    # Training

    def losses(self, batch):
        switches = self.switches
        with self.autocast():
            groups, queries, keys, _ = self.image(self.maps(batch["pixels"]))       # (B, K, d)
            image = self.project_image(groups.mean(dim=1))                          # (B, D)
            self.count(self.project_image, groups)
            caption = self.embed_text(batch["caption"])                             # (B, D)
            if switches.entity_weight:
                completed = self.complete(groups, batch["question"])                # (B, D)
                answer = self.embed_text(batch["answer"])                           # (B, D)
        losses = {"contrast": contrastive_loss(image, caption, self.scale())}
        loss = losses["contrast"]
        if switches.entity_weight:
            losses["entity"] = contrastive_loss(completed, answer, self.scale())
            loss = loss + switches.entity_weight * losses["entity"]
        if self.teacher and switches.mask_weight:
            losses["mask"] = self.mask_loss(batch, groups, queries)
            loss = loss + switches.mask_weight * losses["mask"]
        return {"loss": loss, **losses, "logit_scale": self.scale(),
                "groups": groups_in_use(queries, keys)}

    def scale(self):
        return self.theta.exp().clamp(max=MAX_LOGIT_SCALE)

    def embed_text(self, tokens):
        """Sentences, tokens (B, T) -> (B, D), not normalised."""
        states, end = self.text(tokens)                                     # (B, T, d_t), (B, d_t)
        embedded = self.project_text(end)
        self.count(self.project_text, states)
        return embedded

    @torch.no_grad()
    def count(self, projector, *features):
        """Let features whose projection nobody uses change the running statistics (section 4)."""
        if self.training and self.switches.bn_double_pass:
            for x in features:
                projector.norm(projector.fc1(x))

    def complete(self, groups, tokens):
        """What the groups (B, K, d) answer to questions, tokens (B, T): (B, D)."""
        states, end = self.text(tokens)                                     # (B, T, d_t), (B, d_t)
        self.count(self.project_text, end, states)
        is_text = tokens != 0 if self.switches.mask_padding else None
        decoded = self.decoder(groups, states, is_text)                             # (B, T, w)
        return self.project_question(self.text.sentence(decoded, tokens))

    def mask_loss(self, batch, groups, queries):
        """L_mask: on image 2 the student's queries of image 1 must give the teacher's masks.

        groups, queries: the student's of image 1, (B, K, d). Returns a scalar.
        """
        with torch.no_grad(), self.autocast():
            own = self.project_image(groups, counts=False)                          # (B, K, D)
            others, teacher_queries, keys, grid = self.teacher(self.maps(batch["partner"]))
            self.count(self.project_image, others.mean(dim=1), others)
            prompt = self.embed_text(batch["prompt"])                               # (B, D)
        fit = torch.einsum("bkd,bd->bk", own.float(), prompt.float())               # r, (B, K)
        worst = fit.topk(int(DETACHED * fit.shape[1]), largest=False).indices
        detached = torch.zeros_like(fit, dtype=torch.bool).scatter(1, worst, True)[..., None]

        student = patch_logits(queries, keys)                                       # (B, K, N)
        student = torch.where(detached, student.detach(), student)
        teacher = patch_logits(teacher_queries, keys)
        distance = mask_distance(enlarge(student, grid, self.switches.mask_size),
                                 enlarge(teacher, grid, self.switches.mask_size),
                                 self.switches.mask_prediction)                     # (B,)
        return MASK_LOSS_SCALE * global_mean(distance)

    @staticmethod
    def learning_rate(step, steps, peak, warmup, final):
        """Linear warm-up, then cosine to final x peak. The cosine counts from step 0, not from the
        end of the warm-up, so the rate drops a little there (section 7)."""
        rising = round(warmup * steps)
        if step < rising:
            first = WARMUP_START * peak
            return first + (peak - first) * step / rising
        last = final * peak
        return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * step / steps))

    @torch.no_grad()
    def after_step(self, step, steps):
        if self.teacher:
            moving_average(self.teacher, self.image, TEACHER_SHARE)

    def depends_on_processes(self):
        return self.text.config["kind"] != "scratch"        # BERT's dropout draws in each process

    # Inference (section 8)

    def prepare(self, protocol):
        kind, _, threshold = protocol.get("background", "").partition(":")
        self.background_threshold = float(threshold) if kind == "own" else None
        keep = protocol["keep_classes"]
        if type(keep) is not int or keep < 1:
            raise ValueError(f"keep_classes is {keep!r}; expected a whole number of at least 1")
        self.keep_classes = keep

    def embed_classes(self, classes, templates=("{}",), **options):
        def embed(prompts):
            tokens = [tokenize("".join(prompt), self.text.config["kind"],
                               self.text.config["context"]) for prompt in prompts]
            return self.embed_text(torch.stack(tokens).to(self.device))       # (P, D)

        return prompt_ensemble(classes, templates, embed, normalise_each=False)

    @torch.no_grad()
    def patch_scores(self, pixels, class_embeddings):
        """Every pixel has the scores of its group; see `Method`. An all-zero row of the class
        embeddings stands for the background: 1 where the best class scores less than the threshold
        and less than the window's best group, else 0."""
        groups, queries, keys, grid = self.image(self.maps(pixels))                 # (B, K, d)
        ph, pw = self.backbone.patch_size if self.backbone else 2 * [self.image.config["patch"]]
        size = (grid[0] * ph, grid[1] * pw)                                         # (H', W')
        soft = patch_logits(queries, keys).softmax(dim=1).unflatten(-1, grid)       # (B, K, h, w)
        owner = F.interpolate(soft, size, mode="bilinear", align_corners=True).argmax(dim=1)

        is_class = class_embeddings.flatten(1).any(dim=1)                           # (C,)
        classes = class_embeddings[is_class]
        fit = best_synonym(F.normalize(self.project_image(groups), dim=-1), classes)
        affinity = group_scores(self.scale() * fit.transpose(1, 2),
                                self.scale() * self.fit_images(groups, classes),
                                self.keep_classes)                                  # (B, K, C)
        rows = torch.arange(len(owner), device=owner.device)[:, None, None]
        foreground = affinity[rows, owner].permute(0, 3, 1, 2)                      # (B, C, H', W')
        if is_class.all():
            return foreground, size
        threshold = affinity.amax(dim=(1, 2)).clamp(max=self.background_threshold)  # (B,)
        is_background = foreground.amax(dim=1) < threshold[:, None, None]
        scores = foreground.new_empty(len(owner), len(is_class), *size)
        scores[:, is_class] = foreground
        scores[:, ~is_class] = is_background[:, None].to(scores.dtype)
        return scores, size

    def fit_images(self, groups, class_embeddings):
        """Cosine similarities (B, C) of whole images, by their groups (B, K, d), and classes."""
        image = F.normalize(self.project_image(groups.mean(dim=1)), dim=-1)         # (B, D)
        return best_synonym(image[:, None], class_embeddings)[..., 0]

    @torch.no_grad()
    def image_scores(self, pixels, class_embeddings):
        return self.fit_images(self.image(self.maps(pixels))[0], class_embeddings)
