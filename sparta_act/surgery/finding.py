"""Finds the blocks and the ReLU calls of a network, and how to edit each call."""

from collections import Counter
from collections.abc import Iterator

from torch import nn

from sparta_act.errors import SiteError
from sparta_act.surgery.blocks import Slot, Slots, groups_of_blocks
from sparta_act.surgery.branches import Forwards, check_all_seen, check_block, runs_once
from sparta_act.surgery.kinds import KINDS, hint, in_words
from sparta_act.surgery.lasts import last_call
from sparta_act.surgery.locating import locate_all
from sparta_act.surgery.passes import record
from sparta_act.surgery.recording import Event, Pass, inner
from sparta_act.surgery.rewriting import MARK, NAME, Span, original_class
from sparta_act.surgery.sandbox import Example, Steps
from sparta_act.surgery.sites import Cut, Site, SiteList

SWAPPED = "_sparta_swapped"  # attribute of a module: by key, the child that was there and the one put there
RELU_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

UNWRAP = (
    "undo what has put it there (accelerate: remove_hook_from_module(model, recurse=True)), then type "
    'for m in model.modules(): vars(m).pop("forward", None); replace the ReLUs, and wrap or compile again'
)

Seen = list[tuple[Pass, Event]]  # one call, in each pass it was seen in


def replaced(model: nn.Module) -> list[nn.Module]:
    """The modules that earlier replacements put in."""
    found = []
    for module in model.modules():
        keys = [*vars(module).get(SWAPPED, ()), *([NAME] if MARK in vars(type(module)) else [])]
        found += [m for k in keys if (m := module._modules.get(k)) is not None]
    return found


def find_sites(
    model: nn.Module, example: Example | None, kinds: frozenset[str], undo: Steps | None = None
) -> tuple[SiteList, list[Pass], Example]:
    """The blocks, then all other calls of these kinds on feature maps; the passes, and their example."""
    ours = replaced(model)
    passes, example = record(model, ours, example, undo)
    network = Network(model, ours, passes, kinds)
    sites = [
        _block_site(slot, network, g, b)
        for g, group in enumerate(groups_of_blocks(network.slots, passes[0]), 1)
        for b, slot in enumerate(group, 1)
    ]
    others = [*_other_sites(network, {s.cut.place for s in sites if s.how})]
    return SiteList([*sites, *others], _why_none(others, passes, kinds)), passes, example


class Network:
    """A network, its passes, and where its modules are registered."""

    def __init__(
        self, model: nn.Module, ours: list[nn.Module], passes: list[Pass], kinds: frozenset[str]
    ) -> None:
        self.passes, self.kinds = passes, kinds
        self.forwards = Forwards(passes, kinds, ours)
        slots = [*_walk(model)]
        self.slots: Slots = {id(s.module): s for s in reversed(slots)}  # a module has its first name
        self._places: dict[int, dict[tuple[int, str], nn.Module]] = {}
        for slot in slots:
            if slot.parent is not None:
                self._places.setdefault(id(slot.module), {})[id(slot.parent), slot.key] = slot.parent
        self._below: dict[int, set[int]] = {}
        self._spans: dict[tuple[type[nn.Module], frozenset[int]], tuple[Span, ...]] = {}

    def name(self, module: nn.Module) -> str:
        """The dotted name of a module."""
        return self.slots[id(module)].name

    def spans(self, cls: type[nn.Module], last: frozenset[int]) -> tuple[Span, ...]:
        """Where the calls at these instructions of its forward are."""
        if (cls, last) not in self._spans:
            self._spans[cls, last] = locate_all(cls, last)
        return self._spans[cls, last]

    def child(self, event: Event) -> tuple[nn.Module, str] | None:
        """Where the module of the event is registered: one place below its caller, who calls it once."""
        owner = event.modules[-1]
        if event.act is None or max(p.counts[event.caller] for p in self.passes) != 1:
            return None
        if event.key:
            return owner, event.key
        places = self._places.get(id(event.act), {})
        below = [(parent, key) for (_, key), parent in places.items() if self._is_below(parent, owner)]
        return below[0] if len(below) == 1 else None

    def _is_below(self, module: nn.Module, owner: nn.Module) -> bool:
        if module is owner:
            return True
        if id(owner) not in self._below:
            self._below[id(owner)] = {id(m) for m in owner.modules()}
        return id(module) in self._below[id(owner)]


