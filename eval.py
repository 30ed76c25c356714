"""Score a trained model: mean intersection over union on masks that it never saw.

    python eval.py --dataset voc                        # one of the eight benchmarks, under data/
    python eval.py --dataset all                        # the whole table
    python eval.py --dataset FOLDER                     # your own: images/, masks/, classes.txt
    torchrun --nproc_per_node 8 eval.py --dataset all   # the same numbers, bit for bit

prints the IoU of each class and their mean, and writes them with the whole protocol as JSON beside the checkpoint.
Pixels are counted over the whole dataset in one confusion matrix, rows = truth, columns = prediction. Masks are read as
their makers distribute them and checked before anything is scored. In this file: the measures, the datasets, the check,
a model on a dataset, pictures and tables, the command line.
"""
import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from machinery.benchmarks import BENCHMARKS, IGNORE, THRESHOLD, check, open_dataset
from machinery.checkpoint import newest_model
from machinery.classes import CLASSES, check_classes, read_labels
from machinery.images import IMAGE_SUFFIXES, load_image, to_pixels
from machinery.parallel import first_process, pick_device, share_of, sum_counts
from machinery.pictures import grid, overlay
from machinery.results import compare, made_with, print_result, show_sweep, write_result
from segment import SLIDING, add_model_args, embed, open_model, parse_background, put_background, segment_image


# ---------------------------------------------------------------------------------------------------------------------
# The measures

def confusion_matrix(prediction, target, num_classes, ignore_index=255):
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
# The eight benchmarks, as their makers distribute them


# ---------------------------------------------------------------------------------------------------------------------
# The check before scoring


# ---------------------------------------------------------------------------------------------------------------------
# A model on a dataset


def evaluate(model, dataset, protocol, batch=8, pictures=0, limit=None, workers=0, thresholds=None, alone=False):
    """Score a model. Returns (result, pictures).

    model: anything with `embed_classes` and `patch_scores`, like SimZSS. dataset: `MaskedImages` or alike. protocol:
    templates, class_embedding, short_side, window, stride and background (default: the dataset's). batch: windows at a
    time. pictures: of how many images to return [photo, truth, prediction, overlay]. limit: score the first images only.
    thresholds: rising (K,) tensor; adds "sweep", the mIoU with each as background threshold, from the same pass.
    With several processes each takes its share of the images, and all return the same numbers; alone: this one takes
    all, whatever others do.
    """
    C, place, names = len(dataset.classes), getattr(dataset, "background_class", None), [c[0] for c in dataset.classes]
    swept = thresholds is not None
    if swept and place is None:
        raise ValueError(f'--sweep-background: {dataset.name} has no class "background"')
    protocol = {"background": THRESHOLD if swept else getattr(dataset, "background", "none"), **protocol,
                **getattr(dataset, "choices", {})}
    kind, value = parse_background(protocol["background"])
    if swept and kind == "prompt":
        raise ValueError(f"--sweep-background is for threshold:T, found {protocol['background']}")
    if (kind == "none") != (place is None):
        raise ValueError(f"--background {protocol['background']}: {dataset.name} " + (
            'scores the class "background"; choose threshold:T or prompt:"word, word"' if kind == "none" else
            'has no class "background" to score; only none makes sense'))
    classes = check_classes([value if kind == "prompt" and i == place else c for i, c in enumerate(dataset.classes)
                             if i != place or kind == "prompt"], f"{dataset.name} with background {protocol['background']}")
    if swept:
        hits = torch.zeros(C, C - 1, len(thresholds) + 1, dtype=torch.int64)    # truth, best of the others, its score
    embeddings = embed(model, classes, protocol)                                        # (C or C - 1, S, D)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    mine, sums = (range(total), lambda counts: counts) if alone else (share_of(total), sum_counts)
    matrix, shown, start = torch.zeros(C, C, dtype=torch.int64), [], time.time()
    loader = DataLoader(Subset(dataset, mine), batch_size=None, num_workers=workers)
    bar = tqdm(loader, desc="scoring", unit=" images", disable=True if mine.start else None)
    for i, (_, image, truth) in zip(mine, bar):
        mask, score = segment_image(model, image, embeddings, batch=batch, **{key: protocol[key] for key in SLIDING})
        truth = torch.as_tensor(truth)
        if swept:
            kept = truth != IGNORE
            cell = torch.bucketize(score[kept], thresholds)                             # background from this one on
            cell += len(hits[0, 0]) * (mask[kept].long() + (C - 1) * truth[kept].long())
            hits += torch.bincount(cell, minlength=hits.numel()).view_as(hits)
        if len(classes) < C:
            mask = put_background(mask, score, value, place)
        matrix += confusion_matrix(mask, truth, C, IGNORE)
        if i < pictures:
            shown.append([image, overlay(image, truth, names, 1), overlay(image, mask, names, 1), overlay(image, mask, names)])
    sums(matrix)
    if not matrix.any():
        raise ValueError(f"{dataset.name} has no pixel to score: all are ignored")
    seconds = time.time() - start
    result = {**scores(matrix), "classes": names, "images": total,
              "partial": total != (getattr(dataset, "count", None) or len(dataset)), "protocol": protocol,
              **getattr(model, "checkpoint", {}), "backbone": getattr(getattr(model, "backbone", None), "config", None),
              "seconds": round(seconds, 1), "images_per_second": round(total / seconds, 2), "processes": mine.step,
              **made_with()}
    if swept:
        sums(hits)
        result["sweep"], others = [], [c for c in range(C) if c != place]
        for i, threshold in enumerate(thresholds.tolist()):
            matrix[:, others] = hits[..., i + 1:].sum(-1)
            matrix[:, place] = hits[..., :i + 1].sum((1, 2))
            result["sweep"].append([round(threshold, 6), scores(matrix)["mIoU"]])
    return result, shown


