"""Training: recipes and flags, the schedule by hand, overfitting, whole runs from the command line,
and mistakes."""
import json
import math
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval
import segment
import train
from concepts import ConceptBank, Concepts
from conftest import BANK, ROOT, read_log, tiny
from data import MAX_PIXELS, CaptionedImages, collate
from machinery.networks.checkpoint import load_model
from machinery.settings import RECIPES
from machinery.tokenizer import tokenizer
from machinery.toy import toy_scene
from model import SimZSS
from train import learning_rate, read_command_line

SMALL = ("--recipe toy --batch 8 --image-size 64 --text-width 32 --eval-data none --device cpu "
         "--set run.epoch_pairs=16").split()


# --------------------------------------------------------------------------------------------------
# Recipes and flags

def test_every_recipe_is_whole():
    """Each recipe has all that has no default, and nothing that its method does not know; none
    writes where another one does."""
    names = [path.stem for path in RECIPES.glob("*.toml")]
    needed = {"sseg-plus": ["--train-data", "images", "--labels", "labels"]}
    outputs = {read_command_line(["--recipe", name, *needed.get(name, [])]).run.output
               for name in names}
    assert len(outputs) == len(names) > 8


def test_the_recipe_of_simzss_is_the_papers():
    """Without flags train.py runs the paper's recipe: rate 9.6e-4 at a batch of 8,192, 488 steps on
    COCO Captions, AdamW (0.9, 0.98), decay 0.2."""
    recipe = read_command_line([])
    run = recipe.run
    assert run.base_rate * run.batch / 256 == pytest.approx(9.6e-4)
    assert train.length_of_run(run, range(591_753)) == {"steps": 488, "pass_pairs": 400_000,
                                                        "pairs": 591_753}
    assert (run.schedule, run.warmup, run.final_rate, run.clip) == ("cosine", 0.1, 0, 0)
    assert (run.beta1, run.beta2, run.eps, run.weight_decay) == (0.9, 0.98, 1e-6, 0.2)
    assert (run.image_size, run.seed, recipe.model.text.layers) == (224, 0, 12)
    assert recipe.model.local_weight == 0.05 and recipe.model.local_target == "concept"
    assert (recipe.model.pool_temperature, recipe.model.local_temperature) == (0.1, 0.07)


def test_flags_change_single_values():
    """What is said on the command line holds; all else is the recipe's. --epochs and --steps
    replace each other, whichever the recipe has."""
    toy = ["--recipe", "toy"]
    recipe = read_command_line([*toy, "--batch", "24", "--lambda", "0", "--set",
                                "run.weight_decay=1", "--set", "protocol.window=96"])
    assert (recipe.run.batch, recipe.run.epochs, recipe.run.weight_decay) == (24, 8, 1)
    assert (recipe.model.local_weight, recipe.model.backbone.name) == (0, "toy")
    assert (recipe.protocol.window, recipe.protocol.short_side) == (96, 128)
    for flags, epochs, steps in (([], 8, None), (["--steps", "3"], None, 3),
                                 (["--epochs", "2"], 2, None)):
        run = read_command_line([*toy, *flags]).run
        assert (run.epochs, run.steps) == (epochs, steps)
    in_steps = ["--recipe", "sseg-plus", "--train-data", "images", "--labels", "labels"]
    for flags, epochs, steps in (([], None, 20_000), (["--epochs", "2"], 2, None)):
        run = read_command_line([*in_steps, *flags]).run
        assert (run.epochs, run.steps) == (epochs, steps)


@pytest.mark.parametrize("text, words", [
    ('methods = "simzss"', ['a line method = "NAME"']),
    ('method = "magic"', ["unknown method 'magic'", "simzss"]),
    ('method = "simzss"\n[runs]', ["no table 'runs'", "run, model, protocol"]),
    ('method = "simzss"\n[run]\nbatches = 3', ["run: there is no setting 'batches'", "batch"]),
    ('method = "simzss"', ["run: the setting train_data is missing"])])
