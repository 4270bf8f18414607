"""Train one network adversarially: `python -m examples.paper train --activation sparta --out runs/sparta`.

A checkpoint is written every five minutes and after each epoch, atomically. `--resume` goes on with a killed
run, inside an epoch too, on a CPU bit for bit.
`--validation 1000` holds out 1,000 training images and attacks them after each epoch. The network with the
lowest error on them is also saved, in OUT/best: robust error often rises again towards the end of a training
(Rice et al. 2020, arXiv:2002.11569).
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from examples.paper.common import data
from examples.paper.common.cli import COMPILERS, at_least, seed
from examples.paper.common.lock import lock
from examples.paper.common.models import ACTIVATIONS, BLOCKS
from examples.paper.training import loop, recipes
from examples.paper.training.checkpoint import BEST, read_checkpoint
from examples.paper.training.loop import Settings, format_row


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m examples.paper train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/latest"),
        help="folder of checkpoint.pt, log.csv and, with --validation, best/ (default %(default)s)",
    )
    p.add_argument("--resume", action="store_true", help="finish a killed run of --out, with its settings")
    p.add_argument("--dataset", choices=data.DATASETS, default="cifar10", help="default %(default)s")
    p.add_argument(
        "--data",
        dest="data_dir",
        default="sample",
        help="'sample' (ours, of cifar10; default), 'hub', or a folder of parquet files",
    )
    p.add_argument("--limit", type=at_least(1), metavar="N", help="train on the first N images only")
    p.add_argument(
        "--validation",
        type=at_least(1),
        metavar="N",
        help="hold out N training images, evenly spread, attack them after each epoch, and save the network "
        "with the lowest error, the earliest of equals, in OUT/best",
    )
    p.add_argument("--arch", choices=BLOCKS, default="resnet18", help="default %(default)s")
    p.add_argument(
        "--width",
        type=at_least(8),
        default=64,
        help="channels of the first group; 16 is slim (default %(default)s)",
    )
    p.add_argument("--activation", choices=ACTIVATIONS, default="sparta", help="default %(default)s")
    p.add_argument(
        "--sites",
        default="G*.B-1",
        help="which ReLUs to replace, e.g. 'G4.B2', 'G{1,2}.B*' or, for all, '*act*' (default %(default)s)",
    )
    p.add_argument(
        "--pretrained",
        metavar="SET",
        help="name or path of a SPARTA set to put there, frozen; --activation names its variant",
    )
    p.add_argument("--seed", type=seed, default=0, help="default %(default)s")
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s"
    )
    p.add_argument("--amp", choices=("bf16",), help="mixed precision; weights and evaluation stay float32")
    p.add_argument(
        "--compile",
        choices=COMPILERS,
        help="torch.compile the network: `default`; `reduce-overhead`, with CUDA graphs; or `cudagraphs`, "
        "CUDA graphs without generated code, ready in seconds",
    )
    recipes.add_options(p)
    return p


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    args = parser().parse_args(argv)
    settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    recipe = recipes.chosen(args)
    activation = f"{args.pretrained}, frozen," if args.pretrained else args.activation
    print(f"{args.arch} width {args.width}, {activation} at {args.sites}, {args.dataset}")
    print(recipe)
    rows = loop.epochs(
        settings,
        recipe,
        out=args.out,
        data_dir=args.data_dir,
        device=args.device,
        resume=args.resume,
        compile=args.compile,
        alone=lock,
    )
    for row in rows:
        print(f"epoch {row['epoch']}: {format_row(row)}")
    checkpoints = f"{args.out / 'checkpoint.pt'}"
    if args.validation:
        checkpoints += f" {args.out / BEST}"
        print(f"best: epoch {read_checkpoint(args.out / BEST)['epoch']}")
    print(f"done; evaluate it with: python -m examples.paper evaluate {checkpoints}")
