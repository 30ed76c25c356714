"""Results: JSON, tables, comparisons."""
import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import numpy as np

from machinery.pictures import plot


def made_with():
    """The commit of this code and the versions of what it runs on."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        commit += " and changes" * bool(subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        commit = None                               # not a checkout
    versions = {name: distribution.version for distribution in distributions()
                if (name := distribution.metadata["Name"]) in ("torch", "timm", "open_clip_torch", "numpy", "pillow")}
    return {"commit": commit, "date": datetime.date.today().isoformat(),
            "versions": {"python": platform.python_version(), **versions}}



def print_result(result, most=10):
    """The table on the terminal, best class first, and the line that counts last."""
    iou = np.array(result["IoU"])
    order = np.argsort(-np.nan_to_num(iou, nan=-1), kind="stable").tolist()
    there = [i for i in order if not np.isnan(iou[i])]
    shown = order if len(order) <= 3 * most else [*there[:most], None, *there[-most:]]
    for i in shown:
        value = "" if i is None else "   absent" if np.isnan(iou[i]) else f"{iou[i]:9.2%}"
        print(f"  {'...' if i is None else result['classes'][i]:<24}{value}")
    print(f"mIoU {result['mIoU']:.2%}   mAcc {result['mAcc']:.2%}   aAcc {result['aAcc']:.2%}   "
          f"({'only ' * result['partial']}{result['images']} images, {result['images_per_second']} images/s)")



def write_result(path, result):
    """As JSON, whole or not at all; a class that is nowhere has null for its IoU."""
    if "IoU" in result:
        result = {**result, "IoU": [None if np.isnan(v) else v for v in result["IoU"]]}
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(result, indent=1))
    os.replace(partial, path)



# What does not tell one variant from another: it follows from the rest, or changes no result but by chance.
ASIDE = {"seed", "output", "resume", "device", "workers", "protocol", "step", "pass_pairs", "micro_batch", "images",
         "cache_features", "save_minutes", "timeout_minutes", "max_bad", "eval_data", "eval_names", "eval_without"}



def compare(paths, picture):
    """Print mean and spread over seeds of the mIoU of runs, a row for each set of the settings in which they differ.

    paths: result files of train.py or eval.py. Draws a curve into picture if they differ in one number, or in several
    that tell every two rows apart, as window and stride do; it is drawn over the first of these.
    """
    variants = []
    for path in paths:
        try:
            result = json.loads(Path(path).read_text())
            variants.append(({"dataset": result["dataset"], "scored": result["images"],
                              **(result.get("training") or {"checkpoint": result["checkpoint_sha256"]}),
                              **result["protocol"]}, 100 * result["mIoU"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no segmentation result of train.py or eval.py ({error!r})") from None
    keys = [key for key in {key: 0 for settings, _ in variants for key in settings} if key not in ASIDE
            and len({json.dumps(settings.get(key)) for settings, _ in variants}) > 1]
    rows = {}
    for settings, miou in variants:
        rows.setdefault(tuple(settings.get(key) if np.isscalar(settings.get(key)) else json.dumps(settings.get(key))
                              for key in keys), []).append(miou)
    numeric = all(isinstance(value, (int, float)) for row in rows for value in row)
    heads = ["lambda" if key == "weight" else key for key in keys] or ["runs"]
    print("  ".join(f"{head:>16}" for head in heads) + "      mIoU    +-   runs")
    for row in sorted(rows, key=None if numeric else str):
        values = np.array(rows[row])
        spread = f"{values.std(ddof=1):5.2f}" if len(values) > 1 else "    -"
        print("  ".join(f"{value!s:>16}" for value in row or ["all"]),
              f" {values.mean():8.2f} {spread}   {', '.join(f'{value:.1f}' for value in values)}")
    if keys and numeric and all(len(set(column)) == len(rows) for column in zip(*rows)):
        plot(picture, {"mean": [(row[0], np.mean(rows[row])) for row in sorted(rows)],
                       "lowest": [(row[0], min(rows[row])) for row in sorted(rows)],
                       "highest": [(row[0], max(rows[row])) for row in sorted(rows)]}, heads[0], "mIoU, %")
        print(f"plotted in {picture}")



def show_sweep(curve, name, picture):
    """Print mIoU around the best background threshold and draw it over all that change it. curve: [(threshold, mIoU)]."""
    best = max(curve, key=lambda point: point[1])
    near = [f"{t:.2f} {miou:.2%}" for t, miou in curve if abs(t - best[0]) < 0.055]
    print(f"background threshold, mIoU: {', '.join(near)}\nbest at {best[0]:.2f}: {best[1]:.2%}. Choose it on training "
          "images, not on those that you report")
    moving = [p for p in curve if any(q[1] != p[1] for q in curve if abs(q[0] - p[0]) < 0.015)]
    plot(picture, {name: [(t, 100 * miou) for t, miou in moving or curve]}, "background threshold (cosine similarity)",
         "mIoU, %")
    print(f"plotted in {picture}")