def test_recipes_that_are_refused(tmp_path, fails, text, words):
    """A recipe with a mistake ends with one line that says what was expected."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    fails(train.main, ["--recipe", path], *words)


def test_a_setting_of_no_table_is_refused(fails):
    """The method's settings are set as model.NAME; the recipe's line method = is no table."""
    fails(train.main, ["--recipe", "toy", "--set", "method.pool_temperature=0.5"],
          "no table 'method'", "run, model, protocol")


def test_an_old_python_is_refused():
    """On a Python older than 3.11 whatever imports something of machinery/, as each script does,
    ends with one line."""
    old = ("import sys; sys.version_info = (3, 10, 4); sys.version = '3.10.4 (main)'; "
           "import machinery.settings")
    done = subprocess.run([sys.executable, "-c", old], cwd=ROOT, text=True, capture_output=True)
    assert done.stderr == "error: Python 3.10.4 is too old; expected 3.11 or newer\n"
    assert done.returncode == 1


def test_help_is_short_and_needs_no_network(tmp_path):
    """`train.py --help` works from any folder without a network, and has at most 35 flags; those of
    concepts are there only where the method needs them."""
    for recipe, of_concepts in (("simzss", {"--parser", "--bank", "--exclude-classes"}),
                                ("sseg", set())):
        done = subprocess.run([sys.executable, ROOT / "train.py", "--recipe", recipe, "--help"],
                              cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        flags = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  -")]
        assert len(set(flags)) == len(flags) > 20 and (recipe != "simzss" or len(flags) <= 35)
        assert of_concepts == {"--parser", "--bank", "--exclude-classes"} & set(flags)


# --------------------------------------------------------------------------------------------------
# The schedule and the optimizer

def rates(schedule, steps, last=0.0):
    """The learning rates of some of 100 steps, 10 of them warm-up, for a peak of 2."""
    settings = SimpleNamespace(schedule=schedule, warmup=0.1, final_rate=last)
    return [learning_rate(step, 100, 2.0, settings) for step in steps]


def test_cosine_by_hand():
    """"cosine": the rate rises linearly over the first tenth of the steps and falls as a cosine
    from its peak to 0, or to a part of the peak."""
    assert rates("cosine", range(10)) == pytest.approx([.2, .4, .6, .8, 1, 1.2, 1.4, 1.6, 1.8, 2])
    expected = [2, 1 + math.cos(math.pi / 3), 1, 0]
    assert rates("cosine", [10, 40, 55, 100]) == pytest.approx(expected)
    assert rates("cosine", [9, 10, 55, 100], 0.25) == pytest.approx([2, 2, 1.25, 0.5])
    settings = SimpleNamespace(schedule="cosine", warmup=0.1, final_rate=0.0)
    assert learning_rate(0, 1, 2.0, settings) == 2              # a run of one step has a rate, too


def test_polynomial_by_hand():
    """"polynomial": after the warm-up the rate falls as (1 - t) ** 0.9."""
    assert rates("polynomial", [0, 9, 10, 55, 100]) == pytest.approx([.2, 2, 2, 2 * .5 ** .9, 0])
    assert rates("polynomial", [55, 100], 0.25) == pytest.approx([.5 + 1.5 * .5 ** .9, .5])


def test_cosine_whole_by_hand():
    """"cosine-whole": the warm-up begins at 0.025 x peak, and the cosine counts from step 0: it is
    a little below the peak where the warm-up ends."""
    assert rates("cosine-whole", [0, 5]) == pytest.approx([0.05, 0.05 + 1.95 / 2])
    expected = [1 + math.cos(math.pi / 10), 1, 0]
    assert rates("cosine-whole", [10, 50, 100]) == pytest.approx(expected)
    assert rates("cosine-whole", [50, 100], 0.25) == pytest.approx([1.25, 0.5])


def test_matrices_decay_and_vectors_do_not():
    """Weight decay is on matrices only: not on biases, layer norms and the logit scale; nothing of
    the backbone is trained."""
    model = tiny(backbone={"name": "test_resnet", "weights": "random"})
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = model.parameter_groups()
    assert (decayed["decay"], free["decay"]) == (1, 0) and decayed["rate"] == free["rate"] == 1
    decayed, free = ({names[id(p)] for p in group["params"]} for group in (decayed, free))
    assert decayed | free == {name for name in names.values() if not name.startswith("backbone.")}
    assert not decayed & free
    assert free == {name for name in names.values() if name == "logit_scale"
                    or name.startswith("text.") and ("ln_" in name or name.endswith("bias"))}


def test_gradients_are_clipped_by_their_common_norm():
    """Gradients (3, 0) and (4,) have norm 5; bounded by 1 they become a fifth, with 0 they stay.
    The loss scale of float16 does not count."""
    for clip, scale, expected in ((1.0, 1.0, [0.6, 0, 0.8]), (0.0, 1.0, [3, 0, 4]),
                                  (9.0, 1.0, [3, 0, 4]), (1.0, 8.0, [4.8, 0, 6.4])):
        parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
        parameters[0].grad = scale * torch.tensor([3.0, 0.0])
        parameters[1].grad = scale * torch.tensor([4.0])
        norm = train.clip_gradients(parameters, SimpleNamespace(get_scale=lambda: scale), clip)
        assert norm == pytest.approx(5)
        assert torch.cat([p.grad for p in parameters]).tolist() == pytest.approx(expected)


def test_eight_captioned_images_can_be_overfitted():
    """Trained on eight captioned images, through data and model code, the losses fall to near
    zero."""
    captions = ["a cow on the grass", "a boat on the sea", "two sheep under the sky", "the grass",
                "a cow and a boat", "a sheep on the grass", "the sea under the sky",
                "a boat under the sky"]
    rng = np.random.default_rng(1)                  # eight scenes of which no two are alike
    bank = ConceptBank(BANK)
    model = tiny(local_weight=1.0).train()
    pairs = CaptionedImages([toy_scene(rng)[0] for _ in captions], captions,
                            partial(SimZSS.sample, settings=model.settings), size=64, bank=bank,
                            annotations=Concepts(bank, "match").of_captions(captions))
    steps = 120
    settings = SimpleNamespace(schedule="cosine", warmup=0.1, final_rate=0.0)
    optimizer = torch.optim.AdamW(model.trained().values(), betas=(0.9, 0.98), weight_decay=0.0,
                                  fused=True)
    for step in range(steps):
        batch = model.features(collate([pairs[step * 8 + i, i] for i in range(8)]))
        losses = model.losses(model.encode(batch), batch)
        if step == 0:
            assert losses["global"] > 1.5 and losses["local"] > 1 and losses["concepts"] == 15
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 3e-3, settings)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["global"] < 0.05 and losses["local"] < 0.05


# --------------------------------------------------------------------------------------------------
# Whole runs

def test_a_run_on_the_toy_world(folder, tmp_path, capsys, monkeypatch):
    """A run trains, logs every step, scores the folder and writes a model that eval.py and
    segment.py can use."""
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL, "--steps", "5", "--eval-data", str(folder), "--lambda", "0.3", "--set",
                'run.eval_without=["background"]'])
    run = tmp_path / "runs" / "toy"
    printed = capsys.readouterr().out
    log = read_log(run)
    assert [line["step"] for line in log] == [0, 1, 2, 3, 4]
    assert log[0].keys() == {"step", "loss", "global", "local", "logit_scale", "concepts",
                             "present", "grad_norm", "lr", "pairs_per_second", "waited",
                             "bad_images", "skipped"}
    for line in log:
        assert line["loss"] == pytest.approx(line["global"] + 0.3 * line["local"])
    result = json.loads((run / "result.json").read_text())
    cost = result["cost"]
    assert cost["seconds"] >= 0 and cost["peak_gib"] > 0.1
    assert cost["trained_parameters"] == sum(p.numel() for p in load_model(run).trained().values())
    assert f"mIoU {result['mIoU']:.2%}" in printed
    seen = load_model(run).seen_tokens              # of all tokens, those of the captions
    assert 10 < seen.sum() < 200
    assert seen[tokenizer().encode("boat on the sea")].all()
    assert not seen[tokenizer().encode("zeppelin")].any()
    assert result["classes"] == ["cow", "grass", "sky", "submarine"]
    assert result["settings"]["local_weight"] == 0.3 and result["dataset"] == str(folder)
    heights = [round(256 * h / w) for h, w in [(70, 101), (128, 128), (90, 64)]]
    picture = Image.open(run / "predictions.png")   # three photos below each other, titles, gaps
    assert picture.height == sum(heights) + 24 + 3 * 4 and picture.width > 4 * 256

    # --checkpoint: the newest model under runs/
    eval.main(["--dataset", str(folder), "--without", "background", "--device", "cpu"])
    again = json.loads((run / "eval_folder_without_background.json").read_text())
    for key in ("IoU", "mIoU", "mAcc", "aAcc", "protocol", "settings", "classes"):
        assert again[key] == result[key]
    segment.main([str(folder / "images" / "photo0.png"), "--classes", "cow, grass",
                  "--output", str(tmp_path)])
    assert Image.open(tmp_path / "photo0_mask.png").size == (101, 70)


def test_a_run_on_some_of_the_pairs(tmp_path, capsys):
    """--pairs 5 trains on five of the sixteen pairs, a pass being these five, and the checkpoint
    says so."""
    train.main([*SMALL, "--pairs", "5", "--epochs", "8", "--output", str(tmp_path)])
    assert "5 pairs, 5 steps of 8" in capsys.readouterr().out and len(read_log(tmp_path)) == 5
    training = load_model(tmp_path).trained_with
    assert training["pairs"] == training["pass_pairs"] == 5


@pytest.fixture
def coco(tmp_path):
    """Twelve photos with two captions each, in COCO's layout. Returns the captions file."""
    rng = np.random.default_rng(0)
    images = []
    captions = []
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "train2017").mkdir()
    for i in range(12):
        image, _, caption = toy_scene(rng)
        name = f"{i:012d}.jpg"
        Image.fromarray(image).save(tmp_path / "coco" / "train2017" / name)
        images.append({"id": 70 + i, "file_name": name, "height": 128, "width": 128})
        captions += [{"id": 2 * i, "image_id": 70 + i, "caption": f"{caption}."},
                     {"id": 2 * i + 1, "image_id": 70 + i, "caption": "Something else\n"}]
    path = tmp_path / "coco" / "annotations" / "captions_train2017.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    return path


