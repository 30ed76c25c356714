"""How well OVSegmentor's groups follow regions, whatever they are called, and a picture of them.

    python tests/groups.py runs/ovsegmentor-1-toy groups.png            # on the toy world's scenes
    python tests/groups.py runs/ovsegmentor-1 groups.png --dataset voc

Prints how many groups an image uses, and the oracle's mIoU; see tests/oracle.py. A row of the
picture: photo, truth, prediction, the group of each pixel, and for each group how much each pixel
belongs to it (S), black to white, under the class that it is given. The legend has the classes.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from machinery.images import to_pixels
from machinery.networks.checkpoint import load_model
from machinery.scoring.benchmarks import open_dataset
from machinery.scoring.pictures import add_title, class_colours, grid, legend, paint
from machinery.scoring.protocol import embed
from methods.parts.grouping import patch_logits
from oracle import oracle_scores
from segment import resize

WIDTH = 128                                         # of a panel, in pixels


@torch.no_grad()
def soft_assignment(model, pixels):
    """S of uint8 pixels (3, H, W), at their size: (K, H, W)."""
    _, queries, keys, (h, w) = model.image(model.maps(pixels[None]))
    soft = patch_logits(queries, keys).softmax(dim=1).unflatten(-1, (h, w))         # (1, K, h, w)
    ph, pw = model.patch_size
    padded = F.interpolate(soft, (h * ph, w * pw), mode="bilinear", align_corners=False)[0]
    return padded[:, :pixels.shape[1], :pixels.shape[2]]


@torch.no_grad()
def panels(model, embeddings, names, image, truth):
    """A row of the picture; see the docstring above."""
    pixels = resize(to_pixels(image), model.protocol.short_side)
    soft = soft_assignment(model, pixels)                                           # (K, H, W)
    owner = soft.argmax(dim=0)
    scores = model.patch_scores(pixels[None], embeddings)[0][0]                     # (C, H', W')
    predicted = scores.argmax(dim=0)[:pixels.shape[1], :pixels.shape[2]]
    K = len(soft)
    C = len(names)
    both = [*names, *map(str, range(K))]            # groups have other colours than classes
    photo = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    row = [("photo", photo), ("truth", paint(image, np.asarray(truth), names, 1)),
           ("prediction", paint(photo, predicted.numpy(), names, 1)),
           (f"{len(owner.unique())} of {K} groups", paint(photo, owner.numpy() + C, both, 1))]
    for k in range(K):
        called = predicted[owner == k]
        title = names[called[0]] if len(called) else "(no pixel)"
        row.append((title, Image.fromarray((255 * soft[k]).byte().numpy()).convert("RGB")))
    size = (WIDTH, round(WIDTH * photo.height / photo.width))
    return [add_title(panel.resize(size, Image.NEAREST), title) for title, panel in row]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("picture")
    parser.add_argument("--dataset", default="toy")
    parser.add_argument("--images", type=int, default=100, help="so many (default: %(default)s)")
    parser.add_argument("--show", type=int, nargs="+", default=[0, 1, 2, 3],
                        help="numbers of the images in the picture (default: 0 1 2 3)")
    args = parser.parse_args(argv)
    model = load_model(args.checkpoint)
    short_side = model.protocol.short_side
    dataset = open_dataset(args.dataset)
    K = model.settings.image.groups
    used = []

    def groups_of(pixels):
        owner = soft_assignment(model, pixels).argmax(dim=0)
        used.append(len(owner.unique()))
        return owner

    found = oracle_scores(dataset, {"groups": groups_of}, short_side, args.images)
    print(f"{np.mean(used):.1f} of {K} groups in use, oracle mIoU {found['groups']['mIoU']:.2%}")

    names = [synonyms[0] for synonyms in dataset.classes]
    embeddings = embed(model, dataset.classes)
    rows = [panels(model, embeddings, names, *dataset[i][1:]) for i in args.show]
    picture = grid(rows, gap=4)
    lines = list(zip(class_colours(names), names))
    grid([[picture, legend(lines, picture.height, 14)]]).save(args.picture)


if __name__ == "__main__":
    main()
