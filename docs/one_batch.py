"""One batch by hand: every tensor of SimZSS for four drawn scenes, before and after training.

    python docs/one_batch.py > docs/one-batch.md        # about a minute

The text encoder is that of minimal.py; the formulas are model.py's functions.
"""
import contextlib
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import minimal
from model import class_weights, concept_embeddings, concept_loss, global_loss, similarity_pool

BATCH, SEED = 4, 188        # scenes that are neither trained on nor scored; one word occurs twice


def read_batch(captions):
    """Concepts (B, M, 3) of (bank id, first token, end token), padded with -1, as in model.py."""
    found = [torch.tensor(minimal.find(caption)) for caption in captions]
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)


def compute(tower, log_scale, images, captions):
    """Every tensor of a step, by the letter that docs/method.md gives it."""
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
    return {"pixels": torch.from_numpy(images), "v_g": v_g, "v": v, "t_g": t_g, "t": t,
            "g": g[found], "w": w[counts > 0], "a": a[found], "u": u[found],
            "ids": ids[found], "present": counts.nonzero()[:, 0],
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


def cosine_table(tensors):
    """u_k . w_c: one row for each concept found, its own concept in bold."""
    names = [minimal.bank[c] for c in tensors["present"]]
    yield "| pooled for | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for u, own in zip(tensors["u"], tensors["ids"]):
        cells = [f"**{u @ w:.2f}**" if c == own else f"{u @ w:.2f}"
                 for c, w in zip(tensors["present"], tensors["w"])]
        yield f"| {minimal.bank[own]} | " + " | ".join(cells) + " |"


def page(before, after, captions):
    """Lines of docs/one-batch.md."""
    K = len(before["u"])
    N = before["a"].shape[1]
    best = after["present"][(after["u"] @ after["w"].T).argmax(dim=1)]
    right = (best == after["ids"]).sum()
    road = minimal.bank[before["ids"].mode().values]
    yield f"""# One batch by hand

Printed by `python docs/one_batch.py`: four drawn scenes, and every tensor of a training step on
them. The text encoder is that of `minimal.py`, before its first step and after {minimal.STEPS}
steps on other scenes. The formulas are on the [front page](../README.md), explained in
[method.md](method.md).

## The captions

Each with the positions of its tokens. A concept is a word of the bank, or its plural.

| photo | caption | concepts: [first token, end token) |
|---|---|---|"""
    for b, caption in enumerate(captions):
        found = ", ".join(f"{minimal.bank[c]} [{first}, {end})"
                          for c, first, end in minimal.find(caption))
        yield f"| {b} | {marked(caption)} | {found} |"
    yield f"""
## The tensors

B = {BATCH} photos, N = {N} patches, width D = 128, T = {minimal.T} tokens, K = {K} concepts found,
{len(before["w"])} different ones: "{road}" is found twice, and its class weight w is made of both.
Pixels, v_g and v do not change: vision is frozen.
"""
    yield from tensor_table(before, after)
    yield f"""
Attention that prefers no patch has 1 / N = {1 / N:.3f} everywhere. The largest of each concept is
{before["a"].amax(1).min():.3f} to {before["a"].amax(1).max():.3f} before training, and
{after["a"].amax(1).min():.3f} to {after["a"].amax(1).max():.3f} after it: a word sees its region.

## The losses
"""
    yield from loss_table(before, after)
    yield """
L_g asks which caption belongs to which photo; L_l, which concept a pooled region belongs to.

## What L_l looks at

The cosines u_k . w_c; a row is one concept found, its own column in bold. Before training, what a
word pools is hardly more than the mean of its photo. So the rows of one photo are nearly alike:
"""
    yield from cosine_table(before)
    yield f"""
After training {right} of {K} rows are highest in their own column. A rare word, such as a plural, which
is a token of its own, takes longest:
"""
    yield from cosine_table(after)


def main():
    images, _, captions = minimal.draw(BATCH, SEED)
    tensors = []
    for steps in (0, minimal.STEPS):
        torch.manual_seed(0)                        # both begin with the same random numbers
        with contextlib.redirect_stdout(sys.stderr):
            trained = minimal.train(steps)
        with torch.no_grad():
            tensors.append(compute(*trained, images, captions))
    print("\n".join(page(*tensors, captions)))


if __name__ == "__main__":
    main()
