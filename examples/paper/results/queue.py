"""The queue of `campaign.toml`: its runs, what each still needs, and the results that are filed."""

import dataclasses
import datetime
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from examples.paper.common.data import DATASETS
from examples.paper.common.models import ACTIVATIONS, BLOCKS
from examples.paper.common.records import check_errors
from examples.paper.common.sets import trained_alike
from examples.paper.training.recipes import RECIPES
from examples.paper.training.train import PROGRESS, read_log
from sparta_act.pretrained import CONFIG, WEIGHTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

QUEUE = Path(__file__).parents[1] / "queue.toml"
RESULTS = Path(__file__).parents[3] / "docs" / "results"
BUDGETS = ("short", "paper")  # of a table that names none
FIELDS = {  # of a table
    **dict.fromkeys(("number", "title", "note", "against", "compared"), str),
    **dict.fromkeys(("columns", "rows", "budgets", "figure", "neighbours"), list),
    "findings": dict,
}
DIFFERENCE = re.compile(r"[+-]\d+\.\d ± \d+\.\d")  # as the tables print it
FOLDERS = {"cifar10": "cifar10", "svhn": "svhn", "mnist-m": "mnist_m"}  # of each data set, beside each other


@dataclasses.dataclass(frozen=True)
class Run:
    """One entry: a network, how it is trained and evaluated; `set` names the run whose SPARTA it gets."""

    name: str
    epochs: int
    dataset: str
    arch: str
    width: int
    activation: str
    sites: str
    recipe: str
    seed: int
    evaluation: str
    set: str | None = None
    sample: bool = False
    limit: int | None = None
    validation: int | None = None

    def settings(self) -> dict[str, Any]:
        """What a result must agree with to be this run's, the recipe's numbers included."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "name"} | {
            "numbers": self.numbers()
        }

    def numbers(self) -> dict[str, Any]:
        """The recipe's, with this run's epochs."""
        return dataclasses.asdict(RECIPES[self.recipe]) | {"epochs": self.epochs}


@dataclasses.dataclass(frozen=True)
class Queue:
    """All runs by name, in their order, and the paper's tables."""

    epochs: dict[str, int]
    runs: dict[str, Run]
    tables: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class State:
    """State of a run: done, running, stopped, missing or waiting; and a word more."""

    word: str
    detail: str = ""


def read_queue(path: Path = QUEUE) -> Queue:
    """The queue file. Raises `ValueError` that names every entry it cannot make sense of."""
    try:
        text = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    try:
        epochs, defaults, evaluations = text["epochs"], text["defaults"], text["evaluations"]
        entries, tables = text["runs"], text["tables"]
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from None
    runs: dict[str, Run] = {}
    wrong = []
    for name, entry in entries.items():
        numbers = defaults | entry
        unknown = [
            f"{what} {numbers.get(what)!r}"
            for what, known in (
                ("dataset", FOLDERS),
                ("arch", BLOCKS),
                ("activation", ACTIVATIONS),
                ("recipe", RECIPES),
                ("evaluation", evaluations),
                ("set", (None, *runs)),
            )
            if numbers.get(what) not in known
        ]
        budget = name.split("-")[0]
        if budget not in epochs:
            unknown.append(f"budget {budget!r}")
        unknown += [f"{k} {numbers.get(k)!r}" for k in ("width", "seed") if type(numbers.get(k)) is not int]
        held = numbers.get("validation", 1)
        unknown += [f"validation {held!r}"] if type(held) is not int or held < 1 else []
        unknown += [f"field {k!r}" for k in numbers.keys() - {f.name for f in dataclasses.fields(Run)}]
        if unknown:
            wrong.append(f"{name}: unknown {', '.join(unknown)}")
            continue
        numbers["evaluation"] = evaluations[numbers["evaluation"]]
        runs[name] = Run(name=name, epochs=epochs[budget], **numbers)
    for i, table in enumerate(tables):
        if lacks := flaw(table):
            wrong.append(f"table {table.get('number', i + 1)}: {lacks}")
    if wrong:
        raise ValueError(f"{path}: " + "; ".join(wrong))
    return Queue(epochs, runs, tables)


def flaw(table: dict[str, Any]) -> str:
    """What an entry of `[[tables]]` lacks or has wrong, as text; empty if nothing."""
    if odd := [k for k, v in table.items() if not isinstance(v, FIELDS.get(k, ()))]:
        return f"{', '.join(odd)}: unknown, or of another type than text, a list or a table"
    figure, findings = table.get("figure"), table.get("findings", {})
    if odd := [t for t in (*(figure or ()), *findings.values()) if type(t) is not str]:
        return f"text was wanted in its figure and findings, found {odd}"
    if silent := [b for b, text in findings.items() if not DIFFERENCE.search(text)]:
        return f"its finding for {', '.join(silent)} quotes no difference such as '-1.2 ± 0.8'"
    if figure == []:
        return "its figure names no column"
    needed = {"rows": ("label", "run"), "neighbours": ("label", "accuracy", "source")}
    if lacks := [k for k in ("number", "title", "columns", "rows") if k not in table]:
        return f"it lacks {', '.join(lacks)}"
    for part, keys in needed.items():
        for entry in table.get(part, ()):
            if lacks := [k for k in keys if k not in entry]:
                return f"{entry} of its {part} lacks {', '.join(lacks)}"
    if any(len(row.get("paper", table["columns"])) != len(table["columns"]) for row in table["rows"]):
        return f"`paper` of a row has not as many numbers as there are columns: {table['columns']}"
    if table.get("against") not in (None, *(row["label"] for row in table["rows"])):
        return f"`against` is {table['against']!r}, the label of none of its rows"
    if "neighbours" in table and table.get("compared") not in table["columns"]:
        return f"it has neighbours, and `compared` is {table.get('compared')!r}, none of its columns"
    return ""


