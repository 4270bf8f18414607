"""Trained activations in networks that they were not trained in, next to their controls."""

import copy
import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from examples.paper.common import data
from examples.paper.common.models import ACTIVATIONS, ResNet
from examples.paper.common.records import sha256
from examples.paper.controls import pretraining
from examples.paper.controls.experiment import TEST, Job, Make, Results, results
from examples.paper.controls.networks import SITES
from examples.paper.evaluation.networks import load, numbers, short_name
from examples.paper.training.validation import held_out
from sparta_act import Sparta, SpartaSet, replace_relus

T = TypeVar("T")
RELU, HALF, THERE = "ReLU", "ReLU times one half", "SPARTA trained there"
FROZEN, SHUFFLED, WHOLE = "{}, frozen", "{}, shuffled, frozen", "the whole network {}"  # of a set or network
SLIM, WIDE = "cifar10-resnet18-w16", "cifar10-resnet18"
CONTENDERS = {"relu": RELU, "relu-half": HALF, "sparta": THERE}  # of `rates`: those that need no set
HELD, RATE_SEED = 1000, 7  # training images held out to choose a learning rate, and the seed of its networks


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where activations are taken to: a network with ReLU, and the data set that it learns."""

    what: str
    network: Callable[[Path], nn.Module]  # of the file of a torchvision network that is trained already
    dataset: str = "cifar10"
    trained: bool = False  # on other images
    sets: tuple[str, ...] = (SLIM,)
    whole: tuple[str, ...] = ()  # robust networks of ours to start from instead


def _slim(arch: str, dataset: str = "cifar10") -> Callable[[Path], nn.Module]:
    return lambda _: ResNet(arch, width=16, dataset=dataset)


DESTINATIONS = {
    "resnet18": Destination("a fresh ResNet-18 of width 16", _slim("resnet18")),
    "resnet34": Destination("a fresh ResNet-34 of width 16", _slim("resnet34")),
    "mnist-m": Destination(
        "a fresh ResNet-18 of width 16, on MNIST-M",
        _slim("resnet18", "mnist-m"),
        "mnist-m",
        whole=(SLIM, f"{SLIM}-relu"),
    ),
    "torchvision": Destination(
        "torchvision's ResNet-18, trained on CIFAR-10 without attacks, on MNIST-M",
        pretraining.load,
        "mnist-m",
        trained=True,
        sets=(WIDE,),
    ),
}


def transfers(
    to: str,
    out: Path,
    *,
    source: str,
    sets: list[str],
    whole: list[str],
    trained: Path,
    seeds: list[int],
    limit: int,
    epochs: int,
) -> Results:
    """Each network's results, by seed: trained on the last `limit` test images, attacked on the first ones.

    No set and no network has seen them. Raises `ValueError` or `SpartaError` for what does not fit, before
    anything is trained.
    """
    there = DESTINATIONS[to]
    x, y = data.load("test", source, there.dataset)
    if limit >= len(x):
        raise ValueError(f"--limit {limit}: no test image of {len(x)} would be left to test on")
    train, test = (x[-limit:], y[-limit:]), (x[:-limit][:TEST], y[:-limit][:TEST])
    taken = _named(sets, _name, Sparta.from_pretrained)
    robust = _named(whole, short_name, lambda where: load(where)[0])
    network = partial(there.network, trained)
    for make, _ in cases(network, taken, robust, seeds[0]).values():
        make()
    here = {"experiment": f"transfer {to}", "lr": 0.1, **_options(there, trained, limit, epochs)}
    jobs = [
        Job(label, make, {"seed": seed, **here, **own})
        for seed in seeds
        for label, (make, own) in cases(network, taken, robust, seed).items()
    ]
    return results(out, jobs, train, test)


def rates(
    to: str,
    out: Path,
    *,
    source: str,
    activations: list[str],
    whole: list[str],
    lrs: list[float],
    trained: Path,
    limit: int,
    epochs: int,
) -> Results:
    """Each activation's result, and each robust network's, at each learning rate, to choose a destination's.

    Attacked on 1,000 training images, evenly spread over them, and trained on the first `limit` others, with
    a seed of its own: what `transfers` measures has no part in it. Raises `ValueError` for what does not fit.
    """
    there = DESTINATIONS[to]
    x, y = data.load("train", source, there.dataset)
    if limit + HELD > len(x):
        raise ValueError(f"--limit {limit}: of {len(x)} training images {HELD} are needed to test on")
    robust = _named(whole, short_name, lambda where: load(where)[0])
    if not (activations or robust):
        raise ValueError("nothing to train: give --activation or --whole")
    made = cases(partial(there.network, trained), {}, robust, RATE_SEED)
    taken = [(a, *made[CONTENDERS[a]]) for a in activations] + [(n, *made[WHOLE.format(n)]) for n in robust]
    for _, make, _ in taken:
        make()
    here = {"experiment": f"rate {to}", "seed": RATE_SEED, **_options(there, trained, limit, epochs)}
    jobs = [
        Job(f"{name} at {lr:g}", make, {**here, **own, "lr": lr}) for name, make, own in taken for lr in lrs
    ]
    held = held_out(HELD, len(x))
    return results(out, jobs, (x[~held][:limit], y[~held][:limit]), (x[held], y[held]))


def _options(there: Destination, trained: Path, limit: int, epochs: int) -> dict[str, Any]:
    """What all networks at a destination share."""
    shared = {"dataset": there.dataset, "limit": limit, "epochs": epochs, "batch_size": 64}
    return shared | ({"trained": sha256(trained.read_bytes())} if there.trained else {})


def _name(taken: str) -> str:
    """What a set is called: its name, or the folder of the run that made it."""
    path = Path(taken).resolve()
    return path.parent.name if path.name == "set" else path.name


def _named(places: list[str], name: Callable[[str], str], read: Callable[[str], T]) -> dict[str, T]:
    """What is at each place, by name. Raises `ValueError` for a name that is there twice or no file's."""
    names = [name(place) for place in places]
    if wrong := [n for n in names if names.count(n) > 1 or not re.fullmatch(r"[\w.-]*[a-zA-Z0-9][\w.-]*", n)]:
        raise ValueError(
            f"each set or network needs a name of its own, of letters, digits, dots and dashes, not {wrong}"
        )
    return {n: read(place) for n, place in zip(names, places, strict=True)}


