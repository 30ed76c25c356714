"""Train SimZSS: only the text encoder learns, the vision backbone is frozen.

    python train.py --train-data toy                    # a minute on a laptop, no download
    torchrun --nproc_per_node 8 train.py                # the paper's run on COCO Captions

The flags' defaults are the recipe of the method, section 9. A run writes into its output folder: model.safetensors,
log.jsonl (a line per step), and, if it was scored at the end, result.json and predictions.png; until it is finished,
also the two newest state-STEP.safetensors, from which --resume auto goes on as if nothing had happened.
"""
import argparse
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from concepts import DEFAULT_PARSER, ConceptBank
from data import CachedFeatures, GlobalBatches, Shards, collate, load_pairs
from eval import evaluate
from machinery.benchmarks import open_dataset
from machinery.parallel import (average_gradients, first_process_first, gather_rows, ignore_signals, join_processes,
                                pick_device, pick_precision, place, sum_over_processes)
from machinery.pictures import grid
from machinery.resume import (MAX_BAD, check_bad, give_up, leave, note_signals, open_log, read_state, report, save_state,
                              states)
from machinery.results import print_result, write_result
from machinery.shards import BAD, bad_line
from model import (DEFAULT_BACKBONE, MAX_LOGIT_SCALE, SimZSS, TextEncoder, VisionBackbone, by_length, save_model)
from segment import PROTOCOL

# What differs from the recipe in the toy world: everything is smaller.
TOY = {"backbone": "toy", "parser": "match", "image_size": 128, "text_width": 256, "text_layers": 1, "batch": 64,
       "epochs": 16, "epoch_pairs": 2000, "base_rate": 0.012, "eval_data": "toy", "output": "runs/toy", "workers": 0,
       "short_side": 128, "window": 128, "stride": 64, "class_embedding": "concept"}

TEXT_GROUP = 16                                     # captions of alike length that are encoded at a time ...
GPU_TEXT_GROUP = 256                                # ... and on a GPU, which fewer would not fill
PIECE = 256                                         # pairs that a data worker loads, and the backbone sees, at most
MAX_SKIPPED = 5                                     # steps in a row without finite loss and gradients that end a run
# Settings that another value of leaves the losses as they are, or that are compared in another form
FREE = {"images", "bank", "exclude_classes", "denoiser", "output", "resume", "backbone_weights", "cache_features",
        "micro_batch", "workers", "max_bad", "save_minutes", "timeout_minutes", "precision", "device", "protocol", "epochs",
        "epoch_pairs", "eval_data", "eval_without", "eval_names", *PROTOCOL}


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of a step

