"""Records the activations, and a few other calls, that a network makes in one pass."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from sparta_act.surgery.kinds import kind_of, spelled
from sparta_act.surgery.origins import KERNEL, SHAPED, Call, Origins, constants_of, family, made_by, pixels
from sparta_act.surgery.rewriting import forward_of
from sparta_act.surgery.sandbox import Like, call, like_of, tensors_in

# What is on the stack between a forward and what it calls: nn.Module's __call__, nn.ReLU, F.relu.
ACTIVATIONS = nn.ReLU.forward.__code__.co_filename
PLUMBING = {ACTIVATIONS} | {
    m.__code__.co_filename for m in (nn.Module.register_buffer, F.relu, torch.overrides.handle_torch_function)
}
DETERMINED = {"convolution", "addition", "norm", "largest", "average"}  # families that draw nothing
SIMPLE = {Tensor, nn.Parameter, int, float, bool, str, tuple, type(None)}  # arguments that hide nothing
OUTSIDE = call.__code__  # of who runs the network
TWICE = nn.Module._call_impl.__code__  # its caller holds the same module
OF_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


class Frame(NamedTuple):
    """A function in the middle of a call."""

    module: int  # the id of the module it runs for: its first argument, or that of the function around it
    code: CodeType
    at: int  # offset in the bytecode


class Event(NamedTuple):
    """One call in a pass: an activation, an addition, a convolution or one of our modules."""

    kind: str  # "add", "conv", "replaced", or the name of the activation
    modules: tuple[nn.Module, ...]  # running at that moment, outermost first; the activation is left out
    shape: tuple[int, ...] = ()
    no_map: str = ""  # why the input is no feature map, (N, C, ...) made from the network's; empty if it is
    operands: tuple[frozenset[int], ...] = ()  # for each input: the events that it comes from directly
    at: tuple[int, ...] = ()  # for each of `modules`: where its forward was, as an offset; -1 if unknown
    like: Like | None = None  # of the input
    original: Callable[[Tensor], Tensor] | None = None  # what an activation computes
    act: nn.Module | None = None  # the module of torch.nn, such as nn.ReLU, that made the call; or ours
    key: str = ""  # of that module in the Sequential that runs it
    offset: int = (
        -1
    )  # of the call in the bytecode of the forward of `modules[-1]`; -1: another function calls
    via: str = ""  # that function, and where it is
    frames: tuple[Frame, ...] = ()  # the functions that were running, the innermost first; none of torch

    @property
    def on_map(self) -> bool:
        """Whether the input is a feature map."""
        return not self.no_map

    @property
    def place(self) -> tuple[object, ...]:
        """What distinguishes this call from others of the same pass."""
        return self.kind, id(self.act), self.key, id(self.modules[-1]), self.offset

    @property
    def caller(self) -> tuple[object, ...]:
        """The activation's module, and the module that called it."""
        return id(self.act), self.key, id(self.modules[-1])


@dataclass
class Pass:
    """What happened in one forward pass."""

    training: bool
    events: list[Event] = field(default_factory=list)
    pinched: bool = False  # a map shrank to one pixel, or was added as one: a larger example is safer
    first: tuple[int, int] = (0, 0)  # spatial dimensions and channels of what the first convolution takes
    returned: Sequence[Tensor] = ()
    calls: Sequence[object] = ()  # of PyTorch's operators, if they were noted

    @cached_property
    def counts(self) -> Counter[object]:
        """How often each place and each caller of an activation occurs, once all events are there."""
        calls = [event for event in self.events if event.original]
        return Counter([e.place for e in calls] + [e.caller for e in calls])

    @cached_property
    def inside(self) -> dict[int, list[int]]:
        """By the id of a module, the numbers of the events inside it, once all events are there."""
        found: dict[int, list[int]] = {}
        for number, event in enumerate(self.events):
            for module in {id(m) for m in event.modules}:
                found.setdefault(module, []).append(number)
        return found


class Parts(NamedTuple):
    """What a network is made of before its passes; tensors and modules by their ids."""

    registered: set[int]  # modules
    modules: set[int]  # of these, all but wrappers
    replaced: set[int]  # modules that earlier replacements put in
    constants: set[int]
    dimensions: set[int]  # of the maps, by the network's convolutions


