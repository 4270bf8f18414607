"""The queue, `queue.toml`: runs in their order, and the tables that they fill."""

import dataclasses
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from examples.paper.common.models import ACTIVATIONS, BLOCKS
from examples.paper.evaluation.protocols import PROTOCOLS
from examples.paper.training.recipes import RECIPES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

QUEUE = Path(__file__).parents[1] / "queue.toml"
FOLDERS = {"cifar10": "cifar10", "mnist-m": "mnist_m"}  # folder of each data set in `--data`


def one_of(known: Collection[str]) -> AfterValidator:
    """Validator of a name."""

    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"unknown {name!r}; known: {', '.join(known)}")
        return name

    return AfterValidator(check)


class Run(BaseModel, frozen=True, extra="forbid", strict=True):
    """A network, and how it is trained and evaluated; `set` names the run whose SPARTA it gets, frozen."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # of a folder and a file
    epochs: PositiveInt
    dataset: Annotated[str, one_of(FOLDERS)]
    arch: Annotated[str, one_of(BLOCKS)]
    width: PositiveInt
    activation: Annotated[str, one_of(ACTIVATIONS)]
    sites: str
    recipe: Annotated[str, one_of(RECIPES)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    evaluation: Annotated[str, one_of(PROTOCOLS)]
    set: str | None = None
    sample: bool = False
    limit: NonNegativeInt | None = None
    validation: PositiveInt | None = None
    lr: PositiveFloat | None = None  # instead of the recipe's

    def settings(self) -> dict[str, Any]:
        """What a result must agree with to be the result of this run."""
        return self.model_dump(exclude={"name", "lr"}) | {"numbers": self.numbers()}

    def numbers(self) -> dict[str, Any]:
        """The recipe's numbers, with the epochs and the learning rate of this run."""
        own = {"epochs": self.epochs} | ({"lr": self.lr} if self.lr else {})
        return dataclasses.asdict(RECIPES[self.recipe]) | own


class Row(BaseModel, frozen=True, extra="forbid", strict=True):
    """A row of a table: runs of one network, an error of the paper for each column."""

    label: str
    run: str
    paper: list[float] | None = None
    base: bool = False
    best: bool = False


class Table(BaseModel, frozen=True, extra="forbid", strict=True):
    """One table; `against` is a row's label."""

    number: str
    title: str
    columns: list[str] = Field(min_length=1)
    rows: list[Row] = Field(min_length=1)
    budget: str = "short"
    note: str = ""
    against: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Table":
        labels = [row.label for row in self.rows]
        if self.against is not None and self.against not in labels:
            raise ValueError(f"against: no row has the label {self.against!r}; labels: {', '.join(labels)}")
        if odd := [r.label for r in self.rows if r.paper and len(r.paper) != len(self.columns)]:
            raise ValueError(f"paper: {len(self.columns)} numbers are needed, one a column: {', '.join(odd)}")
        return self


class Queue(BaseModel, frozen=True, extra="forbid", strict=True):
    """All runs by name and all tables by number, both in order."""

    runs: dict[str, Run]
    tables: dict[str, Table]

    @model_validator(mode="after")
    def _check(self) -> "Queue":
        names, wrong = list(self.runs), []
        for place, run in enumerate(self.runs.values()):
            if run.set is not None and run.set not in names[:place]:
                wrong.append(f"runs.{run.name}.set: no run above it is {run.set!r}")
        for table in self.tables.values():
            for row in table.rows:
                runs = self.runs_of(table, row)
                if not runs:
                    wrong.append(f"tables.{table.number}: no run {table.budget}-{row.run}")
                if row.best and (without := [r.name for r in runs if not r.validation]):
                    wrong.append(f"tables.{table.number}: best, but no validation: {', '.join(without)}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def runs_of(self, table: Table, row: Row) -> list[Run]:
        """Runs that a row shows, one for each seed."""
        name = re.compile(rf"{re.escape(f'{table.budget}-{row.run}')}(-seed\d+)?")
        return [run for run in self.runs.values() if name.fullmatch(run.name)]

    def shows_best(self, run: Run) -> bool:
        """Whether a table shows the best epoch of a run."""
        rows = ((t, row) for t in self.tables.values() for row in t.rows if row.best)
        return any(run in self.runs_of(table, row) for table, row in rows)


class _File(BaseModel, extra="forbid"):
    """The sections of the file; an entry of `runs` omits what its budget or `defaults` say."""

    defaults: dict[str, Any]
    budgets: dict[str, dict[str, Any]]
    runs: dict[str, dict[str, Any]]
    tables: dict[str, dict[str, Any]]


def read_queue(path: Path = QUEUE) -> Queue:
    """Read the queue file. Raises one `ValueError` that names every wrong entry."""
    try:
        file = _File.model_validate(tomllib.loads(path.read_text()))
        runs = {
            name: {"name": name} | file.defaults | file.budgets.get(name.split("-")[0], {}) | entry
            for name, entry in file.runs.items()
        }
        tables = {number: {"number": number} | entry for number, entry in file.tables.items()}
        return Queue.model_validate({"runs": runs, "tables": tables})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    except ValidationError as error:
        wrong = [
            ": ".join(filter(None, [".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")]))
            for e in error.errors()
        ]
        raise ValueError(f"{path}: {'; '.join(wrong)}") from None
