"""Tests of tar shards: machinery/training/shards.py, `data.open_shards` and `concepts.py --shards`."""
import io
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import pytest
import spacy
import torch
from PIL import Image
from torch.utils.data import DataLoader

from concepts import (ConceptBank, annotate, annotate_shard, annotation_key,
                      forget_words, load_parser, main, tokenize, tokenizer)
from conftest import ROOT
from data import load_pairs, open_shards, random_resized_crop
from machinery.images import load_image, to_pixels
from machinery.training.shards import BAD, bad_line, find_shards, read_samples, read_sidecar
from machinery.training.workers import start_data_worker
from model import SimZSS

BANK = ConceptBank(["dog", "cat", "grass"])
MATCH = load_parser("match", BANK)
ANNOTATOR = annotation_key(None, BANK, MATCH)
SIZE = 16                                           # pixels a side of the crops
SAMPLER = partial(SimZSS.sample, size=SIZE)


def picture(number, form="JPEG", mode="RGB", side=24):
    """Bytes of an image file, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


def caption(number):
    """A caption with one, two or three concepts, different for each number."""
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
    """Shards 00000.tar ... with that many samples each, numbered from one shard to the next."""
    first = np.cumsum([0, *counts])
    for i, count in enumerate(counts):
        files = [file for number in range(count) for file in make(int(first[i]) + number)]
        write_tar(folder / f"{i:05}.tar", files)
    return folder


def numbers(tokens):
    """The numbers that captions of tokens (B, 77) begin with."""
    return [KNOWN[tuple(row)] for row in tokens.tolist()]


def number_of(item):
    return numbers(item["tokens"][None])[0]


def opened(source, bank=BANK, parser="match", seed=0):
    return open_shards(source, bank, parser, SIZE, SAMPLER, seed)


def stream(source, local_batch=4, rank=0, world=1, workers=0, states=None, seed=0):
    """(batches, states at their beginning) of one process, through a DataLoader."""
    shards = load_pairs(source, BANK, "match", SIZE, SAMPLER, seed=seed)
    states = shards.begin(local_batch, rank, world, workers, states)
    loader = DataLoader(shards, batch_size=None, num_workers=workers,
                        worker_init_fn=start_data_worker)
    return iter(loader), states


def items(source):
    """All items of one reader in its first epoch, and its state after them."""
    shards = opened(source)
    [state] = shards.begin(1)
    return list(takewhile(lambda item: item["key"][0] < 1, shards.read(state))), state


def same(batch, other):
    """Whether two batches agree in everything."""
    return batch.keys() == other.keys() and all(
        torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
        for key, value in batch.items())


def annotate_tar(path, bank=BANK, pipeline=MATCH):
    """Write the concepts file of a tar, as a process of `concepts.py --shards` does."""
    return annotate_shard((bank, pipeline), path)


def annotations(*captions):
    """Rows of each caption, as lists."""
    return [[list(row) for row in rows] for rows in annotate(captions, BANK, MATCH)]


# --------------------------------------------------------------------------------------------------
# Which shards there are

@pytest.mark.parametrize("pattern, names", [
    ("{00000..00002}.tar", ["00000.tar", "00001.tar", "00002.tar"]),
    ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
    ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]),
    ("{0..1}{0..1}.tar", ["00.tar", "01.tar", "10.tar", "11.tar"]),
    ("part{1..2}/{07..08}-x.tar",
     ["part1/07-x.tar", "part1/08-x.tar", "part2/07-x.tar", "part2/08-x.tar"]),
    ("one.tar", ["one.tar"])])
def test_ranges(tmp_path, pattern, names, capsys):
    """A range counts up, with leading zeros if it is written with them. Several ranges are
    combined."""
    for name in names:
        write_tar((tmp_path / name), [])
    assert find_shards(tmp_path / pattern) == [tmp_path / name for name in names]
    assert capsys.readouterr().out == ""


def test_gaps(tmp_path, capsys):
    """Missing shards are counted and reported, and the others are used."""
    for i in (1, 4):
        write_tar(tmp_path / f"{i:02}.tar", [])
    pattern = tmp_path / "{00..04}.tar"
    assert find_shards(pattern) == [tmp_path / "01.tar", tmp_path / "04.tar"]
    gap = tmp_path / "00.tar"
    message = f"3 of the 5 shards of {pattern} are missing, the first is {gap}\n"
    assert capsys.readouterr().out == message


def test_folder_of_tars(tmp_path):
    """Of a folder all tars are taken, with any name, and no other file that img2dataset writes."""
    for name in ("a b.tar", "00007.tar", "x.y.tar", "00007_stats.json", "00007.parquet"):
        write_tar(tmp_path / name, [])
    assert [path.name for path in find_shards(tmp_path)] == ["00007.tar", "a b.tar", "x.y.tar"]


@pytest.mark.parametrize("source", ["", "{0..3}.tar", "{3..0}.tar", "a.tar"])
def test_no_shards(tmp_path, source):
    """Without a single tar the error says what was looked for and what is expected."""
    source = tmp_path / source
    message = re.escape(f"no tar files in {source}; ") + "expected .* a range: "
    with pytest.raises(FileNotFoundError, match=message):
        load_pairs(source, BANK, "match", SIZE, SAMPLER)


# --------------------------------------------------------------------------------------------------
# Which process reads what

@pytest.mark.parametrize("world, workers, counts", [
    (1, 0, [5, 3, 4]), (1, 2, [6]), (2, 2, [9]), (3, 2, [8, 9]),
    (2, 3, [2, 3, 1, 4, 2, 3, 1, 2, 5, 1, 1, 1, 2]), (2, 2, [3, 1, 7, 2, 2]), (4, 1, [1, 2, 30]),
    (1, 3, [2, 0, 5])])
def test_every_sample_once_an_epoch(tmp_path, world, workers, counts):
    """All readers together read every sample exactly once in every epoch, and no reader is without
    data. This holds too for fewer shards than readers, for empty parts of a shard and for empty
    shards."""
    shards = opened(write_shards(tmp_path, counts))
    seen = Counter()
    for rank in range(world):
        for state in shards.begin(1, rank, world, workers):
            read = list(takewhile(lambda item: item["key"][0] < 4, shards.read(state)))
            assert read
            seen.update((int(item["key"][0]), number_of(item)) for item in read)
    assert seen == {(epoch, number): 1 for epoch in range(4) for number in range(sum(counts))}


def test_readers_are_even(tmp_path):
    """Where shards cannot be divided evenly, no reader reads more of them than another: it goes on
    with the next epoch."""
    shards = opened(write_shards(tmp_path, [1] * 5))
    readers = [islice(shards.read(state), 5) for state in shards.begin(1, workers=4)]
    read = Counter((int(item["key"][0]), int(item["key"][1]))
                   for reader in readers for item in reader)
    assert read == {(epoch, shard): 1 for epoch in range(4)
                    for shard in range(5)}          # 4 readers x 5 items = 4 epochs x 5 shards


def test_order(tmp_path):
    """The order of the shards differs between epochs and between seeds. The same seed gives the
    same order."""
    write_shards(tmp_path, [1] * 12)

    def order(seed):
        batches, _ = stream(tmp_path, local_batch=12, seed=seed)
        return [tuple(numbers(next(batches)["tokens"])) for _ in range(3)]

    first = order(0)
    assert len({*first, *order(1)}) == 6 and order(0) == first


def test_items(tmp_path):
    """An item has the crop of its image, seeded by its place, its tokens and the concepts of its
    caption."""
    write_shards(tmp_path, [3, 3])
    shards = opened(tmp_path, seed=5)
    [state] = shards.begin(1)
    for item in islice(shards.read(state), 12):     # two epochs
        number = number_of(item)
        epoch, shard, place = item["key"].tolist()
        assert number == 3 * shard + place
        assert shards.name(item["key"]) == f"{tmp_path}/{shard:05}.tar, sample {place}"
        image = load_image(io.BytesIO(picture(number)))
        rng = np.random.default_rng((5, epoch, shard, place))
        assert torch.equal(item["pixels"], to_pixels(random_resized_crop(image, SIZE, rng)))
        assert [item["concepts"].tolist()] == annotations(caption(number))
        assert item["concepts"].dtype == torch.int64 and item["bad"] == 0
    assert epoch == 1


def test_batch(tmp_path):
    """A batch is collated like other data: concepts are padded with -1, skipped samples are
    summed."""
    write_shards(tmp_path, [5], lambda number: sample(number) if number != 2 else sample(2)[:1])
    batch = next(stream(tmp_path)[0])
    assert numbers(batch["tokens"]) == [0, 1, 3, 4] and batch["bad"] == 1
    found = annotations(*map(caption, (0, 1, 3, 4)))
    most = max(map(len, found))
    padded = [rows + [[-1, -1, -1]] * (most - len(rows)) for rows in found]
    assert batch["concepts"].tolist() == padded


# --------------------------------------------------------------------------------------------------
# Samples that cannot be used

JPEG = picture(1)
WEBP = picture(1, "WEBP")


def test_images_alone(tmp_path):
    """A method that needs no captions reads none: tars of images alone are training data."""
    write_shards(tmp_path, [3], lambda number: sample(number)[:1])
    shards = load_pairs(tmp_path, None, "match", SIZE,
                        lambda pair, rng: {"pixels": to_pixels(pair.image())},
                        needs_captions=False, needs_concepts=False)
    [state] = shards.begin(1)
    found = [item["pixels"] for item in islice(shards.read(state), 3)]
    expected = [to_pixels(load_image(io.BytesIO(picture(number)))) for number in range(3)]
    assert all(map(torch.equal, found, expected)) and not state[-len(BAD):].any()


def test_partners_are_of_the_same_tar(tmp_path):
    """With a concepts file, a sample's partner is another whole sample of its tar that shares the
    concept: caption and image belong together."""
    folder = write_shards(tmp_path, [4, 4])
    for path in find_shards(folder):
        annotate_tar(path)
    drawn = []

    def keep(pair, rng):
        partner, concept = pair.partner(rng)
        drawn.append((pair.caption, partner.caption, BANK.names[concept],
                      to_pixels(partner.image())))
        return {"tokens": tokenize(pair.caption)}

    shards = open_shards(folder, BANK, "match", SIZE, keep)
    [state] = shards.begin(1)
    list(islice(shards.read(state), 80))
    pictures = {caption(i): to_pixels(load_image(io.BytesIO(picture(i)))) for i in range(8)}
    for own, other, concept, pixels in drawn:
        assert concept in own and concept in other and torch.equal(pixels, pictures[other])
        assert (int(own[0]) < 4) == (int(other[0]) < 4)
    assert len({other for _, other, _, _ in drawn}) == 8


def with_files(*files):
    return [("bad" + suffix, content) for suffix, content in files]


@pytest.mark.parametrize("reason, files", [
    ("bad image", with_files((".jpg", JPEG[:-300]), (".txt", b"a dog"))),           # cut short
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
    ("long caption", with_files((".jpg", JPEG), (".txt", b"a dog " * 1667))),       # 10,002 bytes
    ("long caption", with_files((".jpg", JPEG), (".txt", b"d" * 2001))),
    ("long caption",
     with_files((".jpg", JPEG), (".json", b'{"caption": "%s"}' % (b"d" * 2001)))),
    ("caption not UTF-8", with_files((".jpg", JPEG), (".txt", "café".encode("latin-1")))),
    ("caption not UTF-8",
     with_files((".jpg", JPEG), (".json", '{"caption": "café"}'.encode("latin-1")))),
    ("caption not UTF-8",                                                           # half an emoji
     with_files((".jpg", JPEG), (".json", b'{"caption": "\\ud83d"}'))),
])
@pytest.mark.parametrize("annotated", [False, True])
def test_bad_samples(tmp_path, reason, files, annotated):
    """What is wrong with a sample is found and counted by its reason. The samples around it are
    used with the concepts of their own captions, with and without a concepts file."""
    path = write_tar(tmp_path / "a.tar", sample(1) + files + sample(2))
    if annotated:
        *_, bad = annotate_tar(path)
        assert bad.tolist() == [name == reason and "image" not in reason for name in BAD]
    read, state = items(tmp_path)
    assert [number_of(item) for item in read] == [1, 2]
    assert [item["bad"] for item in read] == [0, 1]
    found = [item["concepts"].tolist() for item in read]
    assert found == annotations(caption(1), caption(2))
    assert state[-len(BAD):].tolist() == [name == reason for name in BAD]


@pytest.mark.parametrize("files", [
    with_files((".jpg", picture(1, mode="CMYK")), (".txt", b"a dog")),
    with_files((".JPG", JPEG), (".TXT", b"a dog")),
    with_files((".jpg", picture(1, mode="L")), (".txt", b"a dog")),
    with_files((".txt", b"a dog"), (".jpg", JPEG)),
    with_files((".png", picture(1, "PNG")), (".txt", b"a dog")),
    with_files((".txt", b"a dog"), (".webp", WEBP)),
    with_files((".json", b'{"caption": "a dog", "url": null}'), (".jpg", JPEG)),
    with_files((".jpg", JPEG), (".json", b'{"caption": "a cat"}'), (".txt", b"a dog")),
    with_files((".jpg", JPEG), (".txt", "\ufeffa dog".encode())),
    with_files((".jpg", JPEG), (".txt", b"a dog" + b" " * 1995)),
    [("some/folder/a.b.jpg", JPEG), ("some/folder/a.b.txt", b"a dog")]])
def test_unusual_samples(tmp_path, files):
    """These are used: CMYK and grey photos, other formats, other orders, a caption in the JSON
    only, names with dots and folders."""
    write_tar(tmp_path / "a.tar", sample(1) + files + sample(2))
    read, state = items(tmp_path)
    expected = [tokenize(text).tolist() for text in (caption(1), "a dog", caption(2))]
    assert [item["tokens"].tolist() for item in read] == expected
    assert state[-len(BAD):].sum() == 0


def test_cmyk_keeps_its_colours(tmp_path):
    """A CMYK photograph of full magenta and yellow is red."""
    file = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(file, "JPEG", quality=100)
    write_tar(tmp_path / "a.tar", [("a.jpg", file.getvalue()), ("a.txt", b"a dog")])
    pixels = items(tmp_path)[0][0]["pixels"]
    assert pixels.flatten(1).unique(dim=1).T.tolist() == [[255, 0, 0]]


def cut_places():
    """Where to cut a tar of four samples, and how many samples are then whole."""
    files = [file for number in range(4) for file in sample(number)]
    end = [0]
    for _, content in files:
        end.append(end[-1] + 512 + -(-len(content) // 512) * 512)   # a header, content in blocks
    return [(0, 0), (100, 0), (512, 0), (end[1], 0), (end[2] + 5, 0), (end[3] + 512, 1),
            (end[4] - 1, 1), (end[5] - 700, 2), (end[5] + 512, 2), (end[6] + 512, 3), (end[8], 3),
            (end[8] + 100, 3)]


@pytest.mark.parametrize("place, whole", cut_places())
def test_cut_tar(tmp_path, place, whole):
    """Of a tar that ends too early, at any place, the samples that are surely whole are used. The
    cut is counted."""
    write_shards(tmp_path, [4, 4])
    path = tmp_path / "00000.tar"
    path.write_bytes(path.read_bytes()[:place])
    read, state = items(tmp_path)
    assert sorted(map(number_of, read)) == [*range(whole), 4, 5, 6, 7]
    counts = state[-len(BAD):]
    assert counts.sum() == counts[BAD.index("cut tar")] in (1, 2)   # the second epoch was begun


def test_damage_in_the_middle(tmp_path):
    """A tar whose headers are damaged in the middle is counted as cut there. The damage is not
    taken for the tar's end."""
    raw = write_tar(tmp_path / "a.tar", sample(0) + sample(1) + sample(2)).read_bytes()
    second = raw.index(b"000000001.jpg")
    (tmp_path / "a.tar").write_bytes(raw[:second] + b"\xff" * 512 + raw[second + 512:])
    write_tar(tmp_path / "b.tar", sample(3))
    read, state = items(tmp_path)
    assert [number_of(item) for item in read] == [3] and state[-len(BAD):][0] >= 1


