"""What was measured of a network, beside its checkpoint: evaluation.npz, attack by attack."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from examples.paper.common.atomic import atomic_write
from examples.paper.common.records import sha256
from examples.paper.evaluation.measure import Attack, Outcome


def key(attack: Attack, network: str, x: Tensor, y: Tensor, seed: int) -> str:
    """All that an attack's result depends on; `network` is the sha256 of its checkpoint, rounded to float16.

    Shapes: x (N, C, H, W) uint8, y (N,), of which the attack sees its own.
    """
    images = sha256(*(t[attack.seen].numpy().tobytes() for t in (x, y)))
    return json.dumps([f"{network} rounded", images, seed, attack.name, dict(attack.arguments)])


def read(path: Path) -> dict[str, Outcome]:
    """Outcomes of earlier calls by key; none if there is no such file, or it is of no use."""
    try:
        with np.load(path, allow_pickle=False) as file:
            entries = json.loads(str(file["entries"]))
            return {
                k: Outcome(torch.from_numpy(file[f"wrong{i}"]), **rest)
                for i, (k, rest) in enumerate(entries.items())
            }
    except Exception:  # of numpy, json or zlib, by what is wrong with the file
        return {}


def holds(kept: Mapping[str, Outcome], key: str, attack: Attack) -> bool:
    """Whether what was kept has a result of this attack on all its images."""
    return key in kept and len(kept[key].wrong) == attack.images


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from what is kept in a folder. Raises `ValueError` if one works on it."""
    lock = FileLock(folder / "evaluation.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process evaluates {folder}; wait for it ({lock.lock_file})") from None
    try:
        yield
    finally:
        lock.release()


def write(path: Path, kept: Mapping[str, Outcome]) -> None:
    """Write all outcomes, or leave the file as it was."""
    entries = {
        k: {"seconds": o.seconds, "warnings": o.warnings, "standing": o.standing} for k, o in kept.items()
    }
    arrays = {f"wrong{i}": o.wrong.numpy() for i, o in enumerate(kept.values())}
    with atomic_write(path) as scratch, scratch.open("wb") as file:
        np.savez_compressed(file, entries=np.array(json.dumps(entries)), **arrays)
