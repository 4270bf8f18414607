"""Results as JSON, with the images that are wrong packed as text; sha256."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.paper.common.atomic import write_text

RECORD, SEAL = "evaluation.json", "sha256 of this record"


def sha256(*parts: Any) -> str:
    """SHA-256 of the concatenated parts, bytes or contiguous arrays, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def packed(wrong: Tensor) -> str:
    """Which images are wrong, (N,) of bool, as base64 text, eight images to a byte."""
    return base64.b64encode(np.packbits(wrong.numpy()).tobytes()).decode()


def unpacked(text: str, images: int) -> Tensor:
    """Inverse of `packed`: (images,) of bool. Raises `ValueError` for text of another length."""
    raw = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(raw) != -(-images // 8):
        raise ValueError(f"{len(raw)} bytes for {images} images")
    return torch.from_numpy(np.unpackbits(raw, count=images).astype(bool))


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises `OSError`, or `ValueError` if it holds something else."""
    try:
        record = json.loads(path.read_text())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    return record


def read_evaluation(path: Path, *keys: str) -> dict[str, Any]:
    """A record of `evaluate` that has these keys, too. Raises `OSError`, or `ValueError` for another file."""
    record = read_json(path)
    if lacking := {"errors", *keys} - record.keys():
        raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    check_errors(record["errors"])
    check_seal(record)
    return record


def check_errors(errors: Any) -> None:
    """Raise `ValueError` unless these are the errors of an evaluation.json that match their packed images."""
    try:
        for name, entry in (("clean", errors["clean"]), *errors.items()):
            wrong = unpacked(entry["wrong"], entry["images"])
            if len(wrong) < 1 or abs(wrong.float().mean().item() - entry["error"]) > 1e-6:
                raise ValueError(f"{name}: the error {entry['error']} is not that of the packed images")
            if not 0 <= entry["low"] <= entry["error"] <= entry["high"] <= 1:
                raise ValueError(f"{name}: {entry['error']} is not in [{entry['low']}, {entry['high']}]")
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not the errors of an evaluation: {error!r}") from None


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its own sha256, by which `check_seal` knows that nothing in it has changed."""
    return {**record, SEAL: _seal(record)}


def check_seal(record: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a record that was not `sealed`, or changed afterwards."""
    if record.get(SEAL) != _seal(record):
        raise ValueError("a number or word in it has changed since it was written")


def _seal(record: Mapping[str, Any]) -> str:
    return sha256(json.dumps({k: v for k, v in record.items() if k != SEAL}).encode())


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record atomically."""
    write_text(path, json.dumps(record, indent=1) + "\n")