def test_a_run_on_cocos_layout(coco, tmp_path):
    """A COCO captions file with its images where COCO has them is trained on; its length is counted
    in passes over it."""
    output = tmp_path / "run"
    train.main([*SMALL, "--train-data", str(coco), "--set", "run.epoch_pairs=1000", "--epochs", "2",
                "--workers", "1", "--image-token", "mean", "--output", str(output)])
    log = read_log(output)
    assert len(log) == 2 * 24 // 8
    assert all(line["concepts"] > 0 and line["bad_images"] == 0 for line in log)
    model = load_model(output)
    training = model.trained_with
    assert training["run"]["train_data"] == str(coco) and training["steps"] == training["step"] == 6
    assert model.settings.backbone.image_token == "mean" and not model.backbone.uses_class_token


def test_random_backbones_are_said_and_recorded(folder, tmp_path, capsys):
    """A run on random backbone weights prints a warning, and the checkpoint and every result made
    from it record it."""
    train.main([*SMALL, "--backbone", "test_resnet", "--backbone-weights", "random", "--steps", "1",
                "--eval-data", str(folder), "--output", str(tmp_path)])
    assert "random weights" in capsys.readouterr().err
    assert load_model(tmp_path).settings.backbone.weights == "random"
    eval.main(["--dataset", str(folder), "--checkpoint", str(tmp_path)])
    segment.main([str(folder / "images" / "photo0.png"), "--classes", "cow, sky",
                  "--checkpoint", str(tmp_path), "--output", str(tmp_path)])
    assert capsys.readouterr().err.count("random weights") == 2
    for name in ("result.json", "eval_folder.json", "photo0.json"):
        result = json.loads((tmp_path / name).read_text())
        assert result["settings"]["backbone"]["weights"] == "random"


