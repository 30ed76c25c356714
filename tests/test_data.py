"""The data that training reads: images, crops, pairs, batches and the toy world (data.py,
machinery/images.py, machinery/toy.py)."""
import contextlib
import io
import json
import re
import struct
import warnings
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from concepts import ConceptBank, Concepts, annotate
from conftest import noise, seen
from data import MAX_PIXELS, CaptionedImages, GlobalBatches, Pair, collate, draw_sample, load_pairs
from machinery import toy
from machinery.images import load_image, to_pixels
from machinery.scoring.benchmarks import open_dataset
from machinery.tokenizer import tokenize
from machinery.toy import PLURALS, STUFF, THINGS, TOY_CLASSES, ToyScenes, is_scene, toy_scene
from machinery.training.captions import read_captions
from machinery.training.loading import Paths, Texts
from machinery.training.shards import BAD, BadSample

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs in {PHOTOS}")
TOKENIZER = SimpleTokenizer()
BANK = ConceptBank(["dog", "cat", "bird"])


def grey(*values):
    """One row of grey pixels."""
    return Image.fromarray(np.array([values], np.uint8))


# --------------------------------------------------------------------------------------------------
# Reading images

def with_palette():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").copy()
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return image


def in_colour(mode, *pixels):
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


@pytest.mark.parametrize("image, options, expected", [
    (grey(0, 100, 255), {}, [(0, 0, 0), (100, 100, 100), (255, 255, 255)]),
    (in_colour("LA", (100, 255), (100, 0), (100, 51)), {},
     [(100, 100, 100), (255, 255, 255), (224, 224, 224)]),
    (in_colour("RGB", (1, 2, 3), (250, 0, 9)), {}, [(1, 2, 3), (250, 0, 9)]),
    (in_colour("RGBA", (10, 20, 30, 255), (10, 20, 30, 0), (10, 20, 30, 51)), {},
     [(10, 20, 30), (255, 255, 255), (206, 208, 210)]),
    (with_palette(), {}, [(10, 20, 30), (40, 50, 60), (70, 80, 90)]),
    (with_palette(), {"transparency": 1}, [(10, 20, 30), (255, 255, 255), (70, 80, 90)]),
    (Image.fromarray(np.array([[0, 0x00FF, 0x0100, 0xABCD, 0xFFFF]], np.uint16)), {},
     [(v,) * 3 for v in (0, 0, 1, 0xAB, 255)]),
    (grey(0, 255, 0).convert("1"), {}, [(0, 0, 0), (255, 255, 255), (0, 0, 0)]),
], ids=["grey", "grey and alpha", "RGB", "RGBA", "palette", "transparent palette", "16-bit grey",
        "1-bit"])
def test_kinds_of_png(tmp_path, image, options, expected):
    """Every kind of PNG becomes 8-bit RGB. Alpha is laid over white (51 of 255 is a fifth). Of 16
    bits the high 8 are kept."""
    image.save(tmp_path / "a.png", **options)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.mode == "RGB"
    assert [tuple(pixel) for pixel in np.array(loaded)[0].tolist()] == expected


def test_cmyk_jpeg(tmp_path):
    """A CMYK photograph keeps its colours: no cyan, full magenta and full yellow are red."""
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    loaded = load_image(tmp_path / "a.jpg")
    assert loaded.mode == "RGB" and (np.array(loaded) == (255, 0, 0)).all()


def four_corners():
    """32 x 16 pixels: red and green above blue and white."""
    corners = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8)
    return Image.fromarray(corners.repeat(8, axis=0).repeat(16, axis=1))


def exif(**tags):
    found = Image.Exif()
    for tag, value in tags.items():
        found[int(tag.strip("_"))] = value
    return found


def test_exif_rotation(tmp_path):
    """A photo that is stored lying (EXIF orientation 6) is turned clockwise: its left edge becomes
    its top."""
    four_corners().save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif(_274=6))
    loaded = load_image(tmp_path / "a.jpg")
    corners = [loaded.getpixel(place) for place in [(3, 3), (12, 3), (3, 28), (12, 28)]]
    assert loaded.size == (16, 32)
    blue_red_white_green = [[0, 0, 1], [1, 0, 0], [1, 1, 1], [0, 1, 0]]
    assert np.round(np.divide(corners, 255)).tolist() == blue_red_white_green


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1)])
def test_elongated(tmp_path, size):
    """A line of pixels is read as it is. Its crop shows its middle."""
    ramp = np.linspace(0, 250, 2000).astype(np.uint8).reshape(size[::-1])
    Image.fromarray(ramp).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    crop = Pair(tmp_path / "a.png", 8).crop(np.random.default_rng(0))
    assert loaded.size == size and (np.array(loaded) == ramp[..., None]).all()
    assert crop.shape == (3, 8, 8) and set(crop.flatten().tolist()) <= {124, 125, 126}


