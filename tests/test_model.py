"""The method: its formulas by hand, its losses, what is trained and what is frozen, the text tower,
class embeddings. tests/test_fidelity.py holds the whole against another implementation."""
import copy
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from concepts import token_spans
from conftest import tiny
from machinery.tokenizer import tokenize
from machinery.training.loading import encode_in_micro_batches, fitting_micro_batch
from model import (SimZSS, TextEncoder, best_synonym, class_weights, concept_embeddings,
                   concept_loss, global_loss, groups_of_like_length, only_present, patch_tokens,
                   prompt_ensemble, similarity_pool)
from reference import CAPTIONS, losses_of, same, training_batch


# --------------------------------------------------------------------------------------------------
# The formulas, by hand

def test_concept_embeddings_by_hand():
    """A concept's embedding is the sum of its tokens' embeddings; an empty or padded span gives
    zeros."""
    tokens = torch.tensor([[[1., 0.], [0., 1.], [.6, .8]]])
    spans = torch.tensor([[[0, 1], [1, 3], [2, 2], [-1, -1]]])
    same(concept_embeddings(tokens, spans), [[[1, 0], [.6, 1.8], [0, 0], [0, 0]]])


def test_only_present_by_hand():
    """Concepts get consecutive places, in the bank's order; padding stays."""
    ids, count = only_present(torch.tensor([[7, 2], [-1, 7], [4, -1]]), bank_size=9)
    assert ids.tolist() == [[2, 0], [-1, 2], [1, -1]] and count == 3
    assert only_present(torch.tensor([[-1]]), 9)[1] == 1


def test_a_larger_bank_changes_nothing(model):
    """Losses and gradients are those of a bank that holds the batch's concepts only, and nothing
    of the size of a large bank times D is computed."""
    batch = many_captions()
    expected = gradients(model, model.encode, batch)
    bank = model.bank
    model.bank = bank * 10_000
    shift = torch.tensor([10 * len(bank), 0, 0])
    with Called() as called:
        found = gradients(model, model.encode, {**batch, "concepts": batch["concepts"] + shift})
    model.bank = bank
    assert_close(found, expected, 1e-6)
    assert called.largest < 10_000 * len(bank) * 128


def test_class_weights_by_hand():
    """A class weight is the normalised sum over all its occurrences; padding counts nowhere, and
    the weights of absent concepts are zero."""
    concepts = torch.tensor([[[3., 0.], [0., 2.]], [[0., 4.], [9., 9.]]])
    weights, counts = class_weights(concepts, torch.tensor([[2, 0], [2, -1]]), bank_size=4)
    same(weights, [[0, 1], [0, 0], [.6, .8], [0, 0]])       # concept 2: (3, 0) + (0, 4), length 5
    same(counts, [1, 0, 2, 0])


def test_similarity_pool_by_hand():
    """Pooling weighs patches by the softmax of their similarity over the temperature and normalises
    the average."""
    patches = torch.tensor([[[1., 0.], [0., 1.]]])
    query = torch.tensor([[[math.log(3) / 10, 0.]]])        # similarities log(3) / 10 and 0 ...
    expected = [[[3 / math.sqrt(10), 1 / math.sqrt(10)]]]   # ... so the weights are 3/4 and 1/4
    same(similarity_pool(query, patches, temperature=0.1), expected)


def test_global_loss_by_hand():
    """The global loss is the mean of image-to-text and text-to-image cross-entropy."""
    image = torch.tensor([[1., 0.], [0., 1.]])
    text = torch.tensor([[1., 0.], [.6, .8]])
    # logits 2 * [[1, .6], [0, .8]]
    rows = [math.log(1 + math.exp(2 * (.6 - 1))), math.log(1 + math.exp(2 * (0 - .8)))]
    columns = [math.log(1 + math.exp(2 * (0 - 1))), math.log(1 + math.exp(2 * (.6 - .8)))]
    same(global_loss(image, text, torch.tensor(2.)), sum(rows + columns) / 4)


