"""The order of CIFAR-10's test images: that of our figures, whichever files they come from.

`python -m examples.paper.common.image_order DATA/cifar10` writes the list, cifar10-test.txt, in the order
of the files in that folder: the first 16 hexadecimal digits of the sha256 of each image, as H x W x 3 bytes.
"The first 2,000 test images" are the first 2,000 of this list.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples.data import read_cifar
from examples.paper.common.atomic import write_text
from examples.paper.common.records import sha256

LIST = Path(__file__).with_name("cifar10-test.txt")


def digests(x: Tensor) -> list[str]:
    """What names each image in the list. Shapes: x (N, 3, H, W) uint8."""
    return [sha256(image.numpy().tobytes())[:16] for image in x.permute(0, 2, 3, 1).contiguous()]


def in_order(x: Tensor, y: Tensor, order: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Images and labels in the order of a list that names exactly these images; others as they are.

    As many images as the list has, but not the same ones, are named on the terminal: their figures are not
    ours. Shapes: x (N, 3, H, W) uint8, y (N,); results as they. Raises `ValueError` for a damaged list.
    """
    if len(set(order)) < len(order) or any(len(name) != 16 for name in order):
        raise ValueError(f"{LIST} is damaged: restore it, or write it anew (--help of this module)")
    if len(x) != len(order):
        return x, y
    place = {name: i for i, name in enumerate(digests(x))}
    if others := len(set(order) - place.keys()):
        print(
            f"{others} of {len(x)} test images are not those of {LIST.name}: they stay in the order of their "
            "file, and figures of the first N are not comparable with ours",
            file=sys.stderr,
        )
        return x, y
    index = torch.tensor([place[name] for name in order])
    return x[index], y[index]


def main(argv: list[str] | None = None) -> None:
    """Write the list."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", help="folder of CIFAR-10's parquet files, or hub")
    p.add_argument("--out", type=Path, default=LIST, help="file to write (default: the list in use)")
    args = p.parse_args(argv)
    names = digests(read_cifar("test", args.data)[0])
    write_text(args.out, "".join(f"{name}\n" for name in names))
    print(f"written: {args.out}, {len(names)} images, {len(set(names))} different")


if __name__ == "__main__":
    main()
