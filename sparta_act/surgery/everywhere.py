"""Finds every call of ReLU on a feature map, inside blocks too: what `"all"` means."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

from torch import nn

from sparta_act.errors import SiteError
from sparta_act.surgery.editing import Seen, check_modes, has, one_site
from sparta_act.surgery.kinds import in_words
from sparta_act.surgery.lasts import looks_like_a_map
from sparta_act.surgery.network import Network
from sparta_act.surgery.recording import Event
from sparta_act.surgery.rewriting import NAME, Span
from sparta_act.surgery.sites import Site
from sparta_act.surgery.unseen import unseen_calls

Place = tuple[nn.Module, object]  # a module, and the key of its child or where its forward calls


def every_site(network: Network, sites: list[Site]) -> list[Site]:
    """A site for each call, one of `sites` where it is that call; with a problem where it would stay.

    So would what no pass on the example calls.
    """
    known = {place: s for s in sites if s.how for place in _places(s)}
    calls, found = dict[Place, Seen](), dict[int, tuple[Site, Seen]]()
    for p in network.passes:
        for event in p.events:
            if event.kind in network.kinds and looks_like_a_map(event):
                owner, child, span = event.modules[-1], network.child(event), _span(event, network)
                site = (known.get(child) if child else None) or known.get((owner, span))
                if site:
                    found.setdefault(id(site), (site, []))[1].append((p, event))
                else:
                    calls.setdefault(child or (owner, span or event.place), []).append((p, event))
    chosen = [*(_in_both_modes(*one, network) for one in found.values()), *_new_sites(calls, network)]
    return [*chosen, *_never_run(network, chosen)]


def _in_both_modes(site: Site, seen: Seen, network: Network) -> Site:
    try:
        check_modes(seen, network)
        return site
    except SiteError as error:
        return replace(site, edit="", problem=str(error), how=None)


def _places(site: Site) -> list[Place]:
    return [(site.cut.target, span) for span in site.cut.spans] or [site.cut.place]


def _span(event: Event, network: Network) -> Span | None:
    """Where the forward calls; None if it is not to be rewritten."""
    try:
        return network.spans(type(event.modules[-1]), {event.offset})[0] if event.offset >= 0 else None
    except SiteError:
        return None


def _new_sites(calls: dict[Place, Seen], network: Network) -> Iterator[Site]:
    """The sites of these calls; in one forward, the submodules are numbered in the order of the text."""
    order = {id(seen[0][1].modules[-1]): i for i, seen in reversed([*enumerate(calls.values())])}
    keys = dict[int, Iterator[str]]()

    def in_text(seen: Seen) -> tuple[int, Span]:
        return order[id(seen[0][1].modules[-1])], _span(seen[0][1], network) or (0, 0, 0, 0)

    for seen in sorted(calls.values(), key=in_text):
        event = next((e for _, e in seen if not e.on_map), seen[0][1])
        owner = event.modules[-1]
        if event.on_map:
            yield one_site(seen, network, keys.setdefault(id(owner), _free_keys(owner)))
        else:
            problem = f"it runs {event.no_map}; call it on (N, C, ...)"
            yield Site(network.name(owner), problem=problem)


def _free_keys(owner: nn.Module) -> Iterator[str]:
    return (key for i in count(1) if not has(owner, key := f"{NAME}_{i}"))


def _never_run(network: Network, chosen: list[Site]) -> Iterator[Site]:
    """What no pass on the example has called, except for children that will be others."""
    swapped = dict[nn.Module, set[str]]()
    for target, key in (s.cut.place for s in chosen if s.how and not s.cut.spans):
        swapped.setdefault(target, set()).add(key)
    for slot in reversed(network.slots.values()):
        keys = swapped.get(slot.module, set())
        unseen = unseen_calls(network.forwards, slot.module, keys, network.shared)
        for line, where in dict.fromkeys(unseen):
            kinds = in_words(network.kinds)
            problem = f"line {line} ({where}) calls {kinds} in a branch that no pass on the example runs"
            yield Site(
                slot.name, problem=f"{problem}; give example=... that runs it, or name the other sites"
            )
