"""How good are an image's regions, whatever they are called: the oracle mIoU of S-Seg.

    python tests/oracle.py --dataset toy --checkpoint runs/sseg-toy     # its masks, and its teacher
    python tests/oracle.py --dataset voc                                # DINO's clusters alone

Each region of an image is given the class, background included, that most of its scored pixels
have; pixels are counted over the dataset. Regions: the largest mask of each pixel, of the whole
image at the short side of the protocol, and the teacher's clusters (docs/sseg.md, section 1).

With --picture FILE a row of the picture is an image: photo, truth, the teacher's clusters, the
masks, the masks with their true names, and what the model predicts.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from eval import confusion_matrix, scores
from machinery.errors import one_line_errors
from machinery.images import to_pixels
from machinery.networks.checkpoint import load_model
from machinery.scoring.benchmarks import BENCHMARKS, IGNORE, open_dataset
from machinery.scoring.pictures import add_title, class_colours, grid, legend, paint
from machinery.scoring.protocol import embed
from machinery.settings import read, read_recipe
from methods.parts.clustering import kmeans
from methods.sseg import SSegProtocol, SSegSettings
from model import VisionBackbone
from segment import resize


def named_by_truth(regions, truth, classes):
    """The majority class of each region. regions, truth: (H, W) int; truth is IGNORE where it is
    not scored. A region without any scored pixel becomes class 0. Returns (H, W)."""
    scored = truth != IGNORE
    count = torch.zeros(int(regions.max()) + 1, classes, dtype=torch.int64)
    count.index_put_((regions[scored], truth[scored].long()), torch.tensor(1), accumulate=True)
    return count.argmax(dim=1)[regions]


@torch.no_grad()
def teacher_regions(teacher, pixels, clusters):
    """Clusters of the teacher's tokens in each pixel: (H, W). pixels: uint8 (3, H, W)."""
    _, tokens, grid = teacher(teacher.normalise(pixels[None]))
    labels = kmeans(tokens, clusters).unflatten(1, grid)                            # (1, h, w)
    sides = [side * patch for side, patch in zip(grid, teacher.patch_size)]
    labels = F.interpolate(labels[None].float(), sides, mode="nearest")[0, 0].long()
    return labels[:pixels.shape[1], :pixels.shape[2]]


def mask_regions(model, pixels):
    """The largest mask of each pixel: (H, W)."""
    masks, _, covered = model.masks(pixels[None])
    masks = F.interpolate(masks, covered, mode="bilinear")
    return masks[0].argmax(dim=0)[:pixels.shape[1], :pixels.shape[2]]


def oracle_scores(dataset, ways, short_side, limit=None):
    """`eval.scores` of each way. ways: {name: function from pixels uint8 (3, H, W) to regions}."""
    C = len(dataset.classes)
    total = min(limit or len(dataset), len(dataset))
    matrices = {name: torch.zeros(C, C, dtype=torch.int64) for name in ways}
    for i in tqdm(range(total), unit=" images", disable=None):
        _, image, truth = dataset[i]
        truth = torch.as_tensor(truth)
        pixels = resize(to_pixels(image), short_side)
        for name, regions_of in ways.items():
            regions = regions_of(pixels)[None, None].float()
            regions = F.interpolate(regions, truth.shape, mode="nearest")[0, 0].long()
            matrices[name] += confusion_matrix(named_by_truth(regions, truth, C), truth, C, IGNORE)
    return {name: scores(matrix) for name, matrix in matrices.items()}


@torch.no_grad()
def picture(dataset, model, ways, short_side, rows=6):
    """See the docstring of this file. ways: as of `oracle_scores`, "masks" and "teacher"."""
    names = [synonyms[0] for synonyms in dataset.classes]
    C = len(names)
    # Colours of regions are not those of classes
    colours = [*names, *(f"region {i}" for i in range(model.settings.queries))]
    embeddings = embed(model, dataset.classes)
    panels = []
    for i in range(min(rows, len(dataset))):
        _, image, truth = dataset[i]
        pixels = resize(to_pixels(image), short_side)
        H, W = pixels.shape[1:]
        truth = F.interpolate(torch.as_tensor(truth)[None, None].float(), (H, W))[0, 0].long()
        clusters, masks = (ways[name](pixels) for name in ("teacher", "masks"))
        scores, covered = model.patch_scores(pixels[None], embeddings)              # (1, C, h, w)
        predicted = F.interpolate(scores, covered, mode="bilinear")[0, :, :H, :W].argmax(dim=0)
        photo = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        row = {"photo": photo, "truth": paint(photo, truth.numpy(), names, 1),
               "teacher's clusters": paint(photo, clusters.numpy() + C, colours, 1),
               "masks": paint(photo, masks.numpy() + C, colours, 1),
               "masks, true names": paint(photo, named_by_truth(masks, truth, C).numpy(), names, 1),
               "prediction": paint(photo, predicted.numpy(), names, 1)}
        panels.append([add_title(panel, title) for title, panel in row.items()])
    whole = grid(panels, gap=4)
    return grid([[whole, legend(list(zip(class_colours(names), names)), whole.height, 14)]])


def main(argv=None):
    parser = argparse.ArgumentParser(description="Oracle mIoU of regions; see the docstring.")
    add = parser.add_argument
    add("--dataset", required=True, help=f"toy, {', '.join(BENCHMARKS)}, or a folder")
    add("--data", default="data", help="folder that holds the benchmarks (default: %(default)s)")
    add("--checkpoint", help="of S-Seg; default: the clusters of the recipe's teacher alone")
    add("--backbone-weights", help="local file of the teacher's weights")
    add("--limit", type=int, help="score the first N images only")
    add("--picture", help="file to draw the regions of the first six images in; needs a checkpoint")
    args = parser.parse_args(argv)
    with one_line_errors("score smaller photos"):
        if args.picture and not args.checkpoint:
            raise ValueError("--picture shows a model's masks; name it with --checkpoint")
        dataset = open_dataset(args.dataset, root=args.data)
        ways = {}
        if args.checkpoint:
            model = load_model(args.checkpoint)
            settings = model.settings
            short_side = model.protocol.short_side
            ways["masks"] = lambda pixels: mask_regions(model, pixels)
        else:
            settings = read(SSegSettings, read_recipe("sseg")["model"], "the recipe sseg")
            short_side = SSegProtocol().short_side
        if args.backbone_weights:
            settings.backbone.weights = args.backbone_weights
        teacher = VisionBackbone(**vars(settings.backbone))
        ways["teacher"] = lambda pixels: teacher_regions(teacher, pixels, settings.clusters)
        if args.picture:
            picture(dataset, model, ways, short_side).save(args.picture)
        for name, result in oracle_scores(dataset, ways, short_side, args.limit).items():
            print(f"{name}: oracle mIoU {result['mIoU']:.2%}   mAcc {result['mAcc']:.2%}   aAcc "
                  f"{result['aAcc']:.2%}")


if __name__ == "__main__":
    main()
