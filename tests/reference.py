"""SimZSS once more, slowly: its networks and losses in plain float64 tensors, one image, one
caption and one head at a time. And random models in the format of its authors' checkpoints.

Nothing here comes from model.py. Networks are dicts of tensors by the names of timm, open_clip and
the authors.
"""
import math

import timm
import torch
from open_clip.transformer import TextTransformer
from timm.models.vision_transformer import Block

from concepts import ConceptBank, annotate
from conftest import BANK
from machinery.tokenizer import tokenize

END_OF_TEXT = 49407
CAPTIONS = ["a cow on the grass", "two cows, a sheep and a cow near the sea", "nothing to be found",
            "SKY",
            "a boat " + "on and on " * 40 + "near the cow",         # too long: its cow is cut off
            "grass " + "x " * 74 + "sheep sea"]                     # fills the context exactly


def same(found, expected, **tolerance):
    """found is close to expected, which may be numbers in lists."""
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found.detach(), expected.detach(), **tolerance)


def training_batch(size=64):
    """Random images with annotated captions of `conftest.BANK`, a batch for `Method.features`."""
    found = list(annotate(CAPTIONS, ConceptBank(BANK), "match"))
    assert [len(rows) for rows in found] == [2, 4, 0, 1, 1, 1]
    concepts = torch.full((len(found), 4, 3), -1)
    for i, rows in enumerate(found):
        concepts[i, :len(rows)] = torch.tensor(rows).view(-1, 3)
    concepts[:2, 1, 1] -= 1                         # two concepts of two tokens, like "sea lion"
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (len(found), 3, size, size), generator=generator)
    tokens = torch.stack(list(map(tokenize, CAPTIONS)))
    return {"pixels": pixels.byte(), "tokens": tokens, "concepts": concepts}


def losses_of(method, batch):
    """The losses of a batch, as train.py computes them."""
    batch = method.features(batch)
    return method.losses(method.encode(batch), batch)


def unit(x):
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


@torch.no_grad()
def randomise(module, seed=0):
    """Make every parameter random, and none small: no part hides behind an initial value such as
    LayerScale's 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        spread = 0.5 if p.ndim < 2 else p.shape[-1] ** -0.5
        p.copy_(torch.randn(p.shape, generator=generator) * spread)
    return module


def doubled(state, prefix=""):
    """The tensors whose names begin with prefix, in float64, named without it."""
    return {name.removeprefix(prefix): value.detach().double() for name, value in state.items()
            if name.startswith(prefix)}


# --------------------------------------------------------------------------------------------------
# Layers

def norm(x, state, name, eps=1e-6):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attend(qkv, heads, causal=False):
    q, k, v = qkv.chunk(3, dim=-1)
    size = q.shape[-1] // heads
    mixed = []
    for first in range(0, q.shape[-1], size):
        head = slice(first, first + size)
        logits = q[:, head] @ k[:, head].T / math.sqrt(size)
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits).triu(1) > 0, -torch.inf)
        mixed.append(logits.softmax(-1) @ v[:, head])
    return torch.cat(mixed, -1)


def block(x, state, name, heads):
    """A ViT's block, with LayerScale where it has some."""
    qkv = linear(norm(x, state, f"{name}norm1"), state, f"{name}attn.qkv")
    attended = linear(attend(qkv, heads), state, f"{name}attn.proj")
    x = x + attended * state.get(f"{name}ls1.gamma", 1)
    hidden = gelu(linear(norm(x, state, f"{name}norm2"), state, f"{name}mlp.fc1"))
    return x + linear(hidden, state, f"{name}mlp.fc2") * state.get(f"{name}ls2.gamma", 1)


def bicubic(new, old):
    """(new, old): weights of bicubic resampling along an axis (a = -0.5), stretched where it
    shrinks (antialiasing)."""
    def kernel(t):
        if t < 1:
            return 1.5 * t ** 3 - 2.5 * t ** 2 + 1
        return -0.5 * t ** 3 + 2.5 * t ** 2 - 4 * t + 2 if t < 2 else 0

    scale = old / new
    rows = [[kernel(abs(j + 0.5 - (i + 0.5) * scale) / max(scale, 1)) for j in range(old)]
            for i in range(new)]
    return torch.tensor([[weight / sum(row) for weight in row] for row in rows],
                        dtype=torch.float64)


def resampled(table, h, w):
    """(side * side, D) -> (h * w, D)."""
    side = math.isqrt(len(table))
    table = table.view(side, side, -1)
    return torch.einsum("yj,xk,jkd->yxd", bicubic(h, side), bicubic(w, side), table).flatten(0, 1)


# --------------------------------------------------------------------------------------------------
# Networks (docs/method.md, sections 3 and 4)

