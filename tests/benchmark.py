"""How fast is what is claimed to be fast: each row is a ratio measured in one run.

    python tests/benchmark.py --captions data/coco/annotations/captions_train2017.json \
        --parser en_core_web_sm
    python tests/benchmark.py --device cuda             # also whole steps of the recipe on one GPU
    python tests/benchmark.py --device cuda --rows      # only these (not run on a GPU yet)

Both ways run in turn, and the medians of all measurements are compared. The backbone is DINOv2's
ViT-B/14 with random weights, which are as fast as any. About eight minutes on two CPU cores.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))
import model as model_file
from concepts import ConceptBank, Concepts, annotate, load_parser
from data import CaptionedImages, Pair, collate, open_loader
from machinery.contract import Method
from machinery.images import load_image, to_pixels
from machinery.parallel import Processes
from machinery.settings import read
from machinery.tokenizer import tokenize
from machinery.training.features import open_cache
from machinery.training.loading import BatchStream, encode_in_micro_batches, join
from model import (SimZSS, class_weights, concept_loss, global_loss, only_present,
                   similarity_pool)
from segment import segment_image

WORDS = ("a the two large black white dog cat person car bus on in with near grass street table "
         "water and sitting red").split()
COCO_IMAGES = 118287
RECIPE_STEPS = 488                                  # of 8,192 pairs: the recipe on COCO Captions
RECIPE_BATCH = 8192


def interleaved(rounds, *ways, clock=time.perf_counter):
    """Median seconds of each way, called in turn. clock: time.process_time for what one core does,
    which other programs do not disturb."""
    seconds = [[] for _ in ways]
    for _ in range(rounds):
        for way, taken in zip(ways, seconds):
            start = clock()
            way()
            taken.append(clock() - start)
    return [statistics.median(taken) for taken in seconds]


def print_row(name, slow, fast, target=""):
    """One row: seconds of both ways and how many times the second is faster."""
    print(f"{name:58} {slow:10.4f} s {fast:10.4f} s   x {slow / fast:7.3f}   {target}", flush=True)


def read_captions_or_draw(path, rng):
    """Captions of a COCO file; without one, drawn from a few words, with lengths like COCO's (8 to
    25 words, mostly 10)."""
    if path:
        annotations = json.loads(Path(path).read_text())["annotations"]
        return [annotation["caption"] for annotation in annotations]
    lengths = np.minimum(8 + rng.geometric(0.35, 2000), 25)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def build(bank, **settings):
    """SimZSS with random weights. settings: what differs from the recipe's."""
    torch.manual_seed(0)
    settings = {"backbone": {"weights": "random"}, **settings}
    return SimZSS(read(SimZSS.Settings, settings, "benchmark"), bank)


def optimizer_of(model):
    groups = [{"params": group["params"], "weight_decay": 0.2 * group["decay"]}
              for group in model.parameter_groups()]
    return torch.optim.AdamW(groups, lr=1e-5, fused=True)


# --------------------------------------------------------------------------------------------------
# The rows

class Operations(TorchDispatchMode):
    """Counts torch's operations in a with block; on a GPU each is a kernel, or a few."""
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), options=None):
        self.count += not operation.is_view
        return operation(*args, **(options or {}))


