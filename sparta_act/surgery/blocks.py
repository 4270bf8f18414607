"""Finds the blocks of a network, and groups them."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from sparta_act.surgery.origins import ALONE, KERNEL, LAST, WEIGHTS
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
            if event.kind != "add" and event.no_map not in (WEIGHTS, KERNEL):
                (convolving if event.kind == "conv" else active)[id(module)] += 1

    def is_unit(module: nn.Module) -> bool:
        plain = not module._modules or type(module).forward is nn.Sequential.forward
        return id(module) in convolving and id(module) in active and not plain

    units = sorted((s for s in slots.values() if is_unit(s.module)), key=lambda s: order[id(s.module)])
    adding = [next(filter(is_unit, reversed(e.modules)), None) for e in seen.events if _adds_maps(e)]
    residual = {original_class(m) for m in adding if m is not None}
    if residual:
        blocks = [s for s in units if original_class(s.module) in residual]
        return _in_containers(blocks, slots) or _stages(_innermost(blocks), slots)
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
    stages = {type(s.module) for s in slots.values() if _has_several(s.module, inside, found)}
    wrapped = {s: _outermost(s, slots, inside, stages, found) for s in blocks}
    tops = {id(top.module) for top, _ in wrapped.values()}
    holders, beside = dict[Slot, nn.Module](), dict[Slot, nn.Module]()
    for slot, (top, alone) in wrapped.items():
        if top.parent is not None and _is_holder(top.parent, tops, found):
            (holders if alone else beside)[slot] = top.parent
    taken = {*map(id, holders.values())}
    several = len(taken | {*map(id, beside.values())}) > 1
    holders |= {s: holder for s, holder in beside.items() if several or id(holder) in taken}
    taken = {*map(id, holders.values())}
    for slot, (top, _) in wrapped.items():
        if slot in holders or slot.parent is None or top.parent is None:
            continue
        of_network = slots[id(top.parent)].parent is None
        if (top is slot or of_network) and _is_holder(slot.parent, found, found):
            holders[slot] = slot.parent
        elif taken and not of_network and id(top.parent) not in found and inside[id(top.parent)] > 1:
            beside_others = any(id(m) in taken for m in top.parent.modules())  # as a downsampling is
            # a stage with its blocks as attributes, where others are containers
            holders |= {} if beside_others else {slot: top.parent}
    return _gathered(_innermost([s for s in blocks if s in holders]), lambda s: id(holders[s]))


def _has_several(module: nn.Module, inside: Counter[int], found: set[int]) -> bool:
    """Whether several children are blocks or hold some: a wrapper around a whole stage has one child."""
    if inside[id(module)] < 2:
        return False
    return sum(inside[id(c)] > 0 or id(c) in found for c in map(inner, module.children())) > 1


def _above(slot: Slot, slots: Slots) -> Iterator[nn.Module]:
    while slot.parent is not None:
        yield slot.parent
        slot = slots[id(slot.parent)]


def _outermost(
    slot: Slot, slots: Slots, inside: Counter[int], stages: set[type], found: set[int]
) -> tuple[Slot, bool]:
    """The outermost wrapper of a block, itself if it has none; and whether wrappers hold nothing else."""
    alone = True

    def top_level(outer: Slot) -> bool:
        return outer.parent is not None and slots[id(outer.parent)].parent is None

    while slot.parent is not None:
        outer = slots[id(slot.parent)]
        if outer.parent is None or id(outer.module) in found or inside[id(outer.module)] > 1:
            break
        others = [c for c in outer.module.children() if inner(c) is not slot.module]
        if isinstance(outer.module, CONTAINERS):  # of one block and a dropout, say, among its like
            held = isinstance(outer.parent, CONTAINERS)
            if not held or not others or any(True for c in others for _ in c.parameters()):
                break
        elif type(outer.module) in stages or (top_level(outer) and not isinstance(outer.parent, CONTAINERS)):
            break
        slot, alone = outer, alone and not others
    return slot, alone


def _held(blocks: list[Slot]) -> list[Slot]:
    """Those in a Sequential, ModuleList or ModuleDict, or in another module that has no other children."""
    found = {id(s.module) for s in blocks}
    return [s for s in blocks if _is_holder(s.parent, found, found)]


def _is_holder(parent: nn.Module | None, taken: set[int], found: set[int]) -> bool:
    if isinstance(parent, CONTAINERS):
        return True
    if parent is None or id(parent) in found:  # a block holds no blocks
        return False
    return all(id(inner(c)) in taken for c in parent.children())


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


def _stages(blocks: list[Slot], slots: Slots) -> list[list[Slot]]:
    """Blocks outside any container, by the part of the network that they are in."""
    paths = {s: _unwrapped_name(s, slots).split(".") for s in blocks}
    depth = next((i for i, level in enumerate(zip(*paths.values(), strict=False)) if len({*level}) > 1), 0)
    if any(len(path) <= depth + 1 for path in paths.values()):  # a block itself is such a part
        siblings = {len(path) for path in paths.values()} == {depth + 1}
        return [blocks] if depth and siblings else []
    return _gathered(blocks, lambda s: paths[s][depth])


def _unwrapped_name(slot: Slot, slots: Slots) -> str:
    """The name of the outermost wrapper that holds nothing else; a part of the network itself is none."""
    while slot.parent is not None and len(slot.parent._modules) == 1:
        outer = slots[id(slot.parent)]
        if outer.parent is None or slots[id(outer.parent)].parent is None:
            break
        slot = outer
    return slot.name
