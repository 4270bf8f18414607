"""Small experiments with their controls.

  python -m examples.paper controls transfer --data DATA/cifar10
      Does a frozen set help another network? ResNet-18s of width 16, 15 epochs on the last 2,000 test
      images, which the set has not seen: ReLU, ReLU times one half, the set frozen, the set with its numbers
      shuffled, SPARTA trained there; three seeds.
  python -m examples.paper controls drop-in --data DATA/cifar10
      What does SPARTA do to a trained ReLU network? Two epochs of fine-tuning with ReLU, SPARTA, SPARTA with
      identity=True, SiLU.
  python -m examples.paper controls mean-gate --data DATA/cifar10
      Does a network need its gates? Our trained network, and the same with each gate replaced by its mean
      over active elements of training images: one number, one of each channel, one of each place. Nothing is
      trained.

Each network is one file in --out, so a killed call goes on where it was. At the end the errors are printed,
and what the gates of the first seed do.
"""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks.pgd import attacking
from examples.paper.attacks.robust_error import clean_errors, robust_errors
from examples.paper.common import data
from examples.paper.common.cli import at_least
from examples.paper.common.console import print_table, stamp
from examples.paper.common.gates import gates
from examples.paper.common.records import check_errors, sha256, write_record
from examples.paper.common.statistics import entry, pair_of, paired
from examples.paper.evaluation import networks
from examples.paper.results.control_networks import HALF, SHUFFLED, Make, drop_in, mean_gate, transfer
from examples.paper.results.differences import mean
from examples.paper.results.state import RESULTS
from examples.paper.training.gate_statistics import gate_statistics
from examples.paper.training.recipes import RECIPES
from examples.paper.training.trainer import Trainer
from sparta_act import Sparta

TEST = 2000
OURS = Path(__file__).parents[2] / "networks" / "cifar10-resnet18-w16"
PGD = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 10}
Images = tuple[Tensor, Tensor]  # (N, 3, H, W) uint8 and their labels (N,)
Results = dict[str, list[dict[str, Any]]]  # of each network, by seed


