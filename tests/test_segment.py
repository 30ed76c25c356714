"""From a photo to a mask: window arithmetic, a slow reference, and segment.py on many kinds of
files."""
import dataclasses
import json
import os
import re
import resource

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import concepts
import eval
import segment
import train
from conftest import noise, tiny
from machinery.files import save_tensors
from machinery.images import to_image
from machinery.names import read_templates
from machinery.networks.checkpoint import load_model, save_model
from machinery.scoring.pictures import class_colours
from machinery.scoring.protocol import embed, open_model, set_precision
from machinery.settings import as_mapping, read, read_recipe
from machinery.tokenizer import VOCABULARY, tokenizer
from machinery.toy import save_scene, toy_scene
from methods.sseg import SSeg
from model import SimZSS
from segment import (Segmenter, in_words, parse_background, put_background, read_words, resize,
                     resized_size, segment_image, window_starts)


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
    def square(*values):
        return torch.tensor(values, dtype=torch.uint8).expand(3, len(values), -1)

    # halved: the new centres lie between two old ones; (0 + 1) / 2 rounds up to 1, (2 + 255) / 2
    # to 129
    assert resize(square(0, 1, 2, 255), 2)[0, 0].tolist() == [1, 129]
    # a quarter: only the two old pixels nearest to a new centre count
    assert resize(square(255, 10, 20, 255, 255, 30, 50, 255), 2)[0, 0].tolist() == [15, 40]
    # doubled: weights 3 : 1 between neighbours, the border repeats; 2.5 rounds up to 3
    assert resize(square(0, 10), 4)[0, 0].tolist() == [0, 3, 8, 10]
    assert resize(square(0, 10), 2, scale=2)[0, 0].tolist() == [0, 3, 8, 10]
    assert torch.equal(resize(square(7, 8), 2), square(7, 8))


# --------------------------------------------------------------------------------------------------
# segment_image against a slow loop

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
    pixels = resize(pixels, short_side)
    h, w = pixels.shape[1:]
    total = np.zeros((len(embeddings), h, w))
    count = np.zeros((h, w))
    for top in {max(min(y, h - window), 0) for y in range(0, h, stride)}:
        for left in {max(min(x, w - window), 0) for x in range(0, w, stride)}:
            crop = pixels[:, top:top + window, left:left + window]
            scores, (H, W) = model.patch_scores(crop[None], embeddings)
            grid = scores[0].double().numpy()
            large = enlarging(H, grid.shape[1]) @ grid @ enlarging(W, grid.shape[2]).T
            here = (slice(top, top + window), slice(left, left + window))
            total[:, *here] += large[:, :crop.shape[1], :crop.shape[2]]
            count[here] += 1
    return enlarging(height, h) @ (total / count) @ enlarging(width, w).T


@pytest.mark.parametrize("height, width, window, stride, short_side", [
    (101, 75, 64, 24, 90), (9, 400, 48, 32, 64), (333, 500, 448, 224, 448), (7, 5, 64, 32, 16),
    (1, 90, 64, 64, 64)])
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


def test_batches_change_nothing(model):
    """The mask does not depend on how many windows are computed at a time."""
    photo = np.random.default_rng(1).integers(0, 256, (70, 150, 3), dtype=np.uint8)
    embeddings = F.normalize(torch.randn(7, 3, model.backbone.width), dim=-1)
    mask, score = segment_image(model, photo, embeddings, 64, 32, 64)
    for batch in (1, 3):
        found = segment_image(model, photo, embeddings, 64, 32, 64, batch)
        assert torch.equal(found[0], mask)
        torch.testing.assert_close(found[1], score, rtol=0, atol=1e-6)


