"""Train SimZSS, or one of the other methods, by a recipe.

    python train.py --recipe toy                        # two minutes on a laptop, no download
    torchrun --nproc_per_node 8 train.py                # the paper's run on COCO Captions

A recipe is a file in recipes/: a method, and every setting that is not at its default. Flags change
single settings; any other is reached by --set TABLE.NAME=VALUE.

A run writes into its output folder: model.safetensors, log.jsonl (a line per step) and, if it was
scored at the end, result.json, predictions.png and example.png; until it is finished, also the two
newest state-STEP.safetensors, from which --resume auto goes on as if nothing had happened.
"""
import dataclasses
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from concepts import DEFAULT_PARSER, ConceptBank, Concepts
from data import CaptionedTars, load_pairs, open_loader
from eval import evaluate
from machinery.contract import Method, Protocol, find_method
from machinery.errors import CommandLine, one_line_errors
from machinery.files import save_png
from machinery.names import read_templates
from machinery.networks.backbones import warn_if_random
from machinery.parallel import average_gradients, join_processes, pick_precision
from machinery.scoring.benchmarks import open_dataset
from machinery.scoring.pictures import comparison, save_picture
from machinery.scoring.results import print_result, write_result
from machinery.settings import (MISSING, add_flags, add_set_flag, as_mapping, given, merge, read,
                                read_recipe, setting)
from machinery.toy import EXAMPLE, save_scene
from machinery.training.features import open_cache
from machinery.training.loading import (BatchStream, encode_in_micro_batches, fitting_micro_batch,
                                        join)
from machinery.training.resume import agree_on, find_state, seed_step, state_files
from machinery.training.run import Run, only_run
from machinery.training.workers import cores_per_process

WARMUP_START = 0.025            # first learning rate / peak of the schedule "cosine-whole"
POWER = 0.9                     # of the schedule "polynomial"


# --------------------------------------------------------------------------------------------------
# Settings of a run

@dataclass(kw_only=True)
class RunSettings:
    """What is trained on, how the optimizer is set, and what happens when something goes wrong."""
    train_data: str = setting(
        MISSING, "toy, a COCO captions JSON, a TSV or JSONL of (image, caption), or tar shards of "
        'img2dataset: a folder, or names such as "shards/{00000..00295}.tar"; or, where no '
        "captions are needed, a folder of images")
    output: str = setting(MISSING, "folder to write to", changes_result=False)
    images: str | None = setting(
        None, "folder of the images; none = COCO's place, or the captions file's folder",
        changes_result=False)
    parser: str = setting(
        DEFAULT_PARSER, "spaCy pipeline that finds concepts, or match, the built-in matcher")
    bank: str | None = setting(
        None, "concept bank: a file with one name per line, synonyms after commas, or the name of "
        "one in classes/; none = the benchmarks' classes", changes_result=False)
    exclude_classes: str | None = setting(
        None, "class file; its names and synonyms are no concepts", changes_result=False)
    batch: int = setting(MISSING, "pairs in the global batch, over all processes", least=1)
    micro_batch: int | None = setting(
        None, "pairs that a process encodes at a time, for little memory; changes no result; none "
        "= all of its local batch, or as many as a GPU's free memory takes", least=1,
        changes_result=False)
    epochs: float | None = setting(None, "passes over the data", above=0, changes_result=False)
    steps: int | None = setting(
        None, "steps to train for, instead of epochs", least=1, changes_result=False)
    base_rate: float = setting(
        MISSING, "peak learning rate per 256 pairs of the batch; too high: the loss rises or is "
        "not finite", above=0)
    image_size: int = setting(MISSING, "pixels a side of training images", least=1)
    cache_features: str | None = setting(
        None, "folder for the frozen backbone's features, computed once: much faster steps, but no "
        "random crops", changes_result=False)
    workers: int = setting(
        cores_per_process, "processes that load images, per process; by default one per core",
        least=0, changes_result=False)
    eval_data: str = setting(
        "none", "scored at the end: toy, a benchmark, a segmentation folder or none",
        changes_result=False)
    resume: str | None = setting(
        None, "a state file to go on from, or auto: the newest one in the output folder, if any",
        changes_result=False)
    precision: str = setting(
        "auto", "floating-point type of the networks", choices=("auto", "fp32", "bf16", "fp16"),
        changes_result=False)
    device: str = setting(
        "auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"), changes_result=False)
    seed: int = setting(0, "seed of all random numbers", least=0)
    pairs: int | None = setting(
        None, "train on so many of the pairs only, drawn by the seed; none = all", least=1)

    # Without a flag of their own
    epoch_pairs: int | None = setting(
        None, "pairs of one pass, at most, and scenes of the toy world; none = all", least=1,
        flag=False, changes_result=False)
    schedule: str = setting(
        "cosine", "of the learning rate, see `learning_rate`", flag=False,
        choices=("cosine", "cosine-whole", "polynomial"))
    warmup: float = setting(
        0.0, "part of the steps with a rising rate", least=0, most=1, flag=False)
    final_rate: float = setting(
        0.0, "learning rate at the end / its peak", least=0, flag=False)
    weight_decay: float = setting(0.0, "of AdamW, on matrices", least=0, flag=False)
    beta1: float = setting(0.9, "of AdamW", least=0, most=1, flag=False)
    beta2: float = setting(0.999, "of AdamW", least=0, most=1, flag=False)
    eps: float = setting(1e-8, "of AdamW", above=0, flag=False)
    clip: float = setting(
        0.0, "bound on the norm of all gradients; 0 = none", least=0, flag=False)
    eval_without: tuple[str, ...] = setting(
        (), "classes of eval_data neither scored nor predicted, such as background", flag=False,
        changes_result=False)
    eval_names: str | None = setting(
        None, "class file with other names and synonyms of eval_data's classes, in order",
        flag=False, changes_result=False)
    max_bad: float = setting(
        0.01, "part of the pairs that may be left out, for whatever reason, before the run ends",
        least=0, most=1, flag=False, changes_result=False)
    save_minutes: float = setting(
        10.0, "minutes between states", least=0, flag=False, changes_result=False)
    timeout_minutes: float = setting(
        30.0, "minutes that a step waits for another process before the run ends", above=0,
        flag=False, changes_result=False)

    def check(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs is {self.epochs}, steps {self.steps}; expected one of them")


@dataclass
class Recipe:
    """A whole run: the recipe of --recipe with the flags in place."""
    method: type[Method]
    run: RunSettings
    model: object                                   # of the method's Settings
    protocol: Protocol                              # of the method's Protocol


def learning_rate(step, steps, peak, settings):
    """The learning rate of a step, which counts from 0.

    It rises over the first settings.warmup of the steps, then falls to final_rate x peak: as a
    cosine, or "polynomial", as (1 - t) ** POWER. "cosine-whole", of OVSegmentor's release: it rises
    from WARMUP_START x peak, and the cosine counts from step 0, so that the rate drops a little
    where the warm-up ends.
    """
    rising = round(settings.warmup * steps)
    last = settings.final_rate * peak
    if settings.schedule == "cosine-whole":
        if step < rising:
            first = WARMUP_START * peak
            return first + (peak - first) * step / rising
        return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * step / steps))
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)                         # 0 to 1
    if settings.schedule == "polynomial":
        return last + (peak - last) * (1 - done) ** POWER
    return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * done))


