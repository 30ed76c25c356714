"""S-Seg: each formula by hand, what must not change a result, and all that the scripts offer."""
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval
import oracle
import segment
import train
from machinery.networks.checkpoint import load_model, save_model
from machinery.settings import read, read_recipe
from machinery.tokenizer import tokenize
from machinery.toy import toy_scene
from methods.parts.maskformer import sine_code
from methods.sseg import (SSeg, dice_loss, focal_loss, mask_loss, match, matching_costs,
                          merge_masks, project)
from processes import check_resumed, check_two_processes

B = 4                                               # images
Q = 6                                               # queries
K = 3                                               # clusters
TINY = {"backbone": {"name": "toy"}, "text": {"width": 32, "heads": 2, "layers": 1},
        "student": "toy", "dropout": 0.0, "queries": Q, "clusters": K, "decoder_width": 32,
        "decoder_layers": 2, "decoder_heads": 4, "decoder_ffn": 48, "joint_width": 16}
LOCAL = {"feature": "local", "batch_norm": True}
CAPTIONS = ["a cow", "two boats on the sea", "a kite under the wide blue sky", "snow"]


def tiny(**changes):
    """A small S-Seg on the toy teacher."""
    torch.manual_seed(0)
    return SSeg(read(SSeg.Settings, {**TINY, **changes}, "test"), training=True)


def scenes():
    """Toy scenes with captions, as they are loaded."""
    images = [toy_scene(np.random.default_rng(i))[0][:64, :64] for i in range(B)]
    return {"pixels": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
            "tokens": torch.stack([tokenize(caption) for caption in CAPTIONS])}


def losses_of(model):
    batch = model.features(scenes())
    return model.losses(model.encode(batch), batch)


# --------------------------------------------------------------------------------------------------
# Data and pseudo-masks

def test_pseudo_masks_are_those_of_the_crop():
    """Labels 0..K-1 on the teacher's grid, alike for an image alone and in a batch; a mirrored
    image has mirrored masks, up to the order of the labels."""
    model = tiny()
    batch = model.features(scenes())
    labels = batch["labels"]
    assert labels.shape == (B, 8, 8) and labels.dtype == torch.int64
    assert 0 <= labels.min() and labels.max() < K
    for i in range(B):
        alone = model.features({"pixels": batch["pixels"][i:i + 1]})["labels"]
        assert torch.equal(alone[0], labels[i])
    # Equal regions: the pairs of old and new labels are one to one. The hand-made teacher looks to
    # the right and down, so tokens of a mirrored image differ a little: a plain image is taken.
    pixels = torch.full((1, 3, 64, 64), 30, dtype=torch.uint8)
    pixels[..., :24] = 120
    pixels[..., 40:, :] = 220
    one, other = (model.features({"pixels": p})["labels"][0] for p in (pixels, pixels.flip(-1)))
    pairs = {(int(a), int(b)) for a, b in zip(one.flatten(), other.flip(-1).flatten())}
    assert len(pairs) == len(one.unique()) == 3


def test_the_teacher_only_teaches():
    """It never learns, is neither in states nor in checkpoints, and a model that only segments has
    none."""
    vit = {"name": "vit_tiny_patch16_224", "weights": "random", "options": {"depth": 1}}
    model = tiny(backbone=vit)
    losses_of(model)["loss"].backward()
    assert list(model.teacher.parameters())
    assert all(p.grad is None for p in model.teacher.parameters())
    for kept in (model.trained(), model.state(), model.checkpoint()):
        assert kept and not any(name.startswith("teacher") for name in kept)
    model.train()
    assert not model.teacher.training and model.network.training
    rebuilt = SSeg(model.settings)
    assert rebuilt.state_dict().keys() == model.checkpoint().keys()


def test_crops_of_whole_patches():
    """Images whose sides are no multiples of the student's and the teacher's patches are refused
    before a step."""
    model = tiny()
    with pytest.raises(ValueError, match="--image-size 80: expected a multiple of 32"):
        model.features({"pixels": torch.zeros(1, 3, 80, 80, dtype=torch.uint8)})


# --------------------------------------------------------------------------------------------------
# Model

@pytest.fixture(scope="module")
def faithful():
    """The published size, the teacher's weights random."""
    settings = read_recipe("sseg")["model"]
    settings["backbone"]["weights"] = "random"
    return SSeg(read(SSeg.Settings, settings, "sseg"), training=True).eval()


