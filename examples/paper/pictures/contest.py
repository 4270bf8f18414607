"""The registered contest as a picture: differences of SPARTA and its controls, and what a win would be."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from examples.paper.common.plotting import BLUE, GRAY, GREEN, plt, save
from examples.paper.common.statistics import pair_of, paired
from examples.paper.evaluation.protocols import WORST
from examples.paper.results.differences import Pairs, pairs_with_first
from examples.paper.results.queue import Queue
from examples.paper.results.tables import rows_of

TABLE, CLEAN, ATTACKED = "gate, slim", "clean", WORST
WIN = 2  # points under attack, in every seed: registered on 2026-11-28
MARKERS = "os^D"  # of seeds


def comparisons(queue: Queue, results: Path) -> Pairs:
    """Each measured network and what it is compared with: ReLU and the constant, in this order."""
    table = queue.tables[TABLE]
    rows, found = rows_of(queue, table, results), {}
    for base in (rows[0][0].label, table.against):
        for (label, seed), pair in pairs_with_first(sorted(rows, key=lambda r: r[0].label != base)).items():
            if label != rows[0][0].label:
                found[f"{label}\nminus {base}", seed] = pair
    return found


def wins(pairs: Pairs) -> list[str]:
    """Comparisons that are a win: fewer errors under attack by more than `WIN` points in every seed."""
    labels = dict.fromkeys(label for label, _ in pairs)
    won = {key: 100 * paired(pair_of(*pair, ATTACKED)).value < -WIN for key, pair in pairs.items()}
    return [label for label in labels if all(w for (name, _), w in won.items() if name == label)]


def draw(path: Path, queue: Queue, results: Path) -> None:
    """Draw what is measured. Raises `ValueError` if nothing is."""
    if not (pairs := comparisons(queue, results)):
        raise ValueError(f"{results} has no results of the table {TABLE!r}; `run` files them")
    count = len({label for label, _ in pairs})
    figure, axes = plt.subplots(
        1, 2, figsize=(8, 1.5 + 0.5 * count), sharey=True, sharex=True, layout="constrained"
    )
    for ax, attack in zip(axes, (CLEAN, ATTACKED), strict=True):
        _panel(ax, attack, pairs)
    low, high = axes[1].get_xlim()
    axes[1].set_xlim(min(low, -WIN - 1), high)
    axes[1].axvspan(-100, -WIN, color=GREEN, alpha=0.15, lw=0, zorder=0)
    won = [label.replace("\n", " ") for label in wins(pairs)]
    figure.suptitle(
        (f"A win: {'; '.join(won)}" if won else "No network wins")
        + f": a win is more than {WIN} points fewer errors under attack, in both seeds",
        fontsize=10,
    )
    handles = [
        *_legend({seed for _, seed in pairs}),
        Patch(color=GREEN, alpha=0.15, label="a win, if both seeds"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    save(figure, path)


def _panel(ax: Axes, attack: str, pairs: Pairs) -> None:
    """Differences in points under one attack with their intervals, a row for each label."""
    labels = list(dict.fromkeys(label for label, _ in pairs))
    ax.axvline(0, color="0.3", linewidth=0.8)
    for (label, seed), pair in pairs.items():
        value, low, high = (100 * share for share in paired(pair_of(*pair, attack)))
        beyond = not low <= 0 <= high
        ax.errorbar(
            value,
            labels.index(label) + 0.24 * seed,
            xerr=[[value - low], [high - value]],
            fmt=MARKERS[seed % 4],
            markersize=4.5,
            capsize=2,
            color=BLUE if beyond else GRAY,
            mfc=None if beyond else "white",
        )
    ax.set_yticks([i + 0.12 for i in range(len(labels))], labels)
    ax.set_ylim(len(labels) - 0.4, -0.4)
    ax.set_title(attack, fontsize=9)
    ax.set_xlabel("points of error; left is better", fontsize=8)
    ax.tick_params(labelsize=8)


def _legend(seeds: set[int]) -> Iterator[Artist]:
    """What the marks of `_panel` mean."""
    for seed in sorted(seeds):
        yield Line2D([], [], color="0.2", marker=MARKERS[seed % 4], ls="", label=f"seed {seed}")
    yield Line2D([], [], color=BLUE, marker="|", label="95% interval over images, without 0")
    yield Line2D([], [], color=GRAY, marker="|", label="with 0")
