"""The toy tables of methods.md, ovsegmentor.md, sseg.md, ablations.md and benchmarks.md, and their
pictures, made by the commands that these pages name.

    python docs/toy_tables.py                   # all: 2.6 hours of one core
    python docs/toy_tables.py methods --rows simzss ovsegmentor-1 --seeds 0 1       # a piece
    python docs/toy_tables.py --dry-run                             # print the commands only
    python docs/toy_tables.py --pictures                            # of what is there

A row is nothing but commands of the project, each on one thread, so that it repeats exactly on one
machine with one version of torch. Another version or processor moves a seed by several points: so
both are printed. Everything is kept in runs/tables/; a row that is there is not measured again.
The tables are Markdown, with seconds of one core. --pictures needs matplotlib.
"""
import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Formatter
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from machinery.networks.checkpoint import load_model
from machinery.scoring.pictures import add_title, class_colours, grid, legend, paint
from machinery.scoring.protocol import embed
from machinery.toy import TOY_CLASSES, ToyScenes
from segment import segment_image, window_settings

RUNS = Path("runs/tables")
THREE = (0, 1, 2)
SHOWN = (5, 14, 46)                                 # scored scenes that have several things


# --------------------------------------------------------------------------------------------------
# The rows

class Row(NamedTuple):
    """title, as in the table. commands: {seed} is the seed, {out} the row's own folder, and the
    name of another row in braces that row's folder. The figure is the first mIoU that the commands
    print. seeds: those that are measured unless --seeds says others."""
    title: str
    commands: list
    seeds: tuple = THREE


def trained(recipe):
    return f"train.py --recipe {recipe} --seed {{seed}} --output {{out}}"


def scored(model):
    return f"eval.py --dataset toy --checkpoint {model} --output {{out}}/result.json"


def grouped(model):
    return f"tests/groups.py {model} {model}/groups.png --show {' '.join(map(str, SHOWN))}"


def trained_on(pairs):
    return trained(f"toy --pairs {pairs} --steps 500")


def of_size(pixels):
    return scored(f"{{simzss}} --short-side {pixels} --window {pixels} --stride {pixels // 2}")


def oracle(model):
    return f"tests/oracle.py --dataset toy --checkpoint {model} --picture {model}/masks.png"


def switched(switches):
    return Row(f"`{switches}`", [scored(f"{{simzss}} {switches}")])


