"""Tar shards: what `data.Shards` and `concepts.py --shards` promise, claim by claim."""
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import pytest
import spacy
import torch
from PIL import Image
from torch.utils.data import DataLoader

import concepts
from concepts import (ConceptBank, annotate, annotate_shard, annotation_key, forget_words, load_parser, main, tokenize)
from conftest import ROOT
from data import Shards, load_pairs, random_resized_crop
from machinery.images import load_image, to_pixels
from machinery.parallel import ignore_signals
from machinery.shards import BAD, bad_line, find_shards, read_samples, read_sidecar

BANK = ConceptBank(["dog", "cat", "grass"])
MATCH = load_parser("match", BANK)
ANNOTATOR = annotation_key(None, BANK, MATCH)


def picture(number, form="JPEG", mode="RGB", side=24):
    """Bytes of an image like no other."""
    pixels, file = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


def caption(number):
    """A caption like no other, with one, two or three concepts."""
    return f"{number}: a dog{' and a cat' * (number % 2)}{' on grass' * (number % 3 == 0)}"


KNOWN = {tuple(tokenize(caption(i)).tolist()): i for i in range(300)}


def write_tar(path, files):
    """A tar of (name, content) in that order."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(number):
    """The files of a good sample."""
    return [(f"{number:09}.jpg", picture(number)), (f"{number:09}.txt", caption(number).encode())]


def write_shards(folder, counts, make=sample):
    """Shards 00000.tar ... with so many samples each, numbered through."""
    first = np.cumsum([0, *counts])
    for i, count in enumerate(counts):
        write_tar(folder / f"{i:05}.tar", [file for number in range(count) for file in make(int(first[i]) + number)])
    return folder


def numbers(tokens):
    """The numbers that captions of tokens (B, 77) begin with."""
    return [KNOWN[tuple(row)] for row in tokens.tolist()]


def stream(source, share=4, rank=0, world=1, workers=0, states=None, parser="match", seed=0):
    """(batches, states at their beginning) of one process, through a DataLoader."""
    shards = load_pairs(source, BANK, parser, 16, seed=seed)
    states = shards.begin(share, rank, world, workers, states)
    return iter(DataLoader(shards, batch_size=None, num_workers=workers, worker_init_fn=ignore_signals)), states


def items(source, epochs=1, parser="match", **options):
    """All items of one reader in its first epochs, and its state after them."""
    shards = Shards(source, BANK, parser, 16)
    [state] = shards.begin(1, **options)
    return list(takewhile(lambda item: item["key"][0] < epochs, shards.read(state))), state


def same(batch, other):
    """Whether two batches agree in everything."""
    return batch.keys() == other.keys() and all(torch.equal(value, other[key]) if torch.is_tensor(value)
                                                else value == other[key] for key, value in batch.items())


# ---------------------------------------------------------------------------------------------------------------------
# Which shards there are

@pytest.mark.parametrize("pattern, names", [
    ("{00000..00002}.tar", ["00000.tar", "00001.tar", "00002.tar"]), ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
    ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]), ("{0..1}{0..1}.tar", ["00.tar", "01.tar", "10.tar", "11.tar"]),
    ("part{1..2}/{07..08}-x.tar", ["part1/07-x.tar", "part1/08-x.tar", "part2/07-x.tar", "part2/08-x.tar"]),
    ("one.tar", ["one.tar"])])
def test_ranges(tmp_path, pattern, names, capsys):
    """A range counts up, with leading zeros if it is written with them; several ranges are combined."""
    for name in names:
        write_tar((tmp_path / name), [])
    assert find_shards(tmp_path / pattern) == [tmp_path / name for name in names] and capsys.readouterr().out == ""


def test_gaps(tmp_path, capsys):
    """Shards that are not there are counted and reported, and the others used."""
    for i in (1, 4):
        write_tar(tmp_path / f"{i:02}.tar", [])
    pattern = tmp_path / "{00..04}.tar"
    assert find_shards(pattern) == [tmp_path / "01.tar", tmp_path / "04.tar"]
    gap = tmp_path / "00.tar"
    assert capsys.readouterr().out == f"3 of the 5 shards of {pattern} are missing, the first is {gap}\n"


def test_folder_of_tars(tmp_path):
    """Of a folder all tars are taken, whatever they are called and whatever else img2dataset wrote beside them."""
    for name in ("a b.tar", "00007.tar", "x.y.tar", "00007_stats.json", "00007.parquet"):
        write_tar(tmp_path / name, [])
    assert [path.name for path in find_shards(tmp_path)] == ["00007.tar", "a b.tar", "x.y.tar"]


@pytest.mark.parametrize("source", ["", "{0..3}.tar", "{3..0}.tar", "a.tar"])
def test_no_shards(tmp_path, source):
    """Without a single tar the error says what was looked for and what is expected."""
    source = tmp_path / source
    with pytest.raises(FileNotFoundError, match=re.escape(f"no tar files in {source}; ") + "expected .* a range: "):
        load_pairs(source, BANK, "match", 16)


# ---------------------------------------------------------------------------------------------------------------------
# Who reads what

@pytest.mark.parametrize("world, workers, counts", [
    (1, 0, [5, 3, 4]), (1, 2, [6]), (2, 2, [9]), (3, 2, [8, 9]), (2, 3, [2, 3, 1, 4, 2, 3, 1, 2, 5, 1, 1, 1, 2]),
    (2, 2, [3, 1, 7, 2, 2]), (4, 1, [1, 2, 30]), (1, 3, [2, 0, 5])])
def test_every_sample_once_an_epoch(tmp_path, world, workers, counts):
    """All readers together read every sample exactly once in every epoch, and no reader is without data; also where
    there are fewer shards than readers, parts of a shard that hold nothing, and empty shards."""
    shards, seen = Shards(write_shards(tmp_path, counts), BANK, "match", 16), Counter()
    for rank in range(world):
        for state in shards.begin(1, rank, world, workers):
            read = list(takewhile(lambda item: item["key"][0] < 4, shards.read(state)))
            assert read
            seen.update((int(item["key"][0]), number) for item in read for number in numbers(item["tokens"][None]))
    assert seen == {(epoch, number): 1 for epoch in range(4) for number in range(sum(counts))}


def test_readers_are_even(tmp_path):
    """Where shards cannot be divided evenly no reader reads more of them than another: the next epoch fills the gap."""
    shards = Shards(write_shards(tmp_path, [1] * 5), BANK, "match", 16)
    readers = [islice(shards.read(state), 5) for state in shards.begin(1, workers=4)]
    read = Counter((int(item["key"][0]), int(item["key"][1])) for reader in readers for item in reader)
    assert read == {(epoch, shard): 1 for epoch in range(4) for shard in range(5)}      # 4 readers x 5 = 4 epochs x 5


def test_order(tmp_path):
    """The order of the shards is another in the next epoch and with another seed, the same with the same seed."""
    write_shards(tmp_path, [1] * 12)
    def order(seed):
        batches, _ = stream(tmp_path, share=12, seed=seed)
        return [tuple(numbers(next(batches)["tokens"])) for _ in range(3)]
    first = order(0)
    assert len({*first, *order(1)}) == 6 and order(0) == first


def test_items(tmp_path):
    """An item has the crop of its image, seeded by its place, its tokens and the concepts of its caption."""
    write_shards(tmp_path, [3, 3])
    shards = Shards(tmp_path, BANK, "match", 16, seed=5)
    [state] = shards.begin(1)
    for item in islice(shards.read(state), 12):                             # two epochs
        [number], (epoch, shard, place) = numbers(item["tokens"][None]), item["key"].tolist()
        assert number == 3 * shard + place
        assert shards.name(item["key"]) == f"{tmp_path}/{shard:05}.tar, sample {place}"
        image, rng = load_image(io.BytesIO(picture(number))), np.random.default_rng((5, epoch, shard, place))
        assert torch.equal(item["pixels"], to_pixels(random_resized_crop(image, 16, rng)))
        assert item["rows"].tolist() == [list(row) for row in next(annotate([caption(number)], BANK, MATCH))]
        assert item["rows"].dtype == torch.int64 and item["bad"] == 0
    assert epoch == 1


def test_batch(tmp_path):
    """A batch is collated as other data is: concepts padded with -1, spans apart from ids, skipped samples summed."""
    write_shards(tmp_path, [5], lambda number: sample(number) if number != 2 else sample(2)[:1])
    batch = next(stream(tmp_path)[0])
    assert numbers(batch["tokens"]) == [0, 1, 3, 4] and batch["bad"] == 1
    found = list(annotate([caption(i) for i in (0, 1, 3, 4)], BANK, MATCH))
    most = max(map(len, found))
    found = [rows + [(-1, -1, -1)] * (most - len(rows)) for rows in found]
    assert batch["ids"].tolist() == [[id for id, _, _ in rows] for rows in found]
    assert batch["spans"].tolist() == [[[first, end] for _, first, end in rows] for rows in found]


# ---------------------------------------------------------------------------------------------------------------------
# Samples that cannot be used

JPEG, WEBP = picture(1), picture(1, "WEBP")


def with_files(*files):
    return [("bad" + suffix, content) for suffix, content in files]


@pytest.mark.parametrize("reason, files", [
    ("bad image", with_files((".jpg", JPEG[:-300]), (".txt", b"a dog"))),                   # cut short
    ("bad image", with_files((".jpg", b"no photo"), (".txt", b"a dog"))),
    ("bad image", with_files((".jpg", b""), (".txt", b"a dog"))),
    ("no image", with_files((".txt", b"a dog"))),
    ("no image", with_files((".gz", JPEG), (".txt", b"a dog"))),
    ("no caption", with_files((".jpg", JPEG))),
    ("no caption", with_files((".jpg", JPEG), (".json", b'{"caption"'))),
    ("no caption", with_files((".jpg", JPEG), (".json", b'{"url": "x"}'))),
    ("no caption", with_files((".jpg", JPEG), (".json", b'["a dog"]'))),
    ("no caption", with_files((".jpg", JPEG), (".json", b'{"caption": 1}'))),
    ("no caption", with_files((".jpg", JPEG), (".json", b"[" * 100_000))),
    ("empty caption", with_files((".jpg", JPEG), (".txt", b""))),
    ("empty caption", with_files((".jpg", JPEG), (".txt", b" \n\t"))),
    ("empty caption", with_files((".jpg", JPEG), (".txt", b"None"))),
    ("empty caption", with_files((".jpg", JPEG), (".json", b'{"caption": null}'))),
    ("long caption", with_files((".jpg", JPEG), (".txt", b"a dog " * 1667))),               # 10,002 characters
    ("long caption", with_files((".jpg", JPEG), (".txt", b"d" * 2001))),
    ("long caption", with_files((".jpg", JPEG), (".json", b'{"caption": "%s"}' % (b"d" * 2001)))),
    ("caption not UTF-8", with_files((".jpg", JPEG), (".txt", "café".encode("latin-1")))),
    ("caption not UTF-8", with_files((".jpg", JPEG), (".json", '{"caption": "café"}'.encode("latin-1")))),
    ("caption not UTF-8", with_files((".jpg", JPEG), (".json", b'{"caption": "\\ud83d"}'))),        # half an emoji
])
@pytest.mark.parametrize("annotated", [False, True])
def test_bad_samples(tmp_path, reason, files, annotated):
    """What is wrong with a sample is found, counted under its reason, and the samples around it are used, with the
    concepts of their own captions, whether from a concepts file or not."""
    path = write_tar(tmp_path / "a.tar", sample(1) + files + sample(2))
    if annotated:
        *_, bad = annotate_shard(path, BANK, MATCH)
        assert bad.tolist() == [name == reason and "image" not in reason for name in BAD]
    read, state = items(tmp_path)
    assert [numbers(item["tokens"][None]) for item in read] == [[1], [2]]
    assert [item["bad"] for item in read] == [0, 1]
    assert [item["rows"].tolist() for item in read] == [[list(row) for row in found] for found in annotate(
        [caption(1), caption(2)], BANK, MATCH)]
    assert state[-len(BAD):].tolist() == [name == reason for name in BAD]


@pytest.mark.parametrize("files", [
    with_files((".jpg", picture(1, mode="CMYK")), (".txt", b"a dog")), with_files((".JPG", JPEG), (".TXT", b"a dog")),
    with_files((".jpg", picture(1, mode="L")), (".txt", b"a dog")), with_files((".txt", b"a dog"), (".jpg", JPEG)),
    with_files((".png", picture(1, "PNG")), (".txt", b"a dog")), with_files((".txt", b"a dog"), (".webp", WEBP)),
    with_files((".json", b'{"caption": "a dog", "url": null}'), (".jpg", JPEG)),
    with_files((".jpg", JPEG), (".json", b'{"caption": "a cat"}'), (".txt", b"a dog")),
    with_files((".jpg", JPEG), (".txt", "\ufeffa dog".encode())),
    with_files((".jpg", JPEG), (".txt", b"a dog" + b" " * 1995)),
    [("some/folder/a.b.jpg", JPEG), ("some/folder/a.b.txt", b"a dog")]])
def test_unusual_samples(tmp_path, files):
    """CMYK and grey photos, other formats, other orders, a caption in the JSON only, names with dots and folders."""
    write_tar(tmp_path / "a.tar", sample(1) + files + sample(2))
    read, state = items(tmp_path)
    assert [item["tokens"].tolist() for item in read] == [tokenize(text).tolist() for text in
                                                          (caption(1), "a dog", caption(2))]
    assert state[-len(BAD):].sum() == 0


def test_cmyk_keeps_its_colours(tmp_path):
    """A CMYK photograph of full magenta and yellow is red."""
    file = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(file, "JPEG", quality=100)
    write_tar(tmp_path / "a.tar", [("a.jpg", file.getvalue()), ("a.txt", b"a dog")])
    assert items(tmp_path)[0][0]["pixels"].flatten(1).unique(dim=1).T.tolist() == [[255, 0, 0]]


def cut_places():
    """Where to cut a tar of four samples, and how many samples are then whole."""
    files = [file for number in range(4) for file in sample(number)]
    end = [0]
    for _, content in files:
        end.append(end[-1] + 512 + -(-len(content) // 512) * 512)           # a header, and content in blocks
    return [(0, 0), (100, 0), (512, 0), (end[1], 0), (end[2] + 5, 0), (end[3] + 512, 1), (end[4] - 1, 1),
            (end[5] - 700, 2), (end[5] + 512, 2), (end[6] + 512, 3), (end[8], 3), (end[8] + 100, 3)]


@pytest.mark.parametrize("place, whole", cut_places())
def test_cut_tar(tmp_path, place, whole):
    """Of a tar that ends too early, wherever that is, the samples that are surely whole are used; the cut counts."""
    write_shards(tmp_path, [4, 4])
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:place])
    read, state = items(tmp_path)
    assert sorted(number for item in read for number in numbers(item["tokens"][None])) == [*range(whole), 4, 5, 6, 7]
    assert state[-len(BAD):].sum() == state[-len(BAD):][BAD.index("cut tar")] in (1, 2)     # the second epoch was begun


def test_damage_in_the_middle(tmp_path):
    """A tar whose headers are damaged in the middle counts as cut there; it is not taken for one that ends."""
    raw = write_tar(tmp_path / "a.tar", sample(0) + sample(1) + sample(2)).read_bytes()
    second = raw.index(b"000000001.jpg")
    (tmp_path / "a.tar").write_bytes(raw[:second] + b"\xff" * 512 + raw[second + 512:])
    write_tar(tmp_path / "b.tar", sample(3))
    read, state = items(tmp_path)
    assert [numbers(item["tokens"][None]) for item in read] == [[3]] and state[-len(BAD):][0] >= 1


def test_cut_tar_of_several_readers(tmp_path):
    """A cut tar that several readers share is counted once an epoch."""
    write_shards(tmp_path, [12])
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:-10240])
    shards, counts, seen = Shards(tmp_path, BANK, "match", 16), 0, []
    for state in shards.begin(1, workers=3):
        for item in shards.read(state):
            if item["key"][0] == 2:
                break
            seen.append(numbers(item["tokens"][None])[0])
            before = state.clone()                  # after its last pair of the second epoch
        counts += before[-len(BAD):]
    assert Counter(seen) == {number: 2 for number in range(len(set(seen)))} and len(set(seen)) >= 5
    assert counts.sum() == counts[0] <= 2


def test_nothing_but_bad_samples(tmp_path):
    """Data without a single usable pair ends in an error that says why, not in an endless search."""
    write_tar(tmp_path / "a.tar", [("a.jpg", JPEG), ("b.txt", b"a dog")])
    with pytest.raises(ValueError, match=r"no usable pair for long, now in .*a\.tar; skipped so far: no image \d+, "
                                         r"no caption \d+"):
        items(tmp_path)


def test_bad_line():
    """Counts in words: only the reasons that occurred, in their fixed order."""
    assert bad_line([0] * len(BAD)) == "none"
    assert bad_line(torch.tensor([2, 0, 0, 1234] + [0] * (len(BAD) - 4))) == "cut tar 2, bad image 1,234"


# ---------------------------------------------------------------------------------------------------------------------
# Interruption

def flawed(number):
    """A sample, every fifth one without its caption."""
    return sample(number)[:1 if number % 5 == 3 else 2]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")         # more workers than cores, as is meant
@pytest.mark.parametrize("workers, world, counts, done", [
    (0, 1, [11, 7, 9], 5), (2, 1, [11, 7, 9], 5), (2, 1, [11, 7, 9], 6), (2, 2, [23, 20], 3), (2, 1, [11, 7, 9], 1),
    (3, 1, [11, 7, 9], 4), (0, 2, [30], 7)])
def test_resume(tmp_path, workers, world, counts, done):
    """A run that goes on from the states of its last batches gets the batches, counts and states of one that was never
    interrupted: in the middle of shards, with bad samples, whichever worker's turn it is, also if one had none yet."""
    write_shards(tmp_path, counts, flawed)
    whole, saved = [], []
    for rank in range(world):
        batches, states = stream(tmp_path, 3, rank, world, workers)
        for step in range(done + 8):
            whole.append(next(batches))
            if step < done:
                states[whole[-1]["state"][0]] = whole[-1]["state"]
        saved.append(states)
    assert any(state[4] > 0 for states in saved for state in states)        # in the middle of a shard
    for rank in range(world):
        batches, states = stream(tmp_path, 3, rank, world, workers, torch.stack(saved))
        assert torch.equal(states, saved[rank])
        expected = whole[rank * (done + 8) + done:(rank + 1) * (done + 8)]
        assert all(same(next(batches), batch) for batch in expected)
    assert sum(batch["bad"] for batch in whole) > 0


