"""Train SimZSS, or one of the other methods (--method).

    python train.py --train-data toy                    # a minute on a laptop, no download
    torchrun --nproc_per_node 8 train.py                # the paper's run on COCO Captions

A run writes into its output folder: model.safetensors, log.jsonl (a line per step) and, if it was
scored at the end, result.json, predictions.png and example.png; until it is finished, also the two
newest state-STEP.safetensors, from which --resume auto goes on as if nothing had happened.
"""
import argparse
import math
import os
from functools import partial
from pathlib import Path

import torch

from concepts import DEFAULT_PARSER, ConceptBank
from data import load_pairs, open_stream
from eval import evaluate
from machinery.networks import backbones
from machinery.scoring.benchmarks import open_dataset
from machinery.networks.checkpoint import save_model         # for use from Python
from machinery.names import read_templates
from machinery.errors import check_positive, one_line_errors
from machinery.training.features import open_cache
from machinery.training.loading import join, loader_batch_size
from machinery.contract import METHODS, find_method
from machinery.parallel import average_gradients, join_processes, pick_precision
from machinery.scoring.pictures import comparison
from machinery.scoring.protocol import PROTOCOL
from machinery.scoring.results import print_result, write_result
from machinery.training.resume import agree_on, find_state, seed_step, states
from machinery.training.run import MAX_BAD, Run, print_run
from machinery.training.shards import Shards
from machinery.toy import save_scene
from machinery.training.workers import cores_per_process

# The paper's run on COCO Captions (docs/method.md, section 9). These are the defaults of the flags
# of the same names. A method may replace some (its RECIPE), and so does the toy world (TOY below,
# and the method's TOY).
RECIPE = {
    # How much data
    "batch": 8192,              # pairs of the global batch, all processes   release: 8 x 1,024
    "epochs": 10,               # passes over the data                       release
    "epoch_pairs": 400_000,     # pairs of one pass, at most                 release
    "image_size": 224,          # pixels a side                              paper
    # AdamW
    "base_rate": 3e-5,          # peak rate per 256 pairs: 9.6e-4 at 8,192   release
    "warmup": 0.1,              # share of the steps with rising rate        release
    "final_rate": 0.0,          # rate at the end of the cosine / peak       release
    "weight_decay": 0.2,        # on matrices; none on vectors and scalars   release
    "beta1": 0.9,               #                                            release
    "beta2": 0.98,              #                                            release
    "eps": 1e-6,                #                                            release
    "clip": 0.0,                # bound on the gradient's norm; 0 = none     release
}

TOY = {"parser": "match", "image_size": 128, "epoch_pairs": 2000, "workers": 0, "eval_data": "toy",
       "short_side": 128, "window": 128, "stride": 64}


