"""The formulas of SPARTA as plain functions from tensors to tensors, in the paper's letters.

Source: "Sparta: Spatially Attentive and Adversarially Robust Activation", 2021. Each function is the
cheapest exact form we know; it must equal the literal one in `tests/helpers/reference.py`.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.torch_version import TorchVersion

EPS = 1e-5  # under the root of `normalize`, as in PyTorch's norms


def swish_relu(x: Tensor) -> Tensor:
    """Swish behind a ReLU: max(x, 0) * sigmoid(x).

    Shapes: x (*), result as x.
    Source: SPARTA, section 3.1 and Table 4.
    """
    return F.relu(x) * torch.sigmoid(x)


def attention(s: Tensor, c: Tensor, scale: float = 1) -> Tensor:
    """Gate of SPARTA: scale * sigmoid(s * c), formed in float32 or wider.

    Shapes: s (N, 1, H, W), c (N, C, 1, 1), result (N, C, H, W).
    Source: SPARTA, Eq. 5; the scale is ours.
    """
    return scale * torch.sigmoid(_widen(s) * _widen(c))


def sparta(x: Tensor, s: Tensor, c: Tensor, scale: float = 1) -> Tensor:
    """Gated ReLU: max(x, 0) * scale * sigmoid(s * c).

    Shapes: x (N, C, H, W), s (N, 1, H, W), c (N, C, 1, 1), result as x.
    Source: SPARTA, Eq. 3 and 8; the scale is ours.
    """
    if _left_to_compiler():
        return (F.relu(x) * _gate_as(x, s, c, scale)).to(x.dtype)
    return cast(Tensor, _Gate.apply(x, s, c, scale))  # type: ignore[no-untyped-call]


def scores(
    x: Tensor,
    conv1: Tensor,
    conv2: Tensor,
    conv3: Tensor,
    conv4: Tensor,
    gain: Tensor,
    conv5: Tensor | None = None,
    conv6: Tensor | None = None,
    *,
    neighborhood: int = 1,
) -> tuple[Tensor, Tensor]:
    """Score s of every place and c of every channel, normalized: the two factors of the gate's logit.

    phi_c: conv1, ReLU and conv2 on X averaged to 3 x 3. phi_s: conv3, ReLU, conv4, conv5; given `conv6`,
    which predicts it from the same average, each sample has its own conv5.

    Shapes: x (N, C, H, W), conv1 and conv3 (h, C, 3, 3), conv2 (C, h, 3, 3), conv4 (1, h, 3, 3), gain (1,),
    conv5 (1, 1, 3, 3) or conv6 (1, C, 3, 3); results (N, 1, H, W), (N, C, 1, 1), float32 or wider.
    Source: SPARTA, section 2.2.2, Eq. 5 and 6; h, the pools, `normalize` and the gain are ours.
    """
    size = x.shape[2:]
    if neighborhood > 1:
        x = average(x, neighborhood)
    glance = pool(x).to(x.dtype)
    phi_c = full_conv(F.relu(F.conv2d(glance, conv1, padding=1)), conv2)
    kernel = F.conv2d(glance, conv6, padding=1) if conv6 is not None else cast(Tensor, conv5)
    m = F.conv2d(F.relu(F.conv2d(x, conv3, padding=1)), conv4, padding=1)
    s = normalize(kernel_conv(m, kernel), (2, 3))
    return s if neighborhood == 1 else share(s, neighborhood, size), normalize(phi_c, (1,)) * gain


def normalize(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    """To mean 0 and variance 1 over `dims`: (t - mean) / sqrt(variance + 1e-5); a single number becomes 0.

    The 1e-5 does not grow with t: numbers of a variance far below it stay near 0. Squares above 1e38 are
    infinite in float32, which gives 0: so is a fresh gate one half for X above some 1e10.

    Shapes: any, kept; float32 or wider. Source: ours (the paper is silent on normalization).
    """
    t = _widen(t)
    t = t - t.mean(dims, keepdim=True)  # before the square, or a large mean would eat its digits
    return t * (t.square().mean(dims, keepdim=True) + EPS).rsqrt()


def full_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution of 3 x 3 maps without padding, which leaves one pixel: one matrix product.

    Shapes: x (N, C, 3, 3), weight (D, C, 3, 3), result (N, D, 1, 1).
    """
    if _channels_last(weight):
        x, weight = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)  # as they lie in memory
    return F.linear(x.flatten(1), weight.flatten(1))[:, :, None, None]


