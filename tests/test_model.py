"""The method: its formulas by hand, both losses against a slow transcription, what is trained and
what is frozen, both towers, class embeddings, files."""
import copy
import json
import math

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import nn

from concepts import ConceptBank, annotate, token_spans, tokenize
from conftest import BANK, tiny
from machinery.networks.backbones import SHAPE_OPTIONS
from machinery.networks.checkpoint import SINCE, load_model, save_model
from machinery.names import read_templates
from model import (SimZSS, TextEncoder, VisionBackbone, class_weights, concept_embeddings,
                   concept_loss, global_loss, similarity_pool)


def same(found, expected, **tolerance):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), **tolerance)


# --------------------------------------------------------------------------------------------------
# The formulas, by hand

def test_concept_embeddings_by_hand():
    """A concept's embedding is the sum of its tokens' embeddings; an empty or padded span gives
    zeros."""
    tokens = torch.tensor([[[1., 0.], [0., 1.], [.6, .8]]])
    spans = torch.tensor([[[0, 1], [1, 3], [2, 2], [-1, -1]]])
    same(concept_embeddings(tokens, spans), [[[1, 0], [.6, 1.8], [0, 0], [0, 0]]])


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


# --------------------------------------------------------------------------------------------------
# Both losses together

def test_one_pair_with_one_concept_and_one_patch_has_no_loss(model):
    """B = 1 with one concept and one patch gives L_g = 0 and L_l = 0 exactly."""
    D = model.backbone.width
    image, patch, caption, token = F.normalize(torch.randn(4, D), dim=-1).split(1)
    losses = model.combine(image, patch.view(1, 1, D), caption, token.view(1, 1, D),
                           torch.tensor([[3]]))
    assert losses["global"].item() == losses["local"].item() == losses["loss"].item() == 0


def test_equal_logits_give_the_logarithm_of_the_choices(model):
    """With all logits equal, L_g = log B and L_l = log(number of present concepts)."""
    B = 5
    axes = torch.eye(model.backbone.width)
    image = caption = axes[:1].expand(B, -1)
    concepts = axes[1:4].expand(B, 3, -1)           # three in each caption, at right angles ...
    patches = axes[9].expand(B, 2, -1)              # ... to each other and to every patch
    ids = torch.tensor([0, 2, 5]).expand(B, 3)
    losses = model.combine(image, patches, caption, concepts, ids)
    same(losses["global"], math.log(B))
    same(losses["local"], math.log(3))
    same(losses["loss"], math.log(B) + 0.05 * math.log(3))


CAPTIONS = ["a cow on the grass", "two cows, a sheep and a cow near the sea", "nothing to be found",
            "SKY",
            "a boat " + "on and on " * 40 + "near the cow",         # too long: its cow is cut off
            "grass " + "x " * 74 + "sheep sea"]                     # fills the context exactly


def training_batch(model, size=64):
    """Random images with real, annotated captions: (images, tokens, ids, spans) of `forward`."""
    found = list(annotate(CAPTIONS, ConceptBank(model.bank), "match"))
    assert [len(rows) for rows in found] == [2, 4, 0, 1, 1, 1]
    rows = torch.full((len(found), 4, 3), -1)
    for i, row in enumerate(found):
        rows[i, : len(row)] = torch.tensor(row).view(-1, 3)
    rows[:2, 1, 1] -= 1                             # two concepts of two tokens, like "sea lion"
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (len(found), 3, size, size), dtype=torch.uint8,
                           generator=generator)
    tokens = torch.stack(list(map(tokenize, CAPTIONS)))
    return model.backbone.normalise(pixels), tokens, rows[..., 0], rows[..., 1:]


def unit(x):
    return x / x.pow(2).sum().sqrt()


def slow_towers(model, images, tokens):
    """docs/method.md, sections 3 and 4, one image and one caption at a time.

    Returns lists of class tokens, patches, captions, token states."""
    class_tokens = []
    patches = []
    for image in images:
        features = model.backbone.trunk.forward_features(image[None])[0]
        class_tokens.append(unit(features[0]))
        patches.append([unit(patch) for patch in features[model.backbone.prefix_tokens:]])
    captions = []
    states = []
    tower = model.text.tower
    for caption in tokens:
        length = caption.tolist().index(49407) + 1  # up to the end token, with a mask of its own
        mask = torch.full((length, length), -torch.inf, dtype=images.dtype).triu(1)
        x = tower.token_embedding(caption[:length]) + tower.positional_embedding[:length]
        x = tower.transformer(x[None], attn_mask=mask)
        x = tower.ln_final(x)[0] @ tower.text_projection
        states.append([unit(state) for state in x])
        captions.append(states[-1][-1])
    return class_tokens, patches, captions, states


