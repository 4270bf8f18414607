"""Is a robustness figure real, or gradient masking? `python -m examples.paper audit NETWORK`.

Attacks the network in about thirty ways, runs twelve checks on the results, and prints a row for each check:
its figure, its verdict, and what that means. It also prints the network's error in the worst case over all
attacks, next to that under plain PGD.

NETWORK is a checkpoint.pt of `train`, a file of weights (examples/networks), or FILE.py:FUNCTION, where the
function returns any network that takes images in [0, 1] and returns logits. Needs AutoAttack:
pip install -e '.[paper]' in a clone.

Writes into --out: audit.json (all figures), audit.md (the table), audit.png (one page of plots) and
audit.safetensors (for every image that broke, the image that fooled the network, for anybody to check). A
killed audit goes on from there.

Exits with 0 if no check fails or is suspect, with 1 if a check fails, with 2 if the audit could not run, and
with 3 if a check is suspect: its figure is beyond the tolerance, on too few images to be sure. An audit
without a FAIL is no certificate: it says that these attacks agree with each other.
"""

import argparse
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from examples.paper.attacks import autoattack
from examples.paper.audit.page import show
from examples.paper.audit.run import audit
from examples.paper.audit.verdicts import FAIL, SUSPECT
from examples.paper.common import data
from examples.paper.common.cli import at_least, check_device, fraction, seed
from examples.paper.common.records import sha256
from examples.paper.common.tf32 import exact_float32
from examples.paper.evaluation import networks
from sparta_act import SpartaError


def parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    p = argparse.ArgumentParser(
        prog="python -m examples.paper audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("network", help=networks.NAMES)
    p.add_argument(
        "--surrogate",
        nargs="+",
        default=[],
        metavar="NETWORK",
        help="networks to attack instead, or to follow the gradients of: its ReLU twin, another seed, or a "
        "copy without its trick. A function of FILE.py:FUNCTION that takes an argument is given a copy of "
        "the audited network (checks 6 and 10)",
    )
    p.add_argument(
        "--data",
        dest="data_dir",
        default="sample",
        help="test images: 'sample' (500 of CIFAR-10, in the repository; default), 'hub', or a folder of "
        "parquet files",
    )
    p.add_argument("--dataset", choices=data.DATASETS, help="for FILE.py:FUNCTION (default: cifar10)")
    p.add_argument(
        "--limit",
        type=at_least(1),
        default=500,
        help="use the first N test images (default %(default)s); with few, most checks lack data",
    )
    p.add_argument("--eps", type=fraction, default=8 / 255, help="bound of the attacks (default 8/255)")
    p.add_argument("--seed", type=seed, default=0, help="of all random numbers (default %(default)s)")
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s"
    )
    p.add_argument("--out", type=Path, help="folder of the results (default: runs/audit/NAME OF THE NETWORK)")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Audit as the command line says. Raises `ValueError` or `OSError` for what cannot work."""
    autoattack.load()
    model, dataset, content = networks.load(args.network)
    if args.dataset and dataset and args.dataset != dataset:
        raise ValueError(f"--dataset {args.dataset}: the network was trained on {dataset}")
    loaded = {networks.short_name(where): networks.load(where, audited=model) for where in args.surrogate}
    if len(loaded) < len(args.surrogate):
        raise ValueError(
            f"two surrogates have one name: {', '.join(map(networks.short_name, args.surrogate))}"
        )
    check_device(args.device)
    x, y = (t[: args.limit] for t in data.load("test", args.data_dir, args.dataset or dataset or "cifar10"))
    about = {"network": args.network, "sha256": sha256(content)}
    about["sha256 of surrogates"] = [sha256(content) for _, _, content in loaded.values()]
    with exact_float32():
        return audit(
            model.to(args.device),
            data.to_float(x, args.device),
            y.to(args.device),
            out=args.out or Path("runs/audit") / networks.short_name(args.network),
            eps=args.eps,
            seed=args.seed,
            surrogates={name: surrogate.to(args.device) for name, (surrogate, _, _) in loaded.items()},
            about=about,
        )


def main(argv: list[str] | None = None) -> None:
    """Audit, print the table, and exit with the verdict."""
    args = parser().parse_args(argv)
    try:
        record = run(args)
    except (SpartaError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (Exception, SystemExit) as error:  # an error inside the network must not look like a verdict
        traceback.print_exc()
        print(f"error: the audit could not run: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    show(record, f"{args.network}: {record['worst case']['images']} test images, {255 * args.eps:.3g}/255")
    status = status_of(record)
    print(f"Exit status: {status}")
    if status:
        raise SystemExit(status)


def status_of(record: dict[str, Any]) -> int:
    """The exit status that an audit ends with: 1 with a FAIL, else 3 where a check is suspect, else 0."""
    verdicts = {row["verdict"] for row in record["checks"]}
    return 1 if FAIL in verdicts else 3 if SUSPECT in verdicts else 0
