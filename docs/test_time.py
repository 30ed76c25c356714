"""What the switches at test time do (docs/benchmarks.md): a picture, and what each costs.

    python docs/test_time.py PHOTO "class, class" CHECKPOINT docs/test_time.png
    python docs/test_time.py PHOTO "class, class" CHECKPOINT

The first draws the photo's mask with each switch, by segment.py. The second prints seconds of one
core, the median of three, and the peak of memory, for the photo in two sizes.
"""
import json
import os
import resource
import shlex
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import segment
from machinery.scoring.pictures import add_title, grid
from machinery.settings import given

PICTURE = ["", "--propagate 0.9", "--propagate 0.95", "--image-weight 0.5", "--scales 1 1.5",
           "--refine-steps 10", "--blend triangle", "--propagate 0.9 --refine-steps 10"]
COSTS = ["", "--propagate 0.9", "--image-weight 0.5", "--blend triangle", "--scales 0.5 1",
         "--scales 1 1.5", "--refine-steps 10"]
SIZES = [(640, 480), (4000, 3000)]                  # (width, height) of the photo
OFF = ["--propagate", "0", "--blend", "mean"]       # segment.py has them on by itself


def draw(photo, classes, checkpoint, picture, columns=3, height=256):
    """height: pixels of the photo in each panel; its legend is right of it."""
    panels = []
    with tempfile.TemporaryDirectory() as folder:
        for switch in PICTURE:
            segment.main([photo, "--classes", classes, "--checkpoint", checkpoint, "--output",
                          folder, *OFF, *shlex.split(switch)])
            with Image.open(Path(folder) / f"{Path(photo).stem}_overlay.png") as overlay:
                size = (round(height * overlay.width / overlay.height), height)
                panels.append(add_title(overlay.resize(size), switch or "as it is"))
    grid([panels[i:i + columns] for i in range(0, len(panels), columns)], gap=6).save(picture)


def costs(photo, classes, checkpoint):
    """Print a Markdown table. One thread; each photo in a process of its own, whose peak of memory
    is then the photo's."""
    torch.set_num_threads(1)
    model = segment.load_model(checkpoint, device="cpu")
    own = model.protocol
    photo = segment.load_image(photo)
    print("| photo | switch | seconds | GiB |\n|---|---|---|---|")
    for size in SIZES:
        resized = photo.resize(size, Image.BICUBIC)
        for switch in COSTS:
            args = segment.parse_args(["-", "--classes", classes, *OFF, *shlex.split(switch)])
            model.protocol = own                    # without the switch before
            segmenter = segment.Segmenter(classes, model, **given(args)["protocol"])
            runs = [apart(segmenter, resized) for _ in range(3)]
            seconds, memory = (median(values) for values in zip(*runs))
            print(f"| {size[0]} x {size[1]} | {switch or 'as it is'} | {seconds:.2f} "
                  f"| {memory:.2f} |", flush=True)


def apart(segmenter, photo):
    """Segment a photo in a child: its CPU time in seconds, and its peak of memory in GiB."""
    reading, writing = os.pipe()
    if not os.fork():
        start = time.process_time()
        segmenter(photo)
        used = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(writing, json.dumps(used).encode())
        os._exit(0)
    os.wait()
    os.close(writing)                               # else one waits for ever for a child that died
    with open(reading) as sent:
        seconds, kilobytes = json.load(sent)
    return seconds, kilobytes / 2 ** 20


if __name__ == "__main__":
    costs(*sys.argv[1:]) if len(sys.argv) == 4 else draw(*sys.argv[1:])
