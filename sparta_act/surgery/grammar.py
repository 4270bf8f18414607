"""Chooses sites by what the user asked for."""

from collections.abc import Iterator
from fnmatch import fnmatchcase

from sparta_act.errors import SiteError
from sparta_act.surgery.naming import Label, Name, Numbers, parse, told
from sparta_act.surgery.sites import Site, SiteList, shown


def select(sites: SiteList, asked: str, kinds: frozenset[str]) -> list[Site]:
    """The sites that `asked` names, in the order of `sites`; every name must fit."""
    chosen, problems = set[int](), list[str]()
    for term in parse(asked):
        for found in _labelled(sites, term) if isinstance(term, Label) else _named(sites, term, kinds):
            if isinstance(found, str):
                problems.append(f"{term}: {found}")
            elif found.problem:
                problems.append(f"{term}: {found} ({found.name}) cannot be replaced: {found.problem}")
            else:
                chosen.add(id(found))
    if problems:
        asked_for = f"cannot replace {told(kinds)} at {asked!r}; nothing was changed."
        raise SiteError("\n".join([asked_for, *problems, f"This network has:\n{shown(sites)}"]))
    return [s for s in sites if id(s) in chosen]


def _labelled(sites: list[Site], term: Label) -> Iterator[Site | str]:
    last = max((s.group for s in sites), default=0)
    for g in _counted(term.groups, last):
        group = [s for s in sites if s.group == g > 0]
        if not group:
            yield f"there is no group {g}, the network has {last} groups of blocks"
        for b in _counted(term.blocks, len(group)) if group else ():
            if 1 <= b <= len(group):
                yield group[b - 1]
            else:
                yield f"there is no block {b} in group {g}, which has {len(group)}"
    if not last and term.groups is None:
        yield "the network has no groups of blocks, only dotted names"


def _counted(numbers: Numbers, last: int) -> list[int]:
    if numbers is None:
        return list(range(1, last + 1))
    return [n + last + 1 if n < 0 and n + last >= 0 else n for n in numbers]


def _named(sites: list[Site], term: Name, kinds: frozenset[str]) -> Iterator[Site | str]:
    found = [s for s in sites if s.name == term.pattern]  # whatever is in it
    found = found or [s for s in sites if fnmatchcase(s.name, term.pattern)]
    if any(c in term.pattern for c in "*?["):
        found = [s for s in found if not s.problem] or found
    yield from found
    if not found:
        hint = "; labels look like G4.B2, G*.B-1 or G{1,2}.B*" if term.pattern[:1] in "Gg" else ""
        if any(s.name.startswith(f"{term}.") for s in sites):
            hint = f"; to take all within it, write {term}.*"
        yield f"no {told(kinds)} that runs on feature maps has this name{hint}"
