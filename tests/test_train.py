"""Training: parts of the recipe by hand, overfitting, whole runs from the command line, and
mistakes."""
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import eval
import segment
import train
from concepts import ConceptBank, load_annotations
from conftest import BANK, read_log, tiny
from data import CaptionedImages, collate
from machinery.training.loading import BatchStream
from machinery.training import resume
from machinery.networks.checkpoint import load_model
from machinery.toy import toy_scene
from model import SimZSS
from train import learning_rate, parse_args

SMALL = ("--backbone toy --text-width 32 --text-layers 1 --image-size 64 --batch 8 --workers 0 "
         "--parser match --templates plain --short-side 64 --window 64 --stride 32 "
         "--eval-data none --device cpu").split()
TOY = ["--train-data", "toy", "--epoch-pairs", "16", *SMALL]


# --------------------------------------------------------------------------------------------------
# Parts of the recipe

def test_learning_rate_by_hand():
    """The rate rises linearly over the first tenth of the steps and falls as a cosine from its peak
    to 0, or to a share of the peak."""
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1.2, 1.4, 1.6, 1.8, 2])
    assert rates[10] == 2 and rates[55] == pytest.approx(1)                     # half-way down
    assert rates[40] == pytest.approx(1 + math.cos(math.pi / 3)) and rates[100] == pytest.approx(0)
    assert learning_rate(0, 1, 2.0, 0.1) == 2                   # a run of one step has a rate, too
    final = [learning_rate(step, 100, 2.0, 0.1, final=0.25) for step in (9, 10, 55, 100)]
    assert final == pytest.approx([2, 2, 1.25, 0.5])


def test_defaults_are_the_recipe():
    """The flags' defaults are the method's: 9.6e-4 at a batch of 8,192, about 490 steps, AdamW
    (0.9, 0.98), decay 0.2."""
    args = parse_args([])
    assert args.base_rate * args.batch / 256 == pytest.approx(9.6e-4)
    assert args.epochs * args.epoch_pairs // args.batch == 488 and args.warmup == 0.1
    assert (args.beta1, args.beta2, args.eps, args.weight_decay) == (0.9, 0.98, 1e-6, 0.2)
    assert args.local_weight == 0.05 and args.local_target == "concept"
    assert (args.pool_temperature, args.local_temperature) == (0.1, 0.07)
    assert (args.image_size, args.text_layers, args.seed) == (224, 12, 0)


def test_the_toy_worlds_settings_give_way_to_flags():
    """--train-data toy changes defaults only: what is said on the command line holds."""
    assert parse_args(["--train-data", "toy"]).backbone == "toy"
    args = parse_args(["--batch", "24", "--train-data", "toy", "--eval-data", "none"])
    assert (args.batch, args.eval_data, args.parser) == (24, "none", "match")


def test_matrices_decay_and_vectors_do_not():
    """Weight decay is on matrices only: not on biases, layer norms and the logit scale; nothing of
    the backbone is trained."""
    model = tiny("test_resnet")
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = model.groups()
    assert (decayed["decay"], free["decay"]) == (1, 0) and decayed["rate"] == free["rate"] == 1
    decayed, free = ({names[id(p)] for p in group["params"]} for group in (decayed, free))
    assert decayed | free == {name for name in names.values() if not name.startswith("backbone.")}
    assert not decayed & free
    assert free == {name for name in names.values() if name == "logit_scale"
                    or name.startswith("text.") and ("ln_" in name or name.endswith("bias"))}


def test_groups_reach_the_optimizer(tmp_path, monkeypatch):
    """A group's decay counts times --weight-decay, and its rate times the learning rate."""
    groups = SimZSS.groups
    seen = []

    def halved(model):
        decayed, free = groups(model)
        return [{**decayed, "rate": 0.5}, free]

    def made(groups, *args, **settings):
        seen.append(optimizer(groups, *args, **settings))
        return seen[0]

    optimizer = torch.optim.AdamW
    monkeypatch.setattr(SimZSS, "groups", halved)
    monkeypatch.setattr(torch.optim, "AdamW", made)
    train.main([*TOY, "--steps", "1", "--weight-decay", "0.3", "--output", str(tmp_path)])
    decayed, free = seen[0].param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0)
    rate = read_log(tmp_path)[0]["lr"]
    assert (decayed["lr"], free["lr"]) == (rate / 2, rate)


