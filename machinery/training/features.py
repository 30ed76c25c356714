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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from machinery.files import write_text
from machinery.images import to_pixels
from machinery.parallel import progress
from machinery.training.workers import collate_tuples, start_data_worker

MISSING, DONE, UNREADABLE = range(3)                # marks of a row
TRANSFORM = "whole image, JPEG draft of twice the size, torch's bicubic"
BATCH = 64                                          # images that are computed at a time
GPU_PART = 0.5                                      # of a GPU's free memory that rows may fill


class FeatureCache:
    """Features of images that are seen whole, squeezed to a square: fast, but no random crops.

    folder: where they are or will be, on a disk that all processes share.
    pairs: `data.CaptionedImages`, of which those in use count; several may share an image.
    size: pixels of the square.
    key: JSON values that the features depend on.
    layout: {name: shape}, the tensors of one image, in the order of a row.
    Raises ValueError if the folder holds something else, OSError if the disk is too small.
    """

    def __init__(self, folder, pairs, size, key, layout):
        self.folder = Path(folder)
        self.file = self.folder / "features.bin"
        self.pairs = pairs
        self.size = size
        self.layout = {name: list(shape) for name, shape in layout.items()}
        first = {}                                  # image -> its first pair
        first_pair = []                             # of the image of each pair in use
        for i in pairs.used.tolist():
            image = pairs.images[i]
            first_pair.append(first.setdefault(i if isinstance(image, np.ndarray) else image, i))
        # the first pair of each row's image; the row of each pair
        self.first_pair, row = np.unique(first_pair, return_inverse=True)
        self.row = np.full(len(pairs.images), -1)
        self.row[pairs.used] = row
        self.shape = (len(self.first_pair), sum(map(math.prod, self.layout.values())))
        names = b"\n".join(identity(pairs.images[i]) for i in self.first_pair)
        self.prepare(json.dumps({
            **key, "size": size, "transform": TRANSFORM, "images": len(self.first_pair),
            "names_sha256": hashlib.sha256(names).hexdigest(), "layout": self.layout}))

    def prepare(self, key):
        """Compare an existing folder with the key, or begin a new one."""
        description = self.folder / "features.json"
        needed = 2 * math.prod(self.shape)          # bytes of float16
        if not description.exists():
            self.reserve(needed)
            write_text(description, key)
        key = json.loads(key)
        found = json.loads(description.read_text())
        differ = ", ".join(name for name in key if found.get(name) != key[name])
        if differ:
            raise ValueError(f"{self.folder} holds the features of something else ({differ} "
                             "differ); name another folder with --cache-features, or delete this "
                             "one")
        if self.file.stat().st_size != needed:
            raise ValueError(f"{self.file} has {self.file.stat().st_size:,} bytes, expected "
                             f"{needed:,}; delete the folder, and run the same command again")

    def reserve(self, needed):
        """Make the file of the rows, with all of its disk space in bytes."""
        existing = next(folder for folder in (self.folder, *self.folder.resolve().parents)
                        if folder.exists())
        free = shutil.disk_usage(existing).free
        sizes = (f"the features of {self.shape[0]:,} images need {needed / 1e9:.1f} GB in "
                 f"{self.folder}, {free / 1e9:.1f} GB are free")
        if needed > free:
            raise OSError(sizes)
        print(sizes)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("done-*.bin"):
            path.unlink()
        with open(self.file, "wb") as file:
            file.truncate(needed)
            if hasattr(os, "posix_fallocate"):      # not on macOS, where a full disk is found late
                os.posix_fallocate(file.fileno(), 0, needed)

    def compute(self, features, rank=0, world=1, workers=0):
        """Compute the missing rows of this process, which are one after another.

        features: function from pixels uint8 (n, 3, size, size) to a dict of tensors (n, ...).
        A row is on the disk before it is marked, so after a kill the same command goes on.
        """
        mine = np.array_split(np.arange(self.shape[0]), world)[rank]
        mine = mine[self.read_marks()[mine] == MISSING]
        path = self.folder / f"done-{rank}.bin"
        with open(path, "ab") as file:
            file.truncate(self.shape[0])
        marks = np.memmap(path, np.uint8, "r+")
        values = np.memmap(self.file, np.float16, "r+", shape=self.shape)
        batches = [mine[i:i + BATCH] for i in range(0, len(mine), BATCH)]
        loader = DataLoader(WholeImages(self.pairs, self.size, self.first_pair[mine]), BATCH,
                            num_workers=workers, collate_fn=collate_tuples,
                            worker_init_fn=start_data_worker)

        def write(rows, computed, readable):
            values[rows] = computed
            values.flush()
            marks[rows] = np.where(readable, DONE, UNREADABLE)
            marks.flush()
            bar.update(len(rows))

        with (progress(is_shown=rank == 0, total=len(mine), unit=" images",
                       desc=f"features, process {rank + 1} of {world}") as bar,
              ThreadPoolExecutor(1) as writer):
            written = writer.submit(int)            # a batch is written while the next is computed
            for rows, (pixels, readable) in zip(batches, loader):
                computed = features(pixels)
                computed = torch.cat([computed[name].flatten(1).half() for name in self.layout],
                                     dim=1).cpu()
                written.result()                    # raises what went wrong
                written = writer.submit(write, rows, computed.numpy(), readable)
            written.result()

    def read_marks(self):
        """Marks of all rows (images,), from the files of all processes."""
        marks = np.zeros(self.shape[0], np.uint8)
        for path in self.folder.glob("done-*.bin"):
            found = np.fromfile(path, np.uint8)
            marks[:len(found)] = np.maximum(marks[:len(found)], found)
        return marks

    def finished(self):
        """Whether all rows are there, those of other processes included; then they can be read."""
        self.marks = self.read_marks()
        return bool(self.marks.all())

    def row_of(self, i):
        """Row of pair i, which is in use. Raises ValueError for an unreadable image."""
        row = self.row[i]
        if self.marks[row] == UNREADABLE:
            raise ValueError(f"{self.pairs.images[i]} was unreadable when the features were "
                             "computed")
        return int(row)


