"""Judges the surgery on a written network by its twin, in which a person has put the new activations."""

import dataclasses
import importlib.util
import itertools
import random
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparta_act import SpartaError, relu_sites, replace_relus, restore_relus
from sparta_act.errors import SiteError
from tests.helpers.random_networks import Written
from tests.helpers.random_parts import EDIT, REFUSE

SIZE = {1: 24, 2: 12, 3: 8}  # of the images, by their dimensions
KEPT = ("feature", "penalty", "seen")  # attributes that a pass sets
numbered = itertools.count()


class Verdict(NamedTuple):
    """The result for one block, or for a whole network (no label)."""

    label: str
    result: str  # "right", "refused" (rightly or maybe), "refused without need", "wrong"
    why: str = ""
    parts: tuple[str, ...] = ()


class Wrong(Exception):  # noqa: N818  (a finding)
    """The surgery did something else than a person would."""


class Act(nn.Module):
    """An activation that no network has; or ReLU, for a comparison with what was before."""

    plain = False

    def __init__(self, in_channels: int, number: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.slope = nn.Parameter(torch.linspace(0.8, 1.7, in_channels) + 0.1 * number)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, ...) -> (N, C, ...)."""
        if Act.plain:
            return F.relu(x)
        return torch.tanh(x - 0.3) * self.slope.view(-1, *[1] * (x.ndim - 2)) + 0.3 * x


def build(text: str, folder: Path) -> nn.Module:
    """The network that the text of a module defines."""
    name = f"written_network_{next(numbered)}"
    (folder / f"{name}.py").write_text(text)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec
    assert spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    net: nn.Module = module.Net()
    return net


def tensors(value: Any) -> list[Tensor]:
    """All tensors in what a network returns."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = [*value.values()]
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


class Situation(NamedTuple):
    """The circumstances of a pass."""

    training: bool
    flag: bool
    size: int
    seed: int


def situations(written: Written) -> list[Situation]:
    """Those in which the network may act differently."""
    sizes = [SIZE[written.dimensions]] + (
        [60] if "shape[-1] " in written.text and written.dimensions < 3 else []
    )
    seeds = range(4) if "random()" in written.text else range(1)
    flags = (False, True) if "self.flag" in written.text else (False,)
    several = [Situation(False, f, s, 0) for s in sizes for f in flags]
    return several + [Situation(True, f, sizes[0], seed) for f in flags for seed in seeds]