def text_rows(model, captions, rounds, batch=128):
    """The text encoder there and back: padded to the context, cut to the longest caption, in groups
    of like length. How many operations that takes, and how much padding."""
    usual = model_file.LONGER, model_file.GROUP

    def load(batch):
        tokens = torch.stack([tokenize(captions[i % len(captions)]) for i in range(batch)])
        return {"tokens": tokens, "concepts": torch.tensor([0, 1, 2]).expand(batch, 1, 3)}

    def encode(model, loaded, longer, group):
        """longer, group: of model.py; captions of any length are together with longer = 77."""
        model_file.LONGER, model_file.GROUP = longer, group
        model.zero_grad()
        encoded = model.encode(loaded)
        (encoded["caption"].sum() + encoded["concepts"].sum()).backward()
        model_file.LONGER, model_file.GROUP = usual

    few = load(32)                                  # more of them, padded, need more than 4 GB
    padded = {**few, "tokens": few["tokens"].clone()}
    padded["tokens"][0, 1:-1] = 320                 # one caption as long as the context: no cut
    padded["tokens"][0, -1] = few["tokens"].max()
    print_row("text of 32: padded -> cut, in groups of like length", *interleaved(
        rounds, lambda: encode(model, padded, 77, 32), lambda: encode(model, few, *usual),
        clock=time.process_time), "at least 3.5")
    loaded = load(batch)
    cut, by_16, by_length = interleaved(
        rounds, lambda: encode(model, loaded, 77, batch),
        lambda: encode(model, loaded, 77, 16), lambda: encode(model, loaded, *usual),
        clock=time.process_time)
    print_row(f"text of {batch}: cut to the longest -> in groups", cut, by_length)
    print_row(f"text of {batch}: groups of 16 -> of like length", by_16, by_length)

    loaded = load(1024)
    lengths = sorted((loaded["tokens"].argmax(dim=-1) + 1).tolist())
    small = build(model.bank, backbone={"name": "toy"}, text={"width": 32, "heads": 2})
    for name, longer, group in (("of 16", 77, 16), ("of 256", 77, 256),
                                ("of like length", *usual)):
        with Operations() as operations:
            encode(small, loaded, longer, group)
        model_file.LONGER, model_file.GROUP = longer, group
        groups = model_file.groups_of_like_length(lengths)
        model_file.LONGER, model_file.GROUP = usual
        padding = sum(size * longest for size, longest in groups) / sum(lengths)
        print(f"# text of 1,024 in groups {name}: {len(groups)} groups, {operations.count:,} "
              f"operations, {padding:.2f} x the tokens")
    loaded = load(8192)
    for name, order in (("as they lie", partial(Method.order, small)), ("by length", small.order)):
        with Operations() as operations:
            small.zero_grad()
            encoded = encode_in_micro_batches(small.encode, order, loaded, 1024)
            (encoded["caption"].sum() + encoded["concepts"].sum()).backward()
        print(f"# text of 8,192 in micro-batches of 1,024, captions {name}: "
              f"{operations.count:,} operations")


def lookup_rows(rounds):
    """The backward pass of the embedding look-up: a part at a time by index, and by split."""
    table = torch.nn.Embedding(49408, 512)

    def backward(tokens, parts_of):
        table.zero_grad()
        sum(part.square().sum() for part in parts_of(table(tokens))).backward()

    for rows in (512, 1024, 2048):
        tokens = torch.randint(49408, (rows, 16))
        index = torch.arange(rows).split(16)
        print_row(f"embeddings of {rows:4} captions: by index -> split", *interleaved(
            rounds, lambda: backward(tokens, lambda embedded: [embedded[part] for part in index]),
            lambda: backward(tokens, lambda embedded: embedded.split(16)),
            clock=time.process_time))


def loss_rows(rounds, B=128, M=2, D=768, bank=50_000):
    """The local loss and its backward pass with a large bank: over all of it, and over the concepts
    that occur."""
    generator = torch.Generator().manual_seed(0)
    concepts = torch.randn(B, M, D, generator=generator).requires_grad_()
    patches = F.normalize(torch.randn(B, 64, D, generator=generator), dim=-1)
    all_ids = torch.randint(bank, (B, M), generator=generator)

    def loss(ids, size):
        weights, counts = class_weights(concepts, ids, size)
        visual = similarity_pool(weights[ids], patches, 0.1)
        concept_loss(visual, ids, weights, counts, 0.07).backward()

    print_row(f"local loss: a bank of {bank:,} -> those that occur", *interleaved(
        rounds, lambda: loss(all_ids, bank), lambda: loss(*only_present(all_ids, bank)),
        clock=time.process_time))


