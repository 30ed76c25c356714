"""The exercises of docs/exercises.md: minimal.py with one thing changed, trained and scored.

    python docs/exercises.py                            # all, three seeds: about a minute per run
    python docs/exercises.py "lambda 0" "temperature 1" --seeds 0

A change is a piece of minimal.py's text and what stands in its place, so that you can make it by
hand. Each run has one thread, so that it repeats exactly on one machine.
"""
import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOGITS = "(u @ w.T / 0.07).masked_fill(absent, -torch.inf)"
CHANGES = {                                         # name: [(text of minimal.py, its replacement)]
    "as it is": [],
    "lambda 0": [("(L_g + 0.05 * L_l).backward()", "L_g.backward()")],
    "local loss alone": [("(L_g + 0.05 * L_l).backward()", "L_l.backward()")],
    "argmax": [(f"{LOGITS}, c)", f"{LOGITS}, {LOGITS}.argmax(1))")],
    "temperature 1": [("w[c, :, None] / 0.1)", "w[c, :, None] / 1.0)")],
    "no gradient through the query": [("w[c, :, None] / 0.1)", "w.detach()[c, :, None] / 0.1)")],
    "bank without grounds": [("in enumerate(bank) for", "in enumerate(bank) if c >= 6 for")],
    "mean for the class token": [
        ("return tokens[:, 0],", "return F.normalize(tokens[:, 1:].mean(1), dim=-1),")],
    "every photo twice": [("torch.randint(SCENES, (BATCH,))",
                           "torch.randint(SCENES, (BATCH // 2,)).repeat(2)")],
    "trained projection of vision": [
        ("def draw(", "project = torch.nn.Linear(128, 128)\n\n\ndef draw("),
        ("log_scale], lr", "log_scale, *project.parameters()], lr"),
        ("    t_g, t = read(tower, captions)\n",
         "    t_g, t = read(tower, captions)\n"
         "    v_g, v = (F.normalize(project(x), dim=-1) for x in (v_g, v))\n"),
        ("@ see(images)[1].transpose(1, 2)",
         "@ F.normalize(project(see(images)[1]), dim=-1).transpose(1, 2)")],
}


def changed(name, seed):
    """The text of minimal.py with a change of CHANGES and a seed."""
    text = (ROOT / "minimal.py").read_text()
    for old, new in [*CHANGES[name], ("torch.manual_seed(0)", f"torch.manual_seed({seed})")]:
        if text.count(old) != 1:
            raise ValueError(f"{name}: minimal.py has {old!r} {text.count(old)} times, expected 1")
        text = text.replace(old, new)
    return text


def run(name, seed):
    """(mIoU in %, last L_g, last L_l) of a changed minimal.py."""
    printed = subprocess.run([sys.executable, "-c", changed(name, seed)], cwd=ROOT, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True,
                             stdout=subprocess.PIPE).stdout
    losses = re.findall(r"L_g (\S+)   L_l (\S+)", printed)[-1]
    return float(re.search(r"mIoU ([\d.]+)%", printed)[1]), *map(float, losses)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("names", nargs="*", default=list(CHANGES), help="of changes (default: all)")
    add("--seeds", nargs="+", type=int, default=(0, 1, 2), help="(default: 0 1 2)")
    add("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    args = parser.parse_args()
    print("| change | mIoU of each seed, % | L_g, L_l of step 180, first seed |\n|---|---|---|")
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {name: [pool.submit(run, name, seed) for seed in args.seeds] for name in args.names}
        for name, futures in runs.items():
            found = [future.result() for future in futures]
            mious = ", ".join(f"{miou:.1f}" for miou, _, _ in found)
            print(f"| {name} | {mious} | {found[0][1]:.2f}, {found[0][2]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
