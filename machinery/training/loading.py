"""From pairs to the batches of a process: data workers, parts of a batch, joining."""
import time

import torch
from torch.utils.data import DataLoader

from machinery.training.shards import BAD
from machinery.training.workers import start_data_worker

LOADER_BATCH = 256                                  # pairs that a data worker loads at a time


class BatchStream:
    """This process's share of the global batches, part by part.

    pairs: data set. processes: of this run. local_batch: pairs of the share. loader_batch: pairs
    that are loaded at a time, a part. workers: data workers. states: of `Shards.begin`, None for
    single images. bad_images: unreadable ones so far. settings: of the DataLoader.
    """

    def __init__(self, pairs, processes, local_batch, loader_batch, workers, states=None,
                 bad_images=0, **settings):
        self.device = processes.device
        self.local_batch = local_batch
        self.loader_batch = loader_batch
        self.states = states
        self.bad_images = bad_images
        self.waited = 0.0                           # seconds that the last share was waited for
        self.keys = []                              # of the last share's pairs
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

    def parts(self):
        """The parts of the next share: dicts of tensors on the device."""
        self.waited = 0.0
        self.keys = []
        for _ in range(self.local_batch // self.loader_batch):
            start = time.time()
            part = next(self.loader)
            self.waited += time.time() - start
            bad = part.pop("bad")
            state = part.pop("state", None)
            if state is None:
                self.bad_images += bad
            else:
                self.states[state[0]] = state
            self.keys.extend(part.pop("key"))
            yield {name: value.to(self.device, non_blocking=True)
                   for name, value in part.items()}


def loader_batch_size(local_batch, micro_batch=None):
    """The largest divisor of local_batch that is at most micro_batch and LOADER_BATCH."""
    most = min(micro_batch or local_batch, local_batch, LOADER_BATCH)
    return max(size for size in range(1, most + 1) if local_batch % size == 0)


def join(parts, rows):
    """Parts of a batch -> the batch. rows: pairs of all parts.

    Each tensor is copied into place as it comes, so that the largest, the patch tokens, is never
    held twice. Second lengths that differ are padded with -1.
    """
    joined = {}
    first = 0
    for part in parts:
        count = len(next(iter(part.values())))
        if count == rows:
            return part
        for name, value in part.items():
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
