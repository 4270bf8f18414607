"""The paper's tables, run by run: what is done, what is missing, and the next one at a command.

  python examples/campaign.py                                        the state of every run
  python examples/campaign.py run short-relu short-sparta --data DIR  train, evaluate and file these
  python examples/campaign.py run --next --budget 25m --data DIR      as many as fit, in the queue's order
  python examples/campaign.py tables                                 write docs/results.md from what is filed

The queue is campaign.toml. A run that was stopped or killed goes on where it was; what is done stays done.
"""

import argparse
import difflib
import os
import re
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.paper.common.atomic import write_text
from examples.paper.common.cli import plain_errors
from examples.paper.results.queue import FOLDERS, QUEUE, RESULTS, Queue, Run, read_queue, state
from examples.paper.results.run import BusyError, carry_out, source
from examples.paper.results.tables import lacking, left_out, render
from examples.paper.training.trainer import COMPILERS
from sparta_act import SpartaError


def work(queue: Queue, args: argparse.Namespace) -> None:
    """Do the runs that the command line names, or the next ones, until the time is over."""
    if unknown := [name for name in args.names if name not in queue.runs]:
        near = {name: difflib.get_close_matches(name, queue.runs, 3) for name in unknown}
        told = "; ".join(f"{name} (near: {', '.join(n) or 'none'})" for name, n in near.items())
        raise ValueError(f"no such run: {told}; `campaign.py` lists them")
    deadline = time.monotonic() + args.budget if args.budget else float("inf")
    finished, failed = 0, list[str]()
    for name in args.names or queue.runs:
        run = queue.runs[name]
        now = state(queue, run, args.runs, args.results)
        if now.word == "done":
            if args.names:
                print(f"{name} is done: {args.results / name}.json")
            continue
        if args.next and (now.word in ("waiting", "running", "changed") or not has_data(run, args)):
            continue
        try:
            if not carry_out(queue, run, args, deadline):
                print("go on with the same command")
                break
        except (SpartaError, ValueError, OSError) as error:
            if not args.next:
                raise
            if not isinstance(error, BusyError):  # else another process began it a moment ago
                failed.append(name)
                print(f"error: {name}: {error}; going on with the next", flush=True)
            continue
        finished += 1
        if args.next and not args.budget:
            break
    else:
        if args.next and not finished and not failed:
            print("nothing to do: all are done or running, wait for another, have changed or lack their data")
    if failed:
        raise SystemExit(f"error: not done: {', '.join(failed)}")


def has_data(run: Run, args: argparse.Namespace) -> bool:
    """Whether `--data` holds what a run trains on."""
    try:
        source(run, args.data)
    except (ValueError, OSError):
        return False
    return True


def show(queue: Queue, args: argparse.Namespace) -> None:
    """Print every run's state and what each table lacks."""
    table = Table("run", "network", "data", "recipe, epochs", "state", box=None)
    for run in queue.runs.values():
        now = state(queue, run, args.runs, args.results)
        colour = {"done": "green", "running": "yellow", "stopped": "yellow"}.get(now.word, "dim")
        network = f"{run.arch}{f' w{run.width}' if run.width != 64 else ''} {run.activation} at {run.sites}"
        network += f", set of {run.set}" if run.set else ""
        word = f"[{colour}]{now.word}[/] {escape(now.detail)}"
        table.add_row(run.name, network, run.dataset, f"{run.recipe}, {run.epochs}", word)
    console = Console(width=None if os.isatty(1) else 200)
    console.print(table)
    console.print()
    for line in lacking(queue, args.results):
        console.print(line, markup=False, highlight=False)


def duration(text: str) -> float:
    """Type of an option: seconds from `90s`, `25m` or `1.5h`."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)) or not float(match[1]):
        raise argparse.ArgumentTypeError(f"wants a time such as 90s, 25m or 1.5h, not {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_places(p, QUEUE, Path("runs/campaign"), RESULTS)
    actions = p.add_subparsers(dest="action", title="actions", metavar="run | tables")
    r = actions.add_parser("run", help="train, evaluate and file runs", description=work.__doc__)
    r.add_argument("names", nargs="*", metavar="NAME", help="runs of the queue, in this order")
    r.add_argument(
        "--next", action="store_true", help="the first that can be done, or with --budget as many as fit"
    )
    r.add_argument(
        "--budget",
        type=duration,
        help="begin no epoch or part of an evaluation that, by those before it, would end later, e.g. 25m",
    )
    r.add_argument(
        "--data",
        help=f"folder that holds {', '.join(FOLDERS.values())} as on the Hub, or 'hub' to download them",
    )
    r.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    r.add_argument("--amp", choices=("bf16",), help="mixed precision in training")
    r.add_argument("--compile", choices=COMPILERS, help="as in train.py")
    t = actions.add_parser("tables", help="render the filed results", description="Write the tables.")
    for action in (r, t):
        _add_places(action, *[argparse.SUPPRESS] * 3)  # where they are given, they replace the ones before
    t.add_argument("--out", type=Path, help="default: results.md beside the folder of the results")
    t.add_argument("--check", action="store_true", help="write nothing; fail if the file is not up to date")
    return p


def _add_places(p: argparse.ArgumentParser, queue: object, runs: object, results: object) -> None:
    p.add_argument("--queue", type=Path, default=queue, help="the queue (default: campaign.toml beside this)")
    p.add_argument("--runs", type=Path, default=runs, help="checkpoints (default: runs/campaign)")
    p.add_argument("--results", type=Path, default=results, help="filed results (default: docs/results)")


def main(argv: list[str] | None = None) -> None:
    """Do as the command line says."""
    p = parser()
    args = p.parse_args(argv)
    queue = read_queue(args.queue)
    if args.action is None:
        show(queue, args)
    elif args.action == "run":
        if bool(args.names) == args.next:
            p.error("run: name runs, or say --next")
        if args.next and args.data is None:
            p.error("run --next: say where the data is, with --data")
        work(queue, args)
    else:
        out, text = args.out or args.results.parent / "results.md", render(queue, args.results)
        if args.check:
            if not out.exists() or out.read_text() != text:
                raise SystemExit(f"{out} is not what is filed; write it with: campaign.py tables")
        else:
            from examples.paper.results.plot import draw_all  # matplotlib, which nothing else here needs

            out.parent.mkdir(parents=True, exist_ok=True)
            draw_all(queue, args.results)  # first, for the page shows them
            write_text(out, text)
            print(f"written: {out}")
            for where in left_out(queue, text):
                print(
                    f"left out: what campaign.toml concludes from table {where}, for the results are others"
                )


if __name__ == "__main__":
    with plain_errors():
        main()
