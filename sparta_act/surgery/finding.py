"""Finds the blocks and the ReLU calls of a network, and how to edit each call."""

from collections import Counter
from collections.abc import Callable, Iterator

from torch import nn

from sparta_act.errors import SiteError
from sparta_act.surgery.blocks import Slot, Slots, groups_of_blocks
from sparta_act.surgery.branches import check_all_seen, check_block, runs_once
from sparta_act.surgery.kinds import KINDS, hint, in_words
from sparta_act.surgery.locating import locate_all
from sparta_act.surgery.recording import Event, Pass, record
from sparta_act.surgery.rewriting import MARK, NAME, Span, original_class
from sparta_act.surgery.sandbox import Example
from sparta_act.surgery.sites import Cut, Site, SiteList

SWAPPED = "_sparta_swapped"  # attribute of a module: by key, the child that was there and the one put there
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

UNWRAP = (
    "undo what has put it there (accelerate: remove_hook_from_module(model, recurse=True)), then type "
    'for m in model.modules(): vars(m).pop("forward", None); replace the ReLUs, and wrap or compile again'
)

Seen = list[tuple[Pass, Event]]  # one call, in each pass it was seen in


def inner(module: nn.Module) -> nn.Module:
    """The network inside nn.DataParallel and torch.compile."""
    while (
        child := module._modules.get("module" if isinstance(module, nn.DataParallel) else "_orig_mod")
    ) is not None:
        module = child
    return module


def replaced(model: nn.Module) -> list[nn.Module]:
    """The modules that earlier replacements put in."""
    found = []
    for module in model.modules():
        keys = [*vars(module).get(SWAPPED, ()), *([NAME] if MARK in vars(type(module)) else [])]
        found += [m for k in keys if (m := module._modules.get(k)) is not None]
    return found


def find_sites(model: nn.Module, example: Example | None, kinds: frozenset[str]) -> tuple[SiteList, Example]:
    """The blocks, then all other calls of these kinds on feature maps; and the example they were seen on."""
    passes, example = record(model, replaced(model), example)
    slots = {id(s.module): s for s in reversed([*_walk(model)])}  # a module has its first name
    known = {*map(id, model.modules())}
    if any(id(m) not in known for p in passes for e in p.events for m in e.modules):
        raise SiteError("the network makes modules in its first pass; run it once on an input before")
    sites = [
        _block_site(slot, slots, passes, kinds, g, b)
        for g, group in enumerate(groups_of_blocks(slots, passes[0]), 1)
        for b, slot in enumerate(group, 1)
    ]
    taken = {s.cut.place for s in sites if s.how}
    others = [s for s in _other_sites(slots, passes, kinds) if not s.how or s.cut.place not in taken]
    return SiteList([*sites, *others], _why_none(others, passes, kinds)), example


def _why_none(others: list[Site], passes: list[Pass], kinds: frozenset[str]) -> str:
    """Why the network has no site, as text."""
    if problems := sorted({f"{s.name}: {s.problem}" for s in others if s.problem}):
        return "\n".join([f"nothing: no call of {in_words(kinds)} can be replaced.", *problems])
    if any(e.kind in kinds and e.on_map for e in passes[0].events):
        return (
            f"nothing: {in_words(kinds)} is called in the forward of the network itself, which has no name; "
            "make the call a module, such as nn.ReLU, of its own."
        )
    return f"nothing: no {in_words(kinds)} on a feature map{_instead(passes[0].events, lambda e: True)}."


def _walk(module: nn.Module, name: str = "", parent: nn.Module | None = None) -> Iterator[Slot]:
    module = inner(module)
    yield Slot(name, module, parent)
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{key}" if name else key, module)


def _block_site(
    slot: Slot,
    slots: Slots,
    passes: list[Pass],
    kinds: frozenset[str],
    group: int,
    block: int,
) -> Site:
    def inside(event: Event) -> bool:
        return any(m is slot.module for m in event.modules)

    seen = _last(passes, lambda e: (e.kind in kinds or e.kind == "replaced") and e.on_map and inside(e))
    problem = ""
    if any(e.kind == "replaced" for _, e in seen):
        problem = "it is replaced already; to replace it again, call restore_relus first"
    elif not seen:
        problem = f"the block has no {in_words(kinds)} on a feature map{_instead(passes[0].events, inside)}"
    if problem:
        return Site(slot.name, problem=problem, group=group, block=block)
    return _site(seen, slots, passes, kinds, slot.module, group, block)


