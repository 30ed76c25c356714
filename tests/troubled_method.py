"""SimZSS to which something happens in the middle of a run: what real runs meet, at a step of the
test's choice."""
import os
import signal
from dataclasses import dataclass

from machinery.contract import METHODS
from machinery.settings import setting
from model import SimZSS, SimZSSSettings

METHODS["troubled"] = "troubled_method.Troubled"


@dataclass
class TroubledSettings(SimZSSSettings):
    trouble: str = setting(
        "none", "loss: a caption's embedding is not finite; gradient: only the loss's gradient is "
        "not; bad pair: whoever loads one is killed; or the name of a signal that the process gets "
        "at the end of the step",
        flag=False, changes_result=False)
    at: tuple[int, ...] = setting(
        (), "the steps, counted from the run's first", least=0, flag=False, changes_result=False)
    ranks: tuple[int, ...] = setting(
        (0, 1), "processes that it happens to", flag=False, changes_result=False)


class Troubled(SimZSS):
    name = "troubled"
    Settings = TroubledSettings
    now = 0                                         # the step

    @staticmethod
    def sample(pair, rng, settings):
        if settings.trouble == "bad pair":
            os.kill(os.getpid(), signal.SIGKILL)
        return SimZSS.sample(pair, rng, settings)

    def encode(self, batch):
        encoded = super().encode(batch)
        if self.happens("loss"):
            encoded["caption"] = encoded["caption"] * float("nan")
        return encoded

    def losses(self, encoded, batch):
        losses = super().losses(encoded, batch)
        if self.happens("gradient"):                # the root of zero has an infinite slope
            nothing = self.logit_scale - self.logit_scale.detach()
            losses["loss"] = losses["loss"] + nothing.sqrt()
        return losses

    def after_step(self, step, steps):
        super().after_step(step, steps)
        if self.happens(self.settings.trouble) and self.settings.trouble.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.settings.trouble))
        self.now = step + 1

    def happens(self, trouble):
        settings = self.settings
        return (settings.trouble == trouble and self.now in settings.at
                and int(os.environ.get("RANK", 0)) in settings.ranks)
