"""Pictures: legends in any letters, grey for what is not scored, one range of colours, bounded
memory; and folders of one's own data that are not quite right."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import eval
import segment
from machinery.scoring import pictures
from machinery.scoring.benchmarks import IGNORE, open_dataset, open_folder
from machinery.scoring.check import check, check_warnings
from machinery.names import read_labels
from machinery.scoring.pictures import (NOT_SCORED, comparison, has_letters, legend, lettering, overlay,
                                palette, plain, similarity_view)


@pytest.fixture(autouse=True)
def fresh_fonts():
    pictures.find_font.cache_clear()


# --------------------------------------------------------------------------------------------------
# Letters

def system_font(letters):
    """A font of this system that has the letters, or None."""
    for name in pictures.FONTS:
        try:
            if has_letters(ImageFont.truetype(name, 12), letters):
                return name
        except OSError:
            continue
    return None


def test_a_font_that_lacks_a_letter_is_noticed():
    """Pillow's own font has the letters of English and a box for Chinese."""
    font = ImageFont.load_default(size=12)
    assert has_letters(font, "potted plant") and not has_letters(font, "猫")


@pytest.mark.parametrize("name, written", [
    ("straße", "strasse"), ("Bäume", "Baume"), ("éléphant", "elephant"), ("niño", "nino"),
    ("smørbrød", "smorbrod"), ("łódź", "lodz"), ("猫 cat", "? cat"), ("café ☕", "cafe ?")])
def test_plain_letters(name, written):
    """Without a font that has them, letters lose their accents; what has no such form is a "?"."""
    assert plain(name) == written


def test_names_in_a_font_of_the_system(monkeypatch, capsys):
    """Names with other letters are written in the first font of the system that has them all, and
    it is named; without one they are written in plain letters, and that is said."""
    names = ["猫", "sofa"]
    fonts = SimpleNamespace(load_default=lambda size: "default", truetype=lambda name, size: name)
    monkeypatch.setattr(pictures, "ImageFont", fonts)
    monkeypatch.setattr(pictures, "has_letters", lambda font, text: font != "default")
    assert lettering(names, 14) == (pictures.FONTS[0], names)
    assert f"written in the font {pictures.FONTS[0]}" in capsys.readouterr().err

    pictures.find_font.cache_clear()

    def missing(name, size):
        raise OSError
    fonts.truetype = missing
    assert lettering(names, 14) == ("default", ["?", "sofa"])
    assert "plain letters" in capsys.readouterr().err


def test_a_legend_in_letters_of_the_system():
    """Where a font of the system has the letters, the legend is not drawn in boxes."""
    if system_font("äéñß") is None:
        pytest.skip("no font of this system has ä, é, ñ and ß")
    accents = legend([((0, 0, 0), "äéñß")], 40, 20)
    boxes = Image.new("RGB", accents.size, "white")
    draw = ImageDraw.Draw(boxes)
    draw.rectangle((10, 10, 30, 30), fill=(0, 0, 0), outline="black")
    draw.text((40, 20), "\U0010ffff" * 4, fill="black", font=ImageFont.load_default(size=20),
              anchor="lm")
    assert (np.array(accents) != np.array(boxes)).any()


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


def test_similarity_maps_share_one_range():
    """A class that is nowhere similar stays dark beside one that is."""
    maps = np.stack([np.full((300, 300), 0.1), np.full((300, 300), 0.5)])
    maps[1, :150] = 0.3
    view = np.array(similarity_view(Image.new("RGB", (300, 300)), ["absent", "present"], maps))
    panels = [view[24 + 50, 300 * i + 50].astype(int) for i in (1, 2)]
    bottom = view[24 + 250, 650].astype(int)
    assert panels[0].sum() < panels[1].sum() < bottom.sum()


def test_an_overlay_names_every_class_found():
    """An overlay's legend has all classes of the mask, slivers too: it is about one photo."""
    mask = np.zeros((100, 100), int)
    mask[0, 0] = 1
    picture = overlay(Image.new("RGB", (100, 100)), mask, ["sky", "bird"])
    key = np.array(picture)[:, 100:].reshape(-1, 3)
    assert all((key == colour).all(axis=1).any() for colour in palette(2))


