"""A second method, as small as one can be: it proves what the contract promises of a new one.

A linear layer on the toy backbone's patch tokens learns to put each image near a fixed bag of words
of its caption. It has all that makes training hard to repeat: a buffer that every batch changes, a
teacher that follows by a moving average, a random number in each step, random rows in each batch.
"""
import torch
import torch.nn.functional as F
from torch import nn

from concepts import tokenize
from data import random_resized_crop
from machinery.images import to_pixels
from machinery.contract import (METHODS, PRETRAINED, Method, best_synonym, moving_average,
                              prompt_ensemble)
from machinery.parallel import global_rows, sum_over_processes, world_size
from model import VisionBackbone, global_loss

METHODS["linear"] = "linear_method.Linear"
PRETRAINED["words"] = "linear"


class Linear(Method):
    name = "linear"
    RECIPE = {"base_rate": 0.1, "clip": 5.0, "final_rate": 0.1, "weight_decay": 0.01}
    TOY = {"batch": 8, "output": "runs/linear-toy"}
    PROTOCOL = {"templates": "plain"}
    NEEDS_CONCEPTS = False
    FROZEN = ("backbone.", "words.")
    TRAINING_ONLY = ("teacher.",)

    def __init__(self, width=16):
        super().__init__()
        self.backbone = VisionBackbone("toy")
        self.student = nn.Linear(self.backbone.width, width)
        self.teacher = nn.Linear(self.backbone.width, width).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.register_buffer("mean", torch.zeros(self.backbone.width))
        self.register_buffer("steps_seen", torch.tensor(0))
        self.words = nn.Embedding(49408, width).requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        self.words.weight.data = torch.randn(49408, width, generator=generator)

    @staticmethod
    def add_flags(parser):
        parser.add_argument_group("linear").add_argument("--linear-width", type=int, default=16)

    @classmethod
    def build(cls, args, bank):
        return cls(args.linear_width)

    @classmethod
    def rebuild(cls, config):
        return cls(**config)

    @classmethod
    def pretrained(cls, which):
        model = cls(int(which))
        model.trained_with = {"train_data": "toy"}
        return model

    def config(self):
        return {"width": self.student.out_features}

    @staticmethod
    def sample(pair, size, rng):
        pixels = to_pixels(random_resized_crop(pair.image(), size, rng))
        return {"pixels": pixels, "tokens": tokenize(pair.caption)}

    def features(self, batch):
        pixels = batch.pop("pixels")
        return {**batch, "patches": self.backbone(self.backbone.normalise(pixels))[1]}

    def losses(self, batch):
        patches = batch["patches"]                                                  # (B, N, D)
        B, N, _ = patches.shape
        with torch.no_grad():
            mean = sum_over_processes(patches.mean(dim=(0, 1))) / world_size()
            self.mean.lerp_(mean, 0.1)
            self.steps_seen += 1
        kept = global_rows(lambda rows: torch.rand(rows, N, 1), B) < 0.8            # (B, N, 1)
        weight = torch.rand(())                     # the same in all processes
        pooled = ((patches - self.mean) * kept).mean(dim=1)                         # (B, D)
        image = F.normalize(self.student(pooled), dim=-1)
        goal = F.normalize(self.teacher(pooled), dim=-1)
        text = F.normalize(self.bag_of_words(batch["tokens"]), dim=-1)
        contrast = global_loss(image, text, torch.tensor(10.0))
        lag = sum_over_processes((1 - (image * goal).sum(dim=-1)).mean()) / world_size()
        return {"loss": contrast + weight * lag, "contrast": contrast, "lag": lag,
                "weight": weight}

    def bag_of_words(self, tokens):
        is_word = (tokens > 0) & (tokens < 49406)                                   # (B, 77)
        return (self.words(tokens) * is_word[..., None]).sum(dim=1)

    def after_step(self, step, steps):
        moving_average(self.teacher, self.student, 0.1)

    def embed_classes(self, classes, templates=("{}",)):
        def embed(prompts):
            texts = [before + name + after for before, name, after in prompts]
            return self.bag_of_words(torch.stack([tokenize(text) for text in texts]))
        return prompt_ensemble(classes, templates, embed)

    @torch.no_grad()
    def patch_scores(self, pixels, class_embeddings):
        _, patches, (h, w) = self.backbone(self.backbone.normalise(pixels))
        projected = F.normalize(self.student(patches - self.mean), dim=-1)
        scores = best_synonym(projected, class_embeddings)
        return scores.unflatten(-1, (h, w)), (8 * h, 8 * w)
