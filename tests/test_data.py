"""Tests of the data that training reads: images, crops, pairs, batches, cached features and the
toy world (data.py, machinery/images.py, machinery/training/features.py, machinery/toy.py)."""
import io
import json
import pickle
import re
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch.utils.data import DataLoader

from concepts import ConceptBank, annotate, load_annotations, tokenize
from data import CaptionedImages, GlobalBatches, collate, load_pairs, random_resized_crop
from machinery import toy
from machinery.scoring.benchmarks import open_dataset
from machinery.training.captions import Annotations, as_arrays, read_captions
from machinery.training.features import FeatureCache
from machinery.images import load_image, to_pixels
from machinery.toy import PLURALS, STUFF, THINGS, TOY_CLASSES, ToyScenes, is_scene, toy_scene
from model import SimZSS, TextEncoder, VisionBackbone

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs in {PHOTOS}")
TOKENIZER = SimpleTokenizer()
BANK = ConceptBank(["dog", "cat", "bird"])


def grey(*values):
    """One row of grey pixels."""
    return Image.fromarray(np.array([values], np.uint8))


def noise(seed, height=40, width=50):
    """Random pixels (height, width, 3) uint8, different for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


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


def test_broken_exif(tmp_path):
    """A photo with broken EXIF data is refused like any unreadable image, so training goes on."""
    stored = io.BytesIO()
    four_corners().save(stored, "JPEG", exif=exif(_270="a text", _274=6))
    description = b"\x01\x0e\x00\x02"               # tag 270, a text
    width = b"\x01\x00\x00\x02"                     # tag 256, as a text
    assert stored.getvalue().count(description) == 1
    (tmp_path / "a.jpg").write_bytes(stored.getvalue().replace(description, width))
    with pytest.raises(ValueError, match="a.jpg is no readable image"):
        load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1)])
def test_elongated(tmp_path, size):
    """A line of pixels is read as it is. Its crop shows its middle."""
    ramp = np.linspace(0, 250, 2000).astype(np.uint8).reshape(size[::-1])
    Image.fromarray(ramp).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    crop = np.array(random_resized_crop(loaded, 8, np.random.default_rng(0)))
    assert loaded.size == size and (np.array(loaded) == ramp[..., None]).all()
    assert crop.shape == (8, 8, 3) and set(crop.ravel().tolist()) <= {124, 125, 126}


def text(path):
    path.write_text("this is no photo")


def cut_short(path):
    Image.fromarray(noise(0)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-500])


def empty(path):
    path.touch()


def folder(path):
    path.mkdir()


@pytest.mark.parametrize("make", [text, cut_short, empty, folder])
def test_no_image(tmp_path, make):
    """A file that is no image, or only a part of one, is refused, and the error names it."""
    make(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg is no readable image \(.+\)"):
        load_image(tmp_path / "a.jpg")


def test_missing_image(tmp_path):
    """The error for a missing image names it."""
    with pytest.raises(FileNotFoundError, match=r"no image .*gone\.jpg"):
        load_image(tmp_path / "gone.jpg")


def test_pixels():
    """Channel, row and column of the tensor are those of the image."""
    pixels = to_pixels(in_colour("RGB", (1, 2, 3), (4, 5, 6)))
    assert pixels.tolist() == [[[1, 4]], [[2, 5]], [[3, 6]]]


@needs_photos
def test_real_photos():
    """Real photographs keep their size and are RGB."""
    for path in sorted((PHOTOS / "coco" / "train2017").iterdir())[:5]:
        with Image.open(path) as image:
            size = image.size
        assert load_image(path).size == size and load_image(path).mode == "RGB"


# --------------------------------------------------------------------------------------------------
# Crops

def drawn_box(width, height, seed, **options):
    """The part (x, y, w, h) of the image that a crop shows.

    It is read from crops of two ramps, whose values are positions in pixels: the slope of the crop
    is the part's length / size.
    """
    def part(ramp):
        image = Image.fromarray(ramp.astype(np.float32))
        crop = random_resized_crop(image, 16, np.random.default_rng(seed), **options)
        line = np.asarray(crop)
        line = line[8] if (ramp[0] == ramp[-1]).all() else line[:, 8]
        length = (line[11] - line[4]) / 7 * 16
        return line[4] - 4.5 * length / 16, length

    y, x = np.mgrid[:height, :width] + 0.5
    x, w = part(x)
    y, h = part(y)
    found = np.array([x, y, w, h])
    assert np.abs(found - found.round()).max() < 0.2        # whole pixels
    return found.round().astype(int).tolist()


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.2, 0.4)])
def test_crop_stays_in_its_ranges(scale):
    """The part's share of the area and its width / height stay in their ranges, up to rounding to
    whole pixels, and use the whole of them."""
    W = 240
    H = 200
    shares = []
    ratios = []
    corners = []
    for seed in range(250):
        x, y, w, h = drawn_box(W, H, seed, scale=scale)
        assert 0 <= x <= W - w and 0 <= y <= H - h
        assert (w - 0.5) * (h - 0.5) <= scale[1] * W * H
        assert (w + 0.5) * (h + 0.5) >= scale[0] * W * H
        assert (w - 0.5) / (h + 0.5) <= 4 / 3 and (w + 0.5) / (h - 0.5) >= 3 / 4
        shares.append((w * h / (W * H) - scale[0]) / (scale[1] - scale[0]))
        ratios.append(w / h)
        corners.append((x, y, W - w - x, H - h - y))
    assert min(shares) < 0.1 and max(shares) > 0.9
    assert min(np.min(corners, 0)) == 0 and min(np.max(corners, 0)) > 0
    if scale[1] < 0.5:                              # a large part has about the image's own shape
        assert min(ratios) < 0.78 and max(ratios) > 1.3


def test_default_ranges_of_the_crop():
    """By default the crop shows 90 to 100 % of the image, as in the recipe."""
    recipe = {"scale": (0.9, 1.0), "ratio": (3 / 4, 4 / 3)}
    for seed in range(20):
        assert drawn_box(240, 200, seed) == drawn_box(240, 200, seed, **recipe)


@pytest.mark.parametrize("size, box", [((300, 90), [90, 0, 120, 90]),
                                       ((90, 300), [0, 90, 90, 120])])
def test_crop_of_an_extreme_shape(size, box):
    """Where no draw can fit (such as 90 % of 300 x 90), the largest central part of ratio 4/3 or
    3/4 is taken."""
    assert all(drawn_box(*size, seed) == box for seed in range(5))


def test_crop_is_resized_as_asked():
    """The nearest pixel keeps black and white as they are; bicubic, the default, mixes them."""
    image = Image.fromarray(np.where(noise(0) > 127, 255, 0).astype(np.uint8))
    nearest = random_resized_crop(image, 32, np.random.default_rng(0), resample=Image.NEAREST)
    mixed = random_resized_crop(image, 32, np.random.default_rng(0))
    assert set(np.unique(nearest)) == {0, 255} and len(np.unique(mixed)) > 10


def test_crop_depends_on_its_generator_alone():
    """The same generator gives the same crop, another generator another crop."""
    image = Image.fromarray(noise(0))
    crops = [np.array(random_resized_crop(image, 32, np.random.default_rng(seed)))
             for seed in (5, 5, 6)]
    assert (crops[0] == crops[1]).all() and (crops[0] != crops[2]).any()


# --------------------------------------------------------------------------------------------------
# Pairs and batches

def sampler(size):
    """What `Method.sampler` gives for SimZSS and images of this size."""
    return partial(SimZSS.sample, size=size)


def captioned(images, captions, size=16, seed=0):
    annotations = load_annotations(None, captions, BANK, "match")
    return CaptionedImages(images, captions, annotations, sampler(size), size, seed)


def load(source, size=8, bank=BANK, **options):
    """`load_pairs` with the built-in matcher."""
    return load_pairs(source, bank, "match", size, sampler(size), **options)


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
    assert batch["bad"] == 0


def test_batch_without_concepts():
    """A batch in which no caption has a concept has M = 0."""
    pairs = captioned([noise(0), noise(1)], ["nothing", "nothing at all"])
    batch = collate([pairs[0, 0], pairs[1, 1]])
    assert batch["concepts"].shape == (2, 0, 3) and len(batch["tokens"]) == 2


def test_position_seeds_the_crop():
    """A pair looks the same at the same position of runs with the same seed, and different at
    another position or with another seed."""
    pairs = captioned([noise(0)], ["a dog"])
    other = captioned([noise(0)], ["a dog"], seed=1)
    first, again, later = (pairs[position, 0]["pixels"] for position in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, later) and not torch.equal(first, other[3, 0]["pixels"])


def test_unreadable_image_is_replaced(tmp_path):
    """An unreadable image is counted and replaced by the next pair, with its caption and its
    concepts."""
    (tmp_path / "text.jpg").write_text("this is no photo")
    images = [tmp_path / "text.jpg", tmp_path / "gone.jpg", noise(2), noise(3),
              tmp_path / "text.jpg"]
    pairs = captioned(images, CAPTIONS)
    assert pairs[7, 2]["bad"] == 0
    for index, wanted, bad in [(0, 2, 2), (1, 2, 1), (4, 2, 3)]:       # the first follows the last
        item = pairs[7, index]
        same = pairs[7, wanted]
        assert torch.equal(item["pixels"], same["pixels"])
        assert torch.equal(item["tokens"], tokenize(CAPTIONS[wanted]))
        assert item["concepts"].tolist() == same["concepts"].tolist() == [[2, 2, 3]]
        assert item["bad"] == bad
    assert collate([pairs[7, 0], pairs[8, 2], pairs[9, 1]])["bad"] == 3


def test_only_unreadable_images(tmp_path):
    """Ten unreadable images in a row end training with an error that names the last of them."""
    pairs = captioned([tmp_path / f"{i}.jpg" for i in range(10)], ["a dog"] * 10)
    with pytest.raises(ValueError,
                       match=r"ten unreadable images in a row, the last: no image .*1\.jpg"):
        pairs[0, 2]


def test_workers_do_not_matter():
    """Two worker processes give the same batches as none."""
    pairs = captioned([noise(i) for i in range(5)], CAPTIONS)
    runs = [list(DataLoader(pairs, batch_sampler=GlobalBatches(5, 4, 4, 5), collate_fn=collate,
                            num_workers=workers)) for workers in (0, 2)]
    assert len(runs[0]) == len(runs[1]) == 4
    for one, other in zip(*runs):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key]))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_a_batch(world):
    """The slices of 2 or 4 processes, one after another, are the batches of one process."""
    whole = list(GlobalBatches(10, 8, 7, 6, seed=3))
    slices = [list(GlobalBatches(10, 8, 7, 6, rank, world, seed=3)) for rank in range(world)]
    assert [sum(parts, []) for parts in zip(*slices)] == whole
    assert [len(keys) for parts in slices for keys in parts] == [8 // world] * 7 * world


def test_each_pass_is_a_permutation():
    """Every pass has each number once, in a new order, although batches of 4 do not divide its 10
    pairs."""
    batches = GlobalBatches(10, 4, 5, 10)
    keys = sum(batches, [])
    numbers = [number for _, number in keys]
    assert [position for position, _ in keys] == list(range(20)) and len(batches) == 5
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]


def test_short_passes():
    """pass_pairs cuts a pass: 6 of the 10 pairs, each once, others in the next pass, and all of
    them over time."""
    numbers = [number for keys in GlobalBatches(10, 4, 30, 6) for _, number in keys]
    passes = [numbers[start:start + 6] for start in range(0, 120, 6)]
    assert all(len(set(numbers)) == 6 for numbers in passes)
    assert len({frozenset(numbers) for numbers in passes}) > 10 and set(numbers) == set(range(10))


def test_pass_is_never_longer_than_the_data():
    """With fewer pairs than pass_pairs a pass is all pairs once."""
    assert list(GlobalBatches(10, 4, 9, 400_000)) == list(GlobalBatches(10, 4, 9, 10))


@pytest.mark.parametrize("world", [1, 2])
def test_only_some_of_the_pairs(world):
    """only=4 uses the same 4 of 10 pairs in every pass and process, each once. only=6 adds two to
    them. Another seed uses others."""
    def used(only, seed=3):
        slices = [list(GlobalBatches(10, 4, 30, 99, rank, world, seed, only=only))
                  for rank in range(world)]
        return [number for parts in zip(*slices) for keys in parts for _, number in keys]

    four = used(4)
    passes = [four[i:i + 4] for i in range(0, 120, 4)]
    assert len(four) == 120 and len(set(four)) == 4
    assert all(set(numbers) == set(four) for numbers in passes)
    assert len(set(map(tuple, passes))) > 10                    # each pass in another order
    assert set(four) < set(used(6)) and len(set(used(6))) == 6
    assert len({frozenset(used(4, seed)) for seed in range(9)}) > 3
    assert used(10) == used(None)


def test_batch_larger_than_a_pass():
    """A batch may span several passes: 7 of 3 pairs are two whole passes and one more pair."""
    (keys,) = GlobalBatches(3, 7, 1, 3)
    numbers = [number for _, number in keys]
    assert sorted(numbers[:3]) == sorted(numbers[3:6]) == [0, 1, 2] and len(numbers) == 7


def test_seeds_of_the_order():
    """The same seed gives the same order, another seed another order."""
    first, again, other = (list(GlobalBatches(50, 10, 5, 50, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


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
    """Each pair's concepts are the annotations of its own caption."""
    found = [pairs[0, i]["concepts"].tolist() for i in range(len(pairs))]
    annotations = annotate(pairs.captions, BANK, "match")
    assert found == [[list(row) for row in rows] for rows in annotations] and any(found)