def test_eight_captioned_images_can_be_overfitted():
    """Trained on eight captioned images, through data and model code, the losses fall to near
    zero."""
    captions = ["a cow on the grass", "a boat on the sea", "two sheep under the sky", "the grass",
                "a cow and a boat", "a sheep on the grass", "the sea under the sky",
                "a boat under the sky"]
    rng = np.random.default_rng(0)
    annotations = load_annotations(None, captions, ConceptBank(BANK), "match")
    pairs = CaptionedImages([toy_scene(rng)[0] for _ in captions], captions, annotations,
                            partial(SimZSS.sample, size=64), size=64)
    steps = 200
    model = tiny().train()
    model.local_weight = 1.0
    groups = [{"params": group["params"], "weight_decay": 0.0} for group in model.groups()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    for step in range(steps):
        batch = collate([pairs[step * 8 + i, i] for i in range(8)])
        ids = batch["concepts"][..., 0]
        spans = batch["concepts"][..., 1:]
        images = model.backbone.normalise(batch["pixels"])
        losses = model(images, batch["tokens"], ids, spans)
        if step == 0:
            assert losses["global"] > 1.5 and losses["local"] > 1 and losses["concepts"] == 15
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 3e-3, 0.1)
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
    train.main([*TOY, "--steps", "5", "--eval-data", str(folder), "--eval-without", "background",
                "--lambda", "0.3", "--class-embedding", "concept", "--output", "runs/toy"])
    run = tmp_path / "runs" / "toy"
    printed = capsys.readouterr().out
    log = read_log(run)
    assert [line["step"] for line in log] == [0, 1, 2, 3, 4]
    assert log[0].keys() >= {"loss", "global", "local", "logit_scale", "concepts", "present", "lr",
                             "pairs_per_second", "waited", "bad_images"}
    for line in log:
        assert line["loss"] == pytest.approx(line["global"] + 0.3 * line["local"])
    result = json.loads((run / "result.json").read_text())
    cost = result["cost"]
    assert cost["seconds"] > 0 and cost["peak_gib"] > 0.1
    assert cost["trained_parameters"] == sum(p.numel() for p in load_model(run).trained().values())
    assert f"mIoU {result['mIoU']:.2%}" in printed
    assert result["classes"] == ["cow", "grass", "sky", "submarine"]
    assert result["training"]["local_weight"] == 0.3 and result["dataset"] == str(folder)
    heights = [round(256 * h / w) for h, w in [(70, 101), (128, 128), (90, 64)]]
    picture = Image.open(run / "predictions.png")   # three photos below each other, titles, gaps
    assert picture.height == sum(heights) + 24 + 3 * 4 and picture.width > 4 * 256

    # --checkpoint: the newest model under runs/
    eval.main(["--dataset", str(folder), "--without", "background", "--device", "cpu"])
    again = json.loads((run / "eval_folder_without_background.json").read_text())
    for key in ("IoU", "mIoU", "mAcc", "aAcc", "protocol", "backbone", "classes"):
        assert again[key] == result[key]
    segment.main([str(folder / "images" / "photo0.png"), "--classes", "cow, grass",
                  "--output", str(tmp_path)])
    assert Image.open(tmp_path / "photo0_mask.png").size == (101, 70)


def test_a_seed_fixes_the_run(tmp_path):
    """Two runs of one seed log the same numbers and end with the same weights; another seed gives
    others."""
    logs = []
    models = []
    for i, seed in enumerate("778"):
        train.main([*TOY, "--steps", "3", "--seed", seed, "--output", str(tmp_path / str(i))])
        logs.append([{key: value for key, value in line.items()
                      if key not in ("pairs_per_second", "waited")}
                     for line in read_log(tmp_path / str(i))])
        models.append(load_model(tmp_path / str(i)).trained())
    assert logs[0] == logs[1] != logs[2]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_a_run_on_some_of_the_pairs(tmp_path, monkeypatch, capsys):
    """--pairs 5 trains on five of the sixteen pairs, a pass being these five, and the checkpoint
    says so."""
    seen = []
    whole = BatchStream.parts

    def recorded(stream):
        for part in whole(stream):                  # one part a step
            seen.append(stream.keys)
            yield part

    monkeypatch.setattr(BatchStream, "parts", recorded)
    train.main([*TOY, "--pairs", "5", "--epochs", "8", "--output", str(tmp_path)])
    assert len(seen) == 5 * 8 // 8
    assert len({int(key) for keys in seen for key in keys}) == 5
    assert "5 pairs, 5 steps of 8" in capsys.readouterr().out
    training = load_model(tmp_path).trained_with
    assert training["pairs"] == training["pass_pairs"] == 5


@pytest.mark.parametrize("over, world", [("batch", None), ("process", 1)])
def test_process_local_weights_name_the_number_of_processes(tmp_path, over, world):
    """Where results depend on the number of processes, it is among the run's settings, which
    --resume compares."""
    train.main([*TOY, "--steps", "1", "--weights-over", over, "--output", str(tmp_path)])
    assert load_model(tmp_path).trained_with["world"] == world
    assert "world" not in resume.MAY_DIFFER