def slow_losses(class_tokens, patches, captions, states, ids, spans, scale, target, query):
    """docs/method.md, sections 6 to 8, one occurrence at a time: (L_g, L_l) of lists of vectors in
    any precision."""
    def cross_entropy(logits, target):
        return torch.stack(logits).exp().sum().log() - logits[target]

    B = len(captions)
    loss_global = 0
    for i in range(B):
        image_to_text = [scale * class_tokens[i] @ caption for caption in captions]
        text_to_image = [scale * captions[i] @ image for image in class_tokens]
        loss_global += cross_entropy(image_to_text, i) / (2 * B)
        loss_global += cross_entropy(text_to_image, i) / (2 * B)

    occurrences = [(b, int(c), int(start), int(end)) for b in range(B)
                   for c, (start, end) in zip(ids[b], spans[b]) if c >= 0]
    sums = {}
    for b, c, start, end in occurrences:
        for position in range(start, end):
            sums[c] = sums.get(c, 0) + states[b][position]
    present = sorted(sums)
    weights = {c: unit(sums[c]) for c in present}
    loss_local = 0
    for b, c, start, end in occurrences:
        q = weights[c] if query == "class" else unit(sum(states[b][start:end]))
        attention = torch.stack([patch @ q / 0.1 for patch in patches[b]]).softmax(0)
        pooled = unit(sum(a * patch for a, patch in zip(attention, patches[b])))
        logits = [pooled @ weights[other] / 0.07 for other in present]
        if target == "concept":
            true = present.index(c)
        else:
            true = max(range(len(logits)), key=lambda k: logits[k].item())
        loss_local += cross_entropy(logits, true) / len(occurrences)
    return loss_global, loss_local


