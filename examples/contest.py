"""Which reading of SPARTA wins: a rule, written down before there were results to apply it to.

1. A reading is out if, in the worst case at 8/255 or at 16/255, it errs more than the best one by more than
   noise (paired 95% interval over the images).
2. Of those left wins the one with the smallest share of saturated gates after the last epoch (below 0.01 or
   above 0.99, mean over the sites); shares that differ by less than a point are alike.
3. Of those alike wins the one with the fewest multiply-adds.
"""

from collections.abc import Mapping
from typing import Any

from kept import unpacked
from report import difference, told

CASES = ("worst case, 8/255", "worst case, 16/255")
ALIKE = 0.01  # of the saturated share


def saturated(result: Mapping[str, Any]) -> dict[str, float]:
    """Share of each gate below 0.01 or above 0.99 after the last epoch, by site; empty without SPARTA."""
    shares: dict[str, float] = {}
    for name, share in result["last epoch"].items():
        site, sign, _ = name.partition(" <") if " <" in name else name.partition(" >")
        if sign:
            shares[site] = shares.get(site, 0.0) + share
    return shares


def minus(result: Mapping[str, Any], other: Mapping[str, Any], attack: str) -> tuple[float, float]:
    """Error minus the other's on the same images, and half its interval. Raises `ValueError` for others."""
    a, b = (r["errors"][attack] for r in (result, other))
    if (a["images"], result["test images"]) != (b["images"], other["test images"]):
        raise ValueError(f"{attack}: {a['images']} images against {b['images']}, or of another test split")
    return difference(unpacked(a["wrong"], a["images"]), unpacked(b["wrong"], b["images"]))


def verdict(results: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[str]]:
    """The winner by the rule, and why each other one is not, a line each. Of filed results by reading."""
    why: dict[str, str] = {}
    for case in CASES:
        best = min(results, key=lambda r: float(results[r]["errors"][case]["error"]))
        for reading, result in results.items():
            d, half = minus(result, results[best], case)
            if d > half and reading not in why:
                why[reading] = (
                    f"`{reading}` is out: {case}, it errs by {told(d, half)} points more than `{best}`"
                )
    left = [r for r in results if r not in why]
    means = {r: _mean(saturated(results[r])) for r in left}
    soft = [r for r in left if means[r] < min(means.values()) + ALIKE]
    winner = min(soft, key=lambda r: int(results[r]["multiply-adds"]))
    for reading in left:
        if reading not in soft:
            lowest = min(soft, key=means.__getitem__)
            shares = f"{means[reading]:.1%} against {means[lowest]:.1%} of `{lowest}`"
            why[reading] = f"`{reading}` has more saturated gates: {shares}"
        elif reading != winner:
            work = f"{results[reading]['multiply-adds'] / results[winner]['multiply-adds']:.2f}"
            why[reading] = f"`{reading}` costs more: {work} times the multiply-adds of `{winner}`"
    return winner, list(why.values())


def _mean(shares: Mapping[str, float]) -> float:
    return sum(shares.values()) / max(1, len(shares))
