"""Train SimZSS: only the text encoder learns, the vision backbone is frozen.

    python train.py --train-data toy                    # a minute on a laptop, no download
    torchrun --nproc_per_node 8 train.py                # the paper's run on COCO Captions

The flags' defaults are the recipe of the method, section 9. A run writes into its output folder: model.safetensors,
log.jsonl (a line per step), and, if it was scored at the end, result.json and predictions.png.
"""
import argparse
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from concepts import DEFAULT_PARSER, ConceptBank
from data import MAX_BAD, CachedFeatures, GlobalBatches, collate, load_pairs
from eval import evaluate, grid, open_dataset, print_result, write_result
from model import DEFAULT_BACKBONE, MAX_LOGIT_SCALE, SimZSS, TextEncoder, VisionBackbone, save_model, sum_over_processes
from segment import PROTOCOL, pick_device

# What differs from the recipe in the toy world: everything is smaller.
TOY = {"backbone": "toy", "parser": "match", "image_size": 128, "text_width": 256, "text_layers": 1, "batch": 64,
       "epochs": 16, "epoch_pairs": 2000, "base_rate": 0.012, "eval_data": "toy", "output": "runs/toy", "workers": 0,
       "short_side": 128, "window": 128, "stride": 64, "class_embedding": "concept"}


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


def average_gradients(parameters):
    """Mean over processes, in one message: the exact gradient of the global batch's loss (see model.py)."""
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(part.view_as(p))


def pick_precision(name, device):
    """dtype of the towers' arithmetic: bfloat16, or float16 on older GPUs; float32 where there is no hardware for it."""
    if name == "auto":
        name = "fp32" if device != "cuda" else "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@contextmanager
