"""S-Seg+: a new network, trained on the label maps that S-Seg drew for a folder of images.

docs/sseg.md, section 6.2: no human label is used, but the result knows a closed list of
classes, and it has seen the images of the data set that it is scored on. Three commands:

    python segment.py train/images --classes classes.txt --checkpoint runs/sseg --output labels
    python train.py --method sseg-plus --train-data train/images --labels labels
    python eval.py --dataset val --checkpoint runs/sseg-plus

Letters beside those of model.py: K classes of the closed list.
"""
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

from machinery.networks import backbones
from machinery.names import normalise_name
from machinery.images import read_mask, to_pixels
from machinery.networks.layers import Normalise
from machinery.contract import Method, best_synonym
from machinery.parallel import sum_over_processes

POWER = 0.9                                         # of the learning rate's polynomial
PHOTOMETRIC = {ImageEnhance.Brightness: (0.875, 1.125), ImageEnhance.Contrast: (0.5, 1.5),
               ImageEnhance.Color: (0.5, 1.5)}      # ranges; each change is made in half the crops


# --------------------------------------------------------------------------------------------------
# Label maps

def read_class_list(folder):
    """The classes of a folder of label maps: lists of names, by their index in the maps.

    folder: what segment.py wrote, NAME_mask.png and NAME.json. Raises FileNotFoundError; ValueError
    for files of different classes.
    """
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise FileNotFoundError(f"no label maps in {folder}; expected NAME_mask.png and NAME.json, "
                                "as segment.py writes them")
    try:
        contents = [json.loads(file.read_text()) for file in files]
        lists = {json.dumps([content["names"], content["classes"]]) for content in contents}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds a JSON that segment.py did not write "
                         f"({error!r})") from None
    if len(lists) > 1:
        raise ValueError(f"{folder} holds label maps of {len(lists)} different lists of classes; "
                         "expected one, label all images with the same --classes and --background")
    names, classes = json.loads(lists.pop())
    synonyms = {known[0]: known for known in classes}
    return [synonyms.get(name, [name]) for name in names]       # the background has none


def jitter(image, mask, size, rng):
    """The same random part of an image and its label map (H, W), at a random scale.

    The short side becomes 0.5 to 2 times size; a square is cut out, and half of them are mirrored.
    What lies beyond the image is black, with the label -1. Returns an RGB image and (size, size)
    int64.
    """
    scale = size / min(image.size) * rng.uniform(0.5, 2)
    w, h = (max(1, round(length * scale)) for length in image.size)
    x = int(rng.integers(max(w - size, 0) + 1))
    y = int(rng.integers(max(h - size, 0) + 1))
    right = min(x + size, w)
    low = min(y + size, h)

    def cut(picture, resample):                     # only the part is resized
        fx = picture.width / w
        fy = picture.height / h
        return picture.resize((right - x, low - y), resample,
                              box=(x * fx, y * fy, right * fx, low * fy))

    part = Image.new("RGB", (size, size))
    part.paste(cut(image, Image.BICUBIC))
    labels = np.full((size, size), -1, np.int64)
    labels[:low - y, :right - x] = cut(Image.fromarray(mask.astype(np.int32)), Image.NEAREST)
    if rng.random() < 0.5:
        part = ImageOps.mirror(part)
        labels = labels[:, ::-1].copy()
    return part, labels


def change_colours(image, rng):
    for enhance, (low, high) in PHOTOMETRIC.items():
        if rng.random() < 0.5:
            image = enhance(image).enhance(rng.uniform(low, high))
    return image


# --------------------------------------------------------------------------------------------------
# The network

