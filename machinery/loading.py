"""From pairs to the batches of a process: data workers, frozen features, joining."""
import time

import torch
from torch.utils.data import DataLoader

from machinery.shards import BAD
from machinery.workers import start_data_worker

LOADER_BATCH = 256                                  # pairs that a data worker loads at a time


class BatchStream:
    """This process's share of the global batches, with what frozen networks make of them.

    pairs: data set. features: `Method.features`. processes: of this run. batches: (pairs of a
    batch, pairs that are loaded and go through frozen networks at a time). workers: data workers.
    states: of `Shards.begin`, None for single images. bad_images: unreadable ones so far. settings:
    of the DataLoader.
    """

    def __init__(self, pairs, features, processes, batches, workers, states=None, bad_images=0,
                 **settings):
        self.features = features
        self.device = processes.device
        self.local_batch, self.loader_batch = batches
        self.states = states
        self.bad_images = bad_images
        self.waited = 0.0                           # seconds that the last batch was waited for
        self.loader = iter(DataLoader(pairs, num_workers=workers, **settings,
                                      pin_memory=processes.device_type == "cuda",
                                      worker_init_fn=start_data_worker))

    def counts(self):
        """Pairs left out so far by this process, by reason: (len(BAD),) int64."""
        if self.states is not None:
            return self.states[:, -len(BAD):].sum(dim=0)
        counts = torch.zeros(len(BAD), dtype=torch.int64)
        counts[BAD.index("bad image")] = self.bad_images
        return counts

    def __next__(self):
        """The next batch, tensors on the device; "key" stays on the CPU."""
        self.waited = 0.0
        return join((self.load() for _ in range(self.local_batch // self.loader_batch)),
                    self.local_batch)

    def load(self):
        start = time.time()
        batch = next(self.loader)
        self.waited += time.time() - start
        bad = batch.pop("bad")
        state = batch.pop("state", None)
        if state is None:
            self.bad_images += bad
        else:
            self.states[state[0]] = state
        key = batch.pop("key")
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        return {**self.features(batch), "key": key}


def loader_batch(local_batch, micro_batch=None):
    """The largest divisor of local_batch that is at most micro_batch and LOADER_BATCH."""
    most = min(micro_batch or local_batch, local_batch, LOADER_BATCH)
    return max(size for size in range(1, most + 1) if local_batch % size == 0)


def join(batches, rows):
    """Batches of rows pairs in all -> one batch.

    Each tensor is copied into place as it comes, so that the largest, the patch tokens, is never
    held twice. Second lengths that differ are padded with -1.
    """
    joined = {}
    first = 0
    for batch in batches:
        count = len(next(iter(batch.values())))
        if count == rows:
            return batch
        for name, value in batch.items():
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