def test_cut_tar_of_several_readers(tmp_path):
    """A cut tar that several readers share is counted once an epoch."""
    write_shards(tmp_path, [12])
    path = tmp_path / "00000.tar"
    path.write_bytes(path.read_bytes()[:-10240])
    shards = opened(tmp_path)
    counts = 0
    seen = []
    for state in shards.begin(1, workers=3):
        for item in shards.read(state):
            if item["key"][0] == 2:
                break
            seen.append(number_of(item))
            before = state.clone()                  # after its last pair of the second epoch
        counts += before[-len(BAD):]
    assert Counter(seen) == {number: 2 for number in range(len(set(seen)))}
    assert len(set(seen)) >= 5
    assert counts.sum() == counts[0] <= 2


def test_nothing_but_bad_samples(tmp_path):
    """Data without a single usable pair ends in an error that says why. The search is not
    endless."""
    write_tar(tmp_path / "a.tar", [("a.jpg", JPEG), ("b.txt", b"a dog")])
    with pytest.raises(ValueError, match=r"no usable pair for long, now in .*a\.tar; skipped so "
                                         r"far: no image \d+, no caption \d+"):
        items(tmp_path)


def test_bad_line():
    """Counts in words: only the reasons that occurred, in their fixed order."""
    assert bad_line([0] * len(BAD)) == "none"
    counts = torch.tensor([2, 0, 0, 1234] + [0] * (len(BAD) - 4))
    assert bad_line(counts) == "cut tar 2, bad image 1,234"


