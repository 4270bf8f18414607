"""Chooses the last call of a block: in time, but not in the shortcut."""

from collections.abc import Iterable

from sparta_act.surgery.origins import REARRANGED, SHAPED
from sparta_act.surgery.recording import Event, Pass


def last_call(seen: Pass, inside: list[int], kinds: Iterable[str]) -> Event | None:
    """The last call of these kinds on a map, in whatever form, among the events `inside` a block.

    Where it is in a shortcut alone, computed after the rest, it is the last one outside: a shortcut is the
    operand of an addition with fewer convolutions behind it, or as many and fewer activations, and none of
    the block's behind both: it begins where the block does. None if there is no such call.
    """
    calls = [i for i in inside if seen.events[i].kind in kinds and is_map_in_any_form(seen.events[i])]
    if not calls:
        return None
    for call in reversed(calls):
        if call not in _shortcuts(seen, [i for i in inside if i > call], inside[0]):
            return seen.events[call]
    return seen.events[calls[-1]]


def is_map_in_any_form(event: Event) -> bool:
    """Whether the input is a feature map, also one with the channels last or without a batch."""
    return event.no_map in ("", *REARRANGED)


def looks_like_a_map(event: Event) -> bool:
    """The same, or whether it has the shape of one, as what a dense layer makes."""
    return event.no_map == SHAPED or is_map_in_any_form(event)


def _shortcuts(seen: Pass, numbers: list[int], first: int) -> set[int]:
    """The events from number `first` on that only the shortcut of one of these additions needs."""
    found = set[int]()
    for number in numbers:
        event = seen.events[number]
        if event.kind == "add" and event.on_map:
            left, right = (_behind(seen, operand, first) for operand in event.operands)
            if any(seen.events[i].kind == "conv" for i in left & right):
                continue
            short, long = sorted((left - right, right - left), key=lambda side: _weight(seen, side))
            found |= short if _weight(seen, short) < _weight(seen, long) else set()
    return found


def _behind(seen: Pass, sources: frozenset[int], first: int) -> set[int]:
    """The events that these come from, themselves included, from number `first` on."""
    found, todo = set[int](), [*sources]
    while todo:
        number = todo.pop()
        if number >= first and number not in found:
            found.add(number)
            todo += frozenset[int]().union(*seen.events[number].operands)
    return found


def _weight(seen: Pass, events: set[int]) -> tuple[int, int]:
    kinds = [seen.events[i].kind for i in events]
    return kinds.count("conv"), len(kinds) - kinds.count("add")
