"""Random noise, an attack that uses no gradient."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks.pgd import attacking, random_images, within
from examples.paper.attacks.robust_error import clean_errors
from examples.pgd import check_images, check_numbers


@torch.inference_mode(False)
def noise(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, draws: int, batch_size: int = 250
) -> tuple[Tensor, Tensor]:
    """Which images any of the draws breaks, and those draws.

    Draws are uniform in the ball or at its corners, by turns. A broken image is left alone.
    Shapes: x (N, C, H, W) in [0, 1], y (N,); results (N,) of bool and as x.
    Raises `ValueError` for images, labels, numbers or logits that no attack can work with: `examples.pgd`.
    """
    check_numbers(eps=eps, batch_size=batch_size)
    classes = check_images(x, y)
    x, (low, high) = x.detach(), within(x.detach(), eps)
    with attacking(model):
        broken, images = clean_errors(model, x, y, batch_size, classes), x.clone()
        for k in tqdm(range(draws), desc="noise", unit="draw", leave=False):
            (left,) = torch.where(~broken)
            if k % 2:
                draw = torch.where(torch.rand_like(x[left]) < 0.5, low[left], high[left])
            else:
                draw = random_images(x[left], eps)
            errs = clean_errors(model, draw, y[left], batch_size)
            broken[left[errs]], images[left[errs]] = True, draw[errs]
    return broken, images
