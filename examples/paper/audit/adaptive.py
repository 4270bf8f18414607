"""SPARTA's gate under suspicion: networks whose gradients go around it, and what it does to a gradient."""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.paper.attacks.losses import cross_entropy
from examples.paper.attacks.pgd import attacking
from examples.paper.common.gates import gates
from sparta_act import Sparta
from sparta_act import functional as SF

Substitute = Callable[[Sparta, Tensor], Tensor]


def gate_detached(sparta: Sparta, x: Tensor) -> Tensor:
    """max(x, 0) times a gate that is taken for a constant."""
    return F.relu(x) * sparta.attention(x).detach().to(x.dtype)


def gate_one(sparta: Sparta, x: Tensor) -> Tensor:
    """max(x, 0), as if there were no gate."""
    return F.relu(x)


def rescaled(sparta: Sparta, x: Tensor, *, factor: float) -> Tensor:
    """SPARTA as steep as it would be if its logit were `factor` times as large: a hard gate becomes soft."""
    s, c = sparta.scores(x)
    logit = s * c
    gate = sparta.scale * torch.sigmoid(factor * logit.detach() + (logit - logit.detach()))
    return F.relu(x) * gate.to(x.dtype)


def dpnet_frozen(sparta: Sparta, x: Tensor) -> Tensor:
    """SPARTA whose predicted kernel is taken for a constant: each image has an ordinary conv5 of its own."""
    if not sparta.dynamic:
        return sparta(x)
    n = sparta.neighborhood
    glance = SF.pool(SF.average(x, n) if n > 1 else x).to(x.dtype)
    kernels = F.conv2d(glance, sparta.conv6, padding=1).detach()
    static = copy.copy(sparta)  # of the same class, with whatever that does to the scores
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


class Through(nn.Module):
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


def around(model: nn.Module, substitute: Substitute) -> nn.Module:
    """A copy of the network with the gradients of the substitute in place of each SPARTA's."""
    twin = copy.deepcopy(model)
    if isinstance(twin, Sparta):
        return Through(twin, substitute)
    places = [(n, m) for n, m in twin.named_modules(remove_duplicate=False) if isinstance(m, Sparta)]
    for name, sparta in places:
        parent, _, child = name.rpartition(".")
        twin.get_submodule(parent).add_module(child, Through(sparta, substitute))
    return twin


class Gate(NamedTuple):
    """What one site does, image by image."""

    closed: Tensor  # (N,): share of its sigmoid below 0.01
    open: Tensor  # (N,): above 0.99
    ratio: Tensor  # (N,): gradient norm behind the site by that behind a ReLU in its place
    histogram: (
        Tensor  # (50,): counts of the sigmoid's values from 0 to 1; with `identity` the gate is twice it
    )


def statistics(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 100) -> dict[str, Gate]:
    """Of each SPARTA on these images, with the gradient of the cross-entropy.

    `ratio` compares, at the same input and for the same gradient from above, what SPARTA passes on with what
    ReLU would. Shapes: x (N, C, H, W) in [0, 1], y (N,).
    """
    found: dict[str, list[Gate]] = {}
    with attacking(model):
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            for name, gate in _look(model, images, labels).items():
                found.setdefault(name, []).append(gate)
    return {
        name: Gate(
            *(torch.cat([getattr(p, k) for p in parts]) for k in ("closed", "open", "ratio")),
            torch.stack([p.histogram for p in parts]).sum(0),
        )
        for name, parts in found.items()
    }


def _look(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Gate]:
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        again = sum(key.partition(" #")[0] == name for key in calls)
        key = f"{name} #{again + 1}" if again else name
        calls[key] = inputs[0].detach().clone(), output

    modules = gates(model)
    handles = [m.register_forward_hook(partial(watch, name)) for name, m in modules.items()]
    try:
        with torch.enable_grad():
            loss = cross_entropy(model(x.detach().requires_grad_()), y).sum()
            if not calls or not loss.requires_grad:
                return {}
            outputs = [output for _, output in calls.values()]
            above = torch.autograd.grad(loss, outputs, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return {
        key: _gate(modules[key.partition(" #")[0]], inside, grad)
        for (key, (inside, _)), grad in zip(calls.items(), above, strict=True)
        if grad is not None
    }


def _gate(sparta: Sparta, x: Tensor, grad: Tensor) -> Gate:
    with torch.no_grad():
        gate = SF.attention(*sparta.scores(x)).float()  # without the factor of `identity`
    with torch.enable_grad():
        x = x.requires_grad_()
        (passed,) = torch.autograd.grad(sparta(x), x, grad)
    by_relu = grad * (x.detach() > 0)
    norms = [t.flatten(1).double().norm(dim=1) for t in (passed, by_relu)]
    return Gate(
        (gate < 0.01).float().flatten(1).mean(1).cpu(),
        (gate > 0.99).float().flatten(1).mean(1).cpu(),
        torch.where(norms[1] > 0, norms[0] / norms[1], 1.0).cpu(),  # nothing came from above: nothing is lost
        torch.histc(gate, 50, 0, 1).cpu(),
    )
