"""S-Seg+: a new network, trained on the label maps that S-Seg drew for a folder of images.

docs/sseg.md, section 4: no human label is used, but the result knows a closed list of
classes, and it has seen the images of the data set that it is scored on. Three commands:

    python segment.py train/images --classes classes.txt --checkpoint runs/sseg --output labels
    python train.py --recipe sseg-plus --train-data train/images --labels labels
    python eval.py --dataset val --checkpoint runs/sseg-plus

Letters beside those of model.py: K classes of the closed list.
"""
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from machinery.contract import Method, Protocol
from machinery.images import read_mask, refuse_other_shape, to_pixels
from machinery.names import normalise_name, split_names
from machinery.networks import backbones
from machinery.networks.layers import Normalise
from machinery.parallel import sum_over_processes
from machinery.settings import MISSING, check_value, setting
from machinery.training.shards import BadSample
from model import BackboneSettings, best_synonym, create_trunk, patch_tokens

# Brightness, contrast and saturation change by up to these fractions
CHANGE_COLOURS = v2.ColorJitter(0.125, 0.5, 0.5)


# --------------------------------------------------------------------------------------------------
# Settings

@dataclass
class SSegPlusSettings:
    """The network, all of it trained, and its label maps."""
    labels: str = setting(
        MISSING, "folder of the label maps of the training images, which segment.py wrote")
    backbone: BackboneSettings = setting(BackboneSettings, "what the network starts from")
    head_width: int = setting(
        256, "channels between the two convolutions, a multiple of 32", least=32)
    layer_decay: float = setting(
        0.65, "learning rate of a layer of the backbone, as a fraction of that of the next layer, "
        "nearer to the output", above=0, most=1)

    def check(self):
        if self.head_width % 32:
            raise ValueError(f"head_width is {self.head_width}; expected a multiple of 32")
        if self.backbone.denoiser or self.backbone.image_token != "class":
            raise ValueError("denoiser and image_token are for a frozen backbone; this one is "
                             "trained")


@dataclass
class SSegPlusProtocol(Protocol):
    """Two facts beside the settings, which mark every result."""
    closed_set: bool = setting(
        True, "only classes of its list can be asked for", choices=(True,), flag=False)
    seen_target_images: bool = setting(
        True, "it was trained on images of the target data set", choices=(True,), flag=False)


# --------------------------------------------------------------------------------------------------
# Label maps

def read_class_list(folder):
    """The classes of a folder of label maps: their names with commas between, by their index in the
    maps.

    folder: what segment.py wrote, NAME_mask.png and NAME.json. Raises FileNotFoundError; ValueError
    for files of different classes.
    """
    maps = list(Path(folder).glob("*_mask.png"))
    if not maps:
        raise FileNotFoundError(f"no label maps in {folder}; expected NAME_mask.png and NAME.json, "
                                "as segment.py writes them")
    lists = {read_class_names(path.with_name(path.name.replace("_mask.png", ".json")))
             for path in maps}
    if len(lists) > 1:
        raise ValueError(f"{folder} holds label maps of {len(lists)} different lists of classes; "
                         "expected one, label all images with the same --classes and --background")
    names, classes = lists.pop()
    synonyms = {known[0]: ", ".join(known) for known in classes}
    return [synonyms.get(name, name) for name in names]         # the background has no synonyms


def read_class_names(path):
    """(names of a map's values, (names of each class)) of a JSON beside a map. Raises ValueError.
    """
    try:
        content = json.loads(path.read_text())
        names = check_value(content["names"], tuple[str, ...], {}, "names")
        classes = tuple(check_value(known, tuple[str, ...], {}, "classes")
                        for known in content["classes"])
        if not names or not all(classes):
            raise ValueError("a class without a name")
        return names, classes
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not say the classes of its label map, as segment.py writes "
                         f"it ({error!r})") from None


@lru_cache(maxsize=None)
def count_classes(folder):
    return len(read_class_list(folder))


def cut_out(image, labels, size):
    """The same random square of a PIL image and its labels (H, W) int64, at a random scale.

    The short side becomes 0.5 to 2 times size, and half of the squares are mirrored. What lies
    beyond the image is black, with the label -1. Returns a PIL image and (size, size) int64.
    """
    change = v2.Compose([
        v2.RandomShortestSize(range(size // 2, 2 * size + 1), interpolation="bicubic"),
        v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Mask: -1, "others": 0}),
        v2.RandomHorizontalFlip()])
    image, labels = change(image, tv_tensors.Mask(labels))
    return image, labels.as_subclass(torch.Tensor)


# --------------------------------------------------------------------------------------------------
# The whole

