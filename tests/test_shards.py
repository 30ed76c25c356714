"""Tars of captioned images: which there are, who reads which, what is read, hostile ones, and the
concepts kept beside them (machinery/training/shards.py, `data.CaptionedTars`, concepts.py)."""
import io
import os
import re
import tarfile
import tracemalloc
from collections import Counter
from itertools import islice, takewhile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from concepts import ConceptBank, Concepts, annotate, main
from conftest import parser_of_cats, seen, write_tar
from data import CaptionedTars, Pair, draw_sample, load_pairs, open_loader
from machinery.images import load_image, to_pixels
from machinery.tokenizer import forget_words, tokenize, tokenizer
from machinery.training.shards import BAD, captions_of_tar, find_tars, samples_of_tar

BANK = ConceptBank(["dog", "cat", "grass"])
MATCH = Concepts(BANK, "match")
SIZE = 16                                           # pixels a side of the crops


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


def sample(number):
    """The files of a good sample."""
    return [(f"{number:09}.jpg", picture(number)), (f"{number:09}.txt", caption(number).encode())]


def write_tars(folder, counts, make=sample):
    """Tars 00000.tar ... with that many samples each, numbered from one tar to the next."""
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
    return load_pairs(source, Concepts(bank, parser), seen, SIZE, seed=seed)


def stream(source, local_batch=4, rank=0, world=1, workers=0, positions=None):
    """(batches, positions at their beginning) of one process, as train.py reads them."""
    pairs = opened(source)
    run = SimpleNamespace(batch=local_batch * world, micro_batch=None, workers=workers,
                          timeout_minutes=5)
    processes = SimpleNamespace(rank=rank, world=world, device_type="cpu")
    loader = open_loader(pairs, run, processes, range(10 ** 6), positions)
    return iter(loader), pairs.positions


def first_epoch(source, pairs=None):
    """(items of one reader's first epoch, bad samples by reason)."""
    pairs = pairs or opened(source)
    found = list(islice(takewhile(lambda item: item["key"][0] < 2, pairs), 1000))
    items = [item for item in found if item["key"][0] == 0]
    again = found[len(items)] if len(found) > len(items) else None      # counts come with an item
    bad = sum(item["bad"] for item in items) + (again["bad"] if again else 0)
    return items, bad


def reasons(*names):
    """Counts of bad samples, of these reasons."""
    return [names.count(reason) for reason in BAD]


def annotations(*captions):
    """Rows of each caption, as lists."""
    return [[list(row) for row in rows] for rows in annotate(captions, BANK, "match")]


def same(batch, other):
    """Whether two batches agree in everything."""
    return batch.keys() == other.keys() and all(torch.equal(batch[key], other[key])
                                                for key in batch)


# --------------------------------------------------------------------------------------------------
# Which tars there are

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
    assert find_tars(tmp_path / pattern) == [tmp_path / name for name in names]
    assert capsys.readouterr().err == ""


def test_gaps(tmp_path, capsys):
    """Missing tars are counted and reported, and the others are used."""
    for i in (1, 4):
        write_tar(tmp_path / f"{i:02}.tar", [])
    pattern = tmp_path / "{00..04}.tar"
    assert find_tars(pattern) == [tmp_path / "01.tar", tmp_path / "04.tar"]
    gap = tmp_path / "00.tar"
    message = f"3 of the 5 tars of {pattern} are missing, the first is {gap}\n"
    assert capsys.readouterr().err == message


def test_folder_of_tars(tmp_path):
    """Of a folder all tars are taken, with any name, and no other file that img2dataset writes, nor
    a hidden one."""
    for name in ("a b.tar", "00007.tar", "x.y.tar", "00007_stats.json", "00007.parquet",
                 "._00007.tar"):
        write_tar(tmp_path / name, [])
    assert [path.name for path in find_tars(tmp_path)] == ["00007.tar", "a b.tar", "x.y.tar"]
    assert opened(tmp_path).paths == find_tars(tmp_path)


@pytest.mark.parametrize("source", ["{0..3}.tar", "{3..0}.tar", "a.tar"])
def test_no_tars(tmp_path, source):
    """Without a single tar the error says what was looked for and what is expected."""
    source = tmp_path / source
    message = re.escape(f"no tar files in {source}; ") + "expected .* a range: "
    with pytest.raises(FileNotFoundError, match=message):
        opened(source)


# --------------------------------------------------------------------------------------------------
# Which process reads what

