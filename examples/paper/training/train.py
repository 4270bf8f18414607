"""Adversarial training: `python examples/train.py --recipe paper --activation sparta --out runs/sparta`.

A checkpoint is written every five minutes and after each epoch, atomically; a killed run goes on with
`--resume`, inside an epoch too, on a CPU bit for bit.
With `--validation 1000` so many training images are held out and attacked after each epoch, and the network
that erred least on them is kept besides, in OUT/best: robust error often rises again towards the end of a
training (Rice et al. 2020, arXiv:2002.11569).
On several GPUs or machines: `torchrun --nproc-per-node=4 examples/train.py ...`, with the same options, which
learns the same as one process would: the batch size is that of all processes together.
"""

import argparse
import csv
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks.pgd import attacking
from examples.paper.attacks.robust_error import clean_errors, robust_errors
from examples.paper.common import data
from examples.paper.common.atomic import atomic_write, write_text
from examples.paper.common.cli import at_least, check_device, plain_errors
from examples.paper.common.gates import gate_inputs, gates
from examples.paper.common.models import ACTIVATIONS, BLOCKS, ResNet, build
from examples.paper.training import distributed, recipes
from examples.paper.training.recipes import RECIPES, Recipe
from examples.paper.training.trainer import COMPILERS, Trainer, averaged, read_checkpoint

SAVE_EVERY = 300  # seconds within an epoch
TELL_EVERY = 20  # seconds between two versions of PROGRESS
PROGRESS = "progress.json"
ENDS, ALL_SITES = ("< 0.01", "> 0.99"), "all sites"  # of a log's columns
BEST = Path("best", "checkpoint.pt")  # in the folder of a run that holds out images for validation

__all__ = [
    "BEST",
    "RECIPES",
    "Trainer",
    "build",
    "epochs",
    "fit",
    "gate_statistics",
    "held_out",
    "load_trained",
    "read_best",
    "read_checkpoint",
    "read_log",
    "validated",
    "validation_error",
]


def gate_statistics(model: nn.Module, x: Tensor) -> dict[str, dict[str, float]]:
    """What each SPARTA's gate does to active elements of images x (N, C, H, W), by module name.

    Its mean and standard deviation, the share of its variance that is spatial (within the channels of an
    image, not between them), and the share of its sigmoid below 0.01 and above 0.99; and its gain. Last, if
    there is any, `ALL_SITES`: both shares of the elements of all sites together.
    """
    found: dict[str, dict[str, float]] = {}
    elements: dict[str, int] = {}

    sites = gates(model)
    for name, inputs in gate_inputs(model, x).items():
        if not inputs:
            continue
        sparta, z = sites[name], inputs[-1]
        with torch.no_grad():
            gate, active = sparta.attention(z).double(), z > 0
        means = (gate * active).sum((2, 3), keepdim=True) / active.sum((2, 3), keepdim=True).clamp(min=1)
        within, gate = (gate - means)[active], gate[active]
        spread = gate.std(correction=0)
        elements[name] = gate.numel()
        found[name] = {
            "gain": sparta.gain.item(),
            "mean": gate.mean().item(),
            "std": spread.item(),
            "spatial": (within.square().mean() / spread.square().clamp(min=1e-12)).item(),
            ENDS[0]: (gate < 0.01 * sparta.scale).double().mean().item(),
            ENDS[1]: (gate > 0.99 * sparta.scale).double().mean().item(),
        }
    if found:
        total = max(sum(elements.values()), 1)
        found[ALL_SITES] = {e: sum(n * found[s][e] for s, n in elements.items() if n) / total for e in ENDS}
    return found


