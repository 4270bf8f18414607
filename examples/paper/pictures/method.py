"""A diagram of the activation, and of where it is in a residual block."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from examples.paper.common.plotting import GRAY, plt, save

PLACES, CHANNELS, PREDICTED = "#cfe3f1", "#fbe0c8", "#cdeadf"  # fills of phi_s, phi_c and conv6
PLAIN, TENSOR, SPARTA = "#ececec", "white", "#f6c9a8"
SKIP, S, MIDDLE, C, BLOCK = 88, 71, 52, 33, 3  # heights of the rows


def draw(path: Path) -> None:
    """Write the diagram."""
    save(diagram(), path)


def diagram() -> Figure:
    """The diagram."""
    figure = plt.figure(figsize=(8, 5.4))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 160), ylim=(-5, 103))
    ax.set_axis_off()
    ax.text(2, 99.5, r"SPARTA: $\max(X,0)\times\sigma(s\times c)$", fontsize=11, va="center")
    text = "a ReLU whose outputs are scaled by a gate computed from the whole feature map"
    _text(ax, 50, 99.5, text, va="center")
    _inputs(ax)
    _places(ax)
    _channels(ax)
    _gate(ax)
    _block(ax)
    return figure


def _inputs(ax: Axes) -> None:
    _box(ax, 2, S, 15, "$X$\nC x H x W", TENSOR)
    _arrow(ax, (9.5, S + 5), (9.5, SKIP), (23, SKIP))
    _box(ax, 23, SKIP, 17, "$\\max(X,0)$", PLAIN)
    _arrow(ax, (9.5, S - 5), (9.5, MIDDLE + 5))
    _box(ax, 2, MIDDLE, 15, "average\nto 3 x 3", PLAIN)


def _places(ax: Axes) -> None:
    """phi_s: conv3, ReLU, conv4, and conv5 with the kernel that conv6 predicts."""
    _chain(ax, 17, S, [(23, 17, "conv3\nC to h"), (44, 11, "ReLU"), (59, 17, "conv4\nh to 1")], PLACES)
    _arrow(ax, (76, S), (80, S))
    _box(ax, 80, S, 17, "conv5\n1 to 1", PREDICTED)
    _chain(ax, 97, S, [(101, 21, "normalize\nover places")], PLAIN)
    _text(ax, 23, S + 7.2, r"$\varphi_s$: one score for each place", color="0.25")
    _chain(ax, 17, MIDDLE, [(44, 17, "conv6\nC to 1")], PREDICTED)
    _arrow(ax, (61, MIDDLE), (88.5, MIDDLE), (88.5, S - 5))
    _text(ax, 63, MIDDLE + 1.4, "its kernel,\none for each image", color="0.25")


def _channels(ax: Axes) -> None:
    """phi_c: conv1, ReLU, conv2 on the same average."""
    _arrow(ax, (9.5, MIDDLE - 5), (9.5, C), (23, C))
    _box(ax, 23, C, 17, "conv1\nC to h", CHANNELS)
    _chain(ax, 40, C, [(44, 11, "ReLU"), (59, 17, "conv2\nh to C")], CHANNELS)
    _chain(ax, 76, C, [(80, 21, "normalize\nover channels"), (105, 17, "times gain\n(learned)")], PLAIN)
    text = (
        r"$\varphi_c$: one score for each channel (conv2 has no padding: 3 x 3 become 1 x 1)."
        "\nEvery convolution is 3 x 3; h = C / 8, at least 8, at most 32."
    )
    _text(ax, 23, C - 6.6, text, color="0.25", va="top")


def _gate(ax: Axes) -> None:
    """Product of the scores, sigmoid, product with max(X, 0)."""
    _arrow(ax, (122, S), (130, S), (130, MIDDLE + 3))
    _arrow(ax, (122, C), (130, C), (130, MIDDLE - 3))
    _text(ax, 131.5, S - 3.5, "$s$\n1 x H x W", va="top")
    _text(ax, 131.5, C + 3.5, "$c$\nC x 1 x 1", va="bottom")
    _product(ax, 130, MIDDLE)
    _arrow(ax, (133, MIDDLE), (137, MIDDLE))
    _box(ax, 137, MIDDLE, 18, "$\\sigma$: gate\nC x H x W", PLAIN)
    _arrow(ax, (146, MIDDLE + 5), (146, SKIP - 3))
    _arrow(ax, (40, SKIP), (143, SKIP))
    _product(ax, 146, SKIP)
    _arrow(ax, (149, SKIP), (159, SKIP))
    _text(ax, 150, SKIP + 1.6, "result")


def _block(ax: Axes) -> None:
    """A residual block, whose last ReLU is replaced."""
    ax.add_patch(
        FancyBboxPatch((2, -4), 156, 20.5, boxstyle="round,pad=0,rounding_size=2", fc="none", ec=GRAY, lw=0.8)
    )
    ax.text(
        4,
        13.6,
        "Where it is: the last ReLU of a residual block, after the addition",
        fontsize=8.5,
        va="center",
    )
    _chain(ax, 6, BLOCK, [(16, 19, "conv, norm"), (40, 11, "ReLU"), (56, 19, "conv, norm")], PLAIN)
    _arrow(ax, (75, BLOCK), (87, BLOCK))
    _arrow(ax, (11, BLOCK), (11, BLOCK + 7.5), (90, BLOCK + 7.5), (90, BLOCK + 3))
    _product(ax, 90, BLOCK, "+")
    _arrow(ax, (93, BLOCK), (103, BLOCK))
    _box(ax, 103, BLOCK, 32, "SPARTA (was ReLU)", SPARTA)
    _arrow(ax, (135, BLOCK), (150, BLOCK))


def _chain(ax: Axes, start: float, y: float, boxes: list[tuple[float, float, str]], fill: str) -> None:
    """Boxes (left, width, text) of a row, each with an arrow from what is before it."""
    for left, width, text in boxes:
        _arrow(ax, (start, y), (left, y))
        _box(ax, left, y, width, text, fill)
        start = left + width


def _box(ax: Axes, left: float, y: float, width: float, text: str, fill: str) -> None:
    style = "round,pad=0,rounding_size=1.2"
    ax.add_patch(FancyBboxPatch((left, y - 5), width, 10, boxstyle=style, fc=fill, ec="0.2", lw=0.9))
    _text(ax, left + width / 2, y, text, ha="center", va="center")


def _product(ax: Axes, x: float, y: float, sign: str = r"$\times$") -> None:
    ax.add_patch(Circle((x, y), 3, fc="white", ec="0.2", lw=0.9))
    ax.text(x, y, sign, ha="center", va="center_baseline", fontsize=12)


def _arrow(ax: Axes, *points: tuple[float, float]) -> None:
    """Straight pieces through the points, a head at the last."""
    ax.plot(*zip(*points[:-1], strict=True), color="0.2", lw=1, solid_capstyle="butt")
    style = {"arrowstyle": "-|>", "color": "0.2", "lw": 1, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", points[-1], points[-2], arrowprops=style)


def _text(ax: Axes, x: float, y: float, text: str, **more: Any) -> None:
    ax.text(x, y, text.replace(" x ", r" $\times$ "), fontsize=8.5, linespacing=1.2, **more)
