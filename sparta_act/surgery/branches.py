"""Finds activation calls in the source of a forward that no pass has run, and that may come last."""

import ast
from collections.abc import Iterator

from torch import nn

from sparta_act.errors import SiteError
from sparta_act.surgery.kinds import in_words, kind_of, spelled
from sparta_act.surgery.rewriting import Source, forward_of, read

ARMS = {  # the parts of a statement or expression that do not always run
    ast.If: ("body", "orelse"),
    ast.IfExp: ("body", "orelse"),
    ast.Try: ("handlers", "orelse"),
    ast.Match: ("cases",),
    ast.For: ("body", "orelse"),
    ast.While: ("body", "orelse"),
    ast.BoolOp: ("values",),
}


def check_all_seen(
    owner: nn.Module, last: set[int], seen: set[int], replaced: str, kinds: frozenset[str]
) -> None:
    """Refuse when the forward of `owner` has a call of these kinds that may be the last, and never ran.

    `last` and `seen`: offsets in the bytecode, of the last calls and of all. `replaced`: the key of the child
    that will be another module, wherever it is called. Raises `SiteError`.
    """
    function = forward_of(type(owner))
    try:
        source = read(function)
    except SiteError:  # nothing to be read, and for a swap nothing need be
        return
    ran, final = {source.at(o) for o in seen}, [call for o in last if (call := source.at(o))]
    its_name = function.__code__.co_varnames[0]
    for call in sorted(filter(None, {*source.calls.values()} - ran), key=_start):
        if _is_activation(call, owner, its_name, replaced, kinds) and not any(
            _always_before(source, call, k) for k in final
        ):
            raise SiteError(
                f"line {call.lineno} ({function.__qualname__}) calls {in_words(kinds)} too, which may be the "
                "last call in a pass unlike those on the example, and would not be replaced"
            )


def _is_activation(
    call: ast.Call, owner: nn.Module, its_name: str, replaced: str, kinds: frozenset[str]
) -> bool:
    function = call.func
    if isinstance(function, ast.Attribute):
        if isinstance(function.value, ast.Name) and function.value.id == its_name:  # self.relu(x)
            child = owner._modules.get(function.attr)
            return child is not None and function.attr != replaced and kind_of(child) in kinds
        return function.attr.islower() and spelled(function.attr) in kinds  # F.relu(x), x.relu()
    if isinstance(function, ast.Name):
        return function.id.islower() and spelled(function.id) in kinds  # relu(x)
    made = function.func if isinstance(function, ast.Call) else None  # nn.ReLU()(x)
    return isinstance(made, ast.Attribute) and spelled(made.attr) in kinds


def _always_before(source: Source, call: ast.Call, last: ast.Call) -> bool:
    """Whether `last` runs whenever `call` has run."""
    if not {*_arms(source, last)} <= {*_arms(source, call)}:
        return False
    if last in _above(source, call):  # as its argument
        return True
    returns = [n for n in source.parents if isinstance(n, ast.Return)]
    leaves = any(_end(call) <= _end(r) <= _start(last) for r in returns)  # with the call, or after it
    return _end(call) <= _start(last) and not leaves


def _above(source: Source, node: ast.AST) -> Iterator[ast.AST]:
    while node in source.parents:
        node = source.parents[node]
        yield node


def _arms(source: Source, node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The conditional parts around a node."""
    while node in source.parents:
        parent = source.parents[node]
        for name in ARMS.get(type(parent), ()):
            part = getattr(parent, name)
            if node is part or (isinstance(part, list) and any(node is p for p in part)):
                yield parent, name
        node = parent


def _start(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]
