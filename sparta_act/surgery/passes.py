"""Runs a network on an example, given or deduced, and records the passes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparta_act.errors import SiteError
from sparta_act.surgery.origins import PLAIN
from sparta_act.surgery.randomness import ProcessNumbers
from sparta_act.surgery.recording import Pass, Recorder, parts_of
from sparta_act.surgery.sandbox import (
    TRIES,
    Example,
    Steps,
    as_before,
    call,
    copied,
    tensors_in,
    untouched,
)
from sparta_act.surgery.watching import Watch

SIZES = {3: (64, 1024, 16384), 4: (32, 64, 224, 299, 28), 5: (16, 32, 64)}  # of the example, by its ndim


class _RunError(Exception):
    """The network does not run; `first`: spatial dimensions and channels that its first convolution takes."""

    first = 0, 0


def record(
    model: nn.Module, replaced: list[nn.Module], example: Example | None, undo: Steps | None
) -> tuple[list[Pass], Example]:
    """Passes in evaluation and in training mode, and the example they ran on. Raises `SiteError`.

    `undo`: what `as_before` has returned, if the network will be compared with what it does here.
    """
    look = _Look(model, replaced, undo)
    try:
        if example is None:
            example, passes = _deduced(look)
        else:
            passes = [look.once(example, training) for training in (False, True)]
        return passes + (look.again(example) if look.wanders else []), example
    except _RunError as error:
        raise SiteError(*error.args) from error.__cause__


class _Look:
    """Passes of a network, each of which leaves it as it was."""

    def __init__(self, model: nn.Module, replaced: list[nn.Module], undo: Steps | None) -> None:
        self.model, self._replaced, self._compared = model, replaced, undo is not None
        self._undo = undo or as_before(model)
        self._modules = [*model.modules()]
        self._parts = parts_of(self._modules, replaced)
        self._numbers = ProcessNumbers(model)
        self._before = self._drawn_and_counted()
        self.wanders = False  # whether the next pass may take another path

    def once(self, example: Example, training: bool) -> Pass:
        """One pass, and what the network does in it if it will be compared."""
        watch = Watch()
        with untouched(self.model, self._undo, watch), torch.no_grad():
            seen = self._recorded(example, training, watch)
            self.wanders |= watch.drawn > 0 or self._drawn_and_counted() != self._before
        return seen

    def again(self, example: Example) -> list[Pass]:
        """Passes in training mode, one after the other; the first of them is known."""
        watch = Watch()
        with untouched(self.model, self._undo, watch), torch.no_grad():
            return [self._recorded(example, True, watch) for _ in range(TRIES + 1)][1:]

    def _drawn_and_counted(self) -> list[Any]:
        """What a path may depend on besides the example: random numbers, and what the modules count."""
        values = self._numbers.now()
        for module in self._modules:
            values += [v for k, v in vars(module).items() if type(v) in PLAIN and k != "training"]
        return values

    def _recorded(self, example: Example, training: bool, watch: Watch) -> Pass:
        recorder, given = Recorder(self._parts, training, self._compared), copied(example)
        hooks = [m.register_forward_hook(recorder.replaced) for m in self._replaced]
        try:
            with recorder:
                watch.on = self._compared
                returned = call(self.model, given, training)
                watch.on = False
        except Exception as error:
            shapes = [tuple(t.shape) for t in tensors_in(example)]
            mode = "training" if training else "evaluation"
            failed = _RunError(
                f"the network does not run in {mode} mode on an example of shape {shapes}: "
                f"{type(error).__name__}: {error}\n"
                "Pass an input that it takes in both modes as example=, a tensor, a tuple of several "
                "arguments or a dict of named ones; or operate on a part of it, such as model.backbone of a "
                "detector."
            )
            failed.first = recorder.seen.first
            raise failed from error
        finally:
            for hook in hooks:
                hook.remove()
        if recorder.strangers and any(id(m) in recorder.strangers for m in self.model.modules()):
            raise SiteError("the network makes modules in its first pass; run it once on an input before")
        return recorder.finished([*tensors_in(returned)], watch.calls)


def _deduced(look: _Look) -> tuple[Tensor, list[Pass]]:
    """An example for the convolution that was made first, or else for the one that runs first."""
    conv = next((m for m in look.model.modules() if isinstance(m, _ConvNd)), None)
    if conv is None:
        raise SiteError("this network has no convolution to deduce an input from: pass example=")
    guess = len(conv.kernel_size), conv.in_channels
    try:
        return _sized(look, *guess)
    except _RunError as error:
        if error.first in (guess, (0, 0)):
            raise
        return _sized(look, *error.first)


def _sized(look: _Look, dimensions: int, channels: int) -> tuple[Tensor, list[Pass]]:
    """An example of the first size that shrinks no map to one pixel too early; else the largest that runs."""
    like = next(filter(torch.is_floating_point, look.model.parameters()), torch.empty(0))
    found, problems = None, list[_RunError]()
    for size in SIZES[dimensions + 2]:
        shape = (2, channels, *[size] * dimensions)
        noise = np.random.default_rng(0).random(shape, np.float32)  # numbers of PyTorch's are counted
        example = torch.from_numpy(noise).to(like)
        try:
            # training first: a network that wants more, such as targets, may be slow in evaluation
            passes = [look.once(example, training) for training in (True, False)][::-1]
        except _RunError as error:
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
