"""Fidelity: networks, losses and all gradients equal an independent implementation in float64."""
import pytest
import safetensors.torch
import torch

from conftest import tiny
from model import VisionBackbone
from reference import (denoised, denoiser_state, dinov2, doubled, losses_of, randomise, same,
                       slow_losses, text_states, training_batch, unit)

REGISTERS = "vit_small_patch14_reg4_dinov2"
SMALL = {"depth": 2, "embed_dim": 128, "num_heads": 2}


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    path = tmp_path_factory.mktemp("denoiser") / "denoiser.safetensors"
    safetensors.torch.save_file(denoiser_state(128), path)
    return str(path)


@pytest.mark.parametrize("name, first", [(REGISTERS, 5), ("vit_small_patch14_dinov2", 1)])
@pytest.mark.parametrize("height, width", [(224, 224), (448, 448), (518, 518), (238, 364)])
def test_dinov2_equals_an_independent_implementation(name, first, height, width):
    """DINOv2, with registers and without, gives the tokens of a ViT written out in float64, the
    resampled position table included."""
    backbone = randomise(VisionBackbone(name, "random", SMALL))
    image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))
    class_token, patches, grid = backbone(image[None])
    expected = unit(dinov2(doubled(backbone.trunk.state_dict()), image.double(), heads=2))
    assert grid == (height // 14, width // 14)
    same(class_token[0], expected[0], rtol=0, atol=2e-6)
    same(patches[0], expected[first:], rtol=0, atol=2e-6)


@pytest.mark.parametrize("height, width", [(224, 224), (448, 448), (518, 518), (70, 112)])
def test_the_denoiser_is_one_block_over_patches_and_places(denoiser, height, width):
    """Denoised patch tokens equal a block written out in float64 over the tokens before
    normalisation + the table resampled to their grid; the class token is bit-identical to that
    without a denoiser."""
    plain = randomise(VisionBackbone(REGISTERS, "random", SMALL))
    clean = VisionBackbone(REGISTERS, "random", SMALL, denoiser=denoiser)
    clean.trunk.load_state_dict(plain.trunk.state_dict())
    images = torch.randn(1, 3, height, width)
    class_token, patches, (h, w) = clean(images)
    tokens = plain.trunk.forward_features(images)[0, 5:].double()
    state = doubled(safetensors.torch.load_file(denoiser), "visual.")
    same(patches[0], unit(denoised(state, tokens, h, w, heads=2)), rtol=0, atol=2e-6)
    assert torch.equal(class_token, plain(images)[0])
    assert not torch.allclose(patches, plain(images)[1], atol=0.1)


@pytest.mark.parametrize("query", ["class", "caption"])
@pytest.mark.parametrize("target", ["concept", "argmax"])
def test_losses_and_gradients_equal_an_independent_implementation(denoiser, target, query):
    """From pixels and captions to both losses and the gradients of all parameters, with repeated
    concepts, captions without any and cut ones: the model equals transformers, denoiser and
    equations written out in float64."""
    backbone = {"name": REGISTERS, "weights": "random", "options": SMALL, "denoiser": denoiser}
    model = tiny(backbone=backbone, text={"width": 64, "heads": 2, "layers": 2},
                 local_target=target, pool_query=query)
    randomise(model.backbone)
    randomise(model.text)
    batch = training_batch(size=70)
    losses = losses_of(model, batch)
    losses["loss"].backward()

    images = model.backbone.normalise(batch["pixels"]).double()
    vit = doubled(model.state_dict(), "backbone.trunk.")
    block = doubled(model.state_dict(), "backbone.denoiser.")
    tokens = [dinov2(vit, image, heads=2) for image in images]
    patches = [unit(denoised(block, x[5:], 5, 5, heads=2)) for x in tokens]
    slow = {name: p.detach().double().requires_grad_() for name, p in model.trained().items()}
    text = {name.removeprefix("text.tower."): p for name, p in slow.items()}
    states = [text_states(text, caption, heads=2) for caption in batch["tokens"]]
    expected = slow_losses([unit(x[0]) for x in tokens], patches, states, batch["concepts"],
                           slow["logit_scale"].exp(), target, query)
    (expected[0] + 0.05 * expected[1]).backward()

    same(losses["global"].double(), expected[0], rtol=1e-5, atol=0)
    same(losses["local"].double(), expected[1], rtol=1e-5, atol=0)
    same(losses["loss"].double(), expected[0] + 0.05 * expected[1], rtol=1e-5, atol=0)
    assert losses["concepts"] == 9 and losses["present"] == 6
    for name, p in model.trained().items():
        assert (p.grad - slow[name].grad).norm() <= 1e-4 * slow[name].grad.norm() > 0, name
