"""What may be switched on at test time: several sizes of a photo, refinement by its colours, the
whole image's vote, windows that count less towards their borders. Propagation: test_propagate.py.
"""
import pytest
import torch
import torch.nn.functional as F

from machinery.contract import Protocol
from machinery.scoring.refine import DISTANCES, neighbour_weights, neighbours, refine
from segment import resize, resized_size, score_maps, segment_image, triangle


def test_neighbours_are_the_eight_around_at_each_distance():
    """A single 1 is seen from exactly those eight pixels for each distance that have it as a
    neighbour; beyond the border the nearest pixel counts."""
    maps = torch.zeros(1, 101, 101)
    maps[0, 50, 50] = 1
    seen = sum(neighbours(maps))[0]
    expected = torch.zeros(101, 101)
    for d in DISTANCES:
        for y in (-d, 0, d):
            for x in (-d, 0, d):
                expected[50 + y, 50 + x] += (y, x) != (0, 0)
    assert torch.equal(seen, expected) and len(list(neighbours(maps))) == 8 * len(DISTANCES)
    corner = torch.zeros(1, 9, 9)
    corner[0, 0, 0] = 1
    assert sum(neighbours(corner))[0, 0, 0] == 3 * len(DISTANCES)


def test_weights_by_hand():
    """In a photo of one colour all 48 neighbours weigh the same. In a photo of two, the weight of a
    neighbour of the other colour is exp(-d / 0.1) of one of the same, d being the difference over
    the standard deviation, averaged over the channels."""
    assert torch.allclose(neighbour_weights(torch.full((3, 5, 5), 99, dtype=torch.uint8)),
                          torch.full((48, 5, 5), 1 / 48))
    photo = torch.zeros(3, 8, 8, dtype=torch.uint8)
    photo[0, :, 4:] = 255                           # one channel of three differs
    weights = neighbour_weights(photo)[:, 4, 3]     # just left of the border
    other = torch.tensor([value[0, 4, 3] > 0 for value in neighbours(photo)])
    share = torch.cat([other, torch.tensor([False])]).double()
    ratio = torch.exp(-1 / share.std() / 3 / 0.1)
    assert 0 < other.sum() < 48
    assert torch.allclose(weights[other] / weights[~other][0], ratio.float(), rtol=1e-3)
    assert torch.allclose(weights.sum(), torch.tensor(1.0))


def test_a_border_moves_to_that_of_the_colours():
    """Scores whose border lies four pixels beside that of the photo's colours are right after
    refinement; scores alike everywhere stay, and a class depends on no other class."""
    photo = torch.full((3, 32, 40), 40, dtype=torch.uint8)
    photo[:, :, 20:] = 200
    maps = torch.full((20, 32, 40), 0.25)
    maps[0, :, :24] = 1.0
    maps[1, :, 24:] = 1.0
    refined = refine(maps, photo, 10)
    assert (maps.argmax(dim=0)[0] == 1).sum() == 16
    assert torch.equal(refined.argmax(dim=0), (torch.arange(40) >= 20).long().expand(32, 40))
    assert torch.allclose(refined[2:], maps[2:])
    assert torch.equal(refine(maps[:2], photo, 10), refined[:2])


def test_scales_are_averaged(model):
    """Scores of several sizes are the mean of the scores of each size, resized to the first."""
    generator = torch.Generator().manual_seed(0)
    photo = torch.randint(0, 256, (3, 40, 56), generator=generator, dtype=torch.uint8)
    classes = F.normalize(torch.randn(3, model.backbone.width, generator=generator), dim=-1)

    def maps(short_side, scales=(1.0,)):
        protocol = Protocol(window=32, stride=16, short_side=short_side, scales=scales)
        return score_maps(model, photo, classes, protocol)

    large = F.interpolate(maps(64)[None], resized_size(40, 56, 32), mode="bilinear")[0]
    assert torch.allclose(maps(32, (1.0, 2.0)), (maps(32) + large) / 2, atol=1e-6)


def test_refinement_is_part_of_segmenting(model):
    """With refinement a mask is that of the refined scores."""
    photo = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    classes = F.normalize(torch.randn(3, model.backbone.width), dim=-1)
    maps = score_maps(model, photo, classes, Protocol(window=32, stride=32, short_side=32))
    mask, _ = segment_image(model, photo.permute(1, 2, 0).numpy(), classes, 32, 32, 32,
                            refine_steps=3)
    assert torch.equal(mask.long(), refine(maps, photo, 3).argmax(dim=0))


@pytest.mark.parametrize("window", [16, 64])
def test_the_whole_image_votes(model, window):
    """The score of the whole photo, of a window's size at most, is added to every pixel's."""
    photo = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    classes = F.normalize(torch.randn(3, model.backbone.width), dim=-1)
    maps, voted = (score_maps(model, photo, classes, Protocol(
        window=window, stride=16, short_side=32, image_weight=weight)) for weight in (0.0, 0.5))
    whole = model.image_scores(resize(photo, min(window, 32))[None], classes)[0]
    assert torch.allclose(voted - maps, 0.5 * whole[:, None, None].expand(3, 32, 32), atol=1e-6)


def test_windows_fade_towards_their_borders(model):
    """With blend = "triangle" a pixel's score is the mean over windows, each weighted by how far
    the pixel is from the window's borders; so no step is left where a window ends."""
    assert triangle(4).tolist() == [0.5, 1.5, 1.5, 0.5] and triangle(3).tolist() == [0.5, 1.5, 0.5]
    photo = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    classes = F.normalize(torch.randn(3, model.backbone.width), dim=-1)

    def maps(pixels, blend):
        return score_maps(model, pixels, classes, Protocol(
            window=32, stride=16, short_side=32, blend=blend))

    left, right = (maps(photo[..., x:x + 32], "triangle") for x in (0, 16))
    found = maps(photo, "triangle")
    for x in range(48):
        weights = [max(0, min(at + 0.5, 31.5 - at)) for at in (x, x - 16)]
        parts = [weight * part[..., min(max(at, 0), 31)]
                 for weight, part, at in zip(weights, (left, right), (x, x - 16))]
        assert torch.allclose(found[..., x], sum(parts) / sum(weights), atol=1e-6)
    assert torch.allclose(maps(photo, "mean")[..., 20], (left[..., 20] + right[..., 4]) / 2)
