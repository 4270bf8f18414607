"""Judges a surgery on one network, by a recording of activation calls that shares no code with the surgery.

Hooks on all modules and a count of the calls show which call is the last of a block. A second run of the
untouched network, in which those calls return what `Probe` would, shows what the changed one must compute.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from sparta_act import SpartaError, relu_sites, replace_relus, restore_relus
from sparta_act.surgery import Site

KINDS = ("relu", "relu6", "silu", "gelu", "hardswish", "leaky_relu", "prelu", "elu", "mish")

Example = tuple[Any, ...]


class Verdict(NamedTuple):
    """What became of one network."""

    result: str  # "right", "refused" or "wrong"
    why: str = ""
    kind: str = ""  # the activation that was replaced
    groups: str = ""  # numbers of blocks, "2+2+2+2"
    replaced: int = 0  # of these
    others: int = 0  # sites without a label
    edits: str = ""


class Wrong(Exception):  # noqa: N818  (a finding, not a fault)
    """The surgery did not do what it promised."""


class Probe(nn.Module):
    """An activation that no network has: half a ReLU, plus 0.1."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((in_channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, ...) -> (N, C, ...)."""
        return x.clamp_min(0) * self.slope.view(-1, *[1] * (x.ndim - 2)) + 0.1


class Call(NamedTuple):
    """One call of an activation: the shape of its input, and names and classes of the modules running."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]

    def on_map(self) -> bool:
        """Whether the input has more than one pixel."""
        return len(self.shape) > 2 and int(np.prod(self.shape[2:])) > 1


class Recording(TorchFunctionMode):
    """Lists the calls of one kind of activation in a pass, and computes the chosen ones as `Probe` does."""

    def __init__(self, kind: str, chosen: frozenset[int]) -> None:
        super().__init__()
        self.kind, self.chosen = kind, chosen
        self.calls: list[Call] = []
        self.running: list[tuple[str, str]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name, inside = getattr(func, "__name__", "").rstrip("_"), self.running[-1][1] if self.running else ""
        name = "relu6" if name == "hardtanh" and inside == "ReLU6" else name
        if name != self.kind:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        names, classes = zip(*self.running, strict=True) if self.running else ((), ())
        self.calls.append(Call(tuple(x.shape), names, classes))
        return x.clamp_min(0) * 0.5 + 0.1 if len(self.calls) - 1 in self.chosen else func(*args, **kwargs)


@contextmanager
def _watched(model: nn.Module, recording: Recording) -> Iterator[None]:
    names = {id(m): n for n, m in reversed([*model.named_modules()])}
    handles = []
    for module in model.modules():
        here = names[id(module)], type(module).__name__
        handles.append(
            module.register_forward_pre_hook(lambda m, i, here=here: recording.running.append(here))
        )
        handles.append(module.register_forward_hook(lambda m, i, o: (recording.running.pop(), None)[1]))
    try:
        with recording:
            yield
    finally:
        for handle in handles:
            handle.remove()


def tensors(value: Any) -> list[Tensor]:
    """All tensors in what a network returned."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


class Bench:
    """A network and an input, run in either mode; buffers and modes are restored."""

    def __init__(self, model: nn.Module, example: Example, kind: str) -> None:
        self.model, self.example, self.kind = model, example, kind

    def run(self, training: bool, chosen: frozenset[int] = frozenset()) -> tuple[list[Tensor], list[Call]]:
        """Outputs, and the calls of the pass."""
        recording = Recording(self.kind, chosen)
        with self._unchanged(training), torch.no_grad(), _watched(self.model, recording):
            return tensors(self.model(*self._inputs())), recording.calls

    def outputs(self, training: bool) -> list[Tensor]:
        """Outputs, without hooks and recording."""
        with self._unchanged(training), torch.no_grad():
            return tensors(self.model(*self._inputs()))

    def _inputs(self) -> Example:
        copied: Example = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self.example)
        return copied

    @contextmanager
    def _unchanged(self, training: bool) -> Iterator[None]:
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        modes = [(m, m.training) for m in self.model.modules()]
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  (some networks draw from it)
        self.model.train(training)
        try:
            yield
        finally:
            for name, buffer in self.model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
            for module, mode in modes:
                module.training = mode


