"""Does AutoAttack on a quick copy find what it finds on the network? `benchmarks/autoattack.py NETWORK ...`

Attacks the first images twice at 8/255: the network itself in float32, and, as evaluate.py does, its copy
with batch norm folded away, in channels_last and, on a GPU, TF32, where the network judges what is found.
Beside it stands what another seed changes.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import data
import networks
import strong
from arithmetic import exact_arithmetic
from command_line import at_least, plain_errors
from measuring import add_machine, begin, changed, told
from report import print_table

WAYS = {  # how, and its seed
    "the network itself": (strong.autoattack, 0),
    "its copy": (strong.autoattack_by_copy, 0),
    "itself, other seed": (strong.autoattack, 1),
}


def main(argv: list[str] | None = None) -> None:
    """Compare as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("network", nargs="+", help=networks.NAMES)
    p.add_argument("--data-dir", default="sample", help="as in evaluate.py (default %(default)s)")
    p.add_argument("--limit", type=at_least(1), default=100, help="test images (default %(default)s)")
    p.add_argument("--batch-size", type=at_least(1), default=250, help="default %(default)s")
    p.add_argument("--steps", type=at_least(1), default=100, help="of its gradients (the standard: 100)")
    p.add_argument("--queries", type=at_least(1), default=5000, help="of Square (the standard: 5000)")
    add_machine(p)
    args = p.parse_args(argv)
    begin(args)
    attack = {"eps": 8 / 255, "batch_size": args.batch_size, "steps": args.steps, "queries": args.queries}
    how = f"{args.steps} steps, {args.queries} queries, batches of {args.batch_size}"
    for name in args.network:
        model, dataset, _ = networks.load(name)
        x, y = (t[: args.limit] for t in data.load("test", args.data_dir, dataset or "cifar10"))
        model, x, y = model.to(args.device), data.to_float(x, args.device), y.to(args.device)
        wrong, seconds, column = {}, {}, {}
        for way, (run, seed) in WAYS.items():
            began = time.perf_counter()
            with exact_arithmetic():
                found = run(model, x, y, seed=seed, title=f"{name}, {way}", **attack)
            wrong[way], seconds[way] = found.wrong, time.perf_counter() - began
            column[f"wrong, {way}"] = f"{int(found.wrong.sum())} of {len(x)}"
            column[f"seconds, {way}"] = f"{seconds[way]:.1f}"
        itself, copy, other = WAYS
        for way in (copy, other):
            column[f"{way}: more, fewer"] = changed(wrong[way], wrong[itself])
        column["times as fast, its copy"] = f"{seconds[itself] / seconds[copy]:.2f}"
        print_table(f"AutoAttack, 8/255, {how}", {Path(name).stem: column})
    print(told(args))


if __name__ == "__main__":
    with plain_errors():
        main()
