"""Pictures: overlays with legends, comparisons, heat maps, patch tokens as colours."""
import unicodedata
from functools import lru_cache
from itertools import zip_longest

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from machinery.files import save_png

BACKGROUND = "background"                           # the class that is never painted
NOT_SCORED = (216, 216, 216)                        # pixels without a class: no class is grey
LEAST_SHARE = 0.01                                  # of a picture that a class in a legend fills
NATURAL = {"sky": (120, 185, 250), "sea": (25, 75, 170), "grass": (60, 160, 50),
           "sand": (225, 195, 125), "road": (115, 115, 120), "snow": (240, 245, 255)}


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


@lru_cache
def distinct_colours(count):
    """count RGB colours, (count, 3) uint8, for pictures: each is as far from all before it as can
    be, in CIELAB, and none is near one of NATURAL. The first n are those of any longer list. Beyond
    some hundreds they repeat."""
    levels = np.linspace(0, 255, 12).round()
    rgb = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    lab = cielab(rgb)
    vivid = (np.abs(lab[:, 0] - 60) < 28) & (np.hypot(lab[:, 1], lab[:, 2]) > 30)
    natural = cielab(list(NATURAL.values()))
    far = np.linalg.norm(lab[:, None] - natural, axis=-1).min(axis=1) > 25
    rgb = rgb[vivid & far]
    lab = lab[vivid & far]
    chosen = [np.abs(lab - cielab([230, 25, 75])).sum(axis=1).argmin()]     # begins with a red
    distance = np.full(len(lab), np.inf)            # to the nearest one chosen
    while len(chosen) < min(count, len(lab)):
        distance = np.minimum(distance, ((lab - lab[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(distance.argmax())
    return rgb[np.resize(chosen, count)].astype(np.uint8)


def cielab(rgb):
    """sRGB colours (..., 3) in 0..255 -> CIELAB (white point D65): distances are those that one
    sees."""
    x = np.asarray(rgb) / 255
    linear = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    xyz = linear @ np.array([[0.4339, 0.2126, 0.0178], [0.3763, 0.7152, 0.1095],
                             [0.1899, 0.0722, 0.8727]])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]),
                     200 * (f[..., 1] - f[..., 2])], axis=-1)


def class_colours(names):
    """A colour for each name, (C, 3) uint8, in pictures: that of NATURAL, or the next of
    `distinct_colours`. A class "background" is black, and changes no other's colour."""
    distinct = iter(distinct_colours(len(names)))
    return np.array([(0, 0, 0) if name == BACKGROUND else NATURAL.get(name) or next(distinct)
                     for name in names], np.uint8).reshape(-1, 3)


def to_ascii(text):
    """The text in the letters of Pillow's own font: no accents, "?" for what has no such form."""
    decomposed = unicodedata.normalize("NFKD", text)
    letters = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    return letters.encode("ascii", "replace").decode()


# --------------------------------------------------------------------------------------------------
# Masks over photos

def paint(image, mask, names, opacity=0.5):
    """The photo, grey, under the colours of its mask, an (H, W) int array, with outlines in full
    colour. Background and pixels without a class stay as they are; if the mask is opaque, they
    become black and `NOT_SCORED`."""
    named = (mask >= 0) & (mask < len(names))
    colours = np.array([*class_colours(names), NOT_SCORED], np.uint8)
    coloured = Image.fromarray(colours[np.where(named, mask, np.int16(len(names)))])
    if opacity == 1:
        return coloured
    if BACKGROUND in names:
        named &= mask != names.index(BACKGROUND)
    painted = Image.blend(image.convert("L").convert("RGB"), coloured, opacity)
    painted = Image.composite(painted, image, Image.fromarray(named))
    edges = outlines(mask, max(1, round(max(mask.shape) / 500))) & named
    return Image.composite(coloured, painted, Image.fromarray(edges))


def outlines(mask, width):
    """Pixels (H, W) bool of a mask that are at most width pixels from those of another class."""
    edges = np.zeros(mask.shape, bool)
    for values, found in ((mask, edges), (mask.T, edges.T)):
        for shift in range(1, width + 1):
            differs = values[shift:] != values[:-shift]
            found[shift:] |= differs
            found[:-shift] |= differs
    return edges


def place_word(region, width, height):
    """The middle (x, y) of a place for a word of width x height pixels inside a region (H, W) bool,
    with as much room around it as there is; None if it has no room."""
    sums = np.pad(region, ((1, 0), (1, 0))).cumsum(0, dtype=np.int32).cumsum(1)
    for room in (4, 2, 1):
        w = round(width + (room - 1) * height)
        h = round(room * height)
        if w < region.shape[1] and h < region.shape[0]:
            inside = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
            y, x = np.unravel_index(inside.argmax(), inside.shape)
            if inside[y, x] > 0.97 * w * h:
                return x + w / 2, y + h / 2
    return None


