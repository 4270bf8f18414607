"""Changes one call in the source of a forward, as a generated subclass of the module's class."""

import ast
import dis
import functools
import hashlib
import linecache
import types
from collections.abc import Callable
from dataclasses import dataclass
from inspect import unwrap
from itertools import pairwise
from typing import Any

from torch import nn

from sparta_act.errors import SiteError

NAME = "sparta"  # of the new submodule
MARK = "_sparta_rewrite"  # of the attribute of a generated class: (digest, spans)
LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

Span = tuple[
    int, int, int, int
]  # first line and column, last line and column; lines count from the function's


@dataclass(frozen=True)
class _Source:
    lines: list[bytes]  # of the whole file; ast counts columns in bytes
    calls: dict[int, ast.Call | None]  # by the offset of the instruction in the function
    parents: dict[ast.AST, ast.AST]  # of the nodes in the function
    digest: str  # of the function's text


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before any rewriting."""
    cls = type(module)
    return cls.__bases__[0] if MARK in vars(cls) else cls


def locate(cls: type[nn.Module], offset: int) -> Span:
    """The ReLU call at an instruction of the forward of `cls`, if the call can be rewritten."""
    function: Any = unwrap(cls.forward)
    source = _read(function)
    call = source.calls.get(max(o for o in source.calls if o <= offset))
    if call is None:
        raise SiteError(f"{function.__qualname__} does not call the ReLU in one expression")
    at = f"line {call.lineno} ({function.__qualname__})"
    if isinstance(source.parents[call], ast.Expr):
        raise SiteError(f"{at} throws the result of the ReLU away; write x = F.relu(x)")
    node: ast.AST = call
    while node in source.parents:
        node = source.parents[node]
        if isinstance(node, LOOPS):
            raise SiteError(f"{at} calls the ReLU in a loop")
    if _argument(call) is None:
        raise SiteError(f"{at} hides the input of the ReLU")
    return _span(call, function.__code__)


def digest_of(cls: type[nn.Module]) -> str:
    """A hash of the source of the forward of `cls`: spans mean nothing in another source."""
    return _read(unwrap(cls.forward)).digest


def rewritten(cls: type[nn.Module], digest: str, spans: tuple[Span, ...]) -> type[nn.Module]:
    """The subclass of `cls` whose forward has `self.sparta(x)` in place of the ReLU calls at `spans`."""
    for known in type.__subclasses__(cls):
        if vars(known).get(MARK) == (digest, spans):
            return known
    function: Any = unwrap(cls.forward)
    source = _read(function)
    if source.digest != digest:
        raise SiteError(
            f"the source of {cls.__module__}.{cls.__qualname__}.forward is not the one that was changed. "
            "Use that version again, or apply replace_relus to a new model and load the state_dict."
        )
    text = _edit(source, function.__code__, spans)
    filename = f"<sparta {cls.__module__}.{cls.__qualname__} {hashlib.sha256(text).hexdigest()[:12]}>"
    linecache.cache[filename] = len(text), None, text.decode().splitlines(keepends=True), filename
    code = _code(ast.parse(text), function.__code__, filename)
    forward = _rewrap(cls.forward, function, _with_code(function, code))

    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super(subclass, self).__reduce_ex__(protocol)
        make, args, *rest = reduced
        args = tuple(cls if a is subclass else a for a in args)
        return _rebuild, (cls, digest, spans, make, args), *rest

    body = {
        "forward": forward,
        "__module__": cls.__module__,
        "__reduce_ex__": reduce_ex,
        MARK: (digest, spans),
    }
    subclass: type[nn.Module] = types.new_class(
        f"Sparta{cls.__name__}", (cls,), exec_body=lambda space: space.update(body)
    )
    return subclass


def _rebuild(
    cls: type[nn.Module],
    digest: str,
    spans: tuple[Span, ...],
    make: Callable[..., Any],
    args: tuple[Any, ...],
) -> nn.Module:
    # What pickle and deepcopy call: first a module of the user's class, then of its subclass.
    module: nn.Module = make(*args)
    module.__class__ = rewritten(cls, digest, spans)
    return module


@functools.lru_cache(maxsize=64)
def _read(function: Any) -> _Source:
    where, code = getattr(function, "__qualname__", function), getattr(function, "__code__", None)
    text = "".join(linecache.getlines(code.co_filename, function.__globals__)).encode() if code else b""
    if code is None or not text:
        raise SiteError(f"the source of {where} is not available")
    lines = text.splitlines(keepends=True)
    try:
        tree, twin = ast.parse(text), ast.parse(text)
        current, node, twin_node = _code(tree, code), _function(tree, code), _function(twin, code)
    except (SyntaxError, LookupError):
        current = None
    if current is None or _essence(current) != _essence(code):
        raise SiteError(f"the source of {where} has changed since it was imported")
    calls = dict(enumerate(_calls(node), 1 + len(lines)))
    for line, call in enumerate(_calls(twin_node), 1 + len(lines)):  # each call to a line of its own: so
        for part in (call, call.func) if isinstance(call.func, ast.Attribute) else (call,):
            part.lineno = part.end_lineno = line  # calls are told apart on every Python, without columns
            part.col_offset = part.end_col_offset = 0
    real, marked = _instructions(code), _instructions(_code(twin, code))
    if [name for _, name, _ in real] != [name for _, name, _ in marked]:
        raise SiteError(f"the calls in {where} cannot be told apart")
    by_offset = {offset: calls.get(line) for (offset, _, _), (_, _, line) in zip(real, marked, strict=True)}
    parents = {child: parent for parent in ast.walk(node) for child in ast.iter_child_nodes(parent)}
    own = b"".join(lines[code.co_firstlineno - 1 : node.end_lineno])
    return _Source(lines, by_offset, parents, hashlib.sha256(own).hexdigest())


def _instructions(code: types.CodeType) -> list[tuple[int, str, int]]:
    """Offset, name and line of each; those that may come and go with line numbers are left out."""
    lines = {offset: line or 0 for start, end, line in code.co_lines() for offset in range(start, end)}
    real = [i for i in dis.get_instructions(code) if i.opname not in ("NOP", "EXTENDED_ARG", "CACHE")]
    return [(i.offset, i.opname, lines[i.offset]) for i in real]


def _code(tree: ast.Module, like: types.CodeType, filename: str = "") -> types.CodeType:
    """The function at the same line, compiled with all that is around it: closures and super() stay."""
    todo = [compile(tree, filename or like.co_filename, "exec", dont_inherit=True)]
    for code in todo:
        if (code.co_name, code.co_firstlineno) == (like.co_name, like.co_firstlineno):
            return code
        todo += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    raise LookupError(like.co_name)


def _function(tree: ast.Module, code: types.CodeType) -> ast.FunctionDef:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if first == code.co_firstlineno:
                return node
    raise LookupError(code.co_name)


def _essence(code: types.CodeType) -> tuple[Any, ...]:
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, [*map(_constant, code.co_consts)]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _essence(value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def _calls(function: ast.FunctionDef) -> list[ast.Call]:
    return [node for part in function.body for node in ast.walk(part) if isinstance(node, ast.Call)]


def _argument(call: ast.Call) -> ast.expr | None:
    """The input of the ReLU in `F.relu(x)`, `F.relu(input=x)` or `x.relu()`."""
    if call.args:
        return None if isinstance(call.args[0], ast.Starred) else call.args[0]
    if call.keywords:
        return next((k.value for k in call.keywords if k.arg == "input"), None)
    return call.func.value if isinstance(call.func, ast.Attribute) else None


def _span(node: ast.expr, code: types.CodeType) -> Span:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    first = code.co_firstlineno
    return node.lineno - first, node.col_offset, node.end_lineno - first, node.end_col_offset


def _edit(source: _Source, code: types.CodeType, spans: tuple[Span, ...]) -> bytes:
    """The text of the file with the calls changed, the last one first."""
    calls = {_span(call, code): call for call in source.calls.values() if call}
    text, first = b"".join(source.lines), code.co_firstlineno

    def place(line: int, column: int) -> int:
        return sum(map(len, source.lines[: line + first - 1])) + column

    if any(a[2:] > b[:2] for a, b in pairwise(sorted(spans))):
        raise SiteError(f"{code.co_name} has one ReLU call inside another")
    for span in sorted(spans, reverse=True):
        argument = _argument(calls[span])
        assert argument is not None
        inner = _span(argument, code)
        new = f"{code.co_varnames[0]}.{NAME}(".encode() + text[place(*inner[:2]) : place(*inner[2:])] + b")"
        text = text[: place(*span[:2])] + new + text[place(*span[2:]) :]
    return text


def _with_code(function: Any, code: types.CodeType) -> Any:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in code.co_freevars)
    new: Any = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    new.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(new, function)
    del new.__wrapped__
    return new


def _rewrap(outer: Any, function: Any, new: Any) -> Any:
    """The decorators of `function` around `new`: copies of the same wrappers, with `new` in their closure."""
    if outer is function:
        return new
    inner = outer.__wrapped__
    new = _rewrap(inner, function, new)
    old = getattr(outer, "__closure__", None) or ()
    cells = tuple(types.CellType(new) if cell.cell_contents is inner else cell for cell in old)
    if cells == old:
        raise SiteError(
            f"a decorator of {function.__qualname__} hides it; only plain wrappers can be seen through"
        )
    copy = types.FunctionType(outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, cells)
    copy.__kwdefaults__ = outer.__kwdefaults__
    functools.update_wrapper(copy, outer)
    vars(copy).update({name: new for name, value in vars(outer).items() if value is inner})  # __wrapped__ too
    return copy