def test_the_pca_view_needs_little_memory(model):
    """However large the photo is drawn, the model sees no more of it than a tile at a time, and
    each pixel exactly once for each of the two projections of the first size."""
    seen = []
    scores = model.patch_scores

    def counting(pixels, directions):
        seen.append((pixels.shape[-2:].numel(), directions.shape[0]))
        return scores(pixels, directions)

    model.patch_scores = counting
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    words = torch.nn.functional.normalize(torch.randn(3, 1, model.backbone.width), dim=-1)

    def resized(pixels, scale):
        size = segment.resized_size(*pixels.shape[-2:], scale * 32, scale * 2048)
        return segment.resize(pixels, *size)

    pictures.pca_view(model, photo, ["a", "b", "c"], words, resized, tile=40)
    assert max(area for area, _ in seen) == 40 * 40
    assert sum(area for area, _ in seen) == 32 * 48 * (1 + 1 + 4 + 16 + 64)


# --------------------------------------------------------------------------------------------------
# Folders that are not quite right

def write_folder(folder, masks, names="background\ncat\nsofa\n", encoding="utf-8"):
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text(names, encoding=encoding)
    for i, mask in enumerate(masks):
        mask = np.array(mask, np.uint8)
        Image.new("RGB", mask.shape[::-1]).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder


def test_the_value_after_the_last_class(tmp_path):
    """One value too many, right after the last class, is most likely "not labelled": the advice is
    --ignore with that value, not a shift."""
    dataset = open_folder(write_folder(tmp_path, [[[0, 1], [2, 3]]]))
    problems, _ = check(dataset)
    assert len(problems) == 1 and "pass --ignore 3" in problems[0]
    assert "shifted" not in problems[0]
    problems, _ = check(open_folder(tmp_path, ignore=(3,)))
    assert problems == []


def test_a_single_colon_is_what_is_named(tmp_path):
    """Of lines without a label and one with a colon, the one with the colon is quoted."""
    path = tmp_path / "classes.txt"
    path.write_text("cat\ndog: big\nsofa\n")
    with pytest.raises(ValueError, match="1 lines have a colon.*2 have none.*look at 'dog: big'"):
        read_labels(path)
    path.write_text("0: cat\ndog\n2: sofa\n")
    with pytest.raises(ValueError, match="2 lines have a colon.*1 have none.*look at 'dog'"):
        read_labels(path)


def test_leaving_out_an_unknown_class_lists_the_known(tmp_path):
    """--without of a class that is not there names those that are."""
    write_folder(tmp_path, [[[0, 1]]])
    with pytest.raises(ValueError, match="no class 'dog' to leave out; it has background, cat, so"):
        open_dataset(str(tmp_path), without=["dog"])


@pytest.mark.parametrize("name", ["0.jpg", "0.tif", "0_mask.png"])
def test_a_mask_of_another_suffix_is_named(tmp_path, name):
    """A mask that is there under another name or suffix is named."""
    write_folder(tmp_path, [[[0, 1]]])
    (tmp_path / "masks" / "0.png").rename(tmp_path / "masks" / name)
    with pytest.raises(FileNotFoundError, match=f"no mask .*0.png, but {name} is there"):
        open_folder(tmp_path)


def test_masks_of_0_and_255(tmp_path, capsys, checkpoint):
    """Two classes with masks of 0 and 255: the second is ignored everywhere, which is warned of
    with its name, and so is a dataset that is nearly all ignored."""
    mask = np.full((20, 20), 255)
    mask[0, 0] = 0
    dataset = open_folder(write_folder(tmp_path, [mask], "cat\nsofa\n"))
    _, pixels = check(dataset)
    warnings = check_warnings(dataset, pixels)
    assert "no mask of" in warnings[0] and "sofa" in warnings[0]
    assert "100% of the pixels" in warnings[1] and "--ignore" in warnings[1]
    eval.main(["--dataset", str(tmp_path), "--check"])
    assert capsys.readouterr().err.count("warning: ") == 2


