"""Runs a network, and leaves it as it was."""

import copy
import gc
import threading
import types
from collections import UserDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparta_act.errors import SiteError
from sparta_act.surgery.randomness import OwnNumbers, ProcessNumbers
from sparta_act.surgery.rewriting import without_compile
from sparta_act.surgery.snapshot import Snapshot, in_slots, put_back

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]

SEVERAL = list, tuple, set, frozenset, deque
TRIES = 10  # passes in training mode, for blocks that are skipped at random

ONE_AT_A_TIME = threading.RLock()  # looks and edits: two of one network would undo each other

Steps = list[Callable[[], None]]


@contextmanager
def all_or_nothing(note: Callable[[], Steps]) -> Iterator[Steps]:
    """After any exception inside, Ctrl-C included, the steps that `note` returns before are taken."""
    undo = Steps()
    try:
        with ONE_AT_A_TIME:
            undo = note()
            try:
                yield undo
            except BaseException:
                put_back(undo)
                undo = []
                raise
    except BaseException:
        put_back(undo)  # where Ctrl-C came at the very end, or before the first attempt
        raise


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python looks for no cycles: a look makes many small objects that live until its end."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def as_before(model: nn.Module) -> Steps:
    """What puts a model and the random numbers of the process back to what they are now."""
    return [Snapshot(model).restore, ProcessNumbers(model).restore]


@contextmanager
def untouched(model: nn.Module, undo: Steps, numbers: OwnNumbers | None = None) -> Iterator[None]:
    """Inside, the model may be run in any mode; afterwards it and all random numbers are as before.

    `undo`: what `as_before` has returned; the model has not changed since. `numbers`: the mode to run in.
    """
    numbers = numbers or OwnNumbers()
    cached = torch.is_autocast_cache_enabled()
    try:
        try:
            torch.set_autocast_cache_enabled(False)  # each pass casts alike
            for module in model.modules():
                _lay_open(module)
            with torch.inference_mode(False), numbers:
                yield
        finally:
            put_back(undo)
    except BaseException:
        put_back(undo)  # where Ctrl-C came before the first attempt
        raise
    finally:
        torch.set_autocast_cache_enabled(cached)


def _lay_open(module: nn.Module) -> None:
    if isinstance(module, nn.DataParallel):
        module.device_ids = []  # run the module itself, in this thread
    vars(module).pop("_compiled_call_impl", None)  # of module.compile()
    if "_orig_mod" in module._modules:  # of torch.compile(module)
        vars(module)["forward"] = module._modules["_orig_mod"]
    elif forward := without_compile(module):
        vars(module)["forward"] = forward


def call(model: nn.Module, example: Example, training: bool) -> Any:
    """What one forward pass returns; a tuple is several arguments, a mapping is named ones."""
    model.train(training)
    try:
        if isinstance(example, Mapping):
            return model(**example)
        return model(*example) if isinstance(example, tuple) else model(example)
    except Exception as error:
        here = {t.device for t in (*model.parameters(), *model.buffers())}
        there = {t.device for t in tensors_in(example)}
        if isinstance(error, SiteError) or here & there or not here:
            raise
        raise SiteError(
            f"the example is on {_listed(there)} and the network on {_listed(here)}, where it must be too: "
            f"{type(error).__name__}: {error}"
        ) from error


def _listed(devices: set[torch.device]) -> str:
    return " and ".join(sorted(map(str, devices)))


def check_example(example: Example) -> None:
    """Refuse what no pass can be compared on. Raises `SiteError`."""
    what = "example must be a tensor, a tuple of several arguments or a mapping of named ones"
    tensors = [*tensors_in(example)]
    if isinstance(example, Mapping) and not all(isinstance(key, str) for key in example):
        raise SiteError(f"{what}; the keys of this one are no names: for one argument, pass (example,)")
    if not tensors:
        way = "; pass torch.as_tensor(example)" if hasattr(example, "__array__") else ""
        raise SiteError(
            f"{what}, and hold an image; there is no tensor in this {type(example).__name__}{way}"
        )
    if any(t.is_meta for t in tensors):
        raise SiteError("the example is a meta tensor, which has no values; pass one on the network's device")
    if not any(t.numel() for t in tensors):
        raise SiteError("the example is empty, so that nothing can be compared; pass one that holds an image")


def copied(value: Any) -> Any:
    """The same containers and records with copies of the tensors: a pass may change what it is given."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict | UserDict):
        twin: Any = copy.copy(value)
        for key, item in value.items():
            twin[key] = copied(item)
        return twin
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | deque):
        twin = copy.copy(value)
        for i, item in enumerate(value):
            twin[i] = copied(item)
        return twin
    if isinstance(value, tuple):
        return tuple.__new__(type(value), map(copied, value))
    inside = _attributes(value)
    if any(True for _ in tensors_in(inside)):
        value = copy.copy(value)
        for name, item in inside.items():
            object.__setattr__(value, name, copied(item))
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in containers, in the attributes of other objects, and in those within them."""
    todo, seen = [value], dict[int, Any]()  # what has been seen is kept: an id is used once
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen:
            seen[id(value)] = value
            if isinstance(value, Mapping):
                inside = [*value.values()]
            elif isinstance(value, SEVERAL):
                inside = [*value]
            else:
                inside = [*_attributes(value).values()]
            todo += reversed(inside)


def _attributes(value: Any) -> dict[str, Any]:
    """Those of an object that is data: no class, function, module or network."""
    if isinstance(value, type | types.ModuleType | types.FunctionType | nn.Module):
        return {}
    return in_slots(value) | getattr(value, "__dict__", {})


class Like(NamedTuple):
    """A device and a dtype."""

    device: torch.device
    dtype: torch.dtype


def like_of(x: Tensor, module: nn.Module) -> Like:
    """The device and dtype that parameters beside `x` have.

    Under autocast, and for numbers that are no floats, it is the dtype of the parameters of the module.
    """
    if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
        return Like(x.device, x.dtype)
    own = (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return Like(x.device, next(own, x).dtype)