# --------------------------------------------------------------------------------------------------
# Interruption

def flawed(number):
    """A sample. Every fifth one is without its caption."""
    return sample(number)[:1 if number % 5 == 3 else 2]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")   # more workers than cores
@pytest.mark.parametrize("workers, world, counts, done", [
    (0, 1, [11, 7, 9], 5), (2, 1, [11, 7, 9], 5), (2, 1, [11, 7, 9], 6), (2, 2, [23, 20], 3),
    (2, 1, [11, 7, 9], 1), (3, 1, [11, 7, 9], 4), (0, 2, [30], 7)])
def test_resume(tmp_path, workers, world, counts, done):
    """A run that goes on from the states of its last batches gets the batches, counts and states of
    a run without interruption: in the middle of shards, with bad samples, whichever worker is next,
    also if a worker has given no batch yet."""
    write_shards(tmp_path, counts, flawed)
    whole = []
    saved = []
    for rank in range(world):
        batches, states = stream(tmp_path, 3, rank, world, workers)
        for step in range(done + 8):
            whole.append(next(batches))
            if step < done:
                states[whole[-1]["state"][0]] = whole[-1]["state"]
        saved.append(states)
    assert any(state[4] > 0 for states in saved for state in states)    # in the middle of a shard
    for rank in range(world):
        batches, states = stream(tmp_path, 3, rank, world, workers, torch.stack(saved))
        assert torch.equal(states, saved[rank])
        expected = whole[rank * (done + 8) + done:(rank + 1) * (done + 8)]
        assert all(same(next(batches), batch) for batch in expected)
    assert sum(batch["bad"] for batch in whole) > 0


