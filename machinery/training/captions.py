"""Captions files, and annotations as arrays with their cache files."""
import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from machinery.networks.checkpoint import whole_file

MAX_MISSING = 0.01                                  # share of missing images that is no mistake
CONTEXT_LENGTH = 77                                 # CLIP's: tokens, start and end included


def read_captions(path):
    """Read COCO's captions JSON, or TSV / JSONL of (image, caption).

    A TSV may begin with a line "image<tab>caption" (or open_clip's "filepath<tab>title"); lines of
    JSONL are {"image": ..., "caption": ...}. Returns [(image file name, caption)].
    Raises FileNotFoundError; ValueError for a file that is none of these, or is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no captions file {path}. For COCO expected "
            "data/coco/annotations/captions_train2017.json and data/coco/train2017/*.jpg from "
            "https://cocodataset.org/#download (2017 train images, train/val annotations); or pass "
            "--train-data FILE, or --train-data toy, which needs no files")
    readers = {".json": read_coco, ".jsonl": read_jsonl, ".tsv": read_tsv}
    try:
        if path.suffix not in readers:
            raise ValueError("its name must end in .json (COCO), .jsonl or .tsv")
        pairs = readers[path.suffix](path.read_text(encoding="utf-8-sig"))
        if not all(isinstance(cell, str) for pair in pairs for cell in pair):
            raise TypeError("an image name or caption that is no text")
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} is no captions file ({type(error).__name__}: {error}). Expected "
                         "COCO's JSON with 'images' and 'annotations', or rows of image and "
                         "caption") from None
    pairs = [(image, caption) for image, caption in pairs if caption.strip()]
    if not pairs:
        raise ValueError(f"{path} holds no captions; expected at least one pair of image and "
                         "caption")
    return pairs


def read_coco(text):
    content = json.loads(text)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    return [(names[a["image_id"]], a["caption"]) for a in content["annotations"]]


def read_jsonl(text):
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [(row["image"], row["caption"]) for row in rows]


def read_tsv(text):
    rows = [line.split("\t") for line in text.split("\n") if line.strip()]
    if rows and [cell.strip() for cell in rows[0][:2]] in (["image", "caption"],
                                                          ["filepath", "title"]):
        rows = rows[1:]
    return [(row[0], row[1].strip()) for row in rows]


def find_images(path, pairs, images=None):
    """{image name: its path, or None if it is missing} for the pairs of a captions file."""
    folder = path.parent
    if path.suffix == ".json":
        folder = path.parent.parent / path.stem.removeprefix("captions_")
    folder = Path(images or folder)
    if not folder.is_dir():
        coco = " (COCO's photos: https://cocodataset.org/#download)" * (path.suffix == ".json")
        raise FileNotFoundError(f"no image folder {folder}; expected the images that {path} names, "
                                f"for example {folder / pairs[0][0]}. Name the folder with "
                                f"--images{coco}")
    there = {name: folder / name if (folder / name).is_file() else None
             for name in {name for name, _ in pairs}}
    missing = sorted(name for name, file in there.items() if file is None)
    if len(missing) > MAX_MISSING * len(there):
        raise FileNotFoundError(f"{len(missing)} of the {len(there)} images of {path} are not in "
                                f"{folder}, for example {missing[0]}; at most {MAX_MISSING:.0%} "
                                "may be missing. Name the folder with --images")
    if missing:
        print(f"{len(missing)} of {len(there)} images are missing in {folder}; their captions are "
              "skipped")
    return there


# --------------------------------------------------------------------------------------------------
# Annotations: rows[offsets[i]:offsets[i + 1]] are the (concept id, first token, end token) of
# caption i. offsets: (captions + 1,) int32. rows: (occurrences, 3) int32.

def as_arrays(annotations):
    """Lists of rows, one list per caption -> (offsets, rows)."""
    offsets = np.cumsum([0, *map(len, annotations)], dtype=np.int32)
    rows = [row for found in annotations for row in found]
    return offsets, np.array(rows, dtype=np.int32).reshape(-1, 3)


def check_annotations(offsets, rows, bank_size):
    """Raise ValueError if arrays from a file cannot be annotations."""
    integers = offsets.dtype.kind in "iu" and rows.dtype.kind in "iu"
    shaped = offsets.ndim == 1 and rows.ndim == 2 and rows.shape[1] == 3
    if not integers or not shaped or not len(offsets):
        raise ValueError(f"expected integers (K + 1,) and (n, 3), found {offsets.dtype} "
                         f"{offsets.shape} and {rows.dtype} {rows.shape}")
    if offsets[0] != 0 or offsets[-1] != len(rows) or (np.diff(offsets) < 0).any():
        raise ValueError("offsets do not rise from 0 to the number of rows")
    ids, first, end = rows.T
    if len(rows) and not (0 <= ids.min() <= ids.max() < bank_size):
        raise ValueError(f"concept ids {ids.min()}..{ids.max()}, expected 0..{bank_size - 1}")
    if len(rows) and not (1 <= first.min() and (first < end).all() and end.max() < CONTEXT_LENGTH):
        raise ValueError("token positions that no caption has")


def save_arrays(path, **arrays):
    """np.savez, whole or not at all. Raises OSError."""
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def read_cache(path, key, captions, bank_size=None):
    """(offsets, rows, names of an open bank) of a cache file, or None if it is missing, broken or
    of something else.

    key: of `save_cache`. captions: their number. bank_size: None = as many concepts as the file
    names.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            offsets = file["offsets"]
            rows = file["rows"]
            names = [str(name) for name in file["names"]] if bank_size is None else []
        if len(offsets) != captions + 1:
            raise ValueError(f"annotations of {len(offsets) - 1} captions, expected {captions}")
        check_annotations(offsets, rows, len(names) if bank_size is None else bank_size)
    except Exception:                               # a broken file raises almost anything
        return None
    return offsets, rows, names


def save_cache(path, key, offsets, rows, names):
    save_arrays(path, key=key, offsets=offsets, rows=rows, names=np.array(names, dtype=str))


class Annotations:
    """The concepts of captions, by caption, and captions that share one."""

    def __init__(self, offsets, rows):
        self.offsets = offsets
        self.rows = rows

    @cached_property
    def by_concept(self):
        """(numbers of the rows, sorted by concept; their concepts). Most runs never ask for it."""
        order = np.argsort(self.rows[:, 0], kind="stable")
        return order, self.rows[order, 0]

    def of(self, i):
        """Rows (M, 3) int64 tensor of caption i."""
        return torch.from_numpy(self.rows[self.offsets[i]:self.offsets[i + 1]]).long()

    def partner(self, i, rng):
        """(number of a caption that shares a concept with caption i, the concept's id), drawn by
        rng; it may be i itself. None if caption i has no concept."""
        own = np.unique(self.of(i)[:, 0])
        if len(own) == 0:
            return None
        concept = rng.choice(own)
        order, concepts = self.by_concept
        first, last = np.searchsorted(concepts, [concept, concept + 1])
        row = order[rng.integers(first, last)]
        return int(np.searchsorted(self.offsets, row, side="right")) - 1, int(concept)
