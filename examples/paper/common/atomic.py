"""Atomic writes: after a kill at any moment, the old file or the new one is there, whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file next to `path`, renamed to `path` when the block ends without an error."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        yield scratch
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text atomically."""
    with atomic_write(path) as scratch:
        scratch.write_text(text)
