"""Errors of trained networks, clean and attacked: `python -m examples.paper evaluate runs/a/checkpoint.pt`.

Without --protocol: the paper's targeted PGD at 16/255, and untargeted PGD with restarts at 8/255 and 16/255,
on all test images; then the worst case at each bound, where an image is wrong if any attack made it so.
A protocol is a preset of the options below:
  standard  steps in bfloat16, and AutoAttack at 8/255 on the first 1,000 images
  full      steps in bfloat16, and AutoAttack at 8/255 on all images
  cpu       two restarts and steps in bfloat16, on the first 2,000 images
  field     untargeted PGD-50 and targeted DLR PGD-50 (towards the three likeliest wrong classes), both at
            8/255, on the first 2,000 images; an image is wrong if any step made it so; clean error of all
  quick     few steps, on the first 50 images
Whether an image is wrong is decided in float32 without TF32, with SPARTA's weights rounded to float16, as a
set stores them.
Each attack draws its own random numbers, from --seed and its name without the number of steps. So PGD-10 is
the beginning of PGD-50, and no error depends on which other attacks run.
All outcomes are stored next to the checkpoint, in evaluation.npz, those of long attacks batch by batch. A
second call runs only what is missing. evaluation.json holds the attacks of one call: it is written at the
end, and deleted when the next call begins.

An error holds for the attacks named and for no stronger ones; it is no certificate.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from examples.paper.common.cli import at_least
from examples.paper.evaluation.evaluate import evaluations
from examples.paper.evaluation.protocols import PROTOCOLS, Protocol


def parser() -> argparse.ArgumentParser:
    """Options of the command; those of a protocol are there only if the command line gives them."""
    p = argparse.ArgumentParser(
        prog="python -m examples.paper evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "checkpoint",
        type=Path,
        nargs="+",
        help="checkpoint.pt of `train`; several, of one data set, are compared",
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
    p.add_argument("--protocol", choices=PROTOCOLS, help="preset of the options below")
    own = p.add_argument_group("protocol", argument_default=argparse.SUPPRESS)
    own.add_argument("--limit", type=at_least(1), metavar="N", help="attack the first N test images only")
    own.add_argument(
        "--steps",
        type=at_least(1),
        nargs="+",
        metavar="K",
        help="steps of the targeted PGD (default: the paper's 10 30 50)",
    )
    own.add_argument(
        "--untargeted-steps", type=at_least(1), metavar="K", help="steps of the untargeted PGD (default 50)"
    )
    own.add_argument(
        "--restarts", type=at_least(1), metavar="K", help="restarts of the untargeted PGD (default 10)"
    )
    own.add_argument(
        "--amp", choices=("bf16",), help="take the steps of PGD in bfloat16, several times faster on a GPU"
    )
    own.add_argument(
        "--autoattack",
        action="store_true",
        help="standard AutoAttack at 8/255; needs pip install -e '.[paper]' and costs up to 1,900 "
        "steps and 5,000 more passes forward for an image that stays right",
    )
    own.add_argument(
        "--autoattack-limit",
        type=at_least(1),
        metavar="N",
        help="AutoAttack on the first N test images only (default: as --limit)",
    )
    return p


def chosen(args: argparse.Namespace) -> Protocol:
    """The protocol of a command line."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Protocol) if hasattr(args, f.name)}
    return dataclasses.replace(PROTOCOLS[args.protocol] if args.protocol else Protocol(), **given)


def main(argv: list[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = parser().parse_args(argv)
    options = {"data_dir": args.data_dir, "seed": args.seed, "device": args.device}
    for _ in evaluations(args.checkpoint, chosen(args), **options):
        pass
