"""The check of masks before anything is scored: a wrong mask would score low in silence."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from machinery.images import IGNORE, load_image, read_mask
from machinery.parallel import progress, rank, sum_counts
from machinery.scoring.benchmarks import BENCHMARKS, ILLEGAL, open_dataset


def inspect(dataset, i):
    """(what is wrong with image i in words, or None; pixels of each raw value, (65536,))."""
    _, path, mask = dataset.files[i]
    try:
        raw = read_mask(mask)
        size = load_image(path).size[::-1]
        problem = None
        if raw.shape != size:
            problem = (f"the mask of {path} has {raw.shape[0]} x {raw.shape[1]} pixels (height x "
                       f"width), the image {size[0]} x {size[1]}; expected the same size")
            with Image.open(path) as stored:
                if stored.size == raw.shape[::-1]:
                    problem += (". The image is turned by its EXIF orientation, and its mask is "
                                "not: turn the mask, too, or take the EXIF data away")
        return problem, np.bincount(raw.ravel(), minlength=2 ** 16)
    except Exception as error:                      # a file may hold anything
        return f"{path}: {error}", np.zeros(2 ** 16, int)


def check(dataset, limit=None):
    """Look at every mask, or at the first ones: number of images, sizes, values.

    Returns (problems, a list of str; pixels of each class, then ignored ones, (C + 1,) int64).
    """
    total = min(limit or len(dataset), len(dataset))
    problems = []
    pixels = np.zeros(2 ** 16, int)                 # of each raw value
    usual_values = list(dataset.masks.usual)
    usual = 0                                       # masks that hold one of them
    first = {}                                      # value that may not occur -> image that has it
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda i: inspect(dataset, i), range(total))
        for i, (problem, found) in enumerate(progress(results, total=total, desc="checking",
                                                      unit=" masks")):
            if problem:
                problems.append(problem)
            pixels += found
            usual += bool(found[usual_values].any())
            for value in np.flatnonzero((found > 0) & (dataset.table == ILLEGAL)):
                first.setdefault(value, i)
    bad = len(problems)
    if bad > 5:
        problems = [*problems[:5], f"... and {bad - 5} more like these"]
    if first:
        _, path, _ = dataset.files[first[min(first)]]
        found = set(np.flatnonzero(pixels).tolist())
        hints = [f"; the values are those of {form.what} (*{form.suffix})"
                 for form in dataset.forms if found <= set(form.classes)]
        if not dataset.forms:                       # a folder of one's own
            hints = ["; name values that are not scored with --ignore"]
        problems.append(f"value {first_values(sorted(first))} (in the mask of {path}) cannot occur "
                        f"in {dataset.masks.what}; expected "
                        + first_values([*dataset.masks.classes]) + "".join(hints[:1]))
    elif usual_values and total == len(dataset) and 2 * usual < total - bad:
        problems.append(f"only {usual} of {total} masks hold a value of {usual_values[0]}.."
                        f"{usual_values[-1]}, as {dataset.masks.what} do: the values are shifted; "
                        "take the makers' files")
    if dataset.count not in (None, len(dataset)):
        problems.append(f"{len(dataset)} images, expected {dataset.count}; complete the data, or "
                        "score what is there with --allow-partial, which marks the result")
    counted = [pixels[dataset.table == i].sum() for i in range(len(dataset.classes))]
    return problems, np.array([*counted, pixels[dataset.table == IGNORE].sum()])


def first_values(values):
    """The first twelve of many values, in words."""
    return ", ".join(map(str, values[:12])) + ", ..." * (len(values) > 12)


def open_datasets(args):
    """The datasets asked for, before any mask is looked at: ({name: dataset} of those that are
    there, reasons why the others are not). args: eval.py's flags. Raises FileNotFoundError or
    ValueError if none is there."""
    datasets = {}
    failed = []
    missing = []
    for name in BENCHMARKS if args.dataset == "all" else [args.dataset]:
        try:
            dataset = open_dataset(name, args.without, args.names, args.data, args.ignore)
            if args.allow_partial:                  # a list may name images that are missing
                dataset.files = [file for file in dataset.files if file[1].is_file()]
            datasets[name] = dataset
        except FileNotFoundError:
            if args.dataset != "all":
                raise
            missing.append(name)
        except (ValueError, OSError) as error:
            failed.append(str(error))
    if missing:
        failed.append(f"not under {args.data}: {', '.join(missing)}; python eval.py --dataset "
                      f"{missing[0]} says what is expected where")
    if not datasets:
        raise ValueError("; ".join(failed))
    return datasets, failed


def verified_datasets(args, datasets):
    """({name: dataset} of the opened ones that pass their check, reasons why the others do not).
    The first process checks for all. args: eval.py's flags."""
    verified = {}
    failed = []
    for name, dataset in datasets.items():
        problems = check_files(dataset, args) if dataset.files and rank() == 0 else []
        if sum_counts(torch.tensor([len(problems)])):
            failed.append(f"{name} failed its check: "
                          + ("; ".join(problems) or "the first process says why"))
        else:
            verified[name] = dataset
    return verified, failed


def check_files(dataset, args):
    """Problems of a dataset by `check` and eval.py's flags; with --check, prints the pixels of each
    class in percent."""
    problems, pixels = check(dataset, args.limit)
    if args.allow_partial:
        problems = [problem for problem in problems if "--allow-partial" not in problem]
    if not problems and args.check:
        print(f"{dataset.name}: {len(dataset)} images with masks, {dataset.masks.what}, "
              f"{pixels[-1] / pixels.sum():.2%} of the pixels are not scored")
        for names, number in zip(dataset.classes, pixels):
            absent = "" if number else "   absent"
            print(f"  {names[0]:<24}{number / pixels.sum():9.3%}{absent}")
    return problems
