"""S-Seg+: label maps of a folder train a network of a closed list of classes."""
import json
import math
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval
import segment
import train
from conftest import read_log
from data import Pair
from machinery import toy
from machinery.networks.checkpoint import load_model
from machinery.settings import read
from machinery.training.shards import BadSample
from methods.sseg_plus import SSegPlus, cut_out, read_class_list
from processes import check_two_processes
from reference import losses_of

CLASSES = ["background", "cow, cattle", "grass"]
STEPS = 4
RUN = (f"--recipe sseg-plus --backbone toy --image-size 64 --batch 4 --steps {STEPS} --workers 0 "
       "--head-width 32 --device cpu --set protocol.short_side=64 --set protocol.window=64 "
       "--set protocol.stride=32").split()


def tiny(name="toy", **options):
    """A small network of random first weights for CLASSES, as it comes from a checkpoint."""
    torch.manual_seed(0)
    backbone = {"name": name, "options": options, "mean": [0.5] * 3, "std": [0.5] * 3}
    settings = {"labels": "labels", "backbone": backbone, "head_width": 32}
    return SSegPlus(read(SSegPlus.Settings, settings, "test"), CLASSES)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A segmentation folder of eight toy scenes."""
    folder = tmp_path_factory.mktemp("plus") / "scenes"
    toy.main([str(folder), "--count", "8"])
    return folder


@pytest.fixture(scope="module")
def labels(scenes, checkpoint):
    """The scenes' label maps, made by an untrained model."""
    output = scenes.parent / "labels"
    segment.main([str(scenes / "images"), "--classes", "cow, sea, boat", "--checkpoint",
                  str(checkpoint), "--output", str(output), "--device", "cpu"])
    return output


# --------------------------------------------------------------------------------------------------
# Label maps

def test_the_list_of_classes_is_that_of_the_label_maps(scenes, labels, checkpoint, tmp_path):
    """Names in the order of the maps' indices, with synonyms, the background first by either rule;
    a folder without maps and one of two lists are refused."""
    assert read_class_list(labels) == ["cow", "sea", "boat"]
    (tmp_path / "classes.txt").write_text("cow, cattle\nsea\n")
    for rule in ("threshold:0.1", "prompt:sky, wall"):
        out = tmp_path / rule[:6]
        segment.main([str(scenes / "images" / "scene00000.png"), "--classes",
                      str(tmp_path / "classes.txt"), "--checkpoint", str(checkpoint), "--output",
                      str(out), "--background", rule])
        assert read_class_list(out) == ["background", "cow, cattle", "sea"]
    with pytest.raises(FileNotFoundError, match="no label maps in .*classes.*segment.py"):
        read_class_list(tmp_path / "classes")
    other = tmp_path / "mixed"
    other.mkdir()
    for i, names in enumerate((["cow"], ["sea"])):
        (other / f"{i}_mask.png").touch()
        (other / f"{i}.json").write_text(json.dumps({"names": names, "classes": [names]}))
    with pytest.raises(ValueError, match="2 different lists of classes"):
        read_class_list(other)


@pytest.mark.parametrize("content", [
    None, "", "{", "[]", "3", "{}", '{"names": ["cow"]}', '{"names": "cow", "classes": []}',
    '{"names": [1], "classes": []}', '{"names": ["cow"], "classes": [[]]}',
    '{"names": ["cow"], "classes": 3}', '{"names": [], "classes": []}', "[" * 100_000])
def test_a_label_map_says_its_classes(tmp_path, content):
    """A label map beside which there is no JSON, or one that segment.py does not write, is named.
    """
    (tmp_path / "a_mask.png").touch()
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="a.json does not say the classes of its label map"):
        read_class_list(tmp_path)


def test_image_and_labels_are_cut_out_together():
    """In a picture whose colours are its labels they still are after the crop, away from the edges
    that resizing mixes; beyond the picture it is black and not labelled; scales vary, and half of
    the crops are mirrored."""
    truth = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (3, 4)))
    truth = truth.repeat_interleave(40, 0).repeat_interleave(40, 1)
    image = Image.fromarray((50 + 50 * truth).clip(0, 255).byte().numpy()).convert("RGB")
    covered = []
    for seed in range(20):
        torch.manual_seed(seed)
        cut, labels = cut_out(image, truth, 64)
        assert cut.size == (64, 64) and labels.shape == (64, 64) and labels.dtype == torch.int64
        pixels = np.array(cut)[..., 0].astype(int)
        labels = labels.numpy()
        assert (pixels[labels < 0] == 0).all()
        inner = labels >= 0
        for shift in product((-3, 0, 3), repeat=2):
            inner = inner & (np.roll(labels, shift, (0, 1)) == labels)
        assert np.abs(pixels - (50 + 50 * labels).clip(0, 255))[inner].max() <= 10
        covered.append((labels >= 0).mean())
    assert min(covered) < 0.6 and max(covered) == 1


