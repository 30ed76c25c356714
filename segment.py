"""Segment any photo with any words.

    python segment.py photo.jpg --classes "cat, sofa, potted plant"

writes photo_mask.png (an index per pixel, at the photo's own size), photo_overlay.png (with a legend of the classes
found) and photo.json. `segment_image` is the one way from a photo to a mask, here and in eval.py: the photo is resized
to a short side of 448, a window of 448 pixels slides over it in steps of 224, each window's patch tokens are compared
with the class embeddings, the similarities are enlarged to pixels, averaged where windows overlap, and enlarged to the
photo's size; the most similar class wins.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from machinery.checkpoint import newest_model
from machinery.classes import check_classes, read_classes, read_templates
from machinery.images import load_image, to_pixels
from machinery.parallel import pick_device
from machinery.pictures import count_pixels, grid, overlay, palette, row_bands, save_mask, titled
from model import load_model

LONG_SIDE = 2048                                    # the field's bound on very elongated images
PROTOCOL = {"templates": "imagenet80", "class_embedding": "caption", "short_side": 448, "window": 448, "stride": 224}
SLIDING = ("short_side", "window", "stride")        # what of a protocol `segment_image` needs


# ---------------------------------------------------------------------------------------------------------------------
# From a photo to a mask

def resized_size(height, width, short_side, long_side=LONG_SIDE):
    """The field's resize rule: short side as asked for, long side at most that, rounded half up. -> (height, width)"""
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def enlarge(maps, height, width, first=0, last=None):
    """Rows first..last of maps (C, h, w) resized bilinearly to (C, height, width), float32, without anti-aliasing.

    All rows together are `F.interpolate(..., align_corners=False)`; a few at a time need little memory.
    """
    h, last = maps.shape[-2], height if last is None else last
    position = ((torch.arange(first, last, device=maps.device) + 0.5) * (h / height) - 0.5).clamp(0, h - 1)
    top, bottom = int(position[0]), min(int(position[-1]) + 2, h)                       # the rows of maps that it takes
    maps = F.interpolate(maps[None, :, top:bottom].float(), (bottom - top, width), mode="bilinear")[0]
    distance = (position[:, None] - torch.arange(top, bottom, device=maps.device)).abs()
    return (1 - distance).clamp(min=0) @ maps                                           # (C, last - first, width)


def resize(pixels, height, width):
    """uint8 (3, H, W) -> uint8 (3, height, width), bilinear without anti-aliasing, as OpenCV does it for the field."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    bands = [enlarge(pixels, height, width, i, min(i + 32, height)) for i in range(0, height, 32)]
    return (torch.cat(bands, dim=1) + 0.5).floor().clamp(0, 255).to(torch.uint8)


def window_starts(length, window, stride):
    """Where windows begin along one axis; the last is shifted back to end with the image, never padded."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, length) - window, 0) for i in range(count)]


def score_maps(model, image, class_embeddings, window=448, stride=224, short_side=448, batch=8):
    """Similarity of every class at every pixel of the resized photo, averaged where windows overlap: (C, h, w).

    Arguments: see `segment_image`. Where a GPU's memory does not hold batch windows, half as many are tried, for this
    model also from then on.
    """
    if min(short_side, batch) < 1 or not 0 < stride <= window:
        raise ValueError(f"short_side {short_side}, window {window}, stride {stride}, batch {batch}: expected positive "
                         "numbers, and a stride of at most the window, or pixels would be left out")
    pixels = to_pixels(image)                                                           # (3, H, W)
    pixels = resize(pixels, *resized_size(*pixels.shape[-2:], short_side)).to(class_embeddings.device)
    h, w = pixels.shape[-2:]
    corners = [(y, x) for y in window_starts(h, window, stride) for x in window_starts(w, window, stride)]
    total = torch.zeros(len(class_embeddings), h, w, device=pixels.device)              # (C, h, w)
    count = torch.zeros(h, w, device=pixels.device)
    batch = min(batch, getattr(model, "most_windows", batch))
    while corners:
        crops = torch.stack([pixels[:, y:y + window, x:x + window] for y, x in corners[:batch]])
        try:
            scores, covered = model.patch_scores(crops, class_embeddings)               # (windows, C, rows, columns)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch = model.most_windows = batch // 2
            tqdm.write(f"the GPU's memory is full; going on with {batch} windows at a time (--batch)", file=sys.stderr)
            continue
        ch, cw = crops.shape[-2:]
        for (y, x), score in zip(corners[:batch], scores):
            score = F.interpolate(score[None], covered, mode="bilinear", align_corners=False)[0]
            total[:, y:y + ch, x:x + cw] += score[:, :ch, :cw]                          # what was padding falls off
            count[y:y + ch, x:x + cw] += 1
        corners = corners[batch:]
    return total.div_(count)


