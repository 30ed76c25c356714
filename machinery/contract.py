"""The contract of a method: all that train.py, segment.py and eval.py ask of it.

A new method is one file with a subclass of `Method`, one line in METHODS and a recipe.
methods/simzss_prompts.py is the smallest example, tests/linear_method.py one that inherits nothing,
`SimZSS` in model.py the whole one. A method has to have `name`, `Settings`, `sample`, `encode`,
`losses`, `embed_classes` and `patch_scores`; all else has a default.
"""
import importlib
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from machinery.settings import setting

# method = "NAME" in a recipe -> its class, imported on demand. The one place where machinery knows
# files above it, by their names only.
METHODS = {
    "simzss": "model.SimZSS",
    "simzss-prompts": "methods.simzss_prompts.SimZSSPrompts",
    "sseg": "methods.sseg.SSeg",
    "sseg-plus": "methods.sseg_plus.SSegPlus",
    "ovsegmentor": "methods.ovsegmentor.OVSegmentor",
    "pixelclip": "methods.pixelclip.PixelCLIP",
}
# --checkpoint NAME, or NAME:which, needs no training: the method, and the setting that `which` is
PRETRAINED = {"clip": ("pixelclip", "clip_model")}


def find_method(name):
    """The class of a method by its name. Raises ValueError for a name that is not in METHODS."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    module, _, class_name = METHODS[name].rpartition(".")
    return getattr(importlib.import_module(module), class_name)


@dataclass
class Protocol:
    """How a model is used at test time. A method adds fields of its own in a subclass."""
    templates: str = setting(
        "imagenet80", "prompt templates: imagenet80, simple7, photo, plain, or a file with one per "
        "line")
    short_side: int = setting(448, "pixels of the resized photo's short side", least=1)
    window: int = setting(448, "pixels of the sliding window", least=1)
    stride: int = setting(224, "pixels from one window to the next", least=1)
    scales: tuple[float, ...] = setting(
        (1.0,), "sizes of the photo, such as 1 1.5 times the short side, over which scores are "
        "averaged", above=0, most=16)
    refine_steps: int = setting(
        0, "steps of pixel-adaptive refinement, which moves borders to those of the photo's "
        "colours; 10 is usual", least=0, most=1000)
    propagate: float = setting(
        0.0, "how far patches that look alike, and lie near, share their scores, if the method has "
        "patch tokens of unit norm; 0 = not", least=0, most=0.999)
    image_weight: float = setting(
        0.0, "weight of the whole image's score for a class, which is added to each patch's; helps "
        "if a photo shows few of the classes")
    blend: str = setting(
        "mean", "of windows that overlap: mean, all count alike; triangle, they count less towards "
        "their borders, so that no seam shows", choices=("mean", "triangle"))
    background: str | None = setting(
        None, "what is none of the classes: threshold:T = pixels whose best score is at most T; "
        'prompt:"word, word" = what these words win; or none')

    def check(self):
        if self.stride > self.window:
            raise ValueError(f"stride {self.stride} is more than the window of {self.window}; "
                             "pixels would be left out")
        if not self.scales:
            raise ValueError("scales is empty; expected at least one")


class Method(nn.Module):
    """A model with its losses, its data and its way to segment.

    settings: of the class's `Settings`, a dataclass of machinery/settings.py.
    bank: the name of each concept that training knows, texts.
    training: whether what only training needs is built, too. Without it a checkpoint's tensors are
        filled in.
    """

    name = ""                       # its key in METHODS
    Settings = None                 # dataclass of its settings, "model" in a recipe
    Protocol = Protocol             # dataclass of its settings at test time, "protocol" in a recipe
    NEEDS_CONCEPTS = True           # whether training needs the captions' concepts
    ROWS_INDEPENDENT = False        # `encode` treats each row by itself, so --micro-batch is exact
    ROW_BYTES = None                # (bytes of one row of the batch with its features, bytes that
                                    # `encode` keeps of it for the backward pass in bf16). train.py
                                    # chooses a GPU's micro-batch by them; None = the whole batch
    FROZEN = ()                     # name prefixes of tensors that never change and are not saved:
                                    # the constructor always makes the same ones
    TRAINING_ONLY = ()              # name prefixes of parts that only training needs (a teacher)
    TOKEN_TABLE = "text.tower.token_embedding.weight"   # name of the token embeddings: a token
                                    # whose row had a gradient counts as seen in training
    WEIGHTS = "backbone.weights"    # the setting that --backbone-weights of segment.py replaces
    autocast = nullcontext          # precision of the networks' arithmetic; train.py sets it

    precision = "fp32"              # at test time, see scoring/protocol.py

    def __init__(self, settings, bank=(), training=False):
        super().__init__()
        self.settings = settings
        self.bank = list(bank)
        self.protocol = self.Protocol()     # the one in use; a script replaces it
        self.seen_tokens = None             # (V,) bool, which of CLIP's tokens were in training
        self.trained_with = {}              # how a checkpoint was trained, see `load_model`
        self.checkpoint_file = {}           # its path and hash, see scoring/protocol.py

    @property
    def device(self):
        return next(self.parameters()).device

    def train(self, mode=True):
        """As of `nn.Module`. What is trained further is no longer the checkpoint's."""
        if mode:
            self.checkpoint_file = {}
        return super().train(mode)

    # Training data

    @staticmethod
    def sample(pair, rng, settings):
        """What training needs of a `data.Pair`: dict of tensors; "key", "bad", "position" and "row"
        are names of the loader. Runs in data workers.

        rng: NumPy generator, seeded by the position in the run, as is torch's global generator,
        which torchvision uses. With --cache-features `pair.features` is a dict to be returned in
        place of {"pixels": ...}; the batch then has what `features` made of these, in float16.
        Tensors of one name may differ in their first dimension; they are padded with -1.
        """
        raise NotImplementedError

    # A training step, in this order. Each process has its own rows of the global batch

    def features(self, batch):
        """The batch with the outputs of the frozen networks in place of their inputs, such as
        pixels. Row by row and without gradient; what --cache-features stores."""
        return batch

    def feature_key(self):
        """What `features` depends on, as JSON values; None: --cache-features is not offered."""
        return None

    def encode(self, batch):
        """What the trained networks make of the batch, a row for each of its rows: dict of
        tensors."""
        raise NotImplementedError

    def order(self, batch):
        """Numbers of the batch's rows (B,), those that are best encoded together side by side:
        --micro-batch cuts the batch in this order. Default: as they lie."""
        value = next(iter(batch.values()))
        return torch.arange(len(value), device=value.device)

    def losses(self, encoded, batch):
        """Scalars by name: "loss", the global batch's, and its parts, which are logged.

        Every process returns the same values. torch's generator is seeded by (seed, step), alike in
        all processes: draw random numbers with `parallel.global_rows`.
        """
        raise NotImplementedError

    def after_step(self, step, steps):
        """Called after every training step, also one that was skipped: bounds, moving averages."""

    def trained(self):
        """Parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def factors(self, name, parameter):
        """(decay, rate) of a trained parameter: they multiply weight_decay and the learning rate.
        Default: weight decay on matrices, none on vectors and scalars."""
        return float(parameter.ndim >= 2), 1.0

    def parameter_groups(self):
        """Parameter groups for AdamW: dicts of params, decay and rate, see `factors`."""
        groups = {}
        for name, parameter in self.trained().items():
            groups.setdefault(self.factors(name, parameter), []).append(parameter)
        return [{"params": groups[decay, rate], "decay": decay, "rate": rate}
                for decay, rate in sorted(groups, reverse=True)]

    # What is kept

    def state(self):
        """Tensors by name that a resumed run needs: parameters and buffers that change."""
        return {name: value for name, value in self.state_dict().items()
                if not name.startswith(self.FROZEN)}

    def checkpoint(self):
        """Tensors by name that segmenting needs and that cannot be had elsewhere."""
        return {name: value for name, value in self.state().items()
                if not name.startswith(self.TRAINING_ONLY)}

    # Inference

    def embed_classes(self, classes, templates=("{}",)):
        """Class names -> embeddings (C, S, D), by `self.protocol`.

        classes: C names or lists of synonyms; S is the most synonyms of any class. templates:
        prompts with one {} each.
        """
        raise NotImplementedError

    def patch_scores(self, pixels, class_embeddings):
        """Pixels uint8 (B, 3, H, W) and embeddings (C, D) or (C, S, D) -> scores (B, C, h, w), and
        the size (H', W') in pixels that their grid covers, H' >= H and W' >= W."""
        raise NotImplementedError

    def unit_tokens(self, pixels):
        """Pixels uint8 (B, 3, H, W) -> patch tokens (B, h, w, D) of unit norm, whose products with
        the class embeddings, of the best name, are `patch_scores`; and the size that they cover.

        --propagate needs them; a method whose scores come in another way leaves this as it is."""
        raise ValueError(f"--propagate: {self.name} has no patch tokens of unit norm whose "
                         "products with the class embeddings are its scores; leave it out")

    def image_scores(self, pixels, class_embeddings):
        """Scores of whole images (B, C), for classification."""
        raise ValueError(f"{self.name} scores no whole images")


@torch.no_grad()
def moving_average(teacher, student, rate):
    """Move the teacher's parameters by a part, rate, of the way to the student's."""
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast, rate)