@pytest.mark.parametrize("target, margins", [("concept", (.2, -.6)), ("argmax", (-.2, -.6))])
def test_concept_loss_by_hand(target, margins):
    """The local loss is the mean cross-entropy over occurrences and present concepts, for the
    concept or the prediction."""
    visual = torch.tensor([[[.6, .8], [0., 1.]], [[1., 0.], [9., 9.]]])
    ids = torch.tensor([[1, 3], [1, -1]])
    weights = torch.tensor([[7., 7.], [1., 0.], [7., 7.], [0., 1.]])
    counts = torch.tensor([0., 2., 0., 1.])
    # logits of concepts 1 and 3, times tau: (.6, .8) of a 1, (0, 1) of a 3, (1, 0) of a 1
    expected = sum(math.log(1 + math.exp(margin / .5)) for margin in (margins[0], -1, -1)) / 3
    same(concept_loss(visual, ids, weights, counts, 0.5, target), expected)


def test_concept_loss_refuses_an_unknown_target():
    """An unknown local target is named, with the two that exist."""
    nothing = torch.zeros(1, 1, 2)
    no_ids = torch.zeros(1, 1, dtype=int)
    with pytest.raises(ValueError, match="'concept' or 'argmax', found 'true'"):
        concept_loss(nothing, no_ids, nothing[0], torch.ones(1), 1, "true")


def test_best_synonym_by_hand():
    """A patch's score of a class is its similarity to the best of the class's names."""
    features = torch.tensor([[[1., 0.], [.6, .8]]])                                 # (1, 2, 2)
    names = torch.tensor([[[1., 0.], [0., 1.]], [[-1., 0.], [-1., 0.]]])            # (2, 2, 2)
    same(best_synonym(features, names), [[[1, .8], [-1, -.6]]])
    same(best_synonym(features, names[:, 0]), [[[1, .6], [-1, -.6]]])               # one name each


def test_prompt_ensemble_by_hand():
    """A name's embedding is the unit-norm mean of its prompts, normalised each or not; a class with
    fewer names repeats its first."""
    length = {"a ": 1., "the ": 3.}
    axis = {"cow": 0, "bull": 1, "sea": 2}

    def embed(prompts):                             # the article is the length along an axis
        rows = torch.zeros(len(prompts), 4)
        for row, (before, name, after) in zip(rows, prompts):
            row[axis[name]] = length[before]
            row[3] = len(after)
        return rows

    templates = ["a {}", "the {}."]                 # (1, 0), (3, 1) on a name's axis and the last
    classes = [["cow", "bull"], "sea"]
    for normalise_each, point in [(False, (4, 1)), (True, (1 + 3 / 10 ** .5, 1 / 10 ** .5))]:
        x, y = torch.tensor(point) / math.hypot(*point)
        expected = [[[x, 0, 0, y], [0, x, 0, y]], [[0, 0, x, y], [0, 0, x, y]]]
        for batch in (1, 4, 256):
            same(prompt_ensemble(classes, templates, embed, normalise_each, batch), expected)


# --------------------------------------------------------------------------------------------------
# Both losses

def losses_by_hand(image, patches, caption, concepts, ids):
    """`SimZSS.losses` of given embeddings, with a bank of six."""
    encoded = {"caption": caption, "concepts": concepts}
    batch = {"class_token": image, "patch_tokens": patches, "concepts": ids[..., None]}
    return tiny().losses(encoded, batch)


def test_one_pair_with_one_concept_and_one_patch_has_no_loss():
    """B = 1 with one concept and one patch gives L_g = 0 and L_l = 0 exactly."""
    image, patch, caption, token = F.normalize(torch.randn(4, 128), dim=-1).split(1)
    losses = losses_by_hand(image, patch[None], caption, token[None], torch.tensor([[3]]))
    assert losses["global"].item() == losses["local"].item() == losses["loss"].item() == 0


def test_equal_logits_give_the_logarithm_of_the_choices():
    """With all logits equal, L_g = log B and L_l = log(number of present concepts)."""
    B = 5
    axes = torch.eye(128)
    image = axes[:1].expand(B, -1)
    concepts = axes[1:4].expand(B, 3, -1)           # three in each caption, at right angles ...
    patches = axes[9].expand(B, 2, -1)              # ... to each other and to every patch
    losses = losses_by_hand(image, patches, image, concepts, torch.tensor([0, 2, 5]).expand(B, 3))
    same(losses["global"], math.log(B))
    same(losses["local"], math.log(3))
    same(losses["loss"], math.log(B) + 0.05 * math.log(3))
    same(losses["logit_scale"], 1 / 0.07)           # where it starts