NORM = "--set model.batch_norm=true"                # of S-Seg's variant, and half the recipe's rate
HALF_RATE = "--base-rate 0.006"
FULL_RATE = "--set model.blocks_start=random --set model.blocks_rate=1"
ROWS = {
    "simzss": Row("SimZSS", [trained("toy")]),
    "simzss-caption": Row("SimZSS, classes by `caption`",
                          [scored("{simzss} --class-embedding caption")]),
    "simzss-prompts": Row("SimZSS, prompts trained, too", [trained("simzss-prompts-toy")]),
    "simzss-prompts-concept": Row("the same, classes by `concept`",
                                  [scored("{simzss-prompts} --class-embedding concept")]),
    "lit": Row("SimZSS without its local loss (LiT), classes by `caption`",
               [trained("toy --lambda 0 --class-embedding caption")]),
    "dense-clip": Row("dense CLIP: the row above with artefacts (pixelclip.md), template \"{}\"",
                      [scored("clip:{lit} --templates plain")]),
    "pixelclip": Row("PixelCLIP, from that", [trained("pixelclip-toy --clip-model {lit}")]),
    "ovsegmentor-1": Row("OVSegmentor, stage 1", [trained("ovsegmentor-1-toy")]),
    "ovsegmentor-2": Row("OVSegmentor, stages 1 and 2",
                         [trained("ovsegmentor-2-toy --init {ovsegmentor-1}")]),
    "sseg": Row("S-Seg", [trained("sseg-toy")]),
    "sseg-local": Row("S-Seg, `local`, not the paper's",
                      [trained(f"sseg-toy --feature local {NORM} {HALF_RATE}")]),
    "sseg-plus": Row("S-Seg+, from the labels of the row above", [
        "-m machinery.toy {out}/scenes --count 150",
        "segment.py {out}/scenes/images --classes {out}/scenes/classes.txt --output {out}/labels "
        "--checkpoint {sseg-local}",
        trained("sseg-plus --train-data {out}/scenes/images --labels {out}/labels --backbone toy "
                "--image-size 128 --batch 16 --steps 200 --base-rate 0.016 --workers 0 "
                "--set protocol.short_side=128 --set protocol.window=128 "
                "--set protocol.stride=64"),
        scored("{out}")]),
    "sseg-full-rate": Row("the recipe's rate",
                          [trained(f"sseg-toy --feature local {NORM}")], (0,)),
    "sseg-no-norm": Row("no BatchNorm",
                        [trained(f"sseg-toy --feature local {HALF_RATE}")], (0,)),
    "sseg-student": Row("a map that learns, of the student", [trained(
        f"sseg-toy --feature local --set model.local_map=student {NORM} {HALF_RATE}")], (0,)),
    "sseg-pool": Row("the mask grid's cells, which have seen the whole image",
                     [trained(f"sseg-toy --feature pool {NORM} {HALF_RATE}")], (0,)),
    "sseg-query": Row("the query, the paper's",
                      [trained(f"sseg-toy --feature query {NORM} {HALF_RATE}")], (0,)),
    "sseg-oracle": Row("oracle of its masks", [oracle("{sseg}")]),
    "sseg-local-oracle": Row("oracle of the masks of `local`", [oracle("{sseg-local}")]),

    "ovsegmentor-1-oracle": Row("oracle of the groups, stage 1",
                                [grouped("{ovsegmentor-1}")]),
    "ovsegmentor-2-oracle": Row("oracle of the groups, stages 1 and 2",
                                [grouped("{ovsegmentor-2}")]),
    "ovsegmentor-random": Row("blocks start at random, at the full rate",
                              [trained(f"ovsegmentor-1-toy {FULL_RATE}")]),
    "ovsegmentor-entity": Row("without entity completion",
                              [trained("ovsegmentor-1-toy --entity-weight 0")]),
    "ovsegmentor-five": Row("five classes of a scene can score, as in the release",
                            [scored("{ovsegmentor-1} --set protocol.keep_classes=5")]),

    "lambda-0.01": Row("0.01", [trained("toy --lambda 0.01")]),
    "lambda-0.2": Row("0.2", [trained("toy --lambda 0.2")]),
    "lambda-1": Row("1", [trained("toy --lambda 1")]),
    "pairs-32": Row("32", [trained_on(32)]),
    "pairs-125": Row("125", [trained_on(125)]),
    "pairs-500": Row("500", [trained_on(500)]),
    "target": Row("`--local-target argmax`, the release's", [trained("toy --local-target argmax")]),
    "target-caption": Row("the same, classes by `caption`",
                          [scored("{target} --class-embedding caption")]),
    "query": Row("`--pool-query caption`, the paper's", [trained("toy --pool-query caption")]),
    "pixels": Row("pixels normalised as CLIP's, as in the release", [trained(
        "toy --set model.backbone.mean=[0.48145466,0.4578275,0.40821073] "
        "--set model.backbone.std=[0.26862954,0.26130258,0.27577711]")]),
    "cache": Row("`--cache-features`: whole scenes, no crops",
                 [trained("toy --cache-features {out}-cache")]),
    "bank": Row("`--bank`: the names of the 12 things, no ground", [
        "-c \"from machinery import toy; open('{out}.txt', 'w').write('\\n'.join(toy.THINGS))\"",
        trained("toy --bank {out}.txt")]),
    "propagate-0.8": switched("--propagate 0.8"),
    "propagate-0.9": switched("--propagate 0.9"),
    "propagate-0.95": switched("--propagate 0.95"),
    "image-weight": switched("--image-weight 0.5"),
    "image-weight-1": switched("--image-weight 1"),
    "blend": switched("--blend triangle"),
    "scales-0.5": switched("--scales 0.5 1"),
    "scales": switched("--scales 1 1.5"),
    "refine": switched("--refine-steps 10"),
    "propagate-blend": switched("--propagate 0.9 --blend triangle"),
    "propagate-image-weight": switched("--propagate 0.9 --image-weight 0.5"),
    "propagate-scales-0.5": switched("--propagate 0.9 --scales 0.5 1"),
    "propagate-scales": switched("--propagate 0.9 --scales 1 1.5"),
    "propagate-refine": switched("--propagate 0.9 --refine-steps 10"),
    "pixels-64": Row("64", [of_size(64)]),
    "pixels-192": Row("192", [of_size(192)]),
    "pixels-256": Row("256", [of_size(256)]),
}
TABLES = {
    "methods": ["simzss", "simzss-caption", "simzss-prompts", "simzss-prompts-concept", "lit",
                "dense-clip", "pixelclip", "ovsegmentor-1", "ovsegmentor-2", "sseg",
                "sseg-local", "sseg-plus"],
    "ovsegmentor": ["ovsegmentor-1", "ovsegmentor-1-oracle", "ovsegmentor-2",
                    "ovsegmentor-2-oracle", "ovsegmentor-five", "ovsegmentor-random",
                    "ovsegmentor-entity"],
    "sseg": ["sseg-local", "sseg-full-rate", "sseg-no-norm", "sseg-student", "sseg-pool",
             "sseg-query", "sseg", "sseg-oracle", "sseg-local-oracle"],
    "lambda": ["lit", "lambda-0.01", "simzss", "lambda-0.2", "lambda-1"],
    "pairs": ["pairs-32", "pairs-125", "pairs-500", "simzss"],
    "switches": ["simzss", "target", "target-caption", "query", "pixels", "cache", "bank"],
    "test-time": ["simzss", "propagate-0.8", "propagate-0.9", "propagate-0.95", "image-weight",
                  "image-weight-1", "blend", "scales-0.5", "scales", "refine", "propagate-blend",
                  "propagate-image-weight", "propagate-scales-0.5", "propagate-scales",
                  "propagate-refine"],
    "sizes": ["simzss", "pixels-64", "pixels-192", "pixels-256"],
}


