"""The activations as modules: `Sparta`, the paper's, and `SwishReLU`, its second."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparta_act import functional as SF
from sparta_act.errors import ShapeError, SpartaError

if TYPE_CHECKING:
    from typing_extensions import Self

    from sparta_act.pretrained import SpartaSet


class SwishReLU(nn.Module):
    """Swish behind a ReLU: max(x, 0) * sigmoid(x). Shapes: (*) -> (*). Source: SPARTA, section 3.1."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (*) -> (*)."""
        return SF.swish_relu(x)


class Sparta(nn.Module):
    """Spatially attentive activation: max(X, 0) * sigmoid(phi_s(X) * phi_c(X)).

    phi_c, one score per channel: conv1, ReLU, conv2, global average.
    phi_s, one score per pixel: conv3, ReLU, conv4 to one channel, conv5, whose 3 x 3 kernel conv6 predicts
    from X (`dynamic=False`: an ordinary learned kernel, the paper's "w/o DPNet").
    `neighborhood=N` lets N x N neighbours share one score (Eq. 6): both nets see X averaged over them.

    Every gate is exactly 0.5 at the start (conv2 starts at zero). No convolution has a bias.
    The parameters have the paper's shapes, 36 C^2 + 9 C numbers in all.

    Shapes: (N, C, H, W) -> (N, C, H, W) with C = `in_channels`.
    Raises `ShapeError` for another shape of input or an impossible argument.
    Source: "Sparta: Spatially Attentive and Adversarially Robust Activation", 2021, Eq. 3, 5, 6, 8.

    >>> Sparta(16)(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    from_pretrained: ClassVar[Callable[..., "SpartaSet"]]  # given by `pretrained`, which knows the files

    def __init__(self, in_channels: int, *, dynamic: bool = True, neighborhood: int = 1) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("neighborhood", neighborhood)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ShapeError(
                    f"{type(self).__name__}: {name} must be a whole number of at least 1, not {value!r}"
                )
        if not isinstance(dynamic, bool):
            raise ShapeError(f"{type(self).__name__}: dynamic must be True or False, not {dynamic!r}")
        self.in_channels, self.dynamic, self.neighborhood = in_channels, dynamic, neighborhood
        self.frozen = False
        self.conv1 = _filters(in_channels, in_channels)
        self.conv2 = _filters(in_channels, in_channels)
        self.conv3 = _filters(in_channels, in_channels)
        self.conv4 = _filters(1, in_channels)
        if dynamic:
            self.conv6 = _filters(in_channels, in_channels)
        else:
            self.conv5 = _filters(1, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the filters as PyTorch draws a convolution's, then set conv2 to zero: every gate is 0.5.

        A frozen module stays as it is.
        """
        if self.frozen:
            return
        for weight in self.parameters(recurse=False):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        nn.init.zeros_(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W). Raises `ShapeError`."""
        return SF.sparta(x, *self.scores(x))  # Eq. 8

    def attention(self, x: Tensor) -> Tensor:
        """Gate of every element, sigmoid(phi_s * phi_c), in float32 or wider.

        Shapes: (N, C, H, W) -> (N, C, H, W), values in [0, 1]. Raises `ShapeError`. Source: SPARTA, Eq. 5.
        """
        return SF.attention(*self.scores(x))

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Score of every place and of every channel, whose product is the gate's logit.

        Shapes: (N, C, H, W) -> (N, 1, H, W), (N, C, 1, 1). Raises `ShapeError`.
        Source: SPARTA, Eq. 5: phi_s and phi_c.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ShapeError(
                f"{type(self).__name__}({self.in_channels}) was given {tuple(x.shape)}; "
                f"it takes (N, {self.in_channels}, H, W)"
            )
        size = x.shape[2:]
        if self.neighborhood > 1:
            x = F.avg_pool2d(x, self.neighborhood, ceil_mode=True)
        c, kernel = self._glance(x)
        m = self._conv4(SF.relu_(self._conv3(x)))
        s = SF.kernel_conv(m, kernel)  # phi_s: (N, 1, H, W)
        if self.neighborhood > 1:
            s = SF.share(s, self.neighborhood, size)
        return s, c

    def freeze(self) -> "Self":
        """Change this module to stay as it is: no gradient to its parameters, no moving statistics."""
        self.frozen = True
        self.requires_grad_(False)
        return self.train(False)

    def unfreeze(self) -> "Self":
        """Change this module back to one that trains."""
        self.frozen = False
        self.requires_grad_(True)
        return self.train()

    def train(self, mode: bool = True) -> "Self":
        """Set the training mode; a frozen module stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    @property
    def qconfig(self) -> None:
        """What `prepare` of torch.ao.quantization sets. Raises `SpartaError` when it is set."""
        raise AttributeError("qconfig")  # none is set

    @qconfig.setter
    def qconfig(self, value: object) -> None:
        if value is not None:
            raise SpartaError(
                f"{type(self).__name__} has no quantized form: on a fresh copy of the network, set "
                "qconfig = None on the module that holds it, and dequantize before it."
            )

    def extra_repr(self) -> str:
        """Arguments as they were given."""
        arguments = [str(self.in_channels)]
        arguments += [] if self.dynamic else ["dynamic=False"]
        arguments += [] if self.neighborhood == 1 else [f"neighborhood={self.neighborhood}"]
        arguments += ["frozen"] if self.frozen else []
        return ", ".join(arguments)

    def _glance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What sees X as a whole: phi_c (N, C, 1, 1) and conv5's kernel (N or 1, 1, 3, 3)."""
        c = SF.relu_mean_conv(self._conv1(x), self.conv2)
        return c, SF.predict_kernel(x, self.conv6) if self.dynamic else self.conv5

    def _conv1(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv1, padding=1)

    def _conv3(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv3, padding=1)

    def _conv4(self, h: Tensor) -> Tensor:
        return SF.conv_to_one(h, self.conv4)


def _filters(out_channels: int, in_channels: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