@pytest.mark.parametrize("setting", [
    {"pool_query": "caption"}, {"local_target": "argmax"}, {"pool_temperature": 0.3},
    {"local_temperature": 0.3}, {"local_weight": 0.3}])
def test_a_setting_changes_what_it_is_for_and_nothing_else(setting):
    """Each setting of the losses changes the local loss, lambda its weight only; the global loss
    stays bit-identical."""
    batch = training_batch()
    before = losses_of(tiny(), batch)
    after = losses_of(tiny(**setting), batch)
    assert torch.equal(after["global"], before["global"])
    assert after["concepts"] == before["concepts"]
    assert torch.equal(after["local"], before["local"]) == ("local_weight" in setting)
    assert not torch.equal(after["loss"], before["loss"])


def test_lambda_zero_is_the_global_loss_alone():
    """With lambda = 0 the loss and its gradient are those of the global loss."""
    model = tiny(local_weight=0.0)
    losses = losses_of(model, training_batch())
    parameters = list(model.trained().values())
    expected = torch.autograd.grad(losses["global"], parameters, retain_graph=True)
    losses["loss"].backward()
    assert losses["loss"] == losses["global"]
    for parameter, gradient in zip(parameters, expected):
        same(parameter.grad, gradient)


def test_losses_are_computed_in_float32(model):
    """Mixed precision changes the towers' arithmetic only: all that the losses are made of is in
    float32, and so are the losses."""
    exact = losses_of(model, training_batch())
    model.autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    batch = model.features(training_batch())
    encoded = model.encode(batch)
    assert all(batch[name].dtype == torch.float32 for name in ("class_token", "patch_tokens"))
    assert all(value.dtype == torch.float32 for value in encoded.values())
    losses = model.losses(encoded, batch)
    assert losses["loss"].dtype == torch.float32
    assert losses["global"] != exact["global"]
    same(losses["global"], exact["global"], rtol=0.05, atol=0)


@pytest.mark.parametrize("M", [0, 3])
def test_a_batch_without_concepts_is_harmless(model, M):
    """A batch without concepts, with padding or without, has local loss 0, a finite loss and finite
    gradients."""
    batch = training_batch()
    batch["concepts"] = torch.full((len(CAPTIONS), M, 3), -1)
    losses = losses_of(model, batch)
    losses["loss"].backward()
    assert losses["local"] == 0
    assert losses["loss"] == losses["global"] and losses["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in model.trained().values())


def test_the_logit_scale_stays_within_its_bounds(model):
    """After a step the logit scale is at least 1 and at most 100."""
    for value, expected in [(9.0, 100), (-1.0, 1), (3.0, math.exp(3))]:
        model.logit_scale.data.fill_(value)
        model.after_step(0, 10)
        same(model.logit_scale.exp(), expected)


# --------------------------------------------------------------------------------------------------
# What is trained and what is frozen

@pytest.mark.parametrize("loss", ["global", "local"])
def test_each_loss_alone_reaches_all_of_the_text_tower(model, loss):
    """Either loss alone sends a gradient into every parameter of the text encoder."""
    losses_of(model, training_batch())[loss].backward()
    for name, parameter in model.text.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_frozen_stays_bit_identical_and_everything_else_learns():
    """After train() and a step the backbone, its batch statistics included, is bit-identical, and
    all else has moved."""
    model = tiny(backbone={"name": "test_resnet", "weights": "random"}).train()
    assert not any(module.training for module in model.backbone.modules())
    assert model.text.training
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.trained().values(), lr=1e-2)
    losses_of(model, training_batch())["loss"].backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("backbone."), key
    assert all(p.grad is None for p in model.backbone.parameters())


# --------------------------------------------------------------------------------------------------
# Parts of a batch

