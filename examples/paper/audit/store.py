"""Results of an audit's attacks, with images as evidence, in a file from which a killed audit goes on."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from examples.paper.common.atomic import atomic_write
from examples.paper.common.records import SEAL, sha256


def _seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    names = sorted(tensors)
    parts = (tensors[n].reshape(-1).view(torch.uint8).numpy() for n in names)
    return sha256(json.dumps([names, sorted(metadata.items())]).encode(), *parts)


class OtherAuditError(ValueError):
    """The folder holds the evidence of another audit, which must not be lost."""


class Store:
    """Which images each attack broke, other numbers, and for each image the first that fooled the network.

    For an image that nothing broke, `images` holds the last one that a caller put there. `key` holds all that
    the results depend on. A damaged file is begun anew; one with another key raises `OtherAuditError`.
    Shapes: x (N, C, H, W) in [0, 1], y (N,), both on the CPU.
    """

    def __init__(self, x: Tensor, y: Tensor, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.wrong: dict[str, Tensor] = {}  # (N,) of bool each
        self.numbers: dict[str, Any] = {}
        self.images = x.clone(memory_format=torch.contiguous_format)
        self.broken_by = [""] * len(x)  # the first attack that broke each image
        self.y = y.contiguous()
        self._read()

    def __contains__(self, name: str) -> bool:
        return name in self.wrong or name in self.numbers

    def add_attack(self, name: str, wrong: Tensor, images: Tensor | None = None) -> None:
        """Add what an attack broke; `images` show it, and are None if they lie beyond eps."""
        self.wrong[name] = wrong.detach().cpu().clone()
        if images is not None:
            for i in torch.where(self.wrong[name])[0].tolist():
                if not self.broken_by[i]:
                    self.broken_by[i], self.images[i] = name, images[i].detach().cpu().float()
        self._write()

    def add_numbers(self, name: str, numbers: Any) -> None:
        """Add other numbers, as JSON can hold them."""
        self.numbers[name] = numbers
        self._write()

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add how long an attack took."""
        self.add_numbers("seconds", self.numbers.get("seconds", {}) | {name: round(seconds, 1)})

    def broken(self) -> Tensor:
        """Images that any attack within eps broke, (N,) of bool."""
        return torch.tensor([bool(name) for name in self.broken_by], dtype=torch.bool)

    def _write(self) -> None:
        tensors = {f"wrong/{name}": wrong for name, wrong in self.wrong.items()}
        tensors |= {"images": self.images, "labels": self.y}
        metadata = {
            "key": self.key,
            "numbers": json.dumps(self.numbers),
            "broken by": json.dumps(self.broken_by),
        }
        with atomic_write(self.path) as scratch:
            save_file(tensors, scratch, metadata | {SEAL: _seal(tensors, metadata)})
            scratch.chmod(0o644)  # safetensors writes for the owner alone; this is evidence for anybody

    def _read(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            if metadata.pop(SEAL, "") != _seal(tensors, metadata):
                raise ValueError("a bit of it has changed since it was written")
            if metadata["key"] != self.key:
                raise OtherAuditError(
                    f"{self.path.parent} holds another audit (of another network, surrogate, eps or "
                    "version): name another --out, or delete it"
                )
            images, numbers = tensors["images"], json.loads(metadata["numbers"])
            broken_by = json.loads(metadata["broken by"])
        except FileNotFoundError:
            return
        except OtherAuditError:
            raise
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            print(f"{self.path} is damaged ({error}) and is begun anew", file=sys.stderr)
            return
        self.images, self.numbers, self.broken_by = images, numbers, broken_by
        self.wrong = {k.removeprefix("wrong/"): v for k, v in tensors.items() if k.startswith("wrong/")}
