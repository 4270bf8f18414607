"""A network under attack: the attack by PGD that most attempts of an audit are variants of."""

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
    """A network under attack and the images it is attacked at. Shapes: x (N, C, H, W) in [0, 1], y (N,)."""

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    seed: int

    def __post_init__(self) -> None:
        with attacking(self.model):
            self.fast = folded(self.model, self.x[:2])
            self.clean = clean_errors(self.model, self.x, self.y, BATCH)

    def _asked(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.x.dtype))

    def random(self, purpose: str) -> None:
        """Seed torch for one purpose: what is attacked from the same start is compared without its noise."""
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
        spared: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """When each image broke, -1 where it stands, and the images; as `first_breaks`.

        What is wrong from the start, or `spared`, is not attacked and counts as broken at once.
        `start`: purpose of the random start; None starts from the images themselves.
        """
        eps = self.eps if eps is None else eps
        fast, images, at = fast or self.fast, self.x.clone(), torch.zeros_like(self.y)
        (left,) = torch.where(~(self.clean if spared is None else spared))
        begin = self.x
        if start is not None:
            self.random(start)
            begin = random_images(self.x, eps)
        goals = (self.y[left],) if target is None else (self.y[left], target[left])
        attack = {"eps": eps, "step_size": step_size or eps / 4, "steps": steps, "batch_size": BATCH}
        x, begin = (t[left].to(dtype) for t in (self.x, begin))
        with attacking(self.model), attacking(fast):
            at[left], found = first_breaks(self._asked, fast, x, begin, loss, goals, **attack)
        images[left] = found.to(images.dtype)
        return at, images

    def moved(self, model: nn.Module, steps: int) -> Tensor:
        """The images after so many steps of the plain attack on a network, this one or another."""
        self.random("start")
        attack = {"eps": self.eps, "step_size": self.eps / 4, "steps": [steps]}
        parts = zip(self.x.split(BATCH), self.y.split(BATCH), strict=True)
        return torch.cat([pgd_at(model, x, y, **attack)[steps] for x, y in parts])
