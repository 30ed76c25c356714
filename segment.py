"""Segment any photo with any words.

    python segment.py photo.jpg --classes "cat, sofa, potted plant"
    python segment.py photos/ --classes classes.txt --output masks

writes photo_mask.png (a class index per pixel, at the photo's own size), photo_overlay.png (with a
legend of the classes found) and photo.json. From Python, the same mask:

    from segment import segment
    mask, names, score = segment("photo.jpg", ["cat", "sofa", "potted plant"], "runs/simzss")

From another folder: PYTHONPATH=/where/this/is python yours.py.

`segment_image` is the one way from a photo to a mask, here and in eval.py: the photo is resized to
a short side of 448; a window of 448 pixels slides over it in steps of 224; in each window the
method scores its patches for every class; the scores are enlarged to pixels, averaged where windows
overlap, and enlarged to the photo's size; the class with the highest score wins.

(H, W) is the photo, (h, w) the resized photo; in other files (h, w) is the grid of patches.
"""
import contextlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from machinery.contract import Protocol
from machinery.errors import CommandLine, one_line_errors
from machinery.files import remove_partial, write_text
from machinery.images import IMAGE_SUFFIXES, list_images, load_image, to_image, to_pixels
from machinery.names import check_classes, name_classes, split_names
from machinery.networks.checkpoint import load_model, save_model    # for use from Python
from machinery.parallel import progress
from machinery.scoring import pictures
from machinery.scoring.protocol import (PHOTO_PROTOCOL, add_model_flags, embed, has_unit_tokens,
                                        open_model, prepare_model, refuse_toy_model, training_run,
                                        use_for_photos)
from machinery.scoring.propagate import propagate_windows
from machinery.scoring.refine import refine
from machinery.scoring.results import made_with
from machinery.settings import as_mapping, given, read
from model import best_synonym

LONG_SIDE = 2048                                    # the usual bound, for very elongated images
PCA_SIZES = (1, 2, 4)                               # of --view pca, times the training images'


# --------------------------------------------------------------------------------------------------
# From a photo to a mask

def resized_size(height, width, short_side, long_side=LONG_SIDE):
    """(height, width) by the benchmarks' usual rule: a short side as asked for, a long side of at
    most long_side, rounded half up."""
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize(pixels, short_side, scale=1):
    """uint8 (3, H, W) -> uint8 (3, h, w) by `resized_size`, bilinear without anti-aliasing.

    scale: of short side and long side. About 12 % of the values differ from OpenCV's, by one grey
    level.
    """
    size = resized_size(*pixels.shape[-2:], scale * short_side, scale * LONG_SIDE)
    if pixels.shape[-2:] == size:
        return pixels
    resized = F.interpolate(pixels[None].float(), size, mode="bilinear")[0]
    return (resized + 0.5).floor().clamp(0, 255).to(torch.uint8)