def kernel_conv(m: Tensor, kernel: Tensor) -> Tensor:
    """Convolution of each one-channel map with its own 3 x 3 kernel, padding 1.

    Shapes: m (N, 1, H, W), kernel (N, 1, 3, 3) or (1, 1, 3, 3) for all, result (N, 1, H, W).
    Source: SPARTA, section 2.2.2: conv5.
    """
    m, kernel = _widen(m), _widen(kernel)
    if _symbolic():
        return torch.stack([kernel[:, :, a, b, None, None] * t for (a, b), t in _shifts(m).items()]).sum(0)
    if kernel.stride(1) == 1:  # as conv5 lies in memory, or DDP warns of the strides of its gradient
        kernel = kernel.permute(0, 2, 3, 1)
    with _exactly(m):
        y = kernel.flatten(1)[:, None] @ _unfold(m)  # (N, 1, H * W)
    return y.view(m.shape)


def pool(x: Tensor) -> Tensor:
    """Adaptive average pool to 3 x 3, as one product: its backward is deterministic on CUDA too.

    Shapes: x (N, C, H, W), result (N, C, 3, 3), float32 or wider.
    """
    n, channels, height, width = x.shape
    x = _widen(x)
    maps = _pool_maps(height, width, x).expand(n, -1, -1)  # (N, 9, H * W)
    pixels = x.flatten(2)
    with _exactly(x):
        if _channels_last(x):
            y = torch.bmm(maps, pixels.transpose(1, 2)).transpose(1, 2)
        else:
            y = torch.bmm(pixels, maps.transpose(1, 2))
    return y.reshape(n, channels, 3, 3)


def average(x: Tensor, neighborhood: int) -> Tensor:
    """Mean of N x N neighbors, fewer at the border; where N is larger than the map, of the whole of it.

    Shapes: x (N, C, H, W), result (N, C, ceil(H / N), ceil(W / N)). Source: SPARTA, Eq. 6.
    """
    if not _symbolic():  # a kernel no larger than the map: torch pads up to it, and has no larger ones
        return F.avg_pool2d(x, [min(neighborhood, size) for size in x.shape[2:]], ceil_mode=True)
    # torch 2.13 finds guards on the size in `ceil_mode=True`: so zeros around both, and a division
    margin = (0, -x.shape[3] % neighborhood, 0, -x.shape[2] % neighborhood)
    padded, ones = F.pad(x, margin), F.pad(x.new_ones(1, 1, *x.shape[2:]), margin)
    return F.avg_pool2d(padded, neighborhood) / F.avg_pool2d(ones, neighborhood)


