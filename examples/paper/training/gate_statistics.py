"""What SPARTA's gates do to a batch of images, as numbers for the log."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.paper.attacks.pgd import attacking
from sparta_act import Sparta

ENDS, ALL_SITES = ("< 0.01", "> 0.99"), "all sites"  # of a log's columns


def gate_statistics(model: nn.Module, x: Tensor) -> dict[str, dict[str, float]]:
    """What each SPARTA's gate does to active elements of images x (N, C, H, W), by module name.

    Its mean and standard deviation, the share of its variance that is spatial (within the channels of an
    image, not between them), and the share of its sigmoid below 0.01 and above 0.99; and its gain. If the
    network has a SPARTA, `ALL_SITES` comes last: both shares of the elements of all sites together.
    """
    found: dict[str, dict[str, float]] = {}
    elements: dict[str, int] = {}

    def look(name: str) -> Any:
        def hook(module: Sparta, inputs: tuple[Tensor]) -> None:
            found[name], elements[name] = _of_site(module, inputs[0])

        return hook

    sites = [(n, m) for n, m in model.named_modules() if isinstance(m, Sparta)]
    handles = [m.register_forward_pre_hook(look(n)) for n, m in sites]
    try:
        with attacking(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        total = max(sum(elements.values()), 1)
        found[ALL_SITES] = {e: sum(n * found[s][e] for s, n in elements.items() if n) / total for e in ENDS}
    return found


def _of_site(module: Sparta, x: Tensor) -> tuple[dict[str, float], int]:
    """Statistics of one gate, and of how many active elements."""
    gate, active = module.attention(x).double(), x > 0
    means = (gate * active).sum((2, 3), keepdim=True) / active.sum((2, 3), keepdim=True).clamp(min=1)
    within, gate = (gate - means)[active], gate[active]
    spread = gate.std(correction=0)
    return {
        "gain": module.gain.item(),
        "mean": gate.mean().item(),
        "std": spread.item(),
        "spatial": (within.square().mean() / spread.square().clamp(min=1e-12)).item(),
        ENDS[0]: (gate < 0.01 * module.scale).double().mean().item(),
        ENDS[1]: (gate > 0.99 * module.scale).double().mean().item(),
    }, gate.numel()
