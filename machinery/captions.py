"""Captions files."""
import contextlib
import json
import os
from pathlib import Path

import numpy as np


def read_captions(path):
    """Read a captions file: COCO JSON, or TSV / JSONL of (image, caption). Returns [(image file name, caption)].

    A TSV may begin with a header line "image<tab>caption" (or open_clip's "filepath<tab>title"); JSONL lines are
    {"image": ..., "caption": ...}. Raises FileNotFoundError, or ValueError for a file that is none of these or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no captions file {path}. For COCO expected data/coco/annotations/captions_train2017.json and "
            "data/coco/train2017/*.jpg from https://cocodataset.org/#download (2017 train images, train/val annotations); "
            "or pass --train-data FILE, or --train-data toy, which needs no files")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            content = json.loads(text)
            names = {image["id"]: image["file_name"] for image in content["images"]}
            pairs = [(names[a["image_id"]], a["caption"]) for a in content["annotations"]]
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            pairs = [(row["image"], row["caption"]) for row in rows]
        elif path.suffix == ".tsv":
            rows = [line.split("\t") for line in text.split("\n") if line.strip()]
            header = bool(rows) and [cell.strip() for cell in rows[0][:2]] in (["image", "caption"], ["filepath", "title"])
            pairs = [(row[0], row[1].strip()) for row in rows[header:]]
        else:
            raise ValueError("its name must end in .json (COCO), .jsonl or .tsv")
        if not all(isinstance(cell, str) for pair in pairs for cell in pair):
            raise TypeError("an image name or caption that is no text")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is no captions file ({type(error).__name__}: {error}). Expected COCO's JSON with "
                         "'images' and 'annotations', or rows of image and caption") from None
    pairs = [(image, caption) for image, caption in pairs if caption.strip()]
    if not pairs:
        raise ValueError(f"{path} holds no captions; expected at least one pair of image and caption")
    return pairs



def as_arrays(found):
    """What annotate yields, as (offsets, rows) of `load_annotations`."""
    return (np.cumsum([0, *map(len, found)], dtype=np.int32),
            np.array([row for rows in found for row in rows], dtype=np.int32).reshape(-1, 3))



def save_arrays(path, **arrays):
    """np.savez, whole or not at all. Raises OSError."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial.npz")
    try:
        np.savez(partial, **arrays)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
