"""The figure of an audit: the error under each attack, the loss along PGD, gradients, gates and verdicts."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from examples.paper.audit import attacks as a
from examples.paper.audit.store import Store
from examples.paper.audit.tolerances import ASTRAY, JUMP, JUMPS
from examples.paper.audit.verdicts import FAIL, NO_GATE, PASS, SUSPECT, UNKNOWN, numbers_of
from examples.paper.common.plotting import BLUE, GREEN, ORANGE, PURPLE, SERIES, VERMILION, plt, save

KINDS = {  # of the attacks: a color, and which they are
    "plain PGD": (ORANGE, lambda n: n == a.PLAIN),
    "without this network's gradient": (GREEN, lambda n: n.startswith((a.TRANSFER, a.NOISE, a.CLEAN))),
    "adaptive: around gates, through surrogates, of noisy copies, in float64": (
        PURPLE,
        lambda n: n in (*a.ADAPTIVE, *a.AROUND, a.NOISY, a.FLOAT64) or n.startswith(a.THROUGH),
    ),
    "other attacks that follow its gradient": (BLUE, lambda n: True),
}
COLORS = {PASS: GREEN, FAIL: VERMILION, SUSPECT: ORANGE, UNKNOWN: "0.75", NO_GATE: "0.9"}  # of verdicts


def draw(path: Path, record: Mapping[str, Any], store: Store) -> None:
    """Write the figure as a PNG; `record` is the content of audit.json."""
    figure = plt.figure(figsize=(11, 9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.2])
    _attacks(left.subplots(), record)
    (steps, loss), (eps, ways), (gate, verdicts) = right.subplots(3, 2)
    _steps(steps, record, store)
    _loss(loss, record, store)
    _eps(eps, record)
    _ways(ways, store)
    _gate(gate, store)
    _verdicts(verdicts, record)
    worst, plain = (100 * e["error"] for e in (record["worst case"], record["attacks"][a.PLAIN]))
    numbers = numbers_of(record)
    judged = "; ".join(f"{v}: {', '.join(map(str, numbers[v]))}" for v in (FAIL, SUSPECT) if numbers[v])
    figure.suptitle(
        f"{Path(record.get('network', 'network')).name}: {worst:.1f}% wrong in the worst case within "
        f"{255 * record['eps']:.3g}/255, {plain:.1f}% under plain PGD; {judged or 'no check fails'}",
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
    kinds = {n: next(kind for kind, (_, holds) in KINDS.items() if holds(n)) for n in names}
    colors = [KINDS[kinds[n]][0] for n in names]
    ax.barh(names, errors, xerr=bars, color=colors, error_kw={"elinewidth": 0.8})
    ax.axvline(100 * record["worst case"]["error"], color=VERMILION, label="worst case over all attacks")
    ax.set_xlim(0, 100)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlabel("% of images wrong, 95% intervals")
    ax.set_title("attacks within eps, on all images", fontsize=9)
    ax.tick_params(labelsize=8)
    shown = [Patch(color=color, label=kind) for kind, (color, _) in KINDS.items() if kind in kinds.values()]
    ax.figure.legend(
        handles=[*ax.get_legend_handles_labels()[0], *shown], fontsize=8, loc="outside lower center", ncols=1
    )


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


def _ways(ax: Axes, store: Store) -> None:
    """How far the gradient's sum along ways is from the rise, image by image."""
    edges = np.linspace(0, 1, 21)
    names = {"along random ways": BLUE, "along the attack": VERMILION}
    for name, color in names.items():
        errors = np.nan_to_num(np.array(store.numbers[name], dtype=float), nan=1.0).clip(0, 1)
        counts, _ = np.histogram(errors, edges)
        ax.stairs(100 * counts / max(len(errors), 1), edges, color=color, label=name)
    ax.axvline(ASTRAY, color=BLUE, ls=":", lw=0.8, label=f"half of the random ways may be above {ASTRAY}")
    ax.axvline(JUMP, color=VERMILION, ls=":", lw=0.8, label=f"{JUMPS:.0%} of the attack's above {JUMP}")
    ax.set(xlabel="part of the rise that is missed", ylabel="% of images", xlim=(-0.02, 1.02), ylim=(0, 165))
    ax.set_yticks(range(0, 101, 20))
    ax.set_title("gradient against rise (check 12)", fontsize=9)
    ax.legend(fontsize=6.5, loc="upper right")


def _verdicts(ax: Axes, record: Mapping[str, Any]) -> None:
    """One square for each check."""
    for row in record["checks"]:
        x, y = (row["number"] - 1) % 4, 2 - (row["number"] - 1) // 4
        ax.add_patch(Rectangle((x, y), 0.92, 0.92, color=COLORS[row["verdict"]]))
        ax.text(x + 0.46, y + 0.46, str(row["number"]), ha="center", va="center", fontsize=9)
    ax.set(xlim=(0, 4), ylim=(0, 3))
    ax.axis("off")
    ax.set_title("verdict of each check", fontsize=9)
    handles = [Patch(color=color, label=verdict) for verdict, color in COLORS.items()]
    ax.legend(handles=handles, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3)


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
