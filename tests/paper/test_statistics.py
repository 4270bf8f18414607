"""Errors and differences against counts by hand, exact fractions and simulated coverage."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch

from examples.paper.common.records import check_errors, packed
from examples.paper.common.statistics import (
    entry,
    format_error,
    format_errors,
    holm,
    interval,
    p_value,
    pair_of,
    paired,
    rounded,
    with_seeds,
)


def by_hand(k, n, z=1.959964):
    p = k / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def test_an_interval_is_wilsons_formula():
    draw = random.Random(0)
    for _ in range(50):
        n = draw.randint(1, 10_000)
        wrong = torch.arange(n) < draw.randint(0, n)
        assert interval(wrong) == pytest.approx(by_hand(int(wrong.sum()), n), abs=1e-6)
        check_errors({"clean": entry(wrong)})
    for n in range(1, 200):
        assert interval(torch.zeros(n).bool())[:2] == (0, 0)
        assert interval(torch.ones(n).bool())[::2] == (1, 1)


def two_by_two(both, first, second, neither):
    """Two networks by counts of images: wrong in both, the first alone, the second alone, neither."""
    one = torch.tensor([True] * (both + first) + [False] * (second + neither))
    other = torch.tensor([True] * both + [False] * first + [True] * second + [False] * neither)
    return one, other


@pytest.mark.parametrize("counts", [(1, 2, 1, 4), (30, 12, 5, 53), (0, 7, 0, 3), (0, 0, 9, 1), (5, 0, 0, 5)])
def test_a_difference_is_that_of_the_table_with_half_an_image_more_in_each_cell(counts):
    """Bonett and Price add 1 to each count of images that the two judge differently, and 2 to their sum."""
    _, first, second, _ = counts
    n, a, b = sum(counts) + 2, first + 1, second + 1
    middle = (a - b) / n
    half = 1.959964 * math.sqrt((a + b - (a - b) ** 2 / n) / n**2)
    found = paired(two_by_two(*counts))
    assert found == pytest.approx(((first - second) / sum(counts), middle - half, middle + half))
    assert found.half == pytest.approx(half)
    mirrored = paired(two_by_two(*counts)[::-1])
    assert mirrored == pytest.approx((-found.value, -found.high, -found.low))


def test_a_difference_as_text():
    assert str(paired(two_by_two(800, 90, 40, 1070))) == "+2.5 ± 1.1"
    assert str(paired(two_by_two(0, 0, 0, 2000))) == "+0.0 ± 0.1"


def test_seeds_of_one_outcome_are_one_pair():
    pair = two_by_two(30, 12, 5, 53)
    for count in (2, 3):
        assert paired(*[pair] * count) == pytest.approx(paired(pair))
        assert with_seeds([pair] * count) == pytest.approx(paired(pair))


def test_the_mean_of_seeds_is_less_uncertain_where_their_images_differ():
    """Two seeds that never disagree on the same image are one network pair of twice the images."""
    one, other = two_by_two(0, 40, 20, 140)
    both = (one, other), (one.flip(0), other.flip(0))
    mean = paired(*both)
    assert mean.value == pytest.approx(20 / 200)
    difference = (one.int() - other.int() + one.flip(0).int() - other.flip(0).int()) / 2
    padded = torch.cat([difference, torch.tensor([1.0, -1.0])]).double()
    half = 1.959964 * padded.std(unbiased=False).item() / math.sqrt(len(padded))
    assert mean.half == pytest.approx(half)
    assert mean.half < paired(both[0]).half


def test_seeds_that_differ_widen_the_interval_by_student():
    pairs = [two_by_two(0, 30, 10, 160), two_by_two(0, 10, 12, 178)]  # +10 and -1 points
    found, images = with_seeds(pairs), paired(*pairs)
    spread = abs(0.10 - -0.01) / 2  # standard error of the mean of two numbers
    assert found.value == images.value == pytest.approx(0.045)
    assert found.half == pytest.approx(math.hypot(images.half, 12.7062 * spread), rel=1e-5)  # t of 1 degree


def covered(draw, interval_of, truth, trials=2000):
    """Share of simulated intervals that hold the truth."""
    found = (interval_of(draw()) for _ in range(trials))
    return sum(low <= truth <= high for _, low, high in found) / trials


@pytest.mark.parametrize(("n", "first", "second"), [(60, 0.1, 0.03), (500, 0.05, 0.05), (2000, 0.09, 0.07)])
def test_intervals_over_images_hold_the_truth_as_often_as_they_say(n, first, second):
    def draw():
        u = torch.rand(n)
        return u < first, (first <= u) & (u < first + second)

    assert 0.94 <= covered(draw, paired, first - second) <= 0.975


def test_intervals_with_seeds_hold_the_truth_over_trainings():
    def draw():
        """Two seeds, whose networks truly differ by N(2, 2) points, on the same 2,000 images."""
        u, pairs = torch.rand(2000), []
        for _ in range(2):
            first = 0.1 + random.gauss(0.02, 0.02)
            pairs.append((u < first, (first <= u) & (u < first + 0.1)))
        return pairs

    assert covered(draw, with_seeds, 0.02, 1000) >= 0.94
    assert covered(draw, lambda pairs: paired(*pairs), 0.02, 1000) < 0.8  # over images alone


@pytest.mark.parametrize(("first", "second"), [*itertools.product([0, 1, 2, 5, 9, 40], repeat=2)])
def test_mcnemars_p_is_twice_the_binomial_tail(first, second):
    n, few = first + second, min(first, second)
    tail = sum(math.comb(n, k) for k in range(few + 1)) / 2**n
    assert p_value(two_by_two(3, first, second, 4)) == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([0.04], [True]),
        ([0.04, 0.03], [False, False]),  # the smallest is held against 0.025
        ([0.04, 0.02], [True, True]),  # and then the next against 0.05
        ([0.03, 0.001, 0.02, 0.9], [False, True, False, False]),  # 0.0125, then 0.05 / 3
        ([0.001, 0.016, 0.024, 0.05], [True, True, True, True]),
    ],
)
def test_holm_by_hand(values, expected):
    assert holm(values) == expected


@pytest.mark.parametrize("n", [50, 2000, 10_000])
def test_shares_are_rounded_from_counts(n):
    for k in range(-n, n + 1):
        tenths = Fraction(1000 * abs(k), n) + Fraction(1, 2)  # of a percent, halves up
        whole, tenth = divmod(tenths.numerator // tenths.denominator, 10)
        text = f"{whole}.{tenth}"
        minus = "-" if k < 0 and text != "0.0" else ""
        assert rounded(k / n) == minus + text
        assert rounded(k / n, sign=True) == (minus or "+") + text


def test_errors_as_text():
    wrong = [torch.arange(1000) < k for k in (315, 320, 310)]
    assert format_error(wrong[0]) == format_errors(wrong[:1]) == "31.5% (28.7-34.4)"
    assert format_errors(wrong[:2]) == "31.8% (31.5 to 32.0, 2 seeds)"  # 31.75: halves go up
    assert format_errors(iter(wrong)) == "31.5% (31.0 to 32.0, 3 seeds)"
    assert rounded(math.nan) == "nan"


def test_only_results_on_the_same_images_are_a_pair():
    wrong = torch.arange(500) < 200
    filed = {"errors": {"clean": {"images": 500, "wrong": packed(wrong)}}, "test images": "all"}
    assert all(w.equal(wrong) for w in pair_of(filed, filed, "clean"))
    few = {"errors": {"clean": filed["errors"]["clean"] | {"images": 496}}, "test images": "all"}
    with pytest.raises(ValueError, match="500 and 496"):
        pair_of(filed, few, "clean")
    with pytest.raises(ValueError, match="of different test images"):
        pair_of(filed, filed | {"test images": "others"}, "clean")
