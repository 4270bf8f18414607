"""A network that was run: where its modules are registered, and what was put in before."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from sparta_act.activations import Sparta, SwishReLU
from sparta_act.surgery.blocks import Slot, Slots
from sparta_act.surgery.branches import Forwards
from sparta_act.surgery.locating import locate_all
from sparta_act.surgery.recording import Event, Pass, inner
from sparta_act.surgery.rewriting import Span, keys_of

# attribute of a module: by key, the child that was there, the one put there, and the dtype of `like_swapped`
SWAPPED = "_sparta_swapped"


Places = dict[tuple[nn.Module, str], nn.Module]  # by parent and key


def replaced(model: nn.Module) -> Places:
    """The modules that earlier replacements put in, by where they are."""
    found = {}
    for module in model.modules():
        for key in (*vars(module).get(SWAPPED, ()), *keys_of(module)):
            if (new := module._modules.get(key)) is not None:
                found[module, key] = new
    return found


def like_swapped(parent: nn.Module, new: nn.Module) -> Tensor | None:
    """A tensor that shows where a network is: of the module that was put in, or else of its parent."""
    return next((t for t in (*new.parameters(), *parent.parameters()) if t.is_floating_point()), None)


def put_by_hand(model: nn.Module, put_in: Places) -> Places:
    """The activations of ours that no replacement put where they are now, by where they are.

    `put_in`: what `replaced` has returned.
    """
    known = {id(m) for new in put_in.values() for m in new.modules()}
    return {
        (parent, key): child
        for parent in model.modules()
        for key, child in parent._modules.items()
        if isinstance(child, Sparta | SwishReLU) and id(child) not in known
    }


class Network:
    """A network, its passes, and where its modules are registered."""

    def __init__(
        self,
        model: nn.Module,
        put_in: Places,
        ours: Places,
        passes: list[Pass],
        kinds: frozenset[str],
    ) -> None:
        self.passes, self.kinds = passes, kinds
        self.put_in = put_in  # by earlier replacements; `ours` also has what was put by hand
        self.place_of = {id(new): place for place, new in ours.items()}
        self.forwards = Forwards(passes, kinds, [*ours.values()])
        slots = [*_walk(model)]
        self.slots: Slots = {id(s.module): s for s in reversed(slots)}  # a module has its first name
        self._places: dict[int, dict[tuple[int, str], nn.Module]] = {}
        for slot in slots:
            if slot.parent is not None:
                self._places.setdefault(id(slot.module), {})[id(slot.parent), slot.key] = slot.parent
        self.shared = {module for module, places in self._places.items() if len(places) > 1}  # ids
        self._below: dict[int, set[int]] = {}
        self._spans: dict[tuple[type[nn.Module], frozenset[int]], tuple[Span, ...]] = {}

    def name(self, module: nn.Module) -> str:
        """The dotted name of a module."""
        return self.slots[id(module)].name

    def spans(self, cls: type[nn.Module], offsets: Iterable[int]) -> tuple[Span, ...]:
        """Where the calls at these instructions of its forward are, of which each pass takes one."""
        asked = cls, frozenset(offsets)
        if asked not in self._spans:
            self._spans[asked] = locate_all(*asked)
        return self._spans[asked]

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


def _walk(
    module: nn.Module, name: str = "", parent: nn.Module | None = None, key: str = ""
) -> Iterator[Slot]:
    module = inner(module)
    yield Slot(name, module, parent, key)
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{key}" if name else key, module, key)
