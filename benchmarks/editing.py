"""Cost of an edited block against the same block written by hand.

`python -m benchmarks.editing` times residual blocks whose last ReLU `replace_relus` has replaced by
`SwishReLU`, by each of its edits: a rewrite, where one ReLU is called twice, as in torchvision's blocks, and
a swap, where each call has its own ReLU, as in timm's. The contenders are the block written by hand, the same
again, which shows the noise of the clock, the edited block, the untouched block under a `TorchFunctionMode`
that overrides its last ReLU in every pass, and the untouched block. The first block is so small that Python
takes most of the time, the second has a common size; both eager, then compiled. Before the races it checks in
float64 that all but the untouched block have the same values and gradients.
"""

import argparse
import copy
import random
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.blocks import BLOCKS, Overridden
from benchmarks.measuring import (
    Lap,
    add_options,
    begin,
    check_equal,
    format_setup,
    hold_memory,
    race,
)
from benchmarks.sites import both, forward
from examples.paper.common.cli import COMPILERS, at_least, plain_errors
from examples.paper.common.console import print_table
from sparta_act import SwishReLU, relu_sites, replace_relus

Prepare = Callable[[nn.Module], Any]  # compiles a block, or returns it as it is


def contenders(edit: str, x: Tensor) -> dict[str, nn.Module]:
    """New blocks for inputs like `x`, with equal parameters, by name."""

    def new(make: Callable[[int], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return make(x.shape[1]).to(x.device, memory_format=torch.channels_last)

    written, by_hand = BLOCKS[edit]
    network = nn.Sequential(new(written))
    assert relu_sites(network, example=x)[0].edit == edit
    replace_relus(network, "G1.B1", lambda channels: SwishReLU(), example=x)
    return {
        "by hand": new(by_hand),
        "by hand again": new(by_hand),
        "edited": network[0],
        "run-time mode": Overridden(new(written)),
        "untouched": new(written),
    }


def check_same(blocks: Mapping[str, nn.Module], x: Tensor, prepare: Prepare) -> float:
    """Largest relative difference in float64 from "by hand". Raises `ValueError` above 1e-9."""
    found = {}
    for name in (n for n in blocks if n != "untouched"):
        block, x = copy.deepcopy(blocks[name]).double(), x.detach().double().requires_grad_()
        y = prepare(block)(x)
        found[name] = [y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]
    return max(check_equal(f, found["by hand"], f"{name} and by hand") for name, f in found.items())


def measure(
    edit: str, x: Tensor, prepare: Prepare, *, calls: int, rounds: int, races: int
) -> dict[str, dict[str, str]]:
    """Columns of a table, from races of new blocks, each in another order."""
    columns: dict[str, dict[str, str]] = {}
    for kind, call_of in {"forward": forward, "both": both}.items():
        found: list[dict[str, Lap]] = []
        for i in range(races):
            torch.compiler.reset()  # what earlier races compiled would slow the look-up
            blocks = {n: b.train(call_of is both) for n, b in contenders(edit, x).items()}
            laps = {n: several(call_of(prepare(b), x), calls) for n, b in blocks.items()}
            first, *others = laps
            order = [first, *random.Random(i).sample(others, len(others))]
            found.append(race({n: laps[n] for n in order}, rounds, f"{edit}: {kind}"))
        base = min(r[first].seconds for r in found) * 1e6 / calls
        digits = 1 if base < 1000 else 0
        space = " " * len(columns)  # the keys of the columns must differ
        for name in blocks:
            ratios = [r[name].ratio for r in found]
            time = min(r[name].seconds for r in found) * 1e6 / calls
            lap = Lap(time, statistics.median(ratios), (min(ratios), max(ratios)))
            columns.setdefault(kind, {})[name] = f"{time:.{digits}f}"
            columns.setdefault("/ by hand" + space, {})[name] = lap.format_ratio()
            columns.setdefault("more" + space, {})[name] = f"{base * (lap.ratio - 1):+.{digits}f}"
    return columns


def several(call: Callable[[], object], calls: int) -> Callable[[], None]:
    """A lap of `calls` calls."""

    def lap() -> None:
        for _ in range(calls):
            call()

    return lap


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = at_least(1)
    p.add_argument(
        "--calls", type=number, default=50, help="of the small block per lap (default %(default)s)"
    )
    p.add_argument("--batch-size", type=number, default=32, help="of the larger block (default %(default)s)")
    p.add_argument(
        "--compile",
        choices=("none", *COMPILERS),
        default="default",
        help="default %(default)s, which needs a C++ compiler; none: eager only",
    )
    p.add_argument(
        "--races",
        type=number,
        default=5,
        help="of --rounds each; of an eighth for the larger block (default %(default)s)",
    )
    add_options(p, rounds=40)
    args = p.parse_args(argv)
    begin(args)
    hold_memory()
    ways: dict[str, Prepare] = {"eager": lambda block: block}
    if args.compile != "none":
        how = {"fullgraph": True, "dynamic": False, **COMPILERS[args.compile]}
        ways["compiled"] = lambda block: torch.compile(block, **how)
    worst = 0.0
    shapes = (8, 8, 1, args.calls, args.rounds), (64, 32, args.batch_size, 1, -(-args.rounds // 8))
    for channels, size, batch, calls, rounds in shapes:
        x = torch.randn(batch, channels, size, size, device=args.device)
        x = x.to(memory_format=torch.channels_last)
        for way, prepare in ways.items():
            for edit in BLOCKS:
                worst = max(worst, check_same(contenders(edit, x), x[:2], prepare))
                title = f"{edit}, {way}: {channels} channels, {size} x {size}, batch {batch}"
                columns = measure(edit, x, prepare, calls=calls, rounds=rounds, races=args.races)
                print_table(f"{title}, microseconds a call", columns)
    print(f"all but the untouched block: the same values and gradients in float64 to {worst:.0e}")
    print("both: forward and backward; more: the ratio's excess over 1, in microseconds")
    print(f"times: of the fastest of {args.races} races; ratios: their median, the lowest and the highest")
    print(format_setup(args))


if __name__ == "__main__":
    with plain_errors():
        main()