@pytest.mark.parametrize("world, workers, counts", [
    (1, 0, [5, 3, 4]), (1, 2, [6, 2]), (2, 2, [9, 1, 1, 2]), (3, 2, [8, 9, 7, 1]),
    (2, 3, [2, 3, 1, 4, 2, 3, 1, 2, 5, 1, 1, 1, 2]), (2, 1, [3, 1, 7, 2, 2]), (1, 3, [2, 0, 5])])
def test_every_sample_once_an_epoch(tmp_path, world, workers, counts):
    """All readers together read every sample exactly once in every epoch. This holds too where tars
    cannot be divided evenly, for fewer tars than data workers, and for empty tars."""
    write_tars(tmp_path, counts)
    found = Counter()
    for rank in range(world):
        pairs = opened(tmp_path)
        pairs.deal(rank, world, workers)
        for position in pairs.positions.tolist():
            pairs.positions = torch.tensor([position])      # as if this reader were the only one
            read = list(takewhile(lambda item: item["key"][0] < 4, pairs))
            assert read
            found.update((int(item["key"][0]), number_of(item)) for item in read)
    assert found == {(epoch, number): 1 for epoch in range(4) for number in range(sum(counts))}


def test_hidden_files_in_a_tar(tmp_path):
    """What macOS puts into a tar beside each file is no sample; a tar of "." is read."""
    files = [(f"./{before}{name}", content) for name, content in sample(0) + sample(1)
             for before in ("._", "", ".ipynb_checkpoints/")]
    samples = list(samples_of_tar(write_tar(tmp_path / "a.tar", files)))
    assert [text for text, _ in samples] == [caption(0), caption(1)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")   # more workers than cores
def test_data_workers(tmp_path):
    """Two data workers read tars of their own, batch by batch in turn; a third, for which there is
    no tar, is not started."""
    write_tars(tmp_path, [4, 4])
    batches, _ = stream(tmp_path, 2, workers=3)
    keys = [next(batches)["key"].tolist() for _ in range(4)]
    tars = [{(epoch, tar) for epoch, tar, _ in batch} for batch in keys]
    assert tars[0] == tars[2] != tars[1] == tars[3] and len(batches._workers) == 2
    assert {(epoch, tar) for one in tars for epoch, tar in one} == {(0, 0), (0, 1)}


def test_fewer_tars_than_processes(tmp_path):
    """No tar is read by two processes: fewer tars than processes are an error."""
    write_tars(tmp_path, [4, 4])
    with pytest.raises(ValueError, match="2 tars for 3 processes; .* expected at least 3"):
        stream(tmp_path, rank=1, world=3)


def test_order(tmp_path):
    """The order of the tars differs between epochs and between seeds. The same seed gives the same
    order."""
    write_tars(tmp_path, [1] * 12)

    def order(seed):
        items = list(islice(opened(tmp_path, seed=seed), 36))
        return [tuple(map(number_of, items[start:start + 12])) for start in (0, 12, 24)]

    first = order(0)
    assert len({*first, *order(1)}) == 6 and order(0) == first


def test_items(tmp_path):
    """An item has the crop of its image, seeded by its place, its tokens and the concepts of its
    caption; and it can be found again."""
    write_tars(tmp_path, [3, 3])
    pairs = opened(tmp_path, seed=5)
    for item in islice(pairs, 12):                  # two epochs
        number = number_of(item)
        epoch, tar, place = item["key"].tolist()
        assert number == 3 * tar + place
        assert pairs.name(item["key"]) == f"{tmp_path}/{tar:05}.tar, sample {place}"
        pair = Pair(io.BytesIO(picture(number)), SIZE, caption(number))
        crop = draw_sample(lambda pair, rng: pair.crop(rng), pair, (5, epoch, tar, place))
        assert torch.equal(item["pixels"], crop)
        assert [item["concepts"].tolist()] == annotations(caption(number))
        assert item["concepts"].dtype == torch.int64 and not item["bad"].any()
    assert epoch == 1


# --------------------------------------------------------------------------------------------------
# Samples that cannot be used

JPEG = picture(1)


def test_images_alone(tmp_path):
    """Tars of images alone are training data of a method that asks for no caption; for another they
    are samples without caption. There are no partners in tars."""
    write_tars(tmp_path, [3], lambda number: sample(number)[:1])

    def sample_of(pair, rng):
        assert pair.partner(rng) is None and pair.path is None
        return {"pixels": to_pixels(pair.image())}
    found, bad = first_epoch(None, load_pairs(tmp_path, None, sample_of, SIZE))
    expected = [to_pixels(load_image(io.BytesIO(picture(number)))) for number in range(3)]
    assert all(map(torch.equal, [item["pixels"] for item in found], expected)) and not bad.any()
    with pytest.raises(ValueError, match="no usable pair for long, .*: no caption "):
        next(iter(opened(tmp_path)))


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
    used with the concepts of their own captions, with and without a cache of concepts."""
    path = write_tar(tmp_path / "a.tar", sample(1) + files + sample(2))
    if annotated:
        _, counts, _ = MATCH.cache_tar(path)
        assert counts.tolist() == reasons(*[reason] * ("image" not in reason))
    read, bad = first_epoch(tmp_path)
    assert [number_of(item) for item in read] == [1, 2]
    assert [item["bad"].tolist() for item in read] == [reasons(), reasons(reason)]
    found = [item["concepts"].tolist() for item in read]
    assert found == annotations(caption(1), caption(2))
    assert bad.tolist() == reasons(reason)


@pytest.mark.parametrize("files", [
    with_files((".jpg", picture(1, mode="CMYK")), (".txt", b"a dog")),
    with_files((".JPG", JPEG), (".TXT", b"a dog")),
    with_files((".jpg", picture(1, mode="L")), (".txt", b"a dog")),
    with_files((".txt", b"a dog"), (".jpg", JPEG)),
    with_files((".png", picture(1, "PNG")), (".txt", b"a dog")),
    with_files((".txt", b"a dog"), (".webp", picture(1, "WEBP"))),
    with_files((".json", b'{"caption": "a dog", "url": null}'), (".jpg", JPEG)),
    with_files((".jpg", JPEG), (".json", b'{"caption": "a cat"}'), (".txt", b"a dog")),
    with_files((".jpg", JPEG), (".txt", "\ufeffa dog".encode())),
    with_files((".jpg", JPEG), (".txt", b"a dog" + b" " * 1995)),
    [("some/folder/a.b.jpg", JPEG), ("some/folder/a.b.txt", b"a dog")]])
def test_unusual_samples(tmp_path, files):
    """These are used: CMYK and grey photos, other formats, other orders, a caption in the JSON
    only, names with dots and folders."""
    write_tar(tmp_path / "a.tar", sample(1) + files + sample(2))
    read, bad = first_epoch(tmp_path)
    expected = [tokenize(text).tolist() for text in (caption(1), "a dog", caption(2))]
    assert [item["tokens"].tolist() for item in read] == expected and not bad.any()


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
    """Of a tar that ends too early, at any place, the samples that are surely whole are used, in
    training and for their concepts. The cut is counted."""
    write_tars(tmp_path, [4, 4])
    path = tmp_path / "00000.tar"
    path.write_bytes(path.read_bytes()[:place])
    read, bad = first_epoch(tmp_path)
    assert sorted(map(number_of, read)) == [*range(whole), 4, 5, 6, 7]
    assert bad.sum() == bad[BAD.index("cut tar")] in (1, 2)     # the second epoch was begun
    *captions, cut = captions_of_tar(path)
    assert captions == [caption(i) for i in range(whole)] and str(cut) == "cut tar"
    assert MATCH.cache_tar(path)[1].tolist() == reasons("cut tar")


def test_damage_in_the_middle(tmp_path):
    """A tar whose headers are damaged in the middle is counted as cut there: the damage is not
    taken for the tar's end. So is a tar that is gone."""
    raw = write_tar(tmp_path / "a.tar", sample(0) + sample(1) + sample(2)).read_bytes()
    second = raw.index(b"000000001.jpg")
    (tmp_path / "a.tar").write_bytes(raw[:second] + b"\xff" * 512 + raw[second + 512:])
    write_tar(tmp_path / "b.tar", sample(3))
    pairs = opened(write_tar(tmp_path / "c.tar", sample(4)).parent)
    (tmp_path / "c.tar").unlink()
    read, bad = first_epoch(None, pairs)
    assert [number_of(item) for item in read] == [3] and bad[BAD.index("cut tar")] >= 2


def test_nothing_but_bad_samples(tmp_path):
    """Data without a single usable pair ends in an error that says why, in words of the reasons
    that occurred. The search is not endless."""
    write_tar(tmp_path / "a.tar", [("a.jpg", JPEG), ("b.txt", b"a dog")])
    with pytest.raises(ValueError, match=r"no usable pair for long, now in .*a\.tar; left out "
                                         r"since the last one: no image \d+, no caption \d+$"):
        next(iter(opened(tmp_path)))


# --------------------------------------------------------------------------------------------------
# Tars whose headers claim gigabytes

GIGA = 8 * 2 ** 30


def claimed(name, size, kind=tarfile.REGTYPE):
    """A header that claims a size."""
    member = tarfile.TarInfo(name)
    member.size = size
    member.type = kind
    return member.tobuf(tarfile.GNU_FORMAT)


def pad(content):
    return content + bytes(-len(content) % 512)


def sparse(name):
    """A sparse file of 8 GB: one that has a single byte on disk."""
    content = f"1\n{GIGA - 1}\n1\n".encode()
    member = tarfile.TarInfo(name)
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                          "GNU.sparse.name": name, "GNU.sparse.realsize": str(GIGA)}
    member.size = 512 + 1
    return member.tobuf(tarfile.PAX_FORMAT) + pad(pad(content) + b"x")


