"""From a difference and its 95% interval to a verdict: pass, FAIL or not enough data."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from examples.paper.common.statistics import format_interval

PASS, FAIL, UNKNOWN = "pass", "FAIL", "not enough data"
NO_GATE = "no gate"  # of the check that looks at one
Z = 1.959964


class Difference(NamedTuple):
    """A number and the half width of its 95% interval."""

    value: float
    half: float

    def __str__(self) -> str:
        return format_interval(*self)

    def at_most(self, tolerance: float) -> str:
        """The verdict on a number that must not exceed the tolerance."""
        if self.value - self.half > tolerance:
            return FAIL
        return PASS if self.value + self.half <= tolerance else UNKNOWN

    def negative(self) -> str:
        """The verdict on a number that must be below 0."""
        if self.value - self.half > 0:
            return FAIL
        return PASS if self.value + self.half < 0 else UNKNOWN


def beats(one: Tensor, other: Tensor) -> Difference:
    """Share of images that `one` breaks, minus that of `other`, both (N,) of bool, on the same images.

    Each discordant cell has a pseudo-count, so that no disagreement among five images is not certainty.
    Source: Bonett & Price 2012, doi:10.3102/1076998611411915, adjusted Wald interval for paired proportions.
    """
    n = len(one) + 2
    more, less = (int((p & ~q).sum() + 1) / n for p, q in ((one, other), (other, one)))
    return Difference(more - less, Z * math.sqrt((more + less - (more - less) ** 2) / n))


def share(hits: Tensor) -> Difference:
    """Share of images that are hits, (N,) of bool, with the interval of `beats`."""
    return beats(hits, torch.zeros_like(hits))


def mean(values: Iterable[float]) -> Difference:
    """Mean over images; its interval is endless for fewer than 30 of them."""
    t = torch.tensor(list(values), dtype=torch.float64)
    half = Z * t.std().item() / math.sqrt(len(t)) if len(t) >= 30 else math.inf
    return Difference(t.mean().item() if len(t) else 0.0, half)


def worst(verdicts: Iterable[str]) -> str:
    """FAIL if any is, else not enough data if any is, or if there are none."""
    found = set(verdicts)
    return FAIL if FAIL in found else UNKNOWN if UNKNOWN in found or not found else PASS


class Check(NamedTuple):
    """One row of the audit."""

    number: int
    name: str
    figure: str
    verdict: str
    meaning: str


def check(
    number: int, name: str, figure: str, verdict: str, *, passed: str, failed: str, unknown: str
) -> Check:
    """A row, with the meaning of its verdict."""
    return Check(number, name, figure, verdict, {PASS: passed, FAIL: failed, UNKNOWN: unknown}[verdict])
