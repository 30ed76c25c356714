"""Captioned images to train on: pairs, crops, the batches of a run.

    image --crop--> pixels uint8 (B, 3, size, size)
    caption --concepts.py--> tokens (B, 77), concepts (B, M, 3)

What training takes of a pair is said by `Method.sample`. Which pairs are in which batch, and the
random numbers of a pair, follow from the seed and the position in the run alone.
"""
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision.transforms import v2

from machinery.images import IMAGE_SUFFIXES, list_images, load_image, read_segments, to_pixels
from machinery.tokenizer import forget_words, tokenize
from machinery.toy import toy_scene
from machinery.training.captions import Annotations, find_images, read_captions
from machinery.training.loading import Paths, Texts, loader_batch_size
from machinery.training.shards import (BAD, BadSample, bad_line, count_bad, find_tars, is_tars,
                                       samples_of_tar)
from machinery.training.workers import shared, start_data_worker

MAX_PIXELS = 2 ** 26                                # of a training image, decoded: 67 megapixels
TOY_SCENES = 4000


# --------------------------------------------------------------------------------------------------
# A pair

class Pair:
    """One training pair, as a data worker hands it to `Method.sample`. Files are opened on demand.

    image: path of its file, an open file, or its pixels (H, W, 3) uint8.
    size: pixels a side that training wants.
    caption: str.
    concepts: (M, 3) int64, rows of (bank id, first token, end token), or None.
    tokens: (77,) int64 of the caption, if they are known.
    bank: the `ConceptBank` of these ids, or None.
    features: with --cache-features {"row": the image's row in the cache}, which an item has in
        place of pixels; else None.
    find_partner: function rng -> see `partner`, or None.
    In place of image or caption there may be a `BadSample`, which is raised when it is asked for.
    """

    def __init__(self, image, size, caption="", concepts=None, tokens=None, bank=None,
                 features=None, find_partner=None):
        self._image = image
        self._caption = caption
        self._tokens = tokens
        self.size = size
        self.concepts = concepts
        self.bank = bank
        self.features = features
        self.find_partner = find_partner

    @property
    def path(self):
        """Of the image's file; None for one from memory or from a tar."""
        return self._image if isinstance(self._image, Path) else None

    @property
    def caption(self):
        if isinstance(self._caption, BadSample):
            raise BadSample(*self._caption.args)
        return self._caption

    def image(self):
        """RGB PIL image; a large JPEG may come reduced, to no less than twice the size. Raises
        ValueError or OSError, upon which another pair is taken."""
        if isinstance(self._image, BadSample):
            raise BadSample(*self._image.args)
        if isinstance(self._image, np.ndarray):
            return Image.fromarray(self._image)
        return load_image(self._image, 2 * self.size, MAX_PIXELS)

    def crop(self, rng, scale=(0.9, 1.0), flip=0.0, interpolation=v2.InterpolationMode.BICUBIC):
        """A random part of the image, uint8 (3, size, size) (docs/method.md, section 3).

        rng: decides whether it is mirrored; torch's generator draws the part.
        scale: range of its fraction of the area; width / height is 3/4 to 4/3.
        flip: probability.
        """
        cut = v2.RandomResizedCrop(self.size, scale, interpolation=interpolation)
        pixels = cut(to_pixels(self.image()))       # faster than on a PIL image
        return pixels.flip(-1) if rng.random() < flip else pixels

    def tokens(self):
        """(77,) int64: the caption's byte pairs between start and end token, then zeros."""
        caption = self.caption                      # raises what is wrong with it
        return tokenize(caption) if self._tokens is None else self._tokens

    def masks(self):
        """(H, W) bool arrays of the whole image, one after another, from the JSON in SA-1B's format
        beside it."""
        path = self.path.with_suffix(".json")
        if not path.is_file():
            raise BadSample("no mask")
        return read_segments(path)

    def partner(self, rng):
        """(another `Pair` with a concept in common, that concept's id); None if there is none, and
        always in tars."""
        return self.find_partner and self.find_partner(rng)


def draw_sample(sample, pair, seed):
    """Call sample(pair, rng). rng and torch's generator are seeded by a tuple of numbers; torch's
    generator is afterwards as it was before."""
    with torch.random.fork_rng(devices=[]):
        state, = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(state))
        return sample(pair, np.random.default_rng(seed))


