"""Random noise, where the smallest change that fools the network is known."""

import pytest
import torch
from torch import nn

from examples.paper.attacks.pgd import within
from examples.paper.audit.noise import noise

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


def test_below_the_distance_nothing_breaks():
    model, x, y = known()
    broken, images = noise(model, x, y, eps=0.98 * NEAREST, draws=200)
    assert broken.dtype == torch.bool
    assert broken.tolist() == [False] * 12
    assert torch.equal(images, x)


def test_well_above_the_distance_everything_breaks_and_the_images_show_it():
    model, x, y = known()
    eps = 10 * NEAREST
    broken, images = noise(model, x, y, eps=eps, draws=200)
    assert broken.tolist() == [True] * 12
    assert images.shape == x.shape
    assert (model(images).argmax(1) != y).all()
    assert (images - x).abs().max() <= eps + 1e-6
    assert images.min() >= 0
    assert images.max() <= 1


def test_images_stay_among_images_at_the_edge_of_what_there_is():
    model, x, y = known()
    x = torch.where(x > 0.5, 1.0, 0.0).double()
    y = model(x).argmax(1)
    _, images = noise(model, x, y, eps=0.3, draws=200)
    assert images.min() == 0
    assert images.max() == 1
    assert (images - x).abs().max() <= 0.3 + 1e-6


def test_what_is_wrong_as_it_is_counts_and_is_not_changed():
    model, x, y = known()
    y[:5] = (y[:5] + 1) % 3
    broken, images = noise(model, x, y, eps=1e-3, draws=200)
    assert broken.tolist() == [True] * 5 + [False] * 7
    assert torch.equal(images, x)


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
