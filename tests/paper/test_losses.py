"""Each loss against plain Python, one image at a time, and its invariances."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from examples.paper.attacks import losses

UNTARGETED = [losses.cross_entropy, losses.cw, losses.dlr]
TARGETED = [losses.cross_entropy_to, losses.cw_to, losses.dlr_to]


def drawn(n=40, classes=6):
    """Logits, true classes and targets; the true class is the likeliest for some images, not for all."""
    logits = 3 * torch.randn(n, classes, dtype=torch.float64)
    y = torch.randint(classes, (n,))
    return logits, y, (y + torch.randint(1, classes, (n,))) % classes


def others(z, y):
    return [v for k, v in enumerate(z) if k != y]


def entropy(z, y):
    return math.log(sum(math.exp(v) for v in z)) - z[y]


def spread(z):
    down = sorted(z, reverse=True)
    return down[0] - down[2]


def spread_to(z):
    down = sorted(z, reverse=True)
    return down[0] - (down[2] + down[3]) / 2


BY_HAND = {
    losses.cross_entropy: lambda z, y: entropy(z, y),
    losses.cw: lambda z, y: max(others(z, y)) - z[y],
    losses.dlr: lambda z, y: (max(others(z, y)) - z[y]) / spread(z),
    losses.cross_entropy_to: lambda z, y, t: -entropy(z, t),
    losses.cw_to: lambda z, y, t: z[t] - z[y],
    losses.dlr_to: lambda z, y, t: (z[t] - z[y]) / spread_to(z),
}


def goals_of(loss, y, target):
    return (y, target) if loss in TARGETED else (y,)


@pytest.mark.parametrize("classes", [4, 10])
@pytest.mark.parametrize("loss", BY_HAND)
def test_a_loss_is_its_formula(loss, classes):
    logits, y, target = drawn(classes=classes)
    goals = goals_of(loss, y, target)
    expected = [BY_HAND[loss](z.tolist(), *(int(g[i]) for g in goals)) for i, z in enumerate(logits)]
    found = loss(logits, *goals)
    assert found.shape == (40,)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_numbers_computed_by_hand():
    logits = torch.tensor([[5.0, 3.0, 2.0, 0.0], [5.0, 3.0, 2.0, 0.0]])
    y, target = torch.tensor([0, 2]), torch.tensor([3, 1])
    assert losses.cw(logits, y).tolist() == [-2, 3]
    torch.testing.assert_close(losses.dlr(logits, y), torch.tensor([-2 / 3, 1.0]))
    assert losses.cw_to(logits, y, target).tolist() == [-5, 1]
    torch.testing.assert_close(losses.dlr_to(logits, y, target), torch.tensor([-5 / 4, 1 / 4]))


@pytest.mark.parametrize("loss", [losses.dlr, losses.dlr_to])
def test_equal_logits_are_no_division_by_zero(loss):
    y = torch.tensor([0, 3])
    found = loss(torch.ones(2, 5), *goals_of(loss, y, torch.tensor([1, 2])))
    assert found.tolist() == [0, 0]


def test_the_true_class_is_excluded_however_large_its_logit():
    logits = torch.tensor([[1e30, 2.0, 1.0], [-1e30, 2.0, 1.0]])
    y = torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(losses.cw(logits, y), torch.tensor([-1e30, 1e30]))


@pytest.mark.parametrize("loss", BY_HAND)
def test_the_gradient_is_that_of_the_formula(loss):
    logits, y, target = drawn(5)
    assert gradcheck(lambda z: loss(z, *goals_of(loss, y, target)), (logits.requires_grad_(),))
