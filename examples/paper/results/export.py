"""Make a set of the SPARTA of a run, with a card.

  python -m examples.paper export runs/w16-sparta --twin runs/w16-relu --out my-set

The set stores the activations of RUN/checkpoint.pt in float16. Its card has the errors of
RUN/evaluation.json, which `evaluate` measured with weights rounded like those of the set, and those of a ReLU
twin if there is one. The set is read back and compared with the evaluated weights, number by number.
"""

import argparse
import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from examples.paper.audit.page import headline, provenance
from examples.paper.common import data, records
from examples.paper.common.atomic import write_text
from examples.paper.common.gates import activations_of, round_to_half
from examples.paper.common.statistics import format_error, pair_of, paired
from examples.paper.controls.transfers import HALF
from examples.paper.evaluation import networks
from examples.paper.evaluation.protocols import WORST
from examples.paper.results.queue import FOLDERS
from examples.paper.training.checkpoint import load_trained, read_checkpoint
from examples.paper.training.loop import Settings
from examples.paper.training.recipes import RECIPES
from sparta_act import Sparta, SpartaSet
from sparta_act.pretrained import CARD, CONFIG, WEIGHTS

PACKAGE = Path(__file__).parents[3] / "sparta_act"
NOT_AUDITED = (
    "Not audited yet: no figure here was held against gradient masking "
    "(`python -m examples.paper audit` does it)."
)
CONTROLS = (
    "No gain of the gate is shown. In width 16 neither SPARTA nor ReLU times one half, a gate that never "
    "moves, is shown to make fewer errors than ReLU under attack. In width 64 both do, by about as much, in "
    "one training each; a lower learning rate brings ReLU closer, not level. Another training of the same "
    "network moves the errors too. The figures, and those of a frozen set in other networks, are in "
    "docs/robustness.md of the repository: https://github.com/sparta-act/sparta-act"
)
ALIKE = ("seed", "test images")  # of two evaluations that are compared
TWIN = "ReLU twin"  # column of the card


def in_pixels(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training as on a set's card: bound and step size of the attack in units of 1/255."""
    return dict(settings) | {k: f"{255 * settings[k]:g}/255" for k in ("eps", "step_size")}


def measured(run: Path) -> dict[str, Any]:
    """The evaluation of a run, and the settings it was trained with.

    Raises `ValueError` if there is none, or one of another checkpoint.
    """
    path, checkpoint = run / records.RECORD, run / "checkpoint.pt"
    if not checkpoint.exists():
        raise ValueError(f"there is no {checkpoint}; RUN is a folder that `train` or `run` wrote")
    if not path.exists():
        raise ValueError(f"there is no {path}; write it with: python -m examples.paper evaluate {checkpoint}")
    try:
        record = records.read_evaluation(path, *ALIKE, "machine", "torch", "date", "sha256")
        if record["sha256"] != records.sha256(checkpoint.read_bytes()):
            raise ValueError(f"it is of another {checkpoint.name}")
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}; evaluate {checkpoint} again") from None
    return record | {"settings": read_checkpoint(checkpoint)["settings"]}


def epoch(run: Path) -> tuple[bool, str]:
    """Whether a run's network is the best of its epochs or the last, and which that is, as text."""
    state = read_checkpoint(run / "checkpoint.pt")
    epoch, held = (
        f"{state['epoch']} of {state['settings']['epochs']}",
        state["settings"].get("validation"),
    )
    if "validation error" in state:
        return True, f"{epoch}, the lowest error on {held} held-out training images"
    return False, epoch + (", the last" if state["epoch"] == state["settings"]["epochs"] else ", unfinished")


def check_twin(record: dict[str, Any], twin: dict[str, Any]) -> None:
    """Raise `ValueError` unless the twin is a ReLU network that was trained and evaluated like the run."""
    ours, theirs = (
        {k: r[k] for k in ALIKE}
        | {f"images of {attack}": entry["images"] for attack, entry in r["errors"].items()}
        | {k: v for k, v in r["settings"].items() if k not in ("activation", "sites", "pretrained")}
        for r in (record, twin)
    )
    unlike = {k: (theirs.get(k), ours.get(k)) for k in ours | theirs if theirs.get(k) != ours.get(k)}
    if twin["settings"]["activation"] != "relu":
        unlike["activation"] = (twin["settings"]["activation"], "relu")
    if unlike:
        differences = ", ".join(
            f"{k} is {found!r}, must be {wanted!r}" for k, (found, wanted) in unlike.items()
        )
        raise ValueError(f"not a matching twin: {differences}")


