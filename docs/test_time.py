"""The picture of benchmarks.md: one photo's mask with each switch of test time, by segment.py.

    python docs/test_time.py PHOTO "class, class" CHECKPOINT docs/test_time.png
"""
import shlex
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import segment
from machinery.scoring.pictures import add_title, grid

SWITCHES = ["", "--propagate 0.8", "--propagate 0.95", "--image-weight 0.5", "--scales 1 1.5",
            "--refine-steps 10", "--blend triangle", "--propagate 0.8 --refine-steps 10"]


def draw(photo, classes, checkpoint, picture, columns=3, height=256):
    """height: pixels of the photo in each panel; its legend is right of it."""
    panels = []
    with tempfile.TemporaryDirectory() as folder:
        for switch in SWITCHES:
            segment.main([photo, "--classes", classes, "--checkpoint", checkpoint, "--output",
                          folder, "--propagate", "0", "--blend", "mean", *shlex.split(switch)])
            with Image.open(Path(folder) / f"{Path(photo).stem}_overlay.png") as overlay:
                size = (round(height * overlay.width / overlay.height), height)
                panels.append(add_title(overlay.resize(size), switch or "as it is"))
    grid([panels[i:i + columns] for i in range(0, len(panels), columns)], gap=6).save(picture)


if __name__ == "__main__":
    draw(*sys.argv[1:])
