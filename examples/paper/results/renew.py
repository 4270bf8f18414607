"""Write the card of a set of the package anew, from a later evaluation and audit of its network.

  N=cifar10-resnet18-w16
  python -m examples.paper renew $N --evaluation docs/results/networks/$N.json \\
    --twin docs/results/networks/$N-relu.json --audit docs/audits/$N/audit.json \\
    --half docs/results/w16-relu-half.json

The weights stay as they are, byte for byte. The network, examples/networks/$N.safetensors, must hold these
weights, and the evaluations must be of it and of $N-relu.safetensors there, as the audit must be. `--half` is
the result of a run with ReLU times one half, trained like the set. Without an audit the card says that there
is none. A killed call can leave a set that does not load: call it again.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.paper.common import records
from examples.paper.common.gates import activations_of
from examples.paper.evaluation.networks import NETWORKS, load
from examples.paper.evaluation.protocols import WORST
from examples.paper.results import export, networks
from examples.paper.results.state import read_result
from sparta_act import Sparta, SpartaSet
from sparta_act.pretrained import CARD, WEIGHTS


def renew(
    name: str, evaluation: Path, twin: Path, audit: Path | None = None, half: Path | None = None
) -> None:
    """Write the card. Raises `ValueError` for an evaluation or an audit that is of something else."""
    folder = export.PACKAGE / "sets" / name
    if not (folder / WEIGHTS).exists():
        known = sorted(p.name for p in (export.PACKAGE / "sets").iterdir())
        raise ValueError(f"the package has no set {name!r}; it has {', '.join(known)}")
    taken, record, other = Sparta.from_pretrained(folder), networks.read(evaluation), networks.read(twin)
    if audit:
        section, network = export.audited(audit, dict(taken))
    else:
        section, network = [export.NOT_AUDITED], _network(name, taken)
    if record["sha256"] != network:
        raise ValueError(f"{evaluation} is of another network than {audit or name}")
    relu = NETWORKS / f"{name}-relu.safetensors"
    if other["sha256"] != records.sha256(relu.read_bytes()):
        raise ValueError(f"{twin} is not of its ReLU twin, {relu}")
    unlike = [k for k in ("seed", "test images") if record[k] != other[k]]
    unlike += [a for a in record["errors"] if other["errors"].get(a, {}).get("images") != _images(record, a)]
    if unlike:
        raise ValueError(f"{twin} was not measured like {evaluation}: {', '.join(unlike)}")
    if not {"clean", WORST} <= record["errors"].keys():
        raise ValueError(f"{evaluation} lacks the clean error or the {WORST}")
    halved = _half(half, taken.info["recipe"]) if half else None
    weights = (folder / WEIGHTS).read_bytes()
    info = dict(taken.info) | {
        "train it again": export.training_command(taken.info["recipe"]),
        "measured": export.rows(record, other, halved),
        "measured on": export.measured_on(record),
        "audit": section,
        "limits": export.CONTROLS,
        export.TWIN: "the same network with ReLU, trained and attacked alike",
    }
    SpartaSet(dict(taken), info).save_pretrained(folder)
    if (folder / WEIGHTS).read_bytes() != weights:
        raise ValueError(f"{folder / WEIGHTS}: {records.sha256(weights)} has changed; restore it")
    export.ship(name)


def _network(name: str, taken: SpartaSet) -> str:
    """The sha256 of the network whose SPARTA the set is. Raises `ValueError` if there is none."""
    path = NETWORKS / f"{name}.safetensors"
    model, _, content = load(str(path))
    if not export.same(activations_of(model), dict(taken)):
        raise ValueError(f"the SPARTA of {path} is not that of the set")
    return records.sha256(content)


def _half(path: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The filed result of ReLU times one half. Raises `ValueError` if it was trained unlike the set."""
    result = read_result(path.stem, path.parent)
    if result is None:
        raise ValueError(f"there is no {path}")
    settings = result["settings"] | export.in_pixels(result["settings"]["numbers"])
    wanted = {k: recipe[k] for k in settings if k in recipe} | {"activation": "relu-half"}
    if unlike := [k for k, value in wanted.items() if settings[k] != value]:
        raise ValueError(f"{path} was not trained like the set: {', '.join(unlike)}")
    return result


def _images(record: dict[str, Any], attack: str) -> int:
    return int(record["errors"][attack]["images"])


def main(argv: list[str] | None = None) -> None:
    """Renew as the command line says."""
    p = argparse.ArgumentParser(
        prog="python -m examples.paper renew",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("name", type=export.set_name, help="set of the package")
    p.add_argument("--evaluation", type=Path, required=True, help="evaluation.json of its network")
    p.add_argument("--twin", type=Path, required=True, help="that of the network's ReLU twin")
    p.add_argument("--audit", type=Path, help="audit.json of its network, if there is one")
    p.add_argument("--half", type=Path, help="result of a run with ReLU times one half, for the card")
    args = p.parse_args(argv)
    renew(args.name, args.evaluation, args.twin, args.audit, args.half)
    print((export.PACKAGE / "sets" / args.name / CARD).read_text())
