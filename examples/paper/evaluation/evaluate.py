"""Attack trained networks by a protocol, and write evaluation.json next to each checkpoint."""

import dataclasses
import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.paper.attacks import autoattack
from examples.paper.common import data, records, statistics
from examples.paper.common.cli import check_device
from examples.paper.common.console import print_table, stamp
from examples.paper.common.gates import gates, round_to_half
from examples.paper.common.tf32 import exact_float32
from examples.paper.evaluation import store
from examples.paper.evaluation.measure import (
    BATCH,
    PAPER,
    Attack,
    Outcome,
    carry_out,
    joined,
    loss_curve,
    parts,
    worst_cases,
)
from examples.paper.evaluation.protocols import Protocol
from examples.paper.training.checkpoint import load_trained, read_checkpoint


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network to attack, the test images and all else that an attack's outcome depends on."""

    name: str
    model: nn.Module
    settings: dict[str, Any]
    network: str  # sha256 of the checkpoint
    x: Tensor  # (N, C, H, W) uint8
    y: Tensor  # (N,)
    seed: int
    device: str


def evaluations(
    checkpoints: Sequence[Path], protocol: Protocol, *, data_dir: str, seed: int, device: str
) -> Iterator[float]:
    """Evaluate each checkpoint, and print the errors and how they differ from those of the first.

    Before each part it yields the seconds that such a part took before, of any checkpoint; 0 if none did. A
    caller who stops then leaves what the next call goes on with.
    """
    check(checkpoints, protocol, device)
    outcomes, took = dict[str, dict[str, Outcome]](), dict[str, float]()
    with exact_float32():
        for path in checkpoints:
            subject = _load(path, data_dir, seed, device)
            outcomes[subject.name] = yield from _evaluate(subject, path.parent, protocol, took)
    _print(outcomes)


def check(checkpoints: Sequence[Path], protocol: Protocol, device: str) -> None:
    """Raise `ValueError` with what to do, before hours of work, if an evaluation cannot succeed."""
    if missing := [str(c) for c in checkpoints if not c.exists()]:
        raise ValueError(f"there is no {', '.join(missing)}; `train` writes checkpoint.pt into its --out")
    folders = [c.parent.resolve() for c in checkpoints]
    if len(set(folders)) < len(folders):
        raise ValueError(
            "two checkpoints lie in one folder, where their results would go; give one of each folder"
        )
    datasets = {read_checkpoint(c)["settings"]["dataset"] for c in checkpoints}
    if len(datasets) > 1:
        raise ValueError(
            f"the checkpoints are of {' and '.join(sorted(datasets))}; evaluate one data set at a time"
        )
    check_device(device)
    if protocol.autoattack:
        autoattack.load()


def _load(path: Path, data_dir: str, seed: int, device: str) -> Subject:
    """The network of a checkpoint, with SPARTA's weights as a set stores them, and its test images."""
    network = records.sha256(path.read_bytes())
    model, settings = load_trained(path)
    if network != records.sha256(path.read_bytes()):
        raise ValueError(f"{path} was written anew just now, as its training goes on; evaluate it again")
    round_to_half(gates(model))
    x, y = data.load("test", data_dir, settings["dataset"])
    return Subject(str(path.parent), model, settings, network, x, y, seed, device)


def _evaluate(
    subject: Subject, folder: Path, protocol: Protocol, took: dict[str, float]
) -> Generator[float, None, dict[str, Outcome]]:
    began, record = time.perf_counter(), folder / records.RECORD
    attacks = [dataclasses.replace(a, images=min(a.images, len(subject.x))) for a in protocol.attacks()]
    record.unlink(missing_ok=True)  # of an earlier call: nobody shall take it for this one's
    outcomes: dict[str, Outcome] = {}
    for _, family in itertools.groupby(attacks, key=lambda a: (a.family, a.images)):
        outcomes |= yield from _measure(list(family), subject, folder / "evaluation.npz", took)
    outcomes |= {case: Outcome(wrong, 0.0, []) for case, wrong in worst_cases(attacks, outcomes).items()}
    curve = {} if protocol.every_step else {"loss per step": _curve(subject, attacks[0].images, protocol)}
    found = {
        "errors": {name: _entry(outcome) for name, outcome in outcomes.items()},
        "seed": subject.seed,
        "settings": subject.settings,
        "checkpoint": subject.network,
        **stamp(),
        "test images": records.sha256(subject.x.numpy().tobytes(), subject.y.numpy().tobytes()),  # all
        "steps of PGD in": "bfloat16" if protocol.amp else "float32",
        **curve,
        "seconds": round(time.perf_counter() - began, 1),
    }
    records.write_record(record, records.sealed(found))
    return outcomes


