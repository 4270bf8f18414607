"""All attacks of an audit, one after the other, into a ledger: what is there already is not done again."""

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import gate
import losses
from attacks import attacking, pgd_steps, random_images
from gradient_free import hard_label, noise, other_classes, square
from ledger import Ledger
from robust_error import Loss, clean_errors
from strong import autoattack
from suspect import BATCH, Suspect

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
ADAPTIVE = {f"PGD, {name}": substitute for name, substitute in gate.SUBSTITUTES.items()}
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


def attack_all(suspect: Suspect, ledger: Ledger, budget: Budget, surrogates: Mapping[str, nn.Module]) -> None:
    """Carry out every attack that the ledger lacks. Changes the ledger; raises what the libraries raise."""
    plan = _plan(suspect, ledger, budget, surrogates)
    with tqdm(plan.items(), unit="attack") as bar:
        for name, attack in bar:
            bar.set_description(name)
            if name not in ledger:
                began = time.perf_counter()
                attack(name)
                ledger.spent(name, time.perf_counter() - began)


def white_box(ledger: Ledger) -> Tensor:
    """Images that an attack with the network's own gradients broke within eps, or that were wrong before."""
    names = [CLEAN, FGSM, PLAIN, LONG, RESTARTS, AUTOATTACK, FLOAT64, "PGD at eps/4", "PGD at eps/2"]
    names += [*STEP_SIZES, *LOSSES, *TARGETED, *ADAPTIVE]
    return torch.stack([ledger.wrong[n] for n in names if n in ledger.wrong]).any(0)


def _plan(
    suspect: Suspect, ledger: Ledger, budget: Budget, surrogates: Mapping[str, nn.Module]
) -> dict[str, Callable[[str], None]]:
    """What to do by name, in order: what is cheap first, what needs the white-box attacks' result last."""
    plan: dict[str, Callable[[str], None]] = {}

    def add(name: str, attack: Callable[..., Any], *arguments: Any, **more: Any) -> None:
        plan[name] = partial(attack, *arguments, **more)

    def pgd(name: str, **arguments: Any) -> None:
        add(
            name,
            _pgd,
            suspect,
            ledger,
            counts=arguments.get("eps", 0) <= suspect.eps,
            **{"steps": budget.steps} | arguments,
        )

    add(CLEAN, lambda name: ledger.note(name, suspect.clean, suspect.x))
    pgd(FGSM, steps=1, step_size=suspect.eps, start=None)
    add(PLAIN, _plain, suspect, ledger, budget.steps)
    add("loss curve", _curve, suspect, ledger, budget)
    add("zero gradients", _zero_gradients, suspect, ledger)
    add("derivative", _derivative, suspect, ledger)
    add("gate", _gate, suspect, ledger)
    add("gate, attacked", _gate_attacked, suspect, ledger)
    add(RESTARTS, _restarts, suspect, ledger, budget)
    for name, share in STEP_SIZES.items():
        pgd(name, step_size=share * suspect.eps)
    for name, loss in LOSSES.items():
        pgd(name, loss=loss)
    for name, loss in TARGETED.items():
        add(name, _targeted, suspect, ledger, loss, budget.steps)
    for name, factor in SWEEP.items():
        if factor * suspect.eps < LARGEST:
            pgd(name, eps=factor * suspect.eps)
    pgd(AT_LARGEST, eps=LARGEST)
    if gate.gates(suspect.model):
        for name, substitute in ADAPTIVE.items():
            add(name, _around, suspect, ledger, substitute, budget.steps)
    add(FLOAT64, _float64, suspect, ledger, budget.steps)
    for name, surrogate in surrogates.items():
        add(TRANSFER + name, _transfer, suspect, ledger, surrogate, budget.steps)
    add(NOISE, _noise, suspect, ledger, budget)
    add(AUTOATTACK, _autoattack, suspect, ledger, budget)
    add(SQUARE, _square, suspect, ledger, budget)
    add(HARD_LABEL, _hard_label, suspect, ledger, budget)
    return plan


def _pgd(suspect: Suspect, ledger: Ledger, name: str, *, counts: bool = True, **arguments: Any) -> None:
    at, images = suspect.pgd(**arguments)
    ledger.note(name, at >= 0, images if counts else None)


def _plain(suspect: Suspect, ledger: Ledger, steps: int, name: str) -> None:
    """One run of twice the steps, of which the first half is the plain attack."""
    at, images = suspect.pgd(steps=2 * steps)
    ledger.numbers["broken at step"] = at.tolist()
    ledger.note(LONG, at >= 0, images)
    ledger.images = torch.where(ledger.broken()[:, None, None, None], ledger.images, images.cpu())
    ledger.note(name, (at >= 0) & (at <= steps), images)


