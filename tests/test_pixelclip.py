"""PixelCLIP and the dense CLIP under it: each formula against numbers worked out by hand or against
open_clip's own modules, and training that depends neither on processes nor on interruptions."""
import json
import math
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.factory import _rescan_model_configs
from PIL import Image

import eval
import segment
import train
from conftest import read_log
from conftest import tiny as simzss_of_the_toy
from machinery.files import read_tensors, save_tensors
from machinery.names import read_templates
from machinery.networks.checkpoint import load_model, save_model
from machinery.networks.release import RELEASES
from machinery.parallel import join_processes
from machinery.settings import read
from machinery.training.loading import encode_in_micro_batches
from methods.parts.dense_clip import neighbour_path, position_table, value_path
from methods.pixelclip import (Decoder, MaskGenerator, PixelCLIP, load_clip, pixel_loss,
                               pooling_weights, prompt_tokens, sinkhorn, union_of_masks)
from processes import Processes, check_resumed, check_two_processes

TINY = {"embed_dim": 16, "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 32, "head_width": 16,
                       "layers": 3},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 1}}
SMALL = {"clip_model": "tiny/random", "network_size": 64, "resize": 80, "mask_backbone": "toy",
         "clusters": 4, "mask_grid": 32, "pseudo_classes": 8, "free_tokens": 2,
         "decoder_channels": [8, 4]}
FLAGS = ("--recipe pixelclip --clip-model tiny/random --network-size 64 --resize 80 --clusters 4 "
         "--mask-backbone toy --mask-grid 32 --pseudo-classes 8 --free-tokens 2 --decoder-channels "
         "8 4 --image-size 64 --batch 4 --workers 0 --device cpu").split()


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(tmp_path_factory):
    """A CLIP of open_clip that is small enough for tests: a grid of 4 x 4, D = 16. And two that
    are not of its kind."""
    folder = tmp_path_factory.mktemp("configs")
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}
    changes = {"tiny": {}, "wide": {"embed_dim": 24}, "resnet": {"vision_cfg": resnet}}
    for name, change in changes.items():
        (folder / f"{name}.json").write_text(json.dumps({**TINY, **change}))
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    _rescan_model_configs()


def settings_of(**changes):
    return read(PixelCLIP.Settings, {**SMALL, **changes}, "test")


def tiny(**changes):
    """PixelCLIP on the tiny CLIP, ready to train."""
    torch.manual_seed(0)
    model = PixelCLIP(settings_of(**changes), training=True)
    for p in model.backbone.parameters():           # biases of zero would hide mistakes
        p.data += 0.05 * torch.randn_like(p)
    model.teacher.load_state_dict(model.backbone.state_dict())
    return model


def some_batch(B=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (2, B, 3, 8, 8), generator=generator)
    weak, strong = F.interpolate(blocks.flatten(0, 1).float(), 64).byte().unflatten(0, (2, B))
    return {"weak": weak, "strong": strong, "seed": torch.arange(B)}


def gradients_of(model, batch, encoded):
    """Losses and gradients, by name."""
    model.zero_grad()
    losses = model.losses(encoded, batch)
    losses["loss"].backward()
    return losses, {name: p.grad.clone() for name, p in model.trained().items()}


# --------------------------------------------------------------------------------------------------
# Dense CLIP

@pytest.fixture(scope="module")
def vit_b():
    """CLIP's ViT-B/16 as it is, with random weights."""
    torch.manual_seed(0)
    return PixelCLIP(PixelCLIP.Settings(clip_model="ViT-B-16-quickgelu/random")).eval()


@torch.no_grad()
def test_vit_b_is_open_clips_up_to_the_last_block(vit_b):
    """On CLIP's own size, the last block as it was gives open_clip's embedding: patches, positions
    and blocks 1-11 are its. At 320 pixels the features are (20, 20, 512)."""
    encoder = vit_b.backbone
    images = torch.randn(1, 3, 224, 224)
    visual = encoder.visual
    x = visual.transformer.resblocks[-1](encoder.tokens(images))
    torch.testing.assert_close(visual.ln_post(x[:, 0]) @ visual.proj, visual(images))
    assert encoder(torch.randn(1, 3, 320, 320)).shape == (1, 20, 20, 512)


def test_what_is_trained(vit_b):
    """Of ViT-B/16 49 tensors with 28,499,712 of 86,192,640 values: all attention and the positions.
    The decoder has 118,145."""
    trained = vit_b.trained()
    assert len(trained) == 49 and all(name.startswith("backbone.") for name in trained)
    assert sum(p.numel() for p in trained.values()) == 28_499_712
    assert sum(p.numel() for p in vit_b.backbone.parameters()) == 86_192_640
    assert sum(p.numel() for p in Decoder(64, 32).parameters()) == 118_145


