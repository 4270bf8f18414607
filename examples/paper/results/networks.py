"""The section of the page on the networks in this repository, from the records of `evaluate`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.paper.common.records import read_evaluation, unpacked
from examples.paper.common.statistics import format_error, pair_of
from examples.paper.results.cells import MISSING, markdown
from examples.paper.results.differences import marked

TWIN = "-relu"  # NAME-relu is the twin of NAME


def what_ships(folder: Path) -> Iterator[str]:
    """A table of each network NAME.json in the folder, with its ReLU twin if there is one."""
    records = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    if records:
        yield "## What ships\n"
        yield (
            "The networks in [examples/networks](https://github.com/sparta-act/sparta-act/tree/main/examples/"
            "networks), one training each. Bold as above, after Holm's correction for all differences in the "
            "table.\n"
        )
    for name in records:
        if name.removesuffix(TWIN) in records and name.endswith(TWIN):
            continue  # next to its network
        both = {n: records[n] for n in (name, name + TWIN) if n in records}
        yield _table(both)
        for n, r in both.items():
            made = f"{r['machine']}, torch {r['torch']}, {r['date']}; sha256 of its file {r['sha256']}"
            yield f"`{n}`: {made}.\n\n```sh\n{r['command']}\n```\n"


def _table(records: dict[str, dict[str, Any]]) -> str:
    (name, first), *twin = records.items()
    heads, attacks = ["images", *records], list(first["errors"])
    cells = {
        attack: [f"{first['errors'][attack]['images']:,}", *(_error(r, attack) for r in records.values())]
        for attack in attacks
    }
    for other, record in twin:
        heads.append(f"{name} minus {other}")
        both = [a for a in attacks if a in record["errors"]]
        found = dict(zip(both, marked([pair_of(first, record, a) for a in both]), strict=True))
        cells = {attack: [*line, found.get(attack, MISSING)] for attack, line in cells.items()}
    return markdown(["", *cells], [heads, *cells.values()])


def _error(record: dict[str, Any], attack: str) -> str:
    entry = record["errors"].get(attack)
    return format_error(unpacked(entry["wrong"], entry["images"])) if entry else MISSING


def read(path: Path) -> dict[str, Any]:
    """What `evaluate` wrote. Raises `ValueError` for a file that is something else."""
    try:
        return read_evaluation(path, "machine", "torch", "date", "command", "sha256", "test images", "seed")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a record of `evaluate` ({error}); copy the evaluation.json again"
        ) from None
