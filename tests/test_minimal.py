"""minimal.py is SimZSS: its losses are model.py's, it learns; one-batch.md shows its tensors."""
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import minimal
from conftest import BANK, ROOT, noise, tiny
from eval import confusion_matrix, scores
from machinery.settings import read
from model import SimZSS, SimZSSSettings

NUMBER = r"-?\d+\.\d+"
sys.path.insert(0, str(ROOT / "docs"))
import exercises
import figure
import one_batch


def train(steps, scenes):
    """(tower, log_scale) of minimal.py, with fewer scenes than it has."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimal, "SCENES", scenes)
        return minimal.train(steps)


@pytest.fixture(scope="module")
def untrained():
    return train(0, scenes=1)


@pytest.fixture(scope="module")
def trained():
    return train(120, scenes=1000)                  # enough for the tests, in half the time


def test_minimal_is_short():
    assert len((ROOT / "minimal.py").read_text().splitlines()) <= 100


def test_minimal_learns(trained):
    images, truth, _ = minimal.draw(40, seed=1)
    masks = minimal.segment(trained[0], images, minimal.bank)
    assert scores(confusion_matrix(masks, truth, len(minimal.bank)))["mIoU"] > 0.5


def test_minimal_has_the_losses_of_the_method(untrained):
    tower, log_scale = untrained
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


def test_one_batch_is_what_the_page_shows(untrained, trained):
    batch = minimal.draw(one_batch.BATCH, one_batch.SEED)
    with torch.no_grad():
        before = one_batch.compute(*untrained, *batch)
        after = one_batch.compute(*trained, *batch)
    printed = "\n".join(one_batch.page(before, after, batch[-1])).rstrip()
    shown = (ROOT / "docs" / "one-batch.md").read_text().rstrip()
    changing = f"{NUMBER}|[0-9]+ (?=%|of)"
    assert re.sub(changing, "#", printed) == re.sub(changing, "#", shown)
    # What training gives differs a little from processor to processor; what it starts from does not
    start = shown.index("| photo, concept |")
    for mine, line in zip(one_batch.cosine_table(before), shown[start:].splitlines()):
        np.testing.assert_allclose(numbers(mine), numbers(line), atol=0.011)
    found = after["own"][(after["u"] @ after["w"].T).argmax(dim=1)]
    assert (found == after["ids"]).sum() >= len(found) - 1
    assert after["gets"].mean() > 2 * before["gets"].mean()


def numbers(line):
    return [float(number) for number in re.findall(NUMBER, line)]


@pytest.mark.parametrize("name", exercises.CHANGES)
def test_an_exercise_changes_what_it_says(name):
    """Each text that an exercise replaces stands in minimal.py once, and what results is Python."""
    text = exercises.changed(name, 1)
    compile(text, name, "exec")
    assert text.count("manual_seed(1)") == 1
    assert name == "as it is" or text != exercises.changed("as it is", 1)


def test_the_figure_is_drawn_for_any_photo():
    """Two rows of heat maps and the mask, one column for each concept; the model is not changed."""
    model = tiny()
    before = model.text.tower.token_embedding.weight.clone()
    image = Image.fromarray(noise(0, 60, 80))
    one, two = (figure.figure(model, image, "a cow on the grass", names, BANK)
                for names in (["cow"], ["cow", "grass"]))
    assert two.width - one.width == 267 + 8 and two.height == one.height    # 200 x 80 / 60 pixels
    assert before.equal(model.text.tower.token_embedding.weight)


def test_the_figure_shows_the_photo_at_the_size_of_training(monkeypatch):
    """The model looks at the photo in the size of its training images; a concept that is not
    written as it is named has no colour in the caption."""
    sizes, places = [], []
    look = figure.look
    monkeypatch.setattr(figure, "look", lambda model, pixels, *names: (
        sizes.append(tuple(pixels.shape[1:])) or look(model, pixels, *names)))
    line = figure.caption_line
    monkeypatch.setattr(figure, "caption_line", lambda caption, colours, width: (
        places.extend(colours) or line(caption, colours, width)))
    model = tiny()
    model.trained_with = {"run": {"image_size": 64}}
    image = Image.fromarray(noise(0, 96, 128))
    figure.figure(model, image, "kine on the grass", ["cow", "grass"], BANK)
    assert sizes == [(64, 85)] * 2 and places == [(12, 17)]
