"""Differences between the rows of a table, and between the seeds of a row."""

import re
from collections.abc import Iterator

from examples.paper.common.statistics import format_difference, minus
from examples.paper.results.cells import MISSING, Result, Rows, attacks_of, markdown
from examples.paper.results.queue import Table


def differences(table: Table, rows: Rows) -> Iterator[str]:
    """Each row minus the last `base` above it, or the first; then each row minus the table's `against`."""
    starts = [i for i, (row, _) in enumerate(rows) if i == 0 or row.base]
    groups = [rows[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    if table.against is not None:
        groups.append(sorted(rows, key=lambda r: r[0].label != table.against))  # stable: it comes first
    for group in groups:
        pairs = pairs_with_first(group)
        if not pairs:
            continue
        known = [result["errors"].keys() & base["errors"].keys() for result, base in pairs.values()]
        attacks = [a for a in attacks_of(group[:1]) if any(a in k for k in known)]
        lines = [attacks]
        for (result, base), both in zip(pairs.values(), known, strict=True):
            lines.append(
                [format_difference(*minus(result, base, a)) if a in both else MISSING for a in attacks]
            )
        labels = [f"{label}, seed {seed}" for label, seed in pairs]
        yield markdown([f"points, minus {group[0][0].label}", *labels], lines)


def pairs_with_first(rows: Rows) -> dict[tuple[str, int], tuple[Result, Result]]:
    """By label and seed, each result of the other rows with the first row's result of the same seed."""
    (_, first), *others = rows
    base = {r["settings"]["seed"]: r for r in first}
    return {
        (row.label, seed): (result, base[seed])
        for row, found in others
        for result in found
        if (seed := result["settings"]["seed"]) in base
    }


def picture(table: Table, rows: Rows) -> str | None:
    """File name of a table's picture, if it has one and there are differences to draw."""
    if table.figure is None or not pairs_with_first(rows):
        return None
    return re.sub(r"\W+", "-", f"{table.number} {table.budget}") + ".png"


def between_seeds(rows: Rows) -> Iterator[str]:
    """How many points the seeds of a row differ by, for each row with several."""
    rows = [(row, found) for row, found in rows if len(found) > 1]
    if rows:
        attacks = attacks_of(rows)
        lines = [attacks]
        for _, found in rows:
            errors = [[f["errors"][a]["error"] for f in found if a in f["errors"]] for a in attacks]
            lines.append([f"{100 * (max(e) - min(e)):.1f}" if len(e) > 1 else MISSING for e in errors])
        labels = [f"{row.label}, {len(found)} seeds" for row, found in rows]
        yield markdown(["points, from the lowest seed to the highest", *labels], lines)
