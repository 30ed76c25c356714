"""minimal.py is SimZSS: its losses are model.py's, it learns; one-batch.md shows its tensors."""
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import minimal
from eval import confusion_matrix, scores
from machinery.settings import read
from model import SimZSS, SimZSSSettings

ROOT = Path(__file__).parents[1]
NUMBER = r"-?\d+\.\d+"
sys.path.insert(0, str(ROOT / "docs"))
import one_batch


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return minimal.train()


def test_minimal_is_short():
    assert len((ROOT / "minimal.py").read_text().splitlines()) <= 100


def test_minimal_learns(trained):
    images, truth, _ = minimal.draw(40, seed=1)
    masks = minimal.segment(trained[0], images, minimal.bank)
    assert scores(confusion_matrix(masks, truth, len(minimal.bank)))["mIoU"] > 0.5


def test_minimal_has_the_losses_of_the_method():
    torch.manual_seed(0)
    tower, log_scale = minimal.train(steps=0)
    images, _, captions = minimal.draw(16, seed=3)
    L_g, L_l = minimal.losses(tower, log_scale, *minimal.see(images), captions)

    text = {"width": 256, "heads": 4, "layers": 1}
    model = SimZSS(read(SimZSSSettings, {"backbone": {"name": "toy"}, "text": text}, "test"),
                   minimal.bank)
    state = tower.state_dict() | {"positional_embedding": torch.zeros(77, 256)}
    state["positional_embedding"][:minimal.T] = tower.positional_embedding.data
    model.text.tower.load_state_dict(state)
    tokens = torch.zeros(len(captions), 77, dtype=torch.int64)
    tokens[:, :minimal.T] = minimal.tokenizer(captions)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    batch = model.features({"pixels": pixels, "tokens": tokens,
                            "concepts": one_batch.read_batch(captions)})
    losses = model.losses(model.encode(batch), batch)
    torch.testing.assert_close(L_g, losses["global"])
    torch.testing.assert_close(L_l, losses["local"])
    torch.testing.assert_close(L_g + 0.05 * L_l, losses["loss"])


def test_one_batch_is_what_the_page_shows(trained):
    images, _, captions = minimal.draw(one_batch.BATCH, one_batch.SEED)
    torch.manual_seed(0)
    with torch.no_grad():
        before = one_batch.compute(*minimal.train(steps=0), images, captions)
        after = one_batch.compute(*trained, images, captions)
    printed = "\n".join(one_batch.page(before, after, captions))
    shown = (ROOT / "docs" / "one-batch.md").read_text().rstrip("\n")
    assert re.sub(f"{NUMBER}|[0-9] of", "#", printed) == re.sub(f"{NUMBER}|[0-9] of", "#", shown)
    # What training gives differs a little from processor to processor; what it starts from does not
    start = shown.index("| pooled for |")
    for mine, line in zip(one_batch.cosine_table(before), shown[start:].splitlines()):
        np.testing.assert_allclose(numbers(mine), numbers(line), atol=0.011)
    found = after["present"][(after["u"] @ after["w"].T).argmax(dim=1)]
    assert (found == after["ids"]).sum() >= len(found) - 1


def numbers(line):
    return [float(number) for number in re.findall(NUMBER, line)]
