"""Adaptive attacks: copies of a network whose gradients go around SPARTA's gate, or that have none."""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from examples.paper.common.gates import gate_inputs
from sparta_act import Sparta
from sparta_act import functional as SF

Substitute = Callable[[Sparta, Tensor], Tensor]


def gate_detached(sparta: Sparta, x: Tensor) -> Tensor:
    """max(x, 0) times the gate as a constant."""
    return F.relu(x) * sparta.attention(x).detach().to(x.dtype)


def gate_one(sparta: Sparta, x: Tensor) -> Tensor:
    """max(x, 0), as if there were no gate."""
    return F.relu(x)


def rescaled(sparta: Sparta, x: Tensor, *, factor: float) -> Tensor:
    """SPARTA with the slope of a logit `factor` times as large: a hard gate becomes soft."""
    s, c = sparta.scores(x)
    logit = s * c
    gate = sparta.scale * torch.sigmoid(factor * logit.detach() + (logit - logit.detach()))
    return F.relu(x) * gate.to(x.dtype)


def dpnet_frozen(sparta: Sparta, x: Tensor) -> Tensor:
    """SPARTA with the predicted kernel as a constant: an ordinary conv5 for each image."""
    if not sparta.dynamic:
        return sparta(x)
    n = sparta.neighborhood
    glance = SF.pool(SF.average(x, n) if n > 1 else x).to(x.dtype)
    kernels = F.conv2d(glance, sparta.conv6, padding=1).detach()
    static = copy.copy(sparta)  # of the same class, which may compute the scores in its own way
    static._parameters, static.dynamic = sparta._parameters | {"conv5": kernels}, False
    return static(x)


SUBSTITUTES: dict[str, Substitute] = {
    "gate detached": gate_detached,
    "gate = 1": gate_one,
    "logit x 0.01": partial(rescaled, factor=0.01),
    "logit x 0.1": partial(rescaled, factor=0.1),
    "logit x 10": partial(rescaled, factor=10.0),
    "DPNet frozen": dpnet_frozen,
}


class BPDA(nn.Module):
    """A SPARTA with its own values and the gradients of a substitute.

    Source: backward pass differentiable approximation, Athalye et al. 2018, arXiv:1802.00420.
    """

    def __init__(self, sparta: Sparta, substitute: Substitute) -> None:
        super().__init__()
        self.sparta = sparta
        self.substitute = substitute

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W), kept."""
        y = self.substitute(self.sparta, x)
        return self.sparta(x).detach() + (y - y.detach())


class FixedGate(nn.Module):
    """max(x, 0) times numbers that do not depend on x, such as the mean of a gate."""

    def __init__(self, gate: Tensor) -> None:
        super().__init__()
        self.register_buffer("gate", gate)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W), kept."""
        return F.relu(x) * self.gate


class NoisyCopies(nn.Module):
    """The mean of a network's logits over copies of the image with uniform noise of at most `size`.

    Its gradient sees over ripples of the loss that are smaller than the noise.
    Source: expectation over transformation, Athalye et al. 2018, arXiv:1802.00420.
    """

    def __init__(self, model: nn.Module, size: float, copies: int = 6) -> None:
        super().__init__()
        self.model, self.size, self.copies = model, size, copies

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, K)."""
        noisy = (x + torch.empty_like(x).uniform_(-self.size, self.size) for _ in range(self.copies))
        return torch.stack([self.model(z.clamp(0, 1)) for z in noisy]).mean(0)


def bpda(model: nn.Module, substitute: Substitute) -> nn.Module:
    """A copy of the network in which each SPARTA has the gradients of the substitute."""
    return replaced(model, lambda _, sparta: BPDA(sparta, substitute))


def surrogates(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    """Copies of the network to attack instead: without its gates, and with each at its mean of a channel.

    The means are over active elements of images x (N, C, H, W); a gate that is not called keeps its 1. The
    statistics of batch norm are estimated anew on x, as those of the network with its gates fit neither copy.
    """
    means: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, calls in gate_inputs(model, x).items():
            if not calls:
                continue
            sparta = model.get_submodule(name)
            parts = [(sparta.attention(z).float(), (z > 0).float()) for z in calls]
            means[name] = mean_of_gates(parts, (0, 2, 3))
    found = {
        "its gates removed": replaced(model, lambda name, _: nn.ReLU()),
        "its gates at their mean": replaced(model, lambda name, _: FixedGate(means.get(name, torch.ones(1)))),
    }
    for surrogate in found.values() if len(x) > 1 else ():  # of one value there is no variance
        update_bn(x.chunk(-(-len(x) // 250)), surrogate)
    return found


def mean_of_gates(parts: list[tuple[Tensor, Tensor]], dims: tuple[int, ...]) -> Tensor:
    """Mean of gates over active elements, one half where there are none.

    `parts`: gates and where they are active, 0 or 1, both (N, C, H, W). The result has size 1 in `dims`.
    """
    total = torch.stack([(gate * active).sum(dims, keepdim=True) for gate, active in parts]).sum(0)
    count = torch.stack([active.sum(dims, keepdim=True) for _, active in parts]).sum(0)
    return torch.where(count > 0, total / count, 0.5)


def replaced(model: nn.Module, make: Callable[[str, Sparta], nn.Module]) -> nn.Module:
    """A copy of the network in which `make` has replaced each SPARTA, of a name, in all its places."""
    twin = copy.deepcopy(model)
    if isinstance(twin, Sparta):
        return make("", twin)
    sites = [(n, m) for n, m in twin.named_modules(remove_duplicate=False) if isinstance(m, Sparta)]
    first = {id(m): name for name, m in reversed(sites)}  # the name under which `gates` knows it
    for name, sparta in sites:
        parent, _, child = name.rpartition(".")
        twin.get_submodule(parent).add_module(child, make(first[id(sparta)], sparta))
    return twin.eval()
