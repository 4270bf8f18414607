"""PGD against the libraries people use, robust error without work in vain, adversarial training.

`python benchmarks/attack.py` prints three tables.

1. PGD on a ResNet-18: images per second of torchattacks, foolbox, ART, a naive loop, AutoAttack's APGD and
   `attacks.pgd`, relative to torchattacks, and of bare input gradients, which no such attack can beat.
2. Robust error of two slim networks trained here, one adversarially: `robust_errors`, which leaves an image
   as soon as it is broken, against all steps on all images.
3. One step of adversarial training: `Trainer.step` against a naive loop, for ReLU and SPARTA.

Before each, it checks that the contenders compute the same thing. A library that is not installed is named
and left out.
"""

import argparse
import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import data
from attacks import attacking, pgd, pgd_steps, random_images
from command_line import at_least, plain_errors
from folding import folded
from measure import MODERN
from measuring import Lap, add_options, begin, race, told
from models import ACTIVATIONS, build
from peers import peer
from plain import PlainSparta
from recipes import RECIPES, Recipe
from report import percent, print_table
from robust_error import clean_errors, robust_errors
from trainer import Trainer

ACTIVATIONS["plain"] = PlainSparta
EPS, STEP = MODERN["eps"], MODERN["step_size"]
ERRORS_BATCH = 100
Attack = Callable[..., Tensor]  # (x, y, steps, random_start) -> attacked images


def naive(model: nn.Module, x: Tensor, y: Tensor, steps: int, random_start: bool) -> Tensor:
    """The loop as tutorials write it: gradients of the parameters too, on every step."""
    x_adv = random_images(x, EPS) if random_start else x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        model.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = x_adv.detach() + STEP * x_adv.grad.sign()
        x_adv = torch.clamp(torch.clamp(x_adv, x - EPS, x + EPS), 0, 1)
    return x_adv


