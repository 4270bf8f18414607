"""How every picture looks, and how it is saved."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from examples.paper.common.atomic import atomic_write

DPI = 200
# Okabe and Ito's colors, which color-blind people can tell apart
BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
GRAY = "0.45"
SERIES = (BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, atomically, and close it."""
    with atomic_write(path) as scratch:
        figure.savefig(scratch, dpi=DPI, format="png")
    plt.close(figure)
