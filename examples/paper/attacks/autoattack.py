"""AutoAttack (Croce & Hein 2020, arXiv:2003.01690) by pyautoattack, an optional extra."""

import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.paper.attacks.folding import folded
from examples.paper.attacks.pgd import attacking, classes_of
from examples.paper.attacks.robust_error import clean_errors
from examples.paper.common.tf32 import tf32_convolutions
from examples.pgd import NO_GRADIENT, check_images, check_logits, check_numbers, no_answer

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")


class Found(NamedTuple):
    """Result of AutoAttack, on the CPU."""

    wrong: Tensor  # (N,) of bool
    images: Tensor  # (N, C, H, W): adversarial where the network errs, else clean
    standing: dict[str, int]  # images still classified correctly after each part
    warnings: list[str]  # of the library, each kind once


def load() -> tuple[Any, Any]:
    """`AutoAttack` and `checks` of pyautoattack. Raises `ValueError` if it is not installed."""
    try:
        from pyautoattack import AutoAttack, checks
    except ImportError:
        raise ValueError("AutoAttack is not installed; in a clone: pip install -e '.[paper]'") from None
    return AutoAttack, checks


@torch.inference_mode(False)
def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    seed: int,
    batch_size: int,
    title: str,
    parts: Sequence[str] = PARTS,
    steps: int = 100,
    queries: int = 5000,
) -> Found:
    """AutoAttack's standard version: each part attacks the images that the parts before it did not break.

    The parts: APGD-CE of 100 steps, targeted APGD and targeted FAB of 100 steps for each of 9 targets, Square
    of 5,000 queries. With other numbers or parts it is not the standard version. `eps` bounds the L-infinity
    norm. The network is attacked in evaluation mode and restored, without any `.grad`.

    Shapes: x (N, C, H, W) in [0, 1], y (N,), both on the model's device.
    Raises `ValueError` if the library is not installed, for images, labels, numbers or logits that no attack
    can work with (`examples.pgd`), and for targeted APGD on fewer than four classes.
    """
    make, checks = load()
    check_numbers(eps=eps, batch_size=batch_size, steps=steps, queries=queries)
    classes = check_images(x, y)
    x, y = x.detach().clone(memory_format=torch.contiguous_format), y.clone()  # the library takes views
    if len(x) == 0:
        return Found(torch.zeros(0, dtype=torch.bool), x.cpu(), dict.fromkeys(parts, 0), [])
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # its counts would add up over the calls of a process
    with attacking(model), tqdm(total=len(parts), desc=title, unit="part") as bar, _Listener(bar) as listener:
        others = _classes_for(parts, model, x, classes) - 1
        judged = _Answering(model, x, y)
        narrow = x.float()  # as the library takes for granted
        attack = make(judged, norm="Linf", eps=eps, version="standard", seed=seed, device=x.device)
        attack.attacks_to_run, attack.square.n_queries = list(parts), queries
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, others)
        attack.fab.n_iter = steps
        for apgd in (attack.apgd, attack.apgd_targeted):
            # its authors derive the schedule from the steps
            apgd.n_iter, apgd.n_iter_2 = steps, max(int(0.22 * steps), 1)
            apgd.n_iter_min, apgd.size_decr = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
        x_adv, predicted = attack.run_standard_evaluation(narrow, y, batch_size=batch_size)
        x_adv = torch.where(x_adv == narrow, x, x_adv.to(x.dtype))
    wrong = (predicted != y).cpu()
    standing, left = {}, int((~wrong).sum())
    for part in reversed(parts):
        standing[part] = left
        left += listener.broken[part]
    return Found(wrong, x_adv.cpu(), {part: standing[part] for part in parts}, listener.first_warnings())


def _classes_for(parts: Sequence[str], model: nn.Module, x: Tensor, classes: int) -> int:
    """Number of classes of the network. Raises `ValueError` if there are too few for the parts."""
    found = classes_of(model, x, classes)
    if "apgd-t" in parts and found < 4:
        raise ValueError(
            f"the targeted DLR loss of apgd-t needs at least 4 classes, and the network has {found}: give "
            f"parts={[p for p in PARTS if p != 'apgd-t']}"
        )
    return found


