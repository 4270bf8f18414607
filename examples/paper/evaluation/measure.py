"""Which images a network gets wrong: clean, under PGD, under AutoAttack, and under any of them."""

import dataclasses
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks.autoattack import autoattack_by_copy
from examples.paper.attacks.pgd import pgd_at
from examples.paper.attacks.robust_error import clean_errors, dlr_errors, robust_errors
from examples.paper.common import data
from examples.pgd import check_images

PAPER = {"targeted": True, "eps": 16 / 255, "step_size": 1 / 255}
MODERN = {"targeted": False, "eps": 8 / 255, "step_size": 2 / 255}
BATCH = 250
PART = 100  # images of a long attack on a CPU between two writes to the store
FIRST_BREAK = {"cross-entropy": robust_errors, "targeted DLR": dlr_errors}  # by `loss` of the arguments


@dataclasses.dataclass(frozen=True)
class Attack:
    """One attack by its name, on N `images`: the first N, or those from `start` on.

    Its arguments are those of `pgd_at`; with `loss`, of the function of `FIRST_BREAK`, which judges every
    step; without `steps`, of AutoAttack. The clean images have none.
    """

    name: str
    arguments: Mapping[str, Any]
    images: int
    start: int = 0

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
    count = re.compile(r" \(and \d+ more of this kind\)|\d+")
    kinds = {count.sub("", w): w for o in reversed(outcomes) for w in reversed(o.warnings)}
    return Outcome(
        torch.cat([o.wrong for o in outcomes]),
        sum(o.seconds for o in outcomes),
        list(kinds.values())[::-1],
        {part: sum(o.standing[part] for o in outcomes) for part in outcomes[0].standing},
    )


def carry_out(
    attacks: Sequence[Attack], model: nn.Module, x: Tensor, y: Tensor, *, seed: int, device: str, title: str
) -> dict[str, Outcome]:
    """Attack images of x (N, C, H, W), uint8, by the attacks of one family, all of the same images.

    They draw their own random numbers. The seconds of a run count for each of its attacks.
    """
    began, (first, *_) = time.perf_counter(), attacks
    own = zlib.crc32(f"{seed} {first.family}".encode())
    torch.manual_seed(own)
    title, warnings, standing = f"{title}: {first.family}", list[str](), dict[str, int]()
    model = model.to(device, memory_format=torch.channels_last).eval()
    images, labels = data.to_float(x[first.seen], device), y[first.seen].to(device)
    size = _batch_size(device)
    if not first.arguments:
        images = images.contiguous(memory_format=torch.channels_last)
        wrong = {first.name: clean_errors(model, images, labels, size, check_images(images, labels))}
    elif "loss" in first.arguments:
        attack = dict(first.arguments)
        attacked = FIRST_BREAK[attack.pop("loss")]
        wrong = {first.name: attacked(model, images, labels, **attack, batch_size=size)}
    elif "steps" in first.arguments:
        wrong = _last_step_errors(attacks, model, images, labels, size, title)
    else:
        more = {"seed": own, "batch_size": size, "title": title}
        found, _, standing, warnings = autoattack_by_copy(model, images, labels, **first.arguments, **more)
        wrong = {first.name: found}
    seconds = time.perf_counter() - began
    return {a.name: Outcome(wrong[a.name].cpu(), seconds, warnings, standing) for a in attacks}


def _last_step_errors(
    attacks: Sequence[Attack], model: nn.Module, x: Tensor, y: Tensor, size: int, title: str
) -> dict[str, Tensor]:
    """Which images the network gets wrong after the last step of each PGD: one run, judged on its way."""
    wrong: dict[str, list[Tensor]] = {a.name: [] for a in attacks}
    names = {a.arguments["steps"]: a.name for a in attacks}
    arguments = {**attacks[0].arguments, "steps": list(names)}
    with tqdm(total=len(x), unit="img", desc=title) as bar:
        for images, labels in zip(x.split(size), y.split(size), strict=True):
            clean = images.contiguous(memory_format=torch.channels_last)
            for steps, x_adv in pgd_at(model, clean, labels, **arguments).items():
                wrong[names[steps]].append(clean_errors(model, x_adv, labels))
            bar.update(len(images))
    return {name: torch.cat(parts) for name, parts in wrong.items()}


def worst_case(outcomes: Sequence[Outcome]) -> Outcome:
    """The images that any of several attacks fooled, among those that all of them had."""
    seen = min(len(o.wrong) for o in outcomes)
    return Outcome(torch.stack([o.wrong[:seen] for o in outcomes]).any(0), 0.0, [])


def _batch_size(device: str) -> int:
    """Images in a batch: fewer leave a GPU idle."""
    return 1000 if torch.device(device).type == "cuda" else BATCH
