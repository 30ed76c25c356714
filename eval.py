"""Score a trained model: mean intersection over union on masks that it never saw.

    python eval.py --dataset voc                        # one of the eight benchmarks, under data/
    python eval.py --dataset all                        # the whole table
    python eval.py --dataset FOLDER                     # your own: images/, masks/, classes.txt
    torchrun --nproc_per_node 8 eval.py --dataset all   # the same numbers, bit for bit

prints the IoU of each class and their mean, and writes them with the whole protocol as JSON beside
the checkpoint. Pixels are counted over the whole dataset in one confusion matrix, rows = truth,
columns = prediction. Masks are checked before anything is scored.
"""
import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from machinery.scoring.benchmarks import BENCHMARKS, IGNORE, THRESHOLD
from machinery.scoring.check import verified_datasets
from machinery.networks.checkpoint import newest_model
from machinery.names import CLASSES, check_classes
from machinery.scoring.classify import LabelledImages, classify
from machinery.errors import one_line_errors
from machinery.parallel import own_indices, pick_device, rank, sum_counts, world_size
from machinery.scoring.pictures import comparison
from machinery.scoring.protocol import (SLIDING, add_model_flags, embed, open_model, refuse_toy_model,
                                windows)
from machinery.scoring.results import (ThresholdSweep, compare, full_name, made_with, output_path,
                               print_result, show_sweep, write_result)
from machinery.training.workers import cores_per_process, end_with_torchrun, start_data_worker
from segment import WindowBatch, parse_background, put_background, segment_image


# --------------------------------------------------------------------------------------------------
# The measures

def confusion_matrix(prediction, target, num_classes, ignore_index=255):
    """Count pixels by (truth, prediction): (C, C) int64. Both: integers of one shape.

    Pixels whose truth is ignore_index do not count. Raises ValueError for any other value outside
    0..C-1: a wrongly converted mask would otherwise score low in silence.
    """
    prediction = torch.as_tensor(prediction).flatten().long()
    target = torch.as_tensor(target).flatten().long()
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has {len(prediction)} pixels, truth {len(target)}; expected "
                         "as many")
    scored = target != ignore_index
    prediction = prediction[scored]
    target = target[scored]
    for name, values in (("truth", target), ("prediction", prediction)):
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
            raise ValueError(f"the {name} has values {int(values.min())}..{int(values.max())}; "
                             f"expected 0..{num_classes - 1}, or {ignore_index} to ignore")
    cell = target * num_classes + prediction
    return torch.bincount(cell, minlength=num_classes ** 2).view(num_classes, num_classes)


def scores(matrix):
    """IoU per class, mIoU, mAcc and aAcc, in 0..1, of a confusion matrix with truth in rows.

    IoU = right / (truth + predicted - right). A class that is neither there nor predicted has an
    IoU of nan and does not count in the means. A class that is predicted but not there has an IoU
    of 0, which counts in mIoU; it does not count in mAcc.
    """
    matrix = torch.as_tensor(matrix).double()
    right = matrix.diag()
    truth = matrix.sum(1)
    predicted = matrix.sum(0)
    iou = right / (truth + predicted - right)
    return {"IoU": iou.tolist(), "mIoU": iou.nanmean().item(),
            "mAcc": (right / truth).nanmean().item(), "aAcc": (right.sum() / truth.sum()).item()}


# --------------------------------------------------------------------------------------------------
# A model on a dataset

def complete_protocol(dataset, protocol, is_sweep):
    """The protocol with the dataset's choices, and its background where none is given."""
    if is_sweep and getattr(dataset, "background_class", None) is None:
        raise ValueError(f'--sweep-background: {dataset.name} has no class "background"')
    default = THRESHOLD if is_sweep else getattr(dataset, "background", "none")
    protocol = {"background": default, **protocol, **getattr(dataset, "choices", {})}
    if is_sweep and not protocol["background"].startswith("threshold:"):
        raise ValueError(f"--sweep-background is for threshold:T, found {protocol['background']}")
    return protocol


def describe(model, dataset, total, protocol):
    """What a result says of the model and the data. total: images that were scored."""
    expected = getattr(dataset, "count", None) or len(dataset)
    return {"classes": [names[0] for names in dataset.classes], "images": total,
            "partial": total != expected, "protocol": protocol,
            **getattr(model, "checkpoint_file", {}), "method": getattr(model, "name", None),
            "backbone": getattr(getattr(model, "backbone", None), "config", None)}