def test_two_images_of_one_mask(tmp_path):
    """Two images of one name would be scored against one mask; that is refused."""
    write_folder(tmp_path, [[[0, 1]]])
    shutil.copy(tmp_path / "images" / "0.png", tmp_path / "images" / "0.JPG")
    with pytest.raises(ValueError, match="two images called 0"):
        open_folder(tmp_path)


def test_images_in_sub_folders(tmp_path):
    """Images in sub-folders are not passed over in silence."""
    write_folder(tmp_path, [[[0, 1]], [[0, 1]]])
    (tmp_path / "images" / "more").mkdir()
    (tmp_path / "images" / "1.png").rename(tmp_path / "images" / "more" / "1.png")
    with pytest.raises(ValueError, match="1 images lie in sub-folders.*more/1.png; move them up"):
        open_folder(tmp_path)


@pytest.mark.parametrize("names", ["0: café\n1: sofa\n", "café\nsofa\n"])
def test_class_names_in_another_encoding(tmp_path, names):
    """A classes.txt in Latin-1 is refused with labels as without; names would be broken."""
    write_folder(tmp_path, [[[0, 1]]], names, "latin-1")
    with pytest.raises(ValueError, match="classes.txt is no UTF-8 text.*saved as UTF-8"):
        open_folder(tmp_path)


def test_a_comment_in_the_class_file(tmp_path):
    """A comment in the first line would move all labels by one; it is refused."""
    write_folder(tmp_path, [[[0, 1]]], "# my classes\ncat\nsofa\n")
    with pytest.raises(ValueError, match="begins with '# my classes'; comments would count"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["Background", "BACKGROUND", "background"])
def test_the_background_in_any_case(tmp_path, name):
    """The class "background" is known in any case, as names are compared everywhere."""
    dataset = open_folder(write_folder(tmp_path, [[[0, 1]]], f"{name}\ncat\n"))
    assert dataset.background_class == 0 and dataset.background == f"prompt:{name}"
    left = open_folder(tmp_path, without=["Background"])
    assert left.classes == [["cat"]] and left.background_class is None


def test_results_do_not_overwrite_each_other(tmp_path, checkpoint, fails, monkeypatch):
    """The name of a result tells what was left out, and another folder of the same name needs
    another --output, also where both are named from where they lie."""
    a, b = (write_folder(tmp_path / part / "data", [[[0, 1], [2, 1]]]) for part in ("a", "b"))
    out = tmp_path / "out"
    run = ["--checkpoint", str(checkpoint), "--output", str(out), "--device", "cpu"]
    eval.main(["--dataset", str(a), "--background", "threshold:0.1", *run])
    eval.main(["--dataset", str(a), "--without", "background", *run])
    assert sorted(path.name for path in out.iterdir()) == ["eval_data.json",
                                                           "eval_data_without_background.json"]
    fails(eval.main, ["--dataset", b, "--background", "threshold:0.1", *run],
          "eval_data.json holds the result of", a, "--output")
    assert json.loads((out / "eval_data.json").read_text())["dataset"] == str(a)
    monkeypatch.chdir(b.parent)
    fails(eval.main, ["--dataset", "data", "--background", "threshold:0.1", *run],
          "eval_data.json holds the result of", a, "--output")
    monkeypatch.chdir(a.parent)
    eval.main(["--dataset", "data", "--background", "threshold:0.1", *run])


def test_the_default_background_is_told(capsys):
    """What stands for the background of a folder by default is said in --help."""
    with pytest.raises(SystemExit):
        eval.main(["--help"])
    assert "of a folder with a class background the names in its own line" in " ".join(
        capsys.readouterr().out.split())


def test_segmenting_names_a_font(tmp_path, checkpoint, folder):
    """segment.py draws a legend for names in other letters without failing."""
    segment.main([str(folder / "images" / "photo0.png"), "--classes", "Bäume, 猫, 🐈",
                  "--checkpoint", str(checkpoint), "--output", str(tmp_path)])
    assert json.loads((tmp_path / "photo0.json").read_text())["names"] == ["Bäume", "猫", "🐈"]
    assert torch.is_tensor(torch.tensor(np.array(Image.open(tmp_path / "photo0_overlay.png"))))
