"""Finds activation calls in the source of a forward that no pass has run, and that may come last."""

import ast
import functools
import inspect
import types
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import combinations, zip_longest
from typing import Any

from torch import nn

from sparta_act.errors import SiteError
from sparta_act.surgery.activating import Made, is_activation, is_of_torch, leads_to
from sparta_act.surgery.callees import Names
from sparta_act.surgery.flow import above, always_before, excludes, raises, uses
from sparta_act.surgery.kinds import in_words, spelled
from sparta_act.surgery.recording import OF_TORCH, Event, Frame, Pass
from sparta_act.surgery.rewriting import forward_of, unwrapped
from sparta_act.surgery.sources import read


class Forward:
    """The forward of a module, or another function that ran for it, and what it has called: these events.

    Raises `SiteError` without source.
    """

    def __init__(
        self,
        owner: nn.Module,
        function: Any,
        inside: list[Event],
        kinds: frozenset[str],
        ran: Collection[int],
    ) -> None:
        self.source, code = read(function), function.__code__
        self.where = function.__qualname__
        self.names, self._owner = Names(owner, function, self.source), owner
        self._kinds, self._ran_modules, self._inside = kinds, ran, inside
        self._helpers: dict[Any, Forward | None] = {function: None}  # one that calls itself is read once
        self._known: dict[tuple[Any, frozenset[str]], bool] = {}  # answers of `_goes_on`
        alike = [e for e in inside if e.kind in (*kinds, "replaced")]
        self._around = {id(m) for e in alike for m in e.modules}
        frames = [[f for f in e.frames if f.module == id(owner)] for e in alike]
        self._codes = {f.code for its_frames in frames for f in its_frames}  # of what ran for it
        direct = [e.frames[0] for e in alike if e.modules[-1] is owner and e.frames]
        self._ran = {call for f in direct if f.code is code for call in self.at({f.at})}
        others = (f for f in direct if f.code is not code and f.code.co_filename == code.co_filename)
        self._lines = {*map(_line, others)}  # of inner functions
        self.led = {*self.at({f.at for its_frames in frames for f in its_frames if f.code is code})}
        self.calls = self.source.in_order
        self._seen = {self.calls[call] for call in self._ran}

    def at(self, offsets: set[int]) -> list[ast.Call]:
        """The calls at these instructions; -1 is in another function."""
        return [call for o in offsets if o >= 0 and (call := self.source.at(o))]

    def of(self, child: nn.Module) -> list[ast.Call]:
        """The calls of a child, and of what it is in."""
        return [
            call
            for call in self.calls
            for value in self.names.of(call.func)
            if isinstance(value, nn.Module) and any(m is child for m in value.modules())
        ]

    def unseen(self, replaced: Collection[str] = ()) -> Iterator[tuple[ast.expr, ast.AST]]:
        """The calls of an activation that no pass ran, and where each may run; and mentions of one.

        Without those of the children of these keys, which will be other modules.
        """
        for call, place in self._unseen(replaced):
            callee = call.func if isinstance(call, ast.Call) else call
            if not (replaced and self.is_only(callee, replaced)):
                yield call, place

    def _unseen(self, replaced: Collection[str]) -> Iterator[tuple[ast.expr, ast.AST]]:
        for node in self.mentions(replaced):
            for place in uses(self.source, node):
                yield node, place
        for call in self.calls:
            inner = call in self.source.inner
            if (inner or call in self.source.reached) and self._activates(call, replaced):
                ran = inner and any(call.lineno <= line <= (call.end_lineno or 0) for line in self._lines)
                for place in uses(self.source, call):
                    if not ran or isinstance(place, ast.Name):  # which may be a second use
                        yield call, place

    def mentions(self, replaced: Collection[str] = ()) -> Iterator[ast.expr]:
        """The expressions that are an activation and not called there: given to a function, in a table."""
        for node in self.source.given_away:
            argument = isinstance(self.source.parents[node], ast.Call | ast.keyword | ast.Starred)
            found = self._but_for(replaced, self.names.of(node))
            values = [v for v in found if not isinstance(v, Made) or isinstance(v.by, type)]
            if any(self._is_one(v) or (argument and self.waits(v)) for v in values):
                yield node

    def _activates(self, call: ast.Call, replaced: Collection[str]) -> bool:
        """Whether the call may be one of an activation that did not run."""
        values = self.names.of(call.func)
        if call in self._ran:  # of one among several
            return any(is_activation(v, self._kinds) and self._did_not_run(v) for v in values)
        if any(self._goes_on(v, replaced) for v in values):
            return True
        found = self._but_for(replaced, values) + self.names.results(call.func)
        led = call in self.led
        if any(is_activation(v, self._kinds) and not (led and self._has_run(v)) for v in found):
            return True
        again = () if self._same_led else self.led_to  # what alone led ends alike at another call
        if not led and any(self._is_one(v) or (id(v) in again and self._may_lead(v)) for v in found):
            return True
        if self.calls[call] in self._seen and not any(is_activation(v, self._kinds) for v in values):
            return True
        function: Any = call.func
        if isinstance(function, ast.Attribute) and function.attr == "default":  # torch.ops.aten.relu.default
            function = function.value
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        unknown = not values and not self._is_none(call.func)
        return unknown and name.islower() and spelled(name) in self._kinds

    def _is_none(self, node: ast.expr) -> bool:
        """Whether it is an attribute of the module that is None, as of a block without a ReLU."""
        if not isinstance(node, ast.Attribute) or self.names.of(node.value) != [self._owner]:
            return False
        held = {**vars(self._owner), **self._owner._modules}
        return held.get(node.attr, self) is None

    @cached_property
    def _same_led(self) -> bool:
        """Whether all calls that led to an activation are of the same things."""
        return len({frozenset(id(v) for v in self.names.of(call.func)) for call in self.led}) == 1

    @cached_property
    def led_to(self) -> set[int]:
        """The ids of what the calls may stand for that led to an activation."""
        return {id(v) for call in self.led for v in self.names.of(call.func)}

    def _is_one(self, value: Any) -> bool:
        """Whether it is such an activation, or a function of somebody's with one in it that did not run."""
        if isinstance(value, nn.Module):
            return is_activation(value, self._kinds)
        waits = not self._has_run(value)
        return is_activation(value, self._kinds) or (waits and self._may_lead(value, self._ran_modules))

    def _has_run(self, value: Any) -> bool:
        """Whether an activation was called inside it: a function, or a module with a forward of its own."""
        return self.ran_in(theirs(value)) or id(value) in self._around

    def _but_for(self, replaced: Collection[str], values: list[Any]) -> list[Any]:
        children = [self._owner._modules[key] for key in replaced]
        return [v for v in values if not any(v is child for child in children)]

    def _did_not_run(self, value: Any) -> bool:
        return isinstance(value, nn.Module) and id(value) not in self._ran_modules

    def ran_in(self, function: Any) -> bool:
        """Whether a pass called an activation in this function."""
        return getattr(function, "__code__", None) in self._codes

    def _goes_on(self, value: Any, replaced: Collection[str]) -> bool:
        """Whether it is a function that ran, in which an activation that did not run may be the last."""
        function = theirs(value)
        if not self.ran_in(function) or not (helper := self.helper(function)):
            return False
        asked = function, frozenset(replaced)
        if asked not in self._known:
            self._known[asked] = False  # while it is asked: it may call itself
            found = (helper.may_be_last(place, [*helper.led]) for _, place in helper.unseen(replaced))
            self._known[asked] = any(found)
        return self._known[asked]

    def helper(self, function: Any) -> "Forward | None":
        """A function that this one calls; None without source."""
        if function not in self._helpers:
            self._helpers[function] = None
            with suppress(SiteError):
                helper = Forward(self._owner, function, self._inside, self._kinds, self._ran_modules)
                helper._helpers, helper._known = self._helpers, self._known
                self._helpers[function] = helper
        return self._helpers[function]

    def _may_lead(self, value: Any, ran: Collection[int] = (), but: Collection[str] = ()) -> bool:
        """Whether it is a function of somebody's, or made by one, with an activation in it."""
        value = value.by if isinstance(value, Made) else value
        return theirs(value) is not None and leads_to(value, self._owner, self._kinds, but, ran)

    def waits(self, value: Any, shared: Collection[int] = ()) -> bool:
        """Whether it is a module with an activation in it that did not run, and no activation itself.

        `shared`: the ids of modules that are at several places, and may be replaced at another one alone.
        """
        if not isinstance(value, nn.Module) or value is self._owner or is_activation(value, self._kinds):
            return False
        if any(id(m) in self._ran_modules for m in value.modules()):
            chain = forward_of(type(value)) is nn.Sequential.forward and id(value) not in self._ran_modules
            return chain and any(id(m) in shared and is_activation(m, self._kinds) for m in value.modules())
        return leads_to(value, self._owner, self._kinds)

    def is_only(self, callee: ast.AST, keys: Collection[str]) -> bool:
        """Whether it is a child of these keys, or functions of somebody's with no other activation."""
        values, children = self.names.of(callee), [self._owner._modules[key] for key in keys]

        def leads_to_one(value: Any) -> bool:
            return self._may_lead(value) and not self._may_lead(value, but=keys)

        return bool(values) and all(any(v is c for c in children) or leads_to_one(v) for v in values)

    def may_be_last(self, place: ast.AST, final: list[ast.Call]) -> bool:
        """Whether a pass may run what is at this place, and none of the final calls after it."""
        lifted = [self._lifted(place, call) for call in final]
        return not raises(self.source, place) and not always_before(self.source, place, lifted)

    def _lifted(self, place: ast.AST, call: ast.AST) -> ast.AST:
        """The loop over modules that a call is in, and the place is not: it has run."""
        loops = [n for n in above(self.source, call) if isinstance(n, ast.For)]
        outside = [n for n in loops if n not in {*above(self.source, place)}]
        return outside[-1] if outside else call