def test_missing_images_are_skipped(tmp_path, capsys):
    """Of 200 images 2 may be missing: their pairs are left out and counted, the others keep their
    own concepts."""
    captions = [CAPTIONS[i % 5] + f", number {i}" for i in range(200)]
    pairs = load(write_coco(tmp_path, captions, missing=(0, 52)))
    assert pairs.captions == captions[1:52] + captions[53:]
    names = [path.name for path in pairs.images]
    assert names == [f"{i:03d}.jpg" for i in range(200) if i not in (0, 52)]
    notice = f"2 of 200 images are missing in {tmp_path / 'val'}; their captions are skipped"
    assert notice in capsys.readouterr().out
    check_aligned(pairs)


def test_too_many_missing_images(tmp_path):
    """With 3 of 200 images missing, more than 1 %, the folder is probably the wrong one. The error
    names it and an example."""
    path = write_coco(tmp_path, ["a dog"] * 200, missing=(9, 7, 8))
    message = (r"3 of the 200 images of .*captions_val\.json are not in .*val, for example "
               r"007\.jpg; at most 1% may be missing. Name the folder with --images")
    with pytest.raises(FileNotFoundError, match=message):
        load(path)


def test_captions_of_one_missing_image(tmp_path, capsys):
    """Images are counted, not captions: one missing image with five captions is one of 100."""
    path = write_coco(tmp_path, ["a dog"] * 100, missing=(5,))
    content = json.loads(path.read_text())
    content["annotations"] += [{"image_id": 5, "caption": "a cat"}] * 4
    path.write_text(json.dumps(content))
    assert load(path).captions == ["a dog"] * 99
    assert "1 of 100 images are missing" in capsys.readouterr().out


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
    assert pairs.images == [tmp_path / "elsewhere" / "000.jpg"]


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