def classes_to_predict(dataset, background):
    """Lists of names to embed, by the background rule; raises ValueError if the two do not fit.

    With threshold:T and own:T the background has no embedding, so there is one class less.
    """
    kind, words = parse_background(background)
    number = getattr(dataset, "background_class", None)
    if kind == "none" and number is not None:
        raise ValueError(f"--background {background}: {dataset.name} scores the class "
                         '"background"; choose threshold:T, prompt:"word, word" or own:T')
    if kind != "none" and number is None:
        raise ValueError(f'--background {background}: {dataset.name} has no class "background" to '
                         "score; only none makes sense")
    classes = list(dataset.classes)
    if kind == "prompt":
        classes[number] = words
    elif kind in ("threshold", "own"):
        del classes[number]
    return check_classes(classes, f"{dataset.name} with background {background}")


def evaluate(model, dataset, protocol, batch=8, pictures=0, limit=None, workers=0, thresholds=None,
             alone=False):
    """Score a model. Returns (result, shown).

    model: anything with `embed_classes` and `patch_scores`, like SimZSS. dataset: its items are
    (name, RGB image, mask (H, W) of classes or IGNORE), and it has `name` and `classes`, see
    machinery/scoring/benchmarks.py. protocol: templates, short_side, window, stride, the method's own
    entries, and background (default: the dataset's). batch: windows at a time. pictures: number of
    images of which `shown` has (photo, truth, prediction). limit: score the first images only.
    thresholds: rising (K,) tensor; adds "sweep", the mIoU with each as background threshold. With
    several processes each takes its share of the images, and all return the same numbers; alone:
    this one takes all.
    """
    C = len(dataset.classes)
    background = getattr(dataset, "background_class", None)
    protocol = complete_protocol(dataset, protocol, thresholds is not None)
    kind, threshold = parse_background(protocol["background"])
    classes = classes_to_predict(dataset, protocol["background"])
    embeddings = embed(model, classes, protocol, background)            # (C or C - 1, S, D)

    total = len(dataset) if limit is None else min(limit, len(dataset))
    mine = range(total) if alone else own_indices(total)
    matrix = torch.zeros(C, C, dtype=torch.int64)
    sweep = None if thresholds is None else ThresholdSweep(thresholds, C, background, IGNORE)
    settings = {**windows(protocol), "batch": WindowBatch(batch)}
    shown = []
    start = time.time()
    loader = DataLoader(Subset(dataset, mine), batch_size=None, num_workers=workers,
                        worker_init_fn=start_data_worker)
    bar = tqdm(loader, desc="scoring", unit=" images", disable=None if mine.start == 0 else True)
    for i, (_, image, truth) in zip(mine, bar):
        mask, score = segment_image(model, image, embeddings, **settings)
        truth = torch.as_tensor(truth)
        if sweep:
            sweep.count(mask, score, truth)
        if kind == "threshold":
            mask = put_background(mask, score, threshold, background)
        matrix += confusion_matrix(mask, truth, C, IGNORE)
        if i < pictures:
            shown.append((image, truth, mask))
    if not alone:
        sum_counts(matrix)
    if not matrix.any():
        raise ValueError(f"{dataset.name} has no pixel to score: all are ignored")

    seconds = time.time() - start
    result = {**scores(matrix), **describe(model, dataset, total, protocol), **made_with(),
              "seconds": round(seconds, 1), "images_per_second": round(total / seconds, 2),
              "processes": 1 if alone else world_size()}
    if sweep:
        if not alone:
            sum_counts(sweep.hits)
        result["sweep"] = sweep.curve(scores)
    return result, shown


def score_dataset(args, name, dataset, model, protocol):
    """Score one dataset and write what was asked for. Returns the result."""
    path = output_path(args, name)
    fits = args.dataset != "all" or dataset.background_class is not None
    if args.background and fits:                    # five of the eight have no background
        protocol = {**protocol, "background": args.background}
    thresholds = torch.arange(-100, 101) / 100 if args.sweep_background and fits else None
    result, shown = evaluate(model, dataset, protocol, args.batch, args.save_images, args.limit,
                             args.workers, thresholds)
    folder = path.with_name(f"{path.stem}_images")
    for i, row in zip(own_indices(args.save_images), shown):
        folder.mkdir(exist_ok=True)
        comparison([row], result["classes"], row[0].width).save(folder / f"{i:04d}.png")
    if rank() == 0:
        print_result(result)
        write_result(path, {"dataset": name, "folder": full_name(name),
                            "training": getattr(model, "trained_with", {}),
                            **result})
        print(f"written to {path}" + (f", pictures in {folder}" if shown else ""))
        if thresholds is not None:
            show_sweep(result["sweep"], name, path.with_suffix(".png"))
    return result


# --------------------------------------------------------------------------------------------------
# The command

