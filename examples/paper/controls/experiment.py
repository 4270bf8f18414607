"""One network of an experiment: trained, measured, and kept in a file, so that a killed call goes on."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks.pgd import attacking
from examples.paper.attacks.robust_error import clean_errors, robust_errors
from examples.paper.common import data
from examples.paper.common.console import stamp
from examples.paper.common.records import check_errors, sha256, write_record
from examples.paper.common.statistics import Pair, entry, pair_of
from examples.paper.training.gate_statistics import gate_statistics
from examples.paper.training.recipes import RECIPES
from examples.paper.training.trainer import Trainer

OUT = Path(__file__).parents[3] / "docs" / "results" / "controls"
TEST = 2000  # images, the first
PGD = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 10}
Make = Callable[[], nn.Module]
Images = tuple[Tensor, Tensor]  # (N, 3, H, W) uint8 and their labels (N,)
Result = dict[str, Any]
Results = dict[str, list[Result]]  # of each network, by seed


def once(out: Path, name: str, make: Make, train: Images, test: Images, options: dict[str, Any]) -> Result:
    """The result of `run` with these options on these images: from its file, or into it.

    Raises `ValueError` if that file is something else.
    """
    path = file_of(out, options["experiment"], name, options["seed"])
    options = options | {"images": sha256(*(t.numpy().tobytes() for t in (*train, *test)))}
    if not path.exists() or read(path)["options"] != options:
        print(f"{name}, seed {options['seed']}", flush=True)
        write_record(path, {"label": name, **run(make, *train, test, options)})
    return read(path)


def file_of(out: Path, experiment: str, name: str, seed: int) -> Path:
    """Where `once` keeps the result of a network of that name."""
    experiment, name = (re.sub("[^a-z0-9]+", "-", text.lower()) for text in (experiment, name))
    return out / f"{experiment}-{name}-seed{seed}.json"


def read(path: Path) -> Result:
    """What `once` wrote. Raises `ValueError` for a file that is not a result."""
    try:
        result: Result = json.loads(path.read_text())
        result["label"], result["options"]["seed"], result["gate"]
        check_errors(result["errors"])
    except (ValueError, KeyError, TypeError) as error:
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
    """The network after one of `RECIPES`, `single` if none is named; it trains `model` itself."""
    changes = {k: options[k] for k in ("epochs", "batch_size", "lr")}
    recipe = replace(RECIPES[options.get("recipe", "single")], **changes)
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