def parameter_groups(parameters, weight_decay):
    """Weight decay on matrices; none on vectors and the logit scale."""
    return [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first share of the steps, then cosine to 0. step counts from 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def next_batch(loader, pieces, places, model, device, autocast):
    """The process's share of the next batch, from as many pieces of the loader, with features in place of pixels.

    The frozen backbone sees one piece at a time. Returns the batch as `collate` makes it, with class_token (B, D) and
    patch_tokens (B, N, D), float32 on the device, and the seconds that it waited for data. places: see `open_stream`.
    """
    got, patches, waited = [], None, 0.0
    for number in range(pieces):
        start = time.time()
        piece = next(loader)
        waited += time.time() - start
        piece = {key: value.to(device, non_blocking=True) if torch.is_tensor(value) and key not in ("key", "state")
                 else value for key, value in piece.items()}
        if "pixels" in piece:
            with autocast():
                features = model.backbone(model.backbone.normalise(piece.pop("pixels")))
            piece["class_token"], piece["patch_tokens"], _ = features
        seen = piece.pop("patch_tokens")                                                # (B / pieces, N, D)
        if patches is None:                         # the largest tensor by far: joined as it comes, never held twice
            patches = torch.empty(pieces * len(seen), *seen.shape[1:], device=device)   # (B, N, D)
        patches[number * len(seen):(number + 1) * len(seen)] = seen
        if "state" in piece:
            places[piece["state"][0]] = piece["state"]
        else:
            places[0, BAD.index("bad image")] += piece["bad"]
        got.append(piece)
    M = max(piece["ids"].shape[1] for piece in got)
    for piece in got:
        missing = M - piece["ids"].shape[1]
        piece["ids"] = F.pad(piece["ids"], (0, missing), value=-1)                      # (B / pieces, M)
        piece["spans"] = F.pad(piece["spans"], (0, 0, 0, missing))                      # (B / pieces, M, 2)
    batch = {key: torch.cat([piece[key] for piece in got]) for key in ("class_token", "tokens", "ids", "spans", "key")}
    return {**batch, "class_token": batch["class_token"].float(), "patch_tokens": patches}, waited


def backward(model, batch, group, twice, autocast, scaler):
    """The losses of the global batch; their gradients, scaled, are left in the parameters.

    group: captions of alike length encoded at a time. twice: encode first without gradient, then, once the gradient
    with respect to the embeddings is known, again group by group: the same gradients, with the activations of one
    group in memory.
    """
    tokens, spans = batch["tokens"], batch["spans"]
    with autocast(), torch.set_grad_enabled(not twice):
        text = model.encode_text(tokens, spans, group)                                  # (B, D), (B, M, D)
    if twice:
        text = [embeddings.requires_grad_() for embeddings in text]
    losses = model.losses(batch["class_token"], batch["patch_tokens"], *text, batch["ids"])
    scaler.scale(losses["loss"]).backward()
    if twice:
        for rows in by_length(tokens, group):
            with autocast():                        # anew: it may keep weights that were cast without gradient
                again = model.encode_text(tokens[rows], spans[rows])
            torch.autograd.backward(again, [embeddings.grad[rows] for embeddings in text])
    return losses


# ---------------------------------------------------------------------------------------------------------------------
# The run

def build_model(args, bank):
    options = {}
    for option in args.backbone_option:
        key, equals, value = option.partition("=")
        if not equals or key in ("name", "pretrained", "weights", "mean", "std", "denoiser"):
            raise ValueError(f"--backbone-option {option}: expected key=value, the key one of timm's without a flag here")
        try:
            options[key] = json.loads(value)        # numbers, true, false ...
        except json.JSONDecodeError:
            options[key] = value                    # ... and plain words
    random = args.backbone_weights == "random"
    if random and args.backbone == "toy":
        raise ValueError("the toy backbone is made by hand; it takes no --backbone-weights")
    backbone = VisionBackbone(args.backbone, pretrained=not random, weights=None if random else args.backbone_weights,
                              mean=args.pixel_mean, std=args.pixel_std, denoiser=args.denoiser, **options)
    text = TextEncoder(backbone.width, args.text_width, args.text_heads, args.text_layers)
    return SimZSS(backbone, text, bank.names, args.weight, args.pool_temperature, args.local_temperature,
                  args.local_target, args.pool_query, args.weights_over)


def train(args, rank, world, patient=None):
    """Train as args say. Returns the trained model, the same in every process, and its settings.

    patient: process group for waits that may be long, of `join_processes`.
    """
    kind, device = place(args, world)
    output, resumed = Path(args.output), None
    if args.resume:
        resumed = read_state(args.resume, output)
    elif unfinished := states(output):
        raise ValueError(f"{output} holds an unfinished run ({unfinished[0].name}): go on with --resume auto, name another "
                         "folder with --output, or delete its state files")
    torch.manual_seed(args.seed)                    # the same initial weights everywhere; nothing later is drawn from it
    bank = ConceptBank.by_name(args.bank, args.exclude_classes)
    if args.eval_data != "none":
        open_dataset(args.eval_data, args.eval_without, args.eval_names)
    with first_process_first(rank, patient):        # one annotates, the others find the annotations cached
        pairs = load_pairs(args.train_data, bank, args.parser, args.image_size, args.images, args.seed, args.epoch_pairs)
    sharded = isinstance(pairs, Shards)
    if sharded and args.cache_features:
        raise ValueError("--cache-features needs single images and a captions file; shards are streamed")
    if args.pairs and (sharded or args.pairs > len(pairs)):
        raise ValueError(f"--pairs {args.pairs}: " + ("tars are read whole, name fewer of them" if sharded else
                                                      f"there are only {len(pairs)}"))
    used = None if sharded else args.pairs or len(pairs)
    pass_pairs = args.epoch_pairs if sharded else min(args.epoch_pairs, used)
    steps = args.steps or int(args.epochs * pass_pairs / args.batch)
    if steps < 1:
        raise ValueError(f"{args.epochs} passes of {pass_pairs} pairs are less than one batch of {args.batch}; "
                         "lower --batch or raise --epochs")
    model = build_model(args, bank).to(device)      # after the data was found, for it may download
    if rank == 0 and model.backbone.config["weights"] == "random":
        print("warning: the backbone has random weights, as asked for; this model's masks will mean nothing",
              file=sys.stderr)
    precision = pick_precision(args.precision, kind)
    autocast = partial(torch.autocast, kind, precision, enabled=precision != torch.float32)

    if args.cache_features:
        with first_process_first(rank, patient):
            pairs = CachedFeatures(pairs, model.backbone, args.cache_features, precision=str(precision))
        pairs.compute(model.backbone, rank, world, args.workers, autocast)
        if patient:
            dist.barrier(patient)
        if pairs.missing():
            raise ValueError(f"features are missing in {args.cache_features}; it must be a folder that all processes share")
    share = args.batch // world
    micro = min(args.micro_batch or share, share)   # pairs that the text encoder computes at a time, and at most ...
    piece = max(part for part in range(1, min(micro, PIECE) + 1) if share % part == 0)  # ... these are loaded together
    group = min(micro, GPU_TEXT_GROUP if kind == "cuda" else TEXT_GROUP)
    parameters = list(model.trained().values())
    optimizer = torch.optim.AdamW(parameter_groups(parameters, args.weight_decay), betas=(args.beta1, args.beta2),
                                  eps=args.eps, fused=kind != "mps")
    scaler = torch.amp.GradScaler(kind, enabled=precision == torch.float16)
    peak = args.base_rate * args.batch / 256
    config = {**vars(args), "protocol": {key: getattr(args, key) for key in PROTOCOL}, "steps": steps,
              "pass_pairs": pass_pairs, "pairs": used, "piece": piece if sharded else None,
              "world": world if args.weights_over == "process" else None,
              "arithmetic": str(precision).removeprefix("torch."), "cached": bool(args.cache_features)}
    start, skipped, counts, shards = 0, 0, [0] * len(BAD), None
    if resumed:
        start, skipped, counts, shards = restore(resumed, config, model, optimizer, scaler)
    if sum_over_processes(torch.tensor(start, device=device)) != start * world:
        raise ValueError("the processes found different states; --output must be a folder that all of them share")
    loader, places = open_stream(pairs, args, piece, steps, start, rank, world, counts, shards)
    if rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        log = open_log(output / "log.jsonl", start)
        amount = f"{len(pairs.paths):,} shards" if sharded else f"{used:,} pairs"
        print(f"{amount}, {steps} steps of {args.batch}, {sum(p.numel() for p in parameters) / 1e6:.1f} M trained "
              f"parameters, {world} x {device}, {config['arithmetic']}" + (f", resumed at step {start}" if resumed else ""))
    saved = started = time.time()
    failures = []                                   # steps in a row whose loss or gradients were not finite
    with note_signals() as signals, \
            tqdm(total=steps, initial=start, desc="training", unit=" steps", disable=None if rank == 0 else True) as bar:
        for step in range(start, steps):
            ready = time.time()
            batch, waited = next_batch(loader, share // piece, places, model, device, autocast)
            rate = learning_rate(step, steps, peak, args.warmup)
            for settings in optimizer.param_groups:
                settings["lr"] = rate
            optimizer.zero_grad()
            losses = backward(model, batch, group, micro < share, autocast, scaler)
            average_gradients(parameters)
            losses["grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in parameters]) / scaler.get_scale()
            values = {key: value.item() for key, value in losses.items()}               # waits for the device
            finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])   # the same in all processes
            if finite or scaler.is_enabled() and math.isfinite(values["loss"]):
                scaler.step(optimizer)              # skips gradients that float16 cannot hold ...
                scaler.update()                     # ... and lowers their scale
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))
            skipped += not finite
            if finite or math.isfinite(values["loss"]) and scaler.get_scale() > 1:
                failures = []
            else:
                failures.append({**values, "step": step, "samples": [pairs.name(key) for key in batch["key"]]})
                if len(failures) == MAX_SKIPPED:
                    give_up(failures, output, rank)

            due = rank == 0 and time.time() - saved >= 60 * args.save_minutes
            flags = torch.tensor([len(signals), due, *places[:, -len(BAD):].sum(dim=0)], device=device)
            stop, save, *counts = sum_over_processes(flags).tolist()                    # over all processes
            check_bad(counts, (step + 1) * args.batch, args.max_bad)
            if sharded and (step + 1) * args.batch % pass_pairs < args.batch and rank == 0:
                bar.write(f"pass {(step + 1) * args.batch // pass_pairs}, left out so far: {bad_line(counts)}")
            if rank == 0:
                seconds = time.time() - ready
                report({"step": step, **values, "lr": rate, "pairs_per_second": round(args.batch / seconds, 1),
                        "waited": round(waited / seconds, 3), "bad_images": sum(counts), "skipped": skipped}, log, bar)
            if step + 1 < steps and (save or stop):
                shards = gather_rows(places.to(device)).view(world, *places.shape) if sharded else None
                if rank == 0 and torch.nn.utils.get_total_norm(parameters).isfinite():
                    now = {**config, "step": step + 1}
                    save_state(output, model, optimizer, shards, now, skipped=skipped, counts=counts,
                               scaler=scaler.state_dict())
                    save_model(output / "model.safetensors", model, now)
                    saved = time.time()
                if stop:
                    leave(step + 1, signals, rank, patient)
    if rank == 0:
        save_model(output / "model.safetensors", model, {**config, "step": steps})
        for path in states(output):                 # nothing is left to go on with
            path.unlink()
        print(f"trained in {time.time() - started:.0f} s, {output / 'model.safetensors'}"
              + (f"; left out: {bad_line(counts)}" if sum(counts) else "")
              + (f"; {skipped} steps were skipped, their loss or gradients not finite" if skipped else ""))
        log.close()
    return model.eval(), config