@pytest.mark.parametrize("query", ["class", "caption"])
@pytest.mark.parametrize("target", ["concept", "argmax"])
def test_losses_and_gradients_equal_a_slow_transcription(model, target, query):
    """Both losses and their gradients equal the method's equations, in loops, in float64, one image
    and one caption at a time."""
    model.local_target = target
    model.pool_query = query
    batch = training_batch(model)
    losses = model(*batch)
    losses["loss"].backward()

    slow = copy.deepcopy(model).double()
    slow.zero_grad()
    towers = slow_towers(slow, batch[0].double(), batch[1])
    scale = slow.logit_scale.exp()
    loss_global, loss_local = slow_losses(*towers, *batch[2:], scale, target, query)
    (loss_global + 0.05 * loss_local).backward()
    same(losses["global"].detach().double(), loss_global.detach(), rtol=1e-5, atol=0)
    same(losses["local"].detach().double(), loss_local.detach(), rtol=1e-5, atol=0)
    assert losses["concepts"] == 9 and losses["present"] == 6
    for name, parameter in slow.trained().items():
        grad = model.get_parameter(name).grad.double()
        assert (grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


@pytest.mark.parametrize("switch", [
    {"pool_query": "caption"}, {"local_target": "argmax"}, {"pool_temperature": 0.3},
    {"local_temperature": 0.3}, {"local_weight": 0.3}, {"prompt_weight": 0.3}])
def test_a_switch_changes_what_it_is_for_and_nothing_else(model, switch):
    """Each switch of the method changes the local loss, lambda its weight, and the prompts' weight
    adds a loss; the global loss stays bit-identical."""
    batch = training_batch(model)
    before = model(*batch)
    for name, value in switch.items():
        assert getattr(model, name) != value
    changed = SimZSS(model.backbone, model.text, model.bank, **{**model.switches(), **switch})
    after = changed(*batch)
    assert torch.equal(after["global"], before["global"])
    assert after["concepts"] == before["concepts"]
    only_weights = bool(switch.keys() & {"local_weight", "prompt_weight"})
    assert torch.equal(after["local"], before["local"]) == only_weights
    assert not torch.equal(after["loss"], before["loss"])
    old = model.switches()
    new = changed.switches()
    assert {key for key in new if new[key] != old[key]} == set(switch)


def test_the_loss_of_prompts_is_the_local_loss_of_classes_by_caption(model):
    """With prompt_weight, the second local loss has for class weights what `embed_classes` makes of
    the concepts at test time by their prompts' end tokens; gradient reaches the text encoder."""
    images, tokens, ids, spans = training_batch(model)
    model.prompt_weight = 0.5
    model.prompts = "plain"
    weights = model.embed_classes(model.bank, read_templates("plain"))[:, 0]        # (C, D)
    _, patches, _ = model.backbone(images)
    counts = torch.bincount(ids[ids >= 0], minlength=len(model.bank)).float()
    visual = similarity_pool(weights[ids.clamp(min=0)], patches, model.pool_temperature)
    expected = concept_loss(visual, ids, weights, counts, model.local_temperature)
    losses = model(images, tokens, ids, spans)
    same(losses["prompt"].detach(), expected)
    same((losses["loss"] - losses["global"] - 0.05 * losses["local"]).detach(), 0.5 * expected)
    losses["prompt"].backward()
    assert all(p.grad.norm() > 0 for p in model.text.parameters())


def test_with_one_occurrence_each_both_queries_are_the_same(model):
    """Where every concept occurs once, its class weight is its own embedding, so both pooling
    queries agree."""
    images, tokens, ids, spans = training_batch(model)
    seen = set()
    for b, m in (ids >= 0).nonzero().tolist():      # keep the first occurrence of each
        concept = int(ids[b, m])
        ids[b, m] = -1 if concept in seen else concept
        seen.add(concept)
    assert len(seen) == (ids >= 0).sum() == 6
    by_class = model(images, tokens, ids, spans)
    model.pool_query = "caption"
    same(model(images, tokens, ids, spans)["local"].detach(), by_class["local"].detach())


def test_unknown_switches_are_refused():
    """An unknown pooling query, or extent of the class weights, is named, with the two that
    exist."""
    with pytest.raises(ValueError, match="'class' or 'caption', found 'image'"):
        SimZSS(VisionBackbone("toy"), TextEncoder(128, 32, 2, 1), pool_query="image")
    with pytest.raises(ValueError, match="'batch' or 'process', found 'node'"):
        SimZSS(VisionBackbone("toy"), TextEncoder(128, 32, 2, 1), weights_over="node")


def test_lambda_zero_is_the_global_loss_alone(model):
    """With lambda = 0 the loss and its gradient are those of the global loss."""
    batch = training_batch(model)
    expected = torch.autograd.grad(model(*batch)["global"], list(model.trained().values()))
    model.local_weight = 0.0
    losses = model(*batch)
    losses["loss"].backward()
    assert losses["loss"] == losses["global"]
    for parameter, grad in zip(model.trained().values(), expected):
        same(parameter.grad, grad)


def test_logit_scale_starts_at_its_temperature(model):
    """The logit scale starts at 1 / 0.07."""
    same(model(*training_batch(model))["logit_scale"].detach(), 1 / 0.07)


def test_losses_stay_in_float32_under_mixed_precision(model):
    """Automatic mixed precision changes the towers' arithmetic only: the losses of given embeddings
    stay bit-identical."""
    images, tokens, ids, spans = training_batch(model)
    class_token, patches, _ = model.backbone(images)
    embedded = (class_token, patches, *model.encode_text(tokens, spans), ids)
    expected = model.combine(*embedded)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(x.dtype == torch.float32 for x in model.encode_text(tokens, spans))
        found = model.combine(*embedded)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("M", [0, 3])
def test_a_batch_without_concepts_is_harmless(model, M):
    """A batch without concepts, with padding or without, has local loss 0, a finite loss and finite
    gradients."""
    images, tokens, _, _ = training_batch(model)
    B = len(images)
    losses = model(images, tokens, torch.full((B, M), -1), torch.full((B, M, 2), -1))
    losses["loss"].backward()
    assert losses["local"] == 0
    assert losses["loss"] == losses["global"] and losses["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in model.trained().values())


# --------------------------------------------------------------------------------------------------
# What is trained and what is frozen

@pytest.mark.parametrize("loss", ["global", "local"])
def test_each_loss_alone_reaches_all_of_the_text_tower(model, loss):
    """Either loss alone sends a gradient into every parameter of the text encoder."""
    model(*training_batch(model))[loss].backward()
    for name, parameter in model.text.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_frozen_stays_bit_identical_and_everything_else_learns():
    """After train() and a step the backbone, its batch statistics included, is bit-identical, and
    all else has moved."""
    model = tiny("test_resnet").train()
    assert not any(module.training for module in model.backbone.modules())
    assert model.text.training
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.trained().values(), lr=1e-2)
    model(*training_batch(model))["loss"].backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("backbone."), key
    assert all(p.grad is None for p in model.backbone.parameters())


# --------------------------------------------------------------------------------------------------
# Vision tower

def plain_timm(backbone, **options):
    """timm's own model of that name as timm makes it, with the backbone's weights."""
    plain = timm.create_model(backbone.config["name"], num_classes=0, **options).eval()
    plain.load_state_dict(backbone.trunk.state_dict())
    return plain


SMALL = dict(depth=2, embed_dim=48, num_heads=2)
TRANSFORMERS = [                                    # name, options, prefix tokens, class token?
    ("vit_small_patch14_reg4_dinov2", dict(SMALL, img_size=56), 5, True),
    ("vit_tiny_patch16_224", dict(SMALL, img_size=64), 1, True),
    ("test_vit2", dict(img_size=64), 1, False),     # a register, no class token
    ("vit_base_patch16_siglip_224", dict(SMALL, img_size=64), 0, False)]


@pytest.mark.parametrize("name, options, prefix, has_class", TRANSFORMERS)
def test_transformer_tokens_are_timms(name, options, prefix, has_class):
    """Patch tokens are timm's last intermediates without class token and registers, the class token
    is timm's or the mean; both are normalised."""
    backbone = VisionBackbone(name, pretrained=False, **options)
    images = torch.randn(2, 3, *[options["img_size"]] * 2)
    class_token, patches, (h, w) = backbone(images)
    with torch.no_grad():
        plain = plain_timm(backbone, **options)
        expected = plain.forward_intermediates(images, norm=True, output_fmt="NLC",
                                               intermediates_only=True)[-1]
        features = plain.forward_features(images)
    assert features.shape[1] == prefix + h * w and expected.shape[1] == h * w
    same(patches, F.normalize(expected, dim=-1), rtol=1e-5, atol=1e-6)
    image = features[:, 0] if has_class else expected.mean(1)
    same(class_token, F.normalize(image, dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext",
                                  "test_mambaout"])
def test_cnn_features_become_patches_and_a_class_token(name):
    """A CNN's feature map gives the patches, row by row, and their mean the class token, both
    normalised; also of the CNNs in timm whose map has its channels last."""
    backbone = VisionBackbone(name, pretrained=False)
    images = torch.randn(2, 3, 64, 96)
    class_token, patches, grid = backbone(images)
    with torch.no_grad():
        features = plain_timm(backbone).forward_features(images)
    if name == "test_mambaout":
        features = features.permute(0, 3, 1, 2)
    assert grid == (2, 3)
    for y in range(2):
        for x in range(3):
            expected = F.normalize(features[:, :, y, x], dim=-1)
            same(patches[:, 3 * y + x], expected, rtol=1e-5, atol=1e-6)
    same(class_token, F.normalize(features.mean((2, 3)), dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, options", [TRANSFORMERS[0][:2], TRANSFORMERS[3][:2],
                                           ("test_resnet", {}), ("toy", {})])
@pytest.mark.parametrize("height, width", [(75, 50), (40, 121)])
def test_any_image_size_is_padded_to_whole_patches(name, options, height, width):
    """An image of any size gives the tokens of the same image padded with zeros at the right and
    the bottom."""
    backbone = VisionBackbone(name, pretrained=False, **options)
    ph, pw = backbone.patch_size
    images = torch.randn(1, 3, height, width)
    h = math.ceil(height / ph)
    w = math.ceil(width / pw)
    padded = torch.zeros(1, 3, h * ph, w * pw)
    padded[:, :, :height, :width] = images
    found = backbone(images)
    expected = backbone(padded)
    assert found[2] == (h, w) and found[1].shape == (1, h * w, backbone.width)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", ["toy", "test_vit", "test_resnet"])
def test_an_image_smaller_than_a_patch_has_one_token(name):
    """Even an image smaller than one patch has a token of unit length."""
    backbone = VisionBackbone(name, pretrained=False)
    class_token, patches, grid = backbone(torch.randn(1, 3, 5, 3))
    assert grid == (1, 1)
    same(patches.norm(dim=-1), torch.ones(1, 1))
    same(class_token.norm(dim=-1), torch.ones(1))


def test_pixels_are_normalised_with_the_backbones_own_statistics():
    """Pixels become (x / 255 - mean) / std, with the backbone's own statistics unless others are
    asked for."""
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    own = VisionBackbone("vit_tiny_patch16_224", pretrained=False, depth=1)     # both 0.5
    same(own.normalise(pixels).flatten(), [-1, -.6, 1])
    other = VisionBackbone("toy", mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.7))
    same(other.normalise(pixels).flatten(), [-.2, 0, 1])
    assert other.config["mean"] == [0.1, 0.2, 0.3] and own.config["std"] == [0.5] * 3


