"""From a photo to a mask: window arithmetic, a slow reference, and segment.py on many kinds of
files."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval
import segment
from conftest import PROTOCOL
from machinery.scoring import pictures
from machinery.networks.checkpoint import save_model
from machinery.scoring.pictures import overlay, palette, pca_view, save_mask, similarity_view
from machinery.toy import save_scene, toy_scene
from segment import (WindowBatch, embed, enlarge, parse_background, put_background, resize,
                     resized_size, score_maps, segment_image, window_starts)


# --------------------------------------------------------------------------------------------------
# The field's arithmetic

@pytest.mark.parametrize("length, starts", [
    (448, [0]), (449, [0, 1]), (597, [0, 149]), (671, [0, 223]), (672, [0, 224]),
    (673, [0, 224, 225]), (896, [0, 224, 448]), (390, [0]), (1, [0])])
def test_window_starts_of_the_field(length, starts):
    """Windows of 448 start every 224 pixels; the last is shifted back to end with the image; a
    small image has one window."""
    assert window_starts(length, 448, 224) == starts
    assert len(window_starts(2048, 448, 224)) == 9


@pytest.mark.parametrize("width, height, expected", [
    (500, 375, (597, 448)), (640, 480, (597, 448)), (640, 427, (671, 448)),
    (2048, 1024, (896, 448)), (2100, 400, (2048, 390)), (30, 20, (672, 448)),
    (448, 448, (448, 448))])
def test_resized_size_of_the_field(width, height, expected):
    """Photos are resized to a short side of 448 and a long side of at most 2048, rounded half up,
    in portrait and in landscape format."""
    assert resized_size(height, width, 448) == expected[::-1]
    assert resized_size(width, height, 448) == expected


def test_resize_by_hand():
    """Resizing is bilinear between pixel centres, without anti-aliasing, rounded half up to whole
    grey levels."""
    def row(*values):
        return torch.tensor(values, dtype=torch.uint8).expand(3, 2, -1)

    # halved: the new centres lie between two old ones; (0 + 1) / 2 rounds up to 1, (2 + 255) / 2
    # to 129
    assert torch.equal(resize(row(0, 1, 2, 255), 2, 2), row(1, 129))
    # a quarter: only the two old pixels nearest to a new centre count
    assert torch.equal(resize(row(255, 10, 20, 255, 255, 30, 50, 255), 2, 2), row(15, 40))
    # doubled: weights 3 : 1 between neighbours, the border repeats; 2.5 rounds up to 3
    assert torch.equal(resize(row(0, 10), 2, 4), row(0, 3, 8, 10))
    assert torch.equal(resize(row(7, 8), 2, 2), row(7, 8))


# --------------------------------------------------------------------------------------------------
# segment_image against a slow loop, and against the plain way

def enlarging(size, length):
    """Matrix (size, length) of bilinear weights between pixel centres."""
    weights = np.zeros((size, length))
    for i in range(size):
        position = max((i + 0.5) * length / size - 0.5, 0)
        left = int(position)
        weights[i, left] += 1 - (position - left)
        weights[i, min(left + 1, length - 1)] += position - left
    return weights


def slow_scores(model, photo, embeddings, window, stride, short_side):
    """Cosine similarities (C, H, W) in float64: window by window, averaged pixel by pixel,
    enlarged."""
    height, width = photo.shape[:2]
    pixels = torch.from_numpy(photo).permute(2, 0, 1)
    pixels = resize(pixels, *resized_size(height, width, short_side))
    h, w = pixels.shape[1:]
    total = np.zeros((len(embeddings), h, w))
    count = np.zeros((h, w))
    top = 0
    while True:
        y = max(min(top, h - window), 0)
        left = 0
        while True:
            x = max(min(left, w - window), 0)
            crop = pixels[:, y:y + window, x:x + window]
            scores, (H, W) = model.patch_scores(crop[None], embeddings)
            grid = scores[0].double().numpy()
            large = enlarging(H, grid.shape[1]) @ grid @ enlarging(W, grid.shape[2]).T
            total[:, y:y + window, x:x + window] += large[:, :crop.shape[1], :crop.shape[2]]
            count[y:y + window, x:x + window] += 1
            if left + window >= w:
                break
            left += stride
        if top + window >= h:
            break
        top += stride
    return enlarging(height, h) @ (total / count) @ enlarging(width, w).T


@pytest.mark.parametrize("height, width, window, stride, short_side", [
    (75, 101, 64, 32, 64), (101, 75, 64, 24, 90), (9, 400, 48, 32, 64), (400, 9, 48, 32, 64),
    (33, 47, 64, 32, 50), (1, 90, 64, 64, 64)])
def test_masks_equal_a_slow_loop(model, height, width, window, stride, short_side):
    """Mask and score are those of a window-by-window loop, on odd, elongated and small photos,
    also on photos smaller than the window."""
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    embeddings = F.normalize(torch.randn(5, model.backbone.width), dim=-1)
    mask, score = segment_image(model, photo, embeddings, window, stride, short_side)
    expected = slow_scores(model, photo, embeddings, window, stride, short_side)
    torch.testing.assert_close(score.double(), torch.from_numpy(expected.max(0)), rtol=0, atol=1e-5)
    first, second = np.sort(expected, axis=0)[[-1, -2]]
    clear = first - second > 1e-5                   # elsewhere float32 may see a tie differently
    assert clear.mean() > 0.99 and (mask.numpy() == expected.argmax(0))[clear].all()


def plain_scores(model, photo, embeddings, window, stride, short_side):
    """Cosine similarities (C, H, W) in float32: one window after another, everything kept at full
    size."""
    height, width = photo.shape[:2]
    scale = min(2048 / max(height, width), short_side / min(height, width))
    h = int(height * scale + 0.5)
    w = int(width * scale + 0.5)
    pixels = resize(torch.from_numpy(photo).permute(2, 0, 1), h, w)[None]       # see the test below
    total = torch.zeros(1, len(embeddings), h, w)
    count = torch.zeros(h, w)
    for i in range(max(h - window + stride - 1, 0) // stride + 1):
        for j in range(max(w - window + stride - 1, 0) // stride + 1):
            bottom = min(i * stride + window, h)
            right = min(j * stride + window, w)
            top = max(bottom - window, 0)
            left = max(right - window, 0)
            crop = pixels[..., top:bottom, left:right]
            scores, covered = model.patch_scores(crop, embeddings)
            scores = F.interpolate(scores, covered, mode="bilinear")
            total[..., top:bottom, left:right] += scores[..., :bottom - top, :right - left]
            count[top:bottom, left:right] += 1
    return F.interpolate(total / count, (height, width), mode="bilinear")[0]


@pytest.mark.parametrize("height, width, window, stride, short_side", [
    (97, 131, 64, 32, 64), (333, 500, 448, 224, 448), (101, 75, 64, 24, 90), (40, 1000, 64, 32, 64),
    (1000, 40, 64, 32, 64), (33, 47, 64, 32, 50), (7, 5, 64, 32, 16)])
def test_masks_equal_the_plain_way(model, height, width, window, stride, short_side):
    """Batched windows and bands give what one window after another gives in float32 at full size:
    on odd sizes, elongated photos, photos smaller than the window, enlarged and reduced."""
    rng = np.random.default_rng(2)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    photo = np.array(small.resize((width, height), Image.BICUBIC))
    embeddings = F.normalize(torch.randn(6, model.backbone.width), dim=-1)
    mask, score = segment_image(model, photo, embeddings, window, stride, short_side)
    expected = plain_scores(model, photo, embeddings, window, stride, short_side)
    best, second = expected.topk(2, dim=0).values
    torch.testing.assert_close(score, best, rtol=0, atol=1e-5)
    clear = best - second > 1e-5
    assert clear.float().mean() > 0.99 and (mask == expected.argmax(0))[clear].all()


@pytest.mark.parametrize("height, width, new_height, new_width", [
    (90, 131, 45, 66), (90, 131, 200, 291), (400, 30, 64, 5)])
def test_resized_in_bands_equals_interpolate(height, width, new_height, new_width):
    """Photos are resized as by PyTorch's bilinear interpolation of the whole, up to one grey level
    where the last bit decides how a value is rounded."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    expected = F.interpolate(pixels[None].float(), (new_height, new_width), mode="bilinear")[0]
    found = resize(pixels, new_height, new_width).float()
    half = (expected + 0.5 - (expected + 0.5).round()).abs() < 1e-3     # may be rounded either way
    assert torch.equal(found[~half], (expected + 0.5).floor()[~half])
    assert (found - expected).abs().max() < 0.502


