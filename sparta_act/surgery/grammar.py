"""The language of sites, "G4.B2, features.*": reads a text, and chooses the sites that it names."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sparta_act.errors import SiteError
from sparta_act.surgery.kinds import in_words
from sparta_act.surgery.sites import FEW, Site, SiteList, shown

NUMBER = r"-?\d{1,9}"
NUMBERS = rf"(\*|{NUMBER}|\{{\s*{NUMBER}(?:\s*,\s*{NUMBER})*\s*\}})"
LABEL = re.compile(rf"G{NUMBERS}\.B{NUMBERS}", re.ASCII)
COMMA = re.compile(r",(?![^{}]*\})")  # not those in braces

Sites = str | Iterable[str | Site]
Numbers = tuple[int, ...] | None  # None for `*`


@dataclass(frozen=True)
class Label:
    """Residual blocks by group and number, such as `G{1,2}.B*`; negative numbers count from the last."""

    groups: Numbers
    blocks: Numbers

    def __str__(self) -> str:
        return f"G{_text(self.groups)}.B{_text(self.blocks)}"


@dataclass(frozen=True)
class Name:
    """A dotted name, with the shell's wildcards."""

    pattern: str

    def __str__(self) -> str:
        return self.pattern


@dataclass(frozen=True)
class All:
    """Every call on a feature map."""

    def __str__(self) -> str:
        return "all"


def parse(asked: Sites) -> list[Label | Name | All]:
    """The terms of `asked`. Raises `SiteError`, which lists every term that cannot be read."""
    terms, problems = list[Label | Name | All](), list[str]()
    for item in [asked] if isinstance(asked, str) else asked:
        if isinstance(item, Site):
            terms.append(Label((item.group,), (item.block,)) if item.label else Name(item.name))
            continue
        for text in map(str.strip, COMMA.split(item)):
            match = LABEL.fullmatch(text)
            if match:
                terms.append(Label(_numbers(match[1]), _numbers(match[2])))
            elif not text:
                problems.append("empty name: extra comma")
            elif "{" in text or "}" in text:
                problems.append(f"{text}: braces are for numbers, as in G{{1,2}}.B*")
            else:
                terms.append(All() if text == str(All()) else Name(text))
    if problems:
        raise SiteError("\n".join([f"cannot read the sites {_quoted(asked)}:", *problems]))
    return terms


def listed(asked: Sites) -> list[str | Site]:
    """The texts, or sites of `relu_sites`, that were asked for. Raises `SiteError` for anything else."""
    several: list[str | Site] = (
        [asked] if isinstance(asked, str) else [*asked] if isinstance(asked, Iterable) else []
    )
    if several and all(isinstance(s, Site) or (isinstance(s, str) and s.strip()) for s in several):
        return several
    raise SiteError(
        'sites must be a text such as "G4.B2", "G*.B-1, relu", "features.*" or "all", or a list of such '
        f"texts or of sites from relu_sites, not {asked!r}"
    )


def _quoted(asked: Sites) -> str:
    return repr(asked if isinstance(asked, str) else ", ".join(map(str, asked)))


def select(
    sites: SiteList, asked: Sites, kinds: frozenset[str], every: Callable[[], list[Site]]
) -> list[Site]:
    """The sites that `asked` names, in the order of `sites`; every name must fit. Raises `SiteError`.

    `every`: lists what "all" means.
    """
    chosen, problems = dict[int, Site](), list[str]()
    for term in dict.fromkeys(parse(asked)):
        alike = Counter[str]()
        for found in _meant(sites, term, kinds, every):
            if isinstance(found, str):
                problems.append(f"{term}: {found}")
            elif found.problem:
                alike[found.problem] += 1
                if alike[found.problem] <= FEW:
                    name = f"{found} ({found.name})" if found.label else found.name or "the network"
                    problems.append(f"{term}: {name} cannot be replaced: {found.problem}")
            else:
                chosen[id(found)] = found
        problems += [f"{term}: {n - FEW} more, too: {problem}" for problem, n in alike.items() if n > FEW]
    if problems:
        heading = f"cannot replace {in_words(kinds)} at {_quoted(asked)}:"
        raise SiteError("\n".join([heading, *problems, f"This network has:\n{shown(sites)}"]))
    return [s for s in sites if chosen.pop(id(s), None)] + [*chosen.values()]


def _meant(
    sites: SiteList, term: Label | Name | All, kinds: frozenset[str], every: Callable[[], list[Site]]
) -> Iterable[Site | str]:
    if isinstance(term, Label):
        return _labelled(sites, term)
    if isinstance(term, Name):
        return _named(sites, term, kinds)
    return every() or ["there is nothing to replace"]


def _numbers(text: str) -> Numbers:
    return None if text == "*" else tuple(map(int, text.strip("{}").split(",")))


def _text(numbers: Numbers) -> str:
    if numbers is None:
        return "*"
    return str(numbers[0]) if len(numbers) == 1 else f"{{{','.join(map(str, numbers))}}}"


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
            hint = f"; to replace all within it, write {term}.*"
        yield f"no {in_words(kinds)} that runs on feature maps has this name{hint}"
