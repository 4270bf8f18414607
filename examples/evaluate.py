"""Errors of a trained network, clean and attacked: `python examples/evaluate.py runs/sparta/checkpoint.pt`.

The paper's targeted PGD at 16/255, untargeted PGD with restarts at 8/255 and, with --autoattack, AutoAttack
at 8/255; then the worst case, an image being wrong if any of them made it so. Always in float32 without TF32.
Each attack has its own random numbers, from --seed and its name: its figure does not depend on the others.
What is measured is kept beside the checkpoint; a second call does only what is missing.

Robustness figures are of the attacks named and of nothing stronger; they are no certificate.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

import data
from command_line import at_least, plain_errors
from measure import BATCH, PAPER, Attack, Outcome, carry_out, exactly, loss_curve, menu, worst_cases
from report import difference, interval, percent, print_table, stamp, told
from train import load_trained


def _key(attack: Attack, network: str, images: str, seed: int) -> str:
    return json.dumps([network, images, seed, attack.name, dict(attack.arguments), attack.images])


def _sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _read_kept(path: Path) -> dict[str, Outcome]:
    """What earlier calls measured, by key; nothing if the file is of no use."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            entries = json.loads(str(kept["entries"]))
            return {
                key: Outcome(torch.from_numpy(kept[array]), seconds, warnings)
                for key, (array, seconds, warnings) in entries.items()
            }
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {}


def _keep(path: Path, kept: Mapping[str, Outcome]) -> None:
    entries = {key: (f"wrong{i}", o.seconds, o.warnings) for i, (key, o) in enumerate(kept.items())}
    arrays = {f"wrong{i}": o.wrong.numpy() for i, o in enumerate(kept.values())}
    scratch = path.with_suffix(".tmp")
    with scratch.open("wb") as file:
        np.savez_compressed(file, entries=np.array(json.dumps(entries)), **arrays)
    os.replace(scratch, path)


def evaluate(path: Path, attacks: list[Attack], args: argparse.Namespace) -> dict[str, Outcome]:
    """Attack one checkpoint and write evaluation.json beside it; what was measured before is not repeated."""
    began = time.perf_counter()
    model, settings = load_trained(path)
    x, y = data.load("test", args.data_dir, settings.get("dataset", "cifar10"))
    attacks = [dataclasses.replace(a, images=min(a.images, len(x))) for a in attacks]
    most = max(a.images for a in attacks)
    x, y = x[:most], y[:most]
    network, images = _sha256(path.read_bytes()), _sha256(x.numpy().tobytes(), y.numpy().tobytes())
    store, name = path.parent / "evaluation.npz", str(path.parent)
    kept = _read_kept(store)
    outcomes = {}
    for attack in attacks:
        key = _key(attack, network, images, args.seed)
        if key in kept:
            print(f"{name}: {attack.name} was measured before")
        else:
            kept[key] = carry_out(attack, model, x, y, seed=args.seed, device=args.device, title=name)
            _keep(store, kept)
        outcomes[attack.name] = kept[key]
        for warning in kept[key].warnings:
            print(f"{name}: {attack.name} warns: {warning}")
    for case, wrong in worst_cases(attacks, outcomes).items():
        outcomes[case] = Outcome(wrong, 0.0, [])
    errors = {}
    for attack_name, outcome in outcomes.items():
        errors[attack_name] = dict(zip(("error", "low", "high"), interval(outcome.wrong), strict=True))
        errors[attack_name] |= {"images": len(outcome.wrong), "seconds": round(outcome.seconds, 1)}
        errors[attack_name] |= {"warnings": outcome.warnings} if outcome.warnings else {}
    torch.manual_seed(args.seed)
    model = model.to(args.device).eval()
    few, goal = data.to_float(x[:BATCH], args.device), y[:BATCH].to(args.device)
    curve, _ = loss_curve(model, few, goal, **PAPER, steps=max(args.steps))
    record = {"errors": errors, "seed": args.seed, "settings": settings, **stamp()}
    record["loss per step"] = curve.mean(1).tolist()  # of the target class, on the first images
    record["seconds"] = round(time.perf_counter() - began, 1)
    scratch = path.parent / "evaluation.tmp"
    scratch.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(scratch, path.parent / "evaluation.json")
    return outcomes


def parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path, nargs="+", help="checkpoint.pt of train.py; several are compared")
    p.add_argument(
        "--data-dir",
        default="sample",
        help="'sample' (ours, of CIFAR-10; default), 'hub', or a folder of parquet files",
    )
    p.add_argument(
        "--limit", type=at_least(1), help="attack the first so many test images only, for a quick look"
    )
    p.add_argument(
        "--strong-limit",
        type=at_least(1),
        help="attack so many with restarts and AutoAttack, which cost most (default: as --limit)",
    )
    p.add_argument(
        "--steps",
        type=at_least(1),
        nargs="+",
        default=[10, 30, 50],
        help="of the targeted PGD (default: the paper's 10 30 50)",
    )
    p.add_argument("--untargeted-steps", type=at_least(1), default=50, help="default %(default)s")
    p.add_argument(
        "--restarts", type=at_least(1), default=10, help="of the untargeted PGD (default %(default)s)"
    )
    p.add_argument(
        "--autoattack",
        action="store_true",
        help='AutoAttack, standard version, at 8/255; needs pip install "sparta-act[autoattack]" and costs '
        "several thousand passes for each image that stands",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


def chosen(args: argparse.Namespace) -> list[Attack]:
    """The attacks that the command line asks for."""
    most = args.limit or 10**9
    few = min(args.strong_limit or most, most)
    attacks = [Attack("clean", {}, most)]
    for name, arguments in menu(args.steps, args.untargeted_steps, args.restarts).items():
        attacks.append(Attack(name, arguments, most if arguments["targeted"] else few))
    return attacks + ([Attack("AutoAttack, 8/255", {"eps": 8 / 255}, few)] if args.autoattack else [])


def main(argv: list[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = parser().parse_args(argv)
    if missing := [str(c) for c in args.checkpoint if not c.exists()]:
        raise SystemExit(f"there is no {', '.join(missing)}; train.py writes checkpoint.pt into its --out")
    exactly()
    attacks = chosen(args)
    outcomes = {str(path.parent): evaluate(path, attacks, args) for path in args.checkpoint}
    first, *others = outcomes
    columns = {
        name: {k: f"{percent(o.wrong)} of {len(o.wrong)}, {o.seconds:.0f} s" for k, o in found.items()}
        for name, found in outcomes.items()
    }
    print_table("errors on test images, 95% intervals", columns)
    if others:
        columns = {
            name: {k: told(*difference(outcomes[name][k].wrong, o.wrong)) for k, o in outcomes[first].items()}
            for name in others
        }
        print_table(f"minus the errors of {first}, points, paired 95% intervals", columns)


if __name__ == "__main__":
    with plain_errors():
        main()
