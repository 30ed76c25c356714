"""Zero-shot classification: whole images against class names."""
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.functional import InterpolationMode, center_crop, resize

from machinery.images import is_hidden, list_images, load_image, to_pixels
from machinery.names import read_labels
from machinery.parallel import own_indices, progress, sum_counts
from machinery.training.workers import collate_tuples, start_data_worker


class LabelledImages:
    """An image folder with a sub-folder per class. Items: (pixels uint8 (3, size, size), class).

    names: class file, lines in the order of the sorted sub-folders or beginning with "sub-folder:";
    None = the sub-folders' own names. The short side is resized to size, bicubic, and the middle
    cut out.
    """
    count = None                                    # any number of images

    def __init__(self, folder, names=None, size=224):
        self.size = size
        folders = sorted(path.name for path in Path(folder).glob("*/") if not is_hidden(path.name))
        if not folders:
            raise FileNotFoundError(f"no class folders in {folder}; expected {folder}/CLASS/*.jpg, "
                                    "one folder per class (ImageNet's validation images, sorted "
                                    "into folders: https://image-net.org)")
        if names:
            labels, classes = read_labels(names)
            labels = labels or folders
        else:
            labels = folders
            classes = [[name.replace("_", " ")] for name in folders]
        if len(labels) != len(classes) or not set(folders) <= set(labels):
            odd = sorted(set(folders) - set(labels) or folders)[0]
            raise ValueError(f"{names} has {len(classes)} classes; expected those of the "
                             f"{len(folders)} folders of {folder}, such as {odd}")
        self.classes = classes
        self.files = [(path, i) for i, label in enumerate(labels) if label in set(folders)
                      for path in list_images(Path(folder) / label)]
        if not self.files:
            raise FileNotFoundError(f"no images in the class folders of {folder}")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        path, known = self.files[i]
        image = resize(load_image(path), self.size, InterpolationMode.BICUBIC)
        return to_pixels(center_crop(image, self.size)), known


@torch.no_grad()
def classify(model, dataset, embeddings, limit=None, workers=0, batch=64):
    """Top-1 and top-5 accuracy of whole images against class embeddings (C, S, D).

    limit: so many images only, spread over all classes. Returns ({"top1", "top5"}, images).
    """
    total = len(dataset) if limit is None else min(limit, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, total).astype(int)    # images lie class by class
    mine = chosen[own_indices(total)]
    right = torch.zeros(2, dtype=torch.int64)
    loader = DataLoader(Subset(dataset, mine), batch_size=batch, num_workers=workers,
                        collate_fn=collate_tuples, worker_init_fn=start_data_worker)
    for pixels, known in progress(loader, desc="classifying", unit=" batches"):
        scores = model.image_scores(pixels.to(embeddings.device), embeddings)       # (B, C)
        best = scores.topk(min(5, len(embeddings)), dim=1).indices.cpu() == known[:, None]
        right += torch.stack([best[:, 0].sum(), best.sum()])
    top1, top5 = sum_counts(right).tolist()
    return {"top1": top1 / total, "top5": top5 / total}, total
