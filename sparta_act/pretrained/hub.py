"""Where the files of a set are: in a folder, in this package, or on the Hugging Face Hub."""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparta_act.errors import WeightsError, readable
from sparta_act.pretrained.fetching import fetch
from sparta_act.pretrained.folder import CONFIG, WEIGHTS, name_of
from sparta_act.pretrained.nearest import did_you_mean

ORGANIZATION = "sparta-act"
NAMED = (
    "Check the name, the revision, and `token` if the set is private or gated; offline, only folders, sets "
    "in the package and sets downloaded before can be loaded"
)
URL = re.compile(r"( for url:?)? '?https?://\S*[^\s:.']'?")
SETS = Path(__file__).parents[1] / "sets"
# Our sets: name -> what is known of it. All of them are in a checkout, in SETS; pyproject.toml lists those in
# the wheel, the others are on the Hub. A set does not change: a better one gets another name.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shipped.json").read_bytes())
SHIPPED: dict[str, dict[str, str]] = {name: known["sha256"] for name, known in PUBLISHED.items()}  # by file


@dataclasses.dataclass(frozen=True)
class Found:
    """The folder of a set, what to do if it does not load, and what its files must be."""

    name: str
    folder: Path
    advice: str = "Get the set again from where it was made, or save it again with save_pretrained"
    hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of a set of ours: file -> sha256
    again: "Callable[[], Found] | None" = None  # fetches it once more

    def check(self) -> None:
        """Raise `WeightsError` where a file of a set of ours is not as we made it."""
        try:
            wrong = [
                name
                for name, sha256 in self.hashes.items()
                if not (file := self.folder / name).is_file()
                or hashlib.sha256(file.read_bytes()).hexdigest() != sha256
            ]
        except OSError as error:
            raise WeightsError(f"a file of it cannot be read: {error}") from None
        if wrong:
            raise WeightsError(
                f"it does not hold {self.name!r} as sparta-act made it: {', '.join(wrong)} missing or "
                f"changed (sha256)"
            )


def locate(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Found:
    """A set in an existing folder, else one of ours, else a download from the Hub.

    Raises `WeightsError` where there is none.
    """
    known = f"a folder with {CONFIG} and {WEIGHTS}, 'organization/name' on the Hub, or one of {list(SHIPPED)}"
    name, shown = name_of(name_or_path), readable(repr(name_or_path), 300)
    if not name:
        raise WeightsError(f"a set is loaded by its name, not by {shown}: name {known}")
    if (is_folder := os.path.isdir(name)) or name in SHIPPED:
        if revision is not None:
            raise WeightsError(
                f"{shown} is not loaded from a repository and has no revisions: "
                f"omit revision={readable(repr(revision), 100)}, or name 'organization/name' on the Hub"
            )
        if is_folder:
            hides = "This folder hides our set of the same name: rename it, or work in another folder"
            return Found(name, Path(name), hides) if name in SHIPPED else Found(name, Path(name))
        if os.path.isdir(SETS / name):
            return Found(name, SETS / name, "Install sparta-act again, or restore the files", SHIPPED[name])
    near = did_you_mean(name, SHIPPED)
    is_path = isinstance(name_or_path, os.PathLike) or os.path.lexists(name)
    if is_path or len(name) > 200 or not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):
        raise WeightsError(
            f"there is no folder {shown}{near}, and that is no name on the Hub either: name {known}"
        )
    repo_id = name if "/" in name else f"{ORGANIZATION}/{name}"
    ours = name.lower().removeprefix(f"{ORGANIZATION}/")  # the Hub ignores case
    hashes = SHIPPED[ours] if ours in SHIPPED and revision is None else {}

    def from_hub(force: bool = False) -> Found:
        try:
            folder = fetch(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                force=force,
                known="/" in name or bool(hashes) or not near,
            )
        except Exception as error:  # of requests, httpx or httpx2, by the version of huggingface-hub
            said, then = readable(reason(error), 300), NAMED
            if "/" not in name:  # one of ours: in fewer words
                said, then = readable(URL.sub("", reason(error)), 120), "list_sets() shows our sets"
            raise WeightsError(
                f"cannot load {shown}: there is no such folder, our sets are {list(SHIPPED)}{near}, and "
                f"{repo_id} at revision {readable(revision or 'main', 100)} cannot be fetched: "
                f"{said}. {then}"
            ) from None  # the chain of the client is long, and says no more
        cause = "A newer sparta-act may know it" if hashes else "It may be broken on the Hub"
        cache = folder.parents[1]  # holds the files, to which the commits link
        advice = f"{cause}, or the cache is broken: delete {cache} and try again"
        again = None if force or local_files_only else functools.partial(from_hub, True)
        files = {file: hashes[file] for file in (CONFIG, WEIGHTS) if hashes}
        return Found(ours if hashes else name, folder, advice, files, again)

    return from_hub()


def reason(error: Exception) -> str:
    """One line on what went wrong, with the kind of error."""
    return readable(error if isinstance(error, WeightsError) else f"{type(error).__name__}: {error}")
