"""What each identity in SPARTA's own form is worth, and what was tried and left.

`python benchmarks/identities.py` times forward and backward of each piece of SPARTA, written plainly and as
`sparta_act` has it, at the first and the last site of a ResNet-18, and says what both keep for backward.
Before each, it checks that both give the same values and gradients. docs/speed.md has the algebra.
"""

import argparse
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import add_options, begin, check_equal, hold_memory, kept_bytes, race, told
from benchmarks.sites import SITES
from examples.paper.common.cli import at_least, plain_errors
from examples.paper.common.console import print_table
from sparta_act import Sparta
from sparta_act import functional as SF


class Piece(NamedTuple):
    """One piece of SPARTA in two forms, and what both take."""

    plain: Callable[..., Tensor]
    other: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def taken(n: int, channels: int, size: int) -> dict[str, Piece]:
    """The identities in use."""
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


def left(n: int, channels: int, size: int) -> dict[str, Piece]:
    """What was tried in place of the form in use, which is the plain one here."""
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
    """Convolution of 3 x 3 maps, padding 1: one product over what each of the nine pixels sees."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    seen = torch.stack([x[:, i : i + 3, j : j + 3] for i, j in product(range(3), repeat=2)], 3)
    return F.linear(seen.flatten(3), weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)


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
        torch.manual_seed(1)  # the same gradient from above
        found.append(backward(form, wide)())
    check_equal(*found, f"{name}: the two forms")


def kept(form: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> int:
    """Bytes kept for backward, the weights aside."""
    inputs = tuple(t if isinstance(t, nn.Parameter) else t.detach().requires_grad_() for t in inputs)
    weights = nn.ParameterList(t for t in inputs if isinstance(t, nn.Parameter))
    return kept_bytes(weights, lambda: form(*inputs))


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch-size", type=at_least(2), default=64, help="default %(default)s")
    add_options(p, rounds=3)
    args = p.parse_args(argv)
    begin(args)
    hold_memory()
    for title, pieces_of in {"in use": taken, "tried and left": left}.items():
        for channels, size in (SITES[0], SITES[-1]):
            names = ("plain", "ours") if pieces_of is taken else ("in use", "other")
            rows = [f"{what}, {name}" for what in ("ms", "kB kept") for name in names]
            columns: dict[str, dict[str, str]] = {row: {} for row in (*rows, "speed, times")}
            with torch.device(args.device):
                pieces = pieces_of(args.batch_size, channels, size)
            for name, piece in pieces.items():
                check_same(name, piece)
                forms = dict(zip(names, piece[:2], strict=True))
                laps = race({n: backward(f, piece.inputs) for n, f in forms.items()}, args.rounds, name)
                for n, form in forms.items():
                    columns[f"ms, {n}"][name] = f"{1e3 * laps[n].seconds:.1f}"
                    columns[f"kB kept, {n}"][name] = f"{kept(form, piece.inputs) / args.batch_size / 1e3:.0f}"
                columns["speed, times"][name] = f"{1 / laps[names[1]].ratio:.2f}"
            print_table(f"{title}: {channels} channels, {size} x {size}, batch {args.batch_size}", columns)
    print("forward and backward; kB kept for backward, of one image")
    print(told(args))


if __name__ == "__main__":
    with plain_errors():
        main()
