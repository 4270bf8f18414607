"""The networks of an experiment: trained, measured, each kept in a file, so that a killed call goes on."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks.pgd import attacking
from examples.paper.attacks.robust_error import clean_errors, robust_errors
from examples.paper.common import data
from examples.paper.common.console import stamp
from examples.paper.common.lock import lock
from examples.paper.common.records import check_errors, read_json, sha256, write_record
from examples.paper.common.statistics import Pair, entry, pair_of
from examples.paper.training.gate_statistics import gate_statistics
from examples.paper.training.recipes import RECIPES, Recipe
from examples.paper.training.trainer import Trainer

OUT = Path(__file__).parents[3] / "docs" / "results" / "controls"
TEST = 2000  # images, the first
PGD = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 10}
Make = Callable[[], nn.Module]
Images = tuple[Tensor, Tensor]  # (N, 3, H, W) uint8 and their labels (N,)
Result = dict[str, Any]
Results = dict[str, list[Result]]  # of each network, by seed


class Job(NamedTuple):
    """A network of an experiment."""

    label: str
    make: Make
    options: dict[str, Any]  # all that its result depends on, but the images


def results(out: Path, jobs: Sequence[Job], train: Images, test: Images) -> Results:
    """The result of `run` of each job on these images: from its file, or into it.

    Raises `ValueError` before anything is trained: if two jobs have one file, if a file is something else or
    the result of other options, and if another process works in the folder.
    """
    images = sha256(*(t.numpy().tobytes() for t in (*train, *test)))
    jobs = [job._replace(options=job.options | {"images": images}) for job in jobs]
    paths = [file_of(out, job.options["experiment"], job.label, job.options["seed"]) for job in jobs]
    if twice := [path.name for path, count in Counter(paths).items() if count > 1]:
        raise ValueError(
            f"several results would go into {', '.join(twice)}: give each seed, name and rate once"
        )
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"{out} cannot be written to; name another --out")
    found: Results = {}
    with lock(out):
        for path, job in zip(paths, jobs, strict=True):
            _check(path, job.options)
        for path, (label, make, options) in zip(paths, jobs, strict=True):
            if not path.exists():
                print(f"{label}, seed {options['seed']}", flush=True)
                write_record(path, {"label": label, **run(make, *train, test, options)})
            found.setdefault(label, []).append(read(path))
    if len({tuple(result["errors"]) for of_one in found.values() for result in of_one}) > 1:
        raise ValueError(f"the results in {out} are of different attacks; delete those that lack one")
    return found


def _check(path: Path, options: dict[str, Any]) -> None:
    """Raise `ValueError` if there is a result of other options."""
    if not path.exists():
        return
    then = read(path)["options"]
    if unlike := sorted(k for k in then.keys() | options.keys() if then.get(k) != options.get(k)):
        raise ValueError(
            f"{path} is a result of other options, which would be lost ({', '.join(unlike)}): name another "
            "--out, or move it"
        )


def file_of(out: Path, experiment: str, name: str, seed: int) -> Path:
    """Where `results` keeps the result of a network of that name."""
    experiment, name = (re.sub("[^a-z0-9]+", "-", text.lower()) for text in (experiment, name))
    return out / f"{experiment}-{name}-seed{seed}.json"


def read(path: Path) -> Result:
    """What `results` wrote. Raises `ValueError` for a file that is not a result."""
    try:
        result: Result = read_json(path)
        texts = [result[k] for k in ("label", "machine", "torch", "date")] + [result["options"]["images"]]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{texts} are not all texts")
        int(result["options"]["seed"]), [dict(numbers) for numbers in result["gate"].values()]
        check_errors(result["errors"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a result of `controls` ({error!r}); delete it, or name another --out"
        ) from None
    return result


def run(make: Make, x: Tensor, y: Tensor, test: Images, options: dict[str, Any]) -> Result:
    """Train one network and measure it, for JSON; in `drop-in` it is measured before too."""
    model, images, labels = make(), data.to_float(test[0]), test[1]
    found = {}
    if options["experiment"] == "drop-in":
        found = {f"{k}, before": w for k, w in measure(model, images, labels).items()}
    if options["epochs"]:
        model = trained(model, x, y, options)
    found |= measure(model, images, labels)
    errors = {k: entry(w) for k, w in found.items()}
    return {"options": options, "errors": errors, "gate": gate_statistics(model, images[:256]), **stamp()}


def trained(model: nn.Module, x: Tensor, y: Tensor, options: dict[str, Any]) -> nn.Module:
    """The network after the recipe `single` with the numbers of `options`; it trains `model` itself."""
    changes = {f.name: options[f.name] for f in fields(Recipe) if f.name in options}
    recipe = replace(RECIPES["single"], **changes)
    flip = data.DATASETS[options["dataset"]].flip
    trainer = Trainer(model, recipe, len(x), flip=flip)
    torch.manual_seed(options["seed"])
    with tqdm(total=len(x) * recipe.epochs, unit="img") as bar:
        for _ in range(recipe.epochs):
            trainer.run_epoch(x, y, bar)
    return trainer.final()


def measure(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Which images it gets wrong, (N,) of bool: clean, and under PGD-10 at any step."""
    torch.manual_seed(0)
    with attacking(model):
        clean = clean_errors(model, x, y)
    return {"clean": clean, "PGD-10, 8/255": robust_errors(model, x, y, **PGD)}


def pairs_of(results: list[Result], others: list[Result], attack: str) -> list[Pair]:
    """Of each seed, what both networks get wrong. Raises `ValueError` if their images differ."""
    both = ([r | {"test images": r["options"]["images"]} for r in rs] for rs in (results, others))
    return [pair_of(*pair, attack) for pair in zip(*both, strict=True)]
