"""From pairs to the batches of a process: data workers, loader batches, joining.

A process's local batch is loaded in several loader batches, which one data worker each prepares.
"""
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from machinery.training.features import CachedFeatures
from machinery.training.shards import BAD

FREE_PART = 0.8                                     # of free memory, for a batch and its encoding
LOADER_BATCH = 256                                  # pairs that a data worker loads at a time


class Texts(Sequence):
    """Many texts in two arrays.

    Reading a list of str writes the count of its references beside each, and so copies the list,
    page by page, into every data worker; arrays stay shared.
    """

    def __init__(self, texts):
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]     # names: any bytes
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        encoded = self.bytes[self.ends[i]:self.ends[i + 1]].tobytes()
        return encoded.decode("utf-8", "surrogatepass")


class Paths(Texts):
    """Many paths, likewise."""

    def __init__(self, paths):
        super().__init__(map(str, paths))

    def __getitem__(self, i):
        return Path(super().__getitem__(i))


class BatchStream:
    """This process's local batches.

    pairs: data set of data.py.
    loader: DataLoader of the pairs.
    local_batch: pairs of a step in this process.
    device: where the batches go.
    """

    def __init__(self, pairs, loader, local_batch, device):
        self.pairs = pairs
        self.loader = iter(loader)
        self.cached = pairs.cache and CachedFeatures(pairs.cache, device)
        self.local_batch = local_batch
        self.device = device
        self.positions = pairs.positions            # of the readers of tars, else None
        self.left_out = torch.zeros(len(BAD), dtype=torch.int64)    # pairs so far, by reason
        self.waited = 0.0                           # seconds that the last batch was waited for
        self.waiting_since = None                   # while a loader batch is waited for: a time
        self.keys = []                              # of the last batch's pairs

    def loader_batches(self):
        """The loader batches of the next local batch: dicts of tensors on the device."""
        self.waited = 0.0
        self.keys = []
        while len(self.keys) < self.local_batch:
            self.waiting_since = time.time()
            loaded = next(self.loader)
            self.waited += time.time() - self.waiting_since
            self.waiting_since = None
            self.left_out += loaded.pop("bad")
            if "position" in loaded:
                reader, position = loaded.pop("position")
                self.positions[reader] = position
            self.keys.extend(loaded.pop("key"))
            features = self.cached.of(loaded.pop("row")) if self.cached else {}
            yield features | {name: value.to(self.device, non_blocking=True)
                              for name, value in loaded.items()}


def loader_batch_size(local_batch, micro_batch=None):
    """The largest divisor of local_batch that is at most micro_batch and LOADER_BATCH."""
    most = min(micro_batch or local_batch, local_batch, LOADER_BATCH)
    return max(size for size in range(1, most + 1) if local_batch % size == 0)


def fitting_micro_batch(local_batch, row_bytes, precision, free):
    """The local batch, halved until it fits in a GPU's memory, free bytes before the first step.

    row_bytes: `Method.ROW_BYTES`. precision: dtype of the networks' arithmetic.
    """
    loaded, encoded = row_bytes
    left = FREE_PART * free - local_batch * loaded
    size = local_batch
    while size > 1 and size * encoded * precision.itemsize / 2 > left:
        size //= 2
    return size


def join(loaded, rows):
    """Loader batches -> one batch of so many rows. Where their second dimensions differ, they are
    padded with -1.

    Each tensor is copied into place as it comes: the patch tokens are never held twice.
    """
    joined = {}
    first = 0
    for one in loaded:
        count = len(next(iter(one.values())))
        if count == rows:
            return one
        for name, value in one.items():
            if name not in joined:
                joined[name] = value.new_empty(rows, *value.shape[1:])
            if value.ndim > 1 and value.shape[1] != joined[name].shape[1]:
                most = max(value.shape[1], joined[name].shape[1])
                joined[name] = pad_second(joined[name], most)
                value = pad_second(value, most)
            joined[name][first:first + count] = value
        first += count
    return joined


def pad_second(value, length):
    """(rows, n, ...) -> (rows, length, ...), filled up with -1."""
    missing = value.new_full((len(value), length - value.shape[1], *value.shape[2:]), -1)
    return torch.cat([value, missing], dim=1)


class Rows(Mapping):
    """Some rows of a batch. A tensor is copied when it is asked for: mostly the largest are not."""

    def __init__(self, batch, rows):
        self.batch = batch
        self.rows = rows

    def __getitem__(self, name):
        return self.batch[name][self.rows]

    def __iter__(self):
        return iter(self.batch)

    def __len__(self):
        return len(self.batch)


def encode_in_micro_batches(encode, order, batch, size):
    """`Method.encode` of a batch, size rows at a time, with the exact gradient and little memory.

    Gradient caching (arXiv 2101.06983): each micro-batch is encoded without keeping activations,
    and encoded again when the gradient of the loss of the whole batch reaches it. order: function
    of the batch, `Method.order`; the rows are taken by it and put back.
    """
    def encode_rows(rows):
        return encode(Rows(batch, rows))

    order = order(batch)                                                            # (B,)
    # By the device of its argument the checkpoint knows which random numbers to repeat
    encoded = [checkpoint(encode_rows, rows, use_reentrant=False) for rows in order.split(size)]
    back = order.argsort()
    return {name: torch.cat([one[name] for one in encoded])[back] for name in encoded[0]}
