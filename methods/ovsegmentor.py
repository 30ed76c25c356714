"""OVSegmentor: groups of patches that learn from captions, entity completion, mask consistency.

Paper: "Learning Open-vocabulary Semantic Segmentation Models From Natural Language Supervision",
CVPR 2023, arXiv 2301.09121. "Section n" below is a section of docs/ovsegmentor.md.

    python train.py --recipe ovsegmentor-1-toy          # on the toy world, three minutes ...
    python train.py --recipe ovsegmentor-2-toy          # ... and stage 2, from its model

The letters of model.py, and:

    d    width of the image encoder            K0   group tokens that go in, 64
    d_t  width of the text encoder             K    groups that come out, 8
    P    pixels of an enlarged mask

Losses and batch statistics are those of the global batch.
"""
import copy
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.transforms import InterpolationMode

from machinery.contract import Method, Protocol, moving_average
from machinery.files import fill
from machinery.names import plural, read_templates
from machinery.networks import backbones
from machinery.networks.checkpoint import load_model
from machinery.networks.layers import IMAGENET_MEAN, IMAGENET_STD, Normalise
from machinery.parallel import global_mean
from machinery.settings import as_mapping, differences, setting
from methods.parts.grouping import (MIXING, EntityDecoder, ImageEncoder, ImageSettings, Projector,
                                    enlarge, groups_in_use, patch_logits)
from methods.parts.sentences import MASK, Bert, ScratchText, SentenceSettings, tokenize
from methods.parts.views import rand_augment, random_erase
from model import (MAX_LOGIT_SCALE, BackboneSettings, VisionBackbone, best_synonym, create_trunk,
                   global_loss, prompt_ensemble)

MASK_LOSS_SCALE = 16                                # 128 pairs per process / 8 groups (section 6)
DETACHED = 0.5                                      # fraction of groups that L_mask does not train
TEACHER_RATE = 0.01                                 # of the way to the student that a step moves it


# --------------------------------------------------------------------------------------------------
# Settings

@dataclass
class OVSegmentorSettings:
    """OVSegmentor: its networks, its losses, how its images are changed."""
    stage: int = setting(
        1, "1 learns groups and their words; 2 adds mask consistency to a model of stage 1",
        choices=(1, 2))
    init: str | None = setting(None, "checkpoint of stage 1, which stage 2 starts from")
    patches: str = setting(
        "convolution", "input of the image encoder: pixels through a trained patch convolution, or "
        "the frozen backbone's patch tokens", choices=("convolution", "frozen"))
    backbone: BackboneSettings = setting(
        BackboneSettings, "initial values of the image encoder, or the frozen network before it")
    image: ImageSettings = setting(ImageSettings, "the image encoder")
    blocks_start: str = setting(
        "random", "start of the blocks that mix patches and groups, where no pretrained values "
        "are: random, or identity, as the last map of their attention and of their MLP is zero",
        choices=("random", "identity"), flag=False)
    blocks_rate: float = setting(
        1.0, "learning rate of these blocks / that of all else", above=0, flag=False)
    text: SentenceSettings = setting(SentenceSettings, "the text encoder")
    embedding: int = setting(256, "D, width of the shared space", least=1)
    hidden: int = setting(4096, "width inside the projectors", least=1, flag=False)
    entity_weight: float = setting(1.0, "weight of L_entity; 0 leaves it out", least=0)
    mask_weight: float = setting(0.1, "weight of L_mask in stage 2; 0 leaves it out", least=0)
    mask_size: int = setting(
        224, "pixels a side of the masks of L_mask; the release has those of the images", least=1,
        flag=False)
    mask_prediction: str = setting(
        "minmax", "a student's logits become masks by their range (release) or by a sigmoid "
        "(paper)", choices=("minmax", "sigmoid"))
    bn_double_pass: bool = setting(
        True, "let token and group features that no loss uses count in BatchNorm's running "
        "statistics, as in the release", flag=False)
    mask_padding: bool = setting(
        False, "hide the question's padding from the entity decoder", flag=False)
    least_area: float = setting(
        0.4, "smallest fraction of the image in a random crop", above=0, most=1, flag=False)
    rand_augment: str | None = setting(
        None, "timm's recipe of RandAugment, such as rand-m9-mstd0.5-inc1; none = without",
        flag=False)
    erase: float = setting(
        0.0, "probability of erasing a rectangle of the image", least=0, most=1, flag=False)

    def check(self):
        if (self.stage == 2) != bool(self.init):
            raise ValueError(f"stage {self.stage} with init {self.init}: stage 2, and no other, "
                             "starts from a checkpoint of stage 1; name it with --init")
        backbone = self.backbone
        if self.patches == "convolution" and (backbone.mean or backbone.std or backbone.denoiser
                                              or backbone.options):
            raise ValueError("options, mean, std and denoiser of the backbone are for patches = "
                             "\"frozen\"")
        if backbone.image_token != "class":
            raise ValueError(f"image_token {backbone.image_token}: this method uses the backbone's "
                             "patch tokens only")


