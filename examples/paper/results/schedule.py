"""Runs of the queue, one after another."""

import argparse
import difflib
import time

from examples.paper.common.lock import BusyError
from examples.paper.results.queue import Queue, Run
from examples.paper.results.run import carry_out, source
from examples.paper.results.state import state
from sparta_act import SpartaError


def work(queue: Queue, args: argparse.Namespace) -> None:
    """Do the named runs, or the next ones, until the time is over."""
    if unknown := [name for name in args.names if name not in queue.runs]:
        near = {name: difflib.get_close_matches(name, queue.runs, 3) for name in unknown}
        close = "; ".join(f"{name} (close: {', '.join(n) or 'none'})" for name, n in near.items())
        raise ValueError(f"no such run: {close}; `python -m examples.paper status` lists all")
    for name in args.names:
        if state(queue, queue.runs[name], args.runs, args.results).word != "done":
            source(queue.runs[name], args.data)  # before hours of another run, not after them
    deadline = time.monotonic() + args.budget if args.budget else float("inf")
    finished, failed = 0, list[str]()
    for name in args.names or queue.runs:
        one = queue.runs[name]
        now = state(queue, one, args.runs, args.results)
        if now.word == "done":
            if args.names:
                print(f"{name} is done: {args.results / name}.json")
            continue
        if args.next and (now.word in ("waiting", "running", "changed") or not has_data(one, args.data)):
            continue
        try:
            if not carry_out(queue, one, args, deadline):
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
            print("nothing to do: each run is done, running, waiting or changed, or lacks its data")
    if failed:
        raise SystemExit(f"error: not done: {', '.join(failed)}")


def has_data(one: Run, folder: str) -> bool:
    """Whether `--data` holds what a run trains on."""
    try:
        source(one, folder)
    except (ValueError, OSError):
        return False
    return True
