"""Residual blocks for `editing`: with one ReLU called twice, with one per call, and each written by hand."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparta_act import SwishReLU


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
    """`Shared` after a rewrite, written by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = SwishReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W)."""
        h = self.relu(self.conv1(x))
        return self.act(self.conv2(h) + x)


class Separate(nn.Module):
    """A block with one ReLU per call; `last` makes the second."""

    def __init__(self, channels: int, last: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1, self.conv2, self.act1, self.act2 = conv(channels), conv(channels), nn.ReLU(), last()

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W)."""
        h = self.act1(self.conv1(x))
        return self.act2(self.conv2(h) + x)


# edit: makers of the block and of the block by hand, from the channel count
BLOCKS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "rewrite": (Shared, SharedByHand),
    "swap": (Separate, lambda channels: Separate(channels, SwishReLU)),
}


class LastRelu(TorchFunctionMode):
    """Overrides the second ReLU."""

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