def test_training_decodes_at_twice_the_size(tmp_path):
    """Training asks for at least twice the pixels that its crops need, so smaller photos give
    exactly the same crops."""
    paths = [photo(tmp_path / f"{width}.jpg", width, 80) for width in (80, 300)]
    paths.append(photo(tmp_path / "large.jpg", 256, 300))
    pairs = captioned(paths, CAPTIONS[:3], size=32)
    assert [pairs.open_image(i).size for i in range(3)] == [(80, 80), (300, 80), (64, 75)]
    crop = random_resized_crop(load_image(paths[1]), 32, np.random.default_rng((0, 7)))
    assert torch.equal(pairs[7, 1]["pixels"], to_pixels(crop))


@needs_photos
def test_real_captions(tmp_path):
    """COCO's own file gives all its captions. Each has an existing photo and most have concepts."""
    captions = tmp_path / "captions_train2017.json"
    source = PHOTOS / "coco" / "annotations" / "captions_train2017.json"
    captions.write_bytes(source.read_bytes())
    pairs = load(captions, size=32, bank=ConceptBank.default(),
                 images=PHOTOS / "coco" / "train2017")
    found = list(zip([path.name for path in pairs.images], pairs.captions))
    assert found == read_captions(captions)
    assert all(path.is_file() for path in pairs.images)
    assert (np.diff(pairs.annotations.offsets) > 0).mean() > 0.5


