"""Finds the blocks of a network, and groups them."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from sparta_act.surgery.origins import ALONE, LAST
from sparta_act.surgery.recording import Event, Pass, inner
from sparta_act.surgery.rewriting import original_class


class Slot(NamedTuple):
    """A module, its dotted name, the module it is a child of, and its key there."""

    name: str
    module: nn.Module
    parent: nn.Module | None
    key: str = ""


Slots = dict[int, Slot]  # by the id of the module
CONTAINERS = nn.Sequential | nn.ModuleList | nn.ModuleDict


def groups_of_blocks(slots: Slots, seen: Pass) -> list[list[Slot]]:
    """The blocks that run, by the container that holds them, in the order in which they run.

    A residual block has convolutions and activations, and its class adds two maps of one shape; without a
    container, a group is the part of the network that holds it. In a network that adds nothing, a block has
    several convolutions and activations, and its siblings are of its class. No block holds another. A wrapper
    around each block, alone in it or beside what it runs more, changes no group.
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
    adding = [next(filter(is_unit, reversed(e.modules)), None) for e in seen.events if _adds_maps(e)]
    residual = {original_class(m) for m in adding if m is not None}
    if residual:
        blocks = [s for s in units if original_class(s.module) in residual]
        return _in_containers(blocks, slots) or _stages(_innermost(blocks))
    blocks = [s for s in units if min(convolving[id(s.module)], active[id(s.module)]) > 1]
    groups = _gathered(_innermost(_held(blocks)), lambda s: id(s.parent))
    return [g for g in groups if len({original_class(s.module) for s in g}) == 1 and _among_its_like(g)]


def _adds_maps(event: Event) -> bool:
    return event.kind == "add" and event.no_map in ("", LAST, ALONE)


def _in_containers(blocks: list[Slot], slots: Slots) -> list[list[Slot]]:
    """Blocks by the container that holds them or their wrappers; those outside any are left out.

    A module around one block that runs more than it, such as an attention beside it, is a wrapper too, unless
    all blocks would become one group: then it is a stage.
    """
    found = {id(s.module) for s in blocks}
    inside = Counter(id(m) for s in _innermost(blocks) for m in _above(s, slots))
    stages = {type(s.module) for s in slots.values() if inside[id(s.module)] > 1}
    alone, beside = dict[int, nn.Module](), dict[int, nn.Module]()
    for slot in blocks:
        wrappers = [*_wrappers(slot, slots, stages, found)]
        holder = wrappers[-1].parent if wrappers else slot.parent
        if wrappers and isinstance(holder, CONTAINERS):
            single = all(len([*w.module.children()]) == 1 for w in wrappers)
            (alone if single else beside)[id(slot.module)] = holder
        elif slot.parent is not None and _is_holder(slot.parent, found):
            alone[id(slot.module)] = slot.parent
    holders = alone | beside if len({*map(id, (alone | beside).values())}) > 1 else alone
    held = _innermost([s for s in blocks if id(s.module) in holders])
    return _gathered(held, lambda s: id(holders[id(s.module)]))


def _above(slot: Slot, slots: Slots) -> Iterator[nn.Module]:
    while slot.parent is not None:
        yield slot.parent
        slot = slots[id(slot.parent)]


def _wrappers(slot: Slot, slots: Slots, stages: set[type], found: set[int]) -> Iterator[Slot]:
    """The modules around this block, the innermost first, up to a stage, a container or another block."""
    while (parent := slot.parent) is not None and not isinstance(parent, CONTAINERS):
        slot = slots[id(parent)]
        if slot.parent is None or type(parent) in stages or id(parent) in found:
            break
        yield slot


def _held(blocks: list[Slot]) -> list[Slot]:
    """Those in a Sequential, ModuleList or ModuleDict, or in another module that has no other children."""
    found = {id(s.module) for s in blocks}
    return [s for s in blocks if _is_holder(s.parent, found)]


def _is_holder(parent: nn.Module | None, found: set[int]) -> bool:
    if isinstance(parent, CONTAINERS):
        return True
    if parent is None or id(parent) in found:  # a block holds no blocks
        return False
    return all(id(inner(c)) in found for c in parent.children())


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


def _stages(blocks: list[Slot]) -> list[list[Slot]]:
    """Blocks outside any container, by the part of the network that they are in."""
    paths = [s.name.split(".") for s in blocks]
    depth = next((i for i, level in enumerate(zip(*paths, strict=False)) if len({*level}) > 1), 0)
    if any(len(path) <= depth + 1 for path in paths):  # a block itself is such a part
        return []
    return _gathered(blocks, lambda s: s.name.split(".")[depth])