def _why_none(others: list[Site], passes: list[Pass], kinds: frozenset[str]) -> str:
    """Why the network has no site, as text."""
    if problems := sorted({f"{s.name}: {s.problem}" for s in others if s.problem}):
        return "\n".join([f"nothing: no call of {in_words(kinds)} can be replaced.", *problems])
    if any(e.kind in kinds and e.on_map for e in passes[0].events):
        return (
            f"nothing: {in_words(kinds)} is called in the forward of the network itself, which has no name; "
            "make the call a module, such as nn.ReLU, of its own."
        )
    return f"nothing: no {in_words(kinds)} on a feature map{_instead(passes[0].events)}."


def _walk(
    module: nn.Module, name: str = "", parent: nn.Module | None = None, key: str = ""
) -> Iterator[Slot]:
    module = inner(module)
    yield Slot(name, module, parent, key)
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{key}" if name else key, module, key)


def _block_site(slot: Slot, network: Network, group: int, block: int) -> Site:
    """The site of a block: its last call on a feature map, outside the shortcut."""
    kinds, inside = network.kinds, [(p, p.inside.get(id(slot.module), [])) for p in network.passes]
    last = [(p, last_call(p, numbers, kinds | {"replaced"})) for p, numbers in inside]
    seen = [(p, event) for p, event in last if event]
    problem = ""
    if any(e.kind == "replaced" for _, e in seen):
        problem = "it is replaced already; to replace it again, call restore_relus first"
    elif not seen:
        events = [network.passes[0].events[i] for i in inside[0][1]]
        problem = f"the block has no {in_words(kinds)} on a feature map{_instead(events)}"
    elif form := next((e.no_map for _, e in seen if not e.on_map), ""):
        problem = f"its last {in_words(kinds)} runs {form}; call it on (N, C, ...), or name an earlier one"
    if problem:
        return Site(slot.name, problem=problem, group=group, block=block)
    return _site(seen, network, slot.module, group, block)


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
        yield _site(seen, network, seen[0][1].modules[-1])
    often_called = {act for (_, act), often in several.items() if often > 1}
    for slot in network.slots.values():
        if id(slot.module) in often_called:
            often = max(several[id(p), id(slot.module)] for p in network.passes)
            problem = f"it is called {often} times in one pass; name the module that calls it"
            yield Site(slot.name, calls=often, problem=problem)


def _site(seen: Seen, network: Network, within: nn.Module, group: int = 0, block: int = 0) -> Site:
    """The site of a call, with its edit or with the problem that prevents one."""
    event = seen[0][1]
    owner = event.modules[-1]
    calls = max(p.counts[event.place] for p in network.passes)
    try:
        target, key, spans = _edit(seen, network)
        if group:
            check_block(network.forwards, event, within, "" if spans or target is not owner else key)
        if calls > 1:
            raise SiteError(f"it runs {calls} times in one pass; operate on a module that runs it once")
    except SiteError as error:
        name = network.name(owner)
        return Site(name, event.shape[1], calls, problem=str(error), group=group, block=block)
    name = ".".join(filter(None, (network.name(target), "" if spans else key)))
    assert event.like is not None
    original = {p.training: e.original for p, e in seen if e.original}
    cut = Cut(target, key, spans, within, event.like, original)
    return Site(name, event.shape[1], calls, "rewrite" if spans else "swap", "", group, block, cut)


def _edit(seen: Seen, network: Network) -> tuple[nn.Module, str, tuple[Span, ...]]:
    """What to change: a child of a module (no spans), or calls in the forward of a module."""
    events = [event for _, event in seen]
    child, owner = network.child(events[0]), events[0].modules[-1]
    if any(network.child(e) != child or e.modules[-1] is not owner for e in events):
        raise SiteError("its last ReLU is called by another module in some passes than in others")
    last = {e.offset for e in events if e.offset >= 0}
    if child and runs_once(network.forwards, *child, last):
        if any(getattr(events[0].act, hooks) for hooks in RELU_HOOKS):
            raise SiteError("its ReLU has hooks, which would go with it; remove them first")
        if "forward" in vars(events[0].act):
            raise SiteError(f"its ReLU has a forward of its own, which would go with it; {UNWRAP}")
        check_all_seen(network.forwards, owner, last, child[1] if child[0] is owner else "")
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
    check_all_seen(network.forwards, owner, last, "")
    if hasattr(owner, NAME):
        raise SiteError(f"the module has an attribute {NAME!r} already; give that another name")
    return owner, NAME, network.spans(type(owner), frozenset(last))
