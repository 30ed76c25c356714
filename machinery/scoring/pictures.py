"""Pictures: overlays with legends, comparisons, heat maps, patch tokens as colours."""
import unicodedata
from itertools import zip_longest

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from machinery.files import save_png

NOT_SCORED = (224, 224, 192)                        # pixels without a class: as in Pascal VOC


def count_pixels(mask, count, weights=None):
    """Pixels of each class, (count,), or the sums of their weights (H, W). mask: (H, W) array."""
    kept = (mask >= 0) & (mask < count)
    return np.bincount(mask[kept], None if weights is None else weights[kept], minlength=count)


# --------------------------------------------------------------------------------------------------
# Colours and letters

def palette(count):
    """count RGB colours, (count, 3) uint8: those of Pascal VOC without its black."""
    index = np.arange(1, count + 1)
    colours = np.zeros((count, 3), int)
    for bit in range(8):                            # the index's bits, spread over the channels
        for channel in range(3):
            colours[:, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def to_ascii(text):
    """The text in the letters of Pillow's own font: no accents, "?" for what has no such form."""
    decomposed = unicodedata.normalize("NFKD", text)
    letters = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    return letters.encode("ascii", "replace").decode()


# --------------------------------------------------------------------------------------------------
# Masks over photos

def paint(image, mask, count, opacity=0.6):
    """The photo under its mask, an (H, W) int array of count classes; other pixels stay as they
    are, or become `NOT_SCORED` if the mask is opaque."""
    named = (mask >= 0) & (mask < count)
    colours = np.array([*palette(count), NOT_SCORED], np.uint8)
    coloured = Image.fromarray(colours[np.where(named, mask, np.int16(count))])
    if opacity == 1:
        return coloured
    return Image.composite(Image.blend(image, coloured, opacity), image, Image.fromarray(named))


def legend(lines, height, size):
    """Coloured squares with words, (colour, text) each, in columns of at most that height."""
    font = ImageFont.load_default(size=size)
    columns = -(-len(lines) // max(1, height // (2 * size)))
    rows = -(-len(lines) // max(1, columns))
    width = int(max((font.getlength(to_ascii(text)) for _, text in lines), default=0)) + 3 * size
    canvas = Image.new("RGB", (columns * width, max(height, 2 * size)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (colour, text) in enumerate(lines):
        x = i // rows * width + size // 2
        y = i % rows * 2 * size + size // 2
        draw.rectangle((x, y, x + size, y + size), fill=tuple(map(int, colour)), outline="black")
        place = (x + 1.5 * size, y + size / 2)
        draw.text(place, to_ascii(text), fill="black", font=font, anchor="lm")
    return canvas


def overlay(image, mask, names):
    """The photo under its mask, and right of it a legend of the classes found, the largest first.

    image: RGB PIL image (W, H). mask: (H, W) int array. names: C names.
    """
    share = count_pixels(mask, len(names)) / mask.size
    colours = palette(len(names))
    lines = [(colours[i], f"{names[i]} {share[i]:.1%}")
             for i in np.argsort(-share, kind="stable") if share[i] > 0]
    size = int(np.clip(max(mask.shape) / 32, 10, 64))
    return grid([[paint(image, mask, len(names)), legend(lines, mask.shape[0], size)]])


def comparison(rows, names, width=256):
    """Photo, truth, prediction and overlay of several images, with titles and one legend.

    rows: (image, truth (H, W), prediction (H, W)) each. width: pixels of a panel. The legend names
    the classes that fill at least a hundredth of a truth or prediction.
    """
    C = len(names)
    panels = []
    seen = np.zeros(C)                              # largest part of a mask
    lines = []
    for image, *masks in rows:
        truth, prediction = map(np.asarray, masks)
        for mask in (truth, prediction):
            seen = np.maximum(seen, count_pixels(mask, C) / mask.size)
        if count_pixels(truth, C).sum() < truth.size:
            lines = [(NOT_SCORED, "not scored")]
        row = [image, paint(image, truth, C, 1), paint(image, prediction, C, 1),
               paint(image, prediction, C)]
        size = (width, max(1, round(width * image.height / image.width)))
        panels.append([panel.resize(size, Image.BICUBIC if panel is image else Image.NEAREST)
                       for panel in row])
    titles = ("photo", "truth", "prediction", "overlay")
    panels[0] = [add_title(panel, title) for panel, title in zip(panels[0], titles)]
    picture = grid(panels, gap=4)
    colours = palette(C)
    lines = [(colours[i], names[i]) for i in np.argsort(-seen, kind="stable")
             if seen[i] >= 0.01] + lines
    return grid([[picture, legend(lines, picture.height, 14)]])


def grid(rows, gap=0):
    """Rows of pictures in one, columns aligned, gap pixels apart."""
    columns = zip_longest(*rows, fillvalue=Image.new("RGB", (1, 1)))
    widths = [max(picture.width for picture in column) + gap for column in columns]
    heights = [max(picture.height for picture in row) + gap for row in rows]
    canvas = Image.new("RGB", (sum(widths), sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            canvas.paste(picture, (sum(widths[:j]), sum(heights[:i])))
    return canvas


def add_title(picture, title, colour=(255, 255, 255)):
    """The picture with a line of text above it, on a colour."""
    font = ImageFont.load_default(size=14)
    title = to_ascii(title)
    width = max(picture.width, int(font.getlength(title)) + 8)
    canvas = Image.new("RGB", (width, picture.height + 24), colour)
    canvas.paste(picture, (0, 24))
    ink = "black" if sum(colour) > 380 else "white"
    ImageDraw.Draw(canvas).text((4, 12), title, fill=ink, font=font, anchor="lm")
    return canvas


def save_mask(path, mask, count):
    """Index mask (H, W), an array, as PNG: palette colours up to 256 classes, 16-bit grey
    beyond."""
    picture = Image.fromarray(mask.astype(np.uint8 if count <= 256 else np.uint16))
    if count <= 256:
        picture.putpalette(palette(count).tobytes())
    save_png(path, picture)


# --------------------------------------------------------------------------------------------------
# What the model sees

HEAT = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])


def similarity_view(image, names, maps):
    """A heat map per class name, all from one range of colours: dark is low, yellow is high.

    maps: (C, h, w) array of scores.
    """
    photo = image.resize(maps.shape[:0:-1], Image.BICUBIC)
    low = maps.min()
    high = maps.max()
    panels = [add_title(photo, "photo")]
    for name, scores in zip(names, maps):
        heat = 4 * (scores - low) / max(high - low, 1e-6)
        colours = np.stack([np.interp(heat, range(5), channel) for channel in HEAT.T], axis=-1)
        panel = Image.blend(photo.convert("L").convert("RGB"),
                            Image.fromarray(colours.astype(np.uint8)), 0.75)
        panels.append(add_title(panel, f"{name}   {scores.min():.2f} to {scores.max():.2f}"))
    columns = min(4, max(1, 2000 // photo.width))
    return grid([panels[i:i + columns] for i in range(0, len(panels), columns)])


@torch.no_grad()
def project_patches(model, pixels, directions, tile):
    """Scalar products of all patch tokens with directions (K, D): (h, w, K), tile by tile.

    pixels: uint8 (3, H, W). tile: pixels; no more of the photo is in the model at a time.
    """
    columns = []
    for x in range(0, pixels.shape[2], tile):
        tiles = [pixels[:, y:y + tile, x:x + tile] for y in range(0, pixels.shape[1], tile)]
        scores = [model.patch_scores(part[None], directions)[0][0] for part in tiles]   # (K, h, w)
        columns.append(torch.cat(scores, dim=1))
    return torch.cat(columns, dim=2).permute(1, 2, 0)


def pca_view(model, image, names, class_embeddings, photos, tile=448):
    """Patch tokens and class embeddings in three colours: the axes along which patch tokens differ
    most.

    names, class_embeddings: of C classes, (C, S, D); a class of several names shows the first.
    photos: the photo in several sizes, uint8 (3, h, w) each, the first that of training images.
    tile: pixels a side; the model sees no more of the photo at a time.

    Class embeddings are coloured about their own mean, over a range of their own: they lie close
    together, and would share one colour. So compare the direction of a hue, not its value.
    """
    words = class_embeddings[:, 0]                                                      # (C, D)
    axes = torch.eye(words.shape[-1], device=words.device)      # products with them: the tokens
    photos = [pixels.to(words.device) for pixels in photos]
    tokens = project_patches(model, photos[0], axes, tile).flatten(0, 1)                # (N, D)
    mean = tokens.mean(dim=0)
    covariance = (tokens - mean).T @ (tokens - mean)
    basis = torch.linalg.eigh(covariance.cpu())[1][:, -3:].flip(-1).to(mean)            # (D, 3)
    low, high = ((tokens - mean) @ basis).quantile(
        torch.tensor([0.02, 0.98], device=words.device), dim=0)                         # (3,) each

    height = 448
    shape = (max(1, round(image.width * height / image.height)), height)
    panels = [add_title(image.resize(shape, Image.BICUBIC), "photo")]
    for pixels in photos:
        projected = project_patches(model, pixels, basis.T.contiguous(), tile) - mean @ basis
        h, w = projected.shape[:2]
        scale = round(pixels.shape[1] / photos[0].shape[1], 1)
        picture = Image.fromarray(levels(projected, low, high)).resize(shape, Image.NEAREST)
        panels.append(add_title(picture, f"{scale:g} x training size, {h} x {w} patches"))
    projected = words @ basis
    projected = projected - projected.mean(dim=0)
    reach = projected.abs().amax(dim=0)
    key = [add_title(Image.new("RGB", (shape[0], 4), tuple(colour)), name, tuple(colour))
           for name, colour in zip(names, levels(projected, -reach, reach).tolist())]
    return grid([panels, *(key[i:i + len(panels)] for i in range(0, len(key), len(panels)))])


def levels(values, low, high):
    """Values (..., 3) between low and high (3,) as colours: uint8 array."""
    part = (values - low) / (high - low).clamp(min=1e-3)
    return (part * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()
