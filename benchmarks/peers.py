"""Other people's libraries, which the benchmarks compare with where they are installed."""

import importlib
from typing import Any

from torch import library


def peer(name: str) -> Any:
    """The module `name`, or None, with a line that says so, where its library is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: not installed ({error}); its rows are left out. `make benchmarks` installs it")
        return None


def _define_operators() -> None:
    """Let torchvision be imported beside a CPU build of torch, where its own operators may be missing."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        operators = library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(operators)


_kept: list[Any] = []  # torch forgets a library's operators with it
_define_operators()