def many_captions():
    """A batch of 40 captions of different lengths, in no order, each with two concepts."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 70, (40,), generator=generator).tolist()
    tokens = torch.stack([tokenize("cow " * length) for length in lengths])
    ids = torch.randint(6, (40, 2, 1), generator=generator)
    start = torch.tensor([1 + length // 2 for length in lengths])[:, None, None].expand(-1, 2, -1)
    features = F.normalize(torch.randn(40, 5, 128, generator=generator), dim=-1)
    return {"class_token": features[:, 0], "patch_tokens": features[:, 1:], "tokens": tokens,
            "concepts": torch.cat([ids, start, start + 1], dim=-1)}


def gradients(model, encode, batch):
    """(losses, gradients of all parameters, by name)"""
    model.zero_grad()
    losses = model.losses(encode(batch), batch)
    losses["loss"].backward()
    return losses, {name: p.grad for name, p in model.trained().items()}


def assert_close(found, expected, tolerance=1e-5):
    """Losses and gradients of `gradients` agree."""
    for name, loss in expected[0].items():
        same(found[0][name], loss, rtol=1e-5, atol=0)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * gradient.norm() > 0, name


def test_captions_in_order_of_length_are_the_captions_one_by_one(model):
    """`encode`, which computes captions in groups of like length, gives each the embeddings, and
    all parameters the gradients, that captions one by one give."""
    batch = many_captions()

    def one_by_one(batch):
        spans = batch["concepts"][..., 1:]
        rows = [model.encode_texts(batch["tokens"][[i]], spans[[i]]) for i in range(40)]
        caption, concepts = map(torch.cat, zip(*rows))
        return {"caption": caption, "concepts": concepts}

    found = model.encode(batch)
    for name, expected in one_by_one(batch).items():
        same(found[name], expected, rtol=1e-5, atol=1e-6)
    assert_close(gradients(model, model.encode, batch), gradients(model, one_by_one, batch))


def test_groups_are_of_like_length(monkeypatch):
    """A group ends where a caption is more than 1.2 times as long as its first, or where it is
    full."""
    lengths = [5, 6, 6, 7, 8, 9, 20, 20, 20]
    assert groups_of_like_length(lengths) == [(3, 6), (2, 8), (1, 9), (3, 20)]
    monkeypatch.setattr("model.GROUP", 2)
    assert groups_of_like_length(lengths) == [(2, 6), (2, 7), (2, 9), (2, 20), (1, 20)]


class Called(TorchDispatchMode):
    """Names of torch's operations in a with block, and the elements of the largest result."""

    def __enter__(self):
        self.names = []
        self.largest = 0
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), options=None):
        self.names.append(operation.name())
        result = operation(*args, **(options or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_embeddings_are_looked_up_once(model):
    """The gradient of the table of embeddings is made once, not for each group of captions."""
    with Called() as called:
        gradients(model, model.encode, many_captions())
    assert called.names.count("aten::embedding_dense_backward") == 1


@pytest.mark.parametrize("size", [1, 7, 40])
def test_micro_batches_are_the_whole_batch(model, size):
    """Encoded in micro-batches, some of them smaller, a batch has the same losses and the same
    gradients of all parameters."""
    batch = many_captions()
    in_parts = partial(encode_in_micro_batches, model.encode, model.order, size=size)
    assert_close(gradients(model, in_parts, batch), gradients(model, model.encode, batch))


def test_micro_batches_are_of_like_length(model, monkeypatch):
    """Four micro-batches have together hardly more groups of like length than the whole batch has;
    of the batch, what is not encoded is not copied."""
    batch = many_captions()
    batch["patch_tokens"] = torch.zeros(40, 5, 10_000)
    encode_texts = model.encode_texts
    groups = []

    def note(tokens, spans, embedded=None):
        groups.append(len(tokens))
        return encode_texts(tokens, spans, embedded)

    monkeypatch.setattr(model, "encode_texts", note)
    with torch.no_grad():
        model.encode(batch)
        whole = len(groups)
        with Called() as called:
            encode_in_micro_batches(model.encode, model.order, batch, size=10)
    assert len(groups) - whole <= whole + 3
    assert called.largest < 10 * 5 * 10_000


@pytest.mark.parametrize("gigabytes, local_batch, precision, expected", [
    (15, 8192, torch.bfloat16, 1024), (23, 8192, torch.bfloat16, 2048),
    (39, 8192, torch.bfloat16, 4096), (79, 8192, torch.bfloat16, 8192),
    (39, 8192, torch.float32, 2048), (15, 1024, torch.bfloat16, 1024), (2, 8192, torch.float32, 1)])
def test_a_gpus_micro_batch(gigabytes, local_batch, precision, expected):
    """The micro-batches of the table in docs/scale.md are those chosen by a GPU's free memory."""
    assert fitting_micro_batch(local_batch, SimZSS.ROW_BYTES, precision,
                               gigabytes * 1e9) == expected


def test_encoding_again_keeps_its_precision(model):
    """In bfloat16 the second encoding of a micro-batch is in bfloat16, too: one micro-batch of all
    rows has the very gradients of the batch."""
    model.autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    batch = many_captions()
    losses, expected = gradients(model, model.encode, batch)
    in_parts = partial(encode_in_micro_batches, model.encode, model.order, size=40)
    again, found = gradients(model, in_parts, batch)
    assert torch.equal(again["loss"], losses["loss"])
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_resnet", "test_convnext", "toy"])
def test_frozen_weights_are_cast_once(name):
    """In bfloat16 the backbone's features are, bit for bit, those of autocast, which casts all
    weights in every pass; a checkpoint's tensors stay as they are."""
    options = {} if name == "toy" else {"weights": "random"}
    model = tiny(backbone={"name": name, **options})
    kept = model.state_dict()
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with Called() as plain:
            prefix, patches, _ = patch_tokens(model.backbone.trunk, images)
        model.backbone(images)
        with Called() as called:
            found = model.backbone(images)[1]
    assert torch.equal(found, F.normalize(patches.float(), dim=-1))
    weights = sum(type(module) in (torch.nn.Linear, torch.nn.Conv2d)
                  for module in model.backbone.trunk.modules())
    saved = plain.names.count("aten::_to_copy") - called.names.count("aten::_to_copy")
    assert (saved > 0) == (weights > 0)
    assert model.state_dict().keys() == kept.keys()
    assert all(value.dtype == torch.float32 for value in model.state_dict().values()
               if value.is_floating_point())


def test_cached_features_are_the_live_ones(model):
    """A batch whose class and patch tokens come from a cache, in float16, has the losses of one
    from pixels, but for float16's precision; nothing else of the batch changes."""
    live = model.features(training_batch())
    assert live.keys() == {"class_token", "patch_tokens", "tokens", "concepts"}
    stored = {name: value.half() if value.is_floating_point() else value
              for name, value in live.items()}
    cached = model.features(stored)
    for name, value in live.items():
        assert cached[name].dtype == value.dtype
        same(cached[name], value, rtol=0, atol=2 ** -11)            # of numbers up to 1
    found = model.losses(model.encode(cached), cached)
    same(found["loss"], losses_of(model, training_batch())["loss"], rtol=1e-3, atol=0)


def test_the_key_of_features_names_what_they_depend_on():
    """Features are the same only for the same backbone, its weights and its settings; what concerns
    text and losses does not matter."""
    vit = {"name": "test_vit", "weights": "random"}
    key = tiny(backbone=vit).feature_key()
    assert json.loads(json.dumps(key)) == json.loads(json.dumps(
        tiny(backbone=vit, local_weight=0.0, text={"layers": 2}).feature_key()))
    for changed in ({"image_token": "mean"}, {"mean": [.1, .2, .3]}, {"options": {"depth": 2}}):
        assert tiny(backbone={**vit, **changed}).feature_key() != key
    assert tiny(backbone=vit, seed=1).feature_key() != key          # other weights


# --------------------------------------------------------------------------------------------------
# Text tower

def test_cutting_the_padding_is_exact():
    """Encoding captions cut to the longest equals running open_clip's transformer over all 77
    positions."""
    text = TextEncoder(24, width=32, layers=2).eval()
    tokens = torch.stack(list(map(tokenize, CAPTIONS[:4])))
    caption, states = text(tokens)
    ends = tokens.argmax(-1)
    assert states.shape[1] == ends.max() + 1 < 77
    text.tower.output_tokens = True
    pooled, padded = text.tower(tokens)             # after the projection, and before it
    same(caption, F.normalize(pooled, dim=-1), rtol=1e-5, atol=1e-6)
    for i, end in enumerate(ends):
        expected = F.normalize(padded[i, :end + 1] @ text.tower.text_projection, dim=-1)
        same(states[i, :end + 1], expected, rtol=1e-5, atol=1e-6)
        same(caption[i], states[i, end])


@pytest.mark.parametrize("D, width, heads", [(384, 384, 6), (768, 512, 8), (1024, 768, 12),
                                             (512, 512, 8)])
def test_text_tower_follows_the_backbone(D, width, heads):
    """The text tower has the method's width and heads for ViT-S, ViT-B and ViT-L, ViT-B's for any
    other backbone, and projects to the backbone's width."""
    with torch.device("meta"):                      # shapes without values
        text = TextEncoder(D)
    layers = text.tower.transformer.resblocks
    assert text.width == width and text.tower.text_projection.shape == (width, D)
    assert len(layers) == 12 and layers[0].attn.num_heads == heads


def test_heads_must_divide_the_width():
    """A text encoder whose width is no multiple of its heads is refused with both numbers."""
    with pytest.raises(ValueError, match="width 33 must be a multiple of its 2 heads"):
        TextEncoder(16, width=33, heads=2, layers=1)


# --------------------------------------------------------------------------------------------------
# Class embeddings and scores

def test_class_embeddings_average_the_templates(model):
    """A class embedding is the normalised mean of its normalised prompts."""
    templates = ("a photo of a {}.", "{}, seen from very far away")
    found = model.embed_classes(["cow", "red boat"], templates)
    for i, name in enumerate(["cow", "red boat"]):
        prompts = [model.text(tokenize(template.replace("{}", name))[None])[0][0]
                   for template in templates]
        mean = sum(prompt / prompt.norm() for prompt in prompts) / 2
        same(found[i, 0], mean / mean.norm(), rtol=1e-5, atol=1e-6)
    one = model.text(tokenize("cow")[None])[0]
    same(model.embed_classes(["cow"])[0], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cow", "red boat", "surfboarder"])
def test_class_embeddings_from_the_names_own_tokens(model, name):
    """With class_embedding "concept" a prompt is embedded by the sum of its name's token
    embeddings, as in training."""
    prompt = f"a photo of the {name}, seen from very far away"
    start = prompt.index(name)
    positions = [i for i, (s, e) in enumerate(token_spans(prompt), 1)
                 if s >= start and e <= start + len(name)]
    assert len(positions) == {"cow": 1, "red boat": 2, "surfboarder": 2}[name]
    states = model.text(tokenize(prompt)[None])[1][0]
    expected = sum(states[i] for i in positions)
    template = prompt.replace(name, "{}")
    model.protocol.class_embedding = "concept"
    found = model.embed_classes([name], [template])
    same(found[0, 0], expected / expected.norm(), rtol=1e-5, atol=1e-6)


def test_class_embeddings_that_were_not_trained_are_refused():
    """The class embedding of concepts is refused for a model that trained none."""
    untrained = tiny(local_weight=0.0)
    untrained.protocol.class_embedding = "concept"
    with pytest.raises(ValueError, match="lambda = 0 no concept .* --class-embedding caption"):
        untrained.embed_classes(["cow"])


def test_the_best_synonym_scores_a_patch(model):
    """A class scores each patch of the grid, and each image by its class token, by the cosine of
    its best name."""
    classes = [["cow", "cattle", "bull"], ["sea"], ["boat", "ship"]]
    embeddings = model.embed_classes(classes)
    names = model.embed_classes(["cow", "cattle", "bull", "sea", "boat", "ship"])[:, 0]
    same(embeddings, names[[0, 1, 2, 3, 3, 3, 4, 5, 4]].view(3, 3, -1))

    def best(token):
        cosines = [float(token @ name) for name in names]
        return [max(cosines[:3]), cosines[3], max(cosines[4:])]

    pixels = torch.randint(0, 256, (2, 3, 70, 45), dtype=torch.uint8)
    scores, covered = model.patch_scores(pixels, embeddings)
    of_images = model.image_scores(pixels, embeddings)
    class_token, patches, (h, w) = model.backbone(model.backbone.normalise(pixels))
    assert scores.shape == (2, 3, h, w) and covered == (h * 8, w * 8) == (72, 48)
    for b in range(2):
        same(of_images[b], best(class_token[b]), rtol=1e-5, atol=1e-6)
        for n in range(h * w):
            same(scores[b, :, n // w, n % w], best(patches[b, n]), rtol=1e-5, atol=1e-6)
