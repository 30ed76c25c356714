"""Images and masks from files of all kinds."""
import json
import math
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from machinery.parallel import rank

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
BESIDE_IMAGES = (".json", ".txt", ".partial")       # what lies beside images and is none
RESULTS = ("mask", "overlay", "similarity", "pca")  # segment.py writes NAME_mask.png and so on
Image.MAX_IMAGE_PIXELS = None                       # Pillow's bound; ours is `most_pixels`
IGNORE = -1                                         # value of a mask where nothing is scored
MAX_PIXELS = 2 ** 26                                # of a mask in run-length code: 67 megapixels
MAX_MASKS = 2 ** 32                                 # pixels of all masks of an image


class ScoredImages:
    """Images with known masks, to score on. Items: (name, RGB image, mask (H, W) int of classes or
    IGNORE). A dataset says what of this is different:"""
    name = ""
    classes = ()                # C lists of names
    background_class = None     # which of the classes is "background"; None = there is none
    background = "none"         # how it is predicted by default, see `segment.parse_background`
    count = None                # how many images there should be; None = any number
    files = ()                  # (name, image path, mask) of each; empty = they are drawn, not read
    choices = {}                # what the user chose about the data, for the result


def is_hidden(path):
    """Whether a name in a path, of which the data's own folder is no part, begins with a dot: what
    systems and tools put beside the data, such as macOS's ._NAME.jpg or .ipynb_checkpoints."""
    return any(name.startswith(".") and name not in (".", "..") for name in Path(path).parts)


def list_images(folder, below=False):
    """Paths of the images in a folder, sorted; with below also of those in folders inside.

    Left out in silence: hidden files, and the files that often lie beside images. Other files, and
    results of segment.py beside their image or JSON, are counted on stderr.
    """
    folder = Path(folder)
    files = [file for file in (folder.rglob("*") if below else folder.iterdir())
             if not is_hidden(file.relative_to(folder))]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    stems = {file.with_suffix("") for file in files}
    results = {file for file in images for part in RESULTS if file.name.endswith(f"_{part}.png")
               and file.with_name(file.name.removesuffix(f"_{part}.png")) in stems}
    others = Counter(f"*{file.suffix}" for file in files
                     if file.suffix and file.suffix.lower() not in (*IMAGE_SUFFIXES, *BESIDE_IMAGES)
                     and file.is_file())
    others += Counter({"results of segment.py": len(results)})
    if others:
        say(f"left out in {folder}: " + ", ".join(f"{n} {what}" for what, n in others.items())
            + f"; expected {', '.join(IMAGE_SUFFIXES)}")
    return sorted(file for file in images if file not in results)


def say(line):
    """Print a line about the data on stderr, once for all processes."""
    if rank() == 0:
        print(line, file=sys.stderr)


def load_image(path, least=None, most_pixels=None):
    """Any photo as an upright 8-bit RGB image.

    Grey, palette, alpha (over white), 16-bit, CMYK and EXIF-rotated photos work. path: file name or
    open file. least: pixels that each side needs; a JPEG may be decoded at 1/2, 1/4 or 1/8 of its
    size if that leaves as many. most_pixels: bound on width x height of what is decoded.
    """
    try:
        # Without the warnings of broken EXIF data and huge sizes
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if least:
                image.draft(None, (least, least))
            if most_pixels and image.width * image.height > most_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels, at most {most_pixels:,} "
                                 "are decoded here")
            ImageOps.exif_transpose(image, in_place=True)       # reads the pixels, too
            return to_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {path}") from None
    except Exception as error:                      # Pillow raises almost anything on a broken file
        raise ValueError(f"{path} is no readable image ({error})") from None


def to_rgb(image):
    """A PIL image of any mode as RGB."""
    if image.mode.startswith("I") or image.mode == "F":     # 16-bit grey: the high byte
        grey = np.nan_to_num(np.asarray(image)).clip(0, 65535) // 256
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")       # convert copies always


