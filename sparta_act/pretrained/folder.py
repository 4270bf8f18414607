"""The folder of a set: its files change as one, and are read without waiting."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from sparta_act.errors import WeightsError, readable

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
SAVING, LOCK = ".saving-", ".saving.lock"
PATIENCE = 60  # seconds that a save waits for another one into the same folder
LARGEST_CONFIG = 2**22  # bytes


def name_of(path: object) -> str:
    """Text of a name or a path, with `~` for the home folder; empty where it is none."""
    try:
        name = os.fspath(path)  # type: ignore[call-overload]
        return os.path.expanduser(name) if isinstance(name, str) else ""
    except Exception:  # whatever an `__fspath__` raises
        return ""


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Replace the files of the set in `folder`, made if needed; other files there stay.

    Whenever it ends, even killed, the old set loads or the new one: see `configs`. Savers take turns.
    Raises `WeightsError` for a folder of something else, and where nothing can be written.
    """
    if os.path.exists(folder) and not folder.is_dir():
        raise WeightsError(
            f"cannot save into {folder}: a file of that name is in the way; nothing was written"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _finish(folder)
            if others := _others(folder):
                raise WeightsError(
                    f"cannot save into {folder}: {' and '.join(others)} is in the way; nothing was written. "
                    f"Name another folder, or move that away"
                )
            try:
                _replace(files, folder)
            finally:
                _finish(folder)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"cannot save into {folder}: {type(error).__name__}: {readable(error)}. A set that was there "
            f"still loads. Make room or permit writing, or name another folder"
        ) from error


def read(path: Path, most: int) -> bytes:
    """Content of a file of at most `most` bytes.

    Raises `WeightsError`, at once, for a larger one, and for what is no file and could make us wait.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise WeightsError(f"{path.name} cannot be read: it is a pipe, a socket or a device, no file")
            data = file.read(status.st_size + 1) if status.st_size <= most else b""
    except (OSError, MemoryError) as error:
        raise WeightsError(f"{path.name} cannot be read ({type(error).__name__}: {error})") from error
    if max(status.st_size, len(data)) > most:
        raise WeightsError(f"{path.name} cannot be read: it has {status.st_size} bytes, more than {most}")
    return data


def configs(folder: Path) -> list[Path]:
    """Where the configuration of the weights may be: beside them, or where a killed save left it.

    Weights name no configuration, but a configuration names its weights, by their sha256.
    """
    return [folder / CONFIG, *sorted(folder.glob(f"{SAVING}*/{CONFIG}"))]


def stamp(folder: Path) -> list[tuple[str, int, int]]:
    """Changes when a save replaces a file."""
    found = []
    for path in (folder / WEIGHTS, *configs(folder)):
        with contextlib.suppress(OSError):
            status = path.stat()
            found.append((str(path), status.st_ino, status.st_mtime_ns))
    return found


def _replace(files: Mapping[str, bytes], folder: Path) -> None:
    """First the weights, which make the set the new one, last the configuration, by which a rest is known."""
    temporary = Path(tempfile.mkdtemp(prefix=SAVING, dir=folder))
    for name in (WEIGHTS, CARD, CONFIG):
        with open(temporary / name, "xb") as file:
            file.write(files[name])
            file.flush()
            os.fsync(file.fileno())
    _sync(temporary)
    for name in (WEIGHTS, CARD, CONFIG):
        _sync(folder)  # or a power cut could undo one replacement and keep the next
        os.replace(temporary / name, folder / name)
    _sync(folder)


def _finish(folder: Path) -> None:
    """Finish what broke off after its weights were in place; undo what broke off before."""
    for left in folder.glob(f"{SAVING}*"):
        if (
            left.is_symlink()
            or not left.is_dir()
            or {p.name for p in left.iterdir()} - {WEIGHTS, CARD, CONFIG}
        ):
            continue  # not ours
        if not (left / WEIGHTS).exists() and _belongs(left / CONFIG, folder / WEIGHTS):
            for name in (CARD, CONFIG):
                if (left / name).exists():
                    os.replace(left / name, folder / name)
            _sync(folder)
        shutil.rmtree(left, ignore_errors=True)


def _belongs(config: Path, weights: Path) -> bool:
    try:
        wanted = json.loads(read(config, LARGEST_CONFIG))["weights_sha256"]
        return bool(hashlib.sha256(read(weights, sys.maxsize)).hexdigest() == wanted)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _others(folder: Path) -> list[str]:
    """What is in the place of a set's files and belongs to something else, as texts."""
    there = [p for p in (folder / n for n in (CONFIG, WEIGHTS, CARD)) if p.exists()]
    if wrong := [f"the {'folder' if p.is_dir() else 'pipe or device'} {p}" for p in there if not p.is_file()]:
        return wrong
    marks = {CONFIG: b'"sites"', WEIGHTS: b'"sites"', CARD: b"library_name: sparta-act"}
    ours = {p.name for p in there if marks[p.name] in _start(p)}
    return (
        []
        if ours & {CONFIG, WEIGHTS}
        else [f"the {p.name} of something else" for p in there if p.name not in ours]
    )


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(LARGEST_CONFIG)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other savers out of `folder`; the system lets them in when this process ends, however it does."""
    path, end = folder / LOCK, time.monotonic() + PATIENCE
    while True:
        file = open(path, "ab", opener=_not_through_a_link)  # noqa: SIM115
        if _lock(file.fileno()) and _is_at(file.fileno(), path):  # or its owner has removed it meanwhile
            break
        file.close()
        if time.monotonic() > end:
            raise WeightsError(
                f"cannot save into {folder}: something else has been saving there for {PATIENCE} s; nothing "
                f"was written. End it, or name another folder"
            )
        time.sleep(0.02)
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if sys.platform == "win32":  # which removes no open file
                    file.close()
                path.unlink()


def _lock(file: int) -> bool:
    """Whether nobody else has it; on a file system without locks nobody has."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _sync(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk; not all systems know how."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