def measure(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Which images it gets wrong, (N,) of bool: clean, and under PGD-10 at any step."""
    torch.manual_seed(0)
    with attacking(model):
        clean = clean_errors(model, x, y)
    return {"clean": clean, "PGD-10, 8/255": robust_errors(model, x, y, **PGD)}


def once(
    out: Path, name: str, make: Make, train: Images, test: Images, options: dict[str, Any]
) -> dict[str, Any]:
    """The result of `run` with these options on these images: from its file, or into it.

    Raises `ValueError` if that file is something else.
    """
    path = file_of(out, options["experiment"], name, options["seed"])
    options = options | {"images": sha256(*(t.numpy().tobytes() for t in (*train, *test)))}
    if not path.exists() or read(path)["options"] != options:
        print(f"{name}, seed {options['seed']}", flush=True)
        write_record(path, run(make, *train, test, options))
    return read(path)


def file_of(out: Path, experiment: str, name: str, seed: int) -> Path:
    """Where `once` keeps the result of a network of that name."""
    return out / f"{experiment}-{re.sub('[^a-z0-9]+', '-', name.lower())}-seed{seed}.json"


def read(path: Path) -> dict[str, Any]:
    """What `once` wrote. Raises `ValueError` for a file that is not a result."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        result["options"], result["gate"]
        check_errors(result["errors"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a result of `controls` ({error!r}); delete it, or name another --out"
        ) from None
    return result


def trained(model: nn.Module, x: Tensor, y: Tensor, options: dict[str, Any]) -> nn.Module:
    """The network after the recipe `single`: the average of its weights. It trains `model` itself."""
    recipe = replace(RECIPES["single"], **{k: options[k] for k in ("epochs", "batch_size", "lr")})
    trainer = Trainer(model, recipe, len(x))
    torch.manual_seed(options["seed"])
    with tqdm(total=len(x) * recipe.epochs, unit="img") as bar:
        for _ in range(recipe.epochs):
            trainer.run_epoch(x, y, bar)
    return trainer.final()


def run(make: Make, x: Tensor, y: Tensor, test: Images, options: dict[str, Any]) -> dict[str, Any]:
    """Train one network and measure it, for JSON; in `drop-in` it is measured before too."""
    model, images, labels = make(), data.to_float(test[0]), test[1]
    found = {}
    if options["experiment"] == "drop-in":
        found = {f"{k}, before": w for k, w in measure(model, images, labels).items()}
    if options["epochs"]:
        model = trained(model, x, y, options)
    found |= measure(model, images, labels)
    errors = {k: entry(w) for k, w in found.items()}
    return {"options": options, "errors": errors, "gate": gate_statistics(model, images[:256]), **stamp()}


def show(results: Results) -> None:
    """Print errors by seed, and the paired differences to the first network and to the controls."""
    (first, base), *_ = results.items()
    attacks = list(base[0]["errors"])
    columns = {
        a: {n: ", ".join(f"{r['errors'][a]['error']:.2%}" for r in rs) for n, rs in results.items()}
        for a in attacks
    }
    print_table("errors on test images, by seed", columns)
    for other in (first, HALF, SHUFFLED):
        if other in results:
            columns = {
                a: {n: _minus(rs, results[other], a) for n, rs in results.items() if n != other}
                for a in attacks
            }
            print_table(f"minus {other}, points: by seed, ± over images; then the mean", columns)


def show_gates(name: str, result: dict[str, Any]) -> None:
    """Print what the gate of each site does to active elements, and what share of all is near 0 or 1."""
    sites = result["gate"]
    columns = {
        what: {site: f"{found[what]:.4f}" if what in found else "" for site, found in sites.items()}
        for what in next(iter(sites.values()))
    }
    print_table(f"{name}: gate on active elements of test images", columns)


def _minus(results: list[dict[str, Any]], others: list[dict[str, Any]], attack: str) -> str:
    both = ([r | {"test images": r["options"]["images"]} for r in rs] for rs in (results, others))
    pairs = [pair_of(*pair, attack) for pair in zip(*both, strict=True)]
    each = ", ".join(str(paired(pair)) for pair in pairs)
    return f"{each}; mean {mean(pairs)}" if len(pairs) > 1 else each


def transfers(args: argparse.Namespace) -> Results:
    """Each network's results, by seed: trained on the last test images and attacked on the first ones."""
    taken, (x, y) = Sparta.from_pretrained(args.set), data.load("test", args.data_dir)
    if args.limit >= len(x):
        raise ValueError(f"--limit {args.limit}: no test image of {len(x)} would be left to test on")
    here = {"experiment": args.experiment, "limit": args.limit, "epochs": args.epochs, "batch_size": 64}
    here |= {"lr": 0.1, "set": args.set}
    weights = (p for activation in taken.values() for p in activation.parameters())
    here["sha256"] = sha256(*(p.detach().numpy().tobytes() for p in weights))
    train, test = (x[-args.limit :], y[-args.limit :]), (x[: -args.limit][:TEST], y[: -args.limit][:TEST])
    for make in transfer(taken, args.seeds[0]).values():
        make()  # before any is trained: a set may not fit
    results: Results = {}
    for seed in args.seeds:
        for name, make in transfer(taken, seed).items():
            found = once(args.out, name, make, train, test, {"seed": seed, **here})
            results.setdefault(name, []).append(found)
    return results


def drop_ins(args: argparse.Namespace) -> Results:
    """Each network's result: fine-tuned on images for training, attacked on the first test images."""
    (x, y), test = data.load("train", args.data_dir), data.load("test", args.data_dir)
    model, key = loaded(args.network, *test)
    x, y = x[: args.limit], y[: args.limit]
    here = {"experiment": args.experiment, "seed": args.seed, "limit": len(x), "epochs": args.epochs}
    here |= {"batch_size": 128, "lr": 0.01, "sha256": key}
    return {
        n: [once(args.out, n, make, (x, y), (test[0][:TEST], test[1][:TEST]), here)]
        for n, make in drop_in(model, args.seed).items()
    }


def mean_gates(args: argparse.Namespace) -> Results:
    """Each network's result: nothing is trained."""
    x, y = (t[:512] for t in data.load("train", args.data_dir))
    test = data.load("test", args.data_dir)
    model, key = loaded(args.network, *test)
    if not gates(model):
        raise ValueError(f"{args.network} has no SPARTA, so no gate to replace")
    here = {"experiment": args.experiment, "seed": 0, "epochs": 0, "sha256": key}
    made = mean_gate(model, data.to_float(x))
    return {
        n: [once(args.out, n, make, (x, y), (test[0][:TEST], test[1][:TEST]), here)]
        for n, make in made.items()
    }


def loaded(network: str, x: Tensor, y: Tensor) -> tuple[nn.Module, str]:
    """A network, and a sha256 of its file, the file's name and all its numbers.

    Shapes: x (N, 3, H, W) uint8, y (N,). Raises `ValueError` unless it gives logits for such images.
    """
    model, _, content = networks.load(network)
    networks.check(model, data.to_float(x[:2]), y)
    return model, sha256(content, Path(network).name.encode(), *networks.numbers(model))


def parser() -> argparse.ArgumentParser:
    """Command line of `controls`."""
    p = argparse.ArgumentParser(
        prog="python -m examples.paper controls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    experiments = p.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    t, d, m = (
        experiments.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for name, text in (
            ("transfer", "a frozen set in fresh networks, with its controls"),
            ("drop-in", "SPARTA in a network that is trained already"),
            ("mean-gate", "a trained network, its gates replaced by their means"),
        )
    )
    t.add_argument("--set", default="cifar10-resnet18-w16", help="set to freeze")
    t.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], help="of the trainings")
    t.add_argument("--limit", type=at_least(1), default=2000, help="test images, the last, to train on")
    t.add_argument("--epochs", type=at_least(1), default=15, help="of training")
    d.add_argument("--network", default=f"{OURS}-relu.safetensors", help=networks.NAMES)
    d.add_argument("--seed", type=at_least(0), default=0, help="of the fine-tuning")
    d.add_argument("--limit", type=at_least(1), default=None, help="images to fine-tune on, the first")
    d.add_argument("--epochs", type=at_least(1), default=2, help="of fine-tuning")
    m.add_argument("--network", default=f"{OURS}.safetensors", help=networks.NAMES)
    for one, do in ((t, transfers), (d, drop_ins), (m, mean_gates)):
        one.add_argument(
            "--data", dest="data_dir", required=True, help="folder of CIFAR-10's parquet files, hub or sample"
        )
        one.add_argument("--out", type=Path, default=RESULTS / "controls", help="folder of the results")
        one.set_defaults(do=do)
    return p


def main(argv: list[str] | None = None) -> None:
    """Train, measure and compare as the command line says."""
    args = parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.do(args)
    show(results)
    for name, (first, *_) in results.items():
        if first["gate"]:
            show_gates(name, first)
