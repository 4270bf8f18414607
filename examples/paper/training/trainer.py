"""One training run: network, optimizer and schedule, the step they take, and the checkpoint."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from examples.paper.attacks.pgd import attacking, autocast, pgd_steps, random_images, random_targets
from examples.paper.common import data
from examples.paper.common.activations import AsRead
from examples.paper.common.atomic import atomic_write
from examples.paper.training.checkpoint import fitting, read_checkpoint
from examples.paper.training.recipes import Recipe
from examples.pgd import check_images, check_logits, is_wrong
from sparta_act import Sparta

Forward = Callable[[Tensor], Tensor]


class Trainer:
    """Network, optimizer and schedule of one run.

    `compiler`: arguments of `torch.compile`, if the network is to be compiled; a smaller last batch is not.
    `digest`: of the training images, which a resumed run must have too.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        images: int,
        *,
        device: str = "cpu",
        amp: bool = False,
        flip: bool = True,
        num_classes: int = 10,
        compiler: dict[str, Any] | None = None,
        digest: str | None = None,
    ):
        self.model = model.to(device, memory_format=torch.channels_last)
        self.recipe, self.device, self.amp, self.flip = recipe, device, amp, flip
        self.num_classes, self.labels = num_classes, 2  # of the network, and as many as the labels need
        self.digest = digest
        self.batches = -(-images // recipe.batch_size)
        self.optimizer = torch.optim.SGD(
            parameter_groups(model, recipe), recipe.lr, momentum=0.9, nesterov=recipe.nesterov
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.average = AveragedModel(self.model, use_buffers=True) if recipe.averaging else None
        self.attacked: Forward = self.model
        self.learning: Forward = self.model
        if compiler is not None:  # one for each: in the attack the weights need no gradients
            self.attacked, self.learning = _compiled(self.model, compiler), _compiled(self.model, compiler)
        self.epoch = 0
        self.order = torch.empty(0, dtype=torch.long)  # of the images, in the current epoch
        self.seen, self.seconds = 0, 0.0  # images of it, and the time they took
        self.total = torch.zeros(2, dtype=torch.float64, device=device)  # their losses, how many were wrong

    def run_epoch(
        self, x: Tensor, y: Tensor, bar: "tqdm[Any]", after_batch: Callable[[], None] = lambda: None
    ) -> tuple[float, float]:
        """One epoch, or its rest, over uint8 images x (N, C, H, W) and labels y (N,): mean loss and error.

        `after_batch` may `save`: a resumed run then goes on with the next batch. Fastest with x and y on the
        device: then nothing in the epoch waits for it. Raises `ValueError` for labels that are no classes of
        the network.
        """
        self.labels = check_images(torch.zeros(len(x), 1, 1, 1, device=y.device), y)
        self.model.train()
        if self.seen == 0:
            self.order, self.seconds = torch.randperm(len(x), device=x.device), 0.0
            self.total.zero_()
        order, began = self.order.to(x.device), time.perf_counter() - self.seconds
        bar.update(self.seen)
        while self.seen < len(x):
            batch = order[self.seen : self.seen + self.recipe.batch_size]
            images = data.augment(data.to_float(x[batch], self.device), flip=self.flip)
            images = images.contiguous(memory_format=torch.channels_last)
            self.total += self.step(images, y[batch].to(self.device))
            self.seen, self.seconds = self.seen + len(batch), time.perf_counter() - began
            bar.update(len(batch))
            if self.total.device.type == "cpu":  # elsewhere it would wait for the device
                bar.set_postfix(loss=f"{self.total[0] / self.seen:.2f}", refresh=False)
            after_batch()
        self.epoch, self.seen = self.epoch + 1, 0
        loss, wrong = self.total.tolist()
        return loss / len(x), wrong / len(x)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Attack one batch, learn from the adversarial images only: sum of their losses, how many were wrong.

        Shapes: x (N, C, H, W) in [0, 1], y (N,); result (2,), float64. Raises `ValueError` if targets are not
        drawn among all classes of the network.
        """
        r = self.recipe
        goal = random_targets(y, self.num_classes) if r.targeted and r.steps else y
        x_adv = self._start(x)
        whole = len(x) == r.batch_size
        attacked, learning = (self.attacked, self.learning) if whole else (self.model, self.model)
        attack = {"eps": r.eps, "step_size": r.attack_step, "steps": r.steps, "targeted": r.targeted}
        with attacking(self.model, batch_statistics=r.attack_norm == "train"):
            for moved, _ in pgd_steps(attacked, x, goal, start=x_adv, amp=self.amp, **attack):
                x_adv = moved
        with autocast(self.device, self.amp):
            logits = check_logits(learning(x_adv), len(x_adv), self.labels)
        if r.targeted and r.steps and logits.shape[1] != self.num_classes:
            raise ValueError(
                f"targets are drawn among {self.num_classes} classes, and the network has {logits.shape[1]}: "
                f"give Trainer num_classes={logits.shape[1]}"
            )
        loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=r.label_smoothing)
        self.optimizer.zero_grad()
        (loss / len(x)).backward()
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            decay = decay_after(self.scheduler.last_epoch, r.averaging)
            self.average.multi_avg_fn = get_ema_multi_avg_fn(decay)
            self.average.update_parameters(self.model)
        return torch.stack([loss.detach(), is_wrong(logits, y).sum()]).double()

    def final(self) -> nn.Module:
        """The network to evaluate: the weight average if the recipe has one."""
        return self.model if self.average is None else self.average.module

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Write everything a resumed run needs; the old file stays whole until the new one is."""
        state = {
            "settings": settings,
            "images": self.digest,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "order": self.order,
            "seen": self.seen,
            "seconds": self.seconds,
            "total": self.total,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self._on_cuda() else None,
        }
        with atomic_write(path) as scratch:
            torch.save(state, scratch)

    def save_network(self, path: Path, settings: dict[str, Any], error: float) -> None:
        """Write the network to evaluate and its validation error, without what training needs to go on."""
        state = {"settings": settings, "epoch": self.epoch, "validation error": error}
        state |= {"model": self.final().state_dict(), "average": None}
        with atomic_write(path) as scratch:
            torch.save(state, scratch)

    def load(self, path: Path, settings: dict[str, Any]) -> None:
        """Go on from `path`. Raises `ValueError` if it belongs to another run, or to other images."""
        state = read_checkpoint(path)
        changed = {
            k: (state["settings"].get(k), v) for k, v in settings.items() if state["settings"].get(k) != v
        }
        if changed:
            text = ", ".join(f"{k} was {old!r}, now {new!r}" for k, (old, new) in changed.items())
            raise ValueError(f"{path} is of another run: {text}; give the old settings or another --out")
        if "optimizer" not in state:
            raise ValueError(f"{path} is the network of one epoch alone; go on with the run it came from")
        if state.get("images") != self.digest:
            raise ValueError(
                f"{path} was trained on other images or labels than these, or in another order; "
                "give the old --data, or another --out"
            )
        with fitting(path):
            self.epoch = state["epoch"]
            self.model.load_state_dict(state["model"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.order, self.total = state["order"], state["total"].to(self.device)
            self.seen, self.seconds = state["seen"], state["seconds"]
            torch.set_rng_state(state["rng"])
            if state["cuda_rng"] is not None and self._on_cuda():
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _start(self, x: Tensor) -> Tensor:
        r = self.recipe
        if not r.steps:
            return x
        start = random_images(x, r.eps)
        if r.clean_start:
            clean = torch.rand(len(x), 1, 1, 1, device=x.device) < r.clean_start
            start = torch.where(clean, x, start)
        return start

    def _lr_factor(self, step: int) -> float:
        done = step / (self.batches * self.recipe.epochs)
        if self.recipe.decay == "linear":
            return max(1 - done, 0)
        return 0.1 ** ((done >= 1 / 3) + (done >= 2 / 3))

    def _on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"


def _compiled(model: nn.Module, compiler: dict[str, Any]) -> Forward:
    run = torch.compile(model, dynamic=False, **compiler)

    def forward(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # a recorded network may now reuse its memory
        return run(x)

    return forward


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The parameters that learn, by weight decay and learning rate: a gate's gain, one number, has no decay.

    Readings of the paper that saturate at the network's rate have their own `lr_factor`.
    """
    slow = {id(p): m.lr_factor for m in model.modules() if isinstance(m, AsRead) for p in m.parameters()}
    gains = {id(m.gain) for m in model.modules() if isinstance(m, Sparta)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            kind = slow.get(id(p), 1.0), 0.0 if id(p) in gains else recipe.weight_decay
            groups.setdefault(kind, []).append(p)
    return [{"params": ps, "lr": f * recipe.lr, "weight_decay": decay} for (f, decay), ps in groups.items()]


def decay_after(steps: int, decay: float) -> float:
    """Decay of the average at a step, counted from 1: lower at first, so that it forgets the first weights.

    Until it reaches `decay` it is (1 + steps) / (10 + steps), as in TensorFlow's `ExponentialMovingAverage`:
    the memory of the average is then about a ninth of the training so far.
    """
    return min(decay, (1 + steps) / (10 + steps))
