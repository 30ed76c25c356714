"""Captioned images to train on: cropping, pairs, global batches.

    image --crop--> pixels uint8 (B, 3, size, size)
    caption --concepts.py--> tokens (B, 77), concepts (B, M, 3)

What training needs of a pair is the method's business (`Method.sample`); which pairs are in which
batch is decided here, by the seed and the step alone.
"""
import math
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from concepts import annotate, annotation_key, forget_words, load_annotations, load_parser
from machinery.training.captions import Annotations, as_arrays, find_images, read_captions
from machinery.images import IMAGE_SUFFIXES, load_image, read_segments
from machinery.training.loading import BatchStream, loader_batch_size
from machinery.contract import Pair
from machinery.training.shards import BAD, Shards, find_shards, read_sidecar
from machinery.toy import toy_scene

MAX_PIXELS = 2 ** 26                                # of a training image, decoded: 67 megapixels


# --------------------------------------------------------------------------------------------------
# Images

def random_resized_crop(image, size, rng, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3),
                        resample=Image.BICUBIC):
    """Cut out a random part and resize it to size x size (docs/method.md, section 3).

    scale: range of the part's share of the area. ratio: range of its width / height. Where ten
    draws do not fit into the image, its largest central part within the ratios is taken.
    """
    W, H = image.size
    for _ in range(10):
        area = W * H * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if w <= W and h <= H:
            x = rng.integers(W - w + 1)
            y = rng.integers(H - h + 1)
            break
    else:
        w = min(W, round(H * ratio[1]))
        h = min(H, round(W / ratio[0]))
        x = (W - w) // 2
        y = (H - h) // 2
    return image.resize((size, size), resample, box=(x, y, x + w, y + h))


# --------------------------------------------------------------------------------------------------
# Pairs

class CaptionedImages(Dataset):
    """Pairs of image and caption with the caption's concepts.

    images: paths or arrays (H, W, 3), one per pair. captions: str, one per pair. annotations:
    (offsets, rows) of `load_annotations`, None = no concepts. sample: function (pair, rng=...) ->
    dict of tensors, `Method.sampler`. size: pixels of the crops. cache: FeatureCache or None.

    An item is asked for by (position in the run, number of the pair). The position seeds the crop,
    so it depends neither on the number of processes nor on that of workers. An unreadable image is
    replaced by the next pair.
    """

    def __init__(self, images, captions, annotations, sample, size, seed=0, cache=None):
        self.images = images
        self.captions = captions
        self.annotations = Annotations(*annotations or as_arrays([[]] * len(images)))
        self.sample = sample
        self.size = size
        self.seed = seed
        self.cache = cache

    def __len__(self):
        return len(self.images)

    def open_image(self, i):
        """Image of pair i, a large JPEG reduced. Raises ValueError or OSError."""
        image = self.images[i]
        if isinstance(image, np.ndarray):
            return Image.fromarray(image)
        return load_image(image, 2 * self.size, MAX_PIXELS)

    def pair(self, i):
        return Pair(image=lambda: self.open_image(i), caption=self.captions[i],
                    concepts=self.annotations.of(i),
                    masks=lambda: read_segments(Path(self.images[i]).with_suffix(".json")),
                    partner=lambda rng: self.partner(i, rng),
                    features=self.cache.read(i) if self.cache else None,
                    path=None if isinstance(self.images[i], np.ndarray) else self.images[i])

    def partner(self, i, rng):
        """(a pair that shares a concept with pair i, the concept's id), or None if i has none."""
        drawn = self.annotations.partner(i, rng)
        return drawn and (self.pair(drawn[0]), drawn[1])

    def __getitem__(self, place):
        position, wanted = place
        for bad in range(10):
            i = (wanted + bad) % len(self)
            rng = np.random.default_rng((self.seed, position))
            try:
                sample = self.sample(self.pair(i), rng=rng)
                return {**sample, "key": torch.tensor(i), "bad": bad}
            except (ValueError, OSError) as error:
                failure = error
        raise ValueError(f"ten unreadable images in a row, the last: {failure}")

    def name(self, i):
        """Words for pair i, to find it again."""
        image = self.images[i]
        return f"pair {i}" + ("" if isinstance(image, np.ndarray) else f", {image}")


