"""Small networks in the manners of public ones; the surgery must find the last ReLU of each block in all."""

import functools
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def conv3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class Block(nn.Module):
    """The layers of a residual block; a subclass says how they are used."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = conv3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class OneModule(Block):
    """As in torchvision: one `self.relu`, in place, called twice."""

    def __init__(self, *args):
        super().__init__(*args)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class TwoModules(Block):
    """As in timm."""

    def __init__(self, *args):
        super().__init__(*args)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x):
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += self.shortcut(shortcut)
        return self.act2(x)


class Functional(Block):
    """As in many CIFAR networks."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class OneLine(Block):
    """Equal expressions in one line, of which the last one called is not the one that counts first."""

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x)
        return (F.relu(out), F.relu(out), F.relu(out))[2]


class ManyLines(Block):
    """Letters of two bytes, and calls over several lines, with a comment."""

    def forward(self, x):
        é, b = self.bn1(self.conv1(x)), self.shortcut(x)
        é = (
            é
            .relu()
        )  # fmt: skip
        return b"\xc3" and F.relu(
            self.bn2(self.conv2(é)) + b,  # é: columns are counted in bytes
            inplace=True,
        )


class Method(Block):
    def forward(self, x):
        out = torch.relu(input=self.bn1(self.conv1(x)))
        return (self.bn2(self.conv2(out)) + self.shortcut(x)).relu_()


class Inline(Block):
    def forward(self, x):
        out = nn.ReLU()(self.bn1(self.conv1(x)))
        out = F.relu_(self.bn2(self.conv2(out)) + self.shortcut(x))
        return out  # noqa: RET504


class Conditional(Block):
    """A call that never runs, before the last one."""

    inplace = True

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out = F.relu(out) if self.inplace else torch.relu(out)
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out, inplace=self.inplace)


class ByMode(Block):
    """Another call in training than in evaluation."""

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.training:
            return F.relu(out + self.shortcut(x))
        return torch.relu(self.shortcut(x) + out)


class PreActivation(Block):
    def __init__(self, inputs, outputs, stride):
        super().__init__(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(inputs)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)
        self.act = nn.ReLU()

    def forward(self, x):
        return x * torch.sigmoid(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))


class SqueezeLast(Block):
    """The very last ReLU works on single pixels: it is no site."""

    def __init__(self, inputs, outputs, stride):
        super().__init__(inputs, outputs, stride)
        self.act, self.se = nn.ReLU(), SqueezeExcite(outputs)

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        return self.se(self.bn2(self.conv2(out))) + self.shortcut(x)


class Inherited(OneModule):
    """Uses `super()`, and a ReLU after the forward it inherits."""

    def forward(self, x):
        out = super().forward(x) - 1
        return F.relu(out)


def scaled(factor):
    def decorate(forward):
        @functools.wraps(forward)
        def wrapper(self, x):
            return forward(self, x) * factor

        return wrapper

    return decorate


def local_class():
    half = 0.5

    class Closure(Block):
        """Free variables, default and keyword arguments, decorators, `super()`."""

        @scaled(2.0)
        @torch.no_grad()
        @scaled(half)
        def forward(self, x, scale=half, *, shift=0.25):
            assert super().extra_repr() == ""
            out = F.relu(self.bn1(self.conv1(x))) * scale
            return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x) + shift)

    return Closure


class Skipped(Block):
    """Stochastic depth that leaves the block at once, or by another ReLU."""

    def forward(self, x):
        if self.training and random.random() < 0.6:
            return F.relu(self.shortcut(x)) if np.random.rand() < 0.5 else self.shortcut(x)  # noqa: NPY002
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Wrapped(Block):
    """The sum in a module of its own, as for quantization, and the ReLU in a Sequential."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sum = nn.quantized.FloatFunctional()
        self.tail = nn.Sequential(nn.Identity(), nn.ReLU())
        self.front = nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.conv2, self.bn2)

    def forward(self, x):
        return self.tail(self.sum.add(self.front(x), self.shortcut(x)))


class SharedAct(Block):
    """One activation for the whole network, handed in."""

    act = nn.ReLU(inplace=True)

    def __init__(self, *args):
        super().__init__(*args)
        self.body = nn.Sequential(self.conv1, self.bn1, SharedAct.act, self.conv2, self.bn2)
        self.act = SharedAct.act

    def forward(self, x):
        return self.act(self.body(x) + self.shortcut(x))


class Net(nn.Module):
    """Two groups of two blocks, behind a stem that is no group."""

    def __init__(self, block, width=4):
        super().__init__()
        self.unused = block(3, width, 1)  # registered and never called
        self.stem = nn.Sequential(conv3(3, width), nn.BatchNorm2d(width), nn.ReLU())
        self.layer1 = nn.Sequential(block(width, width, 1), block(width, width, 1))
        self.layer2 = nn.ModuleList([block(width, 2 * width, 2), block(2 * width, 2 * width, 1)])
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x):
        x = self.layer1(self.stem(x))
        for block in self.layer2:
            x = block(x)
        return self.head(F.relu(x.mean((2, 3))))


class Unit(nn.Module):
    """Nothing is added here: no residual block."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = conv3(inputs, outputs)

    def forward(self, x):
        return F.relu(self.conv(x))


class Plain(nn.Module):
    """No blocks: convolutions and ReLUs in a row, then a head that fits 16 x 16 images only."""

    def __init__(self, width=4):
        super().__init__()
        self.features = nn.Sequential(
            conv3(3, width),
            nn.ReLU(True),
            conv3(width, width),
            nn.ReLU(True),
            nn.MaxPool2d(2),
            conv3(width, 8),
            nn.ReLU(),
        )
        self.classifier = nn.Sequential(nn.Linear(8 * 64, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))