def score(args, model, config):
    """Score the trained model on --eval-data; write result.json and a picture of predictions."""
    dataset = open_dataset(args.eval_data, args.eval_without, args.eval_names)
    protocol = {**config["protocol"], "names": args.eval_names, "without": args.eval_without}
    result, pictures = evaluate(model, dataset, protocol, pictures=4, alone=True)
    print_result(result)
    output = Path(args.output)
    write_result(output / "result.json", {"dataset": args.eval_data, "training": config, **result})
    dataset[0][1].save(output / "example.png")      # something to try segment.py on
    grid(pictures).save(output / "predictions.png")
    print(f"photo, truth, prediction and overlay of {len(pictures)} images: {output / 'predictions.png'}")
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, interruptions, and steps that fail

def check_numbers(args, world):
    for name in ("batch", "micro_batch", "epochs", "pairs", "epoch_pairs", "steps", "image_size", "text_layers",
                 "pool_temperature", "local_temperature"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected a positive number")
    if args.weight < 0:
        raise ValueError(f"--lambda is {args.weight}; expected 0 or a positive number")
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} is the global batch; it must be a multiple of the {world} processes")


def open_stream(pairs, args, piece, steps, start, rank, world, counts, shards):
    """This process's pairs from step start on, in pieces, and places: a row for each of its readers, which ends with the
    pairs left out so far by reason of BAD. counts: those before start. shards: the places in shards at start."""
    if isinstance(pairs, Shards):
        places, how = pairs.begin(piece, rank, world, args.workers, shards), {"batch_size": None}
    else:
        places = torch.tensor([counts if rank == 0 else [0] * len(BAD)])
        how = {"batch_sampler": GlobalBatches(len(pairs), args.batch, steps, args.epoch_pairs, rank, world, args.seed, start,
                                              piece, args.pairs), "collate_fn": collate}
    return iter(DataLoader(pairs, num_workers=args.workers, pin_memory=pick_device(args.device) == "cuda",
                           worker_init_fn=ignore_signals, **how)), places