def collate(items):
    """Items -> batch. Tensors of different first lengths are padded with -1, so concepts become
    (B, M, 3). bad: unreadable images that were passed over."""
    batch = {"bad": sum(item["bad"] for item in items)}
    for name in items[0]:
        if name != "bad":
            values = [item[name] for item in items]
            if len({value.shape for value in values}) == 1:
                batch[name] = torch.stack(values)
            else:
                batch[name] = torch.nn.utils.rnn.pad_sequence(values, True, padding_value=-1)
    return batch


def load_pairs(source, bank, parser, size, sample, images=None, seed=0, toy_scenes=0,
               needs_captions=True, needs_concepts=True):
    """Training pairs by the name of their source.

    source: "toy", a captions file, tars (a folder, or a name with ranges), or a folder of images if
    no captions are needed. images: folder of a captions file's images; by default COCO's place for
    a COCO file (annotations/captions_X.json -> X/), else the file's own folder. toy_scenes: how
    many scenes are drawn. sample, size: see `CaptionedImages`. Pairs whose image is missing are
    left out and counted; more than 1 % is an error. Raises FileNotFoundError or ValueError.
    """
    path = Path(source)
    if source == "toy":
        scenes = [toy_scene(np.random.default_rng((seed, 0, i))) for i in range(toy_scenes)]
        captions = [caption for _, _, caption in scenes]
        annotations = load_annotations(None, captions, bank, parser) if needs_concepts else None
        return CaptionedImages([image for image, _, _ in scenes], captions, annotations, sample,
                               size, seed)
    if path.suffix == ".tar" or path.is_dir() and (needs_captions or any(path.glob("*.tar"))):
        return open_shards(source, bank, parser, size, sample, seed, needs_captions,
                           needs_concepts)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise FileNotFoundError(f"no images in {path}; expected {', '.join(IMAGE_SUFFIXES)}")
        return CaptionedImages(files, [""] * len(files), None, sample, size, seed)

    pairs = read_captions(path)
    there = find_images(path, pairs, images)
    annotations = None
    if needs_concepts:
        offsets, rows = load_annotations(path, [caption for _, caption in pairs], bank, parser)
        kept = np.array([there[name] is not None for name, _ in pairs])
        rows = rows[np.repeat(kept, np.diff(offsets))]
        offsets = np.concatenate([[0], np.cumsum(np.diff(offsets)[kept])])
        annotations = (offsets, rows)
    pairs = [(there[name], caption) for name, caption in pairs if there[name] is not None]
    return CaptionedImages([file for file, _ in pairs], [caption for _, caption in pairs],
                           annotations, sample, size, seed)


def open_shards(source, bank, parser, size, sample, seed=0, needs_captions=True,
                needs_concepts=True):
    """`Shards` of tars. Concepts come from the files that `concepts.py --shards` writes; with the
    parser "match", where there is no such file, from the caption itself.

    Raises FileNotFoundError; ValueError for concepts of another bank or parser.
    """
    paths = find_shards(source)
    open_image = partial(load_image, least=2 * size, most_pixels=MAX_PIXELS)
    if not needs_concepts:
        return Shards(paths, sample, collate, open_image, needs_captions, seed=seed)
    if bank.open:
        raise ValueError("--bank none grows with the captions that are read, and tars are read "
                         "while training; name a file of concepts with --bank")
    annotator = annotation_key(None, bank, load_parser(parser, bank))
    command = (f'run: python concepts.py --shards "{source}" --parser {parser} (and --bank, if '
               "training has one)")
    try:
        without = [path for path in paths if read_sidecar(path, annotator, len(bank)) is None]
    except ValueError as error:
        raise ValueError(f"{error}; {command}") from None
    if without and parser != "match":
        raise FileNotFoundError(f"{len(without):,} of the {len(paths):,} shards have no concepts "
                                f"yet, the first is {without[0]}; {command}, or train with "
                                "--parser match")
    return Shards(paths, sample, collate, open_image, needs_captions,
                  partial(read_concepts, annotator=annotator, bank_size=len(bank)),
                  partial(match_concepts, bank=bank) if parser == "match" else None,
                  forget_words, seed)


