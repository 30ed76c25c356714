"""OVSegmentor: each formula by hand, where gradients go, and all that the scripts offer."""
import copy
import json
import math
import os
import re
import signal
import tarfile
from functools import partial

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
from conftest import without_times
from methods.parts import sentences
from methods.parts.augment import rand_augment, random_erase
from machinery.networks.checkpoint import load_model
from machinery.names import read_templates
from methods.parts.grouping import (EntityDecoder, ImageEncoder, Projector, assign_patches,
                                group_sums, patch_logits)
from machinery.contract import Pair
from machinery.parallel import average_gradients, join_processes
from machinery.training.resume import states
from machinery.training.run import Run
from machinery.toy import toy_scene
from methods import ovsegmentor
from methods.ovsegmentor import (OVSegmentor, answer_sentence, contrastive_loss,
                                 entity_forms, group_scores, mask_distance,
                                 mask_entities, tokenize)
from processes import Processes

B = 4                                               # images
K = 4                                               # groups
CONTEXT = 16                                        # text tokens
BANK = ["cow", "boat", "sea", "kite", "sky", "snow"]
CAPTIONS = ["a cow", "two boats on the sea", "a kite under the sky", "snow"]
SWITCHES = {"entity_weight": 1.0, "mask_weight": 0.1, "mask_size": 16, "mask_prediction": "minmax",
            "bn_double_pass": True, "mask_padding": False}
TOY = ["--method", "ovsegmentor", "--train-data", "toy", "--epoch-pairs", "24", "--batch", "8",
       "--image-size", "64", "--width", "16", "--layers", "2", "--group-tokens", "6", "--groups",
       "4", "--embedding", "8", "--hidden", "16", "--text-width", "16", "--context", str(CONTEXT),
       "--drop-path", "0.2", "--mask-size", "16", "--eval-data", "none", "--device", "cpu"]
STEPS = 8


def encoder(drop_path=0.0, **options):
    """A small image encoder for images of 32 pixels."""
    return ImageEncoder(**{"width": 32, "heads": 4, "layers": 4, "patch": 8, "grid": 4,
                           "group_tokens": 8, "groups": K, "drop_path": drop_path,
                           "init_std": 0.2, **options})


def tiny(stage=1, drop_path=0.0, **switches):
    """A small OVSegmentor; in stage 2 with a teacher that differs a little from the student."""
    torch.manual_seed(0)
    text = sentences.ScratchText(32, 2, 1, CONTEXT)
    model = OVSegmentor(encoder(drop_path), text, None, 16, 64, BANK, {**SWITCHES, **switches})
    if stage == 2:
        model.begin_stage_2({**SWITCHES, **switches}, model.bank)
        with torch.no_grad():
            for p in model.teacher.parameters():
                p.add_(0.02 * torch.randn_like(p))
    return model


def words(texts):
    return torch.stack([tokenize(text, "scratch", CONTEXT) for text in texts])


def batch_of(size=32, captions=CAPTIONS):
    """Toy scenes with captions, as `losses` gets them."""
    forms = entity_forms(ConceptBank(BANK))
    scenes = [toy_scene(np.random.default_rng(i))[0][40:40 + size, 40:40 + size]
              for i in range(2 * len(captions))]
    pixels = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2)
    masked = [mask_entities(caption, forms) for caption in captions]
    return {"pixels": pixels[:len(captions)], "partner": pixels[len(captions):],
            "caption": words(captions), "question": words(question for question, _ in masked),
            "answer": words(answer_sentence(names, "a photo of the {}.") for _, names in masked),
            "prompt": words(f"A photo of {names[0]}" for _, names in masked)}


def gradients(model, value):
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def reached(found):
    """Names of the parameters with a gradient that is not zero."""
    return {name for name, gradient in found.items() if gradient is not None and gradient.any()}


# --------------------------------------------------------------------------------------------------
# Data

def test_the_list_of_entities():
    """The authors' list: 73 names; 99 words, because "TV" and "tv" are one here; cake is number
    66. All 20 classes of Pascal VOC are among them."""
    bank = ConceptBank.from_file(OVSegmentor.RECIPE["bank"])
    assert len(bank.names) == 73 and len(bank.ids) == 99 and bank.names[66] == "cake"
    voc = ("aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse motorbike "
           "person plant sheep sofa train monitor").replace("person", "people")
    assert all(bank.find(name) >= 0 for name in voc.split())


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
    forms = entity_forms(ConceptBank.from_file(OVSegmentor.RECIPE["bank"]))
    assert mask_entities(caption, forms) == (question, entities)


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