def test_unknown_backbone_is_named():
    """An unknown backbone is named in the error, and so is an option that shapes no network, or
    that this backbone does not know."""
    with pytest.raises(ValueError, match="unknown backbone 'vit_huge_dog'.*'toy' or a name from "
                                         "timm"):
        VisionBackbone("vit_huge_dog", pretrained=False)
    with pytest.raises(ValueError, match="backbone option 'wings'.*expected one.*img_size"):
        VisionBackbone("test_vit", pretrained=False, wings=2)
    assert "window_size" in SHAPE_OPTIONS
    with pytest.raises(ValueError, match="'test_vit' with options.*window_size"):
        VisionBackbone("test_vit", pretrained=False, window_size=2)


def test_a_missing_download_names_both_ways_out(monkeypatch, tmp_path):
    """Without network, weights that are not there end with one line that names a local file and
    random weights."""
    empty = str(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", empty)
    with pytest.raises(FileNotFoundError, match="vit_tiny_patch16_224.*--backbone-weights FILE.*"
                                                "--backbone-weights random"):
        VisionBackbone("vit_tiny_patch16_224")


def test_backbones_that_take_one_size_only_say_so():
    """A transformer whose position table cannot be resampled is refused with the size that it was
    asked for."""
    backbone = VisionBackbone("cait_xxs24_224", pretrained=False, depth=1, depth_token_only=1)
    with pytest.raises(ValueError, match="cait_xxs24_224 takes no images of 250 x 224"):
        backbone(torch.zeros(1, 3, 250, 224))


def test_backbones_without_a_regular_grid_say_so():
    """A CNN whose feature map is not the image over its stride is refused, for its masks would be
    shifted."""
    backbone = VisionBackbone("inception_v3", pretrained=False)
    with pytest.raises(ValueError, match="inception_v3 gives .* patches for 300 x 260 pixels, "
                                         "expected 10 x 9"):
        backbone(torch.zeros(1, 3, 300, 260))


# --------------------------------------------------------------------------------------------------
# Local weights, loaded strictly

@pytest.fixture(scope="module")
def weights():
    """State of a small CNN, with its classifier."""
    torch.manual_seed(1)
    return timm.create_model("test_resnet").state_dict()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_local_weights_are_loaded(weights, tmp_path, name):
    """Weights from a local file arrive in the backbone; only the classifier is left out, and the
    file is recorded."""
    path = tmp_path / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path)
    backbone = VisionBackbone("test_resnet", weights=path)
    assert any(key.startswith("fc.") for key in weights)
    assert backbone.config["weights"] == str(path)
    state = backbone.trunk.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items()
               if not key.startswith("fc."))
    random = VisionBackbone("test_resnet", pretrained=False)
    assert backbone.config["sha256"] != random.config["sha256"]


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop("conv1.0.weight"), "missing.*conv1.0.weight"),
    (lambda w: w.update({"layer9.weight": torch.zeros(1)}), "unexpected.*layer9.weight"),
    (lambda w: w.update({"conv1.0.weight": torch.zeros(1, 2, 3, 3)}),
     r"conv1.0.weight.*\[1, 2, 3, 3\]")])