class Planted:
    """A model that scores patches of 8 x 8 pixels by how red, green and blue they are, for three
    of C classes. The others score 0, as black does."""

    def __init__(self, classes):
        self.classes = classes

    def patch_scores(self, pixels, embeddings):
        H, W = pixels.shape[-2:]
        padded = F.pad(pixels.float() / 255, (0, -W % 8, 0, -H % 8))
        covered = padded.shape[-2:]
        scores = torch.zeros(len(pixels), len(embeddings), covered[0] // 8, covered[1] // 8)
        scores[:, self.classes] = F.avg_pool2d(padded, 8)
        return scores, covered


@pytest.mark.parametrize("height, enlarged", [(44, 1), (32, 2)])
@pytest.mark.parametrize("C, classes", [(3, [2, 0, 1]), (300, [299, 7, 256])])
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
    mask, _ = segment_image(Planted(classes), 0 * photo, torch.zeros(C, 1), 48, 32, height)
    assert (mask == 0).all()                        # the first of equal classes wins


@pytest.mark.parametrize("settings", [dict(window=48, stride=64), dict(short_side=-48)])
def test_windows_that_leave_pixels_out_are_refused(settings):
    """A stride beyond the window, or a negative size, would leave pixels without a score, and is
    refused by name."""
    photo = np.zeros((48, 1000, 3), np.uint8)
    with pytest.raises(ValueError, match=list(settings)[-1]):
        segment_image(Planted([0, 1, 2]), photo, torch.zeros(3, 1), **settings)


# --------------------------------------------------------------------------------------------------
# Background

@pytest.mark.parametrize("text, expected", [
    (None, ("none", None)), ("none", ("none", None)), ("threshold:0.2", ("threshold", 0.2)),
    ("threshold:-1", ("threshold", -1)),
    ("prompt:sky", ("prompt", ["sky"])),
    ('prompt: open sky ,wall', ("prompt", ["open sky", "wall"]))])
def test_backgrounds_are_read(text, expected):
    """A background is nothing, a threshold of the score, or words."""
    assert parse_background(text) == expected


@pytest.mark.parametrize("text", ["None", "none:1", "threshold", "threshold:", "threshold:low",
                                  "threshold:nan", "prompt", "prompt: , "])
def test_other_backgrounds_are_refused(text):
    """Anything else is refused; the error says what is allowed."""
    expected = f"background '{text}': expected none, threshold:T .*, or prompt:"
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
    mask = torch.tensor([[255]], dtype=torch.uint8)         # of 256 classes
    assert put_background(mask, torch.tensor([[0.5]]), 0.2, index).item() == 256


# --------------------------------------------------------------------------------------------------
# Class embeddings, kept

def test_class_embeddings_are_kept(checkpoint, tmp_path):
    """Class embeddings are read from their file the second time; they are computed anew where it is
    broken, and where no file can be written."""
    model = opened(checkpoint, tmp_path)
    classes = [["cow", "cattle"], ["grass"]]
    fresh = model.embed_classes(classes, ["{}"])
    assert embed(model, classes).equal(fresh)
    (kept,) = (tmp_path / "embeddings").iterdir()
    save_tensors(kept, {"embeddings": 2 * fresh})
    model = opened(checkpoint, tmp_path)
    model.protocol = dataclasses.replace(model.protocol, window=32)     # it embeds alike
    assert embed(model, classes).equal(2 * fresh)
    kept.write_bytes(kept.read_bytes()[:50])
    for _ in range(2):                              # replaced, then read
        assert embed(model, classes).equal(fresh)
    (tmp_path / "file").touch()                     # where no folder can be made
    model.checkpoint_file["checkpoint"] = str(tmp_path / "file" / "model.safetensors")
    assert embed(model, classes).equal(fresh)


def test_a_model_that_is_trained_further_embeds_anew(checkpoint, tmp_path):
    """Neither the embeddings that are kept, nor the file's name, are those of a model that went on
    to train; training it leaves no file."""
    model = opened(checkpoint, tmp_path)
    before = embed(model, [["cow"], ["grass"]])
    model.train()
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(0.1)
    after = embed(model.eval(), [["cow"], ["grass"]])
    assert not after.equal(before) and not model.checkpoint_file
    assert len(list((tmp_path / "embeddings").iterdir())) == 1


def test_class_embeddings_of_another_precision_are_kept_apart(checkpoint, tmp_path):
    """A GPU embeds a little differently in tf32; so do a published file's tensors in a network of
    another name."""
    model = opened(checkpoint, tmp_path)
    for change in (lambda: None, lambda: set_precision(model, "tf32"),
                   lambda: setattr(model.settings.backbone, "name", "another")):
        change()
        embed(model, [["cow"], ["grass"]])
    set_precision(model, "fp32")
    assert len(list((tmp_path / "embeddings").iterdir())) == 3


@pytest.mark.parametrize("classes, settings, seed", [
    ([["grass"], ["cow", "cattle"]], {}, 0), ([["cow"], ["cattle"], ["grass"]], {}, 0),
    ([["cow", "cattle"], ["grass"]], {"templates": "simple7"}, 0),
    ([["cow", "cattle"], ["grass"]], {"class_embedding": "concept"}, 0),
    ([["cow", "cattle"], ["grass"]], {}, 1)])
def test_other_class_embeddings_are_kept_apart(checkpoint, tmp_path, classes, settings, seed):
    """For other classes, templates, another class embedding or another checkpoint class embeddings
    are computed anew."""
    embed(opened(checkpoint, tmp_path), [["cow", "cattle"], ["grass"]])
    save_model(tmp_path, tiny(seed=seed), {})
    model = opened(None, tmp_path)
    model.protocol = dataclasses.replace(model.protocol, **settings)
    expected = model.embed_classes(classes, read_templates(model.protocol.templates))
    assert embed(model, classes).equal(expected)
    assert len(list((tmp_path / "embeddings").iterdir())) == 2


def opened(checkpoint, folder):
    """The model of a checkpoint, copied into folder first."""
    if checkpoint:
        (folder / "model.safetensors").write_bytes(checkpoint.read_bytes())
    arguments = ["photo", "--classes", "cow", "--checkpoint", str(folder), "--device", "cpu"]
    return open_model(segment.parse_args(arguments))


# --------------------------------------------------------------------------------------------------
# The command

NAMES = "cow, grass, sea, sky, boat"


def run(checkpoint, output, *arguments):
    segment.main([*map(str, arguments), "--checkpoint", str(checkpoint), "--output", str(output),
                  "--device", "cpu"])


@pytest.mark.parametrize("size", [(1, 1), (1, 6000), (6000, 1)])
def test_photos_of_any_shape(checkpoint, tmp_path, size):
    """Very elongated and very small photos get a mask and an overlay, with the legend beside the
    photo."""
    Image.effect_noise(size, 80).convert("RGB").save(tmp_path / "photo.jpg")
    run(checkpoint, tmp_path, tmp_path / "photo.jpg", "--classes", NAMES)
    assert Image.open(tmp_path / "photo_mask.png").size == size
    picture = Image.open(tmp_path / "photo_overlay.png")
    assert picture.width > size[0] and picture.height >= size[1]


@pytest.fixture
def photo(tmp_path):
    """A picture file."""
    Image.fromarray(toy_scene(np.random.default_rng(0))[0][:100]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_files_agree(checkpoint, photo, tmp_path, capsys):
    """Mask, overlay and JSON say the same: size, classes found with their share and colour,
    protocol, the method and its settings."""
    (tmp_path / "names.txt").write_text("cow, cattle\ngrass\nsea\nsky\nboat\n")
    run(checkpoint, tmp_path / "out", photo, "--classes", tmp_path / "names.txt", "--stride", 16,
        "--precision", "bf16")
    result = json.loads((tmp_path / "out" / "photo.json").read_text())
    mask = np.array(Image.open(result["mask"]))
    assert (result["height"], result["width"]) == mask.shape == (100, 128)
    assert result["photo"] == str(photo)
    assert result["classes"] == [["cow", "cattle"], ["grass"], ["sea"], ["sky"], ["boat"]]
    assert [c["index"] for c in result["found"]] == np.unique(mask).tolist()
    picture = np.array(Image.open(result["overlay"]))
    legend = picture[:, 128:].reshape(-1, 3).tolist()
    names = ["cow", "grass", "sea", "sky", "boat"]
    for found in result["found"]:
        i = found["index"]
        assert found["name"] == names[i]
        assert found["colour"] == class_colours(names)[i].tolist()
        assert found["colour"] in legend or found["share"] < 0.01
        assert found["share"] == pytest.approx((mask == i).mean(), abs=1e-6)
        assert -1 <= found["score"] <= 1
    protocol = as_mapping(load_model(checkpoint).protocol)
    changed = {**protocol, "stride": 16, "blend": "triangle", "propagate": 0.9}
    assert result["protocol"] == json.loads(json.dumps(changed)) and result["precision"] == "bf16"
    assert result["method"] == "simzss" and result["settings"]["backbone"]["name"] == "toy"
    assert result["checkpoint"] == str(checkpoint) and len(result["checkpoint_sha256"]) == 64
    said = capsys.readouterr()
    assert all(f"photo{end}" in said.out for end in ("_mask.png", "_overlay.png", ".json"))
    assert f"model: {checkpoint}, simzss" in said.err


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


def test_settings_of_one_segmenter_are_not_those_of_another(model):
    """Two Segmenters of one model: each uses its own settings."""
    image = Image.fromarray(noise(0))
    strict = segment.Segmenter(["cow", "sea"], model, background="threshold:2")
    lax = segment.Segmenter(["cow", "sea"], model, background="none", window=32, stride=32)
    for _ in range(2):
        assert strict(image).names == ["background", "cow", "sea"] and not strict(image).mask.any()
        assert model.protocol.window == 64
        assert lax(image).names == ["cow", "sea"] and model.protocol.window == 32


def test_tokens_are_no_colours_where_scores_are_not_their_products(tmp_path, fails):
    """--view pca is refused for a method without patch tokens of unit norm."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    settings = read_recipe("sseg-toy")["model"]
    save_model(tmp_path, SSeg(read(SSeg.Settings, settings, "test")), {})
    fails(segment.main, [tmp_path / "a.png", "--classes", NAMES, "--checkpoint", tmp_path,
                         "--view", "pca"], "--view pca: sseg has no patch tokens")


def test_a_folder_with_its_results_is_segmented_again(checkpoint, tmp_path):
    """segment.py takes its own results, in the photos' folder, for no photos."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for _ in range(2):
        run(checkpoint, tmp_path, tmp_path, "--classes", NAMES, "--view", "pca")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.json", "a.png", "a_mask.png", "a_overlay.png", "a_pca.png"]


def test_pictures_are_written_whole_or_not_at_all(checkpoint, tmp_path, fails):
    """A picture that the disk has no room for ends segment.py with one line that names it, and
    leaves nothing; what a killed process left half-written goes at the next start."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8))
    photo.save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    left = tmp_path / "out" / "b_overlay.png.1.partial"
    left.touch()
    os.utime(left, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))       # bytes of a file
    try:
        fails(segment.main, [tmp_path / "a.png", "--classes", NAMES, "--checkpoint", checkpoint,
                             "--output", tmp_path / "out"], "a_overlay.png could not be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_mask.png"]


def test_an_unreadable_photo_leaves_the_others(checkpoint, tmp_path, fails):
    """Photos that cannot be read are named in the end, the others are done. A path where there is
    no file ends the command at its start."""
    for name in ("a.png", "c.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / "b.png").write_text("no image")
    arguments = [tmp_path, "--classes", NAMES, "--checkpoint", checkpoint, "--output",
                 tmp_path / "out"]
    fails(segment.main, [tmp_path / "d.png", *arguments], "no image", "d.png")
    assert not (tmp_path / "out").exists()
    fails(segment.main, arguments, "b.png is no readable image", "1 of 3 photos were left out")
    assert (tmp_path / "out" / "a.json").exists() and (tmp_path / "out" / "c.json").exists()


def test_photos_of_the_same_name_do_not_overwrite_each_other(checkpoint, tmp_path, fails):
    """Two photos whose files would have the same names are refused before one is overwritten."""
    photos = [tmp_path / "photo.png", tmp_path / "photo.jpg"]
    for photo in photos:
        Image.new("RGB", (64, 64)).save(photo)
    fails(segment.main, [*photos, "--classes", NAMES, "--checkpoint", checkpoint],
          "two photos have the same name", "--output")


@pytest.mark.parametrize("more", [["--class-embedding", "caption"],
                                  ["--class-embedding", "concept"],
                                  ["--scales", "1", "1.5", "--refine-steps", "2"],
                                  ["--propagate", "0.9", "--blend", "triangle"]])
def test_segment_and_eval_give_the_identical_mask(checkpoint, folder, tmp_path, more):
    """Scored against segment.py's own masks, eval.py finds not one wrong pixel; of absent classes
    it says null."""
    names = folder / "classes.txt"
    names.write_text("\n".join(f"thing number {i}" for i in range(40)))
    photos = sorted((folder / "images").iterdir())
    run(checkpoint, tmp_path, *photos, "--classes", names, "--propagate", "0", *more)
    seen = set()
    for photo in photos:
        mask = Image.open(tmp_path / f"{photo.stem}_mask.png")
        seen |= set(np.array(mask).flatten().tolist())
        mask.save(folder / "masks" / f"{photo.stem}.png")
    output = tmp_path / "result.json"
    eval.main(["--dataset", str(folder), "--checkpoint", str(checkpoint), "--output", str(output),
               "--device", "cpu", "--blend", "triangle", *more])
    result = json.loads(output.read_text())
    assert result["mIoU"] == result["mAcc"] == result["aAcc"] == 1 and 1 < len(seen) < 40
    assert result["IoU"] == [1 if i in seen else None for i in range(40)]


def test_the_networks_precision():
    """In bfloat16 only the networks compute: scores and tokens are float32, and differ a little;
    fp32 changes nothing."""
    model = tiny(backbone={"name": "test_vit", "weights": "random"})
    pixels = torch.from_numpy(noise(0)).permute(2, 0, 1)[None]
    classes = F.normalize(torch.randn(3, 1, model.backbone.width), dim=-1)
    exact = model.patch_scores(pixels, classes)[0]
    set_precision(model, "fp32")
    assert torch.equal(model.patch_scores(pixels, classes)[0], exact)
    set_precision(model, "bf16")
    scores = model.patch_scores(pixels, classes)[0]
    assert scores.dtype == model.image_scores(pixels, classes).dtype == torch.float32
    assert not torch.equal(scores, exact) and not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("settings", [
    {}, {"background": "threshold:0.1"}, {"background": "prompt:sand", "stride": 16, "batch": 3},
    {"templates": "simple7", "class_embedding": "concept", "scales": [1, 1.5], "refine_steps": 1}])
def test_python_gives_the_mask_of_the_command(checkpoint, photo, tmp_path, settings):
    """`segment` gives, bit for bit, the mask that the command writes, whatever the settings and in
    whatever form it gets the photo; `Segmenter` does so for many photos, and takes a model."""
    flags = [word for name, value in settings.items() for word in (
        f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value]))]
    run(checkpoint, tmp_path, photo, "--classes", NAMES, *flags)
    written = np.array(Image.open(tmp_path / "photo_mask.png"))
    words = NAMES.split(", ")
    segmenter = Segmenter(words, checkpoint, "cpu", **settings)
    image = Image.open(photo)
    for form in (str(photo), image, np.array(image), np.array(image) / np.float32(255)):
        mask, names, score = segmenter(form)
        assert (mask == written).all() and score.dtype == np.float32
    assert names == ["background"] * ("background" in settings) + words
    settings.pop("batch", None)
    assert (segment.segment(photo, NAMES, checkpoint, "cpu", **settings).mask == written).all()
    model = load_model(checkpoint, protocol={"blend": "triangle", "propagate": 0.9})
    assert (Segmenter(words, model, **settings)(photo).mask == written).all()


@pytest.mark.parametrize("photo, found", [
    (np.zeros((40, 60)), (60, 40)), (np.full((40, 60, 1), 7, np.uint8), (60, 40)),
    (np.zeros((40, 60, 4), np.uint8), (60, 40)), (np.ones((4, 6, 3)), (6, 4)),
    (Image.new("RGBA", (60, 40)), (60, 40)), (Image.new("I;16", (60, 40)), (60, 40)),
    (np.zeros((3, 40, 60)), "(3, 40, 60); expected (height, width)"),
    (np.full((4, 4, 3), 255.0), "float64 numbers in 255.0..255.0; expected uint8"),
    (np.full((4, 4), np.nan), "nan"), (np.zeros((4, 4), bool), "bool numbers"),
    (np.zeros((4, 4), int), "int64 numbers"), (np.zeros((0, 4, 3), np.uint8), "expected uint8"),
    (None, "a photo of shape ()")])
def test_photos_from_python(photo, found):
    """Grey, transparent and 16-bit pictures, and floats in 0..1, become RGB; what is no picture is
    refused."""
    if isinstance(found, str):
        with pytest.raises(ValueError, match=re.escape(found)):
            to_image(photo)
    else:
        image = to_image(photo)
        assert image.mode == "RGB" and image.size == found
        assert (np.array(image) == np.array(image)[:1, :1]).all()


def test_equal_photos_are_equal_in_any_form():
    """Floats are 1/255 of the grey levels, and alpha lies over white."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (np.array(to_image(grey / 255))[..., 0] == grey).all()
    clear = np.dstack([np.zeros((16, 16, 3), np.uint8), grey])
    assert (np.array(to_image(clear))[..., 0] == 255 - grey).all()


def test_words_from_python(model):
    """A text is no list of class names to a method; lists of synonyms are."""
    with pytest.raises(ValueError, match="list of class names, found the text 'sky'"):
        model.embed_classes("sky")
    assert read_words([["cat", "kitten"], "sofa"]) == [["cat", "kitten"], ["sofa"]]
    with pytest.raises(ValueError, match="words: no class names"):
        read_words([])


def test_words_that_training_never_saw_are_named(tmp_path, photo, capsys):
    """A word none of whose tokens was in training is named in a warning, also after the model was
    saved; a model that does not know what it saw says nothing."""
    model = tiny()
    save_model(tmp_path, model, {})
    run(tmp_path, tmp_path, photo, "--classes", "cow, zeppelin")
    assert "warning" not in capsys.readouterr().err
    model.seen_tokens = torch.zeros(VOCABULARY, dtype=bool)
    model.seen_tokens[tokenizer().encode("a cow in grass")] = True
    save_model(tmp_path, model, {})
    assert load_model(tmp_path).seen_tokens.equal(model.seen_tokens)
    run(tmp_path, tmp_path, photo, "--classes", "cow, grass zeppelin, Sofa")
    said = capsys.readouterr().err
    assert "training had the words zeppelin, Sofa;" in said


def test_unfinished_models_are_named(tmp_path, photo, capsys):
    """The line on the model says what it was trained on, and whether that is unfinished."""
    save_model(tmp_path, tiny(), {"run": {"train_data": "photos.json"}, "step": 3, "steps": 9})
    run(tmp_path, tmp_path, photo, "--classes", "cow, sky")
    assert "simzss, trained on photos.json, UNFINISHED: step 3 of 9" in capsys.readouterr().err


def test_classes_below_a_hundredth(tmp_path):
    """The line on a photo names what fills a hundredth of it, the largest first, and counts the
    rest; all are in the JSON."""
    result = {"photo": "a.jpg", "mask": "a_mask.png", "overlay": "a_overlay.png", "found": [
        {"name": "sky", "share": 0.3}, {"name": "cow", "share": 0.696},
        {"name": "sea", "share": 0.004}]}
    assert in_words(result) == ("a.jpg: cow 70%, sky 30%, 1 classes below 1%; written: a_mask.png, "
                                "a_overlay.png, a.json")


def test_background_on_the_command_line(checkpoint, photo, tmp_path):
    """threshold:T puts a background before the classes, where no class scores more than T;
    prompt:... is what its words win over the classes. Mask, overlay and JSON know it by that name,
    and the value is in the JSON."""
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


def test_views_on_the_command_line(checkpoint, photo, tmp_path):
    """--view writes its pictures beside the mask and the JSON names them."""
    run(checkpoint, tmp_path, photo, "--classes", NAMES, "--view", "pca", "--view", "similarity")
    result = json.loads((tmp_path / "photo.json").read_text())
    assert Image.open(result["pca"]).height > 448
    assert Image.open(result["similarity"]).width >= 128


# --------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("arguments, words", [
    (["photo.png", "--classes", "cow,,sky"], ["--classes", "empty class name"]),
    (["photo.png", "--classes", "cow, Cow"], ["--classes", "duplicate class name 'cow'"]),
    (["photo.png", "--classes", "empty.txt"], ["empty.txt", "no class names"]),
    (["none.jpg"], ["no image none.jpg"]),
    (["cut.png"], ["cut.png is no readable image"]),
    (["photo.png", "--checkpoint", "none"], ["no checkpoint at", "train.py"]),
    (["photo.png", "--checkpoint", "photo.png"], ["photo.png is no SimZSS checkpoint"]),
    (["photo.png", "--templates", "poems"],
     ["no templates 'poems'", "imagenet80, photo, pixelclip, plain, simple7"]),
    (["photo.png", "--templates", "cow.txt"], ["cow.txt", "{} for the class name"]),
    (["photo.png", "--background", "prompt:sea, sky"],
     ["--background and --classes", "duplicate class name 'sky'"]),
    (["photo.png", "--background", "threshold:0", "--classes", "background, cow"],
     ["--background", "duplicate class name 'background'"]),
    (["photo.png", "--classes", "cow"], ["'cow' alone would fill every photo", "--background"]),
    (["photo.png", "--classes", "airplane bus sky"], ["commas between them, 'airplane, bus, sky'"]),
    (["photo.png", "--classes", "cow, dog/cat"], ["'dog/cat' is no class name", "commas"]),
    (["photo.png", "--classes", "classes/voc"], ["no class file classes/voc"]),
    (["photo.png", "--classes", "cow, b.jpg"], ["'b.jpg' is no class name"]),
    (["sofa", "photo.png", "--classes", "cat,"], ["no image sofa"]),
    (["photo.png", "--classes", "cat,"], ["ends with a comma", "need quotes"]),
    (["photo.png", "--background", "0.2"], ["background '0.2'", "threshold:T"]),
    (["photo.png", "--window", "8"], ["stride 32 is more than the window of 8"]),
    (["photo.png", "--set", "protocol.keep_classes=3"], ["simzss", "no setting 'keep_classes'"]),
    (["photo.png", "--set", "run.batch=3"], ["--set run", "protocol.NAME=VALUE"])])
