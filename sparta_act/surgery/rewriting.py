"""Changes calls in the source of a forward, as a generated subclass of the module's class."""

import abc
import ast
import functools
import hashlib
import inspect
import linecache
import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import nn

from sparta_act.errors import SiteError
from sparta_act.surgery.sources import Source, compiled_like, read

NAME = "sparta"  # of the new submodule
MARK = "_sparta_rewrite"  # of the attribute of a generated class: (digest, changes)
ORIGIN = "_sparta_origin"  # of another: the function that was rewritten, as it was
COMPILED = "_torchdynamo_orig_callable"  # of what torch.compile returns: what it compiles

# first line and column, last line and column; lines count from the function's
Span = tuple[int, int, int, int]
Changes = tuple[tuple[str, tuple[Span, ...]], ...]  # by the name of a submodule: the calls it takes over


def forward_of(cls: type[nn.Module]) -> Any:
    """The forward of a class, below its decorators."""
    return unwrapped(cls.forward)


def unwrapped(function: Any) -> Any:
    """A function below its decorators. One that says `functools.wraps(g)` and calls no g is none."""

    def is_none(outer: Any) -> bool:
        return isinstance(outer, types.FunctionType) and not _calls_wrapped(outer)

    return inspect.unwrap(function, stop=is_none)


def _calls_wrapped(outer: Any) -> bool:
    cells = [c.cell_contents for c in outer.__closure__ or () if c != types.CellType()]
    held = [*cells, *(outer.__defaults__ or ()), *(outer.__kwdefaults__ or {}).values()]
    inner = inspect.unwrap(outer)
    return any(inspect.unwrap(value) is inner for value in held if callable(value))