def test_parameters_of_the_published_size(faithful):
    """Each part has as many parameters as arithmetic says; 64 masks of 56 x 56 cells in six layers
    are matched with 28 x 28 labels."""
    def count(*parts):
        return sum(p.numel() for part in parts for p in part.parameters())

    network = faithful.network
    decoder = network.decoder
    heads = (network.mask_head, network.feature_head)
    assert count(network.backbone.trunk) == 48_835_722
    assert count(network.backbone.norms) == 2_880
    assert count(network.pixel_decoder) == 4_304_640
    assert count(decoder.layers) == 9_472_512
    assert count(decoder.memory) == 196_864
    assert decoder.code.numel() == 16_384
    assert count(decoder.norm) == 512
    assert [count(head) for head in heads] == [197_376, 65_792]
    assert count(decoder, *heads) == 9_949_440
    assert count(decoder, *heads, network.pixel_decoder) == 14_254_080
    assert count(faithful.text) == 22_145_792
    assert count(faithful.image_projector) == count(faithful.text_projector) == 131_584
    assert count(faithful.teacher) == 21_670_272
    pixels = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    with torch.no_grad():
        masks, mask_features = network(faithful.normalise(pixels))
    assert masks.shape == (1, 6, 64, 56, 56) and mask_features.shape == (1, 64, 256)
    assert faithful.features({"pixels": pixels})["labels"].shape == (1, 28, 28)


def test_weight_decay_of_the_published_size(faithful):
    """Matrices and kernels decay; vectors and tables of embeddings do not. None is left out."""
    decayed, others = ({id(p) for p in group["params"]} for group in faithful.parameter_groups())
    tables = {faithful.network.decoder.code, faithful.text.tower.token_embedding.weight,
              faithful.text.tower.positional_embedding}
    for name, p in faithful.trained().items():
        is_table = p.ndim < 2 or p in tables or "relative_position_bias" in name
        assert id(p) in (others if is_table else decayed), name
    assert len(decayed) + len(others) == len(faithful.trained())


def test_the_student_is_maskformers_swin(faithful):
    """Stochastic depth rises to 0.2; every second block shifts its windows of 7 x 7, also on the
    last map, which at 224 pixels is one window."""
    trunk = faithful.network.backbone.trunk
    rates = [part.drop_prob for part in trunk.modules() if type(part).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2) and len(rates) == 2 * 23
    for stage in trunk.layers:
        assert {block.window_size for block in stage.blocks} == {(7, 7)}
        assert [block.shift_size for block in stage.blocks[:2]] == [(0, 0), (3, 3)]


def test_sine_code():
    """Cells of a 14 x 14 grid by hand: rows in the first half of the channels."""
    code = sine_code(14, 14, 256)
    expected = [0.433884, 0.900969, 0.378934, 0.925424]
    assert code.shape == (196, 256)
    assert code[0, :4].tolist() == pytest.approx(expected, abs=1e-5)
    assert code[-1, :2].tolist() == pytest.approx([0, 1], abs=1e-5)
    t = 2 * math.pi * 3 / 5                         # of a 4 x 5 grid: row 2, column 3, from 1
    cell = sine_code(4, 5, 8)[1 * 5 + 2]
    assert cell[:2].tolist() == pytest.approx([math.sin(math.pi), math.cos(math.pi)], abs=1e-5)
    assert cell[4:].tolist() == pytest.approx([math.sin(t), math.cos(t), math.sin(t / 100),
                                               math.cos(t / 100)], abs=1e-5)


@torch.no_grad()
def test_the_order_of_queries_means_nothing():
    """Permuted rows of the query table permute masks and features, and leave the image's embedding
    and the losses as they are."""
    model = tiny().eval()
    images = model.normalise(scenes()["pixels"])
    masks, mask_features = model.network(images)
    losses = losses_of(model)
    order = torch.randperm(Q, generator=torch.Generator().manual_seed(1))
    model.network.decoder.code.copy_(model.network.decoder.code[order])
    masks2, mask_features2 = model.network(images)
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    assert not torch.allclose(masks2, masks, atol=1e-3)
    close(masks2, masks[:, :, order])
    close(mask_features2, mask_features[:, order])
    close(mask_features2.mean(dim=1), mask_features.mean(dim=1))
    for name, value in losses_of(model).items():
        assert value == pytest.approx(losses[name].item(), abs=1e-5), name


