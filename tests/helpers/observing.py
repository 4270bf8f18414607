"""Builds a written network, and observes what it computes, keeps and holds."""

import importlib.util
import itertools
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.recording import tensors
from tests.helpers.random_networks import Written

SIZE = {1: 24, 2: 12, 3: 8}  # of the images, by their dimensions
KEPT = ("feature", "penalty")  # attributes that a pass sets
numbered = itertools.count()


def build(text: str, folder: Path) -> nn.Module:
    """The network that the text of a module defines."""
    name = f"written_network_{next(numbered)}"
    (folder / f"{name}.py").write_text(text)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec
    assert spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    net: nn.Module = module.Net()
    return net


def example(written: Written) -> Tensor:
    """An input of the network."""
    return torch.rand(2, 3, *[SIZE[written.dimensions]] * written.dimensions)


class Situation(NamedTuple):
    """The circumstances of a pass."""

    training: bool
    flag: bool
    size: tuple[int, ...]
    seed: int


def situations(written: Written) -> list[Situation]:
    """Those in which the network may act differently."""
    large = [60] if "shape[-1] " in written.text and written.dimensions < 3 else []
    sizes = [(size,) * written.dimensions for size in [SIZE[written.dimensions], *large]]
    seeds = range(4) if "random()" in written.text else range(1)
    flags = (False, True) if "self.flag" in written.text else (False,)
    several = [Situation(False, f, s, 0) for s in sizes for f in flags]
    return several + [Situation(True, f, sizes[0], seed) for f in flags for seed in seeds]


def observed(net: nn.Module, situation: Situation) -> list[Tensor]:
    """What the network returns and keeps; the network is afterwards as before, but for what it keeps."""
    zeros = [p for p in net.parameters() if not p.any()]  # a norm initialized to zero hides its block
    state = [(t, t.clone()) for t in (*zeros, *net.buffers())]
    modes = [(m, m.training) for m in net.modules()]
    flagged = [m for m in net.modules() if hasattr(type(m), "flag")]
    for m in net.modules():
        for name in KEPT:
            vars(m).pop(name, None)
    try:
        for parameter in zeros:
            parameter.data.fill_(0.7)
        for m in flagged:
            m.flag = situation.flag
        torch.manual_seed(situation.seed)
        random.seed(situation.seed)
        x = torch.rand(3, 3, *situation.size)
        with torch.no_grad():
            found = tensors(net.train(situation.training)(x))
        kept = [vars(m)[k] for m in net.modules() for k in KEPT if isinstance(vars(m).get(k), Tensor)]
        statistics = [b.float() for n, b in net.named_buffers()]
        return [t.clone() for t in (*found, *kept, *statistics)]
    finally:
        for tensor, value in state:
            tensor.data.copy_(value)
        for m, mode in modes:
            m.training = mode
        for m in flagged:
            del m.flag


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether all numbers agree, but for the order of additions."""
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(left, right, strict=True)
    )


def fingerprint(net: nn.Module, kept: bool = True) -> list[object]:
    """What the surgery could leave changed in a network; tensors by their place and their bytes."""
    found: list[object] = []
    for name, m in net.named_modules(remove_duplicate=False):
        own = {k: v for k, v in vars(m).items() if kept or k not in KEPT}
        found.append(
            (name, id(m), type(m), m.training, [(k, id(v)) for k, v in own.items() if k != "training"])
        )
        found += [[*map(id, v)] for v in own.values() if isinstance(v, list)]
        found += [(k, id(v)) for group in (m._parameters, m._buffers, m._modules) for k, v in group.items()]
        found += [(k, id(h)) for k, h in m._forward_hooks.items()]
    for name, t in (*net.named_parameters(), *net.named_buffers()):
        found.append(
            (name, t.data_ptr(), t.dtype, t.requires_grad, t.grad is None, t.detach().numpy().tobytes())
        )
    return found


def drawn() -> list[object]:
    """The state of all random numbers."""
    numpy = np.random.get_state()[1].tobytes()  # type: ignore[union-attr]  # noqa: NPY002
    return [torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy]