def cache_rows(captions, bank, rounds, pairs=256, values=257 * 768):
    """What a cached pair costs: its features copied and stacked by a worker, as would be plain, and
    only its row, its tokens and its concepts; its caption tokenised, and its tokens stored; then
    the features of all rows in one call."""
    images = [np.full((1, 1, 3), i, np.uint8) for i in range(pairs)]
    captions = [captions[i % len(captions)] for i in range(pairs)]
    annotations = Concepts(bank, "match").of_captions(captions)
    sample = partial(SimZSS.sample, settings=None)
    data = CaptionedImages(images, captions, sample, 224, annotations=annotations, bank=bank)
    data.cache = argparse.Namespace(row_of=lambda i: i)
    with tempfile.TemporaryDirectory() as folder:
        table = np.memmap(Path(folder) / "rows", np.float16, "w+", shape=(pairs, values))
        table[:] = 1
        rows = torch.from_numpy(table)
        gathered = torch.empty(pairs, values, dtype=torch.float16)      # as a pinned one is reused
        order = torch.randperm(pairs)

        def load(with_features):
            items = [data[i, i] for i in range(pairs)]
            if with_features:
                items = [{**item, "features": torch.from_numpy(np.array(table[item["row"]]))}
                         for item in items]
            return collate(items)

        print_row(f"worker, {pairs} cached pairs: features -> their rows", *interleaved(
            rounds, lambda: load(True), lambda: load(False), clock=time.process_time))
        stored = data.annotations.tokens_of

        def load_with(tokens_of):
            data.annotations.tokens_of = tokens_of
            load(False)

        print_row(f"worker, {pairs} cached pairs: tokens made -> stored", *interleaved(
            10 * rounds, lambda: load_with(lambda i: None), lambda: load_with(stored),
            clock=time.process_time))
        print_row(f"main, {pairs} cached pairs: stacked -> gathered in place", *interleaved(
            rounds, lambda: torch.stack([rows[i] for i in order]),
            lambda: torch.index_select(rows, 0, order, out=gathered), clock=time.process_time))


def step_rows(model, captions, bank, rounds, batch=32, size=224):
    """A training step from images in memory, from cached features, and what the local loss adds to
    it."""
    rng = np.random.default_rng(0)
    captions = captions[:batch]
    images = [rng.integers(0, 256, (480, 640, 3), np.uint8) for _ in range(batch)]
    annotations = Concepts(bank, "match").of_captions(captions)
    sample = partial(SimZSS.sample, settings=model.settings)
    settings = argparse.Namespace(batch=batch, micro_batch=None, timeout_minutes=30,
                                  epoch_pairs=batch, pairs=None,
                                  workers=0, seed=0)
    alone = Processes(0, 1, "cpu", "cpu")
    optimizer = optimizer_of(model)

    def stream(folder=None):
        pairs = CaptionedImages(images, captions, sample, size, annotations=annotations, bank=bank)
        if folder:
            pairs.cache = open_cache(folder, pairs, model, size, torch.float32, alone, 0)
        loader = open_loader(pairs, settings, alone, range(10 ** 6))
        return BatchStream(pairs, loader, batch, "cpu")

    def lit_loss(encoded, loaded):
        scale = model.logit_scale.exp()
        return {"loss": global_loss(loaded["class_token"], encoded["caption"], scale)}

    def step(stream, losses=model.losses):
        loaded = join(map(model.features, stream.loader_batches()), batch)
        optimizer.zero_grad()
        losses(model.encode(loaded), loaded)["loss"].backward()
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        live = stream()
        cached = stream(folder)
        slow, fast = interleaved(rounds, lambda: step(live), lambda: step(cached))
        with_local, without = interleaved(4 * rounds, lambda: step(cached),
                                          lambda: step(cached, lit_loss))
    print_row(f"step of {batch}: live -> cached features", slow, fast, "at least 10")
    print_row(f"step of {batch}: SimZSS -> lambda = 0, live", slow, slow - (with_local - without),
              "at most 1.03")


