"""Maps of the scores of places at each SPARTA of a network."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from examples.paper.common.atomic import atomic_write
from examples.paper.common.gates import gate_inputs, gates


def site_scores(model: nn.Module, x: Tensor, site: int = 0) -> Tensor:
    """Score of each place at the `site`-th SPARTA of a network.

    Shapes: x (N, C, H, W) in [0, 1], result (N, H', W').
    """
    name, sparta = list(gates(model).items())[site]
    with torch.no_grad():
        return sparta.scores(gate_inputs(model, x)[name][0])[0][:, 0]


def score_maps(path: Path, model: nn.Module, x: Tensor) -> None:
    """Draw images x (N, 3, H, W) in [0, 1], a row each, and the scores of their places at each SPARTA.

    The scale is -3 to 3. Where the score is positive, the gate lets through the channels with a positive
    score and holds back the others; where it is negative, the other way round.
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
