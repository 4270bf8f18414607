"""How far a gradient is from the derivative at a point, and from the rise along a way."""

import math

import pytest
import torch
from torch import nn

from examples.paper.audit import derivatives
from examples.paper.audit.budget import Budget
from examples.paper.audit.store import Store
from examples.paper.audit.victim import Victim

N, EPS = 40, 8 / 255


class Net(nn.Module):
    """A random two-layer network with ReLU, and `between` what happens to the image before it."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 5))

    def forward(self, x):
        return self.layers(self.between(x))


def stairs(levels, straight):
    def rounded(x):
        y = (x * levels).round() / levels
        return x + (y - x).detach() if straight else y

    return rounded


KINDS = {  # by name: what is before the network, whether it is right at a point, along ways
    "nothing": (lambda x: x, True, True),
    "a clamp": (lambda x: x.clamp(0.3, 0.7), True, True),
    "fine stairs, straight-through": (stairs(1000, True), False, True),
    "coarse stairs, straight-through": (stairs(6, True), False, False),
    "stairs": (stairs(60, False), True, False),
    "a part that autograd does not see": (lambda x: 0.1 * x + 0.9 * x.detach(), False, False),
    "NaN for a gradient": (lambda x: x + 0 * (x - x.detach()).sqrt(), False, False),
}


def measured(between, tmp_path):
    torch.manual_seed(0)
    model = Net(between).eval()
    x = torch.rand(N, 3, 4, 4)
    y = torch.cat([model(x[: N // 2]).argmax(1), (model(x[N // 2 :]).argmax(1) + 1) % 5])  # half are right
    victim, store = Victim(model, x, y, EPS, 0), Store(x, y, tmp_path / "audit.safetensors", "key")
    store.images = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    for name in ("derivative", "along_random_ways", "along_the_attack"):
        getattr(derivatives, name)(victim, store, Budget(), name)
    return [torch.tensor(store.numbers[n]) for n in ("derivative", "along_random_ways", "along_the_attack")]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_near_0_where_the_gradient_is_right_and_large_where_it_is_not(kind, tmp_path):
    between, at_a_point, along_ways = KINDS[kind]
    point, random, attack = measured(between, tmp_path)
    assert [len(t) for t in (point, random, attack)] == [N, N, N // 2]  # an attack starts where it is right
    assert (point.median() < 1e-3) == at_a_point
    for errors in (random, attack):
        found = errors.nan_to_num(math.inf).median()
        assert found < 0.1 if along_ways else found > 0.2


def test_the_sum_of_the_gradient_is_the_rise_of_a_linear_network_and_misses_a_jump_of_known_size(tmp_path):
    class Step(nn.Module):
        """Rises by 1 along the way, and jumps by `jump` in its middle."""

        def forward(self, x):
            mean = x.mean((1, 2, 3), keepdim=True).flatten(1)
            return (mean + self.jump * (mean > 0.5).to(x.dtype)).repeat(1, 2)

    model, ends = Step().eval(), [torch.full((3, 1, 2, 2), v) for v in (0.0, 1.0)]
    for jump in (0.0, 1.0, 3.0):
        model.jump = jump
        assert derivatives._way_errors(model, *ends) == pytest.approx([jump / (1 + jump)] * 3, abs=1e-5)


def test_a_network_that_cannot_compute_in_float64_is_measured_along_ways_all_the_same(tmp_path):
    class Narrow(Net):
        def forward(self, x):
            if x.dtype == torch.float64:
                raise RuntimeError("no double\nhere")
            return super().forward(x)

    x, y = torch.rand(4, 3, 4, 4), torch.zeros(4, dtype=torch.long)
    victim, store = Victim(Narrow(nn.Identity()), x, y, EPS, 0), Store(x, y, tmp_path / "a.safetensors", "k")
    derivatives.derivative(victim, store, Budget(), "derivative")
    derivatives.along_random_ways(victim, store, Budget(), "ways")
    assert store.numbers["derivative"] == "not possible: no double"
    assert max(store.numbers["ways"]) < 0.1
