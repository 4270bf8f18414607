"""The commands of the queue: `run`, `status` and `tables`."""

import argparse
import os
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.paper.common.atomic import write_text
from examples.paper.common.cli import COMPILERS
from examples.paper.results.queue import FOLDERS, QUEUE, read_queue
from examples.paper.results.schedule import work
from examples.paper.results.state import RESULTS, state
from examples.paper.results.tables import lacking, render

RUN = """Train, evaluate and file runs of the queue.

  python -m examples.paper run w16-relu w16-sparta --data DATA       these two, in this order
  python -m examples.paper run --next --budget 25m --data DATA       as many as fit, in the queue's order
  python -m examples.paper run smoke-sparta --device cpu             a minute, no data needed

A run trains, saves its SPARTA as a set, is evaluated, and is filed as RESULTS/NAME.json. A run that was
stopped or killed goes on with the same command. What is done stays done.
"""
STATUS = """List every run of the queue with its state, then what each table lacks.

done, running, stopped; missing: not begun, or the filed result lacks an attack of its protocol; waiting: for
the set of another run; changed: its folder in RUNS began with other settings.
"""
TABLES = """Write docs/results.md from the queue and the filed results.

  python -m examples.paper tables             write it
  python -m examples.paper tables --check     fail if the page is not up to date
"""


def run(argv: list[str] | None = None) -> None:
    """Train, evaluate and file runs."""
    p = _parser("run", RUN)
    p.add_argument("names", nargs="*", metavar="NAME", help="runs of the queue, in this order")
    p.add_argument(
        "--next", action="store_true", help="the first run that can be done; with --budget, all that fit"
    )
    p.add_argument(
        "--budget",
        type=duration,
        help="time, e.g. 90s, 25m, 1.5h: begin no epoch, and no part of an evaluation, that would end later",
    )
    p.add_argument(
        "--data",
        help=f"folder that holds {' and '.join(FOLDERS.values())} as on the Hub, or 'hub' to download them",
    )
    p.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default here: %(default)s",
    )
    p.add_argument("--amp", choices=("bf16",), help="train in bfloat16; weights stay float32")
    p.add_argument("--compile", choices=COMPILERS, help="compile the network, as in `train`")
    _add_places(p, runs=True)
    args = p.parse_args(argv)
    if bool(args.names) == args.next:
        p.error("name runs, or give --next")
    if args.next and args.data is None:
        p.error("--next needs --data")
    work(read_queue(args.queue), args)


def status(argv: list[str] | None = None) -> None:
    """Print the state of every run and what each table lacks."""
    p = _parser("status", STATUS)
    _add_places(p, runs=True)
    args = p.parse_args(argv)
    queue = read_queue(args.queue)
    table = Table("run", "network", "data", "recipe, epochs", "state", box=None)
    for one in queue.runs.values():
        now = state(queue, one, args.runs, args.results)
        color = {"done": "green", "running": "yellow", "stopped": "yellow"}.get(now.word, "dim")
        network = f"{one.arch}{f' w{one.width}' if one.width != 64 else ''} {one.activation} at {one.sites}"
        network += f", set of {one.set}" if one.set else ""
        word = f"[{color}]{now.word}[/] {escape(now.detail)}"
        table.add_row(one.name, network, one.dataset, f"{one.recipe}, {one.epochs}", word)
    console = Console(width=None if os.isatty(1) else 200)
    console.print(table)
    console.print()
    for line in lacking(queue, args.results):
        console.print(line, markup=False, highlight=False)


def tables(argv: list[str] | None = None) -> None:
    """Write the page of the results, or check it."""
    p = _parser("tables", TABLES)
    p.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    _add_places(p, runs=False)
    args = p.parse_args(argv)
    queue = read_queue(args.queue)
    if not args.results.is_dir():
        raise ValueError(f"there is no folder of results {args.results}")
    page, text = args.results.parent / "results.md", render(queue, args.results)
    if args.check:
        if not page.exists() or page.read_text() != text:
            raise SystemExit(f"{page} is not up to date; write it with: python -m examples.paper tables")
        return
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, text)
    print(f"written: {page}")


def duration(text: str) -> float:
    """Type of an option: seconds from `90s`, `25m` or `1.5h`."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)) or not float(match[1]):
        raise argparse.ArgumentTypeError(f"must be a time such as 90s, 25m or 1.5h, not {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m examples.paper {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_places(p: argparse.ArgumentParser, *, runs: bool) -> None:
    p.add_argument("--queue", type=Path, default=QUEUE, help="default: the laboratory's queue.toml")
    p.add_argument("--results", type=Path, default=RESULTS, help="filed results (default: docs/results)")
    if runs:
        p.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints (default: runs)")
