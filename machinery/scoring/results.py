"""Results as JSON files, and a table of many."""
import contextlib
import dataclasses
import datetime
import json
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from machinery.contract import PRETRAINED
from machinery.files import write_text
from machinery.images import IGNORE

# What methods must have in common to be compared
SCORED_ON = ("dataset", "images", "data.names", "data.without")
PACKAGES = ("torch", "timm", "open_clip_torch", "numpy", "pillow")


@lru_cache
def made_with():
    """The commit of this code and the versions of what it runs on."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty",
           "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None                               # no git, or not a checkout
    return {"commit": commit, "date": datetime.date.today().isoformat(),
            "versions": {"python": platform.python_version(),
                         **{package: version(package) for package in PACKAGES}}}


def print_result(result):
    """Print the IoU of each class, the best first, and the means in the last line."""
    iou = np.array(result["IoU"], float)
    for i in np.argsort(-np.nan_to_num(iou, nan=-1), kind="stable"):
        value = "   absent" if np.isnan(iou[i]) else f"{iou[i]:9.2%}"
        print(f"  {result['classes'][i]:<24}{value}")
    only = "only " * result["partial"]
    print(f"mIoU {result['mIoU']:.2%}   mAcc {result['mAcc']:.2%}   aAcc {result['aAcc']:.2%}   "
          f"({only}{result['images']} images, {result['images_per_second']} images/s)")


def output_path(args, name):
    """Where eval.py writes a result; by default beside the checkpoint, or into runs/NAME for a
    pretrained model. Raises ValueError for a file that holds the result of another dataset."""
    pretrained = str(args.checkpoint).partition(":")[0]
    if args.output:
        path = Path(args.output)
    elif pretrained in PRETRAINED:
        path = Path("runs") / pretrained
    else:
        path = Path(args.checkpoint)
        path = path if path.is_dir() else path.parent
    if path.suffix != ".json" or args.dataset == "all":
        without = "".join(f"_without_{left_out}" for left_out in sorted(args.without))
        without = without.replace("/", "-").replace(" ", "-")
        first = f"_first{args.limit}" if args.limit else ""
        path = path / f"eval_{Path(name).resolve().name}{without}{first}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    other = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):     # no result is there
        other = json.loads(path.read_text())["dataset"]
    if other and (not isinstance(other, str) or full_name(other) != full_name(name)):
        raise ValueError(f"{path} holds the result of {other}; name another file for that of "
                         f"{name} with --output")
    return path


def write_result(path, result):
    """As JSON, whole or not at all; a class that is nowhere has null for its IoU."""
    if "IoU" in result:
        result = {**result, "IoU": [None if np.isnan(v) else v for v in result["IoU"]]}
    write_text(path, json.dumps(result, indent=1))


def full_name(dataset):
    """A dataset's name; for a folder its full path."""
    return str(Path(dataset).resolve()) if Path(dataset).is_dir() else dataset


def read_result(path):
    """(settings by their dotted names, mIoU in %, cost or None) of a result file of train.py or
    eval.py. Raises ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no result {path}; expected a JSON of train.py or eval.py, or the "
                                "folder of a run that was scored")
    try:
        result = json.loads(Path(path).read_text())
        settings = {"dataset": result["dataset"], "images": result["images"],
                    "method": result["method"], "checkpoint": result.get("checkpoint_sha256"),
                    "data": result["data"], "model": result["settings"],
                    "protocol": result["protocol"], "run": result["training"].get("run", {})}
        if settings["run"]:
            del settings["checkpoint"]              # its run tells more
        return dict(flatten(settings)), 100 * float(result["mIoU"]), result.get("cost")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no segmentation result of train.py or eval.py "
                         f"({error!r})") from None


def flatten(settings, before=""):
    """{"run": {"batch": 8}} -> pairs ("run.batch", 8)."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{before}{name}.")
        else:
            yield before + name, value


