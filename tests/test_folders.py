"""Folders of one's own data: what is read, what is refused, and the check of their masks."""
import numpy as np
import pytest
from PIL import Image

from conftest import noise
from machinery.images import IGNORE
from machinery.scoring.benchmarks import open_folder
from machinery.scoring.check import check

MASK = np.array([[0, 1, 2, 255], [2, 2, 1, 0]], np.uint8)


@pytest.fixture
def scored(tmp_path):
    """A segmentation folder: a photo of 4 x 2 pixels and its mask."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    (tmp_path / "classes.txt").write_text("background\ndog, puppy\ncat\n")
    Image.fromarray(noise(0, 2, 4)).save(tmp_path / "images" / "a.PNG")
    Image.fromarray(MASK).save(tmp_path / "masks" / "a.png")
    return tmp_path


def test_folder(scored):
    """Masks come with the photo's name and pixels; values are lines of classes.txt, 255 is ignored;
    files that are no images, and hidden ones, are left out."""
    for name in ("notes.txt", "._a.png", ".hidden.png"):
        (scored / "images" / name).touch()
    dataset = open_folder(scored)
    ((name, image, mask),) = dataset
    assert name == "a" and len(dataset) == 1
    assert dataset.classes == [["background"], ["dog", "puppy"], ["cat"]]
    assert (np.array(image) == noise(0, 2, 4)).all()
    assert mask.tolist() == [[0, 1, 2, IGNORE], [2, 2, 1, 0]]


def test_what_is_left_out_of_a_folder_is_said(scored, capsys):
    """Photos of other kinds, results of segment.py and masks without an image are not read, and
    counted; hidden files are not spoken of."""
    for name in ("images/b.heic", "images/c.jfif", "images/a_mask.png", "images/._b.heic",
                 "masks/b.png", "masks/._a.png"):
        (scored / name).touch()
    assert len(open_folder(scored)) == 1
    left, alone = capsys.readouterr().err.splitlines()
    for words in ("1 *.heic", "1 *.jfif", "1 results of segment.py"):
        assert words in left
    assert alone.startswith("1 masks") and alone.endswith("for example b.png")


def test_folder_without_classes(scored):
    """Classes left out become ignored, and the others are numbered anew; 255 stays ignored."""
    dataset = open_folder(scored, without=["dog"])
    assert dataset.classes == [["background"], ["cat"]] and dataset.background_class == 0
    assert dataset[0][2].tolist() == [[0, IGNORE, 1, IGNORE], [1, 1, IGNORE, 0]]


def test_folder_with_other_names(scored):
    """Names from another file prompt for the same classes: masks stay, classes are left out by
    their own names, and the background is still the background."""
    (scored / "names.txt").write_text("something else\nhound\nkitten, tomcat\n")
    dataset = open_folder(scored, scored / "names.txt", ["background"])
    assert dataset.classes == [["hound"], ["kitten", "tomcat"]] and dataset.background == "none"
    assert dataset[0][2].tolist() == [[-1, 0, 1, -1], [1, 1, 0, -1]]
    dataset = open_folder(scored, scored / "names.txt")
    assert dataset.background_class == 0 and dataset.background == "prompt:something else"


@pytest.mark.parametrize("classes, ignore, values", [
    ("0: background\n1: dog\n2: cat\n", [255], MASK),
    ("7: road\n300: sky, clouds\n65535: sea\n", [0, 9],
     [[7, 300, 65535, 9], [65535, 65535, 300, 7]]),
    ("255:road\n0:sky\n9:sea\n", [], [[255, 0, 9, 9], [9, 9, 0, 255]])])
def test_folder_with_any_values(scored, classes, ignore, values):
    """Masks may hold any values up to 65535, written before the names, and any may be ignored, or
    none; 255 may be a class, too."""
    (scored / "classes.txt").write_text(classes)
    values = np.array(values)
    Image.fromarray(values.astype(np.uint16)).save(scored / "masks" / "a.png")
    dataset = open_folder(scored, ignore=ignore)
    expected = np.where(np.isin(values, ignore), IGNORE, [[0, 1, 2, 2], [2, 2, 1, 0]])
    assert dataset[0][2].tolist() == expected.tolist() and check(dataset)[0] == []


def test_palettes_and_single_bits(scored):
    """A palette mask's values are its indices, not its colours; a mask of one bit per pixel has the
    values 0 and 1."""
    path = scored / "masks" / "a.png"
    mask = Image.fromarray(MASK)
    mask.putpalette([255 - i // 3 for i in range(768)])
    mask.save(path)
    expected = np.where(MASK == 255, IGNORE, MASK.astype(int))
    assert Image.open(path).mode == "P" and (open_folder(scored)[0][2] == expected).all()
    Image.fromarray(MASK == 1).save(path)
    assert Image.open(path).mode == "1" and (open_folder(scored)[0][2] == (MASK == 1)).all()


@pytest.mark.parametrize("mask, message", [
    (MASK[:, :3], r"the mask of .*a\.PNG has another size, or values that are no class"),
    (MASK + (MASK == 1).astype(np.uint8) * 2, r"values that are no class; run eval\.py --check"),
    (np.stack([MASK] * 3, 2), r"a\.png has 3 channels, expected one value per pixel")])
def test_wrong_mask(scored, mask, message):
    """A mask of another size, in colour, or with values that are no class is refused also where it
    is read."""
    Image.fromarray(np.ascontiguousarray(mask)).save(scored / "masks" / "a.png")
    with pytest.raises(ValueError, match=message):
        open_folder(scored)[0]


@pytest.mark.parametrize("part", ["images", "masks"])
def test_cut_short(scored, part):
    """An image or mask that is cut short is refused by name, by the check and where it is read."""
    (path,) = (scored / part).iterdir()
    path.write_bytes(path.read_bytes()[:40])
    dataset = open_folder(scored)
    (problem,), _ = check(dataset)
    assert f"{part}/{path.name}" in problem
    with pytest.raises(ValueError, match=rf"{part}/{path.name}"):
        dataset[0]


def moved(part, to="elsewhere"):
    return lambda folder: (folder / part).rename(folder / to)


def classes(text):
    return lambda folder: (folder / "classes.txt").write_bytes(text.encode("latin-1"))


@pytest.mark.parametrize("spoil, message", [
    (moved("images"),
     r"no folder .*images; a segmentation folder holds images/, masks/ \(PNG, value = class\)"),
    (moved("images/a.PNG"), r"no images in .*images"),
    (moved("classes.txt"), r"classes\.txt: expected a text file with one class name per line"),
    (classes("a\nb\na"), r"classes\.txt: duplicate class name 'a'"),
    (classes("1: a\n2: b\n3: a"), r"classes\.txt: duplicate class name 'a'"),
    (classes("1: a\n1: b"), r"classes\.txt: the label '1' is there twice"),
    (classes("1: a\nb"), r"some lines begin with a label, .* and some, such as 'b', do not"),
    (classes("road: a\nsky: b"),
     r"classes\.txt: what stands before a colon must be a mask value, 0 to 65535"),
    (classes("65536: a"), r"classes\.txt: what stands before a colon must be a mask value"),
    (classes("0: a\n255: b"), "the value 255 is a class and ignored; name other values"),
    (classes("caf\xe9"), r"classes\.txt is no UTF-8 text.*saved as UTF-8")])
def test_folders_that_are_none(scored, spoil, message):
    """What is missing from a segmentation folder or is wrong in its classes.txt is named."""
    spoil(scored)
    with pytest.raises((ValueError, OSError), match=message):
        open_folder(scored)


def test_the_background_in_any_case(scored):
    """The class "background" is known in any case, as names are compared everywhere."""
    (scored / "classes.txt").write_text("Background\ndog\ncat\n")
    dataset = open_folder(scored)
    assert dataset.background_class == 0 and dataset.background == "prompt:Background"
    left = open_folder(scored, without=["background"])
    assert left.classes == [["dog"], ["cat"]] and left.background_class is None


# --------------------------------------------------------------------------------------------------
# The check of masks

def test_a_value_that_is_no_class(scored):
    """A value that is no class is named with its file, what is expected, and --ignore, which is
    what most likely is missing."""
    path = scored / "masks" / "a.png"
    Image.fromarray(np.where(MASK == 0, 3, MASK).astype(np.uint8)).save(path)
    problems, _ = check(open_folder(scored))
    assert problems == [f"value 3 (in the mask of {scored / 'images' / 'a.PNG'}) cannot occur in "
                        f"masks by {scored}/classes.txt; expected 0, 1, 2, 255; name values that "
                        "are not scored with --ignore"]
    assert check(open_folder(scored, ignore=(3, 255)))[0] == []


@pytest.mark.parametrize("form, values", [
    ("JPEG", MASK), ("WEBP", np.stack([MASK] * 3, 2)), ("TIFF", MASK.astype(np.int32) + 70000)])
def test_a_mask_that_is_no_png(scored, form, values):
    """A mask that was stored in a form that may change values, or holds values beyond 65535, is
    refused whatever it is called."""
    path = scored / "masks" / "a.png"
    Image.fromarray(values).save(path, format=form)
    (problem,), _ = check(open_folder(scored))
    assert f"{path} is a {form}, which may change values; expected a PNG" in problem


def test_a_turned_photo_with_a_mask_that_is_not(scored):
    """Where the sizes differ because EXIF data turns the photo, the check says so."""
    path = scored / "images" / "a.PNG"
    turned = Image.Exif()
    turned[274] = 6                                 # "turn me clockwise"
    Image.open(path).save(path, format="PNG", exif=turned)
    (problem,), _ = check(open_folder(scored))
    assert "expected the same size" in problem and "EXIF" in problem
