"""Results as JSON files, and tables and plots of many."""
import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch

from machinery.networks.checkpoint import upgrade_settings, write_text
from machinery.contract import PRETRAINED
from machinery.scoring.pictures import plot

# Settings that do not make another variant of a run: they follow from the rest, or change results
# by chance only.
NOT_A_VARIANT = {"seed", "output", "resume", "device", "workers", "protocol", "step", "pass_pairs",
                 "micro_batch", "images", "cache_features", "save_minutes", "timeout_minutes",
                 "max_bad", "eval_data", "eval_names", "eval_without"}
SCORED_ON = ("dataset", "scored", "names", "without")      # what methods must have in common
PACKAGES = ("torch", "timm", "open_clip_torch", "numpy", "pillow")


def made_with():
    """The commit of this code and the versions of what it runs on."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True,
                              check=True)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
        commit = head.stdout.strip() + " and changes" * bool(status.stdout)
    except (OSError, subprocess.CalledProcessError):
        commit = None                               # not a checkout
    versions = {distribution.metadata["Name"]: distribution.version
                for distribution in distributions()
                if distribution.metadata["Name"] in PACKAGES}
    return {"commit": commit, "date": datetime.date.today().isoformat(),
            "versions": {"python": platform.python_version(), **versions}}


def print_result(result, most=10):
    """IoU of each class, the best first, and the means in the last line."""
    iou = np.array(result["IoU"], float)
    order = np.argsort(-np.nan_to_num(iou, nan=-1), kind="stable").tolist()
    there = [i for i in order if not np.isnan(iou[i])]
    shown = order if len(order) <= 3 * most else [*there[:most], None, *there[-most:]]
    for i in shown:
        if i is None:
            print("  ...")
        else:
            value = "   absent" if np.isnan(iou[i]) else f"{iou[i]:9.2%}"
            print(f"  {result['classes'][i]:<24}{value}")
    only = "only " if result["partial"] else ""
    print(f"mIoU {result['mIoU']:.2%}   mAcc {result['mAcc']:.2%}   aAcc {result['aAcc']:.2%}   "
          f"({only}{result['images']} images, {result['images_per_second']} images/s)")


def result_folder(checkpoint):
    """Where results of a checkpoint go: beside it, or into runs/NAME for a pretrained model."""
    name = str(checkpoint).partition(":")[0]
    if name in PRETRAINED:
        return Path("runs") / name
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent


def output_path(args, name):
    """Where the result goes. Raises OSError, before hours of scoring, for a place where nothing can
    be written; ValueError for a file with the result of other data."""
    path = Path(args.output) if args.output else result_folder(args.checkpoint)
    if path.suffix != ".json" or args.dataset == "all":
        without = "".join(f"_without_{left_out}" for left_out in sorted(args.without))
        without = without.replace("/", "-").replace(" ", "-")
        first = f"_first{args.limit}" if args.limit else ""
        path = path / f"eval_{Path(name).resolve().name}{without}{first}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    other = scored_dataset(path)
    if other and other != full_name(name):
        raise ValueError(f"{path} holds the result of {other}; name another file for that of "
                         f"{name} with --output")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"nothing can be written to {path.parent}; name another place with "
                              "--output")
    return path


def write_result(path, result):
    """As JSON, whole or not at all; a class that is nowhere has null for its IoU."""
    if "IoU" in result:
        result = {**result, "IoU": [None if np.isnan(v) else v for v in result["IoU"]]}
    write_text(path, json.dumps(result, indent=1))


def scored_dataset(path):
    """The dataset that a result file is of, a folder by its full path; None if there is no such
    file."""
    try:
        result = json.loads(path.read_text())
        return result.get("folder") or full_name(result["dataset"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def full_name(dataset):
    """A dataset's name; for a folder its full path."""
    return str(Path(dataset).resolve()) if Path(dataset).is_dir() else dataset


def read_result(path):
    """(settings, mIoU in %, cost or None) of a result file of train.py or eval.py. Raises
    ValueError."""
    try:
        result = json.loads(Path(path).read_text())
        training = result.get("training") or {"checkpoint": result["checkpoint_sha256"]}
        settings = {"dataset": result["dataset"], "scored": result["images"],
                    **upgrade_settings(training), **result["protocol"]}
        return settings, 100 * float(result["mIoU"]), result.get("cost")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no segmentation result of train.py or eval.py "
                         f"({error!r})") from None


