"""Score a trained model: mean intersection over union on masks that it never saw.

    python eval.py --dataset voc                        # one of the eight benchmarks, under data/
    python eval.py --dataset all                        # the whole table
    python eval.py --dataset FOLDER                     # your own: images/, masks/, classes.txt
    torchrun --nproc_per_node 8 eval.py --dataset all   # the same numbers, bit for bit

prints the IoU of each class and their mean, and writes them with the whole protocol as JSON beside
the checkpoint. Pixels are counted over the whole dataset in one confusion matrix, rows = truth,
columns = prediction. Masks are checked before anything is scored.
"""
import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset

from machinery.errors import CommandLine, one_line_errors
from machinery.images import IGNORE
from machinery.names import CLASSES, check_classes
from machinery.networks.checkpoint import newest_model
from machinery.parallel import (own_indices, pick_device, progress, rank, sum_counts,
                                world_size)
from machinery.scoring.benchmarks import BENCHMARKS, THRESHOLD
from machinery.scoring.check import open_datasets, verified_datasets
from machinery.scoring.classify import LabelledImages, classify
from machinery.scoring.pictures import comparison, save_picture
from machinery.scoring.protocol import (add_model_flags, embed, open_model, positive,
                                        refuse_photo_model, refuse_toy_model, training_run)
from machinery.scoring.results import (ThresholdSweep, compare, full_name, made_with, output_path,
                                       print_result, print_sweep, write_result)
from machinery.settings import as_mapping
from machinery.training.workers import cores_per_process, end_with_torchrun, start_data_worker
from segment import parse_background, put_background, segment_image, window_settings


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

def classes_to_predict(dataset, background):
    """Lists of names to embed, by the background rule; raises ValueError if the two do not fit.

    With threshold:T the background has no embedding, so there is one class less.
    """
    kind, words = parse_background(background)
    number = dataset.background_class
    if kind == "none" and number is not None:
        raise ValueError(f"--background {background}: {dataset.name} scores the class "
                         '"background"; choose threshold:T or prompt:"word, word"')
    if kind != "none" and number is None:
        raise ValueError(f'--background {background}: {dataset.name} has no class "background" to '
                         "score; only none makes sense")
    classes = list(dataset.classes)
    if kind == "prompt":
        classes[number] = words
    elif kind == "threshold":
        del classes[number]
    return check_classes(classes, f"{dataset.name} with background {background}")


def evaluate(model, dataset, protocol, batch=8, pictures=0, limit=None, workers=0):
    """Score a model. Returns (result, shown).

    model: a `Method`; its protocol becomes the one given.
    dataset: `ScoredImages`.
    protocol: the method's `Protocol`; without a background of its own, the dataset's holds.
    batch: windows at a time.
    pictures: how many images to show. The dataset is cut into that many equal parts, and each part
        shows its image with the most scored pixels: `shown` has (number, photo, truth, prediction).
    limit: score the first images only.
    workers: processes that load images.

    With background threshold:T the result has a "sweep": the mIoU with any T. With several
    processes each takes its part of the images, and all return the same numbers.
    """
    C = len(dataset.classes)
    background = dataset.background_class
    protocol = dataclasses.replace(protocol, background=protocol.background or dataset.background)
    kind, threshold = parse_background(protocol.background)
    classes = classes_to_predict(dataset, protocol.background)
    model.protocol = protocol
    embeddings = embed(model, classes)                                  # (C or C - 1, S, D)

    total = len(dataset) if limit is None else min(limit, len(dataset))
    mine = own_indices(total)
    device = embeddings.device                      # a CPU needs 14 ms to count a photo's pixels
    matrix = torch.zeros(C, C, dtype=torch.int64, device=device)
    sweep = ThresholdSweep(C, background) if kind == "threshold" else None
    wanted = len(own_indices(min(pictures, total)))
    shown = {}                                      # part of the dataset: pixels scored, its image
    start = time.time()
    loader = DataLoader(Subset(dataset, mine), batch_size=None, num_workers=workers,
                        collate_fn=list,            # as they are: not through shared memory
                        worker_init_fn=start_data_worker)
    loaded = progress(loader, desc="scoring", unit=" images")
    for i, (_, image, truth) in zip(mine, loaded):
        mask, score = segment_image(model, image, embeddings, batch=batch,
                                    **window_settings(protocol))
        truth = torch.as_tensor(truth)
        if sweep:
            sweep.count(mask, score, truth)
            mask = put_background(mask, score, threshold, background)
        matrix += confusion_matrix(mask.to(device), truth.to(device), C, IGNORE)
        part = i * wanted // total
        scored = (truth != IGNORE).sum()
        if wanted and (part not in shown or scored > shown[part][0]):
            shown[part] = scored, i, image, truth, mask
    matrix = sum_counts(matrix.cpu())
    if not matrix.any():
        raise ValueError(f"{dataset.name} has no pixel to score: all are ignored")

    result = {**scores(matrix), "data": dataset.choices, **describe(model, dataset, total, start)}
    if sweep:
        sum_counts(sweep.pixels)
        result["sweep"] = sweep.curve(scores)
    return result, [image for _, *image in shown.values()]