def test_batches_change_nothing(model):
    """The mask does not depend on how many windows are computed at a time."""
    photo = np.random.default_rng(1).integers(0, 256, (70, 150, 3), dtype=np.uint8)
    embeddings = F.normalize(torch.randn(7, 3, model.backbone.width), dim=-1)
    mask, score = segment_image(model, photo, embeddings, 64, 32, 64)
    for batch in (1, 3):
        found = segment_image(model, photo, embeddings, 64, 32, 64, batch)
        assert torch.equal(found[0], mask)
        torch.testing.assert_close(found[1], score, rtol=0, atol=1e-6)


@pytest.mark.parametrize("height, width", [(301, 95), (40, 700), (64, 64)])
@pytest.mark.parametrize("band", [1, 5000, 10 ** 9])
def test_bands_equal_the_whole(model, height, width, band, monkeypatch):
    """A band of rows at a time, of one row or many, gives the mask and scores of all similarities
    at full size."""
    photo = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    embeddings = F.normalize(torch.randn(5, model.backbone.width), dim=-1)
    maps = score_maps(model, photo, embeddings, 64, 32, 64)
    whole = F.interpolate(maps[None], (height, width), mode="bilinear")[0]
    best, second = whole.topk(2, dim=0)[0]
    monkeypatch.setattr(pictures, "BAND", band)
    mask, score = segment_image(model, photo, embeddings, 64, 32, 64)
    torch.testing.assert_close(score, best, rtol=0, atol=1e-6)
    clear = best - second > 1e-6
    assert (mask == whole.argmax(0))[clear].all() and clear.float().mean() > 0.99


