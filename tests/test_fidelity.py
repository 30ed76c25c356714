"""Fidelity: backbones against timm and an independent ViT, the denoiser, the whole forward pass in
float64, the authors' checkpoints."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import spacy
import timm
import torch
import torch.nn.functional as F
from open_clip import tokenize
from open_clip.transformer import TextTransformer
from timm.models.vision_transformer import Block

import eval
import train
from concepts import noun_concepts
from conftest import BANK, tiny
from machinery.networks.checkpoint import load_model, save_model
from machinery.networks.release import backbone_name
from machinery.toy import toy_scene
from model import SimZSS, TextEncoder, VisionBackbone
from test_concepts import PIPELINE, needs_pipeline
from test_model import (assert_same_outputs, outputs, read_header, same, slow_losses,
                        training_batch, unit)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@torch.no_grad()
def randomise(module, seed=0):
    """Make every parameter random, and none small: no part hides behind an initial value such as
    LayerScale's 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        spread = 0.5 if p.ndim < 2 else p.shape[-1] ** -0.5
        p.copy_(torch.randn(p.shape, generator=generator) * spread)
    return module


# --------------------------------------------------------------------------------------------------
# An independent vision transformer and text transformer: plain float64 tensors by their names, one
# head at a time

def norm(x, state, name, eps=1e-6):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attend(qkv, heads, causal=False):
    q, k, v = qkv.chunk(3, dim=-1)
    size = q.shape[-1] // heads
    mixed = []
    for part in range(0, q.shape[-1], size):
        logits = q[:, part:part + size] @ k[:, part:part + size].T / math.sqrt(size)
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits).triu(1) > 0, -torch.inf)
        mixed.append(logits.softmax(-1) @ v[:, part:part + size])
    return torch.cat(mixed, -1)


def block(x, state, name, heads):
    """A ViT's block, with LayerScale where it has some."""
    qkv = linear(norm(x, state, f"{name}norm1"), state, f"{name}attn.qkv")
    attended = linear(attend(qkv, heads), state, f"{name}attn.proj")
    x = x + attended * state.get(f"{name}ls1.gamma", 1)
    hidden = gelu(linear(norm(x, state, f"{name}norm2"), state, f"{name}mlp.fc1"))
    return x + linear(hidden, state, f"{name}mlp.fc2") * state.get(f"{name}ls2.gamma", 1)


def bicubic(new, old):
    """(new, old): weights of bicubic resampling along an axis (a = -0.5), stretched where it
    shrinks (antialiasing)."""
    def kernel(t):
        if t < 1:
            return 1.5 * t ** 3 - 2.5 * t ** 2 + 1
        return -0.5 * t ** 3 + 2.5 * t ** 2 - 4 * t + 2 if t < 2 else 0

    scale = old / new
    rows = [[kernel(abs(j + 0.5 - (i + 0.5) * scale) / max(scale, 1)) for j in range(old)]
            for i in range(new)]
    return torch.tensor([[weight / sum(row) for weight in row] for row in rows],
                        dtype=torch.float64)


def resampled(table, h, w):
    """(side * side, D) -> (h * w, D)."""
    side = math.isqrt(len(table))
    table = table.view(side, side, -1)
    return torch.einsum("yj,xk,jkd->yxd", bicubic(h, side), bicubic(w, side), table).flatten(0, 1)


