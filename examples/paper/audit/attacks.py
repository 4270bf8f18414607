"""All attacks of an audit, one after the other, into a store: what is there already is not done again."""

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks import losses
from examples.paper.attacks.autoattack import autoattack
from examples.paper.attacks.pgd import attacking, pgd_steps, random_images
from examples.paper.attacks.robust_error import Loss, clean_errors
from examples.paper.audit import adaptive
from examples.paper.audit.gradient_free import hard_label, noise, other_classes, square
from examples.paper.audit.store import Store
from examples.paper.audit.victim import BATCH, Victim

CLEAN, FGSM, PLAIN, LONG, RESTARTS = "clean", "FGSM", "PGD", "PGD, twice the steps", "PGD, restarts"
NOISE, AUTOATTACK, SQUARE, HARD_LABEL = "random noise", "AutoAttack without Square", "Square", "HopSkipJump"
TRANSFER = "transfer from "
LARGEST = 128 / 255  # grey lies within it of every image

STEP_SIZES = {
    f"PGD, steps of eps{told}": share
    for told, share in (("/16", 1 / 16), ("/8", 1 / 8), ("/2", 1 / 2), ("", 1.0))
}
SWEEP = {"PGD at eps/4": 1 / 4, "PGD at eps/2": 1 / 2, "PGD at 2 eps": 2.0, "PGD at 4 eps": 4.0}
AT_LARGEST = "PGD at 128/255"
LOSSES: dict[str, Loss] = {"PGD, CW": losses.cw, "PGD, DLR": losses.dlr}
TARGETED: dict[str, Loss] = {
    "PGD, targeted cross-entropy": losses.cross_entropy_to,
    "PGD, targeted CW": losses.cw_to,
    "PGD, targeted DLR": losses.dlr_to,
}
ADAPTIVE = {f"PGD, {name}": substitute for name, substitute in adaptive.SUBSTITUTES.items()}
FLOAT64 = "PGD, float64"
TARGETS = 3  # of a targeted attack: the likeliest wrong classes


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much an audit attacks; with less than the default it may miss what it is for."""

    steps: int = 50  # of PGD; of size eps/4
    restarts: int = 10
    draws: int = 200  # of random noise
    queries: int = 5000  # of Square and of HopSkipJump, for an image
    hard_label: int = 20  # images that stand and are given to HopSkipJump
    control: int = 10  # broken images that Square and HopSkipJump get as well: can they break any?
    autoattack: int = 100  # steps of each of its white-box parts
    curve: int = 100  # images whose loss is drawn


def attack_all(victim: Victim, store: Store, budget: Budget, surrogates: Mapping[str, nn.Module]) -> None:
    """Carry out every attack that the store lacks. Changes the store; raises what the libraries raise."""
    plan = _plan(victim, store, budget, surrogates)
    with tqdm(plan.items(), unit="attack") as bar:
        for name, attack in bar:
            bar.set_description(name)
            if name not in store:
                began = time.perf_counter()
                attack(name)
                store.spent(name, time.perf_counter() - began)


def white_box(store: Store) -> Tensor:
    """Images that an attack with the network's own gradients broke within eps, or that were wrong before."""
    names = [CLEAN, FGSM, PLAIN, LONG, RESTARTS, AUTOATTACK, FLOAT64, "PGD at eps/4", "PGD at eps/2"]
    names += [*STEP_SIZES, *LOSSES, *TARGETED, *ADAPTIVE]
    return torch.stack([store.wrong[n] for n in names if n in store.wrong]).any(0)


def _plan(
    victim: Victim, store: Store, budget: Budget, surrogates: Mapping[str, nn.Module]
) -> dict[str, Callable[[str], None]]:
    """What to do by name, in order: what is cheap first, what needs the white-box attacks' result last."""
    plan: dict[str, Callable[[str], None]] = {}

    def add(name: str, attack: Callable[..., Any], *arguments: Any, **more: Any) -> None:
        plan[name] = partial(attack, *arguments, **more)

    def pgd(name: str, **arguments: Any) -> None:
        add(
            name,
            _pgd,
            victim,
            store,
            counts=arguments.get("eps", 0) <= victim.eps,
            **{"steps": budget.steps} | arguments,
        )

    add(CLEAN, lambda name: store.note(name, victim.clean, victim.x))
    pgd(FGSM, steps=1, step_size=victim.eps, start=None)
    add(PLAIN, _plain, victim, store, budget.steps)
    add("loss curve", _curve, victim, store, budget)
    add("zero gradients", _zero_gradients, victim, store)
    add("derivative", _derivative, victim, store)
    add("gate", _gate, victim, store)
    add("gate, attacked", _gate_attacked, victim, store)
    add(RESTARTS, _restarts, victim, store, budget)
    for name, share in STEP_SIZES.items():
        pgd(name, step_size=share * victim.eps)
    for name, loss in LOSSES.items():
        pgd(name, loss=loss)
    for name, loss in TARGETED.items():
        add(name, _targeted, victim, store, loss, budget.steps)
    for name, factor in SWEEP.items():
        if factor * victim.eps < LARGEST:
            pgd(name, eps=factor * victim.eps)
    pgd(AT_LARGEST, eps=LARGEST)
    if adaptive.gates(victim.model):
        for name, substitute in ADAPTIVE.items():
            add(name, _around, victim, store, substitute, budget.steps)
    add(FLOAT64, _float64, victim, store, budget.steps)
    for name, surrogate in surrogates.items():
        add(TRANSFER + name, _transfer, victim, store, surrogate, budget.steps)
    add(NOISE, _noise, victim, store, budget)
    add(AUTOATTACK, _autoattack, victim, store, budget)
    add(SQUARE, _square, victim, store, budget)
    add(HARD_LABEL, _hard_label, victim, store, budget)
    return plan