def test_enlarged_rows_are_those_of_the_whole():
    """Some rows of an enlarged map are the rows of the whole enlarged map, to the last bit, at any
    first row."""
    maps = torch.rand(3, 13, 17, generator=torch.Generator().manual_seed(0))
    whole = enlarge(maps, 101, 40)
    expected = F.interpolate(maps[None], (101, 40), mode="bilinear")[0]
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)
    for first in range(0, 101, 7):
        rows = enlarge(maps, 101, 40, first, first + 3)[:, :101 - first]
        torch.testing.assert_close(rows, whole[:, first:first + 3], rtol=0, atol=1e-7)


class Full:
    """A GPU whose memory holds at most `most` windows at a time."""

    def __init__(self, model, most=2):
        self.model = model
        self.most = most
        self.asked = []

    def patch_scores(self, pixels, embeddings):
        self.asked.append(len(pixels))
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model.patch_scores(pixels, embeddings)


def test_a_full_memory_halves_the_batch(model, capsys):
    """Where memory does not hold a batch of windows, half as many are tried, with one message each
    time, until it does. The result is the same, and with the same `WindowBatch` the next photo
    begins with what fitted. When not even one window fits, the error stands."""
    photo = np.random.default_rng(1).integers(0, 256, (64, 400, 3), dtype=np.uint8)
    embeddings = F.normalize(torch.randn(3, model.backbone.width), dim=-1)
    full = Full(model)
    batch = WindowBatch(8)
    expected = segment_image(model, photo, embeddings, 64, 32, 64, 1)
    for asked in ([8, 4, 2, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2, 2]):        # 12 windows
        found = segment_image(full, photo, embeddings, 64, 32, 64, batch)
        assert torch.equal(found[0], expected[0]) and full.asked == asked
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-6)
        full.asked = []
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 2
    assert "memory is full" in message[0] and "2 windows at a time" in message[1]
    with pytest.raises(torch.OutOfMemoryError):
        segment_image(Full(model, 0), photo, embeddings, 64, 32, 64, 8)