def dinov2(state, image, heads):
    """DINOv2 on one image (3, H, W), after the final norm: (1 + registers + N, D)."""
    kernel = state["patch_embed.proj.weight"]
    D, _, patch, _ = kernel.shape
    h, w = (length // patch for length in image.shape[1:])
    x = torch.stack([kernel.flatten(1) @ image[:, y * patch:(y + 1) * patch,
                                               x * patch:(x + 1) * patch].flatten()
                     for y in range(h) for x in range(w)]) + state["patch_embed.proj.bias"]
    table = state["pos_embed"][0]
    first = state["cls_token"][0]
    if "reg_token" in state:                        # the table is of patches only
        x = torch.cat([first, state["reg_token"][0], x + resampled(table, h, w)])
    else:
        x = torch.cat([first + table[:1], x + resampled(table[1:], h, w)])
    for i in range(sum(key.endswith("norm1.weight") for key in state)):
        x = block(x, state, f"blocks.{i}.", heads)
    return norm(x, state, "norm")


def denoised(state, patches, h, w, heads):
    """The denoiser on one image's patch tokens (N, D), by the authors' names."""
    table = state["visual.pos_embed"].reshape(37 * 37, -1)
    return block(patches + resampled(table, h, w), state, "visual.denoiser.", heads)


def text_states(state, caption, heads):
    """CLIP's text transformer on one caption up to its end token: list of all states, projected and
    normalised."""
    length = caption.tolist().index(49407) + 1
    x = state["token_embedding.weight"][caption[:length]] + state["positional_embedding"][:length]
    for i in range(sum(key.endswith("ln_1.weight") for key in state)):
        name = f"transformer.resblocks.{i}."
        y = norm(x, state, f"{name}ln_1", 1e-5)
        qkv = y @ state[f"{name}attn.in_proj_weight"].T + state[f"{name}attn.in_proj_bias"]
        x = x + linear(attend(qkv, heads, causal=True), state, f"{name}attn.out_proj")
        y = gelu(linear(norm(x, state, f"{name}ln_2", 1e-5), state, f"{name}mlp.c_fc"))
        x = x + linear(y, state, f"{name}mlp.c_proj")
    return [unit(y) for y in norm(x, state, "ln_final", 1e-5) @ state["text_projection"]]


def doubled(state, prefix=""):
    """The tensors whose names begin with prefix, in float64, named without it."""
    return {key.removeprefix(prefix): value.detach().double() for key, value in state.items()
            if key.startswith(prefix)}


# --------------------------------------------------------------------------------------------------
# Backbones

@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2.lvd142m",
                                  "vit_small_patch14_dinov2.lvd142m"])
