"""Judges the surgery on one network against a recording of activation calls, which shares no code with it.

Hooks on all modules and a count of the calls tell which call is the last of a block. The expected output
comes from a run of the untouched network in which exactly these calls compute the probe.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.recording import Bench, Call, Example, probe
from sparta_act import SpartaError, relu_sites, replace_relus, restore_relus
from sparta_act.surgery import Site

KINDS = ("relu", "relu6", "silu", "gelu", "hardswish", "leaky_relu", "prelu", "elu", "mish")


class Verdict(NamedTuple):
    """The result for one network."""

    result: str  # "right", "refused" or "wrong"
    why: str = ""
    kind: str = ""  # the activation that was replaced
    groups: str = ""  # blocks per group, "2+2+2+2"
    replaced: int = 0  # blocks
    others: int = 0  # sites without a label
    edits: str = ""
    every: str = ""  # how many calls "all" replaced, or "refused"


class Wrong(Exception):  # noqa: N818  (a finding, not a fault)
    """The surgery computed something else than it should."""


class Probe(nn.Module):
    """`probe` with a learnable slope per channel."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((in_channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, ...) -> (N, C, ...)."""
        return probe(x, self.slope.view(-1, *[1] * (x.ndim - 2)))


def commonest_kind(model: nn.Module, example: Example) -> str:
    """ReLU if the network has one on feature maps; else its most frequent activation; "" if none."""
    counted = Counter[str]()
    for kind in KINDS:
        _, calls = Bench(model, example, kind).run(False)
        counted[kind] = sum(c.on_map() for c in calls)
        if counted["relu"]:
            return "relu"
    kind, count = counted.most_common(1)[0]
    return kind if count else ""


def shake(model: nn.Module) -> nn.Module:
    """Draw the constant scales of `model` anew, in place; zeros would hide their branch. Return the model."""
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                scale = p.numel() == max(p.shape, default=1) and "bias" not in name
                if scale and p.min() == p.max():
                    p.uniform_(0.5, 1.5)
    return model


