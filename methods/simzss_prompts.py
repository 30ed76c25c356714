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
from machinery.settings import setting
from machinery.tokenizer import tokenize
from model import SimZSS, SimZSSSettings, class_weights


@dataclass
class SimZSSPromptsSettings(SimZSSSettings):
    prompt_weight: float = setting(0.05, "weight of the local loss of prompts", least=0)
    prompts: str = setting("imagenet80", "templates of the prompts, see templates", flag=False)


class SimZSSPrompts(SimZSS):
    """L = L_g + lambda * L_l + prompt_weight * L_l of prompts."""

    name = "simzss-prompts"
    Settings = SimZSSPromptsSettings

    def losses(self, encoded, batch):
        losses = super().losses(encoded, batch)
        ids = batch["concepts"][..., 0]                                             # (B, M)
        present = ids[ids >= 0].unique()                                            # (P,)
        with self.autocast():
            prompts, _ = self.text(self.prompt_tokens(present))                     # (P, D)
        weights, _ = class_weights(prompts[:, None], present[:, None], len(self.bank))
        counts = class_weights(encoded["concepts"].detach(), ids, len(self.bank))[1]
        loss = self.local_loss(self.weights_of(ids, weights), batch, weights, counts)
        return {**losses, "loss": losses["loss"] + self.settings.prompt_weight * loss,
                "prompt": loss}

    def prompt_tokens(self, present):
        """Tokens (P, 77) of a prompt for each of the concepts present (P,)."""
        templates = read_templates(self.settings.prompts)
        # Drawn for the whole bank, so that all processes have the same prompt of a concept
        drawn = torch.randint(len(templates), (len(self.bank),)).tolist()
        texts = [templates[drawn[id]].replace("{}", self.bank[id]) for id in present.tolist()]
        empty = torch.empty(0, 77, dtype=torch.int64)
        tokens = torch.stack(list(map(tokenize, texts))) if texts else empty
        return tokens.to(present.device)
