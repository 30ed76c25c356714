"""The check of masks before anything is scored: a wrong mask would score low in silence."""
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from machinery.images import IGNORE, read_mask
from machinery.parallel import rank, sum_counts
from machinery.scoring.benchmarks import BENCHMARKS, ILLEGAL, open_dataset


def inspect(dataset, i):
    """(what is wrong with image i in words, or None; pixels of each raw value, (65536,))."""
    _, path, mask = dataset.files[i]
    try:
        raw = read_mask(mask)
        if not path.is_file():
            raise FileNotFoundError(f"no image {path}")
        with Image.open(path) as image:
            image.load()                            # the whole file is there
            is_upright = image.getexif().get(274, 1) < 5            # 274: how the camera was held
            size = image.size[::-1] if is_upright else image.size
        problem = dataset.size_problem(i, raw.shape, size)
        return problem, np.bincount(raw.ravel(), minlength=2 ** 16)
    except Exception as error:                      # Pillow raises almost anything on a broken file
        return f"{path}: {error}", np.zeros(2 ** 16, int)


def check(dataset, indices=None, workers=8):
    """Look at every mask before anything is scored: number of images, sizes, values.

    indices: of the images to look at, None = all. Returns (problems, a list of str; pixels of each
    class, then ignored ones, (C + 1,) int64).
    """
    indices = range(len(dataset)) if indices is None else indices
    problems = []
    pixels = np.zeros(2 ** 16, int)                 # of each raw value
    usual_values = list(dataset.masks.usual)
    usual = 0                                       # masks that hold a usual value
    odd = {}                                        # value that may not occur -> image that has it
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda i: inspect(dataset, i), indices)
        for i, (problem, count) in zip(indices, tqdm(results, total=len(indices), desc="checking",
                                                     unit=" masks", disable=None)):
            if problem:
                problems.append(problem)
            pixels += count
            usual += bool(count[usual_values].any())
            odd.update(dict.fromkeys(np.flatnonzero((count > 0) & (dataset.table == ILLEGAL)), i))
    bad = len(problems)
    problems[5:] = [f"... and {bad - 5} more like these"] if bad > 5 else []

    what = dataset.masks.what
    found = set(np.flatnonzero(pixels).tolist())
    other = [f"; the values are those of {form.what} (*{form.suffix})" for form in dataset.forms
             if form.what != what and found <= set(form.classes)]
    if not dataset.forms:                           # a folder of one's own
        other = ["; name values that are not scored with --ignore"]
    if odd:
        _, path, _ = dataset.files[odd[min(odd)]]
        problems.append(f"value {some(sorted(odd))} (in the mask of {path}) cannot occur in {what};"
                        f" expected {some([*dataset.masks.classes])}" + "".join(other[:1]))
    elif usual_values and len(indices) == len(dataset) and 2 * usual < len(indices) - bad:
        problems.append(f"only {usual} of {len(indices)} masks hold a value of "
                        f"{min(usual_values)}..{max(usual_values)}, as {what} do; take the makers' "
                        "files" + "".join(other[:1]))
    if dataset.count not in (None, len(dataset)):
        problems.append(f"{len(dataset)} images, expected {dataset.count}; complete the data, or "
                        "score what is there with --allow-partial, which marks the result")
    counted = [pixels[dataset.table == i].sum() for i in range(len(dataset.classes))]
    return problems, np.array([*counted, pixels[dataset.table == IGNORE].sum()])


def some(values, most=12):
    """The first of many values, in words."""
    return ", ".join(map(str, values[:most])) + ", ..." * (len(values) > most)


def check_warnings(dataset, pixels):
    """What is legal but unlikely about a dataset that is checked. pixels: of `check`."""
    absent = [synonyms[0] for synonyms, count in zip(dataset.classes, pixels) if not count]
    warnings = []
    if absent and dataset.count is None:
        warnings.append(f"no mask of {dataset.name} holds {some(absent, 5)}; are these values "
                        "ignored, or shifted?")
    if pixels[-1] > 0.9 * pixels.sum():
        warnings.append(f"{pixels[-1] / pixels.sum():.0%} of the pixels of {dataset.name} are "
                        "ignored; is --ignore right?")
    return warnings


def verified_datasets(args):
    """The datasets asked for: ({name: dataset} of those that pass their check, reasons why the
    others do not). The first process checks for all. args: eval.py's flags."""
    datasets = {}
    failed = []
    for name in BENCHMARKS if args.dataset == "all" else [args.dataset]:
        try:
            dataset = open_dataset(name, args.without, args.names, args.data, args.ignore)
        except (ValueError, OSError) as error:
            failed.append(str(error))
            continue
        problems = check_files(dataset, args) if dataset.files and rank() == 0 else []
        if sum_counts(torch.tensor([len(problems)])):
            failed.append(f"{name} failed its check: "
                          + ("; ".join(problems) or "the first process says why"))
        else:
            datasets[name] = dataset
    if len(failed) > 1:
        failed.insert(0, f"{len(failed)} of {len(BENCHMARKS)} benchmarks cannot be scored")
    return datasets, failed


def check_files(dataset, args):
    """Problems of a dataset by `check` and eval.py's flags; prints warnings and, with --check, the
    share of each class."""
    problems, pixels = check(dataset, range(min(args.limit or len(dataset), len(dataset))))
    if args.allow_partial:
        problems = [problem for problem in problems if "--allow-partial" not in problem]
    if not problems and not args.limit:
        for warning in check_warnings(dataset, pixels):
            print(f"warning: {warning}", file=sys.stderr)
    if not problems and args.check:
        print(f"{dataset.name}: {len(dataset)} images with masks, {dataset.masks.what}, "
              f"{pixels[-1] / pixels.sum():.2%} of the pixels are not scored")
        for names, count in zip(dataset.classes, pixels):
            absent = "" if count else "   absent"
            print(f"  {names[0]:<24}{count / pixels.sum():9.3%}{absent}")
    return problems