def peak_memory(function):
    """Bytes that Python allocates at the peak of a call, the lower of two: threads that other tests
    left behind may allocate meanwhile."""
    peaks = []
    for _ in range(2):
        tracemalloc.start()
        function()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return min(peaks)


@pytest.mark.parametrize("header", [
    claimed("b.jpg", GIGA), claimed("b.txt", GIGA), claimed("b.json", GIGA), sparse("b.jpg"),
    sparse("b.txt"), claimed("././@LongLink", GIGA, tarfile.GNUTYPE_LONGNAME),
    claimed("pax", GIGA, tarfile.XHDTYPE), claimed("pax", 2 ** 62, tarfile.XHDTYPE)],
    ids=["image", "text", "json", "sparse image", "sparse text", "long name", "pax", "huge pax"])
def test_headers_that_claim_gigabytes(tmp_path, header):
    """Such a sample counts as bad, or the tar as cut there; what stands before it is used, and
    memory stays small, in training and for the concepts."""
    good = write_tar(tmp_path / "a.tar", sample(1)).read_bytes()
    end = good.rindex(b"000000001.txt") + 1024      # the samples without the end of the tar
    (tmp_path / "a.tar").write_bytes(good[:end] + header + bytes(1024))
    write_tar(tmp_path / "b.tar", sample(2))
    pairs = opened(tmp_path)
    assert peak_memory(lambda: list(islice(pairs, 2))) < 100 * 2 ** 20
    assert peak_memory(lambda: list(samples_of_tar(tmp_path / "a.tar"))) < 100 * 2 ** 20
    assert peak_memory(lambda: MATCH.cache_tar(tmp_path / "a.tar")) < 100 * 2 ** 20


