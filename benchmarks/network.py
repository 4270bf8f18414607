"""Cost of a whole network with SPARTA, relative to the same network with ReLU.

`python -m benchmarks.network` times one training step and one input gradient (the step that an attack
repeats, with frozen parameters) of the CIFAR ResNet-18 with an activation at the end of each group: ReLU,
SPARTA written plainly, `Sparta`. Then it times the compiled training step, and counts the bytes saved for
backward and the parameters. First it checks that plain and fast SPARTA are the same function. On a CPU it
measures CPU time. `--arch torchvision-resnet50 --batch-size 8` is torchvision's network at 224 x 224.
`--record docs/speed/NAME.json` files the figures, from which `python -m examples.paper pictures cost` draws.
On a GPU: `python -m benchmarks.network --amp bf16 --batch-size 512 --compile default`.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers  # noqa: F401  (torchvision can be imported after it)
from benchmarks.measuring import (
    Lap,
    add_options,
    begin,
    format_setup,
    hold_memory,
    multiply_adds,
    race,
    saved_bytes,
)
from benchmarks.plain import PlainSparta, check_same
from examples.paper.common.cli import COMPILERS, at_least, plain_errors
from examples.paper.common.console import print_table, stamp
from examples.paper.common.models import BLOCKS, build
from examples.paper.common.records import write_record
from sparta_act import Sparta, replace_relus

SITES = "G*.B-1"
CONTENDERS = {"relu": None, "plain": PlainSparta, "sparta": Sparta}
LARGE = ("torchvision-resnet18", "torchvision-resnet50")  # at 224 x 224


def network(arch: str, contender: str, width: int) -> nn.Module:
    """The network with the activation at the end of each group."""
    torch.manual_seed(0)
    if arch in LARGE:
        from torchvision.models import get_model

        model: nn.Module = get_model(arch.removeprefix("torchvision-"), num_classes=1000)
    else:
        model = build(arch, "relu", "", width=width)
    activation = CONTENDERS[contender]
    return replace_relus(model, SITES, activation) if activation else model


def loss_of(model: nn.Module, x: Tensor, y: Tensor, amp: bool) -> Tensor:
    """Cross-entropy of a batch."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        logits = model(x)
    return F.cross_entropy(logits.float() if amp else logits, y)


def training_step(model: nn.Module, x: Tensor, y: Tensor, amp: bool) -> Callable[[], Tensor]:
    """Forward and backward to the parameters, in training mode; returns the loss."""
    model.train().requires_grad_(True)

    def step() -> Tensor:
        model.zero_grad()
        loss = loss_of(model, x, y, amp)
        loss.backward()
        return loss

    return step


def input_step(model: nn.Module, x: Tensor, y: Tensor, amp: bool) -> Callable[[], Tensor]:
    """Forward and backward to the images, in evaluation mode with frozen parameters; returns the gradient."""
    model.eval().requires_grad_(False)
    x = x.detach().clone().requires_grad_()
    return lambda: torch.autograd.grad(loss_of(model, x, y, amp), x)[0]


def compiled_steps(
    models: dict[str, nn.Module], x: Tensor, y: Tensor, amp: bool, how: str
) -> dict[str, Callable[[], Tensor]]:
    """Compiled training steps of relu and sparta. Raises `ValueError` if their loss is not the eager one."""
    steps = {}
    for name in ("relu", "sparta"):
        expected = training_step(models[name], x, y, amp)().item()
        steps[name] = training_step(torch.compile(models[name], **COMPILERS[how]), x, y, amp)
        began = time.perf_counter()
        found = steps[name]().item()
        print(f"{name}: compiled in {time.perf_counter() - began:.0f} s", flush=True)
        if not abs(found - expected) < (0.05 if amp else 1e-3):
            raise ValueError(
                f"{name}: the compiled network has loss {found:.4f}, the eager one {expected:.4f}"
            )
    return steps