def describe(model, dataset, total, start):
    """What a result says beside the scores. total: images that were scored. start: by time.time."""
    seconds = time.time() - start
    return {"classes": [names[0] for names in dataset.classes], "images": total,
            "partial": total != (dataset.count or len(dataset)), "method": model.name,
            "settings": as_mapping(model.settings), "protocol": as_mapping(model.protocol),
            "precision": model.precision, **model.checkpoint_file, **made_with(),
            "seconds": round(seconds, 1), "images_per_second": round(total / seconds, 2),
            "processes": world_size()}


def score_dataset(args, name, dataset, model, protocol):
    """Score one dataset and write what was asked for. Returns the result."""
    path = output_path(args, name)
    if args.dataset == "all" and dataset.background_class is None:
        protocol = dataclasses.replace(protocol, background=None)       # five of eight have none
    elif args.sweep_background:
        protocol = dataclasses.replace(protocol, background=protocol.background or THRESHOLD)
        if not protocol.background.startswith("threshold:"):
            raise ValueError(f"--sweep-background is for threshold:T, found {protocol.background}")
    result, shown = evaluate(model, dataset, protocol, args.batch, args.save_images, args.limit,
                             args.workers)
    folder = path.with_name(f"{path.stem}_images")
    for i, image, *masks in shown:
        folder.mkdir(exist_ok=True)
        picture = comparison([(image, *masks)], result["classes"], image.width)
        save_picture(folder / f"{i:04d}.png", picture)
    if rank() == 0:
        if not args.sweep_background:
            result.pop("sweep", None)
        print_result(result)
        write_result(path, {"dataset": full_name(name), "training": model.trained_with, **result})
        print(f"written to {path}" + f", pictures in {folder}" * bool(shown))
        if "sweep" in result:
            print_sweep(result["sweep"])
    return result


# --------------------------------------------------------------------------------------------------
# The command

def score_segmentation(args, model, opened, failed):
    """Score the datasets asked for; of all eight, print a table. opened, failed: of
    `open_datasets`. Raises ValueError, at the end, when some could not be scored."""
    if args.dataset == "toy":
        refuse_photo_model(model)
    datasets, wrong = verified_datasets(args, opened)
    failed = [*failed, *wrong]
    for dataset in datasets.values():
        refuse_toy_model(model, [path for _, path, _ in dataset.files[:1]])
    protocol = model.protocol
    results = {name: score_dataset(args, name, dataset, model, protocol)
               for name, dataset in datasets.items()}
    if args.dataset == "all" and rank() == 0:
        for name, result in results.items():
            print(f"{name:<14}{result['mIoU']:8.2%}   {result['images']} images, background "
                  f"{result['protocol']['background'][:40]}")
        if not failed:
            mean = np.mean([result["mIoU"] for result in results.values()])
            print(f"{'mean':<14}{mean:8.2%}")
    if failed:
        raise ValueError("; ".join(failed))


