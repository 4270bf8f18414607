"""The paper's tables beside ours, as Markdown, from the queue and the filed results alone."""

import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.paper.common.statistics import format_difference, minus
from examples.paper.results.queue import BUDGETS, DIFFERENCE, Queue, result_of, runs_of

ATTACKS = {
    "PGD-10": "targeted PGD-10, 16/255",
    "PGD-30": "targeted PGD-30, 16/255",
    "PGD-50": "targeted PGD-50, 16/255",
    "clean": "clean",
}
Rows = list[tuple[dict[str, Any], list[dict[str, Any]]]]  # of a table, each with its results
MISSING = "missing"
HEAD = """# Results

The paper's Tables 2 to 9 beside ours: percent of test images that are wrong, clean or under the paper's
attack (targeted PGD, eps 16/255, step 1/255). Ours have 95% intervals; where a row has several seeds, their
mean, lowest and highest. Under each table are attacks that the paper does not show. Budgets are epochs:
what is trained for 30 is not compared with what is trained for 90.

Differences are of the same images, and their ± counts images alone, not the luck of a training. What that
luck does is what the seeds of one row differ by; a difference between two rows that is no larger may be luck.

Written by `python examples/campaign.py tables` from the files in [results](results), each of which names its
commands, seed, machine, torch and commit; no number in a table is typed by hand. What a paragraph below a
table concludes is ours; every difference that it quotes is in the tables above it, else it is left out.
"""


def render(queue: Queue, results: Path) -> str:
    """All tables, as Markdown."""
    parts = [HEAD]
    for table in queue.tables:
        number = table["number"]
        parts.append(f"## {'Table ' + number if number[0].isdigit() else number.capitalize()}\n")
        parts.append(f"{table['title']}.{' ' + table['note'] if 'note' in table else ''}\n")
        for budget, rows in by_budget(queue, table, results).items():
            shown = list(_one_budget(queue, table, budget, rows))
            finding = table.get("findings", {}).get(budget, "")
            if finding and all(quoted in "".join(shown) for quoted in DIFFERENCE.findall(finding)):
                shown.append(f"{finding}\n")
            parts += shown
    return "\n".join(parts)


def left_out(queue: Queue, page: str) -> list[str]:
    """Tables and budgets whose finding a page does not have, for its results are others."""
    findings = ((t["number"], b, text) for t in queue.tables for b, text in t.get("findings", {}).items())
    return [f"{number}, {budget}" for number, budget, text in findings if text not in page]


def _one_budget(queue: Queue, table: dict[str, Any], budget: str, rows: Rows) -> Iterator[str]:
    count = queue.epochs[budget]
    yield f"{count} epoch{'' if count == 1 else 's'} (`{budget}`):\n"
    yield _beside(table, rows)
    if more := _more(table, rows):
        yield more
    yield from _against(table, rows)
    if name := picture(table, budget, rows):
        first = table["rows"][0]["label"]
        yield f"![Differences from {first}; grey: as much as its seeds differ by](results/{name})\n"
    if spread := _between_seeds(rows):
        yield spread
    if "neighbours" in table:
        yield _neighbours(table, rows)


def by_budget(queue: Queue, table: dict[str, Any], results: Path) -> dict[str, Rows]:
    """The rows of a table for each of its budgets that has a result; if none has, for the first."""
    known = table.get("budgets", BUDGETS)
    every = {b: [(row, _results(queue, row, b, results)) for row in table["rows"]] for b in known}
    filed = {b: rows for b, rows in every.items() if any(found for _, found in rows)}
    return filed or {known[0]: every[known[0]]}


def lacking(queue: Queue, results: Path) -> Iterator[str]:
    """One line for each table: how many of its rows have a result."""
    for table in queue.tables:
        parts = []
        for budget in table.get("budgets", BUDGETS):
            there = [r for r in table["rows"] if runs_of(queue, r, budget)]
            missing = [r["label"] for r in there if not _results(queue, r, budget, results)]
            if there:
                lack = f", lacks {'; '.join(missing)}" if missing else ""
                parts.append(f"{budget} {len(there) - len(missing)} of {len(table['rows'])}{lack}")
        yield f"{table['number']}: {' | '.join(parts)}"


def _results(queue: Queue, row: dict[str, Any], budget: str, results: Path) -> list[dict[str, Any]]:
    """Results of a row; where it says `best`, of the epoch that erred least on images held out."""
    runs = runs_of(queue, row, budget)
    found = [r for run in runs if (r := result_of(run, results)) is not None]
    if row.get("best"):
        if without := [run.name for run in runs if not run.validation]:
            raise ValueError(
                f"the row {row['label']} wants the best epoch, and {without} has no `validation`"
            )
        found = [r for r in found if "best errors" in r]
        return [r | {"errors": r["best errors"], "last epoch": r["best epoch"]} for r in found]
    return found


def _beside(table: dict[str, Any], rows: Rows) -> str:
    printed = any("paper" in row for row, _ in rows)
    head = [
        "",
        *(f"{c}{who}" for c in table["columns"] for who in ([", paper", ", ours"] if printed else [""])),
    ]
    lines = [head]
    for row, found in rows:
        line = [row["label"]]
        for i, column in enumerate(table["columns"]):
            line += [f"{row['paper'][i]:.2f}" if "paper" in row else ""] if printed else []
            errors = [f["errors"].get(ATTACKS.get(column, column)) for f in found]
            line.append(_cell(errors, images=not printed and not ATTACKS.keys() >= set(table["columns"])))
        lines.append(line)
    return _markdown(lines)


