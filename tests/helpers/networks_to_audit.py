"""Networks for the audit's tests: a plain one, adversarially trained, and networks that mask gradients."""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from examples.paper.common import data
from examples.paper.training.recipes import RECIPES
from examples.paper.training.trainer import Trainer
from sparta_act import Sparta
from sparta_act import functional as SF

EPS = 4 / 255


class Small(nn.Module):
    """Three convolutions, for images of 32 x 32; a gate may replace the second ReLU."""

    def __init__(self, gate=None):
        super().__init__()
        self.body = nn.Sequential()
        for before, after in ((3, 16), (16, 32), (32, 48)):
            self.body.append(nn.Conv2d(before, after, 3, 2, 1))
            self.body.append(gate(after) if gate and after == 32 else nn.ReLU())
        self.fc = nn.Linear(48 * 16, 10)

    def forward(self, x):
        return self.fc(self.body((x - 0.5) / 0.25).flatten(1))


def trained(gate=None, seed=0, epochs=30):
    """Adversarially trained on the sample in under a minute, and weak: half of the images are right."""
    torch.manual_seed(seed)
    model = Small(gate)
    x, y = data.load("train")
    recipe = dataclasses.replace(
        RECIPES["modern"],
        eps=EPS,
        step_size=EPS / 2,
        steps=3,
        epochs=epochs,
        averaging=0.0,
        lr=0.05,
        batch_size=64,
    )
    trainer = Trainer(model, recipe, len(x), device="cpu")
    with tqdm(disable=True) as bar:
        for _ in range(recipe.epochs):
            trainer.run_epoch(x, y, bar)
    return model.eval().requires_grad_(False)


class HardGate(Sparta):
    """A gate whose logit is a hundred times as large."""

    def forward(self, x):
        return SF.sparta(x, *self.scores(x), self.scale)

    def scores(self, x):
        s, c = super().scores(x)
        return 100 * s, c


def hardened(model):
    """A copy whose gates are hard."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is Sparta:
            module.__class__ = HardGate
    return model


class LoudLogits(nn.Module):
    """Logits times 1000: cross-entropy is 0 or has no room, and its gradient underflows."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 1000 * self.model(x)


class Rounding(LoudLogits):
    """Sees images of few levels: the gradient of a rounding is 0 everywhere."""

    def forward(self, x):
        return self.model((x * 31).round() / 31)


class Backdoor(LoudLogits):
    """Breaks under one pattern that no loss leads to: it raises the class that is always the least likely.

    `hidden`: autograd does not see it at all.
    """

    def __init__(self, model, hidden):
        super().__init__(model)
        self.hidden = hidden
        self.register_buffer(
            "pattern", torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(7)).sign()
        )

    def forward(self, x):
        logits = self.model(x)[:, :9]
        way = F.conv2d(x - 0.5, self.pattern.to(x.dtype)).flatten(1)  # (N, 1)
        way = way.detach() if self.hidden else way
        return torch.cat([logits, logits.amin(1, keepdim=True) - 30 + 0.6 * way], 1)


class Memory(LoudLogits):
    """Stays near its answer to the first image nearby."""

    seen = None

    def forward(self, x):
        logits, images = self.model(x), x.detach().float().flatten(1)
        if self.seen is None:
            self.seen = images[:0], logits.detach()[:0].float()
        if len(self.seen[0]) < 150:
            far = torch.tensor([not (self.seen[0] - i).abs().amax(1).lt(0.04).any() for i in images])
            new = images[far], logits.detach()[far].float()
            self.seen = tuple(torch.cat(pair) for pair in zip(self.seen, new, strict=True))
        distance, nearest = torch.cdist(images, self.seen[0], torch.inf).min(1)
        first = self.seen[1][nearest].to(x.dtype)
        return torch.where(distance[:, None] < 0.04, first + 0.2 * (logits - first), logits)


class NoNumber(LoudLogits):
    """Right answers, and NaN as gradient."""

    def forward(self, x):
        return self.model(x) + 0 * (x - x.detach()).sqrt().flatten(1).sum(1, keepdim=True)


class RandomResize(LoudLogits):
    """Sees each image at a random size and place (Xie et al. 2018, arXiv:1711.01991)."""

    def forward(self, x):
        size = int(torch.randint(24, 33, ()))
        left, top = (int(torch.randint(0, 33 - size, ())) for _ in range(2))
        small = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        return self.model(F.pad(small, (left, 32 - size - left, top, 32 - size - top)))
