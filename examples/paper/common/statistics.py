"""Errors, their intervals and paired differences, as numbers and as text."""

import math
from collections.abc import Mapping
from typing import Any

import scipy  # loads `scipy.stats`, over a second of work, when it is first used
from torch import Tensor

from examples.paper.common.records import packed, unpacked


def interval(wrong: Tensor) -> tuple[float, float, float]:
    """Error and its 95% Wilson interval, from (N,) of bool."""
    found = scipy.stats.binomtest(int(wrong.sum()), len(wrong))
    low, high = found.proportion_ci(method="wilson")
    return found.statistic, low, high


def entry(wrong: Tensor) -> dict[str, Any]:
    """Error, interval and packed images of (N,) of bool, for JSON."""
    error, low, high = interval(wrong)
    return {"error": error, "low": low, "high": high, "images": len(wrong), "wrong": packed(wrong)}


def difference(wrong: Tensor, other: Tensor) -> tuple[float, float]:
    """Paired difference of two errors on the same images, and the half width of its 95% interval."""
    d = wrong.float() - other.float()
    return d.mean().item(), 1.959964 * d.std(correction=0).item() / math.sqrt(len(d))


def minus(result: Mapping[str, Any], other: Mapping[str, Any], attack: str) -> tuple[float, float]:
    """`difference` of two stored results. Raises `ValueError` if their images differ."""
    a, b = (r["errors"][attack] for r in (result, other))
    if (a["images"], result["test images"]) != (b["images"], other["test images"]):
        raise ValueError(f"{attack}: {a['images']} images against {b['images']}, or of another test split")
    return difference(unpacked(a["wrong"], a["images"]), unpacked(b["wrong"], b["images"]))


def format_error(wrong: Tensor) -> str:
    """Error with its interval: `31.5% (28.7-34.4)`."""
    p, low, high = interval(wrong)
    return f"{p:.1%} ({100 * low:.1f}-{100 * high:.1f})"


def format_interval(d: float, half: float) -> str:
    """Difference of two errors in points, with the half width of its interval: `+1.2 ± 4.6`."""
    return f"{100 * d:+.1f} ± {100 * half:.1f}"


def format_difference(d: float, half: float) -> str:
    """Difference of two errors in points: `+5.0 ± 2.0`, marked `(noise)` where the interval contains 0."""
    return format_interval(d, half) + ("" if abs(d) > half else " (noise)")
