"""Small experiments with their controls.

  python -m examples.paper controls transfer resnet18 --data DATA/cifar10
      Does a frozen set help another network? Networks trained for 15 epochs on the last 2,000 test images,
      which the set has not seen: ReLU, ReLU times one half, the set frozen, the set with its numbers
      shuffled, SPARTA trained there; three seeds. `resnet34` is another network, `mnist-m` and `torchvision`
      are other data too; on `mnist-m` whole robust networks of ours are fine-tuned beside them.
  python -m examples.paper controls rate torchvision --data DATA/mnist_m
      At which learning rate does ReLU make the fewest errors there? On training images alone, with a seed of
      its own: nothing that `transfer` measures has a part in it.
  python -m examples.paper controls pretrain --data DATA/cifar10
      The network that `transfer torchvision` begins with.
  python -m examples.paper controls drop-in --data DATA/cifar10
      What does SPARTA do to a trained ReLU network? Two epochs of fine-tuning with ReLU, SPARTA, SPARTA with
      identity=True, SiLU.
  python -m examples.paper controls mean-gate --data DATA/cifar10
      Does a network need its gates? Our trained network, and the same with each gate replaced by its mean
      over active elements of training images: one number, one of each channel, one of each place of a
      channel. Nothing is trained, but batch norm is estimated anew.

Each network is one file in --out, so a killed call goes on where it was; the result of other options is never
overwritten. At the end the errors are printed, and what the gates of the first seed do.
"""

import argparse
from pathlib import Path

from torch import Tensor, nn

from examples.paper.common import data
from examples.paper.common.cli import at_least, positive, seed
from examples.paper.common.console import print_table
from examples.paper.common.gates import gates
from examples.paper.common.records import sha256
from examples.paper.common.statistics import mean_difference, paired
from examples.paper.controls import transfers
from examples.paper.controls.experiment import OUT, TEST, Job, Result, Results, pairs_of, results
from examples.paper.controls.networks import SITES, drop_in, mean_gate
from examples.paper.controls.pretraining import pretrain
from examples.paper.controls.transfers import CONTENDERS, DESTINATIONS, SLIM
from examples.paper.evaluation import networks
from examples.paper.evaluation.networks import NETWORKS

NETWORK = f"{networks.NAMES} (default %(default)s)"


def show(found: Results) -> None:
    """Print errors by seed, and the paired differences to the first network and to the controls."""
    first, *labels = found
    attacks = list(found[first][0]["errors"])
    columns = {
        a: {n: ", ".join(f"{r['errors'][a]['error']:.2%}" for r in rs) for n, rs in found.items()}
        for a in attacks
    }
    print_table("errors on test images, by seed", columns)
    for other in (first, *(n for n in labels if transfers.is_control(n))):
        columns = {
            a: {n: _minus(rs, found[other], a) for n, rs in found.items() if n != other} for a in attacks
        }
        print_table(f"minus {other}, points: by seed, ± over images; then the mean", columns)


def show_gates(name: str, result: Result) -> None:
    """Print what the gate of each site does to active elements, and what share of all is near 0 or 1."""
    sites = result["gate"]
    columns = {
        what: {site: f"{found[what]:.4f}" if what in found else "" for site, found in sites.items()}
        for what in next(iter(sites.values()))
    }
    print_table(f"{name}: gate on active elements of test images", columns)


def _minus(results: list[Result], others: list[Result], attack: str) -> str:
    pairs = pairs_of(results, others, attack)
    each = ", ".join(str(paired(pair)) for pair in pairs)
    return f"{each}; mean {mean_difference(pairs)}" if len(pairs) > 1 else each


def _transfers(args: argparse.Namespace) -> Results:
    there = DESTINATIONS[args.to]
    return transfers.transfers(
        args.to,
        args.out,
        source=args.data_dir,
        sets=args.set or list(there.sets),
        whole=[str(NETWORKS / f"{n}.safetensors") for n in there.whole] if args.whole is None else args.whole,
        trained=args.trained,
        seeds=args.seeds,
        limit=args.limit,
        epochs=args.epochs,
    )


def _rates(args: argparse.Namespace) -> Results:
    return transfers.rates(
        args.to,
        args.out,
        source=args.data_dir,
        activations=args.activation,
        whole=args.whole,
        lrs=args.lr,
        trained=args.trained,
        limit=args.limit,
        epochs=args.epochs,
    )


def _pretrain(args: argparse.Namespace) -> Results:
    train, test = data.load("train", args.data_dir), data.load("test", args.data_dir)
    pretrain((train[0][: args.limit], train[1][: args.limit]), test, args.trained, args.epochs, args.lr)
    return {}