def commonest_kind(model: nn.Module, example: Example) -> str:
    """ReLU if the network has one on a map, else its commonest activation on maps, else ""."""
    counted = Counter[str]()
    for kind in KINDS:
        _, calls = Bench(model, example, kind).run(False)
        counted[kind] = sum(c.on_map() for c in calls)
        if counted["relu"]:
            return "relu"
    kind, count = counted.most_common(1)[0]
    return kind if count else ""


def shake(model: nn.Module) -> nn.Module:
    """Draw every constant scale of `model`, in place, and return it: a scale of zero hides its branch."""
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
    """Replace the last activation of every block, then one site by its name; compare, restore, compare.

    `given` is the example passed to the surgery; `replace` is the surgery to judge.
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
    check = _Check(bench, given, replace)
    try:
        if fine:
            every = len(fine) == len(blocks)
            reasons += check.sites("G*.B*" if every else ",".join(s.label for s in fine), fine)
        if others:
            site = others[len(others) // 2]
            reasons += check.sites(site.name, [site])
    except Wrong as error:
        return verdict._replace(result="wrong", why=str(error))
    refused = not check.done or (blocks and not fine)
    return verdict._replace(result="refused" if refused else "right", why="; ".join(reasons))


class _Check:
    """Replaces sites, compares outputs with those expected, restores, and compares with those before."""

    def __init__(self, bench: Bench, given: Example | None, replace: Callable[..., nn.Module]) -> None:
        self.bench, self.given, self.replace = bench, given, replace
        self.before = [bench.run(training) for training in (False, True)]
        self.classes = [type(m) for m in bench.model.modules()]
        self.keys = [*bench.model.state_dict()]
        self.done = 0

    def sites(self, pattern: str, sites: list[Site]) -> list[str]:
        """Reasons for a refusal, if any. Raises `Wrong`."""
        model = self.bench.model
        chosen = [frozenset(self._expected(s, training) for s in sites) - {-1} for training in (False, True)]
        expected = [self.bench.run(training, chosen[training])[0] for training in (False, True)]
        if any(_same(expected[t], self.before[t][0]) for t in (False, True) if chosen[t]):
            raise Wrong(f"{pattern}: the output does not depend on these calls, so nothing can be compared")
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

    def _expected(self, site: Site, training: bool) -> int:
        """Number of the call at a site; -1 if it is not called in this mode."""
        calls, model = self.before[training][1], self.bench.model
        first_names = {id(m): n for n, m in model.named_modules()}  # of a module with several names
        within, named = first_names[id(site.cut.within)], first_names[id(model.get_submodule(site.name))]

        def is_of(call: Call) -> bool:
            if site.label:  # anywhere in the block
                return within in call.names
            if named != site.name:  # one activation for many places: this is the call from its place
                return call.names[-2:] == (site.name.rpartition(".")[0], named)
            own = call.names[-1] == named  # the activation's module, or the one whose forward calls it
            called_by = call.names[-2:-1] == (named,) and call.classes[-1] in _ACTIVATIONS
            return own or called_by

        return max((i for i, call in enumerate(calls) if call.on_map() and is_of(call)), default=-1)

    def _compare_with_before(self, when: str) -> None:
        model = self.bench.model
        if [type(m) for m in model.modules()] != self.classes or [*model.state_dict()] != self.keys:
            raise Wrong(f"{when}: other classes or keys than before")
        if not all(_same(self.bench.outputs(t), self.before[t][0]) for t in (False, True)):
            raise Wrong(f"{when}: another output than before")


_ACTIVATIONS = {n for n in nn.modules.activation.__all__ if n not in ("MultiheadAttention", "Softmax")}


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bit for bit; NaN equals NaN, so that a network that overflows is compared in its other numbers."""
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(12345), b.nan_to_num(12345))
        for a, b in zip(left, right, strict=True)
    )