def _pgd(victim: Victim, store: Store, name: str, *, counts: bool = True, **arguments: Any) -> None:
    at, images = victim.pgd(**arguments)
    store.note(name, at >= 0, images if counts else None)


def _plain(victim: Victim, store: Store, steps: int, name: str) -> None:
    """One run of twice the steps, of which the first half is the plain attack."""
    at, images = victim.pgd(steps=2 * steps)
    store.numbers["broken at step"] = at.tolist()
    store.note(LONG, at >= 0, images)
    store.images = torch.where(store.broken()[:, None, None, None], store.images, images.cpu())
    store.note(name, (at >= 0) & (at <= steps), images)


def _curve(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """Loss of a few images at each of twice the steps, from the start of the plain attack."""
    few = slice(0, budget.curve)
    victim.random("start")
    start = random_images(victim.x, victim.eps)[few]
    attack = {"eps": victim.eps, "step_size": victim.eps / 4, "steps": 2 * budget.steps, "start": start}
    with attacking(victim.model):
        run = pgd_steps(victim.fast, victim.x[few], victim.y[few], **attack)
        curve = torch.stack([loss.cpu() for _, loss in run])
    rise, late = curve[budget.steps] - curve[0], curve[-1] - curve[budget.steps]
    store.tell(name, {"mean": curve.mean(1).tolist(), "rise": rise.tolist(), "late": late.tolist()})


def _zero_gradients(victim: Victim, store: Store, name: str) -> None:
    """How many images have no finite gradient of the cross-entropy at all, of those that are right."""
    none = total = 0
    with attacking(victim.model):
        for images, labels in zip(
            victim.x[~victim.clean].split(BATCH), victim.y[~victim.clean].split(BATCH), strict=True
        ):
            with torch.enable_grad():
                x = images.clone().requires_grad_()
                loss = losses.cross_entropy(victim.model(x), labels).sum()
                grad = torch.autograd.grad(loss, x)[0] if loss.requires_grad else torch.zeros_like(x)
                useful = grad.isfinite() & (grad != 0)  # PGD does not move by a NaN
            none, total = none + int((~useful).flatten(1).all(1).sum()), total + len(x)
    store.tell(name, {"images": total, "without": none})


def _gate(victim: Victim, store: Store, name: str) -> None:
    _tell_gates(victim, store, name, victim.x)


def _gate_attacked(victim: Victim, store: Store, name: str) -> None:
    """The gate where an attack has brought the images after ten steps, whether they fell or not."""
    _tell_gates(victim, store, name, victim.moved(victim.model, 10))


def _tell_gates(victim: Victim, store: Store, name: str, images: Tensor) -> None:
    found = adaptive.statistics(victim.model, images, victim.y)
    store.tell(name, {site: {k: v.tolist() for k, v in g._asdict().items()} for site, g in found.items()})


def _restarts(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """The plain attack from more random starts, on what it left standing."""
    broken, images = store.wrong[PLAIN].to(victim.x.device), store.images.to(victim.x.device)
    runs = [{"start": f"restart {k}"} for k in range(1, budget.restarts)]
    _one_by_one(victim, store, name, broken, images, runs, steps=budget.steps)


def _targeted(victim: Victim, store: Store, loss: Loss, steps: int, name: str) -> None:
    """Towards each of the likeliest wrong classes."""
    with attacking(victim.model), torch.no_grad():
        logits = torch.cat([victim.model(part) for part in victim.x.split(BATCH)])
    nearest = logits.scatter(1, victim.y[:, None], -torch.inf).topk(TARGETS, 1).indices
    runs = [{"target": target} for target in nearest.unbind(1)]
    _one_by_one(victim, store, name, victim.clean, victim.x.clone(), runs, loss=loss, steps=steps)


def _one_by_one(
    victim: Victim,
    store: Store,
    name: str,
    broken: Tensor,
    images: Tensor,
    runs: Sequence[Mapping[str, Any]],
    **arguments: Any,
) -> None:
    """Runs of PGD, each on what `broken` and the runs before it leave standing."""
    for run in tqdm(runs, desc=name, unit="run", leave=False):
        at, found = victim.pgd(**arguments, **run, spared=broken)
        new = (at >= 0) & ~broken
        broken, images = broken | new, torch.where(new[:, None, None, None], found, images)
    store.note(name, broken, images)


def _around(victim: Victim, store: Store, substitute: adaptive.Substitute, steps: int, name: str) -> None:
    at, images = victim.pgd(steps=steps, fast=adaptive.around(victim.model, substitute))
    store.note(name, at >= 0, images)


def _float64(victim: Victim, store: Store, steps: int, name: str) -> None:
    """In float64 throughout, where a gradient may be 1e-300; what is broken is asked in float32."""
    try:
        at, images = victim.pgd(steps=steps, fast=copy.deepcopy(victim.model).double(), dtype=torch.float64)
    except (RuntimeError, TypeError, AttributeError) as error:
        store.tell(name, f"not possible: {str(error).splitlines()[0]}")
    else:
        store.note(name, at >= 0, images)


def _derivative(victim: Victim, store: Store, name: str) -> None:
    """Whether the gradient is the derivative: along random corners, of random sums of the logits, in float64.

    Of each image, at a random place of the ball: |<gradient, v> - (f(x + h v) - f(x - h v)) / 2h| relative to
    the largest of the two and the gradient's norm, which is what <gradient, v> is on average.
    """
    victim.random(name)
    h, errors = 1e-7, list[float]()
    try:
        model = copy.deepcopy(victim.model).double()
        for images in random_images(victim.x, victim.eps).double().split(BATCH):
            v = torch.randn_like(images).sign()
            with attacking(model):
                x = images.clone().requires_grad_()
                with torch.enable_grad():
                    logits = model(x)
                    weights = torch.randn_like(logits)
                    (grad,) = torch.autograd.grad((logits * weights).sum(), x)
                with torch.no_grad():
                    rise = ((model(images + h * v) - model(images - h * v)) * weights).sum(1) / (2 * h)
            slope = (grad * v).flatten(1).sum(1)
            scale = torch.stack([slope.abs(), rise.abs(), grad.flatten(1).norm(dim=1)]).amax(0)
            errors += ((slope - rise).abs() / scale.clamp(min=1e-12)).tolist()
    except (RuntimeError, TypeError, AttributeError) as error:
        store.tell(name, f"not possible: {str(error).splitlines()[0]}")
    else:
        store.tell(name, errors)


def _transfer(victim: Victim, store: Store, surrogate: nn.Module, steps: int, name: str) -> None:
    images = victim.moved(surrogate, steps)
    with attacking(victim.model):
        wrong = clean_errors(victim.model, images, victim.y, BATCH)
    store.note(name, wrong | victim.clean, images)


def _noise(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    victim.random(name)
    store.note(name, *noise(victim.model, victim.x, victim.y, eps=victim.eps, draws=budget.draws))


def _autoattack(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    parts = ["apgd-ce", "apgd-t", "fab-t"]
    attack = {"eps": victim.eps, "seed": victim.seed, "parts": parts, "steps": budget.autoattack}
    found = autoattack(victim.model, victim.x, victim.y, **attack, batch_size=BATCH, title=name)
    store.numbers["AutoAttack"] = {"warnings": found.warnings, "standing": found.standing}
    store.note(name, found.wrong, found.images)


def _some(victim: Victim, store: Store, standing: int | None, control: int) -> tuple[Tensor, Tensor]:
    """Images that stand against white-box attacks, and a few that were right and fell, by their numbers."""
    broken, clean = white_box(store), store.wrong[CLEAN]
    return torch.where(~broken)[0][:standing], torch.where(broken & ~clean)[0][:control]


def _square(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    standing, control = _some(victim, store, None, budget.control)
    chosen = torch.cat([standing, control])
    broken, images = torch.zeros(len(victim.x), dtype=torch.bool), victim.x.cpu().clone()
    if len(chosen):
        few = chosen.to(victim.x.device)
        attack = {"eps": victim.eps, "queries": budget.queries, "seed": victim.seed}
        broken[chosen], images[chosen] = square(victim.model, victim.x[few], victim.y[few], **attack)
    _note_chosen(store, name, broken, images, standing, control, budget.queries)


def _hard_label(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    standing, control = _some(victim, store, budget.hard_label, budget.control)
    chosen = torch.cat([standing, control])
    broken, images = torch.zeros(len(victim.x), dtype=torch.bool), victim.x.cpu().clone()
    few = chosen.to(victim.x.device)
    x, y = victim.x[few], victim.y[few]
    starts, known = other_classes(victim.model, x, y, victim.x)
    victim.random(name)
    found, moved, asked = hard_label(
        victim.model, x[known], y[known], starts[known], eps=victim.eps, queries=budget.queries
    )
    attacked = chosen[known.cpu()]
    broken[attacked], images[attacked] = found.cpu(), moved.cpu()
    asked = asked[~found]  # of those that it did not break
    _note_chosen(store, name, broken, images, standing, control, int(asked.min()) if len(asked) else 0)


def _note_chosen(
    store: Store,
    name: str,
    broken: Tensor,
    images: Tensor,
    standing: Tensor,
    control: Tensor,
    queries: int,
) -> None:
    store.numbers[name] = {
        "standing": len(standing),
        "broken": int(broken[standing].sum()),
        "control": len(control),
        "control broken": int(broken[control].sum()),
        "queries": queries,
    }
    store.note(name, broken, images)
