"""Atomic writes: after a kill at any moment, the old file or the new one is there, whole."""

import glob
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where nobody deletes a file that is open
    fcntl = None

# in the errors by which torch and safetensors say that they could not write
DISK = re.compile("inline_container|PytorchStreamWriter|iostream|I/O error|IoError")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A new file next to `path`, of its own name, renamed to `path` when the block ends without an error.

    It gets the mode of the old file; a link is replaced, not followed. What killed writers left is deleted.
    Raises `OSError` if it cannot be written; the old file is whole then.
    """
    _delete_leftovers(path)
    file, scratch = _create(path)
    try:
        yield scratch
        if path.is_file() and not path.is_symlink():
            scratch.chmod(stat.S_IMODE(path.stat().st_mode))
        os.fsync(file)  # a full disk may show here only
        if fcntl is None:
            file.close()  # Windows renames no open file
        os.replace(scratch, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        if error.filename if isinstance(error, OSError) else not DISK.search(str(error)):
            raise
        text = str(error.__context__ or error).partition("\n")[0]
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"{path} could not be written ({text}; {free / 1e6:,.0f} MB are free); an old one is whole"
        ) from error
    finally:
        file.close()
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text atomically."""
    with atomic_write(path) as scratch:
        scratch.write_text(text)


def _create(path: Path) -> tuple[Any, Path]:
    """A new file, locked while it is open, so that another writer's `_delete_leftovers` spares it."""
    while True:
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        file = scratch.open("xb")  # never a file or a link that is there
        with suppress(OSError):  # of a file system without locks
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else another writer took it for a leftover just before
            return file, scratch
        file.close()


def _delete_leftovers(path: Path) -> None:
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):  # of a file that is locked, open or somebody else's
            if fcntl is None:
                left.unlink()
            elif stat.S_ISREG(left.lstat().st_mode):
                with left.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()
