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
from machinery.images import ScoredImages

TOY_SIZE = 128                                      # pixels a side
STUFF = {"sky": ((150, 200, 250), "plain"), "sea": ((30, 90, 190), "waves"),
         "grass": ((60, 150, 50), "noise"), "sand": ((220, 195, 130), "noise"),
         "road": ((110, 110, 115), "plain"), "snow": ((240, 240, 245), "noise")}
THINGS = {"boat": ((130, 60, 30), "stripes", "hull"),
          "surfboard": ((245, 220, 40), "plain", "oval"),
          "cow": ((70, 60, 55), "stripes", "oval"), "sheep": ((225, 215, 195), "checks", "oval"),
          "horse": ((125, 70, 35), "plain", "oval"), "car": ((200, 30, 35), "plain", "box"),
          "bus": ((240, 140, 20), "stripes", "box"), "truck": ((40, 50, 120), "checks", "box"),
          "umbrella": ((160, 60, 170), "stripes", "hull"), "dog": ((70, 45, 30), "noise", "oval"),
          "kite": ((230, 40, 150), "checks", "diamond"),
          "airplane": ((175, 180, 190), "stripes", "oval")}
HOME = {"sea": ("boat", "surfboard"), "grass": ("cow", "sheep", "horse"),
        "road": ("car", "bus", "truck"), "sand": ("umbrella", "dog"), "snow": ("dog",),
        "sky": ("kite", "airplane")}                # where things usually are
PLURALS = {"sheep": "sheep", "bus": "buses"}
TOY_CLASSES = [[name] for name in (*STUFF, *THINGS)]
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
        relief = 25 * noise
    elif pattern == "waves":
        relief = 4 * noise + 25 * np.sin(0.8 * y + 2 * np.sin(0.1 * x))
    elif pattern == "stripes":
        relief = 4 * noise + 50 * np.sign(np.sin(1.3 * x))
    else:
        relief = 4 * noise + 60 * np.sign(np.sin(0.8 * x)) * np.sign(np.sin(0.8 * y))   # checks
    return (colour + rng.normal(0, 10, 3) + relief[..., None]).astype(np.float32)


def outline(shape, x, y, r):
    """(128, 128) bool: where a thing of that shape and radius is."""
    picture = Image.new("1", (TOY_SIZE, TOY_SIZE))
    draw = ImageDraw.Draw(picture)
    q = 0.6 * r
    corners = {"box": [(x - r, y - q), (x + r, y - q), (x + r, y + q), (x - r, y + q)],
               "hull": [(x - r, y - q), (x + r, y - q), (x + q, y + q), (x - q, y + q)],
               "diamond": [(x - q, y), (x, y - r), (x + q, y), (x, y + r)]}
    if shape == "oval":
        draw.ellipse((x - r, y - q, x + r, y + q), fill=1)
    else:
        draw.polygon(corners[shape], fill=1)
    return np.array(picture)


class Canvas:
    """A scene while it is drawn: a ground under a sky, and then things."""

    def __init__(self, ground, rng):
        self.names = [*STUFF, *THINGS]
        self.rng = rng
        self.horizon = rng.integers(30, 60)
        self.noise = rng.standard_normal((TOY_SIZE, TOY_SIZE), np.float32)
        self.image = material(*STUFF["sky"], self.noise, rng)
        self.mask = np.zeros((TOY_SIZE, TOY_SIZE), np.uint8)
        self.image[self.horizon:] = material(*STUFF[ground], self.noise, rng)[self.horizon:]
        self.mask[self.horizon:] = self.names.index(ground)

    def put(self, thing, low, high):
        """Draw a thing with its middle between two heights. Returns its name as people say it."""
        rng = self.rng
        colour, pattern, shape = THINGS[thing]
        radius = rng.uniform(12, 26)
        where = outline(shape, rng.uniform(20, 108), rng.uniform(low, high), radius)
        self.image[where] = material(colour, pattern, self.noise, rng)[where]
        self.mask[where] = self.names.index(thing)
        size = "large " if radius > 22 else "small " if radius < 16 else ""
        article = "an" if not size and thing[0] in "aeiou" else "a"
        return f"{article} {size}{thing}"

    def some_thing(self, ground):
        """A thing, in nine of ten cases one that is at home on the ground."""
        elsewhere = [thing for thing in THINGS if thing not in HOME["sky"]]
        return str(self.rng.choice(HOME[ground] if self.rng.random() < 0.9 else elsewhere))


def toy_scene(rng):
    """Draw a scene: (image (128, 128, 3) uint8, mask (128, 128) uint8, caption).

    As people do, the caption names mostly the things, at times the ground, seldom the sky. So the
    caption of the whole image alone leaves open what a word means: a boat comes with the sea around
    it, which is most of what one sees.
    """
    ground = str(rng.choice([name for name in STUFF if name != "sky"]))
    canvas = Canvas(ground, rng)
    first = canvas.some_thing(ground)
    things = [canvas.put(first, canvas.horizon + 10, 85)]
    if rng.random() < 0.2:
        canvas.put(first, 90, 118)
        things = [f"two {PLURALS.get(first, first + 's')}"]
    elif rng.random() < 0.5:
        things.append(canvas.put(canvas.some_thing(ground), 90, 118))
    if rng.random() < 0.4:
        flying = str(rng.choice(HOME["sky"]))
        things.append(canvas.put(flying, 10, canvas.horizon - 12))
    rng.shuffle(things)
    image = canvas.image.clip(0, 255).astype(np.uint8)
    return image, canvas.mask, toy_caption(things, ground, rng)


def toy_caption(things, ground, rng):
    """A caption of a scene with these things, in the words that `Canvas.put` gave."""
    ground = f"the {rng.choice(['wide ', 'wet ', '', ''])}{ground}"
    sky = f"{rng.choice(['a clear', 'a blue', 'the'])} sky"
    form = rng.random()
    if form < 0.1:
        return f"{ground} under {sky}" if rng.random() < 0.5 else ground
    if form < 0.3:
        return things[0]
    caption = " and ".join(things[:2])
    if form < 0.75:
        caption += f" {rng.choice(['on', 'near', 'in front of'])} {ground}"
    if rng.random() < 0.3:
        caption += f" under {sky}"
    return caption


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
    image.save(path, pnginfo=info)


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
        Image.fromarray(mask).save(folder / "masks" / f"scene{i:05d}.png")


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
