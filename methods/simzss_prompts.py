"""SimZSS that also trains its prompts: ours, not the paper's.

    python train.py --recipe simzss-prompts

At test time a class is embedded by the end token of a prompt, "a photo of a boat.", but the local
loss trains the name's own tokens only. Here a second local loss has prompts' end tokens as class
weights (docs/ablations.md has what it gives). It is also the smallest example of a method: new
settings, one more loss.
"""
from dataclasses import dataclass

import torch

from machinery.names import read_templates
from machinery.parallel import sum_over_processes
from machinery.settings import setting
from machinery.tokenizer import CONTEXT_LENGTH, tokenize
from model import SimZSS, SimZSSSettings, class_weights


@dataclass
class SimZSSPromptsSettings(SimZSSSettings):
    prompt_weight: float = setting(0.05, "weight of the local loss of prompts", least=0)
    prompts: str = setting(
        "imagenet80", "prompt templates of the added loss: a name or a file, as at test time",
        flag=False)


class SimZSSPrompts(SimZSS):
    """L = L_g + lambda * L_l + prompt_weight * L_l of prompts."""

    name = "simzss-prompts"
    Settings = SimZSSPromptsSettings

    def __init__(self, settings, bank=(), training=False):
        super().__init__(settings, bank, training)
        self.templates = read_templates(settings.prompts) if training else ()

    def losses(self, encoded, batch):
        losses = super().losses(encoded, batch)
        ids = batch["concepts"][..., 0]                                             # (B, M)
        present = ids[ids >= 0].unique()                                            # (P,)
        with self.autocast():
            prompts, _ = self.text(self.prompt_tokens(present))                     # (P, D)
        weights, _ = class_weights(prompts[:, None], present[:, None], len(self.bank))
        counts = sum_over_processes(torch.bincount(ids[ids >= 0], minlength=len(self.bank)).float())
        queries = weights[ids.clamp(min=0)]                                         # (B, M, D)
        loss = self.local_loss(queries, ids, batch["patch_tokens"], weights, counts)
        return {**losses, "loss": losses["loss"] + self.settings.prompt_weight * loss,
                "prompt": loss}

    def prompt_tokens(self, present):
        """Tokens (P, 77) of a prompt for each of the concepts present (P,)."""
        # Drawn for the whole bank, so that all processes have the same prompt of a concept
        drawn = torch.randint(len(self.templates), (len(self.bank),)).tolist()
        texts = [self.templates[drawn[id]].replace("{}", self.bank[id]) for id in present.tolist()]
        tokens = torch.empty(len(texts), CONTEXT_LENGTH, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            row[:] = tokenize(text)
        return tokens.to(present.device)
