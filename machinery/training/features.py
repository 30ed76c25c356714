"""Feature cache: what a method's frozen networks make of each image, computed once.

A folder holds

    features.json   what the rows are the features of, and how a row is cut into tensors
    features.bin    float16 (images, values per image), a row for each image
    done-RANK.bin   uint8 (images,), the rows that process RANK has finished: one of the marks below
"""
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from machinery.files import write_text
from machinery.images import to_pixels
from machinery.training.workers import start_data_worker

MISSING, DONE, UNREADABLE = range(3)                # marks of a row
TRANSFORM = "whole image, JPEG draft of twice the size, bicubic"
BATCH = 64                                          # images that are computed at a time
PAGE = 2 ** 16                                      # bytes; the largest memory page in use


class FeatureCache:
    """Features of images that are seen whole, squeezed to a square: fast, but no random crops.

    folder: where they are or will be, on a disk that all processes share.
    images: paths or arrays (H, W, 3), one per pair; several pairs may share an image.
    open_image: function from a pair's number to its RGB image.
    size: pixels of the square.
    key: JSON values that the features depend on.
    layout: {name: shape}, the tensors of one image, in the order of a row.
    Raises ValueError if the folder holds something else, OSError if the disk is too small.
    """

    def __init__(self, folder, images, open_image, size, key, layout):
        self.folder = Path(folder)
        self.file = self.folder / "features.bin"
        self.images = images
        self.open_image = open_image
        self.size = size
        self.layout = {name: list(shape) for name, shape in layout.items()}
        first = {}                                  # image -> its first pair
        first_pair = [first.setdefault(i if isinstance(image, np.ndarray) else image, i)
                      for i, image in enumerate(images)]
        self.pairs = np.unique(first_pair)          # row -> the first pair of its image
        self.row = np.searchsorted(self.pairs, first_pair)          # pair -> row
        self.shape = (len(self.pairs), sum(map(math.prod, self.layout.values())))
        names = hashlib.sha256(b"\n".join(identity(images[i]) for i in self.pairs))
        self.prepare({**key, "size": size, "transform": TRANSFORM, "images": len(self.pairs),
                      "names_sha256": names.hexdigest(), "layout": self.layout})

    def prepare(self, key):
        """Compare an existing folder with the key, or begin a new one."""
        description = self.folder / "features.json"
        key = json.loads(json.dumps(key))
        size = self.file.stat().st_size if self.file.exists() else 0
        is_new = not description.exists() and not size
        if not is_new:
            check_key(self.folder, description, key)
        self.done = self.read_marks()
        needed = 2 * math.prod(self.shape)          # bytes of float16
        if size < needed:
            if self.done.any():
                raise ValueError(f"{self.file} is cut short ({size:,} of {needed:,} bytes); delete "
                                 "the folder, and run the same command again")
            self.reserve(needed, description, key)

    def reserve(self, needed, description, key):
        """Make the file of the rows, with all of its disk space, and then describe it."""
        existing = next(folder for folder in (self.folder, *self.folder.resolve().parents)
                        if folder.exists())
        free = shutil.disk_usage(existing).free
        sizes = (f"the features of {len(self.pairs):,} images need {needed / 1e9:.1f} GB in "
                 f"{self.folder}, {free / 1e9:.1f} GB are free")
        if needed > free:
            raise OSError(sizes)
        print(sizes)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(description, json.dumps(key))
        with open(self.file, "ab") as file:
            try:
                if hasattr(os, "posix_fallocate"):  # not on macOS, where a full disk is found late
                    os.posix_fallocate(file.fileno(), 0, needed)
                file.truncate(needed)
            except OSError as error:
                raise OSError(f"{sizes}, but the disk does not give them ({error.strerror})"
                              ) from None

    def read_marks(self):
        """Marks of all rows (images,), from the files of all processes."""
        marks = np.zeros(len(self.pairs), np.uint8)
        for path in self.folder.glob("done-*.bin"):
            found = np.fromfile(path, np.uint8, len(marks))
            marks[:len(found)] = np.maximum(marks[:len(found)], found)
        return marks

    def compute(self, features, rank=0, world=1, workers=0):
        """Compute the missing rows that fall to this process.

        features: function from pixels uint8 (n, 3, size, size) to a dict of tensors (n, ...).
        A row is on the disk before it is marked, so after a kill the same command goes on.
        """
        missing = np.flatnonzero(self.read_marks() == MISSING)
        # A process has blocks of rows that fill whole pages: two machines that write to the same
        # page of a shared disk may overwrite each other. So each has marks of its own, too.
        block = max(BATCH, PAGE // math.gcd(PAGE, 2 * self.shape[1]))
        mine = missing[missing // block % world == rank]
        batches = [mine[i:i + BATCH] for i in range(0, len(mine), BATCH)]
        path = self.folder / f"done-{rank}.bin"
        with open(path, "ab") as file:
            file.truncate(len(self.pairs))
        marks = np.memmap(path, np.uint8, "r+", shape=len(self.pairs))
        values = np.memmap(self.file, np.float16, "r+", shape=self.shape)
        images = WholeImages(self.open_image, self.size, [self.pairs[rows] for rows in batches])
        loader = DataLoader(images, batch_size=None, num_workers=workers,
                            worker_init_fn=start_data_worker)
        with tqdm(total=len(mine), desc=f"features, process {rank + 1} of {world}", unit=" images",
                  disable=None if rank == 0 else True) as bar:
            for rows, (pixels, readable) in zip(batches, loader):
                computed = features(pixels)
                values[rows] = torch.cat([computed[name].flatten(1).half().cpu()
                                          for name in self.layout], dim=1).numpy()
                values.flush()
                marks[rows] = np.where(readable, DONE, UNREADABLE)
                marks.flush()
                bar.update(len(rows))

    def finished(self):
        """Whether all rows are there, those of other processes included; then they can be read."""
        self.done = self.read_marks()
        return bool(self.done.all())

    def read(self, i):
        """Features of pair i: dict of float16 tensors. Raises ValueError for an unreadable image.

        The file is opened for each read: a data worker that is not forked gets no rows sent.
        """
        row = self.row[i]
        if self.done[row] == UNREADABLE:
            raise ValueError(f"{self.images[i]} was unreadable when the features were computed")
        values = np.array(np.memmap(self.file, np.float16, "r", shape=self.shape)[row])
        pieces = torch.from_numpy(values).split(list(map(math.prod, self.layout.values())))
        return {name: piece.view(self.layout[name]) for name, piece in zip(self.layout, pieces)}


def open_cache(folder, pairs, method, size, precision, processes, workers):
    """The complete `FeatureCache` of a run; all processes compute a part of it.

    folder: of the cache.
    pairs: with `images`, paths or arrays, and `open_image`, see `FeatureCache`.
    method: whose `features` are kept.
    size: pixels of the square.
    precision: dtype of the networks' arithmetic.
    processes: `parallel.Processes`. workers: data workers of each.
    Raises ValueError for a method without frozen features.
    """
    key = method.feature_key()
    if key is None:
        raise ValueError(f"--cache-features: {method.name} has no features that it could keep")

    def features(pixels):
        return method.features({"pixels": pixels.to(processes.device)})

    one = features(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    layout = {name: value.shape[1:] for name, value in one.items()}
    with processes.first_process_first():
        cache = FeatureCache(folder, pairs.images, pairs.open_image, size,
                             {"backbone": key, "precision": str(precision)}, layout)
    cache.compute(features, processes.rank, processes.world, workers)
    processes.wait()
    if not cache.finished():
        raise ValueError(f"features are missing in {folder}; it must be a folder that all "
                         "processes share")
    return cache


def check_key(folder, description, key):
    """Raise ValueError if features.json does not say what the key says."""
    found = {}
    if description.exists():
        try:
            found = json.loads(description.read_text())
        except (ValueError, RecursionError):
            pass
    if found != key:
        found = found if isinstance(found, dict) else {}
        differ = ", ".join(name for name in key if found.get(name) != key[name])
        raise ValueError(f"{folder} holds the features of something else ({differ} differ); name "
                         "another folder with --cache-features, or delete this one")


def identity(image):
    """Bytes that change when the image does: an array's values, or a file's name, size and time."""
    if isinstance(image, np.ndarray):
        return np.ascontiguousarray(image).tobytes()
    status = image.stat()
    return f"{image} {status.st_size} {status.st_mtime_ns}".encode()


class WholeImages(Dataset):
    """Images of some pairs, several at a time: uint8 (n, 3, size, size), and which are readable.

    batches: lists of numbers of pairs.
    """

    def __init__(self, open_image, size, batches):
        self.open_image = open_image
        self.size = size
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        pixels = torch.zeros(len(self.batches[number]), 3, self.size, self.size, dtype=torch.uint8)
        readable = torch.ones(len(pixels), dtype=torch.bool)
        for place, i in enumerate(self.batches[number]):
            try:
                image = self.open_image(i).resize((self.size, self.size), Image.BICUBIC)
                pixels[place] = to_pixels(image)
            except (ValueError, OSError):
                readable[place] = False
        return pixels, readable
