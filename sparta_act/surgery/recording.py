"""Records the activations, and a few other calls, that a network makes on a small example."""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from sparta_act.errors import SiteError
from sparta_act.surgery.kinds import kind_of, spelled
from sparta_act.surgery.rewriting import forward_of
from sparta_act.surgery.sandbox import TRIES, Example, like_of, random_numbers, run, tensors_in, untouched

SIZES = {3: (64, 1024, 16384), 4: (32, 64, 224, 299, 28), 5: (16, 32, 64)}  # of the example, by its ndim
ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
CONVOLUTIONS = {f"conv{transposed}{d}d" for transposed in ("", "_transpose") for d in (1, 2, 3)}
POOLS = re.compile(r"_?(max|avg|lp)_pool[123]d(_with_indices)?")
# What is on the stack between a forward and what it calls: nn.Module's __call__, nn.ReLU, F.relu.
ACTIVATIONS = nn.ReLU.forward.__code__.co_filename
PLUMBING = {ACTIVATIONS} | {
    m.__code__.co_filename for m in (nn.Module.register_buffer, F.relu, torch.overrides.handle_torch_function)
}


@dataclass(frozen=True)
class Event:
    """One call in a pass: an activation, an addition, a convolution or one of our modules."""

    kind: str  # "add", "conv", "replaced", or the name of the activation
    modules: tuple[nn.Module, ...]  # running at that moment, outermost first; the activation is left out
    shape: tuple[int, ...] = ()
    no_map: str = ""  # why the input is no feature map, (N, C, ...) of more than one pixel; empty if it is
    like: Tensor | None = None  # empty, with the device and dtype of the input
    original: Callable[[Tensor], Tensor] | None = None  # what an activation computes
    act: nn.Module | None = None  # the module of torch.nn, such as nn.ReLU, that made the call
    offset: int = (
        -1
    )  # of the call in the bytecode of the forward of `modules[-1]`; -1: another function calls
    via: str = ""  # that function, and where it is

    @property
    def on_map(self) -> bool:
        """Whether the input is a feature map."""
        return not self.no_map

    @property
    def place(self) -> tuple[object, ...]:
        """What distinguishes this call from others of the same pass."""
        return self.kind, id(self.act), id(self.modules[-1]), self.offset

    @property
    def caller(self) -> tuple[object, ...]:
        """The activation's module, and the module that called it."""
        return id(self.act), id(self.modules[-1])