def test_partners_share_a_concept():
    """A partner is a caption with one of the caption's concepts, and every occurrence of such a
    concept can be drawn, also after captions without any; a caption without concepts has none."""
    found = [[], [(4, 1, 2), (7, 3, 4)], [], [], [(7, 1, 2)], [(2, 1, 2)],
             [(4, 2, 3), (4, 5, 6)], []]
    annotations = Annotations(*as_arrays(found))
    rng = np.random.default_rng(0)
    for i, rows in enumerate(found):
        assert annotations.of(i).tolist() == [list(row) for row in rows]
        drawn = {annotations.partner(i, rng) for _ in range(200)}
        own = {concept for concept, _, _ in rows}
        expected = {(j, concept) for j, others in enumerate(found) for concept, _, _ in others
                    if concept in own}
        assert drawn == (expected or {None})


# --------------------------------------------------------------------------------------------------
# Features that are computed once

@pytest.fixture(scope="module")
def backbone():
    return VisionBackbone("toy")


def features_of(backbone):
    """SimZSS's features of pixels, the function that `FeatureCache.compute` takes."""
    method = SimZSS(backbone, TextEncoder(backbone.width, width=32, layers=1))
    return lambda pixels: method.features({"pixels": pixels})


def cached(pairs, backbone, folder, images_per_file=2, bytes_per_image=1):
    """`pairs` that read their features from a folder, where none is computed yet. The cache is
    built as train.py builds it."""
    method = SimZSS(backbone, TextEncoder(backbone.width, width=32, layers=1))
    key = {"backbone": method.feature_key(), "precision": "torch.float32"}
    cache = FeatureCache(pairs.images, pairs.open_image, pairs.size, folder, key, bytes_per_image,
                         images_per_file)
    annotations = (pairs.annotations.offsets, pairs.annotations.rows)
    return CaptionedImages(pairs.images, pairs.captions, annotations, pairs.sample, pairs.size,
                           pairs.seed, cache)


