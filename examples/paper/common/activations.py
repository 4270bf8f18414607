"""Rivals of SPARTA: readings of the paper that lost, Dynamic ReLU and feature denoising."""

import math
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparta_act import functional as SF


class AsRead(nn.Module):
    """First reading of SPARTA: the paper's C x C kernels, no normalization, a gate that starts at 0.5.

    phi_c: conv1, ReLU, conv2, global average. phi_s: conv3, ReLU, conv4, conv5. The kernel of conv5 is conv6
    of X (C channels), averaged to 3 x 3 and over the channels; with `dynamic=False` it is learned.
    Shapes: (N, C, H, W) -> (N, C, H, W) with C = `in_channels`. Source: SPARTA, Eq. 3, 5, 8.
    """

    lr_factor = 0.1  # of the network's learning rate; at the full rate the gate saturates within 40 steps

    def __init__(self, in_channels: int, *, dynamic: bool = True) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.conv1, self.conv2, self.conv3 = (conv(in_channels, in_channels) for _ in range(3))
        self.conv4 = conv(in_channels, 1)
        self.conv6 = conv(in_channels, in_channels) if dynamic else conv(1, 1)
        self.norm1 = self.norm3 = self.norm4 = nn.Identity()
        self.dynamic = dynamic
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W)."""
        return SF.sparta(x, *self.scores(x))

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """phi_s (N, 1, H, W) and phi_c (N, C, 1, 1)."""
        c, kernel = self.global_scores(x)
        m = self.norm4(self.conv4(F.relu(self.norm3(self.conv3(x)))))
        return SF.kernel_conv(m, kernel), c

    def global_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is computed from all places: phi_c (N, C, 1, 1) and the kernel of conv5 (N or 1, 1, 3, 3)."""
        c = self.conv2(F.relu(self.norm1(self.conv1(x)))).mean((2, 3), keepdim=True)
        return c, SF.pool(self.conv6(x)).mean(1, keepdim=True) if self.dynamic else self.conv6.weight


class Pooled(AsRead):
    """`AsRead` with phi_c and the predicted kernel computed from X averaged to 3 x 3; conv2 is not padded."""

    def global_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As in `AsRead`."""
        x = SF.pool(x).to(x.dtype)
        c = F.conv2d(F.relu(self.norm1(self.conv1(x))), self.conv2.weight)
        return c, self.conv6(x).mean(1, keepdim=True) if self.dynamic else self.conv6.weight


class Normed(AsRead):
    """`AsRead` with batch norm after conv1, conv3 and conv4."""

    def __init__(self, in_channels: int, *, dynamic: bool = True) -> None:
        super().__init__(in_channels, dynamic=dynamic)
        self.norm1, self.norm3 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(in_channels)
        self.norm4 = nn.BatchNorm2d(1)


class PooledNormed(Normed, Pooled):
    """`Pooled` with the batch norms of `Normed`."""


def dynamic_relu(x: Tensor, residual: Tensor) -> Tensor:
    """The larger of two lines, max_k(a_k x + b_k) with a = (1, 0) + residual a, b = 0.5 residual b.

    Shapes: x (N, C, H, W), residual (4, N, C, 1, 1) in the order a_1, a_2, b_1, b_2; result as x.
    Source: Chen et al. 2020, arXiv:2003.10027, Eq. 1 and 3: k = 2, lambda_a = 1, lambda_b = 0.5.
    """
    a1, a2, b1, b2 = residual
    return torch.maximum(x * (1 + a1) + 0.5 * b1, x * a2 + 0.5 * b2)


def spatial_attention(z: Tensor) -> Tensor:
    """Weight of each position: min(gamma * softmax(z / tau), 1), tau = 10, gamma = H * W / 3.

    Shapes: z (N, 1, H, W), result as z, float32 or wider.
    Source: Chen et al. 2020, arXiv:2003.10027, DY-ReLU-C.
    """
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    p = torch.softmax(wide.flatten(1) / 10, 1)
    return (p * (p.shape[1] / 3)).clamp(max=1).view(z.shape)


def nonlocal_mean(x: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
    """Mean of x over all positions j, weighted by softmax_j(theta_i . phi_j / sqrt(D)).

    Shapes: x (N, C, H, W), theta and phi (N, D, H, W), result as x.
    It is attention: torch's fused kernels compute it without storing all pairs of positions. They lack second
    derivatives; for those, call it inside `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    Source: Xie et al. 2019, arXiv:1812.03411, section 4.2: Gaussian version of non-local means, embedded.
    """
    channels, embedding = x.shape[1], theta.shape[1]
    width = max(channels, embedding)
    # the fused kernels need one width, and the channels of a position contiguous
    tokens = (t.flatten(2).mT.contiguous()[:, None] for t in (x, theta, phi))
    value, query, key = (F.pad(t, (0, width - t.shape[-1])) for t in tokens)
    mean = F.scaled_dot_product_attention(query, key, value, scale=1 / math.sqrt(embedding))
    return mean[:, 0, :, :channels].mT.reshape(x.shape)


class DynamicReLUB(nn.Module):
    """Dynamic ReLU, one function per channel of a sample: max_k(a_kc x + b_kc).

    The coefficients come from a hyper-network: global pool, C to C / 4, ReLU, to 4 C, 2 sigmoid - 1.
    Shapes: (N, C, H, W) -> (N, C, H, W) with C = `in_channels`.
    Source: Chen et al. 2020, arXiv:2003.10027, DY-ReLU-B.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        hidden = max(1, in_channels // 4)
        self.squeeze, self.excite = nn.Linear(in_channels, hidden), nn.Linear(hidden, 4 * in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W)."""
        theta = 2 * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3)))))) - 1
        return dynamic_relu(x, theta.unflatten(1, (4, x.shape[1]))[..., None, None].transpose(0, 1))


class DynamicReLUC(DynamicReLUB):
    """Dynamic ReLU, one function per channel and position: max_k(pi_hw a_kc x + pi_hw b_kc).

    pi is `spatial_attention` of a 1 x 1 convolution of X to one channel.
    Shapes as `DynamicReLUB`. Source: Chen et al. 2020, arXiv:2003.10027, DY-ReLU-C.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels)
        self.position = nn.Conv2d(in_channels, 1, 1, bias=False)  # the softmax would cancel a bias

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W)."""
        y = super().forward(x)
        return (y * spatial_attention(self.position(x))).to(x.dtype)  # as pi > 0, it can leave the maximum


class FeatureDenoising(nn.Module):
    """Denoising block, appended to a group of blocks: x + norm(conv(non-local mean of x)), 1 x 1 conv.

    The weight of the norm is zero at the start, so a fresh block is the identity.
    Shapes: (N, C, H, W) -> (N, C, H, W) with C = `in_channels`.
    Source: Xie et al. 2019, arXiv:1812.03411; C / 2 embedding channels as in the authors' code.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        embedding = max(1, in_channels // 2)
        self.theta = nn.Conv2d(in_channels, embedding, 1, bias=False)
        self.phi = nn.Conv2d(in_channels, embedding, 1, bias=False)
        self.conv = nn.Conv2d(in_channels, in_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(in_channels)
        for weight in (self.theta.weight, self.phi.weight):
            nn.init.normal_(weight, std=0.01)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W)."""
        f = nonlocal_mean(x, self.theta(x), self.phi(x))
        return cast(Tensor, x + self.norm(self.conv(f)))
