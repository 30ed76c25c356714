"""Pictures: overlays with legends, comparisons, heat maps, patch tokens as colours, plots."""
import sys
import unicodedata
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from machinery.images import to_pixels

BAND = 2 ** 22                                      # values worked on at a time, 16 MB
NOT_SCORED = (224, 224, 192)                        # pixels without a class: as in Pascal VOC
# Fonts with many letters, tried in this order where Pillow's own lacks one of a name.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf",
         "Arial.ttf", "PingFang.ttc", "msyh.ttc", "NotoColorEmoji.ttf")


# --------------------------------------------------------------------------------------------------
# Big masks, a band of rows at a time

def row_bands(height, row):
    """Slices of rows with about BAND values each. row: values in a row."""
    rows = max(1, BAND // row)
    return [slice(first, min(first + rows, height)) for first in range(0, height, rows)]


def count_pixels(mask, count, weights=None):
    """Pixels of each class, (count,), or the sums of their weights (H, W). mask: (H, W) array."""
    total = np.zeros(count)
    for band in row_bands(*mask.shape):
        kept = (mask[band] >= 0) & (mask[band] < count)
        weight = None if weights is None else weights[band][kept]
        total += np.bincount(mask[band][kept], weight, minlength=count)
    return total


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


def has_letters(font, text):
    """Whether a font has a glyph for every letter of a text."""
    missing = bytes(font.getmask("\U0010ffff"))
    return all(bytes(font.getmask(letter)) != missing for letter in set(text) if letter.strip())


@lru_cache(maxsize=None)
def find_font(letters):
    """(name of a font that has all letters, None = Pillow's own; whether there is one)."""
    if has_letters(ImageFont.load_default(size=12), letters):
        return None, True
    for name in FONTS:
        try:
            font = ImageFont.truetype(name, 12)
        except OSError:
            continue
        if has_letters(font, letters):
            print(f"names are written in the font {name}", file=sys.stderr)
            return name, True
    print("no font here has all letters of the names; they are written in plain letters",
          file=sys.stderr)
    return None, False


def plain(text):
    """The closest text in letters that any font has: no accents, "?" for what has no such form."""
    text = text.replace("ß", "ss").replace("æ", "ae").replace("ø", "o").replace("ł", "l")
    decomposed = unicodedata.normalize("NFKD", text)
    letters = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    return letters.encode("ascii", "replace").decode()


def lettering(texts, size):
    """(font of that size, texts as it can write them)."""
    name, complete = find_font("".join(sorted(set("".join(texts)))))
    if not complete:
        texts = [plain(text) for text in texts]
    font = ImageFont.truetype(name, size) if name else ImageFont.load_default(size=size)
    return font, texts


# --------------------------------------------------------------------------------------------------
# Masks over photos

def paint(image, mask, count, opacity=0.6):
    """The photo under its mask. mask: (H, W) int of count classes; other values stay as they are,
    or become `NOT_SCORED` if the mask is opaque."""
    mask = np.asarray(mask)
    colours = palette(count)
    painted = np.array(image)
    for band in row_bands(*mask.shape):
        named = (mask[band] >= 0) & (mask[band] < count)
        mixed = opacity * colours[mask[band][named]] + (1 - opacity) * painted[band][named]
        painted[band][named] = mixed.astype(np.uint8)
        if opacity == 1:
            painted[band][~named] = NOT_SCORED
    return Image.fromarray(painted)


def legend(lines, height, size):
    """Coloured squares with words, (colour, text) each, in columns of at most that height."""
    font, texts = lettering([text for _, text in lines], size)
    columns = -(-len(lines) // max(1, height // (2 * size)))
    rows = -(-len(lines) // max(1, columns))
    width = int(max((font.getlength(text) for text in texts), default=0)) + 3 * size
    canvas = Image.new("RGB", (columns * width, max(height, 2 * size)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, ((colour, _), text) in enumerate(zip(lines, texts)):
        x = i // rows * width + size // 2
        y = i % rows * 2 * size + size // 2
        draw.rectangle((x, y, x + size, y + size), fill=tuple(map(int, colour)), outline="black")
        draw.text((x + 1.5 * size, y + size / 2), text, fill="black", font=font, anchor="lm")
    return canvas


def overlay(image, mask, names, opacity=0.6):
    """The photo under its mask, and right of it a legend of the classes found, the largest first.

    image: RGB PIL image (W, H). mask: (H, W) int. names: C names.
    """
    mask = np.asarray(mask)
    share = count_pixels(mask, len(names)) / mask.size
    colours = palette(len(names))
    lines = [(colours[i], f"{names[i]} {share[i]:.1%}")
             for i in np.argsort(-share, kind="stable") if share[i] > 0]
    size = int(np.clip(max(mask.shape) / 32, 10, 64))
    key = legend(lines, mask.shape[0], size)
    return grid([[paint(image, mask, len(names), opacity), key]])


def comparison(rows, names, width=256, least=0.01):
    """Photo, truth, prediction and overlay of several images, with titles and one legend.

    rows: (image, truth (H, W), prediction (H, W)) each. width: pixels of a panel. The legend names
    the classes that fill at least that share of a truth or prediction.
    """
    panels = []
    seen = np.zeros(len(names))
    unscored = False
    for image, truth, prediction in rows:
        truth = np.asarray(truth)
        prediction = np.asarray(prediction)
        for mask in (truth, prediction):
            seen = np.maximum(seen, count_pixels(mask, len(names)) / mask.size)
        unscored |= bool(((truth < 0) | (truth >= len(names))).any())
        row = [image, paint(image, truth, len(names), 1), paint(image, prediction, len(names), 1),
               paint(image, prediction, len(names))]
        size = (width, max(1, round(width * image.height / image.width)))
        panels.append([panel.resize(size, Image.BICUBIC if panel is image else Image.NEAREST)
                       for panel in row])
    titles = ("photo", "truth", "prediction", "overlay")
    panels[0] = [titled(panel, title) for panel, title in zip(panels[0], titles)]
    picture = grid(panels, gap=4)
    colours = palette(len(names))
    lines = [(colours[i], names[i]) for i in np.argsort(-seen, kind="stable") if seen[i] >= least]
    if unscored:
        lines.append((NOT_SCORED, "not scored"))
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


def titled(picture, title, colour=(255, 255, 255)):
    """The picture with a line of text above it, on a colour."""
    font, [title] = lettering([title], 14)
    width = max(picture.width, int(font.getlength(title)) + 8)
    canvas = Image.new("RGB", (width, picture.height + 24), tuple(colour))
    canvas.paste(picture, (0, 24))
    ink = "black" if sum(colour) > 380 else "white"
    ImageDraw.Draw(canvas).text((4, 12), title, fill=ink, font=font, anchor="lm")
    return canvas


def save_mask(path, mask, count):
    """Index mask as PNG: palette colours up to 256 classes, 16-bit grey beyond."""
    if count > 256:
        Image.fromarray(np.asarray(mask).astype(np.uint16)).save(path)
    else:
        picture = Image.fromarray(np.asarray(mask).astype(np.uint8))
        picture.putpalette(palette(count).tobytes())
        picture.save(path)


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
    panels = [titled(photo, "photo")]
    for name, scores in zip(names, maps):
        heat = 4 * (scores - low) / max(high - low, 1e-6)
        colours = np.stack([np.interp(heat, range(5), channel) for channel in HEAT.T], axis=-1)
        panel = Image.blend(photo.convert("L").convert("RGB"),
                            Image.fromarray(colours.astype(np.uint8)), 0.75)
        panels.append(titled(panel, f"{name}   {scores.min():.2f} to {scores.max():.2f}"))
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


def pca_view(model, image, names, class_embeddings, resized, scales=(1, 2, 4, 8), tile=448):
    """Patch tokens and class embeddings in three colours: the axes along which patch tokens differ
    most. Class embeddings are coloured about their own mean, over a range of their own: they lie
    close together, and would share one colour. So compare the direction of a hue, not its value.

    resized: function from the photo's pixels and a scale to pixels of so many times the size of
    training images. A class of several names shows the first.
    """
    words = class_embeddings if class_embeddings.ndim == 2 else class_embeddings[:, 0]  # (C, D)
    axes = torch.eye(words.shape[-1], device=words.device)      # products with them: the tokens
    photo = to_pixels(image)

    def project(scale, directions):
        return project_patches(model, resized(photo, scale).to(words.device), directions, tile)

    tokens = project(scales[0], axes).flatten(0, 1)                                 # (N, D)
    mean = tokens.mean(dim=0)
    covariance = (tokens - mean).T @ (tokens - mean)
    basis = torch.linalg.eigh(covariance.cpu())[1][:, -3:].flip(-1).to(mean)        # (D, 3)
    shift = mean @ basis
    grids = [project(scale, basis.T.contiguous()) - shift for scale in scales]      # (h, w, 3)
    spread = torch.stack([grid.flatten(0, 1).quantile(torch.tensor([0.02, 0.98]).to(mean), dim=0)
                          for grid in (part[::max(1, len(part) // 200)] for part in grids)])
    low = spread[:, 0].amin(dim=0)                                  # one range for all scales
    high = spread[:, 1].amax(dim=0)

    def colour(values, low, high):
        share = (values - low) / (high - low).clamp(min=1e-3)
        return (share * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()

    height = 448
    shape = (max(1, round(image.width * height / image.height)), height)
    panels = [titled(image.resize(shape, Image.BICUBIC), "photo")]
    for grid_, scale in zip(grids, scales):
        h, w = grid_.shape[:2]
        picture = Image.fromarray(colour(grid_, low, high)).resize(shape, Image.NEAREST)
        panels.append(titled(picture, f"{scale} x training size, {h} x {w} patches"))
    projected = words @ basis
    projected = projected - projected.mean(dim=0)
    reach = projected.abs().amax(dim=0)
    swatches = colour(projected, -reach, reach).tolist()
    key = [titled(Image.new("RGB", (shape[0], 4), tuple(swatch)), name, swatch)
           for name, swatch in zip(names, swatches)]
    return grid([panels] + [key[i:i + len(panels)] for i in range(0, len(key), len(panels))])


# --------------------------------------------------------------------------------------------------
# Plots

def plot(path, curves, across, up):
    """Draw curves into a PNG: {name: rows of (x, mean, lowest, highest)}, the range as a band.

    An x axis whose values differ much is logarithmic. Returns False, with one line, where
    matplotlib is missing; it is optional.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} was not drawn: plots need 'pip install matplotlib'", file=sys.stderr)
        return False
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, rows in curves.items():
        x, mean, low, high = np.array(rows, float).T
        line, = axes.plot(x, mean, marker="o" if len(x) <= 20 else None, label=name)
        if (high > low).any():
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
        if x.min() > 0 and x.max() > 15 * x.min():
            axes.set_xscale("log")
            axes.set_xticks(x, [f"{value:,g}" for value in x])
            axes.minorticks_off()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(Path(path), dpi=120)
    return True
