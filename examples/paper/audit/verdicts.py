"""From a difference and its 95% interval to a verdict: pass, FAIL, suspect or not enough data."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.paper.common.statistics import Difference, Z, paired

PASS, FAIL, UNKNOWN = "pass", "FAIL", "not enough data"
SUSPECT = "suspect"  # not enough data either, and the figure itself is beyond the tolerance
NO_GATE = "no gate"  # of the check that looks at one


def at_most(d: Difference, tolerance: float) -> str:
    """The verdict on a number that must not exceed the tolerance."""
    if d.low > tolerance:
        return FAIL
    return PASS if d.high <= tolerance else SUSPECT if d.value > tolerance else UNKNOWN


def negative(d: Difference) -> str:
    """The verdict on a number that must be below 0."""
    if d.low > 0:
        return FAIL
    return PASS if d.high < 0 else SUSPECT if d.value > 0 else UNKNOWN


def beats(one: Tensor, other: Tensor) -> Difference:
    """Share of images that `one` breaks, minus that of `other`, both (N,) of bool, on the same images."""
    return paired((one, other))


def share(hits: Tensor) -> Difference:
    """Share of images that are hits, (N,) of bool, with the interval of `beats`; of none, any share."""
    return beats(hits, torch.zeros_like(hits)) if len(hits) else Difference(0.0, -math.inf, math.inf)


def mean(values: Iterable[float]) -> Difference:
    """Mean over images; its interval is endless for fewer than 30 of them."""
    t = torch.tensor(list(values), dtype=torch.float64)
    middle = t.mean().item() if len(t) else 0.0
    half = Z * t.std().item() / math.sqrt(len(t)) if len(t) >= 30 else math.inf
    return Difference(middle, middle - half, middle + half)


def worst(verdicts: Iterable[str]) -> str:
    """The first of FAIL, suspect and not enough data that is among them; that last one if there are none."""
    found = set(verdicts) or {UNKNOWN}
    return next((verdict for verdict in (FAIL, SUSPECT, UNKNOWN) if verdict in found), PASS)


class Check(NamedTuple):
    """One row of the audit."""

    number: int
    name: str
    figure: str
    verdict: str
    meaning: str


def numbers_of(record: Mapping[str, Any]) -> dict[str, list[int]]:
    """The checks of an audit's record, by each verdict but PASS."""
    return {v: [c["number"] for c in record["checks"] if c["verdict"] == v] for v in (FAIL, SUSPECT, UNKNOWN)}


def check(
    number: int, name: str, figure: str, verdict: str, *, passed: str, failed: str, unknown: str
) -> Check:
    """A row, with the meaning of its verdict."""
    meanings = {PASS: passed, FAIL: failed, UNKNOWN: unknown, SUSPECT: f"perhaps: {failed}; {unknown}"}
    return Check(number, name, figure, verdict, meanings[verdict])
