"""The rule by which a reading of SPARTA wins, on results of which the winner is known."""

import pytest
import torch

from contest import minus, saturated, verdict
from kept import packed

CASES = ("worst case, 8/255", "worst case, 16/255")


def result(small, large, gates=(0.0, 0.0), work=100, images=1000):
    """Errors in the two worst cases, gates below and above at one site, multiply-adds."""
    errors = {
        case: {"error": e, "images": images, "wrong": packed(torch.arange(images) < round(e * images))}
        for case, e in zip(CASES, (small, large), strict=True)
    }
    below, above = gates
    last = {"epoch": 3.0, "layer1.1.act2 < 0.01": below, "layer1.1.act2 > 0.99": above}
    return {"errors": errors, "last epoch": last, "multiply-adds": work, "test images": "all"}


@pytest.mark.parametrize("bound", [0, 1])
def test_more_errors_than_noise_at_one_bound_lose_whatever_else_is_good(bound):
    errors = [0.5, 0.5]
    errors[bound] = 0.52
    a, b = result(0.5, 0.5, gates=(0.3, 0.3), work=900), result(*errors)
    winner, why = verdict({"a": a, "b": b})
    assert winner == "a"
    (line,) = why
    assert line.startswith(f"`b` is out: {CASES[bound]}, it errs by +2.0 ± 0.9 points more than `a`")


def test_within_noise_the_less_saturated_wins_then_the_cheaper():
    a, b = result(0.5, 0.5, gates=(0.1, 0.05), work=50), result(0.502, 0.5, gates=(0.01, 0.01), work=100)
    assert minus(b, a, CASES[0])[0] < minus(b, a, CASES[0])[1]
    winner, why = verdict({"a": a, "b": b})
    assert winner == "b"
    assert why == ["`a` has more saturated gates: 15.0% against 2.0% of `b`"]
    c = result(0.501, 0.5, gates=(0.025, 0.0), work=60)  # 2.5%: alike
    winner, why = verdict({"a": a, "b": b, "c": c})
    assert winner == "c"
    assert why[1] == "`b` costs more: 1.67 times the multiply-adds of `c`"


def test_a_reading_that_is_out_sets_no_mark_for_saturation():
    out, a, b = result(0.9, 0.9), result(0.5, 0.5, gates=(0.2, 0)), result(0.5, 0.5, gates=(0.3, 0))
    assert verdict({"out": out, "a": a, "b": b})[0] == "a"


def test_saturation_adds_both_ends_of_each_site():
    last = {"epoch": 4.0, "lr": 0.1, "a < 0.01": 0.25, "a > 0.99": 0.5, "b < 0.01": 0.0, "b > 0.99": 0.125}
    assert saturated({"last epoch": last}) == {"a": 0.75, "b": 0.125}
    assert saturated({"last epoch": {"epoch": 4.0, "loss": 1.0}}) == {}


def test_results_on_other_images_are_not_compared():
    with pytest.raises(ValueError, match="1000 images against 500"):
        minus(result(0.5, 0.5), result(0.5, 0.5, images=500), CASES[0])
    with pytest.raises(ValueError, match="of another test split"):
        minus(result(0.5, 0.5), result(0.5, 0.5) | {"test images": "others"}, CASES[0])
