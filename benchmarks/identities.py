"""What each identity of the fast form of SPARTA saves, and the identities that were tried and rejected.

`python -m benchmarks.identities` times forward and backward of each piece of SPARTA, written plainly and as
in `sparta_act`, at the first and last site of a ResNet-18, and counts the bytes that both save for backward.
First it checks that both give the same values and gradients. docs/speed.md has the algebra.
"""

import argparse
from collections.abc import Callable
from itertools import product
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
    other: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def in_use(n: int, channels: int, size: int) -> dict[str, Piece]:
    """The identities in use: the plain form, ours."""
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


def rejected(n: int, channels: int, size: int) -> dict[str, Piece]:
    """The rejected identities: the plain form, which is in use, the other."""
    hidden = Sparta(channels).hidden
    h, small = maps(n, hidden, size), maps(n, channels, 3)
    return {
        "conv4: product and fold": Piece(padded_conv, product_and_fold, (h, filters(1, hidden))),
        "conv1 as a product": Piece(padded_conv, same_conv, (small, filters(hidden, channels))),
    }


def padded_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution with padding 1, PyTorch's own."""
    return F.conv2d(x, weight, padding=1)


def product_and_fold(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution to one channel, padding 1, as a product to nine channels whose shifted sum it is."""
    taps = weight[0].flip(1, 2).permute(1, 2, 0).reshape(9, -1)
    y = F.linear(x.permute(0, 2, 3, 1), taps).permute(0, 3, 1, 2)
    columns = y.reshape(1, -1, y.shape[2] * y.shape[3])  # torch folds sample by sample, channels at once
    return F.fold(columns, y.shape[2:], kernel_size=3, padding=1).view(y.shape[0], 1, *y.shape[2:])


def same_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution of 3 x 3 maps, padding 1: one product over the window of each of the nine pixels."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    windows = torch.stack([x[:, i : i + 3, j : j + 3] for i, j in product(range(3), repeat=2)], 3)
    return F.linear(windows.flatten(3), weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)


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
    for title, pieces_of in {"in use": in_use, "rejected": rejected}.items():
        for channels, size in (SITES[0], SITES[-1]):
            names = ("plain", "ours") if pieces_of is in_use else ("in use", "other")
            rows = [f"{what}, {name}" for what in ("ms", "kB saved") for name in names]
            columns: dict[str, dict[str, str]] = {row: {} for row in (*rows, "speed, times")}
            with torch.device(args.device):
                pieces = pieces_of(args.batch_size, channels, size)
            for name, piece in pieces.items():
                check_same(name, piece)
                forms = dict(zip(names, piece[:2], strict=True))
                laps = race({n: backward(f, piece.inputs) for n, f in forms.items()}, args.rounds, name)
                for n, form in forms.items():
                    columns[f"ms, {n}"][name] = f"{1e3 * laps[n].seconds:.1f}"
                    size_kb = saved(form, piece.inputs) / args.batch_size / 1e3
                    columns[f"kB saved, {n}"][name] = f"{size_kb:.0f}"
                columns["speed, times"][name] = f"{1 / laps[names[1]].ratio:.2f}"
            print_table(f"{title}: {channels} channels, {size} x {size}, batch {args.batch_size}", columns)
    print("ms: forward and backward; kB: saved for backward, per image")
    print(format_setup(args))


if __name__ == "__main__":
    with plain_errors():
        main()
