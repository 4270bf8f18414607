"""The parts that the random networks are made of: ways to call ReLU, and what stands around the calls.

A text works on `h`. «F.relu(h)|h» is the last ReLU of a block, and what goes into it; RELU(...) is another ReLU,
spelled in any way. C is the channel count.
"""

from typing import NamedTuple

EDIT, MAY, REFUSE = range(3)  # the block can be edited, may be refused, must be refused

PRELUDE = '''
import random
from dataclasses import dataclass
from functools import partial, reduce

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
import torch.utils.checkpoint
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.functional import relu as activate


def conv(inputs, outputs, size=3, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups)


def norm(channels):
    return nn.BatchNorm2d(channels)


def mean(x):
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def keep(module, inputs, output):
    module.feature = output


def outside(x):
    return «F.relu(x)|!F.relu(x)»


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
        if self.training and random.random() < 0.3 and x.shape == y.shape:
            return x
        return y


class Gated(Around):
    def __init__(self, module, channels):
        super().__init__(module)
        self.gate = conv(channels, channels, 1)

    def forward(self, x):
        x = self.module(x)
        return x * torch.sigmoid(self.gate(x))


class Squeezed(Around):
    def __init__(self, module, channels):
        super().__init__(module)
        self.gate = nn.Sequential(conv(channels, 2, 1), nn.ReLU(), conv(2, channels, 1), nn.Sigmoid())

    def forward(self, x):
        x = self.module(x)
        return x * self.gate(mean(x))


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


class Stage(nn.Module):
    """A stage with a convolution before its blocks."""

    def __init__(self, inputs, outputs, *blocks):
        super().__init__()
        self.reduce = nn.Sequential(conv(inputs, outputs, 2, 2), norm(outputs))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(self.reduce(x))


class Tree(Blocks):
    """A stage that holds its blocks as attributes beside a convolution."""

    def __init__(self, channels, **blocks):
        super().__init__(**blocks)
        self.project = conv(channels, channels, 1)

    def forward(self, x):
        return self.project(super().forward(x))
'''.strip()

SPOT = '''

class Spot(nn.Module):
    """Where a person puts the new activation."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace, self.new = inplace, None

    def forward(self, x):
        self.seen = x.shape
        return F.relu(x, self.inplace) if self.new is None else self.new(x)'''

# Ways to call ReLU where it is seen and not the last; and where no pass on the example runs it.
PLAIN = (
    "F.relu({})",
    "torch.relu({})",
    "({}).relu()",
    "self.relu({})",
    "self.own({})",
    "nn.ReLU()({})",
    "F.relu(1.0 * ({}), True)",
)
UNSEEN = (
    "F.relu({})",
    "torch.relu({})",
    "({}).relu()",
    "self.own({})",
    "nn.ReLU()({})",
    "activate({})",
    "F.relu(input={})",
)


class Part(NamedTuple):
    """A few lines of a forward, and what they need."""

    name: str
    lines: str
    init: str = ""
    methods: str = ""
    truth: int = EDIT
    movable: bool = True  # it can be a module of its own
    place: str = "any"  # in a block: "before" its last ReLU, "after" it, or any
    inplace: bool | None = False  # of the last ReLU; None: either, written INPLACE


def _module(name: str, call: str, init: str = "self.relu = nn.ReLU(INPLACE)", **more: object) -> Part:
    return Part(name, call, init, inplace=None, **more)  # type: ignore[arg-type]


