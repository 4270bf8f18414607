"""A table as a picture: errors of its rows minus those of the first, and what seeds differ by."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from examples.paper.common.atomic import atomic_write
from examples.paper.common.statistics import minus
from examples.paper.results.cells import ATTACKS, Rows
from examples.paper.results.differences import pairs_with_first, picture
from examples.paper.results.queue import Queue, Table
from examples.paper.results.tables import rows_of


def draw_all(queue: Queue, results: Path) -> None:
    """Write the pictures of the page into the folder of the results."""
    for table in queue.tables.values():
        rows = rows_of(queue, table, results)
        if name := picture(table, rows):
            _draw(table, rows, results / name)


def _draw(table: Table, rows: Rows, path: Path) -> None:
    """A panel for each attack that the table's `figure` names, a point for each run."""
    pairs, (first, bases) = pairs_with_first(rows), rows[0]
    labels = list(dict.fromkeys(label for label, _ in pairs))
    attacks = [ATTACKS.get(column, column) for column in table.figure or ()]
    size = (1.5 + 2.3 * len(attacks), 1.2 + 0.3 * len(labels))
    figure, axes = plt.subplots(
        1, len(attacks), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, attack in zip(axes[0], attacks, strict=True):
        known = {key: both for key, both in pairs.items() if all(attack in r["errors"] for r in both)}
        if not known:
            raise ValueError(f"table {table.number}: figure: no result has {attack!r}")
        seeds = [100 * r["errors"][attack]["error"] for r in bases if attack in r["errors"]]
        spread = max(seeds) - min(seeds)
        ax.axvspan(-spread, spread, color="0.88", linewidth=0)
        ax.axvline(0, color="0.4", linewidth=0.8)
        for (label, seed), (result, base) in known.items():
            d, half = minus(result, base, attack)
            color = "C0" if abs(d) > half else "0.55"
            place = labels.index(label) + 0.2 * seed
            ax.errorbar(100 * d, place, xerr=100 * half, fmt="o", color=color, markersize=4, capsize=2)
        ax.set_title(attack, fontsize=9)
        ax.tick_params(labelsize=8)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].set_ylim(len(labels) - 0.3, -0.5)
    name = first.label
    figure.supxlabel(
        f"points, minus {name}; blue: zero is outside the interval; gray: range of {name}'s seeds",
        fontsize=9,
    )
    with atomic_write(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")
    plt.close(figure)
