"""The toy world: drawn scenes with captions and known masks, and a hand-made frozen backbone.

    python -m machinery.toy FOLDER --count 500

writes scenes as a segmentation folder: images/, masks/, classes.txt.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, PngImagePlugin
from torch import nn

from machinery.errors import one_line_errors
from machinery.files import save_png
from machinery.images import ScoredImages

TOY_SIZE = 128                                      # pixels a side
STUFF = {"sky": ((150, 200, 250), "plain"), "sea": ((30, 90, 190), "waves"),
         "grass": ((60, 150, 50), "noise"), "sand": ((220, 195, 130), "noise"),
         "road": ((110, 110, 115), "plain"), "snow": ((240, 240, 245), "noise")}
ANIMAL = [(-1, -.5), (.4, -.5), (.55, -.75), (1, -.7), (1, -.3), (.8, -.15), (.8, .7), (.45, .7),
          (.45, .4), (-.6, .4), (-.6, .7), (-.95, .7)]          # corners, in units of the radius
THINGS = {"boat": ((130, 60, 30), "stripes", [(-1, .1), (-.2, .1), (-.2, -.95), (.8, .1), (1, .1),
                                              (.7, .7), (-.7, .7)]),
          "surfboard": ((245, 220, 40), "plain", [(-1, 0), (-.65, -.35), (0, -.48), (.65, -.35),
                                                  (1, 0), (.65, .35), (0, .48), (-.65, .35)]),
          "cow": ((70, 60, 55), "stripes", ANIMAL), "sheep": ((225, 215, 195), "checks", ANIMAL),
          "horse": ((125, 70, 35), "plain", ANIMAL), "dog": ((70, 45, 30), "noise", ANIMAL),
          "car": ((200, 30, 35), "plain", [(-1, -.1), (-.65, -.15), (-.4, -.65), (.45, -.65),
                                           (.7, -.15), (1, -.05), (1, .5), (-1, .5)]),
          "bus": ((240, 140, 20), "stripes", [(-1, -.6), (1, -.6), (1, .6), (-1, .6)]),
          "truck": ((40, 50, 120), "checks", [(-1, -.6), (.4, -.6), (.4, -.3), (.8, -.3), (1, .1),
                                              (1, .6), (-1, .6)]),
          "umbrella": ((160, 60, 170), "stripes", [(-1, .1), (-.75, -.45), (0, -.75), (.75, -.45),
                                                   (1, .1), (.15, .1), (.15, .8), (-.15, .8),
                                                   (-.15, .1)]),
          "kite": ((230, 40, 150), "checks", [(-.75, -.2), (0, -1), (.75, -.2), (0, 1)]),
          "airplane": ((175, 180, 190), "stripes", [(-1, -.75), (-.65, -.75), (-.45, -.3),
                                                    (.65, -.3), (1, .05), (.7, .35), (.25, .35),
                                                    (-.15, .8), (-.6, .8), (-.3, .35),
                                                    (-.85, .3)])}
RADIUS = (20, 40)                                   # of things; an exercise: docs/ablations.md
VISIBLE = 160                                       # pixels, 1 % of a scene: less is not named
PLURALS = {"sheep": "sheep", "bus": "buses"}
TOY_CLASSES = [[name] for name in (*STUFF, *THINGS)]
EXAMPLE = 5                                         # of `ToyScenes`: one with several things
MARK = "toy scene of SimZSS"                        # written into a PNG, to know it again


# --------------------------------------------------------------------------------------------------
# Scenes

def material(colour, pattern, noise, rng):
    """(128, 128, 3) float32: one material with its pattern, its colour a little off."""
    y, x = np.ogrid[:TOY_SIZE, :TOY_SIZE]
    x = x + rng.integers(TOY_SIZE)
    y = y + rng.integers(TOY_SIZE)
    if pattern == "plain":
        relief = 4 * noise
    elif pattern == "noise":
        relief = 18 * noise
    elif pattern == "waves":
        relief = 4 * noise + 25 * np.sin(0.8 * y + 2 * np.sin(0.1 * x))
    elif pattern == "stripes":
        relief = 4 * noise + 50 * np.sign(np.sin(1.3 * x))
    else:
        relief = 4 * noise + 60 * np.sign(np.sin(0.8 * x)) * np.sign(np.sin(0.8 * y))   # checks
    return (colour + rng.normal(0, 10, 3) + relief[..., None]).astype(np.float32)


def outline(corners, rng):
    """(128, 128) bool: where a thing of that outline is, of random size at a random place."""
    middle = rng.uniform(20, TOY_SIZE - 20, 2)
    points = middle + rng.uniform(*RADIUS) * np.array(corners)
    picture = Image.new("1", (TOY_SIZE, TOY_SIZE))
    ImageDraw.Draw(picture).polygon([tuple(point) for point in points], fill=1)
    return np.array(picture)


def toy_scene(rng):
    """Draw a scene: (image (128, 128, 3) uint8, mask (128, 128) uint8, caption).

    One ground, or two, one above the other; on it up to three things. Any thing may be anywhere, so
    that nothing but the captions tells which word belongs to which region.
    """
    grounds = list(rng.permutation(list(STUFF))[:1 if rng.random() < 0.3 else 2])
    grounds.sort(key=lambda name: name != "sky")    # never below another ground
    things = list(rng.choice(list(THINGS), rng.choice(4, p=(0.1, 0.4, 0.3, 0.2))))

    kinds = {**STUFF, **THINGS}
    noise = rng.standard_normal((TOY_SIZE, TOY_SIZE), np.float32)
    image = np.empty((TOY_SIZE, TOY_SIZE, 3), np.float32)
    part = np.empty((TOY_SIZE, TOY_SIZE), np.uint8)     # which ground or thing a pixel shows
    horizon = rng.integers(40, 88)
    for i, name in enumerate(grounds + things):
        colour, pattern, *corners = kinds[name]
        if corners:
            where = outline(*corners, rng)
        else:
            where = np.arange(TOY_SIZE) >= i * horizon      # rows
        image[where] = material(colour, pattern, noise, rng)[where]
        part[where] = i

    visible = {}                                    # class: pixels of each of its things
    for i, name in enumerate(grounds + things):
        pixels = (part == i).sum()
        if pixels >= VISIBLE:
            visible.setdefault(name, []).append(pixels)
    numbers = np.array([TOY_CLASSES.index([name]) for name in grounds + things], np.uint8)
    return image.clip(0, 255).astype(np.uint8), numbers[part], toy_caption(visible, rng)


def toy_caption(visible, rng):
    """A caption that names each visible class with probability 0.5, and at least one.

    visible: {class: pixels of each of its visible things}.
    """
    named = [name for name in visible if rng.random() < 0.5] or [rng.choice(list(visible))]
    things = [some_things(name, visible[name]) for name in named if name in THINGS]
    grounds = [f"the {rng.choice(['wide ', 'wet ', '', ''])}{name}"
               for name in named if name in STUFF and name != "sky"]
    caption = " and ".join(", ".join(things).rsplit(", ", 1))       # a, b and c
    if things and grounds:
        caption += f" {rng.choice(['on', 'near', 'in front of'])} "
    caption += " beside ".join(grounds)
    if "sky" in named:
        caption += " under " if caption else ""
        caption += f"{rng.choice(['a clear', 'a blue', 'the'])} sky"
    return caption


def some_things(name, pixels):
    """A class as people say it, such as "two cows" or "a large kite".

    pixels: of each of its things.
    """
    if len(pixels) > 1:
        return f"{'two' if len(pixels) == 2 else 'three'} {PLURALS.get(name, name + 's')}"
    size = "large " if pixels[0] > 2400 else "small " if pixels[0] < 900 else ""
    return f"{'an' if (size + name)[0] in 'aeiou' else 'a'} {size}{name}"


class ToyScenes(ScoredImages):
    """Toy scenes to score on; never those of training."""
    name = "toy"
    classes = TOY_CLASSES

    def __init__(self, count=100, seed=0):
        self.count = count
        self.seed = seed

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
        image, mask, _ = toy_scene(np.random.default_rng((self.seed, 1, i)))
        return f"toy{i:04d}", Image.fromarray(image), mask


def save_scene(image, path):
    """Write a scene as PNG, marked as one."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Description", MARK)
    save_png(path, image, pnginfo=info)


