import math
import random

import pytest
import torch

from examples.paper.common.records import check_errors
from examples.paper.common.statistics import entry, interval


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