def test_counts_survive(tmp_path):
    """The counts of a state go on after an interruption. Their sum is what the batches say was
    skipped."""
    write_shards(tmp_path, [15], flawed)
    batches, states = stream(tmp_path, 3)
    first = [next(batches) for _ in range(2)]
    for batch in first:
        states[0] = batch["state"]
    batches, _ = stream(tmp_path, 3, states=states)
    rest = [next(batches) for _ in range(2)]
    counts = rest[-1]["state"][-len(BAD):]
    skipped = sum(batch["bad"] for batch in first + rest)
    assert skipped == counts.sum() == counts[BAD.index("no caption")] == 3


def test_skipping_decodes_nothing(tmp_path, monkeypatch):
    """To go on in the middle of a shard, no image before that place is opened."""
    write_shards(tmp_path, [12])
    batches, states = stream(tmp_path, 9)
    states[0] = next(batches)["state"]
    files = []

    def counting(file, **options):
        files.append(file)
        return load_image(file, **options)

    monkeypatch.setattr("data.load_image", counting)
    next(stream(tmp_path, 2, states=states)[0])
    assert len(files) == 2


@pytest.mark.parametrize("change, message", [
    ({"workers": 3}, "interrupted with 1 processes of 2 data workers, now there are 1 of 3"),
    ({"world": 2}, "interrupted with 1 processes of 2 data workers, now there are 2 of 2"),
    ({"seed": 1}, "the shards or the seed are not those of the interrupted run"),
    ({"shards": 3}, "the shards or the seed are not those of the interrupted run")])