def is_scene(path):
    """Whether a file is a PNG of `save_scene`."""
    try:
        with Image.open(path) as image:
            return image.info.get("Description") == MARK
    except OSError:
        return False


def write_scenes(folder, count, seed=0):
    """Write a segmentation folder of scenes that are neither those of training nor those of
    `ToyScenes`. Raises FileExistsError for a folder that is there already."""
    folder = Path(folder)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for [name] in TOY_CLASSES))
    for i in range(count):
        image, mask, _ = toy_scene(np.random.default_rng((seed, 2, i)))
        save_scene(Image.fromarray(image), folder / "images" / f"scene{i:05d}.png")
        save_png(folder / "masks" / f"scene{i:05d}.png", Image.fromarray(mask))


# --------------------------------------------------------------------------------------------------
# Backbone

class ToyTrunk(nn.Module):
    """A hand-made backbone: nothing to download, nothing learned, nothing that ever saw a mask.

    A patch token describes one 8 x 8 patch by its colour and texture, with a little of the whole
    image, as in any transformer. The class token is *not* just the mean of the patch tokens: half
    of it is the image at a quarter of the resolution, where textures fade and small things melt
    into what is around them. The class offers what is used of a timm ViT.
    """
    patch_size = (8, 8)
    num_features = 128
    num_prefix_tokens = 1
    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        D = self.num_features
        self.register_buffer("frequency", 3 * torch.randn(8, D, generator=generator))
        self.register_buffer("phase", 2 * math.pi * torch.rand(D, generator=generator))

    def describe(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, N, D): random Fourier features of each patch's colour
        and texture."""
        grey = images.mean(1, keepdim=True)
        across = F.pad((grey[..., 1:] - grey[..., :-1]).abs(), (0, 1, 0, 0))
        down = F.pad((grey[..., 1:, :] - grey[..., :-1, :]).abs(), (0, 0, 0, 1))
        mean = F.avg_pool2d(torch.cat([images, 2 * across, 2 * down], 1), 8)        # (B, 5, h, w)
        variance = F.avg_pool2d(images ** 2, 8) - mean[:, :3] ** 2                  # (B, 3, h, w)
        statistics = torch.cat([mean, variance.clamp(min=0).sqrt()], 1)
        statistics = statistics.flatten(2).transpose(1, 2)                          # (B, N, 8)
        return F.normalize(torch.cos(statistics @ self.frequency + self.phase), dim=-1)

    def forward_features(self, images):
        patches = self.describe(images)                                             # (B, N, D)
        context = patches.mean(1, keepdim=True)                                     # (B, 1, D)
        size = [math.ceil(length / 32) * 8 for length in images.shape[-2:]]     # in whole patches
        glance = self.describe(F.interpolate(images, size, mode="area")).mean(1, keepdim=True)
        class_token = F.normalize(glance, dim=-1) + F.normalize(context, dim=-1)
        return torch.cat([class_token, patches + 0.3 * context], dim=1)             # (B, 1 + N, D)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write toy scenes as a segmentation folder.")
    add = parser.add_argument
    add("folder", help="folder to make, with images/, masks/ and classes.txt")
    add("--count", type=int, default=100, help="scenes (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    with one_line_errors("lower --count"):
        write_scenes(args.folder, args.count, args.seed)


if __name__ == "__main__":
    main()
