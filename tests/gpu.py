"""What only a GPU can show, in one run of at most ten minutes: synthetic images, random weights of
the true size.

    python tests/gpu.py                                 # a GPU; 24 GB should do
    python tests/gpu.py --tiny --device cpu             # all of it on the toy backbone, 10 s

Prints a line for each check as it ends, its seconds last, and the steps of the recipe in detail. A
check that fails is named and leaves the others; the exit status is then 1. No file of data, no
network and no spaCy is needed, but open_clip (with ftfy, wcwidth and regex) and timm.
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval
import segment
from benchmark import gpu_rows, optimizer_of, read_captions_or_draw
from concepts import ConceptBank
from data import Pair, collate
from machinery.networks.checkpoint import save_model
from machinery.parallel import all_reduce, pick_precision
from machinery.training.features import CachedFeatures
from machinery.training.loading import encode_in_micro_batches, fitting_micro_batch
from train import read_command_line

LAST_START = 480                                    # seconds after which no check begins
SIMZSS = "--recipe simzss --backbone-weights random --batch 256"
TINY_SIMZSS = "--recipe toy --text-width 32 --text-layers 1 --image-size 64 --batch 8"
# Flags of each method's one step: of the recipe's size, and for --tiny. CLIP: a tiny SimZSS
METHODS = {
    "simzss": (SIMZSS, TINY_SIMZSS),
    "simzss-prompts": ("--recipe simzss-prompts --backbone-weights random --batch 64",
                       "--recipe simzss-prompts-toy --image-size 64 --batch 4"),
    "sseg": ("--recipe sseg --backbone-weights random --batch 32",
             "--recipe sseg-toy --image-size 64 --batch 4 --set model.dropout=0.1"),
    "sseg-plus": ("--recipe sseg-plus --train-data . --labels . --backbone-weights random "
                  "--batch 16", "--recipe sseg-plus --train-data . --labels . --backbone toy "
                  "--head-width 32 --image-size 64 --batch 4"),
    "ovsegmentor": ("--recipe ovsegmentor-1 --text scratch --backbone-weights random --batch 64",
                    "--recipe ovsegmentor-1-toy --batch 4"),
    "pixelclip": ("--recipe pixelclip --clip-model ViT-B-16-quickgelu/random --mask-weights random "
                  "--batch 12", "--recipe pixelclip-toy --clip-model CLIP --batch 2"),
}


class Checks:
    """All checks on one device, as generators of lines, or functions that return one.

    tiny: whether networks, images and batches are those of a test.
    folder: for files.
    """

    def __init__(self, device, tiny, folder):
        self.device = device
        self.tiny = tiny
        self.folder = Path(folder)
        self.rng = np.random.default_rng(0)
        self.captions = read_captions_or_draw(None, self.rng)
        self.simzss, self.recipe = self.build("simzss")
        self.checkpoint = self.folder / "model.safetensors"
        save_model(self.checkpoint, self.simzss, {})

    def build(self, name):
        """A method with random weights as train.py would build it, and its recipe."""
        flags = METHODS[name][self.tiny].replace("CLIP", str(getattr(self, "checkpoint", "")))
        recipe = read_command_line(flags.split())
        torch.manual_seed(0)
        bank = ["background", *map(str, range(20))]
        if recipe.method.NEEDS_CONCEPTS:
            bank = ConceptBank.by_name(recipe.run.bank).names
        # Without label maps S-Seg+ is built as from a checkpoint
        method = recipe.method(recipe.model, bank, training=name != "sseg-plus").to(self.device)
        self.set_precision(method, recipe.run.precision)
        return method.train(), recipe

    def set_precision(self, method, name):
        precision = pick_precision(name, self.device)
        method.autocast = partial(torch.autocast, self.device, precision,
                                  enabled=precision != torch.float32)

    def noise(self, size):
        return self.rng.integers(0, 256, (size, size, 3), np.uint8)

    def batch(self, method, recipe):
        """A batch of noise, on the device."""
        size = recipe.run.image_size
        B = recipe.run.batch
        if method.name == "sseg-plus":              # it takes label maps from files
            images = [torch.from_numpy(self.noise(size)).permute(2, 0, 1) for _ in range(B)]
            batch = {"pixels": torch.stack(images), "labels": torch.randint(21, (B, size, size))}
        else:
            bank = ConceptBank.by_name(recipe.run.bank)
            concepts = [torch.tensor([[i % len(bank), 2, 3]]) for i in range(B)]
            pairs = [Pair(self.noise(size), size, self.captions[i], concepts[i], bank=bank)
                     for i in range(B)]
            batch = collate([method.sample(pair, self.rng, recipe.model) for pair in pairs])
        return {name: value.to(self.device) for name, value in batch.items()}

    def gradient(self, method, batch, scaler=None):
        """Losses of a batch, floats, with their gradient in place."""
        torch.manual_seed(0)
        method.zero_grad()
        batch = method.features(batch)
        losses = method.losses(method.encode(batch), batch)
        (scaler.scale(losses["loss"]) if scaler else losses["loss"]).backward()
        return {name: value.item() for name, value in losses.items()}

    def memory(self):
        """GiB at the peak since the last call."""
        if self.device == "cpu":
            return float("nan")
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
        torch.cuda.reset_peak_memory_stats()
        return peak

    # The checks

    def nccl(self):
        """A sum over processes of a gradient's size, in a group of one."""
        backend = "gloo" if self.device == "cpu" else "nccl"
        dist.init_process_group(backend, init_method=f"file://{self.folder}/group", rank=0,
                                world_size=1)
        values = torch.randn(10 ** 6 if self.tiny else 64 * 10 ** 6, device=self.device)
        start = time.time()
        same = torch.equal(all_reduce(values), values)
        dist.destroy_process_group()
        assert same, "the sum of one process is not its own"
        return f"{backend}: {len(values):,} numbers in {time.time() - start:.3f} s"

    def memory_of_a_row(self):
        """What the table of docs/scale.md takes as known: bytes that encoding keeps of a caption.
        """
        batch = self.simzss.features(self.batch(self.simzss, self.recipe))
        for precision in ("fp32", "bf16"):
            self.set_precision(self.simzss, precision)
            self.memory()
            encoded = self.simzss.encode(batch)
            kept = torch.cuda.memory_allocated() if self.device == "cuda" else float("nan")
            del encoded
            left = torch.cuda.memory_allocated() if self.device == "cuda" else float("nan")
            yield f"{precision}: {(kept - left) / len(batch['tokens']) / 1e6:.2f} MB a caption"
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            size = fitting_micro_batch(8192, self.simzss.ROW_BYTES, torch.bfloat16, free)
            yield f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free: micro-batch {size} of 8,192"

    def precisions(self):
        """Losses and gradients of bf16 and of fp16, with its scaler, beside those of fp32."""
        model = self.simzss
        batch = self.batch(model, self.recipe)
        found = {}
        for precision in ("fp32", "bf16", "fp16"):
            self.set_precision(model, precision)
            scaler = torch.amp.GradScaler(self.device, enabled=precision == "fp16")
            losses = self.gradient(model, batch, scaler)
            gradient = torch.cat([p.grad.flatten() for p in model.trained().values()]).float()
            found[precision] = losses, gradient / scaler.get_scale()
        exact, gradient = found.pop("fp32")
        for precision, (losses, other) in found.items():
            yield (f"{precision} - fp32: "
                   + ", ".join(f"{name} {losses[name] - exact[name]:+.1e} of {exact[name]:.3f}"
                               for name in ("global", "local"))
                   + f"; cosine of the gradients {torch.cosine_similarity(other, gradient, 0):.5f}")

    def random_numbers(self):
        """S-Seg, which has dropout: what is encoded again draws the same numbers. One micro-batch
        of all rows then has the very gradient of the batch."""
        method, recipe = self.build("sseg")
        batch = self.batch(method, recipe)
        found = []
        for encode in (method.encode, partial(encode_in_micro_batches, method.encode, method.order,
                                              size=recipe.run.batch)):
            method.encode = encode
            self.gradient(method, batch)
            found.append(torch.cat([p.grad.flatten() for p in method.trained().values()]))
        cosine = torch.cosine_similarity(*found, 0).item()
        assert cosine > 0.999, f"cosine of the gradients {cosine}"
        return f"cosine of the gradients {cosine:.5f}"

    def fp16_steps(self):
        """Ten steps on one batch in float16, with its scaler: the loss falls."""
        model, recipe = self.build("simzss")
        self.set_precision(model, "fp16")
        scaler = torch.amp.GradScaler(self.device)
        optimizer = optimizer_of(model)
        batch = self.batch(model, recipe)
        losses = []
        for _ in range(10):
            losses.append(self.gradient(model, batch, scaler)["loss"])
            scaler.step(optimizer)
            scaler.update()
        assert losses[-1] < losses[0], f"the loss did not fall: {losses}"
        return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, scale {scaler.get_scale():.0f}"

    def cached_features(self):
        """Rows of a feature cache, on the device, are those of its file."""
        values = self.rng.standard_normal((1000, 6)).astype(np.float16)
        values.tofile(self.folder / "features.bin")
        cache = SimpleNamespace(file=self.folder / "features.bin", shape=values.shape,
                                layout={"tokens": (2, 3)})
        rows = torch.tensor([7, 0, 999])
        found = CachedFeatures(cache, self.device).of(rows)["tokens"]
        assert found.device.type == self.device
        assert found.cpu().flatten(1).equal(torch.from_numpy(values)[rows])
        return "on the device"

    def recipe_steps(self):
        """Whole steps of the recipe, live and cached; see tests/benchmark.py."""
        sizes = {"batches": (8,), "micro": 4, "size": 64, "rounds": 1} if self.tiny else {}
        gpu_rows(self.build("simzss")[0], self.captions, self.device, **sizes)
        return "see above"

    def one_step(self, name):
        """A step of a method; it must be finite."""
        self.memory()
        method, recipe = self.build(name)
        optimizer = optimizer_of(method)
        batch = self.batch(method, recipe)
        self.gradient(method, batch)                # the first is slow: memory is asked for
        start = time.time()
        losses = self.gradient(method, batch)
        optimizer.step()
        method.after_step(0, 10)
        assert all(p.isfinite().all() for p in method.trained().values()), losses
        return (f"loss {losses['loss']:.3f}, {recipe.run.batch} rows in {time.time() - start:.2f} s"
                f", {self.memory():.1f} GiB")

    def scripts(self):
        """eval.py and segment.py on photos of noise, in each precision; both say how fast."""
        photos = self.folder / "data" / "images"
        masks = self.folder / "data" / "masks"
        for folder in (photos, masks):
            folder.mkdir(parents=True)
        side, count, classes = (64, 2, 5) if self.tiny else (448, 20, 100)
        for i in range(count):
            Image.fromarray(self.noise(side)).save(photos / f"{i}.png")
            mask = self.rng.integers(0, classes, (side, side)).astype(np.uint8)
            Image.fromarray(mask).save(masks / f"{i}.png")
        (self.folder / "data" / "classes.txt").write_text(
            "".join(f"thing {i}\n" for i in range(classes)))
        common = ["--checkpoint", str(self.checkpoint), "--device", self.device, "--precision"]
        fp32 = None
        for precision in ("fp32", "tf32", "bf16"):
            output = self.folder / f"{precision}.json"
            with contextlib.redirect_stdout(io.StringIO()):
                eval.main(["--dataset", str(photos.parent), "--workers", "0", "--output",
                           str(output), *common, precision])
                segment.main([str(photos / "0.png"), "--classes", "cat, dog, sky, grass",
                              "--output", str(self.folder / precision), *common, precision])
            result = json.loads(output.read_text())
            mask = np.asarray(Image.open(self.folder / precision / "0_mask.png"))
            fp32 = mask if fp32 is None else fp32
            yield (f"{precision}: {result['images_per_second']} images/s of {classes} classes, "
                   f"mIoU {result['mIoU']:.4f}; {(mask != fp32).mean():.2%} of a photo's pixels "
                   "are others than in fp32")

    def all(self):
        """(name, check) of all, the most wanted first."""
        yield "NCCL", self.nccl
        yield "memory", self.memory_of_a_row
        yield "precision", self.precisions
        yield "random numbers", self.random_numbers
        yield "fp16, scaler", self.fp16_steps
        yield "cached features", self.cached_features
        yield "recipe", self.recipe_steps
        for name in METHODS:
            yield f"step of {name}", partial(self.one_step, name)
        yield "eval, segment", self.scripts


def lines_of(check):
    """The lines of a check, as they come."""
    found = check()
    yield from [found] if isinstance(found, str) else found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="networks and images of a test")
    args = parser.parse_args(argv)
    began = time.time()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name, check in Checks(args.device, args.tiny, folder).all():
            start = time.time()
            try:
                if start - began > LAST_START:
                    raise TimeoutError(f"not begun: {LAST_START} s are over")
                for line in lines_of(check):
                    print(f"{name:22} {line}   ({time.time() - start:.1f} s)", flush=True)
            except (Exception, SystemExit) as error:    # the other checks are wanted, too
                failed.append(name)
                print(f"{name:22} FAILED: {type(error).__name__}: {error}", flush=True)
    print(f"{time.time() - began:.0f} s, failed: {', '.join(failed) or 'none'}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
