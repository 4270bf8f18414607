"""The gate of a network on some images, on its whole scale from 0 to 1."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from torch import Tensor, nn

from examples.paper.common.gates import activations_of, gate_inputs
from examples.paper.common.plotting import BLUE, plt, save
from examples.paper.training.gate_statistics import gate_statistics
from sparta_act import Sparta


def typical_gate(sparta: Sparta, x: Tensor) -> Tensor:
    """Gate of one channel of each image, whose score c is nearest to c's root mean square, |gain|.

    Shapes: x (N, C, H, W), result (N, H, W), from 0 to 1.
    """
    c = sparta.scores(x)[1].flatten(1)
    channel = (c - sparta.gain.abs()).abs().argmin(1)
    return sparta.attention(x)[torch.arange(len(x)), channel] / sparta.scale


def active_gates(sparta: Sparta, x: Tensor) -> Tensor:
    """Gate of the elements of x (N, C, H, W) that are above 0. Shape: (elements,), from 0 to 1."""
    return sparta.attention(x)[x > 0] / sparta.scale


@torch.no_grad()
def draw(path: Path, model: nn.Module, x: Tensor, shown: int) -> None:
    """Draw a typical gate at each site for the first images x (N, 3, H, W), and a histogram of all gates."""
    statistics, inputs, sites = gate_statistics(model, x), gate_inputs(model, x), activations_of(model)
    figure = plt.figure(figsize=(8, 1.17 * shown + 2.2), layout="constrained")
    axes = figure.subplots(shown + 1, len(sites) + 1)
    _images(axes[:-1, 0], "image", x.permute(0, 2, 3, 1))
    axes[-1, 0].set_axis_off()
    axes[-1, 0].text(0.5, 0.5, f"all active\nelements of\n{len(x)} images", ha="center", va="center")
    for column, (label, sparta), (name, (site,)) in zip(
        axes.T[1:], sites.items(), inputs.items(), strict=True
    ):
        drawn = _images(column[:-1], f"gate at {label}", typical_gate(sparta, site[:shown]))
        _histogram(column[-1], active_gates(sparta, site), statistics[name])
    axes[-1, 1].set_ylabel("% of elements", fontsize=8)
    for ax in axes[-1, 2:]:
        ax.sharey(axes[-1, 1])
        ax.tick_params(labelleft=False)
    bar = figure.colorbar(drawn, ax=axes[:-1], ticks=(0, 0.5, 1), shrink=0.7, aspect=25)
    bar.ax.set_yticklabels(["0, closed", "0.5", "1, ReLU"])
    bar.set_label("gate of a channel of typical score", fontsize=9)
    deviations = " / ".join(f"{statistics[n]['std']:.2f}" for n in inputs)
    least = min(statistics[n]["spatial"] for n in inputs)
    figure.suptitle(
        f"At least {least:.0%} of the gate's variance is over places; its standard deviation is\n"
        f"{deviations} from the first site to the last",
        fontsize=10,
    )
    save(figure, path)


def _images(axes: Iterable[Axes], title: str, images: Tensor) -> AxesImage:
    """A column of images (N, H, W, 3), or maps (N, H, W) on the scale from 0 to 1."""
    for i, (ax, image) in enumerate(zip(axes, images, strict=False)):
        drawn = ax.imshow(image.numpy(), cmap="RdBu_r", vmin=0, vmax=1)
        ax.set(xticks=(), yticks=())
        if i == 0:
            ax.set_title(title, fontsize=9)
    return drawn


def _histogram(ax: Axes, gates: Tensor, numbers: Mapping[str, float]) -> None:
    """Share of gates (elements,) in each of 40 bins."""
    counts = torch.histc(gates, 40, 0, 1)
    ax.stairs((100 * counts / counts.sum()).numpy(), np.linspace(0, 1, 41), fill=True, color=BLUE)
    ax.set(xlim=(0, 1), ylim=(0, None), xticks=(0, 0.5, 1))
    ax.set_xlabel("gate", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.set_title(f"std {numbers['std']:.2f}; {numbers['spatial']:.0%} of\nvariance over places", fontsize=8)
