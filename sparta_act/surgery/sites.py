"""What a site is, and the table of all sites of a network."""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby

import torch
from torch import Tensor, nn

from sparta_act.activations import Sparta
from sparta_act.surgery.sandbox import Like

NUMBER = re.compile(r"(\d+)")
FEW = 3  # rows of one kind that the table prints in full


@dataclass(frozen=True)
class Cut:
    """How a site is edited: `target` gets the child `key`, and the calls at `spans` of its forward change."""

    target: nn.Module
    key: str
    spans: tuple[tuple[int, int, int, int], ...]  # empty for a swap
    within: nn.Module  # its output must depend on the new module
    like: Like  # of the input
    original: dict[bool, Callable[[Tensor], Tensor]]  # what the call computes, by the modes it was seen in

    @property
    def place(self) -> tuple[nn.Module, str]:
        """What no two sites share."""
        return self.target, self.key


@dataclass(frozen=True)
class Site:
    """One call of a ReLU, or of another of the `kinds`: where it is, and how it would be edited."""

    name: str  # dotted, of the module that would be changed; of the new one where it is replaced
    channels: int = 0
    calls: int = 0  # how often it runs in one forward pass
    edit: str = ""  # "swap" or "rewrite"
    problem: str = ""  # why it cannot be replaced, if so
    group: int = 0  # from 1; 0 outside the residual blocks
    block: int = 0
    how: Cut | None = field(default=None, repr=False, compare=False)
    activation: nn.Module | None = field(default=None, repr=False, compare=False)  # where it is replaced

    @property
    def cut(self) -> Cut:
        """How to edit it; only where there is no problem."""
        assert self.how
        return self.how

    @property
    def label(self) -> str:
        """The name by group and block, such as "G4.B2"; empty outside the residual blocks."""
        return f"G{self.group}.B{self.block}" if self.group else ""

    @property
    def parameters(self) -> int:
        """How many parameters a `Sparta` would add here; where it is replaced, how many the new one has."""
        if self.activation is not None:
            return size_of(self.activation)
        return _of_sparta(self.channels) if self.channels else 0

    def __str__(self) -> str:
        return self.label or self.name


class SiteList(list[Site]):
    """The sites of a network; prints as a table, in which many similar sites take a few rows."""

    def __init__(self, sites: Iterable[Site], otherwise: str, summary: str) -> None:
        super().__init__(sites)
        self.otherwise = otherwise  # what to say when there are none
        self.summary = summary  # what to say below them

    def __repr__(self) -> str:
        if not self:
            return self.otherwise
        rows: list[tuple[str, ...]] = [("site", "name", "channels", "calls", "parameters", "edit")]
        for _, alike in groupby((s for s in self if s.label), _kind):
            rows += _shortened([*alike])
        others: dict[tuple[object, ...], list[Site]] = {}
        for site in (s for s in self if not s.label):
            others.setdefault((_skeleton(site), site.edit, site.calls), []).append(site)
        for several in others.values():
            pattern = _pattern(several)
            fits_no_other = len(several) == sum(fnmatchcase(s.name, pattern) for s in self)
            rows += [_summary(several)] if len(several) > FEW and fits_no_other else _shortened(several)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([*lines, self.summary])


def size_of(module: nn.Module) -> int:
    """How many parameters a module has."""
    return sum(p.numel() for p in module.parameters())


@functools.lru_cache(maxsize=1024)
def _of_sparta(channels: int) -> int:
    with torch.device("meta"):  # draws no numbers
        return size_of(Sparta(channels))


def _kind(site: Site) -> tuple[object, ...]:
    """What blocks of one group must share for the table to show only the first and the last of them."""
    return _skeleton(site), site.group, site.channels, site.calls, site.edit, site.problem, site.parameters


def _skeleton(site: Site) -> str:
    return NUMBER.sub("0", site.name)


def _pattern(sites: list[Site]) -> str:
    """The name that sites of one skeleton have in common, with a wildcard for each number that differs."""
    parts = zip(*(NUMBER.split(s.name) for s in sites), strict=True)
    return "".join(part[0] if len({*part}) == 1 else "*" for part in parts)


def _row(site: Site) -> tuple[str, ...]:
    count = f"{site.parameters:,}" if site.activation is not None else f"+{site.parameters:,}"
    edit = site.edit or f"none: {site.problem}"
    return (
        site.label,
        site.name,
        str(site.channels or ""),
        str(site.calls or ""),
        count if site.channels else "",
        edit,
    )


def _shortened(sites: list[Site]) -> list[tuple[str, ...]]:
    rows = [*map(_row, sites)]
    if len(rows) > FEW:
        rows[1:-1] = [("...", f"({len(rows) - 2} more)", "", "", "", "")]
    return rows


def _summary(sites: list[Site]) -> tuple[str, ...]:
    """Sites, whatever their channels, as one row with the pattern that names them."""
    rows = [*map(_row, sorted(sites, key=lambda s: (s.channels, s.parameters)))]
    first, last = rows[0], rows[-1]
    spans = ["-".join(dict.fromkeys((a, b))).replace("-+", "-") for a, b in zip(first, last, strict=True)]
    return f"{len(sites)} sites", _pattern(sites), spans[2], first[3], spans[4], first[5]


def shown(sites: SiteList) -> SiteList:
    """The sites to list: every labelled block, and whatever else can be replaced."""
    listed = (s for s in sites if s.label or not s.problem or s.activation is not None)
    return SiteList(listed, sites.otherwise, sites.summary)