def test_mistakes_end_with_one_line(checkpoint, tmp_path, monkeypatch, fails, arguments, words):
    """Wrong class names, photos, checkpoints, templates and windows end with one line that says
    what is wrong."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("photo.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "photo.png").read_bytes()[:60])
    (tmp_path / "empty.txt").touch()
    (tmp_path / "cow.txt").write_text("a cow")
    fails(segment.main, ["--checkpoint", checkpoint, "--classes", "cow, sky", *arguments], *words)


def test_without_a_model_train_first(tmp_path, monkeypatch, fails):
    """Without --checkpoint the newest model under runs/ is used, and where there is none the line
    says so."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("photo.jpg")
    fails(segment.main, ["photo.jpg", "--classes", "cow, sky"], "no trained model under runs/",
          "train.py", "--checkpoint")


def test_the_fields_own_protocol(tmp_path, model):
    """A model is by default used as the field does: short side and window 448, stride 224, 80
    templates; only that scores are propagated and windows fade towards their borders."""
    model.protocol = type(model.protocol)()
    save_model(tmp_path, model, {})
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 48)).save(photo)
    run(tmp_path, tmp_path, photo, "--classes", "cow, sky")
    protocol = json.loads((tmp_path / "photo.json").read_text())["protocol"]
    expected = {"templates": "imagenet80", "class_embedding": "caption", "short_side": 448,
                "window": 448, "stride": 224, "scales": [1], "refine_steps": 0, "propagate": 0.9,
                "image_weight": 0, "blend": "triangle", "background": None}
    assert protocol == expected


