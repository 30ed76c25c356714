"""Random changes of a photo's colours. rng: NumPy generator. strength: 0 = none, 1 = as published.
"""
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter


def change_hsv(image, hue, saturation):
    """hue: added, in turns of the colour circle. saturation: factor."""
    hsv = np.array(image.convert("HSV"), np.float32)
    hsv[..., 0] = (hsv[..., 0] + 256 * hue) % 256
    hsv[..., 1] = (hsv[..., 1] * saturation).clip(0, 255)
    return Image.frombytes("HSV", image.size, hsv.astype(np.uint8).tobytes()).convert("RGB")


def scale_and_shift(image, factor, shift):
    pixels = np.asarray(image, np.float32) * factor + shift
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def ssd_colours(image, rng, strength=1.0):
    """Brightness +-32, contrast and saturation 0.5 to 1.5, hue +-18 of 180, each with probability
    0.5; contrast before or after saturation and hue. From SSD, arXiv 1512.02325."""
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