def without_compile(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of a module below its `torch.compile`; None where there is none."""
    own = vars(module).get("forward")
    outer: Any = own or type(module).forward
    if isinstance(own, types.MethodType):  # such as this function has put there
        return None
    layer = outer
    while hasattr(layer, "__wrapped__") and getattr(layer, COMPILED, None) is not layer.__wrapped__:
        layer = layer.__wrapped__
    if not hasattr(layer, COMPILED):
        return None
    try:
        plain: Any = _rewrap(outer, layer, getattr(layer, COMPILED))
    except SiteError:  # a decorator of another kind is above it
        return None
    return plain if own else types.MethodType(plain, module)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before any rewriting."""
    cls = type(module)
    return cls.__bases__[0] if MARK in vars(cls) else cls


def digest_of(cls: type[nn.Module]) -> str:
    """A hash of the source of the forward of `cls`: spans mean nothing in another source."""
    return read(forward_of(cls)).digest


def keys_of(module: nn.Module) -> list[str]:
    """The names of the submodules that the rewritten forward of a module calls."""
    return [key for key, _ in vars(type(module))[MARK][1]] if MARK in vars(type(module)) else []


def rewritten(cls: type[nn.Module], digest: str, changes: Changes) -> type[nn.Module]:
    """The subclass of `cls` whose forward calls submodules, such as `self.sparta(x)`, instead of ReLUs."""
    function = forward_of(cls)
    for known in type.__subclasses__(cls):
        if vars(known).get(MARK) == (digest, changes) and vars(known)[ORIGIN] == _state(function):
            return known
    source = read(function)
    if source.digest != digest:
        raise SiteError(
            f"the source of {cls.__module__}.{cls.__qualname__}.forward is not the one that was changed; "
            "use that version again, or apply replace_relus to a new model and load the state_dict"
        )
    text = _edit(source, function.__code__, changes)
    filename = f"<sparta {cls.__module__}.{cls.__qualname__} {hashlib.sha256(text).hexdigest()[:12]}>"
    linecache.cache[filename] = len(text), None, text.decode().splitlines(keepends=True), filename
    code = compiled_like(ast.parse(text.decode()), function.__code__, filename)
    forward = _rewrap(cls.forward, function, _with_code(function, code))

    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super(subclass, self).__reduce_ex__(protocol)
        make, args, *rest = reduced
        make, *args = (cls if a is subclass else a for a in (make, *args))
        return _rebuild, (cls, digest, changes, make, tuple(args)), *rest

    body = {
        "forward": forward,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__reduce_ex__": reduce_ex,
        MARK: (digest, changes),
        ORIGIN: _state(function),
    }
    # The same name: some networks, and tools that wrap them, choose by it.
    subclass = _derived(cls, body)
    return subclass


def _state(function: Any) -> tuple[Any, ...]:
    """What a reload may put into the same function."""
    return function, function.__code__, function.__defaults__, function.__kwdefaults__


def _derived(cls: type[nn.Module], body: dict[str, Any]) -> type[nn.Module]:
    """A subclass made past `__init_subclass__` and metaclass, where a class may register its subclasses."""
    meta: Any = type(cls)
    plain = next(m for m in meta.__mro__ if m in (abc.ABCMeta, type))  # what it does is needed, and no more
    try:
        subclass: type[nn.Module] = plain.__new__(meta, cls.__name__, (nn.Module,), body)
        subclass.__bases__ = (cls,)
        return subclass
    except Exception as error:
        raise SiteError(f"{cls.__qualname__} allows no subclass: {type(error).__name__}: {error}") from error


def _rebuild(
    cls: type[nn.Module],
    digest: str,
    changes: Changes,
    make: Callable[..., Any],
    args: tuple[Any, ...],
) -> nn.Module:
    # What pickle and deepcopy call: first a module of the user's class, then of its subclass.
    module: nn.Module = make(*args)
    object.__setattr__(module, "__class__", rewritten(cls, digest, changes))  # past its own __setattr__
    return module


def extended(cls: type[nn.Module], changes: Changes) -> type[nn.Module]:
    """The subclass with these changes too, which are given by places in the forward of `cls` as it is."""
    if MARK not in vars(cls):
        return rewritten(cls, digest_of(cls), changes)
    original = cls.__bases__[0]
    digest, before = vars(cls)[MARK]
    now, then = (forward_of(c) for c in (cls, original))
    places = [span_of(call, then.__code__) for call in read(then).in_order]  # a change keeps their order
    moved = {span_of(call, now.__code__): at for call, at in zip(read(now).in_order, places, strict=True)}
    more = tuple((key, tuple(sorted(moved[span] for span in spans))) for key, spans in changes)
    return rewritten(original, digest, tuple(sorted((*before, *more))))


def argument_of(call: ast.Call) -> ast.expr | None:
    """The input of the ReLU in `F.relu(x)`, `F.relu(input=x)` or `x.relu()`."""
    if call.args:
        return None if isinstance(call.args[0], ast.Starred) else call.args[0]
    if call.keywords:
        return next((k.value for k in call.keywords if k.arg == "input"), None)
    return call.func.value if isinstance(call.func, ast.Attribute) else None


def span_of(node: ast.expr, code: types.CodeType) -> Span:
    """Where an expression of a function is."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    first = code.co_firstlineno
    return node.lineno - first, node.col_offset, node.end_lineno - first, node.end_col_offset


def _edit(source: Source, code: types.CodeType, changes: Changes) -> bytes:
    """The text of the file with the calls changed: what is around their inputs, the last one first."""
    calls = {span_of(call, code): call for call in source.calls.values() if call}
    text, first = b"".join(source.lines), code.co_firstlineno

    def place(line: int, column: int) -> int:
        return sum(map(len, source.lines[: line + first - 1])) + column

    pieces = list[tuple[int, int, int, bytes]]()  # from, depth, to, new: an outer call begins first
    for key, spans in changes:
        for span in spans:
            argument = argument_of(calls[span])
            assert argument is not None
            inner = span_of(argument, code)
            start, left, right, end = map(
                place, (span[0], *inner[::2], span[2]), (span[1], *inner[1::2], span[3])
            )
            pieces.append((start, start - end, left, f"{code.co_varnames[0]}.{key}(".encode()))
            pieces.append((right, 0, end, b")"))
    pieces.sort()
    if any(a[2] > b[0] for a, b in pairwise(pieces)):
        raise SiteError(f"{code.co_name} has one ReLU call inside another; write two lines")
    for start, _, end, new in reversed(pieces):
        text = text[:start] + new + text[end:]
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
    inner, innermost = outer.__wrapped__, new
    new = _rewrap(inner, function, new)
    old = getattr(outer, "__closure__", None) or ()
    held = [cell.cell_contents is inner for cell in old]
    cells = tuple(types.CellType(new) if it else cell for cell, it in zip(old, held, strict=True))
    if not any(held):
        raise SiteError(
            f"a decorator of {function.__qualname__} hides it; only plain wrappers with functools.wraps can "
            "be seen through; or make the call an nn.ReLU of its own"
        )
    copy = types.FunctionType(outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, cells)
    copy.__kwdefaults__ = outer.__kwdefaults__
    functools.update_wrapper(copy, outer)
    vars(copy).update({name: new for name, value in vars(outer).items() if value is inner})  # __wrapped__ too
    vars(copy).update({name: innermost for name, value in vars(outer).items() if value is function})
    return copy