def sampler(stage=1, *more):
    init = ["--init", "none"] if stage == 2 else []
    return OVSegmentor.sampler(train.parse_args([*TOY, "--stage", str(stage), *init, *more]))


def test_samples_depend_on_their_generator_alone():
    """The same generator gives the same sample, RandAugment and erasing included; another gives
    another."""
    image = Image.fromarray(toy_scene(np.random.default_rng(0))[0])
    pair = Pair(image=lambda: image, caption="two boats on the sea")
    sample = sampler(1, "--rand-augment", "rand-m9-mstd0.5-inc1", "--erase", "1")
    one, two, other = (sample(pair, rng=np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["pixels"], other["pixels"])
    assert torch.equal(one["question"], words(["two [MASK] on the [MASK]"])[0])


def test_an_erased_rectangle_is_noise():
    """A rectangle of 2 to 33 % of the image becomes noise, the rest stays."""
    image = torch.full((3, 64, 64), 10, dtype=torch.uint8)
    share = []
    for seed in range(30):
        changed = (random_erase(image, 1.0, np.random.default_rng(seed)) != 10).all(dim=0)
        rows = changed.any(dim=1).sum()
        columns = changed.any(dim=0).sum()
        share.append(float(rows * columns) / 64 ** 2)
    assert 0.015 < min(share) and max(share) < 0.35
    assert torch.equal(random_erase(image, 0.0, np.random.default_rng(0)), image)
    picture = Image.new("RGB", (32, 32), (200, 30, 90))
    assert np.array(rand_augment(picture, "rand-m9-mstd0.5-inc1",
                                 np.random.default_rng(0))).shape == (32, 32, 3)


def test_partners_share_an_entity():
    """In stage 2 a sample has another image with an entity of the caption, and a prompt with its
    name; a caption without entities gets a second view of its own image."""
    args = train.parse_args([*TOY, "--stage", "2", "--init", "x"])
    bank = ConceptBank.by_name(args.bank)
    colour = {"partner": (0, 0, 250), "own": (250, 0, 0)}
    images = {name: Image.new("RGB", (40, 40), value) for name, value in colour.items()}
    partner = Pair(image=lambda: images["partner"], caption="the sea")
    pair = Pair(image=lambda: images["own"], caption="a boat on the sea",
                partner=lambda rng: (partner, bank.find("sea")))
    sample = OVSegmentor.sampler(args)(pair, rng=np.random.default_rng(0))
    assert sample["partner"][2].min() == 250 and sample["pixels"][0].min() == 250
    assert torch.equal(sample["prompt"], words(["A photo of sea"])[0])
    pair.partner = lambda rng: None
    sample = OVSegmentor.sampler(args)(pair, rng=np.random.default_rng(0))
    assert sample["partner"][0].min() == 250
    assert torch.equal(sample["prompt"], sample["caption"])


# --------------------------------------------------------------------------------------------------
# Recipe

def rates(steps, batch, stage):
    args = train.parse_args(["--method", "ovsegmentor", "--stage", str(stage)])
    assert args.batch == batch
    peak = args.base_rate * args.batch / 256
    return lambda step: OVSegmentor.learning_rate(step, steps, peak, args.warmup, args.final_rate)


def test_the_rates_of_both_stages():
    """With 1,953 steps a pass the rates are the published ones; the cosine counts from step 0."""
    rate = rates(30 * 1953, 2048, 1)
    for step, expected in {0: 8e-6, 1953: 1.64e-4, 3905: 3.1992e-4, 3906: 3.17378e-4,
                           29295: 2.0e-4, 58590: 8e-5}.items():
        assert rate(step) == pytest.approx(expected, rel=1e-5), step
    rate = rates(1000, 1024, 2)
    assert [rate(step) for step in (0, 500, 1000)] == pytest.approx([2.5e-6, 1.375e-6, 2.5e-7])


def test_stage_2_has_its_own_defaults():
    """Stage 2 changes batch, crops and augmentation; what is given stays."""
    args = train.parse_args(["--method", "ovsegmentor", "--stage", "2", "--epochs", "3"])
    found = (args.batch, args.epochs, args.least_area, args.rand_augment, args.erase)
    assert found == (1024, 3, 0.4, "none", 0.0)
    one = train.parse_args(["--method", "ovsegmentor"])
    assert (one.batch, one.epochs, one.least_area, one.erase) == (2048, 30, 0.08, 0.25)
    assert train.parse_args([*TOY, "--stage", "2"]).output == "runs/ovsegmentor-toy-2"


def test_what_decays():
    """Weight decay is on all but vectors: on theta, positions and group tokens, not on LayerNorm
    and biases."""
    model = tiny()
    decayed, others = ({id(p) for p in group["params"]} for group in model.groups())
    image = model.image
    assert {id(model.theta), id(image.pos_embed), id(image.group_tokens)} <= decayed
    assert {id(image.norm.weight), id(image.blocks[0].attn.qkv.bias)} <= others
    assert [group["decay"] for group in model.groups()] == [1.0, 0.0]


# --------------------------------------------------------------------------------------------------
# Model

def count(module):
    return sum(p.numel() for p in module.parameters())


def test_published_numbers_of_parameters():
    """Encoder, binding, projector and entity decoder of the ViT-B have as many parameters as the
    authors'."""
    with torch.device("meta"):
        image = ImageEncoder()
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
    share = assign_patches(many, noise).mean(dim=-1)[0]
    torch.testing.assert_close(share, p, atol=0.01, rtol=0)


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


def test_training_draws_and_evaluation_does_not():
    """Two passes in training differ by the Gumbel noise; in evaluation they are identical."""
    image = encoder().train()
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    assert not torch.equal(image(x)[0], image(x)[0])
    image.eval()
    assert torch.equal(image(x)[0], image(x)[0])


def test_the_upper_blocks_do_not_segment():
    """Queries and keys come before the upper half: without it the assignment is the same, and
    without patches' values too."""
    image = encoder().eval()
    x = torch.randn(2, 3, 32, 32)
    groups, queries, keys, grid = image(x)
    assert grid == (4, 4) and groups.shape == (2, K, 32)
    with torch.no_grad():
        for p in image.blocks[2:].parameters():
            p.zero_()
    other, queries_now, keys_now, _ = image(x)
    assert torch.equal(queries, queries_now) and torch.equal(keys, keys_now)
    assert not torch.allclose(groups, other)


def test_a_gradient_passes_the_hard_assignment():
    """A gradient from the groups reaches queries and keys although the assignment is one-hot."""
    for mode in (True, False):
        image = encoder().train(mode)
        found = gradients(image, image(torch.randn(2, 3, 32, 32))[0].square().sum())
        assert {"binding.query.weight", "binding.key.weight", "group_tokens",
                "pos_embed"} <= reached(found)


def test_positions_at_other_sizes():
    """At the training size the table is used as it is, elsewhere bicubically enlarged: a constant
    stays constant, and a table of another grid is as large as the grid asks for."""
    image = encoder()
    assert image.positions(4, 4) is image.pos_embed
    with torch.no_grad():
        image.pos_embed.copy_(torch.arange(32.0).expand_as(image.pos_embed))
    larger = image.positions(8, 6)
    torch.testing.assert_close(larger, torch.arange(32.0).expand(1, 48, 32))
    assert image(torch.randn(1, 3, 64, 48))[3] == (8, 6)


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
    with pytest.raises(ValueError, match="does not fit the image encoder of --width, --layers"):
        encoder(width=16).fill(trunk)


def test_the_decoder_sees_groups_as_a_set():
    """Permuting the groups changes nothing. Padding does, unless it is masked."""
    torch.manual_seed(0)
    decoder = EntityDecoder(32, 24, 4)              # the image's features are made narrower
    groups = torch.randn(2, 8, 32)
    states = torch.randn(2, 6, 24)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    base = decoder(groups, states)
    torch.testing.assert_close(decoder(groups[:, torch.randperm(8)], states), base, atol=1e-5,
                               rtol=0)
    padded = states.clone()
    padded[:, 4:] += torch.randn(2, 2, 24)
    assert not torch.allclose(decoder(groups, padded)[:, :4], base[:, :4])
    torch.testing.assert_close(decoder(groups, padded, mask)[:, :4],
                               decoder(groups, states, mask)[:, :4])


def test_a_sentence_is_its_end_token():
    """The scratch text encoder gives the state at the end token, which padding does not change."""
    text = sentences.ScratchText(32, 2, 1, CONTEXT).eval()
    states, end = text(words(["a cow", "two boats on the sea"]))
    assert torch.equal(end[0], states[0, 3]) and torch.equal(end[1], states[1, 6])
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


def test_the_scale_is_at_most_100():
    """exp(theta) starts at 1 / 0.07 and is bounded."""
    model = tiny()
    assert model.scale().item() == pytest.approx(1 / 0.07)
    model.theta.data.fill_(9.0)
    assert model.scale().item() == 100


ONE = torch.tensor([[[0.0, 1, 2, 4]]])                                              # (1, 1, P)
TWO = torch.tensor([[[0.0, 1, 2, 4], [4, 0, 0, 1]]])                                # (1, 2, P)


def test_mask_distance_by_hand():
    """One group: target (0,1,1,1), prediction (0,.25,.5,1), D = 1 - 4.5/5.75. Two: 1 - 7/9, also
    with the teacher's in the other order."""
    assert mask_distance(ONE, ONE).item() == pytest.approx(0.217391, abs=1e-6)
    for teacher in (TWO, TWO.flip(1)):
        assert mask_distance(TWO, teacher).item() / 2 == pytest.approx(0.111111, abs=1e-6)
    p = ONE.sigmoid()
    expected = 1 - (2 * p[..., 1:].sum() + 1) / (p.sum() + 3 + 1)
    torch.testing.assert_close(mask_distance(ONE, ONE, "sigmoid"), expected[None])


def test_mask_distance_does_not_depend_on_the_order_of_groups():
    """Permuting the teacher's groups changes nothing at all."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 8, 30)
    assert torch.equal(mask_distance(student, teacher),
                       mask_distance(student, teacher[:, torch.randperm(8)]))


def test_flat_masks():
    """Teacher's logits near 0 make every pixel foreground; a constant student's map is finite."""
    teacher = torch.tensor([[[-0.3, 0.0, 0.2]]])
    student = torch.tensor([[[0.0, 1, 2]]])
    expected = 1 - (2 * 1.5 + 1) / (1.5 + 3 + 1)    # target all ones
    assert mask_distance(student, teacher).item() == pytest.approx(expected)
    constant = torch.ones(1, 1, 3, requires_grad=True)
    mask_distance(constant, teacher).sum().backward()
    assert constant.grad.isfinite().all()


def test_the_total():
    """Stage 1: contrast + entity; stage 2: + 0.1 mask, exactly. A weight of 0 leaves a part out."""
    losses = tiny().losses(batch_of())
    assert losses["loss"] == losses["contrast"] + losses["entity"] and "mask" not in losses
    losses = tiny(2).losses(batch_of())
    assert losses["loss"] == losses["contrast"] + losses["entity"] + 0.1 * losses["mask"]
    losses = tiny(2, entity_weight=0.0, mask_weight=0.0).losses(batch_of())
    assert losses["loss"] == losses["contrast"] and {"entity", "mask"}.isdisjoint(losses)


def test_mixed_precision():
    """In bfloat16 the losses are near those of float32, and finite."""
    found = []
    for enabled in (False, True):
        model = tiny(2)
        model.autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=enabled)
        torch.manual_seed(0)
        found.append(model.losses(batch_of()))
        found[-1]["loss"].backward()
        assert all(p.grad.isfinite().all() for p in model.trained().values())
    for name in ("contrast", "entity", "mask"):
        torch.testing.assert_close(found[1][name], found[0][name], rtol=0.1, atol=0.1)


def mask_loss(model, batch):
    groups, queries, _, _ = model.image(model.maps(batch["pixels"]))
    return model.mask_loss(batch, groups, queries), queries


def test_the_mask_loss_is_a_mean():
    """The batch twice gives the same loss: 16 times the mean over the global batch."""
    model = tiny(2).eval()
    batch = batch_of()
    twice = {name: torch.cat([value, value]) for name, value in batch.items()}
    one = mask_loss(model, batch)[0]
    torch.testing.assert_close(mask_loss(model, twice)[0], one)
    each = [mask_loss(model, {name: value[i:i + 1] for name, value in batch.items()})[0]
            for i in range(B)]
    torch.testing.assert_close(torch.stack(each).mean(), one)


def test_half_of_the_groups_learn():
    """The K / 2 groups that fit the prompt worst get exactly no gradient from L_mask, the others
    some."""
    model = tiny(2).eval()
    batch = batch_of()
    loss, queries = mask_loss(model, batch)
    gradient = torch.autograd.grad(loss, queries)[0].abs().sum(dim=-1)              # (B, K)
    with torch.no_grad():
        own = model.project_image(model.image(model.maps(batch["pixels"]))[0])
        fit = (own * model.embed_text(batch["prompt"])[:, None]).sum(dim=-1)        # (B, K)
    worst = torch.zeros(B, K, dtype=torch.bool).scatter(1, fit.argsort(dim=1)[:, :K // 2], True)
    assert (gradient[worst] == 0).all() and (gradient[~worst] > 0).all()


def test_what_the_mask_loss_trains():
    """Patch convolution, positions, group tokens, the lower blocks, and of the binding block what
    the queries need; no keys, values, upper blocks, projectors, text or teacher."""
    model = tiny(2)
    found = reached(gradients(model, mask_loss(model, batch_of())[0]))
    lower = ("image.patch_embed.", "image.pos_embed", "image.group_tokens", "image.blocks.0.",
             "image.blocks.1.", "image.binding.norm_tokens.", "image.binding.norm_patches.",
             "image.binding.mix.", "image.binding.norm_groups.", "image.binding.cross.",
             "image.binding.query.")
    expected = {name for name, _ in model.named_parameters() if name.startswith(lower)}
    assert found == expected


def test_what_the_other_losses_train():
    """L_contrast trains no decoder, L_entity not the image's projector; both all else but what
    feeds only the other. In stage 2 the text encoder is frozen, and the teacher always."""
    model = tiny()
    contrast = reached(gradients(model, model.losses(batch_of())["contrast"]))
    entity = reached(gradients(model, model.losses(batch_of())["entity"]))
    assert not [name for name in contrast if name.startswith(("decoder.", "project_question."))]
    assert not [name for name in entity if name.startswith("project_image.")]
    for part in ("image.binding.value.weight", "image.blocks.3.mlp.fc1.weight", "theta",
                 "text.tower.positional_embedding", "project_text.fc1.weight"):
        assert part in contrast and part in entity, part
    assert {"decoder.cross.attn.qkv.weight", "project_question.fc2.weight"} <= entity
    model = tiny(2)
    assert not [name for name in model.trained() if name.startswith(("text.", "teacher."))]
    assert model.text.training and model.teacher.training


def test_what_batch_norm_counts():
    """In a step of stage 2 the running statistics move 8 times for text, 4 times for images, once
    for the decoder; without the double pass 3, 1, 1. The losses are the same."""
    found = {}
    for double in (True, False):
        model = tiny(2, bn_double_pass=double)
        torch.manual_seed(0)
        found[double] = model.losses(batch_of())
        moved = [int(part.norm.num_batches_tracked)
                 for part in (model.project_text, model.project_image, model.project_question)]
        assert moved == ([8, 4, 1] if double else [3, 1, 1])
    assert torch.equal(found[True]["loss"], found[False]["loss"])


def test_the_teacher_follows():
    """From equal weights, a change of the student moves the teacher by 0.01 of it."""
    model = tiny()
    model.begin_stage_2(SWITCHES, model.bank)
    before = copy.deepcopy(model.teacher.state_dict())
    with torch.no_grad():
        for p in model.image.parameters():
            p.add_(1.0)
    model.after_step(0, 10)
    for name, p in model.teacher.named_parameters():
        torch.testing.assert_close(p - before[name], torch.full_like(p, 0.01), atol=1e-6, rtol=0)


def test_it_learns():
    """Eight distinct pairs are told apart after 30 steps: both losses far below ln 8."""
    captions = [*CAPTIONS, "a boat", "the sky", "the sea and a cow", "a cow and a kite"]
    model = tiny()
    batch = batch_of(captions=captions)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(30):
        torch.manual_seed(step)
        losses = model.losses(batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    assert losses["contrast"] < 0.1 and losses["entity"] < 0.1


# --------------------------------------------------------------------------------------------------
# Several processes, whole runs

def one_step(folder, world):
    processes = join_processes("cpu", timeout_minutes=1)
    torch.save(step_of(processes.rank, world), folder / f"{processes.rank}")
    processes.leave()


def step_of(rank=0, world=1):
    """Losses, gradients and running statistics of a step of stage 2 with all that is random."""
    model = tiny(2, drop_path=0.4)
    rows = slice(rank * B // world, (rank + 1) * B // world)
    torch.manual_seed(1)
    losses = model.losses({name: value[rows] for name, value in batch_of().items()})
    losses["loss"].backward()
    average_gradients(list(model.trained().values()))
    gradient = {name: p.grad for name, p in model.trained().items()}
    return {"losses": {name: value.detach() for name, value in losses.items()},
            "gradient": gradient, "buffers": dict(model.named_buffers())}


def test_two_processes_are_one(tmp_path):
    """Two processes with half a batch each have the losses, gradients and running statistics of one
    with all of it, noise and stochastic depth included."""
    both = Processes(tmp_path, 2, one_step, tmp_path, 2)
    assert both.wait() == [0, 0], both.output()
    one = step_of()
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}")
        for part in one:
            torch.testing.assert_close(two[part], one[part], rtol=1e-3, atol=2e-5)


def run(folder, *more):
    train.main([*TOY, "--steps", str(STEPS), "--output", str(folder), *more])


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory):
    """Folder of a run of stage 1."""
    folder = tmp_path_factory.mktemp("ovsegmentor") / "one"
    run(folder)
    return folder


def killed_at(step, folder, *more):
    """A run that is stopped by a signal before a step."""
    schedule = OVSegmentor.learning_rate

    def reached(now, *settings):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(now, *settings)
    OVSegmentor.learning_rate = staticmethod(reached)
    run(folder, *more)


def test_stage_2_goes_on_and_resumes(stage_1, tmp_path, fails):
    """Stage 2 starts from the weights of stage 1. Stopped and resumed it is the uninterrupted run
    bit by bit: losses, noise, running statistics, and the teacher. Another bank is refused."""
    two = ("--stage", "2", "--init", str(stage_1))
    kept = []
    finish = Run.finish
    try:
        Run.finish = lambda run: (kept.append(run.method.state()), finish(run))
        run(tmp_path / "whole", *two)
        first = Processes(tmp_path, 1, killed_at, 5, tmp_path / "resumed", *two)
        assert first.wait() == [128 + signal.SIGTERM], first.output()
        assert states(tmp_path / "resumed")
        run(tmp_path / "resumed", *two, "--resume", "auto")
    finally:
        Run.finish = finish
    assert without_times(tmp_path / "resumed") == without_times(tmp_path / "whole")
    whole, resumed = kept
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert any(name.startswith("teacher.") for name in whole)
    start = load_model(stage_1).state_dict()
    end = load_model(tmp_path / "whole").state_dict()
    assert start.keys() == end.keys()               # no teacher in a checkpoint
    frozen = [name for name in start if name.startswith("text.")]
    assert frozen and all(torch.equal(start[name], end[name]) for name in frozen)
    moved = (end["image.binding.query.weight"] - start["image.binding.query.weight"]).abs().max()
    assert 0 < moved < 0.05
    bank = tmp_path / "bank"
    bank.write_text("cow\nboat\n")
    fails(train.main, [*TOY, *two, "--steps", STEPS, "--output", tmp_path / "resumed", "--bank",
                       bank, "--resume", "auto"], "the bank differs")


def test_shards(stage_1, tmp_path, forked):
    """Stage 2 streams tars; a partner is another sample of the same tar."""
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for i, caption in enumerate(["a cow", "the cow on grass", "a boat on the sea", "the sea"]):
            image, _, _ = toy_scene(rng)
            Image.fromarray(image).save(tmp_path / "image.png")
            (tmp_path / "text.txt").write_text(caption)
            tar.add(tmp_path / "image.png", f"{i:09d}.png")
            tar.add(tmp_path / "text.txt", f"{i:09d}.txt")
    bank = tmp_path / "bank"
    bank.write_text("cow\ngrass\nboat\nsea\n")
    import concepts
    concepts.main(["--shards", str(tmp_path), "--parser", "match", "--bank", str(bank)])
    flags = [flag for flag in TOY if flag not in ("--train-data", "toy")]
    train.main([*flags, "--train-data", str(tmp_path), "--bank", str(bank), "--patches", "frozen",
                "--backbone", "toy", "--stage", "2", "--init", str(stage_1), "--steps", "2",
                "--batch", "4", "--workers", "0", "--output", str(tmp_path / "out")])
    assert all("mask" in line for line in without_times(tmp_path / "out"))


def test_mistakes_in_flags(stage_1, checkpoint, tmp_path, fails):
    """Flags that do not go together end the run in one line."""
    start = [*TOY, "--output", tmp_path]
    fails(train.main, [*start, "--stage", "2"], "--stage 2 with --init None")
    fails(train.main, [*start, "--init", stage_1], "--stage 1 with --init")
    fails(train.main, [*start, "--stage", "2", "--init", checkpoint], "is a checkpoint of simzss")
    fails(train.main, [*start, "--bank", "none"], "--bank none")
    fails(train.main, [*start, "--groups", "0"], "--groups is 0; expected at least 1")
    fails(train.main, [*start, "--drop-path", "1"], "--drop-path is 1.0; expected 0 to 0.9")
    fails(train.main, [*start, "--least-area", "2"], "--least-area is 2.0", "expected 0 to 1")
    fails(train.main, [*start, "--context", "100"], "--context is 100", "expected 1 to 77")
    fails(train.main, [*start, "--mask-size", "0"], "--mask-size is 0; expected a positive number")
    fails(train.main, [*start, "--rand-augment", "bogus"], "RandAugment 'bogus'")
    fails(train.main, [*start, "--mask-weight", "nan"], "--mask-weight is nan")
    fails(train.main, [*start, "--patches", "convolution", "--pixel-mean", "0", "0", "0"],
          "--patches frozen")


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


def scored(monkeypatch, threshold, background):
    """patch_scores of a model of two groups, the left and the right half, and the logits above."""
    model = tiny().eval()
    keys = torch.zeros(1, 16, 32)
    keys[0, :, 0] = torch.tensor([9.0, 9, -9, -9]).repeat(4)
    queries = torch.zeros(1, 2, 32)
    queries[0, :, 0] = torch.tensor([9.0, -9])
    model.image = FixedImage(queries, keys)
    monkeypatch.setattr(ovsegmentor, "best_synonym", lambda features, classes:
                        LOGITS.transpose(1, 2) if features.shape[1] == 2 else torch.zeros(1, 3, 1))
    monkeypatch.setattr(model, "scale", lambda: 1.0)
    model.prepare({"background": f"own:{threshold}" if background else "", "keep_classes": 5})
    classes = torch.ones(3, 1, 16)
    if background:
        classes = torch.cat([torch.zeros(1, 1, 16), classes])
    return model.patch_scores(torch.zeros(1, 3, 32, 30, dtype=torch.uint8), classes)


class FixedImage(torch.nn.Module):
    """An image encoder that finds what it is told."""
    config = {"patch": 8}

    def __init__(self, queries, keys):
        super().__init__()
        self.found = (torch.zeros(1, 2, 32), queries, keys, (4, 4))

    def forward(self, maps):
        return self.found


def test_background_by_hand(monkeypatch):
    """With 0.95 the threshold is lowered to the best group's score: that group stays foreground,
    the other is background. With 0.3 both are foreground. Without the row nothing is."""
    scores, size = scored(monkeypatch, 0.95, True)
    assert size == (32, 32) and scores.shape == (1, 4, 32, 32)
    best = scores[0].argmax(dim=0)
    assert (best[:, :16] == 1).all() and (best[:, 16:] == 0).all()
    torch.testing.assert_close(scores[0, 1:, 0, 0], torch.tensor([.87654, .00217, .00029]),
                               atol=1e-5, rtol=0)
    assert set(scores[0, 0].unique().tolist()) == {0.0, 1.0}
    best = scored(monkeypatch, 0.3, True)[0][0].argmax(dim=0)
    assert (best[:, :16] == 1).all() and (best[:, 16:] == 2).all()
    best = scored(monkeypatch, 0.95, False)[0][0].argmax(dim=0)
    assert (best[:, :16] == 0).all() and (best[:, 16:] == 1).all()


def test_class_embeddings():
    """A class is the mean of its prompts before they are normalised, and then unit-norm."""
    model = tiny().eval()
    templates = ("a photo of a {}.", "the {}")
    found = model.embed_classes([["cow", "boat"], "sea"], templates)
    with torch.no_grad():
        both = model.embed_text(words(["a photo of a boat.", "the boat"])).mean(dim=0)
    torch.testing.assert_close(found[0, 1], F.normalize(both, dim=0))
    assert found.shape == (2, 2, 16) and torch.equal(found[1, 0], found[1, 1])


def test_it_scores_and_segments(stage_1, folder, tmp_path, fails):
    """eval.py and segment.py work with it as they are, its background rule and its own settings
    included."""
    fails(eval.main, ["--dataset", folder, "--checkpoint", stage_1, "--protocol", "keep_classes=0"],
          "keep_classes is 0; expected a whole number of at least 1")
    output = tmp_path / "result.json"
    eval.main(["--dataset", str(folder), "--checkpoint", str(stage_1), "--background", "own:0.5",
               "--protocol", "keep_classes=2", "--device", "cpu", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["method"] == "ovsegmentor" and 0 <= result["mIoU"] <= 1
    assert result["protocol"]["keep_classes"] == 2
    assert result["protocol"]["templates"] == "photo"
    segment.main([str(folder / "images" / "photo0.png"), "--classes", "cow, grass", "--checkpoint",
                  str(stage_1), "--output", str(tmp_path)])
    assert json.loads((tmp_path / "photo0.json").read_text())["names"] == ["cow", "grass"]
    model = load_model(stage_1)
    pixels = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    cosines = model.image_scores(pixels, model.embed_classes(["cow", "grass"]))
    assert cosines.shape == (2, 2) and cosines.abs().max() <= 1 + 1e-6


def test_a_picture_of_groups(stage_1, tmp_path, capsys):
    """tests/groups.py prints how well groups follow regions and draws them: photo, truth, groups
    and each group's share."""
    groups.main([str(stage_1), str(tmp_path / "groups.png"), "--images", "2"])
    assert re.search(r"of 4 groups in use, oracle mIoU [\d.]+%", capsys.readouterr().out)
    assert Image.open(tmp_path / "groups.png").size == (7 * 128, 2 * 128)


# --------------------------------------------------------------------------------------------------
# BERT

def test_without_transformers(monkeypatch, tmp_path, fails):
    """Asked for where the package is missing, BERT is refused with the install command."""
    monkeypatch.setattr(sentences, "installed", lambda: False)
    fails(train.main, [*TOY, "--text", "bert-base-uncased", "--output", tmp_path],
          "pip install transformers")


def bert_folder(folder):
    """A BERT of width 16 with a vocabulary of a few words."""
    transformers = pytest.importorskip("transformers", reason="the optional package transformers")
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##s", "cow", "boat", "photo"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = transformers.BertConfig(vocab_size=len(vocabulary), hidden_size=16,
                                     num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=32)
    torch.manual_seed(0)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def test_a_bert(tmp_path):
    """A pretrained BERT trains: its words are WordPieces, [MASK] is its mask token, a sentence is
    its first token whatever the padding; the checkpoint holds its weights and says its name."""
    name = bert_folder(tmp_path / "bert")
    tokens = sentences.tokenize("A [MASK] and cows", name, 10)
    assert tokens.tolist() == [2, 5, 4, 1, 7, 6, 3, 0, 0, 0]
    args = train.parse_args([*TOY, "--text", name])
    built = OVSegmentor.build(args, ConceptBank(BANK))
    assert built.training and built.text.bert.training      # its dropout is on
    text = sentences.Bert(name, 10).eval()
    states, sentence = text(tokens[None])
    assert torch.equal(sentence, states[:, 0])
    torch.testing.assert_close(text(tokens[None, :7])[1], sentence)
    run(tmp_path / "out", "--text", name, "--steps", "2")
    model = load_model(tmp_path / "out")
    assert model.config()["text"]["kind"] == name and isinstance(model.text, sentences.Bert)
    changed = model.text.bert.embeddings.word_embeddings.weight
    assert not torch.equal(changed, text.bert.embeddings.word_embeddings.weight)