def _measure(
    family: list[Attack], subject: Subject, path: Path, took: dict[str, float]
) -> Generator[float, None, dict[str, Outcome]]:
    """Outcomes of attacks that are carried out together; what the file `path` lacks is added to it."""
    stored = store.read(path)
    found: dict[str, list[Outcome]] = {attack.name: [] for attack in family}
    before = dict.fromkeys(found, 0)  # images measured by an earlier call
    for part in parts(family, subject.device):
        keys = {a.name: store.key(a, subject.network, subject.x, subject.y, subject.seed) for a in part}
        if missing := [a for a in part if not store.holds(stored, keys[a.name], a)]:
            yield max(took.get(a.name, 0.0) for a in missing)
            new = carry_out(
                missing,
                subject.model,
                subject.x,
                subject.y,
                seed=subject.seed,
                device=subject.device,
                title=subject.name,
            )
            stored |= {keys[a]: outcome for a, outcome in new.items()}
            store.write(path, stored)
        for attack in part:
            outcome = stored[keys[attack.name]]
            found[attack.name].append(outcome)
            took[attack.name] = max(took.get(attack.name, 0.0), outcome.seconds)
            before[attack.name] += 0 if attack in missing else attack.images
    outcomes = {name: joined(of_parts) for name, of_parts in found.items()}
    for name, outcome in outcomes.items():
        _print_outcome(f"{subject.name}: {name}", outcome, before[name])
    return outcomes


def _print_outcome(title: str, outcome: Outcome, before: int) -> None:
    if before == len(outcome.wrong):
        print(f"{title} was measured before")
    elif before:
        print(f"{title}, {before} images were measured before")
    if outcome.standing:
        standing = ", ".join(f"{left} after {part}" for part, left in outcome.standing.items())
        print(f"{title}, still right of {len(outcome.wrong)}: {standing}")
    for warning in outcome.warnings:
        print(f"{title} warns: {warning}")


def _entry(outcome: Outcome) -> dict[str, Any]:
    entry = statistics.entry(outcome.wrong) | {"seconds": round(outcome.seconds, 1)}
    entry |= {"standing": outcome.standing} if outcome.standing else {}
    return entry | ({"warnings": outcome.warnings} if outcome.warnings else {})


def _curve(subject: Subject, images: int, protocol: Protocol) -> list[float]:
    """Mean loss of the target class at each step of the targeted PGD, on the first images."""
    torch.manual_seed(subject.seed)
    few, model = min(BATCH, images), subject.model.to(subject.device)
    x, y = data.to_float(subject.x[:few], subject.device), subject.y[:few].to(subject.device)
    curve, _ = loss_curve(model, x, y, **PAPER, steps=max(protocol.steps))
    return curve.mean(1).tolist()


def _print(outcomes: dict[str, dict[str, Outcome]]) -> None:
    first, *others = outcomes
    columns = {
        name: {
            k: f"{statistics.format_error(o.wrong)} of {len(o.wrong)}"
            + (f", {o.seconds:.0f} s" if o.seconds else "")
            for k, o in found.items()
        }
        for name, found in outcomes.items()
    }
    print_table("errors on test images, 95% intervals", columns)
    if others:
        columns = {
            name: {
                k: statistics.format_difference(*statistics.difference(outcomes[name][k].wrong, o.wrong))
                for k, o in outcomes[first].items()
            }
            for name in others
        }
        print_table(f"minus the errors of {first}, points, paired 95% intervals", columns)
