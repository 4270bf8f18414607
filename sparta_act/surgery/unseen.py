"""Finds what a network may call in passes unlike those on the example, which `"all"` would not reach."""

import ast
import inspect
import types
from collections.abc import Collection, Iterator

from torch import nn

from sparta_act.surgery.activating import is_activation, is_of_torch, names_in
from sparta_act.surgery.branches import Forward, Forwards, functions_of, theirs
from sparta_act.surgery.flow import raises, uses
from sparta_act.surgery.kinds import spelled
from sparta_act.surgery.rewriting import forward_of, unwrapped


def unseen_calls(
    forwards: Forwards, owner: nn.Module, replaced: Collection[str], shared: Collection[int]
) -> Iterator[tuple[int, str]]:
    """Line and function of each call of an activation that no pass ran, and of modules with one in them.

    `replaced`: the keys of the children that will be other modules. `shared`: the ids of modules that are at
    several places. Without source, there is none.
    """
    if not forwards.has_run(owner) or not (forward := forwards.of(owner)):
        return
    if not is_of_torch(forward_of(type(owner))):
        yield from _unseen_in(forward, forwards.kinds, replaced, shared)
    for helper in _helpers(owner, forward):
        if not forward.ran_in(helper):
            names = names_in(helper.__code__)
            named = {name for name in names if spelled(name) in forwards.kinds} - {*replaced}
            if named or any(forward.waits(owner._modules.get(name)) for name in names):
                yield helper.__code__.co_firstlineno, helper.__qualname__
        elif its_calls := forward.helper(helper):
            yield from _unseen_in(its_calls, forwards.kinds, replaced, shared)


def _unseen_in(
    forward: Forward, kinds: frozenset[str], replaced: Collection[str], shared: Collection[int]
) -> Iterator[tuple[int, str]]:
    for call, place in forward.unseen(replaced):
        if not raises(forward.source, place) and not _calls_what_ran(forward, call, kinds):
            yield call.lineno, forward.where
    for call in forward.calls:
        if call in forward.source.inner or call in forward.source.reached:
            waits = any(forward.waits(v, shared) for v in forward.names.of(call.func))
            if waits and not all(raises(forward.source, place) for place in uses(forward.source, call)):
                yield call.lineno, forward.where


def _calls_what_ran(forward: Forward, call: ast.expr, kinds: frozenset[str]) -> bool:
    """Whether it is a call of functions that ran from elsewhere: what they call is found where it ran."""
    values = forward.names.of(call.func) if isinstance(call, ast.Call) else []
    return bool(values) and all(id(v) in forward.led_to and not is_activation(v, kinds) for v in values)


def _helpers(owner: nn.Module, forward: Forward) -> list[types.FunctionType]:
    """The methods of a module and functions of their files that ran or that its forward names, and so on."""
    first = forward_of(type(owner))
    todo, found = [first, *filter(forward.ran_in, functions_of(type(owner)))], list[types.FunctionType]()
    while todo:
        function = todo.pop()
        if not isinstance(function, types.FunctionType) or function in found or is_of_torch(function):
            continue
        found.append(function)
        ran = forward.helper(function) if forward.ran_in(function) else None
        if its_own := forward if function is first else ran:  # what it led to, in whatever file
            led_to = (theirs(v) for call in its_own.led for v in its_own.names.of(call.func))
            todo += filter(forward.ran_in, led_to)  # what ran for another module is found there
        for name in names_in(function.__code__):
            method = inspect.getattr_static(type(owner), name, None)
            method = method.__func__ if isinstance(method, staticmethod | classmethod) else method
            beside = function.__globals__.get(name)
            functions = [unwrapped(f) for f in (method, beside) if isinstance(f, types.FunctionType)]
            file = function.__code__.co_filename
            todo += [f for f in functions if f.__code__.co_filename == file or f is unwrapped(method)]
    return [function for function in found if function is not first]