def parts_of(modules: list[nn.Module], replaced: list[nn.Module]) -> Parts:
    """The parts of a network of these modules; whoever uses them must keep it whole."""
    return Parts(
        {*map(id, modules)},
        {id(m) for m in modules if wrapped(m) is None},
        {*map(id, replaced)},
        constants_of(modules),
        {len(m.kernel_size) + 2 for m in modules if isinstance(m, _ConvNd)} or {4},
    )


class Recorder(TorchFunctionMode):
    """Inside, the calls of a network are recorded in `seen`; those inside replaced modules are left out.

    `watched`: whether a dispatch mode around it needs to see all calls, and not only those that may draw.
    """

    def __init__(self, parts: Parts, training: bool, watched: bool) -> None:
        super().__init__()
        self.seen, self._parts, self._watched = Pass(training), parts, watched
        self.strangers: dict[int, nn.Module] = {}  # those that ran and were not registered before
        self._runs = Counter[tuple[int, int]]()
        self._origins = Origins(parts.constants, parts.dimensions)
        self._codes = _Codes()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]  # relu, also of torch.ops.aten.relu.default
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if (does := family(name)) == "shape":
            return func(*args, **kwargs)
        x = args[0] if args else kwargs.get("input")
        shape = tuple(x.shape) if isinstance(x, Tensor) else ()
        event: Event | None = None
        if (kind := spelled(name)) and isinstance(x, Tensor):
            more, named = args[1:], {k: v for k, v in kwargs.items() if k != "input"}
            event = self._noted(kind, (x,), lambda x: func(x, *more, **named))
        elif does == "addition" and len(args) > 1 and shape == getattr(args[1], "shape", None):
            event = self._noted("add", (x, args[1]))
            self.seen.pinched |= len(shape) in self._parts.dimensions and pixels(shape) == 1
        elif does == "convolution":
            self._first_convolution(name, x, args, kwargs)
        known = (does in DETERMINED or (kind and kind != "rrelu")) and not self._watched
        if known and all(type(a) in SIMPLE for a in (*args, *kwargs.values())):
            with torch._C._DisableTorchDispatch():  # no random numbers, and nobody else looks: twice as fast
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if does == "convolution":
            event = self._noted("conv", (x,))
            kernel = args[1] if len(args) > 1 else kwargs["weight"]
            wide = kernel.shape[2:].numel() > 1 or pixels(shape) > 1
            self.seen.pinched |= result.shape[2:].numel() == 1 and wide
        elif does in ("largest", "average") and isinstance(result, Tensor):
            self.seen.pinched |= result.shape[2:].numel() == 1 < pixels(shape)
        self._origins.follow(Call(name, does, func, args, kwargs), result)
        if event and isinstance(result, Tensor):
            self._made(result, kind is not None)
        return result

    def finished(self, returned: list[Tensor], calls: list[object]) -> Pass:
        """The pass, once it is over: what became a kernel, and nothing else, was no feature map."""
        self.seen.returned, self.seen.calls = returned, calls
        read = {n for e in self.seen.events if e.kind != "add" for sources in e.operands for n in sources}
        for number in self._origins.kernels - read:
            event = self.seen.events[number]
            if event.no_map in ("", SHAPED):
                self.seen.events[number] = event._replace(no_map=KERNEL)
        return self.seen

    def replaced(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Note, as a forward hook, that one of our modules has returned this."""
        tensors = [*tensors_in(output)][:1]
        if tensors and (event := self._noted("replaced", tensors)):
            self.seen.events[-1] = event._replace(act=module)
            self._made(tensors[0], activated=True)

    def _made(self, result: Tensor, activated: bool) -> None:
        number = len(self.seen.events) - 1
        self._origins.put(result, made_by(number, self._origins.of(result), activated))

    def _first_convolution(self, name: str, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.seen.first != (0, 0) or not self._origins.of(x).of_input:
            return
        kernel = args[1] if len(args) > 1 else kwargs["weight"]
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        channels = kernel.shape[0] if "transpose" in name else kernel.shape[1] * groups
        self.seen.first = kernel.ndim - 2, channels

    def _noted(
        self,
        kind: str,
        inputs: Sequence[Tensor],
        original: Callable[[Tensor], Tensor] | None = None,
    ) -> Event | None:
        """Append an event and return it, unless it happens inside one of our own modules."""
        frame: FrameType | None = sys._getframe(2)
        act = None
        while frame and frame.f_code.co_filename in PLUMBING:
            if frame.f_code.co_filename == ACTIVATIONS and frame.f_code.co_name == "forward":
                act = frame.f_locals["self"]
                kind = kind_of(act) or kind
            frame = frame.f_back
        (running, frames), parts = self._running(frame), self._parts
        if act is not None:
            running = [(m, at) for m, at in running if m is not act]
        modules = [m for m, _ in running if id(m) in parts.modules]
        if len(modules) < len(running):
            self.strangers |= {id(m): m for m, _ in running if id(m) not in parts.registered}
        if not modules or (parts.replaced and not parts.replaced.isdisjoint(map(id, (*modules, act)))):
            return None
        shapes, origins = [tuple(t.shape) for t in inputs], [*map(self._origins.of, inputs)]
        no_map = next(filter(None, map(self._origins.why_no_map, shapes, origins)), "")
        more: tuple[Any, ...] = ()
        if kind not in ("add", "conv"):
            more = (tuple(at for m, at in running if id(m) in parts.modules),)
        if original:
            owner = modules[-1]
            where = self._where(owner, frame)
            more += like_of(inputs[0], owner), original, act, self._key(act, owner), *where
        event = Event(kind, tuple(modules), shapes[0], no_map, tuple(o.sources for o in origins), *more)
        event = event._replace(frames=tuple(frames)) if more else event
        self.seen.events.append(event)
        return event

    def _where(self, owner: nn.Module, frame: FrameType | None) -> tuple[int, str]:
        """The offset of the call in the forward of `owner`, or the other function that calls."""
        if frame is None:
            return -1, ""
        if frame.f_code is self._codes[type(owner)]:
            return frame.f_lasti, ""
        return -1, f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"

    def _running(self, frame: FrameType | None) -> tuple[list[tuple[nn.Module, int]], list[Frame]]:
        """The modules whose functions are on the stack, the outermost first, and where their forwards are.

        And the functions, the innermost first.
        """
        found, frames, inside = list[tuple[nn.Module, int]](), list[Frame](), list[tuple[CodeType, int]]()
        while frame is not None and (code := frame.f_code) is not OUTSIDE:
            if not (inside or frames) or not code.co_filename.startswith(OF_TORCH):
                inside.append((code, frame.f_lasti))
            if code.co_argcount and code is not TWICE:
                first = frame.f_locals.get(code.co_varnames[0])
                if isinstance(first, nn.Module):
                    if not found or first is not found[-1][0]:
                        found.append((first, -1))
                    if code is self._codes[type(first)]:
                        found[-1] = first, frame.f_lasti
                    frames += [Frame(id(first), *one) for one in inside]
                    inside.clear()
            frame = frame.f_back
        return found[::-1], frames

    def _key(self, act: nn.Module | None, owner: nn.Module) -> str:
        """The key of `act` in a Sequential, which runs its children in turn, also one that it holds twice."""
        if act is None or type(owner).forward is not nn.Sequential.forward:
            return ""
        keys = [key for key, child in owner._modules.items() if child is not None and inner(child) is act]
        self._runs[id(act), id(owner)] += 1
        return keys[(self._runs[id(act), id(owner)] - 1) % len(keys)] if keys else ""


class _Codes(dict[type[nn.Module], Any]):
    """The code objects of forwards, by class; each is looked up once."""

    def __missing__(self, cls: type[nn.Module]) -> Any:
        return self.setdefault(cls, code_of(cls))


def inner(module: nn.Module) -> nn.Module:
    """The module inside nn.DataParallel and torch.compile."""
    while (child := wrapped(module)) is not None:
        module = child
    return module


def wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper of nn.DataParallel or torch.compile holds; None for any other module."""
    return module._modules.get("module" if isinstance(module, nn.DataParallel) else "_orig_mod")


def code_of(cls: type[nn.Module]) -> Any:
    """The code object of the forward of `cls`, below its decorators; None if it has none."""
    return getattr(forward_of(cls), "__code__", None)
