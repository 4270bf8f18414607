"""Draw the paper's Figures 1 and 3 for networks of one data set.

  python -m examples.paper figures runs/w16-relu/checkpoint.pt runs/w16-sparta/checkpoint.pt --data DIR
  python -m examples.paper figures ReLU=FILE SPARTA=FILE --data DIR

Figure 1, feature-maps.png: feature maps before and after the last activation of a group, for clean and
attacked images. Figure 3, loss.png: the loss of the attack's target class at each step of PGD, a curve for
each network, and loss.json, its numbers. The attack succeeds where the loss falls.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import SubFigure
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks.pgd import attacking, classes_of, pgd_steps, random_targets
from examples.paper.common import data
from examples.paper.common.cli import at_least, check_device, seed
from examples.paper.common.console import stamp
from examples.paper.common.plotting import plt, save
from examples.paper.common.records import write_record
from examples.paper.common.tf32 import exact_float32
from examples.paper.evaluation import networks
from examples.paper.evaluation.measure import BATCH, PAPER
from examples.paper.pictures import loss


def feature_maps(model: nn.Module, x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Mean over channels before and after the last activation of a group, counted from 1.

    Shapes: x (N, 3, H, W) in [0, 1], results (N, H', W').
    """
    seen: list[Tensor] = []

    def before(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0].mean(1))

    def after(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append(output.mean(1))

    module = last_activation(model, group)
    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with attacking(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0].cpu(), seen[1].cpu()


def last_activation(model: nn.Module, group: int) -> nn.Module:
    """That of a group's last block. Raises `ValueError` for a network that is not built like ours."""
    try:
        return getattr(model, f"layer{group}")[-1].act2
    except (AttributeError, TypeError, IndexError):
        raise ValueError(
            f"Figure 1 shows layer{group}[-1].act2, which {type(model).__name__} lacks; give networks that "
            "`train` or `run` trained"
        ) from None


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
            drawn = axes[i, j].imshow(image.cpu().numpy(), cmap="magma", vmin=low, vmax=high)
            axes[i, j].set_xticks([])
            axes[i, j].set_yticks([])
        axes[0, j].set_title(title, fontsize=8)
    part.colorbar(drawn, ax=axes, shrink=0.6, aspect=30, label="mean over channels")
    part.suptitle(f"{name}: before and after the last activation of group {group}", fontsize=10)


def load(places: list[str]) -> tuple[dict[str, nn.Module], str | None]:
    """Networks by their names, and their data set. Raises `ValueError` unless it is one.

    A place is NAME=FILE, or a file, whose network has its short name.
    """
    files = [place.rpartition("=")[::2] for place in places]
    files = [(name or networks.short_name(path), path) for name, path in files]
    for name, _ in files:
        if len(twins := [path for n, path in files if n == name]) > 1:
            raise ValueError(
                f"two networks have the name {name}: {', '.join(twins)}; give others with NAME=FILE"
            )
    loaded = {name: networks.load(path) for name, path in files}
    if len(datasets := {str(dataset) for _, dataset, _ in loaded.values()}) > 1:
        raise ValueError(f"the networks are of {' and '.join(sorted(datasets))}; draw one data set at a time")
    return {name: network for name, (network, *_) in loaded.items()}, next(iter(loaded.values()))[1]


def attacked(network: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Attacked images, and the loss of the target class at each step (steps, N).

    Shapes: x (N, 3, H, W) in [0, 1], y (N,).
    """
    torch.manual_seed(seed)  # the same targets and starts for all
    batches, images, curves = list(zip(x.split(BATCH), y.split(BATCH), strict=True)), [], []
    with attacking(network):
        for some, labels in tqdm(batches, unit="batch"):
            targets = random_targets(labels, classes_of(network, some))
            run = [*pgd_steps(network, some, targets, **PAPER, steps=steps)]
            images.append(run[-1][0])
            curves.append(torch.stack([loss.cpu() for _, loss in run]))
    return torch.cat(images), torch.cat(curves, 1)


def draw(args: argparse.Namespace) -> None:
    """Attack all networks alike, and write the page and its numbers."""
    check_device(args.device)
    models, dataset = load(args.network)
    for network in models.values():
        last_activation(network, args.group)
    x, y = data.load("test", args.data_dir, dataset or "cifar10")
    limit = args.limit or -(-len(x) // 5)
    images, labels = data.to_float(x[:limit], args.device), y[:limit].to(args.device)
    shown = min(args.images, len(images))
    args.out.mkdir(parents=True, exist_ok=True)
    figure = plt.figure(figsize=(8, 1.35 * shown * len(models)), layout="constrained")
    parts = figure.subfigures(len(models), 1, squeeze=False)[:, 0]
    curves = {}
    for part, (name, network) in zip(parts, models.items(), strict=True):
        moved, curves[name] = attacked(network.to(args.device), images, labels, args.steps, args.seed)
        maps = dict(zip(("before", "after"), feature_maps(network, images[:shown], args.group), strict=True))
        after = feature_maps(network, moved[:shown], args.group)
        maps |= dict(zip(("before, attacked", "after, attacked"), after, strict=True))
        draw_maps(part, name, args.group, images[:shown], moved[:shown], maps)
    save(figure, args.out / "feature-maps.png")
    record = {**loss.numbers(curves), "images": len(images), "seed": args.seed, **stamp()}
    write_record(args.out / "loss.json", record)
    loss.draw(args.out / "loss.png", record)
    print(f"written: feature-maps.png, loss.png and loss.json in {args.out}")


def main(argv: list[str] | None = None) -> None:
    """Draw as the command line says."""
    p = argparse.ArgumentParser(
        prog="python -m examples.paper figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("network", nargs="+", help=f"NAME=FILE or FILE; {networks.NAMES}")
    p.add_argument(
        "--data",
        dest="data_dir",
        default="sample",
        help="a folder of parquet files, hub, or sample (default %(default)s)",
    )
    p.add_argument(
        "--limit", type=at_least(1), help="test images for Figure 3 (default: a fifth, as in the paper)"
    )
    p.add_argument("--steps", type=at_least(1), default=50, help="of the targeted PGD (default %(default)s)")
    p.add_argument(
        "--group", type=int, choices=range(1, 5), default=1, help="of Figure 1 (default %(default)s)"
    )
    p.add_argument("--images", type=at_least(1), default=3, help="of Figure 1 (default %(default)s)")
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path, default=Path("figures"), help="folder (default %(default)s)")
    args = p.parse_args(argv)
    with exact_float32():
        draw(args)