def test_counts_survive(tmp_path):
    """The counts of a state go on over an interruption and add up to what the batches say was skipped."""
    write_shards(tmp_path, [15], flawed)
    batches, states = stream(tmp_path, 3)
    for batch in (first := [next(batches) for _ in range(2)]):
        states[0] = batch["state"]
    batches, _ = stream(tmp_path, 3, states=states)
    rest = [next(batches) for _ in range(2)]
    counts = rest[-1]["state"][-len(BAD):]
    assert sum(batch["bad"] for batch in first + rest) == counts.sum() == counts[BAD.index("no caption")] == 3


def test_skipping_decodes_nothing(tmp_path, monkeypatch):
    """To go on in the middle of a shard no image before that place is opened."""
    write_shards(tmp_path, [12])
    batches, states = stream(tmp_path, 9)
    states[0] = next(batches)["state"]
    opened = []
    monkeypatch.setattr("data.load_image", lambda file, least: opened.append(file) or load_image(file))
    next(stream(tmp_path, 2, states=states)[0])
    assert len(opened) == 2


@pytest.mark.parametrize("change, message", [
    ({"workers": 3}, "interrupted with 1 processes of 2 data workers, now there are 1 of 3"),
    ({"world": 2}, "interrupted with 1 processes of 2 data workers, now there are 2 of 2"),
    ({"seed": 1}, "the shards or the seed are not those of the interrupted run"),
    ({"shards": 3}, "the shards or the seed are not those of the interrupted run")])
