"""The registered contest as a picture: differences of SPARTA and its controls, and what a win would be."""

from pathlib import Path

from matplotlib.patches import Patch

from examples.paper.common.plotting import GREEN, plt, save
from examples.paper.common.statistics import minus
from examples.paper.results.difference_plot import Pairs, legend, panel
from examples.paper.results.differences import pairs_with_first
from examples.paper.results.queue import Queue
from examples.paper.results.tables import rows_of

TABLE, CLEAN, ATTACKED = "gate, slim", "clean", "worst case, 8/255"
WIN = 2  # points under attack, in every seed: registered on 2026-11-28


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
    won = {key: 100 * minus(*pair, ATTACKED)[0] < -WIN for key, pair in pairs.items()}
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
        panel(ax, attack, pairs)
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
        *legend({seed for _, seed in pairs}),
        Patch(color=GREEN, alpha=0.15, label="a win, if both seeds"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    save(figure, path)
