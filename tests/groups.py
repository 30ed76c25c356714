"""How well OVSegmentor's groups follow regions, whatever they are called, and a picture of them.

    python tests/groups.py runs/ovsegmentor-1-toy groups.png            # on the toy world's scenes
    python tests/groups.py runs/ovsegmentor-1 groups.png --dataset voc

Prints how many groups an image uses, and the oracle's mIoU: each group gets the class that most of
its pixels have in truth. A row of the picture: photo, truth, the group of each pixel, and how much
each pixel belongs to each group (S), black to white.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from eval import confusion_matrix, scores
from machinery.images import to_pixels
from machinery.networks.checkpoint import load_model
from machinery.scoring.benchmarks import IGNORE, open_dataset
from methods.parts.grouping import patch_logits

ROWS = 8                                            # of the picture
COLOURS = np.random.default_rng(5).integers(256, size=(256, 3)).astype(np.uint8)


@torch.no_grad()
def soft_assignment(model, image):
    """S of a PIL image, at its own size: (K, H, W)."""
    _, queries, keys, (h, w) = model.image(model.maps(to_pixels(image)[None]))
    soft = patch_logits(queries, keys).softmax(dim=1).unflatten(-1, (h, w))         # (1, K, h, w)
    ph, pw = model.patch_size
    padded = F.interpolate(soft, (h * ph, w * pw), mode="bilinear", align_corners=True)[0]
    return padded[:, :image.height, :image.width]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("picture")
    parser.add_argument("--dataset", default="toy")
    parser.add_argument("--images", type=int, default=100, help="so many (default: %(default)s)")
    args = parser.parse_args(argv)
    model = load_model(args.checkpoint)
    dataset = open_dataset(args.dataset)
    C = len(dataset.classes)
    matrix = 0
    used = []
    rows = []
    for i in range(min(args.images, len(dataset))):
        _, image, mask = dataset[i]
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        soft = soft_assignment(model, image)
        owner = soft.argmax(dim=0).numpy()                                        # (H, W)
        oracle = np.zeros_like(mask)
        for group in np.unique(owner):
            truth = mask[owner == group]
            oracle[owner == group] = np.bincount(truth[truth != IGNORE], minlength=C).argmax()
        matrix = matrix + confusion_matrix(oracle, mask, C, IGNORE)
        used.append(len(np.unique(owner)))
        if i < ROWS:
            grey = [np.repeat((255 * group).byte().numpy()[..., None], 3, 2) for group in soft]
            row = np.concatenate([np.array(image), COLOURS[mask], COLOURS[owner], *grey], axis=1)
            rows.append(Image.fromarray(row).resize((128 * (3 + len(soft)), 128)))
    print(f"{np.mean(used):.1f} of {len(soft)} groups in use, oracle mIoU "
          f"{scores(matrix)['mIoU']:.2%}")
    picture = Image.new("RGB", (rows[0].width, 128 * len(rows)))
    for i, row in enumerate(rows):
        picture.paste(row, (0, 128 * i))
    picture.save(args.picture)


if __name__ == "__main__":
    main()
