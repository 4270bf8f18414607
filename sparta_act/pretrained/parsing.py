"""JSON of somebody else: what other readers could take for something else is refused."""

import json
import math
from collections.abc import Mapping
from typing import Any

from sparta_act.errors import readable

DEPTH = 32  # levels of lists and dictionaries in a configuration


def too_deep(value: Any, levels: int = DEPTH) -> bool:
    """Whether lists and dictionaries lie in each other more than `levels` deep: copies would fail."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return levels < 0 or any(too_deep(entry, levels - 1) for entry in inner)


def parse(text: str | bytes) -> Any:
    """Value of a JSON text. Raises `ValueError` for what other readers could take for something else."""
    value = json.loads(text, object_pairs_hook=_once, parse_constant=_number, parse_float=_number)
    if too_deep(value, DEPTH + 1):
        raise ValueError(f"more than {DEPTH} lists or dictionaries in each other")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice in one dictionary")
    return found


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):  # 1e400, too
        raise ValueError(f"{readable(text, 50)} is no number")
    return value
