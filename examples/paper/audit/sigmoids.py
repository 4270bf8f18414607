"""Sigmoid-like calls of any network: how saturated they are, and gradients that go around them.

Seen are sigmoid, hardsigmoid and tanh of tensors that depend on the image. A gate that is made of other
operations, such as exp, clamp or a comparison, is not.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from examples.paper.attacks.pgd import attacking

LOW = {  # of the values; 1 is the highest of all
    torch.sigmoid: 0.0,
    Tensor.sigmoid: 0.0,
    Tensor.sigmoid_: 0.0,
    torch.special.expit: 0.0,
    F.hardsigmoid: 0.0,
    torch.tanh: -1.0,
    Tensor.tanh: -1.0,
    Tensor.tanh_: -1.0,
}
NEAR = 0.01  # of the whole range, from either end
IN_PLACE = (Tensor.sigmoid_, Tensor.tanh_)
Call = Callable[..., Tensor]


class _Watching(TorchFunctionMode):
    """Calls `see(function, result)` for every sigmoid-like call on the way from the image to the logits."""

    def __init__(self, see: Callable[[Call, Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in LOW and result.requires_grad:
            self.see(function, result.detach())
        return result


def saturation(model: nn.Module, x: Tensor, batch_size: int = 100) -> dict[str, list[float]]:
    """Share of the values of each sigmoid-like call that are near one of their ends, image by image.

    A call is named after its module, a second one of a module has "#2". Shapes: x (N, C, H, W).
    """
    found: dict[str, list[float]] = {}
    with attacking(model), torch.enable_grad():
        for images in x.split(batch_size):
            for name, near in _of_batch(model, images).items():
                found.setdefault(name, []).extend(near)
    return {name: near for name, near in found.items() if len(near) == len(x)}


def _of_batch(model: nn.Module, x: Tensor) -> dict[str, list[float]]:
    near: dict[str, list[float]] = {}
    calls, inside = Counter[str](), list[str]()  # the modules that run, the innermost last

    def see(function: Call, values: Tensor) -> None:
        name = inside[-1] if inside else "the network itself"
        calls[name] += 1
        if values.ndim and len(values) == len(x):
            share = (values.float() - LOW[function]) / (1 - LOW[function])
            ends = ((share < NEAR) | (share > 1 - NEAR)).float().reshape(len(x), -1).mean(1)
            near[name if calls[name] == 1 else f"{name} #{calls[name]}"] = ends.tolist()

    handles = []
    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
                handles.append(module.register_forward_hook(lambda *_: inside.pop() and None))
        with _Watching(see):
            model(x.clone().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    return near


def constant(function: Call, z: Tensor) -> Tensor:
    """No gradient through the gate."""
    return function(z.detach())


def softened(function: Call, z: Tensor) -> Tensor:
    """The gate of a logit that is divided by its standard deviation over the image, where that is above 1."""
    if z.ndim == 0 or z.numel() <= len(z):
        return function(z)  # a single number an image has no deviation
    size = z.detach().flatten(1).std(1).clamp(min=1).view(-1, *[1] * (z.ndim - 1))
    return function(z / size)


SUBSTITUTES: Mapping[str, Callable[[Call, Tensor], Tensor]] = {
    "sigmoids as constants": constant,
    "sigmoids softened": softened,
}


class Around(nn.Module):
    """A network whose sigmoid-like calls have their own values and the gradients of a substitute.

    Source: backward pass differentiable approximation, Athalye et al. 2018, arXiv:1802.00420.
    """

    def __init__(self, model: nn.Module, substitute: Callable[[Call, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.substitute = model, substitute

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, K)."""
        with _Replacing(self.substitute):
            answer = self.model(x)
        # where no other way is left, the gradient is 0, and PGD stays where it is
        nothing = 0 * x.flatten(1).sum(1)
        return answer + nothing.view(-1, *[1] * (answer.ndim - 1))


class _Replacing(TorchFunctionMode):
    def __init__(self, substitute: Callable[[Call, Tensor], Tensor]) -> None:
        super().__init__()
        self.substitute = substitute

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in LOW or function in IN_PLACE or not result.requires_grad:
            return result
        other = self.substitute(function, args[0] if args else kwargs["input"])
        return result.detach() + (other - other.detach())
