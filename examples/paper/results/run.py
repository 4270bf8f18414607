"""One run of the queue, from its data to the filed result: training, set, evaluation, JSON."""

import argparse
import dataclasses
import datetime
import shlex
import statistics
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from examples.paper.attacks import autoattack
from examples.paper.common import data
from examples.paper.common.gates import activations_of, round_to_half
from examples.paper.common.lock import lock
from examples.paper.common.records import RECORD, read_evaluation, write_record
from examples.paper.evaluation import evaluate
from examples.paper.evaluation.protocols import PROTOCOLS
from examples.paper.results.queue import FOLDERS, Queue, Run
from examples.paper.results.state import given_set, read_begun, state
from examples.paper.training import loop
from examples.paper.training.checkpoint import BEST, load_trained, read_best, read_checkpoint
from examples.paper.training.recipes import Recipe
from sparta_act import SpartaSet


def source(run: Run, folder: str | None) -> str:
    """Where the images of a run are. Raises `ValueError` if its data is missing or incomplete."""
    if run.sample:
        return "sample"
    if folder is None:
        raise ValueError(
            f"{run.name} needs the whole {run.dataset}: --data FOLDER that holds it, or --data hub"
        )
    if folder == "hub":
        if data.DATASETS[run.dataset].hub is None:
            raise ValueError(f"{run.name} needs {run.dataset}, which is not on the Hub: --data FOLDER")
        return "hub"
    inner = Path(folder) / FOLDERS[run.dataset]
    if not inner.is_dir():
        raise ValueError(f"{run.name} needs {run.dataset} in {inner}, and there is no such folder")
    data.check_whole(str(inner), run.dataset)
    return str(inner)


