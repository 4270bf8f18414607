"""Tells whether to call an object is to call an activation."""

import functools
import inspect
import types
from collections.abc import Collection, Iterator
from inspect import getattr_static
from typing import Any

from torch import nn

from sparta_act.surgery.kinds import kind_of, spelled

CONTAINERS = dict, list, tuple, set, frozenset


class Made:
    """A new object: what a class, or a function of somebody's, returns."""

    def __init__(self, by: Any) -> None:
        self.by = by


def is_activation(value: Any, kinds: frozenset[str]) -> bool:
    """Whether to call the object is to call one of these activations."""
    if isinstance(value, Made):
        return isinstance(value.by, type) and _is_class(value.by, kinds)
    if isinstance(value, nn.Module):
        return kind_of(value) in kinds
    if isinstance(value, functools.partial):
        return is_activation(value.func, kinds)
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return kind_of(value.__self__) in kinds
    name = str(getattr(value, "__name__", "")).split(".")[0]  # "relu.default" of torch.ops
    return callable(value) and not isinstance(value, type) and spelled(name) in kinds


def _is_class(cls: type, kinds: frozenset[str]) -> bool:
    return any(spelled(c.__name__) in kinds for c in cls.__mro__)


def leads_to(
    value: Any,
    owner: Any,
    kinds: frozenset[str],
    but: Collection[str] = (),
    ran: Collection[int] = (),
) -> bool:
    """Whether what is called, or what it names, is such an activation, or names one.

    `owner`: whose attributes the names may be. `but`: the keys of children of it that do not count.
    `ran`: the ids of modules that are not looked into, as they have run.
    """
    todo, seen, first = [(value, owner)], dict[tuple[int, int], Any](), owner
    while todo:
        value, owner = todo.pop()
        if (id(value), id(owner)) in seen:
            continue
        seen[id(value), id(owner)] = value, owner  # what is kept keeps its id
        if is_activation(Made(value) if isinstance(value, type) else value, kinds):
            return True
        if isinstance(value, types.FunctionType) and any(
            spelled(n) in kinds for n in names_in(value.__code__)
        ):
            return True
        if id(value) not in ran and value is not first:
            todo += _named_by(value, owner, but if owner is first else ())
    return False


def _named_by(value: Any, owner: Any, but: Collection[str]) -> Iterator[tuple[Any, Any]]:
    """What a call of the value may call, and whose attributes the names in that may be."""
    if isinstance(value, nn.Module):
        if not is_of_torch(type(value)):  # whose own forwards call what is a child
            yield type(value).forward, value
        yield from ((child, value) for child in value.children())
    elif isinstance(value, CONTAINERS):
        yield from ((v, owner) for v in (value.values() if isinstance(value, dict) else value))
    elif isinstance(value, functools.partial):
        yield from ((v, owner) for v in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, types.MethodType):
        yield value.__func__, value.__self__
    elif isinstance(value, types.FunctionType):
        yield inspect.unwrap(value), owner
        if not is_of_torch(value):
            yield from ((v, owner) for v in _values_in(value, owner, but) if v is not None)
    elif isinstance(value, property | functools.cached_property):
        yield (value.fget if isinstance(value, property) else value.func), owner
    elif isinstance(value, staticmethod | classmethod):
        yield value.__func__, owner
    elif isinstance(call := getattr_static(type(value), "__call__", None), types.FunctionType):
        yield call, value


def is_of_torch(value: Any) -> bool:
    """Whether a class or function is of torch."""
    return str(value.__module__).split(".")[0] == "torch"


def _values_in(function: types.FunctionType, owner: Any, but: Collection[str]) -> Iterator[Any]:
    """What the names in a function may be: attributes of the owner, globals, defaults and closures."""
    own = getattr(owner, "__dict__", None)  # an object may make up any other attribute when it is asked
    own = own if isinstance(own, dict) else {}
    children = owner._modules if isinstance(owner, nn.Module) else {}
    for name in names_in(function.__code__):
        if name not in but:
            yield children.get(name)
        yield own.get(name)
        yield getattr_static(type(owner), name, None)
        yield function.__globals__.get(name)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from (c.cell_contents for c in function.__closure__ or () if c != types.CellType())


def names_in(code: types.CodeType) -> set[str]:
    """The names of attributes and globals in a function, and in those inside it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return {*code.co_names}.union(*map(names_in, inner))