def is_control(label: str) -> bool:
    """Whether other networks are compared with the one of this label, beside ReLU."""
    return label == HALF or label.endswith(SHUFFLED.format(""))


def cases(
    network: Make, sets: dict[str, SpartaSet], robust: dict[str, nn.Module], seed: int
) -> dict[str, tuple[Make, dict[str, Any]]]:
    """Networks by label, and the options of each alone. Their random numbers are the same."""

    def fresh() -> nn.Module:
        torch.manual_seed(seed)
        return network()

    def with_activation(activation: Any) -> Make:
        return lambda: replace_relus(fresh(), SITES, activation)

    cases: dict[str, tuple[Make, dict[str, Any]]] = {
        RELU: (fresh, {}),
        HALF: (with_activation(ACTIVATIONS["relu-half"]), {}),
    }
    for name, taken in sets.items():
        own = {"set": name, "sha256": _digest(taken)}
        cases[FROZEN.format(name)] = with_activation(taken), own
        cases[SHUFFLED.format(name)] = with_activation(shuffled(taken, seed)), own
    cases[THERE] = with_activation(Sparta), {}
    for name, model in robust.items():
        own = {"network": name, "sha256": sha256(*numbers(model))}
        cases[WHOLE.format(name)] = partial(_whole, model, seed), own
    return cases


def _digest(taken: SpartaSet) -> str:
    return sha256(*(p.detach().numpy().tobytes() for a in taken.values() for p in a.parameters()))


def _whole(robust: nn.Module, seed: int) -> nn.Module:
    """A copy of a network of ours, its classifier new. Raises `ValueError` for another network."""
    torch.manual_seed(seed)
    model = copy.deepcopy(robust)
    if not isinstance(model, ResNet):
        raise ValueError(f"--whole takes networks of `train` or `network`, not a {type(model).__name__}")
    model.fc = nn.Linear(model.fc.in_features, model.fc.out_features)
    return model


def shuffled(taken: SpartaSet, seed: int) -> SpartaSet:
    """A copy of a set, the numbers within each parameter in random order: same values, nothing learned."""
    taken, generator = copy.deepcopy(taken), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (p for activation in taken.values() for p in activation.parameters()):
            p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p))
    return taken
