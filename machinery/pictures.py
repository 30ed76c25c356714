"""Overlays, grids and plots."""
from itertools import zip_longest

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BAND = 2 ** 22                                      # similarities at the photo's size at a time: 16 MB stay in the cache



def row_bands(height, row):
    """Slices of rows with about BAND values each, for row values in a row: big photos are worked on a band at a time."""
    rows = max(1, BAND // row)
    return [slice(first, min(first + rows, height)) for first in range(0, height, rows)]



def count_pixels(mask, count, weights=None):
    """Pixels of each class 0..count - 1, or the sums of their weights (H, W). mask: (H, W) array. -> (count,) array"""
    total = np.zeros(count)
    for band in row_bands(*mask.shape):
        kept = (mask[band] >= 0) & (mask[band] < count)
        total += np.bincount(mask[band][kept], None if weights is None else weights[band][kept], minlength=count)
    return total



def palette(count):
    """count RGB colours, (count, 3) uint8: those of Pascal VOC without its black, bits spread over the channels."""
    index = np.arange(1, count + 1)
    colours = np.zeros((count, 3), int)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.astype(np.uint8)



def overlay(image, mask, names, opacity=0.6):
    """The photo under its mask, with a legend of the classes present, the largest first, on the right.

    image: RGB PIL image (W, H). mask: (H, W) int, values that are no class stay uncoloured. names: C names.
    """
    mask, colours = np.asarray(mask), palette(len(names))
    painted = np.array(image)
    for band in row_bands(*mask.shape):
        named = (mask[band] >= 0) & (mask[band] < len(names))
        mixed = opacity * colours[mask[band][named]] + (1 - opacity) * painted[band][named]
        painted[band][named] = mixed.astype(np.uint8)
    share = count_pixels(mask, len(names)) / mask.size
    lines = [(colours[i], f"{names[i]} {share[i]:.1%}") for i in np.argsort(-share, kind="stable") if share[i] > 0]

    H, W = mask.shape
    size = int(np.clip(max(H, W) / 32, 10, 64))
    font = ImageFont.load_default(size=size)
    columns = -(-len(lines) // max(1, H // (2 * size)))                                 # as many as the height asks for
    rows = -(-len(lines) // max(1, columns))
    width = int(max((font.getlength(text) for _, text in lines), default=0)) + 3 * size
    canvas = Image.new("RGB", (W + columns * width, max(H, 2 * size)), "white")
    canvas.paste(Image.fromarray(painted))
    draw = ImageDraw.Draw(canvas)
    for i, (colour, text) in enumerate(lines):
        x, y = W + i // rows * width + size // 2, i % rows * 2 * size + size // 2
        draw.rectangle((x, y, x + size, y + size), fill=tuple(map(int, colour)), outline="black")
        draw.text((x + 1.5 * size, y + size / 2), text, fill="black", font=font, anchor="lm")
    return canvas



def grid(rows):
    """Rows of pictures in one, columns aligned."""
    columns = zip_longest(*rows, fillvalue=Image.new("RGB", (1, 1)))
    widths = [max(picture.width for picture in column) for column in columns]
    heights = [max(picture.height for picture in row) for row in rows]
    canvas = Image.new("RGB", (sum(widths), sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            canvas.paste(picture, (sum(widths[:j]), sum(heights[:i])))
    return canvas



def titled(picture, title, colour=(255, 255, 255)):
    """The picture with a line of text above it, on a colour."""
    canvas = Image.new("RGB", (picture.width, picture.height + 24), tuple(colour))
    canvas.paste(picture, (0, 24))
    font, ink = ImageFont.load_default(size=14), "black" if sum(colour) > 380 else "white"
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



def plot(path, curves, across, up, size=(640, 400)):
    """Draw curves, {name: [(x, y)]}, with axes called across and up, into a PNG; x that spans a lot by its logarithm."""
    points = np.array([p for curve in curves.values() for p in curve], float)
    log = points[:, 0].min() > 0 and points[:, 0].max() > 15 * points[:, 0].min()
    points[:, 0] = np.log10(points[:, 0]) if log else points[:, 0]
    low, high = points.min(0), points.max(0)
    span = np.where(high > low, high - low, 1)
    left, right, top, bottom = 70, size[0] - 20, 20 + 18 * len(curves), size[1] - 50
    canvas, font = Image.new("RGB", size, "white"), ImageFont.load_default(size=13)
    draw = ImageDraw.Draw(canvas)

    def place(point):
        x, y = ((np.log10(point[0]) if log else point[0], point[1]) - low) / span
        return left + x * (right - left), bottom - y * (bottom - top)

    for tick in np.linspace(0, 1, 5):
        value = low + tick * span
        value[0] = 10 ** value[0] if log else value[0]
        x, y = place(value)
        draw.line((x, top, x, bottom), fill="#dddddd")
        draw.line((left, y, right, y), fill="#dddddd")
        number = f"{value[0]:.3g}" if value[0] < 1000 else f"{value[0]:,.0f}"
        draw.text((x, bottom + 14), number, fill="black", font=font, anchor="mm")
        draw.text((left - 6, y), f"{value[1]:.3g}", fill="black", font=font, anchor="rm")
    draw.text(((left + right) / 2, size[1] - 14), across, fill="black", font=font, anchor="mm")
    draw.text((6, 10), up, fill="black", font=font, anchor="lm")
    for i, (name, curve) in enumerate(curves.items()):
        colour = ("#1f5fa8", "#c4401c", "#2b8a3e", "#8a4fb0", "#b8860b", "#444444")[i % 6]
        spots = [place(point) for point in curve]
        draw.line(spots, fill=colour, width=2)
        for x, y in spots if len(spots) <= 20 else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        draw.text((right, 12 + 18 * i), name, fill=colour, font=font, anchor="rm")
    canvas.save(path)
