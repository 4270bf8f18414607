"""The main job, once through: a frozen, pretrained SPARTA in a network it has never seen, against plain ReLU
and two controls that it must beat: ReLU times one half, and the same set with its numbers shuffled.

`python examples/quickstart.py` needs no network and no GPU and takes about six minutes on two CPU cores.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.common import data
from examples.paper.common.cli import at_least, check_device, plain_errors
from examples.paper.common.console import print_table, stamp
from examples.paper.common.models import ACTIVATIONS, ResNet
from examples.paper.common.sets import shuffled
from examples.paper.common.statistics import difference, format_error
from examples.paper.evaluation.measure import MODERN, PAPER, find_errors, loss_curve
from examples.paper.results.overview import overview, site_scores
from examples.paper.training.recipes import RECIPES
from examples.paper.training.trainer import Trainer
from sparta_act import Sparta, replace_relus

SITES, SPARTA = "G*.B-1", "SPARTA, frozen"
HALF, SHUFFLED = "ReLU halved", "SPARTA, shuffled"  # the controls
DRAWN = 40  # test images of the figure's loss curves
ATTACKS = {
    "targeted PGD-10, 16/255": {**PAPER, "steps": 10},
    "untargeted PGD-10, 8/255": {**MODERN, "steps": 10},
}


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, device: str, title: str) -> float:
    """Train adversarially by the recipe `single` and return the seconds it took."""
    recipe = dataclasses.replace(RECIPES["single"], epochs=epochs, batch_size=64, averaging=0)
    trainer = Trainer(model, recipe, len(x), device=device)
    began = time.perf_counter()
    with tqdm(total=epochs * len(x), unit="img", desc=title) as bar:
        for _ in range(epochs):
            trainer.run_epoch(x, y, bar)
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    """Swap, train, attack, compare."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data-dir", default="sample", help="'sample' (ours), 'hub', or a folder of parquet files"
    )
    p.add_argument("--set", default="cifar10-resnet18-w16", help="name or path of the pretrained SPARTA set")
    p.add_argument(
        "--epochs", type=at_least(1), default=3, help="of training, for each network (default %(default)s)"
    )
    p.add_argument(
        "--limit", type=at_least(1), default=300, help="test images to attack (default %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--out", type=Path, default=Path("quickstart.png"), help="the figure (default %(default)s)"
    )
    args = p.parse_args(argv)
    check_device(args.device)
    if args.out.suffix != ".png" or not args.out.parent.is_dir():
        p.error(f"--out {args.out}: give a .png in a folder that exists")
    x, y = data.load("train", args.data_dir)
    x_test, y_test = (t[: args.limit] for t in data.load("test", args.data_dir))

    print(f"1/4  Swap: {args.set}, frozen, into a slim ResNet-34, a network it was not trained with.")
    sparta_set = Sparta.from_pretrained(args.set)
    networks: dict[str, nn.Module] = {}
    for name in ("ReLU", HALF, SHUFFLED, SPARTA):
        torch.manual_seed(args.seed)  # the same initial weights
        networks[name] = ResNet("resnet34", width=16)
    replace_relus(networks[HALF], SITES, ACTIVATIONS["relu-half"])
    replace_relus(networks[SHUFFLED], SITES, shuffled(sparta_set, args.seed))
    replace_relus(networks[SPARTA], SITES, sparta_set)
    for name, module in networks[SPARTA].named_modules():
        if isinstance(module, Sparta):
            print(f"     {name}: {module}")

    print(f"\n2/4  Train all adversarially, one after the other: {len(x)} images, {args.epochs} epochs.")
    rows: dict[str, dict[str, str]] = {}
    for name, model in networks.items():
        torch.manual_seed(args.seed)
        seconds = train(model, x, y, args.epochs, args.device, name)
        learned = sum(q.numel() for q in model.parameters() if q.requires_grad)
        rows[name] = {
            "training seconds": f"{seconds:.0f}",
            "parameters": f"{sum(q.numel() for q in model.parameters()):,}",
            "of them trained": f"{learned:,}",
        }

    print(f"\n3/4  Attack all: {len(x_test)} test images none has seen.")
    wrong = {}
    for name, model in networks.items():
        torch.manual_seed(args.seed)
        wrong[name] = find_errors(model, x_test, y_test, ATTACKS, device=args.device, title=name)
        rows[name] = {f"error, {attack}": format_error(w) for attack, w in wrong[name].items()} | rows[name]

    print("\n4/4  Draw the figure.")
    shown = data.to_float(x_test[:DRAWN], args.device), y_test[:DRAWN].to(args.device)
    draw(args.out, networks, *shown, args.seed)

    print_table(f"{len(x_test)} test images, 95% intervals", rows)
    print(f"seed {args.seed}; " + "; ".join(f"{what} {value}" for what, value in stamp().items()) + "\n")
    for other in ("ReLU", HALF, SHUFFLED):
        for attack in wrong[other]:
            d, half = difference(wrong[SPARTA][attack], wrong[other][attack])
            verdict = "fewer errors" if d < -half else "more errors" if d > half else "within noise"
            print(f"{attack}: {SPARTA} minus {other} is {100 * d:+.1f} ± {100 * half:.1f} points: {verdict}.")
    print(
        "A few epochs on a small sample show how it goes, not which network is safer:\n"
        "the errors are of these attacks and of one seed. Longer runs are in docs/results.md.\n"
        f"Figure: {args.out}"
    )


def draw(path: Path, networks: dict[str, nn.Module], x: Tensor, y: Tensor, seed: int) -> None:
    """A few images, the perturbation, SPARTA's scores of places before and after, and all loss curves."""
    curves, attacked, shown = {}, x, 4
    for name, model in networks.items():
        torch.manual_seed(seed)  # the same targets and start for all
        curves[name], attacked = loss_curve(model, x, y, **PAPER, steps=30)
    sparta = networks[SPARTA]
    overview(
        path,
        clean=x[:shown].cpu(),
        attacked=attacked[:shown].cpu(),
        before=site_scores(sparta, x[:shown]),
        after=site_scores(sparta, attacked[:shown]),
        labels=[data.DATASETS["cifar10"].classes[i] for i in y[:shown]],
        curves=curves,
    )


if __name__ == "__main__":
    with plain_errors():
        main()
