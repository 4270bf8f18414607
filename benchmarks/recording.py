"""Runs a network and records its activation calls; chosen calls may compute another activation."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Example = tuple[Any, ...]


class Call(NamedTuple):
    """One call of an activation: its input's shape, and the names and classes of the modules running."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]

    def on_map(self) -> bool:
        """Whether the input has more than one pixel."""
        return len(self.shape) > 2 and int(np.prod(self.shape[2:])) > 1


def probe(x: Tensor, slope: Tensor | float) -> Tensor:
    """An activation that no network has: a ReLU times `slope`, plus a tenth."""
    return x.clamp_min(0) * slope + 0.1


class Recording(TorchFunctionMode):
    """Records the calls of one kind of activation, and computes the chosen ones as `probe` does."""

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
        return probe(x, 0.5) if len(self.calls) - 1 in self.chosen else func(*args, **kwargs)


@contextmanager
def _recorded(model: nn.Module, recording: Recording) -> Iterator[None]:
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
    """All tensors in the output of a network."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


class Bench:
    """Runs a network on an input in either mode; the network is afterwards as it was."""

    def __init__(self, model: nn.Module, example: Example, kind: str) -> None:
        self.model, self.example, self.kind = model, example, kind

    def run(self, training: bool, chosen: frozenset[int] = frozenset()) -> tuple[list[Tensor], list[Call]]:
        """Outputs and activation calls."""
        recording = Recording(self.kind, chosen)
        with self._restoring(training), torch.no_grad(), _recorded(self.model, recording):
            return tensors(self.model(*self._inputs())), recording.calls

    def outputs(self, training: bool) -> list[Tensor]:
        """Outputs, without hooks and recording."""
        with self._restoring(training), torch.no_grad():
            return tensors(self.model(*self._inputs()))

    def _inputs(self) -> Example:
        copied: Example = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self.example)
        return copied

    @contextmanager
    def _restoring(self, training: bool) -> Iterator[None]:
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