@torch.no_grad()
def test_class_embeddings_are_open_clips(vit_b):
    """A class's embedding is the mean of open_clip's own text embeddings of its prompts."""
    texts = ["a photo of a cat.", "art of the cat."]
    own = vit_b.text.tower(open_clip.get_tokenizer("ViT-B-16")(texts))
    expected = F.normalize(F.normalize(own, dim=-1).mean(dim=0), dim=-1)
    found = vit_b.embed_classes(["cat", ["dog", "hound"]], ["a photo of a {}.", "art of the {}."])
    assert found.shape == (2, 2, 512)
    torch.testing.assert_close(found[0], expected.expand(2, -1))


@torch.no_grad()
def test_convnext_b_is_open_clips_at_every_position():
    """ConvNeXt-B: each position is what open_clip's own head makes of it alone; all 88,221,824
    values are trained; stochastic depth, of 35 blocks, drops in training only."""
    encoder, _, _ = load_clip("convnext_base_w_320/random")
    encoder.eval()
    assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) == 88_221_824
    drops = [part for part in encoder.modules() if getattr(part, "drop_prob", 0)]
    assert len(drops) == 35
    images = torch.randn(1, 3, 64, 64)
    dense = encoder(images)
    own = encoder.visual.trunk.forward_features(images)                     # (1, width, 2, 2)
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        alone = encoder.visual.trunk.forward_head(own[:, :, y:y + 1, x:x + 1])
        torch.testing.assert_close(dense[:, y, x], encoder.visual.head(alone))
    small = images[:, :, :32, :32]
    torch.testing.assert_close(encoder.pooled(small), encoder(small)[:, 0, 0])


def test_positions_of_another_grid():
    """On the table's own grid positions stay as they are, on another the class token's does; the
    rest is bicubic: one at a single place, twice enlarged, gives the weights worked out by hand."""
    table = torch.zeros(1 + 14 * 14, 1)
    table[0] = 7
    table[1 + 6 * 14 + 6] = 1
    assert torch.equal(position_table(table, (14, 14), (14, 14)), table)
    resized = position_table(table, (14, 14), (28, 28))
    half = torch.tensor([-.03515625, -.10546875, .26171875, .87890625])
    line = torch.cat([half, half.flip(0)])          # rows 9 to 16
    expected = torch.zeros(28, 28)
    expected[9:17, 9:17] = line[:, None] * line
    assert resized[0] == 7
    torch.testing.assert_close(resized[1:].view(28, 28), expected)


def test_the_last_block_sees_one_position_and_the_class_token():
    """Position i depends, bit by bit, on no other token's input, but on the class token's: its
    residual. Each is open_clip's attention of a sequence of that token alone."""
    block = tiny().backbone.visual.transformer.resblocks[-1]
    x = torch.randn(2, 17, 32)
    before = value_path(block, x)
    changed = x.clone()
    changed[:, 5] += 1
    same = (value_path(block, changed) == before).all(dim=-1)                       # (2, 17)
    assert not same[:, 5].any() and same[:, torch.arange(17) != 5].all()
    changed = x.clone()
    changed[:, 0] += 1
    assert (value_path(block, changed) != before).any(dim=-1).all()
    alone = block.attention(block.ln_1(x.flatten(0, 1)[:, None])).view_as(x)
    u = x[:, :1] + alone
    torch.testing.assert_close(before, u + block.mlp(block.ln_2(u)))


@torch.no_grad()
def test_the_neighbours_block_is_naclips():
    """A slow loop in float64: patches attend by the products of their keys and the Gaussian of
    their distance, the class token's row and column by the products alone; no residual, no MLP."""
    block = tiny().backbone.visual.transformer.resblocks[-1].double()
    x = torch.randn(1, 1 + 3 * 4, 32, dtype=torch.float64)
    found = neighbour_path(block, x, (3, 4))[0]
    normed = block.ln_1(x)[0]
    _, key, value = (normed @ part.T + bias for part, bias in zip(
        block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)))
    mixed = torch.zeros(13, 32, dtype=torch.float64)
    for head in range(2):
        own = slice(16 * head, 16 * head + 16)
        for i in range(13):
            logits = []
            for j in range(13):
                near = 0.0
                if i > 0 and j > 0:
                    rows = (i - 1) // 4 - (j - 1) // 4
                    columns = (i - 1) % 4 - (j - 1) % 4
                    near = math.exp(-(rows ** 2 + columns ** 2) / (2 * 5 ** 2))
                logits.append(float(key[i, own] @ key[j, own]) / 4 + near)
            parts = [math.exp(logit) for logit in logits]
            mixed[i, own] = sum(part / sum(parts) * value[j, own] for j, part in enumerate(parts))
    torch.testing.assert_close(found, block.attn.out_proj(mixed))