def observed(net: nn.Module, situation: Situation) -> list[Tensor]:
    """What the network returns and keeps; the network is afterwards as before, but for what it keeps."""
    zeros = [p for p in net.parameters() if not p.any()]  # a norm initialized to zero hides its block
    state = [(t, t.clone()) for t in (*zeros, *net.buffers())]
    modes = [(m, m.training) for m in net.modules()]
    flagged = [m for m in net.modules() if hasattr(type(m), "flag")]
    dimensions = next(m.weight.ndim for m in net.modules() if isinstance(m, nn.modules.conv._ConvNd)) - 2
    for m in net.modules():
        for name in KEPT[:2]:
            vars(m).pop(name, None)
    try:
        for parameter in zeros:
            parameter.data.fill_(0.7)
        for m in flagged:
            m.flag = situation.flag
        seeded(situation.seed)
        x = torch.rand(3, 3, *[situation.size] * dimensions)
        with torch.no_grad():
            found = tensors(net.train(situation.training)(x))
        kept = [vars(m)[k] for m in net.modules() for k in KEPT[:2] if isinstance(vars(m).get(k), Tensor)]
        statistics = [b.float() for n, b in net.named_buffers()]
        return [t.clone() for t in (*found, *kept, *statistics)]
    finally:
        for tensor, value in state:
            tensor.data.copy_(value)
        for m, mode in modes:
            m.training = mode
        for m in flagged:
            del m.flag


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether all numbers agree, but for the order of additions."""
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(left, right, strict=True)
    )


def fingerprint(net: nn.Module, kept: bool = True) -> list[object]:
    """Everything of a network that the surgery could leave changed; tensors by their place and their bytes."""
    found: list[object] = []
    for name, m in net.named_modules(remove_duplicate=False):
        own = {k: v for k, v in vars(m).items() if kept or k not in KEPT}
        found.append(
            (name, id(m), type(m), m.training, [(k, id(v)) for k, v in own.items() if k != "training"])
        )
        found += [[*map(id, v)] for v in own.values() if isinstance(v, list)]
        found += [(k, id(v)) for group in (m._parameters, m._buffers, m._modules) for k, v in group.items()]
        found += [(k, id(h)) for k, h in m._forward_hooks.items()]
    for name, t in (*net.named_parameters(), *net.named_buffers()):
        found.append(
            (name, t.data_ptr(), t.dtype, t.requires_grad, t.grad is None, t.detach().numpy().tobytes())
        )
    return found


def drawn() -> list[object]:
    """The state of all random numbers."""
    numpy = np.random.get_state()[1].tobytes()  # type: ignore[union-attr]  # noqa: NPY002
    return [torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy]


def spots(block: nn.Module) -> dict[str, nn.Module]:
    """The places for a new activation in a block of the twin, by the name of the module that holds them."""
    found = {n: m for n, m in block.named_modules() if type(m).__name__ == "Spot"}
    return found | {n: vars(m)["spot"] for n, m in block.named_modules() if "spot" in vars(m)}


class _Judgment:
    def __init__(self, written: Written, folder: Path, replace: Callable[..., nn.Module]) -> None:
        self.written, self.replace = written, replace
        self.net, self.twin = build(written.text, folder), build(written.twin, folder)
        self.twin.load_state_dict(self.net.state_dict())
        self.situations = situations(written)
        self.before = [observed(self.net, s) for s in self.situations]
        for s, before in zip(self.situations, self.before, strict=True):
            assert same(before, observed(self.twin, s)), f"{s}: the twin is another network"
        labelled = [(vars(m)["label"], n, m) for n, m in self.twin.named_modules() if "label" in vars(m)]
        self.twins = {label: (name, m) for label, name, m in labelled}
        self.truths = {b.label: b for b in written.blocks}
        self.example = torch.rand(2, 3, *[SIZE[written.dimensions]] * written.dimensions)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of the package; it must neither fail by an unclear error nor draw random numbers."""
        before = drawn()
        try:
            return function(self.net, *args, example=self.example)
        except SpartaError:
            raise
        except Exception as error:
            raise Wrong(f"{function.__name__} fails: {type(error).__name__}: {error}") from error
        finally:
            if drawn() != before:
                raise Wrong(f"{function.__name__} draws random numbers")

    def check_untouched(self, before: list[object], what: str, kept: bool = True) -> None:
        """Raise `Wrong` if the network is not as it was when `before` was taken."""
        if (after := fingerprint(self.net, kept)) != before:
            changed = next(
                (f"{b} -> {a}" for a, b in zip(after, before, strict=False) if a != b), "other modules"
            )
            raise Wrong(f"{what} changes the network: {changed[:300]}")

    def sites(self) -> dict[str, Any]:
        """The labelled sites; their labels, names and channels are compared with the truth."""
        before = fingerprint(self.net)
        listed = self.call(relu_sites)
        self.check_untouched(before, "relu_sites")
        sites = {s.label: s for s in listed if s.label}
        if [*sites] != [*self.truths]:
            raise Wrong(f"labels {[*sites]} instead of {[*self.truths]}")
        for label, site in sites.items():
            name, block = self.twins[label]
            places = spots(block)
            if site.problem or self.truths[label].truth == REFUSE:
                continue
            channels = {spot.seen[1] for spot in places.values() if hasattr(spot, "seen")}
            if channels != {site.channels} or site.calls != 1:
                raise Wrong(
                    f"{label}: {site.channels} channels and {site.calls} calls instead of {channels} and 1"
                )
            owners = {".".join(filter(None, (name, n))) for n in places}
            if not any(site.name == o or site.name.startswith(f"{o}.") for o in owners):
                raise Wrong(f"{label} is called {site.name}, not as one of {owners}")
        return sites

    def edit(self, labels: list[str], sites: dict[str, Any]) -> str:
        """Replace, compare, restore, compare; the reason of a refusal, if any. Raises `Wrong`."""
        acts = {label: Act(sites[label].channels, i) for i, label in enumerate(labels)}
        before, but_kept = fingerprint(self.net), fingerprint(self.net, kept=False)
        try:
            self.call(self.replace, ",".join(labels), acts)
        except SiteError as error:
            self.check_untouched(before, "a refused edit")
            return str(error)
        try:
            if must := [x for x in labels if self.truths[x].truth == REFUSE]:
                raise Wrong(f"{must[0]} is edited, but no edit of one call can be right")
            self.compare(acts)
        except Wrong:
            with suppress(SpartaError):
                restore_relus(self.net)
            raise
        restore_relus(self.net)
        self.check_untouched(but_kept, "replace_relus and restore_relus", kept=False)
        ends = [*zip(self.situations, self.before, strict=True)][:: max(1, len(self.situations) - 1)]
        if not all(same(observed(self.net, s), b) for s, b in ends):
            raise Wrong(f"{labels}: another output than before, after restore_relus")
        return ""

    def compare(self, acts: dict[str, Act]) -> None:
        own = [self.net.state_dict(keep_vars=True)]
        added = [k for k in own[0] if k not in self.twin.state_dict()]
        if len(added) != len(acts):
            raise Wrong(f"{[*acts]}: new parameters {added}")
        seen = False
        for s, before in zip(self.situations, self.before, strict=True):
            Act.plain = True
            try:
                actual = self.results(s)
            finally:
                Act.plain = False
            if not same(actual, before):
                raise Wrong(f"{[*acts]}, {s}: with ReLU put for ReLU, something else than before")
            for label, act in acts.items():
                for spot in spots(self.twins[label][1]).values():
                    vars(spot)["new"] = act
            expected = observed(self.twin, s)
            for label in acts:
                for spot in spots(self.twins[label][1]).values():
                    vars(spot)["new"] = None
            seen |= not same(expected, before)
            if not same(self.results(s), expected):
                raise Wrong(f"{[*acts]}, {s}: something else than a person's edit gives")
        assert seen, "the edit makes no difference: the comparison shows nothing"

    def results(self, s: Situation) -> list[Tensor]:
        try:
            return observed(self.net, s)
        except Exception as error:
            raise Wrong(f"{s}: the changed network fails: {type(error).__name__}: {error}") from error


