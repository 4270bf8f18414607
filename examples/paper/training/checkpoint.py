"""The checkpoints of a training: read them, and load the network that they hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from examples.paper.common.data import DATASETS
from examples.paper.common.models import ResNet, build

BEST = Path("best", "checkpoint.pt")  # in the folder of a training that holds out images for validation


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `Trainer.save` or `Trainer.save_network` wrote. Raises `ValueError` for any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zipfile, pickle or torch, by what is wrong with the file
        raise ValueError(
            f"{path} cannot be read as a checkpoint of a training ({type(error).__name__})"
        ) from error
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
    model, weights = network(state["settings"]), state["model"]
    if state["average"] is not None:
        weights = {k.removeprefix("module."): v for k, v in state["average"].items() if k != "n_averaged"}
    model.load_state_dict(weights)
    return model.eval(), state["settings"]