def test_resume_of_another_run(tmp_path, change, message):
    """Other numbers of processes or workers, other shards or another seed cannot go on exactly, and say so."""
    write_shards(tmp_path, [2, 2])
    saved = Shards(tmp_path, BANK, "match", 16).begin(2, workers=2)
    write_shards(tmp_path, [2] * change.get("shards", 2))
    shards = Shards(tmp_path, BANK, "match", 16, change.get("seed", 0))
    with pytest.raises(ValueError, match=message):
        shards.begin(2, 0, change.get("world", 1), change.get("workers", 2), saved)


def test_signals(tmp_path):
    """Data workers go on when others send them SIGTERM and SIGINT; the process that started them can end them."""
    write_shards(tmp_path, [6, 6])
    expected = list(islice(stream(tmp_path, workers=2)[0], 12))
    batches, _ = stream(tmp_path, workers=2)
    got = [next(batches), next(batches)]
    for worker in batches._workers:
        subprocess.run(f"kill -TERM {worker.pid}; kill -INT {worker.pid}", shell=True, check=True)
    got += islice(batches, 10)
    assert all(map(same, got, expected)) and all(worker.is_alive() for worker in batches._workers)
    for worker in batches._workers:
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Memory

def resident(process):
    """Memory of a process that it shares with no other, in MB."""
    pages = list(map(int, Path(f"/proc/{process.pid}/statm").read_text().split()))
    return (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system has no /proc to read memory from")
def test_memory_is_flat(tmp_path):
    """Over five epochs the workers' memory does not grow by a tenth of the images that they read."""
    photos = [picture(i, side=128) for i in range(10)]
    write_shards(tmp_path, [40] * 6, lambda number: [(f"{number}.jpg", photos[number % 10]),
                                                     (f"{number}.txt", caption(number).encode())])
    batches, memory = stream(tmp_path, 8, workers=2)[0], []
    for _ in range(5):
        for _ in range(30):                         # 240 samples
            batch = next(batches)
        memory.append(sum(resident(worker) for worker in batches._workers))
    images = 4 * 240 * 128 * 128 * 3 / 1e6          # of the last four epochs
    print(f"memory of two workers after each epoch: {[round(m, 1) for m in memory]} MB; images: {images:.0f} MB")
    assert batch["state"][2] >= 4 and memory[-1] - memory[0] < 0.1 * images


def test_tar_members_are_forgotten(tmp_path):
    """A tar's list of members, which would grow with the tar, stays empty."""
    with tarfile.open(write_tar(tmp_path / "a.tar", [file for i in range(50) for file in sample(i)])) as tar:
        assert len(list(read_samples(tar))) == 50 and len(tar.members) <= 1


def test_words_are_forgotten(tmp_path):
    """The tokenizer's memory of words is emptied when it has grown large, while training and while annotating; its
    marks for the start and end of a text are known afterwards, too."""
    path = write_tar(tmp_path / "a.tar", sample(0))
    tokenizer, marked = concepts._tokenizer(), tokenize("a dog <end_of_text> <start_of_text>")
    [state] = (shards := Shards(tmp_path, BANK, "match", 16)).begin(1)
    for forget in (forget_words, lambda: annotate_shard(path, BANK, MATCH),
                   lambda: list(islice(shards.read(state), 2))):
        tokenizer.cache.update({f"word{i}": f"word{i}</w>" for i in range(500_001)})
        forget()
        assert len(tokenizer.cache) < 100
    assert tokenize("a dog <end_of_text> <start_of_text>").tolist() == marked.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Concepts files

def damaged(folder):
    """Three shards with samples of every kind, the last of them cut."""
    write_shards(folder, [9, 6, 8], flawed)
    last = folder / "00002.tar"
    last.write_bytes(last.read_bytes()[:len(last.read_bytes()) // 2])
    return folder


def another_parser(folder):
    """A parser that knows only cats, as a folder."""
    pipeline = spacy.blank("en", meta={"name": "cats"})
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "CONCEPT", "pattern": "cat", "id": "cat"}])
    pipeline.to_disk(folder)
    return str(folder)


