"""The quickstart's figure: what the attack adds, where SPARTA looks, how the loss moves."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.gridspec import GridSpec
from torch import Tensor, nn

from examples.paper.common.atomic import atomic_write
from examples.paper.common.gates import gate_inputs, gates


def site_scores(model: nn.Module, x: Tensor, site: int = 0) -> Tensor:
    """Score of each place at the network's `site`-th SPARTA. (Over the channels the gate's mean is flat.)

    Shapes: x (N, C, H, W) in [0, 1], result (N, H', W').
    """
    name, sparta = list(gates(model).items())[site]
    with torch.no_grad():
        return sparta.scores(gate_inputs(model, x)[name][0])[0][:, 0]


def score_maps(path: Path, model: nn.Module, x: Tensor) -> None:
    """Draw images x (N, 3, H, W) in [0, 1], a row each, and the scores of their places at each SPARTA.

    All on the scale from -3 to 3: where a place's score is positive, the gate lets through the channels whose
    own score is positive and holds back the others; where it is negative, the other way round.
    """
    columns = {"image": x.permute(0, 2, 3, 1)}
    columns |= {name: site_scores(model, x, i) for i, name in enumerate(gates(model))}
    size = (1.3 * len(columns) + 0.8, 1.3 * len(x) + 0.4)
    figure, axes = plt.subplots(len(x), len(columns), figsize=size, squeeze=False, layout="constrained")
    for j, (title, maps) in enumerate(columns.items()):
        axes[0, j].set_title(title, fontsize=9)
        for ax, image in zip(axes[:, j], maps, strict=True):
            drawn = ax.imshow(image.cpu(), cmap="RdBu_r", vmin=-3, vmax=3)
            ax.set_xticks([])
            ax.set_yticks([])
    figure.colorbar(drawn, ax=axes, label="score of the place", shrink=0.6)
    with atomic_write(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")
    plt.close(figure)


def overview(
    path: Path,
    *,
    clean: Tensor,
    attacked: Tensor,
    before: Tensor,
    after: Tensor,
    labels: list[str],
    curves: Mapping[str, Tensor],
) -> None:
    """Draw one page and write it to `path`; the titles say what the colors of the scores span.

    Shapes: clean, attacked (N, 3, H, W) in [0, 1]; before, after (N, H, W), scores of the places of each;
    every curve (steps, images), the losses of one network during one attack.
    """
    figure = plt.figure(figsize=(12, 1.25 * len(clean) + 0.5))
    grid = GridSpec(len(clean), 8, figure=figure, wspace=0.1, hspace=0.12)
    low, high = min(before.min(), after.min()), max(before.max(), after.max())
    change = (after - before).abs().max()
    columns = {
        "clean": clean.permute(0, 2, 3, 1),
        "perturbation": ((attacked - clean) / (2 * (attacked - clean).abs().max()) + 0.5).permute(0, 2, 3, 1),
        "attacked": attacked.permute(0, 2, 3, 1),
        f"score {low:.1f} to {high:.1f}": before,
        "score, attacked": after,
        f"change, ±{change:.2f}": after - before,
    }
    for j, (title, images) in enumerate(columns.items()):
        for i, image in enumerate(images):
            ax = figure.add_subplot(grid[i, j])
            if title.startswith("change"):
                ax.imshow(image.cpu(), cmap="RdBu_r", vmin=-change, vmax=change)
            else:
                ax.imshow(image.cpu(), cmap="viridis", vmin=low, vmax=high)
            ax.set_xticks([])
            ax.set_yticks([])
            if i == 0:
                ax.set_title(title, fontsize=9)
            if j == 0:
                ax.set_ylabel(labels[i], fontsize=8)
    ax = figure.add_subplot(grid[:, 6:])
    box = ax.get_position()
    ax.set_position((box.x0 + 0.045, box.y0, box.width - 0.03, box.height))
    for name, losses in curves.items():
        steps = torch.arange(len(losses))
        mean, error = losses.mean(1).cpu(), (losses.std(1) / losses.shape[1] ** 0.5).cpu()
        (line,) = ax.plot(steps, mean, label=name)
        ax.fill_between(steps, mean - 1.96 * error, mean + 1.96 * error, color=line.get_color(), alpha=0.2)
    ax.set_xlabel("PGD step")
    ax.set_title("loss of the attack's target class;\nlower: the attack succeeds", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=8)
    with atomic_write(path) as scratch:
        figure.savefig(scratch, dpi=110, bbox_inches="tight", format="png")
    plt.close(figure)