def test_resume_of_another_run(tmp_path, change, message):
    """With other numbers of processes or workers, other shards or another seed a run cannot go on
    exactly, and the error says so."""
    write_shards(tmp_path, [2, 2])
    saved = opened(tmp_path).begin(2, workers=2)
    write_shards(tmp_path, [2] * change.get("shards", 2))
    shards = opened(tmp_path, seed=change.get("seed", 0))
    with pytest.raises(ValueError, match=message):
        shards.begin(2, 0, change.get("world", 1), change.get("workers", 2), saved)


def test_signals(tmp_path):
    """Data workers go on when other processes send them SIGTERM and SIGINT. The process that
    started them can end them."""
    write_shards(tmp_path, [6, 6])
    expected = list(islice(stream(tmp_path, workers=2)[0], 12))
    batches, _ = stream(tmp_path, workers=2)
    got = [next(batches), next(batches)]
    for worker in batches._workers:
        command = f"kill -TERM {worker.pid}; kill -INT {worker.pid}"
        subprocess.run(command, shell=True, check=True)
    got += islice(batches, 10)
    assert all(map(same, got, expected))
    assert all(worker.is_alive() for worker in batches._workers)
    for worker in batches._workers:
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0


# --------------------------------------------------------------------------------------------------
# Memory

