"""Pictures: colours, letters, legends, what is not scored, and the views of the method."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from machinery.images import IGNORE, to_pixels
from machinery.scoring.pictures import (NOT_SCORED, comparison, overlay, palette, pca_view,
                                        save_mask, similarity_view, to_ascii)
from segment import resize


@pytest.mark.parametrize("name, written", [
    ("Bäume", "Baume"), ("éléphant", "elephant"), ("niño", "nino"), ("猫 cat", "? cat"),
    ("café ☕", "cafe ?")])
def test_plain_letters(name, written):
    """In pictures letters lose their accents; what has no such form is a "?"."""
    assert to_ascii(name) == written


def test_palette_is_pascal_vocs():
    """Class i has the colour of Pascal VOC's class i + 1, because VOC's class 0 is its background,
    black; 300 classes have 300 colours."""
    colours = palette(300).tolist()
    voc = {1: [128, 0, 0], 2: [0, 128, 0], 3: [128, 128, 0], 4: [0, 0, 128], 7: [128, 128, 128],
           8: [64, 0, 0], 15: [192, 128, 128], 20: [0, 64, 128]}    # aeroplane ... tvmonitor
    assert all(colours[index - 1] == colour for index, colour in voc.items())
    assert len(set(map(tuple, colours))) == 300


def test_the_legend_has_the_classes_present_only():
    """The overlay mixes photo and class colour; its legend shows the classes present, the largest
    first and slivers, too."""
    names = ["cat", "sofa", "dog", "plant"]
    mask = np.full((60, 80), 3)
    mask[:20] = 1
    mask[50:] = 255                                 # no class
    mask[45, 79] = 0
    picture = np.array(overlay(Image.new("RGB", (80, 60), (100, 100, 100)), mask, names))
    assert picture.shape[0] == 60
    colours = palette(4)
    for row, c in ((10, 1), (40, 3)):
        assert np.abs(picture[row, :80] - (0.6 * colours[c] + 40)).max() <= 1
    assert (picture[55, :80] == 100).all()
    legend = picture[:, 80:].reshape(-1, 3).tolist()
    first = {c: legend.index(colours[c].tolist()) for c in range(4)
             if colours[c].tolist() in legend}
    assert set(first) == {0, 1, 3} and first[3] < first[1] < first[0]


@pytest.mark.parametrize("count, mode", [(2, "P"), (256, "P"), (257, "I;16"), (300, "I;16")])
def test_saved_masks_keep_their_indices(tmp_path, count, mode):
    """A mask file holds class indices: with the palette's colours up to 256 classes, in 16 bit
    beyond."""
    mask = np.tile(np.arange(count), (3, 1))
    save_mask(tmp_path / "mask.png", mask, count)
    image = Image.open(tmp_path / "mask.png")
    assert image.mode == mode and np.array_equal(np.array(image), mask)
    if mode == "P":
        assert np.array_equal(np.array(image.convert("RGB"))[0], palette(count))


# --------------------------------------------------------------------------------------------------
# Panels

def test_pixels_that_are_not_scored_have_their_colour():
    """In the truth panel of a comparison such pixels have a colour that no class of VOC has, named
    in the legend; the photo does not show through."""
    assert NOT_SCORED not in map(tuple, palette(20).tolist())
    photo = Image.new("RGB", (64, 64), (250, 10, 10))
    truth = np.zeros((64, 64), int)
    truth[:32] = IGNORE
    picture = comparison([(photo, truth, np.zeros((64, 64), int))], ["cat"], width=64)
    panel = np.array(picture)[24:, 68:132]
    assert (panel[:30] == NOT_SCORED).all() and (panel[34:62] == palette(1)[0]).all()
    everything = comparison([(photo, np.zeros((64, 64), int), truth * 0)], ["cat"], width=64)
    assert not (np.array(everything)[24:, :132] == NOT_SCORED).all(axis=2).any()
    assert picture.width >= everything.width        # "not scored" is longer than "cat"


def test_a_comparison_has_titles_and_one_legend():
    """Only the first row has titles; the legend names what fills a hundredth of a mask or more."""
    photo = Image.new("RGB", (100, 50))
    truth = np.zeros((50, 100), int)
    truth[:2, :20] = 1                              # 0.8 %
    truth[25:] = 2
    one = comparison([(photo, truth, truth)], ["sky", "bird", "sea"], width=100)
    two = comparison([(photo, truth, truth)] * 2, ["sky", "bird", "sea"], width=100)
    assert two.height == one.height + 50 + 4
    key = np.array(one)[:, 4 * 104:].reshape(-1, 3)
    shown = [(key == colour).all(axis=1).any() for colour in palette(3)]
    assert shown == [True, False, True]


# --------------------------------------------------------------------------------------------------
# Views of the method

def heat_panels(photo, names, maps):
    """The view's panels without titles: the photo, then a map per class; (96, 192, 3) int each."""
    view = np.array(similarity_view(Image.fromarray(photo), names, maps)).astype(int)
    assert view.shape == (24 + 96, 4 * 192, 3)
    return [view[24:, 192 * i:192 * (i + 1)] for i in range(4)]


