"""Random squares of photos, the masks there, and random changes of their pixels.

rng: NumPy generator. What torchvision draws comes from torch's global generator.
"""
import random
from functools import lru_cache

import numpy as np
from PIL import Image
from torchvision.transforms import RandomErasing, v2
from torchvision.transforms.functional import to_pil_image

from machinery.images import to_pixels
from machinery.networks.layers import IMAGENET_MEAN, IMAGENET_STD, Normalise

LONG_SIDE = 1333 / 1024                             # of a resized photo / its short side, at most


# --------------------------------------------------------------------------------------------------
# Of PixelCLIP

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


def mask_at(mask, x, y):
    """A mask (H, W) of a whole photo at some of its columns and rows: (G, G).

    x, y: (G,) positions, 0 to 1 across the photo and down.
    """
    return mask[np.ix_((y * mask.shape[0]).astype(int), (x * mask.shape[1]).astype(int))]


def weak_colours(strength=1.0):
    """Brightness 1 +- 0.125, contrast and saturation 0.5 to 1.5, hue +-0.1 turns, each with
    probability 0.5; contrast before or after saturation and hue. From SSD, arXiv 1512.02325.
    strength: factor on all of these; 0 = no change."""
    brightness, contrast, saturation, hue = (
        v2.RandomApply([v2.ColorJitter(**{name: strength * amount})], p=0.5)
        for name, amount in (("brightness", 0.125), ("contrast", 0.5), ("saturation", 0.5),
                             ("hue", 0.1)))
    return v2.RandomChoice([v2.Compose([brightness, contrast, saturation, hue]),
                            v2.Compose([brightness, saturation, hue, contrast])])


def strong_colours(strength=1.0):
    """With probability 0.8 brightness, contrast and saturation 0.5 to 1.5 and hue +-0.25 turns, in
    random order; then grey, 0.2; then blur, 0.5, sigma 0.1 to 2 pixels. strength: factor on changes
    of colour and on the probabilities of grey and blur."""
    jitter = v2.ColorJitter(0.5 * strength, 0.5 * strength, 0.5 * strength, 0.25 * strength)
    blur = v2.GaussianBlur(13, sigma=(0.1, 2.0))    # 13 pixels: three sigma to each side
    return v2.Compose([v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(0.2 * strength),
                       v2.RandomApply([blur], p=0.5 * strength)])


# --------------------------------------------------------------------------------------------------
# Of OVSegmentor. Pixels: uint8 (3, H, W)

@lru_cache(maxsize=1)
def augmenter(recipe, size):
    from timm.data.auto_augment import rand_augment_transform       # slow to import
    grey = tuple(round(255 * value) for value in IMAGENET_MEAN)     # what comes in from outside
    return rand_augment_transform(recipe, {"img_mean": grey, "interpolation": Image.BILINEAR,
                                           "translate_const": int(0.45 * size)})


def rand_augment(pixels, recipe, rng):
    """timm's RandAugment. recipe: such as "rand-m9-mstd0.5-inc1"."""
    random.seed(int(rng.integers(2 ** 32)))         # timm draws from both
    np.random.seed(int(rng.integers(2 ** 32)))
    return to_pixels(augmenter(recipe, pixels.shape[-1])(to_pil_image(pixels)))


def random_erase(pixels, probability):
    """Fill a rectangle, 2 to 33 % of the image, with noise of ImageNet's mean and deviation."""
    normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD)
    x = RandomErasing(probability, value="random")(normalise(pixels))
    return (255 * (x * normalise.std + normalise.mean)).round().clamp(0, 255).byte()
