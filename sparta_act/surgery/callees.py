"""What an expression in a forward may stand for, found without running anything."""

import ast
import builtins
import functools
import inspect
import itertools
import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from sparta_act.surgery.activating import Made
from sparta_act.surgery.sources import Source

PASSED_ON = (
    "enumerate",
    "zip",
    "reversed",
    "iter",
    "list",
    "tuple",
    "partial",
)  # functions of what is in them
EITHER: dict[type[ast.AST], tuple[str, ...]] = {  # expressions that are one of these parts, or of both
    ast.IfExp: ("body", "orelse"),
    ast.BoolOp: ("values",),
    ast.BinOp: ("left", "right"),
    ast.NamedExpr: ("value",),
}
OF_CHILDREN = ("children", "named_children", "values", "items")
DEPTH = 12  # of expressions that lead to expressions


class Names:
    """The names in the forward of a module, and what they may stand for."""

    def __init__(self, owner: nn.Module, function: Any, source: Source) -> None:
        self._owner, self._function = owner, function
        code = function.__code__
        self._its_name = next(iter(code.co_varnames[: code.co_argcount]), "")
        self._class = [*function.__qualname__.split("."), ""][-3:][0].lstrip("_")  # whose body it is in
        self._bound: dict[str, list[ast.expr]] = {}  # names that are one of these
        self._items: dict[str, list[ast.expr]] = {}  # names that are in one of these
        self._found: dict[str, list[Any]] = {}
        self._known: dict[tuple[str, ast.AST, int], list[Any]] = {}  # what was found of an expression
        for node in source.binding:
            self._note(node)
        defaults, cells = function.__defaults__ or (), function.__closure__ or ()
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        pairs = [*zip(reversed(arguments), reversed(defaults), strict=False)]
        for name, value in (*pairs, *(function.__kwdefaults__ or {}).items()):
            self._found.setdefault(name, []).append(value)
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
            if cell != types.CellType():
                self._found.setdefault(name, []).append(cell.cell_contents)

    def of(self, node: ast.AST, depth: int = 0) -> list[Any]:
        """The objects that an expression may stand for; empty where that cannot be told."""
        return self._once(self._of, node, depth)

    def results(self, node: ast.AST, depth: int = 0) -> list[Any]:
        """What a call may return besides a tensor: what it is given, what that holds, and what texts name."""
        return self._once(self._results, node, depth)

    def _once(self, find: Callable[[ast.AST, int], list[Any]], node: ast.AST, depth: int) -> list[Any]:
        if depth > DEPTH:
            return []
        key = find.__name__, node, depth
        if key not in self._known:  # one name may have many values, that many of other names
            self._known[key] = [*{id(v): v for v in find(node, depth)}.values()]
        return self._known[key]

    def _of(self, node: ast.AST, depth: int) -> list[Any]:
        if isinstance(node, ast.Name):
            return self._of_name(node.id, depth + 1)
        if isinstance(node, ast.Constant):
            return [node.value]
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Call) and super in self.of(node.value.func, depth + 1):
                return self._of_super(node.attr)
            return [*_members(self.of(node.value, depth + 1), self._mangled(node.attr))]
        if isinstance(node, ast.Subscript):
            return self._of_item(node, depth + 1)
        if isinstance(node, ast.Call):
            return self._of_call(node, depth + 1)
        return [v for e in _expressions(node, EITHER.get(type(node), ())) for v in self.of(e, depth + 1)]

    def _of_name(self, name: str, depth: int) -> list[Any]:
        if name == self._its_name:
            return [self._owner]
        if name in self._bound or name in self._items or name in self._found:
            found = [v for e in self._bound.get(name, ()) for v in self.of(e, depth)]
            inside = [v for e in self._items.get(name, ()) for v in self._inside(e, depth)]
            return [v for v in (*found, *inside, *self._found.get(name, ())) if v is not None]
        if name in self._function.__code__.co_varnames:
            return []
        scopes = (self._function.__globals__, vars(builtins))
        return next(([scope[name]] for scope in scopes if name in scope), [])

    def _of_item(self, node: ast.Subscript, depth: int) -> list[Any]:
        try:
            index = ast.literal_eval(node.slice)
        except ValueError:
            return self._inside(node.value, depth)
        found = []
        for value in self.of(node.value, depth):
            within: Any = value
            if isinstance(value, nn.Module):
                named = isinstance(index, str)
                within = value._modules if named else [*value._modules.values()]
            if isinstance(within, list | tuple | dict):
                with suppress(LookupError, TypeError):
                    found.append(within[index])
        return found or self._inside(node.value, depth)

    def _of_call(self, node: ast.Call, depth: int) -> list[Any]:
        found = self.of(node.func, depth)
        if not node.args:
            pass
        elif getattr in found and len(node.args) > 1:
            owners, names, *others = (self.of(e, depth) for e in node.args)
            return [*_named(owners or [Tensor], names), *itertools.chain(*others)]
        elif type in found and len(node.args) == 1:
            return [type(v) for v in self.of(node.args[0], depth)]
        elif vars in found:
            return [*_members(self.of(node.args[0], depth), "__dict__")]
        elif operator.methodcaller in found:  # of a tensor
            return _named([Tensor], self.of(node.args[0], depth))
        elif functools.partial in found:
            return self.of(node.args[0], depth)
        return [Made(v) for v in found if isinstance(v, type) or inspect.isroutine(v)]

    def _of_super(self, name: str) -> list[Any]:
        """The attribute of the class above the one whose body the function is in."""
        mro = type(self._owner).__mro__
        below = next((c for c in self._found.get("__class__", ()) if c in mro), mro[0])
        above = mro[mro.index(below) + 1 :]
        return next(([*_members([c], name)] for c in above if name in vars(c)), [])

    def _results(self, node: ast.AST, depth: int) -> list[Any]:
        if isinstance(node, ast.Name):
            return [v for e in self._bound.get(node.id, ()) for v in self.results(e, depth + 1)]
        if not isinstance(node, ast.Call) or any(isinstance(v, nn.Module) for v in self.of(node.func)):
            return []
        if getattr in self.of(node.func) and self.of(node):  # known, as in getattr(self.body, "0")
            return []
        parts = [*node.args, *(k.value for k in node.keywords), getattr(node.func, "value", node.func)]
        parts = [e for e in parts if not any(v is self._owner for v in self.of(e))]
        found = [v for e in parts for v in (*self.of(e), *self._inside(e, 0), *self.results(e, depth + 1))]
        names = [part for v in found if isinstance(v, str) for part in v.split(".")]
        return [*found, *_named([self._owner, Tensor], names)]

    def _inside(self, node: ast.expr, depth: int) -> list[Any]:
        """What is in a container."""
        if depth > DEPTH:
            return []
        if isinstance(node, ast.Tuple | ast.List | ast.Dict | ast.Set):
            return [
                v
                for e in _expressions(node, ("elts", "values"))
                for v in (*self.of(e, depth + 1), *self._inside(e, depth + 1))
            ]
        if isinstance(node, ast.Subscript | ast.Starred):  # a slice, or all of it
            return self._inside(node.value, depth + 1)
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if called in PASSED_ON:
                return [v for e in node.args for v in self._inside(e, depth + 1)]
            if called in OF_CHILDREN and isinstance(node.func, ast.Attribute):
                return self._inside(node.func.value, depth + 1)
        found: list[Any] = []
        for value in self.of(node, depth + 1):
            within = value._modules if isinstance(value, nn.Module) else value
            found += (
                within.values()
                if isinstance(within, dict)
                else within
                if isinstance(within, list | tuple)
                else ()
            )
        return found

    def _mangled(self, name: str) -> str:
        private = name.startswith("__") and not name.endswith("__")
        return f"_{self._class}{name}" if private and self._class else name

    def _note(self, node: ast.AST) -> None:
        """Note what gives a name its value."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value:
            self._assign(node.target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            self._turn(node.target, node.iter)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                self._found.setdefault(name, []).extend(self._imported(node, alias))

    def _turn(self, target: ast.expr, over: ast.expr) -> None:
        """Note what a loop gives its names: with `zip` and `enumerate`, each its own."""
        names = target.elts if isinstance(target, ast.Tuple) else []
        called = over.func.id if isinstance(over, ast.Call) and isinstance(over.func, ast.Name) else ""
        sources = over.args if isinstance(over, ast.Call) else []
        sources = [ast.Tuple([]), *sources] if called == "enumerate" else sources
        if called in ("zip", "enumerate") and len(names) == len(sources):
            for its_name, source in zip(names, sources, strict=True):
                self._turn(its_name, source)
        else:
            for name in _names(target):
                self._items.setdefault(name, []).append(over)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._bound.setdefault(target.id, []).append(value)
        elif (
            isinstance(target, ast.Tuple)
            and isinstance(value, ast.Tuple)
            and len(target.elts) == len(value.elts)
        ):
            for one, its_value in zip(target.elts, value.elts, strict=True):
                self._assign(one, its_value)
        elif isinstance(target, ast.Tuple | ast.List):
            for name in _names(target):
                self._items.setdefault(name, []).append(value)

    def _imported(self, node: ast.Import | ast.ImportFrom, alias: ast.alias) -> Iterable[Any]:
        if isinstance(node, ast.Import):
            name = alias.name if alias.asname else alias.name.split(".")[0]
            return [sys.modules[name]] if name in sys.modules else []
        package = self._function.__globals__.get("__package__") or ""
        above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        module = ".".join(filter(None, [*above, node.module or ""]))
        return _members([sys.modules[module]], alias.name) if module in sys.modules else []


def _named(owners: list[Any], names: list[Any]) -> list[Any]:
    return [v for name in names if isinstance(name, str) for v in _members(owners, name)]


def _members(values: Iterable[Any], name: str) -> Iterator[Any]:
    for value in values:
        if isinstance(value, nn.Module | Made) and name in ("forward", "__call__"):
            yield value
        elif isinstance(value, nn.Module) and name in value._modules:
            yield value._modules[name]
        elif name == "__dict__" and hasattr(value, name):
            yield vars(value)
        elif name == "__class__":
            yield type(value)
        elif type(value).__module__ == "torch._ops":  # fills itself when it is asked
            yield getattr(value, name, None)
        else:
            found = inspect.getattr_static(value, name, None)
            found = found.__func__ if isinstance(found, staticmethod | classmethod) else found
            found = found.func if isinstance(found, functools.partialmethod) else found
            if isinstance(
                found, property | functools.cached_property
            ):  # what it may return is told by its code
                found = found.fget if isinstance(found, property) else found.func
            if found is not None:
                yield found


def _expressions(node: ast.AST, fields: Iterable[str]) -> Iterator[ast.expr]:
    for field in fields:
        part = getattr(node, field, [])
        yield from part if isinstance(part, list) else [part]


def _names(target: ast.AST) -> Iterator[str]:
    return (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