def share(s: Tensor, neighborhood: int, size: torch.Size) -> Tensor:
    """Repeat each score over its N x N neighbors, cut to `size` = (H, W).

    Shapes: s (N, 1, ceil(H / N), ceil(W / N)), result (N, 1, H, W).
    Source: SPARTA, Eq. 6.
    """
    if _symbolic():  # a cut to a size is a guard on it
        rows, columns = (torch.arange(n, device=s.device) // neighborhood for n in size)
        return s.index_select(2, rows).index_select(3, columns)
    s = s.repeat_interleave(min(neighborhood, size[0]), 2).repeat_interleave(min(neighborhood, size[1]), 3)
    return s[:, :, : size[0], : size[1]]


def _left_to_compiler() -> bool:
    """Whether to use plain operations: under TorchScript's tracer, or under torch.func when compiled."""
    if traced():
        return True
    if not torch.compiler.is_compiling():
        return False
    return not _CAN_ASK or torch._C._are_functorch_transforms_active()


# torch 2.4 cannot trace the question, 2.13 can
_CAN_ASK = TorchVersion(torch.__version__) >= "2.13" and hasattr(torch._C, "_are_functorch_transforms_active")


def _exactly(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, autocast changes no dtype on x's device; some devices, such as meta, have no autocast."""
    device = x.device.type
    # torch 2.4 cannot trace the first question, and raises at the second for a device without autocast
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    inside = known and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if inside else nullcontext()


def traced() -> bool:
    """Whether TorchScript's tracer records, which takes every size and every condition for a constant."""
    return torch._C._get_tracing_state() is not None


def _symbolic() -> bool:
    return torch.compiler.is_compiling() or traced()


def _channels_last(x: Tensor) -> bool:
    if traced():
        return False
    return x.shape[1] > 1 and x.stride(1) == 1  # vmap forbids to ask `is_contiguous(memory_format=...)`


def _gate_as(x: Tensor, s: Tensor, c: Tensor, scale: float) -> Tensor:
    """`attention` in the memory layout of x, which the product of the two small factors would lose."""
    s, c = _widen(s), _widen(c)
    if _channels_last(x):
        gate = (s.permute(0, 2, 3, 1) * c.permute(0, 2, 3, 1)).sigmoid_().permute(0, 3, 1, 2)
    else:
        gate = (s * c).sigmoid_()
    return gate if scale == 1 else gate * scale


def _widen(x: Tensor) -> Tensor:
    """Half precision becomes float32; other dtypes stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unfold(m: Tensor) -> Tensor:
    """What each tap of a padded 3 x 3 kernel sees: (N, 1, H, W) -> (N, 9, H * W)."""
    # torch unfolds, and folds in the backward, sample by sample, on a GPU with a launch for each, but all
    # channels of a sample at once: so samples go in as channels of one sample, unless there are none
    columns = F.unfold(m.transpose(0, 1) if len(m) else m, 3, padding=1)
    return columns.view(m.shape[0], 9, m.shape[2] * m.shape[3])


def _shifts(m: Tensor) -> dict[tuple[int, int], Tensor]:
    """What each tap (a, b) of a padded 3 x 3 kernel sees, as views: for tracers, of any height and width."""
    height, width = m.shape[2:]
    padded = F.pad(m, (1, 1, 1, 1))
    return {(a, b): padded[:, :, a : a + height, b : b + width] for a in range(3) for b in range(3)}


def _pool_maps(height: int, width: int, like: Tensor) -> Tensor:
    """Weights (9, H * W) of the adaptive average pool to 3 x 3, cached where that is safe."""
    capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
    if _symbolic() or type(like) is not Tensor or capturing:
        return _make_pool_maps(height, width, like.dtype, like.device)
    with torch.inference_mode(False):  # or training could not save what inference made
        stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
        maps = _cached_pool_maps(stream, height, width, like.dtype, like.device)
    if type(maps) is not Tensor:  # made under a mode such as FakeTensorMode
        _cached_pool_maps.cache_clear()
    return maps


def _make_pool_maps(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    rows, columns = _bins(height, dtype, device), _bins(width, dtype, device)
    return (rows[:, None, :, None] * columns[:, None]).flatten(2).flatten(0, 1)


@functools.lru_cache(64)
def _cached_pool_maps(stream: int, *shape_and_like: Any) -> Tensor:
    """Maps that one CUDA stream made: another could read them before they are there."""
    return _make_pool_maps(*shape_and_like)


def _bins(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights (3, size) of three bins: bin i is from floor(i * size / 3) to ceil((i + 1) * size / 3)."""
    i, place = torch.arange(3, device=device)[:, None], torch.arange(size, device=device)
    inside = (place >= i * size // 3) & (place < ((i + 1) * size + 2) // 3)
    return inside.to(dtype) / inside.sum(1, keepdim=True)


class _Gate(torch.autograd.Function):
    """`sparta` that keeps x, s and c for backward and forms the gate again: one big tensor, not four."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, s: Tensor, c: Tensor, scale: float) -> Tensor:
        return (F.relu(x) * _gate_as(x, s, c, scale)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
        x, s, c, ctx.scale = inputs  # type: ignore[attr-defined]
        ctx.save_for_backward(x, s, c)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, s, c = ctx.saved_tensors
        gate = _gate_as(x, s, c, ctx.scale)
        # ReLU's own backward, on a CPU seven times faster than torch.where
        masked = _widen(torch.ops.aten.threshold_backward(grad, x, 0)).mul_(gate)  # x's gradient, unrounded
        grad_s = grad_c = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            u = masked * x
            grad_logit = torch.addcmul(u, u, gate, value=-1 / ctx.scale)  # u * (1 - sigmoid)
            n, channels, height, width = x.shape
            grad_logit = grad_logit.reshape(n, channels, height * width)  # flatten has no batching rule
            s_, c_ = (
                t.to(grad_logit.dtype).flatten(2).transpose(1, 2) for t in (s, c)
            )  # (N, HW, 1), (N, 1, C)
            with _exactly(x):
                grad_s = torch.bmm(c_, grad_logit).view(s.shape).to(s.dtype)
                grad_c = torch.bmm(grad_logit, s_).view(c.shape).to(c.dtype)
        return masked.to(x.dtype), grad_s, grad_c, None