def jpeg(image, **options):
    stored = io.BytesIO()
    image.save(stored, "JPEG", **options)
    return stored.getvalue()


# An EXIF field that claims to be a text, but is named as the width, a number
BROKEN_EXIF = jpeg(four_corners(), exif=exif(_270="a text", _274=6)).replace(b"\x01\x0e\x00\x02",
                                                                         b"\x01\x00\x00\x02")


@pytest.mark.parametrize("content", [
    b"this is no photo", jpeg(Image.fromarray(noise(0)))[:-500], b"", BROKEN_EXIF, None],
    ids=["text", "cut short", "empty", "broken EXIF", "folder"])
def test_no_image(tmp_path, content):
    """A file that is no image, only a part of one, or has broken EXIF data is refused, and the
    error names it; training goes on."""
    path = tmp_path / "a.jpg"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jpg is no readable image \(.+\)"):
        load_image(path)


def test_pixels():
    """Channel, row and column of the tensor are those of the image."""
    pixels = to_pixels(in_colour("RGB", (1, 2, 3), (4, 5, 6)))
    assert pixels.tolist() == [[[1, 4]], [[2, 5]], [[3, 6]]]


def photo(path, width, height):
    """A smooth JPEG, of which a reduced decoding can be compared with the full one."""
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    small.resize((width, height), Image.BICUBIC).save(path, quality=95)
    return path


@pytest.mark.parametrize("width, height, decoded", [
    (127, 127, (127, 127)), (640, 127, (640, 127)), (130, 128, (65, 64)), (640, 300, (160, 75)),
    (700, 600, (88, 75))])
def test_large_jpegs_are_decoded_smaller(tmp_path, width, height, decoded):
    """With `least` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both sides keep that many
    pixels, else as it is. Without `least` nothing is reduced."""
    path = photo(tmp_path / "photo.jpg", width, height)
    full = load_image(path)
    reduced = load_image(path, 64)
    assert full.size == (width, height) and reduced.size == decoded
    if decoded == (width, height):
        assert reduced.tobytes() == full.tobytes()
    small = [np.asarray(image.resize((32, 32), Image.BICUBIC), float) for image in (full, reduced)]
    assert np.abs(np.subtract(*small)).mean() < 2


def test_huge_images_count_as_bad(tmp_path):
    """A PNG above the stated number of pixels is refused before it is decoded; a JPEG counts after
    its reduction. It is the only bound: Pillow's own, at 179 megapixels, is lifted."""
    Image.new("1", (14_000, 14_000)).save(tmp_path / "big.png")
    with pytest.raises(ValueError, match="14000 x 14000 pixels, at most 67,108,864"):
        load_image(tmp_path / "big.png", 448, MAX_PIXELS)
    side = int(MAX_PIXELS ** 0.5) + 1
    with pytest.raises(ValueError, match="at most 67,108,864"):
        Pair(tmp_path / "big.png", 224).image()
    Image.new("L", (side, side)).save(tmp_path / "big.jpg")
    assert max(load_image(tmp_path / "big.jpg", 448, MAX_PIXELS).size) < side / 4


def test_images_warn_of_nothing(tmp_path):
    """Broken EXIF data, a size near Pillow's bound and pixels that are no numbers raise no warning
    of their own."""
    # One directory of one entry: the position of another directory, which is beyond the file
    entry = struct.pack("<HHII", 0x8769, 4, 1, 123456789)
    broken = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    Image.new("RGB", (16, 16)).save(tmp_path / "exif.jpg", exif=broken)
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "<broken")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png", pnginfo=info)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "exif.jpg").size == (16, 16)
        assert load_image(tmp_path / "nan.tif").getpixel((0, 0)) == (0, 0, 0)
        assert load_image(tmp_path / "large.png").size == (10_000, 10_000)


# --------------------------------------------------------------------------------------------------
# Crops

