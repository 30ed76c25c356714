"""The toy world: drawn scenes with captions and masks, and a hand-made backbone."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

TOY_SIZE = 128                                      # pixels a side

STUFF = {"sky": ((150, 200, 250), "plain"), "sea": ((30, 90, 190), "waves"), "grass": ((60, 150, 50), "noise"),
         "sand": ((220, 195, 130), "noise"), "road": ((110, 110, 115), "plain"), "snow": ((240, 240, 245), "noise")}

THINGS = {"boat": ((130, 60, 30), "stripes", "hull"), "surfboard": ((245, 220, 40), "plain", "oval"),
          "cow": ((70, 60, 55), "stripes", "oval"), "sheep": ((225, 215, 195), "checks", "oval"),
          "horse": ((125, 70, 35), "plain", "oval"), "car": ((200, 30, 35), "plain", "box"),
          "bus": ((240, 140, 20), "stripes", "box"), "truck": ((40, 50, 120), "checks", "box"),
          "umbrella": ((160, 60, 170), "stripes", "hull"), "dog": ((70, 45, 30), "noise", "oval"),
          "kite": ((230, 40, 150), "checks", "diamond"), "airplane": ((175, 180, 190), "stripes", "oval")}

HOME = {"sea": ("boat", "surfboard"), "grass": ("cow", "sheep", "horse"), "road": ("car", "bus", "truck"),
        "sand": ("umbrella", "dog"), "snow": ("dog",), "sky": ("kite", "airplane")}

TOY_CLASSES = [[name] for name in (*STUFF, *THINGS)]

PLURALS = {"sheep": "sheep", "bus": "buses"}



def _material(colour, kind, noise, rng):
    """(128, 128, 3) float32: one material, its colour a little off, with its pattern."""
    y, x = np.ogrid[:TOY_SIZE, :TOY_SIZE]
    x, y = x + rng.integers(TOY_SIZE), y + rng.integers(TOY_SIZE)
    pattern = {"plain": lambda: 4 * noise, "noise": lambda: 25 * noise,
               "waves": lambda: 4 * noise + 25 * np.sin(0.8 * y + 2 * np.sin(0.1 * x)),
               "stripes": lambda: 4 * noise + 50 * np.sign(np.sin(1.3 * x)),
               "checks": lambda: 4 * noise + 60 * np.sign(np.sin(0.8 * x)) * np.sign(np.sin(0.8 * y))}[kind]()
    return (colour + rng.normal(0, 10, 3) + pattern[..., None]).astype(np.float32)



def _outline(kind, x, y, r):
    """(128, 128) bool: where a thing of that shape and radius is."""
    picture, q = Image.new("1", (TOY_SIZE, TOY_SIZE)), 0.6 * r
    draw = ImageDraw.Draw(picture)
    if kind == "oval":
        draw.ellipse((x - r, y - q, x + r, y + q), fill=1)
    else:
        draw.polygon({"box": [(x - r, y - q), (x + r, y - q), (x + r, y + q), (x - r, y + q)],
                      "hull": [(x - r, y - q), (x + r, y - q), (x + q, y + q), (x - q, y + q)],
                      "diamond": [(x - q, y), (x, y - r), (x + q, y), (x, y + r)]}[kind], fill=1)
    return np.array(picture)



def toy_scene(rng):
    """Draw a scene and say what is in it: (image (128, 128, 3) uint8, mask (128, 128) uint8, caption).

    A ground under a sky and small things, which are usually at home there. As people do, the caption names mostly the
    things, at times the ground, seldom the sky. So the caption of the whole image alone leaves open what a word means:
    a boat comes with the sea around it, which is most of what one sees.
    """
    names = [*STUFF, *THINGS]
    ground = str(rng.choice([name for name in STUFF if name != "sky"]))
    horizon = rng.integers(30, 60)
    noise = rng.standard_normal((TOY_SIZE, TOY_SIZE), np.float32)
    image, mask = _material(*STUFF["sky"], noise, rng), np.zeros((TOY_SIZE, TOY_SIZE), np.uint8)
    image[horizon:] = _material(*STUFF[ground], noise, rng)[horizon:]
    mask[horizon:] = names.index(ground)

    def put(thing, low, high):
        """Draw a thing with its middle between two heights; say what was drawn."""
        colour, material, shape = THINGS[thing]
        radius = rng.uniform(12, 26)
        where = _outline(shape, rng.uniform(20, 108), rng.uniform(low, high), radius)
        image[where] = _material(colour, material, noise, rng)[where]
        mask[where] = names.index(thing)
        size = "large " if radius > 22 else "small " if radius < 16 else ""
        return f"{'an' if not size and thing[0] in 'aeiou' else 'a'} {size}{thing}"

    def some(place):                                # nine in ten things are where they belong
        elsewhere = [thing for thing in THINGS if thing not in HOME["sky"]]
        return str(rng.choice(HOME[place] if rng.random() < 0.9 else elsewhere))

    first = some(ground)
    said = [put(first, horizon + 10, 85)]
    if rng.random() < 0.2:
        put(first, 90, 118)
        said = [f"two {PLURALS.get(first, first + 's')}"]
    elif rng.random() < 0.5:
        said.append(put(some(ground), 90, 118))
    if rng.random() < 0.4:
        said.append(put(str(rng.choice(HOME["sky"])), 10, horizon - 12))
    rng.shuffle(said)
    place = f"the {rng.choice(['wide ', 'wet ', '', ''])}{ground}"
    sky = f"{rng.choice(['a clear', 'a blue', 'the'])} sky"
    form = rng.random()
    if form < 0.1:
        caption = f"{place} under {sky}" if rng.random() < 0.5 else place
    elif form < 0.3:
        caption = said[0]
    else:
        caption = " and ".join(said[:2])
        if form < 0.75:
            caption += f" {rng.choice(['on', 'near', 'in front of'])} {place}"
        if rng.random() < 0.3:
            caption += f" under {sky}"
    return image.clip(0, 255).astype(np.uint8), mask, caption



class ToyScenes:
    """Toy scenes to score on, in the form of eval.py's datasets; never those of training."""
    name, classes = "toy", TOY_CLASSES

    def __init__(self, count=100, seed=0):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
        image, mask, _ = toy_scene(np.random.default_rng((self.seed, 1, i)))
        return f"toy{i:04d}", Image.fromarray(image), mask