class Forwards:
    """The forwards of the modules, each read once; `skipped`: those whose calls are not recorded."""

    def __init__(self, passes: list[Pass], kinds: frozenset[str], skipped: list[nn.Module]) -> None:
        self._passes, self.kinds, self._skipped = passes, kinds, skipped
        self._read: dict[nn.Module, Forward | None] = {}

    def of(self, module: nn.Module) -> Forward | None:
        """The forward of a module; None without source."""
        if module not in self._read:
            function, inside = forward_of(type(module)), self._inside(module)
            try:
                self._read[module] = Forward(module, function, inside, self.kinds, self.ran)
            except SiteError:
                self._read[module] = None
        return self._read[module]

    def entries(self, module: nn.Module) -> Iterator[Forward]:
        """Its other functions that ran without its forward around them: called by others, or `__call__`."""
        inside = self._inside(module)
        outermost = {
            next((f.code for f in reversed(e.frames) if f.module == id(module)), None) for e in inside
        }
        for function in _layers_of(type(module)):
            if function.__code__ in outermost and function is not forward_of(type(module)):
                with suppress(SiteError):
                    yield Forward(module, function, inside, self.kinds, self.ran)

    def _inside(self, module: nn.Module) -> list[Event]:
        return [p.events[i] for p in self._passes for i in p.inside.get(id(module), ())]

    def has_run(self, module: nn.Module) -> bool:
        """Whether some pass ran it, as far as it made a call that is recorded."""
        return any(id(module) in p.inside for p in self._passes)

    @cached_property
    def ran(self) -> set[int]:
        """The ids of the modules that some pass ran, as far as it made a call that is recorded."""
        acts = {id(e.act) for p in self._passes for e in p.events}
        return acts.union(*(p.inside for p in self._passes), map(id, self._skipped))