def warmth(panel):
    """High where a heat map is yellow, negative where it is violet: yellow has most red and least
    blue."""
    return panel[..., 0] - panel[..., 2]


def test_heat_is_where_the_class_is():
    """A similarity view has the photo and a panel per class, each as large as the resized photo
    with a title. The heat is highest, yellow, where the photo has the class, and lowest, violet,
    where it has not. All panels share one range of colours."""
    photo = np.zeros((96, 192, 3), np.uint8)        # wide enough for the titles
    photo[32:64, 16:48, 0] = 255
    photo[16:48, 128:176, 1] = 255
    photo[64:80, 80:112, 2] = 255
    names = ["red", "green", "blue"]
    maps = photo.transpose(2, 0, 1) / 255
    shown, *panels = heat_panels(photo, names, maps)
    for i, (y, x) in enumerate([(48, 32), (32, 152), (72, 96)]):
        warm = warmth(panels[i])
        assert warm[y, x] > 120 and warm[4, 4] < 0
        top, left = np.unravel_index(warm.argmax(), warm.shape)
        assert photo[top, left, i] == 255
    assert (shown == photo).all()

    maps[0] /= 10                                   # red scores low everywhere, so it stays violet
    _, red, *others = heat_panels(photo, names, maps)
    assert warmth(red).max() < 0
    assert all((found == before).all() for found, before in zip(others, panels[1:]))


class Tokens:
    """A model whose patch tokens are known: a token per 8 x 8 pixels, looked up by the pixels' red
    value."""

    def __init__(self, table):
        self.table = table                          # (256, D)
        self.largest = 0                            # pixels a side of the largest input so far

    def patch_scores(self, pixels, embeddings):
        self.largest = max(self.largest, *pixels.shape[-2:])
        red = pixels[:, 0, ::8, ::8].long()
        scores = torch.einsum("bhwd,cd->bchw", self.table[red], embeddings)
        return scores, (red.shape[1] * 8, red.shape[2] * 8)


def test_equal_tokens_have_equal_colours():
    """In the PCA view patch tokens that are equal have the same colour, at each scale, and others
    another; the model sees the photo in tiles. Class embeddings have a range of colours of their
    own, in which each has another colour, in each channel in the order of the patch tokens that
    they equal."""
    torch.manual_seed(0)
    reds = [50, 100, 150, 200]
    table = torch.zeros(256, 12)
    table[reds] = F.normalize(torch.randn(4, 12), dim=-1)
    photo = np.zeros((64, 96, 3), np.uint8)
    photo[..., 0] = np.kron([[50, 100], [150, 200]], np.ones((32, 48)))
    model = Tokens(table)
    photos = [resize(to_pixels(photo), 64, scale) for scale in (1, 2)]
    view = np.array(pca_view(model, Image.fromarray(photo), ["a", "b", "c", "d"],
                             table[reds][:, None], photos, tile=40)).astype(int)
    assert model.largest == 40 and view.shape == (24 + 448 + 2 * 28, 3 * 672, 3)
    corners = [(100, 50), (100, 600), (400, 50), (400, 600)]
    colours = [[view[24 + y, x + 672 * panel] for y, x in corners] for panel in (1, 2)]
    fields = [view[472 + 28 * (i // 3) + 25, 672 * (i % 3) + 600] for i in range(4)]
    assert np.abs(np.subtract(*colours)).max() <= 1     # a last bit may round to another level
    for i in range(4):
        for j in range(4):
            assert ((colours[0][i] - colours[0][j] < 2) | (fields[i] >= fields[j])).all()
    assert all(np.abs(a - b).max() > 50 for i, a in enumerate(fields) for b in fields[:i])


def test_colours_are_the_axes_in_which_tokens_differ_most():
    """Red is the axis of most difference between patch tokens, green the next, whatever they have
    in common; an axis in which they do not differ has one level, not noise."""
    common = F.normalize(torch.arange(12.0), dim=0) * 5
    basis = torch.stack([common, torch.ones(12), torch.eye(12)[0]], dim=1)
    _, first, second = torch.linalg.qr(basis)[0].T
    table = torch.zeros(256, 12)
    table[[50, 100, 150, 200]] = torch.stack([common + first, common - first, common + second / 2,
                                              common - second / 2])
    photo = np.zeros((64, 64, 3), np.uint8)
    photo[..., 0] = np.kron([[50, 100], [150, 200]], np.ones((32, 32)))
    view = np.array(pca_view(Tokens(table), Image.fromarray(photo), ["a"], table[50:51, None],
                             [to_pixels(photo)])).astype(int)
    a, b, c, d = (view[24 + y, 448 + x] for y in (100, 300) for x in (100, 300))
    for channel, far, same in ((0, (a, b), (c, d)), (1, (c, d), (a, b))):
        assert sorted(token[channel] for token in far) == pytest.approx([0, 255], abs=1)
        assert [token[channel] for token in same] == pytest.approx([127, 127], abs=1)
    assert max(abs(a[2] - other[2]) for other in (b, c, d)) <= 1
