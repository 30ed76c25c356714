"""Segment any photo with any words.

    python segment.py photo.jpg --classes "cat, sofa, potted plant"

writes photo_mask.png (an index per pixel, at the photo's own size), photo_overlay.png (with a legend of the classes
found) and photo.json. `segment_image` is the one way from a photo to a mask, here and in eval.py: the photo is resized
to a short side of 448, a window of 448 pixels slides over it in steps of 224, each window's patch tokens are compared
with the class embeddings, the similarities are enlarged to pixels, averaged where windows overlap, and enlarged to the
photo's size; the most similar class wins.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from concepts import CLASSES, check_classes, read_classes
from data import load_image, to_pixels
from model import load_model

LONG_SIDE = 2048                                    # the field's bound on very elongated images
PROTOCOL = {"templates": "imagenet80", "class_embedding": "caption", "short_side": 448, "window": 448, "stride": 224}
SLIDING = ("short_side", "window", "stride")        # what of a protocol `segment_image` needs
CHUNK = 2 ** 26                                     # values enlarged to the photo's size at a time (256 MB of float32)


# ---------------------------------------------------------------------------------------------------------------------
# From a photo to a mask

def resized_size(height, width, short_side):
    """The field's resize rule: short side as asked for, long side at most 2048, rounded half up. -> (height, width)"""
    scale = min(LONG_SIDE / max(height, width), short_side / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize(pixels, height, width):
    """uint8 (3, H, W) -> uint8 (3, height, width), bilinear without anti-aliasing, as OpenCV does it for the field."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    enlarged = F.interpolate(pixels[None].float(), (height, width), mode="bilinear", align_corners=False)[0]
    return (enlarged + 0.5).floor().clamp(0, 255).to(torch.uint8)


def window_starts(length, window, stride):
    """Where windows begin along one axis; the last is shifted back to end with the image, never padded."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, length) - window, 0) for i in range(count)]


@torch.no_grad()
def segment_image(model, image, class_embeddings, window=448, stride=224, short_side=448, batch=8):
    """Name every pixel of one photo.

    model: anything with `patch_scores`, like SimZSS. image: RGB PIL image or uint8 (H, W, 3) array.
    class_embeddings: (C, D) or (C, S, D). window, stride, short_side: pixels. batch: windows at a time.
    Returns (index mask (H, W), score (H, W) float32): the best class and its cosine similarity, CPU tensors.
    """
    if min(short_side, batch) < 1 or not 0 < stride <= window:
        raise ValueError(f"short_side {short_side}, window {window}, stride {stride}, batch {batch}: expected positive "
                         "numbers, and a stride of at most the window, or pixels would be left out")
    device = class_embeddings.device
    pixels = to_pixels(image)                                                           # (3, H, W)
    H, W = pixels.shape[-2:]
    pixels = resize(pixels.to(device), *resized_size(H, W, short_side))
    h, w = pixels.shape[-2:]
    tops, lefts = window_starts(h, window, stride), window_starts(w, window, stride)
    corners = [(top, left) for top in tops for left in lefts]
    total = torch.zeros(len(class_embeddings), h, w, device=device)                     # (C, h, w)
    count = torch.zeros(h, w, device=device)
    for i in range(0, len(corners), batch):
        crops = torch.stack([pixels[:, y:y + window, x:x + window] for y, x in corners[i:i + batch]])
        ch, cw = crops.shape[-2:]
        scores, covered = model.patch_scores(crops, class_embeddings)                   # (windows, C, rows, columns)
        for (y, x), score in zip(corners[i:i + batch], scores):
            score = F.interpolate(score[None], covered, mode="bilinear", align_corners=False)[0]
            total[:, y:y + ch, x:x + cw] += score[:, :ch, :cw]                          # what was padding falls off
            count[y:y + ch, x:x + cw] += 1
    total /= count

    best = torch.full((H, W), -torch.inf, device=device)
    mask = torch.zeros((H, W), dtype=torch.uint8 if len(total) <= 256 else torch.int16, device=device)
    step = max(1, CHUNK // (H * W))                 # a few classes at a time: never classes x height x width at full size
    for first in range(0, len(total), step):
        score = F.interpolate(total[None, first:first + step], (H, W), mode="bilinear", align_corners=False)[0]
        score, index = score.max(dim=0)
        better = score > best
        best[better] = score[better]
        mask[better] = (index[better] + first).to(mask.dtype)
    return mask.cpu(), best.cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def palette(count):
    """count RGB colours, (count, 3) uint8: the bits of the index, spread over the channels as in Pascal VOC."""
    index = np.arange(1, count + 1)
    colours = np.zeros((count, 3), int)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def overlay(image, mask, names, opacity=0.6):
    """The photo under its mask, with a legend of the classes present, the largest first, on the right.

    image: RGB PIL image (W, H). mask: (H, W) int, values that are no class stay uncoloured. names: C names.
    """
    mask, colours = np.asarray(mask), palette(len(names))
    photo = np.asarray(image)
    named = mask < len(names)
    painted = photo.copy()
    painted[named] = (opacity * colours[mask[named]] + (1 - opacity) * photo[named]).astype(np.uint8)
    share = np.bincount(mask[named], minlength=len(names)) / mask.size
    lines = [(colours[i], f"{names[i]} {share[i]:.1%}") for i in np.argsort(-share, kind="stable") if share[i] > 0]

    H, W = mask.shape
    size = int(np.clip(max(H, W) / 32, 10, 64))
    font = ImageFont.load_default(size=size)
    columns = -(-len(lines) // max(1, H // (2 * size)))                                 # as many as the height asks for
    rows = -(-len(lines) // max(1, columns))
    width = int(max((font.getlength(text) for _, text in lines), default=0)) + 3 * size
    canvas = Image.new("RGB", (W + columns * width, max(H, 2 * size)), "white")
    canvas.paste(Image.fromarray(painted))
    draw = ImageDraw.Draw(canvas)
    for i, (colour, text) in enumerate(lines):
        x, y = W + i // rows * width + size // 2, i % rows * 2 * size + size // 2
        draw.rectangle((x, y, x + size, y + size), fill=tuple(map(int, colour)), outline="black")
        draw.text((x + 1.5 * size, y + size / 2), text, fill="black", font=font, anchor="lm")
    return canvas


def save_mask(path, mask, count):
    """Index mask as PNG: palette colours up to 256 classes, 16-bit grey beyond."""
    if count > 256:
        Image.fromarray(np.asarray(mask).astype(np.uint16)).save(path)
    else:
        picture = Image.fromarray(np.asarray(mask).astype(np.uint8))
        picture.putpalette(palette(count).tobytes())
        picture.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# The command line; what it shares with eval.py comes first

def pick_device(name):
    """"auto" -> the best device there is. Raises ValueError for one that is not."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, there in found.items() if there)
    if not found[name]:
        raise ValueError(f"--device {name}: there is no such device here; use auto or cpu")
    return name


def read_templates(name):
    """Prompt templates by the name of a file in classes/templates/, or of any file: one per line, with one {} each."""
    path = CLASSES / "templates" / f"{name}.txt"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        known = sorted(p.stem for p in (CLASSES / "templates").glob("*.txt"))
        raise FileNotFoundError(f"no templates {name!r}; expected {', '.join(known)}, or a file with one per line")
    templates = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"{path}: expected one template per line, each with one {{}} for the class name")
    return templates


def newest_model():
    models = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not models:
        raise FileNotFoundError("no trained model under runs/; run train.py first or name one with --checkpoint")
    return models[-1]


def add_model_args(parser):
    parser.add_argument("--checkpoint", help="model file or folder (default: the newest under runs/)")
    parser.add_argument("--backbone-weights", help="local file with the backbone's weights, if not where training had it")
    parser.add_argument("--templates", help="prompt templates: imagenet80, simple7, plain or a file (default: the "
                                            "checkpoint's; imagenet80 unless trained on the toy world)")
    parser.add_argument("--class-embedding", choices=["caption", "concept"],
                        help="embed a class by its prompt's end token or by its name's tokens (default: the checkpoint's)")
    for name, what in (("short-side", "pixels of the resized photo's short side"), ("window", "pixels of the sliding "
                       "window"), ("stride", "pixels from one window to the next")):
        parser.add_argument(f"--{name}", type=int, help=f"{what} (default: the checkpoint's, 448 / 448 / 224 for photos)")
    parser.add_argument("--batch", type=int, default=8, help="windows at a time (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def open_model(args):
    """The model named by the command line, and its protocol: templates, short side, window and stride."""
    torch.manual_seed(args.seed)
    model = load_model(args.checkpoint or newest_model(), pick_device(args.device), args.backbone_weights)
    if model.config["backbone"]["weights"] == "random":
        print("warning: this model's backbone has random weights; its masks mean nothing", file=sys.stderr)
    protocol = {**PROTOCOL, **model.config["training"].get("protocol", {})}
    for key in protocol:
        given = getattr(args, key)
        protocol[key] = protocol[key] if given is None else given
    return model, protocol


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Segment photos with the classes that you name.")
    parser.add_argument("photos", nargs="+", help="image files")
    parser.add_argument("--classes", required=True, help='names separated by commas, "cat, sofa", or a file with one '
                                                         "class per line, synonyms after commas")
    parser.add_argument("--output", default=".", help="folder to write to (default: the current one)")
    add_model_args(parser)
    return parser.parse_args(argv)


def segment_file(model, protocol, photo, classes, embeddings, output, batch):
    """Segment one photo file and write its mask, overlay and JSON. Returns the JSON's content."""
    image = load_image(photo)
    mask, score = segment_image(model, image, embeddings, batch=batch, **{key: protocol[key] for key in SLIDING})
    names = [synonyms[0] for synonyms in classes]
    share = np.bincount(mask.flatten().numpy(), minlength=len(names)) / mask.numel()
    found = [{"index": i, "name": names[i], "share": round(float(share[i]), 6), "colour": colour,
              "score": round(float(score[mask == i].mean()), 4)}
             for i, colour in enumerate(palette(len(names)).tolist()) if share[i] > 0]
    stem = Path(output) / Path(photo).stem
    files = {"mask": f"{stem}_mask.png", "overlay": f"{stem}_overlay.png"}
    save_mask(files["mask"], mask, len(names))
    overlay(image, mask, names).save(files["overlay"])
    result = {"photo": str(photo), "width": image.width, "height": image.height, "classes": classes, "found": found,
              **files, "protocol": protocol, "backbone": model.config["backbone"]}
    Path(f"{stem}.json").write_text(json.dumps(result, indent=1))
    return result


def main(argv=None):
    args = parse_args(argv)
    try:
        if os.path.isfile(args.classes):        # false for a long list of names, where pathlib raises
            classes = read_classes(args.classes)
        else:
            classes = check_classes([[name.strip()] for name in args.classes.split(",")], "--classes")
        if len({Path(photo).stem for photo in args.photos}) < len(args.photos):
            raise ValueError("two photos have the same name, their masks would too; segment them into different --output")
        model, protocol = open_model(args)
        embeddings = model.embed_classes(classes, read_templates(protocol["templates"]), protocol["class_embedding"])
        Path(args.output).mkdir(parents=True, exist_ok=True)
        for photo in tqdm(args.photos, unit=" photos", disable=len(args.photos) == 1 or None):
            result = segment_file(model, protocol, photo, classes, embeddings, args.output, args.batch)
            tqdm.write(f"{result['overlay']}: " + ", ".join(
                f"{c['name']} {c['share']:.1%}" for c in sorted(result["found"], key=lambda c: -c["share"])))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
