"""How to train, as numbers: the attack in the loop (L-infinity PGD), the optimizer (SGD, momentum 0.9)."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from examples.paper.common.cli import at_least, fraction, not_negative, positive, share


def _field(default: Any, kind: Callable[[str], Any], text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"type": kind, "help": text, **more})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to train; the defaults are the paper's (SPARTA sections 2.3.1 and 4.1, after Xie et al. 2019).

    The paper names neither its epochs nor its batch size, Nesterov, clean starts or the network's mode in
    the attack: those are ours.
    """

    steps: int = _field(10, at_least(0), "of PGD in training; 0 is standard training")
    eps: float = _field(16 / 255, fraction, "largest change of a pixel")
    step_size: float = _field(1 / 255, fraction, "of PGD")
    step_rule: str = _field(
        "constant",
        str,
        "`constant`: every step is step_size; `reach`: at least eps / steps, so that few steps still cross "
        "the ball (Xie et al. 2019)",
        choices=("constant", "reach"),
    )
    targeted: bool = _field(
        True, bool, "attack towards a random other class; else away from the true one (Madry et al. 2018)"
    )
    clean_start: float = _field(
        0.0, share, "probability that the attack on an image starts from the image itself (Xie et al.: 0.2)"
    )
    attack_norm: str = _field(
        "eval",
        str,
        "what batch norm uses during the attack: its running statistics (`eval`, as the network is used), or "
        "those of the attacked batch (`train`, as in many public loops); neither changes the running ones",
        choices=("eval", "train"),
    )
    epochs: int = _field(90, at_least(1), "over the training images")
    batch_size: int = _field(128, at_least(1), "images")
    lr: float = _field(0.1, positive, "learning rate at the start")
    decay: str = _field(
        "steps",
        str,
        "`steps`: a tenth of the rate after one and again after two thirds of the epochs (the paper's 30 and "
        "60); `linear`: down to 0 at the end",
        choices=("steps", "linear"),
    )
    nesterov: bool = _field(False, bool, "Nesterov's momentum")
    weight_decay: float = _field(1e-4, not_negative, "of all parameters except SPARTA's gain")
    label_smoothing: float = _field(0.0, share, "share of the label spread over all classes, in the update")
    averaging: float = _field(
        0.0,
        share,
        "decay per step of an exponential average of the weights, which is then evaluated; at first lower, "
        "(1 + step) / (10 + step); 0: no average",
    )

    @property
    def attack_step(self) -> float:
        """Size of one step of the attack, by the step rule."""
        return max(self.step_size, self.eps / self.steps) if self.step_rule == "reach" else self.step_size


# what tables of robust accuracy compare: untargeted at 8/255
MODERN = Recipe(
    targeted=False,
    eps=8 / 255,
    step_size=2 / 255,
    epochs=30,
    weight_decay=5e-4,
    decay="linear",
    averaging=0.999,
)

RECIPES = {
    "paper": Recipe(),
    "modern": MODERN,
    # the same in one step, for a CPU (Wong et al. 2020, arXiv:2001.03994)
    "single": dataclasses.replace(MODERN, steps=1, step_size=10 / 255, epochs=8),
    # the paper's standard training: no attack, all else equal
    "standard": Recipe(steps=0),
    # for a CPU: the paper's ten steps taken as one (single-step training: Wong et al. 2020, arXiv:2001.03994)
    "fast": Recipe(steps=1, step_size=10 / 255, epochs=4, decay="linear"),
}

HELP = """preset of the options below (default: paper). `paper`: targeted PGD-10 at 16/255, 90 epochs (ours).
`modern`: untargeted PGD-10 at 8/255, 30 epochs, weight averaging. `single`: the same in one step of 10/255, 8
epochs, for a CPU. `standard`: no attack. `fast`: one targeted step, 4 epochs, for a CPU (--width 16)"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--recipe` and one option for each field of a recipe."""
    group = parser.add_argument_group(
        "recipe", "In brackets: the value of the preset `paper`, which is ours where the paper names none."
    )
    group.add_argument("--recipe", choices=RECIPES, default="paper", help=HELP)
    for f in dataclasses.fields(Recipe):
        kind, text, choices = f.metadata["type"], f.metadata["help"], f.metadata.get("choices")
        more: dict[str, Any] = {"type": kind, "choices": choices}
        if kind is bool:
            more = {"action": argparse.BooleanOptionalAction}
        default = "16/255" if f.name == "eps" else "1/255" if f.name == "step_size" else f.default
        option = "--" + f.name.replace("_", "-")
        group.add_argument(option, default=argparse.SUPPRESS, help=f"{text} [{default}]", **more)


def chosen(args: argparse.Namespace) -> Recipe:
    """The recipe of a command line."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if hasattr(args, f.name)}
    return dataclasses.replace(RECIPES[args.recipe], **given)
