"""Random squares of photos, with the masks there, and random changes of colour.

rng: NumPy generator. strength of a change: 0 = none, 1 = as published.
"""
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

LONG_SIDE = 1333 / 1024                             # of a resized photo / its short side, at most


# --------------------------------------------------------------------------------------------------
# Where

def random_square(width, height, size, short_side, rng):
    """(left, top, side) in a photo's pixels of a random square of size x size pixels of the resized
    photo: short side as given, long side at most 1333 / 1024 of that."""
    scale = min(short_side / min(width, height), LONG_SIDE * short_side / max(width, height))
    side = min(size / scale, width, height)         # an elongated photo is enlarged to the square
    return rng.uniform(0, width - side), rng.uniform(0, height - side), side


def random_rectangle(size, rng):
    """(rows, columns), slices, of a rectangle in a square: each side 0.1 to 0.5 of it."""
    sides = (rng.uniform(0.1, 0.5, 2) * size).astype(int)
    starts = rng.integers(size - sides + 1)
    return [slice(start, start + side) for start, side in zip(starts, sides)]


def masks_at(masks, x, y):
    """Masks (H, W) bool of a whole photo at the columns x and rows y, (G,) shares of its size:
    (M, G, G) bool."""
    found = [mask[np.ix_((y * mask.shape[0]).astype(int), (x * mask.shape[1]).astype(int))]
             for mask in masks]
    return np.stack(found) if found else np.zeros((0, len(y), len(x)), bool)


# --------------------------------------------------------------------------------------------------
# Colours

def change_hsv(image, hue, saturation):
    """hue: added, in turns of the colour circle. saturation: factor."""
    hsv = np.array(image.convert("HSV"), np.float32)
    hsv[..., 0] = (hsv[..., 0] + 256 * hue) % 256
    hsv[..., 1] = (hsv[..., 1] * saturation).clip(0, 255)
    return Image.frombytes("HSV", image.size, hsv.astype(np.uint8).tobytes()).convert("RGB")


def scale_and_shift(image, factor, shift):
    pixels = np.asarray(image, np.float32) * factor + shift
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def weak_colours(image, rng, strength=1.0):
    """Brightness +-32, contrast and saturation 0.5 to 1.5, hue +-18 of 180, each with probability
    0.5; contrast before or after saturation and hue. From SSD, arXiv 1512.02325."""
    if not strength:                                # HSV and back would change it by rounding
        return image
    contrast_first = rng.random() < 0.5
    shift, factor, saturation, hue = strength * rng.uniform(-1, 1, 4) * (rng.random(4) < 0.5)
    image = scale_and_shift(image, 1, 32 * shift)
    if contrast_first:
        image = scale_and_shift(image, 1 + 0.5 * factor, 0)
    image = change_hsv(image, 0.1 * hue, 1 + 0.5 * saturation)
    return image if contrast_first else scale_and_shift(image, 1 + 0.5 * factor, 0)


def strong_colours(image, rng, strength=1.0):
    """With probability 0.8 brightness, contrast and saturation 0.5 to 1.5 and hue +-0.25 turns, in
    random order; then grey, 0.2; then blur, 0.5, sigma 0.1 to 2 pixels."""
    if not strength:
        return image
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    if rng.random() < 0.8:
        for change in rng.permutation(4):
            amount = strength * rng.uniform(-0.5, 0.5)
            if change < 3:
                image = enhance[change](image).enhance(1 + amount)
            else:
                image = change_hsv(image, 0.5 * amount, 1)
    if rng.random() < 0.2 * strength:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5 * strength:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2)))
    return image