# --------------------------------------------------------------------------------------------------
# Measuring

def folder(name, seed):
    return RUNS / f"{name}-{seed}"


def commands(name, seed):
    """The command lines of a row, ready for a shell."""
    places = {other: folder(other, seed) for other in ROWS}
    places |= {"seed": seed, "out": folder(name, seed)}
    return [f"python {command.format_map(places)}" for command in ROWS[name].commands]


def needs(name):
    """The rows whose models a row takes."""
    named = {field for command in ROWS[name].commands
             for _, field, *_ in Formatter().parse(command)}
    return [other for other in ROWS if other in named]


def result_file(name, seed):
    return RUNS / f"{name}-{seed}.json"


def processor():
    """Its name, as far as the system tells."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:                                 # no Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def measure(name, seed, before=()):
    """Run a row's commands and keep its figure. before: futures of the rows that it needs."""
    for future in before:
        future.result()
    seconds = 0.0
    shutil.rmtree(folder(name, seed), ignore_errors=True)       # of a row that was broken off
    log = RUNS / f"{name}-{seed}.log"
    log.write_text("")
    for command in commands(name, seed):
        print(command, flush=True)
        with open(log, "a") as file:
            process = subprocess.Popen([sys.executable, *shlex.split(command)[1:]], cwd=ROOT,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"},
                                       stdout=file, stderr=file)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{command} failed; see {log}")
        seconds += used.ru_utime + used.ru_stime
    miou = float(re.findall(r"mIoU ([\d.]+)%", log.read_text())[0])
    result_file(name, seed).write_text(json.dumps({
        "mIoU": miou, "seconds": round(seconds), "torch": torch.__version__,
        "processor": processor()}))


def measure_all(wanted, jobs):
    """Measure the rows (name, seed) that are not there, and those that they need, jobs at a time.
    Returns the errors of those that failed."""
    found = {}

    def start(name, seed):
        if (name, seed) not in found and not result_file(name, seed).exists():
            before = [start(other, seed) for other in needs(name)]
            found[name, seed] = pool.submit(measure, name, seed, [one for one in before if one])
        return found.get((name, seed))

    RUNS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        for name, seed in wanted:
            start(name, seed)
    return {str(future.exception()) for future in found.values() if future.exception()}


# --------------------------------------------------------------------------------------------------
# Tables and pictures

