"""Segment any photo with any words.

    python segment.py photo.jpg --classes "cat, sofa, potted plant"
    python segment.py photos/ --classes classes.txt --output masks

writes photo_mask.png (a class index per pixel, at the photo's own size), photo_overlay.png (with a
legend of the classes found) and photo.json. `segment_image` is the one way from a photo to a mask,
here and in eval.py: the photo is resized to a short side of 448; a window of 448 pixels slides over
it in steps of 224; in each window the method scores its patches for every class; the scores are
enlarged to pixels, averaged where windows overlap, and enlarged to the photo's size; the class with
the highest score wins.

(H, W) is the photo, (h, w) the resized photo; in other files (h, w) is the grid of patches.
"""
import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from machinery.scoring import pictures
from machinery.networks.checkpoint import load_model, write_text     # the two for use from Python
from machinery.names import check_classes, read_classes, read_templates, split_names
from machinery.errors import one_line_errors
from machinery.images import IMAGE_SUFFIXES, load_image, to_pixels
from machinery.scoring.pictures import count_pixels, row_bands
from machinery.scoring.protocol import add_model_flags, embed, open_model, refuse_toy_model, windows
from machinery.scoring.refine import refine

LONG_SIDE = 2048                                    # the usual bound, for very elongated images


# --------------------------------------------------------------------------------------------------
# From a photo to a mask

def resized_size(height, width, short_side, long_side=LONG_SIDE):
    """(height, width) by the benchmarks' usual rule: short side as asked for, long side at most
    long_side, rounded half up."""
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def enlarge(maps, height, width, first=0, last=None):
    """Resize maps (C, h, w) bilinearly to (C, height, width); return rows first..last, float32.

    All rows together are `F.interpolate(..., align_corners=False)` without anti-aliasing; a few
    rows at a time need little memory.
    """
    h = maps.shape[-2]
    last = height if last is None else last
    rows = torch.arange(first, last, device=maps.device)
    position = ((rows + 0.5) * (h / height) - 0.5).clamp(0, h - 1)
    top = int(position[0])                          # the rows of maps that are needed
    bottom = min(int(position[-1]) + 2, h)
    maps = F.interpolate(maps[None, :, top:bottom].float(), (bottom - top, width),
                         mode="bilinear")[0]
    distance = (position[:, None] - torch.arange(top, bottom, device=maps.device)).abs()
    return (1 - distance).clamp(min=0) @ maps                           # (C, last - first, width)


def resize(pixels, height, width):
    """uint8 (3, H, W) -> uint8 (3, height, width), bilinear without anti-aliasing.

    Benchmarks are resized so with OpenCV; about 12 % of its values differ, by one grey level.
    """
    if pixels.shape[-2:] == (height, width):
        return pixels
    bands = [enlarge(pixels, height, width, i, min(i + 32, height)) for i in range(0, height, 32)]
    return (torch.cat(bands, dim=1) + 0.5).floor().clamp(0, 255).to(torch.uint8)


def window_starts(length, window, stride):
    """Where windows begin along one axis; the last is shifted back to end with the image."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


class WindowBatch:
    """How many windows are computed at a time. Made once for many photos, it remembers what a
    GPU's memory could hold."""

    def __init__(self, size):
        self.size = size

    def halve(self):
        self.size //= 2
        tqdm.write(f"the GPU's memory is full; going on with {self.size} windows at a time "
                   "(--batch)", file=sys.stderr)


def slide(model, pixels, class_embeddings, window, stride, batch):
    """Score of every class at every pixel, averaged where windows overlap: (C, h, w).

    pixels: uint8 (3, h, w), the resized photo. batch: WindowBatch.
    """
    h, w = pixels.shape[-2:]
    corners = [(y, x) for y in window_starts(h, window, stride)
               for x in window_starts(w, window, stride)]
    total = torch.zeros(len(class_embeddings), h, w, device=pixels.device)          # (C, h, w)
    count = torch.zeros(h, w, device=pixels.device)
    while corners:
        now = corners[:batch.size]
        crops = torch.stack([pixels[:, y:y + window, x:x + window] for y, x in now])
        try:
            # (windows, C, rows, columns) of patches, and the pixels that they cover
            scores, covered = model.patch_scores(crops, class_embeddings)
        except torch.OutOfMemoryError:
            if batch.size == 1:
                raise
            batch.halve()
            continue
        ch, cw = crops.shape[-2:]
        for (y, x), of_window in zip(now, scores):
            of_window = F.interpolate(of_window[None], covered, mode="bilinear")[0]
            total[:, y:y + ch, x:x + cw] += of_window[:, :ch, :cw]          # padding is cut away
            count[y:y + ch, x:x + cw] += 1
        corners = corners[len(now):]
    return total.div_(count)


