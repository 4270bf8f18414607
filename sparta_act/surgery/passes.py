"""Runs a network on an example, given or deduced, and records the passes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparta_act.errors import SiteError
from sparta_act.surgery.recording import Pass, Recorder
from sparta_act.surgery.sandbox import TRIES, Example, Steps, random_numbers, run, tensors_in, untouched

SIZES = {3: (64, 1024, 16384), 4: (32, 64, 224, 299, 28), 5: (16, 32, 64)}  # of the example, by its ndim


class _RunError(Exception):
    """The network does not run; `first`: spatial dimensions and channels that its first convolution takes."""

    first = 0, 0


def record(
    model: nn.Module, replaced: list[nn.Module], example: Example | None, undo: Steps | None
) -> tuple[list[Pass], Example]:
    """Passes in evaluation and in training mode, and the example they ran on. Raises `SiteError`."""
    try:
        return _record(model, replaced, example, undo)
    except _RunError as error:
        raise SiteError(*error.args) from error.__cause__


def _record(
    model: nn.Module, replaced: list[nn.Module], example: Example | None, undo: Steps | None
) -> tuple[list[Pass], Example]:
    with untouched(model, undo), torch.no_grad():
        before = _drawn_and_counted(model)
        if example is None:
            example, passes = _deduced(model, replaced)
        else:
            passes = [_one_pass(model, replaced, example, training) for training in (False, True)]
        if _drawn_and_counted(model) != before:  # the next pass may take another path: see more of them
            passes += [_one_pass(model, replaced, example, True) for _ in range(TRIES)]
    return passes, example


def _drawn_and_counted(model: nn.Module) -> list[Any]:
    """What a path may depend on besides the example: random numbers, and what the modules count."""
    own = (item for m in model.modules() for item in vars(m).items() if item[0] != "training")
    return [random_numbers(model), [v for _, v in own if v is None or isinstance(v, int | float | str)]]


def _one_pass(model: nn.Module, replaced: list[nn.Module], example: Example, training: bool) -> Pass:
    recorder = Recorder(model, replaced, training)
    hooks = [m.register_forward_hook(recorder.replaced) for m in replaced]
    try:
        with recorder:
            run(model, example, training)
    except Exception as error:
        shapes = [tuple(t.shape) for t in tensors_in(example)]
        mode = "training" if training else "evaluation"
        failed = _RunError(
            f"the network does not run in {mode} mode on an example of shape {shapes}: "
            f"{type(error).__name__}: {error}\n"
            "Pass an input that it takes in both modes as example=, a tensor, a tuple of several arguments "
            "or a dict of named ones; or operate on a part of it, such as model.backbone of a detector."
        )
        failed.first = recorder.seen.first
        raise failed from error
    finally:
        for hook in hooks:
            hook.remove()
    return recorder.finished()


def _deduced(model: nn.Module, replaced: list[nn.Module]) -> tuple[Tensor, list[Pass]]:
    """An example for the convolution that was made first, or else for the one that runs first."""
    conv = next((m for m in model.modules() if isinstance(m, _ConvNd)), None)
    if conv is None:
        raise SiteError("this network has no convolution to deduce an input from: pass example=")
    guess = len(conv.kernel_size), conv.in_channels
    try:
        return _sized(model, replaced, *guess)
    except _RunError as error:
        if error.first in (guess, (0, 0)):
            raise
        return _sized(model, replaced, *error.first)


def _sized(
    model: nn.Module, replaced: list[nn.Module], dimensions: int, channels: int
) -> tuple[Tensor, list[Pass]]:
    """An example of the first size that shrinks no map to one pixel too early; else the largest that runs."""
    like = next(model.parameters(), torch.empty(0))
    found, problems = None, list[_RunError]()
    for size in SIZES[dimensions + 2]:
        shape = (2, channels, *[size] * dimensions)
        noise = np.random.default_rng(0).random(
            shape, np.float32
        )  # no number of PyTorch's, which are counted
        example = torch.from_numpy(noise).to(like)
        try:
            # training first: a network that wants more, such as targets, may be slow in evaluation
            passes = [_one_pass(model, replaced, example, training) for training in (True, False)][::-1]
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
