"""Label propagation: patches of a photo that look alike, and lie near, share their scores.

Idea and constants are those of LPOSS ("LPOSS: Label Propagation Over Patches and Pixels for
Open-vocabulary Semantic Segmentation", CVPR 2025). With unit-norm patch tokens v at places x,

    W_nm = max(0, v_n . v_m)^3 exp(-0.01 |x_n - x_m|), zero where n and m are at one place
    S = D^-1/2 W D^-1/2, D_n = sum over m of W_nm
    scores' = (1 - A) (I - A S)^-1 scores

The factor 1 - A is ours: it changes no mask, and keeps the scores in their range, for thresholds.

Windows overlap, so a place may be seen k times. Each of these patches counts 1 / k in the sums over
m, so that a place counts once. With R the root of these shares, this is the system
(I - A R S R) R scores' = (1 - A) R scores, symmetric again, and D_n = sum over m of R_m^2 W_nm.
"""
from functools import partial

import torch
import torch.nn.functional as F

POWER = 3                                           # of a similarity
DECAY = 0.01                                        # of a weight, per pixel of the resized photo
DENSE = 2048                                        # up to so many patches: the system as a whole
NEIGHBOURS = 400                                    # of more: how many others each is tied to,
STEPS = 10                                          # ... steps of conjugate gradients,
BLOCK = 2 ** 24                                     # ... and similarities in memory at a time


def propagate(tokens, places, share, scores, strength):
    """Scores of N patches, propagated: (N, C), float32.

    tokens: (N, D), unit-norm.
    places: (N, 2), pixels.
    share: (N,), 1 / how many of the patches are at that place.
    scores: (N, C).
    strength: A, in 0..1, 1 left out.
    """
    tokens, scores = tokens.float(), scores.float()
    if len(tokens) <= DENSE:
        weights = edge_weights(tokens @ tokens.T, places[:, None] - places)         # (N, N)
        tied = partial(torch.matmul, weights)
    else:
        tied = partial(tied_sums, both_ways(*nearest_patches(tokens, places)))

    degree = tied(share[:, None])                                                   # D, (N, 1)
    root = share.sqrt()[:, None]                                                    # R
    scale = root / degree.clamp(min=1e-12).sqrt()   # a patch like no other has the degree 0
    right = (1 - strength) * root * scores
    if len(tokens) <= DENSE:
        system = torch.eye(len(tokens), device=tokens.device) - strength * scale * weights * scale.T
        return torch.linalg.solve(system, right) / root
    return conjugate_gradients(lambda x: x - strength * scale * tied(scale * x), right) / root


def edge_weights(similarity, offset):
    """W. similarity: v_n . v_m. offset: x_n - x_m, of the same shape and two more numbers."""
    distance = offset.norm(dim=-1)
    weights = similarity.clamp(min=0) ** POWER * torch.exp(-DECAY * distance)
    return weights * (distance > 0)


def nearest_patches(tokens, places):
    """Each patch and the NEIGHBOURS most like it: (N, K) int32, and W there."""
    N = len(tokens)
    K = min(NEIGHBOURS + 1, N)
    nearest = torch.empty(N, K, dtype=torch.int32, device=tokens.device)
    weights = torch.empty(N, K, device=tokens.device)
    for rows in torch.arange(N, device=tokens.device).split(max(1, BLOCK // N)):
        similarity, found = (tokens[rows] @ tokens.T).topk(K)                       # (rows, K)
        nearest[rows] = found.int()
        weights[rows] = edge_weights(similarity, places[rows, None] - places[found])
    return nearest, weights


def both_ways(nearest, weights):
    """W of the nearest patches and its transpose, as two lists of rows for `tied_sums`: that n is
    near m does not say that m is near n."""
    N, K = nearest.shape
    order = nearest.flatten().argsort(stable=True)  # by the patch that a row is turned to
    count = nearest.flatten().bincount(minlength=N)
    return [(nearest.flatten(), torch.arange(N, device=nearest.device) * K, weights.flatten()),
            ((order // K).int(), count.cumsum(0) - count, weights.flatten()[order])]


def tied_sums(ways, values):
    """W values, (N, C), W being the mean of `both_ways`."""
    return sum(F.embedding_bag(ids, values, starts.int(), mode="sum", per_sample_weights=weights)
               for ids, starts, weights in ways) / len(ways)


def conjugate_gradients(system, right):
    """x of system(x) = right in STEPS steps, column by column. system: a function that multiplies
    by a symmetric positive definite matrix. right: (N, C)."""
    tiny = torch.finfo(right.dtype).tiny            # an error of 0 stays 0
    x = torch.zeros_like(right)
    error = direction = right
    size = (error ** 2).sum(dim=0)
    for _ in range(STEPS):
        changed = system(direction)
        step = size / (direction * changed).sum(dim=0).clamp(min=tiny)
        x = x + step * direction
        error = error - step * changed
        before, size = size, (error ** 2).sum(dim=0)
        direction = error + size / before.clamp(min=tiny) * direction
    return x


# --------------------------------------------------------------------------------------------------
# Where the patches of windows lie

def propagate_windows(tokens, scores, corners, covered, crop, strength):
    """Scores of the patches of all windows of a photo, propagated at once: (windows, C, h, w).

    tokens: (windows, h, w, D), unit-norm.
    scores: (windows, C, h, w).
    corners: (y, x) of each window.
    covered, crop: (height, width) in pixels that the patches cover, and that are of the photo.
    strength: A.
    """
    starts = torch.tensor(corners, device=tokens.device)                            # (windows, 2)
    (y, seen_y), (x, seen_x) = [
        centres(starts[:, axis], tokens.shape[1 + axis], covered[axis], crop[axis])
        for axis in (0, 1)]
    grid = tokens.shape[:3]
    places = torch.stack([y[:, :, None].expand(grid), x[:, None].expand(grid)], dim=-1)
    seen = seen_y[:, :, None] * seen_x[:, None]
    flat = propagate(tokens.flatten(0, 2), places.flatten(0, 2), 1 / seen.flatten(),
                     scores.permute(0, 2, 3, 1).flatten(0, 2), strength)
    return flat.unflatten(0, grid).permute(0, 3, 1, 2)


def centres(starts, count, covered, length):
    """Middles of the patches of windows along one axis, (windows, count), and in how many of the
    windows each lies. Patches of the padding lie at the photo's border.

    starts: (windows,). count: patches. covered, length: pixels of the patches, of the window.
    """
    inside = (torch.arange(count, device=starts.device) + 0.5) * covered / count
    places = starts[:, None] + inside.clamp(max=length - 0.5)                       # (windows, n)
    offset = places[..., None] - starts.unique()
    return places, ((offset >= 0) & (offset < length)).sum(dim=-1)