def test_a_layer_of_the_decoder_by_hand():
    """Attention head by head, normalised after each part; the code is added to queries and to the
    keys of self-attention, never to values."""
    layer = tiny().eval().network.decoder.layers[0]
    generator = torch.Generator().manual_seed(0)
    o, keys, memory = (torch.randn(2, n, 32, generator=generator) for n in (Q, 9, 9))
    code = torch.randn(Q, 32, generator=generator)

    def attend(attention, *inputs):
        weights = attention.in_proj_weight.chunk(3)
        q, k, v = (x @ weight.T + bias for x, weight, bias
                   in zip(inputs, weights, attention.in_proj_bias.chunk(3)))
        heads = [(q[..., i:i + 8] @ k[..., i:i + 8].mT / math.sqrt(8)).softmax(-1) @ v[..., i:i + 8]
                 for i in range(0, 32, 8)]
        return attention.out_proj(torch.cat(heads, dim=-1))

    s = layer.norms[0](o + attend(layer.self_attention, o + code, o + code, o))
    r = layer.norms[1](s + attend(layer.cross_attention, s + code, keys, memory))
    expected = layer.norms[2](r + layer.ffn(r))
    torch.testing.assert_close(layer(o, code, keys, memory), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_are_encoded_alone():
    """What `encode` makes of a pair is what it makes of it without the others."""
    model = tiny().eval()
    batch = model.features(scenes())
    whole = model.encode(batch)
    for i in range(B):
        alone = model.encode({name: value[i:i + 1] for name, value in batch.items()})
        for name, value in alone.items():
            torch.testing.assert_close(value[0], whole[name][i], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Mask loss

@pytest.mark.parametrize("side, dice, cost", [(56, .799592, 3.18229), (112, .799898, 3.18259)])
def test_losses_of_logits_of_zero(side, dice, cost):
    """All logits 0 and eight equal clusters: focal = ln 2 / 4 (0.75 - 0.5 / 8)."""
    labels = torch.arange(side * side).view(1, side, side) * 8 // side ** 2
    targets = F.one_hot(labels.flatten(1), 8).mT.float()
    logits = torch.zeros(1, 8, side * side)
    assert focal_loss(logits, targets)[0].tolist() == pytest.approx([0.1191347] * 8, abs=1e-6)
    assert dice_loss(logits, targets)[0].tolist() == pytest.approx([dice] * 8, abs=1e-6)
    costs = matching_costs(logits.double(), targets.double()).flatten().tolist()
    assert costs == pytest.approx([cost] * 64, abs=6e-6)
    loss = mask_loss(logits.unflatten(-1, (side, side)), labels, 8)
    assert loss.item() == pytest.approx(cost, abs=1e-5)


def test_losses_of_four_cells():
    """Logits (2, -1, 0.5, -3) and targets (1, 0, 0, 1) by hand."""
    logits = torch.tensor([2., -1, 0.5, -3])
    targets = torch.tensor([1., 0, 0, 1])
    assert focal_loss(logits, targets).item() == pytest.approx(0.248018, abs=1e-6)
    assert dice_loss(logits, targets).item() == pytest.approx(0.407330, abs=1e-6)


LINE = torch.linspace(-2, 2, 64).view(1, 4, 4, 4)
ROWS = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]])[None]


def test_matching_and_loss_by_hand():
    """Four rising masks and three clusters: query 0 gets target 1, query 1 target 0, query 2
    target 2, and query 3 nothing."""
    targets = F.one_hot(ROWS.flatten(1), 3).mT.float()
    image, query, target = match(matching_costs(LINE.flatten(2), targets), targets.any(dim=-1))
    assert sorted(zip(query.tolist(), target.tolist())) == [(0, 1), (1, 0), (2, 2)]
    masks = LINE.flatten(2)[image, query]
    assert focal_loss(masks, targets[image, target]).mean() == pytest.approx(0.0941160, abs=1e-6)
    assert dice_loss(masks, targets[image, target]).mean() == pytest.approx(0.5932624, abs=1e-6)
    assert mask_loss(LINE, ROWS, 3).item() == pytest.approx(2.4755814, abs=1e-6)


