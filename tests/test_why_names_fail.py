"""The experiment of docs/why-names-fail.md (docs/why_names_fail.py), in small."""
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from machinery.tokenizer import tokenize
from machinery.toy import TOY_CLASSES, toy_scene
from model import VisionBackbone

sys.path.insert(0, str(ROOT / "docs"))
import why_names_fail as why


def test_regions_are_those_of_the_truth():
    """The visible classes of each scene with their pixels, counted in patches of 64; a region's
    vector is the mean token under it, here by a loop over patches."""
    regions = why.draw_regions(3, seed=4)
    backbone = VisionBackbone("toy")
    for i in range(3):
        image, mask, caption = toy_scene(np.random.default_rng((4, i)))
        classes, pixels = np.unique(mask, return_counts=True)
        there = regions.there[i]
        assert regions.classes[i][there].tolist() == classes.tolist()
        assert regions.sizes[i][there].tolist() == pytest.approx(pixels / 64)
        assert not regions.vectors[i][~there].any()
        for [name], named in zip(TOY_CLASSES, regions.named[i]):
            assert named == (name in caption.replace("buses", "bus"))
        tokens = backbone(backbone.normalise(torch.from_numpy(image).permute(2, 0, 1)[None]))[1][0]
        mean = sum(token * (mask[y:y + 8, x:x + 8] == classes[0]).mean() for token, (y, x)
                   in zip(tokens, [(y, x) for y in range(0, 128, 8) for x in range(0, 128, 8)]))
        torch.testing.assert_close(regions.vectors[i, 0], mean / (pixels[0] / 64).astype("float32"))


def ideal_regions(count, seed):
    """Regions that no network could make better: each class has a vector of its own, and a little
    noise. Two to four classes of eight are in an image, and half of them in its caption."""
    rng = np.random.default_rng(seed)
    own = torch.from_numpy(np.random.default_rng(9).standard_normal((8, 32), np.float32))
    classes = np.full((count, why.R), -1)
    captions = []
    in_caption = np.zeros((count, 8), bool)
    for i in range(count):
        found = rng.permutation(8)[:rng.integers(2, 5)]
        classes[i, :len(found)] = found
        named = [c for c in found if rng.random() < 0.5] or found[:1]
        in_caption[i, named] = True
        captions.append(tokenize(" and ".join(TOY_CLASSES[c][0] for c in named)))
    classes = torch.from_numpy(classes)
    noise = torch.from_numpy(rng.standard_normal((count, why.R, 32), np.float32))
    vectors = F.normalize(own[classes.clamp(min=0)] + 0.1 * noise, dim=-1)
    return why.Regions(vectors, (classes >= 0).float(), classes, torch.stack(captions),
                       torch.from_numpy(in_caption))


def test_mixing_loses_names_at_the_same_loss(monkeypatch):
    """One attention block between the regions, and most regions have the class of another region of
    their image, though captions are found as well as without it; a gentle start keeps the names."""
    monkeypatch.setattr(why, "TOY_CLASSES", TOY_CLASSES[:8])
    monkeypatch.setattr(why, "WIDTH", 32)
    monkeypatch.setattr(why, "BATCH", 32)
    monkeypatch.setattr(why, "RATE", 3e-3)
    loss = {}
    own = {}
    for mixing in ("none", "random", "gentle"):
        namer, loss[mixing] = why.learn(ideal_regions(400, 0), mixing, False, 120, seed=0)
        miou, own[mixing], any_in_image = why.measure(namer, ideal_regions(100, 1))
        assert any_in_image > 0.85, mixing
    assert loss["random"] < loss["none"] + 0.2
    assert own["none"] > 0.95 and own["gentle"] > 0.75 and own["random"] < 0.7


def test_it_prints_a_table(capsys, monkeypatch):
    """A row for each kind of mixing, with numbers."""
    monkeypatch.setattr(why, "NEW", 10)
    why.main(["--scenes", "64", "--steps", "2"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(why.ROWS)
    for row, (title, *_) in zip(rows, why.ROWS):
        assert row.startswith(f"| {title} | ") and row.count("%") == 3