class SegmentationNetwork(nn.Module):
    """A timm ViT or CNN, all of it trained, and two convolutions: images -> logits of K classes.

    name: timm's, or "toy", of which only the convolutions learn. source: its initial weights, see
    `backbones.create_trunk`. mean, std: pixel statistics; None = the trunk's own. head_width:
    channels between the convolutions. options: of timm. The published head is UperNet.
    """

    def __init__(self, name, source, classes, head_width, mean, std, options):
        super().__init__()
        self.trunk = backbones.create_trunk(name, source, options)
        self.patch_size = backbones.patch_size(self.trunk)
        width = self.trunk.num_features
        self.head = nn.Sequential(nn.Conv2d(width, head_width, 3, padding=1, bias=False),
                                  nn.GroupNorm(32, head_width), nn.ReLU(),
                                  nn.Conv2d(head_width, classes, 1))
        mean = mean or self.trunk.pretrained_cfg["mean"]
        std = std or self.trunk.pretrained_cfg["std"]
        self.normalise = Normalise(mean, std)
        self.config = {"name": name, "head_width": head_width, "mean": list(mean),
                       "std": list(std), "options": options}

    def train(self, mode=True):
        super().train(mode)
        self.trunk.eval()       # batch statistics stay as they are: they would depend on processes
        return self

    def forward(self, pixels):
        """uint8 (B, 3, H, W) -> logits (B, K, h, w), and the size in pixels that they cover."""
        _, patches, (h, w) = backbones.tokens(self.trunk, self.normalise(pixels),
                                              self.config["name"])
        ph, pw = self.patch_size
        return self.head(patches.mT.unflatten(2, (h, w))), (h * ph, w * pw)


# --------------------------------------------------------------------------------------------------
# The whole

