"""K-means over the tokens of each image, and exact one-to-one assignment."""
import numpy as np
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
        if not moving.any():
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


def assign(cost):
    """The one-to-one assignment of rows to columns with the least total cost.

    cost: (rows, columns) array, rows <= columns, finite. Returns the column of each row, (rows,).
    Shortest augmenting paths with potentials: each row in turn takes the cheapest path of
    reassignments to a free column. Raises ValueError for a cost that is not finite.
    """
    cost = np.asarray(cost, float)
    if not np.isfinite(cost).all():
        raise ValueError("the costs of an assignment are not finite")
    rows, columns = cost.shape
    row_potential = np.zeros(rows)
    column_potential = np.zeros(columns + 1)
    owner = np.full(columns + 1, -1)                # row that has the column
    for new_row in range(rows):
        owner[-1] = new_row                         # one more column, where its path begins
        column = columns
        least = np.full(columns, np.inf)            # cost of the cheapest path to each column
        came_from = np.full(columns, -1)            # column before it on that path
        done = np.zeros(columns + 1, bool)
        while owner[column] >= 0:
            done[column] = True
            row = owner[column]
            reduced = cost[row] - row_potential[row] - column_potential[:-1]
            better = ~done[:-1] & (reduced < least)
            least[better] = reduced[better]
            came_from[better] = column
            column = int(np.where(done[:-1], np.inf, least).argmin())
            step = least[column]
            row_potential[owner[done]] += step
            column_potential[done] -= step
            least -= step
        while column != columns:                    # hand the columns on along the path
            owner[column] = owner[came_from[column]]
            column = came_from[column]
    taken = np.flatnonzero(owner[:-1] >= 0)
    result = np.empty(rows, int)
    result[owner[taken]] = taken
    return result
