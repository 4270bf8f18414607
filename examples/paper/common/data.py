"""CIFAR-10, SVHN and MNIST-M as tensors: from a folder, from the Hub, or a small sample of CIFAR-10."""

import dataclasses
import functools
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from examples.data import SAMPLE, decode, read_parquet
from examples.paper.common.image_order import LIST, in_order

DIGITS = tuple("0123456789")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set; mean and deviation are those of its training images."""

    hub: str | None  # repository on the Hub
    folder: str  # of the files there
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...]
    flip: bool  # whether a mirrored image keeps its class
    images: dict[str, int]  # by split; for training on MNIST-M, a balanced subset of its 59,001


DATASETS = {
    "cifar10": Dataset(
        "uoft-cs/cifar10",
        "plain_text",
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        flip=True,
        images={"train": 50_000, "test": 10_000},
    ),
    "svhn": Dataset(  # without the `extra` split
        "ufldl-stanford/svhn",
        "cropped_digits",
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        DIGITS,
        flip=False,
        images={"train": 73_257, "test": 26_032},
    ),
    "mnist-m": Dataset(
        None,
        "plain_text",
        (0.4580, 0.4629, 0.4093),
        (0.2520, 0.2367, 0.2589),
        DIGITS,
        flip=False,
        images={"train": 25_000, "test": 9_001},
    ),
}


def load(split: str, source: str = "sample", dataset: str = "cifar10") -> tuple[Tensor, Tensor]:
    """Images and labels of one split ("train" or "test") of a data set of `DATASETS`.

    `source`: "sample" (2,500 images of CIFAR-10), "hub" (downloads the whole data set), or a folder that
    holds `train-*.parquet` and `test-*.parquet` at any depth, as data sets of the Hub do. The 10,000 test
    images of CIFAR-10 come in the order of our figures (`image_order.py`), wherever they are from.
    Shapes: (N, 3, H, W) uint8, (N,) int64. Raises `FileNotFoundError`, or `ValueError`, also for as many
    images as another data set has.
    """
    if split not in ("train", "test"):
        raise ValueError(f"no split {split!r}; ask for 'train' or 'test'")
    if dataset not in DATASETS:
        raise ValueError(f"no data set {dataset!r}; there are {', '.join(DATASETS)}")
    if source == "sample":
        if dataset != "cifar10":
            raise ValueError(f"our sample is of cifar10, not of {dataset}; give a folder of parquet files")
        return decode(pq.read_table(SAMPLE, filters=[("split", "==", split)], partitioning=None))
    files = _from_hub(split, dataset) if source == "hub" else _from_folder(split, Path(source), dataset)
    listed = split == "test" and dataset == "cifar10"
    x, y = _read(tuple((f.resolve(), f.stat().st_mtime_ns, f.stat().st_size) for f in files), listed)
    counts = {name: known.images[split] for name, known in DATASETS.items()}
    if others := [name for name, count in counts.items() if count == len(x) != counts[dataset]]:
        raise ValueError(
            f"{source} has the {len(x):,} {split} images of {others[0]}, and those of {dataset} are wanted"
        )
    return x, y


def check_whole(source: str, dataset: str) -> None:
    """Raise `ValueError` unless a folder holds the whole data set; images are counted, not read."""
    for split, wanted in DATASETS[dataset].images.items():
        files = _from_folder(split, Path(source), dataset)
        if (found := sum(pq.ParquetFile(f).metadata.num_rows for f in files)) != wanted:
            raise ValueError(f"{source}: the {split} split of {dataset} has {wanted} images, found {found}")


def to_float(x: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Bytes to [0, 1]. Any shape; result as x."""
    return x.to(device).float() / 255


def augment(x: Tensor, *, flip: bool = True, pad: int = 4) -> Tensor:
    """Crop each padded image at random; with `flip`, mirror it with probability one half.

    Runs on the device of x, without synchronizing. Shapes: x (N, C, H, W), result as x.
    """
    n, _, h, w = x.shape
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), device=x.device)
    column = torch.arange(w, device=x.device).expand(n, w)
    mirrored = torch.rand(n, 1, device=x.device) < (0.5 if flip else 0)
    rows = torch.arange(h, device=x.device) + top  # (N, H)
    columns = torch.where(mirrored, w - 1 - column, column) + left  # (N, W)
    padded = torch.nn.functional.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)  # (N, H', W', C)
    i = torch.arange(n, device=x.device)
    return padded[i[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _from_folder(split: str, folder: Path, dataset: str) -> list[Path]:
    inner = folder / DATASETS[dataset].folder
    files = sorted((inner if inner.is_dir() else folder).rglob(f"{split}-*.parquet"))
    if len({f.parent for f in files}) != 1:
        found = sorted({str(f.parent) for f in files}) or "none"
        raise FileNotFoundError(
            f"{folder} must hold one folder with {split}-*.parquet; found: {found}; "
            "name the folder of one data set, or omit --data to use the sample"
        )
    return files


def _from_hub(split: str, dataset: str) -> list[Path]:
    from huggingface_hub import snapshot_download

    known = DATASETS[dataset]
    if known.hub is None:
        raise ValueError(f"there is no copy of {dataset} on the Hub; give a folder of its parquet files")
    pattern = f"{known.folder}/{split}-*.parquet"
    folder = snapshot_download(known.hub, repo_type="dataset", allow_patterns=pattern)
    return _from_folder(split, Path(folder), dataset)


@functools.lru_cache(maxsize=2)  # both splits of a data set: a process that trains many networks reads once
def _read(files: tuple[tuple[Path, int, int], ...], listed: bool) -> tuple[Tensor, Tensor]:
    """Images and labels of files (path, time, size), in the order of `LIST` if those are `listed` there.

    Callers must not change them.
    """
    x, y = decode(read_parquet([f for f, _, _ in files]))
    return in_order(x, y, LIST.read_text().split()) if listed else (x, y)
