"""Attacks without gradients, where the smallest change that fools the network is known."""

import sys

import pytest
import torch
from torch import nn

from examples.paper.attacks.pgd import within
from examples.paper.audit.gradient_free import noise, square

NEAREST = 0.02  # how far each image of `known` is from another class


class Linear(nn.Module):
    """Logits of a matrix, which counts the images it is asked about."""

    def __init__(self, classes=3):
        super().__init__()
        self.w = nn.Parameter(torch.randn(classes, 48, dtype=torch.float64))
        self.norm, self.seen = nn.BatchNorm2d(3), []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return x.flatten(1).to(self.w.dtype) @ self.w.T


def distance(model, x, y):
    """L-infinity distance to the nearest other class, and that: gap of logits by L1 norm of weights."""
    logits = x.flatten(1).double() @ model.w.T
    gap = logits.gather(1, y[:, None]) - logits
    to_each = gap / (model.w[y][:, None] - model.w).abs().sum(2)
    return to_each.scatter(1, y[:, None], torch.inf).min(1)


def known(n=12):
    """A network of three classes and images for which 0.02 is exactly enough, far from black and white."""
    model = Linear()
    x = 0.5 + 0.1 * torch.randn(n, 3, 4, 4, dtype=torch.float64).clamp(-1, 1)
    y = model(x).argmax(1)
    for _ in range(200):  # along the straight way to the nearest class, or back
        far, nearest = distance(model, x, y)
        step = ((model.w[nearest] - model.w[y]).sign().view_as(x)) * (far - NEAREST).view(-1, 1, 1, 1)
        x = (x + step).detach()
    far, _ = distance(model, x, y)
    torch.testing.assert_close(far, torch.full_like(far, NEAREST))
    assert x.min() > 0.1
    assert x.max() < 0.9
    model.seen.clear()
    return model, x, y


def blind(model, x, y, eps, seed=0):
    torch.manual_seed(seed)
    return noise(model, x, y, eps=eps, draws=200)


def by_squares(model, x, y, eps):
    return square(model, x, y, eps=eps, queries=300, seed=0)


ATTACKS = {blind: 10, by_squares: 2.5}  # and how many times the distance is well above it


@pytest.mark.parametrize("attack", ATTACKS)
def test_below_the_distance_nothing_breaks(attack):
    model, x, y = known()
    broken, images = attack(model, x, y, 0.98 * NEAREST)
    assert broken.dtype == torch.bool
    assert broken.tolist() == [False] * 12
    assert torch.equal(images, x)


@pytest.mark.parametrize("attack", ATTACKS)
def test_well_above_the_distance_everything_breaks_and_the_images_show_it(attack):
    model, x, y = known()
    eps = ATTACKS[attack] * NEAREST
    broken, images = attack(model, x, y, eps)
    assert broken.tolist() == [True] * 12
    assert images.shape == x.shape
    assert (model(images).argmax(1) != y).all()
    assert (images - x).abs().max() <= eps + 1e-6
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("attack", ATTACKS)
def test_images_stay_among_images_at_the_edge_of_what_there_is(attack):
    model, x, y = known()
    x = torch.where(x > 0.5, 1.0, 0.0).double()
    y = model(x).argmax(1)
    _, images = attack(model, x, y, 0.3)
    assert images.min() == 0
    assert images.max() == 1
    assert (images - x).abs().max() <= 0.3 + 1e-6  # Square's steps are float32


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_wrong_as_it_is_counts_and_is_not_changed(attack):
    model, x, y = known()
    y[:5] = (y[:5] + 1) % 3
    broken, images = attack(model, x, y, 1e-3)
    assert broken.tolist() == [True] * 5 + [False] * 7
    assert torch.equal(images, x)


@pytest.mark.parametrize("attack", ATTACKS)
def test_network_and_images_are_left_as_they_were(attack):
    model, x, y = known()
    model.train()
    model.norm.eval()
    model.w.requires_grad_(False)
    before, labels = x.clone(), y.clone()
    attack(model, x, y, ATTACKS[attack] * NEAREST)
    assert model.training
    assert not model.norm.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(x, before)
    assert torch.equal(y, labels)


# ---- noise


def test_draws_are_uniform_in_the_ball_and_at_its_corners_by_turns():
    model, x, y = known()
    x[0, 0, 0, 0] = 0.0  # where the ball is cut
    y = model(x).argmax(1)
    eps = 0.5 * distance(model, x, y)[0].min().item()
    model.seen.clear()
    noise(model, x, y, eps=eps, draws=6)
    clean, *draws = model.seen
    assert torch.equal(clean, x)
    low, high = within(x, eps)
    assert low.min() == 0
    for k, draw in enumerate(draws):
        assert (draw >= low).all()
        assert (draw <= high).all()
        at_a_corner = (draw == low) | (draw == high)
        if k % 2:
            assert at_a_corner.all()
            assert 0.35 < (draw == low).double().mean() < 0.65
        else:
            assert at_a_corner[1:].double().mean() < 0.1
            assert ((draw - x)[1:].abs() < eps / 2).double().mean() > 0.4
    assert len({draw.sum().item() for draw in draws}) == 6


def test_without_draws_only_the_errors_count():
    model, x, y = known()
    y[3] = (y[3] + 1) % 3
    broken, images = noise(model, x, y, eps=0.5, draws=0)
    assert torch.where(broken)[0].tolist() == [3]
    assert torch.equal(images, x)


@pytest.mark.parametrize("batch_size", [5, 250])
def test_a_broken_image_is_left_alone(batch_size):
    model, x, y = known()
    torch.manual_seed(0)
    broken, _ = noise(model, x, y, eps=10 * NEAREST, draws=200, batch_size=batch_size)
    assert broken.all()
    assert sum(map(len, model.seen)) < 12 * 200 / 4
    assert max(map(len, model.seen)) == min(batch_size, 12)


def test_more_draws_break_more_and_lose_none():
    model, x, y = known()
    found = []
    for draws in (2, 60):
        torch.manual_seed(1)
        found.append(noise(model, x, y, eps=4 * NEAREST, draws=draws)[0])
    few, many = found
    assert (many | ~few).all()
    assert many.sum() > few.sum()


# ---- Square


def test_square_asks_no_more_than_it_may():
    model, x, y = known()
    counts = []
    for queries in (10, 25):
        model.seen.clear()
        square(model, x, y, eps=0.5 * NEAREST, queries=queries, seed=0)
        counts.append(sum(map(len, model.seen)))
    assert counts[1] - counts[0] == 15 * 12


def test_square_is_the_same_for_the_same_seed():
    model, x, y = known()
    a, b, c = (square(model, x, y, eps=2.5 * NEAREST, queries=300, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_without_pyautoattack_square_says_what_to_install(monkeypatch):
    model, x, y = known()
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(
        ValueError, match=r"AutoAttack is not installed; in a clone: pip install -e '\.\[paper"
    ):
        square(model, x, y, eps=0.1, queries=5, seed=0)
    assert model.seen == []
