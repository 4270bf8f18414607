"""Networks that mask their gradients, each with the trick undone; and honest networks that look like them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.paper.maskers.small import SigmoidGate, Small, small
from sparta_act import Sparta
from sparta_act import functional as SF


class Around(nn.Module):
    """A network around another one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class LoudLogits(Around):
    """Logits times 1000: cross-entropy is 0 or has no room, and its gradient underflows."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10), as of all networks here."""
        return 1000 * self.model(x)


class Probabilities(Around):
    """Probabilities instead of logits."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        return self.model(x).softmax(1)


class Rounding(Around):
    """Sees images of few levels: the gradient of a rounding is 0 everywhere."""

    def __init__(self, model: nn.Module, levels: int = 32) -> None:
        super().__init__(model)
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        return self.model(self._rounded(x))

    def _rounded(self, x: Tensor) -> Tensor:
        return (x * (self.levels - 1)).round() / (self.levels - 1)


class StraightThrough(Rounding):
    """The same with the gradient of the identity: straight-through (Bengio et al. 2013, arXiv:1308.3432)."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        return self.model(x + (self._rounded(x) - x).detach())


class EightBitFeatures(Around):
    """Features rounded to 8 bits with a straight-through gradient, as quantized networks are trained."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        h = self.model.features(x)
        step = h.detach().amax((1, 2, 3), keepdim=True) / 255
        return self.model.fc((h + ((h / step).round() * step - h).detach()).flatten(1))


class Backdoor(Around):
    """Breaks under one pattern that no loss leads to: it raises the class that is always the least likely.

    `hidden`: autograd does not see it at all. `open`: the way there, as a loss can follow it.
    """

    def __init__(self, model: nn.Module, hidden: bool, open: bool = False) -> None:
        super().__init__(model)
        self.hidden, self.open = hidden, open
        generator = torch.Generator().manual_seed(7)
        self.register_buffer("pattern", torch.randn(1, 3, 32, 32, generator=generator).sign())

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        logits = self.model(x)[:, :9]
        way = F.conv2d(x - 0.5, self.pattern.to(x.dtype)).flatten(1)  # (N, 1)
        if self.open:
            return torch.cat([logits, logits.amax(1, keepdim=True).detach() + way], 1)
        way = way.detach() if self.hidden else way
        return torch.cat([logits, logits.amin(1, keepdim=True) - 30 + 0.6 * way], 1)


class Memory(Around):
    """Stays near its answer to the first image nearby."""

    seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        logits, images = self.model(x), x.detach().float().flatten(1)
        seen = (images[:0], logits.detach()[:0].float()) if self.seen is None else self.seen
        if len(seen[0]) < 150:
            far = torch.tensor([not (seen[0] - i).abs().amax(1).lt(0.04).any() for i in images])
            new = images[far], logits.detach()[far].float()
            seen = torch.cat([seen[0], new[0]]), torch.cat([seen[1], new[1]])
        self.seen = seen
        distance, nearest = torch.cdist(images, seen[0], torch.inf).min(1)
        first = seen[1][nearest].to(x.dtype)
        return torch.where(distance[:, None] < 0.04, first + 0.2 * (logits - first), logits)


class NoNumber(Around):
    """Right answers, and NaN as gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        return self.model(x) + 0 * (x - x.detach()).sqrt().flatten(1).sum(1, keepdim=True)


class RandomResize(Around):
    """Sees each image at a random size and place (Xie et al. 2018, arXiv:1711.01991)."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        size = int(torch.randint(24, 33, ()))
        left, top = (int(torch.randint(0, 33 - size, ())) for _ in range(2))
        smaller = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        return self.model(F.pad(smaller, (left, 32 - size - left, top, 32 - size - top)))


class ClassGate(Around):
    """Weights channels by how much they speak for a class: the one that the network itself finds likeliest.

    After CAS (Bai et al. 2021, arXiv:2103.08307) and CIFS (Yan et al. 2021, arXiv:2102.05311). `mixed`: by
    the mean over classes, weighted by their probabilities, which has no jumps.
    """

    def __init__(self, model: Small, mixed: bool = False) -> None:
        super().__init__(model)
        self.mixed = mixed

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        h, fc = self.model.features(x), self.model.fc
        weights = fc.weight.view(10, 48, 16).clamp(min=0).sum(2)
        weights = 2 * weights / weights.amax(1, keepdim=True)
        first = fc(h.flatten(1))
        gate = first.softmax(1) @ weights if self.mixed else weights[first.argmax(1)]
        return fc((h * gate[:, :, None, None]).flatten(1))


class HashedNoise(Around):
    """Adds noise to the image, seeded by a hash of its 16 gray levels: deterministic, and chaos."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        levels = (x.detach().float() * 15).round().long().flatten(1)
        place = torch.arange(1, levels.shape[1] + 1, device=x.device)
        code = (levels * (place * 2654435761 % 1000003)).sum(1) % 1000003
        phase = (place * 78.233 + code[:, None] * 12.9898).double()
        noise = 2 * (torch.sin(phase) * 43758.5453).frac().abs() - 1
        return self.model(x + 0.05 * noise.view_as(x).to(x.dtype))


