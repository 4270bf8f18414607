"""Judges the surgery on a written network by its twin, in which a person has put the new activations."""

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparta_act import SpartaError, relu_sites, replace_relus, restore_relus
from sparta_act.errors import SiteError
from tests.helpers.observing import Situation, build, drawn, example, fingerprint, observed, same, situations
from tests.helpers.random_calls import EDIT, MAY, REFUSE
from tests.helpers.random_networks import Written

KIND = {EDIT: "refused without need", MAY: "refused", REFUSE: "refused"}


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
        self.example = example(written)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of the package; no unclear error, no random numbers."""
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
        """Compare with what was before, with ReLU put for ReLU; then with the twin."""
        places = [(spot, act) for label, act in acts.items() for spot in spots(self.twins[label][1]).values()]
        if len(self.net.state_dict()) != len(self.twin.state_dict()) + len(acts):
            raise Wrong(f"{[*acts]}: not one new parameter for each")
        makes_a_difference = False
        for s, before in zip(self.situations, self.before, strict=True):
            Act.plain = True
            actual = self.results(s)
            Act.plain = False
            if not same(actual, before):
                raise Wrong(f"{[*acts]}, {s}: with ReLU put for ReLU, something else than before")
            for spot, act in places:
                vars(spot)["new"] = act
            expected = observed(self.twin, s)
            for spot, _ in places:
                vars(spot)["new"] = None
            makes_a_difference |= not same(expected, before)
            if not same(self.results(s), expected):
                raise Wrong(f"{[*acts]}, {s}: something else than a person's edit gives")
        assert makes_a_difference, "a comparison that shows nothing"

    def results(self, s: Situation) -> list[Tensor]:
        try:
            return observed(self.net, s)
        except Exception as error:
            Act.plain = False
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
        _, truth, parts = judgment.truths[label]
        verdicts.append(Verdict(label, KIND[truth] if why else "right", why, parts))
    return verdicts
