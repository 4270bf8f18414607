"""State of a run, from its folder and its filed result."""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

from examples.paper.common.lock import is_locked
from examples.paper.common.records import check_errors, read_json
from examples.paper.common.statistics import rounded
from examples.paper.evaluation.protocols import PROTOCOLS
from examples.paper.results.queue import Queue, Run
from examples.paper.training.loop import PROGRESS, read_log
from sparta_act.pretrained import CONFIG, WEIGHTS

RESULTS = Path(__file__).parents[3] / "docs" / "results"
# what the tables show of a result, beside its errors
SHOWN = {"settings": dict, "last epoch": dict, "machine": str, "parameters": int, "multiply-adds": int}
SHOWN |= {"seconds per epoch": float, "test images": str}


@dataclasses.dataclass(frozen=True)
class State:
    """One of done, running, stopped, missing, waiting and changed, with a detail."""

    word: str
    detail: str = ""


def state(queue: Queue, run: Run, runs: Path, results: Path) -> State:
    """State of a run, from the files alone."""
    result = read_result(run.name, results)
    stale = "" if result is None else changes(run, result) or lacks(queue, run, result)
    if result is not None and not stale:
        return State("done", f"clean error {rounded(result['errors']['clean']['error'])}%")
    folder = runs / run.name
    epoch = len(read_log(folder / "log.csv"))
    if is_locked(folder):
        return State("running", f"epoch {min(epoch + 1, run.epochs)} of {run.epochs}{pace(folder, epoch)}")
    begun = read_begun(folder)
    if begun and (changed := trained_otherwise(run, begun)):
        return State("changed", f"{folder} began with other settings: {changed}; move or delete it")
    if run.set is not None and given_set(queue, run, runs) is None:
        place = runs / run.set / "set"
        return State("waiting", f"for {run.set}, whose set is not in {place}")
    if (folder / "checkpoint.pt").exists():
        after = f"after epoch {epoch} of {run.epochs}" if epoch < run.epochs else "trained, not evaluated"
        return State("stopped", after)
    return State("missing", f"an older result is filed: {stale}" if stale else "")


def read_result(name: str, results: Path) -> dict[str, Any] | None:
    """The filed result of a run, if there is one. Raises `ValueError` for a file that is not a result."""
    path = results / f"{name}.json"
    if not path.exists():
        return None
    try:
        result = read_json(path)
        if missing := [k for k, kind in SHOWN.items() if not isinstance(result.get(k), kind)]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        [float(number) for number in (result["last epoch"]["epoch"], *result["last epoch"].values())]
        check_errors(result["errors"])
        if "best errors" in result:
            check_errors(result["best errors"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a result ({error!r}); restore it, or delete it and run again"
        ) from None
    return result


def result_of(run: Run, results: Path) -> dict[str, Any] | None:
    """The filed result of a run, if its settings are those of the queue."""
    result = read_result(run.name, results)
    return result if result is not None and not changes(run, result) else None


def changes(run: Run, other: dict[str, Any]) -> str:
    """How the settings of a result, or of a run that began, differ from the queue; empty if they agree."""
    now, then = run.settings(), other["settings"]
    return ", ".join(
        f"{k} was {then.get(k)!r}, is {now.get(k)!r}"
        for k in sorted(now.keys() | then.keys())
        if now.get(k) != then.get(k)
    )


def lacks(queue: Queue, run: Run, result: dict[str, Any]) -> str:
    """What a filed result lacks of what its run measures now; empty if it lacks nothing."""
    protocol = PROTOCOLS[run.evaluation]
    names = [a.name for a in protocol.attacks()] + list(protocol.worst_cases())
    missing = [name for name in names if name not in result["errors"]]
    if queue.shows_best(run) and "best errors" not in result:
        missing.append("the best epoch")
    return f"it lacks {', '.join(missing)}" if missing else ""


def pace(folder: Path, epoch: int) -> str:
    """Speed of the epoch under way and the end of the training, as text; empty if unknown."""
    try:
        now = json.loads((folder / PROGRESS).read_text())
        if now["epoch"] != epoch + 1:
            return ""
        ends = datetime.datetime.fromtimestamp(now["ends"])
        return f", {now['images']:,} images, {now['images per second']:.0f} a second, ends {ends:%a %H:%M}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return ""


def given_set(queue: Queue, run: Run, runs: Path) -> str | None:
    """The folder of the set that a run gets, frozen, if the run that gives it has trained it."""
    if run.set is None:
        return None
    giver, place = queue.runs[run.set], runs / run.set / "set"
    begun = read_begun(runs / run.set)
    whole = (place / CONFIG).exists() and (place / WEIGHTS).exists()  # config.json is written last
    return str(place) if whole and begun and not trained_otherwise(giver, begun) else None


def trained_otherwise(run: Run, begun: dict[str, Any]) -> str:
    """Which settings of a training are not those that it began with; its evaluation may be another."""
    return changes(run, {"settings": begun["settings"] | {"evaluation": run.evaluation}})


def read_begun(folder: Path) -> dict[str, Any] | None:
    """Settings and commit that a run began with; nothing if it did not begin."""
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        begun = json.loads(path.read_text())
        return {"settings": dict(begun["settings"]), "git commit": str(begun["git commit"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say how the run began ({error!r}); delete {folder}") from None
