"""What an edited block costs beside the same block written by hand.

`python benchmarks/editing.py` times residual blocks in which `replace_relus` has put `SwishReLU` for the last
ReLU, by each of its edits: a rewrite, where one ReLU is called twice, as in torchvision's blocks, and a swap,
where each call has a ReLU of its own, as in timm's. Beside them stand the block written by hand, twice, so
that the second one shows what the clock cannot tell apart; the untouched block under a `TorchFunctionMode`
that overrides its last ReLU in every pass; and the untouched block. First a block so small that little but
Python is timed, then one of a real size; eager, then compiled. Before, it checks in float64 that all but the
untouched block have the same values and gradients.
"""

import argparse
import copy
import random
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.measuring import Lap, add_options, begin, check_equal, hold_memory, race, told
from benchmarks.sites import both, forward
from examples.paper.common.cli import at_least, plain_errors
from examples.paper.common.console import print_table
from examples.paper.training.trainer import COMPILERS
from sparta_act import SwishReLU, relu_sites, replace_relus

Prepare = Callable[[nn.Module], Any]  # compiles a block, or leaves it


def conv(channels: int) -> nn.Module:
    """A convolution with batch norm."""
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))


class Shared(nn.Module):
    """A block with one ReLU, called twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = conv(channels), conv(channels), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W)."""
        h = self.relu(self.conv1(x))
        return self.relu(self.conv2(h) + x)


class SharedByHand(Shared):
    """What a rewrite should make of `Shared`."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = SwishReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W)."""
        h = self.relu(self.conv1(x))
        return self.act(self.conv2(h) + x)


class Separate(nn.Module):
    """A block with a ReLU for each call; `last` may be written in by hand."""

    def __init__(self, channels: int, last: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1, self.conv2, self.act1, self.act2 = conv(channels), conv(channels), nn.ReLU(), last()

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W)."""
        h = self.act1(self.conv1(x))
        return self.act2(self.conv2(h) + x)


# edit: the block, and what it should become, from the channel count
BLOCKS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "rewrite": (Shared, SharedByHand),
    "swap": (Separate, lambda channels: Separate(channels, SwishReLU)),
}


class LastRelu(TorchFunctionMode):
    """While it is on, the second ReLU is another activation."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation, self.calls = activation, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls += func is F.relu
        if func is F.relu and self.calls == 2:
            return self.activation(args[0])
        return func(*args, **(kwargs or {}))


class Overridden(nn.Module):
    """A block under `LastRelu`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.act = block, SwishReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W)."""
        with LastRelu(self.act):
            return self.block(x)


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
    """Columns of a table, from races that are each between new blocks in another order."""
    columns: dict[str, dict[str, str]] = {}
    for kind, call_of in {"forward": forward, "both": both}.items():
        found: list[dict[str, Lap]] = []
        for i in range(races):
            torch.compiler.reset()  # no race looks through what was compiled for an earlier one
            blocks = {n: b.train(call_of is both) for n, b in contenders(edit, x).items()}
            laps = {n: several(call_of(prepare(b), x), calls) for n, b in blocks.items()}
            first, *others = laps
            order = [first, *random.Random(i).sample(others, len(others))]
            found.append(race({n: laps[n] for n in order}, rounds, f"{edit}: {kind}"))
        base = min(r[first].seconds for r in found) * 1e6 / calls
        digits = 1 if base < 1000 else 0
        space = " " * len(columns)  # two columns cannot have one name
        for name in blocks:
            ratios = [r[name].ratio for r in found]
            time = min(r[name].seconds for r in found) * 1e6 / calls
            lap = Lap(time, statistics.median(ratios), (min(ratios), max(ratios)))
            columns.setdefault(kind, {})[name] = f"{time:.{digits}f}"
            columns.setdefault("/ by hand" + space, {})[name] = lap.told()
            columns.setdefault("more" + space, {})[name] = f"{base * (lap.ratio - 1):+.{digits}f}"
    return columns


def several(call: Callable[[], object], calls: int) -> Callable[[], None]:
    """A lap of so many calls."""

    def lap() -> None:
        for _ in range(calls):
            call()

    return lap


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = at_least(1)
    p.add_argument(
        "--calls", type=number, default=50, help="of the small block in a lap (default %(default)s)"
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
        help="of --rounds each, of the larger block an eighth (default %(default)s)",
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
    print(told(args))


if __name__ == "__main__":
    with plain_errors():
        main()