def test_weights_that_do_not_fit_are_refused(weights, tmp_path, change, words):
    """A weights file with a missing, an extra or a differently shaped tensor is refused in one line
    that names it."""
    weights = dict(weights)
    change(weights)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(weights, path)
    expected = rf"(?s){path} does not fit the backbone.*{words}"
    with pytest.raises(ValueError, match=expected) as error:
        VisionBackbone("test_resnet", weights=path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, name):
    """A file that is no weights file is refused in one line that names it, and so is one that is
    not there."""
    path = tmp_path / name
    path.write_bytes(b"these are no weights" * 100)
    with pytest.raises(ValueError, match=f"{path} is no readable weights file") as error:
        VisionBackbone("test_resnet", weights=path)
    assert "\n" not in str(error.value)
    gone = tmp_path / "none.pth"
    with pytest.raises(FileNotFoundError, match=f"--backbone-weights: no file {gone}"):
        VisionBackbone("test_resnet", weights=gone)


def test_the_toy_backbone_takes_no_weights(tmp_path):
    """The toy backbone has no weights, so a weights file for it is refused by its name."""
    with pytest.raises((ValueError, FileNotFoundError), match="none.pth"):
        VisionBackbone("toy", weights=tmp_path / "none.pth")


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
    pooled, padded = text.tower(tokens)             # before and after the projection
    same(caption, F.normalize(pooled, dim=-1), rtol=1e-5, atol=1e-6)
    for i, end in enumerate(ends):
        expected = F.normalize(padded[i, : end + 1] @ text.tower.text_projection, dim=-1)
        same(states[i, : end + 1], expected, rtol=1e-5, atol=1e-6)
        same(caption[i], states[i, end])