@torch.inference_mode(False)
def autoattack_by_copy(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int, **attack: Any) -> Found:
    """`autoattack` on a faster copy, whose findings are checked on the network itself.

    The copy has its batch norms folded and runs in channels_last; on a GPU its convolutions use TF32, torch's
    default. Images that only the copy gets wrong are attacked again by all parts, on the network itself in
    the caller's precision. Arguments, shapes and errors are those of `autoattack`.
    """
    load()
    check_numbers(eps=attack["eps"], batch_size=batch_size)
    classes = check_images(x, y)
    x = x.detach()
    with attacking(model):
        if len(x):
            _classes_for(attack.get("parts", PARTS), model, x, classes)
        wrong, images = clean_errors(model, x, y, batch_size), x.clone()
        (right,) = torch.where(~wrong)
        standing, warnings = dict.fromkeys(attack.get("parts", PARTS), 0), list[str]()
        for network, precision in ((folded(model, x[:2]), tf32_convolutions), (model, nullcontext)):
            if not len(right):
                break
            with precision():
                attacked = _ChannelsLast(network)
                found = autoattack(attacked, x[right], y[right], batch_size=batch_size, **attack)
            images[right] = found.images.to(x.device)
            wrong[right] = clean_errors(model, images[right], y[right], batch_size)
            if network is model:  # it may err depending on the rest of the batch
                wrong[right] |= found.wrong.to(x.device)
            standing = {part: standing[part] + left for part, left in found.standing.items()}
            warnings += found.warnings
            right = right[found.wrong.to(x.device) & ~wrong[right]]
    return Found(wrong.cpu(), images.cpu(), standing, warnings)


class _Answering(nn.Module):
    """A network that answers everywhere, so that the library sees an error there and takes no step along it.

    A row of logits that is `no_answer` becomes a sure vote for a class that is wrong for that image, which is
    found among x (N, C, H, W), with labels y (N,), as the nearest.
    """

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor):
        super().__init__()
        self.network, self.images, self.labels = network, x.flatten(1), y

    def forward(self, x: Tensor) -> Tensor:
        follows = x.requires_grad and torch.is_grad_enabled()
        if follows:
            x = x.clone()
            x.register_hook(lambda grad: grad.nan_to_num().contiguous())
        answer = self.network(x.to(self.images.dtype).clone())  # it may work in place
        logits = check_logits(answer, len(x)).to(x.dtype)
        logits = logits.clone() if logits.is_inference() else logits
        if follows and not logits.requires_grad:
            raise ValueError(NO_GRADIENT)
        missing = no_answer(logits)
        (unanswered,) = torch.where(missing)
        if len(unanswered) == 0:
            return logits
        votes = logits.detach().nan_to_num(0.0)
        for i in unanswered:
            own = (self.images - x[i].detach().flatten()).abs().amax(1).argmin()
            votes[i] = -1.0
            votes[i, (self.labels[own] + 1) % logits.shape[1]] = 1.0
        return torch.where(missing[:, None], votes, logits)


class _ChannelsLast(nn.Module):
    """Runs a network in channels_last; its inputs and their gradients are contiguous."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.channels_last)
        if x.requires_grad:
            x.register_hook(torch.Tensor.contiguous)  # the library takes views of them
        return self.network(x)


class _Listener(logging.Handler):
    """Turns the library's log into a progress bar, counts what each part broke and collects warnings."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        super().__init__(logging.DEBUG)
        self.bar, self.broken = bar, dict.fromkeys(PARTS, 0)
        self.warnings: dict[str, list[str]] = {}  # by message without its digits
        self.logger = logging.getLogger("auto-attack")

    def __enter__(self) -> "_Listener":
        self.before = self.logger.level, self.logger.propagate
        self.logger.setLevel(logging.DEBUG)
        self.logger.propagate = False
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        level, self.logger.propagate = self.before
        self.logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            self.warnings.setdefault(re.sub(r"\d+", "", message), []).append(message)
        elif batch := re.fullmatch(r"(\S+) - \d+/\d+ - (\d+) out of \d+ successfully perturbed", message):
            self.broken[batch[1]] += int(batch[2])
            self.bar.set_postfix_str(message)
        elif message.startswith("robust accuracy after"):
            self.bar.update()

    def first_warnings(self) -> list[str]:
        """First warning of each kind, and the number of further ones."""
        return [
            first + (f" (and {len(more)} more of this kind)" if more else "")
            for first, *more in self.warnings.values()
        ]
