"""Captions files, and the concepts found in captions with their cache beside the source."""
import csv
import io
import json
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from machinery.files import whole_file
from machinery.tokenizer import CONTEXT_LENGTH
from machinery.training.shards import BadSample, bad_line, count_bad, usable_caption

ARRAYS = ("offsets", "rows", "token_offsets", "tokens")     # of `Annotations`
MAX_MISSING = 0.01                                  # fraction of missing images that is no mistake


def read_captions(path):
    """Read COCO's captions JSON, or TSV / JSONL of (image, caption).

    A TSV may begin with a line "image<tab>caption" (or open_clip's "filepath<tab>title"), and have
    quotes as pandas writes them; lines of JSONL are {"image": ..., "caption": ...}. Returns [(image
    file name, caption)]. Captions that are no use are left out and counted, by the rules of tars,
    as are COCO's captions of images that it does not list.
    Raises FileNotFoundError; ValueError for a file that is none of these, or is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no captions file {path}. For COCO expected "
            "data/coco/annotations/captions_train2017.json and data/coco/train2017/*.jpg from "
            "https://cocodataset.org/#download (2017 train images, train/val annotations), or your "
            "own .json, .jsonl or .tsv; train.py --recipe toy needs no files")
    readers = {".json": read_coco, ".jsonl": read_jsonl, ".tsv": read_tsv}
    try:
        if path.suffix not in readers:
            raise ValueError("its name must end in .json (COCO), .jsonl or .tsv")
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        # A carriage return alone ends a line only where nothing else does
        pairs = readers[path.suffix](text.replace("\r", " " if "\n" in text else "\n"))
        if not all(isinstance(cell, str | None) for pair in pairs for cell in pair):
            raise TypeError("an image name or caption that is no text")
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} is no captions file ({type(error).__name__}: {error}). Expected "
                         "COCO's JSON with 'images' and 'annotations', or rows of image and "
                         "caption") from None
    checked = [(image, usable_caption(caption) if image else BadSample("no image"))
               for image, caption in pairs]
    pairs = [(image, caption) for image, caption in checked if isinstance(caption, str)]
    if len(pairs) < len(checked):
        bad = count_bad([caption for _, caption in checked if not isinstance(caption, str)])
        print(f"{path}: captions left out: {bad_line(bad)}", file=sys.stderr)
    if not pairs:
        raise ValueError(f"{path} holds no captions; expected at least one pair of image and "
                         "caption")
    return pairs


def read_coco(text):
    content = json.loads(text)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    return [(names.get(a["image_id"]), a["caption"]) for a in content["annotations"]]


def read_jsonl(text):
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [(row["image"], row["caption"]) for row in rows]


def read_tsv(text):
    rows = quoted_rows(text) if '"' in text else None
    rows = rows or [line.split("\t") for line in text.split("\n") if line.strip()]
    columns = min(map(len, rows), default=2)        # more cells in a row: tabs in its caption
    pairs = [(row[0], " ".join(row[1:len(row) - columns + 2]).strip()) for row in rows]
    if columns < 2:
        first = next(row[0] for row in rows if len(row) < 2)
        raise ValueError(f"no tab between image and caption in the row {first[:60]!r}")
    return pairs[pairs[:1] in ([("image", "caption")], [("filepath", "title")]):]


def quoted_rows(text):
    """Rows of a TSV in which cells with quotes or line breaks stand in quotes; None where quotes
    are characters like others."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        rows = [row for row in csv.reader(io.StringIO(text, ""), "excel-tab", strict=True)
                if "".join(row).strip()]
    except csv.Error:
        return None
    # A quote left open runs over rows, tabs included, to the next one
    is_open = any("\n" in cell and "\t" in cell for row in rows for cell in row)
    return None if is_open else rows


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
             for name in dict(pairs)}
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
# Concepts found in captions

class Annotations:
    """The concepts and tokens of a source's captions, by caption, and captions that have a concept
    in common.

    rows: (occurrences, 3) integers, of (concept id, first token, end token).
    offsets: (captions + 1,) integers; rows[offsets[i]:offsets[i + 1]] are those of caption i.
    tokens: (all,) uint16, of all captions, each from its start token to its end token.
    token_offsets: (captions + 1,) integers, likewise.
    """

    def __init__(self, offsets, rows, token_offsets, tokens):
        self.offsets = offsets
        self.rows = rows
        self.token_offsets = token_offsets
        self.tokens = tokens

    @classmethod
    def of_lists(cls, found):
        """From (list of rows, token ids) of each caption, maybe of none."""
        found = list(found)
        rows = [rows for rows, _ in found]
        tokens = [np.asarray(ids, np.uint16) for _, ids in found]
        return cls(np.cumsum([0, *map(len, rows)], dtype=np.int32),
                   np.array([row for one in rows for row in one], np.int32).reshape(-1, 3),
                   np.cumsum([0, *map(len, tokens)]),
                   np.concatenate([np.zeros(0, np.uint16), *tokens]))

    def __len__(self):
        return len(self.offsets) - 1

    def of(self, i):
        """Rows (M, 3) int64 tensor of caption i."""
        return torch.from_numpy(self.rows[self.offsets[i]:self.offsets[i + 1]]).long()

    def tokens_of(self, i):
        """(77,) int64 of caption i, as `tokenize` gives them."""
        ids = self.tokens[self.token_offsets[i]:self.token_offsets[i + 1]]
        padded = np.zeros(CONTEXT_LENGTH, np.int64)
        padded[:len(ids)] = ids
        return torch.from_numpy(padded)

    def only(self, kept):
        """The annotations of some captions. kept: (captions,) bool."""
        return Annotations(*only_parts(self.offsets, self.rows, kept),
                           *only_parts(self.token_offsets, self.tokens, kept))

    @cached_property
    def by_concept(self):
        """(numbers of the rows, sorted by concept; their concepts). Most runs never ask for it."""
        order = np.argsort(self.rows[:, 0], kind="stable")
        return order, self.rows[order, 0]

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


def only_parts(offsets, values, kept):
    """offsets and values of the parts values[offsets[i]:offsets[i + 1]] with kept[i]."""
    sizes = np.diff(offsets)
    return np.concatenate([[0], np.cumsum(sizes[kept])]), values[np.repeat(kept, sizes)]


# Their cache, SOURCE.concepts.npz beside a captions file or a tar: arrays key, those of
# `Annotations`, bad

def save_annotations(source, key, annotations, bad):
    """Write the cache of a source. bad: (len(BAD),) counts of bad samples. Raises OSError."""
    arrays = {name: getattr(annotations, name) for name in ARRAYS}
    with whole_file(f"{source}.concepts.npz") as partial, open(partial, "wb") as file:
        np.savez(file, key=key, bad=bad, **arrays)


def read_annotations(source, key):
    """(`Annotations`, bad) from the cache of a source; None if it is missing, broken, or of another
    key: another bank, parser or state of the source."""
    try:
        with np.load(f"{source}.concepts.npz", allow_pickle=False) as file:
            if str(file["key"]) == key:
                return Annotations(*[file[name] for name in ARRAYS]), file["bad"]
    except Exception:                               # a broken file raises almost anything
        pass
    return None
