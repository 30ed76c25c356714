"""The contract of a method: all that train.py, segment.py and eval.py ask of it.

A new method is one file with a subclass of `Method`, and one line in METHODS. Read `SimZSS` in
model.py as the example.
"""
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# --method -> its class, imported on demand. The one place where machinery knows files above it, by
# their names only.
METHODS = {
    "simzss": "model.SimZSS",
    "sseg": "methods.sseg.SSeg",
    "sseg-plus": "methods.sseg_plus.SSegPlus",
    "ovsegmentor": "methods.ovsegmentor.OVSegmentor",
    "pixelclip": "methods.pixelclip.PixelCLIP",
}
PRETRAINED = {"clip": "pixelclip"}                  # --checkpoint NAME[:which] -> its method


def find_method(name):
    """The class of a method by its name. Raises ValueError for a name that is not in METHODS."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    module, _, class_name = METHODS[name].rpartition(".")
    return getattr(importlib.import_module(module), class_name)


@dataclass
class Pair:
    """One training pair, as a data worker hands it to `Method.sample`. Files are opened on demand.

    image: () -> RGB PIL image; a large JPEG may come reduced, to no less than twice the training
    size; raises ValueError or OSError, upon which the next pair is taken instead. caption: str.
    concepts: (M, 3) int64, rows of (bank id, first token, end token). masks: () -> list of (H, W)
    bool arrays of the whole image, from the JSON in SA-1B's format beside it. partner: (rng) ->
    another Pair with a concept in common, and the id of that concept; None where there is none.
    features: what `Method.features` made of the image, if --cache-features is on, else None. path:
    of the image file; None for one from memory or from a tar.
    """
    image: Callable
    caption: str = ""
    concepts: torch.Tensor | None = None
    masks: Callable | None = None
    partner: Callable = lambda rng: None
    features: dict | None = None
    path: Path | None = None


class Method(nn.Module):
    """A model with its losses, its data and its way to segment."""

    name = ""                   # its key in METHODS
    RECIPE = {}                 # train.py's flags: what differs from the defaults there
    TOY = {}                    # the same, with --train-data toy
    PROTOCOL = {}               # machinery/scoring/protocol.py: what differs from, or adds to, PROTOCOL
    NEEDS_CAPTIONS = True       # False: a folder of images is training data
    NEEDS_CONCEPTS = True       # False: captions are not parsed
    HAS_CHUNKS = False          # True: `backward` computes --micro-batch pairs at a time, exactly
    CONFIG = ()                 # names that `config` has at least; a file without them is broken
    FROZEN = ()                 # name prefixes of parts that never change and are built anew
    TRAINING_ONLY = ()          # name prefixes of parts that only training needs (a teacher, say)
    HAS_BACKGROUND_RULE = False # True: `patch_scores` knows --background own:T, see `prepare`
    learning_rate = None        # a schedule of its own, like train.learning_rate; None = that one
    autocast = nullcontext      # precision of the networks' arithmetic; train.py sets it

    # Building

    @staticmethod
    def add_flags(parser):
        """Add the method's own switches, its PROTOCOL's own entries among them, to train.py's
        argument parser."""

    @staticmethod
    def further_defaults(args):
        """Defaults of train.py's flags that depend on other flags: a dict, on top of RECIPE and
        TOY. args: the flags with the defaults so far."""
        return {}

    @staticmethod
    def check_flags(args):
        """Raise ValueError for flags that do not go together, or change one with a line of
        notice."""

    @classmethod
    def build(cls, args, bank):
        """The method to train. args: train.py's flags. bank: ConceptBank."""
        raise NotImplementedError

    @classmethod
    def rebuild(cls, config):
        """The method of a checkpoint, still without its tensors. config: what `config` gave."""
        raise NotImplementedError

    def config(self):
        """All that `rebuild` needs, as plain JSON values."""
        raise NotImplementedError

    @classmethod
    def pretrained(cls, which):
        """A model that needs no training here, for --checkpoint NAME:which; see PRETRAINED."""
        raise NotImplementedError

    # Data, in the workers that load it

    @staticmethod
    def sample(pair, size, rng):
        """What training needs of a `Pair`: dict of tensors. size: pixels. rng: NumPy generator,
        seeded by the position in the run. Tensors of one name may differ in their first length;
        `data.collate` pads them with -1."""
        raise NotImplementedError

    @classmethod
    def sampler(cls, args):
        """`sample` with what it needs of train.py's flags: a function (pair, rng=...) -> dict.
        It is sent to other processes, so it must not hold the model."""
        return partial(cls.sample, size=args.image_size)

    # Training

    @property
    def device(self):
        return next(self.parameters()).device

    def features(self, batch):
        """The batch with what frozen networks make of it in place of what only they need."""
        return batch

    def feature_key(self):
        """What `features` depends on, as JSON values; None: --cache-features is not offered."""
        return None

    def trained(self):
        """Parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def groups(self):
        """Parameter groups for AdamW: dicts of params, decay (times --weight-decay), rate (times
        the learning rate). Default: weight decay on matrices, none on vectors and scalars."""
        parameters = list(self.trained().values())
        return [{"params": [p for p in parameters if p.ndim >= 2], "decay": 1.0, "rate": 1.0},
                {"params": [p for p in parameters if p.ndim < 2], "decay": 0.0, "rate": 1.0}]

    def losses(self, batch):
        """Scalars by name: "loss", the global batch's, and its parts, which are logged.

        Every process returns the same values. torch's generator is seeded by (seed, step), alike in
        all processes: draw random numbers with `parallel.global_rows`.
        """
        raise NotImplementedError

    def backward(self, batch, scale, chunk=None):
        """Compute `losses` and leave scale(loss)'s gradients in the parameters.

        chunk: pairs to compute at a time, if HAS_CHUNKS. Returns the losses.
        """
        losses = self.losses(batch)
        scale(losses["loss"]).backward()
        return losses

    def depends_on_processes(self):
        """Whether results depend on the number of processes; then a run cannot be resumed with
        another one."""
        return False

    def after_step(self, step, steps):
        """Called after every step of the optimizer: bounds, moving averages."""

    # What is kept

    def state(self):
        """Tensors by name that a resumed run needs: parameters and buffers that change."""
        return {name: value for name, value in self.state_dict().items()
                if not name.startswith(self.FROZEN)}

    def checkpoint(self):
        """Tensors by name that segmenting needs and that cannot be had elsewhere."""
        return {name: value for name, value in self.state().items()
                if not name.startswith(self.TRAINING_ONLY)}

    def check_frozen(self, config, path):
        """Raise ValueError if a frozen part that was built anew is not the one of the checkpoint
        at path. config: the checkpoint's."""

    # Inference

    def prepare(self, protocol):
        """Called before classes are embedded and photos segmented. protocol: dict of the method's
        PROTOCOL entries and the common ones, and "background". Where that is "own:T", an all-zero
        row of the class embeddings stands for the background, and `patch_scores` gives it the
        method's own score, with the threshold T."""

    def embed_classes(self, classes, templates=("{}",), **options):
        """Class names -> embeddings (C, S, D).

        classes: C names or lists of synonyms; S is the most synonyms of any class. templates:
        prompts with one {} each. options: the protocol's entries that only this method has.
        """
        raise NotImplementedError

    def patch_scores(self, pixels, class_embeddings):
        """Pixels uint8 (B, 3, H, W) and embeddings (C, D) or (C, S, D) -> scores (B, C, h, w), and
        the size (H', W') in pixels that their grid covers, H' >= H and W' >= W."""
        raise NotImplementedError

    def image_scores(self, pixels, class_embeddings):
        """Scores of whole images (B, C), for classification."""
        raise ValueError(f"{self.name} scores no whole images")


