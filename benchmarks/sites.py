"""Cost of one activation by itself, at each of the four sites of a ResNet-18 for 32 x 32 images.

`python -m benchmarks.sites` prints, for ReLU, SiLU, SE, CBAM, Dynamic ReLU, feature denoising and SPARTA, the
time of a forward pass, the time of forward and backward, and per image the multiply-adds and the bytes saved
for backward. SE and CBAM are timm's; they and feature denoising follow a ReLU. First it checks that plain and
fast SPARTA are the same function.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measuring import (
    add_options,
    begin,
    format_setup,
    hold_memory,
    multiply_adds,
    race,
    saved_bytes,
)
from benchmarks.peers import peer
from benchmarks.plain import PlainSparta, check_same
from examples.paper.common.activations import DynamicReLUB, DynamicReLUC, FeatureDenoising
from examples.paper.common.cli import at_least, plain_errors
from examples.paper.common.console import print_table
from sparta_act import Sparta

SITES = ((64, 32), (128, 16), (256, 8), (512, 4))  # channels, height and width


def contenders() -> dict[str, Callable[[int], nn.Module]]:
    """A module for each channel count, by name."""
    found: dict[str, Callable[[int], nn.Module]] = {
        "ReLU": lambda channels: nn.ReLU(),
        "SiLU": lambda channels: nn.SiLU(),
    }
    if (se := peer("timm.layers.squeeze_excite")) and (cbam := peer("timm.layers.cbam")):
        found["SE"] = lambda channels: nn.Sequential(nn.ReLU(), se.SEModule(channels))
        found["CBAM"] = lambda channels: nn.Sequential(nn.ReLU(), cbam.CbamModule(channels))
    return found | {
        "Dynamic ReLU-B": DynamicReLUB,
        "Dynamic ReLU-C": DynamicReLUC,
        "feature denoising": lambda channels: nn.Sequential(nn.ReLU(), FeatureDenoising(channels)),
        "SPARTA, plainly": PlainSparta,
        "SPARTA": Sparta,
    }


def forward(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """One forward pass without gradients."""
    return torch.no_grad()(lambda: module(x))


def both(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward, and backward to the input and the parameters."""
    x = x.detach().clone().requires_grad_()
    grad = torch.randn_like(x)
    wanted = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x), wanted, grad)


def work(module: nn.Module, x: Tensor) -> dict[str, str]:
    """Multiply-adds per image, parameters, bytes saved per image."""
    count = multiply_adds(lambda: module(x))
    saved = saved_bytes(module, lambda: module(x.detach().requires_grad_()))
    return {
        "10^6 multiply-adds": f"{count / len(x) / 1e6:.2f}",
        "parameters": f"{sum(p.numel() for p in module.parameters()):,}",
        "saved, kB": f"{saved / len(x) / 1e3:.0f}",
    }


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch-size", type=at_least(1), default=32, help="default %(default)s")
    add_options(p, rounds=2)
    args = p.parse_args(argv)
    begin(args)
    hold_memory()
    makers = contenders()
    for channels, size in SITES:
        x = torch.randn(args.batch_size, channels, size, size, device=args.device)
        x = x.to(memory_format=torch.channels_last)
        modules = {
            name: make(channels).to(args.device, memory_format=torch.channels_last)
            for name, make in makers.items()
        }
        check_same(modules["SPARTA"], modules["SPARTA, plainly"], x[:2], lambda m, x: m(x).square().sum())
        columns: dict[str, dict[str, str]] = {}
        for kind, call in {"forward": forward, "forward, backward": both}.items():
            laps = race({n: call(m, x) for n, m in modules.items()}, args.rounds, f"{channels}: {kind}")
            columns[f"{kind}, ms"] = {name: f"{1e3 * lap.seconds:.1f}" for name, lap in laps.items()}
        for name, module in modules.items():
            for column, figure in work(module, x).items():
                columns.setdefault(column, {})[name] = figure
        print_table(f"{channels} channels, {size} x {size}, batch {len(x)}, float32, channels_last", columns)
    print("per image: multiply-adds of convolutions and matrix products in forward, kB saved for backward")
    print(format_setup(args))


if __name__ == "__main__":
    with plain_errors():
        main()