def to_image(photo):
    """A photo as an RGB PIL image: a file's name, a PIL image, or an array (H, W), (H, W, 3) or
    (H, W, 4) of uint8 in 0..255 or of floats in 0..1. Raises ValueError for anything else."""
    if isinstance(photo, (str, Path)):
        return load_image(photo)
    if isinstance(photo, Image.Image):
        photo = ImageOps.exif_transpose(photo)
    else:
        array = np.asarray(photo)
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[:, :, 0]
        if array.ndim not in (2, 3) or array.ndim == 3 and array.shape[2] not in (3, 4):
            raise ValueError(f"a photo of shape {array.shape}; expected (height, width), with 3 or "
                             "4 channels behind, if any")
        if array.dtype.kind == "f" and array.size and 0 <= array.min() and array.max() <= 1:
            array = (255 * array + 0.5).astype(np.uint8)
        if array.dtype != np.uint8 or not array.size:
            values = f" in {array.min()}..{array.max()}" if array.size else ""
            raise ValueError(f"a photo of {array.dtype} numbers{values}; expected uint8 in 0..255, "
                             "or floats in 0..1")
        photo = Image.fromarray(array)
    return to_rgb(photo)


def to_pixels(image):
    """PIL image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_mask(mask):
    """Values of a mask (H, W) int32; palette indices are kept.

    mask: path, or (size, [(value, run-length code)]).
    """
    if isinstance(mask, tuple):
        size, codes = mask
        pixels = np.zeros(size, np.int32)
        for value, counts in codes:                 # in the order of the file, later ones on top
            if not 0 <= value < 2 ** 16:
                raise ValueError(f"a mask holds the value {value}, expected 0 to 65535")
            pixels[decode_runs(size, counts)] = value
        return pixels
    if not mask.is_file():
        raise FileNotFoundError(f"no mask {mask}")
    try:
        with Image.open(mask) as file:
            form = file.format
            pixels = np.array(file).astype(np.int32)        # not converted, so that indices stay
    except Exception as error:                      # Pillow raises almost anything on a broken file
        raise ValueError(f"{mask} is no readable mask ({error})") from None
    if form != "PNG":                               # others change values, or may
        raise ValueError(f"{mask} is a {form}, which may change values; expected a PNG")
    if pixels.ndim != 2:
        raise ValueError(f"{mask} has {pixels.shape[-1]} channels, expected one value per pixel; "
                         "it holds the colours of a palette in place of class values")
    return pixels


def read_segments(path):
    """Masks of one image, (H, W) bool arrays, one after another, from a JSON in SA-1B's format.

    {"annotations": [{"segmentation": {"size": [H, W], "counts": run-length code}}, ...]}, or the
    inner list alone, which Segment Anything's amg.py writes.
    """
    try:
        content = json.loads(path.read_text())
        annotations = content if isinstance(content, list) else content["annotations"]
        codes = [annotation["segmentation"] for annotation in annotations]
        if sum(math.prod(code["size"]) for code in codes) > MAX_MASKS:
            raise ValueError(f"more than {MAX_MASKS:,} pixels")
        for code in codes:
            yield decode_runs(code["size"], code["counts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} holds no masks in SA-1B's format, expected a JSON with "
                         f"annotations of run-length codes ({error!r})") from None


def refuse_other_shape(path, mask, image):
    """Raise ValueError unless a mask (H, W) of a file has the shape of its PIL image. Only the
    ratio counts: a JPEG may come reduced."""
    h, w = mask.shape
    if abs(image.width * h - image.height * w) > 2 * max(h, w):
        raise ValueError(f"{path} is {w} x {h}, its image {image.width} x {image.height}: not of "
                         "the same shape")


def decode_runs(size, counts):
    """COCO's run-length code -> bool mask of size (H, W).

    counts: runs of 0 and 1, which alternate, column by column; or their compressed form, a text.
    """
    H, W = size
    if type(H) is not int or type(W) is not int or not (0 < H and 0 < W and H * W <= MAX_PIXELS):
        raise ValueError(f"a mask of {H} x {W} pixels, expected 1 to {MAX_PIXELS:,}")
    if len(counts) > 8 * (H * W + 1):               # characters: a run has fewer
        raise ValueError(f"a run-length code of length {len(counts)} for {H} x {W} pixels")
    runs = decompress(counts) if isinstance(counts, str) else counts
    if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != H * W:
        raise ValueError(f"a run-length code does not cover the pixels, expected {H} x {W}")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(W, H).T


def decompress(counts):
    """Runs of a compressed run-length code. A run is written five bits a character, lowest first,
    with bit 32 for "another character follows"; from the fourth run on it is the difference from
    the run two before."""
    runs = []
    number = 0
    shift = 0
    for character in counts.encode():
        bits = character - 48
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (1 << shift) * (bits >> 4 & 1)    # bit 16 of the last is the sign
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = 0
            shift = 0
        if shift > 60:
            raise ValueError("a run-length code with a run beyond all bounds")
    return runs
