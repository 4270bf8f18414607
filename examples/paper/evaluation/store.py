"""The outcomes of attacks on a network, stored next to its checkpoint in evaluation.npz."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from examples.paper.common.atomic import atomic_write
from examples.paper.common.records import sha256
from examples.paper.evaluation.measure import Attack, Outcome


def key(attack: Attack, network: str, x: Tensor, y: Tensor, seed: int) -> str:
    """All that an attack's outcome depends on; `network` is the sha256 of its checkpoint.

    The text says that SPARTA's weights were rounded to float16.
    Shapes: x (N, C, H, W) uint8, y (N,), of all images; those of the attack count.
    """
    images = sha256(*(t[attack.seen].numpy().tobytes() for t in (x, y)))
    return json.dumps([f"{network} rounded", images, seed, attack.name, dict(attack.arguments)])


def read(path: Path) -> dict[str, Outcome]:
    """Outcomes of earlier calls by key; none if there is no such file, or if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            entries = json.loads(str(file["entries"]))
            return {
                k: Outcome(torch.from_numpy(file[f"wrong{i}"]), **rest)
                for i, (k, rest) in enumerate(entries.items())
            }
    except FileNotFoundError:
        return {}
    except Exception as error:  # of numpy, json or zlib, by what is wrong with the file
        print(f"{path} is damaged ({error}); all is measured again", file=sys.stderr)
        return {}


def holds(stored: Mapping[str, Outcome], key: str, attack: Attack) -> bool:
    """Whether there is an outcome of this attack on all its images."""
    return key in stored and len(stored[key].wrong) == attack.images


def add(path: Path, new: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """All outcomes, with new ones, as the file holds them then; another call may write into it too."""
    with FileLock(f"{path}.lock"):
        stored = read(path) | dict(new)
        write(path, stored)
    return stored


def write(path: Path, stored: Mapping[str, Outcome]) -> None:
    """Write all outcomes, or leave the file as it was."""
    entries = {
        k: {"seconds": o.seconds, "warnings": o.warnings, "standing": o.standing} for k, o in stored.items()
    }
    arrays = {f"wrong{i}": o.wrong.numpy() for i, o in enumerate(stored.values())}
    with atomic_write(path) as scratch, scratch.open("wb") as file:
        np.savez_compressed(file, entries=np.array(json.dumps(entries)), **arrays)
