"""Images and masks from files."""
import numpy as np
import torch
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")



def load_image(path, least=None):
    """Any photo as an upright 8-bit RGB image: grey, palette, alpha (over white), 16-bit, CMYK, EXIF-rotated.

    least: pixels that each side needs; a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size that leaves as many.
    Raises FileNotFoundError, or ValueError for a file that is no image or is cut short.
    """
    try:
        with Image.open(path) as image:
            if least:
                image.draft(None, (least, least))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":             # 16-bit grey: keep the high byte
                image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 256).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {path}") from None
    except Exception as error:                      # Pillow raises almost anything on a broken file
        raise ValueError(f"{path} is no readable image ({error})") from None



def to_pixels(image):
    """PIL image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)



def decode_runs(size, counts):
    """Compressed run-length code of COCO's kind -> bool mask of size (H, W).

    Runs of 0 and 1 take turns, column by column. A run is written five bits a character, the lowest first, with 32 for
    "goes on"; from the fourth on it is the difference from the run two before.
    """
    runs, number, shift = [], 0, 0
    for character in counts.encode():
        bits = character - 48
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (1 << shift) * (bits >> 4 & 1)                    # the last character's highest bit is the sign
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    if flat.size != size[0] * size[1]:
        raise ValueError(f"a run-length code covers {flat.size} pixels, expected {size[0]} x {size[1]}")
    return flat.reshape(size[1], size[0]).T



def read_mask(mask):
    """Values of a mask, (H, W) int32, of a file or of (size, [(value, run-length code)]). Palette indices are kept.

    Raises FileNotFoundError or ValueError.
    """
    if isinstance(mask, tuple):
        size, parts = mask
        pixels = np.zeros(size, np.int32)
        for value, counts in parts:                 # in the order of the file, later ones on top
            pixels[decode_runs(size, counts)] = value
        return pixels
    if not mask.is_file():
        raise FileNotFoundError(f"no mask {mask}")
    try:
        with Image.open(mask) as file:
            pixels = np.array(file).astype(np.int32)            # not converted, so palette indices stay
    except Exception as error:                      # Pillow raises almost anything on a broken file
        raise ValueError(f"{mask} is no readable mask ({error})") from None
    if pixels.ndim != 2:
        raise ValueError(f"{mask} has {pixels.shape[-1]} channels, expected one value per pixel: it holds colours, as of a "
                         "palette that was expanded, in place of classes")
    return pixels