def check_all_seen(forwards: Forwards, owner: nn.Module, last: set[int], replaced: str) -> None:
    """Refuse when the forward of `owner` has a call of these kinds that may be the last, and never ran.

    `last`: offsets in the bytecode, of the last calls. `replaced`: the key of the child that will be another
    module, wherever it is called. Raises `SiteError`.
    """
    if forward := forwards.of(owner):  # where there is nothing to be read, for a swap nothing need be
        _check(forward, forward.at(last), forwards.kinds, replaced)
    for forward in forwards.entries(owner):
        _check(forward, [*forward.led], forwards.kinds, replaced)


def _check(forward: Forward, final: list[ast.Call], kinds: frozenset[str], replaced: str = "") -> None:
    for call, place in forward.unseen([replaced] if replaced else []):
        if forward.may_be_last(place, final):
            raise SiteError(
                f"line {call.lineno} ({forward.where}) calls {in_words(kinds)} too, which may be the last "
                "call in a pass unlike those on the example, and would not be replaced; let all ways end in "
                "one call, or call one nn.ReLU of the module's own, self.relu(x), in each"
            )


def runs_once(forwards: Forwards, owner: nn.Module, key: str, last: set[int]) -> bool:
    """Whether no pass calls this child, or gives it away, at two places of the forward of `owner`."""
    if (forward := forwards.of(owner)) is None:
        return True
    named: list[tuple[ast.expr, ast.expr]] = [(call, call.func) for call in forward.calls]
    named += [(m, m) for m in forward.mentions()]
    its_own = [node for node, callee in named if forward.is_only(callee, [key])]
    if its_own and not {*forward.at(last)} <= {*its_own}:  # it has run by another name
        return False
    places = [place for node in its_own for place in uses(forward.source, node)]
    return all(excludes(forward.source, a, b) for a, b in combinations(places, 2))


