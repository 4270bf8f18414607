"""Attack networks by a protocol, and write evaluation.json of each."""

import dataclasses
import itertools
import shlex
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from examples.paper.attacks import autoattack
from examples.paper.common import data, records, statistics
from examples.paper.common.cli import check_device
from examples.paper.common.console import print_table, stamp
from examples.paper.common.tf32 import exact_float32
from examples.paper.evaluation import networks, store
from examples.paper.evaluation.measure import Attack, Outcome, carry_out, joined, parts, worst_case
from examples.paper.evaluation.protocols import PROTOCOLS, Protocol

OUT = Path("runs", "evaluate")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network to attack, the test images and all else that an attack's outcome depends on."""

    name: str
    model: nn.Module
    network: str  # sha256 of its file; if a function makes it, also of that function's name and its numbers
    x: Tensor  # (N, C, H, W) uint8
    y: Tensor  # (N,)
    seed: int
    device: str


def evaluations(
    places: Sequence[str], protocol: Protocol, *, data_dir: str, seed: int, device: str, out: Path = OUT
) -> Iterator[float]:
    """Evaluate each network, and print the errors and how they differ from those of the first.

    Before each part it yields the seconds that such a part took before, of any network; 0 if none did. A
    caller who stops then leaves what the next call goes on with.
    """
    check_device(device)
    if protocol.autoattack:
        autoattack.load()
    folders = {place: folder_of(place, out) for place in places}
    if len({f.resolve() for f in folders.values()}) < len(places):
        raise ValueError(f"the results of two networks would go into one folder: {', '.join(places)}")
    subjects = _load(folders, data_dir, seed, device)
    outcomes, took = dict[str, dict[str, Outcome]](), dict[str, float]()
    with exact_float32():
        for place, subject in subjects.items():
            command = _command(place, protocol, data_dir, seed, device)
            outcomes[subject.name] = yield from _evaluate(subject, folders[place], protocol, command, took)
    _print(outcomes)


def folder_of(place: str, out: Path) -> Path:
    """Where the results of a network go: next to a checkpoint, else into a folder of its name in `out`."""
    path, function = networks.split_place(place)
    return out / (function or path.stem) if function or path.suffix == ".safetensors" else path.parent


def _load(folders: Mapping[str, Path], data_dir: str, seed: int, device: str) -> dict[str, Subject]:
    """The networks by their places, with the test images. Raises `ValueError` before hours of work."""
    found = {place: networks.load(place) for place in folders}
    datasets = {dataset for _, dataset, _ in found.values() if dataset}
    if len(datasets) > 1:
        raise ValueError(
            f"the networks are of {' and '.join(sorted(datasets))}; evaluate one data set at a time"
        )
    x, y = data.load("test", data_dir, next(iter(datasets), "cifar10"))
    subjects, few = {}, data.to_float(x[:20])
    for place, (model, _, content) in found.items():
        networks.check(model, few, y)
        function = networks.split_place(place)[1]
        more = [function.encode(), networks.fingerprint(model, few).encode()] if function else []
        network, model = records.sha256(content, *more), networks.in_float32(model, few)
        subjects[place] = Subject(str(folders[place]), model, network, x, y, seed, device)
    return subjects


def _evaluate(
    subject: Subject, folder: Path, protocol: Protocol, command: str, took: dict[str, float]
) -> Generator[float, None, dict[str, Outcome]]:
    began, record = time.perf_counter(), folder / records.RECORD
    attacks = [dataclasses.replace(a, images=min(a.images, len(subject.x))) for a in protocol.attacks()]
    folder.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)  # of an earlier call: nobody shall take it for this one's
    outcomes: dict[str, Outcome] = {}
    for _, family in itertools.groupby(attacks, key=lambda a: (a.family, a.images)):
        outcomes |= yield from _measure(list(family), subject, folder / "evaluation.npz", took)
    for name, attacked in protocol.worst_cases().items():
        outcomes[name] = worst_case([outcomes[a] for a in attacked])
    found = {
        "network": folder.resolve().name,
        "sha256": subject.network,
        "command": command,
        "errors": {name: _entry(outcome) for name, outcome in outcomes.items()},
        "seed": subject.seed,
        **stamp(),
        "test images": records.sha256(subject.x.numpy().tobytes(), subject.y.numpy().tobytes()),  # all
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
            stored = store.add(path, {keys[a]: outcome for a, outcome in new.items()})
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


def _command(place: str, protocol: Protocol, data_dir: str, seed: int, device: str) -> str:
    """The call that measures the same, with no folder of this machine."""
    path, function = networks.split_place(place)
    here = path.resolve().is_relative_to(Path.cwd())
    shown = str(path.resolve().relative_to(Path.cwd()) if here else path.name)
    images = data_dir if data_dir in ("sample", "hub") else f"DATA/{Path(data_dir).resolve().name}"
    words = ["python", "-m", "examples.paper", "evaluate", f"{shown}:{function}" if function else shown]
    options = {"protocol": protocol.name, "data": images, "seed": seed, "device": device}
    preset = PROTOCOLS[protocol.name]
    options |= {k: v for k in ("limit", "autoattack") if (v := getattr(protocol, k)) != getattr(preset, k)}
    return shlex.join([*words, *(w for k, v in options.items() for w in (f"--{k}", str(v)))])


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
                k: str(statistics.paired((outcomes[name][k].wrong, o.wrong)))
                for k, o in outcomes[first].items()
            }
            for name in others
        }
        print_table(f"minus the errors of {first}, points, 95% intervals over images", columns)