def test_tar_members_are_forgotten(tmp_path):
    """A tar's list of members stays short: memory does not grow with the number of samples."""
    def peak(count):
        path = write_tar(tmp_path / "a.tar", [(f"{i}.txt", b"a dog") for i in range(count)])
        return peak_memory(lambda: sum(1 for _ in captions_of_tar(path)))
    peak(10)                                        # imports, and caches of regular expressions
    assert peak(4000) < peak(100) + 200_000         # bytes; a member needs about 1,000


def test_words_are_forgotten(tmp_path):
    """The tokenizer's memory of words is emptied when it has grown large, in training and in
    annotating. Afterwards it still knows its marks for the start and end of a text."""
    path = write_tar(tmp_path / "a.tar", sample(0))
    marked = tokenize("a dog <end_of_text> <start_of_text>")
    pairs = CaptionedTars([path], lambda pair, rng: {"tokens": pair.tokens()}, SIZE)
    for forget in (forget_words, lambda: MATCH.cache_tar(path), lambda: list(islice(pairs, 2))):
        tokenizer().cache.update({f"word{i}": f"word{i}</w>" for i in range(500_001)})
        forget()
        assert len(tokenizer().cache) < 100
    assert tokenize("a dog <end_of_text> <start_of_text>").tolist() == marked.tolist()


# --------------------------------------------------------------------------------------------------
# Interruption

def flawed(number):
    """A sample. Every fifth one is without its caption."""
    return sample(number)[:1 if number % 5 == 3 else 2]


