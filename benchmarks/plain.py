"""SPARTA written plainly: the form that the package's fast one is compared with."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import check_equal
from sparta_act import Sparta


class PlainSparta(Sparta):
    """`Sparta`, step by step as in its docstring, by PyTorch's own convolutions, pools and norms."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W)."""
        n, size = self.neighborhood, x.shape[2:]
        z = x if n == 1 else F.avg_pool2d(x, n, ceil_mode=True)
        glance = F.adaptive_avg_pool2d(z, 3)
        h = F.relu(F.conv2d(glance, self.conv1, padding=1))
        c = self.gain * normalized(F.conv2d(h, self.conv2))
        if self.dynamic:
            kernel = F.conv2d(glance, self.conv6, padding=1)
        else:
            kernel = self.conv5.expand(len(x), -1, -1, -1)
        h = F.relu(F.conv2d(z, self.conv3, padding=1))
        m = F.conv2d(h, self.conv4, padding=1)
        s = normalized(F.conv2d(m.transpose(0, 1), kernel, padding=1, groups=len(x)).transpose(0, 1))
        s = s if n == 1 else F.interpolate(s, scale_factor=n)[:, :, : size[0], : size[1]]
        gate = torch.sigmoid(s * c)
        return F.relu(x) * (2 * gate if self.identity else gate)


def normalized(t: Tensor) -> Tensor:
    """To mean 0 and variance 1 in each sample; a single number becomes 0. Shapes: (N, *) -> (N, *)."""
    return F.layer_norm(t, t.shape[1:])


def check_same(
    fast: nn.Module, plain: nn.Module, x: Tensor, loss_of: Callable[[nn.Module, Tensor], Tensor]
) -> float:
    """Largest relative difference of losses and gradients in float64. Raises `ValueError` above 1e-9."""
    fast, plain = (copy.deepcopy(m).cpu().double().train() for m in (fast, plain))
    plain.load_state_dict(fast.state_dict())
    x, found = x.detach().cpu().double().requires_grad_(), []
    for module in (fast, plain):
        loss = loss_of(module, x)
        found.append([loss, *torch.autograd.grad(loss, [x, *module.parameters()])])
    return check_equal(*found, "plain and fast SPARTA")