def score_segmentation(args, model, protocol):
    """Score the datasets asked for; of all eight, print a table. Raises ValueError, at the end,
    when some could not be scored."""
    datasets, failed = verified_datasets(args)
    for dataset in datasets.values():
        if hasattr(dataset, "files"):
            refuse_toy_model(model, [path for _, path, _ in dataset.files[:1]])
    results = {name: score_dataset(args, name, dataset, model, protocol)
               for name, dataset in datasets.items()}
    if args.dataset == "all" and rank() == 0:
        for name, result in results.items():
            only = "only " if result["partial"] else ""
            print(f"{name:<14}{result['mIoU']:8.2%}   {only}{result['images']} images, background "
                  f"{result['protocol']['background'][:40]}")
        if not failed:
            mean = np.mean([result["mIoU"] for result in results.values()])
            print(f"{'mean':<14}{mean:8.2%}")
    if failed:
        raise ValueError("; ".join(failed))


def score_classification(args, model, protocol):
    """Score on an image folder and write the result."""
    path = output_path(args, args.dataset)
    folder = args.dataset
    names = args.names
    if args.dataset == "imagenet":
        folder = Path(args.data) / "imagenet" / "val"
        names = names or CLASSES / "imagenet.txt"
    dataset = LabelledImages(folder, names, model.trained_with.get("image_size", 224))
    refuse_toy_model(model, [path for path, _ in dataset.files[:1]])
    embeddings = embed(model, dataset.classes, protocol)
    result = classify(model, dataset, embeddings, args.limit, args.workers)
    used = {key: value for key, value in protocol.items() if key not in SLIDING}
    if rank() == 0:
        only = "only " if result["partial"] else ""
        print(f"top-1 {result['top1']:.2%}   top-5 {result['top5']:.2%}   ({only}{result['images']}"
              f" images, {len(dataset.classes)} classes, {result['images_per_second']} images/s)")
        write_result(path, {"dataset": args.dataset, "folder": full_name(args.dataset),
                            "names": args.names, **result,
                            "protocol": {**used, "size": dataset.size},
                            **getattr(model, "checkpoint_file", {}),
                            "backbone": model.config().get("backbone"), **made_with()})
        print(f"written to {path}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score a trained model on a dataset with masks, "
                                                 "or on an image folder.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset",
                      help=f"{', '.join(BENCHMARKS)}, all of these, toy, or a folder with images/, "
                           "masks/ and classes.txt; with --task classification imagenet or a "
                           "folder of class folders")
    what.add_argument("--compare", nargs="+", metavar="JSON",
                      help="results of runs to tabulate: mean and spread over seeds")
    add = parser.add_argument
    add("--task", choices=["segmentation", "classification"], default="segmentation",
        help="(default: %(default)s)")
    add("--data", default="data",
        help="folder that holds the benchmarks (default: %(default)s)")
    add("--background",
        help="threshold:T = pixels whose best score, such as a cosine similarity, is at most T; "
             'prompt:"word, word" = what these words win; own:T = the rule of the method, if it '
             "has one; none = not scored (default: threshold:0.2 for voc, context and coco-object; "
             "of a folder with a class background the names in its own line, as prompt)")
    add("--sweep-background", action="store_true",
        help="mIoU over the background threshold, as table and plot")
    add("--without", nargs="*", default=[],
        help="classes neither scored nor predicted, such as background")
    add("--names",
        help="class file with your own wording and synonyms of the dataset's classes, in order")
    add("--ignore", type=int, nargs="*", default=[255],
        help="values of a folder's masks that are not scored (default: 255)")
    add("--check", action="store_true",
        help="only look at the data; scoring always does so first")
    add("--allow-partial", action="store_true",
        help="score a benchmark of which images are missing")
    add("--limit", type=int, help="score the first N images only; the result is marked as partial")
    add("--save-images", type=int, default=0, metavar="N",
        help="of the first N images, save photo, truth, prediction and overlay side by side")
    add("--output", help="JSON file to write, or folder for eval_DATASET.json (default: beside the "
                         "checkpoint)")
    add("--workers", type=int, default=min(4, cores_per_process() - 1),
        help="processes that load images (default: %(default)s)")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    for name in ("limit", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.task == "classification" and (args.check or args.background or args.sweep_background
                                          or args.without or args.save_images):
        parser.error("--check, --background, --sweep-background, --without and --save-images are "
                     "for segmentation")
    return args


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors("lower --window or --short-side"):
        if args.compare:
            return compare(args.compare, Path(args.output or "comparison.png"))
        try:
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                end_with_torchrun()
                dist.init_process_group("gloo")     # only counts travel
            if args.check:
                _, failed = verified_datasets(args)
                if failed:
                    raise ValueError("; ".join(failed))
                return
            if pick_device(args.device) == "cuda":  # one GPU per process
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            args.checkpoint = args.checkpoint or newest_model()
            model, protocol = open_model(args)
            if args.task == "classification":
                score_classification(args, model, protocol)
            else:
                score_segmentation(args, model, protocol)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    main()