@torch.no_grad()
def test_features_are_enlarged_before_they_are_normalised():
    """Scores are cosines of the enlarged raw features; the other order gives others. A factor on
    the features changes nothing. The grid covers the whole window, whatever its shape."""
    model = tiny().eval()
    model.protocol = PixelCLIP.Protocol()
    pixels = some_batch()["weak"][..., :40]                                 # (4, 3, 64, 40)
    classes = F.normalize(torch.randn(5, 16), dim=-1)
    scores, covered = model.patch_scores(pixels, classes)
    assert tuple(covered) == (64, 40)
    features = model.backbone(model.network_input(pixels, 64)).permute(0, 3, 1, 2)
    large = F.interpolate(features, (64, 64), mode="bilinear")
    expected = torch.einsum("bdhw,cd->bchw", F.normalize(large, dim=1), classes)
    torch.testing.assert_close(scores, expected)
    other = F.interpolate(F.normalize(features, dim=1), (64, 64), mode="bilinear")
    assert (torch.einsum("bdhw,cd->bchw", other, classes) - expected).abs().max() > 1e-3
    model.backbone.visual.proj *= 3
    torch.testing.assert_close(model.patch_scores(pixels, classes)[0], scores)


@torch.no_grad()
@pytest.mark.parametrize("last_block", ["value", "neighbours"])
def test_windows_are_seen_as_they_are(last_block):
    """With input = "native" a window is padded to whole patches, which the grid covers; each patch
    has the cosine of its own feature. protocol.last_block says which way the last block goes."""
    model = tiny().eval()
    model.protocol = PixelCLIP.Protocol(input="native", last_block=last_block)
    pixels = some_batch()["weak"][..., :40]                                 # (4, 3, 64, 40)
    classes = F.normalize(torch.randn(5, 16), dim=-1)
    scores, covered = model.patch_scores(pixels, classes)
    assert tuple(covered) == (64, 48)
    visual = model.backbone.visual
    x = model.backbone.tokens(F.pad(model.backbone.normalise(pixels), (0, 8)))
    block = visual.transformer.resblocks[-1]
    x = value_path(block, x) if last_block == "value" else neighbour_path(block, x, (4, 3))
    features = F.normalize(visual.ln_post(x[:, 1:]) @ visual.proj, dim=-1)  # (4, 12, 16)
    torch.testing.assert_close(scores.flatten(2), classes @ features.mT)


@torch.no_grad()
def test_scores_of_whole_images_are_clips():
    """`image_scores` are cosines with CLIP's own embedding of the image."""
    model = tiny().eval()
    pixels = some_batch()["weak"]
    classes = F.normalize(torch.randn(5, 16), dim=-1)
    own = model.backbone.visual(model.backbone.normalise(pixels))
    torch.testing.assert_close(model.image_scores(pixels, classes),
                               F.normalize(own, dim=-1) @ classes.T)


# --------------------------------------------------------------------------------------------------
# Prompts

def test_the_prompt_has_13_tokens():
    """"A photo of a {} {} {} {} in the scene": its ids, the free tokens at positions 5 to 8."""
    tokens, free = prompt_tokens("A photo of a {} in the scene", 4)
    assert tokens[:14].tolist() == [49406, 320, 1125, 539, 320, 39025, 39025, 39025, 39025, 530,
                                    518, 3562, 49407, 0]
    assert free.tolist() == [5, 6, 7, 8]


@torch.no_grad()
def test_prompts_of_the_placeholder_are_the_plain_text():
    """With the embedding of "{}" in all free places, a pseudo-class is the template itself; they
    begin as those of other entries."""
    model = tiny()
    prompts = model.prompts
    table = model.text.tower.token_embedding.weight
    assert torch.cdist(prompts.words.flatten(0, 1), table).min(dim=1).values.max() < 1e-3
    prompts.words[:] = table[39025]
    padded = F.pad(prompts.tokens, (0, 77 - len(prompts.tokens)))
    text = F.normalize(model.text.tower(padded[None]), dim=-1)
    torch.testing.assert_close(prompts(model.text), text.expand(8, -1))


def test_prompts_begin_as_given_words():
    """With prompt_words each free token begins as one of these; all of them occur."""
    model = tiny(prompt_words=["cow", "sea"], pseudo_classes=30)
    table = model.text.tower.token_embedding.weight
    cow, sea = table[open_clip.tokenize(["cow", "sea"])[:, 1]]
    is_cow, is_sea = ((model.prompts.words == word).all(dim=-1) for word in (cow, sea))
    assert (is_cow | is_sea).all() and is_cow.any() and is_sea.any()


# --------------------------------------------------------------------------------------------------
# Masks

def test_masks_by_kmeans_are_a_partition_of_each_image_alone():
    """Each cell belongs to one mask; an image's masks do not depend on the others of the batch; an
    image of one colour is one mask."""
    generator = MaskGenerator(settings_of())
    batch = some_batch()
    batch["weak"][3] = 90
    masks = generator(batch["weak"], batch["seed"])                         # (4, 4, 32, 32)
    assert (masks.sum(dim=1) == 1).all()
    assert torch.equal(generator(batch["weak"][2:3], batch["seed"][2:3])[0], masks[2])
    assert masks[0].any(dim=(1, 2)).all() and masks[3].any(dim=(1, 2)).sum() == 1


