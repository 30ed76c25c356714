"""Checkpoints: filling, finding."""
from pathlib import Path

import torch


@torch.no_grad()
def _fill(expected, found, complaint):
    """Copy tensors into those of the same names, all of them and no others, or raise ValueError naming what differs."""
    wrong = {"missing": [key for key in expected if key not in found],
             "unexpected": [key for key in found if key not in expected],
             "misshapen": [f"{key} {list(found[key].shape)} instead of {list(value.shape)}"
                           for key, value in expected.items() if key in found and found[key].shape != value.shape]}
    wrong = [f"{len(keys)} {how}: {', '.join(keys[:20])}" + ", ..." * (len(keys) > 20)
             for how, keys in wrong.items() if keys]
    if wrong:
        raise ValueError(f"{complaint}: {'; '.join(wrong)}")
    for key, value in expected.items():
        value.copy_(found[key])



def newest_model():
    models = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not models:
        raise FileNotFoundError("no trained model under runs/; run train.py first or name one with --checkpoint")
    return models[-1]
