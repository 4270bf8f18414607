"""docs/results.md: the paper's tables next to ours, from the queue and the filed results alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.paper.results.cells import ATTACKS, Result, Rows, attacks_of, cell, heads, markdown
from examples.paper.results.differences import Pairs, differences, trained_again
from examples.paper.results.networks import what_ships
from examples.paper.results.queue import Queue, Row, Run, Table
from examples.paper.results.state import result_of
from examples.paper.results.transfers import elsewhere

HEAD = """# Results

Percent of test images that are wrong, clean or attacked, with 95% intervals; for several seeds their mean and
range. The paper's attack is targeted PGD, eps 16/255, step 1/255; what stands in a column of the paper is as
printed there. Networks of different budgets, counted in epochs, are not compared. Saturated gates are the
share of the gate on active elements below 0.01 or above 0.99, at each site and, where that was recorded, at
all sites together.

A difference is in points of error, of two networks on the same images; below 0 the named network makes fewer
errors. Its ± is half the width of a 95% interval over images: other test images, the same trainings. In the
mean of several seeds, "with seeds ±" is half the width of a 95% interval over images and trainings. Two seeds
tell little about all trainings, so it is often wide. A seed alone says nothing about other trainings. A
difference of one seed is **bold** if the exact McNemar test stays below 0.05 after Holm's correction for all
differences of single seeds in its table. Even then it is about these two trainings.

The first test images are those of `examples/paper/common/cifar10-test.txt`, which lists all of them in our
order by their sha256. CIFAR-10 from the Hub is put into that order. `DATA` in a command is [the folder of the
data sets](https://github.com/sparta-act/sparta-act/tree/main/examples/paper#data).

`python -m examples.paper tables` writes this page from the files in
[docs/results](https://github.com/sparta-act/sparta-act/tree/main/docs/results). Each has its seed,
machine, versions and date; those of networks also have their command, and those of the queue's runs their
commands and the commit. What we conclude is in [robustness](robustness.md) and [rivals](rivals.md).
"""


def render(queue: Queue, results: Path) -> str:
    """The page, as Markdown: measured tables, then one line that lists the others."""
    parts, missing = [HEAD, *what_ships(results / "networks"), *elsewhere(results / "controls")], []
    for table in queue.tables.values():
        rows = rows_of(queue, table, results)
        name = f"{'Table ' if table.number[0].isdigit() else ''}{table.number}"
        if any(found for _, found in rows):
            epochs = queue.runs_of(table, table.rows[0])[0].epochs
            parts += [f"## {name[0].upper()}{name[1:]}\n", *_section(table, rows, epochs)]
            parts += trained_again(_with_earlier(queue, table, results))
        else:
            missing.append(name)
    if missing:
        parts.append(f"Not measured yet: {'; '.join(missing)}.\n")
    return "\n".join(parts)


def rows_of(queue: Queue, table: Table, results: Path) -> Rows:
    """The rows of a table, each with its results; with `best`, those of the best epoch."""
    return [(row, list(_found(row, queue.runs_of(table, row), results))) for row in table.rows]


def _found(row: Row, runs: list[Run], results: Path) -> Iterator[Result]:
    for run in runs:
        result = result_of(run, results)
        if result is not None and not row.best:
            yield result
        elif result is not None and "best errors" in result:
            yield result | {"errors": result["best errors"], "last epoch": result["best epoch"]}


def _with_earlier(queue: Queue, table: Table, results: Path) -> Pairs:
    """By label and seed, each result with the earlier one of the same run, where one is kept."""
    return {
        (row.label, run.seed): (now, before)
        for row in table.rows
        for run in queue.runs_of(table, row)
        if (now := result_of(run, results)) and (before := result_of(run, results / "earlier"))
    }


def lacking(queue: Queue, results: Path) -> Iterator[str]:
    """One line for each table: how many of its rows have a result, and which lack one."""
    for table in queue.tables.values():
        lacks = [row.label for row, found in rows_of(queue, table, results) if not found]
        count = f"{len(table.rows) - len(lacks)} of {len(table.rows)}"
        yield f"{table.number}: {table.budget} {count}{', lacks ' if lacks else ''}{'; '.join(lacks)}"


def _section(table: Table, rows: Rows, epochs: int) -> Iterator[str]:
    measured = [(row, found) for row, found in rows if found]
    lacks = [row.label for row, found in rows if not found]
    what = f"{table.title}. {epochs} epoch{'s' if epochs > 1 else ''} (`{table.budget}`)."
    yield f"{what}{' ' if table.note else ''}{table.note}\n"
    yield _errors(table, measured)
    if lacks:
        yield f"Not measured yet: {'; '.join(lacks)}.\n"
    yield _details(table, measured)
    yield from differences(table, rows)


def _errors(table: Table, rows: Rows) -> str:
    """Errors under the table's columns, next to those that the paper prints."""
    printed = any(row.paper for row, _ in rows)
    attacks = [ATTACKS.get(c, c) for c in table.columns]
    ours = heads(attacks, rows, [f"{c}, ours" if printed else c for c in table.columns])
    lines = [_interleaved([f"{c}, paper" for c in table.columns], ours) if printed else ours]
    for row, found in rows:
        cells = [cell(found, attack) for attack in attacks]
        paper = [f"{error:.2f}%" for error in row.paper] if row.paper else [""] * len(attacks)
        lines.append(_interleaved(paper, cells) if printed else cells)
    return markdown(["", *(row.label for row, _ in rows)], lines)


def _interleaved(one: list[str], other: list[str]) -> list[str]:
    return [text for pair in zip(one, other, strict=True) for text in pair]


def _details(table: Table, rows: Rows) -> str:
    """Errors under the other attacks; what each network is, and what it costs."""
    attacks = [a for a in attacks_of(rows) if a not in (*ATTACKS.values(), *table.columns)]
    columns = ["saturated gates", "parameters", "multiply-adds", "seconds per epoch", "machine"]
    columns = ["epoch", *columns] if any(row.best for row in table.rows) else columns
    lines = [[*heads(attacks, rows, attacks), *columns]]
    for _, found in rows:
        gates = [", ".join(f"{share:.1%}" for share in saturated(f).values()) for f in found]
        texts = {
            "epoch": " / ".join(f"{f['last epoch']['epoch']:.0f}" for f in found),
            "saturated gates": " / ".join(gates) if any(gates) else "",
            "parameters": f"{found[0]['parameters']:,}",
            "multiply-adds": f"{found[0]['multiply-adds'] / 1e6:.1f} M",
            "seconds per epoch": " / ".join(f"{f['seconds per epoch']:.1f}" for f in found),
            "machine": " / ".join(dict.fromkeys(f["machine"] for f in found)),
        }
        lines.append([*(cell(found, a) for a in attacks), *(texts[column] for column in columns)])
    return markdown(["", *(row.label for row, _ in rows)], lines)


def saturated(result: Mapping[str, Any]) -> dict[str, float]:
    """Share of each gate below 0.01 or above 0.99 after the last epoch, by site; empty without SPARTA."""
    shares: dict[str, float] = {}
    for name, share in result["last epoch"].items():
        site, sign, _ = name.partition(" <") if " <" in name else name.partition(" >")
        if sign:
            shares[site] = shares.get(site, 0.0) + share
    return shares