def resident(process):
    """Memory of a process that it shares with no other, in MB."""
    pages = list(map(int, Path(f"/proc/{process.pid}/statm").read_text().split()))
    return (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(),
                    reason="the system has no /proc to read memory from")
def test_memory_is_flat(tmp_path):
    """Over five epochs the workers' memory does not grow by a tenth of the images that they
    read."""
    photos = [picture(i, side=128) for i in range(10)]
    write_shards(tmp_path, [40] * 6, lambda number: [(f"{number}.jpg", photos[number % 10]),
                                                     (f"{number}.txt", caption(number).encode())])
    batches, _ = stream(tmp_path, 8, workers=2)
    memory = []
    for _ in range(5):
        for _ in range(30):                         # 240 samples
            batch = next(batches)
        memory.append(sum(resident(worker) for worker in batches._workers))
    images = 4 * 240 * 128 * 128 * 3 / 1e6          # of the last four epochs
    print(f"memory of two workers after each epoch: {[round(m, 1) for m in memory]} MB; "
          f"images: {images:.0f} MB")
    assert batch["state"][2] >= 4 and memory[-1] - memory[0] < 0.1 * images


def test_tar_members_are_forgotten(tmp_path):
    """A tar's list of members, which would grow with the tar, stays empty."""
    path = write_tar(tmp_path / "a.tar", [file for i in range(50) for file in sample(i)])
    with tarfile.open(path) as tar:
        assert len(list(read_samples(tar))) == 50 and len(tar.members) <= 1


def test_words_are_forgotten(tmp_path):
    """The tokenizer's memory of words is emptied when it has grown large, in training and in
    annotating. Afterwards it still knows its marks for the start and end of a text."""
    path = write_tar(tmp_path / "a.tar", sample(0))
    marked = tokenize("a dog <end_of_text> <start_of_text>")
    shards = opened(tmp_path)
    [state] = shards.begin(1)
    for forget in (forget_words, lambda: annotate_tar(path),
                   lambda: list(islice(shards.read(state), 2))):
        tokenizer().cache.update({f"word{i}": f"word{i}</w>" for i in range(500_001)})
        forget()
        assert len(tokenizer().cache) < 100
    assert tokenize("a dog <end_of_text> <start_of_text>").tolist() == marked.tolist()


# --------------------------------------------------------------------------------------------------
# Concepts files

def damaged(folder):
    """Three shards with samples of every kind. The last shard is cut."""
    write_shards(folder, [9, 6, 8], flawed)
    last = folder / "00002.tar"
    last.write_bytes(last.read_bytes()[:len(last.read_bytes()) // 2])
    return folder


def another_parser(folder):
    """A parser that knows only cats, as a folder."""
    pipeline = spacy.blank("en", meta={"name": "cats"})
    ruler = pipeline.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "CONCEPT", "pattern": "cat", "id": "cat"}])
    pipeline.to_disk(folder)
    return str(folder)


def test_concepts_files_equal_the_matcher(tmp_path, monkeypatch):
    """Batches with concepts from files are in everything the batches with concepts that are found
    while reading."""
    folder = damaged(tmp_path)
    live = list(islice(stream(folder)[0], 12))
    for path in find_shards(folder):
        annotate_tar(path)
    monkeypatch.setattr("data.annotate", None)      # nothing is annotated now
    assert all(map(same, islice(stream(folder)[0], 12), live))