class ToyTrunk(nn.Module):
    """A hand-made backbone for the toy world: nothing to download, nothing learned, nothing that ever saw a mask.

    A patch token describes one 8 x 8 patch by its colour and texture, with a touch of the whole image as in any
    transformer. As there too, the class token is *not* just the mean of the patch tokens: half of it is the image at
    a glance, from a quarter of the resolution, where textures fade and small things melt into what is around them.
    The class offers what is used of a timm ViT.
    """
    patch_size, num_features, num_prefix_tokens = (8, 8), 128, 1
    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequency", 3 * torch.randn(8, self.num_features, generator=generator))
        self.register_buffer("phase", 2 * math.pi * torch.rand(self.num_features, generator=generator))

    def describe(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, H * W / 64, D): random Fourier features of each patch's mean and spread."""
        grey = images.mean(1, keepdim=True)
        across = F.pad((grey[..., 1:] - grey[..., :-1]).abs(), (0, 1, 0, 0))
        down = F.pad((grey[..., 1:, :] - grey[..., :-1, :]).abs(), (0, 0, 0, 1))
        mean = F.avg_pool2d(torch.cat([images, 2 * across, 2 * down], 1), 8)            # (B, 5, h, w)
        spread = (F.avg_pool2d(images ** 2, 8) - mean[:, :3] ** 2).clamp(min=0).sqrt()  # (B, 3, h, w)
        statistics = torch.cat([mean, spread], 1).flatten(2).transpose(1, 2)            # (B, N, 8)
        return F.normalize(torch.cos(statistics @ self.frequency + self.phase), dim=-1)  # (B, N, D)

    def forward_features(self, images):
        patches = self.describe(images)
        context = patches.mean(1, keepdim=True)
        size = [-(-length // 32) * 8 for length in images.shape[-2:]]                   # a quarter, in whole patches
        glance = self.describe(F.interpolate(images, size, mode="area")).mean(1, keepdim=True)
        class_token = F.normalize(glance, dim=-1) + F.normalize(context, dim=-1)
        return torch.cat([class_token, patches + 0.3 * context], dim=1)                 # (B, 1 + N, D)
