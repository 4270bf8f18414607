"""Which parts of a function run in one pass, as far as its source tells."""

import ast
from collections.abc import Iterator

from sparta_act.surgery.sources import FUNCTIONS, Source

Arm = tuple[ast.AST, str, int]

LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
WHOLE = {  # the parts of a statement or expression that do not always run, each as one
    "If": ("body", "orelse"),
    "IfExp": ("body", "orelse"),
    "Try": ("orelse",),
    "TryStar": ("orelse",),
    "For": ("body", "orelse"),
    "AsyncFor": ("body", "orelse"),
    "While": ("body", "orelse"),
    "Assert": ("msg",),
    "ListComp": ("elt",),
    "SetComp": ("elt",),
    "GeneratorExp": ("elt",),
    "DictComp": ("key", "value"),
}
EACH = {"Try": ("handlers",), "TryStar": ("handlers",), "Match": ("cases",), "BoolOp": ("values",)}
EXCLUDING = {"If": ("body", "orelse"), "IfExp": ("body", "orelse"), "Match": ("cases",), "Try": ("handlers",)}


def always_before(source: Source, node: ast.AST, final: list[ast.AST]) -> bool:
    """Whether one of `final` runs whenever `node` has run."""
    arms, around = {*_arms(source, node)}, {*above(source, node)}
    if any(last in around and {*_arms(source, last)} <= arms for last in final):  # as its argument
        return True
    later = [(_end(f), frozenset(_arms(source, f))) for f in final if _end(node) <= _start(f)]
    for end, ours in later:  # which grows by each `if` with one of them in either arm
        for other, theirs in [*later]:
            joined, parents = (max(end, other), ours & theirs), [parent for parent, _, _ in ours ^ theirs]
            if len(parents) == 2 and parents[0] is parents[1] and isinstance(parents[0], ast.If | ast.IfExp):
                later += [joined] if joined not in later else []
    leaves = [
        _end(r)
        for r in source.parents
        if isinstance(r, ast.Return) and _function_of(source, r) is source.function and _end(node) <= _end(r)
        if not any(ours <= {*_arms(source, r)} and end <= _end(r) for end, ours in later)
        if r in around or not excludes(source, node, r)
    ]
    return any(ours <= arms and all(end < leave for leave in leaves) for end, ours in later)


def excludes(source: Source, first: ast.AST, second: ast.AST) -> bool:
    """Whether no pass runs both: they are in two arms, or the function ends between them."""
    if _start(second) < _start(first):
        first, second = second, first
    ways = [[*_way(source, node)] for node in (first, second)]
    depth = next((d for d, pair in enumerate(zip(*ways, strict=False)) if pair[0] != pair[1]), None)
    if depth is None or any(isinstance(parent, LOOPS) for parent, _, _ in ways[0][: depth + 1]):
        return False  # one is in the other, or each turn takes another
    (parent, field, _), (_, other, _) = ways[0][depth], ways[1][depth]
    kind = type(parent).__name__
    if {field, other} <= {*EXCLUDING.get(kind, ())} and (field != other or kind in EACH):
        return True
    if other == "finalbody" or isinstance(parent, ast.expr):
        return False
    return _ends(ways[0][depth:], _start(second) if field == other else None)


def _ends(way: list[Arm], before: tuple[int, int] | None) -> bool:
    """Whether the function is over after the node at the end of the way, within the first part of the way."""
    for depth, (parent, field, i) in reversed([*enumerate(way)]):
        part, caught = getattr(parent, field), any(map(_catches, way[: depth + 1]))
        if not isinstance(part, list) or not isinstance(part[i], ast.stmt):
            continue
        for statement in part[i:]:
            if before and _start(statement) >= before and parent is way[0][0]:
                break
            if isinstance(statement, ast.Return) or (isinstance(statement, ast.Raise) and not caught):
                return True
            if any(isinstance(n, ast.Break | ast.Continue) for n in ast.walk(statement)):
                return False
    return False


def raises(source: Source, node: ast.AST) -> bool:
    """Whether the pass ends in an error whenever `node` has run."""
    way = [*_way(source, node)]
    if any(map(_catches, way)):
        return False
    for parent, field, i in reversed(way):
        part = getattr(parent, field)
        if isinstance(parent, ast.Assert) and field == "msg":
            return True
        if isinstance(part, list) and isinstance(part[i], ast.stmt):
            for statement in part[i:]:
                if isinstance(statement, ast.Raise):
                    return True
                if any(isinstance(n, ast.Return | ast.Break | ast.Continue) for n in ast.walk(statement)):
                    return False
        if isinstance(parent, FUNCTIONS):
            return False
    return False


def _catches(arm: Arm) -> bool:
    """Whether an error in this part may be caught."""
    return arm[1] == "body" and bool(getattr(arm[0], "handlers", None))


def above(source: Source, node: ast.AST) -> Iterator[ast.AST]:
    """What a node is in, innermost first."""
    while node in source.parents:
        node = source.parents[node]
        yield node


def uses(source: Source, node: ast.AST, seen: frozenset[ast.AST] = frozenset()) -> Iterator[ast.AST]:
    """Where a node may run: at its place, or, in an inner function, wherever that is named."""
    inner = [f for f in above(source, node) if isinstance(f, FUNCTIONS) and f is not source.function]
    if not inner:
        yield node
    elif (name := _name_of(source, inner[-1])) is None:
        yield inner[-1]
    elif inner[-1] not in seen:
        for n in source.parents:
            if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load):
                yield from uses(source, n, seen | {inner[-1]})


def _name_of(source: Source, function: ast.AST) -> str | None:
    """The name that an inner function, or a container with it, is given."""
    name: str | None = getattr(function, "name", None)
    for node in above(source, function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            return node.targets[0].id
        if not isinstance(node, ast.Dict | ast.List | ast.Tuple | ast.IfExp):
            break
    return name


def _function_of(source: Source, node: ast.AST) -> ast.AST:
    return next(f for f in above(source, node) if isinstance(f, FUNCTIONS))


def _way(source: Source, node: ast.AST) -> Iterator[Arm]:
    """Through which parts one comes to a node, outermost first."""
    steps = list[Arm]()
    while node in source.parents:
        parent = source.parents[node]
        for field, part in ast.iter_fields(parent):
            if part is node:
                steps.append((parent, field, 0))
            elif isinstance(part, list):
                steps += [(parent, field, i) for i, p in enumerate(part) if p is node]
        node = parent
    yield from reversed(steps)


def _arms(source: Source, node: ast.AST) -> Iterator[Arm]:
    """The conditional parts around a node."""
    for parent, field, i in _way(source, node):
        kind = type(parent).__name__
        if field in WHOLE.get(kind, ()):
            yield parent, field, 0
        elif field in EACH.get(kind, ()) and (i or kind != "BoolOp"):
            yield parent, field, i
        elif isinstance(parent, FUNCTIONS) and parent is not source.function:
            yield parent, field, 0


def _start(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]
