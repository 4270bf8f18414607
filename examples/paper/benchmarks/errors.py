"""Robust error with early stopping against all attack steps.

`python -m examples.paper.benchmarks.errors` trains two slim networks, one adversarially. It finds the images
that PGD breaks by `robust_errors`, by all steps on all images, and by all steps on the images that are right
at first. All three begin at the same random starts, and the script counts the images they judge differently.
"""

import argparse
import dataclasses
import time
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.measuring import add_machine, begin, format_setup
from examples.paper.attacks.folding import folded
from examples.paper.attacks.pgd import attacking, pgd_steps, random_images
from examples.paper.attacks.robust_error import clean_errors, robust_errors
from examples.paper.common import data
from examples.paper.common.cli import at_least, plain_errors
from examples.paper.common.console import print_table
from examples.paper.common.models import build
from examples.paper.common.statistics import format_error
from examples.paper.evaluation.measure import MODERN
from examples.paper.training.recipes import RECIPES, Recipe
from examples.paper.training.trainer import Trainer
from examples.pgd import is_wrong

EPS, STEP = MODERN["eps"], MODERN["step_size"]
BATCH = 100


def all_steps(model: nn.Module, x: Tensor, y: Tensor, steps: int, *, right: bool = False) -> Tensor:
    """Robust errors by all steps on all images, or on those `right` at first; every step counts."""
    with attacking(model), torch.no_grad():
        wrong = clean_errors(model, x, y, BATCH)
        fast, start = folded(model, x[:2]), x.clone()
        start[~wrong] = random_images(x[~wrong], EPS)  # the same draw as in `robust_errors`
        attacked = torch.where(~wrong)[0] if right else torch.arange(len(x))
        for part in attacked.split(BATCH):

            def watched(images: Tensor, part: Tensor = part) -> Tensor:
                logits = fast(images)
                wrong[part] |= is_wrong(logits, y[part])
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


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data",
        dest="data_dir",
        default="sample",
        help="sample (ours), hub, or a folder of parquet files (default %(default)s)",
    )
    p.add_argument("--epochs", type=at_least(1), default=3, help="of training (default %(default)s)")
    p.add_argument("--limit", type=at_least(1), default=300, help="test images (default %(default)s)")
    p.add_argument("--steps", type=at_least(1), default=10, help="of PGD (default %(default)s)")
    add_machine(p)
    args = p.parse_args(argv)
    begin(args)
    x, y = data.load("test", args.data_dir)
    x, y = data.to_float(x[: args.limit], args.device), y[: args.limit].to(args.device)
    fast = dataclasses.replace(RECIPES["fast"], epochs=args.epochs, batch_size=64)
    recipes = {"standard training": dataclasses.replace(fast, steps=0), "adversarial training": fast}
    ways = {
        "all steps, all images": all_steps,
        "all steps, images right at first": partial(all_steps, right=True),
        "robust_errors": lambda model, x, y, steps: robust_errors(
            model, x, y, eps=EPS, step_size=STEP, steps=steps, batch_size=BATCH
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
            "error, clean": format_error(clean_errors(model, x, y).cpu()),
            "error, PGD": format_error(wrong[0]),
            "images judged differently": f"{sum((w != wrong[-1]).sum().item() for w in wrong)}",
            **{f"{way}, s": f"{s:.1f}" for way, s in zip(ways, seconds, strict=True)},
            "factor, all images": f"{seconds[0] / seconds[2]:.1f}",
            "factor, right at first": f"{seconds[1] / seconds[2]:.1f}",
        }
    print_table(f"Robust error, PGD-{args.steps} at 8/255, slim ResNet-18, {len(x)} images", columns)
    print(f"networks trained here, epochs: {args.epochs}, data: {args.data_dir}")
    print(format_setup(args))


if __name__ == "__main__":
    with plain_errors():
        main()