class SSegPlus(Method):
    """Cross-entropy of each pixel with its label. classes: K lists of names, the closed list."""

    name = "sseg-plus"
    RECIPE = {
        "backbone": "vit_base_patch16_224.mae",     # MAE                                  paper
        "image_size": 512,          #                                                      ours
        "batch": 16,                #                                                      ours
        "steps": 20_000,            # VOC; 40,000 for Context, 80,000 for COCO             ours
        "base_rate": 1.6e-3,        # 1e-4 at 16                                           ours
        "warmup": 0.075,            # 1,500 steps                                          ours
        "weight_decay": 0.05,       #                                                      ours
        "beta2": 0.999,             #                                                      ours
        "eps": 1e-8,                #                                                      ours
    }
    # The first two do nothing but mark every result.
    PROTOCOL = {"closed_set": True, "seen_target_images": True,
                "short_side": 512, "window": 512, "stride": 256}
    NEEDS_CAPTIONS = False
    NEEDS_CONCEPTS = False
    CONFIG = ("network", "classes")

    def __init__(self, network, classes, layer_decay=0.65):
        super().__init__()
        self.network = network
        self.classes = classes
        self.layer_decay = layer_decay

    @staticmethod
    def add_flags(parser):
        backbones.add_flags(parser, None)
        add = parser.add_argument_group("S-Seg+; --backbone is trained").add_argument
        add("--labels", metavar="FOLDER",
            help="label maps of the images of --train-data, a folder that segment.py wrote")
        add("--head-width", type=int, default=256, help="a multiple of 32 (default: %(default)s)")
        add("--layer-decay", type=float, default=0.65,
            help="learning rate of a layer of the backbone, as a share of that of the next "
                 "layer, nearer to the output (default: %(default)s)")

    @staticmethod
    def check_flags(args):
        if args.labels is None or args.train_data == "toy":
            raise ValueError("sseg-plus needs a folder of images, --train-data FOLDER, and one of "
                             "their label maps, --labels FOLDER, which segment.py writes")
        if args.denoiser or args.image_token != "class":
            raise ValueError("--denoiser and --image-token are for a frozen backbone")
        backbones.check_flags(args)
        if args.head_width < 32 or args.head_width % 32:
            raise ValueError(f"--head-width {args.head_width}: expected a multiple of 32")
        if not 0 < args.layer_decay <= 1:
            raise ValueError(f"--layer-decay {args.layer_decay}: expected a share, more than 0 and "
                             "at most 1")

    @classmethod
    def build(cls, args, bank):
        settings = backbones.from_flags(args)
        source = backbones.source(args.backbone, settings["pretrained"], settings["weights"])
        options = {key: value for key, value in settings.items()
                   if key in backbones.SHAPE_OPTIONS}
        classes = read_class_list(args.labels)
        network = SegmentationNetwork(args.backbone, source, len(classes), args.head_width,
                                      args.pixel_mean, args.pixel_std, options)
        return cls(network, classes, args.layer_decay)

    @classmethod
    def rebuild(cls, config):
        network = config["network"]
        source = "pretrained" if network["name"] == "toy" else "random"     # a checkpoint has all
        return cls(SegmentationNetwork(source=source, classes=len(config["classes"]), **network),
                   config["classes"], config["layer_decay"])

    def config(self):
        return {"network": self.network.config, "classes": self.classes,
                "layer_decay": self.layer_decay}

    # Training

    @staticmethod
    def sample(pair, size, rng, labels, classes):
        """pixels uint8 (3, size, size), labels (size, size). Raises ValueError for a label map with
        an index that is no class, or of another shape than its image."""
        if pair.path is None:
            raise ValueError("sseg-plus needs image files, whose names find their label maps; not "
                             "tars")
        path = labels / f"{pair.path.stem}_mask.png"
        mask = read_mask(path)
        if mask.max() >= classes:
            raise ValueError(f"{path} holds {mask.max()}; expected 0 to {classes - 1}")
        photo = pair.image()                        # a JPEG may come reduced: the ratio counts
        h, w = mask.shape
        if abs(photo.width * h - photo.height * w) > 2 * max(h, w):
            raise ValueError(f"{path} is {w} x {h}, its image {photo.width} x {photo.height}: not "
                             "of the same shape")
        image, target = jitter(photo, mask, size, rng)
        return {"pixels": to_pixels(change_colours(image, rng)), "labels": torch.from_numpy(target)}

    @classmethod
    def sampler(cls, args):
        return partial(cls.sample, size=args.image_size, labels=Path(args.labels),
                       classes=len(read_class_list(args.labels)))

    @staticmethod
    def learning_rate(step, steps, peak, warmup, final):
        """Linear warm-up over a share of the steps, then (1 - t) ** POWER down to final x peak."""
        rising = max(1, round(warmup * steps))
        if step < rising:
            return peak * (step + 1) / rising
        left = 1 - (step - rising) / (steps - rising)
        return peak * (final + (1 - final) * left ** POWER)

    def groups(self):
        """Layers of the backbone learn more slowly, the nearer they are to the image."""
        head = list(self.network.head.parameters())
        groups = [{"params": [p for p in head if p.ndim >= 2], "decay": 1.0, "rate": 1.0},
                  {"params": [p for p in head if p.ndim < 2], "decay": 0.0, "rate": 1.0}]
        trunk = self.network.trunk
        if list(trunk.parameters()):                # the toy trunk has none
            from timm.optim import param_groups_layer_decay
            undecayed = trunk.no_weight_decay() if hasattr(trunk, "no_weight_decay") else ()
            layers = param_groups_layer_decay(trunk, 1.0, undecayed, layer_decay=self.layer_decay)
            groups += [{"params": layer["params"], "decay": layer["weight_decay"],
                        "rate": self.layer_decay * layer["lr_scale"]} for layer in layers]
        return groups

    def losses(self, batch):
        labels = batch["labels"]                                                    # (B, H, W)
        with self.autocast():
            logits, covered = self.network(batch["pixels"])                         # (B, K, h, w)
        logits = F.interpolate(logits.float(), covered, mode="bilinear", align_corners=False)
        logits = logits[..., :labels.shape[-2], :labels.shape[-1]]
        count = sum_over_processes((labels >= 0).sum().float())
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        right = (logits.argmax(dim=1) == labels).sum().float()
        return {"loss": sum_over_processes(loss) / count,
                "right": sum_over_processes(right) / count}

    # Inference

    def prepare(self, protocol):
        protocol.update(closed_set=True, seen_target_images=True)   # facts, no settings

    def embed_classes(self, classes, templates=("{}",), **options):
        """Names -> rows (C, S, K) that pick their class out of the closed list. Raises ValueError
        for a class none of whose names is in it."""
        place = {normalise_name(name): i for i, names in enumerate(self.classes) for name in names}
        found = []
        for names in classes:
            names = [names] if isinstance(names, str) else names
            known = [place[normalise_name(name)] for name in names if normalise_name(name) in place]
            if not known:
                listed = ", ".join(names[0] for names in self.classes)
                raise ValueError(f"{names[0]!r} is not in the closed list of this model: {listed}")
            found.append(known)
        S = max(map(len, found))
        index = torch.tensor([known + known[:1] * (S - len(known)) for known in found])
        return F.one_hot(index, len(self.classes)).float().to(self.device)

    @torch.no_grad()
    def patch_scores(self, pixels, class_embeddings):
        """Probabilities among the K classes (B, C, h, w), and the size that they cover."""
        logits, covered = self.network(pixels)
        shares = logits.softmax(dim=1)                                              # (B, K, h, w)
        scores = best_synonym(shares.flatten(2).mT, class_embeddings)               # (B, C, N)
        return scores.unflatten(-1, shares.shape[-2:]), covered