def _drop_ins(args: argparse.Namespace) -> Results:
    """Each network's result: fine-tuned on images for training, attacked on the first test images."""
    (x, y), test = data.load("train", args.data_dir), data.load("test", args.data_dir)
    model, key = loaded(args.network, *test)
    x, y = x[: args.limit], y[: args.limit]
    here = {"experiment": args.experiment, "seed": args.seed, "limit": len(x), "epochs": args.epochs}
    here |= {"batch_size": 128, "lr": 0.01, "dataset": "cifar10", "sha256": key}
    jobs = [Job(label, make, here) for label, make in drop_in(model, args.seed).items()]
    return results(args.out, jobs, (x, y), (test[0][:TEST], test[1][:TEST]))


def _mean_gates(args: argparse.Namespace) -> Results:
    """Each network's result: nothing is trained."""
    x, y = (t[:512] for t in data.load("train", args.data_dir))
    test = data.load("test", args.data_dir)
    model, key = loaded(args.network, *test)
    if not gates(model):
        raise ValueError(f"{args.network} has no SPARTA, so no gate to replace")
    here = {"experiment": args.experiment, "seed": 0, "epochs": 0, "sha256": key}
    jobs = [Job(label, make, here) for label, make in mean_gate(model, data.to_float(x)).items()]
    return results(args.out, jobs, (x, y), (test[0][:TEST], test[1][:TEST]))


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
    t, c, r, d, m = (
        experiments.add_parser(name, help=text)
        for name, text in (
            ("transfer", "a frozen set in other networks, with its controls"),
            ("rate", "errors by learning rate, on training images"),
            ("pretrain", "train the network of `transfer torchvision` without attacks"),
            ("drop-in", "SPARTA in a network that is trained already"),
            ("mean-gate", "a trained network, its gates replaced by their means"),
        )
    )
    for one in (t, c):
        one.add_argument(
            "to",
            metavar="DESTINATION",
            choices=DESTINATIONS,
            help="; ".join(f"{n}: {there.what}" for n, there in DESTINATIONS.items()),
        )
    t.add_argument("--set", nargs="+", help="sets to freeze: names or folders (default: the destination's)")
    t.add_argument("--whole", nargs="*", help="robust networks to fine-tune (default: the destination's)")
    t.add_argument(
        "--seeds", type=seed, nargs="+", default=[0, 1, 2], help="of the trainings (default 0 1 2)"
    )
    c.add_argument(
        "--activation",
        choices=CONTENDERS,
        nargs="*",
        default=["relu"],
        help=f"at {SITES} (default: relu)",
    )
    c.add_argument("--whole", nargs="*", default=[], help="robust networks to fine-tune (default: none)")
    c.add_argument(
        "--lr",
        type=positive,
        nargs="+",
        default=[0.01, 0.03, 0.1],
        help="learning rates at the start (default 0.01 0.03 0.1)",
    )
    for one, which in ((t, "test images to train on, from the end"), (c, "training images to train on")):
        one.add_argument(
            "--limit", type=at_least(1), default=2000, help=f"how many of the {which} (default %(default)s)"
        )
        one.add_argument("--epochs", type=at_least(1), default=15, help="of training (default %(default)s)")
    for one in (t, c, r):
        one.add_argument(
            "--trained",
            type=Path,
            default=Path("runs/torchvision-resnet18.safetensors"),
            help="weights that `pretrain` writes, for torchvision's network (default %(default)s)",
        )
    r.add_argument("--limit", type=at_least(1), help="images to train on, the first (default: all)")
    r.add_argument("--epochs", type=at_least(1), default=3, help="of training (default %(default)s)")
    r.add_argument(
        "--lr", type=positive, default=0.1, help="learning rate at the start (default %(default)s)"
    )
    d.add_argument("--network", default=f"{NETWORKS / SLIM}-relu.safetensors", help=NETWORK)
    d.add_argument("--seed", type=seed, default=0, help="of the fine-tuning (default %(default)s)")
    d.add_argument("--limit", type=at_least(1), help="images to fine-tune on, the first (default: all)")
    d.add_argument("--epochs", type=at_least(1), default=2, help="of fine-tuning (default %(default)s)")
    m.add_argument("--network", default=f"{NETWORKS / SLIM}.safetensors", help=NETWORK)
    for one, do in ((t, _transfers), (c, _rates), (r, _pretrain), (d, _drop_ins), (m, _mean_gates)):
        what = "the data set's parquet files" if one in (t, c) else "CIFAR-10's parquet files"
        one.add_argument("--data", dest="data_dir", required=True, help=f"folder of {what}, hub or sample")
        if one is not r:
            one.add_argument("--out", type=Path, default=OUT, help="for the results (default %(default)s)")
        one.set_defaults(do=do)
    return p


def main(argv: list[str] | None = None) -> None:
    """Train, measure and compare as the command line says."""
    args = parser().parse_args(argv)
    found = args.do(args)
    if found:
        show(found)
    for name, (first, *_) in found.items():
        if first["gate"]:
            show_gates(name, first)
