"""Tar shards in img2dataset's layout: finding, annotating and streaming them.

The files of a sample share their stem and follow one another in the tar: 000000012.jpg,
000000012.txt, 000000012.json. Beside each tar `concepts.py --shards` writes NAME.concepts.npz.
"""
import contextlib
import io
import json
import os
import re
import tarfile
import time
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from machinery.training.captions import Annotations, as_arrays, check_annotations, save_arrays
from machinery.images import IMAGE_SUFFIXES
from machinery.contract import Pair

MAX_CAPTION = 2000                                  # characters; a longer text is no caption
MAX_IMAGE = 100 * 2 ** 20                           # bytes; a header may claim any size
BAD = ("cut tar", "no concepts", "no image", "bad image", "no caption", "empty caption",
       "long caption", "caption not UTF-8")         # why samples are skipped; the order of counts


def bad_line(counts):
    """Counts by reason (len(BAD),) in words."""
    found = [f"{reason} {count:,}" for reason, count in zip(BAD, counts) if count]
    return ", ".join(found) or "none"


# --------------------------------------------------------------------------------------------------
# Tars and their samples

def find_shards(source):
    """Paths of the tars in a folder, or of a name with ranges: "shards/{00000..41407}.tar".

    Missing ones are reported. Raises FileNotFoundError when there is none.
    """
    if Path(source).is_dir():
        paths = sorted(Path(source).glob("*.tar"))
    else:
        paths = [Path(name) for name in dict.fromkeys(expand_ranges(str(source)))]
    there = [path for path in paths if path.is_file()]
    if not there:
        raise FileNotFoundError(f"no tar files in {source}; expected those that img2dataset "
                                'writes, as a folder or as a range: "shards/{00000..00295}.tar"')
    if len(there) < len(paths):
        gap = next(path for path in paths if not path.is_file())
        print(f"{len(paths) - len(there):,} of the {len(paths):,} shards of {source} are missing, "
              f"the first is {gap}")
    return there