# --------------------------------------------------------------------------------------------------
# Pairs from single images

class CaptionedImages(Dataset):
    """Pairs of image and caption with the caption's concepts.

    images: sequence of paths or arrays (H, W, 3), one per pair.
    captions: sequence of str, one per pair, or `BadSample`.
    sample: `Method.sample`, function (pair, rng) -> dict of tensors.
    size: pixels a side of the crops.
    seed: of the run.
    annotations, bank: `Annotations` of the captions with ids of this bank; None = no concepts.
    `cache`, a `FeatureCache`, may be set later.

    An item is asked for by (position in the run, its place among the pairs in use). The position
    seeds its random numbers. A pair that cannot be used is replaced by the next one.
    """
    positions = None                                # only readers of tars have some

    def __init__(self, images, captions, sample, size, seed=0, annotations=None, bank=None):
        self.images = images
        self.captions = captions
        self.sample = sample
        self.size = size
        self.seed = seed
        self.annotations = annotations
        self.bank = bank
        self.cache = None
        self.used = np.arange(len(images))          # numbers of the pairs in use
        self.used_annotations = annotations

    def __len__(self):
        return len(self.used)

    def use(self, count):
        """Use so many of the pairs only, drawn by the seed; with a larger count these stay."""
        drawn = np.random.default_rng(self.seed).permutation(len(self.images))[:count]
        self.used = np.sort(drawn)
        if self.annotations is not None:
            kept = np.isin(np.arange(len(self.images)), self.used)
            self.used_annotations = self.annotations.only(kept)

    def pair(self, i):
        concepts = tokens = find_partner = None
        if self.annotations is not None:
            concepts = self.annotations.of(i)
            tokens = self.annotations.tokens_of(i)
            find_partner = partial(self.partner, i)
        # A row of the cache, for which `BatchStream` puts the features
        features = {"row": torch.tensor(self.cache.row_of(i))} if self.cache else None
        return Pair(self.images[i], self.size, self.captions[i], concepts, tokens, self.bank,
                    features, find_partner)

    def partner(self, i, rng):
        drawn = self.used_annotations.partner(np.searchsorted(self.used, i), rng)
        return drawn and (self.pair(self.used[drawn[0]]), drawn[1])

    def __getitem__(self, place):
        position, wanted = place
        bad = np.zeros(len(BAD), np.int64)
        while bad.sum() < 10:
            i = int(self.used[(wanted + bad.sum()) % len(self)])
            try:
                item = draw_sample(self.sample, self.pair(i), (self.seed, position))
                return {**item, "key": torch.tensor(i), "bad": torch.from_numpy(bad)}
            except (ValueError, OSError) as error:
                bad += count_bad([error])
                last = error
        raise ValueError(f"ten pairs in a row cannot be used, the last is {self.name(i)}: {last}")

    def name(self, i):
        """Where pair i comes from, for messages."""
        image = self.images[i]
        return f"pair {i}" + ("" if isinstance(image, np.ndarray) else f", {image}")


# --------------------------------------------------------------------------------------------------
# Pairs from tars