def image_rows(folder, rounds, size=224):
    """Decoding and cropping a photo for training: decoded whole and as small as is allowed; by
    Pillow and by torch; by Pillow's and by torchvision's decoder.

    folder: of JPEGs; None = one is drawn.
    """
    rng = np.random.default_rng(0)
    cut = v2.RandomResizedCrop(size, (0.9, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    with tempfile.TemporaryDirectory() as drawn:
        path = Path(drawn) / "photo.jpg"

        def crop(least):
            Pair(np.asarray(load_image(path, least)), size).crop(np.random.default_rng(0))

        for width, height in ((1280, 960), (4000, 3000), (640, 480)):
            noise = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
            image = Image.fromarray(noise).resize((width, height), Image.BICUBIC)
            image.save(path, quality=90)
            print_row(f"photo of {width} x {height}: whole -> reduced decoding",
                      *interleaved(10 * rounds, lambda: crop(None), lambda: crop(2 * size),
                                   clock=time.process_time))

        photos = sorted(Path(folder or drawn).glob("*.jpg"))

        def by_pillow(photo):
            return to_pixels(cut(load_image(photo, 2 * size)))

        def as_in_training(photo):
            return Pair(photo, size).crop(np.random.default_rng(0))

        def by_torchvision(photo):
            return cut(decode_jpeg(read_file(str(photo)), ImageReadMode.RGB))

        for name, before, after in (
                ("Pillow's filter -> torch's", by_pillow, as_in_training),
                ("Pillow's decoder -> torchvision's, not used", as_in_training, by_torchvision)):
            print_row(f"{len(photos)} crops: {name}",
                      *interleaved(rounds, lambda: [before(photo) for photo in photos],
                                   lambda: [after(photo) for photo in photos],
                                   clock=time.process_time))


def annotation_rows(captions, bank, parser, rounds):
    """Finding concepts: caption by caption, and in the parser's batches."""
    pipeline = load_parser(parser, bank)
    captions = captions[:500]

    def one_by_one():
        for caption in captions:
            list(annotate([caption], bank, pipeline))

    def in_batches():
        list(annotate(captions, bank, pipeline))

    print_row(f"{len(captions)} captions, parser {Path(parser).name}: single -> batches",
              *interleaved(rounds, one_by_one, in_batches))


def window_rows(rounds, device):
    """The windows of a photo one by one and in a batch; a small backbone, 3 windows."""
    model = build((), text={"layers": 1}, backbone={
        "name": "vit_small_patch14_reg4_dinov2.lvd142m", "weights": "random"}).to(device).eval()
    photo = np.random.default_rng(0).integers(0, 256, (448, 896, 3), np.uint8)
    for classes in (2, 171):
        embeddings = F.normalize(torch.randn(classes, model.backbone.width, device=device), dim=-1)
        print_row(f"3 windows, {classes} classes: one by one -> in a batch", *interleaved(
            rounds, lambda: segment_image(model, photo, embeddings, batch=1),
            lambda: segment_image(model, photo, embeddings)))


def gpu_rows(model, captions, device="cuda", batches=(1024, 8192), micro=1024, size=224,
             peak=989e12, rounds=3):
    """Whole steps on one GPU, and from them the time of the recipe on COCO Captions (488 steps of
    8,192 pairs).

    peak: dense bf16 FLOP/s of the card (H100 and H200: 989e12). FLOPs of a pair: backbone
    2 x parameters x tokens once; text 2 x parameters x tokens, times 3 for there and back, 4 if
    encoded twice; attention and losses are left out.
    """
    model = model.to(device)
    optimizer = optimizer_of(model)
    kind = torch.device(device).type
    model.autocast = partial(torch.autocast, kind, torch.bfloat16)
    tokens = torch.stack([tokenize(caption) for caption in captions])
    tokens = tokens[torch.arange(max(batches)) % len(tokens)]
    D = model.backbone.width
    N = model.backbone(torch.zeros(1, 3, size, size, device=device))[1].shape[1]
    pixels = torch.randint(0, 256, (micro, 3, size, size), dtype=torch.uint8)
    features = {"class_token": torch.randn(micro, D).half(),
                "patch_tokens": F.normalize(torch.randn(micro, N, D), dim=-1).half()}
    # FLOPs of a pair
    length = (tokens.argmax(-1) + 1).float().mean().item()
    vision = sum(p.numel() for p in model.backbone.trunk.parameters()) * 2 * (N + 5)
    text = sum(p.numel() for p in model.text.tower.transformer.parameters()) * 2 * length
    seconds = {}

    def load(tokens, seen):
        """What the data workers hand over, on the device, with features."""
        ids = torch.arange(len(tokens)) % len(model.bank)
        concepts = torch.stack([ids, torch.full_like(ids, 1), torch.full_like(ids, 2)], -1)
        loaded = {"tokens": tokens, "concepts": concepts[:, None], **seen}
        loaded = {name: value.to(device, non_blocking=True) for name, value in loaded.items()}
        return model.features(loaded)

    def step(batch, seen, end_part=lambda name: None):
        loaded = join((load(rows, seen) for rows in tokens[:batch].split(micro)), batch)
        end_part("copy and vision")
        encoded = encode_in_micro_batches(model.encode, model.order, loaded, micro)
        end_part("text")
        losses = model.losses(encoded, loaded)
        end_part("losses")
        optimizer.zero_grad()
        losses["loss"].backward()
        end_part("backward")
        optimizer.step()
        value = losses["loss"].item()               # waits for the device
        end_part("optimizer")
        return value

    def print_timeline(batch, seen):
        """Seconds of each part of one step, each waited for."""
        ends = [("", time.perf_counter())]

        def end_part(name):
            if kind == "cuda":
                torch.cuda.synchronize()
            ends.append((name, time.perf_counter()))

        step(batch, seen, end_part)
        parts = [f"{name} {end - start:.3f} s" for (_, start), (name, end) in zip(ends, ends[1:])]
        print("    " + ", ".join(parts))

    def build_cache():
        model.features({"pixels": pixels[:64].to(device)})["class_token"].cpu()

    for batch in batches:
        for name, seen, flops in (("live", {"pixels": pixels}, vision), ("cached", features, 0)):
            if kind == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step(batch, seen)
            [taken] = interleaved(rounds, partial(step, batch, seen))
            seconds[batch, name] = taken
            flops = batch * (flops + text * (4 if batch > micro else 3))
            memory = float("nan")
            if kind == "cuda":
                memory = torch.cuda.max_memory_allocated() / 2 ** 30
            print(f"step of {batch:5}, {name:6}: {taken:8.3f} s, {batch / taken:8.0f} pairs/s, "
                  f"{flops / 1e12:7.1f} TFLOP, {flops / taken / peak:6.1%} of the bf16 peak, "
                  f"{memory:5.1f} GiB")
            print_timeline(batch, seen)
    build_cache()
    [cache] = interleaved(10 * rounds, build_cache)
    largest = max(batches)
    live, cached = (RECIPE_STEPS * RECIPE_BATCH / largest * seconds[largest, name] / 60
                    for name in ("live", "cached"))
    print(f"building the cache: {64 / cache:.0f} images/s (decoding left out)\n"
          f"COCO recipe, {RECIPE_STEPS} steps of {RECIPE_BATCH:,}: live {live:.1f} min; cached "
          f"{cached:.1f} min after {COCO_IMAGES / 64 * cache / 60:.1f} min for {COCO_IMAGES:,} "
          "images (data assumed to be there in time)")


# --------------------------------------------------------------------------------------------------
# The command

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Ratios of the fast ways to the plain ones.")
    add = parser.add_argument
    add("--captions",
        help="COCO captions JSON for real caption lengths (default: drawn words)")
    add("--photos", help="folder of JPEGs to crop (default: one is drawn)")
    add("--parser", default="match", help="spaCy pipeline to annotate with (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu",
        help="cuda adds whole steps (default: %(default)s)")
    add("--rounds", type=int, default=3, help="measurements of each way (default: %(default)s)")
    rows = ["image", "annotation", "windows", "text", "losses", "cache", "step"]
    add("--rows", nargs="*", default=rows, help="(default: all)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    bank = ConceptBank.default()
    rng = np.random.default_rng(0)
    captions = read_captions_or_draw(args.captions, rng)
    rng.shuffle(captions)
    model = build(bank.names)
    print(f"{'':58} {'before':>12} {'after':>12}   {'ratio':>9}   target   "
          f"({torch.get_num_threads()} threads)")
    if "image" in args.rows:
        image_rows(args.photos, args.rounds)
    if "annotation" in args.rows:
        annotation_rows(captions, bank, args.parser, args.rounds)
    if "windows" in args.rows:
        window_rows(args.rounds, args.device)
    if "text" in args.rows:
        text_rows(model, captions, args.rounds)
        lookup_rows(args.rounds)
    if "losses" in args.rows:
        loss_rows(args.rounds)
    if "cache" in args.rows:
        cache_rows(captions, bank, args.rounds)
    if "step" in args.rows:
        step_rows(model, captions, bank, args.rounds)
    if args.device == "cuda":
        gpu_rows(model, captions)


if __name__ == "__main__":
    main()