def judge(written: Written, folder: Path, replace: Callable[..., nn.Module] = replace_relus) -> list[Verdict]:
    """One verdict for each block, or one for the network if it is wrong as a whole."""
    judgment = _Judgment(written, folder, replace)
    every = tuple(dict.fromkeys(p for b in written.blocks for p in b.parts))
    try:
        sites = judgment.sites()
    except Wrong as error:
        label = re.match(r"G\d+\.B\d+", str(error))
        parts = judgment.truths[label[0]].parts if label else every
        return [Verdict("", "wrong", str(error), parts)]
    except SiteError as error:
        return [Verdict("", "refused without need", str(error), every)]
    whys = {label: site.problem for label, site in sites.items()}
    rest = [label for label, why in whys.items() if not why]
    verdicts = []
    together = Verdict("", "right")
    try:
        together = together._replace(why=judgment.edit(rest, sites) if rest else "")
    except Wrong as error:
        together = Verdict("", "wrong", str(error), every)
    if together.why and len(rest) > 1:  # whose fault is it?
        for label in rest:
            try:
                whys[label] = judgment.edit([label], sites)
            except Wrong as error:
                verdicts.append(Verdict(label, "wrong", str(error), judgment.truths[label].parts))
                del whys[label]
    elif together.why:
        whys[rest[0]] = together.why
    if together.result == "wrong" and not verdicts:
        return [together]
    for label, why in whys.items():
        need = "refused" if judgment.truths[label].truth != EDIT else "refused without need"
        verdicts.append(Verdict(label, need if why else "right", why, judgment.truths[label].parts))
    return verdicts
