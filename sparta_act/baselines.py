"""What SPARTA is compared with: other readings of the paper, Dynamic ReLU and feature denoising."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from sparta_act import functional as SF
from sparta_act.activations import Sparta


class PooledSparta(Sparta):
    """SPARTA whose phi_c and predicted kernel see X averaged to 3 x 3: cheaper, and every tap counts.

    conv1 (padded), ReLU and conv2 (not padded) turn the 3 x 3 into 1 x 1; conv6 (padded) and a mean over
    channels turn it into the kernel. Our reading; arguments, shapes and errors as `Sparta`.
    """

    def _channel(self, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(self._conv1(SF.pool(x))), self.conv2)

    def _kernel(self, x: Tensor) -> Tensor:
        if not self.dynamic:
            return self.conv5
        return F.conv2d(SF.pool(x), self.conv6.mean(0, keepdim=True), padding=1)


class NormedSparta(Sparta):
    """SPARTA with batch norm after conv1, conv3 and conv4, so that the gate does not saturate at once.

    Our reading (the paper is silent on normalisation); arguments, shapes and errors as `Sparta`.
    """

    def __init__(self, in_channels: int, *, dynamic: bool = True, neighborhood: int = 1) -> None:
        super().__init__(in_channels, dynamic=dynamic, neighborhood=neighborhood)
        self.norm1, self.norm3 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(in_channels)
        self.norm4 = nn.BatchNorm2d(1)

    def _conv1(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm1(super()._conv1(x)))

    def _conv3(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm3(super()._conv3(x)))

    def _conv4(self, h: Tensor) -> Tensor:
        return cast(Tensor, self.norm4(super()._conv4(h)))


class PooledNormedSparta(PooledSparta, NormedSparta):
    """`PooledSparta` with the batch norms of `NormedSparta`."""
