"""One batch by hand: every tensor of SimZSS for four drawn scenes, before and after training.

    python docs/one_batch.py > docs/one-batch.md        # about a minute; also draws one-batch.png

The text encoder is that of minimal.py; the formulas are model.py's functions.
"""
import contextlib
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import minimal
from machinery.scoring.pictures import comparison
from model import class_weights, concept_embeddings, concept_loss, global_loss, similarity_pool

BATCH, SEED = 4, 188        # scenes that are neither trained on nor scored; one word occurs twice


def read_batch(captions):
    """Concepts (B, M, 3) of (bank id, first token, end token), padded with -1, as in model.py."""
    found = [torch.tensor(minimal.find(caption)) for caption in captions]
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)


def compute(tower, log_scale, images, masks, captions):
    """Every tensor of a step, by the letter that docs/method.md gives it. Of the concepts found, K:
    the photo, the id, what part of the photo each fills, and what part of the attention it gets."""
    v_g, v = minimal.see(images)                                            # (B, D), (B, N, D)
    t_g, t = minimal.read(tower, captions)                                  # (B, D), (B, T, D)
    concepts = read_batch(captions)                                                 # (B, M, 3)
    ids = concepts[..., 0]                                                          # (B, M)
    g = concept_embeddings(t, concepts[..., 1:])                                    # (B, M, D)
    w, counts = class_weights(g, ids, len(minimal.bank))                            # (C, D), (C,)
    query = w[ids.clamp(min=0)]                                                     # (B, M, D)
    a = (query @ v.transpose(1, 2) / 0.1).softmax(dim=-1)                           # (B, M, N)
    u = similarity_pool(query, v, 0.1)                                              # (B, M, D)
    found = ids >= 0
    photo = found.nonzero()[:, 0]                                                   # (K,)
    own = torch.tensor([*dict.fromkeys(ids[found].tolist())])       # those present, as they come
    region = torch.from_numpy(masks)[photo] == ids[found][:, None, None]            # (K, H, W)
    region = F.avg_pool2d(region.float()[:, None], 8).flatten(1)                    # (K, N)
    return {"pixels": torch.from_numpy(images), "v_g": v_g, "v": v, "t_g": t_g, "t": t,
            "g": g[found], "w": w[own], "a": a[found], "u": u[found],
            "ids": ids[found], "own": own, "photo": photo,
            "fills": region.mean(dim=1), "gets": (a[found] * region).sum(dim=1),
            "L_g": global_loss(v_g, t_g, log_scale.exp()),
            "L_l": concept_loss(u, ids, w, counts, 0.07)}


ROWS = {"pixels": "the photos", "v_g": "class tokens, of whole photos", "v": "patch tokens",
        "t_g": "caption embeddings", "t": "token embeddings",
        "g": "concepts found, each the sum of its token embeddings",
        "w": "class weights, one for each concept present",
        "a": "attention of each concept found over the patches of its photo",
        "u": "what each concept found pools from its photo"}


def numbers(tensor):
    first = tensor.flatten()[:3].tolist()
    return ", ".join(f"{x:.3f}" if tensor.is_floating_point() else str(x) for x in first)


def marked(caption):
    """The tokens of a caption with their positions."""
    ids = minimal.tokenizer(caption)[0]
    words = [minimal.tokenizer.decoder[int(id)].replace("</w>", "") for id in ids[1:ids.argmax()]]
    return " ".join(f"{word}<sub>{i}</sub>" for i, word in enumerate(["start", *words, "end"]))


def tensor_table(before, after):
    yield "| tensor | what | shape | its first numbers, before training | after |"
    yield "|---|---|---|---|---|"
    for name, what in ROWS.items():
        shape = tuple(before[name].shape)
        later = "the same" if before[name].equal(after[name]) else numbers(after[name])
        yield f"| {name} | {what} | {shape} | {numbers(before[name])} | {later} |"


def loss_table(before, after):
    chance = {"L_g": (f"log {BATCH}, the captions", math.log(BATCH)),
              "L_l": (f"log {len(before['w'])}, the concepts present", math.log(len(before["w"])))}
    yield "| loss | by chance | before training | after |"
    yield "|---|---|---|---|"
    for name, (what, value) in chance.items():
        yield f"| {name} | {value:.3f} = {what} | {before[name]:.3f} | {after[name]:.3f} |"