def test_names_of_clusters_mean_nothing():
    """Renaming the clusters, also to make room for ones that are empty, changes nothing."""
    renamed = torch.tensor([4, 0, 2])[ROWS]
    assert mask_loss(LINE, renamed, 5) == mask_loss(LINE, ROWS, 3)


def test_only_matched_masks_have_a_gradient():
    """As many queries of an image as it has clusters get a gradient; for the others it is exactly
    zero. Empty clusters are matched with nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 12, 8, 8, generator=generator, requires_grad=True)
    labels = torch.arange(64).view(1, 8, 8).repeat(3, 1, 1) % 8
    labels[1] = labels[1].clamp(max=4)
    labels[2] = 6
    mask_loss(logits, labels, 8).backward()
    reached = logits.grad.flatten(2).any(dim=-1).sum(dim=1)
    assert reached.tolist() == [8, 5, 1]


def test_the_loss_averages_over_pairs_not_images():
    """An image of one cluster counts one eighth of one of eight clusters."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 12, 8, 8, generator=generator)
    labels = torch.randint(0, 8, (2, 8, 8), generator=generator)
    labels[1] = 0
    each = [mask_loss(logits[i:i + 1], labels[i:i + 1], 8) for i in range(2)]
    expected = (8 * each[0] + each[1]) / 9
    assert mask_loss(logits, labels, 8).item() == pytest.approx(expected.item())


