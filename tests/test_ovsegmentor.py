"""OVSegmentor: each formula by hand, where gradients go, and all that the scripts offer."""
import copy
import importlib.util
import json
import math
import os
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import eval
import groups
import segment
import train
from concepts import ConceptBank
from data import Pair
from machinery.files import fill
from machinery.names import CLASSES, read_classes, read_templates
from machinery.networks.checkpoint import load_model, save_model
from machinery.networks.release import RELEASES, needed
from machinery.settings import merge, read, read_recipe
from machinery.toy import toy_scene
from methods.ovsegmentor import (OVSegmentor, answer_sentence, contrastive_loss, entity_forms,
                                 group_scores, mask_distance, mask_entities, score_background)
from methods.parts import sentences
from methods.parts.grouping import (EntityDecoder, ImageEncoder, ImageSettings, Projector,
                                    assign_patches, group_sums, patch_logits)
from methods.parts.sentences import tokenize
from methods.parts.views import random_erase
from processes import check_resumed, check_two_processes
from reference import losses_of

B = 4                                               # images
K = 4                                               # groups
CONTEXT = 16                                        # text tokens
BANK = ["cow", "boat", "sea", "kite", "sky", "snow"]
CAPTIONS = ["a cow", "two boats on the sea", "a kite under the sky", "snow"]
IMAGE = {"width": 32, "heads": 4, "layers": 4, "patch": 8, "grid": 4, "group_tokens": 8,
         "groups": K, "drop_path": 0.0, "init_std": 0.2}
SMALL = {"backbone": {"weights": "random"}, "image": IMAGE, "embedding": 16, "hidden": 64,
         "text": {"encoder": "scratch", "width": 32, "heads": 2, "layers": 1, "context": CONTEXT},
         "mask_size": 16}                           # for images of 32 pixels
TOY = ["--recipe", "ovsegmentor-1-toy", "--batch", "8", "--steps", "8", "--image-size", "64",
       "--text-width", "16", "--drop-path", "0.2", "--set", "run.epoch_pairs=24", "--eval-data",
       "none", "--device", "cpu"]                   # a run of seconds
ENTITIES = ConceptBank.from_file(CLASSES / "entities-ovsegmentor.txt")


def settings_of(**changes):
    return read(OVSegmentor.Settings, merge(SMALL, changes), "test")


def encoder(**changes):
    """A small image encoder for images of 32 pixels."""
    return ImageEncoder(read(ImageSettings, {**IMAGE, **changes}, "test"), patch=8)


def tiny(**changes):
    """A small OVSegmentor in stage 1."""
    torch.manual_seed(0)
    return OVSegmentor(settings_of(**changes), BANK, training=True)


@pytest.fixture(scope="module")
def tiny_2(tmp_path_factory):
    """tiny_2(...): a small OVSegmentor in stage 2, with a teacher that differs a little from the
    student, or not at all."""
    init = tmp_path_factory.mktemp("init") / "model.safetensors"
    save_model(init, tiny(), {})

    def make(same_teacher=False, **changes):
        model = OVSegmentor(settings_of(stage=2, init=str(init), **changes), BANK, training=True)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in () if same_teacher else model.teacher.parameters():
                p.add_(0.02 * torch.randn_like(p))
        return model
    return make


def words(texts):
    return torch.stack([tokenize(text, "scratch", CONTEXT) for text in texts])


def batch_of(captions=CAPTIONS):
    """Toy scenes with captions, as `features` gets them."""
    forms = entity_forms(ConceptBank(BANK))
    scenes = [toy_scene(np.random.default_rng(i))[0][40:72, 40:72]
              for i in range(2 * len(captions))]
    images = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2)
    masked = [mask_entities(caption, forms) for caption in captions]
    return {"image": images[:len(captions)], "partner": images[len(captions):],
            "caption": words(captions), "question": words(question for question, _ in masked),
            "answer": words(answer_sentence(names, "a photo of the {}.") for _, names in masked),
            "prompt": words(f"A photo of {names[0]}" for _, names in masked)}


def reached(model, value):
    """Names of the parameters with a gradient of a value that is not zero."""
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


# --------------------------------------------------------------------------------------------------
# Data

def test_the_list_of_entities():
    """The authors' list: 73 names; 99 words, because "TV" and "tv" are one here; cake is number
    66. All 20 classes of Pascal VOC are among them, by the authors' own names of these."""
    assert len(ENTITIES.names) == 73 and len(ENTITIES.ids) == 99 and ENTITIES.names[66] == "cake"
    voc = [names for [names] in read_classes(CLASSES / "names" / "ovsegmentor-voc.txt")]
    assert len(voc) == 21
    for name in voc[1:]:
        assert ENTITIES.find(name.replace("person", "people")) >= 0, name


@pytest.mark.parametrize("caption, question, entities", [
    ("A cat sits on a wood chair.", "A [MASK] sits on a wood [MASK]", ["cat", "chair"]),
    ("Two women, a bus and some sheep", "Two women, a [MASK] and some [MASK]", ["bus", "sheep"]),
    ("Dogs chase the dog's couch", "[MASK] chase the dogs [MASK]", ["dog", "sofa"]),
    ("a T-shirt and dogs near a dog", "a T-shirt and [MASK] near a [MASK]", ["dog"]),
    ("nothing here", "nothing here", []),
])
def test_questions_by_hand(caption, question, entities):
    """Entity words, their plurals and synonyms become [MASK], one each. A word with a comma or an
    apostrophe is none. Apostrophes are removed."""
    assert mask_entities(caption, entity_forms(ENTITIES)) == (question, entities)


