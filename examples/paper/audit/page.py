"""An audit in words: its headline, its table on the screen, and its page in Markdown.

`python examples/audit_text.py` writes the tables of docs/audit.md anew from what is filed in docs/audits.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.paper.audit import attacks as a
from examples.paper.audit.checks import FAIL, PASS, UNKNOWN
from examples.paper.common.atomic import write_text

DOCS = Path(__file__).parents[3] / "docs"
BLOCK = re.compile(r"(<!-- audit: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLOURS = {UNKNOWN: "yellow", FAIL: "bold red", PASS: "green"}


def show(record: Mapping[str, Any], title: str) -> None:
    """Print the table and the headline; `record` is what audit.json holds."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("", "check", "figure (points)", "verdict", "what it means", title=title, show_lines=True)
    for row in record["checks"]:
        verdict = f"[{COLOURS.get(row['verdict'], 'dim')}]{row['verdict']}[/]"
        table.add_row(str(row["number"]), row["name"], escape(row["figure"]), verdict, escape(row["meaning"]))
    console.print(table)
    for line in (*headline(record), made(record)):
        console.print(line, highlight=False, markup=False)


def headline(record: Mapping[str, Any]) -> list[str]:
    """What the network is worth and whether to believe it, in sentences."""
    worst, plain, clean = record["worst case"], record["attacks"][a.PLAIN], record["attacks"][a.CLEAN]
    evidence, eps = record["evidence"], f"{255 * record['eps']:.3g}/255"
    lines = [
        f"Error in the worst case over all attacks within {eps}: {told(worst)} of {worst['images']} images; "
        f"by plain PGD-{record['budget']['steps']}: {told(plain)}; clean: {told(clean)}.",
        f"Evidence: {evidence['wrong again']} of {evidence['images']} kept images fool a fresh copy of the "
        f"network; {'all' if evidence['within eps'] else 'NOT all'} lie within {eps}.",
    ]
    verdicts = [row["verdict"] for row in record["checks"]]
    if FAIL in verdicts:
        failed = ", ".join(str(row["number"]) for row in record["checks"] if row["verdict"] == FAIL)
        lines.append(
            f"FAIL ({failed}): signs of gradient masking. Do not believe plain PGD's figure; "
            "even the worst case is only what these attacks found."
        )
    elif UNKNOWN in verdicts:
        count = f"{verdicts.count(UNKNOWN)} of {len(verdicts)} checks could not be told"
        lines.append(f"Nothing fails, but {count}: give more images (--limit) or surrogates (--surrogate).")
    else:
        lines.append("Nothing fails: these attacks agree with each other. It is no certificate.")
    return lines


def made(record: Mapping[str, Any]) -> str:
    """Where the figures come from."""
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
    table = [
        "|  | check | figure, in points | verdict | what it means |",
        "| --- | --- | --- | --- | --- |",
        *rows,
    ]
    return "\n".join([*(line + "\n" for line in headline(record)), *table]) + "\n"


def told(entry: Mapping[str, Any]) -> str:
    """An error with its interval: `31.5% (28.7-34.4)`."""
    return f"{entry['error']:.1%} ({100 * entry['low']:.1f}-{100 * entry['high']:.1f})"


def filled(page: str, audits: Path) -> str:
    """A page whose blocks `<!-- audit: NAME -->` to `<!-- end -->` hold the audit of that name."""

    def block(match: re.Match[str]) -> str:
        record = json.loads((audits / match[2] / "audit.json").read_text())
        return f"{match[1]}{markdown(record)}\n{made(record)}\n{match[3]}"

    return BLOCK.sub(block, page)


if __name__ == "__main__":
    page = filled((DOCS / "audit.md").read_text(), DOCS / "audits")
    write_text(DOCS / "audit.md", page)