def test_the_logit_scale_is_kept_at_or_below_a_hundred(tmp_path, monkeypatch):
    """A step that leaves the logit scale above 100 is followed by one at 100."""
    build = SimZSS.build

    def too_sure(args, bank):
        model = build(args, bank)
        torch.nn.init.constant_(model.logit_scale, math.log(150))
        return model

    monkeypatch.setattr(SimZSS, "build", too_sure)
    train.main([*TOY, "--steps", "2", "--base-rate", "1e-9", "--output", str(tmp_path)])
    assert [line["logit_scale"] for line in read_log(tmp_path)] == pytest.approx([150, 100])


def test_cached_features_are_the_live_ones(tmp_path, fails, monkeypatch):
    """Features cached by one run serve the next, with the losses of live features of the same
    pixels up to the cache's float16; those of another backbone are refused."""
    cache = tmp_path / "deep" / "cache"
    steps = [*TOY, "--steps", "3"]
    cached = [*steps, "--cache-features", str(cache)]
    logs = []
    written = []
    for i in range(2):
        train.main([*cached, "--output", str(tmp_path / str(i))])
        logs.append([line["loss"] for line in read_log(tmp_path / str(i))])
        written.append((cache / "features-000000.safetensors").stat().st_mtime_ns)
    assert logs[0] == logs[1] and written[0] == written[1]

    def whole(image, size, rng):
        return image.resize((size, size), Image.BICUBIC)

    monkeypatch.setattr("model.random_resized_crop", whole)
    train.main([*steps, "--output", str(tmp_path / "live")])
    live = [line["loss"] for line in read_log(tmp_path / "live")]
    assert live == pytest.approx(logs[0], rel=1e-3)
    fails(train.main, [*cached, "--pixel-mean", ".1", ".1", ".1"], cache, "backbone")


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
    """A COCO captions file with its images where COCO has them is trained on; the default length
    is counted in passes over it."""
    output = tmp_path / "run"
    train.main(["--train-data", str(coco), *SMALL, "--epochs", "2", "--workers", "1",
                "--output", str(output)])
    log = read_log(output)
    assert len(log) == 2 * 24 // 8
    assert all(line["concepts"] > 0 and line["bad_images"] == 0 for line in log)
    training = load_model(output).trained_with
    assert training["train_data"] == str(coco) and training["steps"] == training["step"] == 6


def test_random_backbones_are_said_and_recorded(folder, tmp_path, capsys):
    """A run on random backbone weights prints a warning, and the checkpoint and every result made
    from it record it."""
    train.main([*TOY, "--backbone", "test_resnet", "--backbone-weights", "random", "--steps", "1",
                "--eval-data", str(folder), "--output", str(tmp_path)])
    assert "random weights" in capsys.readouterr().err
    assert load_model(tmp_path).config()["backbone"]["weights"] == "random"
    eval.main(["--dataset", str(folder), "--checkpoint", str(tmp_path)])
    segment.main([str(folder / "images" / "photo0.png"), "--classes", "cow",
                  "--checkpoint", str(tmp_path), "--output", str(tmp_path)])
    assert capsys.readouterr().err.count("random weights") == 2
    for name in ("result.json", "eval_folder.json", "photo0.json"):
        result = json.loads((tmp_path / name).read_text())
        assert result["backbone"]["weights"] == "random"


# --------------------------------------------------------------------------------------------------
# Mistakes

def test_missing_data_is_named_with_what_is_expected(coco, tmp_path, fails):
    """Missing captions and missing images are named, with COCO's tree and where to get it."""
    missing = tmp_path / "captions_train2017.json"
    fails(train.main, ["--train-data", missing, *SMALL], "no captions file", missing, "train2017/",
          "cocodataset.org")
    photos = coco.parent.parent / "train2017"
    elsewhere = tmp_path / "elsewhere"
    photos.rename(elsewhere)
    fails(train.main, ["--train-data", coco, *SMALL], "no image folder", photos, "--images")
    train.main(["--train-data", str(coco), *SMALL, "--steps", "1", "--images", str(elsewhere),
                "--output", str(tmp_path / "run")])
    coco.write_text('{"images": [], "annotations": []}')
    fails(train.main, ["--train-data", coco, *SMALL], coco, "holds no captions")


def test_missing_images_are_counted(coco, tmp_path, fails):
    """More than 1 % missing images stop the run with their number and an example."""
    (coco.parent.parent / "train2017" / f"{7:012d}.jpg").unlink()
    fails(train.main, ["--train-data", coco, *SMALL], "1 of the 12 images", f"{7:012d}.jpg", "1%")


