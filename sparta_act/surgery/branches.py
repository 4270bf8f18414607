"""Finds activation calls in the source of a forward that no pass has run, and that may come last."""

import ast
import functools
import inspect
import re
from collections.abc import Collection, Iterator
from functools import cached_property
from itertools import combinations, zip_longest
from typing import Any

from torch import nn

from sparta_act.errors import SiteError
from sparta_act.surgery.activating import Made, is_activation, is_of_torch, leads_to
from sparta_act.surgery.callees import Names
from sparta_act.surgery.flow import above, always_before, excludes, raises, uses
from sparta_act.surgery.kinds import in_words, spelled
from sparta_act.surgery.recording import Event, Pass
from sparta_act.surgery.rewriting import forward_of
from sparta_act.surgery.sources import read

VIA = re.compile(r"(.*) \((.*):(\d+)\)")  # of an event: function, file, line


class Forward:
    """The forward of a module, and what it has called: these events. Raises `SiteError` without source."""

    def __init__(
        self, owner: nn.Module, inside: list[Event], kinds: frozenset[str], ran: Collection[int]
    ) -> None:
        function = forward_of(type(owner))
        self.source = read(function)
        self.where, self.file = function.__qualname__, function.__code__.co_filename
        self.names, self._owner = Names(owner, function, self.source), owner
        self._kinds, self._ran_modules = kinds, ran
        events = [e for e in inside if e.modules[-1] is owner]
        self._via = {match.groups() for e in events if (match := VIA.fullmatch(e.via))}
        alike = [e for e in inside if e.kind in (*kinds, "replaced")]
        self._around = {id(m) for e in alike for m in e.modules}
        self._ran = {call for e in alike if e.modules[-1] is owner for call in self.at({e.offset})}
        offsets = {at for e in alike for m, at in zip(e.modules, e.at, strict=True) if m is owner}
        self.led = {*self.at(offsets)}  # the calls that led to an activation
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

    def unseen(self) -> Iterator[tuple[ast.expr, ast.AST]]:
        """The calls of an activation that no pass ran, and where each may run; and mentions of one."""
        for node in self.mentions():
            for place in uses(self.source, node):
                yield node, place
        for call in self.calls:
            inner = call in self.source.inner
            if call not in self._ran and (inner or call in self.source.reached) and self._activates(call):
                ran = inner and any(
                    file == self.file and call.lineno <= int(line) <= (call.end_lineno or 0)
                    for _, file, line in self._via
                )
                for place in uses(self.source, call):
                    if not ran or isinstance(place, ast.Name):  # which may be a second use
                        yield call, place

    def mentions(self) -> Iterator[ast.expr]:
        """The expressions that are an activation and not called there: given to a function, in a table."""
        for node in self.source.given_away:
            argument = isinstance(self.source.parents[node], ast.Call | ast.keyword | ast.Starred)
            values = [v for v in self.names.of(node) if not isinstance(v, Made) or isinstance(v.by, type)]
            if any(self._is_one(v) or (argument and self.waits(v)) for v in values):
                yield node

    def _activates(self, call: ast.Call) -> bool:
        values = self.names.of(call.func)
        found = values + self.names.results(call.func)
        led = call in self.led
        if any(is_activation(v, self._kinds) and not (led and self._has_run(v)) for v in found):
            return True
        if not led and any(self._is_one(v) or (id(v) in self.led_to and self._may_lead(v)) for v in found):
            return True
        if self.calls[call] in self._seen:
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
        return self.ran_in(_theirs(value)) or id(value) in self._around

    def ran_in(self, function: Any) -> bool:
        """Whether a pass called an activation in this function."""
        code = getattr(function, "__code__", None)
        return any((name, file) == (code.co_name, code.co_filename) for name, file, _ in self._via if code)

    def _may_lead(self, value: Any, ran: Collection[int] = (), but: Collection[str] = ()) -> bool:
        """Whether it is a function of somebody's, or made by one, with an activation in it."""
        value = value.by if isinstance(value, Made) else value
        return _theirs(value) is not None and leads_to(value, self._owner, self._kinds, but, ran)

    def waits(self, value: Any) -> bool:
        """Whether it is a module with an activation in it that did not run, and no activation itself."""
        if not isinstance(value, nn.Module) or value is self._owner or is_activation(value, self._kinds):
            return False
        ran = any(id(m) in self._ran_modules for m in value.modules())
        return not ran and leads_to(value, self._owner, self._kinds)

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
            inside = (p.events[i] for p in self._passes for i in p.inside.get(id(module), ()))
            try:
                self._read[module] = Forward(module, [*inside], self.kinds, self.ran)
            except SiteError:
                self._read[module] = None
        return self._read[module]

    def has_run(self, module: nn.Module) -> bool:
        """Whether some pass ran a forward of somebody's, as far as it made a call that is recorded."""
        return not is_of_torch(forward_of(type(module))) and any(id(module) in p.inside for p in self._passes)

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


def _check(forward: Forward, final: list[ast.Call], kinds: frozenset[str], replaced: str = "") -> None:
    for call, place in not_replaced(forward, [replaced] if replaced else []):
        if forward.may_be_last(place, final):
            raise SiteError(
                f"line {call.lineno} ({forward.where}) calls {in_words(kinds)} too, which may be the last "
                "call in a pass unlike those on the example, and would not be replaced; let all ways end in "
                "one call, or call one nn.ReLU of the module's own, self.relu(x), in each"
            )


def not_replaced(forward: Forward, replaced: Collection[str]) -> Iterator[tuple[ast.expr, ast.AST]]:
    """The calls that no pass ran, and where each may run, but for those of children of these keys."""
    for call, place in forward.unseen():
        if not (replaced and forward.is_only(call.func if isinstance(call, ast.Call) else call, replaced)):
            yield call, place


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


def _theirs(value: Any) -> Any:
    """The function that runs where the value is called, if it is somebody's, and not of torch."""
    while isinstance(value, functools.partial):
        value = value.func
    if not isinstance(value, type | nn.Module) and not inspect.isroutine(value):
        value = inspect.getattr_static(type(value), "__call__", None)
    function = inspect.unwrap(value) if inspect.isroutine(value) else None
    own = hasattr(function, "__code__") and not is_of_torch(value)
    return function if own else None