def score_classification(args, model):
    """Score on an image folder and write the result."""
    path = output_path(args, args.dataset)
    folder = args.dataset
    names = args.names
    if args.dataset == "imagenet":
        folder = Path(args.data) / "imagenet" / "val"
        names = names or CLASSES / "imagenet.txt"
    dataset = LabelledImages(folder, names, training_run(model).get("image_size", 224))
    refuse_toy_model(model, [path for path, _ in dataset.files[:1]])
    embeddings = embed(model, dataset.classes)
    start = time.time()
    result, total = classify(model, dataset, embeddings, args.limit, args.workers)
    result |= describe(model, dataset, total, start)
    if rank() == 0:
        only = "only " * result["partial"]
        print(f"top-1 {result['top1']:.2%}   top-5 {result['top5']:.2%}   ({only}{result['images']}"
              f" images, {len(dataset.classes)} classes, {result['images_per_second']} images/s)")
        write_result(path, {"dataset": full_name(args.dataset), "names": args.names,
                            "image_size": dataset.size, "training": model.trained_with, **result})
        print(f"written to {path}")


def parse_args(argv=None):
    parser = CommandLine(description="Score a trained model on a dataset with masks, or on an "
                                     "image folder.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset",
                      help=f"{', '.join(BENCHMARKS)}, all of these, toy, or a folder with images/, "
                           "masks/ and classes.txt; with --task classification imagenet or a "
                           "folder of class folders")
    what.add_argument("--compare", nargs="+", metavar="JSON",
                      help="results of runs, or their folders, to tabulate: mean and spread over "
                           "seeds")
    add = parser.add_argument
    add("--task", choices=["segmentation", "classification"], default="segmentation",
        help="what to score (default: %(default)s)")
    add("--data", default="data",
        help="folder that holds the benchmarks (default: %(default)s)")
    add("--sweep-background", action="store_true",
        help="also print the mIoU for other thresholds of the background")
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
    add("--limit", type=positive, metavar="N",
        help="score the first N images only, of a classification N spread over all classes; the "
             "result is marked as partial")
    add("--save-images", type=int, default=0, metavar="N",
        help="of N images, spread over the dataset, save photo, truth, prediction and overlay side "
             "by side")
    add("--output", help="JSON file to write, or folder for eval_DATASET.json (default: beside the "
                         "checkpoint)")
    add("--workers", type=int, default=min(4, cores_per_process() - 1),
        help="processes that load images (default: %(default)s)")
    add_model_flags(parser)
    parser.epilog = ("--background is by default threshold:0.2 for voc, context and coco-object, "
                     "and for a folder with a class background the names in its own line, as "
                     "prompt.")
    args = parser.parse_args(argv)
    for_masks = [args.check, "protocol.background" in vars(args), args.sweep_background,
                 args.without, args.save_images]
    if args.check and args.dataset == "toy":
        parser.error("--check looks at files; --dataset toy is drawn and has none")
    if args.task == "segmentation" and args.dataset == "imagenet":
        parser.error("--dataset imagenet has no masks; it is for --task classification")
    if args.task == "classification" and any(for_masks):
        parser.error("--check, --background, --sweep-background, --without and --save-images are "
                     "for segmentation")
    return args


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors("lower --batch, --window or --short-side"):
        if args.compare:
            from train import RunSettings           # here, as train.py imports this file
            return compare(args.compare, RunSettings)
        try:
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                end_with_torchrun()
                dist.init_process_group("gloo")     # only counts travel
            if args.task == "segmentation":         # missing data: before a model is made
                datasets, failed = open_datasets(args)
            if args.check:
                _, wrong = verified_datasets(args, datasets)
                if failed or wrong:
                    raise ValueError("; ".join([*failed, *wrong]))
                return
            if pick_device(args.device) == "cuda":  # one GPU per process
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            args.checkpoint = args.checkpoint or newest_model()
            model = open_model(args)
            if args.task == "classification":
                score_classification(args, model)
            else:
                score_segmentation(args, model, datasets, failed)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    main()