@pytest.mark.parametrize("more, words", [
    (["--batch", "64", "--epochs", "1"], ["1.0 passes of 16 pairs", "batch of 64", "--batch"]),
    (["--backbone", "vit_huge_dog", "--backbone-weights", "random"],
     ["unknown backbone 'vit_huge_dog'", "timm"]),
    (["--backbone", "test_vit", "--backbone-weights", "none.pth"], ["no file", "none.pth"]),
    (["--backbone-option", "depth"], ["--backbone-option depth", "key=value"]),
    (["--eval-data", "void"], ["unknown dataset 'void'"]),
    (["--bank", "none.txt"], ["no class file none.txt"]),
    (["--parser", "en_core_web_huge"],
     ["en_core_web_huge", "spacy download en_core_web_trf", "--parser match"]),
    (["--batch", "0"], ["--batch is 0", "positive number"]),
    (["--steps", "-1"], ["--steps is -1", "positive number"]),
    (["--pairs", "0"], ["--pairs is 0", "positive number"]),
    (["--pairs", "17"], ["--pairs 17", "only 16"]),
    (["--pool-temperature", "0"], ["--pool-temperature is 0.0", "positive number"]),
    (["--lambda", "-1"], ["--lambda is -1.0", "0 or a positive number"]),
    (["--clip", "-1"], ["--clip is -1.0", "0 or a positive number"]),
    (["--base-rate", "nan"], ["--base-rate is nan", "positive number"]),
    (["--warmup", "3"], ["--warmup is 3.0", "0 to 1"]),
    (["--text-width", "-64"], ["--text-width is -64", "positive number"]),
    (["--pixel-std", "0", "1", "1"], ["--pixel-std", "positive numbers"]),
    (["--templates", "nofile"], ["no templates 'nofile'"]),
    (["--stride", "500"], ["--stride 500", "at most the window"]),
    (["--backbone-option", "pretrained=false"],
     ["--backbone-option pretrained=false", "without a flag here"]),
    (["--text-width", "33", "--text-heads", "2"], ["width 33", "2 heads"]),
    (["--backbone", "toy", "--backbone-weights", "random"],
     ["the toy backbone", "no --backbone-weights"]),
    (["--base-rate", "1e30", "--steps", "9"],
     ["the loss is nan", "5 steps in a row", "nonfinite-0.json", "--base-rate"]),
    (["--micro-batch", "0"], ["--micro-batch is 0", "positive number"]),
    (["--resume", "none.safetensors"], ["--resume: no file none.safetensors"])])
def test_mistakes_end_with_one_line(tmp_path, fails, more, words):
    """Wrong settings end with one line that says what is wrong and what to do."""
    fails(train.main, [*TOY, "--output", tmp_path, *more], *words)


def test_a_global_batch_that_cannot_be_shared_is_refused(tmp_path, fails, monkeypatch):
    """A global batch that is no multiple of the number of processes is refused before they wait
    for each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(train.main, [*TOY, "--batch", "7", "--output", tmp_path],
          "--batch 7 is the global batch", "the 2 processes")


def test_a_run_without_download_ends_with_both_ways_out(tmp_path, fails, monkeypatch):
    """Without network and weights a run ends with a line that names a local file and random
    weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    fails(train.main, [*TOY, "--backbone", "vit_tiny_patch16_224"],
          "--backbone-weights FILE", "--backbone-weights random")


@pytest.fixture
def broken(tmp_path):
    """broken(every): a TSV of 60 captioned photos of which every `every`-th is a good image (0 =
    none is) and the others are no images."""
    def broken(every):
        lines = [f"{i}.jpg\ta cow number {i}\n" for i in range(60)]
        (tmp_path / "pairs.tsv").write_text("".join(lines))
        for i in range(60):
            Image.new("RGB", (64, 64), (i, 99, 0)).save(tmp_path / f"{i}.jpg")
            if every == 0 or i % every:
                (tmp_path / f"{i}.jpg").write_text("no image")
        return tmp_path / "pairs.tsv"
    return broken


def test_a_few_unreadable_images_are_replaced_and_counted(broken, tmp_path, capsys):
    """An unreadable image is replaced by the next pair and counted, in the log and at the end."""
    pairs = broken(1)
    (tmp_path / "7.jpg").write_text("no image")
    train.main(["--train-data", str(pairs), *SMALL, "--batch", "60", "--epochs", "1",
                "--output", str(tmp_path / "run")])
    assert [line["bad_images"] for line in read_log(tmp_path / "run")] == [1]
    assert "left out: bad image 1" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["0", "1"])
def test_many_unreadable_images_stop_the_run(broken, tmp_path, fails, workers):
    """More than 1 % unreadable images stop the run in one line, whether some are unreadable in
    every batch or all of them."""
    more = [*SMALL, "--steps", "5", "--workers", workers, "--output", tmp_path / "run"]
    fails(train.main, ["--train-data", broken(3), *more],
          "pairs could not be read (bad image", "1%")
    fails(train.main, ["--train-data", broken(0), *more],
          "ten unreadable images in a row", "no readable image")
