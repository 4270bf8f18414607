"""What a mistyped name of a set may have meant."""

import contextlib
import difflib
import itertools
import os
from collections.abc import Iterable

from sparta_act.pretrained.folder import CONFIG

FEW = 1000  # entries of a folder that are looked at


def did_you_mean(name: str, ours: Iterable[str]) -> str:
    """ " (did you mean 'x'?)", of our sets and the sets in the same folder; empty where none is near."""
    if len(name) > 200:
        return ""
    names = {n.lower(): n for n in (*ours, *_sets_beside(name))}
    near = difflib.get_close_matches(name.lower(), names, n=2, cutoff=0.7)
    return f" (did you mean {' or '.join(repr(names[n]) for n in near)}?)" if near else ""


def _sets_beside(name: str) -> list[str]:
    """The folders of sets that `name` would be next to, spelled as it is."""
    above = os.path.dirname(name.rstrip("/" + os.sep))
    with contextlib.suppress(OSError, ValueError):  # ValueError: a zero byte in the name
        with os.scandir(above or os.curdir) as entries:
            sets = [e.name for e in itertools.islice(entries, FEW) if os.path.isfile(f"{e.path}/{CONFIG}")]
        return [os.path.join(above, found) for found in sorted(sets)]
    return []
