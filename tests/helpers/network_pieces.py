"""What the random networks import: wrappers around blocks, stages, and small functions."""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper


def mean(x):
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def keep(module, inputs, output):
    module.feature = output


def outside(x):
    return F.relu(x)


def checkpointed(module):
    return checkpoint_wrapper(module, checkpoint_impl=CheckpointImpl.NO_REENTRANT)


@dataclass
class Answer:
    y: torch.Tensor
    maps: list


class Positive(nn.Module):
    def forward(self, weight):
        return F.relu(weight)


class Around(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Dropped(Around):
    def forward(self, x):
        y = self.module(x)
        return x if self.training and random.random() < 0.3 and x.shape == y.shape else y


class Gated(Around):
    """A block, and an attention beside it."""

    def __init__(self, module, gate):
        super().__init__(module)
        self.gate = gate

    def forward(self, x):
        x = self.module(x)
        return x * torch.sigmoid(self.gate(x))


class Squeezed(Gated):
    def forward(self, x):
        x = self.module(x)
        return x * torch.sigmoid(self.gate(mean(x)))


class Blocks(nn.Module):
    """A stage that holds its blocks as attributes, and nothing else."""

    def __init__(self, **blocks):
        super().__init__()
        for name, block in blocks.items():
            setattr(self, name, block)
        self.names = [*blocks]

    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return x


class Tree(Blocks):
    """A stage that holds its blocks as attributes beside a convolution."""

    def __init__(self, project, **blocks):
        super().__init__(**blocks)
        self.project = project

    def forward(self, x):
        return self.project(super().forward(x))


class Stage(nn.Module):
    """A stage with a convolution before its blocks."""

    def __init__(self, reduce, *blocks):
        super().__init__()
        self.reduce, self.blocks = reduce, nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(self.reduce(x))


class Spot(nn.Module):
    """In the twin of a network: where a person puts the new activation."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace, self.new = inplace, None

    def forward(self, x):
        self.seen = x.shape
        return F.relu(x, self.inplace) if self.new is None else self.new(x)
