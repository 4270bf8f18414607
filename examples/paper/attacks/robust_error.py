"""Robust error with early stopping: an image leaves the batch once it is broken, and the next one enters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks.folding import folded
from examples.paper.attacks.losses import cross_entropy, dlr_to
from examples.paper.attacks.pgd import attacking, random_images, within
from examples.pgd import check_images, check_logits, check_numbers, direction, is_wrong

Loss = Callable[..., Tensor]  # of `losses.py`: logits (N, K), labels (N,) and perhaps targets (N,) to (N,)
# number of the run, indices (n,) of images: their targets (n,), none for an untargeted loss
Targets = Callable[[int, Tensor], tuple[Tensor, ...]]


@torch.inference_mode(False)
def robust_errors(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    random_start: bool = True,
    batch_size: int = 250,
) -> Tensor:
    """Which images the network gets wrong, clean or at any step of untargeted PGD.

    The result is that of attacking every image to the last step and evaluating the network at each, at a
    fraction of the cost. It counts more errors than `pgd`, which evaluates only the last images. The steps
    run on a copy with batch norms folded; success is judged by the network itself. `eps`, `step_size`
    and `random_start` are those of `pgd`.

    Shapes: x (N, C, H, W) in [0, 1], y (N,), result (N,) of bool.
    Raises `ValueError` for images, labels, numbers or logits that no attack can work with: `examples.pgd`.
    """
    check_numbers(eps=eps, step_size=step_size, steps=steps, batch_size=batch_size)
    attack = {"eps": eps, "step_size": step_size, "steps": steps, "batch_size": batch_size}
    more = {"runs": 1, "random_start": random_start, "classes": check_images(x, y)}
    return _errors_of_runs(model, x.detach(), y, cross_entropy, lambda _, __: (), **more, **attack)


@torch.inference_mode(False)
def dlr_errors(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    targets: int = 3,
    batch_size: int = 250,
) -> Tensor:
    """`robust_errors` by targeted DLR: one run for each of the likeliest wrong classes of the clean image.

    The likeliest class comes first, and each run has its own random start. Broken images are not attacked
    again. Shapes and errors as `robust_errors`; the loss needs four classes, and each target one more.
    Source of the loss: Croce & Hein 2020, arXiv:2003.01690, Eq. 7.
    """
    check_numbers(eps=eps, step_size=step_size, steps=steps, targets=targets, batch_size=batch_size)
    attack = {"eps": eps, "step_size": step_size, "steps": steps, "batch_size": batch_size}
    classes = check_images(x, y)
    x = x.detach()

    def likeliest(run: int, left: Tensor) -> tuple[Tensor, ...]:
        return (likeliest_wrong(model, x[left], y[left], targets, batch_size)[:, run],)

    more = {"runs": targets, "random_start": True, "classes": classes}
    return _errors_of_runs(model, x, y, dlr_to, likeliest, **more, **attack)


@torch.no_grad()
def likeliest_wrong(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, count: int, batch_size: int = 250
) -> Tensor:
    """Wrong classes of the largest logits, in descending order. Shapes: (N, C, H, W), (N,) -> (N, count).

    Raises `ValueError` for fewer than `count` wrong classes.
    """
    found = []
    for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        logits = check_logits(model(images.clone()), len(images))
        if count >= logits.shape[1]:
            raise ValueError(f"{count} wrong classes are too many: the network has {logits.shape[1]} classes")
        found.append(logits.scatter(1, labels[:, None], -torch.inf).topk(count, 1).indices)
    return torch.cat(found)


def _errors_of_runs(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    targets: Targets,
    *,
    eps: float,
    runs: int,
    random_start: bool,
    batch_size: int,
    classes: int,
    **attack: Any,
) -> Tensor:
    with attacking(model), tqdm(total=len(x) * runs, unit="img", desc="robust error", leave=False) as bar:
        broken = clean_errors(model, x, y, batch_size, classes)
        fast = folded(model, x[:2]) if len(x) else model
        for run in range(runs):
            (left,) = torch.where(~broken)
            bar.update(len(x) - len(left))
            if len(left) == 0:
                break
            images, goals = x[left], (y[left], *targets(run, left))
            start = random_images(images, eps) if random_start else images
            more = {"eps": eps, "batch_size": batch_size, "bar": bar, **attack}
            when, _ = first_breaks(model, fast, images, start, loss, goals, **more)
            broken[left] = when >= 0
    return broken


@torch.no_grad()
def clean_errors(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, batch_size: int = 250, classes: int = 2
) -> Tensor:
    """Which images the network gets wrong, in its current mode. Shapes as `robust_errors`.

    Raises `ValueError` unless it answers with logits, `classes` of them or more.
    """
    wrong = torch.zeros_like(y, dtype=torch.bool)
    for i in range(0, len(x), batch_size):
        part = slice(i, i + batch_size)
        wrong[part] = is_wrong(check_logits(model(x[part].clone()), len(x[part]), classes), y[part])
    return wrong


@torch.inference_mode(False)
def first_breaks(
    model: Callable[[Tensor], Tensor],
    fast: Callable[[Tensor], Tensor],
    x: Tensor,
    start: Tensor,
    loss: Loss,
    goals: tuple[Tensor, ...],
    *,
    eps: float,
    step_size: float,
    steps: int,
    batch_size: int = 250,
    bar: "tqdm[None] | None" = None,
) -> tuple[Tensor, Tensor]:
    """One PGD run from `start` in which each image has its own step count: when each broke, and the images.

    The steps maximize `loss(logits, *goals)` of `fast`, per image. Where `fast` errs, and after the last
    step, `model` decides whether an image is broken. `goals`: the labels y (N,), and for a targeted loss the
    targets (N,). Call it inside `attacking`, for both networks.

    Shapes: x, start (N, C, H, W). Results: (N,), the steps before the network erred, -1 if it never did; and
    (N, C, H, W), the image at which it erred, or the last one.
    """
    check_numbers(eps=eps, step_size=step_size, steps=steps, batch_size=batch_size)
    y, (low, high) = goals[0], within(x.detach(), eps)
    x_adv, broken, taken = start.detach().clone(), torch.full_like(y, -1), torch.zeros_like(y)
    waiting = torch.arange(len(x), device=x.device)
    batch = waiting[:0]
    while len(batch) or len(waiting):
        free = batch_size - len(batch)
        batch, waiting = torch.cat([batch, waiting[:free]]), waiting[free:]
        images = x_adv[batch].requires_grad_()
        with torch.enable_grad():
            logits = check_logits(fast(images.clone()), len(images))  # it may work in place
            way = direction(loss(logits, *(g[batch] for g in goals)).sum(), images)
        candidate = is_wrong(logits, y[batch])
        errs = candidate.clone()
        errs[candidate] = clean_errors(model, images.detach()[candidate], y[batch[candidate]], batch_size)
        broken[batch[errs]] = taken[batch[errs]]
        moved = images.detach().add(way, alpha=step_size).clamp_(low[batch], high[batch])
        x_adv[batch[~errs]] = moved[~errs]
        taken[batch] += 1
        stays = ~errs & (taken[batch] < steps)
        if bar is not None:
            bar.update(len(batch) - int(stays.sum()))
        batch = batch[stays]
    (left,) = torch.where(broken < 0)
    last = clean_errors(model, x_adv[left], y[left], batch_size)
    broken[left[last]] = steps
    return broken, x_adv
