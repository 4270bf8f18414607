"""What the tables of the page are made of: cells, heads and Markdown."""

from collections.abc import Iterable
from typing import Any

from examples.paper.common.records import unpacked
from examples.paper.common.statistics import format_errors
from examples.paper.results.queue import Row

ATTACKS = {
    "PGD-10": "targeted PGD-10, 16/255",
    "PGD-30": "targeted PGD-30, 16/255",
    "PGD-50": "targeted PGD-50, 16/255",
    "clean": "clean",
}
Result = dict[str, Any]
Rows = list[tuple[Row, list[Result]]]  # all rows of a table, each with its results, one a seed
MISSING = "missing"


def attacks_of(rows: Rows) -> list[str]:
    """Names of what was measured, in order."""
    return list(dict.fromkeys(a for _, found in rows for f in found for a in f["errors"]))


def heads(attacks: list[str], rows: Rows, names: list[str]) -> list[str]:
    """Heads of columns: their names, with the number of images."""
    every = [f["errors"] for _, found in rows for f in found]
    counts = (sorted({e[a]["images"] for e in every if a in e}) for a in attacks)
    return [
        f"{name} ({' or '.join(f'{n:,}' for n in count)} images)" if count else name
        for name, count in zip(names, counts, strict=True)
    ]


def cell(found: list[Result], attack: str) -> str:
    """Error with its interval; of several seeds their mean and range."""
    entries = [f["errors"][attack] for f in found if attack in f["errors"]]
    return format_errors(unpacked(e["wrong"], e["images"]) for e in entries) if entries else MISSING


def markdown(labels: Iterable[str], lines: list[list[str]]) -> str:
    """A table with its first column, then the rest, line by line, the head first."""
    head, *rest = ([label, *line] for label, line in zip(labels, lines, strict=True))
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rest))