def compare(paths, picture):
    """Print mean and spread over seeds of the mIoU of runs, a row for each set of the settings in
    which they differ. Of several methods a setting counts where runs of one method differ in it,
    and their mean cost is printed.

    paths: result files of train.py or eval.py. A curve is drawn into picture if the rows differ in
    one number, or in several that each tell every two rows apart, as window and stride do; it is
    drawn over the first of these.
    """
    runs = [read_result(path) for path in paths]
    differing = differing_settings([settings for settings, _, _ in runs])
    rows = {}                                       # values of the differing settings -> mIoUs
    costs = {}                                      # the same -> costs
    for settings, miou, cost in runs:
        values = [settings.get(name) for name in differing]
        values = tuple(value if np.isscalar(value) else json.dumps(value) for value in values)
        rows.setdefault(values, []).append(miou)
        costs.setdefault(values, []).append(cost)
    numeric = all(isinstance(value, (int, float)) for row in rows for value in row)
    ordered = sorted(rows, key=None if numeric else str)
    heads = ["lambda" if name == "local_weight" else name for name in differing] or ["runs"]

    title = "   seconds  M trained   GiB" if "method" in differing else ""
    print("  ".join(f"{head:>16}" for head in heads) + f"      mIoU    +-{title}   runs")
    for row in ordered:
        mious = np.array(rows[row])
        spread = f"{mious.std(ddof=1):5.2f}" if len(mious) > 1 else "    -"
        cells = "  ".join(f"{value!s:>16}" for value in row or ["all"])
        each = ", ".join(f"{miou:.1f}" for miou in mious)
        cost = mean_cost(costs[row]) if title else ""
        print(f"{cells}  {mious.mean():8.2f} {spread}{cost}   {each}")
    if differing and numeric and all(len(set(column)) == len(rows) for column in zip(*rows)):
        curve = [(row[0], np.mean(rows[row]), min(rows[row]), max(rows[row])) for row in ordered]
        if plot(picture, {"mIoU": curve}, heads[0], "mIoU, %"):
            print(f"plotted in {picture}: mean, and the range over seeds as a band")


def differing_settings(runs):
    """Names of the settings that tell runs apart. runs: their settings, dicts."""
    methods = {}
    for settings in runs:
        methods.setdefault(settings.get("method"), []).append(settings)

    def differs(name, group):
        return len({json.dumps(settings.get(name)) for settings in group}) > 1

    names = [name for name in dict.fromkeys(name for settings in runs for name in settings)
             if name not in NOT_A_VARIANT]
    return [name for name in names
            if any(differs(name, group) for group in methods.values())
            or name in ("method", *SCORED_ON) and differs(name, runs)]


def mean_cost(costs):
    """Mean training seconds, trained parameters in millions and peak memory of runs, as columns."""
    if None in costs:
        return f"{'not known':>29}"
    seconds, parameters, memory = (np.mean([cost[key] for cost in costs])
                                   for key in ("seconds", "trained_parameters", "peak_gib"))
    return f"  {seconds:8.0f}  {parameters / 1e6:9.1f}  {memory:4.1f}"


class ThresholdSweep:
    """mIoU over the background threshold, from one pass over the images.

    thresholds: rising (K,) tensor. classes: C, the background among them. background: its number.
    ignore: value of pixels that are not scored.
    """

    def __init__(self, thresholds, classes, background, ignore):
        self.thresholds = thresholds
        self.background = background
        self.ignore = ignore
        self.others = [c for c in range(classes) if c != background]
        # pixels by truth, best of the other classes, and number of thresholds below its score
        self.hits = torch.zeros(classes, classes - 1, len(thresholds) + 1, dtype=torch.int64)

    def count(self, mask, score, truth):
        """mask: of the classes without background. All (H, W)."""
        scored = truth != self.ignore
        cell = torch.bucketize(score[scored], self.thresholds)
        row = mask[scored].long() + len(self.others) * truth[scored].long()
        cell += self.hits.shape[-1] * row
        self.hits += torch.bincount(cell, minlength=self.hits.numel()).view_as(self.hits)

    def curve(self, scores):
        """[[threshold, mIoU], ...]. scores: function from a confusion matrix to measures."""
        curve = []
        classes = len(self.hits)
        for i, threshold in enumerate(self.thresholds.tolist()):
            matrix = torch.zeros(classes, classes, dtype=torch.int64)
            matrix[:, self.others] = self.hits[..., i + 1:].sum(-1)
            matrix[:, self.background] = self.hits[..., :i + 1].sum((1, 2))
            curve.append([round(threshold, 6), scores(matrix)["mIoU"]])
        return curve


def show_sweep(curve, name, picture):
    """Print mIoU around the best background threshold and draw it where it changes.

    curve: [(threshold, mIoU)].
    """
    best = max(curve, key=lambda point: point[1])
    near = [f"{t:.2f} {miou:.2%}" for t, miou in curve if abs(t - best[0]) < 0.055]
    print(f"background threshold, mIoU: {', '.join(near)}\nbest at {best[0]:.2f}: {best[1]:.2%}. "
          "Choose it on training images, not on those that you report")
    changing = [point for i, point in enumerate(curve)
                if any(other[1] != point[1] for other in curve[max(0, i - 1):i + 2])]
    rows = [(t, 100 * miou, 100 * miou, 100 * miou) for t, miou in changing or curve]
    if plot(picture, {name: rows}, "background threshold", "mIoU, %"):
        print(f"plotted in {picture}")
