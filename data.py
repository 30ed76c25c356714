"""Captioned images to train on, and a toy world that also has masks to score on.

Captions files are read by `concepts.py`; here images are found, opened and cropped, and pairs become batches.

    image --crop--> pixels uint8 (B, 3, S, S)       caption --concepts.py--> tokens (B, 77), ids (B, M), spans (B, M, 2)
"""
import hashlib
import io
import json
import math
import os
import shutil
import tarfile
import zlib
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from tqdm import tqdm

from concepts import annotate, annotation_key, forget_words, load_annotations, load_parser, tokenize
from machinery.captions import read_captions
from machinery.images import IMAGE_SUFFIXES, load_image, to_pixels
from machinery.resume import MAX_BAD
from machinery.shards import BAD, bad_line, find_shards, read_caption, read_samples, read_sidecar
from machinery.toy import toy_scene


# ---------------------------------------------------------------------------------------------------------------------
# Images


def random_resized_crop(image, size, rng, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3)):
    """Cut a random part out and resize it to size x size, bicubic (method, section 3).

    scale: range of the part's share of the area. ratio: range of its width / height. Where ten draws do not fit into
    the image, its largest central part within the ratios is taken.
    """
    W, H = image.size
    for _ in range(10):
        area = W * H * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= W and h <= H:
            x, y = rng.integers(W - w + 1), rng.integers(H - h + 1)
            break
    else:
        w, h = min(W, round(H * ratio[1])), min(H, round(W / ratio[0]))
        x, y = (W - w) // 2, (H - h) // 2
    return image.resize((size, size), Image.BICUBIC, box=(x, y, x + w, y + h))


# ---------------------------------------------------------------------------------------------------------------------
# Pairs to train on

class CaptionedImages(Dataset):
    """Pairs of image and caption with the caption's concepts.

    images: paths or arrays (H, W, 3), one per pair. captions: str, one per pair. annotations: of `load_annotations`.
    An item is asked for by (position in the run, index of the pair): the position seeds the crop, so that it depends
    neither on the number of processes nor on the number of workers. An unreadable image is replaced by the next pair.
    """

    def __init__(self, images, captions, annotations, size, seed=0):
        self.images, self.captions, (self.offsets, self.rows) = images, captions, annotations
        self.size, self.seed = size, seed

    def __len__(self):
        return len(self.captions)

    def picture(self, i):
        """The whole image of pair i; a large JPEG reduced, to no less than twice self.size. Raises ValueError or OSError."""
        image = self.images[i]
        return Image.fromarray(image) if isinstance(image, np.ndarray) else load_image(image, 2 * self.size)

    def name(self, key):
        """Words for an item's key, to find the pair again."""
        return f"pair {key}" + ("" if isinstance(self.images[key], np.ndarray) else f", {self.images[key]}")

    def view(self, i, position):
        """What the model is to see of pair i, as a dict of tensors. Raises ValueError or OSError."""
        rng = np.random.default_rng((self.seed, position))
        return {"pixels": to_pixels(random_resized_crop(self.picture(i), self.size, rng))}

    def __getitem__(self, key):
        position, index = key
        for bad in range(10):
            i = (index + bad) % len(self)
            try:
                view = self.view(i, position)
                break
            except (ValueError, OSError) as error:
                failure = error
        else:
            raise ValueError(f"ten unreadable images in a row, the last: {failure}")
        rows = torch.from_numpy(self.rows[self.offsets[i]:self.offsets[i + 1]]).long()          # (M, 3)
        return {**view, "tokens": tokenize(self.captions[i]), "rows": rows, "bad": bad, "key": torch.tensor(i)}


def collate(items):
    """Items -> pixels uint8 (B, 3, S, S), tokens (B, 77), ids (B, M) padded with -1, spans (B, M, 2), bad (count),
    key (B,), the pairs' indices.

    Pairs with cached features have class_token (B, D) and patch_tokens (B, N, D), float16, in place of pixels.
    """
    rows = torch.nn.utils.rnn.pad_sequence([item["rows"] for item in items], batch_first=True, padding_value=-1)
    stacked = {key: torch.stack([item[key] for item in items]) for key in items[0] if key not in ("rows", "bad")}
    return {**stacked, "ids": rows[..., 0], "spans": rows[..., 1:], "bad": sum(item["bad"] for item in items)}