class Planted:
    """A model that scores patches of 8 x 8 pixels by how red, green and blue they are, for three
    of C classes."""

    def __init__(self, classes):
        self.classes = classes

    def patch_scores(self, pixels, embeddings):
        H, W = pixels.shape[-2:]
        padded = F.pad(pixels.float() / 255, (0, -W % 8, 0, -H % 8))
        covered = padded.shape[-2:]
        scores = torch.zeros(len(pixels), len(embeddings), covered[0] // 8, covered[1] // 8)
        scores[:, self.classes] = F.avg_pool2d(padded, 8)
        return scores, covered


@pytest.mark.parametrize("height, enlarged", [(64, 1), (44, 1), (32, 2)])
@pytest.mark.parametrize("C, classes", [(3, [0, 1, 2]), (3, [2, 0, 1]), (256, [255, 7, 0]),
                                        (300, [299, 7, 256])])
def test_planted_scores_give_the_planted_mask(height, enlarged, C, classes):
    """Stripes whose scores are known come back pixel by pixel, at the photo's own size, for few
    and for many classes."""
    stripes = np.repeat(np.repeat([0, 2, 1, 0], [16, 40, 16, 24])[None], height, axis=0)
    stripes = stripes.repeat(enlarged, axis=0).repeat(enlarged, axis=1)
    photo = (np.eye(3)[stripes] * 255).astype(np.uint8)
    mask, score = segment_image(Planted(classes), photo, torch.zeros(C, 1), window=48, stride=32,
                                short_side=height)
    assert np.array_equal(mask.numpy(), np.array(classes)[stripes])
    assert score.max() == 1


def test_the_first_of_equal_classes_wins():
    """Where classes score the same, the first wins."""
    photo = np.zeros((16, 16, 3), np.uint8)
    mask, _ = segment_image(Planted([0, 1, 2]), photo, torch.zeros(3, 1), 16, 16, 16)
    assert (mask == 0).all()


@pytest.mark.parametrize("height, width", [(1, 1), (1, 6000), (6000, 1)])
def test_even_one_pixel_wide_photos_have_a_mask(height, width):
    """A photo of a single row or column of pixels has a mask of its size."""
    photo = np.full((height, width, 3), (0, 255, 0), np.uint8)
    mask, _ = segment_image(Planted([0, 1, 2]), photo, torch.zeros(3, 1))
    assert mask.shape == (height, width) and (mask == 1).all()


@pytest.mark.parametrize("settings", [
    dict(window=48, stride=64), dict(window=48, stride=-1), dict(window=-48), dict(short_side=-48),
    dict(batch=-1)])
def test_windows_that_leave_pixels_out_are_refused(settings):
    """A stride beyond the window, or a negative size, would leave pixels without a score, and is
    refused."""
    photo = np.zeros((48, 1000, 3), np.uint8)
    with pytest.raises(ValueError, match=list(settings)[-1]):
        segment_image(Planted([0, 1, 2]), photo, torch.zeros(3, 1), **settings)


# --------------------------------------------------------------------------------------------------
# Background

@pytest.mark.parametrize("text, expected", [
    ("none", ("none", None)), ("threshold:0.2", ("threshold", 0.2)),
    ("own:0.9", ("own", 0.9)), ("threshold:-1", ("threshold", -1)),
    ("prompt:sky", ("prompt", ["sky"])),
    ('prompt: open sky ,wall', ("prompt", ["open sky", "wall"]))])
def test_backgrounds_are_read(text, expected):
    """A background is nothing, a threshold of the score, or words."""
    assert parse_background(text) == expected


@pytest.mark.parametrize("text", ["", "None", "none:1", "threshold", "threshold:", "threshold:low",
                                  "prompt", "prompt: , "])
def test_other_backgrounds_are_refused(text):
    """Anything else is refused; the error says what is allowed."""
    expected = f"background '{text}': expected none, threshold:T .*, prompt:.*, or own:T"
    with pytest.raises(ValueError, match=expected):
        parse_background(text)


@pytest.mark.parametrize("index, expected", [
    (0, [[0, 2, 3], [0, 1, 0]]), (1, [[1, 2, 3], [1, 0, 1]]), (3, [[3, 1, 2], [3, 0, 3]])])
def test_background_goes_between_the_classes(index, expected):
    """Pixels whose score is at most the threshold become the background, a tie too; classes behind
    it move up."""
    mask = torch.tensor([[2, 1, 2], [0, 0, 1]], dtype=torch.uint8)
    score = torch.tensor([[0.2, 0.21, 0.9], [0.1, 0.3, -1]])
    assert put_background(mask, score, 0.2, index).tolist() == expected


def test_background_beyond_a_byte():
    """With 256 classes and a background the indices still have room."""
    mask = torch.tensor([[255, 0]], dtype=torch.uint8)
    assert put_background(mask, torch.tensor([[0.5, 0.1]]), 0.2).tolist() == [[256, 0]]


# --------------------------------------------------------------------------------------------------
# Class embeddings, kept

def test_kept_class_embeddings_are_the_fresh_ones(checkpoint, tmp_path, monkeypatch):
    """Class embeddings are computed once and read again bit by bit. For other classes, synonyms,
    templates, class embedding or another checkpoint they are computed anew, and so they are where
    the file is broken or the folder is not writable."""
    computed = []
    model, protocol = opened(checkpoint, tmp_path)
    compute = type(model).embed_classes

    def counted(*args, **options):
        computed.append(args[1:])
        return compute(*args, **options)

    monkeypatch.setattr(type(model), "embed_classes", counted)
    classes = [["cow", "cattle"], ["grass"]]
    fresh = embed(model, classes, protocol)
    assert fresh.equal(compute(model, classes, ["{}"], class_embedding="caption"))
    assert len(computed) == 1
    again, _ = opened(checkpoint, tmp_path)
    assert embed(again, classes, protocol).equal(fresh) and len(computed) == 1

    changed = [(classes[::-1], protocol), ([["cow"], ["cattle"], ["grass"]], protocol),
               ([["cow"], ["grass"]], protocol), (classes, {**protocol, "templates": "simple7"}),
               (classes, {**protocol, "class_embedding": "concept"})]
    for i, (other, settings) in enumerate(changed):
        templates = segment.read_templates(settings["templates"])
        expected = compute(model, other, templates, class_embedding=settings["class_embedding"])
        assert embed(model, other, settings).equal(expected)
        assert len(computed) == 2 + i
    torch.manual_seed(1)
    torch.nn.init.normal_(model.text.tower.text_projection)     # trained further, in its place
    save_model(tmp_path / "model.safetensors", model, {"protocol": PROTOCOL})
    further, _ = opened(None, tmp_path)
    assert not embed(further, classes, protocol).equal(fresh) and len(computed) == 7

    for path in (tmp_path / "embeddings").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    expected = compute(further, classes, ["{}"], class_embedding="caption")
    for count in (8, 8):                            # replaced, then read
        assert embed(further, classes, protocol).equal(expected)
        assert len(computed) == count
    assert not list((tmp_path / "embeddings").glob("*.partial"))

    (tmp_path / "file").touch()                     # where no folder can be made
    further.checkpoint_file["checkpoint"] = str(tmp_path / "file" / "model.safetensors")
    assert len(embed(further, classes, protocol)) == 2 and len(computed) == 9


def opened(checkpoint, folder):
    """Model and protocol of a checkpoint, copied into folder first."""
    if checkpoint:
        (folder / "model.safetensors").write_bytes(checkpoint.read_bytes())
    arguments = ["photo", "--classes", "cow", "--checkpoint", str(folder), "--device", "cpu"]
    return segment.open_model(segment.parse_args(arguments))


# --------------------------------------------------------------------------------------------------
# Pictures

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
    first."""
    names = ["cat", "sofa", "dog", "plant"]
    mask = np.full((60, 80), 3)
    mask[:20] = 1
    mask[50:] = 255                                 # no class
    picture = np.array(overlay(Image.new("RGB", (80, 60), (100, 100, 100)), mask, names))
    assert picture.shape[0] == 60
    colours = palette(4)
    for row, c in ((10, 1), (40, 3)):
        assert (picture[row, :80] == (0.6 * colours[c] + 40).astype(np.uint8)).all()
    assert (picture[55, :80] == 100).all()
    legend = picture[:, 80:].reshape(-1, 3).tolist()
    first = {c: legend.index(colours[c].tolist()) for c in range(4)
             if colours[c].tolist() in legend}
    assert set(first) == {1, 3} and first[3] < first[1]


@pytest.mark.parametrize("count, mode", [(2, "P"), (256, "P"), (257, "I;16"), (300, "I;16")])
def test_saved_masks_keep_their_indices(tmp_path, count, mode):
    """A mask file holds class indices: with the palette's colours up to 256 classes, in 16 bit
    beyond."""
    mask = torch.arange(count).repeat(3, 1)
    save_mask(tmp_path / "mask.png", mask, count)
    image = Image.open(tmp_path / "mask.png")
    assert image.mode == mode and np.array_equal(np.array(image), mask)
    if mode == "P":
        assert np.array_equal(np.array(image.convert("RGB"))[0], palette(count))


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
    maps = score_maps(Planted([0, 1, 2]), photo, torch.zeros(3, 1), window=96, stride=48,
                      short_side=96).numpy()
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


def times(size):
    """The argument `resized` of `pca_view`: to a short side of scale x size."""
    def resized(pixels, scale):
        return resize(pixels, *resized_size(*pixels.shape[-2:], scale * size))
    return resized


def test_equal_tokens_have_equal_colours():
    """In the PCA view patch tokens that are equal have the same colour, at each scale. Class
    embeddings have a range of colours of their own, in which each has another colour, and in each
    channel the order of the patch tokens that they equal. The panels are 448 high and as wide as
    the photo asks, and each class has a field with its name. The model sees the photo in tiles, and
    where tokens do not depend on their neighbours the tiles' size does not matter."""
    torch.manual_seed(0)
    table = torch.zeros(256, 12)
    table[[50, 100, 150, 200]] = F.normalize(torch.randn(4, 12), dim=-1)
    photo = np.zeros((64, 96, 3), np.uint8)
    photo[:32, :48] = 50
    photo[:32, 48:] = 100
    photo[32:, :48] = 150
    photo[32:, 48:] = 200
    words = table[[50, 100, 150, 200]][:, None]                                         # (C, S, D)
    names = ["a", "b", "c", "d"]
    views = []
    for tile, largest in ((448, 192), (40, 40)):
        model = Tokens(table)
        views.append(np.array(pca_view(model, Image.fromarray(photo), names, words, times(64),
                                       (1, 2), tile)))
        assert model.largest == largest
    view = views[0]
    assert np.abs(views[1].astype(int) - view).max() <= 1       # the last bit may round differently
    assert view.shape == (24 + 448 + 2 * 28, 3 * 672, 3)
    corners = [(100, 50), (100, 600), (400, 50), (400, 600)]
    colours = [[view[24 + y, x + 672 * panel].astype(int) for y, x in corners] for panel in (1, 2)]
    fields = [view[472 + 28 * (i // 3) + 25, 672 * (i % 3) + 600].astype(int) for i in range(4)]
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
    photo[:32, :32] = 50
    photo[:32, 32:] = 100
    photo[32:, :32] = 150
    photo[32:, 32:] = 200
    view = np.array(pca_view(Tokens(table), Image.fromarray(photo), ["a"], table[50:51], times(64),
                             (1,))).astype(int)
    a, b, c, d = (view[24 + y, 448 + x] for y in (100, 300) for x in (100, 300))
    for channel, far, same in ((0, (a, b), (c, d)), (1, (c, d), (a, b))):
        assert sorted(token[channel] for token in far) == pytest.approx([0, 255], abs=1)
        assert [token[channel] for token in same] == pytest.approx([127, 127], abs=1)
    assert max(abs(a[2] - other[2]) for other in (b, c, d)) <= 1


# --------------------------------------------------------------------------------------------------
# The command

NAMES = "cow, grass, sea, sky, boat"


def run(checkpoint, output, *arguments):
    segment.main([*map(str, arguments), "--checkpoint", str(checkpoint), "--output", str(output),
                  "--device", "cpu"])


def test_every_kind_of_file_gives_the_same_mask(checkpoint, tmp_path):
    """The same picture as grey, RGB, RGBA, palette, 16-bit or EXIF-rotated file gives the same
    mask, upright."""
    scene = Image.fromarray(toy_scene(np.random.default_rng(3))[0][20:, :90])
    grey = scene.convert("L")
    indexed = Image.fromarray(255 - np.array(grey), "P")
    indexed.putpalette([value for level in range(256) for value in [255 - level] * 3])
    deep = Image.fromarray(np.array(grey).astype(np.uint16) * 256 + 99)
    exif = Image.Exif()
    exif[0x0112] = 6                                # "turn me clockwise"
    files = {"grey": grey, "rgb": grey.convert("RGB"), "rgba": grey.convert("RGBA"),
             "indexed": indexed, "deep": deep, "turned": grey.transpose(Image.ROTATE_90)}
    for name, image in files.items():
        image.save(tmp_path / f"{name}.png", exif=exif if name == "turned" else None)
    photos = [tmp_path / f"{name}.png" for name in files]
    run(checkpoint, tmp_path, *photos, "--classes", NAMES)
    masks = {name: np.array(Image.open(tmp_path / f"{name}_mask.png")) for name in files}
    assert masks["grey"].shape == (108, 90) and len(np.unique(masks["grey"])) > 1
    for name, mask in masks.items():
        assert np.array_equal(mask, masks["grey"]), name


@pytest.mark.parametrize("size", [(20, 700), (700, 20), (1, 3), (161, 47)])
def test_photos_of_any_shape(checkpoint, tmp_path, size):
    """Very elongated and very small photos get a mask and an overlay, with the legend beside the
    photo."""
    Image.effect_noise(size, 80).convert("RGB").save(tmp_path / "photo.jpg")
    run(checkpoint, tmp_path, tmp_path / "photo.jpg", "--classes", NAMES)
    assert Image.open(tmp_path / "photo_mask.png").size == size
    picture = Image.open(tmp_path / "photo_overlay.png")
    assert picture.width > size[0] and picture.height >= size[1]


def test_the_files_agree(checkpoint, tmp_path, capsys):
    """Mask, overlay and JSON say the same: size, classes found with their share and colour,
    protocol, backbone."""
    photo = tmp_path / "photo.png"
    Image.fromarray(toy_scene(np.random.default_rng(0))[0][:100]).save(photo)
    names = tmp_path / "names.txt"
    names.write_text("cow, cattle\ngrass\nsea\nsky\nboat\n")
    run(checkpoint, tmp_path / "out", photo, "--classes", names, "--stride", 16)
    result = json.loads((tmp_path / "out" / "photo.json").read_text())
    mask = np.array(Image.open(result["mask"]))
    assert (result["height"], result["width"]) == mask.shape == (100, 128)
    assert result["photo"] == str(photo)
    assert result["classes"] == [["cow", "cattle"], ["grass"], ["sea"], ["sky"], ["boat"]]
    assert [c["index"] for c in result["found"]] == np.unique(mask).tolist()
    picture = np.array(Image.open(result["overlay"]))
    legend = set(map(tuple, picture[:, 128:].reshape(-1, 3).tolist()))
    for i, name in enumerate(["cow", "grass", "sea", "sky", "boat"]):
        colour = tuple(palette(5)[i].tolist())
        found = [c for c in result["found"] if c["index"] == i]
        assert (colour in legend) == bool(found)
        if found:
            assert (found[0]["name"], tuple(found[0]["colour"])) == (name, colour)
            assert found[0]["share"] == pytest.approx((mask == i).mean(), abs=1e-6)
            assert -1 <= found[0]["score"] <= 1
    assert result["protocol"] == {**PROTOCOL, "stride": 16, "background": "none"}
    assert result["backbone"]["name"] == "toy"
    assert "photo_overlay.png" in capsys.readouterr().out


def test_more_classes_than_a_byte_holds(checkpoint, tmp_path):
    """With more than 256 classes the mask is a 16-bit PNG and the overlay still has its legend."""
    (tmp_path / "names.txt").write_text("".join(f"thing number {i}\n" for i in range(300)))
    Image.fromarray(toy_scene(np.random.default_rng(0))[0]).save(tmp_path / "photo.png")
    run(checkpoint, tmp_path, tmp_path / "photo.png", "--classes", tmp_path / "names.txt")
    found = [c["index"] for c in json.loads((tmp_path / "photo.json").read_text())["found"]]
    assert np.unique(np.array(Image.open(tmp_path / "photo_mask.png"))).tolist() == found


def test_a_folder_of_photos(checkpoint, tmp_path, fails):
    """A folder stands for all images in it, sub-folders and other files left out; one without
    images is refused."""
    for name in ("b.png", "a.JPG", "below/c.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no photo")
    run(checkpoint, tmp_path / "out", tmp_path / "photos", "--classes", NAMES)
    assert sorted(path.name for path in (tmp_path / "out").glob("*_mask.png")) == [
        "a_mask.png", "b_mask.png"]
    (tmp_path / "empty").mkdir()
    fails(segment.main, [tmp_path / "empty", "--classes", NAMES, "--checkpoint", checkpoint],
          "no images in the folder", "empty")


def test_many_names_on_the_command_line(checkpoint, tmp_path):
    """A long list of names is a list of names, not a file that is not there."""
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    names = ", ".join(f"thing number {i}" for i in range(99))
    run(checkpoint, tmp_path, tmp_path / "photo.png", "--classes", names)
    assert len(json.loads((tmp_path / "photo.json").read_text())["classes"]) == 99


def test_photos_of_the_same_name_do_not_overwrite_each_other(checkpoint, tmp_path):
    """Two photos whose files would have the same names are refused before the first is overwritten,
    or both kept."""
    photos = [tmp_path / "photo.png", tmp_path / "photo.jpg"]
    for photo in photos:
        Image.new("RGB", (64, 64)).save(photo)
    try:
        run(checkpoint, tmp_path / "out", *photos, "--classes", NAMES)
    except SystemExit as stopped:
        assert str(stopped.code).startswith("error: ")
    else:
        assert len(list((tmp_path / "out").glob("*_mask.png"))) == 2


@pytest.mark.parametrize("more", [["--class-embedding", "caption"],
                                  ["--class-embedding", "concept"],
                                  ["--scales", "1", "1.5", "--refine-steps", "2"]])
def test_segment_and_eval_give_the_identical_mask(checkpoint, folder, tmp_path, more):
    """Scored against segment.py's own masks, eval.py finds not one wrong pixel; of absent classes
    it says null."""
    names = folder / "classes.txt"
    names.write_text("\n".join(f"thing number {i}" for i in range(40)))
    photos = sorted((folder / "images").iterdir())
    run(checkpoint, tmp_path, *photos, "--classes", names, *more)
    seen = set()
    for photo in photos:
        mask = Image.open(tmp_path / f"{photo.stem}_mask.png")
        seen |= set(np.array(mask).flatten().tolist())
        mask.save(folder / "masks" / f"{photo.stem}.png")
    output = tmp_path / "result.json"
    eval.main(["--dataset", str(folder), "--checkpoint", str(checkpoint), "--output", str(output),
               "--device", "cpu", *more])
    result = json.loads(output.read_text())
    assert result["mIoU"] == result["mAcc"] == result["aAcc"] == 1 and 1 < len(seen) < 40
    assert result["IoU"] == [1 if i in seen else None for i in range(40)]


def test_background_on_the_command_line(checkpoint, tmp_path):
    """threshold:T puts a background before the classes, where no class scores more than T;
    prompt:... is what its words win over the classes. Mask, overlay and JSON know it by that name,
    and the value is in the JSON."""
    photo = tmp_path / "photo.png"
    Image.fromarray(toy_scene(np.random.default_rng(0))[0]).save(photo)
    masks = {}
    results = {}
    for name, background in (("none", "none"), ("all", "threshold:1"), ("no", "threshold:-1"),
                             ("words", "prompt:sand, shore")):
        run(checkpoint, tmp_path / name, photo, "--classes", NAMES, "--background", background)
        results[name] = json.loads((tmp_path / name / "photo.json").read_text())
        masks[name] = np.array(Image.open(results[name]["mask"]))
        assert results[name]["protocol"]["background"] == background

    def found(name):
        return [c["name"] for c in results[name]["found"]]

    assert (masks["all"] == 0).all() and found("all") == ["background"]
    assert (masks["no"] == masks["none"] + 1).all() and found("no") == found("none")
    won = masks["words"] == 0
    assert (masks["words"] == masks["none"] + 1)[~won].all()
    assert results["words"]["classes"][0] == ["sand", "shore"]
    assert won.any() == ("background" in found("words"))
    middle = np.median([c["score"] for c in results["none"]["found"]])
    run(checkpoint, tmp_path / "some", photo, "--classes", NAMES, "--background",
        f"threshold:{middle}")
    mask = np.array(Image.open(tmp_path / "some" / "photo_mask.png"))
    assert 0 < (mask == 0).mean() < 1 and (mask == masks["no"])[mask > 0].all()


def test_views_on_the_command_line(checkpoint, tmp_path):
    """--view writes its pictures beside the mask and the JSON names them."""
    photo = tmp_path / "photo.png"
    Image.fromarray(toy_scene(np.random.default_rng(0))[0]).save(photo)
    run(checkpoint, tmp_path, photo, "--classes", NAMES, "--view", "pca", "--view", "similarity")
    result = json.loads((tmp_path / "photo.json").read_text())
    assert Image.open(result["pca"]).height > 448
    assert Image.open(result["similarity"]).width >= 128


# --------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("change, words", [
    ({"--classes": "cow,,sky"}, ["--classes", "empty class name"]),
    ({"--classes": ""}, ["--classes", "empty class name"]),
    ({"--classes": "cow, sky, Cow"}, ["--classes", "duplicate class name 'cow'"]),
    ({"--classes": "{tmp}/empty.txt"}, ["empty.txt", "no class names"]),
    ({"photo": "{tmp}/none.jpg"}, ["no image", "none.jpg"]),
    ({"photo": "{tmp}/empty.txt"}, ["empty.txt is no readable image"]),
    ({"photo": "{tmp}/cut.png"}, ["cut.png is no readable image"]),
    ({"--checkpoint": "{tmp}/none"}, ["no checkpoint at", "train.py"]),
    ({"--checkpoint": "{tmp}/photo.png"}, ["photo.png is no SimZSS checkpoint"]),
    ({"--templates": "poems"}, ["no templates 'poems'",
                              "imagenet80, photo, pixelclip, plain, simple7"]),
    ({"--templates": "{tmp}/cow.txt"}, ["cow.txt", "{} for the class name"]),
    ({"--templates": "{tmp}/two.txt"}, ["two.txt", "{} for the class name"]),
    ({"--background": "grey"}, ["background 'grey'", "threshold:T"]),
    ({"--background": "prompt:sea, sky"},
     ["--background and --classes", "duplicate class name 'sky'"]),
    ({"--background": "threshold:0", "--classes": "background, cow"},
     ["--background", "duplicate class name 'background'"]),
    ({"--batch": "0"}, ["batch 0", "positive"])])
def test_mistakes_end_with_one_line(checkpoint, tmp_path, fails, change, words):
    """Wrong class names, photos, checkpoints, templates and windows end with one line that says
    what is wrong."""
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "photo.png").read_bytes()[:60])
    for name, text in (("empty", ""), ("cow", "a cow"), ("two", "a {} beside a {}")):
        (tmp_path / f"{name}.txt").write_text(text)
    arguments = {"--checkpoint": checkpoint, "--classes": "cow, sky",
                 "photo": tmp_path / "photo.png"}
    arguments |= {key: value.replace("{tmp}", str(tmp_path)) for key, value in change.items()}
    photo = arguments.pop("photo")
    flags = [x for pair in arguments.items() for x in pair]
    fails(segment.main, [photo, "--output", tmp_path, *flags], *words)


