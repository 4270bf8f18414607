"""Images in [0, 1]: CIFAR-10 (our sample, or all of it), or a folder of your own."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

SAMPLE = Path(__file__).with_name("data") / "cifar10-sample.parquet"


class Cifar(Dataset[tuple[Tensor, Tensor]]):
    """Images x (N, 3, 32, 32), uint8, with labels y (N,); an item is an image in [0, 1] and its label."""

    workers = 0  # processes that read the images: these are in memory
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(self, x: Tensor, y: Tensor, *, augment: bool) -> None:
        self.x, self.y, self.augment = x, y, augment

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = self.x[i].float() / 255
        return crop_and_flip(x) if self.augment else x, self.y[i]


def crop_and_flip(x: Tensor, pad: int = 4) -> Tensor:
    """Random crop of the padded image, mirrored or not. Shapes: (C, H, W), kept."""
    top, left, mirrored = *torch.randint(0, 2 * pad + 1, (2,)).tolist(), torch.rand(()) < 0.5
    x = F.pad(x, (pad, pad, pad, pad))[:, top : top + x.shape[1], left : left + x.shape[2]]
    return x.flip(2) if mirrored else x


def load(source: str = "sample", size: int = 64) -> tuple[Any, Any]:
    """Training and test set, with `.classes`; an item is an image (C, H, W) in [0, 1] and a class number.

    `source`: "sample", the CIFAR-10 images of this repository; "hub", all of CIFAR-10, downloaded once; a
    folder of its parquet files; or a folder of your own images, train/CLASS/* and test/CLASS/* (or val/),
    which are cropped to `size` x `size` pixels. Raises `ValueError` or `OSError` with what is wrong.
    """
    if (Path(source) / "train").is_dir():
        return own_images(Path(source), size)
    return tuple(Cifar(*read_cifar(split, source), augment=split == "train") for split in ("train", "test"))


def read_cifar(split: str, source: str = "sample") -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32), uint8, and labels (N,) of "train" or "test"."""
    if source == "hub":
        from huggingface_hub import snapshot_download

        source = snapshot_download("uoft-cs/cifar10", repo_type="dataset", allow_patterns="*.parquet")
    if source == "sample":
        if not SAMPLE.exists():
            raise ValueError(f"there is no {SAMPLE}: copy the folder data/ too, or name other images")
        table = pq.read_table(SAMPLE, filters=[("split", "==", split)])
    elif files := sorted(Path(source).rglob(f"{split}-*.parquet")):
        table = pq.read_table(files)
    else:
        raise ValueError(f"{source} is neither a folder with train/ and test/ nor one with {split}-*.parquet")
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["img"].to_pylist()]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return x, torch.tensor(table["label"].to_pylist())


def own_images(folder: Path, size: int) -> tuple[Any, Any]:
    """Training and test images of a folder; each class is a folder in train/ and in test/ or val/."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    if not (test := next((f for f in (folder / "test", folder / "val") if f.is_dir()), None)):
        raise ValueError(f"{folder} has a train/, but neither test/ nor val/")
    cut = transforms.RandomResizedCrop(size, scale=(0.5, 1))
    augment = transforms.Compose([cut, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    plain = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()])
    sets = ImageFolder(folder / "train", augment), ImageFolder(test, plain)
    if len(sets[0].classes) < 2 or sets[0].classes != sets[1].classes:
        found = f"{sets[0].classes} and {sets[1].classes}"
        raise ValueError(f"{folder}: train/ and {test.name}/ need the same classes, two or more, not {found}")
    return sets