def _curve(suspect: Suspect, ledger: Ledger, budget: Budget, name: str) -> None:
    """Loss of a few images at each of twice the steps, from the start of the plain attack."""
    few = slice(0, budget.curve)
    suspect.random("start")
    start = random_images(suspect.x, suspect.eps)[few]
    attack = {"eps": suspect.eps, "step_size": suspect.eps / 4, "steps": 2 * budget.steps, "start": start}
    with attacking(suspect.model):
        run = pgd_steps(suspect.fast, suspect.x[few], suspect.y[few], **attack)
        curve = torch.stack([loss.cpu() for _, loss in run])
    rise, late = curve[budget.steps] - curve[0], curve[-1] - curve[budget.steps]
    ledger.tell(name, {"mean": curve.mean(1).tolist(), "rise": rise.tolist(), "late": late.tolist()})


def _zero_gradients(suspect: Suspect, ledger: Ledger, name: str) -> None:
    """How many images have no finite gradient of the cross-entropy at all, of those that are right."""
    none = total = 0
    with attacking(suspect.model):
        for images, labels in zip(
            suspect.x[~suspect.clean].split(BATCH), suspect.y[~suspect.clean].split(BATCH), strict=True
        ):
            with torch.enable_grad():
                x = images.clone().requires_grad_()
                loss = losses.cross_entropy(suspect.model(x), labels).sum()
                grad = torch.autograd.grad(loss, x)[0] if loss.requires_grad else torch.zeros_like(x)
                useful = grad.isfinite() & (grad != 0)  # PGD does not move by a NaN
            none, total = none + int((~useful).flatten(1).all(1).sum()), total + len(x)
    ledger.tell(name, {"images": total, "without": none})


def _gate(suspect: Suspect, ledger: Ledger, name: str) -> None:
    _tell_gates(suspect, ledger, name, suspect.x)


def _gate_attacked(suspect: Suspect, ledger: Ledger, name: str) -> None:
    """The gate where an attack has brought the images after ten steps, whether they fell or not."""
    _tell_gates(suspect, ledger, name, suspect.moved(suspect.model, 10))


def _tell_gates(suspect: Suspect, ledger: Ledger, name: str, images: Tensor) -> None:
    found = gate.statistics(suspect.model, images, suspect.y)
    ledger.tell(name, {site: {k: v.tolist() for k, v in g._asdict().items()} for site, g in found.items()})


def _restarts(suspect: Suspect, ledger: Ledger, budget: Budget, name: str) -> None:
    """The plain attack from more random starts, on what it left standing."""
    broken, images = ledger.wrong[PLAIN].to(suspect.x.device), ledger.images.to(suspect.x.device)
    runs = [{"start": f"restart {k}"} for k in range(1, budget.restarts)]
    _one_by_one(suspect, ledger, name, broken, images, runs, steps=budget.steps)


def _targeted(suspect: Suspect, ledger: Ledger, loss: Loss, steps: int, name: str) -> None:
    """Towards each of the likeliest wrong classes."""
    with attacking(suspect.model), torch.no_grad():
        logits = torch.cat([suspect.model(part) for part in suspect.x.split(BATCH)])
    nearest = logits.scatter(1, suspect.y[:, None], -torch.inf).topk(TARGETS, 1).indices
    runs = [{"target": target} for target in nearest.unbind(1)]
    _one_by_one(suspect, ledger, name, suspect.clean, suspect.x.clone(), runs, loss=loss, steps=steps)


def _one_by_one(
    suspect: Suspect,
    ledger: Ledger,
    name: str,
    broken: Tensor,
    images: Tensor,
    runs: Sequence[Mapping[str, Any]],
    **arguments: Any,
) -> None:
    """Runs of PGD, each on what `broken` and the runs before it leave standing."""
    for run in tqdm(runs, desc=name, unit="run", leave=False):
        at, found = suspect.pgd(**arguments, **run, spared=broken)
        new = (at >= 0) & ~broken
        broken, images = broken | new, torch.where(new[:, None, None, None], found, images)
    ledger.note(name, broken, images)


def _around(suspect: Suspect, ledger: Ledger, substitute: gate.Substitute, steps: int, name: str) -> None:
    at, images = suspect.pgd(steps=steps, fast=gate.around(suspect.model, substitute))
    ledger.note(name, at >= 0, images)