def held_out(count: int, images: int) -> Tensor:
    """Which of the training images are for validation, (images,) of bool: `count`, evenly spread over them.

    The same for every seed, and of all classes also where the file is sorted by them (not where it lists them
    in turn).
    Raises `ValueError` if none would be left to train on.
    """
    if count >= images:
        raise ValueError(f"--validation {count}: there are {images} training images, and none would be left")
    held = torch.zeros(images, dtype=torch.bool)
    held[torch.arange(count) * images // count] = True
    return held


def validation_error(trainer: Trainer, x: Tensor, y: Tensor) -> float:
    """Robust error of the network to evaluate, or clean error if the recipe has no attack.

    Untargeted PGD-10 within the recipe's bound, by steps of a quarter of it, from the image itself, whatever
    the attack in training: a weak one would not see what only a strong one finds. It draws no random numbers,
    so that a training is the same with it. Shapes: x (N, C, H, W) uint8, y (N,).
    """
    eps, model = trainer.recipe.eps, trainer.final()
    images, labels = data.to_float(x, trainer.device), y.to(trainer.device)
    with attacking(model):
        if not trainer.recipe.steps:
            return clean_errors(model, images, labels).float().mean().item()
        attack = {"eps": eps, "step_size": eps / 4, "steps": 10, "random_start": False}
        return robust_errors(model, images, labels, **attack).float().mean().item()


def fit(
    trainer: Trainer,
    x: Tensor,
    y: Tensor,
    out: Path,
    settings: dict[str, Any],
    held: tuple[Tensor, Tensor] | None = None,
) -> Iterator[dict[str, Any]]:
    """Train to the recipe's end; after each epoch write checkpoint and log line, and yield the line.

    `held`: images and labels to choose the best epoch by.
    """
    checkpoint, log, first = out / "checkpoint.pt", out / "log.csv", distributed.is_first()
    out.mkdir(parents=True, exist_ok=True)
    rows = read_log(log)[: trainer.epoch]  # a killed run may have logged what its checkpoint does not know
    lowest = float("inf")
    if held is not None:
        (out / BEST).parent.mkdir(exist_ok=True)
        if trainer.epoch:
            lowest = read_best(out, settings)["validation error"]
    while trainer.epoch < trainer.recipe.epochs:
        lr, title = first_rate(trainer), f"epoch {trainer.epoch + 1}/{trainer.recipe.epochs}"
        keep = keeper(trainer, out, settings) if first else lambda: None
        with tqdm(total=len(x), unit="img", desc=title, disable=not first) as bar:
            loss, error = trainer.run_epoch(x, y, bar, keep)
        row = {"epoch": trainer.epoch, "lr": lr, "loss": loss, "error": error, "seconds": trainer.seconds}
        if first:
            sites = gate_statistics(trainer.final(), data.to_float(x[:256], trainer.device))
            row |= {f"{name} {what}": n for name, found in sites.items() for what, n in found.items()}
            if held is not None:
                row["validation error"] = error = validation_error(trainer, *held)
                if error < lowest:
                    lowest = error
                    trainer.save_network(out / BEST, settings, error)
            rows.append(row)
            _write_log(log, rows)
            trainer.save(checkpoint, settings)
        yield row


def first_rate(trainer: Trainer) -> float:
    """Learning rate of an epoch's first batch, also where a resumed run is inside the epoch."""
    scheduler = trainer.scheduler
    return float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](trainer.epoch * trainer.batches))


def keeper(trainer: Trainer, out: Path, settings: dict[str, Any]) -> Callable[[], None]:
    """What to call after each batch: now and then it writes the checkpoint, and how far the training is."""
    saved = told = time.monotonic()
    before = trainer.seen

    def keep() -> None:
        nonlocal saved, told, before
        now = time.monotonic()
        if now - told > TELL_EVERY:
            speed = (trainer.seen - before) / (now - told)
            told, before = now, trainer.seen
            left = settings["images"] * (trainer.recipe.epochs - trainer.epoch) - trainer.seen
            progress = {"epoch": trainer.epoch + 1, "images": trainer.seen, "images per second": speed}
            write_text(out / PROGRESS, json.dumps(progress | {"ends": time.time() + left / speed}))
        if now - saved > SAVE_EVERY:
            saved = now
            trainer.save(out / "checkpoint.pt", settings)

    return keep


