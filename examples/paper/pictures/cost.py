"""What SPARTA costs, relative to ReLU, from the records of `python -m benchmarks.network --record`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from examples.paper.common.plotting import GRAY, SERIES, plt, save

COUNTS = {
    "parameters": "parameters",
    "multiply-adds of\na training step": "multiply-adds",
    "memory kept\nfor backward": "saved",
}
TIMES = {"training step,\ntime": "training", "gradient of the\ninput, time": "input grad"}
NAMES = {
    "resnet18 width 64": "ResNet-18",
    "torchvision-resnet18": "ResNet-18",
    "torchvision-resnet50": "ResNet-50",
}


class Ratio(NamedTuple):
    """A figure divided by that of ReLU; of several rounds the median, the lowest and the highest."""

    value: float
    low: float
    high: float


def read(folder: Path) -> dict[str, dict[str, Ratio]]:
    """By network, the ratios of what was measured. Raises `ValueError` if the folder has no record."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not records:
        raise ValueError(f"{folder} has no record; python -m benchmarks.network --record writes them")
    records.sort(key=lambda r: (r["size"], r["counts"]["relu"]["parameters"]))
    return {f"{NAMES.get(r['network'], r['network'])}, {r['size']} x {r['size']}": ratios(r) for r in records}


def ratios(record: dict[str, Any]) -> dict[str, Ratio]:
    """SPARTA divided by ReLU, by the rows of the figure; a time that was not measured is left out."""
    found = {}
    for row, key in COUNTS.items():
        value = record["counts"]["sparta"][key] / record["counts"]["relu"][key]
        found[row] = Ratio(value, value, value)
    for row, key in TIMES.items():
        if key in record["times"]:
            lap = record["times"][key]["sparta"]
            found[row] = Ratio(lap["ratio"], *lap["spread"])
    return found


def title(networks: Mapping[str, Mapping[str, Ratio]]) -> str:
    """What the figure shows of the time of a training step."""
    row = next(iter(TIMES))
    steps = [found[row].value for found in networks.values() if row in found]
    if not steps:
        return "What SPARTA costs; times are not measured"
    return (
        f"A training step with SPARTA takes {min(steps):.2f} to {max(steps):.2f} times as long as with ReLU"
    )


def draw(path: Path, folder: Path) -> None:
    """Draw the ratios of each network, with the range of the rounds."""
    networks, rows = read(folder), [*COUNTS, *TIMES]
    figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    for i, (name, found) in enumerate(networks.items()):
        color, marker, offset = SERIES[i % len(SERIES)], "osD^"[i % 4], 0.26 * (i - (len(networks) - 1) / 2)
        ax.plot([], [], marker, color=color, label=name)
        for y, row in enumerate(rows):
            _bar(ax, y + offset, found.get(row), color, marker)
    ax.axvline(1, color="0.3", lw=0.8)
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    ax.set_xlabel(
        "times ReLU; SPARTA at the end of each group, one CPU thread; whiskers: range of the rounds"
    )
    ax.set_xlim(0.96, ax.get_xlim()[1] + 0.03)
    ax.legend(fontsize=8.5, loc="upper right")
    ax.set_title(title(networks), fontsize=10)
    save(figure, path)


def _bar(ax: Axes, y: float, ratio: Ratio | None, color: str, marker: str) -> None:
    if ratio is None:
        ax.annotate(
            "not measured", (1, y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=GRAY
        )
        return
    value, low, high = ratio
    ax.plot((1, value), (y, y), color=color, lw=5, alpha=0.35, solid_capstyle="butt")
    if low < high:
        ax.plot((low, high), (y, y), "|-", color=color, lw=1)
    ax.plot(value, y, marker, color=color, markersize=4.5)
    ax.annotate(f"{value:.2f}", (high, y), (5, 0), textcoords="offset points", va="center", fontsize=8)
