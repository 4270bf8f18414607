"""Errors of a trained network, clean and attacked: `python examples/evaluate.py runs/sparta/checkpoint.pt`.

Robustness figures are of the attacks named and of nothing stronger; they are no certificate.
"""

import argparse
import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import data
from attacks import attacking, classes_of, pgd, pgd_steps, random_targets
from command_line import at_least, plain_errors
from train import load_trained

PAPER = {"targeted": True, "eps": 16 / 255, "step_size": 1 / 255}
MODERN = {"targeted": False, "eps": 8 / 255, "step_size": 2 / 255}


def menu(steps: list[int], untargeted_steps: int, restarts: int) -> dict[str, dict[str, Any]]:
    """Attacks by name: the paper's targeted PGD at each number of steps, and an untargeted one at 8/255."""
    attacks = {f"targeted PGD-{k}, 16/255": {**PAPER, "steps": k} for k in steps}
    name = f"untargeted PGD-{untargeted_steps}{f' x {restarts}' if restarts > 1 else ''}, 8/255"
    return attacks | {name: {**MODERN, "steps": untargeted_steps, "restarts": restarts}}


def find_errors(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Mapping[str, Any]],
    *,
    device: str = "cpu",
    batch_size: int = 250,
    title: str = "attacking",
) -> dict[str, Tensor]:
    """Which images the network gets wrong: clean, and under each attack.

    Shapes: x (N, C, H, W) uint8, y (N,); each result (N,) of bool.
    """
    wrong: dict[str, list[Tensor]] = {name: [] for name in ("clean", *attacks)}
    model = model.to(device, memory_format=torch.channels_last).eval()
    passes = 1 + sum(a["steps"] * a.get("restarts", 1) for a in attacks.values())
    with tqdm(total=passes * len(x), unit="img", unit_scale=True, desc=title) as bar:
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            clean = data.to_float(images, device).contiguous(memory_format=torch.channels_last)
            goal = labels.to(device)
            wrong["clean"].append(_errs(model, clean, goal))
            bar.update(len(clean))
            for name, arguments in attacks.items():
                wrong[name].append(_errs(model, pgd(model, clean, goal, **arguments), goal))
                bar.update(len(clean) * arguments["steps"] * arguments.get("restarts", 1))
    return {name: torch.cat(parts) for name, parts in wrong.items()}


def loss_curve(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, step_size: float, steps: int, targeted: bool
) -> tuple[Tensor, Tensor]:
    """Loss of each image at each step of one PGD run, and the attacked images (the paper's Figure 3).

    Shapes: x (N, C, H, W) in [0, 1], y (N,); results (steps, N) and as x.
    """
    with attacking(model):
        goal = random_targets(y, classes_of(model, x)) if targeted else y
        run = pgd_steps(model, x, goal, eps=eps, step_size=step_size, steps=steps, targeted=targeted)
        images, losses = zip(*run, strict=True)
    return torch.stack(losses), images[-1]


def interval(wrong: Tensor) -> tuple[float, float, float]:
    """Error and its 95% Wilson interval, from (N,) of bool."""
    n, p, z = len(wrong), wrong.float().mean().item(), 1.959964
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return p, middle - half, middle + half


def difference(wrong: Tensor, other: Tensor) -> tuple[float, float]:
    """Error minus the other's error on the same images, and the half width of its 95% interval (paired)."""
    d = wrong.float() - other.float()
    return d.mean().item(), 1.959964 * d.std(correction=0).item() / math.sqrt(len(d))


def percent(wrong: Tensor) -> str:
    """Error with its interval, as text: `31.5% (28.7-34.4)`."""
    p, low, high = interval(wrong)
    return f"{p:.1%} ({100 * low:.1f}-{100 * high:.1f})"


def print_table(title: str, columns: Mapping[str, Mapping[str, str]]) -> None:
    """Print rows (the keys of each column's entries) by columns."""
    table = Table(title=title)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for row in next(iter(columns.values())):
        table.add_row(row, *(c[row] for c in columns.values()))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def stamp() -> dict[str, str]:
    """What a figure needs beside it: machine, torch, date."""
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        machine += ", " + torch.cuda.get_device_name()
    return {"machine": machine, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def _errs(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return (model(x).argmax(1) != y).cpu()


def main(argv: list[str] | None = None) -> None:
    """Evaluate as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("checkpoint", type=Path, nargs="+", help="checkpoint.pt of train.py; several are compared")
    p.add_argument(
        "--data-dir", default="sample", help="'sample' (ours), 'hub', or a folder of parquet files"
    )
    p.add_argument("--limit", type=at_least(1), help="attack the first so many test images only")
    p.add_argument("--steps", type=at_least(1), nargs="+", default=[10, 30, 50], help="of the targeted PGD")
    p.add_argument("--untargeted-steps", type=at_least(1), default=50)
    p.add_argument("--restarts", type=at_least(1), default=1, help="of the untargeted PGD")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    if missing := [str(c) for c in args.checkpoint if not c.exists()]:
        raise SystemExit(f"there is no {', '.join(missing)}; train.py writes checkpoint.pt into its --out")
    x, y = (t[: args.limit] for t in data.load("test", args.data_dir))
    attacks = menu(args.steps, args.untargeted_steps, args.restarts)
    wrong: dict[str, dict[str, Tensor]] = {}
    for path in args.checkpoint:
        torch.manual_seed(args.seed)
        model, settings = load_trained(path)
        name = str(path.parent)
        wrong[name] = find_errors(model, x, y, attacks, device=args.device, title=name)
        errors = {
            k: dict(zip(("error", "low", "high"), interval(w), strict=True)) for k, w in wrong[name].items()
        }
        few, goal = data.to_float(x[:250], args.device), y[:250].to(args.device)
        curve, _ = loss_curve(model, few, goal, **PAPER, steps=max(args.steps))
        record = {"errors": errors, "images": len(x), "seed": args.seed, "settings": settings, **stamp()}
        record["loss per step"] = curve.mean(1).tolist()  # of the target class, on the first 250 images
        (path.parent / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    names = list(wrong)
    table = {k: {name: percent(wrong[name][k]) for name in names} for k in wrong[names[0]]}
    print_table(f"errors on {len(x)} test images, 95% intervals", table)
    if others := names[1:]:
        first = wrong[names[0]]
        table = {k: {name: told(*difference(wrong[name][k], first[k])) for name in others} for k in first}
        print_table(f"minus the errors of {names[0]}, points, paired 95% intervals", table)


def told(d: float, half: float) -> str:
    """Difference of two errors in points, and whether it is more than noise."""
    return f"{100 * d:+.1f} ± {100 * half:.1f}{'' if abs(d) > half else ' (noise)'}"


if __name__ == "__main__":
    with plain_errors():
        main()
