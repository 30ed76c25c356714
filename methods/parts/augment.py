"""Random changes of training images beyond cropping. Each takes its random numbers from a NumPy
generator, so that a pair looks the same whichever worker loads it."""
import math
import random
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps

from machinery.images import to_pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def augment(image, rng, recipe, erase):
    """A PIL image -> uint8 (3, H, W): half of them are mirrored; then `rand_augment`, unless recipe
    is "none", and `random_erase` with the probability erase."""
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if recipe != "none":
        image = rand_augment(image, recipe, rng)
    return random_erase(to_pixels(image), erase, rng)


@lru_cache(maxsize=1)
def augmenter(recipe, size):
    from timm.data.auto_augment import rand_augment_transform       # slow to import
    grey = tuple(round(255 * value) for value in IMAGENET_MEAN)     # what comes in from outside
    return rand_augment_transform(recipe, {"img_mean": grey, "translate_const": int(0.45 * size),
                                           "interpolation": Image.BILINEAR})


def check_recipe(recipe, size):
    """Raise ValueError for a recipe that `rand_augment` does not know; "none" is one, too."""
    if recipe != "none":
        try:
            augmenter(recipe, size)
        except (AssertionError, ValueError, KeyError):
            raise ValueError(f"unknown recipe of RandAugment {recipe!r}; expected one of timm's, "
                             "such as rand-m9-mstd0.5-inc1, or none") from None


def rand_augment(image, recipe, rng):
    """timm's RandAugment of a PIL image. recipe: such as "rand-m9-mstd0.5-inc1"."""
    random.seed(int(rng.integers(2 ** 32)))         # timm draws from both global generators
    np.random.seed(int(rng.integers(2 ** 32)))
    return augmenter(recipe, image.width)(image)


def random_erase(pixels, probability, rng, area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3)):
    """Fill one random rectangle of pixels uint8 (3, H, W) with noise, with a probability.

    area: range of its share of the image. ratio: range of its height / width. The noise is normal,
    with ImageNet's mean and standard deviation; it is cut to 0..255.
    """
    H, W = pixels.shape[-2:]
    if rng.random() >= probability:
        return pixels
    for _ in range(10):                             # draws that do not fit are drawn again
        share = H * W * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h = round(math.sqrt(share * aspect))
        w = round(math.sqrt(share / aspect))
        if 0 < h < H and 0 < w < W:
            y = rng.integers(H - h + 1)
            x = rng.integers(W - w + 1)
            noise = rng.normal(np.reshape(IMAGENET_MEAN, (3, 1, 1)),
                               np.reshape(IMAGENET_STD, (3, 1, 1)), (3, h, w))
            pixels = pixels.clone()
            pixels[:, y:y + h, x:x + w] = torch.from_numpy(255 * noise).clamp(0, 255).byte()
            break
    return pixels
