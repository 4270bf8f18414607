"""AutoAttack (Croce & Hein 2020, arXiv:2003.01690) by its authors' library, an optional extra."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks import attacking

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")


def autoattack(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, seed: int, batch_size: int, title: str
) -> tuple[Tensor, list[str]]:
    """Which images AutoAttack's standard version gets wrong, and what the library warned of.

    Each part (APGD-CE, targeted APGD, targeted FAB, Square) attacks what the parts before it left standing.
    `eps` is a fraction of 1 (L-infinity).

    Shapes: x (N, C, H, W) in [0, 1], y (N,), both where the model is; result (N,) of bool, on the CPU.
    Raises `ValueError` if the library is not installed.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise ValueError('AutoAttack is not installed: pip install "sparta-act[autoattack]"') from None
    with attacking(model), tqdm(total=len(PARTS), desc=title, unit="part") as bar, _Listener(bar) as listener:
        attack = AutoAttack(model, norm="Linf", eps=eps, version="standard", seed=seed, device=x.device)
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=batch_size)
        with torch.no_grad():
            predicted = [model(part).argmax(1) for part in x_adv.split(batch_size)]
    return (torch.cat(predicted) != y).cpu(), listener.warnings


class _Listener(logging.Handler):
    """Turns the library's log into a progress bar, and keeps its warnings."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        super().__init__(logging.DEBUG)
        self.bar, self.warnings = bar, list[str]()
        self.logger = logging.getLogger("auto-attack")

    def __enter__(self) -> "_Listener":
        self.before = self.logger.level, self.logger.propagate
        self.logger.setLevel(logging.DEBUG)
        self.logger.propagate = False
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.level, self.logger.propagate = self.before

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            self.warnings.append(message)
        elif message.startswith("robust accuracy after"):
            self.bar.update()
        else:
            self.bar.set_postfix_str(message, refresh=True)
