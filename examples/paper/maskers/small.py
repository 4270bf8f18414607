"""Four small networks, adversarially trained on the sample in a minute each, that the maskers are made of.

`python -m examples.paper.maskers.small` trains them and writes their weights.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.common import data
from examples.paper.common.atomic import atomic_write
from examples.paper.training.recipes import RECIPES
from examples.paper.training.trainer import Trainer
from sparta_act import Sparta

WEIGHTS = Path(__file__).parents[2] / "networks" / "small.safetensors"
EPS = 4 / 255


class Small(nn.Module):
    """Three convolutions, for images of 32 x 32; `gate` may replace the second ReLU."""

    def __init__(self, gate: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for before, after in ((3, 16), (16, 32), (32, 48)):
            self.body.append(nn.Conv2d(before, after, 3, 2, 1))
            self.body.append(gate(after) if gate and after == 32 else nn.ReLU())
        self.fc = nn.Linear(48 * 16, 10)

    def features(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) in [0, 1] -> (N, 48, 4, 4)."""
        return self.body((x - 0.5) / 0.25)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, 32, 32) in [0, 1] -> (N, 10)."""
        return self.fc(self.features(x).flatten(1))


class SigmoidGate(nn.Module):
    """max(x, 0) * sigmoid(factor * conv(x)): a gate that is no `Sparta`."""

    def __init__(self, channels: int, factor: float = 1.0) -> None:
        super().__init__()
        self.conv, self.factor = nn.Conv2d(channels, channels, 1), factor

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W), kept."""
        return F.relu(x) * torch.sigmoid(self.factor * self.conv(x))


class KWTA(nn.Module):
    """k-winners-take-all: keeps the largest 15% of an image's features.

    Source: Xiao et al. 2020, arXiv:1905.10510.
    """

    def __init__(self, channels: int, share: float = 0.15) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, C, H, W), kept."""
        flat = x.flatten(1)
        least = flat.topk(int(self.share * flat.shape[1]), 1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


GATES: dict[str, Callable[[int], nn.Module] | None] = {
    "plain": None,
    "sigmoid gate": SigmoidGate,
    "SPARTA": Sparta,
    "k-WTA": KWTA,
}


def small(name: str) -> Small:
    """A trained network, by the name of its gate, in evaluation mode and frozen."""
    model = Small(GATES[name])
    prefix = f"{name}."
    state = {k.removeprefix(prefix): v for k, v in load_file(WEIGHTS).items() if k.startswith(prefix)}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def trained(gate: Callable[[int], nn.Module] | None) -> Small:
    """Adversarially trained on the sample in under a minute, and weak: half of the images are right."""
    torch.manual_seed(0)
    model = Small(gate)
    x, y = data.load("train")
    recipe = dataclasses.replace(
        RECIPES["modern"],
        eps=EPS,
        step_size=EPS / 2,
        steps=3,
        epochs=30,
        averaging=0.0,
        lr=0.05,
        batch_size=64,
    )
    trainer = Trainer(model, recipe, len(x), device="cpu")
    with tqdm(total=recipe.epochs * len(x), unit="img") as bar:
        for _ in range(recipe.epochs):
            trainer.run_epoch(x, y, bar)
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    networks = {name: trained(gate) for name, gate in GATES.items()}
    states = ((name, model.state_dict()) for name, model in networks.items())
    tensors = {f"{name}.{k}": v.contiguous() for name, state in states for k, v in state.items()}
    with atomic_write(WEIGHTS) as scratch:
        save_file(tensors, scratch)
    print(f"written: {WEIGHTS}")