def test_concepts_file(tmp_path):
    """A concepts file has an offset for each sample, usable or not, and plain arrays only."""
    path = write_tar(tmp_path / "a.b.tar",
                     sample(1) + with_files((".jpg", JPEG)) + sample(2))
    new, captions, annotated, counts, bad = annotate_tar(path)
    assert (new, captions, annotated, counts) == (2, 2, 2, {0: 2, 1: 1})
    assert bad_line(bad) == "no caption 1"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.b.concepts.npz", "a.b.tar"]
    with np.load(tmp_path / "a.b.concepts.npz", allow_pickle=False) as file:
        assert file["offsets"].tolist() == [0, 2, 2, 3]
        assert file["rows"].tolist() == sum(annotations(caption(1), caption(2)), [])


class Writing:
    """What writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def stored_arrays(sidecar):
    with np.load(sidecar) as file:
        return dict(file)


def check_made_again(path, arrays):
    """The concepts file of a tar is not believed. It is made again, and then has these arrays."""
    assert read_sidecar(path, ANNOTATOR, len(BANK)) is None
    annotate_tar(path)
    found = stored_arrays(path.with_suffix(".concepts.npz"))
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_no_pickle(tmp_path):
    """A concepts file that holds pickled objects is not opened but made again."""
    path = write_tar(tmp_path / "a.tar", sample(1))
    sidecar = tmp_path / "a.concepts.npz"
    annotate_tar(path)
    arrays = stored_arrays(sidecar)
    objects = np.array([Writing(tmp_path / "written")], object)
    np.savez(sidecar, **{**arrays, "rows": objects})
    check_made_again(path, arrays)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("name, value", [
    ("rows", [[3, 2, 3], [0, 5, 6]]), ("rows", [[-1, 2, 3], [0, 5, 6]]), ("rows", [[0, 2], [1, 5]]),
    ("rows", [[0, 4, 4], [1, 5, 6]]), ("rows", [[0, 0, 1], [1, 5, 6]]),
    ("rows", [[0, 4, 77], [1, 5, 6]]), ("rows", [[0.0, 4.0, 5.0], [1.0, 5.0, 6.0]]),
    ("offsets", [0, 1]), ("offsets", [1, 2]), ("offsets", [0, 3, 2]), ("bad", [0, 0])],
    ids=["id above the bank", "id below 0", "two columns", "empty span", "the start token",
         "beyond the context", "no integers", "last offset", "first offset", "falling offsets",
         "too few counts"])
def test_impossible_concepts(tmp_path, name, value):
    """A concepts file whose arrays cannot be annotations of this bank is made again."""
    path = write_tar(tmp_path / "a.tar", sample(1))
    annotate_tar(path)
    arrays = stored_arrays(tmp_path / "a.concepts.npz")
    assert arrays["offsets"].tolist() == [0, 2]
    np.savez(tmp_path / "a.concepts.npz", **{**arrays, name: np.array(value)})
    check_made_again(path, arrays)


@pytest.mark.parametrize("change", ["bank", "parser", "tar"])
def test_concepts_of_something_else(tmp_path, change):
    """Concepts of another bank, another parser or another state of the tar are refused. The error
    names the command that helps."""
    folder = write_shards(tmp_path / "shards", [2, 2])
    for path in find_shards(folder):
        annotate_tar(path)
    bank = ConceptBank(["dog", "cat"]) if change == "bank" else BANK
    parser = another_parser(tmp_path / "cats") if change == "parser" else "match"
    if change == "tar":
        os.utime(folder / "00001.tar", (1, 1))
    message = (r"0000[01]\.concepts\.npz is of another concept bank or parser, or its tar has "
               rf'changed since; run: python concepts\.py --shards "{folder}" --parser {parser}')
    with pytest.raises(ValueError, match=message):
        opened(folder, bank, parser)
    for path in find_shards(folder):
        annotate_tar(path, bank, load_parser(parser, bank))
    opened(folder, bank, parser)


def test_no_concepts(tmp_path):
    """With another parser than the matcher, a missing or broken concepts file is an error at the
    start that names the command that helps. The matcher needs no such file. If a file is lost
    later, its shard is skipped and counted."""
    folder = write_shards(tmp_path / "shards", [2, 2])
    parser = another_parser(tmp_path / "cats")
    cats = load_parser(parser, BANK)
    annotate_tar(folder / "00000.tar", BANK, cats)
    half = (folder / "00000.concepts.npz").read_bytes()[:100]
    (folder / "00001.concepts.npz").write_bytes(half)
    message = (r"1 of the 2 shards have no concepts yet, the first is .*00001\.tar; "
               rf'run: python concepts\.py --shards "{folder}" --parser {parser}')
    with pytest.raises(FileNotFoundError, match=message):
        load_pairs(folder, BANK, parser, SIZE, SAMPLER)
    annotate_tar(folder / "00001.tar", BANK, cats)
    shards = opened(folder, BANK, parser)
    (folder / "00001.concepts.npz").unlink()
    [state] = shards.begin(1)
    read = list(islice(shards.read(state), 2))
    assert {number_of(item) for item in read} == {0, 1}
    list(islice(shards.read(state), 4))
    counts = state[-len(BAD):]
    assert counts.sum() == counts[BAD.index("no concepts")] > 0


def test_concepts_that_cannot_be_written(tmp_path):
    """Where a concepts file cannot be written there is an error, and nothing half-written is
    left."""
    path = write_tar(tmp_path / "a.tar", sample(1))
    (tmp_path / "a.concepts.npz").mkdir()
    with pytest.raises(OSError):
        annotate_tar(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.concepts.npz", "a.tar"]


def test_command(tmp_path, capsys, forked):
    """The command prints what it prints for the same captions in a file, and what was skipped. The
    second time it only reads what it wrote."""
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
    speed = rf"annotated {len(used)} captions in [\d.]+ s \([\d,]+ captions/s\)\n"
    for first in (speed, ""):
        main(["--shards", str(folder), "--processes", "2", *options])
        rest = re.escape("\n".join([skipped, *expected, ""]))
        assert re.fullmatch(first + rest, capsys.readouterr().out)


def test_command_after_a_kill(tmp_path, capsys, forked):
    """A killed command leaves no process behind and no half-written file under a final name. Run
    again it does not touch what was finished and makes the rest, also what was damaged since."""
    folder = write_shards(tmp_path, [200] * 30,
                          lambda number: [(f"{number}.txt", caption(number % 7).encode())])
    command = [sys.executable, ROOT / "concepts.py", "--shards", folder, "--parser", "match",
               "--processes", "2"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        while len(list(folder.glob("*.concepts.npz"))) < 2 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=60)             # its processes hold the pipe until they end
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.concepts.npz")}
    assert 2 <= len(finished) < 30
    bank = ConceptBank.default()
    annotator = annotation_key(None, bank, load_parser("match", bank))
    for path in finished:
        tar = path.with_name(path.name[:5] + ".tar")
        assert read_sidecar(tar, annotator, len(bank))
    broken, _ = finished.popitem()
    broken.write_bytes(broken.read_bytes()[:-100])
    main(["--shards", str(folder), "--parser", "match", "--processes", "2"])
    assert f"annotated {200 * (30 - len(finished)):,} captions" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    for path in folder.glob("*.tar"):
        offsets, _, bad = read_sidecar(path, annotator, len(bank))
        assert len(offsets) == 201 and bad.sum() == 0


def test_command_errors(tmp_path, monkeypatch, fails, forked):
    """Nothing to annotate, no parser, and a process that died: one line each."""
    class Broken:
        """A pool whose processes die."""
        __init__ = __exit__ = lambda *_: None
        __enter__ = lambda self: self

        def map(self, *_):
            raise BrokenProcessPool

    path = write_tar(tmp_path / "a.tar", [("a.jpg", JPEG)])
    gone = tmp_path / "{1..3}.tar"
    fails(main, ["--shards", tmp_path, "--parser", "match"], f"no captions in {path} and the other")
    fails(main, ["--shards", tmp_path, "--parser", "no_parser"],
          "the parser 'no_parser' could not be loaded")
    fails(main, ["--shards", gone], f"no tar files in {gone}; expected")
    monkeypatch.setattr("machinery.training.workers.ProcessPoolExecutor", Broken)
    fails(main, ["--shards", tmp_path, "--parser", "match"], "a parser process died",
          "Finished shards are kept")


@pytest.mark.parametrize("arguments", [[], ["c.tsv", "--shards", "shards"]])
def test_one_source(arguments, capsys):
    """The command takes a captions file or shards, and exactly one of them."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "--shards" in capsys.readouterr().err
