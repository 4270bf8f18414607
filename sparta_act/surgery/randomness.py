"""The random numbers of a pass: its own, so that nobody else's are drawn, or drawn twice."""

import functools
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SEEDED = torch.Tag.nondeterministic_seeded
FILLING = {"rand_like": "uniform_", "randn_like": "normal_"}  # which take no generator in older versions
GLANCES = 100  # at numbers that another thread may draw, a millisecond between two


class OwnNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, PyTorch draws from generators of this mode; its first numbers are always the same."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch imports its compiler, which takes seconds

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn = 0  # how often
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _draws(func):
            return func(*args, **kwargs)
        tensors = [a for a in args if isinstance(a, Tensor)]
        device = tensors[0].device if tensors else torch.device(kwargs.get("device") or "cpu")
        if device.type == "meta":
            return func(*args, **kwargs)
        self.drawn += 1
        generator = self._generator(device)
        if (seeded := _with_generator(func)) is None:
            if fill := FILLING.get(func.overloadpacket.__name__):
                return getattr(torch.empty_like(*args, **kwargs), fill)(generator=generator)
            with _lent(generator):
                return func(*args, **kwargs)
        names = [a.name for a in seeded._schema.arguments[: len(args)]]
        if "generator" in names:
            at = names.index("generator")
            args = (*args[:at], args[at] or generator, *args[at + 1 :])
        elif kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": generator}
        return seeded(*args, **kwargs)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(0)
        return self._generators[device]


@functools.cache  # a comparison of tags takes as long as a call
def _draws(func: Any) -> bool:
    return SEEDED in getattr(func, "tags", ())


def _with_generator(func: Any) -> Any:
    """The overload of a function that takes a generator; None if there is none."""
    overload = func._overloadname
    for name in (overload, "generator" if overload == "default" else f"{overload}_generator"):
        found = getattr(func.overloadpacket, name, None)
        if found is not None and any(a.name == "generator" for a in found._schema.arguments):
            return found
    return None


@contextmanager
def _lent(generator: torch.Generator) -> Iterator[None]:
    """Inside, the process draws from the generator, for the few functions that take none."""
    device = generator.device
    process: Any = torch if device.type == "cpu" else getattr(torch, device.type)
    where = () if device.type == "cpu" else (device,)
    before = process.get_rng_state(*where)
    process.set_rng_state(generator.get_state(), *where)
    try:
        yield
    finally:
        generator.set_state(process.get_rng_state(*where))
        process.set_rng_state(before, *where)


class ProcessNumbers:
    """The states of the generators of Python, numpy and PyTorch that everybody draws from."""

    def __init__(self, model: nn.Module) -> None:
        gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        tensors = (*model.parameters(), *model.buffers()) if gpu else ()
        self._gpus = sorted({t.device.index for t in tensors if t.is_cuda})
        self._before = self._states()

    def restore(self) -> None:
        """Put them back, unless another thread draws from them: it would get the same numbers again."""
        if self.now() == _comparable(self._before) or self._others_draw():
            return
        python, numpy, cpu, *gpus = self._before
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for gpu, state in zip(self._gpus, gpus, strict=True):
            torch.cuda.set_rng_state(state, gpu)

    def now(self) -> list[Any]:
        """What is equal to an earlier answer if nobody has drawn since."""
        return _comparable(self._states())

    def _states(self) -> list[Any]:
        gpus = [torch.cuda.get_rng_state(gpu) for gpu in self._gpus]
        return [random.getstate(), np.random.get_state(), torch.get_rng_state(), *gpus]  # noqa: NPY002

    def _others_draw(self) -> bool:
        """Whether they change while this thread does nothing. Each sleep lets the others go first."""
        if threading.active_count() == 1:
            return False
        before = self.now()
        for _ in range(GLANCES):
            time.sleep(1e-3)
            if self.now() != before:
                return True
        return False


def _comparable(states: list[Any]) -> list[Any]:
    python, (name, keys, *rest), *of_torch = states
    return [python, name, keys.tobytes(), *rest, *(state.numpy().tobytes() for state in of_torch)]
