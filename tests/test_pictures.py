"""Pictures: colours, letters, legends, what is not scored, and the views of the method."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from machinery.contract import Protocol
from machinery.images import IGNORE
from machinery.scoring.pictures import (NATURAL, NOT_SCORED, cielab, class_colours, comparison,
                                        overlay, palette, place_word, save_mask, similarity_view,
                                        to_ascii)
from segment import draw_tokens


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


@pytest.mark.parametrize("count", [3, 14, 171])
def test_colours_of_classes_lie_apart(count):
    """Any two classes have colours that lie at least one and a half times as far apart, in CIELAB,
    as those of Pascal VOC's palette, also where they are blended with the photo; none is near the
    grey of what is not scored."""
    def least(colours):
        lab = cielab(colours)
        return (np.linalg.norm(lab[:, None] - lab, axis=-1) + 1000 * np.eye(len(lab))).min()

    colours = class_colours([f"class {i}" for i in range(count)])
    assert len(colours) == count
    assert least(colours) > 1.5 * least(palette(count))
    assert least(colours / 2 + 64) > 1.5 * least(palette(count) / 2 + 64)
    assert np.linalg.norm(cielab(colours) - cielab(NOT_SCORED), axis=1).min() > 20


def test_colours_do_not_change_with_the_background():
    """A class has the colour of its place among the classes, also where a background comes before
    it, and in a longer list. The background is black; beyond all colours they repeat."""
    alone = class_colours(["cat", "sofa", "dog"])
    assert (class_colours(["background", "cat", "sofa", "dog"]) == [(0, 0, 0), *alone]).all()
    assert (class_colours(["cat", "sofa", "dog", "sky"])[:3] == alone).all()
    assert len(class_colours(["thing"] * 5000)) == 5000


def test_what_has_a_colour_of_its_own_keeps_it():
    """The sky is blue and the grass green, whatever is beside them, and no other class is alike."""
    names = ["sky", *(f"class {i}" for i in range(100)), "grass"]
    colours = class_colours(names)
    assert tuple(colours[0]) == NATURAL["sky"] and tuple(colours[-1]) == NATURAL["grass"]
    distance = np.linalg.norm(cielab(colours[1:-1])[:, None] - cielab([*NATURAL.values()]), axis=-1)
    assert distance.min() > 25


def test_cielab_by_hand():
    """White, black and pure red have the CIELAB values of every table."""
    found = cielab([[255, 255, 255], [0, 0, 0], [255, 0, 0]])
    assert np.abs(found - [[100, 0, 0], [0, 0, 0], [53.2, 80.1, 67.2]]).max() < 0.1


def test_an_overlay_shows_photo_colour_outline_and_legend():
    """The overlay mixes the grey photo with the class colour; outlines have the colour itself;
    background and pixels without a class are the bare photo. The legend shows the classes of a
    hundredth or more, the largest first."""
    names = ["background", "cat", "sofa", "dog", "plant"]
    mask = np.full((60, 80), 4)
    mask[:18] = 2
    mask[40:50] = 0
    mask[50:] = 255                                 # no class
    mask[39, 70:79] = 1                             # less than a hundredth
    picture = np.array(overlay(Image.new("RGB", (80, 60), (90, 100, 110)), mask, names))
    assert picture.shape[0] == 60
    colours = class_colours(names)
    for row, c in ((3, 2), (35, 4)):
        grey = Image.new("RGB", (1, 1), (90, 100, 110)).convert("L").getpixel((0, 0))
        assert np.abs(picture[row, :10] - (0.5 * colours[c] + 0.5 * grey)).max() <= 1
    assert (picture[17, :80] == colours[2]).all() and (picture[18, :80] == colours[4]).all()
    assert (picture[45, :80] == (90, 100, 110)).all() and (picture[55] == picture[45])[:80].all()
    legend = picture[:, 80:].reshape(-1, 3).tolist()
    first = {c: legend.index(colours[c].tolist()) for c in range(1, 5)
             if colours[c].tolist() in legend}
    assert set(first) == {2, 4} and first[4] < first[2]


@pytest.mark.parametrize("x, y, width, height, found", [
    (0, 0, 100, 60, True), (40, 20, 24, 12, True), (40, 20, 15, 40, False)])
def test_words_lie_inside_their_region(x, y, width, height, found):
    """A word of 20 x 10 pixels gets a place whose whole box is in the region, or none."""
    region = np.zeros((60, 100), bool)
    region[y:y + height, x:x + width] = True
    place = place_word(region, 20, 10)
    assert bool(place) == found
    if place:
        cx, cy = map(int, place)
        assert region[cy - 5:cy + 5, cx - 10:cx + 10].mean() > 0.97


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
    """In truth and prediction of a comparison such pixels have a grey that no class has, named in
    the legend; the photo does not show through."""
    assert NOT_SCORED not in map(tuple, class_colours(["thing"] * 200).tolist())
    photo = Image.new("RGB", (64, 64), (250, 10, 10))
    truth = np.zeros((64, 64), int)
    truth[:32] = IGNORE
    picture = comparison([(photo, truth, np.zeros((64, 64), int))], ["cat"], width=64)
    panel = np.array(picture)[24:, 68:132]
    assert (panel[:30] == NOT_SCORED).all() and (panel[34:62] == class_colours(["cat"])[0]).all()
    prediction = np.array(picture)[24:, 136:200]
    assert (prediction[:30] == NOT_SCORED).all()
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
    colours = class_colours(["sky", "bird", "sea"])
    assert [(key == colour).all(axis=1).any() for colour in colours] == [True, False, True]


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
    trained_with = {"run": {"image_size": 64}}
    protocol = Protocol(window=40, stride=24)

    def __init__(self, table):
        self.table = table                          # (256, D)

    def patch_scores(self, pixels, embeddings):
        red = pixels[:, 0, ::8, ::8].long()
        scores = torch.einsum("bhwd,cd->bchw", self.table[red], embeddings)
        return scores, (red.shape[1] * 8, red.shape[2] * 8)


def views_of(photo, names, table, words):
    """The panels of the view of a photo (64, W, 3): the tokens' at each size."""
    image = Image.fromarray(photo.astype(np.uint8))
    view = np.array(draw_tokens(Tokens(table), image, names, words, batch=8)).astype(int)
    width = round(image.width * 448 / image.height)
    top = round(1.7 * max(14, 4 * width // 100))
    return [view[top:top + 448, i * (width + 8):i * (width + 8) + width] for i in range(1, 5)]


def test_equal_tokens_have_equal_colours():
    """In the PCA view patch tokens that are equal have the same colour, at each scale and in each
    window, and others another; the words stand beside the panels, in colours that differ."""
    torch.manual_seed(0)
    reds = [50, 100, 150, 200]
    table = torch.zeros(256, 12)
    table[reds] = F.normalize(torch.randn(4, 12), dim=-1)
    photo = np.zeros((64, 96, 3))
    photo[..., 0] = np.kron([[50, 100], [150, 200]], np.ones((32, 48)))
    *panels, key = views_of(photo, ["a", "b", "c", "d"], table, table[reds][:, None])
    colours = [[panel[y, x] for y, x in ((50, 50), (50, 600), (400, 50), (400, 600))]
               for panel in panels]
    assert all(np.abs(np.subtract(of_scale, colours[0])).max() <= 1 for of_scale in colours)
    assert all(np.abs(a - b).max() > 50 for i, a in enumerate(colours[0]) for b in colours[0][:i])
    corner = panels[2][20:200, 20:320]              # seen in several windows: no grid, no sliver
    assert np.abs(corner - corner[0, 0]).max() <= 1
    side = 26                                       # of a square of the legend
    squares = [key[side // 2 + 2 * side * i + 5, side // 2 + 5] for i in range(4)]
    assert all(np.abs(a - b).max() > 50 for i, a in enumerate(squares) for b in squares[:i])


def test_colours_are_the_axes_in_which_tokens_differ_most():
    """Red is the axis of most difference between patch tokens, green the next, whatever they have
    in common; an axis in which they do not differ has one level, not noise."""
    common = F.normalize(torch.arange(12.0), dim=0) * 5
    basis = torch.stack([common, torch.ones(12), torch.eye(12)[0]], dim=1)
    _, first, second = torch.linalg.qr(basis)[0].T
    table = torch.zeros(256, 12)
    table[[50, 100, 150, 200]] = torch.stack([common + first, common - first, common + second / 2,
                                              common - second / 2])
    photo = np.zeros((64, 64, 3))
    photo[..., 0] = np.kron([[50, 100], [150, 200]], np.ones((32, 32)))
    panel = views_of(photo, ["a"], table, table[50:51, None])[0]
    a, b, c, d = (panel[y, x] for y in (60, 380) for x in (60, 380))
    for channel, far, same in ((0, (a, b), (c, d)), (1, (c, d), (a, b))):
        assert sorted(token[channel] for token in far) == pytest.approx([0, 255], abs=8)
        assert [token[channel] for token in same] == pytest.approx([127, 127], abs=8)
    assert max(abs(a[2] - other[2]) for other in (b, c, d)) <= 1