# --------------------------------------------------------------------------------------------------
# Mistakes

def test_missing_data_is_named_with_what_is_expected(coco, tmp_path, fails):
    """Missing captions and missing images are named, with COCO's tree and where to get it."""
    missing = tmp_path / "captions_train2017.json"
    fails(train.main, [*SMALL, "--train-data", missing], "no captions file", missing, "train2017/",
          "cocodataset.org")
    photos = coco.parent.parent / "train2017"
    elsewhere = tmp_path / "elsewhere"
    photos.rename(elsewhere)
    fails(train.main, [*SMALL, "--train-data", coco], "no image folder", photos, "--images")
    train.main([*SMALL, "--train-data", str(coco), "--steps", "1", "--images", str(elsewhere),
                "--output", str(tmp_path / "run")])
    coco.write_text('{"images": [], "annotations": []}')
    fails(train.main, [*SMALL, "--train-data", coco], coco, "holds no captions")


@pytest.mark.parametrize("more, words", [
    (["--recipe", "simszs"], ["no recipe 'simszs'", "simzss", ".toml"]),
    (["--batch", "64", "--epochs", "1"], ["1.0 passes of 16 pairs", "batch of 64", "--batch"]),
    (["--steps", "3", "--epochs", "1"], ["epochs is 1.0, steps 3", "one of them"]),
    (["--backbone", "vit_huge_dog", "--backbone-weights", "random"],
     ["unknown backbone 'vit_huge_dog'", "timm"]),
    (["--backbone", "test_vit", "--backbone-weights", "none.pth"], ["no file", "none.pth"]),
    (["--set", "depth"], ["--set depth", "TABLE.NAME=VALUE"]),
    (["--set", "run.depth=1"], ["run: there is no setting 'depth'", "batch"]),
    (["--set", "run.beta1=high"], ["beta1 is 'high'", "a number"]),
    (["--set", "model.backbone.options.checkpoint_path=x.pth", "--backbone", "test_vit"],
     ["checkpoint_path", "expected one that shapes the network"]),
    (["--eval-data", "void"], ["unknown dataset 'void'"]),
    (["--bank", "none.txt"], ["none.txt"]),
    (["--parser", "en_core_web_huge"],
     ["en_core_web_huge", "spacy download en_core_web_trf", "--parser match"]),
    (["--batch", "0"], ["batch is 0", "at least 1"]),
    (["--pairs", "17"], ["--pairs 17", "only 16"]),
    (["--pool-temperature", "0"], ["pool_temperature is 0.0", "more than 0"]),
    (["--base-rate", "nan"], ["base_rate is nan", "more than 0"]),
    (["--set", "run.warmup=3"], ["warmup is 3.0", "at most 1"]),
    (["--set", "protocol.templates=nofile"], ["no templates 'nofile'"]),
    (["--set", "protocol.stride=500"], ["stride 500", "window"]),
    (["--set", "protocol.scales=[]"], ["scales is empty", "at least one"]),
    (["--text-width", "33", "--set", "model.text.heads=2"], ["width 33", "2 heads"]),
    (["--backbone-weights", "random"], ["the toy backbone", "takes no weights"]),
    (["--base-rate", "1e30", "--steps", "9"],
     ["the loss is nan", "5 steps in a row", "pair", "--base-rate"]),
    (["--device", "cuda"], ["--device cuda", "auto or cpu"])])
