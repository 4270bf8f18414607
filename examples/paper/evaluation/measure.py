"""Which images a network gets wrong: clean, under PGD, under AutoAttack, and under any of them."""

import dataclasses
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks.autoattack import autoattack_by_copy
from examples.paper.attacks.pgd import attacking, classes_of, pgd, pgd_at, pgd_steps, random_targets
from examples.paper.attacks.robust_error import dlr_errors, robust_errors
from examples.paper.common import data
from examples.pgd import check_images, check_logits, check_numbers, is_wrong

PAPER = {"targeted": True, "eps": 16 / 255, "step_size": 1 / 255}
MODERN = {"targeted": False, "eps": 8 / 255, "step_size": 2 / 255}
BATCH = 250
PART = 100  # images of a long attack on a CPU between two writes to the store
FIRST_BREAK = {"cross-entropy": robust_errors, "targeted DLR": dlr_errors}  # by `loss` of the arguments


@dataclasses.dataclass(frozen=True)
class Attack:
    """One attack by its name, on N `images`: the first N, or those from `start` on.

    Its arguments are those of `pgd`; with `loss`, of the function of `FIRST_BREAK`, which judges every step;
    without `steps`, of AutoAttack. The clean images have none.
    """

    name: str
    arguments: Mapping[str, Any]
    images: int
    start: int = 0

    @property
    def eps(self) -> float:
        """Bound of the perturbation, as a fraction of 1."""
        return float(self.arguments.get("eps", 0))

    @property
    def family(self) -> str:
        """Its name without the number of steps: attacks of one family begin alike."""
        return re.sub(r"PGD-\d+", "PGD", self.name)

    @property
    def seen(self) -> slice:
        """The images that it attacks."""
        return slice(self.start, self.start + self.images)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Which images an attack fooled, the seconds it took and the warnings of its library."""

    wrong: Tensor  # (images,) of bool
    seconds: float
    warnings: list[str]
    standing: dict[str, int] = dataclasses.field(default_factory=dict)  # right after each part of AutoAttack


def parts(attacks: Sequence[Attack], device: str) -> list[list[Attack]]:
    """Attacks of one family in the parts to carry out and store one by one: long attacks in batches.

    Long are AutoAttack and the attacks that judge every step.
    """
    first, *others = attacks
    if others or not first.arguments or ("steps" in first.arguments and "loss" not in first.arguments):
        return [list(attacks)]
    size = _batch_size(device) if torch.device(device).type == "cuda" else PART
    starts = range(0, first.images, size)
    return [[dataclasses.replace(first, start=i, images=min(size, first.images - i))] for i in starts]


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcomes of the parts of one attack as one outcome, with the first warning of each kind."""
    kinds = {re.sub(r"\d+", "", w): w for o in reversed(outcomes) for w in reversed(o.warnings)}
    return Outcome(
        torch.cat([o.wrong for o in outcomes]),
        sum(o.seconds for o in outcomes),
        list(kinds.values())[::-1],
        {part: sum(o.standing[part] for o in outcomes) for part in outcomes[0].standing},
    )


def find_errors(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Mapping[str, Any]],
    *,
    device: str = "cpu",
    batch_size: int | None = None,
    title: str = "attacking",
) -> dict[str, Tensor]:
    """Which images the network gets wrong: clean, and under each PGD.

    Attacks that differ only in the number of steps are one run, judged on its way. `batch_size`: by default
    250, and 1000 on a GPU, which smaller batches leave idle.
    Shapes: x (N, C, H, W) uint8, y (N,); each result (N,) of bool.
    """
    wrong: dict[str, list[Tensor]] = {name: [] for name in ("clean", *attacks)}
    model = model.to(device, memory_format=torch.channels_last).eval()
    batch_size = batch_size or _batch_size(device)
    runs = _runs(attacks)
    passes = [max(named) * attacks[named[max(named)]].get("restarts", 1) for named in runs]
    with tqdm(total=(1 + sum(passes)) * len(x), unit="img", unit_scale=True, desc=title) as bar:
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            clean = data.to_float(images, device).contiguous(memory_format=torch.channels_last)
            goal = labels.to(device)
            wrong["clean"].append(_errs(model, clean, goal, check_images(clean, goal)))
            bar.update(len(clean))
            for named, count in zip(runs, passes, strict=True):
                for steps, x_adv in _attacked(model, clean, goal, named, attacks).items():
                    wrong[named[steps]].append(_errs(model, x_adv, goal))
                bar.update(len(clean) * count)
    return {name: torch.cat(parts) for name, parts in wrong.items()}


