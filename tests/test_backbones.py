"""Vision backbones: timm's tokens, images of any size, what is refused, weights files."""
import math

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from conftest import tiny
from machinery.files import tensors_sha256
from machinery.settings import read
from model import BackboneSettings, VisionBackbone
from reference import denoiser_state, randomise, same, unit


def random(name, **options):
    """A backbone with random weights, options of timm."""
    return randomise(VisionBackbone(name, "random", options))


# --------------------------------------------------------------------------------------------------
# Tokens

TRANSFORMERS = [                                    # name, patch size, D, prefix tokens, has class?
    ("vit_small_patch16_224.dino", 16, 384, 1, True),
    ("vit_small_patch8_224.dino", 8, 384, 1, True),
    ("vit_small_patch14_dinov2.lvd142m", 14, 384, 1, True),
    ("vit_base_patch14_reg4_dinov2.lvd142m", 14, 768, 5, True),
    ("vit_small_patch16_dinov3.lvd1689m", 16, 384, 5, True),
    ("vit_base_patch16_clip_224.openai", 16, 768, 1, True),
    ("vit_base_patch16_siglip_224.webli", 16, 768, 0, False),
    ("vit_base_patch16_siglip_256.v2_webli", 16, 768, 0, False),
    ("test_vit2", 16, 64, 1, False)]                # a register, no class token


@pytest.mark.parametrize("name, patch, D, prefix, has_class", TRANSFORMERS)
def test_transformers_give_timms_tokens(name, patch, D, prefix, has_class):
    """Each transformer that people use gives the patch tokens of timm's own intermediate-layer
    call, at timm's size and at another that is not square, and the class token or, where there is
    none, the patches' mean. (One block; the width is real.)"""
    backbone = random(name, depth=1)
    assert backbone.width == D and backbone.patch_size == (patch, patch)
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
        same(patches, unit(expected), rtol=0, atol=1e-6)
        image = features[:, 0] if has_class else expected.mean(dim=1)
        same(class_token, unit(image), rtol=0, atol=1e-6)


CNNS = [("resnet50.a1_in1k", 2048), ("mobilenetv2_100.ra_in1k", 1280),
        ("convnext_tiny.dinov3_lvd1689m", 768), ("test_efficientnet", 256),
        ("test_mambaout", 64)]


@pytest.mark.parametrize("name, D", CNNS)
def test_cnns_give_timms_map(name, D):
    """A CNN's map gives the patches, row by row, and their mean the class token, at a size that is
    not square; also of the CNNs in timm whose map has its channels last."""
    backbone = VisionBackbone(name, "random")
    images = torch.randn(1, 3, 64, 96)
    class_token, patches, grid = backbone(images)
    assert backbone.width == D and backbone.patch_size == (32, 32) and grid == (2, 3)
    plain = timm.create_model(name, num_classes=0).eval()
    plain.load_state_dict(backbone.trunk.state_dict())
    with torch.no_grad():
        features = plain.forward_features(images)
    if name == "test_mambaout":
        features = features.permute(0, 3, 1, 2)
    for y in range(2):
        for x in range(3):
            same(patches[:, 3 * y + x], unit(features[:, :, y, x]), rtol=0, atol=1e-6)
    same(class_token, unit(features.mean((2, 3))), rtol=0, atol=1e-6)


SIZED = [("vit_small_patch14_reg4_dinov2", {"depth": 1, "embed_dim": 48, "num_heads": 2}),
         ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 48, "num_heads": 2}),
         ("test_resnet", {}), ("toy", {})]


@pytest.mark.parametrize("name, options", SIZED)
@pytest.mark.parametrize("height, width", [(75, 50), (40, 121), (5, 3)])
def test_any_image_size_is_padded_to_whole_patches(name, options, height, width):
    """An image of any size, also one smaller than a patch, gives the tokens, of unit length, of the
    same image padded with zeros at the right and the bottom."""
    backbone = VisionBackbone(name, "pretrained" if name == "toy" else "random", options)
    ph, pw = backbone.patch_size
    images = torch.randn(1, 3, height, width)
    h = math.ceil(height / ph)
    w = math.ceil(width / pw)
    class_token, patches, grid = backbone(images)
    expected = backbone(F.pad(images, (0, w * pw - width, 0, h * ph - height)))
    assert grid == (h, w) and patches.shape == (1, h * w, backbone.width)
    assert torch.equal(class_token, expected[0]) and torch.equal(patches, expected[1])
    same(patches.norm(dim=-1), torch.ones(1, h * w))
    same(class_token.norm(dim=-1), torch.ones(1))


