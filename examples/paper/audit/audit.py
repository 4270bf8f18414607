"""Is a robustness figure real, or gradient masking? `python examples/audit.py NETWORK`.

Attacks the network in some thirty ways, holds the results against eleven checks, and prints one row for each:
what was found, pass, FAIL or not enough data, and what it means. Above them stands what the network is worth:
its error in the worst case over all attacks, beside that of plain PGD.

NETWORK is a checkpoint.pt of train.py, a file of weights (examples/networks), or FILE.py:FUNCTION, where the
function returns any network that takes images in [0, 1] and returns logits. Needs
pip install "sparta-act[examples,audit]" (AutoAttack and Square by pyautoattack, HopSkipJump by foolbox).

Written into --out: audit.json (all figures), audit.md (the table), audit.png (one page) and audit.safetensors
(for every image that fell the one that fooled the network, to be checked by anybody; a killed audit goes on
from there).

Exits with 1 if a check fails, with 2 if the audit could not be made. An audit that nothing fails is no
certificate: it says that these attacks agree with each other.
"""

import argparse
import importlib.metadata
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from examples.paper.attacks import autoattack
from examples.paper.attacks.pgd import attacking
from examples.paper.attacks.robust_error import clean_errors
from examples.paper.audit import attacks
from examples.paper.audit.checks import FAIL, all_checks, mean
from examples.paper.audit.figure import draw
from examples.paper.audit.gradient_free import load_foolbox
from examples.paper.audit.page import made, markdown, show
from examples.paper.audit.store import Store
from examples.paper.audit.victim import Victim
from examples.paper.common import data
from examples.paper.common.atomic import write_text
from examples.paper.common.cli import at_least, check_device, fraction
from examples.paper.common.console import stamp
from examples.paper.common.records import sha256, write_record
from examples.paper.common.statistics import entry
from examples.paper.common.tf32 import exact_float32
from examples.paper.evaluation import networks
from sparta_act import SpartaError


def audit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    out: Path,
    eps: float = 8 / 255,
    seed: int = 0,
    budget: attacks.Budget | None = None,
    surrogates: dict[str, nn.Module] | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Attack a network, judge what was found, write the files and return what audit.json holds.

    `surrogates`: networks whose attacked images are tried on this one, by name. `about`: what the results
    depend on besides the arguments, such as the network's sha256; a store in `out` is gone on with only if
    all of it is the same. The network is put into evaluation mode.

    Shapes: x (N, C, H, W) in [0, 1], y (N,), both where the model is.
    Raises `ValueError` for a network that does not answer such images, or if a library is missing.
    """
    if not 0 < eps < attacks.LARGEST:
        raise ValueError(f"eps must lie between 0 and 128/255, the largest that check 4 tries, not {eps:.3g}")
    budget, surrogates, out = budget or attacks.Budget(), surrogates or {}, Path(out)
    fresh = networks.copied(model.eval())
    for network in (model, *(s.eval() for s in surrogates.values())):
        networks.check(network, x, y)
    if any(isinstance(p, UninitializedTensorMixin) for p in fresh.parameters()):
        fresh = networks.copied(model)  # its first images made it
    known = (about or {}) | {"eps": eps, "seed": seed, "budget": vars(budget), "surrogates": list(surrogates)}
    known["images"] = sha256(x.cpu().numpy().tobytes(), y.cpu().numpy().tobytes())
    known["networks"] = [networks.fingerprint(n, x) for n in (model, *surrogates.values())]
    known["device"] = x.device.type
    model = networks.in_float32(model, x)
    out.mkdir(parents=True, exist_ok=True)
    store = Store(x.cpu(), y.cpu(), out / "audit.safetensors", json.dumps(known | versions()))
    attacks.attack_all(Victim(model, x, y, eps, seed), store, budget, surrogates)
    store.numbers["evidence"] = evidence(fresh, x, y, store, eps)
    checks = all_checks(store)
    record: dict[str, Any] = known | stamp() | {"seconds": round(sum(store.numbers["seconds"].values()))}
    record["worst case"] = entry(store.broken())
    record["attacks"] = {name: entry(wrong) for name, wrong in store.wrong.items()}
    record["evidence"] = store.numbers["evidence"]
    record["checks"] = [c._asdict() for c in checks]
    gates = ("gate", "gate, attacked")  # image by image: only their means are told
    record["numbers"] = {k: v for k, v in store.numbers.items() if k not in (*gates, "evidence")}
    for key in gates:
        record[key] = {
            site: {k: mean(g[k]).value for k in ("closed", "open", "ratio")} | {"histogram": g["histogram"]}
            for site, g in store.numbers[key].items()
        }
    write_record(out / "audit.json", record)
    write_text(
        out / "audit.md",
        f"# Audit: {record.get('network', 'network')}\n\n{markdown(record)}\n{made(record)}\n",
    )
    draw(out / "audit.png", record, store)
    return record


def evidence(fresh: nn.Module, x: Tensor, y: Tensor, store: Store, eps: float) -> dict[str, Any]:
    """What the kept images are worth: a copy that was never asked before is asked, in another order.

    Of images that stand the last of plain PGD is asked: it must not fool the copy either.
    """
    images, broken = store.images.to(x), store.broken().to(x.device)
    last = images.clamp(x - eps, x + eps).clamp_(0, 1)
    order = torch.arange(len(x) - 1, -1, -1, device=x.device)
    wrong = torch.zeros_like(broken)
    with attacking(fresh):
        wrong[order] = clean_errors(fresh, images[order], y[order], batch_size=97)
    return {
        "images": int(broken.sum()),
        "wrong again": int((wrong & broken).sum()),
        "changed": int((wrong != broken).sum()),
        "within eps": bool((images - last).abs().max() <= 1e-6),
    }


def versions() -> dict[str, str]:
    """Of the libraries that an attack's outcome depends on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "pyautoattack", "foolbox")}


def parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("network", help=networks.NAMES)
    p.add_argument(
        "--surrogate",
        nargs="+",
        default=[],
        metavar="NETWORK",
        help="networks whose attacked images are tried on this one: its ReLU twin, another seed (check 6)",
    )
    p.add_argument(
        "--data-dir",
        default="sample",
        help="where the test images lie: 'sample' (ours, 500 of CIFAR-10; default), 'hub', or a folder of "
        "parquet files",
    )
    p.add_argument("--dataset", choices=data.DATASETS, help="of a FILE.py:FUNCTION (default: cifar10)")
    p.add_argument(
        "--limit",
        type=at_least(1),
        default=500,
        help="the first so many test images (default %(default)s); of few, most checks cannot tell",
    )
    p.add_argument(
        "--eps", type=fraction, default=8 / 255, help="bound of the attacks, a fraction of 1 (default 8/255)"
    )
    p.add_argument("--seed", type=int, default=0, help="of all random numbers (default %(default)s)")
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s"
    )
    p.add_argument("--out", type=Path, help="folder of the results (default: runs/audit/NAME OF THE NETWORK)")
    return p


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Audit as the command line says. Raises `ValueError` or `OSError` for what cannot work."""
    autoattack.load(), load_foolbox()
    model, dataset, content = networks.load(args.network)
    if args.dataset and dataset and args.dataset != dataset:
        raise ValueError(f"--dataset {args.dataset}: the network was trained on {dataset}")
    loaded = {_name(where): networks.load(where) for where in args.surrogate}
    if len(loaded) < len(args.surrogate):
        raise ValueError(f"two surrogates have one name: {', '.join(map(_name, args.surrogate))}")
    check_device(args.device)
    x, y = (t[: args.limit] for t in data.load("test", args.data_dir, args.dataset or dataset or "cifar10"))
    about = {"network": args.network, "sha256": sha256(content)}
    about["sha256 of surrogates"] = [sha256(content) for _, _, content in loaded.values()]
    with exact_float32():
        return audit(
            model.to(args.device),
            data.to_float(x, args.device),
            y.to(args.device),
            out=args.out or Path("runs/audit") / _name(args.network),
            eps=args.eps,
            seed=args.seed,
            surrogates={name: surrogate.to(args.device) for name, (surrogate, _, _) in loaded.items()},
            about=about,
        )


def _name(where: str) -> str:
    """What a network is called: the folder of a checkpoint, a file's name, a function's."""
    if ".py:" in where:
        return where.rpartition(":")[2]
    return Path(where).parent.name if where.endswith(".pt") else Path(where).stem


def main(argv: list[str] | None = None) -> None:
    """Audit, show, and exit with the verdict."""
    args = parser().parse_args(argv)
    try:
        record = run(args)
    except (SpartaError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (Exception, SystemExit) as error:  # what a strange network raises must not look like a verdict
        traceback.print_exc()
        print(f"error: the audit could not be made: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    show(record, f"{args.network}: {record['worst case']['images']} test images, {255 * args.eps:.3g}/255")
    if any(row["verdict"] == FAIL for row in record["checks"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