def _instead(events: list[Event], accepted: Callable[[Event], bool]) -> str:
    """Which other activations there are, for the end of a sentence."""
    calls = [e for e in events if accepted(e) and e.kind not in ("add", "conv", "replaced")]
    on_maps = {e.kind for e in calls if e.on_map}
    elsewhere = {f"{e.kind} {e.no_map}" for e in calls if e.kind in KINDS}
    has = ", ".join(sorted(on_maps or elsewhere))
    return f", but {has}{hint(on_maps)}" if has else ""


def _other_sites(slots: Slots, passes: list[Pass], kinds: frozenset[str]) -> Iterator[Site]:
    """The activation modules, and for each other module the last such call in its own forward."""
    calls = [(p, e) for p in passes for e in p.events if e.kind in kinds and e.on_map]
    found: dict[tuple[int, str], dict[int, tuple[Pass, Event]]] = {}
    for p, event in calls:
        owner = event.modules[-1]
        parent, key = _child(event, passes) or (owner, "")
        if key or slots[id(owner)].name:  # the forward of the whole network has no name
            found.setdefault((id(parent), key), {})[id(p)] = p, event
    for of_one in found.values():
        seen = list(of_one.values())
        yield _site(seen, slots, passes, kinds, seen[0][1].modules[-1])
    counts = [Counter(id(e.act) for of, e in calls if of is p) for p in passes]
    for slot in slots.values():
        often = max(count[id(slot.module)] for count in counts)
        if often > 1:
            problem = f"it is called {often} times in one pass; name the module that calls it"
            yield Site(slot.name, calls=often, problem=problem)


def _last(passes: list[Pass], accepted: Callable[[Event], bool]) -> Seen:
    found = [(p, [e for e in p.events if accepted(e)]) for p in passes]
    return [(p, events[-1]) for p, events in found if events]


def _child(event: Event, passes: list[Pass]) -> tuple[nn.Module, str] | None:
    """Where the module of the event is registered: one place below its caller, who calls it once."""
    owner = event.modules[-1]
    places = [(m, key) for m in owner.modules() for key, child in m._modules.items() if child is event.act]
    calls = max(p.counts[event.caller] for p in passes)
    return places[0] if event.act and len(places) == 1 and calls == 1 else None


def _site(
    seen: Seen,
    slots: Slots,
    passes: list[Pass],
    kinds: frozenset[str],
    within: nn.Module,
    group: int = 0,
    block: int = 0,
) -> Site:
    """The site of a call, with its edit or with the problem that prevents one."""
    event = seen[0][1]
    owner = event.modules[-1]
    calls = max(p.counts[event.place] for p in passes)
    try:
        target, key, spans = _edit(seen, passes, kinds)
        if group:
            check_block(event, passes, within, replaced(within), kinds)
        if calls > 1:
            raise SiteError(f"it runs {calls} times in one pass; operate on a module that runs it once")
    except SiteError as error:
        name = slots[id(owner)].name
        return Site(name, event.shape[1], calls, problem=str(error), group=group, block=block)
    name = ".".join(filter(None, (slots[id(target)].name, "" if spans else key)))
    assert event.like is not None
    original = {p.training: e.original for p, e in seen if e.original}
    cut = Cut(target, key, spans, within, event.like, original)
    return Site(name, event.shape[1], calls, "rewrite" if spans else "swap", "", group, block, cut)


def _edit(seen: Seen, passes: list[Pass], kinds: frozenset[str]) -> tuple[nn.Module, str, tuple[Span, ...]]:
    """What to change: a child of a module (no spans), or calls in the forward of a module."""
    events = [event for _, event in seen]
    child, owner = _child(events[0], passes), events[0].modules[-1]
    if any(_child(e, passes) != child or e.modules[-1] is not owner for e in events):
        raise SiteError("its last ReLU is called by another module in some passes than in others")
    last = {e.offset for e in events if e.offset >= 0}
    if child and runs_once(*child, passes, kinds):
        if any(getattr(events[0].act, hooks) for hooks in HOOKS):
            raise SiteError("its ReLU has hooks, which would go with it; remove them first")
        check_all_seen(owner, last, passes, child[1], kinds)
        return *child, ()
    if "forward" in vars(owner):
        raise SiteError(f"the module has a forward of its own, which hides that of its class; {UNWRAP}")
    for event in events:
        if event.offset < 0:
            forward = f"{original_class(owner).__qualname__}.forward"
            raise SiteError(
                f"its ReLU is called in {event.via}, not in one expression of {forward}; write the call into "
                "that forward, or make it an nn.ReLU of its own"
            )
    check_all_seen(owner, last, passes, "", kinds)
    if hasattr(owner, NAME):
        raise SiteError(f"the module has an attribute {NAME!r} already; give that another name")
    return owner, NAME, locate_all(type(owner), last)