@torch.no_grad()
def segment_image(model, image, class_embeddings, window=448, stride=224, short_side=448, batch=8):
    """Name every pixel of one photo.

    model: anything with `patch_scores`, like SimZSS. image: RGB PIL image or uint8 (H, W, 3) array.
    class_embeddings: (C, D) or (C, S, D). window, stride, short_side: pixels. batch: windows at a time.
    Returns (index mask (H, W), score (H, W) float32): the best class and its cosine similarity, CPU tensors.
    """
    W, H = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    maps = score_maps(model, image, class_embeddings, window, stride, short_side, batch)            # (C, h, w)
    score = torch.empty(H, W)
    mask = torch.empty(H, W, dtype=torch.uint8 if len(maps) <= 256 else torch.int16)
    for band in row_bands(H, len(maps) * W):        # never classes x height x width at the photo's size
        score[band], mask[band] = enlarge(maps, H, W, band.start, band.stop).max(dim=0)
    return mask, score


def parse_background(text):
    """"none", "threshold:0.2" or "prompt:sky, wall" -> (kind, None, number or list of words)."""
    kind, _, value = text.partition(":")
    if kind == "none" and not value:
        return kind, None
    if kind == "threshold":
        with contextlib.suppress(ValueError):
            return kind, float(value)
    words = [word.strip() for word in value.split(",") if word.strip()]
    if kind == "prompt" and words:
        return kind, words
    raise ValueError(f'background {text!r}: expected none, threshold:T with a cosine similarity T, or prompt:"word, word"')


def put_background(mask, score, threshold, index=0):
    """Insert a class at index: pixels whose score does not exceed threshold become it, later classes move up by one."""
    mask = mask.to(torch.int16)
    return torch.where(score > threshold, mask + (mask >= index), index)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@torch.no_grad()