def compare(paths, run_settings):
    """Print a table: a row for each combination of the settings that differ, with the mean of the
    mIoU and its spread over seeds. With several methods a setting is shown only if runs of the same
    method differ in it, and the mean cost is shown, too.

    paths: result files of train.py or eval.py, or folders of runs. run_settings: the dataclass of a
    run's settings, which knows those that do not change results.
    """
    paths = [Path(path) / ("result.json" if Path(path).is_dir() else "") for path in paths]
    runs = [read_result(path) for path in paths]
    refuse_unlike_data(paths, runs)
    same = {f"run.{field.name}" for field in dataclasses.fields(run_settings)
            if not field.metadata["changes_result"]}
    differing = differing_settings([settings for settings, _, _ in runs], {"run.seed", *same})
    rows = {}                                       # values of the differing settings -> runs
    for settings, miou, cost in runs:
        values = [settings.get(name) for name in differing]
        values = tuple(value if np.isscalar(value) else json.dumps(value) for value in values)
        rows.setdefault(values, []).append((miou, cost))
    numeric = all(isinstance(value, (int, float)) for row in rows for value in row)

    heads = [f"{name:>16}" for name in differing or ["runs"]]
    costs = "   seconds  M trained   GiB" if "method" in differing else ""
    print("  ".join(heads) + f"      mIoU    +-{costs}   runs")
    for row in sorted(rows, key=None if numeric else str):
        mious = np.array([miou for miou, _ in rows[row]])
        spread = f"{mious.std(ddof=1):5.2f}" if len(mious) > 1 else "    -"
        cells = "  ".join(f"{value!s:>{len(head)}}" for head, value in zip(heads, row or ["all"]))
        each = ", ".join(f"{miou:.1f}" for miou in mious)
        cost = mean_cost([cost for _, cost in rows[row]]) if costs else ""
        print(f"{cells}  {mious.mean():8.2f} {spread}{cost}   {each}")


def refuse_unlike_data(paths, runs):
    """Raise ValueError unless all results are of the same dataset. runs: of `read_result`."""
    first = runs[0][0]["dataset"]
    for path, (settings, _, _) in zip(paths, runs):
        if settings["dataset"] != first:
            raise ValueError(f"{path} is a result of {settings['dataset']}, {paths[0]} of {first}; "
                             "only results of the same dataset can be compared")


def differing_settings(runs, left_out):
    """Names of the settings in which runs of one method differ, and of what differs between methods
    in what was scored. runs: their settings by name. left_out: names that do not count."""
    def differs(name, group):
        return len({json.dumps(settings.get(name)) for settings in group}) > 1

    methods = {settings["method"] for settings in runs}
    groups = [[settings for settings in runs if settings["method"] == method]
              for method in methods]
    names = dict.fromkeys(name for settings in runs for name in settings if name not in left_out)
    return [name for name in names
            if any(differs(name, group) for group in groups)
            or name in ("method", *SCORED_ON) and differs(name, runs)]


def mean_cost(costs):
    """Mean training seconds, trained parameters in millions and peak memory of runs, as columns."""
    if None in costs:
        return f"{'not known':>29}"
    seconds, parameters, memory = (np.mean([cost[key] for cost in costs])
                                   for key in ("seconds", "trained_parameters", "peak_gib"))
    return f"  {seconds:8.0f}  {parameters / 1e6:9.1f}  {memory:4.1f}"


class ThresholdSweep:
    """mIoU with any background threshold, from one pass over the images.

    classes: C, the background among them. background: its number.
    """

    def __init__(self, classes, background):
        self.thresholds = torch.arange(-100, 101) / 100
        self.background = background
        self.others = [c for c in range(classes) if c != background]
        # pixels by truth, best of the other classes, and number of thresholds below its score
        self.pixels = torch.zeros(classes, classes - 1, len(self.thresholds) + 1, dtype=torch.int64)

    def count(self, mask, score, truth):
        """mask: of the classes without background. All (H, W)."""
        scored = truth != IGNORE
        cell = torch.bucketize(score[scored], self.thresholds)
        row = mask[scored].long() + len(self.others) * truth[scored].long()
        cell += self.pixels.shape[-1] * row
        self.pixels += torch.bincount(cell, minlength=self.pixels.numel()).view_as(self.pixels)

    def curve(self, scores):
        """[[threshold, mIoU], ...]. scores: function from a confusion matrix to measures."""
        curve = []
        classes = len(self.pixels)
        for i, threshold in enumerate(self.thresholds.tolist()):
            matrix = torch.zeros(classes, classes, dtype=torch.int64)
            matrix[:, self.others] = self.pixels[..., i + 1:].sum(-1)
            matrix[:, self.background] = self.pixels[..., :i + 1].sum((1, 2))
            curve.append([round(threshold, 6), scores(matrix)["mIoU"]])
        return curve


def print_sweep(curve):
    """Print mIoU around the best background threshold. curve: [(threshold, mIoU)]."""
    best = max(curve, key=lambda point: point[1])
    near = [f"{t:.2f} {miou:.2%}" for t, miou in curve if abs(t - best[0]) < 0.055]
    print(f"background threshold, mIoU: {', '.join(near)}\nbest at {best[0]:.2f}: {best[1]:.2%}. "
          "Choose it on training images, not on those that you report")