def test_costs_are_the_losses():
    """Matrix products give the focal and dice loss of each pair of a mask and a target."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(1, 5, 16, generator=generator)
    targets = F.one_hot(torch.randint(0, 3, (1, 16), generator=generator), 3).mT.float()
    costs = matching_costs(logits, targets)
    for q in range(5):
        for k in range(3):
            pair = (logits[0, q], targets[0, k])
            expected = 20 * focal_loss(*pair) + dice_loss(*pair)
            assert costs[0, q, k].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_mask_that_is_no_number_does_not_end_the_run():
    """Logits that are not finite give a loss that is not finite, which train.py counts and skips,
    and no error in the assignment."""
    logits = LINE.clone()
    logits[0, 1] = math.nan
    assert not mask_loss(logits, ROWS, 3).isfinite()


def test_supervision_of_all_layers():
    """The mean over layers is the sum by their number; "last" is the mask loss of the last."""
    found = {}
    for how in ("mean", "sum", "last"):
        model = tiny(deep_supervision=how).eval()
        batch = model.features(scenes())
        encoded = model.encode(batch)
        found[how] = model.losses(encoded, batch)["mask"].item()
        layers = [mask_loss(layer, batch["labels"], K).item()
                  for layer in encoded["masks"].unbind(dim=1)]
    assert found["sum"] == pytest.approx(sum(layers))
    assert found["mean"] == pytest.approx(sum(layers) / 2)
    assert found["last"] == pytest.approx(layers[-1]) != pytest.approx(layers[0])


# --------------------------------------------------------------------------------------------------
# Contrastive loss

def test_the_contrastive_loss_by_hand():
    """The sum of both directions: three vectors in the plane; and 2 ln B of a model that says the
    same of every image and caption. The loss is the mask loss and the contrastive one. The scale
    is at most 100."""
    model = tiny()
    model.image_projector = model.text_projector = torch.nn.Identity()
    v = F.normalize(torch.tensor([[1., 0], [0, 1], [1, 1]]), dim=-1)
    u = F.normalize(torch.tensor([[1., 0], [1, 1], [0, 1]]), dim=-1)
    encoded = {"masks": LINE[:, None], "image": v, "text": u}
    losses = model.losses(encoded, {"labels": ROWS})
    assert losses["mask"].item() == pytest.approx(2.4755814, abs=1e-6)
    assert losses["contrastive"].item() == pytest.approx(2 * 2.809544, abs=1e-5)
    assert losses["loss"] == losses["mask"] + losses["contrastive"]
    model = tiny()
    for projector in (model.image_projector, model.text_projector):
        torch.nn.init.zeros_(projector[-1].weight)
    assert losses_of(model)["contrastive"].item() == pytest.approx(2 * math.log(B), abs=1e-5)
    with torch.no_grad():
        model.logit_scale.fill_(5.0)
    model.after_step(0, 10)
    assert model.logit_scale.exp().item() == pytest.approx(100)


@torch.no_grad()
def test_a_caption_is_read_at_its_end_token():
    """The end of "a photo of a dog." is position 7; what stands behind it changes nothing, a word
    does."""
    tokens = tokenize("a photo of a dog.")
    model = tiny().eval()
    behind = tokens.clone()
    behind[8:] = 17
    texts = model.read_texts(torch.stack([tokens, behind, tokenize("a photo of a cat.")]))
    assert torch.equal(texts[0], texts[1]) and not torch.allclose(texts[0], texts[2], atol=1e-3)


# --------------------------------------------------------------------------------------------------
# What each loss reaches

MASK_SIDE = ("network.mask_head", "network.pixel_decoder")
NAME_SIDE = ("network.feature_head", "image_projector", "text", "logit_scale")
SHARED = ("network.backbone", "network.decoder")


STUDENT = {"feature": "local", "local_map": "student"}


@pytest.mark.parametrize("loss, settings, missed", [
    ("contrastive", {}, MASK_SIDE),
    ("contrastive", {"feature": "pool"}, ("network.mask_head", "network.decoder")),
    ("contrastive", STUDENT, (*MASK_SIDE, "network.decoder")),
    ("contrastive", LOCAL, (*MASK_SIDE, *SHARED)),
    ("mask", {}, NAME_SIDE), ("mask", {"feature": "pool"}, NAME_SIDE), ("mask", LOCAL, NAME_SIDE)])
def test_what_each_loss_reaches(loss, settings, missed):
    """The contrastive loss gives mask head and pixel decoder no gradient, or mask head and
    transformer decoder where features are means under the masks, and nothing of the student where
    the means are of the teacher's tokens; the mask loss gives none to feature head, projectors and
    text. All else is reached."""
    model = tiny(**settings)
    losses_of(model)[loss].backward()
    for part in (*MASK_SIDE, *NAME_SIDE, *SHARED):
        hit = any(p.grad is not None and p.grad.any() for name, p in model.trained().items()
                  if name.startswith(part))
        assert hit == (part not in missed), part


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"feature": "pool"}, STUDENT, LOCAL])
def test_features_that_are_means_under_the_masks(settings):
    """The feature of a mask is that of the mean cell under it, by a loop: cells of the pixel
    decoder, the student's map of stride 8, or the teacher's tokens. So pixels that are under no
    mask change nothing of it."""
    model = tiny(**settings).eval()
    pixels = scenes()["pixels"]
    masks, mask_features, _ = model.masks(pixels)
    maps = model.network.backbone(model.normalise(pixels))
    if settings == LOCAL:
        _, tokens, grid = model.teacher(model.teacher.normalise(pixels))
        map_ = tokens.mT.unflatten(2, grid)
    else:
        map_ = maps[1] if settings == STUDENT else model.network.pixel_decoder(maps)
    ratio = masks.shape[-1] // map_.shape[-1]
    map_ = map_.repeat_interleave(ratio, dim=2).repeat_interleave(ratio, dim=3)
    inside = masks[2, 5].sigmoid()
    mean = (map_[2] * inside).sum(dim=(1, 2)) / inside.sum()
    torch.testing.assert_close(mask_features[2, 5], model.network.feature_head(mean), rtol=1e-4,
                               atol=1e-5)


@torch.no_grad()
def test_teacher_and_student_see_the_same_area():
    """An image of any size is padded to whole patches of both: of 14 and 32 pixels, multiples of
    224."""
    teacher = {"name": "vit_small_patch14_dinov2", "weights": "random", "options": {"depth": 1}}
    model = tiny(feature="local", backbone=teacher).eval()
    masks, _, covered = model.masks(torch.zeros(1, 3, 70, 230, dtype=torch.uint8))
    assert covered == (224, 448) and masks.shape[-2:] == (56, 112)


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_local_features_come_with_their_teacher(tmp_path, weights):
    """A checkpoint of the feature local gives the same scores after loading: the teacher is made
    anew, or stored where its weights exist nowhere else."""
    teacher = {"name": "toy"}
    if weights == "random":
        teacher = {"name": "vit_tiny_patch16_224", "weights": "random", "options": {"depth": 1}}
    model = tiny(**LOCAL, backbone=teacher).eval()
    save_model(tmp_path, model, {})
    loaded = load_model(tmp_path)
    pixels = scenes()["pixels"]
    classes = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    expected, _ = model.patch_scores(pixels, classes)
    assert torch.equal(loaded.patch_scores(pixels, classes)[0], expected)
    stored = any(name.startswith("teacher.") for name in model.checkpoint())
    assert stored == (weights == "random")


# --------------------------------------------------------------------------------------------------
# Several processes

@pytest.mark.parametrize("settings", [{}, LOCAL])
def test_two_processes_compute_the_losses_of_one(tmp_path, settings):
    """Without dropout, losses and the gradients of all parameters agree, where the images of the
    processes differ in how many clusters they have; with BatchNorm, too."""
    model = tiny(**settings, clusters=Q).train()
    batch = scenes()
    batch["pixels"][0] = 60
    batch["pixels"][0, ..., :32] = 200
    labels = model.features(batch)["labels"]
    assert [len(one.unique()) for one in labels] == [3, Q, Q, Q]
    rounding = 1e-4 if settings else 1e-7           # of biases before BatchNorm
    check_two_processes(tmp_path, model, batch, rounding)


# --------------------------------------------------------------------------------------------------
# Runs

RUN = ("--recipe sseg-toy --batch 8 --steps 8 --image-size 64 --queries 9 --decoder-layers 1 "
       "--decoder-ffn 48 --dropout 0.2 --text-width 32 --joint-width 16 --eval-data none "
       "--device cpu --set run.epoch_pairs=20 --set protocol.short_side=64 "
       "--set protocol.window=64 --set protocol.stride=32").split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("sseg") / "whole"
    train.main([*RUN, "--output", str(folder)])
    return folder


def test_ended_and_resumed_is_uninterrupted(whole, tmp_path):
    """Log and weights are those of the uninterrupted run, bit by bit, with dropout."""
    check_resumed(whole, tmp_path / "run", SSeg, 3, RUN)


# --------------------------------------------------------------------------------------------------
# Inference

@pytest.fixture(scope="module")
def named():
    """A model, pixels of no round size, and embeddings of three classes with two names each."""
    model = tiny().eval()
    with torch.no_grad():                           # untrained, all queries are nearly alike
        for layer in model.network.decoder.layers:
            layer.cross_attention.in_proj_weight.mul_(6)
        model.network.mask_head[-1].weight.mul_(100)
    pixels = torch.from_numpy(toy_scene(np.random.default_rng(5))[0][:70, :101])
    pixels = pixels.permute(2, 0, 1)[None]
    with torch.no_grad():                           # classes between which the masks differ
        words = model.image_projector(model.masks(pixels)[1])[0]                    # (Q, D)
    classes = (words - words.mean(dim=0)).unflatten(0, (3, 2))
    return model, pixels, F.normalize(classes, dim=-1)


def test_merging_one_pixel_by_hand():
    """Masks (2, 0) with class shares ((.9, .1), (.2, .8)): their mean by sigmoid; "hard" takes the
    larger mask."""
    masks = torch.tensor([2., 0]).view(1, 2, 1, 1)
    classes = torch.tensor([[[.9, .2], [.1, .8]]])
    soft = merge_masks(masks, classes).flatten().tolist()
    assert soft == pytest.approx([0.646523, 0.353477], abs=1e-6)
    assert merge_masks(masks, classes, "hard").flatten().tolist() == pytest.approx([0.9, 0.1])


@pytest.mark.parametrize("merge, grid", [("soft", (24, 32)), ("fine", (96, 128)),
                                         ("hard", (24, 32))])
def test_scores_are_shares(named, merge, grid):
    """Scores are not negative and sum to 1 in each cell of the padded image's grid."""
    model, pixels, classes = named
    model.protocol = SSeg.Protocol(merge=merge)
    scores, covered = model.patch_scores(pixels, classes)
    assert scores.shape == (1, 3, *grid) and covered == (96, 128)
    assert scores.min() >= 0
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(1, *grid), rtol=0, atol=1e-5)
    model.protocol = SSeg.Protocol()