def test_answers_name_each_entity_once():
    """An answer is a template up to its {}, and the names; no template leaves a brace. Without an
    entity it is the bare prefix."""
    assert answer_sentence(["cat", "chair"], "a blurry photo of the {}.") == (
        "a blurry photo of the cat and chair")
    for template in read_templates("imagenet80"):
        answer = answer_sentence(["cat", "sofa"], template)
        assert answer.endswith("cat and sofa") and "{" not in answer and "}" not in answer
    assert answer_sentence([], "a photo of a {}.") == "a photo of a "


def test_the_mask_is_one_token():
    """Each [MASK] of a question is one token, below the end token's id, by which the end is
    found."""
    tokens = tokenize("A [MASK] sits on a [MASK]", "scratch", CONTEXT)
    assert tokens.tolist().count(49405) == 2
    assert tokens.argmax() == 7 and tokens[7] == 49407 and not tokens[8:].any()


def pair_of(image, caption, partner=None):
    """A pair with an image (H, W, 3), to be cropped to 32 pixels, and what its partner is."""
    return Pair(image, 32, caption, bank=ConceptBank(BANK), find_partner=lambda rng: partner)


def test_samples_depend_on_their_generators_alone():
    """The same generators give the same sample, RandAugment and erasing included; others give
    another."""
    pair = pair_of(toy_scene(np.random.default_rng(0))[0], "two boats on the sea")
    settings = settings_of(rand_augment="rand-m9-mstd0.5-inc1", erase=1.0)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)                     # as data.py does
        drawn.append(OVSegmentor.sample(pair, np.random.default_rng(seed), settings))
    one, two, other = drawn
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["image"], other["image"])
    assert torch.equal(one["question"], words(["two [MASK] on the [MASK]"])[0])


def test_an_erased_rectangle_is_noise():
    """A rectangle of some 2 to 33 % of the image becomes noise; the rest stays to the bit."""
    image = torch.arange(192, dtype=torch.uint8).view(3, 1, 64).repeat(1, 64, 1)
    torch.manual_seed(0)
    changed = (random_erase(image, 1.0) != image).any(dim=0)                        # (64, 64)
    assert 0.015 < changed.any(dim=1).sum() * changed.any(dim=0).sum() / 64 ** 2 < 0.35
    assert torch.equal(random_erase(image, 0.0), image)


def test_partners_share_an_entity():
    """In stage 2 a sample has another image with an entity of the caption, and a prompt with its
    name; a caption without entities gets a second view of its own image."""
    own = np.full((40, 40, 3), (250, 0, 0), np.uint8)
    other = np.full((40, 40, 3), (0, 0, 250), np.uint8)
    settings = settings_of(stage=2, init="x")
    rng = np.random.default_rng(0)
    partner = (pair_of(other, "the sea"), BANK.index("sea"))
    sample = OVSegmentor.sample(pair_of(own, "a boat on the sea", partner), rng, settings)
    assert sample["partner"][2].min() == 250 and sample["image"][0].min() == 250
    assert torch.equal(sample["prompt"], words(["A photo of sea"])[0])
    sample = OVSegmentor.sample(pair_of(own, "a boat on the sea"), rng, settings)
    assert sample["partner"][0].min() == 250
    assert torch.equal(sample["prompt"], sample["caption"])


# --------------------------------------------------------------------------------------------------
# Recipe

def rates(steps, recipe):
    settings = read(train.RunSettings, read_recipe(recipe)["run"], recipe)
    peak = settings.base_rate * settings.batch / 256
    return lambda step: train.learning_rate(step, steps, peak, settings)


def test_the_rates_of_both_stages():
    """With 1,953 steps a pass the rates are the published ones; the cosine counts from step 0."""
    rate = rates(30 * 1953, "ovsegmentor-1")
    for step, expected in {0: 8e-6, 1953: 1.64e-4, 3905: 3.1992e-4, 3906: 3.17378e-4,
                           29295: 2.0e-4, 58590: 8e-5}.items():
        assert rate(step) == pytest.approx(expected, rel=1e-5), step
    rate = rates(1000, "ovsegmentor-2")
    assert [rate(step) for step in (0, 500, 1000)] == pytest.approx([2.5e-6, 1.375e-6, 2.5e-7])


# --------------------------------------------------------------------------------------------------
# Model

def test_published_numbers_of_parameters():
    """Encoder, binding, projector and entity decoder of the ViT-B have as many parameters as the
    authors'."""
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        image = ImageEncoder(ImageSettings())
        assert count(Projector(768, 4096, 256)) == 4_206_848
        assert count(EntityDecoder(768, 768, 8)) == 14_180_352
    binding = image.binding
    assert count(image) == 100_053_128 and count(image.blocks) == 85_054_464
    assert count(binding) == 14_206_856
    assert count(binding.mix) == 28_040 and count(binding.cross) == 7_087_872
    assert count(binding.mlp) == 4_722_432


def test_each_patch_has_one_group():
    """In evaluation a patch goes to its most probable group; in training to one drawn with the
    softmax's probabilities. Forward it is one-hot, backward the softmax's gradient."""
    logits = torch.tensor([[[2.0], [1.0], [0.0]]], requires_grad=True)              # (1, K, N)
    member = assign_patches(logits)
    torch.testing.assert_close(member[0, :, 0], torch.tensor([1.0, 0, 0]))
    member[0, 1, 0].backward()
    p = logits.detach().softmax(dim=1)[0, :, 0]
    torch.testing.assert_close(logits.grad[0, :, 0], p[1] * (torch.tensor([0.0, 1, 0]) - p))

    torch.manual_seed(0)
    many = logits.detach().expand(1, 3, 20_000)
    noise = -torch.empty_like(many).exponential_().log()
    drawn = assign_patches(many, noise).mean(dim=-1)[0]
    torch.testing.assert_close(drawn, p, atol=0.01, rtol=0)