def computed(pairs, backbone, folder, images_per_file=2):
    """`cached`, with the features that were missing."""
    pairs = cached(pairs, backbone, folder, images_per_file)
    pairs.cache.compute(features_of(backbone))
    return pairs


def seen(backbone, image, size):
    """The backbone's features of a whole image, as float16."""
    pixels = to_pixels(image.resize((size, size), Image.BICUBIC))
    class_token, patches, _ = backbone(backbone.normalise(pixels[None]))
    return class_token[0].half(), patches[0].half()


def stored_files(folder):
    return sorted(folder.glob("*.safetensors"))


def test_cached_features(tmp_path, backbone):
    """Cached features are the backbone's of the whole image, to the precision of float16, for any
    number of images per file."""
    pairs = captioned([noise(i, 128, 128) for i in range(5)], CAPTIONS, size=64)
    features = computed(pairs, backbone, tmp_path / "features")
    for i in range(5):
        item = features[9, i]
        class_token, patches = seen(backbone, Image.fromarray(noise(i, 128, 128)), 64)
        torch.testing.assert_close(item["class_token"], class_token, atol=1e-3, rtol=0)
        torch.testing.assert_close(item["patch_tokens"], patches, atol=1e-3, rtol=0)
        assert torch.equal(item["concepts"], pairs[9, i]["concepts"])
        assert torch.equal(item["tokens"], pairs[9, i]["tokens"])
    batch = collate([features[9, i] for i in (2, 0)])
    assert "pixels" not in batch
    assert torch.equal(batch["patch_tokens"][1], features[0, 0]["patch_tokens"])


def count_images(monkeypatch):
    """List that grows by the number of images in each call of the backbone."""
    calls = []
    forward = VisionBackbone.forward

    def counting(self, images):
        calls.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(VisionBackbone, "forward", counting)
    return calls


def test_features_are_computed_once_by_one_process(tmp_path, backbone, monkeypatch):
    """Each of three processes computes its share of the images, and no image is computed twice.
    After a kill only those are computed that were not written: a half-written file does not
    count."""
    pairs = captioned([noise(i) for i in range(5)], CAPTIONS, size=32)
    calls = count_images(monkeypatch)
    folder = tmp_path / "features"
    every = [cached(pairs, backbone, folder, images_per_file=1) for _ in range(3)]
    so_far = []
    for rank, features in enumerate(every):
        features.cache.compute(features_of(backbone), rank, world=3)
        so_far.append(sum(calls))
    assert so_far == [2, 4, 5]
    alone = computed(pairs, backbone, tmp_path / "alone", images_per_file=5)
    for i in range(5):
        assert torch.equal(alone[0, i]["patch_tokens"], every[0][0, i]["patch_tokens"])
    del calls[:]
    whole = folder / "features-000003.safetensors"
    whole.rename(folder / "features-000003.safetensors.1.partial")
    computed(pairs, backbone, folder, images_per_file=1)
    assert calls == [1]
    assert torch.equal(alone[0, 3]["patch_tokens"], every[0][0, 3]["patch_tokens"])


