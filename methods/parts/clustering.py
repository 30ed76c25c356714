"""K-means over the tokens of each image."""
import torch


@torch.no_grad()
def kmeans(tokens, clusters, steps=10, first=None, tolerance=None):
    """Lloyd's algorithm on each image by itself, all images at once.

    tokens: (B, N, D).
    clusters: K.
    steps: at most.
    first: (B, K) int64, tokens that are the first centres; None = `farthest_tokens`.
    tolerance: an image is done once the squared shifts of its centres sum to at most this.
    Returns labels (B, N) int64 in 0..K-1; a label may occur nowhere. A centre that loses all its
    tokens keeps its value.
    """
    tokens = tokens.float()
    if first is None:
        first = farthest_tokens(tokens, clusters)
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    centres = tokens[rows, first]                                                   # (B, K, D)
    moving = torch.ones(len(tokens), 1, 1, dtype=torch.bool, device=tokens.device)
    for _ in range(steps):
        member = torch.nn.functional.one_hot(nearest(tokens, centres), clusters)    # (B, N, K)
        size = member.sum(dim=1)[..., None]                                         # (B, K, 1)
        mean = member.to(tokens.dtype).transpose(1, 2) @ tokens / size.clamp(min=1)
        moved = torch.where(moving & (size > 0), mean, centres)
        if tolerance is not None:                   # an image that has converged stands still
            shift = (moved - centres).square().sum(dim=(1, 2), keepdim=True)
            moving = moving & (shift > tolerance)
        centres = moved
        if tolerance is not None and not moving.any():      # waits for the device
            break
    return nearest(tokens, centres)


def nearest(tokens, centres):
    """Index of the nearest centre (B, K, D) of each token (B, N, D): (B, N)."""
    # |x - c|^2 without |x|^2, which is the same for all centres
    distance = centres.square().sum(dim=-1)[:, None] - 2 * tokens @ centres.transpose(1, 2)
    return distance.argmin(dim=-1)


def farthest_tokens(tokens, count):
    """Indices (B, count) of tokens that lie far apart: the one farthest from the image's mean, then
    again and again the one farthest from its nearest centre."""
    far = (tokens - tokens.mean(dim=1, keepdim=True)).square().sum(dim=-1)          # (B, N)
    chosen = [far.argmax(dim=1)]
    rows = torch.arange(len(tokens), device=tokens.device)
    to_nearest = torch.full_like(far, torch.inf)
    while len(chosen) < count:
        centre = tokens[rows, chosen[-1]][:, None]                                  # (B, 1, D)
        to_nearest = to_nearest.minimum((tokens - centre).square().sum(dim=-1))
        chosen.append(to_nearest.argmax(dim=1))
    return torch.stack(chosen, dim=1)