def attention_table(before, after):
    """What part of its attention a concept gives to its own region."""
    yield "| concept | photo | fills of it | attention on it, before training | after |"
    yield "|---|---|---|---|---|"
    for k, (photo, c) in enumerate(zip(before["photo"], before["ids"])):
        shares = " | ".join(f"{100 * share:.0f} %" for share in
                            (before["fills"][k], before["gets"][k], after["gets"][k]))
        yield f"| {minimal.bank[c]} | {photo} | {shares} |"


def cosine_table(tensors):
    """u_k . w_c: a row for each concept found, its own concept in bold."""
    yield "| photo, concept | " + " | ".join(minimal.bank[c] for c in tensors["own"]) + " |"
    yield "|---" * (len(tensors["own"]) + 1) + "|"
    for photo, u, own in zip(tensors["photo"], tensors["u"], tensors["ids"]):
        cells = [f"**{u @ w:.2f}**" if c == own else f"{u @ w:.2f}"
                 for c, w in zip(tensors["own"], tensors["w"])]
        yield f"| {photo}, {minimal.bank[own]} | " + " | ".join(cells) + " |"


def page(before, after, captions):
    """Lines of docs/one-batch.md."""
    K = len(before["u"])
    N = before["a"].shape[1]
    twice = minimal.bank[before["ids"].mode().values]
    logits = after["u"] @ after["w"].T / 0.07                                       # (K, K')
    right = (after["own"][logits.argmax(dim=1)] == after["ids"]).sum()
    chance = logits[0].softmax(dim=0)[0]
    first = minimal.bank[after["ids"][0]]
    yield f"""# One batch by hand

Printed by `python docs/one_batch.py`: four scenes, and every tensor of a training step on them.
The text encoder is that of `minimal.py`, untrained, and after {minimal.STEPS} steps; these four
were not among its training scenes. The [README](../README.md) has the formulas,
[method.md](method.md) explains them.

![The four scenes: photo, truth, prediction after training](one-batch.png)

## The captions

Each with the positions of its tokens. A concept is a word of the bank, or its plural.

| photo | caption | concepts, and the tokens [from, to) that name them |
|---|---|---|"""
    for b, caption in enumerate(captions):
        found = ", ".join(f"{minimal.bank[c]} [{start}, {end})"
                          for c, start, end in minimal.find(caption))
        yield f"| {b} | {marked(caption)} | {found} |"
    yield f"""
## The tensors

B = {BATCH} photos, N = {N} patches, width D = 128, T = {minimal.T} tokens, K = {K} concepts found,
{len(before["w"])} different ones: "{twice}" is found twice, and its class weight w is made of both.
Pixels, v_g and v do not change: vision is frozen.
"""
    yield from tensor_table(before, after)
    yield """
## Where the words look

Each concept spreads an attention of 100 % over the patches of its photo. Untrained, a region gets
what it fills of the photo, more or less; trained, a word looks at its own region:
"""
    yield from attention_table(before, after)
    yield """
## The losses
"""
    yield from loss_table(before, after)
    yield f"""
L_g asks which caption belongs to which photo. Untrained it is worse than chance: similarities are
random, and the scale, 1 / 0.07, makes them confident answers, most of them wrong. L_l asks which
concept a pooled region belongs to. Of "{first}" it is, after training, minus the log of the
softmax in its own column below, -log {chance:.2f} = {-chance.log():.2f}; the mean of all {K}
rows is L_l. The whole loss is L_g + 0.05 L_l.

## What L_l looks at

The cosines u_k . w_c; the logits of L_l are these, divided by 0.07. A row is one concept found,
its own column in bold. Untrained, what a word pools is hardly more than the mean of its photo, so
the rows of one photo are nearly alike:
"""
    yield from cosine_table(before)
    yield f"""
After training {right} of {K} rows are highest in their own column:
"""
    yield from cosine_table(after)
    yield """
"umbrellas" is another token than "umbrella", and rarer: rare tokens are learned last.
"""


def main():
    images, masks, captions = minimal.draw(BATCH, SEED)
    tensors = []
    for steps in (0, minimal.STEPS):
        torch.manual_seed(0)                        # both begin with the same random numbers
        with contextlib.redirect_stdout(sys.stderr):
            trained = minimal.train(steps)
        with torch.no_grad():
            tensors.append(compute(*trained, images, masks, captions))
    print("\n".join(page(*tensors, captions)).rstrip())
    found = minimal.segment(trained[0], images, minimal.bank)
    rows = zip(map(Image.fromarray, images), masks, found)
    comparison(rows, minimal.bank).save(Path(__file__).with_name("one-batch.png"))


if __name__ == "__main__":
    main()