def test_concepts_files_equal_the_matcher(tmp_path, monkeypatch):
    """Batches with concepts from files are the batches with concepts found on the fly, in everything."""
    folder = damaged(tmp_path)
    live = list(islice(stream(folder)[0], 12))
    for path in find_shards(folder):
        annotate_shard(path, BANK, MATCH)
    monkeypatch.setattr("data.annotate", None)      # nothing is annotated now
    assert all(map(same, islice(stream(folder)[0], 12), live))


def test_concepts_file(tmp_path):
    """A concepts file has a row of offsets for each sample, usable or not, and plain arrays only."""
    path = write_tar(tmp_path / "a.b.tar", sample(1) + with_files((".jpg", JPEG)) + sample(2))
    new, captions, annotated, counts, bad = annotate_shard(path, BANK, MATCH)
    assert (new, captions, annotated, counts) == (2, 2, 2, {0: 2, 1: 1}) and bad_line(bad) == "no caption 1"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.b.concepts.npz", "a.b.tar"]
    with np.load(tmp_path / "a.b.concepts.npz", allow_pickle=False) as file:
        assert file["offsets"].tolist() == [0, 2, 2, 3] and file["rows"].tolist() == [
            list(row) for found in annotate([caption(1), caption(2)], BANK, MATCH) for row in found]


