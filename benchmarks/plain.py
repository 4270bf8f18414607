"""SPARTA as one would write it down from the paper: what the package's own form is compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor

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