def go_on(folder, done, world, workers, then):
    """Keys of (samples before an interruption, those of a run that goes on), of all processes: the
    first has `done` of each process, the second 60. then: (world, workers) of the second."""
    positions = []
    before = []
    for rank in range(world):
        batches, reached = stream(folder, 1, rank, world, workers)
        for batch in islice(batches, done):
            before.append(tuple(batch["key"][0].tolist()))
            reader, position = batch["position"]
            reached[reader] = position
        positions.append(reached)
    after = []
    for rank in range(then[0]):
        batches, _ = stream(folder, 1, rank, *then, torch.stack(positions))
        after += [tuple(batch["key"][0].tolist()) for batch in islice(batches, 60 // then[0])]
    return before, after


@pytest.mark.filterwarnings("ignore:This DataLoader will create")   # more workers than cores
@pytest.mark.parametrize("done, world, workers, then", [
    (0, 1, 0, (1, 0)), (7, 1, 0, (1, 0)), (14, 1, 0, (1, 0)), (9, 1, 2, (1, 2)), (5, 2, 0, (2, 0)),
    (6, 2, 2, (2, 2)), (9, 1, 2, (1, 0)), (5, 2, 0, (1, 2)), (8, 1, 0, (2, 0))])
def test_resume(tmp_path, done, world, workers, then):
    """After an interruption the tars in work begin again, from their first sample; finished ones do
    not, and no sample of the epoch is left out. With another number of processes or workers a
    finished tar may come again."""
    folder = write_tars(tmp_path, [4, 3, 5, 2, 4], flawed)
    good = Counter(int(item["key"][1]) for item in first_epoch(folder)[0])  # tar: its good samples
    before, after = go_on(folder, done, world, workers, then)
    first_pass = {key for key in [*before, *after] if key[0] == 0}
    assert Counter(tar for _, tar, _ in first_pass) == good
    twice = {key[:2] for key in set(before) & set(after)}
    if then == (world, workers):                    # a tar in work for each reader
        assert len(twice) <= world * max(1, workers)
    for tar in twice:                               # from the first sample on
        assert sum(key[:2] == tar for key in set(after)) == good[tar[1]]


# --------------------------------------------------------------------------------------------------
# Concepts beside a tar

def damaged(folder):
    """Three tars with samples of every kind. The last tar is cut."""
    write_tars(folder, [9, 6, 8], flawed)
    last = folder / "00002.tar"
    last.write_bytes(last.read_bytes()[:len(last.read_bytes()) // 2])
    return folder


def test_cached_concepts_equal_the_matcher(tmp_path):
    """Batches with concepts and tokens from the caches are in everything the batches with those
    that are found while reading; and they do come from the caches."""
    folder = damaged(tmp_path)
    live = list(islice(stream(folder)[0], 12))
    for path in find_tars(folder):
        MATCH.cache_tar(path)
    assert all(map(same, islice(stream(folder)[0], 12), live))
    for path in folder.glob("*.npz"):
        arrays = stored_arrays(path)
        np.savez(path, **{**arrays, "rows": np.zeros_like(arrays["rows"]) + [2, 1, 2],
                          "tokens": np.full_like(arrays["tokens"], 9)})
    item = next(stream(folder)[0])
    assert item["concepts"][0, 0].tolist() == [2, 1, 2]
    assert item["tokens"].unique().tolist() == [0, 9]


def test_cache_of_a_tar(tmp_path):
    """A tar's cache has an offset for each sample, usable or not, and plain arrays only."""
    path = write_tar(tmp_path / "a.b.tar",
                     sample(1) + with_files((".jpg", JPEG)) + sample(2))
    for parsed in (2, 0):                           # the second time it is there
        _, bad, captions = MATCH.cache_tar(path)
        assert bad.tolist() == reasons("no caption") and captions == parsed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.b.tar",
                                                                "a.b.tar.concepts.npz"]
    arrays = stored_arrays(tmp_path / "a.b.tar.concepts.npz")
    assert arrays["offsets"].tolist() == [0, 2, 2, 3]
    assert arrays["rows"].tolist() == sum(annotations(caption(1), caption(2)), [])


def stored_arrays(cache):
    with np.load(cache, allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("change", ["bank", "parser", "tar", "no cache", "half a cache"])
def test_no_concepts_yet(tmp_path, change):
    """Without concepts of this bank, this parser and this state of the tar training does not start.
    The error names the command that helps, and then it does."""
    folder = write_tars(tmp_path / "tars", [2, 2])
    parser = parser_of_cats(tmp_path / "cats")
    cats = Concepts(BANK, parser)
    for path in find_tars(folder):
        (MATCH if change == "parser" else cats).cache_tar(path)
    bank = ConceptBank(["dog", "cat"]) if change == "bank" else BANK
    cache = folder / "00001.tar.concepts.npz"
    if change == "tar":
        os.utime(folder / "00001.tar", (1, 1))
    elif change == "no cache":
        cache.unlink()
    elif change == "half a cache":
        cache.write_bytes(cache.read_bytes()[:100])
    count = 2 if change in ("bank", "parser") else 1
    message = (rf"{count} of the 2 tars have no concepts yet, .* the first is .*0000{2 - count}"
               rf'\.tar\. Run: python concepts\.py "{folder}" --parser {parser} .*--parser match')
    with pytest.raises(FileNotFoundError, match=message):
        opened(folder, bank, parser)
    for path in find_tars(folder):
        Concepts(bank, parser).cache_tar(path)
    assert len(list(islice(opened(folder, bank, parser), 4))) == 4


def test_a_cache_that_is_lost(tmp_path):
    """If a cache is lost in training, the samples of its tar are left out and counted."""
    folder = write_tars(tmp_path / "tars", [2, 2])
    parser = parser_of_cats(tmp_path / "cats")
    for path in find_tars(folder):
        Concepts(BANK, parser).cache_tar(path)
    pairs = opened(folder, BANK, parser)
    (folder / "00001.tar.concepts.npz").unlink()
    read, bad = first_epoch(None, pairs)
    assert {number_of(item) for item in read} == {0, 1}
    assert bad.sum() == bad[BAD.index("no concepts")] > 0


def test_command(tmp_path, capsys):
    """The command prints what it prints for the same captions in a file, and what was left out. The
    second time it only reads what it wrote."""
    folder = damaged(tmp_path / "tars")
    (tmp_path / "bank.txt").write_text("dog\ncat\ngrass\n")
    whole = sum(1 for _ in captions_of_tar(folder / "00002.tar")) - 1       # before the cut
    used = [i for i in range(15 + whole) if i % 5 != 3]
    (tmp_path / "c.tsv").write_text("".join(f"{i}.jpg\t{caption(i)}\n" for i in used))
    options = ["--parser", "match", "--bank", str(tmp_path / "bank.txt")]
    main([str(tmp_path / "c.tsv"), *options])
    expected = capsys.readouterr().out.splitlines()[1:]
    left_out = f"3 tars; skipped samples: cut tar 1, no caption {15 + whole - len(used)}"
    speed = rf"annotated {len(used)} captions in [\d.]+ s \([\d,]+ captions/s\)\n"
    for first in (speed, ""):
        main([str(folder), "--processes", "2", *options])
        rest = re.escape("\n".join([left_out, *expected, ""]))
        assert re.fullmatch(first + rest, capsys.readouterr().out)


def test_all_nouns_of_tars(tmp_path, capsys):
    """--all-nouns takes tars as well, and leaves no caches."""
    folder = damaged(tmp_path / "tars")
    main([str(folder), "--parser", parser_of_cats(tmp_path / "cats"), "--all-nouns"])
    assert capsys.readouterr().out == "cat\n" and not list(folder.glob("*.npz"))


def test_command_goes_on(tmp_path, capsys):
    """After an interruption the command does not touch what was finished, and makes the rest, also
    what was damaged since."""
    folder = write_tars(tmp_path, [3, 3, 3, 0, 3])              # a tar may be empty
    concepts = Concepts(ConceptBank.default(), "match")
    for path in find_tars(folder)[:2]:
        concepts.cache_tar(path)
    damaged, finished = sorted(folder.glob("*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    time = finished.stat().st_mtime_ns
    main([str(folder), "--parser", "match", "--processes", "2"])
    assert "annotated 9 captions" in capsys.readouterr().out
    assert finished.stat().st_mtime_ns == time
    assert [len(concepts.of_tar(path)[0]) for path in find_tars(folder)] == [3, 3, 3, 0, 3]


def test_command_errors(tmp_path, fails):
    """Nothing to annotate, no parser, no tars: one line each."""
    path = write_tar(tmp_path / "a.tar", [("a.jpg", JPEG)])
    gone = tmp_path / "{1..3}.tar"
    fails(main, [tmp_path, "--parser", "match"], f"no captions in {path} and the other")
    fails(main, [tmp_path, "--parser", "no_parser"], "the parser 'no_parser' could not be loaded")
    fails(main, [gone], f"no tar files in {gone}; expected")
