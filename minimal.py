"""SimZSS on one screen: photos with captions in, masks of any word out. Run it: python minimal.py

A frozen vision backbone gives a vector v_n of each patch of a photo, and v_g of the whole. Only a
text encoder learns, from photos with captions, to put words among these vectors. It ends near 79 %
mIoU, L_g near 2.4 (by chance log 64 = 4.2; many captions fit a photo), L_l near 0.1 (log 18 = 2.9).
B photos, N patches, T tokens, D width, K concepts found in the batch, C concepts in the bank.
Left out: photo files, crops (data.py), parsed captions (concepts.py), real backbones (model.py),
many GPUs, resuming (train.py), windows over large photos (segment.py), benchmarks (eval.py)."""
import numpy as np
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer

from eval import confusion_matrix, scores
from machinery.toy import PLURALS, TOY_CLASSES, ToyTrunk, toy_scene

STEPS, BATCH, SCENES, T = 200, 64, 2000, 32
bank = [name for [name] in TOY_CLASSES]             # the C concepts that training knows
known = {word: c for c, name in enumerate(bank) for word in (name, PLURALS.get(name, name + "s"))}
tokenizer = SimpleTokenizer(context_length=T)
trunk = ToyTrunk()                                  # made by hand: nothing in it was ever learned


def draw(count, seed):
    """Images (B, 128, 128, 3) uint8, masks (B, 128, 128) for scoring, and B captions."""
    scenes = [toy_scene(np.random.default_rng((seed, i))) for i in range(count)]
    return [np.stack(part) for part in zip(*scenes)]


@torch.no_grad()
def see(images):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1       # (B, 3, 128, 128)
    tokens = F.normalize(trunk.forward_features(pixels), dim=-1)                    # (B, 1 + N, D)
    return tokens[:, 0], tokens[:, 1:]                                              # v_g, v


def find(caption):
    """The concepts that a caption names: [(c, from token, to token)]; token 0 says "start"."""
    words = caption.replace(",", " ,").split()
    edges = np.cumsum([1] + [len(tokenizer.encode(word)) for word in words])
    return [(known[word], edges[i], edges[i + 1]) for i, word in enumerate(words) if word in known]


def read(tower, captions):
    ids = tokenizer(list(captions))                     # (B, T); the end token has the highest id
    x = tower.token_embedding(ids) + tower.positional_embedding                     # (B, T, width)
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
    t = F.normalize(x @ tower.text_projection, dim=-1)                              # (B, T, D)
    return t[torch.arange(len(t)), ids.argmax(dim=1)], t    # t_g (B, D): at the end token; and t


def losses(tower, log_scale, v_g, v, captions):
    t_g, t = read(tower, captions)
    # Global: every photo must find its caption in the batch, and every caption its photo
    logits = log_scale.exp() * v_g @ t_g.T                                          # (B, B)
    L_g = sum(F.cross_entropy(rows, torch.arange(len(rows))) for rows in (logits, logits.T)) / 2
    # Local: u, the mean of the patches most similar to a concept, must be classified as this one
    found = [(b, *concept) for b, caption in enumerate(captions) for concept in find(caption)]
    photo, c = torch.tensor([(b, c) for b, c, _, _ in found]).T                     # (K,), (K,)
    g = torch.stack([t[b, first:end].sum(0) for b, _, first, end in found])         # (K, D)
    w = F.normalize(torch.zeros(len(bank), g.shape[1]).index_add(0, c, g), dim=-1)  # (C, D)
    attention = (v[photo] @ w[c, :, None] / 0.1).softmax(dim=1)                     # (K, N, 1)
    u = F.normalize((attention * v[photo]).sum(1), dim=-1)                          # (K, D)
    absent = torch.bincount(c, minlength=len(bank)) == 0                            # (C,)
    return L_g, F.cross_entropy((u @ w.T / 0.07).masked_fill(absent, -torch.inf), c)


def train(steps=STEPS):
    images, _, captions = draw(SCENES, seed=0)
    v_g, v = see(images)                                # frozen: once is enough
    tower = TextTransformer(T, width=256, heads=4, layers=1, output_dim=v.shape[-1])
    log_scale = torch.nn.Parameter(torch.tensor(1 / 0.07).log())        # its first value, as CLIP's
    optimizer = torch.optim.AdamW([*tower.parameters(), log_scale], lr=1e-3)
    for step in range(steps):
        rows = torch.randint(SCENES, (BATCH,))
        L_g, L_l = losses(tower, log_scale, v_g[rows], v[rows], [captions[i] for i in rows])
        optimizer.zero_grad()
        (L_g + 0.05 * L_l).backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:3}   L_g {L_g:.3f}   L_l {L_l:.3f}")
    return tower, log_scale


@torch.no_grad()
def segment(tower, images, words):
    """Masks (B, 128, 128): for each pixel, the number of the word that is most like its patch."""
    _, t = read(tower, [f"a photo of a {word}" for word in words])      # tokens 0..4, then the word
    w = torch.stack([t[i, 5:5 + len(tokenizer.encode(words[i]))].sum(0) for i in range(len(words))])
    score = F.normalize(w, dim=-1) @ see(images)[1].transpose(1, 2)                 # (B, C, N)
    return F.interpolate(score.unflatten(2, (16, 16)), scale_factor=8, mode="bilinear").argmax(1)


if __name__ == "__main__":
    torch.manual_seed(0)
    tower, _ = train()
    images, truth, _ = draw(100, seed=1)                # never seen
    matrix = confusion_matrix(segment(tower, images, bank), truth, len(bank))
    print(f"mIoU {scores(matrix)['mIoU']:.1%} of {len(bank)} classes")
