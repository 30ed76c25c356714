"""A method as small as one can be: it proves what the contract promises of a new one.

A linear layer on the toy backbone's patch tokens learns to put each image near a fixed bag of words
of its caption. It has all that makes training hard to repeat: a buffer that every batch changes, a
teacher that follows by a moving average, a random number in each step, random rows in each batch.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from machinery.contract import METHODS, PRETRAINED, Method, moving_average
from machinery.parallel import global_rows, sum_over_processes, world_size
from machinery.settings import setting
from machinery.tokenizer import tokenize
from model import VisionBackbone, best_synonym, global_loss, prompt_ensemble

METHODS["linear"] = "linear_method.Linear"          # one line of machinery/contract.py
PRETRAINED["words"] = ("linear", "lengths")         # --checkpoint words:unit needs no training


@dataclass
class LinearSettings:
    width: int = setting(16, "of the linear layer", least=1, flag="linear-width")
    lengths: str = setting(
        "drawn", "of the words' vectors", choices=("drawn", "unit"), flag=False)


class Linear(Method):
    name = "linear"
    Settings = LinearSettings
    NEEDS_CONCEPTS = False
    FROZEN = ("backbone.", "words.")
    TRAINING_ONLY = ("teacher.",)

    def __init__(self, settings, bank=(), training=False):
        super().__init__(settings, bank)
        self.backbone = VisionBackbone("toy")
        self.student = nn.Linear(self.backbone.width, settings.width)
        if training:                                # a part that only training needs
            self.teacher = nn.Linear(self.backbone.width, settings.width).requires_grad_(False)
            self.teacher.load_state_dict(self.student.state_dict())
        self.register_buffer("mean", torch.zeros(self.backbone.width))
        self.register_buffer("steps_seen", torch.tensor(0))
        self.words = nn.Embedding(49408, settings.width).requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        vectors = torch.randn(49408, settings.width, generator=generator)
        self.words.weight.data = F.normalize(vectors) if settings.lengths == "unit" else vectors

    @staticmethod
    def sample(pair, rng, settings):
        return {"pixels": pair.crop(rng), "tokens": pair.tokens()}

    def features(self, batch):
        pixels = batch["pixels"]
        return {"tokens": batch["tokens"],
                "patches": self.backbone(self.backbone.normalise(pixels))[1]}

    def encode(self, batch):
        patches = batch["patches"]                                                  # (B, N, D)
        B, N, _ = patches.shape
        with torch.no_grad():
            mean = sum_over_processes(patches.mean(dim=(0, 1))) / world_size()
            self.mean.lerp_(mean, 0.1)
            self.steps_seen += 1
        kept = global_rows(lambda rows: torch.rand(rows, N, 1), B) < 0.8            # (B, N, 1)
        pooled = ((patches - self.mean) * kept).mean(dim=1)                         # (B, D)
        return {"image": F.normalize(self.student(pooled), dim=-1),
                "goal": F.normalize(self.teacher(pooled), dim=-1)}

    def losses(self, encoded, batch):
        weight = torch.rand(())                     # the same in all processes
        text = F.normalize(self.bag_of_words(batch["tokens"]), dim=-1)
        contrast = global_loss(encoded["image"], text, torch.tensor(10.0))
        distance = 1 - (encoded["image"] * encoded["goal"]).sum(dim=-1)             # (B,)
        lag = sum_over_processes(distance.mean()) / world_size()
        return {"loss": contrast + weight * lag, "contrast": contrast, "lag": lag,
                "weight": weight}

    def bag_of_words(self, tokens):
        is_word = (tokens > 0) & (tokens < 49406)                                   # (B, 77)
        return (self.words(tokens) * is_word[..., None]).sum(dim=1)

    def after_step(self, step, steps):
        moving_average(self.teacher, self.student, 0.1)

    def embed_classes(self, classes, templates=("{}",)):
        def embed(prompts):
            return self.bag_of_words(torch.stack([tokenize("".join(text)) for text in prompts]))
        return prompt_ensemble(classes, templates, embed)

    @torch.no_grad()
    def unit_tokens(self, pixels):
        _, patches, (h, w) = self.backbone(self.backbone.normalise(pixels))
        projected = F.normalize(self.student(patches - self.mean), dim=-1)
        return projected.unflatten(1, (h, w)), (8 * h, 8 * w)

    def patch_scores(self, pixels, class_embeddings):
        tokens, covered = self.unit_tokens(pixels)
        return best_synonym(tokens, class_embeddings), covered