def dinov2(state, image, heads):
    """DINOv2 on one image (3, H, W), after the final norm: (1 + registers + N, D)."""
    kernel = state["patch_embed.proj.weight"]
    _, _, side, _ = kernel.shape
    h, w = (length // side for length in image.shape[1:])
    x = torch.stack([kernel.flatten(1) @ image[:, y * side:(y + 1) * side,
                                               x * side:(x + 1) * side].flatten()
                     for y in range(h) for x in range(w)]) + state["patch_embed.proj.bias"]
    table = state["pos_embed"][0]
    first = state["cls_token"][0]
    if "reg_token" in state:                        # the table is of patches only
        x = torch.cat([first, state["reg_token"][0], x + resampled(table, h, w)])
    else:
        x = torch.cat([first + table[:1], x + resampled(table[1:], h, w)])
    for i in range(sum(name.endswith("norm1.weight") for name in state)):
        x = block(x, state, f"blocks.{i}.", heads)
    return norm(x, state, "norm")


def denoised(state, patches, h, w, heads):
    """The denoiser on one image's patch tokens (N, D)."""
    table = state["pos_embed"].reshape(37 * 37, -1)
    return block(patches + resampled(table, h, w), state, "denoiser.", heads)


def text_states(state, caption, heads):
    """CLIP's text transformer on one caption up to its end token: all states, projected and
    normalised (T, D)."""
    length = caption.tolist().index(END_OF_TEXT) + 1
    x = state["token_embedding.weight"][caption[:length]] + state["positional_embedding"][:length]
    for i in range(sum(name.endswith("ln_1.weight") for name in state)):
        name = f"transformer.resblocks.{i}."
        y = norm(x, state, f"{name}ln_1", 1e-5)
        qkv = y @ state[f"{name}attn.in_proj_weight"].T + state[f"{name}attn.in_proj_bias"]
        x = x + linear(attend(qkv, heads, causal=True), state, f"{name}attn.out_proj")
        y = gelu(linear(norm(x, state, f"{name}ln_2", 1e-5), state, f"{name}mlp.c_fc"))
        x = x + linear(y, state, f"{name}mlp.c_proj")
    return unit(norm(x, state, "ln_final", 1e-5) @ state["text_projection"])


# --------------------------------------------------------------------------------------------------
# Losses (sections 6 to 8)

def cross_entropy(logits, target):
    return torch.stack(logits).exp().sum().log() - logits[target]


def slow_losses(class_tokens, patches, states, concepts, scale, target, query):
    """(L_g, L_l), one occurrence at a time.

    class_tokens: B vectors. patches: B of (N, D). states: B of (T, D). concepts: (B, M, 3) of bank
    id, start, end. scale: 1 / temperature. target, query: of `SimZSSSettings`.
    """
    captions = [x[-1] for x in states]
    B = len(captions)
    loss_global = 0
    for i in range(B):
        image_to_text = [scale * class_tokens[i] @ caption for caption in captions]
        text_to_image = [scale * captions[i] @ image for image in class_tokens]
        loss_global += cross_entropy(image_to_text, i) / (2 * B)
        loss_global += cross_entropy(text_to_image, i) / (2 * B)

    occurrences = [(b, *row) for b in range(B) for row in concepts[b].tolist() if row[0] >= 0]
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


# --------------------------------------------------------------------------------------------------
# The authors' format

def denoiser_state(width, shape=(1, 37, 37)):
    """A random denoiser by the authors' names."""
    one = randomise(Block(width, width // 64, mlp_ratio=4, qkv_bias=True), seed=5)
    table = 0.5 * torch.randn(*shape, width, generator=torch.Generator().manual_seed(6))
    return {"visual.pos_embed": table,
            **{f"visual.denoiser.{name}": value for name, value in one.state_dict().items()}}


def authors_model(name, denoiser=False, width=64, layers=2, **options):
    """A random model in the authors' format, of timm's and open_clip's own networks: (vit, text,
    tensors by name)."""
    vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
    vit = randomise(vit, seed=1).eval()
    D = vit.num_features
    text = TextTransformer(77, width=width, heads=max(1, width // 64), layers=layers, output_dim=D)
    text = randomise(text, seed=2).eval()
    return vit, text, {
        **{f"visual.vit.model.{name}": value for name, value in vit.state_dict().items()},
        **(denoiser_state(D) if denoiser else {}),
        **{f"text.{name}": value for name, value in text.state_dict().items()},
        "logit_scale": torch.tensor(3.25), "beta_ema": torch.tensor(0.9),
        "classification_weights_ema": torch.randn(574, D), "logit_scale_local": torch.ones(1)}