class CaptionedTars(IterableDataset):
    """Endless stream of pairs from tars, each read from its first sample to its last.

    Every epoch shuffles the tars anew. Epoch after epoch they are dealt out in turn to all readers,
    the data workers of all processes: no tar is shared, and no reader waits for another.

    paths: of `find_tars`.
    sample, size, seed: see `CaptionedImages`.
    concepts: `Concepts`; None = pairs need none.
    """
    cache = None                                    # of features: only single images have one

    def __init__(self, paths, sample, size, seed=0, concepts=None):
        self.paths = paths
        self.sample = sample
        self.size = size
        self.seed = seed
        self.concepts = concepts
        self.deal()

    def deal(self, rank=0, world=1, workers=0, positions=None):
        """Set `self.positions`, (readers,) int64: where this process's readers begin in the
        sequence of all epochs' tars.

        rank, world: this process among all.
        workers: data workers of each process, at most; 0 = the process itself reads.
        positions: (world, readers) int64, of an interrupted run. The tars in work begin again. With
            another number of processes or workers all go on from the least, so that none is left
            out.
        """
        if len(self.paths) < world:
            raise ValueError(f"{len(self.paths)} tars for {world} processes; each process reads "
                             f"tars of its own: expected at least {world}, or fewer processes")
        readers = min(max(1, workers), len(self.paths) // world)
        begin = torch.arange(world * readers).view(world, readers)
        if positions is not None:
            same = positions.shape == begin.shape
            begin = positions if same else begin + positions.min()
        self.step = world * readers
        self.positions = begin[rank].clone()

    def __iter__(self):
        """Items, with key (3,): epoch, number of the tar, number in it; and position (2,): this
        reader, and where the tar in work is in the sequence."""
        worker = get_worker_info()
        reader = worker.id if worker else 0
        position = int(self.positions[reader])
        bad = np.zeros(len(BAD), np.int64)          # samples since the last good one
        tars = 0                                    # that ended since then
        while True:
            epoch, place = divmod(position, len(self.paths))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.paths))
            tar = int(order[place])
            for number, pair in enumerate(self.read(self.paths[tar])):
                key = (epoch, tar, number)
                try:
                    item = draw_sample(self.sample, pair, (self.seed, *key))
                except (ValueError, OSError) as error:
                    bad += count_bad([error])
                    continue
                yield {**item, "key": torch.tensor(key), "bad": torch.from_numpy(bad),
                       "position": torch.tensor([reader, position])}
                bad = np.zeros(len(BAD), np.int64)
                tars = 0
            tars += 1                               # a tar may be empty; a thousand are not
            if bad.sum() + tars > 1000:
                raise ValueError(f"no usable pair for long, now in {self.paths[tar]}; left out "
                                 f"since the last one: {bad_line(bad)}")
            position += self.step
            forget_words()

    def read(self, path):
        """The pairs of a tar, also those that cannot be used."""
        found = self.concepts and self.concepts.of_tar(path)
        for number, (caption, image) in enumerate(samples_of_tar(path)):
            concepts = tokens = None
            if found:
                concepts = found[0].of(number)
                tokens = found[0].tokens_of(number)
            elif self.concepts and isinstance(caption, str):
                if self.concepts.parser == "match":
                    annotations = Annotations.of_lists(self.concepts.with_tokens([caption]))
                    concepts = annotations.of(0)
                    tokens = annotations.tokens_of(0)
                else:                               # too slow here; its cache is lost
                    caption = BadSample("no concepts")
            yield Pair(image, self.size, caption, concepts, tokens,
                       self.concepts and self.concepts.bank)

    def name(self, key):
        """Where the sample of a key (3,) comes from, for messages."""
        return f"{self.paths[key[1]]}, sample {int(key[2])}"


# --------------------------------------------------------------------------------------------------
# Pairs by the name of their source

def load_pairs(source, concepts, sample, size, images=None, seed=0, toy_scenes=None,
               first_alone=nullcontext):
    """`CaptionedImages` or `CaptionedTars`.

    source: "toy"; a captions file; tars: a folder, or a name with ranges; or a folder of images.
    concepts: `concepts.Concepts`; None for a method that needs none.
    sample, size, seed: see `CaptionedImages`. Images without captions will do for a method that
        asks a pair for none.
    images: folder of a captions file's images; by default COCO's place for a COCO file
        (annotations/captions_X.json -> X/), else the file's own folder. Missing ones are left out
        and counted; more than 1 % is an error.
    toy_scenes: how many are drawn; None = TOY_SCENES.
    first_alone: of several processes, makes a context that the first one enters alone: it finds the
        concepts of a captions file, the others read what it found.
    Raises FileNotFoundError or ValueError.
    """
    annotations = None
    bank = concepts and concepts.bank
    if source == "toy":
        scenes = [toy_scene(np.random.default_rng((seed, 0, i)))
                  for i in range(toy_scenes or TOY_SCENES)]
        files, _, captions = map(list, zip(*scenes))
        annotations = concepts and concepts.of_captions(captions)
    elif is_tars(source):
        paths = find_tars(source)
        if concepts:
            concepts.check_tars(paths, source)
        return CaptionedTars(paths, sample, size, seed, concepts)
    elif Path(source).is_dir():
        files = Paths(list_images(source, below=True))
        if not files:
            raise FileNotFoundError(f"no tars and no images in {source}; expected *.tar, or "
                                    f"{', '.join(IMAGE_SUFFIXES)}")
        captions = [BadSample("no caption")] * len(files)
        if concepts or asks_for_caption(sample, Pair(files[0], size, captions[0])):
            raise ValueError(f"{source} is a folder of images, which have no captions; expected a "
                             "captions file or tars")
    else:
        pairs = read_captions(source)
        there = find_images(Path(source), pairs, images)
        kept = np.array([there[name] is not None for name, _ in pairs])
        if concepts:
            with first_alone():
                annotations = concepts.of_file(source, [caption for _, caption in pairs]).only(kept)
        files = Paths(there[name] for name, _ in pairs if there[name])
        captions = Texts(caption for name, caption in pairs if there[name])
    return CaptionedImages(files, captions, sample, size, seed, annotations, bank)