def rows(
    record: dict[str, Any], twin: dict[str, Any] | None, half: dict[str, Any] | None = None
) -> list[dict[str, str]]:
    """The card's table: a network's errors, next to those of its twin and of ReLU times one half."""
    table = []
    for attack, entry in record["errors"].items():
        wrong = records.unpacked(entry["wrong"], entry["images"])
        row = {"error": attack, "images": str(len(wrong)), "SPARTA": format_error(wrong)}
        if twin is not None:
            pair = pair_of(record, twin, attack)
            row |= {TWIN: format_error(pair[1]), "difference": str(paired(pair))}
        if half is not None:
            pairs = [pair_of(record, half, attack)] if attack in half["errors"] else []
            row[HALF] = "".join(format_error(pair[1]) for pair in pairs)
            row["difference to it"] = "".join(str(paired(pair)) for pair in pairs)
        table.append(row)
    return table


def measured_on(record: dict[str, Any]) -> str:
    """How and where an evaluation was made."""
    return (
        "the first test images; 95% intervals over images, of one training each; attacks of seed "
        f"{record['seed']}; in float32, SPARTA's weights in float16 as stored; {record['machine']}, torch "
        f"{record['torch']}, {record['date']}"
    )


def training_command(recipe: Mapping[str, Any]) -> str:
    """The command that trains a network with the settings of a set's card, on any machine."""
    preset = in_pixels(dataclasses.asdict(RECIPES[recipe["recipe"]]))
    data_folder = f"DATA/{FOLDERS.get(recipe['dataset'], recipe['dataset'])}"
    words = ["python", "-m", "examples.paper", "train", "--data", data_folder, "--out", "runs/again"]
    for key in (f.name for f in dataclasses.fields(Settings)):
        if recipe.get(key) is not None:
            words += [f"--{key}", str(recipe[key])]
    seen = recipe["images"] + (recipe.get("validation") or 0)
    if seen < data.DATASETS[recipe["dataset"]].images["train"]:
        words += ["--limit", str(seen)]
    for key in (k for k in preset if recipe[k] != preset[k]):
        option = key.replace("_", "-")
        flag = isinstance(preset[key], bool)
        words += [f"--{'' if recipe[key] else 'no-'}{option}"] if flag else [f"--{option}", str(recipe[key])]
    return shlex.join(words)


