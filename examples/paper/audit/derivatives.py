"""Is autograd's gradient the derivative? At a point, and along the ways that an attack goes."""

import copy

import torch
from torch import Tensor, nn

from examples.paper.attacks.pgd import attacking, random_images
from examples.paper.audit.budget import Budget
from examples.paper.audit.store import Store
from examples.paper.audit.victim import BATCH, Victim

NO_FLOAT64 = RuntimeError, TypeError, AttributeError  # what a network raises that cannot compute in float64
POINTS = 16  # of a way, at which its gradient is taken


def not_possible(error: Exception) -> str:
    """Stored instead of a result."""
    return f"not possible: {str(error).splitlines()[0]}"


def derivative(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """How far autograd's gradient is from a difference quotient, per image, in float64.

    At a random image of the ball, for a random weighted sum f of the logits, along a random corner v:
    |<gradient, v> - (f(x + h v) - f(x - h v)) / 2h|, relative to the largest of both and the gradient's norm,
    which is the size of <gradient, v> on average.
    """
    victim.seed_for(name)
    errors = list[float]()
    try:
        model = copy.deepcopy(victim.model).double()
        for images in random_images(victim.x, victim.eps).double().split(BATCH):
            errors += _quotient_errors(model, images).tolist()
    except NO_FLOAT64 as error:
        store.add_numbers(name, not_possible(error))
    else:
        store.add_numbers(name, errors)


def _quotient_errors(model: nn.Module, images: Tensor, h: float = 1e-7) -> Tensor:
    v = torch.randn_like(images).sign()
    with attacking(model):
        slope, weights, norm = _slope(model, images, v)
        with torch.no_grad():
            rise = ((model(images + h * v) - model(images - h * v)) * weights).sum(1) / (2 * h)
    return (slope - rise).abs() / torch.stack([slope.abs(), rise.abs(), norm]).amax(0).clamp(min=1e-12)


def along_random_ways(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """`_way_errors` along random corners: from eps/2 before a random image of the ball to eps/2 behind it."""
    victim.seed_for(name)
    middle = random_images(victim.x, victim.eps)
    step = victim.eps / 2 * torch.randn_like(middle).sign()
    store.add_numbers(name, _way_errors(victim.model, middle - step, middle + step))


def along_the_attack(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """`_way_errors` from each correctly classified image to the stored one, which fools or is PGD's last."""
    victim.seed_for(name)
    right = ~victim.clean
    attacked = store.images.to(victim.x)[right]
    store.add_numbers(name, _way_errors(victim.model, victim.x[right], attacked))


def _way_errors(model: nn.Module, begin: Tensor, end: Tensor) -> list[float]:
    """How far the gradient, summed along a straight way, is from the network's rise on it, per image.

    For a random weighted sum f of the logits: |f(end) - f(begin) - mean of <gradient, end - begin>| over
    `POINTS` points of the way, relative to the largest of the rise and the mean of |<gradient, end - begin>|.
    It is near 0 for whatever has no jumps, ReLU too, and up to 1 where jumps or something that autograd does
    not see make the rise.
    Shapes: (N, C, H, W) both.
    """
    errors = list[float]()
    with attacking(model):
        for a, b in zip(begin.split(BATCH), end.split(BATCH), strict=True):
            way, weights, slopes = b - a, None, []
            for k in range(POINTS):
                slope, weights, _ = _slope(model, a + (k + 0.5) / POINTS * way, way, weights)
                slopes.append(slope)
            with torch.no_grad():
                rise = ((model(b.clone()) - model(a.clone())) * weights).sum(1)
            each = torch.stack(slopes)
            scale = torch.maximum(rise.abs(), each.abs().mean(0)).clamp(min=1e-12)
            errors += ((rise - each.mean(0)).abs() / scale).tolist()
    return errors


def _slope(
    model: nn.Module, x: Tensor, v: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Slope along v of a weighted sum of the logits, its weights, drawn by default, the gradient's norm."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        logits = model(x.clone())
        weights = torch.randn_like(logits) if weights is None else weights
        (grad,) = torch.autograd.grad((logits * weights).sum(), x)
    return (grad * v).flatten(1).sum(1), weights, grad.flatten(1).norm(dim=1)
