"""Sets of SPARTA: the shuffled control, and settings as a card shows them."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from sparta_act import SpartaSet


def shuffled(taken: SpartaSet, seed: int) -> SpartaSet:
    """A copy of a set, the numbers within each parameter in random order: same values, nothing learned."""
    taken, generator = copy.deepcopy(taken), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (p for activation in taken.values() for p in activation.parameters()):
            p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p))
    return taken


def in_pixels(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training as on a set's card: bound and step size of the attack in units of 1/255."""
    return dict(settings) | {k: f"{255 * settings[k]:g}/255" for k in ("eps", "step_size")}
