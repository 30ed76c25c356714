"""Layers that see the global batch, and transformer blocks."""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from machinery.networks.layers import Attention, Block, CrossBlock, GlobalBatchNorm
from machinery.parallel import (GlobalDropPath, average_gradients, join_processes,
                                sum_over_processes)
from processes import Processes

ROWS = 6
WIDTH = 5


class Both(nn.Module):
    """Stochastic depth and BatchNorm, one after the other."""

    def __init__(self):
        super().__init__()
        self.drop_path = GlobalDropPath(0.4)
        self.norm = GlobalBatchNorm(WIDTH)

    def forward(self, x):
        return self.norm(self.drop_path(x))


def outputs(world=1, rank=0):
    """What two steps give of this process's rows: output, gradients, running statistics."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 3, WIDTH, generator=generator)
    goal = torch.randn(ROWS, 3, WIDTH, generator=generator)
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    model = Both()
    x = x[rows].requires_grad_()
    for step in range(2):
        torch.manual_seed(step)
        y = model(x)
        loss = sum_over_processes((y * goal[rows]).square().sum())
        model.zero_grad()
        x.grad = None
        loss.backward()
    average_gradients(list(model.parameters()))
    return {"y": y.detach(), "dx": x.grad / world, "dweight": model.norm.weight.grad,
            "dbias": model.norm.bias.grad, **model.norm.state_dict()}


def work(folder, world):
    processes = join_processes("cpu", timeout_minutes=1)
    torch.save(outputs(world, processes.rank), folder / f"{processes.rank}")
    processes.leave()


def test_several_processes_give_the_rows_of_one(tmp_path):
    """Rows dropped, outputs, gradients and running statistics of 2 x 3 rows are those of 6."""
    both = Processes(tmp_path, 2, work, tmp_path, 2)
    assert both.wait() == [0, 0], both.output()
    one = outputs()
    split = [torch.load(tmp_path / f"{rank}") for rank in range(2)]
    for name in ("y", "dx"):
        torch.testing.assert_close(torch.cat([part[name] for part in split]), one[name])
    for part in split:
        for name in ("dweight", "dbias", "weight", "bias", "running_mean", "running_var",
                     "num_batches_tracked"):
            torch.testing.assert_close(part[name], one[name])


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


def test_a_block_is_timms():
    """With the weights of a block of timm's vision transformer, a block gives what timm gives."""
    theirs = timm.models.vision_transformer.Block(24, 3, qkv_bias=True, norm_layer=nn.LayerNorm)
    ours = Block(24, 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_attention_to_a_context():
    """Attention to a context and with a mask is the sum that its definition says, written out."""
    torch.manual_seed(0)
    layer = Attention(6, 2)
    x = torch.randn(1, 2, 6)
    context = torch.randn(1, 4, 6)
    mask = torch.tensor([[True, True, False, True]])
    q_weight, k_weight, v_weight = layer.qkv.weight.chunk(3)
    q_bias, k_bias, v_bias = layer.qkv.bias.chunk(3)
    expected = torch.zeros(2, 6)
    for t in range(2):
        q = q_weight @ x[0, t] + q_bias
        for head in (slice(0, 3), slice(3, 6)):
            seen = [context[0, n] for n in range(4) if mask[0, n]]
            logits = torch.stack([q[head] @ (k_weight @ c + k_bias)[head] for c in seen]) / 3 ** 0.5
            for weight, c in zip(logits.softmax(0), seen):
                expected[t, head] += weight * (v_weight @ c + v_bias)[head]
    expected = expected @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x, context, mask)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_cross_block_normalises_at_its_end_only():
    """u = x + attention; u = u + mlp(norm(u)); what comes out is normalised, what comes in is
    not."""
    torch.manual_seed(0)
    layer = CrossBlock(6, 2)
    x = 100 * torch.randn(1, 3, 6)
    context = torch.randn(1, 4, 6)
    u = x + layer.attn(x, context)
    u = u + layer.mlp(F.layer_norm(u, (6,)))
    torch.testing.assert_close(layer(x, context), F.layer_norm(u, (6,)))


def test_heads_must_divide_the_width():
    """A width that is no multiple of the heads is an error of one line."""
    with pytest.raises(ValueError, match="the width 10 must be a multiple of the 3 heads"):
        Block(10, 3)


def test_a_batch_that_is_not_finite_leaves_no_trace():
    """A batch with an infinite row, whose step is skipped, does not change the running
    statistics."""
    norm = GlobalBatchNorm(3)
    norm(torch.randn(4, 3))
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm(torch.full((4, 3), torch.inf))
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])