def test_masks_from_files_lie_where_they_are_seen():
    """Crop and flip move masks and pixels alike; the black rectangle of the strong view is cut out
    of them, and a mask without a cell is left out. With strength 0, colours stay as they are."""
    mask = np.zeros((200, 240), bool)
    mask[30:150, 50:] = True
    mask[90:, :70] = True
    photo = np.where(mask[..., None], (220, 20, 20), (20, 20, 220)).astype(np.uint8)
    pair = SimpleNamespace(image=lambda: Image.fromarray(photo), path="photo.png", size=64,
                           masks=lambda: [mask, np.ones_like(mask), np.zeros_like(mask)])
    flipped = set()
    for seed in range(8):
        torch.manual_seed(seed)
        sample = PixelCLIP.sample(pair, np.random.default_rng(seed),
                                  settings_of(masks="files", colours=0.0))
        whole_black = (sample["strong"] == 0).all(dim=0)
        assert torch.equal(sample["strong"], sample["weak"] * ~whole_black)
        masks = sample["masks"] > 0                                         # (2, 32, 32)
        black = whole_black[1::2, 1::2]
        if len(masks) == 1:                         # the first lies outside the crop
            continue
        assert torch.equal(masks[1], ~black)
        red = F.avg_pool2d(sample["weak"][:1].float(), 2)[0] > 120
        wrong = (masks[0] != (red & ~black)).float().mean()
        assert wrong < 0.03                         # mixed colours along the edge
        flipped.add(bool(red[:, :8].float().mean() > red[:, -8:].float().mean()))
        assert 0.005 < black.float().mean() < 0.27
    assert flipped == {True, False}
    pair.masks = lambda: [mask[:, :100]]
    with pytest.raises(ValueError, match="a mask of photo.png is 100 x 200, its image 240 x 200"):
        PixelCLIP.sample(pair, np.random.default_rng(0), settings_of(masks="files"))
    pair.path = None                                # a pair from memory has no file beside it
    with pytest.raises(ValueError, match="--masks files needs image files"):
        PixelCLIP.sample(pair, np.random.default_rng(0), settings_of(masks="files"))


def test_pooling_is_enlarging_and_averaging():
    """The weights of cells are those of enlarging the features to the masks' grid and averaging
    there, and sum to 1; by hand for 2 cells and 4; an empty mask has none."""
    corner = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    corner[0, 0, 0, :2] = True
    weights = pooling_weights(corner, 2, 2)
    assert weights[0, 0].tolist() == [[0.875, 0.125], [0, 0]]
    assert (weights[0, 1] == 0).all()
    masks = torch.rand(2, 5, 32, 32) < 0.3
    features = torch.randn(2, 4, 4, 16, dtype=torch.float32)
    large = F.interpolate(features.permute(0, 3, 1, 2), (32, 32), mode="bilinear")
    mean = torch.einsum("bmxy,bdxy->bmd", masks.float(), large) / masks.sum(dim=(2, 3))[..., None]
    weights = pooling_weights(masks, 4, 4)
    torch.testing.assert_close(torch.einsum("bmhw,bhwd->bmd", weights, features), mean,
                               rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(weights.sum(dim=(2, 3)), torch.ones(2, 5))


# --------------------------------------------------------------------------------------------------
# Balanced assignment

COSINES = torch.tensor([[.9, .1], [.8, .2], [.7, .4], [.6, .5]])


@pytest.mark.parametrize("sharpness, first, ids", [
    (1, [.586618, .537430, .462571, .413383], [0, 0, 1, 1]),
    (10, [.986020, .905173, .322145, .060430], [0, 0, 1, 1]),
    (100, [None, None, None, .018867], [0, 0, 0, 1])])
def test_sinkhorn_by_hand(sharpness, first, ids):
    """Four masks, two classes, three rounds; without balance all four would be of the first."""
    share = sinkhorn(sharpness * COSINES)
    for found, expected in zip(share[:, 0].tolist(), first):
        assert expected is None or found == pytest.approx(expected, abs=1e-6)
    assert share.argmax(dim=1).tolist() == ids
    assert COSINES.argmax(dim=1).tolist() == [0, 0, 0, 0]


def unit(rows, D=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, D, generator=generator) + 1, dim=-1)


def test_classes_get_equal_shares():
    """A mask's shares sum to 1. Those of a class come nearer to R / C with every round. Plain
    softmax gives one class far more masks than Sinkhorn does."""
    cosines = unit(900, 64) @ unit(64, 64, seed=1).T
    deviation = []
    for rounds in (1, 3, 10, 50):
        share = sinkhorn(100 * cosines, rounds)
        torch.testing.assert_close(share.sum(dim=1), torch.ones(900))
        deviation.append((share.sum(dim=0) * 64 / 900 - 1).abs().max().item())
    assert deviation == sorted(deviation, reverse=True) and deviation[-1] < 1e-3
    largest = [choice.bincount(minlength=64).max() for choice in
               (cosines.argmax(dim=1), sinkhorn(100 * cosines).argmax(dim=1))]
    assert largest[0] > 2 * largest[1]


