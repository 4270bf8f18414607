"""L-infinity PGD (Madry et al. 2018, arXiv:1706.06083): away from the true class, or towards a target.

Images that the network cannot be attacked with are refused, rather than attacked in vain: the `check_...`.
"""

from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NO_GRADIENT = (
    "the logits do not depend on the images by autograd, so there is no gradient to follow: take no_grad, "
    "detach, argmax and numpy out of the network's forward"
)


@torch.inference_mode(False)  # it takes gradients, also where its caller evaluates without
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

    Shapes: x (N, C, H, W) in [0, 1]; y and target (N,), class numbers; result as x. Raises `ValueError` for
    others, for numbers that are no fraction of 1, and for a network that does not answer with logits.
    """
    check_numbers(eps=eps, step_size=step_size, steps=steps)
    check_network(model)
    classes = check_images(x, y, target)
    x, goal, sign = x.detach().clone(), (y if target is None else target).clone(), 1 if target is None else -1
    if len(x) == 0:
        return x
    x_adv = project(x + torch.empty_like(x).uniform_(-eps, eps), x, eps)
    for _ in range(steps):
        x_adv.requires_grad_()
        logits = check_logits(model(x_adv.clone()), len(x), classes)  # it may work in place
        way = direction(F.cross_entropy(logits, goal, reduction="sum"), x_adv)
        x_adv = project(x_adv.detach() + sign * step_size * way, x, eps)
    return x_adv


def project(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """Clip to within `eps` of x, and to [0, 1]. Shapes: (N, C, H, W), kept."""
    return x_adv.clamp(x - eps, x + eps).clamp(0, 1)


def direction(loss: Tensor, x: Tensor) -> Tensor:
    """Sign of the loss's gradient at x, 0 where it is NaN. Raises `ValueError` if there is no gradient."""
    grad = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
    if grad is None:
        raise ValueError(NO_GRADIENT)
    return grad.sign().nan_to_num(0.0)


def random_targets(y: Tensor, num_classes: int) -> Tensor:
    """A wrong class for each image, uniform over the others. Shapes: (N,) -> (N,).

    Raises `ValueError` unless there are two classes or more, and y below their number.
    """
    if num_classes < 2 or (len(y) and y.amax() >= num_classes):
        raise ValueError(f"targets need two classes, and one for each label: {num_classes} are too few")
    return (y + torch.randint_like(y, 1, num_classes)) % num_classes


def is_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Where the network errs, or does not answer. Shapes: (N, K), (N,) -> (N,) of bool."""
    return (logits.argmax(1) != y) | no_answer(logits)


def no_answer(logits: Tensor) -> Tensor:
    """Where the loss is no number, nor its gradient, so that no attack could tell: at NaN and infinity.

    Some logits may be -inf, as of classes that are left out. Shapes: (N, K) -> (N,) of bool.
    """
    return ~logits.logsumexp(1).isfinite()


def check_numbers(*, eps: float, step_size: float = 1.0, **counts: int) -> None:
    """Raise `ValueError` for a bound or a step that is no fraction of 1, and for counts below 1."""
    for name, value in (("eps", eps), ("step_size", step_size)):
        if not isinstance(value, Real) or isinstance(value, bool | Fraction) or not 0 <= value <= 1:
            raise ValueError(
                f"{name} is a fraction of the pixel range [0, 1], a float such as 8/255, not {value!r}"
            )
    if step_size == 0 < eps:
        raise ValueError("step_size must be above 0, such as eps / 4: steps of 0 attack nothing")
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def check_network(model: nn.Module) -> None:
    """Raise `ValueError` for a network made under `torch.inference_mode`, which has no gradients for good."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    if any(t.is_inference() for t in tensors):
        raise ValueError(
            "the network was made under torch.inference_mode, where tensors get no gradients: make it "
            "outside, or attack a copy.deepcopy(net) that is made outside"
        )


def check_images(x: Tensor, y: Tensor, target: Tensor | None = None) -> int:
    """Number of classes that the labels need: one more than the largest.

    Raises `ValueError` unless x is (N, C, H, W) in [0, 1], y and target (N,) class numbers from 0 on, and no
    target the label itself. It waits for the device once.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 4 or 0 in x.shape[1:]:
        raise ValueError(f"images are (N, C, H, W), floating point, such as x.float() / 255, not {_named(x)}")
    y_and_target = [y] if target is None else [y, target]
    for labels in y_and_target:
        if (
            not isinstance(labels, Tensor)
            or labels.dtype != torch.int64
            or labels.shape != x.shape[:1]
            or labels.device != x.device
        ):
            raise ValueError(
                f"labels and targets are class numbers, ({len(x)},) of torch.int64 on {x.device}, such as "
                "y.argmax(1) of one-hot rows, y.flatten().long() of other numbers, y.to(x.device), not "
                f"{_named(labels)}"
            )
    if len(x) == 0:
        return 0
    both = torch.stack(y_and_target)
    same = (both[0] == both[-1]).any()
    numbers = x.amin(), x.amax(), both.amin(), both.amax(), same
    low, high, first, last, same = torch.stack([n.float() for n in numbers]).tolist()
    if not (low >= 0 and high <= 1):  # nor with NaN
        raise ValueError(
            f"images must lie in [0, 1], not in [{low:.9g}, {high:.9g}]: normalize inside the network, not "
            "before the attack"
        )
    if first < 0:
        raise ValueError(
            f"labels and targets are class numbers from 0 on, not {first:.0f}: leave such images out"
        )
    if target is not None and same:
        raise ValueError("a target is the label of its image: random_targets(y, num_classes) draws others")
    return int(last) + 1


def check_logits(logits: Any, images: int, classes: int = 2) -> Tensor:
    """The logits, at least in float32. It does not wait for the device.

    Raises `ValueError` unless they are (images, K), floating point, for K classes: two, and `classes`.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the network must return logits, not {_named(logits)}: attack a module whose forward returns "
            'them alone, such as net(x)["logits"], net(x).logits or net(x)[0]'
        )
    if logits.ndim != 2 or len(logits) != images or not logits.is_floating_point():
        raise ValueError(
            f"the network must return logits ({images}, classes), floating point, not {_named(logits)}: "
            "flatten(1) them, or for one logit z return torch.stack([0 * z, z], 1)"
        )
    if logits.shape[1] < 2:
        raise ValueError(
            "the network has one logit z, and its loss is the same for any image: return two, torch.cat([0 * "
            "z, z], 1), for classes 0 and 1"
        )
    if logits.shape[1] < classes:
        raise ValueError(f"a label or target is {classes - 1}; the network has {logits.shape[1]} classes")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _named(found: Any) -> str:
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__}"
    return f"{tuple(found.shape)} of {found.dtype} on {found.device}"