def asks_for_caption(sample, pair):
    """Whether a method takes the caption of a pair, which has none; if its image is readable."""
    try:
        draw_sample(sample, pair, 0)
    except BadSample as error:
        return str(error) == "no caption"           # not "no mask"
    except (ValueError, OSError):
        pass
    return False


# --------------------------------------------------------------------------------------------------
# Batches

class GlobalBatches(Sampler):
    """The run's batches, of which each process takes its own slice, its local batch: the same pairs
    whatever the number of processes.

    An epoch is the data in a new random order, of which the first epoch_pairs are taken. Epochs
    follow one another without a gap: a batch may hold the end of one and the start of the next.

    length: pairs of the data.
    settings: of the run: batch, epoch_pairs, seed.
    steps: range of the steps to come.
    rank, world: this process among all.
    loader_batch: pairs that are loaded at a time, a divisor of the local batch; None: all.
    Yields lists of (position in the run, place among the pairs in use).
    """

    def __init__(self, length, settings, steps, rank=0, world=1, loader_batch=None):
        self.length = length
        self.batch = settings.batch
        self.epoch_pairs = min(settings.epoch_pairs or length, length)
        self.seed = settings.seed
        self.steps = steps
        self.rank = rank
        self.local_batch = settings.batch // world
        self.loader_batch = loader_batch or self.local_batch

    def __len__(self):
        return len(self.steps) * (self.local_batch // self.loader_batch)

    def __iter__(self):
        @lru_cache(maxsize=1)
        def order(epoch):
            return np.random.default_rng((self.seed, epoch)).permutation(self.length)

        for step in self.steps:
            first = step * self.batch + self.rank * self.local_batch
            for start in range(first, first + self.local_batch, self.loader_batch):
                keys = []
                for position in range(start, start + self.loader_batch):
                    epoch, place = divmod(position, self.epoch_pairs)
                    keys.append((position, int(order(epoch)[place])))
                yield keys


def collate(items):
    """Items -> batch. Tensors that differ in their first dimension are padded with -1, so concepts
    (M, 3) become (B, M, 3). bad (len(BAD),): how many pairs were passed over, by reason."""
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        if name == "bad":
            batch[name] = torch.stack(values).sum(dim=0)
        elif name == "position":                    # of a reader of tars
            batch[name] = values[-1]
        elif len({value.shape for value in values}) == 1:
            batch[name] = torch.stack(values)
        else:
            batch[name] = torch.nn.utils.rnn.pad_sequence(values, True, padding_value=-1)
    return dict(zip(batch, shared(batch.values())))


def open_loader(pairs, settings, processes, steps, positions=None):
    """DataLoader of this process's batches, `loader_batch_size` pairs at a time.

    pairs: of `load_pairs`.
    settings: of the run: batch, micro_batch, epoch_pairs, workers, timeout_minutes, seed.
    processes: of this run.
    steps: range of the steps to come.
    positions: of tars, see `CaptionedTars.deal`.
    """
    rows = loader_batch_size(settings.batch // processes.world, settings.micro_batch)
    options = {"num_workers": settings.workers, "collate_fn": collate,
               "worker_init_fn": start_data_worker,
               "pin_memory": processes.device_type == "cuda"}
    if isinstance(pairs, CaptionedTars):
        pairs.deal(processes.rank, processes.world, settings.workers, positions)
        options["batch_size"] = rows
        options["num_workers"] = min(settings.workers, len(pairs.positions))
    else:
        options["batch_sampler"] = GlobalBatches(len(pairs), settings, steps, processes.rank,
                                                 processes.world, rows)
    if options["num_workers"]:                      # a data worker, too, may answer no more
        options["timeout"] = 60 * settings.timeout_minutes
    return DataLoader(pairs, **options)