def table(title, rows, seeds):
    """A Markdown table of what is there."""
    lines = [f"\n### {title}\n", "| | mIoU of each seed | mean | seconds | command |",
             "|---|---|---|---|---|"]
    made = set()
    for name in rows:
        there = [json.loads(result_file(name, seed).read_text())
                 for seed in seeds or ROWS[name].seeds if result_file(name, seed).exists()]
        if not there:
            continue
        mious = [result["mIoU"] for result in there]
        spread = f" ± {np.std(mious, ddof=1):.1f}" if len(mious) > 1 else ""
        seconds = np.mean([result["seconds"] for result in there])
        made |= {f"torch {result['torch']}, {result['processor']}" for result in there}
        last = re.sub(r" --output \S+", "", commands(name, "S")[-1]).replace(f"{RUNS}/", "")
        lines.append(f"| {ROWS[name].title} | {' '.join(f'{miou:.1f}' for miou in mious)} "
                     f"| {np.mean(mious):.1f}{spread} | {seconds:.0f} | `{last}` |")
    return "\n".join([*lines, "", *(f"One thread, {machine}." for machine in sorted(made))])


def masks_of(name):
    """What the model of a row, seed 0, predicts for the scenes SHOWN, (H, W) each."""
    if name == "dense-clip":
        model = load_model(f"clip:{folder('lit', 0)}", protocol={"templates": "plain"})
    else:
        model = load_model(folder(name, 0))
    embeddings = embed(model, TOY_CLASSES)
    settings = window_settings(model.protocol)
    return [segment_image(model, ToyScenes()[i][1], embeddings, **settings)[0] for i in SHOWN]


def draw_methods(titles):
    """A row for each scene SHOWN: photo, truth, and what each row predicts. titles: {row: title}.
    """
    classes = [name for [name] in TOY_CLASSES]
    scenes = [ToyScenes()[i] for i in SHOWN]
    masks = {"truth": [truth for _, _, truth in scenes]}
    masks |= {title: masks_of(name) for name, title in titles.items()}
    rows = []
    for i, (_, image, _) in enumerate(scenes):
        panels = {"photo": image, **{title: paint(image, np.asarray(column[i]), classes, 1)
                                     for title, column in masks.items()}}
        rows.append([add_title(panel.resize((192, 192), Image.NEAREST), title)
                     for title, panel in panels.items()])
    picture = grid(rows, gap=4)
    return grid([[picture, legend(list(zip(class_colours(classes), classes)), picture.height, 14)]])


def draw_pictures():
    """The pictures of the pages, from the rows of seed 0 and the tables lambda and pairs."""
    from plots import plot
    for name, setting in (("lambda", "model.local_weight"), ("pairs", "run.pairs")):
        files = [folder(row, seed) / "result.json" for row in TABLES[name] if row != "lit"
                 for seed in THREE]
        plot(setting, f"docs/{name}.png", [file for file in files if file.exists()])
    draw_methods({"simzss": "SimZSS", "ovsegmentor-1": "OVSegmentor", "pixelclip": "PixelCLIP",
                  "sseg-local": "S-Seg, local"}).save("docs/methods.png")
    draw_methods({"dense-clip": "dense CLIP", "pixelclip": "PixelCLIP"}).save("docs/pixelclip.png")
    shutil.copy(folder("ovsegmentor-1", 0) / "groups.png", "docs/ovsegmentor.png")
    shutil.copy(folder("sseg-local", 0) / "masks.png", "docs/sseg.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("tables", nargs="*", help=f"of {', '.join(TABLES)} (default: all)")
    add("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"only these: {', '.join(ROWS)}")
    add("--seeds", nargs="+", type=int, help="(default: three; one for S-Seg's other forms)")
    add("--jobs", type=int, default=1, help="commands at a time, one core each (default: 1)")
    add("--dry-run", action="store_true", help="print the commands, run none")
    add("--pictures", action="store_true", help="draw the pictures of docs/ from what is there")
    args = parser.parse_args(argv)
    if unknown := set(args.tables) - set(TABLES):
        parser.error(f"no table {', '.join(unknown)}; choose from {', '.join(TABLES)}")
    os.chdir(ROOT)
    if args.pictures:
        return draw_pictures()

    tables = {title: [name for name in TABLES[title] if not args.rows or name in args.rows]
              for title in args.tables or TABLES}
    wanted = dict.fromkeys((name, seed) for rows in tables.values() for name in rows
                           for seed in args.seeds or ROWS[name].seeds)
    if args.dry_run:
        for name, seed in wanted:
            print(*commands(name, seed), sep="\n")
        return
    errors = measure_all(wanted, args.jobs)
    for title, rows in tables.items():
        if rows:
            print(table(title, rows, args.seeds))
    if errors:
        sys.exit("error: " + "\nerror: ".join(sorted(errors)))


if __name__ == "__main__":
    main()