def test_the_mean_can_stand_for_the_image():
    """With image_token "mean" the mean of the patch tokens, before they are normalised, stands for
    the whole image, in place of the class token."""
    backbone = VisionBackbone("test_vit", "random", image_token="mean")
    images = torch.randn(2, 3, 64, 64)
    tokens = backbone.trunk.forward_features(images)
    same(backbone(images)[0], unit(tokens[:, 1:].mean(dim=1)))


def test_pixels_are_normalised_with_the_backbones_own_statistics():
    """Pixels become (x / 255 - mean) / std, with the backbone's own statistics unless others are
    asked for."""
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    own = random("vit_tiny_patch16_224", depth=1)   # both 0.5
    same(own.normalise(pixels).flatten(), [-1, -.6, 1])
    other = VisionBackbone("toy", mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.7))
    same(other.normalise(pixels).flatten(), [-.2, 0, 1])


# --------------------------------------------------------------------------------------------------
# What is refused

def refusal(kind, *arguments, **settings):
    """The one line with which a backbone is refused."""
    with pytest.raises(kind) as refused:
        VisionBackbone(*arguments, **settings)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.mark.parametrize("name", ["vit_huge_dog", "hf-hub:someone/else", "local-dir:/tmp"])
def test_names_that_timm_has_not_registered_are_refused(name):
    """Only names of timm's table are taken, no hub and no folder."""
    assert f"unknown backbone {name!r}; expected 'toy' or a name from timm" in refusal(
        ValueError, name, "random")


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained_cfg_overlay", "cache_dir"])
def test_options_that_shape_no_network_are_refused(option):
    """Options of timm that could name files or addresses are refused, before timm sees them."""
    assert f"backbone option {option!r}: expected one that shapes" in refusal(
        ValueError, "test_vit", "random", {"img_size": 32, option: "x"})


@pytest.mark.parametrize("name, options", [
    ("test_vit", {"window_size": 2}), ("test_vit", {"depth": "x"}), ("test_vit", {"num_heads": 0}),
    ("test_resnet", {"global_pool": 3}), ("lcnet_035", {})])   # no such pretrained weights
def test_options_that_make_no_network_are_refused(name, options):
    """Whatever timm says to an option that a network does not know, to a value that makes none, or
    to a network without weights, is one line with the backbone's name."""
    weights = "random" if options else "pretrained"
    assert f"backbone {name!r} cannot be made so: " in refusal(ValueError, name, weights, options)


def test_a_missing_download_names_both_ways_out(monkeypatch, tmp_path):
    """Without network, weights that are not there end with one line that names a local file and
    random weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refusal(FileNotFoundError, "vit_tiny_patch16_224")
    for words in ("vit_tiny_patch16_224", "--backbone-weights FILE", "--backbone-weights random"):
        assert words in message


def test_backbones_that_take_one_size_only_say_so():
    """A transformer whose position table cannot be resampled refuses images of another size."""
    backbone = VisionBackbone("cait_xxs24_224", "random", {"depth": 1, "depth_token_only": 1})
    with pytest.raises(ValueError, match="the backbone takes no images of 250 x 224"):
        backbone(torch.zeros(1, 3, 250, 224))


def test_backbones_without_a_regular_grid_say_so():
    """A CNN whose feature map is not the image over its stride is refused, for its masks would be
    shifted."""
    backbone = VisionBackbone("inception_v3", "random")
    with pytest.raises(ValueError, match="gives .* patches for 300 x 260 pixels, expected 10 x 9"):
        backbone(torch.zeros(1, 3, 300, 260))


@pytest.mark.parametrize("mapping, words", [
    ({"mean": [0.5]}, "src: mean has 1 numbers; expected 3"),
    ({"std": [0.5, 0.0, 0.5]}, "src: std is 0.0; expected at least 0.001 and at most 1000"),
    ({"image_token": "cls"}, "src: image_token is 'cls'; expected one of class, mean"),
    ({"name": "toy", "weights": "x.pth"}, r"toy backbone is hand-made; .* \(/.*x.pth\)"),
    ({"name": "toy", "options": {"depth": 1}}, "toy backbone is hand-made; .*no options .*depth")])
def test_settings_that_do_not_go_together_are_refused(mapping, words):
    """Statistics of other than three colours, an unknown image token, and weights or options for
    the hand-made backbone are refused."""
    with pytest.raises(ValueError, match=words):
        read(BackboneSettings, mapping, "src")


def test_nobody_trains_on_weights_that_are_not_there():
    """"imported" weights are a checkpoint's; whoever asks for them in training is refused."""
    with pytest.raises(ValueError, match="'imported' .* cannot be trained on; expected pretrained"):
        tiny(backbone={"name": "test_vit", "weights": "imported"})


