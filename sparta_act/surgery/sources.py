"""Reads the source of a function: its calls, and which instruction belongs to which of them."""

import __future__

import ast
import bisect
import dis
import hashlib
import linecache
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sparta_act.errors import SiteError

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
INNER = (*FUNCTIONS, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BINDING = (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.For, ast.comprehension, ast.Import, ast.ImportFrom)
ASKING = ("isinstance", "callable", "hasattr", "type", "id", "bool")
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

KEPT = 64  # sources
_kept: dict[
    tuple[types.CodeType, str], "Source"
] = {}  # by code and file: a reload may change a function's code


@dataclass(frozen=True)
class Source:
    """The text of a function and the calls in it."""

    lines: list[bytes]  # of the whole file; ast counts columns in bytes
    function: Function
    calls: dict[int, ast.Call | None]  # by the offset of the instruction in the function
    parents: dict[ast.AST, ast.AST]  # of the nodes in the function
    digest: str  # of the function's text

    @cached_property
    def in_order(self) -> dict[ast.Call, str]:
        """The calls in the order of the text, also in inner functions, and what they call, as text."""
        calls = (n for n in self.parents if isinstance(n, ast.Call))
        return {c: ast.dump(c.func) for c in sorted(calls, key=lambda c: (c.lineno, c.col_offset))}

    @cached_property
    def reached(self) -> set[ast.Call | None]:
        """The calls outside inner functions that the compiler has kept: not what nothing leads to."""
        return {*self.calls.values()}

    @cached_property
    def inner(self) -> set[ast.Call]:
        """The calls in inner functions and comprehensions."""
        found = (n for n in self.parents if isinstance(n, INNER))
        return {n for f in found for n in ast.walk(f) if isinstance(n, ast.Call)}

    @cached_property
    def given_away(self) -> list[ast.expr]:
        """The names and attributes that are read whole, and neither called nor only asked for."""
        return [
            node
            for node, parent in self.parents.items()
            if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load)
            if not isinstance(parent, ast.Attribute | ast.Subscript)
            if not (isinstance(parent, ast.Call) and parent.func is node) and not self._only_asked(node)
        ]

    def _only_asked(self, node: ast.AST) -> bool:
        """Whether it is asked for alone, as in `if self.act is not None` or `isinstance(self.act, ...)`."""
        parent = self.parents[node]
        while isinstance(parent, ast.BoolOp | ast.UnaryOp):
            node, parent = parent, self.parents[parent]
        if isinstance(parent, ast.Call):
            return isinstance(parent.func, ast.Name) and parent.func.id in ASKING
        return isinstance(parent, ast.Compare) or getattr(parent, "test", None) is node

    @cached_property
    def binding(self) -> list[ast.AST]:
        """What gives names their values."""
        return [node for node in self.parents if isinstance(node, BINDING)]

    def at(self, offset: int) -> ast.Call | None:
        """The call that an instruction belongs to."""
        return self.calls[self._offsets[bisect.bisect_right(self._offsets, offset) - 1]]

    @cached_property
    def _offsets(self) -> list[int]:
        return sorted(self.calls)


def read(function: Any) -> Source:
    """The source of a function. Raises `SiteError` where there is none, or where it is not what runs."""
    where, code = getattr(function, "__qualname__", function), getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType):
        raise SiteError(f"the source of {where} is not available: it is no Python function")
    key = code, code.co_filename
    if (found := _kept.get(key)) is None:  # asked once: another thread may clear them
        if len(_kept) >= KEPT:
            _kept.clear()
        found = _kept[key] = _read(where, code, function.__globals__)
    return found