@pytest.fixture
def sample(tmp_path):
    """sample(name, size): what S-Seg+ needs of an image of that name and size, beside which "a",
    "b" and "d" have label maps of 40 x 30: "b" has one beyond its two classes, "d" one that is no
    PNG.
    """
    for name, label in (("a", 1), ("b", 3), ("d", 0)):
        content = {"names": ["cow", "sea"], "classes": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        Image.fromarray(np.full((30, 40), label, np.uint8)).save(tmp_path / f"{name}_mask.png")
    below = np.zeros((30, 40), np.int32)
    below[0] = -1
    Image.fromarray(below).save(tmp_path / "d_mask.tiff")
    (tmp_path / "d_mask.tiff").rename(tmp_path / "d_mask.png")
    settings = read(SSegPlus.Settings, {"labels": str(tmp_path)}, "test")

    def sample(name, size):
        image = tmp_path / f"{name}.jpg"
        Image.new("RGB", size).save(image)
        return SSegPlus.sample(Pair(image, 32), np.random.default_rng(0), settings)
    return sample


def test_a_label_map_belongs_to_its_image(sample):
    """It is found by the image's name and needs its shape, but not its size, because a JPEG may
    come reduced."""
    for size in ((40, 30), (20, 15)):
        found = sample("a", size)
        assert set(found["labels"].unique().tolist()) <= {-1, 1}
        assert found["pixels"].shape == (3, 32, 32) and found["labels"].shape == (32, 32)


def test_bad_label_maps_are_refused(sample):
    """An index that is no class, a missing map, one of another image, an image without a file."""
    with pytest.raises(ValueError, match="holds 3; expected 0 to 1"):
        sample("b", (40, 30))
    with pytest.raises(ValueError, match="is a TIFF.*expected a PNG"):    # a PNG has none below 0
        sample("d", (40, 30))
    with pytest.raises(BadSample, match="no mask"):
        sample("c", (40, 30))
    with pytest.raises(ValueError, match="is 40 x 30, its image 30 x 40: not of the same shape"):
        sample("a", (30, 40))
    with pytest.raises(ValueError, match="--train-data FOLDER; not tars"):
        SSegPlus.sample(Pair(np.zeros((8, 8, 3), np.uint8), 32), None, None)


# --------------------------------------------------------------------------------------------------
# Network and loss

@pytest.mark.parametrize("name, options", [
    ("toy", {}), ("vit_tiny_patch16_224", {"depth": 1}), ("resnet10t", {})])
def test_any_backbone_and_any_size(name, options):
    """Transformers and CNNs give logits on their own grid, for images that they have to pad."""
    model = tiny(name, **options).eval()
    patch = model.patch_size[0]
    logits, covered = model.logits(torch.zeros(1, 3, 70, 101, dtype=torch.uint8))
    h, w = math.ceil(70 / patch), math.ceil(101 / patch)
    assert logits.shape == (1, 3, h, w) and covered == (h * patch, w * patch)


def test_the_loss_is_the_mean_over_labelled_pixels():
    """Equal logits cost ln K at each labelled pixel; others do not count; a classifier that is
    certain of one class is right where that is the label."""
    model = tiny()
    last = model.head[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    labels = torch.full((2, 64, 64), -1)
    labels[0, :16] = 1
    labels[1, 0, :512] = 2
    batch = {"pixels": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "labels": labels}
    assert losses_of(model, batch)["loss"].item() == pytest.approx(math.log(3), rel=1e-5)
    with torch.no_grad():
        last.bias[1] = 30
    losses = losses_of(model, batch)
    right = 16 * 64 / (16 * 64 + 64)
    assert losses["right"].item() == pytest.approx(right)
    assert losses["loss"].item() == pytest.approx(30 * (1 - right), rel=1e-4)


def test_batch_statistics_stay():
    """Training changes the weights of a CNN's backbone, and not its batch statistics."""
    model = tiny("resnet10t").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = {"pixels": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
             "labels": torch.randint(0, 3, (2, 64, 64))}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses_of(model, batch)["loss"].backward()
    optimizer.step()
    after = model.state_dict()
    assert not torch.equal(after["trunk.conv1.0.weight"], before["trunk.conv1.0.weight"])
    for name, value in before.items():
        if "running" in name or "batches" in name:
            assert torch.equal(after[name], value), name


def test_layers_near_the_image_learn_slowly():
    """Rates fall by 0.65 a layer from the head down to the patches; vectors and the position table
    have no weight decay; every parameter is in one group."""
    model = tiny("vit_tiny_patch16_224", depth=2)
    rate = {}
    decay = {}
    for group in model.parameter_groups():
        for p in group["params"]:
            assert id(p) not in rate
            rate[id(p)] = group["rate"]
            decay[id(p)] = group["decay"]
    names = {name: id(p) for name, p in model.trained().items()}
    assert set(names.values()) == set(rate)
    expected = {"head.0.weight": 1, "trunk.blocks.1.mlp.fc1.weight": 0.65,
                "trunk.blocks.0.mlp.fc1.weight": 0.65 ** 2,
                "trunk.patch_embed.proj.weight": 0.65 ** 3, "trunk.pos_embed": 0.65 ** 3}
    for name, share in expected.items():
        assert rate[names[name]] == pytest.approx(share), name
    assert decay[names["trunk.pos_embed"]] == 0
    assert decay[names["trunk.blocks.0.attn.qkv.weight"]] == 1
    assert decay[names["trunk.blocks.0.attn.qkv.bias"]] == 0


def test_two_processes_compute_the_loss_of_one(tmp_path):
    """Loss and gradients agree, where one process has fewer labelled pixels than the other."""
    model = tiny("resnet10t").train()
    generator = torch.Generator().manual_seed(0)
    batch = {"pixels": torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8,
                                     generator=generator),
             "labels": torch.randint(0, 3, (4, 64, 64), generator=generator)}
    batch["labels"][:2, 20:] = -1
    check_two_processes(tmp_path, model, batch)


# --------------------------------------------------------------------------------------------------
# The closed list, and the commands

@torch.no_grad()
def test_only_the_closed_list_can_be_asked_for():
    """A class is found by any of its names and has its own probability, by the best of several
    names; probabilities sum to 1; a class of no known name is refused with the list."""
    model = tiny().eval()
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    probabilities = F.softmax(model.logits(pixels)[0], dim=1)
    asked = model.embed_classes(["grass", ["Cattle", "ox"], ["meadow", "background", "cow"]])
    scores, covered = model.patch_scores(pixels, asked)
    assert covered == (64, 64)
    torch.testing.assert_close(scores[:, :2], probabilities[:, [2, 1]])
    torch.testing.assert_close(scores[:, 2], probabilities[:, :2].amax(dim=1))
    whole, _ = model.patch_scores(pixels, model.embed_classes(["background", "cow", "grass"]))
    torch.testing.assert_close(whole.sum(dim=1), torch.ones(1, 8, 8))
    with pytest.raises(ValueError, match="'sheep' is not in the closed list of this model: "
                                         "background, cow, grass"):
        model.embed_classes([["cow"], ["sheep", "lamb"]])


def test_label_train_score(scenes, labels, tmp_path, fails):
    """Label a folder, train on it, score: one command each. The result is marked as closed-set and
    as having seen the target's images; the run does not go on with other classes."""
    run = tmp_path / "run"
    labels = Path(shutil.copytree(labels, tmp_path / "labels"))
    train.main([*RUN, "--train-data", str(scenes / "images"), "--labels", str(labels), "--output",
                str(run)])
    log = read_log(run)
    assert len(log) == STEPS and log[-1]["loss"] < log[0]["loss"]
    assert load_model(run).bank == ["cow", "sea", "boat"]
    target = tmp_path / "target"
    for part in ("images", "masks"):
        (target / part).mkdir(parents=True)
    (target / "classes.txt").write_text("cow\nsea\nboat\n")
    shutil.copy(scenes / "images" / "scene00000.png", target / "images" / "a.png")
    shutil.copy(labels / "scene00000_mask.png", target / "masks" / "a.png")
    eval.main(["--dataset", str(target), "--checkpoint", str(run), "--device", "cpu", "--output",
               str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["protocol"]["closed_set"] is True
    assert result["protocol"]["seen_target_images"] is True
    for file in labels.glob("*.json"):
        file.write_text(file.read_text().replace("cow", "calf"))
    fails(train.main, [*RUN, "--train-data", scenes / "images", "--labels", labels, "--output", run,
                       "--resume", "auto"], "the bank differs")


def test_what_it_needs_is_asked_for(scenes, labels, tmp_path, fails):
    """Without a folder of images and one of label maps, and with flags of a frozen backbone, it
    ends with one line."""
    images = ["--train-data", scenes / "images"]
    for flags, words in [
            ([*images], ["labels is missing", "segment.py"]),
            (["--train-data", "toy", "--set", "run.epoch_pairs=20", "--labels", labels],
             ["--train-data FOLDER"]),
            ([*images, "--labels", tmp_path], ["no label maps in", tmp_path]),
            ([*images, "--labels", labels, "--image-token", "mean"], ["frozen backbone"]),
            ([*images, "--labels", labels, "--layer-decay", "0"], ["layer_decay is 0"]),
            ([*images, "--labels", labels, "--head-width", "40"], ["head_width is 40"])]:
        fails(train.main, [*RUN, *flags, "--output", tmp_path / "run"], *words)