@pytest.mark.parametrize("height, width", [(224, 224), (448, 448), (518, 518), (238, 364)])
def test_dinov2_equals_an_independent_implementation(name, height, width):
    """DINOv2, with registers and without, gives the tokens of a ViT written here, position table
    resampled included."""
    backbone = randomise(VisionBackbone(name, pretrained=False, depth=2, embed_dim=48, num_heads=3))
    image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))
    class_token, patches, grid = backbone(image[None])
    state = doubled(backbone.trunk.state_dict())
    expected = F.normalize(dinov2(state, image.double(), heads=3), dim=-1)
    assert grid == (height // 14, width // 14)
    same(class_token[0], expected[0], rtol=0, atol=2e-6)
    same(patches[0], expected[5 if "reg4" in name else 1:], rtol=0, atol=2e-6)


BACKBONES = [                                       # name, patch size, D, prefix tokens
    ("vit_small_patch16_224.dino", 16, 384, 1),
    ("vit_small_patch8_224.dino", 8, 384, 1),
    ("vit_small_patch14_dinov2.lvd142m", 14, 384, 1),
    ("vit_base_patch14_reg4_dinov2.lvd142m", 14, 768, 5),
    ("vit_large_patch14_reg4_dinov2.lvd142m", 14, 1024, 5),
    ("vit_small_patch16_dinov3.lvd1689m", 16, 384, 5),
    ("vit_base_patch16_clip_224.openai", 16, 768, 1),
    ("vit_base_patch16_siglip_224.webli", 16, 768, 0),
    ("vit_base_patch16_siglip_256.v2_webli", 16, 768, 0)]


@pytest.mark.parametrize("name, patch, D, prefix", BACKBONES)
def test_the_backbones_people_use_give_timms_tokens(name, patch, D, prefix):
    """Each transformer gives the patch tokens of timm's own intermediate-layer call, at timm's size
    and at another that is not square, and the class token or, where there is none, the patches'
    mean. (One block; the width is real.)"""
    backbone = randomise(VisionBackbone(name, pretrained=False, depth=1))
    assert backbone.width == D and backbone.patch_size == (patch, patch)
    assert backbone.prefix_tokens == prefix
    trunk = backbone.trunk
    own = trunk.patch_embed.img_size or trunk.pretrained_cfg["input_size"][1:]
    for size, options in [(own, {}), ((10 * patch, 6 * patch), {"dynamic_img_size": True})]:
        plain = timm.create_model(name, num_classes=0, depth=1, **options).eval()
        plain.load_state_dict(trunk.state_dict())
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            features, (expected,) = plain.forward_intermediates(images, [0], norm=True,
                                                                output_fmt="NLC")
        class_token, patches, grid = backbone(images)
        assert grid == (size[0] // patch, size[1] // patch)
        assert features.shape[1] == prefix + expected.shape[1]
        same(patches, F.normalize(expected, dim=-1), rtol=0, atol=1e-6)
        image = features[:, 0] if prefix else expected.mean(1)
        same(class_token, F.normalize(image, dim=-1), rtol=0, atol=1e-6)


def test_dinov3s_rotary_positions_follow_the_grid():
    """DINOv3 has no position table: at any size it equals a model that timm made for that size, and
    places matter."""
    backbone = randomise(VisionBackbone("vit_small_patch16_dinov3", pretrained=False, depth=1))
    plain = timm.create_model("vit_small_patch16_dinov3", num_classes=0, depth=1,
                              img_size=(96, 160)).eval()
    plain.load_state_dict(backbone.trunk.state_dict())
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        expected = F.normalize(plain.forward_features(images), dim=-1)
    class_token, patches, _ = backbone(images)
    same(class_token, expected[:, 0], rtol=0, atol=1e-6)
    same(patches, expected[:, 5:], rtol=0, atol=1e-6)
    halves_swapped = torch.cat([images[..., 80:], images[..., :80]], -1)
    _, swapped, _ = backbone(halves_swapped)
    swapped_back = swapped.view(6, 10, -1).roll(5, 1).reshape(patches.shape)
    assert (swapped_back - patches).abs().max() > 1e-4


@pytest.mark.parametrize("name, stride, D", [
    ("resnet50.a1_in1k", 32, 2048), ("mobilenetv2_100.ra_in1k", 32, 1280),
    ("convnext_tiny.dinov3_lvd1689m", 32, 768)])
def test_the_cnns_people_use_give_timms_map(name, stride, D):
    """A CNN gives the map that timm's own call gives, at a size that is not square, and its mean as
    class token."""
    backbone = VisionBackbone(name, pretrained=False)
    images = torch.randn(1, 3, 64, 96)
    class_token, patches, grid = backbone(images)
    assert backbone.width == D and backbone.patch_size == (stride, stride)
    assert backbone.prefix_tokens == 0 and grid == (2, 3)
    with torch.no_grad():
        expected = backbone.trunk.forward_features(images).flatten(2).transpose(1, 2)
    same(patches, F.normalize(expected, dim=-1), rtol=0, atol=1e-6)
    same(class_token, F.normalize(expected.mean(1), dim=-1), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# The denoiser

SMALL_VIT = dict(pretrained=False, depth=2, embed_dim=128, num_heads=2)


def denoiser_state(width, shape=(1, 37, 37)):
    """A random denoiser by the authors' names."""
    one = randomise(Block(width, width // 64, mlp_ratio=4, qkv_bias=True), seed=5)
    table = 0.5 * torch.randn(*shape, width, generator=torch.Generator().manual_seed(6))
    return {"visual.pos_embed": table,
            **{f"visual.denoiser.{key}": value for key, value in one.state_dict().items()}}


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    path = tmp_path_factory.mktemp("denoiser") / "denoiser.safetensors"
    safetensors.torch.save_file(denoiser_state(128), path)
    return path


@pytest.mark.parametrize("height, width", [(224, 224), (448, 448), (518, 518), (70, 112)])
def test_the_denoiser_is_one_block_over_patches_and_places(denoiser, height, width):
    """Denoised patch tokens equal a block written here over the tokens before normalisation + the
    table resampled to their grid; the class token is bit-identical to that without a denoiser."""
    plain = randomise(VisionBackbone("vit_small_patch14_reg4_dinov2", **SMALL_VIT))
    clean = VisionBackbone("vit_small_patch14_reg4_dinov2", denoiser=denoiser, **SMALL_VIT)
    clean.trunk.load_state_dict(plain.trunk.state_dict())
    images = torch.randn(1, 3, height, width)
    class_token, patches, (h, w) = clean(images)
    tokens = plain.trunk.forward_features(images)[0, 5:].double()
    expected = denoised(doubled(safetensors.torch.load_file(denoiser)), tokens, h, w, heads=2)
    same(patches[0], F.normalize(expected, dim=-1), rtol=0, atol=2e-6)
    assert torch.equal(class_token, plain(images)[0])
    assert not torch.allclose(patches, plain(images)[1], atol=0.1)


@pytest.mark.parametrize("name", ["denoiser.safetensors", "denoiser.pth"])
@pytest.mark.parametrize("shape", [(1, 37, 37), (37, 37), (1, 37 * 37)])
def test_a_denoiser_is_frozen_hashed_and_in_the_checkpoint(tmp_path, name, shape):
    """A denoiser comes from either kind of file with either form of table, never learns, changes
    the backbone's hash, and is stored in the checkpoint, so that its file is not needed again."""
    path = tmp_path / name
    state = denoiser_state(128, shape)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    plain = tiny("toy")
    model = tiny("toy", denoiser=path)
    assert not any("denoiser" in key for key in model.trained())
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert not model.train().backbone.denoiser.training
    assert model.backbone.config["sha256"] != plain.backbone.config["sha256"]
    assert model.backbone.config["denoiser"]
    save_model(tmp_path / "model.safetensors", model, {})
    path.unlink()
    loaded = load_model(tmp_path)
    assert loaded.backbone.config == model.backbone.config
    assert_same_outputs(model, loaded)
    assert not torch.equal(outputs(plain)[1], outputs(loaded)[1])


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("visual.pos_embed"), "1 missing: visual.pos_embed"),
    (lambda s: s.pop("visual.denoiser.attn.qkv.weight"),
     "1 missing: visual.denoiser.attn.qkv.weight"),
    (lambda s: s.update({"visual.denoiser.ls1.gamma": torch.ones(128)}),
     "1 unexpected: visual.denoiser.ls1.gamma"),
    (lambda s: s.update({"visual.pos_embed": torch.ones(1, 128, 37, 37)}),
     r"visual.pos_embed \[1, 128, 37, 37\] instead"),
    (lambda s: s.update(epoch=7), "expected tensors only, found epoch")])
def test_a_file_that_is_no_denoiser_is_refused(tmp_path, change, words):
    """A denoiser's file with a missing, extra or misshapen tensor, or with something that is no
    tensor, is refused with the key's name, and a missing file with its own."""
    state = denoiser_state(128)
    path = tmp_path / "denoiser.pth"
    change(state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=f"{path}.*{words}") as error:
        VisionBackbone("toy", denoiser=path)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="--denoiser: no file gone.pth"):
        VisionBackbone("toy", denoiser="gone.pth")


RUN = ["--train-data", "toy", "--epoch-pairs", "8", "--steps", "1", "--batch", "8",
       "--text-width", "32", "--image-size", "64", "--eval-data", "none", "--device", "cpu"]


def test_a_run_with_every_new_switch(denoiser, tmp_path, fails):
    """train.py passes denoiser, pooling query and excluded names on to the model that it trains and
    saves."""
    (tmp_path / "gone.txt").write_text("cow\nsheep\n")
    arguments = [*RUN, "--output", str(tmp_path)]
    fails(train.main, [*arguments, "--bank", "none"], "--bank none", "--parser")
    train.main([*arguments, "--denoiser", str(denoiser), "--pool-query", "caption",
                "--exclude-classes", str(tmp_path / "gone.txt")])
    model = load_model(tmp_path)
    assert model.backbone.denoiser
    assert model.pool_query == model.trained_with["pool_query"] == "caption"
    assert "horse" in model.bank and not {"cow", "sheep"} & set(model.bank)


@needs_pipeline
def test_a_run_without_a_bank(tmp_path, capsys):
    """With --bank none the model's concepts are the noun phrases of its captions, and it learns
    from them."""
    train.main([*RUN, "--output", str(tmp_path), "--bank", "none", "--parser", str(PIPELINE)])
    captions = [toy_scene(np.random.default_rng((0, 0, i)))[2] for i in range(8)]
    phrases = {name for doc in spacy.load(PIPELINE).pipe(captions)
               for name, _, _ in noun_concepts(doc)}
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert set(load_model(tmp_path).bank) == phrases
    assert line["present"] == len(phrases) > 5 and line["local"] > 0


# --------------------------------------------------------------------------------------------------
# The whole forward pass

@pytest.mark.parametrize("query", ["class", "caption"])
@pytest.mark.parametrize("target", ["concept", "argmax"])
def test_the_whole_forward_equals_independent_towers_and_losses(denoiser, target, query):
    """From pixels and captions to both losses, with repeated concepts, captions without any and cut
    ones: the model equals transformers, denoiser and equations written out in float64."""
    backbone = randomise(VisionBackbone("vit_small_patch14_reg4_dinov2", denoiser=denoiser,
                                        **SMALL_VIT))
    encoder = randomise(TextEncoder(128, 64, heads=2, layers=2))
    model = SimZSS(backbone, encoder, BANK, local_target=target, pool_query=query)
    images, tokens, ids, spans = training_batch(model, size=70)
    losses = model(images, tokens, ids, spans)

    frozen = doubled(backbone.state_dict())
    text = doubled(model.text.state_dict(), "tower.")
    features = [dinov2(doubled(frozen, "trunk."), image, heads=2) for image in images.double()]
    cleaner = {f"visual.{key}": value for key, value in doubled(frozen, "denoiser.").items()}
    patches = [[unit(patch) for patch in denoised(cleaner, x[5:], 5, 5, heads=2)]
               for x in features]
    states = [text_states(text, caption, heads=2) for caption in tokens]
    class_tokens = [unit(x[0]) for x in features]
    captions = [x[-1] for x in states]
    scale = model.logit_scale.detach().double().exp()
    expected = slow_losses(class_tokens, patches, captions, states, ids, spans, scale, target,
                           query)
    same(losses["global"].detach().double(), expected[0], rtol=1e-5, atol=0)
    same(losses["local"].detach().double(), expected[1], rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------------------
# The authors' checkpoints

def release(name, denoiser, width=64, layers=2, module="", **options):
    """A random model in the authors' format, made of timm's and open_clip's own parts: (vit, text,
    state dict)."""
    vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
    vit = randomise(vit, seed=1).eval()
    D = vit.num_features
    text = TextTransformer(77, width=width, heads=max(1, width // 64), layers=layers, output_dim=D)
    text = randomise(text, seed=2).eval()
    state = {**{f"visual.vit.model.{key}": value for key, value in vit.state_dict().items()},
             **(denoiser_state(D) if denoiser else {}),
             **{f"text.{key}": value for key, value in text.state_dict().items()},
             "logit_scale": torch.tensor(3.25), "beta_ema": torch.tensor(0.9),
             "classification_weights_ema": torch.randn(574, D), "logit_scale_local": torch.ones(1)}
    return vit, text, {module + key: value for key, value in state.items()}


def assert_is_release(model, vit, text, state, denoiser):
    """The model's patch tokens, class token and class embeddings are those of the parts put
    together by hand."""
    pixels = torch.randint(0, 256, (1, 3, 75, 50), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    p, _ = vit.patch_embed.patch_size
    mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    h = math.ceil(75 / p)
    w = math.ceil(50 / p)
    images = F.pad((pixels / 255 - mean) / std, (0, w * p - 50, 0, h * p - 75))
    with torch.no_grad():
        features = vit.forward_features(images)
        patches = features[0, vit.num_prefix_tokens:]
        if denoiser:
            heads = vit.num_features // 64
            patches = denoised(doubled(state), patches.double(), h, w, heads).float()
        words = F.normalize(text(tokenize(["cow", "red boat"])), dim=-1)
    class_token, found, grid = model.backbone(model.backbone.normalise(pixels))
    assert grid == (h, w) and not model.training
    same(class_token, F.normalize(features[:, 0], dim=-1), rtol=0, atol=2e-6)
    same(found[0], F.normalize(patches, dim=-1), rtol=0, atol=5e-6)
    same(model.embed_classes(["cow", "red boat"])[:, 0], words, rtol=0, atol=2e-6)
    assert model.logit_scale.item() == 3.25


SLIDING = ["--templates", "plain", "--short-side", "64", "--window", "64", "--stride", "32",
           "--device", "cpu"]


@pytest.mark.parametrize("name, denoiser, module, wrapped, options", [
    ("vit_small_patch14_reg4_dinov2.lvd142m", True, "", False, {}),
    ("vit_small_patch14_reg4_dinov2.lvd142m", False, "", False, {"img_size": 224}),
    ("vit_small_patch16_224.dino", False, "module.", True, {})])
def test_an_authors_checkpoint_just_works(tmp_path, folder, name, denoiser, module, wrapped,
                                          options):
    """A model in the authors' format is imported whole, backbone recognised, whatever the size of
    its position table, and pixel statistics restored: identical outputs, eval.py scores it without
    further flags, and written in our own format it stays the same."""
    vit, text, state = release(name, denoiser, module=module, **options)
    path = tmp_path / "simzss_coco.pt"
    torch.save({"epoch": 10, "state_dict": state} if wrapped else state, path)
    model = load_model(path)
    config = model.backbone.config
    assert config["name"] == name
    assert (config["mean"], config["std"]) == (list(CLIP_MEAN), list(CLIP_STD))
    assert model.text.config == {"output_dim": 384, "width": 64, "heads": 1, "layers": 2}
    assert model.local_target == "argmax" and model.pool_query == "class"
    assert model.weights_over == "process" and model.local_weight == 0.05
    assert_is_release(model, vit, text, state, denoiser)

    eval.main(["--dataset", str(folder), "--checkpoint", str(path), *SLIDING])
    assert f'"name": "{name}"' in (tmp_path / "eval_folder.json").read_text()

    save_model(tmp_path / "own.safetensors", model, model.trained_with)
    again = load_model(tmp_path / "own.safetensors")
    assert read_header(tmp_path / "own.safetensors")["config"]["backbone"] == config
    assert again.config() == model.config() and again.trained_with == model.trained_with
    assert again.backbone.config["weights"] == "imported"
    assert_is_release(again, vit, text, state, denoiser)


@pytest.fixture(scope="module")
def small():
    """A tiny model with a denoiser in the authors' format; its backbone is none of theirs and has
    to be named."""
    return release("test_vit", denoiser=True, width=96, layers=1, module="module.")


def test_a_backbone_can_be_named(small, tmp_path, folder):
    """A checkpoint whose backbone is neither DINO nor DINOv2 says so, and is imported once its name
    is given, in Python or on the command line."""
    vit, text, state = small
    path = tmp_path / "small.pt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"visual.vit.model.patch_embed.proj.weight has shape "
                                         r"\[64, 3, 16, 16\]; name any other "
                                         r".*load_model\(path, backbone=NAME\)"):
        load_model(path)
    model = load_model(path, backbone="test_vit")
    assert model.text.config == {"output_dim": 64, "width": 96, "heads": 1, "layers": 1}
    bare = {key.removeprefix("module."): value for key, value in state.items()}
    assert_is_release(model, vit, text, bare, True)
    eval.main(["--dataset", str(folder), "--checkpoint", str(path), "--backbone", "test_vit",
               *SLIDING])
    assert '"name": "test_vit"' in (tmp_path / "eval_folder.json").read_text()
    with pytest.raises(ValueError, match="unknown backbone 'vit_huge_dog'"):
        load_model(path, backbone="vit_huge_dog")
    with pytest.raises(ValueError, match="holds its backbone's weights; leave --backbone-weights "
                                         "out"):
        load_model(path, backbone_weights=path)


def test_a_checkpoint_of_ours_names_its_backbone(checkpoint):
    """The backbone of a checkpoint in our own format cannot be renamed."""
    with pytest.raises(ValueError, match="backbone='test_vit'.*for the authors' checkpoints"):
        load_model(checkpoint, backbone="test_vit")


@pytest.mark.parametrize("key", [
    "logit_scale", "text.ln_final.bias", "text.positional_embedding", "text.text_projection",
    "visual.pos_embed", "text.transformer.resblocks.0.ln_2.weight", "visual.denoiser.norm1.bias",
    "visual.vit.model.cls_token", "visual.vit.model.blocks.3.attn.qkv.weight"])
def test_every_key_of_an_authors_checkpoint_counts(small, tmp_path, key):
    """Without a key, with one of another shape, or with one more beside it, a checkpoint is refused
    by that name."""
    path = tmp_path / "small.pt"
    original = {name.removeprefix("module."): value for name, value in small[2].items()}
    without = {name: value for name, value in original.items() if name != key}
    repeated = original[key][None].repeat_interleave(2, 0)
    cases = [(without, f"1 missing: {key}"),
             ({**original, f"{key}_more": torch.ones(2)}, f"1 unexpected: {key}_more"),
             ({**original, key: repeated}, f"1 misshapen: {key} [2")]
    for state, words in cases:
        torch.save(state, path)
        with pytest.raises(ValueError) as error:
            load_model(path, backbone="test_vit")
        message = str(error.value)
        assert words in message and str(path) in message and "\n" not in message


def test_without_the_buffers_nothing_is_missing(small, tmp_path):
    """The three buffers that carry no knowledge may be absent, and change nothing."""
    state = small[2]
    buffers = ("classification_weights_ema", "beta_ema", "logit_scale_local")
    bare = {key: value for key, value in state.items() if not key.endswith(buffers)}
    assert len(bare) == len(state) - 3
    torch.save(state, tmp_path / "whole.pt")
    torch.save(bare, tmp_path / "bare.pt")
    whole = load_model(tmp_path / "whole.pt", backbone="test_vit").state_dict()
    bare = load_model(tmp_path / "bare.pt", backbone="test_vit").state_dict()
    assert whole.keys() == bare.keys()
    assert all(torch.equal(value, bare[key]) for key, value in whole.items())


def test_python_objects_and_broken_files_are_refused(small, tmp_path):
    """For a file with Python objects the error says what to do; nothing of it is run. One cut short
    is refused."""
    path = tmp_path / "run.pt"
    torch.save({"state_dict": small[2], "args": SimpleNamespace(lr=1)}, path)
    with pytest.raises(ValueError, match=f"{path} is no .*if it holds Python objects.* "
                                         "torch.save") as error:
        load_model(path, backbone="test_vit")
    assert "\n" not in str(error.value)
    torch.save(torch.load(path, weights_only=False)["state_dict"], path)    # as the message says
    load_model(path, backbone="test_vit")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{path} is no readable weights file") as error:
        load_model(path, backbone="test_vit")
    assert "\n" not in str(error.value)
    torch.save({"state_dict": {}, "epoch": 3}, path)
    with pytest.raises(ValueError, match="expected an authors' checkpoint"):
        load_model(path)


@pytest.mark.parametrize("name", [
    *[f"vit_{size}_patch14_{registers}dinov2.lvd142m" for size in ("small", "base", "large")
      for registers in ("", "reg4_")],
    *[f"vit_{size}_patch{patch}_224.dino" for size in ("small", "base") for patch in (8, 16)]])
def test_backbones_are_recognised_by_their_tensors(name):
    """DINO and DINOv2 of every size, patch and register count are recognised."""
    with torch.device("meta"):                      # shapes without values
        state = timm.create_model(name, num_classes=0).state_dict()
    state = {f"visual.vit.model.{key}": value for key, value in state.items()}
    assert backbone_name(state, "x.pt") == name
