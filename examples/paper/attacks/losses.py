"""Losses that an attack maximizes, per image: cross-entropy, the margin of Carlini and Wagner, DLR."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the true class. Shapes: (N, K), (N,) -> (N,)."""
    return F.cross_entropy(logits, y, reduction="none")


def cw(logits: Tensor, y: Tensor) -> Tensor:
    """Best other logit minus that of the true class: max_{i != y} z_i - z_y.

    Shapes: (N, K), (N,) -> (N,). Source: Carlini & Wagner 2017, arXiv:1608.04644, section V A, f_6.
    """
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - _of(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: `cw` divided by the largest minus the third-largest logit, scale-invariant.

    Shapes: (N, K), (N,) -> (N,). Source: Croce & Hein 2020, arXiv:2003.01690, Eq. 6.
    Raises `ValueError` for fewer than three classes.
    """
    _check_classes(logits, 3, "DLR loss")
    first, _, third, *_ = logits.topk(3, 1).values.unbind(1)
    return cw(logits, y) / (first - third + 1e-12)


def cw_to(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Logit of the target minus that of the true class: z_t - z_y. Shapes: (N, K), (N,), (N,) -> (N,)."""
    return _of(logits, target) - _of(logits, y)


def dlr_to(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """`cw_to` divided by the largest logit minus the mean of the third and fourth.

    Shapes: (N, K), (N,), (N,) -> (N,). Source: Croce & Hein 2020, arXiv:2003.01690, Eq. 7.
    Raises `ValueError` for fewer than four classes.
    """
    _check_classes(logits, 4, "targeted DLR loss")
    first, _, third, fourth, *_ = logits.topk(4, 1).values.unbind(1)
    return cw_to(logits, y, target) / (first - (third + fourth) / 2 + 1e-12)


def cross_entropy_to(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Minus the cross-entropy of the target; the true class is ignored. Shapes as `cw_to`."""
    return -cross_entropy(logits, target)


def _of(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).squeeze(1)


def _check_classes(logits: Tensor, needed: int, loss: str) -> None:
    if logits.shape[1] < needed:
        raise ValueError(
            f"the {loss} needs at least {needed} classes, and the network has {logits.shape[1]}: attack it "
            "by another loss, such as cross-entropy"
        )
