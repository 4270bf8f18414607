"""Robust error by PGD, and no more of it than needed: an image that is broken leaves, the next one enters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from attacks import attacking, check, classes_of, random_images, random_targets, widen, within
from folding import folded


def robust_errors(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    targeted: bool = False,
    random_start: bool = True,
    restarts: int = 1,
    batch_size: int = 250,
) -> Tensor:
    """Which images the network gets wrong: clean, or at any image that PGD comes by.

    The same as attacking every image to the last step and asking at each, at a fraction of the work: of a
    weak network little but the first steps. It counts more than `attacks.pgd`, which judges the last images
    alone. The steps run on a copy with batch norm folded away; whether an image is broken is asked of the
    network itself. `eps`, `step_size`, `targeted`, `random_start` and
    `restarts` are those of `attacks.pgd`.

    Shapes: x (N, C, H, W) in [0, 1], y (N,), result (N,) of bool.
    Raises `ValueError` for other images, and for fewer than one step or restart.
    """
    check(x, steps, restarts)
    step = -step_size if targeted else step_size
    with attacking(model), tqdm(total=len(x) * restarts, unit="img", desc="robust error", leave=False) as bar:
        broken = clean_errors(model, x, y, batch_size)
        fast = folded(model, x[:2]) if len(x) else model
        for _ in range(restarts):
            (left,) = torch.where(~broken)
            bar.update(len(x) - len(left))
            if len(left) == 0:
                break
            images, labels = x[left], y[left]
            goal = random_targets(labels, classes_of(model, x)) if targeted else labels
            start = random_images(images, eps) if random_start else images
            broken[left] = _run(model, fast, images, labels, goal, start, eps, step, steps, batch_size, bar)
    return broken


@torch.no_grad()
def clean_errors(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 250) -> Tensor:
    """Which images the network gets wrong as they are, in the mode it is in. Shapes as above."""
    wrong = torch.zeros_like(y, dtype=torch.bool)
    for i in range(0, len(x), batch_size):
        part = slice(i, i + batch_size)
        wrong[part] = model(x[part]).argmax(1) != y[part]
    return wrong


def _run(
    model: nn.Module,
    fast: nn.Module,
    x: Tensor,
    y: Tensor,
    goal: Tensor,
    start: Tensor,
    eps: float,
    step: float,
    steps: int,
    batch_size: int,
    bar: "tqdm[None]",
) -> Tensor:
    """One PGD run in which each image is at a step of its own: which of them broke, (N,) of bool."""
    low, high = within(x, eps)
    x_adv, broken, taken = start.clone(), torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y)
    waiting = torch.arange(len(x), device=x.device)
    batch = waiting[:0]
    while len(batch) or len(waiting):
        free = batch_size - len(batch)
        batch, waiting = torch.cat([batch, waiting[:free]]), waiting[free:]
        images = x_adv[batch].requires_grad_()
        with torch.enable_grad():
            logits = widen(fast(images))
            loss = F.cross_entropy(logits, goal[batch], reduction="sum")
            (grad,) = torch.autograd.grad(loss, images)
        images, suspect = images.detach(), logits.argmax(1) != y[batch]
        broken[batch[suspect]] = clean_errors(model, images[suspect], y[batch[suspect]], batch_size)
        x_adv[batch] = images.add(grad.sign(), alpha=step).clamp_(low[batch], high[batch])
        taken[batch] += 1
        stays = ~broken[batch] & (taken[batch] < steps)
        bar.update(len(batch) - int(stays.sum()))
        batch = batch[stays]
    (left,) = torch.where(~broken)
    broken[left] = clean_errors(model, x_adv[left], y[left], batch_size)
    return broken