def audited(path: Path, activations: dict[str, Sparta]) -> tuple[list[Any], str]:
    """The card's section on an audit, and the sha256 of the audited network.

    Raises `ValueError` for an audit of other activations.
    """
    try:
        record = records.read_json(path)
        records.check_seal(record)
        model, _, content = networks.load(record["network"])
        if records.sha256(content) != record["sha256"]:
            raise ValueError(f"{record['network']} has changed since")
        theirs = activations_of(model)
        if not same(theirs, activations):
            raise ValueError(f"the SPARTA of {record['network']} is not that of the run")
        surrogates = " and ".join(record["surrogates"]) or "no other network"
        made = provenance(record)
        by = f"By `audit` of {record['network']}; transferred from {surrogates}; {made}"
        rows = [
            {"": str(row["number"]), **{k: row[k] for k in row if k != "number"}} for row in record["checks"]
        ]
        return [*headline(record), rows, by], str(record["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: {error}; audit the network again") from None


def same(some: dict[str, Sparta], others: dict[str, Sparta]) -> bool:
    """Whether activations have the same labels and numbers."""
    return some.keys() == others.keys() and all(_equal(some[k], others[k]) for k in some)


def _equal(one: Sparta, other: Sparta) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def export(
    run: Path, twin: Path | None, out: Path, audit: Path | None = None, *, shipped: bool = False
) -> None:
    """Write the set and read it back. Raises `ValueError` if a run or the folder does not fit."""
    if out.exists() and any(out.iterdir()) and not (out / CONFIG).exists():
        raise ValueError(f"{out} holds something other than a set; name another folder")
    record, other = measured(run), measured(twin) if twin else None
    best, which = epoch(run)
    if twin and other:
        check_twin(record, other)
        if epoch(twin)[0] != best:
            raise ValueError(f"not a matching twin: {twin} is epoch {epoch(twin)[1]}; {run} is {which}")
    table = rows(record, other)
    model, settings = load_trained(run / "checkpoint.pt")
    activations = activations_of(model)
    if not activations:
        raise ValueError(f"{run}: its network has no SPARTA, its activation is {settings['activation']}")
    round_to_half(activations)
    info = {
        "backbone": f"{settings['arch']} of width {settings['width']}",
        "dataset": data.DATASETS[settings["dataset"]].hub or settings["dataset"],
        "pipeline_tag": "image-classification",
        "recipe": in_pixels(settings),
        "train it again": training_command(in_pixels(settings)),
        "measured": table,
        "measured on": measured_on(record),
    }
    if settings.get("validation"):
        info["epoch"] = which + (f"; of the twin {epoch(twin)[1]}" if twin else "")
    info["audit"] = audited(audit, activations)[0] if audit else [NOT_AUDITED]
    if shipped:
        info |= {"license": "apache-2.0", "limits": CONTROLS}
    if other:
        info[TWIN] = "the same network with ReLU, trained and attacked alike"
    SpartaSet(activations, info).save_pretrained(out)
    if not same(dict(Sparta.from_pretrained(out)), activations):
        raise ValueError(f"{out}: the set was not read back as it was evaluated")


def ship(name: str) -> None:
    """Write what `list_sets` shows of a set into `sparta_act/pretrained/shipped.json`, next to the others."""
    folder, path = PACKAGE / "sets" / name, PACKAGE / "pretrained" / "shipped.json"
    shipped, taken = json.loads(path.read_text()), Sparta.from_pretrained(folder)
    table = {row["error"]: row for row in taken.info["measured"]}
    shipped[name] = {
        "sha256": {f: records.sha256((folder / f).read_bytes()) for f in (CARD, CONFIG, WEIGHTS)},
        "channels": {label: activation.in_channels for label, activation in taken.items()},
        "dataset": taken.info["dataset"],
        "eps": WORST.removeprefix("worst case, "),
        "images": int(table[WORST]["images"]),
    }
    for column, prefix in (("SPARTA", ""), (TWIN, "relu_"), (HALF, "half_")):
        for attack, key in (("clean", "clean"), (WORST, "worst_case")):
            cell = table[attack].get(column)
            shipped[name][prefix + key] = float(cell.split("%")[0]) if cell else None
    write_text(path, json.dumps(dict(sorted(shipped.items())), indent=2) + "\n")


def set_name(text: str) -> str:
    """Type of an option: what a set of the package may be called."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text):
        raise argparse.ArgumentTypeError(f"must be small letters, digits, dots and dashes, not {text!r}")
    return text


def main(argv: list[str] | None = None) -> None:
    """Export as the command line says."""
    p = argparse.ArgumentParser(
        prog="python -m examples.paper export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", type=Path, help="folder of a network with SPARTA, trained and evaluated")
    p.add_argument("--twin", type=Path, help="folder of its ReLU twin, evaluated with the same attacks")
    p.add_argument("--audit", type=Path, help="audit.json of its network, for the card")
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder of the set")
    where.add_argument(
        "--ship",
        type=set_name,
        metavar="NAME",
        help="make it a set of the package, and write its sha256 there",
    )
    args = p.parse_args(argv)
    out = args.out if args.out is not None else PACKAGE / "sets" / args.ship
    if args.ship and (out / WEIGHTS).exists():
        raise ValueError(
            f"the package has a set {args.ship!r}, and a set never changes: give another name, or, if it was "
            f"never published, delete {out} first"
        )
    export(args.run, args.twin, out, args.audit, shipped=bool(args.ship))
    if args.ship:
        ship(args.ship)
    print((out / CARD).read_text())