def score_maps(model, image, class_embeddings, window=448, stride=224, short_side=448, batch=8,
               scales=(1,), refine_steps=0):
    """Score of every class at every pixel of the resized photo: (C, h, w). Arguments: see
    `segment_image`."""
    batch = batch if isinstance(batch, WindowBatch) else WindowBatch(batch)
    if min(short_side, batch.size, *scales) <= 0 or not 0 < stride <= window or refine_steps < 0:
        raise ValueError(f"short_side {short_side}, scales {scales}, window {window}, stride "
                         f"{stride}, batch {batch.size}, refine_steps {refine_steps}: expected "
                         "positive numbers, and a stride of at most the window, or pixels would be "
                         "left out")
    photo = to_pixels(image)                                                        # (3, H, W)
    size = resized_size(*photo.shape[-2:], short_side)                              # (h, w)
    total = 0
    for scale in scales:
        scaled = resized_size(*photo.shape[-2:], scale * short_side, scale * LONG_SIDE)
        pixels = resize(photo, *scaled).to(class_embeddings.device)
        maps = slide(model, pixels, class_embeddings, window, stride, batch)
        if scaled != size:
            maps = F.interpolate(maps[None], size, mode="bilinear")[0]
        total = total + maps / len(scales)                                          # (C, h, w)
    if refine_steps:
        total = refine(total, resize(photo, *size).to(total.device), refine_steps)
    return total


@torch.no_grad()
def segment_image(model, image, class_embeddings, window=448, stride=224, short_side=448, batch=8,
                  scales=(1,), refine_steps=0):
    """Name every pixel of one photo.

    model: anything with `patch_scores`, like SimZSS. image: RGB PIL image or uint8 (H, W, 3) array.
    class_embeddings: (C, D) or (C, S, D). window, stride, short_side: pixels. batch: windows at a
    time, a number or a `WindowBatch`. scales: of the short side; scores are averaged over them.
    refine_steps: of `machinery.scoring.refine`, 0 = none. Returns (index mask (H, W), score (H, W)
    float32): the best class and its score, CPU tensors.
    """
    W, H = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    maps = score_maps(model, image, class_embeddings, window, stride, short_side, batch, scales,
                      refine_steps)
    score = torch.empty(H, W)
    mask = torch.empty(H, W, dtype=torch.uint8 if len(maps) <= 256 else torch.int16)
    for band in row_bands(H, len(maps) * W):        # never C x H x W at the photo's own size
        score[band], mask[band] = enlarge(maps, H, W, band.start, band.stop).max(dim=0)
    return mask, score


# --------------------------------------------------------------------------------------------------
# Background: what is none of the classes

def parse_background(text):
    """"none" -> ("none", None); "threshold:0.2" -> ("threshold", 0.2), likewise "own:0.9";
    "prompt:sky, wall" -> ("prompt", ["sky", "wall"]). Raises ValueError for anything else."""
    kind, _, value = text.partition(":")
    if kind == "none" and not value:
        return kind, None
    if kind in ("threshold", "own"):
        with contextlib.suppress(ValueError):
            threshold = float(value)
            if math.isfinite(threshold):
                return kind, threshold
    words = [word for word in split_names(value) if word]
    if kind == "prompt" and words:
        return kind, words
    raise ValueError(f"background {text!r}: expected none, threshold:T with a score T, such as a "
                     'cosine similarity, prompt:"word, word", or own:T, the method\'s own rule')


def put_background(mask, score, threshold, index=0):
    """Insert a class at index: pixels whose score is at most threshold become it; later classes
    move up by one."""
    mask = mask.to(torch.int16)
    return torch.where(score > threshold, mask + (mask >= index), index)


# --------------------------------------------------------------------------------------------------
# The command

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Segment photos with the classes that you name.")
    add = parser.add_argument
    add("photos", nargs="+", help="image files, or folders of them")
    add("--classes", required=True,
        help='names separated by commas, "cat, sofa", or a file with one class per line, synonyms '
             "after commas")
    add("--background", default="none",
        help="what is none of the classes: threshold:T = all pixels whose best score is at most T, "
             'prompt:"word, word" = what these words win; own:T = the rule of the method, if it '
             "has one; or none (default: %(default)s)")
    add("--view", action="append", default=[], choices=["similarity", "pca"],
        help="also draw a heat map per class, or patch tokens and classes in one space of colours; "
             "may be repeated")
    add("--output", default=".", help="folder to write to (default: the current one)")
    add_model_flags(parser)
    return parser.parse_args(argv)


