"""Feature cache: what a method's frozen networks make of each image, computed once.

The folder holds features.json, which says what they are the features of, and for every
`IMAGES_PER_FILE` images a safetensors file with one float16 tensor per feature.
"""
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import safetensors
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from machinery.networks.checkpoint import save_tensors, write_text
from machinery.images import to_pixels
from machinery.training.workers import start_data_worker

IMAGES_PER_FILE = 64
TRANSFORM = "whole image, JPEG draft of twice the size, bicubic"


class FeatureCache:
    """Features of images that are seen whole, squeezed to a square: fast, but no random crops.

    images: paths or arrays (H, W, 3), one per pair; several pairs may share an image. open_image:
    function from a pair's number to its RGB image. size: pixels of the square. feature_key: JSON
    values that the features depend on. bytes_per_image: what they need on disk.
    Raises ValueError if the folder holds the features of something else, OSError if the disk is too
    small.
    """

    def __init__(self, images, open_image, size, folder, feature_key, bytes_per_image,
                 images_per_file=IMAGES_PER_FILE):
        self.folder = Path(folder)
        self.images = images
        self.open_image = open_image
        self.size = size
        self.images_per_file = images_per_file
        first = {}                                  # image -> its first pair
        first_pair = [first.setdefault(i if isinstance(image, np.ndarray) else image, i)
                      for i, image in enumerate(images)]
        self.pairs = sorted(set(first_pair))        # the pairs whose images are rows of the tensors
        self.row = np.searchsorted(self.pairs, first_pair)          # pair -> row
        names = hashlib.sha256(b"\n".join(identity(images[i]) for i in self.pairs))
        key = {**feature_key, "size": size, "transform": TRANSFORM, "images": len(self.pairs),
               "names_sha256": names.hexdigest(), "images_per_file": images_per_file}
        self.check_folder(json.loads(json.dumps(key)), bytes_per_image)

    def check_folder(self, key, bytes_per_image):
        file = self.folder / "features.json"
        is_new = not file.exists() and not any(self.folder.glob("features-*"))
        self.check_disk(bytes_per_image)
        if is_new:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(key))
        found = {}
        if file.exists():
            found = json.loads(file.read_text())
            found = found if isinstance(found, dict) else {}
        if found != key:
            differ = [name for name in key if found.get(name) != key[name]]
            raise ValueError(f"{self.folder} holds the features of something else "
                             f"({', '.join(differ)} differ); name another folder with "
                             "--cache-features, or delete this one")

    def check_disk(self, bytes_per_image):
        images = min(len(self.missing()) * self.images_per_file, len(self.pairs))
        disk = next(folder for folder in (self.folder, *self.folder.resolve().parents)
                    if folder.exists())
        need = images * bytes_per_image
        free = shutil.disk_usage(disk).free
        if need > free:
            raise OSError(f"the features need {need / 1e9:.1f} GB in {self.folder}, "
                          f"{free / 1e9:.1f} GB are free")

    def file(self, number):
        return self.folder / f"features-{number:06d}.safetensors"

    def missing(self):
        """Numbers of the files that are still to be computed."""
        count = math.ceil(len(self.pairs) / self.images_per_file)
        return [number for number in range(count) if not self.file(number).exists()]

    def compute(self, features, rank=0, world=1, workers=0):
        """Compute this process's share of the missing files.

        features: function from pixels uint8 (n, 3, size, size) to a dict of tensors (n, ...).
        """
        mine = [number for number in self.missing() if number % world == rank]
        batches = [self.pairs[number * self.images_per_file:(number + 1) * self.images_per_file]
                   for number in mine]
        loader = DataLoader(WholeImages(self.open_image, self.size, batches), batch_size=None,
                            num_workers=workers, worker_init_fn=start_data_worker)
        with tqdm(total=sum(map(len, batches)), desc=f"features, process {rank + 1} of {world}",
                  unit=" images", disable=None if rank == 0 else True) as bar:
            for number, (pixels, readable) in zip(mine, loader):
                computed = {name: value.half() for name, value in features(pixels).items()}
                try:
                    save_tensors(self.file(number), {**computed, "readable": readable})
                except OSError as error:
                    raise OSError(f"{error}; the features computed so far are kept, the same "
                                  "command goes on from there") from None
                bar.update(len(pixels))

    def read(self, i):
        """Features of pair i: dict of float16 tensors. Raises ValueError for an unreadable image.

        The file is opened for each read and closed again: a mapped file keeps a descriptor, and
        COCO has 1,849 files.
        """
        number, row = divmod(int(self.row[i]), self.images_per_file)
        try:
            with safetensors.safe_open(self.file(number), "pt") as file:
                found = {name: file.get_slice(name)[row].clone() for name in file.keys()}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self.file(number)} is broken ({error}); delete it, and run the "
                             "same command again") from None
        if not found.pop("readable"):
            raise ValueError(f"{self.images[i]} was unreadable when the features were computed")
        return found


def open_cache(args, pairs, method, precision, processes):
    """The complete `FeatureCache` of a run; all processes compute their share of it.

    Raises ValueError for a method without frozen features.
    """
    key = method.feature_key()
    if key is None:
        raise ValueError(f"--cache-features: {method.name} has no features that it could keep")

    def features(pixels):
        return method.features({"pixels": pixels.to(processes.device)})

    size = args.image_size
    one = features(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    bytes_per_image = sum(2 * value.numel() for value in one.values())          # float16
    with processes.first_process_first():
        cache = FeatureCache(pairs.images, pairs.open_image, size, args.cache_features,
                             {"backbone": key, "precision": str(precision)}, bytes_per_image)
    cache.compute(features, processes.rank, processes.world, args.workers)
    processes.wait()
    if cache.missing():
        raise ValueError(f"features are missing in {args.cache_features}; it must be a folder that "
                         "all processes share")
    return cache


def identity(image):
    """Bytes that change when the image does: an array's values, or a file's name, size and time."""
    if isinstance(image, np.ndarray):
        return np.ascontiguousarray(image).tobytes()
    status = image.stat()
    return f"{image} {status.st_size} {status.st_mtime_ns}".encode()


class WholeImages(Dataset):
    """Images of some pairs, several at a time: uint8 (n, 3, size, size), and which are readable."""

    def __init__(self, open_image, size, batches):
        self.open_image = open_image
        self.size = size
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        pixels = []
        readable = []
        for i in self.batches[number]:
            try:
                image = self.open_image(i).resize((self.size, self.size), Image.BICUBIC)
                pixels.append(to_pixels(image))
                readable.append(True)
            except (ValueError, OSError):
                pixels.append(torch.zeros(3, self.size, self.size, dtype=torch.uint8))
                readable.append(False)
        return torch.stack(pixels), torch.tensor(readable)
