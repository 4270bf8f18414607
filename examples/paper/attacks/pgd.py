"""L-infinity PGD (Madry et al. 2018, arXiv:1706.06083), targeted and untargeted."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from examples.paper.attacks.folding import folded
from examples.pgd import check_images, check_logits, check_network, check_numbers, direction


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    targeted: bool = False,
    random_start: bool = True,
) -> Tensor:
    """Adversarial images within eps of x, after the last step.

    `eps` and `step_size` are in units of the pixel range [0, 1], e.g. 8/255. `targeted=True` draws targets,
    uniform over the other classes, and minimizes their loss; else the loss of `y` is maximized. The network
    is attacked in evaluation mode and restored, without any `.grad`. The steps run on a copy with batch norms
    folded.

    Shapes: x (N, C, H, W) in [0, 1], y (N,), result as x.
    Raises `ValueError` for images, labels, numbers or logits that no attack can work with: `examples.pgd`.
    """
    attack = {"eps": eps, "step_size": step_size, "targeted": targeted, "random_start": random_start}
    return pgd_at(model, x, y, steps=[steps], **attack)[steps]


@torch.inference_mode(False)
def pgd_at(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: Collection[int],
    targeted: bool = False,
    random_start: bool = True,
) -> dict[int, Tensor]:
    """Images of one run after each of these numbers of steps: the first ten steps of PGD-50 are PGD-10.

    Arguments, shapes and errors as `pgd`.
    """
    for count in steps or [0]:
        check_numbers(eps=eps, step_size=step_size, steps=count)
    classes = check_images(x, y)
    x, y = x.detach().clone(), y.clone()
    if len(x) == 0:
        return dict.fromkeys(steps, x)
    with attacking(model):
        goal = random_targets(y, classes_of(model, x, classes)) if targeted else y
        attack = {"eps": eps, "step_size": step_size, "steps": max(steps), "targeted": targeted}
        attack["classes"] = classes
        run = pgd_steps(folded(model, x[:2]), x, goal, random_start=random_start, **attack)
        return {k: x_adv for k, (x_adv, _) in enumerate(run, 1) if k in steps}


@torch.inference_mode(False)
def pgd_steps(
    model: nn.Module,
    x: Tensor,
    goal: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    targeted: bool = False,
    random_start: bool = True,
    start: Tensor | None = None,
    classes: int = 2,
    amp: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps of one PGD run: yields the images after each step and the loss of `goal` before it.

    `start`: first images, within eps of x, instead of those that `random_start` draws. `classes`: the least
    number of logits, as `check_images` finds it for images and labels, which are not checked here.
    `amp=True` runs the network forward and backward in bfloat16; images and steps keep their precision.
    Shapes: x, start (N, C, H, W), goal (N,) targets or true labels; yields (N, C, H, W) and (N,).
    Call it inside `attacking(model)`. It never synchronizes with the device. Raises `ValueError` for numbers
    and logits that no attack can work with.
    """
    check_numbers(eps=eps, step_size=step_size)
    x, goal = x.detach().clone(), goal.clone()
    sign = -1 if targeted else 1
    ball = within(x, eps)
    x_adv = start.clone() if start is not None else random_images(x, eps) if random_start else x
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            with autocast(x.device, amp):
                logits = check_logits(model(x_adv.clone()), len(x), classes)  # it may work in place
            loss = F.cross_entropy(logits, goal, reduction="none")
            way = direction(loss.sum(), x_adv)
        x_adv = x_adv.detach().add(way, alpha=sign * step_size).clamp_(*ball)
        yield x_adv, loss.detach()


def autocast(device: torch.device | str, amp: bool) -> AbstractContextManager[Any]:
    """Inside, with `amp`, convolutions and products are in bfloat16."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if amp else nullcontext()


def random_images(x: Tensor, eps: float) -> Tensor:
    """Images uniform within eps of x, clipped to [0, 1]. Shapes: (N, C, H, W), result as x."""
    return (x + torch.empty_like(x).uniform_(-eps, eps)).clamp_(*within(x, eps))


def within(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest image within eps of x and within [0, 1]. Shapes: (N, C, H, W), both as x."""
    return (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)


def random_targets(y: Tensor, num_classes: int) -> Tensor:
    """Targets uniform over the OTHER classes, for labels that are checked already. Shapes: (N,) -> (N,).

    Raises `ValueError` for fewer than two classes. It never synchronizes with the device.
    """
    if num_classes < 2:
        raise ValueError(f"targets need at least two classes, not {num_classes}")
    return (y + torch.randint_like(y, 1, num_classes)) % num_classes


@torch.no_grad()
def classes_of(model: nn.Module, x: Tensor, classes: int = 2) -> int:
    """Number of classes, from the logits of one image. Raises `ValueError` for fewer than `classes`."""
    return check_logits(model(x[:1].clone()), len(x[:1]), classes).shape[1]


@contextmanager
def attacking(model: nn.Module, *, batch_statistics: bool = False) -> Iterator[None]:
    """Put the network in evaluation mode, its parameters without gradient; restore it afterwards.

    With `batch_statistics`, batch norms that were in training mode use the statistics of the attacked images
    and leave their running statistics unchanged.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"a network is an nn.Module whose forward returns logits, not a {type(model).__name__}"
        )
    check_network(model)
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    norms = [m for m, mode in modes if batch_statistics and mode and isinstance(m, _BatchNorm)]
    counters = [(m, m.momentum, m.num_batches_tracked) for m in norms]  # None without running statistics
    counters = [(m, momentum, None if n is None else n.clone()) for m, momentum, n in counters]
    try:
        model.eval()
        for p, _ in flags:
            p.requires_grad = False
        for m in norms:
            m.training, m.momentum = True, 0.0
        yield
    finally:
        _restore_modes(modes)
        for m, momentum, tracked in counters:
            m.momentum = momentum
            if tracked is not None:
                m.num_batches_tracked.copy_(tracked)
        for p, flag in flags:
            p.requires_grad = flag


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for m, mode in modes:  # parents first
        if m.training != mode:
            m.train(mode)  # a network may undo there what its eval() did
    for m, mode in modes:
        m.training = mode