def write_words(picture, mask, names, size):
    """Write each class's name into its largest region, if it has room there. size: of letters."""
    font = ImageFont.load_default(size=size)
    draw = ImageDraw.Draw(picture)
    step = max(1, size // 8)                        # places are looked for on a coarser mask
    small = mask[::step, ::step]
    share = count_pixels(mask, len(names)) / mask.size
    for i, name in enumerate(names):
        width = font.getlength(to_ascii(name)) / step
        if share[i] >= LEAST_SHARE and name != BACKGROUND:
            place = place_word(small == i, width + size / step, 1.4 * size / step)
            if place:
                draw.text((step * place[0], step * place[1]), to_ascii(name), fill="white",
                          font=font, anchor="mm", stroke_width=max(1, size // 10),
                          stroke_fill="black")


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
    """The photo under its mask, and right of it a legend of the classes that fill at least a
    hundredth of it, the largest first.

    image: RGB PIL image (W, H). mask: (H, W) int array. names: C names.
    """
    share = count_pixels(mask, len(names)) / mask.size
    colours = class_colours(names)
    largest = np.argsort(-share, kind="stable")
    lines = [(colours[i], f"{names[i]} {share[i]:.0%}") for i in largest
             if share[i] >= LEAST_SHARE and names[i] != BACKGROUND]
    size = max(10, round(max(mask.shape) / 36))
    painted = paint(image, mask, names)
    write_words(painted, mask, names, size)
    return grid([[painted, legend(lines, mask.shape[0], size)]])


def comparison(rows, names, width=256):
    """Photo, truth, prediction and overlay of several images, with titles and one legend. The
    prediction is shown where the truth is scored, the overlay everywhere.

    rows: (image, truth (H, W), prediction (H, W)) each. width: pixels of a panel. The legend names
    the classes that fill at least a hundredth of a truth or prediction.
    """
    C = len(names)
    panels = []
    seen = np.zeros(C)                              # largest part of a mask
    lines = []
    for image, *masks in rows:
        truth, prediction = map(np.asarray, masks)
        scored = (truth >= 0) & (truth < C)
        for mask in (truth, prediction):
            seen = np.maximum(seen, count_pixels(mask, C) / mask.size)
        if not scored.all():
            lines = [(NOT_SCORED, "not scored")]
        row = [image, paint(image, truth, names, 1),
               paint(image, np.where(scored, prediction, -1), names, 1),
               paint(image, prediction, names)]
        size = (width, max(1, round(width * image.height / image.width)))
        panels.append([panel.resize(size, Image.BICUBIC if panel is image else Image.NEAREST)
                       for panel in row])
    titles = ("photo", "truth", "prediction", "overlay")
    panels[0] = [add_title(panel, title) for panel, title in zip(panels[0], titles)]
    picture = grid(panels, gap=4)
    colours = class_colours(names)
    lines = [(colours[i], names[i]) for i in np.argsort(-seen, kind="stable")
             if seen[i] >= LEAST_SHARE] + lines
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


def add_title(picture, title, size=14):
    """The picture with a line of text above it. size: of the letters, in pixels."""
    font = ImageFont.load_default(size=size)
    title = to_ascii(title)
    width = max(picture.width, int(font.getlength(title)) + 8)
    height = round(1.7 * size)
    canvas = Image.new("RGB", (width, picture.height + height), "white")
    canvas.paste(picture, (0, height))
    ImageDraw.Draw(canvas).text((4, height // 2), title, fill="black", font=font, anchor="lm")
    return canvas


def save_picture(path, picture):
    """As PNG, with the least compression, which takes a third of the time and a tenth more room."""
    save_png(path, picture, compress_level=1)


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
    columns = min(4, max(1, 3000 // photo.width))
    size = max(14, photo.height // 16)
    panels = [add_title(photo, "photo", size)]
    for name, scores in zip(names, maps):
        heat = 4 * (scores - low) / max(high - low, 1e-6)
        colours = np.stack([np.interp(heat, range(5), channel) for channel in HEAT.T], axis=-1)
        panel = Image.blend(photo.convert("L").convert("RGB"),
                            Image.fromarray(colours.astype(np.uint8)), 0.75)
        title = f"{name}   {scores.min():.2f} to {scores.max():.2f}"
        panels.append(add_title(panel, title, size))
    return grid([panels[i:i + columns] for i in range(0, len(panels), columns)])


def principal_axes(tokens):
    """The three axes along which tokens (N, D) differ most, (D, 3)."""
    centred = tokens - tokens.mean(dim=0)
    covariance = centred.T @ centred
    return torch.linalg.eigh(covariance.cpu())[1][:, -3:].flip(-1).to(tokens)


def pca_view(image, names, maps, words, height=448):
    """Patch tokens in three colours, a panel for each size of the photo, and beside them the
    classes.

    maps: of each size of the photo, {title: (3, h, w)}, products of its tokens with three axes.
    words: the same of the classes, (C, 3). height: pixels of a panel.

    Classes are coloured about their own mean, over a range of their own: they lie close together,
    and would share one colour. So compare the direction of a hue, not its value.
    """
    first = next(iter(maps.values())).flatten(1)                                        # (3, N)
    low, high = first.quantile(torch.tensor([0.02, 0.98]).to(first), dim=1)             # (3,) each
    shape = (max(1, round(image.width * height / image.height)), height)
    size = max(14, (len(maps) + 1) * shape[0] // 100)
    panels = [add_title(image.resize(shape, Image.BICUBIC), "photo", size)]
    for title, projected in maps.items():
        picture = Image.fromarray(levels(projected.permute(1, 2, 0), low, high))
        panels.append(add_title(picture.resize(shape, Image.NEAREST), title, size))
    words = words - words.mean(dim=0)
    reach = words.abs().amax(dim=0)
    lines = [*zip(levels(words, -reach, reach).tolist(), names)]
    key = add_title(legend(lines, height, size), "the words, in colours of their own", size)
    return grid([[*panels, key]], gap=8)


def levels(values, low, high):
    """Values (..., 3) between low and high (3,) as colours: uint8 array."""
    part = (values - low) / (high - low).clamp(min=1e-3)
    return (part * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()
