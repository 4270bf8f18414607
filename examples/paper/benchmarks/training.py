"""One step of adversarial training, PGD and update: `Trainer.step` against the naive loop of tutorials.

`python -m examples.paper.benchmarks.training` times both for ReLU and for SPARTA. The naive loop computes
gradients of the parameters on each attack step, and its SPARTA is written plainly. First it checks that both
have the same loss from the same start.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import add_options, begin, format_setup, multiply_adds, race
from benchmarks.network import network
from examples.paper.benchmarks.attack import naive
from examples.paper.common.cli import at_least, plain_errors
from examples.paper.common.console import print_table
from examples.paper.training.recipes import RECIPES
from examples.paper.training.trainer import Trainer


def naive_step(model: nn.Module, trainer: Trainer, x: Tensor, y: Tensor, steps: int) -> Callable[[], float]:
    """Attack by the naive loop in evaluation mode, then update, as tutorials write it."""
    settings, decay = trainer.optimizer.defaults, trainer.recipe.weight_decay
    optimizer = torch.optim.SGD(
        model.parameters(), settings["lr"], momentum=settings["momentum"], weight_decay=decay
    )

    def step() -> float:
        model.eval()
        x_adv = naive(model, x, y, steps, True)
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x_adv), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--width", type=at_least(8), default=64, help="default %(default)s")
    p.add_argument("--steps", type=at_least(1), default=10, help="of PGD (default %(default)s)")
    p.add_argument("--batch-size", type=at_least(2), default=8, help="default %(default)s")
    add_options(p, rounds=2)
    args = p.parse_args(argv)
    begin(args)
    columns: dict[str, dict[str, str]] = {}
    x = torch.rand(args.batch_size, 3, 32, 32, device=args.device)
    y = torch.randint(0, 10, (len(x),), device=args.device)
    recipe = dataclasses.replace(
        RECIPES["modern"], steps=args.steps, batch_size=len(x), averaging=0, epochs=1000
    )
    for activation, name in {"relu": "ReLU", "sparta": "SPARTA"}.items():
        plain = "plain" if activation == "sparta" else activation
        fast_model, naive_model = (network("resnet18", n, args.width) for n in (activation, plain))
        trainer = Trainer(fast_model.train(), recipe, len(x), device=args.device)
        step = naive_step(naive_model.to(args.device).train(), trainer, x, y, args.steps)
        images = x.to(memory_format=torch.channels_last)
        losses = []
        # contiguous images in both: another layout draws another random start
        for call in (step, lambda trainer=trainer: trainer.step(x, y)[0].item() / len(x)):
            torch.manual_seed(1)
            losses.append(call())
        print(f"{name}: loss of the first step, naive {losses[0]:.4f}, Trainer {losses[1]:.4f}")
        if not math.isclose(*losses, rel_tol=1e-2):
            raise ValueError(f"{name}: the naive step and Trainer.step have different losses: {losses}")
        steps = {"naive": step, "Trainer": lambda trainer=trainer, images=images: trainer.step(images, y)}
        laps = race(steps, args.rounds, f"training, {name}", warm_up=int(x.is_cuda))
        counts = [multiply_adds(call) for call in steps.values()]
        columns[name] = {
            "naive, s": f"{laps['naive'].seconds:.2f}",
            "Trainer.step, s": f"{laps['Trainer'].seconds:.2f}",
            "factor": laps["Trainer"].format_speed(),
            "factor by multiply-adds": f"{counts[0] / counts[1]:.2f}",
        }
    title = f"Adversarial training, PGD-{args.steps}, ResNet-18 width {args.width}, batch {len(x)}"
    print_table(title, columns)
    print(format_setup(args))


if __name__ == "__main__":
    with plain_errors():
        main()
