"""The formulas of SPARTA as plain functions from tensors to tensors, in the paper's letters.

Source: "Sparta: Spatially Attentive and Adversarially Robust Activation", 2021. Each function is the
cheapest exact form we know; `tests/reference.py` holds the literal ones they must equal.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.torch_version import TorchVersion


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
    if _left_to_compiler():
        return (F.relu(x) * _gate_as(x, s, c)).to(x.dtype)
    return cast(Tensor, _Gate.apply(x, s, c))  # type: ignore[no-untyped-call]


def relu_(h: Tensor) -> Tensor:
    """ReLU of a tensor that nobody else reads, and that it may overwrite. Shapes: any, kept."""
    return _relu(h) if torch.compiler.is_compiling() else F.relu(h, inplace=True)


def relu_mean_conv(h: Tensor, weight: Tensor) -> Tensor:
    """Global average of a 3 x 3 convolution, padding 1, of max(h, 0): nine window sums times the taps.

    Shapes: h (N, C, H, W), weight (D, C, 3, 3), result (N, D, 1, 1).
    Source: SPARTA, Figure 2: conv2 and the average that makes phi_c 1 x 1 x C.
    """
    h = _widen(_relu(h))
    taps = _products(h, _both_ways(_windows, h)) / (h.shape[2] * h.shape[3])
    with _exactly(h):
        return full_conv(taps, weight.to(taps.dtype))


def full_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution of 3 x 3 maps without padding, which leaves one pixel: one matrix product.

    Shapes: x (N, C, 3, 3), weight (D, C, 3, 3), result (N, D, 1, 1).
    """
    if _channels_last(weight):
        x, weight = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)  # as they lie in memory
    return F.linear(x.flatten(1), weight.flatten(1))[:, :, None, None]


