"""What evaluate.py measured, beside the checkpoint: evaluation.npz and, when all is done, evaluation.json."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from measure import Attack, Outcome
from replacing import replacing, write_text

RECORD = "evaluation.json"


def sha256(*parts: bytes) -> str:
    """Of the parts, one after the other, in hexadecimal."""
    return hashlib.sha256(b"".join(parts)).hexdigest()


def key(attack: Attack, network: str, x: Tensor, y: Tensor, seed: int) -> str:
    """All that an attack's result depends on; `network` is the sha256 of its checkpoint, rounded to float16.

    Shapes: x (N, C, H, W) uint8, y (N,), of which the attack sees its own.
    """
    images = sha256(*(t[attack.seen].numpy().tobytes() for t in (x, y)))
    return json.dumps([f"{network} rounded", images, seed, attack.name, dict(attack.arguments)])


def packed(wrong: Tensor) -> str:
    """Which images are wrong, (N,) of bool, as text: eight to a byte, in base64."""
    return base64.b64encode(np.packbits(wrong.numpy()).tobytes()).decode()


def unpacked(text: str, images: int) -> Tensor:
    """What `packed` wrote, (images,) of bool. Raises `ValueError` for text of another length."""
    raw = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(raw) != -(-images // 8):
        raise ValueError(f"{len(raw)} bytes for {images} images")
    return torch.from_numpy(np.unpackbits(raw, count=images).astype(bool))


def check_errors(errors: Any) -> None:
    """Raise `ValueError` for what no `errors` of evaluation.json is, or where an error is not its images'."""
    try:
        for name, entry in (("clean", errors["clean"]), *errors.items()):
            wrong = unpacked(entry["wrong"], entry["images"])
            if len(wrong) < 1 or abs(wrong.float().mean().item() - entry["error"]) > 1e-6:
                raise ValueError(f"{name}: an error of {entry['error']}, and its images tell another one")
            if not 0 <= entry["low"] <= entry["error"] <= entry["high"] <= 1:
                raise ValueError(f"{name}: {entry['error']} in [{entry['low']}, {entry['high']}]")
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{error!r}, where errors were wanted") from None


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
    with replacing(path) as scratch, scratch.open("wb") as file:
        np.savez_compressed(file, entries=np.array(json.dumps(entries)), **arrays)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a whole record, or leave the file as it was."""
    write_text(path, json.dumps(record, indent=1) + "\n")