class CachedFeatures(CaptionedImages):
    """Pairs with the frozen backbone's features, computed once, in place of pixels: fast, but without random crops.

    folder holds features.json, what they are the features of, and for every `part` images a float16 array
    (images, 1 + N, D), class token first, that is written whole or not at all: `compute` makes those that are missing.
    Raises ValueError if the folder holds the features of something else, OSError if the disk is too small.
    """

    def __init__(self, pairs, backbone, folder, part=64, precision="torch.float32"):
        super().__init__(pairs.images, pairs.captions, (pairs.offsets, pairs.rows), pairs.size, pairs.seed)
        self.folder, self.part = Path(folder), part
        first = {}                                  # image -> its first pair; several captions share one image
        row = [first.setdefault(i if isinstance(image, np.ndarray) else image, i) for i, image in enumerate(pairs.images)]
        self.pictured = sorted(set(row))            # the pairs whose images are rows of the arrays, in order
        self.row = np.searchsorted(self.pictured, row)
        names = hashlib.sha256(b"\n".join(self._identity(pairs.images[i]) for i in self.pictured))
        frozen = {name: value for name, value in backbone.config.items() if name != "weights"}  # wherever the file lies
        key = {"backbone": frozen, "precision": precision, "size": pairs.size,
               "transform": "whole image, JPEG draft of twice the size, bicubic",
               "images": len(self.pictured), "names_sha256": names.hexdigest(), "part": part}
        file = self.folder / "features.json"
        if not file.exists() and not any(self.folder.glob("features-*.npy")):
            self._check_disk(backbone)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "features.json.partial").write_text(json.dumps(key))
            (self.folder / "features.json.partial").replace(file)
        found = json.loads(file.read_text()) if file.exists() else {}
        if found != key:
            differ = [name for name in key if found.get(name) != key[name]]
            raise ValueError(f"{folder} holds the features of something else ({', '.join(differ)} differ); name another "
                             "folder with --cache-features, or delete this one")
        self._check_disk(backbone)

    @staticmethod
    def _identity(image):
        """Bytes that change when the image does: an array's values, or a file's name, size and time."""
        if isinstance(image, np.ndarray):
            return np.ascontiguousarray(image).tobytes()
        status = image.stat()
        return f"{image} {status.st_size} {status.st_mtime_ns}".encode()

    def _file(self, part):
        return self.folder / f"features-{part:06d}.npy"

    def missing(self):
        """Numbers of the arrays that are still to be computed."""
        return [part for part in range(-(-len(self.pictured) // self.part)) if not self._file(part).exists()]

    def _check_disk(self, backbone):
        tokens = 1 + math.prod(-(-self.size // patch) for patch in backbone.patch_size)
        disk = next(place for place in (self.folder, *self.folder.resolve().parents) if place.exists())
        images = min(len(self.missing()) * self.part, len(self.pictured))
        need, free = images * tokens * backbone.width * 2, shutil.disk_usage(disk).free
        if need > free:
            raise OSError(f"the features need {need / 1e9:.1f} GB in {self.folder}, {free / 1e9:.1f} GB are free")

    def compute(self, backbone, rank=0, world=1, workers=0, autocast=nullcontext):
        """Compute the missing arrays that fall to this process; workers: processes that open the images."""
        missing = [part for part in self.missing() if part % world == rank]
        parts = [self.pictured[part * self.part:(part + 1) * self.part] for part in missing]
        loader = DataLoader(Pictures(self, parts), batch_size=None, num_workers=workers)
        with tqdm(total=sum(map(len, parts)), desc=f"features, process {rank + 1} of {world}", unit=" images",
                  disable=None if rank == 0 else True) as bar:
            for part, (pixels, readable) in zip(missing, loader):
                with autocast():
                    class_token, patches, _ = backbone(backbone.normalise(pixels.to(backbone.mean.device)))
                features = torch.cat([class_token[:, None], patches], dim=1).half().cpu().numpy()       # (images, 1 + N, D)
                features[~readable.numpy()] = 0     # which no unit-norm feature is
                partial = self._file(part).with_suffix(f".{os.getpid()}.partial")
                try:
                    with open(partial, "wb") as file:
                        np.save(file, features)
                    partial.replace(self._file(part))
                except OSError as error:
                    partial.unlink(missing_ok=True)
                    raise OSError(f"{self._file(part)} could not be written ({error}); the features computed so far are "
                                  "kept, the same command goes on from there") from None
                bar.update(len(features))

    def view(self, i, position):
        part, row = divmod(int(self.row[i]), self.part)
        features = torch.from_numpy(open_features(self._file(part))[row].copy())                # (1 + N, D) float16
        if not features[0].any():
            raise ValueError(f"{self.images[i]} was unreadable when the features were computed")
        return {"class_token": features[0], "patch_tokens": features[1:]}


@lru_cache(maxsize=None)
def open_features(path):
    return np.load(path, mmap_mode="r")             # (images, 1 + N, D)


class Pictures(Dataset):
    """The whole images of some pairs, several at a time: uint8 (images, 3, S, S), and which could be read (images,)."""

    def __init__(self, pairs, parts):
        self.pairs, self.parts = pairs, parts

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, part):
        size, pixels, readable = self.pairs.size, [], []
        for i in self.parts[part]:
            try:
                pixels.append(to_pixels(self.pairs.picture(i).resize((size, size), Image.BICUBIC)))
                readable.append(True)
            except (ValueError, OSError):
                pixels.append(torch.zeros(3, size, size, dtype=torch.uint8))
                readable.append(False)
        return torch.stack(pixels), torch.tensor(readable)


class GlobalBatches(Sampler):
    """The run's batches, of which each process takes its own slice: the same pairs however many processes there are.

    Passes follow one another without a gap, each a fresh shuffle of the data cut to pass_pairs; a batch may hold the
    end of one pass and the start of the next. Yields lists of (position, index), from step `start` on, each step's
    slice in lists of piece pairs (None: in one). only: of the data, use this many pairs, drawn by the seed; a larger
    number adds to them.
    """

    def __init__(self, length, batch, steps, pass_pairs, rank=0, world=1, seed=0, start=0, piece=None, only=None):
        self.data = np.sort(np.random.default_rng(seed).permutation(length)[:only])
        self.batch, self.pass_pairs = batch, min(pass_pairs, len(self.data))
        self.rank, self.share, self.seed = rank, batch // world, seed
        self.steps, self.piece = range(start, steps), piece or self.share

    def __len__(self):
        return len(self.steps) * (self.share // self.piece)

    def __iter__(self):
        shuffled_pass = None
        for step in self.steps:
            first = step * self.batch + self.rank * self.share
            keys = []
            for position in range(first, first + self.share):
                number, place = divmod(position, self.pass_pairs)
                if number != shuffled_pass:
                    order, shuffled_pass = np.random.default_rng((self.seed, number)).permutation(self.data), number
                keys.append((position, int(order[place])))
            yield from (keys[i:i + self.piece] for i in range(0, self.share, self.piece))


def load_pairs(source, bank, parser, size, images=None, seed=0, toy_scenes=0):
    """Training pairs by the name of their source: "toy", a captions file, or tars (`Shards`).

    images: folder of the images; by default COCO's place for a COCO file (annotations/captions_X.json -> X/), else
    the captions file's folder. Pairs whose image is missing are left out and counted; more than 1 % is an error.
    toy_scenes: how many scenes the toy world draws.
    """
    if source == "toy":
        scenes = [toy_scene(np.random.default_rng((seed, 0, i))) for i in range(toy_scenes)]
        captions = [scene[2] for scene in scenes]
        return CaptionedImages([scene[0] for scene in scenes], captions,
                               load_annotations(None, captions, bank, parser), size, seed)
    path = Path(source)
    if path.suffix == ".tar" or path.is_dir():
        return Shards(source, bank, parser, size, seed)
    pairs = read_captions(path)
    coco = path.suffix == ".json"
    folder = Path(images or (path.parent.parent / path.stem.removeprefix("captions_") if coco else path.parent))
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder {folder}; expected the images that {path} names, for example "
                                f"{folder / pairs[0][0]}. Name the folder with --images"
                                + (" (COCO's photos: https://cocodataset.org/#download)" if coco else ""))
    there = {name: (folder / name).is_file() for name in {name for name, _ in pairs}}
    missing = [name for name, found in there.items() if not found]
    if len(missing) > MAX_BAD * len(there):
        raise FileNotFoundError(f"{len(missing)} of the {len(there)} images of {path} are not in {folder}, for example "
                                f"{sorted(missing)[0]}; at most {MAX_BAD:.0%} may be missing. Name the folder with --images")
    if missing:
        print(f"{len(missing)} of {len(there)} images are missing in {folder}; their captions are skipped")
    offsets, rows = load_annotations(path, [caption for _, caption in pairs], bank, parser)
    kept = np.array([there[name] for name, _ in pairs])
    rows = rows[np.repeat(kept, np.diff(offsets))]
    offsets = np.concatenate([[0], np.cumsum(np.diff(offsets)[kept])])
    pairs = [pair for pair, keep in zip(pairs, kept) if keep]
    paths = {name: folder / name for name in there}                     # one object for all captions of an image
    return CaptionedImages([paths[name] for name, _ in pairs], [c for _, c in pairs], (offsets, rows), size, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Tar shards to train on

WORKER, BATCHES, EPOCH, PLACE, SAMPLE = range(5)    # of a state, followed by the key of the run and len(BAD) counts


class Shards(IterableDataset):
    """Endless stream of batches from tars in img2dataset's layout; for a DataLoader with batch_size=None.

    source: see `find_shards`. Concepts come from the files that `concepts.py --shards` writes; with the parser "match",
    where there is no such file, from the caption itself. Every epoch shuffles the shards anew. They are dealt out in
    turn to all readers (the workers of all processes); if there are fewer, several readers share a shard, sample by
    sample. So each sample is read once an epoch, and no reader waits for another or is without data.
    `begin` has to be called before. Raises FileNotFoundError, or ValueError for concepts of another bank or parser.
    """

    def __init__(self, source, bank, parser, size, seed=0):
        if bank.open:
            raise ValueError("--bank none grows with the captions that are read, and tars are read while training; name a "
                             "file of concepts with --bank")
        self.paths, self.bank, self.size, self.seed = find_shards(source), bank, size, seed
        self.annotator, self.match = annotation_key(None, bank, load_parser(parser, bank)), parser == "match"
        command = f'run: python concepts.py --shards "{source}" --parser {parser} (and --bank, if training has one)'
        try:
            without = [path for path in self.paths if read_sidecar(path, self.annotator, ()) is None]
        except ValueError as error:
            raise ValueError(f"{error}; {command}") from None
        if without and not self.match:
            raise FileNotFoundError(f"{len(without):,} of the {len(self.paths):,} shards have no concepts yet, the "
                                    f"first is {without[0]}; {command}, or train with --parser match")

    def begin(self, share, rank=0, world=1, workers=0, states=None):
        """Say which part of the stream this process reads, and from where on.

        share: pairs of a batch in this process. workers: of the DataLoader. states: (workers, K), or of all processes
        (world, workers, K) int64: the newest "state" of each worker when the run was interrupted. Returns the states to
        begin with, a row per worker. Raises ValueError if they are of other shards, another seed, world or workers.
        """
        workers = max(1, workers)
        self.share, self.rank, self.world, self.workers = share, rank, world, workers
        run = [world, workers, zlib.crc32(json.dumps([self.seed, [path.name for path in self.paths]]).encode())]
        if states is None:
            states = torch.tensor([[worker, 0, 0, rank * workers + worker, 0, *run, *[0] * len(BAD)]
                                   for worker in range(workers)])                               # (workers, K)
        saved = states.reshape(-1, states.shape[-1])[0, 5:8].tolist()
        if saved[:2] != run[:2]:
            raise ValueError(f"the run was interrupted with {saved[0]} processes of {saved[1]} data workers, now there "
                             f"are {world} of {workers}; shards go on only with the same numbers")
        if saved != run:
            raise ValueError("the shards or the seed are not those of the interrupted run")
        self.states = (states[rank] if states.ndim == 3 else states).clone()
        return self.states.clone()

    def __iter__(self):
        """Batches as `collate` makes them, with key (B, 3), for `name`, and state (K,), for `begin`, int64."""
        turn = int(self.states[:, BATCHES].sum())   # the DataLoader asks its workers in turn, always from the first on
        worker = (turn + (get_worker_info().id if get_worker_info() else 0)) % self.workers
        state, items = self.states[worker].clone(), []
        for item in self.read(state):
            items.append(item)
            if len(items) == self.share:
                state[BATCHES] += 1
                yield {**collate(items), "state": state.clone()}
                items = []

    def read(self, state):
        """Endless stream of a reader's pairs, items for `collate`; state says where the next one is looked for."""
        readers, bad = self.world * self.workers, state[-len(BAD):]
        parts = -(-readers // len(self.paths))      # of a shard; 1 if there is a shard for every reader
        matcher = load_parser("match", self.bank) if self.match else None
        before, barren = int(bad.sum()), 0
        while True:
            epoch, place = state[EPOCH].item(), state[PLACE].item()
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.paths) * parts)
            shard, part = divmod(int(order[place]), parts)
            for reason, item in self.read_part(shard, part, parts, state, matcher):
                if reason:
                    bad[BAD.index(reason)] += 1
                    barren += 1
                else:
                    yield {**item, "bad": int(bad.sum()) - before}
                    before, barren = int(bad.sum()), 0
            barren += 1                             # a part may be empty; a thousand in turn are not
            if barren > 1000:
                raise ValueError(f"no usable pair for long, now in {self.paths[shard]}; skipped so far: {bad_line(bad)}")
            epoch, place = divmod(epoch * len(order) + place + readers, len(order))
            state[[EPOCH, PLACE, SAMPLE]] = torch.tensor([epoch, place, 0])
            forget_words()

    def read_part(self, shard, part, parts, state, matcher):
        """Every parts-th sample of a shard, from state on: (None, item), or (reason of BAD, None) where it is bad."""
        path, epoch = self.paths[shard], state[EPOCH].item()
        concepts = read_sidecar(path, self.annotator, ("offsets", "rows"))
        if concepts is None and matcher is None:
            yield "no concepts", None
            return
        try:
            with tarfile.open(path, "r:") as tar:
                for sample, (_, members) in enumerate(read_samples(tar)):
                    if sample < state[SAMPLE] or sample % parts != part:
                        continue
                    state[SAMPLE] = sample + 1
                    caption, reason = read_caption(tar, members)
                    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), None)
                    if reason or not suffix:
                        yield reason or "no image", None
                        continue
                    try:
                        image = load_image(io.BytesIO(tar.extractfile(members[suffix]).read()), 2 * self.size)
                    except ValueError:
                        yield "bad image", None
                        continue
                    rng = np.random.default_rng((self.seed, epoch, shard, sample))
                    if concepts:
                        offsets, rows = concepts
                        rows = rows[offsets[sample]:offsets[sample + 1]]
                    else:
                        with matcher.memory_zone():             # forgets the words afterwards
                            [rows] = annotate([caption], self.bank, matcher)
                    yield None, {"pixels": to_pixels(random_resized_crop(image, self.size, rng)),
                                 "tokens": tokenize(caption), "rows": torch.tensor(rows).long().reshape(-1, 3),
                                 "key": torch.tensor([epoch, shard, sample])}
        except (tarfile.TarError, OSError):
            if part == 0:                           # counted once, however many read it
                yield "cut tar", None

    def name(self, key):
        """Where the sample of a key (3,) comes from."""
        return f"{self.paths[key[1]]}, sample {int(key[2])}"


# ---------------------------------------------------------------------------------------------------------------------
# The toy world