def shared_sinkhorn(scores, cuts, path):
    processes = join_processes("cpu", 1)
    own = scores.tensor_split(cuts)[processes.rank]
    torch.save(sinkhorn(own), f"{path}{processes.rank}")
    processes.end_together()


def test_sinkhorn_over_processes_is_one(tmp_path):
    """Three processes with 37, 0 and 23 masks share them out as one with all 60 does; alone, each
    would do otherwise."""
    scores = 30 * unit(60) @ unit(8, seed=1).T
    run = Processes(tmp_path, 3, shared_sinkhorn, scores, (37, 37), tmp_path / "share")
    assert run.wait() == [0, 0, 0], run.output()
    together = torch.cat([torch.load(tmp_path / f"share{rank}") for rank in range(3)])
    torch.testing.assert_close(together, sinkhorn(scores), rtol=1e-5, atol=1e-6)
    assert (sinkhorn(scores[:37]) - together[:37]).abs().max() > 0.01


# --------------------------------------------------------------------------------------------------
# Targets, decoder, loss

def test_loss_by_hand():
    """Two classes, four pixels, of which the last is under no mask; a pixel may be of two classes,
    and under two masks of one. What is answered at uncovered pixels does not count. Zero logits
    give ln 2."""
    logits = torch.tensor([[1.0, -1, 0, 2], [0, 1, -2, 0]]).view(1, 2, 2, 2)
    masks = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]).bool()
    targets = union_of_masks(masks.view(1, 4, 2, 2), torch.tensor([[0, 1, -1, 0]]), 2)
    assert targets.flatten(2).int().tolist() == [[[1, 1, 0, 0], [0, 1, 1, 0]]]
    assert pixel_loss(logits, targets) / 6 == pytest.approx(0.908835, abs=1e-6)
    logits[..., 1, 1] = 50
    assert pixel_loss(logits, targets) / 6 == pytest.approx(0.908835, abs=1e-6)
    assert pixel_loss(0 * logits, targets) / 6 == pytest.approx(math.log(2))


@torch.no_grad()
def test_the_decoder_sees_one_class_at_a_time():
    """Permuting classes permutes the logits, bit by bit; 20 cells become 80."""
    decoder = Decoder(64, 32)
    maps = torch.randn(6, 1, 20, 20)
    order = torch.randperm(6)
    refined = decoder(maps)
    assert refined.shape == (6, 1, 80, 80)
    assert torch.equal(decoder(maps[order]), refined[order])


def test_small_masks_are_dropped():
    """A mask of less than two cells gets no pseudo-class."""
    model = tiny()
    masks = torch.zeros(2, 3, 32, 32, dtype=torch.int8)
    masks[:, 0, :9] = 1
    masks[:, 1, 10, 10] = 1
    batch = {**some_batch(2), "masks": masks}
    ids = model.assign_masks(model.features(batch)["pooled"], masks > 0)
    assert (ids[:, 0] >= 0).all() and (ids[:, 1:] == -1).all()


def test_what_learns_and_what_does_not():
    """Gradient reaches decoder, prompts, attention and positions; not the text tower, the teacher
    or the rest of the student; in the last block not queries and keys. At the start the loss is
    near ln 2."""
    model = tiny()
    batch = model.features(some_batch())
    losses, gradients = gradients_of(model, batch, model.encode(batch))
    assert 0.4 < losses["loss"] < 1.2 and losses["masks"] == 16
    assert {name.partition(".")[0] for name in gradients} == {"decoder", "prompts", "backbone"}
    assert all((grad != 0).any() for grad in gradients.values())
    others = [p for name, p in model.named_parameters() if name not in gradients]
    assert all(p.grad is None for p in others)
    values = gradients["backbone.visual.transformer.resblocks.2.attn.in_proj_weight"]
    assert (values[:64] == 0).all() and (values[64:] != 0).any()


def test_micro_batches_are_the_whole_batch():
    """Features are those of each image alone, and so are losses and gradients of a batch that is
    encoded image by image."""
    model = tiny()
    batch = some_batch()
    rows = [model.features({name: value[i:i + 1] for name, value in batch.items()})
            for i in range(4)]
    batch = model.features(batch)
    for name, value in batch.items():
        torch.testing.assert_close(torch.cat([row[name] for row in rows]), value)
    whole, expected = gradients_of(model, batch, model.encode(batch))
    parts, found = gradients_of(
        model, batch, encode_in_micro_batches(model.encode, model.order, batch, 1))
    torch.testing.assert_close(parts["loss"], whole["loss"])
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6)


def test_two_processes_are_one(tmp_path):
    """The gradients of two processes are those of one; one of the images has a single mask."""
    model = tiny()
    batch = some_batch()
    batch["weak"][3] = 90
    check_two_processes(tmp_path, model, batch)


# --------------------------------------------------------------------------------------------------
# Teacher and optimizer