class Writing:
    """What writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle(tmp_path):
    """A concepts file that holds pickled objects is not opened but made again."""
    path, sidecar = write_tar(tmp_path / "a.tar", sample(1)), tmp_path / "a.concepts.npz"
    annotate_shard(path, BANK, MATCH)
    with np.load(sidecar) as file:
        arrays = dict(file)
    np.savez(sidecar, **{**arrays, "rows": np.array([Writing(tmp_path / "written")], object)})
    assert read_sidecar(path, ANNOTATOR) is None and not (tmp_path / "written").exists()
    annotate_shard(path, BANK, MATCH)
    with np.load(sidecar) as file:
        assert all(np.array_equal(file[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("change", ["bank", "parser", "tar"])
def test_concepts_of_something_else(tmp_path, change):
    """Concepts of another bank, another parser or another state of the tar are refused with the command that helps."""
    folder = write_shards(tmp_path / "shards", [2, 2])
    for path in find_shards(folder):
        annotate_shard(path, BANK, MATCH)
    bank = ConceptBank(["dog", "cat"]) if change == "bank" else BANK
    parser = another_parser(tmp_path / "cats") if change == "parser" else "match"
    if change == "tar":
        os.utime(folder / "00001.tar", (1, 1))
    with pytest.raises(ValueError, match=r"0000[01]\.concepts\.npz is of another concept bank or parser, or its tar "
                       rf'has changed since; run: python concepts\.py --shards "{folder}" --parser {parser}'):
        Shards(folder, bank, parser, 16)
    for path in find_shards(folder):
        annotate_shard(path, bank, load_parser(parser, bank))
    Shards(folder, bank, parser, 16)


def test_no_concepts(tmp_path):
    """With a parser that is not the matcher a missing or broken concepts file is an error at the start, with the
    command that helps; the matcher goes without. A file that is lost later costs its shard, which is counted."""
    folder, cats = write_shards(tmp_path / "shards", [2, 2]), another_parser(tmp_path / "cats")
    annotate_shard(folder / "00000.tar", BANK, load_parser(cats, BANK))
    (folder / "00001.concepts.npz").write_bytes((folder / "00000.concepts.npz").read_bytes()[:100])
    with pytest.raises(FileNotFoundError, match=rf"1 of the 2 shards have no concepts yet, the first is .*00001\.tar; "
                                                rf'run: python concepts\.py --shards "{folder}" --parser {cats}'):
        load_pairs(folder, BANK, cats, 16)
    annotate_shard(folder / "00001.tar", BANK, load_parser(cats, BANK))
    shards = Shards(folder, BANK, cats, 16)
    (folder / "00001.concepts.npz").unlink()
    [state] = shards.begin(1)
    read = list(islice(shards.read(state), 2))
    assert {number for item in read for number in numbers(item["tokens"][None])} == {0, 1}
    list(islice(shards.read(state), 4))
    assert state[-len(BAD):].sum() == state[-len(BAD):][BAD.index("no concepts")] > 0


def test_concepts_that_cannot_be_written(tmp_path):
    """Where a concepts file cannot be written the error says so and nothing half-written is left."""
    path = write_tar(tmp_path / "a.tar", sample(1))
    (tmp_path / "a.concepts.npz").mkdir()
    with pytest.raises(OSError):
        annotate_shard(path, BANK, MATCH)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.concepts.npz", "a.tar"]


@pytest.fixture
def forked(monkeypatch):
    """Processes that need not import everything again; `test_command_after_a_kill` has real ones."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr("concepts.multiprocessing.get_context", lambda kind: fork)