def test_without_a_model_train_first(tmp_path, monkeypatch, fails):
    """Without --checkpoint the newest model under runs/ is used, and where there is none the line
    says so."""
    monkeypatch.chdir(tmp_path)
    fails(segment.main, ["photo.jpg", "--classes", "cow"], "no trained model under runs/",
          "train.py", "--checkpoint")


def test_a_checkpoint_without_a_protocol_gets_the_fields_own(tmp_path, model):
    """A model saved without settings is used as the field does: short side and window 448, stride
    224, 80 templates."""
    save_model(tmp_path / "model.safetensors", model, {})
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 48)).save(photo)
    run(tmp_path, tmp_path, photo, "--classes", "cow")
    protocol = json.loads((tmp_path / "photo.json").read_text())["protocol"]
    assert protocol == {"templates": "imagenet80", "class_embedding": "caption", "short_side": 448,
                        "window": 448, "stride": 224, "background": "none"}


def test_a_model_of_the_toy_world_segments_toy_scenes_only(tmp_path, model, fails):
    """A model that was trained on drawn scenes is refused on any picture but a PNG that
    `save_scene` wrote: on a photo, on the scene saved by other means, and on a photo beside a
    scene."""
    save_model(tmp_path / "model.safetensors", model, {"train_data": "toy", "protocol": PROTOCOL})
    scene = Image.fromarray(toy_scene(np.random.default_rng(0))[0])
    save_scene(scene, tmp_path / "scene.png")
    scene.save(tmp_path / "other.png")
    scene.save(tmp_path / "photo.jpg")
    run(tmp_path, tmp_path / "out", tmp_path / "scene.png", "--classes", NAMES)
    assert Image.open(tmp_path / "out" / "scene_mask.png").size == (128, 128)
    for photos in (["other.png"], ["scene.png", "photo.jpg"]):
        photos = [tmp_path / photo for photo in photos]
        fails(segment.main, [*photos, "--classes", NAMES, "--checkpoint", tmp_path, "--output",
                             tmp_path / "refused"], photos[-1], "toy world", "--checkpoint")
    assert not (tmp_path / "refused").exists()