def similarity_view(model, image, names, class_embeddings, **sliding):
    """A heat map per class name: where the photo resembles it, each from its lowest (dark) to its highest (yellow)."""
    maps = score_maps(model, image, class_embeddings, **sliding).cpu().numpy()          # (C, h, w)
    heat = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])
    photo = image.resize(maps.shape[:0:-1], Image.BICUBIC)
    panels = [titled(photo, "photo")]
    for name, similarity in zip(names, maps):
        low, high = similarity.min(), similarity.max()
        place = 4 * (similarity - low) / max(high - low, 1e-6)
        colours = np.stack([np.interp(place, range(5), channel) for channel in heat.T], axis=-1)
        panel = Image.blend(photo.convert("L").convert("RGB"), Image.fromarray(colours.astype(np.uint8)), 0.75)
        panels.append(titled(panel, f"{name}   {low:.2f} to {high:.2f}"))
    columns = min(4, max(1, 2000 // photo.width))
    return grid([panels[i:i + columns] for i in range(0, len(panels), columns)])


@torch.no_grad()
def pca_view(model, image, names, class_embeddings, size, scales=(1, 2, 4, 8)):
    """Patch tokens and class embeddings in one space of three colours, the axes in which patch tokens differ most.

    size: pixels of the short side in training; the photo is seen whole at each of its multiples. A class of several
    names shows the first.
    """
    words = class_embeddings if class_embeddings.ndim == 2 else class_embeddings[:, 0]              # (C, D)
    axes = torch.eye(words.shape[-1], device=words.device)          # similarity to unit axes = the patch token itself
    grids = []
    for scale in scales:
        pixels = to_pixels(image)
        pixels = resize(pixels, *resized_size(*pixels.shape[-2:], scale * size, long_side=math.inf)).to(words.device)
        grids.append(model.patch_scores(pixels[None], axes)[0][0].permute(1, 2, 0))                 # (h, w, D)
    tokens = [grid.flatten(0, 1) for grid in grids]
    mean = torch.stack([t.mean(dim=0) for t in tokens]).mean(dim=0)                     # each scale counts alike
    spread = sum((t - mean).T @ (t - mean) / len(t) for t in tokens)                    # (D, D)
    basis = torch.linalg.eigh(spread.cpu())[1][:, -3:].flip(-1).to(mean)                # (D, 3)
    low, high = ((tokens[0] - mean) @ basis).quantile(torch.tensor([0.02, 0.98]).to(mean), dim=0)

    def colour(x):
        return (((x - mean) @ basis - low) / (high - low).clamp(min=1e-3) * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()

    height = 448
    shape = (max(1, round(image.width * height / image.height)), height)
    panels = [titled(image.resize(shape, Image.BICUBIC), "photo")]
    panels += [titled(Image.fromarray(colour(g)).resize(shape, Image.NEAREST), f"{scale} x {size} pixels, {len(g)} x "
                      f"{len(g[0])} patches") for g, scale in zip(grids, scales)]
    legend = [titled(Image.new("RGB", (shape[0], 4), tuple(c)), name, c)
              for name, c in zip(names, colour(words).tolist())]
    return grid([panels] + [legend[i:i + len(panels)] for i in range(0, len(legend), len(panels))])


# ---------------------------------------------------------------------------------------------------------------------
# The command line; what it shares with eval.py comes first


def add_model_args(parser):
    parser.add_argument("--checkpoint", help="model file or folder (default: the newest under runs/)")
    parser.add_argument("--backbone", help="timm name of the backbone in an authors' checkpoint, if its tensors do not tell")
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
    path = Path(args.checkpoint or newest_model())
    model = load_model(path, pick_device(args.device), args.backbone_weights, args.backbone)
    path = path / "model.safetensors" if path.is_dir() else path
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2 ** 24):
            digest.update(block)
    model.checkpoint = {"checkpoint": str(path), "checkpoint_sha256": digest.hexdigest()}
    if model.config["backbone"]["weights"] == "random":
        print("warning: this model's backbone has random weights; its masks mean nothing", file=sys.stderr)
    protocol = {**PROTOCOL, **model.config["training"].get("protocol", {})}
    for key in protocol:
        given = getattr(args, key)
        protocol[key] = protocol[key] if given is None else given
    return model, protocol


def embed(model, classes, protocol):
    """Class embeddings (C, S, D) by the protocol, kept beside the checkpoint under a name made of all they depend on."""
    templates = read_templates(protocol["templates"])
    if not hasattr(model, "checkpoint"):            # no file to tell it by
        return model.embed_classes(classes, templates, protocol["class_embedding"])
    device = next(model.parameters()).device
    code = hashlib.sha256(Path(__file__).with_name("model.py").read_bytes()).hexdigest()
    content = [code, classes, templates, protocol["class_embedding"], model.checkpoint["checkpoint_sha256"], device.type]
    name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    path = Path(model.checkpoint["checkpoint"]).parent / "embeddings" / f"{name}.safetensors"
    with contextlib.suppress(OSError, safetensors.SafetensorError, KeyError):           # none yet, or a broken one
        return safetensors.torch.load_file(path, str(device))["embeddings"]
    embeddings = model.embed_classes(classes, templates, protocol["class_embedding"])
    with contextlib.suppress(OSError, safetensors.SafetensorError):                     # a folder that is not ours
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{name}.{os.getpid()}.partial")
        safetensors.torch.save_file({"embeddings": embeddings.contiguous()}, partial)
        os.replace(partial, path)
    return embeddings


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Segment photos with the classes that you name.")
    parser.add_argument("photos", nargs="+", help="image files")
    parser.add_argument("--classes", required=True, help='names separated by commas, "cat, sofa", or a file with one '
                                                         "class per line, synonyms after commas")
    parser.add_argument("--background", default="none", help='what is none of the classes: threshold:T = all pixels whose '
                        'cosine similarity to every class is at most T, prompt:"word, word" = what these words win, or none '
                        "(default: %(default)s)")
    parser.add_argument("--view", action="append", default=[], choices=["similarity", "pca"], help="also draw a heat map "
                        "per class, or patch tokens and classes in one space of colours; may be repeated")
    parser.add_argument("--output", default=".", help="folder to write to (default: the current one)")
    add_model_args(parser)
    return parser.parse_args(argv)


def segment_file(model, protocol, photo, classes, embeddings, output, batch, views=()):
    """Segment one photo file and write its mask, overlay, views and JSON. Returns the JSON's content."""
    image, names, (kind, value) = load_image(photo), [c[0] for c in classes], parse_background(protocol["background"])
    names[:1] = ["background"] if kind == "prompt" else names[:1]
    sliding = {**{key: protocol[key] for key in SLIDING}, "batch": batch}
    mask, score = segment_image(model, image, embeddings, **sliding)
    stem = Path(output) / Path(photo).stem
    files = {"mask": f"{stem}_mask.png", "overlay": f"{stem}_overlay.png", **{v: f"{stem}_{v}.png" for v in views}}
    if "similarity" in views:
        similarity_view(model, image, names, embeddings, **sliding).save(files["similarity"])
    if "pca" in views:
        pca_view(model, image, names, embeddings, model.config["training"].get("image_size", 224)).save(files["pca"])
    if kind == "threshold":
        mask, names = put_background(mask, score, value), ["background", *names]
    mask, score = mask.numpy(), score.numpy()
    pixels, total = count_pixels(mask, len(names)), count_pixels(mask, len(names), score)
    found = [{"index": i, "name": names[i], "share": round(pixels[i] / mask.size, 6), "colour": colour,
              "score": round(total[i] / pixels[i], 4)}
             for i, colour in enumerate(palette(len(names)).tolist()) if pixels[i] > 0]
    save_mask(files["mask"], mask, len(names))
    overlay(image, mask, names).save(files["overlay"])
    result = {"photo": str(photo), "width": image.width, "height": image.height, "names": names, "classes": classes,
              "found": found, **files, "protocol": protocol, "backbone": model.config["backbone"]}
    Path(f"{stem}.json").write_text(json.dumps(result, indent=1))
    return result


def main(argv=None):
    args = parse_args(argv)
    Image.MAX_IMAGE_PIXELS = None                   # the photos are the user's own: big ones are no attack
    try:
        if args.classes.endswith(".txt") or os.path.isfile(args.classes):       # false for a long list; pathlib raises
            classes = read_classes(args.classes)
        else:
            classes = check_classes([[name.strip()] for name in args.classes.split(",")], "--classes")
        if len({Path(photo).stem for photo in args.photos}) < len(args.photos):
            raise ValueError("two photos have the same name, their masks would too; segment them into different --output")
        kind, words = parse_background(args.background)
        if kind != "none":
            check_classes([["background"], *classes], "--background and --classes")
        classes = check_classes([words, *classes] if kind == "prompt" else classes, "--background and --classes")
        model, protocol = open_model(args)
        embeddings = embed(model, classes, protocol)
        protocol["background"] = args.background
        Path(args.output).mkdir(parents=True, exist_ok=True)
        for photo in tqdm(args.photos, unit=" photos", disable=len(args.photos) == 1 or None):
            result = segment_file(model, protocol, photo, classes, embeddings, args.output, args.batch, args.view)
            tqdm.write(f"{result['overlay']}: " + ", ".join(
                f"{c['name']} {c['share']:.1%}" for c in sorted(result["found"], key=lambda c: -c["share"])))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {str(error).strip()}")


if __name__ == "__main__":
    main()