def bare(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """As many gradients of the loss to the images as an attack of `steps` takes, and nothing else."""
    x = x.detach().clone().requires_grad_()
    for _ in range(steps):
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    return grad


def attacks_on(model: nn.Module) -> dict[str, Attack]:
    """The contenders by name; the first is what the others are compared with."""
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
    found["attacks.pgd"] = lambda x, y, steps, start: pgd(
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
    """AutoAttack's APGD with as many gradients as PGD of `steps`: it takes one before its first step."""
    from pyautoattack.autopgd_base import APGDAttack

    return APGDAttack(model, n_iter=steps - 1, eps=EPS, device=x.device).perturb(x, y)


def check_attacks(attacks: dict[str, Attack], model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Raise `ValueError` unless all make the same images from the same start.

    In float32 the sign of a gradient near zero is chance, so a few pixels may differ; in float64 none.
    """
    results = {name: attack(x, y, steps, False) for name, attack in attacks.items()}
    expected = results["naive loop"]
    for name, result in results.items():
        differ = ((result - expected).abs() > 1e-5).float().mean().item()
        print(f"{name}: {differ:.2%} of the pixels differ from the naive loop's, from the image itself")
        if not differ < 0.05:
            raise ValueError(f"{name} computes another attack: {differ:.1%} of its pixels differ")
    if "torchattacks" in attacks:
        model.double()
        wide, found = x[:2].double(), []
        for name in ("torchattacks", "attacks.pgd"):
            torch.manual_seed(1)
            found.append(attacks[name](wide, y[:2], steps, True))
        model.float()
        worst = (found[0] - found[1]).abs().max().item()
        print(f"attacks.pgd and torchattacks, float64, the same random start: equal to {worst:.0e}")
        if not worst < 1e-9:
            raise ValueError(f"attacks.pgd and torchattacks differ by {worst:.1e}")


def compare_attacks(args: argparse.Namespace) -> None:
    """Table 1."""
    model = settled(build("resnet18", "relu", "", width=args.width).to(args.device))
    x = torch.rand(args.batch_size, 3, 32, 32, device=args.device)
    with torch.no_grad():
        y = model(x).argmax(1)  # right at first, or some attacks would have nothing to do
    attacks = attacks_on(model)
    check_attacks(attacks, model, x[:2], y[:2], args.steps)
    contenders: dict[str, Callable[[], object]] = {
        name: lambda attack=attack: attack(x, y, args.steps, True) for name, attack in attacks.items()
    }
    if peer("pyautoattack"):
        contenders["APGD, as many gradients"] = lambda: apgd(model, x, y, args.steps)
    frozen = settled(build("resnet18", "relu", "", width=args.width).to(args.device)).requires_grad_(False)
    contenders["bare gradients"] = lambda: bare(frozen, x, y, args.steps)
    without_norms = folded(frozen, x[:1])
    contenders["bare gradients, norms folded"] = lambda: bare(without_norms, x, y, args.steps)
    laps = race(contenders, args.rounds, f"PGD-{args.steps}", warm_up=0)  # the checks have warmed them
    first = next(iter(laps))
    columns = {
        "images a second": {name: f"{len(x) / lap.seconds:.2f}" for name, lap in laps.items()},
        f"speed, times {first}": {name: speed(lap) for name, lap in laps.items()},
    }
    print_table(f"PGD-{args.steps}, ResNet-18 width {args.width}, float32, batch {len(x)}", columns)
    floor = laps["bare gradients, norms folded"].seconds / laps["attacks.pgd"].seconds
    print(f"attacks.pgd runs at {floor:.1%} of the speed of bare input gradients with batch norm folded\n")


def settled(model: nn.Module) -> nn.Module:
    """The network in evaluation mode with running statistics as after training: of what it has seen."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, 3, 32, 32, device=next(model.parameters()).device))
    return model.eval()


def speed(lap: Lap) -> str:
    """How many times as fast as the first, with quartiles."""
    low, high = (1 / r for r in reversed(lap.spread))
    return f"{1 / lap.ratio:.2f} ({low:.2f}-{high:.2f})"


def all_the_way(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Robust errors by all steps on all images: wrong clean or at any image PGD comes by."""
    with attacking(model), torch.no_grad():
        wrong = clean_errors(model, x, y, ERRORS_BATCH)
        fast, start = folded(model, x[:1]), x.clone()
        start[~wrong] = random_images(x[~wrong], EPS)  # the same draw as in `robust_errors`
        for part in torch.arange(len(x)).split(ERRORS_BATCH):

            def watched(images: Tensor, part: Tensor = part) -> Tensor:
                logits = fast(images)
                wrong[part] |= logits.argmax(1) != y[part]
                return logits

            run = pgd_steps(
                watched, x[part], y[part], eps=EPS, step_size=STEP, steps=steps, start=start[part]
            )
            *_, (last, _) = run
            watched(last)
    return wrong


def slim(recipe: Recipe, args: argparse.Namespace, title: str) -> nn.Module:
    """A slim ResNet-18, trained by the recipe."""
    x, y = data.load("train", args.data_dir)
    torch.manual_seed(0)
    trainer = Trainer(build("resnet18", "relu", "", width=16), recipe, len(x), device=args.device)
    with tqdm(total=recipe.epochs * len(x), unit="img", desc=title, leave=False) as bar:
        for _ in range(recipe.epochs):
            trainer.run_epoch(x, y, bar)
    return trainer.final().to(memory_format=torch.contiguous_format).eval()


def compare_errors(args: argparse.Namespace) -> None:
    """Table 2."""
    x, y = data.load("test", args.data_dir)
    x, y = data.to_float(x[: args.limit], args.device), y[: args.limit].to(args.device)
    fast = dataclasses.replace(RECIPES["fast"], epochs=args.epochs, batch_size=64)
    recipes = {"standard training": dataclasses.replace(fast, steps=0), "adversarial training": fast}
    ways = {
        "all steps on all images": all_the_way,
        "robust_errors": lambda model, x, y, steps: robust_errors(
            model, x, y, eps=EPS, step_size=STEP, steps=steps, batch_size=ERRORS_BATCH
        ),
    }
    columns: dict[str, dict[str, str]] = {}
    for name, recipe in recipes.items():
        model = slim(recipe, args, name)
        wrong, seconds = [], []
        for way in ways.values():
            torch.manual_seed(1)  # the same random starts
            began = time.perf_counter()
            wrong.append(way(model, x, y, args.steps).cpu())
            seconds.append(time.perf_counter() - began)
        columns[name] = {
            "error, clean": percent(clean_errors(model, x, y).cpu()),
            "error, PGD": percent(wrong[0]),
            "images judged differently": f"{(wrong[0] != wrong[1]).sum()}",
            **{f"{way}, s": f"{s:.1f}" for way, s in zip(ways, seconds, strict=True)},
            "factor": f"{seconds[0] / seconds[1]:.1f}",
        }
    print_table(f"Robust error, PGD-{args.steps} at 8/255, slim ResNet-18, {len(x)} images", columns)
    print(f"trained {args.epochs} epochs on the images of {args.data_dir!r}, seed 0\n")


def compare_training(args: argparse.Namespace) -> None:
    """Table 3."""
    columns: dict[str, dict[str, str]] = {}
    x = torch.rand(args.training_batch, 3, 32, 32, device=args.device)
    y = torch.randint(0, 10, (len(x),), device=args.device)
    recipe = dataclasses.replace(
        RECIPES["modern"], steps=args.steps, batch_size=len(x), averaging=0, epochs=1000
    )
    for activation, name in {"relu": "ReLU", "sparta": "SPARTA"}.items():
        torch.manual_seed(0)
        lean_model = build("resnet18", activation, "G*.B-1", width=args.width)
        naive_model = build(
            "resnet18", "plain" if activation == "sparta" else "relu", "G*.B-1", width=args.width
        )
        naive_model.load_state_dict(lean_model.state_dict())
        trainer = Trainer(lean_model.train(), recipe, len(x), device=args.device)
        step = naive_step(naive_model.to(args.device).train(), trainer, x, y, args.steps)
        images = x.to(memory_format=torch.channels_last)
        losses = []
        for call in (step, lambda trainer=trainer: trainer.step(x, y)[0].item()):  # x: the same random start
            torch.manual_seed(1)
            losses.append(call())
        print(f"{name}: loss of the first step, naive {losses[0]:.4f}, lean {losses[1]:.4f}")
        if not math.isclose(*losses, rel_tol=1e-2):
            raise ValueError("the naive and the lean step have different losses")
        laps = race(
            {"naive": step, "lean": lambda trainer=trainer, images=images: trainer.step(images, y)},
            args.rounds,
            f"training, {name}",
            warm_up=0,
        )
        columns[name] = {
            "naive, s": f"{laps['naive'].seconds:.2f}",
            "Trainer.step, s": f"{laps['lean'].seconds:.2f}",
            "factor": speed(laps["lean"]),
        }
    title = f"Adversarial training, PGD-{args.steps}, ResNet-18 width {args.width}, batch {len(x)}"
    print_table(title, columns)


def naive_step(model: nn.Module, trainer: Trainer, x: Tensor, y: Tensor, steps: int) -> Callable[[], float]:
    """Attack by the naive loop and learn, as tutorials write it; the attacked network in evaluation mode."""
    settings = trainer.optimizer.defaults
    optimizer = torch.optim.SGD(
        model.parameters(),
        settings["lr"],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
    )

    def step() -> float:
        model.eval()
        x_adv = naive(model, x, y, steps, True)
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x_adv), y)
        loss.backward()
        optimizer.step()
        return loss.item() * len(x)

    return step


TABLES = {"attacks": compare_attacks, "errors": compare_errors, "training": compare_training}


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tables", choices=TABLES, nargs="+", default=list(TABLES), help="default: all three")
    p.add_argument("--width", type=at_least(8), default=64, help="of tables 1 and 3 (default %(default)s)")
    p.add_argument("--steps", type=at_least(2), default=10, help="of PGD (default %(default)s)")
    p.add_argument("--batch-size", type=at_least(2), default=64, help="of table 1 (default %(default)s)")
    p.add_argument("--training-batch", type=at_least(2), default=8, help="of table 3 (default %(default)s)")
    p.add_argument(
        "--data-dir",
        default="sample",
        help="for table 2: 'sample' (ours), 'hub', or a folder of parquet files",
    )
    p.add_argument(
        "--epochs", type=at_least(1), default=4, help="of training for table 2 (default %(default)s)"
    )
    p.add_argument(
        "--limit", type=at_least(1), default=300, help="test images for table 2 (default %(default)s)"
    )
    add_options(p, rounds=2)
    args = p.parse_args(argv)
    begin(args)
    warnings.simplefilter("ignore")  # of the libraries
    for table in args.tables:
        TABLES[table](args)
    print(told(args))


if __name__ == "__main__":
    with plain_errors():
        main()