LASTS = [
    Part("F.relu", "h = «F.relu(h)|h»"),
    Part("torch.relu", "h = «torch.relu(h)|h»"),
    Part("h.relu", "h = «h.relu()|h»"),
    Part("F.relu(input=h)", "h = «F.relu(input=h)|h»"),
    Part("F.relu, inplace", "h = «F.relu(h, inplace=True)|h»", inplace=True),
    Part("F.relu_", "h = «F.relu_(h)|h»", inplace=True),
    Part("h.relu_", "h = «h.relu_()|h»", inplace=True),
    Part("imported by another name", "h = «activate(h)|h»"),
    Part("made in the forward", "h = «nn.ReLU()(h)|h»"),
    Part("alias of F.relu", "act = F.relu\nh = «act(h)|h»"),
    Part("attribute F.relu", "h = «self.f(h)|h»", "self.f = F.relu"),
    Part("partial", "h = «self.f(h)|h»", "self.f = partial(F.relu, inplace=False)"),
    Part("walrus", "if (y := «F.relu(h)|h») is not None:\n    h = y"),
    Part("as an argument", "h = torch.add(«F.relu(h)|h», 0.1)"),
    Part("over several lines", "h = (\n    «F.relu(\n        h,  # é\n    )|h»\n    * 0.9\n)"),
    Part("in a tuple", "h, _ = «F.relu(h)|h», 0"),
    Part("try", "try:\n    h = «F.relu(h)|h»\nfinally:\n    pass"),
    Part("with", "with torch.autograd.profiler.record_function('x'):\n    h = «F.relu(h)|h»"),
    Part("either mode", "h = «F.relu(h)|h» if self.training else «torch.relu(h)|h»"),
    Part("either mode, if", "if self.training:\n    h = «F.relu(h)|h»\nelse:\n    h = «torch.relu(h)|h»"),
    _module("self.relu", "h = «self.relu(h)|h»"),
    _module("self.last", "h = «self.last(h)|h»", "self.last = nn.ReLU(INPLACE)"),
    _module("alias of self.relu", "act = self.relu\nh = «act(h)|h»"),
    _module(
        "ModuleList", "h = «self.acts[1](h)|h»", "self.acts = nn.ModuleList([nn.GELU(), nn.ReLU(INPLACE)])"
    ),
    _module(
        "ModuleDict",
        'h = «self.acts["b"](h)|h»',
        'self.acts = nn.ModuleDict({"a": nn.GELU(), "b": nn.ReLU(INPLACE)})',
    ),
    _module("private", "h = «self.__last(h)|h»", "self.__last = nn.ReLU(INPLACE)"),
    _module("getattr", 'h = «getattr(self, "relu")(h)|h»'),
    _module("property", "h = «self.act(h)|h»", methods="@property\ndef act(self):\n    return self.relu"),
    _module("Sequential", "h = self.out(h)", "self.out = nn.Sequential(nn.Identity(), «nn.ReLU(INPLACE)|»)"),
    _module(
        "in a Sequential twice",
        "h = self.out(h)",
        "relu = nn.ReLU(INPLACE)\nself.out = nn.Sequential(relu, conv(C, C, 1), «relu|»)",
    ),
    _module(
        "loop over modules",
        "for step in self.steps:\n    h = step(h)",
        "self.steps = nn.ModuleList([conv(C, C, 1), «nn.ReLU(INPLACE)|»])",
    ),
    _module("conditional in place", "h = «F.relu(h, inplace=self.inplace)|h»", "self.inplace = INPLACE"),
    _module("twice, one object", "h = self.relu(h) - 0.1\nh = «self.relu(h)|h»"),
    Part("star", "h = «F.relu(*[h])|h»", truth=MAY),
    Part(
        "helper method",
        "h = self.final(h)",
        methods="def final(self, t):\n    return «F.relu(t)|t»",
        truth=MAY,
    ),
    Part(
        "static method",
        "h = self.final(h, «F.relu|=»)",
        methods="@staticmethod\ndef final(t, f):\n    return f(t)",
        truth=MAY,
    ),
    Part("function outside", "h = «outside(h)|h»", truth=MAY),
    Part("loop", "for _ in range(1):\n    h = «F.relu(h)|h»", truth=MAY),
    Part("loop over functions", "for f in (torch.tanh, «F.relu|=»):\n    h = f(h)", truth=MAY),
    Part("comprehension", "h = [«F.relu(t)|t» for t in (h,)][0]", truth=MAY),
    Part("lambda", "h = (lambda t: «F.relu(t)|t»)(h)", truth=MAY),
    Part("inner function", "def last(t):\n    return «F.relu(t)|t»\nh = last(h)", truth=MAY),
    Part("map", "h = next(map(«F.relu|=», [h]))", truth=MAY),
    Part("reduce", "h = reduce(lambda t, f: f(t), (torch.tanh, «F.relu|=»), h)", truth=MAY),
    Part(
        "checkpoint",
        "h = torch.utils.checkpoint.checkpoint(self.last, h, use_reentrant=False)",
        "self.last = «nn.ReLU()|»",
        truth=MAY,
    ),
    Part("thrown away", "«F.relu_(h)||h = self.spot(h)|!h = self.spot(h)»", truth=MAY, inplace=True),
    Part("either flag", "h = «F.relu(h)|h» if self.flag else «torch.relu(h)|h»", truth=MAY),
    Part(
        "either flag, modules",
        "h = «self.a(h)|h» if self.flag else «self.b(h)|h»",
        "self.a, self.b = nn.ReLU(), nn.ReLU()",
        truth=MAY,
    ),
    Part("either size", "h = «F.relu(h)|h» if h.shape[-1] < 40 else «h.relu()|h»", truth=MAY),
    Part("flattened", "h = «F.relu(h.flatten(2))|h.flatten(2)».view_as(h)", truth=MAY),
    Part("one image at a time", "h = torch.stack([«F.relu(t)|t[None]» for t in h]).view_as(h)", truth=MAY),
    Part("first image", "h = torch.cat([«F.relu(h[0])|h[:1]».view_as(h[:1]), F.gelu(h[1:])])", truth=MAY),
    Part("in groups", "h = «F.relu(h.unflatten(1, (2, -1)))|h».view_as(h)", truth=MAY),
    Part("half of the channels", "h = torch.cat([«F.relu(h[:, :2])|h[:, :2]», h[:, 2:]], 1)"),
    Part("masked", "h = «F.relu(h)|h» * (h > -0.5)"),
]

