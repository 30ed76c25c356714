"""Random changes of OVSegmentor's training images beyond crops and flips: timm's RandAugment,
torchvision's random erasing. Pixels are uint8 (3, H, W)."""
import random
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import Normalize, RandomErasing
from torchvision.transforms.functional import to_pil_image

from machinery.images import to_pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@lru_cache(maxsize=1)
def augmenter(recipe, size):
    """timm's RandAugment by its recipe. Raises ValueError for one that timm does not know."""
    from timm.data.auto_augment import rand_augment_transform       # slow to import
    grey = tuple(round(255 * value) for value in IMAGENET_MEAN)     # what comes in from outside
    try:
        return rand_augment_transform(recipe, {"img_mean": grey, "interpolation": Image.BILINEAR,
                                               "translate_const": int(0.45 * size)})
    except (AssertionError, ValueError, KeyError):
        raise ValueError(f"unknown recipe of RandAugment {recipe!r}; expected one of timm's, such "
                         "as rand-m9-mstd0.5-inc1") from None


def rand_augment(pixels, recipe, rng):
    """recipe: such as "rand-m9-mstd0.5-inc1". rng: seeds both generators that timm draws from."""
    random.seed(int(rng.integers(2 ** 32)))
    np.random.seed(int(rng.integers(2 ** 32)))
    augmented = augmenter(recipe, pixels.shape[-1])(to_pil_image(pixels))
    return to_pixels(augmented)


def random_erase(pixels, probability):
    """Fill a rectangle, 2 to 33 % of the image, with noise of ImageNet's mean and deviation. Draws
    from torch's generator."""
    x = Normalize(IMAGENET_MEAN, IMAGENET_STD)(pixels / 255)
    x = RandomErasing(probability, value="random")(x)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    return (255 * (x * std + mean)).round().clamp(0, 255).byte()
