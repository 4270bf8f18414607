"""One run of the queue from start to its filed result: data, training, set, evaluation, JSON."""

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from examples.paper.attacks import autoattack
from examples.paper.common import data
from examples.paper.common.records import RECORD, write_record
from examples.paper.common.sets import activations_of, round_to_half
from examples.paper.evaluation import evaluate
from examples.paper.evaluation.protocols import PROTOCOLS
from examples.paper.results.queue import FOLDERS, Queue, Run
from examples.paper.results.state import given_set, lock, read_begun, state
from examples.paper.training import train
from sparta_act import SpartaSet


class BusyError(ValueError):
    """Another process works on the run."""


def source(run: Run, folder: str | None) -> str:
    """`--data-dir` of a run. Raises `ValueError` where its data is not, or not whole."""
    if run.sample:
        return "sample"
    if folder is None:
        raise ValueError(
            f"{run.name} wants the whole {run.dataset}: --data FOLDER that holds it, or --data hub"
        )
    if folder == "hub":
        if data.DATASETS[run.dataset].hub is None:
            raise ValueError(f"{run.name} wants {run.dataset}, which is not on the Hub: --data FOLDER")
        return "hub"
    inner = Path(folder) / FOLDERS[run.dataset]
    if not inner.is_dir():
        raise ValueError(f"{run.name} wants {run.dataset} in {inner}, and there is no such folder")
    data.check_whole(str(inner), run.dataset)
    return str(inner)


def carry_out(queue: Queue, run: Run, args: argparse.Namespace, deadline: float) -> bool:
    """Train, evaluate and file one run; False if the time was over first, and then it can go on.

    Raises `ValueError` if its data or the set it needs is missing or its folder was begun with other
    settings, and `BusyError` if another process works on it.
    """
    folder, images = args.runs / run.name, source(run, args.data)
    now = state(queue, run, args.runs, args.results)
    if now.word in ("waiting", "changed"):
        raise ValueError(f"{run.name}: {now.word} {now.detail}")
    if PROTOCOLS[run.evaluation].autoattack:
        autoattack.load()  # before hours of training, not after them
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock(folder):
            if read_begun(folder) is None:
                write_record(folder / "run.json", {"settings": run.settings(), "git commit": commit()})
            words = _training(run, args, args.runs, images, given_set(queue, run, args.runs))
            if not trained(run, words, folder, deadline):
                return False
            best = queue.shows_best(run)
            if best:
                train.read_best(folder, train.load_trained(folder / "checkpoint.pt")[1])
            if not evaluated(run, _evaluation(run, args, args.runs, images, best), deadline):
                return False
            file_result(run, args, best)
    except Timeout:
        raise BusyError(f"{run.name}: another process works on it ({folder / 'lock'})") from None
    return True


def trained(run: Run, arguments: list[str], folder: Path, deadline: float) -> bool:
    """Train to the end and save the set of its own SPARTA; False if an epoch would end after the deadline."""
    checkpoint, done = folder / "checkpoint.pt", 0
    seconds = [float(row["seconds"]) for row in train.read_log(folder / "log.csv")]
    if checkpoint.exists():
        done = train.read_checkpoint(checkpoint)["epoch"]
        arguments = [*arguments, "--resume"]
    with closing(train.epochs(arguments)) as epochs:
        while done < run.epochs:
            if time.monotonic() + (statistics.median(seconds) if seconds else 0) > deadline:
                print(f"{run.name}: stopped after epoch {done} of {run.epochs}, the time is over")
                return False
            row = next(epochs)
            seconds.append(row["seconds"])
            done = row["epoch"]
            told = f"loss {row['loss']:.3f}, error {row['error']:.1%}{train.validated(row)}"
            print(f"{run.name}, epoch {done} of {run.epochs}: {told}, {row['seconds']:.1f} s", flush=True)
    if run.set is None:
        model, settings = train.load_trained(checkpoint)
        if activations := activations_of(model):
            round_to_half(activations)
            info = {"backbone": f"{run.arch} of width {run.width}", "recipe": settings}
            SpartaSet(activations, info).save_pretrained(folder / "set")
    return True


def evaluated(run: Run, arguments: list[str], deadline: float) -> bool:
    """Evaluate what was trained; False if a part of it would end after the deadline."""
    with closing(evaluate.evaluations(arguments)) as parts:
        for seconds in parts:
            if time.monotonic() + seconds > deadline:
                print(f"{run.name}: trained; its evaluation is not done, the time is over")
                return False
    return True


