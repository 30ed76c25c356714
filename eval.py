"""Score a trained model: mean intersection over union on masks that it never saw.

    python eval.py --dataset toy                        # the toy world
    python eval.py --dataset FOLDER                     # images/, masks/, classes.txt

prints the IoU of each class and their mean, and writes them with the protocol as JSON beside the checkpoint. Pixels are
counted over the whole dataset in one confusion matrix, rows = truth, columns = prediction.
"""
import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import IGNORE, SegmentationFolder, ToyScenes
from segment import SLIDING, add_model_args, newest_model, open_model, overlay, read_templates, segment_image


# ---------------------------------------------------------------------------------------------------------------------
# The measure

def confusion_matrix(prediction, target, num_classes, ignore_index=IGNORE):
    """Count pixels by (truth, prediction). Both: integer tensors or arrays of one shape. Returns (C, C) int64.

    Pixels whose truth is ignore_index cost nothing. Raises ValueError for any other value outside 0..C-1, which would
    otherwise be a wrongly converted mask that scores low in silence.
    """
    prediction, target = torch.as_tensor(prediction).flatten().long(), torch.as_tensor(target).flatten().long()
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has {len(prediction)} pixels, truth {len(target)}; expected as many")
    kept = target != ignore_index
    prediction, target = prediction[kept], target[kept]
    for name, values in (("truth", target), ("prediction", prediction)):
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
            raise ValueError(f"the {name} has values {int(values.min())}..{int(values.max())}; expected "
                             f"0..{num_classes - 1}, or {ignore_index} to ignore")
    return torch.bincount(target * num_classes + prediction, minlength=num_classes ** 2).view(num_classes, num_classes)


def scores(matrix):
    """IoU per class, mIoU, mAcc and aAcc, in 0..1, of a confusion matrix with truth in rows.

    IoU_k = right / (truth + predicted - right). A class neither there nor predicted is nan and does not count in the
    mean; one predicted but not there counts as 0 in mIoU and not at all in mAcc.
    """
    matrix = torch.as_tensor(matrix).double()
    right, truth, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
    iou = right / (truth + predicted - right)
    return {"IoU": iou.tolist(), "mIoU": iou.nanmean().item(), "mAcc": (right / truth).nanmean().item(),
            "aAcc": (right.sum() / truth.sum()).item()}


# ---------------------------------------------------------------------------------------------------------------------
# A model on a dataset

def open_dataset(name, without=(), names=None):
    """The dataset called "toy", or a segmentation folder. Raises FileNotFoundError when it is neither.

    without: see `SegmentationFolder`. names: class file with other wordings of the folder's classes, line by line.
    """
    if name == "toy":
        if without or names:
            raise ValueError("--without and --names are for folders; the toy world has its own classes")
        return ToyScenes()
    if not Path(name).is_dir():
        raise FileNotFoundError(f"unknown dataset {name!r}; expected 'toy' or a folder with images/, masks/ and classes.txt")
    return SegmentationFolder(name, without, names)


def evaluate(model, dataset, protocol, batch=8, pictures=0):
    """Segment every image of a dataset and count its pixels.

    pictures: for how many images, from the first on, to return [photo, truth, prediction], the masks with legends.
    Returns (result dict, these rows of pictures).
    """
    names = [synonyms[0] for synonyms in dataset.classes]
    embeddings = model.embed_classes(dataset.classes, read_templates(protocol["templates"]), protocol["class_embedding"])
    sliding = {key: protocol[key] for key in SLIDING}
    matrix, shown, start = torch.zeros(len(names), len(names), dtype=torch.int64), [], time.time()
    for i in tqdm(range(len(dataset)), desc="scoring", unit=" images", disable=None):
        _, image, truth = dataset[i]
        mask, _ = segment_image(model, image, embeddings, batch=batch, **sliding)
        matrix += confusion_matrix(mask, truth, len(names))
        if len(shown) < pictures:
            shown.append([image, overlay(image, truth, names), overlay(image, mask, names)])
    if not matrix.any():
        raise ValueError(f"{getattr(dataset, 'folder', 'the dataset')} has no pixel to score: all are ignored")
    seconds = time.time() - start
    result = {**scores(matrix), "classes": names, "images": len(dataset), "protocol": protocol,
              "backbone": model.backbone.config, "seconds": round(seconds, 1),
              "images_per_second": round(len(dataset) / seconds, 2),
              "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    return result, shown


def grid(rows):
    """Rows of pictures in one, columns aligned."""
    widths = [max(picture.width for picture in column) for column in zip(*rows)]
    heights = [max(picture.height for picture in row) for row in rows]
    canvas = Image.new("RGB", (sum(widths), sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            canvas.paste(picture, (sum(widths[:j]), sum(heights[:i])))
    return canvas


def print_result(result):
    """The table on the terminal, best class first, and the line that counts last."""
    iou = np.array(result["IoU"])
    for i in np.argsort(-np.nan_to_num(iou, nan=-1)):
        print(f"  {result['classes'][i]:<24}" + ("   absent" if np.isnan(iou[i]) else f"{iou[i]:9.2%}"))
    print(f"mIoU {result['mIoU']:.2%}   mAcc {result['mAcc']:.2%}   aAcc {result['aAcc']:.2%}   "
          f"({result['images']} images, {result['images_per_second']} images/s)")


def write_result(path, result):
    """As JSON; a class that is nowhere has null for its IoU."""
    result = {**result, "IoU": [None if np.isnan(v) else v for v in result["IoU"]]}
    Path(path).write_text(json.dumps(result, indent=1))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score a trained model on a dataset with masks.")
    parser.add_argument("--dataset", required=True, help="toy, or a folder with images/, masks/ and classes.txt")
    parser.add_argument("--without", nargs="*", default=[], help="classes neither scored nor predicted, such as background")
    parser.add_argument("--names", help="class file with your own wording and synonyms of the dataset's classes, in order")
    parser.add_argument("--output", help="JSON file to write (default: eval_DATASET.json beside the checkpoint)")
    add_model_args(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        dataset = open_dataset(args.dataset, args.without, args.names)
        args.checkpoint = args.checkpoint or newest_model()
        model, protocol = open_model(args)
        result, _ = evaluate(model, dataset, protocol, args.batch)
        print_result(result)
        folder = Path(args.checkpoint) if Path(args.checkpoint).is_dir() else Path(args.checkpoint).parent
        output = Path(args.output or folder / f"eval_{Path(args.dataset).resolve().name}.json")
        write_result(output, {"dataset": args.dataset, "checkpoint": str(args.checkpoint), **result})
        print(f"written to {output}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