def drawn_box(width, height, seed, **options):
    """The part (x, y, w, h) of the image that a crop shows.

    It is read from a crop of two ramps, red along the width and green along the height: the slope
    of the crop is the part's length / size.
    """
    y, x = np.mgrid[:height, :width] + 0.5
    image = np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)
    crop = draw_sample(lambda pair, rng: pair.crop(rng, **options), Pair(image, 64), (seed,))
    red = crop[0, 32].double()
    green = crop[1, :, 32].double()
    lengths = [((line[59] - line[4]) / 55 * 64).item() for line in (red, green)]
    starts = [(line[4:60].mean() - 0.5 * length).item()
              for line, length in zip((red, green), lengths)]
    return [*starts, *lengths]


@pytest.mark.parametrize("options, scale", [({}, (0.9, 1.0)), ({"scale": (0.2, 0.4)}, (0.2, 0.4))])
def test_crop_stays_in_its_ranges(options, scale):
    """The part's fraction of the area, by default 90 to 100 %, and its width / height stay in their
    ranges and use the whole of them."""
    W = 240
    H = 200
    areas = []
    ratios = []
    corners = []
    for seed in range(250):
        x, y, w, h = drawn_box(W, H, seed, **options)
        areas.append((w * h / (W * H) - scale[0]) / (scale[1] - scale[0]))
        ratios.append(w / h)
        corners.append((x, y, W - w - x, H - h - y))
    assert -0.4 < min(areas) < 0.1 and 0.9 < max(areas) < 1.4       # the ramps are of whole numbers
    assert min(ratios) > 0.72 and max(ratios) < 1.38
    assert np.min(corners) > -3 and (np.max(corners, 0) > 5).all()
    if scale[1] < 0.5:                              # a large part has about the image's own shape
        assert min(ratios) < 0.79 and max(ratios) > 1.28


def test_crop_may_be_mirrored():
    """With flip=1 the crop is the mirror image of the one without; with 0.5 one of the two."""
    def crop(flip, seed=3):
        return draw_sample(lambda pair, rng: pair.crop(rng, flip=flip), Pair(noise(0), 32), (seed,))
    plain = crop(0.0)
    assert torch.equal(crop(1.0), plain.flip(-1))
    either = [torch.equal(crop(0.5, seed), crop(0.0, seed)) for seed in range(20)]
    assert 3 < sum(either) < 17


