"""Training images that are held out, and the error on them by which the best epoch is chosen."""

import torch
from torch import Tensor

from examples.paper.attacks.pgd import attacking
from examples.paper.attacks.robust_error import clean_errors, robust_errors
from examples.paper.common import data
from examples.paper.training.trainer import Trainer


def held_out(count: int, images: int) -> Tensor:
    """Which of the training images are for validation, (images,) of bool: `count`, evenly spread over them.

    The same for every seed. They are of all classes also where the file is sorted by class (not where it
    lists the classes in turn).
    Raises `ValueError` if none would be left to train on.
    """
    if count >= images:
        raise ValueError(f"--validation {count}: there are {images} training images, and none would be left")
    held = torch.zeros(images, dtype=torch.bool)
    held[torch.arange(count) * images // count] = True
    return held


def validation_error(trainer: Trainer, x: Tensor, y: Tensor) -> float:
    """Robust error of the network to evaluate, or clean error if the recipe has no attack.

    Untargeted PGD-10 within the recipe's bound, by steps of a quarter of it, from the image itself, for every
    recipe: a weak attack in training would miss what PGD finds. It draws no random numbers, so it does not
    change the training. Shapes: x (N, C, H, W) uint8, y (N,).
    """
    eps, model = trainer.recipe.eps, trainer.final()
    images, labels = data.to_float(x, trainer.device), y.to(trainer.device)
    with attacking(model):
        if not trainer.recipe.steps:
            return clean_errors(model, images, labels).float().mean().item()
        attack = {"eps": eps, "step_size": eps / 4, "steps": 10, "random_start": False}
        return robust_errors(model, images, labels, **attack).float().mean().item()
