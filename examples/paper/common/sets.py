"""Sets of SPARTA: the shuffled control, and which shipped set a training reproduces."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch

from sparta_act import Sparta, SpartaSet
from sparta_act.pretrained import SETS, SHIPPED


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


def trained_alike(settings: Mapping[str, Any]) -> str | None:
    """Short name of the shipped set that was trained with these settings, if there is one."""
    wanted = in_pixels(settings)
    for name in SHIPPED:
        if (SETS / name).is_dir() and wanted.items() <= _recipe(name).items():
            return name
    return None


@functools.cache
def _recipe(name: str) -> dict[str, Any]:
    recipe: dict[str, Any] = Sparta.from_pretrained(name).info.get("recipe", {})
    return recipe
