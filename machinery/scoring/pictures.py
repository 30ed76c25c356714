"""Pictures: overlays with legends, comparisons, heat maps, patch tokens as colours."""
import unicodedata
from itertools import zip_longest

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

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


def plain(text):
    """The text in the letters of Pillow's own font: no accents, "?" for what has no such form."""
    decomposed = unicodedata.normalize("NFKD", text)
    letters = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    return letters.encode("ascii", "replace").decode()


# --------------------------------------------------------------------------------------------------
# Masks over photos

def paint(image, mask, count, opacity=0.6):
    """The photo under its mask. mask: (H, W) int of count classes; other values stay as they are,
    or become `NOT_SCORED` if the mask is opaque."""
    mask = np.asarray(mask)
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
    width = int(max((font.getlength(plain(text)) for _, text in lines), default=0)) + 3 * size
    canvas = Image.new("RGB", (columns * width, max(height, 2 * size)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (colour, text) in enumerate(lines):
        x = i // rows * width + size // 2
        y = i % rows * 2 * size + size // 2
        draw.rectangle((x, y, x + size, y + size), fill=tuple(map(int, colour)), outline="black")
        draw.text((x + 1.5 * size, y + size / 2), plain(text), fill="black", font=font, anchor="lm")
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
    font = ImageFont.load_default(size=14)
    title = plain(title)
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


def pca_view(model, image, names, class_embeddings, sizes, tile=448):
    """Patch tokens and class embeddings in three colours: the axes along which patch tokens differ
    most.

    sizes: the photo in several sizes, uint8 (3, h, w) each, the first that of training images.
    class_embeddings: (C, D) or (C, S, D); a class of several names shows the first.
    tile: pixels a side; the model sees no more of the photo at a time.

    Class embeddings are coloured about their own mean, over a range of their own: they lie close
    together, and would share one colour. So compare the direction of a hue, not its value.
    """
    words = class_embeddings if class_embeddings.ndim == 2 else class_embeddings[:, 0]  # (C, D)
    axes = torch.eye(words.shape[-1], device=words.device)      # products with them: the tokens
    sizes = [pixels.to(words.device) for pixels in sizes]
    tokens = project_patches(model, sizes[0], axes, tile).flatten(0, 1)                 # (N, D)
    mean = tokens.mean(dim=0)
    covariance = (tokens - mean).T @ (tokens - mean)
    basis = torch.linalg.eigh(covariance.cpu())[1][:, -3:].flip(-1).to(mean)            # (D, 3)
    grids = [project_patches(model, pixels, basis.T.contiguous(), tile) - mean @ basis
             for pixels in sizes]                                                       # (h, w, 3)
    ends = torch.tensor([0.02, 0.98], device=words.device)
    spread = torch.stack([grid.flatten(0, 1).quantile(ends, dim=0)
                          for grid in (part[::max(1, len(part) // 200)] for part in grids)])
    low = spread[:, 0].amin(dim=0)                              # one range for all sizes
    high = spread[:, 1].amax(dim=0)

    height = 448
    shape = (max(1, round(image.width * height / image.height)), height)
    panels = [titled(image.resize(shape, Image.BICUBIC), "photo")]
    for pixels, part in zip(sizes, grids):
        h, w = part.shape[:2]
        scale = round(pixels.shape[1] / sizes[0].shape[1], 1)
        picture = Image.fromarray(levels(part, low, high)).resize(shape, Image.NEAREST)
        panels.append(titled(picture, f"{scale:g} x training size, {h} x {w} patches"))
    projected = words @ basis
    projected = projected - projected.mean(dim=0)
    reach = projected.abs().amax(dim=0)
    swatches = levels(projected, -reach, reach).tolist()
    key = [titled(Image.new("RGB", (shape[0], 4), tuple(swatch)), name, swatch)
           for name, swatch in zip(names, swatches)]
    return grid([panels] + [key[i:i + len(panels)] for i in range(0, len(key), len(panels))])


def levels(values, low, high):
    """Values (..., 3) between low and high (3,) as colours: uint8 array."""
    part = (values - low) / (high - low).clamp(min=1e-3)
    return (part * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()