# --------------------------------------------------------------------------------------------------
# The run

def train(recipe, processes):
    """Train as a recipe says. Returns the method, what its checkpoint keeps of the run, the cost.
    """
    settings = recipe.run
    output = Path(settings.output)
    state = find_state(settings.resume, output) if settings.resume else None
    if state and state.header["method"] != recipe.method.name:
        raise ValueError(f"{state.path} is of another run: the method was "
                         f"{state.header['method']}, is {recipe.method.name}; go on with its own "
                         "--recipe, or begin anew in another --output")
    if not settings.resume and state_files(output):
        raise ValueError(f"{output} holds an unfinished run ({state_files(output)[0].name}): go on "
                         "with --resume auto, or name another folder with --output")
    torch.manual_seed(settings.seed)                # the same initial weights in all processes

    # Data
    concepts = None
    if recipe.method.NEEDS_CONCEPTS:
        bank = ConceptBank.by_name(settings.bank, settings.exclude_classes)
        concepts = Concepts(bank, settings.parser)
    pairs = load_pairs(settings.train_data, concepts,
                       partial(recipe.method.sample, settings=recipe.model), settings.image_size,
                       settings.images, settings.seed, settings.epoch_pairs,
                       processes.first_process_first)
    length = length_of_run(settings, pairs)
    if settings.pairs:
        pairs.use(settings.pairs)

    # Model: built after the data was found, because it may download
    method = recipe.method(recipe.model, concepts.bank.names if concepts else (), training=True)
    method = method.to(processes.device)
    method.protocol = recipe.protocol
    precision = pick_precision(settings.precision, processes.device_type)
    method.autocast = partial(torch.autocast, processes.device_type, precision,
                              enabled=precision != torch.float32)
    if processes.rank == 0:
        warn_if_random(method.settings)
    try_scoring(settings, method)                   # its errors come now, not after the training
    if settings.cache_features:
        pairs.cache = open_cache(settings.cache_features, pairs, method, settings.image_size,
                                 precision, processes, settings.workers)

    # Optimizer
    groups = [{"params": group["params"], "rate_factor": group["rate"],
               "weight_decay": settings.weight_decay * group["decay"]}
              for group in method.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps,
                                  fused=processes.device_type != "mps")
    scaler = torch.amp.GradScaler(processes.device_type, enabled=precision == torch.float16)

    # Go on where an interrupted run stood
    training = {"run": as_mapping(settings), "step": 0, **length,
                "arithmetic": str(precision).removeprefix("torch."),
                "cached": bool(settings.cache_features)}
    positions = None
    if state:
        state.check(method, training, RunSettings)
        state.restore(method, optimizer, scaler)
        training["step"] = state.step
        positions = state.positions
    agree_on(training["step"], processes)

    loader = open_loader(pairs, settings, processes, range(training["step"], length["steps"]),
                         positions)
    stream = BatchStream(pairs, loader, settings.batch // processes.world, processes.device)
    if settings.micro_batch is None and method.ROW_BYTES and processes.device_type == "cuda":
        free, _ = torch.cuda.mem_get_info(processes.device)
        settings.micro_batch = fitting_micro_batch(stream.local_batch, method.ROW_BYTES, precision,
                                                   free)
    if state and processes.rank == 0:               # those so far are counted once
        stream.left_out += torch.tensor(state.left_out)
    run = Run(settings, training, method, optimizer, scaler, stream, processes)
    run.skipped = state.skipped if state else 0
    run.print_start()
    run_steps(run)
    cost = run.write_model()
    return method.eval(), training, cost


def run_steps(run):
    """The training loop."""
    settings, method, stream = run.settings, run.method, run.stream
    optimizer, scaler = run.optimizer, run.scaler
    parameters = list(method.trained().values())
    steps = run.steps.stop
    peak = settings.base_rate * settings.batch / 256
    encode = method.encode
    if settings.micro_batch and settings.micro_batch < stream.local_batch:
        encode = partial(encode_in_micro_batches, method.encode, method.order,
                         size=settings.micro_batch)
    with run:
        for step in run.steps:
            seed_step(settings.seed, step)
            rate = learning_rate(step, steps, peak, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_factor"]           # the method's, mostly 1

            # The local batch of this process goes through the frozen networks while it is loaded;
            # then the trained networks, and the losses of the global batch
            features = map(method.features, stream.loader_batches())
            batch = join(features, stream.local_batch)
            encoded = encode(batch)
            losses = method.losses(encoded, batch)
            optimizer.zero_grad()
            scaler.scale(losses["loss"]).backward()
            del batch                               # before the next is loaded: it is large

            # Each process holds the true gradient times the number of processes
            # (machinery/parallel.py), so their mean is the true one
            average_gradients(parameters)
            losses["grad_norm"] = clip_gradients(parameters, scaler, settings.clip)

            # The update. A step whose loss or gradient is not finite is skipped. In float16 a
            # gradient may overflow though the loss is finite: the scaler then skips the step
            # itself and lowers its scale, which helps as long as it is above 1
            values = {name: loss.item() for name, loss in losses.items()}   # waits for the device
            loss_is_finite = math.isfinite(values["loss"])
            is_finite = loss_is_finite and math.isfinite(values["grad_norm"])
            if is_finite or (loss_is_finite and scaler.is_enabled()):
                scaler.step(optimizer)
                scaler.update()
            method.after_step(step, steps)
            is_overflow = loss_is_finite and not is_finite and scaler.get_scale() > 1

            run.end_step(step, values, rate, is_finite, is_overflow)


# --------------------------------------------------------------------------------------------------
# Its parts

def length_of_run(settings, pairs):
    """{steps, pass_pairs, pairs}; how many pairs tars hold is not known. Raises ValueError for
    settings that do not fit the data."""
    if isinstance(pairs, CaptionedTars):
        if settings.cache_features:
            raise ValueError("--cache-features needs single images and a captions file; tars are "
                             "streamed")
        if settings.pairs:
            raise ValueError(f"--pairs {settings.pairs}: tars are read whole, name fewer of them")
        if not settings.epoch_pairs and not settings.steps:
            raise ValueError("how many pairs the tars hold is not known; say how many one pass has "
                             "with --set run.epoch_pairs=N, or use --steps")
        number = None
        pass_pairs = settings.epoch_pairs or settings.steps * settings.batch
    else:
        number = settings.pairs or len(pairs)
        if number > len(pairs):
            raise ValueError(f"--pairs {number}: there are only {len(pairs)}")
        pass_pairs = min(settings.epoch_pairs or number, number)
    steps = settings.steps or int(settings.epochs * pass_pairs / settings.batch)
    if steps < 1:
        raise ValueError(f"{settings.epochs} passes of {pass_pairs} pairs are less than one batch "
                         f"of {settings.batch}; lower --batch or raise --epochs")
    return {"steps": steps, "pass_pairs": pass_pairs, "pairs": number}


def try_scoring(settings, method):
    """Raise the errors that scoring would raise."""
    templates = read_templates(method.protocol.templates)
    if settings.eval_data != "none":
        dataset = open_dataset(settings.eval_data, settings.eval_without, settings.eval_names)
        method.eval()                               # no running statistics may change
        method.embed_classes(dataset.classes[:1], templates[:1])
        method.train()


def clip_gradients(parameters, scaler, clip):
    """Scale all gradients down to the norm clip, unless it is 0. Returns their norm before that,
    without the loss scale of float16."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip * scaler.get_scale(), norm)
    return norm / scaler.get_scale()


def score(settings, method, training, cost, processes):
    """Score the model on eval_data, all processes together; write result.json and pictures."""
    dataset = open_dataset(settings.eval_data, settings.eval_without, settings.eval_names)
    result, shown = evaluate(method, dataset, method.protocol, pictures=4 * processes.world)
    if processes.rank > 0:
        return
    print_result(result)
    output = Path(settings.output)
    write_result(output / "result.json", {"dataset": settings.eval_data, "training": training,
                                          "cost": cost, **result})
    if settings.eval_data == "toy":                 # something to try segment.py on
        save_scene(dataset[EXAMPLE][1], output / "example.png")
    else:
        save_png(output / "example.png", dataset[0][1])
    picture = comparison([row for _, *row in shown], result["classes"])
    save_picture(output / "predictions.png", picture)
    print(f"photo, truth, prediction and overlay of {len(shown)} images: "
          f"{output / 'predictions.png'}")


# --------------------------------------------------------------------------------------------------
# The command

def read_command_line(argv=None):
    """The `Recipe` of a command line. Raises FileNotFoundError or ValueError."""
    first = CommandLine(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="simzss",
                       help="a file in recipes/ by its name, or any .toml (default: simzss)")
    name = first.parse_known_args(argv)[0].recipe   # the method, and so the flags, depend on it
    recipe = read_recipe(name)
    method = find_method(recipe.pop("method"))

    parser = CommandLine(
        parents=[first], allow_abbrev=False,
        description=f"Train by a recipe. The defaults here are those of the recipe {name}.")
    unused = () if method.NEEDS_CONCEPTS else ("parser", "bank", "exclude_classes")
    add_flags(parser, RunSettings, "run", recipe.get("run"), unused)
    add_flags(parser.add_argument_group(f"method {method.name}"), method.Settings, "model",
              recipe.get("model"))
    add_flags(parser.add_argument_group("at test time"), method.Protocol, "protocol",
              recipe.get("protocol"), [field.name for field in dataclasses.fields(Protocol)])
    add_set_flag(parser, "run.weight_decay=0.1")
    said = given(parser.parse_args(argv))

    run = recipe.get("run", {})
    if {"epochs", "steps"} & set(said.get("run", {})):      # the other one of the recipe goes
        run = {key: value for key, value in run.items() if key not in ("epochs", "steps")}
    values = merge({**recipe, "run": run}, said)
    classes = {"run": RunSettings, "model": method.Settings, "protocol": method.Protocol}
    for table in values:
        if table not in classes:
            raise ValueError(f"recipe {name}: there is no table {table!r}; expected "
                             f"{', '.join(classes)}")
    return Recipe(method, *[read(cls, values.get(table, {}), f"recipe {name}: {table}")
                            for table, cls in classes.items()])


def refuse_misfits(recipe, world):
    """Raise ValueError for settings that do not fit the method or the number of processes."""
    batch = recipe.run.batch
    if batch % world:
        raise ValueError(f"--batch {batch} is the global batch; it must be a multiple of the "
                         f"{world} processes")
    is_split = recipe.run.micro_batch and recipe.run.micro_batch < batch // world
    if is_split and not recipe.method.ROWS_INDEPENDENT:
        raise ValueError(f"--micro-batch: {recipe.method.name} computes its batch as a whole; "
                         "lower --batch")


def main(argv=None):
    with one_line_errors("lower --micro-batch or --batch"):
        recipe = read_command_line(argv)
        refuse_misfits(recipe, int(os.environ.get("WORLD_SIZE", 1)))
        processes = join_processes(recipe.run.device, recipe.run.timeout_minutes)
        with only_run(recipe.run.output, processes):
            method, training, cost = train(recipe, processes)
            if recipe.run.eval_data != "none":
                score(recipe.run, method, training, cost, processes)
        processes.end_together()


if __name__ == "__main__":
    main()