def check_block(forwards: Forwards, seen: Event, within: nn.Module, replaced: str) -> None:
    """Refuse when something else in a block may come last: a call around the last one, or a module.

    `seen`: the last call. `within`: the block. `replaced`: as in `check_all_seen`. Raises `SiteError`.
    """
    chain, kinds = [*seen.modules[[m is within for m in seen.modules].index(True) :]], forwards.kinds
    for module, child in zip_longest(chain, chain[1:]):
        for entry in forwards.entries(module) if child is not None else ():
            _check(entry, [*entry.led], kinds)
        if (forward := forwards.of(module)) is None:
            continue
        final = forward.of(child) if child is not None else forward.at({seen.offset})
        if child is not None:
            _check(forward, final, kinds)
        elif replaced:
            final += [call for call in forward.calls if forward.is_only(call.func, [replaced])]
        for call in forward.calls if final else ():
            if call in forward.led or call in final:
                continue
            modules = [v for v in forward.names.of(call.func) if isinstance(v, nn.Module)]
            if any(
                id(m) in forwards.ran for v in modules if id(v) not in forward.led_to for m in v.modules()
            ):
                continue
            holding = any(not is_activation(v, kinds) and leads_to(v, None, kinds) for v in modules)
            places = uses(forward.source, call) if holding else ()
            if any(forward.may_be_last(place, final) for place in places):
                raise SiteError(
                    f"line {call.lineno} ({forward.where}) calls a module with {in_words(kinds)} in it, "
                    "which no pass on the example runs and which may come last; pass an example= that runs "
                    "it, or name the call to replace by the dotted name of its module"
                )


def functions_of(cls: type[nn.Module]) -> Iterator[types.FunctionType]:
    """The functions of somebody's in a class and its bases, below their decorators."""
    for value in (v for c in cls.__mro__ if not is_of_torch(c) for v in vars(c).values()):
        function = unwrapped(value.__func__ if isinstance(value, staticmethod | classmethod) else value)
        if isinstance(function, types.FunctionType) and not is_of_torch(function):
            yield function


def _layers_of(cls: type[nn.Module]) -> Iterator[types.FunctionType]:
    """The same with their decorators, as far as somebody wrote these."""
    for value in (v for c in cls.__mro__ if not is_of_torch(c) for v in vars(c).values()):
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        while isinstance(function, types.FunctionType):
            if not function.__code__.co_filename.startswith(OF_TORCH):
                yield function
            function = vars(function).get("__wrapped__")


def _line(frame: Frame) -> int:
    return next(line or 0 for start, end, line in frame.code.co_lines() if start <= frame.at < end)


def theirs(value: Any) -> Any:
    """The function that runs where the value is called, if it is somebody's, and not of torch."""
    while isinstance(value, functools.partial):
        value = value.func
    if not isinstance(value, type | nn.Module) and not inspect.isroutine(value):
        value = inspect.getattr_static(type(value), "__call__", None)
    function = unwrapped(value) if inspect.isroutine(value) else None
    own = hasattr(function, "__code__") and not is_of_torch(value)
    return function if own else None
