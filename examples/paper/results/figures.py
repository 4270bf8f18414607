"""Draw the paper's Figures 1 and 3 for checkpoints of one data set.

  python -m examples.paper figures runs/w16-*/checkpoint.pt --data-dir CIFAR10_FOLDER

Figure 1: feature maps before and after the last activation of a group, for clean and attacked images.
Figure 3: the loss of the attack's target class at each step of PGD, a curve for each network. The attack
succeeds where it falls. The numbers of the curves are written next to the figure, as JSON.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import SubFigure
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks.pgd import attacking
from examples.paper.common import data
from examples.paper.common.cli import at_least
from examples.paper.common.console import stamp
from examples.paper.common.tf32 import exact_float32
from examples.paper.evaluation.measure import BATCH, PAPER, loss_curve
from examples.paper.training.checkpoint import load_trained


def feature_maps(model: nn.Module, x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Mean over channels before and after the last activation of a group, counted from 1.

    Shapes: x (N, 3, H, W) in [0, 1], results (N, H', W').
    """
    seen: list[Tensor] = []

    def before(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0].mean(1))

    def after(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append(output.mean(1))

    module = model.get_submodule(f"layer{group}")[-1].act2
    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with attacking(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0].cpu(), seen[1].cpu()


def draw_maps(
    part: SubFigure, name: str, group: int, clean: Tensor, attacked: Tensor, maps: Mapping[str, Tensor]
) -> None:
    """Figure 1 of one network: a row for each image. Shapes: (N, 3, H, W) in [0, 1]; maps (N, H', W')."""
    low = min(m.min().item() for m in maps.values())
    high = max(m.max().item() for m in maps.values())
    columns = {"clean": clean.permute(0, 2, 3, 1), "attacked": attacked.permute(0, 2, 3, 1), **maps}
    axes = part.subplots(len(clean), len(columns), squeeze=False)
    for j, (title, images) in enumerate(columns.items()):
        for i, image in enumerate(images):
            axes[i, j].imshow(image.cpu(), cmap="magma", vmin=low, vmax=high)
            axes[i, j].set_xticks([])
            axes[i, j].set_yticks([])
        axes[0, j].set_title(title, fontsize=8)
    part.suptitle(
        f"{name}: mean over channels at the end of group {group}, colors {low:.2f} to {high:.2f}", fontsize=9
    )


def draw_curves(part: SubFigure, curves: Mapping[str, Tensor]) -> None:
    """Figure 3: mean of the losses, its 95% interval, and their deviation. Shapes: each (steps, images)."""
    ax = part.subplots()
    for name, losses in curves.items():
        steps, mean, std = torch.arange(len(losses)), losses.mean(1), losses.std(1, correction=0)
        (line,) = ax.plot(steps, mean, label=name)
        half = 1.96 * std / losses.shape[1] ** 0.5
        ax.fill_between(steps, mean - std, mean + std, color=line.get_color(), alpha=0.08)
        ax.fill_between(steps, mean - half, mean + half, color=line.get_color(), alpha=0.3)
    ax.set_xlabel("PGD step")
    ax.set_ylabel("loss of the target class")
    count = next(iter(curves.values())).shape[1]
    ax.set_title(
        f"{count} images; dark: 95% interval of the mean, light: standard deviation over images", fontsize=9
    )
    ax.legend(fontsize=8)


def load(paths: list[Path]) -> tuple[dict[str, nn.Module], str]:
    """Networks by the names of their folders, and their data set. Raises `ValueError` unless it is one."""
    networks, datasets = {}, set()
    for path in paths:
        networks[path.parent.name], settings = load_trained(path)
        datasets.add(settings["dataset"])
    if len(datasets) > 1:
        raise ValueError(
            f"the checkpoints are of {' and '.join(sorted(datasets))}; draw one data set at a time"
        )
    if len(networks) < len(paths):
        raise ValueError("folders of one name would name the same curve; rename one of the folders")
    return networks, datasets.pop()


def attacked(network: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Attacked images, and the loss of the target class at each step (steps, N).

    Shapes: x (N, 3, H, W) in [0, 1], y (N,).
    """
    torch.manual_seed(seed)  # the same targets and starts for all
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    found = [loss_curve(network, *batch, **PAPER, steps=steps) for batch in tqdm(batches, unit="batch")]
    return torch.cat([x_adv for _, x_adv in found]), torch.cat([losses.cpu() for losses, _ in found], 1)


def draw(args: argparse.Namespace) -> None:
    """Attack all networks alike, and write the page and its numbers."""
    networks, dataset = load(args.checkpoint)
    x, y = data.load("test", args.data_dir, dataset)
    limit = args.limit or -(-len(x) // 5)
    images, labels = data.to_float(x[:limit], args.device), y[:limit].to(args.device)
    shown = min(args.images, len(images))
    figure = plt.figure(figsize=(9, 1.35 * shown * len(networks) + 4), layout="constrained")
    parts = figure.subfigures(len(networks) + 1, 1, height_ratios=[1.35 * shown] * len(networks) + [4])
    curves = {}
    for part, (name, network) in zip(parts, networks.items(), strict=False):
        moved, curves[name] = attacked(network.to(args.device), images, labels, args.steps, args.seed)
        maps = dict(zip(("before", "after"), feature_maps(network, images[:shown], args.group), strict=True))
        after = feature_maps(network, moved[:shown], args.group)
        maps |= dict(zip(("before, attacked", "after, attacked"), after, strict=True))
        draw_maps(part, name, args.group, images[:shown], moved[:shown], maps)
    draw_curves(parts[-1], curves)
    figure.savefig(args.out, dpi=120)
    plt.close(figure)
    numbers = {
        name: {"mean": c.mean(1).tolist(), "std": c.std(1, correction=0).tolist()}
        for name, c in curves.items()
    }
    record = {"loss per step": numbers, "images": len(images), "seed": args.seed, **stamp()}
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {args.out}, {args.out.with_suffix('.json')}")


def main(argv: list[str] | None = None) -> None:
    """Draw as the command line says."""
    p = argparse.ArgumentParser(
        prog="python -m examples.paper figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("checkpoint", type=Path, nargs="+", help="checkpoint.pt of `train`")
    p.add_argument(
        "--data-dir", default="sample", help="a folder of parquet files, hub, or sample (default %(default)s)"
    )
    p.add_argument(
        "--limit", type=at_least(1), help="test images for Figure 3 (default: a fifth, as in the paper)"
    )
    p.add_argument("--steps", type=at_least(1), default=50, help="of the targeted PGD (default %(default)s)")
    p.add_argument(
        "--group", type=int, choices=range(1, 5), default=1, help="of Figure 1 (default %(default)s)"
    )
    p.add_argument("--images", type=at_least(1), default=3, help="of Figure 1 (default %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path, default=Path("figures.png"), help="default %(default)s")
    args = p.parse_args(argv)
    if missing := [str(c) for c in args.checkpoint if not c.exists()]:
        raise ValueError(f"no such file: {', '.join(missing)}; `train` writes checkpoint.pt into its --out")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with exact_float32():
        draw(args)