def restore(resumed, config, model, optimizer, scaler):
    """Put a state back in place. Returns its step, the steps skipped, what was left out by reason, and places in shards.

    Raises ValueError if the run that wrote it was another one.
    """
    settings, tensors = resumed
    then, now = settings["training"], json.loads(json.dumps(config))
    differ = [f"{'lambda' if name == 'weight' else name} was {then.get(name)}, is {now[name]}" for name in now
              if name not in FREE and then.get(name) != now[name]]
    differ += ["the bank's names differ"] * (settings["bank"] != model.bank)
    differ += ["the backbone's weights differ"] * (settings["backbone"]["sha256"] != model.backbone.config["sha256"])
    if differ:
        raise ValueError(f"{settings['path']} is of a run with other settings: {'; '.join(differ)}. Go on with the same "
                         "ones, or begin anew in another folder, see --output")
    trained = model.trained()
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(tensors[name])
    names, state = sorted(trained, key=lambda name: trained[name].ndim < 2), {}         # the order of parameter_groups
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, kind, name = key.split(".", 2)
            state.setdefault(names.index(name), {})[kind] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if settings.get("scaler"):
        scaler.load_state_dict(settings["scaler"])
    return then["step"], settings.get("skipped", 0), settings.get("counts", [0] * len(BAD)), tensors.get("shards")


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train SimZSS. Defaults: the paper's recipe for COCO Captions; "
                                                 "--train-data toy has its own, smaller ones.")
    add = parser.add_argument
    add("--train-data", default="data/coco/annotations/captions_train2017.json",
        help="toy, a COCO captions JSON, a TSV / JSONL of (image, caption), or tar shards in img2dataset's layout: a folder, "
             "or names such as \"shards/{00000..00295}.tar\" (default: %(default)s)")
    add("--images", help="folder of the images (default: COCO's place, or the captions file's folder)")
    add("--bank", help="concept bank, one name per line, synonyms after commas, or none, which makes a concept of "
                       "every noun phrase (default: the benchmarks' classes)")
    add("--exclude-classes", metavar="FILE", help="class file; its names and synonyms are no concepts")
    add("--parser", default=DEFAULT_PARSER, help="spaCy pipeline, or match, the built-in matcher (default: %(default)s)")
    add("--output", default="runs/simzss", help="folder to write to (default: %(default)s)")

    add("--backbone", default=DEFAULT_BACKBONE, help="timm name of a ViT or CNN, or toy (default: %(default)s)")
    add("--backbone-weights", help="local weights file, loaded strictly, or 'random' (default: timm's download)")
    add("--backbone-option", action="append", default=[], metavar="KEY=VALUE", help="passed on to timm; may be repeated")
    add("--denoiser", metavar="FILE", help="denoising block for the patch tokens, keys as in the authors' checkpoints")
    add("--pixel-mean", type=float, nargs=3, help="pixel statistics in 0..1 (default: the backbone's own)")
    add("--pixel-std", type=float, nargs=3, help="see --pixel-mean")
    add("--image-size", type=int, default=224, help="pixels a side of training images (default: %(default)s)")
    add("--text-width", type=int, help="width of the text encoder (default: CLIP's for the backbone)")
    add("--text-heads", type=int, help="its attention heads (default: CLIP's for the backbone, or width / 64)")
    add("--text-layers", type=int, default=12, help="its layers (default: %(default)s)")

    add("--lambda", dest="weight", type=float, default=0.05,
        help="weight of the local loss; 0 is LiT (default: %(default)s)")
    add("--pool-temperature", type=float, default=0.1, help="of the similarity pooling (default: %(default)s)")
    add("--local-temperature", type=float, default=0.07, help="of the local loss (default: %(default)s)")
    add("--local-target", choices=["concept", "argmax"], default="concept",
        help="target of the local loss: the concept (paper) or the prediction (release) (default: %(default)s)")
    add("--pool-query", choices=["class", "caption"], default="class",
        help="what pools the patches: the batch's class weight (release) or the caption's own concept embedding "
             "(paper) (default: %(default)s)")

    add("--batch", type=int, default=8192, help="pairs in the global batch, over all processes (default: %(default)s)")
    add("--weights-over", choices=["batch", "process"], default="batch", help="class weights are summed over the global "
        "batch, or over each process's share of it (release) (default: %(default)s)")
    add("--micro-batch", type=int, help="pairs that a process computes at a time, for little memory; changes no result "
        "(default: all of its share)")
    add("--epochs", type=float, default=10, help="passes over the data (default: %(default)s)")
    add("--pairs", type=int, help="train on so many of the pairs only, drawn by --seed (default: all)")
    add("--epoch-pairs", type=int, default=400_000, help="pairs of one pass, at most (default: %(default)s)")
    add("--steps", type=int, help="steps to train for, instead of --epochs")
    add("--base-rate", type=float, default=3e-5, help="peak learning rate per 256 pairs of batch (default: %(default)s)")
    add("--warmup", type=float, default=0.1, help="share of the steps with rising rate (default: %(default)s)")
    add("--weight-decay", type=float, default=0.2, help="on matrices (default: %(default)s)")
    add("--beta1", type=float, default=0.9, help="AdamW (default: %(default)s)")
    add("--beta2", type=float, default=0.98, help="AdamW (default: %(default)s)")
    add("--eps", type=float, default=1e-6, help="AdamW (default: %(default)s)")

    add("--eval-data", default="none", help="scored at the end: toy, a segmentation folder or none (default: %(default)s)")
    add("--eval-without", nargs="*", default=[], help="classes neither scored nor predicted, such as background")
    add("--eval-names", help="class file with other wordings and synonyms of the folder's classes, in order")
    add("--templates", default=PROTOCOL["templates"], help="prompts at test time, see segment.py (default: %(default)s)")
    add("--class-embedding", choices=["caption", "concept"], default=PROTOCOL["class_embedding"],
        help="how segment.py and eval.py embed a class: the state at its prompt's end token, or its name's tokens as in "
             "the local loss; with lambda = 0 always caption, nothing else is trained (default: %(default)s)")
    add("--short-side", type=int, default=PROTOCOL["short_side"],
        help="pixels of a test image's short side (default: %(default)s)")
    add("--window", type=int, default=PROTOCOL["window"], help="pixels of the sliding window (default: %(default)s)")
    add("--stride", type=int, default=PROTOCOL["stride"], help="pixels between windows (default: %(default)s)")

    add("--cache-features", metavar="DIR", help="compute the backbone's features once into DIR and train from there: "
        "much faster steps, but no random crops")
    add("--workers", type=int, default=8, help="processes that load images, per process (default: %(default)s)")
    add("--max-bad", type=float, default=MAX_BAD, help="share of unreadable images that ends the run (default: %(default)s)")
    add("--resume", metavar="auto|FILE", help="go on with an interrupted run: from the newest state in --output that can be "
        "read, if there is one, or from a given state file")
    add("--save-minutes", type=float, default=10, help="minutes between checkpoints (default: %(default)s)")
    add("--timeout-minutes", type=float, default=30, help="of waiting for another process in a step, after which the run "
        "ends (default: %(default)s)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the towers (default: %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    if parser.parse_known_args(argv)[0].train_data == "toy":
        parser.set_defaults(**TOY)
    args = parser.parse_args(argv)
    if args.weight == 0:                            # no concept embedding is trained then
        args.class_embedding = "caption"
    return args


def main(argv=None):
    args = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        check_numbers(args, world)
        patient = join_processes(args, world)
        model, config = train(args, rank, world, patient)
        if rank == 0 and args.eval_data != "none":
            score(args, model, config)
        if patient:                                 # nobody leaves while another still works
            dist.barrier(patient)
            dist.destroy_process_group()            # not after an error: it would wait for the others
    except (ValueError, OSError) as error:
        message = str(error).strip()
        if "Original Traceback" in message:         # from a data worker: its own line is the last
            message = message.splitlines()[-1].removeprefix("ValueError: ")
        sys.exit(f"error: {message}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: the GPU's memory is full; lower --micro-batch ({str(error).splitlines()[0]})")
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error) and "DataLoader worker" not in str(error):
            raise
        sys.exit(f"error: another process died or answers no more; the last checkpoint is whole, go on with --resume auto "
                 f"({str(error).strip().splitlines()[0]})")


if __name__ == "__main__":
    main()