@dataclass
class OVSegmentorProtocol(Protocol):
    keep_classes: int = setting(
        5, "best classes of a window that can score at all", least=1, flag=False)


# --------------------------------------------------------------------------------------------------
# Data: entities, masked captions, answers (section 2)

@lru_cache(maxsize=1)
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


def random_view(pair, rng, settings):
    """A random crop of the pair's image, perhaps mirrored and changed: uint8 (3, size, size)."""
    pixels = pair.crop(rng, (settings.least_area, 1.0), flip=0.5,
                       interpolation=InterpolationMode.BILINEAR)
    if settings.rand_augment:
        pixels = rand_augment(pixels, settings.rand_augment, rng)
    return random_erase(pixels, settings.erase) if settings.erase else pixels


# --------------------------------------------------------------------------------------------------
# Formulas of the losses and of inference; patches to groups: parts/grouping.py

def match_groups(student, teacher):
    """For each of a student's groups the teacher's, one to one, with the least total distance of
    unit-norm masks. (B, K, P) both. Returns (B, K) int64."""
    a = F.normalize(student.detach(), dim=-1)
    b = F.normalize(teacher, dim=-1)
    cost = (2 - 2 * a @ b.transpose(1, 2)).clamp(min=0).sqrt().nan_to_num()         # (B, K, K)
    found = [torch.from_numpy(linear_sum_assignment(one)[1]) for one in cost.cpu().numpy()]
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


def mask_loss(student, teacher, fit, prediction="minmax"):
    """L_mask: the mean of `mask_distance` over the global batch.

    fit: (B, K), similarity of each student group to the entity's prompt. The worst half gets no
    gradient.
    """
    worst = fit.topk(int(DETACHED * fit.shape[1]), largest=False).indices
    detached = torch.zeros_like(fit, dtype=torch.bool).scatter(1, worst, True)[..., None]
    student = torch.where(detached, student.detach(), student)
    return MASK_LOSS_SCALE * global_mean(mask_distance(student, teacher, prediction))


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


def score_background(affinity, threshold):
    """s + T - b: scores that exceed the threshold T exactly where their class beats the background.

    b, the authors' score of the background in a window: 1 for a group whose best class scores less
    than T and less than the window's best group, else 0. So with T = 0.6 a group with the scores
    (0.5, 0.2) keeps (1.1, 0.8) if it is the best of its window, else it gets (0.1, -0.2). Averaging
    over windows changes nothing of it. affinity: s, (B, K, C). Returns (B, K, C).
    """
    best = affinity.amax(dim=2, keepdim=True)                                       # (B, K, 1)
    needed = best.amax(dim=1, keepdim=True).clamp(max=threshold)                    # (B, 1, 1)
    return affinity + threshold - (best < needed).to(affinity.dtype)