def test_a_groups_weights_sum_to_less_than_one():
    """n patches weigh n / (n + 1) together: 2, 4, 4 patches .6667, .8, .8; none weigh 0, and the
    group then gets exactly the bias of the output map."""
    owner = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    member = F.one_hot(owner, 4).T[None].float()                                    # (1, K, N)
    sums = group_sums(member, torch.ones(1, 10, 1))[0, :, 0]
    torch.testing.assert_close(sums, torch.tensor([2 / 3, 0.8, 0.8, 0]))
    binding = encoder().binding
    assert torch.equal(binding.proj(sums[3:, None].expand(1, 32)), binding.proj.bias[None])


def test_logits_are_scaled_dot_products():
    """L = q k' / sqrt(d), by hand; the softmax over groups sums to 1 in each patch."""
    queries = torch.tensor([[[1.0, 2, 0, 0], [0, 0, 2, 2]]])
    keys = torch.tensor([[[2.0, 1, 1, 1], [0, 0, 3, 0], [4, 0, 0, 4]]])
    logits = patch_logits(queries, keys)
    assert logits.tolist() == [[[2, 0, 2], [2, 3, 4]]]
    torch.testing.assert_close(logits.softmax(dim=1).sum(dim=1), torch.ones(1, 3))


def test_positions_at_other_sizes():
    """At the training size the table is used as it is; elsewhere a constant stays constant, and the
    table is as large as the grid."""
    image = encoder()
    assert image.positions(4, 4) is image.pos_embed
    with torch.no_grad():
        image.pos_embed.copy_(torch.arange(32.0).expand_as(image.pos_embed))
    torch.testing.assert_close(image.positions(8, 6), torch.arange(32.0).expand(1, 48, 32))


def test_weights_of_a_vision_transformer():
    """The encoder takes timm's patch convolution, positions without the class row, blocks and last
    norm; another shape is refused in one line."""
    trunk = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32,
                              depth=4, num_heads=4, num_classes=0)
    image = encoder()
    image.fill(trunk)
    assert torch.equal(image.pos_embed, trunk.pos_embed[:, 1:])
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(image.patch_embed(x).flatten(2).transpose(1, 2),
                               trunk.patch_embed(x))
    tokens = torch.randn(2, 5, 32)
    with torch.no_grad():                           # timm's LayerNorm has another epsilon, 1e-6
        expected = trunk.eval().norm(trunk.blocks(tokens))
        for block in image.eval().blocks:
            tokens = block(tokens)
    torch.testing.assert_close(image.norm(tokens), expected, rtol=1e-3, atol=1e-3)
    for changes in ({"width": 16}, {"grid": 3}):
        with pytest.raises(ValueError, match="does not fit width, layers, patch and grid"):
            encoder(**changes).fill(trunk)


def test_the_decoder_sees_groups_as_a_set():
    """Permuting the groups changes nothing. Padding does, unless it is masked."""
    torch.manual_seed(0)
    decoder = EntityDecoder(32, 24, 4)              # the image's features are made narrower
    groups = torch.randn(2, 8, 32)
    question = torch.randn(2, 6, 24)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    base = decoder(groups, question)
    torch.testing.assert_close(decoder(groups[:, torch.randperm(8)], question), base, atol=1e-5,
                               rtol=0)
    padded = question.clone()
    padded[:, 4:] += torch.randn(2, 2, 24)
    assert not torch.allclose(decoder(groups, padded)[:, :4], base[:, :4])
    torch.testing.assert_close(decoder(groups, padded, mask)[:, :4],
                               decoder(groups, question, mask)[:, :4])


def test_a_sentence_is_its_end_token():
    """The scratch text encoder gives the state at the end token, which padding does not change."""
    text = tiny().eval().text
    hidden_states, end = text(words(["a cow", "two boats on the sea"]))
    assert torch.equal(end, hidden_states[[0, 1], [3, 6]])
    torch.testing.assert_close(text(words(["a cow"])[:, :6])[1], end[:1])


# --------------------------------------------------------------------------------------------------
# Losses

def test_contrastive_loss_by_hand():
    """B identical rows: ln B; orthonormal pairs: ln(1 + 3 exp(-1 / 0.07)); symmetric."""
    same = torch.ones(4, 6)
    scale = torch.tensor(1 / 0.07)
    assert contrastive_loss(same, same, scale).item() == pytest.approx(math.log(4), abs=1e-5)
    eye = 3 * torch.eye(4)
    assert contrastive_loss(eye, eye, scale).item() == pytest.approx(1.87e-6, abs=1e-6)
    a, b = torch.randn(2, 4, 6)
    torch.testing.assert_close(contrastive_loss(a, b, scale), contrastive_loss(b, a, scale))


def test_theta():
    """exp(theta) starts at 1 / 0.07 and is at most 100. Theta has weight decay, as have positions
    and group tokens; vectors have none. All have one rate."""
    model = tiny()
    decayed, others = model.parameter_groups()
    assert (decayed["decay"], others["decay"]) == (1.0, 0.0)
    assert decayed["rate"] == others["rate"] == 1.0
    assert {p.ndim for p in others["params"]} == {1}
    assert {p.ndim for p in decayed["params"]} == {0, 2, 3, 4}
    assert model.scale().item() == pytest.approx(1 / 0.07)
    model.theta.data.fill_(9.0)
    assert model.scale().item() == 100


