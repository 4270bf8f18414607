"""Shared by the command lines: checked numbers, and errors without a traceback."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch

from sparta_act import SpartaError

MEMORY = re.compile("out of memory|allocate memory|not enough memory", re.IGNORECASE)  # in torch's errors

# choices of `--compile`, as arguments of `torch.compile`; the last two record CUDA graphs, so that small
# batches do not wait for the CPU
COMPILERS: dict[str, dict[str, Any]] = {
    "default": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "cudagraphs": {"backend": "cudagraphs"},  # no code generation: ready in seconds
}


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program with one line, without a traceback, for errors in the input, the disk or the memory."""
    try:
        yield
    except (SpartaError, ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not MEMORY.search(str(error)):
            raise  # a bug
        text = str(error).partition("\n")[0]
        raise SystemExit(
            f"error: out of memory ({text}); a smaller --batch-size, --width or --limit needs less"
        ) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def number(parse: Callable[[str], Any], accepts: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """An `argparse` type that parses and checks a number; `what` describes it in the error."""

    def read(text: str) -> Any:
        try:
            value = parse(text)
        except (ValueError, ZeroDivisionError):
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value

    return read


def at_least(low: int) -> Callable[[str], int]:
    """An `argparse` type: a whole number of at least `low`."""
    return number(int, lambda n: n >= low, f"a whole number of at least {low}")


seed = number(int, lambda n: -(2**63) <= n < 2**63, "a whole number of 64 bits")
positive = number(float, lambda n: 0 < n < math.inf, "a number above 0")
not_negative = number(float, lambda n: 0 <= n < math.inf, "a number of at least 0")
share = number(float, lambda n: 0 <= n < 1, "a number of at least 0 and below 1")
fraction = number(lambda text: float(Fraction(text)), lambda n: 0 < n <= 1, "a fraction of 1, e.g. 8/255")


def check_device(device: str) -> None:
    """Raise `ValueError` if torch cannot use this `--device` on this machine."""
    try:
        torch.zeros(1, device=device).item()  # `meta` has no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"cannot use --device {device} on this machine: {str(error).splitlines()[0]}"
        ) from None