def test_mistakes_end_with_one_line(tmp_path, fails, more, words):
    """Wrong settings end with one line that says what is wrong and what to do."""
    fails(train.main, [*SMALL, "--output", tmp_path / "run", *more], *words)


def test_unknown_flags_end_with_the_known_ones(capsys):
    """A flag that does not exist, or is of another method, is refused by its name; flags cannot be
    shortened."""
    for flag in ("--linear-width", "--epoch-pairs", "--text-wid"):
        with pytest.raises(SystemExit) as ended:
            train.main([*SMALL, flag, "3"])
        assert ended.value.code == 2
        assert f"unrecognized arguments: {flag} 3" in capsys.readouterr().err


def test_a_batch_that_cannot_be_dealt_out_is_refused(tmp_path, fails, monkeypatch):
    """A global batch that is no multiple of the number of processes is refused before they wait
    for each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(train.main, [*SMALL, "--batch", "7", "--output", tmp_path],
          "--batch 7 is the global batch", "the 2 processes")


# --------------------------------------------------------------------------------------------------
# Images that cannot be used

@pytest.fixture
def photos(tmp_path):
    """photos(are_good): a TSV of 60 captioned photos, those for which are_good(number) is false
    being no images."""
    def photos(are_good):
        lines = [f"{i}.jpg\ta cow number {i}\n" for i in range(60)]
        (tmp_path / "pairs.tsv").write_text("".join(lines))
        for i in range(60):
            Image.new("RGB", (64, 64), (i, 99, 0)).save(tmp_path / f"{i}.jpg")
            if not are_good(i):
                (tmp_path / f"{i}.jpg").write_text("no image")
        return ["--train-data", str(tmp_path / "pairs.tsv"), "--set", "run.epoch_pairs=60"]
    return photos


def test_a_few_unreadable_images_are_replaced_and_counted(photos, tmp_path, capsys):
    """An unreadable image, or one of more pixels than a training image may have, is replaced by the
    next pair and counted, in the log and at the end."""
    pairs = photos(lambda i: i != 7)
    side = int(MAX_PIXELS ** 0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "9.jpg", "PNG")
    train.main([*SMALL, *pairs, "--batch", "60", "--epochs", "1", "--output",
                str(tmp_path / "run")])
    assert [line["bad_images"] for line in read_log(tmp_path / "run")] == [2]
    assert "left out: bad image 2" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["0", "1"])
def test_many_unreadable_images_stop_the_run(photos, tmp_path, fails, workers):
    """More than 1 % unreadable images stop the run in one line, whether some are unreadable in
    every batch or all of them."""
    more = ["--steps", "5", "--workers", workers, "--output", tmp_path / "run"]
    fails(train.main, [*SMALL, *photos(lambda i: i % 3 == 0), *more],
          "pairs could not be used (bad image", "1%", "run.max_bad")
    fails(train.main, [*SMALL, *photos(lambda i: False), *more],
          "ten pairs in a row cannot be used")
