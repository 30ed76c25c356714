"""Tar shards in img2dataset's layout: the files of a sample share their stem and follow one another."""
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np

MAX_CAPTION = 2000                                  # characters; what is longer is no caption

BAD = ("cut tar", "no concepts", "no image", "bad image", "no caption", "empty caption", "long caption",
       "caption not UTF-8")                         # why samples are skipped, the order of all counts of them



def bad_line(counts):
    """Counts by reason (len(BAD),) in words."""
    return ", ".join(f"{reason} {count:,}" for reason, count in zip(BAD, counts) if count) or "none"



def find_shards(source):
    """Paths of the tars of a folder, or of a name with ranges such as "shards/{00000..41407}.tar"; gaps are reported.

    Raises FileNotFoundError when there is none.
    """
    def expand(name):
        found = re.search(r"\{(\d+)\.\.(\d+)\}", name)
        if not found:
            return [name]
        first, last = found.groups()
        width = max(map(len, found.groups())) if first.startswith("0") and len(first) > 1 else 1
        return [whole for i in range(int(first), int(last) + 1)
                for whole in expand(f"{name[:found.start()]}{i:0{width}}{name[found.end():]}")]

    if Path(source).is_dir():
        paths = sorted(Path(source).glob("*.tar"))
    else:
        paths = [Path(name) for name in dict.fromkeys(expand(str(source)))]
    there = [path for path in paths if path.is_file()]
    if not there:
        raise FileNotFoundError(f"no tar files in {source}; expected those that img2dataset writes, as a folder or as a "
                                'range: "shards/{00000..00295}.tar"')
    if len(there) < len(paths):
        gap = next(path for path in paths if not path.is_file())
        print(f"{len(paths) - len(there):,} of the {len(paths):,} shards of {source} are missing, the first is {gap}")
    return there



def read_samples(tar):
    """Samples of an open tar, in order: (stem, {suffix: TarInfo}). No file's content is read.

    Raises tarfile.ReadError where the tar is cut short; a sample that may have lost files to the cut is not given.
    """
    stem, members = None, {}
    while member := tar.next():
        tar.members = []                            # tarfile would keep them all
        if member.isfile():
            name, suffix = os.path.splitext(member.name)
            if name != stem and members:
                yield stem, members
                members = {}
            stem = name
            members[suffix.lower()] = member
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):     # the mark of a tar's end
        raise tarfile.ReadError("the end of the tar is missing")
    if members:
        yield stem, members



def read_caption(tar, members):
    """Caption of a sample, from its .txt or else its .json: (caption, None), or (None, reason of BAD)."""
    try:
        if ".txt" in members:
            if members[".txt"].size > 4 * MAX_CAPTION:                      # a character is at most 4 bytes
                return None, "long caption"
            caption = tar.extractfile(members[".txt"]).read().decode("utf-8-sig")
        else:
            caption = json.loads(tar.extractfile(members[".json"]).read())["caption"] or ""
            caption.encode()                        # JSON can hold half characters
    except UnicodeError:
        return None, "caption not UTF-8"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):           # no file, or another content
        return None, "no caption"
    if caption.strip() in ("", "None"):             # Python's None, as text
        return None, "empty caption"
    return (caption, None) if len(caption) <= MAX_CAPTION else (None, "long caption")



def read_sidecar(path, annotator, names=("offsets", "rows", "bad")):
    """Arrays of the concepts file beside a tar; None if there is none, or a broken one.

    annotator: `annotation_key` of bank and parser. Raises ValueError if the file is of another bank, parser or tar.
    """
    sidecar = path.with_suffix(".concepts.npz")
    try:
        with np.load(sidecar, allow_pickle=False) as file:
            key, arrays = str(file["key"]), [file[name] for name in names]
    except Exception:                               # a broken file raises almost anything
        return None
    if key != sidecar_key(path, annotator):
        raise ValueError(f"{sidecar} is of another concept bank or parser, or its tar has changed since")
    return arrays



def sidecar_key(path, annotator):
    status = path.stat()
    return f"{annotator} {status.st_size} {status.st_mtime_ns}"