def first_process_first(rank, world):
    """Let the first process go through the block alone, the others after it."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# The run

def build_model(args, bank):
    options = {}
    for option in args.backbone_option:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--backbone-option {option}: expected key=value")
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
                  args.local_target, args.pool_query)


def train(args, rank, world):
    """Train as args say. Returns the trained model, the same in every process, and its settings."""
    for name in ("batch", "epochs", "epoch_pairs", "steps", "image_size", "text_layers"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected a positive number")
    kind = pick_device(args.device)
    kind = "cpu" if kind == "mps" and world > 1 else kind           # gloo does not know Apple's GPU
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind
    if kind == "cuda":
        torch.cuda.set_device(device)
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} is the global batch; it must be a multiple of the {world} processes")
    if world > 1:                                   # an hour, for the first process may have to parse all captions
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=1))
    torch.manual_seed(args.seed)                    # the same initial weights everywhere
    bank = ConceptBank.by_name(args.bank, args.exclude_classes)
    if args.eval_data != "none":
        open_dataset(args.eval_data, args.eval_without, args.eval_names)
    with first_process_first(rank, world):          # one annotates, the others find the annotations cached
        pairs = load_pairs(args.train_data, bank, args.parser, args.image_size, args.images, args.seed, args.epoch_pairs)
    model = build_model(args, bank).to(device)      # after the data was found, for it may download
    if rank == 0 and model.backbone.config["weights"] == "random":
        print("warning: the backbone has random weights, as asked for; this model's masks will mean nothing",
              file=sys.stderr)

    if args.cache_features:
        with first_process_first(rank, world):
            pairs = CachedFeatures(pairs, model.backbone, args.cache_features)
    pass_pairs = min(args.epoch_pairs, len(pairs))
    steps = args.steps or int(args.epochs * pass_pairs / args.batch)
    if steps < 1:
        raise ValueError(f"{args.epochs} passes of {pass_pairs} pairs are less than one batch of {args.batch}; "
                         "lower --batch or raise --epochs")
    batches = GlobalBatches(len(pairs), args.batch, steps, pass_pairs, rank, world, args.seed)
    loader = DataLoader(pairs, batch_sampler=batches, collate_fn=collate, num_workers=args.workers,
                        pin_memory=kind == "cuda", persistent_workers=args.workers > 0)

    parameters = list(model.trained().values())
    optimizer = torch.optim.AdamW(parameter_groups(parameters, args.weight_decay), betas=(args.beta1, args.beta2),
                                  eps=args.eps, fused=kind != "mps")
    precision = pick_precision(args.precision, kind)
    scaler = torch.amp.GradScaler(kind, enabled=precision == torch.float16)
    peak = args.base_rate * args.batch / 256

    output = Path(args.output)
    config = {**vars(args), "protocol": {key: getattr(args, key) for key in PROTOCOL}}
    if rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        log = open(output / "log.jsonl", "w", buffering=1)
        print(f"{len(pairs):,} pairs, {steps} steps of {args.batch}, {sum(p.numel() for p in parameters) / 1e6:.1f} M "
              f"trained parameters, {world} x {device}, {str(precision).removeprefix('torch.')}")
    saved = started = time.time()
    bad = 0
    bar = tqdm(loader, total=steps, desc="training", unit=" steps", disable=None if rank == 0 else True)
    ready = time.time()
    for step, batch in enumerate(bar):
        waited = time.time() - ready
        batch = {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
                 for key, value in batch.items()}
        rate = learning_rate(step, steps, peak, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(kind, precision, enabled=precision != torch.float32):
            if args.cache_features:
                losses = model.losses(batch["class_token"], batch["patch_tokens"],
                                      *model.encode_text(batch["tokens"], batch["spans"]), batch["ids"])
            else:
                losses = model(model.backbone.normalise(batch["pixels"]), batch["tokens"], batch["ids"], batch["spans"])
        values = {key: value.item() for key, value in losses.items()}                   # waits for the device
        if not math.isfinite(values["loss"]):
            raise ValueError(f"the loss is {values['loss']} at step {step}; lower --base-rate, or use --precision fp32")
        optimizer.zero_grad()
        scaler.scale(losses["loss"]).backward()
        average_gradients(parameters)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))
        bad += int(sum_over_processes(torch.tensor(float(batch["bad"]), device=device)))
        if bad > max(MAX_BAD * (step + 1) * args.batch, 10):
            raise ValueError(f"{bad} of the first {(step + 1) * args.batch} images could not be read; at most "
                             f"{MAX_BAD:.0%} may be bad")
        now = time.time()
        if rank == 0:
            pairs_per_second = args.batch / (now - ready)
            bar.set_postfix({"loss": f"{values['loss']:.3f}", "global": f"{values['global']:.3f}",
                             "local": f"{values['local']:.3f}", "lr": f"{rate:.1e}", "pairs/s": f"{pairs_per_second:.0f}"})
            log.write(json.dumps({"step": step, **values, "lr": rate, "pairs_per_second": round(pairs_per_second, 1),
                                  "waited": round(waited / (now - ready), 3), "bad_images": bad}) + "\n")
            if now - saved > 60 * args.save_minutes:
                save_model(output / "model.safetensors", model, {**config, "step": step + 1, "steps": steps})
                saved = now
        ready = time.time()
    if rank == 0:
        save_model(output / "model.safetensors", model, {**config, "step": steps, "steps": steps})
        print(f"trained in {time.time() - started:.0f} s, {output / 'model.safetensors'}"
              + (f"; {bad} unreadable images were replaced" if bad else ""))
        log.close()
    return model.eval(), config


def score(args, model, config):
    """Score the trained model on --eval-data; write result.json and a picture of predictions."""
    dataset = open_dataset(args.eval_data, args.eval_without, args.eval_names)
    result, pictures = evaluate(model, dataset, config["protocol"], pictures=4)
    print_result(result)
    output = Path(args.output)
    write_result(output / "result.json", {"dataset": args.eval_data, "training": config, **result})
    dataset[0][1].save(output / "example.png")      # something to try segment.py on
    grid(pictures).save(output / "predictions.png")
    print(f"photo, truth and prediction of {len(pictures)} images: {output / 'predictions.png'}")
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train SimZSS. Defaults: the paper's recipe for COCO Captions; "
                                                 "--train-data toy has its own, smaller ones.")
    add = parser.add_argument
    add("--train-data", default="data/coco/annotations/captions_train2017.json",
        help="toy, a COCO captions JSON, or a TSV / JSONL of (image, caption) (default: %(default)s)")
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

    add("--lambda", dest="weight", type=float, default=0.05, help="weight of the local loss; 0 is LiT (default: %(default)s)")
    add("--pool-temperature", type=float, default=0.1, help="of the similarity pooling (default: %(default)s)")
    add("--local-temperature", type=float, default=0.07, help="of the local loss (default: %(default)s)")
    add("--local-target", choices=["concept", "argmax"], default="concept",
        help="target of the local loss: the concept (paper) or the prediction (release) (default: %(default)s)")
    add("--pool-query", choices=["class", "caption"], default="class",
        help="what pools the patches: the batch's class weight (release) or the caption's own concept embedding "
             "(paper) (default: %(default)s)")

    add("--batch", type=int, default=8192, help="pairs in the global batch, over all processes (default: %(default)s)")
    add("--epochs", type=float, default=10, help="passes over the data (default: %(default)s)")
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
    add("--save-minutes", type=float, default=10, help="minutes between checkpoints (default: %(default)s)")
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
        model, config = train(args, rank, world)
        if dist.is_initialized():
            dist.destroy_process_group()            # all together; only the first goes on
        if rank == 0 and args.eval_data != "none":
            score(args, model, config)
    except (ValueError, OSError) as error:
        message = str(error).strip()
        if "Original Traceback" in message:         # from a data worker: its own line is the last
            message = message.splitlines()[-1].removeprefix("ValueError: ")
        sys.exit(f"error: {message}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: the GPU's memory is full; lower --batch or use more GPUs ({str(error).splitlines()[0]})")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
