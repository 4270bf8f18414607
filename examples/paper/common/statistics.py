"""Errors, their intervals and paired differences: how they are estimated, rounded and tested."""

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import scipy  # loads `scipy.stats`, over a second of work, when it is first used
import torch
from torch import Tensor

from examples.paper.common.records import packed, unpacked

Z = 1.959964  # of a 95% interval
Pair = tuple[Tensor, Tensor]  # which images two networks, or two attacks on one, get wrong: (N,) of bool each


class Difference(NamedTuple):
    """A number with its 95% interval, as shares; of a paired difference the number is exact, from counts."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{rounded(self.value, sign=True)} ± {rounded(self.half)}"


def interval(wrong: Tensor) -> tuple[float, float, float]:
    """Error and its 95% Wilson interval, from (N,) of bool."""
    found = scipy.stats.binomtest(int(wrong.sum()), len(wrong))
    low, high = found.proportion_ci(method="wilson")
    return found.statistic, low, high


def entry(wrong: Tensor) -> dict[str, Any]:
    """Error, interval and packed images of (N,) of bool, for JSON."""
    error, low, high = interval(wrong)
    return {"error": error, "low": low, "high": high, "images": len(wrong), "wrong": packed(wrong)}


def paired(*pairs: Pair) -> Difference:
    """Share of images that the first of a pair gets wrong minus that of the second, on the same images.

    Of several pairs, one a seed, the mean; the interval is over images alone. Two images are added to the
    variance, one of +1 and one of -1, so that no disagreement among five images is not certainty.
    Source: Bonett & Price 2012, doi:10.3102/1076998611411915, adjusted Wald interval for paired proportions.
    """
    counts = torch.stack([one.int() - other.int() for one, other in pairs]).sum(0)
    n, total, squares = len(counts) + 2, int(counts.sum()), int((counts**2).sum())
    middle = total / len(pairs) / n
    half = Z * math.sqrt(((squares / len(pairs) ** 2 + 2) / n - middle**2) / n)
    return Difference(total / (len(pairs) * (n - 2)), middle - half, middle + half)


def with_seeds(pairs: Sequence[Pair]) -> Difference:
    """The mean of `paired` over two or more seeds, its interval over images and over seeds.

    The half widths are added as squares: that of `paired`, and that of Student's t over the seeds' own
    differences. They share the noise that images and seeds make together, so the sum errs on the wide side.
    """
    value, low, high = paired(*pairs)
    each = torch.tensor([paired(pair).value for pair in pairs], dtype=torch.float64)
    over_seeds = scipy.stats.t.ppf(0.975, len(pairs) - 1) * each.std().item() / math.sqrt(len(pairs))
    half = math.hypot((high - low) / 2, over_seeds)
    return Difference(value, (low + high) / 2 - half, (low + high) / 2 + half)


def mean_difference(pairs: Sequence[Pair]) -> str:
    """The mean of `paired` over the seeds, with both intervals; of one seed there is one interval."""
    if len(pairs) == 1:
        return str(paired(*pairs))
    return f"{paired(*pairs)}; with seeds ± {rounded(with_seeds(pairs).half)}"


def root_mean_square(pairs: Sequence[Pair]) -> float:
    """Of the differences of several pairs: how large one of them is, whatever its sign."""
    return math.sqrt(sum(paired(pair).value ** 2 for pair in pairs) / len(pairs))


def p_value(pair: Pair) -> float:
    """Of the exact McNemar test: both get as many images wrong that the other gets right."""
    more, less = (int((one & ~other).sum()) for one, other in (pair, pair[::-1]))
    return float(scipy.stats.binomtest(more, more + less).pvalue) if more + less else 1.0


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which of several tests stay below 0.05 by Holm's correction for their number."""
    from statsmodels.stats.multitest import multipletests  # seconds

    return [bool(reject) for reject in multipletests(p_values, 0.05, "holm")[0]] if len(p_values) else []


def pair_of(result: Mapping[str, Any], other: Mapping[str, Any], attack: str) -> Pair:
    """What two stored results got wrong. Raises `ValueError` if their images differ."""
    a, b = (r["errors"][attack] for r in (result, other))
    if (a["images"], result["test images"]) != (b["images"], other["test images"]):
        raise ValueError(
            f"{attack}: two results are of different test images, {a['images']} and {b['images']}; measure "
            "both on the same"
        )
    return unpacked(a["wrong"], a["images"]), unpacked(b["wrong"], b["images"])


def rounded(share: float, *, sign: bool = False) -> str:
    """A share in percent with one decimal, halves away from 0, as one rounds a quotient of two counts."""
    if not math.isfinite(share):
        return str(share)
    exact = Fraction(share).limit_denominator(10**6)  # the quotient behind the float, of up to a million
    percent = Decimal(100 * exact.numerator) / exact.denominator
    shown = percent.quantize(Decimal("0.1"), ROUND_HALF_UP)
    return f"{shown if shown else abs(shown):{'+' if sign else ''}f}"


def format_error(wrong: Tensor) -> str:
    """Error with its interval: `31.5% (28.7-34.4)`."""
    return "{}% ({}-{})".format(*map(rounded, interval(wrong)))


def format_errors(wrongs: Iterable[Tensor]) -> str:
    """Error with its interval; of several seeds their mean and range: `31.5% (31.0 to 32.0, 2 seeds)`."""
    first, *others = wrongs
    if not others:
        return format_error(first)
    errors = [Fraction(int(w.sum()), len(w)) for w in (first, *others)]
    mean, low, high = (rounded(float(e)) for e in (sum(errors) / len(errors), min(errors), max(errors)))
    return f"{mean}% ({low} to {high}, {len(errors)} seeds)"