# ---------------------------------------------------------------------------------------------------------------------
# Zero-shot classification: whole images against class names

class LabelledImages:
    """An image folder: one sub-folder per class. Items: (pixels uint8 (3, size, size), class).

    names: class file, lines in the order of the sorted sub-folders or beginning with "sub-folder: "; None = the
    sub-folders' own names. The short side is resized to size, bicubic, and the middle cut out.
    """

    def __init__(self, folder, names=None, size=224):
        self.name, self.size = str(folder), size
        folders = sorted(p.name for p in Path(folder).iterdir() if p.is_dir()) if Path(folder).is_dir() else []
        if not folders:
            raise FileNotFoundError(f"no class folders in {folder}; expected {folder}/CLASS/*.jpg, one folder per class"
                                    " (ImageNet's validation images, sorted into folders: https://image-net.org)")
        labels, classes = read_labels(names) if names else (None, [[f.replace("_", " ")] for f in folders])
        labels = labels or folders
        if len(labels) != len(classes) or not set(folders) <= set(labels):
            raise ValueError(f"{names} has {len(classes)} classes; expected those of the {len(folders)} folders of {folder}, "
                             f"such as {sorted(set(folders) - set(labels) or folders)[0]}")
        self.classes = classes
        self.files = [(path, i) for i, label in enumerate(labels) if label in set(folders)
                      for path in sorted((Path(folder) / label).iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
        if not self.files:
            raise FileNotFoundError(f"no images in the class folders of {folder}")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        path, known = self.files[i]
        image = load_image(path)
        scale = self.size / min(image.size)
        w, h = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (w - self.size) // 2, (h - self.size) // 2
        image = image.resize((w, h), Image.BICUBIC).crop((left, top, left + self.size, top + self.size))
        return to_pixels(image), known


@torch.no_grad()
def classify(model, dataset, protocol, limit=None, workers=0, batch=64):
    """Top-1 and top-5 of the class token against the embedded class names. Returns a result."""
    embeddings = embed(model, dataset.classes, protocol)                                # (C, S, D)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    some = np.linspace(0, len(dataset) - 1, total).astype(int)          # of all classes: images lie class by class
    right, start, mine = torch.zeros(2, dtype=torch.int64), time.time(), share_of(total)
    loader = DataLoader(Subset(dataset, some[mine]), batch_size=batch, num_workers=workers)
    for pixels, known in tqdm(loader, desc="classifying", unit=" batches", disable=True if mine.start else None):
        similarity = model.image_scores(pixels.to(embeddings.device), embeddings)       # (B, C)
        best = similarity.topk(min(5, len(embeddings)), dim=1).indices.cpu() == known[:, None]
        right += torch.stack([best[:, 0].sum(), best.sum()])
    seconds, (top1, top5) = time.time() - start, sum_counts(right).tolist()
    return {"top1": top1 / total, "top5": top5 / total, "images": total, "partial": total != len(dataset),
            "classes": [names[0] for names in dataset.classes],
            "protocol": {**{key: protocol[key] for key in ("templates", "class_embedding")}, "size": dataset.size},
            **getattr(model, "checkpoint", {}), "backbone": getattr(getattr(model, "backbone", None), "config", None),
            "seconds": round(seconds, 1), "images_per_second": round(total / seconds, 2), "processes": mine.step,
            **made_with()}


# ---------------------------------------------------------------------------------------------------------------------
# Tables and pictures


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score a trained model on a dataset with masks, or on an image folder.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", help=f"{', '.join(BENCHMARKS)}, all of these, toy, or a folder with images/, masks/ and "
                      "classes.txt; with --task classification imagenet or a folder of class folders")
    what.add_argument("--compare", nargs="+", metavar="JSON", help="results of runs to tabulate: mean and spread over seeds")
    parser.add_argument("--task", choices=["segmentation", "classification"], default="segmentation",
                        help="(default: %(default)s)")
    parser.add_argument("--data", default="data", help="folder that holds the benchmarks (default: %(default)s)")
    parser.add_argument("--background", help='threshold:T = pixels whose cosine similarity to every class is at most T, '
                        'prompt:"word, word" = what these words win, none = not scored (default: see README)')
    parser.add_argument("--sweep-background", action="store_true",
                        help="mIoU over the background threshold, as table and plot")
    parser.add_argument("--without", nargs="*", default=[], help="classes neither scored nor predicted, such as background")
    parser.add_argument("--names", help="class file with your own wording and synonyms of the dataset's classes, in order")
    parser.add_argument("--ignore", type=int, nargs="*", default=[255], help="values of a folder's masks that are not "
                        "scored (default: 255)")
    parser.add_argument("--check", action="store_true", help="only look at the data; scoring always does so first")
    parser.add_argument("--allow-partial", action="store_true", help="score a benchmark of which images are missing")
    parser.add_argument("--limit", type=int, help="score the first N images only; the result is marked as partial")
    parser.add_argument("--save-images", type=int, default=0, metavar="N", help="of the first N images, save photo, truth, "
                        "prediction and overlay side by side")
    parser.add_argument("--output", help="JSON file to write, or folder for eval_DATASET.json (default: beside the "
                        "checkpoint)")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() - 1),
                        help="processes that load images (default: %(default)s)")
    add_model_args(parser)
    args = parser.parse_args(argv)
    for name in ("limit", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.task == "classification" and (args.check or args.background or args.sweep_background or args.without
                                          or args.save_images):
        parser.error("--check, --background, --sweep-background, --without and --save-images are for segmentation")
    return args


def output_path(args, name):
    """Where the result goes. Raises OSError, before hours of scoring, for a place where nothing can be written."""
    path = Path(args.output or args.checkpoint)
    path = path if args.output or path.is_dir() else path.parent
    if path.suffix != ".json" or args.dataset == "all":
        path = path / f"eval_{Path(name).resolve().name}{f'_first{args.limit}' if args.limit else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"nothing can be written to {path.parent}; name another place with --output")
    return path


def verified(args):
    """The datasets asked for. Returns ({name: dataset} of those that pass their check, what keeps the others away).

    The first process checks for all.
    """
    datasets, failed = {}, []
    for name in BENCHMARKS if args.dataset == "all" else [args.dataset]:
        try:
            datasets[name] = dataset = open_dataset(name, args.without, args.names, args.data, args.ignore)
        except (ValueError, OSError) as error:
            failed.append(str(error))
            continue
        if name == "toy":                           # drawn, not read
            continue
        problems = []
        if first_process():
            problems, pixels = check(dataset, range(min(args.limit or len(dataset), len(dataset))))
            problems = [p for p in problems if not (args.allow_partial and "--allow-partial" in p)]
        if sum_counts(torch.tensor([len(problems)])):
            failed.append(f"{name} failed its check: " + ("; ".join(problems) or "the first process says why"))
            del datasets[name]
        elif args.check and first_process():
            print(f"{name}: {len(dataset)} images with masks, {dataset.masks.what}, {pixels[-1] / pixels.sum():.2%} of the "
                  "pixels are not scored")
            for names, count in zip(dataset.classes, pixels):
                print(f"  {names[0]:<24}{count / pixels.sum():9.3%}" + ("   absent" if not count else ""))
    if len(failed) > 1:
        failed.insert(0, f"{len(failed)} of {len(BENCHMARKS)} benchmarks cannot be scored")
    return datasets, failed


def segmentation(args, model, protocol):
    """Score the datasets asked for, and print the table of all. Raises ValueError, at the end, when some could not be."""
    datasets, failed = verified(args)
    results = {name: score_dataset(args, name, dataset, model, protocol) for name, dataset in datasets.items()}
    if args.dataset == "all" and first_process():
        for name, result in results.items():
            print(f"{name:<14}{result['mIoU']:8.2%}   {'only ' * result['partial']}{result['images']} images, background "
                  f"{result['protocol']['background'][:40]}")
        if not failed:
            print(f"{'mean':<14}{np.mean([result['mIoU'] for result in results.values()]):8.2%}")
    if failed:
        raise ValueError("; ".join(failed))


def score_dataset(args, name, dataset, model, protocol):
    """Score one dataset and write what was asked for. Returns the result."""
    path, thresholds = output_path(args, name), None
    if args.dataset != "all" or dataset.background_class is not None:       # of all eight, some have no background
        protocol = {**protocol, **({"background": args.background} if args.background else {})}
        thresholds = torch.arange(-100, 101) / 100 if args.sweep_background else None
    result, shown = evaluate(model, dataset, protocol, args.batch, args.save_images, args.limit, args.workers, thresholds)
    if shown:
        folder = path.with_name(f"{path.stem}_images")
        folder.mkdir(exist_ok=True)
        for i, row in zip(share_of(args.save_images), shown):
            grid([row]).save(folder / f"{i:04d}.png")
    if first_process():
        print_result(result)
        write_result(path, {"dataset": name, "training": getattr(model, "config", {}).get("training", {}), **result})
        print(f"written to {path}" + (f", pictures in {folder}" if shown else ""))
        if thresholds is not None:
            show_sweep(result["sweep"], name, path.with_suffix(".png"))
    return result


def classification(args, model, protocol):
    """Score on an image folder and write the result."""
    imagenet, path = args.dataset == "imagenet", output_path(args, args.dataset)
    dataset = LabelledImages(Path(args.data) / "imagenet" / "val" if imagenet else args.dataset,
                             args.names or (CLASSES / "imagenet.txt" if imagenet else None),
                             model.config["training"].get("image_size", 224))
    result = classify(model, dataset, protocol, args.limit, args.workers)
    if first_process():
        print(f"top-1 {result['top1']:.2%}   top-5 {result['top5']:.2%}   ({'only ' * result['partial']}{result['images']} "
              f"images, {len(dataset.classes)} classes, {result['images_per_second']} images/s)")
        write_result(path, {"dataset": args.dataset, "names": args.names, **result})
        print(f"written to {path}")


def main(argv=None):
    args = parse_args(argv)
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group("gloo")         # only counts travel
        if args.compare:
            return compare(args.compare, Path(args.output or "comparison.png"))
        if args.check:
            failed = verified(args)[1]
            if failed:
                raise ValueError("; ".join(failed))
            return
        if pick_device(args.device) == "cuda":      # one GPU per process
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        args.checkpoint = args.checkpoint or newest_model()
        (classification if args.task == "classification" else segmentation)(args, *open_model(args))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        message = str(error).strip()
        if "Original Traceback" in message:         # from a data worker: its own line is the last
            message = message.splitlines()[-1].partition(": ")[2]
        sys.exit(f"error: {message}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
