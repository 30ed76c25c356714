"""The two plots of ablations.md: mIoU over one setting, its mean and its range over seeds.

    python docs/plots.py model.local_weight docs/lambda.png runs/lambda-*/result.json
    python docs/plots.py run.pairs docs/pairs.png runs/pairs-*/result.json

needs matplotlib (pip install matplotlib). `docs/toy_tables.py --pictures` draws both for the pages.
"""
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from machinery.scoring.results import read_result


def plot(setting, picture, paths):
    """setting: dotted name of a number in the results, as in --compare."""
    points = {}                                     # value of the setting -> mIoUs, in %
    for path in paths:
        settings, miou, _ = read_result(path)
        value = settings[setting]
        if value is None:                           # run.pairs = none: all pairs of a pass
            value = settings["run.epoch_pairs"]
        points.setdefault(value, []).append(miou)
    x = sorted(points)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, [np.mean(points[value]) for value in x], marker="o")
    axes.fill_between(x, [min(points[value]) for value in x], [max(points[value]) for value in x],
                      alpha=0.2)
    if x[0] > 0:
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:,g}" for value in x])
        axes.minorticks_off()
    axes.set_xlabel(setting.partition(".")[2].replace("_", " "))
    axes.set_ylabel("mIoU, %")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    plot(sys.argv[1], sys.argv[2], sys.argv[3:])
