"""Adversarial training: `python examples/train.py --recipe paper --activation sparta --out runs/sparta`.

Each epoch is one checkpoint, written atomically; a killed run goes on with `--resume`, on a CPU bit for bit.
"""

import argparse
import csv
import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
from attacks import attacking, pgd
from command_line import at_least, fraction, plain_errors, positive
from models import ACTIVATIONS, BLOCKS, ResNet, resnet
from sparta_act import Sparta, replace_relus


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train: the attack in the loop (L-infinity PGD) and the optimizer (SGD, momentum 0.9)."""

    targeted: bool
    eps: float
    step_size: float
    steps: int
    epochs: int
    lr: float
    weight_decay: float
    decay: str  # "steps": times 0.1 at one and at two thirds; "linear": to 0 at the end
    averaging: float = 0.0  # decay per step of the exponential average of the weights; 0 for none
    batch_size: int = 128
    gate_lr: float = 0.1  # of SPARTA's own parameters, as a factor of lr; with 1 the gate saturates at once


RECIPES = {
    # SPARTA sections 2.3.1 and 4.1, after Xie et al. 2019; 90 epochs and the batch size are ours
    "paper": Recipe(True, 16 / 255, 1 / 255, 10, 90, 0.1, 1e-4, "steps"),
    # what robust-accuracy tables compare: untargeted at 8/255
    "modern": Recipe(False, 8 / 255, 2 / 255, 10, 30, 0.1, 5e-4, "linear", averaging=0.999),
    # for a CPU: the paper's ten steps taken as one (single-step training: Wong et al. 2020, arXiv:2001.03994)
    "fast": Recipe(True, 16 / 255, 10 / 255, 1, 4, 0.1, 1e-4, "linear"),
}


HELP = """preset of all that follows: `paper`, targeted PGD-10 at 16/255, 90 epochs; `modern`, untargeted
PGD-10 at 8/255, 30 epochs, weight averaging; `fast`, one targeted step, 4 epochs, for a CPU (--width 16)"""


def build(
    arch: str,
    activation: str,
    sites: str,
    *,
    width: int,
    pretrained: str | None = None,
    num_classes: int = 10,
) -> ResNet:
    """Fresh network with `activation` at `sites`; `pretrained` names a set whose frozen SPARTA goes there."""
    model = resnet(arch, width=width, num_classes=num_classes)
    make = Sparta.from_pretrained(pretrained) if pretrained else ACTIVATIONS[activation]
    return model if make is None else replace_relus(model, sites, make)


def gate_shares(model: nn.Module, x: Tensor) -> dict[str, tuple[float, float]]:
    """Share of each SPARTA's gate below 0.01 and above 0.99 on images x (N, C, H, W), by module name."""
    shares = {}

    def look(name: str) -> Any:
        def hook(module: Sparta, inputs: tuple[Tensor]) -> None:
            gate = module.attention(inputs[0])
            shares[name] = ((gate < 0.01).float().mean().item(), (gate > 0.99).float().mean().item())

        return hook

    gates = [(n, m) for n, m in model.named_modules() if isinstance(m, Sparta)]
    handles = [m.register_forward_pre_hook(look(n)) for n, m in gates]
    try:
        with attacking(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return shares


class Trainer:
    """Network, optimizer and schedule of one run, and the file that holds them between epochs."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, batches: int, *, device: str = "cpu", amp: bool = False
    ):
        self.model = model.to(device, memory_format=torch.channels_last)
        self.recipe, self.device, self.amp, self.batches = recipe, device, amp, batches
        gates = {id(p) for m in model.modules() if isinstance(m, Sparta) for p in m.parameters()}
        learned = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in learned if id(p) not in gates]},
            {"params": [p for p in learned if id(p) in gates], "lr": recipe.gate_lr * recipe.lr},
        ]
        self.optimizer = torch.optim.SGD(groups, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        average = get_ema_multi_avg_fn(recipe.averaging)
        self.average = (
            AveragedModel(model, multi_avg_fn=average, use_buffers=True) if recipe.averaging else None
        )
        self.runner = self.model  # or its compiled form
        self.epoch = 0

    def run_epoch(self, x: Tensor, y: Tensor, bar: "tqdm[Any]") -> tuple[float, float]:
        """One epoch over uint8 images x (N, C, H, W) and labels y (N,): mean loss and error meanwhile."""
        self.model.train()
        total = torch.zeros(2, dtype=torch.float64)
        for batch in torch.randperm(len(x)).split(self.recipe.batch_size):
            images = data.augment(data.to_float(x[batch], self.device))
            loss, wrong = self.step(
                images.contiguous(memory_format=torch.channels_last), y[batch].to(self.device)
            )
            total += torch.tensor([loss * len(batch), wrong])
            bar.update(len(batch))
            bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
        self.epoch += 1
        return (total[0] / len(x)).item(), (total[1] / len(x)).item()

    def step(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Attack one batch, learn from the adversarial images only: their loss and how many were wrong."""
        r = self.recipe
        with self._autocast():
            x_adv = pgd(
                self.runner, x, y, eps=r.eps, step_size=r.step_size, steps=r.steps, targeted=r.targeted
            )
            logits = self.runner(x_adv)
        loss = F.cross_entropy(logits.float(), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss.item(), (logits.argmax(1) != y).sum().item()

    def final(self) -> nn.Module:
        """The network to evaluate: the weight average if the recipe has one."""
        return self.model if self.average is None else self.average.module

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Write everything a resumed run needs; the old file stays whole until the new one is."""
        state = {
            "settings": settings,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        scratch = path.with_suffix(".tmp")
        torch.save(state, scratch)
        os.replace(scratch, path)

    def load(self, path: Path, settings: dict[str, Any]) -> None:
        """Go on from `path`. Raises `ValueError` if it belongs to another run."""
        state = read_checkpoint(path)
        changed = {
            k: (state["settings"].get(k), v) for k, v in settings.items() if state["settings"].get(k) != v
        }
        if changed:
            told = ", ".join(f"{k} was {old!r}, now {new!r}" for k, (old, new) in changed.items())
            raise ValueError(f"{path} is of another run: {told}; give the old settings or another --out")
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def _lr_factor(self, step: int) -> float:
        done = step / (self.batches * self.recipe.epochs)
        if self.recipe.decay == "linear":
            return max(1 - done, 0)
        return 0.1 ** ((done >= 1 / 3) + (done >= 2 / 3))

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.amp)


def fit(
    trainer: Trainer, x: Tensor, y: Tensor, out: Path, settings: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Train to the recipe's end; after each epoch write checkpoint and log line, and yield the line."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = out / "checkpoint.pt", out / "log.csv"
    rows = _read_log(log)[: trainer.epoch]  # a killed run may have logged what its checkpoint does not know
    while trainer.epoch < trainer.recipe.epochs:
        began, lr = time.perf_counter(), trainer.scheduler.get_last_lr()[0]
        with tqdm(total=len(x), unit="img", desc=f"epoch {trainer.epoch + 1}/{trainer.recipe.epochs}") as bar:
            loss, error = trainer.run_epoch(x, y, bar)
        row = {
            "epoch": trainer.epoch,
            "lr": lr,
            "loss": loss,
            "error": error,
            "seconds": time.perf_counter() - began,
        }
        for name, (closed, opened) in gate_shares(
            trainer.model, data.to_float(x[:256], trainer.device)
        ).items():
            row |= {f"{name} < 0.01": closed, f"{name} > 0.99": opened}
        rows.append(row)
        _write_log(log, rows)
        trainer.save(checkpoint, settings)
        yield row


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `Trainer.save` wrote. Raises `ValueError` for any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zipfile, pickle or torch, by what is wrong with the file
        raise ValueError(
            f"{path} cannot be read as a checkpoint of train.py ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not {"settings", "epoch", "model", "average"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of train.py; give the checkpoint.pt in its --out")
    return state


def load_trained(path: Path | str) -> tuple[ResNet, dict[str, Any]]:
    """Network of a checkpoint of this script, in evaluation mode, and the settings it was trained with."""
    state = read_checkpoint(Path(path))
    s = state["settings"]
    model = build(s["arch"], s["activation"], s["sites"], width=s["width"], pretrained=s["pretrained"])
    if state["average"] is None:
        model.load_state_dict(state["model"])
    else:
        averaged = AveragedModel(model, use_buffers=True)
        averaged.load_state_dict(state["average"])
        model = averaged.module
    return model.eval(), s


def _read_log(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    os.replace(scratch, path)


def parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument(
        "--out", type=Path, default=Path("runs/latest"), help="folder of checkpoint.pt and log.csv"
    )
    p.add_argument("--resume", action="store_true", help="finish a killed run of --out, with its settings")
    p.add_argument(
        "--data-dir", default="sample", help="'sample' (ours), 'hub', or a folder of parquet files"
    )
    p.add_argument("--limit", type=at_least(1), help="train on the first so many images only")
    p.add_argument("--arch", choices=BLOCKS, default="resnet18")
    p.add_argument("--width", type=at_least(8), default=64, help="channels of the first group; 16 is slim")
    p.add_argument("--activation", choices=ACTIVATIONS, default="sparta")
    p.add_argument("--sites", default="G*.B-1", help="which ReLUs to replace, e.g. 'G4.B2' or 'G{1,2}.B*'")
    p.add_argument(
        "--pretrained", help="name or path of a SPARTA set to put there, frozen, as the activation"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--amp", choices=("bf16",), help="mixed precision")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--recipe", choices=RECIPES, default="paper", help=HELP)
    numbers = {"eps": fraction, "step_size": fraction, "lr": positive, "gate_lr": positive}
    numbers |= {"weight_decay": float, "steps": at_least(1), "epochs": at_least(1), "batch_size": at_least(1)}
    for name, kind in numbers.items():
        text = "of the recipe, unless given" + ("; a fraction of 1, e.g. 8/255" if kind is fraction else "")
        p.add_argument("--" + name.replace("_", "-"), type=kind, default=argparse.SUPPRESS, help=text)
    return p


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    args = parser().parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if hasattr(args, f.name)}
    recipe = dataclasses.replace(RECIPES[args.recipe], **given)
    checkpoint = args.out / "checkpoint.pt"
    if args.resume and not checkpoint.exists():
        raise SystemExit(f"--resume: there is no {checkpoint}; start without --resume")
    if checkpoint.exists() and not args.resume:
        raise SystemExit(f"{checkpoint} exists; go on with --resume, or choose another --out")
    torch.manual_seed(args.seed)
    x, y = (t[: args.limit] for t in data.load("train", args.data_dir))
    model = build(args.arch, args.activation, args.sites, width=args.width, pretrained=args.pretrained)
    settings = {
        k: getattr(args, k) for k in ("arch", "activation", "sites", "width", "pretrained", "seed", "amp")
    }
    settings |= {"images": len(x), "recipe": args.recipe, **dataclasses.asdict(recipe)}
    batches = -(-len(x) // recipe.batch_size)
    trainer = Trainer(model, recipe, batches, device=args.device, amp=args.amp == "bf16")
    if args.compile:
        trainer.runner = torch.compile(trainer.model)
    if args.resume:
        trainer.load(checkpoint, settings)
    activation = f"{args.pretrained}, frozen," if args.pretrained else args.activation
    print(f"{args.arch} width {args.width}, {activation} at {args.sites}; {len(x)} images; {recipe}")
    for row in fit(trainer, x, y, args.out, settings):
        print(f"epoch {row['epoch']}: loss {row['loss']:.3f}, error {row['error']:.1%} on attacked images")
    print(f"done: {checkpoint}; evaluate it with: python examples/evaluate.py {checkpoint}")


if __name__ == "__main__":
    with plain_errors():
        main()
