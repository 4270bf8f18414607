"""Sigmoid-like calls of any network: which are seen, how saturated they are, and gradients around them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.paper.audit import sigmoids
from sparta_act import Sparta

FUNCTIONS = {  # by name: a call, and the ends of its values
    "sigmoid": (torch.sigmoid, 0),
    "method": (lambda z: z.sigmoid(), 0),
    "expit": (torch.special.expit, 0),
    "module": (nn.Sigmoid(), 0),
    "functional": (F.sigmoid, 0),
    "in place": (lambda z: (z + 0).sigmoid_(), 0),
    "hardsigmoid": (nn.Hardsigmoid(), 0),
    "tanh": (torch.tanh, -1),
    "tanh module": (nn.Tanh(), -1),
}
each = pytest.mark.parametrize("name", FUNCTIONS)


class Gated(nn.Module):
    """x times a gate of x, twice, below a submodule."""

    def __init__(self, call, factor=1.0):
        super().__init__()
        self.gate = Gate(call, factor)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(self.gate(self.gate(x)).flatten(1))


class Gate(nn.Module):
    def __init__(self, call, factor):
        super().__init__()
        self.call, self.factor = call, factor

    def forward(self, x):
        return x * self.call(self.factor * x)


@each
def test_each_call_is_seen_by_the_name_of_its_module_and_counted_image_by_image(name):
    call, low = FUNCTIONS[name]
    model, x = Gated(call, 20.0).eval(), torch.rand(5, 3, 2, 2) - 0.5
    found = sigmoids.saturation(model, x, batch_size=2)
    place = "gate.call" if isinstance(call, nn.Module) else "gate"
    assert list(found) == [place, f"{place} #2"]
    share = (call(20 * x) - low) / (1 - low)
    near = ((share < 0.01) | (share > 0.99)).float().flatten(1).mean(1)
    assert found[place] == pytest.approx(near.tolist())
    assert 0 < near.mean() < 1


def test_what_does_not_depend_on_the_image_or_is_spartas_is_not_seen():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 1, 1))
            self.act, self.fc = Sparta(3), nn.Linear(48, 4)

        def forward(self, x):
            with torch.no_grad():
                torch.sigmoid(x)
            return self.fc(self.act(x * torch.sigmoid(self.weight)).flatten(1))

    assert sigmoids.saturation(Net(), torch.rand(2, 3, 4, 4)) == {}


@each
@pytest.mark.parametrize("substitute", sigmoids.SUBSTITUTES)
def test_the_copy_answers_as_the_network_and_leaves_it_alone(name, substitute):
    model, x = Gated(FUNCTIONS[name][0], 20.0).eval(), torch.rand(5, 3, 2, 2) - 0.5
    around = sigmoids.Around(model, sigmoids.SUBSTITUTES[substitute])
    z = x.clone().requires_grad_()
    assert torch.equal(around(z), model(x))
    grads = [torch.autograd.grad(m(z).sum(), z)[0] for m in (around, model)]
    assert torch.equal(*grads) == (name == "in place")  # that one keeps its own


def grad(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


@pytest.mark.parametrize("factor", [0.5, 30.0])
def test_the_gradients_are_those_of_the_formulas(factor):
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    gate = Gate(torch.sigmoid, factor).double()
    y = torch.sigmoid(factor * x)
    constant = grad(sigmoids.Around(gate, sigmoids.constant), x)
    torch.testing.assert_close(constant, y)
    size = (factor * x).flatten(1).std(1).clamp(min=1).view(4, 1, 1, 1)
    soft = torch.sigmoid(factor * x / size)
    expected = y + x * soft * (1 - soft) * factor / size
    torch.testing.assert_close(grad(sigmoids.Around(gate, sigmoids.softened), x), expected)