def time_cells(kind: str, laps: dict[str, Lap], name: str) -> dict[str, str]:
    """Cells of a contender's column, empty if it did not run."""
    lap = laps.get(name)
    return {
        f"{kind}, ms": f"{1e3 * lap.seconds:.0f}" if lap else "",
        f"{kind} / relu": lap.format_ratio() if lap else "",
    }


def work(model: nn.Module, x: Tensor, y: Tensor, amp: bool) -> dict[str, float]:
    """Multiply-adds and bytes saved of one training step per image, and parameters."""
    step = training_step(model, x, y, amp)
    return {
        "multiply-adds": multiply_adds(step) / len(x),
        "saved": saved_bytes(model, lambda: loss_of(model, x, y, amp)) / len(x),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def options() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arch", choices=(*BLOCKS, *LARGE), default="resnet18", help="default %(default)s")
    p.add_argument("--width", type=at_least(8), default=64, help="default %(default)s")
    p.add_argument("--batch-size", type=at_least(2), default=64, help="default %(default)s")
    p.add_argument(
        "--compile",
        choices=("none", *COMPILERS),
        default="default",
        help="default %(default)s, which needs a C++ compiler; none: eager only",
    )
    p.add_argument("--amp", choices=("bf16",), help="mixed precision")
    p.add_argument("--record", type=Path, help="a JSON file for the figures")
    add_options(p, rounds=3)
    return p


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says."""
    args = options().parse_args(argv)
    begin(args)
    hold_memory()
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
    amp, size = args.amp == "bf16", 224 if args.arch in LARGE else 32
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    models = {
        name: network(args.arch, name, args.width).to(args.device, memory_format=torch.channels_last)
        for name in CONTENDERS
    }
    two, y_two = torch.rand(2, 3, size, size), torch.tensor([0, 1])
    worst = check_same(models["sparta"], models["plain"], two, lambda m, x: loss_of(m, x, y_two, False))
    print(f"plain and fast SPARTA: the same loss and gradients in float64 to {worst:.0e}", flush=True)
    x = torch.rand(args.batch_size, 3, size, size, device=args.device).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (len(x),), device=args.device)

    columns: dict[str, dict[str, str]] = {name: {} for name in models}
    found: dict[str, dict[str, Lap]] = {}
    kinds = {"training": training_step, "input grad": input_step}
    for kind, step_of in kinds.items():
        steps = {name: step_of(model, x, y, amp) for name, model in models.items()}
        laps = found[kind] = race(steps, args.rounds, kind, clock=clock)
        for name, column in columns.items():
            column |= time_cells(kind, laps, name)
    if args.compile != "none":
        steps = compiled_steps(models, x, y, amp, args.compile)
        laps = found["compiled"] = race(steps, args.rounds, "compiled", clock=clock)
        for name, column in columns.items():
            column |= time_cells("compiled", laps, name)
    figures = {name: work(model, x, y, amp) for name, model in models.items()}
    units = {"multiply-adds": (1e9, "1e9", 2), "saved": (1e6, "MB", 2), "parameters": (1e6, "1e6", 3)}
    for name, column in columns.items():
        for what, (unit, label, digits) in units.items():
            figure = figures[name][what]
            column[f"{what}, {label}"] = f"{figure / unit:.2f}"
            column[f"{what} / relu"] = f"{figure / figures['relu'][what]:.{digits}f}"
    which = args.arch if args.arch in LARGE else f"{args.arch} width {args.width}"
    print_table(f"{which}, {SITES}, {args.amp or 'float32'}, batch {len(x)}, channels_last", columns)
    print("compiled: the training step, relative to compiled relu; multiply-adds and saved: per image")
    print(format_setup(args))
    if args.record:
        setup = {"network": which, "size": size, "batch": len(x), "precision": args.amp or "float32"}
        times = {kind: {n: lap._asdict() for n, lap in laps.items()} for kind, laps in found.items()}
        write_record(args.record, {**setup, "times": times, "counts": figures, **stamp()})


if __name__ == "__main__":
    with plain_errors():
        main()
