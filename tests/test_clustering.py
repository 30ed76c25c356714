"""K-means by hand, against brute force, and what must not change it."""
import torch
import torch.nn.functional as F

from methods.parts.clustering import farthest_tokens, kmeans


def test_kmeans_by_hand():
    """0, 1, 2, 10, 11, 20 in three clusters, farthest start: 20 comes first, then 0, then 10."""
    tokens = torch.tensor([0., 1, 2, 10, 11, 20]).view(1, 6, 1)
    assert farthest_tokens(tokens, 3).tolist() == [[5, 0, 3]]
    assert kmeans(tokens, 3).tolist() == [[1, 1, 1, 2, 2, 0]]


def clusters(seed=0, noise=0.002):
    """400 tokens around 8 random unit centres in 384 dimensions, and the centre of each."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(8, 384, generator=generator), dim=-1)
    truth = torch.randint(0, 8, (400,), generator=generator)
    return centres[truth] + noise * torch.randn(400, 384, generator=generator), truth


def test_separate_clusters_are_found():
    """Tokens around eight centres are put together exactly, up to the order of the labels."""
    tokens, truth = clusters()
    [labels] = kmeans(tokens[None], 8)
    assert len({(int(a), int(b)) for a, b in zip(labels, truth)}) == 8


def test_constant_tokens_are_one_cluster():
    """Tokens that are all alike make one cluster, without a NaN in the centres."""
    labels = kmeans(torch.ones(2, 30, 5), 4)
    assert labels.unique().numel() == 1


def test_an_image_does_not_depend_on_the_others():
    """The labels of an image are those that it has alone, whatever is beside it."""
    tokens = torch.stack([clusters(seed, noise=0.05)[0] for seed in range(3)])
    together = kmeans(tokens, 8)
    assert all(torch.equal(kmeans(tokens[i:i + 1], 8)[0], together[i]) for i in range(3))


def test_given_first_centres():
    """With given first centres and enough steps, each token has the nearest mean of a cluster, and
    an image that has converged is not moved by another that has not."""
    tokens = torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(1))
    tokens[0] = torch.tensor([0., 0, 0, 0])
    tokens[0, 30:] = 9
    first = torch.tensor([[0, 59, 1], [4, 5, 6]])
    labels = kmeans(tokens, 3, steps=100, first=first, tolerance=1e-4)
    assert labels[0].tolist() == [0] * 30 + [1] * 30
    means = torch.stack([tokens[1][labels[1] == k].mean(0) for k in range(3)])
    assert torch.equal(torch.cdist(tokens[1], means).argmin(1), labels[1])
