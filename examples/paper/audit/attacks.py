"""The attacks of an audit: their names, their order, and how each is run. Results go into the store."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks import losses
from examples.paper.attacks.autoattack import autoattack
from examples.paper.attacks.pgd import attacking
from examples.paper.attacks.robust_error import Loss, clean_errors, likeliest_wrong
from examples.paper.audit import adaptive, diagnostics, sigmoids
from examples.paper.audit.budget import Budget
from examples.paper.audit.derivatives import NO_FLOAT64, not_possible
from examples.paper.audit.noise import noise
from examples.paper.audit.store import Store
from examples.paper.audit.victim import BATCH, Victim
from examples.paper.common.gates import gates

CLEAN, FGSM, PLAIN, LONG, RESTARTS = "clean", "FGSM", "PGD", "PGD, twice the steps", "PGD, restarts"
NOISE, AUTOATTACK, SQUARE = "random noise", "AutoAttack without Square", "Square"
FLOAT64, NOISY = "PGD, float64", "PGD, mean of noisy copies"
TRANSFER, THROUGH = "transfer from ", "PGD through "  # the name of a surrogate follows
STEP_SIZES = {  # as shares of eps
    "PGD, steps of eps/16": 1 / 16,
    "PGD, steps of eps/8": 1 / 8,
    "PGD, steps of eps/2": 1 / 2,
    "PGD, steps of eps": 1.0,
}
SMALLER_EPS = {"PGD at eps/4": 1 / 4, "PGD at eps/2": 1 / 2}
LARGER_EPS = {"PGD at 2 eps": 2.0, "PGD at 4 eps": 4.0}
AT_LARGEST = "PGD at 128/255"
LARGEST = 128 / 255  # gray lies within it of every image
LOSSES: dict[str, Loss] = {"PGD, CW": losses.cw, "PGD, DLR": losses.dlr}
TARGETED: dict[str, Loss] = {
    "PGD, targeted cross-entropy": losses.cross_entropy_to,
    "PGD, targeted CW": losses.cw_to,
    "PGD, targeted DLR": losses.dlr_to,
}
TARGETS = 3  # the likeliest wrong classes
ADAPTIVE = {f"PGD, {name}": substitute for name, substitute in adaptive.SUBSTITUTES.items()}
AROUND = {f"PGD, {name}": substitute for name, substitute in sigmoids.SUBSTITUTES.items()}
WHITE_BOX = [CLEAN, FGSM, PLAIN, LONG, RESTARTS, FLOAT64, NOISY, AUTOATTACK]
WHITE_BOX += [*STEP_SIZES, *SMALLER_EPS, *LOSSES, *TARGETED, *ADAPTIVE, *AROUND]

Attack = Callable[[Victim, Store, Budget, str], None]  # the last is its name


def attack_all(victim: Victim, store: Store, budget: Budget, surrogates: Mapping[str, nn.Module]) -> None:
    """Run every attack that is not in the store yet. Changes the store."""
    with tqdm(_plan(victim, surrogates).items(), unit="attack") as bar:
        for name, attack in bar:
            bar.set_description(name)
            if name not in store:
                began = time.perf_counter()
                attack(victim, store, budget, name)
                store.add_seconds(name, time.perf_counter() - began)


def white_box(store: Store) -> Tensor:
    """Images that are wrong when clean, or that a white-box attack within eps broke, (N,) of bool."""
    return torch.stack([w for n, w in store.wrong.items() if n in WHITE_BOX or n.startswith(THROUGH)]).any(0)


def _plan(victim: Victim, surrogates: Mapping[str, nn.Module]) -> dict[str, Attack]:
    """Attacks by name, in order: the cheap ones first, those that need the white-box results last."""
    eps = victim.eps
    plan: dict[str, Attack] = {CLEAN: _clean}
    plan |= {FGSM: partial(_pgd, steps=1, step_size=eps, start=None), PLAIN: _plain}
    plan |= diagnostics.DIAGNOSTICS
    plan |= {RESTARTS: _restarts}
    plan |= {name: partial(_pgd, step_size=share * eps) for name, share in STEP_SIZES.items()}
    plan |= {name: partial(_pgd, loss=loss) for name, loss in LOSSES.items()}
    plan |= {name: partial(_targeted, loss) for name, loss in TARGETED.items()}
    sweep = {name: share * eps for name, share in (SMALLER_EPS | LARGER_EPS).items() if share * eps < LARGEST}
    plan |= {name: partial(_pgd, eps=bound) for name, bound in (sweep | {AT_LARGEST: LARGEST}).items()}
    if gates(victim.model):
        plan |= {name: partial(_adaptive, substitute) for name, substitute in ADAPTIVE.items()}
        surrogates = {**adaptive.surrogates(victim.model, victim.x), **surrogates}
    if sigmoids.saturation(victim.model, victim.x[:2]):
        plan |= {name: partial(_around, substitute) for name, substitute in AROUND.items()}
    plan |= {FLOAT64: _float64, NOISY: _noisy}
    for name, surrogate in surrogates.items():
        plan |= {TRANSFER + name: partial(_transfer, surrogate)}
        plan |= {THROUGH + name: partial(_through, surrogate, losses.cross_entropy)}
        plan |= {f"{THROUGH}{name}, CW": partial(_through, surrogate, losses.cw)}
    return plan | {NOISE: _noise, AUTOATTACK: _autoattack, SQUARE: _square}


def _clean(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    store.add_attack(name, victim.clean, victim.x)


def _pgd(victim: Victim, store: Store, budget: Budget, name: str, **arguments: Any) -> None:
    at, images = victim.pgd(**{"steps": budget.steps} | arguments)
    within = arguments.get("eps", 0) <= victim.eps
    store.add_attack(name, at >= 0, images if within else None)


def _plain(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """One run of twice the steps, whose first half is the plain attack."""
    at, images = victim.pgd(steps=2 * budget.steps)
    store.numbers["broken at step"] = at.tolist()
    store.add_attack(LONG, at >= 0, images)
    store.images = torch.where(store.broken()[:, None, None, None], store.images, images.cpu())
    store.add_attack(name, (at >= 0) & (at <= budget.steps), images)


def _restarts(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """The plain attack from more random starts, on the images that survive it."""
    broken, images = store.wrong[PLAIN].to(victim.x.device), store.images.to(victim.x.device)
    runs = [{"start": f"restart {k}"} for k in range(1, budget.restarts)]
    _in_turn(victim, store, name, broken, images, runs, steps=budget.steps)


def _targeted(loss: Loss, victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """Towards each of the likeliest wrong classes."""
    with attacking(victim.model):
        targets = likeliest_wrong(victim.model, victim.x, victim.y, TARGETS, BATCH)
    runs = [{"target": target} for target in targets.unbind(1)]
    _in_turn(victim, store, name, victim.clean, victim.x.clone(), runs, loss=loss, steps=budget.steps)


def _in_turn(
    victim: Victim,
    store: Store,
    name: str,
    broken: Tensor,
    images: Tensor,
    runs: Iterable[Mapping[str, Any]],
    **arguments: Any,
) -> None:
    """Runs of PGD, each on the images that survive `broken` and the runs before."""
    for run in tqdm(runs, desc=name, unit="run", leave=False):
        at, found = victim.pgd(**arguments, **run, skipped=broken)
        new = (at >= 0) & ~broken
        broken, images = broken | new, torch.where(new[:, None, None, None], found, images)
    store.add_attack(name, broken, images)


def _adaptive(
    substitute: adaptive.Substitute, victim: Victim, store: Store, budget: Budget, name: str
) -> None:
    _pgd(victim, store, budget, name, fast=adaptive.bpda(victim.model, substitute))


def _around(
    substitute: Callable[..., Tensor], victim: Victim, store: Store, budget: Budget, name: str
) -> None:
    _pgd(victim, store, budget, name, fast=sigmoids.Around(victim.model, substitute))


def _noisy(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    _pgd(victim, store, budget, name, fast=adaptive.NoisyCopies(victim.fast, victim.eps / 2))


def _through(
    surrogate: nn.Module, loss: Loss, victim: Victim, store: Store, budget: Budget, name: str
) -> None:
    """The surrogate shows the way, and the network itself is judged at every step."""
    _pgd(victim, store, budget, name, fast=surrogate, loss=loss)


def _float64(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """The steps in float64, where a gradient may be 1e-300; the network judges the images in float32."""
    try:
        fast = copy.deepcopy(victim.model).double()
        at, images = victim.pgd(steps=budget.steps, fast=fast, dtype=torch.float64)
    except NO_FLOAT64 as error:
        store.add_numbers(name, not_possible(error))
    else:
        store.add_attack(name, at >= 0, images)


def _transfer(surrogate: nn.Module, victim: Victim, store: Store, budget: Budget, name: str) -> None:
    images = victim.attacked(surrogate, budget.steps)
    with attacking(victim.model):
        wrong = clean_errors(victim.model, images, victim.y, BATCH)
    store.add_attack(name, wrong | victim.clean, images)


def _noise(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    victim.seed_for(name)
    found = noise(victim.model, victim.x, victim.y, eps=victim.eps, draws=budget.draws)
    store.add_attack(name, *found)


def _autoattack(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    parts = ["apgd-ce", "apgd-t", "fab-t"]
    attack = {"eps": victim.eps, "seed": victim.seed, "parts": parts, "steps": budget.autoattack}
    found = autoattack(victim.model, victim.x, victim.y, **attack, batch_size=BATCH, title=name)
    store.numbers["AutoAttack"] = {"warnings": found.warnings, "survivors of each part": found.standing}
    store.add_attack(name, found.wrong, found.images)


def _square(victim: Victim, store: Store, budget: Budget, name: str) -> None:
    """Square on all images that survive the white-box attacks, and on a few that they broke."""
    known, broken, images = white_box(store), torch.zeros_like(victim.clean).cpu(), victim.x.cpu().clone()
    (survivors,), (control,) = torch.where(~known), torch.where(known & ~store.wrong[CLEAN])
    control = control[: budget.control]
    if len(chosen := torch.cat([survivors, control])):
        x, y = (t[chosen.to(t.device)] for t in (victim.x, victim.y))
        attack = {"eps": victim.eps, "queries": budget.queries, "seed": victim.seed, "parts": ["square"]}
        found = autoattack(victim.model, x, y, **attack, batch_size=BATCH, title=name)
        broken[chosen], images[chosen] = found.wrong, found.images
    store.numbers[name] = {
        "survivors": len(survivors),
        "broken": int(broken[survivors].sum()),
        "control": len(control),
        "control broken": int(broken[control].sum()),
    }
    store.add_attack(name, broken, images)
