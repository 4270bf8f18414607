"""The formulas of SPARTA as plain functions from tensors to tensors, in the paper's letters.

Source: "Sparta: Spatially Attentive and Adversarially Robust Activation", 2021. Each function is the
cheapest exact form we know; `tests/reference.py` holds the literal ones they must equal.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def swish_relu(x: Tensor) -> Tensor:
    """Swish behind a ReLU: max(x, 0) * sigmoid(x).

    Shapes: x (*), result as x.
    Source: SPARTA, section 3.1 and Table 4.
    """
    return F.relu(x) * torch.sigmoid(x)


def attention(s: Tensor, c: Tensor) -> Tensor:
    """Gate of SPARTA: sigmoid(s * c), formed in float32 or wider.

    Shapes: s (N, 1, H, W), c (N, C, 1, 1), result (N, C, H, W).
    Source: SPARTA, Eq. 5.
    """
    return torch.sigmoid(_widen(s) * _widen(c))


def sparta(x: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """Gated ReLU: max(x, 0) * sigmoid(s * c).

    Shapes: x (N, C, H, W), s (N, 1, H, W), c (N, C, 1, 1), result as x.
    Source: SPARTA, Eq. 3 and 8.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the plain form and saves as little
        return (F.relu(x) * attention(s, c)).to(x.dtype)
    return cast(Tensor, _Gate.apply(x, s, c))  # type: ignore[no-untyped-call]


def mean_conv(h: Tensor, weight: Tensor) -> Tensor:
    """Global average of a 3 x 3 convolution with padding 1: nine window sums times the taps.

    Shapes: h (N, C, H, W), weight (D, C, 3, 3), result (N, D, 1, 1).
    Source: SPARTA, Figure 2: conv2 and the average that makes phi_c 1 x 1 x C.
    """
    taps = _window_sums(h) / (h.shape[2] * h.shape[3])  # (N, C, 3, 3)
    with _exactly(h):
        return F.linear(taps.flatten(1), weight.to(taps.dtype).flatten(1))[:, :, None, None]


def conv_to_one(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution to one channel, 3 x 3 with padding 1: a product to nine channels and a fold.

    Shapes: x (N, C, H, W), weight (1, C, 3, 3), result (N, 1, H, W), float32 or wider.
    Source: SPARTA, section 2.2.2: conv4, and conv6 averaged over its output filters.
    """
    taps = weight.flip(2, 3).permute(2, 3, 1, 0).reshape(9, -1, 1, 1)  # fold adds where a tap lands: flipped
    y = _widen(F.conv2d(x, taps)).flatten(2)  # (N, 9, H * W)
    return F.fold(y, x.shape[2:], kernel_size=3, padding=1)


def predict_kernel(x: Tensor, weight: Tensor) -> Tensor:
    """Dynamic predictive network: conv6, average pool to 3 x 3, mean over channels, as one filter.

    Shapes: x (N, C, H, W), weight (C, C, 3, 3), result (N, 1, 3, 3), float32 or wider.
    Source: SPARTA, section 2.2.2; the pool and the mean are our reading.
    """
    return pool(conv_to_one(x, weight.mean(0, keepdim=True)))


def kernel_conv(m: Tensor, kernel: Tensor) -> Tensor:
    """Convolution of each one-channel map with its own 3 x 3 kernel, padding 1.

    Shapes: m (N, 1, H, W), kernel (N, 1, 3, 3) or (1, 1, 3, 3) for all, result (N, 1, H, W).
    Source: SPARTA, section 2.2.2: conv5.
    """
    m, kernel = _widen(m), _widen(kernel)
    with _exactly(m):
        y = kernel.flatten(1)[:, None] @ F.unfold(m, 3, padding=1)  # (N, 1, H * W)
    return y.view(m.shape)


def pool(x: Tensor) -> Tensor:
    """Adaptive average pool to 3 x 3, as two products: their backward is deterministic on CUDA too.

    Shapes: x (N, C, H, W), result (N, C, 3, 3), float32 or wider.
    """
    x = _widen(x)
    with _exactly(x):
        return _bins(x.shape[2], x) @ x @ _bins(x.shape[3], x).mT


def share(s: Tensor, neighborhood: int, size: torch.Size) -> Tensor:
    """Repeat each score over its N x N neighbours, cut to `size` = (H, W).

    Shapes: s (N, 1, ceil(H / N), ceil(W / N)), result (N, 1, H, W).
    Source: SPARTA, Eq. 6.
    """
    s = s.repeat_interleave(neighborhood, 2).repeat_interleave(neighborhood, 3)
    return s[:, :, : size[0], : size[1]]


def _exactly(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, autocast leaves the dtypes of x's device alone; some devices, such as meta, have none."""
    device = x.device.type
    # torch 2.4 cannot trace the first question, and raises at the second for a device without autocast
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    inside = known and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if inside else nullcontext()


def _gate_as(x: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """`attention` in the memory layout of x, which the product of the two small factors would lose."""
    s, c = _widen(s), _widen(c)
    return torch.sigmoid(torch.addcmul(torch.zeros_like(x, dtype=c.dtype), s, c))


def _widen(x: Tensor) -> Tensor:
    """Half precision becomes float32; all else stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _window_sums(h: Tensor) -> Tensor:
    """Sum of h under each of the nine taps of a padded 3 x 3 kernel: (N, C, H, W) -> (N, C, 3, 3).

    The tap above the centre never sees the last row, the tap below never the first; columns likewise.
    """
    rows = h.sum(3, dtype=torch.promote_types(h.dtype, torch.float32))  # (N, C, H)
    by_column = torch.stack([rows - h[..., -1], rows, rows - h[..., 0]], 3)  # (N, C, H, 3)
    total = by_column.sum(2)  # (N, C, 3)
    return torch.stack([total - by_column[:, :, -1], total, total - by_column[:, :, 0]], 2)


def _bins(size: int, like: Tensor) -> Tensor:
    """Matrix (3, size) of the adaptive average pool to three bins."""
    i = torch.arange(3, device=like.device)[:, None]
    p = torch.arange(size, device=like.device)
    inside = ((p >= i * size // 3) & (p < -(-(i + 1) * size // 3))).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class _Gate(torch.autograd.Function):
    """`sparta` that keeps x, s and c for backward and forms the gate again: one big tensor, not four."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, s: Tensor, c: Tensor) -> Tensor:
        return (F.relu(x) * _gate_as(x, s, c)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, s, c = ctx.saved_tensors
        gate = _gate_as(x, s, c)
        grad_x = grad_s = grad_c = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.where(x > 0, grad * gate, 0).to(x.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_logit = grad * F.relu(x) * gate * (1 - gate)
            grad_s = (grad_logit * c).sum(1, keepdim=True).to(s.dtype)
            grad_c = (grad_logit * s).sum((2, 3), keepdim=True).to(c.dtype)
        return grad_x, grad_s, grad_c
