"""SPARTA of a trained network, as a set stores it, its control, and which set came from which training."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparta_act import Sparta, SpartaSet
from sparta_act.pretrained import SETS, SHIPPED


def gates(model: nn.Module) -> dict[str, Sparta]:
    """The network's SPARTA by their dotted names."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Sparta)}


def activations_of(model: nn.Module) -> dict[str, Sparta]:
    """Activations of a network of `models.py` by their label: `layer1.1.act2` is at G1.B2."""
    found = {}
    for name, module in gates(model).items():
        group, block, _ = name.removeprefix("layer").split(".")
        found[f"G{group}.B{int(block) + 1}"] = module
    return found


def round_to_half(activations: dict[str, Sparta]) -> None:
    """Round every floating number of the activations, in place, to what float16 holds."""
    for module in activations.values():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.half().float()


def shuffled(taken: SpartaSet, seed: int) -> SpartaSet:
    """A copy of a set with the numbers of each parameter in random order: the same sizes, nothing learned."""
    taken, generator = copy.deepcopy(taken), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (p for activation in taken.values() for p in activation.parameters()):
            p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p))
    return taken


def in_pixels(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training as a set's card tells them: bounds and steps of the attack as parts of 255."""
    return dict(settings) | {k: f"{255 * settings[k]:g}/255" for k in ("eps", "step_size")}


def trained_alike(settings: Mapping[str, Any]) -> str | None:
    """Short name of the set in this package that was trained with these settings, if there is one."""
    told = in_pixels(settings)
    for name in SHIPPED:
        if (SETS / name).is_dir() and told.items() <= _recipe(name).items():
            return name
    return None


@functools.cache
def _recipe(name: str) -> dict[str, Any]:
    recipe: dict[str, Any] = Sparta.from_pretrained(name).info.get("recipe", {})
    return recipe
