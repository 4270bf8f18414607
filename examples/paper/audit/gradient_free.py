"""Attacks that never ask for a gradient: random noise, Square by pyautoattack, HopSkipJump by foolbox."""

from contextlib import suppress
from types import ModuleType

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks.autoattack import autoattack
from examples.paper.attacks.pgd import attacking, random_images, within
from examples.paper.attacks.robust_error import clean_errors

CHUNK = 10  # images at once; HopSkipJump holds some hundred noisy copies of each


def noise(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, draws: int, batch_size: int = 250
) -> tuple[Tensor, Tensor]:
    """Which images any of the draws breaks, and those draws: uniform in the ball, and at its corners.

    Draws alternate between the two kinds; an image that is broken is left alone.
    Shapes: x (N, C, H, W) in [0, 1], y (N,); results (N,) of bool and as x.
    """
    low, high = within(x, eps)
    with attacking(model):
        broken, images = clean_errors(model, x, y, batch_size), x.clone()
        for k in tqdm(range(draws), desc="noise", unit="draw", leave=False):
            (left,) = torch.where(~broken)
            if k % 2:
                draw = torch.where(torch.rand_like(x[left]) < 0.5, low[left], high[left])
            else:
                draw = random_images(x[left], eps)
            errs = clean_errors(model, draw, y[left], batch_size)
            broken[left[errs]], images[left[errs]] = True, draw[errs]
    return broken, images


def square(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, queries: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Square (Andriushchenko et al. 2020, arXiv:1912.00049): which images it breaks, and how they look then.

    Shapes: x (N, C, H, W) in [0, 1], y (N,); results on the CPU, (N,) of bool and as x.
    """
    attack = {"eps": eps, "queries": queries, "seed": seed, "parts": ["square"]}
    found = autoattack(model, x, y, **attack, batch_size=250, title="Square")
    return found.wrong, found.images


def load_foolbox() -> ModuleType:
    """Raises `ValueError` if foolbox is not installed."""
    try:
        import foolbox
    except ImportError:
        raise ValueError('foolbox is not installed: pip install "sparta-act[audit]"') from None
    return foolbox


def hard_label(
    model: nn.Module, x: Tensor, y: Tensor, starts: Tensor, *, eps: float, queries: int
) -> tuple[Tensor, Tensor, Tensor]:
    """HopSkipJump (Chen et al. 2020, arXiv:1904.02144), which sees nothing but the predicted class.

    It begins at `starts`, images the network takes for other classes, and closes in on x; each image is asked
    about `queries` times. Any image on the way within eps that the network gets wrong counts.
    Shapes: x, starts (N, C, H, W) in [0, 1], y (N,); results (N,) of bool, as x, and (N,), how often the
    network was asked: less than `queries` where foolbox gave up or all was broken.
    Raises `ValueError` if foolbox is not installed.
    """
    foolbox = load_foolbox()
    broken, images, asked = torch.zeros_like(y, dtype=torch.bool), x.clone(), torch.zeros_like(y)
    attack = foolbox.attacks.HopSkipJumpAttack(steps=queries, constraint="linf")
    with (
        attacking(model),
        torch.no_grad(),
        tqdm(total=len(x), desc="hard label", unit="img", leave=False) as bar,
    ):
        for part in torch.arange(len(x), device=x.device).split(CHUNK) if len(x) else ():
            watched = _Watched(model, x[part], y[part], eps, queries)
            known = foolbox.PyTorchModel(watched.eval(), bounds=(0, 1), device=x.device)
            # the second and third: a network that answers one image in two ways, which foolbox gives up
            with suppress(_Spent, AssertionError, ValueError):
                attack.run(
                    known, x[part], foolbox.criteria.Misclassification(y[part]), starting_points=starts[part]
                )
            broken[part], images[part] = watched.broken, watched.images
            asked[part] = queries - watched.queries
            bar.update(len(part))
    return broken, images, asked


def other_classes(model: nn.Module, x: Tensor, y: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """For each x the nearest of the images that the network does not take for a y, and whether there is one.

    Shapes: x (N, C, H, W), y (N,), images (M, C, H, W); results as x and (N,) of bool.
    """
    with attacking(model), torch.no_grad():
        taken = torch.cat([model(part).argmax(1) for part in images.split(250)])
    distances = torch.cdist(x.flatten(1), images.flatten(1))
    distances[taken[None] == y[:, None]] = torch.inf
    nearest = distances.min(1)
    return images[nearest.indices], nearest.values < torch.inf


class _Spent(Exception):  # noqa: N818  (no error: the end of the attack)
    """All queries are made, or all images are broken."""


class _Watched(nn.Module):
    """Asks the network, counts, and keeps the first image within eps that it gets wrong."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, eps: float, queries: int) -> None:
        super().__init__()
        self.model, self.x, self.y, self.eps, self.queries = model, x, y, eps, queries
        self.broken, self.images = torch.zeros_like(y, dtype=torch.bool), x.clone()

    def forward(self, images: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, K). Raises `_Spent`."""
        logits = self.model(images)
        near = (images - self.x).abs().flatten(1).amax(1) <= self.eps
        new = near & (logits.argmax(1) != self.y) & ~self.broken
        self.images[new], self.broken[new] = images[new], True
        self.queries -= 1
        if self.queries <= 0 or self.broken.all():
            raise _Spent
        return logits
