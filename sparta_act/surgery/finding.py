"""Finds the blocks of a network and the calls of ReLU outside them."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from sparta_act.surgery.blocks import Slot, groups_of_blocks
from sparta_act.surgery.editing import last_site
from sparta_act.surgery.kinds import KINDS, hint, in_words
from sparta_act.surgery.lasts import last_call, looks_like_a_map
from sparta_act.surgery.network import SWAPPED, Network, Places, put_by_hand, replaced
from sparta_act.surgery.passes import record
from sparta_act.surgery.recording import Event, Pass
from sparta_act.surgery.rewriting import NAME
from sparta_act.surgery.sandbox import Example, Steps
from sparta_act.surgery.sites import Site, SiteList, size_of

REPLACED = "it is replaced already; to replace it again, call restore_relus first"
BY_HAND = "it is one of our activations already, which no replacement has put there; set a module there"


class Found(NamedTuple):
    """What a look has found: the sites, and the network on its example."""

    sites: SiteList
    network: Network
    example: Example


def find_sites(
    model: nn.Module, example: Example | None, kinds: frozenset[str], undo: Steps | None = None
) -> Found:
    """The blocks, then all other calls of these kinds on feature maps."""
    put_in = replaced(model)
    ours = put_in | put_by_hand(model, put_in)
    passes, example = record(model, [*ours.values()], example, undo)
    network = Network(model, put_in, ours, passes, kinds)
    sites = [
        _block_site(slot, network, g, b)
        for g, group in enumerate(groups_of_blocks(network.slots, passes[0]), 1)
        for b, slot in enumerate(group, 1)
    ]
    others = [*_other_sites(network, {s.cut.place for s in sites if s.how})]
    sites += [*others, *_replaced_sites(network, {id(s.activation) for s in sites})]
    return Found(
        SiteList(sites, _why_none(others, passes, kinds), _summary(model, network)), network, example
    )


def _why_none(others: list[Site], passes: list[Pass], kinds: frozenset[str]) -> str:
    """Why the network has no site, as text."""
    if problems := sorted({f"{s.name or 'the network'}: {s.problem}" for s in others if s.problem}):
        return "\n".join([f"nothing: no call of {in_words(kinds)} can be replaced.", *problems])
    if any(e.kind in kinds and e.on_map for e in passes[0].events):
        return (
            f"nothing: {in_words(kinds)} is called in the forward of the network itself, which has no name; "
            'replace "all", or make the call a module, such as nn.ReLU, of its own.'
        )
    return f"nothing: no {in_words(kinds)} on a feature map{_instead(passes[0].events)}."


def _block_site(slot: Slot, network: Network, group: int, block: int) -> Site:
    """The site of a block: its last call on a feature map, outside the shortcut."""
    kinds, inside = network.kinds, [(p, p.inside.get(id(slot.module), [])) for p in network.passes]
    last = [(p, last_call(p, numbers, kinds | {"replaced"})) for p, numbers in inside]
    seen = [(p, event) for p, event in last if event]
    problem = ""
    if done := next((e for _, e in seen if e.kind == "replaced"), None):
        return _replaced_site(done, network, group, block)
    if not seen:
        events = [network.passes[0].events[i] for i in inside[0][1]]
        problem = f"the block has no {in_words(kinds)} on a feature map{_instead(events)}"
    elif form := next((e.no_map for _, e in seen if not e.on_map), ""):
        problem = f"its last {in_words(kinds)} runs {form}; call it on (N, C, ...), or name an earlier one"
    if problem:
        return Site(slot.name, problem=problem, group=group, block=block)
    return last_site(seen, network, slot.module, group, block)


def _instead(events: list[Event]) -> str:
    """Which other activations there are, for the end of a sentence."""
    calls = [e for e in events if e.kind not in ("add", "conv", "replaced")]
    on_maps = {e.kind for e in calls if e.on_map}
    elsewhere = {f"{e.kind} {e.no_map}" for e in calls if e.kind in KINDS}
    has = ", ".join(sorted(on_maps or elsewhere))
    return f", but {has}{hint(on_maps)}" if has else ""


def _other_sites(network: Network, taken: set[tuple[nn.Module, str]]) -> Iterator[Site]:
    """The activation modules, and for each other module the last such call in its own forward."""
    calls = [(p, e) for p in network.passes for e in p.events if e.kind in network.kinds and e.on_map]
    found: dict[tuple[int, str], dict[int, tuple[Pass, Event]]] = {}
    several = Counter[tuple[int, int]]()
    for p, event in calls:
        owner, child = event.modules[-1], network.child(event)
        parent, key = child or (owner, "")
        named = key or network.name(owner)  # the forward of the whole network has no name
        if named and (parent, key or NAME) not in taken:
            found.setdefault((id(parent), key), {})[id(p)] = p, event
        if child is None:
            several[id(p), id(event.act)] += 1
    for of_one in found.values():
        seen = list(of_one.values())
        yield last_site(seen, network, seen[0][1].modules[-1])
    often_called = {act for (_, act), often in several.items() if often > 1}
    for slot in network.slots.values():
        if id(slot.module) in often_called:
            often = max(several[id(p), id(slot.module)] for p in network.passes)
            problem = f"it is called {often} times in one pass; name the module that calls it"
            yield Site(slot.name, calls=often, problem=problem)


def _replaced_sites(network: Network, known: set[int]) -> Iterator[Site]:
    """Where earlier replacements put modules that run, outside the last calls of blocks."""
    for event in (e for p in network.passes for e in p.events if e.kind == "replaced"):
        if id(event.act) not in known:
            known.add(id(event.act))
            yield _replaced_site(event, network)


def _replaced_site(event: Event, network: Network, group: int = 0, block: int = 0) -> Site:
    new = event.act
    owner, key = network.place_of[id(new)]
    name = ".".join(filter(None, (network.name(owner), key)))
    problem = REPLACED if (owner, key) in network.put_in else BY_HAND
    return Site(name, event.shape[1], 1, type(new).__name__, problem, group, block, activation=new)


def _summary(model: nn.Module, network: Network) -> str:
    """How many calls there are, and how many parameters replacements have added."""
    calls = Counter[tuple[bool, object]]()
    for p in network.passes:  # of which each may make others
        calls |= Counter((looks_like_a_map(e), e.place) for e in p.events if e.kind in network.kinds)
    on_maps = sum(n for (of_map, _), n in calls.items() if of_map)
    text = f'{on_maps} calls of {in_words(network.kinds)} on feature maps ("all")'
    text += f", {calls.total() - on_maps} elsewhere" if calls.total() > on_maps else ""
    if network.put_in:
        now, before = size_of(model), size_before(model, network.put_in)
        text += f"\n{len(network.put_in)} replaced: {before:,} parameters before, {now:,} now"
        text += f" ({now / before:.2f} times)" if before else ""
    return text


def size_before(model: nn.Module, put_in: Places) -> int:
    """How many parameters a network had before its ReLUs were replaced by these modules."""
    new = {id(m) for one in put_in.values() for m in one.modules()}
    old = [m for m in model.modules() if id(m) not in new]
    old += [m for o in old for relu, *_ in vars(o).get(SWAPPED, {}).values() for m in relu.modules()]
    kept = {id(p): p for m in old for p in m._parameters.values() if p is not None}
    return sum(p.numel() for p in kept.values())
