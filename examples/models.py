"""The CIFAR ResNets of the paper's experiments, with a width; they take images in [0, 1]."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparta_act.activations import Sparta, SwishReLU
from sparta_act.baselines import NormedSparta, PooledNormedSparta, PooledSparta

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}

# what `--activation` may name: a module for each channel count; relu is no surgery at all
ACTIVATIONS: dict[str, Callable[[int], nn.Module] | None] = {
    "relu": None,
    "sparta": Sparta,
    "sparta-static": partial(Sparta, dynamic=False),
    "sparta-pooled": PooledSparta,
    "sparta-normed": NormedSparta,
    "sparta-pooled-normed": PooledNormedSparta,
    "swish-relu": lambda channels: SwishReLU(),
    "swish": lambda channels: nn.SiLU(),
    "gelu": lambda channels: nn.GELU(),
    "elu": lambda channels: nn.ELU(),
}


class Normalize(nn.Module):
    """Images in [0, 1] to zero mean and unit deviation: inside the network, so that attacks stay outside."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, H, W) -> (N, 3, H, W)."""
        return (x - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
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
    """CIFAR ResNet of four groups; `width` channels in the first, twice as many in each that follows."""

    def __init__(self, blocks: tuple[int, ...], *, width: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.normalize = Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # of CIFAR-10's train
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        in_channels = width
        for group, count in enumerate(blocks):
            channels = width * 2**group
            layer = nn.Sequential()
            for block in range(count):
                layer.append(BasicBlock(in_channels, channels, 2 if group > 0 and block == 0 else 1))
                in_channels = channels
            self.add_module(f"layer{group + 1}", layer)
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, H, W) in [0, 1] -> (N, num_classes)."""
        h = self.act1(self.bn1(self.conv1(self.normalize(x))))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))


def resnet(name: str, *, width: int = 64, num_classes: int = 10) -> ResNet:
    """Fresh network by its name in `BLOCKS`."""
    return ResNet(BLOCKS[name], width=width, num_classes=num_classes)