@dataclass
class Pass:
    """What happened in one forward pass."""

    training: bool
    # For each ndim of the convolutions: was the last layer of that ndim one? nn.Linear has channels last.
    channels_second: dict[int, bool]
    events: list[Event] = field(default_factory=list)
    pinched: bool = False  # a map shrank to one pixel, or was added as one: a larger example is safer

    @cached_property
    def counts(self) -> Counter[object]:
        """How often each place and each caller occurs, once all events are there."""
        return Counter(key for event in self.events for key in (event.place, event.caller))


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, replaced: list[nn.Module], training: bool) -> None:
        super().__init__()
        convolutions = {len(m.kernel_size) + 2: True for m in model.modules() if isinstance(m, _ConvNd)}
        self.seen = Pass(training, convolutions or {4: True})
        self._known = {id(m) for m in model.modules()}
        self._replaced = {id(m) for m in replaced}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        x = args[0] if args else kwargs.get("input")
        shape = tuple(x.shape) if isinstance(x, Tensor) else ()
        if (kind := spelled(name)) and isinstance(x, Tensor):
            more, named = args[1:], {k: v for k, v in kwargs.items() if k != "input"}
            self.note(kind, shape, x, lambda x: func(x, *more, **named))
        elif name in ADDITIONS and len(args) > 1 and shape == getattr(args[1], "shape", None):
            self.note("add", shape)
            self.seen.pinched |= len(shape) in self.seen.channels_second and math.prod(shape[2:]) == 1
        result = func(*args, **kwargs)
        if name in CONVOLUTIONS:
            self.seen.channels_second[result.ndim] = True
            self.note("conv", tuple(result.shape))
            kernel = args[1] if len(args) > 1 else kwargs["weight"]
            wide = kernel.shape[2:].numel() > 1 or math.prod(shape[2:]) > 1
            self.seen.pinched |= result.shape[2:].numel() == 1 and wide
        elif POOLS.fullmatch(name) and isinstance(result, Tensor):
            self.seen.pinched |= result.shape[2:].numel() == 1 < math.prod(shape[2:])
        elif func is F.linear and result.ndim in self.seen.channels_second:
            self.seen.channels_second[result.ndim] = False
        return result

    def note(
        self,
        kind: str,
        shape: tuple[int, ...],
        x: Tensor | None = None,
        original: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Append an event, unless it happens inside one of our own modules."""
        frame: FrameType | None = sys._getframe(2)
        act = None
        while frame and frame.f_code.co_filename in PLUMBING:
            if frame.f_code.co_filename == ACTIVATIONS and frame.f_code.co_name == "forward":
                act = frame.f_locals["self"]
                kind = kind_of(act) or kind
            frame = frame.f_back
        modules = [m for m in _running(frame) if id(m) in self._known][::-1]
        if not modules or any(id(m) in self._replaced for m in (*modules, act)):
            return
        offset, via = -1, ""
        if frame:
            if frame.f_code is code_of(type(modules[-1])):
                offset = frame.f_lasti
            else:
                via = f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
        like = like_of(x, modules[-1]) if x is not None else None
        no_map = self._why_no_map(shape)
        self.seen.events.append(Event(kind, tuple(modules), shape, no_map, like, original, act, offset, via))

    def _why_no_map(self, shape: tuple[int, ...]) -> str:
        if len(shape) not in self.seen.channels_second:
            return "outside maps"
        if not self.seen.channels_second[len(shape)]:
            return "on maps with channels last"
        return "" if math.prod(shape[2:]) > 1 else "on single pixels of this example"


def code_of(cls: type[nn.Module]) -> Any:
    """The code object of the forward of `cls`, below its decorators; None if it has none."""
    return getattr(forward_of(cls), "__code__", None)


def _running(frame: FrameType | None) -> Iterator[nn.Module]:
    last = None
    while frame is not None:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, nn.Module) and first is not last:
            yield first
            last = first
        frame = frame.f_back


def record(
    model: nn.Module, replaced: list[nn.Module], example: Example | None
) -> tuple[list[Pass], Example]:
    """Passes in evaluation and in training mode, and the example they ran on."""
    with untouched(model), torch.no_grad():
        if example is None:
            example, passes = _deduced(model, replaced)
        else:
            passes = [_one_pass(model, replaced, example, training) for training in (False, True)]
        before = random_numbers(model)
        passes.append(_one_pass(model, replaced, example, True))
        if random_numbers(model) != before:  # the path may be drawn at random: see more of them
            passes += [_one_pass(model, replaced, example, True) for _ in range(TRIES)]
    return passes, example


def _one_pass(model: nn.Module, replaced: list[nn.Module], example: Example, training: bool) -> Pass:
    recorder = _Recorder(model, replaced, training)
    hooks = [
        m.register_forward_hook(lambda _, x, y: recorder.note("replaced", tuple(y.shape))) for m in replaced
    ]
    try:
        with recorder:
            run(model, example, training)
    except Exception as error:
        shapes = [tuple(t.shape) for t in tensors_in(example)]
        mode = "training" if training else "evaluation"
        raise SiteError(
            f"the network does not run in {mode} mode on an example of shape {shapes}: "
            f"{type(error).__name__}: {error}\n"
            "Pass an input that it takes in both modes as example=, a tensor, a tuple of several arguments "
            "or a dict of named ones; or operate on a part of it, such as model.backbone of a detector."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return recorder.seen


def _deduced(model: nn.Module, replaced: list[nn.Module]) -> tuple[Tensor, list[Pass]]:
    """An example of the first size that shrinks no map to one pixel too early; else the largest that runs."""
    conv = next((m for m in model.modules() if isinstance(m, _ConvNd)), None)
    if conv is None:
        raise SiteError("this network has no convolution to deduce an input from: pass example=")
    dimensions, like = len(conv.kernel_size), next(model.parameters(), torch.empty(0))
    found, problems = None, []
    for size in SIZES[dimensions + 2]:
        shape = (2, conv.in_channels, *[size] * dimensions)
        example = torch.rand(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like)
        try:
            # training first: a network that wants more, such as targets, may be slow in evaluation
            passes = [_one_pass(model, replaced, example, training) for training in (True, False)][::-1]
        except SiteError as error:
            problems.append(error)
            continue
        pinched = any(p.pinched for p in passes)
        if found is None or not pinched or size > found[0].shape[2]:
            found = example, passes
        if not pinched:
            break
    if found is None:
        raise problems[0]
    return found
