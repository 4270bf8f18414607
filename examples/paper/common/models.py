"""CIFAR ResNets of any width and the activations they are compared with; images are in [0, 1]."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from examples.models import Normalize
from examples.paper.common.activations import (
    AsRead,
    DynamicReLUC,
    FeatureDenoising,
    Normed,
    Pooled,
    PooledNormed,
)
from examples.paper.common.data import DATASETS
from sparta_act import Sparta, SwishReLU, replace_relus

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet18-wide": (2, 2, 2, 2)}

# Hidden channels of the last block of each group, as a factor. `resnet18-wide` is the control of the readings
# that lost: with ReLU alone it has the parameters of a resnet18 with `AsRead` at these sites, within 1%
HIDDEN = {"resnet18-wide": (1, 1, 2.875, 3.203125)}

# arguments of `Sparta` by variant
VARIANTS: dict[str, dict[str, Any]] = {
    "sparta": {},
    "sparta-static": {"dynamic": False},  # the paper's "w/o DPNet"
    "sparta-n2": {"neighborhood": 2},
    "sparta-n4": {"neighborhood": 4},
    "sparta-identity": {"identity": True},
}


class HalvedReLU(nn.Module):
    """Half a ReLU, 0.5 * max(x, 0): the control with a constant gate."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: any, kept."""
        return 0.5 * F.relu(x)


# choices of `--activation`: a module for each channel count, None for an unchanged network. `silu+sparta`
# puts SPARTA at the sites and SiLU at every other ReLU
ACTIVATIONS: dict[str, Callable[[int], nn.Module] | None] = {
    "relu": None,
    "relu-half": lambda channels: HalvedReLU(),
    "elu": lambda channels: nn.ELU(),
    "gelu": lambda channels: nn.GELU(),
    "silu": lambda channels: nn.SiLU(),
    "swish-relu": lambda channels: SwishReLU(),
    "dynamic-relu": DynamicReLUC,  # Table 1 of the paper calls it spatial-wise
    "silu+sparta": Sparta,
    "feature-denoising": lambda channels: nn.Sequential(nn.ReLU(), FeatureDenoising(channels)),
    **{name: partial(Sparta, **arguments) for name, arguments in VARIANTS.items()},
    "sparta-as-read": AsRead,
    "sparta-pooled": Pooled,
    "sparta-pooled-static": partial(Pooled, dynamic=False),
    "sparta-normed": Normed,
    "sparta-pooled-normed": PooledNormed,
}


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, in_channels: int, channels: int, stride: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, hidden, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, in_channels, H, W) -> (N, channels, H / stride, W / stride)."""
        h = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet of four groups: `width` channels in the first, twice as many in each next one."""

    def __init__(
        self, name: str, *, width: int = 64, num_classes: int = 10, dataset: str = "cifar10"
    ) -> None:
        super().__init__()
        self.normalize = Normalize(DATASETS[dataset].mean, DATASETS[dataset].std)
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        in_channels = width
        for group, (count, factor) in enumerate(
            zip(BLOCKS[name], HIDDEN.get(name, (1, 1, 1, 1)), strict=True)
        ):
            channels = width * 2**group
            layer = nn.Sequential()
            for block in range(count):
                stride = 2 if group > 0 and block == 0 else 1
                hidden = int(channels * factor) if block == count - 1 else channels
                layer.append(BasicBlock(in_channels, channels, stride, hidden))
                in_channels = channels
            self.add_module(f"layer{group + 1}", layer)
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, H, W) in [0, 1] -> (N, num_classes)."""
        h = self.act1(self.bn1(self.conv1(self.normalize(x))))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))


def build(
    arch: str,
    activation: str,
    sites: str,
    *,
    width: int,
    pretrained: str | None = None,
    num_classes: int = 10,
    dataset: str = "cifar10",
) -> ResNet:
    """Fresh network with `activation` at `sites`, or with the frozen SPARTA of the set `pretrained` there.

    Raises `ValueError` if the set holds another activation than `activation`.
    """
    model = ResNet(arch, width=width, num_classes=num_classes, dataset=dataset)
    if not pretrained:
        make = ACTIVATIONS[activation]
        model = model if make is None else replace_relus(model, sites, make)
        others, plus, _ = activation.partition("+")
        return replace_relus(model, "*act*", ACTIVATIONS[others]) if plus else model
    taken = Sparta.from_pretrained(pretrained)
    if (held := {_name(a) for a in taken.values()}) != {activation}:
        raise ValueError(f"{pretrained} holds {', '.join(sorted(held))}, not {activation}")
    return replace_relus(model, sites, taken)


def _name(activation: Sparta) -> str:
    """Its name in `ACTIVATIONS`; if it has none, its repr."""
    for name, arguments in VARIANTS.items():
        other = Sparta(activation.in_channels, **arguments)
        if activation.extra_repr().replace(", frozen", "") == other.extra_repr():
            return name
    return repr(activation)