def judge(
    model: nn.Module,
    example: Example,
    *,
    given: Example | None = None,
    replace: Callable[..., nn.Module] = replace_relus,
) -> Verdict:
    """Replace the last activation of every block, one site by its name, and "all"; compare, restore, compare.

    `given`: the example passed to the surgery. `replace`: the surgery.
    """
    shake(model)
    kind = commonest_kind(model, example)
    if not kind:
        return Verdict("refused", "no activation on feature maps that could be replaced")
    bench = Bench(model, example, kind)
    try:
        sites = relu_sites(model, kinds=kind, example=given)
    except SpartaError as error:
        return Verdict("refused", str(error), kind)
    blocks = [s for s in sites if s.label]
    fine = [s for s in blocks if not s.problem]
    others = [s for s in sites if not s.label]
    groups = "+".join(str(n) for n in Counter(s.group for s in blocks).values())
    edits = " and ".join(sorted({s.edit for s in (fine or others)}))
    verdict = Verdict("right", "", kind, groups, len(fine), len(others), edits)
    reasons = sorted({s.problem for s in blocks if s.problem})
    if not fine and not others:
        return verdict._replace(result="refused", why="; ".join(reasons) or repr(sites))
    judgment = _Judgment(bench, given, replace)
    try:
        if fine:
            every = len(fine) == len(blocks)
            reasons += judgment.reasons_against("G*.B*" if every else ",".join(s.label for s in fine), fine)
        if others:
            site = others[len(others) // 2]
            reasons += judgment.reasons_against(site.name, [site])
        verdict = verdict._replace(every=judgment.every())
    except Wrong as error:
        return verdict._replace(result="wrong", why=str(error))
    refused = not judgment.done or (blocks and not fine)
    return verdict._replace(result="refused" if refused else "right", why="; ".join(reasons))


class _Judgment:
    def __init__(self, bench: Bench, given: Example | None, replace: Callable[..., nn.Module]) -> None:
        self.bench, self.given, self.replace = bench, given, replace
        self.before = [bench.run(training) for training in (False, True)]
        self.classes = [type(m) for m in bench.model.modules()]
        self.keys = [*bench.model.state_dict()]
        self.done = 0

    def reasons_against(self, pattern: str, sites: list[Site]) -> list[str]:
        """Replace, compare, restore, compare; the reasons of a refusal, if any. Raises `Wrong`."""
        model = self.bench.model
        chosen = [frozenset(self._expected(s, training) for s in sites) - {-1} for training in (False, True)]
        expected = [self.bench.run(training, chosen[training])[0] for training in (False, True)]
        if any(_same(expected[t], self.before[t][0]) for t in (False, True) if chosen[t]):
            raise Wrong(f"{pattern}: the output does not depend on these calls: a comparison shows nothing")
        try:
            self.replace(model, pattern, Probe, kinds=self.bench.kind, example=self.given)
        except SpartaError as error:
            self._compare_with_before(f"after the refusal of {pattern}")
            return [str(error).splitlines()[0]]
        for training in (False, True):
            if not _same(self.bench.outputs(training), expected[training]):
                raise Wrong(f"{pattern}: another output than with calls {sorted(chosen[training])} replaced")
        restore_relus(model)
        self._compare_with_before(f"after restoring {pattern}")
        self.done += 1
        return []

    def every(self) -> str:
        """Replace "all", restore, compare: how many calls, or "refused". Raises `Wrong` where one stays."""
        model = self.bench.model
        try:
            self.replace(model, "all", Probe, kinds=self.bench.kind, example=self.given)
        except SpartaError:
            self._compare_with_before("after the refusal of all")
            return "refused"
        after = [self.bench.run(training) for training in (False, True)]
        restore_relus(model)
        self._compare_with_before("after restoring all")
        numbers = set[int]()
        for training, (outputs, remaining) in enumerate(after):
            calls = self.before[training][1]
            chosen = _missing(calls, remaining)
            if stay := [
                calls[i].names[-1] for i in range(len(calls)) if calls[i].on_map() and i not in chosen
            ]:
                raise Wrong(f"all: {len(stay)} calls stay, such as that in {stay[0]}")
            if not _same(outputs, self.bench.run(bool(training), chosen)[0]):
                raise Wrong(f"all: another output than with calls {sorted(chosen)} replaced")
            numbers.add(len(chosen))
        return "-".join(map(str, sorted(numbers)))

    def _expected(self, site: Site, training: bool) -> int:
        """Index of the call of a site; -1 if it is not called in this mode."""
        calls, model = self.before[training][1], self.bench.model
        first_names = {id(m): n for n, m in model.named_modules()}  # a module may have several names
        within, named = first_names[id(site.cut.within)], first_names[id(model.get_submodule(site.name))]

        def is_of(call: Call) -> bool:
            if site.label:  # anywhere in the block
                return within in call.names
            if named != site.name:  # one activation in many places: the call from this place
                return call.names[-2:] == (site.name.rpartition(".")[0], named)
            own = call.names[-1] == named  # the activation, or the module whose forward calls it
            called_by = call.names[-2:-1] == (named,) and call.classes[-1] in _ACTIVATIONS
            return own or called_by

        return max((i for i, call in enumerate(calls) if call.on_map() and is_of(call)), default=-1)

    def _compare_with_before(self, when: str) -> None:
        model = self.bench.model
        if [type(m) for m in model.modules()] != self.classes or [*model.state_dict()] != self.keys:
            raise Wrong(f"{when}: other classes or keys than before")
        if not all(_same(self.bench.outputs(t), self.before[t][0]) for t in (False, True)):
            raise Wrong(f"{when}: another output than before")


def _missing(calls: list[Call], remaining: list[Call]) -> frozenset[int]:
    """Which of the calls are not among the remaining ones, which come in the same order."""
    left, gone = [*remaining], set[int]()
    for i, call in enumerate(calls):
        if left and left[0] == call:
            left.pop(0)
        else:
            gone.add(i)
    return frozenset(gone)


_ACTIVATIONS = {n for n in nn.modules.activation.__all__ if n not in ("MultiheadAttention", "Softmax")}


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether all bits agree; NaN equals NaN, so that the other numbers of an overflowing network count."""
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(12345), b.nan_to_num(12345))
        for a, b in zip(left, right, strict=True)
    )
