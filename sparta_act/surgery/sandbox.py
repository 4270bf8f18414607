"""Runs a network, and leaves it as it was."""

import copy
import dataclasses
import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparta_act.surgery.rewriting import without_compile

Example = Tensor | tuple[Any, ...] | dict[str, Any]

TRIES = 10  # passes in training mode, for blocks that are skipped at random


class Snapshot:
    """Everything that a forward pass, or our own edit, can change in a model."""

    def __init__(self, model: nn.Module) -> None:
        modules, parameters = [*model.modules()], [*model.parameters()]
        self._modules = [(m, type(m), dict(vars(m)), _shallow(vars(m))) for m in modules]
        plain = [t for m in modules for t in vars(m).values() if isinstance(t, Tensor)]
        grads = [p.grad for p in parameters if p.grad is not None]
        self._values = [(t, t.detach().clone()) for t in (*parameters, *grads, *model.buffers(), *plain)]
        self._grads = [(p, p.grad, p.requires_grad) for p in parameters]

    def restore(self) -> None:
        """Put everything back, in place; Ctrl-C waits until it is done."""
        try:
            self._restore()
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        for module, cls, attributes, contents in self._modules:
            if type(module) is not cls:
                module.__class__ = cls
            own = vars(module)
            own.update(attributes)
            for name in own.keys() - attributes.keys():
                del own[name]
            for name, content in contents.items():
                container = attributes[name]
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
        for tensor, value in self._values:
            _put_back(tensor, value)
        for parameter, grad, required in self._grads:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
            if parameter.grad is not grad:
                parameter.grad = grad


def _put_back(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape != value.shape:
        tensor.data = value
    elif tensor.layout is not torch.strided or not torch.equal(tensor, value):
        tensor.data.copy_(value)


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    return {k: copy.copy(v) for k, v in attributes.items() if type(v) in (dict, OrderedDict, list, set)}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, the model may be run in any mode; afterwards it and all random numbers are as before."""
    # numpy's and Python's too: some networks draw from them in training
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    snapshot = Snapshot(model)
    with torch.random.fork_rng(devices=_gpus(model)), torch.inference_mode(False):
        try:
            for module in model.modules():
                _lay_open(module)
            yield
        finally:
            snapshot.restore()
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _lay_open(module: nn.Module) -> None:
    if isinstance(module, nn.DataParallel):
        module.device_ids = []  # run the module itself, in this thread
    vars(module).pop("_compiled_call_impl", None)  # of module.compile()
    if "_orig_mod" in module._modules:  # of torch.compile(module)
        vars(module)["forward"] = module._modules["_orig_mod"]
    elif forward := without_compile(module):
        vars(module)["forward"] = forward


def _gpus(model: nn.Module) -> set[int]:
    return {t.device.index for t in (*model.parameters(), *model.buffers()) if t.is_cuda}


def random_numbers(model: nn.Module) -> list[Any]:
    """The states of all random number generators that a pass may use."""
    numpy = np.random.get_state()  # noqa: NPY002
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in sorted(_gpus(model)))]
    return [random.getstate(), str(numpy), *(state.tolist() for state in states)]


def run(model: nn.Module, example: Example, training: bool) -> list[Tensor]:
    """All tensors that one forward pass on a copy of the example returns."""
    copied = tree_map(lambda i: i.detach().clone() if isinstance(i, Tensor) else i, example)
    model.train(training)
    if isinstance(copied, dict):
        return [*tensors_in(model(**copied))]
    return [*tensors_in(model(*copied) if isinstance(copied, tuple) else model(copied))]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples, dicts and dataclasses, and in those within them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in([*value.values()])
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value):
        yield from tensors_in([getattr(value, f.name) for f in dataclasses.fields(value)])
