"""Checks a changed network by running it."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from sparta_act.errors import SiteError
from sparta_act.surgery.recording import Pass, inner
from sparta_act.surgery.sandbox import TRIES, Example, Steps, call, copied, tensors_in, untouched
from sparta_act.surgery.sites import Site
from sparta_act.surgery.watching import Stand, Watch, keeper, version

FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def verify(
    model: nn.Module, sites: list[Site], new: list[nn.Module], example: Example, undo: Steps
) -> set[nn.Module]:
    """In each mode every new module must run once, and the block around it must use what it returns.

    Returns the new modules that change their input.
    """
    with untouched(model, undo), torch.enable_grad():
        probes = [_Probe(site, module) for site, module in zip(sites, new, strict=True)]
        for training in (False, True):
            waiting = [p for p in probes if training in p.site.cut.original]
            for _ in range(TRIES if training else 1):
                for probe in probes:
                    probe.calls = 0
                try:
                    call(model, copied(example), training)
                except SiteError:
                    raise
                except Exception as error:
                    raise SiteError(
                        f"with the new activations the network fails: {type(error).__name__}: {error}"
                    ) from error
                wrong = [f"{p.site}: {p.calls} times" for p in probes if p.calls > 1]
                waiting = [p for p in waiting if p.calls == 0]
                if wrong or not waiting:
                    break
            wrong += [f"{p.site}: never" for p in waiting]
            if wrong:
                mode = "training" if training else "evaluation"
                raise SiteError(f"new activations must run once in {mode} mode, but ran: {', '.join(wrong)}")
        return {p.module for p in probes if p.in_place}


def compare(
    model: nn.Module,
    sites: list[Site],
    new: list[nn.Module],
    example: Example,
    undo: Steps,
    expected: list[Pass],
    in_place: set[nn.Module],
) -> None:
    """With the original functions at the new modules, the network must do and return what it did before.

    And nobody may see the input of a function that changes it, an original or a new one, after the call.
    """
    for before in expected:
        training = before.training
        here = [(s, m) for s, m in zip(sites, new, strict=True) if training in s.cut.original]
        original = [Stand(s, m, s.cut.original[training], False) for s, m in here]
        actual = _answer(model, example, training, undo, original)
        differs = not _alike(actual, before)
        if differs and _alike(actual, _answer(model, example, training, undo, original)):  # else it is chance
            raise SiteError(
                "with the original activations at the sites, the changed network would not return what it "
                "did: a forward asks for its own class or modules, or a ReLU of a class of its own does more "
                "than torch's; rewrite it or choose other sites"
            )
        if changing := [Stand(s, m, inner(m).forward, True) for s, m in here if m in in_place]:
            _answer(model, example, training, undo, changing)


def _answer(model: nn.Module, example: Example, training: bool, undo: Steps, stands: list[Stand]) -> Pass:
    watch = Watch()
    with untouched(model, undo, watch), torch.no_grad():  # with the same random numbers each time
        for stand in stands:
            for hooks in FORWARD_HOOKS:
                vars(stand.module)[hooks] = OrderedDict()
            vars(stand.module)["forward"] = watch.of(stand)
        given = copied(example)
        watch.on = True
        returned = call(model, given, training)
        watch.on = False
        if watch.used:
            raise SiteError(
                f"{watch.used.site}: a forward uses what an in-place activation has changed, through another "
                f"name or a view, and would read other numbers; {_way_out(watch.used)}"
            )
        if kept := watch.kept():
            stand, tensor = kept
            who = keeper(model, tensor, given, returned)
            raise SiteError(
                f"{stand.site}: its in-place activation changes a tensor that {who} keeps, which would hold "
                f"other numbers; keep a copy (x.clone()), or {_way_out(stand)}"
            )
        return Pass(training, returned=[*tensors_in(returned)], calls=watch.calls)


def _way_out(stand: Stand) -> str:
    if stand.is_new:
        return "make the new activation with inplace=False"
    return "make that ReLU one that is not in place, nn.ReLU() or F.relu(x)"


def _alike(left: Pass, right: Pass) -> bool:
    return (
        left.calls == right.calls
        and len(left.returned) == len(right.returned)
        and all(_close(a, b) for a, b in zip(left.returned, right.returned, strict=True))
    )


def _close(a: Tensor, b: Tensor) -> bool:
    if a.layout is not torch.strided or a.is_quantized or a.is_meta or a.is_nested:  # nothing to compare
        return a.layout == b.layout
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_complex():
        a, b = a.detach().double(), b.detach().double()
    scale = a.abs().nan_to_num().max().item() if a.numel() else 0
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5 * scale, equal_nan=True)


class _Probe:
    """Watches a new module and the block around it during `verify`."""

    def __init__(self, site: Site, module: nn.Module) -> None:
        self.site, self.module = site, module
        self.calls = 0
        self.in_place = False  # whether it changes its input
        self.version: int | None = None
        self.marker: Tensor | None = None
        self.before = set[object]()  # nodes of the graph that leads to the block
        site.cut.within.register_forward_pre_hook(self.before_block, with_kwargs=True)
        module.register_forward_pre_hook(self.before_module)
        module.register_forward_hook(self.after_module)
        site.cut.within.register_forward_hook(self.after_block)

    def before_block(self, block: nn.Module, inputs: Any, named: Any) -> None:
        self.before = {t.grad_fn for t in tensors_in([inputs, named])}

    def before_module(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.version = version(inputs[0])

    def after_module(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Tensor | None:
        self.calls += 1
        self.in_place |= output is inputs[0] or version(inputs[0]) != self.version
        wanted, shape = tuple(inputs[0].shape), tuple(getattr(output, "shape", ()))
        if shape != wanted:
            raise SiteError(f"{self.site}: an activation must keep the shape {wanted}, not return {shape}")
        if not torch.is_grad_enabled():  # the network forbids it: whether the output is used stays open
            return None
        self.marker = output.new_zeros(()).requires_grad_()
        traced: Tensor = output + self.marker  # the same numbers
        return traced

    def after_block(self, block: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [*tensors_in(output)]
        marker, self.marker = self.marker, None
        if marker is not None and tensors and not _depends(tensors, marker, self.before):
            raise SiteError(f"{self.site}: the block does not use what its ReLU returns")


def _depends(outputs: list[Tensor], marker: Tensor, before: set[object]) -> bool:
    """Whether the outputs come from the marker; `before`: nodes that cannot, as they are older."""
    todo, seen = [t.grad_fn for t in outputs], {*before}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is marker:
            return True
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
    return False
