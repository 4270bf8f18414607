"""What the benchmarks share: contenders timed in turn in one process, and what a backward pass keeps."""

import argparse
import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from examples.paper.common.cli import at_least
from examples.paper.common.console import stamp


class Lap(NamedTuple):
    """Median time of a contender, and of its times divided by the first one's in the same round."""

    seconds: float
    ratio: float
    spread: tuple[float, float]  # lowest and highest ratio

    def told(self) -> str:
        """Ratio and its range as text."""
        return f"{self.ratio:.2f} ({self.spread[0]:.2f}-{self.spread[1]:.2f})"

    def speed(self) -> str:
        """How many times as fast as the first, and the range, as text."""
        low, high = (1 / r for r in reversed(self.spread))
        return f"{1 / self.ratio:.2f} ({low:.2f}-{high:.2f})"


def race(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    title: str,
    *,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Lap]:
    """Time each contender once a round, in turn, after `warm_up` rounds that do not count.

    A ratio is taken within a round, where the machine was the same for all. `clock`: with
    `time.process_time` other programs count less, but it is of this process's CPU alone.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    with tqdm(total=(rounds + warm_up) * len(names), desc=title, unit="lap", leave=False) as bar:
        for i in range(rounds + warm_up):
            for name in names[i % len(names) :] + names[: i % len(names)]:  # nobody is always first
                _wait()
                began = clock()
                contenders[name]()
                _wait()
                times[name].append(clock() - began)
                bar.update()
    laps = {}
    for name in names:
        ratios = [
            t / first for t, first in zip(times[name][warm_up:], times[names[0]][warm_up:], strict=True)
        ]
        spread = min(ratios), max(ratios)
        laps[name] = Lap(statistics.median(times[name][warm_up:]), statistics.median(ratios), spread)
    return laps


def check_equal(found: Iterable[Tensor], expected: Iterable[Tensor], what: str) -> float:
    """Largest relative difference of two lists of float64 tensors. Raises `ValueError` above 1e-9.

    Then a benchmark would compare the times of two functions.
    """
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))
    if not worst < 1e-9:
        raise ValueError(f"{what} differ by {worst:.1e}: the times would be of two functions")
    return worst


def kept_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that autograd keeps from `call` until its backward; the model's own tensors do not count."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # alive, so that its address stays its own
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        result = call()
    del result
    return sum(storage.nbytes() for storage in kept.values())


class _Count(TorchDispatchMode):
    """Counts as torch's `FlopCounterMode`, which refuses gradients of leaves by `torch.autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def multiply_adds(call: Callable[[], object]) -> int:
    """Multiply-adds of the convolutions and matrix products in `call`."""
    with _Count() as counter, sdpa_kernel(SDPBackend.MATH):  # torch knows no count of CPUs' fused attention
        call()
    return counter.total // 2


def add_options(p: argparse.ArgumentParser, rounds: int) -> None:
    """Options of a benchmark that races: --rounds, --threads, --device."""
    p.add_argument("--rounds", type=at_least(1), default=rounds, help="to time (default %(default)s)")
    add_machine(p)


def add_machine(p: argparse.ArgumentParser) -> None:
    """Options of every benchmark: --threads, --device."""
    p.add_argument(
        "--threads",
        type=at_least(1),
        default=1,
        help="of the CPU; several that wait for each other spoil ratios (default %(default)s)",
    )
    p.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default here: %(default)s)",
    )


def device(text: str) -> str:
    """Type of an option: a device that this machine has."""
    try:
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from None
    return text


def begin(args: argparse.Namespace) -> None:
    """Seed and threads of this process, as the command line says."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True


def hold_memory() -> None:
    """Let freed memory stay with this process, where that can be asked for.

    glibc returns large blocks to the system and asks for them again, which costs one contender more than
    another by pure chance of order.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)
        mallopt(mmap_threshold, 32 * 2**20)  # the largest it takes


def changed(found: Tensor, base: Tensor) -> str:
    """How many images are wrong in one outcome alone, and how many in the other, (N,) of bool, as text."""
    more, fewer = (int(t.sum()) for t in (found & ~base, base & ~found))
    return f"{more}, {fewer}"


def told(args: argparse.Namespace) -> str:
    """Where and when these figures were measured, as one line."""
    asked = {name: str(value) for name, value in vars(args).items() if name in ("threads", "rounds")}
    how = {**asked, "seed": "0", **stamp()}
    return "; ".join(f"{what} {value}" for what, value in how.items())


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