class SSegPlus(Method):
    """A timm ViT or CNN, all of it trained, and two convolutions (the published head is UperNet).
    Of the toy backbone only the convolutions learn. Loss: cross-entropy of each pixel.

    bank: the closed list, K texts of a class's names with commas between; in training it is that of
    the label maps.
    """

    name = "sseg-plus"
    Settings = SSegPlusSettings
    Protocol = SSegPlusProtocol
    NEEDS_CONCEPTS = False
    ROWS_INDEPENDENT = True

    def __init__(self, settings, bank=(), training=False):
        super().__init__(settings, read_class_list(settings.labels) if training else bank)
        backbone = settings.backbone
        weights = backbone.weights if training else "random"        # a checkpoint has them all
        self.trunk = create_trunk(backbone.name, weights, backbone.options)
        self.patch_size = backbones.patch_size(self.trunk)
        self.head = nn.Sequential(
            nn.Conv2d(self.trunk.num_features, settings.head_width, 3, padding=1, bias=False),
            nn.GroupNorm(32, settings.head_width), nn.ReLU(),
            nn.Conv2d(settings.head_width, len(self.bank), 1))
        statistics = self.trunk.pretrained_cfg
        self.normalise = Normalise(backbone.mean or statistics["mean"],
                                   backbone.std or statistics["std"])

    def train(self, mode=True):
        super().train(mode)
        self.trunk.eval()       # batch statistics stay as they are: they would depend on processes
        return self

    def logits(self, pixels):
        """uint8 (B, 3, H, W) -> logits (B, K, h, w), and the size in pixels that they cover."""
        _, patches, (h, w) = patch_tokens(self.trunk, self.normalise(pixels))
        ph, pw = self.patch_size
        return self.head(patches.mT.unflatten(2, (h, w))), (h * ph, w * pw)

    # Training

    @staticmethod
    def sample(pair, rng, settings):
        """pixels uint8 (3, size, size), labels (size, size). Raises ValueError for a label map with
        an index that is no class, or of another shape than its image."""
        if pair.path is None:
            raise ValueError("sseg-plus needs image files, whose names find their label maps: "
                             "--train-data FOLDER; not tars, nor the toy world")
        path = Path(settings.labels) / f"{pair.path.stem}_mask.png"
        if not path.is_file():
            raise BadSample("no mask")
        labels = torch.from_numpy(read_mask(path)).long()                           # (H, W)
        classes = count_classes(settings.labels)
        if labels.max() >= classes:
            raise ValueError(f"{path} holds {labels.max()}; expected 0 to {classes - 1}")
        image = pair.image()
        refuse_other_shape(path, labels, image)
        labels = F.interpolate(labels[None, None].float(), (image.height, image.width))[0, 0].long()
        image, labels = cut_out(image, labels, pair.size)
        return {"pixels": to_pixels(CHANGE_COLOURS(image)), "labels": labels}

    def parameter_groups(self):
        """Layers of the backbone learn more slowly, the nearer they are to the image."""
        head = list(self.head.parameters())
        groups = [{"params": [p for p in head if p.ndim >= 2], "decay": 1.0, "rate": 1.0},
                  {"params": [p for p in head if p.ndim < 2], "decay": 0.0, "rate": 1.0}]
        if list(self.trunk.parameters()):           # the toy trunk has none
            from timm.optim import param_groups_layer_decay
            undecayed = getattr(self.trunk, "no_weight_decay", tuple)()     # a CNN says nothing
            decay = self.settings.layer_decay
            layers = param_groups_layer_decay(self.trunk, 1.0, undecayed, layer_decay=decay)
            groups += [{"params": layer["params"], "decay": layer["weight_decay"],
                        "rate": decay * layer["lr_scale"]} for layer in layers]
        return groups

    def encode(self, batch):
        """logits (B, K, h, w)."""
        with self.autocast():
            return {"logits": self.logits(batch["pixels"])[0]}

    def losses(self, encoded, batch):
        labels = batch["labels"]                                                    # (B, H, W)
        H, W = labels.shape[-2:]
        logits = encoded["logits"].float()                                          # (B, K, h, w)
        covered = [n * side for n, side in zip(logits.shape[-2:], self.patch_size)]
        logits = F.interpolate(logits, covered, mode="bilinear", align_corners=False)[..., :H, :W]
        labelled = sum_over_processes((labels >= 0).sum().float())
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        right = (logits.argmax(dim=1) == labels).sum().float()
        return {"loss": sum_over_processes(loss) / labelled,
                "right": sum_over_processes(right) / labelled}

    # Inference

    def embed_classes(self, classes, templates=("{}",)):
        """Names -> rows (C, S, K) that pick their class out of the closed list. Raises ValueError
        for a class none of whose names is in it."""
        place = {normalise_name(name): i for i, names in enumerate(self.bank)
                 for name in split_names(names)}
        found = []
        for names in classes:
            names = [names] if isinstance(names, str) else names
            known = [place[normalise_name(name)] for name in names if normalise_name(name) in place]
            if not known:
                listed = ", ".join(split_names(names)[0] for names in self.bank)
                raise ValueError(f"{names[0]!r} is not in the closed list of this model: {listed}")
            found.append(known)
        S = max(map(len, found))
        index = torch.tensor([known + known[:1] * (S - len(known)) for known in found])
        return F.one_hot(index, len(self.bank)).float().to(self.device)

    @torch.no_grad()
    def patch_scores(self, pixels, class_embeddings):
        """Probabilities among the K classes (B, C, h, w), and the size that they cover."""
        logits, covered = self.logits(pixels)
        probabilities = logits.softmax(dim=1)                                       # (B, K, h, w)
        scores = best_synonym(probabilities.flatten(2).mT, class_embeddings)        # (B, C, N)
        return scores.unflatten(-1, probabilities.shape[-2:]), covered
