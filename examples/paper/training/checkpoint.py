"""The checkpoints of a training: read them, and load the network that they hold."""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from examples.paper.common.data import DATASETS
from examples.paper.common.models import ResNet, build

BEST = Path("best", "checkpoint.pt")  # in the folder of a training that holds out images for validation


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `Trainer.save` or `Trainer.save_network` wrote. Raises `ValueError` for any other file.

    Also for a damaged one: torch writes checksums and never looks at them.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; `train` writes checkpoint.pt into its --out")
    try:
        with path.open("rb") as file:
            with zipfile.ZipFile(file) as parts:
                # torch skips what is marked as a folder, and gives numbers from nowhere
                damaged = parts.testzip() or any(part.external_attr for part in parts.infolist())
            file.seek(0)
            state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of zipfile, pickle or torch, by what is wrong with the file
        raise ValueError(
            f"{path} cannot be read as a checkpoint of a training ({type(error).__name__}): it is damaged or "
            "another file; bring back a copy, or begin anew in another --out"
        ) from error
    if damaged:
        raise ValueError(
            f"{path} is damaged: its bytes do not match its checksums; bring back a copy, or begin "
            "anew in another --out"
        )
    if not isinstance(state, dict) or not {"settings", "epoch", "model", "average"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of a training; give the checkpoint.pt in its --out")
    return state


def read_best(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The best epoch of a training with these settings: its network, its number and its validation error.

    Raises `ValueError` if it is not there or belongs to another training.
    """
    path = out / BEST
    state = read_checkpoint(path) if path.exists() else None
    if state and state["settings"] == settings and "validation error" in state:
        return state
    problem = "is of another run" if state else "is not there"
    raise ValueError(f"{path}, the best epoch of {out}, {problem}; bring it back, or begin {out} anew")


def network(settings: Mapping[str, Any]) -> ResNet:
    """A network as trainings with these settings begin with it."""
    return build(
        settings["arch"],
        settings["activation"],
        settings["sites"],
        width=settings["width"],
        pretrained=settings["pretrained"],
        num_classes=len(DATASETS[settings["dataset"]].classes),
        dataset=settings["dataset"],
    )


def load_trained(path: Path | str) -> tuple[ResNet, dict[str, Any]]:
    """Network of a checkpoint, in evaluation mode, and the settings it was trained with.

    Where the training averages the weights, it is their average.
    """
    state = read_checkpoint(Path(path))
    with fitting(path):
        model, weights = network(state["settings"]), state["model"]
        if state["average"] is not None:
            weights = {k.removeprefix("module."): v for k, v in state["average"].items() if k != "n_averaged"}
        model.load_state_dict(weights)
    return model.eval(), state["settings"]


@contextmanager
def fitting(path: Path | str) -> Iterator[None]:
    """Turn what a checkpoint of another program or version raises into a `ValueError`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path} is of another program or version: {text}") from error
