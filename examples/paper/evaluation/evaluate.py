"""Errors of a trained network, clean and attacked: `python examples/evaluate.py runs/sparta/checkpoint.pt`.

The paper's targeted PGD at 16/255, untargeted PGD with restarts at 8/255 and 16/255 and, with --autoattack,
AutoAttack at 8/255; then the worst case, an image being wrong if any of them made it so. With --protocol
field, all at 8/255: untargeted PGD-50 and targeted DLR PGD-50 towards the three likeliest wrong classes, an
image being wrong if any step made it so; the clean error is of all test images. What the network
says of an image is always asked in float32 without TF32, with SPARTA's weights rounded to float16, as a set
stores them.
Each attack has its own random numbers, from --seed and its name without the number of steps: PGD-10 is the
beginning of PGD-50, and no figure depends on what else is asked for.
What is measured is kept beside the checkpoint, in evaluation.npz, AutoAttack's batch by batch; a second call
does only what is missing.
evaluation.json is written at the end, of all that the call asked for, and taken away when a call begins.

Robustness figures are of the attacks named and of nothing stronger; they are no certificate.
"""

import argparse
import dataclasses
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from examples.paper.attacks import autoattack
from examples.paper.common import data, records
from examples.paper.common.cli import at_least, check_device, plain_errors
from examples.paper.common.console import print_table, stamp
from examples.paper.common.gates import gates, round_to_half
from examples.paper.common.statistics import difference, format_difference, format_error, interval
from examples.paper.common.tf32 import exact_float32
from examples.paper.evaluation import store
from examples.paper.evaluation.measure import (
    BATCH,
    PAPER,
    Attack,
    Outcome,
    carry_out,
    field_menu,
    joined,
    loss_curve,
    menu,
    parts,
    worst_cases,
)
from examples.paper.training.train import load_trained, read_checkpoint


def evaluate(
    path: Path, attacks: list[Attack], args: argparse.Namespace, took: dict[str, float]
) -> Generator[float, None, dict[str, Outcome]]:
    """Attack one checkpoint and write evaluation.json beside it; what was measured before is not repeated.

    Before each part that is missing it yields the seconds that such a part took before, of any checkpoint,
    as kept in `took`; 0 if none did.
    """
    began, name, network = time.perf_counter(), str(path.parent), records.sha256(path.read_bytes())
    model, settings = load_trained(path)
    if network != records.sha256(path.read_bytes()):
        raise ValueError(f"{path} was written anew just now, as its training goes on; evaluate it again")
    round_to_half(gates(model))
    x, y = data.load("test", args.data_dir, settings["dataset"])
    attacks = [dataclasses.replace(a, images=min(a.images, len(x))) for a in attacks]
    whole, npz = path.parent / records.RECORD, path.parent / "evaluation.npz"
    whole.unlink(missing_ok=True)  # of an earlier call: nobody shall take it for this one's
    measured = store.read(npz)
    outcomes: dict[str, Outcome] = {}
    for family in families(attacks):
        found: dict[str, list[Outcome]] = {attack.name: [] for attack in family}
        before = dict.fromkeys(found, 0)
        for part in parts(family, args.device):
            keys = {a.name: store.key(a, network, x, y, args.seed) for a in part}
            if missing := [a for a in part if not store.holds(measured, keys[a.name], a)]:
                yield max(took.get(a.name, 0.0) for a in missing)
                new = carry_out(missing, model, x, y, seed=args.seed, device=args.device, title=name)
                measured |= {keys[a]: outcome for a, outcome in new.items()}
                store.write(npz, measured)
            for attack in part:
                outcome = measured[keys[attack.name]]
                found[attack.name].append(outcome)
                took[attack.name] = max(took.get(attack.name, 0.0), outcome.seconds)
                before[attack.name] += 0 if attack in missing else attack.images
        for attack in family:
            outcomes[attack.name] = outcome = joined(found[attack.name])
            if before[attack.name] == attack.images:
                print(f"{name}: {attack.name} was measured before")
            elif before[attack.name]:
                print(f"{name}: {attack.name}, {before[attack.name]} images were measured before")
            if outcome.standing:
                standing = ", ".join(f"{left} after {part}" for part, left in outcome.standing.items())
                print(f"{name}: {attack.name}, still right of {len(outcome.wrong)}: {standing}")
            for warning in outcome.warnings:
                print(f"{name}: {attack.name} warns: {warning}")
    for case, wrong in worst_cases(attacks, outcomes).items():
        outcomes[case] = Outcome(wrong, 0.0, [])
    errors = {attack_name: _entry(outcome) for attack_name, outcome in outcomes.items()}
    record = {"errors": errors, "seed": args.seed, "settings": settings, "checkpoint": network, **stamp()}
    record["test images"] = records.sha256(x.numpy().tobytes(), y.numpy().tobytes())  # all that were there
    record["steps of PGD in"] = "bfloat16" if args.amp else "float32"
    if args.protocol == "paper":
        torch.manual_seed(args.seed)
        few = min(BATCH, attacks[0].images)
        images, labels = data.to_float(x[:few], args.device), y[:few].to(args.device)
        curve, _ = loss_curve(model.to(args.device), images, labels, **PAPER, steps=max(args.steps))
        record["loss per step"] = curve.mean(1).tolist()  # of the target class, on the first images
    record["seconds"] = round(time.perf_counter() - began, 1)
    records.write_record(whole, record)
    return outcomes


def families(attacks: list[Attack]) -> list[list[Attack]]:
    """Attacks that are carried out together: of one family, on the same images."""
    found: dict[tuple[str, int], list[Attack]] = {}
    for attack in attacks:
        found.setdefault((attack.family, attack.images), []).append(attack)
    return list(found.values())


