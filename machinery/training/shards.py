"""Tars of captioned images in img2dataset's layout: finding and reading them.

The files of a sample share their stem and follow one another: 000000012.jpg, 000000012.txt,
000000012.json. A tar comes from anywhere: no more is read than a sample needs, whatever its headers
claim.
"""
import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np

from machinery.images import IMAGE_SUFFIXES, is_hidden

MAX_CAPTION = 2000                                  # characters; a longer text is no caption
MAX_IMAGE = 100 * 2 ** 20                           # bytes; a header may claim any size
# Why samples are left out, in the order of their counts
BAD = ("cut tar", "no concepts", "no image", "bad image", "no caption", "empty caption",
       "long caption", "caption not UTF-8", "no mask")
BROKEN = (tarfile.TarError, ValueError, EOFError, OverflowError, MemoryError, RecursionError)


class BadSample(ValueError):
    """Why a sample is of no use: its message is one of BAD."""


def count_bad(errors):
    """Counts by reason, (len(BAD),) int64. errors: exceptions; those that are no `BadSample` were
    raised by an image."""
    bad = np.zeros(len(BAD), np.int64)
    for error in errors:
        bad[BAD.index(str(error) if isinstance(error, BadSample) else "bad image")] += 1
    return bad


def bad_line(bad):
    """Counts by reason, (len(BAD),), in words."""
    return ", ".join(f"{reason} {count:,}" for reason, count in zip(BAD, bad) if count) or "none"


# --------------------------------------------------------------------------------------------------
# Which tars there are

def is_tars(source):
    """Whether a data source means tars: a name, perhaps with ranges, or a folder that has some."""
    return Path(source).suffix == ".tar" or bool(tars_in(source))


def tars_in(folder):
    return sorted(path for path in Path(folder).glob("*.tar") if not is_hidden(path.name))


def find_tars(source):
    """Paths of the tars in a folder, or of a name with ranges: "shards/{00000..41407}.tar".

    Missing ones are reported. Raises FileNotFoundError when there is none.
    """
    if Path(source).is_dir():
        paths = tars_in(source)
    else:
        paths = [Path(name) for name in dict.fromkeys(expand_ranges(str(source)))]
    there = [path for path in paths if path.is_file()]
    if not there:
        raise FileNotFoundError(f"no tar files in {source}; expected those that img2dataset "
                                'writes, as a folder or as a range: "shards/{00000..00295}.tar"')
    if len(there) < len(paths):
        gap = next(path for path in paths if not path.is_file())
        print(f"{len(paths) - len(there):,} of the {len(paths):,} tars of {source} are missing, "
              f"the first is {gap}", file=sys.stderr)
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


# --------------------------------------------------------------------------------------------------
# Samples of a tar. In place of what cannot be used stands a `BadSample`.

def captions_of_tar(path):
    """Captions of a tar's samples, in order: str, or `BadSample`. Where the tar is cut short a
    `BadSample` stands for the rest, and for the sample that may have lost files to the cut."""
    try:
        for tar, members in _samples(path):
            yield _caption(tar, members)
    except BROKEN:
        yield BadSample("cut tar")


def samples_of_tar(path):
    """(caption, image) of a tar's samples, in order: str and open file, or `BadSample`; the cut as
    in `captions_of_tar`. A tar that can no longer be read is cut, too."""
    try:
        for tar, members in _samples(path):
            yield _caption(tar, members), _image(tar, members)
    except (*BROKEN, OSError):
        yield BadSample("cut tar"), BadSample("cut tar")


def _caption(tar, members):
    """Caption of a sample, from its .txt or else its .json, or `BadSample`."""
    try:
        if ".txt" in members:
            if members[".txt"].size > 4 * MAX_CAPTION:      # bytes; a character has at most 4
                return BadSample("long caption")
            caption = _content(tar, members[".txt"]).decode("utf-8-sig")
        else:
            caption = json.loads(_content(tar, members[".json"]))["caption"]
        return usable_caption(caption)
    except UnicodeError:
        return BadSample("caption not UTF-8")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return BadSample("no caption")              # no file, or another content


def usable_caption(caption):
    """A caption, a text or None, or `BadSample`. Raises AttributeError for anything else."""
    caption = caption or ""
    try:
        caption.encode()                            # JSON can hold half characters
    except UnicodeError:
        return BadSample("caption not UTF-8")
    if caption.strip() in ("", "None"):             # Python's None, as text
        return BadSample("empty caption")
    return caption if len(caption) <= MAX_CAPTION else BadSample("long caption")


def _image(tar, members):
    """Open file of a sample's image, or `BadSample`."""
    images = [members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members]
    if not images:
        return BadSample("no image")
    try:
        return io.BytesIO(_content(tar, images[0]))
    except ValueError:
        return BadSample("bad image")


def _content(tar, member):
    """Bytes of a file in a tar. Raises ValueError where its header claims more than MAX_IMAGE, and
    for a sparse file, whose size on disk says nothing."""
    if member.size > MAX_IMAGE or member.issparse():
        raise ValueError(f"{member.name} claims {member.size:,} bytes")
    return tar.extractfile(member).read()


def _samples(path):
    """(open tar, {suffix: its header}) of each sample of an uncompressed tar."""
    stem = None
    members = {}
    with _BoundedFile(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            tar.members = []                        # tarfile would keep them all
            if member.isfile() and not is_hidden(member.name):
                name, suffix = os.path.splitext(member.name)
                if name != stem and members:
                    yield tar, members
                    members = {}
                stem = name
                members[suffix.lower()] = member
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):    # marks a tar's end
            raise tarfile.ReadError("the end of the tar is missing")
        if members:
            yield tar, members


class _BoundedFile(io.BufferedReader):
    """A file that reads no more at once than it has, and never more than MAX_IMAGE bytes: tarfile
    reads long names and pax headers of any size that a tar claims."""

    def __init__(self, path):
        super().__init__(io.FileIO(path))
        self.size = os.path.getsize(path)

    def read(self, size=-1):
        left = min(max(0, self.size - self.tell()), MAX_IMAGE)
        return super().read(left if size < 0 else min(size, left))