def window_starts(length, window, stride):
    """Where windows begin along one axis; the last is shifted back to end with the image."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def slide(model, pixels, class_embeddings, protocol, batch):
    """Score of every class at every pixel, averaged where windows overlap: (C, h, w).

    pixels: uint8 (3, h, w), the resized photo. batch: windows at a time.
    """
    h, w = pixels.shape[-2:]
    window = protocol.window
    corners = [(y, x) for y in window_starts(h, window, protocol.stride)
               for x in window_starts(w, window, protocol.stride)]
    total = torch.zeros(len(class_embeddings), h, w, device=pixels.device)          # (C, h, w)
    count = torch.zeros(h, w, device=pixels.device)
    ch = min(h, window)
    cw = min(w, window)
    weight = torch.ones(ch, cw, device=pixels.device)
    if protocol.blend == "triangle":
        weight = triangle(ch)[:, None].to(weight) * triangle(cw).to(weight)
    scored = propagated_windows if protocol.propagate else scored_windows
    for (y, x), of_window, covered in scored(model, pixels, class_embeddings, corners, protocol,
                                             batch):
        of_window = F.interpolate(of_window[None], covered, mode="bilinear")[0]
        total[:, y:y + ch, x:x + cw] += of_window[:, :ch, :cw] * weight     # padding is cut away
        count[y:y + ch, x:x + cw] += weight
    return total.div_(count)


def triangle(length):
    """Weights (length,) that rise evenly from both ends to the middle."""
    rising = torch.arange(length) + 0.5
    return torch.minimum(rising, rising.flip(0))


def window_batches(pixels, corners, window, batch):
    """(corners, pixels uint8 (B, 3, height, width)) of up to `batch` windows at a time."""
    for first in range(0, len(corners), batch):
        now = corners[first:first + batch]
        yield now, torch.stack([pixels[:, y:y + window, x:x + window] for y, x in now])


def scored_windows(model, pixels, class_embeddings, corners, protocol, batch):
    """Corner, scores (C, rows, columns) of patches, and the pixels that they cover, of each window.
    """
    for now, crops in window_batches(pixels, corners, protocol.window, batch):
        scores, covered = model.patch_scores(crops, class_embeddings)
        for corner, of_window in zip(now, scores):
            yield corner, of_window, covered


def propagated_windows(model, pixels, class_embeddings, corners, protocol, batch):
    """`scored_windows`, with scores propagated over the patches of all windows."""
    tokens = []
    for _, crops in window_batches(pixels, corners, protocol.window, batch):
        of_batch, covered = model.unit_tokens(crops)
        tokens.append(of_batch)
    tokens = torch.cat(tokens)                                  # (windows, rows, columns, D)
    scores = propagate_windows(tokens, best_synonym(tokens, class_embeddings), corners, covered,
                               crops.shape[-2:], protocol.propagate)
    for corner, of_window in zip(corners, scores):
        yield corner, of_window, covered


@torch.no_grad()
def score_maps(model, photo, class_embeddings, protocol, batch=8):
    """Score of every class at every pixel of the resized photo: (C, h, w).

    photo: uint8 (3, H, W). batch: windows at a time.
    """
    pixels = resize(photo, protocol.short_side).to(class_embeddings.device)         # (3, h, w)
    total = None
    for scale in protocol.scales:
        scaled = resize(photo, protocol.short_side, scale).to(pixels.device)
        maps = slide(model, scaled, class_embeddings, protocol, batch)
        if scale != 1:
            maps = F.interpolate(maps[None], pixels.shape[-2:], mode="bilinear")[0]
        maps /= len(protocol.scales)                # in place: a thousand classes fill gigabytes
        total = maps if total is None else total.add_(maps)                         # (C, h, w)
    if protocol.image_weight:
        whole = resize(photo, min(protocol.short_side, protocol.window)).to(pixels.device)
        of_image = model.image_scores(whole[None], class_embeddings)[0]             # (C,)
        total += protocol.image_weight * of_image[:, None, None]
    return refine(total, pixels, protocol.refine_steps) if protocol.refine_steps else total


def best_classes(maps, height, width):
    """Maps (C, h, w), enlarged to the photo -> (best class, its score), (height, width) each.

    One class after another, so that only one map is there at the photo's own size. The first of
    equal classes wins.
    """
    score = torch.full((height, width), -math.inf, device=maps.device)
    mask = torch.zeros(height, width, device=maps.device,
                       dtype=torch.uint8 if len(maps) <= 256 else torch.int16)
    for c, small in enumerate(maps):
        of_class = F.interpolate(small[None, None].float(), (height, width), mode="bilinear")[0, 0]
        mask.masked_fill_(of_class > score, c)
        torch.maximum(score, of_class, out=score)
    return mask, score


def segment_image(model, image, class_embeddings, window=448, stride=224, short_side=448, batch=8,
                  **further):
    """Name every pixel of one photo.

    model: anything with `patch_scores`, like SimZSS.
    image: what `to_image` takes.
    class_embeddings: (C, D) or (C, S, D).
    window, stride, short_side: pixels.
    batch: windows at a time.
    further: of a `Protocol`, see `window_settings`.

    Returns (index mask (H, W), score (H, W) float32): the best class and its score, CPU tensors.
    """
    protocol = read(Protocol, {"window": window, "stride": stride, "short_side": short_side,
                               **further}, "segment_image")
    photo = to_pixels(to_image(image))                                              # (3, H, W)
    maps = score_maps(model, photo, class_embeddings, protocol, batch)              # (C, h, w)
    mask, score = best_classes(maps, *photo.shape[-2:])
    if score.isnan().any():
        raise ValueError("the model's scores are no numbers: its weights or settings cannot be "
                         "right")
    return mask.cpu(), score.cpu()


def window_settings(protocol):
    """What `segment_image` takes from a protocol, by name."""
    names = ("window", "stride", "short_side", "scales", "refine_steps", "propagate",
             "image_weight", "blend")
    return {name: getattr(protocol, name) for name in names}


# --------------------------------------------------------------------------------------------------
# Background: what is none of the classes

def parse_background(text):
    """None or "none" -> ("none", None); "threshold:0.2" -> ("threshold", 0.2);
    "prompt:sky, wall" -> ("prompt", ["sky", "wall"])."""
    kind, _, value = (text or "none").partition(":")
    if kind == "none" and not value:
        return kind, None
    if kind == "threshold":
        with contextlib.suppress(ValueError):
            threshold = float(value)
            if math.isfinite(threshold):
                return kind, threshold
    words = [word for word in split_names(value) if word]
    if kind == "prompt" and words:
        return kind, words
    raise ValueError(f"background {text!r}: expected none, threshold:T with a score T, such as a "
                     'cosine similarity, or prompt:"word, word"')


def put_background(mask, score, threshold, index=0):
    """Insert a class at index: pixels whose score is at most threshold become it; later classes
    move up by one."""
    mask = mask.to(torch.int16)
    return torch.where(score > threshold, mask + (mask >= index), index)


# --------------------------------------------------------------------------------------------------
# One photo, or many, with the same words

class Segmentation(NamedTuple):
    mask: np.ndarray                                # (H, W) uint8; int16 with a threshold, or
                                                    # of more than 256 classes
    names: list                                     # what its values mean
    score: np.ndarray                               # (H, W) float32, of the best class


def segment(photo, words, checkpoint=None, device="auto", **protocol):
    """Name every pixel of a photo, as `python segment.py` does. Returns a `Segmentation`.

    photo: what `to_image` takes: a file's name, a PIL image or an array. Others: of `Segmenter`,
    which saves time where there are many photos.
    """
    return Segmenter(words, checkpoint, device, **protocol)(photo)


class Segmenter:
    """Segments photos with the same words, as the command does: `Segmenter(words)(photo)`.

    words: ["cat", "sofa"], or with synonyms [["cat", "kitten"], "sofa"]; or as --classes.
    checkpoint: as --checkpoint, None = the newest under runs/; or a model of `load_model`, whose
        own protocol then holds; settings that are given here stay in it.
    device: as --device.
    batch: windows at a time.
    protocol: settings of a `Protocol` by name, such as background="threshold:0.2".
    """

    def __init__(self, words, checkpoint=None, device="auto", batch=8, **protocol):
        classes = read_words(words)                 # wrong words are found before the model is made
        parse_background(protocol.get("background"))
        self.model = checkpoint
        if checkpoint is None or isinstance(checkpoint, (str, Path)):
            self.model = prepare_model(checkpoint, device, protocol)
            use_for_photos(self.model, protocol)
        elif protocol:
            values = {**as_mapping(self.model.protocol), **protocol}
            self.model.protocol = read(self.model.Protocol, values,
                                       f"the protocol of {self.model.name}")
        self.protocol = self.model.protocol
        self.batch = batch
        self.background, self.threshold = parse_background(self.protocol.background)
        self.classes, self.names = with_background(classes, self.protocol.background)
        self.embeddings = embed(self.model, self.classes)                           # (C, S, D)

    def __call__(self, photo):
        """photo: what `to_image` takes. Returns a `Segmentation`."""
        if isinstance(photo, (str, Path)):
            refuse_toy_model(self.model, [photo])
        self.model.protocol = self.protocol         # a later Segmenter of this model has its own
        mask, score = segment_image(self.model, photo, self.embeddings, batch=self.batch,
                                    **window_settings(self.protocol))
        if self.background == "threshold":
            mask = put_background(mask, score, self.threshold)
        return Segmentation(mask.numpy(), self.names, score.numpy())

    @property
    def embedded_names(self):
        """Names of the classes that have a score: with a threshold the background has none."""
        return self.names[1:] if self.background == "threshold" else self.names


# --------------------------------------------------------------------------------------------------
# The command

def parse_args(argv=None):
    parser = CommandLine(description="Segment photos with the classes that you name.")
    add = parser.add_argument
    add("photos", nargs="+", help="image files, or folders of them")
    add("--classes", required=True,
        help='names separated by commas, "cat, sofa", or a file with one class per line, synonyms '
             "after commas")
    add("--view", action="append", default=[], choices=["similarity", "pca"],
        help="also draw a heat map per class, or patch tokens and classes in one space of colours; "
             "may be repeated")
    add("--output", default="segmented", help="folder to write to (default: %(default)s)")
    add_model_flags(parser, PHOTO_PROTOCOL)
    return parser.parse_args(argv)


def find_photos(names):
    """Files among names, and all images in the folders among them, sub-folders left out."""
    photos = []
    for name in names:
        if os.path.isdir(name):
            found = list(map(str, list_images(name)))
            if not found:
                raise FileNotFoundError(f"no images in the folder {name}; expected "
                                        f"{', '.join(IMAGE_SUFFIXES)}")
            photos += found
        elif not os.path.isfile(name):
            raise FileNotFoundError(f"no image {name}")
        else:
            photos.append(name)
    if len({Path(photo).stem for photo in photos}) < len(photos):
        raise ValueError("two photos have the same name, so would their masks; segment them into "
                         "different --output folders")
    return photos


def read_words(words):
    """Lists of names: of --classes, a class file or names with commas, or of a list from Python."""
    if not isinstance(words, str):
        return check_classes([[word] if isinstance(word, str) else list(word) for word in words],
                             "words")
    if words.endswith(","):
        raise ValueError(f"--classes {words!r} ends with a comma; names with spaces between them "
                         'need quotes: --classes "cat, sofa"')
    classes = name_classes(words)
    for [name, *_] in classes * (not os.path.isfile(words)):
        if "/" in name or name.lower().endswith(IMAGE_SUFFIXES):
            raise ValueError(f"--classes: {name!r} is no class name; expected names separated by "
                             'commas, "cat, sofa", or a class file')
    return classes


def with_background(classes, background):
    """(classes to embed, names of the mask's values) of the classes named and --background."""
    names = [synonyms[0] for synonyms in classes]
    kind, words = parse_background(background)
    if kind == "none":
        if len(classes) == 1:
            commas = f"names need commas between them, {', '.join(names[0].split())!r}; or "
            raise ValueError(f"the class {names[0]!r} alone would fill every photo; "
                             + commas * (" " in names[0])
                             + "name others, too, or say what is none of it: --background "
                             'threshold:0.2, or --background "prompt:wall, floor"')
        return classes, names
    names = ["background", *names]
    check_classes([[name] for name in names], "--background and --classes")
    if kind == "prompt":
        classes = check_classes([words, *classes], "--background and --classes")
    return classes, names


@torch.no_grad()
def draw_tokens(model, image, names, embeddings, batch):
    """`pictures.pca_view`: the axes along which the patch tokens of the photo, at the size of
    training images, differ most, are the colours of its tokens at all sizes. Patch tokens are
    their products with the axes, so windows overlap as in a mask."""
    protocol = replace(model.protocol, propagate=0.0, blend="triangle")
    side = training_run(model).get("image_size", 224)
    photos = [resize(to_pixels(image), side, scale).to(embeddings.device) for scale in PCA_SIZES]
    words = embeddings[:, 0]                                    # (C, D), the first name of each
    axes = torch.eye(words.shape[-1], device=words.device)
    tokens = slide(model, photos[0], axes, protocol, batch)[:, ::4, ::4].flatten(1).T       # (N, D)
    basis = pictures.principal_axes(tokens)                                                 # (D, 3)
    maps = {}
    for scale, pixels in zip(PCA_SIZES, photos):
        title = f"{scale} x training size, {pixels.shape[1]} x {pixels.shape[2]} pixels"
        maps[title] = slide(model, pixels, basis.T.contiguous(), protocol, batch)
    return pictures.pca_view(image, names, maps, words @ basis)


def segment_file(segmenter, photo, image, output, views=()):
    """Segment one photo, the file and what is in it, and write its mask, overlay, views and JSON.
    Returns the JSON's content."""
    model = segmenter.model
    mask, names, score = segmenter(image)
    stem = Path(output) / Path(photo).stem
    files = {part: f"{stem}_{part}.png" for part in ("mask", "overlay", *views)}
    pictures.save_mask(files["mask"], mask, len(names))
    pictures.save_picture(files["overlay"], pictures.overlay(image, mask, names))
    if "similarity" in views:
        maps = score_maps(model, to_pixels(image), segmenter.embeddings, segmenter.protocol,
                          segmenter.batch)
        view = pictures.similarity_view(image, segmenter.embedded_names, maps.cpu().numpy())
        pictures.save_picture(files["similarity"], view)
    if "pca" in views:
        view = draw_tokens(model, image, segmenter.embedded_names, segmenter.embeddings,
                           segmenter.batch)
        pictures.save_picture(files["pca"], view)

    pixels = pictures.count_pixels(mask, len(names))
    total = pictures.count_pixels(mask, len(names), score)
    found = [{"index": i, "name": names[i], "share": round(pixels[i] / mask.size, 6),
              "colour": colour, "score": round(total[i] / pixels[i], 4)}
             for i, colour in enumerate(pictures.class_colours(names).tolist()) if pixels[i]]
    result = {"photo": str(photo), "width": image.width, "height": image.height, "names": names,
              "classes": segmenter.classes, "found": found, **files, **model.checkpoint_file,
              "method": model.name, "settings": as_mapping(model.settings),
              "protocol": as_mapping(segmenter.protocol), "precision": model.precision,
              "training": model.trained_with, **made_with()}
    write_text(f"{stem}.json", json.dumps(result, indent=1))
    return result


def in_words(result, views=()):
    """What a photo shows, and the files written, in one line. result: of `segment_file`."""
    largest = sorted(result["found"], key=lambda found: -found["share"])
    shown = [found for found in largest if found["share"] >= pictures.LEAST_SHARE] or largest[:1]
    parts = [f"{found['name']} {found['share']:.0%}" for found in shown]
    if len(largest) > len(shown):
        parts.append(f"{len(largest) - len(shown)} classes below 1%")
    files = [result[part] for part in ("mask", "overlay", *views)]
    files.append(files[0].replace("_mask.png", ".json"))
    return f"{result['photo']}: {', '.join(parts)}; written: {', '.join(files)}"


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors("lower --batch, --window or --short-side"):
        photos = find_photos(args.photos)
        classes = read_words(args.classes)
        parse_background(vars(args).get("protocol.background"))
        model = open_model(args)
        use_for_photos(model, given(args).get("protocol", {}))
        refuse_toy_model(model, photos)
        if "pca" in args.view and not has_unit_tokens(model):
            raise ValueError(f"--view pca: {model.name} has no patch tokens in one space with the "
                             "words; leave it out")
        segmenter = Segmenter(classes, model, batch=args.batch)
        Path(args.output).mkdir(parents=True, exist_ok=True)
        remove_partial(args.output)
        unreadable = []
        for photo in progress(photos, len(photos) > 1, desc="segmenting", unit=" photos"):
            try:
                image = load_image(photo)
            except (ValueError, OSError) as error:
                unreadable.append(str(error))
                continue
            result = segment_file(segmenter, photo, image, args.output, args.view)
            tqdm.write(in_words(result, args.view))
        if unreadable:
            raise ValueError("; ".join(unreadable[:20]) + "; ..." * (len(unreadable) > 20)
                             + f"; {len(unreadable)} of {len(photos)} photos were left out")


if __name__ == "__main__":
    main()
