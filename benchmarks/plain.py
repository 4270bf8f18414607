"""SPARTA as one would write it down from the paper: what the package's own form is compared with."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measuring import check_equal
from sparta_act import Sparta


class PlainSparta(Sparta):
    """`Sparta`, every step where the paper has it: six convolutions, each computed in full."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W) -> (N, C, H, W)."""
        h = F.relu(F.conv2d(x, self.conv1, padding=1))
        c = F.conv2d(h, self.conv2, padding=1).mean((2, 3), keepdim=True)
        kernel = F.adaptive_avg_pool2d(F.conv2d(x, self.conv6, padding=1), 3).mean(1, keepdim=True)
        h = F.relu(F.conv2d(x, self.conv3, padding=1))
        m = F.conv2d(h, self.conv4, padding=1)
        s = F.conv2d(m.transpose(0, 1), kernel, padding=1, groups=len(x)).transpose(0, 1)
        return F.relu(x) * torch.sigmoid(s * c)


@torch.no_grad()
def awake(model: nn.Module) -> nn.Module:
    """The network with every conv2 off zero, where it starts and all gates are the same whatever they see."""
    for module in model.modules():
        if isinstance(module, Sparta):
            module.conv2.normal_(std=0.05)
    return model


def check_same(
    fast: nn.Module, plain: nn.Module, x: Tensor, loss_of: Callable[[nn.Module, Tensor], Tensor]
) -> float:
    """Largest relative difference of losses and gradients in float64. Raises `ValueError` above 1e-9."""
    fast, plain = (copy.deepcopy(m).cpu().double().train() for m in (fast, plain))
    plain.load_state_dict(awake(fast).state_dict())
    x, found = x.detach().cpu().double().requires_grad_(), []
    for module in (fast, plain):
        loss = loss_of(module, x)
        found.append([loss, *torch.autograd.grad(loss, [x, *module.parameters()])])
    return check_equal(*found, "plain and fast SPARTA")
