"""What the command lines of the scripts share: numbers that make sense, and errors without a traceback."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import torch

from sparta_act import SpartaError


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program with one message where the input is at fault."""
    try:
        yield
    except (SpartaError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def at_least(low: int) -> Callable[[str], int]:
    """Type of an option: a whole number from `low` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"wants a whole number of at least {low}, not {text!r}")
        return int(text)

    return number


def positive(text: str) -> float:
    """Type of an option: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"wants a number above 0, not {text!r}")
    return value


def fraction(text: str) -> float:
    """Type of an option: a perturbation as a fraction of the range 1 of a pixel."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = 0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"wants a fraction of 1, e.g. 8/255, not {text!r}")
    return value


def share(text: str) -> float:
    """Type of an option: a number from 0 up to, not including, 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"wants a number from 0 to below 1, not {text!r}")
    return value


def not_negative(text: str) -> float:
    """Type of an option: 0 or a number above."""
    return 0.0 if text.strip() in ("0", "0.0") else positive(text)


def check_device(device: str) -> None:
    """Raise `ValueError` if torch cannot use the device of `--device` here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is of no use here: {str(error).splitlines()[0]}") from None