# --------------------------------------------------------------------------------------------------
# The whole

class OVSegmentor(Method):
    """L_contrast + L_entity, and in stage 2 + 0.1 L_mask (section 6). bank: names of the entities.

    A batch: image (B, 3, H, W), caption, question and answer (B, T); in stage 2 also partner,
    another image with one of the entities, and prompt, which names it.
    """

    name = "ovsegmentor"
    Settings = OVSegmentorSettings
    Protocol = OVSegmentorProtocol
    ROWS_INDEPENDENT = False                              # BatchNorm
    FROZEN = ("backbone.trunk.",)
    TRAINING_ONLY = ("teacher.",)

    def __init__(self, settings, bank=(), training=False):
        super().__init__(settings, bank)
        image = settings.image
        if settings.patches == "frozen":
            self.backbone = VisionBackbone(**backbones.arguments(settings.backbone, training))
            if settings.backbone.weights in backbones.STORED:
                self.FROZEN = ()    # random weights exist nowhere else: a checkpoint holds them
            self.patch_size = self.backbone.patch_size                  # in pixels
            self.normalise = self.backbone.normalise
            self.image = ImageEncoder(image, self.backbone.width, patch=1)
        else:
            self.backbone = None
            self.patch_size = (image.patch, image.patch)
            self.normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD)
            self.image = ImageEncoder(image, 3, image.patch)
        if settings.text.encoder == "scratch":
            self.text = ScratchText(settings.text)
        else:
            self.text = Bert(settings.text.encoder, pretrained=training and settings.stage == 1)
        d, d_t = image.width, self.text.width
        self.decoder = EntityDecoder(d, d_t, image.heads)
        self.project_image = Projector(d, settings.hidden, settings.embedding)
        self.project_text = Projector(d_t, settings.hidden, settings.embedding)
        self.project_question = Projector(min(d, d_t), settings.hidden, settings.embedding)
        self.theta = nn.Parameter(torch.tensor(math.log(1 / 0.07)))     # logarithm of the scale
        self.teacher = None
        if training and settings.stage == 1:
            self.begin_stage_1()
        elif training:
            self.begin_stage_2()

    def begin_stage_1(self):
        """Initial values of a vision transformer, such as DINO's."""
        backbone = self.settings.backbone
        if self.settings.blocks_start == "identity":
            self.image.start_as_identity()
        if self.settings.patches == "convolution" and backbone.weights != "random":
            self.image.fill(create_trunk(backbone.name, backbone.weights))
        self.train()                        # a pretrained BERT comes in evaluation mode

    def begin_stage_2(self):
        """The tensors of stage 1, and a teacher; the text encoder no longer learns, though its
        dropout stays on."""
        path = self.settings.init
        stage_1 = load_model(path, method=self.name)
        then = as_mapping(stage_1.settings)
        now = as_mapping(self.settings)
        differ = (differences(ImageSettings, then["image"], now["image"])
                  + differences(SentenceSettings, then["text"], now["text"]))
        if differ:
            raise ValueError(f"init {path}: stage 1 had other settings: {'; '.join(differ)}")
        fill(self.state_dict(), stage_1.state_dict(), f"init {path} does not fit these settings")
        self.text.requires_grad_(False)
        self.teacher = copy.deepcopy(self.image).requires_grad_(False)

    def factors(self, name, parameter):
        """Weight decay on all but vectors: also on theta, the positions and the group tokens. The
        blocks of the image encoder have a rate of their own."""
        mixes = name.removeprefix("image.").startswith(MIXING)
        return float(parameter.ndim != 1), self.settings.blocks_rate if mixes else 1.0

    # Training

    @staticmethod
    def sample(pair, rng, settings):
        """A pair's image and texts; see the class. Texts are (T,) int64."""
        def tokens(text):
            return tokenize(text, settings.text.encoder, settings.text.context)

        question, entities = mask_entities(pair.caption, entity_forms(pair.bank))
        templates = read_templates("imagenet80")
        answer = answer_sentence(entities, templates[rng.integers(len(templates))])
        sample = {"image": random_view(pair, rng, settings), "caption": tokens(pair.caption),
                  "question": tokens(question), "answer": tokens(answer)}
        if settings.stage == 1:
            return sample
        drawn = pair.partner(rng)
        if drawn is None:                           # no entity: another view of the image itself
            view = random_view(pair, rng, settings)
            return {**sample, "partner": view, "prompt": sample["caption"]}
        partner, entity = drawn
        return {**sample, "partner": random_view(partner, rng, settings),
                "prompt": tokens(f"A photo of {pair.bank.names[entity]}")}

    def features(self, batch):
        """The batch with what the image encoder takes in place of images; see `maps`."""
        with self.autocast():
            maps = {name: self.maps(batch[name]) for name in ("image", "partner") if name in batch}
        return {**batch, **maps}

    @torch.no_grad()
    def maps(self, pixels):
        """uint8 (B, 3, H, W) -> what the image encoder takes (B, channels, H', W'): normalised
        pixels, zero-padded to whole patches, or the frozen backbone's patch tokens."""
        images = self.normalise(pixels)
        if self.backbone:
            _, patches, grid = self.backbone(images)                                # (B, N, D)
            patches = patches * patches.shape[-1] ** 0.5            # unit-norm -> values near 1
            return patches.transpose(1, 2).unflatten(2, grid)
        ph, pw = self.patch_size
        H, W = images.shape[-2:]
        return F.pad(images, (0, -W % pw, 0, -H % ph))

    def encode(self, batch):
        """Embeddings (B, D), not normalised, of image, caption, answer and of what completes the
        question; queries (B, K, d) and keys (B, N, d). In stage 2 also those of the teacher on the
        partner, and the fit of groups and prompt (B, K), all without gradient."""
        settings = self.settings
        with self.autocast():
            groups, queries, keys, _ = self.image(batch["image"])                   # (B, K, d)
            encoded = {"image": self.project_image(groups.mean(dim=1)),             # (B, D)
                       "caption": self.embed_text(batch["caption"]),
                       "queries": queries, "keys": keys}
            self.update_statistics(self.project_image, groups)
            if settings.entity_weight:
                encoded["completed"] = self.complete(groups, batch["question"])     # (B, D)
                encoded["answer"] = self.embed_text(batch["answer"])
            if self.teacher and settings.mask_weight:
                encoded |= self.teach(groups, batch)
        return encoded

    def embed_text(self, tokens):
        """Sentences, tokens (B, T) -> (B, D), not normalised."""
        hidden_states, sentence = self.text(tokens)                         # (B, T, d_t), (B, d_t)
        embedded = self.project_text(sentence)
        self.update_statistics(self.project_text, hidden_states)
        return embedded

    def complete(self, groups, tokens):
        """What the groups (B, K, d) answer to questions, tokens (B, T): (B, D)."""
        hidden_states, sentence = self.text(tokens)                         # (B, T, d_t), (B, d_t)
        self.update_statistics(self.project_text, sentence, hidden_states)
        is_text = tokens != 0 if self.settings.mask_padding else None
        decoded = self.decoder(groups, hidden_states, is_text)                      # (B, T, w)
        return self.project_question(self.text.sentence(decoded, tokens))

    @torch.no_grad()
    def teach(self, groups, batch):
        """What L_mask needs beside the student's queries. groups: the student's (B, K, d)."""
        own = self.project_image(groups, update=False)      # (B, K, D), counted in `encode`
        partner_groups, queries, keys, grid = self.teacher(batch["partner"])
        self.update_statistics(self.project_image, partner_groups.mean(dim=1), partner_groups)
        prompt = self.embed_text(batch["prompt"])                                   # (B, D)
        fit = torch.einsum("bkd,bd->bk", own.float(), prompt.float())               # r
        return {"teacher_queries": queries, "fit": fit,
                "teacher_keys": keys.unflatten(1, grid)}                            # (B, h, w, d)

    def update_statistics(self, projector, *unused):
        """Let features whose projection no loss uses move the running statistics (section 4)."""
        if self.training and self.settings.bn_double_pass:
            for x in unused:
                projector.update_statistics(x)

    def losses(self, encoded, batch):
        """loss and its parts; scale; the number of groups that own a patch."""
        settings = self.settings
        scale = self.scale()
        losses = {"contrast": contrastive_loss(encoded["image"], encoded["caption"], scale)}
        loss = losses["contrast"]
        if settings.entity_weight:
            losses["entity"] = contrastive_loss(encoded["completed"], encoded["answer"], scale)
            loss = loss + settings.entity_weight * losses["entity"]
        if "teacher_keys" in encoded:
            grid = encoded["teacher_keys"].shape[1:3]
            keys = encoded["teacher_keys"].flatten(1, 2)                            # (B, N, d)
            student, teacher = (enlarge(patch_logits(queries, keys), grid, settings.mask_size)
                                for queries in (encoded["queries"], encoded["teacher_queries"]))
            losses["mask"] = mask_loss(student, teacher, encoded["fit"], settings.mask_prediction)
            loss = loss + settings.mask_weight * losses["mask"]
        return {"loss": loss, **losses, "logit_scale": scale,
                "groups": groups_in_use(encoded["queries"], encoded["keys"])}

    def scale(self):
        return self.theta.exp().clamp(max=MAX_LOGIT_SCALE)

    def after_step(self, step, steps):
        if self.teacher:
            moving_average(self.teacher, self.image, TEACHER_RATE)

    # Inference (section 8)

    def embed_classes(self, classes, templates=("{}",)):
        text = self.settings.text

        def embed(prompts):
            tokens = [tokenize("".join(prompt), text.encoder, text.context) for prompt in prompts]
            return self.embed_text(torch.stack(tokens).to(self.device))

        return prompt_ensemble(classes, templates, embed, normalise_each=False)

    @torch.no_grad()
    def patch_scores(self, pixels, class_embeddings):
        """Every pixel has the scores of its group, in 0..1; see `Method`.

        With background = "threshold:T" they are moved by `score_background`."""
        groups, queries, keys, grid = self.image(self.maps(pixels))                 # (B, K, d)
        size = (grid[0] * self.patch_size[0], grid[1] * self.patch_size[1])         # (H', W')
        soft = patch_logits(queries, keys).softmax(dim=1).unflatten(-1, grid)       # (B, K, h, w)
        owner = F.interpolate(soft, size, mode="bilinear", align_corners=False).argmax(dim=1)

        fit = best_synonym(F.normalize(self.project_image(groups), dim=-1), class_embeddings)
        affinity = group_scores(self.scale() * fit.transpose(1, 2),
                                self.scale() * self.fit_images(groups, class_embeddings),
                                self.protocol.keep_classes)                         # (B, K, C)
        kind, _, threshold = (self.protocol.background or "").partition(":")
        if kind == "threshold":
            affinity = score_background(affinity, float(threshold))
        rows = torch.arange(len(owner), device=owner.device)[:, None, None]
        return affinity[rows, owner].permute(0, 3, 1, 2), size                      # (B, C, H', W')

    def fit_images(self, groups, class_embeddings):
        """Cosine similarities (B, C) of whole images, by their groups (B, K, d), and classes."""
        image = F.normalize(self.project_image(groups.mean(dim=1)), dim=-1)         # (B, D)
        return best_synonym(image[:, None], class_embeddings)[..., 0]

    @torch.no_grad()
    def image_scores(self, pixels, class_embeddings):
        return self.fit_images(self.image(self.maps(pixels))[0], class_embeddings)