def _float64(suspect: Suspect, ledger: Ledger, steps: int, name: str) -> None:
    """In float64 throughout, where a gradient may be 1e-300; what is broken is asked in float32."""
    try:
        at, images = suspect.pgd(steps=steps, fast=copy.deepcopy(suspect.model).double(), dtype=torch.float64)
    except (RuntimeError, TypeError, AttributeError) as error:
        ledger.tell(name, f"not possible: {str(error).splitlines()[0]}")
    else:
        ledger.note(name, at >= 0, images)


def _derivative(suspect: Suspect, ledger: Ledger, name: str) -> None:
    """Whether the gradient is the derivative: along random corners, of random sums of the logits, in float64.

    Of each image, at a random place of the ball: |<gradient, v> - (f(x + h v) - f(x - h v)) / 2h| relative to
    the largest of the two and the gradient's norm, which is what <gradient, v> is on average.
    """
    suspect.random(name)
    h, errors = 1e-7, list[float]()
    try:
        model = copy.deepcopy(suspect.model).double()
        for images in random_images(suspect.x, suspect.eps).double().split(BATCH):
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
        ledger.tell(name, f"not possible: {str(error).splitlines()[0]}")
    else:
        ledger.tell(name, errors)


def _transfer(suspect: Suspect, ledger: Ledger, surrogate: nn.Module, steps: int, name: str) -> None:
    images = suspect.moved(surrogate, steps)
    with attacking(suspect.model):
        wrong = clean_errors(suspect.model, images, suspect.y, BATCH)
    ledger.note(name, wrong | suspect.clean, images)


def _noise(suspect: Suspect, ledger: Ledger, budget: Budget, name: str) -> None:
    suspect.random(name)
    ledger.note(name, *noise(suspect.model, suspect.x, suspect.y, eps=suspect.eps, draws=budget.draws))


def _autoattack(suspect: Suspect, ledger: Ledger, budget: Budget, name: str) -> None:
    parts = ["apgd-ce", "apgd-t", "fab-t"]
    attack = {"eps": suspect.eps, "seed": suspect.seed, "parts": parts, "steps": budget.autoattack}
    found = autoattack(suspect.model, suspect.x, suspect.y, **attack, batch_size=BATCH, title=name)
    ledger.numbers["AutoAttack"] = {"warnings": found.warnings, "standing": found.standing}
    ledger.note(name, found.wrong, found.images)


def _some(suspect: Suspect, ledger: Ledger, standing: int | None, control: int) -> tuple[Tensor, Tensor]:
    """Images that stand against white-box attacks, and a few that were right and fell, by their numbers."""
    broken, clean = white_box(ledger), ledger.wrong[CLEAN]
    return torch.where(~broken)[0][:standing], torch.where(broken & ~clean)[0][:control]


def _square(suspect: Suspect, ledger: Ledger, budget: Budget, name: str) -> None:
    standing, control = _some(suspect, ledger, None, budget.control)
    chosen = torch.cat([standing, control])
    broken, images = torch.zeros(len(suspect.x), dtype=torch.bool), suspect.x.cpu().clone()
    if len(chosen):
        few = chosen.to(suspect.x.device)
        attack = {"eps": suspect.eps, "queries": budget.queries, "seed": suspect.seed}
        broken[chosen], images[chosen] = square(suspect.model, suspect.x[few], suspect.y[few], **attack)
    _note_chosen(ledger, name, broken, images, standing, control, budget.queries)


def _hard_label(suspect: Suspect, ledger: Ledger, budget: Budget, name: str) -> None:
    standing, control = _some(suspect, ledger, budget.hard_label, budget.control)
    chosen = torch.cat([standing, control])
    broken, images = torch.zeros(len(suspect.x), dtype=torch.bool), suspect.x.cpu().clone()
    few = chosen.to(suspect.x.device)
    x, y = suspect.x[few], suspect.y[few]
    starts, known = other_classes(suspect.model, x, y, suspect.x)
    suspect.random(name)
    found, moved, asked = hard_label(
        suspect.model, x[known], y[known], starts[known], eps=suspect.eps, queries=budget.queries
    )
    attacked = chosen[known.cpu()]
    broken[attacked], images[attacked] = found.cpu(), moved.cpu()
    asked = asked[~found]  # of those that it did not break
    _note_chosen(ledger, name, broken, images, standing, control, int(asked.min()) if len(asked) else 0)


def _note_chosen(
    ledger: Ledger,
    name: str,
    broken: Tensor,
    images: Tensor,
    standing: Tensor,
    control: Tensor,
    queries: int,
) -> None:
    ledger.numbers[name] = {
        "standing": len(standing),
        "broken": int(broken[standing].sum()),
        "control": len(control),
        "control broken": int(broken[control].sum()),
        "queries": queries,
    }
    ledger.note(name, broken, images)