def learning_rate(step, steps, peak, warmup, final=0.0):
    """Linear warm-up over the first share of the steps, then cosine to final x peak. step counts
    from 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    angle = math.pi * (step - rising) / max(1, steps - rising)
    last = final * peak
    return last + (peak - last) * 0.5 * (1 + math.cos(angle))


# --------------------------------------------------------------------------------------------------
# The run

def train(args, processes):
    """Train as args say. Returns (the trained method, alike in all processes, its settings, what it
    cost)."""
    output = Path(args.output)
    state = find_state(args.resume, output) if args.resume else None
    if not args.resume and states(output):
        raise ValueError(f"{output} holds an unfinished run ({states(output)[0].name}): go on with "
                         "--resume auto, name another folder with --output, or delete its state "
                         "files")
    read_templates(args.templates)                  # mistakes are found now, not at the end
    if args.eval_data != "none":
        open_dataset(args.eval_data, args.eval_without, args.eval_names)
    torch.manual_seed(args.seed)                    # the same initial weights in all processes

    # Data. One process annotates, the others find the annotations cached.
    bank = ConceptBank.by_name(args.bank, args.exclude_classes)
    method_class = find_method(args.method)
    with processes.first_process_first():
        pairs = load_pairs(args.train_data, bank, args.parser, args.image_size,
                           method_class.sampler(args), args.images, args.seed, args.epoch_pairs,
                           method_class.NEEDS_CAPTIONS, method_class.NEEDS_CONCEPTS)
    steps, pass_pairs = length_of_run(args, pairs)

    # Model: built after the data was found, because it may download
    method = method_class.build(args, bank).to(processes.device)
    precision = pick_precision(args.precision, processes.device_type)
    method.autocast = partial(torch.autocast, processes.device_type, precision,
                              enabled=precision != torch.float32)
    if processes.rank == 0:
        backbones.warn_if_random(method.config())
    if args.cache_features:
        pairs.cache = open_cache(args, pairs, method, precision, processes)

    # Optimizer
    groups = [{"params": group["params"], "weight_decay": args.weight_decay * group["decay"],
               "rate_factor": group["rate"]} for group in method.groups()]
    optimizer = torch.optim.AdamW(groups, betas=(args.beta1, args.beta2), eps=args.eps,
                                  fused=processes.device_type != "mps")
    scaler = torch.amp.GradScaler(processes.device_type, enabled=precision == torch.float16)

    # Go on where an interrupted run stood
    config = settings_of_run(args, method, pairs, processes, steps, pass_pairs, precision)
    start = 0
    counts = None
    positions = None
    skipped = 0
    if state:
        state.check(config, method)
        state.restore(method, optimizer, scaler)
        start = state.step
        counts = state.counts
        positions = state.positions
        skipped = state.skipped
    agree_on(start, processes)

    stream = open_stream(pairs, args, processes, steps, start, counts, positions)
    run = Run(args, method, optimizer, scaler, stream, processes, config, pairs.name, output,
              start, skipped)
    print_run(run, pairs)
    run_steps(run, args, method, optimizer, scaler, stream)
    cost = run.finish()
    return method.eval(), config, cost


def run_steps(run, args, method, optimizer, scaler, stream):
    """The training loop."""
    parameters = list(method.trained().values())
    schedule = method.learning_rate or learning_rate
    steps = run.steps.stop
    peak = args.base_rate * args.batch / 256
    with run:
        for step in run.steps:
            # This process's share of the global batch, loaded and sent through the frozen networks
            # part by part
            seed_step(args.seed, step)
            batch = join(map(method.features, stream.parts()), stream.local_batch)

            # The learning rate of this step
            rate = schedule(step, steps, peak, args.warmup, args.final_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_factor"]           # the method's, mostly 1

            # The losses of the global batch, and their gradient: the mean over processes, because
            # each holds the true gradient times the number of processes (machinery/parallel.py)
            optimizer.zero_grad()
            losses = method.backward(batch, scaler.scale, args.micro_batch)
            average_gradients(parameters)
            losses["grad_norm"] = clip_gradients(parameters, scaler, args.clip)

            # The update. A step whose loss or gradient is not finite is skipped. In float16 a
            # gradient may overflow though the loss is finite: the scaler then skips the step
            # itself, and lowers its scale. That does not mean that the run is broken.
            values = {name: loss.item() for name, loss in losses.items()}   # waits for the device
            has_loss = math.isfinite(values["loss"])
            is_finite = has_loss and math.isfinite(values["grad_norm"])
            if is_finite or (has_loss and scaler.is_enabled()):
                scaler.step(optimizer)
                scaler.update()
            method.after_step(step, steps)
            is_overflow = has_loss and not is_finite and scaler.get_scale() > 1    # can be lowered

            run.end_step(step, values, rate, is_finite, is_overflow)


# --------------------------------------------------------------------------------------------------
# Its parts

def length_of_run(args, pairs):
    """(steps, pairs of one pass). Raises ValueError for flags that do not fit the data."""
    if isinstance(pairs, Shards):
        if args.cache_features:
            raise ValueError("--cache-features needs single images and a captions file; shards are "
                             "streamed")
        if args.pairs:
            raise ValueError(f"--pairs {args.pairs}: tars are read whole, name fewer of them")
        pass_pairs = args.epoch_pairs
    else:
        if args.pairs and args.pairs > len(pairs):
            raise ValueError(f"--pairs {args.pairs}: there are only {len(pairs)}")
        pass_pairs = min(args.epoch_pairs, args.pairs or len(pairs))
    steps = args.steps or int(args.epochs * pass_pairs / args.batch)
    if steps < 1:
        raise ValueError(f"{args.epochs} passes of {pass_pairs} pairs are less than one batch of "
                         f"{args.batch}; lower --batch or raise --epochs")
    return steps, pass_pairs


def settings_of_run(args, method, pairs, processes, steps, pass_pairs, precision):
    """What a checkpoint keeps of its run, and what a resumed run is compared with."""
    is_sharded = isinstance(pairs, Shards)
    protocol = {name: getattr(args, name) for name in {**PROTOCOL, **method.PROTOCOL}}
    return {**vars(args), "protocol": protocol, "steps": steps, "pass_pairs": pass_pairs,
            "pairs": None if is_sharded else args.pairs or len(pairs),
            "loader_batch": loader_batch_size(args.batch // processes.world, args.micro_batch)
                            if is_sharded else None,        # what `Shards.begin` depends on
            "world": processes.world if method.depends_on_processes() else None,
            "arithmetic": str(precision).removeprefix("torch."),
            "cached": bool(args.cache_features)}


def clip_gradients(parameters, scaler, clip):
    """Scale all gradients down to the norm clip, unless it is 0. Returns their norm before that,
    without the loss scale of float16."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip * scaler.get_scale(), norm)
    return norm / scaler.get_scale()


