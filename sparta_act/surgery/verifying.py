"""Checks a changed network by running it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparta_act.errors import SiteError
from sparta_act.surgery.sandbox import TRIES, Example, run, tensors_in, untouched
from sparta_act.surgery.sites import Site


def verify(model: nn.Module, sites: list[Site], new: list[nn.Module], example: Example) -> None:
    """In each mode every new module must run once, and the block around it must use what it returns."""
    with untouched(model), torch.enable_grad():
        probes = [_Probe(site, module) for site, module in zip(sites, new, strict=True)]
        for training in (False, True):
            waiting = [p for p in probes if training in p.site.cut.original]
            for _ in range(TRIES if training else 1):
                for probe in probes:
                    probe.calls = 0
                try:
                    run(model, example, training)
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


def answers(model: nn.Module, example: Example) -> dict[bool, list[Tensor]]:
    """What the network returns, by training mode; modes whose passes differ are left out."""
    twice = {t: [_answer(model, example, t) for _ in range(2)] for t in (False, True)}
    return {training: first for training, (first, second) in twice.items() if _alike(first, second)}


def compare(
    model: nn.Module,
    sites: list[Site],
    new: list[nn.Module],
    example: Example,
    expected: dict[bool, list[Tensor]],
) -> None:
    """With the original functions at the new modules, the network must return what it returned before.

    And nothing may use their input afterwards: an in-place ReLU would have changed it.
    """
    same = True
    for training in (False, True):
        watch = _Watch()
        with untouched(model), watch:
            for site, module in zip(sites, new, strict=True):
                if training in site.cut.original:
                    vars(module)["forward"] = watch.of(site.cut.original[training])
            actual = _answer(model, example, training)
        same &= not watch.used and (training not in expected or _alike(actual, expected[training]))
    if not same:
        raise SiteError(
            "with the original activations at the sites, the changed network would not return what it did: a "
            "forward uses what an in-place activation has changed, or asks for its own class; rewrite that "
            "forward or choose other sites"
        )


class _Watch(TorchFunctionMode):
    """Sees whether the input of an in-place function is used after it."""

    def __init__(self) -> None:
        super().__init__()
        self.used = False
        self._changed: list[Tensor] = []

    def of(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function on a copy of its input, which is watched from then on if it would have changed."""

        def forward(x: Tensor) -> Tensor:
            twin = x.clone()
            version = twin._version
            y = function(twin)
            if twin._version != version:
                self._changed.append(x)
            return y

        return forward

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._changed and any(True for _ in tensors_in(result)):  # more than its shape was read
            given = {_place(t) for t in tensors_in([args, kwargs or {}])}
            self.used |= any(_place(t) in given for t in self._changed)
        return result


def _place(tensor: Tensor) -> int:
    """Where its numbers begin, so that its views count too."""
    return tensor.data_ptr() if tensor.layout is torch.strided and tensor.numel() else id(tensor)


def _answer(model: nn.Module, example: Example, training: bool) -> list[Tensor]:
    with untouched(model), torch.no_grad():  # with the same random numbers each time
        return run(model, example, training)


def _alike(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.shape == b.shape and _close(a, b) for a, b in zip(left, right, strict=True)
    )


def _close(a: Tensor, b: Tensor) -> bool:
    if a.layout is not torch.strided or a.is_quantized or a.is_meta or not a.numel():  # nothing to compare
        return True
    a, b = a.detach().double() if not a.is_complex() else a, b.detach().double() if not b.is_complex() else b
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5 * a.abs().nan_to_num().max().item(), equal_nan=True)


class _Probe:
    """Watches a new module and the block around it during `verify`."""

    def __init__(self, site: Site, module: nn.Module) -> None:
        self.site = site
        self.calls = 0
        self.marker: Tensor | None = None
        module.register_forward_hook(self.after_module)
        site.cut.within.register_forward_hook(self.after_block)

    def after_module(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Tensor | None:
        self.calls += 1
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
        if marker is not None and tensors and not _depends(tensors, marker):
            raise SiteError(f"{self.site}: the block does not use what its ReLU returns")


def _depends(outputs: list[Tensor], marker: Tensor) -> bool:
    todo, seen = [t.grad_fn for t in outputs], set[object]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is marker:
            return True
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
    return False
