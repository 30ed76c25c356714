"""How well OVSegmentor's groups follow regions, whatever they are called, and a picture of them.

    python tests/groups.py runs/ovsegmentor-1-toy groups.png            # on the toy world's scenes
    python tests/groups.py runs/ovsegmentor-1 groups.png --dataset voc

Prints how many groups an image uses, and the oracle's mIoU; see tests/oracle.py. A row of the
picture: photo, truth, the group of each pixel, and how much each pixel belongs to each group (S),
black to white.
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
from methods.parts.grouping import patch_logits
from oracle import oracle_scores
from segment import resize

ROWS = 8                                            # of the picture
COLOURS = np.random.default_rng(5).integers(256, size=(256, 3)).astype(np.uint8)


@torch.no_grad()
def soft_assignment(model, pixels):
    """S of uint8 pixels (3, H, W), at their size: (K, H, W)."""
    _, queries, keys, (h, w) = model.image(model.maps(pixels[None]))
    soft = patch_logits(queries, keys).softmax(dim=1).unflatten(-1, (h, w))         # (1, K, h, w)
    ph, pw = model.patch_size
    padded = F.interpolate(soft, (h * ph, w * pw), mode="bilinear", align_corners=False)[0]
    return padded[:, :pixels.shape[1], :pixels.shape[2]]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("picture")
    parser.add_argument("--dataset", default="toy")
    parser.add_argument("--images", type=int, default=100, help="so many (default: %(default)s)")
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

    picture = Image.new("RGB", (128 * (3 + K), 128 * min(ROWS, len(used))))
    for i in range(min(ROWS, len(used))):
        _, image, truth = dataset[i]
        pixels = resize(to_pixels(image), short_side)
        soft = soft_assignment(model, pixels)
        grey = (255 * soft).byte().numpy()[..., None].repeat(3, axis=-1)            # (K, H, W, 3)
        panels = [pixels.permute(1, 2, 0).numpy(), COLOURS[truth], COLOURS[soft.argmax(dim=0)],
                  *grey]
        for j, panel in enumerate(panels):
            picture.paste(Image.fromarray(panel).resize((128, 128)), (128 * j, 128 * i))
    picture.save(args.picture)


if __name__ == "__main__":
    main()