def _more(table: dict[str, Any], rows: Rows) -> str | None:
    rows = [(row, found) for row, found in rows if found]
    attacks = [a for a in _attacks(rows) if a not in (*ATTACKS.values(), *table["columns"])]
    if not rows:
        return None
    best = any(row.get("best") for row in table["rows"])
    head = ["saturated gates", "parameters", "multiply-adds", "seconds per epoch", "machine"]
    lines = [["", *attacks, *(["epoch"] if best else []), *head]]
    for row, found in rows:
        line = [row["label"], *(_cell([f["errors"].get(a) for f in found], images=True) for a in attacks)]
        line += [" / ".join(f"{f['last epoch']['epoch']:.0f}" for f in found)] if best else []
        seconds = " / ".join(f"{f['seconds per epoch']:.1f}" for f in found)
        machines = " / ".join(dict.fromkeys(f["machine"] for f in found))
        gates = " / ".join(", ".join(f"{s:.1%}" for s in saturated(f).values()) for f in found)
        sizes = [f"{found[0]['parameters']:,}", f"{found[0]['multiply-adds'] / 1e6:.1f} M"]
        lines.append([*line, gates if any(map(saturated, found)) else "", *sizes, seconds, machines])
    return _markdown(lines)


def saturated(result: Mapping[str, Any]) -> dict[str, float]:
    """Share of each gate below 0.01 or above 0.99 after the last epoch, by site; empty without SPARTA."""
    shares: dict[str, float] = {}
    for name, share in result["last epoch"].items():
        site, sign, _ = name.partition(" <") if " <" in name else name.partition(" >")
        if sign:
            shares[site] = shares.get(site, 0.0) + share
    return shares


def _against(table: dict[str, Any], rows: Rows) -> Iterator[str]:
    """Every row minus the last `base` above it, or minus the first: on the same images, of the same seed.

    And every row minus the one that the table calls `against`, if it does.
    """
    starts = [i for i, (row, _) in enumerate(rows) if i == 0 or row.get("base")]
    groups = [rows[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    if "against" in table:
        groups.append(sorted(rows, key=lambda r: r[0]["label"] != table["against"]))  # stable: it first
    for group in groups:
        if text := _minus_first(group):
            yield text


def held_against_first(rows: Rows) -> dict[tuple[str, int], tuple[dict[str, Any], dict[str, Any]]]:
    """By label and seed, each result of the other rows, and beside it the first row's of the same seed."""
    (_, first), *others = rows
    base = {r["settings"]["seed"]: r for r in first}
    return {
        (row["label"], seed): (result, base[seed])
        for row, found in others
        for result in found
        if (seed := result["settings"]["seed"]) in base
    }


def _minus_first(rows: Rows) -> str | None:
    pairs = held_against_first(rows)
    if not pairs:
        return None
    known = [result["errors"].keys() & twin["errors"].keys() for result, twin in pairs.values()]
    attacks = [a for a in _attacks(rows[:1]) if any(a in k for k in known)]
    lines = [[f"points, minus {rows[0][0]['label']}", *attacks]]
    for ((label, seed), (result, twin)), both in zip(pairs.items(), known, strict=True):
        cells = (format_difference(*minus(result, twin, a)) if a in both else MISSING for a in attacks)
        lines.append([f"{label}, seed {seed}", *cells])
    return _markdown(lines)


def picture(table: dict[str, Any], budget: str, rows: Rows) -> str | None:
    """File name of a table's picture, if it has one and there is something to draw."""
    if "figure" not in table or not held_against_first(rows):
        return None
    return re.sub(r"\W+", "-", f"{table['number']} {budget}") + ".png"


def _between_seeds(rows: Rows) -> str | None:
    """By how many points the seeds of a row differ, for each row that has several."""
    rows = [(row, found) for row, found in rows if len(found) > 1]
    if not rows:
        return None
    attacks = _attacks(rows)
    lines = [["points, from the lowest seed to the highest", *attacks]]
    for row, found in rows:
        errors = [[f["errors"][a]["error"] for f in found if a in f["errors"]] for a in attacks]
        cells = (f"{100 * (max(e) - min(e)):.1f}" if len(e) > 1 else MISSING for e in errors)
        lines.append([f"{row['label']}, {len(found)} seeds", *cells])
    return _markdown(lines)


def _neighbours(table: dict[str, Any], rows: Rows) -> str:
    """Accuracies that others print, and then ours, under the attack that the table compares."""
    attack = table["compared"]
    lines = [["", f"accuracy, {attack}", "source"]]
    lines += [[n["label"], f"{n['accuracy']:.2f}", n["source"]] for n in table["neighbours"]]
    for row, found in rows:
        errors = [f["errors"].get(attack) for f in found]
        lines.append([row["label"], _cell([e and _accuracy(e) for e in errors], images=True), "this table"])
    return _markdown(lines)


def _attacks(rows: Rows) -> list[str]:
    """Names of what was measured, in their order."""
    return list(dict.fromkeys(a for _, found in rows for f in found for a in f["errors"]))


def _accuracy(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of errors as one of accuracies."""
    return entry | {"error": 1 - entry["error"], "low": 1 - entry["high"], "high": 1 - entry["low"]}


def _cell(errors: list[dict[str, Any] | None], *, images: bool = False) -> str:
    """Error in percent with its interval; of several seeds their mean and range."""
    known = [e for e in errors if e is not None]
    if not known:
        return MISSING
    percent = [100 * e["error"] for e in known]
    count = f"; {known[0]['images']} images" if images else ""
    if len(known) == 1:
        return f"{percent[0]:.2f} ({100 * known[0]['low']:.1f}-{100 * known[0]['high']:.1f}{count})"
    spread = f"{min(percent):.2f} to {max(percent):.2f}, {len(known)} seeds"
    return f"{statistics.mean(percent):.2f} ({spread}{count})"


def _markdown(lines: list[list[str]]) -> str:
    head, *rest = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rest))