def test_a_caption_does_not_depend_on_its_neighbours():
    """A caption has the same embeddings alone as in a batch with longer and shorter ones."""
    text = TextEncoder(24, width=32, layers=2).eval()
    tokens = torch.stack(list(map(tokenize, CAPTIONS)))
    caption, states = text(tokens)
    for i, end in enumerate(tokens.argmax(-1)):
        alone, alone_states = text(tokens[i:i + 1])
        same(alone[0], caption[i], rtol=1e-5, atol=1e-6)
        same(alone_states[0], states[i, : end + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("D, width, heads", [(384, 384, 6), (768, 512, 8), (1024, 768, 12),
                                             (512, 512, 8)])
def test_text_tower_follows_the_backbone(monkeypatch, D, width, heads):
    """The text tower has the method's width and heads for ViT-S, ViT-B and ViT-L, ViT-B's for any
    other backbone."""
    monkeypatch.setattr("open_clip.transformer.TextTransformer",
                        lambda *args, **settings: nn.Identity())
    expected = {"output_dim": D, "width": width, "heads": heads, "layers": 12}
    assert TextEncoder(D).config == expected


def test_heads_must_divide_the_width():
    """A text encoder whose width is no multiple of its heads is refused with both numbers."""
    with pytest.raises(ValueError, match="width 33 must be a multiple of its 2 heads"):
        TextEncoder(16, width=33, heads=2, layers=1)


# --------------------------------------------------------------------------------------------------
# Class embeddings and patch scores

def test_class_embeddings_average_the_templates(model):
    """A class embedding is the normalised mean of its normalised prompts, whatever the batch they
    are encoded in."""
    templates = ("a photo of a {}.", "{}, seen from very far away")
    found = model.embed_classes(["cow", "red boat"], templates)
    for i, name in enumerate(["cow", "red boat"]):
        prompts = [model.text(tokenize(template.replace("{}", name))[None])[0][0]
                   for template in templates]
        mean = sum(prompt / prompt.norm() for prompt in prompts) / 2
        same(found[i, 0], (mean / mean.norm()).detach(), rtol=1e-5, atol=1e-6)
    one_by_one = model.embed_classes(["cow", "red boat"], templates, batch=1)
    same(one_by_one, found, rtol=1e-5, atol=1e-6)
    one = model.text(tokenize("cow")[None])[0]
    same(model.embed_classes(["cow"])[0], one.detach(), rtol=1e-5, atol=1e-6)


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
    found = model.embed_classes([name], [prompt.replace(name, "{}")], class_embedding="concept")
    same(found[0, 0], (expected / expected.norm()).detach(), rtol=1e-5, atol=1e-6)


def test_the_best_synonym_scores_a_patch(model):
    """A class with several names scores each patch by its best name; classes with fewer names
    repeat the first."""
    classes = [["cow", "cattle", "bull"], ["sea"], ["boat", "ship"]]
    embeddings = model.embed_classes(classes)
    names = model.embed_classes(["cow", "cattle", "bull", "sea", "boat", "ship"])[:, 0]
    same(embeddings, names[[0, 1, 2, 3, 3, 3, 4, 5, 4]].view(3, 3, -1))

    pixels = torch.randint(0, 256, (2, 3, 70, 45), dtype=torch.uint8)
    scores, covered = model.patch_scores(pixels, embeddings)
    _, patches, (h, w) = model.backbone(model.backbone.normalise(pixels))
    ph, pw = model.backbone.patch_size
    assert scores.shape == (2, 3, h, w) and covered == (h * ph, w * pw)
    for b in range(2):
        for n in range(h * w):
            cosines = [float(patches[b, n] @ name) for name in names]
            best = [max(cosines[:3]), cosines[3], max(cosines[4:])]
            same(scores[b, :, n // w, n % w], best, rtol=1e-5, atol=1e-6)
    one_name_each, _ = model.patch_scores(pixels, names[3:5])       # embeddings (C, D)
    same(one_name_each[:, 0], scores[:, 1])


# --------------------------------------------------------------------------------------------------
# Files

def outputs(model):
    """All that a model computes of `training_batch`: list of tensors."""
    model.eval()
    images, tokens, ids, spans = training_batch(model)
    return [*model.backbone(images)[:2], *model.text(tokens),
            *model(images, tokens, ids, spans).values()]


def assert_same_outputs(one, other):
    """Two models compute the same, bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(other), strict=True))


def read_header(path):
    """Settings in a checkpoint file."""
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["simzss"])


def write_checkpoint(path, tensors, header):
    safetensors.torch.save_file(tensors, path, {"simzss": json.dumps(header)})


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_loaded_model_is_the_saved_one(tmp_path, where):
    """A model loaded from its file or folder gives bit-identical outputs, with its settings and its
    bank."""
    backbone = VisionBackbone("toy", mean=(.4, .5, .6), std=(.3, .3, .2))
    model = SimZSS(backbone, TextEncoder(backbone.width, 32, 2, 2), BANK, local_weight=0.2,
                   pool_temperature=0.3, local_temperature=0.5, local_target="argmax",
                   pool_query="caption")
    nn.init.constant_(model.logit_scale, 1.5)
    path = tmp_path / "new" / "model.safetensors"
    save_model(path, model, {"note": 7})
    loaded = load_model(path if where == "file" else path.parent)
    assert_same_outputs(model, loaded)
    assert loaded.bank == BANK and loaded.trained_with == {"note": 7}
    assert loaded.switches() == model.switches() and loaded.config() == model.config()
    assert not loaded.training


def test_a_random_backbone_is_stored_and_restored(tmp_path):
    """A random backbone is written into the file, recorded as random, and restored bit for bit."""
    model = tiny("test_resnet")
    path = tmp_path / "model.safetensors"
    save_model(path, model, {})
    torch.manual_seed(99)
    loaded = load_model(tmp_path)
    assert read_header(path)["config"]["backbone"] == loaded.backbone.config
    assert loaded.backbone.config == model.backbone.config
    assert loaded.backbone.config["weights"] == "random"
    assert_same_outputs(model, loaded)
    save_model(tmp_path / "again.safetensors", loaded, {})
    again = load_model(tmp_path / "again.safetensors")
    assert again.backbone.config == model.backbone.config


def test_a_checkpoint_without_the_newer_settings_is_loaded(checkpoint, tmp_path):
    """A checkpoint written before there were a pooling query, a denoiser and an image token gives
    the model that it always gave, in today's format and in the first."""
    path = tmp_path / "old.safetensors"
    tensors = safetensors.torch.load_file(checkpoint)
    header = read_header(checkpoint)
    config = header["config"]
    for name in ("pool_query", "weights_over"):
        del config["switches"][name]
    for name in ("denoiser", "image_token"):
        del config["backbone"][name]
    write_checkpoint(path, tensors, header)
    new = load_model(checkpoint)
    old = load_model(path)
    assert old.switches() == new.switches()
    assert_same_outputs(old, new)

    switches = dict(config["switches"])
    switches["weight"] = switches.pop("local_weight")       # lambda's first name
    first = {"format": "simzss-1", "backbone": config["backbone"], "text": config["text"],
             "method": {**switches, "weight": 0.3}, "bank": config["bank"],
             "training": {**header["training"], "weight": 0.3}}
    write_checkpoint(path, tensors, first)
    old = load_model(path)
    assert old.switches() == {**new.switches(), "local_weight": 0.3}
    assert old.trained_with == {**SINCE, **new.trained_with, "local_weight": 0.3}
    old.local_weight = new.local_weight
    assert_same_outputs(old, new)


def test_a_frozen_backbone_is_not_stored(weights, tmp_path):
    """Of a backbone with weights of its own only name and hash are stored; other weights are
    refused, the right ones found."""
    path = tmp_path / "weights.safetensors"
    moved = tmp_path / "moved.safetensors"
    safetensors.torch.save_file(weights, path)
    model = tiny("test_resnet", weights=path)
    save_model(tmp_path / "model.safetensors", model, {})
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not any(key.startswith("backbone.") for key in file.keys())

    path.rename(moved)
    with pytest.raises(FileNotFoundError, match=f"no file {path}"):
        load_model(tmp_path)
    assert_same_outputs(model, load_model(tmp_path, backbone_weights=moved))
    other = {**weights, "conv1.0.weight": weights["conv1.0.weight"] + 1e-6}
    safetensors.torch.save_file(other, path)
    with pytest.raises(ValueError, match=f"({path}).*not those that.*--backbone-weights FILE"):
        load_model(tmp_path)


@pytest.mark.parametrize("size", [0, 6, 5000, -1])
def test_a_checkpoint_cut_short_is_refused(checkpoint, tmp_path, size):
    """A checkpoint of which any part is missing is refused."""
    cut = tmp_path / "model.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{cut} is no SimZSS checkpoint, or is cut short"):
        load_model(cut)


@pytest.mark.parametrize("metadata", [None, {"simzss": "{"}, {"simzss": "{}"}])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, metadata):
    """A text file and a safetensors file without our settings are refused as no checkpoint."""
    path = tmp_path / "model.safetensors"
    path.write_text("no checkpoint at all")
    with pytest.raises(ValueError, match=f"{path} is no SimZSS checkpoint"):
        load_model(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match=f"{path} is no SimZSS checkpoint"):
        load_model(path)


def test_a_checkpoint_that_contradicts_itself_is_refused(checkpoint, tmp_path):
    """A checkpoint of another format, without one of its tensors, or with one of another shape is
    refused by name."""
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(checkpoint)
    header = read_header(checkpoint)
    write_checkpoint(path, tensors, {**header, "format": "simzss-9"})
    with pytest.raises(ValueError, match="'simzss-2', found 'simzss-9'"):
        load_model(path)
    fewer = {key: value for key, value in tensors.items() if key != "logit_scale"}
    write_checkpoint(path, fewer, header)
    with pytest.raises(ValueError, match="does not hold the tensors of its own settings.*"
                                         "logit_scale"):
        load_model(path)
    write_checkpoint(path, {**tensors, "logit_scale": torch.zeros(2)}, header)
    with pytest.raises(ValueError, match="(?s)logit_scale"):
        load_model(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    """A missing checkpoint is named, with the script that writes one."""
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}; train.py writes one"):
        load_model(tmp_path)


def test_an_interrupted_save_leaves_the_old_file(monkeypatch, tmp_path):
    """A save that dies half-way leaves the checkpoint that was there before, and nothing else."""
    path = tmp_path / "model.safetensors"
    old = tiny(seed=1)
    save_model(path, old, {})
    written = []

    def dies(tensors, filename, metadata=None):
        np.zeros(1000).tofile(filename)
        written.append(filename)
        raise KeyboardInterrupt
    monkeypatch.setattr(safetensors.torch, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        save_model(path, tiny(seed=2), {})
    assert len(written) == 1 and list(tmp_path.iterdir()) == [path]
    assert_same_outputs(old, load_model(path))


def test_a_folder_holds_the_model(model, tmp_path):
    """Saved to a folder, the model lies in it as model.safetensors and is loaded from either."""
    save_model(tmp_path, model, {})
    positions = load_model(tmp_path).text.tower.positional_embedding
    assert torch.equal(positions, model.text.tower.positional_embedding)
    load_model(tmp_path / "model.safetensors")
