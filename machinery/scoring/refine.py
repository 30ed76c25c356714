"""Pixel-adaptive refinement: each pixel's scores become a mean over nearby pixels of like colour.

From Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, where it
is called PAMR. It moves the borders of a mask to those of the photo's colours.
"""
import torch
import torch.nn.functional as F

DISTANCES = (1, 2, 4, 8, 12, 24)                    # pixels to the eight neighbours
SHARPNESS = 0.1                                     # of the weights; smaller: only like colours
CLASSES = 16                                        # refined at a time, to bound the memory


def neighbours(maps):
    """The neighbours of each pixel of maps (C, h, w), eight for each distance: 48 maps of the same
    shape, one after the other. Beyond the border the nearest pixel counts."""
    h, w = maps.shape[-2:]
    for distance in DISTANCES:
        padded = F.pad(maps[None], (distance,) * 4, mode="replicate")[0]
        for y in (0, distance, 2 * distance):
            for x in (0, distance, 2 * distance):
                if (y, x) != (distance, distance):
                    yield padded[:, y:y + h, x:x + w]


def neighbour_weights(pixels):
    """Weight of each neighbour of each pixel by the likeness of their colours: (48, h, w), sum 1.

    softmax over neighbours j of -mean over channels of |I_i - I_j| / (SHARPNESS x the standard
    deviation of the channel among these pixels). pixels: uint8 (3, h, w).
    """
    photo = pixels.float() / 255
    around = torch.stack([*neighbours(photo), photo])                               # (49, 3, h, w)
    spread = around.std(dim=0) + 1e-8                                               # (3, h, w)
    difference = ((around[:-1] - photo).abs_() / spread).mean(dim=1)                # (48, h, w)
    return (-difference / SHARPNESS).softmax(dim=0)


def refine(maps, pixels, steps):
    """Scores (C, h, w), averaged over like-coloured neighbours in a number of steps; float32.

    pixels: uint8 (3, h, w), the photo at the size of the scores.
    """
    weights = neighbour_weights(pixels)
    refined = []
    for part in maps.split(CLASSES):
        for _ in range(steps):
            mean = torch.zeros_like(part)
            for weight, neighbour in zip(weights, neighbours(part)):
                mean.addcmul_(weight, neighbour)
            part = mean
        refined.append(part)
    return torch.cat(refined)