def test_blocks_that_start_gently():
    """With blocks_start = "identity" neither the blocks nor the look at the patches change a vector
    at first, though they learn; all else starts as before. blocks_rate is the rate of these alone,
    whatever their weight decay."""
    usual = tiny()
    gentle = tiny(blocks_start="identity", blocks_rate=0.1)
    x = torch.randn(2, 6, 32)
    for layer in gentle.image.blocks:
        assert torch.equal(layer(x), x)
    cross = gentle.image.binding.cross
    assert torch.equal(cross(x, torch.randn(2, 9, 32)), cross.norm2(x))
    differ = {name for name, p in gentle.named_parameters()
              if not torch.equal(p, usual.get_parameter(name))}
    assert differ <= reached(gentle, losses_of(gentle, batch_of())["loss"])
    mixing = {id(p) for part in (gentle.image.blocks, cross) for p in part.parameters()}
    found = gentle.parameter_groups()
    slow = {id(p) for group in found for p in group["params"] if group["rate"] == 0.1}
    assert slow == mixing and {group["rate"] for group in found} == {0.1, 1.0}
    assert sum(len(group["params"]) for group in found) == len(gentle.trained())


ONE = torch.tensor([[[0.0, 1, 2, 4]]])                                              # (1, 1, P)
TWO = torch.tensor([[[0.0, 1, 2, 4], [4, 0, 0, 1]]])                                # (1, 2, P)


def test_mask_distance_by_hand():
    """One group: target (0,1,1,1), prediction (0,.25,.5,1), D = 1 - 4.5/5.75. Two: 1 - 7/9, also
    with the teacher's in the other order. With a sigmoid: the ratio written out."""
    assert mask_distance(ONE, ONE).item() == pytest.approx(0.217391, abs=1e-6)
    for teacher in (TWO, TWO.flip(1)):
        assert mask_distance(TWO, teacher).item() / 2 == pytest.approx(0.111111, abs=1e-6)
    p = ONE.sigmoid()
    expected = 1 - (2 * p[..., 1:].sum() + 1) / (p.sum() + 3 + 1)
    torch.testing.assert_close(mask_distance(ONE, ONE, "sigmoid"), expected[None])


def test_flat_masks():
    """Teacher's logits near 0 make every pixel foreground; a constant student's map is finite."""
    teacher = torch.tensor([[[-0.3, 0.0, 0.2]]])
    student = torch.tensor([[[0.0, 1, 2]]])
    expected = 1 - (2 * 1.5 + 1) / (1.5 + 3 + 1)    # target all ones
    assert mask_distance(student, teacher).item() == pytest.approx(expected)
    constant = torch.ones(1, 1, 3, requires_grad=True)
    mask_distance(constant, teacher).sum().backward()
    assert constant.grad.isfinite().all()


def test_the_total(tiny_2):
    """Stage 1: contrast + entity; stage 2: + 0.1 mask, exactly. A weight of 0 leaves a part out."""
    losses = losses_of(tiny(), batch_of())
    assert losses["loss"] == losses["contrast"] + losses["entity"] and "mask" not in losses
    losses = losses_of(tiny_2(), batch_of())
    assert losses["loss"] == losses["contrast"] + losses["entity"] + 0.1 * losses["mask"]
    losses = losses_of(tiny_2(entity_weight=0.0, mask_weight=0.0), batch_of())
    assert losses["loss"] == losses["contrast"] and {"entity", "mask"}.isdisjoint(losses)


