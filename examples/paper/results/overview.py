"""Where SPARTA looks: the scores of the places of an image, and their picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from examples.paper.attacks.pgd import attacking
from examples.paper.common.atomic import atomic_write
from sparta_act import Sparta


def site_scores(model: nn.Module, x: Tensor, site: int = 0) -> Tensor:
    """Score of each place at the network's `site`-th SPARTA. (Over the channels the gate's mean is flat.)

    Shapes: x (N, C, H, W) in [0, 1], result (N, H', W').
    """
    module = [m for m in model.modules() if isinstance(m, Sparta)][site]
    scores: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, inputs: scores.extend(m.scores(inputs[0])))
    try:
        with attacking(model), torch.no_grad():
            model(x)
    finally:
        handle.remove()
    return scores[0][:, 0]


def score_maps(path: Path, model: nn.Module, x: Tensor) -> None:
    """Draw images x (N, 3, H, W) in [0, 1], a row each, and the scores of their places at each SPARTA.

    All on the scale from -3 to 3: where a place's score is positive, the gate lets through the channels whose
    own score is positive and holds back the others; where it is negative, the other way round.
    """
    sites = [name for name, module in model.named_modules() if isinstance(module, Sparta)]
    columns = {"image": x.permute(0, 2, 3, 1)} | {n: site_scores(model, x, i) for i, n in enumerate(sites)}
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