def test_a_broken_feature_file_is_named(tmp_path, backbone):
    """Features from a file that was cut short count as unreadable, and the error names the file."""
    pairs = captioned([noise(0)], CAPTIONS[:1], size=32)
    features = computed(pairs, backbone, tmp_path / "features")
    path = tmp_path / "features" / "features-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="features-000000.safetensors is broken .*delete it"):
        features[0, 0]


def test_features_on_a_full_disk(tmp_path, backbone, monkeypatch):
    """A disk that gets full while features are written ends in an error. What was written is kept,
    and the next run goes on from there."""
    pairs = captioned([noise(i) for i in range(5)], CAPTIONS, size=32)
    calls = count_images(monkeypatch)
    save = safetensors.torch.save_file
    features = cached(pairs, backbone, tmp_path / "features")

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half of it")
        if len(calls) == 2:
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="features-000001.safetensors could not be written "
                                      ".*No space left.* kept"):
        features.cache.compute(features_of(backbone))
    monkeypatch.setattr(safetensors.torch, "save_file", save)
    left = sorted(path.name for path in (tmp_path / "features").iterdir())
    assert left == ["features-000000.safetensors", "features.json"]
    features.cache.compute(features_of(backbone))
    assert calls == [2, 2, 2, 1]


def test_captions_share_their_image(tmp_path, backbone):
    """Several captions of one image share its features. An unreadable image is replaced and counted
    as without a cache."""
    for i in (0, 2):
        Image.fromarray(noise(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_text("this is no photo")
    paths = [tmp_path / f"{i}.png" for i in (2, 1, 2, 0, 1)]
    pairs = captioned(paths, CAPTIONS, size=32)
    features = computed(pairs, backbone, tmp_path / "features")
    stored = [safetensors.torch.load_file(path) for path in stored_files(tmp_path / "features")]
    for name in ("class_token", "patch_tokens", "readable"):
        assert [len(tensors[name]) for tensors in stored] == [2, 1]
    assert torch.equal(features[0, 0]["patch_tokens"], features[0, 2]["patch_tokens"])
    class_token, _ = seen(backbone, Image.fromarray(noise(0)), 32)
    torch.testing.assert_close(features[0, 3]["class_token"], class_token, atol=1e-3, rtol=0)
    bad = [features[0, i]["bad"] for i in range(5)]
    assert bad == [pairs[0, i]["bad"] for i in range(5)] == [0, 1, 0, 0, 1]
    for i in range(5):
        assert torch.equal(features[0, i]["concepts"], pairs[0, i]["concepts"])


def test_features_of_something_else(tmp_path, backbone):
    """Features of another size, other images or another backbone are refused. The error says what
    differs and what to do."""
    pairs = captioned([noise(i) for i in range(5)], CAPTIONS, size=32)
    cached(pairs, backbone, tmp_path / "features")
    what_to_do = "name another folder with --cache-features, or delete this one"
    for other, trunk, differs in [
            (captioned(pairs.images, CAPTIONS, size=48), backbone, "size"),
            (captioned(pairs.images[:4], CAPTIONS[:4], size=32), backbone, "images, names_sha256"),
            (captioned(pairs.images[::-1], CAPTIONS, size=32), backbone, "names_sha256"),
            (pairs, VisionBackbone("toy", mean=(0.1, 0.2, 0.3)), "backbone")]:
        message = rf"holds the features of something else \({differs} differ\); {what_to_do}"
        with pytest.raises(ValueError, match=message):
            cached(other, trunk, tmp_path / "features")


def test_features_of_equally_named_images(tmp_path, backbone):
    """Images of the same names in another folder are other images."""
    for part, height in (("a", 40), ("b", 30)):
        (tmp_path / part).mkdir()
        Image.fromarray(noise(0, height)).save(tmp_path / part / "0.png")
    cached(captioned([tmp_path / "a" / "0.png"], ["a dog"]), backbone, tmp_path / "features")
    with pytest.raises(ValueError, match="something else"):
        cached(captioned([tmp_path / "b" / "0.png"], ["a dog"]), backbone, tmp_path / "features")


def test_features_that_do_not_fit(tmp_path, backbone):
    """Features that are larger than the free disk are refused before the first is written. The
    error names both sizes."""
    pairs = captioned([noise(0)], ["a dog"], size=100_000_000)
    with pytest.raises(OSError, match=r"the features need [\d.]+ GB in .*features, [\d.]+ GB are "
                                      "free"):
        cached(pairs, backbone, tmp_path / "features", bytes_per_image=10 ** 18)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_features_in_a_new_folder(tmp_path, backbone):
    """The folder for the features is made, and the folders above it."""
    cached(captioned([noise(0)], ["a dog"]), backbone, tmp_path / "new" / "features")
    assert (tmp_path / "new" / "features" / "features.json").is_file()


def test_the_key_of_features(tmp_path):
    """The same weights at another path have the same cache. Other weights are refused, and so are
    features without their key."""
    pairs = captioned([noise(0)], ["a dog"], size=32)
    names = ["a.safetensors", "b.safetensors", "c.safetensors"]
    for seed, name in zip([0, 0, 1], names):
        torch.manual_seed(seed)
        trunk = VisionBackbone("test_resnet", pretrained=False).trunk
        safetensors.torch.save_file(trunk.state_dict(), tmp_path / name)
    first, moved, other = (VisionBackbone("test_resnet", weights=tmp_path / name)
                           for name in names)
    computed(pairs, first, tmp_path / "features")
    cached(pairs, moved, tmp_path / "features")
    with pytest.raises(ValueError, match=r"\(backbone differ\)"):
        cached(pairs, other, tmp_path / "features")
    (tmp_path / "features" / "features.json").unlink()
    with pytest.raises(ValueError, match="holds the features of something else"):
        cached(pairs, first, tmp_path / "features")


def test_features_are_not_sent_to_workers(tmp_path, backbone):
    """A worker that is not forked is told where the features are. None of them is sent to it, and
    it reads the same."""
    pairs = captioned([noise(i) for i in range(8)], ["a dog"] * 8, size=128)
    features = computed(pairs, backbone, tmp_path / "features")
    sent = pickle.dumps(features)
    size = sum(path.stat().st_size for path in stored_files(tmp_path / "features"))
    assert len(sent) < size / 2
    received = pickle.loads(sent)
    assert torch.equal(received[0, 3]["patch_tokens"], features[0, 3]["patch_tokens"])


def test_features_of_a_changed_file(tmp_path, backbone):
    """A photo that was replaced under its old name is noticed."""
    path = tmp_path / "photo.png"
    Image.fromarray(noise(0)).save(path)
    cached(captioned([path], ["a dog"]), backbone, tmp_path / "features")
    Image.fromarray(noise(1)[:-1]).save(path)
    with pytest.raises(ValueError, match="holds the features of something else"):
        cached(captioned([path], ["a dog"]), backbone, tmp_path / "features")


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


def test_toy_scene_is_its_generator_s(scenes):
    """The same generator draws the same scene, another generator another scene."""
    for i in (0, 7):
        image, mask, caption = toy_scene(np.random.default_rng((0, 0, i)))
        assert (image == scenes[i][0]).all() and (mask == scenes[i][1]).all()
        assert caption == scenes[i][2]
    assert (scenes[0][0] != scenes[7][0]).any()


def test_toy_classes_all_occur(scenes):
    """In 200 scenes every class is painted, and masks hold only classes."""
    found = np.unique([mask for _, mask, _ in scenes])
    assert sorted(found) == list(range(len(NAMES))) and NAMES == [*STUFF, *THINGS]


def test_toy_captions_tell_the_truth(scenes):
    """Every class that a caption names, in singular or plural, is in the mask of its scene."""
    for _, mask, caption in scenes:
        named = named_in(caption)
        assert named and named <= set(np.unique(mask).tolist()), caption


def test_toy_captions_do_not_tell_all(scenes):
    """Captions are weak labels: most scenes show a class that their caption does not name."""
    untold = [bool(set(np.unique(mask).tolist()) - named_in(caption))
              for _, mask, caption in scenes]
    assert np.mean(untold) > 0.5


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
    dataset = ToyScenes(3)
    items = list(islice(dataset, 5))
    assert len(dataset) == len(items) == len({name for name, _, _ in items}) == 3
    assert dataset.classes == TOY_CLASSES
    _, image, mask = ToyScenes(3)[2]
    assert (np.array(items[2][1]) == np.array(image)).all() and (items[2][2] == mask).all()
    assert items[0][1].mode == "RGB" and items[0][2].shape == items[0][1].size[::-1]


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
