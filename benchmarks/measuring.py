"""What the benchmarks share: contenders timed in turn, multiply-adds, bytes saved for backward."""

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

from examples.paper.common.cli import at_least, check_device
from examples.paper.common.console import stamp


class Lap(NamedTuple):
    """Median time of a contender, and of its times divided by the first one's in the same round."""

    seconds: float
    ratio: float
    spread: tuple[float, float]  # lowest and highest ratio

    def format_ratio(self) -> str:
        """Ratio and its range."""
        return f"{self.ratio:.2f} ({self.spread[0]:.2f}-{self.spread[1]:.2f})"

    def format_speed(self) -> str:
        """How many times as fast as the first, and the range."""
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
    """Time each contender once per round, in turn, after `warm_up` untimed rounds.

    Ratios are taken within a round, under the same load. `clock`: `time.process_time` counts the CPU time of
    this process alone, so that other programs disturb less.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    with tqdm(total=(rounds + warm_up) * len(names), desc=title, unit="lap", leave=False) as bar:
        for i in range(rounds + warm_up):
            for name in names[i % len(names) :] + names[: i % len(names)]:  # another first each time
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

    A benchmark is to compare two forms of one function, not two functions.
    """
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))
    if not worst < 1e-9:
        raise ValueError(f"{what} differ by {worst:.1e}, more than 1e-9: two functions are not compared")
    return worst


def saved_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that autograd saves in `call` for backward, parameters and buffers of `model` aside."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def save(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # held, so that no other gets its address
        return t

    with saved_tensors_hooks(save, lambda t: t):
        result = call()
    del result
    return sum(storage.nbytes() for storage in saved.values())


class _Count(TorchDispatchMode):
    """`FlopCounterMode` for gradients of leaves by `torch.autograd.grad`, which torch's own refuses."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def multiply_adds(call: Callable[[], object]) -> int:
    """Multiply-adds of the convolutions and matrix products in `call`."""
    with _Count() as counter, sdpa_kernel(SDPBackend.MATH):  # torch cannot count fused attention on CPUs
        call()
    return counter.total // 2


def add_options(p: argparse.ArgumentParser, rounds: int) -> None:
    """Options of a benchmark with a race: --rounds, --threads, --device."""
    p.add_argument("--rounds", type=at_least(1), default=rounds, help="timed rounds (default %(default)s)")
    add_machine(p)


def add_machine(p: argparse.ArgumentParser) -> None:
    """Options of every benchmark: --threads, --device."""
    p.add_argument(
        "--threads",
        type=at_least(1),
        default=1,
        help="CPU threads; with several, waiting distorts the ratios (default %(default)s)",
    )
    p.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default here: %(default)s)",
    )


def begin(args: argparse.Namespace) -> None:
    """Seed and threads of this process, as the command line says. Raises `ValueError` for no device here."""
    check_device(args.device)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True


def hold_memory() -> None:
    """Let this process keep the memory it frees, where the C library is glibc.

    Otherwise glibc returns large blocks to the system and requests them again. Which contender pays for that
    depends on their order alone.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)
        mallopt(mmap_threshold, 32 * 2**20)  # the largest allowed


def format_setup(args: argparse.Namespace) -> str:
    """Threads, rounds, seed, machine, torch and date of a measurement, in one line."""
    options = {name: str(value) for name, value in vars(args).items() if name in ("threads", "rounds")}
    return "; ".join(f"{name} {value}" for name, value in {**options, "seed": "0", **stamp()}.items())


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