def read_concepts(path, annotator, bank_size):
    """(offsets, rows) beside a tar; None where its concepts file is lost or broken."""
    found = read_sidecar(path, annotator, bank_size)
    return found and found[:2]


@lru_cache(maxsize=1)
def matcher(bank):
    return load_parser("match", bank)


def match_concepts(caption, bank):
    """Rows of a caption by the built-in matcher."""
    with matcher(bank).memory_zone():               # forgets the words afterwards
        return next(annotate([caption], bank, matcher(bank)))


# --------------------------------------------------------------------------------------------------
# Batches

class GlobalBatches(Sampler):
    """The run's batches, of which each process takes its own slice: the same pairs whatever the
    number of processes.

    A pass (epoch) is the data in a new random order, of which the first pass_pairs are taken.
    Passes follow one another without a gap: a batch may hold the end of one and the start of the
    next.

    Yields lists of (position in the run, number of the pair), from step `start` on. The process's
    slice of a step comes in lists of loader_batch pairs (None: in one). only: use so many pairs of
    the data, drawn by the seed; with a larger number these stay, and others are added.
    """

    def __init__(self, length, batch, steps, pass_pairs, rank=0, world=1, seed=0, start=0,
                 loader_batch=None, only=None):
        self.data = np.sort(np.random.default_rng(seed).permutation(length)[:only])
        self.batch = batch
        self.pass_pairs = min(pass_pairs, len(self.data))
        self.rank = rank
        self.local_batch = batch // world
        self.seed = seed
        self.steps = range(start, steps)
        self.loader_batch = loader_batch or self.local_batch

    def __len__(self):
        return len(self.steps) * (self.local_batch // self.loader_batch)

    def __iter__(self):
        ordered_pass = None                         # the pass that `order` is of
        for step in self.steps:
            first = step * self.batch + self.rank * self.local_batch
            keys = []
            for position in range(first, first + self.local_batch):
                pass_number, place = divmod(position, self.pass_pairs)
                if pass_number != ordered_pass:
                    rng = np.random.default_rng((self.seed, pass_number))
                    order = rng.permutation(self.data)
                    ordered_pass = pass_number
                keys.append((position, int(order[place])))
            for i in range(0, self.local_batch, self.loader_batch):
                yield keys[i:i + self.loader_batch]


def open_stream(pairs, args, processes, steps, start=0, counts=None, states=None):
    """`BatchStream` of this process from step `start` on: parts of its share of each batch.

    args: batch, micro_batch, epoch_pairs, pairs, workers, seed. counts: pairs left out before
    `start`, by reason. states: of shards, see `Shards.begin`.
    """
    local_batch = args.batch // processes.world
    loader_batch = loader_batch_size(local_batch, args.micro_batch)
    common = (pairs, processes, local_batch, loader_batch, args.workers)
    if isinstance(pairs, Shards):
        states = pairs.begin(loader_batch, processes.rank, processes.world, args.workers, states)
        return BatchStream(*common, states=states, batch_size=None)
    sampler = GlobalBatches(len(pairs), args.batch, steps, args.epoch_pairs, processes.rank,
                            processes.world, args.seed, start, loader_batch, args.pairs)
    bad_images = 0
    if counts and processes.rank == 0:              # those so far are counted once
        bad_images = counts[BAD.index("bad image")]
    return BatchStream(*common, bad_images=bad_images, batch_sampler=sampler, collate_fn=collate)
