"""The local loss of prompts."""
import pytest
import torch

from conftest import tiny
from machinery.names import read_templates
from methods.simzss_prompts import SimZSSPrompts
from model import concept_loss, similarity_pool
from processes import check_two_processes
from reference import losses_of, same, training_batch


def test_it_is_the_local_loss_of_classes_by_caption():
    """The second local loss has for class weights what `embed_classes` makes of the concepts at
    test time by their prompts' end tokens; gradient reaches the whole text encoder."""
    model = tiny(method=SimZSSPrompts, prompt_weight=0.5, prompts="plain").eval()
    batch = model.features(training_batch())
    ids = batch["concepts"][..., 0]
    weights = model.embed_classes(model.bank, read_templates("plain"))[:, 0]        # (C, D)
    counts = torch.bincount(ids[ids >= 0], minlength=len(model.bank)).float()
    visual = similarity_pool(weights[ids.clamp(min=0)], batch["patch_tokens"], 0.1)
    expected = concept_loss(visual, ids, weights, counts, 0.07)
    losses = model.losses(model.encode(batch), batch)
    same(losses["prompt"], expected)
    same(losses["loss"] - losses["global"] - 0.05 * losses["local"], 0.5 * expected)
    losses["prompt"].backward()
    assert all(p.grad.norm() > 0 for p in model.text.parameters())


def test_the_other_losses_are_those_of_simzss():
    """All else is bit-identical to SimZSS, whose loss this is with prompt_weight = 0."""
    batch = training_batch()
    found = losses_of(tiny(method=SimZSSPrompts, prompt_weight=0.0), batch)
    assert found.pop("prompt") > 0
    assert found == losses_of(tiny(), batch)


def test_prompts_are_drawn_from_the_templates():
    """A concept has one of the templates' prompts, another one at another time."""
    model = tiny(method=SimZSSPrompts, prompts="simple7")
    losses = set()
    for seed in range(8):
        torch.manual_seed(seed)
        losses.add(losses_of(model, training_batch())["prompt"].item())
    assert len(losses) > 4


def test_a_batch_without_concepts_is_harmless():
    """A batch without concepts has no loss of prompts, and finite gradients."""
    model = tiny(method=SimZSSPrompts)
    batch = training_batch()
    batch["concepts"] = torch.full((6, 0, 3), -1)
    losses = losses_of(model, batch)
    losses["loss"].backward()
    assert losses["prompt"] == 0 and losses["loss"] == losses["global"]
    assert all(p.grad.isfinite().all() for p in model.trained().values())


@pytest.mark.parametrize("without", [[], [3, 4, 5], [0, 1, 2, 3, 4, 5]])
def test_two_processes_are_one(tmp_path, without):
    """Two processes with half a batch each have the losses of one, and the gradients of all
    parameters, with the same prompt of a concept in both, also where one, or both, have no
    concepts."""
    batch = training_batch()
    batch["concepts"][without] = -1
    check_two_processes(tmp_path / "processes", tiny(method=SimZSSPrompts), batch)
