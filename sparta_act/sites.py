"""Names ReLU calls: what a site is, and the little language that chooses sites."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn

from sparta_act.errors import SiteError

NUMBERS = r"(\*|-?\d+|\{\s*-?\d+(?:\s*,\s*-?\d+)*\s*\})"
LABEL = re.compile(rf"G{NUMBERS}\.B{NUMBERS}")
COMMA = re.compile(r",(?![^{}]*\})")  # not those in braces


@dataclass(frozen=True)
class Cut:
    """How a site is edited: `target` gets the child `key`, and the calls at `spans` of its forward change."""

    target: nn.Module
    key: str
    spans: tuple[tuple[int, int, int, int], ...]  # empty for a swap
    within: nn.Module  # its output must depend on the new module
    like: Tensor  # with the device and dtype of the input
    modes: frozenset[bool]  # of training, in which the call was seen

    @property
    def place(self) -> tuple[nn.Module, str]:
        """What no two sites share."""
        return self.target, self.key


@dataclass(frozen=True)
class Site:
    """One ReLU call: where it is, and how `replace_relus` would edit it."""

    name: str  # dotted, of the module that would be changed
    channels: int = 0
    calls: int = 0  # how often it runs in one forward pass
    edit: str = ""  # "swap" or "rewrite"
    problem: str = ""  # why it cannot be replaced, if so
    group: int = 0  # from 1; 0 outside the residual blocks
    block: int = 0
    how: Cut | None = field(default=None, repr=False, compare=False)

    @property
    def cut(self) -> Cut:
        """How to edit it; only where there is no problem."""
        assert self.how
        return self.how

    @property
    def label(self) -> str:
        """The name by group and block, such as "G4.B2"; empty outside the residual blocks."""
        return f"G{self.group}.B{self.block}" if self.group else ""

    def __str__(self) -> str:
        return self.label or self.name


class SiteList(list[Site]):
    """The sites of a network; prints as a table."""

    def __repr__(self) -> str:
        rows = [("site", "name", "channels", "calls", "edit")]
        for s in self:
            edit = s.edit or f"none: {s.problem}"
            rows.append((s.label, s.name, str(s.channels or ""), str(s.calls or ""), edit))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)


def shown(sites: list[Site]) -> SiteList:
    """The sites worth a look: every residual block, and whatever else can be replaced."""
    return SiteList(s for s in sites if s.label or not s.problem)


def select(sites: list[Site], asked: str) -> list[Site]:
    """The sites that `asked` names, in the order of `sites`; every name must fit."""
    if not isinstance(asked, str) or not asked.strip():
        raise SiteError(f'sites must be a text such as "G4.B2", "G*.B-1" or "features.*", got {asked!r}')
    chosen, problems = set[int](), list[str]()
    for term in map(str.strip, COMMA.split(asked)):
        for found in _labelled(sites, term) if LABEL.fullmatch(term) else _named(sites, term):
            if isinstance(found, str):
                problems.append(f"{term or 'empty name'}: {found}")
            elif found.problem:
                problems.append(f"{term}: {found} ({found.name}) cannot be replaced: {found.problem}")
            else:
                chosen.add(id(found))
    if problems:
        listing = shown(sites)
        what = f"This network has:\n{listing}" if listing else "No ReLU call of this network can be named."
        raise SiteError(
            "\n".join([f"cannot replace the ReLUs at {asked!r}; nothing was changed.", *problems, what])
        )
    return [s for s in sites if id(s) in chosen]


def _labelled(sites: list[Site], term: str) -> Iterator[Site | str]:
    match = LABEL.fullmatch(term)
    assert match
    last = max((s.group for s in sites), default=0)
    for g in _numbers(match[1], last):
        group = [s for s in sites if s.group == g > 0]
        if not group:
            yield f"there is no group {g}, the network has {last} groups of residual blocks"
        for b in _numbers(match[2], len(group)) if group else ():
            if 1 <= b <= len(group):
                yield group[b - 1]
            else:
                yield f"there is no block {b} in group {g}, which has {len(group)}"
    if not last and match[1] == "*":
        yield "the network has no container (Sequential, ModuleList) of residual blocks, only dotted names"


def _numbers(text: str, last: int) -> list[int]:
    if text == "*":
        return list(range(1, last + 1))
    return [n + last + 1 if n < 0 and n + last >= 0 else n for n in map(int, text.strip("{}").split(","))]


def _named(sites: list[Site], term: str) -> Iterator[Site | str]:
    found = [s for s in sites if fnmatchcase(s.name, term)]
    if any(c in term for c in "*?["):
        found = [s for s in found if not s.problem] or found
    yield from found
    if not found:
        hint = "; labels look like G4.B2, G*.B-1 or G{1,2}.B*" if term[:1] in "Gg" else ""
        yield f"no ReLU that runs on feature maps has this name{hint}"