def file_result(run: Run, args: argparse.Namespace, with_best: bool) -> None:
    """Write the run's result, whole or not at all, with that of its best epoch if `with_best`."""
    folder = args.runs / run.name
    measured, log = _measured(folder), train.read_log(folder / "log.csv")
    model, settings = train.load_trained(folder / "checkpoint.pt")
    begun = read_begun(folder)
    runs, images = Path("runs"), "sample" if run.sample else f"DATA/{FOLDERS[run.dataset]}"
    given = settings["pretrained"]
    if run.set and given == str(args.runs / run.set / "set"):
        given = str(runs / run.set / "set")
    result = {
        "run": run.name,
        "settings": run.settings(),
        "training images": settings["images"],
        "errors": measured["errors"],
        "test images": measured["test images"],
        "steps of PGD in": measured["steps of PGD in"],
        **({"loss per step": measured["loss per step"]} if "loss per step" in measured else {}),
        "seconds per epoch": statistics.median(float(row["seconds"]) for row in log),
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply-adds": multiply_adds(model),
        "last epoch": _floats(log[-1]),
        "machine": measured["machine"],
        "torch": measured["torch"],
        "date": datetime.date.today().isoformat(),
        "git commit": begun["git commit"] if begun else "unknown",
        "commands": [
            shlex.join(["python", "examples/train.py", *_training(run, args, runs, images, given)]),
            shlex.join(["python", "examples/evaluate.py", *_evaluation(run, args, runs, images, with_best)]),
        ],
    }
    if with_best:
        best, path = train.read_best(folder, settings), folder / train.BEST
        result["best errors"] = _measured(path.parent)["errors"]
        row = next((r for r in log if r["epoch"] == str(best["epoch"])), {})
        known = {"epoch": best["epoch"], "validation error": best["validation error"]}
        result["best epoch"] = _floats(row | known)
    args.results.mkdir(parents=True, exist_ok=True)
    write_record(args.results / f"{run.name}.json", result)
    print(f"filed: {args.results / run.name}.json")


def _measured(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return record


def _floats(row: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in row.items() if v != ""}


def multiply_adds(model: nn.Module) -> int:
    """Of one image of 32 x 32 on its way forward, as torch counts them."""
    # it does not know the fused attention of CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 3, 32, 32))
    return int(counter.get_total_flops()) // 2


def commit() -> str:
    """Commit of this checkout, and whether its code was changed since; `GIT_COMMIT` where there is no git."""
    git = ["git", "-C", str(Path(__file__).parents[3])]
    try:
        head, changed = (
            subprocess.run([*git, *what], capture_output=True, text=True, check=True).stdout.strip()
            for what in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", "examples", "sparta_act"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT", "unknown")
    return head + (", changed" if changed else "")


def _training(run: Run, args: argparse.Namespace, runs: Path, images: str, given: str | None) -> list[str]:
    """Arguments of train.py that make this run, with the set `given` if it gets one."""
    words = ["--out", str(runs / run.name), "--dataset", run.dataset, "--data-dir", images]
    words += ["--arch", run.arch, "--width", str(run.width), "--activation", run.activation]
    words += ["--sites", run.sites, "--recipe", run.recipe, "--epochs", str(run.epochs)]
    words += ["--seed", str(run.seed), "--device", args.device]
    words += ["--limit", str(run.limit)] if run.limit else []
    words += ["--validation", str(run.validation)] if run.validation else []
    words += ["--pretrained", given] if given else []
    words += ["--amp", args.amp] if args.amp else []
    return words + (["--compile", args.compile] if args.compile else [])


def _evaluation(run: Run, args: argparse.Namespace, runs: Path, images: str, with_best: bool) -> list[str]:
    """Arguments of evaluate.py for the network of the last epoch and, with `with_best`, of the best one."""
    protocol, folder = PROTOCOLS[run.evaluation], runs / run.name
    words = [str(folder / "checkpoint.pt"), *([str(folder / train.BEST)] if with_best else [])]
    words += ["--data-dir", images, "--steps", *map(str, protocol.steps)]
    words += ["--untargeted-steps", str(protocol.untargeted_steps), "--restarts", str(protocol.restarts)]
    words += ["--limit", str(protocol.limit)] if protocol.limit else []
    words += ["--amp", "bf16"] if protocol.amp else []
    words += ["--protocol", "field"] if protocol.every_step else []
    words += ["--autoattack"] if protocol.autoattack else []
    words += ["--autoattack-limit", str(protocol.autoattack_limit)] if protocol.autoattack_limit else []
    return [*words, "--seed", str(run.seed), "--device", args.device]
