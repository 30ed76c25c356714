"""Layers that several networks share."""
import torch
import torch.nn.functional as F
from torch import nn

from machinery.networks.layers import CrossBlock, GlobalBatchNorm
from machinery.parallel import average_gradients, join_processes, sum_over_processes
from processes import Processes

WIDTH = 5


def two_steps(folder, world):
    """Saves what two steps give of this process's rows: output, gradients, running statistics."""
    processes = join_processes("cpu", timeout_minutes=1)
    generator = torch.Generator().manual_seed(0)
    x, goal = torch.randn(2, 6, 3, WIDTH, generator=generator)
    rows = slice(processes.rank * 6 // world, (processes.rank + 1) * 6 // world)
    norm = GlobalBatchNorm(WIDTH)
    x = x[rows].requires_grad_()
    for _ in range(2):
        y = norm(x)
        norm.zero_grad()
        x.grad = None
        sum_over_processes((y * goal[rows]).square().sum()).backward()
    average_gradients(list(norm.parameters()))
    gradients = {name: p.grad for name, p in norm.named_parameters()}
    torch.save(({"y": y.detach(), "dx": x.grad / world}, {"of": gradients, **norm.state_dict()}),
               folder / f"{processes.rank}")
    processes.end_together()


def test_batch_norm_of_several_processes_gives_the_rows_of_one(tmp_path):
    """Outputs, gradients and running statistics of 2 x 3 rows are those of 6."""
    found = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        processes = Processes(folder, world, two_steps, folder, world)
        assert processes.wait() == [0] * world, processes.output()
        found.append([torch.load(folder / f"{rank}") for rank in range(world)])
    [(one, state)], halves = found
    for name, value in one.items():
        torch.testing.assert_close(torch.cat([rows[name] for rows, _ in halves]), value)
    for _, its_state in halves:
        torch.testing.assert_close(its_state, state)


def test_batch_norm_is_torchs():
    """In one process outputs, gradients and buffers are those of torch's BatchNorm over all rows,
    in training and in evaluation."""
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(4, 7, WIDTH, generator=generator)
    goal = torch.randn(28, WIDTH, generator=generator)
    ours = GlobalBatchNorm(WIDTH)
    theirs = nn.BatchNorm1d(WIDTH)
    found = []
    for norm in (ours, theirs):
        for mode in (True, True, False):
            norm.train(mode)
            leaf = x.flatten(0, 1).clone().requires_grad_()
            y = norm(leaf.view(4, 7, WIDTH) if norm is ours else leaf)
            norm.zero_grad()
            (y.reshape(28, WIDTH) * goal).square().sum().backward()
            found.append([y.reshape(28, WIDTH).detach(), leaf.grad, norm.weight.grad.clone(),
                          norm.bias.grad.clone()])
    for a, b in zip(found[:3], found[3:]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_a_batch_that_is_not_finite_leaves_no_trace():
    """A batch with an infinite row, whose step is skipped, does not change the running
    statistics; nor does one that only passes through."""
    norm = GlobalBatchNorm(3)
    norm(torch.randn(4, 3))
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm(torch.full((4, 3), torch.inf))
    norm(torch.randn(4, 3), update=False)
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])


def test_a_cross_block_normalises_at_its_end_only():
    """u = x + attention; u = u + mlp(norm(u)); what comes out is normalised, what comes in is
    not."""
    torch.manual_seed(0)
    layer = CrossBlock(6, 2)
    x = 100 * torch.randn(1, 3, 6)
    context = torch.randn(1, 4, 6)
    u = x + layer.attn(x, context, context)[0]
    u = u + layer.mlp(F.layer_norm(u, (6,)))
    torch.testing.assert_close(layer(x, context), F.layer_norm(u, (6,)))