def _runs(attacks: Mapping[str, Mapping[str, Any]]) -> list[dict[int, str]]:
    """Names of each run's attacks, by their number of steps; an attack with restarts has its own run."""
    runs: dict[frozenset[Any], dict[int, str]] = {}
    for name, arguments in attacks.items():
        alone = arguments.get("restarts", 1) > 1
        what = frozenset((k, v) for k, v in arguments.items() if k != "steps" or alone)
        runs.setdefault(what, {})[arguments["steps"]] = name
    return list(runs.values())


def _attacked(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    named: Mapping[int, str],
    attacks: Mapping[str, Mapping[str, Any]],
) -> dict[int, Tensor]:
    arguments = dict(attacks[next(iter(named.values()))])
    if arguments.get("restarts", 1) > 1:
        return {arguments["steps"]: pgd(model, x, y, **arguments)}
    arguments.pop("restarts", None)
    return pgd_at(model, x, y, **arguments | {"steps": list(named)})


def carry_out(
    attacks: Sequence[Attack], model: nn.Module, x: Tensor, y: Tensor, *, seed: int, device: str, title: str
) -> dict[str, Outcome]:
    """Attack images of x (N, C, H, W), uint8, by the attacks of one family, all of the same images.

    They draw their own random numbers. The seconds of a run count for each of its attacks.
    """
    began, (first, *_) = time.perf_counter(), attacks
    x, y = x[first.seen], y[first.seen]
    own = zlib.crc32(f"{seed} {first.family}".encode())
    torch.manual_seed(own)
    title, warnings, standing = f"{title}: {first.family}", list[str](), dict[str, int]()
    if not first.arguments:
        wrong = find_errors(model, x, y, {}, device=device, title=title)
    elif "loss" in first.arguments:
        wrong = {a.name: _first_break_errors(model, x, y, a.arguments, device) for a in attacks}
    elif "steps" in first.arguments:
        pgds = {a.name: a.arguments for a in attacks}
        wrong = find_errors(model, x, y, pgds, device=device, title=title)
    else:
        model = model.to(device, memory_format=torch.channels_last).eval()
        found, _, standing, warnings = autoattack_by_copy(
            model,
            data.to_float(x, device),
            y.to(device),
            **first.arguments,
            seed=own,
            batch_size=_batch_size(device),
            title=title,
        )
        wrong = {first.name: found}
    seconds = time.perf_counter() - began
    return {a.name: Outcome(wrong[a.name], seconds, warnings, standing) for a in attacks}


def _first_break_errors(
    model: nn.Module, x: Tensor, y: Tensor, arguments: Mapping[str, Any], device: str
) -> Tensor:
    attack = dict(arguments)
    attacked = FIRST_BREAK[attack.pop("loss")]
    model = model.to(device, memory_format=torch.channels_last).eval()
    images, labels = data.to_float(x, device), y.to(device)
    return attacked(model, images, labels, **attack, batch_size=_batch_size(device)).cpu()


def worst_cases(attacks: list[Attack], outcomes: Mapping[str, Outcome]) -> dict[str, Tensor]:
    """For each bound, the images that any attack within it fooled, among the images that all of them had."""
    cases = {}
    for eps in sorted({a.eps for a in attacks} - {0.0}):
        within = [outcomes[a.name].wrong for a in attacks if a.eps <= eps]
        seen = min(len(w) for w in within)
        cases[f"worst case, {Fraction(eps).limit_denominator(255)}"] = torch.stack(
            [w[:seen] for w in within]
        ).any(0)
    return cases


def loss_curve(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, step_size: float, steps: int, targeted: bool
) -> tuple[Tensor, Tensor]:
    """Loss of each image at each step of one PGD run, and the attacked images (the paper's Figure 3).

    Shapes: x (N, C, H, W) in [0, 1], y (N,); results (steps, N) and as x.
    """
    check_numbers(eps=eps, step_size=step_size, steps=steps)
    classes = check_images(x, y)
    with attacking(model):
        goal = random_targets(y, classes_of(model, x, classes)) if targeted else y
        attack = {"eps": eps, "step_size": step_size, "steps": steps, "targeted": targeted}
        run = pgd_steps(model, x, goal, **attack, classes=classes)
        images, losses = zip(*run, strict=True)
    return torch.stack(losses), images[-1]


def _batch_size(device: str) -> int:
    """Images in a batch: fewer leave a GPU idle."""
    return 1000 if torch.device(device).type == "cuda" else BATCH


def _errs(model: nn.Module, x: Tensor, y: Tensor, classes: int = 2) -> Tensor:
    with torch.no_grad():
        return is_wrong(check_logits(model(x.clone()), len(x), classes), y).cpu()
