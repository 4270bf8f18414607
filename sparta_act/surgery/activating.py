"""Tells whether to call an object is to call an activation."""

import functools
import inspect
import types
from typing import Any

from torch import nn

from sparta_act.surgery.kinds import kind_of, spelled


class Made:
    """A new module of a class."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls


def is_activation(value: Any, kinds: frozenset[str]) -> bool:
    """Whether to call the object is to call one of these activations."""
    if isinstance(value, Made):
        return any(spelled(c.__name__) in kinds for c in value.cls.__mro__)
    if isinstance(value, nn.Module):
        return kind_of(value) in kinds
    if isinstance(value, functools.partial):
        return is_activation(value.func, kinds)
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return kind_of(value.__self__) in kinds
    name = str(getattr(value, "__name__", "")).split(".")[0]  # "relu.default" of torch.ops
    return callable(value) and not isinstance(value, type) and spelled(name) in kinds


def mentions(function: Any, owner: nn.Module | None, kinds: frozenset[str], but: str = "") -> bool:
    """Whether a function, or one that it names, names such an activation or such a child of `owner`.

    `but`: the key of a child that does not count.
    """
    todo, seen = [function], list[Any]()
    children = owner._modules if owner is not None else {}
    while todo:
        function = inspect.unwrap(todo.pop())
        if function in seen or not isinstance(function, types.FunctionType):
            continue
        seen.append(function)
        names = _named_in(function.__code__)
        for name in names:
            child = children.get(name) if name != but else None
            if (name.islower() and spelled(name) in kinds) or (child is not None and kind_of(child) in kinds):
                return True
        if function.__module__.split(".")[0] != "torch":
            todo += [inspect.getattr_static(type(owner), name, None) for name in names]
            todo += [function.__globals__.get(name) for name in names]
    return False


def _named_in(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return {*code.co_names}.union(*map(_named_in, inner))


def holds(module: nn.Module, kinds: frozenset[str]) -> bool:
    """Whether a module has such an activation in it, by its children or by the name in its forward."""
    return any(kind_of(m) in kinds or mentions(type(m).forward, m, kinds) for m in module.modules())