def test_parameter_groups():
    """Three learning rates; weight decay on all but the decoder's GroupNorm."""
    model = tiny()
    groups = model.parameter_groups()
    assert sorted((group["rate"], group["decay"]) for group in groups) == [
        (0.01, 1.0), (1.0, 0.0), (1.0, 1.0), (10.0, 1.0)]
    [norms] = [group["params"] for group in groups if group["decay"] == 0]
    assert [len(p) for p in norms] == [8] * 4 + [4] * 4
    assert sum(len(group["params"]) for group in groups) == len(model.trained())


def test_the_teacher_follows():
    """It starts as a copy; after n steps of a student that stands still, 0.999^n of the distance is
    left. It has no stochastic depth: it stays in evaluation mode."""
    model = tiny(ema=0.999).train()
    assert model.backbone.training and not model.teacher.training
    for slow, fast in zip(model.teacher.parameters(), model.backbone.parameters()):
        assert torch.equal(slow, fast)
    student = model.backbone.visual.positional_embedding
    teacher = model.teacher.visual.positional_embedding
    student.data += 1
    for step in range(20):
        model.after_step(step, 20)
    torch.testing.assert_close(student - teacher, torch.full_like(student, 0.999 ** 20),
                               rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Runs

RUN = [*FLAGS, "--train-data", "toy", "--steps", "5", "--ema", "0.9", "--set",
       "run.epoch_pairs=20"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_clip):
    """Folder of an uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("pixelclip") / "whole"
    train.main([*RUN, "--output", str(folder)])
    return folder


def test_ended_and_resumed_is_uninterrupted(whole, tmp_path):
    """Losses, which show the teacher, and weights of a resumed run are the uninterrupted one's, bit
    by bit."""
    check_resumed(whole, tmp_path / "run", PixelCLIP, 2, RUN)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of five photos, and nothing else."""
    folder = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(some_batch(5)["weak"]):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((120, 90)).save(
            folder / f"{i}.png")
    return folder


@pytest.fixture
def weights(tmp_path):
    """File with weights of the tiny CLIP, as open_clip writes them."""
    torch.save(open_clip.create_model("tiny").state_dict(), tmp_path / "clip.pt")
    return tmp_path / "clip.pt"


def test_a_folder_of_photos_is_training_data(photos, weights, tmp_path, capsys):
    """No captions are needed. The checkpoint of a CLIP from a file holds what was trained, nothing
    else; it segments by its own protocol; with another file of CLIP it says so."""
    train.main([*FLAGS, "--train-data", str(photos), "--clip-model", f"tiny/{weights}", "--steps",
                "2", "--output", str(tmp_path / "run")])
    model = load_model(tmp_path / "run")
    assert set(model.checkpoint()) == {f"backbone.{name}" for name, p
                                       in model.backbone.named_parameters() if p.requires_grad}
    segment.main([str(photos / "0.png"), "--classes", "cat, sofa", "--checkpoint",
                  str(tmp_path / "run"), "--output", str(tmp_path)])
    result = json.loads((tmp_path / "0.json").read_text())
    protocol = {"templates": "pixelclip", "short_side": 640, "window": 2048, "stride": 2048,
                "input": "squash"}
    assert protocol.items() <= result["protocol"].items()
    assert "warning" not in capsys.readouterr().err
    torch.save(open_clip.create_model("tiny").state_dict(), weights)
    with pytest.raises(ValueError, match="are not those that .* was trained with"):
        load_model(tmp_path / "run")


def test_a_clip_with_random_weights_is_kept_whole(whole, photos, tmp_path, capsys):
    """It cannot be had again: the checkpoint holds all of it, and the user is warned."""
    first = load_model(whole)
    second = load_model(whole)
    assert any(name.startswith("text.") for name in first.checkpoint())
    assert torch.equal(first.embed_classes(["cat"]), second.embed_classes(["cat"]))
    eval.main(["--dataset", "toy", "--limit", "2", "--checkpoint", str(whole)])
    assert "random weights; its masks mean nothing" in capsys.readouterr().err


def test_dense_clip_needs_no_training(photos, weights, tmp_path, capsys):
    """--checkpoint clip:MODEL/FILE segments with CLIP as it is, as NACLIP does: windows of CLIP's
    own size in steps of half of it, over a short side of one and a half times it."""
    segment.main([str(photos / "0.png"), "--classes", "cat, sofa", "--checkpoint",
                  f"clip:tiny/{weights}", "--output", str(tmp_path), "--device", "cpu"])
    mask = np.array(Image.open(tmp_path / "0_mask.png"))
    model = PixelCLIP(PixelCLIP.Settings(clip_model=f"tiny/{weights}")).eval()
    templates = read_templates("pixelclip")
    assert len(templates) == 8
    classes = model.embed_classes(["cat", "sofa"], templates)
    image = Image.open(photos / "0.png").convert("RGB")
    protocol = {"short_side": 96, "window": 64, "stride": 32, "input": "native",
                "last_block": "neighbours"}
    assert protocol.items() <= vars(model.protocol).items()
    again, _ = segment.segment_image(model, image, classes, 64, 32, 96, propagate=0.9,
                                     blend="triangle")
    assert (again.numpy() == mask).mean() > 0.999


def test_masks_of_files_train(tmp_path):
    """--masks files: photos with SA-1B's JSON beside them, of different numbers of masks."""
    left_half = "0PP2PP2"                           # runs of 0 zeros, 2048 ones, 2048 zeros
    everything = "0PP4"
    for i, pixels in enumerate(some_batch()["weak"]):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        annotations = [{"segmentation": {"size": [64, 64], "counts": run}}
                       for run in (left_half, everything)[:1 + i]]
        (tmp_path / f"{i}.json").write_text(json.dumps({"annotations": annotations}))
    train.main([*FLAGS, "--masks", "files", "--train-data", str(tmp_path), "--steps", "2",
                "--output", str(tmp_path / "run")])
    assert 4 <= read_log(tmp_path / "run")[0]["masks"] <= 7


def test_the_toy_world(photos, tmp_path, fails):
    """A SimZSS of the toy world is its CLIP: its patch tokens with artefacts, which belong to
    positions alone, are where training starts. --checkpoint clip:FILE scores that before any
    training, by its own protocol, and refuses photos."""
    checkpoint = tmp_path / "model.safetensors"
    simzss = simzss_of_the_toy().eval()
    simzss.protocol.short_side = 64
    save_model(checkpoint, simzss, {"run": {"train_data": "toy"}})
    model = PixelCLIP(PixelCLIP.Settings(clip_model=str(checkpoint))).eval()
    pixels = some_batch()["weak"]
    patches = simzss.backbone(simzss.backbone.normalise(pixels))[1]
    assert model.size == 128                        # as its scenes are; here they are smaller
    model.size = 64
    tokens = model.backbone(model.network_input(pixels))                            # (4, 8, 8, D)
    clear = tokens - model.backbone.artefacts[:, :, ::2, ::2].permute(0, 2, 3, 1)
    torch.testing.assert_close(F.normalize(clear.flatten(1, 2), dim=-1), patches)
    assert 0.12 < (tokens - clear).std() < 0.13
    torch.testing.assert_close(model.embed_classes(["cow"]), simzss.embed_classes(["cow"]))
    train.main(["--recipe", "pixelclip-toy", "--clip-model", str(checkpoint), "--steps", "2",
                "--set", "run.epoch_pairs=20", "--eval-data", "none", "--device", "cpu", "--output",
                str(tmp_path / "run")])
    trained = load_model(tmp_path / "run")
    assert all(name.startswith("backbone.block.") for name in trained.checkpoint())
    eval.main(["--dataset", "toy", "--limit", "1", "--checkpoint", f"clip:{checkpoint}",
               "--output", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text())["protocol"]["short_side"] == 64
    fails(segment.main, [photos / "0.png", "--classes", "cat", "--checkpoint",
                         f"clip:{checkpoint}"], "was trained on the drawn scenes of the toy world")


# --------------------------------------------------------------------------------------------------
# Published checkpoints

CLIP = "sem_seg_head.predictor.clip_model."


def published(clip):
    """Tensors of open_clip's CLIP as PixelCLIP's authors publish it, with those of training."""
    state = clip.state_dict()
    teacher = {f"teacher_encoder.{name}": value + 1 for name, value in state.items()
               if not name.startswith("transformer.")}
    unused = ["prompt_tokens", "head.conv0.weight", "head.up2.bias", "head.proj.bias",
              "head.conv1.double_conv.4.weight"]
    return {**{CLIP + name: value for name, value in state.items()}, **teacher,
            **dict.fromkeys([f"sem_seg_head.predictor.{name}" for name in unused], torch.ones(1))}


@torch.no_grad()
def test_a_published_checkpoint_just_works(weights, photos, tmp_path, fails):
    """It segments by the authors' protocol as the same CLIP from a file of its own does; kept in
    our format it stays the same. A tensor more or less is refused by name, and so is training."""
    clip = open_clip.create_model("tiny")
    torch.save(clip.state_dict(), weights)
    path = tmp_path / "pixelclip.pth"
    torch.save({"model": published(clip), "iteration": 9999}, path)
    model = load_model(path, backbone="tiny")
    assert model.protocol == PixelCLIP.Protocol() and model.protocol.templates == "pixelclip"
    expected = PixelCLIP(PixelCLIP.Settings(clip_model=f"tiny/{weights}")).eval()
    expected.protocol = PixelCLIP.Protocol()
    save_model(tmp_path / "own", model, {})
    pixels = some_batch()["weak"]
    for one in (model, load_model(tmp_path / "own")):
        classes = one.embed_classes(["cat", "sofa"])
        assert torch.equal(classes, expected.embed_classes(["cat", "sofa"]))
        one.size = expected.size = 64
        assert torch.equal(*(each.patch_scores(pixels, classes)[0] for each in (one, expected)))
    segment.main([str(photos / "0.png"), "--classes", "cat, sofa", "--checkpoint", str(path),
                  "--backbone", "tiny", "--output", str(tmp_path), "--device", "cpu"])
    result = json.loads((tmp_path / "0.json").read_text())
    assert result["method"] == "pixelclip" and result["protocol"]["short_side"] == 640

    state = published(clip)
    key = f"{CLIP}visual.transformer.resblocks.2.attn.in_proj_weight"
    for wrong, words in (({**state, f"{CLIP}more": torch.ones(1)}, f"1 unexpected: {CLIP}more"),
                         ({name: state[name] for name in state if name != key}, f"missing: {key}"),
                         ({**state, key: torch.ones(3)}, "1 misshapen")):
        torch.save({"model": wrong}, path)
        with pytest.raises(ValueError, match=words):
            load_model(path, backbone="tiny")
    fails(train.main, [*RUN, "--output", tmp_path, "--clip-model", "tiny/imported"],
          "cannot be trained on")
    fails(segment.main, [photos / "0.png", "--classes", "cat", "--checkpoint",
                         "clip:tiny/imported"], "'imported' is no name of weights")


def test_which_clip_was_published(vit_b):
    """The ViT is told by its patch convolution, and all its names are open_clip's own; without one
    it is the ConvNeXt."""
    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    with torch.device("meta"):                      # names without values
        clip = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    release = RELEASES["pixelclip"]
    theirs = release.tensors(vit_b.checkpoint())
    assert {CLIP + name for name in clip.state_dict()} - set(theirs) == {f"{CLIP}logit_scale"}
    assert len(theirs) == len(clip.state_dict()) - 1
    for state, name in ((theirs, "ViT-B-16-quickgelu"), ({}, "convnext_base_w_320")):
        assert release.settings(state, "x.pth", None, None) == {"clip_model": f"{name}/imported"}


# --------------------------------------------------------------------------------------------------
# Errors

@pytest.mark.parametrize("clip, words", [
    ("clip", "could not be downloaded"),
    ("clip:ViT-B-16/openai", "could not be downloaded"),
    ("clip:ViT-B-17/openai", "unknown CLIP 'ViT-B-17/openai'"),
    ("clip:ViT-B-16", "ViT-B-16 has no weights ''"),
    ("clip:weights.pt", "expected MODEL/WEIGHTS"),
    ("clip:ViT-B-16/magic", "openai"),
    ("clip:ViT-B-16-SigLIP/webli", "expected CLIP's own text tower"),
    ("clip:resnet/random", "no dense features")])
def test_a_clip_that_cannot_be_had(photos, fails, clip, words):
    """Without network, and for names that do not exist or have no dense features, one line says
    what to do."""
    fails(segment.main, [photos / "0.png", "--classes", "cat", "--checkpoint", clip], words)


@pytest.mark.parametrize("name", ["itself", "hf-hub:someone/else/openai", "local-dir:/tmp/openai",
                                  "ViT-bigG-14/random"])
def test_a_checkpoint_opens_no_other_file(whole, tmp_path, name):
    """A checkpoint that names itself as its CLIP, a hub or a folder is refused; so is one that asks
    for a network larger than its file."""
    path = tmp_path / "model.safetensors"
    header, tensors = read_tensors(whole / "model.safetensors")
    header["settings"]["clip_model"] = str(path) if name == "itself" else name
    save_tensors(path, tensors, header)
    expected = "expected one of simzss|unknown CLIP|more than"
    with pytest.raises(ValueError, match=expected) as refused:
        load_model(path)
    assert len(str(refused.value).splitlines()) == 1


def test_a_file_of_another_clip(weights, photos, tmp_path, fails):
    """Weights that do not fit are refused, and so is a checkpoint of another method."""
    (tmp_path / "broken.pt").write_bytes(b"PK no weights")
    for name in (f"wide/{weights}", f"tiny/{tmp_path / 'broken.pt'}"):
        fails(segment.main, [photos / "0.png", "--classes", "cat", "--checkpoint", f"clip:{name}"],
              "does not hold the weights of")


@pytest.mark.parametrize("flags, words", [
    (["--clip-model", "runs/toy-clip"],
     "python train.py --recipe toy --lambda 0 --class-embedding caption --output runs/toy-clip"),
    (["--prompt", "a photo"], "expected one {} in it"),
    (["--ema", "2"], "ema is 2.0; expected at least 0 and at most 1"),
    (["--clusters", "300"], "--clusters is 300; an image has only 64 patches"),
    (["--free-tokens", "80"], "longer than the context of 77"),
    (["--decoder-channels", "6", "4"], "decoder_channels is [6, 4]"),
    (["--network-size", "50"], "--network-size is 50; expected a multiple"),
    (["--image-size", "60"], "--image-size is 60; expected a multiple"),
    (["--mask-backbone", "vit_small_patch16_224.dino"], "pass --mask-weights FILE")])
def test_settings_that_are_refused(tmp_path, monkeypatch, fails, flags, words):
    """Each in one line, before training."""
    monkeypatch.chdir(tmp_path)
    fails(train.main, [*RUN, "--output", tmp_path, *flags], words)
