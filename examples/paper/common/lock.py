"""One process at a time writes into a folder of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class BusyError(ValueError):
    """Another process writes into the folder."""


@contextmanager
def lock(folder: Path, timeout: float = 1) -> Iterator[None]:
    """Hold the lock of a folder, which a process that is killed gives back. Raises `BusyError`.

    It waits `timeout` seconds: by default longer than `is_locked` holds it.
    """
    path = folder / "lock"
    if path.is_symlink():
        raise ValueError(f"{path} is a link, and would be written through; remove it")
    try:
        with FileLock(path, timeout=timeout):
            yield
    except Timeout:
        raise BusyError(
            f"another process works in {folder} ({path}); wait, or choose another folder"
        ) from None


def is_locked(folder: Path) -> bool:
    """Whether a process writes into the folder."""
    if not (folder / "lock").exists():
        return False
    try:
        with lock(folder, timeout=0):
            return False
    except BusyError:
        return True
