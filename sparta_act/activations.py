"""The activations as modules: `Sparta`, and the paper's second one, `SwishReLU`."""

import math
from typing import TYPE_CHECKING

import torch
import torch.fx
from torch import Tensor, nn

from sparta_act import functional as SF
from sparta_act.errors import ShapeError

if TYPE_CHECKING:
    from typing_extensions import Self

    from sparta_act.pretrained import SpartaSet

# attribute of a module that replaced a ReLU: its label, or the dotted name of its site
PLACE = "sparta_site"


class SwishReLU(nn.Module):
    """Swish behind a ReLU: max(x, 0) * sigmoid(x). Shapes: (*) -> (*). Source: SPARTA, section 3.1.

    `inplace` changes nothing: the result is always a new tensor. torchvision's `activation_layer=` and timm's
    `act_layer=` pass it.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (*) -> (*)."""
        return SF.swish_relu(x)


class Sparta(nn.Module):
    """Spatially attentive activation: max(X, 0) * sigmoid(s * c), s a score of each place, c of each channel.

    phi_c: X averaged to 3 x 3, conv1 to h channels, ReLU, conv2 without padding: one score per channel.
    phi_s: conv3 to h channels, ReLU, conv4 to one, conv5: one score per place. conv6 predicts the kernel of
    conv5 from X averaged to 3 x 3 (`dynamic=False`: an ordinary learned one, the paper's "w/o DPNet").
    s is phi_s normalized over the places of each image, c is gain times phi_c normalized over its channels:
    mean 0, variance 1, no running statistics. So the gate neither saturates at once nor sleeps, unless all of
    X is small: of a standard deviation below some 0.3, as without a norm before it. With one place or one
    channel it is one half. `gain` is one learned number, 1 at the start; give it no weight decay.

    `hidden`: h, by default C / 8, at least 8 and at most 32; the paper has h = C.
    `identity`: the result is doubled and the gain starts at 0, so that a fresh one is ReLU, bit for bit: for
    a network that is trained already. It learns slowly.
    `neighborhood=N` lets N x N neighbors share one score (Eq. 6): both nets see X averaged over them.

    Shapes: (N, C, H, W) -> (N, C, H, W) with C = `in_channels`.
    Raises `ShapeError` for another shape of input or an impossible argument.
    Source: "Sparta: Spatially Attentive and Adversarially Robust Activation", 2021, Eq. 3, 5, 6, 8; h, the
    pools, the normalization and the gain are ours.

    >>> Sparta(16)(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    if TYPE_CHECKING:  # `pretrained`, which knows the files, sets it
        from_pretrained = staticmethod(SpartaSet.from_pretrained)

    def __init__(
        self,
        in_channels: int,
        *,
        hidden: int | None = None,
        identity: bool = False,
        dynamic: bool = True,
        neighborhood: int = 1,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        counts = {"in_channels": in_channels, "neighborhood": neighborhood}
        for what, value in (counts if hidden is None else counts | {"hidden": hidden}).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ShapeError(f"{name}: {what} must be a whole number of at least 1, not {value!r}")
        for what, value in (("identity", identity), ("dynamic", dynamic)):
            if not isinstance(value, bool):
                raise ShapeError(f"{name}: {what} must be True or False, not {value!r}")
        self.in_channels, self.neighborhood = in_channels, neighborhood
        self.hidden = max(8, min(in_channels // 8, 32)) if hidden is None else hidden
        self.identity, self.dynamic, self.frozen = identity, dynamic, False
        self.conv1 = _filters(self.hidden, in_channels)
        self.conv2 = _filters(in_channels, self.hidden)
        self.conv3 = _filters(self.hidden, in_channels)
        self.conv4 = _filters(1, self.hidden)
        if dynamic:
            self.conv6 = _filters(1, in_channels)
        else:
            self.conv5 = _filters(1, 1)
        self.gain = nn.Parameter(torch.empty(1))  # FSDP2 refuses a parameter without dimensions
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the filters as PyTorch draws a convolution's; the gain is 1, with `identity` 0.

        A frozen module stays as it is.
        """
        if self.frozen:
            return
        for name, weight in self.named_parameters(recurse=False):
            if name == "gain":
                nn.init.constant_(weight, 0 if self.identity else 1)
            else:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W). Raises `ShapeError`."""
        return _activate(x, self._weights(), self.neighborhood, self.scale, type(self).__name__)

    def attention(self, x: Tensor) -> Tensor:
        """Gate of every element, sigmoid(s * c), twice that with `identity`, in float32 or wider.

        Shapes: (N, C, H, W) -> (N, C, H, W), values in [0, 1] or [0, 2]. Raises `ShapeError`.
        Source: SPARTA, Eq. 5.
        """
        return SF.attention(*self.scores(x), self.scale)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Score s of every place and c of every channel, whose product is the gate's logit.

        Shapes: (N, C, H, W) -> (N, 1, H, W), (N, C, 1, 1), float32 or wider. Raises `ShapeError`.
        Source: SPARTA, Eq. 5: phi_s and phi_c, here normalized.
        """
        _check(x, self.in_channels, type(self).__name__)
        return SF.scores(x, **self._weights(), neighborhood=self.neighborhood)

    def freeze(self) -> "Self":
        """Freeze this module, in place: its parameters get no gradient, and it stays in evaluation mode.

        So it stays under `net.requires_grad_(True)` and `net.train()`, until `unfreeze`.
        """
        self.frozen = True
        self.requires_grad_(False)
        self.zero_grad(set_to_none=True)  # or an optimizer's next step would still take it
        return self.train(False)

    def unfreeze(self) -> "Self":
        """Let this module train again, in place."""
        self.frozen = False
        self.requires_grad_(True)
        return self.train()

    def train(self, mode: bool = True) -> "Self":
        """Set the training mode; a frozen module stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def extra_repr(self) -> str:
        """The arguments, and the parameters' shapes."""
        arguments = [str(self.in_channels), f"hidden={self.hidden}"]
        arguments += ["identity=True"] if self.identity else []
        arguments += [] if self.dynamic else ["dynamic=False"]
        arguments += [] if self.neighborhood == 1 else [f"neighborhood={self.neighborhood}"]
        arguments += ["frozen"] if self.frozen else []
        shapes = [f"{name} {'x'.join(map(str, p.shape))}" for name, p in self.named_parameters(recurse=False)]
        return f"{', '.join(arguments)}; {', '.join(shapes)}"

    @property
    def scale(self) -> int:
        """Factor of the gate: 1, or 2 with `identity`."""
        return 2 if self.identity else 1

    def _weights(self) -> dict[str, Tensor]:
        # by name: FSDP, pruning, parametrizations and DataParallel's replicas take them out of the parameters
        names = ("conv1", "conv2", "conv3", "conv4", "gain", "conv6" if self.dynamic else "conv5")
        weights = {name: getattr(self, name) for name in names}
        return {name: weight.detach() for name, weight in weights.items()} if self.frozen else weights


@torch.fx.wrap  # whose tracer then keeps it as one call: its symbols have no shape to look at
def _activate(x: Tensor, weights: dict[str, Tensor], neighborhood: int, scale: int, name: str) -> Tensor:
    _check(x, weights["conv1"].shape[1], name)
    s, c = SF.scores(x, **weights, neighborhood=neighborhood)
    return SF.sparta(x, s, c, scale)  # Eq. 8


def _check(x: Tensor, in_channels: int, name: str) -> None:
    if SF.traced():
        return
    if x.ndim != 4 or x.shape[1] != in_channels or x.shape[2] == 0 or x.shape[3] == 0:
        raise ShapeError(
            f"{name}({in_channels}) was given {tuple(x.shape)}; it takes (N, {in_channels}, H, W)"
        )


def _filters(out_channels: int, in_channels: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
