"""Seconds per epoch of adversarial training, with and without SPARTA, eager and compiled.

`python benchmarks/epoch.py --amp bf16 --compile none cudagraphs reduce-overhead` trains each network on a few
batches of random images, exactly as `examples/train.py` would, after as many to warm up, and scales the time
to an epoch of 50,000 images. Every time stands beside its ratio to ReLU's in the same run.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import recipes
from command_line import at_least, plain_errors
from models import ACTIVATIONS, BLOCKS, build
from report import print_table, stamp
from trainer import COMPILERS, Trainer

EPOCH = 50_000


def measure(trainer: Trainer, batches: int) -> dict[str, float]:
    """Seconds to be ready, then seconds per epoch of 50,000 images, median of three, and memory in GiB."""
    size = trainer.recipe.batch_size
    x = torch.randint(0, 256, (batches * size, 3, 32, 32), dtype=torch.uint8, device=trainer.device)
    y = torch.randint(0, 10, (len(x),), device=trainer.device)
    on_cuda = x.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    with tqdm(disable=True) as bar:
        for warm_up in (True, False, False, False):
            began = time.perf_counter()
            trainer.run_epoch(x, y, bar)  # its last line waits for the device
            seconds.append(time.perf_counter() - began)
            if warm_up:
                ready = seconds.pop()
    epoch = sorted(seconds)[1] * EPOCH / len(x)
    return {
        "ready": ready,
        "epoch": epoch,
        "memory": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else 0,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arch", choices=BLOCKS, default="resnet18", help="default %(default)s")
    p.add_argument("--width", type=at_least(8), default=64, help="default %(default)s")
    p.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        nargs="+",
        default=["relu", "sparta"],
        help="the first is what the others are compared with (default %(default)s)",
    )
    p.add_argument("--compile", choices=("none", *COMPILERS), nargs="+", default=["none"])
    p.add_argument("--batches", type=at_least(1), default=40, help="to measure (default %(default)s)")
    p.add_argument("--amp", choices=("bf16",), help="mixed precision")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    recipes.add_options(p)
    args = p.parse_args(argv)
    recipe = dataclasses.replace(recipes.chosen(args), epochs=1000)  # the rate stays, whatever the batches
    torch.backends.cudnn.benchmark = True
    columns: dict[str, dict[str, str]] = {}
    for how in args.compile:
        first = None
        for activation in args.activation:
            torch.manual_seed(0)
            torch.compiler.reset()
            trainer = Trainer(
                build(args.arch, activation, "G*.B-1", width=args.width),
                recipe,
                args.batches * recipe.batch_size,
                device=args.device,
                amp=args.amp == "bf16",
                compiler=None if how == "none" else COMPILERS[how],
            )
            m = measure(trainer, args.batches)
            first = first or m["epoch"]
            columns[f"{activation}, {how}"] = {
                "seconds per epoch": f"{m['epoch']:.1f}",
                f"times {args.activation[0]}": f"{m['epoch'] / first:.2f}",
                "first batches, s": f"{m['ready']:.1f}",
                "memory, GiB": f"{m['memory']:.2f}" if m["memory"] else "",
            }
            print(f"{activation}, {how}: {columns[f'{activation}, {how}']}", flush=True)
            del trainer
    rows = {
        row: {name: column[row] for name, column in columns.items()} for row in next(iter(columns.values()))
    }
    numbers = f"{args.amp or 'float32'}, PGD-{recipe.steps}, batch {recipe.batch_size}"
    print_table(f"{args.arch} width {args.width}, {numbers}", rows)
    print("; ".join(f"{what} {value}" for what, value in stamp().items()))


if __name__ == "__main__":
    with plain_errors():
        main()