def carry_out(queue: Queue, run: Run, args: argparse.Namespace, deadline: float) -> bool:
    """Train, evaluate and file one run; False if it ran out of time, and then it can go on.

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
    with lock(folder):
        if read_begun(folder) is None:
            write_record(folder / "run.json", {"settings": run.settings(), "git commit": commit()})
        if not trained(run, args, images, given_set(queue, run, args.runs), deadline):
            return False
        best = queue.shows_best(run)
        if not evaluated(run, args, images, best, deadline):
            return False
        file_result(run, args, best)
    return True


def trained(run: Run, args: argparse.Namespace, images: str, given: str | None, deadline: float) -> bool:
    """Train to the end and save the set of its own SPARTA; False if an epoch would end after the deadline.

    `given`: the set that the run gets frozen, if it gets one.
    """
    folder, done = args.runs / run.name, 0
    checkpoint = folder / "checkpoint.pt"
    seconds = [float(row["seconds"]) for row in loop.read_log(folder / "log.csv")]
    if resume := checkpoint.exists():
        done = read_checkpoint(checkpoint)["epoch"]
    epochs = loop.epochs(
        settings_of(run, args, given),
        Recipe(**run.numbers()),
        out=folder,
        data_dir=images,
        device=args.device,
        resume=resume,
        compile=args.compile,
    )
    with closing(epochs):
        while done < run.epochs:
            if time.monotonic() + (statistics.median(seconds) if seconds else 0) > deadline:
                print(f"{run.name}: stopped after epoch {done} of {run.epochs}, out of time")
                return False
            row = next(epochs)
            seconds.append(row["seconds"])
            done = row["epoch"]
            print(f"{run.name}, epoch {done} of {run.epochs}: {loop.format_row(row)}", flush=True)
    if run.set is None:
        model, settings = load_trained(checkpoint)
        if activations := activations_of(model):
            round_to_half(activations)
            info = {"backbone": f"{run.arch} of width {run.width}", "recipe": settings}
            SpartaSet(activations, info).save_pretrained(folder / "set")
    return True


def settings_of(run: Run, args: argparse.Namespace, given: str | None) -> loop.Settings:
    """What a run trains."""
    same = ("dataset", "arch", "activation", "sites", "width", "seed", "validation", "recipe")
    numbers = {k: getattr(run, k) for k in same}
    return loop.Settings(**numbers, pretrained=given, amp=args.amp, limit=run.limit or None)


def checkpoints_of(folder: Path, best: bool) -> list[Path]:
    """What is evaluated of a run: the last epoch and, with `best`, the best one."""
    return [folder / "checkpoint.pt", *([folder / BEST] if best else [])]


def evaluated(run: Run, args: argparse.Namespace, images: str, best: bool, deadline: float) -> bool:
    """Evaluate the last epoch, and the best one if `best`; False if a part would end after the deadline."""
    places = [str(c) for c in checkpoints_of(args.runs / run.name, best)]
    protocol = PROTOCOLS[run.evaluation]
    parts = evaluate.evaluations(places, protocol, data_dir=images, seed=run.seed, device=args.device)
    with closing(parts):
        for seconds in parts:
            if time.monotonic() + seconds > deadline:
                print(f"{run.name}: trained; its evaluation is not done, out of time")
                return False
    return True


def file_result(run: Run, args: argparse.Namespace, best: bool) -> None:
    """Write the run's result, whole or not at all; with `best`, also what its best epoch measured."""
    folder = args.runs / run.name
    measured, log = read_evaluation(folder / RECORD), loop.read_log(folder / "log.csv")
    model, settings = load_trained(folder / "checkpoint.pt")
    begun = read_begun(folder)
    copied = ("errors", "test images", "machine", "torch")
    result = {
        "run": run.name,
        "settings": run.settings(),
        "training images": settings["images"],
        **{k: measured[k] for k in copied},
        "seconds per epoch": statistics.median(float(row["seconds"]) for row in log),
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply-adds": multiply_adds(model),
        "last epoch": _floats(log[-1]),
        "date": datetime.date.today().isoformat(),
        "git commit": begun["git commit"] if begun else "unknown",
        "commands": commands(run, args, settings["pretrained"], best),
    }
    if best:
        state = read_best(folder, settings)
        result["best errors"] = read_evaluation((folder / BEST).parent / RECORD)["errors"]
        row = next((r for r in log if r["epoch"] == str(state["epoch"])), {})
        known = {"epoch": state["epoch"], "validation error": state["validation error"]}
        result["best epoch"] = _floats(row | known)
    args.results.mkdir(parents=True, exist_ok=True)
    write_record(args.results / f"{run.name}.json", result)
    print(f"filed: {args.results / run.name}.json")


def commands(run: Run, args: argparse.Namespace, given: str | None, best: bool) -> list[str]:
    """A training and an evaluation that make the result again, in folders of any machine."""
    runs, images = Path("runs"), "sample" if run.sample else f"DATA/{FOLDERS[run.dataset]}"
    if run.set and given == str(args.runs / run.set / "set"):
        given = str(runs / run.set / "set")
    folder, rest = runs / run.name, {"data": images, "seed": run.seed, "device": args.device}
    settings = dataclasses.asdict(settings_of(run, args, given)) | {"epochs": run.epochs, "lr": run.lr}
    training = {"out": folder, **settings, "compile": args.compile, **rest}
    evaluation = {"protocol": run.evaluation, **rest}
    return [_command("train", [], training), _command("evaluate", checkpoints_of(folder, best), evaluation)]


def _command(name: str, places: list[Path], options: dict[str, Any]) -> str:
    given = [(f"--{k}", str(v)) for k, v in options.items() if v is not None]
    words = ["python", "-m", "examples.paper", name, *map(str, places)]
    return shlex.join([*words, *(word for option in given for word in option)])


def _floats(row: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in row.items() if v != ""}


def multiply_adds(model: nn.Module) -> int:
    """Multiply-adds of one forward pass of a 32 x 32 image, as torch counts them."""
    # it does not know the fused attention of CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 3, 32, 32))
    return int(counter.get_total_flops()) // 2


def commit() -> str:
    """Commit of this checkout, and whether its code has changed since; "unknown" where there is no git."""
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
        return "unknown"
    return head + (", changed" if changed else "")
