"""The paper's Figures 1 and 3 for any checkpoints: `python examples/figures.py runs/*/checkpoint.pt`.

Figure 1: feature maps before and after the last activation of a group, for clean and attacked images.
Figure 3: loss of the attack's target at each step of PGD, a curve for each network; falling, the attack wins.
The numbers of the curves are written beside the figure, as JSON.
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
from examples.paper.common.cli import at_least, plain_errors
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
        f"{name}: mean over channels at the end of group {group}, colours {low:.2f} to {high:.2f}", fontsize=9
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


def draw(args: argparse.Namespace) -> None:
    """Attack all networks alike, and write the page and its numbers. Raises `ValueError` for unlike ones."""
    networks, datasets = {}, set()
    for path in args.checkpoint:
        networks[path.parent.name], settings = load_trained(path)
        datasets.add(settings["dataset"])
    if len(datasets) > 1:
        raise ValueError(
            f"the checkpoints are of {' and '.join(sorted(datasets))}; draw one data set at a time"
        )
    if len(networks) < len(args.checkpoint):
        raise ValueError("two checkpoints lie in folders of one name, which names their curves; rename one")
    x, y = data.load("test", args.data_dir, datasets.pop())
    limit = args.limit or -(-len(x) // 5)
    images, labels = data.to_float(x[:limit], args.device), y[:limit].to(args.device)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    shown = min(args.images, len(images))
    figure = plt.figure(figsize=(9, 1.35 * shown * len(networks) + 4), layout="constrained")
    parts = figure.subfigures(len(networks) + 1, 1, height_ratios=[1.35 * shown] * len(networks) + [4])
    curves, numbers = {}, {}
    for part, (name, network) in zip(parts, networks.items(), strict=False):
        network.to(args.device)
        torch.manual_seed(args.seed)  # the same targets and starts for all
        losses, attacked = [], []
        for few, goal in tqdm(batches, desc=name, unit="batch"):
            loss, x_adv = loss_curve(network, few, goal, **PAPER, steps=args.steps)
            losses.append(loss.cpu())
            attacked.append(x_adv)
        curves[name], moved = torch.cat(losses, 1), torch.cat(attacked)[:shown]
        numbers[name] = {
            "mean": curves[name].mean(1).tolist(),
            "std": curves[name].std(1, correction=0).tolist(),
        }
        before, after = feature_maps(network, images[:shown], args.group)
        moved_before, moved_after = feature_maps(network, moved, args.group)
        maps = {
            "before": before,
            "after": after,
            "before, attacked": moved_before,
            "after, attacked": moved_after,
        }
        draw_maps(part, name, args.group, images[:shown], moved, maps)
    draw_curves(parts[-1], curves)
    figure.savefig(args.out, dpi=120)
    plt.close(figure)
    record = {"loss per step": numbers, "images": len(images), "seed": args.seed, **stamp()}
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {args.out}, {args.out.with_suffix('.json')}")


def main(argv: list[str] | None = None) -> None:
    """Draw as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path, nargs="+", help="checkpoint.pt of train.py, of one data set")
    p.add_argument("--data-dir", default="sample", help="as in evaluate.py (default %(default)s)")
    p.add_argument(
        "--limit",
        type=at_least(1),
        help="of the test images for Figure 3 (default: a fifth, as in the paper)",
    )
    p.add_argument("--steps", type=at_least(1), default=50, help="of the targeted PGD (default %(default)s)")
    p.add_argument(
        "--group", type=int, choices=range(1, 5), default=1, help="of Figure 1 (default %(default)s)"
    )
    p.add_argument("--images", type=at_least(1), default=3, help="of Figure 1 (default %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--out", type=Path, default=Path("figures.png"), help="numbers go beside it (default %(default)s)"
    )
    args = p.parse_args(argv)
    if missing := [str(c) for c in args.checkpoint if not c.exists()]:
        raise SystemExit(f"there is no {', '.join(missing)}; train.py writes checkpoint.pt into its --out")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with exact_float32():
        draw(args)


if __name__ == "__main__":
    with plain_errors():
        main()
