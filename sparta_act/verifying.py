"""Checks a changed network by running it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparta_act.errors import SiteError
from sparta_act.sites import Site
from sparta_act.trial import TRIES, Example, run, untouched


def verify(model: nn.Module, sites: list[Site], new: list[nn.Module], example: Example) -> None:
    """In each mode every new module must run once, and the block around it must use what it returns."""
    with untouched(model), torch.enable_grad():
        probes = [_Probe(site, module) for site, module in zip(sites, new, strict=True)]
        for training in (False, True):
            waiting = [p for p in probes if training in p.site.cut.modes]
            for _ in range(TRIES if training else 1):
                for probe in probes:
                    probe.calls = 0
                try:
                    run(model, example, training)
                except SiteError:
                    raise
                except Exception as error:
                    raise SiteError(
                        f"with the new activations the network fails: {error}. Nothing was changed."
                    ) from error
                wrong = [f"{p.site}: {p.calls} times" for p in probes if p.calls > 1]
                waiting = [p for p in waiting if p.calls == 0]
                if wrong or not waiting:
                    break
            wrong += [f"{p.site}: never" for p in waiting]
            if wrong:
                mode = "training" if training else "evaluation"
                raise SiteError(
                    f"new activations must run once in {mode} mode, but ran: {', '.join(wrong)}. "
                    "Nothing was changed."
                )


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
            raise SiteError(
                f"{self.site}: an activation must keep the shape {wanted}, got {shape}. Nothing was changed."
            )
        if not torch.is_grad_enabled():  # the network forbids it: whether the output counts stays open
            return None
        self.marker = output.new_zeros(()).requires_grad_()
        traced: Tensor = output + self.marker  # the same numbers
        return traced

    def after_block(self, block: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        marker, self.marker = self.marker, None
        if marker is not None and tensors and not _depends(tensors, marker):
            raise SiteError(
                f"{self.site}: the block does not use what its ReLU returns. Nothing was changed."
            )


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