# --------------------------------------------------------------------------------------------------
# What methods share

@torch.no_grad()
def moving_average(teacher, student, share):
    """Move the teacher's parameters by a share of the way to the student's."""
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast, share)


@torch.no_grad()
def prompt_ensemble(classes, templates, embed, batch=256, normalise_each=True):
    """Class names -> embeddings (C, S, D): the mean over all prompts of a name, unit-norm.

    classes: C names, or C lists of names (synonyms). templates: prompts with one {} each. embed:
    function from a list of (text before, name, text after) to (P, D). normalise_each: whether
    prompts are normalised before the mean. A class with fewer than S names repeats its first, which
    changes no maximum.
    """
    classes = [[names] if isinstance(names, str) else list(names) for names in classes]
    names = [name for synonyms in classes for name in synonyms]
    prompts = []
    for name in names:
        for template in templates:
            before, _, after = template.partition("{}")
            prompts.append((before, name, after))
    embedded = torch.cat([embed(prompts[i:i + batch]) for i in range(0, len(prompts), batch)])
    if normalise_each:
        embedded = F.normalize(embedded, dim=-1)
    mean = embedded.view(len(names), len(templates), -1).mean(dim=1)                # (names, D)
    by_class = F.normalize(mean, dim=-1).split([len(synonyms) for synonyms in classes])
    S = max(map(len, by_class))
    return torch.stack([torch.cat([own, own[:1].expand(S - len(own), -1)]) for own in by_class])


def best_synonym(features, class_embeddings):
    """Similarity of features (B, N, D) to the best name of each class: (B, C, N).

    class_embeddings: (C, D) or (C, S, D).
    """
    if class_embeddings.ndim == 2:
        class_embeddings = class_embeddings[:, None]                                # (C, 1, D)
    return torch.einsum("bnd,csd->bcsn", features, class_embeddings).amax(dim=2)