def test_half_of_the_groups_learn(tiny_2):
    """The K / 2 groups that fit the prompt worst get exactly no gradient from L_mask, the others
    some."""
    model = tiny_2().eval()
    batch = model.features(batch_of())
    encoded = model.encode(batch)
    loss = model.losses(encoded, batch)["mask"]
    gradient = torch.autograd.grad(loss, encoded["queries"])[0].abs().sum(dim=-1)   # (B, K)
    with torch.no_grad():
        own = model.project_image(model.image(batch["image"])[0])
        fit = (own * model.embed_text(batch["prompt"])[:, None]).sum(dim=-1)        # (B, K)
    worst = torch.zeros(B, K, dtype=torch.bool).scatter(1, fit.argsort(dim=1)[:, :K // 2], True)
    assert (gradient[worst] == 0).all() and (gradient[~worst] > 0).all()


def test_what_the_mask_loss_trains(tiny_2):
    """Patch convolution, positions, group tokens, the lower blocks, and of the binding block what
    the queries need; no keys, values, upper blocks, projectors, text or teacher."""
    model = tiny_2()
    found = reached(model, losses_of(model, batch_of())["mask"])
    lower = ("image.patch_embed.", "image.pos_embed", "image.group_tokens", "image.blocks.0.",
             "image.blocks.1.", "image.binding.norm_tokens.", "image.binding.norm_patches.",
             "image.binding.mix.", "image.binding.norm_groups.", "image.binding.cross.",
             "image.binding.query.")
    expected = {name for name, _ in model.named_parameters() if name.startswith(lower)}
    assert found == expected


def test_what_the_other_losses_train(tiny_2):
    """L_contrast trains no decoder, L_entity not the image's projector; both all else but what
    feeds only the other. In stage 2 the text encoder is frozen, and the teacher always."""
    model = tiny()
    contrast = reached(model, losses_of(model, batch_of())["contrast"])
    entity = reached(model, losses_of(model, batch_of())["entity"])
    assert not [name for name in contrast if name.startswith(("decoder.", "project_question."))]
    assert not [name for name in entity if name.startswith("project_image.")]
    for part in ("image.binding.value.weight", "image.blocks.3.mlp.fc1.weight", "theta",
                 "text.tower.positional_embedding", "project_text.fc1.weight"):
        assert part in contrast and part in entity, part
    assert {"decoder.cross.attn.in_proj_weight", "project_question.fc2.weight"} <= entity
    model = tiny_2()
    assert not [name for name in model.trained() if name.startswith(("text.", "teacher."))]
    assert model.text.training and model.teacher.training


def test_what_batch_norm_counts(tiny_2):
    """In a step of stage 2 the running statistics move 8 times for text, 4 times for images, once
    for the decoder; without the double pass 3, 1, 1. The losses are the same."""
    found = {}
    for double in (True, False):
        model = tiny_2(bn_double_pass=double)
        torch.manual_seed(0)
        found[double] = losses_of(model, batch_of())
        moved = [int(part.norm.num_batches_tracked)
                 for part in (model.project_text, model.project_image, model.project_question)]
        assert moved == ([8, 4, 1] if double else [3, 1, 1])
    assert torch.equal(found[True]["loss"], found[False]["loss"])


def test_the_teacher_follows(tiny_2):
    """From equal weights, a change of the student moves the teacher by 0.01 of it."""
    model = tiny_2(same_teacher=True)
    before = copy.deepcopy(model.teacher.state_dict())
    with torch.no_grad():
        for p in model.image.parameters():
            p.add_(1.0)
    model.after_step(0, 10)
    for name, p in model.teacher.named_parameters():
        torch.testing.assert_close(p - before[name], torch.full_like(p, 0.01), atol=1e-6, rtol=0)


# --------------------------------------------------------------------------------------------------
# Several processes, whole runs

def test_two_processes_are_one(tmp_path, tiny_2):
    """Two processes with half a batch each have the losses and gradients of one with all of it,
    Gumbel's noise included."""
    check_two_processes(tmp_path, tiny_2(), batch_of(), rounding=1e-5)      # of mix.fc2.bias


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory):
    """Checkpoint of a run of stage 1."""
    folder = tmp_path_factory.mktemp("ovsegmentor")
    train.main([*TOY, "--output", str(folder)])
    return str(folder / "model.safetensors")


def test_stage_2_goes_on_and_resumes(stage_1, tmp_path):
    """Stage 2 starts from the weights of stage 1. Ended and resumed it is the uninterrupted run bit
    by bit: losses, noise, running statistics, and the teacher, which the losses show."""
    two = [*TOY, "--stage", "2", "--init", stage_1]
    train.main([*two, "--output", str(tmp_path / "whole")])
    check_resumed(tmp_path / "whole", tmp_path / "resumed", OVSegmentor, 5, two)
    start, end = (load_model(path).state_dict() for path in (stage_1, tmp_path / "whole"))
    assert start.keys() == end.keys()               # no teacher in a checkpoint
    frozen = [name for name in start if name.startswith("text.")]
    assert frozen and all(torch.equal(start[name], end[name]) for name in frozen)
    moved = (end["image.binding.query.weight"] - start["image.binding.query.weight"]).abs().max()
    assert 0 < moved < 0.05


def test_mistakes_in_settings(stage_1, checkpoint, tmp_path, fails):
    """Settings that do not go together end the run in one line."""
    start = [*TOY, "--output", tmp_path]
    two = [*start, "--stage", "2", "--init"]
    fails(train.main, [*start, "--stage", "2"], "stage 2 with init None")
    fails(train.main, [*start, "--init", stage_1], "stage 1 with init")
    fails(train.main, [*two, checkpoint], "is a checkpoint of simzss")
    fails(train.main, [*two, stage_1, "--heads", "2"], "init", "heads was 4, is 2")
    fails(train.main, [*two, stage_1, "--embedding", "9"], "does not fit these settings")
    fails(train.main, [*start, "--groups", "0"], "groups is 0; expected at least 1")
    fails(train.main, [*start, "--heads", "3"], "the width 64 is no multiple of the 3 heads")
    fails(train.main, [*start, "--text-width", "6"], "the entity decoder is", "6")
    for changes, words in [({"least_area": 2}, "least_area is 2.0"),
                           ({"backbone": {"mean": [0, 0, 0]}}, 'are for patches = "frozen"'),
                           ({"backbone": {"image_token": "mean"}}, "image_token mean"),
                           ({"text": {"context": 100}}, "text: context is 100; .* at most 77")]:
        with pytest.raises(ValueError, match=words):
            settings_of(**changes)


# --------------------------------------------------------------------------------------------------
# Inference

LOGITS = torch.tensor([[[4.0, 1, 0], [0, 2, 1]]])                                   # (1, K, C)


def test_group_scores_by_hand():
    """softmax squared where no class is left out; the classes that fit the image worst score 0."""
    found = group_scores(LOGITS, torch.zeros(1, 3), keep=5)
    expected = torch.tensor([[[.87654, .00217, .00029], [.00811, .44255, .05989]]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.manual_seed(0)
    found = group_scores(torch.randn(1, 8, 7), torch.arange(7.0)[None], keep=5)
    assert not found[..., :2].any() and (found[..., 2:] > 0).all()
    assert (found.sum(dim=-1) <= 1).all()


class FixedImage(torch.nn.Module):
    """An image encoder that finds two groups: the left one of four columns, and the others."""

    def forward(self, maps):
        queries = torch.zeros(1, 2, 32)
        queries[0, :, 0] = torch.tensor([9.0, -9])
        keys = torch.zeros(1, 16, 32)
        keys[0, :, 0] = torch.tensor([9.0, -9, -9, -9]).repeat(4)
        return torch.eye(2)[None], queries, keys, (4, 4)


def test_pixels_have_the_scores_of_their_groups():
    """The first 8 of 32 columns of pixels, one patch, get the first group's scores, the others the
    second's: the border of two sure patches lies half-way between their centres. (With corners
    aligned it would be half-way between the centres of stretched patches, after 6 columns.) The
    grid covers whole patches. With a threshold of 0.95 only the best group stays above it, with 0.3
    both."""
    model = tiny().eval()
    model.image = FixedImage()
    model.project_image = torch.nn.Identity()
    model.theta.data.fill_(0.0)                     # a scale of 1, so that ...
    classes = LOGITS[0].T                           # ... group k has the logits (k, :)
    pixels = torch.zeros(1, 3, 32, 30, dtype=torch.uint8)
    scores, size = model.patch_scores(pixels, classes)
    assert size == (32, 32) and scores.shape == (1, 3, 32, 32)
    expected = torch.tensor([[.87654, .00217, .00029], [.00811, .44255, .05989]])
    torch.testing.assert_close(scores[0, :, 0, 0], expected[0], atol=1e-5, rtol=0)
    assert (scores[0, :, :, :8] == scores[0, :, :1, :1]).all()
    torch.testing.assert_close(scores[0, :, 5, 8:], expected[1, :, None].expand(3, 24), atol=1e-5,
                               rtol=0)
    for threshold, right_is_background in ((0.95, True), (0.3, False)):
        model.protocol.background = f"threshold:{threshold}"
        best = model.patch_scores(pixels, classes)[0][0].amax(dim=0)
        assert (best[:, :8] > threshold).all()
        assert ((best[:, 8:] <= threshold) == right_is_background).all()


def test_the_background_rule_of_the_authors():
    """Over the mean of three windows, a threshold on the moved scores is the authors' rule: a
    channel that is 1 where the best class scores less than min(T, the window's best group)."""
    torch.manual_seed(0)
    affinity = torch.rand(3, 200, 5) ** 3           # windows, groups = pixels, classes
    threshold = 0.6
    best = affinity.amax(dim=2)                                                     # (3, 200)
    needed = best.amax(dim=1, keepdim=True).clamp(max=threshold)
    background = (best < needed).float()[..., None]                                 # (3, 200, 1)
    expected = torch.cat([background, affinity], dim=2).mean(dim=0).argmax(dim=1)   # (200,)
    found, index = score_background(affinity, threshold).mean(dim=0).max(dim=1)
    assert torch.equal(torch.where(found <= threshold, 0, index + 1), expected)
    assert 0 < (expected == 0).sum() < 200


def test_class_embeddings():
    """A class is the mean of its prompts before they are normalised, and then unit-norm."""
    model = tiny().eval()
    templates = ("a photo of a {}.", "the {}")
    found = model.embed_classes([["cow", "boat"], "sea"], templates)
    with torch.no_grad():
        both = model.embed_text(words(["a photo of a boat.", "the boat"])).mean(dim=0)
    torch.testing.assert_close(found[0, 1], F.normalize(both, dim=0))
    assert found.shape == (2, 2, 16) and torch.equal(found[1, 0], found[1, 1])


def test_it_scores_and_segments(stage_1, folder, tmp_path):
    """eval.py and segment.py work with it as they are, with a background and its own settings at
    test time; whole images have cosines."""
    output = tmp_path / "result.json"
    eval.main(["--dataset", str(folder), "--checkpoint", stage_1, "--device", "cpu", "--background",
               "threshold:0.5", "--set", "protocol.keep_classes=2", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["method"] == "ovsegmentor" and 0 <= result["mIoU"] <= 1
    assert result["protocol"]["keep_classes"] == 2 and result["protocol"]["templates"] == "photo"
    segment.main([str(folder / "images" / "photo0.png"), "--classes", "cow, grass", "--checkpoint",
                  stage_1, "--output", str(tmp_path)])
    assert json.loads((tmp_path / "photo0.json").read_text())["names"] == ["cow", "grass"]
    model = load_model(stage_1)
    pixels = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    cosines = model.image_scores(pixels, model.embed_classes(["cow", "grass"]))
    assert cosines.shape == (2, 2) and cosines.abs().max() <= 1 + 1e-6


def test_a_picture_of_groups(stage_1, tmp_path, capsys):
    """tests/groups.py prints how well groups follow regions and draws them: 12 titled panels an
    image, and a legend of the classes."""
    groups.main([stage_1, str(tmp_path / "groups.png"), "--images", "2", "--show", "0", "5"])
    assert re.search(r"of 8 groups in use, oracle mIoU [\d.]+%", capsys.readouterr().out)
    width, height = Image.open(tmp_path / "groups.png").size
    assert width > 12 * groups.WIDTH and height > 2 * groups.WIDTH


# --------------------------------------------------------------------------------------------------
# Published checkpoints

# Modules, the authors' and ours, of a network with two blocks in each half
PUBLISHED = [line.split() for line in """
    img_encoder.patch_embed.proj                        image.patch_embed
    img_encoder.layers.0.blocks.0                       image.blocks.0
    img_encoder.layers.0.blocks.1                       image.blocks.1
    img_encoder.layers.1.blocks.0                       image.blocks.2
    img_encoder.layers.1.blocks.1                       image.blocks.3
    img_encoder.norm                                    image.norm
    img_encoder.layers.0.downsample.norm_tokens         image.binding.norm_tokens
    img_encoder.layers.0.downsample.norm_x              image.binding.norm_patches
    img_encoder.layers.0.downsample.mlp_inter           image.binding.mix
    img_encoder.layers.0.downsample.norm_post_tokens    image.binding.norm_groups
    img_encoder.layers.0.downsample.assign.q_proj       image.binding.query
    img_encoder.layers.0.downsample.assign.k_proj       image.binding.key
    img_encoder.layers.0.downsample.assign.v_proj       image.binding.value
    img_encoder.layers.0.downsample.assign.proj         image.binding.proj
    img_encoder.layers.0.downsample.norm_new_x          image.binding.norm
    img_encoder.layers.0.downsample.mlp_channels        image.binding.mlp
    multimodal_groupingblock.blocks.0.norm_tokens       decoder.norm_text
    multimodal_groupingblock.blocks.0.norm_x            decoder.norm_groups
    multimodal_groupingblock.blocks.0.post_attn         decoder.block
    multimodal_groupingblock.blocks.0.norm_new_x        decoder.norm
    multimodal_groupingblock.align_proj_img             decoder.narrow_image
    multimodal_groupingblock.align_proj_text            decoder.narrow_text
    text_encoder.transformer                            text.bert""".strip().splitlines()]
CROSS = {"img_encoder.layers.0.downsample.pre_assign_attn": "image.binding.cross",
         "multimodal_groupingblock.blocks.0.pre_assign_attn": "decoder.cross"}
PROJECTORS = {"img_projector": "project_image", "text_projector": "project_text",
              "bridge_projector": "project_question"}


def published(ours):
    """Our tensors as the authors publish theirs, with those that segmenting does not need."""
    theirs = {"logit_scale": ours["theta"], "img_encoder.pos_embed": ours["image.pos_embed"][0],
              "img_encoder.layers.0.group_token": ours["image.group_tokens"]}

    def add(module, our_module, change=lambda value: value):
        theirs.update({module + name.removeprefix(our_module): change(value)
                       for name, value in ours.items() if name.startswith(f"{our_module}.")})

    for module, our_module in PUBLISHED:
        add(module, our_module)
    for module, our_module in CROSS.items():
        for part, our_part in (("attn.proj", "attn.out_proj"), ("norm2", "norm1"), ("mlp", "mlp"),
                               ("norm_post", "norm2")):
            add(f"{module}.{part}", f"{our_module}.{our_part}")
        for kind in ("weight", "bias"):
            joined = ours[f"{our_module}.attn.in_proj_{kind}"]
            width = len(joined) // 3
            for i, part in enumerate("qkv"):
                theirs[f"{module}.attn.{part}_proj.{kind}"] = joined[i * width:(i + 1) * width]
    for module, our_module in PROJECTORS.items():
        for part, our_part in (("linear_hidden.0", "fc1"), ("linear_out", "fc2")):
            add(f"{module}.{part}", f"{our_module}.{our_part}",     # convolutions of one step
                lambda value: value[..., None] if value.ndim == 2 else value)
        add(f"{module}.linear_hidden.1", f"{our_module}.norm")
    teacher = {name.replace("img_encoder.", "img_encoder_momentum."): value
               for name, value in theirs.items() if name.startswith("img_encoder.")}
    unused = ("logit_scale_mask", "multimodal_groupingblock.blocks.0.assign.q_proj.weight",
              "text_encoder.transformer.pooler.dense.bias",
              "text_encoder.transformer.embeddings.position_ids")
    return {**theirs, **teacher, **dict.fromkeys(unused, torch.ones(2))}


def randomised(model):
    """The model with other values everywhere: ones and zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(0.5 + 0.2 * torch.rand(value.shape, generator=generator))
    return model.eval()


IMAGE_8 = {**IMAGE, "heads": 8}                     # heads cannot be seen in a file: 8


@torch.no_grad()
def test_a_published_checkpoint_is_taken_whole(capsys):
    """Each tensor but the text encoder's comes back from its published name and shape, the
    settings come from the shapes, and of heads, which have none, the user is told; a tensor more or
    less is refused by the authors' name."""
    model = randomised(tiny(image=IMAGE_8))
    ours = {name: value for name, value in model.checkpoint().items()
            if not name.startswith("text.")}
    theirs = published(ours)
    release = RELEASES["ovsegmentor"]
    found = read(OVSegmentor.Settings, release.settings(theirs, "x.pth", None, None), "test")
    assert "heads cannot be seen, and 8 are taken" in capsys.readouterr().err
    assert (found.stage, found.embedding, found.hidden, found.patches) == (2, 16, 64, "convolution")
    sizes = ("width", "heads", "layers", "patch", "grid", "group_tokens", "groups")
    assert [getattr(found.image, name) for name in sizes] == [IMAGE_8[name] for name in sizes]
    assert found.text.encoder == "bert-base-uncased" and found.text.context == 77

    def take(theirs):
        empty = {name: torch.zeros_like(value) for name, value in ours.items()}
        expected = release.tensors(empty)
        fill(expected, needed(theirs, expected, release), "x.pth")
        return empty

    taken = take(theirs)
    assert all(torch.equal(taken[name], value) for name, value in ours.items())
    key = "img_encoder.layers.0.downsample.pre_assign_attn.attn.k_proj.bias"
    without = {name: value for name, value in theirs.items() if name != key}
    for wrong, words in [({**theirs, "img_encoder.more": torch.ones(1)}, "1 unexpected: img_enc"),
                         (without, f"missing: {key}"),
                         ({**theirs, key: torch.ones(3)}, "misshapen")]:
        with pytest.raises(ValueError, match=words):
            take(wrong)
    with pytest.raises(ValueError, match="img_encoder.pos_embed has shape"):
        release.settings({**theirs, "img_encoder.pos_embed": torch.ones(())}, "x.pth", None, None)
    with pytest.raises(ValueError, match="leave --backbone and --image-token out"):
        release.settings(theirs, "x.pth", "test_vit", None)


@torch.no_grad()
def test_published_queries_keys_and_values():
    """The maps that are three in a published file are one here, in torch's order: attention worked
    out with the three is the layer's."""
    model = randomised(tiny(image=IMAGE_8))
    cross = model.decoder.cross.attn
    start = "multimodal_groupingblock.blocks.0.pre_assign_attn.attn."
    theirs = {name.removeprefix(start): value
              for name, value in published(model.state_dict()).items() if name.startswith(start)}
    tokens, context = torch.randn(2, 5, 32)
    q, k, v = (F.linear(x, theirs[f"{part}_proj.weight"], theirs[f"{part}_proj.bias"])
               .unflatten(1, (8, 4)).transpose(0, 1)
               for part, x in (("q", tokens), ("k", context), ("v", context)))      # (8, 5, 4)
    mixed = (q @ k.mT / 2).softmax(dim=-1) @ v
    expected = F.linear(mixed.transpose(0, 1).flatten(1), theirs["proj.weight"],
                        theirs["proj.bias"])
    torch.testing.assert_close(cross(tokens, context, context)[0], expected)


# --------------------------------------------------------------------------------------------------
# BERT

def test_without_transformers(tmp_path, fails):
    """Asked for where the package is missing, BERT is refused with the install command."""
    if importlib.util.find_spec("transformers"):
        pytest.skip("the package transformers is there")
    fails(train.main, [*TOY, "--text", "bert-base-uncased", "--output", tmp_path],
          "pip install transformers")


@pytest.fixture
def bert(tmp_path):
    """Folder of a BERT of width 16 with a vocabulary of a few words."""
    transformers = pytest.importorskip("transformers", reason="the optional package transformers")
    folder = tmp_path / "bert"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##s", "cow", "boat", "photo"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = transformers.BertConfig(vocab_size=len(vocabulary), hidden_size=16,
                                     num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=32)
    torch.manual_seed(0)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def test_a_bert(bert, tmp_path):
    """A pretrained BERT trains: its words are WordPieces, [MASK] is its mask token, a sentence is
    its first token whatever the padding; the checkpoint holds its weights."""
    tokens = tokenize("A [MASK] and cows", bert, 10)
    assert tokens.tolist() == [2, 5, 4, 1, 7, 6, 3, 0, 0, 0]
    built = tiny(text={"encoder": bert})
    assert built.training and built.text.bert.training      # its dropout is on
    text = sentences.Bert(bert, pretrained=True).eval()
    hidden_states, sentence = text(tokens[None])
    assert torch.equal(sentence, hidden_states[:, 0])
    torch.testing.assert_close(text(tokens[None, :7])[1], sentence)
    command = [*TOY, "--text", bert, "--steps", "2", "--output"]
    train.main([*command, str(tmp_path / "one")])
    model = load_model(tmp_path / "one")
    changed = model.text.bert.embeddings.word_embeddings.weight
    assert not torch.equal(changed, text.bert.embeddings.word_embeddings.weight)
    train.main([*command, str(tmp_path / "two"), "--stage", "2", "--init", str(tmp_path / "one")])
    kept = load_model(tmp_path / "two").text.bert.embeddings.word_embeddings.weight
    assert torch.equal(kept, changed)


def test_a_published_checkpoint_just_works(bert, folder, tmp_path, monkeypatch):
    """A published file, with its optimizer and its settings beside the tensors, is used as it is by
    eval.py and segment.py: by the method's protocol, and with the same scores."""
    monkeypatch.chdir(Path(bert).parent)
    os.rename(bert, "bert-base-uncased")            # a folder is found before the Hub's
    model = randomised(tiny(image=IMAGE_8, text={"encoder": "bert-base-uncased"}))
    path = tmp_path / "ovsegmentor.pth"
    torch.save({"model": published(model.checkpoint()), "optimizer": {"lr": 0.1}, "epoch": 3,
                "config": Namespace(heads=8)}, path)
    loaded = load_model(path)
    assert loaded.protocol.templates == "photo" and loaded.trained_with == {"imported": str(path)}
    model.settings.text.context = 77
    pixels = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    classes = [["cow"], ["boat"]]
    found, expected = (one.patch_scores(pixels, one.embed_classes(classes, ["a {}"]))[0]
                       for one in (loaded, model))
    torch.testing.assert_close(found, expected)
    save_model(tmp_path / "own", loaded, loaded.trained_with)
    assert load_model(tmp_path / "own").settings == loaded.settings
    eval.main(["--dataset", str(folder), "--checkpoint", str(path), "--device", "cpu",
               "--background", "threshold:0.5"])
    result = json.loads((tmp_path / "eval_folder.json").read_text())
    assert result["protocol"]["keep_classes"] == 5 and result["method"] == "ovsegmentor"
    segment.main([str(folder / "images" / "photo0.png"), "--classes", "cow, boat", "--checkpoint",
                  str(path), "--output", str(tmp_path)])
    assert (tmp_path / "photo0_mask.png").is_file()