def test_scores_by_a_loop(named):
    """The scores of one cell from its masks and their features, one by one: softmax over classes of
    the scaled cosine with the best name, weighted by sigmoids."""
    model, pixels, classes = named
    scores, _ = model.patch_scores(pixels, classes)
    padded = F.pad(model.normalise(pixels), (0, 27, 0, 26))
    with torch.no_grad():
        masks, mask_features = model.network(padded)
        total = torch.zeros(3)
        inside = masks[0, -1, :, 4, 7].sigmoid()
        for q in range(Q):
            word = F.normalize(model.image_projector(mask_features[0, q]), dim=-1)
            cosine = torch.stack([max(word @ name for name in names) for names in classes])
            total += inside[q] * (model.logit_scale.exp() * cosine).softmax(dim=0)
    torch.testing.assert_close(scores[0, :, 4, 7], total / inside.sum(), rtol=1e-4, atol=1e-5)


def test_the_scripts_use_it(whole, folder, tmp_path):
    """eval.py and segment.py work with a trained model by its own protocol, with thresholds for the
    background, sweeps and merges."""
    command = ["--dataset", str(folder), "--checkpoint", str(whole), "--device", "cpu"]
    eval.main([*command, "--background", "threshold:0.5", "--sweep-background", "--output",
               str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["method"] == "sseg" and result["protocol"]["merge"] == "soft"
    assert result["protocol"]["templates"] == "plain"
    curve = dict(result["sweep"])
    assert curve[0.0] == curve[-1.0] and curve[1.0] < 0.2   # scores lie in 0..1
    eval.main([*command, "--without", "background", "--set", "protocol.merge=hard", "--output",
               str(tmp_path / "hard.json")])
    assert json.loads((tmp_path / "hard.json").read_text())["protocol"]["merge"] == "hard"
    segment.main([str(folder / "images" / "photo0.png"), "--classes", "cow, grass", "--checkpoint",
                  str(whole), "--background", "threshold:0.5", "--output", str(tmp_path)])
    content = json.loads((tmp_path / "photo0.json").read_text())
    assert content["names"] == ["background", "cow", "grass"]


def test_regions_are_named_by_their_majority():
    """By hand: the class of most pixels that are scored; 255 is not counted, and a region of such
    pixels alone is class 0."""
    regions = torch.tensor([[0, 0, 1], [0, 1, 2]])
    truth = torch.tensor([[2, 2, 3], [1, 255, 255]], dtype=torch.uint8)
    assert oracle.named_by_truth(regions, truth, 4).tolist() == [[2, 2, 3], [2, 3, 0]]


def test_the_oracle_of_a_run(whole, folder, tmp_path, capsys, fails):
    """tests/oracle.py prints the scores of a run's masks and of its teacher's clusters, and draws
    them: a row of six panels for each of the three photos."""
    command = ["--dataset", str(folder), "--picture", str(tmp_path / "masks.png")]
    fails(oracle.main, command, "--picture shows a model's masks")
    oracle.main([*command, "--checkpoint", str(whole)])
    with Image.open(tmp_path / "masks.png") as drawn:
        assert drawn.height >= 3 * (64 + 24) and drawn.width > 6 * 64
    masks, teacher = capsys.readouterr().out.splitlines()
    assert masks.startswith("masks: oracle mIoU") and teacher.startswith("teacher: oracle mIoU")


def test_settings_that_do_not_go_together_are_refused():
    """Sizes and names that do not fit each other end with a line that names them."""
    for change, words in [
            ({"decoder_width": 40}, "decoder_width is 40; expected a multiple of 32"),
            ({"decoder_width": 64, "decoder_heads": 5}, "decoder_width is 64; .* the 5 heads"),
            ({"queries": 2}, "clusters is 3; expected at most the 2 queries"),
            ({"student": "resnet18"}, "student is 'resnet18'; expected toy or a Swin"),
            ({"student": "swin_none"}, "swin_none"),
            ({"backbone": {"name": "toy", "image_token": "mean"}}, "image_token is not used")]:
        with pytest.raises(ValueError, match=words):
            tiny(**change)


def test_images_are_classified_as_a_whole(named):
    """image_scores are cosines of the image's embedding, the one of the contrastive loss."""
    model, pixels, classes = named
    pixels = pixels[..., :64, :96]
    with torch.no_grad():
        _, mask_features = model.network(model.normalise(pixels))
        image = project(model.image_projector, mask_features.mean(dim=1))
        found = model.image_scores(pixels, classes)
    expected = torch.stack([max(image[0] @ name for name in names) for names in classes])
    torch.testing.assert_close(found[0], expected)
