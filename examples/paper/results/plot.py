"""A table as a picture: by how much each row errs more or less than the first, beside what seeds do."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from examples.paper.common.atomic import atomic_write
from examples.paper.common.statistics import minus
from examples.paper.results.queue import Queue
from examples.paper.results.tables import ATTACKS, Rows, by_budget, held_against_first, picture


def draw_all(queue: Queue, results: Path) -> None:
    """Write the pictures that the page of the tables shows, beside the results."""
    for table in queue.tables:
        for budget, rows in by_budget(queue, table, results).items():
            if name := picture(table, budget, rows):
                _draw(table, rows, results / name)


def _draw(table: dict[str, Any], rows: Rows, path: Path) -> None:
    """A forest plot: a panel for each attack that the table's `figure` names, a point for each run."""
    pairs, (first, bases) = held_against_first(rows), rows[0]
    labels = list(dict.fromkeys(label for label, _ in pairs))
    attacks = [ATTACKS.get(column, column) for column in table["figure"]]
    size = (1.5 + 2.3 * len(attacks), 1.2 + 0.3 * len(labels))
    figure, axes = plt.subplots(
        1, len(attacks), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, attack in zip(axes[0], attacks, strict=True):
        known = {key: both for key, both in pairs.items() if all(attack in r["errors"] for r in both)}
        if not known:
            raise ValueError(f"table {table['number']} draws {attack!r}, which none of its results has")
        seeds = [100 * r["errors"][attack]["error"] for r in bases if attack in r["errors"]]
        spread = max(seeds) - min(seeds)
        ax.axvspan(-spread, spread, color="0.88", linewidth=0)
        ax.axvline(0, color="0.4", linewidth=0.8)
        for (label, seed), (result, twin) in known.items():
            d, half = minus(result, twin, attack)
            colour = "C0" if abs(d) > half else "0.55"
            place = labels.index(label) + 0.2 * seed
            ax.errorbar(100 * d, place, xerr=100 * half, fmt="o", color=colour, markersize=4, capsize=2)
        ax.set_title(attack, fontsize=9)
        ax.tick_params(labelsize=8)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].set_ylim(len(labels) - 0.3, -0.5)
    base = first["label"]
    figure.supxlabel(
        f"points, minus {base}; blue: more than the images' noise; grey: what {base}'s seeds differ by",
        fontsize=9,
    )
    with atomic_write(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")
    plt.close(figure)
