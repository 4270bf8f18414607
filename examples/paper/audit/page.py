"""An audit as text: its headline, its table on the terminal, and its page in Markdown."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.paper.audit import attacks as a
from examples.paper.audit.verdicts import FAIL, PASS, SUSPECT, UNKNOWN, numbers_of
from examples.paper.common.records import unpacked
from examples.paper.common.statistics import format_error

COLORS = {UNKNOWN: "yellow", SUSPECT: "bold yellow", FAIL: "bold red", PASS: "green"}


def show(record: Mapping[str, Any], title: str) -> None:
    """Print the table and the headline; `record` is the content of audit.json."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("", "check", "figure (points)", "verdict", "meaning", title=title, show_lines=True)
    for row in record["checks"]:
        verdict = f"[{COLORS.get(row['verdict'], 'dim')}]{row['verdict']}[/]"
        table.add_row(str(row["number"]), row["name"], escape(row["figure"]), verdict, escape(row["meaning"]))
    console.print(table)
    for line in (*headline(record), provenance(record)):
        console.print(line, highlight=False, markup=False)


def headline(record: Mapping[str, Any]) -> list[str]:
    """The network's errors, the evidence, and whether to believe them, in sentences."""
    entries = (record["worst case"], record["attacks"][a.PLAIN], record["attacks"][a.CLEAN])
    worst, plain, clean = (format_error(unpacked(e["wrong"], e["images"])) for e in entries)
    evidence, eps = record["evidence"], f"{255 * record['eps']:.3g}/255"
    lines = [
        f"Error in the worst case over all attacks within {eps}: {worst} of {entries[0]['images']} images; "
        f"under plain PGD-{record['budget']['steps']}: {plain}; clean: {clean}.",
        f"Evidence: {evidence['wrong again']} of {evidence['images']} stored images fool a fresh copy of the "
        f"network; {'all' if evidence['within eps'] else 'NOT all'} lie within {eps}.",
    ]
    numbers = {verdict: ", ".join(map(str, n)) for verdict, n in numbers_of(record).items()}
    if numbers[FAIL]:
        lines.append(
            f"FAIL ({numbers[FAIL]}): signs of gradient masking. Do not trust the error under "
            "plain PGD; the worst case, too, is only a lower bound."
        )
    if numbers[SUSPECT]:
        lines.append(
            f"Suspect ({numbers[SUSPECT]}): beyond the tolerance, but not surely. Give more "
            "images (--limit), or look into it, before you trust the error under plain PGD."
        )
    if numbers[UNKNOWN]:
        lines.append(
            f"Not enough data ({numbers[UNKNOWN]}): give more images (--limit; below 400 some "
            "checks cannot pass) or surrogates (--surrogate)."
        )
    if not numbers[FAIL] and not numbers[SUSPECT]:
        lines.append("No check fails: these attacks agree with each other. This is no certificate.")
    return lines


def provenance(record: Mapping[str, Any]) -> str:
    """Seed, machine, torch, date and time."""
    return (
        f"seed {record['seed']}; {record['machine']}; torch {record['torch']}; {record['date']}; "
        f"{record['seconds']} s"
    )


def markdown(record: Mapping[str, Any]) -> str:
    """The headline and the table of checks."""
    rows = [
        f"| {row['number']} | {row['name']} | {row['figure']} | **{row['verdict']}** | {row['meaning']} |"
        for row in record["checks"]
    ]
    head = ["|  | check | figure, in points | verdict | meaning |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*(line + "\n" for line in headline(record)), *head, *rows]) + "\n"
