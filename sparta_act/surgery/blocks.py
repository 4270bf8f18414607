"""Finds the blocks of a network, and groups them."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from sparta_act.surgery.recording import Pass
from sparta_act.surgery.rewriting import original_class


class Slot(NamedTuple):
    """A module, its dotted name, and the module it is a child of."""

    name: str
    module: nn.Module
    parent: nn.Module | None


Slots = dict[int, Slot]  # by the id of the module


def groups_of_blocks(slots: Slots, seen: Pass) -> list[list[Slot]]:
    """The blocks that run, by the container that holds them, in the order in which they run.

    A residual block has convolutions and activations, and its class adds two maps of one shape; without a
    container, a group is the part of the network that holds it. In a network that adds nothing, a block has
    several convolutions and activations, and its siblings are of its class. No block holds another.
    """
    order, convolving, active = dict[int, int](), Counter[int](), Counter[int]()
    for i, event in enumerate(seen.events):
        for module in event.modules:
            order.setdefault(id(module), i)
            if event.kind != "add":
                (convolving if event.kind == "conv" else active)[id(module)] += 1

    def is_unit(module: nn.Module) -> bool:
        plain = not module._modules or type(module).forward is nn.Sequential.forward
        return id(module) in convolving and id(module) in active and not plain

    units = sorted((s for s in slots.values() if is_unit(s.module)), key=lambda s: order[id(s.module)])
    additions = [e for e in seen.events if e.kind == "add" and len(e.shape) in seen.channels_second]
    adding = [next(filter(is_unit, reversed(e.modules)), None) for e in additions]
    residual = {original_class(m) for m in adding if m is not None}
    if residual:
        blocks = [s for s in units if original_class(s.module) in residual]
        return _gathered(_innermost(_held(blocks)), _holder) or _stages(_innermost(blocks))
    blocks = [s for s in units if min(convolving[id(s.module)], active[id(s.module)]) > 1]
    groups = _gathered(_innermost(_held(blocks)), _holder)
    return [g for g in groups if len({original_class(s.module) for s in g}) == 1 and _among_its_like(g)]


def _held(blocks: list[Slot]) -> list[Slot]:
    """Those in a Sequential, ModuleList or ModuleDict, or in another module that has no other children."""
    found = {id(s.module) for s in blocks}

    def is_held(parent: nn.Module | None) -> bool:
        if isinstance(parent, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            return True
        if parent is None or id(parent) in found:  # a block holds no blocks
            return False
        return all(id(c) in found for c in parent.children())

    return [s for s in blocks if is_held(s.parent)]


def _among_its_like(group: list[Slot]) -> bool:
    parent = group[0].parent
    return len(group) > 1 or (parent is not None and len(parent._modules) == 1)


def _innermost(blocks: list[Slot]) -> list[Slot]:
    found = {id(s.module) for s in blocks}

    def holds_another(module: nn.Module) -> bool:
        return any(id(m) in found for m in module.modules() if m is not module)

    return [s for s in blocks if not holds_another(s.module)]


def _gathered(blocks: list[Slot], key: Callable[[Slot], object]) -> list[list[Slot]]:
    groups: dict[object, list[Slot]] = {}
    for slot in blocks:
        groups.setdefault(key(slot), []).append(slot)
    return [*groups.values()]


def _holder(slot: Slot) -> int:
    return id(slot.parent)


def _stages(blocks: list[Slot]) -> list[list[Slot]]:
    """Blocks outside any container, by the part of the network that they are in."""
    paths = [s.name.split(".") for s in blocks]
    depth = next((i for i, level in enumerate(zip(*paths, strict=False)) if len({*level}) > 1), 0)
    if any(len(path) <= depth + 1 for path in paths):  # a block itself is such a part
        return []
    return _gathered(blocks, lambda s: s.name.split(".")[depth])
