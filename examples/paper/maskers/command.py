"""Audit networks that mask their gradients, and honest ones beside them: `python -m examples.paper maskers`.

Does an audit see what it should? Each masker is also attacked by somebody who knows its trick: PGD along the
gradients of the network without it. For each network the table has the exit status of its audit, the checks
that fail or are suspect, the errors under plain PGD, in the audit's worst case and under the informed attack.
A masker is found if its audit does not end with 0, or if the worst case comes within one point of the
informed attack.

All are made of four small networks, trained on the sample (`python -m examples.paper.maskers.small`). Their
attacks are smaller than an audit's own, see `BUDGET`. Writes docs/audits/maskers.json and the table of
docs/audit.md; a killed call goes on. Up to 50 minutes on one core.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from examples.paper.attacks import losses
from examples.paper.audit import attacks
from examples.paper.audit.budget import Budget
from examples.paper.audit.command import status_of
from examples.paper.audit.run import audit
from examples.paper.audit.verdicts import FAIL, SUSPECT, numbers_of
from examples.paper.audit.victim import Victim
from examples.paper.common import data
from examples.paper.common.atomic import write_text
from examples.paper.common.cli import at_least
from examples.paper.common.console import print_table, stamp
from examples.paper.common.records import write_record
from examples.paper.common.statistics import rounded
from examples.paper.maskers.networks import HONEST, MASKERS, Case

DOCS = Path(__file__).parents[3] / "docs"
RECORD = DOCS / "audits" / "maskers.json"
BLOCK = re.compile(r"(<!-- maskers -->\n).*?(<!-- end of maskers -->)", re.DOTALL)
BUDGET = Budget(steps=20, restarts=2, draws=20, queries=500, control=10, autoattack=10, curve=100)
EPS = 8 / 255
CLOSE = 0.01  # a worst case this near to the truth has not been fooled


def judged(name: str, case: Case, x: Tensor, y: Tensor, out: Path, budget: Budget = BUDGET) -> dict[str, Any]:
    """What an audit says of a network, and what an informed attack finds. Shapes: x (N, C, H, W), y (N,)."""
    record = audit(case.make().eval(), x, y, out=out / re.sub(r"\W+", "-", name), eps=EPS, budget=budget)
    numbers = numbers_of(record)
    return {
        "name": name,
        "honest": case.undone is None,
        "status": status_of(record),
        "failed": numbers[FAIL],
        "suspect": numbers[SUSPECT],
        "plain": record["attacks"][attacks.PLAIN]["error"],
        "worst case": record["worst case"]["error"],
        "informed": None if case.undone is None else informed(case, x, y, 2 * budget.steps),
        "seconds": record["seconds"],
    }


def informed(case: Case, x: Tensor, y: Tensor, steps: int) -> float:
    """Error under PGD along the gradients of the network without its trick: two losses, two starts each."""
    if case.undone is None:
        raise ValueError("an honest network has no trick to undo")
    victim, undone = Victim((case.judge or case.make)().eval(), x, y, EPS, 0), case.undone().eval()
    broken = victim.clean.clone()
    for loss in (losses.cross_entropy, losses.cw):
        for start in ("start", "restart"):
            at, _ = victim.pgd(steps=steps, loss=loss, fast=undone, start=start, skipped=broken)
            broken |= at >= 0
    return broken.double().mean().item()


def found(row: dict[str, Any]) -> bool:
    """Whether a masker was found, or an honest network was not accused."""
    if row["honest"]:
        return not row["failed"]
    return row["status"] != 0 or row["informed"] - row["worst case"] <= CLOSE


def table(record: dict[str, Any]) -> str:
    """The rows, as Markdown."""
    lines = [
        "| network | exit | FAIL | suspect | plain PGD | worst case | informed attack | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        known = "" if row["informed"] is None else f"{rounded(row['informed'])}%"
        numbers = [", ".join(map(str, row[k])) for k in ("failed", "suspect")]
        errors = [f"{rounded(row[k])}%" for k in ("plain", "worst case")]
        name = f"honest: {row['name']}" if row["honest"] else row["name"]
        cells = [name, str(row["status"]), *numbers, *errors, known, str(row["seconds"])]
        lines.append(f"| {' | '.join(cells)} |")
    about = f"{record['images']} images; {record['machine']}; torch {record['torch']}; {record['date']}"
    return "\n".join([*lines, "", f"{about}; seed 0."]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Audit all of them, print and write the table."""
    p = argparse.ArgumentParser(
        prog="python -m examples.paper maskers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--limit", type=at_least(1), default=300, help="images of the sample (default 300)")
    p.add_argument("--runs", type=Path, default=Path("runs/maskers"), help="evidence (default: runs/maskers)")
    args = p.parse_args(argv)
    x, y = (t[: args.limit] for t in data.load("test"))
    rows = [judged(n, case, data.to_float(x), y, args.runs) for n, case in (MASKERS | HONEST).items()]
    record = {"images": len(x), "budget": vars(BUDGET), **stamp(), "rows": rows}
    write_record(RECORD, record)
    page = DOCS / "audit.md"
    write_text(page, filled(page.read_text(), record))
    columns = {k: {row["name"]: str(row[k]) for row in rows} for k in ("status", "failed", "worst case")}
    print_table("audits of networks that mask and of honest ones", columns)
    if missed := [row["name"] for row in rows if not found(row)]:
        raise SystemExit(f"error: the audit is wrong about {', '.join(missed)}")


def filled(page: str, record: dict[str, Any]) -> str:
    """A page whose block `<!-- maskers -->` holds the table."""
    return BLOCK.sub(lambda match: f"{match[1]}{table(record)}{match[2]}", page)
