"""What the attacks of an audit found, with images as evidence; in a file, so that a killed audit goes on."""

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


class Store:
    """Attacks by name: which images each broke, its numbers, and for each image the first that fooled it.

    Where none did, `images` holds the last one that somebody put there.

    `key` says all that the results depend on; a file of another key, or one that is no store, is begun anew.
    Shapes: x (N, C, H, W) in [0, 1], y (N,), both on the CPU.
    """

    def __init__(self, x: Tensor, y: Tensor, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.wrong: dict[str, Tensor] = {}  # (N,) of bool each
        self.numbers: dict[str, Any] = {}
        self.images = x.clone(memory_format=torch.contiguous_format)  # attacked, where something broke it
        self.by = [""] * len(x)  # the attack that first did
        self.y = y.contiguous()
        self._read()

    def __contains__(self, name: str) -> bool:
        return name in self.wrong or name in self.numbers

    def note(self, name: str, wrong: Tensor, images: Tensor | None = None) -> None:
        """Keep what an attack found; `images` are evidence for what it broke, None if it does not count."""
        self.wrong[name] = wrong.detach().cpu().clone()
        if images is not None:
            for i in torch.where(self.wrong[name])[0].tolist():
                if not self.by[i]:
                    self.by[i], self.images[i] = name, images[i].detach().cpu().float()
        self._write()

    def tell(self, name: str, numbers: Any) -> None:
        """Keep numbers of another kind, as JSON can hold them."""
        self.numbers[name] = numbers
        self._write()

    def spent(self, name: str, seconds: float) -> None:
        """Keep how long an attack took."""
        self.tell("seconds", self.numbers.get("seconds", {}) | {name: round(seconds, 1)})

    def broken(self) -> Tensor:
        """Images that anything broke, (N,) of bool."""
        return torch.tensor([bool(name) for name in self.by], dtype=torch.bool)

    def _write(self) -> None:
        tensors = {f"wrong/{name}": wrong for name, wrong in self.wrong.items()}
        tensors |= {"images": self.images, "labels": self.y}
        told = {"key": self.key, "numbers": json.dumps(self.numbers), "by": json.dumps(self.by)}
        with atomic_write(self.path) as scratch:
            save_file(tensors, scratch, told)
            scratch.chmod(0o644)  # safetensors writes for its owner alone; it is evidence for anybody

    def _read(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                told: Mapping[str, str] = file.metadata() or {}
                if told.get("key") != self.key:
                    print(f"{self.path} is of another audit, and is begun anew", file=sys.stderr)
                    return
                names = [k for k in file.keys() if k.startswith("wrong/")]  # noqa: SIM118  (no mapping)
                wrong = {name.removeprefix("wrong/"): file.get_tensor(name) for name in names}
                images, by, numbers = (
                    file.get_tensor("images"),
                    json.loads(told["by"]),
                    json.loads(told["numbers"]),
                )
        except (OSError, SafetensorError, ValueError, KeyError):
            return
        self.wrong, self.numbers, self.images, self.by = wrong, numbers, images, by
