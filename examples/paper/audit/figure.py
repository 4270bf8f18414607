"""The figure of an audit: the error under each attack, the loss along PGD, and the gate."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from examples.paper.audit import attacks as a
from examples.paper.audit.store import Store
from examples.paper.audit.verdicts import FAIL, PASS
from examples.paper.common.plotting import BLUE, GREEN, ORANGE, SERIES, VERMILION, plt, save


def draw(path: Path, record: Mapping[str, Any], store: Store) -> None:
    """Write the figure as a PNG; `record` is the content of audit.json."""
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.2])
    _attacks(left.subplots(), record)
    (steps, loss), (eps, gate) = right.subplots(2, 2)
    _steps(steps, record, store)
    _loss(loss, record, store)
    _eps(eps, record)
    _gate(gate, store)
    worst, plain = (100 * e["error"] for e in (record["worst case"], record["attacks"][a.PLAIN]))
    passed = sum(row["verdict"] == PASS for row in record["checks"])
    failed = [str(row["number"]) for row in record["checks"] if row["verdict"] == FAIL]
    figure.suptitle(
        f"{Path(record.get('network', 'network')).name}: {worst:.1f}% wrong in the worst case within "
        f"{255 * record['eps']:.3g}/255, {plain:.1f}% under plain PGD; "
        + (
            f"FAIL: checks {', '.join(failed)}"
            if failed
            else f"{passed} of {len(record['checks'])} checks pass"
        ),
        fontsize=11,
    )
    save(figure, path)


def _attacks(ax: Axes, record: Mapping[str, Any]) -> None:
    """Error under each attack, the worst case as a line."""
    others = (*a.SMALLER_EPS, *a.LARGER_EPS, a.AT_LARGEST, a.SQUARE)  # at another eps, or on some images only
    within = {n: e for n, e in record["attacks"].items() if n not in others}
    names = sorted(within, key=lambda n: within[n]["error"])
    errors, low, high = (np.array([100 * within[n][k] for n in names]) for k in ("error", "low", "high"))
    bars = np.stack((errors - low, high - errors)).clip(min=0)
    colors = [ORANGE if n == a.PLAIN else BLUE for n in names]
    ax.barh(names, errors, xerr=bars, color=colors, error_kw={"elinewidth": 0.8})
    ax.axvline(100 * record["worst case"]["error"], color=VERMILION, label="worst case over all")
    ax.set_xlim(0, 100)
    ax.set_ylim(-2.6, len(names) - 0.4)  # room for the legend
    ax.set_xlabel("% of images wrong, 95% intervals")
    ax.set_title("attacks within eps, on all images", fontsize=9)
    ax.tick_params(labelsize=8)
    plain = Patch(color=ORANGE, label=f"plain {a.PLAIN}")
    ax.legend(handles=[*ax.get_legend_handles_labels()[0], plain], fontsize=8, loc="lower right")


def _steps(ax: Axes, record: Mapping[str, Any], store: Store) -> None:
    """Error of the plain attack after each step."""
    at, last = torch.tensor(store.numbers["broken at step"]), 2 * record["budget"]["steps"]
    shares = [100 * ((at >= 0) & (at <= k)).float().mean().item() for k in range(last + 1)]
    ax.plot(shares, color=BLUE, label="PGD")
    for name, color in ((a.FGSM, GREEN), (a.NOISE, "0.5"), (a.CLEAN, "black")):
        ax.axhline(100 * record["attacks"][name]["error"], ls=":", color=color, label=name)
    ax.axvline(record["budget"]["steps"], color=ORANGE, lw=0.8, label="steps of plain PGD")
    ax.set(xlabel="PGD step", ylabel="% of images wrong")
    ax.set_title("error by step (checks 1, 2)", fontsize=9)
    ax.legend(fontsize=7)


def _loss(ax: Axes, record: Mapping[str, Any], store: Store) -> None:
    """Mean loss at each step."""
    ax.plot(store.numbers["loss curve"]["mean"], color=BLUE)
    ax.axvline(record["budget"]["steps"], color=ORANGE, lw=0.8)
    ax.set(xlabel="PGD step", ylabel="mean loss of the true class")
    ax.set_title(f"loss by step, {len(store.numbers['loss curve']['rise'])} images (check 2)", fontsize=9)


def _eps(ax: Axes, record: Mapping[str, Any]) -> None:
    """Error against eps."""
    shares = {
        a.CLEAN: 0.0,
        a.PLAIN: 1.0,
        **a.SMALLER_EPS,
        **a.LARGER_EPS,
        a.AT_LARGEST: a.LARGEST / record["eps"],
    }
    names = sorted((n for n in shares if n in record["attacks"]), key=shares.__getitem__)
    ax.plot(
        [255 * record["eps"] * shares[n] for n in names],
        [100 * record["attacks"][n]["error"] for n in names],
        color=BLUE,
        marker="o",
    )
    ax.set_xscale("symlog", linthresh=1)
    ax.set_ylim(0, 103)
    ax.set(xlabel="eps in 1/255, logarithmic above 1", ylabel="% of images wrong")
    ax.set_title("error by eps (check 4)", fontsize=9)


def _gate(ax: Axes, store: Store) -> None:
    """Values of each site's gate."""
    for (site, g), color in zip(store.numbers["gate"].items(), cycle(SERIES), strict=False):
        counts = np.array(g["histogram"])
        ax.stairs(100 * counts / counts.sum(), np.linspace(0, 1, len(counts) + 1), color=color, label=site)
    ax.set(xlabel="gate", ylabel="% of values")
    ax.set_title("values of each site's gate (check 11)", fontsize=9)
    if store.numbers["gate"]:
        ax.legend(fontsize=7)
    else:
        ax.text(0.5, 0.5, "no SPARTA", ha="center", transform=ax.transAxes)