def find_photos(names):
    """Files among names, and all images in the folders among them, sub-folders left out. Raises
    FileNotFoundError for a folder without images."""
    photos = []
    for name in names:
        found = [name]
        if os.path.isdir(name):
            found = sorted(str(file) for file in Path(name).iterdir()
                           if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise FileNotFoundError(f"no images in the folder {name}; expected "
                                    f"{', '.join(IMAGE_SUFFIXES)}")
        photos += found
    return photos


def class_names(classes, background):
    """(names of the rows of the class embeddings, names of the mask's values).

    background: "none", "prompt" (its words are the first class), "own" (the first row stands for
    it), or "threshold" (it has no row).
    """
    names = [synonyms[0] for synonyms in classes]
    if background == "none":
        return names, names
    if background == "prompt":
        names = names[1:]
    with_background = ["background", *names]
    return (names if background == "threshold" else with_background), with_background


def segment_file(model, protocol, photo, classes, embeddings, output, batch, views=()):
    """Segment one photo file and write its mask, overlay, views and JSON. Returns the JSON's
    content."""
    image = load_image(photo)
    kind, threshold = parse_background(protocol["background"])
    scored, names = class_names(classes, kind)
    settings = {**windows(protocol), "batch": batch}
    mask, score = segment_image(model, image, embeddings, **settings)
    stem = Path(output) / Path(photo).stem
    files = {"mask": f"{stem}_mask.png", "overlay": f"{stem}_overlay.png",
             **{view: f"{stem}_{view}.png" for view in views}}
    if "similarity" in views:
        maps = score_maps(model, image, embeddings, **settings).cpu().numpy()
        pictures.similarity_view(image, scored, maps).save(files["similarity"])
    if "pca" in views:
        size = model.trained_with.get("image_size", 224)

        def resized(pixels, scale):
            sides = resized_size(*pixels.shape[-2:], scale * size, scale * LONG_SIDE)
            return resize(pixels, *sides)

        pictures.pca_view(model, image, scored, embeddings, resized).save(files["pca"])
    if kind == "threshold":
        mask = put_background(mask, score, threshold)
    mask = mask.numpy()
    pixels = count_pixels(mask, len(names))
    total = count_pixels(mask, len(names), score.numpy())
    found = [{"index": i, "name": names[i], "share": round(pixels[i] / mask.size, 6),
              "colour": colour, "score": round(total[i] / pixels[i], 4)}
             for i, colour in enumerate(pictures.palette(len(names)).tolist()) if pixels[i] > 0]
    pictures.save_mask(files["mask"], mask, len(names))
    pictures.overlay(image, mask, names).save(files["overlay"])
    result = {"photo": str(photo), "width": image.width, "height": image.height, "names": names,
              "classes": classes, "found": found, **files, "protocol": protocol,
              "backbone": model.config().get("backbone")}
    write_text(f"{stem}.json", json.dumps(result, indent=1))
    return result


def main(argv=None):
    args = parse_args(argv)
    Image.MAX_IMAGE_PIXELS = None                   # photos are the user's own: size is no attack
    with one_line_errors("lower --window or --short-side"):
        if args.classes.endswith(".txt") or os.path.isfile(args.classes):
            classes = read_classes(args.classes)
        else:
            names = split_names(args.classes)
            classes = check_classes([[name] for name in names], "--classes")
        photos = find_photos(args.photos)
        if len({Path(photo).stem for photo in photos}) < len(photos):
            raise ValueError("two photos have the same name, so would their masks; segment them "
                             "into different --output folders")
        kind, words = parse_background(args.background)
        if kind != "none":
            check_classes([["background"], *classes], "--background and --classes")
        if kind == "prompt":
            classes = check_classes([words, *classes], "--background and --classes")
        model, protocol = open_model(args)
        refuse_toy_model(model, photos)
        protocol["background"] = args.background
        embeddings = embed(model, classes, protocol, background=0)
        Path(args.output).mkdir(parents=True, exist_ok=True)
        batch = WindowBatch(args.batch)
        for photo in tqdm(photos, unit=" photos", disable=len(photos) == 1 or None):
            result = segment_file(model, protocol, photo, classes, embeddings, args.output, batch,
                                  args.view)
            largest = sorted(result["found"], key=lambda found: -found["share"])
            tqdm.write(f"{result['overlay']}: " + ", ".join(
                f"{found['name']} {found['share']:.1%}" for found in largest))


if __name__ == "__main__":
    main()