def test_crop_is_resampled_as_by_pillow():
    """Pixels are those of Pillow's bicubic filter, which averages where it shrinks, but for a few
    grey levels; noise would show another filter, or none."""
    image = noise(0, 300, 400)
    cut = v2.RandomResizedCrop(64, (0.9, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    expected = draw_sample(lambda pair, rng: to_pixels(cut(pair.image())), Pair(image, 64), (1,))
    crop = draw_sample(lambda pair, rng: pair.crop(rng), Pair(image, 64), (1,))
    assert (crop.int() - expected.int()).abs().max() <= 4


def test_random_numbers_follow_from_the_seed():
    """The same seed gives the same crop and numbers, another seed others; torch's own generator
    goes on as if nothing had been drawn."""
    def sample(pair, rng):
        return pair.crop(rng), torch.rand(3), rng.random()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first, again, other = (draw_sample(sample, Pair(noise(0), 32), (1, seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert first[2] == again[2]
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


# --------------------------------------------------------------------------------------------------
# Pairs and batches

def captioned(images, captions, size=16, seed=0):
    annotations = Concepts(BANK, "match").of_captions(captions)
    return CaptionedImages(images, captions, seen, size, seed, annotations, BANK)


def load(source, size=8, bank=BANK, **options):
    """`load_pairs` with the built-in matcher."""
    return load_pairs(source, Concepts(bank, "match"), seen, size, **options)


CAPTIONS = ["a dog and a cat", "nothing", "two birds", "the cat", "a bird, a dog and a cat"]


def test_concepts_belong_to_their_caption():
    """Rows of (id, start, end) are those of the caption beside them, padded with -1 to the longest
    list of the batch."""
    pairs = captioned([noise(i) for i in range(5)], CAPTIONS)
    batch = collate([pairs[0, i] for i in (3, 1, 0, 2)])
    none = [-1, -1, -1]
    assert batch["concepts"].tolist() == [[[1, 2, 3], none], [none, none], [[0, 2, 3], [1, 5, 6]],
                                          [[2, 2, 3], none]]
    words = [TOKENIZER.decode(batch["tokens"][i, 2:3].tolist()) for i in (0, 2, 3)]
    assert words == ["cat ", "dog ", "birds "]
    assert not batch["bad"].any()


def test_position_seeds_the_crop():
    """A pair looks the same at the same position of runs with the same seed, and different at
    another position or with another seed."""
    pairs = captioned([noise(0)], ["a dog"])
    other = captioned([noise(0)], ["a dog"], seed=1)
    first, again, later = (pairs[position, 0]["pixels"] for position in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, later) and not torch.equal(first, other[3, 0]["pixels"])


def test_pairs_have_partners():
    """A pair's partner is another pair with its own image and caption, and a concept in common; the
    bank tells its name. A pair without concepts has none."""
    pairs = captioned([noise(i) for i in range(5)], CAPTIONS)
    for i in range(5):
        for seed in range(10):
            drawn = pairs.pair(i).partner(np.random.default_rng(seed))
            assert (drawn is None) == (i == 1)
            if drawn:
                other, concept = drawn
                j = CAPTIONS.index(other.caption)
                assert (np.array(other.image()) == noise(j)).all() and other.bank is BANK
                assert concept in pairs.pair(i).concepts[:, 0] and concept in other.concepts[:, 0]


def test_partners_are_among_the_pairs_in_use():
    """With --pairs a partner is one of these pairs; with all pairs the same are drawn as without
    it."""
    pairs = captioned([noise(i) for i in range(10)], [f"dog {i}" for i in range(10)])

    def partners(pairs):
        return [int(pairs.pair(i).partner(np.random.default_rng(seed))[0].caption.split()[-1])
                for i in pairs.used for seed in range(20)]

    before = partners(pairs)
    pairs.use(10)
    assert partners(pairs) == before
    pairs.use(3)
    assert set(partners(pairs)) == set(pairs.used.tolist())


def test_unreadable_image_is_replaced(tmp_path):
    """An unreadable image is counted and replaced by the next pair, with its caption and its
    concepts. Features that cannot be read count the same."""
    (tmp_path / "text.jpg").write_text("this is no photo")
    images = [tmp_path / "text.jpg", tmp_path / "gone.jpg", noise(2), noise(3),
              tmp_path / "text.jpg"]
    pairs = captioned(images, CAPTIONS)
    assert not pairs[7, 2]["bad"].any()
    for index, wanted, bad in [(0, 2, 2), (1, 2, 1), (4, 2, 3)]:       # the first follows the last
        item = pairs[7, index]
        same = pairs[7, wanted]
        assert torch.equal(item["pixels"], same["pixels"])
        assert torch.equal(item["tokens"], tokenize(CAPTIONS[wanted]))
        assert item["concepts"].tolist() == same["concepts"].tolist() == [[2, 2, 3]]
        assert item["bad"].sum() == item["bad"][BAD.index("bad image")] == bad
    assert collate([pairs[7, 0], pairs[8, 2], pairs[9, 1]])["bad"].sum() == 3
    pairs.cache = SimpleNamespace(row_of=lambda i: images[i].mean())
    pairs.sample = lambda pair, rng: pair.features
    with pytest.raises(AttributeError):             # a fault of the program is no bad pair
        pairs[7, 0]

    def row_of(i):
        if i != 2:
            raise ValueError("it was unreadable when the features were computed")
        return i
    pairs.cache = SimpleNamespace(row_of=row_of)
    assert pairs[7, 1]["row"] == 2 and pairs[7, 1]["bad"].sum() == 1


def test_only_unreadable_images(tmp_path):
    """Ten unreadable images in a row end training with an error that names the last of them."""
    pairs = captioned([tmp_path / f"{i}.jpg" for i in range(10)], ["a dog"] * 10)
    with pytest.raises(ValueError, match=r"ten pairs in a row cannot be used, the last is pair 1, "
                                         r".*1\.jpg: no image .*1\.jpg"):
        pairs[0, 2]


def test_a_folder_of_images(tmp_path):
    """Of a folder all images are used, also those in folders inside, by a method that asks for no
    caption; one that does is told that there are none. A folder without images is an error. Hidden
    files and folders are left out."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    (tmp_path / "photos" / ".ipynb_checkpoints").mkdir()
    for name in ("notes.txt", "._a.PNG", ".ipynb_checkpoints/a-checkpoint.PNG"):
        (tmp_path / "photos" / name).touch()
    for i, name in enumerate(("a.PNG", "b.png", "more/c.png")):
        Image.fromarray(noise(i)).save(tmp_path / "photos" / name)
    pairs = load_pairs(str(tmp_path / "photos"), None,
                       lambda pair, rng: {"pixels": to_pixels(pair.image())}, 8)
    assert [pairs[0, i]["pixels"].tolist() for i in range(3)] == [
        to_pixels(Image.fromarray(noise(i))).tolist() for i in range(3)]
    without_captions = "is a folder of images, which have no captions"
    with pytest.raises(ValueError, match=without_captions):
        load(tmp_path / "photos")
    with pytest.raises(ValueError, match=without_captions):
        load_pairs(str(tmp_path / "photos"), None, lambda pair, rng: {"tokens": pair.tokens()}, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no tars and no images in .*; expected \*\.tar"):
        load(tmp_path / "empty")


def test_masks_beside_an_image(tmp_path):
    """The masks of a pair are those of the JSON beside its image, in SA-1B's format or as amg.py
    writes them."""
    Image.fromarray(noise(0, 2, 3)).save(tmp_path / "sa_1.png")
    content = {"annotations": [{"segmentation": {"size": [2, 3], "counts": "231"}}]}
    for written in (content, content["annotations"]):
        (tmp_path / "sa_1.json").write_text(json.dumps(written))
        [mask] = Pair(tmp_path / "sa_1.png", 8).masks()         # 2 x no, 3 x yes, no; by column
        assert mask.tolist() == [[False, True, True], [False, True, False]]
    with pytest.raises(BadSample, match="no mask"):
        Pair(tmp_path / "sa_2.png", 8).masks()
    for other in (None, [3], {}, {"annotations": [{"segmentation": [[1, 2]]}]}, [
            {"segmentation": {"size": [8000, 8000], "counts": ""}}] * 100):
        (tmp_path / "sa_1.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match="sa_1.json holds no masks in SA-1B's format"):
            list(Pair(tmp_path / "sa_1.png", 8).masks())


def test_workers_do_not_matter():
    """Two worker processes give the same batches as none."""
    pairs = captioned([noise(i) for i in range(5)], CAPTIONS)
    runs = [list(DataLoader(pairs, batch_sampler=batches(5, 4, 4, 5), collate_fn=collate,
                            num_workers=workers)) for workers in (0, 2)]
    assert len(runs[0]) == len(runs[1]) == 4
    for one, other in zip(*runs):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key]))


def batches(length, batch, steps, epoch_pairs, rank=0, world=1, seed=0, start=0,
            loader_batch=None):
    """`GlobalBatches` of a run with these settings."""
    settings = SimpleNamespace(batch=batch, epoch_pairs=epoch_pairs, seed=seed)
    return GlobalBatches(length, settings, range(start, steps), rank, world, loader_batch)


def numbers_of(*arguments, **options):
    """Numbers of the pairs in order."""
    return [number for keys in batches(*arguments, **options) for _, number in keys]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_a_batch(world):
    """The slices of 2 or 4 processes, one after another, are the batches of one process."""
    whole = list(batches(10, 8, 7, 6, seed=3))
    slices = [list(batches(10, 8, 7, 6, rank, world, seed=3)) for rank in range(world)]
    assert [sum(parts, []) for parts in zip(*slices)] == whole
    assert [len(keys) for parts in slices for keys in parts] == [8 // world] * 7 * world


@pytest.mark.parametrize("batch, steps", [(4, 5), (20, 1)])
def test_each_epoch_is_a_permutation(batch, steps):
    """Every epoch has each number once, in a new order that follows from the seed, although batches
    of 4 do not divide its 10 pairs, and where one batch spans two epochs."""
    whole = batches(10, batch, steps, 10)
    keys = sum(whole, [])
    numbers = [number for _, number in keys]
    assert [position for position, _ in keys] == list(range(20)) and len(whole) == steps
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]
    assert numbers == numbers_of(10, 4, 5, 10) != numbers_of(10, 4, 5, 10, seed=1)


def test_short_epochs():
    """epoch_pairs cuts an epoch: 6 of the 10 pairs, each once, others in the next one, and all of
    them over time. It is never longer than the data."""
    numbers = numbers_of(10, 4, 30, 6)
    epochs = [numbers[start:start + 6] for start in range(0, 120, 6)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert len({frozenset(epoch) for epoch in epochs}) > 10 and set(numbers) == set(range(10))
    for most in (400_000, None):
        assert numbers_of(10, 4, 9, most) == numbers_of(10, 4, 9, 10)


def test_a_run_goes_on_in_loader_batches():
    """From a later step on the batches are those of the whole run, whatever is loaded at a time."""
    whole = sum(batches(10, 8, 5, 10), [])
    later = batches(10, 8, 5, 10, start=3, loader_batch=2)
    assert sum(later, []) == whole[24:] and {len(keys) for keys in later} == {2}
    assert len(later) == 8


def test_only_some_of_the_pairs():
    """Of 10 pairs use(4) takes the same 4 each time, and those alone replace an unreadable one.
    use(6) adds two to them. Another seed uses others."""
    def used(count, seed=0):
        pairs = CaptionedImages([noise(i) for i in range(10)], [""] * 10, None, 8, seed)
        pairs.use(count)
        assert len(pairs) == len(set(pairs.used)) == count
        return pairs
    four = used(4)
    four.sample = lambda pair, rng: {}
    assert [four[0, place]["key"] for place in range(4)] == four.used.tolist()
    for i in four.used[1:]:
        four.images[i] = None

    def readable(pair, rng):
        if pair._image is None:
            raise ValueError
        return {}
    four.sample = readable
    assert [four[0, place]["key"] for place in range(4)] == [four.used[0]] * 4
    assert set(four.used) == set(used(4).used) < set(used(6).used)
    assert len({frozenset(used(4, seed).used) for seed in range(9)}) > 3


# --------------------------------------------------------------------------------------------------
# Pairs from files

def write_coco(folder, captions, missing=()):
    """COCO's layout with one tiny image per caption: annotations/captions_val.json and val/."""
    (folder / "annotations").mkdir()
    (folder / "val").mkdir()
    stored = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(stored, "JPEG")
    for i in set(range(len(captions))) - set(missing):
        (folder / "val" / f"{i:03d}.jpg").write_bytes(stored.getvalue())
    content = {"images": [{"id": i, "file_name": f"{i:03d}.jpg"} for i in range(len(captions))],
               "annotations": [{"image_id": i, "caption": caption}
                               for i, caption in enumerate(captions)]}
    (folder / "annotations" / "captions_val.json").write_text(json.dumps(content))
    return folder / "annotations" / "captions_val.json"


def check_aligned(pairs):
    """Each pair's concepts are the annotations of its own caption, and its tokens, which are stored
    with them, the caption's."""
    found = [pairs[0, i]["concepts"].tolist() for i in range(len(pairs))]
    assert all(torch.equal(pairs[0, i]["tokens"], tokenize(caption))
               for i, caption in enumerate(pairs.captions))
    assert len(pairs.annotations.token_offsets) == len(pairs) + 1
    annotations = annotate(list(pairs.captions), BANK, "match")
    assert found == [[list(row) for row in rows] for rows in annotations] and any(found)


def test_missing_images_are_skipped(tmp_path, capsys):
    """Of 200 images 2 may be missing: their pairs are left out and counted, the others keep their
    own concepts."""
    captions = [CAPTIONS[i % 5] + f", number {i}" for i in range(200)]
    pairs = load(write_coco(tmp_path, captions, missing=(0, 52)))
    assert list(pairs.captions) == captions[1:52] + captions[53:]
    names = [path.name for path in pairs.images]
    assert names == [f"{i:03d}.jpg" for i in range(200) if i not in (0, 52)]
    notice = f"2 of 200 images are missing in {tmp_path / 'val'}; their captions are skipped"
    assert notice in capsys.readouterr().out
    check_aligned(pairs)


def test_texts_and_paths_in_arrays():
    """Texts and paths come out of their arrays as they went in, names that are no UTF-8 too."""
    texts = ["", "a dog", "\u00e4\u4e2d", "", "caf\udce9"]
    assert list(Texts(texts)) == texts
    assert list(Paths(map(Path, texts[1:]))) == [Path(text) for text in texts[1:]]


def test_processes_read_together_and_find_concepts_in_turn(tmp_path):
    """Of several processes the first finds the concepts of a captions file alone; reading the file
    is not waited for."""
    source = write_coco(tmp_path, ["a cow", "a sheep"])
    cache = Path(f"{source}.concepts.npz")
    found = []

    @contextlib.contextmanager
    def first_alone():
        found.append(cache.exists())
        source.write_text("no longer needed")
        yield
        found.append(cache.exists())
    assert len(load(source, first_alone=first_alone)) == 2 and found == [False, True]


def test_too_many_missing_images(tmp_path):
    """With 3 of 200 images missing, more than 1 %, the folder is probably the wrong one. The error
    names it and an example."""
    path = write_coco(tmp_path, ["a dog"] * 200, missing=(9, 7, 8))
    message = (r"3 of the 200 images of .*captions_val\.json are not in .*val, for example "
               r"007\.jpg; at most 1% may be missing. Name the folder with --images")
    with pytest.raises(FileNotFoundError, match=message):
        load(path)


def test_missing_image_folder(tmp_path):
    """A captions file without its image folder is refused. The error says where the first image was
    expected."""
    path = write_coco(tmp_path, ["a dog"])
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    message = (r"no image folder .*val; expected the images that .*captions_val\.json names, "
               r"for example .*val/000\.jpg\. Name the folder with --images")
    with pytest.raises(FileNotFoundError, match=message):
        load(path)
    pairs = load(path, images=tmp_path / "elsewhere")
    assert list(pairs.images) == [tmp_path / "elsewhere" / "000.jpg"]


@pytest.mark.parametrize("name, row", [
    ("c.tsv", "{}\t{}\n"), ("c.jsonl", '{{"image": "{}", "caption": "{}"}}\n')])
def test_images_beside_the_rows(tmp_path, name, row):
    """Image names in a TSV or JSONL file are relative to the file's own folder."""
    (tmp_path / "photos").mkdir()
    for i, caption in enumerate(CAPTIONS[:3]):
        Image.fromarray(noise(i)).save(tmp_path / "photos" / f"{i}.png")
    rows = [row.format(f"photos/{i}.png", caption) for i, caption in enumerate(CAPTIONS[:3])]
    (tmp_path / name).write_text("".join(rows))
    pairs = load(str(tmp_path / name), size=16, seed=4)
    in_memory = captioned([noise(i) for i in range(3)], CAPTIONS[:3], size=16, seed=4)
    for i in range(3):
        assert torch.equal(pairs[5, i]["pixels"], in_memory[5, i]["pixels"])
    check_aligned(pairs)


def test_training_decodes_at_twice_the_size(tmp_path):
    """Training asks for at least twice the pixels that its crops need, so smaller photos give
    exactly the same crops."""
    paths = [photo(tmp_path / f"{width}.jpg", width, 80) for width in (80, 300)]
    paths.append(photo(tmp_path / "large.jpg", 256, 300))
    pairs = captioned(paths, CAPTIONS[:3], size=32)
    assert [pairs.pair(i).image().size for i in range(3)] == [(80, 80), (300, 80), (64, 75)]
    whole = captioned([np.array(load_image(paths[1]))], CAPTIONS[1:2], size=32)
    assert torch.equal(pairs[7, 1]["pixels"], whole[7, 0]["pixels"])


@needs_photos
def test_real_captions():
    """COCO's own file gives all its captions. Each has an existing photo and most have concepts."""
    source = PHOTOS / "coco" / "annotations" / "captions_train2017.json"
    pairs = load_pairs(source, None, seen, 32, images=PHOTOS / "coco" / "train2017")
    found = list(zip([path.name for path in pairs.images], pairs.captions))
    assert found == read_captions(source) and all(path.is_file() for path in pairs.images)
    annotations = Concepts(ConceptBank.default(), "match").of_captions(list(pairs.captions))
    assert (np.diff(annotations.offsets) > 0).mean() > 0.5


# --------------------------------------------------------------------------------------------------
# The toy world

@pytest.fixture(scope="module")
def scenes():
    return [toy_scene(np.random.default_rng((0, 0, i))) for i in range(200)]


NAMES = [names[0] for names in TOY_CLASSES]


def named_in(caption):
    """Numbers of the toy classes that a caption names, in singular or plural."""
    forms = [rf"\b({name}|{PLURALS.get(name, name + 's')})\b" for name in NAMES]
    return {i for i, form in enumerate(forms) if re.search(form, caption)}


def test_toy_captions_are_weak_labels(scenes):
    """A caption names at least one class, and only classes of which the scene shows enough: half of
    these or some more. In 200 scenes every class is shown, and no other."""
    shown = [np.bincount(mask.ravel(), minlength=len(NAMES)) for _, mask, _ in scenes]
    visible = [set(np.flatnonzero(pixels >= toy.VISIBLE)) for pixels in shown]
    named = [named_in(caption) for _, _, caption in scenes]
    assert all(some and some <= others for some, others in zip(named, visible))
    assert 0.5 < sum(map(len, named)) / sum(map(len, visible)) < 0.7
    assert np.flatnonzero(sum(shown)).tolist() == list(range(len(NAMES)))
    assert NAMES == [*STUFF, *THINGS]


def test_toy_things_are_anywhere(scenes):
    """No thing is always seen with one ground, so that no pair of classes must be one."""
    shown = [set(np.unique(mask)) for _, mask, _ in scenes]
    for thing in range(len(STUFF), len(NAMES)):
        assert not set.intersection(*(some for some in shown if thing in some)) - {thing}


@pytest.mark.parametrize("visible, caption", [
    ({"cow": [1000]}, "a cow"), ({"airplane": [1000]}, "an airplane"),
    ({"airplane": [400]}, "a small airplane"), ({"kite": [3000]}, "a large kite"),
    ({"bus": [900, 900]}, "two buses"), ({"sheep": [900, 900, 900]}, "three sheep")])
def test_toy_captions_count_things(visible, caption):
    """A caption has the article, the number or the size that the things of the scene have."""
    assert toy.toy_caption(visible, np.random.default_rng(0)) == caption


def test_toy_captions_through_the_matcher(scenes):
    """The built-in matcher finds in every caption exactly the classes that it names."""
    captions = [caption for _, _, caption in scenes]
    for caption, found in zip(captions, annotate(captions, ConceptBank(TOY_CLASSES), "match")):
        assert {id for id, _, _ in found} == named_in(caption), caption


def test_toy_pairs_are_captioned_scenes(scenes):
    """Training on "toy" sees the scenes of its seed with their own captions and concepts."""
    bank = ConceptBank(TOY_CLASSES)
    pairs = load("toy", 64, bank, seed=0, toy_scenes=20)
    assert len(pairs) == 20
    assert all((image == scene[0]).all() for image, scene in zip(pairs.images, scenes))
    assert pairs.captions == [caption for _, _, caption in scenes[:20]]
    for i, rows in enumerate(annotate(pairs.captions, bank, "match")):
        assert pairs[0, i]["concepts"].tolist() == list(map(list, rows))
    assert load("toy", 64, bank, seed=1, toy_scenes=20).captions != pairs.captions


@pytest.mark.parametrize("seed", [0, 1])
def test_toy_scoring_scenes_are_new(scenes, seed):
    """No scene to score on is one of those trained on, for the same seed and for another."""
    trained = {image.tobytes() for image, _, _ in scenes}
    to_score = ToyScenes(30, seed)
    scored = [np.array(image).tobytes() for _, image, _ in (to_score[i] for i in range(30))]
    assert len(set(scored)) == 30 and not trained & set(scored)


def test_toy_scenes_are_a_dataset():
    """Toy scenes have the form of a segmentation folder: they end, have names, and are the same
    each time."""
    items = list(islice(ToyScenes(3), 5))
    assert len(items) == len({name for name, _, _ in items}) == 3
    _, image, mask = ToyScenes(3)[2]
    assert (np.array(items[2][1]) == np.array(image)).all() and (items[2][2] == mask).all()


def test_toy_scenes_as_a_folder(tmp_path, fails):
    """The command writes scenes that eval.py reads as a segmentation folder, that are marked as toy
    scenes, and that are neither those of training nor those that are scored; never over others."""
    toy.main([str(tmp_path / "toy"), "--count", "3", "--seed", "1"])
    dataset = open_dataset(str(tmp_path / "toy"))
    assert len(dataset) == 3 and dataset.classes == TOY_CLASSES
    others = [toy_scene(np.random.default_rng((1, part, i)))[0]
              for part in (0, 1) for i in range(3)]
    for i, (name, image, mask) in enumerate(dataset):
        drawn, truth, _ = toy_scene(np.random.default_rng((1, 2, i)))
        assert np.array_equal(image, drawn) and np.array_equal(mask, truth)
        assert is_scene(tmp_path / "toy" / "images" / f"{name}.png")
        assert not any(np.array_equal(image, other) for other in others)
    fails(toy.main, [tmp_path / "toy"], "File exists")
