"""What SPARTA's gate does to images and to gradients, site by site."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.paper.attacks.losses import cross_entropy
from examples.paper.attacks.pgd import attacking
from examples.paper.common.gates import gates
from sparta_act import Sparta
from sparta_act import functional as SF


class Gate(NamedTuple):
    """One site, image by image."""

    closed: Tensor  # (N,): share of its sigmoid below 0.01
    open: Tensor  # (N,): above 0.99
    ratio: Tensor  # (N,): norm of the gradient that it passes on, by that of a ReLU at the same input
    histogram: Tensor  # (50,): counts of the sigmoid's values from 0 to 1, without the factor of `identity`


def statistics(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 100) -> dict[str, Gate]:
    """`Gate` of each call of a SPARTA, with the gradient of the cross-entropy.

    Shapes: x (N, C, H, W) in [0, 1], y (N,).
    """
    found: dict[str, list[Gate]] = {}
    with attacking(model):
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            for name, gate in _of_batch(model, images, labels).items():
                found.setdefault(name, []).append(gate)
    return {
        name: Gate(
            *(torch.cat([getattr(p, k) for p in parts]) for k in ("closed", "open", "ratio")),
            torch.stack([p.histogram for p in parts]).sum(0),
        )
        for name, parts in found.items()
    }


def _of_batch(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Gate]:
    calls: dict[str, tuple[Sparta, Tensor, Tensor]] = {}  # by the name, or "NAME #2" for a second call

    def record(name: str, module: Sparta, inputs: tuple[Tensor], output: Tensor) -> None:
        earlier = sum(key.partition(" #")[0] == name for key in calls)
        key = f"{name} #{earlier + 1}" if earlier else name
        calls[key] = module, inputs[0].detach().clone(), output

    handles = [m.register_forward_hook(partial(record, name)) for name, m in gates(model).items()]
    try:
        with torch.enable_grad():
            loss = cross_entropy(model(x.detach().requires_grad_()), y).sum()
            if not calls or not loss.requires_grad:
                return {}
            outputs = [output for *_, output in calls.values()]
            grads = torch.autograd.grad(loss, outputs, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return {
        key: _of_call(sparta, inside, grad)
        for (key, (sparta, inside, _)), grad in zip(calls.items(), grads, strict=True)
        if grad is not None
    }


def _of_call(sparta: Sparta, x: Tensor, grad: Tensor) -> Gate:
    """From a call's input and the gradient of its output. Shapes: x, grad (N, C, H, W)."""
    with torch.no_grad():
        gate = SF.attention(*sparta.scores(x)).float()
    with torch.enable_grad():
        x = x.requires_grad_()
        (passed,) = torch.autograd.grad(sparta(x), x, grad)
    by_relu = grad * (x.detach() > 0)
    norms = [t.flatten(1).double().norm(dim=1) for t in (passed, by_relu)]
    return Gate(
        (gate < 0.01).float().flatten(1).mean(1).cpu(),
        (gate > 0.99).float().flatten(1).mean(1).cpu(),
        torch.where(norms[1] > 0, norms[0] / norms[1], 1.0).cpu(),  # without a gradient nothing is lost
        torch.histc(gate, 50, 0, 1).cpu(),
    )
