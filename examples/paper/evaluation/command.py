"""Errors of networks, clean and attacked: `python -m examples.paper evaluate runs/a/checkpoint.pt`.

Measured are the clean error on all test images and, on the first 2,000 (--limit),
  targeted PGD-10, 30 and 50 at 16/255, the paper's, which judge an image at the last step,
  untargeted PGD-50 and targeted DLR PGD-50 (towards the three likeliest wrong classes) at 8/255, which judge
    it at every step;
with --autoattack N, standard AutoAttack at 8/255 on the first N. Then the worst case at 8/255: an image is
wrong if any attack at 8/255 made it so, or if it is wrong when clean.
A protocol is a preset:
  field   all this without AutoAttack (the default)
  ship    the same, and AutoAttack on the first 1,000 images
  quick   few steps, on the first 50 images: it shows that the machinery works
Whether an image is wrong is decided in float32 without TF32, of a checkpoint with SPARTA's weights rounded to
float16, as a set stores them.
Each attack draws its own random numbers, from --seed and its name without the number of steps. So PGD-10 is
the beginning of PGD-50, and no error depends on which other attacks run.
All outcomes are stored in evaluation.npz, next to a checkpoint, of other networks in OUT/NAME; those of
long attacks batch by batch. A second call runs only what is missing. evaluation.json holds the attacks of one
call: it is written at the end, and deleted when the next call begins.

An error holds for the attacks named and for no stronger ones; it is no certificate.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from examples.paper.common.cli import at_least
from examples.paper.evaluation import networks
from examples.paper.evaluation.evaluate import OUT, evaluations
from examples.paper.evaluation.protocols import PROTOCOLS, Protocol


def parser() -> argparse.ArgumentParser:
    """Options of the command; --limit and --autoattack are there only if the command line gives them."""
    p = argparse.ArgumentParser(
        prog="python -m examples.paper evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "network", nargs="+", help=f"{networks.NAMES}; several, of one data set, are compared with the first"
    )
    p.add_argument("--protocol", choices=PROTOCOLS, default="field", help="default: %(default)s")
    own = {"default": argparse.SUPPRESS, "metavar": "N"}
    p.add_argument("--limit", type=at_least(1), help="attack the first N test images only", **own)
    p.add_argument(
        "--autoattack", type=at_least(0), help="attack the first N of them by AutoAttack too", **own
    )
    p.add_argument(
        "--data",
        dest="data_dir",
        default="sample",
        help="'sample' (ours, of CIFAR-10; default), 'hub', or a folder of parquet files",
    )
    p.add_argument(
        "--seed", type=int, default=0, help="of every attack's random numbers (default %(default)s)"
    )
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s"
    )
    p.add_argument("--out", type=Path, default=OUT, help="folder for networks that are no checkpoints")
    return p


def chosen(args: argparse.Namespace) -> Protocol:
    """The protocol of a command line."""
    given = {k: getattr(args, k) for k in ("limit", "autoattack") if hasattr(args, k)}
    return dataclasses.replace(PROTOCOLS[args.protocol], **given)


def main(argv: list[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = parser().parse_args(argv)
    options = {k: getattr(args, k) for k in ("data_dir", "seed", "device", "out")}
    for _ in evaluations(args.network, chosen(args), **options):
        pass
