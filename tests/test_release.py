"""The checkpoints of SimZSS's authors: imported whole, or refused."""
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip import tokenize

import eval
from machinery.networks.checkpoint import load_model, save_model
from machinery.networks.release import RELEASES, backbone_name, simzss_settings
from reference import authors_model, denoised, doubled, same, unit

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def assert_is_theirs(model, vit, text, state):
    """The model's patch tokens, class token and class embeddings are those of the authors' parts
    put together by hand."""
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
        patches = features[0, vit.num_prefix_tokens:].double()
        if "visual.denoiser.norm1.weight" in state:
            block = doubled(state, "visual.")
            patches = denoised(block, patches, h, w, vit.num_features // 64)
        words = unit(text(tokenize(["cow", "red boat"])))
    class_token, found, grid = model.backbone(model.backbone.normalise(pixels))
    assert grid == (h, w) and not model.training
    same(class_token, unit(features[:, 0]), rtol=0, atol=2e-6)
    same(found[0], unit(patches), rtol=0, atol=5e-6)
    same(model.embed_classes(["cow", "red boat"])[:, 0], words, rtol=0, atol=2e-6)
    assert model.logit_scale.item() == 3.25


SLIDING = ["--templates", "plain", "--short-side", "64", "--window", "64", "--stride", "32",
           "--device", "cpu", "--workers", "0"]


@pytest.mark.parametrize("name, denoiser, module, wrapped, options", [
    ("vit_small_patch14_reg4_dinov2.lvd142m", True, "", False, {}),
    ("vit_small_patch14_reg4_dinov2.lvd142m", False, "", False, {"img_size": 224}),
    ("vit_small_patch16_224.dino", False, "module.", True, {})])
def test_an_authors_checkpoint_just_works(tmp_path, name, denoiser, module, wrapped, options):
    """A model in the authors' format is imported whole, backbone recognised, whatever the size of
    its position table, and pixel statistics restored: identical outputs; written in our own format
    it stays the same."""
    vit, text, state = authors_model(name, denoiser, **options)
    path = tmp_path / "simzss_coco.pt"
    theirs = {module + key: value for key, value in state.items()}
    torch.save({"epoch": 10, "state_dict": theirs} if wrapped else theirs, path)
    model = load_model(path)
    settings = model.settings
    assert settings.backbone.name == name and settings.backbone.weights == "imported"
    assert (settings.backbone.mean, settings.backbone.std) == (CLIP_MEAN, CLIP_STD)
    assert (settings.text.width, settings.text.layers) == (64, 2)
    assert settings.local_target == "argmax" and settings.pool_query == "class"
    assert model.bank == [] and model.trained_with == {"imported": str(path)}
    assert_is_theirs(model, vit, text, state)

    save_model(tmp_path / "own.safetensors", model, model.trained_with)
    again = load_model(tmp_path / "own.safetensors")
    assert again.settings == settings and again.trained_with == model.trained_with
    assert_is_theirs(again, vit, text, state)


@pytest.fixture(scope="module")
def small():
    """A tiny model with a denoiser in the authors' format; its backbone is none of theirs and has
    to be named."""
    return authors_model("test_vit", denoiser=True, width=96, layers=1)


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
    assert (model.settings.text.width, model.settings.text.layers) == (96, 1)
    assert_is_theirs(model, vit, text, state)
    eval.main(["--dataset", str(folder), "--checkpoint", str(path), "--backbone", "test_vit",
               *SLIDING])
    assert '"name": "test_vit"' in (tmp_path / "eval_folder.json").read_text()
    with pytest.raises(ValueError, match="unknown backbone 'vit_huge_dog'"):
        load_model(path, backbone="vit_huge_dog")
    with pytest.raises(ValueError, match="holds its backbone's weights; leave --backbone-weights "
                                         "out"):
        load_model(path, backbone_weights=path)


@pytest.mark.parametrize("key", [
    "logit_scale", "text.ln_final.bias", "text.positional_embedding", "text.text_projection",
    "visual.pos_embed", "text.transformer.resblocks.0.ln_2.weight", "visual.denoiser.norm1.bias",
    "visual.vit.model.cls_token", "visual.vit.model.blocks.3.attn.qkv.weight"])
def test_every_key_of_an_authors_checkpoint_counts(small, tmp_path, key):
    """Without a key, with one of another shape, or with one more beside it, a checkpoint is refused
    by that name."""
    path = tmp_path / "small.pt"
    original = small[2]
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
    unused = set(RELEASES["simzss"].unused) - {"visual.pos_embed"}      # of the denoiser here
    bare = {name: value for name, value in state.items() if name not in unused}
    assert len(bare) == len(state) - 3
    found = []
    for tensors in (state, bare):
        torch.save(tensors, tmp_path / "small.pt")
        found.append(load_model(tmp_path / "small.pt", backbone="test_vit").state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_the_table_alone_is_no_denoiser(tmp_path):
    """A checkpoint without denoiser still has its position table, of any width: it is left out."""
    _, _, state = authors_model("test_vit")
    state["visual.pos_embed"] = torch.randn(1, 37 * 37, 768)
    torch.save(state, tmp_path / "plain.pt")
    assert load_model(tmp_path / "plain.pt", backbone="test_vit").backbone.denoiser is None


@pytest.mark.parametrize("name, given, expected", [
    ("vit_large_patch14_dinov2.lvd142m", None, "mean"),
    ("vit_large_patch14_dinov2.lvd142m", "class", "class"),
    ("test_vit", None, "class"), ("test_vit", "mean", "mean")])
def test_a_vit_l_takes_the_mean_of_its_patches(small, tmp_path, capsys, name, given, expected):
    """Of an imported ViT-L the mean of the patch tokens stands for the image, with a warning,
    unless --image-token says otherwise; of others the class token."""
    path = tmp_path / "large.pt"
    torch.save(small[2], path)
    settings = simzss_settings(small[2], path, name, given)
    assert settings["backbone"]["image_token"] == expected
    warned = "has a ViT-L; as in the authors' code the mean" in capsys.readouterr().err
    assert warned == ("large" in name and given is None)


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


# --------------------------------------------------------------------------------------------------
# Files that hold something else

def refusal(path, backbone="test_vit"):
    """The one line with which a file is refused."""
    with pytest.raises(ValueError) as refused:
        load_model(path, backbone=backbone)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Settings(dict):
    """As programs keep their settings: a dictionary whose names are attributes."""


def test_python_objects_beside_the_tensors(small, tmp_path):
    """NumPy's scalars, settings and the like beside the tensors are passed over; for an object that
    cannot be, the error says what to do, which helps. Nothing in either runs."""
    path = tmp_path / "run.pt"
    state = small[2]
    optimizer = {"lr": np.float64(0.1), "steps": np.int64(3), "done": np.bool_(True)}
    settings = Settings(lr=0.1, model=Settings(depth=2))
    settings.frozen = True
    for other in (optimizer, settings, SimpleNamespace(lr=1, name=Path("x"))):
        torch.save({"model": state, "args": other}, path)
        assert load_model(path, backbone="test_vit").logit_scale.item() == 3.25
    for bad in (Harmful(tmp_path / "written"), np.array([1, "x"], object)):
        torch.save({"state_dict": state, "args": bad}, path)
        message = refusal(path)
        assert "it holds Python objects; if you trust it" in message and "torch.save" in message
    assert not (tmp_path / "written").exists()
    torch.save(torch.load(path, weights_only=False)["state_dict"], path)    # as the message says
    load_model(path, backbone="test_vit")
    torch.save({**state, "logit_scale": SimpleNamespace(value=3)}, path)
    assert "expected tensors only, found logit_scale" in refusal(path)


@pytest.mark.parametrize("size", [4, 1000, -1000])
def test_a_file_cut_short_is_refused(small, tmp_path, size):
    """A file of which any part is missing is refused."""
    path = tmp_path / "small.pt"
    torch.save(small[2], path)
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} is no readable weights file" in refusal(path)


@pytest.mark.parametrize("state", [
    {}, {"state_dict": {}, "epoch": 3}, {"text.positional_embedding": torch.ones(())},
    {"visual.vit.model.pos_embed": torch.ones(1, 0, 4),
     "visual.vit.model.patch_embed.proj.weight": torch.ones(4, 3, 0, 0)},
    {"text.positional_embedding": torch.ones(77, 0)}, {"visual.pos_embed": torch.ones(37, 37)},
    {"visual.denoiser.norm1.bias": torch.ones(1), "visual.pos_embed": torch.ones(37, 37)},
    [torch.ones(1)], 3])
def test_files_that_hold_something_else_are_refused(tmp_path, state):
    """PyTorch files with other contents are refused, with a named backbone and without."""
    path = tmp_path / "other.pt"
    torch.save(state, path)
    assert str(path) in refusal(path, None)
    refusal(path, "test_vit")


def test_an_unknown_file_says_what_it_holds(tmp_path):
    """A file of none of the three methods is described by its tensors."""
    path = tmp_path / "other.pt"
    torch.save({"blocks.0.norm.weight": torch.ones(2), "blocks.1.norm.weight": torch.ones(2),
                "head.bias": torch.ones(1)}, path)
    message = refusal(path, None)
    assert "3 tensors, 2 of blocks, 1 of head; the first are blocks.0.norm.weight" in message
    assert all(name in message for name in ("simzss", "ovsegmentor", "pixelclip"))
