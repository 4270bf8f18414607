"""Third-party libraries that the benchmarks compare with, where they are installed."""

import importlib
from typing import Any

from torch import library


def peer(name: str) -> Any:
    """The module `name`; if its library is not installed, print so and return None."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: not installed ({error}); the tables omit its rows. `make benchmarks` installs it")
        return None


def _define_operators() -> None:
    """Let torchvision be imported with a CPU build of torch, where its own operators may be missing."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        operators = library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(operators)


_libraries: list[Any] = []  # torch drops operators when their `Library` is collected
_define_operators()
