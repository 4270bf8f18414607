"""The source of a class, with its last ReLUs marked: «F.relu(h)|h» is the call, and what goes into it.

An argument that begins with ! is the whole text of the twin; = is the activation itself.
"""

import re
from dataclasses import dataclass, field

HEADER = """import random
from functools import partial, reduce

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
import torch.utils.checkpoint
from torch import nn
from torch.nn.functional import relu as activate

from tests.helpers.network_pieces import *


def conv(inputs, outputs, size=3, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2)


def norm(channels):
    return nn.BatchNorm2d(channels)
"""


def read(text: str, twin: bool) -> str:
    """A marked text, as the network has it or as its twin has it."""

    def one(match: re.Match[str]) -> str:
        original, argument = match[1].rsplit("|", 1)
        if not twin or argument.startswith("!"):
            return argument[1:] if twin else original
        return "self.spot" if argument == "=" else f"self.spot({argument})"

    return re.sub("«(.*?)»", one, text, flags=re.DOTALL)


@dataclass
class Class:
    """A class of blocks, or of a part of one, as it is written."""

    name: str
    takes: str  # by __init__, after self
    inplace: bool  # whether the modules of ReLU are
    spot: bool = False  # whether the last ReLU is
    init: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    truth: int = 0
    words: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Its source, with the last calls marked."""
        body = "\n".join(self.lines)
        spot = '«|!; vars(self)["spot"] = Spot(SPOT)»' if "self.spot" in read(body, True) else ""
        init = "\n".join([f"super().__init__(){spot}", *dict.fromkeys(self.init)])
        methods = [*dict.fromkeys(self.methods)]
        pieces = [f"def __init__(self{self.takes}):\n" + indented(init), *methods]
        pieces += ["def forward(self, h):\n" + indented(body)]
        text = f"class {self.name}(nn.Module):\n    flag = False\n\n" + indented("\n\n".join(pieces))
        return text.replace("INPLACE", str(self.inplace)).replace("Spot(SPOT)", f"Spot({self.spot})")


def indented(text: str) -> str:
    return "\n".join("    " + line if line else line for line in text.splitlines())
