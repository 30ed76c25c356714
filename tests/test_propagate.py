"""Label propagation: against a slow solve in float64, in both its ways, and over windows."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from machinery.contract import METHODS, Method, Protocol, find_method
from machinery.scoring import propagate as module
from machinery.scoring.propagate import centres, propagate
from segment import score_maps, segment_image


def slow(tokens, places, scores, strength):
    """(1 - A) (I - A S)^-1 scores, entry by entry in float64."""
    tokens, places, scores = (values.double().numpy() for values in (tokens, places, scores))
    N = len(tokens)
    W = np.zeros((N, N))
    for n in range(N):
        for m in range(N):
            distance = math.dist(places[n], places[m])
            if distance > 0:
                likeness = max(0, sum(a * b for a, b in zip(tokens[n], tokens[m])))
                W[n, m] = likeness ** 3 * math.exp(-0.01 * distance)
    S = np.zeros((N, N))
    for n in range(N):
        for m in range(N):
            if W[n, m]:
                S[n, m] = W[n, m] / math.sqrt(W[n].sum() * W[m].sum())
    return (1 - strength) * np.linalg.inv(np.eye(N) - strength * S) @ scores


def some_patches(N=40, D=5, C=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = F.normalize(torch.randn(N, D, generator=generator), dim=-1)
    places = torch.rand(N, 2, generator=generator) * 200
    return tokens, places, torch.rand(N, C, generator=generator)


@pytest.mark.parametrize("strength", [0.5, 0.95])
def test_it_is_the_solution_of_the_system(strength):
    """The dense way is the slow solve; a patch like no other keeps its scores times 1 - A."""
    tokens, places, scores = some_patches()
    tokens[:, 3:] = 0
    tokens = F.normalize(tokens, dim=-1)
    tokens[7] = torch.eye(5)[4]
    found = propagate(tokens, places, torch.ones(40), scores, strength)
    expected = slow(tokens, places, scores, strength)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found[7], (1 - strength) * scores[7], atol=1e-6)


@pytest.mark.parametrize("block", [1, 1000])
def test_many_patches_are_tied_to_the_most_alike(monkeypatch, block):
    """Beyond the dense limit each patch is tied to its most alike alone, both ways; with as many
    steps as patches, and all of them neighbours, the dense solution comes out. Blocks change
    nothing."""
    tokens, places, scores = some_patches()
    one = torch.ones(40)
    dense = propagate(tokens, places, one, scores, 0.95)
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "DENSE", 0)
    monkeypatch.setattr(module, "STEPS", 60)
    torch.testing.assert_close(propagate(tokens, places, one, scores, 0.95), dense, atol=1e-4,
                               rtol=0)

    monkeypatch.setattr(module, "NEIGHBOURS", 6)
    nearest, weights = module.nearest_patches(tokens, places)
    likeness = tokens @ tokens.T
    tied = torch.zeros(40, 40)
    for n in range(40):
        most = likeness[n].argsort(descending=True)[:7]         # itself, then six others
        assert most[0] == n and set(most.tolist()) == set(nearest[n].tolist())
        distance = (places[n] - places[most]).norm(dim=-1)
        tied[n, most] = likeness[n, most].clamp(min=0) ** 3 * torch.exp(-0.01 * distance)
        tied[n, n] = 0
    torch.testing.assert_close(module.tied_sums(module.both_ways(nearest, weights), scores),
                               (tied + tied.T) / 2 @ scores)


def test_ten_steps_are_near_the_solution(monkeypatch):
    """Ten steps of conjugate gradients name the same class as the solution for almost all patches
    of a photo with a few regions."""
    generator = torch.Generator().manual_seed(0)
    region = torch.arange(400) // 100
    tokens = F.normalize(torch.eye(8)[region] + 0.3 * torch.randn(400, 8, generator=generator),
                         dim=-1)
    places = torch.stack([region * 100.0, torch.arange(400.0) % 100], dim=-1)
    scores = torch.eye(4)[region] + torch.randn(400, 4, generator=generator)
    one = torch.ones(400)
    dense = propagate(tokens, places, one, scores, 0.95).argmax(dim=1)
    monkeypatch.setattr(module, "DENSE", 0)
    found = propagate(tokens, places, one, scores, 0.95).argmax(dim=1)
    assert (found == dense).float().mean() > 0.98
    assert (scores.argmax(dim=1) == region).float().mean() < 0.8 < (dense == region).float().mean()


@pytest.mark.parametrize("limit", [2048, 0])
def test_a_place_in_several_windows_counts_once(monkeypatch, limit):
    """Where windows overlap a place has several patches, with a part each. Patches that are seen
    twice, alike, give what patches that are seen once give."""
    monkeypatch.setattr(module, "DENSE", limit)
    tokens, places, scores = some_patches()
    once = propagate(tokens, places, torch.ones(40), scores, 0.9)
    twice = torch.cat([torch.arange(40), torch.arange(10)])     # ten of the forty
    share = torch.ones(50)
    share[:10] = share[40:] = 0.5
    found = propagate(tokens[twice], places[twice], share, scores[twice], 0.9)
    torch.testing.assert_close(found, once[twice], atol=1e-5, rtol=0)


def test_where_patches_of_windows_lie():
    """Windows of 32 pixels at 0, 16 and 24: middles of their patches, and how often each middle is
    seen. Patches beyond the photo lie at its border."""
    places, seen = centres(torch.tensor([0, 16, 24]), 4, 32, 32)
    assert places.tolist() == [[4, 12, 20, 28], [20, 28, 36, 44], [28, 36, 44, 52]]
    assert seen.tolist() == [[1, 1, 2, 3], [2, 3, 2, 2], [3, 2, 2, 1]]
    places, seen = centres(torch.tensor([0]), 4, 32, 17)
    assert places.tolist() == [[4, 12, 16.5, 16.5]] and seen.tolist() == [[1, 1, 1, 1]]


def test_windows_are_propagated_together(model):
    """What segment_image does with two windows is the slow solve over the patches of both, and the
    mean over windows as without propagation."""
    photo = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    classes = F.normalize(torch.randn(3, model.backbone.width), dim=-1)
    protocol = Protocol(window=32, stride=32, short_side=32, propagate=0.9)
    crops = torch.stack([photo[:, :, :32], photo[:, :, 16:]])
    tokens, _ = model.unit_tokens(crops)                                            # (2, 4, 4, D)
    y, x = torch.meshgrid(torch.arange(4) * 8.0 + 4, torch.arange(4) * 8.0 + 4, indexing="ij")
    first = torch.stack([y, x], dim=-1)
    places = torch.stack([first, first + torch.tensor([0, 16])])                    # (2, 4, 4, 2)
    # Where both windows see a place, each of its two patches counts half: as the slow solve of the
    # symmetric system with the roots of these halves
    share = torch.ones(2, 4, 4)
    share[0, :, 2:] = share[1, :, :2] = 0.5
    scores = tokens @ classes.T
    found = propagate(tokens.flatten(0, 2), places.flatten(0, 2), share.flatten(),
                      scores.flatten(0, 2), 0.9).view(2, 4, 4, 3).permute(0, 3, 1, 2)
    large = F.interpolate(found, (32, 32), mode="bilinear")
    expected = torch.zeros(3, 32, 48)
    expected[..., :32] += large[0]
    expected[..., 16:] += large[1]
    expected[..., 16:32] /= 2
    maps = score_maps(model, photo, classes, protocol)
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("limit", [2048, 0])
@pytest.mark.parametrize("height, width", [(40, 90), (8, 8), (1, 30)])
def test_photos_of_one_colour_have_scores(model, monkeypatch, limit, height, width):
    """Also where all patches are alike, and where there is one patch only, no score is nan."""
    monkeypatch.setattr(module, "DENSE", limit)
    photo = np.zeros((height, width, 3), np.uint8)
    classes = F.normalize(torch.randn(3, model.backbone.width), dim=-1)
    _, score = segment_image(model, photo, classes, 32, 16, 32, propagate=0.95)
    assert score.isfinite().all()


WITH_TOKENS = {"simzss", "simzss-prompts", "pixelclip", "linear"}


@pytest.mark.parametrize("name", [name for name, place in METHODS.items()
                                  if place.startswith(("model.", "methods."))])
def test_methods_have_patch_tokens_or_say_so(name):
    """A method without patch tokens of unit norm refuses --propagate in one line."""
    method = find_method(name)
    has = method.unit_tokens is not Method.unit_tokens
    assert has == (name in WITH_TOKENS)
    if not has:                                     # open_model refuses by the same line
        with pytest.raises(ValueError, match=f"--propagate: {name} has no patch tokens"):
            method.unit_tokens(method, None)