def _entry(outcome: Outcome) -> dict[str, Any]:
    entry: dict[str, Any] = dict(zip(("error", "low", "high"), interval(outcome.wrong), strict=True))
    entry |= {"images": len(outcome.wrong), "seconds": round(outcome.seconds, 1)}
    entry |= {"standing": outcome.standing} if outcome.standing else {}
    entry |= {"warnings": outcome.warnings} if outcome.warnings else {}
    return entry | {"wrong": records.packed(outcome.wrong)}


def parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "checkpoint",
        type=Path,
        nargs="+",
        help="checkpoint.pt of train.py; several, of one data set, are compared",
    )
    p.add_argument(
        "--data-dir",
        default="sample",
        help="where its data lie: 'sample' (ours, of CIFAR-10; default), 'hub', or a folder of parquet files",
    )
    p.add_argument(
        "--protocol",
        choices=("paper", "field"),
        default="paper",
        help="`paper` (default), or `field`: 8/255, every step judged; its steps are --untargeted-steps",
    )
    p.add_argument(
        "--limit",
        type=at_least(1),
        help="only the first so many test images, for a quick look; with `field`, clean ones are all asked",
    )
    p.add_argument(
        "--steps",
        type=at_least(1),
        nargs="+",
        default=[10, 30, 50],
        help="of the targeted PGD (default: the paper's 10 30 50); a step is one pass forward and back",
    )
    p.add_argument(
        "--untargeted-steps", type=at_least(1), default=50, help="of the untargeted PGD (default %(default)s)"
    )
    p.add_argument(
        "--restarts",
        type=at_least(1),
        default=10,
        help="of the untargeted PGD (default %(default)s); each costs its steps for every image that stands",
    )
    p.add_argument(
        "--amp",
        choices=("bf16",),
        help="take the steps of PGD in bfloat16, several times faster on a GPU; what fools the network is "
        "asked in float32 all the same (benchmarks/precision.py compares the two)",
    )
    p.add_argument(
        "--autoattack",
        action="store_true",
        help='AutoAttack, standard version, at 8/255; needs pip install "sparta-act[autoattack]" and costs '
        "up to 1,900 steps and 5,000 more passes forward for an image that stands",
    )
    p.add_argument(
        "--autoattack-limit", type=at_least(1), help="AutoAttack on the first so many (default: as --limit)"
    )
    p.add_argument(
        "--seed", type=int, default=0, help="of every attack's random numbers (default %(default)s)"
    )
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s"
    )
    return p


def chosen(args: argparse.Namespace) -> list[Attack]:
    """The attacks that the command line asks for."""
    most = args.limit or 10**9
    more = {"amp": True} if args.amp else {}
    if args.protocol == "field":
        attacks = [Attack("clean", {}, 10**9)]
        attacks += [Attack(name, a, most) for name, a in field_menu(args.untargeted_steps).items()]
    else:
        attacks = [Attack("clean", {}, most)]
        attacks += [
            Attack(name, a | more, most)
            for name, a in menu(args.steps, args.untargeted_steps, args.restarts).items()
        ]
    few = min(args.autoattack_limit or most, most)
    return attacks + ([Attack("AutoAttack, 8/255", {"eps": 8 / 255}, few)] if args.autoattack else [])


def check(args: argparse.Namespace) -> None:
    """Look before hours of work. Raises `SystemExit` or `ValueError` with what to do."""
    if missing := [str(c) for c in args.checkpoint if not c.exists()]:
        raise SystemExit(f"there is no {', '.join(missing)}; train.py writes checkpoint.pt into its --out")
    folders = [c.parent.resolve() for c in args.checkpoint]
    if len(set(folders)) < len(folders):
        raise ValueError(
            "two checkpoints lie in one folder, where their results would go; give one of each folder"
        )
    datasets = {read_checkpoint(c)["settings"]["dataset"] for c in args.checkpoint}
    if len(datasets) > 1:
        raise ValueError(
            f"the checkpoints are of {' and '.join(sorted(datasets))}; evaluate one data set at a time"
        )
    check_device(args.device)
    if args.protocol == "field" and args.amp:
        raise ValueError("--protocol field takes its steps in float32; leave out --amp")
    if args.autoattack:
        autoattack.load()


def evaluations(argv: list[str] | None = None) -> Iterator[float]:
    """Evaluate as the command line says; before each part it yields the seconds that such a part took before.

    A caller who stops then leaves what the next call goes on with.
    """
    args = parser().parse_args(argv)
    check(args)
    attacks, outcomes, took = chosen(args), dict[str, dict[str, Outcome]](), dict[str, float]()
    with exact_float32():
        for path in args.checkpoint:
            with store.alone(path.parent):
                outcomes[str(path.parent)] = yield from evaluate(path, attacks, args, took)
    first, *others = outcomes
    columns = {
        name: {
            k: f"{format_error(o.wrong)} of {len(o.wrong)}" + (f", {o.seconds:.0f} s" if o.seconds else "")
            for k, o in found.items()
        }
        for name, found in outcomes.items()
    }
    print_table("errors on test images, 95% intervals", columns)
    if others:
        columns = {
            name: {
                k: format_difference(*difference(outcomes[name][k].wrong, o.wrong))
                for k, o in outcomes[first].items()
            }
            for name in others
        }
        print_table(f"minus the errors of {first}, points, paired 95% intervals", columns)


def main(argv: list[str] | None = None) -> None:
    """Evaluate as the command line says."""
    for _ in evaluations(argv):
        pass


if __name__ == "__main__":
    with plain_errors():
        main()
