"""The paper's Figure 3: the loss of the attack's target class at each step of PGD."""

from collections.abc import Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from examples.paper.common.plotting import GRAY, SERIES, plt, save
from examples.paper.common.statistics import Z

Curves = Mapping[str, Mapping[str, list[float]]]


def numbers(curves: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the figure shows of losses (steps, images) of networks by name, attacked alike, for JSON.

    Mean and standard deviation over images at each step, and of the others' paired difference from the first
    network the mean and the half width of its 95% interval.
    """
    (_, base), *others = curves.items()
    minus = {name: losses - base for name, losses in others}
    return {
        "loss per step": {
            name: {"mean": c.mean(1).tolist(), "std": c.std(1, correction=0).tolist()}
            for name, c in curves.items()
        },
        "minus the first": {
            name: {
                "mean": d.mean(1).tolist(),
                "half": (Z * d.std(1, correction=0) / d.shape[1] ** 0.5).tolist(),
            }
            for name, d in minus.items()
        },
    }


def draw(path: Path, record: Mapping[str, Any]) -> None:
    """Draw `numbers`, with the number of `images` added."""
    curves, minus = record["loss per step"], record["minus the first"]
    figure = plt.figure(figsize=(8, 3.8), layout="constrained")
    left, *right = figure.subplots(
        1, 2 if minus else 1, width_ratios=(1.4, 1) if minus else (1,), squeeze=False
    )[0]
    _losses(left, curves)
    for ax in right:
        _differences(ax, minus, next(iter(curves)))
    figure.suptitle(title(record), fontsize=10)
    save(figure, path)


def title(record: Mapping[str, Any]) -> str:
    """What the figure shows at the last step."""
    curves, minus = record["loss per step"], record["minus the first"]
    steps = len(next(iter(curves.values()))["mean"])
    ends = ", ".join(f"to {curve['mean'][-1]:.2f} with {name}" for name, curve in curves.items())
    text = f"{steps - 1} steps of PGD lower the loss of their target class {ends}"
    first = next(iter(curves))
    for name, d in minus.items():
        text += (
            f"\n{name} minus {first}: {d['mean'][-1]:+.2f} ± {d['half'][-1]:.2f}, {record['images']:,} images"
        )
    return text


def _losses(ax: Axes, curves: Curves) -> None:
    for (name, curve), color, style in zip(
        curves.items(), cycle(SERIES), cycle(("-", "--", "-.")), strict=False
    ):
        steps = np.arange(len(curve["mean"]))
        mean, std = np.array(curve["mean"]), np.array(curve["std"])
        ax.plot(steps, mean, style, color=color, label=name)
        ax.plot(steps, np.stack((mean - std, mean + std), 1), color=color, lw=0.8, ls=":")
    ax.plot([], [], color=GRAY, lw=0.8, ls=":", label="± standard deviation\nover images")
    ax.set(xlabel="steps of PGD done", ylabel="loss of the target class (nats)")
    ax.legend(fontsize=8)


def _differences(ax: Axes, minus: Curves, first: str) -> None:
    ax.axhline(0, color=GRAY, lw=0.8)
    for (name, d), color in zip(minus.items(), islice(cycle(SERIES), 1, None), strict=False):
        steps = np.arange(len(d["mean"]))
        mean, half = np.array(d["mean"]), np.array(d["half"])
        ax.plot(steps, mean, color=color, label=f"{name} minus {first}")
        ax.fill_between(
            steps, mean - half, mean + half, color=color, alpha=0.25, lw=0, label="95% interval of the mean"
        )
    low, high = ax.get_ylim()
    widest = 2 * max(abs(low), abs(high))  # or a small difference would look large
    ax.set(xlabel="steps of PGD done", ylabel="difference of the losses (nats)", ylim=(-widest, widest))
    ax.legend(fontsize=8)