def score(args, method, config, cost):
    """Score the trained model on --eval-data; write result.json and a picture of predictions."""
    dataset = open_dataset(args.eval_data, args.eval_without, args.eval_names)
    protocol = {**config["protocol"], "names": args.eval_names, "without": args.eval_without}
    result, shown = evaluate(method, dataset, protocol, pictures=4, alone=True)
    print_result(result)
    output = Path(args.output)
    write_result(output / "result.json", {"dataset": args.eval_data, "training": config,
                                          "cost": cost, **result})
    image = dataset[0][1]                           # something to try segment.py on
    if args.eval_data == "toy":
        save_scene(image, output / "example.png")
    else:
        image.save(output / "example.png")
    comparison(shown, result["classes"]).save(output / "predictions.png")
    print(f"photo, truth, prediction and overlay of {len(shown)} images: "
          f"{output / 'predictions.png'}")


# --------------------------------------------------------------------------------------------------
# The command

def parse_args(argv=None):
    known, _ = first_flags().parse_known_args(argv)
    method_class = find_method(known.method)
    parser = argparse.ArgumentParser(
        parents=[first_flags()],
        description="Train SimZSS, or another method. The defaults are the method's recipe; "
                    "--train-data toy has smaller ones of its own.")
    add_common_flags(parser.add_argument_group("common").add_argument)
    add_recipe_flags(parser.add_argument_group("recipe").add_argument)
    method_class.add_flags(parser)
    add_test_flags(parser.add_argument_group("at test time").add_argument)
    add_safety_flags(parser.add_argument_group("when something goes wrong").add_argument)
    defaults = {**RECIPE, **PROTOCOL, "output": f"runs/{known.method}", **method_class.RECIPE,
                **method_class.PROTOCOL}
    if known.train_data == "toy":
        defaults = {**defaults, **TOY, **method_class.TOY}
    if "steps" in defaults:                         # a recipe that counts in steps, not in passes
        defaults["epochs"] = None
    parser.set_defaults(**defaults)
    args, _ = parser.parse_known_args(argv)
    parser.set_defaults(**method_class.further_defaults(args))
    if "steps" in defaults and args.epochs:         # passes are asked for all the same
        parser.set_defaults(steps=None)
    return parser.parse_args(argv)


