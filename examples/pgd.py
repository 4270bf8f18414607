"""L-infinity PGD (Madry et al. 2018, arXiv:1706.06083): away from the true class, or towards a target."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """Clip to within `eps` of x, and to [0, 1]. Shapes: (N, C, H, W), kept."""
    return x_adv.clamp(x - eps, x + eps).clamp(0, 1)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    target: Tensor | None = None,
) -> Tensor:
    """Adversarial images within `eps` of x, from a random start.

    Raises the loss of `y`; with `target`, lowers the loss of those classes instead. Uses the model in the
    mode that it is in, train() or eval(), and leaves its `.grad`s alone.

    Shapes: x (N, C, H, W) in [0, 1], else `ValueError`; y and target (N,), class numbers; result as x.
    """
    if x.min() < 0 or x.max() > 1:
        raise ValueError("images must lie in [0, 1]: normalize inside the network, not before the attack")
    goal, sign = (y, 1) if target is None else (target, -1)
    x_adv = project(x + torch.empty_like(x).uniform_(-eps, eps), x, eps)
    for _ in range(steps):
        x_adv.requires_grad_()
        loss = F.cross_entropy(model(x_adv), goal, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = project(x_adv.detach() + sign * step_size * grad.sign(), x, eps)
    return x_adv


def random_targets(y: Tensor, num_classes: int) -> Tensor:
    """A wrong class for each image, uniform over the others. Shapes: (N,) -> (N,)."""
    return (y + torch.randint_like(y, 1, num_classes)) % num_classes
