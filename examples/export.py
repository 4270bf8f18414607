"""From a run to a set: `python examples/export.py runs/sparta --twin runs/relu --out my-set`.

Takes SPARTA out of RUN/checkpoint.pt, stores it in float16, and writes a card with the errors of
RUN/evaluation.json, beside those of a ReLU twin if one is given. `evaluate.py` made that file, with SPARTA's
weights rounded as the set stores them; what is written is read back and must be them, number by number.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import data
import kept
from command_line import plain_errors
from replacing import replacing
from report import difference, percent, told
from sets import activations_of, round_to_half
from sparta_act import Sparta, SpartaSet
from sparta_act.shipped import SHIPPED
from train import load_trained

PACKAGE = Path(__file__).parents[1] / "sparta_act"


def measured(run: Path) -> dict[str, Any]:
    """What evaluate.py wrote for a run. Raises `ValueError` if it did not, or of another checkpoint."""
    path, checkpoint = run / "evaluation.json", run / "checkpoint.pt"
    if not checkpoint.exists():
        raise ValueError(f"there is no {checkpoint}; train.py writes it")
    if not path.exists():
        raise ValueError(f"there is no {path}; write it with: python examples/evaluate.py {checkpoint}")
    record: dict[str, Any] = json.loads(path.read_text())
    if record.get("checkpoint") != kept.sha256(checkpoint.read_bytes()):
        raise ValueError(f"{path} is of another {checkpoint.name}; evaluate it again")
    return record


def rows(record: dict[str, Any], twin: dict[str, Any] | None) -> list[dict[str, str]]:
    """The card's table. Raises `ValueError` if the twin was not evaluated alike."""
    if twin is not None:
        ours, theirs = (
            [{k: r[k] for k in ("seed", "steps of PGD in")}]
            + [(name, entry["images"]) for name, entry in r["errors"].items()]
            + [r["settings"]["dataset"]]
            for r in (record, twin)
        )
        if ours != theirs:
            raise ValueError(f"the twin was evaluated otherwise: {theirs}, the run: {ours}")
    table = []
    for attack, entry in record["errors"].items():
        wrong = kept.unpacked(entry["wrong"], entry["images"])
        row = {"error": attack, "images": str(len(wrong)), "SPARTA": percent(wrong)}
        if twin is not None:
            other = kept.unpacked(twin["errors"][attack]["wrong"], entry["images"])
            row |= {"ReLU twin": percent(other), "difference": told(*difference(wrong, other))}
        table.append(row)
    return table


def export(run: Path, twin: Path | None, out: Path) -> None:
    """Write the set and read it back. Raises `ValueError` if a run is not as it must be."""
    record = measured(run)
    table = rows(record, measured(twin) if twin else None)
    model, settings = load_trained(run / "checkpoint.pt")
    activations = activations_of(model)
    if not activations:
        raise ValueError(f"{run}: its network has no SPARTA, its activation is {settings['activation']}")
    round_to_half(activations)
    info = {
        "backbone": f"{settings['arch']} of width {settings['width']} (examples/models.py)",
        "dataset": data.DATASETS[settings["dataset"]].hub or settings["dataset"],
        "recipe": settings,
        "measured": table,
        "measured on": f"the first test images of the split; 95% intervals; seed {record['seed']}; "
        f"steps of PGD in {record['steps of PGD in']}, answers in float32",
        **{k: record[k] for k in ("machine", "torch", "date")},
    }
    SpartaSet(activations, info).save_pretrained(out)
    for label, activation in Sparta.from_pretrained(out).items():
        for key, tensor in activation.state_dict().items():
            if not torch.equal(tensor, activations[label].state_dict()[key]):
                raise ValueError(f"{out}: {label}.{key} did not come back as it was evaluated")


def ship(name: str) -> None:
    """Write the sha256 of a set's files into `sparta_act/shipped.py`, beside those of the other sets."""
    files = sorted((PACKAGE / "sets" / name).iterdir())
    shipped = SHIPPED | {name: {f.name: kept.sha256(f.read_bytes()) for f in files}}
    path = PACKAGE / "shipped.py"
    head, _, _ = path.read_text().partition("{  # name")
    lines = [
        f'    "{s}": {{\n' + "".join(f'        "{f}": "{h}",\n' for f, h in shipped[s].items())
        for s in sorted(shipped)
    ]
    body = "    },\n".join(lines)
    with replacing(path) as scratch:
        scratch.write_text(head + "{  # name of the set -> file -> its sha256\n" + body + "    },\n}\n")


def main(argv: list[str] | None = None) -> None:
    """Export as the command line says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="folder of a network with SPARTA, trained and evaluated")
    p.add_argument("--twin", type=Path, help="folder of its ReLU twin, evaluated with the same attacks")
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder of the set, made where need be")
    where.add_argument(
        "--ship", metavar="NAME", help="make it a set of the package, and write its sha256 there"
    )
    args = p.parse_args(argv)
    out = args.out or PACKAGE / "sets" / args.ship
    export(args.run, args.twin, out)
    if args.ship:
        ship(args.ship)
    print((out / "README.md").read_text())


if __name__ == "__main__":
    with plain_errors():
        main()
