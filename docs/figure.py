"""The figure of the method: what each noun of a caption looks at, before and after training.

    python docs/figure.py docs/figure.png --checkpoint runs/toy         # a toy scene
    python docs/figure.py figure.png --checkpoint runs/simzss --photo photo.jpg \
        --caption "a cat on a red sofa" --parser en_core_web_sm

"Before" is the same frozen backbone with the text encoder that training starts from.
"""
import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))
from concepts import ConceptBank, Concepts
from machinery.errors import one_line_errors
from machinery.images import load_image, to_pixels
from machinery.networks.checkpoint import load_model
from machinery.scoring.pictures import HEAT, add_title, class_colours, grid, paint, to_ascii
from machinery.scoring.protocol import embed, training_run
from machinery.tokenizer import clean
from machinery.toy import TOY_CLASSES, toy_scene
from model import SimZSS, TextEncoder, similarity_pool
from segment import resize, segment_image, window_settings

SIDE = 200                                          # pixels of a panel's height
BARS = 5                                            # concepts in a list of scores
SCENE = (3, 282)                                    # seed of the toy scene


@torch.no_grad()
def look(model, pixels, names, bank):
    """What a model sees for each of M names: attention (M, h, w) over the photo, which adds up to
    1, and the cosines (M, C) of the region that it pools with the class weights of a bank.

    pixels: uint8 (3, H, W).
    """
    w = embed(model, [[name] for name in [*names, *bank]])[:, 0]                    # (M + C, D)
    query, weights = w.split([len(names), len(bank)])
    _, v, grid_size = model.backbone(model.backbone.normalise(pixels[None]))        # (1, N, D)
    temperature = model.settings.pool_temperature
    attention = (query @ v[0].T / temperature).softmax(dim=-1)                      # (M, N)
    u = similarity_pool(query[None], v, temperature)[0]                             # (M, D)
    return attention.unflatten(-1, grid_size).numpy(), (u @ weights.T).numpy()


def untrained(model):
    """The model with a text encoder that has learned nothing."""
    model = copy.deepcopy(model)
    model.checkpoint_file = {}                      # it is no longer that file's model
    torch.manual_seed(0)
    model.text = TextEncoder(model.backbone.width, **vars(model.settings.text))
    return model.eval()


# --------------------------------------------------------------------------------------------------
# Panels

def caption_line(caption, colours, width):
    """The caption on one line, with words in colours. colours: {(first, end) character: colour}."""
    font = ImageFont.load_default(size=20)
    line = Image.new("RGB", (width, 36), "white")
    x = 6
    for i, letter in enumerate(to_ascii(caption)):
        colour = next((tuple(map(int, colour)) for (first, end), colour in colours.items()
                       if first <= i < end), (60, 60, 60))
        ImageDraw.Draw(line).text((x, 18), letter, fill=colour, font=font, anchor="lm")
        x += font.getlength(letter)
    return line


def heat_map(photo, attention, most):
    """The photo in grey under the attention, from dark, none, to yellow, the most."""
    heat = 4 * attention / most
    colours = np.stack([np.interp(heat, range(5), channel) for channel in HEAT.T], axis=-1)
    colours = Image.fromarray(colours.astype(np.uint8)).resize(photo.size, Image.BILINEAR)
    return Image.blend(photo.convert("L").convert("RGB"), colours, 0.7)


def bars(scores, bank, own, width):
    """The highest cosines with concepts of the bank as bars, the right one in green."""
    panel = Image.new("RGB", (width, 26 * BARS), "white")
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default(size=14)
    for line, c in enumerate(np.argsort(-scores)[:BARS]):
        y = 26 * line + 12
        colour = "#8cc88c" if c == own else "#dddddd"
        draw.rectangle((0, y - 11, width * max(scores[c], 0), y + 11), fill=colour)
        draw.text((6, y), f"{to_ascii(bank[c])} {scores[c]:.2f}", "black", font, anchor="lm")
    return panel


def figure(model, image, caption, names, bank):
    """The picture. names: of concepts, as they stand in the caption. bank: names to compare with.
    """
    colours = class_colours(names)
    photo = image.resize((round(image.width * SIDE / image.height), SIDE), Image.BICUBIC)
    pixels = resize(to_pixels(image), training_run(model).get("image_size", 224))
    mask, _ = segment_image(model, image, embed(model, [[name] for name in names]),
                            **window_settings(model.protocol))
    painted = paint(image, mask.numpy(), names, 0.7).resize(photo.size, Image.NEAREST)
    before, _ = look(untrained(model), pixels, names, bank)
    after, cosines = look(model, pixels, names, bank)
    rows = [[add_title(photo, "the photo")], [add_title(painted, "its mask, after training")],
            [Image.new("RGB", (1, 1), "white")]]
    for name, first, last, scores in zip(names, before, after, cosines):
        most = max(first.max(), last.max())
        rows[0].append(add_title(heat_map(photo, first, most), f'"{name}" untrained'))
        rows[1].append(add_title(heat_map(photo, last, most), f'"{name}" trained'))
        best = bars(scores, bank, bank.index(name), photo.width)
        rows[2].append(add_title(best, "its region is most like"))
    body = grid(rows, gap=8)
    places = {(caption.find(name), caption.find(name) + len(name)): colour
              for name, colour in zip(names, colours) if name in caption}
    return grid([[caption_line(caption, places, body.width)], [body]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("picture", help="PNG file to write")
    add("--checkpoint", required=True, help="of SimZSS")
    add("--photo", help="(default: a toy scene)")
    add("--caption", help="of the photo")
    add("--parser", default="match", help="spaCy pipeline (default: the built-in matcher)")
    args = parser.parse_args()
    with one_line_errors("take a smaller photo"):
        model = load_model(args.checkpoint)
        if not isinstance(model, SimZSS):
            raise ValueError(f"{args.checkpoint} is of {model.name}; expected SimZSS")
        if bool(args.photo) != bool(args.caption):
            raise ValueError("--photo and --caption belong together")
        if args.photo:
            image, caption, bank = load_image(args.photo), clean(args.caption), model.bank
        else:
            pixels, _, caption = toy_scene(np.random.default_rng(SCENE))
            image, bank = Image.fromarray(pixels), [name for [name] in TOY_CLASSES]
        concepts = Concepts(ConceptBank(bank), args.parser).in_captions([caption])[0]
        if not concepts:
            raise ValueError(f"no concept of the checkpoint's bank in the caption {caption!r}")
        names = list(dict.fromkeys(bank[c] for c, _, _ in concepts))
        figure(model, image, caption, names, bank).save(args.picture)


if __name__ == "__main__":
    main()