class CachedFeatures:
    """The rows of a complete `FeatureCache`, for batches on a device: on a GPU where they fill at
    most GPU_PART of its free memory, else read from the disk (in practice from the disk's cache in
    memory), by all cores."""

    def __init__(self, cache, device):
        self.layout = cache.layout
        self.device = torch.device(device)
        self.values = torch.from_numpy(np.memmap(cache.file, np.float16, "r+", shape=cache.shape))
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if self.values.nbytes <= GPU_PART * free:
                self.values = self.values.to(self.device)

    def of(self, rows):
        """Features of some rows (n,): dict of float16 tensors (n, ...) on the device."""
        if self.values.device.type == self.device.type:        # "cuda" may have no number
            found = self.values.index_select(0, rows.to(self.device))
        else:
            found = torch.empty(len(rows), self.values.shape[1], dtype=torch.float16,
                                pin_memory=self.device.type == "cuda")
            torch.index_select(self.values, 0, rows, out=found)
            found = found.to(self.device, non_blocking=True)
        parts = found.split([math.prod(shape) for shape in self.layout.values()], dim=1)
        return {name: part.reshape(len(rows), *shape)
                for (name, shape), part in zip(self.layout.items(), parts)}


def open_cache(folder, pairs, method, size, precision, processes, workers):
    """The complete `FeatureCache` of a run; all processes compute a part of it.

    folder, pairs, size: see `FeatureCache`.
    method: whose `features` are kept.
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
        cache = FeatureCache(folder, pairs, size, {"backbone": key, "precision": str(precision)},
                             layout)
    cache.compute(features, processes.rank, processes.world, workers)
    processes.wait()
    if not cache.finished():
        raise ValueError(f"features are missing in {folder}; it must be a folder that all "
                         "processes share")
    return cache


def identity(image):
    """Bytes that change when the image does: an array's values, or a file's name, size and time."""
    if isinstance(image, np.ndarray):
        return image.tobytes()
    status = image.stat()
    return f"{image} {status.st_size} {status.st_mtime_ns}".encode()


class WholeImages(Dataset):
    """Images of some pairs, uint8 (3, size, size), and whether they are readable."""

    def __init__(self, pairs, size, numbers):
        self.pairs = pairs
        self.size = size
        self.numbers = numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, place):
        try:
            pixels = to_pixels(self.pairs.pair(self.numbers[place]).image())
            size = [self.size, self.size]
            return v2.functional.resize(pixels, size, v2.InterpolationMode.BICUBIC), True
        except (ValueError, OSError):
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), False