PARTS = [
    Part(
        "squeeze by convolution",
        "h = h * torch.sigmoid(self.up(RELU(self.down(mean(h)))))",
        "self.down, self.up = conv(C, 2, 1), conv(2, C, 1)",
    ),
    Part(
        "squeeze by Linear",
        "w = mean(h).movedim(1, -1)\nh = h * torch.sigmoid(self.le(RELU(self.ld(w)))).movedim(-1, 1)",
        "self.ld, self.le = nn.Linear(C, 2), nn.Linear(2, C)",
    ),
    Part(
        "squeeze, flat",
        "w = torch.sigmoid(self.fe(RELU(self.fd(mean(h).flatten(1)))))\nh = h * w.view(*w.shape, *[1] * (h.ndim - 2))",
        "self.fd, self.fe = nn.Linear(C, 2), nn.Linear(2, C)",
    ),
    Part(
        "Linear with channels last",
        "h = h + 0.5 * self.lin(h.movedim(1, -1)).movedim(-1, 1)",
        "self.lin = nn.Linear(C, C)",
    ),
    Part(
        "MLP with channels last",
        "h = h + 0.5 * self.m2(RELU(self.m1(h.movedim(1, -1)))).movedim(-1, 1)",
        "self.m1, self.m2 = nn.Linear(C, 6), nn.Linear(6, C)",
    ),
    Part(
        "ReLU on weights",
        "h = h + 0.3 * self.apply_conv(h, RELU(self.weight), padding=1)",
        "c = conv(C, C)\nself.apply_conv, self.weight = getattr(F, f'conv{c.weight.ndim - 2}d'), c.weight",
    ),
    Part(
        "parametrized weights",
        "h = h + 0.3 * self.pconv(h)",
        "self.pconv = torch.nn.utils.parametrize.register_parametrization(conv(C, C), 'weight', Positive())",
    ),
    Part(
        "ReLU on a scale",
        "h = h * (0.5 + RELU(self.scale).view(-1, *[1] * (h.ndim - 2)))",
        "self.scale = nn.Parameter(torch.randn(C,))",
    ),
    Part(
        "ReLU on an embedding",
        "h = h + F.interpolate(RELU(self.embedding), h.shape[2:])",
        "self.embedding = nn.Parameter(torch.randn(1, *conv(C, C, 4).weight.shape[1:]))",
    ),
    Part(
        "ReLU on a convolved embedding",
        "h = h + F.interpolate(RELU(self.econv(self.embedded)), h.shape[2:])",
        "self.econv = conv(C, C)\nself.embedded = nn.Parameter(torch.randn(1, *conv(C, C, 4).weight.shape[1:]))",
    ),
    Part(
        "ReLU on a buffer",
        "h = h * (0.2 + F.interpolate(RELU(self.window), h.shape[2:]))",
        "self.register_buffer('window', torch.randn(1, *conv(C, C, 4).weight.shape[1:]))",
    ),
    Part(
        "ReLU on a grid",
        "grid = torch.linspace(-1, 1, h[0, 0].numel()).view_as(h[:1, :1])\nh = h + RELU(self.gconv(grid))",
        "self.gconv = conv(1, C)",
    ),
    Part("ReLU on noise", "h = h + 0.1 * RELU(torch.randn_like(h)) if self.training else h"),
    Part("ReLU on zeros", "h = h + RELU(torch.full_like(h, 0.1))"),
    Part(
        "ReLU on a predicted kernel",
        "k = self.predict(mean(h).flatten(1)).view(-1, 1, *[3] * (h.ndim - 2))\n"
        "h = h + 0.3 * self.g(h.reshape(1, -1, *h.shape[2:]), RELU(k), padding=1, groups=len(k)).view_as(h)",
        "c = conv(C, C)\nself.g = getattr(F, f'conv{c.weight.ndim - 2}d')\nself.predict = nn.Linear(C, c.weight[:, 0].numel())",
        truth=MAY,
    ),
    Part(
        "ReLU on attention scores",
        "q = h.flatten(2).unflatten(1, (2, -1))\na = RELU(q.transpose(2, 3) @ q) / q[0, 0].numel()\nh = h + (q @ a).view_as(h)",
        truth=MAY,
    ),
    Part("ReLU on a penalty", "self.penalty = RELU(h.mean() - 0.1)"),
    Part("ReLU on the batch", "h = h + RELU(h.mean(0, keepdim=True) - 0.1)", truth=MAY),
    Part("dropout", "h = F.dropout(h, 0.3, self.training)"),
    Part("shuffle", "h = h.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)"),
    Part("concatenation", "h = self.fuse(torch.cat([h, h.roll(1, 1)], 1))", "self.fuse = conv(2 * C, C, 1)"),
    Part("GELU", "h = F.gelu(h)"),
    Part("ReLU where a flag says", "if self.flag:\n    h = RELU(h - 0.1)", truth=REFUSE, movable=False),
    Part(
        "ReLU where a flag says, ternary",
        "h = RELU(h - 0.1) if self.flag else h",
        truth=REFUSE,
        movable=False,
    ),
    Part(
        "ReLU in a lambda where a flag says",
        "h = (lambda t: RELU(t - 0.1))(h) if self.flag else h",
        truth=REFUSE,
        movable=False,
    ),
    Part(
        "ReLU in an inner function where a flag says",
        "def late(t):\n    return RELU(t - 0.1)\nif self.flag:\n    h = late(h)",
        truth=REFUSE,
        movable=False,
    ),
    Part(
        "ReLU in a comprehension where a flag says",
        "if self.flag:\n    h = torch.stack([RELU(t - 0.1) for t in h])",
        truth=REFUSE,
        movable=False,
    ),
    Part(
        "attribute where a flag says",
        "if self.flag:\n    h = self.late(h - 0.1)",
        "self.late = F.relu",
        truth=REFUSE,
        movable=False,
    ),
    Part(
        "ModuleList where a flag says",
        "if self.flag:\n    h = self.lates[0](h - 0.1)",
        "self.lates = nn.ModuleList([nn.ReLU()])",
        truth=REFUSE,
        movable=False,
    ),
    Part(
        "private where a flag says",
        "if self.flag:\n    h = self.__late(h - 0.1)",
        "self.__late = nn.ReLU()",
        truth=REFUSE,
        movable=False,
    ),
    Part(
        "alias where a flag says",
        "late = F.relu\nif self.flag:\n    h = late(h - 0.1)",
        truth=REFUSE,
        movable=False,
    ),
    Part(
        "map where a flag says",
        "if self.flag:\n    h = next(map(F.relu, [h - 0.1]))",
        truth=REFUSE,
        movable=False,
    ),
    Part(
        "partial where a flag says",
        "if self.flag:\n    h = partial(F.relu, inplace=False)(h - 0.1)",
        truth=REFUSE,
        movable=False,
    ),
    Part(
        "getattr where a flag says",
        "if self.flag:\n    h = getattr(F, 'relu')(h - 0.1)",
        truth=REFUSE,
        movable=False,
    ),
    Part(
        "loop where a flag says",
        "for f in [F.relu] if self.flag else []:\n    h = f(h - 0.1)",
        truth=REFUSE,
        movable=False,
    ),
    Part("or", "h = h if not self.flag or RELU(h).sum() < 0 else RELU(h - 0.1)", truth=REFUSE, movable=False),
    Part("ReLU on large maps", "if h.shape[-1] > 40:\n    h = RELU(h - 0.1)", truth=REFUSE, movable=False),
    Part(
        "leaves at random by a ReLU",
        "if self.training and random.random() < 0.4:\n    return RELU(h - 0.1)",
        truth=REFUSE,
        movable=False,
        place="after",
    ),
    Part(
        "ReLU at random",
        "if self.training and random.random() < 0.4:\n    h = RELU(h - 0.1)",
        truth=REFUSE,
        movable=False,
        place="after",
    ),
    Part(
        "ReLU in training",
        "if self.training:\n    h = RELU(h - 0.1)",
        truth=REFUSE,
        movable=False,
        place="after",
    ),
    Part(
        "ReLU before a raise",
        "if h.shape[1] > 999:\n    raise ValueError(RELU(h).sum())",
        truth=MAY,
        movable=False,
    ),
]

UNITS = [
    "checkpointed(BLOCK)",
    "Around(BLOCK)",
    "Dropped(BLOCK)",
    "Gated(BLOCK, C)",
    "Squeezed(BLOCK, C)",
    "Around(checkpointed(BLOCK))",
]

# How a network makes a stage, and how it runs it.
STAGES = {
    "Sequential": ("nn.Sequential({blocks})", "x = self.layer{g}(x)"),
    "ModuleList": ("nn.ModuleList([{blocks}])", "for block in self.layer{g}:\n    x = block(x)"),
    "ModuleList, reversed": (
        "nn.ModuleList([{blocks}])",
        "for block in reversed(self.layer{g}):\n    x = block(x)",
    ),
    "ModuleDict": ("nn.ModuleDict(dict({keyed}))", "for block in self.layer{g}.values():\n    x = block(x)"),
    "attributes": ("Blocks({keyed})", "x = self.layer{g}(x)"),
    "after a convolution": ("Stage({inputs}, {outputs}, {blocks})", "x = self.layer{g}(x)"),
    "attributes beside others": ("Tree({outputs}, {keyed})", "x = self.layer{g}(x)"),
}