def first_flags():
    """The flags that the defaults of the others depend on."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("what to train").add_argument
    add("--method", choices=list(METHODS), default="simzss", help="(default: %(default)s)")
    add("--train-data", default="data/coco/annotations/captions_train2017.json",
        help="toy, a COCO captions JSON, a TSV / JSONL of (image, caption), or tar shards in "
             'img2dataset\'s layout: a folder, or names such as "shards/{00000..00295}.tar" '
             "(default: %(default)s)")
    return parser


def add_common_flags(add):
    add("--output", help="folder to write to (default: %(default)s)")
    add("--images",
        help="folder of the images (default: COCO's place, or the captions file's folder)")
    add("--parser", default=DEFAULT_PARSER,
        help="spaCy pipeline, or match, the built-in matcher (default: %(default)s)")
    add("--bank",
        help="concept bank, one name per line, synonyms after commas, or none, which makes a "
             "concept of every noun phrase (default: the benchmarks' classes)")
    add("--exclude-classes", metavar="FILE",
        help="class file; its names and synonyms are no concepts")
    add("--batch", type=int,
        help="pairs in the global batch, over all processes (default: %(default)s)")
    add("--micro-batch", type=int,
        help="pairs that a process computes at a time, for little memory; changes no result "
             "(default: all of its share)")
    add("--epochs", type=float, help="passes over the data (default: %(default)s)")
    add("--steps", type=int, help="steps to train for, instead of --epochs")
    add("--base-rate", type=float,
        help="peak learning rate per 256 pairs of the batch; too high: the loss rises or is not "
             "finite (default: %(default)s)")
    add("--image-size", type=int, help="pixels a side of training images (default: %(default)s)")
    add("--cache-features", metavar="DIR",
        help="compute the frozen backbone's features once into DIR and train from there: much "
             "faster steps, but no random crops")
    add("--workers", type=int, default=min(8, cores_per_process()),
        help="processes that load images, per process (default: at most 8, and no more than there "
             "are cores)")
    add("--eval-data", default="none",
        help="scored at the end: toy, a segmentation folder or none (default: %(default)s)")
    add("--resume", metavar="auto|FILE",
        help="go on with an interrupted run: from the newest state in --output that can be read, "
             "if there is one, or from a given state file")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of the networks (default: %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")


def add_recipe_flags(add):
    add("--pairs", type=int,
        help="train on so many of the pairs only, drawn by --seed (default: all)")
    add("--epoch-pairs", type=int, help="pairs of one pass, at most (default: %(default)s)")
    add("--warmup", type=float, help="share of the steps with rising rate (default: %(default)s)")
    add("--final-rate", type=float,
        help="learning rate at the end, as a share of its peak (default: %(default)s)")
    add("--weight-decay", type=float, help="on matrices (default: %(default)s)")
    add("--beta1", type=float, help="AdamW (default: %(default)s)")
    add("--beta2", type=float, help="AdamW (default: %(default)s)")
    add("--eps", type=float, help="AdamW (default: %(default)s)")
    add("--clip", type=float,
        help="bound on the norm of all gradients, 0 = none (default: %(default)s)")


def add_test_flags(add):
    add("--eval-without", nargs="*", default=[],
        help="classes neither scored nor predicted, such as background")
    add("--eval-names",
        help="class file with other wordings and synonyms of the folder's classes, in order")
    add("--templates", help="prompts, see segment.py (default: %(default)s)")
    add("--short-side", type=int, help="pixels of a test image's short side (default: %(default)s)")
    add("--window", type=int, help="pixels of the sliding window (default: %(default)s)")
    add("--stride", type=int, help="pixels between windows (default: %(default)s)")


def add_safety_flags(add):
    add("--max-bad", type=float, default=MAX_BAD,
        help="share of unreadable images that ends the run (default: %(default)s)")
    add("--save-minutes", type=float, default=10,
        help="minutes between states (default: %(default)s)")
    add("--timeout-minutes", type=float, default=30,
        help="of waiting for another process in a step, after which the run ends "
             "(default: %(default)s)")


def check_numbers(args, world):
    """Raise ValueError for numbers that cannot be."""
    check_positive(args, "batch", "micro_batch", "epochs", "pairs", "epoch_pairs", "steps",
                   "image_size", "base_rate", "short_side")
    check_positive(args, "weight_decay", "final_rate", "clip", or_zero=True)
    if not 0 <= args.warmup <= 1:
        raise ValueError(f"--warmup is {args.warmup}; expected a share of the steps, 0 to 1")
    if not 0 < args.stride <= args.window:
        raise ValueError(f"--stride {args.stride}, --window {args.window}: expected a positive "
                         "stride of at most the window, or pixels would be left out")
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} is the global batch; it must be a multiple of the "
                         f"{world} processes")
    method_class = find_method(args.method)
    if args.micro_batch and args.micro_batch < args.batch // world and not method_class.HAS_CHUNKS:
        raise ValueError(f"--micro-batch: {args.method} computes its batch as a whole; lower "
                         "--batch")
    method_class.check_flags(args)


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors("lower --micro-batch or --batch"):
        check_numbers(args, int(os.environ.get("WORLD_SIZE", 1)))
        processes = join_processes(args.device, args.timeout_minutes)
        method, config, cost = train(args, processes)
        if processes.rank == 0 and args.eval_data != "none":
            score(args, method, config, cost)
        processes.leave()


if __name__ == "__main__":
    main()
