"""The network under attack, its images, and the PGD run that most attacks of an audit are variants of."""

import dataclasses
import zlib

import torch
from torch import Tensor, nn

from examples.paper.attacks import losses
from examples.paper.attacks.folding import folded
from examples.paper.attacks.pgd import attacking, pgd_at, random_images
from examples.paper.attacks.robust_error import Loss, clean_errors, first_breaks

BATCH = 250


@dataclasses.dataclass
class Victim:
    """A network under attack and its images. Shapes: x (N, C, H, W) in [0, 1], y (N,)."""

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    seed: int

    def __post_init__(self) -> None:
        with attacking(self.model):
            self.fast = folded(self.model, self.x[:2])
            self.clean = clean_errors(self.model, self.x, self.y, BATCH)

    def seed_for(self, purpose: str) -> None:
        """Seed torch for one purpose: attacks that share a start are compared without its noise."""
        torch.manual_seed(zlib.crc32(f"{self.seed} {purpose}".encode()))

    def pgd(
        self,
        *,
        steps: int,
        step_size: float | None = None,
        eps: float | None = None,
        loss: Loss = losses.cross_entropy,
        target: Tensor | None = None,
        fast: nn.Module | None = None,
        start: str | None = "start",
        skipped: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """The step at which each image broke, -1 where it survives, and the images; as `first_breaks`.

        Images that are wrong from the start, or `skipped`, are not attacked and count as broken at step 0.
        `start`: purpose of the random start; None starts from the images themselves.
        """
        eps = self.eps if eps is None else eps
        fast, images, at = fast or self.fast, self.x.clone(), torch.zeros_like(self.y)
        (left,) = torch.where(~(self.clean if skipped is None else skipped))
        begin = self.x
        if start is not None:
            self.seed_for(start)
            begin = random_images(self.x, eps)
        goals = (self.y[left],) if target is None else (self.y[left], target[left])
        attack = {"eps": eps, "step_size": step_size or eps / 4, "steps": steps, "batch_size": BATCH}
        x, begin = (t[left].to(dtype) for t in (self.x, begin))
        with attacking(self.model), attacking(fast):
            at[left], found = first_breaks(self._logits, fast, x, begin, loss, goals, **attack)
        images[left] = found.to(images.dtype)
        return at, images

    def attacked(self, model: nn.Module, steps: int) -> Tensor:
        """The images after this many steps of the plain attack on a network, this one or another."""
        self.seed_for("start")
        attack = {"eps": self.eps, "step_size": self.eps / 4, "steps": [steps]}
        parts = zip(self.x.split(BATCH), self.y.split(BATCH), strict=True)
        return torch.cat([pgd_at(model, x, y, **attack)[steps] for x, y in parts])

    def _logits(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.x.dtype))
