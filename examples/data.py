"""Images in [0, 1]: CIFAR-10 (our sample, or all of it), or a folder of your own."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
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
        return decode(pq.read_table(SAMPLE, filters=[("split", "==", split)], partitioning=None))
    if not (files := sorted(Path(source).rglob(f"{split}-*.parquet"))):
        raise ValueError(f"{source} is neither a folder with train/ and test/ nor one with {split}-*.parquet")
    if len(folders := {str(f.parent) for f in files}) > 1:
        raise ValueError(f"{source} holds several data sets, in {', '.join(sorted(folders))}: name one")
    return decode(read_parquet(files))


def read_parquet(files: Sequence[Path]) -> pa.Table:
    """The rows of several files. Raises `ValueError` that names a file that cannot be read."""
    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file, partitioning=None))  # a folder label=3/ above it means nothing
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read as parquet: {error}") from error
    return pa.concat_tables(tables)


def decode(table: pa.Table, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W), uint8, and labels (N,) of a table as on the Hub. Raises `ValueError`."""
    column = next((c for c in ("img", "image") if c in table.column_names), None)
    if column is None or "label" not in table.column_names:
        raise ValueError(
            f"the columns must include 'img' or 'image', and 'label'; found {table.column_names}"
        )
    kinds = table.schema.field(column).type, table.schema.field("label").type
    if (
        not pa.types.is_struct(kinds[0])
        or kinds[0].get_field_index("bytes") < 0
        or not pa.types.is_integer(kinds[1])
    ):
        raise ValueError(f"'{column}' must hold the 'bytes' of PNGs, and 'label' integers; found {kinds}")
    labels = table["label"].to_numpy().astype(np.float64)  # a missing one becomes NaN
    if len(labels) == 0 or not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(f"labels must be 0 to {classes - 1}; found {np.unique(labels).tolist()}")
    images = []
    for i, row in enumerate(table[column]):
        content = (row.as_py() or {}).get("bytes")
        images.append(np.asarray(picture(io.BytesIO(content or b""), f"the image of row {i}")))
    if len(shapes := {image.shape for image in images}) > 1:
        raise ValueError(f"images must have one size; found {sorted(shapes)}")
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return x, torch.from_numpy(labels.astype(np.int64))


def picture(file: Any, name: str = "") -> Image.Image:
    """An image file in red, green and blue, of eight bits each, upright.

    Raises `ValueError` that names a file that cannot be read, or not without a guess.
    """
    try:
        with Image.open(file) as image:
            return _rgb(image)
    except Exception as error:  # of Pillow, struct or zlib, by what is wrong with the file
        raise ValueError(f"{name or file} cannot be read: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    kind = image.format
    if getattr(image, "n_frames", 1) > 1 and kind != "MPO":  # of a camera: the rest are previews
        raise ValueError("it holds several pictures; save one")
    negative = getattr(image, "tag_v2", {}).get(262) == 0  # of a TIFF, where Pillow inverts 8 bits only
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        if "transparency" in image.info:
            raise ValueError("it has transparent pixels; save it on a background")
        gray = np.asarray(image).astype(np.int64)  # Pillow's own conversion cuts 65535 to 255
        gray = 65535 - gray if negative else gray
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its numbers (mode {image.mode}) have no known range; save it in 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            raise ValueError("it has transparent pixels; save it on a background")
    return image.convert("RGB")


def own_images(folder: Path, size: int) -> tuple[Any, Any]:
    """Training and test images of a folder; each class is a folder in train/ and in test/ or val/."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import is_image_file

    if not (test := next((f for f in (folder / "test", folder / "val") if f.is_dir()), None)):
        raise ValueError(f"{folder} has a train/, but neither test/ nor val/")
    cut = transforms.RandomResizedCrop(size, scale=(0.5, 1))
    augment = transforms.Compose([cut, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    plain = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()])
    inner = (*(folder / "train").iterdir(), *test.iterdir())
    if hidden := [str(f) for f in inner if f.is_dir() and _hidden(f)]:
        raise ValueError(f"a hidden folder would become a class; delete {', '.join(hidden)}")
    shown = {"loader": picture, "is_valid_file": lambda f: is_image_file(f) and not _hidden(Path(f))}
    sets = ImageFolder(folder / "train", augment, **shown), ImageFolder(test, plain, **shown)
    if len(sets[0].classes) < 2 or sets[0].classes != sets[1].classes:
        found = f"{sets[0].classes} and {sets[1].classes}"
        raise ValueError(f"{folder}: train/ and {test.name}/ need the same classes, two or more, not {found}")
    return sets


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")
