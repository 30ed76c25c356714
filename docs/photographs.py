"""The photographs of which these pages have figures, made of COCO's own files.

    python docs/photographs.py data/coco --output data/photographs

reads captions_train2017.json and instances_train2017.json in data/coco/annotations, photos in
data/coco/train2017, and docs/photographs.txt: the ids of the 771 captions, of 251 photographs, that
are trained on, and of the 106 other photographs that are scored. It writes

    data/photographs/captions.json                      for train.py --train-data, with --images
    data/photographs/images, masks, classes.txt         for eval.py --dataset data/photographs

The masks have the classes of Pascal VOC, painted from COCO's outlines, the largest first: value 0
is anything else, 255 a crowd, which is not scored.
"""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1]))
from machinery.errors import CommandLine, one_line_errors
from machinery.files import write_text
from machinery.images import decode_runs
from machinery.names import CLASSES, read_classes

# COCO's category of each class of Pascal VOC, in VOC's order
CATEGORIES = ["airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
              "dining table", "dog", "horse", "motorcycle", "person", "potted plant", "sheep",
              "couch", "train", "tv"]
CROWD = 255


def read_ids(path):
    """{"captions": ids, "scored": ids} of photographs.txt."""
    ids = {}
    for line in path.read_text().splitlines():
        if line.endswith(":"):
            ids[line[:-1]] = found = set()
        else:
            found.update(map(int, line.split()))
    return ids


def region_of(segmentation, height, width):
    """Pixels (H, W) bool of COCO's outlines: polygons, or a run-length code."""
    if isinstance(segmentation, dict):
        return decode_runs((height, width), segmentation["counts"])
    picture = Image.new("1", (width, height))
    for polygon in segmentation:
        ImageDraw.Draw(picture).polygon(polygon, fill=1)
    return np.array(picture)


def paint(annotations, values, height, width):
    """A mask (H, W) uint8 of COCO's annotations of one image, the largest first. values:
    category id -> value of its pixels."""
    mask = np.zeros((height, width), np.uint8)
    for annotation in sorted(annotations, key=lambda annotation: -annotation["area"]):
        if annotation["category_id"] in values:
            region = region_of(annotation["segmentation"], height, width)
            value = CROWD if annotation["iscrowd"] else values[annotation["category_id"]]
            mask[region] = value
    return mask


def main(argv=None):
    parser = CommandLine(description="Make the photographs of these pages of COCO's files.")
    parser.add_argument("coco", type=Path, help="folder with annotations/ and train2017/")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    args = parser.parse_args(argv)
    with one_line_errors(""):
        make(args.coco, args.output, read_ids(Path(__file__).with_name("photographs.txt")))


def make(coco, output, ids):
    """Write captions, images, masks and classes. ids: of `read_ids`."""
    for part in ("images", "masks"):
        (output / part).mkdir(parents=True, exist_ok=True)
    content = json.loads((coco / "annotations/captions_train2017.json").read_text())
    captions = [a for a in content["annotations"] if a["id"] in ids["captions"]]
    images = {a["image_id"] for a in captions}
    content |= {"annotations": captions,
                "images": [image for image in content["images"] if image["id"] in images]}
    write_text(output / "captions.json", json.dumps(content))

    content = json.loads((coco / "annotations/instances_train2017.json").read_text())
    values = {category["id"]: CATEGORIES.index(category["name"]) + 1
              for category in content["categories"] if category["name"] in CATEGORIES}
    annotations = {id: [] for id in ids["scored"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] in annotations:
            annotations[annotation["image_id"]].append(annotation)
    for image in content["images"]:
        if image["id"] in ids["scored"]:
            name = image["file_name"]
            shutil.copy(coco / "train2017" / name, output / "images" / name)
            mask = paint(annotations[image["id"]], values, image["height"], image["width"])
            Image.fromarray(mask).save(output / "masks" / Path(name).with_suffix(".png"))
    names = [synonyms[0] for synonyms in read_classes(CLASSES / "voc.txt")]
    write_text(output / "classes.txt", "\n".join(names) + "\n")
    print(f"{len(captions)} captions of {len(images)} images, {len(ids['scored'])} images with "
          f"masks in {output}")


if __name__ == "__main__":
    main()
