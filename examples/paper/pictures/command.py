"""The command `pictures`: draw the documentation's pictures from what lies in the repository."""

import argparse
from collections.abc import Callable
from pathlib import Path

from examples.paper.common import data
from examples.paper.common.records import read_json
from examples.paper.evaluation import networks
from examples.paper.pictures import contest, cost, gate, loss, method
from examples.paper.results.queue import read_queue
from examples.paper.results.state import RESULTS

DESCRIPTION = """Draw the pictures of the documentation, all of them or those that are named.

  method   the activation, and where it is in a residual block
  gate     the gate of examples/networks/cifar10-resnet18 on test images of the sample
  loss     the loss at each step of PGD, from OUT/loss.json, which `figures` writes
  contest  what SPARTA and its controls differ by, from docs/results
  cost     what SPARTA costs, from docs/speed, which `benchmarks.network --record` writes
"""
DOCS = RESULTS.parent


def draw_gate(path: Path) -> None:
    """The gate of the network whose activations ship."""
    model, *_ = networks.load(str(networks.NETWORKS / "cifar10-resnet18.safetensors"))
    x, _ = data.load("test", "sample")
    gate.draw(path, model, data.to_float(x), 4)


def draw_loss(path: Path) -> None:
    """The loss that `figures` wrote beside the picture. Raises `ValueError` for a file of something else."""
    file = path.with_suffix(".json")
    try:
        loss.draw(path, read_json(file))
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration) as error:
        raise ValueError(f"{file} is not what `figures` wrote ({error!r}); write it again") from None


PICTURES: dict[str, Callable[[Path], None]] = {
    "method": method.draw,
    "gate": draw_gate,
    "loss": draw_loss,
    "contest": lambda path: contest.draw(path, read_queue(), RESULTS),
    "cost": lambda path: cost.draw(path, DOCS / "speed"),
}


def main(argv: list[str] | None = None) -> None:
    """Draw what the command line names."""
    p = argparse.ArgumentParser(
        prog="python -m examples.paper pictures",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("names", nargs="*", metavar="NAME", help="pictures to draw (default: all)")
    p.add_argument("--out", type=Path, default=DOCS / "pictures", help="folder (default: docs/pictures)")
    args = p.parse_args(argv)
    if unknown := [name for name in args.names if name not in PICTURES]:
        p.error(f"no picture {', '.join(unknown)}; there are {', '.join(PICTURES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or PICTURES:
        PICTURES[name](args.out / f"{name}.png")
        print(f"written: {args.out / name}.png")