def conv_to_one(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution to one channel, 3 x 3 with padding 1: a product to nine channels and a fold.

    Shapes: x (N, C, H, W), weight (1, C, 3, 3), result (N, 1, H, W), float32 or wider.
    Source: SPARTA, section 2.2.2: conv4, and conv6 averaged over its output filters.
    """
    taps = weight.flip(2, 3).permute(2, 3, 1, 0).reshape(9, -1)  # fold adds where a tap lands: flipped
    if _channels_last(x):
        y = F.linear(x.permute(0, 2, 3, 1), taps).permute(0, 3, 1, 2)
    else:
        y = F.conv2d(x, taps[:, :, None, None])
    return _fold(_widen(y))


def predict_kernel(x: Tensor, weight: Tensor) -> Tensor:
    """Dynamic predictive network: conv6, average pool to 3 x 3, mean over channels, as one filter.

    Shapes: x (N, C, H, W), weight (C, C, 3, 3), result (N, 1, 3, 3), float32 or wider.
    Source: SPARTA, section 2.2.2; the pool and the mean are our reading.
    """
    return pool(conv_to_one(x, mean_filter(weight)))


def mean_filter(weight: Tensor) -> Tensor:
    """Average of all filters as one. Shapes: (D, C, 3, 3) -> (1, C, 3, 3)."""
    if _channels_last(weight):  # torch is ten times slower over the outer dimension of that layout
        return weight.permute(0, 2, 3, 1).mean(0, keepdim=True).permute(0, 3, 1, 2)
    return weight.mean(0, keepdim=True)


def kernel_conv(m: Tensor, kernel: Tensor) -> Tensor:
    """Convolution of each one-channel map with its own 3 x 3 kernel, padding 1.

    Shapes: m (N, 1, H, W), kernel (N, 1, 3, 3) or (1, 1, 3, 3) for all, result (N, 1, H, W).
    Source: SPARTA, section 2.2.2: conv5.
    """
    m, kernel = _widen(m), _widen(kernel)
    with _exactly(m):
        y = kernel.flatten(1)[:, None] @ _unfold(m)  # (N, 1, H * W)
    return y.view(m.shape)


def pool(x: Tensor) -> Tensor:
    """Adaptive average pool to 3 x 3, as one product: its backward is deterministic on CUDA too.

    Shapes: x (N, C, H, W), result (N, C, 3, 3), float32 or wider.
    """
    x = _widen(x)
    return _products(x, _both_ways(_bins, x))


def share(s: Tensor, neighborhood: int, size: torch.Size) -> Tensor:
    """Repeat each score over its N x N neighbours, cut to `size` = (H, W).

    Shapes: s (N, 1, ceil(H / N), ceil(W / N)), result (N, 1, H, W).
    Source: SPARTA, Eq. 6.
    """
    s = s.repeat_interleave(neighborhood, 2).repeat_interleave(neighborhood, 3)
    return s[:, :, : size[0], : size[1]]


def _left_to_compiler() -> bool:
    """Whether a formula stays plain: compiled, torch.func's transforms cannot pass our own backwards."""
    if not torch.compiler.is_compiling():
        return False
    return not _CAN_ASK or torch._C._are_functorch_transforms_active()


# torch 2.4 cannot trace the question, 2.13 can
_CAN_ASK = TorchVersion(torch.__version__) >= "2.13" and hasattr(torch._C, "_are_functorch_transforms_active")


def _relu(h: Tensor) -> Tensor:
    return F.relu(h) if _left_to_compiler() else cast(Tensor, _Relu.apply(h)[0])  # type: ignore[no-untyped-call]


def _exactly(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, autocast leaves the dtypes of x's device alone; some devices, such as meta, have none."""
    device = x.device.type
    # torch 2.4 cannot trace the first question, and raises at the second for a device without autocast
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    inside = known and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if inside else nullcontext()


def _channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1  # vmap forbids to ask `is_contiguous(memory_format=...)`


def _gate_as(x: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """`attention` in the memory layout of x, which the product of the two small factors would lose."""
    s, c = _widen(s), _widen(c)
    if _channels_last(x):
        return (s.permute(0, 2, 3, 1) * c.permute(0, 2, 3, 1)).sigmoid_().permute(0, 3, 1, 2)
    return (s * c).sigmoid_()


def _widen(x: Tensor) -> Tensor:
    """Half precision becomes float32; all else stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unfold(m: Tensor) -> Tensor:
    """What each tap of a padded 3 x 3 kernel sees: (N, 1, H, W) -> (N, 9, H * W)."""
    columns = F.unfold(m.transpose(0, 1) if _as_channels(m) else m, 3, padding=1)
    return columns.view(m.shape[0], 9, m.shape[2] * m.shape[3])


def _fold(y: Tensor) -> Tensor:
    """Sum of what nine taps add to each pixel, the adjoint of `_unfold`: (N, 9, H, W) -> (N, 1, H, W)."""
    columns = y.reshape(1, -1, y.shape[2] * y.shape[3]) if _as_channels(y) else y.flatten(2)
    return F.fold(columns, y.shape[2:], kernel_size=3, padding=1).view(y.shape[0], 1, *y.shape[2:])


def _as_channels(x: Tensor) -> bool:
    # torch folds and unfolds sample by sample, forward or back, on a GPU with a launch for each of them, but
    # all channels of a sample at once: so the samples go in as channels of one. Of none it would make an
    # error; and compiled, both are one kernel, but inductor would make another for each size of the batch
    return not torch.compiler.is_compiling() and x.shape[0] > 0


def _products(x: Tensor, maps: Tensor) -> Tensor:
    """Sum of each channel times each of nine maps: (N, C, H, W), (9, H * W) -> (N, C, 3, 3)."""
    n, channels = x.shape[:2]
    maps = maps.expand(n, -1, -1)  # (N, 9, H * W)
    x = x.flatten(2)
    with _exactly(x):
        y = torch.bmm(maps, x.mT).mT if x.stride(1) == 1 else torch.bmm(x, maps.mT)
    return y.reshape(n, channels, 3, 3)


def _both_ways(side: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
    """Maps (9, H * W): each of three weights along H times each of three along W."""
    rows = side(x.shape[2], x)
    columns = rows if x.shape[2] == x.shape[3] else side(x.shape[3], x)
    return (rows[:, None, :, None] * columns[:, None]).flatten(2).flatten(0, 1)


def _bins(size: int, like: Tensor) -> Tensor:
    """Weights (3, size) of the adaptive average pool to three bins."""
    weights = torch.zeros(3, size, dtype=like.dtype, device=like.device)
    for i in range(3):
        first, last = i * size // 3, -(-(i + 1) * size // 3)
        weights[i, first:last].fill_(1 / (last - first))  # assigned, the number would be a tensor of the CPU
    return weights


def _windows(size: int, like: Tensor) -> Tensor:
    """What the taps of a padded kernel of three see, (3, size): the first never the last place."""
    seen = torch.ones(3, size, dtype=like.dtype, device=like.device)
    seen[0, -1:].zero_()
    seen[2, :1].zero_()
    return seen


class _Relu(torch.autograd.Function):
    """ReLU that keeps a byte for each number, where nobody keeps its result; the bytes come along."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(h)
        return y, y.sign().to(torch.int8)  # 0 or 1; compiled for a CPU, bool would take twenty times as long

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        (on,) = ctx.saved_tensors
        return cast(Tensor, grad * on)


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
        # ReLU's own backward, on a CPU seven times faster than torch.where
        masked = _widen(torch.ops.aten.threshold_backward(grad, x, 0)).mul_(
            gate
        )  # the gradient of x, unrounded
        grad_s = grad_c = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            u = masked * x
            grad_logit = torch.addcmul(u, u, gate, value=-1).flatten(2)  # u * (1 - gate)
            s_, c_ = (t.to(grad_logit.dtype).flatten(2).mT for t in (s, c))  # (N, H * W, 1), (N, 1, C)
            with _exactly(x):
                grad_s = torch.bmm(c_, grad_logit).view(s.shape).to(s.dtype)
                grad_c = torch.bmm(grad_logit, s_).view(c.shape).to(c.dtype)
        return masked.to(x.dtype), grad_s, grad_c