def read_result(name: str, results: Path) -> dict[str, Any] | None:
    """What was filed for a run, if anything. Raises `ValueError` for a file that is no result."""
    path = results / f"{name}.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; restore it, or delete it and run again") from None
    try:
        dict(result["settings"]), str(result["machine"]), str(result["test images"])
        check_errors(result["errors"])
        numbers = [result[k] for k in ("seconds per epoch", "parameters", "multiply-adds")]
        numbers += result["last epoch"].values()
        if "best errors" in result:
            check_errors(result["best errors"])
            numbers += result["best epoch"].values()
        if wrong := [n for n in numbers if not _is_number(n)]:
            raise ValueError(f"no number: {wrong}")
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is no result of campaign.py ({error!r}); restore it, or delete it and run again"
        ) from None
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def result_of(run: Run, results: Path) -> dict[str, Any] | None:
    """The filed result of a run, if it is of this entry as it is now."""
    result = read_result(run.name, results)
    return result if result is not None and not changes(run, result) else None


def changes(run: Run, other: dict[str, Any]) -> str:
    """In what the settings of a result or a begun run differ from the entry, as text; empty if in nothing."""
    now, then = run.settings(), other["settings"]
    return ", ".join(
        f"{k} was {then.get(k)!r}, is {now.get(k)!r}"
        for k in sorted(now.keys() | then.keys())
        if now.get(k) != then.get(k)
    )


def runs_of(queue: Queue, row: dict[str, Any], budget: str) -> list[Run]:
    """Runs that a table's row shows for a budget, one for each seed."""
    name = re.compile(rf"{budget}-{re.escape(row['run'])}(-seed\d+)?")
    return [run for run in queue.runs.values() if name.fullmatch(run.name)]


def shows_best(queue: Queue, run: Run) -> bool:
    """Whether a row of a table shows the best epoch of a run, by training images held out."""
    return run.validation is not None and any(
        row.get("best") and run in runs_of(queue, row, budget)
        for table in queue.tables
        for row in table["rows"]
        for budget in table.get("budgets", BUDGETS)
    )


def state(queue: Queue, run: Run, runs: Path, results: Path) -> State:
    """State of a run, from the files alone."""
    result = read_result(run.name, results)
    lacks = result is not None and shows_best(queue, run) and "best errors" not in result
    if result is not None and not lacks and not changes(run, result):
        return State("done", f"clean error {result['errors']['clean']['error']:.1%}")
    folder = runs / run.name
    epoch = len(read_log(folder / "log.csv"))
    if is_locked(folder):
        return State("running", f"epoch {min(epoch + 1, run.epochs)} of {run.epochs}{pace(folder, epoch)}")
    begun = read_begun(folder)
    if begun and (changed := changes(run, {"settings": begun["settings"] | {"evaluation": run.evaluation}})):
        return State("changed", f"{folder} was begun otherwise: {changed}; move or delete it")
    if run.set is not None and given_set(queue, run, runs) is None:
        place = runs / run.set / "set"
        return State("waiting", f"for {run.set}, whose set is neither in {place} nor in the package")
    if (folder / "checkpoint.pt").exists():
        told = f"after epoch {epoch} of {run.epochs}" if epoch < run.epochs else "trained, not evaluated"
        return State("stopped", told)
    told = "without its best epoch" if lacks else changes(run, result) if result is not None else ""
    return State("missing", f"an older result is filed: {told}" if told else "")


def pace(folder: Path, epoch: int) -> str:
    """How fast the epoch under way goes and when the training ends, as text; empty where nothing tells."""
    try:
        now = json.loads((folder / PROGRESS).read_text())
        if now["epoch"] != epoch + 1:
            return ""
        ends = datetime.datetime.fromtimestamp(now["ends"])
        return f", {now['images']:,} images, {now['images per second']:.0f} a second, ends {ends:%a %H:%M}"
    except (OSError, ValueError, KeyError):
        return ""


def given_set(queue: Queue, run: Run, runs: Path) -> str | None:
    """The set that a run gets frozen, if it is there: a folder, or the short name of a set of the package.

    Of the run that it waits for, or, where that is not on this machine, shipped from a training alike.
    """
    if run.set is None:
        return None
    giver, place = queue.runs[run.set], runs / run.set / "set"
    begun = read_begun(runs / run.set)
    whole = (place / CONFIG).exists() and (place / WEIGHTS).exists()  # config.json is written last
    if whole and begun and not changes(giver, begun):
        return str(place)
    if giver.sample or giver.limit:
        return None
    named = ("dataset", "arch", "activation", "sites", "width", "seed", "recipe")
    settings = {k: getattr(giver, k) for k in named} | {"pretrained": None} | giver.numbers()
    images = DATASETS[giver.dataset].images["train"] - (giver.validation or 0)
    return trained_alike(settings | {"images": images})


def read_begun(folder: Path) -> dict[str, Any] | None:
    """What was written when a run began: its settings and the commit; nothing if it did not begin."""
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        begun = json.loads(path.read_text())
        return {"settings": dict(begun["settings"]), "git commit": str(begun["git commit"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what campaign.py writes ({error}); delete {folder}") from None


def lock(folder: Path) -> FileLock:
    """What a process holds while it works on a run."""
    return FileLock(folder / "lock", timeout=0)


def is_locked(folder: Path) -> bool:
    """Whether some process works on a run."""
    if not (folder / "lock").exists():
        return False
    try:
        with lock(folder):
            return False
    except Timeout:
        return True