def expand_ranges(name):
    """"{08..10}.tar" -> ["08.tar", "09.tar", "10.tar"]; several ranges are combined."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if not found:
        return [name]
    first, last = found.groups()
    width = max(len(first), len(last)) if first.startswith("0") and len(first) > 1 else 1
    before = name[:found.start()]
    after = name[found.end():]
    return [whole for i in range(int(first), int(last) + 1)
            for whole in expand_ranges(f"{before}{i:0{width}}{after}")]


class BoundedFile(io.BufferedReader):
    """A file that reads no more at once than it has, and never more than MAX_IMAGE bytes.

    tarfile reads long names and pax headers of any size that a tar claims.
    """

    def __init__(self, path):
        super().__init__(io.FileIO(path))
        self.size = os.path.getsize(path)

    def read(self, size=-1):
        left = max(0, self.size - self.tell())
        return super().read(min(left, MAX_IMAGE) if size < 0 else min(size, left, MAX_IMAGE))


@contextlib.contextmanager
def open_tar(path):
    """An uncompressed tar. Raises tarfile.TarError or OSError."""
    with BoundedFile(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        yield tar


def read_samples(tar):
    """Samples of an open tar, in order: (stem, {suffix: TarInfo}). No file's content is read.

    Raises tarfile.ReadError where the tar is cut short; a sample that may have lost files to the
    cut is not given.
    """
    stem = None
    members = {}
    while member := next_member(tar):
        tar.members = []                            # tarfile would keep them all
        if member.isfile():
            name, suffix = os.path.splitext(member.name)
            if name != stem and members:
                yield stem, members
                members = {}
            stem = name
            members[suffix.lower()] = member
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):     # marks a tar's end
        raise tarfile.ReadError("the end of the tar is missing")
    if members:
        yield stem, members


def next_member(tar):
    """The tar's next header, None at its end. Raises tarfile.ReadError for whatever is wrong: a
    header may claim a name of gigabytes, or numbers that are none."""
    try:
        return tar.next()
    except (MemoryError, OverflowError, ValueError, EOFError, RecursionError) as error:
        raise tarfile.ReadError(f"a broken header ({error!r})") from None


def read_member(tar, member, most):
    """Bytes of a member of a tar. Raises ValueError for more than `most`, whatever its header
    claims, and for a sparse one, whose size on disk says nothing."""
    if member.size > most or member.issparse():
        raise ValueError(f"{member.name} has {member.size:,} bytes, at most {most:,} are read")
    return tar.extractfile(member).read()


def read_caption(tar, members):
    """Caption of a sample, from its .txt or else its .json: (caption, None), or (None, reason)."""
    most = 4 * MAX_CAPTION                          # bytes; a character has at most 4
    try:
        if ".txt" in members:
            if members[".txt"].size > most:
                return None, "long caption"
            caption = read_member(tar, members[".txt"], most).decode("utf-8-sig")
        else:
            content = json.loads(read_member(tar, members[".json"], MAX_IMAGE))
            caption = content["caption"] or ""
            caption.encode()                        # JSON can hold half characters
    except UnicodeError:
        return None, "caption not UTF-8"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, "no caption"                   # no file, or another content
    if caption.strip() in ("", "None"):             # Python's None, as text
        return None, "empty caption"
    return (caption, None) if len(caption) <= MAX_CAPTION else (None, "long caption")


# --------------------------------------------------------------------------------------------------
# Concepts beside a tar

def sidecar_key(path, annotator):
    status = path.stat()
    return f"{annotator} {status.st_size} {status.st_mtime_ns}"


def read_sidecar(path, annotator, bank_size):
    """(offsets, rows, bad) of the concepts file beside a tar; None if it is missing or broken.

    annotator: hash of bank and parser. Raises ValueError if the file is of another bank, parser or
    tar.
    """
    sidecar = path.with_suffix(".concepts.npz")
    try:
        with np.load(sidecar, allow_pickle=False) as file:
            key = str(file["key"])
            offsets = file["offsets"]
            rows = file["rows"]
            bad = file["bad"]
        if key == sidecar_key(path, annotator):
            check_annotations(offsets, rows, bank_size)
            if bad.shape != (len(BAD),) or bad.dtype.kind not in "iu":
                raise ValueError(f"counts of shape {bad.shape}")
    except Exception:                               # a broken file raises almost anything
        return None
    if key != sidecar_key(path, annotator):
        raise ValueError(f"{sidecar} is of another concept bank or parser, or its tar has changed "
                         "since")
    return offsets, rows, bad


def annotate_shard(path, annotator, bank_size, annotate):
    """Write the concepts file of a tar, unless a valid one is there.

    annotate: function from captions to the rows of each. Returns (captions annotated now, captions
    in all, those with a concept, Counter of concept ids, bad (len(BAD),)).
    """
    now = 0
    try:
        made = read_sidecar(path, annotator, bank_size)
    except ValueError:
        made = None
    if made is None:
        key = sidecar_key(path, annotator)
        captions = []
        bad = np.zeros(len(BAD), np.int64)
        try:
            with open_tar(path) as tar:
                for _, members in read_samples(tar):
                    caption, reason = read_caption(tar, members)
                    captions.append(caption)
                    if reason:
                        bad[BAD.index(reason)] += 1
        except tarfile.TarError:
            captions.append(None)                   # stands for what was cut
            bad[BAD.index("cut tar")] += 1
        found = iter(annotate([caption for caption in captions if caption]))
        made = (*as_arrays([next(found) if caption else [] for caption in captions]), bad)
        save_arrays(path.with_suffix(".concepts.npz"), key=key,
                    **dict(zip(("offsets", "rows", "bad"), made)))
        now = len(captions) - bad.sum()
    offsets, rows, bad = made
    counts = Counter(rows[:, 0].tolist())
    return now, len(offsets) - 1 - bad.sum(), (np.diff(offsets) > 0).sum(), counts, bad


def annotate_shards(paths, results):
    """Show progress while shards are annotated. results: of `annotate_shard`, one per path.

    Returns (captions, those with a concept, Counter of concept ids). Raises ValueError if there is
    no caption at all.
    """
    new = 0
    captions = 0
    annotated = 0
    counts = Counter()
    bad = np.zeros(len(BAD), np.int64)
    start = time.time()
    with tqdm(total=len(paths), desc="concepts", unit=" shards", disable=None) as bar:
        for new_here, captions_here, annotated_here, counts_here, bad_here in results:
            new += new_here
            captions += captions_here
            annotated += annotated_here
            counts.update(counts_here)
            bad += bad_here
            bar.set_postfix_str(f"{new / (time.time() - start):,.0f} captions/s", refresh=False)
            bar.update()
    seconds = time.time() - start
    if new:
        print(f"annotated {new:,} captions in {seconds:.1f} s ({new / seconds:,.0f} captions/s)")
    print(f"{len(paths):,} shards; skipped samples: {bad_line(bad)}")
    if not captions:
        raise ValueError(f"no captions in {paths[0]} and the other shards; expected a .txt or "
                         ".json beside every image")
    return captions, annotated, counts


# --------------------------------------------------------------------------------------------------
# Shards to train on

# A reader's state: its number, batches so far, epoch, position in the epoch's order, next sample of
# the shard; then the key of the run (3 numbers), then its counts by reason.
WORKER, BATCHES, EPOCH, POSITION, SAMPLE = range(5)


class Shards(IterableDataset):
    """Endless stream of batches from tars; for a DataLoader with batch_size=None.

    Every epoch shuffles the shards anew. They are dealt out in turn to all readers (the data
    workers of all processes); if there are fewer shards than readers, several share one, sample by
    sample. So each sample is read once an epoch, and no reader waits for another.

    paths: of `find_shards`. sample: function (pair, rng=...) -> dict. collate: items -> batch.
    open_image: open file -> RGB image. needs_captions: if not, none is read. read_concepts: path ->
    (offsets, rows), None where they are missing; None = pairs need no concepts. annotate: caption
    -> rows, for a shard without concepts; None = such a shard is skipped. forget: called after each
    shard. All are sent to data workers.
    """

    def __init__(self, paths, sample, collate, open_image, needs_captions=True,
                 read_concepts=None, annotate=None, forget=None, seed=0):
        self.paths = paths
        self.sample = sample
        self.collate = collate
        self.open_image = open_image
        self.needs_captions = needs_captions
        self.read_concepts = read_concepts
        self.annotate = annotate
        self.forget = forget
        self.seed = seed

    def begin(self, local_batch, rank=0, world=1, workers=0, states=None):
        """Say which part of the stream this process reads, and from where on.

        local_batch: pairs of a batch. workers: of the DataLoader. states: (workers, K), or of all
        processes (world, workers, K) int64: the newest "state" of each worker when the run was
        interrupted. Returns the states to begin with, a row per worker. Raises ValueError if they
        are of other shards, another seed, world or workers.
        """
        workers = max(1, workers)
        self.local_batch = local_batch
        self.rank = rank
        self.world = world
        self.workers = workers
        content = json.dumps([self.seed, [path.name for path in self.paths]])
        run = [world, workers, zlib.crc32(content.encode())]
        if states is None:
            states = torch.tensor([[worker, 0, 0, rank * workers + worker, 0, *run,
                                    *[0] * len(BAD)] for worker in range(workers)])
        saved = states.reshape(-1, states.shape[-1])[0, 5:8].tolist()
        if saved[:2] != run[:2]:
            raise ValueError(f"the run was interrupted with {saved[0]} processes of {saved[1]} "
                             f"data workers, now there are {world} of {workers}; shards go on only "
                             "with the same numbers")
        if saved != run:
            raise ValueError("the shards or the seed are not those of the interrupted run")
        self.states = (states[rank] if states.ndim == 3 else states).clone()
        return self.states.clone()

    def __iter__(self):
        """Batches of `collate`, with state (K,) int64, for `begin`."""
        # The DataLoader asks its workers in turn, always from the first on.
        turn = int(self.states[:, BATCHES].sum())
        info = get_worker_info()
        worker = (turn + (info.id if info else 0)) % self.workers
        state = self.states[worker].clone()
        items = []
        for item in self.read(state):
            items.append(item)
            if len(items) == self.local_batch:
                state[BATCHES] += 1
                yield {**self.collate(items), "state": state.clone()}
                items = []

    def read(self, state):
        """Endless stream of one reader's items. state: where to go on; it is kept up to date."""
        readers = self.world * self.workers
        parts = -(-readers // len(self.paths))      # readers of one shard; 1 if there are enough
        bad = state[-len(BAD):]
        before = int(bad.sum())
        fruitless = 0                               # samples and shards since the last good pair
        while True:
            epoch = state[EPOCH].item()
            position = state[POSITION].item()
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.paths) * parts)
            shard, part = divmod(int(order[position]), parts)
            for reason, item in self.read_part(shard, part, parts, state):
                if reason:
                    bad[BAD.index(reason)] += 1
                    fruitless += 1
                else:
                    yield {**item, "bad": int(bad.sum()) - before}
                    before = int(bad.sum())
                    fruitless = 0
            fruitless += 1                          # a part may be empty; a thousand are not
            if fruitless > 1000:
                raise ValueError(f"no usable pair for long, now in {self.paths[shard]}; skipped so "
                                 f"far: {bad_line(bad)}")
            epoch, position = divmod(epoch * len(order) + position + readers, len(order))
            state[[EPOCH, POSITION, SAMPLE]] = torch.tensor([epoch, position, 0])
            if self.forget:
                self.forget()

    def read_part(self, shard, part, parts, state):
        """Every parts-th sample of a shard, from state on: (None, item), or (reason, None)."""
        found = self.read_concepts and self.read_concepts(self.paths[shard])
        if self.read_concepts and found is None and self.annotate is None:
            yield "no concepts", None
            return
        annotations = found and Annotations(*found)
        try:
            with open_tar(self.paths[shard]) as tar:
                for number, (_, members) in enumerate(read_samples(tar)):
                    if number >= state[SAMPLE] and number % parts == part:
                        state[SAMPLE] = number + 1
                        key = (state[EPOCH].item(), shard, number)
                        yield self.read_sample(tar, members, key, annotations)
        except (tarfile.TarError, OSError):
            if part == 0:                           # counted once, however many read it
                yield "cut tar", None

    def open_sample(self, tar, members):
        """(None, caption, image) or (reason, None, None)."""
        caption, reason = read_caption(tar, members) if self.needs_captions else ("", None)
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), None)
        if reason or not suffix:
            return reason or "no image", None, None
        try:
            content = io.BytesIO(read_member(tar, members[suffix], MAX_IMAGE))
            return None, caption, self.open_image(content)
        except ValueError:
            return "bad image", None, None

    def read_sample(self, tar, members, key, annotations):
        """(None, item) or (reason, None). key: (epoch, shard, sample). annotations: of the shard,
        or None."""
        reason, caption, image = self.open_sample(tar, members)
        if reason:
            return reason, None
        pair = Pair(image=lambda: image, caption=caption)
        if annotations:
            pair.concepts = annotations.of(key[2])
            pair.partner = lambda rng: self.partner(key, annotations, rng)
        elif self.read_concepts:
            pair.concepts = torch.tensor(self.annotate(caption)).long().reshape(-1, 3)
        item = self.sample(pair, rng=np.random.default_rng((self.seed, *key)))
        return None, {**item, "key": torch.tensor(key)}

    def partner(self, key, annotations, rng):
        """(another pair of the same tar that shares a concept, the concept's id), or None.

        The tar's headers are read once more; only the partner's files are read whole. None also
        where the sample that was drawn is bad.
        """
        drawn = annotations.partner(key[2], rng)
        if drawn is None:
            return None
        with open_tar(self.paths[key[1]]) as tar:
            _, members = next(islice(read_samples(tar), drawn[0], None))
            reason, caption, image = self.open_sample(tar, members)
        if reason:
            return None
        return Pair(image=lambda: image, caption=caption), drawn[1]

    def name(self, key):
        """Where the sample of a key (3,) comes from, for messages."""
        return f"{self.paths[key[1]]}, sample {int(key[2])}"
