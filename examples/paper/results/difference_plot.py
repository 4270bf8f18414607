"""A table as a picture: errors of its rows minus those of the first, and what seeds differ by."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from examples.paper.common.plotting import BLUE, GRAY, plt, save
from examples.paper.common.statistics import minus
from examples.paper.results.cells import ATTACKS, Result, Rows
from examples.paper.results.differences import pairs_with_first, picture
from examples.paper.results.queue import Queue, Table
from examples.paper.results.tables import rows_of

Pairs = Mapping[tuple[str, int], tuple[Result, Result]]  # by label and seed: a result, and what it is minus
MARKERS = "os^D"  # of seeds


def draw_all(queue: Queue, results: Path) -> None:
    """Write the pictures of the page into the folder of the results."""
    for table in queue.tables.values():
        rows = rows_of(queue, table, results)
        if name := picture(table, rows):
            _draw(table, rows, results / name)


def panel(ax: Axes, attack: str, pairs: Pairs) -> list[tuple[float, float]]:
    """Differences in points under one attack, a row for each label; returns them with their half widths."""
    labels, drawn = list(dict.fromkeys(label for label, _ in pairs)), []
    ax.axvline(0, color="0.3", linewidth=0.8)
    for (label, seed), (result, base) in pairs.items():
        if all(attack in r["errors"] for r in (result, base)):
            d, half = (100 * x for x in minus(result, base, attack))
            more = {"color": BLUE if abs(d) > half else GRAY, "mfc": None if abs(d) > half else "white"}
            y = labels.index(label) + 0.24 * seed
            ax.errorbar(d, y, xerr=half, fmt=MARKERS[seed % 4], markersize=4.5, capsize=2, **more)
            drawn.append((d, half))
    ax.set_yticks([i + 0.12 for i in range(len(labels))], labels)
    ax.set_ylim(len(labels) - 0.4, -0.4)
    ax.set_title(attack, fontsize=9)
    ax.set_xlabel("points of error; left is better", fontsize=8)
    ax.tick_params(labelsize=8)
    return drawn


def legend(seeds: set[int]) -> Iterator[Artist]:
    """What the marks of `panel` mean."""
    for seed in sorted(seeds):
        yield Line2D([], [], color="0.2", marker=MARKERS[seed % 4], ls="", label=f"seed {seed}")
    yield Line2D([], [], color=BLUE, marker="|", label="95% interval without 0")
    yield Line2D([], [], color=GRAY, marker="|", label="with 0 (noise)")


def _draw(table: Table, rows: Rows, path: Path) -> None:
    """A panel for each attack that the table's `figure` names, a point for each run."""
    pairs, (first, bases) = pairs_with_first(rows), rows[0]
    attacks = [ATTACKS.get(column, column) for column in table.figure or ()]
    count = len({label for label, _ in pairs})
    figure, axes = plt.subplots(
        1, len(attacks), figsize=(8, 1.6 + 0.32 * count), sharey=True, squeeze=False, layout="constrained"
    )
    drawn = []
    for ax, attack in zip(axes[0], attacks, strict=True):
        seeds = [100 * r["errors"][attack]["error"] for r in bases if attack in r["errors"]]
        if not (found := panel(ax, attack, pairs)):
            raise ValueError(f"table {table.number}: figure: no result has {attack!r}")
        spread, drawn = max(seeds) - min(seeds), drawn + found
        ax.axvspan(-spread, spread, color="0.9", linewidth=0, zorder=0)
    beyond = sum(abs(d) > half for d, half in drawn)
    figure.suptitle(
        f"Errors minus those of {first.label}: {beyond} of {len(drawn)} intervals, over images, exclude 0",
        fontsize=10,
    )
    between = Patch(color="0.9", label=f"{first.label}'s own seeds differ by this")
    handles = [*legend({seed for _, seed in pairs}), between]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7.5, frameon=False)
    save(figure, path)
