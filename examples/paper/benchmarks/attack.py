"""Speed of PGD against third-party libraries and against bare input gradients, its upper bound.

`python -m examples.paper.benchmarks.attack` prints images per second of torchattacks, foolbox, ART, a naive
loop, APGD of AutoAttack, `pgd` and bare input gradients, relative to torchattacks. First it checks that all
but APGD, which is another attack, make the same images. It names the libraries that are not installed.
"""

import argparse
import copy
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import add_options, begin, format_setup, race
from benchmarks.peers import peer
from examples.paper.attacks.folding import folded
from examples.paper.attacks.pgd import pgd, random_images
from examples.paper.common.cli import at_least, plain_errors
from examples.paper.common.console import print_table
from examples.paper.common.models import build
from examples.paper.evaluation.measure import MODERN

EPS, STEP = MODERN["eps"], MODERN["step_size"]
Attack = Callable[..., Tensor]  # (x, y, steps, random_start) -> attacked images


def naive(model: nn.Module, x: Tensor, y: Tensor, steps: int, random_start: bool) -> Tensor:
    """PGD as tutorials write it: each step computes gradients of the parameters too."""
    x_adv = random_images(x, EPS) if random_start else x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        model.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = x_adv.detach() + STEP * x_adv.grad.sign()
        x_adv = torch.clamp(torch.clamp(x_adv, x - EPS, x + EPS), 0, 1)
    return x_adv


def bare(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """The input gradients of a PGD of `steps`, and nothing else."""
    x = x.detach().clone().requires_grad_()
    for _ in range(steps):
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    return grad


def attacks_on(model: nn.Module) -> dict[str, Attack]:
    """The contenders by name; the others are compared with the first."""
    found: dict[str, Attack] = {}
    if torchattacks := peer("torchattacks"):
        found["torchattacks"] = lambda x, y, steps, start: torchattacks.PGD(
            model, eps=EPS, alpha=STEP, steps=steps, random_start=start
        )(x, y)
    if foolbox := peer("foolbox"):
        found["foolbox"] = lambda x, y, steps, start: foolbox.attacks.LinfPGD(
            abs_stepsize=STEP, steps=steps, random_start=start
        ).run(foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device), x, y, epsilon=EPS)
    if peer("art"):
        found["ART"] = lambda *arguments: art(model, *arguments)
    found["naive loop"] = lambda *arguments: naive(model, *arguments)
    found["pgd"] = lambda x, y, steps, start: pgd(
        model, x, y, eps=EPS, step_size=STEP, steps=steps, random_start=start
    )
    return found


def art(model: nn.Module, x: Tensor, y: Tensor, steps: int, random_start: bool) -> Tensor:
    """PGD of the Adversarial Robustness Toolbox."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        tuple(x.shape[1:]),
        10,
        clip_values=(0, 1),
        device_type="gpu" if x.is_cuda else "cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier,
        eps=EPS,
        eps_step=STEP,
        max_iter=steps,
        num_random_init=int(random_start),
        batch_size=len(x),
        verbose=False,
    )
    return torch.from_numpy(attack.generate(x.cpu().numpy(), y=y.cpu().numpy())).to(x.device)


def apgd(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """AutoAttack's APGD with the number of gradients of a PGD of `steps`: one comes before its first step."""
    from pyautoattack.autopgd_base import APGDAttack

    return APGDAttack(model, n_iter=steps - 1, eps=EPS, device=x.device).perturb(x, y)


def check_attacks(attacks: dict[str, Attack], model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Raise `ValueError` unless all make the same images from the same start.

    In float32 rounding decides the sign of a gradient near zero, so a few pixels may differ; in float64 none.
    """
    results = {name: attack(x, y, steps, False) for name, attack in attacks.items()}
    expected = results["naive loop"]
    for name, result in results.items():
        differ = ((result - expected).abs() > 1e-5).float().mean().item()
        print(f"{name}: {differ:.2%} of the pixels differ from the naive loop's, without a random start")
        if not differ < 0.05:
            raise ValueError(f"{name} computes another attack: {differ:.1%} of its pixels differ")
    if "torchattacks" in attacks:
        model.double()
        wide, found = x[:2].double(), []
        for name in ("torchattacks", "pgd"):
            torch.manual_seed(1)
            found.append(attacks[name](wide, y[:2], steps, True))
        model.float()
        worst = (found[0] - found[1]).abs().max().item()
        print(f"pgd and torchattacks, float64, the same random start: equal to {worst:.0e}")
        if not worst < 1e-9:
            raise ValueError(f"pgd and torchattacks differ in float64 by {worst:.1e}")


def settled(model: nn.Module) -> nn.Module:
    """The network in evaluation mode, its running statistics from random images."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, 3, 32, 32, device=next(model.parameters()).device))
    return model.eval()


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--width", type=at_least(8), default=64, help="default %(default)s")
    p.add_argument("--steps", type=at_least(2), default=10, help="of PGD (default %(default)s)")
    p.add_argument("--batch-size", type=at_least(2), default=48, help="default %(default)s")
    add_options(p, rounds=2)
    args = p.parse_args(argv)
    begin(args)
    warnings.simplefilter("ignore")  # from the libraries
    model = settled(build("resnet18", "relu", "", width=args.width).to(args.device))
    x = torch.rand(args.batch_size, 3, 32, 32, device=args.device)
    with torch.no_grad():
        y = model(x).argmax(1)  # right at first, so that no attack stops early
    attacks = attacks_on(model)
    check_attacks(attacks, model, x[:2], y[:2], args.steps)
    contenders: dict[str, Callable[[], object]] = {
        name: lambda attack=attack: attack(x, y, args.steps, True) for name, attack in attacks.items()
    }
    if peer("pyautoattack"):
        contenders["APGD, equal gradients"] = lambda: apgd(model, x, y, args.steps)
    frozen = copy.deepcopy(model).requires_grad_(False)
    contenders["bare gradients"] = lambda: bare(frozen, x, y, args.steps)
    without_norms = folded(frozen, x[:2])
    contenders["bare gradients, norms folded"] = lambda: bare(without_norms, x, y, args.steps)
    laps = race(contenders, args.rounds, f"PGD-{args.steps}", warm_up=int(x.is_cuda))
    first = next(iter(laps))
    columns = {
        "images a second": {name: f"{len(x) / lap.seconds:.2f}" for name, lap in laps.items()},
        f"speed, times {first}": {name: lap.format_speed() for name, lap in laps.items()},
    }
    print_table(f"PGD-{args.steps}, ResNet-18 width {args.width}, float32, batch {len(x)}", columns)
    floor = laps["bare gradients, norms folded"].seconds / laps["pgd"].seconds
    print("all networks are contiguous; folded convolutions are in channels_last, as in pgd")
    print(f"pgd runs at {floor:.1%} of the speed of bare input gradients with batch norm folded")
    print(format_setup(args))


if __name__ == "__main__":
    with plain_errors():
        main()