# --------------------------------------------------------------------------------------------------
# Local weights, loaded strictly

@pytest.fixture(scope="module")
def weights():
    """State of a small CNN, with its classifier."""
    torch.manual_seed(1)
    return timm.create_model("test_resnet").state_dict()


def write(path, tensors):
    """A weights file of either kind, by its ending."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_local_weights_are_loaded(weights, tmp_path, name):
    """Weights from a local file arrive in the backbone; only the classifier is left out, and
    counters of batches may be missing, as in older files."""
    older = {key: value for key, value in weights.items() if "num_batches" not in key}
    assert any(key.startswith("fc.") for key in older) and len(older) < len(weights)
    backbone = VisionBackbone("test_resnet", write(tmp_path / name, older))
    found = backbone.trunk.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items()
               if not key.startswith("fc."))


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop("conv1.0.weight"), "1 missing: conv1.0.weight"),
    (lambda w: w.update({"layer9.weight": torch.zeros(1)}), "1 unexpected: layer9.weight"),
    (lambda w: w.update({"conv1.0.weight": torch.zeros(1, 2, 3, 3)}),
     "1 misshapen: conv1.0.weight [1, 2, 3, 3]")])
def test_weights_that_do_not_fit_are_refused(weights, tmp_path, change, words):
    """A weights file with a missing, an extra or a differently shaped tensor is refused in one line
    that names it."""
    weights = dict(weights)
    change(weights)
    path = write(tmp_path / "weights.safetensors", weights)
    message = refusal(ValueError, "test_resnet", path)
    assert f"{path} does not fit the backbone" in message and words in message


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, name):
    """A file that is no weights file is refused in one line that names it, and so is one that is
    not there."""
    path = tmp_path / name
    path.write_bytes(b"these are no weights" * 100)
    assert f"{path} is no readable weights file" in refusal(ValueError, "test_resnet", path)
    path.unlink()
    assert f"--backbone-weights: no file {path}" in refusal(FileNotFoundError, "test_resnet", path)


# --------------------------------------------------------------------------------------------------
# Files of a denoiser

@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("shape", [(1, 37, 37), (37, 37), (1, 37 * 37)])
def test_a_denoiser_comes_from_either_kind_of_file(tmp_path, ending, shape):
    """A denoiser comes from either kind of file with any form of table, flat or as
    {"denoiser": {...}}; it never learns."""
    state = denoiser_state(128, shape)
    path = str(write(tmp_path / f"denoiser.{ending}", state))
    backbone = VisionBackbone("toy", denoiser=path).train()
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(module.training for module in backbone.modules())
    found = backbone.denoiser.state_dict()
    for name, value in state.items():
        same(found[name.removeprefix("visual.")].flatten(), value.flatten(), rtol=0, atol=0)
    if ending == "pth":
        wrapped = {name.removeprefix("visual."): value for name, value in state.items()}
        torch.save({"denoiser": wrapped}, path)
        again = VisionBackbone("toy", denoiser=path).state_dict()
        assert tensors_sha256(again) == tensors_sha256(backbone.state_dict())


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("visual.pos_embed"), "1 missing: visual.pos_embed"),
    (lambda s: s.pop("visual.denoiser.attn.qkv.weight"),
     "1 missing: visual.denoiser.attn.qkv.weight"),
    (lambda s: s.update({"visual.denoiser.ls1.gamma": torch.ones(128)}),
     "1 unexpected: visual.denoiser.ls1.gamma"),
    (lambda s: s.update({"visual.pos_embed": torch.ones(1, 128, 37, 37)}),
     "visual.pos_embed [1, 128, 37, 37] instead"),
    (lambda s: s.update(denoiser={"pos_embed": torch.ones(1)}), "missing: denoiser.norm1.weight"),
    (lambda s: s.update(epoch=7), "expected tensors only, found epoch")])
def test_a_file_that_is_no_denoiser_is_refused(tmp_path, change, words):
    """A denoiser's file with a missing, extra or misshapen tensor, or with something that is no
    tensor, is refused with its name, and a missing file with its own."""
    state = denoiser_state(128)
    change(state)
    path = str(write(tmp_path / "denoiser.pth", state))
    message = refusal(ValueError, "toy", denoiser=path)
    assert path in message and words in message
    assert "--denoiser: no file gone.pth" in refusal(FileNotFoundError, "toy", denoiser="gone.pth")
