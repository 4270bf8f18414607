"""The training loop: images and network from the settings, then epoch by epoch log line and checkpoint."""

import csv
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from examples.paper.common import data
from examples.paper.common.atomic import atomic_write, write_text
from examples.paper.common.cli import COMPILERS, check_device
from examples.paper.common.records import sha256
from examples.paper.training.checkpoint import BEST, network, read_best
from examples.paper.training.gate_statistics import gate_statistics
from examples.paper.training.recipes import Recipe
from examples.paper.training.trainer import Trainer
from examples.paper.training.validation import held_out, validation_error

SAVE_EVERY = 300  # seconds between two checkpoints within an epoch
REPORT_EVERY = 20  # seconds between two versions of PROGRESS
PROGRESS = "progress.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained, and on which images; the defaults are those of the command line."""

    dataset: str = "cifar10"
    arch: str = "resnet18"
    activation: str = "sparta"
    sites: str = "G*.B-1"
    width: int = 64
    pretrained: str | None = None  # name or path of a SPARTA set
    seed: int = 0
    amp: str | None = None  # "bf16" for mixed precision
    validation: int | None = None  # training images held out
    recipe: str = "paper"  # name of the preset that the recipe comes from
    limit: int | None = None  # only the first N training images

    def recorded(self, recipe: Recipe, images: int) -> dict[str, Any]:
        """These settings as a checkpoint holds them, for a training on that many images."""
        mine = dataclasses.asdict(self)
        del mine["limit"]
        return mine | {"images": images, **dataclasses.asdict(recipe)}


def epochs(
    settings: Settings,
    recipe: Recipe,
    *,
    out: Path,
    data_dir: str,
    device: str,
    resume: bool = False,
    compile: str | None = None,
    alone: Callable[[Path], AbstractContextManager[None]] = nullcontext,
) -> Iterator[dict[str, Any]]:
    """Train into the folder `out`; after each epoch's checkpoint yield its line of the log.

    A caller who stops in between leaves a training that `resume` finishes. `compile`: a name of `COMPILERS`.
    `alone` keeps other processes out of the folder. Raises `ValueError` for images, a device or a checkpoint
    that do not fit; nothing is written then.
    """
    checkpoint = out / "checkpoint.pt"
    _check_begin(checkpoint, resume)
    check_device(device)
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.benchmark = True
    if compile:
        torch.compiler.reset()  # after a few networks in one process torch would give up compiling
    x, y = (t[: settings.limit] for t in data.load("train", data_dir, settings.dataset))
    digest = sha256(x.numpy(), y.numpy())
    x, y, held = _split(x.to(device), y.to(device), settings)
    recorded, dataset = settings.recorded(recipe, len(x)), data.DATASETS[settings.dataset]
    trainer = Trainer(
        network(recorded),
        recipe,
        len(x),
        device=device,
        amp=settings.amp == "bf16",
        flip=dataset.flip,
        num_classes=len(dataset.classes),
        compiler=COMPILERS[compile] if compile else None,
        digest=digest,
    )
    out.mkdir(parents=True, exist_ok=True)
    with alone(out):
        _check_begin(checkpoint, resume)  # again, since another process may have been here
        if resume:
            trainer.load(checkpoint, recorded)
        yield from fit(trainer, x, y, out, recorded, held)


def _check_begin(checkpoint: Path, resume: bool) -> None:
    if resume and not checkpoint.exists():
        raise ValueError(f"--resume: there is no {checkpoint}; start without --resume")
    if checkpoint.exists() and not resume:
        raise ValueError(f"{checkpoint} exists; go on with --resume, or choose another --out")


def _split(x: Tensor, y: Tensor, settings: Settings) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Images and labels to train on, and those held out."""
    held = None
    if settings.validation:
        chosen = held_out(settings.validation, len(x)).to(x.device)
        held, x, y = (x[chosen], y[chosen]), x[~chosen], y[~chosen]
    return x, y, held


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
    checkpoint, log = out / "checkpoint.pt", out / "log.csv"
    out.mkdir(parents=True, exist_ok=True)
    rows = read_log(log)[: trainer.epoch]  # a killed run may have logged what its checkpoint does not know
    lowest = float("inf")
    if held is not None:
        (out / BEST).parent.mkdir(exist_ok=True)
        if trainer.epoch:
            lowest = read_best(out, settings)["validation error"]
    while trainer.epoch < trainer.recipe.epochs:
        lr, title = first_rate(trainer), f"epoch {trainer.epoch + 1}/{trainer.recipe.epochs}"
        after_batch = saver(trainer, out, settings)
        with tqdm(total=len(x), unit="img", desc=title) as bar:
            loss, error = trainer.run_epoch(x, y, bar, after_batch)
        row = {"epoch": trainer.epoch, "lr": lr, "loss": loss, "error": error, "seconds": trainer.seconds}
        gates = gate_statistics(trainer.final(), data.to_float(x[:256], trainer.device))
        row |= {f"{name} {what}": n for name, found in gates.items() for what, n in found.items()}
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


def saver(trainer: Trainer, out: Path, settings: dict[str, Any]) -> Callable[[], None]:
    """A function to call after each batch: now and then it writes the checkpoint, and PROGRESS."""
    saved = reported = time.monotonic()
    before = trainer.seen

    def save() -> None:
        nonlocal saved, reported, before
        now = time.monotonic()
        if now - reported > REPORT_EVERY:
            speed = (trainer.seen - before) / (now - reported)
            reported, before = now, trainer.seen
            left = settings["images"] * (trainer.recipe.epochs - trainer.epoch) - trainer.seen
            progress = {"epoch": trainer.epoch + 1, "images": trainer.seen, "images per second": speed}
            write_text(out / PROGRESS, json.dumps(progress | {"ends": time.time() + left / speed}))
        if now - saved > SAVE_EVERY:
            saved = now
            trainer.save(out / "checkpoint.pt", settings)

    return save


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of log.csv, one an epoch; none where it is not. Raises `ValueError` for another file."""
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            float(row["seconds"])
            if None in row:
                raise ValueError("a line has more numbers than the head has names")
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(f"{path} is no log of a training; move it away, its checkpoint can go on") from None
    return rows


def _write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(path) as scratch, scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
        writer.writeheader()
        writer.writerows(rows)


def format_row(row: dict[str, Any]) -> str:
    """A line of the log as text."""
    text = f"loss {row['loss']:.3f}, error {row['error']:.1%} on the training batches"
    if "validation error" in row:
        text += f" and {row['validation error']:.1%} on the images held out"
    return f"{text}, {row['seconds']:.1f} s"
