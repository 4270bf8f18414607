"""What each identity of the fast form of SPARTA saves.

`python -m benchmarks.identities` times forward and backward of each piece of SPARTA, written plainly and as
in `sparta_act`, at the first and last site of a ResNet-18, and counts the bytes that both save for backward.
First it checks that both give the same values and gradients. docs/speed.md has the algebra.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import add_options, begin, check_equal, format_setup, hold_memory, race, saved_bytes
from benchmarks.sites import SITES
from examples.paper.common.cli import at_least, plain_errors
from examples.paper.common.console import print_table
from sparta_act import Sparta
from sparta_act import functional as SF


class Piece(NamedTuple):
    """One piece of SPARTA in two forms, and the inputs of both."""

    plain: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def identities(n: int, channels: int, size: int) -> dict[str, Piece]:
    """The plain form and ours of each piece."""
    hidden = Sparta(channels).hidden
    x = maps(n, channels, size)
    s, c = torch.randn(n, 1, size, size), torch.randn(n, channels, 1, 1)
    m, kernel = torch.randn(n, 1, size, size), torch.randn(n, 1, 3, 3)
    return {
        "gate formed again in backward": Piece(
            lambda x, s, c: F.relu(x) * torch.sigmoid(s * c), SF.sparta, (x, s, c)
        ),
        "pool as a product": Piece(lambda x: F.adaptive_avg_pool2d(x, 3), SF.pool, (x,)),
        "conv2 as a product": Piece(F.conv2d, SF.full_conv, (maps(n, hidden, 3), filters(channels, hidden))),
        "conv5: product over windows": Piece(
            lambda m, k: F.conv2d(m.transpose(0, 1), k, padding=1, groups=len(m)).transpose(0, 1),
            SF.kernel_conv,
            (m, kernel),
        ),
    }


def maps(n: int, channels: int, size: int) -> Tensor:
    """Random maps in channels_last."""
    return torch.randn(n, channels, size, size).to(memory_format=torch.channels_last)


def filters(count: int, channels: int) -> Tensor:
    """Random 3 x 3 filters in channels_last."""
    w = torch.randn(count, channels, 3, 3) / (3 * channels**0.5)
    return nn.Parameter(w.to(memory_format=torch.channels_last))


def backward(form: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward: the result and the gradient of each input."""
    inputs = tuple(t.detach().clone().requires_grad_() for t in inputs)
    with torch.no_grad():
        grad = torch.randn_like(form(*inputs))

    def call() -> tuple[Tensor, ...]:
        y = form(*inputs)
        return y, *torch.autograd.grad(y, inputs, grad)

    return call


def check_same(name: str, piece: Piece) -> None:
    """Raise `ValueError` unless both forms agree to 1e-9 in float64."""
    wide = tuple(t.double() for t in piece.inputs)
    found = []
    for form in piece[:2]:
        torch.manual_seed(1)  # the same gradient of the output
        found.append(backward(form, wide)())
    check_equal(*found, f"{name}: the two forms")


def saved(form: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> int:
    """Bytes saved for backward, weights aside."""
    inputs = tuple(t if isinstance(t, nn.Parameter) else t.detach().requires_grad_() for t in inputs)
    weights = nn.ParameterList(t for t in inputs if isinstance(t, nn.Parameter))
    return saved_bytes(weights, lambda: form(*inputs))


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch-size", type=at_least(2), default=64, help="default %(default)s")
    add_options(p, rounds=3)
    args = p.parse_args(argv)
    begin(args)
    hold_memory()
    names = ("plain", "ours")
    for channels, size in (SITES[0], SITES[-1]):
        rows = [f"{what}, {name}" for what in ("ms", "kB saved") for name in names]
        columns: dict[str, dict[str, str]] = {row: {} for row in (*rows, "speed, times")}
        with torch.device(args.device):
            pieces = identities(args.batch_size, channels, size)
        for name, piece in pieces.items():
            check_same(name, piece)
            forms = dict(zip(names, piece[:2], strict=True))
            laps = race({n: backward(f, piece.inputs) for n, f in forms.items()}, args.rounds, name)
            for n, form in forms.items():
                columns[f"ms, {n}"][name] = f"{1e3 * laps[n].seconds:.1f}"
                columns[f"kB saved, {n}"][name] = f"{saved(form, piece.inputs) / args.batch_size / 1e3:.0f}"
            columns["speed, times"][name] = f"{1 / laps['ours'].ratio:.2f}"
        print_table(f"{channels} channels, {size} x {size}, batch {args.batch_size}", columns)
    print("ms: forward and backward; kB: saved for backward, per image")
    print(format_setup(args))


if __name__ == "__main__":
    with plain_errors():
        main()