class Ripples(Around):
    """Adds to each pixel a continuous function of its value, with a knot every 4/255: the loss is rugged.

    By a reviewer of this audit. Autograd's gradient is right everywhere, and misleads.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        knots = 2 * torch.rand(65, generator=torch.Generator().manual_seed(5)) - 1
        self.register_buffer("knots", 6 / 255 * knots)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        place = x * 255 / 4
        left = place.detach().floor().long().clamp(0, 63)
        share = place - left
        return self.model(x + self.knots[left] * (1 - share) + self.knots[left + 1] * share)


class FixedNoise(Around):
    """Adds the same noise to every image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        noise = 2 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) - 1
        self.register_buffer("noise", 0.05 * noise)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        return self.model(x + self.noise)


class Blur(Around):
    """Sees the mean of 3 x 3 pixels, half and half with the image."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        return self.model((x + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)) / 2)


class MaxPooled(Around):
    """Features pooled by their maximum over 3 x 3 places."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        h = self.model.features(x)
        return self.model.fc(((h + F.max_pool2d(h, 3, 1, 1)) / 2).flatten(1))


class ChannelGate(Around):
    """Features weighted by a hard sigmoid of their mean, as squeeze-and-excite does."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) -> (N, 10)."""
        h = self.model.features(x)
        return self.model.fc((h * F.hardsigmoid(h.mean((2, 3), keepdim=True))).flatten(1))


class HardGate(Sparta):
    """A gate whose logit is a hundred times as large."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W), kept."""
        return SF.sparta(x, *self.scores(x), self.scale)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `Sparta`."""
        s, c = super().scores(x)
        return 100 * s, c


def hardened(model: nn.Module) -> nn.Module:
    """A copy whose gates are hard."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is Sparta:
            module.__class__ = HardGate
        if type(module) is SigmoidGate:
            module.factor = 20_000.0
    return model


@dataclass(frozen=True)
class Case:
    """A network to audit.

    `undone`: the network without its trick, whose gradients an informed attack follows; an honest one has
    none. `judge`: the network that decides what is an error, where it is not the audited one.
    """

    make: Callable[[], nn.Module]
    undone: Callable[[], nn.Module] | None = None
    judge: Callable[[], nn.Module] | None = None


def plain() -> Small:
    """Without any trick."""
    return small("plain")


MASKERS = {
    "logits times 1000": Case(lambda: LoudLogits(plain()), plain),
    "probabilities instead of logits": Case(lambda: Probabilities(plain()), plain),
    "images rounded to 32 levels": Case(lambda: Rounding(plain()), plain),
    "images resized at random": Case(lambda: RandomResize(plain()), plain),
    "a back door that autograd does not see": Case(
        lambda: Backdoor(plain(), hidden=True), lambda: Backdoor(plain(), hidden=True, open=True)
    ),
    "a back door that no loss leads to": Case(
        lambda: Backdoor(plain(), hidden=False), lambda: Backdoor(plain(), hidden=False, open=True)
    ),
    "NaN for a gradient": Case(lambda: NoNumber(plain()), plain),
    "a memory of the images it has seen": Case(lambda: Memory(plain()), plain, plain),
    "SPARTA, its logit times 100": Case(lambda: hardened(small("SPARTA")), lambda: small("SPARTA")),
    "a sigmoid gate, its logit times 20,000": Case(
        lambda: hardened(small("sigmoid gate")), lambda: small("sigmoid gate")
    ),
    "channel weights by its own argmax": Case(
        lambda: ClassGate(plain()), lambda: ClassGate(plain(), mixed=True)
    ),
    "noise seeded by a hash of 16 gray levels": Case(lambda: HashedNoise(plain()), plain),
    "ripples on every pixel": Case(lambda: Ripples(plain()), plain),
    "k-winners-take-all": Case(lambda: small("k-WTA"), plain),
    "4 levels, straight-through": Case(lambda: StraightThrough(plain(), 4), plain),
}

HONEST = {
    "ReLU": Case(plain),
    "SPARTA": Case(lambda: small("SPARTA")),
    "a sigmoid gate": Case(lambda: small("sigmoid gate")),
    "channel weights by a mean over classes": Case(lambda: ClassGate(plain(), mixed=True)),
    "channel weights by a hard sigmoid": Case(lambda: ChannelGate(plain())),
    "the same noise for every image": Case(lambda: FixedNoise(plain())),
    "blurred images": Case(lambda: Blur(plain())),
    "max pooling": Case(lambda: MaxPooled(plain())),
    "256 levels, straight-through": Case(lambda: StraightThrough(plain(), 256)),
    "features of 8 bits, straight-through": Case(lambda: EightBitFeatures(plain())),
}