def _read(where: str, code: types.CodeType, names: dict[str, Any]) -> Source:
    found = False
    for text in _texts(code.co_filename, names):
        found = found or bool(text)
        try:
            tree = ast.parse(text)
            functions, compiled = functions_like(tree, code), compiled_like(tree, code)
        except (SyntaxError, LookupError, RecursionError):
            continue
        if len(functions) > 1:
            raise SiteError(
                f"line {code.co_firstlineno} holds {len(functions)} functions called {code.co_name}; "
                "write def forward(self, x)"
            )
        if _essence(compiled) == _essence(code):
            return _source(where, code, text, functions[0])
    if not found:
        raise SiteError(
            f"the source of {where} is not available; write the class into a file and import it, or make "
            "the call an nn.ReLU of its own"
        )
    if any(name.startswith("@py") for name in code.co_varnames):
        raise SiteError(
            f"pytest has rewritten an assert in {where}; define the class outside of the test file"
        )
    raise SiteError(
        f"the source of {where} has changed since it was imported (or a tool has changed its code); "
        "import it again and make a new model"
    )


def _texts(filename: str, names: dict[str, Any]) -> Iterator[str]:
    """The text of a file as it is now, and as somebody has read it before."""
    before = linecache.cache.get(filename)
    linecache.checkcache(filename)  # after a reload, the old text would still be there
    yield "".join(linecache.getlines(filename, names))
    if before and len(before) > 2:
        yield "".join(before[2])


def _source(where: str, code: types.CodeType, text: str, function: Function) -> Source:
    lines, twin = text.encode().splitlines(keepends=True), ast.parse(text)
    calls = dict(enumerate(_calls(function), 1 + len(lines)))
    # Each call gets a line of its own: so calls are told apart on every Python, without columns.
    for line, call in enumerate(_calls(functions_like(twin, code)[0]), 1 + len(lines)):
        for part in (call, call.func) if isinstance(call.func, ast.Attribute) else (call,):
            part.lineno = part.end_lineno = line
            part.col_offset = part.end_col_offset = 0
    real, marked = _instructions(code), _instructions(compiled_like(twin, code))
    if [name for _, name, _ in real] != [name for _, name, _ in marked]:
        raise SiteError(f"the calls in {where} cannot be told apart; make the call an nn.ReLU of its own")
    by_offset = {offset: calls.get(line) for (offset, _, _), (_, _, line) in zip(real, marked, strict=True)}
    parents = {child: parent for parent in ast.walk(function) for child in ast.iter_child_nodes(parent)}
    own = b"".join(lines[code.co_firstlineno - 1 : function.end_lineno])
    return Source(lines, function, by_offset, parents, hashlib.sha256(own).hexdigest())


def compiled_like(tree: ast.Module, like: types.CodeType, filename: str = "") -> types.CodeType:
    """The function at the same line, compiled with all that is around it: closures and super() stay."""
    # as notebooks compile: a cell may await, and keeps what an earlier cell has imported from __future__
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | like.co_flags & __future__.annotations.compiler_flag
    todo: list[types.CodeType] = [
        compile(tree, filename or like.co_filename, "exec", flags, dont_inherit=True)
    ]
    for code in todo:
        if (code.co_name, code.co_firstlineno) == (like.co_name, like.co_firstlineno):
            return code
        todo += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    raise LookupError(like.co_name)


def functions_like(tree: ast.Module, code: types.CodeType) -> list[Function]:
    """The functions of this name at this line: of lambdas there may be several."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, Function):
            name = "<lambda>" if isinstance(node, ast.Lambda) else node.name
            decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
            first = min([node.lineno, *(d.lineno for d in decorators)])
            found += [node] if (name, first) == (code.co_name, code.co_firstlineno) else []
    if not found:
        raise LookupError(code.co_name)
    return found


def _instructions(code: types.CodeType) -> list[tuple[int, str, int]]:
    """Offset, name and line of each; those that may come and go with line numbers are left out."""
    lines = {offset: line or 0 for start, end, line in code.co_lines() for offset in range(start, end)}
    real = [i for i in dis.get_instructions(code) if i.opname not in ("NOP", "EXTENDED_ARG", "CACHE")]
    return [(i.offset, i.opname, lines[i.offset]) for i in real]


def _essence(code: types.CodeType) -> tuple[Any, ...]:
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, [*map(_constant, code.co_consts)]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _essence(value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def _calls(function: Function) -> list[ast.Call]:
    parts = function.body if isinstance(function.body, list) else [function.body]
    return [node for part in parts for node in ast.walk(part) if isinstance(node, ast.Call)]
