"""Measurements that are no attacks: the loss along PGD, the gradient, and gates."""

import torch
from torch import Tensor

from examples.paper.attacks import losses
from examples.paper.attacks.pgd import attacking, pgd_steps, random_images
from examples.paper.audit import gate_statistics
from examples.paper.audit.budget import Budget
from examples.paper.audit.derivatives import along_random_ways, along_the_attack, derivative
from examples.paper.audit.sigmoids import saturation
from examples.paper.audit.store import Store
from examples.paper.audit.victim import BATCH, Victim


def loss_curve(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """Loss of a few images at each of twice the steps, from the start of the plain attack."""
    few = slice(0, budget.curve)
    victim.seed_for("start")
    start = random_images(victim.x, victim.eps)[few]
    attack = {"eps": victim.eps, "step_size": victim.eps / 4, "steps": 2 * budget.steps, "start": start}
    with attacking(victim.model):
        run = pgd_steps(victim.fast, victim.x[few], victim.y[few], **attack)
        curve = torch.stack([loss.cpu() for _, loss in run])
    rise, late = curve[budget.steps] - curve[0], curve[-1] - curve[budget.steps]
    store.add_numbers(name, {"mean": curve.mean(1).tolist(), "rise": rise.tolist(), "late": late.tolist()})


def zero_gradients(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """For how many of the correctly classified images the cross-entropy has no finite gradient but zero."""
    x, y, without = victim.x[~victim.clean], victim.y[~victim.clean], 0
    with attacking(victim.model), torch.enable_grad():
        for part, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
            images = part.clone().requires_grad_()
            loss = losses.cross_entropy(victim.model(images), labels).sum()
            grad = torch.autograd.grad(loss, images)[0] if loss.requires_grad else torch.zeros_like(images)
            useful = grad.isfinite() & (grad != 0)  # PGD does not move along a NaN
            without += int((~useful).flatten(1).all(1).sum())
    store.add_numbers(name, {"images": len(x), "without": without})


def gate(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """Statistics of each gate on the clean images."""
    _add_gates(victim, store, name, victim.x)


def gate_attacked(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """The same after ten steps of PGD, whether the images are broken or not."""
    _add_gates(victim, store, name, victim.attacked(victim.model, 10))


def sigmoids(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """Saturation of each other sigmoid-like call on the clean images."""
    store.add_numbers(name, saturation(victim.model, victim.x))


def _add_gates(victim: Victim, store: Store, name: str, images: Tensor) -> None:
    found = gate_statistics.statistics(victim.model, images, victim.y)
    store.add_numbers(
        name, {site: {k: v.tolist() for k, v in g._asdict().items()} for site, g in found.items()}
    )


DIAGNOSTICS = {
    "loss curve": loss_curve,
    "zero gradients": zero_gradients,
    "derivative": derivative,
    "along random ways": along_random_ways,
    "along the attack": along_the_attack,
    "sigmoids": sigmoids,
    "gate": gate,
    "gate, attacked": gate_attacked,
}