def read_best(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """OUT/best of a run with these settings: its network, its epoch and its validation error.

    Raises `ValueError` if it is not there or of another run.
    """
    state, path = None, out / BEST
    if path.exists():
        state = read_checkpoint(path)
        if state["settings"] == settings and "validation error" in state:
            return state
    told = "is of another run" if state else "is not there"
    raise ValueError(f"{path}, the best epoch of {out}, {told}; bring it back, or begin {out} anew")


def load_trained(path: Path | str) -> tuple[ResNet, dict[str, Any]]:
    """Network of a checkpoint of this script, in evaluation mode, and the settings it was trained with."""
    state = read_checkpoint(Path(path))
    s = state["settings"]
    model = build(
        s["arch"],
        s["activation"],
        s["sites"],
        width=s["width"],
        pretrained=s["pretrained"],
        num_classes=len(data.DATASETS[s["dataset"]].classes),
        dataset=s["dataset"],
    )
    if state["average"] is None:
        model.load_state_dict(state["model"])
    else:
        average = averaged(model)
        average.load_state_dict(state["average"])
        model = average.module
    return model.eval(), s


def epochs(argv: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Train as the command line says; after each epoch's checkpoint yield its line of the log.

    A caller who stops in between leaves a run that `--resume` finishes.
    """
    args = parser().parse_args(argv)
    recipe = recipes.chosen(args)
    checkpoint = args.out / "checkpoint.pt"
    if args.resume and not checkpoint.exists():
        raise SystemExit(f"--resume: there is no {checkpoint}; start without --resume")
    if checkpoint.exists() and not args.resume:
        raise SystemExit(f"{checkpoint} exists; go on with --resume, or choose another --out")
    with distributed.joined(args.device) as device:
        yield from _epochs(args, recipe, checkpoint, device)


def parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/latest"),
        help="folder of checkpoint.pt, log.csv and, with --validation, best/ (default %(default)s)",
    )
    p.add_argument("--resume", action="store_true", help="finish a killed run of --out, with its settings")
    p.add_argument("--dataset", choices=data.DATASETS, default="cifar10", help="default %(default)s")
    p.add_argument(
        "--data-dir",
        default="sample",
        help="'sample' (ours, of cifar10; default), 'hub', or a folder of parquet files",
    )
    p.add_argument("--limit", type=at_least(1), help="train on the first so many images only")
    p.add_argument(
        "--validation",
        type=at_least(1),
        help="hold out so many of the training images, evenly spread over them, attack them after each epoch "
        "and keep the network that errs least, the earliest of equals, in OUT/best",
    )
    p.add_argument("--arch", choices=BLOCKS, default="resnet18", help="default %(default)s")
    p.add_argument(
        "--width",
        type=at_least(8),
        default=64,
        help="channels of the first group; 16 is slim (default %(default)s)",
    )
    p.add_argument("--activation", choices=ACTIVATIONS, default="sparta", help="default %(default)s")
    p.add_argument(
        "--sites",
        default="G*.B-1",
        help="which ReLUs to replace, e.g. 'G4.B2', 'G{1,2}.B*' or, for all, '*act*' (default %(default)s)",
    )
    p.add_argument(
        "--pretrained",
        help="name or path of a SPARTA set to put there, frozen; --activation says what it holds",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--amp", choices=("bf16",), help="mixed precision; weights and evaluation stay float32")
    p.add_argument(
        "--compile",
        choices=COMPILERS,
        help="torch.compile the network: `default`; `reduce-overhead`, with CUDA graphs; `cudagraphs`, those "
        "alone, without generated code, ready in seconds; benchmarks/epoch.py times them",
    )
    recipes.add_options(p)
    return p


def validated(row: dict[str, Any]) -> str:
    """What a line of the log says of the network to evaluate, as text; empty without `--validation`."""
    if "validation error" not in row:
        return ""
    return f"; as it would be evaluated now, {row['validation error']:.1%} on those held out"


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    args = parser().parse_args(argv)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        activation = f"{args.pretrained}, frozen," if args.pretrained else args.activation
        print(f"{args.arch} width {args.width}, {activation} at {args.sites}, {args.dataset}")
        print(recipes.chosen(args))
    for row in epochs(argv):
        if first:
            told = f"loss {row['loss']:.3f}, error {row['error']:.1%} on the training batches"
            print(f"epoch {row['epoch']}: {told}{validated(row)}, {row['seconds']:.1f} s")
    if first:
        checkpoints = f"{args.out / 'checkpoint.pt'}"
        if args.validation:
            checkpoints += f" {args.out / BEST}"
            print(f"best: epoch {read_checkpoint(args.out / BEST)['epoch']}")
        print(f"done; evaluate it with: python examples/evaluate.py {checkpoints}")


def _epochs(
    args: argparse.Namespace, recipe: Recipe, checkpoint: Path, device: str
) -> Iterator[dict[str, Any]]:
    check_device(device)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    if args.compile:
        torch.compiler.reset()  # after a few networks in one process torch would give up compiling
    dataset = data.DATASETS[args.dataset]
    x, y = (t[: args.limit].to(device) for t in data.load("train", args.data_dir, args.dataset))
    held = None
    if args.validation:
        out = held_out(args.validation, len(x)).to(device)
        held, x, y = (x[out], y[out]), x[~out], y[~out]
    rest, processes = len(x) % recipe.batch_size, distributed.processes()
    if 0 < rest < processes:
        raise ValueError(f"the last batch has {rest} images for {processes} processes; change --batch-size")
    model = build(
        args.arch,
        args.activation,
        args.sites,
        width=args.width,
        pretrained=args.pretrained,
        num_classes=len(dataset.classes),
        dataset=args.dataset,
    )
    named = ("dataset", "arch", "activation", "sites", "width", "pretrained", "seed", "amp", "validation")
    settings = {k: getattr(args, k) for k in named}
    settings |= {"images": len(x), "recipe": args.recipe, **dataclasses.asdict(recipe)}
    trainer = Trainer(
        model,
        recipe,
        len(x),
        device=device,
        amp=args.amp == "bf16",
        flip=dataset.flip,
        num_classes=len(dataset.classes),
        compiler=COMPILERS[args.compile] if args.compile else None,
    )
    if args.resume:
        trainer.load(checkpoint, settings)
    yield from fit(trainer, x, y, args.out, settings, held)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of log.csv, one an epoch; none where it is not. Raises `ValueError` for another file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        for row in rows:
            float(row["seconds"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is no log of train.py; move it away, its checkpoint can go on") from None
    return rows


def _write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(path) as scratch, scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    with plain_errors():
        main()
