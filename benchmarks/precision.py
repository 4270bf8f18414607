"""Do steps in bfloat16 fool as many images as steps in float32? `benchmarks/precision.py CHECKPOINT ...`

Attacks each network by PGD twice from the same random start, with the steps in float32 and in bfloat16, and
asks the network in float32 what it makes of the images. Beside it stands what another random start changes.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import data
from arithmetic import exact_arithmetic
from command_line import at_least, plain_errors
from measure import MODERN, PAPER, find_errors
from measuring import add_machine, begin, changed, told
from report import print_table
from train import load_trained

STARTS = {"float32": (0, False), "bfloat16": (0, True), "other start": (1, False)}  # its seed, and amp


def main(argv: list[str] | None = None) -> None:
    """Compare as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path, nargs="+", help="checkpoint.pt of train.py")
    p.add_argument("--data-dir", default="sample", help="as in evaluate.py (default %(default)s)")
    p.add_argument("--limit", type=at_least(1), default=500, help="test images (default %(default)s)")
    p.add_argument("--steps", type=at_least(1), default=50, help="of PGD (default %(default)s)")
    add_machine(p)
    args = p.parse_args(argv)
    begin(args)
    attacks = {"targeted, 16/255": PAPER, "untargeted, 8/255": MODERN}
    for path in args.checkpoint:
        model, settings = load_trained(path)
        x, y = (t[: args.limit] for t in data.load("test", args.data_dir, settings["dataset"]))
        columns = {}
        for title, attack in attacks.items():
            wrong, seconds = {}, {}
            for how, (seed, amp) in STARTS.items():
                torch.manual_seed(seed)
                began, pgd = time.perf_counter(), {**attack, "steps": args.steps, "amp": amp}
                with exact_arithmetic():
                    found = find_errors(model, x, y, {how: pgd}, device=args.device, title=f"{title}, {how}")
                wrong[how], seconds[how] = found[how], time.perf_counter() - began
            base = wrong["float32"]
            columns[title] = {f"wrong, {how}": str(int(w.sum())) for how, w in wrong.items()}
            for how in ("bfloat16", "other start"):
                columns[title][f"{how}: more, fewer"] = changed(wrong[how], base)
            columns[title]["times as fast"] = f"{seconds['float32'] / seconds['bfloat16']:.2f}"
        print_table(f"{path.parent.name}: PGD-{args.steps} on {len(x)} test images", columns)
    print(told(args))


if __name__ == "__main__":
    with plain_errors():
        main()