def test_command(tmp_path, capsys, forked):
    """The command prints what it prints for the same captions in a file, and what was skipped; a second time it only
    reads what it wrote."""
    folder = damaged(tmp_path / "shards")
    (tmp_path / "bank.txt").write_text("dog\ncat\ngrass\n")
    with tarfile.open(folder / "00002.tar") as tar, pytest.raises(tarfile.ReadError):
        for whole, _ in enumerate(read_samples(tar), start=1):
            pass
    used = [i for i in range(15 + whole) if i % 5 != 3]
    (tmp_path / "c.tsv").write_text("".join(f"{i}.jpg\t{caption(i)}\n" for i in used))
    options = ["--parser", "match", "--bank", str(tmp_path / "bank.txt")]
    main([str(tmp_path / "c.tsv"), *options])
    expected = capsys.readouterr().out.splitlines()[1:]
    skipped = f"3 shards; skipped samples: cut tar 1, no caption {15 + whole - len(used)}"
    for first in (rf"annotated {len(used)} captions in [\d.]+ s \([\d,]+ captions/s\)\n", ""):
        main(["--shards", str(folder), "--processes", "2", *options])
        assert re.fullmatch(first + re.escape("\n".join([skipped, *expected, ""])), capsys.readouterr().out)


def test_command_after_a_kill(tmp_path, capsys, forked):
    """A killed command leaves no process behind and no half-written file under a final name; run again it does not
    touch what was finished and makes the rest, also what was damaged since."""
    folder = write_shards(tmp_path, [200] * 30, lambda number: [(f"{number}.txt", caption(number % 7).encode())])
    command = [sys.executable, ROOT / "concepts.py", "--shards", folder, "--parser", "match", "--processes", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while len(finished := list(folder.glob("*.concepts.npz"))) < 2 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=60)             # its processes have the pipe's other end until they end
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.concepts.npz")}
    assert 2 <= len(finished) < 30
    annotator = annotation_key(None, ConceptBank.default(), load_parser("match", ConceptBank.default()))
    assert all(read_sidecar(path.with_name(path.name[:5] + ".tar"), annotator) for path in finished)
    broken, time_of_broken = finished.popitem()
    broken.write_bytes(broken.read_bytes()[:-100])
    main(["--shards", str(folder), "--parser", "match", "--processes", "2"])
    assert f"annotated {200 * (30 - len(finished)):,} captions" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    for path in folder.glob("*.tar"):
        offsets, rows, bad = read_sidecar(path, annotator)
        assert len(offsets) == 201 and bad.sum() == 0


def test_command_errors(tmp_path, monkeypatch, fails, forked):
    """Nothing to annotate, no parser, and a process that died: one line each."""
    class Broken:
        """A pool whose processes die."""
        __init__ = __exit__ = lambda *_: None
        __enter__ = lambda self: self

        def map(self, *_):
            raise BrokenProcessPool

    write_tar(tmp_path / "a.tar", [("a.jpg", JPEG)])
    fails(main, ["--shards", tmp_path, "--parser", "match"], f"no captions in {tmp_path / 'a.tar'} and the other")
    fails(main, ["--shards", tmp_path, "--parser", "no_parser"], "the parser 'no_parser' could not be loaded")
    fails(main, ["--shards", tmp_path / "{1..3}.tar"], f"no tar files in {tmp_path / '{1..3}.tar'}; expected")
    monkeypatch.setattr("concepts.ProcessPoolExecutor", Broken)
    fails(main, ["--shards", tmp_path, "--parser", "match"], "a parser process died", "Finished shards are kept")


@pytest.mark.parametrize("arguments", [[], ["c.tsv", "--shards", "shards"]])
def test_one_source(arguments, capsys):
    """The command takes a captions file or shards, one of them."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "--shards" in capsys.readouterr().err