def test_flags_replace_the_checkpoints_protocol(tmp_path, model):
    """What training recorded replaces the defaults, and flags replace that."""
    model.protocol = dataclasses.replace(model.protocol, templates="plain", window=96, stride=48)
    save_model(tmp_path, model, {})
    arguments = ["photo", "--classes", "cow", "--checkpoint", str(tmp_path), "--stride", "32",
                 "--blend", "mean", "--scales", "1", "1.5", "--set",
                 "protocol.class_embedding=concept"]
    expected = dataclasses.replace(model.protocol, stride=32, scales=(1.0, 1.5), blend="mean",
                                   class_embedding="concept")
    assert open_model(segment.parse_args(arguments)).protocol == expected


def test_a_model_of_the_toy_world_segments_toy_scenes_only(tmp_path, model, fails):
    """A model that was trained on drawn scenes is refused on any picture but a PNG that
    `save_scene` wrote: on a photo, on the scene saved by other means, and on a photo beside a
    scene."""
    save_model(tmp_path, model, {"run": {"train_data": "toy"}})
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


def test_mistakes_are_found_before_a_model_is_made(checkpoint, tmp_path, monkeypatch, fails):
    """Wrong photos, words, backgrounds, templates and windows are found before any network is
    made."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("photo.png")
    monkeypatch.setattr(SimZSS, "__init__", None)   # no model can be made
    for arguments in (["none.jpg"], ["photo.png", "--classes", "a/b"],
                      ["photo.png", "--background", "low"], ["photo.png", "--window", "8"],
                      ["photo.png", "--templates", "poems"]):
        fails(segment.main, ["--checkpoint", checkpoint, "--classes", "cow, sky", *arguments])


@pytest.mark.parametrize("script, arguments, words", [
    (segment, ["a.jpg", "--classes", "cat,", "sofa"],
     ["unrecognized arguments: sofa", "quotes", '"cat, sofa"']),
    (segment, ["a.jpg"], ["arguments are required: --classes"]),
    (segment, ["a.jpg", "--classes", "cat, dog", "--view", "heat"], ["invalid choice: 'heat'"]),
    (eval, [], ["--dataset", "is required"]),
    (eval, ["--dataset", "imagenet"], ["no masks", "--task classification"]),
    (train, ["--epoch", "3"], ["unrecognized arguments: --epoch 3"]),
    (concepts, ["a.json", "--parsr", "match"], ["unrecognized arguments"])])
def test_wrong_flags_end_with_one_line(script, arguments, words, capsys, monkeypatch):
    """What argparse refuses is one line, without the usage before it."""
    monkeypatch.setattr("sys.argv", ["script", *arguments])
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert all(word in said for word in words), said
